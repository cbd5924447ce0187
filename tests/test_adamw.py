# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""adamw_step against torch.optim.AdamW and an average in fp64: on every backend, instruction set, sharded, compiled."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from rule import assert_rule
from torch import Tensor, nn

from maetok_fast.kernels import BackendError, _dispatch, _native, adamw_step, adamw_step_ref, backend, ema_update
from maetok_fast.kernels import adamw as module
from maetok_fast.kernels._triton import why_no_triton

SHAPES = [(3, 5), (), (0, 4), (17,), (2, 9000), (1,), (16400,), (33, 7)]
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
BETAS, EPS, DECAY = (0.9, 0.95), 1e-8, 0.9
SETTINGS: dict[str, Any] = {"rate": 1e-2, "betas": BETAS, "eps": EPS, "weight_decay": 0.1, "decay": DECAY}


@pytest.fixture(params=["native", "triton", "reference"])
def name(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every backend on CPU tensors; Triton in the interpreter."""
    which = request.param
    missing = {"native": _native.why_missing(), "triton": why_no_triton("cpu")}.get(which)
    if missing is not None:
        pytest.skip(missing)
    with backend(which):
        yield which


def draw(dtype: torch.dtype = torch.float32, seed: int = 0, shapes: Any = SHAPES) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


class State:
    """The lists of a call; `clone` for a second way."""

    def __init__(
        self, params: list[Tensor], average: torch.dtype | None = torch.float32, cast: torch.dtype | None = None
    ) -> None:
        self.params = params
        self.exp_avg, self.exp_avg_sq = ([torch.zeros_like(p, dtype=torch.float32) for p in params] for _ in range(2))
        self.steps = [torch.zeros(()) for _ in params]
        self.average = [] if average is None else [p.detach().to(average, copy=True) for p in params]
        self.cast = [] if cast is None else [torch.full_like(p, 7, dtype=cast) for p in params]

    @property
    def lists(self) -> tuple[list[Tensor], ...]:
        return self.params, self.exp_avg, self.exp_avg_sq, self.steps, self.average, self.cast

    def clone(self, to: torch.dtype | None = None) -> State:
        """A copy; as `to`, where given, all but the counts."""
        other = State([])
        for mine, theirs in zip(self.lists, other.lists, strict=True):
            theirs += [t.clone() if to is None or mine is self.steps else t.to(to, copy=True) for t in mine]
        return other

    def step(self, grads: list[Tensor], how: Any = adamw_step, **settings: Any) -> None:
        params, *others = self.lists
        how(params, grads, *others, **(SETTINGS | settings))

    def equals(self, other: State) -> bool:
        return all(
            torch.equal(a, b)
            for mine, theirs in zip(self.lists, other.lists, strict=True)
            for a, b in zip(mine, theirs, strict=True)
        )

    def named(self) -> dict[str, Tensor]:
        kinds = ("p", "m", "v", "average", "cast")
        lists = (self.params, self.exp_avg, self.exp_avg_sq, self.average, self.cast)
        return {f"{kind}{i}": t for kind, tensors in zip(kinds, lists) for i, t in enumerate(tensors)}


def torchs(state: State, rounds: list[list[Tensor]], dtype: torch.dtype, **settings: Any) -> State:
    """torch.optim.AdamW and an average, step after step, computed in `dtype`."""
    settings = SETTINGS | settings
    params = [nn.Parameter(p.to(dtype)) for p in state.params]
    average = [a.to(dtype) for a in state.average]
    optimizer = torch.optim.AdamW(
        params, lr=settings["rate"], betas=settings["betas"], eps=settings["eps"], weight_decay=settings["weight_decay"]
    )
    for grads in rounds:
        for p, g in zip(params, grads):
            p.grad = g.to(dtype) * settings.get("scale", 1.0)
        optimizer.step()
        for a, p in zip(average, params):
            a.lerp_(p.detach(), 1 - settings["decay"])
    done = State([p.detach() for p in params], None)
    done.exp_avg = [optimizer.state[p]["exp_avg"] for p in params]
    done.exp_avg_sq = [optimizer.state[p]["exp_avg_sq"] for p in params]
    done.steps = [optimizer.state[p]["step"] for p in params]
    done.average, done.cast = average, [p.detach() for p in params] if state.cast else []
    return done


@pytest.mark.parametrize(
    "settings", [{}, {"weight_decay": 0.0, "betas": (0.9, 0.999)}, {"betas": (0.0, 0.5), "eps": 1e-3}]
)
def test_several_steps_are_torchs_adamw_and_an_average(name: str, settings: dict[str, Any]) -> None:
    """By the rule of tests/rule.py: fp64 AdamW is the truth, torch's own fp32 AdamW the measure."""
    state = State(draw(), cast=torch.bfloat16)
    start, rounds = state.clone(), [draw(seed=1 + turn) for turn in range(3)]
    for grads in rounds:
        state.step(grads, **settings)
    plain, exact = (torchs(start, rounds, dtype, **settings) for dtype in (torch.float32, torch.float64))
    got = {key: t for key, t in state.named().items() if not key.startswith("cast")}
    assert_rule(got, *({key: t for key, t in other.named().items() if key in got} for other in (plain, exact)))
    assert all(torch.equal(c, p.bfloat16()) for c, p in zip(state.cast, state.params))
    assert [s.item() for s in state.steps] == [3.0] * len(SHAPES)


@pytest.mark.parametrize("param", FLOATS, ids=str)
@pytest.mark.parametrize("grad", FLOATS, ids=str)
def test_every_combination_of_dtypes_is_one_rounding_from_fp64(
    name: str, param: torch.dtype, grad: torch.dtype
) -> None:
    """Half an ulp of the result's dtype, and what fp32 arithmetic adds. Average and copy: of the stored parameter."""
    shapes = [(5,), (33, 7)] if name == "triton" else [(5,), (33, 7), (4100,)]
    kinds: list[torch.dtype | None] = [None, *FLOATS]
    for average, cast in itertools.product(kinds, kinds) if name != "triton" else zip(kinds, reversed(kinds)):
        state = State(draw(param, shapes=shapes), average, cast)
        for tensors, seed in ((state.exp_avg, 5), (state.exp_avg_sq, 6)):
            for t, value in zip(tensors, draw(seed=seed, shapes=shapes)):
                t.copy_(value.square())
        exact, grads = state.clone(torch.float64), draw(grad, 1, shapes)
        before = [a.double() for a in state.average]
        state.step(grads, decay=0.5)
        exact.step([g.double() for g in grads], adamw_step_ref, decay=0.5)
        exact.average = [(a + p.double()) / 2 for a, p in zip(before, state.params)]
        exact.cast = [p.double() for p in state.params] if cast else []
        for key, wanted in exact.named().items():
            assert_rounded(state.named()[key], wanted, f"{key}, average {average}, cast {cast}")


def assert_rounded(got: Tensor, wanted: Tensor, what: str = "") -> None:
    allowed = torch.finfo(got.dtype).eps / 2 * wanted.abs() + 8 * torch.finfo(torch.float32).eps * (1 + wanted.abs())
    assert ((got.double() - wanted).abs() <= allowed + torch.finfo(got.dtype).smallest_normal).all(), what


def test_the_step_and_the_average_are_one_after_the_other(name: str) -> None:
    """Bit for bit what `ema_update` makes of the stepped parameters."""
    one = State([p.to(FLOATS[i % 3]) for i, p in enumerate(draw())])
    two, grads = one.clone(), draw(seed=1)
    average, two.average = two.average, []
    one.step(grads)
    two.step(grads)
    ema_update(average, two.params, DECAY)
    assert all(torch.equal(a, b) for a, b in zip(one.params, two.params))
    assert all(torch.equal(a, b) for a, b in zip(one.average, average))


def test_each_tensor_has_its_own_weight_decay_and_count(name: str) -> None:
    shapes = [(9,), (4, 3), (5,)]
    state, grads = State(draw(shapes=shapes)), draw(seed=1, shapes=shapes)
    state.steps[1].fill_(41)
    alone = state.clone()
    state.step(grads, weight_decay=[0.0, 0.5, 0.25])
    assert [s.item() for s in state.steps] == [1, 42, 1]
    for i, by in enumerate((0.0, 0.5, 0.25)):
        single = State([])
        for mine, theirs in zip(alone.lists, single.lists, strict=True):
            theirs += mine[i : i + 1]
        single.step(grads[i : i + 1], weight_decay=by)
    assert state.equals(alone)


def test_the_scale_multiplies_gradients_as_they_are_read(name: str) -> None:
    one, grads = State(draw()), draw(seed=1)
    two, kept = one.clone(), [g.clone() for g in grads]
    one.step(grads, scale=torch.tensor(0.25))  # a power of two: exact
    two.step([g * 0.25 for g in grads])
    assert one.equals(two)
    assert all(torch.equal(g, k) for g, k in zip(grads, kept))


@pytest.mark.parametrize("flag", [torch.tensor(False), torch.tensor(0.0)], ids=["bool", "float"])
def test_where_it_is_not_finite_nothing_changes(name: str, flag: Tensor) -> None:
    state = State(draw(), cast=torch.bfloat16)
    state.step(draw(seed=1))
    before = state.clone()
    bad = draw(seed=2)
    bad[0][0, 0], bad[4][1, 5] = float("nan"), float("inf")
    state.step(bad, finite=flag, scale=torch.tensor(float("nan")))
    assert state.equals(before)
    state.step(draw(seed=3), finite=torch.ones_like(flag))
    before.step(draw(seed=3))
    assert state.equals(before)
    assert state.steps[0] == 2


def test_a_first_step_that_is_not_finite_leaves_no_trace(name: str) -> None:
    state, grads = State(draw()), draw(seed=1)
    start = state.clone()
    state.step(grads, finite=torch.tensor(False))
    assert state.equals(start)


def test_numbers_as_tensors(name: str) -> None:
    one, grads = State(draw()), draw(seed=1)
    two = one.clone()
    one.step(grads, rate=torch.tensor(0.015625), decay=torch.tensor(0.875, dtype=torch.float64))
    two.step(grads, rate=0.015625, decay=0.875)
    assert one.equals(two)


def test_doubles_and_views_take_the_reference(name: str) -> None:
    params = [torch.randn(4, 6).double(), torch.randn(6, 4).t(), torch.randn(8, 6)[::2], torch.randn(25)[1:].view(4, 6)]
    state, grads = State(params, cast=torch.float32), [torch.randn(4, 6) for _ in params]
    exact = state.clone(torch.float64)
    state.step(grads)
    exact.step([g.double() for g in grads], adamw_step_ref)
    for key, wanted in exact.named().items():
        torch.testing.assert_close(state.named()[key].double(), wanted, rtol=1e-6, atol=1e-6)
    assert [s.item() for s in state.steps] == [1.0] * 4


def test_channels_last_stays_on_the_kernel(name: str) -> None:
    params, grads = ([torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last)] for _ in range(2))
    state = State(params)
    lists = (state.params, state.exp_avg, state.exp_avg_sq, state.average, [])
    assert not module._tables.make(lists, None, grads, state.steps, [0.1]).apart
    exact = state.clone(torch.float64)
    state.step(grads)
    exact.step([g.double() for g in grads], adamw_step_ref)
    for key, wanted in exact.named().items():
        assert_rounded(state.named()[key], wanted, key)


