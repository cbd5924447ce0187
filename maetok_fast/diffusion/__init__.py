# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""Paths, samplers and guidance for velocity models.

    paths.py      x_t = alpha(t) data + sigma(t) noise: mixing, velocity, score, training times, time conventions
    protocols.py  what a model must be: Velocity, or Planned for one that prepares its steps
    guidance.py   the one place that evaluates a (guided) velocity and counts its work
    samplers.py   sample(): Euler, Heun, dopri5 (ODE) and Euler-Maruyama (SDE) over that velocity

One convention throughout: **t = 0 is data, t = 1 is noise**, v = dx_t/dt (noise - data on the linear path).
`flip_time` converts models of the opposite one (official SiT, LightningDiT).
"""

from __future__ import annotations

from maetok_fast.diffusion.guidance import Guidance
from maetok_fast.diffusion.paths import COSINE, LINEAR, Path, flip_time, get_path, sample_times, shift_times
from maetok_fast.diffusion.protocols import Planned, Velocity
from maetok_fast.diffusion.samplers import METHODS, Samples, SamplingError, sample

__all__ = [
    "COSINE",
    "LINEAR",
    "METHODS",
    "Guidance",
    "Path",
    "Planned",
    "Samples",
    "SamplingError",
    "Velocity",
    "flip_time",
    "get_path",
    "sample",
    "sample_times",
    "shift_times",
]
