# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""The drop-in layers against the modules that they replace, whose parameters they share by name.

Each case: values and gradients by the correctness rule, state dicts there and back, autocast, torch.compile, copies,
pickles, casts, checkpointing, DDP and FSDP2 in a process of its own.
"""

from __future__ import annotations

import contextlib
import copy
import pickle
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
from rule import assert_rule
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from maetok_fast import layers
from maetok_fast.kernels import diff_augment_ref, draw_augmentation, hog_ref
from maetok_fast.layers import EMA, HOG, DiffAugment, LPIPSTail, NormAct, PatchMask, RoPEAttention
from maetok_fast.positions import grid_positions

pytestmark = pytest.mark.usefixtures("one_thread")
GRID, PREFIX, LATENTS = (3, 4), 1, 2


class PlainRoPEAttention(nn.Module):
    """RoPE-Mixed by complex numbers, q/k norms as timm's."""

    def __init__(self, dim: int, heads: int, norm: bool) -> None:
        super().__init__()
        self.heads, self.qkv, self.proj = heads, nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.freqs = nn.Parameter(torch.randn(2, dim // 2))
        self.q_norm, self.k_norm = (nn.LayerNorm(dim // heads) if norm else nn.Identity() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        wide = torch.promote_types(torch.float32, self.freqs.dtype)
        at = grid_positions(GRID).to(wide)
        angle = torch.einsum("ma,ahf->hmf", at, self.freqs.to(wide).unflatten(1, (self.heads, -1)))
        cis = torch.polar(torch.ones_like(angle), angle)
        stop = x.shape[1] - LATENTS

        def turn(t: Tensor) -> Tensor:
            pairs = torch.view_as_complex(t[:, :, PREFIX:stop].to(wide).unflatten(-1, (-1, 2)).contiguous())
            turned = torch.view_as_real(pairs * cis).flatten(-2).to(t.dtype)
            return torch.cat([t[:, :, :PREFIX], turned, t[:, :, stop:]], 2)

        y = F.scaled_dot_product_attention(turn(self.q_norm(q)), turn(self.k_norm(k)), v)
        return self.proj(y.transpose(1, 2).flatten(2))


class PlainHead(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.model = nn.Sequential(nn.Dropout(), nn.Conv2d(channels, 1, 1, bias=False))


class PlainLPIPS(nn.Module):
    """The lpips package's tail."""

    def __init__(self) -> None:
        super().__init__()
        self.lin0, self.lin1 = PlainHead(5), PlainHead(7)

    def forward(self, a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> Tensor:
        def unit(x: Tensor) -> Tensor:
            return x / (x.square().sum(1, keepdim=True).sqrt() + 1e-10)

        total = 0.0
        for lin, x, y in ((self.lin0, a, c), (self.lin1, b, d)):
            wide = torch.promote_types(torch.float32, x.dtype)
            x, y = x.to(wide), y.to(wide)
            weight = lin.model[1].weight.to(wide)
            total = total + F.conv2d((unit(x) - unit(y)).square(), weight).mean((1, 2, 3))
        return total


class Tail(LPIPSTail):
    def forward(self, a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward((a, b), (c, d))


MASK = torch.rand(2, 12, generator=torch.Generator().manual_seed(3)) < 0.5


class PlainMask(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mask_token = nn.Parameter(torch.zeros(1, 1, 16))
        self.register_buffer("seed", torch.tensor([0, 0]))

    def forward(self, x: Tensor) -> Tensor:
        return torch.where(MASK[..., None], self.mask_token, x)


class Mask(PatchMask):
    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x, MASK).x


class Flat(nn.Sequential):
    """A norm and LeakyReLU; the norm's names without their place in the sequence."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__(norm, nn.LeakyReLU(0.2))

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return self[0].state_dict()

    def load_state_dict(self, state: Any, strict: bool = True, assign: bool = False) -> Any:
        return self[0].load_state_dict(state, strict, assign)


class Case(NamedTuple):
    fast: Callable[[], nn.Module]
    plain: Callable[[], nn.Module]
    shapes: tuple[tuple[int, ...], ...]


TOKENS = PREFIX + 12 + LATENTS
ROPE = {"grid": GRID, "prefix": PREFIX, "latents": LATENTS}
IMAGE = ((3, 6, 5, 4),)
CASES = {
    "RoPEAttention": Case(
        lambda: RoPEAttention(32, 2, **ROPE), lambda: PlainRoPEAttention(32, 2, False), ((2, TOKENS, 32),)
    ),
    "RoPEAttention, q/k norm": Case(
        lambda: RoPEAttention(32, 2, **ROPE, qk_norm="layer"),
        lambda: PlainRoPEAttention(32, 2, True),
        ((2, TOKENS, 32),),
    ),
    "PatchMask": Case(lambda: Mask(16), PlainMask, ((2, 12, 16),)),
    "LPIPSTail": Case(lambda: Tail((5, 7)), PlainLPIPS, ((2, 5, 4, 3), (2, 7, 2, 2)) * 2),
    "NormAct, batch": Case(lambda: NormAct(6), lambda: Flat(nn.BatchNorm2d(6)), IMAGE),
    "NormAct, batch, mean of all": Case(
        lambda: NormAct(6, momentum=None), lambda: Flat(nn.BatchNorm2d(6, momentum=None)), IMAGE
    ),
    "NormAct, group": Case(lambda: NormAct(6, "group", groups=3), lambda: Flat(nn.GroupNorm(3, 6)), IMAGE),
    "NormAct, instance": Case(lambda: NormAct(6, "instance"), lambda: Flat(nn.InstanceNorm2d(6, affine=True)), IMAGE),
    "Linear": Case(lambda: layers.Linear(12, 9), lambda: nn.Linear(12, 9), ((2, 7, 12),)),
}


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> Any:
    """(the layer, the module that it replaces with its parameters, inputs), in training mode."""
    torch.manual_seed(0)
    one = CASES[request.param]
    fast, plain = one.fast(), one.plain()
    with torch.no_grad():
        for p in plain.parameters():
            p.add_(torch.randn(p.shape) * 0.3)
        for b in plain.buffers():
            if b.is_floating_point():
                b.add_(torch.rand(b.shape))
    fast.load_state_dict(plain.state_dict())
    return fast, plain, [torch.randn(s) + 0.1 for s in one.shapes]


def results(module: nn.Module, inputs: list[Tensor], names: list[str]) -> dict[str, Tensor]:
    given = [x.detach().clone().requires_grad_() for x in inputs]
    y = module(*given)
    g = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view(y.shape).to(y.dtype)
    grads = torch.autograd.grad(y, [*given, *module.parameters()], g)
    return {"y": y.detach(), **dict(zip([*(f"d_x{i}" for i in range(len(given))), *names], grads))}


def test_values_gradients_and_state_of_the_module_that_it_replaces(case: Any) -> None:
    """In training, twice, so that running statistics move; then in eval; and the state dict goes back."""
    fast, plain, inputs = case
    names = [f"d_{n}" for n in plain.state_dict() if n in dict(fast.named_parameters())]
    exact = copy.deepcopy(plain).double()
    for training in (True, True, False):
        for m in (fast, plain, exact):
            m.train(training)
        order = list(dict(fast.named_parameters()))
        got = results(fast, inputs, [f"d_{n}" for n in order])
        own = {f"d_{n.removeprefix('0.')}": n for n in dict(plain.named_parameters())}
        want = results(plain, inputs, list(own)), results(exact, [x.double() for x in inputs], list(own))
        assert got.keys() == want[0].keys()
        assert set(names) <= got.keys()
        assert_rule(got, *want, inputs=[*inputs, *fast.parameters()])
    for (name, a), (other, b) in zip(fast.state_dict().items(), fast_order(plain.state_dict(), fast)):
        assert name == other
        torch.testing.assert_close(a, b)
    plain.load_state_dict(fast.state_dict())
    for (_, a), (_, b) in zip(fast.state_dict().items(), fast_order(plain.state_dict(), fast)):
        assert torch.equal(a, b)


def fast_order(state: dict[str, Tensor], fast: nn.Module) -> list[tuple[str, Tensor]]:
    assert state.keys() == fast.state_dict().keys()
    return [(name, state[name]) for name in fast.state_dict()]


def test_copies_pickles_and_casts(case: Any) -> None:
    fast, _, inputs = case
    fast.eval()
    want = fast(*inputs)
    for twin in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
        assert torch.equal(twin(*inputs), want)
        assert repr(twin) == repr(fast)
    half = copy.deepcopy(fast).to(torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    torch.testing.assert_close(half(*(x.bfloat16() for x in inputs)).float(), want, rtol=0.1, atol=0.1)


def test_under_autocast(case: Any) -> None:
    """No further from fp64 than the plain module under autocast is."""
    fast, plain, inputs = case
    exact = copy.deepcopy(plain).double()(*(x.double() for x in inputs))
    with torch.autocast("cpu", torch.bfloat16):
        got, want = fast(*inputs), plain(*inputs)
    assert got.dtype in (want.dtype, torch.float32)  # a loss stays in fp32
    theirs = (want.double() - exact).square().mean().sqrt()
    limit = 2 * theirs + 2 * torch.finfo(torch.bfloat16).eps * exact.square().mean().sqrt()
    assert (got.double() - exact).square().mean().sqrt() <= limit


def test_compile_and_checkpoint(case: Any) -> None:
    """No graph break; the same bits where a checkpoint computes the forward twice."""
    fast, _, inputs = case
    fast.eval()
    names = [n for n, _ in fast.named_parameters()]
    want = results(fast, inputs, names)
    torch._dynamo.reset()
    compiled = torch.compile(fast, fullgraph=True, backend="aot_eager")
    got = results(compiled, inputs, names)
    again = results(lambda_module(fast, lambda *a: checkpoint(fast, *a, use_reentrant=False)), inputs, names)
    for name, exact in want.items():
        torch.testing.assert_close(got[name], exact, msg=name)
        assert torch.equal(again[name], exact)


def lambda_module(owner: nn.Module, call: Callable[..., Tensor]) -> Any:
    """`call` with the owner's parameters."""

    class Called:
        parameters = owner.parameters

        def __call__(self, *args: Tensor) -> Tensor:
            return call(*args)

    return Called()


@pytest.fixture(scope="module")
def group() -> Iterator[None]:
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module")
def test_ddp_and_fsdp2(case: Any, group: None) -> None:
    from torch.distributed.fsdp import fully_shard

    fast, _, inputs = case
    fast.eval()
    names = [n for n, _ in fast.named_parameters()]
    want = results(fast, inputs, names)
    ddp = nn.parallel.DistributedDataParallel(copy.deepcopy(fast))
    got = results(ddp, inputs, names)
    sharded = fully_shard(copy.deepcopy(fast), mesh=torch.distributed.init_device_mesh("cpu", (1,)))
    y = sharded(*inputs)
    y.backward(torch.linspace(-1, 1, y.numel()).view(y.shape))
    for name, exact in want.items():
        torch.testing.assert_close(got[name], exact, msg=name)
    for name, p in sharded.named_parameters():
        torch.testing.assert_close(p.grad.full_tensor(), want[name], msg=name)  # type: ignore[union-attr]


# ---- what is special -----------------------------------------------------------------------------------------------


def test_attention_of_dropped_tokens_is_that_of_the_places_they_hold() -> None:
    attn = RoPEAttention(32, 2, **ROPE)
    x, index = torch.randn(2, TOKENS, 32), torch.stack([torch.randperm(12) for _ in range(2)])
    rows = torch.cat([torch.zeros(2, 1).long(), index + 1, torch.tensor([[13, 14]] * 2)], 1)[..., None].expand_as(x)
    torch.testing.assert_close(attn(x.gather(1, rows), index=index), attn(x).gather(1, rows))
    with pytest.raises(ValueError, match=r"1 \+ 20 \+ 2 tokens .*, got 15"):
        attn(x, grid=(4, 5))
    with pytest.raises(ValueError, match="'mixed', 'axial'"):
        RoPEAttention(32, 2, GRID, position="rotary")


def test_axial_attention_turns_half_of_the_pairs_with_the_column() -> None:
    """Moving every token by a column or a row changes no score."""
    attn = RoPEAttention(32, 2, GRID, position="axial")
    assert "freqs" not in attn.state_dict()
    table = attn.table((5, 6)).unflatten(2, (5, 6))
    cos, sin = table[0, 0], table[1, 0]
    assert torch.equal(cos[0, :, 4:], torch.ones(6, 4))  # row 0: nothing turns by rows
    torch.testing.assert_close(cos[:, 3, :4], cos[0, 3, :4].expand(5, 4))
    torch.testing.assert_close(sin[2, :, 4], torch.tensor(2.0).sin().expand(6))


@pytest.mark.parametrize("mode", ["replace", "drop"])
def test_masks_are_drawn_once_a_step_and_saved_with_the_state(mode: str) -> None:
    masking = PatchMask(8, mode, seed=7)
    x = torch.randn(4, 50, 8)
    assert masking.eval()(x) == (x, None, None)
    masking.train()
    first, second = masking(x), masking(x)
    assert not torch.equal(first.mask, second.mask)
    count = first.mask.sum(1)
    assert ((count >= 20) & (count <= 30)).all()
    twin = PatchMask(8, mode)
    twin(x)
    twin.load_state_dict(masking.state_dict())
    third = masking(x)
    assert torch.equal(twin(x).mask, third.mask)
    assert masking.seed.tolist() == [7, 3]
    again = masking(x, third.mask)
    assert torch.equal(again.x, third.x)
    parts = PatchMask(8, mode, seed=7)  # a batch split over two ranks
    halves = [copy.deepcopy(parts)(x[i : i + 2], first_image=i).mask for i in (0, 2)]
    assert torch.equal(torch.cat(halves), first.mask)
    if mode == "replace":
        want = torch.where(first.mask[..., None], masking.mask_token, x)
        assert first.kept is None
        assert torch.equal(first.x, want)
    else:
        assert torch.equal(first.x, x[~first.mask].view(4, -1, 8))
        back = masking.put_back(first.x, first.kept, 50)
        assert torch.equal(back, torch.where(first.mask[..., None], masking.mask_token, x))
    with pytest.raises(ValueError, match="'replace', 'drop'"):
        PatchMask(8, "keep")


def test_drawing_compiles_in_replace_mode() -> None:
    masking, twin = PatchMask(8), PatchMask(8)
    twin.load_state_dict(masking.state_dict())
    torch._dynamo.reset()
    compiled = torch.compile(masking, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 20, 8)
    for _ in range(2):
        got, want = compiled(x), twin(x)
        assert torch.equal(got.mask, want.mask)
        assert torch.equal(got.x, want.x)
    assert masking.seed.tolist() == [0, 2]


def test_hog_is_a_target() -> None:
    module, image = HOG(16), torch.randint(0, 256, (2, 3, 32, 48), dtype=torch.uint8)
    got = module(image)
    assert got.shape == (2, 6, module.features)
    torch.testing.assert_close(got, hog_ref(image), rtol=1e-5, atol=1e-6)
    assert not module(torch.randn(1, 3, 16, 16, requires_grad=True)).requires_grad
    torch._dynamo.reset()
    compiled = torch.compile(pickle.loads(pickle.dumps(module)), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(image), got)
    assert repr(module) == "HOG(patch=16, cell=8)"


def test_augmentation_is_the_same_for_all_images_of_a_call_and_off_in_eval() -> None:
    augment = DiffAugment(probability=1.0, cutout=0.4)
    a, b = torch.randn(4, 3, 16, 12, requires_grad=True), torch.randn(4, 3, 16, 12)
    torch.manual_seed(5)
    got = augment(a, b)
    torch.manual_seed(5)
    drawn = draw_augmentation(4, 16, 12, 1.0, 0.4)
    for y, x in zip(got, (a, b)):
        torch.testing.assert_close(y, diff_augment_ref(x, **drawn), rtol=1e-5, atol=1e-5)
    (g,) = torch.autograd.grad(got[0].square().sum(), a)
    (want,) = torch.autograd.grad(diff_augment_ref(a, **drawn).square().sum(), a)
    torch.testing.assert_close(g, want, rtol=1e-4, atol=1e-4)
    assert augment.eval()(a) is a
    assert copy.deepcopy(augment)(a, b) == (a, b)
    with pytest.raises(ValueError, match="cutout must be between 0 and 1"):
        DiffAugment(cutout=2.0)


def test_lpips_reads_channels_last_as_it_lies_and_counts_layers() -> None:
    tail = LPIPSTail((5, 7))
    a, b = ([torch.rand(2, c, 4, 4) for c in (5, 7)] for _ in range(2))
    last = [[f.to(memory_format=torch.channels_last) for f in pair] for pair in (a, b)]
    torch.testing.assert_close(tail(*last), tail(a, b))
    assert list(tail.state_dict()) == ["lin0.model.1.weight", "lin1.model.1.weight"]
    with pytest.raises(ValueError, match="2 layers for each image, got 1 and 2"):
        tail(a[:1], b)


def test_norm_act_names_what_is_wrong() -> None:
    with pytest.raises(ValueError, match="groups must divide the 6 channels, got 4"):
        NormAct(6, "group", groups=4)
    with pytest.raises(ValueError, match="'batch', 'group', 'instance'"):
        NormAct(6, "layer")
    with pytest.raises(ValueError, match="more than one value for each channel"):
        NormAct(6)(torch.randn(1, 6, 1, 1))


# ---- EMA -----------------------------------------------------------------------------------------------------------


def toy() -> Any:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.Linear(7, 3))
    model[2].bias.requires_grad_(False)
    return model


def test_the_average_of_trainable_parameters() -> None:
    model = toy()
    ema = EMA(model, 0.9)
    assert list(ema.average) == ["0.weight", "0.bias", "1.weight", "1.bias", "2.weight"]
    want = {n: p.detach().double() for n, p in model.named_parameters() if p.requires_grad}
    for step in range(3):
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.randn(p.shape))
        ema.update(model, 0.5 if step == 0 else None)
        decay = 0.5 if step == 0 else 0.9
        want = {n: w + (1 - decay) * (model.get_parameter(n).detach().double() - w) for n, w in want.items()}
    for name, average in ema.average.items():
        torch.testing.assert_close(average.double(), want[name], rtol=1e-6, atol=1e-6)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    with contextlib.suppress(RuntimeError), ema.swapped(model) as inside:
        assert torch.equal(inside[0].weight, ema.average["0.weight"])
        raise RuntimeError("in the middle")
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    ema.copy_to(model)
    assert torch.equal(model[2].weight, ema.average["2.weight"])
    assert torch.equal(model[2].bias, before["2.bias"])


def test_the_state_of_an_average_and_its_copies() -> None:
    model = toy()
    ema = EMA(model, 0.9)
    with torch.no_grad():
        model[0].weight.add_(1)
    ema.update(model)
    twin = EMA(toy(), 0.5)
    twin.load_state_dict(ema.state_dict())
    for other in (twin, copy.deepcopy(ema), pickle.loads(pickle.dumps(ema))):
        assert (other.decay, other.updates) == (0.9, 1)
        assert all(torch.equal(a, b) for a, b in zip(other.average.values(), ema.average.values()))
    assert all(v.dtype == torch.float64 for v in copy.deepcopy(ema).to(torch.float64).average.values())
    assert all(v.dtype == torch.float32 for v in EMA(toy().bfloat16()).average.values())
    with pytest.raises(KeyError, match=r"no parameter 0\.weight"):
        ema.update(nn.Linear(2, 2))
    with pytest.raises(KeyError, match="other parameters"):
        EMA(nn.Linear(2, 2)).load_state_dict(ema.state_dict())
    with pytest.raises(ValueError, match="decay must lie"):
        EMA(model, 1.5)


def test_the_average_of_a_sharded_model(group: None) -> None:
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    model, plain = toy(), toy()
    fully_shard(model, mesh=torch.distributed.init_device_mesh("cpu", (1,)))
    averages = [EMA(m, 0.9) for m in (model, plain)]
    with torch.no_grad():
        for m, ema in zip((model, plain), averages):
            for p in m.parameters():
                p.mul_(2)
            ema.update(m)
    for (name, a), b in zip(averages[0].average.items(), averages[1].average.values()):
        assert isinstance(a, DTensor), name
        torch.testing.assert_close(a.full_tensor(), b)
    with averages[0].swapped(model):
        torch.testing.assert_close(model[0].weight.full_tensor(), averages[1].average["0.weight"])
