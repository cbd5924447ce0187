# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""LightningDiT's layout: rows of safetensors shards. Its own extraction's, VTP's, SFD's, and ours.

    latents_rank{rr:02d}_shard{sss:03d}.safetensors: latents, latents_flip, labels; SFD adds latents_sv, latents_dino,
    `maetok-fast cache-latents` indices (each row's place in its source) and, beside the shards, cache.json

    image i ── Interleaved ── row of all shards one after another ── searchsorted ── (shard, row in it) ── its bytes

Ranks of a distributed sampler: image i is item i // W of rank i % W, and the sampler repeats the first images at the
end so that all ranks are of one length. `images=`, how many there really are, drops those; nothing in the files tells
them (each was sampled anew). What is kept is a few numbers a shard: opening reads headers, labels and indices.

Rows are read at their places in the files, by way of the kernel's page cache, which all processes share, and into the
batch alone. That is what a memory map does, but for its two costs: a process' memory that grows by all that it has
seen, and SIGBUS where a file is cut short (here a CacheError). The rows of a batch are asked for before the first of
them is waited for, in ascending order: a disk works on all of them, and reads nothing else.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from maetok_fast.data.caches.cache import CacheError, LatentCache

__all__ = ["SHARD_NAME", "Interleaved", "LightningDiTCache"]

SHARD_NAME = re.compile(r"latents_rank(\d+)_shard(\d+)\.safetensors")
FILES = 128  # open at once, of the 1024 that a process usually may have
RECORD = "cache.json"
_FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_INTEGERS = {"I64": "<i8", "I32": "<i4", "I16": "<i2", "U8": "u1"}
_TOLD: dict[str, type] = {
    "tokenizer": str, "precision": str, "resolution": int, "crop": str, "decoder": str, "dtype": str, "flips": bool,
    "data": str,
}  # fmt: skip


class _Part(NamedTuple):
    """A tensor of a shard: safetensors' name of its dtype, its shape, where its bytes begin in the file."""

    dtype: str
    shape: tuple[int, ...]
    first: int


class LightningDiTCache(LatentCache):
    """See the module. images: how many there really are; None: all rows, or what cache.json says."""

    format = "lightningdit"

    def __init__(self, path: Path, moments: str | None = None, images: int | None = None) -> None:
        self.images = images
        if moments is not None:
            raise CacheError(f"{path}: a lightningdit cache holds samples, no moments")
        super().__init__(path)

    def _open(self) -> None:
        record = _record(self.path / RECORD)
        found = sorted(
            (int(m[1]), int(m[2]), p.name) for p in self.path.iterdir() if (m := SHARD_NAME.fullmatch(p.name))
        )
        self._files = [name for _, _, name in found]
        parts = [_header(self.path / name) for name in self._files]
        for i in range(1, len(parts)):
            self._check_alike(parts[i - 1], parts[i], self._files[i])
        self._parts = parts[0] if parts else {}
        rows = np.array([part["latents"].shape[0] for part in parts], dtype=np.int64)
        self._ends = np.cumsum(rows)
        self._first = {key: np.array([part[key].first for part in parts], dtype=np.int64) for key in self._parts}
        ranks = np.array([rank for rank, _, _ in found], dtype=np.int64)
        self._order = Interleaved([int(rows[ranks == rank].sum()) for rank in np.unique(ranks)])
        self.names = _Numbers(self._images(record))
        self.flips = "latents_flip" in self._parts
        own = {"latents", "latents_flip", "labels", "indices"}
        self.extras = tuple(sorted(k for k in self._parts.keys() - own if not k.endswith("_flip")))
        self.labels, self.places = self._integers("labels"), self._integers("indices")
        self.fingerprint = None if record is None else record["fingerprint"]
        self._readers = _Readers([os.path.join(self.path, name) for name in self._files])

    def _check_alike(self, before: dict[str, _Part], here: dict[str, _Part], name: str) -> None:
        if before.keys() != here.keys():
            raise CacheError(f"{self.path / name}: holds {sorted(here)}, the shards before it {sorted(before)}")
        for key, part in here.items():
            if (part.dtype, part.shape[1:]) != (before[key].dtype, before[key].shape[1:]):
                raise CacheError(
                    f"{self.path / name}: the rows of its {key} are {part.dtype} {part.shape[1:]}, those of the shards "
                    f"before it {before[key].dtype} {before[key].shape[1:]}"
                )

    def _images(self, record: dict[str, Any] | None) -> int:
        """How many of the rows are images."""
        rows, ranks = self._order.rows, self._order.ranks
        if record is not None and record["images"] != rows:
            raise CacheError(
                f"{self.path}: its shards hold {rows} latents and {RECORD} says {record['images']}: a shard was taken "
                "away or added; run the maetok-fast cache-latents command that made it again"
            )
        if self.images is None:
            return rows
        if not rows - ranks < self.images <= rows:
            raise CacheError(
                f"{self.path}: {self.images} images cannot be in its {rows} items of {ranks} ranks: a distributed "
                "sampler repeats fewer than one a rank"
            )
        return self.images

    def _integers(self, key: str) -> np.ndarray | None:
        """A tensor of one whole number a row, int64 (N,) in the images' order."""
        if key not in self._parts:
            return None
        part = self._parts[key]
        if part.dtype not in _INTEGERS or len(part.shape) != 1:
            raise CacheError(f"{self.path}: its {key} are {part.dtype} {part.shape}, expected I64, one a row")
        kind = np.dtype(_INTEGERS[part.dtype])
        whole = np.empty(self._order.rows, dtype=np.int64)
        start = 0
        for name, end, first in zip(self._files, self._ends.tolist(), self._first[key].tolist()):
            try:
                whole[start:end] = np.fromfile(self.path / name, kind, end - start, offset=first)
            except (OSError, ValueError) as error:
                raise CacheError(f"{self.path / name}: its {key} cannot be read ({error})") from error
            start = end
        if self._order.ranks == 1:
            return whole[: len(self)]
        return whole[self._order.at(np.arange(len(self)))]

    def stored(self, i: int, flip: bool = False) -> np.ndarray:
        return self.extra("latents_flip" if flip else "latents", i)

    def extra(self, name: str, i: int) -> np.ndarray:
        if name not in self._parts:
            raise CacheError(f"{self.path}: item {i} has no {name}; there are {', '.join(self._parts)}")
        row = self._gathered(name, np.array([i]))[0]
        return (row.float() if row.dtype == torch.bfloat16 else row).numpy()  # which numpy does not have

    def _rows(self, which: np.ndarray, flip: bool) -> Tensor:
        return self._gathered("latents_flip" if flip else "latents", which).float()

    def _gathered(self, key: str, which: np.ndarray) -> Tensor:
        """Rows (B, ...) of a tensor, in its dtype."""
        part = self._parts[key]
        if part.dtype not in _FLOATS:
            raise CacheError(f"{self.path}: its {key} are {part.dtype}, expected one of {', '.join(_FLOATS)}")
        dtype = _FLOATS[part.dtype]
        width = dtype.itemsize * int(np.prod(part.shape[1:], dtype=np.int64))
        rows = self._order.at(which)
        shards = np.searchsorted(self._ends, rows, side="right")
        first = self._first[key][shards] + (rows - np.concatenate([[0], self._ends])[shards]) * width
        out = np.empty((len(which), width), dtype=np.uint8)
        ascending = np.argsort(rows, kind="stable")
        for start in range(0, len(which), FILES):
            some = ascending[start : start + FILES]
            try:
                self._readers.read(list(zip(shards[some].tolist(), first[some].tolist(), some.tolist())), out)
            except (OSError, ValueError) as error:
                raise CacheError(f"{self.path}: {key} cannot be read ({error})") from error
        return torch.from_numpy(out).view(dtype).reshape(len(which), *part.shape[1:])

    def _kind(self, moments: str | None) -> str:
        return "sample"


class Interleaved:
    """The rows of W ranks that lie one after another, in the images' order: item j of each rank that has one, then item
    j + 1. lengths: of the ranks. rows: of all of them."""

    def __init__(self, lengths: Sequence[int]) -> None:
        long = np.array(lengths, dtype=np.int64)
        self.ranks, self.rows = len(long), int(long.sum())
        self._begins = np.cumsum(long) - long
        levels = np.unique(np.concatenate([[0], long]))
        self._levels = levels[:-1]  # between two of them the same ranks have items
        self._members = [np.flatnonzero(long > level) for level in self._levels]
        counts = np.diff(levels) * [len(ranks) for ranks in self._members]
        self._starts = np.cumsum(counts) - counts

    def at(self, images: np.ndarray) -> np.ndarray:
        """int64 of any shape, in [0, rows), to rows."""
        if self.ranks == 1:
            return images
        out = np.empty(images.shape, dtype=np.int64)
        segments = np.searchsorted(self._starts, images, side="right") - 1
        for s in np.unique(segments):
            here = segments == s
            item, member = np.divmod(images[here] - self._starts[s], len(self._members[s]))
            out[here] = self._begins[self._members[s][member]] + self._levels[s] + item
        return out


class _Numbers(Sequence[str]):
    """ "00000000", "00000001", ..."""

    def __init__(self, count: int) -> None:
        self._length = count

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, i):  # type: ignore[no-untyped-def]  # Sequence's overloads; slices have no use here
        if not 0 <= i < self._length:
            raise IndexError(f"{i} is not in [0, {self._length})")
        return f"{i:08d}"


