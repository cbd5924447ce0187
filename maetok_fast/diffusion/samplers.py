# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""ODE and SDE samplers from noise (t = 1) to data (t = 0).

    method   step                                                       NFE for n steps
    euler    x += dt v                                                  n
    heun     x += dt (v(x, t) + v(x + dt v, t + dt)) / 2; the last      2n - 1
             step is Euler's, as its second slope would be at t = 0
    dopri5   adaptive Dormand-Prince (torchdiffeq)                      as needed, reported
    meanflow x += dt u(x, t, r = t + dt), the average velocity that a   n, 1 to 4
             few-step model predicts (MeanFlow, arXiv 2505.13447)
    sde      Euler-Maruyama, n points from 1 to 0.04, drift             n
             v - t score, diffusion 2t; a last step takes the mean to 0

The state is kept in fp64 unless told otherwise (steps of 1/250 lose digits in fp32 sums); the network sees the
dtype of `noise`. Guidance and its cost live in guidance.py; here a velocity is a function of (x, step).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from maetok_fast.checks import check_label_range
from maetok_fast.diffusion import _arguments as arguments
from maetok_fast.diffusion.guidance import Guidance, GuidedVelocity
from maetok_fast.diffusion.paths import Path, get_path, shift_times
from maetok_fast.diffusion.protocols import Velocity

Noise = Callable[[Tensor], Tensor]
SDE_LAST_TIME = 0.04  # below it the score's 1/t makes the noise term stiff


class SamplingError(RuntimeError):
    """The adaptive solver stopped before t = 0; the message says at which time, why, and what may help."""


@dataclass(frozen=True)
class Samples:
    """latents: of the noise's shape and dtype. nfe: velocity evaluations per sample. rows: network rows forwarded
    in all, with both guidance branches counted (what the run cost)."""

    latents: Tensor
    nfe: int
    rows: int


