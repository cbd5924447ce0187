# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""EncodingRun: a source's images as a cache of latents, by any number of processes, stopped and resumed at any point.

    source ── shard k: images k S .. (k + 1) S - 1 ── batches ── worker processes read and decode (data/reader.py)
                └── the images and their mirror images in one forward ── the shard's tensors, allocated once
                       └── out/latents_rank00_shard{k:03d}.safetensors, written under another name and renamed

    out/cache.json         what a latent depends on, whether the cache is complete, and at the end what it cost
    out/latents_stats.pt   each channel's mean and standard deviation over `latents`, at the end
    out/unreadable.jsonl   index, name and reason of what could not be read, where there was such a thing

A shard: `latents` (n, L, C), `latents_flip` those of the mirrored images, `labels` int64 (n,) where the source has
some, `indices` int64 (n,), each row's place in the source. That is LightningDiT's layout, and its loader reads it.

Process r of W makes the shards k with k mod W = r that have no file yet. On a CPU with the native library the encoder
is prepared so that no row's bits depend on another's: neither the batch, nor the number of processes, nor a kill
changes a byte of a shard. A folder of another cache is refused. Memory is flat: one shard, and what is read ahead.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import maetok_fast
from maetok_fast.checks import check_number, check_positive
from maetok_fast.data.caches import CacheError
from maetok_fast.data.caches.lightningdit import RECORD
from maetok_fast.data.caches.shards import (
    SHARD,
    ChannelMoments,
    Header,
    read_header,
    shard_name,
    write_shard,
    write_statistics,
)
from maetok_fast.data.decode import resolve
from maetok_fast.data.loader import SHOWN
from maetok_fast.data.reader import Raw, Reader, Request, to_range
from maetok_fast.data.samples import Source
from maetok_fast.data.stream import Stream
from maetok_fast.data.views import View
from maetok_fast.inference import prepare
from maetok_fast.kernels import _native
from maetok_fast.models import MAETok
from maetok_fast.pipeline.pipeline import latent_shape, weights_fingerprint
from maetok_fast.pipeline.run import RunError, _short, make_folder, written
from maetok_fast.precision import AUTO, Precision

__all__ = ["CROPS", "DTYPES", "EncodingRun"]

FORMAT = 1  # of cache.json
CROPS = ("center", "adm")
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


