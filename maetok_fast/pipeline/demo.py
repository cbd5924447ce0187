# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""Small models with random weights, for trying every command without a download. They were never trained: a picture is
a pattern of soft colours that depends on its latents, hence on its label and seed, and shows nothing."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from maetok_fast.models import MAETok, MAETokConfig, SiT, SiTConfig, ViTSize

__all__ = ["demo_generator", "demo_tokenizer"]

SIDE, PATCH = 64, 8


@torch.no_grad()
def demo_tokenizer() -> MAETok:
    """64 px, 16 latents of width 8; the latents' statistics stand in its configuration."""
    vit = ViTSize(dim=96, depth=3, heads=4)
    config = MAETokConfig(
        image_size=SIDE, base_image_size=SIDE, patch=PATCH, num_latent_tokens=16, latent_dim=8,
        encoder=vit, decoder=vit, decoder_kind="plain", latent_std=0.5,
    )  # fmt: skip
    model = MAETok(config).eval()
    for name, p in model.named_parameters():
        if name.endswith("gamma"):
            p.fill_(1.0)
        elif name.endswith("qkv.weight"):
            p[: 2 * vit.dim].mul_(2.5)  # attention that tells places apart
        elif name.startswith("post_quant_conv.weight"):
            p.mul_(3.0)
    last = [module for module in model.decoder.modules() if isinstance(module, nn.Linear)][-1]
    last.weight.copy_(_soft_patches(last.weight))
    return model


def _soft_patches(weight: Tensor) -> Tensor:
    """(PATCH * PATCH * 3, dim) that makes patches of low frequencies only, where noise would make noise."""
    line = (torch.arange(PATCH) + 0.5) / PATCH
    waves = torch.stack([torch.cos(math.pi * k * line) / (1 + k) for k in range(3)])
    basis = torch.einsum("ip,jq->pqij", waves, waves).reshape(PATCH * PATCH, -1)  # (pixels, waves)
    mixed = torch.randn(basis.shape[1], 3, weight.shape[1]) * 1.2 / weight.shape[1] ** 0.5
    return torch.einsum("pw,wcd->pcd", basis, mixed).reshape(weight.shape)


@torch.no_grad()
def demo_generator(few_steps: bool = False) -> SiT:
    """Of the demo tokenizer's latents, ten classes; no gate and no output of it is zero, as a fresh model's are.
    few_steps: of average velocities, with an early exit."""
    more: dict[str, Any] = {"conditions": ("r",), "exit_depth": 2} if few_steps else {}
    model = SiT(SiTConfig(tokens=16, channels=8, dim=96, depth=3, heads=4, num_classes=10, **more)).eval()
    for p in model.parameters():
        if not p.any() and p.requires_grad:
            p.normal_(0, 0.1)
    model.y_embedder.embedding_table.weight.normal_(0, 1.0)
    return model
