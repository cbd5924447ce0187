# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""Sets of images, their features in parts, and `maetok-fast evaluate`: the same numbers however they come about."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from typer.testing import CliRunner

from maetok_fast.cli import app
from maetok_fast.evaluation import (
    Extractor,
    ImageSet,
    Moments,
    SetError,
    collect,
    create_extractor,
    evaluate,
    frechet_distance,
    open_set,
)
from maetok_fast.evaluation.result import markdown

pytestmark = pytest.mark.usefixtures("one_thread")
COUNT, SIDE = 40, 12


def pixels(count: int = COUNT, side: int = SIDE, seed: int = 0) -> np.ndarray:
    """Blocks of colour: sets of other seeds differ."""
    random = np.random.default_rng(seed)
    colours = random.integers(0, 200 + seed % 50, (count, 3, 3, 3), dtype=np.uint8)
    return colours.repeat(side // 3, 1).repeat(side // 3, 2)


def written(folder: Path, images: np.ndarray, suffix: str = "png") -> Path:
    folder.mkdir()
    for i, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{i:06d}.{suffix}")
    return folder


def archive(path: Path, images: np.ndarray, labels: Any = None, **more: Any) -> Path:
    np.savez(path, arr_0=images, **({} if labels is None else {"arr_1": np.asarray(labels)}), **more)
    return path


def run(*asked: str) -> Any:
    return CliRunner().invoke(app, ["evaluate", *asked])


def numbers(result: dict[str, Any]) -> dict[str, float]:
    return {m["name"]: m["value"] for m in result["metrics"]}


# ---- sets ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def nine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return archive(tmp_path_factory.mktemp("sets") / "nine.npz", pixels(9), range(9))


@settings(max_examples=20, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)).map(sorted), max_size=4), st.integers(1, 11))
def test_npz_and_array_give_the_same_images_in_any_order_of_asking(
    nine: Path, spans: list[list[int]], batch: int
) -> None:
    images = pixels(9)
    stored, array = open_set(nine), ImageSet.of_array(images, range(9))
    assert list(stored.labels) == list(range(9))  # type: ignore[arg-type]
    for start, stop in spans:
        got, expected = (list(s.batches(start, stop, batch)) for s in (stored, array))
        assert [len(b) for b in got] == [len(b) for b in expected]
        assert all(torch.equal(a, b) for a, b in zip(got, expected))


def test_a_folder_is_read_as_it_is_or_resized_and_says_which(tmp_path: Path) -> None:
    images = pixels(3)
    folder = written(tmp_path / "images", images)
    as_is, small = open_set(folder), open_set(folder, size=6, crop="adm")
    assert torch.equal(next(as_is.batches()), torch.from_numpy(images).permute(0, 3, 1, 2))
    assert small.shape == (6, 6)
    assert "adm crop to 6 px" in small.treatment
    assert len({as_is.fingerprint, small.fingerprint, open_set(folder, limit=2).fingerprint}) == 3
    before = as_is.fingerprint
    os.utime(folder / "000001.png", ns=(1, 1))
    assert open_set(folder).fingerprint != before


def test_what_is_no_set_is_said_in_a_sentence(tmp_path: Path) -> None:
    folder = written(tmp_path / "images", pixels(2))
    Image.new("RGB", (5, 5)).save(folder / "000002.png")
    with pytest.raises(SetError, match=r"000002.png has 5 x 5 pixels and the first image 12 x 12; give size="):
        list(open_set(folder).batches())
    with pytest.raises(SetError, match="are not resized"):
        open_set(archive(tmp_path / "a.npz", pixels(2)), size=6)
    with pytest.raises(SetError, match="unknown crop"):
        open_set(folder, crop="none of these")
    with pytest.raises(SetError, match="expected uint8"):
        ImageSet.of_array(np.zeros((2, 3, 4, 4), np.float32))
    with pytest.raises(SetError, match=r"b.npz: there is no such file"):
        open_set(tmp_path / "b.npz")
    (folder / "000001.png").write_bytes(b"no image")
    with pytest.raises(SetError, match=r"images: .*000001.png.*mend or remove it"):
        list(open_set(folder).batches())


