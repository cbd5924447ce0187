# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""Rows, their principal components and Gaussian mixtures, against numpy, scipy and scikit-learn in fp64."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from maetok_fast.analysis import (
    GMM,
    ArrayRows,
    CacheRows,
    FileRows,
    GMMConfig,
    Rows,
    RowsError,
    WhitenedRows,
    fit_gmm,
    fit_pca,
    nll_curve,
)
from maetok_fast.analysis.densities import densities_of, stage_edges
from maetok_fast.analysis.em import Statistics, Sums, expectation, maximise
from maetok_fast.data.caches.cache import LatentCache
from maetok_fast.models.checkpoints.layout import CheckpointError

CPU = torch.device("cpu")
pytestmark = pytest.mark.usefixtures("one_thread")


def mixture(modes: int, dim: int, seed: int = 0, spread: float = 1.0, covariance: str = "full") -> GMM:
    """A random one, its covariances of condition 10 to 100."""
    rng = np.random.default_rng(seed)
    basis = np.linalg.qr(rng.normal(size=(modes, dim, dim)))[0]
    variances = np.exp(rng.uniform(-3, 1, (modes, dim)))
    covariances = (basis * variances[:, None]) @ basis.transpose(0, 2, 1) if covariance == "full" else variances
    weights = rng.dirichlet(np.full(modes, 5.0))
    return GMM.of(*(torch.from_numpy(v) for v in (weights, rng.normal(size=(modes, dim)) * spread, covariances)))


def drawn(gmm: GMM, count: int, seed: int = 1) -> np.ndarray:
    """(count, D) fp64 rows of it."""
    rng = np.random.default_rng(seed)
    place = rng.choice(gmm.modes, count, p=(gmm.weights / gmm.weights.sum()).numpy())
    noise = rng.normal(size=(count, gmm.dim))
    if gmm.covariance == "diag":
        return gmm.means.numpy()[place] + noise * gmm.covariances.sqrt().numpy()[place]
    lower = torch.linalg.cholesky(gmm.covariances).numpy()
    return gmm.means.numpy()[place] + np.einsum("nij,nj->ni", lower[place], noise)


def log_density(gmm: GMM, x: np.ndarray) -> np.ndarray:
    """log w_k N(x) (N, K) in plain fp64."""
    full = gmm.covariances if gmm.covariance == "full" else torch.diag_embed(gmm.covariances)
    away = torch.from_numpy(x)[:, None] - gmm.means
    squares = torch.einsum("nki,kij,nkj->nk", away, torch.linalg.inv(full), away)
    return (gmm.weights.log() - (squares + torch.logdet(full) + gmm.dim * math.log(2 * math.pi)) / 2).numpy()


# ---- rows


class Drawn(LatentCache):
    """Moments in memory."""

    format, stated = "test", "std"

    def _open(self) -> None:
        rng = np.random.default_rng(0)
        self.items = np.concatenate([rng.normal(size=(9, 2, 2, 3)), rng.uniform(1, 2, (9, 2, 2, 3))], 1)
        self.items = self.items.astype(np.float32)
        self.names, self.labels = [str(i) for i in range(9)], None

    def stored(self, i: int, flip: bool = False) -> np.ndarray:
        return self.items[i]

    def _kind(self, moments: str | None) -> str:
        return "mean_std"


def test_every_source_gives_the_same_rows_in_blocks_and_by_place(tmp_path: Path) -> None:
    x = np.random.default_rng(0).normal(size=(50, 3, 4)).astype(np.float32)
    flat, places = torch.from_numpy(x).reshape(50, 12), np.array([7, 8, 9, 3, 49, 0])
    array = ArrayRows(x)
    file = array.stored(tmp_path / "rows.npy")
    assert isinstance(file, FileRows)
    for rows in (
        array,
        file,
        ArrayRows(torch.from_numpy(x)),
        ArrayRows(np.load(file.path, mmap_mode="r")),
        file.stored(),
    ):
        assert (len(rows), rows.dim) == (50, 12)
        for size in (1, 7, 50, 64):
            blocks = list(rows.blocks(size))
            assert [len(b) for b in blocks] == [min(size, 50 - s) for s in range(0, 50, size)]
            assert torch.equal(torch.cat(blocks), flat)
        assert torch.equal(rows.take(places), flat[places])
    assert ArrayRows(x.astype(np.float16)).take(places).dtype == torch.float32
    assert ArrayRows(x.astype(np.float64)).take(places).dtype == torch.float64


