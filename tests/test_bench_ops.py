# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""The op benchmark and the gate: what is measured, what is printed, and the gate's decisions on synthetic noise.

No test asserts a real time: clocks are injected, and the noise is the one measured on 2 shared cores.
"""

from __future__ import annotations

import itertools
import json
import math
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

pytest.importorskip("rich")
sys.path.append(str(Path(__file__).resolve().parent.parent))

from benchmarks import _base, _pairs, compare
from benchmarks import _gate as gate
from maetok_fast.bench import cases, ops, table, timing
from maetok_fast.bench.budget import Budget, Speed
from maetok_fast.bench.cases import BOTH, COMPILE, COPY, FORWARD, REFERENCE
from maetok_fast.bench.timing import Spread
from maetok_fast.cli import app
from maetok_fast.kernels import Backend, Op, Sample, _drive
from maetok_fast.kernels import ops as records
from maetok_fast.kernels._record import RECORDS

CPU = torch.device("cpu")
DRIVES = (_drive, _drive)


class Clock:
    """A clock that only moves when told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def call(self, seconds: Callable[[], float]) -> Callable[[], None]:
        def run() -> None:
            self.now += seconds()

        return run


def one_ref(x: Tensor, index: Tensor) -> Tensor:
    """y = 2 x; index is an integer input."""
    return 2 * x


