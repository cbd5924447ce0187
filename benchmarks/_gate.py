# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""The statistics of the regression gate: is the head slower than its peer, on a machine that is noisy?

The peer is the same op of another build, loaded into the same process and called with the same tensors. What was
measured on 2 shared cores (one sample = 0.5 s in a fresh process, standard deviation of the ratio's logarithm):

    against a copy of the same bytes     4-14 %    against plain torch, bandwidth-bound   4-12 %
    against plain torch, matmul-bound    2-3 %     against the same code, same tensors    0.2-4.5 %

A 10 % slowdown needs the last line: where a buffer lies, what the neighbours do to the memory and how fast the matmul
units run today then hit both sides alike.

    window   both sides in random order, each: one untimed call, then a block; its lower quartile is the sample
    pair     windows until the median of log(head / base) is 4 standard errors away from the limit, or time is up
    verdict  a pair above DOUBT is measured again in two fresh processes; slow if the median of three is above LIMIT
"""

from __future__ import annotations

import math
import random
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch

from maetok_fast.bench.machine import synchronize
from maetok_fast.bench.timing import quantile

LIMIT = 1.05  # head / base above this is a regression: half way to the 10 % that must never pass
DOUBT = 1.03  # above this one process is not believed
CERTAIN = 4.0  # standard errors
LEAST, MOST = 16, 2000  # windows

Call = Callable[[], object]
Clock = Callable[[], float]


@dataclass(frozen=True)
class Measured:
    """One pair in one process: ratio = head's time over base's, error = standard error of its logarithm."""

    ratio: float
    error: float
    windows: int
    head_seconds: float

    @property
    def settled(self) -> bool:
        return abs(math.log(self.ratio / LIMIT)) > CERTAIN * self.error


@dataclass(frozen=True)
class Verdict:
    """What several processes say. slow: ratio > limit."""

    ratio: float
    limit: float
    processes: int

    @property
    def slow(self) -> bool:
        return self.ratio > self.limit


def estimate(logs: Sequence[float], head_seconds: float = math.nan) -> Measured:
    """From the windows' log(head / base): their median, its error from the median absolute deviation."""
    middle = statistics.median(logs)
    deviation = statistics.median([abs(value - middle) for value in logs])
    # 1.4826: deviation -> sigma of a normal; 1.2533: the median's error over the mean's
    error = max(1.4826 * 1.2533 * deviation / math.sqrt(len(logs)), 1e-3)
    return Measured(math.exp(middle), error, len(logs), head_seconds)


def measure(
    head: Call,
    base: Call,
    device: torch.device,
    *,
    seconds: float,
    block: float = 1e-3,
    clock: Clock = time.perf_counter,
    seed: int = 0,
) -> Measured:
    """Windows of the two until the estimate is settled or `seconds` have passed (but never fewer than LEAST / 2)."""
    shuffle = random.Random(seed)
    sides = [head, base]
    for call in sides * 2:
        call()
    taken = max(min(_timed(call, device, clock) for _ in range(2)) for call in sides)
    calls = max(2, min(200, round(block / max(taken, 1e-7))))
    logs: list[float] = []
    own: list[float] = []
    stop = clock() + seconds
    for window in range(1, MOST + 1):
        sample = {}
        for side in shuffle.sample((0, 1), 2):
            sides[side]()
            sample[side] = quantile(sorted(_timed(sides[side], device, clock) for _ in range(calls)), 0.25)
        logs.append(math.log(sample[0] / sample[1]))
        own.append(sample[0])
        late = clock() > stop
        if (late and window >= LEAST // 2) or (window >= LEAST and window % 4 == 0 and estimate(logs).settled):
            break
    return estimate(logs, statistics.median(own))


def _timed(call: Call, device: torch.device, clock: Clock) -> float:
    synchronize(device)
    start = clock()
    call()
    synchronize(device)
    return clock() - start


def planted(call: Call, factor: float, device: torch.device, clock: Clock = time.perf_counter) -> Call:
    """The call made slower by `factor`: it is timed as it runs, and the rest of the time is spent spinning."""

    def slower() -> object:
        start = clock()
        out = call()
        synchronize(device)
        now = clock()
        end = now + (factor - 1) * (now - start)
        while clock() < end:
            pass
        return out

    return slower


def limit_of(noise: float, least: float = LIMIT) -> float | None:
    """The limit for a pair whose single processes scatter by `noise` (sigma of the logarithm), or None where a
    slowdown of 10 % would not be told from it: LIMIT, or 4 sigma of a median of three where that is more."""
    wanted = max(least, math.exp(4 * 0.67 * noise))  # 0.67: sigma of a median of three
    return wanted if math.log(1.10) - math.log(wanted) >= 2 * 0.67 * noise else None


def doubtful(results: Mapping[str, Measured], limits: Mapping[str, float]) -> list[str]:
    """The pairs that one process cannot decide: above DOUBT (as much closer to 1 as their limit is farther)."""
    shift = {key: limits.get(key, LIMIT) / LIMIT for key in results}
    return [key for key, found in results.items() if found.ratio > DOUBT * shift[key]]


def verdict(processes: Iterable[Measured], limit: float = LIMIT) -> Verdict:
    """One process that saw nothing is enough; otherwise the median of three decides."""
    ratios = [found.ratio for found in processes]
    return Verdict(statistics.median(ratios), limit, len(ratios))
