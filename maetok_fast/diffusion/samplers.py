# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""ODE and SDE samplers from noise (t = 1) to data (t = 0).

    method   step                                                       NFE for n steps
    euler    x += dt v                                                  n
    heun     x += dt (v(x, t) + v(x + dt v, t + dt)) / 2; the last      2n - 1
             step is Euler's, as its second slope would be at t = 0
    dopri5   adaptive Dormand-Prince (torchdiffeq)                      as needed, reported
    sde      Euler-Maruyama, n points from 1 to 0.04, drift             n
             v - t score, diffusion 2t; a last step takes the mean to 0

The state is kept in fp64 unless told otherwise (steps of 1/250 lose digits in fp32 sums); the network sees the
dtype of `noise`. Guidance and its cost live in guidance.py; here a velocity is a function of (x, step).
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from maetok_fast.diffusion.guidance import Guidance, Velocity
from maetok_fast.diffusion.paths import Path, get_path, shift_times
from maetok_fast.models._checks import check_label_range

SDE_LAST_TIME = 0.04  # below it the score's 1/t makes the noise term stiff


@dataclass(frozen=True)
class Samples:
    """latents: of the noise's shape and dtype. nfe: velocity evaluations per sample. rows: network rows forwarded
    in all, with both guidance branches counted (what the run cost)."""

    latents: Tensor
    nfe: int
    rows: int


@torch.no_grad()
def sample(
    model: Any,
    noise: Tensor,
    y: Tensor | None,
    *,
    steps: int = 250,
    method: str = "sde",
    guidance: float = 1.0,
    interval: tuple[float, float] = (0.0, 1.0),
    negative: Any = None,
    guidance_channels: int | None = None,
    temperature: float | None = None,
    path: str | Path = "linear",
    shift: float = 1.0,
    null_label: int | None = None,
    generator: torch.Generator | None = None,
    state_dtype: torch.dtype = torch.float64,
    tolerance: float = 1e-5,
    progress: bool = False,
) -> Samples:
    """Latents sampled from `noise` (B, L, C) or (B, C, H, W) ~ N(0, 1) with labels y (B,) int64.

    model: (x, t (B,) in [0, 1], y) -> velocity of x's shape, in the t = 0 data convention; see guidance.py for models
        that plan their steps, and `flip_time` for models of the other convention. In eval mode, as `negative`.
    y: None samples unconditionally (the null label everywhere).
    null_label: None is the model's own, `model.config.num_classes`, or 1000 for callables without a config.
    guidance, interval, negative, guidance_channels, temperature: guidance.py's table.
    path: the path the model was trained on (the SDE's score needs it); shift: `shift_times`.
    generator: randomness of the SDE; tolerance: absolute and relative, dopri5 only.
    """
    steps = _integer("steps", steps)
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    if method not in METHODS:
        raise ValueError(f"unknown sampling method {method!r}: expected one of {', '.join(METHODS)}")
    if not isinstance(noise, Tensor) or not noise.is_floating_point():
        got = noise.dtype if isinstance(noise, Tensor) else type(noise).__name__
        raise TypeError(f"noise must be a floating-point tensor, got {got}")
    if noise.ndim < 2 or noise.numel() == 0:
        raise ValueError(f"noise must be (B, L, C) or (B, C, H, W) with no size 0, got {tuple(noise.shape)}")
    if not isinstance(interval, (tuple, list)) or len(interval) != 2:
        raise TypeError(f"interval must be a pair (low, high) of times, got {interval!r}")
    for name, network in (("model", model), ("negative", negative)):
        if getattr(network, "training", False):
            raise ValueError(f"{name} is in training mode, which drops labels at random; call {name}.eval() first")
    if temperature is not None and not _takes_beta(model):
        raise ValueError(
            f"temperature={temperature} is for models trained guidance-free, called as model(x, t, y, beta); "
            f"{type(model).__name__} takes no beta: use guidance instead"
        )
    if null_label is None:
        two_branches = guidance != 1.0 and negative is None
        null_label = _null_label(model, "guidance" if two_branches else "y=None" if y is None else None)
    settings = Guidance(guidance, (interval[0], interval[1]), negative, guidance_channels, temperature, null_label)
    if y is None:
        y = torch.full((len(noise),), null_label, dtype=torch.int64, device=noise.device)
    if not isinstance(y, Tensor):
        raise TypeError(f"y must be a tensor of int64 labels or None, got {type(y).__name__}")
    if y.shape != (len(noise),) or y.dtype != torch.int64:
        raise ValueError(
            f"y must be int64 labels of shape ({len(noise)},), one per sample; got {y.dtype} {tuple(y.shape)}"
        )
    for network in (model, negative):
        check_label_range(y, getattr(network, "config", None))
    if method == "sde":
        ts = torch.linspace(1.0, SDE_LAST_TIME, steps, dtype=torch.float64)
    else:
        ts = torch.linspace(1.0, 0.0, steps + 1, dtype=torch.float64)[:-1]
    ts = shift_times(ts, shift)
    velocity = Velocity(model, ts, y, settings, noise.dtype)
    latents = METHODS[method](
        velocity,
        noise.to(state_dtype),
        [*velocity.ts, 0.0],
        path=get_path(path),
        generator=generator,
        tolerance=tolerance,
        track=_track(steps, progress),
    )
    return Samples(latents.to(noise.dtype), velocity.nfe, velocity.rows)


