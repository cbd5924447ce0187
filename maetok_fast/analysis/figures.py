# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""The pictures of a comparison: curves and dots by matplotlib, rows of images by PIL. Each is one PNG, written whole.

A tokenizer has the same colour and mark in all of them, by its place among the entries: Okabe and Ito's colours, which
colour-blind readers can tell apart, without their yellow. Classes have Petroff's ten (arXiv 2107.02270) and their names
stand in the picture.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from maetok_fast.analysis.neighbours import KS
from maetok_fast.analysis.traversal import Strip
from maetok_fast.pipeline.run import save_png, written

__all__ = [
    "draw_correlations",
    "draw_embeddings",
    "draw_influence",
    "draw_mixtures",
    "draw_overview",
    "draw_probes",
    "draw_usage",
    "sheet",
]

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000")
MARKS = "osD^vPX"
CLASSES = (
    "#3f90da", "#ffa90e", "#bd1f01", "#94a4a2", "#832db6", "#a96b59", "#e76300", "#b9ac70", "#717581", "#92dadd",
)  # fmt: skip
SAME, OTHER = "#0072b2", "#e69f00"  # frames of neighbours
DPI = 120
Values = dict[str, dict[str, Any]]  # of each tokenizer, by name, in the entries' order


def style(place: int) -> dict[str, Any]:
    """Of the tokenizer at this place."""
    return {"color": COLOURS[place % len(COLOURS)], "marker": MARKS[place % len(MARKS)]}


def _figure(width: float, height: float, rows: int = 1, columns: int = 1, **more: Any) -> tuple[Any, np.ndarray]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, np.asarray(figure.subplots(rows, columns, squeeze=False, **more))


def _plain(axes: Any, title: str, x: str, y: str, grid: bool = True) -> None:
    axes.set_title(title, fontsize=11, loc="left")
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.spines[["top", "right"]].set_visible(False)
    if grid:
        axes.grid(alpha=0.3)
    axes.set_axisbelow(True)


def _save(figure: Any, path: Path) -> None:
    written(path, lambda p: figure.savefig(p, format="png", dpi=DPI))


# ---- curves and dots -----------------------------------------------------------------------------------------------


def _mixtures(axes: Any, found: Values) -> None:
    for place, (name, one) in enumerate(found.items()):
        x = [point["modes"] for point in one["curve"]]
        y = [point["held_out"]["mean"] for point in one["curve"]]
        error = [point["held_out"]["error"] or 0 for point in one["curve"]]
        axes.errorbar(x, y, error, label=name, capsize=3, markersize=5, **style(place))
    ticks = sorted({point["modes"] for one in found.values() for point in one["curve"]})
    axes.set_xscale("log")
    axes.set_xticks(ticks, [str(t) for t in ticks])
    axes.minorticks_off()
    k = next(iter(found.values()))["components"]
    _plain(axes, f"Gaussian mixtures of {k} components", "modes", "held-out NLL, nats per dimension")


def draw_mixtures(path: Path, found: Values) -> None:
    """NLL against modes, one line a tokenizer, bars of one standard error."""
    figure, axes = _figure(7.2, 4.2)
    _mixtures(axes[0, 0], found)
    axes[0, 0].legend(frameon=False)
    _save(figure, path)


def _dots(axes: Any, found: Values, rows: Sequence[tuple[str, str]], title: str, x: str) -> None:
    """rows: (label, key); found[name][key] = {"mean", "error_all"} or a number. Tokenizers a bit apart in each row."""
    count = len(found)
    for place, (name, one) in enumerate(found.items()):
        for r, (_, key) in enumerate(rows):
            value = one.get(key)
            if value is None:
                continue
            mean, error = (value["mean"], value["error_all"]) if isinstance(value, dict) else (value, 0)
            y = r + (place - (count - 1) / 2) * 0.8 / max(count, 2)
            label = name if r == 0 else None
            axes.errorbar(100 * mean, y, xerr=100 * error, capsize=3, linestyle="", label=label, **style(place))
            text = {"textcoords": "offset points", "ha": "center", "va": "bottom", "fontsize": 8}
            axes.annotate(f"{100 * mean:.1f}", (100 * mean, y), (0, 5), **text)
    axes.set_yticks(range(len(rows)), [label for label, _ in rows])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.margins(x=0.15)
    _plain(axes, title, x, "")


def _probes(axes: Any, found: Values) -> None:
    rows = [("pooled", "pooled"), ("flattened", "flattened")]
    _dots(axes, found, rows, "Linear probe", "top-1 on held-out rows, %")


def _agreements(axes: Any, found: Values) -> None:
    values = {
        name: {k: {"mean": v, "error_all": one["agreement_error"][k]} for k, v in one.get("agreement", {}).items()}
        for name, one in found.items()
    }
    rows = [(f"@{k}", str(k)) for k in KS]
    _dots(axes, values, rows, "Nearest neighbours of the same class", "% of the k nearest training rows")


