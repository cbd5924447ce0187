# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""The Triton kernels and launchers of `fp8`: amax, scale and cast to float8 in as few passes as the scaling allows.

    per row      one pass: a program holds a row                            reads x once
    per tensor   partial maxima, then scale and cast; nothing synchronises   reads x twice
    per column   the same, and the tile is written transposed and padded     reads x twice

adaln_quantize's kernel is adaln's (`_adaln_triton`), with `_scale_of` of this file at its end.

A maximum is taken over the bits of |x| as integers: the order of positive floats is that of their bits, and NaN lies
above infinity, so it wins as it does in torch.amax (a float maximum would lose it). Maxima are exact and the same for
any order of programs. `/` on a GPU is off by an ulp or two: scales go through `tl.div_rn`, so that they are torch's.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._tiles import FP8_CHUNKS, FP8_FLAT, FP8_PARTIALS, FP8_TILE, next_power_of_2, row_options
from ._triton import tl, triton

__all__ = ["MIN_SCALE", "quantize", "quantize_columns", "transpose_pad"]

MIN_SCALE = 2.0**-126  # the smallest normal fp32: its reciprocal is finite


@triton.jit
def _magnitude(x):
    """The bits of |x| (fp32): ordered like |x|, NaN last."""
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def _scale_of(bits, TOP: tl.constexpr):
    """(scale, 1 / scale) for the largest magnitude: max(amax / TOP, MIN_SCALE), NaN stays NaN."""
    scale = tl.div_rn(bits.to(tl.float32, bitcast=True), tl.full(bits.shape, TOP, tl.float32))
    scale = tl.where(scale < 1.1754943508222875e-38, 1.1754943508222875e-38, scale)  # MIN_SCALE
    return scale, tl.div_rn(tl.full(bits.shape, 1.0, tl.float32), scale)


@triton.jit
def _quantize_rows_kernel(
    x_ptr, factor_ptr, data_ptr, scale_ptr,
    D: tl.constexpr, PAD: tl.constexpr, TOP: tl.constexpr,
):  # fmt: skip
    """One program: one row."""
    row = tl.program_id(0).to(tl.int64)
    offs = tl.arange(0, PAD)
    mask = offs < D
    x = tl.load(x_ptr + row * D + offs, mask=mask, other=0.0).to(tl.float32)
    if factor_ptr is not None:
        x *= tl.load(factor_ptr + offs, mask=mask, other=0.0)
    scale, inverse = _scale_of(tl.max(_magnitude(x), 0), TOP)
    tl.store(data_ptr + row * D + offs, (x * inverse).to(data_ptr.dtype.element_ty), mask=mask)
    tl.store(scale_ptr + row, scale)


@triton.jit
def _amax_kernel(x_ptr, partial_ptr, count, STEPS, BLOCK: tl.constexpr):
    """One program: STEPS * BLOCK elements -> the bits of their largest magnitude."""
    program = tl.program_id(0).to(tl.int64)
    top = tl.zeros((BLOCK,), tl.int32)
    for i in range(STEPS):
        offs = (program * STEPS + i) * BLOCK + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + offs, mask=offs < count, other=0.0).to(tl.float32)
        top = tl.maximum(top, _magnitude(x))
    tl.store(partial_ptr + program, tl.max(top, 0))


