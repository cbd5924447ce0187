# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""`maetok-fast scale`: what an epoch costs on many GPUs, before anybody pays. `--table`: docs/scale.md's tables."""

from __future__ import annotations

import enum
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import _said

if TYPE_CHECKING:
    from maetok_fast.training.scale import Estimate


class Stage(enum.Enum):
    tokenizer, cache, generator = "tokenizer", "cache", "generator"


class Parallel(enum.Enum):
    ddp, fsdp = "ddp", "fsdp"


def scale(
    stage: Annotated[Stage, typer.Option(help="What is trained, or encoded.")] = Stage.generator,
    model: Annotated[str, typer.Option(help="Of the generator: sit_xl, sit_l.")] = "sit_xl",
    gpus: Annotated[int, typer.Option(min=1, help="In all.")] = 8,
    device: Annotated[str, typer.Option(help="A100, H100, H200, B200.")] = "H100",
    images: Annotated[int, typer.Option(min=1, help="Of an epoch.")] = 1_281_167,
    batch: Annotated[int, typer.Option(min=0, help="Of a step, over all GPUs; 0: as many a GPU as in the recipe.")] = 0,
    parallel: Annotated[Parallel, typer.Option(help="DistributedDataParallel or FSDP2.")] = Parallel.ddp,
    precision: Annotated[str, typer.Option(help="bf16, fp16, fp8, fp32.")] = "bf16",
    accumulate: Annotated[int, typer.Option(min=1, help="Parts of a step.")] = 1,
    recompute: Annotated[bool, typer.Option(help="loop.recompute.")] = True,
    mfu: Annotated[float, typer.Option(help="Assumed share of the stated peak, forward and backward.")] = 0.4,
    decode: Annotated[float, typer.Option(help="Images/s of a core (benchmarks/data.py).")] = 281.0,
    cores: Annotated[float, typer.Option(help="Of a GPU; 0: its share of the node's.")] = 0.0,
    image_kb: Annotated[float, typer.Option(help="Of a JPEG on average.")] = 110.0,
    read: Annotated[float, typer.Option(help="GB/s that the file system gives to all.")] = 40.0,
    write: Annotated[float, typer.Option(help="GB/s that it takes from one process.")] = 2.0,
    nvlink: Annotated[float, typer.Option(help="GB/s of a GPU inside a node, one way; 0: the data sheet's.")] = 0.0,
    network: Annotated[float, typer.Option(help="GB/s of a node, one way; 0: the data sheet's.")] = 0.0,
    half: Annotated[bool, typer.Option("--half", help="Latents are stored in 16 bits.")] = False,
    flips: Annotated[bool, typer.Option(help="The cache has mirror images.")] = True,
    price: Annotated[float, typer.Option(help="Of a GPU-hour.")] = 0.0,
    table: Annotated[bool, typer.Option("--table", help="Print docs/scale.md's tables and stop.")] = False,
) -> None:
    """Time, bytes, cores, memory and GPU-hours of one epoch, from counted work, stated peaks and rates of your own."""
    from rich.console import Console
    from rich.table import Table

    from maetok_fast.training import work
    from maetok_fast.training.scale import Estimate, Plan

    if table:
        typer.echo(markdown(), nl=False)
        return
    with _said.in_a_sentence():
        count: dict[Stage, Callable[[], Any]] = {
            Stage.tokenizer: work.tokenizer,
            Stage.cache: lambda: work.encoder(flips),
            Stage.generator: lambda: work.generator(model),
        }
        plan = Plan(
            count[stage](), images=images, gpus=gpus, batch=batch, device=device, parallel=parallel.value,
            precision=precision, accumulate=accumulate, recompute=recompute, mfu=mfu, decode=decode, cores=cores,
            image_bytes=image_kb * 1e3, read=read * 1e9, write=write * 1e9, nvlink=nvlink * 1e9, network=network * 1e9,
            number=2 if half else 4, flips=flips, price=price,
        )  # fmt: skip
        found = Estimate(plan)
    title = f"{plan.work.name}, {gpus} {device}, {plan.images:,} images"
    shown = Table("", "", "by", title=title, title_justify="left")
    for name, value, how in rows(found):
        shown.add_row(name, value, how)
    Console().print(shown)


# ---- numbers in words ----------------------------------------------------------------------------------------------


