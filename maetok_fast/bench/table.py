# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""The op benchmark's results as a table on the terminal and as a page."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .cases import COMPILE, COPY, REFERENCE
from .machine import headline
from .ops import MATMUL_SIZE, Row
from .timing import Spread

if TYPE_CHECKING:
    from rich.table import Table

FAILED = 3.0  # torch.compile this much slower than its own input has failed
LARGE = 10.0  # a ratio that needs a word
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


def failed_compile(row: Row) -> bool:
    """Whether torch.compile made code that is far slower than the eager code it was given. A ratio to that says nothing
    about ours, and no median counts it."""
    if COMPILE not in row.times or REFERENCE not in row.times:
        return False
    return row.times[COMPILE].median > FAILED * row.times[REFERENCE].median


def outlier(row: Row) -> str | None:
    """Which peer is slow, where a ratio is larger than a good kernel explains."""
    if failed_compile(row):
        slower = row.times[COMPILE].median / row.times[REFERENCE].median
        return f"torch.compile made code {slower:.0f} x slower than the eager reference; not in the median"
    plain = row.ratios.get(REFERENCE)
    if plain is not None and plain.median > LARGE:
        share = row.ceiling_seconds / row.times[REFERENCE].median
        return (
            f"{plain.median:.0f} x because the reference is slow: eager, a call of torch for each step of the "
            f"formula, {share:.1%} of the ceiling (ours {row.attained:.0%})"
        )
    return None


def remarks(document: dict[str, Any]) -> list[str]:
    """What needs words: what was left out, notes, outliers, reasons of missing backends, other backends' times."""
    out: dict[str, None] = {f"Left out: {line}.": None for line in document.get("left_out", ())}
    for row in document["rows"]:
        where = f"{row.op}, {row.sample}, {row.dtype}, {row.direction}"
        for note in (*row.notes, outlier(row)):
            if note is not None:
                out[f"{where}: {note}"] = None
        if row.backend == "reference":
            why = "; ".join(f"{name}: {reason}" for name, reason in row.reasons.items()) or "no kernel for this device"
            out[f"{row.op}, {row.sample}, {row.dtype} runs the reference ({why})"] = None
        for name, spread in list(row.times.items())[1:]:
            if name.startswith("ours "):
                out[f"{where}: backend {name[5:]} takes {spread.median * 1e3:.3g} ms"] = None
    return list(out)


@dataclass(frozen=True)
class Middle:
    """One op, dtype and direction over its shapes: the median ratio to each peer and how many shapes are behind it
    (None and 0 where there are none)."""

    op: str
    dtype: str
    direction: str
    ratios: dict[str, float | None]
    shapes: dict[str, int]

    def text(self, peer: str) -> str:
        found, count = self.ratios[peer], self.shapes[peer]
        return "" if found is None else f"{found:.2f} ({count} shape{'s' if count > 1 else ''})"


def summary(rows: Sequence[Row]) -> list[Middle]:
    """Medians over an op's shapes; shapes on which torch.compile failed (`failed_compile`) are not in its median."""
    lines: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        lines.setdefault((row.op, row.direction, row.dtype), []).append(row)
    out = []
    for (op, direction, dtype), found in lines.items():
        kept = {
            peer: [
                row.ratios[peer].median
                for row in found
                if peer in row.ratios and not (peer == COMPILE and failed_compile(row))
            ]
            for peer in (REFERENCE, COMPILE)
        }
        middle = {peer: statistics.median(ratios) if ratios else None for peer, ratios in kept.items()}
        out.append(Middle(op, dtype, direction, middle, {peer: len(ratios) for peer, ratios in kept.items()}))
    return out


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
    out += ["", "Medians over an op's shapes, and over how many:", ""]
    out += ["| op | dtype | direction | x reference | x torch.compile |", "|---|---|---|---|---|"]
    for line in summary(rows):
        texts = line.text(REFERENCE), line.text(COMPILE)
        out.append(f"| {line.op} | {line.dtype} | {line.direction} | {' | '.join(texts)} |")
    for op in dict.fromkeys(row.op for row in rows):
        head = ("shape", *COLUMNS[1:])
        out += ["", f"### {op}", "", f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
        out += [f"| {' | '.join(_escape(cell) for cell in cells(row))} |" for row in rows if row.op == op]
    said = remarks(document)
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
