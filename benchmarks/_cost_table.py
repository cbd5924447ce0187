# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""The table of GPU costs: its rows, the rules that they obey, what is worse than the stored one, the page."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

TABLE = Path(__file__).with_name("cost.json")
PAGE = Path(__file__).with_name("COST.md")
ARCHS = (80, 90, 100)
TENSOR_CORE = ("attention_fwd", "attention_bwd_dq", "attention_bwd_dkdv")  # must use them in 16 bits
COLUMNS = ("registers", "spill", "shared", "mma")
CUDA = " [CUDA C++]"  # closes the label of a row that nvcc compiled


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

    @property
    def cuda(self) -> bool:
        """Whether nvcc compiled it, not Triton."""
        return self.launch.endswith(CUDA)


@dataclass
class Report:
    """nvcc: the version that compiled the CUDA C++ rows, "" where there are none. unchecked: why these were taken over
    from the stored table, if they were. missed: rows of the tile table that nothing reached. Neither is stored."""

    triton: str
    rows: list[Row] = field(default_factory=list)
    launches: dict[str, int] = field(default_factory=dict)
    nvcc: str = ""
    unchecked: str = ""
    missed: list[str] = field(default_factory=list)


def broken_rules(report: Report) -> list[str]:
    """What is wrong with a report by itself, one sentence each."""
    out = list(report.missed)
    for row in report.rows:
        if row.error:
            out.append(f"{row.key}: does not compile: {row.error}")
        elif row.spill:
            out.append(f"{row.key}: spills {row.spill} bytes")
        elif any(name in row.launch for name in TENSOR_CORE) and "(fp32" not in row.launch and not row.mma:
            out.append(f"{row.key}: no tensor-core instructions")
        if row.serialised:
            out.append(f"{row.key}: ptxas serialises wgmma (C7515)")
    return out


def regressions(now: Report, before: Report, slack: float = 0.10) -> list[str]:
    """Where `now` is worse than the stored report. Rows of another Triton or nvcc version are not compared."""
    out = []
    old = {row.key: row for row in before.rows}
    for row in now.rows:
        if (now.nvcc == before.nvcc) if row.cuda else (now.triton == before.triton):
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
    return Report(raw["triton"], [Row(**row) for row in raw["rows"]], raw["launches"], raw.get("nvcc", ""))


def save(report: Report, path: Path = TABLE) -> None:
    stored = {k: v for k, v in asdict(report).items() if k not in ("unchecked", "missed") and (v or k != "nvcc")}
    text = json.dumps(stored, indent=None, separators=(", ", ": "))
    path.write_text(text.replace("}, {", "},\n{").replace('"rows": [', '"rows": [\n').replace("}], ", "}],\n") + "\n")


def markdown(report: Report) -> str:
    """The table as a page: one line a kernel, registers / spilled bytes / shared bytes / tensor-core instructions."""
    lines = [
        "# What the GPU kernels cost",
        "",
        f"Printed by `python benchmarks/cost.py --write` (Triton {report.triton}"
        + (f", nvcc {report.nvcc}" if report.nvcc else "")
        + "), held by `tests/test_cost.py` and",
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