def rows(found: Estimate) -> list[tuple[str, str, str]]:
    """(what, how much, by which formula) of one plan."""
    plan, work = found.plan, found.plan.work
    trains, node, memory = work.averaged > 0, plan.node, found.memory
    more: list[tuple[str, str, str]] = []
    if trains:
        more = [
            ("optimizer", seconds(found.optimizer), f"40 bytes a number / {size(node.hbm)}/s"),
            ("sent by a GPU", size(found.moved), f"a step, {plan.parallel}, {_ring(plan.parallel)}"),
            ("that takes", seconds(found.communication), f"at {size(found.link)}/s, one way"),
            ("not hidden", seconds(found.exposed), "behind the arithmetic"),
        ]
    listed = [
        ("images of a step", f"{plan.step_batch:,}", f"{found.images:,} a GPU"),
        (
            "forward, backward",
            seconds(found.compute),
            f"{work.flops / 1e9:,.0f} GFLOP an image, {plan.mfu:g} of the peak",
        ),
        *more,
        ("a step", seconds(found.step), f"bound by {found.bound}"),
        ("images/s", f"{found.rate:,.0f}", f"{found.rate / plan.gpus:,.0f} a GPU"),
        ("steps of an epoch", f"{found.steps:,}", "images / batch"),
        ("an epoch", seconds(found.epoch), "images / (images/s), checkpoints included"),
        ("read in an epoch", size(found.read), f"{size(found.read / plan.images)} an image, {_rate(found)}"),
    ]
    if work.images:
        listed.append(("decoding cores a GPU", f"{found.cores:.1f}", f"at {plan.decode:g} images/s a core"))
    if not (trains and work.images):
        listed.append(("latent cache", size(found.cache), f"{size(found.cache / plan.images)} an image"))
    if trains:
        listed += [
            ("a checkpoint", size(found.checkpoint), "weights, two moments, average, fp32, by rank 0"),
            ("that takes", seconds(found.writing), f"at {size(plan.write)}/s, {found.checkpoints:.1%} of the time"),
            ("memory, DDP", size(found.ddp.total), _parts(found.ddp)),
            ("memory, FSDP2", size(found.fsdp.total), _parts(found.fsdp)),
        ]
    fits = "fits" if memory.total < node.memory else "DOES NOT FIT"
    listed.append(("memory of a GPU", size(node.memory), f"{fits}: {size(memory.total)} of this plan"))
    if trains:
        spent = plan.gpus * found.run / 3600
        cost = f", cost {spent * plan.price:,.2f}" if plan.price else ""
        listed.append((f"{work.steps:,} steps", seconds(found.run), f"the recipe's; {spent:,.0f} GPU-hours{cost}"))
    listed.append(("GPU-hours of an epoch", f"{found.gpu_hours:,.2f}", f"cost {found.cost:,.2f}" if plan.price else ""))
    return listed


def _ring(parallel: str) -> str:
    return "2 (W-1)/W of the gradients" if parallel == "ddp" else "gathered twice, reduce-scattered once"


def _rate(found: Estimate) -> str:
    return f"{size(found.rate * found.read / found.plan.images)}/s in all"


def _parts(memory: Any) -> str:
    return ", ".join(f"{name} {size(value)}" for name, value in vars(memory).items() if value)


def size(count: float) -> str:
    """Three digits of bytes, 1 GB = 1e9."""
    for unit, one in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("KB", 1e3)):
        if count >= one * 0.9995:
            return f"{_three(count / one)} {unit}"
    return f"{count:.0f} B"


def seconds(count: float) -> str:
    for unit, one, least in (("d", 86400, 172800), ("h", 3600, 7200), ("min", 60, 120), ("s", 1, 1)):
        if count >= least:
            return f"{_three(count / one)} {unit}"
    return f"{_three(count * 1e3)} ms"


def _three(value: float) -> str:
    """Three digits: 0.131, 5.31, 42.0, 1,281."""
    if value >= 99.95:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 9.995 else f"{value:.2f}" if value >= 0.9995 else f"{value:.3f}"


# ---- docs/scale.md -------------------------------------------------------------------------------------------------

GPUS = (8, 64, 512)
SETS = {"ImageNet-1k": 1_281_167, "1 B images": 1_000_000_000}


