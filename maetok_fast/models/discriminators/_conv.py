# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""What the convolutional discriminators share: a convolution with its LeakyReLU, and what all ask of images."""

from __future__ import annotations

from torch import Tensor, nn

from maetok_fast.checks import check_tensor
from maetok_fast.kernels import affine_act

__all__ = ["SLOPE", "ConvAct", "check_images"]

SLOPE = 0.2  # of every LeakyReLU in the public discriminators


class ConvAct(nn.Conv2d):
    """`nn.Conv2d` and a LeakyReLU. The bias and the activation are one pass (`affine_act`) behind a bare product."""

    def forward(self, x: Tensor) -> Tensor:
        return affine_act(self._conv_forward(x, self.weight, None), self.bias, slope=SLOPE)


def check_images(images: Tensor, least: int, owner: str) -> None:
    """TypeError or ValueError unless images are (B, 3, H, W), floating point, and of at least so many pixels a side."""
    check_tensor("images", images, ("B", 3, "H", "W"))
    if not images.is_floating_point():
        raise TypeError(f"images: expected floating point in [-1, 1], got {images.dtype}; use images / 127.5 - 1")
    if min(images.shape[2:]) < least:
        height, width = images.shape[2:]
        raise ValueError(f"{owner}: images must be at least {least} x {least} pixels, got {height} x {width}")
