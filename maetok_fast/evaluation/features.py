# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""Features of a whole set, in parts of a fixed number of images: on disk, resumable and shared, or in memory.

    extract_parts(set, extractor, folder, process=r, processes=W)     writes the missing parts p with p mod W = r
    collect(set, extractor, folder)                                   the same alone, then Features over all parts

    folder/<extractor>-<fingerprint>/part-00000.npz      one array an output; written whole or not at all
                                     about.json          what the fingerprint is of

The fingerprint is of the set, the extractor (weights, resize, precision) and the size of a part: parts of anything else
lie in another folder. Parts do not depend on who makes them, and are merged in their order.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from maetok_fast.evaluation.extractor import Extractor
from maetok_fast.evaluation.moments import Moments
from maetok_fast.evaluation.sets import ImageSet, SetError
from maetok_fast.pipeline.run import RunError, make_folder, written

__all__ = ["PART", "Features", "collect", "extract_parts", "keep"]

PART = 512  # images: at 2048 + 2023 numbers a file of 8 MB
Tick = Callable[[int], None]


class Features:
    """Rows of `count` images by output ("features", "spatial"), read part by part."""

    def __init__(self, count: int, parts: list[Any]) -> None:
        self.count, self._parts = count, parts

    def __len__(self) -> int:
        return self.count

    def blocks(self, output: str = "features") -> Iterator[np.ndarray]:
        """fp32 (n, D) in order."""
        for part in self._parts:
            yield part[output] if isinstance(part, dict) else _read(part)[output]

    def array(self, output: str = "features") -> np.ndarray:
        """fp32 (N, D) whole: 8 KB an image of Inception's."""
        return np.concatenate(list(self.blocks(output)))

    def moments(self, output: str = "features") -> Moments:
        return Moments.of_blocks(self.blocks(output))


def collect(
    images: ImageSet,
    extractor: Extractor,
    folder: str | Path | None = None,
    *,
    batch: int = 64,
    part: int = PART,
    tick: Tick | None = None,
) -> Features:
    """Features of all images of a set; what lies in the folder is not computed again. tick: called with images done."""
    if folder is None:
        found = [_part(images, extractor, at, batch, part, tick) for at in range(_parts(images, part))]
        return Features(len(images), found)
    extract_parts(images, extractor, folder, batch=batch, part=part, tick=tick)
    place = _place(images, extractor, Path(folder), part)
    for left in place.glob(".writing-*"):  # of processes that were killed; nobody writes any more
        left.unlink(missing_ok=True)
    return Features(len(images), [_name(place, at) for at in range(_parts(images, part))])


def extract_parts(
    images: ImageSet,
    extractor: Extractor,
    folder: str | Path,
    *,
    batch: int = 64,
    part: int = PART,
    process: int = 0,
    processes: int = 1,
    tick: Tick | None = None,
) -> None:
    """Writes this process's parts that are not there yet. RunError where the folder cannot be used."""
    place = _place(images, extractor, Path(folder), part)
    make_folder(place)
    if process == 0:
        about = {"set": images.path, "fingerprint": images.fingerprint, "part": part, **extractor.about}
        keep(place / "about.json", lambda p: p.write_text(json.dumps(about, indent=1) + "\n"))
    for at in range(process, _parts(images, part), processes):
        to = _name(place, at)
        if to.exists():
            if tick is not None:
                tick(min(part, len(images) - at * part))
            continue
        arrays = _part(images, extractor, at, batch, part, tick)
        keep(to, lambda p, arrays=arrays: _save(p, arrays))  # type: ignore[misc]


def keep(path: Path, write: Callable[[Path], Any]) -> None:
    """Writes a file whole or not at all; RunError naming it where there is no room, or no right to."""
    try:
        written(path, write)
    except OSError as error:
        raise RunError(
            f"{path}: cannot be written ({error.strerror or error}); make room, or give another --out; the same "
            "command goes on"
        ) from error


def _parts(images: ImageSet, part: int) -> int:
    if not len(images):
        raise SetError(f"{images.path}: has statistics and no images")
    if part < 1:
        raise ValueError(f"a part has at least 1 image, got {part}")
    return -(-len(images) // part)


def _place(images: ImageSet, extractor: Extractor, folder: Path, part: int) -> Path:
    whole = f"{images.fingerprint}:{extractor.fingerprint}:{part}"
    return folder / f"{extractor.slug}-{hashlib.sha256(whole.encode()).hexdigest()[:16]}"


def _name(place: Path, at: int) -> Path:
    return place / f"part-{at:05d}.npz"


def _part(
    images: ImageSet, extractor: Extractor, at: int, batch: int, part: int, tick: Tick | None
) -> dict[str, np.ndarray]:
    found: dict[str, list[torch.Tensor]] = {name: [] for name in extractor.outputs}
    for batched in images.batches(at * part, min((at + 1) * part, len(images)), batch):
        for name, rows in extractor.all(batched).items():
            if not rows.isfinite().all():
                raise ValueError(f"{extractor.name}: features of {images.path} are not finite")
            found[name].append(rows)
        if tick is not None:
            tick(len(batched))
    return {name: torch.cat(rows).numpy() for name, rows in found.items()}


def _save(path: Path, arrays: dict[str, np.ndarray]) -> None:
    with open(path, "wb") as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]


def _read(path: Path) -> dict[str, np.ndarray]:
    try:
        with np.load(path) as found:
            return dict(found)
    except Exception as error:  # a dozen types on bad bytes
        raise RunError(f"{path}: cannot be read ({error}); remove it and run again") from error
