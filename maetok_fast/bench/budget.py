# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""A time budget: what a machine can do is measured first, then only what fits is begun, and the rest is named.

    calibrate ── Speed (FLOP/s per dtype, bytes/s) ── ideal seconds of a piece of work
    Budget.expect(name, ideal seconds, kind)    prediction = ideal x slack[kind]
    Budget.admit(name)                          does the prediction fit before the deadline of this part?
    Budget.took(name, seconds)                  corrects the kind's slack by what was really needed

A piece that does not fit is not begun and stands in `left_out` in words; no number is made up for it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch

from .machine import matmul, synchronize

SLACK = 2.0  # how much longer than ideal a piece may take of which nothing is known yet
Clock = Callable[[], float]


@dataclass(frozen=True)
class Speed:
    """flops: dtype name -> FLOP/s of a matrix product; bytes: bytes/s that a copy reads and writes."""

    flops: dict[str, float]
    bytes: float

    def seconds(self, dtype: str, flops: float, moved: float = 0.0) -> float:
        """What the work takes at these rates; a dtype that was not measured counts as the slowest measured one."""
        return flops / self.flops.get(dtype, min(self.flops.values())) + moved / self.bytes


def calibrate(device: torch.device, dtypes: Iterable[str], size: int = 512, clock: Clock = time.perf_counter) -> Speed:
    """Under a second even where a dtype is emulated: the best of some products of size^3, and of some copies."""
    rates = {}
    for dtype in dict.fromkeys(dtypes):
        fn, flops = matmul(device, dtype, size)
        rates[dtype] = flops / _best(fn, device, clock)
    source = torch.ones(2**23, device=device)
    target = torch.empty_like(source)
    return Speed(rates, 2 * source.nbytes / _best(lambda: target.copy_(source), device, clock))


def _best(fn: Callable[[], object], device: torch.device, clock: Clock) -> float:
    fn()
    taken: list[float] = []
    while len(taken) < 2 or (len(taken) < 10 and sum(taken) < 0.2):  # a busy neighbour must not hit all of them
        synchronize(device)
        start = clock()
        fn()
        synchronize(device)
        taken.append(clock() - start)
    return max(min(taken), 1e-9)


class Budget:
    """Seconds that a run may take. `end` is the deadline of the part that runs now (`clock`'s time), `left_out` what
    was not done and why, a sentence each."""

    def __init__(self, seconds: float, clock: Clock = time.perf_counter) -> None:
        self.total, self.clock = seconds, clock
        self.start = clock()
        self.end = self.start + seconds
        self.left_out: list[str] = []
        self._slack: dict[str, float] = {}
        self._expected: dict[str, tuple[float, str, str]] = {}

    @property
    def left(self) -> float:
        """Seconds until the deadline of this part; never below 0."""
        return max(0.0, self.end - self.clock())

    def part(self, share: float) -> None:
        """The next part must have ended once this share of the whole is spent; what parts before it saved, it gets."""
        self.end = self.start + share * self.total

    def expect(self, name: str, ideal: float, kind: str, words: str = "") -> None:
        """Announce a piece: the seconds it takes at calibrated rates, what it is like (for the slack), its name for
        people."""
        self._expected[name] = ideal, kind, words or name

    def seconds(self, name: str) -> float:
        """The prediction for a piece that was announced; 0 for others."""
        ideal, kind, _ = self._expected.get(name, (0.0, "", ""))
        return ideal * self.slack(kind)

    def slack(self, kind: str) -> float:
        return self._slack.get(kind, SLACK)

    def admit(self, name: str) -> bool:
        """Whether the piece may begin; if not, `left_out` gets its sentence."""
        needed, left = self.seconds(name), self.left
        if needed <= left:
            return True
        self.leave_out(self._expected[name][2], f"would take about {_text(needed)} of the {_text(left)} left")
        return False

    def leave_out(self, what: str, why: str) -> None:
        self.left_out.append(f"{what}: {why}")

    def took(self, name: str, seconds: float) -> None:
        """What a piece needed: pieces of its kind are predicted by it from now on (the mean of the last two)."""
        ideal, kind, _ = self._expected.get(name, (0.0, "", ""))
        if ideal > 0:
            found = 1.1 * seconds / ideal
            self._slack[kind] = (self._slack[kind] + found) / 2 if kind in self._slack else found

    def largest(self, candidates: Sequence[int], needs: Callable[[int], float], share: float = 1.0) -> int:
        """The first of the candidates (largest first) that needs at most this share of what is left; else the last."""
        room = share * self.left
        return next((candidate for candidate in candidates if needs(candidate) <= room), candidates[-1])


def _text(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
