# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""How many modes the latents of each tokenizer have: held-out likelihoods of Gaussian mixtures, all of one dimension.

    each tokenizer's PCA ── its K for 90 % of the variance ── the largest K for all ── standardised ── nll_curve

One K, because a likelihood per dimension depends on how many dimensions there are. Standardised rows of whichever
tokenizer have the same NLL under one Gaussian (1.4189 on the training rows), so that lines start together and show what
more modes gain. The unscaled NLL, with the sum of log std added back, depends on a latent's units, and is in the JSON.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from maetok_fast.analysis.gmm import GMMConfig, nll_curve
from maetok_fast.analysis.pca import PCA, WhitenedRows, fit_pca
from maetok_fast.analysis.probe import mean_and_error
from maetok_fast.analysis.rows import Rows
from maetok_fast.analysis.settings import Settings
from maetok_fast.analysis.sources import MOST_BYTES, Subject
from maetok_fast.analysis.store import Store
from maetok_fast.pipeline.run import RunError, make_folder

__all__ = ["Components", "mixtures", "modes_for"]

Tick = Callable[[str], None]


class Components:
    """The PCA of each subject's training rows, computed once and where it is needed."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self._found: dict[str, PCA] = {}

    def of(self, subject: Subject) -> PCA:
        """With the K that explains more than the settings' variance."""
        if subject.name not in self._found:
            rows = subject.train.rows
            self._found[subject.name] = fit_pca(rows, self.settings.variance, device=self.settings.device)
        return self._found[subject.name]

    def told(self, subject: Subject, store: Store) -> dict[str, Any]:
        """{"components": K, "dims": D, "explained": the share after 1 .. D components}."""

        def compute() -> dict[str, Any]:
            pca = self.of(subject)
            explained = [round(v, 6) for v in pca.explained.tolist()]
            return {"components": pca.components, "dims": len(pca.mean), "explained": explained}

        key = {"rows": subject.train.digest, "variance": self.settings.variance}
        return store.unit(("pca", subject.name), key, compute)


def mixtures(
    subjects: Sequence[Subject], settings: Settings, store: Store, components: Components, tick: Tick
) -> dict[str, dict[str, Any]]:
    """For each subject: "components" K, "own_components", "explained" by K, "curve": for each number of modes the train
    and held-out NLL (nats per dimension: mean and error over seeds), and "reach": the modes needed for NLLs that all
    subjects reach. RunError where K components cannot be had, or not one of the numbers of modes."""
    told = {s.name: components.told(s, store) for s in subjects}
    count = settings.components or max(one["components"] for one in told.values())
    for s in subjects:
        if count > told[s.name]["dims"]:
            raise RunError(
                f"{s.name}: {count} components asked for, its latents have {told[s.name]['dims']} dimensions; give "
                f"--components {min(one['dims'] for one in told.values())} or less"
            )
        if min(settings.modes) > len(s.train):
            raise RunError(
                f"{s.name}: mixtures of {min(settings.modes)} modes and more need as many training rows, there are "
                f"{len(s.train)}; give smaller --modes, or more images"
            )
    found = {}
    for s in subjects:
        modes = [m for m in settings.modes if m <= len(s.train)]
        rows = _Standardised(s, count, components, store.out / "rows", settings.device)
        curve = [_point(s, m, rows, settings, store, tick) for m in modes]
        rows.remove()
        explained = told[s.name]["explained"][count - 1]
        found[s.name] = {"components": count, "own_components": told[s.name]["components"], "explained": explained}
        found[s.name] |= {"dims": told[s.name]["dims"], "covariance": settings.covariance, "curve": curve}
        found[s.name]["too_many_modes"] = [m for m in settings.modes if m > len(s.train)]
    best = max(min(p["held_out"]["mean"] for p in one["curve"]) for one in found.values())
    start = max(one["curve"][0]["held_out"]["mean"] for one in found.values())
    for one in found.values():
        targets = [(start + best) / 2, best]
        one["reach"] = [{"nll": t, "modes": modes_for(one["curve"], t)} for t in targets]
    return found


def modes_for(curve: Sequence[dict[str, Any]], nll: float) -> float | None:
    """How many modes the held-out NLL takes to come down to `nll`, between two numbers of modes by a straight line over
    their logarithms; None where it never does."""
    before: tuple[int, float] | None = None
    for point in curve:
        modes, here = point["modes"], point["held_out"]["mean"]
        if here <= nll:
            if before is None or before[1] == here:
                return float(modes)
            share = (before[1] - nll) / (before[1] - here)
            return math.exp(math.log(before[0]) + share * (math.log(modes) - math.log(before[0])))
        before = (modes, here)
    return None


class _Standardised:
    """A subject's training and held-out rows in K standardised components, made when they are asked for and kept for
    many passes: in memory, or in files where they are large."""

    def __init__(self, subject: Subject, count: int, components: Components, folder: Path, device: str) -> None:
        self.subject, self.count, self.components, self.folder, self.device = subject, count, components, folder, device
        self._found: list[Rows] = []
        self._files: list[Path] = []

    def get(self) -> list[Rows]:
        if not self._found:
            pca = self.components.of(self.subject).with_components(self.count)
            for name, side in (("train", self.subject.train), ("held-out", self.subject.held)):
                path = None
                if 4 * len(side) * self.count > MOST_BYTES:
                    make_folder(self.folder)
                    path = self.folder / f"{self.subject.name}-{name}.npy"
                    self._files.append(path)
                self._found.append(WhitenedRows(side.rows, pca, device=self.device).stored(path))
        return self._found

    def remove(self) -> None:
        for path in self._files:
            path.unlink(missing_ok=True)
        if self._files:
            self.folder.rmdir()


def _point(
    subject: Subject, modes: int, rows: _Standardised, settings: Settings, store: Store, tick: Tick
) -> dict[str, Any]:
    points = []
    for seed in range(settings.seeds):
        config = GMMConfig(1, covariance=settings.covariance)

        def compute(seed: int = seed, config: GMMConfig = config) -> dict[str, Any]:
            train, held = rows.get()
            (point,) = nll_curve(train, held, (modes,), (seed,), config, settings.device, tick)
            return vars(point)

        key = {
            "rows": subject.train.digest, "held_out": subject.held.digest, "components": rows.count, "modes": modes,
            "seed": seed, "config": repr(config),
        }  # fmt: skip
        points.append(store.unit(("gmm", subject.name, f"{modes}-{seed}"), key, compute))
    return {
        "modes": modes,
        "train": mean_and_error([p["train_nll"] for p in points]),
        "held_out": mean_and_error([p["held_out_nll"] for p in points]),
        "held_out_unscaled": mean_and_error([p["held_out_nll_unscaled"] for p in points]),
        "converged": sum(p["converged"] for p in points),
        "emptied": max(p["emptied"] for p in points),
        "seconds": sum(p["seconds"] for p in points),
    }
