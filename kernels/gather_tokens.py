# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""gather_tokens and scatter_tokens: what `drop` masking does around the encoder's blocks.

    gather_tokens:   y[b, k] = x[b, index[b, k]]                                (B, N, D) -> (B, K, D)
    scatter_tokens:  y[b, index[b, k]] = x[b, k], everywhere else `fill`        (B, K, D) -> (B, N, D)

MAE (He et al. 2022, arXiv 2111.06377). Each is the other's gradient, so one kernel serves all four directions: a row of
the output comes from row index[k] of the input ("gather"), or from the row k with index[k] = n, or from `fill`
("scatter"). The second looks k up among the image's K indices, which costs little beside a row of D values and needs
no inverse table, no zero fill before it and no atomics: every element is written once, in any order of the programs.

The indices of one image must be distinct (those of `visible_index` are). On the GPU that is not checked, a check would
have to wait for the device: of equal indices scatter takes the last, an index outside reads NaN and writes nothing. On
the CPU both are errors.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import _native
from ._native_call import native
from ._op import Op
from ._record import Backend, Sample
from ._tiles import fill_options, move_options, over_grid
from ._triton import add_up, tl, triton

__all__ = ["gather_tokens", "gather_tokens_ref", "scatter_tokens", "scatter_tokens_ref"]


def gather_tokens_ref(x: Tensor, index: Tensor) -> Tensor:
    """The tokens x[b, index[b, k]].

    x (B, N, D) bf16, fp16 or fp32 (fp64: reference only); index (B, K) int64 in 0 .. N - 1, distinct per image.
    Returns (B, K, D) in x's dtype. ValueError when shapes do not fit or K > N; an index outside is an
    IndexError or RuntimeError on the CPU and unchecked on the GPU.
    """
    return x.gather(1, index.unsqueeze(-1).expand(-1, -1, x.shape[2]))


def scatter_tokens_ref(x: Tensor, index: Tensor, fill: Tensor | None, tokens: int) -> Tensor:
    """Tokens put back in their places: y[b, index[b, k]] = x[b, k], and `fill` in all others.

    x (B, K, D) bf16, fp16 or fp32 (fp64: reference only); index (B, K) int64 in 0 .. tokens - 1, distinct per image;
    fill (D,), the mask token, None: zeros; tokens: N >= K. Returns (B, N, D) in the widest dtype of x and
    fill. ValueError when shapes do not fit or tokens < K.
    """
    shape = (x.shape[0], tokens, x.shape[2])
    base = x.new_zeros(shape) if fill is None else fill.expand(shape)
    return base.scatter(1, index.unsqueeze(-1).expand(-1, -1, x.shape[2]), x)


@triton.jit
def _source_row(index_ptr, batch, rows, M, K, SCATTER: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr):
    """Which input row each of these output rows is: index[rows], or the k with index[k] = row; -1 for none.
    M: how many input rows there are."""
    index_ptr += batch.to(tl.int64) * K
    if SCATTER:
        source = tl.full((BLOCK_T,), -1, tl.int32)
        for first in range(0, K, BLOCK_K):
            offs_k = first + tl.arange(0, BLOCK_K)
            index = tl.load(index_ptr + offs_k, mask=offs_k < K, other=-1)
            found = tl.where(index[None, :] == rows[:, None], offs_k[None, :], -1)
            source = tl.maximum(source, tl.max(found, 1))
        return source.to(tl.int64)
    else:
        index = tl.load(index_ptr + rows, mask=rows < K, other=-1)
        return tl.where((index >= 0) & (index < M), index, -1)