def two_ref(x: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """y = 2 x and the sums of x's rows."""
    return 2 * x, x.sum(1)


def fake(outputs: int = 1, usable: bool = True, factor: float = 2.0) -> Op[..., Any]:
    """A record with one native backend, no part of the library. factor: what its kernel multiplies by."""

    def forward(a: Any, out: Any) -> None:
        torch.mul(a.x, factor, out=out.y)
        if outputs == 2:
            torch.sum(a.x, 1, out=out.z)

    def backward(a: Any, out: Any, g: Any, d: Any) -> None:
        torch.mul(g.y, factor, out=d.x)
        if outputs == 2:
            d.x.add_(g.z[:, None])

    def sample(label: str, n: int, real: bool = True) -> Sample:
        return Sample(label, lambda randn: {"x": randn(4, n), "index": randn(4, 3).argsort(1)}, real)

    made: Op[..., Any] = Op(
        f"fake{next(NUMBERS)}",
        ref=one_ref if outputs == 1 else two_ref,
        shapes={"x": "B N", "index": "B K"},
        roles={"index": (torch.int64,)},
        out=lambda a, backend: (torch.empty_like(a.x), a.x.new_empty(a.x.shape[0]))[:outputs],
        outputs=("y", "z")[:outputs],
        cpu=[Backend("native", forward, backward, lambda a: None if usable else "it is a Tuesday")],
        samples=[sample("small", 3, False), sample("large", 64), sample("mid", 16)],
        flops=lambda a: a.x.numel(),
    )
    RECORDS.pop(made.name)
    return made


NUMBERS = itertools.count()


def work(op: Op[..., Any], direction: str = FORWARD, dtype: str = "fp32") -> cases.Work:
    return cases.record_work(op, op.samples[1], dtype, direction, CPU, False)


# ---- cases


def test_every_record_has_cases_and_no_line_of_its_own() -> None:
    found = cases.all_cases()
    assert {case.op for case in found} == {*records(), *cases.EXTRAS}
    assert len({case.key for case in found}) == len(found)
    for name, op in records().items():
        directions = {case.direction for case in found if case.op == name}
        assert directions == ({FORWARD, BOTH} if op.differentiable else {FORWARD}), name
    few = cases.all_cases(samples=1, dtype=("bf16",), direction=(FORWARD,), op=("adaln",))
    assert [(c.op, c.dtype, c.direction) for c in few] == [("adaln", "bf16", FORWARD)]


@pytest.mark.parametrize(("kind", "value"), [("op", "nope"), ("dtype", "fp8"), ("direction", "sideways")])
def test_unknown_names_are_said(kind: str, value: str) -> None:
    with pytest.raises(ValueError, match=rf"unknown {kind} '{value}': expected one of"):
        cases.all_cases(**{kind: (value,)})


def test_a_dtype_that_changes_nothing_is_left_out() -> None:
    op = fake()
    op.samples = [Sample("own", lambda randn: {"x": randn(4, 2, dtype=torch.float32)}, real=True)]
    found = list(cases._record_cases(op, ("fp32", "bf16"), (FORWARD,)))
    assert [case.dtype for case in found] == ["fp32"]


@pytest.mark.parametrize("outputs", [1, 2])
def test_both_sides_do_the_same_calls_of_autograd(outputs: int) -> None:
    made = work(fake(outputs), BOTH)
    with made.running():
        ours, plain = made.ours["native"](), made.peers[REFERENCE]()
    assert len(ours) == len(plain) == 1  # one gradient: of x, not of the integers
    torch.testing.assert_close(ours, plain)
    x, index, y = 4 * 64 * 4, 4 * 3 * 8, 4 * 64 * 4
    second = 16 if outputs == 2 else 0
    # forward's cost, then x and the index read again, the output gradients read, dx written
    assert made.bytes == (2 * x + index + second) + (x + index) + (y + second) + x
    assert made.flops == 3 * 4 * 64
    assert not made.notes


def test_no_gradients_forward() -> None:
    made = work(fake())
    with made.running():
        assert not torch.is_grad_enabled()
        assert not made.ours["native"]().requires_grad


def test_the_reason_of_a_reference_is_kept() -> None:
    made = work(fake(usable=False))
    assert made.ours == {}
    assert made.reasons == {"native": "it is a Tuesday"}


def test_a_wrong_result_is_noted() -> None:
    assert "DIFFERS" in work(fake(factor=3.0)).notes[0]
    assert cases.difference([torch.tensor([True, False])], [torch.tensor([True, True])]) == 0.5
    assert cases.difference([torch.zeros(0)], [torch.zeros(0)]) == 0.0


# ---- rounds


def test_rounds_are_paired_and_end() -> None:
    clock = Clock()
    fast, slow = clock.call(lambda: 1e-3), clock.call(lambda: 3e-3)
    samples = timing.rounds({"a": fast, "b": slow}, CPU, seconds=0.1, clock=clock)
    assert len(samples["a"]) == len(samples["b"]) >= 3
    assert samples["a"][0] == pytest.approx(1e-3)
    assert samples["b"][0] == pytest.approx(3e-3)
    assert len(timing.rounds({"a": fast}, CPU, seconds=0.0, least=5, clock=clock)["a"]) == 5
    assert len(timing.rounds({"a": fast}, CPU, seconds=9e9, most=7, clock=clock)["a"]) == 7


def test_spread() -> None:
    assert Spread.of([4.0, 1.0, 2.0, 3.0, 5.0]) == Spread(3.0, 2.0, 4.0, 5)
    assert timing.quantile([1.0, 2.0], 0.25) == 1.25


# ---- rows and the table


def flat(seconds: float) -> Spread:
    return Spread(seconds, seconds, seconds, 3)


def row(**changes: Any) -> ops.Row:
    values: dict[str, Any] = {
        "op": "adaln", "sample": "a | b", "dtype": "bf16", "direction": FORWARD, "backend": "native",
        "bytes": 10**9, "flops": 10**9, "times": {"ours native": flat(0.1), REFERENCE: flat(0.2), COPY: flat(0.05)},
        "ratios": {REFERENCE: Spread(2.0, 1.9, 2.1, 3)}, "ceiling": COPY, "ceiling_seconds": 0.05,
    }  # fmt: skip
    return ops.Row(**values | changes)


def document(*rows: ops.Row) -> dict[str, Any]:
    about = {"cores": 2, "cpu": "a CPU", "cpu_features": [], "torch": "2", "threads": 2}
    return {"benchmark": "ops", "schema": 2, "machine": about, "compile": True, "rows": list(rows)}


def test_rates_and_ceilings() -> None:
    found = row()
    assert (found.gb_s, found.ceiling_rate, found.attained) == (10.0, 20.0, 0.5)
    found = row(ceiling="matmul", ceiling_seconds=0.02)
    assert found.ceiling_rate == pytest.approx(0.05)
    assert table.cells(found)[7] == "0.01 TFLOP/s"


def test_measure_picks_the_ceiling_and_pairs_the_ratios() -> None:
    seconds = {"ours native": [1.0, 2.0, 3.0], REFERENCE: [2.0, 4.0, 6.0], COPY: [0.5] * 3, "matmul": [1e9] * 3}

    def timer(calls: dict[str, Any], device: Any, **_: Any) -> dict[str, list[float]]:
        return {name: seconds[name] for name in calls}

    op = fake()
    case = cases.Case("fake", "large", "fp32", FORWARD, cases._maker(op, op.samples[1], "fp32", FORWARD))
    found, compiling = ops.measure(case, CPU, compile_=False, matmul_rate=1e12, timer=timer)
    assert compiling == 0.0
    assert list(found.times) == ["ours native", REFERENCE, COPY]
    assert found.ratios[REFERENCE] == flat(2.0)
    assert (found.ceiling, found.ceiling_seconds, found.seconds) == (COPY, 0.5, 2.0)
    found, _ = ops.measure(case, CPU, compile_=False, matmul_rate=1.0, timer=timer)
    assert found.ceiling == "matmul"


def test_json_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "ops.json"
    ops.save(document(row(), row(notes=["no torch.compile: why"])), path)
    assert json.loads(path.read_text())["rows"][0]["gb_s"] == 10.0
    assert ops.load(path)["rows"] == [row(), row(notes=["no torch.compile: why"])]
    path.write_text("{}")
    with pytest.raises(ValueError, match="is no result of `maetok-fast bench ops --json`"):
        ops.load(path)


def test_page_says_what_runs_the_reference() -> None:
    lost = row(backend="reference", times={REFERENCE: flat(0.1)}, ratios={}, reasons={"native": "too wide"})
    slow = row(ratios={COMPILE: Spread(0.8, 0.7, 0.9, 3)}, times={"ours native": flat(0.1), "ours other": flat(0.3)})
    page = table.markdown(document(row(), lost, slow))
    assert "runs the reference (native: too wide)" in page
    assert "backend other takes 300 ms" in page
    assert "a \\| b" in page
    assert "2.00 [1.90, 2.10]" in page
    assert table._worse(slow)
    assert not table._worse(row())
    (line,) = table.summary([row(), slow])
    assert line.ratios == {REFERENCE: 2.0, COMPILE: 0.8}
    assert (line.op, line.dtype, line.direction) == ("adaln", "bf16", FORWARD)
    assert table.rich_table(document(row())).row_count == 2


def test_medians_say_over_how_many_shapes() -> None:
    def shape(plain: float, compiled: float) -> ops.Row:
        times = {"ours native": flat(0.1), REFERENCE: flat(0.1 * plain), COMPILE: flat(0.1 * compiled)}
        return row(ratios={REFERENCE: flat(plain), COMPILE: flat(compiled)}, times=times)

    (line,) = table.summary([shape(2.0, 1.0), shape(3.0, 1.5), shape(1.0, 50.0)])
    assert line.text(REFERENCE) == "2.00 (3 shapes)"
    assert line.text(COMPILE) == "1.25 (2 shapes)"  # not the one on which torch.compile made 50 x slower code
    (line,) = table.summary([shape(1.0, 50.0)])
    assert (line.text(REFERENCE), line.text(COMPILE)) == ("1.00 (1 shape)", "")
    page = table.markdown(document(shape(1.0, 50.0)))
    assert "torch.compile made code 50 x slower than the eager reference; not in the median" in page
    assert "| adaln | bf16 | forward | 1.00 (1 shape) |  |" in page


def test_a_large_ratio_names_the_slow_peer() -> None:
    times = {"ours native": flat(0.1), REFERENCE: flat(4.0), COPY: flat(0.05)}
    said = table.outlier(row(times=times, ratios={REFERENCE: flat(40.0)}))
    assert said is not None
    assert said.startswith("40 x because the reference is slow")
    assert "1.2% of the ceiling (ours 50%)" in said
    assert table.outlier(row()) is None


# ---- the budget


def fake_cases(clock: Clock, seconds: dict[str, float]) -> list[cases.Case]:
    """Cases of one op each, forward in two precisions, that take these seconds to make and nothing to run."""

    def make(name: str) -> Callable[[torch.device, bool], cases.Work]:
        def work(device: torch.device, compile_: bool) -> cases.Work:
            clock.now += seconds[name]
            peers = {REFERENCE: lambda: None}
            if compile_:
                first = iter([8.0])
                peers[COMPILE] = clock.call(lambda: next(first, 0.0))
            return cases.Work({"native": lambda: None}, peers, 8, 8)

        return work

    size = lambda: (0, 0)  # noqa: E731
    return [
        cases.Case(name, sample, dtype, FORWARD, make(name), size)
        for name in seconds
        for sample in ("first", "second")
        for dtype in ("fp32", "bf16")
    ]


@pytest.fixture
def machine_of_one_flop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "calibrate", lambda device, dtypes: Speed({"fp32": 1.0, "bf16": 1.0}, 1.0))
    monkeypatch.setattr(ops, "fast_dtype", lambda device: "bf16")
    monkeypatch.setattr(ops, "describe", lambda device: {"cores": 2})
    monkeypatch.setattr(ops.measure, "__kwdefaults__", ops.measure.__kwdefaults__ | {"timer": instant})  # type: ignore


