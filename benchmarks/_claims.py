# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""The two claims of the paper, factor by factor.

    a chain of configurations  r0 -> r1 -> ... -> rn, each changing one thing; factor i = rate(ri) / rate(ri-1)

so the factors' product is the end-to-end ratio by construction. Every line carries its mark: `measured` in this run,
`computed` from counts (or from measured parts), `small scale`: measured by `maetok-fast demo claims` on small images
(docs/claims.md), `cited` from the paper (arXiv 2502.03444).
"""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

MEASURED, COMPUTED, SMALL, CITED = "measured", "computed", "small scale", "cited"
FOUND = Path(__file__).resolve().parent.parent / "docs" / "measured" / "claims.json"  # what the claims' demo found

CLAIMED_INFERENCE = 3.12 / 0.1  # images/s at 512 px, SiT-XL, one A100: 128 against 1024 tokens
CLAIMED_TRAINING = 76.0
CITED_GFLOPS = (373.3, 48.5)  # the paper's own, 1024 and 128 tokens


@dataclass(frozen=True)
class Factor:
    """One line: what changed, by how much, how it is known, and from what to what."""

    name: str
    ratio: float
    mark: str
    note: str = ""


@dataclass(frozen=True)
class Claim:
    """factors multiply to `ratio`; context lines stand beside them and do not."""

    title: str
    factors: list[Factor]
    context: list[Factor] = field(default_factory=list)

    @property
    def ratio(self) -> float:
        return math.prod(factor.ratio for factor in self.factors)

    @property
    def mark(self) -> str:
        """The weakest mark among the factors: one cited factor makes the product partly cited."""
        marks = {factor.mark for factor in self.factors}
        return " x ".join(mark for mark in (MEASURED, COMPUTED, SMALL, CITED) if mark in marks)

    def to_json(self) -> dict:
        return asdict(self) | {"ratio": self.ratio, "mark": self.mark}


def chain(links: list[tuple[str, str]], rates: list[float]) -> list[Factor]:
    """Links (name, note) between len(links) + 1 measured rates -> factors."""
    pairs = zip(links, rates, rates[1:], strict=False)
    return [Factor(name, after / before, MEASURED, note) for (name, note), before, after in pairs]


def inference_context(gflops_many: float, gflops_few: float, decoders: tuple[float, float], nfe: int) -> list[Factor]:
    """Lines beside the inference factors: the cited claim and what counting says about it."""
    counted = gflops_many / gflops_few
    vae, ours = decoders
    share = vae / (vae + 2 * nfe * gflops_many)
    return [
        Factor("the paper's claim", CLAIMED_INFERENCE, CITED, "3.12 / 0.1 img/s, SiT-XL, 512 px, one A100"),
        Factor("its generator FLOPs", CITED_GFLOPS[0] / CITED_GFLOPS[1], CITED, "373.3 / 48.5 GFLOPs"),
        Factor("generator FLOPs", counted, COMPUTED, f"{gflops_many:.1f} / {gflops_few:.1f} GFLOPs, MAC x 2"),
        Factor(
            "left of the claim", CLAIMED_INFERENCE / counted, COMPUTED, "claim / counted FLOPs: the baseline's overhead"
        ),
        Factor(
            "decoder FLOPs",
            vae / ours,
            COMPUTED,
            f"SD-VAE {vae:.0f} / MAETok {ours:.0f} GFLOPs; {share:.1%} of a guided {nfe}-step run",
        ),
        Factor("sampling steps", 1.0, COMPUTED, f"the same {nfe} velocity evaluations everywhere"),
    ]


def training_context(per_step: float, counted: float) -> list[Factor]:
    """Lines beside the training factors: how much of the product was measured here."""
    return [
        Factor("the paper's claim", CLAIMED_TRAINING, CITED, "per-step speed x fewer steps than REPA, SiT-XL, 512 px"),
        Factor("per step alone", per_step, MEASURED, "the product without convergence: forward + backward per image"),
        Factor("generator FLOPs", counted, COMPUTED, "of the per-step part, what counting alone explains"),
    ]


# Fewer steps to the same quality is no matter of code: it is what the claim leaves after SiT-XL's counted FLOP ratio.
CONVERGENCE = Factor(
    "convergence",
    CLAIMED_TRAINING / 9.0,
    CITED,
    "fewer steps to REPA's quality: 76 / 9.0 (SiT-XL's counted FLOP ratio)",
)


def convergence(path: Path = FOUND) -> tuple[Factor, list[Factor]]:
    """Fewer steps to the same quality, and what stands beside it.

    What `maetok-fast demo claims` measured on small images where it says something, two seeds or more, with the cited
    factor as context. Where the few tokens' decoder alone loses more than the other's samples lack, no number of steps
    would do: then the cited factor stays, and what was measured is context; so it is with one seed."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        equal, settings = found["steps_to_equal"], found["settings"]
        fast, slow = (found["variants"][equal[key]] for key in ("fast", "slow"))
        told = {key: _mean_factor(equal[key]["seeds"]) for key in ("classifier", "classifier_own")}
        seeds = len(equal["classifier"]["seeds"])
        if found["quick"] or not seeds:
            return CONVERGENCE, []
    except (OSError, ValueError, KeyError, TypeError, ZeroDivisionError):
        return CONVERGENCE, []
    note = (
        f"{fast['tokens']} latent tokens to the distance that {slow['tokens']} image tokens have after "
        f"{settings['generated']:,} steps, {found['data']} at 32 px, {seeds} seed(s), docs/claims.md"
    )
    if equal["reachable"] and seeds > 1:
        measured = Factor("convergence", told["classifier"], SMALL, note)
        return measured, [replace(CONVERGENCE, name="the paper's convergence")]
    return CONVERGENCE, [
        Factor("on small images", told["classifier"], SMALL, note),
        Factor("the generator alone", told["classifier_own"], SMALL, "the same, to each one's own reconstructions"),
    ]


