# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""The layouts of latent caches, each told by what lies in its folder, and `open_cache`.

    lightningdit  latents_rank{rr:02d}_shard{sss:03d}.safetensors (LightningDiT, VTP, SFD, ours): lightningdit.py
    repa          00000/img-mean-std-00000000.npy and dataset.json {"labels": [[path, int], ...]}, in vae-sd/ or itself
    repa-e        <name>.h5 and <name>_h5.json, the names of its datasets; their order is the sorted one
    mar           <class>/<file>.npz: moments, moments_flip
    dc-ae         <class>/<stem>.npy: (C, h, w), scaled already

Labels of folders are the places of their sorted names, as torchvision's ImageFolder numbers them. No pickle is ever
opened.
"""

from __future__ import annotations

import fnmatch
import json
import os
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from maetok_fast.data.caches.cache import CacheError, LatentCache
from maetok_fast.data.caches.lightningdit import RECORD, SHARD_NAME, LightningDiTCache
from maetok_fast.data.samples import Names

__all__ = ["FORMATS", "find_cache", "open_cache"]

MOST_BYTES = 2**28  # of one item: what claims more is no latent


class _Files(LatentCache):
    """Layouts of one file an image."""

    pattern: ClassVar[str]

    def _open(self) -> None:
        found = []
        for folder, _, files in os.walk(self.path):
            inner = Path(folder).relative_to(self.path).as_posix()
            found += [name if inner == "." else f"{inner}/{name}" for name in fnmatch.filter(files, self.pattern)]
        found.sort(key=lambda name: name.split("/"))
        self._ending = Path(self.pattern).suffix
        self.names = Names(name.removesuffix(self._ending) for name in found)
        self.labels = self._labels()

    def _file(self, i: int) -> Path:
        return self.path / f"{self.names[i]}{self._ending}"

    def _labels(self) -> np.ndarray | None:
        """By the folder that a file lies in."""
        classes = [name.split("/")[0] if "/" in name else None for name in self.names]
        if None in classes:
            return None
        places = {c: i for i, c in enumerate(sorted(set(classes), key=str))}
        return np.array([places[c] for c in classes], dtype=np.int64)

    def stored(self, i: int, flip: bool = False) -> np.ndarray:
        return _array(self._file(i))


class REPACache(_Files):
    format = "repa"
    stated = "mean_std"
    pattern = "img-mean-std-*.npy"

    def __init__(self, path: Path, moments: str | None = None) -> None:
        inner = path / "vae-sd"
        super().__init__(inner if inner.is_dir() else path, moments)

    def _labels(self) -> np.ndarray | None:
        places = [p for p in (self.path / "dataset.json", self.path.parent / "dataset.json") if p.is_file()]
        return None if not places else _told_labels(_json(places[0]), self.names, places[0])


class MARCache(_Files):
    format = "mar"
    stated = "mean_logvar"
    pattern = "*.npz"

    def _open(self) -> None:
        super()._open()
        self.flips = bool(self.names) and "moments_flip.npy" in _members(self._file(0))

    def stored(self, i: int, flip: bool = False) -> np.ndarray:
        return _member(self._file(i), "moments_flip" if flip else "moments")


class DCAECache(_Files):
    format = "dc-ae"
    pattern = "*.npy"

    def _kind(self, moments: str | None) -> str:
        if moments is not None:
            raise CacheError(f"{self.path}: a dc-ae cache holds scaled latents, no moments")
        return "scaled"


class REPAECache(LatentCache):
    """The .h5 file itself, or a folder with one that has its names beside."""

    format = "repa-e"
    stated = "mean_std"

    def _open(self) -> None:
        h5py = _h5py()
        if self.path.is_dir():
            self.path = _h5_files(self.path)[0]
        self._file = _H5File(self.path)
        self._file.opened()
        names = _json(_names_of(self.path))
        if not isinstance(names, list) or not all(isinstance(n, str) and n for n in names):
            raise CacheError(f"{_names_of(self.path)}: expected a list of names")
        # as REPA-E's loader pairs them with images: several processes may have written them in another order
        keys = sorted(n for n in names if not n.endswith(".json"))
        own: set[str] = set()
        for key in keys:
            parts = key.split("/")
            for part in ("/".join(parts[:n]) for n in range(1, len(parts) + 1)):
                if part not in own and not self._is_own(part, h5py.HardLink):
                    raise CacheError(f"{self.path}: {key!r}, which {_names_of(self.path).name} lists, is not in it")
                own.add(part)
        self._keys = Names(keys)
        self.names = Names(Path(key).with_suffix("").as_posix() for key in keys)
        self.labels = self._labels()

    def _is_own(self, key: str, link: type) -> bool:
        """Links may lead out of the file: what is not its own is not followed."""
        try:
            return isinstance(self._file.opened().get(key, getlink=True), link)
        except Exception as error:  # h5py passes on whatever HDF5 says, as four types
            raise CacheError(f"{self.path}: {key} cannot be read ({error})") from error

    def _labels(self) -> np.ndarray | None:
        beside = self.path.with_name("dataset.json")
        if beside.is_file():
            return _told_labels(_json(beside), self.names, beside)
        try:
            there = "dataset.json" in self._file.opened()
            inside = json.loads(bytes(self._array("dataset.json")).decode()) if there else None
        except (ValueError, RuntimeError, OSError) as error:
            raise CacheError(f"{self.path}: its dataset.json cannot be read ({error})") from error
        return None if inside is None else _told_labels(inside, self.names, self.path)

    def stored(self, i: int, flip: bool = False) -> np.ndarray:
        return self._array(self._keys[i])

    def _array(self, key: str) -> np.ndarray:
        try:
            found = self._file.opened()[key]
            if found.external or found.is_virtual:
                raise ValueError("its values lie in other files, which are not followed")
            if found.nbytes > MOST_BYTES:
                raise ValueError(f"{found.nbytes} bytes are no item")
            return np.asarray(found)
        except Exception as error:  # as above
            raise CacheError(f"{self.path}: {key} cannot be read ({error})") from error


class _H5File:
    """Opened anew in each process that reads: HDF5's own state is not meant to be forked, nor can it be sent."""

    def __init__(self, path: Path) -> None:
        self.path, self._process, self._file = path, 0, None

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "_process": 0, "_file": None}

    def opened(self) -> Any:
        """h5py.File. CacheError where it is none."""
        if self._process != os.getpid():
            try:
                self._file = _h5py().File(self.path, "r")
            except OSError as error:
                raise CacheError(f"{self.path}: not a complete HDF5 file ({error})") from error
            self._process = os.getpid()
        return self._file


