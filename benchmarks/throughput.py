# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""How fast: photographs through the tokenizer, the generator's steps, and the paper's two claims factor by factor.

    python benchmarks/throughput.py --tokens 128 --res 512

    photographs -> encode -> latents -> decode -> contact sheet
    SiT at res/16 x res/16 tokens and at --tokens: public way (naive attention, both guidance branches at every step)
        in fp32 and bf16, with SDPA, with torch.compile, and ours; one guided sampling step, one training step
    -> table, bar chart, JSON, and the claims: tokens x precision x kernels x guidance work (x convergence)

Everything compared is timed in turn within this run, and the machine's matmul rate beside it. A number is printed
bare only if it was measured here; † marks what was computed from measured parts, ‡ what is cited.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import _report
import _workload
import torch
from _claims import Claim
from _job import TRAIN_BATCH, Job, expected_ticks
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from maetok_fast.bench import machine
from maetok_fast.bench.timing import release_memory


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--tokens", type=int, default=128, help="latent tokens of the tokenizer and the generator (default 128)")
    add("--res", type=int, default=512, help="image resolution in pixels, a multiple of 16 (default 512)")
    add("--model", choices=sorted(_workload.SIZES), help="generator size (default sit-xl; sit-b with --quick)")
    add("--batch", type=int, help="images per forward at --tokens (default 4, 2 with --quick, 64 on CUDA); the grid "
        "rows get the batch with as many tokens")  # fmt: skip
    add("--dtype", choices=("bf16", "fp16", "fp32"), default="bf16", help="precision of the fast rows (default bf16)")
    add("--device", default="cpu", help="cpu (default) or cuda")
    add("--steps", type=int, default=250, help="sampling steps (NFE) that img/s is stated for (default 250)")
    add("--interval", type=float, nargs=2, default=(0.0, 0.7), metavar=("LOW", "HIGH"),
        help="guidance interval in t, 0 = data (default 0 0.7)")  # fmt: skip
    add("--compile", action="store_true", help="add torch.compile of the public code as a peer (takes up to a minute)")
    add("--images", type=Path, help="folder of images (default: photographs in the scikit-image/-learn wheels)")
    add("--checkpoint", help="tokenizer weights: folder, file or hub repository (default: random weights)")
    add(
        "--out", type=Path, default=Path("throughput"), help="folder for the pictures and the JSON (default throughput)"
    )
    add("--quick", action="store_true", help="under a minute: a smaller generator and fewer repetitions")
    args = parser.parse_args(argv)
    for name in ("tokens", "res", "steps"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} must be at least 1, got {getattr(args, name)}")
    if args.res % 16:
        parser.error(f"--res must be a multiple of 16 (the patch), got {args.res}")
    if not 0 <= args.interval[0] <= args.interval[1] <= 1:
        parser.error(f"--interval needs 0 <= LOW <= HIGH <= 1, got {args.interval[0]} {args.interval[1]}")
    if torch.device(args.device).type == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no CUDA device here; use --device cpu")
    args.model = args.model or ("sit-b" if args.quick else "sit-xl")
    args.batch = args.batch or (64 if args.device.startswith("cuda") else 2 if args.quick else 4)
    return args


def run(args: argparse.Namespace, tick: Callable[[str], None]) -> tuple[Job, dict[str, Any], list[Claim]]:
    """All measurements; returns the job with its rows, the JSON's other fields and the claims."""
    start = time.perf_counter()
    job = Job(args, tick)
    about = machine.describe(job.device)
    images = job.tokenizer()
    tick("making the generators")
    models = _workload.Generators(job.size, args.tokens, args.res, job.device)
    job.sampling(models)
    release_memory(job.device)
    job.training(models)
    fields = {
        "machine": about,
        "ceilings": job.rates,
        "arguments": {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()},
        "batch": job.batch,
        "counted_gflops": job.counts,
        "images": images,
        "relative_errors": job.agreement,
        "notes": job.notes,
        "seconds": time.perf_counter() - start,
    }
    return job, fields, job.claims()


def notes(job: Job, fields: dict[str, Any]) -> list[str]:
    """The lines under the table that its numbers need."""
    rates, args = fields["ceilings"], job.args
    gemm = ", ".join(f"{k.split('_')[1]} {_report.number(v)}" for k, v in rates.items() if k.startswith("gemm"))
    errors = ", ".join(f"{name} {error:.1e}" for name, error in job.agreement.items())
    return [
        f"† computed: sampling from timed steps at {args.steps} evaluations (generator alone); training from a timed "
        f"forward + backward and 1/{TRAIN_BATCH} of a timed optimizer step; GFLOPs are counts, MAC x 2.",
        f"Images per forward: {job.batch['few']} at {args.tokens} tokens, {job.batch['many']} at {job.many}; guided "
        "steps forward twice as many rows. The public rows' attention is naive unless a row says otherwise.",
        f"Matmul rate {gemm} TFLOP/s, copy {_report.number(rates['copy_gb_s'])} GB/s, measured in this run.",
        f"Relative errors against the public code in fp32: {errors}.",
        f"Weights: generator random, tokenizer {fields['images']['tokenizer_weights']}.",
        *job.notes,
    ]


def caption(fields: dict[str, Any]) -> list[str]:
    """What stands over the contact sheet; random weights are named for what they are."""
    images, arguments = fields["images"], fields["arguments"]
    shape = " x ".join(str(n) for n in images["latents"][1:])
    first = f"MAETok: {arguments['res']} px -> {shape} latents -> {arguments['res']} px, {arguments['dtype']}"
    if images["tokenizer_weights"] == "random":
        return [
            first,
            "RANDOM weights: the reconstructions mean nothing, only the path runs.",
            "Give --checkpoint for a trained tokenizer.",
        ]
    return [first, f"{images['tokenizer_weights']}, PSNR {images['psnr_db']:.2f} dB"]


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    console = Console()
    columns = SpinnerColumn(), TextColumn("{task.description:<48}"), BarColumn(), TimeElapsedColumn()
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("starting", total=None)
        seen: set[str] = set()

        def tick(text: str) -> None:
            seen.add(text)
            progress.update(task, description=text, completed=len(seen), total=expected_ticks(args))

        job, fields, claims = run(args, tick)
    rows = list(job.rows.values())
    model = "-".join(("SiT", args.model[4:].upper())) if args.model.startswith("sit-") else args.model
    title = f"{model}, {args.tokens} tokens, {args.res} px, on {machine.headline(fields['machine'])}"
    console = Console(width=max(console.width, 132))
    _report.print_report(console, rows, claims, title, notes(job, fields))
    files = {name: args.out / name for name in ("contact_sheet.png", "throughput.png", "throughput.json")}
    _report.contact_sheet(files["contact_sheet.png"], *job.pictures, caption(fields))
    _report.bar_chart(files["throughput.png"], rows, claims, title.split(", on ")[0], f"on {title.split(', on ')[1]}")
    _report.write_json(files["throughput.json"], rows, claims, **fields)
    console.print(f"\n{fields['seconds']:.0f} s. Wrote {', '.join(str(path) for path in files.values())}")


if __name__ == "__main__":
    main()
