# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""What the claims look like: claims.json, pictures, and one text in two forms.

    claims-modes.png       held-out likelihood against modes, one line a tokenizer
    claims-steps.png       diffusion loss and distance against training steps
    claims-ablation.png    the seven rows: reconstruction, probe, generation
    claims-samples.png     the first samples and reconstructions of each variant, none picked
    claims.md, claims.html the same blocks: headings, paragraphs, tables, pictures

The page needs no other file; the Markdown stands beside its pictures.
"""

from __future__ import annotations

import base64
import html
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from maetok_fast._optional import probe
from maetok_fast.analysis.figures import COLOURS, style
from maetok_fast.data.images import opened
from maetok_fast.demos.claims.findings import BY_NAME, MEASURES
from maetok_fast.demos.claims.parts import GUIDANCE, SCALES, SHOWN, Work
from maetok_fast.demos.claims.variants import LARGER, SIZE, VARIANTS
from maetok_fast.demos.page import save_sheet
from maetok_fast.pipeline.run import write_json, write_text, written
from maetok_fast.training.report import _STYLE

__all__ = ["blocks_of", "write_claims"]

COMPARED = ("maetok", "ae", "kl", "softvq", "kl-2d")
Block = tuple[Any, ...]  # ("h", text), ("p", text), ("table", rows, the first one its head), ("picture", file, text)


def write_claims(work: Work, found: dict[str, Any]) -> Path:
    """Writes all of it into the work's folder; returns the page's path."""
    out = work.out
    missing = probe("matplotlib")
    if missing.state == "found":
        _draw(out, found)
    _samples(work, out / "claims-samples.png")
    write_json(out / "claims.json", found)
    blocks = blocks_of(found, missing.state == "found")
    write_text(out / "claims.md", _markdown(blocks))
    write_text(out / "claims.html", _page(out, blocks))
    return out / "claims.html"


# ---- text ----------------------------------------------------------------------------------------------------------


def blocks_of(found: dict[str, Any], drawn: bool = True) -> list[Block]:
    """The text, of what `collect_findings` gives."""
    seeds, settings = found["seeds"], found["settings"]
    blocks: list[Block] = [("h", "The claims, on a small scale")]
    if found["quick"]:
        blocks.append(("p", "The quick form: a handful of steps each, so that no number here means anything."))
    blocks += [
        (
            "p",
            f"`maetok-fast demo claims --seeds {seeds}` made this page of claims.json; the same command goes on where "
            "it was stopped, and `--quick` shows in a minute or two that everything works.",
        ),
        (
            "p",
            f"{len(found['variants'])} tokenizers of equal size on {found['data']} at {SIZE} px, "
            f"{settings['steps']:,} steps of {settings['batch']} images and {settings['decoded']:,} of the decoder "
            f"alone, and a small SiT on each one's latents, {settings['generated']:,} steps of "
            f"{settings['generator_batch']}; {seeds} seed(s). {SIZE // 8}x{SIZE // 8} patches, 16 latent tokens of "
            "width 8; HOG is the only auxiliary target. Values are means over seeds, ± one standard error; "
            "without one they are of a single seed.",
        ),
        (
            "p",
            "gFD, rFD: Frechet distance of samples or reconstructions to the real test images in the features of a "
            f"small classifier of real images (right about {found['judge']['accuracy']:.1%} of the test images); of "
            "pixels: in 64 principal components. Real training images, as many as samples, have "
            f"{found['judge']['floor']['classifier'][str(settings['judged'])]:.3f} and "
            f"{found['judge']['floor']['pixels'][str(settings['judged'])]:.3f}. NLL: nats a dimension of "
            f"{found['components']} standardised principal components of held-out latents, the best of "
            f"{', '.join(map(str, settings['modes']))} modes. Samples are unguided. gFD to real images contains "
            "what the decoder loses; gFD to reconstructions (of held-out images, by the same tokenizer) does not.",
        ),
        ("h", "Which claims hold here"),
        (
            "p",
            "holds: the mean difference over seeds has the claimed sign and lies beyond Student's one-sided 95 % for "
            "so many seeds; does not hold: the same with the other sign. Of twenty claims one does either by chance.",
        ),
        ("table", _claims(found)),
        ("h", "The seven rows of the ablation"),
        ("table", _ablation(found)),
        *_picture(drawn, "claims-ablation.png", "rFD, linear probe and gFD of the seven rows"),
        ("h", "Tokenizers of equal size and width"),
        ("table", _tokenizers(found)),
        *_picture(drawn, "claims-modes.png", "held-out negative log likelihood against the number of modes"),
        *_picture(drawn, "claims-steps.png", "diffusion loss and Frechet distance against training steps"),
        ("h", "Steps to equal quality"),
        ("p", _equal(found)),
        ("h", "Rotary against learned positions, after fine-tuning on both sizes"),
        ("table", _mixed(found)),
        ("h", "Kinds of guidance"),
        ("table", _guidance(found)),
        ("h", "Pictures"),
        ("p", f"The first {SHOWN} samples and reconstructions of seed 0, none picked."),
        ("picture", "claims-samples.png", "samples and reconstructions of each variant"),
        ("h", "What it took"),
        ("p", _took(found)),
    ]
    return blocks


def _picture(drawn: bool, name: str, text: str) -> list[Block]:
    return [("picture", name, text)] if drawn else [("p", f"No picture of {text}: matplotlib is not here.")]


def _number(said: dict[str, Any] | None, digits: int) -> str:
    if said is None:
        return ""
    error = "" if said["error"] is None else f" ± {said['error']:.{digits}f}"
    return f"{said['mean']:.{digits}f}{error}"


def _claims(found: dict[str, Any]) -> list[list[str]]:
    rows = [["claim", "measure", "values", "here", "the paper"]]
    for claim in found["claims"]:
        values, digits = claim["values"], claim["digits"]
        pair = f"{_number(values['better'], digits)} against {_number(values['than'], digits)}"
        rows.append([claim["says"], claim["title"], pair, f"**{claim['verdict']}**", claim["paper"]])
    return rows


def _measured(found: dict[str, Any], name: str, *measures: str) -> list[str]:
    values = found["variants"][name]["measures"]
    return [_number(values.get(m), MEASURES[m].digits) for m in measures]


def _ablation(found: dict[str, Any]) -> list[list[str]]:
    measures = ("psnr_stage_1", "psnr", "rfd", "probe_flat", "nll", "loss", "gfd", "gfd_own", "recognised")
    rows = [["mask", "latent tokens", "HOG", *(MEASURES[m].title for m in measures)]]
    for name in found["table"]:
        about = found["variants"][name]
        rows.append(
            [*("x" if about[k] else "" for k in ("mask", "latents", "target")), *_measured(found, name, *measures)]
        )
    return rows


def _tokenizers(found: dict[str, Any]) -> list[list[str]]:
    measures = (
        "psnr", "rfd", "probe_pooled", "probe_flat", "components_90", "nll", "nll_diag", "loss", "gfd", "gfd_pixels",
        "gfd_own", "recognised",
    )  # fmt: skip
    rows = [["", "latent", *(MEASURES[m].title for m in measures)]]
    for name in COMPARED:
        about = found["variants"][name]
        rows.append([about["title"], f"{about['tokens']} x {about['width']}", *_measured(found, name, *measures)])
    return rows


def _equal(found: dict[str, Any]) -> str:
    equal = found["steps_to_equal"]
    fast, slow = (BY_NAME[equal[k]] for k in ("fast", "slow"))
    unreached = (
        ""
        if equal["reachable"]
        else f" {fast.title}'s decoder alone loses more than that: no generator of its latents could be as near to "
        "real images, and the distance to its own reconstructions is what speaks of generators."
    )
    said = []
    for space, name in (
        ("classifier", "the classifier's features"),
        ("pixels", "pixels"),
        ("classifier_own", "the classifier's features, to each one's own reconstructions"),
        ("pixels_own", "pixels, to its own reconstructions"),
    ):
        each = [f"{f['bound']} {f['factor']:.2f}x".strip() for f in equal[space]["seeds"] if f["factor"] is not None]
        said.append(f"in {name} {', '.join(each) or 'not known'}")
    return (
        f"{fast.title}'s {fast.tokens} latent tokens against a {slow.title}: how many times fewer steps a generator "
        "of the same size takes to the distance that the other one has at its last step, one number a seed: "
        f"{'; '.join(said)}. Both are unguided, {found['settings']['sampled']:,} samples at each checkpoint, linear "
        f"between them.{unreached} A step of the many tokens also costs more."
    )


def _mixed(found: dict[str, Any]) -> list[list[str]]:
    rows = [["", *(f"{size} px, {when}" for size in (SIZE, LARGER) for when in ("before", "after"))]]
    for name, title in (("maetok", "rotary"), ("learned", "learned")):
        said = found["mixed"][name]
        cells = []
        for size in (SIZE, LARGER):
            for when in ("before", "after"):
                psnr, rfd = (said[f"{when}_{size}_{m}"] for m in ("psnr", "rfd"))
                cells.append(f"{_number(psnr, 2)} dB, rFD {_number(rfd, 3)}" if psnr else "")
        rows.append([title, *cells])
    return rows


def _guidance(found: dict[str, Any]) -> list[list[str]]:
    rows = [["guidance", "strength", "gFD", "gFD of pixels", "recognised"]]
    for row in found["guidance"]:
        said = [_number(row["gfd"], 3), _number(row["gfd_pixels"], 3), _number(row["recognised"], 4)]
        rows.append([row["name"], f"{row['strength']:g}", *said])
    return rows


def _took(found: dict[str, Any]) -> str:
    parts = ", ".join(f"{name} {seconds / 60:.0f}" for name, seconds in found["seconds"].items())
    machine = found["machine"]
    name = machine.get("cpu") or machine.get("processor") or "a processor of an unknown name"
    return (
        f"{sum(found['seconds'].values()) / 3600:.1f} hours of one core ({name}): minutes of {parts}. "
        f"{len(GUIDANCE)} kinds of guidance at {', '.join(f'{s:g}' for s in SCALES)}."
    )


def _markdown(blocks: Sequence[Block]) -> str:
    lines: list[str] = []
    for k, (kind, *content) in enumerate(blocks):
        if kind == "h":
            lines.append(f"{'#' if k == 0 else '##'} {content[0]}")
        elif kind == "p":
            lines.append(content[0])
        elif kind == "picture":
            lines.append(f"![{content[1]}]({content[0]})")
        else:
            head, *rows = content[0]
            table = [head, ["---"] * len(head), *rows]
            lines.append("\n".join("| " + " | ".join(row) + " |" for row in table))
    return "\n\n".join(lines) + "\n"


def _page(out: Path, blocks: Sequence[Block]) -> str:
    body: list[str] = []
    for k, (kind, *content) in enumerate(blocks):
        if kind == "h":
            body.append(f"<h{1 if k == 0 else 2}>{html.escape(content[0])}</h{1 if k == 0 else 2}>")
        elif kind == "p":
            code = re.sub("`(.+?)`", r"<code>\1</code>", html.escape(content[0]))
            body.append(f"<p>{code}</p>")
        elif kind == "picture":
            data = base64.b64encode((out / content[0]).read_bytes()).decode()
            body.append(
                f'<figure class="wide"><img style="max-width:100%" alt="{html.escape(content[1])}" '
                f'src="data:image/png;base64,{data}"></figure>'
            )
        else:
            head, *rows = content[0]
            cells = ["<tr>" + "".join(f"<th>{html.escape(c)}" for c in head) + "</tr>"]
            cells += ["<tr>" + "".join(map(_cell, row)) + "</tr>" for row in rows]
            body.append(f'<div class="wide"><table>{"".join(cells)}</table></div>')
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>maetok-fast demo claims</title><style>{_STYLE}</style></head>\n<body>\n" + "\n".join(body)
        + "\n</body></html>\n"
    )  # fmt: skip


def _cell(text: str) -> str:
    """Sentences may be broken into lines, numbers not."""
    said = html.escape(text)
    if said.startswith("**") and said.endswith("**"):
        said = f"<b>{said[2:-2]}</b>"
    return f"<td{' class=text' if len(text) > 24 else ''}>{said}"


# ---- pictures ------------------------------------------------------------------------------------------------------


def _draw(out: Path, found: dict[str, Any]) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    def figure(name: str, columns: int, draw: Any) -> None:
        drawn = Figure(figsize=(4.6 * columns, 3.8), layout="constrained")
        FigureCanvasAgg(drawn)
        draw(drawn, np.asarray(drawn.subplots(1, columns, squeeze=False))[0])
        written(out / name, lambda p: drawn.savefig(p, format="png", dpi=110))

    def modes(drawn: Any, axes: Any) -> None:
        for ax, key, title in zip(axes, ("nll_full", "nll_diag"), ("full covariances", "diagonal covariances")):
            _lines(ax, found, key)
            ax.set_xscale("log")
            ax.set_xticks(found["settings"]["modes"], [str(m) for m in found["settings"]["modes"]])
            ax.minorticks_off()
            _plain(ax, title, "modes", "held-out NLL, nats a dimension")
        axes[0].legend(frameon=False, fontsize=8)

    def steps(drawn: Any, axes: Any) -> None:
        told = (
            ("loss", "diffusion loss", "held-out squared error of the velocity"),
            ("fd_classifier", "samples, unguided", "gFD to real images"),
            ("own_classifier", "samples, unguided", "gFD to reconstructions"),
        )
        for ax, (key, title, label) in zip(axes, told):
            _lines(ax, found, key)
            _plain(ax, title, "steps of the generator", label)
            if key != "loss":
                ax.set_yscale("log")
                for axis_of in (ax.yaxis.set_major_formatter, ax.yaxis.set_minor_formatter):
                    axis_of("{x:g}")
        axes[0].legend(frameon=False, fontsize=8)

    figure("claims-modes.png", 2, modes)
    figure("claims-steps.png", 3, steps)
    figure("claims-ablation.png", 3, lambda drawn, axes: _rows(axes, found))


def _lines(ax: Any, found: dict[str, Any], key: str) -> None:
    for place, name in enumerate(COMPARED):
        points = found["variants"][name]["curves"].get(key)
        if not points:
            continue
        x, y, error = zip(*points)
        bars = None if error[0] is None else error
        title = found["variants"][name]["title"]
        ax.errorbar(x, y, bars, label=title, capsize=3, markersize=4, **style(place))


def _rows(axes: Any, found: dict[str, Any]) -> None:
    names = found["table"]
    labels = [found["variants"][name]["title"] for name in names]
    for ax, measure, better in zip(axes, ("rfd", "probe_flat", "gfd"), ("less", "more", "less")):
        for place, name in enumerate(names):
            said = found["variants"][name]["measures"].get(measure)
            if said is None:
                continue
            ax.errorbar(said["mean"], place, xerr=said["error"] or 0, marker="o", capsize=3,
                        color=COLOURS[0] if found["variants"][name]["mask"] else COLOURS[1])  # fmt: skip
        ax.set_yticks(range(len(names)), labels if ax is axes[0] else [""] * len(names))
        ax.set_ylim(len(names) - 0.5, -0.5)
        _plain(ax, MEASURES[measure].title, f"{better} is better; blue: with masks", "")


def _plain(ax: Any, title: str, x: str, y: str) -> None:
    ax.set_title(title, fontsize=10, loc="left")
    ax.set_xlabel(x, fontsize=9)
    ax.set_ylabel(y, fontsize=9)
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(alpha=0.3)


def _samples(work: Work, path: Path) -> None:
    """A row of reconstructions, and one of samples, of each variant that has them."""
    rows, names = [], []
    for variant in VARIANTS:
        folder = work.folder(variant, 0)
        for file, what in (("reconstructions.png", "reconstructed"), ("samples.png", "sampled")):
            if (folder / file).exists():
                with opened(folder / file) as image:
                    pixels = np.asarray(image.convert("RGB"))
                rows.append(np.stack(np.split(pixels, pixels.shape[1] // SIZE, axis=1)))
                names.append(f"{variant.title}, {what}")
    save_sheet(path, rows, names)
