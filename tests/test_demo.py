# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""`maetok-fast demo` in its quick form on drawn images: what each part leaves, that nothing is done twice, and that a
demo which was interrupted anywhere ends like one that was not."""

from __future__ import annotations

import html
import json
import os
import re
import shlex
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from safetensors.torch import load_file
from training_runs import bare
from typer.testing import CliRunner

from maetok_fast.cli import app
from maetok_fast.data import installed
from maetok_fast.data.samples import DataError
from maetok_fast.data.sources import open_source
from maetok_fast.demos import DemoStopped, fashion, run_demo
from maetok_fast.demos.classifier import Classifier, read_all, train_classifier
from maetok_fast.demos.fashion import PARTS, recognised, spread
from maetok_fast.demos.page import GAP, SCALE
from maetok_fast.demos.plan import differing, make_plan
from maetok_fast.kernels import _native
from maetok_fast.models import MAETok
from maetok_fast.pipeline import EncodingRun, RunError, SamplingRun
from maetok_fast.pipeline import run as sampling
from maetok_fast.training.loop import Loop
from maetok_fast.training.runs import read_run

SHAPES = ("disc", "frame", "stripes")  # sorted: the labels 0, 1, 2
TRAINED, TESTED = 30, 8  # of each

own_bits = pytest.mark.skipif(
    _native.why_missing() is not None, reason="samples that depend on no other row need the native library"
)


def draw(folder: Path, count: int, seed: int) -> Path:
    """Three kinds of shapes, of random places, sizes and colours, 28 x 28."""
    rng = np.random.default_rng(seed)
    for shape in SHAPES:
        (folder / shape).mkdir(parents=True)
        for i in range(count):
            image = Image.new("RGB", (28, 28), tuple(rng.integers(0, 60, 3).tolist()))
            pen, colour = ImageDraw.Draw(image), tuple(rng.integers(140, 256, 3).tolist())
            x, y = rng.integers(2, 10, 2).tolist()
            side = int(rng.integers(11, 16))
            if shape == "disc":
                pen.ellipse((x, y, x + side, y + side), fill=colour)
            elif shape == "frame":
                pen.rectangle((x, y, x + side, y + side), outline=colour, width=2)
            else:
                for k in range(y, 28, 5):
                    pen.line((0, k, 28, k), fill=colour, width=2)
            image.save(folder / shape / f"{i:03d}.png")
    return folder


@pytest.fixture(scope="module", autouse=True)
def _small(one_thread: None) -> Iterator[None]:
    patch = pytest.MonkeyPatch()
    bare(patch.setattr)
    yield
    patch.undo()


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    folder = tmp_path_factory.mktemp("drawn")
    return str(draw(folder / "train", TRAINED, 0)), str(draw(folder / "test", TESTED, 1))


def quickly(out: Path, images: tuple[str, str], **options: Any) -> dict[str, Any]:
    return run_demo(out, *images, quick=True, device="cpu", **{"quiet": True, **options})


@pytest.fixture(scope="module")
def whole(images: tuple[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A quick demo that nobody disturbed."""
    out = tmp_path_factory.mktemp("demos") / "whole"
    quickly(out, images)
    return out


def told(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "demo.json").read_text())
    return found


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def samples(out: Path) -> list[bytes]:
    return [path.read_bytes() for path in sorted((out / "samples").glob("[0-9]*.png"))]


def settled(found: dict[str, Any]) -> dict[str, Any]:
    """Without what no two runs have in common."""
    return {k: v for k, v in found.items() if not k.startswith(("seconds", "machine", "killed"))}


# ---- what is there afterwards --------------------------------------------------------------------------------------


def test_psnr_is_that_of_the_second_stages_average_on_all_test_images(whole: Path, images: tuple[str, str]) -> None:
    tokenizer = MAETok.from_pretrained(whole / "decoder/checkpoints/0000004/tokenizer").eval().double()
    shown, _ = read_all(open_source(images[1]), 32, 3 * TESTED, workers=0)
    with torch.no_grad():
        results = tokenizer(shown.double() / 127.5 - 1)
    results = ((results + 1) * 127.5).round().clamp(0, 255)
    errors = (results - shown.double()).square().flatten(1).mean(1)
    # what is computed in bf16 rounds some pixels to the level beside
    assert told(whole)["psnr"] == pytest.approx(float((10 * torch.log10(255**2 / errors)).mean()), abs=0.02)
    assert told(whole)["test_images"] == 3 * TESTED


