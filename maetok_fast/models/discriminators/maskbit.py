# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""The PatchGAN variant that the public MAETok code calls "maskbit": 3x3 convolutions, each behind a GroupNorm.

    images ── conv /2 ── [norm ── conv /2] x 2 ── norm ── conv ── max-pool 2 ── conv
    3         64          64, 128                        256                     1

A LeakyReLU follows each convolution but the last, the norm (32 groups, eps 1e-6) precedes it: bias and LeakyReLU are
one op (`affine_act`), the norm another. Names as there: `main.0`, `main.2`, `main.3`, ..., `main.12`.
"""

from __future__ import annotations

from itertools import pairwise

from torch import Tensor, nn

from maetok_fast.checks import check_images, check_positive
from maetok_fast.layers import NormAct
from maetok_fast.models.discriminators._conv import ConvAct

__all__ = ["MaskBitDiscriminator"]


class MaskBitDiscriminator(nn.Module):
    """images (B, 3, H, W) in [-1, 1] -> logits (B, 1, ceil(H / 8) // 2, ceil(W / 8) // 2): 16 x 16 at 256 px.

    channels: of the first layer, a multiple of 32; layers: convolutions of stride 2. 410,561 parameters.
    """

    def __init__(self, channels: int = 64, layers: int = 3) -> None:
        super().__init__()
        check_positive("MaskBitDiscriminator", channels=channels, layers=layers)
        self.least = 2 * 2**layers
        widths = [channels, *(channels * min(2**n, 8) for n in range(layers))]
        stack: list[nn.Module] = [ConvAct(3, channels, 3, 2, 1), nn.Identity()]
        for n, (before, width) in enumerate(pairwise(widths), 1):
            stack.append(NormAct(before, "group", groups=32, slope=1.0, eps=1e-6))
            stack += [ConvAct(before, width, 3, 2 if n < layers else 1, 1), nn.Identity()]
        self.main = nn.Sequential(*stack, nn.MaxPool2d(2), nn.Conv2d(widths[-1], 1, 3, 1, 1))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, 0.0, 0.02)

    def forward(self, images: Tensor) -> Tensor:
        check_images(images, self.least, "MaskBitDiscriminator")
        logits: Tensor = self.main(images)
        return logits
