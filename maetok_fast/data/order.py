# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""The endless stream of samples of a run: a position in it is all that a resumed run needs.

    position p -> epoch p // length, a permutation of the samples for each epoch, drawn from (seed, epoch) alone
    step s     -> the positions s*G .. (s+1)*G - 1 of the global batch G; rank r takes the r-th piece of them

So another number of ranks with the same global batch sees the same samples in the same order, whatever reads them.
"""

from __future__ import annotations

import numpy as np

from maetok_fast.checks import check_positive
from maetok_fast.data.views import ORDER, rng_of

__all__ = ["Order", "batch_positions"]


def batch_positions(step: int, batch: int, rank: int = 0, world: int = 1) -> range:
    """The positions of one rank's part of a step. batch: samples of one rank, so that G = batch * world."""
    check_positive("batch_positions", batch=batch, world=world)
    if not 0 <= rank < world:
        raise ValueError(f"batch_positions: expected a rank in [0, {world}), got {rank}")
    if step < 0:
        raise ValueError(f"batch_positions: expected a step of at least 0, got {step}")
    first = (step * world + rank) * batch
    return range(first, first + batch)


class Order:
    """Samples 0 .. length - 1 again and again, each time in another order (shuffle) or as they are."""

    def __init__(self, length: int, seed: int, shuffle: bool = True) -> None:
        check_positive("Order", length=length)
        rng_of(seed, 0, 0)  # its checks
        self.length, self.seed, self.shuffle = length, seed, shuffle
        self._epoch = -1
        self._permutation: np.ndarray | None = None

    def at(self, position: int) -> tuple[int, int]:
        """(epoch, sample) of a position. A change of epoch draws a permutation, the last one is kept."""
        if position < 0:
            raise ValueError(f"Order: expected a position of at least 0, got {position}")
        epoch, place = divmod(position, self.length)
        if not self.shuffle:
            return epoch, place
        if self._permutation is None or epoch != self._epoch:
            self._permutation = rng_of(self.seed, epoch, 0, ORDER).permutation(self.length)
            self._epoch = epoch
        return epoch, int(self._permutation[place])
