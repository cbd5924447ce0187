# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""What every Triton kernel costs on each GPU architecture, without a GPU.

    python benchmarks/cost.py            compile and print the table
    python benchmarks/cost.py --write    ... and store it in benchmarks/cost.json and COST.md
    python benchmarks/cost.py --check    ... and fail where it is worse than the stored one, or breaks a rule

The ops' launchers run forward and backward on meta tensors of the models' real shapes (`Op.samples(real=True)`) while
`JITFunction.run` is replaced by a recorder; each distinct launch (kernel, argument types, constants, warps, stages) is
then compiled ahead of time for sm_80, sm_90 and sm_100, and ptxas and nvdisasm say what came out:

    registers a thread, bytes spilled (stores + loads), shared memory a block, tensor-core instructions,
    ptxas' remark C7515 (wgmma serialised)

Rules: no kernel of a forward spills; every 16-bit attention kernel has tensor-core
instructions; wgmma is not serialised.
Gate: registers, spills and shared memory may not grow by more than 10 %, tensor-core instructions may not vanish, and
launches per call may not grow.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

TABLE = Path(__file__).with_name("cost.json")
PAGE = Path(__file__).with_name("COST.md")
ARCHS = (80, 90, 100)
MMA = re.compile(r"\b(HMMA|HGMMA|UTCHMMA|UTCQMMA|QGMMA|QMMA|IMMA)\b")
TENSOR_CORE = ("attention_fwd", "attention_bwd_dq", "attention_bwd_dkdv")  # must use them in 16 bits
COLUMNS = ("registers", "spill", "shared", "mma")


@dataclass(frozen=True)
class Launch:
    """One distinct launch: everything that decides what is compiled."""

    op: str
    direction: str
    kernel: str
    module: str
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[int, Any], ...]
    divisible: tuple[int, ...]
    num_warps: int
    num_stages: int

    @property
    def label(self) -> str:
        names = [name for name, _ in self.signature]
        shown = {names[i]: v for i, v in self.constants if names[i].isupper() and names[i] not in ("PAD", "MAIN")}
        brief = " ".join(f"{k}={'x' if v is None else v}" for k, v in shown.items() if v not in (False, 0, "ieee"))
        kind = next((t[1:] for _, t in self.signature if t.startswith("*")), "")
        pointers = sum(t.startswith("*") for _, t in self.signature)
        return (
            f"{self.kernel.strip(chr(95))} ({kind} x{pointers} {brief} warps={self.num_warps} stages={self.num_stages})"
        )


@dataclass
class Row:
    """What one launch costs on one architecture."""

    launch: str
    op: str
    direction: str
    arch: int
    registers: int = 0
    spill: int = 0
    shared: int = 0
    mma: int = 0
    serialised: bool = False
    error: str = ""

    @property
    def key(self) -> str:
        return f"{self.launch} sm_{self.arch}"


@dataclass
class Report:
    triton: str
    rows: list[Row] = field(default_factory=list)
    launches: dict[str, int] = field(default_factory=dict)


def record(arch: int, dtypes: tuple[str, ...] = ("bfloat16", "float32")) -> tuple[list[Launch], dict[str, int]]:
    """(distinct launches, number of launches by "op | direction | sample") of every op's real samples on sm_`arch`."""
    import torch
    from triton.runtime.jit import JITFunction

    from maetok_fast.kernels import ops
    from maetok_fast.kernels._tiles import pretend_arch

    seen: dict[Launch, None] = {}
    counts: dict[str, int] = {}
    current: list[str] = ["", "", ""]

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        options = {k: kwargs.pop(k) for k in ("num_warps", "num_stages") if k in kwargs}
        bound = dict(zip(self.arg_names, args)) | kwargs
        launch = _launch(self, bound, current[0], current[1], options)
        seen[launch] = None
        key = " | ".join(current)
        counts[key] = counts.get(key, 0) + 1

    stock, JITFunction.run = JITFunction.run, run
    try:
        with pretend_arch(arch):
            for op, dtype in itertools.product(ops().values(), dtypes):
                triton_backends = [b for b in op.cuda if b.library == "triton"]
                for backend, sample in itertools.product(triton_backends, op.samples()):
                    if sample.real:
                        _drive(op, backend, sample, getattr(torch, dtype), current)
    finally:
        JITFunction.run = stock
    return list(seen), counts


