# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""Linear probing: how well a linear classifier tells the classes from latents that it has not seen.

    x (N, D) ── standardised by the training rows ── softmax(W x + b) ── top-1 accuracy on held-out rows
    minimised: mean cross-entropy + RIDGE / 2 |W|^2            b is free, and both solvers minimise the same

    rows x features x classes up to LBFGS_WORK    scikit-learn's LogisticRegression (lbfgs) until it has converged
    more, or without scikit-learn                 mini-batch SGD in torch, Nesterov momentum 0.9, rate by a cosine to 0

The penalty is of the mean, so that it does not depend on the number of rows (scikit-learn's C = 1 does). SGD's rate is
1 / L, where L is the largest curvature that the loss can have: no rate is tuned.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from maetok_fast._optional import probe as find

__all__ = ["Probe", "error_of_share", "linear_probe", "mean_and_error", "probe_part", "standardise"]

RIDGE = 1e-3
LBFGS_WORK = 10**8
LBFGS_ITERATIONS = 2000
EPOCHS, STEPS, MOMENTUM, BATCH = 50, 5000, 0.9, 512  # as many epochs, and steps, at least
SHARE = 0.9  # of the training rows that each seed trains on
FRACTIONS = (0.01, 0.1)  # of labels
SOLVERS = ("auto", "lbfgs", "sgd")


class Probe(NamedTuple):
    """accuracy: top-1 on the held-out rows, in [0, 1]. solver: "lbfgs" or "sgd"; converged: None of SGD, which stops
    after its epochs. iterations: of lbfgs, or SGD's steps."""

    accuracy: float
    solver: str
    iterations: int
    converged: bool | None
    train: int
    held_out: int
    features: int
    classes: int


def standardise(train: np.ndarray, *others: np.ndarray) -> list[np.ndarray]:
    """Rows (N, D) fp32, each dimension with the training rows' mean 0 and deviation 1; a constant one becomes 0."""
    mean = train.mean(0, dtype=np.float64)
    # in one block a second copy in fp64 would be as large as all rows twice
    square = sum(((part - mean) ** 2).sum(0) for part in np.array_split(train, max(1, len(train) // 4096)))
    std = np.sqrt(square / len(train))
    # what differs by rounding alone is constant
    scale = np.where(std > 1e-6 * np.abs(mean) + 1e-12, 1 / np.maximum(std, 1e-30), 0)
    centre, factor = mean.astype(np.float32), scale.astype(np.float32)
    return [(part.astype(np.float32, copy=False) - centre) * factor for part in (train, *others)]


def linear_probe(
    train_x: np.ndarray | Tensor,
    train_y: np.ndarray | Tensor,
    test_x: np.ndarray | Tensor,
    test_y: np.ndarray | Tensor,
    seed: int = 0,
    *,
    solver: str = "auto",
    device: str | torch.device = "cpu",
) -> Probe:
    """The module's classifier of rows (N, ...), flattened, and integer labels (N,). seed: of SGD's batches; lbfgs has
    nothing random. solver: "auto" chooses by size. device: of SGD.
    ValueError where rows and labels do not pair up, or the training rows are of one class."""
    if solver not in SOLVERS:
        raise ValueError(f"unknown solver {solver!r}: expected one of {', '.join(SOLVERS)}")
    x, y = _pair("train", train_x, train_y)
    held, held_y = _pair("test", test_x, test_y)
    if x.shape[1] != held.shape[1]:
        raise ValueError(f"linear_probe: training rows have {x.shape[1]} features, test rows {held.shape[1]}")
    classes, numbers = np.unique(y, return_inverse=True)
    if len(classes) < 2:
        raise ValueError("linear_probe: the training rows are of one class, so that there is nothing to tell apart")
    x, held = standardise(x, held)
    if solver == "auto":
        small = x.size * len(classes) <= LBFGS_WORK and find("sklearn").state == "found"
        solver = "lbfgs" if small else "sgd"
    fit = _lbfgs if solver == "lbfgs" else _sgd
    guessed, iterations, converged = fit(x, numbers, held, len(classes), seed, torch.device(device))
    right = float((classes[guessed] == held_y).mean())
    return Probe(right, solver, iterations, converged, len(x), len(held), x.shape[1], len(classes))


def _pair(name: str, x: Any, y: Any) -> tuple[np.ndarray, np.ndarray]:
    rows = (x.detach().cpu().numpy() if isinstance(x, Tensor) else np.asarray(x)).astype(np.float32, copy=False)
    labels = y.detach().cpu().numpy() if isinstance(y, Tensor) else np.asarray(y)
    if rows.ndim < 2 or labels.shape != rows.shape[:1] or not len(rows) or labels.dtype.kind not in "iu":
        raise ValueError(
            f"linear_probe: expected {name} rows (N, D) and N integer labels, got {rows.shape} and {labels.dtype} "
            f"{labels.shape}"
        )
    return rows.reshape(len(rows), -1), labels


def _lbfgs(
    x: np.ndarray, y: np.ndarray, held: np.ndarray, classes: int, seed: int, device: torch.device
) -> tuple[np.ndarray, int, bool | None]:
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # the result says it
        model = LogisticRegression(C=1 / (RIDGE * len(x)), max_iter=LBFGS_ITERATIONS).fit(x, y)
    count = int(np.max(model.n_iter_))
    return model.predict(held), count, count < LBFGS_ITERATIONS


def _sgd(
    x: np.ndarray, y: np.ndarray, held: np.ndarray, classes: int, seed: int, device: torch.device
) -> tuple[np.ndarray, int, bool | None]:
    rows, labels = torch.from_numpy(x).to(device), torch.from_numpy(y.astype(np.int64)).to(device)
    weight = torch.zeros(classes, rows.shape[1], device=device, requires_grad=True)
    bias = torch.zeros(classes, device=device, requires_grad=True)
    batch = min(BATCH, len(rows))
    per_epoch = len(rows) // batch
    total = max(EPOCHS * per_epoch, STEPS)
    rate = 1 / (_largest_moment(rows) / 2 + RIDGE)
    groups: list[dict[str, Any]] = [{"params": [weight], "weight_decay": RIDGE}, {"params": [bias]}]
    optimizer = torch.optim.SGD(groups, lr=rate, momentum=MOMENTUM, nesterov=True)
    generator = torch.Generator().manual_seed(seed)
    for step in range(total):
        if step % per_epoch == 0:
            order = torch.randperm(len(rows), generator=generator).to(device)
        for group in optimizer.param_groups:
            group["lr"] = rate * (1 + math.cos(math.pi * step / total)) / 2
        here = order[step % per_epoch * batch :][:batch]
        loss = F.cross_entropy(F.linear(rows[here], weight, bias), labels[here])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        parts = torch.from_numpy(held).split(8192)
        guessed = torch.cat([F.linear(part.to(device), weight, bias).argmax(1).cpu() for part in parts])
    return guessed.numpy(), total, None


def _largest_moment(rows: Tensor) -> float:
    """Of (N, D) rows with a 1 for the bias: the largest eigenvalue of the mean of x x^T, by power iteration. Half of it
    bounds the curvature of the softmax's cross-entropy (Boehning 1992)."""
    some = rows[:: max(1, len(rows) // 16384)]
    some = torch.cat([some, torch.ones(len(some), 1, device=some.device)], dim=1)
    vector = torch.ones(some.shape[1], device=some.device)
    value = 1.0
    for _ in range(30):
        vector = some.T @ (some @ (vector / vector.norm())) / len(some)
        value = float(vector.norm())
    return 1.1 * value  # the iteration comes from below


def mean_and_error(values: Sequence[float]) -> dict[str, Any]:
    """{"mean", "error": the standard error of the mean (None of one value), "values"}."""
    spread = float(np.std(values, ddof=1) / math.sqrt(len(values))) if len(values) > 1 else None
    return {"mean": float(np.mean(values)), "error": spread, "values": [float(v) for v in values]}


def error_of_share(share: float, rows: int) -> float:
    """The standard error of a share of so many rows, with two successes and two failures more (Agresti, Coull 1998): a
    share of 100 % is no certainty."""
    likely = (share * rows + 2) / (rows + 4)
    return math.sqrt(likely * (1 - likely) / (rows + 4))


def _accuracies(values: Sequence[float], rows: int) -> dict[str, Any]:
    """Of seeds, over so many held-out rows. "error": of seeds alone, "error_all": with that of the rows' own sample."""
    found = mean_and_error(values)
    return found | {"error_all": math.hypot(found["error"] or 0.0, error_of_share(found["mean"], rows))}


def probe_part(
    train: np.ndarray,
    train_y: np.ndarray,
    held: np.ndarray,
    held_y: np.ndarray,
    seeds: int,
    *,
    device: str | torch.device = "cpu",
    tick: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Probes of latents (N, L, C), mean-pooled over tokens and flattened: each seed trains on another SHARE of the
    training rows. Beside it the accuracy with few labels, drawn in proportion to the classes, of flattened latents."""
    found: dict[str, Any] = {"how": f"each seed trains on another {SHARE:.0%} of the training rows; penalty {RIDGE:g}"}
    for name, pooled in (("pooled", True), ("flattened", False)):
        x, test = (part.mean(1) if pooled else part.reshape(len(part), -1) for part in (train, held))
        probes = []
        for seed in range(seeds):
            tick(f"{name}, seed {seed}")
            rows = _drawn(train_y, SHARE, seed)
            probes.append(linear_probe(x[rows], train_y[rows], test, held_y, seed, device=device))
        found[name] = _accuracies([p.accuracy for p in probes], len(held)) | {
            "solver": probes[0].solver,
            "iterations": [p.iterations for p in probes],
            "converged": None if probes[0].converged is None else all(bool(p.converged) for p in probes),
            "rows": probes[0].train,
            "features": probes[0].features,
        }
    found |= {"held_out": len(held), "classes": len(np.unique(train_y))}
    found["fractions"] = _fractions(train, train_y, held, held_y, seeds, device, tick)
    return found


def _fractions(
    train: np.ndarray,
    train_y: np.ndarray,
    held: np.ndarray,
    held_y: np.ndarray,
    seeds: int,
    device: str | torch.device,
    tick: Callable[[str], None],
) -> list[dict[str, Any]]:
    """Accuracy with a part of the labels, where that leaves each class at least one."""
    x, test = train.reshape(len(train), -1), held.reshape(len(held), -1)
    least = np.unique(train_y, return_counts=True)[1].min()
    found = []
    for share in FRACTIONS:
        if share * least < 1:
            continue
        tick(f"{share:.0%} of the labels")
        draws = [_drawn(train_y, share, seed) for seed in range(seeds)]
        values = [
            linear_probe(x[rows], train_y[rows], test, held_y, seed, device=device).accuracy
            for seed, rows in enumerate(draws)
        ]
        found.append({"share": share, "rows": len(draws[0]), **_accuracies(values, len(held))})
    return found


def _drawn(labels: np.ndarray, share: float, seed: int) -> np.ndarray:
    """Places of so large a part of each class, at least one of it, ascending."""
    rng = np.random.Generator(np.random.Philox(key=seed))
    parts = [np.flatnonzero(labels == c) for c in np.unique(labels)]
    return np.sort(np.concatenate([rng.permutation(p)[: max(1, round(share * len(p)))] for p in parts]))
