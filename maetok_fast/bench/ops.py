# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""The op benchmark: every case of `cases` timed against its peers and its ceiling, in interleaved rounds.

    Case ── build ── warm up (compile) ── rounds{ours, reference, torch.compile, copy, matmul} ── Row

The ceiling of a case is taken in its own rounds: a copy that moves the same bytes (caches make small ones faster than
memory), and, where the FLOPs weigh more than the bytes, a 1024^3 product in the case's dtype. `attained` is the time
that the ceiling needs for the case's bytes or FLOPs, over ours.
"""

from __future__ import annotations

import ctypes
import gc
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from .budget import Budget, calibrate
from .cases import COMPILE, COPY, FORWARD, REFERENCE, Case, Work, copy_call
from .machine import describe, fast_dtype, matmul
from .timing import Spread, rounds

MATMUL = "matmul"
MATMUL_SIZE = 1024
OVERHEAD = 0.1  # seconds of a case however small: making it, comparing its outputs
OURS = "ours"  # followed by the backend's name


@dataclass
class Row:
    """One case measured. times: name -> seconds a call, ours first (`ours native`, ...); ratios: peer -> peer / ours.

    backend: what dispatch takes here; "reference" where no kernel runs, and `reasons` say why. bytes, flops: see
    `cases`. ceiling: "copy" or "matmul", what bounds the case; ceiling_seconds: what it needs for the same work.
    """

    op: str
    sample: str
    dtype: str
    direction: str
    backend: str
    bytes: int
    flops: int
    times: dict[str, Spread]
    ratios: dict[str, Spread]
    ceiling: str
    ceiling_seconds: float
    reasons: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        """Of what dispatch takes: our first backend, or the reference."""
        return next(iter(self.times.values())).median

    @property
    def gb_s(self) -> float:
        return self.bytes / self.seconds / 1e9

    @property
    def tflop_s(self) -> float:
        return self.flops / self.seconds / 1e12

    @property
    def attained(self) -> float:
        return self.ceiling_seconds / self.seconds

    @property
    def ceiling_rate(self) -> float:
        """GB/s of the copy or TFLOP/s of the product."""
        work = self.bytes / 1e9 if self.ceiling == COPY else self.flops / 1e12
        return work / self.ceiling_seconds

    def to_json(self) -> dict[str, Any]:
        rates = {name: getattr(self, name) for name in ("gb_s", "tflop_s", "ceiling_rate", "attained")}
        return asdict(self) | rates

    @classmethod
    def from_json(cls, raw: dict[str, Any]) -> Row:
        names = cls.__dataclass_fields__
        values = {name: raw[name] for name in names}
        for name in ("times", "ratios"):
            values[name] = {key: Spread(**spread) for key, spread in raw[name].items()}
        return cls(**values)


def important_first(cases: Sequence[Case], dtype: str) -> list[int]:
    """The places of the cases in the order in which a budget admits them: every op's first shape before any second one;
    within that the precision that is fast here before others, forward before forward+backward."""
    seen: dict[str, list[str]] = {}
    ranks = []
    for place, case in enumerate(cases):
        samples = seen.setdefault(case.op, [])
        if case.sample not in samples:
            samples.append(case.sample)
        only = all(other.dtype == case.dtype for other in cases if other.op == case.op)
        slow = case.dtype != dtype and not only
        ranks.append((samples.index(case.sample), slow, case.direction != FORWARD, place))
    return [rank[-1] for rank in sorted(ranks)]


def run(
    cases: Sequence[Case],
    device: torch.device,
    *,
    compile_: bool = True,
    seconds: float = 0.4,
    tick: Callable[[Case], None] = lambda case: None,
    budget: Budget | None = None,
) -> dict[str, Any]:
    """Measures the cases in at most `seconds` of rounds each; the document that `--json` writes, with `Row`s under
    "rows" in the order of `cases`. Within a budget the important cases come first, those that no time is left for are
    named in "left_out", and torch.compile is left out of a case when the cases after it need the time."""
    keep_freed_memory(device)
    budget = Budget(math.inf) if budget is None else budget
    speed = calibrate(device, (case.dtype for case in cases))
    order = important_first(cases, fast_dtype(device))
    rows: dict[int, Row] = {}
    for place in order:
        flops, moved = cases[place].size()
        # warm up twice, the first timed block, three rounds: of ours, the reference and the ceilings
        ideal = OVERHEAD + 8 * speed.seconds(cases[place].dtype, flops, moved)
        budget.expect(cases[place].key, ideal, cases[place].op, cases[place].key.replace(" | ", ", "))
    compiling, plain = 10.0, 0  # seconds that torch.compile takes of a case, as measured so far
    for done, place in enumerate(order):
        case = cases[place]
        if not budget.admit(case.key):
            continue
        tick(case)
        after = sum(budget.seconds(cases[other].key) for other in order[done:])
        compiled = compile_ and budget.left - after > compiling
        plain += compile_ and not compiled
        start = budget.clock()
        row, warming = measure(
            case,
            device,
            compile_=compiled,
            seconds=min(seconds, max(0.0, budget.left / 10)),
            matmul_rate=speed.flops.get(case.dtype) if device.type == "cpu" else None,
            clock=budget.clock,
        )
        rows[place] = row
        if compiled:
            compiling = (compiling + warming) / 2
        budget.took(case.key, budget.clock() - start - warming)
        gc.collect()
    if plain:
        budget.leave_out(f"torch.compile in {plain} of {len(cases)} cases", "compiling them does not fit the time")
    return {
        "benchmark": "ops",
        "schema": 2,
        "machine": describe(device),
        "compile": compile_,
        "left_out": budget.left_out,
        "rows": [rows[place] for place in sorted(rows)],
    }


def measure(
    case: Case,
    device: torch.device,
    *,
    compile_: bool = True,
    seconds: float = 0.4,
    matmul_rate: float | None = None,
    timer: Callable[..., dict[str, list[float]]] = rounds,
    clock: Callable[[], float] = time.perf_counter,
) -> tuple[Row, float]:
    """One case, and the seconds that torch.compile took of it; `matmul_rate` (FLOP/s) decides whether the product is
    worth a place among the rounds."""
    work = case.make(device, compile_)
    with work.running():
        calls = {f"{OURS} {name}": call for name, call in work.ours.items()} | work.peers
        compiling = _warm(calls, work, clock)
        calls[COPY] = copy_call(work.bytes, device)
        first = timer({COPY: calls[COPY]}, device, seconds=0.0, least=3)
        product = matmul_rate is None or work.flops / matmul_rate > work.bytes / _rate(work.bytes, first[COPY])
        flops = 0.0
        if product:
            calls[MATMUL], flops = matmul(device, case.dtype, MATMUL_SIZE)
            calls[MATMUL]()
        samples = timer(calls, device, seconds=seconds)
    return _row(case, work, samples, flops), compiling


def _row(case: Case, work: Work, samples: dict[str, list[float]], matmul_flops: float) -> Row:
    ceilings = {COPY: Spread.of(samples[COPY]).median}
    if MATMUL in samples:
        ceilings[MATMUL] = work.flops / (matmul_flops / Spread.of(samples[MATMUL]).median)
    bound = max(ceilings, key=lambda name: ceilings[name])
    first = next(iter(samples))
    mine = samples[first]
    peers = [name for name in (REFERENCE, COMPILE) if name in samples and name != first]
    ratios = {name: Spread.of([peer / own for peer, own in zip(samples[name], mine)]) for name in peers}
    return Row(
        case.op,
        case.sample,
        case.dtype,
        case.direction,
        first.removeprefix(f"{OURS} "),
        work.bytes,
        work.flops,
        {name: Spread.of(values) for name, values in samples.items()},
        ratios,
        bound,
        ceilings[bound],
        work.reasons,
        work.notes,
    )


def _warm(calls: dict[str, Callable[[], Any]], work: Work, clock: Callable[[], float]) -> float:
    """Calls everything twice (once where that takes a second: start-up costs are no matter then): the compiler and the
    allocators do their work here. A peer that cannot run is dropped. Returns what torch.compile took."""
    compiling = 0.0
    for name in list(calls):
        start = clock()
        try:
            calls[name]()
            if name == COMPILE:
                compiling = clock() - start
            if name == COMPILE or clock() - start < 1.0:
                calls[name]()
        except Exception as error:  # dynamo wraps whatever the back end raised
            if name != COMPILE:
                raise
            text = str(error).strip().splitlines()
            work.notes.append(f"no {name}: {text[0] if text else type(error).__name__}")
            del calls[name]
    return compiling


def _rate(amount: float, samples: Sequence[float]) -> float:
    return amount / Spread.of(samples).median


def keep_freed_memory(device: torch.device) -> bool:
    """Makes glibc keep freed blocks for this process, as caching allocators do, so that no timed call pays for fresh
    pages. False where the C library has no such switch."""
    if device.type != "cpu":
        return True
    trim_threshold, mmap_threshold = -1, -3  # malloc.h
    try:
        libc = ctypes.CDLL(None)
        return bool(libc.mallopt(mmap_threshold, 1 << 30)) and bool(libc.mallopt(trim_threshold, 2**31 - 1))
    except (AttributeError, OSError, TypeError):
        return False


def save(document: dict[str, Any], path: Path) -> None:
    raw = document | {"rows": [row.to_json() for row in document["rows"]]}
    path.write_text(json.dumps(raw, indent=1) + "\n")


def load(path: Path) -> dict[str, Any]:
    """What `save` wrote. ValueError in words for anything else."""
    try:
        raw = json.loads(path.read_text())
        if raw["benchmark"] != "ops" or raw["schema"] != 2:
            raise KeyError("schema")
        return raw | {"rows": [Row.from_json(row) for row in raw["rows"]]}
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is no result of `maetok-fast bench ops --json`: {error!r}") from error