def instant(calls: dict[str, Any], device: Any, **_: Any) -> dict[str, list[float]]:
    return {name: [1e-3] * 3 for name in calls}


def test_important_cases_come_first() -> None:
    found = fake_cases(Clock(), {"a": 0.0, "b": 0.0})
    order = [found[place] for place in ops.important_first(found, "bf16")]
    assert [(c.op, c.sample, c.dtype) for c in order] == [
        ("a", "first", "bf16"), ("b", "first", "bf16"), ("a", "first", "fp32"), ("b", "first", "fp32"),
        ("a", "second", "bf16"), ("b", "second", "bf16"), ("a", "second", "fp32"), ("b", "second", "fp32"),
    ]  # fmt: skip


@pytest.mark.usefixtures("machine_of_one_flop")
def test_ops_end_within_their_budget() -> None:
    clock = Clock()
    found = fake_cases(clock, {"a": 2.5, "b": 2.5})
    budget = Budget(11.5, clock)
    document = ops.run(found, CPU, seconds=0.1, budget=budget)
    measured = [(row.op, row.sample, row.dtype) for row in document["rows"]]
    assert measured == [("a", "first", "fp32"), ("a", "first", "bf16"), ("b", "first", "fp32"), ("b", "first", "bf16")]
    assert clock.now <= 11.5
    assert len([line for line in document["left_out"] if "second" in line and "would take about" in line]) == 4
    assert all(COMPILE not in row.times for row in document["rows"])
    assert any(line.startswith("torch.compile in 4 of 8 cases") for line in document["left_out"])


