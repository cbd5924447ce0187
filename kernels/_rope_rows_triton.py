# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""Row kernels of `rope_attention` in Triton: q and k normalised and rotated once, ahead of any attention kernel.

    RowCall(args)     one call's sizes and views; `.rowwise`: whether q and k have to be written ahead at all
      .prepare()      q (B, Nq, heads, head_dim), k (B, N, heads, head_dim): normalised and rotated copies
      .finish()       their gradients -> those of qkv's q and k and of the norm weights
      .table_grad()   -> the gradient of the table: one program per (table rows, head), no atomics

Rows of queries that are not asked for are neither read nor written. With `index` the rows of the table are gathered;
the table's gradient then needs the tokens of each row, which a stable sort of the index lists in a fixed order.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._tiles import ROPE_ROWS, next_power_of_2
from ._triton import add_up, tl, triton

__all__ = ["RowCall", "strides"]

_NORMS = {"none": 0, "rms": 1, "layer": 2}


# ---- device helpers ------------------------------------------------------------------------------------------------


@triton.jit
def _load_rows(ptr, offs_n, mask_n, stride_n, D0: tl.constexpr, WIDTH: tl.constexpr, HEAD_DIM: tl.constexpr):
    """Columns [D0, D0 + WIDTH) of the rows offs_n; zero beyond HEAD_DIM and where mask_n is false."""
    offs_d = D0 + tl.arange(0, WIDTH)
    mask = mask_n[:, None]
    if D0 + WIDTH > HEAD_DIM:
        mask = mask & (offs_d < HEAD_DIM)[None, :]
    return tl.load(ptr + offs_n.to(tl.int64)[:, None] * stride_n + offs_d[None, :], mask=mask, other=0.0)


