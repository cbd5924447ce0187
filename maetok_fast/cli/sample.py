# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""`maetok-fast sample`: pictures of a generator and a tokenizer, into a folder."""

from __future__ import annotations

import enum
import math
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from . import _said


class Mode(enum.Enum):
    ode, sde = "ode", "sde"


class Solver(enum.Enum):
    euler, heun, dopri5, meanflow = "euler", "heun", "dopri5", "meanflow"


class Convention(enum.Enum):
    data0, data1 = "data0", "data1"


class Labels(enum.Enum):
    equal, random = "equal", "random"


def sample(
    generator: Annotated[str, typer.Option(help="A SiT or LightningDiT: folder, file or hub repository.")],
    tokenizer: Annotated[str, typer.Option(help="The MAETok whose latents it samples.")],
    out: Annotated[Path, typer.Option(help="Folder of the pictures; OUT.npz is written beside it.")],
    classes: Annotated[str, typer.Option(help="Class labels, e.g. 207,360; 'none': unconditional.")] = "",
    per_class: Annotated[int, typer.Option(min=1, help="Samples of each of --classes.")] = 1,
    num_fid_samples: Annotated[int, typer.Option(min=0, help="So many samples over all classes instead.")] = 0,
    label_sampling: Annotated[Labels, typer.Option(help="Of --num-fid-samples.")] = Labels.equal,
    steps: Annotated[int, typer.Option(min=1)] = 250,
    mode: Annotated[Mode, typer.Option(help="ode: by --solver; sde: Euler-Maruyama.")] = Mode.sde,
    solver: Annotated[Solver, typer.Option(help="Of --mode ode; meanflow: of few-step models.")] = Solver.euler,
    cfg_scale: Annotated[float, typer.Option(help="Guidance; 1: none.")] = 1.0,
    guidance_low: Annotated[float, typer.Option(help="Guide at times t (0 data, 1 noise) from here ...")] = 0.0,
    guidance_high: Annotated[float, typer.Option(help="... to here.")] = 1.0,
    internal_guidance: Annotated[float, typer.Option(help="By the model's early exit; 1: none.")] = 1.0,
    internal_low: Annotated[float, typer.Option(help="Its times, as --guidance-low and -high.")] = 0.0,
    internal_high: Annotated[float, typer.Option()] = 1.0,
    temperature: Annotated[Optional[float], typer.Option(help="beta of guidance-free models.")] = None,  # noqa: UP045
    guidance_channels: Annotated[int, typer.Option(min=0, help="Guide the first channels only; 0: all.")] = 0,
    autoguidance: Annotated[str, typer.Option(help="A worse generator as the negative branch.")] = "",
    path_type: Annotated[str, typer.Option(help="linear or cosine: what it was trained on.")] = "linear",
    timestep_shift: Annotated[str, typer.Option(help="1: none; auto: by the latents' dimensions (RAE).")] = "1",
    convention: Annotated[
        Convention, typer.Option(help="Of the times above; data1: data is at t = 1 (LightningDiT, VTP, SFD).")
    ] = Convention.data0,
    statistics: Annotated[str, typer.Option(help="File of the latents' mean and std; default: beside them.")] = "",
    global_seed: Annotated[int, typer.Option(min=0, max=2**32 - 1)] = 0,
    batch: Annotated[int, typer.Option(min=1, help="Pictures at a time; changes none of them.")] = 8,
    precision: Annotated[str, typer.Option(help="auto, fp32, bf16, fp16.")] = "auto",
    device: Annotated[str, typer.Option(help="cpu, cuda; default: cuda where there is one.")] = "",
) -> None:
    """Sample pictures: PNGs, a labelled grid, OUT.npz and run.json. Stopped at any point it goes on where it was; under
    torchrun the processes share the work and the files are the same."""
    from maetok_fast.pipeline import Pipeline
    from maetok_fast.pipeline.run import SamplingRun

    flipped = convention is Convention.data1
    settings: dict[str, Any] = {
        "steps": steps,
        "method": "sde" if mode is Mode.sde else solver.value,
        "guidance": cfg_scale,
        "interval": _interval(guidance_low, guidance_high, flipped),
        "guidance_channels": guidance_channels or None,
        "path": path_type,
    }
    # as any run without them had them before they were there: run.json knows a run by its settings
    if internal_guidance != 1.0:
        settings["internal"] = internal_guidance
        settings["internal_interval"] = _interval(internal_low, internal_high, flipped)
    if temperature is not None:
        settings["temperature"] = temperature
    with _said.in_a_sentence(), _said.processes(device) as (where, process, count):
        pipeline = Pipeline.from_pretrained(
            tokenizer,
            generator,
            negative=autoguidance or None,
            statistics=statistics or None,
            device=where,
            precision=precision,
        )
        assert pipeline.generator is not None
        settings["shift"] = _shift(timestep_shift, pipeline.shape, flipped)
        known = pipeline.generator.config.num_classes
        labels = _labels(classes, per_class, num_fid_samples, label_sampling, known, global_seed)
        about = {"weights": pipeline.fingerprint, "precision": pipeline.precision.name, "device": where.type}
        run = SamplingRun(out, labels, global_seed, settings, about, batch, process, count)
        run.begin()
        with _said.progress("sampling", len(run.missing()), process == 0) as tick:
            cost = run.make(pipeline, tick)
        _said.barrier()
        if process == 0:
            run.finish(cost)
            made = (
                f"{cost['images']} of {len(labels)} samples made"
                if cost["images"]
                else f"{len(labels)} samples were there"
            )
            speed = f", {cost['images'] / cost['seconds']:.3g} images/s" if cost["images"] else ""
            typer.echo(
                f"{made}, NFE {cost['nfe']}{speed}, {pipeline.precision.name}: {out}, {out / 'grid.png'}, {out}.npz"
            )


def _interval(low: float, high: float, flipped: bool) -> tuple[float, float]:
    """In our convention; flipped: said in the other one."""
    from maetok_fast.diffusion import from_data_at_one

    return from_data_at_one((low, high))[0] if flipped else (low, high)


def _shift(text: str, shape: tuple[int, ...], flipped: bool) -> float:
    """In our convention, in which auto is already."""
    from maetok_fast.diffusion import dimension_shift, from_data_at_one

    if text == "auto":
        return dimension_shift(math.prod(shape))
    try:
        shift = float(text)
    except ValueError:
        raise ValueError(f"--timestep-shift: expected a number or auto, got {text!r}") from None
    return from_data_at_one((0, 1), shift)[1] if flipped else shift


def _labels(classes: str, per_class: int, count: int, how: Labels, known: int, seed: int) -> list[int | None]:
    from maetok_fast.pipeline.run import equal_labels, random_labels

    if bool(classes) == bool(count):
        raise ValueError("give either --classes 207,360 or --num-fid-samples N")
    if count:
        return list(equal_labels(count, known) if how is Labels.equal else random_labels(count, known, seed))
    chosen: list[int | None] = []
    for text in classes.split(","):
        word = text.strip()
        if word == "none":
            chosen += [None] * per_class
        elif word.isdecimal() and int(word) < known:
            chosen += [int(word)] * per_class
        else:
            raise ValueError(f"--classes: {word!r} is no class: expected numbers from 0 to {known - 1}, or none")
    return chosen
