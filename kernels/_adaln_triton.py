# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""Triton kernels and launchers of adaln, residual_adaln (adaln.py) and adaln_quantize (fp8.py): one pair serves all.

Forward: one program a row, which stays in registers from the load of x (and of the residual branch) to the store of y,
in a float dtype, or in float8 with the row's scale.
Backward: one program CHUNK rows of one image, in order; its sums over rows go to one fp32 row per program, which the
launcher adds. Pointers of absent tensors are None, which Triton specialises on.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._fp8_triton import _magnitude, _scale_of
from ._tiles import row_chunk, row_options
from ._triton import add_up, tl, triton

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
    x_ptr, branch_ptr, gate_ptr, shift_ptr, scale_ptr, weight_ptr, bias_ptr, h_ptr, y_ptr, row_scale_ptr,
    stats_ptr, N, T, eps, offset,
    D: tl.constexpr, PAD: tl.constexpr, PER_TOKEN: tl.constexpr, PER_IMAGE_GATE: tl.constexpr, RMS: tl.constexpr,
    TOP: tl.constexpr,
):  # fmt: skip
    """One program: one row. stats (B * N, 2) fp32: mean (0 for RMSNorm) and 1 / sqrt(var + eps). row_scale (B * N,)
    with y in float8, whose largest value is TOP."""
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
        y *= tl.load(weight_ptr + offs_d, mask=mask, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        y += tl.load(bias_ptr + offs_d, mask=mask, other=0.0).to(tl.float32)
    at, mask_t = _modulation_row(row, mask, N, T, D, PER_TOKEN)
    if scale_ptr is not None:
        y *= offset + tl.load(scale_ptr + at + offs_d, mask=mask_t, other=1.0 - offset).to(tl.float32)
    if shift_ptr is not None:
        y += tl.load(shift_ptr + at + offs_d, mask=mask_t, other=0.0).to(tl.float32)
    if row_scale_ptr is not None:
        found, inverse = _scale_of(tl.max(tl.where(mask, _magnitude(y), 0), 0), TOP)
        tl.store(row_scale_ptr + row, found)
        y *= inverse
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


def _flags(a: Any) -> dict[str, Any]:
    like, gate = a.scale if a.scale is not None else a.shift, getattr(a, "gate", None)
    return {
        "PER_TOKEN": like is not None and like.ndim == 3,
        "PER_IMAGE_GATE": gate is not None and gate.ndim == 2,
        "RMS": a.norm == "rms",
    }


def _tokens(a: Any) -> int:
    like = a.scale if a.scale is not None else a.shift
    return 0 if like is None else like.shape[1] if like.ndim == 3 else 1


def forward(a: Any, out: Any) -> None:
    """Fills out.y and out.stats; out.h with a.branch, out.row_scale with y in float8."""
    batch, n, width = a.x.shape
    row_scale = getattr(out, "row_scale", None)
    _adaln_fwd_kernel[(batch * n,)](
        a.x, getattr(a, "branch", None), getattr(a, "gate", None), a.shift, a.scale, a.weight, a.bias,
        getattr(out, "h", None), out.y, row_scale, out.stats, n, _tokens(a), a.eps, a.offset,
        TOP=0.0 if row_scale is None else torch.finfo(out.y.dtype).max, **_flags(a), **row_options(width),
    )  # fmt: skip


def backward(a: Any, out: Any, g: Any, d: Any) -> None:
    """Fills the gradients of x, branch, gate, shift, scale, weight and bias."""
    batch, n, width = a.x.shape
    flags, chunk = _flags(a), row_chunk(batch * n)
    grid = (-(-n // chunk), batch)
    whole = ("shift", "scale") if flags["PER_TOKEN"] else ()  # a gradient a row, not a sum over rows

    def sums(name: str) -> Tensor | None:
        into = getattr(d, name, None)
        return into if into is None or name in whole else a.x.new_empty(batch, grid[0], width, dtype=torch.float32)

    partial = {name: sums(name) for name in ("gate", "shift", "scale", "weight", "bias")}
    branch, gate = getattr(a, "branch", None), getattr(a, "gate", None)
    _adaln_bwd_kernel[grid](
        getattr(g, "h", None), g.y, a.x, branch, gate, a.scale, a.weight, a.bias, out.stats, d.x,
        getattr(d, "branch", None), *partial.values(), n, _tokens(a), a.offset, CHUNK=chunk, **flags,
        **row_options(width),
    )  # fmt: skip
    for name, found in partial.items():
        if found is not None and name not in whole:
            into = getattr(d, name)
            add_up(found, 1 if into.ndim == 2 else (0, 1), into)
