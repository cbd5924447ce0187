# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""Runs of maetok_fast.training.generator from and to files: caches, images, checkpoints, several processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from generator_runs import CHANNELS, TOKENS, of_images, small_generator, small_tokenizer, write_cache
from training_runs import bare, write_images

from maetok_fast.config import ConfigError, read
from maetok_fast.data.caches import CacheError, open_cache
from maetok_fast.data.latents import LatentBatches
from maetok_fast.data.loader import Batches
from maetok_fast.data.sources import open_source
from maetok_fast.data.views import View
from maetok_fast.diffusion import sample
from maetok_fast.models import LightningDiT, MAETok, SiT, load_generator
from maetok_fast.pipeline import Pipeline
from maetok_fast.pipeline.encoding import EncodingRun
from maetok_fast.pipeline.statistics import LatentStatistics
from maetok_fast.training import build_generator
from maetok_fast.training.build import train
from maetok_fast.training.build_generator import make_generator
from maetok_fast.training.generator_configs import AlignConfig, GeneratorRun
from maetok_fast.training.latents import PairedBatches

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def _bare(monkeypatch: pytest.MonkeyPatch) -> None:

    bare(monkeypatch.setattr)
    monkeypatch.setattr(build_generator, "_flops", lambda *a: 0.0)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_cache(tmp_path_factory.mktemp("caches") / "latents")


# ---- runs -----------------------------------------------------------------------------------------------------------


def final(path: Path) -> dict[str, bytes]:
    return {str(p.relative_to(path)): p.read_bytes() for p in sorted(path.rglob("*")) if p.is_file()}


def test_a_run_that_goes_on_ends_bit_for_bit_like_one_that_was_not_stopped(tmp_path: Path, cache: Path) -> None:
    options = ("routing.share=0.5", "align.target=self", "align.depth=1", "align.self_depth=3", "objective.direction=1")
    whole = read(small_generator(tmp_path / "whole", cache), {}, options)
    parts = replace(whole, out=str(tmp_path / "parts"))
    a = train(whole, quiet=True)
    train(replace(parts, loop=replace(parts.loop, steps=3)), quiet=True)
    b = train(parts, quiet=True)
    assert final(a) == final(b)
    folder = b / "generator"
    model = load_generator(folder)
    assert isinstance(model, SiT)
    assert model.config == whole.model
    statistics = LatentStatistics.beside(folder)
    found = open_cache(cache)
    want = found.read(slice(0, len(found))).double()
    torch.testing.assert_close(statistics.mean.double().flatten(), want.mean((0, 1)), atol=1e-5, rtol=1e-5)


