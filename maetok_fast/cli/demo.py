# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""`maetok-fast demo`: from images to samples of their classes on two CPU cores, every part once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from . import _said


def demo(
    out: Annotated[Path, typer.Option(help="Folder of everything; the same one again goes on.")] = Path("runs/demo"),
    quick: Annotated[bool, typer.Option("--quick", help="A handful of steps: to see that everything works.")] = False,
    data: Annotated[str, typer.Option(help="Training images in class folders, or an installed set.")] = "fashion-mnist",
    test: Annotated[str, typer.Option(help="Test images of the same classes.")] = "fashion-mnist:test",
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1)] = 0,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress.")] = False,
    device: Annotated[str, typer.Option(help="cpu, cuda; default: cuda where there is one.")] = "",
) -> None:
    """Train a tokenizer and a generator on Fashion-MNIST, sample, and measure what came out: stage 1, stage 2, latents,
    SiT, samples. Twenty minutes on two cores; stopped at any point it goes on where it was."""
    from maetok_fast.data.stream import WorkerError
    from maetok_fast.demos import DemoStopped, run_demo
    from maetok_fast.training.checkpoints import TrainingError

    with _said.in_a_sentence(WorkerError, TrainingError):
        try:
            found = run_demo(
                out, data, test, quick=quick, seed=seed, device=device, quiet=quiet, say=lambda line: typer.echo(line)
            )
        except DemoStopped as stopped:
            typer.echo(f"{stopped}; the same command goes on")
            return
    typer.echo(
        f"{found['recognised']:.1%} of {found['samples']} samples are recognised as the class asked for "
        f"({found['classifier']['test_accuracy']:.1%} of real test images), PSNR {found['psnr']:.2f} dB, "
        f"{found['seconds_total'] / 60:.1f} min: {out / 'demo.html'}, {out / 'demo.json'}, {out / 'samples.png'}"
    )
