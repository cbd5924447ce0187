# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""Where training images come from: an ordered list of samples that is looked through once, each then read directly.

open_source(path) -> Source     a folder of class folders, a flat folder, a list of files: here
                                tars of webdataset: tars.py
source.read(i), label(i), caption(i), name(i); source.fingerprint() tells whether a resumed run has the same samples
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from maetok_fast.data.images import SUFFIXES, ImageError, reading
from maetok_fast.data.installed import INSTALLED, open_installed
from maetok_fast.data.samples import MAX_CAPTION, DataError, Source, read_part
from maetok_fast.data.tars import TarSource, expand

__all__ = ["DataError", "FileSource", "Source", "open_source"]

# pictures of what lies beside them, by what their commands write too: sample, reconstruct, evaluate --reconstruction
OVERVIEWS = {"grid.png": "run.json", "compare.png": "metrics.csv", "worst.png": "per_image.csv"}


class FileSource(Source):
    """Images in files of their own: names are paths below `root`, or whole ones; captions, files of the same stem."""

    def __init__(
        self,
        path: str,
        root: Path,
        found: Sequence[tuple[str, int]],
        labels: Sequence[int | None],
        captions: Sequence[bool],
        classes: Sequence[str] = (),
    ) -> None:
        self.root = root
        self._has_caption = np.array(captions, dtype=bool)
        super().__init__(path, (n for n, _ in found), (s for _, s in found), labels, classes, any(captions))

    def read(self, i: int) -> bytes:
        name = self.name(i)
        with reading(name):
            return (self.root / name).read_bytes()

    def _caption(self, i: int) -> bytes | None:
        if not self._has_caption[i]:
            return None
        file = (self.root / self.name(i)).with_suffix(".txt")
        try:
            return read_part(file, 0, min(file.stat().st_size, MAX_CAPTION))
        except OSError as error:
            raise DataError(f"the caption {file} cannot be read ({error.strerror or error})") from error


def open_source(path: str | Path) -> Source:
    """The source that a path names.

    folder          class folders, each with images at any depth: a class's label is its place among the sorted names
    flat folder     images in it and no class folders: no labels
    folder of .tar  the tars of webdataset in it, sorted; so are a tar, a pattern (train-*.tar) and ranges
                    (train-{0000..0012}.tar)
    list (.txt)     one path a line, from the list's folder or absolute, and after a TAB its label where it has one
    a name          "photographs", "fashion-mnist", "fashion-mnist:test": what a package manager installs (installed.py)

    Folders whose names start with a dot are not looked into, links are followed; the overview pictures that this
    package's commands write beside images are none of them. DataError, naming what is wrong, where
    it is none of these or has no images.
    """
    text = os.fspath(path)
    place = Path(text)
    if text in INSTALLED and not place.exists():
        found = open_installed(text)
        return found if isinstance(found, Source) else _files(text, found)
    try:
        if place.is_dir():
            entries = os.listdir(place)
            tars = sorted(name for name in entries if _is_tar(name))
            if not tars:
                return _folder(place)
            loose = next((name for name in sorted(entries) if is_image(name)), None)
            if loose is not None:
                raise DataError(f"{text}: holds tars ({tars[0]}) and images ({loose}); give one of them")
            return TarSource(text, [place / name for name in tars])
        if place.is_file() and place.suffix.lower() == ".txt":
            return _list(place)
        if place.is_file():
            return TarSource(text, [place])
        tars = expand(text)
        return TarSource(text, [Path(name) for name in tars])
    except (OSError, ImageError) as error:
        raise DataError(f"{text}: {error}") from error
    except ValueError as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{text!r} is no path ({error})") from error  # a NUL in it


def _files(path: str, files: Sequence[Path]) -> FileSource:
    """Files from anywhere, by their names alone: those of different folders differ."""
    whole = [(str(file), file.stat().st_size) for file in files]
    return FileSource(path, Path("/"), whole, [None] * len(whole), [False] * len(whole))


def is_image(name: str) -> bool:
    return name.lower().endswith(SUFFIXES) and not name.startswith(".")


def _is_tar(name: str) -> bool:
    return not name.startswith(".") and re.search(r"\.(tar|tgz|tar\.\w+)$", name.lower()) is not None


def _folder(root: Path) -> FileSource:
    scanned: list[tuple[str, int]] = []
    texts: set[str] = set()
    _scan(root, "", scanned, texts, (os.path.realpath(root),))
    overviews = {name for name, beside in OVERVIEWS.items() if (root / beside).is_file()}
    found = sorted(item for item in scanned if item[0] not in overviews)
    loose = next((name for name, _ in found if "/" not in name), None)
    folders = sorted(e.name for e in os.scandir(root) if not e.name.startswith(".") and e.is_dir())
    filled = {name.split("/", 1)[0] for name, _ in found if "/" in name}
    classes: list[str] = []
    labels: list[int | None] = [None] * len(found)
    if loose is not None and filled:
        raise DataError(f"{root}: images lie in it ({loose}) and in folders ({min(filled)}): are the folders classes?")
    if filled:
        empty = next((name for name in folders if name not in filled), None)
        if empty is not None:
            raise DataError(f"{root}: class folder {empty} has no images and would shift the labels; remove it")
        classes = folders
        number = {name: i for i, name in enumerate(classes)}
        labels = [number[name.split("/", 1)[0]] for name, _ in found]
    captions = [os.path.splitext(name)[0] + ".txt" in texts for name, _ in found]
    return FileSource(str(root), root, found, labels, captions, classes)


def _scan(folder: Path, prefix: str, found: list[tuple[str, int]], texts: set[str], above: tuple[str, ...]) -> None:
    """Images and .txt files at any depth, under their paths from the root."""
    deeper = []
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if is_image(entry.name) and entry.is_file():
                found.append((prefix + entry.name, entry.stat().st_size))
            elif entry.name.endswith(".txt"):
                texts.add(prefix + entry.name)
            elif entry.is_dir():
                deeper.append(entry)
    for entry in deeper:
        real = os.path.realpath(entry.path) if entry.is_symlink() else os.path.join(above[-1], entry.name)
        if real in above:
            raise DataError(f"{entry.path}: a link to a folder that holds it")
        _scan(Path(entry.path), f"{prefix}{entry.name}/", found, texts, (*above, real))


def _list(file: Path) -> FileSource:
    found: list[tuple[str, int]] = []
    labels: list[int | None] = []
    lines: dict[str, int] = {}
    captions = []
    try:
        rows = file.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise DataError(f"{file}: is no UTF-8 text ({error.reason})") from None
    for number, row in enumerate(rows, 1):
        name, *rest = row.split("\t")
        if not row.strip():
            continue
        where = f"{file}, line {number}"
        if len(rest) > 1 or (rest and not re.fullmatch(r"\s*\d{1,18}\s*", rest[0], re.ASCII)):
            raise DataError(f"{where}: expected a path, or a path, a TAB and a label of at least 0, got {row!r}")
        first = lines.setdefault(name, number)
        if first != number:
            raise DataError(f"{where}: {name} stands in line {first} already")
        place = file.parent / name
        try:
            if not place.is_file():
                raise DataError(f"{where}: {place} is no file; paths start at the list's folder")
            found.append((name, place.stat().st_size))
            captions.append(place.suffix != ".txt" and place.with_suffix(".txt").is_file())
        except (OSError, ValueError) as error:  # ValueError: a NUL in it, or DataError
            raise error if isinstance(error, DataError) else DataError(f"{where}: {error}") from error
        labels.append(int(rest[0]) if rest else None)
    return FileSource(str(file), file.parent, found, labels, captions)