@pytest.mark.parametrize(("overview", "beside"), [("grid.png", "run.json"), ("compare.png", "metrics.csv")])
@pytest.mark.parametrize("classes", [False, True])
def test_the_overview_that_a_command_wrote_beside_its_images_is_none_of_them(
    overview: str, beside: str, classes: bool, tmp_path: Path
) -> None:
    images = pixels(6)
    if classes:
        (tmp_path / "out").mkdir()
        for k in range(2):
            written(tmp_path / "out" / f"class {k}", images[: 3 + 3 * k])
    else:
        written(tmp_path / "out", images)
    Image.new("RGB", (50, 40)).save(tmp_path / "out" / overview)
    (tmp_path / "out" / beside).touch()
    found = open_set(tmp_path / "out")
    shown = torch.cat(list(found.batches())).numpy().transpose(0, 2, 3, 1)
    assert np.array_equal(shown, np.concatenate([images[:3], images]) if classes else images)
    assert (found.labels is None) is not classes
    assert found.labels is None or found.labels.tolist() == [0] * 3 + [1] * 6
    (tmp_path / "out" / beside).unlink()  # an image of that name among those of somebody else
    with pytest.raises(ValueError, match=overview):
        list(open_set(tmp_path / "out").batches())


def test_labels_may_be_any_numbers() -> None:
    found = ImageSet.of_array(pixels(4), [3, 10**14, 3, 10**14]).balance()
    assert found == {"classes": 2, "least": 2, "most": 2, "equal": True}


# ---- features in parts ---------------------------------------------------------------------------------------------


def counting(limit: int = 10**9) -> tuple[Extractor, list[int]]:
    """An extractor that counts its images and stops the run behind `limit` of them."""
    seen: list[int] = []

    def network(images: torch.Tensor) -> torch.Tensor:
        if sum(seen) >= limit:
            raise KeyboardInterrupt
        seen.append(len(images))
        return images.float().mean((2, 3))

    return Extractor.of_module("means", network, {"network": "means"}), seen


def test_a_run_that_was_stopped_goes_on_where_it_was(tmp_path: Path) -> None:
    images = ImageSet.of_array(pixels())
    whole = collect(images, counting()[0]).array()
    stopped, _ = counting(22)
    with pytest.raises(KeyboardInterrupt):
        collect(images, stopped, tmp_path, batch=3, part=8)
    place = next(tmp_path.iterdir())
    (place / ".writing-left").write_bytes(b"half")
    goes_on, seen = counting()
    found = collect(images, goes_on, tmp_path, batch=3, part=8)
    assert sum(seen) == COUNT - 16  # two parts were there
    np.testing.assert_array_equal(found.array(), whole)
    assert not list(place.glob(".writing-*"))
    again, seen = counting()
    np.testing.assert_array_equal(collect(images, again, tmp_path, part=8).array(), whole)
    assert not seen
    moments = Moments.of(whole)
    np.testing.assert_allclose(found.moments().covariance, moments.covariance, rtol=1e-9)


def test_parts_of_another_set_or_extractor_are_not_used(tmp_path: Path) -> None:
    first, other = (ImageSet.of_array(pixels(seed=s)) for s in (0, 1))
    collect(first, counting()[0], tmp_path)
    same_name, _ = counting()
    same_name.about["network"] = "others"
    for images, extractor in ((other, counting()[0]), (first, same_name)):
        rows = collect(images, extractor, tmp_path).array()
        np.testing.assert_array_equal(rows, collect(images, extractor).array())
    assert len(list(tmp_path.iterdir())) == 3


