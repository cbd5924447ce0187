# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""The public layouts: from a checkpoint's shapes and its config.json to our configuration, and back.

One `Layout` per model class, in layout_maetok.py and layout_generators.py. `detect` reads every fact that the weights
show from their keys and shapes; config.json adds what they cannot show (theta, drop path, latent statistics), and where
it contradicts the weights that is an error: the two files do not belong together. `export` writes the configuration
under the public names. `Facts` holds both files while they are compared.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from maetok_fast.models.checkpoints import CheckpointError

__all__ = ["HUB_KEYS", "Facts", "Layout", "grid_or_square", "layout_of", "ratio", "shown", "unseen"]

log = logging.getLogger("maetok_fast")

Shapes = Mapping[str, tuple[int, ...]]
Public = Mapping[str, Any]

# what huggingface_hub's mixin and the public dataclasses write besides the architecture
HUB_KEYS = {
    "tags",
    "repo_url",
    "license",
    "model_type",
    "architectures",
    "torch_dtype",
    "dtype",
    "transformers_version",
}


@dataclass(frozen=True)
class Layout:
    """How one model class is stored.

    model: the class. tolerated: patterns of keys in public files that are not the model's. optional: patterns of keys
    that a file may lack. detect(shapes, public, given, allow) -> config; export(config) -> public config.json.
    """

    model: type
    tolerated: tuple[str, ...]
    optional: tuple[str, ...]
    detect: Callable[[Shapes, Public | None, Mapping[str, Any], Iterable[str]], Any]
    export: Callable[[Any], dict[str, Any]]


def layout_of(model: type) -> Layout:
    """The layout of a model class (or a subclass of one)."""
    from maetok_fast.models.layout_generators import LIGHTNINGDIT, SIT
    from maetok_fast.models.layout_maetok import MAETOK

    for layout in (MAETOK, SIT, LIGHTNINGDIT):
        if issubclass(model, layout.model):
            return layout
    raise TypeError(f"{model.__name__} has no checkpoint layout; one exists for MAETok, SiT and LightningDiT")


class Facts:
    """Shapes by key, config.json beside them, and the contradictions met so far."""

    def __init__(self, shapes: Shapes, public: Public | None, known: set[str], allow: Iterable[str], what: str) -> None:
        self.shapes, self.public, self.allow, self.what = shapes, public or {}, tuple(allow), what
        self.problems: list[str] = []
        self.assumed: list[str] = []
        self.configured = public is not None
        unknown = sorted(k for k in self.public if k not in known and not self._allowed(k))
        if unknown:
            self.problems.append(f"unknown keys in config.json: {', '.join(unknown)}")

    def _allowed(self, key: str) -> bool:
        return any(fnmatchcase(f"config.{key}", p) for p in self.allow)

    def shape(self, key: str, rank: int) -> tuple[int, ...]:
        """The shape of a key that every such checkpoint has."""
        if key not in self.shapes:
            raise CheckpointError(f"no {self.what} checkpoint: key {key!r} is missing")
        shape = self.shapes[key]
        if len(shape) != rank or 0 in shape:
            raise CheckpointError(
                f"no {self.what} checkpoint: {key!r} has shape {shape}, expected {rank} positive sizes"
            )
        return shape

    def depth(self, prefix: str) -> int:
        """Number of blocks prefix.0, prefix.1, ...; any beyond a gap are left to the comparison of keys."""
        found = {m[1] for k in self.shapes if (m := re.match(re.escape(prefix) + r"\.(\d+)\.", k))}
        return next(i for i in range(len(found) + 1) if str(i) not in found)

    def check(self, key: str, stored: Any, *, same: Callable[[Any], bool] | None = None) -> None:
        """config.json's `key`, if there, must say what the weights show."""
        if key in self.public and not self._allowed(key):
            said = self.public[key]
            if not (same(said) if same else said == stored):
                self.problems.append(f"config.json says {key}={said!r}, the weights show {stored!r}")

    def assume(self, name: str, value: Any) -> Any:
        """A field that nothing states; `finish` warns of it where there is no config.json at all."""
        self.assumed.append(f"{name}={value!r}")
        return value

    def number(self, key: str, default: float, integer: bool = False) -> Any:
        value = self.public.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int if integer else (int, float)):
            raise CheckpointError(
                f"config.json: {key} must be {'an integer' if integer else 'a number'}, got {value!r}"
            )
        return value

    def flag(self, key: str, default: bool) -> bool:
        value = self.public.get(key, default)
        if not isinstance(value, bool):
            raise CheckpointError(f"config.json: {key} must be true or false, got {value!r}")
        return value

    def size(self, key: str) -> tuple[int, int] | None:
        """An int or [height, width] of config.json, None if absent."""
        value = self.public.get(key)
        if isinstance(value, int) and not isinstance(value, bool):
            return value, value
        if isinstance(value, list) and len(value) == 2 and all(type(v) is int for v in value):
            return value[0], value[1]
        if value is not None:
            raise CheckpointError(f"config.json: {key} must be an integer or [height, width], got {value!r}")
        return None

    def finish(self) -> None:
        if self.problems:
            raise CheckpointError("\n  ".join([*self.problems, "pass allow=['config.NAME'] to let the weights win"]))
        if self.assumed and not self.configured:
            log.warning(
                "a %s checkpoint without config.json: assumed %s, which its weights do not show; if this is wrong, put "
                "config.json beside it or pass the fields to from_pretrained",
                self.what,
                ", ".join(self.assumed),
            )


def ratio(dim: int, hidden: int, stated: Iterable[Any], width: Callable[[int], int] = lambda hidden: hidden) -> float:
    """The MLP ratio with width(int(dim * ratio)) == hidden: a stated one that gives it, else the simplest."""
    wide = next(w for w in range(hidden, 2 * hidden + 3) if width(w) == hidden)
    numbers = [r for r in stated if isinstance(r, (int, float)) and not isinstance(r, bool) and 0 < r <= wide + 1]
    return next(float(r) for r in (*numbers, 4.0, wide / dim, (wide + 0.5) / dim) if width(int(dim * r)) == hidden)


def grid_or_square(count: int, stated: tuple[int, int] | None, what: str) -> tuple[int, int]:
    """The grid of `count` tokens: the stated one if it fits, else a square."""
    if stated is not None and stated[0] * stated[1] == count:
        return stated
    side = math.isqrt(count)
    if side * side != count:
        raise CheckpointError(
            f"{what}: {count} positions are no square; config.json must state the size as [height, width]"
        )
    return side, side


def shown(size: tuple[int, int]) -> int | tuple[int, int]:
    return size[0] if size[0] == size[1] else size


def unseen(given: Mapping[str, Any], names: Iterable[str], fields: Mapping[str, Any]) -> dict[str, Any]:
    """The given fields that weights cannot show. A given field that they do show must agree with them."""
    for name, value in given.items():
        if name not in names and fields[name] != value:
            raise CheckpointError(f"{name}={value!r} was given, but the weights show {fields[name]!r}")
    return {k: v for k, v in given.items() if k in names}
