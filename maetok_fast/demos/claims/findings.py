# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""Records of all variants and seeds -> claims.json: means with errors, and for each claim whether it holds here.

A claim is a difference between two variants in one measure, paired by seed: the same first weights, order of images,
noise and labels. "holds": the mean difference has the claimed sign and lies beyond Student's one-sided 95 % for so many
seeds; "does not hold": the same with the other sign; else "not resolved". With one seed nothing is resolved.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from maetok_fast.analysis.probe import mean_and_error
from maetok_fast.bench.machine import describe
from maetok_fast.demos.claims.parts import Work
from maetok_fast.demos.claims.variants import LARGER, SIZE, TABLE, VARIANTS, Variant

__all__ = ["CLAIMS", "Claim", "collect_findings", "compared", "steps_to_equal", "summary"]

FORMAT = 1
STUDENT = (6.31, 2.92, 2.35, 2.13, 2.02, 1.94, 1.89, 1.86, 1.83)  # one-sided 95 % of 1, 2, ... degrees of freedom
BY_NAME = {variant.name: variant for variant in VARIANTS}
Record = dict[str, Any]
Value = Callable[[dict[str, Record]], float | None]  # of the records of one variant and seed, by part


def _of(part: str, *keys: str) -> Value:
    def value(records: dict[str, Record]) -> float | None:
        found: Any = records.get(part)
        for key in keys:
            found = None if found is None else found.get(key)
        return None if found is None else float(found)

    return value


def _likelihood(covariance: str, modes: int | None = None) -> Value:
    """Held-out, at this number of modes; None: at the best one."""

    def value(records: dict[str, Record]) -> float | None:
        points = records.get("density", {}).get(covariance)
        if not points:
            return None
        found = [held for count, _, held in points if modes in (None, count)]
        return min(found) if found else None

    return value


def _last_loss(records: dict[str, Record]) -> float | None:
    loss = records.get("generator", {}).get("loss")
    return float(loss[-1][1]) if loss else None


class Measure(NamedTuple):
    """title: with its unit. digits: after the point. better: "lower" or "higher"."""

    title: str
    value: Value
    digits: int
    better: str


MEASURES: dict[str, Measure] = {
    "psnr_stage_1": Measure("PSNR before stage 2, dB", _of("tokenizer", "psnr_stage_1"), 2, "higher"),
    "psnr": Measure("PSNR, dB", _of("tokenizer", "psnr"), 2, "higher"),
    "rfd": Measure("rFD", _of("tokenizer", "rfd", "classifier"), 3, "lower"),
    "rfd_pixels": Measure("rFD of pixels", _of("tokenizer", "rfd", "pixels"), 3, "lower"),
    "probe_pooled": Measure("probe, pooled", _of("tokenizer", "probe_pooled"), 4, "higher"),
    "probe_flat": Measure("probe, flattened", _of("tokenizer", "probe_flat"), 4, "higher"),
    "components_90": Measure("components of 90 %", _of("tokenizer", "components_90"), 0, "lower"),
    "nll": Measure("held-out NLL, full covariances", _likelihood("full"), 4, "lower"),
    "nll_diag": Measure("held-out NLL, diagonal", _likelihood("diag"), 4, "lower"),
    "loss": Measure("diffusion loss", _last_loss, 4, "lower"),
    "gfd": Measure("gFD", _of("generator", "gfd", "classifier"), 3, "lower"),
    "gfd_pixels": Measure("gFD of pixels", _of("generator", "gfd", "pixels"), 3, "lower"),
    "gfd_own": Measure("gFD to reconstructions", _of("generator", "gfd_own", "classifier"), 3, "lower"),
    "recognised": Measure("samples recognised", _of("generator", "recognised"), 4, "higher"),
    f"mixed_{SIZE}": Measure(f"PSNR at {SIZE} px, fine-tuned", _of("mixed", f"after_{SIZE}", "psnr"), 2, "higher"),
    f"mixed_{LARGER}": Measure(
        f"PSNR at {LARGER} px, fine-tuned", _of("mixed", f"after_{LARGER}", "psnr"), 2, "higher"
    ),
}


class Claim(NamedTuple):
    """`better` is better than `than` in `measure`. says: the claim; paper: what it reports."""

    says: str
    measure: str
    better: str
    than: str
    paper: str = ""


