# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""Gaussian mixtures of latents: how many modes a latent space has, by the likelihood of rows that were held out.

    tokenizer's latents (N, L, H) ── fit_pca, WhitenedRows ──> rows (N, K), standardised ── nll_curve ──> CurvePoint of
    each number of modes and seed: negative log likelihood a dimension, of the rows that it was fitted to and of others

    fit_gmm:  seeding.py start ──> em.py passes ──> mixture.py GMM, the best of its restarts by the lower bound

The same torch code runs on a CPU and on CUDA, without cupy. Memory is that of a block (16 MB), of its densities, and of
the parameters, K D^2 numbers a few times in fp64; it does not depend on N. The result is a function of the rows, the
configuration, the device and the number of threads.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from maetok_fast.analysis.densities import Parameters
from maetok_fast.analysis.em import KAPPA, Statistics, expectation, maximise
from maetok_fast.analysis.mixture import DTYPES, GMM, block_size
from maetok_fast.analysis.rows import Rows
from maetok_fast.analysis.seeding import sampled, seeded
from maetok_fast.checks import check_integers, check_number, check_positive

__all__ = ["GMM", "MODES", "CurvePoint", "GMMConfig", "fit_gmm", "nll_curve"]

MODES = (1, 2, 5, 10, 20, 50, 100, 200)
COVARIANCES, INITS = ("full", "diag"), ("kmeans++", "random")
START = 0x676D6D  # the streams of random numbers that a start draws from


@dataclass(frozen=True)
class GMMConfig:
    """How a mixture is fitted.

    modes            K
    covariance       of each mode: "full" or "diag"
    iterations       passes over the rows at most, of each restart
    tolerance        in nats a row: a pass that changes the lower bound by less is the last one; 0: never
    regularisation   added to every variance after each pass, in the rows' units squared
    init             where EM starts: "kmeans++" (with k-means behind it, on a sample), or "random" rows
    restarts         starts from other seeds; the one of the highest lower bound counts
    seed             of all random numbers
    batch            None: every pass is a step of EM. A number: stepwise EM over random batches of so many rows, for
                     rows so many that a few passes have to do; a few times modes x dimensions at least
    precision        of a block's products: "fp32" (torch's own: leave TF32 off), or "fp64"; sums between blocks are
                     always in fp64
    """

    modes: int
    covariance: str = "full"
    iterations: int = 100
    tolerance: float = 1e-3
    regularisation: float = 1e-6
    init: str = "kmeans++"
    restarts: int = 1
    seed: int = 0
    batch: int | None = None
    precision: str = "fp32"

    def __post_init__(self) -> None:
        check_positive("GMMConfig", modes=self.modes, iterations=self.iterations, restarts=self.restarts)
        if self.batch is not None:
            check_positive("GMMConfig", batch=self.batch)
        check_integers("GMMConfig", seed=self.seed)
        check_number("GMMConfig", "seed", self.seed, 0)
        check_number("GMMConfig", "tolerance", self.tolerance, 0)
        check_number("GMMConfig", "regularisation", self.regularisation, 0)
        for name, values in (("covariance", COVARIANCES), ("init", INITS), ("precision", tuple(DTYPES))):
            if getattr(self, name) not in values:
                raise ValueError(f"GMMConfig: {name} must be one of {', '.join(values)}, got {getattr(self, name)!r}")


@dataclass(frozen=True)
class CurvePoint:
    """modes, seed: of the fit. train_nll, held_out_nll: nats a dimension, of the rows as they are (standardised, where
    they are). train_nll_unscaled, held_out_nll_unscaled: with the sum of log std added back (`Rows.log_scale`), in the
    units before the rows were standardised. seconds: of the fit. iterations, converged: of its EM. emptied: how many
    modes lost their rows."""

    modes: int
    seed: int
    train_nll: float
    held_out_nll: float
    train_nll_unscaled: float
    held_out_nll_unscaled: float
    seconds: float
    iterations: int
    converged: bool
    emptied: int


