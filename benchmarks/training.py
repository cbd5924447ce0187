# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""A training step of stage 1: ours and the public-style one (baselines/training.py), time and memory.

    python benchmarks/training.py --batch 2                    MAETok-B at 256 px, random weights, step 15000
    python benchmarks/training.py --step-number 30000          from where the discriminator counts
    python benchmarks/training.py --side public                one side alone

Seconds: both in this process, in turn, round by round, with a large product among them, the ceiling; the ratio is of
each round's pair. Memory: each side in a process of its own, beyond what that held after its imports: what is built
(networks, averages), and what the first two steps need on top (gradients, moments, activations). On a CPU resident
memory, looked at every 2 ms.
The parts of a step are each side's own time in them; "losses" of ours holds the gradient up to the pixels, which the
public side has in "backward".
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.append(str(Path(__file__).resolve().parent.parent))

from benchmarks import _cli
from benchmarks._parts import PARTS, Parts
from benchmarks.baselines.training import SCALES, PublicStep
from maetok_fast._optional import probe
from maetok_fast.bench.machine import DTYPES, describe, headline, matmul
from maetok_fast.bench.timing import PeakMemory, Spread, held_bytes, rounds
from maetok_fast.training.teachers import chosen_precision

SIDES = ("ours", "public")
CEILING, REST = "matmul", "the rest"
GEMM = {"real": 4096, "small": 512}


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = _cli.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--batch", type=_cli.count, default=2, help="images a step (default 2)")
    add("--size", type=_cli.count, default=256, help="of the images in pixels, a multiple of 16 (default 256)")
    add("--precision", choices=["auto", "fp32", "bf16"], default="auto", help="default: the fastest at full rate here")
    add("--teachers", choices=["auto", "fp32", "bf16", "int8"], default="auto", help="precision of ours (default auto)")
    add("--step-number", type=int, default=15_000, help="which step of the run (default 15000, before the "
        "discriminator's start at 30000)")  # fmt: skip
    add("--rounds", type=_cli.count, default=5, help="timed steps of each side (default 5)")
    add("--scale", choices=sorted(SCALES), default="real", help="small: tiny networks, to try the benchmark")
    add("--side", choices=SIDES, help="this side alone, without ratios")
    add("--device", default="cpu", help="cpu (default) or cuda")
    add("--memory", choices=SIDES, help="the memory of this side, in this process; prints JSON")
    add("--json", type=Path)
    args = parser.parse_args(argv)
    if args.size % 16 or args.size < 32:
        parser.error(f"--size must be a multiple of 16 (the patch) and at least 32, got {args.size}")
    if args.step_number < 0:
        parser.error(f"--step-number must be at least 0, got {args.step_number}")
    args.precision = _cli.dtype(args.precision, _cli.device(parser, args.device))
    if args.precision == "fp16":
        parser.error("--precision auto: this device computes fp16 at full rate and not bf16; give bf16 or fp32")
    for name in ("timm", "lpips"):
        if probe(name).state != "found":
            parser.error(f"the public-style step needs {name}: {probe(name).reason}")
    _cli.output(parser, "--json", args.json)
    return args


# ---- the two sides -------------------------------------------------------------------------------------------------


class OurStep:
    """One optimizer step of ours, as `maetok_fast.training.loop` makes it: `step(images (B, 3, H, W) uint8)`.

    step: the next step's number. timings: seconds of the last one by part, of `PARTS`; what is in none of the others
    of `stage.backward` is "backward"."""

    def __init__(self, stage: Any, run: Any, ema: Any, device: torch.device) -> None:
        self.stage, self.run, self.ema = stage, run, ema
        self.step = 0
        self.timings: dict[str, float] = {}
        self.parts = Parts(device)
        self._watch()

    def _watch(self) -> None:
        """Puts the clock around the stage's own parts."""
        stage, within = self.stage, self.parts.within
        network = stage.networks[0]
        network.called = within("forward", network.called)
        for owner, method, part in (
            (stage.targets, "compute", "targets"),
            (stage, "_pixel_gradient", "losses"),
            (stage, "_other_losses", "losses"),
            (stage, "_discriminator_backward", "discriminator"),
        ):
            if owner is not None:
                setattr(owner, method, within(part, getattr(owner, method)))
        for trained in stage.networks:
            for method in ("step", "zero_grad"):
                setattr(trained.optimizer, method, within("optimizer", getattr(trained.optimizer, method)))
        self.ema.update = within("EMA", self.ema.update)
        if stage.discriminator is not None:
            stage.discriminator.generator = within("discriminator", stage.discriminator.generator)

    def __call__(self, images: Tensor) -> dict[str, Tensor]:
        from maetok_fast.data.loader import Batch
        from maetok_fast.training.loop import optimize

        parts, run, stage = self.parts, self.run, self.stage
        parts.seconds = {}
        batch = Batch(images, None, None, tuple(range(len(images))), 0, self.step)
        with parts("backward"):
            values: dict[str, Tensor] = stage.backward(batch, self.step, 0, 1)
        values |= optimize(run, stage, self.ema, self.step)
        self.step += 1
        self.timings = parts.seconds
        return values


