# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""LatentCache: what every layout of a latent cache looks like from outside.

    kind            an item, fp32                     a latent of it
    sample          (C, h, w): drawn once             the item
    scaled          (C, h, w): the item is z already  the item / scale
    mean_std        (2C, h, w) = [mean; std]          mean + std eps
    mean_logvar     (2C, h, w) = [mean; logvar]       mean + exp(logvar / 2) eps

Both of the last are called "moments" by somebody, and neither file says which it is. A standard deviation is positive
everywhere: one value <= 0 proves the logarithm. The other way round nothing is proved, so that then the layout's own
convention counts (REPA writes std, MAR logvar), unless the values contradict it: that is an error, to be settled by
the one who wrote them (`moments=`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from maetok_fast.models.checkpoints.locate import STATISTICS

__all__ = ["KINDS", "CacheError", "LatentCache", "drawn", "moments_kind"]

KINDS = ("sample", "scaled", "mean_std", "mean_logvar")
LOOKED_AT = 16  # items whose values are looked at


class CacheError(ValueError):
    """A latent cache that cannot be used as it is; the message names the file and the way out."""


class LatentCache:
    """One cache. len: its images. Items are read when they are asked for, and files opened in the process that reads,
    so that a cache may be sent to others, or forked.

    format: the layout's name. kind: see the module's table. shape: of one latent, (C, h, w) or (L, C). labels: int64
    (N,), or None. names: one for each image, "/" between folders, without ending. flips: whether the images' mirror
    images are there too. extras: other tensors beside them, by name (SFD's latents_sv, latents_dino).
    places: int64 (N,), each item's place in the source it was made of, where the cache tells it, else None.
    fingerprint: what the latents depend on, as `maetok-fast cache-latents` recorded it ("tokenizer", "precision",
    "resolution", "crop", "decoder", "dtype", "flips", "data"), else None.
    """

    format: ClassVar[str]
    stated: ClassVar[str | None] = None  # what the layout's authors write: "mean_std", "mean_logvar"
    extras: tuple[str, ...] = ()
    labels: np.ndarray | None
    names: Sequence[str]
    flips: bool = False
    places: np.ndarray | None = None
    fingerprint: dict[str, Any] | None = None

    def __init__(self, path: Path, moments: str | None = None) -> None:
        self.path = path
        self._open()
        if not len(self):
            raise CacheError(f"{path}: a {self.format} cache without images")
        first = self.stored(0)
        self.kind = self._kind(moments)
        halves = self.kind.startswith("mean")
        if first.ndim not in (2, 3) or 0 in first.shape or (halves and first.shape[0] % 2):
            wanted = "(2C, h, w)" if halves else "(C, h, w) or (L, C)"
            raise CacheError(f"{path}: item {self.names[0]} has shape {first.shape}, expected {wanted}")
        self.item = tuple(first.shape)
        self.shape = (first.shape[0] // 2, *first.shape[1:]) if halves else self.item

    # ---- what a layout gives

    def _open(self) -> None:
        """Finds the items: sets names, labels, flips, extras."""
        raise NotImplementedError

    def stored(self, i: int, flip: bool = False) -> np.ndarray:
        """Item i as it is stored."""
        raise NotImplementedError

    def extra(self, name: str, i: int) -> np.ndarray:
        """What else lies beside item i, of `extras`."""
        raise CacheError(f"{self.path}: a {self.format} cache has no {name}")

    # ---- what one does with it

    def __len__(self) -> int:
        return len(self.names)

    def read(self, index: slice | Sequence[int] | np.ndarray, flip: bool = False) -> Tensor:
        """Items (B, *item) fp32. CacheError where one is of another shape, or no numbers, or not finite; IndexError for
        a place that is none."""
        which = np.arange(*index.indices(len(self))) if isinstance(index, slice) else np.asarray(index, dtype=np.int64)
        if flip and not self.flips:
            raise CacheError(f"{self.path}: a {self.format} cache without the mirror images")
        if not len(which):
            return torch.empty(0, *self.item)
        if which.min() < 0 or which.max() >= len(self):
            raise IndexError(f"{self.path}: {which.min()} .. {which.max()} do not lie in its {len(self)} items")
        items = self._rows(which, flip)
        # NaN and infinity are the least or the greatest: two numbers to look at, and no tensor of booleans
        if not torch.stack(torch.aminmax(items)).isfinite().all():
            bad = int((~items.flatten(1).isfinite().all(1)).nonzero()[0])
            raise CacheError(f"{self.path}: item {self.names[which[bad]]} holds values that are not finite")
        if self.kind == "mean_std" and not (second := items[:, self.item[0] // 2 :]).min() > 0:
            bad = int((second.flatten(1).amin(1) <= 0).nonzero()[0])
            raise CacheError(
                f"{self.path}: item {self.names[which[bad]]} holds a standard deviation that is not > 0; if its "
                "moments are log variances, say so: --moments logvar"
            )
        return items

    def _rows(self, which: np.ndarray, flip: bool) -> Tensor:
        """Items at these places, at least one, (B, *item) fp32 of any values; one after another where the layout has no
        quicker way."""
        rows = np.empty((len(which), *self.item), dtype=np.float32)
        for k, i in enumerate(which.tolist()):
            item = self.stored(i, flip)
            if item.shape != self.item or item.dtype.kind != "f":
                raise CacheError(
                    f"{self.path}: item {self.names[i]} is {item.dtype} {item.shape}, the first one float {self.item}"
                )
            rows[k] = item
        return torch.from_numpy(rows)

    def batches(self, size: int, flip: bool = False) -> Iterator[tuple[range, Tensor]]:
        """(their places, items) in order."""
        for start in range(0, len(self), size):
            where = range(start, min(start + size, len(self)))
            yield where, self.read(where, flip)

    def _kind(self, moments: str | None) -> str:
        """The kind of items; overridden by layouts of samples."""
        if moments not in (None, "std", "logvar"):
            raise ValueError(f"moments must be 'std', 'logvar' or None, got {moments!r}")
        assert self.stated is not None
        return moments_kind(self, moments)

    @property
    def statistics_file(self) -> Path | None:
        """The file beside the latents that says how to normalise them, for `LatentStatistics.load`; None where there is
        none. CacheError where there are several."""
        folder = self.path if self.path.is_dir() else self.path.parent
        for pattern in STATISTICS:
            found = sorted(folder.glob(pattern))
            # REPA-E's are called after the tokenizer, as its latents are
            found = [p for p in found if p.name == f"{self.path.stem}-latents-stats.pt"] or found
            if len(found) > 1:
                names = ", ".join(p.name for p in found)
                raise CacheError(f"{folder}: several files of statistics ({names}): say which one counts")
            if found:
                return found[0]
        return None

    def __repr__(self) -> str:
        labels = "no labels" if self.labels is None else f"{len(np.unique(self.labels))} classes"
        return f"{self.format} cache {self.path}: {len(self)} x {self.shape}, {self.kind}, {labels}"


def drawn(items: Tensor, kind: str, noise: Tensor | None = None) -> Tensor:
    """Latents (B, *shape) of items (B, *item) of a kind, as the module's table has it. noise: eps (B, *shape), for
    moments only."""
    if kind in ("sample", "scaled"):
        return items
    assert noise is not None
    mean, second = items.chunk(2, dim=1)
    return mean + (second if kind == "mean_std" else (second / 2).exp()) * noise


def moments_kind(cache: Any, given: str | None = None) -> str:
    """mean_std or mean_logvar, as the module says; given: "std" or "logvar", which values <= 0 may still refute."""
    step = max(1, len(cache) // LOOKED_AT)
    first = cache.stored(0)
    looked = [cache.stored(i) for i in range(0, len(cache), step)]
    # what is unlike the first is refused when it is read
    alike = [item for item in looked if item.shape == first.shape and item.dtype == first.dtype]
    seconds = [item[item.shape[0] // 2 :] for item in alike]
    positive = all((second > 0).all() for second in seconds)
    if given == "std" and any((second <= 0).any() for second in seconds):  # NaN is no proof, and refused when read
        raise CacheError(
            f"{cache.path}: values <= 0 in the second half of its moments, which no std has; not --moments std"
        )
    if given is not None:
        return f"mean_{given}"
    if positive == (cache.stated == "mean_std"):
        return str(cache.stated)
    found = "only positive values" if positive else "values <= 0, which no standard deviation has,"
    usual = "std" if cache.stated == "mean_std" else "logvar"
    raise CacheError(
        f"{cache.path}: {found} in the second half of its moments, where a {cache.format} cache has {usual}; say which "
        "it is: --moments std or --moments logvar"
    )
