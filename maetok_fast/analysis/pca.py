# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""Principal components of rows, and rows in them, standardised.

    rows (N, D) ── blocks, fp64 ──> mean, covariance ── eigh ──> PCA: directions by falling variance
    PCA.transform(x) = (x - mean) V_K / std_K         WhitenedRows(rows, pca): the same, block by block

The K that explains a share of the variance is the smallest one that explains more than it (MAETok's "> 90 %"); of
several tokenizers that are compared all take the largest of their K (`with_components`).

Standardised means: each component divided by its standard deviation over the rows that the PCA was fitted to. After a
PCA this whitens. It lowers the negative log likelihood of a row by exactly the sum of log std (`log_scale`), so
likelihoods are compared on standardised rows, or with that sum added back; never one with the other.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from maetok_fast.analysis.rows import Rows
from maetok_fast.checks import check_number, check_positive

__all__ = ["PCA", "WhitenedRows", "fit_pca"]


@dataclass(frozen=True)
class PCA:
    """mean: (D,). basis: (D, D), orthonormal rows by falling variance. spectrum: (D,), their variances (of N - 1), all
    fp64 on the CPU. components: K, how many of them count. rows: N, what it was fitted to. name: of these rows."""

    mean: Tensor
    basis: Tensor
    spectrum: Tensor
    components: int
    rows: int
    name: str = "rows"

    @property
    def explained(self) -> Tensor:
        """The variance curve: (D,) fp64, the share of the variance that the first 1 .. D components explain."""
        return self.spectrum.cumsum(0) / self.spectrum.sum()

    @property
    def std(self) -> Tensor:
        """(K,) fp64."""
        return self.spectrum[: self.components].sqrt()

    @property
    def log_scale(self) -> float:
        """The sum of log std of the K components, in nats."""
        return float(self.std.log().sum())

    def components_for(self, variance: float) -> int:
        """The smallest K that explains more than this share of the variance, D where rounding lets none do."""
        check_number("PCA", "variance", variance, 0, 1)
        return min(int((self.explained <= variance).sum()) + 1, self._rank)

    @property
    def _rank(self) -> int:
        """Components whose variance is more than rounding."""
        return int((self.spectrum > self.spectrum[0] * 1e-12).sum())

    def with_components(self, components: int) -> PCA:
        """The same with another K. ValueError where the rows do not span so many dimensions."""
        check_positive("PCA", components=components)
        if components > self._rank:
            raise ValueError(
                f"PCA of {self.name}: {components} components asked for, but its {self.rows} rows vary in {self._rank} "
                "dimensions; ask for fewer, or give more rows"
            )
        return replace(self, components=components)

    def transform(self, x: Tensor, standardise: bool = True) -> Tensor:
        """x: (B, D) floating point -> (B, K) in its dtype and on its device; standardise: divided by std."""
        if x.ndim != 2 or x.shape[1] != len(self.mean):
            raise ValueError(f"PCA of {self.name}: expected x (B, {len(self.mean)}), got {tuple(x.shape)}")
        directions = self.basis[: self.components]
        if standardise:
            directions = directions / self.std[:, None]
        # the mean taken off before the product, in fp64: an offset that is large against the deviations would eat them
        centred = (x.double() - self.mean.to(x.device)).to(x.dtype)
        return centred @ directions.to(x.device, x.dtype).T

    def inverse(self, z: Tensor, standardise: bool = True) -> Tensor:
        """z: (B, K) -> (B, D), the point of that place in the span of the components."""
        if z.ndim != 2 or z.shape[1] != self.components:
            raise ValueError(f"PCA of {self.name}: expected z (B, {self.components}), got {tuple(z.shape)}")
        z = z.double() * self.std.to(z.device) if standardise else z.double()
        return (z @ self.basis[: self.components].to(z.device) + self.mean.to(z.device)).to(torch.float32)


class WhitenedRows(Rows):
    """Other rows through a PCA, (N, K) fp32, standardised unless told otherwise; computed anew in each pass."""

    def __init__(self, rows: Rows, pca: PCA, standardise: bool = True, device: torch.device | str = "cpu") -> None:
        if rows.dim != len(pca.mean):
            raise ValueError(f"{rows.name}: has rows of {rows.dim}, the PCA of {pca.name} of {len(pca.mean)}")
        self.rows, self.pca, self.standardise, self.device = rows, pca, standardise, torch.device(device)
        self.name, self.dim = rows.name, pca.components
        self.log_scale = rows.log_scale + (pca.log_scale if standardise else 0.0)

    def __len__(self) -> int:
        return len(self.rows)

    def take(self, places: np.ndarray) -> Tensor:
        x = self.rows.take(places).to(self.device)
        return self.pca.transform(x, self.standardise).float().cpu()


def fit_pca(
    rows: Rows,
    variance: float = 0.9,
    components: int | None = None,
    device: torch.device | str = "cpu",
) -> PCA:
    """Principal components of rows by one pass over them and an eigendecomposition, in fp64: N D^2 multiplications,
    O(D^2) memory. components: K; where None the smallest that explains more than `variance` of the variance.

    ValueError for fewer than two rows, rows that are all alike, or more components than they span.
    """
    check_number("fit_pca", "variance", variance, 0, 1)
    if len(rows) < 2:
        raise ValueError(f"{rows.name}: a PCA needs at least 2 rows, got {len(rows)}")
    device = torch.device(device)
    count, mean = 0, torch.zeros(rows.dim, dtype=torch.float64, device=device)
    scatter = torch.zeros(rows.dim, rows.dim, dtype=torch.float64, device=device)
    for block in rows.blocks():
        x = block.to(device).double()
        here, n = x.mean(0), len(x)
        x -= here
        scatter.addmm_(x.T, x)
        # two sets of rows as one (Chan, Golub, LeVeque 1979): what lies between their means comes on top
        between, total = here - mean, count + n
        scatter.addr_(between, between, alpha=count * n / total)
        mean += between * (n / total)
        count = total
    values, vectors = torch.linalg.eigh(scatter / (count - 1))
    spectrum = values.flip(0).clamp_min(0).cpu()
    if not spectrum[0] > 0:
        raise ValueError(f"{rows.name}: all {count} rows are alike, there is no variance to explain")
    basis = vectors.T.flip(0)
    # a direction and its opposite are equally good: the largest coordinate is positive, whatever the library gave
    sign = basis.gather(1, basis.abs().argmax(1, keepdim=True)).sign()
    pca = PCA(mean.cpu(), (basis * sign).contiguous().cpu(), spectrum, 1, count, rows.name)
    return pca.with_components(pca.components_for(variance) if components is None else components)
