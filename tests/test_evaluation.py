# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""Distances and networks of the evaluation, against closed forms, numpy and the libraries that define them."""

from __future__ import annotations

import functools
import urllib.error
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor, nn

from maetok_fast.evaluation import (
    Extractor,
    ExtractorError,
    Moments,
    create_extractor,
    frechet_distance,
    inception_score,
    kid,
    mind,
    precision_recall,
)
from maetok_fast.evaluation.distances import geometric_mean

pytestmark = pytest.mark.usefixtures("one_thread")


def rows(count: int, width: int, seed: int = 0, shift: float = 0.0) -> np.ndarray:
    random = np.random.default_rng(seed)
    mix = np.random.default_rng(99).standard_normal((width, width)) / width**0.5
    return (random.standard_normal((count, width)) @ mix + shift).astype(np.float32)


# ---- moments -------------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 7), min_size=1, max_size=6), st.floats(-1e4, 1e4))
def test_merged_moments_are_those_of_all_rows_at_once(sizes: list[int], offset: float) -> None:
    x = np.random.default_rng(1).standard_normal((sum(sizes), 3)) + offset
    merged = Moments.of_blocks(np.split(x, np.cumsum(sizes)[:-1]))
    assert merged.count == len(x)
    np.testing.assert_allclose(merged.mean, x.mean(0), rtol=1e-12, atol=1e-12)
    expected = np.cov(x, rowvar=False) if len(x) > 1 else np.zeros((3, 3))
    np.testing.assert_allclose(merged.covariance, expected, rtol=1e-7, atol=1e-7 if abs(offset) > 1 else 1e-12)


def test_moments_of_unknown_count_or_other_width_are_not_merged() -> None:
    with pytest.raises(ValueError, match="count is unknown"):
        Moments(None, np.zeros(2), np.eye(2)).merge(Moments.of(rows(3, 2)))
    with pytest.raises(ValueError, match="2 and 3 dimensions"):
        Moments.of(rows(3, 2)).merge(Moments.of(rows(3, 3)))
    with pytest.raises(ValueError, match="not finite"):
        Moments(3, np.array([np.nan]), np.eye(1))


# ---- Frechet distance ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("zeros", [0, 3], ids=["full rank", "singular"])
def test_frechet_distance_of_commuting_gaussians_is_the_closed_form(zeros: int) -> None:
    random = np.random.default_rng(2)
    turn, _ = np.linalg.qr(random.standard_normal((8, 8)))
    one, two = random.uniform(0.1, 9, (2, 8))
    one[:zeros], two[8 - zeros :] = 0, 0
    means = random.standard_normal((2, 8))
    a, b = (Moments(9, m, turn @ np.diag(v) @ turn.T) for m, v in zip(means, (one, two)))
    expected = ((means[0] - means[1]) ** 2).sum() + ((one**0.5 - two**0.5) ** 2).sum()
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-12)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-12)


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 12), st.integers(2, 12))
def test_frechet_distance_of_fewer_rows_than_dimensions_is_exact(n: int, m: int) -> None:
    x, y = rows(n, 40, 3).astype(np.float64), rows(m, 40, 4).astype(np.float64)
    u, v = x - x.mean(0), y - y.mean(0)
    root = np.linalg.svd(u @ v.T, compute_uv=False).sum() / np.sqrt((n - 1) * (m - 1))
    apart = ((x.mean(0) - y.mean(0)) ** 2).sum()
    expected = apart + (u**2).sum() / (n - 1) + (v**2).sum() / (m - 1) - 2 * root
    assert frechet_distance(Moments.of(x), Moments.of(y)) == pytest.approx(expected, rel=1e-11)


def test_frechet_distance_is_torchmetrics() -> None:
    fid = pytest.importorskip("torchmetrics.image.fid")

    class Pixels(nn.Module):
        num_features = 12

        def forward(self, images: Tensor) -> Tensor:
            return images.flatten(1).float()

    random = np.random.default_rng(5)
    images = [torch.from_numpy(random.integers(0, top, (60, 3, 2, 2), dtype=np.uint8)) for top in (200, 256)]
    metric = fid.FrechetInceptionDistance(feature=Pixels(), input_img_size=(3, 2, 2))
    metric.set_dtype(torch.float64)
    for real, batch in zip((True, False), images):
        metric.update(batch, real=real)
    extractor = Extractor.of_module("pixels", lambda x: x.flatten(1).float())
    ours = frechet_distance(*(Moments.of(extractor(batch)) for batch in images))
    assert ours == pytest.approx(float(metric.compute()), rel=1e-6)


# ---- kid, is, precision, recall, mind ------------------------------------------------------------------------------


