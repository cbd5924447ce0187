# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""The gate: no op may get slower than its committed floor, measured against the same op of a base commit.

    python benchmarks/compare.py                 every gated pair against the base commit of floors.json
    python benchmarks/compare.py --base REF      against any commit, LIMIT for all
    python benchmarks/compare.py --quick --self-test      what .ci/run does
    python benchmarks/compare.py --write         make HEAD the base; floors from the noise measured now
    python benchmarks/compare.py --prove 20      that many clean runs and as many with a planted slowdown: counts

    base commit ── git archive ── its kernels/ as the package maetok_base, its csrc/ built (or the library of today
    copied, where csrc/ is the same) ──┐
    head: this maetok_fast ────────────┴── worker process: both packages, the same tensors, interleaved ── gate.py

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
import shutil
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from io import BytesIO
from pathlib import Path
from typing import Any

from maetok_fast.bench import gate

ROOT = Path(__file__).resolve().parent.parent
FLOORS = Path(__file__).with_name("floors.json")
BASE_NAME = "maetok_base"
PLANT = 1.10
LOST = "the base has a kernel here and today's dispatch takes the reference"
Results = dict[str, gate.Measured]


class Unusable(Exception):
    """Why nothing can be compared, in words."""


# ---- the base


def git(*args: str) -> bytes:
    done = subprocess.run(["git", "-C", str(ROOT), *args], capture_output=True, check=False)
    if done.returncode != 0:
        raise Unusable(f"git {' '.join(args)}: {done.stderr.decode(errors='replace').strip()}")
    return done.stdout


def base_tree(ref: str, cache: Path) -> Path:
    """The folder to put on the path so that `maetok_base.kernels` is the op library of commit `ref`; made once a
    commit. Raises Unusable when the commit is not here or does not build."""
    try:
        commit = git("rev-parse", "--verify", f"{ref}^{{commit}}").decode().strip()
    except Unusable as error:
        raise Unusable(f"the base {ref} is not in this clone (fetch it, or give --base): {error}") from None
    tree = cache / commit
    if (tree / BASE_NAME / "kernels" / "__init__.py").exists():
        return tree
    tree.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=tree) as folder:
        source = Path(folder) / "source"
        with tarfile.open(fileobj=BytesIO(git("archive", commit))) as archive:
            archive.extractall(source, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
        _library(source)
        package = Path(folder) / BASE_NAME
        shutil.copytree(source / "kernels", package / "kernels")
        (package / "__init__.py").write_text("")
        for path in (package / "kernels").glob("**/*.py"):
            # its own names in torch.ops, in logging and in its name guard
            path.write_text(path.read_text().replace("maetok_fast", BASE_NAME))
        shutil.rmtree(tree / BASE_NAME, ignore_errors=True)
        package.rename(tree / BASE_NAME)
    return tree


def _library(source: Path) -> None:
    """The base's native library beside its kernels: today's file where its sources are today's, else built."""
    from maetok_fast.kernels import _native

    target = source / "kernels" / "_csrc.so"
    if _native.why_missing() is not None:
        return  # no native library on this machine: nothing native is compared
    if _sources(source) == _sources(ROOT):
        shutil.copy(_native._LIBRARY, target)
        return
    import torch

    cuda = {} if torch.cuda.is_available() else {"MAETOK_FAST_CUDA": "0"}
    done = subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", "--inplace"],
        cwd=source,
        env=os.environ | cuda,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0 or not target.exists():
        raise Unusable(f"the base's native library does not build:\n{(done.stdout + done.stderr).strip()[-2000:]}")


def _sources(root: Path) -> dict[str, bytes]:
    files = [root / "setup.py", *sorted((root / "csrc").rglob("*"))]
    return {str(path.relative_to(root)): path.read_bytes() for path in files if path.is_file()}


# ---- what is compared


def pairs(
    head: dict[str, Any], base: dict[str, Any], drives: Sequence[Any], device: Any, dtypes: Sequence[str]
) -> Iterator[tuple[str, Any, Any]]:
    """(key, head's call, base's call) of every op that both have, or (key, None, why not). drives: head's and base's
    module `_drive`."""
    for name, op in sorted(head.items()):
        if name not in base:
            yield name, None, "not in the base"
            continue
        sample = cheapest(op)
        if sample is None:
            yield name, None, "no real sample"
            continue
        for dtype in dtypes:
            try:
                sides = [launchers(o, d, sample, dtype, device) for o, d in zip((op, base[name]), drives)]
            except (
                Exception
            ) as error:  # a signature that changed, a base that refuses: no comparison, and the gate says so
                yield (
                    f"{name} | {dtype}",
                    None,
                    f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}",
                )
                continue
            for direction in ("forward", "backward"):
                key = f"{name} | {sample.label} | {dtype} | {direction}"
                calls = [side.get(direction) for side in sides]
                if None not in calls:
                    yield key, *calls
                elif any(calls):
                    yield key, None, LOST if calls[0] is None else "the base runs the reference here"
                elif not sides[0]:
                    yield key, None, "the reference runs here"


def cheapest(op: Any) -> Any:
    """The real sample with the least to do, by its cost on meta tensors."""
    import torch

    def work(sample: Any) -> float:
        cost = op.cost(
            **sample.make(lambda *shape, dtype=torch.bfloat16: torch.empty(shape, dtype=dtype, device="meta"))
        )
        return cost.bytes + cost.flops / 20  # bytes and FLOPs of one time on a CPU core, roughly

    return min((sample for sample in op.samples if sample.real), key=work, default=None)


