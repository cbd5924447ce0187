# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""The gate: no op may get slower than its committed floor, measured against the same op of a base commit.

    python benchmarks/compare.py                 every gated pair against the base commit of floors.json
    python benchmarks/compare.py --base REF      against any commit, LIMIT for all
    python benchmarks/compare.py --quick --self-test      what .ci/run does
    python benchmarks/compare.py --write         make HEAD the base; floors from the noise measured now
    python benchmarks/compare.py --add OP        floors of one op; the base of all others stands still
    python benchmarks/compare.py --prove 20      that many clean runs and as many with a planted slowdown: counts

    base commit ── git archive ── its kernels/ as the package maetok_base, its csrc/ built (or the library of today
    copied, where csrc/ is the same) ──┐
    head: this maetok_fast ────────────┴── worker process: both packages, the same tensors, interleaved ── _gate.py

Compared are the launchers (`Backend.forward`, `Backend.backward`) of what dispatch takes on this device, on one image
of the cheapest real sample of every op: in the cache and on one thread a kernel's own speed shows best, and a busy
neighbour core disturbs least. Both sides of a floor run here and now, so the floors hold on any machine.
The static costs of the GPU kernels are compared too (cost.py), unless --no-static.
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parent.parent))

from benchmarks import _cli
from benchmarks import _gate as gate
from benchmarks._base import BASE_NAME, ROOT, Unusable, base_tree, git
from benchmarks._floors import FLOORS, Results, bases, load_floors, make_floors, with_op
from benchmarks._pairs import LOST, pairs

PLANT = 1.10
Found = tuple[Results, dict[str, str]]  # measured pairs; what was not compared, and why


# ---- one process


def worker(args: argparse.Namespace) -> int:
    """Measures in this process and prints one JSON line a pair."""
    import torch

    from maetok_fast.bench.ops import keep_freed_memory
    from maetok_fast.kernels import ops

    sys.path.insert(0, str(args.tree))
    base = importlib.import_module(f"{BASE_NAME}.kernels")
    drives = [importlib.import_module(f"{package}.kernels._drive") for package in ("maetok_fast", BASE_NAME)]
    device = torch.device(args.device)
    torch.set_num_threads(1)
    keep_freed_memory(device)
    plants = dict(plant.split("=") for plant in args.plant)
    wanted = set(json.loads(args.only)) if args.only else None
    mine = {name: op for name, op in ops().items() if not args.ops or name in args.ops}
    seed = int.from_bytes(os.urandom(4), "little")
    with torch.no_grad():
        for key, head, other in pairs(mine, base.ops(), drives, device, args.dtype):
            if head is None:
                print(json.dumps({"key": key, "why": other}), flush=True)
                continue
            if wanted is not None and key not in wanted:
                continue
            factor = plants.get(key.split(" | ")[0], plants.get("all"))
            if factor is not None:
                head = gate.planted(head, float(factor), device)
            found = gate.measure(head, other, device, seconds=args.seconds, seed=seed)
            print(json.dumps({"key": key, **asdict(found)}), flush=True)
    return 0


def process(
    args: argparse.Namespace,
    tree: Path,
    *,
    only: Sequence[str] | None = None,
    scale: float = 1.0,
    plant: Sequence[str] = (),
    ops: Iterable[str] = (),
) -> Found:
    """A fresh worker process over these ops (all of them by default)."""
    command = [sys.executable, __file__, "--worker", "--tree", str(tree), "--device", args.device]
    command += ["--seconds", str(args.seconds * scale), "--dtype", *args.dtype, "--plant", *plant, "--ops", *ops]
    command += ["--only", json.dumps(list(only))] if only is not None else []
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise Unusable(f"the measuring process failed:\n{done.stderr.strip()[-3000:]}")
    results: Results = {}
    skipped: dict[str, str] = {}
    for line in done.stdout.splitlines():
        if line.startswith("{"):
            raw = json.loads(line)
            key = raw.pop("key")
            if "why" in raw:
                skipped[key] = raw["why"]
            else:
                results[key] = gate.Measured(**raw)
    return results, skipped


def run(
    measure: Callable[[Sequence[str] | None, float], Found],
    limits: dict[str, float],
    known: set[str] | None = None,
) -> tuple[dict[str, gate.Verdict], dict[str, str]]:
    """The gate once: one process over all pairs, then two fresh ones over the doubtful. `measure(only, scale)` is one
    process. known: the pairs that have floors (others are left out), None for all."""
    first, skipped = measure(None, 1.0)
    if known is not None:
        skipped |= {key: "no floor" for key in first if key not in known}
        first = {key: found for key, found in first.items() if key in known}
    again = gate.doubtful(first, limits)
    found = {key: [value] for key, value in first.items()}
    for scale in (2.0, 2.0) if again else ():
        for key, value in measure(again, scale)[0].items():
            found[key].append(value)
    return {key: gate.verdict(values, limits.get(key, gate.LIMIT)) for key, values in found.items()}, skipped


