# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""Launch heuristics, as tables: what each kernel uses for which shape, in one place, compiled one by one by
`benchmarks/cost.py` for sm_80, sm_90 and sm_100.

The rows are chosen on what can be proved by compiling (registers, spills, shared memory, no serialised wgmma); a
device's own timing may refine them, shape by shape.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import NamedTuple

import torch


class Tile(NamedTuple):
    """BLOCK_M query rows, BLOCK_N key rows, warps, pipeline stages."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


# (kernel, element size in bytes, head_dim at most, rotates) -> tile by architecture at least; the first row that fits
# wins. What decided (benchmarks/cost.py prints it): sm_80 has the fewest registers to spare, 64 x 64 spills in the
# backwards that rotate; on sm_90 ptxas serialises the wgmma of a pipelined forward that rotates k in the loop (C7515),
# at one stage it does not, and its 24 KB of shared memory leave room for other blocks to hide the loads.
# None: whether it rotates or not.
ATTENTION_TILES: dict[tuple[str, int, int, bool | None], dict[int, Tile]] = {
    ("fwd", 2, 80, True): {100: Tile(128, 64, 8, 2), 90: Tile(128, 64, 8, 1), 80: Tile(128, 64, 8, 2)},
    ("fwd", 2, 80, False): {80: Tile(128, 64, 8, 2)},
    ("fwd", 2, 128, True): {100: Tile(64, 64, 4, 2), 90: Tile(64, 64, 4, 1), 80: Tile(64, 32, 4, 2)},
    ("fwd", 2, 128, False): {80: Tile(64, 64, 4, 2)},
    ("fwd", 4, 80, True): {80: Tile(32, 32, 8, 1)},
    ("fwd", 4, 128, True): {80: Tile(16, 16, 8, 1)},
    ("fwd", 4, 128, False): {80: Tile(32, 32, 8, 1)},
    ("dq", 2, 80, True): {90: Tile(64, 64, 4, 2), 80: Tile(64, 32, 4, 2)},
    ("dq", 2, 80, False): {90: Tile(64, 64, 4, 2), 80: Tile(64, 64, 8, 2)},
    ("dq", 2, 128, None): {80: Tile(64, 32, 8, 2)},
    ("dq", 4, 80, None): {80: Tile(32, 32, 8, 1)},
    ("dq", 4, 128, None): {80: Tile(16, 16, 8, 1)},
    ("dkdv", 2, 80, None): {90: Tile(64, 64, 4, 2), 80: Tile(32, 64, 4, 2)},
    ("dkdv", 2, 128, None): {80: Tile(32, 64, 8, 2)},
    ("dkdv", 4, 80, None): {80: Tile(32, 32, 8, 1)},
    ("dkdv", 4, 128, None): {80: Tile(16, 16, 8, 1)},
    ("jvp", 2, 80, True): {90: Tile(64, 32, 8, 1), 80: Tile(64, 16, 8, 1)},
    ("jvp", 2, 80, False): {80: Tile(64, 32, 8, 1)},
    ("jvp", 2, 128, True): {90: Tile(64, 32, 8, 1), 80: Tile(16, 32, 8, 1)},
    ("jvp", 2, 128, False): {90: Tile(64, 32, 8, 1), 80: Tile(32, 32, 8, 1)},
    ("jvp", 4, 80, True): {80: Tile(16, 16, 8, 1)},
    ("jvp", 4, 80, False): {80: Tile(32, 16, 8, 1)},
    ("jvp", 4, 128, None): {80: Tile(16, 16, 8, 1)},
}

# Which attention to ask first on CUDA, by the tokens at most. No timing on a GPU stands behind it yet. Triton's takes
# the rotation in registers; what follows is for where it cannot run (head_dim over 128, no Triton): those write the
# rotated q and k first, and run their forward again in the backward. Below about 200 tokens flash kernels are reported
# to tie with torch's own choice or to lose to it; beyond, they are the fastest that there are.
ATTENTION_ORDER: dict[int | None, tuple[str, ...]] = {
    200: ("triton", "sdpa", "flash_attn", "xformers"),
    None: ("triton", "flash_attn", "xformers", "sdpa"),
}

_pretended: int | None = None


@functools.cache
def _device_arch(index: int) -> int:
    major, minor = torch.cuda.get_device_capability(index)
    return 10 * major + minor


def arch() -> int:
    """The architecture that tiles are chosen for: the current device's (80, 90, 100, ...), 90 where there is none."""
    if _pretended is not None:
        return _pretended
    return _device_arch(torch.cuda.current_device()) if torch.cuda.is_available() else 90


