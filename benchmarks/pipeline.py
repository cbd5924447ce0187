# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""A whole picture at 512 px, noise to uint8: 128 tokens by `Pipeline` against 1024 tokens as public code runs them.

    python benchmarks/pipeline.py                   SiT-XL, 50 Euler steps, guided in [0, 0.7]
    python benchmarks/pipeline.py --whole           and the public pipeline run step by step, not one step times 50

    public   SiT-XL/2 on 64x64x4, naive attention, both guidance branches at every step (outside the interval the second
             is dropped), Stable Diffusion's VAE decoder, in fp32 and in the precision of ours
    ours     Pipeline.generate: all steps, decoder and rounding in one timed call

The ratio is broken into factors, each from times of this run: tokens, decoder, kernels, guidance work, and precision
where ours computes in another one than fp32. A public time is its step's (a median) times the steps plus its decoder's.
Random weights: their values change no time.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parent.parent))

import torch
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from benchmarks import _cli, _workload
from benchmarks._claims import CLAIMED_INFERENCE
from benchmarks._job import guided_steps
from benchmarks.baselines.sdvae import SDVAEDecoder
from benchmarks.baselines.sit import guided_step
from maetok_fast.bench import machine
from maetok_fast.bench.timing import interleave, release_memory
from maetok_fast.data import to_uint8
from maetok_fast.kernels._gemm import why_not_packed
from maetok_fast.pipeline import LatentStatistics, Pipeline

INTERVAL = (0.0, 0.7)


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = _cli.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", choices=sorted(_workload.SIZES), default="sit-xl")
    add("--res", type=_cli.count, default=512)
    add("--tokens", type=_cli.count, default=128)
    add("--steps", type=_cli.count, default=50)
    add("--batch", type=_cli.count, default=4, help="pictures of ours at a time")
    add("--rounds", type=_cli.count, default=3)
    add("--dtype", choices=_cli.PRECISIONS, default="auto", help="of ours and of the second public pipeline")
    add("--device", default="cpu")
    add("--whole", action="store_true", help="run every step of the public pipelines")
    add("--out", type=Path, help="JSON")
    args = parser.parse_args(argv)
    args.device = _cli.device(parser, args.device)
    args.dtype = _cli.dtype(args.dtype, args.device)
    _cli.output(parser, "--out", args.out)
    return args


