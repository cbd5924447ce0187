# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""Where EM starts: k-means++ and some rounds of k-means on a sample of the rows.

    sample (S, D), S = max(20 000, 100 K) of the rows at most ── k-means++ (Arthur and Vassilvitskii 2007) ── 10 rounds
    of Lloyd's ──> clusters of n_k rows ──> w_k = n_k / S, m_k, S_k = (n_k C_k + D C) / (n_k + D) + regularisation I

C_k is the cluster's covariance, C that within all clusters: a cluster of fewer rows than dimensions has none of its own
that could be inverted, so it borrows as many rows as there are dimensions from all.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from maetok_fast.analysis.densities import Parameters
from maetok_fast.analysis.em import factor
from maetok_fast.analysis.rows import Rows

__all__ = ["sampled", "seeded"]

ROUNDS = 10


def sampled(rows: Rows, modes: int, rng: np.random.Generator) -> Tensor:
    """The sample (S, D) in the rows' dtype, on the CPU."""
    size = min(len(rows), max(20_000, 100 * modes))
    return rows.take(np.sort(rng.choice(len(rows), size, replace=False)))


def seeded(
    sample: Tensor, modes: int, full: bool, init: str, regularisation: float, rng: np.random.Generator
) -> Parameters:
    """Parameters to start from. init: "kmeans++" as the module says, or "random": rows as means, C of the whole sample
    for every mode, equal weights."""
    x = sample.double()
    origin = x.mean(0)
    x = x - origin
    if init == "random":
        means = x[torch.from_numpy(rng.choice(len(x), modes, replace=False))]
        weights, scatter = torch.ones(modes, dtype=x.dtype), None
        within = x.T @ x / len(x) if full else x.square().mean(0)
    else:
        means, place = _clustered(x.float(), modes, rng)
        weights = torch.bincount(place, minlength=modes).double()
        means = means.double()
        scatter = torch.zeros(modes, *(x.shape[1],) * (2 if full else 1), dtype=x.dtype)
        for k in range(modes):
            part = x[place == k]
            if len(part):
                means[k] = part.mean(0)
                part = part - means[k]
                scatter[k] = part.T @ part if full else part.square().sum(0)
        within = scatter.sum(0) / len(x)
    scale = x.shape[1] + weights.reshape(-1, *(1,) * within.ndim)
    covariance = within.expand(modes, *within.shape) if scatter is None else (scatter + x.shape[1] * within) / scale
    covariance = covariance.clone()
    if full:
        covariance.diagonal(dim1=1, dim2=2).add_(regularisation)
    else:
        covariance += regularisation
    factors, sound = factor(covariance)
    weights = torch.where(sound & (weights > 0), weights, 0.0)
    if not weights.any():
        raise ValueError("a mixture cannot start: the rows are alike; raise the regularisation")
    return Parameters(weights / weights.sum(), means + origin, factors)


def _clustered(x: Tensor, modes: int, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """(centres (K, D), each row's cluster (S,)) of fp32 rows about their mean. Where rows are alike fewer clusters than
    K have members."""
    squares = x.square().sum(1)
    centres = torch.empty(modes, x.shape[1])
    nearest = torch.full((len(x),), torch.inf)
    for k in range(modes):
        mass = nearest.double().cumsum(0).numpy()
        at = rng.random()
        pick = int(at * len(x)) if k == 0 or mass[-1] <= 0 else int(np.searchsorted(mass, at * mass[-1], side="right"))
        centres[k] = x[min(pick, len(x) - 1)]
        nearest = torch.minimum(nearest, (x - centres[k]).square().sum(1))
    place = torch.zeros(len(x), dtype=torch.int64)
    for _ in range(ROUNDS):
        distance = squares[:, None] - 2 * x @ centres.T + centres.square().sum(1)
        before, place = place, distance.argmin(1)
        if torch.equal(before, place):
            break
        counts = torch.bincount(place, minlength=modes)
        sums = torch.zeros(modes, x.shape[1]).index_add_(0, place, x)
        centres = torch.where(counts[:, None] > 0, sums / counts[:, None].clamp_min(1), centres)
    return centres, place
