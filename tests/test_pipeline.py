# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""The pipeline: statistics of every layout, refusals, and that a sample depends on its seed and label alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from maetok_fast.data.images import to_uint8
from maetok_fast.diffusion import sample
from maetok_fast.kernels import _native
from maetok_fast.models import CheckpointError, LightningDiT, LightningDiTConfig, SiT, SiTConfig, load_generator
from maetok_fast.pipeline import LatentStatistics, Pipeline, SampleNoise, seed_of
from maetok_fast.pipeline.demo import demo_generator, demo_tokenizer

NATIVE = _native.why_missing() is None


@pytest.fixture(scope="module", autouse=True)
def _one_thread(one_thread: None) -> None:
    pass


# ---- statistics

SHAPES = {"tokens": (16, 8), "grid": (8, 4, 4)}


@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize("extent", ["scalar", "channels", "channels, as stored", "whole"])
def test_statistics_broadcast_as_they_mean(kind: str, extent: str) -> None:
    shape = SHAPES[kind]
    channel = (1, 8) if kind == "tokens" else (8, 1, 1)
    sizes = {"scalar": (), "channels": (8,), "channels, as stored": (1, *channel), "whole": (1, *shape)}[extent]
    mean, std = torch.randn(sizes), torch.rand(sizes) + 0.5
    found, x = LatentStatistics(mean, std), torch.randn(5, *shape)
    found.check(shape)
    wide = (lambda t: t.reshape(channel)) if extent.startswith("channels") else (lambda t: t)
    z = found.normalise(x)
    torch.testing.assert_close(z, (x - wide(mean)) / wide(std))
    torch.testing.assert_close(found.denormalise(z), x)
    assert found.normalise(x.bfloat16()).dtype == torch.bfloat16


def test_statistics_that_cannot_be() -> None:
    with pytest.raises(ValueError, match="std must be > 0, the least is 0"):
        LatentStatistics(torch.zeros(3), torch.tensor([1.0, 0.0, 2.0]))
    with pytest.raises(ValueError, match="mean holds values that are not finite"):
        LatentStatistics(torch.tensor(float("nan")), torch.tensor(1.0))
    with pytest.raises(
        ValueError, match=r"shape \(7,\) does not fit latents of shape \(16, 8\): expected a scalar, 8 ch"
    ):
        LatentStatistics(torch.zeros(7), torch.ones(7)).check((16, 8))
    with pytest.raises(ValueError, match="does not fit"):  # 16 are the tokens, not the channels
        LatentStatistics(torch.zeros(16), torch.ones(16)).check((16, 8))


