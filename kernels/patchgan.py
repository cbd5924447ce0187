# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""norm_act and affine_act: what stands between two convolutions of a discriminator, in as few passes as it can be.

    norm_act:    y = LeakyReLU(norm(x + conv_bias) * weight + bias), statistics of x: batch, group or instance norm
    affine_act:  y = LeakyReLU((x + conv_bias - mean) / sqrt(var + eps) * weight + bias), each part optional:
                 BatchNorm in eval (mean, var given), ActNorm (conv_bias = loc, weight = scale), bias + LeakyReLU

x (B, C, H, W) contiguous. norm_act reads x twice and writes y once, the second time from the cache where the planes
that share statistics fit in it; its backward reads x and dy for two sums and again for dx. affine_act reads once and
writes once, in both directions. Kept for the backward: x and the statistics; the pre-activation is computed again.

Statistics are fp32 and robust: two passes within a block, blocks merged by Chan's formula (Chan, Golub & LeVeque 1983),
so that a mean of 1000 standard deviations costs no digits. The conv bias is added here so that the convolution need not
do a pass for it; batch and instance norm remove it again, hence its gradient there is exactly zero.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ._native_call import twins
from ._op import Op
from ._record import Sample

__all__ = ["affine_act", "affine_act_ref", "norm_act", "norm_act_ref"]

_NORMS = ("batch", "group", "instance")


def norm_act_ref(
    x: Tensor,
    conv_bias: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    norm: str = "batch",
    groups: int = 1,
    eps: float = 1e-5,
    slope: float = 0.2,
) -> tuple[Tensor, Tensor, Tensor]:
    """LeakyReLU(norm(x + conv_bias) * weight + bias), and the mean and biased variance of x + conv_bias.

    x (B, C, H, W) bf16, fp16 or fp32 (fp64: reference only). conv_bias, weight, bias (C,) fp32, each optional.
    norm: "batch", statistics per channel over the batch (training); "group", per image and group of C / groups channels
        (`groups` counts only here); "instance", per image and channel. Statistics and arithmetic are fp32.
    eps: added to the biased variance. slope: of the negative side; 1.0 for no activation.
    Returns y like x and, fp32 and without gradient, mean and biased variance: (C,), (B, groups) or (B, C). Running
    statistics of BatchNorm take the unbiased one: var * n / (n - 1) with n = B * H * W.
    Raises ValueError when shapes do not fit together. Ioffe & Szegedy 2015, arXiv 1502.03167; Wu & He 2018, 1803.08494.
    """
    batch, channels = x.shape[:2]
    full = x.to(torch.promote_types(x.dtype, torch.float32))
    z = full if conv_bias is None else full + _per_channel(conv_bias)
    over: tuple[int, ...]
    shape: tuple[int, ...]
    if norm == "batch":
        unit, over, shape = z, (0, 2, 3), (1, channels, 1, 1)
    else:
        unit = z.flatten(2) if norm == "instance" else z.unflatten(1, (groups, -1)).flatten(2)
        over, shape = (2,), (batch, unit.shape[1], 1)
    var, mean = torch.var_mean(unit, over, correction=0)
    y = ((unit - mean.view(shape)) * torch.rsqrt(var + eps).view(shape)).reshape(z.shape)
    if weight is not None:
        y = y * _per_channel(weight)
    if bias is not None:
        y = y + _per_channel(bias)
    return F.leaky_relu(y, slope).to(x.dtype), mean.detach(), var.detach()


def affine_act_ref(
    x: Tensor,
    conv_bias: Tensor | None = None,
    mean: Tensor | None = None,
    var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    slope: float = 0.2,
) -> Tensor:
    """LeakyReLU((x + conv_bias - mean) / sqrt(var + eps) * weight + bias).

    x (B, C, H, W) bf16, fp16 or fp32 (fp64: reference only); the vectors (C,) fp32, each optional (absent: 0 for
    conv_bias, mean and bias, 1 for weight, no division for var), all with gradients. slope: of the negative side; 1.0
    for no activation. Arithmetic is fp32. Returns (B, C, H, W) like x. Raises ValueError when shapes do not fit.
    ActNorm: Kingma & Dhariwal 2018, arXiv 1807.03039 (its data-dependent start values are the caller's).
    """
    y = x.to(torch.promote_types(x.dtype, torch.float32))
    if conv_bias is not None:
        y = y + _per_channel(conv_bias)
    if mean is not None:
        y = y - _per_channel(mean)
    if var is not None:
        y = y * torch.rsqrt(_per_channel(var) + eps)
    if weight is not None:
        y = y * _per_channel(weight)
    if bias is not None:
        y = y + _per_channel(bias)
    return F.leaky_relu(y, slope).to(x.dtype)


def _per_channel(v: Tensor) -> Tensor:
    return v.view(1, -1, 1, 1)


# ---- records: the native library's CPU and CUDA functions take the same arguments ------------------------------------


def _stats_shape(a: Any) -> tuple[int, ...]:
    return {"batch": (a.x.shape[1],), "group": (a.x.shape[0], a.groups), "instance": tuple(a.x.shape[:2])}[a.norm]