def test_a_full_disk_is_said_with_the_file_that_had_no_room(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def full(path: Path, write: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("maetok_fast.evaluation.features.written", full)
    with pytest.raises(ValueError, match=r"about.json: cannot be written \(No space left on device\); make room"):
        collect(ImageSet.of_array(pixels(4)), counting()[0], tmp_path)


def test_a_damaged_part_is_named(tmp_path: Path) -> None:
    found = collect(ImageSet.of_array(pixels()), counting()[0], tmp_path)
    part = next(tmp_path.glob("*/part-*.npz"))
    part.write_bytes(part.read_bytes()[:40])
    with pytest.raises(ValueError, match=r"part-00000.npz: cannot be read .* remove it and run again"):
        found.array()


# ---- comparisons ---------------------------------------------------------------------------------------------------


def compare(samples: ImageSet, reference: ImageSet, **more: Any) -> dict[str, Any]:
    extractor = more.pop("extractor", None) or create_extractor("random")
    return evaluate.Comparison(samples, reference, [extractor], **more).measure()


def test_folder_and_npz_of_the_same_images_give_the_same_numbers(tmp_path: Path) -> None:
    images, others = pixels(), pixels(seed=1)
    reference = open_set(archive(tmp_path / "reference.npz", others))
    of_files = compare(open_set(written(tmp_path / "images", images)), reference)
    of_archive = compare(open_set(archive(tmp_path / "images.npz", images)), reference)
    assert numbers(of_files) == numbers(of_archive)
    assert numbers(of_files).keys() == {"FD random", "precision random", "recall random", "KID random", "MIND random"}


def test_stored_statistics_stand_in_for_the_images_and_are_laid_out_as_adms(tmp_path: Path) -> None:
    samples, reference = ImageSet.of_array(pixels()), ImageSet.of_array(pixels(60, seed=1))
    extractor = create_extractor("random")
    path = tmp_path / "reference.npz"
    evaluate.Comparison(samples, reference, [extractor]).save_statistics(path)
    with np.load(path) as found:
        moments = Moments.of(extractor(next(reference.batches())))
        np.testing.assert_allclose(found["mu"], moments.mean, rtol=1e-12)
        np.testing.assert_allclose(found["sigma"], moments.covariance, rtol=1e-9, atol=1e-12)
    by_images, by_statistics = compare(samples, reference), compare(samples, open_set(path))
    assert numbers(by_statistics)["FD random"] == pytest.approx(numbers(by_images)["FD random"], rel=1e-9)
    assert numbers(by_statistics)["precision random"] is None
    assert by_statistics["metrics"][0]["reference"] == 60
    assert any("no precision, recall" in trap for trap in by_statistics["traps"])
    other = create_extractor("random", precision="fp64")
    with pytest.raises(SetError, match=r"are not of random \(random weights, fp64\): they are of random .*fp32"):
        compare(samples, open_set(path), extractor=other)


def test_adms_files_are_of_the_published_inception_alone(tmp_path: Path) -> None:
    def network(images: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"features": images.float().mean((2, 3)), "spatial": images[:, 0, 0].float()}

    extractor = Extractor.of_module("inception", network)
    extractor.outputs, extractor.random = ("features", "spatial"), True
    np.savez(tmp_path / "adm.npz", mu=np.zeros(3), sigma=np.eye(3))
    samples, reference = ImageSet.of_array(pixels(2)), open_set(tmp_path / "adm.npz")
    with pytest.raises(SetError, match=r"they are of the published Inception weights \(ADM's file\)"):
        compare(samples, reference, extractor=extractor)
    extractor.random = False
    found = compare(samples, reference, extractor=extractor, metrics=["fd", "sfid"])
    moments = collect(samples, extractor).moments()
    spread = np.trace(moments.covariance)  # its only eigenvalue, of two samples
    expected = (moments.mean**2).sum() + spread + 3 - 2 * spread**0.5
    assert numbers(found) == {"FID": pytest.approx(expected, rel=1e-9), "sFID": None}
    assert "no statistics of inception's spatial features" in found["metrics"][1]["why"]


def test_fd_over_several_extractors_is_a_ratio_to_real_images_or_the_geometric_mean() -> None:
    samples, reference, floor = (ImageSet.of_array(pixels(30, seed=s)) for s in (0, 1, 2))
    extractors = [create_extractor("random"), Extractor.of_module("means", lambda x: x.float().mean((2, 3)))]
    mean = evaluate.Comparison(samples, reference, extractors, metrics=["fd"]).measure()
    found = numbers(mean)
    assert found["FD, geometric mean"] == pytest.approx((found["FD random"] * found["FD means"]) ** 0.5)
    ratio = evaluate.Comparison(samples, reference, extractors, floor=floor, metrics=["fd"]).measure()
    floors = ratio["metrics"][-1]["floors"]
    expected = sum(found[f"FD {name}"] / floors[name] for name in floors) / 2
    assert numbers(ratio)["FDr"] == pytest.approx(expected)
    assert floors == {n: pytest.approx(v) for n, v in _fds(floor, reference, extractors).items()}


def _fds(a: ImageSet, b: ImageSet, extractors: list[Extractor]) -> dict[str, float]:
    return {e.name: frechet_distance(*(collect(s, e).moments() for s in (a, b))) for e in extractors}


def jpegs(tmp_path: Path) -> ImageSet:
    return open_set(written(tmp_path / "jpeg", pixels(), "jpg"))


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda p: ImageSet.of_array(pixels()), "random weights: its numbers mean nothing"),
        (lambda p: ImageSet.of_array(pixels()), "is of 40 samples, and fewer raise it: half of them give"),
        (lambda p: ImageSet.of_array(pixels()), "40 samples span 39 of the features' 144 dimensions"),
        (lambda p: ImageSet.of_array(pixels()), "labels are not known"),
        (lambda p: ImageSet.of_array(pixels(), [0] * 30 + [1] * 10), "labels are not equal (10 to 30 of 2 classes)"),
        (lambda p: ImageSet.of_array(pixels(side=24)), "Samples have 24 x 24 pixels and the reference 12 x 12"),
        (jpegs, "40 of the 40 samples are JPEG files"),
    ],
)
def test_traps_are_named_where_they_apply(make: Callable[[Path], ImageSet], sentence: str, tmp_path: Path) -> None:
    found = compare(make(tmp_path), ImageSet.of_array(pixels(seed=1)), metrics=["fd"])
    assert any(sentence in trap for trap in found["traps"]), found["traps"]
    assert sentence in markdown(found)


