# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""Auxiliary targets, their losses, and the masks that weigh them, against formulas in fp64 and counts."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from maetok_fast.kernels import hog_ref, host_mask_count, random_mask, sample_mask
from maetok_fast.training.configs import MaskConfig
from maetok_fast.training.masks import Masks, ratio_at, semantic_mask
from maetok_fast.training.targets import (
    VOCABULARY,
    Targets,
    caption_loss,
    caption_mask,
    caption_words,
    cosine_loss,
    encode_captions,
    hog_loss,
    masked_mean,
)

pytestmark = pytest.mark.usefixtures("one_thread")

SEED = torch.tensor([7, 3])
MASK = torch.rand(3, 8, generator=torch.Generator().manual_seed(5)) < 0.5


def exact(loss: Any, mask: Tensor) -> float:
    """sum(loss * mask) / sum(mask) in fp64."""
    weight = mask.double().numpy()
    return float((loss * weight).sum() / weight.sum())


# ---- losses --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_hog_loss_is_the_masked_mean_squared_error(dtype: torch.dtype) -> None:
    x, y = torch.randn(3, 8, 108).to(dtype), torch.randn(3, 8, 108)
    want = exact(((x.double() - y.double()).numpy() ** 2).mean(-1), MASK)
    with torch.autocast("cpu", torch.bfloat16):
        got = hog_loss(x, y, MASK)
    assert got.dtype == torch.float32
    assert got.item() == pytest.approx(want, rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cosine_loss_is_one_minus_the_masked_cosine(dtype: torch.dtype) -> None:
    x, y = torch.randn(3, 8, 20).to(dtype), torch.randn(3, 8, 20).to(dtype)
    a, b = x.double().numpy(), y.double().numpy()
    cosine = (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)
    with torch.autocast("cpu", torch.bfloat16):
        got = cosine_loss(x, y, MASK)
    assert got.dtype == torch.float32
    assert got.item() == pytest.approx(exact(1 - cosine, MASK), rel=1e-6)
    assert cosine_loss(y, 3 * y, MASK).item() == pytest.approx(0, abs=1e-3 if dtype == torch.bfloat16 else 1e-6)


@pytest.mark.parametrize("loss", [hog_loss, cosine_loss])
def test_the_gradient_is_that_of_fp64_and_none_where_nothing_is_masked(loss: Any) -> None:
    x, y = torch.randn(3, 8, 12, requires_grad=True), torch.randn(3, 8, 12)
    loss(x, y, MASK).backward()
    wide = x.detach().double().requires_grad_()
    loss(wide, y.double(), MASK).backward()
    assert x.grad is not None
    assert wide.grad is not None
    assert torch.allclose(x.grad.double(), wide.grad, rtol=1e-5, atol=1e-8)
    assert not x.grad[~MASK].any()
    assert x.grad[MASK].any(-1).all()


def test_masked_mean_without_masked_places_is_zero_and_what_is_not_counted_may_be_anything() -> None:
    loss = torch.full((2, 4), math.nan)
    none = torch.zeros(2, 4, dtype=torch.bool)
    assert masked_mean(loss, none).item() == 0
    loss[1, 2] = 5
    none[1, 2] = True
    assert masked_mean(loss, none).item() == 5
    assert masked_mean(torch.arange(8.0).view(2, 4)).item() == 3.5
    x = torch.randn(2, 4, requires_grad=True)
    masked_mean(x, torch.zeros(2, 4, dtype=torch.bool)).backward()
    assert torch.equal(x.grad, torch.zeros(2, 4))
    with pytest.raises(ValueError, match=r"mask: expected shape \(2, 4\), got \(2, 3\)"):
        masked_mean(torch.zeros(2, 4), none[:, :3])


def test_caption_loss_is_the_cross_entropy_of_masked_words() -> None:
    logits, ids = torch.randn(2, 6, 11), torch.randint(0, 11, (2, 6))
    mask = torch.tensor([[0, 1, 1, 0, 0, 0], [0, 0, 0, 1, 0, 0]], dtype=torch.bool)
    p = logits.double().softmax(-1).numpy()
    nats = -np.log(np.take_along_axis(p, ids.numpy()[..., None], -1)[..., 0])
    got = caption_loss(logits, ids, mask)
    assert got.item() == pytest.approx(exact(nats, mask), rel=1e-6)
    assert caption_loss(logits.bfloat16(), ids, mask).dtype == torch.float32


# ---- captions ------------------------------------------------------------------------------------------------------


def test_captions_are_clips_byte_pairs_and_padding_is_no_word() -> None:
    """The numbers of CLIP's published vocabulary. "!" before a mark is 0, as padding is."""
    pytest.importorskip("open_clip")
    ids = encode_captions(["a photo of a cat", None, "wow!!! " + "cat " * 100])
    assert ids.shape == (3, 77)
    assert ids.dtype == torch.int64
    assert ids[0, :8].tolist() == [49406, 320, 1125, 539, 320, 2368, 49407, 0]
    assert ids[1, :3].tolist() == [49406, 49407, 0]
    assert ids[2, -1] == 49407
    assert ids.max() < VOCABULARY
    words = caption_words(ids)
    assert words.sum(1).tolist() == [5, 0, 75]
    assert words[0].nonzero().flatten().tolist() == [1, 2, 3, 4, 5]
    mark = torch.tensor([[49406, 0, 256, 49407, 0, 0]])
    assert caption_words(mark).tolist() == [[False, True, True, False, False, False]]
    with pytest.raises(TypeError, match="captions: expected text, got int at 1"):
        encode_captions(["a", 3])  # type: ignore[list-item]


def test_caption_masks_lie_on_words_and_follow_seed_step_and_image() -> None:
    ids = torch.full((400, 77), 320)
    ids[:, 0], ids[:, 40], ids[:, 41:] = 49406, 49407, 0
    mask = caption_mask(ids, SEED, 0.5, 0.5)
    assert not mask[:, 0].any()
    assert not mask[:, 40:].any()
    assert mask[:, 1:40].float().mean().item() == pytest.approx(0.5, abs=0.02)
    assert torch.equal(caption_mask(ids[100:], SEED, 0.5, 0.5, first_image=100), mask[100:])
    assert not torch.equal(caption_mask(ids, SEED + torch.tensor([0, 1]), 0.5, 0.5), mask)
    images = sample_mask(SEED, 400, 77, 0.5, 0.5)  # of the same seed and step
    agree = (images[:, 1:40] == mask[:, 1:40]).float().mean().item()
    assert agree == pytest.approx(0.5, abs=0.02)


# ---- targets -------------------------------------------------------------------------------------------------------


class Halves:
    """Stands for a teacher: the mean of each half of a patch, bf16."""

    features = 2

    def __call__(self, images: Tensor) -> Tensor:
        x = images.float().unfold(2, 16, 16).unfold(3, 16, 16).mean((1, 4)).flatten(1, 2)
        return x.unflatten(-1, (2, 8)).mean(-1).bfloat16()


def test_targets_compute_what_their_losses_take() -> None:
    pytest.importorskip("open_clip")
    images = torch.randint(0, 256, (2, 3, 32, 48), dtype=torch.uint8)
    targets = Targets(("hog", "caption", "dino"), {"dino": Halves()})  # type: ignore[dict-item]
    assert targets.features == {"hog": 108, "dino": 2}
    assert targets.captions
    made = targets.compute(images, ["a cat", None])
    assert list(made) == ["hog", "caption", "dino"]
    assert torch.allclose(made["hog"].double(), hog_ref(images.double()), atol=1e-6)
    assert torch.equal(made["caption"], encode_captions(["a cat", None]))
    mask = torch.rand(2, 6) < 0.5
    predictions = {name: torch.randn(2, 6, width) for name, width in targets.features.items()}
    losses = targets.losses(predictions, made, mask)
    assert list(losses) == ["hog", "dino"]
    assert torch.equal(losses["hog"], hog_loss(predictions["hog"], made["hog"], mask))
    assert torch.equal(losses["dino"], cosine_loss(predictions["dino"], made["dino"], mask))
    perfect = targets.losses({"hog": made["hog"], "dino": made["dino"].float()}, made, None)
    assert perfect["hog"] == 0
    assert perfect["dino"].item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(("patch", "cell", "features"), [(16, 8, 108), (8, 4, 108), (14, 7, 108), (2, 2, 27)])
def test_hogs_cells_are_half_a_patch_where_it_has_halves(patch: int, cell: int, features: int) -> None:
    images = torch.randint(0, 256, (2, 3, 4 * patch, 2 * patch), dtype=torch.uint8)
    targets = Targets(("hog",), patch=patch)
    assert targets.features == {"hog": features}
    assert torch.allclose(targets.compute(images)["hog"].double(), hog_ref(images.double(), patch, cell), atol=1e-6)


def test_targets_that_cannot_be_are_refused() -> None:
    images = torch.zeros(2, 3, 32, 32, dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"dino needs a teacher; give teachers=\{'dino': Teacher.create"):
        Targets(("hog", "dino"))
    with pytest.raises(ValueError, match="hog is named twice"):
        Targets(("hog", "hog"))
    with pytest.raises(ValueError, match="weights are given for clip, which is no teacher of this run"):
        Targets.create(("hog",), weights={"clip": "hub"}, image_size=32)
    for captions in (None, ["one"]):
        with pytest.raises(ValueError, match="caption needs one for each of the 2 images, got"):
            Targets(("caption",)).compute(images, captions)
    targets = Targets(("hog",))
    with pytest.raises(ValueError, match=r"the prediction of hog: expected shape \(2, 4, 108\)"):
        targets.losses({"hog": torch.zeros(2, 4, 96)}, targets.compute(images), None)


def test_a_run_makes_its_teachers_by_name() -> None:
    pytest.importorskip("timm")
    name = "vit_tiny_patch16_224"
    targets = Targets.create(("hog", name), weights={name: "random"}, image_size=32, precision="fp32")
    assert targets.features == {"hog": 108, name: 192}
    images = torch.randint(0, 256, (1, 3, 32, 32), dtype=torch.uint8)
    features = targets.compute(images)[name]
    assert torch.equal(features, targets.teachers[name](images))
    assert not features.requires_grad


# ---- masks ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("semantic", [False, True])
def test_drawn_masks_are_the_librarys_and_the_same_in_every_split_and_after_a_resume(semantic: bool) -> None:
    features = torch.randn(6, 16, 5)
    for mode in ("replace", "drop"):
        masks = Masks(MaskConfig(mode, semantic=semantic), 11)
        steps = [masks.draw(step, 6, 16, features=features) for step in range(4)]
        for step, drawn in enumerate(steps):
            assert drawn.mask is not None
            count = host_mask_count(11, step, 16)
            assert drawn.mask.sum(1).tolist() == [count] * 6
            if not semantic:
                assert torch.equal(drawn.mask, sample_mask(torch.tensor([11, step]), 6, 16))
            if mode == "drop":
                assert drawn.kept is not None
                assert [row.tolist() for row in drawn.kept] == [(~m).nonzero().flatten().tolist() for m in drawn.mask]
            else:
                assert drawn.kept is None
        assert not torch.equal(steps[0].mask, steps[1].mask)
        later = Masks(MaskConfig(mode, semantic=semantic), 11).draw(3, 2, 16, first_image=4, features=features[4:])
        assert torch.equal(later.mask, steps[3].mask[4:])


def test_stage_2s_ratio_falls_linearly_and_nothing_is_masked_at_its_end() -> None:
    assert [ratio_at(step) for step in (0, 25_000, 50_000, 90_000)] == pytest.approx([0.6, 0.3, 0.0, 0.0])
    assert [ratio_at(step, 0.5, 0.1, 4) for step in range(6)] == pytest.approx([0.5, 0.4, 0.3, 0.2, 0.1, 0.1])
    assert ratio_at(0, over=0) == 0.0
    masks = Masks(MaskConfig(low=0.6, high=0.6, over=100), 1)
    for step in (0, 1, 50, 99):
        drawn = masks.draw(step, 3, 256)
        assert drawn.mask is not None
        assert drawn.mask.sum(1).tolist() == [math.ceil(0.6 * (1 - step / 100) * 256 - 1e-6)] * 3
    assert masks.draw(100, 3, 256) == (None, None)
    assert masks.seed.tolist() == [1, 100]
    assert Masks(MaskConfig(low=0.0, high=0.0), 1).draw(0, 3, 256) == (None, None)
    with pytest.raises(ValueError, match="step must be finite, >= 0, got -1"):
        ratio_at(-1)


@given(
    batch=st.integers(1, 4),
    tokens=st.integers(1, 40),
    seed=st.integers(-(2**63), 2**63 - 1),
    step=st.integers(0, 2**40),
    temperature=st.sampled_from([1e-3, 0.5, 2.0, math.inf]),
    same=st.booleans(),
)
@settings(max_examples=40, deadline=None)
def test_semantic_masks_have_exactly_their_counts(
    batch: int, tokens: int, seed: int, step: int, temperature: float, same: bool
) -> None:
    at = torch.tensor([seed, step])
    features = torch.ones(batch, tokens, 3) if same else torch.randn(batch, tokens, 3)
    count = torch.randint(0, tokens + 2, (batch,))
    mask = semantic_mask(features, count, at, temperature, first_image=2**31)
    assert mask.sum(1).tolist() == count.clamp_max(tokens).tolist()
    if temperature == math.inf or same:
        assert torch.equal(mask, random_mask(at, count, tokens, 2**31))


def test_semantic_masks_hide_the_salient_first_and_by_the_gumbel_top_k_formula() -> None:
    """One patch of a draw of one: its probability is softmax(s / temperature)."""
    generator = torch.Generator().manual_seed(2)
    features = torch.randn(1, 6, 4, generator=generator) + torch.tensor([1.0, 0, 0, 0])
    unit = features[0].double().numpy()
    unit = unit / np.linalg.norm(unit, axis=-1, keepdims=True)
    s = unit @ unit.mean(0)
    s = (s - s.mean()) / s.std()
    draws = 20_000
    count = torch.ones(draws, dtype=torch.int32)
    for temperature in (0.5, 2.0):
        mask = semantic_mask(features.expand(draws, -1, -1), count, SEED, temperature)
        want = np.exp(s / temperature) / np.exp(s / temperature).sum()
        deviation = np.sqrt(want * (1 - want) / draws)
        assert (np.abs(mask.double().mean(0).numpy() - want) < 4.5 * deviation).all()
    cold = semantic_mask(features, torch.tensor([2]), SEED, 1e-4)
    assert sorted(cold[0].nonzero().flatten().tolist()) == sorted(np.argsort(-s)[:2].tolist())


def test_semantic_masks_that_cannot_be_are_refused() -> None:
    with pytest.raises(ValueError, match="need a teacher's features of the images"):
        Masks(MaskConfig(semantic=True), 0).draw(0, 2, 16)
    with pytest.raises(ValueError, match=r"features: expected shape \(2, 16, D\)"):
        Masks(MaskConfig(semantic=True), 0).draw(0, 2, 16, features=torch.zeros(2, 9, 3))
    with pytest.raises(ValueError, match="temperature must be above 0, got 0"):
        semantic_mask(torch.zeros(1, 4, 3), torch.tensor([1]), SEED, 0)
