# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""The models, one readable file each, and their presets.

    tokenizer.py     MAETok, images <-> latent tokens (its blocks: vit.py)
    sit.py           SiT, latents -> velocity
    lightningdit.py  LightningDiT, the same with RMSNorm, SwiGLU and RoPE
    checkpoints/     the public checkpoint layouts: read, check, write, push
    bottlenecks.py   what may stand between encoder and decoder: ae, kl, softvq
    auxiliary.py     decoders of other targets than pixels, in training
    perceptual.py    LPIPS
    discriminators/  patchgan, maskbit, stylegan, dino
    catalog.py       the table behind `create(name)`, `presets()`; `load_generator`

Names are resolved on first use (PEP 562), so importing this package costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from maetok_fast.models.auxiliary import AuxiliaryDecoders as AuxiliaryDecoders
    from maetok_fast.models.auxiliary import CaptionDecoder as CaptionDecoder
    from maetok_fast.models.catalog import create as create
    from maetok_fast.models.catalog import load_generator as load_generator
    from maetok_fast.models.catalog import presets as presets
    from maetok_fast.models.checkpoints import CheckpointError as CheckpointError
    from maetok_fast.models.configs import LightningDiTConfig as LightningDiTConfig
    from maetok_fast.models.configs import MAETokConfig as MAETokConfig
    from maetok_fast.models.configs import SiTConfig as SiTConfig
    from maetok_fast.models.configs import ViTSize as ViTSize
    from maetok_fast.models.discriminators import create_discriminator as create_discriminator
    from maetok_fast.models.lightningdit import LightningDiT as LightningDiT
    from maetok_fast.models.perceptual import LPIPS as LPIPS
    from maetok_fast.models.sit import Modulations as Modulations
    from maetok_fast.models.sit import SiT as SiT
    from maetok_fast.models.tokenizer import MAETok as MAETok

_HOME = {
    "AuxiliaryDecoders": "auxiliary",
    "CaptionDecoder": "auxiliary",
    "CheckpointError": "checkpoints",
    "LPIPS": "perceptual",
    "LightningDiT": "lightningdit",
    "LightningDiTConfig": "configs",
    "MAETok": "tokenizer",
    "MAETokConfig": "configs",
    "Modulations": "sit",
    "SiT": "sit",
    "SiTConfig": "configs",
    "ViTSize": "configs",
    "create": "catalog",
    "create_discriminator": "discriminators",
    "load_generator": "catalog",
    "presets": "catalog",
}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name in _HOME:
        value = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
