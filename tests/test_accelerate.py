# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""`maetok_fast.accelerate` on models of others' kinds (foreign_models.py), by the correctness rule."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from foreign_models import MODELS, Attention, Block, Mlp, PostNormBlock, Stack
from rule import allowed, terms_of
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import maetok_fast
from maetok_fast._accelerate.fast import Fast
from maetok_fast.kernels import _gemm, _native
from maetok_fast.models import MAETok, MAETokConfig, ViTSize

pytestmark = pytest.mark.usefixtures("one_thread")
packs = pytest.mark.skipif(_native.why_missing() is not None, reason="weights are packed by the native library")


def made(name: str) -> Any:
    torch.manual_seed(0)
    model = MODELS[name]()
    with torch.no_grad():
        for n, p in model.named_parameters():
            p.copy_(torch.randn(p.shape) * 0.08 + (0.9 if p.ndim == 1 and "bias" not in n else 0))
    return model.eval()


def rms(x: Tensor) -> float:
    return x.double().square().mean().sqrt().item()


def assert_rule(
    got: Tensor, plain: Tensor, exact: Tensor, what: str = "", terms: int = 1, term_size: float | None = None
) -> None:
    """As tests/test_inference.py: root mean squares, a network's largest error is one draw."""
    assert got.dtype == plain.dtype
    ours, theirs = rms(got - exact), rms(plain - exact)
    limit = allowed(theirs, rms(exact), got.dtype, terms, term_size)
    assert ours <= limit, f"{what}: error {ours:.3g}, the model's own {theirs:.3g}, limit {limit:.3g}"


def in_(model: nn.Module, dtype: torch.dtype) -> Any:
    return copy.deepcopy(model).to(dtype)


def cast(inputs: tuple[Tensor, ...], dtype: torch.dtype) -> tuple[Tensor, ...]:
    return tuple(x.to(dtype) for x in inputs)


def classes(model: nn.Module) -> list[type]:
    return [type(m) for m in model.modules()]


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest) -> Any:
    return made(request.param)


class Spy:
    """How often the originals' forwards run."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, model: nn.Module) -> None:
        self.calls: list[str] = []
        for kind in {type(m).fast_original for m in model.modules() if isinstance(m, Fast)} - {nn.Linear}:
            if kind.__name__ == "Rotary":
                continue
            own = kind.forward

            def forward(module: Any, *args: Any, own: Any = own, name: str = kind.__name__, **kwargs: Any) -> Any:
                self.calls.append(name)
                return own(module, *args, **kwargs)

            monkeypatch.setattr(kind, "forward", forward)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_block_is_recognised_and_computes_the_same(
    model: Any, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Values and gradients; every block, attention and MLP by its fast form and none by the original's."""
    model = model.to(dtype)
    inputs = cast(model.inputs(), dtype)
    exact_model, plain_model = in_(model, torch.float64), in_(model, dtype)
    report = maetok_fast.accelerate(model, quiet=True)
    assert not report.kept, report
    kinds = [kind for _, kind in report.swapped.values()]
    assert [kinds.count(k) for k in ("FastBlock", "FastMlp")] == [2, 2]
    assert kinds.count("FastAttention") + kinds.count("FastMultihead") == 2
    spy = Spy(monkeypatch, model)
    results = {}
    for name, m, of in (
        ("got", model, dtype), ("plain", plain_model, dtype), ("exact", exact_model, torch.float64)
    ):  # fmt: skip
        given = [x.clone().requires_grad_() for x in cast(inputs, of)]
        y = m(*given)
        if name == "got":
            assert spy.calls == []
        grads = torch.autograd.grad(y.square().sum(), [*given, *m.parameters()])
        results[name] = {"y": y, **dict(zip([*map(str, range(len(given))), *dict(m.named_parameters())], grads))}
    sizes = {key: (exact.numel(), rms(exact)) for key, exact in results["exact"].items()}
    tensors = [*inputs, *model.parameters()]
    for key, exact in results["exact"].items():
        # a bias on all keys changes no softmax: its gradient is a sum that cancels, whose terms are as large as others
        noise: tuple[Any, ...] = ()
        if key != "y":
            others = (size for name, (count, size) in sizes.items() if name != "y" and count >= exact.numel())
            noise = terms_of(exact, tensors), max(others)
        assert_rule(results["got"][key], results["plain"][key], exact, key, *noise)


