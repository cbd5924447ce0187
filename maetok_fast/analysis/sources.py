# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""What a name stands for: latents for training and held-out ones, their labels, their images, and the tokenizer.

    Entry ── a cache ───────────────────────────────┐
          └─ a MAETok ── EncodingRun of --data ─────┴─> Subject: train, held (Side), shape (L, C), tokenizer

    Side: rows of one cache    flat(some) (n, L C)    latents(some) (n, L, C)    images(some) (n, 3, S, S)

Which rows: a seeded permutation of the images, of it the first `limit`. Without held-out images its last 20 % are held
out. A cache of all images and a tokenizer that encodes a sample of them therefore show the same ones. A 2-D latent
(C, h, w) is h w tokens of C channels. Of caches of moments rows are drawn once, from (seed, place).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from maetok_fast.analysis.rows import CacheRows
from maetok_fast.analysis.settings import Entry, Settings
from maetok_fast.data.caches import LatentCache, find_cache, open_cache
from maetok_fast.data.images import load_image
from maetok_fast.data.samples import Source
from maetok_fast.data.sources import open_source
from maetok_fast.models import CheckpointError, MAETok
from maetok_fast.pipeline import EncodingRun, RunError
from maetok_fast.pipeline.pipeline import latent_shape, weights_fingerprint

__all__ = ["Side", "Subject", "check_pairs", "open_subject", "split"]

HELD_OUT = 0.2  # of the rows, where nobody gives others
LOOKED_AT = 64  # rows whose values tell a cache from another one
MOST_BYTES = 2**31  # of latents in memory at a time
Tick = Callable[[str], None]


class Part(Source):
    """Some samples of a source, in its order."""

    def __init__(self, whole: Source, places: np.ndarray) -> None:
        self.whole, self.at = whole, places
        some = places.tolist()
        sizes = whole._sizes[places].tolist()
        labels = [whole.label(i) for i in some]
        super().__init__(whole.path, (whole.name(i) for i in some), sizes, labels, whole.classes)

    def read(self, i: int) -> bytes:
        return self.whole.read(int(self.at[i]))

    def _caption(self, i: int) -> bytes | None:
        return None


