# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""How fast: photographs through the tokenizer, the generator's steps, and the paper's two claims factor by factor.

    python benchmarks/throughput.py --tokens 128 --res 512

    photographs -> encode -> latents -> decode -> contact sheet
    SiT at res/16 x res/16 tokens and at --tokens: public way (naive attention, both guidance branches at every step)
        in fp32 and bf16, with SDPA, with torch.compile, and ours; one guided sampling step, one training step
    -> table, chart, JSON, and the claims: tokens x precision x kernels x guidance work (x convergence)

Sizes are chosen to fit the time budget (--budget), rows in order of importance; what is left out is said.
Everything compared is timed in turn within this run, and the machine's matmul rate beside it. A number is printed
bare only if it was measured here; † marks what was computed from measured parts, § what `maetok-fast demo claims`
measured on small images, ‡ what is cited.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parent.parent))

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from benchmarks import _chart, _cli, _report, _workload
from benchmarks._claims import Claim
from benchmarks._job import TRAIN_BATCH, Job
from maetok_fast.bench import machine
from maetok_fast.bench.timing import release_memory
from maetok_fast.data import ImageError, bundled_photographs, find_images, load_images

BUDGET = {"full": 240.0, "quick": 45.0}  # seconds of measuring; imports, weights and pictures come on top


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = _cli.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--tokens", type=_cli.count, default=128, help="latent tokens of the tokenizer and the generator (default 128)")
    add("--res", type=_cli.count, default=512, help="image resolution in pixels, a multiple of 16 (default 512)")
    add("--model", choices=sorted(_workload.SIZES), help="generator size (default sit-xl; sit-b with --quick)")
    add("--batch", type=_cli.count, help="images per forward at --tokens (default: what fits the time, at most 4, 2 "
        "with --quick, 64 on CUDA); the grid rows get the batch with as many tokens")  # fmt: skip
    add("--dtype", choices=_cli.PRECISIONS, default="auto", help="precision of the fast rows (default auto: the "
        "fastest that this device computes at full rate)")  # fmt: skip
    add("--device", default="cpu", help="cpu (default) or cuda")
    add("--steps", type=_cli.count, default=250, help="sampling steps (NFE) that img/s is stated for (default 250)")
    add("--interval", type=float, nargs=2, default=(0.0, 0.7), metavar=("LOW", "HIGH"),
        help="guidance interval in t, 0 = data (default 0 0.7)")  # fmt: skip
    add("--compile", action="store_true", help="add torch.compile of the public code as a peer (takes up to a minute)")
    add("--images", type=Path, help="folder of images (default: photographs in the scikit-image/-learn wheels)")
    add("--checkpoint", help="tokenizer weights: folder, file or hub repository (default: random weights)")
    add(
        "--out", type=Path, default=Path("throughput"), help="folder for the pictures and the JSON (default throughput)"
    )
    add("--quick", action="store_true", help="under a minute: a smaller generator and fewer repetitions")
    add("--budget", type=_cli.seconds, metavar="SECONDS", help="time for measuring (default {full:g}, {quick:g} with "
        "--quick)".format(**BUDGET))  # fmt: skip
    args = parser.parse_args(argv)
    if args.res % 16:
        parser.error(f"--res must be a multiple of 16 (the patch), got {args.res}")
    if not 0 <= args.interval[0] <= args.interval[1] <= 1:
        parser.error(f"--interval needs 0 <= LOW <= HIGH <= 1, got {args.interval[0]} {args.interval[1]}")
    args.precision = args.dtype
    args.dtype = _cli.dtype(args.dtype, _cli.device(parser, args.device))
    args.model = args.model or ("sit-b" if args.quick else "sit-xl")
    args.budget = args.budget or BUDGET["quick" if args.quick else "full"]
    what = f"--images {args.images}" if args.images else "no --images"
    first = (lambda: find_images(args.images)) if args.images else bundled_photographs
    _cli.said(parser, what, lambda: load_images(first()[: 2 if args.quick else 12], 16), ImageError, OSError)
    if args.checkpoint is not None:
        check_checkpoint(parser, args)
    _cli.output(parser, "--out", args.out, folder=True)
    return args


def check_checkpoint(parser: _cli.Parser, args: argparse.Namespace) -> None:
    """Ends the program for a checkpoint that does not load, or is of other sizes than the run."""
    what, size = f"--checkpoint {args.checkpoint}", _workload.SIZES[args.model]
    made = _cli.said(
        parser,
        what,
        lambda: _workload.make_tokenizer(size, args.tokens, args.res, args.checkpoint, torch.device("cpu")),
        ValueError,
        OSError,
    )
    tokens, res = made.config.num_latent_tokens, made.config.size[0]
    if (tokens, res) != (args.tokens, args.res):
        parser.error(f"{what} has {tokens} tokens at {res} px: give --tokens {tokens} --res {res}")


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
        "left_out": job.budget.left_out,
        "seconds": time.perf_counter() - start,
    }
    return job, fields, job.claims()


def notes(job: Job, fields: dict[str, Any]) -> list[str]:
    """The lines under the table that its numbers need."""
    rates, args = fields["ceilings"], job.args
    gemm = ", ".join(f"{k.split('_')[1]} {_report.number(v)}" for k, v in rates.items() if k.startswith("gemm"))
    errors = ", ".join(f"{name} {error:.1e}" for name, error in job.agreement.items()) or "none was taken"
    chosen = "the fastest at full rate here" if args.precision == "auto" else "asked for"
    return [
        f"† computed: sampling from timed steps at {args.steps} evaluations (generator alone); training from a timed "
        f"forward + backward and 1/{TRAIN_BATCH} of a timed optimizer step; GFLOPs are counts, MAC x 2.",
        f"Images per forward: {job.batch['few']} at {args.tokens} tokens, {job.batch['many']} at {job.many}; guided "
        "steps forward twice as many rows. The public rows' attention is naive unless a row says otherwise.",
        f"Matmul rate ({job.matmul_size}^3) {gemm} TFLOP/s, copy {_report.number(rates['copy_gb_s'])} GB/s, here.",
        f"Relative errors against the public code in fp32: {errors}.",
        f"Weights: generator random, tokenizer {fields['images']['tokenizer_weights']}.",
        f"Precision {args.dtype}: {chosen}.",
        *job.notes,
        *(f"Left out: {line}." for line in fields["left_out"]),
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
    console = Console()
    columns = SpinnerColumn(), TextColumn("{task.description:<48}"), BarColumn(), TimeElapsedColumn()
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("starting", total=args.budget)
        start = time.perf_counter()

        def tick(text: str) -> None:
            progress.update(task, description=text, completed=time.perf_counter() - start)

        job, fields, claims = run(args, tick)
    rows = list(job.rows.values())
    model = "-".join(("SiT", args.model[4:].upper())) if args.model.startswith("sit-") else args.model
    title = f"{model}, {args.tokens} tokens, {args.res} px, on {machine.headline(fields['machine'])}"
    console = Console(width=max(console.width, 132))
    _report.print_report(console, rows, claims, title, notes(job, fields))
    files = {name: args.out / name for name in ("contact_sheet.png", "throughput.png", "throughput.json")}
    _report.contact_sheet(files["contact_sheet.png"], *job.pictures, caption(fields))
    _chart.chart(files["throughput.png"], rows, claims, title.split(", on ")[0], f"on {title.split(', on ')[1]}")
    _report.write_json(files["throughput.json"], rows, claims, **fields)
    console.print(f"\n{fields['seconds']:.0f} s. Wrote {', '.join(str(path) for path in files.values())}")


if __name__ == "__main__":
    main()
