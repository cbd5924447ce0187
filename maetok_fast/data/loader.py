# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""The endless batches of a training run.

    Order (order.py) ── Request(step, size, places) ──> worker processes (reader.py) ── Raw ──> device: Batch
                                                                  decoder="dali": bytes ── dali.py ──┘

A batch is a function of (source, view, seed, step, rank, world, sizes) alone: neither the number of workers nor where
the run was started changes it, so that a checkpoint needs the step only. With decoder="dali" samples and windows are
the same and the pixels DALI's.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from maetok_fast.checks import check_number, check_positive
from maetok_fast.data.dali import Dali
from maetok_fast.data.decode import resolve
from maetok_fast.data.images import ImageError, load_image
from maetok_fast.data.order import Order, batch_positions
from maetok_fast.data.reader import Raw, Reader, Request, render_packed, to_range
from maetok_fast.data.samples import DataError, Source
from maetok_fast.data.stream import PREFETCH, Stream, WorkerError, places_from
from maetok_fast.data.views import SIZE, View, rng_of

__all__ = ["PREFETCH", "Batch", "Batches", "WorkerError", "validation_batches"]

SHOWN = 3  # unreadable samples that a message names


class Batch(NamedTuple):
    """images: (B, 3, S, S) uint8 contiguous, or what `dtype` of `Batches` says, on the device. labels: (B,) int64 there
    too, None where the source has none. captions: None where it has none, "" where a sample has none or it was dropped.
    indices: the samples shown. epoch: of the batch's first sample. step: this batch's."""

    images: Tensor
    labels: Tensor | None
    captions: tuple[str, ...] | None
    indices: tuple[int, ...]
    epoch: int
    step: int


def _requests(order: Order, batch: int, rank: int, world: int, sizes: tuple[int, ...], step: int) -> Iterator[Request]:
    """The endless requests from a step on."""
    for number, places in places_from(order, batch, rank, world, step):
        drawn = 0
        if len(sizes) > 1:
            drawn = int(rng_of(order.seed, 0, number, SIZE).integers(len(sizes)))
        yield Request(number, sizes[drawn], places)


