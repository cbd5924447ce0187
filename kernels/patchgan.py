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

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ._op import EMPTY, Cost, Op, Sample
from ._twins import twins

__all__ = ["affine_act", "affine_act_ref", "norm_act", "norm_act_ref"]

_NORMS = ("batch", "group", "instance")


# ---- reference -----------------------------------------------------------------------------------------------------


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
        count = groups if norm == "group" else channels
        unit, over, shape = z.reshape(batch, count, -1), (2,), (batch, count, 1)
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


# ---- launchers: the native library's CPU and CUDA functions take the same arguments ----------------------------------


def _stats_shape(x: Tensor, norm: str, groups: int) -> tuple[int, ...]:
    return {"batch": (x.shape[1],), "group": (x.shape[0], groups), "instance": (x.shape[0], x.shape[1])}[norm]


def _group_count(x: Tensor, norm: str, groups: int) -> int:
    """How the native functions name the norm: the number of groups, 0 for batch statistics."""
    return {"batch": 0, "group": groups, "instance": x.shape[1]}[norm]


def _workspace(x: Tensor, units: int = 0) -> Tensor:
    """Three floats per block of 8192 elements of a plane (csrc/cuda's kPiece) and two per unit."""
    pieces = -(-x.shape[2] * x.shape[3] // 8192)
    return x.new_empty(x.shape[0] * x.shape[1] * pieces * 3 + units * 2, dtype=torch.float32)


def _gradients(tensors: Sequence[Any], needs: Sequence[bool]) -> list[Tensor | None]:
    return [torch.empty_like(t) if n else None for t, n in zip(tensors, needs)]


def _norm_forward(run: Callable[..., None], *args: Any) -> tuple[Tensor, ...]:
    x, conv_bias, weight, bias, norm, groups, eps, slope = args
    y, mean, var, stats = _fake("", *args)
    run(x, conv_bias, weight, bias, y, mean, var, stats, _workspace(x), _group_count(x, norm, groups), eps, slope)
    return y, mean, var, stats


def _norm_backward(
    run: Callable[..., None],
    grads: Sequence[Tensor],
    saved: Sequence[Tensor],
    args: tuple[Any, ...],
    needs: Sequence[bool],
) -> Sequence[Tensor | None]:
    x, conv_bias, weight, bias, norm, groups, _eps, slope = args
    found, work = _gradients(args[:4], needs), _workspace(x, saved[0].shape[0])
    run(grads[0], x, conv_bias, weight, bias, saved[0], *found, work, _group_count(x, norm, groups), slope)
    return [*found, None, None, None, None]


def _affine_forward(run: Callable[..., None], *args: Any) -> tuple[Tensor, ...]:
    y = torch.empty_like(args[0])
    x, conv_bias, mean, var, weight, bias, eps, slope = args
    run(x, conv_bias, mean, var, weight, bias, y, eps, slope)
    return (y,)


def _affine_backward(
    run: Callable[..., None], dy: Tensor, saved: Sequence[Tensor], args: tuple[Any, ...], needs: Sequence[bool]
) -> Sequence[Tensor | None]:
    found = _gradients(args[:6], needs)
    run(dy, *args[:6], *found, _workspace(args[0]), *args[6:])
    return [*found, None, None]


# ---- records -------------------------------------------------------------------------------------------------------


def _check_vectors(op: str, x: Tensor, vectors: dict[str, Tensor | None]) -> None:
    if x.ndim != 4:
        raise ValueError(f"{op}: x must be (B, C, H, W), got {tuple(x.shape)}")
    for name, v in vectors.items():
        if v is not None and tuple(v.shape) != (x.shape[1],):
            raise ValueError(f"{op}: {name} must be ({x.shape[1]},) for x {tuple(x.shape)}, got {tuple(v.shape)}")


def _check(
    x: Tensor,
    conv_bias: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    norm: str,
    groups: int,
    eps: float,
    slope: float,
) -> None:
    _check_vectors("norm_act", x, {"conv_bias": conv_bias, "weight": weight, "bias": bias})
    if norm not in _NORMS:
        raise ValueError(f"norm_act: norm must be one of {', '.join(_NORMS)}, got {norm!r}; eval, act: use affine_act")
    if norm == "group" and (groups < 1 or x.shape[1] % groups):
        raise ValueError(f"norm_act: groups must divide the {x.shape[1]} channels, got {groups}")


def _affine_check(
    x: Tensor,
    conv_bias: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    slope: float,
) -> None:
    vectors = {"conv_bias": conv_bias, "mean": mean, "var": var, "weight": weight, "bias": bias}
    _check_vectors("affine_act", x, vectors)


def _unsupported(backend: str, x: Tensor, *rest: Any) -> str | None:
    return EMPTY if x.numel() == 0 else None


def _fake(name: str, *args: Any) -> tuple[Tensor, ...]:
    x, norm, groups = args[0], args[4], args[5]
    shape = _stats_shape(x, norm, groups)
    mean, var = (x.new_empty(shape, dtype=torch.float32) for _ in range(2))
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    return y, mean, var, x.new_empty((*shape, 2), dtype=torch.float32).flatten(0, -2)


def _affine_fake(name: str, *args: Any) -> tuple[Tensor, ...]:
    return (torch.empty_like(args[0], memory_format=torch.contiguous_format),)


def _case(label: str, shape: Sequence[int], names: str, real: bool = False, **options: Any) -> Sample:
    """names: the vectors that are given."""

    def make(randn: Callable[..., Tensor]) -> dict[str, Any]:
        args: dict[str, Any] = {"x": 1 + 2 * randn(*shape)}
        for name in names.split():
            v = randn(shape[1], dtype=torch.float32)
            args[name] = v.abs() + 0.5 if name == "var" else 1 + v if name == "weight" else v
        return args | options

    return Sample(label, make, real)


def _samples() -> Iterable[Sample]:
    yield _case("batch: odd plane", (3, 5, 7, 9), "weight bias")
    yield _case("batch: conv bias, no affine", (2, 3, 4, 8), "conv_bias")
    yield _case("group: conv bias", (2, 8, 5, 6), "conv_bias weight bias", norm="group", groups=4, eps=1e-6)
    yield _case("group: one group, no activation", (2, 3, 3, 5), "weight", norm="group", groups=1, slope=1.0)
    yield _case("instance", (2, 3, 6, 11), "conv_bias weight bias", norm="instance")
    yield _case("batch: more than one block", (2, 2, 67, 64), "weight bias")
    yield _case("PatchGAN layer 2, 256 px", (8, 128, 64, 64), "weight bias", real=True)
    yield _case("PatchGAN layer 3, 256 px", (8, 256, 32, 32), "weight bias", real=True)
    yield _case("PatchGAN layer 4, 256 px", (8, 512, 31, 31), "weight bias", real=True)
    group: dict[str, Any] = {"norm": "group", "groups": 32, "eps": 1e-6}
    yield _case("MaskBit layer 2, 256 px", (4, 64, 128, 128), "conv_bias weight bias", real=True, **group)


def _affine_samples() -> Iterable[Sample]:
    yield _case("eval batch norm", (3, 5, 7, 9), "conv_bias mean var weight bias")
    yield _case("bias and LeakyReLU", (2, 3, 4, 8), "bias")
    yield _case("ActNorm", (2, 4, 5, 5), "conv_bias weight")
    yield _case("LeakyReLU alone", (1, 1, 1, 3), "")
    yield _case("no activation, mean only", (2, 3, 65, 64), "mean", slope=1.0)
    yield _case("PatchGAN layer 1, 256 px", (8, 64, 128, 128), "bias", real=True)
    yield _case("PatchGAN layer 2 in eval, 256 px", (8, 128, 64, 64), "mean var weight bias", real=True)


def _cost(x: Tensor, *rest: Any, **named: Any) -> Cost:
    """Ideal: x read once. (On a GPU it is read twice where a unit exceeds shared memory.)"""
    vectors = sum(4 * v.numel() for v in (*rest, *named.values()) if isinstance(v, Tensor))
    return Cost(9 * x.numel(), 2 * x.numel() * x.element_size() + vectors, 2)


def _affine_cost(x: Tensor, *rest: Any, **named: Any) -> Cost:
    vectors = sum(4 * v.numel() for v in (*rest, *named.values()) if isinstance(v, Tensor))
    return Cost(4 * x.numel(), 2 * x.numel() * x.element_size() + vectors, 1)


_norm_act_cpu, _norm_act_cuda = twins("norm_act", _norm_forward, _norm_backward)
norm_act = Op(
    "norm_act",
    ref=norm_act_ref,
    cpu=(_norm_act_cpu,),
    cuda=(_norm_act_cuda,),
    fake=_fake,
    outputs=3,
    detached=2,
    saved=1,
    check=_check,
    unsupported=_unsupported,
    samples=_samples,
    cost=_cost,
    fp32=frozenset({"conv_bias", "weight", "bias"}),
)

_affine_act_cpu, _affine_act_cuda = twins("affine_act", _affine_forward, _affine_backward)
affine_act = Op(
    "affine_act",
    ref=affine_act_ref,
    cpu=(_affine_act_cpu,),
    cuda=(_affine_act_cuda,),
    fake=_affine_fake,
    check=_affine_check,
    unsupported=_unsupported,
    samples=_affine_samples,
    cost=_affine_cost,
    fp32=frozenset({"conv_bias", "mean", "var", "weight", "bias"}),
)
