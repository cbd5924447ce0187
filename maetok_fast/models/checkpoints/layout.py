# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""What a layout is: how the weights and the configuration of one kind of model are written down.

A `Layout` is data and two functions. `detect` reads every fact that the weights show from their keys, shapes and fixed
tables; config.json adds what they cannot show (theta, drop path, latent statistics), and where it contradicts the
weights that is an error: the two files do not belong together. `export` writes the configuration under the public
names. Both deal in names and numbers only, so a layout needs no model class and a model class names its layout.
`Facts` holds both files while they are compared.
"""

from __future__ import annotations

import logging
import math
import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor

__all__ = ["SAVE_ID", "CheckpointError", "Facts", "Layout", "grid_of_cosines", "held", "matches", "ratio", "shown"]

log = logging.getLogger("maetok_fast")

# written into both files of one save (`Pretrained.save_pretrained`)
SAVE_ID = "save_id"
# what huggingface_hub's mixin, the public dataclasses and we write besides the architecture
_COMMON_KEYS = frozenset(
    {
        "tags",
        "repo_url",
        "license",
        "model_type",
        "architectures",
        "torch_dtype",
        "dtype",
        "transformers_version",
        SAVE_ID,
    }
)


class CheckpointError(ValueError):
    """A checkpoint that cannot be used as it is; the message names the file, the keys and the way out."""


@dataclass(frozen=True)
class Layout:
    """How one kind of model is stored.

    name: of the kind, for messages. mark: a key that every such file has and by which it is known; what precedes it in
    a file is a wrapper's prefix. detect(facts) -> the fields of the configuration; export(config) -> config.json.
    known: the names that config.json may hold. tolerated: patterns of keys in public files that are not the model's.
    optional: patterns of the model's keys that a file may lack.
    """

    name: str
    mark: str
    detect: Callable[[Facts], dict[str, Any]]
    export: Callable[[Any], dict[str, Any]]
    known: frozenset[str] = frozenset()
    tolerated: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()

    def fields(
        self,
        state: Mapping[str, Tensor],
        public: Mapping[str, Any] | None,
        given: Mapping[str, Any],
        allow: Iterable[str],
        hints: Mapping[str, Any] | None = None,
    ) -> dict[str, Any]:
        """The configuration's fields: shown by `state`, said by config.json (`public`, None where there is none) or by
        the caller (`given`). What none of them says is assumed and, without a config.json, named in a warning.

        hints: without a config.json, what a training file's arguments say under the same names, of which most mean
        something else: taken for what weights do not show, and for nothing more.
        allow: "config.NAME" patterns of keys that may be unknown or contradict the weights. Raises CheckpointError.
        """
        known = {k: v for k, v in (hints or {}).items() if k in self.known} if public is None else {}
        facts = Facts(self, state, public, given, allow, known)
        fields = self.detect(facts)
        facts.finish(fields)
        return fields


class Facts:
    """The weights, config.json beside them, what the caller gave, and the contradictions met so far."""

    def __init__(
        self,
        layout: Layout,
        state: Mapping[str, Tensor],
        public: Mapping[str, Any] | None,
        given: Mapping[str, Any],
        allow: Iterable[str],
        hints: Mapping[str, Any] | None = None,
    ) -> None:
        self.what, self.state, self.public, self.given = layout.name, state, public or hints or {}, given
        self.allow = tuple(allow)
        self.configured = public is not None
        self.problems: list[str] = []
        self.assumed: list[str] = []
        self._unshown: set[str] = set()
        known = layout.known | _COMMON_KEYS
        # a leading underscore: diffusers' own (_class_name, _diffusers_version)
        unknown = sorted(k for k in self.public if k not in known and k[:1] != "_" and not self._allowed(k))
        if unknown:
            self.problems.append(f"unknown keys in config.json: {', '.join(unknown)}")

    def _allowed(self, key: str) -> bool:
        return matches(f"config.{key}", self.allow)

    # ---- what the weights show

    def has(self, key: str) -> bool:
        return key in self.state

    def shape(self, key: str, rank: int) -> tuple[int, ...]:
        """The shape of a key that every such checkpoint has."""
        if key not in self.state:
            raise CheckpointError(f"no {self.what} checkpoint: key {key!r} is missing; it holds {held(self.state)}")
        shape = tuple(self.state[key].shape)
        if len(shape) != rank or 0 in shape:
            raise CheckpointError(
                f"no {self.what} checkpoint: {key!r} has shape {shape}, expected {rank} positive sizes"
            )
        return shape

    def values(self, key: str, rank: int) -> Tensor | None:
        """A table of this rank in fp32; None where the file lacks it (or gives shapes only)."""
        table = self.state.get(key)
        if table is None or table.is_meta or table.ndim != rank or not table.is_floating_point():
            return None
        return table.float()

    def depth(self, prefix: str) -> int:
        """Number of blocks prefix.0, prefix.1, ...; any beyond a gap are left to the comparison of keys."""
        found = {m[1] for k in self.state if (m := re.match(re.escape(prefix) + r"\.(\d+)\.", k))}
        return next(i for i in range(len(found) + 1) if str(i) not in found)

    # ---- what they do not show

    def unshown(self, field: str, stated: Any, default: Any) -> Any:
        """A field that weights do not show: the given one, else the stated one (None: not stated), else `default`,
        which `finish` names."""
        self._unshown.add(field)
        if field in self.given:
            return self.given[field]
        if stated is not None:
            return stated
        self.assumed.append(f"{field}={default!r}")
        return default

    # ---- what config.json says

    def check(self, key: str, stored: Any, *, same: Callable[[Any], bool] | None = None) -> None:
        """config.json's `key`, if there, must say what the weights show."""
        if self.configured and key in self.public and not self._allowed(key):
            said = self.public[key]
            if not (same(said) if same else said == stored):
                self.problems.append(f"config.json says {key}={said!r}, the weights show {stored!r}")

    def number(self, key: str, integer: bool = False) -> Any:
        """A number of config.json, a float unless `integer`; None if absent."""
        value = self.public.get(key)
        if key not in self.public:
            return None
        if isinstance(value, bool) or not isinstance(value, int if integer else (int, float)):
            if not self.configured:
                return None
            raise CheckpointError(
                f"config.json: {key} must be {'an integer' if integer else 'a number'}, got {value!r}"
            )
        return value if integer else float(value)

    def flag(self, key: str) -> bool | None:
        value = self.public.get(key)
        if key in self.public and not isinstance(value, bool):
            if not self.configured:
                return None
            raise CheckpointError(f"config.json: {key} must be true or false, got {value!r}")
        return value

    def size(self, key: str) -> tuple[int, int] | None:
        """An int or [height, width] of config.json, None if absent."""
        value = self.public.get(key)
        if isinstance(value, int) and not isinstance(value, bool):
            return value, value
        if isinstance(value, (list, tuple)) and len(value) == 2 and all(type(v) is int for v in value):
            return value[0], value[1]
        if value is not None and self.configured:
            raise CheckpointError(f"config.json: {key} must be an integer or [height, width], got {value!r}")
        return None

    def grid(self, field: str, key: str, count: int, patch: int, table: tuple[int, int] | None) -> tuple[int, int]:
        """The size (height, width) of `count` = height / patch * width / patch positions, config.json's `key`: what a
        fixed table shows, else the given or stated one, else a square, which `finish` names."""
        if table is not None:
            size = table[0] * patch, table[1] * patch
        else:
            given = self.given.get(field)
            given = (given, given) if isinstance(given, int) else given
            size = given or self.size(key) or (0, 0)
            if not _fits(size, count, patch):
                side = math.isqrt(count)
                if given is not None:
                    raise CheckpointError(f"{count} positions of patch {patch} make no {field} {shown(given)}")
                if side * side != count:
                    raise CheckpointError(
                        f"{count} positions are no square; pass {field}=(height, width), or state {key} in config.json"
                    )
                size = side * patch, side * patch
                self.assumed.append(f"{field}={shown(size)!r}")
            self._unshown.add(field)
        self.check(key, shown(size), same=lambda said: self.size(key) == size)
        return size

    def finish(self, fields: Mapping[str, Any]) -> None:
        """Raises what was met; warns of what was assumed where there is no config.json at all."""
        for name, value in self.given.items():
            if name not in self._unshown and fields[name] != value:
                raise CheckpointError(f"{name}={value!r} was given, but the weights show {fields[name]!r}")
        if self.problems:
            raise CheckpointError("\n  ".join([*self.problems, "pass allow=['config.NAME'] to let the weights win"]))
        if self.assumed and not self.configured:
            log.warning(
                "a %s checkpoint without config.json: assumed %s, which its weights do not show; if this is wrong, put "
                "config.json beside it or pass the fields to from_pretrained",
                self.what,
                ", ".join(self.assumed),
            )


