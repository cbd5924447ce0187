# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""Images that a package manager installs, as sources by name.

    photographs                        those inside the wheels of scikit-image and scikit-learn: a handful, for trying
    fashion-mnist, fashion-mnist:test  60,000 and 10,000 labelled images of 28 x 28 (arXiv 1708.07747), Debian's package

Fashion-MNIST's files are IDX (LeCun): big-endian, a magic number that tells the element type and the number of
dimensions, the sizes, the bytes. Its images are read as PNG, as everything else is a file of some image format.
"""

from __future__ import annotations

import gzip
import io
import os
import struct
import zlib
from pathlib import Path

import numpy as np

from maetok_fast.data.images import bundled_photographs
from maetok_fast.data.samples import DataError, Source, read_part

__all__ = ["INSTALLED", "IdxSource", "open_installed"]

INSTALLED = ("photographs", "fashion-mnist", "fashion-mnist:test")
FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")
_GET = "apt install dataset-fashion-mnist (Debian, Ubuntu), or put its four files, *-ubyte.gz, there"
_CLASSES = ("t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")


class IdxSource(Source):
    """Images (N, H, W) uint8 and labels (N,) in IDX files, compressed by gzip or not; all are kept in memory."""

    def __init__(self, path: str, images: Path, labels: Path, classes: tuple[str, ...] = ()) -> None:
        self.pixels, numbers = read_idx(images, 3), read_idx(labels, 1)
        if len(self.pixels) != len(numbers):
            raise DataError(f"{path}: {len(self.pixels)} images in {images}, {len(numbers)} labels in {labels}")
        count = len(numbers)
        names = (f"{i:05d}" for i in range(count))
        super().__init__(path, names, [self.pixels[0].size if count else 0] * count, numbers.tolist(), classes, False)

    def read(self, i: int) -> bytes:
        """As a PNG."""
        from PIL import Image

        file = io.BytesIO()
        Image.fromarray(self.pixels[i]).save(file, "PNG", compress_level=0)
        return file.getvalue()

    def _caption(self, i: int) -> bytes | None:
        return None


def read_idx(path: Path, dimensions: int) -> np.ndarray:
    """The array of bytes in an IDX file. DataError naming the file where it is none, or cut short."""
    try:
        content = read_part(path, 0, os.path.getsize(path))
        content = gzip.decompress(content) if path.suffix == ".gz" else content
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read ({error})") from error
    head = 4 + 4 * dimensions
    if len(content) < head or content[:4] != bytes((0, 0, 8, dimensions)):
        raise DataError(f"{path}: is no IDX file of bytes with {dimensions} dimension(s)")
    shape = struct.unpack(f">{dimensions}I", content[4:head])
    if len(content) - head != int(np.prod(shape, dtype=object)):
        raise DataError(f"{path}: holds {len(content) - head} bytes, its header says {' x '.join(map(str, shape))}")
    return np.frombuffer(content, np.uint8, offset=head).reshape(shape)


def open_installed(name: str) -> Source | list[Path]:
    """The source of one of INSTALLED, or the files that one is made of. DataError saying how to get what is missing."""
    if name == "photographs":
        return bundled_photographs()
    part = "t10k" if name.endswith(":test") else "train"
    files = [FASHION_MNIST / f"{part}-{kind}-ubyte.gz" for kind in ("images-idx3", "labels-idx1")]
    missing = next((f for f in files if not f.is_file()), None)
    if missing is not None:
        raise DataError(f"{name}: {missing} is not there; {_GET}")
    return IdxSource(name, files[0], files[1], _CLASSES)
