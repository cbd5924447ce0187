# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""maetok_fast.data.installed: images that a package manager brings."""

from __future__ import annotations

import gzip
import io
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from maetok_fast.data import installed
from maetok_fast.data.installed import IdxSource, read_idx
from maetok_fast.data.sources import DataError, open_source


def idx(array: np.ndarray) -> bytes:
    return bytes((0, 0, 8, array.ndim)) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def write(folder: Path, part: str, images: np.ndarray, labels: np.ndarray) -> None:
    folder.mkdir(exist_ok=True)
    for kind, array in (("images-idx3", images), ("labels-idx1", labels)):
        (folder / f"{part}-{kind}-ubyte.gz").write_bytes(gzip.compress(idx(array)))


def test_fashion_mnist_is_read_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (5, 28, 28), np.uint8), np.array([3, 0, 9, 1, 3], np.uint8)
    write(tmp_path / "f", "train", images, labels)
    write(tmp_path / "f", "t10k", images[:2], labels[:2])
    monkeypatch.setattr(installed, "FASHION_MNIST", tmp_path / "f")
    source, test = open_source("fashion-mnist"), open_source("fashion-mnist:test")
    assert (len(source), len(test)) == (5, 2)
    assert source.classes[9] == "ankle boot"
    for i in range(5):
        assert source.label(i) == labels[i]
        assert np.array_equal(np.array(Image.open(io.BytesIO(source.read(i)))), images[i])
    assert source.fingerprint() != test.fingerprint()


def test_what_is_not_installed_is_said_with_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(installed, "FASHION_MNIST", tmp_path)
    with pytest.raises(DataError, match="apt install dataset-fashion-mnist"):
        open_source("fashion-mnist")


def test_a_folder_of_that_name_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("photographs").mkdir()
    Image.new("RGB", (4, 4)).save("photographs/mine.png")
    assert open_source("photographs").name(0) == "mine.png"


def test_photographs_of_the_wheels_are_a_source() -> None:
    pytest.importorskip("skimage")
    source = open_source("photographs")
    assert len(source) >= 2
    assert Image.open(io.BytesIO(source.read(0))).size > (100, 100)


@pytest.mark.parametrize("cut", [0, 3, 15, 20, -1])
def test_a_file_that_was_cut_is_named(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "x-ubyte"
    path.write_bytes(idx(np.zeros((2, 4, 4), np.uint8))[:cut])
    with pytest.raises(DataError, match="x-ubyte"):
        read_idx(path, 3)


def test_labels_of_another_number_are_refused(tmp_path: Path) -> None:
    write(tmp_path, "train", np.zeros((2, 4, 4), np.uint8), np.zeros(3, np.uint8))
    files = [tmp_path / f"train-{kind}-ubyte.gz" for kind in ("images-idx3", "labels-idx1")]
    with pytest.raises(DataError, match=r"2 images in .* 3 labels in"):
        IdxSource("mine", *files)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    content=st.binary(max_size=64) | st.binary(max_size=40).map(lambda b: bytes((0, 0, 8, 3)) + b), packed=st.booleans()
)
def test_any_bytes_are_an_array_or_a_data_error(tmp_path: Path, content: bytes, packed: bool) -> None:
    path = tmp_path / ("x.gz" if packed else "x")
    path.write_bytes(content)
    try:
        assert read_idx(path, 3).ndim == 3
    except DataError as error:
        assert "x" in str(error)  # noqa: PT017