def test_a_caches_moments_are_means_or_the_same_draws_each_time(tmp_path: Path) -> None:
    cache = Drawn(tmp_path)
    means = torch.from_numpy(cache.items[:, :2]).reshape(9, 12)
    assert torch.equal(torch.cat(list(CacheRows(cache).blocks(4))), means)
    assert torch.equal(CacheRows(cache, [5, 2]).take(np.array([1])), means[2:3])
    draws = CacheRows(cache, seed=3)
    once, again = torch.cat(list(draws.blocks(4))), draws.take(np.arange(9))
    assert torch.equal(once, again)
    z = (once - means) / torch.from_numpy(cache.items[:, 2:]).reshape(9, 12)
    assert abs(float(z.mean())) < 0.3
    assert 0.8 < float(z.std()) < 1.2


def test_rows_whose_sum_overflows_are_finite() -> None:
    x = np.full((3, 2), 3e38, dtype=np.float32)
    assert torch.equal(ArrayRows(x).take(np.arange(3)), torch.from_numpy(x))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda p: ArrayRows([[1.0]]), "expected a numpy array or a torch.Tensor"),
        (lambda p: ArrayRows(np.zeros((3, 0))), "no size 0, got (3, 0)"),
        (lambda p: ArrayRows(np.array([["a"]])), "expected real numbers"),
        (lambda p: list(ArrayRows(np.array([[1.0], [np.nan]])).blocks()), "not finite"),
        (lambda p: FileRows(p / "none.npy"), "no .npy file"),
        (lambda p: FileRows(saved(p, np.zeros((2, 2)))), "expected fp32 (N, D) in rows, got float64 (2, 2)"),
        (lambda p: FileRows(saved(p, np.zeros((9, 9), np.float32), cut=8)), "shorter than its header says"),
        (lambda p: CacheRows(Drawn(p), [9]), "places must lie in 0 .. 8"),
        (lambda p: fit_gmm(ArrayRows(np.zeros((3, 2))), GMMConfig(4)), "4 modes need as many rows at least, got 3"),
        (lambda p: fit_gmm(ArrayRows(np.zeros((9, 2))), GMMConfig(2, regularisation=0.0)), "the rows are alike"),
        (lambda p: fit_pca(ArrayRows(np.ones((9, 2)))), "all 9 rows are alike"),
        (lambda p: fit_pca(ArrayRows(np.eye(3, 8)), components=3), "vary in 2 dimensions"),
        (lambda p: GMMConfig(0), "modes must be at least 1"),
        (lambda p: GMMConfig(2, covariance="tied"), "covariance must be one of full, diag"),
        (lambda p: GMM(torch.ones(2), torch.zeros(2, 3), torch.ones(2, 3)), "they sum to 2"),
        (lambda p: mixture(2, 3).log_prob(torch.zeros(4, 2)), "expected x (B, 3), got (4, 2)"),
        (lambda p: GMM.load(saved(p, np.zeros(3))), "not loadable as weights only"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_in_a_sentence(make, words: str, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises((RowsError, ValueError, TypeError, CheckpointError)) as raised:
        make(tmp_path)
    assert words in str(raised.value)
    assert "\n" not in str(raised.value)


def saved(folder: Path, x: np.ndarray, cut: int = 0) -> Path:
    path = folder / "x.npy"
    np.save(path, x)
    path.write_bytes(path.read_bytes()[: path.stat().st_size - cut])
    return path


# ---- principal components


def test_the_components_are_numpys_and_an_offset_costs_nothing() -> None:
    rng = np.random.default_rng(0)
    x = (rng.normal(size=(700, 20)) * np.geomspace(3, 0.1, 20) @ np.linalg.qr(rng.normal(size=(20, 20)))[0]) + 1e4
    rows = Small(ArrayRows(x.astype(np.float32)), 90)
    double = x.astype(np.float32).astype(np.float64)
    pca, values = fit_pca(rows), np.linalg.eigvalsh(np.cov(double.T))[::-1]
    np.testing.assert_allclose(pca.spectrum, values, rtol=1e-9)
    share = np.cumsum(values) / values.sum()
    assert share[pca.components - 2] <= 0.9 < share[pca.components - 1]
    np.testing.assert_allclose(pca.basis @ pca.basis.T, np.eye(20), atol=1e-9)
    pca = pca.with_components(20)
    whitened = WhitenedRows(rows, pca).stored()
    z = whitened.take(np.arange(700)).double().numpy()
    np.testing.assert_allclose(np.cov(z.T), np.eye(20), atol=1e-4)
    np.testing.assert_allclose(pca.inverse(torch.from_numpy(z).float()), double, atol=2e-3)
    assert whitened.log_scale == pytest.approx(0.5 * np.log(values).sum(), rel=1e-9)


class Small(Rows):
    """The same rows in blocks of so many, whoever asks for more."""

    def __init__(self, rows: Rows, size: int) -> None:
        self.rows, self.size, self.dim, self.dtype, self.log_scale = rows, size, rows.dim, rows.dtype, rows.log_scale

    def __len__(self) -> int:
        return len(self.rows)

    def take(self, places: np.ndarray) -> Tensor:
        return self.rows.take(places)

    def blocks(self, size: int | None = None) -> Iterator[Tensor]:
        return self.rows.blocks(self.size)


# ---- densities


def test_log_densities_are_scipys() -> None:
    stats, special = pytest.importorskip("scipy.stats"), pytest.importorskip("scipy.special")
    hypothesis = pytest.importorskip("hypothesis")
    integers = hypothesis.strategies.integers

    @hypothesis.settings(max_examples=25, deadline=None)
    @hypothesis.given(
        integers(1, 6), integers(1, 7), integers(0, 99), hypothesis.strategies.sampled_from([0.0, 1.0, 30.0]),
        hypothesis.strategies.sampled_from(["full", "diag"]),
    )  # fmt: skip
    def holds(modes: int, dim: int, seed: int, spread: float, covariance: str) -> None:
        gmm = mixture(modes, dim, seed, spread, covariance)
        x = drawn(gmm, 20, seed)
        full = gmm.covariances.numpy() if covariance == "full" else [np.diag(v) for v in gmm.covariances.numpy()]
        logs = [
            stats.multivariate_normal.logpdf(x, gmm.means[k].numpy(), full[k]) + math.log(gmm.weights[k])
            for k in range(modes)
        ]
        expected = special.logsumexp(np.array(logs).reshape(modes, 20), axis=0)
        np.testing.assert_allclose(gmm.log_prob(torch.from_numpy(x)), expected, rtol=1e-9, atol=1e-9)
        np.testing.assert_allclose(gmm.log_prob(torch.from_numpy(x).float()), expected, rtol=2e-5, atol=2e-4)

    holds()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("spread", [0.0, 0.15, 2.0])
def test_what_is_left_out_is_less_than_rounding(spread: float, dtype: torch.dtype) -> None:
    gmm = mixture(7, 200, spread=spread)
    assert len(stage_edges(200)) == 3
    x = drawn(gmm, 300)
    exact = log_density(gmm, x)
    densities = densities_of(gmm.parameters, dtype, dtype, CPU)
    logs = densities.of(densities.centred(torch.from_numpy(x).to(dtype))).T.double().numpy()
    kept = np.isfinite(logs)
    tolerance = 1e-3 if dtype == torch.float32 else 1e-9
    np.testing.assert_allclose(logs[kept], exact[kept], atol=tolerance)
    whole = torch.from_numpy(exact).logsumexp(1, keepdim=True).numpy()
    assert np.where(kept, 0, np.exp(exact - whole)).sum(1).max() < torch.finfo(dtype).eps / 8
    assert kept.mean() < (0.3 if spread == 2 else 1.1)  # and there is something to leave out


def test_an_offset_of_a_hundred_thousand_costs_fp32_rows_nothing() -> None:
    """scikit-learn in fp32 is 0.7 nats wrong on such rows."""
    start = mixture(3, 6)
    x = (drawn(start, 2000) + 1e5).astype(np.float32)
    moved = GMM.of(start.weights, start.means + 1e5, start.covariances)
    expected = torch.from_numpy(log_density(moved, x.astype(np.float64))).logsumexp(1)
    np.testing.assert_allclose(moved.log_prob(torch.from_numpy(x)), expected, atol=5e-5)
    fitted = fit_gmm(ArrayRows(x), GMMConfig(3, iterations=10, tolerance=0), start=moved)
    double = fit_gmm(
        ArrayRows(x.astype(np.float64)), GMMConfig(3, iterations=10, tolerance=0, precision="fp64"), start=moved
    )
    assert fitted.lower_bound == pytest.approx(double.lower_bound, abs=1e-5)


# ---- fits


@pytest.mark.parametrize(
    ("dim", "modes", "spread", "covariance"),
    [(5, 4, 0.7, "full"), (70, 5, 0.1, "full"), (130, 6, 0.5, "full"), (20, 6, 0.3, "diag")],
)
def test_passes_are_scikit_learns(dim: int, modes: int, spread: float, covariance: str) -> None:
    sklearn = pytest.importorskip("sklearn.mixture")
    truth = mixture(modes, dim, 2, spread, covariance)
    x = drawn(truth, 3000).astype(np.float32)
    shift = torch.randn(modes, dim, dtype=torch.float64) * 0.3
    start = GMM.of(torch.full((modes,), 1 / modes), truth.means + shift, truth.covariances * 1.5)
    p = start.precisions_cholesky
    precisions = (p @ p.mT if covariance == "full" else p.square()).numpy()
    theirs = sklearn.GaussianMixture(
        modes, covariance_type=covariance, max_iter=4, tol=0, weights_init=start.weights.numpy(),
        means_init=start.means.numpy(), precisions_init=precisions,
    )  # fmt: skip
    with pytest.warns(UserWarning, match="did not converge"):
        theirs.fit(x.astype(np.float64))
    rows = Small(ArrayRows(x), 1100)
    ours = fit_gmm(rows, GMMConfig(modes, covariance, iterations=4, tolerance=0), start=start)
    assert ours.history[-1] == pytest.approx(theirs.lower_bound_, rel=1e-6)
    np.testing.assert_allclose(ours.weights, theirs.weights_, atol=1e-6)
    np.testing.assert_allclose(ours.means, theirs.means_, atol=1e-5)
    np.testing.assert_allclose(ours.precisions_cholesky, theirs.precisions_cholesky_, rtol=1e-4, atol=1e-4)
    assert ours.score(rows) == pytest.approx(theirs.score(x.astype(np.float64)), rel=1e-6)
    responsibilities = ours.responsibilities(torch.from_numpy(x[:200]))
    np.testing.assert_allclose(responsibilities, theirs.predict_proba(x[:200].astype(np.float64)), atol=1e-4)


@pytest.mark.parametrize("covariance", ["full", "diag"])
@pytest.mark.parametrize(
    ("dim", "dtype"), [(3, torch.float32), (45, torch.float32), (140, torch.float32), (45, torch.float64)]
)
def test_modes_upon_each_other_are_summed_as_products_and_narrow_ones_by_differences(
    covariance: str, dim: int, dtype: torch.dtype
) -> None:
    rng = np.random.default_rng(dim)
    weights, means = torch.tensor([0.3, 0.3, 0.25, 0.1, 0.05, 0.0]), torch.from_numpy(rng.normal(size=(6, dim)) * 0.1)
    scales = torch.from_numpy(rng.uniform(0.8, 1.2, (6, dim)))
    scales[4, 0], means[4, 0] = 1e-6, 2.0  # a narrow one; the last one is emptied
    mixed = torch.from_numpy(rng.normal(size=(dim, dim)) * 0.1 / dim**0.5) + torch.eye(dim, dtype=torch.float64)
    covariances = mixed @ torch.diag_embed(scales) @ mixed.T if covariance == "full" else scales
    gmm = GMM.of(weights, means + 50, covariances)
    x = torch.from_numpy(drawn(gmm, 2500)).to(dtype)  # more than a chunk, and no multiple of one
    sums = Sums(gmm.parameters, densities_of(gmm.parameters, dtype, dtype, CPU))
    for block in x.split(2300):
        sums.add(block)
    found = sums.statistics()
    assert sums._products is not None
    apart = [] if covariance == "diag" and dtype == torch.float64 else [4]
    assert ([] if sums._apart is None else sums._apart[0].tolist()) == apart

    logs = torch.from_numpy(log_density(gmm, x.double().numpy()))
    shares, away = logs.softmax(1), x.double()[:, None] - gmm.means
    kinds = ("nk,nki,nki->ki",) if covariance == "diag" else ("nk,nki,nkj->kij",)
    second = torch.einsum(*kinds, shares, away, away)
    close = {"rtol": 2e-4, "atol": 2e-3} if dtype == torch.float32 else {"rtol": 1e-7, "atol": 1e-7}
    assert found.rows == 2500
    assert found.total == pytest.approx(float(logs.logsumexp(1).sum()), rel=1e-6 if dtype == torch.float32 else 1e-10)
    torch.testing.assert_close(found.mass, shares.sum(0), **close)
    torch.testing.assert_close(found.first, torch.einsum("nk,nki->ki", shares, away), **close)
    torch.testing.assert_close(found.second, second, **close)
    torch.testing.assert_close(found.second[4].reshape(-1)[0], second[4].reshape(-1)[0], rtol=1e-3, atol=0)


def test_diagonal_modes_that_are_all_narrow_are_still_exact() -> None:
    gmm = GMM.of(torch.ones(3), torch.tensor([[-5.0] * 4, [5.0] * 4, [5.02] * 4]), torch.full((3, 4), 1e-3))
    x = drawn(gmm, 400).astype(np.float32)
    exact = torch.from_numpy(log_density(gmm, x.astype(np.float64)))
    np.testing.assert_allclose(gmm.log_prob(torch.from_numpy(x)), exact.logsumexp(1), atol=1e-3)
    found = expectation([torch.from_numpy(x)], gmm.parameters, torch.float32, torch.float32, CPU)
    shares, away = exact.softmax(1), torch.from_numpy(x).double()[:, None] - gmm.means
    torch.testing.assert_close(found.mass, shares.sum(0), rtol=1e-4, atol=0)
    torch.testing.assert_close(found.second, torch.einsum("nk,nki->ki", shares, away.square()), rtol=1e-3, atol=0)


def test_a_narrow_direction_survives_products_in_fp32() -> None:
    """Variances from 1 to 1e-6 in a turned basis: summed as they are, fp32 would lose the last of them."""
    rng = np.random.default_rng(0)
    turned = np.geomspace(1, 1e-6, 12) ** 0.5 * rng.normal(size=(4000, 12)) @ np.linalg.qr(rng.normal(size=(12, 12)))[0]
    x = turned.astype(np.float32)
    fitted = fit_gmm(ArrayRows(x), GMMConfig(1, iterations=3, tolerance=0, regularisation=0))
    exact = np.linalg.eigvalsh(np.cov(x.astype(np.float64).T, bias=True))
    np.testing.assert_allclose(torch.linalg.eigvalsh(fitted.covariances[0]), exact, rtol=1e-3)


def test_the_likelihood_of_held_out_rows_nears_the_entropy() -> None:
    truth = mixture(3, 4, 5, spread=3)
    train, held_out = (ArrayRows(drawn(truth, n, seed).astype(np.float32)) for n, seed in ((8000, 1), (4000, 2)))
    entropy = -truth.score(held_out) / 4
    ones, threes = nll_curve(train, held_out, modes=(1, 3), config=GMMConfig(1, restarts=2))
    assert threes.held_out_nll == pytest.approx(entropy, abs=0.01)
    assert ones.held_out_nll > entropy + 0.1
    assert (threes.modes, threes.converged, threes.emptied) == (3, True, 0)
    batched = fit_gmm(train, GMMConfig(3, batch=500, iterations=4, restarts=2))
    assert batched.nll_per_dimension(held_out) == pytest.approx(entropy, abs=0.02)
    assert not fit_gmm(train, GMMConfig(2, batch=3, iterations=1)).emptied  # batches of fewer rows than dimensions


def test_the_bound_never_falls_and_a_seed_decides_all() -> None:
    rows = ArrayRows(drawn(mixture(6, 8, 3), 3000).astype(np.float32))
    said: list[str] = []
    one, two = (fit_gmm(rows, GMMConfig(6, iterations=15, tolerance=0, seed=4), tick=said.append) for _ in range(2))
    assert (np.diff(one.history) > -1e-6).all()
    assert one.history == two.history
    assert torch.equal(one.precisions_cholesky, two.precisions_cholesky)
    assert said[0].startswith("6 modes, start 1 of 1, pass 1: ")
    for init in ("kmeans++", "random"):
        fitted = fit_gmm(rows, GMMConfig(6, "diag", seed=4, init=init))
        assert float(fitted.weights.sum()) == pytest.approx(1, abs=1e-12)
        assert fitted.converged


def test_stepwise_statistics_are_those_of_all_rows() -> None:
    gmm = mixture(3, 5)
    x = torch.from_numpy(drawn(gmm, 600))
    whole = expectation([x], gmm.parameters, x.dtype, x.dtype, CPU)
    parts = [expectation([part], gmm.parameters, x.dtype, x.dtype, CPU).share() for part in x.split(200)]
    elsewhere = parts[0].moved(gmm.means + 2)
    mixed = elsewhere.blended(parts[1], 1 / 2).blended(parts[2], 1 / 3)
    for name in ("mass", "first", "second"):
        torch.testing.assert_close(getattr(mixed, name), getattr(whole.share(), name))
    shares = torch.from_numpy(log_density(gmm, x.numpy())).softmax(1)
    away = x[:, None] - gmm.means
    torch.testing.assert_close(whole.second, torch.einsum("nk,nki,nkj->kij", shares, away, away))


def test_a_mode_without_rows_or_spread_is_emptied_and_named() -> None:
    x = drawn(mixture(1, 3), 500)
    start = GMM.of(
        torch.tensor([0.5, 0.3, 0.2]), torch.tensor([[0.0] * 3, [1e4] * 3, [0.1] * 3]), torch.eye(3).expand(3, 3, 3)
    )
    fitted = fit_gmm(ArrayRows(x), GMMConfig(3, iterations=3, tolerance=0), start=start)
    assert fitted.emptied == (1,)
    assert float(fitted.weights.sum()) == pytest.approx(1, abs=1e-12)
    torch.testing.assert_close(fitted.means[1], start.means[1])
    flat = Statistics(start.means, torch.tensor([9.0, 9, 9]), torch.zeros(3, 3), torch.eye(3).repeat(3, 1, 1), 27, 0.0)
    flat.second[2] = torch.tensor([[1.0, 1, 1]] * 3)
    flat.second, flat.first, flat.mass = flat.second.double(), flat.first.double(), flat.mass.double()
    assert maximise(flat, start.parameters, 1.0, 0.0).weights.tolist() == [0.5, 0.5, 0.0]


def test_a_file_holds_the_mixture(tmp_path: Path) -> None:
    rows = ArrayRows(drawn(mixture(2, 3), 300).astype(np.float32))
    fitted = fit_gmm(rows, GMMConfig(2))
    found = GMM.load(fitted.save(tmp_path / "two.safetensors"))
    assert found.history == fitted.history
    assert (found.converged, found.iterations) == (fitted.converged, fitted.iterations)
    assert found.score(rows) == fitted.score(rows)


def test_units_are_added_back() -> None:
    rng = np.random.default_rng(0)
    rows = ArrayRows((rng.normal(size=(2000, 6)) * np.geomspace(5, 0.5, 6)).astype(np.float32))
    pca = fit_pca(rows).with_components(6)
    white = WhitenedRows(rows, pca)
    (point,) = nll_curve(white, white, modes=(1,))
    plain = fit_gmm(rows, GMMConfig(1)).nll_per_dimension(rows)
    assert point.held_out_nll_unscaled == pytest.approx(plain, abs=1e-4)
    assert point.held_out_nll == pytest.approx(0.5 * math.log(2 * math.pi * math.e), abs=1e-3)
    with pytest.raises(ValueError, match="standardised differently"):
        nll_curve(white, WhitenedRows(rows, pca, standardise=False))