def test_gradients_are_new_memory_in_each_step_and_the_table_stays(name: str) -> None:
    module._tables.plans.clear()
    state = State(draw())
    exact, kept = state.clone(torch.float64), []
    for turn in range(3):
        grads = draw(seed=turn)
        kept.append(grads)  # so that no address comes back
        state.step(grads)
        exact.step([g.double() for g in grads], adamw_step_ref)
    assert len(module._tables.plans) == (name != "reference")
    for p, wanted in zip(state.params, exact.params):
        torch.testing.assert_close(p.double(), wanted, rtol=1e-5, atol=1e-6)


def test_nothing_beside_the_tensors_is_written(name: str) -> None:
    """Tensors as neighbours in one buffer, unaligned, with guards between them."""
    sizes = [5, 1, 4097, 64, 511]
    buffers = [torch.full((sum(sizes) + 60,), 77.0) for _ in range(6)]

    def views(buffer: Tensor, fill: float) -> list[Tensor]:
        at, found = 3, []
        for size in sizes:
            found.append(buffer[at : at + size].fill_(fill))
            at += size + 7
        return found

    params, grads, first, second, average, cast = (views(b, 1.0) for b in buffers)
    steps = [torch.zeros(()) for _ in sizes]
    adamw_step(params, grads, first, second, steps, average, cast, **(SETTINGS | {"rate": 0.5}))
    inside = torch.zeros(len(buffers[0]), dtype=torch.bool)
    for p in params:
        inside[p.storage_offset() : p.storage_offset() + len(p)] = True
    for i, buffer in enumerate(buffers):
        assert (buffer[~inside] == 77).all()
        assert (buffer[inside] == buffer[inside][0]).all()
        assert (buffer[inside][0] == 1) == (i in (1, 2, 3))  # a gradient of 1 leaves moments of 1 at 1


