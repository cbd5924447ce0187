# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""Moments: count, mean and covariance of rows of features in fp64, of blocks merged, saved as ADM's evaluator has them.

    Moments.of(rows)            rows (N, D); Moments.of_blocks: of blocks of them, one in memory at a time
    a.merge(b)                  as if of all rows at once (Chan, Golub, LeVeque 1979)
    save, load                  .npz: mu (D,), sigma (D, D); mu_s, sigma_s of spatial features; `about`, our JSON

sigma divides by N - 1, as numpy.cov. ADM's own files hold no count: it is None then, and such moments merge with none.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property, reduce
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from maetok_fast.data.adm import AdmError, AdmFile
from maetok_fast.pipeline.run import make_folder, written

__all__ = ["Moments", "above_rounding", "load_about", "save_statistics"]

_ABOUT = "about"  # the member that says of what the numbers are; ADM's evaluator does not look at it


@dataclass(frozen=True)
class Moments:
    """count: rows, None where unknown. mean (D,), covariance (D, D): fp64. One row has a covariance of zeros."""

    count: int | None
    mean: np.ndarray
    covariance: np.ndarray

    def __post_init__(self) -> None:
        size = len(self.mean)
        if self.mean.shape != (size,) or self.covariance.shape != (size, size):
            raise ValueError(f"mean {self.mean.shape} and covariance {self.covariance.shape} do not fit together")
        if not (np.isfinite(self.mean).all() and np.isfinite(self.covariance).all()):
            raise ValueError("the mean or covariance holds values that are not finite")

    @classmethod
    def of(cls, rows: np.ndarray | Tensor) -> Moments:
        """Of (N, D), N >= 1, of any real dtype."""
        values = rows.detach().cpu() if isinstance(rows, Tensor) else torch.from_numpy(np.ascontiguousarray(rows))
        if values.ndim != 2 or 0 in values.shape:
            raise ValueError(f"expected rows (N, D) of features, at least one, got {tuple(values.shape)}")
        values = values.to(torch.float64)
        mean = values.mean(0)
        centred = values - mean
        covariance = centred.T @ centred / max(1, len(values) - 1)
        return cls(len(values), mean.numpy(), covariance.numpy())

    @classmethod
    def of_blocks(cls, blocks: Iterable[np.ndarray | Tensor]) -> Moments:
        """Of the rows of all blocks (n, D), merged in their order."""
        return reduce(cls.merge, map(cls.of, blocks))

    def merge(self, other: Moments) -> Moments:
        """Of the rows of both."""
        if self.count is None or other.count is None:
            raise ValueError("moments whose count is unknown (ADM's stored statistics) cannot be merged")
        if self.mean.shape != other.mean.shape:
            raise ValueError(f"moments of {len(self.mean)} and {len(other.mean)} dimensions cannot be merged")
        count = self.count + other.count
        apart = other.mean - self.mean
        scatter = (
            (self.count - 1) * self.covariance
            + (other.count - 1) * other.covariance
            + (self.count * other.count / count) * np.outer(apart, apart)
        )
        return Moments(count, self.mean + apart * (other.count / count), scatter / max(1, count - 1))

    @property
    def size(self) -> int:
        return len(self.mean)

    @cached_property
    def factor(self) -> Tensor:
        """F (D, rank) with F F' = the covariance."""
        symmetric = torch.from_numpy((self.covariance + self.covariance.T) / 2)
        values, vectors = torch.linalg.eigh(symmetric)
        kept = above_rounding(values)
        return vectors[:, kept] * values[kept].sqrt()

    def save(self, path: str | Path, spatial: Moments | None = None, about: Mapping[str, Any] | None = None) -> None:
        """An .npz as ADM's evaluator and ours read it."""
        found = {"mu": self, **({} if spatial is None else {"mu_s": spatial})}
        save_statistics(path, found, {**(about or {}), "count": self.count})

    @classmethod
    def load(cls, path: str | Path | AdmFile, name: str = "mu") -> Moments:
        """name: "mu", "mu_s" (sFID), or "mu/NAME" (another extractor's). AdmError where the file has none such."""
        file = path if isinstance(path, AdmFile) else AdmFile(path)
        sigma = name.replace("mu", "sigma", 1)
        if not {name, sigma} <= set(file.names):
            raise AdmError(f"{file.path}: has no {name} and {sigma}; it holds {', '.join(file.names)}")
        mean, covariance = (file.array(key).astype(np.float64) for key in (name, sigma))
        if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)):
            raise AdmError(f"{file.path}: {name} {mean.shape}, {sigma} {covariance.shape} are no mean and covariance")
        return cls(load_about(file).get("count"), mean, covariance)


def above_rounding(values: Tensor) -> Tensor:
    """Which eigenvalues of a positive semidefinite matrix are more than what rounding leaves of zeros."""
    if not values.numel():
        return values.bool()
    return values > values.abs().max() * len(values) * torch.finfo(torch.float64).eps


def save_statistics(path: str | Path, found: Mapping[str, Moments], about: Mapping[str, Any]) -> None:
    """An .npz of moments by the names of their means ("mu", "mu_s", "mu/NAME") with JSON that says of what they are."""
    arrays: dict[str, Any] = {_ABOUT: np.frombuffer(json.dumps(about, sort_keys=True).encode(), np.uint8)}
    for name, moments in found.items():
        arrays[name], arrays[name.replace("mu", "sigma", 1)] = moments.mean, moments.covariance

    def write(to: Path) -> None:
        with open(to, "wb") as file:
            np.savez(file, **arrays)

    make_folder(Path(path).parent)
    written(Path(path), write)


def load_about(file: AdmFile) -> dict[str, Any]:
    """What `save_statistics` said; empty of files of others."""
    if _ABOUT not in file.names:
        return {}
    try:
        found = json.loads(file.array(_ABOUT).tobytes())
        return found if isinstance(found, dict) else {}
    except ValueError:
        return {}
