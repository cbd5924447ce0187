# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""Memory of SiT-XL/1 on a CPU: the model, and its prepared forms, at the peak of a sampling step.

    python benchmarks/memory.py                 each form in a process of its own, a table
    python benchmarks/memory.py --depth 4       fewer blocks, for a quick look

What a process holds at most during two steps of a plan beyond what it held after its imports: weights, what is kept
between steps, activations. The model that was prepared is freed before. Linux only (/proc), looked at every 2 ms.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

sys.path.append(str(Path(__file__).resolve().parent.parent))

from benchmarks import _cli
from maetok_fast.bench.timing import PeakMemory, held_bytes

CPU = torch.device("cpu")
# form -> the dtype that it computes in, that of its weights; None: not prepared
FORMS: dict[str, tuple[str, str | None]] = {
    "plain fp32": ("float32", None),
    "plain bf16": ("bfloat16", None),
    "prepared fp32": ("float32", "float32"),
    "prepared fp32, weights in bf16": ("float32", "bfloat16"),
    "prepared bf16": ("bfloat16", "bfloat16"),
    "prepared fp32, weights in int8": ("float32", "int8"),
}


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = _cli.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--batch", type=_cli.count, default=1)
    add("--depth", type=_cli.count, default=28)
    add("--form", choices=FORMS, help="this form alone, in this process; prints JSON")
    args = parser.parse_args(argv)
    if held_bytes(CPU) is None:
        parser.error("this system does not show a process's memory in /proc")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    if args.form is not None:
        print(json.dumps(of_form(args.form, args.batch, args.depth)))
        return
    print(f"SiT-XL/1, 128 tokens, depth {args.depth}, batch {args.batch}: GB at the peak of a step, and between steps")
    first = None
    for form in FORMS:
        command = [sys.executable, __file__, "--form", form, "--batch", str(args.batch), "--depth", str(args.depth)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            print(f"  {form:32s} {done.stderr.strip().splitlines()[-1]}")
            continue
        row = json.loads(done.stdout.splitlines()[-1])
        first = first or row["peak"]
        print(
            f"  {form:32s} {row['peak'] / 1e9:6.2f}   {row['kept'] / 1e9:6.2f}   {row['peak'] / first:5.2f} x",
            flush=True,
        )


def of_form(form: str, batch: int, depth: int) -> dict[str, Any]:
    from maetok_fast.inference import prepare
    from maetok_fast.models import SiT, SiTConfig

    dtype, weights = (None if name is None else getattr(torch, name) for name in FORMS[form])
    x, y = torch.randn(batch, 128, 32), torch.arange(batch)
    ts = torch.linspace(1, 0, 9)[:-1]
    torch.nn.functional.linear(x, torch.ones(64, 32))  # the libraries' own memory is no model's
    before = held_bytes(CPU)
    model: Any = SiT(SiTConfig(depth=depth)).eval().to(dtype)
    if weights is None:

        def step(i: int) -> None:
            model(x.to(dtype), ts[i].expand(batch), y)

    else:
        model = prepare(model, dtype, weights)
        plan = model.plan(ts, y)

        def step(i: int) -> None:
            model.step(plan, i, x)

    with torch.no_grad():
        step(0)
        kept = held_bytes(CPU)
        with PeakMemory(CPU) as peak:
            for i in (1, 2):
                step(i)
    return {"form": form, "kept": kept - before, "peak": kept - before + peak.extra_bytes}


if __name__ == "__main__":
    main()
