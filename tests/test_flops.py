# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""The FLOPs of a step, against formulas and against the numbers of the field."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from maetok_fast.models import MAETok, MAETokConfig, ViTSize
from maetok_fast.training.flops import count_flops, model_flops, teacher_flops

SMALL = MAETokConfig(
    image_size=32, base_image_size=32, patch=8, num_latent_tokens=6, latent_dim=8, encoder=ViTSize(32, 2, 2),
    decoder=ViTSize(32, 2, 2), encoder_drop_path=0.1, decoder_drop_path=0.1,
)  # fmt: skip


@pytest.fixture(scope="module")
def base() -> MAETok:
    with torch.device("meta"):
        return MAETok()


def macs(tokens: int, kept: int, rows: int, dim: int = 768) -> int:
    """A ViT block's products: qkv of `rows` different tokens, scores, projection and MLP of the `kept` ones."""
    return dim * dim * (3 * rows + kept * (1 + 8)) + 2 * kept * tokens * dim


def by_hand(image_tokens: int, whole: bool = False) -> tuple[int, int]:
    """Multiplications of MAETok-B's encoder and decoder for one image. whole: nothing is left out in the last blocks,
    and equal tokens are computed one by one."""
    latents, dim, patch = 128, 768, 3 * 16 * 16
    tokens = 1 + image_tokens + latents
    last = tokens if whole else latents
    encoder = image_tokens * patch * dim + 11 * macs(tokens, tokens, tokens) + macs(tokens, last, tokens)
    tokens -= 1
    rows = tokens if whole else 1 + latents  # the first block's mask tokens are equal before RoPE
    first = macs(tokens, tokens, rows)
    last = tokens if whole else image_tokens
    decoder = first + 10 * macs(tokens, tokens, tokens) + macs(tokens, last, tokens) + image_tokens * dim * patch
    modulation = latents * 32 * dim * (12 * 4 + 2 - (0 if whole else 2 + 2))
    return encoder + latents * 32 * dim, decoder + modulation + latents * 32 * dim


def test_a_products_flops_are_twice_its_multiplications() -> None:
    assert count_flops(lambda: torch.empty(3, 5) @ torch.empty(5, 7)) == 2 * 3 * 5 * 7


@pytest.mark.parametrize("size", [256, 512])
def test_maetok_b_costs_what_its_shapes_say(base: MAETok, size: int) -> None:
    tokens = (size // 16) ** 2
    images, latents = torch.empty(1, 3, size, size, device="meta"), torch.empty(1, 128, 32, device="meta")
    with torch.no_grad():
        found = count_flops(lambda: base.encode(images)), count_flops(lambda: base.decode(latents, size))
    for counted, want in zip(found, by_hand(tokens)):
        assert counted / 2 == pytest.approx(want, rel=2e-3)  # but for the RoPE table


def test_maetok_b_costs_what_the_field_says_where_nothing_is_left_out() -> None:
    assert [n / 1e9 for n in by_hand(256, whole=True)] == pytest.approx([35.4, 35.3], rel=0.02)


def test_a_training_step_costs_three_forwards(base: MAETok) -> None:
    images = torch.empty(1, 3, 256, 256, device="meta")
    with torch.no_grad():
        forward = count_flops(lambda: base(images))
    assert model_flops(base, 256) == pytest.approx(3 * forward, rel=2e-3)
    assert model_flops(base, 256) / 2e9 == pytest.approx(205.4, rel=1e-3)


def test_a_frozen_part_has_no_backward_pass() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 4, 4), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 3, 1))
    assert model_flops(model, 16) == 2 * 16 * (2 * 3 * 16 * 8 + 3 * 8 * 8 + 3 * 8 * 3)  # no gradient of the pixels
    model[:2].requires_grad_(False)
    assert model_flops(model, 16) == 2 * 16 * (3 * 16 * 8 + 8 * 8 + 2 * 8 * 3)
    model.requires_grad_(False)
    assert model_flops(model, 16) == 2 * 16 * (3 * 16 * 8 + 8 * 8 + 8 * 3)


def test_counting_changes_nothing_and_computes_nothing() -> None:
    model = MAETok(SMALL).eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    first = model_flops(model, 32)
    assert model_flops(model, 32) == first > 0
    assert not model.training
    assert all(p.grad is None and p.device.type == "cpu" for p in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)