@torch.no_grad()
def sample(
    model: Velocity,
    noise: Tensor,
    y: Tensor | None,
    *,
    steps: int = 250,
    method: str = "sde",
    guidance: float = 1.0,
    interval: tuple[float, float] = (0.0, 1.0),
    negative: Velocity | None = None,
    guidance_channels: int | None = None,
    temperature: float | None = None,
    internal: float = 1.0,
    internal_interval: tuple[float, float] = (0.0, 1.0),
    path: str | Path = "linear",
    shift: float = 1.0,
    null_label: int | None = None,
    generator: torch.Generator | Noise | None = None,
    state_dtype: torch.dtype = torch.float64,
    tolerance: float = 1e-5,
    max_nfe: int = 10_000,
    progress: bool = False,
) -> Samples:
    """Latents sampled from `noise` (B, L, C) or (B, C, H, W) ~ N(0, 1) with labels y (B,) int64.

    model: (x, t (B,) in [0, 1], y) -> velocity of x's shape, in the t = 0 data convention; see protocols.py for models
        that plan their steps, and `flip_time` for models of the other convention. In eval mode, as `negative`.
    y: None samples unconditionally (the null label everywhere).
    null_label: None is the model's own, `model.config.num_classes`, or 1000 for callables without a config.
    guidance, interval, negative, guidance_channels, temperature, internal, internal_interval: guidance.py's table.
    path: the path the model was trained on (the SDE's score needs it); shift: `shift_times`.
    generator: randomness of the SDE, on noise's device; or a callable x -> N(0, 1) of x's shape, dtype and device, for
    noise of one's own (a stream for each sample). state_dtype: of the sums, fp64 or narrower; dopri5 takes fp64
    or fp32.
    tolerance, max_nfe: dopri5 only: the absolute and relative error of a step, and the evaluations allowed in all.

    TypeError, ValueError: an argument, or what a model returned, does not fit (its name and value are in the message).
    SamplingError: dopri5 met a velocity that is not finite or could not reach t = 0 (fixed steps carry NaN on).
    """
    steps, max_nfe = arguments.integer("steps", steps, 1), arguments.integer("max_nfe", max_nfe, 1)
    guidance, tolerance = arguments.number("guidance", guidance), arguments.positive("tolerance", tolerance)
    if not isinstance(method, str) or method not in METHODS:
        raise ValueError(f"unknown sampling method {method!r}: expected one of {', '.join(METHODS)}")
    arguments.noise(noise)
    arguments.state_dtype(state_dtype, method)
    arguments.generator(generator, noise)
    arguments.model("model", model)
    if negative is not None:
        arguments.model("negative", negative)
    if temperature is not None and not _takes(model, "beta"):
        raise ValueError(
            f"temperature={temperature} is for models trained guidance-free, called as model(x, t, y, beta); "
            f"{type(model).__name__} takes no beta: use guidance instead"
        )
    if arguments.number("internal", internal) != 1.0 and not _exits(model):
        raise ValueError(
            f"internal={internal} guides by an early exit of the model, and this {type(model).__name__} has none "
            "(exit_depth is None in its config): use guidance instead"
        )
    for name, network in (("model", model), ("negative", negative)):
        if method == "meanflow" and network is not None and not _takes(network, "r"):
            raise ValueError(
                f"method='meanflow' is for models of average velocities, called as {name}(x, t, y, r=r); "
                f"{type(network).__name__} takes no r: use method='euler' or 'heun'"
            )
    two_labels = guidance != 1.0 and negative is None
    if null_label is None:
        null_label = _null_label(model, "guidance" if two_labels else "y=None" if y is None else None)
    settings = Guidance(
        guidance, interval, negative, guidance_channels, temperature, null_label, internal, internal_interval
    )
    if y is None or two_labels:
        _check_null_label(null_label, model)
    if y is None:
        y = torch.full((len(noise),), null_label, dtype=torch.int64, device=noise.device)
    arguments.labels(y, noise)
    for network in (model, negative):
        check_label_range(y, getattr(network, "config", None))
    on = get_path(path)
    if method == "sde":
        ts = torch.linspace(1.0, SDE_LAST_TIME, steps, dtype=torch.float64)
    else:
        ts = torch.linspace(1.0, 0.0, steps + 1, dtype=torch.float64)[:-1]
    ts = shift_times(ts, shift)
    if method == "dopri5":
        ts = ts[:0]  # it finds its own times: nothing to plan
    rs = torch.cat([ts[1:], ts.new_zeros(1)]) if method == "meanflow" else None
    velocity = GuidedVelocity(model, ts, y, settings, noise.dtype, rs)
    latents = METHODS[method](
        velocity,
        noise.to(state_dtype),
        [*velocity.ts, 0.0],
        path=on,
        generator=generator,
        tolerance=tolerance,
        max_nfe=max_nfe,
        track=_track(progress),
    )
    return Samples(latents.to(noise.dtype), velocity.nfe, velocity.rows)


def _check_null_label(null_label: int, model: Any) -> None:
    try:
        check_label_range(torch.tensor([null_label]), getattr(model, "config", None))
    except ValueError as error:
        raise ValueError(f"null_label={null_label} is no class of this model: {error}") from None


def _takes(model: Any, name: str) -> bool:
    """Whether a model takes this condition: as its configuration says, else as its signature does."""
    known = getattr(getattr(model, "config", None), "conditions", None)
    if known is not None:
        return name in known
    try:
        parameters = inspect.signature(getattr(model, "forward", model)).parameters
    except (TypeError, ValueError):  # callables without a signature
        return True
    return name in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())


def _exits(model: Any) -> bool:
    config = getattr(model, "config", None)
    depth: Any = getattr(config, "exit_depth", False)
    return _takes(model, "exits") if depth is False else depth is not None


def _null_label(model: Any, user: str | None) -> int:
    """The model's null class; ValueError where `user`, an argument, needs one and the model has none."""
    config = getattr(model, "config", None)
    if user is not None and getattr(config, "label_dropout", 1.0) == 0:
        raise ValueError(f"{user} needs a null class, and this model has none (label_dropout is 0 in its config)")
    return getattr(config, "num_classes", 1000)