def test_the_share_recognised_is_that_of_the_pictures_on_disk(whole: Path) -> None:
    found, files = told(whole), sorted((whole / "samples").glob("[0-9]*.png"))
    judge = Classifier.load(whole / "classifier/classifier.safetensors")
    right = np.array([judge.predict(torch.tensor(pixels(f)).permute(2, 0, 1)[None]).item() for f in files])
    right = right == np.arange(len(files)) % 3
    assert len(files) == found["samples"] == 6
    assert found["recognised"] == pytest.approx(right.mean())
    assert found["recognised_per_class"] == {name: right[c::3].mean() for c, name in enumerate(SHAPES)}
    assert found["classes"] == list(SHAPES)


def test_the_classifiers_accuracy_is_that_on_the_test_images(whole: Path, images: tuple[str, str]) -> None:
    judge = Classifier.load(whole / "classifier/classifier.safetensors")
    shown, labels = read_all(open_source(images[1]), 32, 3 * TESTED, workers=0)
    assert labels.tolist() == [0] * TESTED + [1] * TESTED + [2] * TESTED
    right = [int(judge(image[None]).argmax()) == label for image, label in zip(shown, labels.tolist())]
    assert told(whole)["classifier"]["test_accuracy"] == pytest.approx(np.mean(right))


def test_the_pictures_show_the_samples_and_the_test_images(whole: Path, images: tuple[str, str]) -> None:
    grid, side = pixels(whole / "samples.png"), SCALE * 32
    left = grid.shape[1] - 2 * (side + GAP)  # two of each class
    for c in range(3):
        for k in range(2):
            top, at = GAP + c * (side + GAP), left + k * (side + GAP)
            there = grid[top : top + side : SCALE, at : at + side : SCALE]
            np.testing.assert_array_equal(there, pixels(whole / f"samples/{3 * k + c:06d}.png"))
    shown, _ = read_all(open_source(images[1]), 32, 3 * TESTED, workers=0)
    pair = pixels(whole / "reconstructions.png")
    left = pair.shape[1] - 10 * (side + GAP)
    first = pair[GAP : GAP + side : SCALE, left : left + side : SCALE]
    np.testing.assert_array_equal(first, shown[0].permute(1, 2, 0).numpy())
    pytest.importorskip("matplotlib")
    assert pixels(whole / "curves.png").std() > 5


def test_the_page_needs_no_other_file(whole: Path) -> None:
    page = (whole / "demo.html").read_text()
    sources = re.findall(r'src="([^"]{0,22})', page)
    assert len(sources) >= 2
    assert set(sources) == {"data:image/png;base64,"}
    assert "http" not in page
    assert f"{told(whole)['psnr']:.2f} dB" in page
    assert f"{told(whole)['recognised']:.1%}" in page


def test_every_part_has_its_time(whole: Path) -> None:
    found = told(whole)
    assert list(found["seconds"]) == list(PARTS)
    assert all(seconds > 0 for seconds in found["seconds"].values())
    assert found["seconds_total"] == pytest.approx(sum(found["seconds"].values()), abs=0.01)
    assert found["nfe"] == 4
    assert found["machine"]["cores"] >= 1
    assert found["versions"]["torch"]


@own_bits
def test_the_pages_commands_find_everything_there(whole: Path) -> None:
    before = samples(whole), (whole / "samples/run.json").read_bytes()
    page = html.unescape((whole / "demo.html").read_text())
    commands = re.findall(r"^(?:<pre>)?(maetok-fast .+?)(?:</pre>)?$", page, re.M)
    said = [CliRunner().invoke(app, shlex.split(command)[1:]) for command in commands]
    assert [one.exit_code for one in said] == [0] * 5, [one.output for one in said]
    assert "trained 4 steps" in said[0].output
    assert "trained 4 steps" in said[1].output
    assert f"{3 * TRAINED} images were there" in said[2].output
    assert "trained 4 steps" in said[3].output
    assert "6 samples were there" in said[4].output
    assert (samples(whole), (whole / "samples/run.json").read_bytes()) == before


def test_what_is_said_by_hand_is_the_same_run(tmp_path: Path) -> None:
    """The whole demo's commands, which no test runs."""
    plan = make_plan(
        tmp_path / "a b", "some,where", "x", images=5, tested=5, classes=4, seed=3, device="cpu", quick=False
    )
    for stage, run in (("tokenizer", plan.tokenizer), ("decoder", plan.decoder), ("generator", plan.generator)):
        name = f"laptop_{stage}"
        assert read_run(stage, name, differing(name, run)) == run
    assert plan.generator.data.flip == 0.0


# ---- going on ------------------------------------------------------------------------------------------------------