MEAN, STD = torch.linspace(-1, 1, 8), torch.linspace(0.5, 2, 8)
LAYOUTS: dict[str, tuple[str, Any]] = {
    "LightningDiT": ("latents_stats.pt", {"mean": MEAN.view(1, 8, 1, 1), "std": STD.view(1, 8, 1, 1)}),
    "REPA-E": (
        "sdvae-latents-stats.pt",
        {"latents_bias": MEAN.view(1, 8, 1, 1), "latents_scale": 1 / STD.view(1, 8, 1, 1)},
    ),
    "RAE": (
        "stat.pt",
        {"mean": MEAN.view(8, 1, 1).expand(8, 4, 4), "var": (STD.square() - 1e-5).view(8, 1, 1).expand(8, 4, 4)},
    ),
    "REPA-E's SiT": (
        "0100000.pt",
        {"ema": {"bn.running_mean": MEAN, "bn.running_var": STD.square() - 1e-5}, "steps": 1},
    ),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_statistics_of_the_fields_files(name: str, tmp_path: Path) -> None:
    file, content = LAYOUTS[name]
    torch.save(content, tmp_path / file)
    found = LatentStatistics.beside(tmp_path)
    assert found is not None
    assert str(tmp_path / file) in found.source
    x = torch.randn(2, 8, 4, 4)
    want = (x - MEAN.view(8, 1, 1)) / STD.view(8, 1, 1)
    torch.testing.assert_close(found.normalise(x), want)
    again = LatentStatistics.load(found.save(tmp_path))
    assert torch.equal(again.mean, found.mean)
    assert torch.equal(again.std, found.std)
    ours = LatentStatistics.beside(tmp_path)
    assert ours is not None
    assert "latent_statistics.safetensors" in ours.source, "ours comes first"


def test_files_that_hold_none(tmp_path: Path) -> None:
    assert LatentStatistics.beside(tmp_path) is None
    assert LatentStatistics.beside("owner/repository") is None
    torch.save({"mean": torch.zeros(3)}, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match=r"holds no latent statistics: expected mean and std.*; got mean"):
        LatentStatistics.load(tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match="no such file"):
        LatentStatistics.load(tmp_path / "b.pt")
    (tmp_path / "c.pt").write_bytes(b"PK\x03\x04 no zip")
    with pytest.raises(CheckpointError, match="not loadable"):
        LatentStatistics.load(tmp_path / "c.pt")


# ---- loading and refusing


def test_a_generators_kind_is_told_from_its_keys(tmp_path: Path) -> None:
    sit = demo_generator()
    lightning = LightningDiT(LightningDiTConfig(tokens=16, channels=8, dim=64, depth=1, heads=2, num_classes=10))
    for name, model in (("sit", sit), ("lightning", lightning)):
        model.save_pretrained(tmp_path / name)
        LatentStatistics(MEAN, STD).save(tmp_path / name)
        torch.save({"mean": MEAN, "std": STD}, tmp_path / name / "latents_stats.pt")
        found = load_generator(tmp_path / name)
        assert type(found) is type(model)
        assert found.config == model.config
    demo_tokenizer().save_pretrained(tmp_path / "tokenizer")
    with pytest.raises(CheckpointError, match=r"neither a SiT nor a LightningDiT\nas SiT: (.|\n)*\nas LightningDiT: "):
        load_generator(tmp_path / "tokenizer")
    with pytest.raises(CheckpointError, match="no such file or directory"):
        load_generator(tmp_path / "nothing")
    made = Pipeline.from_pretrained(tmp_path / "tokenizer", tmp_path / "sit", precision="fp32")
    assert made.statistics is not None
    assert torch.equal(made.statistics.std, STD), "what lies beside the generator comes before the tokenizer's"
    assert made.generate([1], [2], steps=2).images.shape == (1, 64, 64, 3)


def test_a_training_file_beside_its_statistics(tmp_path: Path) -> None:
    """Two .pt files in a folder, of which one is no model; and REPA-E's, which holds both."""
    torch.save({"ema": demo_generator().state_dict(), "steps": 5}, tmp_path / "0000005.pt")
    torch.save({"mean": MEAN, "std": STD}, tmp_path / "latents_stats.pt")
    assert load_generator(tmp_path, heads=4).config.tokens == 16
    assert LatentStatistics.beside(tmp_path) is not None
    norm = {"bn.running_mean": MEAN, "bn.running_var": STD, "bn.num_batches_tracked": torch.tensor(3)}
    (tmp_path / "repa-e").mkdir()
    torch.save({"ema": demo_generator().state_dict() | norm, "steps": 5}, tmp_path / "repa-e" / "0000005.pt")
    assert load_generator(tmp_path / "repa-e", heads=4).config.tokens == 16
    found = LatentStatistics.beside(tmp_path / "repa-e")
    assert found is not None
    torch.testing.assert_close(found.std, (STD + 1e-5).sqrt())


def test_refusals() -> None:
    tokenizer, generator = demo_tokenizer(), demo_generator()
    small: dict[str, Any] = {"dim": 64, "depth": 1, "heads": 2}
    with pytest.raises(
        ValueError, match=r"the generator samples latents of shape \(12, 8\), the tokenizer decodes \(16, 8\)"
    ):
        Pipeline(tokenizer, SiT(SiTConfig(tokens=12, channels=8, **small)))
    with pytest.raises(ValueError, match=r"of shape \(4, 8, 8\)"):
        Pipeline(tokenizer, SiT(SiTConfig(tokens=(8, 8), channels=4, **small)))
    with pytest.raises(ValueError, match="the negative samples latents"):
        Pipeline(tokenizer, generator, negative=SiT(SiTConfig(tokens=12, channels=8, **small)))
    unknown = demo_tokenizer()
    object.__setattr__(unknown.config, "latent_std", 1.0)
    with pytest.raises(ValueError, match=r"nothing says how .*statistics=LatentStatistics\.load.*identity\(\)"):
        Pipeline(unknown, generator)
    assert Pipeline(unknown, generator, LatentStatistics.identity()).generate([0], [0], steps=1).rows == 1
    assert Pipeline(unknown).encode(torch.zeros(1, 3, 64, 64)).shape == (1, 16, 8)
    with pytest.raises(ValueError, match="there is no generator"):
        Pipeline(tokenizer).generate([0], [0])
    with pytest.raises(TypeError, match="tokenizer must be a MAETok, got SiT"):
        Pipeline(generator)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="a label for each seed, got 2 and 1"):
        Pipeline(tokenizer, generator).generate([0, 1], [0])


