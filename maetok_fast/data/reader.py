# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""What a worker process of the loader does: a request (which samples, how large) to a batch on the CPU.

    Request(step, size, places)  ->  Reader[request]  ->  Raw: pixels, or for DALI the files' bytes and windows

A sample that cannot be read is replaced by the next readable one of the same batch, in a circle, and named in
`failures`: a request is answered alike by whichever worker gets it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from maetok_fast.data import dali
from maetok_fast.data.decode import decode, is_jpeg, read_header, render, resized
from maetok_fast.data.images import ImageError
from maetok_fast.data.samples import DataError, Source
from maetok_fast.data.views import CAPTION, View, Window, rng_of

__all__ = ["Raw", "Reader", "Request", "fill", "render_packed", "to_range"]


@dataclass(frozen=True)
class Request:
    """places: (epoch, sample) of each place of the batch. size: of the pictures, in pixels."""

    step: int
    size: int
    places: tuple[tuple[int, int], ...]


@dataclass
class Raw:
    """A batch as a worker hands it over. pixels: (B, 3, size, size) uint8; what is left to DALI is not in it, but in
    `packed`, all files' bytes one after another, with each one's end, window and place. failures: name -> reason.
    error: why there is no batch."""

    request: Request
    indices: list[int]
    pixels: Tensor | None = None
    labels: Tensor | None = None
    captions: list[str] | None = None
    failures: dict[str, str] = field(default_factory=dict)
    error: str | None = None
    packed: Tensor | None = None
    ends: list[int] = field(default_factory=list)
    windows: list[Window] = field(default_factory=list)
    waiting: list[int] = field(default_factory=list)

    def pin_memory(self) -> Raw:  # torch's DataLoader calls it
        pinned = {n: v.pin_memory() for n in ("pixels", "labels") if (v := getattr(self, n)) is not None}
        return replace(self, **pinned)

    def contents(self) -> list[np.ndarray]:
        assert self.packed is not None
        return np.split(self.packed.numpy(), self.ends[:-1])


class Reader(Dataset):
    """request -> Raw. decoder: "pil", "torchvision" or "dali". captions: whether they are read; drop_captions: the
    probability that a caption is left empty."""

    def __init__(
        self, source: Source, view: View, seed: int, decoder: str, captions: bool = True, drop_captions: float = 0.0
    ) -> None:
        self.source, self.view, self.seed, self.decoder = source, view, seed, decoder
        self.captions, self.drop_captions = captions and source.captioned, drop_captions

    def __getitem__(self, request: Request) -> Raw:
        view = self.view.with_size(request.size)
        read: list[Tensor | tuple[bytes, Window] | None] = []
        failures: dict[str, str] = {}
        for epoch, index in request.places:
            try:
                read.append(self._sample(view, epoch, index))
            except ImageError as error:
                read.append(None)
                failures[self.source.name(index)] = str(error)
        indices = [index for _, index in request.places]
        raw = Raw(request, indices, failures=failures)
        try:
            taken = fill([sample is not None for sample in read])
            raw.indices = [indices[i] for i in taken]
            if self.source.labelled:
                raw.labels = torch.tensor([self.source.label(i) for i in raw.indices], dtype=torch.int64)
            if self.captions:
                raw.captions = [self._caption(*request.places[i]) for i in taken]
        except DataError as error:
            raw.error = str(error)
            return raw
        self._put(raw, [read[i] for i in taken])
        return raw

    def _sample(self, view: View, epoch: int, index: int) -> Tensor | tuple[bytes, Window]:
        content, name = self.source.read(index), self.source.name(index)
        rng = rng_of(self.seed, epoch, index)
        if self.decoder != "dali":
            return render(content, name, view, rng, self.decoder)
        if is_jpeg(content):
            header = read_header(content, name)
            if dali.why_not(header, view) is None:
                return content, view.window(header.width, header.height, rng)
        return render(content, name, view, rng, "pil")

    def _caption(self, epoch: int, index: int) -> str:
        dropped = rng_of(self.seed, epoch, index, CAPTION).random() < self.drop_captions
        return "" if dropped else self.source.caption(index) or ""

    @staticmethod
    def _put(raw: Raw, samples: Sequence[Any]) -> None:
        size = raw.request.size
        raw.pixels = torch.empty(len(samples), 3, size, size, dtype=torch.uint8)
        contents = []
        for place, sample in enumerate(samples):
            if isinstance(sample, Tensor):
                raw.pixels[place] = sample
                continue
            content, window = sample
            contents.append(content)
            raw.windows.append(window)
            raw.waiting.append(place)
        if contents:
            raw.packed = torch.frombuffer(bytearray(b"".join(contents)), dtype=torch.uint8)
            raw.ends = np.cumsum([len(content) for content in contents]).tolist()


def fill(readable: Sequence[bool]) -> list[int]:
    """For each place the place that is shown there: itself, or the next readable one in a circle. DataError: none."""
    if not any(readable):
        raise DataError(f"none of the {len(readable)} samples of a batch can be read")
    count = len(readable)
    return [next(j % count for j in range(i, i + count) if readable[j % count]) for i in range(count)]


def render_packed(raw: Raw, names: Sequence[str]) -> None:
    """Puts what was left to DALI into `raw.pixels` without it, and what cannot be read into its failures.

    names: of the samples at raw.waiting. DataError where nothing of the batch can be read.
    """
    assert raw.pixels is not None
    readable = [True] * len(raw.indices)
    for place, name, content, window in zip(raw.waiting, names, raw.contents(), raw.windows):
        try:
            pixels = decode(content.tobytes(), name, "pil")
            raw.pixels[place] = resized(pixels, window, raw.request.size)
        except ImageError as error:
            readable[place] = False
            raw.failures[name] = str(error)
    taken = fill(readable)
    raw.pixels = raw.pixels[taken]
    raw.indices = [raw.indices[i] for i in taken]
    raw.labels = None if raw.labels is None else raw.labels[taken]
    raw.captions = None if raw.captions is None else [raw.captions[i] for i in taken]
    raw.waiting, raw.windows, raw.ends, raw.packed = [], [], [], None


def to_range(pixels: Tensor, dtype: torch.dtype) -> Tensor:
    """uint8 pixels as they are, or as [-1, 1] in a floating-point dtype, channels_last."""
    if dtype == torch.uint8:
        return pixels
    return pixels.to(torch.float32, memory_format=torch.channels_last).div_(127.5).sub_(1).to(dtype)
