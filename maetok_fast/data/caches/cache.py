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

__all__ = ["KINDS", "CacheError", "LatentCache", "moments_kind"]

KINDS = ("sample", "scaled", "mean_std", "mean_logvar")
LOOKED_AT = 16  # items whose values are looked at


class CacheError(ValueError):
    """A latent cache that cannot be used as it is; the message names the file and the way out."""


class LatentCache:
    """One cache. len: its images. Items are read when they are asked for.

    format: the layout's name. kind: see the module's table. shape: of one latent, (C, h, w) or (L, C). labels: int64
    (N,), or None. names: one for each image, "/" between folders, without ending. flips: whether the images' mirror
    images are there too. extras: other tensors beside them, by name (SFD's latents_sv, latents_dino).
    """

    format: ClassVar[str]
    stated: ClassVar[str | None] = None  # what the layout's authors write: "mean_std", "mean_logvar"
    extras: tuple[str, ...] = ()
    labels: np.ndarray | None
    names: list[str]
    flips: bool = False

    def __init__(self, path: Path, moments: str | None = None) -> None:
        self.path = path
        self._given: dict[str, Any] = {"moments": moments}
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

    def read(self, index: slice | Sequence[int], flip: bool = False) -> Tensor:
        """Items (B, *item) fp32. CacheError where one is of another shape, or no numbers, or not finite."""
        which = range(*index.indices(len(self))) if isinstance(index, slice) else index
        if flip and not self.flips:
            raise CacheError(f"{self.path}: a {self.format} cache without the mirror images")
        rows = []
        for i in which:
            item = self.stored(i, flip)
            if item.shape != self.item or item.dtype.kind != "f":
                raise CacheError(
                    f"{self.path}: item {self.names[i]} is {item.dtype} {item.shape}, the first one float {self.item}"
                )
            rows.append(np.asarray(item, dtype=np.float32))
        items = torch.from_numpy(np.stack(rows)) if rows else torch.empty(0, *self.item)
        if not items.isfinite().all():
            bad = int((~items.flatten(1).isfinite().all(1)).nonzero()[0])
            raise CacheError(f"{self.path}: item {self.names[which[bad]]} holds values that are not finite")
        if self.kind == "mean_std" and not (second := items[:, self.item[0] // 2 :] > 0).all():
            bad = int((~second.flatten(1).all(1)).nonzero()[0])
            raise CacheError(
                f"{self.path}: item {self.names[which[bad]]} holds a standard deviation that is not > 0; if its "
                "moments are log variances, say so: --moments logvar"
            )
        return items

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

    def __reduce__(self) -> Any:
        """For workers of a DataLoader: open files do not travel, the new one opens its own."""
        return _reopened, (type(self), self.path, self._given)

    def __repr__(self) -> str:
        labels = "no labels" if self.labels is None else f"{len(np.unique(self.labels))} classes"
        return f"{self.format} cache {self.path}: {len(self)} x {self.shape}, {self.kind}, {labels}"


def _reopened(kind: type[LatentCache], path: Path, given: dict[str, Any]) -> LatentCache:
    return kind(path, **given)


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
