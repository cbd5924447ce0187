# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""Triton where it is installed, and a stand-in for its decorators where it is not (macOS, Windows, aarch64 wheels).

Op files write `from ._triton import tl, triton` and decorate their kernels with `@triton.jit` unconditionally: nothing
compiles before the first launch, and a launch without Triton cannot happen because `why_no_triton` says no first.
With `TRITON_INTERPRET=1` in the environment kernels run on the CPU in Triton's interpreter, repaired by `_interpreter`.
"""

from __future__ import annotations

import functools
import os
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

__all__ = ["INTERPRET", "add_up", "tl", "triton", "why_no_triton"]

INTERPRET = os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")


class _Missing:
    """Swallows decorators and annotations (`triton.jit`, `tl.constexpr`) so that op files import without Triton."""

    def __getattr__(self, name: str) -> _Missing:
        return self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return args[0] if len(args) == 1 and callable(args[0]) and not kwargs else self


def _import() -> tuple[Any, Any, str | None]:
    """(triton, triton.language, why they are missing or None)."""
    try:
        import triton
        import triton.language
    except ModuleNotFoundError as error:
        if error.name == "triton":
            return _Missing(), _Missing(), f"Triton is not installed ({error}): pip install triton"
        return _Missing(), _Missing(), f"Triton does not import ({error})"
    except Exception as error:  # a library that does not load, a broken install: whatever its import says
        return _Missing(), _Missing(), f"Triton does not import ({type(error).__name__}: {error})"
    return triton, triton.language, None


if TYPE_CHECKING:
    import triton
    import triton.language as tl

    _IMPORT_ERROR: str | None
else:
    triton, tl, _IMPORT_ERROR = _import()

if INTERPRET and _IMPORT_ERROR is None:
    from . import _interpreter

    _interpreter.repair()


@functools.cache
def why_no_triton(device: str) -> str | None:
    """Why Triton kernels cannot run on tensors of this device type, or None."""
    if _IMPORT_ERROR is not None:
        return _IMPORT_ERROR
    if INTERPRET:
        return None if device == "cpu" else "TRITON_INTERPRET=1 runs the kernels on CPU tensors"
    if device != "cuda":
        return f"Triton kernels run on CUDA tensors, these are on {device} (TRITON_INTERPRET=1 interprets them)"
    if not torch.cuda.is_available():
        return "no CUDA device is available"
    major, minor = torch.cuda.get_device_capability()
    return None if major >= 8 else f"compute capability {major}.{minor} is older than 8.0"


def add_up(partial: Tensor | None, dims: int | tuple[int, ...], into: Tensor | None) -> None:
    """Sums fp32 partial sums over `dims` in a fixed order, into a gradient of any floating dtype; None: not wanted."""
    if partial is None or into is None:
        return
    if into.dtype == partial.dtype:
        torch.sum(partial, dims, out=into)
    else:
        into.copy_(partial.sum(dims))