def test_encode_and_decode_undo_each_other(pipeline: Pipeline) -> None:
    images = torch.rand(3, 3, 64, 64) * 2 - 1
    z = pipeline.encode(images)
    torch.testing.assert_close(z, pipeline.tokenizer.encode(images) / 0.5)
    torch.testing.assert_close(pipeline.decode(z), pipeline.reconstruct(images))


# ---- a sample is its seed's and its label's

LABELS = [3, 1, None, 4, 1, 5, 9]
SEEDS = [10, 11, 12, 13, 11, 2**63, seed_of(7, 7)]
WAYS: dict[str, dict[str, Any]] = {
    "sde": {"steps": 4},
    "euler": {"steps": 4, "method": "euler"},
    "heun, guided at some times": {"steps": 4, "method": "heun", "guidance": 2.5, "interval": (0.3, 0.8)},
    "dopri5": {"method": "dopri5", "tolerance": 1e-2},
}


@pytest.mark.skipif(not NATIVE, reason="bits that depend on no other row need the native library")
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("precision", "weights"), [("fp32", None), ("bf16", None), ("fp32", torch.int8)], ids=str)
def test_neither_batch_nor_order_nor_threads_change_a_sample(
    way: str, precision: str, weights: torch.dtype | None
) -> None:
    from maetok_fast.kernels._gemm import why_not_packed

    if weights == torch.int8 and why_not_packed("int8", torch.device("cpu")) is not None:
        pytest.skip(str(why_not_packed("int8", torch.device("cpu"))))
    if way == "dopri5":
        pytest.importorskip("torchdiffeq")
    torch.manual_seed(0)
    made = Pipeline(demo_tokenizer(), demo_generator(), precision=precision, weights=weights)
    assert made.reproducible
    want = made.generate(LABELS, SEEDS, batch=7, **WAYS[way]).images
    assert np.array_equal(want[1], want[4]), "one label and one seed"
    assert len({image.tobytes() for image in want}) == len(want) - 1, "all others are other pictures"
    for batch in (1, 2, 5):
        assert np.array_equal(made.generate(LABELS, SEEDS, batch=batch, **WAYS[way]).images, want)
    back = made.generate(LABELS[::-1], SEEDS[::-1], batch=3, **WAYS[way]).images[::-1]
    assert np.array_equal(back, want)
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        assert np.array_equal(made.generate(LABELS[2:6], SEEDS[2:6], batch=4, **WAYS[way]).images, want[2:6])
    finally:
        torch.set_num_threads(threads)


def test_samples_are_the_samplers(pipeline: Pipeline) -> None:
    """Against the sampler called by hand, on the model's own noise, decoded by hand."""
    assert pipeline.generator is not None
    y, noise = torch.tensor([3, 1]), SampleNoise([5, 6])
    first = noise.first((16, 8), torch.float32, torch.device("cpu"))
    by_hand = sample(pipeline.generator, first, y, steps=3, generator=noise)
    got = pipeline.generate([3, 1], [5, 6], steps=3)
    want = to_uint8(pipeline.tokenizer.decode(by_hand.latents * 0.5))
    assert np.array_equal(got.images, want)
    assert (got.nfe, got.rows) == (by_hand.nfe, by_hand.rows)


def test_noise() -> None:
    x = torch.zeros(2, 5000, dtype=torch.float64)
    noise = SampleNoise([3, 3 + 2**32])
    first, second = noise(x), noise(x)
    assert first.dtype == torch.float64
    assert abs(first.mean().item()) < 0.05
    assert abs(first.std().item() - 1) < 0.05
    rows: list[Tensor] = [*first, *second]
    assert all(abs(torch.corrcoef(torch.stack([a, b]))[0, 1]) < 0.1 for i, a in enumerate(rows) for b in rows[:i])
    assert torch.equal(SampleNoise([3])(x[:1])[0], first[0])
    for wrong, error in ((-1, ValueError), (2**64, ValueError), (1.5, TypeError), ("a", TypeError)):
        with pytest.raises(error, match="seeds must"):
            SampleNoise([wrong])  # type: ignore[list-item]
    assert len({seed_of(g, i) for g in (0, 1, 2**31) for i in (0, 1, 49_999)}) == 9


def test_a_generator_of_ones_own_noise_is_checked() -> None:
    def model(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return x

    with pytest.raises(ValueError, match=r"generator must return noise like x, torch\.float64 \(1, 4, 2\) on cpu; got"):
        sample(model, torch.zeros(1, 4, 2), torch.zeros(1, dtype=torch.int64), steps=2, generator=lambda x: x[:, :1])