# ---- which it is --------------------------------------------------------------------------------------------------


def _has(path: Path, pattern: str) -> bool:
    return path.is_dir() and next((True for p in path.rglob(pattern) if p.is_file()), False)


def _is_mar(path: Path) -> bool:
    first = next((p for p in path.glob("*/*.npz")), None) if path.is_dir() else None
    return first is not None and "moments.npy" in _members(first)


def _h5_files(path: Path) -> list[Path]:
    """REPA-E's .h5 files that have their names beside; of those in a folder not the images'."""
    if path.is_dir():
        return [p for p in sorted(path.glob("*.h5")) if p.stem != "images" and _names_of(p).is_file()]
    return [path] if path.suffix == ".h5" and _names_of(path).is_file() else []


# in the order in which they are asked: the more telling first
FORMATS: dict[str, tuple[Callable[[Path], bool], type[LatentCache]]] = {
    "lightningdit": (
        lambda path: path.is_dir() and any(SHARD_NAME.fullmatch(p.name) or p.name == RECORD for p in path.iterdir()),
        LightningDiTCache,
    ),
    "repa-e": (lambda path: bool(_h5_files(path)), REPAECache),
    "repa": (lambda path: _has(path, REPACache.pattern), REPACache),
    "mar": (_is_mar, MARCache),
    "dc-ae": (lambda path: _has(path, DCAECache.pattern), DCAECache),
}


def find_cache(path: str | Path) -> str | None:
    """The layout of the cache at `path`, or None where it is none."""
    path = Path(path)
    return next((name for name, (recognise, _) in FORMATS.items() if path.exists() and recognise(path)), None)