class EncodingRun:
    """The latents of the first `limit` images of a source (None: of all) in the folder `out`.

    tokenizer: MAETok, on the device that encodes; it is prepared here. precision: as `prepare`'s; "auto" of it and of
    decoder is what the cache in `out` has that is gone on with, and else what is fastest.
    size: of the images in pixels; None: what the tokenizer was trained at. crop: "center" (EXIF orientation, the
    largest centred square, bicubic) or "adm" (as REPA and RAE prepare ImageNet). decoder: "auto", "pil" or
    "torchvision".
    dtype: what latents are stored in, "fp32", "fp16" or "bf16". flips: whether mirrored images are encoded too.
    shard: images of a file. batch: images at a time. workers: processes that read and decode; 0: this one does.
    max_unreadable: the share of the images that may be unreadable; they are left out.
    process, processes: which of how many this one is.
    ValueError or TypeError where one of them cannot be.
    """

    def __init__(
        self,
        out: str | Path,
        tokenizer: MAETok,
        source: Source,
        *,
        precision: str | torch.dtype | Precision = "auto",
        size: int | None = None,
        crop: str = "center",
        decoder: str = "auto",
        dtype: str = "fp32",
        flips: bool = True,
        shard: int = SHARD,
        limit: int | None = None,
        batch: int = 8,
        workers: int = 2,
        max_unreadable: float = 0.01,
        process: int = 0,
        processes: int = 1,
    ) -> None:
        check_positive("EncodingRun", shard=shard, batch=batch, processes=processes)
        check_number("EncodingRun", "workers", workers, 0)
        check_number("EncodingRun", "max_unreadable", max_unreadable, 0, 1 + 1e-9)
        if not isinstance(tokenizer, MAETok):
            raise TypeError(f"EncodingRun: tokenizer must be a MAETok, got {type(tokenizer).__name__}")
        for name, value, known in (("crop", crop, CROPS), ("dtype", dtype, tuple(DTYPES))):
            if value not in known:
                raise ValueError(f"EncodingRun: unknown {name} {value!r}; expected one of {', '.join(known)}")
        self.out, self.source, self.shard, self.batch = Path(out), source, shard, batch
        self.workers, self.max_unreadable = workers, max_unreadable
        self.process, self.processes = process, processes
        self.size, self.crop, self.flips = _size(tokenizer, size), crop, flips
        before = _told(self.out / RECORD)
        # the fastest precision is measured, and may be another one when a run goes on
        precision = before.get("precision", precision) if precision == AUTO else precision
        decoder = before.get("decoder", decoder) if decoder == "auto" else decoder
        self.decoder = "pil" if crop == "adm" else resolve(decoder)
        self.dtype, self.samples = DTYPES[dtype], len(source) if limit is None else min(limit, len(source))
        check_positive("EncodingRun", limit=self.samples)
        self.device = next(tokenizer.parameters()).device
        alike = self.device.type == "cpu" and _native.why_missing() is None
        self.encoder = prepare(tokenizer, precision, reproducible=alike)
        self.precision = self.encoder.precision
        self.fingerprint: dict[str, Any] = {
            "tokenizer": weights_fingerprint(tokenizer),
            "precision": self.precision.name,
            "resolution": self.size,
            "crop": crop,
            "decoder": self.decoder,
            "dtype": dtype,
            "flips": flips,
            "data": source.fingerprint(),
            "device": self.device.type,
        }

    # ---- the folder

    @property
    def record(self) -> Path:
        return self.out / RECORD

    @property
    def statistics(self) -> Path:
        return self.out / "latents_stats.pt"

    @property
    def unreadable(self) -> Path:
        return self.out / "unreadable.jsonl"

    @property
    def shards(self) -> range:
        return range(-(-self.samples // self.shard))

    def path(self, number: int) -> Path:
        return self.out / shard_name(number)

    def rows(self, number: int) -> range:
        """The places in the source of a shard's images."""
        return range(number * self.shard, min((number + 1) * self.shard, self.samples))

    @cached_property
    def asked(self) -> dict[str, Any]:
        """What the cache's files depend on."""
        return {"samples": self.samples, "shard": self.shard, **self.fingerprint}

    def begin(self) -> None:
        """Makes the folder, or checks that what lies there is of this cache and whole. RunError names what differs,
        CacheError a shard that is damaged. No process may `make` before process 0 has begun."""
        make_folder(self.out)
        there = [k for k in self.shards if self.path(k).exists()]
        latents = {path.name for path in self.out.glob("latents_rank*.safetensors")}
        foreign = sorted(latents - {shard_name(k) for k in self.shards})
        if self.record.exists():
            found = self._recorded()
            self._compare(found["asked"], self.record)
            if foreign:
                raise RunError(f"{self.out} holds files of another cache, first {foreign[0]}; remove them")
            for k in there:
                self._header(k)
            current = not found["complete"] or len(there) == len(self.shards)  # else a damaged one was removed
        elif latents:
            raise RunError(f"{self.out} holds latents but no cache.json, so nobody knows of what; give another --out")
        else:
            current = False
        if self.process == 0:  # alone: what another one is writing would look as if a killed one had left it
            for left in self.out.glob(".writing-*"):
                left.unlink(missing_ok=True)
            if not current:
                self._keep()

    def _compare(self, before: dict[str, Any], where: Path) -> None:
        differs = [
            f"{key}: {_short(before.get(key))} there, {_short(self.asked.get(key))} asked for"
            for key in sorted(before.keys() | self.asked.keys())
            if before.get(key) != self.asked.get(key)
        ]
        if differs:
            raise RunError(f"{where} is of another cache ({'; '.join(differs)}); give another --out, or remove it")

    def _recorded(self) -> dict[str, Any]:
        try:
            found = json.loads(self.record.read_text())
            if found["format"] != FORMAT:
                raise ValueError(f"format {found['format']!r}, this version knows {FORMAT}")
            asked = {"samples": found["samples"], "shard": found["shard"], **found["fingerprint"]}
            return {"asked": asked, "complete": bool(found["complete"])}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise RunError(
                f"{self.record}: is not the record of a latent cache ({error}); give another --out"
            ) from None

    def _keep(self, images: int = 0, cost: dict[str, Any] | None = None, complete: bool = False) -> None:
        found: dict[str, Any] = {"format": FORMAT, "complete": complete, "samples": self.samples, "images": images}
        found |= {"shard": self.shard, "fingerprint": self.fingerprint}
        found |= {"versions": {"maetok_fast": maetok_fast.__version__, "torch": torch.__version__}, "cost": cost}
        self._write(self.record, lambda path: path.write_text(json.dumps(found, indent=1) + "\n"))

    def _write(self, path: Path, write: Callable[[Path], Any]) -> None:
        try:
            written(path, write)
        except OSError as error:
            raise RunError(f"{path}: cannot be written ({error.strerror or error}); make room and run again") from error

    def _header(self, number: int) -> Header:
        path = self.path(number)
        try:
            found = read_header(path)
            before = json.loads(found.about["fingerprint"])
            json.loads(found.about["unreadable"])
        except (CacheError, KeyError, ValueError) as error:
            raise CacheError(f"{path} is damaged: delete this file and run again ({error})") from None
        self._compare(before, path)
        return found

    # ---- making it

    def missing(self, everybody: bool = False) -> list[int]:
        """The shards of this process, or of everybody, that have no file yet."""
        mine = self.shards if everybody else self.shards[self.process :: self.processes]
        return [k for k in mine if not self.path(k).exists()]

    def images_in(self, shards: list[int]) -> int:
        return sum(len(self.rows(k)) for k in shards)

    def make(self, done: Callable[[int], None] = lambda count: None) -> dict[str, Any]:
        """Encodes what is missing; `done(n)` after each n images. Returns what this process's part cost. RunError where
        more than max_unreadable cannot be read, or latents are not finite, WorkerError where a worker has ended."""
        todo, began = self.missing(), time.perf_counter()
        if todo and not self.record.exists():  # process 0 is late
            self._keep()
        refused: list[dict[str, Any]] = []
        shape = latent_shape(self.encoder.config, (self.size, self.size))
        shard = _Shard(max((len(self.rows(k)) for k in todo), default=0), shape, self.dtype, self.flips)
        with self._images(todo) as images:
            for k in todo:
                shard.clear()
                for _ in range(0, len(self.rows(k)), self.batch):
                    raw = next(images)
                    pixels, indices = self._readable(raw, shard.refused)
                    if indices:
                        shard.add(self._encoded(pixels, indices), indices)
                    self._check_unreadable(refused + shard.refused)
                    done(len(raw.request.places))
                refused += shard.refused
                self._write(self.path(k), partial(self._write_shard, shard))
        spent = time.perf_counter() - began
        return {"images": self.images_in(todo), "seconds": spent, "seconds_waiting": images.waited}

    def _images(self, shards: list[int]) -> _Images:
        reader = Reader(self.source, View(self.size, self.crop, flip=0.0), 0, self.decoder, captions=False)
        asked: dict[str, Any] = {"step": 0, "workers": self.workers, "device": self.device, "start": None}
        return _Images(reader, lambda step: self._requests(shards), **asked)

    def _requests(self, shards: list[int]) -> Iterator[Request]:
        for k in shards:
            rows = self.rows(k)
            for first in range(rows.start, rows.stop, self.batch):
                places = range(first, min(first + self.batch, rows.stop))
                yield Request(k, self.size, tuple((0, i) for i in places))

    def _readable(self, raw: Raw, refused: list[dict[str, Any]]) -> tuple[Tensor, list[int]]:
        """(pixels (n, 3, S, S) uint8, places in the source) of what could be read; the rest into `refused`."""
        asked = [i for _, i in raw.request.places]
        named = {self.source.name(i): i for i in asked}
        refused += [{"index": named[name], "name": name, "reason": why} for name, why in raw.failures.items()]
        if raw.pixels is None:
            return torch.empty(0), []
        # the reader shows another sample in the place of one that it cannot read
        kept = [place for place, (wanted, shown) in enumerate(zip(asked, raw.indices)) if wanted == shown]
        pixels = raw.pixels if len(kept) == len(asked) else raw.pixels[kept]
        return pixels, [asked[place] for place in kept]

    def _encoded(self, pixels: Tensor, indices: list[int]) -> Tensor:
        """Latents (n, L, C), or (2n, L, C) with those of the mirrored images behind, as they are stored."""
        if self.flips:
            pixels = torch.cat([pixels, pixels.flip(3)])
        images = to_range(pixels.to(self.device, non_blocking=True), torch.float32)
        latents = self.encoder.encode(images).to(self.dtype)
        finite = latents.isfinite().flatten(1).all(1)
        if not finite.all():
            bad = indices[int((~finite).nonzero()[0]) % len(indices)]
            raise RunError(
                f"the latents of {self.source.name(bad)} are not finite in {self.fingerprint['dtype']}, encoded in "
                f"{self.precision.name}; take --dtype fp32 and --precision fp32, and look at the tokenizer's weights"
            )
        return latents

    def _write_shard(self, shard: _Shard, path: Path) -> None:
        tensors = shard.tensors()
        if self.source.labelled:
            tensors["labels"] = torch.tensor([self.source.label(i) for i in shard.indices], dtype=torch.int64)
        about = {"fingerprint": json.dumps(self.asked, sort_keys=True), "unreadable": json.dumps(shard.refused)}
        write_shard(path, tensors, about)

    def _check_unreadable(self, refused: list[dict[str, Any]], more: str = "") -> None:
        allowed = math.ceil(self.max_unreadable * self.samples)
        if len(refused) > allowed:
            shown = "; ".join(f"{one['name']}: {one['reason']}" for one in refused[:SHOWN])
            raise RunError(
                f"{len(refused)} images cannot be read, more than --max-unreadable {self.max_unreadable:g} of "
                f"{self.samples} allows ({allowed}): {shown}{more}"
            )

    # ---- the end

    def finish(self, cost: dict[str, Any]) -> dict[str, Any]:
        """Once every shard is there: statistics, unreadable.jsonl, and the record. cost: "images" and "seconds" of all
        processes in this start. Returns {"images": rows of the cache, "unreadable": images that are not in it}."""
        lacking = self.missing(everybody=True)
        if lacking:
            raise RunError(f"{self.out}: {len(lacking)} of {len(self.shards)} shards are missing; run it again")
        headers = [self._header(k) for k in self.shards]
        refused = [one for header in headers for one in json.loads(header.about["unreadable"])]
        if refused:
            lines = "".join(json.dumps(one) + "\n" for one in refused)
            self._write(self.unreadable, lambda path: path.write_text(lines))
        else:
            self.unreadable.unlink(missing_ok=True)
        self._check_unreadable(refused, f"; all: {self.unreadable}")
        moments = ChannelMoments.together(header.moments for header in headers)
        images = sum(header.shapes["latents"][0] for header in headers)
        if not images:
            raise RunError(f"{self.source.path}: none of its {self.samples} images can be read; see {self.unreadable}")
        dims = len(headers[0].shapes["latents"])
        self._write(self.statistics, lambda path: write_statistics(path, moments, dims))
        if cost["images"] or not self._recorded()["complete"]:
            rate = cost["images"] / cost["seconds"] if cost["images"] else None
            self._keep(images, cost | {"images_per_second": rate, "processes": self.processes}, complete=True)
        return {"images": images, "unreadable": len(refused)}


class _Images(Stream[Raw]):
    """The answers to a run's requests, in order, until there are no more."""

    reads = "images"

    def _next(self) -> Raw:
        raw: Raw = self._answer()
        return raw


class _Shard:
    """One shard's tensors, for at most `rows` rows of latents of `shape`, used for one shard after another."""

    def __init__(self, rows: int, shape: tuple[int, int], dtype: torch.dtype, flips: bool) -> None:
        names = ("latents", "latents_flip") if flips else ("latents",)
        self._held = {name: torch.empty(rows, *shape, dtype=dtype) for name in names}
        self.clear()

    def clear(self) -> None:
        self.indices: list[int] = []
        self.refused: list[dict[str, Any]] = []

    def add(self, latents: Tensor, indices: list[int]) -> None:
        """latents: of the images, and behind them those of the mirrored ones where there are some."""
        here = slice(len(self.indices), len(self.indices) + len(indices))
        for held, part in zip(self._held.values(), latents.split(len(indices))):
            held[here] = part
        self.indices += indices

    def tensors(self) -> dict[str, Tensor]:
        whole = {name: held[: len(self.indices)] for name, held in self._held.items()}
        return {**whole, "indices": torch.tensor(self.indices, dtype=torch.int64)}


def _told(record: Path) -> dict[str, str]:
    """What an earlier start has resolved; empty where there was none, or it cannot be read, which `begin` says."""
    try:
        found = json.loads(record.read_text())["fingerprint"]
        return {name: found[name] for name in ("precision", "decoder") if isinstance(found[name], str)}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _size(tokenizer: MAETok, size: int | None) -> int:
    height, width = tokenizer.config.size
    patch = tokenizer.config.patch
    if size is None and height != width:
        raise ValueError(
            f"the tokenizer was trained at {height} x {width}, and images are read as squares; give --size"
        )
    size = height if size is None else size
    if size < 1 or size % patch:
        raise ValueError(f"--size must be a multiple of the tokenizer's patch, {patch}, got {size}")
    return size
