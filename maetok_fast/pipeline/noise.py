# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""Randomness that belongs to a sample: a stream for each seed, the same on every device and in every batch.

Philox (numpy's), because torch's generator on the CPU keeps 32 bits of a seed and shares one stream over a batch.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

__all__ = ["SampleNoise", "seed_of"]


def seed_of(global_seed: int, index: int) -> int:
    """The seed of sample `index` of a run: no two of them share one while there are fewer than 2^32 samples."""
    return (global_seed << 32) + index


class SampleNoise:
    """Called with x (B, ...): N(0, 1) of its shape, dtype and device, row b from the stream of seeds[b], whose next
    numbers it takes. seeds: integers in 0 .. 2^64 - 1, one per row."""

    def __init__(self, seeds: Sequence[int]) -> None:
        self.streams = [np.random.Generator(np.random.Philox(key=_checked(seed))) for seed in seeds]

    def __call__(self, x: Tensor) -> Tensor:
        rows = [stream.standard_normal(tuple(x.shape[1:]), dtype=np.float32) for stream in self.streams]
        return torch.from_numpy(np.stack(rows)).to(x)

    def first(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        """The noise that sampling starts from: (B, *shape)."""
        return self(torch.empty(len(self.streams), *shape, dtype=dtype, device=device))


def _checked(seed: int) -> int:
    try:
        value = operator.index(seed)
    except TypeError:
        raise TypeError(f"seeds must be integers, got {seed!r}") from None
    if not 0 <= value < 2**64:
        raise ValueError(f"seeds must lie in 0 .. 2^64 - 1, got {value}")
    return value
