# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""What was measured, how, and which known traps apply: the JSON of a comparison as Markdown and as a table of text.

    describe_set(images)   path, count, pixels, their treatment, labels
    traps(facts)           one sentence for each that applies
    markdown(result)       evaluation.md; text(result): the same for a terminal

A number without how it was computed cannot be compared: filter, weights, precision and counts stand beside each.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from maetok_fast.evaluation.extractor import Extractor
from maetok_fast.evaluation.sets import ImageSet

__all__ = ["BIAS_FREE", "Facts", "describe_set", "markdown", "text", "traps"]

BIAS_FREE = 50_000  # samples that published numbers are of
ADM_COUNTS = (10_000, 50_000)  # reference images and samples of published precision and recall
SPLIT = 5000
COLUMNS = 120  # of a terminal


@dataclass(frozen=True)
class Facts:
    """What traps are judged by. halves: FD's name -> (of all samples, mean of their halves). ignored: sentences about
    stored statistics that were not used."""

    samples: ImageSet
    reference: ImageSet
    extractors: Sequence[Extractor]
    metrics: Sequence[dict[str, Any]]
    halves: dict[str, tuple[float, float]]
    ignored: Sequence[str]
    kind: str


def describe_set(images: ImageSet) -> dict[str, Any]:
    """JSON values. labels: None where they are not known."""
    return {
        "path": images.path,
        "images": len(images),
        "pixels": None if images.shape is None else f"{images.shape[1]} x {images.shape[0]}",
        "treatment": images.treatment if len(images) else "statistics alone",
        "jpeg": images.lossy,
        "labels": images.balance(),
        "fingerprint": images.fingerprint[:16],
    }


def traps(facts: Facts) -> list[str]:
    samples, reference = facts.samples, facts.reference
    named = {m["name"]: m for m in facts.metrics}
    found = [
        f"{e.name} has random weights: its numbers mean nothing outside of this comparison."
        for e in facts.extractors
        if e.random
    ]
    for extractor in facts.extractors:
        if "NOT" in str(extractor.about.get("weights")):
            found.append(
                f"{extractor.name} has other weights than the published ones: compare with no published number."
            )
        if extractor.precision != "fp32":
            found.append(f"{extractor.name} ran in {extractor.precision}; published numbers are fp32.")
    found += [sentence + "." for sentence in facts.ignored]
    for name, (value, half) in facts.halves.items():
        found.append(_few(named[name], value, half))
    found += _singular(facts)
    if len(samples) and not samples.labels_known and facts.kind != "r":
        found.append(
            "The samples' labels are not known: equal counts of each class are worth about 0.1 FID on ImageNet against "
            "random ones."
        )
    balance = samples.balance()
    if balance is not None and not balance["equal"] and facts.kind != "r":
        found.append(
            f"The samples' labels are not equal ({balance['least']:,} to {balance['most']:,} of {balance['classes']:,} "
            f"classes): equal ones are worth about 0.1 FID on ImageNet."
        )
    for images, what in ((samples, "samples"), (reference, "reference images")):
        if images.lossy:
            found.append(
                f"{images.lossy:,} of the {len(images):,} {what} are JPEG files: their artefacts are measured too."
            )
    if samples.shape and reference.shape and samples.shape != reference.shape:
        found.append(
            f"Samples have {_by(samples)} pixels and the reference {_by(reference)}: resized by other factors, they "
            "differ by what the filter does."
        )
    if samples.treatment != reference.treatment and len(samples) and len(reference):
        found.append(f"Samples are taken {samples.treatment}, the reference {reference.treatment}.")
    if not len(reference):
        found.append("The reference has statistics and no images: no precision, recall, KID or MIND.")
    return found + _of_rows(facts, named)


