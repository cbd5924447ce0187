# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""The one place where a sampler's velocity is evaluated.

    guidance 1            one conditional forward of B rows
    guidance w, vanilla   v = v_null + w (v_cond - v_null): ONE forward of 2B rows [y | null label]
    guidance w, negative  v = v_neg + w (v_cond - v_neg): B rows of the model and B of a worse one, same labels
                          (autoguidance, Karras et al. 2024)
    internal w            v = v_exit + w (v - v_exit), the early exit's velocity in the same forward, whose rows stay
                          what they are; before the others where it is combined with them (internal guidance, Zhou et
                          al. 2025, arXiv 2512.24176)
    temperature beta      guidance-free training: the model takes beta and one forward of B rows is the answer
    interval [low, high]  times outside it run the conditional branch alone: B rows, nothing computed and dropped

Models that can plan their steps (`protocols.Planned`) are planned for all steps whose times are known ahead.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from maetok_fast.diffusion import _arguments as arguments
from maetok_fast.diffusion.protocols import Planned, Velocity


@dataclass(frozen=True)
class Guidance:
    """How the velocity is guided; see the module's table. `channels`: guide only the first so many channels.
    `internal_interval`: of `internal`, whose scale that is."""

    scale: float = 1.0
    interval: tuple[float, float] = (0.0, 1.0)
    negative: Velocity | None = None
    channels: int | None = None
    temperature: float | None = None
    null_label: int = 1000
    internal: float = 1.0
    internal_interval: tuple[float, float] = (0.0, 1.0)

    def __post_init__(self) -> None:
        arguments.number("guidance", self.scale)
        arguments.number("internal", self.internal)
        for name in ("interval", "internal_interval"):
            times = getattr(self, name)
            if not isinstance(times, (tuple, list)) or len(times) != 2:
                raise TypeError(f"{name} must be a pair (low, high) of times, got {times!r}")
            low, high = (arguments.number(name, time) for time in times)
            if not low <= high:
                raise ValueError(f"the guidance {name} must be (low, high) in t with low <= high, got {times}")
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

    def leaves(self, t: float) -> bool:
        """Does time t need the early exit?"""
        return self.internal != 1.0 and self.internal_interval[0] <= t <= self.internal_interval[1]

    def combine(self, conditional: Tensor, other: Tensor, channel_dim: int) -> Tensor:
        """other + scale (conditional - other); channels past `channels` stay conditional."""
        guided = other + self.scale * (conditional - other)
        if self.channels is None or self.channels >= conditional.shape[channel_dim]:
            return guided
        rest = conditional.narrow(channel_dim, self.channels, conditional.shape[channel_dim] - self.channels)
        return torch.cat([guided.narrow(channel_dim, 0, self.channels), rest], dim=channel_dim)


class GuidedVelocity:
    """v(x, i) = the guided velocity at time ts[i]; counts `nfe` (evaluations) and `rows` (network rows forwarded).

    x: (B, L, C) token latents or (B, C, H, W) grids in `dtype`; y: (B,) int64 labels; rs (S,): the other ends of the
    steps, for models of average velocities. Results come back in x's dtype.
    """

    def __init__(
        self,
        model: Velocity,
        ts: Tensor,
        y: Tensor,
        guidance: Guidance,
        dtype: torch.dtype,
        rs: Tensor | None = None,
    ) -> None:
        self.guidance, self.dtype = guidance, dtype
        self.ts = [float(t) for t in ts]
        self.nfe = 0
        self.rows = 0
        extra = {} if rs is None else {"r": rs}
        if guidance.temperature is not None:
            extra["beta"] = torch.full((max(1, len(ts)),), guidance.temperature, dtype=ts.dtype)
        active = [i for i, t in enumerate(self.ts) if guidance.active(t)]
        plain = [i for i in range(len(self.ts)) if i not in set(active)]
        null = torch.full_like(y, guidance.null_label)
        self._both: _Branch | None = None
        self._negative: _Branch | None = None
        if guidance.negative is None:
            self._both = _Branch(model, y=torch.cat([y, null]), ts=ts, steps=active, extra=extra, guidance=guidance)
            self._plain = _Branch(model, y=y, ts=ts, steps=plain, extra=extra, guidance=guidance)
        else:
            every = list(range(len(self.ts)))
            self._negative = _Branch(guidance.negative, y=y, ts=ts, steps=active, extra=extra)
            self._plain = _Branch(model, y=y, ts=ts, steps=every, extra=extra, guidance=guidance)

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
    """One model with one set of labels; planned, if the model can, for the given steps of ts. extra: what the model
    takes beside t and y, (S,) each. guidance: whose internal one is applied here, to v in fp32 or wider."""

    def __init__(
        self,
        model: Velocity,
        *,
        y: Tensor,
        ts: Tensor,
        steps: list[int],
        extra: dict[str, Tensor],
        guidance: Guidance | None = None,
    ) -> None:
        self.model = cast(Any, model)  # called with `extra`, which no type can say
        self.y, self.extra, self.guidance = y, extra, guidance
        self.plan: Any = None
        self.place: dict[int, int] = {}  # of a step in the plan
        if steps and isinstance(model, Planned):
            self.plan = self.model.plan(ts[steps], y, **{name: values[steps] for name, values in extra.items()})
            self.place = {step: k for k, step in enumerate(steps)}

    def __call__(self, x: Tensor, t: float, i: int | None) -> Tensor:
        exits = {"exits": True} if self.guidance is not None and self.guidance.leaves(t) else {}
        if i is not None and i in self.place:
            v = self.model.step(self.plan, self.place[i], x, **exits)
        else:
            times = torch.full((len(x),), t, device=x.device, dtype=torch.float32)
            # at times that were not known ahead no step has an end, and a temperature is the same at all
            extra = {n: torch.full_like(times, float(values[i or 0])) for n, values in self.extra.items()}
            v = self.model(x, times, self.y, **extra, **exits)
        if not exits:
            return arguments.velocity(v, x, self.model)
        if not isinstance(v, tuple) or len(v) != 2:
            raise TypeError(
                f"{type(self.model).__name__} must return (v, early exit's v) for exits=True, got {type(v)}"
            )
        v, early = (arguments.velocity(part, x, self.model) for part in v)
        wide = torch.promote_types(v.dtype, torch.float32)
        v, early = v.to(wide), early.to(wide)
        assert self.guidance is not None
        return early + self.guidance.internal * (v - early)
