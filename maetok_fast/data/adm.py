# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""ADM's .npz files: references (VIRTUAL_imagenet256_labeled.npz) and samples, read in flat memory.

    arr_0       uint8 (N, H, W, 3): the images
    arr_1       labels, of samples
    mu, sigma   (D,), (D, D): Inception statistics for FID; mu_s, sigma_s: for sFID

A .npz is a zip of .npy files, which numpy opens whole: a reference is 10,000 to 50,000 images. Here a member is read as
a stream, a few images at a time. Members are stored or deflated; no pickle is opened.
"""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib import format as npy

__all__ = ["AdmError", "AdmFile"]

STATISTICS = ("mu", "sigma", "mu_s", "sigma_s")


class AdmError(ValueError):
    """A file that is none of ADM's; the message names it and what was expected."""


class AdmFile:
    """One file. shape: (N, H, W, 3) of its images, None where it has none (statistics alone). names: its members."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        try:
            with zipfile.ZipFile(self.path) as archive:
                self.names = [n.removesuffix(".npy") for n in archive.namelist() if n.endswith(".npy")]
        except Exception as error:  # a dozen types on bad bytes
            raise AdmError(f"{self.path}: no complete .npz file ({error})") from error
        self.shape: tuple[int, ...] | None = None
        if "arr_0" in self.names:
            with self._stream("arr_0") as (_, shape, dtype):
                if dtype != np.uint8 or len(shape) != 4 or shape[3] != 3:
                    raise AdmError(f"{self.path}: arr_0 is {dtype} {shape}, expected uint8 (N, H, W, 3)")
                self.shape = shape
        elif not {"mu", "sigma"} <= set(self.names):
            raise AdmError(
                f"{self.path}: holds {', '.join(self.names) or 'nothing'}; expected arr_0 (images), or mu and sigma"
            )

    def __len__(self) -> int:
        return 0 if self.shape is None else self.shape[0]

    def images(self, batch: int = 64) -> Iterator[np.ndarray]:
        """(B, H, W, 3) uint8, in order."""
        if self.shape is None:
            raise AdmError(f"{self.path}: has statistics and no images")
        one = int(np.prod(self.shape[1:]))
        with self._stream("arr_0") as (stream, shape, _):
            for start in range(0, shape[0], batch):
                count = min(batch, shape[0] - start)
                content = self._bytes(stream, count * one)
                yield np.frombuffer(content, dtype=np.uint8).reshape(count, *shape[1:])

    def statistics(self, spatial: bool = False) -> tuple[np.ndarray, np.ndarray] | None:
        """(mu, sigma) fp64 as they are stored, of sFID with `spatial`; None where they are not."""
        names = ("mu_s", "sigma_s") if spatial else ("mu", "sigma")
        if not set(names) <= set(self.names):
            return None
        mu, sigma = (self.array(name).astype(np.float64) for name in names)
        if mu.ndim != 1 or sigma.shape != (len(mu), len(mu)):
            raise AdmError(
                f"{self.path}: {names[0]} {mu.shape} and {names[1]} {sigma.shape} are no mean and covariance"
            )
        return mu, sigma

    def labels(self) -> np.ndarray | None:
        """arr_1 (N,) int64 of a file of samples; None where there is none."""
        if "arr_1" not in self.names:
            return None
        labels = self.array("arr_1")
        if labels.shape != (len(self),) or labels.dtype.kind not in "iu":
            raise AdmError(f"{self.path}: arr_1 is {labels.dtype} {labels.shape}, expected {len(self)} integers")
        return labels.astype(np.int64)

    def array(self, name: str) -> np.ndarray:
        """A member whole."""
        with self._stream(name) as (stream, shape, dtype):
            content = self._bytes(stream, int(np.prod(shape, dtype=np.int64)) * dtype.itemsize)
            return np.frombuffer(content, dtype=dtype).reshape(shape).copy()

    def _stream(self, name: str) -> _Member:
        return _Member(self.path, name)

    def _bytes(self, stream: Any, count: int) -> bytes:
        try:
            content = bytes(stream.read(count))
        except Exception as error:  # zlib's and zipfile's own
            raise AdmError(f"{self.path}: damaged ({error})") from error
        if len(content) != count:
            raise AdmError(f"{self.path}: ends {count - len(content)} bytes too early")
        return content


class _Member:
    """A .npy member, opened behind its header: (stream, shape, dtype)."""

    def __init__(self, path: Path, name: str) -> None:
        self.path, self.name = path, name

    def __enter__(self) -> tuple[Any, tuple[int, ...], np.dtype]:
        try:
            self.archive = zipfile.ZipFile(self.path)
            self.stream = self.archive.open(f"{self.name}.npy")
            version = npy.read_magic(self.stream)
            read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
            shape, fortran, dtype = read(self.stream)
        except Exception as error:  # a dozen types on bad bytes
            raise AdmError(f"{self.path}: {self.name} is no array that can be read ({error})") from error
        if fortran or dtype.hasobject:
            raise AdmError(f"{self.path}: {self.name} is stored as {'objects' if dtype.hasobject else 'columns'}")
        return self.stream, shape, dtype

    def __exit__(self, *exc: object) -> None:
        self.stream.close()
        self.archive.close()