@pytest.mark.usefixtures("machine_of_one_flop")
def test_what_is_left_goes_to_the_compiler() -> None:
    clock = Clock()
    document = ops.run(fake_cases(clock, {"a": 0.1}), CPU, seconds=0.1, budget=Budget(30.0, clock))
    compiled = [row.dtype for row in document["rows"] if COMPILE in row.times]
    assert len(document["rows"]) == 4
    assert 1 <= len(compiled) < 4
    assert clock.now <= 30.0
    document = ops.run(fake_cases(clock, {"a": 0.1}), CPU, seconds=0.1)
    assert all(COMPILE in row.times for row in document["rows"])  # no budget, nothing left out
    assert document["left_out"] == []


def test_sizes_are_known_before_anything_is_made() -> None:
    for case in cases.all_cases(samples=1, op=("adaln", "rope_attention", "packed_linear")):
        flops, moved = case.size()
        assert flops > 0, case.key
        assert moved > 0 or case.op == "packed_linear"


def test_only_what_stands_between_the_markers_is_replaced() -> None:
    first = table.put("", "one")
    assert first.startswith("# How fast the ops are")
    again = table.put(f"before\n{first}after\n", "two")
    assert "one" not in again
    assert "two" in again
    assert again.startswith("before")
    assert again.endswith("after\n")


