# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""Timing by interleaved rounds and medians, and peak memory.

Cases that are to be compared run in turn, round after round, so that a slow phase of the machine hits all of them;
what is reported is each case's median. A case too slow for rounds is timed in its first call and says so.
"""

from __future__ import annotations

import ctypes
import gc
import math
import os
import statistics
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from _machine import synchronize


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
) -> dict[str, Timing]:
    """Time all cases in turn, `rounds` times each; no round starts after `until` (time.perf_counter's clock).

    The first call of a case warms it up. It is also its sample where no round was left, or where it took longer than
    `once` seconds (its own work dwarfs any start-up cost by then). `tick(name)` is called before each call.
    """
    first: dict[str, tuple[float, int | None]] = {}
    for name, fn in cases.items():
        tick(name)
        with PeakMemory(device) as peak:
            elapsed = _once(fn, device)
        first[name] = elapsed, peak.extra_bytes
    repeated = [name for name, (elapsed, _) in first.items() if elapsed <= once]
    samples: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(rounds):
        if not repeated or time.perf_counter() > until:
            break
        for name in repeated:
            tick(name)
            samples[name].append(_once(cases[name], device))
    return {
        name: Timing(
            statistics.median(samples[name] or [elapsed]), max(1, len(samples[name])), bool(samples[name]), extra
        )
        for name, (elapsed, extra) in first.items()
    }


def _once(fn: Callable[[], Any], device: torch.device) -> float:
    synchronize(device)
    start = time.perf_counter()
    fn()
    synchronize(device)
    return time.perf_counter() - start


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
