# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""`maetok-fast convert`: a checkpoint, or a latent cache, into another layout."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from . import _said


def convert(
    source: Annotated[str, typer.Argument(help="A checkpoint (folder, file, hub repository) or a latent cache.")],
    destination: Annotated[Path, typer.Argument(help="A folder; a cache's must not exist.")],
    to: Annotated[
        str,
        typer.Option(
            help="Checkpoints: folder, diffusers, training, repa-e, timm, safetensors; caches: lightningdit, repa, "
            "repa-e, mar, dc-ae."
        ),
    ],
    prefer: Annotated[str, typer.Option(help="Of a training file: ema or model.")] = "ema",
    statistics: Annotated[str, typer.Option(help="File of a generator's latent statistics; default: beside it.")] = "",
    moments: Annotated[str, typer.Option(help="std or logvar, where a cache contradicts its layout.")] = "",
    images: Annotated[
        Optional[int], typer.Option(min=1, help="How many a lightningdit cache really has.")  # noqa: UP045
    ] = None,
    seed: Annotated[Optional[int], typer.Option(min=0, help="Of latents that have to be drawn.")] = None,  # noqa: UP045
    scale: Annotated[Optional[float], typer.Option(help="Scaled latents over latents.")] = None,  # noqa: UP045
    flips: Annotated[bool, typer.Option(help="Mirror images.")] = True,
) -> None:
    """Convert a checkpoint or a latent cache. What the new layout has no place for is said; what would have to be
    guessed is asked for."""
    from maetok_fast.data.caches import WRITERS
    from maetok_fast.models.checkpoints.export import EXPORTS

    with _said.in_a_sentence():
        cache = _cache_at(source)
        known = tuple(WRITERS) if cache is not None else EXPORTS
        if to not in known:
            what = "a checkpoint" if cache is None else f"a {cache} cache"
            raise ValueError(f"--to {to}: {source} is {what}, which becomes one of {', '.join(known)}")
        if cache is None:
            _checkpoint(source, destination, to, prefer, statistics)
        else:
            options: dict[str, Any] = {"seed": seed, "scale": scale, "flips": flips}
            _cache(source, cache, destination, to, moments or None, images, options)


def _cache_at(source: str) -> str | None:
    """The layout of the cache at `source`; None for a checkpoint, beside which an array may lie too."""
    from maetok_fast.data.caches import find_cache
    from maetok_fast.models import CheckpointError
    from maetok_fast.models.checkpoints.locate import locate

    found = find_cache(source)
    if found != "dc-ae":
        return found
    try:
        locate(source)
    except CheckpointError:
        return found
    return None


def _cache(
    source: str,
    layout: str,
    destination: Path,
    to: str,
    moments: str | None,
    images: int | None,
    options: dict[str, Any],
) -> None:
    from maetok_fast.data.caches import convert_cache, open_cache

    found = open_cache(source, layout, moments=moments, images=images)
    typer.echo(repr(found))
    with _said.progress("converting", len(found)) as tick:
        done = convert_cache(found, destination, to, tick=tick, **options)
    for lost in done.lost:
        typer.echo(f"lost: {lost}", err=True)
    typer.echo(f"{done.images} images as a {to} cache: {destination}")


def _checkpoint(source: str, destination: Path, to: str, prefer: str, statistics: str) -> None:
    from maetok_fast.models import CheckpointError, MAETok, load_generator
    from maetok_fast.models.checkpoints import Stored
    from maetok_fast.models.checkpoints.export import write_checkpoint
    from maetok_fast.models.checkpoints.locate import STATISTICS
    from maetok_fast.pipeline import LatentStatistics

    stored = Stored.read(source, prefer=prefer)
    model: Any
    try:
        model = load_generator(stored, prefer=prefer)
    except CheckpointError as generator:
        try:
            model = MAETok.from_stored(stored, prefer=prefer)
        except CheckpointError as tokenizer:
            raise CheckpointError(f"{generator}\nas MAETok: {tokenizer}") from None
    moments = found = None
    if not isinstance(model, MAETok):
        found = LatentStatistics.load(statistics) if statistics else LatentStatistics.beside(source, stored.content)
    if to == "repa-e" and not isinstance(model, MAETok):
        if found is None:
            raise CheckpointError(f"{source}: repa-e's files hold the latents' statistics; give them with --statistics")
        moments = found.as_batch_norm(model.config.channels)
    beside = destination / STATISTICS[0]
    goes_along = found if to not in ("repa-e", "safetensors") else None  # in the file itself; a file and nothing beside
    if goes_along is not None and beside.exists():
        raise CheckpointError(f"{beside} is there already; give another folder")
    steps = stored.content.get("steps", 0) if isinstance(stored.content, dict) else 0
    file = write_checkpoint(model, destination, to, steps=steps if isinstance(steps, int) else 0, statistics=moments)
    if goes_along is not None:
        goes_along.save(destination)
    time = getattr(model.config, "time", None)
    said = {"sit": ", t = 1 data as it was", "maetok": ", t = 0 data as it was"}.get(str(time), "")
    normalised = f", statistics of {goes_along.source}: {beside}" if goes_along is not None else ""
    typer.echo(f"{type(model).__name__}{said}: {file}{normalised}")
