# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""What every GPU kernel, Triton and CUDA C++, costs on each GPU architecture, without a GPU.

    python benchmarks/cost.py            compile and print the table
    python benchmarks/cost.py --write    ... and store it in benchmarks/cost.json and COST.md
    python benchmarks/cost.py --check    ... and fail where it is worse than the stored one, or breaks a rule

The ops' launchers run forward and backward on meta tensors of the models' real shapes (`Op.samples(real=True)`) while
`JITFunction.run` is replaced by a recorder; each distinct launch (kernel, argument types, constants, warps, stages) is
then compiled ahead of time for sm_80, sm_90 and sm_100, and ptxas and nvdisasm say what came out:

    registers a thread, bytes spilled (stores + loads), shared memory a block, tensor-core instructions,
    ptxas' remark C7515 (wgmma serialised)

csrc/cuda/*.cu is compiled by nvcc for the same architectures, every instantiation is a row, its op is the file. Without
nvcc these rows are taken over from the stored table, unchecked, and the report says so.

Every row of the attention's tile table is compiled: those that no real sample reaches by `extra_samples`. What is no
op (`ema_update`, `adamw_step`) takes lists of tensors and stands beside them: `run_lists`.

Rules: no kernel spills; every 16-bit attention kernel has tensor-core
instructions; wgmma is not serialised; no row of the tile table is left out.
Gate: registers, spills and shared memory may not grow by more than 10 %, tensor-core instructions may not vanish, and
launches per call may not grow.
"""

from __future__ import annotations

import itertools
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parent.parent))

from benchmarks import _cli
from benchmarks._cost_table import (
    ARCHS,
    COLUMNS,
    PAGE,
    TABLE,
    Report,
    Row,
    broken_rules,
    load,
    markdown,
    regressions,
    save,
)
from benchmarks._nvcc import CSRC, add_cuda

MMA = re.compile(r"\b(HMMA|HGMMA|UTCHMMA|UTCQMMA|QGMMA|QMMA|IMMA)\b")


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
        hidden = ("PAD", "MAIN", "BETA1", "BETA2")
        shown = {names[i]: v for i, v in self.constants if names[i].isupper() and names[i] not in hidden}
        brief = " ".join(f"{k}={'x' if v is None else v}" for k, v in shown.items() if v not in (False, 0, "ieee"))
        kind = next((t[1:] for _, t in self.signature if t.startswith("*")), "")
        # tensors behind a table of addresses: "fp32 - bf16", - for what is absent
        likes = [t.lstrip("*").replace("constexpr", "-") for name, t in self.signature if name.endswith("_like")]
        kind = " ".join(likes) or kind
        pointers = sum(t.startswith("*") for _, t in self.signature)
        return (
            f"{self.kernel.strip(chr(95))} ({kind} x{pointers} {brief} warps={self.num_warps} stages={self.num_stages})"
        )


def extra_samples(op: str) -> list[Any]:
    """Samples beside the real ones, for the rows of the tile table that no model of the library reaches."""
    if op not in ("rope_attention", "rope_attention_jvp"):
        return []
    import torch

    from maetok_fast.kernels import Sample

    def wide(rotated: bool) -> Callable[[Callable[..., Any]], dict[str, Any]]:
        def make(randn: Callable[..., Any]) -> dict[str, Any]:
            args = {name: randn(4, 256, 3, 16, 128) for name in ("qkv", "dqkv")[: 2 if op.endswith("jvp") else 1]}
            return args | {"rope": randn(2, 16, 256, 64, dtype=torch.float32)} if rotated else args

        return make

    return [Sample("head_dim 128", wide(False)), Sample("head_dim 128, rotated", wide(True))]


def record(
    arch: int,
    dtypes: tuple[str, ...] = ("bfloat16", "float32"),
    reached: set[tuple[Any, ...]] | None = None,
    records: Sequence[Any] = (),
) -> tuple[list[Launch], dict[str, int]]:
    """(distinct launches, number of launches by "op | direction | sample") of every op's real samples on sm_`arch`, or
    of `records` only. `reached` collects the rows of the tile table, (kernel, itemsize, head_dim, rotates, architecture
    at least)."""
    import torch
    from triton.runtime.jit import JITFunction

    from maetok_fast.kernels import _rope_attention_jvp_triton, _rope_attention_triton, _tiles, ops
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

    def attention_tile(kernel: str, itemsize: int, head_dim: int, rotates: bool) -> Any:
        for row, by_arch in _tiles.ATTENTION_TILES.items():
            if row[:2] == (kernel, itemsize) and head_dim <= row[2] and row[3] in (None, rotates):
                if reached is not None:
                    reached.add((*row, next(least for least in by_arch if arch >= least)))
                break
        return _tiles.attention_tile(kernel, itemsize, head_dim, rotates)

    stock, JITFunction.run = JITFunction.run, run
    attentions: list[Any] = [_rope_attention_triton, _rope_attention_jvp_triton]
    for module in attentions:
        module.attention_tile = attention_tile
    try:
        with pretend_arch(arch):
            for op, dtype in itertools.product(records or ops().values(), dtypes):
                if "triton" in op.known:
                    for sample in [*(s for s in op.samples if s.real), *extra_samples(op.name)]:
                        _run(op, sample, getattr(torch, dtype), current)
            if not records:
                run_lists(current)
    finally:
        JITFunction.run = stock
        for module in attentions:
            module.attention_tile = _tiles.attention_tile
    return list(seen), counts


def _run(op: Any, sample: Any, dtype: Any, current: list[str]) -> None:
    """Runs Triton's launchers, forward and backward, on meta tensors."""
    from maetok_fast.kernels._drive import launch, launch_backward, make

    a = op.arguments(**make(op, sample, dtype, "meta"))
    if op.unsupported("triton", a) is not None:
        return  # what this architecture lacks (float8 before sm_89) is not compiled for it
    current[:] = [op.name, "forward", f"{sample.label}, {str(dtype)[6:]}"]
    results = launch(op, "triton", a)
    if op.backend("triton").backward is not None:
        current[1] = "backward"
        launch_backward(op, "triton", a, results)


def run_lists(current: list[str]) -> None:
    """The launchers of what mutates lists of tensors, on meta tensors, for the dtypes that training has: parameters and
    gradients in fp32 or 16 bits, with an average, a low-precision copy, or neither."""
    import torch

    from maetok_fast.kernels import adamw, ema

    fp32, bf16 = torch.float32, torch.bfloat16
    kinds: list[tuple[Any, Any, Any, Any]] = [  # parameter, gradient, average, copy
        (fp32, fp32, None, None), (fp32, fp32, fp32, None), (fp32, fp32, fp32, bf16), (fp32, bf16, fp32, bf16),
        (bf16, bf16, fp32, None),
    ]  # fmt: skip

    def of(dtype: Any) -> list[torch.Tensor]:
        """SiT-XL's widest matrix and a bias, in one table."""
        return [] if dtype is None else [torch.empty(s, dtype=dtype, device="meta") for s in ((6912, 1152), (6912,))]

    def label(**kind: Any) -> str:
        return ", ".join(f"{name} {str(d)[6:]}" for name, d in kind.items() if d is not None)

    finite, scale, decay = (torch.empty((), dtype=d, device="meta") for d in (torch.bool, fp32, torch.float64))
    for param, gradient, average, copy in kinds:
        current[:] = ["adamw_step", "step", label(parameter=param, gradient=gradient, average=average, copy=copy)]
        lists, grads = (of(param), of(fp32), of(fp32), of(average), of(copy)), of(gradient)
        steps = [torch.empty((), device="meta") for _ in grads]
        plan = adamw._tables.make(lists, adamw.ADAMW_BLOCK * adamw.ADAMW_STEPS, grads, steps, [0.1, 0.0])
        for group in plan.groups:
            adamw._triton(group, grads, adamw._Step(1e-4, (0.9, 0.95), 1e-8, 0.9999, scale, finite))
    for param, average, copy in dict.fromkeys((p, a, c) for p, _, a, c in kinds if a is not None):
        current[:] = ["ema_update", "step", label(parameter=param, average=average, copy=copy)]
        for group in ema._tables.make((of(average), of(param), of(copy)), ema.EMA_BLOCK * ema.EMA_STEPS).groups:
            ema._triton(group, 0.0, decay)


def _launch(fn: Any, bound: dict[str, Any], op: str, direction: str, options: dict[str, int]) -> Launch:
    """Types, constants and divisibility as Triton's own launcher specialises them."""
    import torch

    names = {
        torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.int32: "i32", torch.int64: "i64",
        torch.uint8: "u8", torch.bool: "i1", torch.float8_e4m3fn: "fp8e4nv", torch.float8_e5m2: "fp8e5",
        torch.float64: "fp64",
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
        sass = ""
        if "mma" in ptx:  # disassembling takes a third of the time, and only these have tensor-core work
            dump = subprocess.run([tools / "nvdisasm", "-c", binary], capture_output=True, text=True, check=True)
            sass = dump.stdout
    return log.stderr + log.stdout, sass


def missed_tiles(reached: set[tuple[Any, ...]]) -> list[str]:
    """Rows of the tile table that no recorded launch used."""
    from maetok_fast.kernels._tiles import ATTENTION_TILES

    every = {(*row, least) for row, by_arch in ATTENTION_TILES.items() for least in by_arch}
    return [f"tile {row}: no sample reaches it, so it was not compiled" for row in sorted(every - reached, key=str)]


def load_files(files: Sequence[str]) -> list[Any]:
    """The op records of these files, which the compiling processes need too."""
    from maetok_fast.kernels._drive import load

    return [op for path in files for op in load(path)]


def build(
    progress: Callable[[str], None] = lambda line: None,
    only: str = "",
    archs: tuple[int, ...] = ARCHS,
    files: Sequence[str] = (),
) -> Report:
    """The whole report; `only` keeps kernels whose name contains it, `files` are reported instead of the library."""
    import triton

    work: list[tuple[Launch, int]] = []
    counts: dict[str, int] = {}
    reached: set[tuple[Any, ...]] = set()
    for arch in archs:
        launches, counts = record(arch, reached=reached, records=load_files(files))
        work += [(launch, arch) for launch in launches if only in launch.kernel]
    report = Report(triton.__version__, launches=dict(sorted(counts.items())))
    if archs == ARCHS and not files:
        report.missed = missed_tiles(reached)
    if work:
        cores = min(len(work), os.cpu_count() or 1)
        with ProcessPoolExecutor(cores, initializer=load_files, initargs=(files,)) as pool:
            for row in pool.map(compile_launch, *zip(*work)):
                report.rows.append(row)
                progress(row.key)
    if not files:
        add_cuda(report, progress, only, archs)
    report.rows.sort(key=lambda r: (r.op, r.direction, r.launch, r.arch))
    return report


def _written(text: str) -> bool:
    """Whether a kernel of this name is in the sources, stored or not."""
    files = [*(CSRC.parent / "kernels").glob("*.py"), *CSRC.glob("cuda/*.cu")]
    return any(re.search(rf"\w*{re.escape(text)}\w*\(", path.read_text()) for path in files)


def main(argv: list[str] | None = None) -> int:
    parser = _cli.Parser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--write", action="store_true", help=f"store the table in {TABLE.name}")
    parser.add_argument("--check", action="store_true", help="fail on a broken rule or a regression")
    parser.add_argument("--only", default="", help="only kernels whose name contains this")
    parser.add_argument("--op-file", action="append", default=[], help="the op records of this file, not the library's")
    args = parser.parse_args(argv)
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        parser.error("unset TRITON_INTERPRET: the interpreter and the compiler cannot share a process")
    if args.write and (args.only or args.op_file):
        parser.error("--write stores the whole table: leave --only and --op-file out")
    try:
        load_files(args.op_file)
    except ValueError as error:
        parser.error(str(error))

    if args.only and not any(args.only in row.launch for row in load().rows) and not _written(args.only):
        parser.error(f"--only {args.only}: no kernel has this in its name")

    from rich.console import Console
    from rich.markup import escape
    from rich.progress import Progress
    from rich.table import Table

    console = Console(width=None if sys.stdout.isatty() else 170)
    with Progress(console=console, transient=True) as bar:
        task = bar.add_task("compiling", total=None)
        report = build(lambda _line: bar.advance(task), args.only, files=args.op_file)
    table = Table("kernel", "arch", "regs", "spill B", "shared B", "tensor-core", "", title=f"Triton {report.triton}")
    for row in report.rows:
        note = row.error or ("wgmma serialised" if row.serialised else "")
        values = (str(getattr(row, c)) for c in COLUMNS)
        table.add_row(escape(row.launch), f"sm_{row.arch}", *values, note)
    console.print(table)
    counts = Table("op", "direction", "shape", "launches")
    for key, count in report.launches.items():
        counts.add_row(*key.split(" | "), str(count))
    console.print(counts)
    if report.unchecked:
        console.print(f"[yellow]{report.unchecked}")
    problems = broken_rules(report)
    if args.check and not args.only and not args.op_file:
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
