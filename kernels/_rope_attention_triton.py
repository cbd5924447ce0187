# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""Triton kernels and launchers of `rope_attention` (the formula, the checks and the record are in rope_attention.py).

    forward      _fwd rotates q once and k tile by tile, in registers
    backward     _bwd_dq (also stores delta = sum(out * d_out)) -> _bwd_dkdv; both un-rotate, then store

With a q/k norm or an index the row kernels of `_rope_rows_triton` write the prepared q and k once, ahead of the same
kernels without rotation, and take their gradients; the gradient of the table is always theirs.

A head_dim is cut into MAIN + TAIL columns (`_tiles.head_split`); TAIL = 0 drops the second part at compile time.
Only the image tokens' rows of the table are loaded: elsewhere the mask makes cos 1 and sin 0 without memory traffic.
Softmax runs in base 2 with the scale folded in; log-sum-exp is stored in base e. All accumulation is fp32.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._rope_rows_triton import RowCall, _load_rows, _rotate, _store_rows, strides
from ._tiles import attention_tile, head_split
from ._triton import tl, triton

__all__ = ["triton_backward", "triton_forward"]


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


def _sizes(call: RowCall) -> tuple[Any, ...]:
    prefix, scale = call.prefix, call.head_dim**-0.5
    first = 0 if call.rowwise else call.first  # where a query's row lies; it matters to the rotation, then done
    return (*call.rope_strides, call.n, call.count, first, prefix, call.rotated, call.heads, scale)


def _constants(call: RowCall, kernel: str) -> dict[str, Any]:
    main, tail = head_split(call.head_dim)
    rotates = call.rope is not None and not call.rowwise
    tile = attention_tile(kernel, call.qkv.element_size(), call.head_dim, rotates)
    return {
        "HEAD_DIM": call.head_dim,
        "MAIN": main,
        "TAIL": tail,
        "ROPE": rotates,
        "PRECISION": "ieee",
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
    }


def _operands(call: RowCall) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v of the attention kernels, which add `first_query` to q's rows unless it was prepared."""
    if call.rowwise:
        return (*call.prepare(), call.x[2])
    q, k, v = call.qkv.unbind(2)
    return q, k, v


def triton_forward(a: Any, out: Any) -> None:
    """Fills out.y (B, Nq, heads * head_dim) and out.lse (B, heads, Nq) fp32."""
    call = RowCall(a)
    q, k, v = _operands(call)
    options = _constants(call, "fwd")
    grid = (-(-call.count // options["BLOCK_M"]), call.heads, call.batch)
    _rope_attention_fwd_kernel[grid](
        q, k, v, call.table(), out.y, out.lse, *strides(q), *strides(k), *strides(v), *_sizes(call), **options
    )


def triton_backward(a: Any, out: Any, g: Any, d: Any) -> None:
    """Gradients of qkv, rope and the four norm weights. Absent queries cost nothing but zeros."""
    call = RowCall(a)
    q, k, v = _operands(call)
    call.zero_absent(d.qkv)
    dq, dk, dv = d.qkv.unbind(2)
    if call.rowwise:
        dq, dk = torch.empty_like(q), torch.empty_like(k)
    delta = torch.empty_like(out.lse)
    where = (*strides(q), *strides(k), *strides(v))
    options = _constants(call, "dq")
    _rope_attention_bwd_dq_kernel[(-(-call.count // options["BLOCK_M"]), call.heads, call.batch)](
        q, k, v, call.table(), out.y, g.y, out.lse, delta, dq, *where, *strides(dq), *_sizes(call), **options
    )
    options = _constants(call, "dkdv")
    _rope_attention_bwd_dkdv_kernel[(-(-call.n // options["BLOCK_N"]), call.heads, call.batch)](
        q, k, v, call.table(), g.y, out.lse, delta, dk, dv, *where, *strides(dk), *strides(dv), *_sizes(call), **options
    )
    if call.rowwise:
        call.table_grad(dq, dk, d.rope)
        call.finish(dq, dk, d)
    else:
        call.table_grad(call.sliced(d.qkv)[0], dk, d.rope, unrotated=True)
