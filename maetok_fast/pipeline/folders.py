# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""Folders and tars of images through a tokenizer: encoded, decoded, or reconstructed and measured.

    source ── images in the order of their names ── batches ── tokenizer ── OUT
                 └── files that are no images, or damaged: passed over, named in what comes back

    reconstruct   OUT/<name>.png, OUT/metrics.csv (PSNR, SSIM of each), OUT/compare.png (originals above)
    encode        OUT: one .safetensors with `latents` (N, L, C); names, crop, whether normalised in its metadata
    decode        OUT/<name>.png of such a file

PSNR and SSIM compare 8-bit pixels in [0, 255], as files show them; SSIM is Wang's, with its Gaussian window
(scikit-image).
"""

from __future__ import annotations

import csv
import json
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
from torch import Tensor

from maetok_fast.data.images import SUFFIXES, ImageError, load_image, psnr, to_uint8
from maetok_fast.models import CheckpointError
from maetok_fast.pipeline.pipeline import Pipeline
from maetok_fast.pipeline.run import RunError, make_folder, save_png, write_grid, written

__all__ = ["Passed", "decode", "encode", "read_images", "reconstruct"]

COMPARED = 16  # images in the picture
_ABOUT = "maetok_fast"  # the metadata's one entry, JSON
Tick = Callable[[int], None]


@dataclass
class Passed:
    """What became of a source. done: names of images; refused: name -> why it cannot be read. mean: of the metrics."""

    done: list[str] = field(default_factory=list)
    refused: dict[str, str] = field(default_factory=dict)
    mean: dict[str, float] = field(default_factory=dict)


def names_of(source: Path) -> list[str]:
    """The files of a folder, or of a tar, whose names end like an image's; RunError where there are none."""
    if source.is_dir():
        found = [str(PurePosixPath(p.relative_to(source))) for p in source.rglob("*") if p.is_file()]
    elif source.is_file() and tarfile.is_tarfile(source):
        with tarfile.open(source) as archive:
            found = [member.name for member in archive if member.isfile()]
    else:
        raise RunError(f"{source}: expected a folder or a tar of images")
    names = sorted(name for name in found if name.lower().endswith(SUFFIXES))
    if not names:
        raise RunError(f"{source}: no images: expected files ending in {', '.join(SUFFIXES)}")
    return names


def read_images(source: Path, names: list[str], size: int, crop: str, passed: Passed) -> Iterator[tuple[str, Tensor]]:
    """(name, image (3, size, size) in [-1, 1]) in the order of `names`; what cannot be read: into passed.refused."""
    archive = None if source.is_dir() else tarfile.open(source)  # noqa: SIM115
    try:
        for name in names:
            try:
                content = None
                if archive is not None:
                    entry = archive.extractfile(name)
                    content = b"" if entry is None else entry.read()
                yield name, load_image(source / name, size, crop=crop, content=content)
            except (ImageError, KeyError, tarfile.TarError) as error:
                passed.refused[name] = str(error)
    finally:
        if archive is not None:
            archive.close()


def reconstruct(
    pipeline: Pipeline, source: Path, out: Path, *, crop: str = "center", batch: int = 8, tick: Tick = lambda n: None
) -> Passed:
    """See the module's table. A file that exists already is written anew."""
    names, passed, size = names_of(source), Passed(), _square(pipeline)
    make_folder(out)
    rows: list[list[Any]] = []
    shown: list[tuple[str, np.ndarray, np.ndarray]] = []
    for part in _batches(read_images(source, names, size, crop, passed), batch):
        images = torch.stack([image for _, image in part])
        originals, results = to_uint8(images), to_uint8(pipeline.reconstruct(images))
        for (name, _), original, result in zip(part, originals, results):
            written(_png(out, name), partial(save_png, result))
            rows.append([name, psnr(original, result), ssim(original, result)])
            passed.done.append(name)
            if len(shown) < COMPARED:
                shown.append((name, original, result))
        tick(len(part))
    if not rows:
        raise RunError(f"{source}: none of its {len(names)} images can be read, first {_first(passed.refused)}")
    for column, metric in ((1, "psnr"), (2, "ssim")):
        values = [row[column] for row in rows if row[column] is not None]
        if values:
            passed.mean[metric] = sum(values) / len(values)
    written(out / "metrics.csv", lambda p: _table(p, rows, crop, size))
    _compare(out / "compare.png", shown)
    return passed


