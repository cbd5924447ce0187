# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""maetok_fast.evaluation.reconstruction: metrics against their formulas and other libraries; pairs; what it writes."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from generator_runs import small_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from training_runs import write_images

from maetok_fast.data.images import psnr
from maetok_fast.evaluation.reconstruction import HIGHEST_DB, measure_reconstructions, pair, peak_signal_to_noise
from maetok_fast.models import CheckpointError
from maetok_fast.pipeline.run import RunError

pytestmark = pytest.mark.usefixtures("one_thread")
RANDOM = {"lpips": "random"}


class Images:
    """A set in memory."""

    def __init__(self, pixels: np.ndarray, names: list[str] | None = None) -> None:
        self.pixels, self.names = pixels, names

    def __len__(self) -> int:
        return len(self.pixels)

    def batches(self, start: int, stop: int, batch: int) -> Any:
        for at in range(start, stop, batch):
            yield torch.from_numpy(self.pixels[at : min(stop, at + batch)].transpose(0, 3, 1, 2).copy())


def pictures(count: int, side: int = 32, noise: float = 20, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Smooth pictures, and each with more noise than the one before."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:side, 0:side] / side
    waves = rng.uniform(1, 4, (count, 3, 3))
    originals = np.stack([[127 + 110 * np.sin(6.28 * (a * x + b * y) + c) for a, b, c in w] for w in waves])
    strength = noise * np.arange(1, count + 1).reshape(-1, 1, 1, 1) / count
    results = originals + strength * rng.standard_normal(originals.shape)
    first, second = (v.clip(0, 255).round().astype(np.uint8).transpose(0, 2, 3, 1) for v in (originals, results))
    return first, second


def rows_of(out: Path) -> list[dict[str, str]]:
    with (out / "per_image.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def no_download(*arguments: Any, **options: Any) -> None:
    raise OSError("no network here")


# ---- numbers --------------------------------------------------------------------------------------------------------


def ssim_by_its_formula(a: np.ndarray, b: np.ndarray) -> float:
    """Wang et al. 2004, in fp64, of all windows that lie inside."""
    offsets = np.arange(11) - 5.0
    window = np.exp(-(offsets**2) / (2 * 1.5**2))
    window = np.outer(window, window) / window.sum() ** 2

    def mean(v: np.ndarray) -> np.ndarray:
        return np.einsum("ijckl,kl->ijc", np.lib.stride_tricks.sliding_window_view(v, (11, 11), axis=(0, 1)), window)

    a, b = a.astype(np.float64), b.astype(np.float64)
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    ma, mb = mean(a), mean(b)
    va, vb, both = mean(a * a) - ma**2, mean(b * b) - mb**2, mean(a * b) - ma * mb
    return float((((2 * ma * mb + c1) * (2 * both + c2)) / ((ma**2 + mb**2 + c1) * (va + vb + c2))).mean())


def test_psnr_and_ssim_are_their_formulas_and_scikit_image_s(tmp_path: Path) -> None:
    pytest.importorskip("torchmetrics")
    from maetok_fast.pipeline.folders import ssim

    a, b = pictures(5, 40, noise=60)
    result = measure_reconstructions(Images(a), Images(b), tmp_path, weights=RANDOM, batch=2)
    rows = rows_of(tmp_path)
    for row, x, y in zip(rows, a, b, strict=True):
        assert float(row["psnr"]) == pytest.approx(psnr(x, y), abs=1e-6)
        assert float(row["ssim"]) == pytest.approx(ssim_by_its_formula(x, y), abs=3e-5)
        if (other := ssim(x, y)) is not None:
            assert float(row["ssim"]) == pytest.approx(other, abs=3e-5)
    for name in ("psnr", "ssim", "lpips"):
        values = np.array([float(row[name]) for row in rows])
        assert result[name]["mean"] == pytest.approx(values.mean(), abs=1e-6)
        assert result[name]["standard_error"] == pytest.approx(values.std(ddof=1) / math.sqrt(5), abs=1e-6)
    error = np.mean((a.astype(np.float64) - b) ** 2)
    assert result["psnr"]["of_mean_error"] == pytest.approx(10 * math.log10(255**2 / error), abs=1e-9)
    assert result["psnr"]["of_mean_error"] < result["psnr"]["mean"], "Jensen"
    assert json.loads((tmp_path / "reconstruction.json").read_text()) == result
    assert result["data_range"] == 255
    assert "data_range=2" in " ".join(result["traps"])


def test_ms_ssim_is_of_images_that_are_large_enough_whatever_the_batch(tmp_path: Path) -> None:
    functional = pytest.importorskip("torchmetrics.functional.image")
    a, b = pictures(2, 176, noise=90)
    result = measure_reconstructions(Images(a), Images(b), tmp_path, weights=RANDOM, batch=2)
    for row, x, y in zip(rows_of(tmp_path), a, b, strict=True):
        p, q = (torch.from_numpy(v.transpose(2, 0, 1)[None].copy()).double() for v in (y, x))
        want = functional.multiscale_structural_similarity_index_measure(p, q, data_range=255.0)
        assert float(row["ms_ssim"]) == pytest.approx(float(want), abs=1e-5)
        assert float(row["ssim"]) < float(row["ms_ssim"]) < 1
    assert "torchmetrics" in result["ms_ssim"]["how"]
    a, b = pictures(2, 168)
    small = measure_reconstructions(Images(a), Images(b), tmp_path, weights=RANDOM)
    assert small["ms_ssim"] == {"reason": "needs images of 176 px or more, these are of 168 x 168"}
    with pytest.raises(ValueError, match="larger than 160"):  # torchmetrics' own limit, in its words
        functional.multiscale_structural_similarity_index_measure(
            *(torch.zeros(1, 3, 175, 175) for _ in range(2)), data_range=255.0
        )


def test_an_equal_pair_counts_in_the_mean_as_a_number_that_is_stated(tmp_path: Path) -> None:
    a, b = pictures(3)
    b[1] = a[1]
    result = measure_reconstructions(Images(a), Images(b), tmp_path, weights=RANDOM)
    rows = rows_of(tmp_path)
    assert rows[1]["psnr"] == "inf"
    finite = [float(row["psnr"]) for row in rows if row["psnr"] != "inf"]
    assert result["psnr"]["mean"] == pytest.approx((sum(finite) + HIGHEST_DB) / 3, abs=1e-6)
    assert result["psnr"]["equal_pairs"] == 1
    assert f"{HIGHEST_DB:g} dB" in result["psnr"]["how"]
    assert float(rows[1]["lpips"]) == 0
    json.loads((tmp_path / "reconstruction.json").read_text(), parse_constant=pytest.fail)


def test_lpips_is_the_model_s_and_without_weights_there_is_a_reason_and_no_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from maetok_fast.models.perceptual import LPIPS

    a, b = pictures(5)
    result = measure_reconstructions(Images(a), Images(b), tmp_path, weights=RANDOM, batch=4)
    torch.manual_seed(0)
    model = LPIPS("random", "random")
    x, y = (torch.from_numpy(v.transpose(0, 3, 1, 2).copy()).float() / 127.5 - 1 for v in (a, b))
    want = model(x, y)
    torch.testing.assert_close(torch.tensor([float(r["lpips"]) for r in rows_of(tmp_path)]), want, atol=1e-6, rtol=1e-5)
    assert "RANDOM" in result["lpips"]["how"]
    assert any("random weights" in trap for trap in result["traps"])
    assert [w["image"] for w in result["worst"]] == [f"{i:06d}" for i in want.argsort(descending=True).tolist()]
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setattr(torch.hub, "download_url_to_file", no_download)
    state = torch.get_rng_state()
    without = measure_reconstructions(Images(a), Images(b), tmp_path)
    assert torch.equal(state, torch.get_rng_state())
    assert list(without["lpips"]) == ["reason"]
    assert "no network here" in without["lpips"]["reason"]
    assert without["lpips"]["reason"].endswith("and give --weights lpips=/path/to/vgg16-397923af.pth")
    assert without["worst_by"] == "psnr"
    assert without["worst"][0]["image"] == "000004"
    assert all(row["lpips"] == "" for row in rows_of(tmp_path))
    with pytest.raises(CheckpointError, match="no such file"):
        measure_reconstructions(Images(a), Images(b), tmp_path, weights={"lpips": str(tmp_path / "missing.pth")})
    with pytest.raises(ValueError, match="'vgg' is of no metric"):
        measure_reconstructions(Images(a), Images(b), tmp_path, weights={"vgg": "random"})


# ---- pairs ----------------------------------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(st.permutations(range(7)), st.sampled_from([".png", ".jpg", ".jpg.png", ".JPEG"]), st.integers(1, 8))
def test_pairs_are_by_name_whatever_the_order_the_suffix_and_the_batch(
    order: list[int], suffix: str, batch: int
) -> None:
    from maetok_fast.evaluation.reconstruction import _in_pairs

    names = [f"class {i % 2}/v1.{i}" for i in range(7)]
    a, b = pictures(7, 4)
    originals = Images(a, [f"{name}.jpg" for name in names])
    results = Images(b[list(order)], [f"{names[i]}{suffix}" for i in order])
    found = pair(originals, results)
    assert found.how == "by name"
    shown = list(_in_pairs(originals, results, found, batch))
    for k, want in enumerate((a, b)):
        assert np.array_equal(torch.cat([pixels[k] for pixels in shown]).numpy().transpose(0, 2, 3, 1), want)


def test_what_is_no_pair_is_refused_in_a_sentence(tmp_path: Path) -> None:
    a, b = pictures(3)
    by_order = pair(Images(a, ["a.png", "b.png", "c.png"]), Images(b, ["0.png", "1.png", "2.png"]))
    assert by_order == ([0, 1, 2], "by order: no name is in both sets (a.png, 0.png)", ["a.png", "b.png", "c.png"])
    twice = pair(Images(a, ["a.png", "a.jpg", "c.png"]), Images(b, ["0.png", "1.png", "2.png"]))
    assert twice.how == "by order: two of the originals have one name but for the suffix"
    flat = pair(Images(a, ["x/a.png", "x/b.png", "y/c.png"]), Images(b, ["c.png", "b.png", "a.png"]))
    assert flat == ([2, 1, 0], "by name, without folders", ["x/a.png", "x/b.png", "y/c.png"])
    overview = Images(np.concatenate([b[:1], b]), ["a.png", "b.png", "compare.png", "d.png"])
    assert pair(Images(a, ["a.jpg", "b.jpg", "d.jpg"]), overview).places == [0, 1, 3]
    assert pair(Images(a), overview).places == [0, 1, 3]
    for originals, results, match in (
        (Images(a), Images(b[:2]), "3 originals and 2 results are no pairs"),
        (Images(a[:0]), Images(b[:0]), "no images to compare"),
        (Images(a, ["a", "b", "c"]), Images(b, ["a", "b", "d"]), "1 of 3 originals have no result .* such as c"),
        (Images(a, ["a", "b", "c"]), Images(b[:, :30], ["a", "b", "c"]), "a: the original is 32 x 32 .* 30 x 32"),
    ):
        with pytest.raises(RunError, match=match):
            measure_reconstructions(originals, results, tmp_path, weights=RANDOM)


def test_the_results_of_maetok_fast_reconstruct_have_the_numbers_of_its_metrics_csv(tmp_path: Path) -> None:
    pytest.importorskip("skimage")
    pytest.importorskip("torchmetrics")
    from PIL import Image

    from maetok_fast.evaluation.sets import open_set
    from maetok_fast.pipeline import Pipeline
    from maetok_fast.pipeline.folders import reconstruct

    for i, path in enumerate(sorted(write_images(tmp_path / "originals", 5, 40).iterdir())):
        if i % 2:
            Image.open(path).save(path.with_suffix(".jpg"), quality=95)
            path.unlink()
    out = tmp_path / "out"
    reconstruct(Pipeline.from_pretrained(small_tokenizer(tmp_path / "tokenizer")), tmp_path / "originals", out)
    assert (out / "compare.png").exists()  # of another size, and no reconstruction
    result = measure_reconstructions(
        open_set(tmp_path / "originals", size=32), open_set(out), tmp_path / "measured", weights=RANDOM
    )
    assert result["pairs"] == "by name"
    assert "32" in result["treatment"]["originals"]
    with (out / "metrics.csv").open(newline="") as file:
        before = {row["image"]: row for row in csv.DictReader(file)}
    rows = rows_of(tmp_path / "measured")
    assert [row["image"] for row in rows] == sorted(before)
    for row in rows:
        assert float(row["psnr"]) == pytest.approx(float(before[row["image"]]["psnr"]), abs=1e-5)
        assert float(row["ssim"]) == pytest.approx(float(before[row["image"]]["ssim"]), abs=4e-5)


def test_the_picture_shows_the_worst_first_with_its_difference(tmp_path: Path) -> None:
    from PIL import Image

    a, b = pictures(12)
    result = measure_reconstructions(Images(a), Images(b), tmp_path, weights=RANDOM)
    assert len(result["worst"]) == 8
    worst = int(result["worst"][0]["image"])
    with Image.open(tmp_path / "worst.png") as image:
        sheet = np.asarray(image)
    shown = (a[worst], b[worst], (np.abs(a[worst].astype(int) - b[worst]) * 4).clip(0, 255))
    for k, want in enumerate(shown):
        left = 4 + k * 260
        # below a label of 16 px, 8 pixels for one
        assert np.array_equal(sheet[20 : 20 + 256 : 8, left : left + 256 : 8], want)


def test_bytes_do_not_overflow() -> None:
    black, white = (torch.full((1, 3, 8, 8), v, dtype=torch.uint8) for v in (0, 255))
    assert float(peak_signal_to_noise(black, white)) == 0
    one: Tensor = black.clone()
    one[0, 0, 0, 0] = 1
    assert float(peak_signal_to_noise(black, one)) == pytest.approx(10 * math.log10(255**2 * 192), abs=1e-9)