def matches(key: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(key, p) for p in patterns)


def held(content: Any, limit: int = 4) -> str:
    """What a file holds, in a few words: how many keys, the prefix that all share, some of them, and nested entries."""
    if not isinstance(content, Mapping):
        return f"a {type(content).__name__}"
    nested = {str(k): v for k, v in content.items() if isinstance(v, Mapping)}
    keys = [str(k) for k, v in content.items() if not isinstance(v, Mapping)]
    parts = []
    if keys or not nested:
        common = os.path.commonprefix(keys)  # noqa: RUF071 (of keys, not of paths)
        common = common[: common.rfind(".") + 1] if len(keys) > 1 else ""
        under = f", all under {common!r}" if common else ""
        some = ", ".join(keys[:limit]) + (", ..." if len(keys) > limit else "")
        parts.append(f"{len(keys)} key{'' if len(keys) == 1 else 's'}{under}" + (f" ({some})" if keys else ""))
    for name, value in list(nested.items())[:limit]:
        parts.append(f"{name!r} with {held(value, 3)}")
    if len(nested) > limit:
        parts.append(f"{len(nested) - limit} more entries")
    return "; ".join(parts)


def ratio(dim: int, hidden: int, stated: Iterable[Any], width: Callable[[int], int] = lambda hidden: hidden) -> float:
    """The MLP ratio with width(int(dim * ratio)) == hidden: a stated one that gives it, else the simplest."""
    wide = next(w for w in range(hidden, 2 * hidden + 3) if width(w) == hidden)
    numbers = [r for r in stated if isinstance(r, (int, float)) and not isinstance(r, bool) and 0 < r <= wide + 1]
    return next(float(r) for r in (*numbers, 4.0, wide / dim, (wide + 0.5) / dim) if width(int(dim * r)) == hidden)


def grid_of_cosines(rows: Tensor, columns: Tensor) -> tuple[int, int] | None:
    """The grid (rows, columns) whose row-major positions have these cosines, (N,) each; None if there is none.

    Fixed position tables hold the position itself as the angle of their first frequency. 0.01 is twice what storage in
    bf16 costs.
    """
    count = len(rows)
    n = torch.arange(count)
    for width in range(1, count + 1):
        if count % width == 0:
            expected = torch.stack([n // width, n % width]).float().cos()
            if (torch.stack([rows, columns]) - expected).abs().max() <= 0.01:
                return count // width, width
    return None


def shown(size: Any) -> Any:
    """A square (side, side) as the integer `side`."""
    return size[0] if isinstance(size, tuple) and size[0] == size[-1] else size


def _fits(size: Any, count: int, patch: int) -> bool:
    return (
        isinstance(size, (tuple, list))
        and len(size) == 2
        and all(isinstance(n, int) and n > 0 and n % patch == 0 for n in size)
        and (size[0] // patch) * (size[1] // patch) == count
    )
