# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""The op benchmark's results as a table on the terminal and as a page."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from .cases import COMPILE, COPY, REFERENCE
from .machine import headline
from .ops import MATMUL_SIZE, Row
from .timing import Spread

if TYPE_CHECKING:
    from rich.table import Table

COLUMNS = (
    "op, shape",
    "dtype",
    "direction",
    "backend",
    "ms",
    "x reference",
    "x torch.compile",
    "rate",
    "ceiling",
    "of it",
)
NOTES = (
    "Ratios are the peer's time over ours, the median of paired rounds and [quartiles]: above 1, ours is faster.",
    "Rates count the bytes and FLOPs that an ideal implementation must move and do (`Op.cost`). Forward+backward: 3 x "
    "the FLOPs, and the forward's bytes + inputs read again + output gradients read + input gradients written.",
    f"Ceilings are measured in the same rounds: a copy of the same bytes, or a {MATMUL_SIZE}^3 product in the dtype "
    "where the FLOPs weigh more. Freed memory is kept by the process, so no side pays for fresh pages.",
)


def ratio(spread: Spread | None) -> str:
    return "" if spread is None else f"{spread.median:.2f} [{spread.low:.2f}, {spread.high:.2f}]"


def cells(row: Row) -> tuple[str, ...]:
    """One line of the table, in the order of COLUMNS (op and shape apart in the first)."""
    unit = "GB/s" if row.ceiling == COPY else "TFLOP/s"
    rate = row.gb_s if row.ceiling == COPY else row.tflop_s
    return (
        row.sample,
        row.dtype,
        row.direction,
        row.backend,
        f"{row.seconds * 1e3:.3g}",
        ratio(row.ratios.get(REFERENCE)),
        ratio(row.ratios.get(COMPILE)),
        f"{rate:.3g} {unit}",
        f"{row.ceiling_rate:.3g} {row.ceiling}",
        f"{row.attained:.0%}",
    )


def _worse(row: Row) -> bool:
    """Slower than torch.compile beyond the spread, and not at the ceiling."""
    spread = row.ratios.get(COMPILE)
    return spread is not None and spread.high < 1 and row.attained < 0.8


def remarks(rows: Sequence[Row]) -> list[str]:
    """What needs words: notes, reasons of missing backends, other backends' times."""
    out: dict[str, None] = {}
    for row in rows:
        where = f"{row.op}, {row.sample}, {row.dtype}, {row.direction}"
        for note in row.notes:
            out[f"{where}: {note}"] = None
        if row.backend == "reference":
            why = "; ".join(f"{name}: {reason}" for name, reason in row.reasons.items()) or "no kernel for this device"
            out[f"{row.op}, {row.sample}, {row.dtype} runs the reference ({why})"] = None
        for name, spread in list(row.times.items())[1:]:
            if name.startswith("ours "):
                out[f"{where}: backend {name[5:]} takes {spread.median * 1e3:.3g} ms"] = None
    return list(out)


def summary(rows: Sequence[Row]) -> list[tuple[str, str, str, float | None, float | None]]:
    """(op, dtype, direction, median ratio to the reference, to torch.compile) over an op's shapes."""
    lines: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        lines.setdefault((row.op, row.direction, row.dtype), []).append(row)

    def middle(found: list[Row], peer: str) -> float | None:
        ratios = [row.ratios[peer].median for row in found if peer in row.ratios]
        return statistics.median(ratios) if ratios else None

    return [
        (op, dtype, direction, middle(found, REFERENCE), middle(found, COMPILE))
        for (op, direction, dtype), found in lines.items()
    ]


def rich_table(document: dict[str, Any]) -> Table:
    """The table for a terminal; lines slower than torch.compile and below 80 % of the ceiling are red."""
    from rich.markup import escape
    from rich.table import Table

    table = Table(*COLUMNS, title=f"ops on {headline(document['machine'])}", title_justify="left")
    op = None
    for row in document["rows"]:
        if row.op != op:
            op = row.op
            table.add_section()
            table.add_row(f"[bold]{escape(op)}")
        line = [escape(cell) for cell in cells(row)]
        table.add_row("  " + line[0], *line[1:], style="red" if _worse(row) else None)
    return table


def markdown(document: dict[str, Any], command: str = "maetok-fast bench ops --markdown docs/ops.md") -> str:
    """The page docs/ops.md between its markers."""
    machine = document["machine"]
    rows: list[Row] = document["rows"]
    out = [f"{headline(machine)}, {machine['threads']} threads. Printed by `{command}`.", ""]
    out += [f"- {note}" for note in NOTES]
    out += ["", "Median over an op's shapes:", "", "| op | dtype | direction | x reference | x torch.compile |"]
    out += ["|---|---|---|---|---|"]
    for op, dtype, direction, plain, compiled in summary(rows):
        texts = ("" if r is None else f"{r:.2f}" for r in (plain, compiled))
        out.append(f"| {op} | {dtype} | {direction} | {' | '.join(texts)} |")
    for op in dict.fromkeys(row.op for row in rows):
        head = ("shape", *COLUMNS[1:])
        out += ["", f"### {op}", "", f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
        out += [f"| {' | '.join(_escape(cell) for cell in cells(row))} |" for row in rows if row.op == op]
    said = remarks(rows)
    if said:
        out += ["", "Remarks:", "", *(f"- {_escape(line)}" for line in said)]
    return "\n".join(out) + "\n"


def _escape(text: str) -> str:
    return text.replace("|", "\\|")


BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"


def put(page: str, measured: str) -> str:
    """The page with what stands between its markers replaced; a page without markers gets a title and both."""
    block = f"{BEGIN}\n\n{measured}\n{END}\n"
    if BEGIN not in page or END not in page:
        return f"# How fast the ops are\n\n{block}"
    return page[: page.index(BEGIN)] + block + page[page.index(END) + len(END) :].lstrip("\n")
