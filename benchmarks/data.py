# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""Images/s that one core reads for training, and what share of a training step waits for them.

    python benchmarks/data.py                                   bundled photographs as JPEGs of ~500 px
    python benchmarks/data.py --images FOLDER --size 512        your own
    python benchmarks/data.py --step-images-per-second 900 --cores-per-device 12

A path is a decoder of `maetok_fast.data.loader.Batches` (dali: its CPU operators, in threads of the main process; as
many worker processes beside it read the files). A training step of B images takes B / R seconds by itself, where R is
the trainer's images/s on a device; C cores read them in B / (C r). Reading overlaps the step, so that what is waited
for is max(0, 1 - C r / R) of the whole time.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).resolve().parent.parent))

from benchmarks import _cli
from maetok_fast._optional import probe
from maetok_fast.data.images import bundled_photographs
from maetok_fast.data.loader import PREFETCH, Batches
from maetok_fast.data.sources import DataError, Source, open_source
from maetok_fast.data.views import View

PATHS = {"pil": None, "torchvision": "torchvision", "dali": "nvidia.dali"}  # decoder -> the package it needs
WORKERS = (1, 2)
SHORT_SIDE = 500
COPIES = 16  # of the bundled photographs: an epoch is no matter of a few files


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = _cli.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--images", help="a folder, list or tars of yours; default: the bundled photographs")
    add("--size", type=_cli.count, default=256, help="of the pictures, in pixels")
    add("--batch", type=_cli.count, default=32)
    add("--seconds", type=_cli.seconds, default=3.0, help="of each measurement")
    add("--step-images-per-second", type=_cli.seconds, metavar="R", help="the trainer's images/s on one device")
    add("--cores-per-device", type=_cli.count, metavar="C", help="cores that read for one device")
    args = parser.parse_args(argv)
    if (args.step_images_per_second is None) != (args.cores_per_device is None):
        parser.error("--step-images-per-second and --cores-per-device are given together")
    if args.images is not None:
        args.images = _cli.said(parser, "--images", lambda: open_source(args.images), DataError)
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        source = args.images if args.images is not None else open_source(photographs(Path(folder)))
        print(f"{len(source)} images of {source.path}, {args.size} px, batches of {args.batch}, random crop and flip")
        print(f"  {'path':12s} {'workers':>8s} {'images/s':>10s} {'images/s per core':>18s}")
        best = (0.0, "")
        for decoder, package in PATHS.items():
            status = None if package is None else probe(package)
            if status is not None and status.state != "found":
                print(f"  {decoder:12s} {status.state}: {status.reason}")
                continue
            for workers in WORKERS:
                rate = measured(source, args.size, args.batch, args.seconds, decoder, workers)
                best = max(best, (rate / workers, decoder))
                print(f"  {decoder:12s} {workers:8d} {rate:10.1f} {rate / workers:18.1f}", flush=True)
    if args.step_images_per_second is not None:
        print(share(best, args.step_images_per_second, args.cores_per_device))


def photographs(folder: Path) -> Path:
    """The bundled photographs as JPEGs whose shorter side is SHORT_SIDE, several times: ImageNet's size."""
    from PIL import Image

    for path in bundled_photographs():
        with Image.open(path) as opened:
            image = opened.convert("RGB")
        scale = SHORT_SIDE / min(image.size)
        image = image.resize((round(image.width * scale), round(image.height * scale)))
        for copy in range(COPIES):
            image.save(folder / f"{path.stem}-{copy}.jpg", quality=90)
    return folder


def measured(source: Source, size: int, batch: int, seconds: float, decoder: str, workers: int) -> float:
    """Images/s of this many workers, once what they had read ahead is used up."""
    # DALI reads in `workers` threads here; the processes beside it only hand it the files
    with Batches(source, View(size), batch, seed=0, workers=workers, decoder=decoder, dali_threads=workers) as batches:
        for _ in range(PREFETCH * workers + 1):
            next(batches)
        start, count = time.perf_counter(), 0
        while True:
            count += len(next(batches).indices)
            passed = time.perf_counter() - start
            if passed >= seconds:
                return count / passed


def share(best: tuple[float, str], step_rate: float, cores: int) -> str:
    """The formula and its parts."""
    rate, decoder = best
    read = rate * cores
    waiting = max(0.0, 1 - read / step_rate)
    return (
        f"r = {rate:.1f} images/s per core ({decoder}), C = {cores} cores per device, R = {step_rate:g} images/s\n"
        f"C r = {read:.1f} images/s read; waiting = max(0, 1 - C r / R) = {waiting:.1%} of the time; "
        f"{step_rate / rate:.1f} cores would do"
    )


if __name__ == "__main__":
    main()