def test_a_fair_comparison_has_no_traps_of_labels_or_sizes() -> None:
    images = ImageSet.of_array(pixels(), [i % 4 for i in range(COUNT)])
    found = compare(images, ImageSet.of_array(pixels(seed=1)), extractor=counting()[0], metrics=["kid"])
    assert found["traps"] == []


# ---- the command ---------------------------------------------------------------------------------------------------


def test_two_processes_give_the_result_of_one(tmp_path: Path) -> None:
    """1100 images are three parts of 512."""
    samples = written(tmp_path / "samples", pixels(1100, 6))
    reference = archive(tmp_path / "reference.npz", pixels(600, 6, 1), range(600))
    asked = ["--samples", str(samples), "--reference", str(reference), "--extractors", "random", "--metrics", "fd,prec"]
    one = run(*asked, "--out", str(tmp_path / "one"), "--device", "cpu")
    assert one.exit_code == 0, one.output
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    script = "from maetok_fast.cli import main; main()"
    two = [
        subprocess.Popen(
            [sys.executable, "-c", script, "evaluate", *asked, "--out", str(tmp_path / "two"), "--device", "cpu"],
            env={**os.environ, **meeting, "RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    said = [process.communicate(timeout=300) for process in two]
    assert [process.returncode for process in two] == [0, 0], said
    results = [(tmp_path / name / "evaluation.json").read_text() for name in ("one", "two")]
    assert results[0] == results[1]
    assert "FD random" in said[0][0] + said[1][0]
    parts = sorted(p.name for p in (tmp_path / "two" / "features").glob("*/part-*.npz"))
    assert parts == ["part-00000.npz"] * 2 + ["part-00001.npz"] * 2 + ["part-00002.npz"]


def test_the_command_writes_what_it_says_and_a_second_run_gives_the_same_file(tmp_path: Path) -> None:
    images, out = archive(tmp_path / "a.npz", pixels(), [i % 10 for i in range(COUNT)]), tmp_path / "out"
    reference = archive(tmp_path / "b.npz", pixels(seed=1))
    asked = ["--samples", str(images), "--reference", str(reference), "--extractors", "random", "--out", str(out)]
    statistics = tmp_path / "statistics.npz"
    first = run(*asked, "--device", "cpu", "--save-statistics", str(statistics))
    assert first.exit_code == 0, first.output
    before = (out / "evaluation.json").read_bytes()
    result = json.loads(before)
    assert result["samples"]["labels"] == {"classes": 10, "least": 4, "most": 4, "equal": True}
    for metric in result["metrics"]:
        assert f"{metric['value']:.5g}" in first.output
        assert f"{metric['value']:.5g}" in (out / "evaluation.md").read_text()
    assert run(*asked, "--device", "cpu").exit_code == 0
    assert (out / "evaluation.json").read_bytes() == before
    alone = run("--samples", str(images), "--reference", str(statistics), "--extractors", "random", "--device", "cpu")
    assert f"{result['metrics'][0]['value']:.5g}" in alone.output


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        ([], "give --reference, or --save-statistics"),
        (["--until", "fd_inception=10"], "--log and --until go together"),
        (["--log", "nowhere", "--until", "fd_inception=ten"], "--log and --until go together"),
        (["--reference", "A", "--extractors", "incepton"], "did you mean inception"),
        (["--reference", "A", "--weights", "inception"], "expected EXTRACTOR=FILE"),
        (["--reference", "A", "--weights", "dinov2=random"], "dinov2 is none of the extractors (inception)"),
        (["--reference", "A", "--reconstruction"], "give --out"),
        (["--reference", "A", "--metrics", "fid", "--extractors", "random"], "unknown metric fid"),
        (["--reference", "A", "--metrics", "", "--extractors", "random"], "no metrics to measure"),
        (["--save-statistics", "mine", "--extractors", "random"], "a name that ends in .npz"),
        (["--reference", "missing"], "missing"),
    ],
)
def test_a_mistake_is_one_sentence(more: list[str], sentence: str, tmp_path: Path) -> None:
    images = str(archive(tmp_path / "a.npz", pixels(4)))
    said = run("--samples", images, *[images if word == "A" else word for word in more], "--device", "cpu")
    assert said.exit_code == 2, said.output
    assert sentence in said.output
    assert "Traceback" not in said.output


def test_the_command_says_when_a_run_fell_to_a_value(tmp_path: Path) -> None:
    values = {0: 40.0, 100: 20.0, 200: 8.0}
    lines = [{"step": step, "validation/fd_random": value} for step, value in values.items()]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    said = run("--log", str(tmp_path), "--until", "fd_random=10")
    assert said.exit_code == 0, said.output
    assert "fd_random was 10 at step 183" in said.output
    assert "never 1 or less" in run("--log", str(tmp_path), "--until", "fd_random=1").output


def test_reconstructions_are_measured_in_pairs_and_as_a_set(tmp_path: Path) -> None:
    pytest.importorskip("torchmetrics")
    images = pixels(12, 24)
    originals = written(tmp_path / "originals", images)
    results = written(tmp_path / "results", images // 2)
    out = tmp_path / "out"
    asked = ["--samples", str(results), "--reference", str(originals), "--reconstruction", "--out", str(out)]
    said = run(*asked, "--extractors", "random", "--weights", "lpips=random", "--device", "cpu")
    assert said.exit_code == 0, said.output
    found = json.loads((out / "evaluation.json").read_text())
    error = ((images.astype(np.float64) - images // 2) ** 2).mean((1, 2, 3))
    assert found["reconstruction"]["psnr"]["mean"] == pytest.approx((10 * np.log10(255**2 / error)).mean(), rel=1e-5)
    assert "PSNR (dB)" in said.output
    assert "Not measured: MS-SSIM: needs images of 176 px" in said.output
    assert (out / "per_image.csv").exists()
