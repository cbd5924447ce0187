# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""A training step of SiT on 128 latents: ours, ours with routing, and the public code's (baselines/generator.py).

    python benchmarks/generator.py --batch 4                   SiT-XL/1, a third of its blocks, random weights, latents
    python benchmarks/generator.py --depth 28 --apart          all of it, one side after the other
    python benchmarks/generator.py --sides ours public         without routing

Optimizer (with the clipping of gradients) and average are in the step. Each side is a process of its own; they make
their steps in turn, round by round, and ratios are of each round's. Two whole SiT-XL with their moments and averages do
not fit into 24 GB: by default it has 9 of its 28 blocks, all of one kind. `--apart` measures one side after the other
instead, and its ratios are of medians. A side's memory is what it holds beyond its imports: what is built (weights,
average), and on top at the peak of its steps (gradients, moments, activations). Every process also times large products
of the step's precision, one after each step: the ceiling, by which the table says what share of a step its products
would take at that rate. `routed`: half of the tokens skip the middle two thirds of the blocks.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.append(str(Path(__file__).resolve().parent.parent))

from benchmarks import _cli
from benchmarks._parts import Parts
from benchmarks.baselines.generator import PublicGeneratorStep
from benchmarks.baselines.sit import SIZES
from maetok_fast.bench.machine import DTYPES, describe, headline, matmul, synchronize
from maetok_fast.bench.timing import PeakMemory, Spread, held_bytes