# ---- the command


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--op", "nope"], "unknown op 'nope': expected one of"),
        (["--dtype", "fp8"], "unknown dtype 'fp8'"),
        (["--device", "tpu"], "unknown device 'tpu': expected cpu or cuda"),
        (["--load", "/does/not/exist.json"], "No such file"),
        (["--budget", "0"], "--budget expects a number of seconds above 0"),
    ],
)
def test_command_errors_are_words(options: list[str], words: str) -> None:
    result = CliRunner().invoke(app, ["bench", "ops", *options])
    assert result.exit_code == 2
    assert words in result.output
    assert "Traceback" not in result.output


def test_command_shows_stored_results(tmp_path: Path) -> None:
    stored, page = tmp_path / "ops.json", tmp_path / "ops.md"
    ops.save(document(row()), stored)
    result = CliRunner().invoke(app, ["bench", "ops", "--load", str(stored), "--markdown", str(page)])
    assert result.exit_code == 0, result.output
    assert "adaln" in result.output
    assert "### adaln" in page.read_text()


# ---- the gate: decisions on the noise of the machine


def noisy(generator: random.Random, slow: float, offset: float, spikes: float = 0.1) -> tuple[Clock, Any, Any]:
    """A clock and two calls of 1 ms with the measured noise: 3 % a call, now and then a neighbour's spike, phases that
    hit both sides, and a lasting difference between the sides (`offset`, sigma of one process)."""
    clock = Clock()
    mine = slow * math.exp(generator.gauss(0, offset))
    phase = 1.0

    def call(factor: float) -> Callable[[], None]:
        def seconds() -> float:
            nonlocal phase
            if generator.random() < 0.02:
                phase = math.exp(generator.gauss(0, 0.2))
            spike = 1 + (generator.expovariate(2.0) if generator.random() < spikes else 0.0)
            return 1e-3 * factor * phase * spike * math.exp(generator.gauss(0, 0.03))

        return clock.call(seconds)

    return clock, call(mine), call(1.0)


def gate_once(generator: random.Random, slow: float, offset: float) -> gate.Verdict:
    def measure(only: Any, scale: float) -> tuple[compare.Results, dict[str, str]]:
        clock, head, base = noisy(generator, slow, offset)
        return {"k": gate.measure(head, base, CPU, seconds=scale * 0.5, clock=clock, seed=generator.getrandbits(9))}, {}

    return compare.run(measure, {})[0]["k"]


@pytest.mark.parametrize("offset", [0.004, 0.015])
def test_ten_percent_is_caught_and_nothing_else(offset: float) -> None:
    generator = random.Random(1)
    clean = [gate_once(generator, 1.0, offset) for _ in range(150)]
    slowed = [gate_once(generator, 1.10, offset) for _ in range(150)]
    assert not any(v.slow for v in clean)
    assert all(v.slow for v in slowed)
    assert {v.processes for v in slowed} == {3}  # nobody fails by one process alone
    assert not any(gate_once(generator, 0.8, offset).slow for _ in range(20))


def test_a_settled_pair_costs_few_windows() -> None:
    generator = random.Random(2)
    clock, head, base = noisy(generator, 1.3, 0.0)
    found = gate.measure(head, base, CPU, seconds=5.0, clock=clock)
    assert found.settled
    assert found.windows <= 2 * gate.LEAST
    assert found.ratio == pytest.approx(1.3, rel=0.05)
    assert found.head_seconds > 0


def test_time_is_up() -> None:
    clock = Clock()
    generator = random.Random(3)
    head = clock.call(lambda: 0.1 * math.exp(generator.gauss(0, 1)))
    found = gate.measure(head, head, CPU, seconds=0.0, clock=clock)
    assert found.windows == gate.LEAST // 2
    assert not found.settled


def test_planted_is_ten_percent_of_the_call() -> None:
    clock = Clock()

    def ticking() -> float:  # time passes while the plant spins
        clock.now += 1e-6
        return clock.now

    call = clock.call(lambda: 1e-3)
    slower = gate.planted(call, 1.10, CPU, ticking)
    start = clock.now
    slower()
    assert clock.now - start == pytest.approx(1.1e-3, rel=0.01)


