# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""Interpolation paths between data (t = 0) and noise (t = 1).

    x_t = alpha(t) x + sigma(t) e          v = dx_t/dt = alpha'(t) x + sigma'(t) e
    linear:  alpha = 1 - t                 sigma = t               v = e - x
    cosine:  alpha = cos(pi t / 2)         sigma = sin(pi t / 2)

The score follows from the velocity: solving the two lines above for e gives
score = -e / sigma = (r v - x_t) / (sigma^2 - r sigma' sigma) with r = alpha / alpha'
(Ma et al., "SiT", 2024, eq. 9).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from maetok_fast.diffusion._arguments import positive


@dataclass(frozen=True)
class Path:
    """alpha, sigma and their derivatives; each maps a tensor of times in [0, 1] to a tensor of the same shape."""

    name: str
    alpha: Callable[[Tensor], Tensor]
    sigma: Callable[[Tensor], Tensor]
    d_alpha: Callable[[Tensor], Tensor]
    d_sigma: Callable[[Tensor], Tensor]

    def mix(self, data: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """x_t for data and noise of shape (B, ...) and times t of shape (B,) or ()."""
        t = _like(t, data)
        return self.alpha(t) * data + self.sigma(t) * noise

    def velocity(self, data: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """The training target dx_t/dt; shapes as in `mix`."""
        t = _like(t, data)
        return self.d_alpha(t) * data + self.d_sigma(t) * noise

    def score(self, velocity: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """grad log p_t(x) from the velocity at x, for t > 0 (at t = 0 the score has no finite value)."""
        t = _like(t, x)
        ratio = self.alpha(t) / self.d_alpha(t)
        sigma = self.sigma(t)
        return (ratio * velocity - x) / (sigma * sigma - ratio * self.d_sigma(t) * sigma)


_HALF_PI = math.pi / 2

LINEAR = Path(
    "linear",
    alpha=lambda t: 1 - t,
    sigma=lambda t: t,
    d_alpha=lambda t: -torch.ones_like(t),
    d_sigma=lambda t: torch.ones_like(t),
)
COSINE = Path(
    "cosine",
    alpha=lambda t: torch.cos(_HALF_PI * t),
    sigma=lambda t: torch.sin(_HALF_PI * t),
    d_alpha=lambda t: -_HALF_PI * torch.sin(_HALF_PI * t),
    d_sigma=lambda t: _HALF_PI * torch.cos(_HALF_PI * t),
)
_PATHS = {path.name: path for path in (LINEAR, COSINE)}


def get_path(path: str | Path) -> Path:
    """A path by name ("linear" or "cosine"); a `Path` is returned as it is."""
    if isinstance(path, Path):
        return path
    if not isinstance(path, str) or path not in _PATHS:
        raise ValueError(f"unknown path {path!r}: expected one of {', '.join(sorted(_PATHS))}")
    return _PATHS[path]


def sample_times(
    count: int,
    weighting: str = "uniform",
    *,
    path: str | Path = "linear",
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """Training times (count,) fp32 in [0, 1].

    "uniform", or "lognormal": with n ~ N(0, 1), t = sigmoid(n) on the linear path and (2/pi) atan(e^n) on the
    cosine one (the time at which sigma/alpha = e^n).
    """
    if weighting == "uniform":
        return torch.rand(count, generator=generator, device=device)
    if weighting != "lognormal":
        raise ValueError(f"unknown time weighting {weighting!r}: expected uniform or lognormal")
    normal = torch.randn(count, generator=generator, device=device)
    if get_path(path).name == "cosine":
        return torch.atan(torch.exp(normal)) / _HALF_PI
    return torch.sigmoid(normal)


def shift_times(t: Tensor, shift: float) -> Tensor:
    """t -> shift t / (1 + (shift - 1) t): shift > 1 spends more steps near the noise, 1 changes nothing.

    In the opposite time convention (t = 1 is data) the same map has the reciprocal shift, so a LightningDiT
    `timestep_shift` of 0.3 is 1/0.3 here.
    """
    shift = positive("shift", shift)
    return shift * t / (1 + (shift - 1) * t)


def dimension_shift(dimensions: int, base: int = 4096) -> float:
    """The shift sqrt(dimensions / base) of latents with so many numbers each: more of them hide more of the data at the
    same t (Esser et al. 2024, arXiv 2403.03206; base 4096 as in RAE, arXiv 2510.11690)."""
    if dimensions < 1 or base < 1:
        raise ValueError(f"dimension_shift: dimensions and base must be at least 1, got {dimensions} and {base}")
    return math.sqrt(dimensions / base)


def from_data_at_one(interval: tuple[float, float], shift: float = 1.0) -> tuple[tuple[float, float], float]:
    """(interval, shift) of the convention of LightningDiT, VTP and SFD, where data is at t = 1, in ours. Their
    `cfg_interval_start` s is the interval (s, 1), their `timestep_shift` the shift."""
    low, high = interval
    return (1 - high, 1 - low), 1 / positive("shift", shift)


def flip_time(model: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A velocity model of the other convention (t = 0 noise, t = 1 data: official SiT, LightningDiT) in ours, and back.

    With s = 1 - t, dx/dt = -dx/ds: the time is flipped and the velocity changes its sign. Applying it twice gives
    the original function.
    """

    def flipped(x: Tensor, t: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return -model(x, 1 - t, *args, **kwargs)

    return flipped


def _like(t: Tensor, x: Tensor) -> Tensor:
    """t of shape () or (B,) made to broadcast over x (B, ...), in x's dtype."""
    t = t.to(device=x.device, dtype=x.dtype)
    return t if t.ndim == 0 else t.reshape(-1, *(1,) * (x.ndim - 1))