def test_threads_change_nothing() -> None:
    results, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            state = State(draw(), torch.bfloat16, torch.float16)
            state.step(draw(torch.bfloat16, 1), decay=0.5)
            results.append(state)
    finally:
        torch.set_num_threads(before)
    assert all(results[0].equals(other) for other in results[1:])


def test_every_instruction_set(instruction_set: str) -> None:
    shapes = [(1,), (5000,), (33, 7)]
    for kind in FLOATS:
        state, grads = State(draw(kind, shapes=shapes), kind, kind), draw(kind, 1, shapes)
        exact = state.clone(torch.float64)
        with backend("native"):
            state.step(grads, decay=0.5)
        exact.step([g.double() for g in grads], adamw_step_ref, decay=0.5)
        for key, wanted in exact.named().items():
            if key[0] in "pmv":
                assert_rounded(state.named()[key], wanted, key)
        assert all(torch.equal(c, p) for c, p in zip(state.cast, state.params))


def test_any_shapes() -> None:
    hypothesis = pytest.importorskip("hypothesis")
    st = hypothesis.strategies
    sizes = st.one_of(st.integers(0, 70), st.sampled_from([511, 512, 513, 4095, 4096, 4097, 8192, 20000]))

    @hypothesis.settings(max_examples=40, deadline=None)
    @hypothesis.given(st.lists(sizes, min_size=1, max_size=6), st.sampled_from(FLOATS), st.sampled_from(FLOATS))
    def check(counts: list[int], param: torch.dtype, grad: torch.dtype) -> None:
        shapes = [(n,) for n in counts]
        state, grads = State(draw(param, shapes=shapes), cast=torch.bfloat16), draw(grad, 1, shapes)
        exact = state.clone(torch.float64)
        state.step(grads)
        exact.step([g.double() for g in grads], adamw_step_ref)
        for key, wanted in exact.named().items():
            if key[0] in "pmv":
                assert_rounded(state.named()[key], wanted, key)

    check()


