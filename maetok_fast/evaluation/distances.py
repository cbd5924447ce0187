# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""Distances between sets of features, from moments or rows, in fp64, and the Inception score.

    frechet_distance   |m1 - m2|^2 + tr S1 + tr S2 - 2 tr (S1 S2)^1/2               (Heusel et al. 2017)
    kid                unbiased MMD^2 of the kernel (x.y / D + 1)^3, mean over subsets      (Binkowski et al. 2018)
    mind               3 D times the sliced Wasserstein distance W2^2 over random directions     (arXiv 2605.06797)
    inception_score    exp of the mean KL(p(y|x) || p(y)), mean over splits                    (Salimans et al. 2016)

tr (S1 S2)^1/2 is the sum of the roots of the eigenvalues of F' S2 F where S1 = F F', F of its rank: symmetric, without
a matrix square root and without eigenvalues that are rounding: singular covariances (fewer rows than dimensions)
are exact, not merely finite.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from maetok_fast.evaluation.moments import Moments, above_rounding

__all__ = ["Interval", "frechet_distance", "geometric_mean", "inception_score", "kid", "mind"]

Rows = np.ndarray | Tensor
_Z = 1.959963984540054  # 95 %
_GROUPS = 10  # of the jackknife


class Interval(NamedTuple):
    """A value with its 95 % confidence interval."""

    value: float
    low: float
    high: float


def frechet_distance(a: Moments, b: Moments) -> float:
    """>= 0, 0 where the moments are equal. ValueError where their dimensions differ."""
    if a.size != b.size:
        raise ValueError(f"moments of {a.size} and {b.size} dimensions are of different features")
    # the thinner of two thin ones (fewer rows than dimensions), else the reference, whose factor is used again
    thin, other = (a, b) if _rows_in(a) < _rows_in(b) else (b, a)
    factor = thin.factor
    values = torch.linalg.eigvalsh(factor.T @ torch.from_numpy(other.covariance) @ factor) if factor.numel() else factor
    root = values[above_rounding(values)].sqrt().sum().item()
    apart = a.mean - b.mean
    found = float(apart @ apart) + float(np.trace(a.covariance)) + float(np.trace(b.covariance)) - 2 * root
    return max(0.0, found)


def _rows_in(moments: Moments) -> int:
    """How many rows a covariance is of, at most one more than it has dimensions, where it may be full."""
    return moments.size + 1 if moments.count is None else min(moments.count, moments.size + 1)


def kid(a: Rows, b: Rows, *, subsets: int = 100, size: int = 1000, seed: int = 2020) -> Interval:
    """Of features (N, D), (M, D): the mean over random subsets of `size` rows of each, half of the smaller set at most.

    Subsets overlap, so their own standard error would be too small: the interval is the delete-d jackknife's (Shao and
    Wu 1989), their spread times (size / (rows - size))^1/2. Values slightly below 0: no difference that shows.
    """
    one, two = _pair(a, b)
    few = min(len(one), len(two))
    size = min(size, few // 2)
    if size < 2 or subsets < 2:
        raise ValueError(f"KID needs at least 4 rows of each set and 2 subsets, got {few} and {subsets}")
    random = np.random.RandomState(seed)
    found = []
    for _ in range(subsets):
        x = one[random.choice(len(one), size, replace=False)].double()
        y = two[random.choice(len(two), size, replace=False)].double()
        found.append(_mmd2(x, y))
    value = float(np.mean(found))
    reach = _Z * float(np.std(found, ddof=1)) * math.sqrt(size / (few - size))
    return Interval(value, value - reach, value + reach)


def _mmd2(x: Tensor, y: Tensor) -> float:
    n, width = x.shape

    def kernel(p: Tensor, q: Tensor) -> Tensor:
        return (p @ q.T / width + 1) ** 3

    xx, yy, xy = kernel(x, x), kernel(y, y), kernel(x, y)
    same = (xx.sum() - xx.trace() + yy.sum() - yy.trace()) / (n * (n - 1))
    return float(same - 2 * xy.sum() / n**2)


def mind(a: Rows, b: Rows, *, directions: int = 1000, seed: int = 2020) -> Interval:
    """Of features (N, D), (M, D), of as many rows of each as the smaller has, drawn without replacement.

    Where two sets differ by a shift alone it is three times the shift's squared length. The interval holds the
    directions' part and the rows' (a jackknife over ten groups of rows).
    """
    one, two = _pair(a, b)
    generator = torch.Generator().manual_seed(seed)
    count, width = min(len(one), len(two)), one.shape[1]
    if count < _GROUPS or directions < 2:
        raise ValueError(f"MIND needs at least {_GROUPS} rows of each set and 2 directions, got {count}, {directions}")
    # drawn in any case, also where all are kept: rows in the order of their classes make no fair groups
    where = one.device
    one, two = (rows[torch.randperm(len(rows), generator=generator)[:count].to(where)] for rows in (one, two))
    group = torch.arange(count, device=where) % _GROUPS
    whole, without = [], []
    for start in range(0, directions, 50):
        along = torch.randn(min(50, directions - start), width, generator=generator, dtype=torch.float32)
        along = (along / along.norm(dim=1, keepdim=True)).to(where)
        (x, i), (y, j) = ((along @ rows.T).double().sort(dim=1) for rows in (one, two))
        whole.append((x - y).square().mean(1))
        without.append(torch.stack([_apart(x, group[i] != g, y, group[j] != g) for g in range(_GROUPS)]))
    each, groups = torch.cat(whole), torch.cat(without, 1)
    value = 3 * width * each.mean()
    jackknife = (3 * width * groups.mean(1)).var(unbiased=False) * (_GROUPS - 1)
    reach = _Z * float((jackknife + (3 * width) ** 2 * each.var() / len(each)).sqrt())
    return Interval(float(value), max(0.0, float(value) - reach), float(value) + reach)


def _apart(x: Tensor, of_x: Tensor, y: Tensor, of_y: Tensor) -> Tensor:
    """W2^2 a direction of sorted rows (directions, N), of those that are kept: as many of each."""
    return (x[of_x].view(len(x), -1) - y[of_y].view(len(y), -1)).square().mean(1)


def inception_score(logits: Rows, split: int = 5000) -> tuple[float, float]:
    """(mean, standard deviation) over consecutive splits of so many rows of logits (N, classes), the last one shorter
    where N is no multiple: ADM's evaluator, which prints the mean."""
    values = torch.as_tensor(logits)
    if values.ndim != 2 or 0 in values.shape:
        raise ValueError(f"expected logits (N, classes), at least one row, got {tuple(values.shape)}")
    scores = []
    for part in values.split(split):
        log = part.double().log_softmax(1)
        marginal = log.logsumexp(0) - math.log(len(log))
        scores.append(float((log.exp() * (log - marginal)).sum(1).mean().exp()))
    return float(np.mean(scores)), float(np.std(scores))


def geometric_mean(values: Sequence[float]) -> float:
    """Of distances in features of different scale: no one of them outweighs the others. 0 where one is 0."""
    if not values or min(values) < 0:
        raise ValueError(f"expected values of at least 0, got {list(values)}")
    return 0.0 if min(values) == 0 else math.exp(sum(map(math.log, values)) / len(values))


def _pair(a: Rows, b: Rows) -> tuple[Tensor, Tensor]:
    one, two = (torch.as_tensor(rows) for rows in (a, b))
    if one.ndim != 2 or two.ndim != 2 or one.shape[1] != two.shape[1]:
        raise ValueError(f"expected features (N, D) and (M, D), got {tuple(one.shape)} and {tuple(two.shape)}")
    return one.float(), two.to(one.device).float()
