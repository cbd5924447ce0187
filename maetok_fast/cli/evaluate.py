# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""`maetok-fast evaluate`: a set of images against a reference, in numbers that say how they were computed."""

from __future__ import annotations

import enum
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import _said

if TYPE_CHECKING:
    from maetok_fast.evaluation.evaluate import Comparison


class Crop(enum.Enum):
    center = "center"
    adm = "adm"


class Precision(enum.Enum):
    fp32, fp64, bf16 = "fp32", "fp64", "bf16"


_OF_PAIRS = ("lpips", "lpips_heads")  # what --reconstruction takes weights of
_METRICS = "fd,sfid,is,prec,kid,mind"


def evaluate(
    samples: Annotated[str, typer.Option(help="Folder, .npz (ADM's arr_0), tar, list, or an installed set.")] = "",
    reference: Annotated[str, typer.Option(help="The same, or a .npz of statistics (mu, sigma).")] = "",
    out: Annotated[str, typer.Option(help="Folder of evaluation.json and .md, and of features: resumable.")] = "",
    extractors: Annotated[str, typer.Option(help="inception, dinov2, timm:NAME, random; with commas.")] = "inception",
    weights: Annotated[
        list[str] | None, typer.Option(help="EXTRACTOR=FILE, hub or random; again for another one.")
    ] = None,
    metrics: Annotated[str, typer.Option(help=f"Some of {_METRICS}.")] = _METRICS,
    reconstruction: Annotated[
        bool, typer.Option(help="Samples are reconstructions of the reference, pair by pair: PSNR, SSIM, LPIPS, rFID.")
    ] = False,
    floor: Annotated[str, typer.Option(help="Real images beside the reference: FDr, FD over theirs.")] = "",
    save_statistics: Annotated[
        str, typer.Option(help="Write the reference's statistics (without one, the samples') to this .npz.")
    ] = "",
    features: Annotated[str, typer.Option(help="Folder of features, shared by runs; default: OUT/features.")] = "",
    size: Annotated[int, typer.Option(min=0, help="Resize and crop files to so many pixels; 0: as they are.")] = 0,
    crop: Annotated[Crop, typer.Option(help="Of --size: EXIF, bicubic, centre; adm: as REPA and RAE.")] = Crop.center,
    limit: Annotated[int, typer.Option(min=0, help="The first so many images of each set; 0: all.")] = 0,
    precision: Annotated[Precision, typer.Option(help="Published numbers are fp32.")] = Precision.fp32,
    batch: Annotated[int, typer.Option(min=1, help="Images at a time.")] = 64,
    device: Annotated[str, typer.Option(help="cpu, cuda; default: cuda where there is one.")] = "",
    log: Annotated[str, typer.Option(help="Instead: a run's folder, whose measurements --until looks at.")] = "",
    until: Annotated[str, typer.Option(help="NAME=VALUE of --log, e.g. fd_inception=10: when it fell to that.")] = "",
) -> None:
    """FID, sFID, IS, precision and recall as ADM's evaluator defines them, KID and MIND with intervals, FD in other
    features. With --out it goes on where it was stopped; under torchrun the processes share the images."""
    from maetok_fast.evaluation.evaluate import Comparison
    from maetok_fast.evaluation.extractors import create_extractor
    from maetok_fast.evaluation.sets import open_set
    from maetok_fast.pipeline.run import make_folder

    with _said.in_a_sentence(), _said.processes(device) as (where, process, count):
        folder = Path(out) if out else None
        parts = Path(features) if features else folder / "features" if folder else None
        if log or until:
            typer.echo(_crossing(log, until))
            return
        if not samples:
            raise ValueError("nothing to evaluate: give --samples, or --log and --until")
        if count > 1 and parts is None:
            raise ValueError("several processes share features on disk: give --out or --features")
        if not reference and (reconstruction or floor or not save_statistics):
            raise ValueError("nothing to compare with: give --reference, or --save-statistics FILE.npz alone")
        if save_statistics and not save_statistics.lower().endswith(".npz"):
            raise ValueError(
                f"--save-statistics {save_statistics}: give it a name that ends in .npz, or nothing reads it"
            )
        if reconstruction and folder is None:
            raise ValueError("--reconstruction writes per_image.csv and worst.png: give --out")
        names = [name.strip() for name in extractors.split(",") if name.strip()]
        chosen = _weights(weights or [], names, reconstruction)
        options: dict[str, Any] = {"size": size or None, "crop": crop.value, "limit": limit or None}
        sets = [open_set(path, **options) if path else None for path in (samples, reference, floor)]
        assert sets[0] is not None
        comparison = Comparison(
            sets[0],
            sets[1],
            [
                create_extractor(n, chosen.get(n, "hub"), device=where, precision=precision.value)
                for n in dict.fromkeys(names)
            ],
            folder=parts,
            floor=sets[2],
            metrics=[name.strip() for name in metrics.split(",") if name.strip()],
            batch=batch,
            device=where,
            kind="r" if reconstruction else "",
            bar=lambda what, total: _said.progress(what, total, process == 0),
        )
        if folder is not None:
            make_folder(folder)
        if count > 1:
            comparison.extract(process, count)
            _said.barrier()
        if process == 0:
            if sets[1] is not None:
                pairs = {name: file for name, file in chosen.items() if name in _OF_PAIRS}
                _measure(comparison, folder, pairs if reconstruction else None)
            if save_statistics:
                whose = comparison.save_statistics(Path(save_statistics))
                typer.echo(f"statistics of {whose.path}, {', '.join(names)}: {save_statistics}")


