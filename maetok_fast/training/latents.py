# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""What a generator learns, from a batch of a cache or of images; and pictures of what it samples.

LatentBatch (data/latents.py) ─────────────┐
Batch of images ── prepared tokenizer ─────┴─ (latent - mean) / deviation ──> z
Paired: a cache's latents and, for a teacher, the images that they were made of
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from maetok_fast.data.latents import LatentBatch, LatentBatches
from maetok_fast.data.loader import Batches
from maetok_fast.data.reader import to_range
from maetok_fast.data.samples import DataError
from maetok_fast.pipeline.statistics import LatentStatistics

__all__ = ["Latents", "Paired", "PairedBatches"]


class Paired(NamedTuple):
    """Latents of a cache and their images (B, 3, H, W) uint8; the rest is the latents'."""

    latents: Tensor
    images: Tensor
    labels: Tensor | None
    indices: tuple[int, ...]


class Latents:
    """shape: of a latent, (L, C) or (C, h, w). statistics: of the latents that come in. tokenizer: a prepared MAETok,
    to encode images and to show samples; None: neither. validation: makes the batches of a validation, or None."""

    def __init__(
        self,
        shape: tuple[int, ...],
        statistics: LatentStatistics,
        tokenizer: Any = None,
        validation: Callable[[], Iterable[Any]] | None = None,
    ) -> None:
        statistics.check(shape)
        self.shape, self.statistics, self.tokenizer = shape, statistics, tokenizer
        self._validation = validation
        self.device = torch.device("cpu")

    @property
    def shows(self) -> bool:
        """Whether samples can be decoded."""
        return self.tokenizer is not None

    def to(self, device: torch.device) -> None:
        self.device = device

    @torch.no_grad()
    def of(self, batch: Any) -> Tensor:
        """z (B, *shape) fp32 on the device."""
        if isinstance(batch, (LatentBatch, Paired)):
            found = batch.latents.to(self.device)
        else:
            images = batch.images.to(self.device)  # bytes, or of a validation, which are in range
            images = to_range(images, torch.float32) if images.dtype == torch.uint8 else images
            found = self.tokenizer.encode(images)
        return self.statistics.normalise(found.float())

    def images(self, batch: Any) -> Tensor:
        """What a teacher sees: uint8 (B, 3, H, W)."""
        found: Tensor = batch.images.to(self.device)
        return found

    @torch.no_grad()
    def decode(self, z: Tensor) -> Tensor:
        """z (B, *shape) -> images (B, 3, H, W), about [-1, 1]."""
        found: Tensor = self.tokenizer.decode(self.statistics.denormalise(z))
        return found

    def validation(self) -> Iterable[Any] | None:
        return None if self._validation is None else self._validation()


class PairedBatches:
    """A cache's batches and those of its images, in step: both draw one order and the same mirror images from one seed.

    next() raises DataError where an image cannot be read, since its latent is there and another's would take its place.
    """

    def __init__(self, latents: LatentBatches, images: Batches) -> None:
        self.latents, self._images = latents, images

    @property
    def waited(self) -> float:
        return self.latents.waited + self._images.waited

    @property
    def unreadable(self) -> dict[str, str]:
        return self._images.unreadable

    def __iter__(self) -> Iterator[Paired]:
        return self

    def __next__(self) -> Paired:
        latents, images = next(self.latents), next(self._images)
        if tuple(latents.indices) != tuple(images.indices):
            named = next(iter(self.unreadable.items()), ("an image", "it was replaced by another"))
            raise DataError(
                f"data.path: {named[0]} is in the cache and cannot be read ({named[1]}); put it back, or make the "
                "cache again without it"
            )
        return Paired(latents.latents, images.images, latents.labels, tuple(latents.indices))

    def __enter__(self) -> PairedBatches:
        return self

    def __exit__(self, *error: Any) -> None:
        with contextlib.ExitStack() as stack:
            stack.callback(self._images.close)
            stack.callback(self.latents.close)
