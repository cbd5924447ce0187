# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""The public-style training step computes what ours computes, at public code's price; the clock around both sides."""

from __future__ import annotations

import math
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("timm")
pytest.importorskip("lpips")
sys.path.append(str(Path(__file__).resolve().parent.parent))

from benchmarks import _parts, training
from benchmarks._parts import PARTS, Parts
from benchmarks.baselines import load_needed
from benchmarks.baselines.discriminator import DinoDiscriminator, augment
from benchmarks.baselines.training import HOG, SCALES, PublicStep, TrainedMAETok, auxiliary_losses, host_masks
from maetok_fast.kernels import hog_ref
from maetok_fast.models import MAETok, MAETokConfig, ViTSize
from maetok_fast.models.auxiliary import AuxiliaryDecoders
from maetok_fast.training.targets import cosine_loss, hog_loss

CPU = torch.device("cpu")


def images(batch=2, size=64, seed=0):
    return torch.rand(batch, 3, size, size, generator=torch.Generator().manual_seed(seed)) * 2 - 1


@pytest.fixture(scope="module")
def step():
    return PublicStep(64, "small", discriminator_start=3)


# ---- it computes what ours computes


@torch.no_grad()
def test_the_masked_tokenizer_and_its_auxiliary_decoders_equal_ours():
    torch.manual_seed(0)
    small = SCALES["small"]
    plain, vit = TrainedMAETok(64, small), ViTSize(*small.vit)
    config = MAETokConfig(image_size=64, base_image_size=64, encoder=vit, decoder=vit)
    ours, auxiliary = MAETok(config), AuxiliaryDecoders(config, plain.features, ViTSize(*small.auxiliary))
    for module in (ours, auxiliary):
        for p in module.parameters():
            p.normal_(0, 0.1)
    state = plain.state_dict() | ours.state_dict() | auxiliary.state_dict()
    load_needed(plain, state)
    mask = host_masks(2, 16, np.random.default_rng(0))
    latents, _ = ours.latents_and_loss(images(), mask)
    torch.testing.assert_close(plain.reconstruct(images(), mask), ours.decode(latents, 64), atol=1e-5, rtol=1e-4)
    predicted = plain.predict(images(), mask)
    for name, want in auxiliary(latents, (4, 4)).items():
        torch.testing.assert_close(predicted[name], want, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("shape", [(32, 32), (64, 48)])
def test_the_histogram_in_memory_is_our_hog(shape):
    x = images(size=64)[:, :, : shape[0], : shape[1]].double()
    plain = HOG().double()
    torch.testing.assert_close(plain(x), hog_ref(x, 16, 8), atol=1e-6, rtol=1e-6)


def test_masked_losses_are_ours():
    mask = host_masks(3, 16, np.random.default_rng(1))
    predictions = {"hog": torch.randn(3, 16, 108), "dino": torch.randn(3, 16, 24)}
    targets = {name: torch.randn_like(x) for name, x in predictions.items()}
    got = auxiliary_losses(predictions, targets, mask)
    torch.testing.assert_close(got["hog"], hog_loss(predictions["hog"], targets["hog"], mask))
    torch.testing.assert_close(got["dino"] + 1, cosine_loss(predictions["dino"], targets["dino"], mask))


def test_every_image_of_a_step_loses_as_many_patches_within_the_half_bell():
    rng, counts = np.random.default_rng(0), set()
    for _ in range(50):
        mask = host_masks(3, 256, rng)
        assert len(set(mask.sum(1).tolist())) == 1
        assert not torch.equal(mask[0], mask[1])
        counts.add(int(mask[0].sum()))
    assert math.ceil(0.4 * 256) <= min(counts) < max(counts) <= math.ceil(0.6 * 256)


def test_augmentation_at_probability_0_is_the_image_and_a_cutout_is_a_quarter_of_it():
    assert torch.equal(augment(images(), 0.0, 0.5), images())
    torch.manual_seed(0)
    seen = [(augment(torch.ones(4, 3, 32, 32), 1.0, 0.5) == 0).all(1).float().mean().item() for _ in range(50)]
    # 1/4 where the square lies inside, less over the border; translation adds its empty rows and columns
    assert 0.1 < sum(seen) / len(seen) < 0.45


def test_the_real_discriminator_trains_seven_million_numbers_and_not_its_trunk():
    with torch.device("meta"):
        made = DinoDiscriminator(224)
    assert made.after == [2, 5, 8, 11]
    assert sum(p.numel() for p in made.parameters() if p.requires_grad) == pytest.approx(7.4e6, rel=0.01)


# ---- at public code's price


def test_a_step_before_the_start_pays_for_the_discriminator_and_the_second_encoding(step):
    seen = {"encoder": 0, "discriminator": 0, "lpips": 0}

    def count(name):
        def hook(*_):
            seen[name] += 1

        return hook

    hooks = [getattr(step, owner).register_forward_hook(count(owner)) for owner in ("discriminator", "lpips")]
    hooks.append(step.model.encoder.register_forward_hook(count("encoder")))
    step.step = 0
    values = step(images())
    for hook in hooks:
        hook.remove()
    # the generator's loss, and both images under weak and strong augmentation
    assert seen == {"encoder": 2, "discriminator": 5, "lpips": 1}
    assert min(values[name] for name in ("adaptive_weight", "discriminator", "consistency")) > 0
    assert all(isinstance(value, float) and math.isfinite(value) for value in values.values())


def test_the_discriminator_moves_the_pixels_only_from_its_start(step):
    x, gradients = images(), {}
    last = step.model.decoder.to_pixel.model.weight
    for number in (0, 3):
        step.step, step.rng = number, np.random.default_rng(0)
        torch.manual_seed(0)
        losses, _, total = step._generator_losses(x, Parts(CPU), 0.4 * (number >= step.start))
        nll = losses["reconstruction"] + number / 10_000 * losses["perceptual"]
        pixels = torch.autograd.grad(nll, last, retain_graph=True)[0]
        gradients[number] = (torch.autograd.grad(total, last)[0] - pixels).norm() / pixels.norm()
    assert gradients[0] < 1e-5
    assert gradients[3] == pytest.approx(0.4, rel=1e-2)  # the adaptive weight makes the generator's as long as nll's


def test_training_lowers_the_loss_and_leaves_the_teachers_alone_but_in_the_average(step):
    teachers = [p.clone() for p in step.model.teachers.parameters()]
    step.step = 0
    first = step(images())
    for _ in range(3):
        last = step(images())
    assert last["reconstruction"] < first["reconstruction"]
    assert all(torch.equal(a, b) for a, b in zip(teachers, step.model.teachers.parameters()))
    assert any(name.startswith("teachers.") for name, _ in step.ema.named_parameters())
    weights, average = step.model.quant_conv.weight, step.ema.quant_conv.weight
    assert (average - weights).abs().max() > 0
    assert set(step.timings) == set(PARTS)


# ---- the benchmark


def test_the_time_of_an_inner_part_is_taken_off_the_outer_one(monkeypatch):
    clock = iter([0.0, 1.0, 4.0, 10.0, 20.0, 21.0])
    monkeypatch.setattr(_parts.time, "perf_counter", lambda: next(clock))
    parts = Parts(CPU)
    with parts("backward"):
        assert parts.within("targets", lambda x: x + 1)(1) == 2
    with parts("targets"):
        pass
    assert parts.seconds == {"targets": 4.0, "backward": 7.0}


def arguments(*more):
    return training.parse(["--scale", "small", "--size", "64", "--precision", "fp32", *more])


def test_our_step_trains_and_its_parts_are_the_whole_step():
    args = arguments()
    run = training.our_run(args, CPU)
    run = replace(run, loss=replace(run.loss, perceptual=0.0), adversarial=replace(run.adversarial, weight=0.0))
    step, pixels = training.make_ours(run, CPU), torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    step.step = 15_000  # at step 0 the learning rate is too small for fp32 to show
    last = step.stage.averaged.decoder.to_pixel.model.weight  # new MoVQ decoders do not listen to latents yet
    before = last.detach().clone()
    values = step(pixels)
    assert {"reconstruction", "hog", "test_vit", "test_vit2"} <= set(values)
    assert not torch.equal(before, last)
    assert set(step.timings) == set(PARTS) - {"discriminator", "EMA"}  # the optimizer's pass moves the average
    assert min(step.timings.values()) > 0
    assert (step.ema.updates, step.step) == (1, 15_001)


def test_ratios_are_of_pairs_and_the_table_holds_both_sides():
    times = {
        "seconds": {"ours": [1.0, 2.0, 4.0], "public": [3.0, 4.0, 16.0]},
        "parts": {side: dict.fromkeys((*PARTS, training.REST), 0.5) for side in training.SIDES},
    }
    spread = training.ratios(times["seconds"])
    assert (spread.median, spread.low, spread.high) == (3.0, 2.5, 3.5)
    memory = {"ours": {"built": 1e9, "steps": 1e9}, "public": {"side": "public", "error": "killed"}}
    text = "\n".join(training.tables(training.SIDES, times, memory, 2))
    assert all(words in text for words in ("3.00 x  (quartiles 2.50 .. 3.50)", "public: killed"))
    assert [line.split()[-2:] for line in text.splitlines() if "peak" in line] == [["2.00", "-"]]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["--size", "100"], "--size must be a multiple of 16"),
        (["--step-number", "-1"], "--step-number must be at least 0"),
        (["--batch", "0"], "at least 1"),
        (["--device", "tpu"], "--device"),
    ],
)
def test_a_wrong_argument_ends_in_one_line(given, words, capsys):
    with pytest.raises(SystemExit) as ended:
        training.parse(given)
    said = capsys.readouterr().err
    assert (ended.value.code, len(said.strip().splitlines())) == (2, 1)
    assert words in said


def test_the_public_side_alone_prints_its_seconds_and_its_memory(capsys, tmp_path):
    file = tmp_path / "training.json"
    training.main(
        ["--scale", "small", "--size", "32", "--precision", "fp32", "--batch", "1", "--rounds", "1", "--side", "public",
         "--json", str(file)]
    )  # fmt: skip
    text = capsys.readouterr().out
    assert all(words in text for words in ("images/s", "TFLOP/s", "memory, peak, GB"))
    assert "memory of public" not in text  # the line of a failure
    assert '"ratio": null' in file.read_text()
