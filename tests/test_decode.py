# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""Bytes to training samples: one meaning in every decoder; windows, random numbers and the order of samples."""

from __future__ import annotations

import io
import struct

import numpy as np
import pytest
from PIL import Image, ImageOps

from maetok_fast.data.decode import decode, read_header, render, resized, resolve
from maetok_fast.data.images import ImageError, bundled_photographs, load_image, to_uint8
from maetok_fast.data.order import Order, batch_positions
from maetok_fast.data.views import CROPS, View, Window, rng_of

DECODERS = ("pil", "torchvision")
pytestmark = pytest.mark.filterwarnings("ignore:The image decoding:DeprecationWarning", "ignore:Tag data larger")


def encode(image, kind="JPEG", **options):
    file = io.BytesIO()
    (Image.fromarray(image) if isinstance(image, np.ndarray) else image).save(file, kind, **options)
    return file.getvalue()


def exif(orientation):
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags


def photograph(size=(90, 70)):
    return Image.open(bundled_photographs()[0]).convert("RGB").resize(size)


def without_adobe(content):
    start = content.index(b"\xff\xee")
    (length,) = struct.unpack(">H", content[start + 2 : start + 4])
    return content[:start] + content[start + 2 + length :]


def xmp(content, orientation):
    packet = b"http://ns.adobe.com/xap/1.0/\0<x:xmpmeta xmlns:x='adobe:ns:meta/'><rdf:RDF><rdf:Description "
    packet += b'tiff:Orientation="%d"/></rdf:RDF></x:xmpmeta>' % orientation
    return content[:2] + b"\xff\xe1" + struct.pack(">H", len(packet) + 2) + packet + content[2:]


def files():
    """name -> bytes: what users have, in all the ways in which libraries differ (libraries.md, 14 to 20)."""
    image = photograph()
    noise = np.random.default_rng(0)
    found = {f"jpeg {o}": encode(image, quality=90, exif=exif(o)) for o in range(1, 9)}
    found |= {f"{k} {o}": encode(image, k, exif=exif(o)) for k in ("PNG", "TIFF") for o in (3, 6)}
    found |= {f"webp {o}": encode(image, "WEBP", lossless=True, exif=exif(o)) for o in (1, 6, 8)}
    found |= {f"jpeg {s} {p}": encode(image, subsampling=s, progressive=p) for s in (0, 1, 2) for p in (False, True)}
    found |= {f"jpeg orientation {o}": encode(image, exif=exif(o)) for o in (0, 9)}
    cmyk = encode(image.convert("CMYK"), quality=95)
    found |= {"rgb jpeg": encode(image, keep_rgb=True), "cmyk": cmyk, "cmyk plain": without_adobe(cmyk)}
    found |= {"xmp": xmp(encode(image), 6), "xmp and exif": xmp(encode(image, exif=exif(3)), 6)}
    found |= {"grey jpeg": encode(image.convert("L"), exif=exif(6)), "trailing": encode(image) + b"more"}
    found |= {f"png {m}": encode(image.convert(m), "PNG") for m in ("L", "1", "P", "LA", "RGBA")}
    found["png 16"] = encode(noise.integers(0, 65536, (30, 40), dtype=np.uint16), "PNG")
    alpha = np.dstack([np.asarray(image), noise.integers(0, 256, (70, 90), dtype=np.uint8)])
    found |= {f"alpha {kind}": encode(alpha, kind, lossless=True) for kind in ("PNG", "WEBP")}
    found["palette alpha"] = encode(image.convert("P"), "PNG", transparency=3)
    found["gif"] = encode(image, "GIF")
    found["bmp"] = encode(image, "BMP")
    return found


