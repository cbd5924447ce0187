# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""A pass of EM for a Gaussian mixture, full or diagonal covariances: `fit_gmm`'s, and scikit-learn's GaussianMixture.

    python benchmarks/gmm.py                          50 000 rows, 64 to 256 dimensions, 20 to 100 modes
    python benchmarks/gmm.py --quick                  5 000 rows, two sizes
    python benchmarks/gmm.py --rows 20k --sizes 128x50,256x20 --covariances diag

Seconds: one pass (densities, statistics, new parameters) of both in turn, round by round, in this process, from the
same parameters over the same rows; a ratio is of each round's pair. The lower bounds and the parameters that the passes
give are compared before, or nothing is timed. scikit-learn computes in fp64 (fp32 rows lose their offsets in it), ours
multiplies in fp32 and sums in fp64 between blocks.

Rows, two kinds: "apart", of modes whose means differ, as latents have them: a row belongs to one or two modes; and
"alike", all of one Gaussian, the worst case, in which nothing can be left out. Beside them what matrix products give
here. GFLOP are what scikit-learn's products are, 4 N K D^2, or 8 N K D for diagonal covariances, for both: what ours
leaves out counts as done.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import statistics
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.append(str(Path(__file__).resolve().parent.parent))

from benchmarks import _cli
from benchmarks.optimizer import number
from maetok_fast.analysis import ArrayRows, GMMConfig, fit_gmm
from maetok_fast.analysis.em import expectation, maximise
from maetok_fast.analysis.mixture import block_size
from maetok_fast.bench.machine import describe, headline
from maetok_fast.bench.timing import Spread, rounds

SIZES, QUICK = ((64, 20), (64, 100), (128, 50), (256, 20), (256, 100)), ((64, 20), (128, 20))
KINDS = ("apart", "alike")
COVARIANCES = ("full", "diag")
OURS, THEIRS = "ours", "scikit-learn"
PRODUCT = 1024  # side of the matrix products beside them
REGULARISATION = 1e-6


def sizes(text: str) -> tuple[tuple[int, int], ...]:
    """64x20,256x100: dimensions x modes."""
    found = [re.fullmatch(r"(\d+)x(\d+)", part) for part in text.split(",")]
    pairs = tuple((int(m[1]), int(m[2])) for m in found if m is not None)
    if len(pairs) != len(found) or not all(min(pair) >= 1 for pair in pairs):
        raise argparse.ArgumentTypeError(f"expects DIMENSIONSxMODES, such as 64x20,256x100, got {text!r}")
    return pairs


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = _cli.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--rows", type=number, help="N (default 50k; 5k with --quick)")
    add("--sizes", type=sizes, help="dimensions x modes, several with commas between")
    add("--kinds", nargs="+", choices=KINDS, default=list(KINDS), help="of rows (default both)")
    add("--covariances", nargs="+", choices=COVARIANCES, default=list(COVARIANCES), help="of modes (default both)")
    add("--seconds", type=_cli.seconds, default=10.0, help="of timing, each size and kind (default 10)")
    add("--quick", action="store_true", help="small sizes, a second each")
    add("--json", type=Path)
    args = parser.parse_args(argv)
    args.rows = args.rows or (5_000 if args.quick else 50_000)
    args.sizes = args.sizes or (QUICK if args.quick else SIZES)
    args.seconds = min(args.seconds, 1.0) if args.quick else args.seconds
    if args.rows < max(modes for _, modes in args.sizes):
        parser.error(f"--rows: {args.rows} are fewer than modes")
    _cli.output(parser, "--json", args.json)
    return args