@contextlib.contextmanager
def pretend_arch(number: int) -> Iterator[None]:
    """Choose tiles for another architecture: for the compile report and its tests."""
    global _pretended
    before, _pretended = _pretended, number
    try:
        yield
    finally:
        _pretended = before


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << max(0, n - 1).bit_length()


def head_split(head_dim: int) -> tuple[int, int]:
    """head_dim as (main, tail) tile widths, both powers of two and at least 16 (a tensor core's K), main first:
    64 -> (64, 0), 72 -> (64, 16) with 8 of the tail's columns masked, 96 -> (64, 32). Padding 72 to 128 instead would
    do 1.6 times the work of (64, 16)."""
    main = 1 << (head_dim.bit_length() - 1)
    rest = head_dim - main
    if main < 16:
        return 16, 0
    return main, 0 if rest == 0 else max(16, next_power_of_2(rest))


def attention_tile(kernel: str, itemsize: int, head_dim: int, rotates: bool) -> Tile:
    """The tile of a rope_attention kernel ("fwd", "dq", "dkdv", or "jvp") on `arch()`."""
    for (name, size, width, rotating), by_arch in ATTENTION_TILES.items():
        if name == kernel and size == itemsize and head_dim <= width and rotating in (None, rotates):
            for least, tile in by_arch.items():
                if arch() >= least:
                    return tile
    raise ValueError(f"no tile for kernel {kernel!r}, {itemsize}-byte elements, head_dim {head_dim}, sm_{arch()}")


def attention_order(tokens: int) -> tuple[str, ...]:
    """The backends of rope_attention on CUDA for this many tokens, the preferred one first."""
    for most, order in ATTENTION_ORDER.items():
        if most is None or tokens <= most:
            return order
    raise AssertionError("the last row of ATTENTION_ORDER takes all")


# 8 elements a thread: 16 bytes of bf16 in each load and store
ELEMENTWISE = {"BLOCK_D": 1024, "num_warps": 4}

MAX_ROW = 16384  # elements of a row that one program keeps in registers

MAX_GRID = 65535  # programs along the second and third dimension of a CUDA grid


def over_grid(**counts: int) -> str | None:
    """Why no grid has so many programs along its second or third dimension, or None: over_grid(batch=n)."""
    for name, count in counts.items():
        if count > MAX_GRID:
            return f"a {name} of {count} exceeds a CUDA grid's second and third dimension ({MAX_GRID})"
    return None


def over_row(width: int) -> str | None:
    """Why one program does not hold a row of `width` elements, or None."""
    return f"D = {width}: a program holds one row, at most {MAX_ROW} elements" if width > MAX_ROW else None


def over_side(height: int, width: int) -> str | None:
    """Why csrc/cuda does not index a plane of this size, or None."""
    return f"a plane of {height} x {width} has a side of 2^27 or more" if max(height, width) >= 1 << 27 else None


def row_options(width: int) -> dict[str, int]:
    """Launch options of a kernel in which one program holds one row of `width` elements: D, PAD, num_warps."""
    return {"D": width, "PAD": next_power_of_2(width), "num_warps": row_warps(width)}