def _measure(comparison: Comparison, folder: Path | None, pairs: dict[str, str] | None) -> None:
    """pairs: weights of what compares pair by pair; None where nothing is to."""
    from maetok_fast.evaluation.features import keep
    from maetok_fast.evaluation.result import markdown, text

    result = comparison.measure()
    if pairs is not None and folder is not None:
        from maetok_fast.evaluation.reconstruction import measure_reconstructions

        assert comparison.reference is not None
        with _said.progress("pairs", len(comparison.samples)) as tick:
            result["reconstruction"] = measure_reconstructions(
                comparison.reference,
                comparison.samples,
                folder,
                weights=pairs,
                device=comparison.device,
                batch=comparison.batch,
                tick=tick,
            )
    if folder is not None:
        keep(folder / "evaluation.json", lambda p: p.write_text(json.dumps(result, indent=1) + "\n"))
        keep(folder / "evaluation.md", lambda p: p.write_text(markdown(result)))
    typer.echo(text(result))
    if folder is not None:
        typer.echo(f"\n{folder / 'evaluation.json'}, {folder / 'evaluation.md'}")


def _crossing(log: str, until: str) -> str:
    """When a run's measurement fell to a value, in a sentence."""
    from maetok_fast.training.online import first_below

    name, equals, text = until.partition("=")
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not (log and equals) or value != value:
        raise ValueError(f"--log and --until go together, as --log RUN --until fd_inception=10; got {log!r}, {until!r}")
    found = first_below(log, name, value)
    if found is None:
        return f"{log}: {name} was never {value:g} or less"
    epochs = "" if found.epochs is None else f", {found.epochs:.4g} epochs"
    images = "" if found.images is None else f", {found.images:,} images"
    return (
        f"{log}: {name} was {value:g} at step {found.step:,.0f}{epochs}{images} (linear in the step between the two "
        "measurements around it)"
    )


def _weights(given: list[str], names: list[str], reconstruction: bool) -> dict[str, str]:
    """{extractor: file or word}."""
    found = {}
    for text in given:
        name, equals, value = text.partition("=")
        if not equals or not value:
            raise ValueError(f"--weights {text}: expected EXTRACTOR=FILE, e.g. inception=/path/to/weights.pth")
        if name not in names and not (reconstruction and name in _OF_PAIRS):
            also = f", nor {' nor '.join(_OF_PAIRS)}" if reconstruction else ""
            raise ValueError(f"--weights {text}: {name} is none of the extractors ({', '.join(names)}){also}")
        found[name] = value
    return found
