# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""The measures of latents, each against a formula of its own in numpy or a case whose answer is known."""

from __future__ import annotations

import math
import sys
import types

import numpy as np
import pytest
import torch

from maetok_fast._optional import Status
from maetok_fast.analysis.curves import modes_for
from maetok_fast.analysis.neighbours import chance, class_agreement, knn_purity, nearest
from maetok_fast.analysis.pca import fit_pca
from maetok_fast.analysis.probe import linear_probe, probe_part, standardise
from maetok_fast.analysis.projection import project
from maetok_fast.analysis.rows import ArrayRows
from maetok_fast.analysis.traversal import along_components, between, exchanged
from maetok_fast.analysis.usage import token_influence, token_usage


@pytest.fixture(scope="module", autouse=True)
def _one_thread(one_thread: None) -> None:
    pass


@pytest.fixture(autouse=True)
def _few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many as these problems need."""
    monkeypatch.setattr("maetok_fast.analysis.probe.STEPS", 600)


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=seed))


def two_gaussians(count: int, dims: int, apart: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Classes 3 and 7 of unit covariance, their means so far apart, in coordinates of unlike scales and offsets."""
    y = rng(seed).integers(0, 2, count)
    x = rng(seed + 1).standard_normal((count, dims))
    x[:, 0] += apart * (y - 0.5)
    turned = x @ np.linalg.qr(rng(9).standard_normal((dims, dims)))[0] * np.logspace(-2, 2, dims) + 100
    return turned.astype(np.float32), np.where(y == 1, 7, 3)


# ---- linear probing


@pytest.mark.parametrize("solver", ["lbfgs", "sgd"])
def test_a_probe_comes_near_the_best_accuracy_that_there_is(solver: str) -> None:
    if solver == "lbfgs":
        pytest.importorskip("sklearn")
    x, y = two_gaussians(6000, 8, 2.0, 1)
    found = linear_probe(x[:3000], y[:3000], x[3000:], y[3000:], solver=solver)
    best = 0.5 * (1 + math.erf(1 / math.sqrt(2)))  # the normal distribution at half of the distance of the means
    assert abs(found.accuracy - best) < 3 * math.sqrt(best * (1 - best) / 3000)
    assert (found.solver, found.train, found.held_out, found.classes) == (solver, 3000, 3000, 2)
    assert found.converged is (True if solver == "lbfgs" else None)


def test_both_solvers_find_the_same_classifier() -> None:
    pytest.importorskip("sklearn")
    y = rng(1).integers(0, 4, 1500)
    x = (rng(2).standard_normal((1500, 6)) + 1.2 * np.eye(6)[y]).astype(np.float32)
    ways = [linear_probe(x[:1000], y[:1000], x[1000:], y[1000:], solver=solver) for solver in ("lbfgs", "sgd")]
    assert abs(ways[0].accuracy - ways[1].accuracy) < 0.012, "they minimise the same loss"


def test_sgd_depends_on_its_seed_alone() -> None:
    x, y = two_gaussians(400, 3, 1.0, 3)
    one, again, other = (linear_probe(x[:300], y[:300], x[300:], y[300:], s, solver="sgd") for s in (0, 0, 1))
    assert one == again
    assert abs(one.accuracy - other.accuracy) < 0.05