class _Readers:
    """Files opened when they are read, and at most 2 FILES of them open. A copy sent elsewhere has none open."""

    def __init__(self, paths: Sequence[str]) -> None:
        self.paths = paths
        self._open: dict[int, _Descriptor] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {"paths": self.paths, "_open": {}}

    def read(self, rows: Sequence[tuple[int, int, int]], out: np.ndarray) -> None:
        """rows: at most FILES of (file's number, first byte, row of `out` (B, width) uint8 that its bytes go to), in
        the order in which they are read. OSError or ValueError where a file is gone, or shorter."""
        if len(self._open) > FILES:
            self._open = {}  # forgotten, not closed: another thread may read in them
        files, width = self._open, out.shape[1]
        asked = []
        for number, first, k in rows:
            if (file := files.get(number)) is None:
                file = files[number] = _Descriptor(os.open(self.paths[number], os.O_RDONLY))
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(file.number, first, width, os.POSIX_FADV_WILLNEED)
            asked.append((file, first, k * width))
        whole = out.reshape(-1).data
        for (file, first, start), (number, _, _) in zip(asked, rows):
            done = 0
            while done < width:
                more = os.preadv(file.number, [whole[start + done : start + width]], first + done)
                if not more:
                    raise ValueError(f"{self.paths[number]} is shorter than it was when it was opened")
                done += more


