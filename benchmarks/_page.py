# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""The page of one machine: what throughput.py, models.py and `maetok-fast bench ops` wrote, as Markdown."""

from __future__ import annotations

import re
from typing import Any

from benchmarks._report import COLUMNS, SIGNS, number
from maetok_fast.bench import table
from maetok_fast.bench.ops import Row

# the first that a processor has names its kind
KINDS = (
    ("amx_bf16", "amx"), ("avx512_bf16", "avx512bf16"), ("avx512f", "avx512"), ("avx2", "avx2"),
    ("sve", "sve"), ("asimd", "neon"),
)  # fmt: skip
TITLES = {"sit": "Prepared generator", "tokenizer": "Prepared tokenizer"}


def kind(machine: dict[str, Any]) -> str:
    """What the widest usable instructions are called."""
    return next((name for feature, name in KINDS if feature in machine["cpu_features"]), "generic")


def file_name(machine: dict[str, Any]) -> str:
    """vendor-core-instructions-cores, such as amd-zen5-avx512bf16-2c; a GPU's own name."""
    if "gpu" in machine:
        return _slug(machine["gpu"])
    vendor = {"AuthenticAMD": "amd", "GenuineIntel": "intel"}.get(machine.get("cpu_vendor", ""))
    parts = [vendor or _slug(machine["cpu"]), *_core(machine), kind(machine), f"{machine['cores']}c"]
    return "-".join([*parts, *(["limited"] if machine.get("limited_by") else [])])


def _core(machine: dict[str, Any]) -> list[str]:
    """AMD's generation by its family, as hosts hide the model's name; others' say nothing that `kind` does not."""
    if machine.get("cpu_vendor") != "AuthenticAMD":
        return []
    wide = "avx512f" in machine["cpu_features"]
    found = {23: "zen", 25: "zen4" if wide else "zen3", 26: "zen5"}.get(machine.get("cpu_family", 0))
    return [found] if found else []


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", re.sub(r"\((r|tm)\)", "", text.lower())).strip("-")


def page(documents: dict[str, dict[str, Any]], failed: dict[str, str], date: str, chart: str | None) -> str:
    """documents: part -> its JSON, failed: part -> why it is not there; `chart` the picture's name beside the page."""
    machine = next(iter(documents.values()))["machine"]
    out = [f"# Measured on {machine.get('gpu', machine['cpu'])}, {kind(machine)}", ""]
    if "gpu" in machine:
        out[0] = f"# Measured on {machine['gpu']}"
    out += [f"Written by `python benchmarks/measure.py` on {date}; not edited by hand.", ""]
    facts = {
        "processor": f"{machine['cpu']}, {machine['cores']} cores, {machine['threads']} threads",
        "instructions": ", ".join(machine["cpu_features"]) or "none that matter here",
        "memory": f"{machine['memory_gb']} GB",
        "software": f"torch {machine['torch']}, Python {machine['python']}, {machine['system']}",
    }
    if limited := machine.get("limited_by"):
        facts["limited by"] = ", ".join(limited)
    out += ["| | |", "|---|---|", *(f"| {name} | {_cell(text)} |" for name, text in facts.items()), ""]
    out += [f"**{part} failed**: {_cell(why)}\n" for part, why in failed.items()]
    if "throughput" in documents:
        out += throughput(documents["throughput"], chart)
    for part, title in TITLES.items():
        if part in documents:
            out += models(documents[part], title)
    if "ops" in documents:
        document = documents["ops"]
        document = document | {"rows": [Row.from_json(row) for row in document["rows"]]}
        out += ["## Ops", "", table.markdown(document, "maetok-fast bench ops --quick").replace("### ", "#### ")]
    return "\n".join(out).rstrip() + "\n"


def throughput(document: dict[str, Any], chart: str | None) -> list[str]:
    """Ceilings, rates, the two claims."""
    arguments, rates = document["arguments"], document["ceilings"]
    ceilings = [f"{key.split('_')[1]} matmul {number(v)} TFLOP/s" for key, v in rates.items() if key.startswith("gemm")]
    ceilings.append(f"copy {number(rates['copy_gb_s'])} GB/s")
    out = [
        "## Sampling, training, tokenizer",
        "",
        f"{arguments['model']}, {arguments['tokens']} tokens, {arguments['res']} px, {arguments['dtype']} "
        f"({'chosen' if arguments.get('precision') == 'auto' else 'asked for'}), {document['seconds']:.0f} s. "
        f"Ceilings in the run: {', '.join(ceilings)}. No sign: measured; †: computed from measured parts; ‡: cited; "
        f"§: of small images. Images per forward: {document['batch']['few']} at {arguments['tokens']} tokens, "
        f"{document['batch']['many']} at {(arguments['res'] // 16) ** 2}.",
        "",
        f"| configuration | {' | '.join(' '.join(heading.split()) for heading in COLUMNS.values())} |",
        "|---|" + "---:|" * len(COLUMNS),
    ]
    for row in document["rows"]:
        cells = [_value(row["values"].get(name)) for name in COLUMNS]
        out.append(f"| {row['label']} | {' | '.join(cells)} |")
    out.append("")
    if chart is not None:
        out += [f"![a dot for every rate of the run and for every factor of the claims]({chart})", ""]
    for claim in document["claims"]:
        out += [f"### {claim['title']}", "", "| factor | ratio | known by | what it compares |", "|---|---:|---|---|"]
        for factor in claim["factors"]:
            out.append(_factor(factor))
        out.append(f"| all factors | {number(claim['ratio'])}x | {claim['mark']} | |")
        out += [_factor(factor) for factor in claim["context"]]
        out.append("")
    notes = [*document["notes"], *(f"Left out: {line}." for line in document["left_out"])]
    return [*out, *(f"- {_cell(note)}" for note in notes), *([""] if notes else [])]


def _factor(factor: dict[str, Any]) -> str:
    return f"| {factor['name']} | {number(factor['ratio'])}x | {factor['mark']} | {_cell(factor['note'])} |"


def _value(value: dict[str, Any] | None) -> str:
    return "–" if value is None else f"{number(value['value'])}{SIGNS[value['mark']]}"


def models(document: dict[str, Any], title: str) -> list[str]:
    """One table for each of the run's: ms, how many times plain torch's, rate, share of the ceiling."""
    out = [f"## {title}", ""]
    for name in dict.fromkeys(row["table"] for row in document["rows"]):
        out += [f"### {name}", "", "| | ms | of plain torch | TFLOP/s | of the ceiling | samples |"]
        out.append("|---|---:|---:|---:|---:|---:|")
        for row in document["rows"]:
            if row["table"] == name:
                first = "–" if row["of_first"] is None else f"{row['of_first']:.2f} x"
                rated = row["tflops"] == row["tflops"]  # NaN: other work than the table's
                rate = [f"{row['tflops']:.2f}", f"{row['of_ceiling']:.0%}"] if rated else ["–", "–"]
                cells = [row["case"].strip(), f"{1e3 * row['seconds']:.4g}", first, *rate, str(row["samples"])]
                out.append(f"| {' | '.join(_cell(cell) for cell in cells)} |")
        out.append("")
    return [*out, *(f"- Left out: {_cell(line)}." for line in document["left_out"]), ""]


def _cell(text: str) -> str:
    return str(text).replace("|", "\\|").replace("\n", " ")
