# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""A training step of SiT on 128 latents: ours, ours with routing, and the public code's (baselines/generator.py).

    python benchmarks/generator.py --batch 4 --rounds 3        SiT-XL/1, random weights and latents
    python benchmarks/generator.py --model b --batch 8         a smaller one
    python benchmarks/generator.py --sides ours public         without routing

Optimizer (with the clipping of gradients) and average are in the step. Two SiT-XL with their moments and averages do
not fit into one process of 24 GB, so that each side is a process of its own, started anew each round, in turn: ratios
are of each round's. A side's seconds are the median of its `--steps` steps after the first; its memory is what it holds
beyond its imports: what is built (weights, average), and on top at the peak of its steps (gradients, moments,
activations). Every process also times large products of the step's precision among its steps: the ceiling, by which the
table says what share of a step its products would take at that rate. `routed`: half of the tokens skip the middle two
thirds of the blocks.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
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
SHARE = 0.5
GEMM = 2048


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = _cli.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", choices=[*SIZES, "tiny"], default="xl", help="SiT's size (default xl)")
    add("--depth", type=_cli.count, help="so many blocks instead")
    add("--tokens", type=_cli.count, default=128)
    add("--batch", type=_cli.count, default=4, help="latents a step (default 4)")
    add("--precision", choices=["auto", "fp32", "bf16"], default="auto", help="default: the fastest at full rate here")
    add("--rounds", type=_cli.count, default=3, help="processes of each side (default 3)")
    add("--steps", type=_cli.count, default=2, help="timed steps of each process (default 2)")
    add("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    add("--device", default="cpu", help="cpu (default) or cuda")
    add("--one", choices=SIDES, help="this side, in this process; prints JSON")
    add("--json", type=Path)
    args = parser.parse_args(argv)
    args.precision = _cli.dtype(args.precision, _cli.device(parser, args.device))
    if args.precision == "fp16":
        parser.error("--precision auto: this device computes fp16 at full rate and not bf16; give bf16 or fp32")
    if args.model == "tiny":
        shape = (3, 32, 2)
    else:
        shape = SIZES[args.model]
    args.shape = (args.depth or shape[0], *shape[1:])
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


def measure_one(side: str, args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """{"seconds": of each timed step, "parts": medians, "built", "steps": bytes, "gemm_tflops"}."""
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
    seconds, rates, rows = [], [], []
    with PeakMemory(device) as peak:
        for i in range(args.steps + 1):
            synchronize(device)
            start = time.perf_counter()
            step(z, y)
            synchronize(device)
            taken = time.perf_counter() - start
            start = time.perf_counter()
            product()
            synchronize(device)
            if i:
                seconds.append(taken)
                rates.append(flops / (time.perf_counter() - start) / 1e12)
                rows.append(step.timings)
    held = None if before is None or built is None else built - before
    parts = {part: statistics.median(row.get(part, 0.0) for row in rows) for part in PARTS}
    rate = statistics.median(rates)
    return {"seconds": seconds, "parts": parts, "built": held, "steps": peak.extra_bytes, "gemm_tflops": rate}


# ---- all of them ---------------------------------------------------------------------------------------------------


def measure(side: str, args: argparse.Namespace) -> dict[str, Any]:
    """`measure_one` in a process of its own. RuntimeError with its last line where that failed."""
    command = [sys.executable, __file__, "--one", side]
    for option in ("model", "tokens", "batch", "precision", "steps", "device"):
        command += [f"--{option}", str(getattr(args, option))]
    if args.depth:
        command += ["--depth", str(args.depth)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines() or [f"it ended with status {done.returncode}"]
        raise RuntimeError(f"{side}: {lines[-1]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
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


def against(rows: dict[str, list[dict[str, Any]]], side: str, other: str) -> Spread:
    """Seconds of `other` over those of `side`, round by round."""
    pairs = zip(rows[side], rows[other], strict=True)
    return Spread.of([statistics.median(b["seconds"]) / statistics.median(a["seconds"]) for a, b in pairs])


def table(args: argparse.Namespace, rows: dict[str, list[dict[str, Any]]], flops: dict[str, float]) -> list[str]:
    sides = list(rows)
    lines = ["  " + " " * 34 + "".join(f"{side:>10s}" for side in sides)]

    def row(name: str, values: Sequence[float | None], digits: int) -> None:
        lines.append(f"  {name:34s}" + "".join(f"{'-':>10s}" if v is None else f"{v:10.{digits}f}" for v in values))

    def median(side: str, key: str, part: str | None = None) -> float | None:
        found = [r[key] if part is None else r[key][part] for r in rows[side]]
        found = [statistics.median(v) if isinstance(v, list) else v for v in found]
        return None if None in found else statistics.median(found)

    seconds = {side: median(side, "seconds") or 0.0 for side in sides}
    row("step, seconds", [seconds[s] for s in sides], 3)
    row("latents/s", [args.batch / seconds[s] for s in sides], 2)
    for part in PARTS:
        row(f"  {part}, seconds", [median(s, "parts", part) for s in sides], 3)
    row("products, TFLOP", [flops[s] / 1e12 for s in sides], 2)
    row(f"{GEMM}^3 products, TFLOP/s", [median(s, "gemm_tflops") for s in sides], 3)
    shares = [100 * flops[s] / 1e12 / (median(s, "gemm_tflops") or 1.0) / seconds[s] for s in sides]
    row("share of products at that rate, %", shares, 1)
    row("memory, built, GB", [_gb(median(s, "built")) for s in sides], 2)
    row("memory, steps on top, GB", [_gb(median(s, "steps")) for s in sides], 2)
    peaks = {s: _sum(median(s, "built"), median(s, "steps")) for s in sides}
    row("memory, peak, GB", [_gb(peaks[s]) for s in sides], 2)
    for side, other in (("ours", "public"), ("routed", "ours"), ("routed", "public")):
        if side in rows and other in rows:
            found, a, b = against(rows, side, other), peaks[side], peaks[other]
            text = f"{found.median:.2f} x ({found.low:.2f} .. {found.high:.2f}, {found.samples} rounds)"
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
        print(json.dumps(measure_one(args.one, args, device)))
        return
    machine = describe(device)
    depth, dim, heads = args.shape
    print(f"{headline(machine)}; {args.precision}")
    print(f"SiT of {depth} blocks, width {dim}, {heads} heads; {args.tokens} latents, batch {args.batch}", flush=True)
    rows: dict[str, list[dict[str, Any]]] = {side: [] for side in SIDES if side in args.sides}
    for _ in range(args.rounds):
        for side, found in rows.items():
            found.append(measure(side, args))
    flops = {side: gemm_flops(args, side) for side in rows}
    print("\n".join(table(args, rows, flops)))
    if args.json:
        pairs = {
            f"{a}/{b}": asdict(against(rows, a, b))
            for a, b in (("ours", "public"), ("routed", "ours"))
            if a in rows and b in rows
        }
        document = {"benchmark": "generator", "machine": machine, "arguments": vars(args), "rows": rows}
        args.json.write_text(json.dumps(document | {"ratios": pairs, "flops": flops}, indent=1, default=str))


if __name__ == "__main__":
    main()