def test_kid_and_inception_score_are_torch_fidelitys() -> None:
    pytest.importorskip("torch_fidelity")
    from torch_fidelity.metric_isc import isc_features_to_metric
    from torch_fidelity.metric_kid import kid_features_to_metric

    x, y = torch.from_numpy(rows(60, 16)), torch.from_numpy(rows(80, 16, 1, 0.3))
    theirs = kid_features_to_metric(
        x.double(), y.double(), kid_subsets=7, kid_subset_size=20, rng_seed=2020, verbose=False
    )
    found = kid(x, y, subsets=7, size=20)
    assert found.value == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-9)
    assert found.low < found.value < found.high
    scores = isc_features_to_metric(x * 3, splits=3, shuffle=False)
    mean, std = inception_score(x * 3, split=20)
    assert mean == pytest.approx(scores["inception_score_mean"], rel=1e-9)
    assert std == pytest.approx(scores["inception_score_std"], rel=1e-9)


def brute_force(reference: np.ndarray, samples: np.ndarray, k: int) -> tuple[float, float]:
    def apart(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return np.linalg.norm(a[:, None].astype(np.float64) - b[None], axis=2)

    of_reference, of_samples = (np.sort(apart(s, s), axis=1)[:, k] for s in (reference, samples))
    between = apart(reference, samples)
    return (between <= of_reference[:, None]).any(0).mean(), (between <= of_samples[None]).any(1).mean()


@settings(max_examples=25, deadline=None)
@given(st.integers(5, 40), st.integers(5, 40), st.integers(1, 4), st.integers(7, 50), st.floats(0, 3))
def test_precision_and_recall_are_those_of_all_pairs(n: int, m: int, k: int, block: int, shift: float) -> None:
    reference, samples = rows(n, 3, 6), rows(m, 3, 7, shift)
    found = precision_recall(reference, samples, k, block=block)
    assert found == pytest.approx(brute_force(reference, samples, k), abs=0)


def test_precision_and_recall_of_equal_sets_are_one_and_are_torch_fidelitys() -> None:
    x, y = rows(50, 6), rows(70, 6, 1, 0.2)
    assert precision_recall(x, x) == (1, 1)
    prc = pytest.importorskip("torch_fidelity.metric_prc")
    theirs = prc.calculate_precision_recall_full(torch.from_numpy(y).double(), torch.from_numpy(x).double())
    assert precision_recall(x, y) == pytest.approx(theirs, abs=1e-6)
    with pytest.raises(ValueError, match="more than 3 rows"):
        precision_recall(x[:3], y)


def test_mind_in_one_dimension_is_three_times_the_squared_distance_of_sorted_values() -> None:
    x, y = rows(40, 1), rows(40, 1, 1, 0.4)
    expected = 3 * ((np.sort(x, 0).astype(np.float64) - np.sort(y, 0)) ** 2).mean()
    assert mind(x, y, directions=4).value == pytest.approx(expected, rel=1e-6)


def test_mind_of_a_shifted_set_is_three_times_the_shifts_square_within_its_interval() -> None:
    x = rows(60, 8)
    found = mind(x, x + np.float32(0.5), directions=400)
    assert found.low <= 3 * 8 * 0.25 <= found.high
    assert found.value == pytest.approx(3 * 8 * 0.25, rel=0.1)


def test_intervals_are_as_wide_as_the_values_scatter() -> None:
    def scatter(f: Any) -> float:
        found = [f(rows(200, 8, 2 * i), rows(200, 8, 2 * i + 1, 0.3)) for i in range(20)]
        claimed = np.mean([v.high - v.low for v in found]) / (2 * 1.96)
        return claimed / np.std([v.value for v in found])

    assert 0.6 < scatter(functools.partial(kid, subsets=20, size=80)) < 1.7
    assert 0.6 < scatter(functools.partial(mind, directions=100)) < 1.7


def test_the_geometric_mean_does_not_know_scales() -> None:
    assert geometric_mean([2, 8]) == pytest.approx(4)
    assert geometric_mean([2e6, 8]) / geometric_mean([1e6, 8]) == pytest.approx(2**0.5)
    with pytest.raises(ValueError, match="at least 0"):
        geometric_mean([])


# ---- extractors ----------------------------------------------------------------------------------------------------


def pictures(count: int, side: int = 20, seed: int = 0) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, (count, 3, side, side), dtype=np.uint8))


def test_inception_gives_torch_fidelitys_features_and_adms_spatial_ones(tmp_path: Path) -> None:
    pytest.importorskip("torch_fidelity")
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    file = tmp_path / "weights.pth"
    torch.save(create_extractor("inception", "random").network.state_dict(), file)  # type: ignore[attr-defined]
    ours = create_extractor("inception", file)
    with torch.device("meta"):
        theirs = _skeleton(FeatureExtractorInceptionV3)
    theirs.load_state_dict(torch.load(file, weights_only=True), assign=True)
    branches: list[Tensor] = []
    theirs.Mixed_6d.branch1x1.register_forward_hook(lambda m, i, out: branches.append(out))
    images = pictures(2)
    features, logits = theirs(images)
    found = ours.all(images)
    close = {"rtol": 1e-4, "atol": 1e-5 * float(features.abs().max())}
    torch.testing.assert_close(found["features"], features, **close)
    assert found["spatial"].shape == (2, 2023)
    by_pixel = branches[0].numpy().transpose(0, 2, 3, 1)[..., :7].reshape(2, -1)
    torch.testing.assert_close(found["spatial"], torch.from_numpy(by_pixel), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ours.logits(found["features"]), logits, rtol=1e-3, atol=1e-4 * float(logits.abs().max()))
    assert "NOT the published weights" in ours.about["weights"]
    assert not ours.random