def our_run(args: argparse.Namespace, device: torch.device) -> Any:
    """`runs.tokenizer_256` at the benchmark's sizes, with random weights everywhere."""
    from maetok_fast.models.configs import ViTSize
    from maetok_fast.training.runs import tokenizer_256

    scale, run = SCALES[args.scale], tokenizer_256()
    teachers = tuple(scale.teachers) if args.scale == "real" else tuple(scale.teachers.values())
    vit, auxiliary = ViTSize(*scale.vit), ViTSize(*scale.auxiliary)
    return replace(
        run,
        model=replace(run.model, image_size=args.size, base_image_size=args.size, encoder=vit, decoder=vit),
        auxiliary=replace(run.auxiliary, targets=("hog", *teachers), size=auxiliary),
        teachers=replace(
            run.teachers, weights=dict.fromkeys(teachers, "random"), precision=args.teachers, statistics="public"
        ),
        loss=replace(run.loss, vgg="random"),
        adversarial=replace(run.adversarial, weights="random"),
        loop=replace(run.loop, batch=args.batch, precision=args.precision, device=str(device)),
    )


def make_ours(run: Any, device: torch.device) -> OurStep:
    """The stage of a run, wrapped and with its optimizers as `training.loop.Loop` does it."""
    from maetok_fast.training.build_tokenizer import make_stage
    from maetok_fast.training.loop import prepare
    from maetok_fast.training.world import World

    world, stage = World(str(device)), make_stage(run, device)
    ema = prepare(run, stage, world)
    for network in stage.networks:
        network.module.train()
    return OurStep(stage, run, ema, device)


def make(side: str, args: argparse.Namespace, device: torch.device) -> tuple[Any, Tensor]:
    """A side and the images as it takes them, the same for both; ready before the clock starts."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (args.batch, 3, args.size, args.size), generator=generator, dtype=torch.uint8)
    pixels = pixels.to(device)
    if side == "public":
        return PublicStep(args.size, args.scale, DTYPES[args.precision], device=device), pixels.float() / 127.5 - 1
    return make_ours(our_run(args, device), device), pixels


# ---- measuring -----------------------------------------------------------------------------------------------------


def memory_of(side: str, args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """{"built", "steps"}: bytes held once the side is made, and on top of them at the peak of its first steps."""
    import lpips  # noqa: F401  # the libraries' own memory is no step's
    import scipy.stats  # noqa: F401
    import timm  # noqa: F401

    before = held_bytes(device)
    step, images = make(side, args, device)
    built = held_bytes(device)
    with PeakMemory(device) as peak:
        for _ in range(2):
            step.step = args.step_number
            step(images)
    if before is None or built is None or peak.extra_bytes is None:
        return {"side": side, "built": None, "steps": None}
    return {"side": side, "built": built - before, "steps": peak.extra_bytes}


def measure_memory(side: str, args: argparse.Namespace) -> dict[str, Any]:
    """`memory_of` in a process of its own; {"side", "error"} where that failed."""
    options = ("batch", "size", "precision", "teachers", "step_number", "scale", "device")
    return _cli.elsewhere(__file__, "--memory", side, args, options)


def measure_time(sides: Sequence[str], args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """{"seconds": side -> one a round, "parts": side -> part -> median seconds, "gemm_tflops"}."""
    history: dict[str, list[dict[str, float]]] = {side: [] for side in sides}

    def case(side: str) -> Callable[[], None]:
        step, images = make(side, args, device)

        def call() -> None:
            step.step = args.step_number
            start = time.perf_counter()
            step(images)
            taken = time.perf_counter() - start
            history[side].append(step.timings | {REST: taken - sum(step.timings.values())})

        return call

    cases: dict[str, Callable[[], Any]] = {side: case(side) for side in sides}
    cases[CEILING], flops = matmul(device, args.precision, GEMM[args.scale])
    # its own first call of each case warms it up
    samples = rounds(cases, device, seconds=0.0, least=args.rounds, most=args.rounds)
    parts = {
        side: {part: statistics.median(row.get(part, 0.0) for row in rows[-args.rounds :]) for part in (*PARTS, REST)}
        for side, rows in history.items()
    }
    gemm = flops / statistics.median(samples.pop(CEILING)) / 1e12
    return {"seconds": samples, "parts": parts, "gemm_tflops": gemm}


def ratios(seconds: dict[str, list[float]]) -> Spread:
    """public / ours of each round's pair."""
    return Spread.of([public / ours for ours, public in zip(seconds["ours"], seconds["public"], strict=True)])


