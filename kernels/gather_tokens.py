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

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import _native
from ._op import EMPTY, Backend, Cost, Op, Sample
from ._tiles import column_block, next_power_of_2, row_chunk
from ._triton import tl, triton

__all__ = ["gather_tokens", "gather_tokens_ref", "scatter_tokens", "scatter_tokens_ref"]


# ---- reference -----------------------------------------------------------------------------------------------------


def gather_tokens_ref(x: Tensor, index: Tensor) -> Tensor:
    """The tokens x[b, index[b, k]].

    x (B, N, D) bf16, fp16 or fp32 (fp64: reference only); index (B, K) int64 in 0 .. N - 1, distinct per image.
    Returns (B, K, D) in x's dtype. ValueError when shapes do not fit; an index outside is an IndexError or RuntimeError
    on the CPU and unchecked on the GPU.
    """
    return x.gather(1, index.unsqueeze(-1).expand(-1, -1, x.shape[2]))


def scatter_tokens_ref(x: Tensor, index: Tensor, fill: Tensor | None, tokens: int) -> Tensor:
    """Tokens put back in their places: y[b, index[b, k]] = x[b, k], and `fill` in all others.

    x (B, K, D) bf16, fp16 or fp32 (fp64: reference only); index (B, K) int64 in 0 .. tokens - 1, distinct per image;
    fill (D,), the mask token, None: zeros; tokens: N. Returns (B, N, D) in the widest dtype of x and fill.
    """
    shape = (x.shape[0], tokens, x.shape[2])
    base = x.new_zeros(shape) if fill is None else fill.expand(shape)
    return base.scatter(1, index.unsqueeze(-1).expand(-1, -1, x.shape[2]), x)


# ---- Triton --------------------------------------------------------------------------------------------------------


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


# ---- launchers -----------------------------------------------------------------------------------------------------


