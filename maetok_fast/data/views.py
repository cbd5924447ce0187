# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""Which part of a picture a training sample shows, and every random number of the data pipeline.

    (seed, epoch, sample) -> rng_of -> View.window(width, height) -> Window: a rectangle of whole pixels, and a flip

Random numbers come from a counter (numpy's Philox), addressed by what they are for: no state is carried from one sample
to the next, so that worker processes, ranks, decoders and resumed runs all draw the same window for the same sample.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import numpy as np

from maetok_fast.checks import check_positive

__all__ = ["CROPS", "View", "Window", "rng_of"]

CROPS = ("random", "resized", "center", "adm")
TRIES = 10  # of a window of "resized" that fits the picture

# what a stream of random numbers is for: streams of different purposes never meet
SAMPLE, ORDER, SIZE, CAPTION, NOISE = range(5)


def rng_of(seed: int, epoch: int, index: int, purpose: int = SAMPLE) -> np.random.Generator:
    """The random numbers of one sample in one epoch. All of them whole numbers in [0, 2^64)."""
    numbers = (seed, epoch, index)
    if any(isinstance(v, bool) or not isinstance(v, (int, np.integer)) or not 0 <= v < 2**64 for v in numbers):
        raise ValueError(f"expected seed, epoch and index to be whole numbers in [0, 2^64), got {numbers}")
    # the first word of the counter runs while numbers are drawn
    counter = np.array([0, 0, purpose, index], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(counter=counter, key=np.array([seed, epoch], dtype=np.uint64)))


@dataclass(frozen=True)
class Window:
    """A rectangle of the picture as it is seen (EXIF orientation applied), in whole pixels; flip: mirrored after it."""

    left: int
    top: int
    width: int
    height: int
    flip: bool


@dataclass(frozen=True)
class View:
    """How a picture becomes a square of `size` pixels.

    crop    "random": a square whose side is a share U[low, high] of the shorter side, at a uniform place (MAETok's,
            after ADM's random_crop_arr with .8 and 1); "resized": a share U[low, high] of the area, its aspect ratio
            log-uniform in `ratio`, 10 tries, then the largest centred one (RandomResizedCrop); "center": the largest
            centred square; "adm": evaluation's `load_image(crop="adm")`, without EXIF orientation and window
    flip    the probability of a mirrored picture
    """

    size: int
    crop: str = "random"
    low: float = 0.8
    high: float = 1.0
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = 0.5

    def __post_init__(self) -> None:
        check_positive("View", size=self.size)
        if self.crop not in CROPS:
            raise ValueError(f"View: unknown crop {self.crop!r}; expected one of {', '.join(CROPS)}")
        if not 0 < self.low <= self.high <= 1:
            raise ValueError(f"View: expected 0 < low <= high <= 1, got low {self.low} and high {self.high}")
        if len(self.ratio) != 2 or not 0 < self.ratio[0] <= self.ratio[1] < math.inf:
            raise ValueError(f"View: expected ratio to be two aspect ratios, the smaller first, got {self.ratio}")
        if not 0 <= self.flip <= 1:
            raise ValueError(f"View: expected flip to be a probability in [0, 1], got {self.flip}")

    def with_size(self, size: int) -> View:
        return dataclasses.replace(self, size=size)

    def window(self, width: int, height: int, rng: np.random.Generator) -> Window:
        """The part that a picture of this size shows, inside it and never empty; the same rng state, the same part."""
        check_positive("View.window", width=width, height=height)
        flip = bool(rng.random() < self.flip)
        short = min(width, height)
        if self.crop == "random":
            side = min(short, max(1, round(short * rng.uniform(self.low, self.high))))
            return Window(*_placed(width, height, side, side, rng), flip)
        if self.crop == "resized":
            return Window(*self._resized(width, height, rng), flip)
        if self.crop == "center":
            return Window(*_centred(width, height, short, short), flip)
        return Window(0, 0, width, height, flip)

    def _resized(self, width: int, height: int, rng: np.random.Generator) -> tuple[int, int, int, int]:
        narrow, wide = self.ratio
        for _ in range(TRIES):
            area = width * height * rng.uniform(self.low, self.high)
            ratio = math.exp(rng.uniform(math.log(narrow), math.log(wide)))
            across, down = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if 0 < across <= width and 0 < down <= height:
                return _placed(width, height, across, down, rng)
        across = min(width, max(1, round(height * wide)))
        down = min(height, max(1, round(width / narrow)))
        return _centred(width, height, across, down)


def _placed(width: int, height: int, across: int, down: int, rng: np.random.Generator) -> tuple[int, int, int, int]:
    left, top = rng.integers(0, [width - across, height - down], endpoint=True).tolist()
    return left, top, across, down


def _centred(width: int, height: int, across: int, down: int) -> tuple[int, int, int, int]:
    return (width - across) // 2, (height - down) // 2, across, down
