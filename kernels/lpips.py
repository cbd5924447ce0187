# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""lpips_tail: what LPIPS does with two feature maps of a layer, down to one distance per image.

    n = f / (||f|| + eps), the norm over channels        distance = mean over pixels of sum_c weight_c (n0_c - n1_c)^2

LPIPS (Zhang et al. 2018, arXiv 1801.03924) adds this up over five layers of VGG16; `weight` is a layer's linear head, a
1x1 convolution without bias. At a pixel whose features are all zero (all channels cut by ReLU) n is 0 and so is its
gradient here; plain autograd makes it NaN.

Forward reads each map once: a program holds all channels of a few pixels, takes the norms, then the differences. (The
square is not expanded into three sums, of which a single sweep would do: they cancel where the maps are alike.) It
saves four numbers a pixel,

    r0, r1 = 1 / (||f|| + eps)    k0 = r0^2 / ||f0|| sum_c w d f0,  k1 = r1^2 / ||f1|| sum_c w d f1,  d = f0 r0 - f1 r1

with which the backward is elementwise, d_f0 = u (w d r0 - f0 k0), d_f1 = u (f1 k1 - w d r1), u = 2 d_out / (H W), and
skips the map that needs none. Everything is computed in fp32 and the distance is fp32, whatever the features are: it is
a loss. Features in the memory format channels_last are passed as (B, H, W, C), uncopied, with channels_last=True.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ._native_call import native
from ._op import Op
from ._record import Backend, Sample
from ._tiles import LPIPS_BACKWARD, LPIPS_CHANNELS, LPIPS_FORWARD, next_power_of_2, over_grid
from ._triton import add_up, tl, triton

__all__ = ["lpips_tail", "lpips_tail_ref"]


def lpips_tail_ref(f0: Tensor, f1: Tensor, weight: Tensor, channels_last: bool = False, eps: float = 1e-10) -> Tensor:
    """Mean over pixels of sum_c weight_c (f0_c / (||f0|| + eps) - f1_c / (||f1|| + eps))^2.

    f0, f1 (B, C, H, W), or (B, H, W, C) with channels_last=True: what `x.permute(0, 2, 3, 1)` of a tensor in torch's
    channels_last memory format is, without a copy (as it is, (B, C, H, W), such a tensor is copied to planar first).
    bf16, fp16 or fp32 (fp64: reference only), brought to their widest dtype. weight (C,), any sign, fp32.
    Returns (B,) fp32 (fp64 for fp64), under autocast too. Gradients go to all three, the features' in their dtype; they
    are zero at pixels whose features are all zero. Raises ValueError when shapes do not fit together.
    """
    dim = 3 if channels_last else 1

    def unit(f: Tensor) -> Tensor:
        f = f if f.dtype == torch.float64 else f.float()
        norm = torch.linalg.vector_norm(f, dim=dim, keepdim=True)
        return f / torch.where(norm != 0, norm + eps, torch.inf)  # x / inf: zero, and so is its gradient

    shape = [1, 1, 1, 1]
    shape[dim] = weight.shape[0]
    return ((unit(f0) - unit(f1)).square() * weight.view(shape)).sum(dim).mean((1, 2))


@triton.jit
def _lpips_at(b, offs_c, offs_p, C: tl.constexpr, S, CHANNELS_LAST: tl.constexpr):
    if CHANNELS_LAST:
        return b * S * C + offs_p[None, :] * C + offs_c[:, None]
    else:
        return b * C * S + offs_c[:, None] * S + offs_p[None, :]


@triton.jit
def _lpips_inverse(norm, eps):
    return tl.where(norm == 0.0, 0.0, 1.0 / (norm + eps))


@triton.jit
def _lpips_difference(x, r0, y, r1):
    """x r0 - y r1. Left to itself the compiler fuses one of the products, and equal maps get a distance of 1e-16."""
    b = y * r1
    return tl.fma(x, r0, -b) - tl.fma(y, r1, -b)