def _skeleton(kind: Any) -> Any:
    """torch-fidelity's network of no weights: its constructor loads a file by `weights_only=False`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("torch.load", lambda *a, **k: {})
        patch.setattr(kind, "load_state_dict", lambda self, state: None)
        return kind("test", ["2048", "logits_unbiased"], feature_extractor_weights_path="none")


def test_missing_weights_are_named_with_the_way_to_get_them(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("torch_fidelity")

    def offline(*args: Any, **options: Any) -> None:
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    name = "pt_inception-2015-12-05-6726825d.pth"
    with pytest.raises(ExtractorError, match=rf"https://.*{name} into {tmp_path}.*--weights inception=/path/to/{name}"):
        create_extractor("inception")
    with pytest.raises(ExtractorError, match="no such file"):
        create_extractor("inception", tmp_path / "none.pth")
    (tmp_path / "bad.pth").write_bytes(b"no weights")
    with pytest.raises(ExtractorError, match=r"bad.pth is no pt_inception"):
        create_extractor("inception", tmp_path / "bad.pth")


def test_a_timm_extractor_is_its_model_on_pictures_that_pil_resized() -> None:
    timm = pytest.importorskip("timm")
    extractor = create_extractor("timm:test_vit", "random")
    images, side = pictures(2, 24), extractor.size  # type: ignore[attr-defined]
    small = [Image.fromarray(i.permute(1, 2, 0).numpy()).resize((side, side), Image.Resampling.BICUBIC) for i in images]
    resized = torch.from_numpy(np.stack(small)).permute(0, 3, 1, 2)
    apart = (extractor.prepare(images).int() - resized).abs()
    assert apart.max() <= 2  # rounded twice, here across first and there down
    assert apart.float().mean() < 0.02
    config = timm.models.get_pretrained_cfg("test_vit")
    mean, std = (torch.tensor(v)[:, None, None] for v in (config.mean, config.std))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(20151205)
        model = timm.create_model("test_vit", num_classes=0).eval()
    with torch.no_grad():
        expected = model((extractor.prepare(images) / 255 - mean) / std)
    torch.testing.assert_close(extractor(images), expected, rtol=1e-4, atol=1e-5)
    assert extractor.random
    assert f"to {side} x {side} px" in extractor.about["resize"]


def test_timms_weights_come_from_a_file_and_change_the_fingerprint(tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    model = timm.create_model("test_vit")  # with a classifier, as files have one
    torch.save(model.state_dict(), tmp_path / "vit.pth")
    extractor = create_extractor("timm:test_vit", tmp_path / "vit.pth")
    assert not extractor.random
    bare = create_extractor("timm:test_vit", "random")
    assert extractor.fingerprint != bare.fingerprint
    assert extractor.about["weights_sha256"] != bare.about["weights_sha256"]
    with pytest.raises(ExtractorError, match="no such file"):
        create_extractor("timm:test_vit", tmp_path / "other.pth")
    with pytest.raises(ExtractorError, match="did you mean timm:test_vit"):
        create_extractor("timm:test_vitt")


def test_any_callable_is_an_extractor_and_says_what_is_wrong_with_its_rows() -> None:
    extractor = Extractor.of_module("mean", lambda x: x.float().mean((2, 3)), {"network": "means"})
    images = pictures(5)
    torch.testing.assert_close(extractor(images), images.float().mean((2, 3)))
    assert extractor.fingerprint == Extractor.of_module("mean", lambda x: x, {"network": "means"}).fingerprint
    assert extractor.fingerprint != Extractor.of_module("mean", lambda x: x, {"network": "others"}).fingerprint
    one, two = nn.Linear(3, 2), nn.Linear(3, 2)
    assert Extractor.of_module("head", one).fingerprint != Extractor.of_module("head", two).fingerprint
    with pytest.raises(ExtractorError, match=r"expected \(5, D\)"):
        Extractor.of_module("whole", lambda x: x.float())(images)
    with pytest.raises(TypeError, match="uint8"):
        extractor(images.float())


def test_the_random_extractor_is_the_same_everywhere_and_says_so() -> None:
    one, two = (create_extractor("random") for _ in range(2))
    assert one.fingerprint == two.fingerprint
    assert one.about["random"]
    assert one.fingerprint != create_extractor("random", precision="fp64").fingerprint
    images = pictures(3)
    assert torch.equal(one(images), two(images))
    torch.testing.assert_close(one(images), create_extractor("random", precision="fp64")(images), rtol=1e-4, atol=1e-5)
    with pytest.raises(ExtractorError, match="did you mean inception"):
        create_extractor("incepton")
