# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""What a training step need not keep: outputs of passes that are cheap to make again in the backward pass.

    y = norm(x)                          kept by autograd: x (for the norm), y (for the product behind it)
    with again(y, norm, x):              kept: x;  y is made a second time, bit for bit, when the product's
        out = qkv(y)                     weight gradient asks for it

A transformer block keeps 17 D numbers a token (D its width), of which the two norms and the activation of the MLP are
6 D: the passes that make them are 1 to 2 % of a step's time on a CPU, its whole forward pass a third.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from maetok_fast.kernels._dispatch import transformed

__all__ = ["again", "recompute"]


def recompute(model: nn.Module, wanted: bool = True) -> int:
    """Switches `again` on or off in every module of `model` that knows it; returns how many those are."""
    knowing = [m for m in model.modules() if hasattr(m, "recompute")]
    for module in knowing:
        module.recompute = wanted  # type: ignore[assignment]
    return len(knowing)


@contextlib.contextmanager
def again(y: Tensor, make: Callable[..., Tensor], *given: Any, wanted: bool = True) -> Iterator[None]:
    """Inside, autograd keeps `given` where it would keep y (or a view of all of it); make(*given) has to give y's bits.

    make: called in the backward pass, without gradients, under the autocast of now. given: its arguments; tensors among
    them should be kept anyway. Nothing happens where `wanted` is False, without gradients, under torch.compile and
    torch.func.
    """
    if not wanted or not torch.is_grad_enabled() or torch.compiler.is_compiling() or not y.requires_grad:
        yield
        return
    if transformed((y,)):
        yield
        return
    given = tuple(v.detach() if isinstance(v, Tensor) else v for v in given)
    place, size, device = y.untyped_storage().data_ptr(), y.numel(), y.device.type
    lowered = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None

    def pack(kept: Tensor) -> Any:
        if kept.untyped_storage().data_ptr() != place or kept.numel() != size or not kept.is_contiguous():
            return kept
        return kept.shape

    def unpack(kept: Any) -> Tensor:
        if isinstance(kept, Tensor):
            return kept
        with torch.no_grad(), torch.autocast(device, dtype=lowered, enabled=lowered is not None):
            return make(*given).view(kept)

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield
