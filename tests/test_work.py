# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""What a stage asks of a device, counted another way: by shapes, by the packages that have the networks, by what
autograd really keeps."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from scale_ranks import Live
from torch import Tensor, nn

from maetok_fast.layers import recompute
from maetok_fast.models import MAETok, MAETokConfig, SiT, SiTConfig, ViTSize
from maetok_fast.training import work as counted

SIT_XL, TRAINED = 675_000_608, 675_000_608 - 128 * 1152  # its positions are fixed


def test_sit_xl_is_counted_as_its_shapes_say() -> None:
    work = counted.generator()
    assert (work.parameters, work.trained, work.averaged) == (SIT_XL, TRAINED, SIT_XL)
    assert work.flops == pytest.approx(2 * 3 * 58.4e9, rel=1e-3)  # MAC x 2, forward and backward
    assert work.width == 28 * 128 * 1152
    assert {w.block for w in work.weights} == set(range(29))
    block = 4 * 1152 * 1152 + 2 * 4608 * 1152 + 6 * 1152 * 1152 + (4 + 4 + 1 + 6) * 1152
    assert all(sum(w.rows * w.width for w in work.weights if w.block == b) == block for b in range(1, 29))


def test_the_tokenizers_step_is_the_sum_of_its_networks() -> None:
    work = counted.tokenizer()
    gmac = {"student": 3 * 70.4, "dino": 80.9, "siglip": 109.3, "lpips": 3 * 20.0, "discriminator": 45.1}
    assert work.flops / 2e9 == pytest.approx(sum(gmac.values()), rel=2e-3)
    assert work.averaged == 173_891_360
    assert work.width == 12 * 768 * (1 + 256 + 128) + (12 * 768 + 3 * 3 * 192) * (256 + 128)
    assert counted.encoder().flops == pytest.approx(2 * 2 * 34.07e9, rel=1e-3)
    assert counted.encoder(flips=False).flops * 2 == counted.encoder().flops


def test_teachers_are_what_timm_has() -> None:
    timm = pytest.importorskip("timm")
    from maetok_fast.training.flops import teacher_flops
    from maetok_fast.training.teachers import TEACHERS

    for name, (flops, parameters) in counted.TEACHERS_AT_256.items():
        assert teacher_flops(name, 256) == flops
        with torch.device("meta"):
            model = timm.create_model(TEACHERS[name], num_classes=0, patch_size=16, img_size=256)
        assert sum(p.numel() for p in model.parameters()) == parameters


def test_the_discriminators_part_of_a_step_is_as_counted() -> None:
    from maetok_fast.models.discriminators import DinoDiscriminator
    from maetok_fast.training.adversarial import DiscriminatorTraining
    from maetok_fast.training.configs import AdversarialConfig
    from maetok_fast.training.flops import count_flops

    made = DinoDiscriminator("random")
    assert sum(p.numel() for p in made.trunk.parameters()) == counted.TRUNK
    assert sum(p.numel() for p in made.parameters()) == counted.HEADS
    training = DiscriminatorTraining(made, AdversarialConfig()).train()
    real, fake = torch.zeros(1, 3, 256, 256), torch.ones(1, 3, 256, 256, requires_grad=True)
    found = count_flops(lambda: training(real, fake.detach())[0].backward())
    made.requires_grad_(False)
    found += count_flops(lambda: training.generator(fake).backward())
    assert found == pytest.approx(counted.ADVERSARIAL, rel=2e-3)  # but for the spectral norms, once a call


def kept(model: nn.Module, call: Callable[[], Any], lowered: bool) -> Counter[Any]:
    """What a forward leaves behind for its backward pass, the second time: the first one races and tunes."""
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16, enabled=lowered), Live() as live:
            out = call()
        found = live.held(model)
        del out
    return found


def a_sit(depth: int) -> tuple[nn.Module, Callable[[], Any]]:
    model = SiT(SiTConfig(tokens=56, channels=8, dim=128, depth=depth, heads=2, num_classes=10))
    x, t, y = torch.randn(3, 56, 8), torch.rand(3), torch.tensor([1, 2, 3])
    return model, lambda: model(x, t, y)


def a_tokenizer(depth: int) -> tuple[nn.Module, Callable[[], Any]]:
    size = ViTSize(128, depth, 2)
    config = MAETokConfig(
        image_size=64, base_image_size=64, patch=8, num_latent_tokens=40, latent_dim=8, encoder=size, decoder=size
    )
    model, images = MAETok(config), torch.randn(3, 3, 64, 64)
    return model, lambda: model(images)


@pytest.mark.parametrize("lowered", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("again", [True, False], ids=["recompute", "all kept"])
@pytest.mark.parametrize(("make", "tokens"), [(a_sit, 56), (a_tokenizer, 1 + 2 * (64 + 40))], ids=["sit", "tokenizer"])
def test_blocks_keep_what_the_memory_formula_says(
    make: Callable[[int], Any], tokens: int, again: bool, lowered: bool, one_thread: None
) -> None:
    found = []
    for depth in (2, 5):
        model, call = make(depth)
        recompute(model.train(), again)
        found.append(kept(model, call, lowered))
    more = found[1] - found[0]
    count = 3 * 3 * tokens * 128  # blocks, images
    wide, narrow = counted.KEPT[0], counted.KEPT[1] + (0 if again else counted.AGAIN)
    if lowered:
        assert more[torch.bfloat16] / count == pytest.approx(2 * narrow, rel=0.05)
        # a norm's statistics, modulations, LayerScale are in it
        both = more[torch.bfloat16] + more[torch.float32]
        assert both / count == pytest.approx(2 * narrow + 4 * wide, rel=0.1)
        assert found[1]["weights"] == pytest.approx(2 * sum(p.numel() for p in model.parameters()), rel=0.08)
    else:
        assert more[torch.float32] / count == pytest.approx(4 * (wide + narrow), rel=0.1)


@pytest.mark.parametrize(("lowered", "number"), [(False, 4), (True, 2)], ids=["fp32", "bf16"])
def test_lpips_keeps_what_the_memory_formula_says(lowered: bool, number: int, one_thread: None) -> None:
    from maetok_fast.models.perceptual import LPIPS

    lpips, side = LPIPS("random", "random"), 64
    images = torch.rand(1, 3, side, side)
    leaf = images.clone().requires_grad_(True)

    def call() -> Tensor:
        with torch.no_grad():
            wanted = lpips.features(images)
        return lpips.distance(lpips.features(leaf), wanted)

    found = kept(lpips, call, lowered)
    total = sum(count for name, count in found.items() if name != "weights")
    convolutions = 2 * sum(p.numel() for p in lpips.vgg.parameters() if p.ndim == 4) if lowered else 0
    want = number * counted.LPIPS_KEPT[0] + counted.LPIPS_KEPT[1]
    assert (total - convolutions) / side**2 == pytest.approx(want, rel=0.03)
