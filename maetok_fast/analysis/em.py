# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""Expectation maximisation of a Gaussian mixture, one pass over the rows an iteration.

    block x ── densities.py ──> log w_k N(x) (K, B) ──> r = softmax ──> Sums ──> Statistics ── maximise ──> Parameters
                                    sum of logsumexp = the lower bound, of the parameters before the pass

Statistics of mode k, about a point (its mean m_k of before), sums over the rows with r that counts:

    mass = sum r        first = sum r (x - m_k)        second = sum r (x - m_k)(x - m_k)^T   (its diagonal)

A row enters only the modes that hold more than exp(-nats) of it (`densities.negligible`): together the others hold less
than eps / 8 of its mass, of which the sums would not keep anything anyway. In many dimensions that is one to three of a
hundred modes. Full covariances are summed in the mode's own coordinates y = (x - m_k) P_k, in which its rows have about
unit variance in every direction, and taken back in fp64: products in fp32 then cost sqrt(condition) of the covariance
in precision, and not the condition, which reaches 1e6 in whitened latents. Sums between blocks are in fp64.

    delta = first / mass      m_k' = m_k + delta      S_k' = second / mass - delta delta^T + regularisation I

Mini-batches (stepwise EM: Cappé and Moulines 2009): statistics s <- (1 - g) s + g s_batch, g = (t + 2)^-0.7, as shares
of a row, of random rows, from the statistics of the start on; parameters of s after each batch.

Emptied modes, the one policy: a mode that holds less mass than one row, or whose covariance is not positive definite in
fp64, gets weight 0 and keeps its last parameters; it never comes back, and `GMM.emptied` names it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from maetok_fast.analysis.densities import CHUNK, DiagonalDensities, FullDensities, Parameters, densities_of

__all__ = ["Statistics", "Sums", "covariances_of", "expectation", "factor", "maximise", "softened"]

KAPPA = 0.7  # of stepwise EM: in (0.5, 1]
TINY = torch.finfo(torch.float64).tiny


@dataclass
class Statistics:
    """mass (K,), first (K, D), second (K, D, D) or (K, D) about points `about` (K, D), fp64, on the CPU; rows: how
    many; total: the sum of their log likelihoods."""

    about: Tensor
    mass: Tensor
    first: Tensor
    second: Tensor
    rows: int
    total: float

    @classmethod
    def of(cls, parameters: Parameters) -> Statistics:
        """The shares of a row that these parameters would follow from."""
        w, means = parameters.weights, parameters.means
        second = w.reshape(-1, *(1,) * (parameters.factors.ndim - 1)) * covariances_of(parameters.factors)
        return cls(means, w, torch.zeros_like(means), second, 1, 0.0)

    def share(self) -> Statistics:
        """Of one row in the mean."""
        n = self.rows
        return Statistics(self.about, self.mass / n, self.first / n, self.second / n, 1, self.total / n)

    def moved(self, about: Tensor) -> Statistics:
        """The same about other points (K, D)."""
        step = self.about - about  # x - about = (x - self.about) + step
        if self.second.ndim == 3:
            cross = self.first[..., None] * step[:, None]
            second = self.second + cross + cross.mT + self.mass[:, None, None] * step[..., None] * step[:, None]
        else:
            second = self.second + 2 * self.first * step + self.mass[:, None] * step.square()
        return Statistics(about, self.mass, self.first + self.mass[:, None] * step, second, self.rows, self.total)

    def blended(self, batch: Statistics, rate: float) -> Statistics:
        """(1 - rate) of these and `rate` of a batch's, both shares; about the batch's points."""
        mine = self.moved(batch.about)
        mass, first, second = (
            torch.lerp(getattr(mine, n), getattr(batch, n), rate) for n in ("mass", "first", "second")
        )
        return Statistics(batch.about, mass, first, second, 1, batch.total)