def _drive(op: Any, backend: Any, sample: Any, dtype: Any, current: list[str]) -> None:
    """Runs a backend's launchers, forward and backward, on meta tensors."""
    import torch

    def randn(*shape: int, dtype: Any = dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    args = op.bind((), sample.make(randn))
    current[:] = [op.name, "forward", f"{sample.label}, {str(dtype)[6:]}"]
    results = list(backend.forward(*args))
    if backend.backward is None:
        return
    current[1] = "backward"
    grads = tuple(torch.empty_like(out) for out in results[: op.outputs - op.detached])
    saved = results if op.keep_output else results[op.outputs :]
    backend.backward(grads if op.outputs > 1 else grads[0], saved, args, op.asked(args))


def _launch(fn: Any, bound: dict[str, Any], op: str, direction: str, options: dict[str, int]) -> Launch:
    """Types, constants and divisibility as Triton's own launcher specialises them."""
    import torch

    names = {
        torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.int32: "i32", torch.int64: "i64",
        torch.uint8: "u8", torch.bool: "i1", torch.float8_e4m3fn: "fp8e4nv", torch.float8_e5m2: "fp8e5",
    }  # fmt: skip
    signature, constants, divisible = [], [], []
    for i, param in enumerate(fn.params):
        value = bound[param.name]
        if param.is_constexpr or value is None:
            signature.append((param.name, "constexpr"))
            constants.append((i, value))
        elif isinstance(value, torch.Tensor):
            signature.append((param.name, "*" + names[value.dtype]))
            divisible.append(i)
        elif isinstance(value, float):
            signature.append((param.name, "fp32"))
        elif value == 1:
            signature.append((param.name, "constexpr"))
            constants.append((i, 1))
        else:
            signature.append((param.name, "i32" if -(2**31) <= value < 2**31 else "i64"))
            if value % 16 == 0:
                divisible.append(i)
    return Launch(
        op, direction, fn.__name__, fn.__module__, tuple(signature), tuple(constants), tuple(divisible),
        options.get("num_warps", 4), options.get("num_stages", 3),
    )  # fmt: skip


def compile_launch(launch: Launch, arch: int) -> Row:
    """Compiles one launch for one architecture and reads what ptxas and nvdisasm say. A failure becomes Row.error."""
    import importlib

    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    row = Row(launch.label, launch.op, launch.direction, arch)
    fn = getattr(importlib.import_module(launch.module), launch.kernel)
    attrs = {(i,): [["tt.divisibility", 16]] for i in launch.divisible}
    constants = {(i,): value for i, value in launch.constants}
    try:
        source = ASTSource(fn, dict(launch.signature), constants, attrs)
        compiled = triton.compile(
            source,
            target=GPUTarget("cuda", arch, 32),
            options={"num_warps": launch.num_warps, "num_stages": launch.num_stages},
        )
    except Exception as error:
        row.error = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"
        return row
    row.shared = compiled.metadata.shared
    log, sass = _assemble(compiled.asm["ptx"], arch, compiled.asm["cubin"])
    row.registers = max((int(n) for n in re.findall(r"Used (\d+) registers", log)), default=0)
    row.spill = sum(int(n) for n in re.findall(r"(\d+) bytes spill", log))
    row.serialised = "C7515" in log
    row.mma = len(MMA.findall(sass))
    return row


def _assemble(ptx: str, arch: int, cubin: bytes) -> tuple[str, str]:
    """(what `ptxas -v` prints, disassembly) with the tools that Triton ships."""
    import triton
    from triton.backends.nvidia.compiler import get_ptxas

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    ptxas = get_ptxas(arch).path
    target = re.search(r"^\.target (\S+)", ptx, re.MULTILINE)
    with tempfile.TemporaryDirectory() as folder:
        source, binary = Path(folder) / "k.ptx", Path(folder) / "k.cubin"
        source.write_text(ptx)
        binary.write_bytes(cubin)
        name = target.group(1).rstrip(",") if target else f"sm_{arch}"
        log = subprocess.run(
            [ptxas, "-v", f"--gpu-name={name}", source, "-o", Path(folder) / "o"],
            capture_output=True,
            text=True,
            check=True,
        )
        sass = subprocess.run([tools / "nvdisasm", "-c", binary], capture_output=True, text=True, check=True)
    return log.stderr + log.stdout, sass.stdout


def build(
    progress: Callable[[str], None] = lambda line: None, only: str = "", archs: tuple[int, ...] = ARCHS
) -> Report:
    """The whole report; `only` keeps kernels whose name contains it."""
    import triton

    work: list[tuple[Launch, int]] = []
    counts: dict[str, int] = {}
    for arch in archs:
        launches, counts = record(arch)
        work += [(launch, arch) for launch in launches if only in launch.kernel]
    report = Report(triton.__version__, launches=dict(sorted(counts.items())))
    with ProcessPoolExecutor(min(len(work), os.cpu_count() or 1)) as pool:
        for row in pool.map(compile_launch, *zip(*work)):
            report.rows.append(row)
            progress(row.key)
    report.rows.sort(key=lambda r: (r.op, r.direction, r.launch, r.arch))
    return report


def broken_rules(report: Report) -> list[str]:
    """What is wrong with a report by itself, one sentence each."""
    out = []
    for row in report.rows:
        if row.error:
            out.append(f"{row.key}: does not compile: {row.error}")
        elif row.direction == "forward" and row.spill:
            out.append(f"{row.key}: a forward kernel spills {row.spill} bytes")
        elif any(name in row.launch for name in TENSOR_CORE) and "(fp32" not in row.launch and not row.mma:
            out.append(f"{row.key}: no tensor-core instructions")
        if row.serialised:
            out.append(f"{row.key}: ptxas serialises wgmma (C7515)")
    return out


def regressions(now: Report, before: Report, slack: float = 0.10) -> list[str]:
    """Where `now` is worse than the stored report. Rows of another Triton version are not compared."""
    out = []
    if now.triton == before.triton:
        old = {row.key: row for row in before.rows}
        for row in now.rows:
            stored = old.get(row.key)
            if stored is None:
                out.append(f"{row.key}: not in {TABLE.name}; run python benchmarks/cost.py --write")
                continue
            for column in ("registers", "spill", "shared"):
                is_, was = getattr(row, column), getattr(stored, column)
                if is_ > was * (1 + slack):
                    out.append(f"{row.key}: {column} {was} -> {is_} (over {slack:.0%})")
            if stored.mma and not row.mma:
                out.append(f"{row.key}: tensor-core instructions {stored.mma} -> 0")
    for key, count in now.launches.items():
        if count > before.launches.get(key, count):
            out.append(f"{key}: launches {before.launches[key]} -> {count}")
    return out


def load(path: Path = TABLE) -> Report:
    raw = json.loads(path.read_text())
    return Report(raw["triton"], [Row(**row) for row in raw["rows"]], raw["launches"])


def save(report: Report, path: Path = TABLE) -> None:
    text = json.dumps(asdict(report), indent=None, separators=(", ", ": "))
    path.write_text(text.replace("}, {", "},\n{").replace('"rows": [', '"rows": [\n').replace("}], ", "}],\n") + "\n")


def markdown(report: Report) -> str:
    """The table as a page: one line a kernel, registers / spilled bytes / shared bytes / tensor-core instructions."""
    lines = [
        "# What the GPU kernels cost",
        "",
        f"Printed by `python benchmarks/cost.py --write` (Triton {report.triton}), held by `tests/test_cost.py` and",
        "`--check`. Each cell: registers a thread / bytes spilled / shared memory a block in bytes / tensor-core",
        "instructions; compiled for the models' real shapes, no GPU involved, so nothing here is a speed.",
        "",
        "| kernel | sm_80 | sm_90 | sm_100 |",
        "|---|---|---|---|",
    ]
    cells: dict[tuple[str, str], dict[int, str]] = {}
    for row in report.rows:
        cell = f"{row.registers} / {row.spill} / {row.shared} / {row.mma}"
        cells.setdefault((row.op, row.launch), {})[row.arch] = cell
    lines += [
        f"| {launch} | " + " | ".join(by_arch.get(arch, "") for arch in ARCHS) + " |"
        for (_, launch), by_arch in cells.items()
    ]
    lines += ["", "| op | direction | shape | launches |", "|---|---|---|---|"]
    lines += [f"| {key} | {count} |" for key, count in report.launches.items()]
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--write", action="store_true", help=f"store the table in {TABLE.name}")
    parser.add_argument("--check", action="store_true", help="fail on a broken rule or a regression")
    parser.add_argument("--only", default="", help="only kernels whose name contains this")
    args = parser.parse_args(argv)
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        parser.error("unset TRITON_INTERPRET: the interpreter and the compiler cannot share a process")
    if args.write and args.only:
        parser.error("--write stores the whole table: leave --only out")

    from rich.console import Console
    from rich.progress import Progress
    from rich.table import Table

    console = Console(width=None if sys.stdout.isatty() else 170)
    with Progress(console=console, transient=True) as bar:
        task = bar.add_task("compiling", total=None)
        report = build(lambda _line: bar.advance(task), args.only)
    table = Table("kernel", "arch", "regs", "spill B", "shared B", "tensor-core", "", title=f"Triton {report.triton}")
    for row in report.rows:
        note = row.error or ("wgmma serialised" if row.serialised else "")
        values = (str(getattr(row, c)) for c in COLUMNS)
        table.add_row(row.launch, f"sm_{row.arch}", *values, note)
    console.print(table)
    counts = Table("op", "direction", "shape", "launches")
    for key, count in report.launches.items():
        counts.add_row(*key.split(" | "), str(count))
    console.print(counts)
    problems = broken_rules(report)
    if args.check and not args.only:
        problems += regressions(report, load())
    if args.write:
        save(report)
        PAGE.write_text(markdown(report))
        console.print(f"wrote {TABLE.name} and {PAGE.name}")
    for problem in problems:
        console.print(f"[red]{problem}")
    return 1 if problems and args.check else 0


if __name__ == "__main__":
    raise SystemExit(main())
