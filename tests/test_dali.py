# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""The DALI pipeline, with DALI's CPU operators: the same samples and windows, and pixels near decode.py's."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("nvidia.dali")
# beside this file: pytest puts tests/ on the path
from test_decode import encode, exif, files

from maetok_fast.data import dali as module
from maetok_fast.data.dali import Dali, why_not
from maetok_fast.data.decode import read_header, render, resized
from maetok_fast.data.images import bundled_photographs
from maetok_fast.data.loader import Batches
from maetok_fast.data.sources import DataError, open_source
from maetok_fast.data.views import View, rng_of

# DALI's resize keeps fp32 between its two directions, torch's and PIL's round to 8 bits there
LOWEST_DB = 50.0
CROPS = [View(64, "random"), View(64, "resized", 0.08), View(96, "center")]


def psnr(a, b):
    error = (a.double() - b.double()).square().mean().item()
    return np.inf if error == 0 else 10 * np.log10(255**2 / error)


def photographs():
    """JPEGs of the bundled photographs, shorter side 200: every orientation, grey, sampling and kind."""
    found = []
    for i, path in enumerate(bundled_photographs()):
        with Image.open(path) as opened:
            image = opened.convert("RGB")
        image.thumbnail((300, 300))
        found += [encode(image, quality=90, exif=exif(o)) for o in range(1, 9)]
        found += [encode(image.convert("L"), exif=exif(1 + i % 8)), encode(image, progressive=True, subsampling=i % 3)]
    return found


def by_dali(engine, contents, view):
    headers = [read_header(content, "a") for content in contents]
    windows = [view.window(h.width, h.height, rng_of(1, 0, i)) for i, h in enumerate(headers)]
    engine.submit([np.frombuffer(content, np.uint8) for content in contents], windows, view.size)
    return engine.collect()


def test_pixels_are_near_those_of_every_other_decoder():
    contents = photographs()
    engine = Dali(len(contents))
    for view in CROPS:
        images = by_dali(engine, contents, view)
        wanted = torch.stack([render(c, "a", view, rng_of(1, 0, i), "pil") for i, c in enumerate(contents)])
        worst = min(psnr(a, b) for a, b in zip(images, wanted))
        print(f"{view.crop}: {worst:.1f} dB, at most {(images.int() - wanted.int()).abs().max()} levels")
        assert worst >= LOWEST_DB


@pytest.mark.parametrize(
    ("dtype", "step"), [(torch.float32, 2e-6), (torch.float16, 2**-10), (torch.bfloat16, 2**-8)], ids=str
)
def test_floating_point_output_is_the_same_picture_in_range(dtype, step):
    contents = photographs()[:12]
    pixels = by_dali(Dali(12), contents, CROPS[0]).double()
    images = by_dali(Dali(12, dtype=dtype), contents, CROPS[0])
    assert images.dtype == dtype
    assert images.is_contiguous(memory_format=torch.channels_last)
    assert (images.double() - (pixels / 127.5 - 1)).abs().max() <= step


def test_what_dali_would_read_otherwise_is_not_given_to_it():
    refused = {name for name, content in files().items() if why_not(read_header(content, name), View(16))}
    plain = {f"jpeg {o}" for o in range(1, 9)} | {f"jpeg {s} {p}" for s in (0, 1, 2) for p in (False, True)}
    assert set(files()) - refused == plain | {"rgb jpeg", "xmp and exif", "grey jpeg", "trailing"}
    assert why_not(read_header(files()["jpeg 1"], "a"), View(16, "adm")) == "ADM's crop halves with box filters"


@pytest.fixture
def folder(tmp_path):
    """Every kind of file, photographs first."""
    (tmp_path / "data").mkdir()
    for i, content in enumerate([*photographs()[:20], *files().values()]):
        (tmp_path / "data" / f"{i:03d}.jpg").write_bytes(content)
    return tmp_path / "data"


