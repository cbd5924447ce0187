# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""What a source of training images is, whatever it reads: samples in a fixed order, each read directly.

    sources.py (files), tars.py (tars of webdataset)  ->  Source  ->  loader.py

A source holds no open file: names lie in one block of bytes, places in arrays, so that it is cheap to send to worker
processes, and each read opens its file anew, so that threads and forked processes never share a position in one.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from maetok_fast.data.images import SUFFIXES

__all__ = ["MAX_CAPTION", "DataError", "Names", "Source", "read_part"]

MAX_CAPTION = 1 << 20  # bytes: what is longer is no caption, and is cut


class DataError(ValueError):
    """Training data that cannot be used; the message names the file or the sample, and what was expected."""


class Names(Sequence[str]):
    """Strings in one block of bytes: a million of them are two objects, not a million."""

    def __init__(self, names: Iterable[str]) -> None:
        parts = [name.encode("utf-8", "surrogateescape") for name in names]  # names of files may be no UTF-8
        self.block = b"".join(parts)
        self.ends = np.cumsum([0] + [len(part) for part in parts], dtype=np.int64)

    def __len__(self) -> int:
        return len(self.ends) - 1

    def __getitem__(self, i):  # type: ignore[no-untyped-def]  # Sequence's overloads; slices have no use here
        if not 0 <= i < len(self):
            raise IndexError(f"{i} is not in [0, {len(self)})")
        return self.block[self.ends[i] : self.ends[i + 1]].decode("utf-8", "surrogateescape")


class Source(ABC):
    """Samples 0 .. len - 1 in a fixed order.

    names: unique; sizes: bytes of each image; labels: whole numbers of at least 0, of all samples or of none;
    classes: their names, where folders give them; captioned: some sample has a caption; passed_over: samples that were
    left out because they have no image.
    """

    def __init__(
        self,
        path: str,
        names: Iterable[str],
        sizes: Iterable[int],
        labels: Sequence[int | None],
        classes: Sequence[str] = (),
        captioned: bool = False,
        passed_over: int = 0,
    ) -> None:
        self.path, self.classes, self.captioned, self.passed_over = path, tuple(classes), captioned, passed_over
        self._names = Names(names)
        self._sizes = np.array(list(sizes), dtype=np.int64)
        if not len(self):
            over = f" ({passed_over} samples have none)" if passed_over else ""
            raise DataError(f"{path}: no images in it{over}; expected files ending in {', '.join(SUFFIXES)}")
        without = next((i for i, label in enumerate(labels) if label is None), None)
        self._labels: np.ndarray | None = None
        if without is None:
            self._labels = np.array(labels, dtype=np.int64)
        elif any(label is not None for label in labels):
            raise DataError(f"{path}: {self.name(without)} has no label and others have; label all of them or none")

    def __len__(self) -> int:
        return len(self._names)

    @property
    def labelled(self) -> bool:
        return self._labels is not None

    def name(self, i: int) -> str:
        """Of a sample: unique, and the same wherever the data lies."""
        return self._names[i]

    def label(self, i: int) -> int | None:
        return None if self._labels is None else int(self._labels[i])

    @abstractmethod
    def read(self, i: int) -> bytes:
        """The image's file. ImageError naming it where it cannot be read."""

    def caption(self, i: int) -> str | None:
        """UTF-8 text without white space around it; None where there is none. DataError where it cannot be read."""
        content = self._caption(i) if self.captioned else None
        if content is None:
            return None
        try:
            return content.decode("utf-8").strip()
        except UnicodeDecodeError as error:
            raise DataError(f"the caption of {self.name(i)} is no UTF-8 ({error.reason})") from None

    @abstractmethod
    def _caption(self, i: int) -> bytes | None: ...

    def fingerprint(self) -> str:
        """64 hexadecimal digits over all names, sizes and labels, in order."""
        digest = hashlib.sha256(self._names.block)
        for array in (self._names.ends, self._sizes, self._labels):
            digest.update(b"" if array is None else array.astype("<i8").tobytes())
        return digest.hexdigest()


def read_part(file: str | Path, start: int, size: int) -> bytes:
    """`size` bytes of a file; OSError where it has fewer."""
    with open(file, "rb", buffering=0) as stream:
        stream.seek(start)
        parts = []
        while size > 0:
            part = stream.read(size)
            if not part:
                raise OSError(f"{file} ends {size} bytes too early: it has changed since it was opened")
            parts.append(part)
            size -= len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)
