# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""PatchGAN: one logit for each patch of an image, by convolutions alone (Isola et al. 2017, arXiv 1611.07004).

    images ── conv 4x4 /2, LeakyReLU ── [conv 4x4 /2, norm, LeakyReLU] x 2 ── conv 4x4, norm, LeakyReLU ── conv 4x4
    3           64                        128, 256                            512                          1

Between two convolutions stands one op: bias and LeakyReLU (`affine_act`), or norm and LeakyReLU (`norm_act`). Names and
start values are those of taming-transformers: `main.0`, `main.2`, `main.3`, ..., so that its weights load.

Several ranks: statistics are those of each rank's own images, as of plain BatchNorm under DistributedDataParallel.
Running statistics, which nothing in training reads, are then rank 0's. ActNorm takes its start values from rank 0.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from maetok_fast.checks import check_images, check_positive
from maetok_fast.kernels import affine_act
from maetok_fast.layers import NormAct
from maetok_fast.models.discriminators._conv import SLOPE, ConvAct

__all__ = ["ActNormAct", "PatchGAN"]


class ActNormAct(nn.Module):
    """ActNorm and LeakyReLU of (B, C, H, W): scale * (x + loc), in one pass (Kingma & Dhariwal 2018, arXiv 1807.03039).

    `loc`, `scale` (1, C, 1, 1); the first training batch sets them so that each channel has mean 0 and deviation 1, and
    `initialized` (uint8) to 1.
    """

    initialized: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.loc = nn.Parameter(torch.zeros(1, channels, 1, 1))
        self.scale = nn.Parameter(torch.ones(1, channels, 1, 1))
        self.register_buffer("initialized", torch.tensor(0, dtype=torch.uint8))
        self._known = False  # that it is set: reading the buffer waits for a GPU

    def forward(self, x: Tensor) -> Tensor:
        if self.training and not self._known:
            if not self.initialized:
                self._start(x)
            self._known = True
        return affine_act(x, self.loc.flatten(), weight=self.scale.flatten(), slope=SLOPE)

    @torch.no_grad()
    def _start(self, x: Tensor) -> None:
        std, mean = torch.std_mean(x.to(self.loc.dtype), dim=(0, 2, 3), keepdim=True)
        self.loc.copy_(-mean)
        self.scale.copy_(1 / (std + 1e-6))
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            for start in (self.loc, self.scale):
                torch.distributed.broadcast(start.data, 0)
        self.initialized.fill_(1)

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        self._known = False


class PatchGAN(nn.Module):
    """images (B, 3, H, W) in [-1, 1], 24 px or more a side -> logits (B, 1, H / 8 - 2, W / 8 - 2): 30 x 30 at 256 px.

    channels: of the first layer; layers: convolutions of stride 2. norm: "batch" (its convolutions have no bias) or
    "actnorm" (they have one). 2,765,633 parameters.
    """

    def __init__(self, channels: int = 64, layers: int = 3, norm: str = "batch") -> None:
        super().__init__()
        check_positive("PatchGAN", channels=channels, layers=layers)
        if norm not in ("batch", "actnorm"):
            raise ValueError(f"PatchGAN: norm {norm!r} is not 'batch' or 'actnorm'")
        self.least = 3 * 2**layers
        widths = [channels * min(2**n, 8) for n in range(layers + 1)]
        # an Identity where the public code has its LeakyReLU: the numbers are the parameters' names
        stack: list[nn.Module] = [ConvAct(3, channels, 4, 2, 1), nn.Identity()]
        for n, (before, width) in enumerate(pairwise(widths), 1):
            stack.append(nn.Conv2d(before, width, 4, 2 if n < layers else 1, 1, bias=norm == "actnorm"))
            stack += [NormAct(width, slope=SLOPE) if norm == "batch" else ActNormAct(width), nn.Identity()]
        self.main = nn.Sequential(*stack, nn.Conv2d(widths[-1], 1, 4, 1, 1))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, 0.0, 0.02)
            elif isinstance(module, NormAct):
                nn.init.normal_(module.weight, 1.0, 0.02)

    def forward(self, images: Tensor) -> Tensor:
        check_images(images, self.least, "PatchGAN")
        logits: Tensor = self.main(images)
        return logits
