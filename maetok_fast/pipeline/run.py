# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""SamplingRun: many pictures of a pipeline as files, by any number of processes, stopped and resumed at any point.

    out/000000.png ...    sample i, written under another name and renamed: what has its name is whole
    out/run.json          what was asked for, and at the end what it cost
    out/grid.png          the first samples, labelled
    out.npz               arr_0 uint8 (N, H, W, 3), arr_1 int64 (N,) labels: as ADM's evaluation reads them

Sample i has label labels[i] and seed `seed_of(global_seed, i)`, whatever process makes it. Process r of W makes the
samples i with i mod W = r that have no file yet. A folder of another run (other weights, labels, settings) is refused.
Memory is flat: the .npz is written picture by picture.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import time
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib import format as npy

from maetok_fast.models.checkpoints.files import settle
from maetok_fast.pipeline.noise import seed_of
from maetok_fast.pipeline.pipeline import Pipeline

__all__ = [
    "RunError",
    "SamplingRun",
    "equal_labels",
    "make_folder",
    "random_labels",
    "save_png",
    "write_grid",
    "write_json",
    "write_npz",
    "write_text",
    "written",
]

GRID = 64  # samples at most


class RunError(ValueError):
    """A folder that cannot take this run; the message says why and what to do."""


def equal_labels(count: int, classes: int) -> list[int]:
    """As many of each class as of any other, to one: sample i is of class i mod classes."""
    return [i % classes for i in range(count)]


def random_labels(count: int, classes: int, seed: int) -> list[int]:
    """Each drawn uniformly, from a stream of `seed` alone."""
    return np.random.Generator(np.random.Philox(key=seed)).integers(0, classes, count).tolist()


@dataclass(frozen=True)
class SamplingRun:
    """labels: one a sample, None for unconditional ones. settings: `Pipeline.batches`'s, JSON values. about: what else
    the pictures depend on (checkpoints, precision), JSON values. batch: rows at a time, which changes no picture."""

    out: Path
    labels: Sequence[int | None]
    global_seed: int = 0
    settings: dict[str, Any] | None = None
    about: dict[str, Any] | None = None
    batch: int = 8
    process: int = 0
    processes: int = 1

    @property
    def archive(self) -> Path:
        return self.out.with_name(self.out.name + ".npz")

    def path(self, i: int) -> Path:
        return self.out / f"{i:06d}.png"

    @property
    def asked(self) -> dict[str, Any]:
        """What a picture depends on, as run.json has it."""
        return {
            "samples": len(self.labels),
            "labels_sha256": hashlib.sha256(_numbers(self.labels).tobytes()).hexdigest()[:16],
            "global_seed": self.global_seed,
            "settings": self.settings or {},
            **(self.about or {}),
        }

    @property
    def record(self) -> Path:
        return self.out / "run.json"

    def begin(self) -> None:
        """Makes the folder, or checks that what lies there is of this run. RunError names what differs."""
        make_folder(self.out)
        asked = json.loads(json.dumps(self.asked))
        if self.record.exists():
            before = self._recorded()["asked"]
            differs = [
                f"{k}: {_short(before.get(k))} there, {_short(asked.get(k))} asked for"
                for k in sorted(before.keys() | asked.keys())
                if before.get(k) != asked.get(k)
            ]
            if differs:
                raise RunError(f"{self.out} holds another run ({'; '.join(differs)}); give another --out, or remove it")
        elif any(self.out.glob("[0-9]*.png")):
            raise RunError(f"{self.out} holds pictures but no run.json, so nobody knows of what; give another --out")
        if self.process == 0:
            for left in self.out.glob(".writing-*"):  # of a process that was killed
                left.unlink(missing_ok=True)

    def _recorded(self) -> dict[str, Any]:
        try:
            found = json.loads(self.record.read_text())
            return {"asked": dict(found["asked"]), "cost": found.get("cost")}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise RunError(f"{self.record}: is not the record of a run ({error}); give another --out") from None

    def _keep(self, cost: dict[str, Any] | None = None) -> None:
        found = {"asked": self.asked} | ({} if cost is None else {"cost": cost})
        write_json(self.record, found)

    def missing(self) -> list[int]:
        """The samples of this process that have no file yet."""
        return [i for i in range(self.process, len(self.labels), self.processes) if not self.path(i).exists()]

    def make(self, pipeline: Pipeline, done: Callable[[int], None] = lambda count: None) -> dict[str, Any]:
        """Samples what is missing; `done(n)` after each n files. Returns what this process's part cost."""
        todo, began = self.missing(), time.perf_counter()
        nfe = rows = 0
        seconds = 0.0
        if todo:
            labels, seeds = [self.labels[i] for i in todo], [seed_of(self.global_seed, i) for i in todo]
            for part in pipeline.batches(labels, seeds, batch=self.batch, **(self.settings or {})):
                if not self.record.exists():  # not before: what fails at its first step leaves no record
                    self._keep()
                for k, image in enumerate(part.images):
                    written(self.path(todo[part.start + k]), partial(save_png, image))
                nfe, rows, seconds = part.nfe, rows + part.rows, seconds + part.seconds
                done(len(part.images))
        spent = time.perf_counter() - began
        return {"images": len(todo), "nfe": nfe, "rows": rows, "seconds": spent, "seconds_sampling": seconds}

    def finish(self, cost: dict[str, Any]) -> None:
        """Once every file is there: the .npz, the grid, and the record of what it cost (of the last start that made
        samples)."""
        lacking = [i for i in range(len(self.labels)) if not self.path(i).exists()]
        if lacking:
            raise RunError(f"{self.out}: {len(lacking)} of {len(self.labels)} samples are missing; run it again")
        if not cost["images"] and self.archive.exists() and self._recorded()["cost"]:
            return
        write_npz(self.archive, [self.path(i) for i in range(len(self.labels))], self.labels)
        shown = range(min(GRID, len(self.labels)))
        texts = [f"{'no class' if self.labels[i] is None else self.labels[i]} · {i}" for i in shown]
        write_grid(self.out / "grid.png", [self.path(i) for i in shown], texts)
        rate = cost["images"] / cost["seconds"] if cost["images"] else None
        self._keep(cost | {"images_per_second": rate, "processes": self.processes})