def markdown() -> str:
    """The tables of docs/scale.md: H100s, the recipe's images a GPU, every default of `Plan`."""
    from maetok_fast.training import work
    from maetok_fast.training.scale import Estimate, Plan

    works = {
        "Tokenizer: stage 1 at 256 px": work.tokenizer(),
        "Latent cache: images and mirror images encoded": work.encoder(),
        "Generator: SiT-XL on 128 x 32 latents": work.generator(),
    }
    lines: list[str] = []
    for title, counted in works.items():
        ddp, fsdp = ([Estimate(Plan(counted, gpus=n, parallel=kind)) for n in GPUS] for kind in ("ddp", "fsdp"))
        lines += [f"### {title}", "", *_row("a step", [f"{n} GPUs" for n in GPUS]), "|---|" + "---:|" * len(GPUS)]
        for name, cells in _step_rows(ddp, fsdp):
            lines += _row(name, cells)
        lines.append("")
    lines += ["### An epoch", "", *_row("stage, images", [*(f"{n} GPUs" for n in GPUS), "GPU-hours", "read", "cache"])]
    lines.append("|---|" + "---:|" * 6)
    for title, counted in works.items():
        for name, images in SETS.items():
            found = [Estimate(Plan(counted, images=images, gpus=n)) for n in GPUS]
            hours = " / ".join(_three(e.gpu_hours) for e in found)
            cache = "" if counted.averaged else size(found[0].cache)
            cells = [*(seconds(e.epoch) for e in found), hours, size(found[0].read), cache]
            lines += _row(f"{title.partition(':')[0]}, {name}", cells)
    lines += ["", "### The recipe's batch held", ""]
    lines += _row(
        "stage, batch",
        ["GPUs", "images a GPU", "compute", "optimizer", "not hidden", "images/s", "of linear from 8, DDP", "the run"],
    )
    lines.append("|---|" + "---:|" * 8)
    for title, counted in works.items():
        if not counted.averaged:
            continue
        first = Estimate(Plan(counted, gpus=8, batch=counted.batch)).rate / 8
        for n in (8, 64, 256):
            for kind in ("ddp", "fsdp"):
                e = Estimate(Plan(counted, gpus=n, batch=counted.batch, parallel=kind))
                cells = [f"{n}, {kind}", f"{e.images}", *(seconds(x) for x in (e.compute, e.optimizer, e.exposed))]
                cells += [f"{e.rate:,.0f}", f"{e.rate / n / first:.0%}"]
                cells.append(f"{seconds(e.run)}, {_three(n * e.run / 3600)} GPU-hours")
                lines += _row(f"{title.partition(':')[0]}, {counted.batch}", cells)
    return "\n".join(lines) + "\n"


def _row(name: str, cells: list[str]) -> list[str]:
    return [f"| {name} | " + " | ".join(cells) + " |"]


def _step_rows(ddp: list[Estimate], fsdp: list[Estimate]) -> list[tuple[str, list[str]]]:
    def each(cell: Callable[[Estimate], str], both: bool = False) -> list[str]:
        return [f"{cell(a)} / {cell(b)}" if both else cell(a) for a, b in zip(ddp, fsdp)]

    trains, reads = ddp[0].plan.work.averaged > 0, ddp[0].plan.work.images
    found = [
        ("images a GPU, of a step", each(lambda e: f"{e.images}, {e.plan.step_batch:,}")),
        ("forward, backward" if trains else "forward", each(lambda e: seconds(e.compute))),
    ]
    if trains:
        found += [
            ("optimizer, DDP / FSDP", each(lambda e: seconds(e.optimizer), True)),
            ("sent by a GPU, DDP / FSDP", each(lambda e: size(e.moved), True)),
            ("that takes, DDP / FSDP", each(lambda e: seconds(e.communication), True)),
            ("not hidden, DDP / FSDP", each(lambda e: seconds(e.exposed), True)),
        ]
    found.append(("images/s" + (", DDP / FSDP" if trains else ""), each(lambda e: f"{e.rate:,.0f}", trains)))
    if reads:
        found.append(("decoding cores a GPU", each(lambda e: f"{e.cores:.1f}")))
    found.append(("read", each(lambda e: f"{size(e.rate * e.image_bytes)}/s")))
    if trains:
        found += [
            ("a checkpoint", each(lambda e: f"{size(e.checkpoint)}, {seconds(e.writing)}, {e.checkpoints:.1%}")),
            ("memory, DDP / FSDP", each(lambda e: size(e.memory.total), True)),
            ("of it activations", each(lambda e: size(e.memory.activations))),
        ]
    found.append(("bound by" + (", DDP / FSDP" if trains else ""), each(lambda e: e.bound, trains)))
    return found
