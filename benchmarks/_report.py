# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""What a run leaves behind: the printed table, the contact sheet and the JSON file (the chart: _chart.py).

Marks: a bare number was measured in this run; † was computed from measured parts or counts; § was measured on small
images by `maetok-fast demo claims`; ‡ is cited.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks._claims import CITED, COMPUTED, MEASURED, SMALL, Claim, Factor

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

SIGNS = {MEASURED: "", COMPUTED: "†", SMALL: "§", CITED: "‡"}


@dataclass(frozen=True)
class Value:
    """A number, its unit and how it is known; `samples` timed calls behind it, `batch` images in each."""

    value: float
    unit: str
    mark: str = MEASURED
    samples: int | None = None
    batch: int | None = None
    note: str = ""

    def text(self) -> str:
        return f"{number(self.value)}{SIGNS[self.mark]}"


@dataclass
class Row:
    """One configuration and what is known of it, by column name."""

    key: str
    label: str
    tokens: int
    dtype: str
    style: str  # public | compiled | ours
    values: dict[str, Value] = field(default_factory=dict)

    def get(self, name: str) -> float | None:
        value = self.values.get(name)
        return None if value is None else value.value


# column -> heading; the values' units are in the headings
COLUMNS = {
    "gflops": "GFLOPs\n/img",
    "step": "guided step\nms/img",
    "gemm": "GEMM\nrate %",
    "sample": "sample\nimg/s",
    "train": "train\nimg/s",
    "encode": "encode\nimg/s",
    "decode": "decode\nimg/s",
    "memory_sample": "GB to\nsample",
    "memory_train": "GB to\ntrain",
}


def number(value: float) -> str:
    """Three significant digits without exponents, two below 0.01."""
    if value == 0 or abs(value) >= 100:
        return f"{value:,.0f}"
    digits = (2 if abs(value) >= 0.01 else 1) - int(np.floor(np.log10(abs(value))))
    return f"{value:.{digits}f}"


def results_table(rows: Sequence[Row], title: str) -> Table:
    """The rows as a rich table; an absent value is a dash."""
    from rich.table import Table

    table = Table(title=title, title_justify="left", title_style="bold", show_lines=False)
    table.add_column("configuration", no_wrap=True)
    for heading in COLUMNS.values():
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        cells = [row.values[name].text() if name in row.values else "–" for name in COLUMNS]
        table.add_row(row.label, *cells, style="bold" if row.style == "ours" else "")
    return table


def claim_table(claim: Claim) -> Table:
    """One claim, factor by factor, then the product and the lines beside it."""
    from rich.table import Table

    table = Table(title=claim.title, title_justify="left", title_style="bold")
    table.add_column("factor", no_wrap=True)
    table.add_column("ratio", justify="right", no_wrap=True)
    table.add_column("known by", no_wrap=True)
    table.add_column("what it compares")

    def add(factor: Factor, style: str = "") -> None:
        table.add_row(factor.name, f"{number(factor.ratio)}x", factor.mark, factor.note, style=style)

    for factor in claim.factors:
        add(factor)
    table.add_row("= product", f"{number(claim.ratio)}x", claim.mark, "", style="bold", end_section=True)
    for factor in claim.context:
        add(factor, "dim")
    return table


def print_report(console: Console, rows: Sequence[Row], claims: Sequence[Claim], title: str, notes: list[str]) -> None:
    console.print(results_table(rows, title))
    for note in notes:
        console.print(f"  {note}", style="dim", highlight=False)
    for claim in claims:
        console.print()
        console.print(claim_table(claim))


def write_json(path: Path, rows: Sequence[Row], claims: Sequence[Claim], **fields: Any) -> None:
    """Everything that was printed and more, with the machine's description."""
    document = {
        "benchmark": "throughput",
        "schema": 1,
        **fields,
        "rows": [asdict(row) for row in rows],
        "claims": [claim.to_json() for claim in claims],
    }
    path.write_text(json.dumps(document, indent=1) + "\n")


def contact_sheet(
    path: Path, originals: np.ndarray, reconstructions: np.ndarray, caption: list[str], *, cell: int = 256
) -> None:
    """Pairs (original | reconstruction), two pairs a line, under a caption. Images (B, H, W, 3) uint8."""
    from PIL import Image, ImageDraw, ImageFont

    gap, line, per_line = 12, 26, 2
    font = ImageFont.load_default(size=18)
    pairs = len(originals)
    columns = min(per_line, pairs)
    lines = -(-pairs // per_line)
    head = gap + line * (len(caption) + 1)
    width = max(columns * (2 * cell + 2 * gap) + gap, 700)
    sheet = Image.new("RGB", (width, head + lines * (cell + gap) + gap), "white")
    draw = ImageDraw.Draw(sheet)
    for i, text in enumerate(caption):
        draw.text((gap, gap + i * line), text, fill="black", font=font)
    for i, pair in enumerate(zip(originals, reconstructions, strict=True)):
        top = head + (i // per_line) * (cell + gap)
        left = gap + (i % per_line) * (2 * cell + 2 * gap)
        for k, pixels in enumerate(pair):
            image = Image.fromarray(pixels).resize((cell, cell), Image.Resampling.LANCZOS)
            sheet.paste(image, (left + k * cell, top))
        if i < per_line:
            for k, text in enumerate(("original", "reconstruction")):
                draw.text((left + k * cell, head - line), text, fill="#555555", font=font)
    sheet.save(path)