@packs
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_packed_for_inference(model: Any, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    model = model.to(dtype)
    inputs = cast(model.inputs(), dtype)
    with torch.no_grad():
        exact, plain = in_(model, torch.float64)(*cast(inputs, torch.float64)), model(*inputs)
    before = copy.deepcopy(model)
    report = maetok_fast.accelerate(model, for_inference=True, quiet=True)
    assert [kind for _, kind in report.swapped.values()].count("PackedBlock") == 2
    spy = Spy(monkeypatch, model)
    got = model(*inputs)
    assert spy.calls == []
    assert not got.requires_grad
    assert all("_fast_packed" in vars(b) for b in model.blocks)
    assert_rule(got, plain, exact)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before.state_dict()[name])


def test_restore_gives_back_exactly_the_model(model: Any) -> None:
    modules, before, ids = list(model.modules()), classes(model), [id(p) for p in model.parameters()]
    keys, attributes = list(model.state_dict()), [dict(vars(m)) for m in modules]
    model.train()
    model.norm.requires_grad_(False)
    for for_inference in (False, True):
        maetok_fast.accelerate(model, for_inference=for_inference, quiet=True)
        assert classes(model) != before
        assert all(isinstance(m, kind) for m, kind in zip(model.modules(), before))
        assert [a is b for a, b in zip(model.modules(), modules)] == [True] * len(modules)
        assert ([id(p) for p in model.parameters()], list(model.state_dict())) == (ids, keys)
        assert model.training != for_inference
        maetok_fast.restore(model)
        assert classes(model) == before
        assert all(m.training for m in modules)
        assert [p.requires_grad for p in model.norm.parameters()] == [False, False]
        assert sum(p.requires_grad for p in model.parameters()) == len(ids) - 2
        assert [vars(m).keys() for m in modules] == [a.keys() for a in attributes]


def test_unknown_modules_and_unknown_forwards_are_left_alone() -> None:
    """The same children under another forward; a norm, an activation and a Linear that are others than they look."""

    class Scaled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    class TwoInputs(Attention):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:  # type: ignore[override]
            return super().forward(x + y)

    model = nn.ModuleDict(
        {
            "post": PostNormBlock(32, 2),
            "quick": Mlp(32, 64, nn.Hardswish),
            "scaled": Scaled(8, 8),
            "two": TwoInputs(32, 2),
            "wrong scale": Attention(32, 2),
            "gru": nn.GRU(4, 4),
        }
    )
    model["table"] = Attention(32, 2)
    model["table"].table = nn.Parameter(torch.zeros(3))
    x = torch.randn(2, 5, 32)
    want = model["post"](x), model["quick"](x)
    report = maetok_fast.accelerate(model, quiet=True)
    assert report.kept["post"] == (
        "PostNormBlock",
        "on a small input its forward computes something else than the fast form",
    )
    assert "act is a Hardswish" in report.kept["quick"][1]
    assert report.kept["scaled"][1] == "it is a kind of nn.Linear of its own"
    assert report.kept["two"][1] == "its forward wants y"
    assert "table, a parameter" in report.kept["table"][1]
    assert type(model["post"]) is PostNormBlock
    assert report.swapped["post.attn"] == ("Attention", "FastAttention")
    assert report.others["GRU"] == 1
    text = str(report)
    assert "left alone" in text
    assert "FastLinear" in text
    for got, exact in zip((model["post"](x), model["quick"](x)), want):
        torch.testing.assert_close(got, exact)
    with pytest.raises(TypeError, match=r"expected an nn\.Module, got int"):
        maetok_fast.accelerate(3)  # type: ignore[arg-type]


def test_our_own_models_are_fast_already() -> None:
    """Their blocks stay; for inference their linear layers are packed, with the activation behind them."""
    size = ViTSize(96, 1, 4)
    model = MAETok(MAETokConfig(image_size=32, patch=8, encoder=size, decoder=size)).eval()
    x, before = torch.rand(2, 3, 32, 32), classes(model)
    with torch.no_grad():
        want = model(x)
    report = maetok_fast.accelerate(model, quiet=True)
    assert not report.kept
    assert "inference.prepare" in str(report)
    changed = {kind for kind, now in zip(before, classes(model)) if kind is not now}
    assert changed == {nn.Linear}
    report = maetok_fast.accelerate(model, for_inference=True, quiet=True)
    assert {kind for _, kind in report.swapped.values()} <= {"PackedPlainLinear", "FastLinear"}
    torch.testing.assert_close(model(x), want, rtol=1e-4, atol=1e-5)