def test_the_loss_falls_and_samples_lie_where_the_data_lies(tmp_path: Path, cache: Path) -> None:
    run = small_generator(tmp_path / "run", cache, steps=150, batch=16, checkpoint_every=0, log_every=50)
    run = replace(run, optimizer=replace(run.optimizer, learning_rate=5e-3), ema=replace(run.ema, decay=0.95))
    newest = train(run, quiet=True)
    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert log[-1]["velocity"] < 0.7 * log[0]["velocity"]
    model = load_generator(newest / "generator").eval()
    statistics = LatentStatistics.beside(newest / "generator")
    noise = torch.randn(3 * 8, TOKENS, CHANNELS, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(3).repeat_interleave(8)
    z = statistics.denormalise(sample(model, noise, labels, steps=20, method="euler").latents)
    # class k's latents lie around 2 + k
    means = z.mean((1, 2)).reshape(3, 8).mean(1)
    assert (means.diff() > 0.4).all(), means


def test_latents_encoded_on_the_way_are_the_cache_s(tmp_path: Path) -> None:
    images = write_images(tmp_path / "images" / "a", 9, 40).parent
    tokenizer = small_tokenizer(tmp_path / "tokenizer")
    run = of_images(small_generator(tmp_path / "run", ""), images, tokenizer, flip=0.0, validation=str(images))
    run = replace(run, loop=replace(run.loop, validate_every=4, picture_every=4))
    newest = train(run, quiet=True)
    assert json.loads((tmp_path / "run" / "checkpoints" / "best.json").read_text())["velocity"] > 0
    assert (tmp_path / "run" / "samples" / "0000008.png").stat().st_size > 100
    pipeline = Pipeline.from_pretrained(tokenizer, newest / "generator")
    assert pipeline.statistics.mean == pytest.approx(0.1)
    assert pipeline.generate([0], [1], steps=2).images.shape == (1, 32, 32, 3)


def test_two_processes_see_what_one_sees_whole_and_sharded(tmp_path: Path, cache: Path) -> None:
    script = Path(__file__).parent / "generator_runs.py"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MAETOK_FAST_TUNE": "0"}
    command = [sys.executable, str(script), "ranks", str(tmp_path), str(cache)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-2000:]
    two, sharded = (load_generator(tmp_path / n / "checkpoints" / "0000008" / "generator") for n in ("two", "sharded"))
    for (name, a), b in zip(two.state_dict().items(), sharded.state_dict().values()):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")
    # goes on with one process: the same samples, other random numbers
    more = small_generator(tmp_path / "sharded", cache, steps=10)
    assert train(more, quiet=True).name == "0000010"


@pytest.mark.parametrize("layout", ["repa", "mar", "dc-ae", "repa-e"])
def test_foreign_caches_train_too(layout: str, tmp_path: Path) -> None:
    if layout == "repa-e":
        pytest.importorskip("h5py")
    cache = write_cache(tmp_path / "latents", 8, (CHANNELS, 4, 4), layout)
    run = small_generator(tmp_path / "run", cache, "lightningdit", steps=2)
    if layout != "dc-ae":  # scaled already
        with pytest.raises(ConfigError, match=r"data.statistics: nothing says .*0\.18215"):
            train(run, quiet=True)
        run = replace(run, data=replace(run.data, statistics="0.18215"))
    newest = train(run, quiet=True)
    assert isinstance(load_generator(newest / "generator"), LightningDiT)
    want = 1.0 if layout == "dc-ae" else 1 / 0.18215
    assert float(LatentStatistics.beside(newest / "generator").std) == pytest.approx(want)


# ---- a cache and its images -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def encoded(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """(images, tokenizer, the cache of them)."""

    folder = tmp_path_factory.mktemp("encoded")
    images = write_images(folder / "images" / "a", 9, 40).parent
    tokenizer = small_tokenizer(folder / "tokenizer")
    run = EncodingRun(
        folder / "latents", MAETok.from_pretrained(tokenizer), open_source(images), shard=4, batch=3, workers=0
    )
    run.begin()
    run.finish(run.make())
    return images, tokenizer, folder / "latents"


def paired(out: Path, encoded: tuple[Path, Path, Path]) -> GeneratorRun:
    images, tokenizer, latents = encoded
    run = small_generator(out, latents)
    align = AlignConfig(target="vit_tiny_patch16_224", depth=2, hidden=16)
    teachers = replace(run.teachers, weights={"vit_tiny_patch16_224": "random"}, precision="fp32")
    data = replace(run.data, path=str(images))
    return replace(run, tokenizer=str(tokenizer), data=data, align=align, teachers=teachers)


def test_a_teacher_sees_the_image_of_each_latent(encoded: tuple[Path, Path, Path]) -> None:

    images, tokenizer, latents = encoded
    both = PairedBatches(
        LatentBatches(open_cache(latents), 5, seed=3),
        Batches(open_source(images), View(32, "center", flip=0.5), 5, seed=3, workers=0, decoder="pil"),
    )
    model = MAETok.from_pretrained(tokenizer).eval()
    with both, torch.no_grad():
        for _ in range(4):
            found = next(both)
            want = model.encode(found.images.float() / 127.5 - 1)
            torch.testing.assert_close(found.latents, want, atol=1e-3, rtol=1e-3)


def test_alignment_with_a_teacher_runs_on_a_cache(tmp_path: Path, encoded: tuple[Path, Path, Path]) -> None:
    pytest.importorskip("timm")
    run = paired(tmp_path / "run", encoded)
    with pytest.raises(ConfigError, match=r"align\.target=vit_tiny_patch16_224 sees images"):
        train(replace(run, data=replace(run.data, path="")), quiet=True)
    # 4 features of a 32 px image, and 6 tokens
    with pytest.raises(ValueError, match="4 features of an image are no multiple of its 6 tokens"):
        train(run, quiet=True)
    run = replace(run, out=str(tmp_path / "wide"), data=replace(run.data, size=96))  # 36 features
    train(run, quiet=True)
    log = [json.loads(line) for line in (tmp_path / "wide" / "log.jsonl").read_text().splitlines()]
    assert 0 < log[-1]["align"] < 2


def test_a_stale_or_foreign_cache_is_refused_with_the_reason(tmp_path: Path, encoded: tuple[Path, Path, Path]) -> None:

    _, tokenizer, latents = encoded
    run = small_generator(tmp_path / "run", latents)
    torch.manual_seed(5)
    other = MAETok(MAETok.from_pretrained(tokenizer).config)
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(ConfigError, match="was made by another tokenizer"):
        train(replace(run, tokenizer=str(tmp_path / "other")), quiet=True)
    (more := tmp_path / "more" / "a").mkdir(parents=True)
    write_images(more, 9, 40, seed=4)
    with pytest.raises(ConfigError, match="was made of other images"):
        train(replace(paired(tmp_path / "p", encoded), data=replace(run.data, path=str(more.parent))), quiet=True)
    assert not (tmp_path / "p").exists(), "a folder was made before the data was looked at"


# ---- what is refused ------------------------------------------------------------------------------------------------


def test_what_the_data_does_not_fit_is_refused(tmp_path: Path, cache: Path) -> None:
    run = small_generator(tmp_path / "run", cache)

    def refused(words: str, **changes: Any) -> None:
        with pytest.raises((ConfigError, CacheError), match=words):
            train(replace(run, **changes), quiet=True)
        assert not (tmp_path / "run").exists()

    refused(r"holds latents of \(6, 8\), and the model takes \(7, 8\): model.tokens=6 model.channels=8",
            model=replace(run.model, tokens=7))  # fmt: skip
    refused("has labels up to 2: model.num_classes=3", model=replace(run.model, num_classes=2))
    refused("data.cache: say where the latents are", data=replace(run.data, cache=""))
    refused("no such folder", data=replace(run.data, cache=str(tmp_path / "nothing")))
    train(run, quiet=True)
    with pytest.raises(ConfigError, match=r"holds a run with model\.dim=32"):
        train(replace(run, model=replace(run.model, dim=48, heads=2)), quiet=True)


def test_a_start_takes_over_weights_and_says_what_does_not_fit(tmp_path: Path, cache: Path) -> None:
    run = small_generator(tmp_path / "first", cache, steps=2)
    newest = train(run, quiet=True)
    again = replace(run, out=str(tmp_path / "second"), start=str(tmp_path / "first"))

    want = load_generator(newest / "generator").state_dict()
    found = make_generator(again).state_dict()
    assert all(torch.equal(found[name], value) for name, value in want.items())
    with pytest.raises(ConfigError, match="does not fit model"):
        make_generator(replace(again, model=replace(again.model, depth=3)))
