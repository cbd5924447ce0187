# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""Writing a cache of latents: `maetok-fast cache-latents` and the public-style loop, images/s and memory.

    python benchmarks/caching.py                      MAETok-B at 256 px, random weights, bundled photographs as JPEGs
    python benchmarks/caching.py --images 64 --rounds 5
    python benchmarks/caching.py --side ours          one side alone

    public   DataLoader (PIL decode and resize, to a tensor, normalised), plain PyTorch's encoder in the same precision,
             the images and then the mirrored images, lists, torch.cat, one safetensors file a shard
    ours     EncodingRun from an empty folder to its statistics

Both read the same files with as many worker processes, and start them anew in every round. Seconds: in this process, in
turn, round by round; the ratio is of each round's pair. Memory: each side in a process of its own, beyond what that
held after its imports: the model, what the loop needs on top at its peak, and what is held in the second and the fourth
shard, which are equal where memory is flat.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

sys.path.append(str(Path(__file__).resolve().parent.parent))

from benchmarks import _cli, _workload
from benchmarks.data import photographs
from maetok_fast.bench.machine import DTYPES, describe, headline
from maetok_fast.bench.timing import PeakMemory, Spread, held_bytes, rounds
from maetok_fast.data.sources import open_source
from maetok_fast.pipeline import EncodingRun

SIDES = ("public", "ours")
SCALES = {"real": "sit-xl", "small": "tiny"}  # whose tokenizer: MAETok-B, or one of two blocks
TOKENS = 128
SHARDS = 4  # of a run
Done = Callable[[int], None]


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = _cli.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add(
        "--images", type=_cli.count, default=16, help=f"of a round, in {SHARDS} shards, a multiple of that (default 16)"
    )
    add("--batch", type=_cli.count, default=4, help="images at a time (default 4)")
    add("--size", type=_cli.count, default=256, help="of the images in pixels, a multiple of 16 (default 256)")
    add("--workers", type=_cli.count, default=1, help="processes that read and decode, of each side (default 1)")
    add("--precision", choices=_cli.PRECISIONS, default="auto", help="of both; default: the fastest at full rate here")
    add("--rounds", type=_cli.count, default=3, help="timed runs of each side (default 3)")
    add("--scale", choices=sorted(SCALES), default="real", help="small: a tiny tokenizer, to try the benchmark")
    add("--side", choices=SIDES, help="this side alone, without ratios")
    add("--device", default="cpu", help="cpu (default) or cuda")
    add("--memory", choices=SIDES, help="the memory of this side, in this process; prints JSON")
    add("--json", type=Path)
    args = parser.parse_args(argv)
    if args.size % 16:
        parser.error(f"--size must be a multiple of 16 (the patch), got {args.size}")
    if args.images % SHARDS:
        parser.error(f"--images must be a multiple of {SHARDS}, the shards, got {args.images}")
    args.precision = _cli.dtype(args.precision, _cli.device(parser, args.device))
    _cli.output(parser, "--json", args.json)
    return args


# ---- the two sides -------------------------------------------------------------------------------------------------


class Pictures(Dataset):
    """A folder's images as public code reads them: (3, size, size) fp32 in [-1, 1], and their places as labels."""

    def __init__(self, folder: Path, count: int, size: int) -> None:
        self.files, self.size = sorted(folder.iterdir())[:count], size

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        from PIL import Image

        with Image.open(self.files[i]) as opened:
            image = opened.convert("RGB")
        scale = self.size / min(image.size)
        image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
        left, top = (image.width - self.size) // 2, (image.height - self.size) // 2
        image = image.crop((left, top, left + self.size, top + self.size))
        return torch.from_numpy(np.array(image)).permute(2, 0, 1).float().div(255).sub(0.5).div(0.5), i


@torch.no_grad()
def public_loop(model: Any, folder: Path, out: Path, args: argparse.Namespace, done: Done = lambda count: None) -> None:
    """Lists of latents, a file whenever they hold a shard, and the statistics of all files at the end."""
    from safetensors.torch import load_file, save_file

    out.mkdir()
    dtype, shard, files = DTYPES[args.precision], shard_of(args), 0
    held: dict[str, list[Tensor]] = {"latents": [], "latents_flip": [], "labels": []}
    loader = DataLoader(Pictures(folder, args.images, args.size), args.batch, num_workers=args.workers)
    seen = 0
    for images, labels in loader:
        x = images.to(args.device, dtype)
        held["latents"].append(model.encode(x).float().cpu())
        held["latents_flip"].append(model.encode(x.flip(3)).float().cpu())
        held["labels"].append(labels)
        seen += len(labels)
        if sum(map(len, held["labels"])) >= shard or seen == args.images:
            save_file({name: torch.cat(parts) for name, parts in held.items()}, out / f"{files:03d}.safetensors")
            held, files = {name: [] for name in held}, files + 1
        done(len(labels))
    latents = torch.cat([load_file(path)["latents"] for path in sorted(out.iterdir())])
    torch.save({"mean": latents.mean((0, 1)), "std": latents.std((0, 1))}, out / "latents_stats.pt")


def our_run(run: EncodingRun, done: Done = lambda count: None) -> None:
    run.begin()
    run.finish(run.make(done))


def shard_of(args: argparse.Namespace) -> int:
    return args.images // SHARDS


