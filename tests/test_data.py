# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""Image files: geometry, range, orientation, odd modes and damaged files."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from maetok_fast.data import ImageError, bundled_photographs, find_images, load_image, load_images, to_uint8


def save(path, array, **options):
    Image.fromarray(array).save(path, **options)
    return path


def test_centre_crop_and_range(tmp_path):
    array = np.zeros((20, 60, 3), np.uint8)
    array[:, 20:40] = (255, 0, 128)
    image = load_image(save(tmp_path / "a.png", array), 20)
    assert image.shape == (3, 20, 20)
    assert image.dtype == torch.float32
    middle = image[:, 10, 10]
    torch.testing.assert_close(middle, torch.tensor([1.0, -1.0, 128 / 127.5 - 1]))


@pytest.mark.parametrize("size", [(7, 100), (100, 7), (33, 32), (1, 1)])
def test_any_shape(tmp_path, size):
    array = np.full((*size, 3), 255, np.uint8)
    assert load_image(save(tmp_path / "a.png", array), 16).allclose(torch.ones(3, 16, 16))


def test_exif_orientation(tmp_path):
    array = np.zeros((16, 16, 3), np.uint8)
    array[:8] = 255  # top half white
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    image = load_image(save(tmp_path / "a.png", array, exif=exif), 16)
    assert image[:, 12].mean() > 0.9
    assert image[:, 4].mean() < -0.9


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "P", "CMYK", "1"])
def test_modes(tmp_path, mode):
    name = tmp_path / ("a.tif" if mode == "CMYK" else "a.png")
    Image.new("RGB", (8, 8), "white").convert(mode).save(name)
    torch.testing.assert_close(load_image(name, 8), torch.ones(3, 8, 8))


def test_sixteen_bit_grey_is_scaled(tmp_path):
    image = load_image(save(tmp_path / "a.png", np.full((8, 8), 32896, np.uint16)), 8)
    torch.testing.assert_close(image, torch.full((3, 8, 8), 128 / 127.5 - 1))


def test_transparent_pixels_are_white(tmp_path):
    image = load_image(save(tmp_path / "a.png", np.zeros((8, 8, 4), np.uint8)), 8)
    torch.testing.assert_close(image, torch.ones(3, 8, 8))


def test_errors_name_the_file(tmp_path):
    with pytest.raises(ImageError, match=r"no_such\.jpg does not exist"):
        load_image(tmp_path / "no_such.jpg", 8)
    (tmp_path / "broken.jpg").write_bytes(b"not an image")
    with pytest.raises(ImageError, match=r"broken\.jpg"):
        load_image(tmp_path / "broken.jpg", 8)
    whole = save(tmp_path / "whole.png", np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8))
    (tmp_path / "cut.png").write_bytes(whole.read_bytes()[:2000])
    with pytest.raises(ImageError, match=r"cut\.png"):
        load_image(tmp_path / "cut.png", 8)


def test_folders(tmp_path):
    with pytest.raises(ImageError, match="no images in"):
        find_images(tmp_path)
    with pytest.raises(ImageError, match="does not exist"):
        find_images(tmp_path / "nowhere")
    (tmp_path / "sub").mkdir()
    save(tmp_path / "sub" / "b.JPG", np.zeros((8, 8, 3), np.uint8), format="JPEG")
    save(tmp_path / "a.png", np.zeros((8, 8, 3), np.uint8))
    (tmp_path / "notes.txt").write_text("no image")
    found = find_images(tmp_path)
    assert [p.name for p in found] == ["a.png", "b.JPG"]
    assert load_images(found, 8).shape == (2, 3, 8, 8)


def test_bundled_photographs_are_real():
    pytest.importorskip("skimage")
    files = bundled_photographs()
    images = load_images(files, 32)
    assert len(files) >= 5
    assert (images.flatten(1).std(dim=1) > 0.1).all()


def test_uint8_round_trip(tmp_path):
    array = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    image = load_image(save(tmp_path / "a.png", array), 16)
    assert (to_uint8(image[None])[0] == array).all()
    assert to_uint8(torch.full((1, 3, 2, 2), 7.0)).max() == 255
