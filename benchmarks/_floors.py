# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""The gate's floors: what floors.json holds, how it is made from noise, and which base each op is held against."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks import _gate as gate
from benchmarks._base import Unusable

FLOORS = Path(__file__).with_name("floors.json")
Results = dict[str, gate.Measured]


def load_floors(path: Path = FLOORS) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise Unusable(f"{path.name} is not there: write it with python benchmarks/compare.py --write") from None


def make_floors(commit: str, rounds: Sequence[Results]) -> dict[str, Any]:
    """The content of floors.json from several processes that compared a build with itself. floors: base's time over
    head's must stay above; left_out: pairs too noisy to see 10 %, with their noise."""
    floors, left_out = {}, {}
    for key in rounds[0]:
        logs = [math.log(found[key].ratio) for found in rounds if key in found]
        noise = max(
            math.sqrt(sum(x * x for x in logs) / len(logs)), statistics.median(found[key].error for found in rounds)
        )
        limit = gate.limit_of(noise)
        if limit is None:
            left_out[key] = round(noise, 4)
        else:
            floors[key] = round(1 / limit, 4)
    return {"schema": 1, "base": commit, "floors": floors, "left_out": left_out}


def with_op(stored: dict[str, Any], op: str, found: dict[str, Any], in_base: bool) -> dict[str, Any]:
    """The stored floors with one op's replaced by `found` (of make_floors); every other floor and the base stay. An op
    that the stored base lacks, or has with another signature, is held against `found`'s commit, noted under "later"."""
    out = dict(stored)
    for part in ("floors", "left_out"):
        kept = {key: value for key, value in stored[part].items() if key.split(" | ")[0] != op}
        out[part] = dict(sorted({**kept, **found[part]}.items()))
    later = {name: commit for name, commit in stored.get("later", {}).items() if name != op}
    later |= {} if in_base else {op: found["base"]}
    return {key: value for key, value in out.items() if key != "later"} | ({"later": later} if later else {})


def bases(floors: dict[str, Any], names: Iterable[str]) -> dict[str, list[str]]:
    """Base commit -> the ops that are held against it."""
    later = floors.get("later", {})
    out: dict[str, list[str]] = {floors["base"]: [name for name in names if name not in later]}
    for name in names:
        if name in later:
            out.setdefault(later[name], []).append(name)
    return out
