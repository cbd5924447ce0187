# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""The public discriminator in plain PyTorch: heads on the tokens of a frozen DINO ViT-S/16, and DiffAugment.

    images ── augment ── area resize to 224 px ── frozen ViT-S/16 ─┬─ tokens before its blocks ── head ─┐
                                                                   └─ after 2, 5, 8, 11 ──────── heads ─┴─ logits

As in StyleGAN-T (arXiv 2301.09515); DiffAugment: 2006.10738.
"""

from __future__ import annotations

import math
import random
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def normalised(images: Tensor) -> Tensor:
    """[-1, 1] -> ImageNet's mean and deviation, which public code feeds SigLIP too."""
    mean, deviation = (images.new_tensor(v)[:, None, None] for v in IMAGENET)
    return (images * 0.5 + 0.5 - mean) / deviation


def timm_vit(name: str, size: int, **options: Any) -> Any:
    """A frozen timm ViT at patch 16, random weights, in eval."""
    import timm

    model = timm.create_model(name, pretrained=False, num_classes=0, patch_size=16, img_size=size, **options)
    return model.eval().requires_grad_(False)


def augment(images: Tensor, probability: float, cutout: float) -> Tensor:
    """DiffAugment: colour, translation by at most an eighth, cutout of that share; each with this probability."""
    batch, _, height, width = images.shape
    device = images.device

    def uniform() -> Tensor:
        return torch.rand(batch, 1, 1, 1, device=device)

    def whole(low: int, high: int) -> Tensor:
        return torch.randint(low, high, (batch, 1, 1), device=device)

    rows, columns = torch.arange(height, device=device)[:, None], torch.arange(width, device=device)
    if random.random() < probability:
        images = images + (uniform() - 0.5)
        mean = images.mean(1, keepdim=True)
        images = (images - mean) * (uniform() * 2) + mean
        mean = images.mean((1, 2, 3), keepdim=True)
        images = (images - mean) * (uniform() + 0.5) + mean
    if random.random() < probability:
        most = int(height / 8 + 0.5), int(width / 8 + 0.5)
        down = (rows + whole(-most[0], most[0] + 1) + 1).clamp(0, height + 1)
        right = (columns + whole(-most[1], most[1] + 1) + 1).clamp(0, width + 1)
        image = torch.arange(batch, device=device)[:, None, None]
        images = F.pad(images, (1, 1, 1, 1)).permute(0, 2, 3, 1)[image, down, right].permute(0, 3, 1, 2)
    if random.random() < probability:
        size = int(height * cutout + 0.5), int(width * cutout + 0.5)
        top = whole(0, height + 1 - size[0] % 2) - size[0] // 2
        left = whole(0, width + 1 - size[1] % 2) - size[1] // 2
        gone = (rows >= top) & (rows < top + size[0]) & (columns >= left) & (columns < left + size[1])
        images = images * (~gone)[:, None].to(images.dtype)
    return images


class Residual(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return (x + self.inner(x)) / math.sqrt(2)


def _layer(dim: int, width: int) -> nn.Sequential:
    conv = spectral_norm(nn.Conv1d(dim, dim, width, padding=width // 2, padding_mode="circular"))
    return nn.Sequential(conv, nn.BatchNorm1d(dim), nn.LeakyReLU(0.2))


class DinoDiscriminator(nn.Module):
    """Images (B, 3, H, W) in [-1, 1] -> logits (B, 5 * tokens): heads on a frozen ViT-S/16's tokens before its blocks
    and behind a quarter, half, three quarters and all of them."""

    def __init__(self, size: int, **options: Any) -> None:
        super().__init__()
        self.size = size
        self.trunk = timm_vit("vit_small_patch16_224.dino", size, **options)
        dim, depth = self.trunk.embed_dim, len(self.trunk.blocks)
        self.after = [(i + 1) * depth // 4 - 1 for i in range(4)]
        self.heads = nn.ModuleList(
            nn.Sequential(_layer(dim, 1), Residual(_layer(dim, 9)), spectral_norm(nn.Conv1d(dim, 1, 1)))
            for _ in range(5)
        )

    def train(self, mode: bool = True) -> DinoDiscriminator:
        super().train(mode)
        self.trunk.eval()
        return self

    def forward(self, images: Tensor) -> Tensor:
        x = F.interpolate(normalised(images), size=(self.size, self.size), mode="area")
        x = self.trunk._pos_embed(self.trunk.patch_embed(x))
        seen = [x]
        for i, block in enumerate(self.trunk.blocks):
            x = block(x)
            if i in self.after:
                seen.append(x)
        # the class token is added to every patch
        maps = [(x[:, 1:] + x[:, :1]).transpose(1, 2) for x in seen]
        return torch.cat([head(x).flatten(1) for head, x in zip(self.heads, maps, strict=True)], dim=1)