# ---- what is printed -----------------------------------------------------------------------------------------------


def tables(sides: Sequence[str], times: dict[str, Any], memory: dict[str, dict[str, Any]], batch: int) -> list[str]:
    """The lines under the headline; the ratios are public / ours."""
    both = len(sides) == len(SIDES)
    head = "".join(f"{side:>10s}" for side in sides) + ("     ratio" if both else "")
    lines = [f"  {'':32s}{head}"]

    def row(name: str, values: Sequence[float | None], digits: int = 3, more: str = "") -> None:
        cells = "".join(f"{'-':>10s}" if v is None else f"{v:10.{digits}f}" for v in values)
        ours, public = values[0], values[-1]
        ratio = f"{public / ours:8.2f} x" if both and ours and public is not None else ""
        lines.append(f"  {name:32s}{cells}{more or ratio}")

    median = {side: statistics.median(times["seconds"][side]) for side in sides}
    spread = ratios(times["seconds"]) if both else None
    row(
        "step, seconds",
        [median[s] for s in sides],
        more="" if spread is None else f"{spread.median:8.2f} x  (quartiles {spread.low:.2f} .. {spread.high:.2f})",
    )
    row("images/s", [batch / median[s] for s in sides], more=" ")
    for part in (*PARTS, REST):
        row(f"  {part}, seconds", [times["parts"][s][part] for s in sides])
    for name, keys in (("built", ["built"]), ("steps on top", ["steps"]), ("peak", ["built", "steps"])):
        held = [[memory[s].get(key) for key in keys] for s in sides]
        row(f"memory, {name}, GB", [None if None in h else sum(h) / 1e9 for h in held], 2)
    return lines + [f"  memory of {s}: {memory[s]['error']}" for s in sides if "error" in memory[s]]


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    device = torch.device(args.device)
    if args.memory:
        print(json.dumps(memory_of(args.memory, args, device)))
        return
    sides = SIDES if args.side is None else (args.side,)
    machine = describe(device)
    teachers = chosen_precision(args.teachers, device)[0]
    print(f"{headline(machine)}; {args.precision}, teachers: ours {teachers}, public fp32")
    print(f"stage 1, {args.scale} sizes, {args.size} px, batch {args.batch}, step {args.step_number}", flush=True)
    # the memory first: nothing of it is held while the clock runs
    memory = {side: measure_memory(side, args) for side in sides}
    times = measure_time(sides, args, device)
    print("\n".join(tables(sides, times, memory, args.batch)))
    print(f"  {GEMM[args.scale]}^3 products, in turn with the steps: {times['gemm_tflops']:.3f} TFLOP/s")
    if args.json:
        spread = asdict(ratios(times["seconds"])) if len(sides) == len(SIDES) else None
        document = {"benchmark": "training", "machine": machine, "arguments": vars(args), "memory": memory}
        args.json.write_text(json.dumps(document | times | {"ratio": spread}, indent=1, default=str))


if __name__ == "__main__":
    main()