@triton.jit
def _move_rows_kernel(
    x_ptr, index_ptr, fill_ptr, y_ptr, M, R, K, D,
    SCATTER: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_T of the R output rows of one image, all D columns. The input has M rows an image."""
    rows = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    batch = tl.program_id(1)
    source = _source_row(index_ptr, batch, rows, M, K, SCATTER, BLOCK_T, BLOCK_K)
    x_ptr += (batch.to(tl.int64) * M + source[:, None]) * D
    y_ptr += (batch.to(tl.int64) * R + rows[:, None]) * D
    for first in range(0, D, BLOCK_D):
        offs_d = first + tl.arange(0, BLOCK_D)[None, :]
        live = (rows[:, None] < R) & (offs_d < D)
        if SCATTER:
            x = tl.load(x_ptr + offs_d, mask=live & (source[:, None] >= 0), other=0.0)
            if fill_ptr is not None:
                fill = tl.load(fill_ptr + offs_d, mask=offs_d < D, other=0.0)
                x = tl.where(source[:, None] >= 0, x, fill)
        else:
            x = tl.load(x_ptr + offs_d, mask=live & (source[:, None] >= 0), other=float("nan"))
        tl.store(y_ptr + offs_d, x, mask=live)


@triton.jit
def _fill_sum_kernel(
    dy_ptr, index_ptr, out_ptr, R, K, D,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_T output rows of one image; the sum of those that no index names, (B * programs, D) fp32."""
    rows = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    batch = tl.program_id(1)
    program = (batch * tl.num_programs(0) + tl.program_id(0)).to(tl.int64)
    source = _source_row(index_ptr, batch, rows, K, K, True, BLOCK_T, BLOCK_K)
    filled = ((rows < R) & (source < 0))[:, None]
    dy_ptr += (batch.to(tl.int64) * R + rows[:, None]) * D
    for first in range(0, D, BLOCK_D):
        offs_d = first + tl.arange(0, BLOCK_D)
        dy = tl.load(dy_ptr + offs_d[None, :], mask=filled & (offs_d[None, :] < D), other=0.0).to(tl.float32)
        tl.store(out_ptr + program * D + offs_d, tl.sum(dy, 0), mask=offs_d < D)


def _move(x: Tensor, index: Tensor, fill: Tensor | None, y: Tensor, scatter: bool) -> None:
    batch, rows, width = y.shape
    options = move_options(width, index.shape[1])
    grid = (-(-rows // options["BLOCK_T"]), batch)
    _move_rows_kernel[grid](x, index, fill, y, x.shape[1], rows, index.shape[1], width, SCATTER=scatter, **options)


def _fill_sum(dy: Tensor, index: Tensor, dfill: Tensor) -> None:
    batch, rows, width = dy.shape
    options = fill_options(width, index.shape[1], batch * rows)
    programs = -(-rows // options["BLOCK_T"])
    sums = dy.new_empty(batch * programs, width, dtype=torch.float32)
    _fill_sum_kernel[(programs, batch)](dy, index, sums, rows, index.shape[1], width, **options)
    add_up(sums, 0, dfill)


def _scatter_backward(a, out, g, d):
    if d.x is not None:
        _move(g.y, a.index, None, d.x, False)
    if d.fill is not None:
        _fill_sum(g.y, a.index, d.fill)


def _scatter_backward_native(a, out, g, d):
    if d.x is not None:
        _native.lib().move_rows(g.y, a.index, None, d.x, 0)
    if d.fill is not None:
        _native.lib().fill_sum(g.y, a.index, d.fill)


def _gather_check(a):
    if a.index.shape[1] > a.x.shape[1]:
        raise ValueError(
            f"gather_tokens: index names {a.index.shape[1]} tokens of an image, which must be distinct, "
            f"and x has {a.x.shape[1]}"
        )


def _scatter_check(a):
    if a.tokens < a.x.shape[1]:
        raise ValueError(
            f"scatter_tokens: tokens must be at least {a.x.shape[1]}, a place for each token of x, got {a.tokens}"
        )


_Randn = Callable[..., Tensor]
_REAL = ((32, 256, 128, 768, "MAETok-B 256 px"), (32, 1024, 512, 768, "MAETok-B 512 px"))


def _index(randn: _Randn, batch: int, tokens: int, kept: int) -> Tensor:
    return randn(batch, tokens, dtype=torch.float32).argsort(1)[:, :kept].contiguous()


def _gather(label: str, batch: int, tokens: int, kept: int, width: int, real: bool = False) -> Sample:
    def make(randn: _Randn) -> dict[str, Any]:
        return {"x": randn(batch, tokens, width), "index": _index(randn, batch, tokens, kept)}

    return Sample(label, make, real)


def _scatter(
    label: str, batch: int, tokens: int, kept: int, width: int, fill: bool = True, real: bool = False
) -> Sample:
    def make(randn: _Randn) -> dict[str, Any]:
        index, x = _index(randn, batch, tokens, kept), randn(batch, kept, width)
        return {"x": x, "index": index, "fill": randn(width) if fill else None, "tokens": tokens}

    return Sample(label, make, real)


gather_tokens = Op(
    "gather_tokens",
    ref=gather_tokens_ref,
    shapes={"x": "B N D", "index": "B K"},
    check=_gather_check,
    roles={"index": (torch.int64,)},
    out=lambda a, backend: (a.x.new_empty(a.x.shape[0], a.index.shape[1], a.x.shape[2]),),
    cpu=[
        native(
            "move_rows x index none y gather",
            "move_rows d_y index none d_x scatter",
            none=lambda a: None,
            gather=lambda a: 0,
            scatter=lambda a: 1,
        )
    ],
    cuda=[
        Backend(
            "triton",
            lambda a, out: _move(a.x, a.index, None, out.y, False),
            lambda a, out, g, d: _move(g.y, a.index, None, d.x, True),
            lambda a: over_grid(batch=a.x.shape[0]),
        )
    ],
    samples=[
        _gather("unsorted half", 3, 16, 8, 48),
        _gather("odd width", 2, 11, 5, 33),
        _gather("all, one row", 2, 1, 1, 8),
        *(_gather(label, b, n, kept, d, real=True) for b, n, kept, d, label in _REAL),
    ],
    flops=lambda a: 0,
    traffic=lambda a: a.index.nbytes + 2 * a.index.numel() * a.x.shape[2] * a.x.itemsize,  # the rows named, no others
)

scatter_tokens = Op(
    "scatter_tokens",
    ref=scatter_tokens_ref,
    shapes={"x": "B K D", "index": "B K", "fill": "D"},
    check=_scatter_check,
    roles={"index": (torch.int64,)},
    out=lambda a, backend: (a.x.new_empty(a.x.shape[0], a.tokens, a.x.shape[2]),),
    cpu=[
        Backend(
            "native",
            lambda a, out: _native.lib().move_rows(a.x, a.index, a.fill, out.y, 1),
            _scatter_backward_native,
        )
    ],
    cuda=[
        Backend(
            "triton",
            lambda a, out: _move(a.x, a.index, a.fill, out.y, True),
            _scatter_backward,
            lambda a: over_grid(batch=a.x.shape[0]),
        )
    ],
    samples=[
        _scatter("unsorted half", 3, 17, 8, 48),
        _scatter("zeros, odd width", 2, 11, 5, 33, fill=False),
        _scatter("nothing to fill", 2, 4, 4, 8),
        _scatter("more rows than one program", 2, 40, 21, 16),
        *(_scatter(label, b, n, kept, d, real=True) for b, n, kept, d, label in _REAL),
    ],
    flops=lambda a: 0,
)
