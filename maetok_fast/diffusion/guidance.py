# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""The one place where a sampler's velocity is evaluated.

    guidance 1            one conditional forward of B rows
    guidance w, vanilla   v = v_null + w (v_cond - v_null): ONE forward of 2B rows [y | null label]
    guidance w, negative  v = v_neg + w (v_cond - v_neg): B rows of the model and B of a worse one, same labels
                          (autoguidance, Karras et al. 2024)
    temperature beta      guidance-free training: the model takes beta and one forward of B rows is the answer
    interval [low, high]  times outside it run the conditional branch alone: B rows, nothing computed and dropped

Prepared models may offer `plan(ts, y) -> plan` and `step(plan, i, x) -> v`: what depends on (t, y) alone (a third of
SiT-XL's weights) can then be computed for many steps in one go, and `step` runs the rest for time ts[i]. `plan` is
called once per sampling run with the labels of one forward, null labels included, so equal labels may share their rows;
how many steps it holds at once is the model's business.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Guidance:
    """How the velocity is guided; see the module's table. `channels`: guide only the first so many channels."""

    scale: float = 1.0
    interval: tuple[float, float] = (0.0, 1.0)
    negative: Any = None
    channels: int | None = None
    temperature: float | None = None
    null_label: int = 1000

    def __post_init__(self) -> None:
        low, high = self.interval
        if not low <= high:
            raise ValueError(f"the guidance interval must be (low, high) in t with low <= high, got {self.interval}")
        if self.temperature is not None and self.scale != 1.0:
            raise ValueError(
                f"temperature={self.temperature} (guidance-free training) and guidance={self.scale} cannot be combined:"
                " leave guidance at 1"
            )
        if self.negative is not None and self.scale == 1.0:
            raise ValueError("negative is only used by guidance != 1: give its scale, or leave negative out")
        if self.channels is not None and self.channels < 1:
            raise ValueError(f"guidance channels must be at least 1, got {self.channels}")

    def active(self, t: float) -> bool:
        """Does time t need the second branch?"""
        return self.scale != 1.0 and self.interval[0] <= t <= self.interval[1]

    def combine(self, conditional: Tensor, other: Tensor, channel_dim: int) -> Tensor:
        """other + scale (conditional - other); channels past `channels` stay conditional."""
        guided = other + self.scale * (conditional - other)
        if self.channels is None or self.channels >= conditional.shape[channel_dim]:
            return guided
        rest = conditional.narrow(channel_dim, self.channels, conditional.shape[channel_dim] - self.channels)
        return torch.cat([guided.narrow(channel_dim, 0, self.channels), rest], dim=channel_dim)


class Velocity:
    """v(x, i) = the guided velocity at time ts[i]; counts `nfe` (evaluations) and `rows` (network rows forwarded).

    x: (B, L, C) token latents or (B, C, H, W) grids in `dtype`; y: (B,) int64 labels. Results come back in x's dtype.
    """

    def __init__(self, model: Any, ts: Tensor, y: Tensor, guidance: Guidance, dtype: torch.dtype) -> None:
        self.guidance, self.dtype = guidance, dtype
        self.ts = [float(t) for t in ts]
        self.nfe = 0
        self.rows = 0
        extra = {} if guidance.temperature is None else {"beta": guidance.temperature}
        active = [i for i, t in enumerate(self.ts) if guidance.active(t)]
        plain = [i for i in range(len(self.ts)) if i not in set(active)]
        null = torch.full_like(y, guidance.null_label)
        self._both: _Branch | None = None
        self._negative: _Branch | None = None
        if guidance.negative is None:
            self._both = _Branch(model, y=torch.cat([y, null]), ts=ts, steps=active)
            self._plain = _Branch(model, y=y, ts=ts, steps=plain, extra=extra)
        else:
            self._negative = _Branch(guidance.negative, y=y, ts=ts, steps=active)
            self._plain = _Branch(model, y=y, ts=ts, steps=list(range(len(self.ts))), extra=extra)

    def __call__(self, x: Tensor, i: int) -> Tensor:
        return self.at(x, self.ts[i], i)

    def at(self, x: Tensor, t: float, i: int | None = None) -> Tensor:
        """The velocity at time t; i is t's index in ts, None for times that were not known ahead (adaptive solvers)."""
        self.nfe += 1
        inputs = x.to(self.dtype)
        if not self.guidance.active(t):
            self.rows += len(x)
            return self._plain(inputs, t, i).to(x.dtype)
        self.rows += 2 * len(x)
        if self._both is not None:
            conditional, other = self._both(torch.cat([inputs, inputs]), t, i).to(x.dtype).chunk(2)
        else:
            assert self._negative is not None
            conditional = self._plain(inputs, t, i).to(x.dtype)
            other = self._negative(inputs, t, i).to(x.dtype)
        return self.guidance.combine(conditional, other, channel_dim=1 if x.ndim == 4 else -1)


class _Branch:
    """One model with one set of labels; planned, if the model can, for the given steps of ts."""

    def __init__(self, model: Any, *, y: Tensor, ts: Tensor, steps: list[int], extra: dict[str, float] | None = None):
        self.model, self.y, self.extra = model, y, extra or {}
        # With a temperature the modulations depend on beta too, which a plan does not carry.
        planned = steps and hasattr(model, "plan") and hasattr(model, "step") and not self.extra
        self.plan = model.plan(ts[steps], y) if planned else None
        self.place = {step: k for k, step in enumerate(steps)}

    def __call__(self, x: Tensor, t: float, i: int | None) -> Tensor:
        if self.plan is not None and i is not None:
            return self.model.step(self.plan, self.place[i], x)
        times = torch.full((len(x),), t, device=x.device, dtype=torch.float32)
        extra = {name: torch.full_like(times, value) for name, value in self.extra.items()}
        return self.model(x, times, self.y, **extra)
