# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""Input checks of the models: one sentence that names what was given and what was expected. Shapes and dtypes only, so
they cost no synchronisation and `torch.compile` folds them into its guards."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["check_dtype", "check_labels", "check_tensor", "check_times"]


def check_tensor(name: str, x: Any, shape: tuple[int | str, ...]) -> None:
    """TypeError unless x is a tensor; ValueError unless it has this shape, where a string stands for any size >= 1."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor of shape {_show(shape)}, got {type(x).__name__}")
    if x.ndim != len(shape) or any(not isinstance(s, str) and n != s for n, s in zip(x.shape, shape)):
        raise ValueError(f"{name}: expected shape {_show(shape)}, got {tuple(x.shape)}")


def check_dtype(name: str, x: Tensor, weight: Tensor) -> None:
    """TypeError unless x is floating point and of the weights' dtype (any floating dtype under autocast)."""
    if not x.dtype.is_floating_point:
        raise TypeError(
            f"{name}: expected {weight.dtype}, got {x.dtype}; convert and scale the values to floating point"
        )
    if x.dtype != weight.dtype and not torch.is_autocast_enabled(x.device.type):
        raise TypeError(
            f"{name}: expected the model's dtype {weight.dtype}, got {x.dtype}; use .to({weight.dtype}) or autocast"
        )


def check_times(t: Any, batch: int) -> None:
    """t: floating (B,)."""
    check_tensor("t", t, (batch,))
    if not t.dtype.is_floating_point:
        raise TypeError(f"t: expected a floating dtype (times in [0, 1]), got {t.dtype}")


def check_labels(y: Any, batch: int) -> None:
    """y: integer (B,)."""
    check_tensor("y", y, (batch,))
    if y.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"y: expected torch.int64 class labels, got {y.dtype}")


def _show(shape: tuple[int | str, ...]) -> str:
    return "(" + ", ".join(str(s) for s in shape) + ("," if len(shape) == 1 else "") + ")"