def encode(
    pipeline: Pipeline, source: Path, out: Path, *, crop: str = "center", batch: int = 8, tick: Tick = lambda n: None
) -> Passed:
    """See the module's table. Latents are normalised where the pipeline has statistics; the file says so."""
    from safetensors.torch import save_file

    names, passed, size = names_of(source), Passed(), _square(pipeline)
    make_folder(out.parent)
    parts = []
    for part in _batches(read_images(source, names, size, crop, passed), batch):
        parts.append(pipeline.encode(torch.stack([image for _, image in part])).cpu())
        passed.done += [name for name, _ in part]
        tick(len(part))
    if not parts:
        raise RunError(f"{source}: none of its {len(names)} images can be read, first {_first(passed.refused)}")
    about = {"names": passed.done, "crop": crop, "size": size, "tokenizer": pipeline.fingerprint}
    about["normalised"] = pipeline.statistics is not None
    # one entry: safetensors writes several in any order, and equal latents should be equal files
    written(out, lambda p: save_file({"latents": torch.cat(parts)}, p, {_ABOUT: json.dumps(about)}))
    return passed


def decode(pipeline: Pipeline, source: Path, out: Path, *, batch: int = 8, tick: Tick = lambda n: None) -> Passed:
    """See the module's table. CheckpointError where the file is none of `encode`'s; RunError where its latents are of
    another shape, or normalised where this pipeline has no statistics, or not where it has."""
    from maetok_fast.models.checkpoints.files import read_weights

    content, metadata = read_weights(source)
    latents, passed = content.get("latents"), Passed()
    try:
        known = json.loads(metadata[_ABOUT])
        names, normalised = list(known["names"]), bool(known["normalised"])
    except (KeyError, ValueError, TypeError):
        names = []
    if not isinstance(latents, Tensor) or len(names) != len(latents):
        raise CheckpointError(f"{source}: holds no latents and names, as maetok-fast encode writes them")
    if tuple(latents.shape[1:]) != pipeline.shape:
        raise RunError(f"{source}: latents of shape {tuple(latents.shape[1:])}, the tokenizer has {pipeline.shape}")
    if normalised != (pipeline.statistics is not None):
        raise RunError(f"{source}: its latents are {'' if pipeline.statistics is None else 'not '}normalised: give the "
                       "tokenizer, and the statistics, that they were encoded with")  # fmt: skip
    make_folder(out)
    for start in range(0, len(latents), batch):
        images = to_uint8(pipeline.decode(latents[start : start + batch].to(pipeline.device)))
        for name, image in zip(names[start:], images):
            written(_png(out, name), partial(save_png, image))
            passed.done.append(name)
        tick(len(images))
    return passed


def ssim(original: np.ndarray, result: np.ndarray) -> float | None:
    """Of (H, W, 3) uint8; None without scikit-image, or for images below its window of 11."""
    try:
        from skimage.metrics import structural_similarity
    except ImportError:
        return None
    if min(original.shape[:2]) < 11:
        return None
    options = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    return float(structural_similarity(original, result, channel_axis=2, data_range=255, **options))


def _square(pipeline: Pipeline) -> int:
    height, width = pipeline.size
    if height != width:
        raise RunError(f"the tokenizer was trained at {height} x {width}; folders are read as squares")
    return height


def _batches(images: Iterator[tuple[str, Tensor]], count: int) -> Iterator[list[tuple[str, Tensor]]]:
    part: list[tuple[str, Tensor]] = []
    for item in images:
        part.append(item)
        if len(part) == count:
            yield part
            part = []
    if part:
        yield part


def _png(out: Path, name: str) -> Path:
    """Where the result of `name` goes: under `out`, whatever the name says."""
    parts = [part for part in PurePosixPath(name).parts if part not in ("/", "..", ".")]
    path = out.joinpath(*parts)
    path = path.with_name(path.name + ".png" if path.suffix.lower() != ".png" else path.name)
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def _first(refused: dict[str, str]) -> str:
    return "; ".join(f"{name}: {why}" for name, why in list(refused.items())[:1])


def _table(path: Path, rows: list[list[Any]], crop: str, size: int) -> None:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["image", "psnr", "ssim", "crop", "size"])
        for name, *values in rows:
            writer.writerow([name, *("" if v is None else f"{v:.5f}" for v in values), crop, size])


def _compare(path: Path, shown: list[tuple[str, np.ndarray, np.ndarray]]) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        files, texts = [], []
        for i, (name, original, result) in enumerate(shown):
            files.append(Path(folder) / f"{i}.png")
            save_png(np.concatenate([original, result]), files[-1])
            texts.append(PurePosixPath(name).name[:28])
        write_grid(path, files, texts, side=384)