def write_npz(path: Path, files: Sequence[Path], labels: Sequence[int | None]) -> None:
    """arr_0 (N, H, W, 3) uint8 of PNG files of one size, arr_1 labels (-1: none), one picture in memory at a time."""

    def write(to: Path) -> None:
        first = _pixels(files[0])
        numbers = _numbers(labels)
        with zipfile.ZipFile(to, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
            for name, shape, dtype, parts in (
                ("arr_0", (len(files), *first.shape), first.dtype, (_pixels(file) for file in files)),
                ("arr_1", numbers.shape, numbers.dtype, iter([numbers])),
            ):
                with archive.open(f"{name}.npy", "w", force_zip64=True) as entry:
                    header = {"descr": npy.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
                    npy.write_array_header_1_0(entry, header)
                    for part in parts:
                        if part.shape not in (shape[1:], shape):
                            raise RunError(f"{path}: pictures of {part.shape} and {shape[1:]} do not fit together")
                        entry.write(np.ascontiguousarray(part).tobytes())

    written(path, write)


def write_grid(path: Path, files: Sequence[Path], texts: Sequence[str], side: int = 192) -> None:
    """A labelled picture of pictures, about as wide as high; each shrunk to `side` pixels where it is larger."""
    from PIL import Image, ImageDraw

    columns = max(1, round(len(files) ** 0.5 + 0.49))
    rows, bar, gap = -(-len(files) // columns), 16, 4
    with Image.open(files[0]) as first:
        scale = min(1.0, side / max(first.size))
        width, height = (max(1, round(v * scale)) for v in first.size)
    sheet = Image.new("RGB", (columns * (width + gap) + gap, rows * (height + bar + gap) + gap), "white")
    draw = ImageDraw.Draw(sheet)
    for i, (file, text) in enumerate(zip(files, texts)):
        left, top = gap + i % columns * (width + gap), gap + i // columns * (height + bar + gap)
        with Image.open(file) as image:
            sheet.paste(image.convert("RGB").resize((width, height), Image.Resampling.LANCZOS), (left, top + bar))
        draw.text((left, top + 1), text, fill="black")
    written(path, lambda p: sheet.save(p, "PNG"))


def save_png(image: np.ndarray, path: Path) -> None:
    from PIL import Image

    Image.fromarray(image).save(path, "PNG")


def _pixels(file: Path) -> np.ndarray:
    from PIL import Image

    with Image.open(file) as image:
        return np.asarray(image.convert("RGB"))


def written(path: Path, write: Callable[[Path], Any]) -> None:
    """By another name first: a file that has its own is whole."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=".writing-")
    os.close(handle)
    temporary = Path(name)
    try:
        write(temporary)
        settle(temporary)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_text(path: Path, text: str) -> None:
    """Whole or not at all."""
    written(path, lambda beside: beside.write_text(text, encoding="utf-8"))


def write_json(path: Path, value: Any) -> None:
    """Whole or not at all."""
    write_text(path, json.dumps(value, indent=1) + "\n")


def make_folder(folder: Path) -> None:
    """RunError where it cannot be made."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"{folder}: cannot be made ({error.strerror or error}); give another --out") from None


def _numbers(labels: Sequence[int | None]) -> np.ndarray:
    """int64, -1 for none."""
    return np.array([-1 if label is None else label for label in labels], dtype=np.int64)


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