def draw_probes(path: Path, found: Values) -> None:
    """Top-1 of both probes, and of the flattened one against the number of labels."""
    figure, axes = _figure(10, 3.6 + 0.3 * max(0, len(found) - 3), 1, 2)
    _probes(axes[0, 0], found)
    right = axes[0, 1]
    for place, (name, one) in enumerate(found.items()):
        points = [(f["rows"], f["mean"], f["error_all"]) for f in (*one["fractions"], one["flattened"])]
        x, y, error = zip(*points)
        right.errorbar(x, [100 * v for v in y], [100 * e for e in error], label=name, capsize=3, **style(place))
    right.set_xscale("log")
    ticks = sorted({f["rows"] for one in found.values() for f in (*one["fractions"], one["flattened"])})
    right.set_xticks(ticks, [f"{t:,}" for t in ticks])
    right.minorticks_off()
    _plain(right, "With fewer labels (flattened)", "labelled training rows", "top-1 on held-out rows, %")
    right.legend(frameon=False)
    _save(figure, path)


def draw_usage(path: Path, found: Values) -> None:
    """Shares and ranks of tokens, each sorted, one line a tokenizer."""
    figure, axes = _figure(10, 3.6, 1, 2)
    sides = (
        ("share", "Variance of tokens, sorted", "variance, 1 = an equal share"),
        ("rank", "Effective rank of tokens, sorted", "dimensions"),
    )
    for panel, (key, title, y) in zip(axes[0], sides):
        for place, (name, one) in enumerate(found.items()):
            values = np.sort(np.asarray(one[key]))[::-1] * (len(one[key]) if key == "share" else 1)
            every = max(1, len(values) // 12)
            x = np.arange(1, len(values) + 1)
            panel.plot(x, values, label=name, markersize=4, markevery=every, **style(place))
        panel.xaxis.get_major_locator().set_params(integer=True)
        panel.set_ylim(bottom=0)
        _plain(panel, title, "tokens", y)
    axes[0, 0].legend(frameon=False)
    _save(figure, path)


def draw_correlations(path: Path, found: Values) -> None:
    """What every two tokens share, a panel for each tokenizer."""
    columns = min(4, len(found))
    rows = -(-len(found) // columns)
    figure, axes = _figure(3.2 * columns + 1, 3.3 * rows, rows, columns)
    for panel, (name, one) in zip(axes.flat, found.items()):
        image = panel.imshow(np.asarray(one["correlation"]), vmin=0, vmax=1, interpolation="nearest")
        _plain(panel, name, "token", "token", grid=False)
    for panel in list(axes.flat)[len(found) :]:
        panel.set_visible(False)
    figure.colorbar(image, ax=list(axes.flat), label="RV coefficient of two tokens", shrink=0.8)
    _save(figure, path)


def draw_influence(path: Path, maps: np.ndarray, title: str) -> None:
    """maps (L, H, W) of `token_influence`: a tile for each token, one scale of colours for all."""
    count = len(maps)
    columns = min(count, max(4, int(np.ceil(np.sqrt(count * 1.8)))))
    rows = -(-count // columns)
    figure, axes = _figure(1.0 * columns + 1.2, 1.0 * rows + 0.8, rows, columns)
    top = float(np.sqrt(maps.max())) or 1.0
    image = None
    for t, one in enumerate(axes.flat):
        one.set_axis_off()
        if t < count:
            # the root, an amplitude: squares leave only the largest tile to be seen
            image = one.imshow(np.sqrt(maps[t]), cmap="magma", vmin=0, vmax=top)
            one.set_title(str(t), fontsize=8, pad=2)
    figure.colorbar(image, ax=list(axes.flat), label="root mean squared change, pixels in [0, 1]", shrink=0.9)
    figure.suptitle(title, fontsize=11)
    _save(figure, path)


def draw_embeddings(
    path: Path,
    points: dict[str, np.ndarray],
    labels: np.ndarray | None,
    chosen: np.ndarray,
    names: Sequence[str],
    methods: Sequence[str],
) -> None:
    """Panels of points (n, 2), one a tokenizer, of classes `labels` (n,): the chosen ones (at most ten) in colours and
    with their names, the others grey. names: of classes, by number. methods: of each panel."""
    columns = min(3, len(points))
    rows = -(-len(points) // columns)
    figure, axes = _figure(5 * columns, 5 * rows + (0.6 if labels is not None else 0), rows, columns)
    for panel, (name, where), method in zip(axes.flat, points.items(), methods):
        if labels is None:
            panel.scatter(*where.T, s=5, color=SAME, linewidths=0)
        else:
            panel.scatter(*where[~np.isin(labels, chosen)].T, s=4, color="#d5d5d5", linewidths=0)
        here = {} if labels is None else {c: where[labels == c] for c in chosen.tolist()}
        for colour, (c, some) in zip(CLASSES, here.items()):
            panel.scatter(*some.T, s=7, color=colour, label=_class(c, names), linewidths=0, alpha=0.8)
        for c, some in here.items():
            if len(some):
                above = {"textcoords": "offset points", "ha": "center", "va": "bottom", "fontsize": 8}
                text = panel.annotate(_class(c, names), _densest(some), (0, 4), **above)
                text.set_bbox({"boxstyle": "round,pad=0.1", "facecolor": "white", "alpha": 0.7, "edgecolor": "none"})
        panel.set_xticks([])
        panel.set_yticks([])
        _plain(panel, f"{name} ({method})", f"{method} 1, no unit", f"{method} 2, no unit", grid=False)
    for panel in list(axes.flat)[len(points) :]:
        panel.set_visible(False)
    if labels is not None:
        handles, texts = axes.flat[0].get_legend_handles_labels()
        figure.legend(handles, texts, loc="outside lower center", ncols=5, frameon=False, markerscale=2)
    _save(figure, path)


def _class(c: int, names: Sequence[str]) -> str:
    return names[c] if c < len(names) else str(c)


def _densest(points: np.ndarray) -> np.ndarray:
    """Of points (n, 2) the one whose tenth neighbour is nearest: a name there stands among its own class."""
    apart = np.square(points[:, None] - points[None]).sum(-1)
    k = min(10, len(points) - 1)
    return np.asarray(points[np.partition(apart, k, axis=1)[:, k].argmin()])


def _measured(name: str, parts: dict[str, Values]) -> bool:
    found = parts.get(name, {})
    return any("agreement" in one for one in found.values()) if name == "neighbours" else bool(found)


def draw_overview(path: Path, parts: dict[str, Values]) -> bool:
    """The measured parts side by side. False, and no picture, where there is none of them."""
    panels = [name for name in ("gmm", "probe", "neighbours", "usage") if _measured(name, parts)]
    if not panels:
        return False
    columns = min(2, len(panels))
    rows = -(-len(panels) // columns)
    count = max(len(parts[name]) for name in panels)
    figure, axes = _figure(5.2 * columns, (3.9 + 0.45 * max(0, count - 3)) * rows, rows, columns)
    for panel, name in zip(axes.flat, panels):
        found = parts[name]
        if name == "gmm":
            _mixtures(panel, found)
        elif name == "probe":
            _probes(panel, found)
        elif name == "neighbours":
            _agreements(panel, found)
        else:
            values = {
                n: {"tokens": one["effective_tokens"] / len(one["share"]), "rank": one["effective_rank"] / one["dims"]}
                for n, one in found.items()
            }
            _dots(panel, values, [("tokens", "tokens"), ("dimensions", "rank")], "In use: effective / all", "%")
    for panel in list(axes.flat)[len(panels) :]:
        panel.set_visible(False)
    axes.flat[0].legend(frameon=False)
    _save(figure, path)
    return True


# ---- rows of images ------------------------------------------------------------------------------------------------


def sheet(path: Path, strips: Sequence[Strip], side: int = 96) -> None:
    """Rows of images with their titles before and captions above them, each about `side` pixels wide: small ones
    enlarged by whole numbers, large ones shrunk. A frame has its strip's colour."""
    from PIL import Image, ImageDraw, ImageFont

    font, small = ImageFont.load_default(13), ImageFont.load_default(11)
    height, width = strips[0].images.shape[1:3]
    scale = max(1, side // max(height, width))
    if max(height, width) > 2 * side:
        height, width = (max(1, round(v * side / max(height, width))) for v in (height, width))
    height, width = scale * height, scale * width
    left = round(max(font.getlength(line) for strip in strips for line in strip.title.split("\n"))) + 20
    bars = [16 if any(strip.captions) else 2 for strip in strips]
    gap = 6
    across = left + max(len(s.images) for s in strips) * (width + gap) + gap
    whole = Image.new("RGB", (across, gap + sum(height + bar + gap for bar in bars)), "white")
    draw = ImageDraw.Draw(whole)
    top = gap
    for strip, bar in zip(strips, bars):
        lines = strip.title.count("\n") + 1
        draw.multiline_text((gap, top + bar + height // 2 - 8 * lines), strip.title, fill="#1c2126", font=font)
        for c, image in enumerate(strip.images):
            x = left + c * (width + gap)
            filter_ = Image.Resampling.NEAREST if width >= image.shape[1] else Image.Resampling.LANCZOS
            whole.paste(Image.fromarray(image).resize((width, height), filter_), (x, top + bar))
            draw.text((x + width // 2, top + bar - 3), strip.captions[c], fill="#5c6770", font=small, anchor="ms")
            if strip.frames is not None and strip.frames[c] is not None:
                box = (x - 2, top + bar - 2, x + width + 1, top + bar + height + 1)
                draw.rectangle(box, outline=strip.frames[c], width=2)
        top += height + bar + gap
    picture = np.asarray(whole)
    written(path, lambda p: save_png(picture, p))
