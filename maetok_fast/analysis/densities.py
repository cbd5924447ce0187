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

Where modes lie upon each other nothing can be left out, and of diagonal covariances leaving out costs what it saves.
Then all of it is one product (`Quadratic`): a log density is linear in the products of coordinates,

    log w_k N(x) = W_k f(x),   f(x) = (x_i x_j for i <= j, x_i, 1)   or   (x_i^2, x_i, 1) for diagonal covariances

and the statistics are the transposed one, r f(x)^T: of D^2 / 2 numbers a row and mode each, half of what whitening
takes. The price: terms cancel. They are as large as a_ki = A_ii (S_ii + m_i^2), A = S^-1, x and m about the centre of
all, for rows that the mode counts in; 1 is none. A mode whose a is above 16 in the mean or 256 anywhere is
`narrow`, and stays with differences x - m_k. Below, fp32 costs some 1e-4 nats a row, of either sign.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = [
    "DiagonalDensities",
    "FullDensities",
    "Parameters",
    "Quadratic",
    "densities_of",
    "negligible",
    "stage_edges",
]

STAGE = 64  # coordinates a stage: fewer make slow matrix products, more compute zeros of the triangle
GUESSES = 6  # modes of a row that are computed to their end before the rest, at most
KEPT = 2**23  # numbers y that a chunk of rows may leave for the statistics: what a cache holds
CHUNK = 2048  # rows a matrix product of the first stage: what it writes stays in the cache
FEATURES = 2**19  # numbers f(x) of a chunk of rows, about: 2 MB
WIDEST = 2**16  # numbers f(x) of a row: more would cost more memory than the parameters
GROUP = 4  # coordinates whose products with all later ones are taken at once; some are taken twice, for nothing
MEAN, MOST = 16, 256  # how far terms may cancel in fp32, as the module says
NEVER = -1e30  # the log weight of an emptied mode in a product: there -inf would make NaN of a zero


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
        self,
        parameters: Parameters,
        rows_dtype: torch.dtype,
        dtype: torch.dtype,
        device: torch.device,
        centre: Tensor | None = None,
    ) -> None:
        self.modes, self.dim = parameters.means.shape
        self.dtype, self.device = dtype, device
        centre = (parameters.weights @ parameters.means).to(rows_dtype) if centre is None else centre.cpu()
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
        self,
        parameters: Parameters,
        rows_dtype: torch.dtype,
        dtype: torch.dtype,
        device: torch.device,
        centre: Tensor | None = None,
    ) -> None:
        super().__init__(parameters, rows_dtype, dtype, device, centre)
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

    def split(self, parameters: Parameters) -> tuple[Tensor, Quadratic, Tensor, FullDensities | None] | None:
        """The same in two: (modes, as one product), (modes, as they are here): narrow ones, if any. None where that
        does not pay: for rows so wide, or where many modes are narrow."""
        if self.dim * (self.dim + GROUP) // 2 > WIDEST:
            return None
        precisions, spans = parameters.factors @ parameters.factors.mT, torch.empty_like(parameters.means)
        one = torch.eye(self.dim, dtype=torch.float64)
        for k, p in enumerate(parameters.factors):
            spans[k] = torch.linalg.solve_triangular(p, one, upper=True).square().sum(0)
        few = narrow(precisions.diagonal(dim1=1, dim2=2) * (spans + self.offsets.square()), torch.float32)
        few &= parameters.weights > 0
        if 4 * int(few.sum()) > self.modes:
            return None
        terms = precisions[~few], self.offsets[~few], self.constants.cpu()[~few]
        product, rest = Quadratic(*terms, self.dtype, self.device), None
        if few.any():
            others = Parameters(*(v[few] for v in (parameters.weights, parameters.means, parameters.factors)))
            rest = FullDensities(others, self.centre.dtype, self.dtype, self.device, self.centre)
            rest.nats = self.nats
        return places_of(~few, self.device), product, places_of(few, self.device), rest

    def whitened(self, x: Tensor, k: int) -> Tensor:
        """x (n, D) -> y (n, D) of mode k."""
        away, y, start = x - self.means[k], torch.empty_like(x), 0
        for end in self.edges:
            torch.mm(away[:, :end], self.factors[k, :end, start:end], out=y[:, start:end])
            start = end
        return y


