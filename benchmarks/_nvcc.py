# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""The CUDA C++ half of cost.py: csrc/cuda/*.cu through nvcc, and what ptxas printed as rows of the table."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from benchmarks._cost_table import CUDA, TABLE, Report, Row, load

CSRC = Path(__file__).resolve().parent.parent / "csrc"


def find_nvcc() -> str | None:
    """nvcc as setup.py would find it on this machine, or None."""
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    candidates = [*(str(Path(home) / "bin" / "nvcc") for home in homes), "nvcc", "/usr/local/cuda/bin/nvcc"]
    return next((found for found in map(shutil.which, candidates) if found), None)


def nvcc_version(nvcc: str) -> str:
    text = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    found = re.search(r"V(\d[\d.]*)", text)
    return found.group(1) if found else "unknown"


def compile_cuda(source: Path, nvcc: str, archs: tuple[int, ...]) -> list[Row]:
    """The rows of one .cu file: one for each instantiated kernel and architecture. A failure becomes Row.error."""
    from tvm_ffi.libinfo import find_dlpack_include_path, find_include_path

    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            [
                nvcc, "-std=c++17", "-O3", "-Xptxas", "-v", *(f"-gencode=arch=compute_{a},code=sm_{a}" for a in archs),
                f"-I{CSRC}", f"-I{find_include_path()}", f"-I{find_dlpack_include_path()}", '-DMF_CUDA_ARCHS=""',
                "-c", source, "-o", Path(folder) / "o",
            ],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
    if done.returncode != 0:
        lines = (done.stderr + done.stdout).strip().splitlines()
        first = next((line for line in lines if "error" in line), lines[-1] if lines else "no output")
        return [Row(f"{source.name}{CUDA}", source.stem, "forward", arch, error=first) for arch in archs]
    return parse_ptxas(done.stderr + done.stdout, source.stem)


def parse_ptxas(log: str, op: str) -> list[Row]:
    """What `ptxas -v` printed, as rows; a kernel's direction is in its name. Shared memory is the static part."""
    rows = []
    for part in re.split(r"Compiling entry function ", log)[1:]:
        name = re.match(r"'(\w+)' for 'sm_(\d+)a?'", part)
        if name is None:
            continue
        row = Row(name.group(1), op, "backward" if "_bwd" in name.group(1) else "forward", int(name.group(2)))
        row.registers = max((int(n) for n in re.findall(r"Used (\d+) registers", part)), default=0)
        row.spill = sum(int(n) for n in re.findall(r"(\d+) bytes spill", part))
        row.shared = max((int(n) for n in re.findall(r"(\d+) bytes smem", part)), default=0)
        rows.append(row)
    for row, name in zip(rows, demangle([row.launch for row in rows])):
        row.launch = name + CUDA
    return rows


def demangle(names: list[str]) -> list[str]:
    """kernel<types> without namespaces and arguments; the names as they are where there is no c++filt."""
    if not names or shutil.which("c++filt") is None:
        return names
    done = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True)
    out = []
    for line in done.stdout.splitlines():
        line = re.sub(r"\(anonymous namespace\)::|\b\w+::", "", line.replace("void ", "", 1))
        depth, end = 0, len(line)
        for i, c in enumerate(line):  # up to the argument list
            depth += (c == "<") - (c == ">")
            if c == "(" and depth == 0:
                end = i
                break
        out.append(line[:end])
    return out


def add_cuda(report: Report, progress: Callable[[str], None], only: str, archs: tuple[int, ...]) -> None:
    """The CUDA C++ rows, compiled or, without nvcc, taken over unchecked."""
    sources = [p for p in sorted(CSRC.glob("cuda/*.cu")) if p.stem != "info" and only in p.read_text()]
    nvcc = find_nvcc()
    if nvcc is None:
        stored = load() if TABLE.exists() else Report("")
        report.nvcc, report.unchecked = (
            stored.nvcc,
            "nvcc was not found: the CUDA C++ rows are the stored ones, unchecked",
        )
        report.rows += [row for row in stored.rows if row.cuda and only in row.launch and row.arch in archs]
        return
    report.nvcc = nvcc_version(nvcc)
    with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)) as pool:
        for rows in pool.map(lambda source: compile_cuda(source, nvcc, archs), sources):
            report.rows += [row for row in rows if only in row.launch or row.error]
            for row in rows:
                progress(row.key)
