# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""GMM: a fitted Gaussian mixture, what it says of rows, and its file.

    p(x) = sum_k w_k N(x; m_k, S_k),   sum_k w_k = 1
    score = the mean of log p over rows, nats a row        nll_per_dimension = -score / D

The weights sum to one, so that p is a density and its likelihoods can be compared between numbers of modes.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from maetok_fast.analysis.densities import DiagonalDensities, FullDensities, Parameters, densities_of
from maetok_fast.analysis.em import covariances_of, factor, softened
from maetok_fast.analysis.rows import Rows
from maetok_fast.models.checkpoints.files import read_weights
from maetok_fast.models.checkpoints.layout import CheckpointError
from maetok_fast.pipeline.run import written

__all__ = ["DTYPES", "GMM"]

DTYPES = {"fp32": torch.float32, "fp64": torch.float64}
BYTES = 2**24  # of a block, and of the densities of a block


@dataclass(frozen=True)
class GMM:
    """weights (K,), means (K, D), precisions_cholesky (K, D, D) or (K, D) for diagonal covariances, fp64 on the CPU: P
    upper triangular with P P^T the inverse covariance, as scikit-learn has it.

    converged: whether the last pass changed the lower bound by less than the tolerance. iterations: passes over the
    rows. history: the lower bound, nats a row, of the parameters before each pass. emptied: modes of weight 0, and why
    so says `em.py`. seed: of the start that was kept. device, precision: where passes run, "fp32" or "fp64".
    """

    weights: Tensor
    means: Tensor
    precisions_cholesky: Tensor
    converged: bool = False
    iterations: int = 0
    history: tuple[float, ...] = ()
    seed: int = 0
    precision: str = "fp32"
    device: torch.device | str = "cpu"

    @classmethod
    def of(cls, weights: Tensor, means: Tensor, covariances: Tensor, **others: object) -> GMM:
        """Of covariances (K, D, D), or variances (K, D); weights are divided by their sum. ValueError where a
        covariance is not positive definite."""
        factors, sound = factor(torch.as_tensor(covariances, dtype=torch.float64))
        if not sound.all():
            bad = int((~sound).nonzero()[0])
            raise ValueError(f"GMM: the covariance of mode {bad} is not positive definite")
        weights, means = (torch.as_tensor(v, dtype=torch.float64) for v in (weights, means))
        return cls(weights / weights.sum(), means, factors, **others)  # type: ignore[arg-type]

    def __post_init__(self) -> None:
        for name in ("weights", "means", "precisions_cholesky"):
            object.__setattr__(self, name, torch.as_tensor(getattr(self, name)).detach().to("cpu", torch.float64))
        if self.precision not in DTYPES:
            raise ValueError(f"GMM: precision must be one of {', '.join(DTYPES)}, got {self.precision!r}")
        k, d = self.means.shape if self.means.ndim == 2 else (0, 0)
        shapes = tuple(self.weights.shape), tuple(self.precisions_cholesky.shape)
        if not k or shapes not in (((k,), (k, d, d)), ((k,), (k, d))):
            raise ValueError(
                "GMM: expected weights (K,), means (K, D), precisions_cholesky (K, D, D) or (K, D), got "
                f"{shapes[0]}, {tuple(self.means.shape)}, {shapes[1]}"
            )
        if not (self.weights >= 0).all() or abs(float(self.weights.sum()) - 1) > 1e-6:
            raise ValueError(f"GMM: weights must be >= 0 and sum to 1, they sum to {float(self.weights.sum()):g}")

    @property
    def modes(self) -> int:
        return len(self.weights)

    @property
    def dim(self) -> int:
        return int(self.means.shape[1])

    @property
    def covariance(self) -> str:
        """ "full" or "diag"."""
        return "full" if self.precisions_cholesky.ndim == 3 else "diag"

    @property
    def covariances(self) -> Tensor:
        """(K, D, D), or variances (K, D)."""
        return covariances_of(self.precisions_cholesky)

    @property
    def emptied(self) -> tuple[int, ...]:
        return tuple((self.weights == 0).nonzero()[:, 0].tolist())

    @property
    def lower_bound(self) -> float:
        """The last of `history`, nats a row; NaN for a mixture that was not fitted."""
        return self.history[-1] if self.history else math.nan

    # ---- what it says of rows

    def log_prob(self, x: Tensor) -> Tensor:
        """x (B, D) floating point -> log p(x) (B,) in nats, on x's device: computed in fp64 where x is."""
        return softened(self._logs(x))[1]

    def responsibilities(self, x: Tensor) -> Tensor:
        """x (B, D) -> (B, K), how probable each mode is given the row; sums to 1, 0 where it is negligible."""
        return softened(self._logs(x))[0].T

    def score(self, rows: Rows) -> float:
        """The mean log likelihood of rows, nats a row, summed in fp64."""
        if rows.dim != self.dim:
            raise ValueError(f"{rows.name}: has rows of {rows.dim}, the mixture is of {self.dim} dimensions")
        densities = self._densities(rows.dtype, DTYPES[self.precision], torch.device(self.device))
        total = 0.0
        for block in rows.blocks(block_size(self.dim, self.modes)):
            total += float(softened(densities.of(densities.centred(block)))[1].double().sum())
        return total / len(rows)

    def nll_per_dimension(self, rows: Rows) -> float:
        """-score / D, nats a dimension, of the rows as they are; `+ rows.log_scale / D` makes it that of the units
        before they were standardised."""
        return -self.score(rows) / self.dim

    def _logs(self, x: Tensor) -> Tensor:
        if not isinstance(x, Tensor) or not x.is_floating_point():
            raise TypeError(f"GMM: expected a floating point tensor x (B, {self.dim}), got {getattr(x, 'dtype', x)}")
        if x.ndim != 2 or x.shape[1] != self.dim:
            raise ValueError(f"GMM: expected x (B, {self.dim}), got {tuple(x.shape)}")
        x = x if x.dtype == torch.float64 else x.float()
        densities = self._densities(x.dtype, x.dtype, x.device)
        size = block_size(self.dim, self.modes)
        return torch.cat([densities.of(densities.centred(part)) for part in x.split(size)], dim=1)

    def _densities(
        self, rows_dtype: torch.dtype, dtype: torch.dtype, device: torch.device
    ) -> FullDensities | DiagonalDensities:
        return densities_of(self.parameters, rows_dtype, dtype, device)

    @property
    def parameters(self) -> Parameters:
        return Parameters(self.weights, self.means, self.precisions_cholesky)

    # ---- its file

    def save(self, path: str | Path) -> Path:
        """Writes a safetensors file, whole or not at all, and returns its path."""
        from safetensors.torch import save_file

        tensors = {n: getattr(self, n).contiguous() for n in ("weights", "means", "precisions_cholesky")}
        about = {n: getattr(self, n) for n in ("converged", "iterations", "history", "seed", "precision")}
        path = Path(path)
        written(path, partial(save_file, tensors, metadata={"gmm": json.dumps(about)}))
        return path

    @classmethod
    def load(cls, path: str | Path, device: torch.device | str = "cpu") -> GMM:
        """Of a file of `save`. CheckpointError naming it where it is none."""
        path = Path(path)
        if not path.is_file():
            raise CheckpointError(f"{path}: no such file of a Gaussian mixture")
        content, metadata = read_weights(path)
        try:
            about = json.loads(metadata["gmm"])
            return cls(**content, **about | {"history": tuple(about["history"])}, device=device)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(f"{path}: holds no Gaussian mixture ({error}); give a file of GMM.save") from None


def block_size(dim: int, modes: int) -> int:
    """Rows of a block: BYTES of fp32 rows, and as much of their densities."""
    return max(256, BYTES // (4 * max(dim, modes)))