class Sums:
    """The sums of one pass, block by block."""

    def __init__(self, parameters: Parameters, densities: FullDensities | DiagonalDensities) -> None:
        self.parameters, self.densities = parameters, densities

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float64, device=densities.device)

        self.mass, self.first = zeros(densities.modes), zeros(densities.modes, densities.dim)
        self.second = zeros(*parameters.factors.shape)
        self.total, self.rows = zeros(), 0
        self._kept: Tensor | None = None

    def add(self, block: Tensor) -> None:
        """block (B, D), as it comes."""
        x = self.densities.centred(block)
        if isinstance(self.densities, FullDensities) and self.densities.keeps:
            if self._kept is None:
                self._kept = x.new_empty(self.densities.modes, CHUNK, x.shape[1])
            for part in x.split(CHUNK):
                kept = self._kept[:, : len(part)]
                self._add(part, self.densities.of(part, kept), kept)
        else:
            self._add(x, self.densities.of(x))

    def _add(self, x: Tensor, logs: Tensor, kept: Tensor | None = None) -> None:
        shares, likelihood = softened(logs)
        self.total += likelihood.double().sum()
        self.rows += len(x)
        self.mass += shares.double().sum(1)
        if isinstance(self.densities, DiagonalDensities):
            self.first += shares @ x
            self.second += shares @ x.square()
        else:
            self._add_full(self.densities, x, shares, kept)

    def _add_full(self, densities: FullDensities, x: Tensor, shares: Tensor, kept: Tensor | None) -> None:
        """kept: y (K, B, D) of all modes, where they are there already."""
        held = shares > 0
        counts = held.sum(1).tolist()
        product = x.new_empty(x.shape[1], x.shape[1])
        for k, which in enumerate(held.nonzero()[:, 1].split(counts)):
            if not counts[k]:
                continue
            product.zero_()
            every = 4 * counts[k] > 3 * len(x)  # gathering costs more than what it leaves out
            source = x if kept is None else kept[k]
            pieces = zip(source.split(CHUNK), shares[k].split(CHUNK)) if every else _gathered(source, shares[k], which)
            for part, r in pieces:
                y = part if kept is not None else densities.whitened(part, k)
                self.first[k] += r @ y
                y *= r.sqrt()[:, None]
                start = 0
                for end in densities.edges:  # the upper triangle of y^T y
                    product[start:end, start:].addmm_(y[:, start:end].T, y[:, start:])
                    start = end
            self.second[k] += product

    def statistics(self) -> Statistics:
        mass, first, second = self.mass.cpu(), self.first, self.second
        if isinstance(self.densities, DiagonalDensities):
            about = self.densities.centre.double().expand_as(first)
        else:
            about = self.parameters.means
            first, second = first.clone(), second.clone()
            for k in range(len(mass)):  # back from y: x - m = y P^-1, of the factor that made it
                p = self.densities.factors[k].double()
                whole = second[k].triu() + second[k].triu(1).T
                half = torch.linalg.solve_triangular(p, whole, upper=True, left=False)
                second[k] = torch.linalg.solve_triangular(p, half.T, upper=True, left=False)
                first[k] = torch.linalg.solve_triangular(p, first[k][None], upper=True, left=False)[0]
        found = Statistics(about.cpu(), mass, first.cpu(), second.cpu(), self.rows, float(self.total))
        return found.moved(self.parameters.means)


def _gathered(x: Tensor, shares: Tensor, which: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    for part in which.split(CHUNK):
        yield x[part], shares[part]


def softened(logs: Tensor) -> tuple[Tensor, Tensor]:
    """logs (K, B) -> (shares (K, B) that sum to 1 over k, log sum exp (B,))."""
    top = logs.amax(0)
    shares = (logs - top).exp_()
    total = shares.sum(0)
    return shares.div_(total), top + total.log()


def expectation(
    blocks: Iterable[Tensor], parameters: Parameters, rows_dtype: torch.dtype, dtype: torch.dtype, device: torch.device
) -> Statistics:
    """The statistics of all blocks under these parameters. rows_dtype: the blocks'; dtype: of the products."""
    sums = Sums(parameters, densities_of(parameters, rows_dtype, dtype, device))
    for block in blocks:
        sums.add(block)
    return sums.statistics()


def maximise(found: Statistics, before: Parameters, row: float, regularisation: float) -> Parameters:
    """The parameters that these statistics ask for; `before`'s where a mode is emptied. row: the mass of one row, 1 for
    sums and 1 / N for shares. ValueError where no mode is left."""
    mass = found.mass.clamp_min(TINY)
    delta = found.first / mass[:, None]
    if before.full:
        covariance = found.second / mass[:, None, None] - delta[..., None] * delta[:, None]
        covariance.diagonal(dim1=1, dim2=2).add_(regularisation)
    else:
        covariance = found.second / mass[:, None] - delta.square() + regularisation
    factors, sound = factor(covariance)
    kept = (found.mass >= row * (1 - 1e-6)) & sound & (before.weights > 0)
    if not kept.any():
        raise ValueError("a mixture lost all of its modes: the rows are alike; raise the regularisation")
    weights = torch.where(kept, found.mass, 0.0)
    means = torch.where(kept[:, None], found.about + delta, before.means)
    factors = torch.where(kept.reshape(-1, *(1,) * (factors.ndim - 1)), factors, before.factors)
    return Parameters(weights / weights.sum(), means, factors)


def covariances_of(factors: Tensor) -> Tensor:
    """P (K, D, D) upper triangular, or (K, D) -> covariances (K, D, D), or variances (K, D)."""
    if factors.ndim == 2:
        return factors.square().reciprocal()
    one = torch.eye(factors.shape[1], dtype=factors.dtype).expand_as(factors)
    inverse = torch.linalg.solve_triangular(factors, one, upper=True)
    return inverse.mT @ inverse


def factor(covariance: Tensor) -> tuple[Tensor, Tensor]:
    """(K, D, D) symmetric fp64, or variances (K, D) -> (P of the same shape with P P^T the inverse, upper triangular;
    (K,) bool, which are positive definite: P of the others is 1). One after another: memory stays that of one."""
    if covariance.ndim == 2:
        sound = (covariance > 0).all(1)
        return covariance.where(sound[:, None], 1.0).rsqrt(), sound
    factors, found = torch.empty_like(covariance), []
    one = torch.eye(covariance.shape[1], dtype=covariance.dtype, device=covariance.device)
    for k, matrix in enumerate(covariance):
        lower, info = torch.linalg.cholesky_ex(matrix)
        found.append(bool(info == 0))
        factors[k] = torch.linalg.solve_triangular(lower, one, upper=False).T if found[k] else one
    return factors, torch.tensor(found)