def measured(args: argparse.Namespace, tick: Callable[[str], None]) -> tuple[dict[str, float], dict[str, float]]:
    """Seconds an image: of the public parts "step many fp32", "step few bf16", "vae fp32", "decode bf16", ...; of our
    whole pipelines "ours bf16", "ours int8". And the machine's matmul rates in the same rounds."""
    device, size = args.device, _workload.SIZES[args.model]
    models = _workload.Generators(size, args.tokens, args.res, device)
    ours = _workload.make_tokenizer(size, args.tokens, args.res, None, device)
    identity = LatentStatistics.identity()
    settings: dict[str, Any] = {"steps": args.steps, "method": "euler", "guidance": _workload.GUIDANCE}
    settings["interval"] = INTERVAL
    cases: dict[str, Callable[[], Any]] = {}
    counts: dict[str, int] = {}
    with torch.device("meta"):
        vae = SDVAEDecoder().eval()
    vae = vae.to_empty(device=device)
    _workload.fill(vae.parameters())

    def public(which: str, name: str) -> None:
        dtype = machine.DTYPES[name]
        state = None if name == "fp32" else {k: v.to(dtype) for k, v in models.state.items()}
        model = models.plain(which, None if name == "fp32" else dtype, state)
        model.set_attention("naive")
        # the grid's batch has as many tokens as ours
        batch = args.batch if which == "few" else max(1, args.batch * args.tokens // (args.res // 16) ** 2)
        x, y = models.inputs(which, batch, torch.float64)
        key = f"step {which} {name}"
        cases[key] = lambda: guided_step(model, x, 0.5, -1 / args.steps, y, _workload.GUIDANCE)
        counts[key] = batch
        if which == "few":
            tokenizer = _workload.plain_tokenizer(ours, dtype)
            latents = x.to(dtype)
            cases[f"decode {name}"] = lambda: to_uint8(tokenizer.decode(latents))
            counts[f"decode {name}"] = batch
        else:
            decoder = vae if name == "fp32" else _copy(vae, dtype)
            one = x[:1].to(dtype)
            cases[f"vae {name}"] = lambda: to_uint8(decoder(one))
            counts[f"vae {name}"] = 1

    flops: dict[str, float] = {}
    for name in dict.fromkeys(("fp32", args.dtype)):
        for which in ("many", "few"):
            public(which, name)
        cases[f"matmul {name}"], flops[name] = machine.matmul(device, name, 256 if args.model == "tiny" else 4096)
        counts[f"matmul {name}"] = 1
    with torch.no_grad():
        first = interleave(cases, device, rounds=args.rounds, tick=tick)
        seconds = {key: timing.seconds / counts[key] for key, timing in first.items()}
        rates = {f"{n} TFLOP/s": work / seconds.pop(f"matmul {n}") / 1e12 for n, work in flops.items()}
        for name in dict.fromkeys(("fp32", args.dtype)) if args.whole else ():
            tick(f"every step of the public pipeline, {name}")
            began = time.perf_counter()
            for _ in range(args.steps):
                cases[f"step many {name}"]()
            cases[f"vae {name}"]()
            machine.synchronize(device)
            seconds[f"whole {name}"] = (time.perf_counter() - began) / counts[f"step many {name}"]
    cases.clear()
    release_memory(device)
    kept: list[torch.dtype | None] = [None]
    labels = seeds = list(range(args.batch))
    if args.device.type == "cpu" and why_not_packed("int8", device) is None:
        kept.append(torch.int8)
    for weights in kept:
        tick("preparing ours")
        precision = args.dtype if weights is None else "fp32"
        pipeline = Pipeline(ours, models.ours, identity, precision=precision, weights=weights)

        def whole(pipeline: Pipeline = pipeline) -> None:
            pipeline.generate(labels, seeds, batch=args.batch, **settings)

        pipeline.generate(labels, seeds, batch=args.batch, **(settings | {"steps": 1}))  # races, first touches
        key = f"ours {args.dtype if weights is None else 'int8'}"
        timing = interleave({key: whole}, device, rounds=args.rounds, tick=tick)[key]  # one call where it is long
        seconds[key] = timing.seconds / args.batch
        del pipeline, whole
        release_memory(device)
    return seconds, rates


def _copy(model: torch.nn.Module, dtype: torch.dtype) -> torch.nn.Module:
    return copy.deepcopy(model).to(dtype)


def factors(seconds: dict[str, float], args: argparse.Namespace, ours: str) -> list[tuple[str, float, str]]:
    """(what changed, seconds an image after it, how) from the public pipeline in fp32 to ours."""
    steps, inside = args.steps, guided_steps(args.steps, INTERVAL)
    second = args.dtype if ours == f"ours {args.dtype}" else "fp32"

    def total(which: str, name: str, decoder: str, work: float = 1.0) -> float:
        return steps * work * seconds[f"step {which} {name}"] + seconds[f"{decoder} {name}"]

    many = (args.res // 16) ** 2
    rows = [(f"public, {many} tokens, fp32", total("many", "fp32", "vae"), f"{steps} x a timed step + VAE")]
    if second != "fp32":
        rows.append((f"precision: fp32 -> {second}", total("many", second, "vae"), "the same in it"))
    rows.append((f"tokens: {many} -> {args.tokens}", total("few", second, "vae"), "timed steps"))
    rows.append(("decoder: VAE -> MAETok", total("few", second, "decode"), "timed decoders"))
    work = (inside + (steps - inside) / 2) / steps
    note = f"{inside} of {steps} steps in [{INTERVAL[0]:g}, {INTERVAL[1]:g}]; the others need one branch: computed"
    rows.append(("guidance work", total("few", second, "decode", work), note))
    rows.append((f"kernels: {ours.replace('ours', 'maetok_fast,')}", seconds[ours], "the whole call, timed"))
    return rows


def show(seconds: dict[str, float], args: argparse.Namespace, console: Console) -> dict[str, Any]:
    found: dict[str, Any] = {"seconds_an_image": seconds, "steps": args.steps, "batch": args.batch, "ratios": {}}
    for ours in [key for key in seconds if key.startswith("ours")]:
        rows = factors(seconds, args, ours)
        table = Table(title=f"{args.model}, {args.res} px, {args.steps} steps: noise to uint8", title_justify="left")
        for head in ("", "s/image", "factor", "known by"):
            table.add_column(head, justify="right" if head in ("s/image", "factor") else "left")
        before = None
        for what, after, note in rows:
            table.add_row(what, f"{after:.3g}", "" if before is None else f"{before / after:.3g}x", note)
            before = after
        console.print(table)
        same = rows[1][1] if rows[1][0].startswith("precision") else rows[0][1]
        ratios = {"against fp32": rows[0][1] / seconds[ours], "at the same precision": same / seconds[ours]}
        if ours == "ours int8":
            del ratios["at the same precision"]  # there is no public pipeline in it
        for name, ratio in ratios.items():
            console.print(f"{ours}: {ratio:.3g}x {name} (the paper's claim: {CLAIMED_INFERENCE:.3g}x)")
        found["ratios"][ours] = ratios
    for key in [key for key in seconds if key.startswith("whole")]:
        name = key.split()[1]
        stated = args.steps * seconds[f"step many {name}"] + seconds[f"vae {name}"]
        console.print(f"public, {name}, every step run: {seconds[key]:.4g} s/image; from its parts {stated:.4g}")
    return found


def main(argv: Sequence[str] | None = None) -> None:
    args, console = parse(argv), Console()
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("starting")
        seconds, rates = measured(args, lambda text: progress.update(task, description=text))
    about = machine.describe(args.device)
    ceilings = ", ".join(f"{name} {rate:.3g}" for name, rate in rates.items())
    console.print(f"{machine.headline(about)}; matmul {ceilings}")
    found = {"machine": about, "matmul": rates, **show(seconds, args, console)}
    if args.out is not None:
        args.out.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