def make(side: str, folder: Path, out: Path, args: argparse.Namespace) -> Callable[[Done], None]:
    """A side that is ready: called, it writes a cache into `out`, which must not exist."""
    device = torch.device(args.device)
    tokenizer = _workload.make_tokenizer(_workload.SIZES[SCALES[args.scale]], TOKENS, args.size, None, device)
    for name, value in tokenizer.named_parameters():
        if name.endswith("gamma"):
            value.fill_(1.0)  # as trained ones: at its start the latents do not listen to the image
    if side == "public":
        model = _workload.plain_tokenizer(tokenizer, DTYPES[args.precision])
        return lambda done: public_loop(model, folder, out, args, done)
    run = EncodingRun(
        out,
        tokenizer,
        open_source(folder),
        precision=args.precision,
        size=args.size,
        shard=shard_of(args),
        limit=args.images,
        batch=args.batch,
        workers=args.workers,
    )
    return lambda done: our_run(run, done)


# ---- measuring -----------------------------------------------------------------------------------------------------


def memory_of(side: str, args: argparse.Namespace) -> dict[str, Any]:
    """Bytes: {"built", "peak", "second", "fourth"}: held once the side is made; on top of it at the peak of a run, and
    held in its second and fourth shard. None where the system does not show them."""
    import safetensors.torch  # noqa: F401  # the libraries' own memory is no side's
    from PIL import Image  # noqa: F401

    device, seen, held = torch.device(args.device), 0, {}
    shard = shard_of(args)
    before = held_bytes(device)
    with tempfile.TemporaryDirectory() as place:
        folder = pictures(Path(place), args)
        start = make(side, folder, Path(place) / "out", args)
        built = held_bytes(device)

        def done(count: int) -> None:
            nonlocal seen
            seen += count
            for name, first in (("second", shard), ("fourth", 3 * shard)):
                if seen > first and name not in held:
                    held[name] = held_bytes(device)

        with PeakMemory(device) as peak:
            start(done)
    values = {"built": (built, before), "second": (held.get("second"), built), "fourth": (held.get("fourth"), built)}
    found = {name: None if None in pair else pair[0] - pair[1] for name, pair in values.items()}  # type: ignore[operator]
    return {"side": side, "peak": peak.extra_bytes, **found}


def measure_memory(side: str, args: argparse.Namespace) -> dict[str, Any]:
    """`memory_of` in a process of its own; {"side", "error"} where that failed."""
    options = ("images", "batch", "size", "workers", "precision", "scale", "device")
    return _cli.elsewhere(__file__, "--memory", side, args, options)


def pictures(place: Path, args: argparse.Namespace) -> Path:
    """Enough JPEGs of the photographs, in a folder."""
    folder = place / "images"
    folder.mkdir()
    photographs(folder)
    files = sorted(folder.iterdir())
    for i in range(len(files), args.images):
        shutil.copyfile(files[i % len(files)], folder / f"more-{i:06d}.jpg")
    return folder


def measure_time(sides: Sequence[str], args: argparse.Namespace) -> dict[str, list[float]]:
    """side -> seconds of a run, one a round."""
    with tempfile.TemporaryDirectory() as place:
        folder, cases = pictures(Path(place), args), {}
        for side in sides:
            out = Path(place) / side
            start = make(side, folder, out, args)

            def case(start: Callable[[Done], None] = start, out: Path = out) -> None:
                shutil.rmtree(out, ignore_errors=True)
                start(lambda count: None)

            cases[side] = case
        # its own first call of each case warms it up
        return rounds(cases, torch.device(args.device), seconds=0.0, least=args.rounds, most=args.rounds)


def ratios(seconds: dict[str, list[float]]) -> Spread:
    """public / ours of each round's pair."""
    return Spread.of([public / ours for ours, public in zip(seconds["ours"], seconds["public"], strict=True)])


# ---- what is printed -----------------------------------------------------------------------------------------------


def tables(
    sides: Sequence[str], seconds: dict[str, list[float]], memory: dict[str, dict[str, Any]], images: int
) -> list[str]:
    """The lines under the headline; of memory the ratio is public / ours too."""
    lines = [f"  {'':34s}" + "".join(f"{side:>10s}" for side in sides)]

    def row(name: str, values: Sequence[float | None], digits: int, more: str = "") -> None:
        cells = "".join(f"{'-':>10s}" if v is None else f"{v:10.{digits}f}" for v in values)
        lines.append(f"  {name:34s}{cells}{more}")

    spread = ratios(seconds) if len(sides) == len(SIDES) else None
    more = "" if spread is None else f"{spread.median:8.2f} x  (quartiles {spread.low:.2f} .. {spread.high:.2f})"
    row("images/s, each and its mirror image", [images / statistics.median(seconds[s]) for s in sides], 2, more)
    names = {"built": "model", "peak": "loop on top, peak", "second": "in shard 2", "fourth": "in shard 4"}
    for key, name in names.items():
        held = [memory[s].get(key) for s in sides]
        row(f"memory, {name}, MB", [None if h is None else h / 1e6 for h in held], 1)
    return lines + [f"  memory of {s}: {memory[s]['error']}" for s in sides if "error" in memory[s]]


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    if args.memory:
        print(json.dumps(memory_of(args.memory, args)))
        return
    sides = SIDES if args.side is None else (args.side,)
    machine = describe(torch.device(args.device))
    print(f"{headline(machine)}; {args.precision}")
    print(f"{args.images} images in {SHARDS} shards, {args.scale} tokenizer, {args.size} px, batch {args.batch}, "
          f"{args.workers} worker(s)", flush=True)  # fmt: skip
    # the memory first: nothing of it is held while the clock runs
    memory = {side: measure_memory(side, args) for side in sides}
    seconds = measure_time(sides, args)
    print("\n".join(tables(sides, seconds, memory, args.images)))
    if args.json:
        spread = asdict(ratios(seconds)) if len(sides) == len(SIDES) else None
        document = {"benchmark": "caching", "machine": machine, "arguments": vars(args), "memory": memory}
        args.json.write_text(json.dumps(document | {"seconds": seconds, "ratio": spread}, indent=1, default=str))


if __name__ == "__main__":
    main()
