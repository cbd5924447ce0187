# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""The log densities of a block of rows under every mode of a Gaussian mixture: EM's expensive half.

    log w_k N(x; m_k, S_k) = c_k - |y|^2 / 2,   y = (x - m_k) P_k,   P_k P_k^T = S_k^-1, upper triangular
    c_k = log w_k + sum log diag P_k - D/2 log 2 pi

P_k is triangular: the first d coordinates of y need only the first d of x, and |y|^2 grows with every coordinate. So
c_k - |y_1..d|^2 / 2 is an upper bound of the log density, and the coordinates are computed in stages (`edges`):

    1  the first coordinates, of every row and mode: upper bounds (K, B)
    2  each row's best mode, as far as those tell, to its end: a lower bound of the row's log likelihood; then its next
       best, while a quarter of the rows have one whose upper bound lies above what they have
    3  stage by stage the rest of the modes whose upper bound is not `nats` below it

A mode left out holds less than exp(-nats) of a row's likelihood, and nats = log(8 K / eps): all of them together less
than eps / 8, an eighth of the dtype's rounding step (2^-26 in fp32). Nothing else is approximated. With s stages
(s + 1) / 2s of the square around the triangle are computed at most; the less, the farther the modes are apart.

x - m_k is taken before the product, so that an offset which rows and means share costs no precision (the difference of
two products loses it: fp32 rows at 1e5 give a wrong likelihood).

Diagonal covariances: |y|^2 = x^2 p^2 - 2 x (m p^2) + sum m^2 p^2 are two thin products, in fp64, where their difference
costs nothing that matters.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["DiagonalDensities", "FullDensities", "Parameters", "densities_of", "negligible", "stage_edges"]

STAGE = 64  # coordinates a stage: fewer make slow matrix products, more compute zeros of the triangle
GUESSES = 6  # modes of a row that are computed to their end before the rest, at most
KEPT = 2**23  # numbers y that a chunk of rows may leave for the statistics: what a cache holds
CHUNK = 2048  # rows a matrix product of the first stage: what it writes stays in the cache


@dataclass(frozen=True)
class Parameters:
    """weights (K,), sum 1; means (K, D); factors (K, D, D) upper triangular or (K, D): P P^T is the inverse covariance.
    fp64, CPU."""

    weights: Tensor
    means: Tensor
    factors: Tensor

    @property
    def full(self) -> bool:
        return self.factors.ndim == 3


def negligible(modes: int, dtype: torch.dtype) -> float:
    """In nats: how far below a row's likelihood the density of a mode does not count."""
    return math.log(8 * modes / torch.finfo(dtype).eps)


