# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""Precision and recall of samples by the manifolds that k nearest neighbours span (Kynkaanniemi et al. 2019).

    radius of a row      the distance to its k-th nearest other row of its own set
    precision            the share of samples that lie within the radius of some reference row
    recall               the share of reference rows that lie within the radius of some sample

As ADM's evaluator: k = 3, Inception's pool features, all rows of both, "within" includes the border. It takes squared
distances from fp16 products, or fp32 where those overflow; here they are fp64, so that the two differ by rows that lie
on a border. Distances are computed in blocks: memory beside the features is block^2 numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

__all__ = ["precision_recall"]

Tick = Callable[[int], None]


def precision_recall(
    reference: np.ndarray | Tensor,
    samples: np.ndarray | Tensor,
    k: int = 3,
    *,
    block: int = 2048,
    device: torch.device | str = "cpu",
    tick: Tick | None = None,
) -> tuple[float, float]:
    """(precision, recall) of features (N, D), (M, D), each of more than k rows. tick: called with rows compared."""
    sets = [torch.as_tensor(rows) for rows in (reference, samples)]
    if any(rows.ndim != 2 for rows in sets) or sets[0].shape[1] != sets[1].shape[1]:
        raise ValueError(f"expected features (N, D), (M, D), got {tuple(sets[0].shape)} and {tuple(sets[1].shape)}")
    few = min(map(len, sets))
    if k < 1 or few <= k:
        raise ValueError(f"precision and recall with k = {k} neighbours need more than {k} rows of each set, got {few}")
    # distances do not change with the origin, and products lose fewer digits near it
    centre = sets[0].double().mean(0)
    moved = [(rows.double() - centre).to(device) for rows in sets]
    say = tick or (lambda count: None)
    radii = [torch.cat(list(_radii(rows, k, block, say))) for rows in moved]
    covered = [torch.zeros(len(rows), dtype=torch.bool, device=rows.device) for rows in moved]
    for start in range(0, len(moved[0]), block):
        row = slice(start, start + block)
        for begin in range(0, len(moved[1]), block):
            column = slice(begin, begin + block)
            apart = _squared(moved[0][row], moved[1][column])
            covered[0][row] |= (apart <= radii[1][column]).any(1)
            covered[1][column] |= (apart <= radii[0][row, None]).any(0)
        say(len(moved[0][row]))
    return covered[1].double().mean().item(), covered[0].double().mean().item()


def _radii(rows: Tensor, k: int, block: int, tick: Tick) -> Iterator[Tensor]:
    """Squared: the least k + 1 distances hold the row's own, 0."""
    for start in range(0, len(rows), block):
        part, nearest = rows[start : start + block], None
        for begin in range(0, len(rows), block):
            apart = _squared(part, rows[begin : begin + block])
            if begin == start:
                apart.fill_diagonal_(0)
            found = apart if nearest is None else torch.cat([nearest, apart], 1)
            nearest = found.topk(min(k + 1, found.shape[1]), largest=False).values
        assert nearest is not None
        yield nearest[:, k]
        tick(len(part))


def _squared(x: Tensor, y: Tensor) -> Tensor:
    return (x.square().sum(1)[:, None] - 2 * (x @ y.T) + y.square().sum(1)).clamp_min(0)
