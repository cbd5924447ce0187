# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""Rows: samples as vectors, read in blocks, as often as one likes, always the same.

    ArrayRows      an array or tensor (N, ...), each sample flattened
    FileRows       a .npy file of fp32 (N, D): flat memory, whatever N
    CacheRows      a latent cache: (L, H) -> L*H
    WhitenedRows   other rows through a PCA (maetok_fast/analysis/pca.py)

    rows.blocks(size) -> (B, D), in order       rows.take(places) -> (B, D), any places
    rows.stored(path) -> FileRows               rows.stored() -> ArrayRows

Whoever passes over rows many times stores them first where a block is dear: a PCA costs as much as a pass of EM.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.lib import format as npy
from torch import Tensor

from maetok_fast.checks import check_positive
from maetok_fast.data.caches.cache import LatentCache, drawn
from maetok_fast.data.views import NOISE, rng_of
from maetok_fast.pipeline.run import written

__all__ = ["ArrayRows", "CacheRows", "FileRows", "Rows", "RowsError"]

BLOCK = 2**23  # numbers that are read at a time where nobody asks for a number of rows


class RowsError(ValueError):
    """Rows that cannot be used; the message names them and the way out."""


class Rows:
    """N rows of `dim` numbers. name: what errors call them. dtype: torch.float32, or float64 where an array came so.

    log_scale: the sum of log standard deviations that these rows were divided by, in nats: a negative log likelihood of
    a row in the units that the source had is that of this row + log_scale (0 where nothing was scaled).
    """

    name: str = "rows"
    dim: int
    dtype: torch.dtype = torch.float32
    log_scale: float = 0.0

    def __len__(self) -> int:
        raise NotImplementedError

    def take(self, places: np.ndarray) -> Tensor:
        """Rows (B, D) on the CPU at these places, int64 (B,) in [0, N), in their order."""
        raise NotImplementedError

    def blocks(self, size: int | None = None) -> Iterator[Tensor]:
        """All rows in order, (B, D) on the CPU, B = size (None: about 32 MB) but for the last block."""
        size = max(64, BLOCK // self.dim) if size is None else size
        check_positive(self.name, size=size)
        for start in range(0, len(self), size):
            yield self.take(np.arange(start, min(start + size, len(self))))

    def stored(self, path: str | Path | None = None) -> Rows:
        """The same rows read once: in a new .npy file at path, or in memory for None."""
        if path is None:
            kept = torch.empty(len(self), self.dim, dtype=self.dtype)
            start = 0
            for block in self.blocks():
                kept[start : start + len(block)] = block
                start += len(block)
            found: Rows = ArrayRows(kept, name=self.name)
        else:
            written(Path(path), partial(_write, self))
            found = FileRows(path)
        found.log_scale = self.log_scale
        return found


class ArrayRows(Rows):
    """A numpy array, memory map or tensor (N, ...) of numbers, each sample flattened; fp64 stays so, all else becomes
    fp32 block by block. The pages of a memory map that were read count as the process's until the system wants them
    back: `FileRows` reads a .npy file without. TypeError for what is no array of numbers, RowsError for an empty one.
    """

    def __init__(self, x: Any, name: str = "rows") -> None:
        if not isinstance(x, (np.ndarray, Tensor)):
            raise TypeError(f"{name}: expected a numpy array or a torch.Tensor (N, D), got {type(x).__name__}")
        if isinstance(x, Tensor):
            numbers = not (x.is_complex() or x.is_quantized or x.dtype == torch.bool)
            double = x.dtype == torch.float64
            x = x.detach()
        else:
            numbers, double = x.dtype.kind in "fiu", x.dtype == np.float64
        if not numbers:
            raise TypeError(f"{name}: expected real numbers, got {x.dtype}")
        if x.ndim < 2 or 0 in x.shape:
            raise RowsError(f"{name}: expected an array (N, D) or (N, L, H), no size 0, got {tuple(x.shape)}")
        self.x, self.name, self.dim = x, name, int(np.prod(x.shape[1:]))
        self.dtype = torch.float64 if double else torch.float32

    def __len__(self) -> int:
        return len(self.x)

    def take(self, places: np.ndarray) -> Tensor:
        n = len(places)
        run = n > 0 and int(places[-1]) - int(places[0]) + 1 == n and (np.diff(places) == 1).all()
        which: Any = slice(int(places[0]), int(places[0]) + n) if run else places
        if isinstance(self.x, Tensor):
            block = self.x[which if run else torch.from_numpy(places).to(self.x.device)].to("cpu", self.dtype)
        else:
            double = self.dtype == torch.float64
            block = torch.from_numpy(np.array(self.x[which], dtype=np.float64 if double else np.float32, order="C"))
        return _finite(block.reshape(n, self.dim), self.name)


class FileRows(Rows):
    """A .npy file of fp32 (N, D), rows one behind the other, as `Rows.stored` writes it. RowsError for any other."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.name = str(path)
        try:
            with self.path.open("rb") as file:
                version = npy.read_magic(file)
                read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
                shape, columns, dtype = read(file)
                self.offset = file.tell()
        except (OSError, ValueError) as error:
            raise RowsError(f"{path}: is no .npy file that can be read ({error})") from None
        if len(shape) != 2 or 0 in shape or columns or dtype != np.float32:
            order = "columns" if columns else "rows"
            raise RowsError(f"{path}: expected fp32 (N, D) in rows, got {dtype} {shape} in {order}; use ArrayRows")
        self.count, self.dim = shape
        if self.path.stat().st_size < self.offset + 4 * self.count * self.dim:
            raise RowsError(f"{path}: is shorter than its header says; write it again")

    def __len__(self) -> int:
        return int(self.count)

    def take(self, places: np.ndarray) -> Tensor:
        if len(places) and not 0 <= places.min() <= places.max() < len(self):
            raise IndexError(f"{self.path}: {places.min()} .. {places.max()} do not lie in its {len(self)} rows")
        out = np.empty((len(places), self.dim), dtype=np.float32)
        borders = [0, *(np.flatnonzero(np.diff(places) != 1) + 1).tolist(), len(places)]
        # reads and no map: a map's pages stay with the process
        with self.path.open("rb", buffering=0) as file:
            for first, last in itertools.pairwise(borders):
                whole, done = out[first:last].reshape(-1).view(np.uint8).data, 0
                while done < len(whole):
                    where = self.offset + 4 * self.dim * int(places[first]) + done
                    more = os.preadv(file.fileno(), [whole[done:]], where)
                    if not more:
                        raise RowsError(f"{self.path}: is shorter than it was when it was opened")
                    done += more
        return _finite(torch.from_numpy(out), self.name)


class CacheRows(Rows):
    """The latents of a cache, flattened: (L, H) -> L*H, (C, h, w) -> C*h*w; as the cache has them, not normalised.

    places: which of its items, in which order; None: all. seed: of caches that hold moments, the rows are draws (the
    same in each pass, of (seed, place) alone), for None the means. CacheError where an item cannot be read.
    """

    def __init__(self, cache: LatentCache, places: Any = None, seed: int | None = None) -> None:
        self.cache, self.seed, self.name = cache, seed, str(cache.path)
        self.places = np.arange(len(cache)) if places is None else np.asarray(places, dtype=np.int64)
        if self.places.ndim != 1 or not len(self.places):
            raise RowsError(f"{self.name}: expected at least one place of its items, got {self.places.shape}")
        if self.places.min() < 0 or self.places.max() >= len(cache):
            low, high = self.places.min(), self.places.max()
            raise RowsError(f"{self.name}: places must lie in 0 .. {len(cache) - 1}, got {low} .. {high}")
        self.dim = int(np.prod(cache.shape))

    def __len__(self) -> int:
        return len(self.places)

    def take(self, places: np.ndarray) -> Tensor:
        which = self.places[places]
        items = self.cache.read(which)
        if self.cache.kind.startswith("mean"):
            if self.seed is None:
                items = items.chunk(2, dim=1)[0]
            else:
                noise = np.empty((len(which), *self.cache.shape), dtype=np.float32)
                for row, i in zip(noise, which.tolist()):
                    rng_of(self.seed, 0, i, NOISE).standard_normal(dtype=np.float32, out=row)
                items = drawn(items, self.cache.kind, torch.from_numpy(noise))
        return _finite(items.reshape(len(which), self.dim), self.name)


def _finite(block: Tensor, name: str) -> Tensor:
    # a sum is quicker than a minimum and a maximum; one that overflows says nothing
    if block.numel() and not block.sum().isfinite() and not torch.stack(torch.aminmax(block)).isfinite().all():
        raise RowsError(f"{name}: holds values that are not finite; leave those samples out")
    return block


def _write(rows: Rows, path: Path) -> None:
    with path.open("wb") as file:
        header = {"descr": "<f4", "fortran_order": False, "shape": (len(rows), rows.dim)}
        npy.write_array_header_1_0(file, header)
        for block in rows.blocks():
            file.write(np.ascontiguousarray(block.float().numpy()).astype("<f4", copy=False).tobytes())
