# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""What is computed already: a JSON file for each unit of work, with the key that it was computed for.

    out/parts/<part>/<tokenizer>[/<unit>].json    {"key": ..., "seconds": ..., "result": ...}

A unit whose file has the key that is asked for is not computed again; any other key, or a file that is missing or
damaged, and it is: results of other settings, rows or weights never get into a table.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from maetok_fast.pipeline.run import make_folder, write_json

__all__ = ["Store"]

FORMAT = 1  # of the files; a change of what a part computes is another one


@dataclass
class Store:
    """Of the folder `out`. say: gets a line for each unit that is computed. seconds: what each took when it was,
    by name. kept: how many were there."""

    out: Path
    say: Callable[[str], None] = lambda line: None
    seconds: dict[str, float] = field(default_factory=dict)
    kept: int = 0

    def unit(
        self,
        where: Sequence[str],
        key: dict[str, Any],
        compute: Callable[[], dict[str, Any]],
        files: Sequence[Path] = (),
    ) -> dict[str, Any]:
        """The result of the unit `where` (part, tokenizer, ...), as JSON gives it back. files: what it writes beside; a
        unit that lacks one is computed again."""
        name, path = "/".join(where), self.out.joinpath("parts", *where[:-1]) / f"{where[-1]}.json"
        key = _plain({"format": FORMAT, **key})
        there = _read(path)
        if there is not None and there["key"] == key and all(file.exists() for file in files):
            self.seconds[name] = float(there["seconds"])
            self.kept += 1
            return dict(there["result"])
        began = time.perf_counter()
        result = _plain(compute())
        spent = time.perf_counter() - began
        make_folder(path.parent)
        write_json(path, {"key": key, "seconds": round(spent, 3), "result": result})
        self.seconds[name] = spent
        self.say(f"{name}: {spent:.1f} s")
        return dict(result)


def _plain(content: dict[str, Any]) -> dict[str, Any]:
    """As JSON gives it back: what was there and what is new look alike."""
    return dict(json.loads(json.dumps(content)))


def _read(path: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return found if {"key", "seconds", "result"} <= found.keys() else None
    except (OSError, ValueError, AttributeError):
        return None
