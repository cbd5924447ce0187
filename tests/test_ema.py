# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""ema_update against a naive fp64 loop, on every backend, in a training loop, and under torch.compile."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from maetok_fast.kernels import BackendError, _dispatch, _native, backend, ema_update
from maetok_fast.kernels import ema as module
from maetok_fast.kernels._tensor_table import CACHED
from maetok_fast.kernels._triton import why_no_triton
from maetok_fast.precision import MasterWeights

SHAPES = [(3, 5), (), (0, 4), (17,), (2, 9000), (1,), (16400,), (33, 7)]
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(params=["native", "triton", "foreach", "reference"])
def name(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Every backend on CPU tensors; Triton in the interpreter, with a small block so that it crosses block bounds."""
    which = request.param
    missing = {"native": _native.why_missing(), "triton": why_no_triton("cpu")}.get(which)
    if missing is not None:
        pytest.skip(missing)
    if which == "foreach":
        monkeypatch.setattr(module, "_choose", lambda device: "reference")
        yield which
    else:
        with backend(which):
            yield which


def draw(dtype: torch.dtype = torch.float32, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in SHAPES]


def exact(ema: list[Tensor], params: list[Tensor], decay: float) -> list[Tensor]:
    return [e.double() * decay + (1 - decay) * p.double() for e, p in zip(ema, params)]


def assert_rounded(got: Tensor, wanted: Tensor) -> None:
    """Within one rounding of the result in its own dtype, and fp32's roundings inside."""
    allowed = torch.finfo(got.dtype).eps / 2 * wanted.abs() + 4 * torch.finfo(torch.float32).eps * (1 + wanted.abs())
    assert ((got.double() - wanted).abs() <= allowed + torch.finfo(got.dtype).smallest_normal).all()


@pytest.mark.parametrize("decay", [0.9999, 0.5, 0.0, 1.0])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_value(name: str, dtype: torch.dtype, decay: float) -> None:
    ema, params, cast = draw(), draw(dtype, 1), [torch.full_like(p, 7).half() for p in draw(dtype)]
    wanted = exact(ema, params, decay)
    ema_update(ema, params, decay, cast)
    for e, w, c, p in zip(ema, wanted, cast, params):
        assert_rounded(e, w)
        assert torch.equal(c, p.half())


def test_every_dtype_of_ema_and_mixed_lists(name: str) -> None:
    ema = [t.to(FLOATS[i % 3]) for i, t in enumerate(draw())]
    params = [t.to(FLOATS[i % 2]) for i, t in enumerate(draw(seed=1))]
    wanted = exact(ema, params, 0.9)
    ema_update(ema, params, 0.9)
    for i, (e, w) in enumerate(zip(ema, wanted)):
        assert e.dtype == FLOATS[i % 3]
        assert_rounded(e, w)


def test_doubles_and_views_take_the_slower_way(name: str) -> None:
    ema = [torch.randn(4, 6).double(), torch.randn(6, 4).t(), torch.randn(8, 6)[::2], torch.randn(25)[1:].view(4, 6)]
    params = [torch.randn(4, 6) for _ in ema]
    cast = [torch.zeros(4, 12)[:, ::2] for _ in ema]
    wanted = exact(ema, params, 0.75)
    ema_update(ema, params, 0.75, cast)
    for e, w, c, p in zip(ema, wanted, cast, params):
        torch.testing.assert_close(e.double(), w, rtol=1e-6, atol=1e-6)
        assert torch.equal(c, p)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8, torch.bool], ids=str)
def test_integers_take_the_new_value(name: str, dtype: torch.dtype) -> None:
    """As a batch norm's counter, in the middle of a model's tensors."""
    ema, params = draw(), draw(seed=1)
    wanted = exact(ema, params, 0.9)
    counter, new = torch.zeros(3, dtype=dtype), torch.tensor([1, 0, 1], dtype=dtype)
    cast = [torch.zeros_like(p) for p in params]
    ema_update([*ema[:4], counter, *ema[4:]], [*params[:4], new, *params[4:]], 0.9, [*cast[:4], new.clone(), *cast[4:]])
    assert torch.equal(counter, new)
    for e, w, c, p in zip(ema, wanted, cast, params):
        assert_rounded(e, w)
        assert torch.equal(c, p)


def test_complex_tensors(name: str) -> None:
    ema, params = torch.randn(5, dtype=torch.complex64), torch.randn(5, dtype=torch.complex64)
    wanted = 0.75 * ema + 0.25 * params
    ema_update([ema], [params], 0.75)
    torch.testing.assert_close(ema, wanted)


