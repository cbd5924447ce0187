# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""Ops whose CPU and CUDA kernels are C++ functions with the same arguments: one launcher serves both.

csrc/cpu exports `<name>_fwd` and `<name>_bwd`, csrc/cuda `<name>_fwd_cuda` and `<name>_bwd_cuda`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from . import _native
from ._op import Backend

__all__ = ["twins"]


def twins(
    name: str,
    forward: Callable[..., tuple[Tensor, ...]],
    backward: Callable[..., Sequence[Tensor | None]],
    functions: tuple[str, str] | None = None,
) -> tuple[Backend, Backend]:
    """The backends "native" and "cuda" of an op.

    forward(run, *args) and backward(run, grad, saved, args, needs) are a `Backend`'s with the native function in front.
    functions: their names without suffix, where they are not <name>_fwd and <name>_bwd.
    """
    fwd_name, bwd_name = functions or (f"{name}_fwd", f"{name}_bwd")

    def one(label: str, library: Callable[[], Any], suffix: str) -> Backend:
        def fwd(*args: Any) -> tuple[Tensor, ...]:
            return forward(getattr(library(), fwd_name + suffix), *args)

        def bwd(
            grad: Any, saved: Sequence[Tensor], args: tuple[Any, ...], needs: Sequence[bool]
        ) -> Sequence[Tensor | None]:
            return backward(getattr(library(), bwd_name + suffix), grad, saved, args, needs)

        return Backend(label, fwd, bwd, library=label)

    return one("native", lambda: _native.lib(), ""), one("cuda", lambda: _native.cuda(), "_cuda")
