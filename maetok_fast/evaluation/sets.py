# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""ImageSet: a folder, tar, list or .npz of images, as uint8 batches in a fixed order.

    open_set(path)             a .npz of ADM's layout, or whatever `data.sources.open_source` opens
      .batches(start, stop)    torch.uint8 (B, 3, H, W)
      .labels, .names          where there are any
      .fingerprint             tells sets apart: of its files' names, sizes, times and the pixels' treatment
      .stored                  an ADM file's statistics, which need no images

Without `size` images are taken as they are, which is what samples and prepared references need, and all must be of one
size; with it they are resized and cropped by `data.images` (PIL), "center" or "adm". Only one batch is in memory.
"""

from __future__ import annotations

import hashlib
import io
import operator
import os
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from maetok_fast.data.adm import AdmFile
from maetok_fast.data.images import CROPS, ImageError, decoded, load_image, opened, reading, to_uint8
from maetok_fast.data.samples import Source
from maetok_fast.data.sources import FileSource, open_source

__all__ = ["ImageSet", "SetError", "open_set"]

_LOOKED_INTO = 64  # samples whose bytes are part of the fingerprint


class SetError(ValueError):
    """A set of images that cannot be evaluated; the message names it and what was expected."""


class ImageSet:
    """See the module. path: what it was opened from. shape: (H, W), None where it has no images. names: one an image,
    without it where they have none. labels: int64 (N,), -1 for none, or None. stored: an ADM file with statistics."""

    def __init__(
        self,
        path: str,
        count: int,
        shape: tuple[int, int] | None,
        fingerprint: str,
        *,
        names: list[str] | None = None,
        labels: np.ndarray | None = None,
        treatment: str = "as they are",
        stored: AdmFile | None = None,
    ) -> None:
        self.path, self.shape, self.fingerprint = path, shape, fingerprint
        self.names, self.labels, self.treatment, self.stored = names, labels, treatment, stored
        self._count = count

    @staticmethod
    def of_array(images: np.ndarray, labels: Any = None, *, path: str = "an array") -> ImageSet:
        """Of uint8 (N, H, W, 3) in memory. SetError where it is none."""
        images = np.asarray(images)
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3 or 0 in images.shape:
            raise SetError(f"{path}: expected uint8 (N, H, W, 3), got {images.dtype} {images.shape}")
        numbers = None if labels is None else np.asarray(labels, dtype=np.int64)
        if numbers is not None and numbers.shape != (len(images),):
            raise SetError(f"{path}: {len(images)} images and labels of shape {numbers.shape}")
        digest = hashlib.sha256(repr(images.shape).encode() + np.ascontiguousarray(images).tobytes())
        return _Array(path, images, numbers, digest.hexdigest())

    def __len__(self) -> int:
        return self._count

    def batches(self, start: int = 0, stop: int | None = None, batch: int = 64) -> Iterator[Tensor]:
        """torch.uint8 (B, 3, H, W) of images start .. stop - 1 in order, B = batch but for the last one."""
        raise SetError(f"{self.path}: has statistics and no images")

    @property
    def lossy(self) -> int:
        """How many of the images are JPEG files, whose artefacts are measured too."""
        return sum(name.lower().endswith((".jpg", ".jpeg")) for name in self.names or ())

    @property
    def labels_known(self) -> bool:
        return self.labels is not None and bool(len(self.labels)) and bool((self.labels >= 0).all())

    def balance(self) -> dict[str, Any] | None:
        """{"classes", "least", "most", "equal"} of the labels; None where there are none. equal: to one image."""
        if self.labels is None or not self.labels_known:
            return None
        _, counts = np.unique(self.labels, return_counts=True)  # labels may be any numbers
        least, most = int(counts.min()), int(counts.max())
        return {"classes": len(counts), "least": least, "most": most, "equal": most - least <= 1}

    def _span(self, start: int, stop: int | None) -> tuple[int, int]:
        stop = len(self) if stop is None else stop
        if not 0 <= start <= stop <= len(self):
            raise IndexError(f"{self.path}: images {start} to {stop} of {len(self)}")
        return start, stop


class _Array(ImageSet):
    def __init__(self, path: str, images: np.ndarray, labels: np.ndarray | None, fingerprint: str) -> None:
        super().__init__(path, len(images), (images.shape[1], images.shape[2]), fingerprint, labels=labels)
        self.images = images

    def batches(self, start: int = 0, stop: int | None = None, batch: int = 64) -> Iterator[Tensor]:
        start, stop = self._span(start, stop)
        for at in range(start, stop, batch):
            yield _channels_first(self.images[at : min(at + batch, stop)])


class _Npz(ImageSet):
    """Of arr_0. A .npz is a stream: reading goes on where it was where that is asked for, else from the beginning."""

    def __init__(self, file: AdmFile, count: int) -> None:
        whole = f"{_checksums(file.path)}:{count}"
        labels = file.labels()
        assert file.shape is not None
        super().__init__(
            str(file.path),
            count,
            (file.shape[1], file.shape[2]),
            hashlib.sha256(whole.encode()).hexdigest(),
            labels=None if labels is None else labels[:count],
            stored=file if count == len(file) and "mu" in file.names else None,
        )
        self.file = file
        self._stream: Iterator[np.ndarray] | None = None
        self._left = np.empty((0, *file.shape[1:]), np.uint8)
        self._at = 0  # of the next image in _left, or behind it in the stream

    def batches(self, start: int = 0, stop: int | None = None, batch: int = 64) -> Iterator[Tensor]:
        start, stop = self._span(start, stop)
        if self._stream is None or start < self._at:
            self._stream, self._left, self._at = self.file.images(64), self._left[:0], 0
        self._take(start - self._at, keep=False)
        while self._at < stop:
            yield _channels_first(self._take(min(batch, stop - self._at)))

    def _take(self, count: int, keep: bool = True) -> np.ndarray:
        parts, had = [], 0
        while had < count:
            if not len(self._left):
                assert self._stream is not None
                self._left = next(self._stream)
            part, self._left = self._left[: count - had], self._left[count - had :]
            had, self._at = had + len(part), self._at + len(part)
            if keep:
                parts.append(part)
        return np.concatenate(parts) if parts else self._left[:0]


class _Files(ImageSet):
    """Of a `Source`: files and tars, decoded by PIL."""

    def __init__(self, source: Source, count: int, size: int | None, crop: str) -> None:
        self.source, self.size, self.crop = source, size, crop
        names = [source.name(i) for i in range(count)]
        labels = np.array([source.label(i) for i in range(count)], np.int64) if source.labelled else None
        treatment = "as they are" if size is None else f"{crop} crop to {size} px, PIL bicubic"
        digest = hashlib.sha256(f"{source.fingerprint()}:{count}:{treatment}".encode())
        for stamp in _stamps(source, names):
            digest.update(stamp)
        shape = (size, size) if size else self._pixels(0).shape[:2]
        super().__init__(
            str(source.path), count, shape, digest.hexdigest(), names=names, labels=labels, treatment=treatment
        )

    def batches(self, start: int = 0, stop: int | None = None, batch: int = 64) -> Iterator[Tensor]:
        start, stop = self._span(start, stop)
        for at in range(start, stop, batch):
            images = []
            for i in range(at, min(at + batch, stop)):
                image = self._pixels(i)
                if image.shape[:2] != self.shape:
                    raise SetError(
                        f"{self.path}: {self.source.name(i)} has {_by(image.shape)} pixels and the first image "
                        f"{_by(self.shape)}; give size= (--size) to resize all of them, or make them one size"
                    )
                images.append(image)
            yield _channels_first(np.stack(images))

    def _pixels(self, i: int) -> np.ndarray:
        name = self.source.name(i)
        try:
            content = self.source.read(i)
            if self.size is not None:
                return to_uint8(load_image(name, self.size, crop=self.crop, content=content)[None])[0]
            with reading(name), opened(io.BytesIO(content)) as image:
                return np.asarray(decoded(image))
        except ImageError as error:
            raise SetError(f"{self.source.path}: {error}; mend or remove it: a set is measured whole") from error


def open_set(
    path: str | os.PathLike[str], *, size: int | None = None, crop: str = "center", limit: int | None = None
) -> ImageSet:
    """The set that a path names.

    a .npz            ADM's layout: arr_0 uint8 (N, H, W, 3), arr_1 labels; or statistics alone (mu, sigma)
    anything else     what `open_source` takes: a folder, a tar, a list, an installed set ("fashion-mnist:test")

    size: resize and crop ("center", "adm") to so many pixels; None: images as they are, of one size. limit: the
    first so many. SetError, AdmError, DataError or ImageError says in a sentence what is wrong.
    """
    if crop not in CROPS:
        raise SetError(f"unknown crop {crop!r}: expected one of {', '.join(CROPS)}")
    for name, value in (("size", size), ("limit", limit)):
        if value is not None and operator.index(value) < 1:
            raise SetError(f"{name} must be at least 1, got {value}")
    text = os.fspath(path)
    if text.lower().endswith(".npz"):
        if not Path(text).exists():
            raise SetError(f"{text}: there is no such file")
        file = AdmFile(text)
        if file.shape is None:
            return ImageSet(text, 0, None, hashlib.sha256(_checksums(file.path).encode()).hexdigest(), stored=file)
        if 0 in file.shape:
            raise SetError(f"{text}: arr_0 is {file.shape}, which has no pixels")
        if size is not None and file.shape[1:3] != (size, size):
            raise SetError(
                f"{text}: its images have {_by(file.shape[1:3])} pixels and are not resized; give the files that it "
                f"was made of, or no size"
            )
        return _Npz(file, min(len(file), limit or len(file)))
    if Path(text).is_file() and not text.lower().endswith((".tar", ".txt", ".tgz", ".gz")):
        raise SetError(f"{text}: expected a folder, a .npz, a .tar or a list (.txt) of images")
    source = open_source(text)
    return _Files(source, min(len(source), limit or len(source)), size, crop)


def _channels_first(images: np.ndarray) -> Tensor:
    # a copy: what a .npz gives is read-only
    return torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)).copy())


def _checksums(path: Path) -> str:
    """A zip's directory holds a CRC-32 of each member: the whole content without reading it."""
    with zipfile.ZipFile(path) as archive:
        return ",".join(f"{i.filename}={i.CRC:08x}/{i.file_size}" for i in archive.infolist())


def _stamps(source: Source, names: list[str]) -> Iterator[bytes]:
    """What names and sizes do not tell: when files were written, and some of the content."""
    if isinstance(source, FileSource):
        for name in names:
            with reading(name):
                yield str((source.root / name).stat().st_mtime_ns).encode()
    for i in range(0, len(names), max(1, len(names) // _LOOKED_INTO)):
        yield hashlib.sha256(source.read(i)).digest()


def _by(shape: Any) -> str:
    return f"{shape[1]} x {shape[0]}"
