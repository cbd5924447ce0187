# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""Triton kernel and launcher of `rope_attention_jvp`: the forward of `_rope_attention_triton` with tangents beside.
A program holds two accumulators, of y and of dy, and rescales both where the maximum grows; what W = P o dS
adds up to is subtracted at the end."""

from __future__ import annotations

from typing import Any

from ._rope_attention_triton import _load_rotated
from ._rope_formula import query_count
from ._rope_rows_triton import _load_rows, _store_rows, strides
from ._tiles import attention_tile, head_split
from ._triton import tl, triton

__all__ = ["triton_forward"]


@triton.jit
def _rope_attention_jvp_kernel(
    q_ptr, k_ptr, v_ptr, dq_ptr, dk_ptr, dv_ptr, rope_ptr, y_ptr, dy_ptr, lse_ptr,
    stride_b, stride_n, stride_rc, stride_rh, N, NQ, first_query, prefix, M, H, scale,
    HEAD_DIM: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr, ROPE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_M queries of one head of one image. qkv and dqkv lie alike: one pair of strides."""
    pid_m, pid_h, pid_b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    head = pid_b * stride_b + pid_h * HEAD_DIM
    q_ptr += head
    k_ptr += head
    v_ptr += head
    dq_ptr += head
    dk_ptr += head
    dv_ptr += head
    rope_ptr += pid_h * stride_rh
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = offs_m < NQ
    offs_q = first_query + offs_m
    q = _load_rotated(q_ptr, rope_ptr, stride_rc, offs_q, mask_m, stride_n, prefix, M, ROPE, 0, MAIN, HEAD_DIM)
    dq = _load_rotated(dq_ptr, rope_ptr, stride_rc, offs_q, mask_m, stride_n, prefix, M, ROPE, 0, MAIN, HEAD_DIM)
    acc = tl.zeros((BLOCK_M, MAIN), tl.float32)
    dacc = tl.zeros((BLOCK_M, MAIN), tl.float32)
    if TAIL:
        q_tail = _load_rotated(
            q_ptr, rope_ptr, stride_rc, offs_q, mask_m, stride_n, prefix, M, ROPE, MAIN, TAIL, HEAD_DIM
        )
        dq_tail = _load_rotated(
            dq_ptr, rope_ptr, stride_rc, offs_q, mask_m, stride_n, prefix, M, ROPE, MAIN, TAIL, HEAD_DIM
        )
        acc_tail = tl.zeros((BLOCK_M, TAIL), tl.float32)
        dacc_tail = tl.zeros((BLOCK_M, TAIL), tl.float32)
    high = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    slope = tl.zeros((BLOCK_M,), tl.float32)
    for start_n in range(0, N, BLOCK_N):
        offs_n = start_n + tl.arange(0, BLOCK_N)
        mask_n = offs_n < N
        k = _load_rotated(k_ptr, rope_ptr, stride_rc, offs_n, mask_n, stride_n, prefix, M, ROPE, 0, MAIN, HEAD_DIM)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        ds = tl.dot(dq, tl.trans(k), input_precision=PRECISION)
        dk = _load_rotated(dk_ptr, rope_ptr, stride_rc, offs_n, mask_n, stride_n, prefix, M, ROPE, 0, MAIN, HEAD_DIM)
        ds = tl.dot(q, tl.trans(dk), ds, input_precision=PRECISION)
        if TAIL:
            k = _load_rotated(
                k_ptr, rope_ptr, stride_rc, offs_n, mask_n, stride_n, prefix, M, ROPE, MAIN, TAIL, HEAD_DIM
            )
            s = tl.dot(q_tail, tl.trans(k), s, input_precision=PRECISION)
            ds = tl.dot(dq_tail, tl.trans(k), ds, input_precision=PRECISION)
            dk = _load_rotated(
                dk_ptr, rope_ptr, stride_rc, offs_n, mask_n, stride_n, prefix, M, ROPE, MAIN, TAIL, HEAD_DIM
            )
            ds = tl.dot(q_tail, tl.trans(dk), ds, input_precision=PRECISION)
        s = tl.where(mask_n[None, :], s * (scale * 1.4426950408889634), float("-inf"))
        new_high = tl.maximum(high, tl.max(s, 1))
        shrink = tl.exp2(high - new_high)
        p = tl.exp2(s - new_high[:, None])
        w = p * (ds * scale)
        total = total * shrink + tl.sum(p, 1)
        slope = slope * shrink + tl.sum(w, 1)
        high = new_high
        v = _load_rows(v_ptr, offs_n, mask_n, stride_n, 0, MAIN, HEAD_DIM)
        dv = _load_rows(dv_ptr, offs_n, mask_n, stride_n, 0, MAIN, HEAD_DIM)
        p, w = p.to(v.dtype), w.to(v.dtype)
        acc = tl.dot(p, v, acc * shrink[:, None], input_precision=PRECISION)
        dacc = tl.dot(w, v, dacc * shrink[:, None], input_precision=PRECISION)
        dacc = tl.dot(p, dv, dacc, input_precision=PRECISION)
        if TAIL:
            v = _load_rows(v_ptr, offs_n, mask_n, stride_n, MAIN, TAIL, HEAD_DIM)
            dv = _load_rows(dv_ptr, offs_n, mask_n, stride_n, MAIN, TAIL, HEAD_DIM)
            acc_tail = tl.dot(p, v, acc_tail * shrink[:, None], input_precision=PRECISION)
            dacc_tail = tl.dot(w, v, dacc_tail * shrink[:, None], input_precision=PRECISION)
            dacc_tail = tl.dot(p, dv, dacc_tail, input_precision=PRECISION)
    head = (pid_b * NQ * H + pid_h) * HEAD_DIM
    y = acc / total[:, None]
    _store_rows(y_ptr + head, y, offs_m, mask_m, H * HEAD_DIM, 0, MAIN, HEAD_DIM)
    dy = (dacc - slope[:, None] * y) / total[:, None]
    _store_rows(dy_ptr + head, dy, offs_m, mask_m, H * HEAD_DIM, 0, MAIN, HEAD_DIM)
    if TAIL:
        y = acc_tail / total[:, None]
        _store_rows(y_ptr + head, y, offs_m, mask_m, H * HEAD_DIM, MAIN, TAIL, HEAD_DIM)
        dy = (dacc_tail - slope[:, None] * y) / total[:, None]
        _store_rows(dy_ptr + head, dy, offs_m, mask_m, H * HEAD_DIM, MAIN, TAIL, HEAD_DIM)
    lse = (high + tl.log2(total)) * 0.6931471805599453
    tl.store(lse_ptr + (pid_b * H + pid_h) * NQ + offs_m, lse, mask=mask_m)


def triton_forward(a: Any, out: Any) -> None:
    """Fills out.y, out.dy (B, Nq, heads * head_dim) and out.lse (B, heads, Nq) fp32."""
    batch, n, _, heads, head_dim = a.qkv.shape
    (q, k, v), (dq, dk, dv) = a.qkv.unbind(2), a.dqkv.unbind(2)
    main, tail = head_split(head_dim)
    tile = attention_tile("jvp", a.qkv.element_size(), head_dim, a.rope is not None)
    count = query_count(a)
    table, rotated, where = q, 0, (0, 0)  # where nothing is rotated the table is a pointer that nobody follows
    if a.rope is not None:
        table, rotated = a.rope, a.rope.shape[2]
        where = (a.rope.stride(0), 0 if a.rope.shape[1] == 1 else a.rope.stride(1))
    _rope_attention_jvp_kernel[(-(-count // tile.block_m), heads, batch)](
        q, k, v, dq, dk, dv, table, out.y, out.dy, out.lse,
        *strides(q), *where, n, count, a.first_query, a.prefix, rotated, heads, head_dim**-0.5,
        HEAD_DIM=head_dim, MAIN=main, TAIL=tail, ROPE=a.rope is not None, PRECISION="ieee",
        BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip
