# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""What the convolutional discriminators share: a convolution with its LeakyReLU."""

from __future__ import annotations

from torch import Tensor, nn

from maetok_fast.kernels import affine_act

__all__ = ["SLOPE", "ConvAct"]

SLOPE = 0.2  # of every LeakyReLU in the public discriminators


class ConvAct(nn.Conv2d):
    """`nn.Conv2d` and a LeakyReLU. The bias and the activation are one pass (`affine_act`) behind a bare product."""

    def forward(self, x: Tensor) -> Tensor:
        return affine_act(self._conv_forward(x, self.weight, None), self.bias, slope=SLOPE)
