# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""Triton kernels and launchers of adaln and residual_adaln (see adaln.py): one pair of kernels serves both.

Forward: one program a row, which stays in registers from the load of x (and of the residual branch) to the store of y.
Backward: one program CHUNK rows of one image, in order; its sums over rows go to one fp32 row per program, which the
launcher adds. Pointers of absent tensors are None, which Triton specialises on.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._tiles import row_chunk, row_options
from ._triton import tl, triton

__all__ = ["backward", "forward"]


@triton.jit
def _residual_row(
    x_ptr, branch_ptr, gate_ptr, row, sample, offs_d, live, D: tl.constexpr, PER_IMAGE_GATE: tl.constexpr
):
    """The row that is normed, fp32: x, or x + gate * branch rounded to x's dtype, as if it came from memory."""
    x = tl.load(x_ptr + row * D + offs_d, mask=live, other=0.0).to(tl.float32)
    if branch_ptr is not None:
        branch = tl.load(branch_ptr + row * D + offs_d, mask=live, other=0.0).to(tl.float32)
        if gate_ptr is not None:
            at = sample * D if PER_IMAGE_GATE else 0
            branch *= tl.load(gate_ptr + at + offs_d, mask=live, other=0.0).to(tl.float32)
        x = (x + branch).to(x_ptr.dtype.element_ty).to(tl.float32)
    return x


