# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""`maetok-fast analyze latents`: tokenizers compared by their latent spaces."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Annotated, Optional

import typer

from . import _said

app = typer.Typer(no_args_is_help=True, help="Look into what tokenizers have learned.")


@app.callback()
def _analyze() -> None:
    pass  # so that `latents` stays a word of its own, and others may follow


@app.command("latents")
def latents(
    tokenizers: Annotated[
        list[str], typer.Argument(metavar="NAME=PATH...", help="Latent caches, or MAEToks that are to encode --data.")
    ],
    out: Annotated[Path, typer.Option(help="Folder of the results; the same command goes on in it.")],
    held_out: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option(
            metavar="NAME=PATH", help="The cache of other images, on which is measured; else a fifth of the rows."
        ),
    ] = None,
    tokenizer: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option(metavar="NAME=PATH", help="The MAETok that made the cache, for decoded pictures."),
    ] = None,
    data: Annotated[
        Optional[str], typer.Option(help="Images: folder, list, tars, or an installed set's name.")  # noqa: UP045
    ] = None,
    test: Annotated[Optional[str], typer.Option(help="Images of the held-out rows.")] = None,  # noqa: UP045
    parts: Annotated[
        str, typer.Option(help="Some of gmm,probe,umap,neighbours,traversal,usage.")
    ] = "gmm,probe,umap,neighbours,traversal,usage",
    modes: Annotated[str, typer.Option(help="Numbers of modes of the mixtures.")] = "1,2,5,10,20,50,100,200",
    limit: Annotated[
        Optional[int], typer.Option(min=2, help="Rows of a tokenizer at most, a seeded sample.")  # noqa: UP045
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Of mixtures and probes: mean and standard error.")] = 3,
    seed: Annotated[int, typer.Option(min=0, help="Of the split, of samples, of UMAP.")] = 0,
    components: Annotated[
        int, typer.Option(min=0, help="K of the PCA; 0: the largest that one needs for more than 90 % of its variance.")
    ] = 0,
    covariance: Annotated[str, typer.Option(help="Of the mixtures: full or diag.")] = "full",
    unpaired: Annotated[bool, typer.Option("--unpaired", help="Compare tokenizers of different images.")] = False,
    batch: Annotated[int, typer.Option(min=1, help="Images at a time.")] = 8,
    workers: Annotated[int, typer.Option(min=0, help="Processes that read images; 0: this one does.")] = 2,
    precision: Annotated[str, typer.Option(help="Of tokenizers: auto, fp32, bf16, fp16.")] = "auto",
    device: Annotated[str, typer.Option(help="cpu, cuda; default: cuda where there is one.")] = "",
) -> None:
    """Compare tokenizers by their latents: how many modes there are, how well classes are told apart, what tokens
    carry. Writes report.html, report.png and analysis.json, which says how each number was computed."""
    from maetok_fast.analysis import Entry, Settings, analyze
    from maetok_fast.data.stream import WorkerError

    with _said.in_a_sentence(WorkerError):
        others = {
            "--held-out": _pairs("--held-out", held_out or []),
            "--tokenizer": _pairs("--tokenizer", tokenizer or []),
        }
        named = _pairs("NAME=PATH", tokenizers)
        for option, given in others.items():
            if unknown := sorted(given.keys() - named.keys()):
                raise ValueError(f"{option} {unknown[0]}: none of the tokenizers ({', '.join(named)}) has that name")
        entries = [
            Entry(name, path, others["--held-out"].get(name), others["--tokenizer"].get(name))
            for name, path in named.items()
        ]
        settings = Settings(
            modes=_numbers(modes),
            parts=tuple(part.strip() for part in parts.split(",") if part.strip()),
            limit=limit,
            seeds=seeds,
            seed=seed,
            components=components or None,
            covariance=covariance,
            data=data,
            test=test,
            unpaired=unpaired,
            device=str(_said.device(device)),
            precision=precision,
            batch=batch,
            workers=workers,
        )
        line = _Line()
        found = analyze(entries, out, settings=settings, tick=line.show, say=line.keep)
        line.clear()
        typer.echo(f"{found['seconds_here']:.1f} s: {out / 'report.html'}, {out / 'analysis.json'}")


def _pairs(option: str, given: list[str]) -> dict[str, str]:
    """name -> path; ValueError in words."""
    found: dict[str, str] = {}
    for text in given:
        name, sign, path = text.partition("=")
        if not sign or not name or not path:
            raise ValueError(f"{option}: expected NAME=PATH, got {text!r}")
        if name in found:
            raise ValueError(f"{option}: {name} is given twice")
        found[name] = path
    return found


def _numbers(text: str) -> tuple[int, ...]:
    try:
        return tuple(sorted({int(part) for part in text.split(",") if part.strip()}))
    except ValueError:
        raise ValueError(f"--modes: expected whole numbers and commas, got {text!r}") from None


class _Line:
    """What is done now, in one line of a terminal or every ten seconds one in a file; and what is done."""

    def __init__(self) -> None:
        self.terminal, self.last = sys.stderr.isatty(), time.monotonic()

    def show(self, text: str) -> None:
        if self.terminal:
            typer.echo(f"\r\x1b[K{text[:100]}", err=True, nl=False)
        elif time.monotonic() - self.last > 10:
            typer.echo(text, err=True)
            self.last = time.monotonic()

    def keep(self, text: str) -> None:
        self.clear()
        typer.echo(text, err=True)
        self.last = time.monotonic()

    def clear(self) -> None:
        if self.terminal:
            typer.echo("\r\x1b[K", err=True, nl=False)
