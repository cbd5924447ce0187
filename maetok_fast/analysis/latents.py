# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""The comparison of tokenizers by their latents: one call, one folder, one page.

entries ── sources.py ──> subjects, whose rows pair up ── measured.py, shown.py, kept by store.py ──> analysis.json
                                                                                 report.py ──> report.html, report.png

out/caches     latents of the entries that are tokenizers       out/parts    results by part and tokenizer
out/*.png      pictures                                         stopped at any point, the same call goes on
"""

from __future__ import annotations

import dataclasses
import platform
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

import maetok_fast
from maetok_fast._optional import probe
from maetok_fast.analysis import figures
from maetok_fast.analysis.measured import gmm, probes, usage
from maetok_fast.analysis.report import write_report
from maetok_fast.analysis.settings import PARTS, Entry, Settings
from maetok_fast.analysis.shown import neighbours, traversal, umap
from maetok_fast.analysis.sources import check_pairs, open_subject
from maetok_fast.analysis.store import Store
from maetok_fast.analysis.work import Found, Work
from maetok_fast.bench.machine import describe
from maetok_fast.pipeline.run import make_folder, write_json

__all__ = ["analyze"]

FORMAT = 1  # of analysis.json
PART_OF: dict[str, Callable[[Work], Found]] = {
    "gmm": gmm, "probe": probes, "umap": umap, "neighbours": neighbours, "traversal": traversal, "usage": usage,
}  # fmt: skip


def analyze(
    entries: Sequence[Entry],
    out: str | Path,
    *,
    settings: Settings | None = None,
    tick: Callable[[str], None] = lambda line: None,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Compares the entries as the settings ask, in the folder `out`, and returns what analysis.json holds:

    "tokenizers"  of each: path, shape of a latent, rows, where held-out rows are from, what made the cache
    "parts"       of each: "how" it was computed, "values" of each tokenizer, "pictures", "missing" (sentences)
    "settings", "versions", "machine", "seconds" (of each unit when it was computed), "paired"

    tick: gets a line on what is done now; say: one for each unit that is done. RunError, CacheError, CheckpointError,
    DataError or ImageError in a sentence where something cannot be used; ValueError for entries of one name, or none.
    """
    settings, out = Settings() if settings is None else settings, Path(out)
    names = [entry.name for entry in entries]
    if not names or len(set(names)) != len(names):
        raise ValueError(f"analyze: expected entries with names of their own, got {', '.join(names) or 'none'}")
    make_folder(out)
    for left in out.rglob(".writing-*"):  # of one that was killed
        left.unlink(missing_ok=True)
    began = time.perf_counter()
    subjects = []
    for entry in entries:
        tick(f"opening {entry.name}")
        subjects.append(open_subject(entry, settings, out, tick))
    if not settings.unpaired:
        check_pairs(subjects)
    store = Store(out, say)
    work = Work(subjects, settings, out, store, tick)
    parts = {name: PART_OF[name](work).told() for name in PARTS if name in settings.parts}
    found: dict[str, Any] = {
        "format": FORMAT,
        "tokenizers": {s.name: s.told for s in subjects},
        "classes": list(subjects[0].classes),
        "paired": not settings.unpaired,
        "settings": dataclasses.asdict(settings),
        "parts": parts,
        "versions": _versions(),
        "machine": describe(torch.device(settings.device)),
        "seconds": {name: round(spent, 3) for name, spent in store.seconds.items()},
        "seconds_here": round(time.perf_counter() - began, 1),
    }
    if store.kept:
        say(f"{store.kept} of {len(store.seconds)} results were there")
    if not work.why_no_curves:
        found["overview"] = figures.draw_overview(out / "report.png", {n: p["values"] for n, p in parts.items()})
    write_json(out / "analysis.json", found)
    write_report(out, found)
    return found


def _versions() -> dict[str, str]:
    told = {"maetok_fast": maetok_fast.__version__, "python": platform.python_version()}
    told |= {"torch": torch.__version__, "numpy": np.__version__}
    for name in ("sklearn", "matplotlib"):
        told[name] = probe(name).version or probe(name).state
    return told
