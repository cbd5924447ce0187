# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""What every stage's builder gives the loop, and what they share."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from maetok_fast.config import ConfigError
from maetok_fast.precision import Precision, resolve
from maetok_fast.training.checkpoints import Kept
from maetok_fast.training.configs import LoopConfig
from maetok_fast.training.loop import Batches

__all__ = ["Parts", "keyed", "load_start", "newest_of", "training_precision"]


class Parts(NamedTuple):
    """stage: a `Stage` that has a `precision`. batches(part, unreadable), fingerprint: as `Loop` takes them. flops():
    of a training step for one image. images: in an epoch."""

    stage: Any
    batches: Callable[[int, dict[str, str]], Batches]
    fingerprint: str
    flops: Callable[[], float]
    images: int


def training_precision(loop: LoopConfig, device: torch.device) -> Precision:
    precision = resolve(loop.precision, device)
    if precision.name == "fp16":
        raise ConfigError("loop.precision=fp16: its gradients would need loss scaling; use bf16, or auto")
    return precision


def newest_of(start: str, product: str) -> str:
    """A run's folder stands for its best checkpoint, or its newest. product: the folder in it."""
    folder = Path(start) / "checkpoints"
    if not folder.is_dir():
        return start
    there = Kept(folder)
    best = there.best().get("step")
    found = there.path(best) if best in there.steps() else there.newest()
    if found is None:
        raise ConfigError(f"start={start}: this run has no checkpoint yet")
    return str(found / product)


def load_start(model: nn.Module, state: Mapping[str, Tensor], start: str) -> None:
    """The weights of `start` into the model. ConfigError, with the first that does not fit."""
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        lines = str(error).splitlines()
        raise ConfigError(f"start={start} does not fit model: {' '.join(lines[1:2]).strip()}") from None


@contextlib.contextmanager
def keyed(key: str) -> Iterator[None]:
    """Weights that are missing are told with the run's own key for them."""
    try:
        yield
    except ValueError as error:  # TeacherError, CheckpointError
        raise ConfigError(f"{error} (in a run: {key})") from None
