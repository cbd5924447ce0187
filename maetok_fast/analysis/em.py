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

Diagonal covariances, and full ones where modes lie upon each other, are summed about the centre of all, as products
with f(x) (`densities.Quadratic`); narrow modes among them by differences, as above.

    delta = first / mass      m_k' = m_k + delta      S_k' = second / mass - delta delta^T + regularisation I

Mini-batches (stepwise EM: Cappé and Moulines 2009): statistics s <- (1 - g) s + g s_batch, g = (t + 2)^-0.7, as shares
of a row, of random rows, from the statistics of the start on; parameters of s after each batch.

Emptied modes, the one policy: a mode that holds less mass than one row, or whose covariance is not positive definite in
fp64, gets weight 0 and keeps its last parameters; it never comes back, and `GMM.emptied` names it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from maetok_fast.analysis.densities import (
    CHUNK,
    DiagonalDensities,
    FullDensities,
    Parameters,
    Quadratic,
    densities_of,
)

__all__ = ["Statistics", "Sums", "covariances_of", "expectation", "factor", "maximise", "softened"]

KAPPA = 0.7  # of stepwise EM: in (0.5, 1]
TINY = torch.finfo(torch.float64).tiny
SAMPLE = 512  # rows by which a pass decides what it leaves out
DENSE = 1024  # it leaves out none where more than D / 1024 of all pairs of a row and a mode count: measured


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
    """The sums of one pass, block by block: as products, by differences, or of some modes so and of the others so."""

    def __init__(self, parameters: Parameters, densities: FullDensities | DiagonalDensities) -> None:
        self.parameters, self.densities = parameters, densities
        self.total, self.rows = torch.zeros((), dtype=torch.float64, device=densities.device), 0
        self._products: tuple[Tensor, _Products] | None = None
        self._apart: tuple[Tensor, _Whitened | _Scaled] | None = None
        if isinstance(densities, DiagonalDensities):
            wide, product, few = densities.split
            self._products = wide, _Products(len(wide), product)
            if len(few):
                self._apart = few, _Scaled(parameters.means[few.cpu()], densities)

    def _begin(self, densities: FullDensities, block: Tensor) -> None:
        """Chooses how full covariances are summed, by some rows of the first block: where those hold many modes there
        is nothing to leave out."""
        logs = densities.of(densities.centred(block[:: max(1, len(block) // SAMPLE)]))
        held = float((logs > -torch.inf).double().mean())
        split = densities.split(self.parameters) if held > densities.dim / DENSE else None
        if split is None:
            every = torch.arange(densities.modes, device=densities.device)
            self._apart = every, _Whitened(self.parameters.means, densities)
            return
        wide, product, few, rest = split
        self._products = wide, _Products(len(wide), product)
        if rest is not None:
            self._apart = few, _Whitened(self.parameters.means[few.cpu()], rest)

    def add(self, block: Tensor) -> None:
        """block (B, D), as it comes."""
        densities = self.densities
        if isinstance(densities, FullDensities) and not self.rows:
            self._begin(densities, block)
        if self._products is not None:
            for part in block.to(densities.device).split(CHUNK):
                self._add_products(part, *self._products)
            return
        assert isinstance(densities, FullDensities)
        assert self._apart is not None
        sums, x = self._apart[1], densities.centred(block)
        for part in x.split(CHUNK) if densities.keeps else (x,):
            sums.add(part, self._shares(sums.logs(part)))

    def _add_products(self, block: Tensor, which: Tensor, sums: _Products) -> None:
        """Of B <= CHUNK rows; which: the modes that are products, the others are behind them here."""
        wide, product, centre = len(which), sums.quadratic, self.densities.centre
        if self._apart is None:
            for part in block.split(product.chunk):
                f = product.of(part, centre)
                sums.add(self._shares(product.logs(f)), f)
            return
        x, others = self.densities.centred(block), self._apart[1]
        logs = x.new_empty(self.densities.modes, len(x))
        logs[wide:] = others.logs(x)
        for part, some in zip(block.split(product.chunk), logs.split(product.chunk, dim=1)):
            f = product.of(part, centre)
            some[:wide] = product.logs(f)
            sums.add(self._shares(some)[:wide], f)
        others.add(x, logs[wide:])

    def _shares(self, logs: Tensor) -> Tensor:
        """In the place of logs (K, B)."""
        shares, likelihood = softened(logs, self.densities.nats)
        self.total += likelihood.double().sum()
        self.rows += len(likelihood)
        return shares

    def statistics(self) -> Statistics:
        now = self.parameters
        about, mass, first, second = (torch.empty_like(v) for v in (now.means, now.weights, now.means, now.factors))
        for which, sums in (part for part in (self._products, self._apart) if part is not None):
            points = self.densities.centre.double() if isinstance(sums, _Products) else sums.about
            for whole, some in zip((about, mass, first, second), (points, *sums.found())):
                whole[which.cpu()] = some.cpu()
        return Statistics(about, mass, first, second, self.rows, float(self.total)).moved(now.means)


class _Products:
    """Sums of r f(x) over rows, (K, features): in the products' dtype over some chunks, then in fp64."""

    def __init__(self, modes: int, quadratic: Quadratic) -> None:
        self.quadratic = quadratic
        self._now = torch.zeros(modes, quadratic.features, dtype=quadratic.dtype, device=quadratic.device)
        self._before, self._rows = torch.zeros_like(self._now, dtype=torch.float64), 0

    def add(self, shares: Tensor, f: Tensor) -> None:
        """shares (K, B), f (features, B)."""
        self._now.addmm_(shares, f.T)
        self._rows += f.shape[1]
        if self._rows >= CHUNK:
            self._flush()

    def _flush(self) -> None:
        self._before += self._now
        self._now.zero_()
        self._rows = 0

    def found(self) -> tuple[Tensor, Tensor, Tensor]:
        """mass (K,), first (K, D), second (K, D, D) or (K, D), fp64, about the centre."""
        self._flush()
        return self.quadratic.moments(self._before)


class _Scaled:
    """Sums of diagonal covariances by differences: of narrow modes, which hold few rows. about: (n, D)."""

    def __init__(self, about: Tensor, densities: DiagonalDensities) -> None:
        self.about, self.densities = about, densities
        shape = (*about.shape, 2)
        self.mass, self.sums = (
            torch.zeros(n, dtype=torch.float64, device=densities.device) for n in (shape[:1], shape)
        )

    def logs(self, x: Tensor) -> Tensor:
        return self.densities.apart(x)

    def add(self, x: Tensor, shares: Tensor) -> None:
        """x (B, D) from the centre, shares (n, B)."""
        for i, (k, r) in enumerate(zip(self.densities.split[2].tolist(), shares)):
            which = r.nonzero()[:, 0]
            if not len(which):
                continue
            away, r = x[which] - self.densities.means[k], r[which]
            self.mass[i] += r.double().sum()
            self.sums[i] += torch.stack([r @ away, r @ away.square()], dim=1)

    def found(self) -> tuple[Tensor, Tensor, Tensor]:
        """mass (n,), first, second (n, D), fp64, about `about`."""
        return self.mass, self.sums[..., 0], self.sums[..., 1]


class _Whitened:
    """Sums of full covariances in each mode's own coordinates y. about: (K, D)."""

    def __init__(self, about: Tensor, densities: FullDensities) -> None:
        self.about, self.densities = about, densities

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float64, device=densities.device)

        modes, dim = about.shape
        self.mass, self.first, self.second = zeros(modes), zeros(modes, dim), zeros(modes, dim, dim)
        self._kept: Tensor | None = None

    def logs(self, x: Tensor) -> Tensor:
        """x (B, D) -> log densities (K, B), -inf where they are negligible; y stays where there is room."""
        if not self.densities.keeps or len(x) > CHUNK:
            self._kept = None
            return self.densities.of(x)
        if self._kept is None or self._kept.shape[1] != len(x):
            self._kept = x.new_empty(self.densities.modes, len(x), x.shape[1])
        return self.densities.of(x, self._kept)

    def add(self, x: Tensor, shares: Tensor) -> None:
        """shares (K, B) of the rows that `logs` has just had."""
        densities, kept = self.densities, self._kept
        self.mass += shares.double().sum(1)
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

    def found(self) -> tuple[Tensor, Tensor, Tensor]:
        """mass (K,), first (K, D), second (K, D, D), fp64, about `about`."""
        first, second = self.first.clone(), self.second.clone()
        for k in range(len(first)):  # back from y: x - m = y P^-1, of the factor that made it
            p = self.densities.factors[k].double()
            whole = second[k].triu() + second[k].triu(1).T
            half = torch.linalg.solve_triangular(p, whole, upper=True, left=False)
            second[k] = torch.linalg.solve_triangular(p, half.T, upper=True, left=False)
            first[k] = torch.linalg.solve_triangular(p, first[k][None], upper=True, left=False)[0]
        return self.mass, first, second


def _gathered(x: Tensor, shares: Tensor, which: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    for part in which.split(CHUNK):
        yield x[part], shares[part]


def softened(logs: Tensor, nats: float | None = None) -> tuple[Tensor, Tensor]:
    """logs (K, B), which it overwrites -> (shares (K, B) that sum to 1 over k, log sum exp (B,)). nats: shares of what
    lies so far below the best are 0."""
    top = logs.amax(0)
    shares = logs.sub_(top)
    if nats is None:
        shares.exp_()
    else:
        # numbers that underflow are slow: none are made
        torch.threshold_(shares.clamp_min_(-nats - 1).exp_(), math.exp(-nats), 0.0)
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