@pytest.mark.parametrize("name", files())
def test_every_decoder_gives_the_picture_that_evaluation_reads(name):
    pytest.importorskip("torchvision")
    content = files()[name]
    wanted = decode(content, name, "pil")
    side = min(wanted.shape[:2])
    left, top = (wanted.shape[1] - side) // 2, (wanted.shape[0] - side) // 2
    whole = to_uint8(load_image(name, side, content=content)[None])[0]
    np.testing.assert_array_equal(whole, wanted[top : top + side, left : left + side])
    np.testing.assert_array_equal(decode(content, name, "torchvision"), wanted)
    np.testing.assert_array_equal(decode(content, name, "auto"), wanted)
    header = read_header(content, name)
    assert (header.height, header.width, 3) == wanted.shape
    for crop in CROPS:
        view = View(33, crop, flip=0.5)
        a, b = (render(content, name, view, rng_of(1, 2, 3), decoder).numpy() for decoder in DECODERS)
        np.testing.assert_array_equal(a, b)


def test_the_picture_is_what_the_rules_say_and_not_only_the_same():
    image = photograph()
    pixels = np.asarray(image)
    for o in range(1, 9):
        turned = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(encode(image, "PNG", exif=exif(o))))))
        np.testing.assert_array_equal(decode(encode(image, "PNG", exif=exif(o)), "a"), turned)
        near = np.abs(decode(files()[f"jpeg {o}"], "a").astype(int) - turned)
        assert near.mean() < 6  # JPEG's own error on a photograph of 90 pixels; another orientation's is above 40
    np.testing.assert_array_equal(decode(files()["webp 8"], "a"), np.rot90(pixels))
    deep = np.random.default_rng(0).integers(0, 65536, (30, 40), dtype=np.uint16)
    grey = np.round(deep / 257.0).astype(np.uint8)
    np.testing.assert_array_equal(decode(files()["png 16"], "a"), np.dstack([grey] * 3))
    assert np.abs(decode(files()["cmyk"], "a").astype(int) - pixels).mean() < 8
    negative = decode(files()["cmyk plain"], "a").astype(int)  # its inks were inverted for the marker: now a negative
    assert np.abs(negative - pixels).mean() > 60
    alpha = np.asarray(Image.open(io.BytesIO(files()["alpha PNG"]))).astype(float)
    white = alpha[..., :3] * alpha[..., 3:] / 255 + 255 - alpha[..., 3:]
    assert np.abs(decode(files()["alpha PNG"], "a") - white).max() <= 1
    assert np.array_equal(decode(files()["xmp"], "a"), np.rot90(decode(encode(image), "a"), -1))


def test_the_resize_is_pils_bicubic_of_the_cut_out_alone():
    pixels = np.asarray(photograph((300, 200)))
    rng = np.random.default_rng(0)
    for size in (1, 7, 64, 129, 256):
        for _ in range(6):
            width, height = int(rng.integers(1, 301)), int(rng.integers(1, 201))
            left, top = int(rng.integers(0, 301 - width)), int(rng.integers(0, 201 - height))
            flip = bool(rng.integers(2))
            part = Image.fromarray(pixels[top : top + height, left : left + width])
            wanted = part.resize((size, part.height), Image.Resampling.BICUBIC)
            wanted = np.asarray(wanted.resize((size, size), Image.Resampling.BICUBIC))[:, :: -1 if flip else 1]
            found = resized(pixels, Window(left, top, width, height, flip), size)
            assert found.is_contiguous()
            difference = np.abs(found.permute(1, 2, 0).numpy().astype(int) - wanted)
            assert difference.max() <= 2
            assert (difference > 1).mean() < 1e-3  # 2e-6 over many windows
            assert (difference > 0).mean() < 0.05
    same = resized(pixels, Window(3, 4, 64, 64, False), 64)
    np.testing.assert_array_equal(same.permute(1, 2, 0), pixels[4:68, 3:67])