def test_what_is_computed_twice_for_memory_counts_once() -> None:
    model = MAETok(SMALL)
    plain = model_flops(model, 32)
    for block in (*model.encoder.model.blocks, *model.decoder.model.blocks):
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
    assert model_flops(model, 32) == plain


def test_half_precision_and_compiled_models_count_the_same() -> None:
    model = MAETok(SMALL)
    plain = model_flops(model, 32)
    assert model_flops(model.bfloat16(), 32) == plain
    model.compile()
    assert model_flops(model, 32) == plain


class Training(nn.Module):
    """Calls of `TokenizerTraining`: drop mode and captions."""

    def __init__(self) -> None:
        super().__init__()
        self.tokenizer, self.caption = MAETok(SMALL), nn.Embedding(10, 4)
        self.linear = nn.Linear(4, 5)

    def forward(self, images: Tensor, mask: Any = None, kept: Any = None, text: Any = None) -> dict[str, Tensor]:
        x = torch.empty(1, 16 if kept is None else kept.shape[1], 4, device="meta")
        ids, words = text
        assert words.dtype == torch.bool
        assert ids.shape == words.shape == (1, 77)
        return {"image": self.linear(x), "text": self.linear(self.caption(ids))}


@pytest.mark.parametrize(("dropped", "left"), [(0.0, 16), (0.5, 8), (0.51, 7), (0.75, 4)])
def test_drop_mode_counts_the_tokens_that_are_left(dropped: float, left: int) -> None:
    # the image tokens need no gradient here: forward and the weight's; the text has its embedding's too
    assert model_flops(Training(), 32, dropped=dropped) == 2 * 4 * 5 * (2 * left + 3 * 77)


def test_the_stage_itself_is_counted_in_drop_mode_and_with_captions() -> None:
    from maetok_fast.models.auxiliary import AuxiliaryDecoders, CaptionDecoder
    from maetok_fast.training.tokenizer import TokenizerTraining

    tokenizer, size = MAETok(SMALL), ViTSize(32, 1, 2)
    auxiliary = AuxiliaryDecoders(SMALL, {"hog": 108}, size)
    stage = TokenizerTraining(tokenizer, auxiliary)
    whole = model_flops(stage, 32)
    assert whole > model_flops(tokenizer, 32)
    assert model_flops(stage, 32, dropped=0.5) < whole
    assert model_flops(TokenizerTraining(tokenizer, auxiliary, CaptionDecoder(8, size=size)), 32) > whole
    assert model_flops(TokenizerTraining(tokenizer, frozen_encoder=True), 32) < whole


@pytest.mark.parametrize(("name", "gmac"), [("dino", 80.9), ("clip", 109.3)])
def test_teachers_cost_what_the_field_says(name: str, gmac: float) -> None:
    pytest.importorskip("timm")
    assert teacher_flops(name, 256) / 2e9 == pytest.approx(gmac, rel=0.01)


def test_a_step_with_teachers_costs_their_forward_more() -> None:
    pytest.importorskip("timm")
    model = MAETok(SMALL)
    more = model_flops(model, 32, teachers=("hog", "vit_tiny_patch16_224", "caption")) - model_flops(model, 32)
    assert more == teacher_flops("vit_tiny_patch16_224", 32)
    blocks = 12 * macs(5, 5, 5, 192)
    assert more / 2 == blocks + 4 * 3 * 16 * 16 * 192


def test_an_unknown_teacher_is_named() -> None:
    pytest.importorskip("timm")
    with pytest.raises(ValueError, match="vit_of_nobody"):
        teacher_flops("vit_of_nobody", 32)


@pytest.mark.parametrize(("settings", "name"), [({"image_size": 0}, "image_size"), ({"dropped": 1.0}, "dropped")])
def test_numbers_out_of_range_are_named(settings: dict[str, Any], name: str) -> None:
    with pytest.raises(ValueError, match=name):
        model_flops(MAETok(SMALL), **{"image_size": 32, **settings})


def test_a_sharded_model_is_refused_in_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard

    if dist.is_initialized():
        pytest.skip("another process group is there")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        model = fully_shard(MAETok(SMALL), mesh=dist.init_device_mesh("cpu", (1,)))
        with pytest.raises(ValueError, match="sharded"):
            model_flops(model, 32)
    finally:
        dist.destroy_process_group()