class _Descriptor:
    """Closed with its last user. Reads say their places, so that forked processes and threads may share it."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __del__(self) -> None:
        os.close(self.number)


def _header(path: Path) -> dict[str, _Part]:
    """The tensors of a shard. CacheError where it is no whole one, or they are not of one length."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy"):  # checks all that a header can be wrong in
            pass
        with open(path, "rb") as file:
            size = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(size))
        header.pop("__metadata__", None)
        parts = {k: _Part(v["dtype"], tuple(v["shape"]), 8 + size + v["data_offsets"][0]) for k, v in header.items()}
        lengths = {key: part.shape[0] if part.shape else None for key, part in parts.items()}
        if "latents" not in parts:
            raise ValueError(f"it holds {', '.join(sorted(parts))}, and no latents")
        if len(set(lengths.values())) != 1 or None in lengths.values():
            raise ValueError(f"its tensors are not of one length: {lengths}")
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        raise CacheError(f"{path}: no complete shard of a lightningdit cache ({error})") from error
    return parts


def _record(path: Path) -> dict[str, Any] | None:
    """What `maetok-fast cache-latents` says of a cache that is complete; None where there is no such file."""
    if not os.path.lexists(path):
        return None
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        complete, images, told = record["complete"], record["images"], record["fingerprint"]
        wrong = [key for key, kind in _TOLD.items() if type(told[key]) is not kind]
        if type(complete) is not bool or type(images) is not int or wrong:
            raise ValueError(f"wrong: {', '.join(wrong) or 'complete, images'}")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise CacheError(
            f"{path}: is not the record of a latent cache ({type(error).__name__}: {error}); run the maetok-fast "
            "cache-latents command that made it again, into an empty folder"
        ) from error
    if not complete:
        raise CacheError(f"{path.parent} is not finished: run the same maetok-fast cache-latents command again")
    return dict(record)
