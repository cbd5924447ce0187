# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""Checks of arguments and configurations: one sentence that names what was given and what was expected.

Of tensors shapes and dtypes only, but for `check_label_range`, so they cost no synchronisation and `torch.compile`
folds them into its guards. A check that reads values is left out where there are none to read (`readable`).
"""

from __future__ import annotations

import math
import numbers
import operator
from typing import Any

import torch
from torch import Tensor

from maetok_fast.kernels._dispatch import autocasts

__all__ = [
    "check_dtype",
    "check_images",
    "check_integers",
    "check_label_range",
    "check_labels",
    "check_number",
    "check_positive",
    "check_ratio",
    "check_tensor",
    "check_times",
    "height_width",
    "readable",
]

_CAST = (torch.float32, torch.bfloat16, torch.float16)


def check_tensor(name: str, x: Any, shape: tuple[int | str, ...]) -> None:
    """TypeError unless x is a tensor; ValueError unless it has this shape, where a string stands for any size >= 1."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor of shape {_show(shape)}, got {type(x).__name__}")
    if x.ndim != len(shape) or any(n < 1 if isinstance(s, str) else n != s for n, s in zip(x.shape, shape)):
        empty = ", no size 0" if 0 in x.shape else ""
        raise ValueError(f"{name}: expected shape {_show(shape)}{empty}, got {tuple(x.shape)}")


def check_dtype(name: str, x: Tensor, weight: Tensor) -> None:
    """TypeError unless x is floating point and of the weights' dtype (fp32, bf16 or fp16 under autocast, which leaves
    fp64 as it is)."""
    if not x.dtype.is_floating_point:
        raise TypeError(
            f"{name}: expected {weight.dtype}, got {x.dtype}; convert and scale the values to floating point"
        )
    casts = x.dtype in _CAST and weight.dtype in _CAST and autocasts(x.device.type)
    if x.dtype != weight.dtype and not casts:
        raise TypeError(
            f"{name}: expected the model's dtype {weight.dtype}, got {x.dtype}; use .to({weight.dtype})"
            + (" or autocast" if x.dtype in _CAST else "")
        )


def check_images(images: Tensor, least: int, owner: str) -> None:
    """TypeError or ValueError unless images are (B, 3, H, W), floating point, and of at least so many pixels a side."""
    check_tensor("images", images, ("B", 3, "H", "W"))
    if not images.is_floating_point():
        raise TypeError(f"images: expected floating point in [-1, 1], got {images.dtype}; use images / 127.5 - 1")
    if min(images.shape[2:]) < least:
        height, width = images.shape[2:]
        raise ValueError(f"{owner}: images must be at least {least} x {least} pixels, got {height} x {width}")


def check_integers(owner: str, **values: Any) -> None:
    """TypeError unless each of a configuration's values is an int."""
    for name, value in values.items():
        if not isinstance(value, int) or isinstance(value, bool):
            raise TypeError(f"{owner}: {name} must be an integer, got {value!r}")


def check_positive(owner: str, **values: Any) -> None:
    """TypeError unless each value is an int, ValueError unless it is at least 1: before anything divides by it."""
    check_integers(owner, **values)
    for name, value in values.items():
        if value < 1:
            raise ValueError(f"{owner}: {name} must be at least 1, got {value}")


def check_number(owner: str, name: str, value: Any, low: float, high: float = math.inf, *, above: bool = False) -> None:
    """TypeError unless value is a real number, ValueError unless low <= value < high (low < value with `above`).

    NaN lies in no range, and infinity in none either: `high` is excluded.
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{owner}: {name} must be a number, got {value!r}")
    if not low <= float(value) < high or (above and value == low):
        floor = "" if low == -math.inf else f" {'>' if above else '>='} {low:g}"
        ceiling = "" if high == math.inf else f" and < {high:g}"
        raise ValueError(f"{owner}: {name} must be finite{floor and ','}{floor}{ceiling}, got {value!r}")


def check_ratio(owner: str, dim: int, mlp_ratio: Any) -> None:
    """ValueError unless dim * mlp_ratio is an MLP width of at least 1."""
    if isinstance(mlp_ratio, bool) or not isinstance(mlp_ratio, (int, float)) or not 1 <= dim * mlp_ratio < math.inf:
        raise ValueError(f"{owner}: mlp_ratio must be a number with dim * mlp_ratio >= 1, got {mlp_ratio!r}")


def height_width(name: str, size: Any) -> tuple[int, int]:
    """(height, width) of an integer, for a square, or of a pair of integers; ValueError for anything else."""
    pair = size if isinstance(size, (tuple, list)) else (size, size)
    try:
        height, width = (v if isinstance(v, int) else operator.index(v) for v in pair)
    except (TypeError, ValueError):
        raise ValueError(f"{name}: expected an integer or (height, width) in pixels, got {size!r}") from None
    return height, width


def check_times(t: Any, batch: int | str) -> None:
    """t: floating (B,); a string allows any B >= 1."""
    check_tensor("t", t, (batch,))
    if not t.dtype.is_floating_point:
        raise TypeError(f"t: expected a floating dtype (times in [0, 1]), got {t.dtype}")


def check_labels(y: Any, batch: int, config: Any) -> None:
    """y: integer (B,), on the CPU in the range of the model's classes (elsewhere reading values would synchronise)."""
    check_tensor("y", y, (batch,))
    if y.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"y: expected torch.int64 class labels, got {y.dtype}")
    if y.device.type == "cpu":
        check_label_range(y, config)


def check_label_range(y: Tensor, config: Any) -> None:
    """ValueError unless labels y (B,), B >= 1, lie in 0 .. config.num_classes (less one without a null class).

    Reads the values, so on a GPU it waits for them; where there are none to read it passes. A config that names no
    classes allows all.
    """
    classes = getattr(config, "num_classes", None)
    if classes is None or not readable(y):
        return
    last = classes if getattr(config, "label_dropout", 0.0) > 0 else classes - 1
    low, high = (int(v) for v in torch.stack(torch.aminmax(y)).tolist())
    if low < 0 or high > last:
        null = f" ({last} = no class)" if last == classes else ", the model has no null class"
        raise ValueError(f"y: class labels must be 0 .. {last}{null}; got {low if low < 0 else high}")


def readable(x: Tensor) -> bool:
    """Whether x's values can be read here: not under the compiler, a trace, torch.func (vmap, grad, jvp), or a fake
    mode, and not of a meta tensor or a subclass (fake, functional or distributed tensors)."""
    if torch.compiler.is_compiling() or type(x) not in (Tensor, torch.nn.Parameter) or x.device.type == "meta":
        return False
    keys = torch._C._TorchDispatchModeKey
    return torch._C._functorch.peek_interpreter_stack() is None and all(
        torch._C._get_dispatch_mode(key) is None for key in (keys.FAKE, keys.PROXY)
    )


def _show(shape: tuple[int | str, ...]) -> str:
    return "(" + ", ".join(str(s) for s in shape) + ("," if len(shape) == 1 else "") + ")"