def row_warps(width: int) -> int:
    """Warps for a kernel in which one program holds one row of `width` elements: 8 to 16 elements a thread."""
    return min(16, max(1, next_power_of_2(width) // 512))


def row_chunk(rows: int) -> int:
    """Tokens one program of a backward row kernel takes: about 1024 programs in all (a few per multiprocessor), so
    that the partial sums stay a small fraction of what is read, 4 to 64 tokens each."""
    return min(64, max(4, next_power_of_2(rows // 1024)))


def column_block(width: int) -> int:
    """Columns one program of a row-copying kernel takes at a time: the largest of 256 and 128 that divides the width,
    so that no lane idles at 768 and 1152, else as many as cover it, at most 256."""
    return next((b for b in (256, 128) if width % b == 0), min(256, next_power_of_2(width)))


# ---- bias_gelu, rope_attention's row kernels, ema_update, hog, lpips_tail, fp8 --------------------------------------

GELU_ROWS = 32  # rows one program of the backward sums d_bias over
ROPE_ROWS = 32  # rows of one program
# One program takes EMA_STEPS blocks: few enough programs (41,000 for SiT-XL) that starting them is nothing beside the
# 2.5 ms that a GPU needs for 8 GB, and small enough pieces that all multiprocessors end together.
EMA_BLOCK, EMA_STEPS = 2048, 8
# Likewise, for five tensors: 4 elements a thread, the 16 bytes of a load of fp32. With 8 it takes 70 to 154 registers
# where a tensor is in 16 bits, whose loads would then be laid out in another way; with 4 it takes 32.
ADAMW_BLOCK, ADAMW_STEPS = 1024, 8
ADAMW_COUNT = 128  # tensors whose step one program counts
HOG_PIXELS = 256  # pixels of an image row (times rows of cells where the image is narrower) that a program takes
LPIPS_FORWARD, LPIPS_BACKWARD = 8192, 4096  # elements of each map that a program holds in registers, 16 a thread
LPIPS_CHANNELS = 1024
FP8_FLAT = 2048  # elements a program takes at once where x is flat
FP8_PARTIALS = 1024  # partial maxima of a tensor: what every program of the second pass reads again
FP8_CHUNKS = 64  # partial maxima of a column
FP8_TILE = (64, 64)  # rows, columns of a transposed tile


# ---- embed_tokens, decoder_tokens ----------------------------------------------------------------------------------

EMBED_TOKENS = {"BLOCK_T": 8, "num_warps": 4}  # 8 x 256 columns are 16 elements a thread, two 16-byte loads of bf16
EMBED_IMAGES = 8  # images a program sums before its partial sums: they are then a quarter of bf16 gradients, or less


# ---- gather_tokens, scatter_tokens ---------------------------------------------------------------------------------


def move_options(width: int, kept: int) -> dict[str, int]:
    """Launch options for moving rows of `width` columns by `kept` indices: 8 rows of 256 columns are 16 elements a
    thread, two 16-byte loads of bf16."""
    return {"BLOCK_T": 8, "BLOCK_D": column_block(width), "BLOCK_K": min(128, next_power_of_2(kept)), "num_warps": 4}


def fill_options(width: int, kept: int, rows: int) -> dict[str, int]:
    """The same for the sum of the `rows` rows that no index names."""
    return {
        "BLOCK_T": max(16, row_chunk(rows)),
        "BLOCK_D": min(128, column_block(width)),
        "BLOCK_K": min(64, next_power_of_2(kept)),
        "num_warps": 4,
    }


# ---- mask_counts, random_mask, visible_index -----------------------------------------------------------------------


def over_image(tokens: int) -> str | None:
    """Why one program does not hold an image of so many tokens, or None."""
    return f"{tokens} tokens: a program holds one image's, at most {MAX_ROW}" if tokens > MAX_ROW else None


def image_options(tokens: int) -> dict[str, int]:
    """Launch options of a kernel in which one program holds the tokens of one image: PAD, num_warps."""
    pad = max(4, next_power_of_2(tokens))
    return {"PAD": pad, "num_warps": row_warps(pad)}
