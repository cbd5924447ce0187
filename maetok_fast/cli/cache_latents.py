# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""`maetok-fast cache-latents`: a tokenizer's latents of many images, for training a generator on them."""

from __future__ import annotations

import enum
import time
from pathlib import Path
from typing import Annotated, Optional

import typer

from . import _said


class Crop(enum.Enum):
    center, adm = "center", "adm"


class Decoder(enum.Enum):
    auto, pil, torchvision = "auto", "pil", "torchvision"


class Kept(enum.Enum):
    fp32, fp16, bf16 = "fp32", "fp16", "bf16"


def cache_latents(
    tokenizer: Annotated[str, typer.Option(help="A MAETok: folder, file or hub repository.")],
    data: Annotated[str, typer.Option(help="Images: folder, list, tars, or an installed set's name.")],
    out: Annotated[Path, typer.Option(help="Folder of the cache.")],
    size: Annotated[int, typer.Option(min=0, help="Of the images in pixels; 0: the tokenizer's.")] = 0,
    crop: Annotated[
        Crop, typer.Option(help="center: EXIF orientation, bicubic, centre; adm: as REPA and RAE.")
    ] = Crop.center,
    flips: Annotated[bool, typer.Option(help="Whether mirrored images are encoded too.")] = True,
    dtype: Annotated[Kept, typer.Option(help="What latents are stored in.")] = Kept.fp32,
    shard: Annotated[int, typer.Option(min=1, help="Images of a file.")] = 10_000,
    limit: Annotated[Optional[int], typer.Option(min=1, help="The first so many images.")] = None,  # noqa: UP045
    batch: Annotated[int, typer.Option(min=1, help="Images at a time; on a CPU it changes no bit.")] = 8,
    workers: Annotated[int, typer.Option(min=0, help="Processes that read and decode; 0: this one does.")] = 2,
    decoder: Annotated[Decoder, typer.Option(help="Of JPEGs; equal pixels, torchvision's is faster.")] = Decoder.auto,
    max_unreadable: Annotated[
        float, typer.Option(min=0, max=1, help="The share of images that may be unreadable, and are left out.")
    ] = 0.01,
    precision: Annotated[str, typer.Option(help="auto, fp32, bf16, fp16.")] = "auto",
    device: Annotated[str, typer.Option(help="cpu, cuda; default: cuda where there is one.")] = "",
) -> None:
    """Encode images into a cache of latents in LightningDiT's layout, with their statistics. Stopped at any point it
    goes on where it was; under torchrun the processes share the shards and the files are the same."""
    from maetok_fast.data.sources import open_source
    from maetok_fast.data.stream import WorkerError
    from maetok_fast.models import MAETok
    from maetok_fast.pipeline import EncodingRun

    with _said.in_a_sentence(WorkerError), _said.processes(device) as (where, process, count):
        if process:
            _said.barrier()  # the first one says what auto means, and removes what a killed run has left
        run = EncodingRun(
            out,
            MAETok.from_pretrained(tokenizer, device=where),
            open_source(data),
            precision=precision,
            size=size or None,
            crop=crop.value,
            decoder=decoder.value,
            dtype=dtype.value,
            flips=flips,
            shard=shard,
            limit=limit,
            batch=batch,
            workers=workers,
            max_unreadable=max_unreadable,
            process=process,
            processes=count,
        )
        run.begin()
        todo, began = run.images_in(run.missing(everybody=True)), time.perf_counter()
        if not process:
            _said.barrier()
        with _said.progress("encoding", run.images_in(run.missing()), process == 0) as tick:
            cost = run.make(tick)
        _said.barrier()
        if process == 0:
            cost |= {"images": todo, "seconds": time.perf_counter() - began}
            found = run.finish(cost)
            made = f"{todo} of {run.samples} images encoded" if todo else f"{run.samples} images were there"
            speed = f", {todo / cost['seconds']:.3g} images/s" if todo else ""
            left = f"; {found['unreadable']} unreadable: {run.unreadable}" if found["unreadable"] else ""
            typer.echo(f"{made}{speed}, {run.precision.name} as {dtype.value}: {out}, {run.statistics}{left}")