class Batches(Stream[Batch]):
    """An endless iterator of `Batch`; close it, or leave its `with`, to end the worker processes.

    batch       samples a step of this rank; rank, world: of the distributed run
    step        where to start; `batches.step` is the next one, which a checkpoint keeps
    sizes       several resolutions, one drawn for each step, the same on all ranks; empty: the view's
    workers     processes that read and decode; 0: this process does
    decoder     "auto", "torchvision", "pil" (equal samples) or "dali" (dali.py)
    dtype       uint8, or a floating-point one for images in [-1, 1], channels_last
    max_unreadable  the share of this rank's samples that may be unreadable before DataError. Each is named in
                `unreadable` (name -> reason), once in `log`, a file of JSON lines, and replaced by another of its batch
    captions    read where the source has them; drop_captions: the probability that one is left empty
    unreadable  of a checkpoint's state()
    start       how processes start: "fork", "spawn", "forkserver"; None: torch's choice

    next() raises DataError where too much or a whole batch cannot be read, or a caption is broken, WorkerError where a
    worker process has ended. `waited`: seconds spent in next() so far.
    """

    reads = "images"

    def __init__(
        self,
        source: Source,
        view: View,
        batch: int,
        *,
        seed: int,
        rank: int = 0,
        world: int = 1,
        step: int = 0,
        shuffle: bool = True,
        sizes: Sequence[int] = (),
        workers: int = 2,
        decoder: str = "auto",
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.uint8,
        max_unreadable: float = 0.01,
        log: str | Path | None = None,
        captions: bool = True,
        drop_captions: float = 0.0,
        unreadable: Mapping[str, str] | None = None,
        start: str | None = None,
        dali_threads: int = 2,
    ) -> None:
        check_positive("Batches", batch=batch, world=world, **{f"sizes[{i}]": size for i, size in enumerate(sizes)})
        check_number("Batches", "max_unreadable", max_unreadable, 0, 1 + 1e-9)
        check_number("Batches", "drop_captions", drop_captions, 0, 1 + 1e-9)
        if dtype != torch.uint8 and not dtype.is_floating_point:
            raise ValueError(f"Batches: expected dtype uint8 or a floating-point one, got {dtype}")
        batch_positions(step, batch, rank, world)  # its checks
        device = torch.device(device)
        dali = Dali(batch, device, dali_threads, dtype) if decoder == "dali" else None
        # here and not in the workers: forked ones have the libraries then
        decoder = decoder if decoder == "dali" else resolve(decoder)
        reader = Reader(source, view, seed, decoder, captions, drop_captions)
        order = Order(len(source), seed, shuffle)
        requests = functools.partial(_requests, order, batch, rank, world, tuple(sizes) or (view.size,))
        super().__init__(reader, requests, step=step, workers=workers, device=device, start=start)
        self.source, self.dtype = source, dtype
        self.max_unreadable, self.log = max_unreadable, None if log is None else Path(log)
        self.unreadable.update(unreadable or {})
        self._allowed = math.ceil(max_unreadable * len(source) / world)
        self._dali = dali
        self._ahead: Raw | None = None
        if self.log is not None:
            self.log.parent.mkdir(parents=True, exist_ok=True)

    def _next(self) -> Batch:
        return self._batch(self._answer(), None) if self._dali is None else self._batch(*self._dali_next(self._dali))

    def close(self) -> None:
        self._ahead = None
        if self._dali is not None:
            self._dali.discard()
        super().close()

    def _dali_next(self, engine: Dali) -> tuple[Raw, Tensor | None]:
        """The batch in work, and the next one put to work."""
        raw = self._ahead if self._ahead is not None else self._submitted(engine)
        images = None
        if raw.waiting:
            try:
                images = engine.collect()
            except RuntimeError:  # a damaged file, and DALI's message has no name for it
                try:
                    render_packed(raw, [self.source.name(raw.indices[place]) for place in raw.waiting])
                except DataError as error:
                    raw.error = str(error)
        self._ahead = None
        self._ahead = self._submitted(engine)
        return raw, images

    def _submitted(self, engine: Dali) -> Raw:
        raw: Raw = self._answer()
        if raw.waiting:
            engine.submit(raw.contents(), raw.windows, raw.request.size)
        return raw

    def _batch(self, raw: Raw, images: Tensor | None) -> Batch:
        self._note(raw)
        if raw.error is not None:
            raise DataError(f"step {raw.request.step}: {raw.error}{self._named()}")
        assert raw.pixels is not None
        if images is None or len(raw.waiting) < len(raw.indices):
            whole = to_range(raw.pixels.to(self.device, non_blocking=True), self.dtype)
            if images is not None:
                whole[torch.tensor(raw.waiting, device=self.device)] = images
            images = whole
        labels = None if raw.labels is None else raw.labels.to(self.device, non_blocking=True)
        captions = None if raw.captions is None else tuple(raw.captions)
        self.step = raw.request.step + 1
        return Batch(images, labels, captions, tuple(raw.indices), raw.request.places[0][0], raw.request.step)

    def _note(self, raw: Raw) -> None:
        fresh = {name: reason for name, reason in raw.failures.items() if name not in self.unreadable}
        self.unreadable.update(fresh)
        if fresh and self.log is not None:
            with open(self.log, "a", encoding="ascii") as file:
                for name, reason in fresh.items():
                    file.write(json.dumps({"step": raw.request.step, "name": name, "reason": reason}) + "\n")
        if len(self.unreadable) > self._allowed:
            raise DataError(
                f"{len(self.unreadable)} samples cannot be read, more than max_unreadable {self.max_unreadable:g} "
                f"allows ({self._allowed}){self._named()}"
            )

    def _named(self) -> str:
        shown = [f"{name}: {reason}" for name, reason in list(self.unreadable.items())[:SHOWN]]
        return f"; {'; '.join(shown)}" if shown else ""


def validation_batches(
    source: Source,
    size: int,
    crop: str = "center",
    batch: int = 64,
    limit: int | None = None,
    *,
    rank: int = 0,
    world: int = 1,
    device: torch.device | str = "cpu",
    passed_over: Callable[[str, str], None] | None = None,
) -> Iterator[Batch]:
    """The first `limit` samples once, in order, as evaluation reads them: `load_image`, fp32 in [-1, 1]; the last batch
    is smaller. Ranks take every world-th sample. ImageError at the first one that cannot be read; with `passed_over`,
    which is told its name and why, the batch has one less, and is left out where it would have none."""
    check_positive("validation_batches", batch=batch, world=world)
    count = len(source) if limit is None else min(limit, len(source))
    mine = range(rank, count, world)
    load = functools.partial(load_image, resolution=size, crop=crop)
    for step, first in enumerate(range(0, len(mine), batch)):
        found: dict[int, Tensor] = {}
        for i in mine[first : first + batch]:
            try:
                found[i] = load(source.name(i), content=source.read(i))
            except ImageError as error:
                if passed_over is None:
                    raise
                passed_over(source.name(i), str(error))
        if not found:
            continue
        indices, images = tuple(found), torch.stack(list(found.values()))
        labels = torch.tensor([source.label(i) for i in indices]) if source.labelled else None
        captions = tuple(source.caption(i) or "" for i in indices) if source.captioned else None
        yield Batch(images.to(device), None if labels is None else labels.to(device), captions, indices, 0, step)