@triton.jit
def _store_rows(ptr, x, offs_n, mask_n, stride_n, D0: tl.constexpr, WIDTH: tl.constexpr, HEAD_DIM: tl.constexpr):
    offs_d = D0 + tl.arange(0, WIDTH)
    mask = mask_n[:, None]
    if D0 + WIDTH > HEAD_DIM:
        mask = mask & (offs_d < HEAD_DIM)[None, :]
    tl.store(ptr + offs_n.to(tl.int64)[:, None] * stride_n + offs_d[None, :], x.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def _rotate(
    x, rope_ptr, stride_rc, offs_n, prefix, M,
    D0: tl.constexpr, WIDTH: tl.constexpr, HEAD_DIM: tl.constexpr, INVERSE: tl.constexpr,
):  # fmt: skip
    """x (rows, WIDTH) of any float dtype, rotated in fp32 by the table rows offs_n - prefix (those within [0, M))."""
    HALF: tl.constexpr = HEAD_DIM // 2
    offs_j = D0 // 2 + tl.arange(0, WIDTH // 2)
    row = offs_n - prefix
    mask = ((row >= 0) & (row < M))[:, None] & (offs_j < HALF)[None, :]
    where = rope_ptr + row[:, None] * HALF + offs_j[None, :]
    cos = tl.load(where, mask=mask, other=1.0)
    sin = tl.load(where + stride_rc, mask=mask, other=0.0)
    if INVERSE:
        sin = -sin
    a, b = tl.split(tl.reshape(x.to(tl.float32), (x.shape[0], WIDTH // 2, 2)))
    return tl.reshape(tl.join(a * cos - b * sin, a * sin + b * cos), (x.shape[0], WIDTH))


@triton.jit
def _rotate_rows(
    x, rope_ptr, index_ptr, stride_rc, offs_n, prefix, M, R,
    PAD: tl.constexpr, HEAD_DIM: tl.constexpr, INVERSE: tl.constexpr,
):  # fmt: skip
    """As `_rotate` over whole rows; with an index (this image's M entries) by the rows that it names, of R."""
    if index_ptr is not None:
        m = offs_n - prefix
        row = tl.load(index_ptr + m, mask=(m >= 0) & (m < M), other=-1)
        return _rotate(x, rope_ptr, stride_rc, row, 0, R, 0, PAD, HEAD_DIM, INVERSE)
    else:
        return _rotate(x, rope_ptr, stride_rc, offs_n, prefix, M, 0, PAD, HEAD_DIM, INVERSE)


@triton.jit
def _normalise(x, mask, weight_ptr, bias_ptr, eps, NORM: tl.constexpr, HEAD_DIM: tl.constexpr, PAD: tl.constexpr):
    """(x_hat, rstd, x_hat * weight + bias) of rows in fp32; weight and bias may be None. NORM 1: RMS, 2: LayerNorm."""
    offs_d = tl.arange(0, PAD)
    if NORM == 2:
        x = tl.where(mask, x - tl.sum(x, 1)[:, None] / HEAD_DIM, 0.0)
    rstd = tl.rsqrt(tl.sum(x * x, 1) / HEAD_DIM + eps)
    x_hat = x * rstd[:, None]
    y = x_hat
    if weight_ptr is not None:
        y = y * tl.load(weight_ptr + offs_d, mask=offs_d < HEAD_DIM, other=0.0)[None, :]
    if bias_ptr is not None:
        y = y + tl.load(bias_ptr + offs_d, mask=offs_d < HEAD_DIM, other=0.0)[None, :]
    return x_hat, rstd, y


# ---- q and k ahead of the attention, and their gradients behind it -------------------------------------------------


@triton.jit
def _qk_prepare_kernel(
    x_ptr, rope_ptr, index_ptr, weight_ptr, bias_ptr, y_ptr,
    stride_xb, stride_xn, stride_yb, stride_yn, stride_rc, stride_rh, N, prefix, M, R, eps,
    HEAD_DIM: tl.constexpr, PAD: tl.constexpr, NORM: tl.constexpr, ROPE: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """y = R norm(x) for BLOCK_N tokens of one head (q or k)."""
    pid_n, pid_h, pid_b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < N
    mask = mask_n[:, None] & (tl.arange(0, PAD) < HEAD_DIM)[None, :]
    x = _load_rows(x_ptr + pid_b * stride_xb + pid_h * HEAD_DIM, offs_n, mask_n, stride_xn, 0, PAD, HEAD_DIM)
    y = x.to(tl.float32)
    if NORM:
        _x_hat, _rstd, y = _normalise(y, mask, weight_ptr, bias_ptr, eps, NORM, HEAD_DIM, PAD)
    if ROPE:
        if index_ptr is not None:
            index_ptr += pid_b * M
        rope_ptr += pid_h * stride_rh
        y = _rotate_rows(y, rope_ptr, index_ptr, stride_rc, offs_n, prefix, M, R, PAD, HEAD_DIM, False)
    _store_rows(y_ptr + pid_b * stride_yb + pid_h * HEAD_DIM, y, offs_n, mask_n, stride_yn, 0, PAD, HEAD_DIM)


@triton.jit
def _qk_finish_kernel(
    x_ptr, rope_ptr, index_ptr, weight_ptr, dy_ptr, dx_ptr, dweight_ptr, dbias_ptr,
    stride_xb, stride_xn, stride_yb, stride_yn, stride_db, stride_dn,
    stride_rc, stride_rh, N, prefix, M, R, eps,
    HEAD_DIM: tl.constexpr, PAD: tl.constexpr, NORM: tl.constexpr, ROPE: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Backward of `_qk_prepare_kernel`: d_x, and this program's sums of d_weight and d_bias (one row each)."""
    pid_n, pid_h, pid_b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, PAD)
    mask_n = offs_n < N
    mask = mask_n[:, None] & (offs_d < HEAD_DIM)[None, :]
    dy = _load_rows(dy_ptr + pid_b * stride_yb + pid_h * HEAD_DIM, offs_n, mask_n, stride_yn, 0, PAD, HEAD_DIM)
    dy = dy.to(tl.float32)
    if ROPE:
        if index_ptr is not None:
            index_ptr += pid_b * M
        rope_ptr += pid_h * stride_rh
        dy = _rotate_rows(dy, rope_ptr, index_ptr, stride_rc, offs_n, prefix, M, R, PAD, HEAD_DIM, True)
    dx = dy
    if NORM:
        x = _load_rows(x_ptr + pid_b * stride_xb + pid_h * HEAD_DIM, offs_n, mask_n, stride_xn, 0, PAD, HEAD_DIM)
        x_hat, rstd, _y = _normalise(x.to(tl.float32), mask, None, None, eps, NORM, HEAD_DIM, PAD)
        program = (pid_b * tl.num_programs(1) + pid_h) * tl.num_programs(0) + pid_n
        tl.store(dweight_ptr + program * HEAD_DIM + offs_d, tl.sum(dy * x_hat, 0), mask=offs_d < HEAD_DIM)
        tl.store(dbias_ptr + program * HEAD_DIM + offs_d, tl.sum(dy, 0), mask=offs_d < HEAD_DIM)
        if weight_ptr is not None:
            dy = dy * tl.load(weight_ptr + offs_d, mask=offs_d < HEAD_DIM, other=0.0)[None, :]
        dx = dy - x_hat * (tl.sum(dy * x_hat, 1) / HEAD_DIM)[:, None]
        if NORM == 2:
            dx -= (tl.sum(dy, 1) / HEAD_DIM)[:, None]
        dx *= rstd[:, None]
    _store_rows(dx_ptr + pid_b * stride_db + pid_h * HEAD_DIM, dx, offs_n, mask_n, stride_dn, 0, PAD, HEAD_DIM)


# ---- the gradient of the table -------------------------------------------------------------------------------------


@triton.jit
def _pair_products(x, dy, PAD: tl.constexpr):
    """(d_cos, d_sin) terms of rows x and the gradients dy of their rotated selves."""
    xa, xb = tl.split(tl.reshape(x, (x.shape[0], PAD // 2, 2)))
    da, db = tl.split(tl.reshape(dy, (x.shape[0], PAD // 2, 2)))
    return da * xa + db * xb, db * xa - da * xb


@triton.jit
def _table_terms(
    x_ptr, d_ptr, rope_ptr, weight_ptr, bias_ptr, stride_xn, stride_dn, stride_rc, offs_n, mask_n, mask, prefix, M, eps,
    HEAD_DIM: tl.constexpr, PAD: tl.constexpr, NORM: tl.constexpr, UNROTATED: tl.constexpr,
):  # fmt: skip
    """(d_cos, d_sin) that the rows offs_n of one tensor (q or k) of one image contribute."""
    x = _load_rows(x_ptr, offs_n, mask_n, stride_xn, 0, PAD, HEAD_DIM).to(tl.float32)
    dy = _load_rows(d_ptr, offs_n, mask_n, stride_dn, 0, PAD, HEAD_DIM).to(tl.float32)
    if NORM:
        _x_hat, _rstd, x = _normalise(x, mask, weight_ptr, bias_ptr, eps, NORM, HEAD_DIM, PAD)
    if UNROTATED:
        dy = _rotate(dy, rope_ptr, stride_rc, offs_n, prefix, M, 0, PAD, HEAD_DIM, False)
    return _pair_products(x, dy, PAD)


@triton.jit
def _rope_attention_bwd_drope_kernel(
    q_ptr, k_ptr, dq_ptr, dk_ptr, rope_ptr, qw_ptr, qb_ptr, kw_ptr, kb_ptr, drope_ptr,
    stride_xb, stride_xn, stride_dqb, stride_dqn, stride_dkb, stride_dkn,
    stride_rc, stride_rh, B, first_query, NQ, prefix, M, eps,
    HEAD_DIM: tl.constexpr, PAD: tl.constexpr, NORM: tl.constexpr, UNROTATED: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """d_cos and d_sin (2, H, M, HEAD_DIM / 2) of BLOCK_M table rows of one head, summed over the batch and over q, k.

    x is what was rotated, dy the gradient of the rotated: d_cos = dy_a x_a + dy_b x_b, d_sin = dy_b x_a - dy_a x_b.
    UNROTATED: d_q, d_k have been turned back, so dy = R d_x; else they are the rotated's gradients themselves.
    q and d_q hold the queries first_query .. first_query + NQ - 1 only.
    """
    pid_m, pid_h = tl.program_id(0), tl.program_id(1).to(tl.int64)
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = prefix + offs_m
    offs_q = offs_n - first_query
    mask_m = offs_m < M
    mask = mask_m[:, None] & (tl.arange(0, PAD) < HEAD_DIM)[None, :]
    mask_q = mask_m & (offs_q >= 0) & (offs_q < NQ)
    q_ptr += pid_h * HEAD_DIM
    k_ptr += pid_h * HEAD_DIM
    dq_ptr += pid_h * HEAD_DIM
    dk_ptr += pid_h * HEAD_DIM
    rope_ptr += pid_h * stride_rh
    dcos = tl.zeros((BLOCK_M, PAD // 2), tl.float32)
    dsin = tl.zeros((BLOCK_M, PAD // 2), tl.float32)
    for _ in range(B):
        c, s = _table_terms(
            q_ptr, dq_ptr, rope_ptr, qw_ptr, qb_ptr, stride_xn, stride_dqn, stride_rc,
            offs_q, mask_q, mask, prefix - first_query, M, eps, HEAD_DIM, PAD, NORM, UNROTATED,
        )  # fmt: skip
        dcos += c
        dsin += s
        c, s = _table_terms(
            k_ptr, dk_ptr, rope_ptr, kw_ptr, kb_ptr, stride_xn, stride_dkn, stride_rc,
            offs_n, mask_m, mask, prefix, M, eps, HEAD_DIM, PAD, NORM, UNROTATED,
        )  # fmt: skip
        dcos += c
        dsin += s
        q_ptr += stride_xb
        k_ptr += stride_xb
        dq_ptr += stride_dqb
        dk_ptr += stride_dkb
    offs_j = tl.arange(0, PAD // 2)
    where = (pid_h * M + offs_m)[:, None] * (HEAD_DIM // 2) + offs_j[None, :]
    mask_j = mask_m[:, None] & (offs_j < HEAD_DIM // 2)[None, :]
    tl.store(drope_ptr + where, dcos, mask=mask_j)
    tl.store(drope_ptr + where + tl.num_programs(1) * M * (HEAD_DIM // 2), dsin, mask=mask_j)


@triton.jit
def _gathered_terms(
    x_ptr, d_ptr, weight_ptr, bias_ptr, stride_xb, stride_xn, stride_db, stride_dn, image, row, mask_n, eps,
    HEAD_DIM: tl.constexpr, PAD: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    """(d_cos, d_sin) of tokens (image, row), whose gradients are those of the rotated rows."""
    mask = mask_n[:, None] & (tl.arange(0, PAD) < HEAD_DIM)[None, :]
    x = _load_rows(x_ptr, image * stride_xb + row * stride_xn, mask_n, 1, 0, PAD, HEAD_DIM).to(tl.float32)
    dy = _load_rows(d_ptr, image * stride_db + row * stride_dn, mask_n, 1, 0, PAD, HEAD_DIM).to(tl.float32)
    if NORM:
        _x_hat, _rstd, x = _normalise(x, mask, weight_ptr, bias_ptr, eps, NORM, HEAD_DIM, PAD)
    return _pair_products(x, dy, PAD)


@triton.jit
def _rope_attention_bwd_drope_index_kernel(
    q_ptr, k_ptr, dq_ptr, dk_ptr, order_ptr, starts_ptr, qw_ptr, qb_ptr, kw_ptr, kb_ptr, drope_ptr,
    stride_xb, stride_xn, stride_dqb, stride_dqn, stride_dkb, stride_dkn, first_query, NQ, prefix, M, eps,
    HEAD_DIM: tl.constexpr, PAD: tl.constexpr, NORM: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """d_cos and d_sin of one table row of one head, summed over the tokens that it rotated: entries order[starts[row]]
    .. order[starts[row + 1] - 1] of (B, M), in that order."""
    pid_r, pid_h = tl.program_id(0), tl.program_id(1).to(tl.int64)
    start, stop = tl.load(starts_ptr + pid_r), tl.load(starts_ptr + pid_r + 1)
    q_ptr += pid_h * HEAD_DIM
    k_ptr += pid_h * HEAD_DIM
    dq_ptr += pid_h * HEAD_DIM
    dk_ptr += pid_h * HEAD_DIM
    dcos = tl.zeros((BLOCK_M, PAD // 2), tl.float32)
    dsin = tl.zeros((BLOCK_M, PAD // 2), tl.float32)
    for at in range(start, stop, BLOCK_M):
        offs_e = at + tl.arange(0, BLOCK_M)
        mask_e = offs_e < stop
        entry = tl.load(order_ptr + offs_e, mask=mask_e, other=0)
        image, row = entry // M, prefix + entry % M
        mask_q = mask_e & (row >= first_query) & (row < first_query + NQ)
        c, s = _gathered_terms(
            q_ptr, dq_ptr, qw_ptr, qb_ptr, stride_xb, stride_xn, stride_dqb, stride_dqn,
            image, row - first_query, mask_q, eps, HEAD_DIM, PAD, NORM,
        )  # fmt: skip
        dcos += c
        dsin += s
        c, s = _gathered_terms(
            k_ptr, dk_ptr, kw_ptr, kb_ptr, stride_xb, stride_xn, stride_dkb, stride_dkn,
            image, row, mask_e, eps, HEAD_DIM, PAD, NORM,
        )  # fmt: skip
        dcos += c
        dsin += s
    offs_j = tl.arange(0, PAD // 2)
    where = (pid_h * tl.num_programs(0) + pid_r) * (HEAD_DIM // 2) + offs_j
    mask_j = offs_j < HEAD_DIM // 2
    tl.store(drope_ptr + where, tl.sum(dcos, 0), mask=mask_j)
    sines = tl.num_programs(1) * tl.num_programs(0) * (HEAD_DIM // 2)
    tl.store(drope_ptr + where + sines, tl.sum(dsin, 0), mask=mask_j)


def strides(x: Tensor) -> tuple[int, int]:
    """(batch, token) strides of a (B, N, heads, head_dim) view whose heads are contiguous."""
    return x.stride(0), x.stride(1)


class RowCall:
    """One call's sizes, strides and views: q holds the asked queries only."""

    def __init__(self, a: Any) -> None:
        self.qw, self.qb, self.kw, self.kb = a.q_weight, a.q_bias, a.k_weight, a.k_bias
        self.qkv, self.rope, self.index, self.prefix, self.eps = a.qkv, a.rope, a.index, a.prefix, a.eps
        self.batch, self.n, _, self.heads, self.head_dim = a.qkv.shape
        self.norm = _NORMS[a.qk_norm]
        self.first = a.first_query
        self.count = self.n - self.first if a.num_queries is None else a.num_queries
        self.table_rows = 0 if a.rope is None else a.rope.shape[2]
        self.rotated = self.table_rows if a.index is None else a.index.shape[1]
        shared = a.rope is None or a.rope.shape[1] == 1
        self.rope_strides = (0, 0) if a.rope is None else (a.rope.stride(0), 0 if shared else a.rope.stride(1))
        self.pad = next_power_of_2(self.head_dim)
        self.rowwise = self.norm != 0 or a.index is not None
        self.x = self.sliced(a.qkv)

    def sliced(self, packed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q (asked queries), k, v of a packed (B, N, 3, heads, head_dim)."""
        q, k, v = packed.unbind(2)
        return q[:, self.first : self.first + self.count], k, v

    def table(self) -> Tensor:
        """The table, or any tensor in its place: the kernels do not read it when ROPE is off."""
        return self.qkv if self.rope is None else self.rope

    def _grid(self, x: Tensor) -> tuple[int, int, int]:
        return (-(-x.shape[1] // ROPE_ROWS), self.heads, self.batch)

    def _sizes(self, at: int) -> tuple[Any, ...]:
        prefix = self.prefix - (self.first if at == 0 else 0)  # in rows of q or k
        return (*self.rope_strides, self.x[at].shape[1], prefix, self.rotated, self.table_rows, self.eps)

    def _constants(self) -> dict[str, Any]:
        constants = {"HEAD_DIM": self.head_dim, "PAD": self.pad, "NORM": self.norm, "BLOCK_N": ROPE_ROWS}
        return {**constants, "ROPE": self.rope is not None}

    def prepare(self) -> tuple[Tensor, Tensor]:
        """Normalised and rotated q and k."""
        made = []
        for at, (weight, bias) in enumerate(((self.qw, self.qb), (self.kw, self.kb))):
            x = self.x[at]
            y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
            _qk_prepare_kernel[self._grid(x)](
                x, self.table(), self.index, weight, bias, y, *strides(x), *strides(y), *self._sizes(at),
                **self._constants(),
            )  # fmt: skip
            made.append(y)
        return made[0], made[1]

    def zero_absent(self, dqkv: Tensor) -> None:
        """Gives the queries that were not asked for their gradient."""
        for start, stop in ((0, self.first), (self.first + self.count, self.n)):
            if start < stop:
                dqkv[:, start:stop, 0].zero_()

    def finish(self, dq: Tensor, dk: Tensor, d: Any) -> None:
        """Gradients of what `prepare` made -> d.qkv's q and k, and the norm weights' (in a fixed order)."""
        into = ((d.q_weight, d.q_bias), (d.k_weight, d.k_bias))
        for at, (dy, dx, weight) in enumerate(zip((dq, dk), self.sliced(d.qkv), (self.qw, self.kw))):
            x = self.x[at]
            grid = self._grid(x)
            programs = grid[0] * grid[1] * grid[2] if self.norm else 1
            sums = x.new_empty(2, programs, self.head_dim, dtype=torch.float32)
            _qk_finish_kernel[grid](
                x, self.table(), self.index, weight, dy, dx, sums[0], sums[1],
                *strides(x), *strides(dy), *strides(dx), *self._sizes(at), **self._constants(),
            )  # fmt: skip
            for partial, gradient in zip(sums, into[at]):
                add_up(partial, 0, gradient)

    def table_grad(self, dq: Tensor, dk: Tensor, into: Tensor | None, unrotated: bool = False) -> None:
        """The table's, from the gradients of the prepared q and k or (without norm and index) from those of q and k."""
        if into is None:
            return
        q, k, _ = self.x
        shared = into.shape[1] != self.heads
        drope = into.new_empty(2, self.heads, self.table_rows, self.head_dim // 2) if shared else into
        weights = (self.qw, self.qb, self.kw, self.kb, drope)
        where = (*strides(q), *strides(dq), *strides(dk))
        sizes = (self.first, self.count, self.prefix, self.rotated, self.eps)
        constants = {"HEAD_DIM": self.head_dim, "PAD": self.pad, "NORM": self.norm, "BLOCK_M": ROPE_ROWS}
        if self.index is None:
            _rope_attention_bwd_drope_kernel[(-(-self.table_rows // ROPE_ROWS), self.heads)](
                q, k, dq, dk, self.rope, *weights, *where, *self.rope_strides, self.batch, *sizes,
                UNROTATED=unrotated, **constants, num_warps=8 if self.head_dim > 80 else 4,
            )  # fmt: skip
        else:
            rows, order = self.index.flatten().sort(stable=True)
            bounds = torch.arange(self.table_rows + 1, device=rows.device)
            starts = torch.searchsorted(rows, bounds)
            _rope_attention_bwd_drope_index_kernel[(self.table_rows, self.heads)](
                q, k, dq, dk, order, starts, *weights, *where, *sizes, **constants
            )
        if shared:
            add_up(drope, 1, into[:, 0])
