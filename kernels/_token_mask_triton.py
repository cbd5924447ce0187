# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""The Triton kernels of mask_counts, random_mask and visible_index; see token_mask.py for what they compute."""

from __future__ import annotations

from ._triton import tl, triton

__all__ = ["_mask_counts_kernel", "_random_mask_kernel", "_visible_index_kernel"]


@triton.jit
def _philox_words(c0, c1, seed_ptr):
    """Philox4x32-10 of the counters (c0, c1, step) under the key (seed): four words in uint64."""
    step = tl.load(seed_ptr + 1).to(tl.uint64, bitcast=True)
    seed = tl.load(seed_ptr).to(tl.uint64, bitcast=True)
    c2 = step & 0xFFFFFFFF
    c3 = step >> 32
    k0 = seed & 0xFFFFFFFF
    k1 = seed >> 32
    for _ in tl.static_range(10):
        p0 = c0 * 0xD2511F53
        p1 = c2 * 0xCD9E8D57
        c0 = (p1 >> 32) ^ c1 ^ k0
        c1 = p1 & 0xFFFFFFFF
        c2 = (p0 >> 32) ^ c3 ^ k1
        c3 = p0 & 0xFFFFFFFF
        k0 = (k0 + 0x9E3779B9) & 0xFFFFFFFF
        k1 = (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return c0, c1, c2, c3


@triton.jit
def _mask_counts_kernel(seed_ptr, table_ptr, out_ptr, base, first_image, K, PAD: tl.constexpr, PER_IMAGE: tl.constexpr):
    """One program: one image. K thresholds."""
    pid = tl.program_id(0)
    image = ((pid.to(tl.int64) + first_image).to(tl.uint64) & 0xFFFFFFFF) * PER_IMAGE
    domain = tl.full((), 0xFFFFFFFF - PER_IMAGE, tl.uint64)
    r0, r1, _r2, _r3 = _philox_words(domain, image, seed_ptr)
    uniform = (((r0 >> 5) << 26) | (r1 >> 6)).to(tl.int64)
    offs = tl.arange(0, PAD)
    table = tl.load(table_ptr + offs, mask=offs < K, other=0x7FFFFFFFFFFFFFFF)
    tl.store(out_ptr + pid, base + tl.sum((table < uniform).to(tl.int32), 0))


@triton.jit
def _random_mask_kernel(seed_ptr, count_ptr, out_ptr, N, first_image, PAD: tl.constexpr):
    """One program: one image. The threshold below which just `count` keys lie is found bit by bit; of the keys that
    equal it the first ones by index fill up. 32 sums over the keys instead of the N^2 comparisons of a ranking."""
    pid = tl.program_id(0)
    c = tl.arange(0, PAD // 4).to(tl.uint64)
    image = (pid.to(tl.int64) + first_image).to(tl.uint64) & 0xFFFFFFFF
    r0, r1, r2, r3 = _philox_words(c, image, seed_ptr)
    keys = tl.interleave(tl.interleave(r0, r2), tl.interleave(r1, r3)).to(tl.int64)
    offs = tl.arange(0, PAD)
    live = offs < N
    keys = tl.where(live, keys, 1 << 40)
    count = tl.load(count_ptr + pid).to(tl.int64)
    threshold = tl.full((), 0, tl.int64)
    for i in range(32):
        candidate = threshold | (tl.full((), 1, tl.int64) << (31 - i))
        threshold = tl.where(tl.sum((keys < candidate).to(tl.int32), 0) <= count, candidate, threshold)
    below = keys < threshold
    equal = keys == threshold
    missing = count - tl.sum(below.to(tl.int32), 0)
    masked = below | (equal & (tl.cumsum(equal.to(tl.int32), 0) <= missing))
    tl.store(out_ptr + pid.to(tl.int64) * N + offs, masked, mask=live)


@triton.jit
def _visible_index_kernel(mask_ptr, out_ptr, N, K, PAD: tl.constexpr):
    """One program: one image. A token's place is its rank among the unmasked, or after them among the masked."""
    pid = tl.program_id(0).to(tl.int64)
    offs = tl.arange(0, PAD)
    live = offs < N
    masked = tl.load(mask_ptr + pid * N + offs, mask=live, other=1).to(tl.int32)
    shown = 1 - masked
    at = tl.where(masked != 0, tl.sum(shown, 0) + tl.cumsum(masked, 0), tl.cumsum(shown, 0)) - 1
    tl.store(out_ptr + pid * K + at, offs.to(tl.int64), mask=live & (at < K))