def stage_edges(dim: int) -> list[int]:
    """Where the stages end: the last one at dim, none much narrower than STAGE."""
    stages = max(1, round(dim / STAGE))
    return [dim * (i + 1) // stages for i in range(stages)]


class _Densities:
    """One mixture on one device, in one dtype, and what both kinds share.

    centre: (D,) in the rows' own dtype, taken from rows before all else: exact where an offset is large."""

    def __init__(
        self, parameters: Parameters, rows_dtype: torch.dtype, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.modes, self.dim = parameters.means.shape
        self.dtype, self.device = dtype, device
        centre = (parameters.weights @ parameters.means).to(rows_dtype)
        self.centre = centre.to(device)
        self.offsets = parameters.means - centre.double()
        p = parameters.factors
        spans = (p.diagonal(dim1=1, dim2=2) if parameters.full else p).log().sum(1)
        self.constants = (parameters.weights.log() + spans - self.dim / 2 * math.log(2 * math.pi)).to(device)
        self.nats = negligible(self.modes, dtype)

    def centred(self, block: Tensor) -> Tensor:
        """A block (B, D) as it comes -> x for `of`, on the device."""
        return (block.to(self.device) - self.centre).to(self.dtype)

    def of(self, x: Tensor) -> Tensor:
        """x (B, D) from `centred` -> log w_k N(x) (K, B), -inf where it is negligible."""
        raise NotImplementedError


class FullDensities(_Densities):
    """Of full covariances. means (K, D), factors (K, D, D) are what the products take: on the device, in the dtype."""

    def __init__(
        self, parameters: Parameters, rows_dtype: torch.dtype, dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__(parameters, rows_dtype, dtype, device)
        self.means, self.factors = self.offsets.to(device, dtype), parameters.factors.to(device, dtype)
        self.edges = stage_edges(self.dim)
        self._numbers: list[float] = self.constants.tolist()
        self._alive = [k for k, c in enumerate(self._numbers) if c > -math.inf]
        self.keeps = len(self.edges) == 1 and self.modes * CHUNK * self.dim <= KEPT

    def of(self, x: Tensor, kept: Tensor | None = None) -> Tensor:
        """kept: (K, B, D), where y is left for the statistics; only of few rows, and where `keeps` says so."""
        upper = x.new_full((self.modes, len(x)), -math.inf)
        self._first(x, upper, kept)
        if len(self.edges) > 1:
            upper = self._rest(x, upper)
        return upper.masked_fill_(upper < upper.amax(0) - self.nats, -math.inf)

    def _rest(self, x: Tensor, upper: Tensor) -> Tensor:
        """Stages 2 and 3: log densities, but for modes whose upper bound is negligible: those keep one that is."""
        # a guess of each row's best mode: |y|^2 goes on as it began
        likely = torch.lerp(self.constants[:, None].to(upper.dtype), upper, self.dim / self.edges[0])
        likely = likely.nan_to_num_(nan=-math.inf, neginf=-math.inf)
        done = torch.zeros_like(upper, dtype=torch.bool)
        best = x.new_full((1, len(x)), -math.inf)
        for _ in range(GUESSES):
            guess = likely.masked_fill(done, -math.inf).argmax(0, keepdim=True)
            wanted = upper.gather(0, guess) > best
            if int(wanted.sum()) < len(x) // 4:
                break
            chosen = torch.zeros_like(done).scatter_(0, guess, wanted)
            self._continue(x, upper, chosen, self.edges[0], self.dim, most=len(x))
            done |= chosen
            best = torch.maximum(best, upper.where(chosen, -math.inf).amax(0))
        exact, floor = upper.clone(), best - self.nats
        for start, end in zip(self.edges, self.edges[1:]):
            # products of all rows where a gather would take most of them: what was left out stays an upper bound
            self._continue(x, upper, (upper >= floor) & ~done, start, end, most=len(x) // 2)
        return exact.where(done, upper)

    def _first(self, x: Tensor, upper: Tensor, kept: Tensor | None) -> None:
        """Stage 1."""
        d = self.edges[0]
        for x_, upper_ in zip(x.split(CHUNK), upper.split(CHUNK, dim=1)):
            head, away, y = x_[:, :d], x_.new_empty(len(x_), d), x_.new_empty(len(x_), d)
            for k in self._alive:
                torch.sub(head, self.means[k, :d], out=away)
                y = y if kept is None else kept[k]
                torch.mm(away, self.factors[k, :d, :d], out=y)
                upper_[k] = _squared(y).mul_(-0.5).add_(self._numbers[k])

    def _continue(self, x: Tensor, upper: Tensor, todo: Tensor, start: int, end: int, most: int) -> None:
        """Coordinates start .. end of y for the pairs (k, row) of todo (K, B), taken from their bounds; of all rows for
        a mode that has at least `most` pairs."""
        counts = todo.sum(1).tolist()
        for k, which in enumerate(todo.nonzero()[:, 1].split(counts)):
            if not counts[k]:
                continue
            if counts[k] >= most:
                for x_, upper_ in zip(x.split(CHUNK), upper[k].split(CHUNK)):
                    upper_ -= _squared((x_[:, :end] - self.means[k, :end]) @ self.factors[k, :end, start:end]) / 2
            else:
                for w in which.split(CHUNK):
                    away = x[w, :end] - self.means[k, :end]
                    upper[k, w] -= _squared(away @ self.factors[k, :end, start:end]) / 2

    def whitened(self, x: Tensor, k: int) -> Tensor:
        """x (n, D) -> y (n, D) of mode k."""
        away, y, start = x - self.means[k], torch.empty_like(x), 0
        for end in self.edges:
            torch.mm(away[:, :end], self.factors[k, :end, start:end], out=y[:, start:end])
            start = end
        return y


class DiagonalDensities(_Densities):
    """Of diagonal covariances. Products are in fp64 whatever the dtype, which decides only what is negligible."""

    def __init__(
        self, parameters: Parameters, rows_dtype: torch.dtype, dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__(parameters, rows_dtype, dtype, device)
        precisions = parameters.factors.square()
        linear, square = 2 * precisions * self.offsets, precisions * self.offsets.square()
        self._weights = torch.cat([precisions, -linear], dim=1).to(device)
        self._shifts = (square.sum(1) / 2).to(device)

    def centred(self, block: Tensor) -> Tensor:
        return (block.to(self.device) - self.centre).double()

    def of(self, x: Tensor) -> Tensor:
        twice = self._weights @ torch.cat([x.square(), x], dim=1).T
        logs = twice.mul_(-0.5).add_((self.constants - self._shifts)[:, None])
        return logs.masked_fill_(logs < logs.amax(0) - self.nats, -math.inf)


def densities_of(
    parameters: Parameters, rows_dtype: torch.dtype, dtype: torch.dtype, device: torch.device
) -> FullDensities | DiagonalDensities:
    """rows_dtype: of the blocks to come; dtype: of the products, fp32 or fp64."""
    kind = FullDensities if parameters.full else DiagonalDensities
    return kind(parameters, rows_dtype, dtype, device)


def _squared(y: Tensor) -> Tensor:
    """|y|^2 of each row, one pass."""
    return torch.linalg.vector_norm(y, dim=1).square_()