def test_a_tensor_that_holds_no_average_is_refused(name: str) -> None:
    for dtype in (torch.int64, torch.bool, torch.float8_e4m3fn):
        with pytest.raises(
            TypeError, match=rf"ema\[1\] is {dtype}, which holds no average of torch\.float32; keep it in"
        ):
            ema_update([torch.zeros(2), torch.zeros(3).to(dtype)], [torch.ones(2), torch.ones(3)], 0.9)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("as_tensor", [False, True])
def test_16_bits_at_a_high_decay_are_warned_of_once(
    name: str, dtype: torch.dtype, as_tensor: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_warned", set())

    def update(at: float, dtype: torch.dtype) -> list[str]:
        decay = torch.tensor(at, dtype=torch.float64) if as_tensor else at
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            ema_update([torch.ones(4), torch.ones(4, dtype=dtype)], [torch.zeros(4), torch.zeros(4)], decay)
        return [str(w.message) for w in caught if "ema_update" in str(w.message)]

    assert update(0.9999, torch.float32) == []
    assert update(0.99, dtype) == []
    assert update(0.9999, dtype) == [
        "ema_update: an average in 16 bits at a decay above 0.99 stands still, its steps are rounded away; "
        "keep ema in fp32"
    ]
    assert update(0.9999, dtype) == []


def test_16_bits_stand_still_as_the_warning_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_warned", {"16 bits"})
    ema, wide = torch.ones(4, dtype=torch.bfloat16), torch.ones(4)
    for _ in range(1000):
        ema_update([ema, wide], [torch.full((4,), 1.001)] * 2, 0.999)
    assert (ema == 1).all()
    assert (wide > 1.0005).all()


@pytest.mark.parametrize(
    "pair",
    [
        lambda: (torch.ones(4, 4)[:, ::2], torch.zeros(4, 2)),
        lambda: (torch.ones(2, dtype=torch.float64), torch.zeros(2)),
        lambda: (torch.ones(2), torch.zeros(2, dtype=torch.float64)),
        lambda: (torch.ones(3, 4).t(), torch.zeros(4, 3)),
    ],
)
@pytest.mark.parametrize("which", ["native", "triton"])
def test_strict_mode_refuses_a_slower_way(which: str, pair: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    missing = {"native": _native.why_missing(), "triton": why_no_triton("cpu")}[which]
    if missing is not None:
        pytest.skip(missing)
    monkeypatch.setattr(_dispatch._State, "strict", True)
    e, p = pair()
    with backend(which):
        with pytest.raises(
            BackendError, match=r"MAETOK_FAST_STRICT=1 .*1 of 2 tensors are not dense fp32, bf16 or fp16"
        ):
            ema_update([torch.zeros(2), e], [torch.ones(2), p], 0.5)
        assert (e == 1).all()
        # nothing slower exists for a copy, and what the kernels take passes
        ema_update([torch.zeros(2), torch.zeros(2).int()], [torch.ones(2), torch.ones(2).int()], 0.5)
    with backend("reference"):
        ema_update([e], [p], 0.5)
    assert (e == 0.5).all()


def test_sharded_parameters(name: str) -> None:
    """DTensors, as fully_shard makes them, on one process: the local shards are averaged."""
    distributed = pytest.importorskip("torch.distributed.tensor")
    import torch.distributed as dist

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = dist.init_device_mesh("cpu", (1,))
        ema, params, cast = draw(), draw(seed=1), [p.bfloat16() for p in draw()]
        wanted = exact(ema, params, 0.9)
        lists = [[distributed.DTensor.from_local(t.clone(), mesh) for t in tensors] for tensors in (ema, params, cast)]
        ema_update(*lists[:2], 0.9, lists[2])
        for e, w, c, p in zip(lists[0], wanted, lists[2], params):
            assert_rounded(e.to_local(), w)
            assert torch.equal(c.to_local(), p.bfloat16())
        with pytest.raises(ValueError, match=r"tensors at 0 must be sharded alike, got .*Replicate.* and None"):
            ema_update(lists[0], params, 0.9)
    finally:
        dist.destroy_process_group()


def test_channels_last_stays_on_the_kernel(name: str) -> None:
    ema, params = (torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last) for _ in range(2))
    assert not module._tables.make(([ema], [params], []), None).apart
    wanted = exact([ema], [params], 0.9)[0]
    ema_update([ema], [params], 0.9)
    torch.testing.assert_close(ema.double(), wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_decay_as_a_tensor(name: str, dtype: torch.dtype) -> None:
    ema, params = draw(), draw(seed=1)
    other = [e.clone() for e in ema]
    ema_update(ema, params, torch.tensor(0.875, dtype=dtype))
    ema_update(other, params, 0.875)
    for a, b in zip(ema, other):
        assert torch.equal(a, b)


def test_nothing_beside_the_tensors_is_written(name: str) -> None:
    """Tensors as neighbours in one buffer, unaligned, with guards between them."""
    sizes, at, views = [5, 1, 4097, 64], 3, []
    buffer = torch.full((sum(sizes) + 40,), 77.0)
    for size in sizes:
        views.append(buffer[at : at + size].fill_(0))
        at += size + 7
    kept = torch.ones_like(buffer, dtype=torch.bool)
    for view in views:
        start = view.storage_offset()
        kept[start : start + len(view)] = False
    ema_update(views, [torch.ones(size) for size in sizes], 0.0)
    assert (buffer[kept] == 77).all()
    assert (buffer[~kept] == 1).all()


def test_nan_and_infinity_propagate(name: str) -> None:
    ema = [torch.tensor([0.0, float("inf"), 1.0, float("nan")])]
    ema_update(ema, [torch.tensor([float("nan"), 1.0, float("inf"), 0.0])], 0.5)
    assert ema[0].isfinite().tolist() == [False] * 4


def test_the_table_is_kept_and_renewed(name: str) -> None:
    module._tables.plans.clear()
    ema, params = [torch.zeros(8), torch.zeros(3)], [torch.ones(8), torch.ones(3)]
    for _ in range(3):
        ema_update(ema, params, 0.5)
    assert len(module._tables.plans) == (name in ("native", "triton"))
    params = [torch.full((8,), 2.0), torch.full((3,), 2.0)]  # as when .data is exchanged
    ema_update(ema, params, 0.0)
    assert all((e == 2).all() for e in ema)
    for size in range(40):
        ema_update([torch.zeros(size + 1)], [torch.ones(size + 1)], 0.5)
    assert len(module._tables.plans) <= CACHED


def test_a_thousand_steps_against_fp64(name: str) -> None:
    """The rule for all steps together: no further from fp64 than twice a plain fp32 loop, and two ulp."""
    steps = 1000 if name != "triton" else 50
    generator = torch.Generator().manual_seed(3)
    params = [torch.randn(257, generator=generator), torch.randn(3, 5, generator=generator)]
    ema, plain = [p.clone() for p in params], [p.clone() for p in params]
    wide = [p.double() for p in params]
    for _ in range(steps):
        for p in params:
            p += 0.01 * torch.randn(p.shape, generator=generator)
        ema_update(ema, params, 0.999)
        for f, w, p in zip(plain, wide, params):
            f.mul_(0.999).add_(p, alpha=1 - 0.999)
            w.lerp_(p.double(), 1 - 0.999)
    for e, f, w in zip(ema, plain, wide):
        ours, theirs = ((t.double() - w).abs().max().item() for t in (e, f))
        assert ours <= 2 * theirs + 2 * torch.finfo(torch.float32).eps * w.abs().max().item()


@pytest.mark.parametrize("fused", [True, False])
def test_master_weights_in_a_training_loop(name: str, fused: bool) -> None:
    """A bf16 model with fp32 masters: what AdamW and the average see is fp32, what the model holds is its rounding."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.GELU(), nn.Linear(16, 3)).bfloat16()
    start = [p.detach().double() for p in model.parameters()]
    masters = MasterWeights(model.parameters())
    optimizer = torch.optim.AdamW(masters.parameters, lr=1e-4, fused=fused)
    ema = [p.detach().clone() for p in masters.parameters]
    wide, x, y = [s.clone() for s in start], torch.randn(32, 6).bfloat16(), torch.randn(32, 3).bfloat16()
    versions = [p._version for p in model.parameters()]
    for _ in range(1000 if name == "native" and fused else 5):
        nn.functional.mse_loss(model(x), y).backward()
        masters.collect()
        assert all(p.grad is None for p in model.parameters())
        optimizer.step()
        ema_update(ema, masters.parameters, 0.99, masters.model)
        optimizer.zero_grad()
        for w, p in zip(wide, masters.parameters):
            w.lerp_(p.detach().double(), 0.01)
    for p, m, e, w, s, version in zip(model.parameters(), masters.parameters, ema, wide, start, versions):
        assert torch.equal(p, m.bfloat16())
        assert m.dtype == torch.float32
        assert not torch.equal(m.double(), s)  # steps of 1e-4, which bf16 would have rounded away
        torch.testing.assert_close(e.double(), w, rtol=0, atol=1e-6)
        assert p._version > version


def test_parameters_with_gradients(name: str) -> None:
    layer, ema = nn.Linear(4, 4), nn.Linear(4, 4)
    ema_update(list(ema.parameters()), list(layer.parameters()), 0.0)
    assert torch.equal(ema.weight, layer.weight)
    assert ema.weight.requires_grad
    assert ema.weight.grad_fn is None


@pytest.mark.parametrize("mode", ["aot_eager", "inductor"])
def test_torch_compile(name: str, mode: str) -> None:
    if name == "foreach":
        pytest.skip("the graph holds the same operator whatever it runs")
    import torch.distributed.tensor  # which DTensors would have done, and which is then looked at in the graph

    torch._dynamo.reset()
    params, decay = draw(seed=1), torch.tensor(0.9, dtype=torch.float64)
    ema, cast = draw(), [p.bfloat16() for p in draw()]
    eager, eager_cast = [e.clone() for e in ema], [c.clone() for c in cast]

    def step(decay: Tensor) -> Tensor:
        ema_update(ema, params, decay, cast)
        return ema[0] * 2

    out = torch.compile(step, fullgraph=True, backend=mode)(decay)
    ema_update(eager, params, decay, eager_cast)
    for a, b in zip([*ema, *cast, out], [*eager, *eager_cast, eager[0] * 2]):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_opcheck() -> None:
    args = ([torch.randn(3), torch.randn(2, 2)], [torch.randn(3), torch.randn(2, 2)], 0.5, None, [])
    torch.library.opcheck(module._ema_update, args)


def test_threads_change_nothing() -> None:
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            ema = draw()
            ema_update(ema, draw(torch.bfloat16, 1), 0.99)
            results.append(ema)
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other))


def test_errors_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    one, two = [torch.zeros(2)], [torch.zeros(2), torch.zeros(2)]
    with pytest.raises(ValueError, match="lists of equal length, got 1 ema, 2 params"):
        ema_update(one, two, 0.5)
    with pytest.raises(ValueError, match="2 cast_to"):
        ema_update(one, one, 0.5, two)
    with pytest.raises(ValueError, match=r"at 0 must have one shape, got \(2,\) and \(3,\)"):
        ema_update(one, [torch.zeros(3)], 0.5)
    with pytest.raises(ValueError, match=r"decay must lie in \[0, 1\], got 1.5"):
        ema_update(one, one, 1.5)
    with pytest.raises(ValueError, match=r"one element, got shape \(2,\)"):
        ema_update(one, one, torch.zeros(2))
    ema_update([], [], 0.5)
    monkeypatch.setattr(module, "why_missing", lambda name, device: "none here")
    with pytest.raises(BackendError, match="'triton' was forced but cannot run: none here"), backend("triton"):
        ema_update(one, one, 0.5)
    if _native.why_missing() is None:
        with pytest.raises(TypeError, match="table must be int64"):
            _native.lib().ema_update(torch.zeros(1, 4), 0.5, 0, 0, -1)
        with pytest.raises(ValueError, match="param must be 0"):
            _native.lib().ema_update(torch.ones(1, 4, dtype=torch.int64), 0.5, 0, 3, -1)
        with pytest.raises(ValueError, match="row 0 of the table has no address"):
            _native.lib().ema_update(torch.zeros(1, 4, dtype=torch.int64), 0.5, 0, 0, -1)


@pytest.mark.gpu
def test_on_a_gpu_without_a_synchronisation() -> None:
    ema, params = [t.cuda() for t in draw()], [t.cuda() for t in draw(torch.bfloat16, 1)]
    decay = torch.tensor(0.9, dtype=torch.float64, device="cuda")
    wanted = exact(ema, params, 0.9)
    ema_update([e.clone() for e in ema], params, decay)  # compiles
    plan_ready = [e.clone() for e in ema]
    ema_update(plan_ready, params, 1.0)
    torch.cuda.set_sync_debug_mode("error")
    try:
        ema_update(plan_ready, params, decay)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for e, w in zip(plan_ready, wanted):
        assert_rounded(e.cpu(), w.cpu())