def test_one_noisy_process_fails_nobody() -> None:
    bad, good = gate.Measured(1.4, 0.01, 20, 1.0), gate.Measured(1.0, 0.01, 20, 1.0)
    assert gate.doubtful({"a": bad, "b": good}, {}) == ["a"]
    assert not gate.verdict([bad, good, good]).slow
    assert gate.verdict([bad, bad, good]).slow
    assert gate.doubtful({"a": gate.Measured(1.04, 0.01, 20, 1.0)}, {"a": 1.07}) == []


def test_limits_follow_the_noise() -> None:
    assert gate.limit_of(0.001) == gate.LIMIT
    wider = gate.limit_of(0.02)
    assert wider is not None
    assert gate.LIMIT < wider < 1.10
    assert gate.limit_of(0.05) is None  # 10 % cannot be told from this noise: not gated, and said


def test_floors_come_from_the_noise(tmp_path: Path) -> None:
    def found(ratio: float) -> gate.Measured:
        return gate.Measured(ratio, 0.001, 20, 1.0)

    rounds = [{"calm": found(1 + 0.001 * i), "wild": found(1 + 0.1 * (-1) ** i)} for i in range(5)]
    floors = compare.make_floors("abc", rounds)
    assert floors["base"] == "abc"
    assert floors["floors"] == {"calm": round(1 / gate.LIMIT, 4)}
    assert list(floors["left_out"]) == ["wild"]
    with pytest.raises(_base.Unusable, match="--write"):
        compare.load_floors(tmp_path / "none.json")


def test_one_op_is_added_and_the_base_stands() -> None:
    key, other = "new | s | fp32 | forward", "old | s | fp32 | forward"
    stored = {"schema": 1, "base": "aaa", "floors": {other: 0.95, "new | gone | fp32 | forward": 0.9}, "left_out": {}}
    found = {"schema": 1, "base": "bbb", "floors": {key: 0.96}, "left_out": {}}
    known = compare.with_op(stored, "new", found, in_base=True)
    assert known == {"schema": 1, "base": "aaa", "floors": {other: 0.95, key: 0.96}, "left_out": {}}
    fresh = compare.with_op(stored, "new", found, in_base=False)
    assert fresh == {**known, "floors": {key: 0.96, other: 0.95}, "later": {"new": "bbb"}}
    assert compare.with_op(fresh, "new", found, in_base=True) == known
    assert compare.bases(fresh, ["new", "old"]) == {"aaa": ["old"], "bbb": ["new"]}
    assert compare.bases(known, ["new", "old"]) == {"aaa": ["new", "old"]}


def test_each_op_meets_its_own_base() -> None:
    def measure(tree: Path, names: list[str]) -> compare.Found:
        return {f"{name} at {tree}": gate.Measured(1.0, 0.001, 20, 1.0) for name in names}, {}

    def tree_of(commit: str) -> Path:
        if commit == "gone":
            raise _base.Unusable("the base gone is not in this clone\nmore")
        return Path(commit)

    groups = {"aaa": ["old"], "bbb": ["new"], "gone": ["lost"]}
    results, skipped = compare.over_bases(groups, tree_of, measure)
    assert set(results) == {"old at aaa", "new at bbb"}
    assert skipped == {"lost": "the base gone is not in this clone"}
    with pytest.raises(_base.Unusable):
        compare.over_bases({"gone": ["old"]}, tree_of, measure)


def test_pairs_without_a_floor_are_said() -> None:
    quiet = gate.Measured(1.0, 0.001, 20, 1.0)
    verdicts, skipped = compare.run(lambda only, scale: ({"old": quiet, "new": quiet}, {}), {}, {"old"})
    assert list(verdicts) == ["old"]
    assert skipped == {"new": "no floor"}


@pytest.mark.parametrize("outputs", [1, 2])
def test_pairs_call_the_launchers_on_one_image(outputs: int) -> None:
    _pairs._MADE.clear()
    head, base = fake(outputs), fake(outputs)
    found = {key: (a, b) for key, a, b in _pairs.pairs({"fake": head}, {"fake": base}, DRIVES, "cpu", ["fp32"])}
    assert list(found) == ["fake | mid | fp32 | forward", "fake | mid | fp32 | backward"]
    mine, other = found["fake | mid | fp32 | forward"]
    assert mine()[0].shape == (1, 16)
    torch.testing.assert_close(mine(), other())
    mine, other = found["fake | mid | fp32 | backward"]
    torch.testing.assert_close(mine()[0], other()[0])