def test_it_prints_what_it_did(capsys: pytest.CaptureFixture[str]) -> None:
    report = maetok_fast.accelerate(made("timm"))
    assert capsys.readouterr().out == f"{report}\n"
    assert "   2 x Block -> FastBlock   (blocks.0)" in str(report)
    assert maetok_fast.accelerate is maetok_fast._accelerate.accelerate  # the module's import has not taken its place


def test_what_a_fast_layer_cannot_do_the_original_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """Masks; dropout and a hook on a skipped child; stochastic depth stays fast, drawn by the same numbers."""
    torch.manual_seed(0)
    block = Block(32, 2, rate=0.5, attn_drop=0.3).train()
    twin = copy.deepcopy(block)
    maetok_fast.accelerate(block, quiet=True)
    spy = Spy(monkeypatch, block)
    x, mask = torch.randn(4, 6, 32), torch.rand(6, 6) < 0.8
    mask.fill_diagonal_(True)

    def same(expected: list[str], **kwargs: Any) -> None:
        spy.calls.clear()
        torch.manual_seed(1)
        want = twin(x, **kwargs)
        spy.calls.clear()
        torch.manual_seed(1)
        got = block(x, **kwargs)
        assert spy.calls == expected
        torch.testing.assert_close(got, want)

    same(["Attention"])  # attention dropout is active there, and only there
    block.attn.attn_drop.p = twin.attn.attn_drop.p = 0.0
    same([])
    block.eval(), twin.eval()
    same(["Attention"], attn_mask=mask)
    seen: list[Any] = []
    for b in (block, twin):
        b.norm2.register_forward_hook(lambda m, args, y: seen.append(m))
    same(["Block"])
    assert seen == [twin.norm2, block.norm2]


@packs
def test_packed_weights_follow_the_parameters() -> None:
    model = made("DiT")
    inputs = model.inputs()
    maetok_fast.accelerate(model, for_inference=True, quiet=True)
    first = model(*inputs)
    with torch.no_grad():
        model.blocks[1].mlp.fc2.weight.mul_(2)
        model.blocks[0].attn.qkv.weight = nn.Parameter(torch.randn(192, 64) * 0.1, requires_grad=False)
    got = model(*inputs)
    twin = copy.deepcopy(model)
    assert torch.equal(twin(*inputs), got)
    with torch.autocast("cpu", torch.bfloat16):
        assert model(*inputs).dtype == torch.bfloat16
    x = inputs[0].clone().requires_grad_()
    (gradient,) = torch.autograd.grad(model(x, inputs[1]).sum(), x)
    maetok_fast.restore(model)
    with torch.no_grad():
        torch.testing.assert_close(got, model(*inputs), rtol=1e-4, atol=1e-5)
        assert not torch.allclose(first, got)
    (want,) = torch.autograd.grad(model(x, inputs[1]).sum(), x)
    torch.testing.assert_close(gradient, want, rtol=1e-4, atol=1e-5)


@packs
def test_weights_kept_in_other_dtypes() -> None:
    model = made("timm")
    (x,) = model.inputs()
    with torch.no_grad():
        want = model(x)
    for weights, error in ((torch.bfloat16, 0.02), (torch.int8, 0.1)):
        if weights == torch.int8 and _gemm.why_not_packed("int8", torch.device("cpu")) is not None:
            continue
        report = maetok_fast.accelerate(model, for_inference=True, weights=weights, quiet=True)
        assert f"kept in {weights}" in str(report)
        assert "2 x Block -> PackedBlock   (blocks.0)" in str(report)
        assert "FastMlp" not in str(report)
        assert 1e-4 < rms(model(x) - want) / rms(want) < error
    with pytest.raises(ValueError, match=r"weights=torch\.float16 cannot be kept beside torch\.float32"):
        maetok_fast.accelerate(model, for_inference=True, weights=torch.float16)
    with pytest.raises(ValueError, match="for_inference=True"):
        maetok_fast.accelerate(model, weights=torch.bfloat16)


