# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""Nearest neighbours in latent space, and whether they are of the same class.

rows (N, D) ── standardised ── unit length ── cosine ── the k nearest of each query (blocks of one product)
class agreement @k    the mean share of a held-out row's k nearest training rows that are of its class
purity                the same among the rows themselves, each one left out of its own neighbours
chance                what both were if neighbours were drawn: the sum over classes of (their share)^2
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from maetok_fast.analysis.probe import standardise

__all__ = ["KS", "chance", "class_agreement", "knn_purity", "nearest"]

KS = (1, 5, 20)
BLOCK = 1024  # queries at a time


def nearest(queries: np.ndarray, base: np.ndarray, k: int, *, itself: bool = True) -> np.ndarray:
    """(Q, k) int64: for each query (Q, D) the places in `base` (N, D) of its k nearest by cosine, the nearest first,
    of equally near ones those that stand first. Give standardised rows. itself: False where both are the same rows, and
    a row is no neighbour of itself. ValueError where there are fewer than k."""
    others = len(base) - (not itself)
    if not 1 <= k <= others:
        raise ValueError(f"nearest: expected k in 1 .. {others}, the rows that can be neighbours, got {k}")
    where = torch.nn.functional.normalize(torch.from_numpy(base).float(), dim=1)
    asked = torch.nn.functional.normalize(torch.from_numpy(queries).float(), dim=1)
    found = []
    for start in range(0, len(asked), BLOCK):
        near = asked[start : start + BLOCK] @ where.T
        if not itself:
            near[torch.arange(len(near)), torch.arange(start, start + len(near))] = -2.0
        values, places = near.topk(min(k + 1, near.shape[1]), dim=1)
        # topk leaves equal ones in any order
        order = torch.from_numpy(np.lexsort((places.numpy(), -values.numpy()), axis=1))
        found.append(places.gather(1, order)[:, :k])
    return torch.cat(found).numpy()


def class_agreement(
    places: np.ndarray, labels: np.ndarray, query_labels: np.ndarray, ks: Sequence[int] = KS
) -> dict[int, float]:
    """places (Q, K) of neighbours (`nearest`), labels (N,) of what they are places in, query_labels (Q,) -> for each k
    up to K the mean share of the first k that are of the query's class."""
    same = labels[places] == query_labels[:, None]
    return {k: float(same[:, :k].mean()) for k in ks if k <= places.shape[1]}


def knn_purity(x: np.ndarray, y: np.ndarray, k: int = 10) -> float:
    """Of rows (N, ...), flattened and standardised here, and labels (N,): the mean share of a row's k nearest others
    (all of them where there are fewer) that are of its class."""
    (rows,) = standardise(x.reshape(len(x), -1))
    k = min(k, len(x) - 1)
    return class_agreement(nearest(rows, rows, k, itself=False), y, y, (k,))[k]


def chance(labels: np.ndarray) -> float:
    """The agreement of neighbours that are drawn among all rows."""
    return float(((np.unique(labels, return_counts=True)[1] / len(labels)) ** 2).sum())