def test_pairs_that_cannot_be_compared_say_why() -> None:
    _pairs._MADE.clear()
    head = {"fake": fake(), "new": fake()}
    reasons = {key: why for key, call, why in _pairs.pairs(head, {"fake": fake(usable=False)}, DRIVES, "cpu", ["fp32"])}
    assert reasons["new"] == "not in the base"
    assert reasons["fake | mid | fp32 | forward"] == "the base runs the reference here"


def test_lost_kernels_and_forgotten_floors_fail() -> None:
    _pairs._MADE.clear()
    found = list(_pairs.pairs({"fake": fake(usable=False)}, {"fake": fake()}, DRIVES, "cpu", ["fp32"]))
    skipped = {key: why for key, call, why in found}
    assert set(skipped.values()) == {_pairs.LOST}
    good = {"a | s | bf16 | forward": gate.Verdict(1.0, 1.05, 1)}
    limits = {"a | s | bf16 | forward": 1.05, "gone | s | bf16 | forward": 1.05, "gone | s | fp32 | forward": 1.05}
    assert len(compare.lost({}, good, skipped, ["bf16"])) == 2
    (line,) = compare.lost(limits, good, {}, ["bf16"])
    assert line.startswith("gone | s | bf16 | forward: has a floor and was not measured")
    assert compare.lost(limits, good, {"gone | s | bf16 | forward": "the reference runs here"}, ["bf16"]) == []
    assert compare.lost(limits, {}, {}, ["bf16"]) == []  # nothing native on this machine


def test_proof_counts_alarms_and_misses(capsys: pytest.CaptureFixture[str]) -> None:
    good, bad = gate.Verdict(1.0, 1.05, 1), gate.Verdict(1.1, 1.05, 3)
    assert compare.prove(2, lambda plant: ({"a": bad if plant else good, "b": bad}, {})) == 1
    printed = capsys.readouterr().out
    assert "2 false alarms in 4 clean pairs, 0 misses in 4 slowed ones; 2 of 2 slowed runs failed" in printed
    assert "false alarm: b (2 x)" in printed


@pytest.mark.parametrize(
    ("options", "words"),
    [(["--plant", "adaln"], "OP=FACTOR"), (["--prove", "0"], "at least 1"), (["--dtype", "x"], "")],
)
def test_gate_command_errors(options: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        compare.parse(options)
    assert words in capsys.readouterr().err


def test_an_unknown_base_is_said(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert compare.main(["--base", "no-such-commit", "--cache", str(tmp_path)]) == 2
    assert "no-such-commit" in capsys.readouterr().err


def test_the_committed_floors_are_of_this_form() -> None:
    if not compare.FLOORS.exists():
        pytest.skip("no floors yet")
    floors = compare.load_floors()
    assert floors["schema"] == 1
    assert all(1 / 1.10 < floor < 1 for floor in floors["floors"].values())
    assert {key.split(" | ")[0] for key in floors["floors"]} <= set(records())


def _tracked() -> bool:
    try:
        return bool(_base.git("ls-files", "kernels/_op.py"))
    except (_base.Unusable, OSError):
        return False


@pytest.mark.skipif(not _tracked(), reason="needs the repository")
def test_base_of_head_is_a_second_library(tmp_path: Path) -> None:
    """The base loads beside the head, under its own name and with its own operators."""
    tree = _base.base_tree("HEAD", tmp_path)
    code = (
        f"import sys; sys.path.insert(0, {str(tree)!r})\n"
        "import maetok_fast.kernels as a, maetok_base.kernels as b, torch\n"
        "x = torch.randn(1, 4, 8); g = torch.randn(8)\n"
        "torch.testing.assert_close(a.gate_residual(x, g, x), b.gate_residual(x, g, x))\n"
        "assert a.ops()['adaln'] is not b.ops()['adaln']\n"
        "assert torch.ops.maetok_base.adaln is not torch.ops.maetok_fast.adaln\n"
        "print(b.__name__)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "maetok_base.kernels", done.stderr
    assert _base.base_tree("HEAD", tmp_path) == tree