@dataclass
class Side:
    """Rows of one cache: training rows, or held-out ones. rows: CacheRows, of them in ascending order. labels: int64
    (N,) or None. shape: (L, C). source: the images, and at: int64 (N,), each row's place in it; else why there are
    none. crop, size: how images are read."""

    rows: CacheRows
    labels: np.ndarray | None
    shape: tuple[int, int]
    source: Source | None = None
    at: np.ndarray | None = None
    why: str = "no images were given (--data)"
    crop: str = "center"
    size: int = 256

    def __len__(self) -> int:
        return len(self.rows)

    def flat(self, some: np.ndarray | None = None) -> np.ndarray:
        """Rows (n, D) fp32 as the cache has them; some: their places among these, None: all."""
        places = np.arange(len(self)) if some is None else some
        out = np.empty((len(places), self.rows.dim), dtype=np.float32)
        for start in range(0, len(places), 4096):
            out[start : start + 4096] = self.rows.take(places[start : start + 4096]).numpy()
        return out

    def latents(self, some: np.ndarray | None = None) -> np.ndarray:
        """(n, L, C) fp32."""
        flat = self.flat(some)
        tokens, channels = self.shape
        if len(self.rows.cache.shape) == 3:
            return np.ascontiguousarray(flat.reshape(-1, channels, tokens).transpose(0, 2, 1))
        return flat.reshape(-1, tokens, channels)

    def some(self, count: int, seed: int = 0) -> np.ndarray:
        """Places of at most so many rows, a seeded sample, ascending; the same ones for sides of one length."""
        if count >= len(self):
            return np.arange(len(self))
        return np.sort(np.random.Generator(np.random.Philox(key=seed)).permutation(len(self))[:count])

    @property
    def fits(self) -> int:
        """Rows that may lie in memory at a time."""
        return max(1, MOST_BYTES // (4 * self.rows.dim))

    def images(self, some: np.ndarray) -> Tensor:
        """(n, 3, size, size) fp32 in [-1, 1]. RunError where there are none, ImageError naming one that is damaged."""
        if self.source is None or self.at is None:
            raise RunError(self.why)
        found = []
        for i in self.at[some].tolist():
            name = self.source.name(i)
            found.append(load_image(name, self.size, crop=self.crop, content=self.source.read(i)))
        return torch.stack(found)

    @cached_property
    def digest(self) -> str:
        """16 hexadecimal digits of which rows these are, their labels, and some of their values."""
        cache = self.rows.cache
        told = json.dumps([cache.format, cache.kind, cache.shape, len(cache), cache.fingerprint], sort_keys=True)
        found = hashlib.sha256(told.encode())
        found.update(self.rows.places.astype("<i8").tobytes())
        found.update(b"" if self.labels is None else self.labels.astype("<i8").tobytes())
        found.update(self.flat(np.linspace(0, len(self) - 1, min(LOOKED_AT, len(self))).astype(np.int64)).tobytes())
        return found.hexdigest()[:16]


@dataclass
class Subject:
    """One of the tokenizers that are compared. shape: (L, C) of a latent. tokenizer: None where only a cache was given.
    told: what it is, JSON values, for the report."""

    name: str
    train: Side
    held: Side
    shape: tuple[int, int]
    grid: tuple[int, int] | None = None
    tokenizer: MAETok | None = None
    classes: tuple[str, ...] = ()
    told: dict[str, Any] = field(default_factory=dict)

    @property
    def labelled(self) -> bool:
        return self.train.labels is not None and self.held.labels is not None

    @cached_property
    def digest(self) -> str:
        """Of its rows: results of one digest and the same settings are the same."""
        return f"{self.train.digest}-{self.held.digest}"

    @cached_property
    def weights(self) -> str:
        """Of the tokenizer; "" where there is none."""
        return "" if self.tokenizer is None else weights_fingerprint(self.tokenizer)


def split(count: int, limit: int | None, seed: int, held_out: bool = True) -> tuple[np.ndarray, np.ndarray]:
    """(training places, held-out places) in 0 .. count - 1, ascending, as the module says; without held_out all are for
    training. RunError where one of them would be empty."""
    order = np.random.Generator(np.random.Philox(key=seed)).permutation(count)[:limit]
    held = round(HELD_OUT * len(order)) if held_out else 0
    if len(order) < 2 or (held_out and not held):
        raise RunError(f"{len(order)} rows are too few to be looked at; give more images, or a larger --limit")
    return np.sort(order[: len(order) - held]), np.sort(order[len(order) - held :])


def open_subject(entry: Entry, settings: Settings, out: Path, tick: Tick = lambda line: None) -> Subject:
    """The entry's rows, encoded into out/caches first where its path is a tokenizer. RunError, CacheError,
    CheckpointError or DataError naming what cannot be used."""
    data, test = (None if path is None else open_source(path) for path in (settings.data, settings.test))
    path = Path(entry.path).expanduser()
    is_cache = find_cache(path) is not None
    given = entry.tokenizer if is_cache else entry.path
    try:
        tokenizer = None if given is None else MAETok.from_pretrained(str(given), device=settings.device).eval()
    except CheckpointError as error:
        if is_cache:
            raise
        raise RunError(f"{entry.name}: {path} is no latent cache of a known layout and no MAETok ({error})") from error
    encoder = _Encoder(entry.name, tokenizer, settings, out, tick)
    shared = entry.held_out is None and test is None
    if is_cache:
        cache = open_cache(path)
        _check_made_by(entry, cache, tokenizer)
        train, held = split(len(cache), settings.limit, settings.seed, shared)
        first = _side(cache, train, data, settings)
        if shared:
            second = _side(cache, held, data, settings)
        elif entry.held_out is not None:
            second = _held_out(entry.held_out, test, settings)
        elif tokenizer is None:
            raise RunError(
                f"{entry.name}: --test are images and {path} is a cache: give their cache, --held-out "
                f"{entry.name}=CACHE, or the tokenizer that is to encode them, --tokenizer {entry.name}=PATH"
            )
        else:
            assert test is not None
            second = encoder.side(test, "-test", split(len(test), settings.limit, settings.seed, False)[0], cache)
    else:
        if data is None:
            raise RunError(f"{entry.name}: {entry.path} is a tokenizer; give --data, the images that it is to encode")
        train, held = split(len(data), settings.limit, settings.seed, shared)
        if shared:
            first, second = encoder.sides(data, train, held)
        else:
            first = encoder.side(data, "", train)
            if entry.held_out is not None:
                second = _held_out(entry.held_out, test, settings)
            else:
                assert test is not None
                second = encoder.side(test, "-test", split(len(test), settings.limit, settings.seed, False)[0])
    if first.shape != second.shape or first.rows.cache.kind != second.rows.cache.kind:
        raise RunError(
            f"{entry.name}: training latents are {first.rows.cache}, held-out ones {second.rows.cache}; give two "
            "caches that one tokenizer made"
        )
    shape = first.rows.cache.shape
    told = {
        "path": str(entry.path), "latent": list(shape), "kind": first.rows.cache.kind,
        "train": len(first), "held_out": len(second), "of": len(first.rows.cache),
        "held_out_from": _whence(entry, settings), "labels": first.labels is not None and second.labels is not None,
        "made_by": first.rows.cache.fingerprint, "tokenizer": None if given is None else str(given),
    }  # fmt: skip
    classes = next((s.classes for s in (data, test) if s is not None and s.classes), ())
    grid = (int(shape[1]), int(shape[2])) if len(shape) == 3 else None
    return Subject(entry.name, first, second, first.shape, grid, tokenizer, tuple(classes), told)


def _whence(entry: Entry, settings: Settings) -> str:
    if entry.held_out is not None:
        return str(entry.held_out)
    if settings.test is not None:
        return settings.test
    return f"{HELD_OUT:.0%} of the rows, by a permutation of seed {settings.seed}"


@dataclass
class _Encoder:
    """Caches of an entry's tokenizer in out/caches, made where they are missing."""

    name: str
    tokenizer: MAETok | None
    settings: Settings
    out: Path
    tick: Tick

    def sides(self, source: Source, train: np.ndarray, held: np.ndarray) -> tuple[Side, Side]:
        """Of one cache of both."""
        cache, at, part = self._made(source, "", np.sort(np.concatenate([train, held])))
        return self._of(cache, at, part, train), self._of(cache, at, part, held)

    def side(self, source: Source, suffix: str, places: np.ndarray, like: LatentCache | None = None) -> Side:
        cache, at, part = self._made(source, suffix, places, {} if like is None else like.fingerprint or {})
        return self._of(cache, at, part, places)

    def _of(self, cache: LatentCache, at: np.ndarray, source: Source, wanted: np.ndarray) -> Side:
        return _side(cache, np.flatnonzero(np.isin(at, wanted)), source, self.settings)

    def _made(
        self, source: Source, suffix: str, places: np.ndarray, like: dict[str, Any] | None = None
    ) -> tuple[LatentCache, np.ndarray, Source]:
        """(cache, each row's place in the source, the images in the cache's order)."""
        assert self.tokenizer is not None
        folder, told = self.out / "caches" / f"{self.name}{suffix}", like or {}
        part: Source = source if len(places) == len(source) else Part(source, places)
        settings = self.settings
        run = EncodingRun(
            folder, self.tokenizer, part, precision=settings.precision, size=told.get("resolution"),
            crop=told.get("crop", "center"), flips=False, batch=settings.batch, workers=settings.workers,
        )  # fmt: skip
        run.begin()
        total, done = run.images_in(run.missing()), 0

        def count(more: int) -> None:
            nonlocal done
            before, done = done, done + more
            if before * 10 // max(total, 1) != done * 10 // max(total, 1):
                self.tick(f"{folder.name}: {done:,} of {total:,} images encoded")

        run.finish(run.make(count))
        cache = open_cache(folder)
        assert cache.places is not None
        return cache, places[cache.places], part


def _side(cache: LatentCache, rows: np.ndarray, source: Source | None, settings: Settings) -> Side:
    """Rows of a cache, with the source's images where each one's is known."""
    shape = cache.shape
    tokens, channels = shape if len(shape) == 2 else (shape[1] * shape[2], shape[0])
    told = cache.fingerprint or {}
    labels = None if cache.labels is None else cache.labels[rows]
    seed = settings.seed if cache.kind.startswith("mean") else None
    side = Side(CacheRows(cache, rows, seed), labels, (int(tokens), int(channels)), crop=told.get("crop", "center"))
    side.size = int(told.get("resolution", side.size))
    if source is None:
        return side
    if told.get("data") not in (None, source.fingerprint()):
        raise RunError(f"{cache.path} was made of other images than {source.path}; give those that it was made of")
    places = cache.places
    if places is None and len(cache) == len(source):
        places = np.arange(len(source))
    if places is None or (len(places) and places.max() >= len(source)):
        side.why = f"{cache.path} does not say which image of {source.path} each of its {len(cache)} rows is of"
        return side
    at = places[rows]
    if labels is not None and source.labelled and any(source.label(int(i)) != y for i, y in zip(at, labels)):
        raise RunError(f"{cache.path} and {source.path} have different labels for the same images; give the images "
                       "that it was made of")  # fmt: skip
    side.source, side.at, side.why = source, at, ""
    return side


def _held_out(path: str | Path, test: Source | None, settings: Settings) -> Side:
    cache = open_cache(path)
    return _side(cache, split(len(cache), settings.limit, settings.seed, False)[0], test, settings)


def _check_made_by(entry: Entry, cache: LatentCache, tokenizer: MAETok | None) -> None:
    if tokenizer is None:
        return
    told = cache.fingerprint or {}
    if told.get("tokenizer") not in (None, weights_fingerprint(tokenizer)):
        raise RunError(f"{entry.name}: {entry.tokenizer} is not the tokenizer that made {cache.path}; give that one")
    size = told.get("resolution")
    expected = latent_shape(tokenizer.config, None if size is None else (size, size))
    if expected != cache.shape:
        raise RunError(
            f"{entry.name}: latents of shape {cache.shape} in {cache.path}, {entry.tokenizer} decodes {expected}"
        )


def check_pairs(subjects: list[Subject]) -> None:
    """RunError unless row i is of the same image for all of them: as many rows, the same labels in the same order, and
    the same images where caches tell them."""
    first = subjects[0]
    for other in subjects[1:]:
        for what, a, b in (("training", first.train, other.train), ("held-out", first.held, other.held)):
            problem = None
            if len(a) != len(b):
                problem = f"{len(a)} and {len(b)} rows"
            elif (a.labels is None) != (b.labels is None):
                problem = "only one of them has labels"
            elif a.labels is not None and b.labels is not None and not np.array_equal(a.labels, b.labels):
                problem = "other labels, or another order"
            elif _other_images(a.rows.cache, b.rows.cache):
                problem = "they were made of other images"
            if problem is not None:
                raise RunError(
                    f"{first.name} and {other.name}: their {what} rows do not pair up ({problem}); give caches of the "
                    "same images in the same order, or --unpaired where that is meant"
                )


def _other_images(a: LatentCache, b: LatentCache) -> bool:
    """Whether two caches say so; one of a sample of the other's images has another fingerprint, and says nothing."""
    told = [(cache.fingerprint or {}).get("data") for cache in (a, b)]
    return len(a) == len(b) and None not in told and told[0] != told[1]