def _few(metric: dict[str, Any], value: float, half: float) -> str:
    """How much fewer samples raise an FD, judged by halves of them: by c / N (Chong and Forsyth 2020)."""
    name, count = metric["name"], metric["samples"]
    at_full = value - (half - value) * (1 - count / BIAS_FREE)
    if count <= metric["dimensions"]:
        so = "so few allow no guess at more"
    elif at_full <= 0:
        so = "at this count it is mostly that"
    else:
        so = f"{BIAS_FREE:,} would give about {at_full:.4g}, if the bias falls as 1/N"
    return (
        f"{name} is of {count:,} samples, and fewer raise it: half of them give {half:.4g}, all {value:.4g}; {so}. "
        "Compare equal counts only."
    )


def _singular(facts: Facts) -> list[str]:
    found = []
    for what, whose in (("samples", "samples"), ("reference", "reference images")):
        thin: dict[int, dict[str, int]] = {}
        for m in facts.metrics:
            count, width = m.get(what), m.get("dimensions")
            if count is not None and width is not None and count <= width:
                thin.setdefault(count, {})[m["name"]] = width
        for count, widths in thin.items():
            sizes = " and ".join(f"{width:,}" for width in dict.fromkeys(widths.values()))
            found.append(
                f"{', '.join(widths)}: {count:,} {whose} span {count - 1:,} of the features' {sizes} dimensions: the "
                "covariance is singular, and the distance moves with the count more than with anything else."
            )
    return found


def _of_rows(facts: Facts, named: dict[str, Any]) -> list[str]:
    found = []
    counts = (len(facts.reference), len(facts.samples))
    if named.get("precision", {}).get("value") is not None and counts != ADM_COUNTS:
        found.append(
            f"Precision and recall depend on both counts: published ones are of {ADM_COUNTS[0]:,} reference images and "
            f"{ADM_COUNTS[1]:,} samples, these of {counts[0]:,} and {counts[1]:,}."
        )
    if named.get("IS", {}).get("value") is not None:
        if counts[1] < SPLIT:
            found.append(
                f"IS is of {counts[1]:,} samples in one split; published ones are means over splits of {SPLIT:,}."
            )
        labels = facts.samples.labels
        if labels is not None and counts[1] > SPLIT and (np.diff(labels) >= 0).all() and labels[0] != labels[-1]:
            found.append(
                f"The samples lie in the order of their classes, and IS is of consecutive splits of {SPLIT:,}, each of "
                "which holds few classes: that lowers it."
            )
    return found


def _by(images: ImageSet) -> str:
    assert images.shape is not None
    return f"{images.shape[1]} x {images.shape[0]}"


# ---- as text -------------------------------------------------------------------------------------------------------


def markdown(result: dict[str, Any]) -> str:
    """A table of numbers, how they were computed, and the traps."""
    numbers, reasons = _numbers(result)
    lines = ["# Evaluation", "", *_rows(numbers), "", *(f"- {reason}" for reason in reasons), *[""] * bool(reasons)]
    lines += ["## How", "", *_rows(_how(result))]
    if found := _traps(result):
        lines += ["", "## Read before comparing", "", *(f"- {trap}" for trap in found)]
    return "\n".join(lines) + "\n"


def text(result: dict[str, Any]) -> str:
    """The same, for a terminal."""
    numbers, reasons = _numbers(result)
    lines = [*_columns(numbers), "", *(_wrapped(reason, "", "  ") for reason in reasons), *[""] * bool(reasons)]
    how = _how(result)[1:]
    width = max(len(name) for name, _ in how) + 2
    for name, said in how:
        lines.append(_wrapped(said, name.ljust(width), " " * width))
    if found := _traps(result):
        lines += ["", "Read before comparing:", *(_wrapped(trap, "  - ", "    ") for trap in found)]
    return "\n".join(lines)


def _wrapped(said: str, first: str, more: str) -> str:
    return textwrap.fill(
        said, COLUMNS, initial_indent=first, subsequent_indent=more, break_long_words=False, break_on_hyphens=False
    )


def _traps(result: dict[str, Any]) -> list[str]:
    of_pairs = result.get("reconstruction", {}).get("traps", [])
    return [*result["traps"], *(f"{t[:1].upper()}{t[1:].rstrip('.')}." for t in of_pairs)]


