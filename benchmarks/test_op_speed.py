# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""The ops as a pytest-benchmark suite, parametrised from the records: its statistics, histograms and comparisons.

    pytest benchmarks --benchmark-only                      everything (minutes; torch.compile once a case)
    pytest benchmarks --benchmark-only -k "adaln and bf16 and not compile"
    pytest benchmarks --benchmark-only --benchmark-autosave --benchmark-compare

A group is one case (op, shape, dtype, direction) with ours, the reference and torch.compile of it side by side.
extra_info: GB/s and TFLOP/s of an ideal implementation's work, and the GB/s of a copy of the same bytes.
pytest-benchmark runs one contender after the other; `maetok-fast bench ops` interleaves them: its ratios are to be
believed where the two differ.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

pytest.importorskip("pytest_benchmark")

from maetok_fast.bench.cases import COMPILE, COPY, REFERENCE, Case, Work, all_cases, copy_call
from maetok_fast.bench.ops import keep_freed_memory
from maetok_fast.bench.timing import Spread, rounds

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CONTENDERS = ("ours", REFERENCE, COMPILE)


@pytest.fixture(scope="module")
def made() -> Iterator[Callable[[Case, bool], tuple[Work, float]]]:
    """Builds a case once for its contenders: (its work, GB/s of a copy of the same bytes)."""
    keep_freed_memory(DEVICE)
    last: dict[tuple[str, bool], tuple[Work, float]] = {}

    def make(case: Case, compile_: bool) -> tuple[Work, float]:
        if (case.key, compile_) not in last:
            last.clear()
            work = case.make(DEVICE, compile_)
            copy = rounds({COPY: copy_call(work.bytes, DEVICE)}, DEVICE, seconds=0.02)[COPY]
            last[case.key, compile_] = work, work.bytes / Spread.of(copy).median / 1e9
        return last[case.key, compile_]

    return make


@pytest.mark.parametrize("contender", CONTENDERS)
@pytest.mark.parametrize("case", all_cases(), ids=lambda case: case.key.replace(" | ", "-").replace(" ", "_"))
def test_op(case: Case, contender: str, benchmark: Any, made: Callable[[Case, bool], tuple[Work, float]]) -> None:
    work, copy = made(case, contender == COMPILE)
    calls = work.peers | ({"ours": next(iter(work.ours.values()))} if work.ours else {})
    if contender not in calls:
        pytest.skip(
            "; ".join(f"{name}: {why}" for name, why in work.reasons.items()) or f"no {contender} for this case"
        )
    call = calls[contender]

    def synchronous() -> None:
        call()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    benchmark.group = case.key
    with work.running():
        call()  # compiles
        benchmark.pedantic(synchronous, rounds=20, warmup_rounds=2)
    seconds = benchmark.stats.stats.median
    benchmark.extra_info |= {
        "GB/s": work.bytes / seconds / 1e9,
        "TFLOP/s": work.flops / seconds / 1e12,
        "copy GB/s": copy,
    }
