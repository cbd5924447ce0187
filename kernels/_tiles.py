# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""Launch heuristics, as tables: what each kernel uses for which shape, in one place, compiled one by one by
`benchmarks/cost.py` for sm_80, sm_90 and sm_100.

The rows are chosen on what can be proved by compiling (registers, spills, shared memory, no serialised wgmma); a
device's own timing may refine them, shape by shape.
"""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["ATTENTION_TILES", "Tile", "attention_tile", "head_split", "next_power_of_2", "row_chunk", "row_warps"]


class Tile(NamedTuple):
    """BLOCK_M query rows, BLOCK_N key rows, warps, pipeline stages."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


# (kernel, element size in bytes, head_dim at most) -> tile; the first row that fits wins.
ATTENTION_TILES: dict[tuple[str, int, int], Tile] = {
    ("fwd", 2, 80): Tile(128, 64, 4, 2),
    ("fwd", 2, 128): Tile(64, 64, 4, 2),
    ("fwd", 4, 128): Tile(64, 32, 4, 1),
    ("dq", 2, 80): Tile(64, 64, 4, 2),
    ("dq", 2, 128): Tile(64, 32, 4, 2),
    ("dq", 4, 128): Tile(32, 32, 4, 1),
    ("dkdv", 2, 80): Tile(64, 64, 4, 2),
    ("dkdv", 2, 128): Tile(32, 64, 4, 2),
    ("dkdv", 4, 128): Tile(32, 32, 4, 1),
}


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


def attention_tile(kernel: str, itemsize: int, head_dim: int) -> Tile:
    """The tile of a rope_attention kernel ("fwd", "dq" or "dkdv")."""
    for (name, size, width), tile in ATTENTION_TILES.items():
        if name == kernel and size == itemsize and head_dim <= width:
            return tile
    raise ValueError(f"no tile for kernel {kernel!r}, {itemsize}-byte elements, head_dim {head_dim}")


def row_warps(width: int) -> int:
    """Warps for a kernel in which one program holds one row of `width` elements: 8 to 16 elements a thread."""
    return min(16, max(1, next_power_of_2(width) // 512))


def row_chunk(rows: int) -> int:
    """Tokens one program of a backward row kernel takes: about 1024 programs in all (a few per multiprocessor), so
    that the partial sums stay a small fraction of what is read, 4 to 64 tokens each."""
    return min(64, max(4, next_power_of_2(rows // 1024)))
