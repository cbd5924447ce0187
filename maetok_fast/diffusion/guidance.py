# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""The one place where a sampler's velocity is evaluated.

    guidance 1            one conditional forward of B rows
    guidance w, vanilla   v = v_null + w (v_cond - v_null): ONE forward of 2B rows [y | null label]
    guidance w, negative  v = v_neg + w (v_cond - v_neg): B rows of the model and B of a worse one, same labels
                          (autoguidance, Karras et al. 2024)
    temperature beta      guidance-free training: the model takes beta and one forward of B rows is the answer
    interval [low, high]  times outside it run the conditional branch alone: B rows, nothing computed and dropped

Models that can plan their steps (`protocols.Planned`) are planned for all steps whose times are known ahead.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from maetok_fast.diffusion import _arguments as arguments
from maetok_fast.diffusion.protocols import Planned, Velocity


@dataclass(frozen=True)
class Guidance:
    """How the velocity is guided; see the module's table. `channels`: guide only the first so many channels."""

    scale: float = 1.0
    interval: tuple[float, float] = (0.0, 1.0)
    negative: Velocity | None = None
    channels: int | None = None
    temperature: float | None = None
    null_label: int = 1000

    def __post_init__(self) -> None:
        arguments.number("guidance", self.scale)
        if not isinstance(self.interval, (tuple, list)) or len(self.interval) != 2:
            raise TypeError(f"interval must be a pair (low, high) of times, got {self.interval!r}")
        low, high = (arguments.number("interval", time) for time in self.interval)
        if not low <= high:
            raise ValueError(f"the guidance interval must be (low, high) in t with low <= high, got {self.interval}")
        if self.temperature is not None:
            arguments.number("temperature", self.temperature)
        if self.temperature is not None and self.scale != 1.0:
            raise ValueError(
                f"temperature={self.temperature} (guidance-free training) and guidance={self.scale} cannot be combined:"
                " leave guidance at 1"
            )
        if self.negative is not None and self.scale == 1.0:
            raise ValueError("negative is only used by guidance != 1: give its scale, or leave negative out")
        if self.channels is not None:
            arguments.integer("guidance_channels", self.channels, 1)
        arguments.integer("null_label", self.null_label, 0)

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


class GuidedVelocity:
    """v(x, i) = the guided velocity at time ts[i]; counts `nfe` (evaluations) and `rows` (network rows forwarded).

    x: (B, L, C) token latents or (B, C, H, W) grids in `dtype`; y: (B,) int64 labels. Results come back in x's dtype.
    """

    def __init__(self, model: Velocity, ts: Tensor, y: Tensor, guidance: Guidance, dtype: torch.dtype) -> None:
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

    def __init__(
        self, model: Velocity, *, y: Tensor, ts: Tensor, steps: list[int], extra: dict[str, float] | None = None
    ) -> None:
        self.model: Any = model  # called with `extra`, which no type can say
        self.y, self.extra = y, extra or {}
        # With a temperature the modulations depend on beta too, which a plan does not carry.
        self.plan: Any = None
        self.place: dict[int, int] = {}  # of a step in the plan
        if steps and not self.extra and isinstance(model, Planned):
            self.plan = model.plan(ts[steps], y)
            self.place = {step: k for k, step in enumerate(steps)}

    def __call__(self, x: Tensor, t: float, i: int | None) -> Tensor:
        if i is not None and i in self.place:
            v = self.model.step(self.plan, self.place[i], x)
        else:
            times = torch.full((len(x),), t, device=x.device, dtype=torch.float32)
            extra = {name: torch.full_like(times, value) for name, value in self.extra.items()}
            v = self.model(x, times, self.y, **extra)
        return arguments.velocity(v, x, self.model)
