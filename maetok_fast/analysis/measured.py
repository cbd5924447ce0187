# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""The parts of a comparison that are numbers: mixtures, probes, and what tokens are used for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from maetok_fast._optional import probe as find
from maetok_fast.analysis import figures
from maetok_fast.analysis.curves import mixtures
from maetok_fast.analysis.probe import RIDGE, probe_part
from maetok_fast.analysis.sources import MOST_BYTES, Side, Subject
from maetok_fast.analysis.usage import token_influence, token_usage
from maetok_fast.analysis.work import Found, Work

__all__ = ["gmm", "probes", "usage"]

USAGE_ROWS = 50_000


def gmm(work: Work) -> Found:
    settings = work.settings
    found = Found(
        "latents flattened, PCA of the training rows, one K for all (the largest of those that explain more than "
        f"{settings.variance:.0%} of each one's variance, or --components), each component divided by its deviation, "
        f"EM of {settings.covariance} covariances from k-means++ starts of {settings.seeds} seeds until a pass gains "
        "less than 0.001 nats a row or 100 passes; held-out NLL in nats per dimension, mean and standard error over "
        "seeds"
    )
    found.values = mixtures(work.subjects, settings, work.store, work.components, work.tick)
    if work.why_no_curves:
        found.lacks(work.why_no_curves)
    else:
        figures.draw_mixtures(work.out / "gmm.png", found.values)
        found.pictures["gmm.png"] = "Held-out NLL against the number of modes; bars are one standard error over seeds."
    for name, one in found.values.items():
        if one["too_many_modes"]:
            found.lacks(f"more modes asked for than there are training rows ({one['too_many_modes']})", name)
        if late := [p["modes"] for p in one["curve"] if p["converged"] < settings.seeds]:
            found.lacks(f"EM had not converged after 100 passes at {', '.join(map(str, late))} modes", name)
    return found


def probes(work: Work) -> Found:
    settings = work.settings
    found = Found(
        f"softmax regression on standardised latents, penalty {RIDGE:g} / 2 |W|^2 beside the mean cross-entropy; top-1 "
        f"on held-out rows, mean and standard error over {settings.seeds} seeds, each of which trains on another 90 % "
        "of the training rows. lbfgs is scikit-learn's; sgd is torch's with momentum and a cosine schedule, where rows "
        "x features x classes > 1e8"
    )
    for s in work.subjects:
        if not s.labelled:
            found.lacks("no labels, so nothing to probe for", s.name)
            continue
        if s.train.labels is not None and len(np.unique(s.train.labels)) < 2:
            found.lacks("all training rows are of one class, so nothing to tell apart", s.name)
            continue
        key = {"rows": s.digest, "seeds": settings.seeds, "seed": settings.seed, "sklearn": find("sklearn").version}

        def compute(tick: Callable[[str], None], s: Subject = s) -> dict[str, Any]:
            (x, y), (held, held_y) = (_labelled(side, side.fits, settings.seed) for side in (s.train, s.held))
            return probe_part(x, y, held, held_y, settings.seeds, device=settings.device, tick=tick)

        found.values[s.name] = work.unit(("probe", s.name), key, compute)
        if s.train.fits < len(s.train):
            found.lacks(
                f"a sample of {s.train.fits:,} training rows, as many as {MOST_BYTES / 1e9:.1f} GB hold", s.name
            )
        if any(found.values[s.name][kind]["converged"] is False for kind in ("pooled", "flattened")):
            found.lacks("lbfgs stopped before it had converged", s.name)
    if found.values and not work.why_no_curves:
        figures.draw_probes(work.out / "probe.png", found.values)
        found.pictures["probe.png"] = "Whiskers are one standard error, of seeds and of the held-out rows."
    return found


def _labelled(side: Side, most: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    assert side.labels is not None
    some = side.some(most, seed)
    return side.latents(some), side.labels[some]


def usage(work: Work) -> Found:
    settings = work.settings
    found = Found(
        f"covariance of at most {USAGE_ROWS:,} training rows, in blocks, fp64 up to 2048 dimensions; influence: of "
        f"{settings.images} held-out latents decoded with a token replaced by its mean over the training rows"
    )
    for s in work.subjects:
        picture = f"influence-{s.name}.png"
        draws = s.tokenizer is not None and not work.why_no_curves
        key = {"rows": s.digest, "weights": s.weights, "seed": settings.seed, "precision": settings.precision}
        key |= {"images": settings.images}

        def compute(
            tick: Callable[[str], None], s: Subject = s, picture: str = picture, draws: bool = draws
        ) -> dict[str, Any]:
            latents = s.train.latents(s.train.some(min(USAGE_ROWS, s.train.fits), settings.seed))
            told = token_usage(latents, settings.device)
            result: dict[str, Any] = {"dims": latents[0].size, "rows": told.rows}
            result |= {"effective_tokens": told.effective_tokens, "effective_rank": told.effective_rank}
            result |= {"correlation_mean": _off_diagonal(told.correlation)}
            result |= {name: getattr(told, name).tolist() for name in ("variance", "share", "rank")}
            result["correlation"] = told.correlation.round(4).tolist()
            if s.tokenizer is not None:
                held = torch.from_numpy(s.held.latents(s.held.some(settings.images, settings.seed)))
                mean = torch.from_numpy(latents.mean(0, dtype=np.float64).astype(np.float32))
                maps = token_influence(work.decoder(s), held, mean, settings.batch, tick)
                result["influence"] = [float(m) for m in maps.mean((1, 2))]
                if draws:
                    title = f"{s.name}: where the image changes without token t ({len(held)} images)"
                    figures.draw_influence(work.out / picture, maps, title)
            return result

        found.values[s.name] = work.unit(("usage", s.name), key, compute, [picture] if draws else [])
        if draws:
            found.pictures[picture] = f"{s.name}: each tile is a token, bright where the decoded image needs it."
        elif s.tokenizer is None:
            found.lacks("no tokenizer (--tokenizer NAME=PATH), so nobody knows what tokens change in images", s.name)
    if not work.why_no_curves:
        figures.draw_usage(work.out / "usage.png", found.values)
        figures.draw_correlations(work.out / "correlations.png", found.values)
        notes = {
            "usage.png": "Tokens sorted by their variance, and by how many dimensions they vary in.",
            "correlations.png": "How much every two tokens share: 0 nothing, 1 each is a rotation of the other.",
        }
        found.pictures = {**notes, **found.pictures}
    return found


def _off_diagonal(matrix: np.ndarray) -> float | None:
    """The mean of what is not on the diagonal; None of one token."""
    n = len(matrix)
    return float((matrix.sum() - np.trace(matrix)) / (n * (n - 1))) if n > 1 else None