CLAIMS = (
    *(
        Claim(f"{says} than {BY_NAME[than].title}", measure, "maetok", than, paper)
        for measure, says, paper in (
            ("nll", "MAETok's latents are likelier under a Gaussian mixture, held out,", "Figure 2"),
            ("probe_pooled", "A probe tells MAETok's latents, mean-pooled, apart better", "72.3 %; VA-VAE 54.1 %"),
            ("probe_flat", "A probe tells MAETok's latents, flattened, apart better", "72.3 %; VA-VAE 54.1 %"),
            ("loss", "MAETok's latents have a lower diffusion loss at equal steps", ""),
            ("gfd", "Samples of MAETok's latents are nearer to real images at equal steps", ""),
            ("gfd_own", "Samples of MAETok's latents are nearer to its own reconstructions at equal steps", ""),
        )
        for than in ("ae", "kl", "softvq")
    ),
    Claim("Masks help generation (with latent tokens and HOG)", "gfd", "maetok", "no-mask", "gFD 5.78 / 8.44"),
    Claim("Masks help generation (latent tokens alone)", "gfd", "no-target", "ae", "gFD 17.18 / 24.47"),
    Claim("Masks help generation (image tokens, HOG)", "gfd", "no-latents", "target-only", "gFD 6.85 / 9.88"),
    Claim("Auxiliary targets help generation", "gfd", "maetok", "no-target", "gFD 5.78 / 17.18"),
    Claim("Latent tokens help generation", "gfd", "maetok", "no-latents", "gFD 5.78 / 6.85"),
    Claim("Masks cost reconstruction", "rfd", "no-mask", "maetok", "rFD .64 / .85"),
    Claim(f"Rotary positions reconstruct better at {SIZE} px after mixed-resolution fine-tuning", f"mixed_{SIZE}",
          "maetok", "learned", "rFD at 256 px .51 / .73"),
    Claim(f"Rotary positions reconstruct better at {LARGER} px after mixed-resolution fine-tuning", f"mixed_{LARGER}",
          "maetok", "learned", "rFD at 512 px .72 / 1.43"),
)  # fmt: skip


def summary(values: Sequence[float | None]) -> dict[str, Any] | None:
    """mean, error (the standard error of the mean; None of one value) and the values; None where there are none."""
    known = [v for v in values if v is not None]
    return mean_and_error(known) if known else None


def compared(better: Sequence[float], than: Sequence[float], falling: bool) -> dict[str, Any]:
    """The verdict about values paired by seed. falling: less is better."""
    gains = [(b - a) if falling else (a - b) for a, b in zip(better, than)]
    found = summary(gains) or {"mean": math.nan, "error": None, "values": []}
    error, mean = found["error"], found["mean"]
    freedom = len(gains) - 1
    if error is None or abs(mean) <= STUDENT[min(freedom, len(STUDENT)) - 1] * error:
        verdict = "not resolved"
    else:
        verdict = "holds" if mean > 0 else "does not hold"
    return {"gain": found, "verdict": verdict}


def steps_to_equal(fast: Sequence[tuple[int, float]], slow: Sequence[tuple[int, float]]) -> dict[str, Any]:
    """How many times fewer steps `fast` needs for what `slow` has at its last one: curves of (step, distance), less is
    better, linear between two steps. bound: "" or "at least" (it is there at its first point), "at most" (it never is:
    then the other way round, how far `slow` is when it has what `fast` has at last)."""
    last, wanted = slow[-1]
    step = _reached(fast, wanted)
    if step is not None:
        return {"factor": last / step, "bound": "at least" if step <= fast[0][0] else ""}
    end, had = fast[-1]
    step = _reached(slow, had)
    if step is None:  # not even slow comes to it: curves that are not of one kind
        return {"factor": None, "bound": ""}
    return {"factor": step / end, "bound": "at most" if step <= slow[0][0] else ""}


def _reached(curve: Sequence[tuple[int, float]], value: float) -> float | None:
    """The first step at which the curve is as low as this."""
    before: tuple[int, float] | None = None
    for step, here in curve:
        if here <= value:
            if before is None or before[1] == here:
                return float(step)
            return before[0] + (step - before[0]) * (before[1] - value) / (before[1] - here)
        before = step, here
    return None


def collect_findings(work: Work, seeds: int, quick: bool) -> dict[str, Any]:
    """What claims.json holds, of the records that are there."""
    parts = ("tokenizer", "generator", "density", "mixed", "guidance")
    records = {
        v.name: [{p: r for p in parts if (r := work.read(p, v, seed)) is not None} for seed in range(seeds)]
        for v in VARIANTS
    }
    variants = {v.name: _about(v) | {"measures": _measured(records[v.name])} for v in VARIANTS}
    for name, of_seeds in records.items():
        variants[name]["curves"] = _curves(of_seeds)
    return {
        "format": FORMAT,
        "quick": quick,
        "seeds": seeds,
        "data": work.data,
        "test": work.test,
        "components": work.components,
        "settings": vars(work.scale),
        "judge": {"accuracy": work.judge.accuracy, "floor": work.judge.floor},
        "variants": variants,
        "table": [v.name for v in TABLE],
        "claims": [_decided(claim, records) for claim in CLAIMS],
        "guidance": _guidance(records["maetok"]),
        "mixed": {name: _mixed(records[name]) for name in ("maetok", "learned")},
        "steps_to_equal": _equal(records),
        "seconds": {p: sum(r[p]["seconds"] for rs in records.values() for r in rs if p in r) for p in parts},
        "machine": describe(torch.device("cpu")),
    }


