# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""The Triton kernels of embed_tokens and decoder_tokens; see embed_tokens.py for what they compute."""

from __future__ import annotations

from ._triton import tl, triton

__all__ = ["_embed_bwd_kernel", "_embed_fwd_kernel"]


@triton.jit
def _embed_fwd_kernel(
    patches_ptr, mask_ptr, token_ptr, pos_ptr, cls_ptr, latents_ptr, latent_pos_ptr, out_ptr, B, N, P, L, D,
    BATCHED: tl.constexpr, CHUNK: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_T tokens, BLOCK_D columns, CHUNK images. Without patches every image token is the mask token.
    BATCHED: latents (B, L, D), else (L, D)."""
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    offs_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)[None, :]
    mask_d = offs_d < D
    image, tail = _parts(t, N, P, L)
    at = t.to(tl.int64)[:, None]
    shared = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
    if cls_ptr is not None:
        shared += tl.load(cls_ptr + at * D + offs_d, mask=(t < P)[:, None] & mask_d, other=0.0).to(tl.float32)
    if latents_ptr is not None and not BATCHED:
        shared += tl.load(latents_ptr + (at - P - N) * D + offs_d, mask=tail & mask_d, other=0.0).to(tl.float32)
    if latent_pos_ptr is not None:
        shared += tl.load(latent_pos_ptr + (at - P - N) * D + offs_d, mask=tail & mask_d, other=0.0).to(tl.float32)
    pos = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
    if pos_ptr is not None:
        pos = tl.load(pos_ptr + at * D + offs_d, mask=(t < P + N)[:, None] & mask_d, other=0.0).to(tl.float32)
    if token_ptr is not None:
        token = tl.load(token_ptr + offs_d, mask=mask_d, other=0.0).to(tl.float32)
    for i in range(0, CHUNK):
        b = (tl.program_id(2) * CHUNK + i).to(tl.int64)
        x = shared
        if patches_ptr is not None:
            read = image & (b < B)
            if mask_ptr is not None:
                masked = tl.load(mask_ptr + b * N + at - P, mask=read, other=0) != 0
                x = tl.where(masked, token, x)
                read = read & (masked == 0)
            rows = patches_ptr + (b * N + at - P) * D
            x += tl.load(rows + offs_d, mask=read & mask_d, other=0.0).to(tl.float32)
        else:
            x = tl.where(image, token, x)
        if BATCHED:
            rows = latents_ptr + (b * L + at - P - N) * D
            x += tl.load(rows + offs_d, mask=tail & mask_d & (b < B), other=0.0).to(tl.float32)
        live = (image | tail | (t < P)[:, None]) & mask_d & (b < B)
        rows = out_ptr + (b * (P + N + L) + at) * D
        tl.store(rows + offs_d, (x + pos).to(out_ptr.dtype.element_ty), mask=live)


@triton.jit
def _parts(t, N, P, L):
    """(BLOCK_T, 1) masks of the image tokens and of the latents."""
    return ((t >= P) & (t < P + N))[:, None], ((t >= P + N) & (t < P + N + L))[:, None]


@triton.jit
def _embed_bwd_kernel(
    dy_ptr, mask_ptr, dpatches_ptr, dtoken_ptr, dpos_ptr, dcls_ptr, dlatents_ptr, dlatent_pos_ptr, B, N, P, L, D,
    ALL: tl.constexpr, BATCHED: tl.constexpr, CHUNK: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_T tokens, BLOCK_D columns, CHUNK images. ALL: every image token is the mask token.

    Sums over the program's images: dpos (chunks, P + N, D), dcls (chunks, P, D), dlatent_pos (chunks, L, D), and
    dlatents (chunks, L, D) unless BATCHED; over its masked tokens too: dtoken (chunks, programs of tokens, D)."""
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    offs_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)[None, :]
    mask_d = offs_d < D
    image, tail = _parts(t, N, P, L)
    at = t.to(tl.int64)[:, None]
    chunk = tl.program_id(2).to(tl.int64)
    total = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
    token = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
    for i in range(0, CHUNK):
        b = chunk * CHUNK + i
        live = (image | tail | (t < P)[:, None]) & mask_d & (b < B)
        raw = tl.load(dy_ptr + (b * (P + N + L) + at) * D + offs_d, mask=live, other=0.0)
        dy = raw.to(tl.float32)
        total += dy
        if mask_ptr is not None:
            masked = tl.load(mask_ptr + b * N + at - P, mask=image & (b < B), other=0) != 0
            token += tl.where(masked, dy, 0.0)
            kept = tl.where(masked, 0.0, dy)
        else:
            kept = dy
        if dpatches_ptr is not None:
            rows = dpatches_ptr + (b * N + at - P) * D
            tl.store(rows + offs_d, kept.to(dpatches_ptr.dtype.element_ty), mask=live & image)
        if BATCHED and dlatents_ptr is not None:
            rows = dlatents_ptr + (b * L + at - P - N) * D
            tl.store(rows + offs_d, dy.to(dlatents_ptr.dtype.element_ty), mask=live & tail)
    if dpos_ptr is not None:
        rows = dpos_ptr + (chunk * (P + N) + at) * D
        tl.store(rows + offs_d, total.to(dpos_ptr.dtype.element_ty), mask=(t < P + N)[:, None] & mask_d)
    if dcls_ptr is not None:
        rows = dcls_ptr + (chunk * P + at) * D
        tl.store(rows + offs_d, total.to(dcls_ptr.dtype.element_ty), mask=(t < P)[:, None] & mask_d)
    if not BATCHED and dlatents_ptr is not None:
        rows = dlatents_ptr + (chunk * L + at - P - N) * D
        tl.store(rows + offs_d, total.to(dlatents_ptr.dtype.element_ty), mask=tail & mask_d)
    if dlatent_pos_ptr is not None:
        rows = dlatent_pos_ptr + (chunk * L + at - P - N) * D
        tl.store(rows + offs_d, total.to(dlatent_pos_ptr.dtype.element_ty), mask=tail & mask_d)
    if dtoken_ptr is not None:
        if ALL:
            token = tl.where(image, total, 0.0)
        row = chunk * tl.num_programs(0) + tl.program_id(0)
        columns = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
        tl.store(dtoken_ptr + row * D + columns, tl.sum(token, 0), mask=columns < D)
