# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""Triton kernels and launchers of `rope_attention` (the formula, the checks and the record are in rope_attention.py).

    forward      no q/k norm:  _fwd (rotates q once, k tile by tile, in registers)
                 q/k norm:     _prepare (normalise + rotate rows of q and k) -> _fwd without rotation
    backward     no q/k norm:  _bwd_dq (also stores delta = sum(out * d_out)) -> _bwd_dkdv; both un-rotate, then store
                 q/k norm:     _prepare -> the two without rotation -> _finish (un-rotate, norm backward, weight sums)
                 d_rope:       _bwd_drope, one program per (token block, head), loops over the batch: no atomics

A head_dim is cut into MAIN + TAIL columns (`_tiles.head_split`); TAIL = 0 drops the second part at compile time.
Only the image tokens' rows of the table are loaded: elsewhere the mask makes cos 1 and sin 0 without memory traffic.
Softmax runs in base 2 with the scale folded in; log-sum-exp is stored in base e. All accumulation is fp32.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ._tiles import attention_tile, head_split, next_power_of_2
from ._triton import tl, triton

__all__ = ["triton_backward", "triton_forward"]

_NORMS = {"none": 0, "rms": 1, "layer": 2}
_ROWS = 32  # rows of one program of the row kernels


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
def _load_rotated(
    ptr, rope_ptr, stride_rc, offs_n, mask_n, stride_n, prefix, M,
    ROPE: tl.constexpr, D0: tl.constexpr, WIDTH: tl.constexpr, HEAD_DIM: tl.constexpr,
):  # fmt: skip
    x = _load_rows(ptr, offs_n, mask_n, stride_n, D0, WIDTH, HEAD_DIM)
    if ROPE:
        x = _rotate(x, rope_ptr, stride_rc, offs_n, prefix, M, D0, WIDTH, HEAD_DIM, False).to(ptr.dtype.element_ty)
    return x


# ---- attention -----------------------------------------------------------------------------------------------------


@triton.jit
def _rope_attention_fwd_kernel(
    q_ptr, k_ptr, v_ptr, rope_ptr, out_ptr, lse_ptr,
    stride_qb, stride_qn, stride_kb, stride_kn, stride_vb, stride_vn,
    stride_rc, stride_rh, N, NQ, first_query, prefix, M, H, scale,
    HEAD_DIM: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr, ROPE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_M queries of one head of one image; q rows are counted from first_query."""
    pid_m, pid_h, pid_b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    q_ptr += pid_b * stride_qb + pid_h * HEAD_DIM
    k_ptr += pid_b * stride_kb + pid_h * HEAD_DIM
    v_ptr += pid_b * stride_vb + pid_h * HEAD_DIM
    rope_ptr += pid_h * stride_rh
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = offs_m < NQ
    offs_q = first_query + offs_m
    q = _load_rotated(q_ptr, rope_ptr, stride_rc, offs_q, mask_m, stride_qn, prefix, M, ROPE, 0, MAIN, HEAD_DIM)
    acc = tl.zeros((BLOCK_M, MAIN), tl.float32)
    if TAIL:
        q_tail = _load_rotated(
            q_ptr, rope_ptr, stride_rc, offs_q, mask_m, stride_qn, prefix, M, ROPE, MAIN, TAIL, HEAD_DIM
        )
        acc_tail = tl.zeros((BLOCK_M, TAIL), tl.float32)
    high = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    scale *= 1.4426950408889634
    for start_n in range(0, N, BLOCK_N):
        offs_n = start_n + tl.arange(0, BLOCK_N)
        mask_n = offs_n < N
        k = _load_rotated(k_ptr, rope_ptr, stride_rc, offs_n, mask_n, stride_kn, prefix, M, ROPE, 0, MAIN, HEAD_DIM)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        if TAIL:
            k_tail = _load_rotated(
                k_ptr, rope_ptr, stride_rc, offs_n, mask_n, stride_kn, prefix, M, ROPE, MAIN, TAIL, HEAD_DIM
            )
            s = tl.dot(q_tail, tl.trans(k_tail), s, input_precision=PRECISION)
        s = tl.where(mask_n[None, :], s * scale, float("-inf"))
        new_high = tl.maximum(high, tl.max(s, 1))
        shrink = tl.exp2(high - new_high)
        p = tl.exp2(s - new_high[:, None])
        total = total * shrink + tl.sum(p, 1)
        high = new_high
        v = _load_rows(v_ptr, offs_n, mask_n, stride_vn, 0, MAIN, HEAD_DIM)
        acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision=PRECISION)
        if TAIL:
            v_tail = _load_rows(v_ptr, offs_n, mask_n, stride_vn, MAIN, TAIL, HEAD_DIM)
            acc_tail = tl.dot(p.to(v.dtype), v_tail, acc_tail * shrink[:, None], input_precision=PRECISION)
    out_ptr += (pid_b * NQ * H + pid_h) * HEAD_DIM
    _store_rows(out_ptr, acc / total[:, None], offs_m, mask_m, H * HEAD_DIM, 0, MAIN, HEAD_DIM)
    if TAIL:
        _store_rows(out_ptr, acc_tail / total[:, None], offs_m, mask_m, H * HEAD_DIM, MAIN, TAIL, HEAD_DIM)
    lse = (high + tl.log2(total)) * 0.6931471805599453
    tl.store(lse_ptr + (pid_b * H + pid_h) * NQ + offs_m, lse, mask=mask_m)


@triton.jit
def _rope_attention_bwd_dq_kernel(
    q_ptr, k_ptr, v_ptr, rope_ptr, out_ptr, do_ptr, lse_ptr, delta_ptr, dq_ptr,
    stride_qb, stride_qn, stride_kb, stride_kn, stride_vb, stride_vn,
    stride_dqb, stride_dqn,
    stride_rc, stride_rh, N, NQ, first_query, prefix, M, H, scale,
    HEAD_DIM: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr, ROPE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """d_q of BLOCK_M queries, un-rotated, and delta for the other kernel. out, d_out are (B, NQ, H, HEAD_DIM)."""
    pid_m, pid_h, pid_b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    q_ptr += pid_b * stride_qb + pid_h * HEAD_DIM
    k_ptr += pid_b * stride_kb + pid_h * HEAD_DIM
    v_ptr += pid_b * stride_vb + pid_h * HEAD_DIM
    dq_ptr += pid_b * stride_dqb + pid_h * HEAD_DIM
    rope_ptr += pid_h * stride_rh
    out_ptr += (pid_b * NQ * H + pid_h) * HEAD_DIM
    do_ptr += (pid_b * NQ * H + pid_h) * HEAD_DIM
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = offs_m < NQ
    offs_q = first_query + offs_m
    q = _load_rotated(q_ptr, rope_ptr, stride_rc, offs_q, mask_m, stride_qn, prefix, M, ROPE, 0, MAIN, HEAD_DIM)
    do = _load_rows(do_ptr, offs_m, mask_m, H * HEAD_DIM, 0, MAIN, HEAD_DIM)
    out = _load_rows(out_ptr, offs_m, mask_m, H * HEAD_DIM, 0, MAIN, HEAD_DIM)
    delta = tl.sum(out.to(tl.float32) * do.to(tl.float32), 1)
    dq = tl.zeros((BLOCK_M, MAIN), tl.float32)
    if TAIL:
        q_tail = _load_rotated(
            q_ptr, rope_ptr, stride_rc, offs_q, mask_m, stride_qn, prefix, M, ROPE, MAIN, TAIL, HEAD_DIM
        )
        do_tail = _load_rows(do_ptr, offs_m, mask_m, H * HEAD_DIM, MAIN, TAIL, HEAD_DIM)
        out_tail = _load_rows(out_ptr, offs_m, mask_m, H * HEAD_DIM, MAIN, TAIL, HEAD_DIM)
        delta += tl.sum(out_tail.to(tl.float32) * do_tail.to(tl.float32), 1)
        dq_tail = tl.zeros((BLOCK_M, TAIL), tl.float32)
    row = (pid_b * H + pid_h) * NQ + offs_m
    tl.store(delta_ptr + row, delta, mask=mask_m)
    lse = tl.load(lse_ptr + row, mask=mask_m, other=0.0) * 1.4426950408889634
    for start_n in range(0, N, BLOCK_N):
        offs_n = start_n + tl.arange(0, BLOCK_N)
        mask_n = offs_n < N
        k = _load_rotated(k_ptr, rope_ptr, stride_rc, offs_n, mask_n, stride_kn, prefix, M, ROPE, 0, MAIN, HEAD_DIM)
        v = _load_rows(v_ptr, offs_n, mask_n, stride_vn, 0, MAIN, HEAD_DIM)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        dp = tl.dot(do, tl.trans(v), input_precision=PRECISION)
        if TAIL:
            k_tail = _load_rotated(
                k_ptr, rope_ptr, stride_rc, offs_n, mask_n, stride_kn, prefix, M, ROPE, MAIN, TAIL, HEAD_DIM
            )
            v_tail = _load_rows(v_ptr, offs_n, mask_n, stride_vn, MAIN, TAIL, HEAD_DIM)
            s = tl.dot(q_tail, tl.trans(k_tail), s, input_precision=PRECISION)
            dp = tl.dot(do_tail, tl.trans(v_tail), dp, input_precision=PRECISION)
        p = tl.exp2(s * (scale * 1.4426950408889634) - lse[:, None])
        ds = tl.where(mask_n[None, :], p * (dp - delta[:, None]), 0.0).to(k.dtype)
        dq = tl.dot(ds, k, dq, input_precision=PRECISION)
        if TAIL:
            dq_tail = tl.dot(ds, k_tail, dq_tail, input_precision=PRECISION)
    dq *= scale
    if ROPE:
        dq = _rotate(dq, rope_ptr, stride_rc, offs_q, prefix, M, 0, MAIN, HEAD_DIM, True)
    _store_rows(dq_ptr, dq, offs_q, mask_m, stride_dqn, 0, MAIN, HEAD_DIM)
    if TAIL:
        dq_tail *= scale
        if ROPE:
            dq_tail = _rotate(dq_tail, rope_ptr, stride_rc, offs_q, prefix, M, MAIN, TAIL, HEAD_DIM, True)
        _store_rows(dq_ptr, dq_tail, offs_q, mask_m, stride_dqn, MAIN, TAIL, HEAD_DIM)


@triton.jit
def _rope_attention_bwd_dkdv_kernel(
    q_ptr, k_ptr, v_ptr, rope_ptr, do_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr,
    stride_qb, stride_qn, stride_kb, stride_kn, stride_vb, stride_vn,
    stride_dkb, stride_dkn, stride_dvb, stride_dvn,
    stride_rc, stride_rh, N, NQ, first_query, prefix, M, H, scale,
    HEAD_DIM: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr, ROPE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """d_k (un-rotated) and d_v of BLOCK_N keys."""
    pid_n, pid_h, pid_b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    q_ptr += pid_b * stride_qb + pid_h * HEAD_DIM
    k_ptr += pid_b * stride_kb + pid_h * HEAD_DIM
    v_ptr += pid_b * stride_vb + pid_h * HEAD_DIM
    dk_ptr += pid_b * stride_dkb + pid_h * HEAD_DIM
    dv_ptr += pid_b * stride_dvb + pid_h * HEAD_DIM
    rope_ptr += pid_h * stride_rh
    do_ptr += (pid_b * NQ * H + pid_h) * HEAD_DIM
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < N
    k = _load_rotated(k_ptr, rope_ptr, stride_rc, offs_n, mask_n, stride_kn, prefix, M, ROPE, 0, MAIN, HEAD_DIM)
    v = _load_rows(v_ptr, offs_n, mask_n, stride_vn, 0, MAIN, HEAD_DIM)
    dk = tl.zeros((BLOCK_N, MAIN), tl.float32)
    dv = tl.zeros((BLOCK_N, MAIN), tl.float32)
    if TAIL:
        k_tail = _load_rotated(
            k_ptr, rope_ptr, stride_rc, offs_n, mask_n, stride_kn, prefix, M, ROPE, MAIN, TAIL, HEAD_DIM
        )
        v_tail = _load_rows(v_ptr, offs_n, mask_n, stride_vn, MAIN, TAIL, HEAD_DIM)
        dk_tail = tl.zeros((BLOCK_N, TAIL), tl.float32)
        dv_tail = tl.zeros((BLOCK_N, TAIL), tl.float32)
    for start_m in range(0, NQ, BLOCK_M):
        offs_m = start_m + tl.arange(0, BLOCK_M)
        mask_m = offs_m < NQ
        offs_q = first_query + offs_m
        q = _load_rotated(q_ptr, rope_ptr, stride_rc, offs_q, mask_m, stride_qn, prefix, M, ROPE, 0, MAIN, HEAD_DIM)
        do = _load_rows(do_ptr, offs_m, mask_m, H * HEAD_DIM, 0, MAIN, HEAD_DIM)
        s = tl.dot(k, tl.trans(q), input_precision=PRECISION)
        dp = tl.dot(v, tl.trans(do), input_precision=PRECISION)
        if TAIL:
            q_tail = _load_rotated(
                q_ptr, rope_ptr, stride_rc, offs_q, mask_m, stride_qn, prefix, M, ROPE, MAIN, TAIL, HEAD_DIM
            )
            do_tail = _load_rows(do_ptr, offs_m, mask_m, H * HEAD_DIM, MAIN, TAIL, HEAD_DIM)
            s = tl.dot(k_tail, tl.trans(q_tail), s, input_precision=PRECISION)
            dp = tl.dot(v_tail, tl.trans(do_tail), dp, input_precision=PRECISION)
        row = (pid_b * H + pid_h) * NQ + offs_m
        lse = tl.load(lse_ptr + row, mask=mask_m, other=0.0) * 1.4426950408889634
        delta = tl.load(delta_ptr + row, mask=mask_m, other=0.0)
        p = tl.exp2(s * (scale * 1.4426950408889634) - lse[None, :])
        p = tl.where(mask_m[None, :], p, 0.0)
        dv = tl.dot(p.to(do.dtype), do, dv, input_precision=PRECISION)
        ds = (p * (dp - delta[None, :])).to(q.dtype)
        dk = tl.dot(ds, q, dk, input_precision=PRECISION)
        if TAIL:
            dv_tail = tl.dot(p.to(do.dtype), do_tail, dv_tail, input_precision=PRECISION)
            dk_tail = tl.dot(ds, q_tail, dk_tail, input_precision=PRECISION)
    dk *= scale
    if ROPE:
        dk = _rotate(dk, rope_ptr, stride_rc, offs_n, prefix, M, 0, MAIN, HEAD_DIM, True)
    _store_rows(dk_ptr, dk, offs_n, mask_n, stride_dkn, 0, MAIN, HEAD_DIM)
    _store_rows(dv_ptr, dv, offs_n, mask_n, stride_dvn, 0, MAIN, HEAD_DIM)
    if TAIL:
        dk_tail *= scale
        if ROPE:
            dk_tail = _rotate(dk_tail, rope_ptr, stride_rc, offs_n, prefix, M, MAIN, TAIL, HEAD_DIM, True)
        _store_rows(dk_ptr, dk_tail, offs_n, mask_n, stride_dkn, MAIN, TAIL, HEAD_DIM)
        _store_rows(dv_ptr, dv_tail, offs_n, mask_n, stride_dvn, MAIN, TAIL, HEAD_DIM)


# ---- rows: q/k norm, its backward, and the gradient of the table -----------------------------------------------------


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


@triton.jit
def _qk_prepare_kernel(
    x_ptr, rope_ptr, weight_ptr, bias_ptr, y_ptr,
    stride_xb, stride_xn, stride_yb, stride_yn, stride_rc, stride_rh, N, prefix, M, eps,
    HEAD_DIM: tl.constexpr, PAD: tl.constexpr, NORM: tl.constexpr, ROPE: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """y = R norm(x) for BLOCK_N tokens of one head (q or k)."""
    pid_n, pid_h, pid_b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < N
    mask = mask_n[:, None] & (tl.arange(0, PAD) < HEAD_DIM)[None, :]
    x = _load_rows(x_ptr + pid_b * stride_xb + pid_h * HEAD_DIM, offs_n, mask_n, stride_xn, 0, PAD, HEAD_DIM)
    _x_hat, _rstd, y = _normalise(x.to(tl.float32), mask, weight_ptr, bias_ptr, eps, NORM, HEAD_DIM, PAD)
    if ROPE:
        y = _rotate(y, rope_ptr + pid_h * stride_rh, stride_rc, offs_n, prefix, M, 0, PAD, HEAD_DIM, False)
    _store_rows(y_ptr + pid_b * stride_yb + pid_h * HEAD_DIM, y, offs_n, mask_n, stride_yn, 0, PAD, HEAD_DIM)


@triton.jit
def _qk_finish_kernel(
    x_ptr, rope_ptr, weight_ptr, dy_ptr, dx_ptr, dweight_ptr, dbias_ptr,
    stride_xb, stride_xn, stride_yb, stride_yn, stride_db, stride_dn,
    stride_rc, stride_rh, N, prefix, M, eps,
    HEAD_DIM: tl.constexpr, PAD: tl.constexpr, NORM: tl.constexpr, ROPE: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Backward of `_qk_prepare_kernel`: d_x, and this program's sums of d_weight and d_bias (one row each)."""
    pid_n, pid_h, pid_b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, PAD)
    mask_n = offs_n < N
    mask = mask_n[:, None] & (offs_d < HEAD_DIM)[None, :]
    x = _load_rows(x_ptr + pid_b * stride_xb + pid_h * HEAD_DIM, offs_n, mask_n, stride_xn, 0, PAD, HEAD_DIM)
    x_hat, rstd, _y = _normalise(x.to(tl.float32), mask, None, None, eps, NORM, HEAD_DIM, PAD)
    dy = _load_rows(dy_ptr + pid_b * stride_yb + pid_h * HEAD_DIM, offs_n, mask_n, stride_yn, 0, PAD, HEAD_DIM)
    dy = dy.to(tl.float32)
    if ROPE:
        dy = _rotate(dy, rope_ptr + pid_h * stride_rh, stride_rc, offs_n, prefix, M, 0, PAD, HEAD_DIM, True)
    program = (pid_b * tl.num_programs(1) + pid_h) * tl.num_programs(0) + pid_n
    tl.store(dweight_ptr + program * HEAD_DIM + offs_d, tl.sum(dy * x_hat, 0), mask=offs_d < HEAD_DIM)
    tl.store(dbias_ptr + program * HEAD_DIM + offs_d, tl.sum(dy, 0), mask=offs_d < HEAD_DIM)
    if weight_ptr is not None:
        dy = dy * tl.load(weight_ptr + offs_d, mask=offs_d < HEAD_DIM, other=0.0)[None, :]
    dx = dy - x_hat * (tl.sum(dy * x_hat, 1) / HEAD_DIM)[:, None]
    if NORM == 2:
        dx -= (tl.sum(dy, 1) / HEAD_DIM)[:, None]
    dx_ptr += pid_b * stride_db + pid_h * HEAD_DIM
    _store_rows(dx_ptr, dx * rstd[:, None], offs_n, mask_n, stride_dn, 0, PAD, HEAD_DIM)