@triton.jit
def _lpips_fwd_kernel(
    f0_ptr, f1_ptr, weight_ptr, sums_ptr, stats_ptr, S, eps,
    C: tl.constexpr, PAD: tl.constexpr, BLOCK_P: tl.constexpr, CHANNELS_LAST: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_P pixels of one image, all channels. sums (B, blocks): its distances' sum, stats (B, 4, S)."""
    pid_p, b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    offs_c = tl.arange(0, PAD)
    offs_p = (pid_p * BLOCK_P + tl.arange(0, BLOCK_P)).to(tl.int64)
    live = offs_p < S
    mask = (offs_c < C)[:, None] & live[None, :]
    at = _lpips_at(b, offs_c.to(tl.int64), offs_p, C, S, CHANNELS_LAST)
    x = tl.load(f0_ptr + at, mask=mask, other=0.0).to(tl.float32)
    y = tl.load(f1_ptr + at, mask=mask, other=0.0).to(tl.float32)
    w = tl.load(weight_ptr + offs_c, mask=offs_c < C, other=0.0)[:, None]
    norm0 = tl.sqrt_rn(tl.sum(x * x, 0))
    norm1 = tl.sqrt_rn(tl.sum(y * y, 0))
    r0, r1 = _lpips_inverse(norm0, eps), _lpips_inverse(norm1, eps)
    d = _lpips_difference(x, r0[None, :], y, r1[None, :])
    wd = w * d
    tl.store(sums_ptr + b * tl.num_programs(0) + pid_p, tl.sum(tl.sum(wd * d, 0), 0))
    k0 = tl.sum(wd * x, 0) * r0 * r0 / tl.where(norm0 == 0.0, 1.0, norm0)  # r is 0 where the norm is
    k1 = tl.sum(wd * y, 0) * r1 * r1 / tl.where(norm1 == 0.0, 1.0, norm1)
    stats = stats_ptr + b * 4 * S + offs_p
    tl.store(stats, r0, mask=live)
    tl.store(stats + S, r1, mask=live)
    tl.store(stats + 2 * S, k0, mask=live)
    tl.store(stats + 3 * S, k1, mask=live)


@triton.jit
def _lpips_bwd_kernel(
    f0_ptr, f1_ptr, dout_ptr, weight_ptr, stats_ptr, d0_ptr, d1_ptr, dweight_ptr, S, u,
    C: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, CHANNELS_LAST: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_C channels of BLOCK_P pixels of one image. dweight (B, blocks of pixels, C): its sums.
    u = 2 / S."""
    pid_p, pid_c, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    offs_c = pid_c * BLOCK_C + tl.arange(0, BLOCK_C)
    offs_p = (pid_p * BLOCK_P + tl.arange(0, BLOCK_P)).to(tl.int64)
    live = offs_p < S
    mask = (offs_c < C)[:, None] & live[None, :]
    at = _lpips_at(b, offs_c.to(tl.int64), offs_p, C, S, CHANNELS_LAST)
    stats = stats_ptr + b * 4 * S + offs_p
    r0 = tl.load(stats, mask=live, other=0.0)[None, :]
    r1 = tl.load(stats + S, mask=live, other=0.0)[None, :]
    x = tl.load(f0_ptr + at, mask=mask, other=0.0).to(tl.float32)
    y = tl.load(f1_ptr + at, mask=mask, other=0.0).to(tl.float32)
    u = tl.load(dout_ptr + b) * u
    d = _lpips_difference(x, r0, y, r1)
    wd = tl.load(weight_ptr + offs_c, mask=offs_c < C, other=0.0)[:, None] * d
    if d0_ptr is not None:
        k0 = tl.load(stats + 2 * S, mask=live, other=0.0)[None, :]
        tl.store(d0_ptr + at, (u * (wd * r0 - x * k0)).to(d0_ptr.dtype.element_ty), mask=mask)
    if d1_ptr is not None:
        k1 = tl.load(stats + 3 * S, mask=live, other=0.0)[None, :]
        tl.store(d1_ptr + at, (u * (y * k1 - wd * r1)).to(d1_ptr.dtype.element_ty), mask=mask)
    if dweight_ptr is not None:
        row = (b * tl.num_programs(0) + pid_p) * C
        tl.store(dweight_ptr + row + offs_c, 0.5 * u * tl.sum(d * d, 1), mask=offs_c < C)


def _sizes(a: Any) -> tuple[int, int, int]:
    """(B, C, pixels)."""
    batch, *sizes = a.f0.shape
    channels = sizes.pop(2 if a.channels_last else 0)
    return batch, channels, sizes[0] * sizes[1]


def _forward(a: Any, out: Any) -> None:
    batch, channels, pixels = _sizes(a)
    pad = next_power_of_2(channels)
    block = max(16, min(LPIPS_FORWARD // pad, next_power_of_2(pixels)))
    blocks = -(-pixels // block)
    sums = a.f0.new_empty(batch, blocks, dtype=torch.float32)
    _lpips_fwd_kernel[(blocks, batch)](
        a.f0, a.f1, a.weight, sums, out.stats, pixels, a.eps,
        C=channels, PAD=pad, BLOCK_P=block, CHANNELS_LAST=a.channels_last,
        num_warps=min(16, max(1, pad * block // 512)),
    )  # fmt: skip
    torch.sum(sums, 1, out=out.distance).div_(pixels)


def _backward(a: Any, out: Any, g: Any, d: Any) -> None:
    batch, channels, pixels = _sizes(a)
    # long runs along the dimension that lies dense in memory
    block_c = min(128 if a.channels_last else 8, next_power_of_2(channels))
    block_p = min(LPIPS_BACKWARD // block_c, max(16, next_power_of_2(pixels)))
    blocks = -(-pixels // block_p)
    sums = None if d.weight is None else a.weight.new_empty(batch, blocks, channels)
    _lpips_bwd_kernel[(blocks, -(-channels // block_c), batch)](
        a.f0, a.f1, g.distance, a.weight, out.stats, d.f0, d.f1, sums, pixels, 2 / pixels,
        C=channels, BLOCK_C=block_c, BLOCK_P=block_p, CHANNELS_LAST=a.channels_last,
        num_warps=max(1, block_c * block_p // 256),
    )  # fmt: skip
    add_up(sums, (0, 1), d.weight)


def _out(a: Any, backend: str) -> tuple[Tensor, ...]:
    batch, _, pixels = _sizes(a)
    return a.f0.new_empty(batch, dtype=torch.float32), a.f0.new_empty(batch, 4, pixels, dtype=torch.float32)


def _check(a: Any) -> None:
    channels, layout = _sizes(a)[1], "(B, H, W, C)" if a.channels_last else "(B, C, H, W)"
    if a.weight.shape[0] != channels:
        raise ValueError(
            f"lpips_tail: weight must be ({channels},) for f0 {layout} {tuple(a.f0.shape)}, got {tuple(a.weight.shape)}"
        )


def _why_not_triton(a: Any) -> str | None:
    if a.weight.shape[0] > LPIPS_CHANNELS:
        return f"{a.weight.shape[0]} channels: a program holds all of a pixel's, at most {LPIPS_CHANNELS}"
    return over_grid(batch=a.f0.shape[0])


def _case(label: str, shape: tuple[int, int, int, int], channels_last: bool = False, real: bool = False) -> Sample:
    """Features as after ReLU, in the first image with a pixel of zeros; weights as LPIPS has them, not negative."""

    def make(randn: Callable[..., Tensor]) -> dict[str, Any]:
        f0, f1 = randn(*shape).relu(), randn(*shape).relu()
        weight = randn(shape[3 if channels_last else 1], dtype=torch.float32).abs()
        return {"f0": f0, "f1": f1, "weight": weight, "channels_last": channels_last}

    return Sample(label, make, real)


lpips_tail = Op(
    "lpips_tail",
    ref=lpips_tail_ref,
    outputs=("distance",),
    saved=("stats",),
    out=_out,
    shapes={"f0": "B D1 D2 D3", "f1": "B D1 D2 D3", "weight": "C"},  # channels first or last
    check=_check,
    roles={"weight": "fp32"},
    cpu=[
        native(
            "lpips_fwd f0 f1 weight distance stats channels_last eps",
            "lpips_bwd d_distance f0 f1 weight stats d_f0 d_f1 d_weight channels_last",
        )
    ],
    cuda=[Backend("triton", _forward, _backward, _why_not_triton)],
    samples=[
        _case("odd sizes", (2, 5, 3, 7)),
        _case("channels last", (2, 3, 5, 6), True),
        _case("blocks of pixels, one channel", (1, 1, 9, 131)),
        _case("one pixel", (3, 20, 1, 1)),
        _case("blocks of channels, last", (1, 2, 3, 131), True),
        *(_case(f"VGG {channels} x {size} x {size}", (2, channels, size, size), real=True)
          for channels, size in ((64, 256), (128, 128), (256, 64), (512, 32), (512, 16))),
        _case("VGG 64 x 256 x 256, channels last", (2, 256, 256, 64), True, real=True),
        _case("VGG 512 x 32 x 32, channels last", (2, 32, 32, 512), True, real=True),
    ],
    # per element: 2 norms of 2, 3 for the difference, 1 for w d, 2 each for the distance and the two projections
    flops=lambda a: 14 * a.f0.numel(),
)  # fmt: skip