def _move_triton(x: Tensor, index: Tensor, fill: Tensor | None, rows: int, scatter: bool) -> Tensor:
    batch, m, width = x.shape
    y = x.new_empty(batch, rows, width)
    block = _BLOCK_ROWS
    _move_rows_kernel[(-(-rows // block), batch)](
        x, index, fill, y, m, rows, index.shape[1], width,
        SCATTER=scatter, BLOCK_T=block, BLOCK_D=column_block(width), BLOCK_K=_block_k(index), num_warps=4,
    )  # fmt: skip
    return y


def _block_k(index: Tensor) -> int:
    return min(128, next_power_of_2(index.shape[1]))


def _move_native(x: Tensor, index: Tensor, fill: Tensor | None, rows: int, scatter: bool) -> Tensor:
    y = x.new_empty(x.shape[0], rows, x.shape[2])
    _native.lib().move_rows(x, index, fill, y, int(scatter))
    return y


_BLOCK_ROWS = 8  # 8 rows of 256 columns: 16 elements a thread, two 16-byte loads of bf16
Move = Callable[[Tensor, Tensor, "Tensor | None", int, bool], Tensor]
Needs = Sequence[bool]


def _fill_triton(dy: Tensor, index: Tensor, like: Tensor) -> Tensor:
    batch, rows, width = dy.shape
    block = max(16, row_chunk(batch * rows))
    programs = -(-rows // block)
    sums = dy.new_empty(batch * programs, width, dtype=torch.float32)
    _fill_sum_kernel[(programs, batch)](
        dy, index, sums, rows, index.shape[1], width,
        BLOCK_T=block, BLOCK_D=min(128, column_block(width)), BLOCK_K=min(64, _block_k(index)), num_warps=4,
    )  # fmt: skip
    return sums.sum(0).to(like.dtype)


def _fill_native(dy: Tensor, index: Tensor, like: Tensor) -> Tensor:
    dfill = torch.empty_like(like)
    _native.lib().fill_sum(dy, index, dfill)
    return dfill


def _gather_backend(name: str, move: Move) -> Backend:
    def forward(x: Tensor, index: Tensor) -> tuple[Tensor, ...]:
        return (move(x, index, None, index.shape[1], False),)

    def backward(dy: Tensor, saved: Sequence[Tensor], args: tuple[Any, ...], needs: Needs) -> Sequence[Tensor | None]:
        x, index = args
        return [move(dy, index, None, x.shape[1], True), None]

    return Backend(name, forward, backward, library=name)


def _scatter_backend(name: str, move: Move, fill_sum: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Backend:
    def forward(x: Tensor, index: Tensor, fill: Tensor | None, tokens: int) -> tuple[Tensor, ...]:
        return (move(x, index, fill, tokens, True),)

    def backward(dy: Tensor, saved: Sequence[Tensor], args: tuple[Any, ...], needs: Needs) -> Sequence[Tensor | None]:
        _x, index, fill, _tokens = args
        dx = move(dy, index, None, index.shape[1], False) if needs[0] else None
        return [dx, None, fill_sum(dy, index, fill) if needs[2] else None, None]

    return Backend(name, forward, backward, library=name)


# ---- records -------------------------------------------------------------------------------------------------------


def _check_index(op: str, x: Tensor, index: Tensor) -> None:
    if x.ndim != 3:
        raise ValueError(f"{op}: x must have three dimensions, (B, tokens, D), got {tuple(x.shape)}")
    if index.ndim != 2 or index.shape[0] != x.shape[0]:
        raise ValueError(f"{op}: index must be ({x.shape[0]}, K) for x {tuple(x.shape)}, got {tuple(index.shape)}")


def _gather_check(x: Tensor, index: Tensor) -> None:
    _check_index("gather_tokens", x, index)


def _scatter_check(x: Tensor, index: Tensor, fill: Tensor | None, tokens: int) -> None:
    _check_index("scatter_tokens", x, index)
    if index.shape[1] != x.shape[1] or tokens < x.shape[1]:
        raise ValueError(
            f"scatter_tokens: x {tuple(x.shape)} needs an index per token and a place for each, got index "
            f"{tuple(index.shape)} and {tokens} tokens"
        )
    if fill is not None and tuple(fill.shape) != (x.shape[2],):
        raise ValueError(
            f"scatter_tokens: fill must be ({x.shape[2]},) for x {tuple(x.shape)}, got {tuple(fill.shape)}"
        )


def _unsupported(backend: str, x: Tensor, index: Tensor, *rest: Any) -> str | None:
    if x.numel() == 0 or index.numel() == 0:
        return EMPTY
    if backend == "triton" and x.shape[0] > 65535:
        return f"a batch of {x.shape[0]} exceeds a CUDA grid's second dimension"
    return None


def _scatter_fake(name: str, x: Tensor, index: Tensor, fill: Tensor | None, tokens: int) -> tuple[Tensor, ...]:
    return (x.new_empty(x.shape[0], tokens, x.shape[2]),)


Randn = Callable[..., Tensor]
_REAL = ((32, 256, 128, 768, "MAETok-B 256 px"), (32, 1024, 512, 768, "MAETok-B 512 px"))


def _index(randn: Randn, batch: int, tokens: int, kept: int) -> Tensor:
    return randn(batch, tokens, dtype=torch.float32).argsort(1)[:, :kept].contiguous()


def _gather_case(label: str, batch: int, tokens: int, kept: int, width: int, real: bool = False) -> Sample:
    def make(randn: Randn) -> dict[str, Any]:
        return {"x": randn(batch, tokens, width), "index": _index(randn, batch, tokens, kept)}

    return Sample(label, make, real)


def _gather_samples() -> Iterable[Sample]:
    yield _gather_case("unsorted half", 3, 16, 8, 48)
    yield _gather_case("odd width", 2, 11, 5, 33)
    yield _gather_case("all, one row", 2, 1, 1, 8)
    for batch, tokens, kept, width, label in _REAL:
        yield _gather_case(label, batch, tokens, kept, width, real=True)


def _scatter_case(
    label: str, batch: int, tokens: int, kept: int, width: int, fill: bool = True, real: bool = False
) -> Sample:
    def make(randn: Randn) -> dict[str, Any]:
        index = _index(randn, batch, tokens, kept)
        return {
            "x": randn(batch, kept, width),
            "index": index,
            "fill": randn(width) if fill else None,
            "tokens": tokens,
        }

    return Sample(label, make, real)


def _scatter_samples() -> Iterable[Sample]:
    yield _scatter_case("unsorted half", 3, 17, 8, 48)
    yield _scatter_case("zeros, odd width", 2, 11, 5, 33, fill=False)
    yield _scatter_case("nothing to fill", 2, 4, 4, 8)
    yield _scatter_case("more rows than one program", 2, 40, 21, 16)
    for batch, tokens, kept, width, label in _REAL:
        yield _scatter_case(label, batch, tokens, kept, width, real=True)


def _gather_cost(x: Tensor, index: Tensor) -> Cost:
    row = x.shape[2] * x.element_size()
    return Cost(0, 2 * index.numel() * row + index.nbytes, 1)


def _scatter_cost(x: Tensor, index: Tensor, fill: Tensor | None, tokens: int) -> Cost:
    out = x.shape[0] * tokens * x.shape[2] * x.element_size()
    return Cost(0, x.nbytes + out + index.nbytes + (0 if fill is None else fill.nbytes), 1)


gather_tokens = Op(
    "gather_tokens",
    ref=gather_tokens_ref,
    cpu=(_gather_backend("native", _move_native),),
    cuda=(_gather_backend("triton", _move_triton),),
    fake=lambda name, x, index: (x.new_empty(x.shape[0], index.shape[1], x.shape[2]),),
    check=_gather_check,
    unsupported=_unsupported,
    samples=_gather_samples,
    cost=_gather_cost,
    own_dtypes={"index": (torch.int64,)},
)

scatter_tokens = Op(
    "scatter_tokens",
    ref=scatter_tokens_ref,
    cpu=(_scatter_backend("native", _move_native, _fill_native),),
    cuda=(_scatter_backend("triton", _move_triton, _fill_triton),),
    fake=_scatter_fake,
    check=_scatter_check,
    unsupported=_unsupported,
    samples=_scatter_samples,
    cost=_scatter_cost,
    own_dtypes={"index": (torch.int64,)},
)
