# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""Latents as points in a plane: UMAP where umap-learn is there, else their first two principal components.

    x (N, D) ── standardised ── UMAP, cosine, 15 neighbours, 0.1 apart, seeded (one thread) ──> (N, 2)

A picture shows which rows are near each other and proves nothing: distances between groups, their sizes and densities
mean nothing in UMAP. Numbers are in neighbours.py.
"""

from __future__ import annotations

import warnings
from typing import NamedTuple

import numpy as np

from maetok_fast._optional import probe as find
from maetok_fast.analysis.probe import standardise

__all__ = ["Projection", "project"]

NEIGHBOURS, APART = 15, 0.1
METHODS = ("auto", "umap", "pca")


class Projection(NamedTuple):
    """points (N, 2) fp32. method: "umap" or "pca". why: a sentence where UMAP was wanted and is not there, else "".
    version: of umap-learn."""

    points: np.ndarray
    method: str
    why: str = ""
    version: str = ""


def project(x: np.ndarray, seed: int = 0, method: str = "auto") -> Projection:
    """Rows (N, ...) fp32, flattened, as the module says. method: "auto" takes UMAP where it can be imported.
    ValueError for fewer than 3 rows, ImportError where "umap" is asked for and is not there."""
    if method not in METHODS:
        raise ValueError(f"unknown method {method!r}: expected one of {', '.join(METHODS)}")
    if len(x) < 3:
        raise ValueError(f"project: expected at least 3 rows, got {len(x)}")
    (rows,) = standardise(x.reshape(len(x), -1))
    if method != "pca":
        status = find("umap")
        if status.state != "found":
            why = f"umap-learn is {status.state} ({status.reason})"
            if method == "umap":
                raise ImportError(f"UMAP cannot be had: {why}")
            return Projection(_principal(rows), "pca", why)
        import umap

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that a seed means one thread
            model = umap.UMAP(
                n_neighbors=min(NEIGHBOURS, len(rows) - 1), min_dist=APART, metric="cosine", random_state=seed, n_jobs=1
            )
            points = model.fit_transform(rows)
        return Projection(np.asarray(points, dtype=np.float32), "umap", version=status.version)
    return Projection(_principal(rows), "pca")


def _principal(rows: np.ndarray) -> np.ndarray:
    """The first two principal components; of each axis the larger end points to plus."""
    centred = rows.astype(np.float64) - rows.mean(0, dtype=np.float64)
    _, vectors = np.linalg.eigh(centred.T @ centred)
    points = centred @ vectors[:, :-3:-1]
    if points.shape[1] < 2:
        points = np.concatenate([points, np.zeros((len(points), 1))], axis=1)
    extreme = np.take_along_axis(points, np.abs(points).argmax(0)[None], 0)
    return (points * np.where(extreme < 0, -1, 1)).astype(np.float32)