def _workspace(a: Any, units: int = 0) -> Tensor:
    """Three floats per block of 8192 elements of a plane (csrc/cuda's kPiece) and two per unit."""
    pieces = -(-a.x.shape[2] * a.x.shape[3] // 8192)
    return a.x.new_empty(a.x.shape[0] * a.x.shape[1] * pieces * 3 + units * 2, dtype=torch.float32)


def _norm_out(a: Any, backend: str) -> tuple[Tensor, ...]:
    shape = _stats_shape(a)
    mean, var = (a.x.new_empty(shape, dtype=torch.float32) for _ in range(2))
    y = torch.empty_like(a.x, memory_format=torch.contiguous_format)
    return y, mean, var, a.x.new_empty(math.prod(shape), 2, dtype=torch.float32)


def _check(a: Any) -> None:
    if a.norm not in _NORMS:
        raise ValueError(
            f"norm_act: norm must be one of {', '.join(_NORMS)}, got {a.norm!r}; eval, act: use affine_act"
        )
    if a.norm == "group" and (a.groups < 1 or a.x.shape[1] % a.groups):
        raise ValueError(f"norm_act: groups must divide the {a.x.shape[1]} channels, got {a.groups}")


def _case(label: str, shape: Sequence[int], names: str, real: bool = False, **options: Any) -> Sample:
    """names: the vectors that are given."""

    def make(randn: Callable[..., Tensor]) -> dict[str, Any]:
        args: dict[str, Any] = {"x": 1 + 2 * randn(*shape)}
        for name in names.split():
            v = randn(shape[1], dtype=torch.float32)
            args[name] = v.abs() + 0.5 if name == "var" else 1 + v if name == "weight" else v
        return args | options

    return Sample(label, make, real)


norm_act = Op(
    "norm_act",
    ref=norm_act_ref,
    outputs=("y", "mean", "var"),
    detached=("mean", "var"),
    saved=("stats",),
    out=_norm_out,
    shapes={"x": "B C H W", "conv_bias": "C", "weight": "C", "bias": "C"},
    check=_check,
    roles=dict.fromkeys(("conv_bias", "weight", "bias"), "fp32"),
    **twins(
        "norm_act_fwd x conv_bias weight bias y mean var stats workspace group_count eps slope",
        "norm_act_bwd d_y x conv_bias weight bias stats d_x d_conv_bias d_weight d_bias workspace group_count slope",
        workspace=lambda a: _workspace(a, math.prod(_stats_shape(a))),
        group_count=lambda a: {"batch": 0, "group": a.groups, "instance": a.x.shape[1]}[a.norm],
    ),
    samples=[
        _case("batch: odd plane", (3, 5, 7, 9), "weight bias"),
        _case("batch: conv bias, no affine", (2, 3, 4, 8), "conv_bias"),
        _case("group: conv bias", (2, 8, 5, 6), "conv_bias weight bias", norm="group", groups=4, eps=1e-6),
        _case("group: one group, no activation", (2, 3, 3, 5), "weight", norm="group", groups=1, slope=1.0),
        _case("instance", (2, 3, 6, 11), "conv_bias weight bias", norm="instance"),
        _case("batch: more than one block", (2, 2, 67, 64), "weight bias"),
        _case("PatchGAN layer 2, 256 px", (8, 128, 64, 64), "weight bias", real=True),
        _case("PatchGAN layer 3, 256 px", (8, 256, 32, 32), "weight bias", real=True),
        _case("PatchGAN layer 4, 256 px", (8, 512, 31, 31), "weight bias", real=True),
        _case("MaskBit layer 2, 256 px", (4, 64, 128, 128), "conv_bias weight bias", real=True,
              norm="group", groups=32, eps=1e-6),
    ],
    flops=lambda a: 9 * a.x.numel(),
)  # fmt: skip

_VECTORS = ("conv_bias", "mean", "var", "weight", "bias")
affine_act = Op(
    "affine_act",
    ref=affine_act_ref,
    shapes={"x": "B C H W"} | dict.fromkeys(_VECTORS, "C"),
    roles=dict.fromkeys(_VECTORS, "fp32"),
    **twins(
        "affine_act_fwd x conv_bias mean var weight bias y eps slope",
        "affine_act_bwd d_y x conv_bias mean var weight bias d_x d_conv_bias d_mean d_var d_weight d_bias workspace "
        "eps slope",
        workspace=_workspace,
    ),
    samples=[
        _case("eval batch norm", (3, 5, 7, 9), "conv_bias mean var weight bias"),
        _case("bias and LeakyReLU", (2, 3, 4, 8), "bias"),
        _case("ActNorm", (2, 4, 5, 5), "conv_bias weight"),
        _case("LeakyReLU alone", (1, 1, 1, 3), ""),
        _case("no activation, mean only", (2, 3, 65, 64), "mean", slope=1.0),
        _case("PatchGAN layer 1, 256 px", (8, 64, 128, 128), "bias", real=True),
        _case("PatchGAN layer 2 in eval, 256 px", (8, 128, 64, 64), "mean var weight bias", real=True),
    ],
    flops=lambda a: 4 * a.x.numel(),
)