def test_the_adm_view_is_evaluations_own():
    content = files()["jpeg 6"]
    wanted = to_uint8(load_image("a", 24, crop="adm", content=content)[None])[0]
    np.testing.assert_array_equal(
        render(content, "a", View(24, "adm", flip=0), rng_of(0, 0, 0)).permute(1, 2, 0), wanted
    )
    flipped = render(content, "a", View(24, "adm", flip=1), rng_of(0, 0, 0)).permute(1, 2, 0)
    np.testing.assert_array_equal(flipped, wanted[:, ::-1])


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("crop", ["random", "adm"])
def test_damaged_files_are_image_errors_that_name_them(decoder, crop):
    if decoder == "torchvision":
        pytest.importorskip("torchvision")
    image = photograph()
    noise = np.random.default_rng(0).integers(0, 256, (3000, 20, 3), dtype=np.uint8)
    bad = {"empty": b"", "text": b"no image at all"}
    for kind in ("JPEG", "PNG", "WEBP", "TIFF", "BMP"):
        whole = encode(image, kind)
        bad |= {f"{kind} cut at {share}": whole[: int(len(whole) * share)] for share in (0.05, 0.5, 0.9)}
    progressive = encode(image, progressive=True)
    bad |= {"progressive": progressive[: len(progressive) // 2], "no end": encode(image)[:-2]}
    bad["long"] = encode(noise, "PNG")
    damaged = bytearray(encode(image, "PNG"))  # torchvision would end the process on it
    damaged[len(damaged) // 2] ^= 255
    bad["PNG damaged"] = bytes(damaged)
    for name, content in bad.items():
        with pytest.raises(ImageError, match=f"cannot read image {name}: "):
            render(content, name, View(16, crop), rng_of(0, 0, 0), decoder)
    with pytest.raises(ImageError, match="cannot read image empty: the file is empty"):
        render(b"", "empty", View(16, crop), rng_of(0, 0, 0), decoder)


def test_a_damaged_jpeg_is_read_alike_or_refused_alike():
    pytest.importorskip("torchvision")
    whole = encode(photograph(), quality=90)
    rng = np.random.default_rng(0)
    read = 0
    for _ in range(150):
        content = bytearray(whole)
        for _ in range(int(rng.integers(1, 4))):
            content[int(rng.integers(2, len(content)))] = int(rng.integers(256))
        results = []
        for decoder in DECODERS:
            try:
                results.append(decode(bytes(content), "a", decoder))
            except ImageError:
                results.append(None)
        assert (results[0] is None) == (results[1] is None)
        if results[0] is not None:
            read += 1
            np.testing.assert_array_equal(results[0], results[1])
    assert read > 20


def test_a_huge_picture_is_refused_by_its_header(monkeypatch):
    content = bytearray(encode(np.zeros((8, 8, 3), np.uint8)))
    at = content.index(b"\xff\xc0")
    content[at + 5 : at + 9] = struct.pack(">HH", 20_000, 20_000)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    with pytest.raises(ImageError, match="bomb: 20000 x 20000 is more than 178956970 pixels"):
        decode(bytes(content), "bomb")


def test_an_unknown_decoder_and_a_missing_one_are_said():
    with pytest.raises(ValueError, match="unknown decoder 'cv2'; expected one of auto, torchvision, pil"):
        resolve("cv2")


# ---- windows ---------------------------------------------------------------------------------------------------------


def test_windows_lie_inside_any_picture():
    hypothesis = pytest.importorskip("hypothesis")
    st = hypothesis.strategies
    sides = st.integers(1, 3000)

    @hypothesis.given(sides, sides, st.sampled_from(CROPS), st.integers(0, 2**64 - 1), st.floats(0.01, 1))
    def check(width, height, crop, seed, low):
        window = View(16, crop, low).window(width, height, rng_of(seed, 1, 2))
        assert window.left >= 0 <= window.top
        assert window.width > 0 < window.height
        assert window.left + window.width <= width
        assert window.top + window.height <= height
        if crop in ("random", "center"):
            assert window.width == window.height

    check()


def test_the_random_window_is_uniform_in_share_and_place():
    windows = [View(16).window(1000, 600, rng_of(5, 0, i)) for i in range(4000)]
    sides = np.array([w.width for w in windows])
    assert (sides.min() >= 480, sides.max() <= 600) == (True, True)
    assert abs(sides.mean() - 540) < 4 * 34.6 / 63
    assert abs(np.mean([w.left / (1000 - w.width) for w in windows]) - 0.5) < 4 * 0.289 / 63
    assert abs(np.mean([w.flip for w in windows]) - 0.5) < 4 * 0.5 / 63


def test_the_resized_window_has_its_shares_of_area_and_ratio():
    windows = [View(16, "resized", 0.08, 1.0).window(800, 600, rng_of(5, 0, i)) for i in range(3000)]
    area = np.array([w.width * w.height for w in windows]) / 480_000
    ratio = np.array([w.width / w.height for w in windows])
    assert area.min() > 0.078
    assert ratio.min() > 0.74
    assert ratio.max() < 1.35
    assert abs(np.mean(np.log(ratio[area < 0.5]))) < 4 * 0.166 / np.sqrt((area < 0.5).sum())  # where all ratios fit
    strip = View(16, "resized", 0.9, 1.0).window(1000, 100, rng_of(0, 0, 0))  # no window fits
    assert (strip.left, strip.top, strip.width, strip.height) == (433, 0, 133, 100)


def test_centred_and_whole_windows():
    assert View(16, "center", flip=0).window(101, 60, rng_of(0, 0, 0)) == Window(20, 0, 60, 60, False)
    assert View(16, "adm", flip=1).window(101, 60, rng_of(0, 0, 0)) == Window(0, 0, 101, 60, True)


def test_random_numbers_depend_on_seed_epoch_and_sample_alone():
    first = rng_of(1, 2, 3).random(4)
    rng_of(9, 9, 9).random(100)
    np.testing.assert_array_equal(rng_of(1, 2, 3).random(4), first)
    others = [rng_of(*numbers).random() for numbers in [(1, 2, 3), (2, 2, 3), (1, 3, 3), (1, 2, 4), (2, 1, 3)]]
    assert len(set(others)) == 5
    assert not set(rng_of(0, 0, 0).random(100)) & set(rng_of(0, 0, 1).random(100))  # streams do not overlap
    with pytest.raises(ValueError, match="whole numbers in"):
        rng_of(-1, 0, 0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 0}, "size must be at least 1"),
        ({"crop": "centre"}, "unknown crop 'centre'; expected one of random, resized, center, adm"),
        ({"low": 0.0}, "expected 0 < low <= high <= 1"),
        ({"low": 0.9, "high": 0.8}, "expected 0 < low <= high <= 1"),
        ({"ratio": (2.0, 1.0)}, "the smaller first"),
        ({"flip": 1.5}, "expected flip to be a probability"),
        ({"flip": float("nan")}, "expected flip to be a probability"),
    ],
)
def test_a_view_that_means_nothing_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        View(**{"size": 16, **options})
    assert View(16).with_size(32) == View(32)


