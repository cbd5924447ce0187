# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""The chart of a run: a dot for every rate and every factor, on log axes.

Dots, not bars: a log axis has no zero, so a bar's length would say only where its axis happens to begin. Filled dots
were measured in the run, hollow ones computed from measured parts, diamonds are cited; a factor below 1 is a loss and
has the colour of losses. The product has a dot only over its measured factors; with others in it, it is a line of text.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks._claims import CITED, COMPUTED, MEASURED, SMALL, Claim, Factor
from benchmarks._report import SIGNS, Row, number

COLOURS = {"public": "#6b7785", "compiled": "#3f7cac", "ours": "#c8324a"}
GAIN, LOSS, NEUTRAL = "#2e7d5b", "#c25a12", "#6b7785"


def colour(factor: Factor) -> str:
    """Green only for what was gained here: a loss has a colour of its own, what is of elsewhere has none."""
    if factor.mark in (SMALL, CITED):
        return NEUTRAL
    return GAIN if factor.ratio >= 1 else LOSS


def chart(path: Path, rows: Sequence[Row], claims: Sequence[Claim], title: str, subtitle: str) -> None:
    """Rates of every row above, the claims' factors below; written as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(16, 9.5), layout="constrained")
    FigureCanvasAgg(figure)
    top, bottom, foot = figure.subfigures(3, 1, height_ratios=[10, 10, 1])
    top.suptitle(f"{title}\n{subtitle}", fontsize=13)
    left, middle, right = top.subplots(1, 3)
    _rates(left, rows, ["sample"], "Sampling, guided")
    _rates(middle, rows, ["train"], "Training")
    _rates(right, rows, ["encode", "decode"], "Tokenizer")
    if claims:
        for axes, claim in zip(bottom.subplots(1, len(claims), squeeze=False)[0], claims, strict=True):
            _factors(axes, claim)
    else:
        bottom.text(0.5, 0.5, "The factors of the claims were not measured in this run.", ha="center", fontsize=11)
    foot.text(
        0.5,
        0.4,
        "filled: measured in this run     hollow, †: computed from measured parts     diamond, ‡: cited, "
        "§: of small images, docs/claims.md     orange: a loss",
        ha="center",
        fontsize=10,
        color="#444444",
    )
    figure.savefig(path, dpi=100)


def _dot(axes: Any, x: float, y: int, colour_: str, mark: str) -> None:
    face = colour_ if mark == MEASURED else "white"
    axes.plot(x, y, "D" if mark in (SMALL, CITED) else "o", ms=9, mec=colour_, mfc=face, mew=1.8, clip_on=False)


def _lines(axes: Any, labels: Sequence[str], values: Sequence[float]) -> None:
    """One line for each dot, a log axis with room for the numbers, and ticks that are plain numbers."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.set_yticks(range(len(labels)), labels, fontsize=9)
    axes.set_ylim(len(labels) - 0.4, -0.6)
    axes.set_xscale("log")
    span = max(max(values) / min(values), 4.0)
    axes.set_xlim(min(values) / span**0.12, max(values) * span**0.4)
    few = math.log10(span) < 1.3
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if few else (1,)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.grid(axis="y", color="#e3e6ea", linewidth=1)
    axes.grid(axis="x", color="#f0f2f4", linewidth=1)
    axes.set_axisbelow(True)
    axes.tick_params(axis="y", length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)


def _rates(axes: Any, rows: Sequence[Row], names: Sequence[str], title: str) -> None:
    dots = [(row, name) for row in rows for name in names if name in row.values]
    axes.set_title(title, fontsize=11)
    if not dots:
        axes.set_axis_off()
        axes.text(0.5, 0.5, "not measured in this run", ha="center", transform=axes.transAxes)
        return
    labels = [row.label + (f": {name}" if len(names) > 1 else "") for row, name in dots]
    _lines(axes, labels, [row.values[name].value for row, name in dots])
    axes.set_xlabel("images/s (log scale)")
    for i, (row, name) in enumerate(dots):
        value = row.values[name]
        _dot(axes, value.value, i, COLOURS[row.style], value.mark)
        axes.annotate(value.text(), (value.value, i), (9, 0), textcoords="offset points", va="center", fontsize=9)


def _factors(axes: Any, claim: Claim) -> None:
    """One dot a factor beside the line of no change, and the product of the measured ones."""
    dots = [(factor, factor.name) for factor in claim.factors]
    measured = [factor for factor in claim.factors if factor.mark == MEASURED]
    if len(measured) > 1:
        dots.append((Factor("", math.prod(f.ratio for f in measured), MEASURED), "product of the measured"))
    _lines(axes, [f"{name}\n({factor.mark})" for factor, name in dots], [1.0, *(factor.ratio for factor, _ in dots)])
    axes.axvline(1.0, color="#999999", linewidth=1)
    for i, (factor, _) in enumerate(dots):
        _dot(axes, factor.ratio, i, colour(factor), factor.mark)
        text = f"{number(factor.ratio)}x{SIGNS[factor.mark]}"
        axes.annotate(text, (factor.ratio, i), (10, 0), textcoords="offset points", va="center", fontsize=10)
    axes.set_title(claim.title, fontsize=11)
    axes.set_xlabel("\n".join(["times the rate before (log scale)", *_beside(claim)]), fontsize=9)


def _beside(claim: Claim) -> list[str]:
    """What is not wholly measured here, in small text: the product with such factors in it, and the paper's number."""
    out = []
    signs = "".join(SIGNS[mark] for mark in (COMPUTED, SMALL, CITED) if any(f.mark == mark for f in claim.factors))
    if signs:
        out.append(f"all factors together: {number(claim.ratio)}x{signs} ({claim.mark})")
    cited = next((line.ratio for line in claim.context if line.mark == CITED), None)
    if cited is not None:
        out.append(f"the paper's claim: {number(cited)}x‡")
    return out
