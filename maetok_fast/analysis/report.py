# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""A comparison on one page: report.html, which needs no other file and no network.

    analysis.json's content ── one table of all measures ── a section a part: how, numbers, pictures (inlined)

A value stands bold where it leads by more than twice the standard error of the difference; where no error is known
nothing is bold. What is missing is said where it would stand. All text is escaped.
"""

from __future__ import annotations

import base64
import html
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from maetok_fast.analysis.figures import COLOURS
from maetok_fast.pipeline.run import written

__all__ = ["write_report"]

_TITLES = {
    "gmm": "Gaussian mixtures", "probe": "Linear probing", "umap": "Pictures of the latent space",
    "neighbours": "Nearest neighbours", "traversal": "Decoded latents", "usage": "Use of the tokens",
}  # fmt: skip
_STYLE = """
:root { color-scheme: light; --ink: #1c2126; --soft: #56616b; --line: #dde1e5; --card: #f5f6f8; --bad: #a3271f }
* { box-sizing: border-box }
body { margin: 0 auto; padding: 1.5rem 1rem 4rem; max-width: 68rem; background: #fff; color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif }
h1 { font-size: 1.5rem; margin: 0; overflow-wrap: anywhere } h2 { font-size: 1.2rem; margin: 2.5rem 0 .5rem }
p { margin: .5rem 0 } .soft, figcaption, th, td.of { color: var(--soft) } .missing { color: var(--bad) }
.wide { overflow-x: auto; margin: .5rem 0 1rem } figure { margin: 1rem 0 } figcaption { font-size: .92rem }
img { display: block; max-width: 100%; height: auto } .sheet img { max-width: none }
table { border-collapse: collapse; font-size: .95rem; font-variant-numeric: tabular-nums }
td, th { text-align: left; padding: .3rem 1.1rem .3rem 0; border-bottom: 1px solid var(--line); font-weight: 400;
  vertical-align: top } td small { white-space: nowrap } td.of { min-width: 9rem }
td b { font-weight: 700 } i.key { display: inline-block; width: .7em; height: .7em; border-radius: 50%;
  margin-right: .4em }
pre { background: var(--card); padding: .7rem .9rem; border-radius: .4rem; overflow-x: auto; font-size: .85rem }
summary { cursor: pointer; margin: .5rem 0 } small { color: var(--soft); font-weight: 400 }
@media (max-width: 40rem) { td, th { padding-right: .6rem } td.of { min-width: 7rem } }
"""


class Measure(NamedTuple):
    """A row of the table. of: (a part's values of one tokenizer) -> (value, its standard error or None, text), or None
    where it has none. better: "higher", "lower" or "": which value leads."""

    part: str
    title: str
    better: str
    of: Callable[[dict[str, Any]], tuple[float, float | None, str] | None]


def write_report(out: Path, found: dict[str, Any]) -> Path:
    """Writes out/report.html of what `analyze` returns and the pictures that lie in `out`; returns its path."""
    names = list(found["tokenizers"])
    body = [_head(found, names), _table(found, names)]
    if found.get("overview"):
        body.append(
            _picture(out / "report.png", "Whiskers are one standard error, where they are longer than the mark.")
        )
    body += [_part(out, name, part, names) for name, part in found["parts"].items()]
    body.append(_about(found))
    page = (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>Latents of {_text(', '.join(names))}</title><style>{_STYLE}</style></head>\n<body>\n"
        + "\n".join(body)
        + "\n</body></html>\n"
    )
    path = out / "report.html"
    written(path, lambda p: p.write_text(page, encoding="utf-8"))
    return path


# ---- the table -----------------------------------------------------------------------------------------------------


def _share(value: float, error: float | None) -> tuple[float, float | None, str]:
    return value, error, f"{value:.1%}" + ("" if error is None else f" <small>± {100 * error:.1f}</small>")


def _accuracy(value: dict[str, Any]) -> tuple[float, float | None, str]:
    """A mean over seeds, with the error of seeds and of the held-out rows together."""
    return _share(value["mean"], value["error_all"])


def _least(one: dict[str, Any]) -> tuple[float, float | None, str]:
    best = min(one["curve"], key=lambda p: p["held_out"]["mean"])
    value, error = best["held_out"]["mean"], best["held_out"]["error"]
    text = f"{value:.4f}" + ("" if error is None else f" <small>± {error:.4f}</small>")
    return value, error, f"{text} <small>at {best['modes']} {'mode' if best['modes'] == 1 else 'modes'}</small>"


def _reach(which: int) -> Callable[[dict[str, Any]], tuple[float, float | None, str] | None]:
    def of(one: dict[str, Any]) -> tuple[float, float | None, str] | None:
        modes = one["reach"][which]["modes"]
        return None if modes is None else (modes, None, f"{modes:.3g}")

    return of


def _agreement(k: str) -> Callable[[dict[str, Any]], tuple[float, float | None, str] | None]:
    def of(one: dict[str, Any]) -> tuple[float, float | None, str] | None:
        value = one.get("agreement", {}).get(k)
        return None if value is None else _share(value, one["agreement_error"][k])

    return of


def _few(one: dict[str, Any]) -> tuple[float, float | None, str] | None:
    first = next(iter(one["fractions"]), None)
    if first is None:
        return None
    value, error, text = _accuracy(first)
    return value, error, f"{text} <small>of {first['rows']:,} rows</small>"


def _measures(found: dict[str, Any]) -> list[Measure]:
    gmm = next(iter(found["parts"].get("gmm", {}).get("values", {}).values()), None)
    targets = [] if gmm is None else [t["nll"] for t in gmm["reach"]]
    return [
        Measure("gmm", "components (K), and the variance that they explain", "",
                lambda v: (0, None, f"{v['components']} of {v['dims']} <small>{v['explained']:.1%}</small>")),
        Measure("gmm", "least held-out NLL, nats per dimension", "lower", _least),
        *(Measure("gmm", f"modes needed for NLL {t:.4f}", "lower", _reach(i)) for i, t in enumerate(targets)),
        Measure("probe", "linear probe, flattened", "higher", lambda v: _accuracy(v["flattened"])),
        Measure("probe", "linear probe, mean-pooled", "higher", lambda v: _accuracy(v["pooled"])),
        Measure("probe", "flattened, with the fewest labels", "higher", _few),
        Measure("neighbours", "nearest neighbour of the same class", "higher", _agreement("1")),
        Measure("neighbours", "of the 20 nearest", "higher", _agreement("20")),
        Measure("usage", "effective tokens", "",
                lambda v: (0, None, f"{v['effective_tokens']:.1f} of {len(v['share'])}")),
        Measure("usage", "effective dimensions", "", lambda v: (0, None, f"{v['effective_rank']:.1f} of {v['dims']}")),
        Measure("usage", "mean correlation (RV) of two tokens", "",
                lambda v: None if v["correlation_mean"] is None else (0, None, f"{v['correlation_mean']:.3f}")),
    ]  # fmt: skip


def _table(found: dict[str, Any], names: Sequence[str]) -> str:
    rows = ["<tr><th></th>" + "".join(f"<th>{_key(i)}{_text(n)}</th>" for i, n in enumerate(names)) + "</tr>"]
    latents = [found["tokenizers"][n] for n in names]
    rows.append(_row("latent", [" × ".join(map(str, one["latent"])) for one in latents]))
    rows.append(_row("training and held-out rows", [f"{one['train']:,} + {one['held_out']:,}" for one in latents]))
    for measure in _measures(found):
        values = found["parts"].get(measure.part, {}).get("values", {})
        told = [measure.of(values[n]) if n in values else None for n in names]
        if any(one is not None for one in told):
            best = _leader(told, measure.better)
            cells = ["–" if one is None else f"<b>{one[2]}</b>" if i == best else one[2] for i, one in enumerate(told)]
            better = f" <small>{measure.better} is better</small>" if measure.better else ""
            rows.append(_row(_text(measure.title) + better, cells))
    note = (
        "Bold leads by more than twice the standard error of the difference. ± is one standard error: of seeds, and of "
        "shares of held-out rows of these rows too; the split into training and held-out rows is one for all."
    )
    return f'<div class="wide"><table>{"".join(rows)}</table></div><p class="soft">{note}</p>'


def _leader(told: Sequence[tuple[float, float | None, str] | None], better: str) -> int | None:
    """The place of the value that leads clearly; None where there is none."""
    known = [(one[0], one[1], i) for i, one in enumerate(told) if one is not None]
    if not better or len(known) < 2 or any(error is None for _, error, _ in known):
        return None
    known.sort(reverse=better == "higher")
    (first, e1, place), (second, e2, _) = known[:2]
    return place if abs(first - second) > 2 * math.hypot(e1 or 0, e2 or 0) else None


def _row(title: str, cells: Sequence[str]) -> str:
    return f'<tr><td class="of">{title}</td>' + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>"


def _key(place: int) -> str:
    return f'<i class="key" style="background:{COLOURS[place % len(COLOURS)]}"></i>'


# ---- the rest ------------------------------------------------------------------------------------------------------


def _head(found: dict[str, Any], names: Sequence[str]) -> str:
    tokenizers = found["tokenizers"]
    whence = " ; ".join(sorted({f"{one['held_out_from']}" for one in tokenizers.values()}))
    said = [f"<h1>Latents of {_text(', '.join(names))}</h1>", f'<p class="soft">Held out: {_text(whence)}.</p>']
    if found["settings"]["limit"] is not None:
        said.append(f'<p class="missing">A sample of at most {found["settings"]["limit"]:,} rows, drawn by a seed.</p>')
    if not found["paired"] and len(names) > 1:
        said.append('<p class="missing">The tokenizers were not asked to be of the same images (--unpaired).</p>')
    moments = [n for n in names if tokenizers[n]["kind"].startswith("mean")]
    if moments:
        said.append(f"<p>Latents of {_text(', '.join(moments))} were drawn once of the moments in the cache.</p>")
    return "\n".join(said)


def _part(out: Path, name: str, part: dict[str, Any], names: Sequence[str]) -> str:
    lines = [f"<h2>{_TITLES[name]}</h2>", f'<p class="soft">{_text(part["how"][0].upper() + part["how"][1:])}.</p>']
    lines += [f'<p class="missing">{_text(why)}.</p>' for why in part["missing"]]
    values = {n: part["values"][n] for n in names if n in part["values"]}
    if name == "gmm" and values:
        lines.append(_curve_table(values))
    if name == "umap":
        lines += [_purity(n, one) for n, one in values.items() if "purity" in one]
    lines += [_picture(out / file, caption) for file, caption in part["pictures"].items() if (out / file).exists()]
    return "\n".join(lines)


def _curve_table(values: dict[str, dict[str, Any]]) -> str:
    modes = sorted({p["modes"] for one in values.values() for p in one["curve"]})
    head = "<tr><th>modes</th>" + "".join(f"<th>{_text(n)}</th><th>on training rows</th>" for n in values) + "</tr>"
    rows = []
    for m in modes:
        cells = [f"<td>{m}</td>"]
        for one in values.values():
            point = next((p for p in one["curve"] if p["modes"] == m), None)
            if point is None:
                cells.append("<td>–</td><td>–</td>")
                continue
            error = point["held_out"]["error"]
            more = f" <small>± {error:.4f}</small>" if error else ""
            cells.append(f"<td>{point['held_out']['mean']:.4f}{more}</td>")
            cells.append(f"<td><small>{point['train']['mean']:.4f}</small></td>")
        rows.append(f"<tr>{''.join(cells)}</tr>")
    return f'<div class="wide"><table>{head}{"".join(rows)}</table></div>'


def _purity(name: str, one: dict[str, Any]) -> str:
    return (
        f"<p>{_text(name)}: {one['purity']:.1%} of {one['neighbours']} neighbours are of the same class in latents, "
        f"{one['purity_of_picture']:.1%} in the picture, {one['chance']:.1%} by chance.</p>"
    )


def _picture(path: Path, caption: str) -> str:
    content = base64.b64encode(path.read_bytes()).decode("ascii")
    kind = "sheet wide" if path.name.startswith(("neighbours", "traversal")) else "wide"
    return (
        f'<figure><div class="{kind}"><img alt="{_text(caption)}" src="data:image/png;base64,{content}"></div>'
        f"<figcaption>{_text(caption)}</figcaption></figure>"
    )


def _about(found: dict[str, Any]) -> str:
    spent = sum(found["seconds"].values())
    said = f"{spent:,.0f} s of computing in all units, whenever that was. All numbers are in analysis.json."
    lines = [f"<h2>How it was made</h2><p>{said}</p>"]
    for name in ("tokenizers", "settings", "versions", "machine", "seconds"):
        text = json.dumps(found[name], indent=1, ensure_ascii=False)
        lines.append(f"<details><summary>{name.capitalize()}</summary><pre>{_text(text)}</pre></details>")
    return "\n".join(lines)


def _text(value: str) -> str:
    return html.escape(value, quote=True)