def test_sharded_parameters(name: str) -> None:
    """DTensors, as fully_shard makes them, on one process: the local shards are stepped."""
    distributed = pytest.importorskip("torch.distributed.tensor")
    import torch.distributed as dist

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = dist.init_device_mesh("cpu", (1,))
        state, grads = State(draw(), cast=torch.bfloat16), draw(seed=1)
        plain = state.clone()
        placed = [[distributed.DTensor.from_local(t.clone(), mesh) for t in ts] for ts in (*state.lists, grads)]
        params, first, second, _, average, cast, slopes = placed
        adamw_step(params, slopes, first, second, state.steps, average, cast, **SETTINGS)
        plain.step(grads)
        for ours, theirs in zip((params, first, second, average, cast), (*plain.lists[:3], *plain.lists[4:])):
            assert all(torch.equal(a.to_local(), b) for a, b in zip(ours, theirs))
        with pytest.raises(ValueError, match=r"adamw_step: the tensors at 0 must be sharded alike, got .*and None"):
            adamw_step(params, grads, first, second, state.steps, **SETTINGS)
    finally:
        dist.destroy_process_group()


def test_parameters_with_gradients_and_version_counters(name: str) -> None:
    layer = nn.Linear(4, 4)
    layer(torch.randn(2, 4)).square().sum().backward()
    params = list(layer.parameters())
    state, versions = State(params), [p._version for p in params]  # type: ignore[arg-type]
    state.step([p.grad for p in params if p.grad is not None])
    assert all(p.requires_grad and p.grad_fn is None for p in params)
    assert all(p._version > v for p, v in zip(params, versions))


def test_a_step_makes_casts_of_weights_old(name: str) -> None:
    """As torch's optimizers do by their hook: of sharded weights no version counter tells."""
    from maetok_fast.kernels.fp8_linear import _Steps

    before = _Steps.count
    State(draw()).step(draw(seed=1))
    assert _Steps.count == before + 1


@pytest.mark.parametrize("mode", ["aot_eager"])  # of Inductor: tests/test_ema.py, the same kind of operator
def test_torch_compile(name: str, mode: str) -> None:
    if name == "triton":
        pytest.skip("the graph holds the same operator whatever it runs")
    import torch.distributed.tensor  # as in tests/test_ema.py

    torch._dynamo.reset()
    grads, one = draw(seed=1), State(draw(), cast=torch.bfloat16)
    two, rate = one.clone(), torch.tensor(0.01)

    def step(rate: Tensor, scale: Tensor) -> Tensor:
        one.step(grads, rate=rate, scale=scale)
        return one.params[0] * 2

    out = torch.compile(step, fullgraph=True, backend=mode)(rate, torch.tensor(0.5))
    two.step(grads, rate=rate, scale=torch.tensor(0.5))
    assert one.equals(two)
    assert torch.equal(out, two.params[0] * 2)


def test_opcheck() -> None:
    def lists() -> list[Tensor]:
        return [torch.rand(3), torch.rand(2, 2)]

    args = (lists(), lists(), lists(), lists(), [torch.zeros(()), torch.zeros(())], lists(), [], 1e-3, None, 0.9, 0.95,
            1e-8, [0.1, 0.0], 0.5, None, torch.tensor(0.5), torch.tensor(True))  # fmt: skip
    torch.library.opcheck(module._adamw_step, args)


