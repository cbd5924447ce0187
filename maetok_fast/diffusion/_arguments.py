# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""Checks of what a caller and a model hand to the samplers: one sentence with the argument's name and what came."""

from __future__ import annotations

import math
import operator
from numbers import Real
from typing import Any

import torch
from torch import Tensor

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)  # what torch's arithmetic has kernels for


def integer(name: str, value: Any, least: int) -> int:
    """`value` as an int of at least `least`; TypeError for what is no integer."""
    try:
        if isinstance(value, bool):
            raise TypeError
        value = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an integer, got {value!r}") from None
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")
    return value


def number(name: str, value: Any) -> float:
    """`value` as a finite float; TypeError for what is no real number, ValueError for NaN and infinity."""
    if not isinstance(value, Real) or isinstance(value, bool):
        raise TypeError(f"{name} must be a number, got {value!r}")
    if not math.isfinite(value):
        raise ValueError(f"{name} must be finite, got {value}")
    return float(value)


def positive(name: str, value: Any) -> float:
    """`value` as a finite float > 0."""
    if number(name, value) <= 0:
        raise ValueError(f"{name} must be > 0, got {value}")
    return float(value)


def model(name: str, value: Any) -> None:
    """A callable in eval mode."""
    if not callable(value):
        raise TypeError(f"{name} must be a callable (x, t, y) -> velocity, got {type(value).__name__}")
    if getattr(value, "training", False):
        raise ValueError(f"{name} is in training mode, which drops labels at random; call {name}.eval() first")


def noise(x: Any) -> None:
    """A floating-point tensor (B, L, C) or (B, C, H, W) with no size 0."""
    if not isinstance(x, Tensor) or x.dtype not in FLOATS:
        got = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"noise must be a floating-point tensor, got {got}")
    if x.ndim not in (3, 4) or x.numel() == 0:
        raise ValueError(f"noise must be (B, L, C) or (B, C, H, W) with no size 0, got {tuple(x.shape)}")


def state_dtype(dtype: Any, method: str) -> None:
    """A floating dtype that the method can keep its state in."""
    if dtype not in FLOATS:
        raise TypeError(f"state_dtype must be torch.float64, float32, bfloat16 or float16, got {dtype!r}")
    if method == "dopri5" and dtype.itemsize < 4:
        raise ValueError(f"dopri5 estimates errors that {dtype} cannot hold: use state_dtype=torch.float64 or float32")


def labels(y: Any, x: Tensor) -> None:
    """int64 labels (B,) beside x (B, ...), on its device."""
    if not isinstance(y, Tensor):
        raise TypeError(f"y must be a tensor of int64 labels or None, got {type(y).__name__}")
    if y.shape != (len(x),) or y.dtype != torch.int64:
        raise ValueError(f"y must be int64 labels of shape ({len(x)},), one per sample; got {y.dtype} {tuple(y.shape)}")
    if y.device != x.device:
        raise ValueError(f"y and noise must be on one device, got {y.device} and {x.device}; use y.to(noise.device)")


def generator(value: Any, x: Tensor) -> None:
    """None, a callable, or a torch.Generator of x's kind of device."""
    if value is None or (callable(value) and not isinstance(value, torch.Generator)):
        return
    if not isinstance(value, torch.Generator):
        raise TypeError(f"generator must be a torch.Generator, a callable or None, got {type(value).__name__}")
    if value.device.type != x.device.type:
        raise ValueError(
            f"generator draws on {value.device} and noise is on {x.device}: "
            f"make it with torch.Generator({x.device.type!r})"
        )


def drawn(noise: Any, x: Tensor) -> Tensor:
    """What a callable `generator` returned for x: of its shape, dtype and device."""
    if not isinstance(noise, Tensor) or (noise.shape, noise.dtype, noise.device) != (x.shape, x.dtype, x.device):
        got = f"{noise.dtype} {tuple(noise.shape)}" if isinstance(noise, Tensor) else type(noise).__name__
        raise ValueError(f"generator must return noise like x, {x.dtype} {tuple(x.shape)} on {x.device}; got {got}")
    return noise


def velocity(v: Any, x: Tensor, owner: Any) -> Tensor:
    """What `owner` returned for x, if it can be a velocity of it: floating-point, of x's shape and device.

    Broadcasting would take any of these silently; values are not read, which would synchronise at every step.
    """
    name = getattr(owner, "__name__", type(owner).__name__)
    if not isinstance(v, Tensor):
        raise TypeError(f"{name} must return a velocity tensor of shape {tuple(x.shape)}, got {type(v).__name__}")
    if v.shape != x.shape:
        raise ValueError(f"{name} must return a velocity of x's shape {tuple(x.shape)}, got {tuple(v.shape)}")
    if v.dtype not in FLOATS:
        raise TypeError(f"{name} must return a floating-point velocity, got {v.dtype}")
    if v.device != x.device:
        raise ValueError(f"{name} must return a velocity on x's device {x.device}, got {v.device}")
    return v
