# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""What a demo leaves to look at: demo.json, demo.html and the pictures on it.

    samples.png           a row a class, labelled
    reconstructions.png   test images above, their reconstructions below
    curves.png            of the three trainings (with matplotlib)
    demo.html             all of it in one file that needs no other and no network

Every file is written whole or not at all, the page last.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from maetok_fast._optional import probe
from maetok_fast.pipeline.run import save_png, write_json, write_text, written
from maetok_fast.training.observe import _duration, read_log
from maetok_fast.training.report import _STYLE, _text

__all__ = ["Shown", "sheet", "write_page"]

SCALE, GAP, HEIGHT = 2, 4, 16  # pixels of the sheet for one of an image; between images; of the text
_WHAT = {
    "tokenizer": "stage 1: a small MAETok learns to show masked images whole, and their HOG features",
    "decoder": "stage 2: its decoder alone, the encoder frozen, fewer and fewer patches masked",
    "latents": "every training image encoded once, as it is (not mirrored)",
    "generator": "a small SiT learns the latents' velocities, of each class",
    "samples": "noise becomes latents, the tokenizer's decoder makes pictures of them",
    "classifier": "a small convolutional network learns the classes of real images",
    "score": "it judges the samples; PSNR of the averaged stage-2 tokenizer on the test images",
}


class Shown(NamedTuple):
    """samples: for each class (n, H, W, 3) uint8, names: the classes'; originals, results: (N, H, W, 3) uint8."""

    samples: Sequence[np.ndarray]
    names: Sequence[str]
    originals: np.ndarray
    results: np.ndarray


def write_page(out: Path, found: dict[str, Any], shown: Shown, commands: Sequence[str]) -> Path:
    """Writes demo.json (`found`), the pictures and the page into `out`; returns the page's path."""
    save_sheet(out / "samples.png", shown.samples, shown.names)
    save_sheet(out / "reconstructions.png", [shown.originals, shown.results], ["test images", "reconstructed"])
    why = _curves(out)
    write_json(out / "demo.json", found)
    parts = [_head(found), _samples(out, found), _pictures(out, found, why), _parts(found), _about(found, commands)]
    page = (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>maetok-fast demo</title><style>{_STYLE}</style></head>\n<body>\n"
        + "\n".join(parts)
        + "\n</body></html>\n"
    )
    write_text(out / "demo.html", page)
    return out / "demo.html"


# ---- pictures ------------------------------------------------------------------------------------------------------