def _integer(name: str, value: Any) -> int:
    try:
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an integer, got {value!r}") from None


def _takes_beta(model: Any) -> bool:
    try:
        parameters = inspect.signature(getattr(model, "forward", model)).parameters
    except (TypeError, ValueError):  # callables without a signature
        return True
    return "beta" in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())


def _null_label(model: Any, user: str | None) -> int:
    """The model's null class; ValueError where `user`, an argument, needs one and the model has none."""
    config = getattr(model, "config", None)
    if user is not None and getattr(config, "label_dropout", 1.0) == 0:
        raise ValueError(f"{user} needs a null class, and this model has none (label_dropout is 0 in its config)")
    return getattr(config, "num_classes", 1000)


def _euler(v: Velocity, x: Tensor, ts: list[float], *, track: Callable, **_: Any) -> Tensor:
    for i in track(len(ts) - 1):
        x = x + (ts[i + 1] - ts[i]) * v(x, i)
    return x


def _heun(v: Velocity, x: Tensor, ts: list[float], *, track: Callable, **_: Any) -> Tensor:
    last = len(ts) - 2
    for i in track(len(ts) - 1):
        dt = ts[i + 1] - ts[i]
        slope = v(x, i)
        if i < last:
            slope = (slope + v(x + dt * slope, i + 1)) / 2
        x = x + dt * slope
    return x


def _sde(
    v: Velocity, x: Tensor, ts: list[float], *, path: Path, generator: torch.Generator | None, track: Callable, **_: Any
) -> Tensor:
    last = len(ts) - 2
    for i in track(len(ts) - 1):
        t, dt = ts[i], ts[i + 1] - ts[i]
        slope = v(x, i)
        # Guidance mixes velocities with weights that sum to one and the score is affine in them, so guiding the
        # velocity and guiding the drift are the same.
        drift = slope - t * path.score(slope, x, torch.tensor(t, dtype=torch.float64))
        x = x + dt * drift
        if i < last:
            noise = torch.randn(x.shape, generator=generator, device=x.device, dtype=x.dtype)
            x = x + (2 * t * -dt) ** 0.5 * noise
    return x


def _dopri5(v: Velocity, x: Tensor, ts: list[float], *, tolerance: float, track: Callable, **_: Any) -> Tensor:
    try:
        from torchdiffeq import odeint
    except ImportError as error:
        raise ImportError(
            "method='dopri5' needs torchdiffeq: pip install torchdiffeq, or use method='heun', which does not"
        ) from error
    ends = torch.tensor([ts[0], 0.0], dtype=x.dtype, device=x.device)
    return odeint(lambda t, state: v.at(state, float(t)), x, ends, method="dopri5", rtol=tolerance, atol=tolerance)[-1]


METHODS: dict[str, Callable[..., Tensor]] = {"euler": _euler, "heun": _heun, "dopri5": _dopri5, "sde": _sde}


def _track(steps: int, progress: bool) -> Callable[[int], Any]:
    if not progress:
        return range

    def tracked(count: int) -> Any:
        from tqdm.auto import tqdm

        return tqdm(range(count), desc="sampling", unit="step")

    return tracked