def _about(variant: Variant) -> dict[str, Any]:
    return {
        "title": variant.title, "mask": variant.mask, "latents": variant.latents, "target": variant.target,
        "bottleneck": variant.bottleneck, "tokens": variant.tokens, "width": variant.model.latent_dim,
    }  # fmt: skip


def _measured(of_seeds: list[dict[str, Record]]) -> dict[str, Any]:
    found = {name: summary([measure.value(records) for records in of_seeds]) for name, measure in MEASURES.items()}
    return {name: value for name, value in found.items() if value is not None}


def _curves(of_seeds: list[dict[str, Record]]) -> dict[str, Any]:
    """Points [x, mean, error] over seeds: mixtures against modes, loss and distances against steps."""
    found: dict[str, Any] = {}
    for covariance in ("full", "diag"):
        points = [[(m, held) for m, _, held in r["density"][covariance]] for r in of_seeds if "density" in r]
        found[f"nll_{covariance}"] = _averaged(points)
    generators = [r["generator"] for r in of_seeds if "generator" in r]
    found["loss"] = _averaged([[(step, value) for step, value in g["loss"]] for g in generators])
    for space in ("classifier", "pixels"):
        for key in ("fd", "own"):
            curves = [[(p["step"], p[key][space]) for p in g["curve"]] for g in generators]
            found[f"{key}_{space}"] = _averaged(curves)
    return {name: points for name, points in found.items() if points}


def _averaged(curves: list[list[tuple[int, float]]]) -> list[list[float | None]]:
    found = []
    for points in zip(*curves):
        said = summary([value for _, value in points])
        assert said is not None
        found.append([points[0][0], said["mean"], said["error"]])
    return found


def _decided(claim: Claim, records: dict[str, list[dict[str, Record]]]) -> dict[str, Any]:
    measure = MEASURES[claim.measure]
    pairs = [
        (a, b)
        for mine, other in zip(records[claim.better], records[claim.than])
        if (a := measure.value(mine)) is not None and (b := measure.value(other)) is not None
    ]
    mine, other = [a for a, _ in pairs], [b for _, b in pairs]
    told: dict[str, Any] = {"values": {"better": summary(mine), "than": summary(other)}}
    told |= compared(mine, other, measure.better == "lower")
    told |= {"title": measure.title, "digits": measure.digits}
    return claim._asdict() | told


def _guidance(of_seeds: list[dict[str, Record]]) -> list[dict[str, Any]]:
    found = []
    rows = [r["guidance"]["rows"] for r in of_seeds if "guidance" in r]
    for same in zip(*rows):
        found.append(
            {
                "name": same[0]["name"],
                "strength": same[0]["strength"],
                "gfd": summary([row["gfd"]["classifier"] for row in same]),
                "gfd_pixels": summary([row["gfd"]["pixels"] for row in same]),
                "recognised": summary([row["recognised"] for row in same]),
            }
        )
    return found


def _mixed(of_seeds: list[dict[str, Record]]) -> dict[str, Any]:
    """Of each size, before and after fine-tuning."""
    found = {}
    for when in ("before", "after"):
        for size in (SIZE, LARGER):
            for name, keys in (("psnr", ("psnr",)), ("rfd", ("rfd", "classifier"))):
                value = _of("mixed", f"{when}_{size}", *keys)
                found[f"{when}_{size}_{name}"] = summary([value(records) for records in of_seeds])
    return found


def _equal(records: dict[str, list[dict[str, Record]]]) -> dict[str, Any]:
    """MAETok's latent tokens against the KL-VAE of four times as many image tokens, for each seed and space."""
    found: dict[str, Any] = {"fast": "maetok", "slow": "kl-2d"}
    for key, name in (("fd", ""), ("own", "_own")):
        for space in ("classifier", "pixels"):
            factors = []
            for fast, slow in zip(records["maetok"], records["kl-2d"]):
                if "generator" in fast and "generator" in slow:
                    curves = ([(p["step"], p[key][space]) for p in r["generator"]["curve"]] for r in (fast, slow))
                    factors.append(steps_to_equal(*curves))
            found[space + name] = {"seeds": factors, "factor": summary([f["factor"] for f in factors])}
    decoded, wanted = (
        summary([value(r) for r in records[name]])
        for name, value in (("maetok", MEASURES["rfd"].value), ("kl-2d", MEASURES["gfd"].value))
    )
    # beyond what its decoder loses no generator brings it
    found["reachable"] = decoded is not None and wanted is not None and decoded["mean"] < wanted["mean"]
    return found