@pytest.mark.parametrize("which", ["native", "triton"])
def test_strict_mode_refuses_a_slower_way(which: str, monkeypatch: pytest.MonkeyPatch) -> None:
    missing = {"native": _native.why_missing(), "triton": why_no_triton("cpu")}[which]
    if missing is not None:
        pytest.skip(missing)
    monkeypatch.setattr(_dispatch._State, "strict", True)
    for bad in (torch.ones(2, dtype=torch.float64), torch.ones(4)[::2]):
        state = State([torch.zeros(2), bad])
        with backend(which), pytest.raises(
            BackendError, match=r"adamw_step: MAETOK_FAST_STRICT=1 .*1 of 2 tensors are not dense fp32, bf16 or fp16"
        ):  # fmt: skip
            state.step([torch.ones(2), torch.ones(2)])
        assert (bad == 1).all()
        with backend("reference"):
            state.step([torch.ones(2), torch.ones(2)])
        assert not (bad == 1).any()


def test_an_average_in_16_bits_is_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    from maetok_fast.kernels import ema

    monkeypatch.setattr(ema, "_warned", set())
    with pytest.warns(UserWarning, match=r"adamw_step: an average in 16 bits .* keep average in fp32"):
        State([torch.ones(2)], torch.bfloat16).step([torch.ones(2)], decay=0.9999)


def test_errors_in_words() -> None:
    state, grads = State([torch.zeros(2)]), [torch.zeros(2)]
    with pytest.raises(ValueError, match="lists of equal length, got 1 params, 2 grads"):
        state.step([*grads, *grads])
    with pytest.raises(ValueError, match="got 1 params, 0 steps"):
        adamw_step(state.params, grads, state.exp_avg, state.exp_avg_sq, [], rate=0.1)
    with pytest.raises(ValueError, match=r"at 0 must have one shape, got \(2,\) of params and \(3,\) of grads"):
        state.step([torch.zeros(3)])
    with pytest.raises(TypeError, match=r"grads\[0\] is torch.int64; leave what is no"):
        state.step([torch.zeros(2, dtype=torch.int64)])
    for wrong, words in (
        ({"rate": -1.0}, "rate must be at least 0, got -1"),
        ({"eps": float("nan")}, "eps must be at least 0, got nan"),
        ({"weight_decay": [-0.5]}, "weight_decay must be at least 0, got -0.5"),
        ({"weight_decay": [0.5, 0.5]}, "a weight_decay for each of 1 params, got 2"),
        ({"betas": (0.9, 1.0)}, r"betas must lie in \[0, 1\), got \(0.9, 1.0\)"),
        ({"decay": 1.5}, r"decay must lie in \[0, 1\], got 1.5"),
        ({"scale": torch.zeros(2)}, r"scale must have one element, got shape \(2,\)"),
        ({"finite": torch.ones(2)}, r"finite must have one element"),
    ):
        with pytest.raises(ValueError, match=words):
            state.step(grads, **wrong)
    adamw_step([], [], [], [], [], rate=0.1)
    if _native.why_missing() is None:
        call, tables = _native.lib().adamw_step, (torch.zeros(1, 8, dtype=torch.int64), torch.zeros(1).long())
        numbers = (0.1, 0.9, 0.95, 1e-8, 0.1, 1.0)
        with pytest.raises(TypeError, match="table must be int64"):
            call(torch.zeros(1, 8), tables[1], *numbers, 0, 0, -1, -1)
        with pytest.raises(ValueError, match="gradient must be 0"):
            call(*tables, *numbers, 0, 3, -1, -1)
        with pytest.raises(ValueError, match="row 0 of the table has no address"):
            call(*tables, *numbers, 0, 0, -1, -1)


@pytest.mark.gpu
def test_on_a_gpu_without_a_synchronisation() -> None:
    state, grads = State([p.cuda() for p in draw()], cast=torch.bfloat16), [g.cuda() for g in draw(seed=1)]
    state.steps = [s.cuda() for s in state.steps]
    exact, scale, finite = state.clone(torch.float64), torch.tensor(0.5).cuda(), torch.tensor(True).cuda()
    state.clone().step(grads, scale=scale, finite=finite)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        state.step(grads, scale=scale, finite=finite)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    exact.step([g.double() for g in grads], adamw_step_ref, scale=scale)
    for key, wanted in exact.named().items():
        assert_rounded(state.named()[key], wanted, key)
