# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""The optimizer's step and the average: `adamw_step`, one pass, and torch's fused AdamW with a foreach lerp behind it.

    python benchmarks/optimizer.py                    100 million parameters in SiT-L's shapes, all fp32
    python benchmarks/optimizer.py --copy bf16        ... and a copy of the parameters in low precision
    python benchmarks/optimizer.py --params 453M      SiT-L itself: 20 bytes a parameter and side

Seconds: everything in turn, round by round, in this process; a ratio is of each round's pair. "with clip": gradients
times a coefficient, by torch in a pass of its own, by ours as they are read; their norm, one more pass over the
gradients for either, is in none. Beside them what memory gives here: a copy, and a sum in place, which as these passes
writes what it has read. GB/s are of the bytes that a way has to move (printed as B/parameter), whatever it does move.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.append(str(Path(__file__).resolve().parent.parent))

from benchmarks import _cli
from maetok_fast.bench.machine import DTYPES, describe, headline
from maetok_fast.bench.timing import Spread, rounds
from maetok_fast.kernels import adamw_step

BETAS, RATE, EPS, WEIGHT_DECAY, DECAY = (0.9, 0.95), 1e-4, 1e-8, 1e-4, 0.9999
DEPTH, WIDTH, MATRICES = 24, 1024, ((3, 1), (1, 1), (4, 1), (1, 4), (6, 1))  # SiT-L's blocks, in units of its width
OURS, TORCH, OURS_CLIP, TORCH_CLIP, ADAMW, LERP = (
    "ours", "torch: AdamW, lerp", "ours, with clip", "torch: clip, AdamW, lerp", "  AdamW alone", "  lerp alone"
)  # fmt: skip
COPY, SUM = "copy", "sum in place"
PAIRS = {"without clip": (OURS, TORCH), "with clip": (OURS_CLIP, TORCH_CLIP)}


def number(text: str) -> int:
    """453M, 100000, 1.5G."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([kMG]?)", text)
    value = 0 if found is None else round(float(found[1]) * {"": 1, "k": 1e3, "M": 1e6, "G": 1e9}[found[2]])
    if value < 1:
        raise argparse.ArgumentTypeError(f"expects a number such as 100M, got {text!r}")
    return value


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = _cli.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--params", type=number, default=100_000_000, help="parameters, about (default 100M)")
    add("--copy", choices=["none", "bf16", "fp16"], default="none", help="a low-precision copy too (default none)")
    add("--seconds", type=_cli.seconds, default=15.0, help="of timing (default 15)")
    add("--device", default="cpu", help="cpu (default) or cuda")
    add("--json", type=Path)
    args = parser.parse_args(argv)
    _cli.device(parser, args.device)
    _cli.output(parser, "--json", args.json)
    return args


def shapes(params: int) -> list[tuple[int, ...]]:
    """SiT-L's blocks, narrower or wider until they have about so many parameters."""
    each = DEPTH * sum(n * m for n, m in MATRICES)
    width = max(1, round((params / each) ** 0.5 / 8)) * 8
    return [s for _ in range(DEPTH) for n, m in MATRICES for s in ((n * width, m * width), (n * width,))]


def predicted(copy: int = 0) -> dict[str, int]:
    """Bytes a parameter that each way has to read and write; copy: bytes of its elements, 0 for none."""
    # clip: g; AdamW: p, g, m, v in, p, m, v out; lerp: p, average in, average out; a copy reads p once more
    clip, adamw, lerp, cast = 2 * 4, 7 * 4, 3 * 4, 4 + copy if copy else 0
    one = 5 * 4 + 4 * 4 + copy
    return {
        OURS: one, TORCH: adamw + lerp + cast, OURS_CLIP: one, TORCH_CLIP: clip + adamw + lerp + cast,
        ADAMW: adamw, LERP: lerp, COPY: 8, SUM: 12,
    }  # fmt: skip


class Side:
    """Parameters, gradients, moments, average and copy, the same for both sides."""

    def __init__(self, params: int, copy: str, device: torch.device) -> None:
        generator = torch.Generator().manual_seed(0)

        def drawn(scale: float) -> list[Tensor]:
            return [(torch.randn(s, generator=generator) * scale).to(device) for s in shapes(params)]

        self.params, self.grads = [torch.nn.Parameter(p) for p in drawn(0.02)], drawn(1e-3)
        self.average = [p.detach().clone() for p in self.params]
        self.copy = [] if copy == "none" else [p.detach().to(DTYPES[copy]) for p in self.params]
        self.coefficient = torch.tensor(0.9999, device=device)
        self.finite = torch.tensor(True, device=device)