def take(count, *args, **options):
    with Batches(*args, **{"seed": 7, "workers": 0, **options}) as batches:
        return [next(batches) for _ in range(count)], batches


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_are_the_same_samples_with_rare_files_in_their_places(folder, workers):
    source = open_source(folder)
    options = {"sizes": (48, 64), "step": 3}
    wanted, _ = take(8, source, View(64), 9, decoder="pil", **options)
    found, _ = take(8, source, View(64), 9, decoder="dali", workers=workers, **options)
    assert [b[2:] for b in found] == [b[2:] for b in wanted]
    rare = 0
    for a, b in zip(found, wanted):
        assert a.images.is_contiguous()
        for i, x, y in zip(a.indices, a.images, b.images):
            if why_not(read_header(source.read(i), "a"), View(64)):
                rare += 1
                assert torch.equal(x, y)
            assert psnr(x, y) > LOWEST_DB - 10  # enlarged noise among them
    assert rare > 8


def test_batches_that_were_closed_go_on_where_they_were(folder):
    source = open_source(folder)
    wanted, _ = take(4, source, View(32), 9, decoder="dali")
    with Batches(source, View(32), 9, seed=7, workers=1, decoder="dali") as batches:
        next(batches)
        batches.close()
        found = [next(batches) for _ in range(3)]
    assert [b[2:] for b in found] == [b[2:] for b in wanted[1:]]
    assert all(torch.equal(a.images, b.images) for a, b in zip(found, wanted[1:]))


def test_damaged_files_are_replaced_as_in_every_other_decoder(folder):
    for i in (2, 11, 17):
        file = folder / f"{i:03d}.jpg"
        file.write_bytes(file.read_bytes()[: [0, 1500, 2000][i % 3]])
    source = open_source(folder)
    options = {"max_unreadable": 0.2, "batch": 7}
    wanted, first = take(18, source, View(32), decoder="pil", **options)
    found, second = take(18, source, View(32), decoder="dali", **options)
    assert [b[2:] for b in found] == [b[2:] for b in wanted]
    assert first.unreadable == second.unreadable
    assert set(first.unreadable) == {"002.jpg", "011.jpg", "017.jpg"}
    for a, b in zip(found, wanted):
        for x, y in zip(a.images, b.images):
            assert psnr(x, y) > LOWEST_DB - 10
    for file in folder.iterdir():
        file.write_bytes(file.read_bytes()[:900])
    with pytest.raises(DataError, match="cannot be read"):
        take(18, open_source(folder), View(32), decoder="dali", batch=7)


def test_floating_point_batches_are_in_range_too(folder):
    source = open_source(folder)
    pixels, _ = take(4, source, View(32), 9, decoder="dali")
    images, _ = take(4, source, View(32), 9, decoder="dali", dtype=torch.float32)
    for a, b in zip(pixels, images):
        assert b.images.is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(b.images, a.images.float() / 127.5 - 1, rtol=0, atol=2e-6)


def test_what_dali_cannot_do_is_said(monkeypatch):
    with pytest.raises(ValueError, match=r"expected a dtype of torch\.uint8"):
        Dali(2, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"expected 1\.\.2 pictures"):
        Dali(2).submit([], [], 16)
    monkeypatch.setattr(module, "why_missing", lambda: "nvidia.dali is missing (pip install nvidia-dali-cuda130)")
    with pytest.raises(ValueError, match=r"decoder 'dali' cannot be used: nvidia\.dali is missing"):
        Dali(2)


def test_a_whole_picture_at_its_own_size_differs_in_nothing():
    content = encode(Image.open(io.BytesIO(photographs()[0])).crop((0, 0, 64, 64)))
    view = View(64, "center", flip=0)
    pixels = by_dali(Dali(1), [content], view)[0]
    header = read_header(content, "a")
    whole = np.asarray(Image.open(io.BytesIO(content)))
    assert torch.equal(pixels, resized(whole, view.window(header.width, header.height, rng_of(1, 0, 0)), 64))
