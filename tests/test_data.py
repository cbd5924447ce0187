# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""Image files: geometry, range, orientation, odd modes and damaged files."""

from __future__ import annotations

import io
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from maetok_fast.data import ImageError, bundled_photographs, find_images, load_image, load_images, to_uint8
from maetok_fast.data import images as module


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


def test_sixteen_bit_grey_is_not_clipped_to_white(tmp_path):
    ramp = np.linspace(0, 65535, 64).round().astype(np.uint16).reshape(8, 8)
    for name in ("a.png", "a.tif"):
        image = load_image(save(tmp_path / name, ramp), 8)
        torch.testing.assert_close(image[0], torch.from_numpy(ramp / 257).round().float() / 127.5 - 1)


@pytest.mark.parametrize("dtype", [np.float32, np.int32])
def test_pixels_without_a_range_are_refused(tmp_path, dtype):
    for scale in (1, 255, 65535):
        array = np.linspace(0, scale, 256).astype(dtype).reshape(16, 16)
        with pytest.raises(ImageError, match=r"grey\.tif.* pixels have no stated range"):
            load_image(save(tmp_path / "grey.tif", array), 16)


def test_cmyk_without_adobes_marker_is_no_negative(tmp_path):
    """PIL inverts every CMYK JPEG, as Adobe's marker asks; its own writer inverts too and sets the marker."""
    array = np.zeros((16, 16, 3), np.uint8)
    array[:] = (200, 100, 50)
    data = io.BytesIO()
    image = Image.fromarray(array).convert("CMYK")
    image.save(data, "JPEG", quality=100)
    (tmp_path / "adobe.jpg").write_bytes(data.getvalue())
    data = io.BytesIO()
    Image.eval(image, lambda v: 255 - v).save(data, "JPEG", quality=100)
    raw = data.getvalue()
    start = raw.index(b"\xff\xee")
    length = struct.unpack(">H", raw[start + 2 : start + 4])[0]
    (tmp_path / "plain.jpg").write_bytes(raw[:start] + raw[start + 2 + length :])
    expected = torch.tensor([200, 100, 50]) / 127.5 - 1
    for name in ("adobe.jpg", "plain.jpg"):
        torch.testing.assert_close(load_image(tmp_path / name, 8).mean((1, 2)), expected, atol=0.03, rtol=0)


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


def resized_whole(image, resolution):
    """Resize the whole image, across and then down, and crop it: what `load_image` computes a part of."""
    scale = resolution / min(image.size)
    width, height = (max(resolution, round(side * scale)) for side in image.size)
    image = image.resize((width, image.height), Image.Resampling.BICUBIC)
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - resolution) // 2, (height - resolution) // 2
    return image.crop((left, top, left + resolution, top + resolution))


@pytest.mark.parametrize("size", [(40, 60), (61, 40), (33, 190), (190, 33), (90, 151), (50, 50), (3, 200), (128, 64)])
@pytest.mark.parametrize("resolution", [16, 33, 64])
def test_the_crop_alone_is_the_crop_of_the_whole(tmp_path, size, resolution):
    array = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    pixels = to_uint8(load_image(save(tmp_path / "a.png", array), resolution)[None])[0].astype(int)
    difference = np.abs(pixels - np.asarray(resized_whole(Image.fromarray(array), resolution)))
    # PIL keeps a box in fp32: a product on the edge between two levels may fall to the other side
    assert difference.max() <= 1
    assert (difference > 0).mean() < 0.01


@pytest.mark.parametrize("size", [(40, 60), (61, 40), (130, 300), (64, 64), (257, 129)])
def test_adm_crop(tmp_path, size):
    array = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6
    pixels = to_uint8(load_image(save(tmp_path / "a.png", array, exif=exif), 32, crop="adm")[None])[0].astype(int)
    image = Image.fromarray(array)  # as stored
    while min(image.size) >= 64:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    assert np.abs(pixels - np.asarray(resized_whole(image, 32))).max() <= 1
    turned = load_image(tmp_path / "a.png", 32, crop="adm", orient=True)
    assert not torch.equal(turned, load_image(tmp_path / "a.png", 32, crop="adm"))
    with pytest.raises(ValueError, match="unknown crop 'imagenet': expected one of center, adm, none"):
        load_image(tmp_path / "a.png", 32, crop="imagenet")


