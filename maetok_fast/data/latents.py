# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""The endless batches of a generator's training out of a latent cache, whichever layout it has.

    Order ── (step, (epoch, place) of each sample) ──> worker processes: _Reader ── latents, labels ──> LatentBatch
                                                          ├── cache.read, of the mirror images where they are drawn
                                                          └── moments: mean + std eps

A batch is a function of (cache, seed, step, rank, world) alone: neither the number of workers nor where the run was
started changes it, and another number of ranks with the same global batch sees the same samples in the same order.

What is random is drawn as `Batches` draws it: the order, and first of a sample's own numbers whether it is mirrored. So
`Batches` of the images that the cache was made of, in its order, with the same seed and the same `flip`, shows the same
samples, mirrored alike. eps has a stream of its own: another one for each epoch and sample.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from maetok_fast.checks import check_number, check_positive
from maetok_fast.data.caches.cache import CacheError, LatentCache, drawn
from maetok_fast.data.order import Order, batch_positions
from maetok_fast.data.stream import Stream, places_from
from maetok_fast.data.views import NOISE, rng_of

__all__ = ["LatentBatch", "LatentBatches", "validation_latents"]


class LatentBatch(NamedTuple):
    """latents: (B, L, C) or (B, C, h, w) fp32 on the device, as the cache has them: not normalised. labels: (B,) int64
    there too, None where the cache has none. indices: their places in the cache. flipped: which are the mirror images'.
    epoch: of the batch's first sample. step: this batch's."""

    latents: Tensor
    labels: Tensor | None
    indices: tuple[int, ...]
    flipped: tuple[bool, ...]
    epoch: int
    step: int

    def to(self, device: torch.device) -> LatentBatch:
        labels = None if self.labels is None else self.labels.to(device, non_blocking=True)
        return self._replace(latents=self.latents.to(device, non_blocking=True), labels=labels)


@dataclass
class _Answer:
    """A batch on the CPU as a worker hands it over, or why there is none."""

    batch: LatentBatch | None = None
    error: str = ""

    def pin_memory(self) -> _Answer:  # torch's DataLoader calls it
        if self.batch is None:
            return self
        labels = None if self.batch.labels is None else self.batch.labels.pin_memory()
        return replace(self, batch=self.batch._replace(latents=self.batch.latents.pin_memory(), labels=labels))


class _Reader(Dataset):
    """(step, (epoch, place) of each sample) -> _Answer."""

    def __init__(self, cache: LatentCache, seed: int, flip: float) -> None:
        self.cache, self.seed, self.flip = cache, seed, flip if cache.flips else 0.0

    def __getitem__(self, request: tuple[int, tuple[tuple[int, int], ...]]) -> _Answer:
        try:
            return _Answer(self.read(*request))
        except CacheError as error:  # torch would put the worker's traceback into its message
            return _Answer(error=str(error))

    def read(self, step: int, places: tuple[tuple[int, int], ...]) -> LatentBatch:
        cache = self.cache
        which = np.array([index for _, index in places], dtype=np.int64)
        flipped = np.array([self._flipped(*place) for place in places])
        if flipped.any():
            items = torch.empty(len(which), *cache.item)
            for flip in (False, True):
                items[torch.from_numpy(flipped == flip)] = cache.read(which[flipped == flip], flip)
        else:
            items = cache.read(which)
        latents = self._drawn(items, places) if cache.kind.startswith("mean") else items
        labels = None if cache.labels is None else torch.from_numpy(cache.labels[which])
        return LatentBatch(latents, labels, tuple(which.tolist()), tuple(flipped.tolist()), places[0][0], step)

    def _flipped(self, epoch: int, index: int) -> bool:
        # View.window's first draw
        return self.flip > 0 and bool(rng_of(self.seed, epoch, index).random() < self.flip)

    def _drawn(self, items: Tensor, places: tuple[tuple[int, int], ...]) -> Tensor:
        cache = self.cache
        noise = np.empty((len(places), *cache.shape), dtype=np.float32)
        for row, (epoch, index) in zip(noise, places):
            rng_of(self.seed, epoch, index, NOISE).standard_normal(dtype=np.float32, out=row)
        latents = drawn(items, cache.kind, torch.from_numpy(noise))
        if not torch.stack(torch.aminmax(latents)).isfinite().all():
            bad = int((~latents.flatten(1).isfinite().all(1)).nonzero()[0])
            raise CacheError(f"{cache.path}: item {cache.names[places[bad][1]]} has a deviation beyond fp32's range")
        return latents


class LatentBatches(Stream[LatentBatch]):
    """An endless iterator of `LatentBatch`; close it, or leave its `with`, to end the worker processes.

    batch       samples a step of this rank; rank, world: of the distributed run
    step        where to start; `batches.step` is the next one, which a checkpoint keeps
    shuffle     another order in each epoch; False: the cache's
    flip        the probability of the mirror image's latent, where the cache has those; without them it has no effect
    workers     processes that read; 0: this process does
    start       how processes start: "fork", "spawn", "forkserver"; None: torch's choice

    next() raises CacheError where the cache cannot be read or holds no numbers, WorkerError where a worker process has
    ended. `waited`: seconds spent in next() so far. `unreadable` is empty: no latent is replaced by another.
    """

    reads = "latents"

    def __init__(
        self,
        cache: LatentCache,
        batch: int,
        *,
        seed: int,
        rank: int = 0,
        world: int = 1,
        step: int = 0,
        shuffle: bool = True,
        flip: float = 0.5,
        workers: int = 0,
        device: torch.device | str = "cpu",
        start: str | None = None,
    ) -> None:
        check_positive("LatentBatches", batch=batch, world=world)
        check_number("LatentBatches", "flip", flip, 0, 1 + 1e-9)
        batch_positions(step, batch, rank, world)  # its checks
        self.cache = cache
        requests = functools.partial(places_from, Order(len(cache), seed, shuffle), batch, rank, world)
        super().__init__(_Reader(cache, seed, flip), requests, step=step, workers=workers, device=device, start=start)

    def _next(self) -> LatentBatch:
        answer: _Answer = self._answer()
        if answer.batch is None:
            raise CacheError(f"step {self.step}: {answer.error}")
        self.step = answer.batch.step + 1
        return answer.batch.to(self.device)


def validation_latents(
    cache: LatentCache,
    count: int | None = None,
    batch: int = 64,
    *,
    rank: int = 0,
    world: int = 1,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> Iterator[LatentBatch]:
    """The first `count` items (None: all) once, in order, none mirrored, moments drawn from (seed, place) alone; the
    last batch is smaller. Ranks take every world-th item. CacheError where one cannot be read."""
    check_positive("validation_latents", batch=batch, world=world)
    mine = range(rank, len(cache) if count is None else min(count, len(cache)), world)
    reader = _Reader(cache, seed, 0.0)
    for step, first in enumerate(range(0, len(mine), batch)):
        yield reader.read(step, tuple((0, i) for i in mine[first : first + batch])).to(torch.device(device))
