# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""What the samplers ask of a model, as types: any callable is a `Velocity`, and one with plan and step is `Planned`.

`Planned` lets a model compute for many steps in one go what depends on (t, y) alone (a third of SiT-XL's weights):
`plan` is called once per sampling run with the labels of one forward, null labels included, so equal labels may share
their rows; how many steps it holds at once is the model's business. `step` runs the rest.
"""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

from torch import Tensor

__all__ = ["Planned", "Velocity"]


class Velocity(Protocol):
    """A velocity model: x (B, L, C) or (B, C, H, W), times t (B,) fp32 in [0, 1], labels y (B,) int64 -> dx_t/dt of x's
    shape. Some take more, (B,) fp32 each: `beta`, of models trained guidance-free; `r`, of few-step ones, which then
    give the average velocity from r to t. With `exits=True` a model with an early exit gives (v, its velocity)."""

    def __call__(self, x: Tensor, t: Tensor, y: Tensor, /) -> Tensor: ...


@runtime_checkable
class Planned(Protocol):
    """A velocity model that can prepare its steps: `step(plan(ts, y), i, x)` equals `self(x, ts[i], y)` to rounding.
    One that takes beta or r takes them in `plan`, (S,) each, and one with an early exit `exits` in `step`."""

    def __call__(self, x: Tensor, t: Tensor, y: Tensor, /) -> Tensor: ...

    def plan(self, ts: Tensor, y: Tensor, /) -> Any:
        """What `step` needs for times ts (S,), decreasing, and labels y (B,)."""
        ...

    def step(self, plan: Any, i: int, x: Tensor, /) -> Tensor:
        """The velocity of x (B, ...) at time ts[i]."""
        ...
