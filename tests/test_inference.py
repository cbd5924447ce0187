# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""Prepared models against the models they were made of, in fp64, by the correctness rule.

err(prepared, fp64 model) <= 2 * err(model in the same dtype, fp64 model) + 2 ulp, errors as root mean squares over the
output: a network's largest error over a few hundred values is one draw of the rounding, its root mean square is not.
"""

from __future__ import annotations

import collections
import contextlib
import copy
import itertools
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

from maetok_fast.diffusion import sample
from maetok_fast.inference import prepare
from maetok_fast.inference.packing import PACK_WIDTH
from maetok_fast.inference.plan import PLAN_ROWS
from maetok_fast.kernels import _gemm, _native
from maetok_fast.kernels.packed_linear import PackedLinear
from maetok_fast.models import LightningDiT, LightningDiTConfig, MAETok, MAETokConfig, SiT, SiTConfig, ViTSize
from maetok_fast.precision import Precision, resolve

DTYPES = [torch.float32, torch.bfloat16]


def randomised(model: nn.Module) -> Any:
    """Zero-initialised gates would hide most of the network."""
    torch.manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.requires_grad and "freqs" not in name:
                p.copy_(torch.randn(p.shape) * 0.06 + (0.8 if name.endswith(("norm1.weight", "gamma")) else 0))
    return model.eval()


def rms(x: Tensor) -> float:
    return x.double().square().mean().sqrt().item()


def assert_rule(got: Tensor, plain: Tensor, exact: Tensor, dtype: torch.dtype) -> None:
    assert got.shape == exact.shape
    assert torch.isfinite(got).all()
    ours, theirs = rms(got - exact), rms(plain - exact)
    limit = 2 * theirs + 2 * torch.finfo(dtype).eps * rms(exact)
    assert ours <= limit, f"error {ours:.3g}, the model's own {theirs:.3g}, limit {limit:.3g}"


def small(**changes: Any) -> dict[str, Any]:
    return {"tokens": 12, "channels": 8, "dim": 96, "depth": 3, "heads": 4, "num_classes": 20} | changes


GENERATORS = {
    "sit": lambda: SiT(SiTConfig(**small())),
    "sit, q/k norm": lambda: SiT(SiTConfig(**small(qk_norm=True))),
    "sit on a grid": lambda: SiT(SiTConfig(**small(tokens=(4, 6), patch=2, channels=4, learn_sigma=True, time="sit"))),
    "lightningdit": lambda: LightningDiT(LightningDiTConfig(**small(tokens=(4, 3)), qk_norm=True)),
    "lightningdit, 1-D, gelu, no shift": lambda: LightningDiT(
        LightningDiTConfig(**small(), rmsnorm=False, swiglu=False, shift=False)
    ),
}


def generator_inputs(model: Any, batch: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    tokens, channels = model.config.tokens, model.config.channels
    shape = (batch, tokens, channels) if isinstance(tokens, int) else (batch, channels, *tokens)
    return torch.randn(shape), torch.rand(batch), torch.tensor([1, 5, 20, 1, 7])[:batch]


@pytest.fixture(scope="module", params=GENERATORS)
def generator(request: pytest.FixtureRequest) -> Any:
    return randomised(GENERATORS[request.param]())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_generator_equals_the_model(generator: Any, dtype: torch.dtype) -> None:
    before = copy.deepcopy(generator.state_dict())
    x, t, y = generator_inputs(generator)
    x = x.to(dtype)
    with torch.no_grad():
        exact = copy.deepcopy(generator).double()(x.double(), t.double(), y)
        plain = copy.deepcopy(generator).to(dtype)(x, t, y)
    fast = prepare(generator, dtype)
    assert_rule(fast(x, t, y), plain, exact, dtype)
    assert fast(x.float(), t, y).dtype == torch.float32
    for name, value in generator.state_dict().items():
        assert torch.equal(value, before[name]), f"prepare changed {name}"
    assert all(p.requires_grad for n, p in generator.named_parameters() if "pos_embed" not in n)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_steps_of_a_plan_equal_forwards(generator: Any, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """With repeated labels, with all different ones, and with chunks shorter than the plan."""
    x, _, y = generator_inputs(generator, 4)
    x, ts = x.to(dtype), torch.linspace(1, 0, 8)[:-1].double()
    fast = prepare(generator, dtype)
    for labels in (y, torch.arange(4), torch.arange(4).flip(0)):
        for limit in (PLAN_ROWS, 2 * len(labels.unique())):
            monkeypatch.setattr("maetok_fast.inference.plan.PLAN_ROWS", limit)
            plan = fast.plan(ts, labels)
            for i in (0, 1, 2, 6, 3):
                want = fast(x, torch.full((4,), ts[i].item()), labels)
                got = fast.step(plan, i, x)
                assert rms(got - want) <= 4 * torch.finfo(dtype).eps * rms(want)
                assert plan.modulations is not None
                assert len(plan.modulations.final) <= max(limit, len(plan.labels))


@pytest.mark.skipif(_native.why_missing() is not None, reason="the packed GEMM needs the native library")
def test_weights_in_half_the_memory(generator: Any) -> None:
    """weights=torch.bfloat16: fp32 arithmetic over the rounded weights, and nothing else is rounded."""
    x, t, y = generator_inputs(generator)
    fast = prepare(generator, "fp32", torch.bfloat16)
    rounded = copy.deepcopy(generator)
    with torch.no_grad():
        for name, p in rounded.named_parameters():
            if p.ndim == 2 and "embed" not in name and min(p.shape) >= PACK_WIDTH:
                p.copy_(p.bfloat16())
        exact = copy.deepcopy(rounded).double()(x.double(), t.double(), y)
        assert_rule(fast(x, t, y), rounded(x, t, y), exact, torch.float32)
    kept = [m for m in fast.model.modules() if isinstance(m, PackedLinear)]
    halves = [m._panels.data for m in kept]
    as_fp32 = [
        _gemm.Panels.of(torch.zeros(m.out_features << m.gated, m.in_features), None, "fp32", m.gated) for m in kept
    ]
    assert 2 * sum(data.nbytes for data in halves) == sum(panels.data.nbytes for panels in as_fp32)
    with pytest.raises(ValueError, match=r"weights=torch\.float16 under fp32 on cpu"):
        prepare(generator, "fp32", torch.float16)
    with pytest.raises(ValueError, match=r"weights=torch\.float32 under bf16"):
        prepare(generator, "bf16", torch.float32)


def test_guided_batch_shares_the_null_row() -> None:
    """Guidance over a plan equals the doubled batch, and holds one row per distinct label."""
    model = randomised(SiT(SiTConfig(**small(num_classes=1000))))
    fast = prepare(model, torch.float32)
    y = torch.tensor([3, 4, 3, 9])
    both = torch.cat([y, torch.full_like(y, 1000)])
    plan = fast.plan(torch.tensor([0.7, 0.2]), both)
    x = torch.randn(4, 12, 8)
    doubled = torch.cat([x, x])
    with torch.no_grad():
        want = model(doubled, torch.full((8,), 0.2), both)
    got = fast.step(plan, 1, doubled)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    assert len(plan.modulations.final) == 2 * 4  # 2 steps of labels 3, 4, 9 and null
    a = sample(model, x, y, steps=3, method="euler", guidance=2.0)
    b = sample(fast, x, y, steps=3, method="euler", guidance=2.0)
    torch.testing.assert_close(a.latents, b.latents, rtol=1e-4, atol=1e-4)
    assert (a.nfe, a.rows) == (b.nfe, b.rows)


SIZE = ViTSize(dim=96, depth=3, heads=4)
TOKENIZERS = {
    "movq": {},
    "plain": {"decoder_kind": "plain"},
    "plain, decoder cls, axial": {"decoder_kind": "plain", "decoder_cls_token": True, "position": "axial"},
    "movq, absolute": {"position": "absolute"},
    "movq, decoder cls": {"decoder_cls_token": True},
    "no latent tokens": {"num_latent_tokens": 0},
}


@pytest.fixture(scope="module", params=TOKENIZERS)
def tokenizer(request: pytest.FixtureRequest) -> Any:
    settings = {"num_latent_tokens": 6, "latent_dim": 8} | TOKENIZERS[request.param]
    return randomised(MAETok(MAETokConfig(image_size=32, patch=8, encoder=SIZE, decoder=SIZE, **settings)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [(32, 32), (24, 48)], ids=str)
def test_tokenizer_equals_the_model(tokenizer: Any, dtype: torch.dtype, size: tuple[int, int]) -> None:
    images = (torch.rand(2, 3, *size) * 2 - 1).to(dtype)
    mask = torch.rand(2, size[0] * size[1] // 64) < 0.5
    exact_model, plain_model = copy.deepcopy(tokenizer).double(), copy.deepcopy(tokenizer).to(dtype)
    fast = prepare(tokenizer, dtype)
    with torch.no_grad():
        for given in (None, mask):
            exact, plain = exact_model.encode(images.double(), given), plain_model.encode(images, given)
            assert_rule(fast.encode(images, given), plain, exact, dtype)
        latents = exact.to(dtype)
        exact, plain = exact_model.decode(latents.double(), size), plain_model.decode(latents, size)
        assert_rule(fast.decode(latents, size), plain, exact, dtype)
        assert fast(images.float()).shape == images.shape
        assert fast(images.float()).dtype == torch.float32


def test_what_prepare_refuses() -> None:
    model = randomised(SiT(SiTConfig(**small())))
    with pytest.raises(TypeError, match="not Linear"):
        prepare(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="fp8"):
        prepare(model, "fp8")
    with pytest.raises(ValueError, match="unknown precision"):
        prepare(model, torch.float64)
    fast = prepare(model, "bf16")
    x, t, y = generator_inputs(model)
    with pytest.raises(RuntimeError, match="no gradients"):
        fast(x.requires_grad_(), t, y)
    with pytest.raises(TypeError, match="floating-point"):
        fast(torch.zeros(3, 12, 8, dtype=torch.int64), t, y)
    with pytest.raises(IndexError, match="step 2"):
        fast.step(fast.plan(torch.tensor([0.5, 0.1]), y), 2, x.detach())
    with pytest.raises(ValueError, match="ts must be"):
        fast.plan(torch.tensor([1, 0]), y)
    with pytest.raises(ValueError, match=r"x: expected shape \(3, 12, 8\), got \(2, 12, 8\)"):
        fast.step(fast.plan(torch.tensor([0.5, 0.1]), y), 0, x.detach()[:2])
    with pytest.raises(ValueError, match=r"class labels must be 0 \.\. 20"):
        fast.plan(torch.tensor([0.5]), y + 1)
    assert "SiTConfig" in repr(fast)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_prepared_models_are_snapshots_and_ignore_autocast(tokenizer: Any, dtype: torch.dtype) -> None:
    generator, tokenizer = randomised(GENERATORS["lightningdit"]()).to(dtype), copy.deepcopy(tokenizer).to(dtype)
    x, t, y = generator_inputs(generator)
    images = torch.rand(1, 3, 32, 32) * 2 - 1
    fast, fast_tokenizer = prepare(generator, dtype), prepare(tokenizer, dtype)
    plan = fast.plan(torch.tensor([0.5]), y)
    want = fast(x, t, y), fast.step(plan, 0, x), fast_tokenizer(images)
    with torch.no_grad():
        for p in itertools.chain(generator.parameters(), tokenizer.parameters()):
            p.zero_()
    for context in (contextlib.nullcontext(), torch.autocast("cpu", torch.bfloat16)):
        with context:
            plan = fast.plan(torch.tensor([0.5]), y)
            got = fast(x, t, y), fast.step(plan, 0, x), fast_tokenizer(images)
        assert all(torch.equal(g, w) for g, w in zip(got, want))


REFUSED = {
    "copy.deepcopy": (copy.deepcopy, "cannot be copied"),
    "copy.copy": (copy.copy, "cannot be copied"),
    "pickle": (pickle.dumps, "cannot be pickled"),
    "to": (lambda fast: fast.to("cpu"), "stays on its device"),
    "cuda": (lambda fast: fast.cuda(), "stays on its device"),
    "half": (lambda fast: fast.half(), "stays on its device"),
    "state_dict": (lambda fast: fast.state_dict(), "has no state dict"),
    "load_state_dict": (lambda fast: fast.load_state_dict({}), "has no state dict"),
    "parameters": (lambda fast: list(fast.parameters()), "has no state dict and no parameters"),
    "train": (lambda fast: fast.train(), "is for inference only and cannot train"),
    "requires_grad_": (lambda fast: fast.requires_grad_(), "computes no gradients"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_unsupported_operations_say_so(what: str) -> None:
    call, message = REFUSED[what]
    size = ViTSize(32, 1, 2)
    tokenizer = MAETok(MAETokConfig(image_size=32, patch=8, encoder=size, decoder=size))
    for fast in (prepare(SiT(SiTConfig(**small(depth=1))), "fp32"), prepare(tokenizer, "fp32")):
        with pytest.raises(TypeError, match=rf"^a prepared model {message}.*; \w+"):
            call(fast)
        assert fast.eval().train(False).requires_grad_(False) is fast


def test_derivatives_of_either_mode_are_refused() -> None:
    """Never a zero tangent in silence: forward-mode AD, torch.func.jvp and torch.func.grad, of x and of t."""
    model = randomised(SiT(SiTConfig(**small(depth=1))))
    x, t, y = generator_inputs(model)
    fast = prepare(model, "fp32")
    for call, at in ((lambda v: fast(v, t, y), x), (lambda v: fast(x, v, y), t)):
        with pytest.raises(RuntimeError, match="tangent"):
            torch.func.jvp(call, (at,), (torch.ones_like(at),))
        with forward_ad.dual_level(), pytest.raises(RuntimeError, match="tangent"):
            call(forward_ad.make_dual(at, torch.ones_like(at)))
        with pytest.raises(RuntimeError, match="computes no gradients"):
            torch.func.grad(lambda v, call=call: call(v).sum())(at)
    size = ViTSize(32, 1, 2)
    tokenizer = prepare(MAETok(MAETokConfig(image_size=32, patch=8, encoder=size, decoder=size)), "fp32")
    images = torch.rand(1, 3, 32, 32)
    for call, at in ((tokenizer, images), (tokenizer.decode, tokenizer.encode(images))):
        with pytest.raises(RuntimeError, match="tangent"):
            torch.func.jvp(call, (at,), (torch.ones_like(at),))


class _Count(TorchDispatchMode):
    """How often each operation runs."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: collections.Counter[str] = collections.Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls[str(func)] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", ["plain", "movqv2"])
def test_a_prepared_block_is_four_products_and_one_attention(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Norms, residuals, LayerScale and GELU cost no pass of their own."""
    tokenizer = MAETok(MAETokConfig(image_size=32, patch=8, encoder=SIZE, decoder=SIZE, decoder_kind=kind))
    fast = prepare(tokenizer)  # what this processor computes at full rate, and so packs
    images = torch.rand(1, 3, 32, 32)
    fast(images)
    layers = [m for m in fast.model.modules() if isinstance(m, PackedLinear)]
    if not all(m.backend.startswith("native") for m in layers):
        pytest.skip("these layers are not the packed GEMM's here")
    products: list[Any] = []
    monkeypatch.setattr(_gemm, "multiply", lambda *a, real=_gemm.multiply, **k: products.append(k) or real(*a, **k))
    with _Count() as count:
        fast(images)
    blocks = 2 * SIZE.depth
    assert len(products) == 4 * blocks + 1  # and to_pixel
    assert collections.Counter(p["join"] for p in products) == {
        _gemm.Join.none: 2 * blocks + 1,
        _gemm.Join.add: 2 * blocks,
    }
    assert sum(p["norm"][0] for p in products) == 2 * blocks
    assert count.calls["aten.add.Tensor"] == 1  # latent_tokens + latent_pos_embed
    assert not any("gelu" in name for name in count.calls)
    assert count.calls["maetok_fast.adaln.default"] == 2  # the last norm of either half
    assert count.calls["maetok_fast.rope_attention.default"] == blocks
    assert not any("gate_residual" in name or "residual_adaln" in name for name in count.calls)


def test_training_mode_is_left_behind() -> None:
    model = randomised(SiT(SiTConfig(**small()))).train()
    x, t, y = generator_inputs(model)
    fast = prepare(model, torch.float32)
    assert model.training
    assert torch.equal(fast(x, t, y), fast(x, t, y))


def test_precision_names() -> None:
    assert resolve("bf16") is resolve(torch.bfloat16) is resolve(resolve("bf16"))
    assert resolve("fp32").dtype == torch.float32
    with resolve("bf16").autocast("cpu"):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.bfloat16
    with resolve("fp32").autocast("cpu"):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32
    with pytest.raises(ValueError, match=r"capability 8\.9"):
        resolve("fp8", "cpu")
    with pytest.raises(ValueError, match="CUDA"):
        resolve("fp16", "cpu")
    with pytest.raises(ValueError, match="expected one of fp32"):
        resolve("int4")
    assert resolve(Precision("fp32", torch.float32)).name == "fp32"