def open_cache(
    path: str | Path, format: str | None = None, *, moments: str | None = None, images: int | None = None
) -> LatentCache:
    """The latent cache at `path`, a folder, or REPA-E's .h5 file.

    format: of FORMATS; None: told by what lies there. moments: "std" or "logvar", where files contradict their layout.
    images: of a lightningdit cache, how many there really are (ImageNet's train: 1281167). CacheError naming the file.
    """
    path = Path(path).expanduser()
    if format is None:
        format = find_cache(path)
    if format is None:
        known = ", ".join(FORMATS)
        raise CacheError(f"{path}: no latent cache of a known layout ({known}), or no such folder")
    if format not in FORMATS:
        raise ValueError(f"unknown cache format {format!r}: expected one of {', '.join(FORMATS)}")
    recognise, kind = FORMATS[format]
    if not path.exists() or not recognise(path):
        raise CacheError(f"{path}: no {format} cache: the files of that layout are not there")
    if issubclass(kind, LightningDiTCache):
        return kind(path, moments, images)
    if images is not None:
        raise CacheError(f"{path}: images= is for lightningdit caches, whose sampler repeats some; this is {format}")
    return kind(path, moments)


# ---- files ---------------------------------------------------------------------------------------------------------


def _names_of(h5: Path) -> Path:
    return h5.with_name(f"{h5.stem}_h5.json")


def _h5py() -> Any:
    try:
        import h5py
    except ImportError as error:
        raise CacheError("REPA-E's caches are HDF5 files, which need h5py: pip install h5py") from error
    return h5py


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CacheError(f"{path}: not readable as JSON ({error})") from error


def _told_labels(content: Any, names: Sequence[str], where: Path) -> np.ndarray | None:
    """Of dataset.json: by path, or, where paths are of images, in sorted order, as REPA pairs them."""
    pairs = content.get("labels") if isinstance(content, dict) else None
    if pairs is None:
        return None
    fits = isinstance(pairs, (list, dict))
    items = list(pairs.items()) if isinstance(pairs, dict) else pairs
    fits = fits and all(isinstance(p, (list, tuple)) and len(p) == 2 and type(p[1]) is int for p in items)
    if not fits:
        raise CacheError(f'{where}: expected "labels": a list of [path, integer]')
    told = {Path(str(name)).with_suffix("").as_posix(): label for name, label in items}
    if all(name in told for name in names):
        return np.array([told[name] for name in names], dtype=np.int64)
    if len(told) != len(names):
        raise CacheError(f"{where}: labels for {len(told)} files, and {len(names)} latents that they do not name")
    return np.array([label for _, label in sorted(told.items())], dtype=np.int64)


def _array(path: Path) -> np.ndarray:
    try:
        with open(path, "rb") as file:  # mapped, an item of usual size takes half as long again
            if os.fstat(file.fileno()).st_size > MOST_BYTES:
                raise ValueError("it is larger than an item")
            return np.asarray(np.lib.format.read_array(file, allow_pickle=False))
    except Exception as error:  # numpy parses the header as Python, and passes on what its tokenizer raises
        raise CacheError(f"{path}: no array file that can be read ({error})") from error


def _members(path: Path) -> list[str]:
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.namelist()
    except Exception as error:  # a dozen types on bad bytes
        raise CacheError(f"{path}: no complete .npz file ({error})") from error


def _member(path: Path, name: str) -> np.ndarray:
    try:
        with zipfile.ZipFile(path) as archive:
            entry = archive.getinfo(f"{name}.npy")
            if entry.file_size > MOST_BYTES:
                raise ValueError("it unpacks to more than an item")
            with archive.open(entry) as file:
                return np.asarray(np.lib.format.read_array(file, allow_pickle=False))
    except KeyError:
        raise CacheError(f"{path}: has no {name}; it holds {', '.join(_members(path))}") from None
    except Exception as error:  # zlib's, zipfile's, numpy's on damaged members
        raise CacheError(f"{path}: {name} cannot be read ({error})") from error
