# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""The command `maetok-fast`, one file a command.

A command's module imports what it needs when the command runs, so that `--help` stays fast, and is entered here.
"""

from __future__ import annotations

from typing import Annotated, Any

import typer

from . import analyze, bench, cache_latents, convert, demo, demo_weights, doctor, evaluate, images, sample, scale, train

__all__ = ["app", "main"]

app = typer.Typer(no_args_is_help=True, add_completion=False, help="MAETok and its generators, made fast.")
app.command("doctor")(doctor.doctor)
app.command("sample")(sample.sample)
for _command in (images.reconstruct, images.encode, images.decode):
    app.command(_command.__name__)(_command)
app.command("cache-latents")(cache_latents.cache_latents)
app.command("convert")(convert.convert)
app.command("demo-weights")(demo_weights.demo_weights)
app.add_typer(demo.app, name="demo")
app.command("evaluate")(evaluate.evaluate)
app.command("scale")(scale.scale)
app.add_typer(train.app, name="train")
app.add_typer(analyze.app, name="analyze")
app.add_typer(bench.app, name="bench")


def _version(value: bool) -> None:
    if value:
        import maetok_fast

        typer.echo(f"maetok-fast {maetok_fast.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


def main(**options: Any) -> None:
    """Entry point of the `maetok-fast` script."""
    app(**options)
