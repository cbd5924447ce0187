# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""`maetok-fast reconstruct`, `encode`, `decode`: folders and tars of images through a tokenizer."""

from __future__ import annotations

import enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import _said

if TYPE_CHECKING:
    from maetok_fast.pipeline.folders import Passed


class Crop(enum.Enum):
    center = "center"
    adm = "adm"
    none = "none"


Source = Annotated[Path, typer.Argument(help="Folder or tar of images.")]
Tokenizer = Annotated[str, typer.Option(help="A MAETok: folder, file or hub repository.")]
CropOption = Annotated[
    Crop, typer.Option(help="center: EXIF orientation, bicubic, centre; adm: as REPA and RAE; none: of the size.")
]
Batch = Annotated[int, typer.Option(min=1)]
Precision = Annotated[str, typer.Option(help="auto, fp32, bf16, fp16.")]
Device = Annotated[str, typer.Option(help="cpu, cuda; default: cuda where there is one.")]
Statistics = Annotated[str, typer.Option(help="File of the latents' mean and std; default: the tokenizer's own.")]


def reconstruct(
    source: Source,
    tokenizer: Tokenizer,
    out: Annotated[Path, typer.Option(help="Folder of the reconstructions.")],
    crop: CropOption = Crop.center,
    batch: Batch = 8,
    precision: Precision = "auto",
    device: Device = "",
) -> None:
    """Reconstruct images: PNGs, metrics.csv with each one's PSNR and SSIM, and compare.png, originals above. Files that
    cannot be read are named, and the exit status is 1."""
    from maetok_fast.pipeline import folders

    with _said.in_a_sentence():
        pipeline, names = _pipeline(tokenizer, "", precision, device), folders.names_of(source)
        with _said.progress("reconstructing", len(names)) as tick:
            passed = folders.reconstruct(pipeline, source, out, crop=crop.value, batch=batch, tick=tick)
        means = ", ".join(f"{name.upper()} {value:.3f}" for name, value in passed.mean.items())
        _tell(passed, f"reconstructed, crop {crop.value}, mean {means}: {out / 'metrics.csv'}, {out / 'compare.png'}")


def encode(
    source: Source,
    tokenizer: Tokenizer,
    out: Annotated[Path, typer.Option(help="The .safetensors file of latents.")],
    crop: CropOption = Crop.center,
    statistics: Statistics = "",
    batch: Batch = 8,
    precision: Precision = "auto",
    device: Device = "",
) -> None:
    """Encode images into one file of latents with their names."""
    from maetok_fast.pipeline import folders

    with _said.in_a_sentence():
        pipeline, names = _pipeline(tokenizer, statistics, precision, device), folders.names_of(source)
        with _said.progress("encoding", len(names)) as tick:
            passed = folders.encode(pipeline, source, out, crop=crop.value, batch=batch, tick=tick)
        _tell(passed, f"encoded, crop {crop.value}: {out}")


def decode(
    source: Annotated[Path, typer.Argument(help="A file that `maetok-fast encode` wrote.")],
    tokenizer: Tokenizer,
    out: Annotated[Path, typer.Option(help="Folder of the pictures.")],
    statistics: Statistics = "",
    batch: Batch = 8,
    precision: Precision = "auto",
    device: Device = "",
) -> None:
    """Decode what `encode` wrote into PNGs."""
    from maetok_fast.pipeline import folders

    with _said.in_a_sentence():
        pipeline = _pipeline(tokenizer, statistics, precision, device)
        with _said.progress("decoding", 0) as tick:
            passed = folders.decode(pipeline, source, out, batch=batch, tick=tick)
        _tell(passed, f"decoded: {out}")


def _pipeline(tokenizer: str, statistics: str, precision: str, device: str) -> Any:
    from maetok_fast.pipeline import Pipeline

    where = _said.device(device)
    return Pipeline.from_pretrained(tokenizer, statistics=statistics or None, device=where, precision=precision)


def _tell(passed: Passed, what: str) -> None:
    for name, why in passed.refused.items():
        typer.echo(f"skipped: {name}: {why}", err=True)
    typer.echo(f"{len(passed.done)} images {what}" + (f"; {len(passed.refused)} skipped" if passed.refused else ""))
    if passed.refused:
        raise typer.Exit(1)