def ours(side: Side) -> tuple[Callable[[], None], Callable[[], None]]:
    """(step, step with the clip)."""
    first, second = ([torch.zeros_like(p) for p in side.params] for _ in range(2))
    steps = list(torch.zeros(len(side.params), device=side.finite.device).unbind())

    def step(scale: Tensor | None = None) -> None:
        adamw_step(
            side.params, side.grads, first, second, steps, side.average, side.copy, rate=RATE, betas=BETAS, eps=EPS,
            weight_decay=WEIGHT_DECAY, decay=DECAY, scale=scale, finite=side.finite,
        )  # fmt: skip

    return step, lambda: step(side.coefficient)


def torchs(side: Side) -> dict[str, Callable[[], None]]:
    optimizer = torch.optim.AdamW(side.params, lr=RATE, betas=BETAS, eps=EPS, weight_decay=WEIGHT_DECAY, fused=True)
    optimizer.grad_scale, optimizer.found_inf = None, (~side.finite).float()  # type: ignore[attr-defined]
    for p, g in zip(side.params, side.grads):
        p.grad = g
    values = [p.detach() for p in side.params]

    def lerp() -> None:
        torch._foreach_lerp_(side.average, values, 1 - DECAY)

    def step() -> None:
        optimizer.step()
        lerp()
        if side.copy:
            torch._foreach_copy_(side.copy, values)

    def clipped() -> None:
        torch._foreach_mul_(side.grads, side.coefficient)
        step()

    return {TORCH: step, TORCH_CLIP: clipped, ADAMW: lambda: optimizer.step(), LERP: lerp}


def measure(args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """{"seconds": way -> one a round, "elements": way -> elements of its call}."""
    mine, other = Side(args.params, args.copy, device), Side(args.params, args.copy, device)
    cases: dict[str, Callable[[], Any]] = dict(zip((OURS, OURS_CLIP), ours(mine))) | torchs(other)
    count = sum(p.numel() for p in mine.params)
    for name in (OURS, TORCH):
        cases[name]()
    for a, b in zip((*mine.params, *mine.average), (*other.params, *other.average)):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)  # the same step, or there is nothing to compare
    source, target = (torch.ones(count, device=device) for _ in range(2))
    cases |= {COPY: lambda: target.copy_(source), SUM: lambda: target.add_(source, alpha=1e-3)}
    for case in cases.values():
        case()
    return {"seconds": rounds(cases, device, seconds=args.seconds), "parameters": count, "tensors": len(mine.params)}


def ratios(seconds: dict[str, list[float]]) -> dict[str, Spread]:
    """torch / ours of each round's pair."""
    return {
        name: Spread.of([theirs / ours for ours, theirs in zip(seconds[a], seconds[b], strict=True)])
        for name, (a, b) in PAIRS.items()
    }


def table(found: dict[str, Any], copy: int) -> list[str]:
    """The lines under the headline."""
    expected, count = predicted(copy), found["parameters"]
    lines = [f"  {'':26s}{'ms':>10s}{'B/parameter':>14s}{'GB/s':>8s}"]
    for name, bytes_ in expected.items():
        median = statistics.median(found["seconds"][name])
        lines.append(f"  {name:26s}{median * 1e3:10.2f}{bytes_:14d}{count * bytes_ / median / 1e9:8.1f}")
    for name, spread in ratios(found["seconds"]).items():
        a, b = PAIRS[name]
        lines.append(
            f"  torch / ours, {name:12s}{spread.median:10.2f} x  (quartiles {spread.low:.2f} .. {spread.high:.2f}, "
            f"{spread.samples} rounds; bytes alone {expected[b] / expected[a]:.2f})"
        )
    return lines


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    device, machine = torch.device(args.device), describe(torch.device(args.device))
    copy = 0 if args.copy == "none" else DTYPES[args.copy].itemsize
    found = measure(args, device)
    print(headline(machine))
    print(f"{found['parameters'] / 1e6:.1f} million parameters in {found['tensors']} tensors, fp32, copy {args.copy}")
    print("\n".join(table(found, copy)))
    if args.json:
        spreads = {name: asdict(spread) for name, spread in ratios(found["seconds"]).items()}
        document = {"benchmark": "optimizer", "machine": machine, "arguments": vars(args), "predicted": predicted(copy)}
        args.json.write_text(json.dumps(document | found | {"ratios": spreads}, indent=1, default=str))


if __name__ == "__main__":
    main()