def _mean_factor(seeds: list[dict[str, Any]]) -> float:
    return math.exp(sum(math.log(one["factor"]) for one in seeds) / len(seeds))


def per_second(row: Any, name: str) -> float:
    """Images/s of one measured part of a row; 0.0 where it was not measured."""
    value = row.values.get(name) if row is not None else None
    if value is None:
        return 0.0
    return (value.batch or 1) / value.value if name == "train_forward_backward" else 1e3 / value.value


def claims_of(rows: dict[str, Any], counts: dict[str, float], args: argparse.Namespace, inside: int) -> list[Claim]:
    """Both claims from a run's rows (_report.Row by key); one with a missing link is left out. Where the fast
    precision is fp32 there is no precision factor. inside: steps that are guided within args.interval."""
    many, fast = (args.res // 16) ** 2, args.dtype
    keys = ["public-many-fp32", "public-few-fp32", f"public-few-{fast}", f"ours-few-{fast}"]
    links = [
        ("tokens", f"{many} -> {args.tokens} tokens, public code, fp32"),
        ("precision", f"fp32 -> {fast}, public code"),
        ("kernels", f"public code -> maetok_fast, {fast}, same work asked for"),
    ]
    if fast == "fp32":
        del keys[2], links[1]
    found = []
    sampled = [per_second(rows.get(key), "step") for key in keys]
    if all(sampled):
        context = inference_context(counts["many"], counts["few"], (counts["vae_decode"], counts["decode"]), args.steps)
        factors = chain(links, sampled)
        if "sample" in rows[keys[-1]].values:
            low, high = args.interval
            note = (
                f"both branches at all {args.steps} steps -> at the {inside} with t in [{low:g}, {high:g}]; public "
                "samplers that skip the unused branch (REPA's) have this already"
            )
            ratio = rows[keys[-1]].values["sample"].value * args.steps / sampled[-1]
            factors.append(Factor("guidance work", ratio, COMPUTED, note))
        found.append(Claim("Sampling rate: the 31x claim", factors, context))
    trained = [per_second(rows.get(key), "train_forward_backward") for key in keys]
    if all(trained):
        fewer, cited = convergence()
        context = [*training_context(trained[-1] / trained[0], counts["many"] / counts["few"]), *cited]
        factors = [*chain(links, trained), fewer]
        found.append(Claim("Training to equal quality: the 76x claim", factors, context))
    return found
