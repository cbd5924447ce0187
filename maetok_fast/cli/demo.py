# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""`maetok-fast demo`: from images to samples of their classes on two CPU cores, every part once. `maetok-fast demo
claims`: the paper's claims on a small scale."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from . import _said

app = typer.Typer(invoke_without_command=True, help="A tokenizer, a generator and samples, on two CPU cores.")

Data = Annotated[str, typer.Option(help="Training images in class folders, or an installed set.")]
Test = Annotated[str, typer.Option(help="Test images of the same classes.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress.")]


@contextlib.contextmanager
def _to_its_end() -> Iterator[None]:
    """What a user can mend ends the command in a sentence; one that was stopped says how it goes on, with status 0."""
    from maetok_fast.data.stream import WorkerError
    from maetok_fast.demos import DemoStopped
    from maetok_fast.training.checkpoints import TrainingError

    with _said.in_a_sentence(WorkerError, TrainingError):
        try:
            yield
        except DemoStopped as stopped:
            typer.echo(f"{stopped}; the same command goes on")
            raise typer.Exit from None


@app.callback()
def demo(
    context: typer.Context,
    out: Annotated[Path, typer.Option(help="Folder of everything; the same one again goes on.")] = Path("runs/demo"),
    quick: Annotated[bool, typer.Option("--quick", help="A handful of steps: to see that everything works.")] = False,
    data: Data = "fashion-mnist",
    test: Test = "fashion-mnist:test",
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1)] = 0,
    quiet: Quiet = False,
    device: Annotated[str, typer.Option(help="cpu, cuda; default: cuda where there is one.")] = "",
) -> None:
    """Train a tokenizer and a generator on Fashion-MNIST, sample, and measure what came out: stage 1, stage 2, latents,
    SiT, samples. Twenty minutes on two cores; stopped at any point it goes on where it was."""
    if context.invoked_subcommand is not None:
        return
    from maetok_fast.demos import run_demo

    with _to_its_end():
        found = run_demo(
            out, data, test, quick=quick, seed=seed, device=device, quiet=quiet, say=lambda line: typer.echo(line)
        )
    typer.echo(
        f"{found['recognised']:.1%} of {found['samples']} samples are recognised as the class asked for "
        f"({found['classifier']['test_accuracy']:.1%} of real test images), PSNR {found['psnr']:.2f} dB, "
        f"{found['seconds_total'] / 60:.1f} min: {out / 'demo.html'}, {out / 'demo.json'}, {out / 'samples.png'}"
    )


@app.command()
def claims(
    out: Annotated[Path, typer.Option(help="Folder of everything; the same one again goes on.")] = Path("runs/claims"),
    seeds: Annotated[int, typer.Option(min=1, help="Trainings of everything; errors need two or more.")] = 3,
    quick: Annotated[bool, typer.Option("--quick", help="A handful of steps: to see that everything works.")] = False,
    data: Data = "fashion-mnist",
    test: Test = "fashion-mnist:test",
    processes: Annotated[int, typer.Option(min=0, help="Side by side, a thread each; 0: one a core.")] = 0,
    quiet: Quiet = False,
) -> None:
    """Train AE, KL-VAE, SoftVQ, MAETok and the rows of its ablation alike, generators on all of them, and say which of
    the paper's claims hold at this scale. A night on two cores; stopped at any point it goes on where it was."""
    from maetok_fast.demos.claims import run_claims

    with _to_its_end():
        found = run_claims(
            out,
            data,
            test,
            seeds=seeds,
            quick=quick,
            processes=processes,
            quiet=quiet,
            say=lambda line: typer.echo(line),
        )
    verdicts = [claim["verdict"] for claim in found["claims"]]
    told = ", ".join(f"{verdicts.count(v)} {v}" for v in ("holds", "not resolved", "does not hold"))
    typer.echo(f"of {len(verdicts)} claims: {told}; {out / 'claims.html'}, {out / 'claims.md'}, {out / 'claims.json'}")
