# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""Timing by interleaved rounds, and peak memory.

Cases that are to be compared run in turn, round after round, so that a slow phase of the machine hits all of them.
`interleave` is for models: whole calls, medians; a case too slow for rounds is timed in its first call and says so.
`rounds` is for ops: short blocks of calls in random order, each case's samples paired round by round, so that ratios
come with a spread.
"""

from __future__ import annotations

import ctypes
import gc
import math
import os
import random
import statistics
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .budget import Budget
from .machine import synchronize


@dataclass(frozen=True)
class Timing:
    """seconds: the median of `samples` timed calls. warm: False when the only call timed was the first one."""

    seconds: float
    samples: int
    warm: bool = True
    extra_bytes: int | None = None  # peak memory above the start, from the first call


def interleave(
    cases: Mapping[str, Callable[[], Any]],
    device: torch.device,
    *,
    until: float = math.inf,
    rounds: int = 5,
    once: float = 10.0,
    tick: Callable[[str], None] = lambda name: None,
    budget: Budget | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Timing]:
    """Time all cases in turn, `rounds` times each; no round starts that would not end before `until` (clock's time).

    The first call of a case warms it up. It is also its sample where no round was left, or where it took longer than
    `once` seconds (its own work dwarfs any start-up cost by then). `tick(name)` is called before each call. A budget
    admits each case before its first call, learns from it, and its deadline is `until`; what it does not admit is
    absent from the result.
    """
    if budget is not None:
        until, clock = min(until, budget.end), budget.clock
    first: dict[str, tuple[float, int | None]] = {}
    for name, fn in cases.items():
        if budget is not None and not budget.admit(name):
            continue
        tick(name)
        with PeakMemory(device) as peak:
            elapsed = _once(fn, device, clock)
        first[name] = elapsed, peak.extra_bytes
        if budget is not None:
            budget.took(name, elapsed)
    repeated = {name: elapsed for name, (elapsed, _) in first.items() if elapsed <= once}
    samples: dict[str, list[float]] = {name: [] for name in first}
    for _ in range(rounds):
        if not repeated or clock() + sum(repeated.values()) > until:
            break
        for name in repeated:
            tick(name)
            samples[name].append(_once(cases[name], device, clock))
    return {
        name: Timing(
            statistics.median(samples[name] or [elapsed]), max(1, len(samples[name])), bool(samples[name]), extra
        )
        for name, (elapsed, extra) in first.items()
    }


def _once(fn: Callable[[], Any], device: torch.device, clock: Callable[[], float]) -> float:
    synchronize(device)
    start = clock()
    fn()
    synchronize(device)
    return clock() - start


@dataclass(frozen=True)
class Spread:
    """The median of some samples and their quartiles."""

    median: float
    low: float
    high: float
    samples: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        ordered = sorted(values)
        low, high = quantile(ordered, 0.25), quantile(ordered, 0.75)
        return cls(statistics.median(ordered), low, high, len(ordered))


def quantile(ordered: Sequence[float], at: float) -> float:
    """The quantile of sorted values, linear between them."""
    position = at * (len(ordered) - 1)
    below = int(position)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (position - below)


def rounds(
    cases: Mapping[str, Callable[[], Any]],
    device: torch.device,
    *,
    seconds: float,
    least: int = 3,
    most: int = 200,
    block: float = 1e-3,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Seconds a call, one sample a round for every case, the rounds of all cases paired by index.

    In each round the cases run in random order, and each in a block: one call that is not timed (it brings the case's
    own data back into the cache that the case before has emptied; left out above 20 ms, where it changes nothing), then
    as many as fill `block` seconds; the sample is their mean. Rounds end after `seconds`, but not before `least` and
    not after `most`. Every case must have been called before (compiled, warmed up).
    """
    shuffle = random.Random(0)
    names = list(cases)
    calls, untimed = {}, {}
    for name in names:
        taken = _block(cases[name], device, 1, clock)
        calls[name] = max(1, min(1000, round(block / max(taken, 1e-7))))
        untimed[name] = taken < 20e-3
    samples: dict[str, list[float]] = {name: [] for name in names}
    stop = clock() + seconds
    for done in range(most):
        if done >= least and clock() > stop:
            break
        shuffle.shuffle(names)
        for name in names:
            if untimed[name]:
                cases[name]()
            samples[name].append(_block(cases[name], device, calls[name], clock))
    return samples


def _block(fn: Callable[[], Any], device: torch.device, calls: int, clock: Callable[[], float]) -> float:
    synchronize(device)
    start = clock()
    for _ in range(calls):
        fn()
    synchronize(device)
    return (clock() - start) / calls


class PeakMemory:
    """Bytes allocated on top of what was in use at the start: `with PeakMemory(device) as peak: ...; peak.extra_bytes`.

    On CUDA the allocator's own count. On the CPU the process's resident memory, looked at every 2 ms; None where
    the system does not show it.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.extra_bytes: int | None = None

    def __enter__(self) -> PeakMemory:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            self._start = torch.cuda.memory_allocated(self.device)
            return self
        release_memory(self.device)
        start = _resident()
        if start is not None:
            self._start = self._highest = start
            self._stop = threading.Event()
            self._thread = threading.Thread(target=self._watch, daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.device.type == "cuda":
            self.extra_bytes = torch.cuda.max_memory_allocated(self.device) - self._start
        elif hasattr(self, "_thread"):
            self._stop.set()
            self._thread.join()
            self.extra_bytes = max(self._highest, _resident() or 0) - self._start

    def _watch(self) -> None:
        while not self._stop.wait(0.002):
            self._highest = max(self._highest, _resident() or 0)


def release_memory(device: torch.device) -> None:
    """Give freed memory back, so that the next measurement does not find it already there."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (AttributeError, OSError, TypeError):
        return  # not glibc: freed blocks may be counted as in use at the start


def held_bytes(device: torch.device) -> int | None:
    """Bytes in use now, after freed memory was given back; None where the system does not show it."""
    release_memory(device)
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else _resident()


def _resident() -> int | None:
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, AttributeError):
        return None