def rows_of(kind: str, count: int, dim: int, modes: int) -> np.ndarray:
    """(N, D) fp32, the same in every run."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((count, dim), dtype=np.float32)
    if kind == "apart":
        place = rng.integers(0, modes, count)
        basis = np.linalg.qr(rng.standard_normal((modes, dim, dim)))[0].astype(np.float32)
        deviations = np.exp(rng.uniform(-1.5, 0.5, (modes, dim))).astype(np.float32)
        for k in range(modes):
            x[place == k] = (x[place == k] * deviations[k]) @ basis[k]
        x += rng.standard_normal((modes, dim), dtype=np.float32)[place]
    return x


def flop(count: int, dim: int, modes: int, covariance: str) -> int:
    """Of the products of a pass as scikit-learn does them: (x - m) P and the weighted (x - m)^T (x - m), or those of x
    and x^2 with precisions and with responsibilities."""
    return count * modes * (4 * dim**2 if covariance == "full" else 8 * dim)


def passes(x: np.ndarray, modes: int, covariance: str) -> dict[str, Callable[[], tuple[float, np.ndarray]]]:
    """A pass of each side from the same parameters: (lower bound, new means)."""
    from sklearn.mixture import GaussianMixture

    rows, double, dim = ArrayRows(x), x.astype(np.float64), x.shape[1]
    # one in which no mode has lost its rows: what becomes of those is a policy, and the two have different ones
    config = GMMConfig(modes, covariance, iterations=2, tolerance=0, regularisation=REGULARISATION)
    starts = (fit_gmm(rows, replace(config, seed=seed)) for seed in itertools.count())
    start = next(found for found in starts if not found.emptied)
    device, size = torch.device("cpu"), block_size(dim, modes)

    def ours() -> tuple[float, np.ndarray]:
        found = expectation(rows.blocks(size), start.parameters, rows.dtype, torch.float32, device)
        return found.total / found.rows, maximise(found, start.parameters, 1.0, REGULARISATION).means.numpy()

    theirs = GaussianMixture(modes, covariance_type=covariance, reg_covar=REGULARISATION)

    def scikit() -> tuple[float, np.ndarray]:
        # its own steps: `fit` would add a start and a pass for the labels
        theirs.weights_, theirs.means_ = start.weights.numpy(), start.means.numpy()
        theirs.precisions_cholesky_ = start.precisions_cholesky.numpy()
        bound, responsibilities = theirs._e_step(double)
        theirs._m_step(double, responsibilities)
        return float(bound), theirs.means_

    return {OURS: ours, THEIRS: scikit}


def same(sides: dict[str, Callable[[], tuple[float, np.ndarray]]]) -> float:
    """By how much the lower bounds differ, relative. AssertionError where it is more than 1e-5, or the means differ."""
    (ours, means), (theirs, their_means) = (sides[name]() for name in (OURS, THEIRS))
    np.testing.assert_allclose(means, their_means, atol=1e-3)
    difference = abs(ours - theirs) / abs(theirs)
    assert difference < 1e-5, f"lower bounds {ours} and {theirs}: not the same pass, there is nothing to compare"
    return difference


def measure(count: int, dim: int, modes: int, kind: str, covariance: str, seconds: float) -> dict[str, Any]:
    """{"seconds": way -> one a round, "difference": of the lower bounds, relative}."""
    sides = passes(rows_of(kind, count, dim, modes), modes, covariance)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        difference = same(sides)
        cases: dict[str, Callable[[], Any]] = dict(sides)
        for name, dtype in (("fp32 product", torch.float32), ("fp64 product", torch.float64)):
            cases[name] = partial(torch.mm, *(torch.ones(PRODUCT, PRODUCT, dtype=dtype) for _ in range(2)))
            cases[name]()
        found = rounds(cases, torch.device("cpu"), seconds=seconds)
    what = {"rows": count, "dim": dim, "modes": modes, "kind": kind, "covariance": covariance}
    return what | {"seconds": found, "difference": difference}


def ratio(seconds: dict[str, list[float]]) -> Spread:
    """scikit-learn / ours of each round's pair."""
    return Spread.of([theirs / ours for ours, theirs in zip(seconds[OURS], seconds[THEIRS], strict=True)])


HEAD = (
    f"  {'D x modes':>10s} {'rows':6s}{'cov.':5s}{'ours ms':>10s}{'theirs ms':>11s}{'GFLOP':>8s}{'ours GFLOP/s':>14s}"
    f"{'theirs':>8s}{'fp32':>7s}{'fp64':>7s}{'theirs / ours':>35s}{'bounds differ':>15s}"
)


def line(found: dict[str, Any]) -> str:
    """One of the table; the columns fp32 and fp64 are the rates of matrix products, GFLOP/s."""
    seconds, spread = found["seconds"], ratio(found["seconds"])
    work = flop(found["rows"], found["dim"], found["modes"], found["covariance"]) / 1e9
    ours, theirs = (statistics.median(seconds[name]) for name in (OURS, THEIRS))
    rates = [2 * PRODUCT**3 / 1e9 / statistics.median(seconds[f"{name} product"]) for name in ("fp32", "fp64")]
    quartiles = f"{spread.median:.2f} x ({spread.low:.2f} .. {spread.high:.2f}, {spread.samples} rounds)"
    return (
        f"  {found['dim']:>4d} x {found['modes']:<3d} {found['kind']:6s}{found['covariance']:5s}"
        f"{ours * 1e3:10.1f}{theirs * 1e3:11.1f}"
        f"{work:8.1f}{work / ours:14.1f}{work / theirs:8.1f}{rates[0]:7.0f}{rates[1]:7.0f}{quartiles:>35s}"
        f"{found['difference']:15.0e}"
    )


def main(argv: Sequence[str] | None = None) -> None:
    args, machine = parse(argv), describe(torch.device("cpu"))
    print(headline(machine))
    print(f"one pass over {args.rows} rows, {torch.get_num_threads()} threads\n{HEAD}")
    results = []
    for covariance, (dim, modes), kind in itertools.product(args.covariances, args.sizes, args.kinds):
        results.append(measure(args.rows, dim, modes, kind, covariance, args.seconds))
        print(line(results[-1]), flush=True)
    if args.json:
        spreads = [asdict(ratio(found["seconds"])) for found in results]
        document = {"benchmark": "gmm", "machine": machine, "arguments": vars(args)}
        document |= {"results": [found | {"ratio": spread} for found, spread in zip(results, spreads)]}
        args.json.write_text(json.dumps(document, indent=1, default=str))


if __name__ == "__main__":
    main()
