# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""Paths, samplers and guidance for velocity models.

    paths.py      x_t = alpha(t) data + sigma(t) noise: mixing, velocity, score, training times, time conventions
    protocols.py  what a model must be: Velocity, or Planned for one that prepares its steps
    guidance.py   the one place that evaluates a (guided) velocity and counts its work
    samplers.py   sample(): Euler, Heun, dopri5 (ODE), Euler-Maruyama (SDE) and few-step ones over that velocity
    meanflow.py   what few-step models are trained on: the MeanFlow identity, by a jvp

One convention throughout: **t = 0 is data, t = 1 is noise**, v = dx_t/dt (noise - data on the linear path).
`flip_time` converts models of the opposite one (official SiT, LightningDiT).
"""

from __future__ import annotations

from maetok_fast.diffusion.guidance import Guidance
from maetok_fast.diffusion.meanflow import adaptive_loss, average_velocity_error, guided_target, sample_spans
from maetok_fast.diffusion.paths import (
    COSINE,
    LINEAR,
    Path,
    dimension_shift,
    flip_time,
    from_data_at_one,
    get_path,
    sample_times,
    shift_times,
)
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
    "adaptive_loss",
    "average_velocity_error",
    "dimension_shift",
    "flip_time",
    "from_data_at_one",
    "get_path",
    "guided_target",
    "sample",
    "sample_spans",
    "sample_times",
    "shift_times",
]