def fit_gmm(
    rows: Rows,
    config: GMMConfig,
    device: torch.device | str = "cpu",
    tick: Callable[[str], None] = lambda said: None,
    start: GMM | None = None,
) -> GMM:
    """A mixture of `config.modes` Gaussians fitted to rows (N, D). tick: called after each pass with a line that says
    where the fit is. start: a mixture to start from, in place of the seeded ones.

    ValueError for fewer rows than modes, for a start of another shape, and for rows without any spread.
    """
    if len(rows) < config.modes:
        raise ValueError(f"{rows.name}: {config.modes} modes need as many rows at least, got {len(rows)}")
    full = config.covariance == "full"
    if start is not None and (start.modes, start.dim, start.covariance) != (config.modes, rows.dim, config.covariance):
        raise ValueError(
            f"fit_gmm: expected a start of {config.modes} modes, {rows.dim} dimensions and {config.covariance} "
            f"covariances, got {start.modes}, {start.dim} and {start.covariance}"
        )
    best: GMM | None = None
    for restart in range(1 if start is not None else config.restarts):
        rng = np.random.Generator(np.random.Philox(key=[config.seed, START + restart]))
        if start is not None:
            first = start.parameters
        else:
            sample = sampled(rows, config.modes, rng)
            first = seeded(sample, config.modes, full, config.init, config.regularisation, rng)
            del sample
        found = _passes(rows, config, first, torch.device(device), rng, tick, restart)
        if best is None or found.lower_bound > best.lower_bound:
            best = found
    assert best is not None
    return best


def _passes(
    rows: Rows, config: GMMConfig, now: Parameters, device: torch.device, rng: np.random.Generator,
    tick: Callable[[str], None], restart: int,
) -> GMM:  # fmt: skip
    history: list[float] = []
    converged = False
    running: Statistics | None = None
    for iteration in range(config.iterations):
        if config.batch is None:
            blocks = rows.blocks(block_size(rows.dim, config.modes))
            found = expectation(blocks, now, rows.dtype, DTYPES[config.precision], device)
            now, bound = maximise(found, now, 1.0, config.regularisation), found.total / found.rows
        else:
            now, running, bound = _steps(rows, config, now, device, rng, running, iteration)
        history.append(bound)
        tick(f"{config.modes} modes, start {restart + 1} of {config.restarts}, pass {iteration + 1}: {bound:.4f} nats")
        converged = len(history) > 1 and abs(bound - history[-2]) < config.tolerance
        if converged:
            break
    return GMM(
        now.weights, now.means, now.factors, converged, len(history), tuple(history), config.seed, config.precision,
        device,
    )  # fmt: skip


def _steps(
    rows: Rows, config: GMMConfig, now: Parameters, device: torch.device, rng: np.random.Generator,
    running: Statistics | None, iteration: int,
) -> tuple[Parameters, Statistics, float]:  # fmt: skip
    """A pass of stepwise EM: (parameters, running statistics, mean log likelihood of each batch before its step)."""
    assert config.batch is not None
    order, total = rng.permutation(len(rows)), 0.0
    parts = np.array_split(order, max(1, len(rows) // config.batch))
    size = block_size(rows.dim, config.modes)
    for i, places in enumerate(parts):
        blocks = (rows.take(places[first : first + size]) for first in range(0, len(places), size))
        batch = expectation(blocks, now, rows.dtype, DTYPES[config.precision], device)
        total += batch.total
        step = iteration * len(parts) + i
        running = (Statistics.of(now) if running is None else running).blended(batch.share(), (step + 2) ** -KAPPA)
        now = maximise(running, now, 1 / len(rows), config.regularisation)
    assert running is not None
    return now, running, total / len(rows)


def nll_curve(
    train_rows: Rows,
    held_out_rows: Rows,
    modes: Sequence[int] = MODES,
    seeds: Sequence[int] = (0,),
    config: GMMConfig | None = None,
    device: torch.device | str = "cpu",
    tick: Callable[[str], None] = lambda said: None,
) -> list[CurvePoint]:
    """Fits of every number of modes with every seed to train_rows, each scored on both; in this order. config: how they
    are fitted, all but modes and seed; None: the defaults.

    Rows that cost to read (through a PCA) are passed many times: `.stored()` them before. ValueError where the two have
    not the same dimensions or units.
    """
    if train_rows.dim != held_out_rows.dim:
        raise ValueError(f"nll_curve: rows of {train_rows.dim} and of {held_out_rows.dim} dimensions do not compare")
    if not math.isclose(train_rows.log_scale, held_out_rows.log_scale, rel_tol=1e-9, abs_tol=1e-9):
        raise ValueError("nll_curve: the two sets of rows are standardised differently; use one PCA for both")
    config = GMMConfig(1) if config is None else config
    points = []
    shift = train_rows.log_scale / train_rows.dim
    for count in modes:
        for seed in seeds:
            began = time.perf_counter()
            found = fit_gmm(train_rows, replace(config, modes=count, seed=seed), device, tick)
            seconds = time.perf_counter() - began
            train, held_out = found.nll_per_dimension(train_rows), found.nll_per_dimension(held_out_rows)
            scores = (train, held_out, train + shift, held_out + shift)
            ended = (found.iterations, found.converged, len(found.emptied))
            points.append(CurvePoint(count, seed, *scores, seconds, *ended))
    return points
