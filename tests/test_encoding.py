# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""Latent caches written: LightningDiT's layout, the same bytes however they are made, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from maetok_fast.data.caches import CacheError, open_cache
from maetok_fast.data.caches.shards import ChannelMoments, read_header, write_shard
from maetok_fast.data.decode import render
from maetok_fast.data.reader import to_range
from maetok_fast.data.sources import open_source
from maetok_fast.data.views import View, rng_of
from maetok_fast.inference import prepare
from maetok_fast.kernels import _native
from maetok_fast.models import MAETok
from maetok_fast.pipeline import EncodingRun, LatentStatistics, RunError
from maetok_fast.pipeline.demo import demo_tokenizer
from maetok_fast.precision import resolve

N, SHARD, L, C, SIDE = 23, 8, 16, 8, 64
OPTIONS: dict[str, Any] = {"precision": "fp32", "shard": SHARD, "batch": 3, "workers": 0}

own_bits = pytest.mark.skipif(
    _native.why_missing() is not None, reason="bits that depend on no other row need the native library"
)


@pytest.fixture(scope="module", autouse=True)
def _one_thread(one_thread: None) -> None:
    pass


@pytest.fixture(scope="module")
def tokenizer() -> MAETok:
    torch.manual_seed(0)
    return demo_tokenizer()


