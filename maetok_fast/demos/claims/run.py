# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""`maetok-fast demo claims`: the paper's claims on a small scale, from images to a page that says which of them hold.

    judge ── for each seed, for each variant: tokenizer ─ generator ─ mixed, guidance where they belong ── densities
       └────── each part a record (parts.py), in processes of one thread each ──────────┘   └── findings.py, page.py

Stopped or killed anywhere, the same command goes on: records are kept, and trainings go on from their checkpoints.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import replace
from pathlib import Path
from typing import Any

from maetok_fast.data.samples import Source
from maetok_fast.demos.claims.judge import Judge
from maetok_fast.demos.claims.parts import Work, run_part
from maetok_fast.demos.claims.variants import FULL, QUICK, SIZE, VARIANTS, Scale, Variant
from maetok_fast.demos.shared import DemoStopped, bar, check_classes, open_images
from maetok_fast.pipeline import RunError
from maetok_fast.pipeline.run import make_folder

__all__ = ["run_claims"]

QUICK_IMAGES = 200  # of either set that the quick form's judge sees
Task = tuple[Variant, int, tuple[str, ...]]


def run_claims(
    out: str | Path,
    data: str = "fashion-mnist",
    test: str = "fashion-mnist:test",
    *,
    seeds: int = 3,
    quick: bool = False,
    processes: int = 0,
    quiet: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Runs what is not done yet in the folder `out`, and returns what claims.json holds.

    data, test: sources with labels of the same classes. seeds: how many trainings of everything. quick: a handful of
    steps, to see that everything works. processes: side by side, one thread each; 0: one a core. say: gets a line for
    each part. DataError where the images cannot be used, DemoStopped where somebody stopped it, and what parts raise.
    """
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise RunError("the demo is one process; run it without torchrun")
    if seeds < 1:
        raise RunError(f"seeds must be at least 1, got {seeds}")
    out = Path(out)
    of_training, of_test = open_images(data), open_images(test)
    classes = check_classes(of_training, of_test)
    scale = _fitting(QUICK if quick else FULL, of_training, of_test)
    make_folder(out)
    work = Work(out, data, test, classes, scale)
    counts = (scale.sampled, scale.judged)
    if not (out / "judge" / "judge.npz").exists():
        began = time.perf_counter()
        limit = QUICK_IMAGES if quick else None
        judge = Judge.make(out / "judge", data, test, classes, SIZE, counts, limit)
        say(f"judge: right about {judge.accuracy:.1%} of the test images, {time.perf_counter() - began:.0f} s")
    chains: list[Task] = [(v, seed, _parts_of(v)) for seed in range(seeds) for v in VARIANTS]
    total = sum(len(parts) + v.alike for v, _, parts in chains)
    with bar("claims", total, "part", quiet) as tick, _one_thread_each(), _pool(processes) as pool:
        _run(pool, work, chains, tick, say)
        alike = [(v, seed) for v, seed, _ in chains if v.alike]
        found = [work.read("tokenizer", v, seed) for v, seed in alike]
        work = replace(work, components=max(r["components_90"] for r in found if r is not None))
        _run(pool, work, [(v, seed, ("density",)) for v, seed in alike], tick, say)
    from maetok_fast.demos.claims.findings import collect_findings
    from maetok_fast.demos.claims.page import write_claims

    result = collect_findings(work, seeds, quick)
    write_claims(work, result)
    return result


def _parts_of(variant: Variant) -> tuple[str, ...]:
    names = ["tokenizer", *(["generator"] if variant.generated else [])]
    if variant.name in ("maetok", "learned"):
        names.append("mixed")
    if variant.name == "maetok":
        names.append("guidance")
    return tuple(names)


def _fitting(scale: Scale, data: Source, test: Source) -> Scale:
    return replace(scale, images=min(scale.images, len(data)), held=min(scale.held, len(test)))


@contextlib.contextmanager
def _one_thread_each() -> Iterator[None]:
    """For processes that are started inside: a thread pool each would be as many threads as cores, squared."""
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
    before = {name: os.environ.get(name) for name in names}
    os.environ.update(dict.fromkeys(names, "1"))
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextlib.contextmanager
def _pool(processes: int) -> Iterator[ProcessPoolExecutor]:
    count = processes or os.cpu_count() or 1
    # spawn: torch's threads do not survive a fork
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(count, context, initializer=_end_with, initargs=(os.getpid(),))
    try:
        yield pool
    except KeyboardInterrupt:
        raise DemoStopped("stopped") from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _end_with(parent: int) -> None:
    """In a worker: it ends when its parent does, however that ended. Left alone it would train on, in folders that the
    same command goes on in."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _run(
    pool: ProcessPoolExecutor, work: Work, tasks: list[Task], tick: Callable[[int], None], say: Callable[[str], None]
) -> None:
    """Every task's parts one after the other, tasks side by side in their order. The first error ends it, once the
    parts that are running are done."""
    running: dict[Future[dict[str, Any]], Task] = {}

    def start(task: Task) -> None:
        variant, seed, parts = task
        running[pool.submit(run_part, work, parts[0], variant, seed)] = task

    waiting = list(tasks)
    room = getattr(pool, "_max_workers", 1)
    while waiting or running:
        while waiting and len(running) < room:
            start(waiting.pop(0))
        done, _ = wait(running, return_when=FIRST_COMPLETED)
        for future in done:
            variant, seed, parts = running.pop(future)
            record = future.result()
            tick(1)
            say(f"{variant.name:12} seed {seed}  {parts[0]:10} {record['seconds']:7.1f} s   {_told(parts[0], record)}")
            if parts[1:]:
                start((variant, seed, parts[1:]))


def _told(part: str, record: dict[str, Any]) -> str:
    if part == "tokenizer":
        return f"PSNR {record['psnr']:.2f} dB, probe {record['probe_flat']:.1%}"
    if part == "generator":
        return f"FD {record['gfd']['classifier']:.3f}, {record['recognised']:.1%} recognised"
    if part == "mixed":
        return ", ".join(f"{size} px {record[f'after_{size}']['psnr']:.2f} dB" for size in (32, 64))
    if part == "density":
        modes, _, held = record["full"][-1]
        return f"NLL {held:.3f} a dimension at {modes} modes"
    best = min(record["rows"], key=lambda row: row["gfd"]["classifier"])
    return f"best FD {best['gfd']['classifier']:.3f}: {best['name']}"
