# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""StyleGAN2's residual discriminator as the public tokenizers use it: one logit an image, of one size.

    images ── conv 3x3 ─┬─ conv 3x3 ── conv 3x3 ── blur ── conv 3x3 /2 ─(+) / sqrt 2 ── ... ── 4 x 4
                        └─ conv 1x1 /2 ─────────────────────────────────┘
    4 x 4 ── conv 3x3 ── linear ── linear ── one logit

LeakyReLU .2 behind each 3x3 convolution but the strided ones, and between the linear layers. The blur is [1, 2, 1] in
both directions, reflected at the border (`blur_down` with stride 1). No minibatch statistics, no equalised learning
rates: torch's start values. Karras et al. 2020, arXiv 1912.04958. Names as in the public code: `blocks.0`, `blocks.2.
{conv_res,net.0,net.2,downsample.0.f,downsample.1}`, `final_conv.0`, `final_linear.{0,2}`.
"""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor, nn

from maetok_fast.checks import check_images, check_integers
from maetok_fast.kernels import blur_down
from maetok_fast.models.discriminators._conv import SLOPE, ConvAct

__all__ = ["StyleGANDiscriminator"]

WIDTHS = {4: 512, 8: 512, 16: 512, 32: 512, 64: 256, 128: 128, 256: 64, 512: 32, 1024: 16}


class _Blur(nn.Module):
    """[1, 2, 1] / 4 down and across. `f` is in the public weights; it is a constant, and never read."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("f", torch.tensor([1.0, 2.0, 1.0]))

    def forward(self, x: Tensor) -> Tensor:
        return blur_down(x, 1, 1, 1, "reflect")


class _Block(nn.Module):
    """(B, C, H, W) -> (B, width, H / 2, W / 2)."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.conv_res = nn.Conv2d(channels, width, 1, 2)
        # Identities stand for the public code's activations
        self.net = nn.Sequential(
            ConvAct(channels, width, 3, 1, 1), nn.Identity(), ConvAct(width, width, 3, 1, 1), nn.Identity()
        )
        self.downsample = nn.Sequential(_Blur(), nn.Conv2d(width, width, 3, 2, 1))

    def forward(self, x: Tensor) -> Tensor:
        return (self.downsample(self.net(x)) + self.conv_res(x)) * (1 / math.sqrt(2))


class StyleGANDiscriminator(nn.Module):
    """images (B, 3, size, size) in [-1, 1] -> logits (B, 1).

    size: pixels, a power of 2 from 8 to 1024; its last layers see the whole image, hence no other size.
    multiplier: of the widths from 64 x 64 upwards.
    """

    def __init__(self, size: int = 256, multiplier: int = 1) -> None:
        super().__init__()
        check_integers("StyleGANDiscriminator", size=size, multiplier=multiplier)
        if size not in WIDTHS or size < 8 or multiplier < 1:
            raise ValueError(
                f"StyleGANDiscriminator: size must be a power of 2 from 8 to 1024 and multiplier >= 1, got {size} and "
                f"{multiplier}; other sizes need another discriminator, e.g. patchgan"
            )
        self.size = size
        width = {side: c * (multiplier if side >= 64 else 1) for side, c in WIDTHS.items()}
        sides = [size >> n for n in range(int(math.log2(size)) - 1)]  # size, ..., 8, 4
        blocks = [_Block(width[a], width[b]) for a, b in pairwise(sides)]
        self.blocks = nn.ModuleList([ConvAct(3, width[size], 3, 1, 1), nn.Identity(), *blocks])
        self.final_conv = nn.Sequential(ConvAct(width[4], width[4], 3, 1, 1), nn.Identity())
        self.final_linear = nn.Sequential(
            nn.Linear(width[4] * 16, width[4]), nn.LeakyReLU(SLOPE), nn.Linear(width[4], 1)
        )

    def forward(self, images: Tensor) -> Tensor:
        check_images(images, 8, "StyleGANDiscriminator")
        if tuple(images.shape[2:]) != (self.size, self.size):
            height, width = images.shape[2:]
            raise ValueError(
                f"StyleGANDiscriminator: made for {self.size} x {self.size} pixels, got {height} x {width}; make it "
                "for that size, or take patchgan, maskbit or dino, which see any"
            )
        x = images
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.final_linear(self.final_conv(x).flatten(1))
        return logits
