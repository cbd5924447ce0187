# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""The adversarial half of a stage: the discriminator's step, the generator's gradient, and how much of it counts.

    reconstruction (a leaf) ── DiffAugment ── D ── generator_loss ── d/d pixels       no gradient of D's weights is made
    real, fake ── DiffAugment weak, strong ── D ── hinge + LeCAM + consistency ── d/d D

Adaptive weight (Esser et al. 2021, arXiv 2012.09841): |d nll / dW| / |d g / dW| for the last layer's weight W. Both
losses reach W through the pixels alone, and d/dW of a linear layer is (d/d tokens)^T x, so that the gradients at the
pixels, which the step needs anyway, and one product each give it: neither VGG nor D is gone back through twice.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maetok_fast.kernels import discriminator_loss, generator_loss
from maetok_fast.layers import DiffAugment
from maetok_fast.training.configs import AdversarialConfig

__all__ = ["DiscriminatorTraining", "adaptive_weight", "last_layer_gradient"]

LECAM_DECAY = 0.999
STRONG = 1.0, 0.5  # DiffAugment's probability and cutout of the consistency loss
WEAK = 0.5, 0.2


def last_layer_gradient(pixel_gradient: Tensor, tokens: Tensor, patch: int) -> Tensor:
    """d loss / d W of the linear layer tokens (B, N, D) -> pixels, from d loss / d pixels (B, 3, H, W): (3 p p, D)."""
    batch, channels, height, width = pixel_gradient.shape
    shape = (batch, channels, height // patch, patch, width // patch, patch)
    patches = pixel_gradient.reshape(shape).permute(0, 2, 4, 3, 5, 1).reshape(-1, patch * patch * channels)
    return patches.to(tokens.dtype).T @ tokens.reshape(-1, tokens.shape[-1])


def adaptive_weight(nll: Tensor, adversarial: Tensor) -> Tensor:
    """clamp(|nll| / (|adversarial| + 1e-4), 0, 1e4) of the norms of both gradients at the last layer; scalars."""
    return (nll / (adversarial + 1e-4)).clamp(0.0, 1e4)


class DiscriminatorTraining(nn.Module):
    """A discriminator with what its training keeps: LeCAM's averages of the logits, `lecam` (2,) [real, fake].

    What is called in training is `forward`, the discriminator's loss, and `generator`, the generator's.
    """

    lecam: Tensor

    def __init__(self, discriminator: nn.Module, config: AdversarialConfig) -> None:
        super().__init__()
        self.discriminator, self.config = discriminator, config
        self.weak = DiffAugment(*WEAK) if config.augment else nn.Identity()
        self.strong = DiffAugment(*STRONG)
        self.register_buffer("lecam", torch.zeros(2))

    def generator(self, fake: Tensor) -> Tensor:
        """The generator's loss of images (B, 3, H, W) in [-1, 1]: a scalar."""
        return generator_loss(self.discriminator(self.weak(fake)), self.config.generator_loss)

    def forward(self, real: Tensor, fake: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """(the loss, its parts and the mean logits) of real and generated images (B, 3, H, W) in [-1, 1]."""
        config = self.config
        seen: Any = self.weak(real, fake) if config.augment else (real, fake)
        logits_real, logits_fake = (self.discriminator(x) for x in seen)
        loss, lecam, mean_real, mean_fake = discriminator_loss(
            logits_real, logits_fake, self.lecam.clone() if config.lecam else None, config.loss
        )
        parts = {"discriminator": loss, "logits_real": mean_real, "logits_fake": mean_fake}
        if config.lecam:
            loss = loss + config.lecam * lecam
            parts["lecam"] = lecam
        if config.consistency:
            strong = [self.discriminator(x) for x in self.strong(real, fake)]
            pairs = zip(strong, (logits_real, logits_fake))
            consistency = torch.stack([F.mse_loss(a.float(), b.float()) for a, b in pairs]).sum()
            loss = loss + config.consistency * consistency
            parts["consistency"] = consistency
        return loss, {name: value.detach() for name, value in parts.items()}

    @torch.no_grad()
    def move_lecam(self, means: Tensor) -> None:
        """means (2,): of the logits of real and fake images, over all ranks."""
        self.lecam.lerp_(means.to(self.lecam), 1 - LECAM_DECAY)