class Quadratic:
    """Log densities and statistics of some modes as products with f(x), in one dtype.

    precisions: A (K, D, D) or (K, D); offsets: means (K, D) from the centre; constants (K,): c_k; all fp64. chunk: rows
    for which f(x) is made at a time.
    """

    def __init__(
        self, precisions: Tensor, offsets: Tensor, constants: Tensor, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.full, self.dim, self.dtype, self.device = precisions.ndim == 3, offsets.shape[1], dtype, device
        dim, self._groups, start = self.dim, [], 0
        if self.full:
            linear = (precisions @ offsets[..., None])[..., 0]
            squares = precisions.triu(1) + precisions.diagonal(dim1=1, dim2=2).diag_embed() / 2
            pieces = []
            for first in range(0, dim, GROUP):
                last = min(first + GROUP, dim)
                end = start + (last - first) * (dim - first)
                self._groups.append((first, last, start, end))
                pieces.append(squares[:, first:last, first:].flatten(1))
                start = end
            quadratic = torch.cat(pieces, dim=1)
        else:
            linear, quadratic = precisions * offsets, precisions / 2
        self._squares = quadratic.shape[1]
        self.features = 16 * math.ceil((self._squares + dim + 1) / 16)  # whole cache lines; the last are 0
        if device.type == "cpu":
            most = min(CHUNK // 2, max(256 if dim <= 128 else 128, FEATURES // self.features))
            self.chunk = 2 ** int(math.log2(most))  # no short ends of CHUNK rows
        else:
            self.chunk = CHUNK
        constant = (constants - (linear * offsets).sum(1) / 2).clamp_min(NEVER)
        weights = torch.cat([-quadratic, linear, constant[:, None]], dim=1)
        self._weights = torch.nn.functional.pad(weights, (0, self.features - weights.shape[1])).to(device, dtype)
        self._buffer, self._filled = torch.zeros(self.features * self.chunk, dtype=dtype, device=device), 0
        if not self.full:
            self._buffer.view(self.chunk, self.features)[:, self._squares + dim] = 1

    def of(self, x: Tensor, centre: Tensor) -> Tensor:
        """x (B, D), B <= chunk; centre (D,) -> f(x - centre) (features, B), until the next call."""
        n, dim, end = len(x), self.dim, self._squares + self.dim
        whole = self._buffer[: n * self.features]
        if not self.full:  # a row's numbers side by side
            rows = whole.view(n, self.features)
            values = torch.sub(x, centre, out=rows[:, dim:end])
            torch.mul(values, values, out=rows[:, :dim])
            return rows.T
        f = whole.view(self.features, n)  # a product's of all rows side by side: long runs to multiply
        columns = f[self._squares : end]
        columns.copy_((x - centre).T)
        for first, last, start, stop in self._groups:
            products = f[start:stop].view(last - first, dim - first, n)
            torch.mul(columns[first:last, None], columns[None, first:], out=products)
        if n != self._filled:
            f[end], f[end + 1 :], self._filled = 1, 0, n
        return f

    def logs(self, f: Tensor) -> Tensor:
        """f(x) (features, B) -> log w_k N(x) (K, B), very low for what weighs nothing."""
        return self._weights @ f

    def moments(self, sums: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Sums of r f(x) (K, features) -> (mass (K,), first (K, D), second (K, D, D) or (K, D)), about the centre."""
        end = self._squares + self.dim
        mass, first, second = sums[:, end], sums[:, self._squares : end], sums[:, : self._squares]
        if self.full:
            upper = sums.new_zeros(len(sums), self.dim, self.dim)
            for i, last, start, stop in self._groups:
                upper[:, i:last, i:] = second[:, start:stop].view(len(sums), last - i, self.dim - i)
            upper = upper.triu()
            second = upper + upper.triu(1).mT
        return mass, first, second


class DiagonalDensities(_Densities):
    """Of diagonal covariances: one product, but for narrow modes. means, factors (K, D): on the device, in the dtype.

    split: the modes of the product (n,), the product, and the narrow modes, which may be none."""

    def __init__(
        self, parameters: Parameters, rows_dtype: torch.dtype, dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__(parameters, rows_dtype, dtype, device)
        precisions, constants = parameters.factors.square(), self.constants.cpu()
        few = narrow(1 + precisions * self.offsets.square(), dtype) & (parameters.weights > 0)
        product = Quadratic(precisions[~few], self.offsets[~few], constants[~few], dtype, device)
        self.split = (places_of(~few, device), product, places_of(few, device))
        self.means, self.factors = self.offsets.to(device, dtype), parameters.factors.to(device, dtype)

    def of(self, x: Tensor) -> Tensor:
        wide, product, few = self.split
        logs, nowhere = x.new_empty(self.modes, len(x)), x.new_zeros(self.dim)
        for part, some in zip(x.split(product.chunk), logs.split(product.chunk, dim=1)):
            some[wide] = product.logs(product.of(part, nowhere))
            some[few] = self.apart(part)
        return logs.masked_fill_(logs < logs.amax(0) - self.nats, -math.inf)

    def apart(self, x: Tensor) -> Tensor:
        """x (B, D) -> log w_k N(x) (n, B) of the narrow modes, by differences."""
        places = self.split[2].tolist()
        logs, y = x.new_empty(len(places), len(x)), torch.empty_like(x)
        for k, row in zip(places, logs):
            torch.sub(x, self.means[k], out=y).mul_(self.factors[k])
            torch.add(self.constants[k], _squared(y), alpha=-0.5, out=row)
        return logs


def narrow(cancelling: Tensor, dtype: torch.dtype) -> Tensor:
    """a (K, D), as the module says -> (K,) bool, whose products would be spoilt: none in fp64."""
    found = (cancelling.mean(1) > MEAN) | (cancelling.amax(1) > MOST)
    return found & (dtype != torch.float64)


def places_of(which: Tensor, device: torch.device) -> Tensor:
    return which.nonzero()[:, 0].to(device)


def densities_of(
    parameters: Parameters, rows_dtype: torch.dtype, dtype: torch.dtype, device: torch.device
) -> FullDensities | DiagonalDensities:
    """rows_dtype: of the blocks to come; dtype: of the products, fp32 or fp64."""
    kind = FullDensities if parameters.full else DiagonalDensities
    return kind(parameters, rows_dtype, dtype, device)


def _squared(y: Tensor) -> Tensor:
    """|y|^2 of each row, one pass."""
    return torch.linalg.vector_norm(y, dim=1).square_()