def test_a_second_run_repeats_nothing(whole: Path, images: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("this was done already")

    before = {path: path.stat().st_mtime_ns for path in whole.rglob("*") if path.is_file()}
    for name in ("trained", "EncodingRun", "Pipeline", "train_classifier", "write_page"):
        monkeypatch.setattr(fashion, name, never)
    lines: list[str] = []
    assert quickly(whole, images, say=lines.append) == told(whole)
    assert {path: path.stat().st_mtime_ns for path in whole.rglob("*") if path.is_file()} == before
    assert [line.split()[0] for line in lines] == list(PARTS)
    assert all(line.endswith("was there") for line in lines)


def broken(patch: pytest.MonkeyPatch, owner: Any, name: str, calls: int) -> list[int]:
    """The method fails, once, at its call of this number; returns the calls so far."""
    real: Callable[..., Any] = getattr(owner, name)
    seen = [0]

    def method(*args: Any, **kwargs: Any) -> Any:
        seen[0] += 1
        if seen[0] == calls:
            raise OSError(f"{name} is broken")
        return real(*args, **kwargs)

    patch.setattr(owner, name, method)
    return seen


@own_bits
def test_a_demo_that_was_interrupted_everywhere_ends_like_one_that_was_not(
    whole: Path, images: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = broken(monkeypatch, Loop, "_one_step", 4)  # the first training's last step, behind a checkpoint
    with pytest.raises(OSError, match="_one_step is broken"):
        quickly(tmp_path, images)
    assert steps == [4]
    for owner, name, calls in (
        (EncodingRun, "_write_shard", 1),
        (sampling, "save_png", 4),  # three of six are there
        (SamplingRun, "finish", 1),
        (fashion, "train_classifier", 1),
        (fashion, "write_page", 1),
    ):
        broken(monkeypatch, owner, name, calls)
        with pytest.raises((OSError, RunError), match=f"{name} is broken"):
            quickly(tmp_path, images)
    found = quickly(tmp_path, images)
    # a step of the first training was computed twice, and none of the others
    assert steps == [4 + 2 + 4 + 4]
    assert settled(found) == settled(told(whole))
    assert samples(tmp_path) == samples(whole)
    for place in ("tokenizer/checkpoints/0000004/tokenizer", "generator/checkpoints/0000004/generator"):
        names = [path.name for path in (whole / place).glob("*.safetensors")]
        assert names
        for name in names:
            there = load_file(whole / place / name)
            weights = load_file(tmp_path / place / name)
            assert weights.keys() == there.keys()
            assert all(torch.equal(weights[key], value) for key, value in there.items())
    assert found["killed_starts"] == 0
    parts = json.loads((tmp_path / "parts.json").read_text())["parts"]
    assert {name: part["starts"] for name, part in parts.items()} == {
        "tokenizer": 2, "decoder": 1, "latents": 2, "generator": 1, "samples": 3, "classifier": 2, "score": 2
    }  # fmt: skip


def test_a_killed_start_is_counted(images: tuple[str, str], whole: Path, tmp_path: Path) -> None:
    """Of what a kill leaves: a start of the last part that has no end."""
    record = tmp_path / "parts.json"
    content = json.loads((whole / "parts.json").read_text())
    content["parts"]["samples"]["starts"] += 1
    record.write_text(json.dumps(content))
    ledger = fashion.Ledger(record, content["asked"])
    assert ledger.lost() == 1
    with pytest.raises(RunError, match=r"holds another demo \(seed: 0 there, 1 asked for\); give another --out"):
        fashion.Ledger(record, content["asked"] | {"seed": 1})
    record.write_text("{")
    with pytest.raises(RunError, match="is not the record of a demo"):
        fashion.Ledger(record, content["asked"])


def test_ctrl_c_stops_the_demo_behind_a_checkpoint(
    images: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Loop._one_step

    def one_step(self: Loop, batches: Any) -> Any:
        os.kill(os.getpid(), signal.SIGINT)
        return real(self, batches)

    monkeypatch.setattr(Loop, "_one_step", one_step)
    with pytest.raises(DemoStopped, match="stopped at step 1 of 4"):
        quickly(tmp_path / "a", images)
    asked = ["demo", "--quick", "--quiet", "--data", images[0], "--test", images[1], "--out", str(tmp_path / "b")]
    said = CliRunner().invoke(app, [*asked, "--device", "cpu"])
    assert said.exit_code == 0, said.output
    assert said.output.strip().endswith("the same command goes on")
    assert (tmp_path / "b/tokenizer/checkpoints/0000001").is_dir()
    assert not (tmp_path / "b/decoder").exists()


# ---- what it refuses -----------------------------------------------------------------------------------------------


def test_another_demo_is_not_mixed_in(whole: Path, images: tuple[str, str]) -> None:
    with pytest.raises(RunError, match="holds another demo"):
        run_demo(whole, *images, quick=False, device="cpu", quiet=True)
    with pytest.raises(RunError, match=r"holds another demo \(data: .* there, .* asked for\)"):
        quickly(whole, (images[1], images[1]))


def test_images_without_classes_and_with_others_are_refused(images: tuple[str, str], tmp_path: Path) -> None:
    with pytest.raises(DataError, match="the demo needs images with classes, and these have none"):
        quickly(tmp_path / "out", (images[0], str(Path(images[1]) / "disc")))
    other = tmp_path / "other"
    (other / "cat").mkdir(parents=True)
    Image.new("RGB", (28, 28)).save(other / "cat/0.png")
    with pytest.raises(DataError, match=r"has other classes \(cat \.\.\.\) than .* \(disc, frame, stripes \.\.\.\)"):
        quickly(tmp_path / "out", (images[0], str(other)))
    assert not (tmp_path / "out").exists()


def test_without_fashion_mnist_a_sentence_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(installed, "FASHION_MNIST", tmp_path / "nowhere")
    said = CliRunner().invoke(app, ["demo", "--out", str(tmp_path / "out")])
    assert said.exit_code == 2
    assert "apt install dataset-fashion-mnist" in said.output
    assert "--data FOLDER --test FOLDER" in said.output
    assert len(said.output.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


# ---- the classifier ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def learnt(images: tuple[str, str]) -> tuple[torch.Tensor, torch.Tensor]:
    return read_all(open_source(images[0]), 32, 3 * TRAINED, workers=0)


def test_the_classifier_learns_the_drawn_classes(
    learnt: tuple[torch.Tensor, torch.Tensor], images: tuple[str, str]
) -> None:
    model = train_classifier(*learnt, 3, epochs=12, batch=16)
    shown, labels = read_all(open_source(images[1]), 32, 3 * TESTED, workers=0)
    assert (model.predict(shown) == labels).double().mean() > 0.9


def test_the_classifier_is_the_same_each_time_and_leaves_random_numbers_alone(
    learnt: tuple[torch.Tensor, torch.Tensor], tmp_path: Path
) -> None:
    counts: list[int] = []
    before = torch.get_rng_state()
    first = train_classifier(*learnt, 3, epochs=1, seed=5, done=counts.append)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(3)
    second, other = (train_classifier(*learnt, 3, epochs=1, seed=seed) for seed in (5, 6))
    weights = first.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in second.state_dict().items())
    assert not torch.equal(other.head.weight, first.head.weight)
    assert sum(counts) == 3 * TRAINED
    first.save(tmp_path / "it.safetensors")
    again = Classifier.load(tmp_path / "it.safetensors")
    assert (again.classes, again.size) == (3, 32)
    with torch.no_grad():
        assert torch.equal(again(learnt[0][:9]), first(learnt[0][:9]))


def test_the_classifier_says_what_it_takes() -> None:
    with pytest.raises(ValueError, match="a multiple of 8, got 28"):
        Classifier(3, 28)
    with pytest.raises(ValueError, match=r"images: expected shape \(B, 3, 32, 32\)"):
        Classifier(3, 32)(torch.zeros(2, 3, 28, 28, dtype=torch.uint8))


# ---- what is counted -----------------------------------------------------------------------------------------------


def test_shares_are_of_the_class_asked_for() -> None:
    share, each = recognised(torch.tensor([0, 0, 0, 1, 2, 2]), torch.tensor([0, 1, 0, 1, 0, 1]), 3)
    assert share == 0.5
    assert each == [pytest.approx(2 / 3), 1.0, 0.0]


def test_spread_is_the_deviation_within_a_class() -> None:
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (12, 3, 4, 4), dtype=np.uint8)
    labels = np.arange(12) % 3
    inside = [images[labels == c].astype(np.float64) for c in range(3)]
    expected = np.sqrt(np.mean([part.var(0) for part in inside]))
    assert spread(torch.from_numpy(images), torch.from_numpy(labels)) == pytest.approx(expected, rel=1e-12)
    alike = np.stack([images[0], images[1], images[2]] * 4)
    assert spread(torch.from_numpy(alike), torch.from_numpy(labels)) == 0


# ---- Debian's images -----------------------------------------------------------------------------------------------


def test_the_quick_demo_runs_on_fashion_mnist(tmp_path: Path) -> None:
    if not installed.FASHION_MNIST.is_dir():
        pytest.skip("apt install dataset-fashion-mnist")
    said = CliRunner().invoke(app, ["demo", "--quick", "--quiet", "--out", str(tmp_path), "--device", "cpu"])
    assert said.exit_code == 0, said.output
    assert "of 20 samples are recognised as the class asked for" in said.output
    assert told(tmp_path)["classes"][-1] == "ankle boot"
    assert [line.split()[0] for line in said.output.splitlines()[: len(PARTS)]] == list(PARTS)
