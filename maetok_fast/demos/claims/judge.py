# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""What samples and reconstructions are judged by: made once of real images, the same for all variants and seeds.

    classifier   demos/classifier.py, of real training images; its pooled features (96) are one space for the Frechet
                 distance, and it says whether a sample is what was asked for
    pixels       the 64 first principal components of real training images: a second space, which no labels made
    reference    moments of the real test images in both, and how far as many real training images are from them: what a
                 perfect generator would have

No Inception and no DINOv2: their weights cannot be had everywhere, and they were made for photographs.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from maetok_fast.analysis import ArrayRows, fit_pca
from maetok_fast.data.sources import open_source
from maetok_fast.demos.classifier import Classifier, read_all, train_classifier
from maetok_fast.evaluation import Moments, frechet_distance
from maetok_fast.pipeline.run import make_folder, written

__all__ = ["SPACES", "Judge"]

SPACES = ("classifier", "pixels")
COMPONENTS = 64
TOGETHER = 500


@dataclass
class Judge:
    """classifier; pixels: (mean (D,), basis (64, D)); reference: the moments of test images, by space; floor: the
    distance of real training images to them, by space and number of images."""

    classifier: Classifier
    pixels: tuple[Tensor, Tensor]
    reference: dict[str, Moments]
    floor: dict[str, dict[str, float]]
    accuracy: float

    @classmethod
    def make(
        cls,
        folder: Path,
        data: str,
        test: str,
        classes: int,
        size: int,
        counts: tuple[int, ...],
        limit: int | None = None,
        done: Callable[[int], None] = lambda n: None,
    ) -> Judge:
        """Of the training images of `data` and the test images of `test` (the first `limit` of each; None: all);
        written into `folder`. counts: numbers of samples that floors are wanted for."""
        sources = open_source(data), open_source(test)
        (images, labels), (tested, truth) = (
            read_all(s, size, min(len(s), limit or len(s)), workers=2 if limit is None else 0, done=done)
            for s in sources
        )
        judge = train_classifier(images, labels, classes, epochs=2, seed=0, done=done)
        some = _grey(images[:10_000])
        pca = fit_pca(ArrayRows(some.numpy()), components=min(COMPONENTS, len(some) - 1))
        basis = pca.basis[: pca.components].float()
        found = cls(judge, (pca.mean.float(), basis), {}, {space: {} for space in SPACES}, 0.0)
        found.accuracy = float((judge.predict(tested) == truth).double().mean())
        found.reference = found.moments(tested)
        for count in sorted(set(counts)):
            # the last ones of the training set: the classifier saw them, as it saw all others
            real = images[-min(count, len(images)) :]
            for space, value in found.distances(real).items():
                found.floor[space][str(count)] = value
        make_folder(folder)
        judge.save(folder / "classifier.safetensors")
        written(folder / "judge.npz", found._write)
        return found

    @classmethod
    def load(cls, folder: Path) -> Judge:
        """Of `make`."""
        with np.load(folder / "judge.npz") as file:
            reference = {s: Moments(int(file["count"]), file[f"mu_{s}"], file[f"sigma_{s}"]) for s in SPACES}
            pixels = torch.from_numpy(file["mean"]), torch.from_numpy(file["basis"])
            about = json.loads(str(file["about"]))
        return cls(
            Classifier.load(folder / "classifier.safetensors"), pixels, reference, about["floor"], about["accuracy"]
        )

    def _write(self, path: Path) -> None:
        arrays: dict[str, Any] = {"mean": self.pixels[0].numpy(), "basis": self.pixels[1].numpy()}
        for space, moments in self.reference.items():
            arrays |= {f"mu_{space}": moments.mean, f"sigma_{space}": moments.covariance, "count": moments.count}
        about = json.dumps({"floor": self.floor, "accuracy": self.accuracy})
        with path.open("wb") as file:
            np.savez(file, about=about, **arrays)

    @torch.no_grad()
    def features(self, space: str, images: Tensor) -> Tensor:
        """images (N, 3, S, S) uint8 -> (N, D) fp32."""
        if space == "pixels":
            mean, basis = self.pixels
            return (_grey(images) - mean) @ basis.T
        self.classifier.eval()
        return torch.cat([self.classifier.features(part) for part in images.split(TOGETHER)])

    def moments(self, images: Tensor) -> dict[str, Moments]:
        """Of images (N, 3, S, S) uint8, in each space."""
        return {space: Moments.of(self.features(space, images)) for space in SPACES}

    def distances(self, images: Tensor, reference: dict[str, Moments] | None = None) -> dict[str, float]:
        """The Frechet distance of images (N, 3, S, S) uint8 to a reference, None: to the real test images, in each
        space."""
        other, own = self.reference if reference is None else reference, self.moments(images)
        return {space: frechet_distance(own[space], other[space]) for space in SPACES}

    def recognised(self, images: Tensor, labels: Tensor) -> float:
        """The share of images that the classifier takes for what they should be."""
        return float((self.classifier.predict(images) == labels).double().mean())


def _grey(images: Tensor) -> Tensor:
    """(N, 3, S, S) uint8 -> (N, S * S) fp32 in [0, 1]."""
    return images.float().mean(1).flatten(1) / 255
