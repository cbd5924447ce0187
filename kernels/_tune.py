# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""Which of several ways to compute the same is the fastest on this machine: measured once, kept on disk.

    fastest(key, candidates, otherwise)      the winner's name, from this process, from the file, or from a race, which
                                             `otherwise` loses only where another is faster by more than noise
    MAETOK_FAST_TUNE=0                       no race, no file: `otherwise`, the same on every machine of a kind
    MAETOK_FAST_CACHE                        the folder of the file, tune.json (default: ~/.cache/maetok_fast)

Candidates may round differently, so that two machines, or two processes of one of them, may differ in the last digits
of what they compute where the race is on. The file holds a table for each processor, instruction set, number of threads
and version of torch and of this package; a file that cannot be read or written is passed over: the race runs again.
"""

from __future__ import annotations

import contextlib
import contextvars
import json
import logging
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from . import _native, _processor

__all__ = ["SWITCH", "enabled", "fastest", "machine_key", "results", "without_races"]

SWITCH = "MAETOK_FAST_TUNE"
_without = contextvars.ContextVar("without_races", default=False)
SECONDS = 0.006  # for each candidate in a round
ROUNDS = 3
CLEARLY = 0.95  # of the time of `otherwise`: ratios of two races of the same code differ by a few percent
log = logging.getLogger("maetok_fast")
_lock = threading.Lock()
_tables: dict[str, dict[str, Any]] = {}  # machine -> key -> {"choice", "milliseconds"}


def fastest(key: str, candidates: Mapping[str, Callable[[], Any]], otherwise: str) -> str:
    """The name of the fastest candidate; `key` says what they compute, e.g. "linear 1152 -> 4608 gelu_tanh fp32".

    candidates: name -> a call that computes it once. otherwise: the name to take where the race is off, or nothing in
    it is clearly faster.
    """
    if len(candidates) == 1:
        return next(iter(candidates))
    if not enabled():
        return otherwise if otherwise in candidates else next(iter(candidates))
    with _lock:
        table = _table()
        found = table.get(key)
        if found is None or set(found["milliseconds"]) != set(candidates) or found["choice"] not in candidates:
            times = _race(candidates)
            first = min(times, key=times.__getitem__)
            clear = otherwise not in times or times[first] < CLEARLY * times[otherwise]
            found = {"choice": first if clear else otherwise, "milliseconds": times}
            table[key] = found
            _write(key, found)
        return str(found["choice"])


def enabled() -> bool:
    """Whether races decide here."""
    return os.environ.get(SWITCH, "") != "0" and not _without.get()


@contextlib.contextmanager
def without_races() -> Iterator[None]:
    """In this context `otherwise` is taken, as under MAETOK_FAST_TUNE=0: what runs does not depend on a measurement."""
    token = _without.set(True)
    try:
        yield
    finally:
        _without.reset(token)


def results() -> dict[str, dict[str, Any]]:
    """What was measured on this machine, in this process or an earlier one: key -> {"choice", "milliseconds"}."""
    if os.environ.get(SWITCH, "") == "0":
        return {}
    with _lock:
        return dict(_table())


def machine_key() -> str:
    """What the results hold for."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        own = version("maetok-fast")
    except PackageNotFoundError:
        own = "unknown"
    return (
        f"{_processor.name()}, {_native.level()}, {torch.get_num_threads()} threads, "
        f"torch {torch.__version__}, maetok-fast {own}"
    )


def _race(candidates: Mapping[str, Callable[[], Any]]) -> dict[str, float]:
    """Milliseconds per call, the least of `ROUNDS` turns: what other programs take of the processor only adds."""
    best = dict.fromkeys(candidates, float("inf"))
    calls = {}
    for name, call in candidates.items():
        call()  # the first one makes what the others find
        start = time.perf_counter()
        call()
        calls[name] = max(1, int(SECONDS / max(time.perf_counter() - start, 1e-6)))
    for _ in range(ROUNDS):
        for name, call in candidates.items():
            start = time.perf_counter()
            for _ in range(calls[name]):
                call()
            best[name] = min(best[name], (time.perf_counter() - start) / calls[name])
    return {name: round(1e3 * seconds, 4) for name, seconds in best.items()}


def path() -> Path:
    """The file of results."""
    folder = os.environ.get("MAETOK_FAST_CACHE") or Path(
        os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "maetok_fast"
    )
    return Path(folder) / "tune.json"


def _read() -> dict[str, dict[str, Any]]:
    """The file's valid part."""
    try:
        document = json.loads(path().read_text())
    except (OSError, ValueError):
        return {}
    if not isinstance(document, dict):
        return {}
    return {
        machine: {
            key: row
            for key, row in table.items()
            if isinstance(row, dict) and isinstance(row.get("milliseconds"), dict) and "choice" in row
        }
        for machine, table in document.items()
        if isinstance(table, dict)
    }


def _table() -> dict[str, Any]:
    machine = machine_key()
    if machine not in _tables:
        _tables[machine] = _read().get(machine, {})
    return _tables[machine]


def _write(key: str, row: dict[str, Any]) -> None:
    """Adds a row to the file, which other processes may be writing: each write is of a whole file, the last one wins,
    and what it lacks of the others is measured again."""
    document = _read()
    document.setdefault(machine_key(), {})[key] = row
    target = path()
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=target.parent, prefix=".tune-")
        try:
            with os.fdopen(handle, "w") as file:
                json.dump(document, file, indent=1)
            os.replace(name, target)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(name)
            raise
    except OSError as error:
        log.debug("results of the race are not kept: %s", error)