def _euler(v: GuidedVelocity, x: Tensor, ts: list[float], *, track: Callable, **_: Any) -> Tensor:
    for i in track(len(ts) - 1):
        x = x + (ts[i + 1] - ts[i]) * v(x, i)
    return x


def _heun(v: GuidedVelocity, x: Tensor, ts: list[float], *, track: Callable, **_: Any) -> Tensor:
    last = len(ts) - 2
    for i in track(len(ts) - 1):
        dt = ts[i + 1] - ts[i]
        slope = v(x, i)
        if i < last:
            slope = (slope + v(x + dt * slope, i + 1)) / 2
        x = x + dt * slope
    return x


def _sde(
    v: GuidedVelocity,
    x: Tensor,
    ts: list[float],
    *,
    path: Path,
    generator: torch.Generator | Noise | None,
    track: Callable,
    **_: Any,
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
            if generator is None or isinstance(generator, torch.Generator):
                noise = torch.randn(x.shape, generator=generator, device=x.device, dtype=x.dtype)
            else:
                noise = arguments.drawn(generator(x), x)
            x = x + (2 * t * -dt) ** 0.5 * noise
    return x


def _dopri5(v: GuidedVelocity, x: Tensor, ts: list[float], *, tolerance: float, max_nfe: int, **_: Any) -> Tensor:
    try:
        from torchdiffeq import odeint
    except ImportError as error:
        raise ImportError(
            "method='dopri5' needs torchdiffeq: pip install torchdiffeq, or use method='heun', which does not"
        ) from error
    slope = _Watched(v, max_nfe)
    ends = torch.tensor([1.0, 0.0], dtype=x.dtype, device=x.device)
    # Left alone it steps past the end and interpolates back (v = -x / 100 is asked for t = -0.26): step_t ends it at 0.
    options = {"step_t": ends[1:]}
    try:
        x = odeint(slope, x, ends, method="dopri5", rtol=tolerance, atol=tolerance, options=options)[-1]
    except AssertionError as error:
        why = str(error).split(":")[0].strip()  # past the colon it prints the state
        if not why.startswith(("underflow in dt", "non-finite values")):  # torchdiffeq's; others are the model's own
            raise
        raise slope.stopped(slope.reached, why) from error
    return x


class _Watched:
    """dx/dt for torchdiffeq, which itself bounds nothing: it stops at values that are not finite and at `max_nfe`."""

    def __init__(self, v: GuidedVelocity, max_nfe: int) -> None:
        self.v, self.max_nfe, self.reached = v, max_nfe, 1.0

    def __call__(self, t: Tensor, x: Tensor) -> Tensor:
        if self.v.nfe >= self.max_nfe:
            raise self.stopped(self.reached, f"max_nfe={self.max_nfe} is spent")
        time = max(float(t), 0.0)  # only the guess of the first step's size can still lie beyond 0
        velocity = self.v.at(x, time)
        if not velocity.isfinite().all():
            raise self.stopped(time, "the velocity is not finite there")
        return velocity

    def callback_accept_step(self, t: Tensor, x: Tensor, dt: Tensor) -> None:
        self.reached = float(t - dt)  # time runs from 1 down; torchdiffeq's dt is positive

    def stopped(self, t: float, why: str) -> SamplingError:
        return SamplingError(
            f"dopri5 stopped at t = {t:.4g}, NFE {self.v.nfe}: {why}; a finite model that ends like this is too stiff, "
            "or rounds too coarsely (16 bits), for the tolerance: give a larger one, or use method='heun'"
        )


METHODS: dict[str, Callable[..., Tensor]] = {
    "euler": _euler,
    "heun": _heun,
    "dopri5": _dopri5,
    "sde": _sde,
    "meanflow": _euler,  # over average velocities
}


def _track(progress: bool) -> Callable[[int], Any]:
    if not progress:
        return range

    def tracked(count: int) -> Any:
        from tqdm.auto import tqdm

        return tqdm(range(count), desc="sampling", unit="step")

    return tracked
