# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""`maetok-fast train STAGE --config FILE key=value ...`: alone, or under torchrun or accelerate launch."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from . import _said

app = typer.Typer(no_args_is_help=True, help="Train, stage by stage. The same command again goes on.")

Config = Annotated[str, typer.Option(help="A YAML file (configs/...), or the name of a run (--list).")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="KEY=VALUE...", help="Over the file: data.path=photos loop.batch=64")
]
Show = Annotated[bool, typer.Option("--show", help="Print the whole configuration and stop.")]
List = Annotated[bool, typer.Option("--list", help="Print the runs by name and stop.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress bar.")]


@app.command()
def tokenizer(
    overrides: Overrides = None, config: Config = "", show: Show = False, runs: List = False, quiet: Quiet = False
) -> None:
    """Stage 1: mask modelling with auxiliary decoders; every ablation of it, and mixed-resolution fine-tuning."""
    _train("tokenizer", config, overrides, show, runs, quiet)


@app.command()
def decoder(
    overrides: Overrides = None, config: Config = "", show: Show = False, runs: List = False, quiet: Quiet = False
) -> None:
    """Stage 2: the decoder alone, the encoder frozen, the mask ratio going to 0."""
    _train("decoder", config, overrides, show, runs, quiet)


@app.command()
def generator(
    overrides: Overrides = None, config: Config = "", show: Show = False, runs: List = False, quiet: Quiet = False
) -> None:
    """Stage 3: a SiT or LightningDiT on the latents of a cache (data.cache=), or encoded on the way (data.path=)."""
    _train("generator", config, overrides, show, runs, quiet)


def _train(stage: str, config: str, overrides: list[str] | None, show: bool, runs: bool, quiet: bool) -> None:
    from maetok_fast.config import to_yaml
    from maetok_fast.training.runs import RUNS, read_run

    if runs:
        for name, run_of in RUNS.items():
            typer.echo(f"{name:18} {(run_of.__doc__ or '').splitlines()[0]}")
        return
    with _said.in_a_sentence():
        run = read_run(stage, config or None, overrides or [])
    if show:
        typer.echo(to_yaml(run), nl=False)
        return
    from maetok_fast.training.build import train
    from maetok_fast.training.checkpoints import TrainingError

    with _said.in_a_sentence(TrainingError):
        newest = train(run, quiet=quiet)
        if os.environ.get("RANK", "0") != "0":
            return
        step, report = int(newest.name), Path(run.out) / "report.html"
        if step < run.loop.steps:
            typer.echo(f"stopped at step {step} of {run.loop.steps}; the same command goes on: {report}")
        else:
            product = "generator" if stage == "generator" else "tokenizer"
            typer.echo(f"trained {step} steps: {newest / product}, {report}")