def launchers(op: Any, drive: Any, sample: Any, dtype: str, device: Any) -> dict[str, Callable[[], Any]]:
    """direction -> call of the launchers that dispatch takes here; {} where it takes the reference. drive: the module
    `_drive` of the op's own library."""
    made = one_image(op, sample, dtype, device)
    a = op.arguments(**made)
    chosen = op.choose(**made)
    if chosen == "reference":
        return {}
    calls: dict[str, Callable[[], Any]] = {"forward": lambda: drive.launch(op, chosen, a)}
    if op.backend(chosen).backward is not None:
        results = drive.launch(op, chosen, a)
        calls["backward"] = lambda: drive.launch_backward(op, chosen, a, results)
    return calls


_MADE: dict[Any, dict[str, Any]] = {}


def one_image(op: Any, sample: Any, dtype: str, device: Any) -> dict[str, Any]:
    """The sample's arguments, with a batch of 1 where the op accepts that; the same tensors for both sides."""
    import torch

    from maetok_fast.bench.machine import DTYPES

    key = (op.name, sample.label, dtype)
    if key in _MADE:
        return _MADE[key]
    for one in (True, False):
        generator = torch.Generator().manual_seed(0)
        batch: list[int] = []  # the leading size of the first tensor of two or more dimensions

        def randn(
            *shape: int,
            dtype: Any = DTYPES[dtype],
            one: bool = one,
            batch: list[int] = batch,
            generator: Any = generator,
        ) -> Any:
            if len(shape) > 1:
                batch.append(shape[0])
                shape = (1, *shape[1:]) if one and shape[0] == batch[0] else shape
            return torch.randn(*shape, generator=generator).to(device, dtype)

        try:
            made = sample.make(randn)
            op.arguments(**made)
        except (ValueError, TypeError, RuntimeError, IndexError):
            if not one:
                raise
            continue
        break
    _MADE[key] = made
    return made


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
    seed = int.from_bytes(os.urandom(4), "little")
    with torch.no_grad():
        for key, head, other in pairs(ops(), base.ops(), drives, device, args.dtype):
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
) -> tuple[Results, dict[str, str]]:
    """A fresh worker process: (measured pairs, what was not compared and why)."""
    command = [sys.executable, __file__, "--worker", "--tree", str(tree), "--device", args.device]
    command += ["--seconds", str(args.seconds * scale), "--dtype", *args.dtype, "--plant", *plant]
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
    measure: Callable[[Sequence[str] | None, float], tuple[Results, dict[str, str]]],
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


# ---- floors


def load_floors(path: Path = FLOORS) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise Unusable(f"{path.name} is not there: write it with python benchmarks/compare.py --write") from None


def make_floors(commit: str, rounds: Sequence[Results]) -> dict[str, Any]:
    """The content of floors.json from several processes that compared a build with itself. floors: base's time over
    head's must stay above; left_out: pairs too noisy to see 10 %, with their noise."""
    floors, left_out = {}, {}
    for key in rounds[0]:
        logs = [math.log(found[key].ratio) for found in rounds if key in found]
        noise = max(
            math.sqrt(sum(x * x for x in logs) / len(logs)), statistics.median(found[key].error for found in rounds)
        )
        limit = gate.limit_of(noise)
        if limit is None:
            left_out[key] = round(noise, 4)
        else:
            floors[key] = round(1 / limit, 4)
    return {"schema": 1, "base": commit, "floors": floors, "left_out": left_out}


# ---- the command


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--base", metavar="REF", help="commit to compare with (default: the base of floors.json, with its floors)")
    add("--write", action="store_true", help="make HEAD the base and store floors from the noise measured now")
    add(
        "--prove",
        type=int,
        metavar="N",
        help="N clean runs and N with every op slowed by 10 %%: false alarms and misses",
    )
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
    args = parser.parse_args(argv)
    args.dtype = args.dtype or (["bf16"] if args.quick else ["fp32", "bf16"])
    args.seconds = args.seconds or (0.5 if args.quick else 1.0)
    for plant in args.plant:
        name, _, factor = plant.partition("=")
        if not name or not factor.replace(".", "", 1).isdigit() or float(factor) < 1:
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
    floors = {"base": args.base, "floors": None} if args.base else load_floors()
    tree = base_tree(floors["base"], args.cache)
    limits = {key: 1 / floor for key, floor in (floors["floors"] or {}).items()}
    known = None if floors["floors"] is None else set(limits)

    def one(plant: Sequence[str]) -> tuple[dict[str, gate.Verdict], dict[str, str]]:
        return run(lambda only, scale: process(args, tree, only=only, scale=scale, plant=plant), limits, known)

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
            out.append(f"{key}: has a floor and was not measured; if that is meant, run compare.py --write")
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


def write(args: argparse.Namespace) -> int:
    """Five processes that compare HEAD with itself say how noisy each pair is."""
    if git("status", "--porcelain", "--", "kernels", "csrc", "setup.py").strip():
        raise Unusable("commit the changes in kernels/ and csrc/ first: the base must be a commit")
    commit = git("rev-parse", "HEAD").decode().strip()
    tree = base_tree(commit, args.cache)
    found = make_floors(commit, [process(args, tree)[0] for _ in range(5)])
    FLOORS.write_text(json.dumps(found, indent=1) + "\n")
    print(f"wrote {FLOORS.name}: {len(found['floors'])} floors, base {commit[:12]}")
    for key, noise in found["left_out"].items():
        print(f"left out, too noisy to see 10 %: {key} (sigma {noise:.1%})")
    return 0


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