def sheet(rows: Sequence[np.ndarray], names: Sequence[str]) -> np.ndarray:
    """Rows of images (n, H, W, 3) uint8, each pixel SCALE wide, with their names before them: (height, width, 3)."""
    from PIL import Image, ImageDraw, ImageFont

    font = ImageFont.load_default(HEIGHT - 2)
    left = max((round(font.getlength(name)) for name in names), default=0) + 3 * GAP
    height, width = (SCALE * side for side in rows[0].shape[1:3])
    size = left + max(map(len, rows)) * (width + GAP), GAP + len(rows) * (height + GAP)
    whole = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(whole)
    for r, (images, name) in enumerate(zip(rows, names)):
        top = GAP + r * (height + GAP)
        draw.text((GAP, top + (height - HEIGHT) // 2), name, fill="black", font=font)
        for c, image in enumerate(images):
            large = Image.fromarray(image).resize((width, height), Image.Resampling.NEAREST)
            whole.paste(large, (left + c * (width + GAP), top))
    return np.asarray(whole)


def save_sheet(path: Path, rows: Sequence[np.ndarray], names: Sequence[str]) -> None:
    picture = sheet(rows, names)
    written(path, lambda p: save_png(picture, p))


def _curves(out: Path) -> str:
    """curves.png; "", or why there are none."""
    status = probe("matplotlib")
    if status.state != "found":
        return status.reason
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = [
        ("PSNR of test images, dB", "validation/psnr", ("tokenizer", "decoder")),
        ("squared error of masked images", "reconstruction", ("tokenizer", "decoder")),
        ("squared error of velocities", "velocity", ("generator",)),
    ]
    figure = Figure(figsize=(11, 2.8), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (title, name, runs) in zip(figure.subplots(1, len(panels)), panels):
        for run in runs:
            points = [(line["step"], line[name]) for line in read_log(out / run / "log.jsonl") if name in line]
            axes.plot(*zip(*points) if points else ((), ()), label=run, marker="." if len(points) < 20 else None)
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("step")
        axes.set_yscale("linear" if "PSNR" in title else "log")
        axes.grid(alpha=0.4)
        axes.spines[:].set_visible(False)
        if len(runs) > 1:
            axes.legend(frameon=False)
    written(out / "curves.png", lambda p: figure.savefig(p, format="png", dpi=110))
    return ""


def _image(path: Path, alt: str) -> str:
    content = base64.b64encode(path.read_bytes()).decode("ascii")
    return f'<div class="wide"><img alt="{_text(alt)}" src="data:image/png;base64,{content}"></div>'


# ---- words ---------------------------------------------------------------------------------------------------------


def _head(found: dict[str, Any]) -> str:
    machine, goals = found.get("machine", {}), found["goals"]
    tiles = [
        (f"of {found['samples']:,} samples recognised as the class asked for", f"{found['recognised']:.1%}"),
        ("of real test images recognised", f"{found['classifier']['test_accuracy']:.1%}"),
        (f"PSNR, {found['test_images']:,} test images", f"{found['psnr']:.2f} dB"),
        ("all parts", _duration(found["seconds_total"])),
        ("evaluations a sample (NFE)", str(found["nfe"])),
    ]
    cells = "".join(f"<div><b>{_text(value)}</b><span>{_text(title)}</span></div>" for title, value in tiles)
    where = machine.get("gpu") or f"{machine.get('cores', '?')} cores of {machine.get('cpu', 'an unknown processor')}"
    said = f"{found['data']}, {len(found['classes'])} classes; {where}, torch {machine.get('torch', '?')}"
    lines = ["<h1>maetok-fast demo</h1>", f'<p class="soft">{_text(said)}</p>', f'<div class="tiles">{cells}</div>']
    if found["quick"]:
        lines.append(
            "<p>The quick form: a handful of steps each, so that neither pictures nor numbers show anything.</p>"
        )
    else:
        lines.append(
            f'<p class="soft">What it is held to on Fashion-MNIST and two cores: {goals["minutes"]:g} min, '
            f"{goals['recognised']:.0%} recognised, {goals['psnr']:g} dB.</p>"
        )
    return "\n".join(lines)


def _samples(out: Path, found: dict[str, Any]) -> str:
    rows = "".join(f"<tr><td>{_text(c)}<td>{v:.1%}</tr>" for c, v in found["recognised_per_class"].items())
    return "\n".join(
        [
            "<h2>Samples</h2>",
            f'<p class="soft">The first of each class, none picked; Euler, {found["settings"]["samples"]["steps"]} '
            f"steps, guidance {found['guidance']:g}.</p>",
            _image(out / "samples.png", "samples, a row a class"),
            f"<details open><summary>Recognised, by class</summary><table>{rows}</table></details>",
            f"<p>Within a class samples differ {found['spread']:.2f} times as much as real images do.</p>",
        ]
    )


def _pictures(out: Path, found: dict[str, Any], why: str) -> str:
    lines = [
        "<h2>Reconstructions</h2>",
        f"<p>Of the test images' reconstructions {found['classifier']['reconstructions']:.1%} are recognised. Guided "
        "samples are more typical of their class than real images, and may be recognised more often.</p>",
        _image(out / "reconstructions.png", "test images above, reconstructions below"),
        "<h2>Training</h2>",
    ]
    if why:
        return "\n".join([*lines, f"<p>No curves: matplotlib is not here ({_text(why)}).</p>"])
    links = ", ".join(f'<a href="{name}/report.html">{name}</a>' for name in ("tokenizer", "decoder", "generator"))
    return "\n".join([*lines, _image(out / "curves.png", "curves"), f'<p class="soft">All of it: {links}.</p>'])


def _parts(found: dict[str, Any]) -> str:
    rows = "".join(
        f"<tr><td>{name}<td>{seconds:.1f} s<td class=text>{_WHAT[name]}</tr>"
        for name, seconds in found["seconds"].items()
    )
    lost = found["killed_starts"]
    more = f"<p>{lost} start(s) were killed, whose time nobody knows.</p>" if lost else ""
    return f'<h2>How it was made</h2>\n<div class="wide"><table>{rows}</table></div>{more}'


def _about(found: dict[str, Any], commands: Sequence[str]) -> str:
    lines = ["<h2>By hand</h2>", f"<pre>{_text(chr(10).join(commands))}</pre>"]
    for name in ("settings", "versions", "machine"):
        text = json.dumps(found.get(name, {}), indent=1, ensure_ascii=False)
        lines.append(f"<details><summary>{name.capitalize()}</summary><pre>{_text(text)}</pre></details>")
    return "\n".join(lines)
