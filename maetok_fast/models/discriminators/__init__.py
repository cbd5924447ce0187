# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""Discriminators: images (B, 3, H, W) in [-1, 1] -> logits of any shape, high where an image looks real.

    create_discriminator("dino", weights="hub")
        patchgan   convolutions, a logit a patch                                     2.8 M parameters   any size
        maskbit    the same with 3x3 kernels and group norms                         0.4 M              any size
        stylegan   residual blocks, a logit an image                                36.5 M at 256 px    one size
        dino       heads on a frozen ViT-S/16                                        7.4 M              any size

Parameter names are those of the public code, whose weights load. Losses and augmentation: `maetok_fast.kernels`
(`discriminator_loss`, `generator_loss`), `maetok_fast.layers.DiffAugment`.
"""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn

from maetok_fast.models.discriminators.dino import DinoDiscriminator
from maetok_fast.models.discriminators.maskbit import MaskBitDiscriminator
from maetok_fast.models.discriminators.patchgan import PatchGAN
from maetok_fast.models.discriminators.stylegan import StyleGANDiscriminator

__all__ = [
    "DISCRIMINATORS",
    "DinoDiscriminator",
    "MaskBitDiscriminator",
    "PatchGAN",
    "StyleGANDiscriminator",
    "create_discriminator",
]

DISCRIMINATORS: dict[str, type[nn.Module]] = {
    "dino": DinoDiscriminator,
    "maskbit": MaskBitDiscriminator,
    "patchgan": PatchGAN,
    "stylegan": StyleGANDiscriminator,
}


def create_discriminator(kind: str, **options: Any) -> nn.Module:
    """A discriminator by name, in training mode. options: its class's arguments, e.g. size=512 of "stylegan".

    ValueError for a name, TypeError for an option that is not there; each lists those that are.
    """
    if kind not in DISCRIMINATORS:
        raise ValueError(f"discriminator {kind!r} is not one of {', '.join(DISCRIMINATORS)}")
    made = DISCRIMINATORS[kind]
    known = list(inspect.signature(made).parameters)
    unknown = [name for name in options if name not in known]
    if unknown:
        raise TypeError(f"discriminator {kind!r} has no option {unknown[0]!r}; it has {', '.join(known)}")
    return made(**options)