@pytest.mark.parametrize("suffix", ["png", "jpg", "tif", "webp"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_applied_or_not(tmp_path, suffix, orientation):
    array = np.zeros((16, 16, 3), np.uint8)
    array[:8] = 255
    array[8:, :8] = 128
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if suffix == "webp" else {}
    path = save(tmp_path / f"a.{suffix}", array, exif=exif, **options)
    stored = torch.from_numpy(array).permute(2, 0, 1) / 127.5 - 1
    flipped = [lambda x: x, lambda x: x.flip(2), lambda x: x.flip(1, 2), lambda x: x.flip(1)]
    wanted = flipped[(orientation - 1) % 4](stored) if orientation < 5 else stored.transpose(1, 2)
    wanted = {6: lambda x: x.flip(2), 7: lambda x: x.flip(1, 2), 8: lambda x: x.flip(1)}.get(orientation, lambda x: x)(
        wanted
    )
    near = {"rtol": 0, "atol": 0.15 if suffix == "jpg" else 1e-6}
    torch.testing.assert_close(load_image(path, 16), wanted, **near)
    torch.testing.assert_close(load_image(path, 16, orient=False), stored, **near)
    torch.testing.assert_close(load_images([path], 16, orient=False)[0], stored, **near)


def test_long_images(tmp_path):
    """An image of 300 kB whose whole resized form would take 20 GB."""
    array = np.zeros((100, 10_000), np.uint8)
    array[:, 4950:5050] = 200
    path = save(tmp_path / "strip.png", array)
    code = f"""
import resource
from maetok_fast.data import load_image
load_image({str(path)!r}, 8)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
image = load_image({str(path)!r}, 1024)
assert (image - (200 / 127.5 - 1)).abs().median() < 1e-6
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 10 * 3 * 1024 * 1024 * 4  # ten results in fp32
    with pytest.raises(ImageError, match=r"strip\.png: 3000 x 1 is longer than 100 to 1"):
        load_image(save(tmp_path / "strip.png", np.zeros((1, 3000), np.uint8)), 512)


def test_out_of_memory_is_an_image_error(tmp_path, monkeypatch):
    path = save(tmp_path / "a.png", np.zeros((8, 8, 3), np.uint8))

    def full(*args, **options):
        raise MemoryError

    monkeypatch.setattr(Image.Image, "resize", full)
    with pytest.raises(ImageError, match=r"cannot read image .*a\.png: out of memory"):
        load_image(path, 4)


def test_decompression_bombs_are_refused(tmp_path, monkeypatch):
    path = save(tmp_path / "bomb.png", np.zeros((8, 8), np.uint8))
    data = bytearray(path.read_bytes())
    data[16:24] = struct.pack(">II", 40_000, 40_000)
    data[29:33] = struct.pack(">I", zlib.crc32(bytes(data[12:29])))
    path.write_bytes(bytes(data))
    with pytest.raises(ImageError, match=r"bomb\.png: .*pixels"):
        load_image(path, 8)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)  # as many programs do
    with pytest.raises(ImageError, match=r"bomb\.png: 40000 x 40000 is more than 178956970 pixels"):
        load_image(path, 8)


@pytest.mark.parametrize("kind", ["PPM", "EPS", "ICO", "TGA", "PCX", "SGI", "JPEG2000", "ICNS"])
def test_only_the_listed_formats_are_decoded(tmp_path, kind):
    path = tmp_path / "a.png"
    try:
        Image.new("RGB", (32, 32)).save(path, kind)
    except (OSError, KeyError) as error:
        pytest.skip(str(error))
    with pytest.raises(ImageError, match=r"a\.png: its content is none of JPEG, PNG, WEBP, BMP, TIFF, GIF"):
        load_image(path, 8)


def test_the_suffix_does_not_decide(tmp_path):
    for kind in module.FORMATS:
        Image.new("RGB", (8, 8), "white").save(tmp_path / "a.dat", kind)
        torch.testing.assert_close(load_image(tmp_path / "a.dat", 8), torch.ones(3, 8, 8))


def test_resolution_is_checked(tmp_path):
    path = save(tmp_path / "a.png", np.zeros((8, 8, 3), np.uint8))
    with pytest.raises(TypeError, match=r"resolution must be an integer number of pixels, got 8\.0"):
        load_image(path, 8.0)
    with pytest.raises(ValueError, match="positive number of pixels, got 0"):
        load_image(path, 0)


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


def test_no_crop_takes_the_pixels_of_the_size_and_refuses_others(tmp_path):
    array = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    taken = to_uint8(load_image(save(tmp_path / "a.png", array), 16, crop="none")[None])[0]
    assert (taken == array).all()
    with pytest.raises(ImageError, match=r"a\.png: 16 x 16, and without a crop only 8 x 8 will do"):
        load_image(tmp_path / "a.png", 8, crop="none")