SIDES = ("ours", "routed", "public")
PARTS = ("forward", "backward", "optimizer", "EMA")
PAIRS = (("ours", "public"), ("routed", "ours"), ("routed", "public"))
SHARE = 0.5
GEMM = 2048


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = _cli.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", choices=[*SIZES, "tiny"], default="xl", help="SiT's size (default xl)")
    add("--depth", type=_cli.count, help="blocks (default: all; of xl 9)")
    add("--tokens", type=_cli.count, default=128)
    add("--batch", type=_cli.count, default=4, help="latents a step (default 4)")
    add("--precision", choices=["auto", "fp32", "bf16"], default="auto", help="default: the fastest at full rate here")
    add("--rounds", type=_cli.count, default=5, help="timed steps of each side (default 5)")
    add("--apart", action="store_true", help="one side after the other")
    add("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    add("--device", default="cpu", help="cpu (default) or cuda")
    add("--one", choices=SIDES, help="this side, in this process, a step for every line of its input; prints JSON")
    add("--json", type=Path)
    args = parser.parse_args(argv)
    args.precision = _cli.dtype(args.precision, _cli.device(parser, args.device))
    if args.precision == "fp16":
        parser.error("--precision auto: this device computes fp16 at full rate and not bf16; give bf16 or fp32")
    if args.model == "tiny":
        shape = (3, 32, 2)
    else:
        shape = SIZES[args.model]
    args.depth = args.depth or (9 if args.model == "xl" else shape[0])
    args.shape = (args.depth, *shape[1:])
    _cli.output(parser, "--json", args.json)
    return args


# ---- one side, in this process -------------------------------------------------------------------------------------


class OurStep:
    """One optimizer step of ours, as `maetok_fast.training.loop` makes it. timings: seconds of the last one by part."""

    def __init__(self, args: argparse.Namespace, device: torch.device, share: float) -> None:
        from maetok_fast.models.configs import SiTConfig
        from maetok_fast.pipeline.statistics import LatentStatistics
        from maetok_fast.training.build_generator import make_generator_stage
        from maetok_fast.training.configs import LoopConfig
        from maetok_fast.training.generator_configs import RoutingConfig, SiTRun
        from maetok_fast.training.latents import Latents
        from maetok_fast.training.loop import prepare
        from maetok_fast.training.world import World

        depth, dim, heads = args.shape
        self.run = SiTRun(
            model=SiTConfig(tokens=args.tokens, dim=dim, depth=depth, heads=heads),
            routing=RoutingConfig(share=share),
            loop=LoopConfig(batch=args.batch, precision=args.precision, device=str(device)),
        )
        latents = Latents((args.tokens, 32), LatentStatistics.identity())
        self.stage = make_generator_stage(self.run, device, latents)
        self.ema = prepare(self.run, self.stage, World(str(device)))
        for network in self.stage.networks:
            network.module.train()
        self.parts, self.step, self.timings = Parts(device), 0, {}
        self.stage.networks[0].called = self.parts.within("forward", self.stage.networks[0].called)

    def __call__(self, z: Tensor, y: Tensor) -> None:
        from maetok_fast.data.latents import LatentBatch
        from maetok_fast.training.loop import optimize

        self.parts.seconds = {}
        batch = LatentBatch(z, y, tuple(range(len(z))), (False,) * len(z), 0, self.step)
        with self.parts("backward"):
            self.stage.backward(batch, self.step, 0, 1)
        with self.parts("optimizer"):
            optimize(self.run, self.stage, self.ema, self.step)
        self.step += 1
        self.timings = self.parts.seconds


def make(side: str, args: argparse.Namespace, device: torch.device) -> Any:
    depth, dim, heads = args.shape
    if side == "public":
        model = {"shape": (args.tokens, 32), "depth": depth, "dim": dim, "heads": heads}
        return PublicGeneratorStep(model, DTYPES[args.precision], device)
    return OurStep(args, device, SHARE if side == "routed" else 0.0)


def serve(side: str, args: argparse.Namespace, device: torch.device) -> None:
    """A line of JSON when the side is warm, one for each step asked for by a line of the input, {"seconds", "parts",
    "gemm_tflops"}, and one at its end, {"built", "steps"}: bytes."""
    import accelerate  # noqa: F401  # the libraries' own memory is no step's

    import maetok_fast.training.build_generator  # noqa: F401

    generator = torch.Generator().manual_seed(0)
    z = torch.randn(args.batch, args.tokens, 32, generator=generator).to(device)
    y = torch.randint(0, 1000, (args.batch,), generator=generator).to(device)
    product, flops = matmul(device, args.precision, GEMM)
    product()
    before = held_bytes(device)
    step = make(side, args, device)
    built = held_bytes(device)
    with PeakMemory(device) as peak:
        for _ in range(2):  # moments are made in the first
            step(z, y)
        print(json.dumps({"ready": side}), flush=True)
        for _ in sys.stdin:
            taken = _timed(lambda: step(z, y), device)
            rate = flops / _timed(product, device) / 1e12
            print(json.dumps({"seconds": taken, "parts": step.timings, "gemm_tflops": rate}), flush=True)
    held = None if before is None or built is None else built - before
    print(json.dumps({"built": held, "steps": peak.extra_bytes}), flush=True)


def _timed(work: Callable[[], Any], device: torch.device) -> float:
    synchronize(device)
    start = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - start


# ---- all of them ---------------------------------------------------------------------------------------------------


class Side:
    """A process that makes a side's steps when it is told to. RuntimeError with its last line where it fails."""

    def __init__(self, side: str, args: argparse.Namespace) -> None:
        self.side, self.rows = side, []
        command = [sys.executable, __file__, "--one", side]
        for option in ("model", "depth", "tokens", "batch", "precision", "device"):
            command += [f"--{option}", str(getattr(args, option))]
        pipe = subprocess.PIPE
        self.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115  # lives as long as the process
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=self.errors, text=True)
        self._read()

    def step(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        self.rows.append(self._read())

    def end(self) -> dict[str, Any]:
        """All of it: "seconds" and "parts" of each step, "gemm_tflops", "built", "steps"."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        memory = self._read()
        self.process.wait()
        parts = [{part: row["parts"].get(part, 0.0) for part in PARTS} for row in self.rows]
        found = {key: [row[key] for row in self.rows] for key in ("seconds", "gemm_tflops")}
        return found | {"parts": parts} | memory

    def _read(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("{"):
                found: dict[str, Any] = json.loads(line)
                return found
        self.process.wait()
        self.errors.seek(0)
        lines = self.errors.read().strip().splitlines() or [f"it ended with status {self.process.returncode}"]
        raise RuntimeError(f"{self.side}: {lines[-1]}")


def measure(args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """`Side.end` of every side."""
    sides = [side for side in SIDES if side in args.sides]
    found = {}
    for together in [[side] for side in sides] if args.apart else [sides]:
        running = [Side(side, args) for side in together]
        for _ in range(args.rounds):
            for one in running:
                one.step()
        found |= {one.side: one.end() for one in running}
    return found


def gemm_flops(args: argparse.Namespace, side: str) -> float:
    """Of the products of a step, forward and backward, counted on meta tensors; a route's share of tokens left out."""
    from maetok_fast.models import SiT, SiTConfig
    from maetok_fast.models.sit import Route
    from maetok_fast.training.flops import module_flops
    from maetok_fast.training.generator_configs import RoutingConfig

    depth, dim, heads = args.shape
    with torch.device("meta"):
        model = SiT(SiTConfig(tokens=args.tokens, dim=dim, depth=depth, heads=heads))
        x, t, y = torch.empty(args.batch, args.tokens, 32), torch.empty(args.batch), torch.zeros(args.batch).long()
        kept = torch.zeros(args.batch, args.tokens - round(args.tokens * SHARE)).long()
        mask = torch.zeros(args.batch, args.tokens).bool()
    route = None if side != "routed" else Route(*RoutingConfig(share=SHARE).blocks(depth), kept, mask)
    return module_flops(model, lambda twin: twin.forward_training(x, t, y, route=route).velocity)


def against(args: argparse.Namespace, rows: dict[str, dict[str, Any]], side: str, other: str) -> Spread:
    """Seconds of `other` over those of `side`: of each round's pair, or of medians where they did not run in turn."""
    mine, others = rows[side]["seconds"], rows[other]["seconds"]
    if args.apart:
        return Spread.of([statistics.median(others) / statistics.median(mine)])
    return Spread.of([b / a for a, b in zip(mine, others, strict=True)])


def table(args: argparse.Namespace, rows: dict[str, dict[str, Any]], flops: dict[str, float]) -> list[str]:
    sides = list(rows)
    lines = ["  " + " " * 34 + "".join(f"{side:>10s}" for side in sides)]

    def row(name: str, values: Sequence[float | None], digits: int) -> None:
        lines.append(f"  {name:34s}" + "".join(f"{'-':>10s}" if v is None else f"{v:10.{digits}f}" for v in values))

    seconds = {side: statistics.median(rows[side]["seconds"]) for side in sides}
    rates = {side: statistics.median(rows[side]["gemm_tflops"]) for side in sides}
    row("step, seconds", [seconds[s] for s in sides], 3)
    row("latents/s", [args.batch / seconds[s] for s in sides], 2)
    for part in PARTS:
        row(f"  {part}, seconds", [statistics.median(p[part] for p in rows[s]["parts"]) for s in sides], 3)
    row("products, TFLOP", [flops[s] / 1e12 for s in sides], 2)
    row(f"{GEMM}^3 products, TFLOP/s", [rates[s] for s in sides], 3)
    row("share of products at that rate, %", [100 * flops[s] / 1e12 / rates[s] / seconds[s] for s in sides], 1)
    row("memory, built, GB", [_gb(rows[s]["built"]) for s in sides], 2)
    row("memory, steps on top, GB", [_gb(rows[s]["steps"]) for s in sides], 2)
    peaks = {s: _sum(rows[s]["built"], rows[s]["steps"]) for s in sides}
    row("memory, peak, GB", [_gb(peaks[s]) for s in sides], 2)
    for side, other in PAIRS:
        if side in rows and other in rows:
            found, a, b = against(args, rows, side, other), peaks[side], peaks[other]
            text = f"{found.median:.2f} x ({found.low:.2f} .. {found.high:.2f})"
            more = "" if a is None or b is None else f", memory {a / b:.2f} x"
            lines.append(f"  {side} against {other}: {text}{more}")
    return lines


def _gb(value: float | None) -> float | None:
    return None if value is None else value / 1e9


def _sum(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else a + b


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    device = torch.device(args.device)
    if args.one:
        serve(args.one, args, device)
        return
    machine = describe(device)
    depth, dim, heads = args.shape
    print(f"{headline(machine)}; {args.precision}")
    how = "one side after the other" if args.apart else "in turn"
    print(
        f"SiT of {depth} blocks, width {dim}, {heads} heads; {args.tokens} latents, batch {args.batch}; "
        f"{args.rounds} steps of each side, {how}", flush=True,
    )  # fmt: skip
    rows = measure(args)
    flops = {side: gemm_flops(args, side) for side in rows}
    print("\n".join(table(args, rows, flops)))
    if args.json:
        ratios = {f"{a}/{b}": asdict(against(args, rows, a, b)) for a, b in PAIRS if a in rows and b in rows}
        document = {"benchmark": "generator", "machine": machine, "arguments": vars(args), "rows": rows}
        args.json.write_text(json.dumps(document | {"ratios": ratios, "flops": flops}, indent=1, default=str))


if __name__ == "__main__":
    main()
