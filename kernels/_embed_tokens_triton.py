# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""The Triton kernels of embed_tokens and decoder_tokens; see embed_tokens.py for what they compute."""

from __future__ import annotations

from typing import Any

import torch

from ._tiles import EMBED_IMAGES, EMBED_TOKENS, column_block, over_grid
from ._triton import add_up, tl, triton

__all__ = ["backward", "forward", "lengths", "over_launch"]


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


# ---- launchers: `a` and `d` are those of either op -----------------------------------------------------------------

_PARTS = ("patches", "mask", "mask_token", "pos", "cls", "latents", "latent_pos")


def lengths(a: Any) -> tuple[int, int, int]:
    """(N, P, L): image, prefix and latent tokens of a call."""
    tokens = a.patches.shape[1] if hasattr(a, "patches") else a.tokens
    return tokens, 0 if a.cls is None else a.cls.shape[0], 0 if a.latents is None else a.latents.shape[-2]


def over_launch(a: Any) -> str | None:
    """Why no grid covers these arguments, or None."""
    batch, _, width = a[0].shape
    return over_grid(image_runs=-(-batch // EMBED_IMAGES), column_blocks=-(-width // 128))


def _grid(a):
    batch, _, width = a[0].shape
    return (
        -(-sum(lengths(a)) // EMBED_TOKENS["BLOCK_T"]),
        -(-width // column_block(width)),
        -(-batch // EMBED_IMAGES),
    )


def _constants(a):
    (batch, _, width), (tokens, prefix, latents) = a[0].shape, lengths(a)
    return {
        **{"B": batch, "N": tokens, "P": prefix, "L": latents, "D": width},
        "BATCHED": a.latents is not None and a.latents.ndim == 3,
        "CHUNK": min(batch, EMBED_IMAGES),
        "BLOCK_D": column_block(width),
        **EMBED_TOKENS,
    }


def forward(a, out):
    _embed_fwd_kernel[_grid(a)](*(getattr(a, n, None) for n in _PARTS), out.y, **_constants(a))


def backward(a, out, g, d):
    """What the images share is written where it belongs if one run of images covers the batch, else summed in fp32."""
    grid = rows, _, runs = _grid(a)
    patches, _, token, *shared = (getattr(d, n, None) for n in _PARTS)
    sums = [  # three dimensions: latents of each image, nothing to sum
        t if t is None or runs == 1 or t.ndim == 3 else t.new_empty(runs, *t.shape, dtype=torch.float32) for t in shared
    ]
    tokens = None if token is None else token.new_empty(runs * rows, token.shape[0], dtype=torch.float32)
    _embed_bwd_kernel[grid](
        g.y, getattr(a, "mask", None), patches, tokens, *sums, ALL=not hasattr(a, "patches"), **_constants(a)
    )
    add_up(tokens, 0, token)
    for partial, into in zip(sums, shared):
        if partial is not into:
            add_up(partial, 0, into)
