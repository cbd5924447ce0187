# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""What a comparison of tokenizers is asked for: its entries and its settings.

Entry(name, path)  ── sources.py ──> Subject     a tokenizer with its rows, labels and images
Settings           ── latents.py ──> which parts, how many rows, which seeds
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from maetok_fast.analysis.gmm import COVARIANCES, MODES
from maetok_fast.checks import check_number, check_positive

__all__ = ["PARTS", "Entry", "Settings"]

PARTS = ("gmm", "probe", "umap", "neighbours", "traversal", "usage")


@dataclass(frozen=True)
class Entry:
    """name: in tables and pictures, and of files: letters, digits, "_", "-", ".". path: a latent cache, or a MAETok
    (folder, file, hub repository) that is to encode `Settings.data`. held_out: the cache of other images, on which is
    measured. tokenizer: the MAETok that made the cache, for pictures; of a tokenizer's own entry it is the path."""

    name: str
    path: str | Path
    held_out: str | Path | None = None
    tokenizer: str | Path | None = None

    def __post_init__(self) -> None:
        if not re.fullmatch(r"\w[\w.-]*", self.name):
            raise ValueError(f"the name {self.name!r} becomes a file's: letters, digits, '_', '-' and '.' only")


@dataclass(frozen=True)
class Settings:
    """modes: components of the mixtures. parts: of PARTS. limit: rows of a tokenizer at most, a seeded sample of all
    (None: all). seeds: how many; mixtures start, and probes draw their rows, from seeds 0 .. seeds - 1. seed: of the
    split, the samples and UMAP. components: K of the PCA for all tokenizers; None: the smallest with which each one
    explains more than `variance`. covariance: of the mixtures, "full" or "diag".

    data, test: sources of images (`open_source`); test: of the held-out rows. unpaired: whether tokenizers of different
    images may stand in one table. device: of mixtures, probes by SGD and decoding. precision, batch, workers: of
    encoding. images: that are decoded with tokens taken away. picture_rows: of the UMAP picture.
    ValueError or TypeError for what cannot be."""

    modes: tuple[int, ...] = MODES
    parts: tuple[str, ...] = PARTS
    limit: int | None = None
    seeds: int = 3
    seed: int = 0
    components: int | None = None
    variance: float = 0.9
    covariance: str = "full"
    data: str | None = None
    test: str | None = None
    unpaired: bool = False
    device: str = "cpu"
    precision: str = "auto"
    batch: int = 8
    workers: int = 2
    images: int = 16
    picture_rows: int = 3000

    def __post_init__(self) -> None:
        for name in self.parts:
            if name not in PARTS:
                raise ValueError(f"unknown part {name!r}: expected some of {', '.join(PARTS)}")
        if not self.parts or not self.modes:
            raise ValueError("give at least one part and one number of modes")
        check_positive("analyze", seeds=self.seeds, batch=self.batch, images=self.images, rows=self.picture_rows)
        check_positive("analyze", **{f"modes ({count})": count for count in self.modes})
        if self.limit is not None:
            check_positive("analyze", limit=self.limit)
        if self.components is not None:
            check_positive("analyze", components=self.components)
        check_number("analyze", "variance", self.variance, 0, 1, above=True)
        if self.covariance not in COVARIANCES:
            raise ValueError(f"unknown covariance {self.covariance!r}: expected one of {', '.join(COVARIANCES)}")
        if self.test is not None and self.data is None:
            raise ValueError("--test are the images of the held-out rows; give --data, those of the others, too")
