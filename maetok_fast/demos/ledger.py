# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""Which parts of a demo are done, and what they took: parts.json, written whole whenever a part begins or ends."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from maetok_fast.pipeline import RunError
from maetok_fast.pipeline.run import write_json

__all__ = ["FORMAT", "Ledger"]

FORMAT = 1  # of parts.json and demo.json


class Ledger:
    """parts.json: what was asked for, and for each part the seconds of all its starts and whether it is done. A start
    that was killed (and not stopped) has no time; `lost` counts those. RunError where it is of another demo."""

    def __init__(self, path: Path, asked: dict[str, Any]) -> None:
        self.path, self.asked = path, asked
        self.parts: dict[str, dict[str, Any]] = {}
        if not path.exists():
            return
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            before, self.parts = dict(found["asked"]), dict(found["parts"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise RunError(f"{path}: is not the record of a demo ({error}); give another --out") from None
        differs = [key for key in asked if before.get(key) != asked[key]]
        if differs:
            key = differs[0]
            raise RunError(
                f"{path.parent} holds another demo ({key}: {before.get(key)} there, {asked[key]} asked for); give "
                "another --out, or remove it"
            )

    def done(self, name: str) -> bool:
        return bool(self.parts.get(name, {}).get("done"))

    def seconds(self, name: str) -> float:
        return float(self.parts.get(name, {}).get("seconds", 0.0))

    def lost(self) -> int:
        return sum(part["starts"] - part["ends"] for part in self.parts.values() if part["done"])

    @contextlib.contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """A start of a part: done once this is left without an error."""
        part = self.parts.setdefault(name, {"seconds": 0.0, "starts": 0, "ends": 0, "done": False})
        part["starts"] += 1
        part["done"] = False
        self._write()
        began = time.perf_counter()
        try:
            yield
            part["done"] = True
        finally:
            part["seconds"] = round(part["seconds"] + time.perf_counter() - began, 2)
            part["ends"] += 1
            self._write()

    def _write(self) -> None:
        write_json(self.path, {"format": FORMAT, "asked": self.asked, "parts": self.parts})