@triton.jit
def _modulation_row(row, mask, N, T, D: tl.constexpr, PER_TOKEN: tl.constexpr):
    """(offset of the row's shift and scale, mask): the last T tokens have their own, or all share the image's."""
    if PER_TOKEN:
        t = row % N - (N - T)
        return (row // N * T + t) * D, mask & (t >= 0)
    else:
        return row // N * D, mask


@triton.jit
def _adaln_fwd_kernel(
    x_ptr, branch_ptr, gate_ptr, shift_ptr, scale_ptr, weight_ptr, bias_ptr, h_ptr, y_ptr, stats_ptr,
    N, T, eps, offset,
    D: tl.constexpr, PAD: tl.constexpr, PER_TOKEN: tl.constexpr, PER_IMAGE_GATE: tl.constexpr, RMS: tl.constexpr,
):  # fmt: skip
    """One program: one row. stats (B * N, 2) fp32: mean (0 for RMSNorm) and 1 / sqrt(var + eps)."""
    row = tl.program_id(0).to(tl.int64)
    offs_d = tl.arange(0, PAD)
    mask = offs_d < D
    x = _residual_row(x_ptr, branch_ptr, gate_ptr, row, row // N, offs_d, mask, D, PER_IMAGE_GATE)
    if h_ptr is not None:
        tl.store(h_ptr + row * D + offs_d, x.to(h_ptr.dtype.element_ty), mask=mask)
    mean = 0.0
    if not RMS:
        mean = tl.sum(x, 0) / D
        x = tl.where(mask, x - mean, 0.0)
    rstd = tl.rsqrt(tl.sum(x * x, 0) / D + eps)
    tl.store(stats_ptr + row * 2, mean)
    tl.store(stats_ptr + row * 2 + 1, rstd)
    y = x * rstd
    if weight_ptr is not None:
        y *= tl.load(weight_ptr + offs_d, mask=mask, other=0.0)
    if bias_ptr is not None:
        y += tl.load(bias_ptr + offs_d, mask=mask, other=0.0)
    at, mask_t = _modulation_row(row, mask, N, T, D, PER_TOKEN)
    if scale_ptr is not None:
        y *= offset + tl.load(scale_ptr + at + offs_d, mask=mask_t, other=1.0 - offset).to(tl.float32)
    if shift_ptr is not None:
        y += tl.load(shift_ptr + at + offs_d, mask=mask_t, other=0.0).to(tl.float32)
    tl.store(y_ptr + row * D + offs_d, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _adaln_bwd_kernel(
    dh_ptr, dy_ptr, x_ptr, branch_ptr, gate_ptr, scale_ptr, weight_ptr, bias_ptr, stats_ptr,
    dx_ptr, dbranch_ptr, dgate_ptr, dshift_ptr, dscale_ptr, dweight_ptr, dbias_ptr,
    N, T, offset,
    D: tl.constexpr, PAD: tl.constexpr, PER_TOKEN: tl.constexpr, PER_IMAGE_GATE: tl.constexpr, RMS: tl.constexpr,
    CHUNK: tl.constexpr,
):  # fmt: skip
    """One program: CHUNK tokens of one image. Writes d_x, d_branch (and per-token d_shift, d_scale); the sums over its
    tokens (d_gate, per-image d_shift and d_scale, d_weight, d_bias) go to one row per program, (B * chunks, D) fp32."""
    pid_n, pid_b = tl.program_id(0), tl.program_id(1)
    program = (pid_b * tl.num_programs(0) + pid_n).to(tl.int64)
    offs_d = tl.arange(0, PAD)
    mask = offs_d < D
    sum_gate = tl.zeros((PAD,), tl.float32)
    sum_shift = tl.zeros((PAD,), tl.float32)
    sum_scale = tl.zeros((PAD,), tl.float32)
    sum_weight = tl.zeros((PAD,), tl.float32)
    sum_bias = tl.zeros((PAD,), tl.float32)
    for i in range(0, CHUNK):
        n = pid_n * CHUNK + i
        live = mask & (n < N)
        row = (pid_b * N + n).to(tl.int64)
        mean = tl.load(stats_ptr + row * 2, mask=n < N, other=0.0)
        rstd = tl.load(stats_ptr + row * 2 + 1, mask=n < N, other=0.0)
        x = _residual_row(x_ptr, branch_ptr, gate_ptr, row, pid_b.to(tl.int64), offs_d, live, D, PER_IMAGE_GATE)
        dy = tl.load(dy_ptr + row * D + offs_d, mask=live, other=0.0).to(tl.float32)
        x_hat = tl.where(live, (x - mean) * rstd, 0.0)
        at, mask_t = _modulation_row(row, live, N, T, D, PER_TOKEN)
        if dshift_ptr is not None:
            if PER_TOKEN:
                tl.store(dshift_ptr + at + offs_d, dy.to(dshift_ptr.dtype.element_ty), mask=mask_t)
            else:
                sum_shift += dy
        if dscale_ptr is not None:
            normed = x_hat
            if weight_ptr is not None:
                normed *= tl.load(weight_ptr + offs_d, mask=mask, other=0.0)
            if bias_ptr is not None:
                normed += tl.load(bias_ptr + offs_d, mask=mask, other=0.0)
            if PER_TOKEN:
                tl.store(dscale_ptr + at + offs_d, (dy * normed).to(dscale_ptr.dtype.element_ty), mask=mask_t)
            else:
                sum_scale += dy * normed
        if scale_ptr is not None:
            dy *= offset + tl.load(scale_ptr + at + offs_d, mask=mask_t, other=1.0 - offset).to(tl.float32)
        if dweight_ptr is not None:
            sum_weight += dy * x_hat
        if dbias_ptr is not None:
            sum_bias += dy
        if weight_ptr is not None:
            dy *= tl.load(weight_ptr + offs_d, mask=mask, other=0.0)
        dx = dy - x_hat * (tl.sum(dy * x_hat, 0) / D)
        if not RMS:
            dx -= tl.sum(dy, 0) / D
        dx *= rstd
        if dh_ptr is not None:
            dx += tl.load(dh_ptr + row * D + offs_d, mask=live, other=0.0).to(tl.float32)
        tl.store(dx_ptr + row * D + offs_d, dx.to(dx_ptr.dtype.element_ty), mask=live)
        if dgate_ptr is not None:
            sum_gate += dx * tl.load(branch_ptr + row * D + offs_d, mask=live, other=0.0).to(tl.float32)
        if dbranch_ptr is not None:
            if gate_ptr is not None:
                at_gate = pid_b.to(tl.int64) * D if PER_IMAGE_GATE else 0
                dx *= tl.load(gate_ptr + at_gate + offs_d, mask=mask, other=0.0).to(tl.float32)
            tl.store(dbranch_ptr + row * D + offs_d, dx.to(dbranch_ptr.dtype.element_ty), mask=live)
    if dgate_ptr is not None:
        tl.store(dgate_ptr + program * D + offs_d, sum_gate, mask=mask)
    if not PER_TOKEN:
        if dshift_ptr is not None:
            tl.store(dshift_ptr + program * D + offs_d, sum_shift, mask=mask)
        if dscale_ptr is not None:
            tl.store(dscale_ptr + program * D + offs_d, sum_scale, mask=mask)
    if dweight_ptr is not None:
        tl.store(dweight_ptr + program * D + offs_d, sum_weight, mask=mask)
    if dbias_ptr is not None:
        tl.store(dbias_ptr + program * D + offs_d, sum_bias, mask=mask)


# ---- launchers -----------------------------------------------------------------------------------------------------


def _flags(gate: Tensor | None, shift: Tensor | None, scale: Tensor | None, rms: bool) -> dict[str, Any]:
    like = scale if scale is not None else shift
    return {
        "PER_TOKEN": like is not None and like.ndim == 3,
        "PER_IMAGE_GATE": gate is not None and gate.ndim == 2,
        "RMS": rms,
    }


def _tokens(shift: Tensor | None, scale: Tensor | None) -> int:
    like = scale if scale is not None else shift
    return 0 if like is None else like.shape[1] if like.ndim == 3 else 1


def forward(
    x: Tensor,
    branch: Tensor | None,
    gate: Tensor | None,
    shift: Tensor | None,
    scale: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    offset: float,
    dtype: torch.dtype,
    rms: bool,
) -> tuple[Tensor | None, Tensor, Tensor]:
    """(h with a branch, y in `dtype`, stats)."""
    batch, n, width = x.shape
    h = None if branch is None else torch.empty_like(x)
    y = torch.empty_like(x, dtype=dtype)
    stats = x.new_empty(batch * n, 2, dtype=torch.float32)
    _adaln_fwd_kernel[(batch * n,)](
        x, branch, gate, shift, scale, weight, bias, h, y, stats, n, _tokens(shift, scale), eps, offset,
        **_flags(gate, shift, scale, rms), **row_options(width),
    )  # fmt: skip
    return h, y, stats


def backward(
    dh: Tensor | None,
    dy: Tensor,
    stats: Tensor,
    x: Tensor,
    branch: Tensor | None,
    gate: Tensor | None,
    shift: Tensor | None,
    scale: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    offset: float,
    rms: bool,
    needs: tuple[bool, ...],
) -> list[Tensor | None]:
    """Gradients of (x, branch, gate, shift, scale, weight, bias); `needs` in the same order."""
    batch, n, width = x.shape
    flags = _flags(gate, shift, scale, rms)
    chunk = row_chunk(batch * n)
    chunks = -(-n // chunk)

    def like(t: Tensor | None, wanted: bool, summed: bool) -> Tensor | None:
        if t is None or not wanted:
            return None
        return x.new_empty(batch, chunks, width, dtype=torch.float32) if summed else torch.empty_like(t)

    per_token = flags["PER_TOKEN"]
    dx, dbranch = torch.empty_like(x), like(branch, needs[1], False)
    dgate = like(gate, needs[2], True)
    dshift, dscale = like(shift, needs[3], not per_token), like(scale, needs[4], not per_token)
    dweight, dbias = like(weight, needs[5], True), like(bias, needs[6], True)
    _adaln_bwd_kernel[(chunks, batch)](
        dh, dy, x, branch, gate, scale, weight, bias, stats, dx, dbranch, dgate, dshift, dscale, dweight, dbias,
        n, _tokens(shift, scale), offset, CHUNK=chunk, **flags, **row_options(width),
    )  # fmt: skip

    def total(sums: Tensor | None, t: Tensor | None) -> Tensor | None:
        """Partial sums -> a gradient of t's shape, (D,) or (B, D); anything else is one already."""
        if sums is None or t is None or t.ndim == 3:
            return sums
        return sums.sum(1 if t.ndim == 2 else (0, 1)).to(t.dtype)

    return [
        dx,
        dbranch,
        total(dgate, gate),
        total(dshift, shift),
        total(dscale, scale),
        total(dweight, weight),
        total(dbias, bias),
    ]