def over_bases(
    groups: dict[str, list[str]], tree_of: Callable[[str], Path], measure: Callable[[Path, list[str]], Found]
) -> Found:
    """One process for each base, together. The first base must be there; ops of a later one that is not are skipped."""
    results: Results = {}
    skipped: dict[str, str] = {}
    for i, (commit, names) in enumerate(groups.items()):
        try:
            tree = tree_of(commit)
        except Unusable as error:
            if i == 0:
                raise
            skipped |= dict.fromkeys(names, str(error).splitlines()[0])
            continue
        if names:
            found, missed = measure(tree, names)
            results |= found
            skipped |= missed
    return results, skipped


# ---- the command


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = _cli.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--base", metavar="REF", help="commit to compare with (default: the base of floors.json, with its floors)")
    add("--write", action="store_true", help="make HEAD the base and store floors from the noise measured now")
    add(
        "--prove",
        type=int,
        metavar="N",
        help="N clean runs and N with every op slowed by 10 %%: false alarms and misses",
    )
    add("--add", metavar="OP", help="store floors of one op from the noise measured now; the base stays")
    add("--quick", action="store_true", help="bf16 only, shorter")
    add("--self-test", action="store_true", help="after the gate, slow every op by 10 %% and see each one caught")
    add("--no-static", action="store_true", help="leave the static costs of the GPU kernels out")
    add("--device", default="cpu", help="cpu (default) or cuda")
    add("--dtype", nargs="+", choices=("fp32", "bf16", "fp16"), help="default fp32 and bf16; bf16 with --quick")
    add("--seconds", type=float, help="at most this long a pair in the first process (default 1, 0.5 with --quick)")
    add("--cache", type=Path, default=ROOT / "build" / "base", help="where built bases are kept (default build/base)")
    add("--plant", nargs="*", default=[], metavar="OP=1.10", help=argparse.SUPPRESS)
    add("--worker", action="store_true", help=argparse.SUPPRESS)
    add("--tree", type=Path, help=argparse.SUPPRESS)
    add("--only", help=argparse.SUPPRESS)
    add("--ops", nargs="*", default=[], help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    args.dtype = args.dtype or (["bf16"] if args.quick else ["fp32", "bf16"])
    args.seconds = (0.5 if args.quick else 1.0) if args.seconds is None else args.seconds
    if not 0 < args.seconds < math.inf:
        parser.error(f"--seconds expects a time above 0, got {args.seconds}")
    _cli.device(parser, args.device)
    _cli.output(parser, "--cache", args.cache, folder=True)
    if args.add and args.write:
        parser.error("give --add or --write, not both: --write stores every op")
    for plant in args.plant:
        name, _, factor = plant.partition("=")
        if not name or not re.fullmatch(r"\d+(\.\d*)?", factor) or float(factor) < 1:
            parser.error(f"--plant expects OP=FACTOR with a factor of at least 1, got {plant!r}")
    if args.prove is not None and args.prove < 1:
        parser.error(f"--prove expects a number of runs of at least 1, got {args.prove}")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    if args.worker:
        return worker(args)
    try:
        return command(args)
    except Unusable as error:
        print(f"compare.py: {error}", file=sys.stderr)
        return 2


def command(args: argparse.Namespace) -> int:
    started = time.perf_counter()
    if args.write:
        return write(args)
    if args.add:
        return add(args)
    floors = {"base": args.base, "floors": None} if args.base else load_floors()
    groups = bases(floors, sorted(op_names()))
    limits = {key: 1 / floor for key, floor in (floors["floors"] or {}).items()}
    known = None if floors["floors"] is None else set(limits)

    def one(plant: Sequence[str]) -> tuple[dict[str, gate.Verdict], dict[str, str]]:
        def measure(only: Sequence[str] | None, scale: float) -> Found:
            return over_bases(
                groups,
                lambda commit: base_tree(commit, args.cache),
                lambda tree, names: process(args, tree, only=only, scale=scale, plant=plant, ops=names),
            )

        return run(measure, limits, known)

    if args.prove:
        return prove(args.prove, one)
    verdicts, skipped = one(args.plant)
    report(verdicts, skipped, floors["base"])
    problems = [
        f"{key}: {v.ratio:.3f} x the base's time (limit {v.limit:.3f})" for key, v in verdicts.items() if v.slow
    ]
    problems += lost(limits, verdicts, skipped, args.dtype)
    if not verdicts:
        print("nothing could be compared on this machine")
    if args.self_test and verdicts:
        caught, _ = one([f"all={PLANT}"])
        blind = [key for key, v in caught.items() if not v.slow]
        print(f"self-test: {len(caught) - len(blind)} of {len(caught)} planted slowdowns of {PLANT - 1:.0%} caught")
        problems += [f"{key}: a planted slowdown of {PLANT - 1:.0%} was not seen" for key in blind]
    if not args.no_static:
        problems += static_costs()
    for problem in problems:
        print(f"FAILED {problem}")
    print(f"{'failed' if problems else 'passed'} in {time.perf_counter() - started:.0f} s")
    return 1 if problems else 0


def lost(
    limits: dict[str, float], verdicts: dict[str, gate.Verdict], skipped: dict[str, str], dtypes: Sequence[str]
) -> list[str]:
    """Kernels that vanished, and floors that nothing was measured for without a reason: a renamed sample, an op that
    is gone."""
    out = [f"{key}: {why}" for key, why in skipped.items() if why == LOST]
    named = tuple(skipped)
    for key in limits:
        if key.split(" | ")[2] in dtypes and key not in verdicts and not (named and key.startswith(named)):
            words = f"if that is meant, run compare.py --add {key.split(' | ')[0]}"
            out.append(f"{key}: has a floor and was not measured; {words}")
    return out if verdicts or skipped else []


def report(verdicts: dict[str, gate.Verdict], skipped: dict[str, str], base: str) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("op | sample | dtype | direction", "time / base", "limit", "processes", title=f"against {base[:12]}")
    for key, found in verdicts.items():
        style = "red" if found.slow else None
        table.add_row(key, f"{found.ratio:.3f}", f"{found.limit:.3f}", str(found.processes), style=style)
    console = Console()
    Console(width=max(console.width, 110)).print(table)
    for key, why in skipped.items():
        print(f"not compared: {key}: {why}")


def op_names() -> list[str]:
    from maetok_fast.kernels import ops

    return list(ops())


def noise_of_head(args: argparse.Namespace, ops: Sequence[str] = ()) -> dict[str, Any]:
    """make_floors of five processes that compare HEAD with itself."""
    if git("status", "--porcelain", "--", "kernels", "csrc", "setup.py").strip():
        raise Unusable("commit the changes in kernels/ and csrc/ first: the base must be a commit")
    commit = git("rev-parse", "HEAD").decode().strip()
    tree = base_tree(commit, args.cache)
    return make_floors(commit, [process(args, tree, ops=ops)[0] for _ in range(5)])


def store(floors: dict[str, Any], found: dict[str, Any]) -> int:
    FLOORS.write_text(json.dumps(floors, indent=1) + "\n")
    print(f"wrote {FLOORS.name}: {len(found['floors'])} of its {len(floors['floors'])} floors measured now")
    for key, noise in found["left_out"].items():
        print(f"left out, too noisy to see 10 %: {key} (sigma {noise:.1%})")
    return 0


def write(args: argparse.Namespace) -> int:
    """HEAD becomes the base of every op."""
    found = noise_of_head(args)
    return store(found, found)


def add(args: argparse.Namespace) -> int:
    """Floors of one op. Where the stored base has it in the same form it is held against that; else against HEAD."""
    stored = load_floors()
    if args.add not in op_names():
        raise Unusable(f"--add {args.add}: no such op, expected one of {', '.join(sorted(op_names()))}")
    found = noise_of_head(args, [args.add])
    if not found["floors"] and not found["left_out"]:
        raise Unusable(f"--add {args.add}: nothing to store, the reference runs here or no sample is real")
    _, skipped = process(args, base_tree(stored["base"], args.cache), only=[], ops=[args.add])
    whole = [key for key in skipped if key.count(" | ") < 2]  # the op itself, or it in one dtype
    return store(with_op(stored, args.add, found, in_base=not whole), found)


def prove(count: int, one: Callable[[Sequence[str]], tuple[dict[str, gate.Verdict], dict[str, str]]]) -> int:
    """Counts over `count` clean runs and `count` with every op slowed: alarms in clean ones, misses in the others."""
    alarms: list[str] = []
    misses: list[str] = []
    clean = slowed = failed = 0
    for i in range(count):
        for plant, wrong in (([], alarms), ([f"all={PLANT}"], misses)):
            verdicts, _ = one(plant)
            bad = [key for key, v in verdicts.items() if v.slow != bool(plant)]
            wrong += bad
            if plant:
                slowed += len(verdicts)
                failed += any(v.slow for v in verdicts.values())
            else:
                clean += len(verdicts)
        print(
            f"run {i + 1}: {len(alarms)} false alarms in {clean} clean pairs, {len(misses)} misses in {slowed} "
            f"slowed ones; {failed} of {i + 1} slowed runs failed",
            flush=True,
        )
    for name, keys in (("false alarm", alarms), ("missed", misses)):
        for key in dict.fromkeys(keys):
            print(f"{name}: {key} ({keys.count(key)} x)")
    return 1 if alarms or misses else 0


def static_costs() -> list[str]:
    """cost.py's broken rules and regressions against cost.json; in its own process, as compiler and interpreter must
    not meet."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("cost.py")), "--check"],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode == 0:
        return []
    return [f"static costs: {line}" for line in (done.stdout + done.stderr).strip().splitlines()[-20:]]


if __name__ == "__main__":
    raise SystemExit(main())