# ---- the order -------------------------------------------------------------------------------------------------------


def test_every_epoch_shows_every_sample_once_in_another_order():
    order = Order(50, seed=3)
    epochs = [[order.at(e * 50 + i) for i in range(50)] for e in range(3)]
    assert [{epoch for epoch, _ in rows} for rows in epochs] == [{0}, {1}, {2}]
    shown = [[index for _, index in rows] for rows in epochs]
    assert all(sorted(indices) == list(range(50)) for indices in shown)
    assert len({tuple(indices) for indices in shown}) == 3
    assert Order(50, seed=3).at(137) == (2, shown[2][37])  # without what came before
    assert [Order(50, 4).at(i)[1] for i in range(50)] != shown[0]
    assert [Order(3, 0, shuffle=False).at(i) for i in range(5)] == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1)]


def test_ranks_share_a_global_batch_however_many_there_are():
    for step in (0, 7):
        whole = list(batch_positions(step, 12))
        for world in (2, 3, 4):
            parts = [p for rank in range(world) for p in batch_positions(step, 12 // world, rank, world)]
            assert parts == whole == list(range(step * 12, step * 12 + 12))
    with pytest.raises(ValueError, match=r"expected a rank in \[0, 2\), got 2"):
        batch_positions(0, 1, 2, 2)
