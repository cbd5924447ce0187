# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""Which of the dictionaries in a file are this model's weights, and under which prefix.

    {"model": {"module.quant_conv.weight": ...}, "state_dict": {"ema": {...}}, "optimizer": ..., "steps": ...}
      │ every dictionary, at any depth up to 3, that holds the layout's mark behind nothing but wrappers' words
      │ averaged by its name (ema, state_dict_ema, `ema_model.` ...) or raw; `prefer` chooses, usual names first
      ▼ its keys without the prefix, every value a tensor

Only wrappers' words are removed, and only where the mark shows them: a model whose own keys begin with `model.` keeps
them.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from maetok_fast.models.checkpoints.layout import CheckpointError, held

__all__ = ["pick"]

log = logging.getLogger("maetok_fast")

# DistributedDataParallel and AveragedModel, Lightning and trainers' own modules, ema-pytorch; torch.compile's
# `_orig_mod.` may stand anywhere in a key and is removed before
_WRAPPERS = frozenset({"module", "model", "net", "ema_model", "model_ema"})
# what AveragedModel and ema-pytorch keep beside the weights
_COUNTERS = frozenset({"n_averaged", "initted", "step"})
_AVERAGED = re.compile(r"(?:^|[^A-Za-z])(?:ema|swa|avg|averaged?)(?:[^A-Za-z]|$)|EMA|Ema")
_USUAL = (
    "ema",
    "model_ema",
    "ema_model",
    "state_dict_ema",
    "ema_state_dict",
    "model_ema_state_dict",
    "ema_model_state_dict",
    "params_ema",
    "model",
    "state_dict",
    "model_state_dict",
)
_DEPTH = 3


@dataclass(frozen=True)
class _Copy:
    """One set of the weights: the dictionary, the names of the entries that lead to it, what its keys begin with."""

    state: Mapping[Any, Any]
    names: tuple[str, ...]
    prefix: str

    @property
    def words(self) -> list[str]:
        return [*self.names, *self.prefix.split(".")[:-1]]

    @property
    def averaged(self) -> bool:
        return any(_AVERAGED.search(word) for word in self.words)

    @property
    def rank(self) -> int:
        return min((_USUAL.index(word) for word in self.words if word in _USUAL), default=len(_USUAL))

    def __str__(self) -> str:
        parts = ".".join(self.names), f"{self.prefix}*" if self.prefix else ""
        return repr(" / ".join(part for part in parts if part))


def pick(content: Any, name: str, mark: str, prefer: str, where: Any) -> dict[str, Tensor]:
    """{key: tensor} of the copy that `prefer` ("ema" or "model") asks for, and a warning where only the other is there.

    content: what a file holds. name, mark: of the layout. where: the file, for messages. Raises CheckpointError.
    """
    copies = list(_copies(content, mark, ())) if isinstance(content, Mapping) else []
    if not copies:
        raise CheckpointError(f"{where}: no {name} checkpoint: key {mark!r} is missing; it holds {held(content)}")
    wanted = prefer == "ema"
    pool = sorted((c for c in copies if c.averaged == wanted), key=lambda c: c.rank)
    pool = pool or sorted(copies, key=lambda c: c.rank)
    copy = pool[0]
    if len(pool) > 1 and pool[1].rank == copy.rank:
        raise CheckpointError(
            f"{where}: {name} weights are there twice, as {copy} and {pool[1]}; save the ones you mean by themselves"
        )
    # a dictionary of nothing but weights is what it is
    if copy.averaged != wanted and (copy.names or copy.averaged):
        kinds = ("averaged", "raw") if wanted else ("raw", "averaged")
        log.warning(
            "%s: no %s weights under a usual name ('ema', 'state_dict_ema', 'model', ...); took the %s ones, %s",
            where,
            *kinds,
            copy,
        )
    return _stripped(copy, [c.prefix for c in copies if c.state is copy.state], where)


def _copies(content: Mapping[Any, Any], mark: str, names: tuple[str, ...]) -> Iterator[_Copy]:
    for key, value in content.items():
        if isinstance(value, Mapping):
            # an optimizer may keep its moments under the weights' names
            if len(names) < _DEPTH and not str(key).startswith("opt"):
                yield from _copies(value, mark, (*names, str(key)))
        elif isinstance(value, Tensor) and isinstance(key, str):
            plain = key.replace("_orig_mod.", "")
            prefix = plain.removesuffix(mark)
            if plain.endswith(mark) and (prefix == "" or _wraps(prefix)):
                yield _Copy(content, names, prefix)


def _wraps(prefix: str) -> bool:
    return prefix.endswith(".") and _WRAPPERS.issuperset(prefix[:-1].split("."))


def _stripped(copy: _Copy, prefixes: list[str], where: Any) -> dict[str, Tensor]:
    """The copy's keys without its prefix; those of other copies in the same dictionary left out, all others kept."""
    out: dict[str, Tensor] = {}
    for key, value in copy.state.items():
        if not isinstance(key, str):
            raise CheckpointError(f"{where}: key {key!r} is a {type(key).__name__}, expected a string")
        name = key.replace("_orig_mod.", "")
        owner = max((p for p in prefixes if name.startswith(p)), key=len, default=None)
        if (owner is None and name in _COUNTERS) or owner not in (None, copy.prefix):
            continue
        if not isinstance(value, Tensor):
            raise CheckpointError(f"{where}: key {key!r} holds a {type(value).__name__}, expected a tensor")
        name = name[len(owner or "") :]
        if name in out:
            raise CheckpointError(f"{where}: {key!r} is there twice once wrappers' prefixes are removed")
        out[name] = value
    return out