@triton.jit
def _quantize_tensor_kernel(
    x_ptr, partial_ptr, data_ptr, scale_ptr, count, partials,
    BLOCK: tl.constexpr, PARTIALS: tl.constexpr, TOP: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK elements; each reduces the partial maxima for itself, the first one writes the scale."""
    program = tl.program_id(0).to(tl.int64)
    offs_p = tl.arange(0, PARTIALS)
    bits = tl.max(tl.load(partial_ptr + offs_p, mask=offs_p < partials, other=0), 0)
    scale, inverse = _scale_of(bits, TOP)
    if program == 0:
        tl.store(scale_ptr, scale)
    offs = program * BLOCK + tl.arange(0, BLOCK)
    mask = offs < count
    x = tl.load(x_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    tl.store(data_ptr + offs, (x * inverse).to(data_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _column_amax_kernel(x_ptr, factor_ptr, partial_ptr, M, D, CHUNK, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr):
    """One program: CHUNK rows of BLOCK_D columns -> partial (chunks, D), bits of each column's largest magnitude."""
    pid_d, pid_m = tl.program_id(0), tl.program_id(1)
    offs_d = pid_d * BLOCK_D + tl.arange(0, BLOCK_D)
    top = tl.zeros((BLOCK_M, BLOCK_D), tl.int32)
    for i in range(0, CHUNK, BLOCK_M):
        offs_m = (pid_m * CHUNK + i + tl.arange(0, BLOCK_M)).to(tl.int64)
        mask = (offs_m < M)[:, None] & (offs_d < D)[None, :]
        x = tl.load(x_ptr + offs_m[:, None] * D + offs_d[None, :], mask=mask, other=0.0).to(tl.float32)
        if factor_ptr is not None:
            x *= tl.load(factor_ptr + offs_m, mask=offs_m < M, other=0.0)[:, None]
        top = tl.maximum(top, _magnitude(x))
    tl.store(partial_ptr + pid_m.to(tl.int64) * D + offs_d, tl.max(top, 0), mask=offs_d < D)


@triton.jit
def _quantize_columns_kernel(
    x_ptr, factor_ptr, partial_ptr, data_ptr, scale_ptr, M, D, padded, chunks,
    CHUNKS: tl.constexpr, TOP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program: a tile, written transposed into data (D, padded); rows from M to padded become zero."""
    pid_d, pid_m = tl.program_id(0), tl.program_id(1)
    offs_d = pid_d * BLOCK_D + tl.arange(0, BLOCK_D)
    mask_d = offs_d < D
    offs_c = tl.arange(0, CHUNKS)
    found = tl.load(
        partial_ptr + offs_c[:, None] * D + offs_d[None, :], mask=(offs_c < chunks)[:, None] & mask_d[None, :], other=0
    )
    scale, inverse = _scale_of(tl.max(found, 0), TOP)
    if pid_m == 0:
        tl.store(scale_ptr + offs_d, scale, mask=mask_d)
    offs_m = (pid_m * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    mask = (offs_m < M)[:, None] & mask_d[None, :]
    x = tl.load(x_ptr + offs_m[:, None] * D + offs_d[None, :], mask=mask, other=0.0).to(tl.float32)
    if factor_ptr is not None:
        x *= tl.load(factor_ptr + offs_m, mask=offs_m < M, other=0.0)[:, None]
    # zero times the reciprocal of a NaN scale is NaN: the padding is set, not computed
    narrow = tl.where(mask, x * inverse[None, :], 0.0).to(data_ptr.dtype.element_ty)
    out = data_ptr + offs_d.to(tl.int64)[:, None] * padded + offs_m[None, :]
    tl.store(out, tl.trans(narrow), mask=mask_d[:, None] & (offs_m < padded)[None, :])


@triton.jit
def _transpose_pad_kernel(x_ptr, y_ptr, M, D, padded, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr):
    """One program: a tile of bytes; y (D, padded) = x (M, D)^T, zeros from M on."""
    pid_d, pid_m = tl.program_id(0), tl.program_id(1)
    offs_d = pid_d * BLOCK_D + tl.arange(0, BLOCK_D)
    offs_m = (pid_m * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    mask = (offs_m < M)[:, None] & (offs_d < D)[None, :]
    x = tl.load(x_ptr + offs_m[:, None] * D + offs_d[None, :], mask=mask, other=0)
    out = y_ptr + offs_d.to(tl.int64)[:, None] * padded + offs_m[None, :]
    tl.store(out, tl.trans(x), mask=(offs_d < D)[:, None] & (offs_m < padded)[None, :])


def _top(data: Tensor) -> float:
    return torch.finfo(data.dtype).max


def quantize(a: Any, out: Any) -> None:
    """fp8_quantize: out.data and out.scale."""
    count = a.x.numel()
    if a.per == "row":
        width = a.x.shape[-1]
        _quantize_rows_kernel[(count // width,)](
            a.x, a.factor, out.data, out.scale, TOP=_top(out.data), **row_options(width)
        )
        return
    blocks = -(-count // FP8_FLAT)
    steps = -(-blocks // FP8_PARTIALS)
    partials = -(-blocks // steps)
    partial = a.x.new_empty(partials, dtype=torch.int32)
    _amax_kernel[(partials,)](a.x, partial, count, steps, BLOCK=FP8_FLAT, num_warps=8)
    _quantize_tensor_kernel[(blocks,)](
        a.x, partial, out.data, out.scale, count, partials,
        BLOCK=FP8_FLAT, PARTIALS=next_power_of_2(partials), TOP=_top(out.data), num_warps=8,
    )  # fmt: skip


def quantize_columns(a: Any, out: Any) -> None:
    """fp8_quantize_columns: out.data and out.scale."""
    rows, width = a.x.shape
    padded = out.data.shape[1]
    block_m, block_d = FP8_TILE
    chunk = block_m * -(-rows // (block_m * FP8_CHUNKS))
    chunks = -(-rows // chunk)
    columns = -(-width // block_d)
    partial = a.x.new_empty((chunks, width), dtype=torch.int32)
    tile = {"BLOCK_M": block_m, "BLOCK_D": block_d}
    _column_amax_kernel[(columns, chunks)](a.x, a.factor, partial, rows, width, chunk, num_warps=8, **tile)
    _quantize_columns_kernel[(columns, -(-padded // block_m))](
        a.x, a.factor, partial, out.data, out.scale, rows, width, padded, chunks,
        CHUNKS=next_power_of_2(chunks), TOP=_top(out.data), num_warps=8, **tile,
    )  # fmt: skip


def transpose_pad(a: Any, out: Any) -> None:
    """transpose_pad: out.y."""
    rows, width = a.x.shape
    padded = out.y.shape[1]
    block_m, block_d = FP8_TILE
    _transpose_pad_kernel[(-(-width // block_d), -(-padded // block_m))](
        a.x, out.y, rows, width, padded, BLOCK_M=block_m, BLOCK_D=block_d, num_warps=4
    )