def picture(seed: int) -> Image.Image:
    """Of a size of its own, smooth enough to look alike as a JPEG."""
    rng = np.random.default_rng(seed)
    small = rng.integers(0, 256, (5, 7, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((int(rng.integers(70, 120)), int(rng.integers(70, 120))))


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """N of them in three class folders; sorted names go through the classes one after another."""
    folder = tmp_path_factory.mktemp("images")
    for i in range(N):
        path = folder / "abc"[i * 3 // N] / f"{i:03d}.{'png' if i % 2 else 'jpg'}"
        path.parent.mkdir(exist_ok=True)
        picture(i).save(path)
    return folder


def made(run: EncodingRun) -> dict[str, bytes]:
    run.begin()
    cost = run.make()
    run.finish(cost)
    return files(run.out)


def files(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir()) if p.name != "cache.json"}


@pytest.fixture(scope="module")
def whole(images: Path, tokenizer: MAETok, tmp_path_factory: pytest.TempPathFactory) -> EncodingRun:
    """A finished cache, which tests read."""
    run = EncodingRun(tmp_path_factory.mktemp("whole"), tokenizer, open_source(images), **OPTIONS)
    assert set(made(run)) == {f"latents_rank00_shard{k:03d}.safetensors" for k in range(3)} | {"latents_stats.pt"}
    return run


def rows(run: EncodingRun, name: str) -> torch.Tensor:
    return torch.cat([load_file(run.path(k))[name] for k in run.shards])


# ---- what is in it


def test_lightningdits_own_loader_reads_it(whole: EncodingRun) -> None:
    """The calls that its dataset makes: an index of all files by their sorted names, slices of one row, statistics."""
    paths = sorted(whole.out.glob("*.safetensors"))
    index: list[tuple[Path, int]] = []
    for path in paths:
        with safe_open(path, framework="pt", device="cpu") as file:
            labels = file.get_slice("labels")
            index += [(path, i) for i in range(labels.get_shape()[0])]
            about = file.metadata()
        assert about["total_size"] == str(labels.get_shape()[0])
        assert about["dtype"] == "torch.float32"
        assert about["device"] == "cpu"
    assert len(index) == N
    for number, (path, i) in enumerate(index):
        with safe_open(path, framework="pt", device="cpu") as file:
            for name in ("latents", "latents_flip"):
                one = file.get_slice(name)[i : i + 1]
                assert (one.dtype, tuple(one.shape)) == (torch.float32, (1, L, C))
            label = file.get_slice("labels")[i : i + 1]
            assert (label.dtype, label.item()) == (torch.int64, number * 3 // N)
    stats = torch.load(whole.statistics, weights_only=True)
    everything = rows(whole, "latents").double()
    assert stats["mean"].shape == stats["std"].shape == (1, 1, C)
    torch.testing.assert_close(stats["mean"], everything.mean((0, 1), keepdim=True).float(), atol=0, rtol=2e-7)
    torch.testing.assert_close(stats["std"], everything.std((0, 1), keepdim=True).float(), atol=0, rtol=2e-7)
    found = LatentStatistics.load(whole.statistics)
    z = found.normalise(rows(whole, "latents"))
    assert z.mean((0, 1)).abs().max() < 1e-5
    assert (z.std((0, 1)) - 1).abs().max() < 1e-5


def test_our_own_reader_reads_it(whole: EncodingRun) -> None:
    cache = open_cache(whole.out)
    assert (cache.format, cache.kind, cache.shape, len(cache), cache.flips) == (
        "lightningdit",
        "sample",
        (L, C),
        N,
        True,
    )
    assert cache.labels is not None
    assert cache.labels.tolist() == [i * 3 // N for i in range(N)]
    assert torch.equal(cache.read(slice(None)), rows(whole, "latents"))
    assert torch.equal(cache.read(slice(None), flip=True), rows(whole, "latents_flip"))
    assert cache.fingerprint == whole.fingerprint


def test_the_record_says_what_a_latent_depends_on(whole: EncodingRun, images: Path) -> None:
    record = json.loads(whole.record.read_text())
    assert record["complete"] is True
    assert (record["images"], record["samples"], record["shard"]) == (N, N, SHARD)
    told = {"precision": "fp32", "resolution": SIDE, "crop": "center", "dtype": "fp32", "flips": True, "device": "cpu"}
    assert record["fingerprint"].items() >= told.items()
    assert record["fingerprint"]["data"] == open_source(images).fingerprint()
    assert record["fingerprint"]["decoder"] in ("pil", "torchvision")
    assert len(record["fingerprint"]["tokenizer"]) == 16
    assert record["cost"]["images_per_second"] == pytest.approx(N / record["cost"]["seconds"])


@own_bits
@pytest.mark.parametrize("crop", ["center", "adm"])
def test_a_row_is_the_encoding_of_its_image_and_of_its_mirror_image(
    crop: str, whole: EncodingRun, images: Path, tokenizer: MAETok, tmp_path: Path
) -> None:
    run = whole
    if crop == "adm":
        run = EncodingRun(tmp_path / "adm", tokenizer, open_source(images), **OPTIONS, crop="adm")
        made(run)
    source, encoder = open_source(images), prepare(tokenizer, "fp32", reproducible=True)
    view = View(SIDE, crop, flip=0.0)
    pixels = torch.stack([render(source.read(i), source.name(i), view, rng_of(0, 0, i), "pil") for i in range(N)])
    x = to_range(pixels, torch.float32)
    assert torch.equal(rows(run, "latents"), encoder.encode(x))
    assert torch.equal(rows(run, "latents_flip"), encoder.encode(x.flip(3)))
    listening = (rows(run, "latents") - rows(run, "latents_flip")).std() / rows(run, "latents").std()
    assert listening > 0.1
    assert torch.equal(rows(run, "indices"), torch.arange(N))


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_latents_are_rounded_to_the_dtype_and_statistics_are_of_what_is_stored(
    dtype: str, whole: EncodingRun, images: Path, tokenizer: MAETok, tmp_path: Path
) -> None:
    run = EncodingRun(tmp_path / "a", tokenizer, open_source(images), **OPTIONS, dtype=dtype)
    made(run)
    for name in ("latents", "latents_flip"):
        assert torch.equal(rows(run, name), rows(whole, name).to(run.dtype))
    stats = torch.load(run.statistics, weights_only=True)
    stored = rows(run, "latents").double()
    torch.testing.assert_close(stats["std"], stored.std((0, 1), keepdim=True).float(), atol=0, rtol=2e-7)
    assert stats["std"].dtype == torch.float32
    with safe_open(run.path(0), framework="pt") as file:
        assert file.metadata()["dtype"] == str(run.dtype)


def test_without_labels_and_without_flips(tokenizer: MAETok, tmp_path: Path) -> None:
    (tmp_path / "flat").mkdir()
    for i in range(3):
        picture(i).save(tmp_path / "flat" / f"{i}.png")
    run = EncodingRun(tmp_path / "a", tokenizer, open_source(tmp_path / "flat"), **OPTIONS, flips=False)
    made(run)
    assert set(load_file(run.path(0))) == {"latents", "indices"}
    cache = open_cache(run.out)
    assert cache.labels is None
    assert not cache.flips


# ---- however it is made


class Killed(BaseException):
    """As SIGKILL: nothing handles it."""


@own_bits
@pytest.mark.parametrize(("batch", "workers"), [(1, 0), (5, 1), (64, 2)])
def test_neither_batches_nor_workers_change_a_byte(
    batch: int, workers: int, whole: EncodingRun, images: Path, tokenizer: MAETok, tmp_path: Path
) -> None:
    more = OPTIONS | {"batch": batch, "workers": workers}
    assert made(EncodingRun(tmp_path / "a", tokenizer, open_source(images), **more)) == files(whole.out)


@own_bits
@pytest.mark.parametrize("stop", [1, 9, 22])
def test_a_run_that_was_stopped_goes_on(
    stop: int, whole: EncodingRun, images: Path, tokenizer: MAETok, tmp_path: Path
) -> None:
    run = EncodingRun(tmp_path / "a", tokenizer, open_source(images), **OPTIONS)
    run.begin()
    count = 0

    def done(more: int) -> None:
        nonlocal count
        count += more
        if count > stop:
            raise Killed

    with pytest.raises(Killed):
        run.make(done)
    assert json.loads(run.record.read_text())["complete"] is False
    with pytest.raises(CacheError, match="not finished"):
        open_cache(run.out)
    with pytest.raises(RunError, match=r"of 3 shards are missing; run it again"):
        run.finish({"images": 0, "seconds": 0.0})
    (run.out / ".writing-abc").write_bytes(b"half a shard")
    before = {k: run.path(k).stat().st_mtime_ns for k in run.shards if run.path(k).exists()}
    assert len(before) == stop // SHARD
    assert made(run) == files(whole.out)
    assert all(run.path(k).stat().st_mtime_ns == at for k, at in before.items())
    assert run.make()["images"] == 0


@own_bits
@pytest.mark.parametrize("processes", [2, 5])
def test_any_number_of_processes(
    processes: int, whole: EncodingRun, images: Path, tokenizer: MAETok, tmp_path: Path
) -> None:
    source = open_source(images)
    runs = [
        EncodingRun(tmp_path / "a", tokenizer, source, **OPTIONS, process=p, processes=processes)
        for p in range(processes)
    ]
    for run in runs:
        run.begin()
    assert sum(run.make()["images"] for run in reversed(runs)) == N
    runs[0].finish({"images": N, "seconds": 1.0})
    assert files(runs[0].out) == files(whole.out)


def test_shard_sizes_change_statistics_by_rounding_alone(
    whole: EncodingRun, images: Path, tokenizer: MAETok, tmp_path: Path
) -> None:
    run = EncodingRun(tmp_path / "a", tokenizer, open_source(images), **(OPTIONS | {"shard": 3}))
    made(run)
    both = [ChannelMoments.together(read_header(r.path(k)).moments for k in r.shards) for r in (run, whole)]
    np.testing.assert_allclose(both[0].mean, both[1].mean, rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(both[0].m2, both[1].m2, rtol=1e-12)


# ---- what is refused


def test_a_folder_of_another_cache_is_refused(images: Path, tokenizer: MAETok, tmp_path: Path) -> None:
    def run(**more: Any) -> EncodingRun:
        given = {"tokenizer": tokenizer, "source": open_source(images), "limit": 4, **OPTIONS, **more}
        return EncodingRun(tmp_path / "a", **given)

    made(run())
    other = demo_tokenizer()
    with torch.no_grad():
        other.encoder.model.norm.weight.mul_(1.01)
    (tmp_path / "fewer").mkdir()
    for i in range(4):
        picture(i).save(tmp_path / "fewer" / f"{i}.png")
    refusals: dict[str, dict[str, Any]] = {
        "tokenizer: ": {"tokenizer": other},
        'dtype: "fp32" there, "fp16" asked for': {"dtype": "fp16"},
        'crop: "center" there, "adm" asked for': {"crop": "adm"},
        "flips: true there, false asked for": {"flips": False},
        "resolution: 64 there, 128 asked for": {"size": 128},
        "samples: 4 there, 5 asked for": {"limit": 5},
        "shard: 8 there, 2 asked for": {"shard": 2},
        'data: "': {"source": open_source(tmp_path / "fewer")},
        'precision: "fp32" there, "bf16" asked for': {"precision": "bf16"},
    }
    for said, more in refusals.items():
        with pytest.raises(RunError, match="is of another cache") as caught:
            run(**more).begin()
        assert said in str(caught.value)
        assert "give another --out" in str(caught.value)
    run(batch=1, workers=1, max_unreadable=0.5, process=1, processes=2).begin()


def test_auto_is_what_the_cache_has(images: Path, tokenizer: MAETok, tmp_path: Path) -> None:
    """What is fastest is measured: a run that goes on may find otherwise."""
    first = EncodingRun(
        tmp_path / "a", tokenizer, open_source(images), **(OPTIONS | {"precision": "bf16"}), decoder="pil"
    )
    first.begin()
    again = EncodingRun(tmp_path / "a", tokenizer, open_source(images), **(OPTIONS | {"precision": "auto"}))
    assert (again.precision.name, again.decoder) == ("bf16", "pil")
    again.begin()
    elsewhere = EncodingRun(tmp_path / "b", tokenizer, open_source(images), **(OPTIONS | {"precision": "auto"}))
    assert elsewhere.precision == resolve("auto")
    with pytest.raises(RunError, match='precision: "bf16" there, "fp32" asked for'):
        EncodingRun(tmp_path / "a", tokenizer, open_source(images), **OPTIONS).begin()


def test_a_folder_of_something_else_is_refused(images: Path, tokenizer: MAETok, tmp_path: Path) -> None:
    run = EncodingRun(tmp_path / "a", tokenizer, open_source(images), **OPTIONS)
    run.out.mkdir()
    alien = run.out / "latents_rank03_shard000.safetensors"
    save_file({"latents": torch.zeros(1, L, C)}, alien)
    with pytest.raises(RunError, match=r"holds latents but no cache\.json"):
        run.begin()
    for text in ("[]", "{", '{"format": 7}'):
        run.record.write_text(text)
        with pytest.raises(RunError, match="is not the record of a latent cache"):
            run.begin()
    run.record.unlink()
    alien.unlink()
    made(run)
    save_file({"latents": torch.zeros(1, L, C)}, alien)
    with pytest.raises(RunError, match=r"holds files of another cache, first latents_rank03_shard000\.safetensors"):
        run.begin()


def test_a_damaged_shard_is_named_and_can_be_made_again(images: Path, tokenizer: MAETok, tmp_path: Path) -> None:
    run = EncodingRun(tmp_path / "a", tokenizer, open_source(images), **OPTIONS)
    want = made(run)
    content = run.path(1).read_bytes()
    # copies: tensors of a file are windows into it, and it is written over
    foreign = {name: tensor.clone() for name, tensor in load_file(run.path(1)).items()}
    damage: dict[str, Any] = {
        "cut": lambda p: p.write_bytes(content[:-100]),
        "empty": lambda p: p.write_bytes(b""),
        "text": lambda p: p.write_text("<html>"),
        "of somebody else": lambda p: save_file(foreign, p),
        "of another run": lambda p: write_shard(p, foreign, {"fingerprint": "{}", "unreadable": "[]"}),
    }
    for write in damage.values():
        write(run.path(1))
        for use in (run.begin, lambda: run.finish({"images": 0, "seconds": 0.0})):
            with pytest.raises(
                (CacheError, RunError), match=r"shard001\.safetensors is (damaged: delete this|of another)"
            ):
                use()
    run.path(1).unlink()
    run.begin()
    assert json.loads(run.record.read_text())["complete"] is False
    assert made(run) == want


def test_unreadable_images_are_left_out_and_named(
    images: Path, tokenizer: MAETok, whole: EncodingRun, tmp_path: Path
) -> None:
    folder = tmp_path / "images"
    for path in images.rglob("*.*"):
        copy = folder / path.relative_to(images)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(path.read_bytes())
    bad = [2, 8, 9, 10, 11, 12, 13, 14, 15]  # one of a batch, and a whole shard
    for path in folder.rglob("*.*"):
        if int(path.stem) in bad:
            path.write_bytes(b"no image")
    source = open_source(folder)
    run = EncodingRun(tmp_path / "a", tokenizer, source, **OPTIONS, max_unreadable=0.5)
    made(run)
    kept = [i for i in range(N) if i not in bad]
    assert rows(run, "indices").tolist() == kept
    if _native.why_missing() is None:
        for name in ("latents", "latents_flip", "labels"):
            assert torch.equal(rows(run, name), rows(whole, name)[kept])
    told = [json.loads(line) for line in run.unreadable.read_text().splitlines()]
    assert [(one["index"], one["name"]) for one in told] == [(i, source.name(i)) for i in bad]
    assert all("cannot read image" in one["reason"] for one in told)
    cache = open_cache(run.out)
    assert cache.places is not None
    assert (len(cache), cache.places.tolist()) == (len(kept), kept)
    for share, allowed in ((0.0, 0), (0.1, 3)):
        strict = EncodingRun(tmp_path / "b", tokenizer, source, **OPTIONS, max_unreadable=share)
        strict.begin()
        with pytest.raises(
            RunError, match=rf"images cannot be read, more than --max-unreadable .* \({allowed}\): a/002"
        ):
            strict.make()
    strict = EncodingRun(tmp_path / "a", tokenizer, source, **OPTIONS, max_unreadable=0.1)
    strict.begin()  # what earlier starts left out counts too
    with pytest.raises(RunError, match=r"^9 images cannot be read, .*; all: .*unreadable\.jsonl$"):
        strict.finish(strict.make())


def test_latents_that_are_not_finite_are_refused(images: Path, tmp_path: Path) -> None:
    loud = demo_tokenizer()
    with torch.no_grad():
        loud.quant_conv.bias.fill_(1e5)
    for dtype, process in (("fp16", 0), ("fp32", 1)):
        run = EncodingRun(tmp_path / dtype, loud, open_source(images), **OPTIONS, dtype=dtype)
        run.begin()
        if process:
            run.make()
            continue
        with pytest.raises(RunError, match=r"the latents of a/000\.jpg are not finite in fp16, encoded in fp32"):
            run.make()


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"crop": "random"}, "unknown crop 'random'; expected one of center, adm"),
        ({"dtype": "int8"}, "unknown dtype 'int8'; expected one of fp32, fp16, bf16"),
        ({"size": 60}, "multiple of the tokenizer's patch, 8, got 60"),
        ({"batch": 0}, "batch"),
        ({"shard": 0}, "shard"),
        ({"limit": 0}, "limit"),
        ({"decoder": "dali"}, "unknown decoder 'dali'"),
        ({"max_unreadable": 2.0}, "max_unreadable"),
    ],
)
def test_wrong_arguments(more: dict[str, Any], said: str, images: Path, tokenizer: MAETok, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=said):
        EncodingRun(tmp_path / "a", tokenizer, open_source(images), **(OPTIONS | more))
