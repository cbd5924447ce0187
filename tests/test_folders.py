# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""Folders and tars of images through a tokenizer, and the commands that do it."""

from __future__ import annotations

import csv
import json
import math
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from typer.testing import CliRunner

from maetok_fast.cli import app
from maetok_fast.data.images import load_image, to_uint8
from maetok_fast.models import CheckpointError
from maetok_fast.pipeline import LatentStatistics, Pipeline, RunError, folders
from maetok_fast.pipeline.demo import demo_tokenizer


@pytest.fixture(scope="module", autouse=True)
def _one_thread(one_thread: None) -> None:
    pass


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    return demo_tokenizer().save_pretrained(tmp_path_factory.mktemp("weights") / "tokenizer")


@pytest.fixture(scope="module")
def pipeline(weights: Path) -> Pipeline:
    return Pipeline.from_pretrained(weights, precision="fp32")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of several modes and sizes, in folders, beside what only calls itself one."""
    folder = tmp_path_factory.mktemp("images")
    random = np.random.default_rng(0)
    (folder / "a" / "b").mkdir(parents=True)
    for name, mode, size in [
        ("a/x.jpg", "RGB", (90, 70)),
        ("a/b/x.png", "RGBA", (64, 64)),
        ("a/grey.png", "L", (200, 100)),
        ("cmyk.jpg", "CMYK", (80, 80)),
        ("palette.gif", "P", (70, 90)),
        ("z.webp", "RGB", (65, 64)),
    ]:
        channels = {"RGB": 3, "RGBA": 4, "L": 1, "CMYK": 4, "P": 1}[mode]
        small = random.integers(0, 256, (8, 8, channels), dtype=np.uint8).squeeze()
        if mode == "P":
            image = Image.fromarray(small).convert("P")
        else:
            image = Image.fromarray(small, mode)
        image.resize(size).save(folder / name)
    (folder / "broken.png").write_bytes((folder / "a" / "b" / "x.png").read_bytes()[:60])
    (folder / "text.jpg").write_text("no image")
    (folder / "notes.txt").write_text("not looked at")
    return folder


NAMES = ["a/b/x.png", "a/grey.png", "a/x.jpg", "cmyk.jpg", "palette.gif", "z.webp"]


@pytest.fixture(scope="module")
def archive(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tar") / "images.tar"
    with tarfile.open(path, "w") as file:
        for name in [*reversed(NAMES), "broken.png", "text.jpg", "notes.txt"]:
            file.add(source / name, name)
    return path


@pytest.mark.parametrize("crop", ["center", "adm"])
def test_reconstruct(crop: str, pipeline: Pipeline, source: Path, archive: Path, tmp_path: Path) -> None:
    passed = folders.reconstruct(pipeline, source, tmp_path / "folder", crop=crop, batch=4)
    assert passed.done == NAMES
    assert set(passed.refused) == {"broken.png", "text.jpg"}
    images = torch.stack([load_image(source / name, 64, crop=crop) for name in NAMES])
    originals, results = to_uint8(images), to_uint8(pipeline.reconstruct(images))
    with (tmp_path / "folder" / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["image"] for row in rows] == NAMES
    for name, row, original, result in zip(NAMES, rows, originals, results):
        path = tmp_path / "folder" / (name if name.endswith(".png") else f"{name}.png")
        assert np.array_equal(np.asarray(Image.open(path)), result)
        error = np.square(original.astype(float) - result).mean()
        assert float(row["psnr"]) == pytest.approx(10 * math.log10(255**2 / error), abs=1e-4)
        assert -1 <= float(row["ssim"]) < 1
        assert (row["crop"], row["size"]) == (crop, "64")
    assert passed.mean["psnr"] == pytest.approx(np.mean([float(row["psnr"]) for row in rows]), abs=1e-4)
    compared = Image.open(tmp_path / "folder" / "compare.png")
    assert compared.width > 3 * 64
    folders.reconstruct(pipeline, archive, tmp_path / "tar", crop=crop, batch=5)
    for path in sorted(p for p in (tmp_path / "folder").rglob("*") if p.is_file()):
        assert (tmp_path / "tar" / path.relative_to(tmp_path / "folder")).read_bytes() == path.read_bytes(), path


def test_measures() -> None:
    x = np.random.default_rng(0).integers(0, 256, (32, 40, 3), dtype=np.uint8)
    assert folders.psnr(x, x) == math.inf
    assert folders.ssim(x, x) == pytest.approx(1)
    assert folders.psnr(np.zeros((4, 4, 3), np.uint8), np.full((4, 4, 3), 255, np.uint8)) == 0
    assert folders.ssim(x[:10], x[:10]) is None


def test_encode_and_decode(pipeline: Pipeline, source: Path, archive: Path, tmp_path: Path) -> None:
    passed = folders.encode(pipeline, source, tmp_path / "x.safetensors", batch=4)
    assert passed.done == NAMES
    with safe_open(tmp_path / "x.safetensors", "pt") as file:
        about, latents = json.loads(file.metadata()["maetok_fast"]), file.get_tensor("latents")
    images = torch.stack([load_image(source / name, 64) for name in NAMES])
    torch.testing.assert_close(latents, pipeline.encode(images), rtol=0, atol=1e-5)
    assert about["names"] == NAMES
    assert (about["crop"], about["size"], about["normalised"]) == ("center", 64, True)
    folders.encode(pipeline, archive, tmp_path / "y.safetensors", batch=4)
    assert (tmp_path / "y.safetensors").read_bytes() == (tmp_path / "x.safetensors").read_bytes()
    folders.decode(pipeline, tmp_path / "x.safetensors", tmp_path / "decoded", batch=5)
    folders.reconstruct(pipeline, source, tmp_path / "reconstructed")
    for name in NAMES:
        path = name if name.endswith(".png") else f"{name}.png"
        decoded, direct = (
            np.asarray(Image.open(tmp_path / d / path)).astype(int) for d in ("decoded", "reconstructed")
        )
        assert np.abs(decoded - direct).max() <= 1, "the way through z rounds"


def test_refusals(pipeline: Pipeline, source: Path, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="expected a folder or a tar"):
        folders.reconstruct(pipeline, tmp_path / "nothing", tmp_path / "out")
    (tmp_path / "empty").mkdir()
    with pytest.raises(RunError, match="no images: expected files ending in"):
        folders.encode(pipeline, tmp_path / "empty", tmp_path / "out.safetensors")
    (tmp_path / "empty" / "a.png").write_text("no")
    with pytest.raises(RunError, match=r"none of its 1 images can be read, first a\.png: "):
        folders.encode(pipeline, tmp_path / "empty", tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").exists()
    folders.encode(pipeline, source, tmp_path / "x.safetensors")
    torch.manual_seed(1)
    other = demo_tokenizer()
    object.__setattr__(other.config, "latent_std", 1.0)
    with pytest.raises(RunError, match="its latents are normalised: give the tokenizer, and the statistics"):
        folders.decode(Pipeline(other), tmp_path / "x.safetensors", tmp_path / "out")
    folders.encode(Pipeline(other), source, tmp_path / "y.safetensors")
    with pytest.raises(RunError, match="its latents are not normalised"):
        folders.decode(pipeline, tmp_path / "y.safetensors", tmp_path / "out")
    LatentStatistics.identity().save(tmp_path)
    with pytest.raises(CheckpointError, match="holds no latents and names"):
        folders.decode(pipeline, tmp_path / "latent_statistics.safetensors", tmp_path / "out")


def test_names_of_a_tar_stay_below_the_folder(pipeline: Pipeline, source: Path, tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "images.tar", "w") as file:
        for name in ("../up.png", "/top.png", "a/../../b.png"):
            member = file.gettarinfo(source / "a/b/x.png")
            member.name = name
            with (source / "a/b/x.png").open("rb") as content:
                file.addfile(member, content)
    folders.reconstruct(pipeline, tmp_path / "images.tar", tmp_path / "out" / "here")
    written = {str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*.png")}
    assert written == {f"out/here/{n}" for n in ("up.png", "top.png", "a/b.png", "compare.png")}


def test_the_commands(weights: Path, source: Path, tmp_path: Path) -> None:
    def run(*words: str) -> tuple[int, str]:
        done = CliRunner().invoke(app, [*words, "--tokenizer", str(weights), "--precision", "fp32"])
        return done.exit_code, done.output

    code, said = run("reconstruct", str(source), "--out", str(tmp_path / "a"), "--crop", "adm")
    assert code == 1, said
    assert "skipped: broken.png: " in said
    assert "6 images reconstructed, crop adm, mean PSNR " in said
    assert "2 skipped" in said
    code, said = run("encode", str(source / "a"), "--out", str(tmp_path / "x.safetensors"))
    assert code == 0, said
    assert "3 images encoded, crop center" in said
    code, said = run("decode", str(tmp_path / "x.safetensors"), "--out", str(tmp_path / "b"))
    assert code == 0, said
    assert len(list((tmp_path / "b").rglob("*.png"))) == 3
    code, said = run("reconstruct", str(tmp_path / "nothing"), "--out", str(tmp_path / "c"))
    assert code == 2
    assert "expected a folder or a tar of images" in said
    assert "Traceback" not in said
