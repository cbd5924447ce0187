# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""One latent cache into another layout.

    from \\ to     sample            scaled                  mean_std              mean_logvar
    sample        as it is          x scale                 refused: what was drawn holds no deviation
    scaled        / scale           as it is                refused
    mean_std      drawn, a seed     drawn x scale           as it is              [mean; 2 log std]
    mean_logvar   drawn, a seed     drawn x scale           [mean; exp(logvar/2)] as it is

What has to be known and is not in the files (a scale, a seed) is asked for. A draw is of its own stream for each image,
so that it does not depend on batches. The new cache gets its name once it is whole.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from maetok_fast.data.caches.cache import CacheError, LatentCache, drawn
from maetok_fast.data.caches.writers import WRITERS

__all__ = ["Converted", "convert_cache"]


@dataclass(frozen=True)
class Converted:
    """images: how many. lost: what the new layout has no place for, in words."""

    images: int
    lost: tuple[str, ...] = ()


def convert_cache(
    source: LatentCache,
    destination: str | Path,
    to: str,
    *,
    seed: int | None = None,
    scale: float | None = None,
    flips: bool = True,
    batch: int = 64,
    tick: Callable[[int], None] = lambda n: None,
) -> Converted:
    """Writes `source` as a cache of layout `to` (of WRITERS) into the folder `destination`, which must not exist; for
    "repa-e" its last part is the file's name too: DESTINATION/<name>.h5.

    seed: of draws; scale: of scaled latents; see the module's table. flips=False leaves mirror images out, and does
    without them where the layout's readers expect them. CacheError where something is missing, or refused.
    """
    if to not in WRITERS:
        raise ValueError(f"unknown cache format {to!r}: expected one of {', '.join(WRITERS)}")
    writer, destination = WRITERS[to], Path(destination)
    change = _change(source, writer.kind, to, seed, scale)
    lost = [f"{name}: no place for it" for name in source.extras]
    if source.flips and not writer.flips:
        lost.append("mirror images: no place for them")
    if writer.flips and flips and not source.flips:
        raise CacheError(
            f"{source.path}: has no mirror images, which readers of {to} caches expect; --no-flips writes it without"
        )
    if writer.needs_labels and source.labels is None:
        raise CacheError(f"{source.path}: has no labels, and a {to} cache cannot be without")
    if writer.folders and source.labels is not None:
        known = np.unique(source.labels)
        if not np.array_equal(known, np.arange(len(known))):
            lost.append(
                f"labels: {to} numbers classes by their folders' places, so that {known[-1]} becomes {len(known) - 1}"
            )
    if destination.exists():
        raise CacheError(f"{destination}: is there already; give a name that is not")
    mirrored = flips and source.flips and writer.flips
    try:
        destination.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(dir=destination.parent, prefix=f".{destination.name}.writing-"))
    except OSError as error:
        raise CacheError(f"{destination}: cannot be made ({error.strerror or error})") from error
    try:
        cache = writer(folder, destination.name)
        for start in range(0, len(source), batch):
            which = range(start, min(start + batch, len(source)))
            items = change(source.read(which), which, 0)
            other = change(source.read(which, flip=True), which, 1) if mirrored else None
            labels = None if source.labels is None else source.labels[which.start : which.stop]
            cache.add(items, other, labels, [source.names[i] for i in which])
            tick(len(which))
        cache.close()
        os.chmod(folder, 0o755)
        os.rename(folder, destination)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return Converted(len(source), tuple(lost))


def _change(
    source: LatentCache, kind: str, to: str, seed: int | None, scale: float | None
) -> Callable[[Tensor, range, int], Tensor]:
    """(items, their places, 0 or 1 for mirror images) -> items of `kind`."""
    here = source.kind
    if here in ("sample", "scaled") and kind.startswith("mean"):
        raise CacheError(
            f"{source.path}: its latents were drawn once, and a {to} cache holds mean and deviation, which a draw does "
            "not have; encode the images again"
        )
    if "scaled" in (here, kind) and here != kind and scale is None:
        raise CacheError(f"{source.path}: between {here} and {kind} latents lies a factor no file tells: --scale")
    if scale is not None and not scale > 0:
        raise ValueError(f"scale must be > 0, got {scale}")
    draws = here.startswith("mean") and not kind.startswith("mean")
    if draws and seed is None:
        raise CacheError(f"{source.path}: a {to} cache holds drawn latents, and this one what to draw from: --seed")
    factor = 1.0 if here == kind or scale is None else scale if kind == "scaled" else 1 / scale

    def change(items: Tensor, which: range, mirrored: int) -> Tensor:
        if here == kind:
            return items
        if not here.startswith("mean"):
            return items * factor
        mean, second = items.chunk(2, dim=1)
        if not draws:
            return torch.cat([mean, 2 * second.log() if kind == "mean_logvar" else (second / 2).exp()], dim=1)
        assert seed is not None
        streams = [np.random.Generator(np.random.Philox(key=[seed, 2 * i + mirrored])) for i in which]
        noise = torch.from_numpy(np.stack([s.standard_normal(mean.shape[1:], dtype=np.float32) for s in streams]))
        return drawn(items, here, noise) * factor

    return change