def _numbers(result: dict[str, Any]) -> tuple[list[list[str]], list[str]]:
    """(rows of the table, a sentence for each number that is not there)"""
    reasons: dict[str, list[str]] = {}
    rows = [["metric", "value", "95 % interval", "features", "samples", "reference"]]
    for m in result["metrics"]:
        interval = f"{m['low']:.4g} to {m['high']:.4g}" if "low" in m else ""
        if m.get("std_of_splits"):
            interval = f"std of splits {m['std_of_splits']:.3g}"
        if m["value"] is None:
            interval = "not measured"
            reasons.setdefault(m["why"], []).append(m["name"])
        value = "-" if m["value"] is None else f"{m['value']:.5g}"
        counts = [_count(m.get(key)) if key in m else "" for key in ("samples", "reference")]
        rows.append([m["name"], value, interval, m["extractor"], *counts])
    pairs = result.get("reconstruction", {})
    for key, name in (("psnr", "PSNR (dB)"), ("ssim", "SSIM"), ("ms_ssim", "MS-SSIM"), ("lpips", "LPIPS")):
        about = pairs.get(key)
        if about is not None and "mean" in about:
            interval = f"standard error {about['standard_error']:.3g}" if about.get("standard_error") else ""
            rows.append([name, f"{about['mean']:.5g}", interval, "pairs of pixels", *[_count(pairs.get("images"))] * 2])
        elif about is not None:
            rows.append([name, "-", "not measured", "pairs of pixels", "", ""])
            reasons.setdefault(about["reason"], []).append(name)
    return rows, [f"Not measured: {', '.join(names)}: {why.rstrip('.')}." for why, names in reasons.items()]


def _how(result: dict[str, Any]) -> list[list[str]]:
    rows = [["what", "how"]]
    for key in ("samples", "reference", "floor"):
        about = result.get(key)
        if about is None:
            continue
        labels = about["labels"]
        said = "labels not known"
        if labels is not None:
            balance = "equal" if labels["equal"] else "not equal"
            each = f"{labels['least']:,}" + (f" to {labels['most']:,}" if labels["most"] > labels["least"] else "")
            said = f"{labels['classes']:,} class{'es' * (labels['classes'] > 1)}, {each} images each ({balance})"
        pixels = f"{about['images']:,} images of {about['pixels']} px, {about['treatment']}, {said}"
        rows.append([key, f"{about['path']}: {pixels if about['images'] else 'statistics alone'}"])
    for extractor in result["extractors"]:
        name, stored = extractor["extractor"], result["statistics"][extractor["extractor"]]
        parts = [str(extractor[key]) for key in ("network", "library", "layer", "resize") if key in extractor]
        weights = f"weights {extractor['weights']}" if "weights" in extractor else ""
        digest = f"sha256 {extractor['weights_sha256']}" if "weights_sha256" in extractor else ""
        how = "; ".join(p for p in (*parts, weights, digest, extractor["precision"]) if p)
        rows.append([name, f"{how}; reference statistics: {stored}"])
    pairs = result.get("reconstruction")
    if pairs is not None:
        methods = [
            f"{name} {pairs[name]['how']}" for name in ("psnr", "ssim", "ms_ssim", "lpips") if "how" in pairs[name]
        ]
        rows.append(["pairs", "; ".join([f"{pairs['pairs']}, {pairs['pixels']}", *methods])])
    return rows


def _count(value: int | None) -> str:
    return "not known" if value is None else f"{value:,}"


def _rows(rows: list[list[str]]) -> list[str]:
    escaped = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    lines = ["| " + " | ".join(row) + " |" for row in escaped]
    return [lines[0], "|" + "---|" * len(rows[0]), *lines[1:]]


def _columns(rows: list[list[str]]) -> list[str]:
    # the last column may be long, so that it sets no width
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]) - 1)]
    return ["  ".join([*(c.ljust(w) for c, w in zip(row, widths)), row[-1]]).rstrip() for row in rows]
