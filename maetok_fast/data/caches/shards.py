# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""A shard of a LightningDiT cache as it is written, and the statistics of its channels.

    latents, latents_flip, labels, ... ── write_shard ──> latents_rank00_shard{sss:03d}.safetensors
       └── ChannelMoments.of ── in its metadata ── merged in the shards' order ── write_statistics ──> latents_stats.pt

One pass: a shard's count, mean and sum of squared deviations (M2) are taken while it is in memory, and pairs of them
merge by Chan, Golub and LeVeque (1979), whose errors do not grow with mean / deviation as those of a sum of squares do.
Statistics are over `latents` alone, without the mirror images, as LightningDiT takes them.
"""

from __future__ import annotations

import functools
import io
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from maetok_fast.data.caches.cache import CacheError
from maetok_fast.models.checkpoints.files import write_weights

__all__ = ["SHARD", "ChannelMoments", "Header", "read_header", "shard_name", "write_shard", "write_statistics"]

SHARD = 10_000  # rows, as LightningDiT's extraction writes them
_ROWS = 256  # of a shard in fp64 at once; not the encoder's batch, which shall not change a bit
_STATISTICS = "statistics"  # the metadata's entry


def shard_name(number: int) -> str:
    """Always of rank 0: the files' order is the images'."""
    return f"latents_rank00_shard{number:03d}.safetensors"


@dataclass(frozen=True)
class ChannelMoments:
    """count: of numbers in a channel. mean, m2: (C,) fp64, their mean and the sum of their squared deviations."""

    count: int
    mean: np.ndarray
    m2: np.ndarray

    @classmethod
    def of(cls, items: Tensor) -> ChannelMoments:
        """Of latents (B, L, C) or (B, C, h, w) of any floating dtype; B may be 0."""
        last = items if items.ndim == 3 else items.movedim(1, -1)
        parts = (_flat_moments(part.double().numpy().reshape(-1, last.shape[-1])) for part in last.split(_ROWS))
        return cls.together(parts)

    @classmethod
    def together(cls, parts: Iterable[ChannelMoments]) -> ChannelMoments:
        """Merged from the first to the last: the same parts in the same order, the same bits."""
        return functools.reduce(ChannelMoments.merged, parts)

    def merged(self, other: ChannelMoments) -> ChannelMoments:
        """Those of both together."""
        count = self.count + other.count
        if not self.count or not other.count:
            return self if self.count else other
        delta = other.mean - self.mean
        mean = self.mean + delta * (other.count / count)
        m2 = self.m2 + other.m2 + delta * delta * (self.count * (other.count / count))
        return ChannelMoments(count, mean, m2)

    @property
    def std(self) -> np.ndarray:
        """(C,) fp64, over count - 1, as torch.std has it; 0 of a single number."""
        return np.sqrt(self.m2 / max(1, self.count - 1))

    def as_json(self) -> str:
        """Every bit of it: Python writes the shortest digits that give the number back."""
        return json.dumps({"count": self.count, "mean": self.mean.tolist(), "m2": self.m2.tolist()})

    @classmethod
    def of_json(cls, text: str) -> ChannelMoments:
        """What `as_json` wrote. ValueError, KeyError or TypeError where it did not."""
        found = json.loads(text)
        mean, m2 = (np.array(found[name], dtype=np.float64) for name in ("mean", "m2"))
        if mean.ndim != 1 or mean.shape != m2.shape or not np.isfinite([mean, m2]).all():
            raise ValueError("its statistics are no two finite numbers a channel")
        return cls(int(found["count"]), mean, m2)


def _flat_moments(rows: np.ndarray) -> ChannelMoments:
    """Of (M, C) fp64, in two looks at what the cache of the processor holds."""
    if not len(rows):
        return ChannelMoments(0, np.zeros(rows.shape[1]), np.zeros(rows.shape[1]))
    mean = rows.mean(axis=0)
    return ChannelMoments(len(rows), mean, np.square(rows - mean).sum(axis=0))


class Header(NamedTuple):
    """What a shard says of itself. shapes: of its tensors. about: its metadata, without the statistics."""

    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, str]
    moments: ChannelMoments
    about: dict[str, str]


def write_shard(path: Path, tensors: Mapping[str, Tensor], about: Mapping[str, str] | None = None) -> ChannelMoments:
    """Writes a shard, and returns its statistics, which stand in its metadata.

    tensors: "latents" (n, L, C) or (n, C, h, w), and what lies beside them: "latents_flip", "labels" int64 (n,),
    "indices" int64 (n,). about: more metadata. Equal tensors make equal files. OSError where it cannot be written.
    """
    latents = tensors["latents"]
    moments = ChannelMoments.of(latents)
    own = {"total_size": str(len(latents)), "dtype": str(latents.dtype), "device": "cpu"}
    write_weights(path, dict(tensors), {**own, _STATISTICS: moments.as_json(), **(about or {})})
    return moments


def read_header(path: Path) -> Header:
    """Of a shard that `write_shard` wrote, without its tensors. CacheError where it is none, or not whole."""
    from safetensors import safe_open

    try:
        with safe_open(path, framework="pt") as file:
            about: dict[str, Any] = dict(file.metadata() or {})
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118  # no dictionary
            shapes = {name: tuple(part.get_shape()) for name, part in slices.items()}
            dtypes = {name: str(part.get_dtype()) for name, part in slices.items()}
        moments = ChannelMoments.of_json(about.pop(_STATISTICS))
        if int(about["total_size"]) != shapes["latents"][0] or len({shape[0] for shape in shapes.values()}) != 1:
            raise ValueError("its tensors have other numbers of rows than it says")
    except Exception as error:  # safetensors raises half a dozen types on bad bytes
        raise CacheError(f"{path}: no whole shard of a latent cache ({error})") from error
    return Header(shapes, dtypes, moments, about)


def write_statistics(path: Path, moments: ChannelMoments, dims: int) -> None:
    """latents_stats.pt: "mean" and "std" fp32 as they broadcast over latents of `dims` dimensions, (1, 1, C) of 3 or
    (1, C, 1, 1) of 4."""
    shape = (1, 1, -1) if dims == 3 else (1, -1, 1, 1)
    mean, std = (torch.from_numpy(value).float().reshape(shape) for value in (moments.mean, moments.std))
    content = io.BytesIO()  # torch.save writes a file's own name into it
    torch.save({"mean": mean, "std": std}, content)
    path.write_bytes(content.getvalue())
