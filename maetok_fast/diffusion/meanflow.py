# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""Training of few-step models: average velocities by the MeanFlow identity (Geng et al. 2025, arXiv 2505.13447).

    u(x_t, r, t) = 1 / (t - r) integral of v from r to t          so that x_r = x_t - (t - r) u in one evaluation
    u + (t - r) du/dt = v                                         du/dt = v . grad_x u + d_t u, a jvp along (v, 1, 0)

    (r, t) ~ sample_spans          x_t, v of a path at t
    error = u + (t - r) stop(du/dt) - v                           average_velocity_error
    loss  = adaptive_loss(error)                                  |error|^2 / stop(|error|^2 + c)^p

The direction of the jvp is v itself (MeanFlow) or the model's own velocity at t (improved MeanFlow, arXiv 2512.02012:
the error is then a regression to v of something that depends on x_t alone). With guidance the velocity to learn is
`guided_target`'s. Attention takes its value and its tangent in one pass (kernels/rope_attention_jvp.py).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from maetok_fast.checks import check_number, check_tensor

__all__ = ["adaptive_loss", "average_velocity_error", "guided_target", "sample_spans"]


def sample_spans(
    count: int,
    *,
    apart: float = 0.25,
    mean: float = -0.4,
    std: float = 1.0,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
) -> tuple[Tensor, Tensor]:
    """Training spans (r, t), (count,) fp32 each, 0 <= r <= t <= 1: two logit-normal times sigmoid(mean + std n) in
    order, of which a share `apart` stays apart and the others are one time, r = t, where u is v."""
    check_number("sample_spans", "apart", apart, 0, 1)
    check_number("sample_spans", "std", std, 0, above=True)
    times = torch.sigmoid(mean + std * torch.randn(2, count, generator=generator, device=device))
    r, t = times.amin(0), times.amax(0)
    equal = torch.rand(count, generator=generator, device=device) >= apart
    return torch.where(equal, t, r), t


def average_velocity_error(
    model: Any,
    x: Tensor,
    r: Tensor,
    t: Tensor,
    y: Tensor,
    velocity: Tensor,
    *,
    direction: Tensor | None = None,
    **conditions: Tensor,
) -> Tensor:
    """u + (t - r) stop(du/dt) - velocity, of x's shape, differentiable in the model's parameters through u.

    model: called as (x, t, y, r=r, **conditions), of average velocities (`SiTConfig.conditions` with "r"). In training
        mode it drops labels at random, in the tangent's forward the same ones, since there is one forward only.
    x (B, ...) = x_t and velocity, of its shape: of the path at t (or `guided_target`). r, t (B,). y (B,) int64.
    direction: of the jvp, None: `velocity`; for improved MeanFlow `model(x, t, y)` without gradient.
    """
    check_tensor("velocity", velocity, tuple(x.shape))
    check_tensor("r", r, (len(x),))
    check_tensor("t", t, (len(x),))
    along = velocity if direction is None else direction

    def average(x: Tensor, t: Tensor) -> Tensor:
        return model(x, t, y, r=r, **conditions)

    u, slope = torch.func.jvp(average, (x, t), (along.detach().to(x), torch.ones_like(t)))[:2]
    span = (t - r).view(-1, *(1,) * (x.ndim - 1))
    wide = torch.promote_types(u.dtype, torch.float32)
    return u.to(wide) + span.to(wide) * slope.detach().to(wide) - velocity.detach().to(wide)


def guided_target(
    velocity: Tensor, conditional: Tensor, null: Tensor, guidance: float | Tensor, mixing: float | Tensor = 0.0
) -> Tensor:
    """The velocity whose averages a guided few-step model learns, so that it samples guided in one forward:
    guidance v + mixing u_cond + (1 - guidance - mixing) u_null, with the model's own velocities at t for the label and
    for the null label (B, ...), without gradient. The scale that results is guidance / (1 - mixing)."""
    target = guidance * velocity + mixing * conditional + (1 - guidance - mixing) * null
    return target.detach()


def adaptive_loss(error: Tensor, power: float = 1.0, floor: float = 1e-3) -> Tensor:
    """The mean over the batch of |error|^2 / stop(|error|^2 + floor)^power, error (B, ...) -> scalar. With power 1 each
    sample weighs alike, as in MeanFlow."""
    squared = error.flatten(1).square().sum(1)
    return (squared / (squared.detach() + floor) ** power).mean()