def test_the_solver_follows_the_size(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("sklearn")
    x, y = two_gaussians(200, 3, 1.0, 3)
    assert linear_probe(x, y, x, y).solver == "lbfgs"
    monkeypatch.setattr("maetok_fast.analysis.probe.LBFGS_WORK", 200 * 3 * 2 - 1)
    assert linear_probe(x, y, x, y).solver == "sgd"


def test_a_probe_says_what_it_cannot_take() -> None:
    x, y = two_gaussians(20, 3, 1.0, 3)
    with pytest.raises(ValueError, match="one class"):
        linear_probe(x, np.zeros(20, dtype=np.int64), x, y)
    with pytest.raises(ValueError, match=r"train rows \(N, D\) and N integer labels"):
        linear_probe(x, y[:-1], x, y)
    with pytest.raises(ValueError, match="3 features, test rows 2"):
        linear_probe(x, y, x[:, :2], y)


def test_classes_that_training_has_not_seen_count_as_wrong() -> None:
    x, y = two_gaussians(400, 3, 50.0, 3)
    held_y = y.copy()
    held_y[:100] = 5
    assert linear_probe(x, y, x, held_y, solver="sgd").accuracy == 0.75


def test_standardised_rows_have_mean_0_and_deviation_1_and_constants_become_0() -> None:
    x = (rng().standard_normal((5000, 4)) * [1, 1e-3, 1e3, 0] + [1e4, 5, -3, 7]).astype(np.float32)
    train, held = standardise(x[:4000], x[4000:])
    wide = x[:4000].astype(np.float64)
    expected = (x[4000:, :3] - wide.mean(0)[:3]) / wide.std(0)[:3]
    np.testing.assert_allclose(held[:, :3], expected, atol=2e-3)  # fp32 has few digits beside an offset of 1e4
    np.testing.assert_allclose(train[:, 1:3].std(0), 1, rtol=1e-4)
    assert not train[:, 3].any()


def test_fewer_labels_are_drawn_of_every_class_alike() -> None:
    y = np.repeat([0, 1, 2], [600, 300, 100])
    x = (rng(5).standard_normal((1000, 2, 3)) + y[:, None, None]).astype(np.float32)
    found = probe_part(x, y, x[::5], y[::5], 2)
    assert [(one["share"], one["rows"]) for one in found["fractions"]] == [(0.01, 10), (0.1, 100)]
    assert found["flattened"]["rows"] == 900
    assert found["pooled"]["features"] == 3
    mean, error = found["pooled"]["mean"], found["pooled"]["error"]
    share = (200 * mean + 2) / 204
    assert found["pooled"]["error_all"] == pytest.approx(math.sqrt(error**2 + share * (1 - share) / 204))


# ---- neighbours


def test_neighbours_are_those_of_the_largest_cosine() -> None:
    hypothesis = pytest.importorskip("hypothesis")
    st = hypothesis.strategies
    rows = st.lists(st.lists(st.integers(-4, 4), min_size=4, max_size=4), min_size=12, max_size=12)

    @hypothesis.settings(max_examples=40, deadline=None)
    @hypothesis.given(rows, st.integers(1, 6), st.booleans())
    def holds(drawn: list[list[int]], k: int, itself: bool) -> None:
        wide = np.array(drawn, dtype=np.float64)
        wide[~wide.any(1), 0] = 1
        unit = wide / np.linalg.norm(wide, axis=1, keepdims=True)
        cosine = unit @ unit.T
        if not itself:
            np.fill_diagonal(cosine, -2)
        places = nearest(wide.astype(np.float32), wide.astype(np.float32), k, itself=itself)
        expected = -np.sort(-cosine, axis=1)[:, :k]
        np.testing.assert_allclose(np.take_along_axis(cosine, places, 1), expected, atol=1e-6)
        assert all(len(set(row)) == k for row in places.tolist())
        assert itself or not (places == np.arange(12)[:, None]).any()

    holds()


def test_agreement_counts_neighbours_of_the_same_class() -> None:
    labels = np.array([0, 0, 1, 2])
    found = class_agreement(np.array([[0, 2, 1], [3, 0, 2]]), labels, np.array([0, 2]), (1, 2, 3, 20))
    assert found == {1: 1.0, 2: 0.5, 3: 0.5}


def test_purity_is_1_of_clusters_and_chance_of_drawn_labels() -> None:
    y = np.repeat(np.arange(4), 50)
    centres = np.eye(4, 6)[y] * 20
    assert knn_purity((centres + rng().standard_normal((200, 6))).astype(np.float32), y) == 1.0
    drawn = rng(1).integers(0, 4, 2000)
    found = knn_purity(rng(2).standard_normal((2000, 6)).astype(np.float32), drawn)
    assert abs(found - chance(drawn)) < 0.02
    assert chance(np.array([0, 0, 0, 1])) == pytest.approx(0.625)


def test_more_neighbours_than_rows_are_refused() -> None:
    with pytest.raises(ValueError, match=r"k in 1 \.\. 4"):
        nearest(np.ones((5, 2), dtype=np.float32), np.ones((5, 2), dtype=np.float32), 5, itself=False)


# ---- tokens


def test_usage_is_what_numpys_covariance_says() -> None:
    tokens, channels = 3, 4
    mixed = rng().standard_normal((12, 12)) * np.repeat([3.0, 1.0, 0.0], 4)  # the last token never varies
    x = (rng(1).standard_normal((500, 12)) @ mixed + 1000).reshape(500, tokens, channels)
    found = token_usage(x.astype(np.float64))
    whole = np.cov(x.reshape(500, -1).T)
    blocks = [[whole[i * 4 : i * 4 + 4, j * 4 : j * 4 + 4] for j in range(tokens)] for i in range(tokens)]
    np.testing.assert_allclose(found.variance, [np.trace(blocks[i][i]) for i in range(tokens)], atol=1e-9)
    values = [np.linalg.eigvalsh(blocks[i][i]) for i in range(2)]
    np.testing.assert_allclose(found.rank[:2], [v.sum() ** 2 / (v**2).sum() for v in values], rtol=1e-9)
    every = np.linalg.eigvalsh(whole)
    assert found.effective_rank == pytest.approx(every.sum() ** 2 / (every**2).sum(), rel=1e-9)
    rv = np.trace(blocks[0][1] @ blocks[1][0])
    rv /= math.sqrt(np.trace(blocks[0][0] @ blocks[0][0]) * np.trace(blocks[1][1] @ blocks[1][1]))
    np.testing.assert_allclose(found.correlation[:2, :2], [[1, rv], [rv, 1]], rtol=1e-9)
    assert found.share.sum() == pytest.approx(1)
    assert found.rank[2] < 1e-9 or found.variance[2] < 1e-15


def test_equal_tokens_are_all_in_use_and_a_copy_is_correlated() -> None:
    x = rng().standard_normal((20_000, 4, 3)).astype(np.float32)
    x[:, 3] = -2 * x[:, 2]
    found = token_usage(torch.from_numpy(x))
    np.testing.assert_allclose(found.rank, 3, atol=0.02)  # of isotropic channels
    assert found.correlation[2, 3] == pytest.approx(1, abs=1e-6)
    assert found.correlation[0, 1] < 0.001
    assert token_usage(x[:, :2]).effective_tokens == pytest.approx(2, abs=1e-3)


def test_usage_refuses_latents_that_are_all_alike() -> None:
    with pytest.raises(ValueError, match="all 5 latents are alike"):
        token_usage(np.ones((5, 2, 3)))
    with pytest.raises(ValueError, match=r"expected latents \(N, L, C\)"):
        token_usage(np.ones((5, 6)))


def paint(latents: torch.Tensor) -> torch.Tensor:
    """A decoder of 4 tokens of width 3: token t fills its quarter of a 4 x 4 image with its own values."""
    colours = latents.reshape(-1, 2, 2, 3).permute(0, 3, 1, 2)
    return colours.repeat_interleave(2, 2).repeat_interleave(2, 3)


def test_influence_is_the_change_where_the_token_paints() -> None:
    latents = torch.from_numpy(rng().standard_normal((5, 4, 3)).astype(np.float32))
    mean = torch.tensor([[0.1], [0.2], [0.3], [0.4]]).expand(4, 3)
    found = token_influence(paint, latents, mean, batch=2)
    expected = ((latents - mean) / 2).square().mean((0, 2))  # pixels in [0, 1]
    for t in range(4):
        quarter = np.zeros((4, 4))
        quarter[t // 2 * 2 : t // 2 * 2 + 2, t % 2 * 2 : t % 2 * 2 + 2] = expected[t]
        np.testing.assert_allclose(found[t], quarter, rtol=1e-5, atol=1e-8)


def test_exchanges_show_the_tokens_that_change_most() -> None:
    a, b = torch.zeros(4, 3), torch.tensor([[0.2], [0.0], [0.8], [0.4]]).expand(4, 3).contiguous()
    (shown, changed), told = exchanged(paint, a, b, "XY", batch=3)
    assert told["tokens"] == [2, 3, 0, 1]
    np.testing.assert_allclose(told["mse"], [0.01 / 4, 0, 0.16 / 4, 0.04 / 4], atol=1e-7)
    assert shown.captions == ["X", "token 2", "token 3", "token 0", "token 1"]
    assert told["scale"] == pytest.approx(0.4)
    assert (changed.images[1, 2:, :2] == 255).all(), "the largest change is white"
    assert (changed.images[1, :2] == 0).all()


def test_rows_of_a_traversal_go_along_components_and_between_latents() -> None:
    latents = rng().standard_normal((400, 4, 3)) * 0.01
    latents[:, 1] += 0.2 * rng(1).standard_normal((400, 1))  # token 1 brightens and darkens
    pca = fit_pca(ArrayRows(latents.astype(np.float32)), components=2)
    first, second = along_components(paint, pca, (4, 3), 2)
    quarter = first.images[:, 0, 3].astype(int)  # of token 1
    assert (np.diff(quarter, axis=0) > 15).all(), "brighter from left to right"
    assert first.captions[3] == "mean"
    assert np.ptp(first.images[:, 3, 0].astype(int), axis=0).max() < 8
    assert "of variance" in second.title
    line = between(paint, torch.full((4, 3), -1.0), torch.ones(4, 3))
    np.testing.assert_allclose(line.images[:, 0, 0, 0], np.linspace(0, 255, 7), atol=1)


# ---- pictures and curves


def test_without_umap_the_picture_shows_principal_components_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    missing = Status("missing", "", "pip install umap-learn")
    monkeypatch.setattr("maetok_fast.analysis.projection.find", lambda name: missing)
    x = rng().standard_normal((60, 5)) @ rng(1).standard_normal((5, 5))
    found = project(x.astype(np.float32))
    assert found.method == "pca"
    assert found.why == "umap-learn is missing (pip install umap-learn)"
    z = (x - x.mean(0)) / x.std(0)
    u, s, _ = np.linalg.svd(z - z.mean(0), full_matrices=False)
    np.testing.assert_allclose(np.abs(found.points), np.abs(u[:, :2] * s[:2]), atol=1e-3)
    with pytest.raises(ImportError, match="umap-learn is missing"):
        project(x, method="umap")


def test_umap_gets_a_seed_and_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own run takes half a minute to compile."""
    asked: dict[str, object] = {}

    class UMAP:
        def __init__(self, **options: object) -> None:
            asked.update(options)

        def fit_transform(self, rows: np.ndarray) -> np.ndarray:
            return rows[:, :2]

    fake = types.ModuleType("umap")
    fake.UMAP = UMAP  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "umap", fake)
    monkeypatch.setattr("maetok_fast.analysis.projection.find", lambda name: Status("found", "0.5"))
    x = rng().standard_normal((10, 5)).astype(np.float32)
    found = project(x, seed=3)
    assert (asked["random_state"], asked["n_jobs"], asked["n_neighbors"]) == (3, 1, 9)
    np.testing.assert_array_equal(found.points, standardise(x)[0][:, :2])
    assert (found.method, found.version) == ("umap", "0.5")


def test_modes_are_read_off_between_the_numbers_that_were_tried() -> None:
    curve = [{"modes": m, "held_out": {"mean": v}} for m, v in ((1, 1.4), (10, 1.0), (100, 1.1))]
    assert modes_for(curve, 1.4) == 1.0
    assert modes_for(curve, 1.2) == pytest.approx(math.sqrt(10))
    assert modes_for(curve, 1.0) == pytest.approx(10)
    assert modes_for(curve, 0.9) is None
