# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""A run on one page: report.html, which needs no network and no other file.

    log.jsonl ── read_log ── curves (matplotlib, SVG in the page)         config.yaml, environment.json ── folded text
    samples/*.png ── eight of them over time, the last one large          checkpoints/ ── table, and how to use the last

Written at the end of a run, and from whatever there is of one that still goes on or was killed: a file that is missing
or damaged leaves its part out. The page is dark where the reader's system is; curves take their colours from its style
sheet. All text that comes from a file is escaped.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import html
import io
import json
import logging
import math
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from maetok_fast._optional import probe
from maetok_fast.pipeline.run import written
from maetok_fast.training.observe import _duration, _short, read_log
from maetok_fast.training.online import crossings

__all__ = ["write_report"]

log = logging.getLogger("maetok_fast")

PICTURES = 8
DOTS, POINTS = 150, 300  # of a curve at most: raw values, and points of the smoothed line
LOG_STEPS = 100  # the last step over the first from which losses have a logarithmic axis of steps
SMALL = 720  # pixels in width of an earlier picture
_SPEEDS = ("images_per_second", "images_per_second_per_device", "mfu", "data_wait")
# matplotlib draws in these, the page puts its style sheet's variables in their place
_INK, _GRID, _COLOURS = "#010203", "#040506", ("#0a0b0c", "#0d0e0f")
_VARIABLES = {_INK: "var(--soft)", _GRID: "var(--line)", _COLOURS[0]: "var(--one)", _COLOURS[1]: "var(--two)"}

_STYLE = """
:root { color-scheme: light dark; --paper: #fff; --ink: #1c2126; --soft: #5c6770; --line: #dde1e5; --card: #f5f6f8;
  --one: #1f6fb2; --two: #c8324a; --bad: #b3261e }
@media (prefers-color-scheme: dark) { :root { --paper: #14171a; --ink: #e4e7ea; --soft: #9aa5ae; --line: #333a41;
  --card: #1d2125; --one: #6cb2ee; --two: #f0788b; --bad: #ff8a80 } }
* { box-sizing: border-box }
body { margin: 0 auto; padding: 1.5rem 1rem 4rem; max-width: 76rem; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif }
h1 { font-size: 1.5rem; margin: 0; overflow-wrap: anywhere } h2 { font-size: 1.15rem; margin: 2.5rem 0 .75rem }
p { margin: .5rem 0 } .soft, figcaption, th { color: var(--soft) } .bad { color: var(--bad) }
.tiles { display: grid; grid-template-columns: repeat(auto-fill, minmax(8rem, 1fr)); gap: .6rem; margin: 1.25rem 0 }
.tiles div { background: var(--card); border-radius: .4rem; padding: .6rem .8rem }
.tiles b { display: block; font-size: 1.3rem; line-height: 1.3; font-weight: 600 }
.tiles span { font-size: .85rem; color: var(--soft) }
.curves { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 20rem), 1fr)); gap: 1rem 1.5rem }
figure { margin: 0 } figcaption { font-size: .9rem } figcaption b { color: var(--ink); font-weight: 600 }
.curves figcaption i { font-style: normal } .one { color: var(--one) } .two { color: var(--two) }
svg { display: block; width: 100%; height: auto } img { display: block; max-width: none }
.wide { overflow-x: auto; margin: .25rem 0 1.25rem }
.latest img { width: max(100%, 56rem) } .earlier img { width: 45rem }
table { border-collapse: collapse; font-size: .95rem } td, th { text-align: left; padding: .3rem .9rem .3rem 0;
  border-bottom: 1px solid var(--line); vertical-align: top; font-weight: 400; white-space: nowrap }
td.text { white-space: normal } p code { overflow-wrap: anywhere }
pre { background: var(--card); padding: .7rem .9rem; border-radius: .4rem; overflow-x: auto; font-size: .85rem;
  margin: .5rem 0 } code { font-size: .9em } summary { cursor: pointer; margin: .5rem 0 }
"""


def write_report(folder: str | Path) -> Path:
    """Writes <folder>/report.html of the run in `folder`, whole or not at all, and returns its path.

    NotADirectoryError where there is no such folder. Without matplotlib the page has no curves and says so.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise NotADirectoryError(f"{folder}: there is no run here; give the folder that the run's `out` names")
    run = _Run(folder)
    parts = [_head(run), _curves(run), _crossed(run), _pictures(run), _weights(run), _faults(run), _about(run)]
    body = "\n".join(part for part in parts if part)
    page = (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{_text(run.name)}</title><style>{_STYLE}</style></head>\n<body>\n{body}\n</body></html>\n"
    )
    path = folder / "report.html"
    written(path, lambda p: p.write_text(page, encoding="utf-8"))
    return path


class _Run:
    """What the files of a run say."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.name = folder, folder.resolve().name
        self.lines = read_log(folder / "log.jsonl")
        self.config = _read(folder / "config.yaml")
        self.environment = _json_of(folder / "environment.json")
        self.sessions = [line["session"] for line in self.lines if isinstance(line.get("session"), dict)]
        self.step = max((line["step"] for line in self.lines), default=0)
        self.samples = sorted(p for p in (folder / "samples").glob("*.png") if p.stem.isdecimal())
        found = (folder / "checkpoints").glob("[0-9]*")
        self.checkpoints = sorted((p for p in found if p.is_dir() and p.name.isdecimal()), key=lambda p: int(p.name))
        self.best = _json_of(folder / "checkpoints" / "best.json")
        # a generator's run says how it samples
        self.product = "generator" if self.setting("preview") is not None else "tokenizer"

    def setting(self, *keys: str) -> Any:
        """A value of the configuration; None where it is not there."""
        import yaml

        try:
            value = yaml.safe_load(self.config)
            for key in keys:
                value = value[key]
        except (yaml.YAMLError, KeyError, TypeError):
            return None
        return value

    def series(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """(steps, values) of the log's finite numbers of this name, in the order of steps."""
        pairs = [(line["step"], line[name]) for line in self.lines if _is_number(line.get(name))]
        table = np.array(sorted(pairs), dtype=np.float64).reshape(-1, 2)
        return table[:, 0], table[:, 1]

    def last(self, name: str) -> float | None:
        values = self.series(name)[1]
        return float(values[-1]) if len(values) else None

    def names(self) -> list[str]:
        """What the log has curves of, in its order."""
        known = ("step", "time", "session", "skipped_steps", "unreadable")
        names = dict.fromkeys(k for line in self.lines for k in line if k not in known)
        return [name for name in names if len(self.series(name)[1])]


# ---- at a glance ---------------------------------------------------------------------------------------------------


def _head(run: _Run) -> str:
    total = run.setting("loop", "steps")
    tiles = [(f"of {total:,} steps" if isinstance(total, int) else "steps", f"{run.step:,}")]
    if isinstance(batch := run.setting("loop", "batch"), int) and run.step:
        seen = run.step * batch
        tiles.append(("images seen", f"{seen / 1e6:.1f} M" if seen >= 1e6 else f"{seen:,}"))
    if (seconds := max((line["time"] for line in run.lines if _is_number(line.get("time"))), default=0.0)) > 0:
        tiles.append((f"in {len(run.sessions)} sessions" if len(run.sessions) > 1 else "time", _duration(seconds)))
    if len(psnr := run.series("validation/psnr")[1]):
        tiles.append((f"PSNR, best {psnr.max():.2f}", f"{psnr[-1]:.2f} dB"))
    rates = [("images/s", "images_per_second", ""), ("img/s per device", "images_per_second_per_device", "")]
    rates += [("MFU", "mfu", "%"), ("waiting for data", "data_wait", "%")]
    for title, name, percent in rates:
        values = run.series(name)[1]
        if len(values):  # what is usual, not what is last: that one may hold a pause
            tiles.append((title, f"{np.median(values):.1%}" if percent else _short(float(np.median(values)))))
    out = [f"<h1>{_text(run.name)}</h1>"]
    state = "finished" if isinstance(total, int) and run.step >= total else "unfinished"
    if not run.lines:
        state = "nothing is logged yet"
    out.append(f'<p class="soft">{state}; {_text(_machine(run))}</p>' if _machine(run) else f"<p>{state}</p>")
    cells = "".join(f"<div><b>{_text(value)}</b><span>{_text(title)}</span></div>" for title, value in tiles)
    return "\n".join([*out, f'<div class="tiles">{cells}</div>'])


def _machine(run: _Run) -> str:
    machine = run.environment.get("machine")
    if not isinstance(machine, dict):
        return ""
    count = run.environment.get("processes", 1)
    name = machine.get("gpu") or f"{machine.get('cores', '?')} cores of {machine.get('cpu', 'an unknown processor')}"
    return f"{count} x {name}, torch {machine.get('torch', '?')}"


# ---- curves --------------------------------------------------------------------------------------------------------


class _Panel(NamedTuple):
    """One chart: up to two series of one unit. loss: its early steps are worth as much room as its late ones."""

    title: str
    names: tuple[str, ...]
    unit: str = ""
    loss: bool = False

    @property
    def tall(self) -> bool:
        """Whether its values may spread over decades."""
        return self.loss or self.names[0] == "adaptive_weight" or self.names[0].startswith("gradient/")


class _Curve(NamedTuple):
    """What was logged, and the smoothed line."""

    steps: np.ndarray
    values: np.ndarray
    line_steps: np.ndarray
    line: np.ndarray


def _panels(names: Sequence[str]) -> dict[str, list[_Panel]]:
    """Heading -> charts of what the log has."""
    logits = tuple(n for n in ("logits_real", "logits_fake") if n in names)
    quality = [n for n in names if n.startswith("validation/")]
    optimizer = [n for n in names if n.startswith("gradient/") or n in ("learning_rate", "adaptive_weight")]
    losses = [n for n in names if n not in (*_SPEEDS, *logits, *quality, *optimizer)]
    first = [_Panel(_words(n), (n,), "dB" * n.endswith("psnr")) for n in quality]
    first += [_Panel(_words(n), (n,), loss=True) for n in losses]
    first += [_Panel("logits", logits)] if logits else []
    titles = {"images_per_second": "images/s", "mfu": "MFU", "data_wait": "waiting for data"}  # per device: as images/s
    speed = [_Panel(t, (n,), "%" * (n in _SPEEDS[2:])) for n, t in titles.items() if n in names]
    found = {"Losses": first, "Optimizer": [_Panel(_words(n), (n,)) for n in optimizer], "Speed": speed}
    if quality:
        found = {"Quality and losses" if k == "Losses" else k: v for k, v in found.items()}
    return {heading: panels for heading, panels in found.items() if panels}


def _curves(run: _Run) -> str:
    sections = _panels(run.names())
    if not sections:
        return ""
    status = probe("matplotlib")
    if status.state != "found":
        log.info("%s has no curves: %s", run.folder / "report.html", status.reason)
        return f"<p>No curves: matplotlib is not here ({_text(status.reason)}).</p>"
    out = []
    for heading, panels in sections.items():
        figures = "\n".join(_figure(run, panel) for panel in panels)
        out.append(f'<h2>{heading}</h2>\n<div class="curves">{figures}</div>')
    out.append('<p class="soft">Dots: what was logged; line: their moving median; number: where it ends.</p>')
    peaks = dict.fromkeys(s["peak_from"] for s in run.sessions if s.get("peak_from"))
    if peaks and "mfu" in run.names():
        out.append(f'<p class="soft">MFU is of {_text("; of ".join(map(str, peaks)))}.</p>')
    return "\n".join(out)


def _figure(run: _Run, panel: _Panel) -> str:
    scale = 100.0 if panel.unit == "%" else 1.0
    curves, said = [], []
    ends = [steps[i] for steps, _ in map(run.series, panel.names) for i in (0, -1)]
    logarithmic = panel.loss and min(ends) > 0 and max(ends) >= LOG_STEPS * min(ends)
    for name, colour in zip(panel.names, ("one", "two")):
        steps, values = run.series(name)
        line = _some(len(steps), POINTS, logarithmic)
        exact = name == "learning_rate"  # no noise in it
        smooth = (values * scale)[line] if exact else _smoothed(values * scale, line, logarithmic)
        curves.append(_Curve(steps, values * scale, steps[line], smooth))
        label = (
            f'<i class="{colour}">{_text(_words(name).removeprefix("logits "))}</i> ' if len(panel.names) > 1 else ""
        )
        said.append(f"{label}{_short(float(smooth[-1]))}{' ' * bool(panel.unit)}{panel.unit}")
    caption = f"<b>{_text(panel.title)}</b> {', '.join(said)}"
    return f"<figure><figcaption>{caption}</figcaption>{_svg(curves, panel, logarithmic)}</figure>"


def _smoothed(values: np.ndarray, at: np.ndarray, logarithmic: bool) -> np.ndarray:
    """The median of a twentieth of all values around each of the places `at`, which a spike does not move; of fewer at
    the beginning of an axis that shows it large."""
    reach = np.minimum(len(values) // 40, at // 5 if logarithmic else at + len(values))
    return np.array([np.median(values[max(0, i - r) : i + r + 1]) for i, r in zip(at, reach)])


def _some(count: int, most: int, logarithmic: bool) -> np.ndarray:
    """Indices of at most `most` of `count`, the last one among them, evenly spaced as the axis shows them."""
    if count <= most:
        return np.arange(count)
    spaced = np.geomspace(1, count, most) - 1 if logarithmic else np.linspace(0, count - 1, most)
    return np.unique(spaced.round().astype(int))


def _svg(curves: Sequence[_Curve], panel: _Panel, logarithmic: bool) -> str:
    """The chart as an <svg> that is as wide as its place."""
    import matplotlib as mpl
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    settings = {"svg.fonttype": "none", "svg.hashsalt": panel.title, "font.family": "sans-serif", "font.size": 9}
    with mpl.rc_context(settings):
        figure = Figure(figsize=(4.6, 2.3), layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.add_subplot()
        for curve, colour in zip(curves, _COLOURS):
            alone = len(curve.steps) == 1
            dots = _some(len(curve.steps), DOTS, logarithmic)
            dots = np.union1d(dots, [curve.values.argmin(), curve.values.argmax()])  # a spike is seen
            look: dict[str, Any] = {"ms": 8, "alpha": 1.0} if alone else {"ms": 3, "alpha": 0.35}
            axes.plot(curve.steps[dots], curve.values[dots], ".", color=colour, **look)
            axes.plot(curve.line_steps, curve.line, color=colour, linewidth=1.6)
        _scales(axes, np.concatenate([c.values for c in curves]), panel, logarithmic)
        out = io.StringIO()
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return _inline(out.getvalue(), panel.title)


def _scales(axes: Any, values: np.ndarray, panel: _Panel, logarithmic: bool) -> None:
    from matplotlib.ticker import EngFormatter, FuncFormatter, LogLocator, MaxNLocator, NullFormatter

    low, high = values.min(), values.max()
    plain = FuncFormatter(lambda x, _: f"{x:g}")
    if panel.tall and low > 0 and high > 10 * low:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 200 * low else (1,)))
        axes.yaxis.set_minor_formatter(NullFormatter())
    else:
        axes.yaxis.set_major_locator(MaxNLocator(5))
        if panel.unit == "%" or panel.names[0] in _SPEEDS:
            axes.set_ylim(0, 1.1 * high or 1.0)
        elif high - low < 1e-6 * max(abs(high), abs(low)):  # constant: no axis of rounding errors
            axes.set_ylim(*((low - 0.5 * abs(low), high + 0.5 * abs(high)) if high else (-1, 1)))
    if logarithmic:
        axes.set_xscale("log")
        axes.xaxis.set_minor_formatter(NullFormatter())
    else:
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.yaxis.set_major_formatter(plain)
    axes.set_xlabel("step, log scale" if logarithmic else "step", color=_INK)
    axes.grid(color=_GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(which="both", length=0, labelcolor=_INK)
    axes.spines[:].set_visible(False)


def _inline(svg: str, title: str) -> str:
    """Without the XML around it and without a size; with the page's colours, and ids that no other chart has."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    opening, rest = svg.split(">", 1)
    box = re.search(r'viewBox="[^"]*"', opening)
    assert box is not None
    for colour, variable in _VARIABLES.items():
        rest = rest.replace(colour, variable)
    own = "c" + hashlib.sha256(title.encode()).hexdigest()[:8]
    rest = re.sub(r'(\bid="|"#|url\(#)', rf"\g<1>{own}-", rest)
    links = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    return f'<svg {box[0]} {links} role="img" aria-label="{_text(title)}">{rest.strip()}'


def _crossed(run: _Run) -> str:
    """When the distances fell below round numbers."""
    rows = []
    for name, value, when in crossings(run.lines):
        numbers = ["?" if v is None else f"{v:,.0f}" if v >= 100 else _short(v) for v in when]
        rows.append(f"<tr><td>{_text(_words(name).split(' ', 1)[1])} {value:g}<td>{'<td>'.join(numbers)}</tr>")
    head = "<h2>When distances fell below</h2>\n<p>Steps are interpolated between two measurements.</p>"
    table = f'<div class="wide"><table><tr><th><th>step<th>epochs<th>images seen</tr>{"".join(rows)}</table></div>'
    return f"{head}\n{table}" if rows else ""


# ---- pictures and tables -------------------------------------------------------------------------------------------


def _pictures(run: _Run) -> str:
    shown = [(p, image) for p in _spread(run.samples, PICTURES) if (image := _png(p, p != run.samples[-1])) is not None]
    if not shown:
        return ""
    title, what = "Reconstructions", "originals above, reconstructions below"
    if run.product == "generator":
        title, what = "Samples", "samples of the average, of the same noise and labels"
    out = [f"<h2>{title}</h2>", f'<p class="soft">Each picture: {what}.</p>']
    for place, (path, image) in enumerate(reversed(shown)):
        kind = "earlier" if place else "latest"
        if place == 1:
            out.append(f"<details><summary>{len(shown) - 1} earlier</summary>")
        alt = f"{what} at step {int(path.stem)}"
        out.append(f'<figure><figcaption>step <b>{int(path.stem):,}</b></figcaption><div class="wide {kind}">')
        out.append(f'<img alt="{alt}" src="data:image/png;base64,{image}"></div></figure>')
    return "\n".join([*out, *(["</details>"] if len(shown) > 1 else [])])


def _spread(paths: Sequence[Path], most: int) -> list[Path]:
    """At most so many, evenly spaced, first and last among them."""
    return [paths[i] for i in _some(len(paths), most, False)]


def _png(path: Path, shrink: bool) -> str | None:
    """base64 of a PNG; None where it cannot be read. Shrunk to SMALL pixels in width, lossless still."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            image.load()
            if not shrink or image.width <= SMALL:
                return base64.b64encode(path.read_bytes()).decode("ascii")
            size = SMALL, max(1, round(image.height * SMALL / image.width))
            out = io.BytesIO()
            image.convert("RGB").resize(size, Image.Resampling.LANCZOS).save(out, "PNG")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None
    return base64.b64encode(out.getvalue()).decode("ascii")


def _weights(run: _Run) -> str:
    if not run.checkpoints:
        return "<h2>Checkpoints</h2>\n<p>There is none yet.</p>"
    last = run.checkpoints[-1]
    metric = ", ".join(f"{k.upper()} {_short(v)}" for k, v in run.best.items() if k != "step" and _is_number(v))
    rows = []
    for path in reversed(run.checkpoints):
        notes = ["newest"] * (path == last)
        notes += [f"best, {metric}" if metric else "best"] * (run.best.get("step") == int(path.name))
        rows.append(f"<tr><td>{int(path.name):,}<td>{_size(path)}<td>{_text('; '.join(notes))}<td><code>"
                    f"checkpoints/{_text(path.name)}</code></tr>")  # fmt: skip
    product = last / run.product
    quoted = shlex.quote(str(product))
    command = f"maetok-fast reconstruct photos --tokenizer {quoted} --out reconstructed"
    python = f"from maetok_fast.models import MAETok\n\ntokenizer = MAETok.from_pretrained({str(product)!r})"
    if run.product == "generator":
        tokenizer = shlex.quote(str(run.setting("tokenizer") or "TOKENIZER"))
        command = f"maetok-fast sample --generator {quoted} --tokenizer {tokenizer} --classes 0 --out samples"
        python = f"from maetok_fast.models import load_generator\n\ngenerator = load_generator({str(product)!r})"
    return "\n".join(
        [
            "<h2>Checkpoints</h2>",
            '<div class="wide"><table><tr><th>step<th>size<th><th>folder</tr>', *rows, "</table></div>",
            f"<p>The averaged {run.product} of the newest lies in <code>{_text(product)}</code>. To use it:</p>",
            f"<pre>{_text(command)}</pre>", f"<pre>{_text(python)}</pre>",
        ]
    )  # fmt: skip


def _faults(run: _Run) -> str:
    skipped, unreadable = int(run.last("skipped_steps") or 0), _count(run.folder / "unreadable.jsonl")
    rows = [
        ("steps skipped, their gradient not being finite", skipped, "nonfinite.jsonl"),
        ("samples that could not be read", unreadable, "unreadable.jsonl"),
    ]
    cells = []
    for what, count, file in rows:
        number = f"<td class=bad>{count:,}<td><code>{file}</code>" if count else "<td>0<td>"
        cells.append(f"<tr><td class=text>{what}{number}</tr>")
    return f"<h2>Faults</h2>\n<table>{''.join(cells)}</table>"


def _about(run: _Run) -> str:
    out = ["<h2>What ran</h2>"]
    if run.config:
        out.append(f"<details><summary>Configuration</summary><pre>{_text(run.config.strip())}</pre></details>")
    if run.environment:
        text = json.dumps(run.environment, indent=1, ensure_ascii=False)
        out.append(f"<details><summary>Environment</summary><pre>{_text(text)}</pre></details>")
    if run.sessions:
        cells = [f"<tr><td>{_text(s.get('started', '?'))}<td>{_text(s.get('devices', '?'))}</tr>" for s in run.sessions]
        table = f"<table><tr><th>started<th>devices</tr>{''.join(cells)}</table>"
        out.append(f"<details><summary>Sessions</summary>{table}</details>")
    return "\n".join(out) if len(out) > 1 else ""


# ---- files and words -----------------------------------------------------------------------------------------------


def _text(value: Any) -> str:
    return html.escape(str(value), quote=True)


def _words(name: str) -> str:
    """A name of the log as a title: gradient/tokenizer becomes "gradient tokenizer"."""
    return re.sub(r"[/_]+", " ", name).replace("psnr", "PSNR").replace(" fd ", " FD ")


def _size(folder: Path) -> str:
    """What the files of a folder take; of one that is just being removed, of what is left."""
    count = 0
    for path in folder.rglob("*"):
        with contextlib.suppress(OSError):
            count += path.stat().st_size if path.is_file() else 0
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _json_of(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(_read(path))
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _count(path: Path) -> int:
    """Different samples that a file of JSON lines names; each session of a run names its own."""
    names = set()
    for line in _read(path).splitlines():
        with contextlib.suppress(ValueError, TypeError, KeyError):
            names.add(str(json.loads(line)["name"]))
    return len(names)