@triton.jit
def _table_terms(
    x_ptr, d_ptr, rope_ptr, weight_ptr, bias_ptr, stride_xn, stride_dn, stride_rc, offs_n, mask_n, mask, prefix, M, eps,
    HEAD_DIM: tl.constexpr, PAD: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    """(d_cos, d_sin) that the rows offs_n of one tensor (q or k) of one image contribute."""
    x = _load_rows(x_ptr, offs_n, mask_n, stride_xn, 0, PAD, HEAD_DIM).to(tl.float32)
    dy = _load_rows(d_ptr, offs_n, mask_n, stride_dn, 0, PAD, HEAD_DIM).to(tl.float32)
    if NORM:
        _x_hat, _rstd, x = _normalise(x, mask, weight_ptr, bias_ptr, eps, NORM, HEAD_DIM, PAD)
    else:
        dy = _rotate(dy, rope_ptr, stride_rc, offs_n, prefix, M, 0, PAD, HEAD_DIM, False)
    xa, xb = tl.split(tl.reshape(x, (x.shape[0], PAD // 2, 2)))
    da, db = tl.split(tl.reshape(dy, (x.shape[0], PAD // 2, 2)))
    return da * xa + db * xb, db * xa - da * xb


@triton.jit
def _rope_attention_bwd_drope_kernel(
    q_ptr, k_ptr, dq_ptr, dk_ptr, rope_ptr, qw_ptr, qb_ptr, kw_ptr, kb_ptr, drope_ptr,
    stride_xb, stride_xn, stride_db, stride_dn,
    stride_rc, stride_rh, B, first_query, NQ, prefix, M, eps,
    HEAD_DIM: tl.constexpr, PAD: tl.constexpr, NORM: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """d_cos and d_sin (2, H, M, HEAD_DIM / 2) of BLOCK_M table rows of one head, summed over the batch and over q, k.

    x is what was rotated, dy the gradient of the rotated: d_cos = dy_a x_a + dy_b x_b, d_sin = dy_b x_a - dy_a x_b.
    Without a norm d_q, d_k are stored un-rotated, so dy = R d_x; with one they are the rotated's gradients themselves.
    """
    pid_m, pid_h = tl.program_id(0), tl.program_id(1).to(tl.int64)
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = prefix + offs_m
    mask_m = offs_m < M
    mask = mask_m[:, None] & (tl.arange(0, PAD) < HEAD_DIM)[None, :]
    mask_q = mask_m & (offs_n >= first_query) & (offs_n < first_query + NQ)
    q_ptr += pid_h * HEAD_DIM
    k_ptr += pid_h * HEAD_DIM
    dq_ptr += pid_h * HEAD_DIM
    dk_ptr += pid_h * HEAD_DIM
    rope_ptr += pid_h * stride_rh
    dcos = tl.zeros((BLOCK_M, PAD // 2), tl.float32)
    dsin = tl.zeros((BLOCK_M, PAD // 2), tl.float32)
    for _ in range(B):
        c, s = _table_terms(
            q_ptr, dq_ptr, rope_ptr, qw_ptr, qb_ptr, stride_xn, stride_dn, stride_rc,
            offs_n, mask_q, mask, prefix, M, eps, HEAD_DIM, PAD, NORM,
        )  # fmt: skip
        dcos += c
        dsin += s
        c, s = _table_terms(
            k_ptr, dk_ptr, rope_ptr, kw_ptr, kb_ptr, stride_xn, stride_dn, stride_rc,
            offs_n, mask_m, mask, prefix, M, eps, HEAD_DIM, PAD, NORM,
        )  # fmt: skip
        dcos += c
        dsin += s
        q_ptr += stride_xb
        k_ptr += stride_xb
        dq_ptr += stride_db
        dk_ptr += stride_db
    offs_j = tl.arange(0, PAD // 2)
    where = (pid_h * M + offs_m)[:, None] * (HEAD_DIM // 2) + offs_j[None, :]
    mask_j = mask_m[:, None] & (offs_j < HEAD_DIM // 2)[None, :]
    tl.store(drope_ptr + where, dcos, mask=mask_j)
    tl.store(drope_ptr + where + tl.num_programs(1) * M * (HEAD_DIM // 2), dsin, mask=mask_j)


# ---- launchers -----------------------------------------------------------------------------------------------------


class _Call:
    """One call's sizes, strides and compile-time constants, shared by the launches of forward and backward."""

    def __init__(self, args: tuple[Any, ...]) -> None:
        qkv, rope, self.qw, self.qb, self.kw, self.kb, self.prefix, norm, self.eps, first, count = args
        self.qkv, self.rope = qkv, rope
        self.batch, self.n, _, self.heads, self.head_dim = qkv.shape
        self.norm = _NORMS[norm]
        self.first = first
        self.count = self.n - first if count is None else count
        shared = rope is None or rope.shape[1] == 1
        self.rows = 0 if rope is None else rope.shape[2]
        self.rope_strides = (0, 0) if self.rope is None else (self.rope.stride(0), 0 if shared else self.rope.stride(1))
        self.pad = next_power_of_2(self.head_dim)
        self.q, self.k, self.v = self.qkv.unbind(2)
        if self.norm:
            prepared = torch.empty(2, self.batch, self.n, self.heads, self.head_dim, dtype=qkv.dtype, device=qkv.device)
            for x, y, weight, bias in (
                (self.q, prepared[0], self.qw, self.qb),
                (self.k, prepared[1], self.kw, self.kb),
            ):
                _qk_prepare_kernel[self.row_grid()](
                    x, self.table(), weight, bias, y, *_strides(x), *_strides(y), *self.rope_strides,
                    self.n, self.prefix, self.rows, self.eps,
                    HEAD_DIM=self.head_dim, PAD=self.pad, NORM=self.norm, ROPE=self.rope is not None, BLOCK_N=_ROWS,
                )  # fmt: skip
            self.q, self.k = prepared.unbind(0)

    def table(self) -> Tensor:
        """The table, or any tensor in its place: the kernels do not read it when ROPE is off."""
        return self.qkv if self.rope is None else self.rope

    def row_grid(self) -> tuple[int, int, int]:
        return (-(-self.n // _ROWS), self.heads, self.batch)

    def sizes(self) -> tuple[Any, ...]:
        scale = self.head_dim**-0.5
        return (*self.rope_strides, self.n, self.count, self.first, self.prefix, self.rows, self.heads, scale)

    def constants(self, kernel: str) -> dict[str, Any]:
        main, tail = head_split(self.head_dim)
        rotates = self.rope is not None and not self.norm
        tile = attention_tile(kernel, self.qkv.element_size(), self.head_dim, rotates)
        return {
            "HEAD_DIM": self.head_dim,
            "MAIN": main,
            "TAIL": tail,
            "ROPE": rotates,
            "PRECISION": "ieee",
            "BLOCK_M": tile.block_m,
            "BLOCK_N": tile.block_n,
            "num_warps": tile.num_warps,
            "num_stages": tile.num_stages,
        }


def _strides(x: Tensor) -> tuple[int, int]:
    """(batch, token) strides of a (B, N, heads, head_dim) view whose heads are contiguous."""
    return x.stride(0), x.stride(1)


def triton_forward(*args: Any) -> tuple[Tensor, ...]:
    """(out (B, Nq, heads * head_dim), lse (B, heads, Nq) fp32)."""
    call = _Call(args)
    out = call.qkv.new_empty(call.batch, call.count, call.heads * call.head_dim)
    lse = call.qkv.new_empty(call.batch, call.heads, call.count, dtype=torch.float32)
    options = call.constants("fwd")
    grid = (-(-call.count // options["BLOCK_M"]), call.heads, call.batch)
    _rope_attention_fwd_kernel[grid](
        call.q, call.k, call.v, call.table(), out, lse,
        *_strides(call.q), *_strides(call.k), *_strides(call.v), *call.sizes(), **options,
    )  # fmt: skip
    return out, lse


def triton_backward(
    grad: Tensor, saved: Sequence[Tensor], args: tuple[Any, ...], needs: Sequence[bool]
) -> Sequence[Tensor | None]:
    """Gradients of qkv, rope and the four norm weights."""
    call = _Call(args)
    out, lse = saved
    pruned = call.count != call.n
    allocate = torch.zeros if pruned else torch.empty  # pruned queries get no gradient through q
    dqkv = allocate(call.qkv.shape, dtype=grad.dtype, device=grad.device)
    dq, dk, dv = dqkv.unbind(2)
    if call.norm:
        rotated = allocate((2, *dq.shape), dtype=grad.dtype, device=grad.device)
        dq, dk = rotated.unbind(0)
    delta = torch.empty_like(lse)
    strides = (*_strides(call.q), *_strides(call.k), *_strides(call.v))
    options = call.constants("dq")
    _rope_attention_bwd_dq_kernel[(-(-call.count // options["BLOCK_M"]), call.heads, call.batch)](
        call.q, call.k, call.v, call.table(), out, grad, lse, delta, dq,
        *strides, *_strides(dq), *call.sizes(), **options,
    )  # fmt: skip
    options = call.constants("dkdv")
    _rope_attention_bwd_dkdv_kernel[(-(-call.n // options["BLOCK_N"]), call.heads, call.batch)](
        call.q, call.k, call.v, call.table(), grad, lse, delta, dk, dv,
        *strides, *_strides(dk), *_strides(dv), *call.sizes(), **options,
    )  # fmt: skip
    grads: list[Tensor | None] = [dqkv] + [None] * (len(args) - 1)
    if needs[1] and call.rope is not None:
        grads[1] = _drope(call, dq, dk)
    if call.norm:
        _finish(call, dq, dk, dqkv, grads)
    return grads


def _drope(call: _Call, dq: Tensor, dk: Tensor) -> Tensor:
    assert call.rope is not None
    q, k = call.qkv[:, :, 0], call.qkv[:, :, 1]
    drope = call.rope.new_empty(2, call.heads, call.rows, call.head_dim // 2)
    _rope_attention_bwd_drope_kernel[(-(-call.rows // _ROWS), call.heads)](
        q, k, dq, dk, call.rope, call.qw, call.qb, call.kw, call.kb, drope,
        *_strides(q), *_strides(dq), *call.rope_strides,
        call.batch, call.first, call.count, call.prefix, call.rows, call.eps,
        HEAD_DIM=call.head_dim, PAD=call.pad, NORM=call.norm, BLOCK_M=_ROWS,
    )  # fmt: skip
    return drope if call.rope.shape[1] == call.heads else drope.sum(1, keepdim=True)


def _finish(call: _Call, dq: Tensor, dk: Tensor, dqkv: Tensor, grads: list[Tensor | None]) -> None:
    """q/k norm backward into dqkv; d_weight and d_bias are summed over the programs' rows (fp32, fixed order)."""
    grid = call.row_grid()
    for at, (dy, weight) in enumerate(((dq, call.qw), (dk, call.kw))):
        x, dx = call.qkv[:, :, at], dqkv[:, :, at]
        sums = dqkv.new_empty(2, grid[0] * grid[1] * grid[2], call.head_dim, dtype=torch.float32)
        _qk_finish_kernel[grid](
            x, call.table(), weight, dy, dx, sums[0], sums[1],
            *_strides(x), *_strides(dy), *_strides(dx), *call.rope_strides, call.n, call.prefix, call.rows, call.eps,
            HEAD_DIM=call.head_dim, PAD=call.pad, NORM=call.norm, ROPE=call.rope is not None, BLOCK_N=_ROWS,
        )  # fmt: skip
        grads[2 + 2 * at], grads[3 + 2 * at] = sums[0].sum(0), sums[1].sum(0)