@pytest.mark.parametrize("name", ["timm, LayerScale", "LightningDiT", "TiTok"])
def test_copies_pickles_state_dicts_and_casts(name: str) -> None:
    model = made(name)
    inputs = model.inputs()
    plain = copy.deepcopy(model)
    for for_inference in (False, True):
        maetok_fast.accelerate(model, for_inference=for_inference, quiet=True)
        with torch.no_grad():
            want = model(*inputs)
            for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
                assert classes(twin) == classes(model)
                assert torch.equal(twin(*inputs), want)
                maetok_fast.restore(twin)
                assert classes(twin) == classes(plain)
                assert all(p.requires_grad for p in twin.parameters())
            file = io.BytesIO()
            torch.save(model.state_dict(), file)
            file.seek(0)
            plain.load_state_dict(torch.load(file))
            model.load_state_dict(plain.state_dict())
            half = copy.deepcopy(model).to(torch.bfloat16)
            assert rms(half(*cast(inputs, torch.bfloat16)).float() - want) < 0.1 * rms(want)


@pytest.mark.parametrize("name", ["timm, LayerScale", "DINOv3", "LightningDiT", "TiTok", "MAETok's decoder"])
def test_autocast_and_checkpointing(name: str) -> None:
    model = made(name)
    inputs = model.inputs()
    plain = copy.deepcopy(model)
    with torch.no_grad():
        exact = in_(model, torch.float64)(*cast(inputs, torch.float64))
    maetok_fast.accelerate(model, quiet=True)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        assert_rule(model(*inputs), plain(*inputs), exact)
    block, given = model.blocks[0], model.positions(12)[1]
    x = torch.randn(2, 12, 64, requires_grad=True) if name != "TiTok" else torch.randn(12, 2, 64, requires_grad=True)
    grads = [
        torch.autograd.grad(call(x).square().sum(), [x, *block.parameters()])
        for call in (
            lambda x: block(x, *inputs[1:], **given),
            lambda x: checkpoint(block, x, *inputs[1:], use_reentrant=False, **given),
        )
    ]
    assert all(torch.equal(a, b) for a, b in zip(*grads))


@pytest.mark.parametrize("name", ["timm, LayerScale", "LightningDiT"])
def test_torch_compile(name: str) -> None:
    model = made(name)
    inputs = model.inputs()
    with torch.no_grad():
        want = model(*inputs)
        for for_inference in (False, True):
            maetok_fast.accelerate(model, for_inference=for_inference, quiet=True)
            torch._dynamo.reset()
            got = torch.compile(model, fullgraph=True, backend="aot_eager")(*inputs)
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@pytest.fixture
def group() -> Iterator[None]:
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module")
@pytest.mark.usefixtures("group")
@pytest.mark.parametrize("name", ["timm, LayerScale", "DINOv3", "DiT"])
def test_ddp_and_fsdp2(name: str) -> None:
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    model = made(name)
    inputs = model.inputs()
    maetok_fast.accelerate(model, quiet=True)
    wanted = torch.autograd.grad(model(*inputs).square().sum(), list(model.parameters()))
    wrapped = torch.nn.parallel.DistributedDataParallel(copy.deepcopy(model))
    wrapped(*inputs).square().sum().backward()
    assert all(torch.equal(p.grad, g) for p, g in zip(wrapped.parameters(), wanted))
    sharded = copy.deepcopy(model)
    mesh = torch.distributed.init_device_mesh("cpu", (1,))
    for block in sharded.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    sharded(*inputs).square().sum().backward()
    for p, g in zip(sharded.parameters(), wanted):
        assert isinstance(p.grad, DTensor)
        torch.testing.assert_close(p.grad.full_tensor(), g, rtol=1e-5, atol=1e-6)
    with pytest.raises(TypeError, match="restore before that"):
        maetok_fast.restore(sharded)


def test_optimizers_go_on() -> None:
    """Made before, stepping after: the same parameters."""
    model = made("timm, LayerScale")
    (x,) = model.inputs()
    twin = copy.deepcopy(model)
    optimizers = [torch.optim.SGD(m.parameters(), lr=1e-3) for m in (model, twin)]
    maetok_fast.accelerate(model, quiet=True)
    for m, optimizer in zip((model, twin), optimizers):
        for _ in range(3):
            optimizer.zero_grad()
            m(x).square().mean().backward()
            optimizer.step()
    for (name, p), q in zip(model.named_parameters(), twin.parameters()):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6, msg=name)


def test_what_cannot_be_tried_is_left_alone() -> None:
    with torch.device("meta"):
        model = Stack(Block)
    report = maetok_fast.accelerate(model, quiet=True)
    assert report.kept["blocks.0.attn"][1] == "it is on the meta device, where nothing can be tried"
    assert report.kept["blocks.0"][1] == "neither its attention nor its MLP was recognised"
    assert {kind for _, kind in report.swapped.values()} == {"FastLinear"}
