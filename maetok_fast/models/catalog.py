# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""Presets: one table from a name to a model class and its configuration. `create("sit-xl-1")` builds one with fresh
weights; `presets()` lists them. Sizes: DiT's S, B, L, XL and timm's ViT-S, -B, -L. `load_generator` tells a
checkpoint's class."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, overload

from maetok_fast.models.checkpoints import CheckpointError, Stored
from maetok_fast.models.configs import LightningDiTConfig, MAETokConfig, SiTConfig, ViTSize
from maetok_fast.models.lightningdit import LightningDiT
from maetok_fast.models.sit import SiT
from maetok_fast.models.tokenizer import MAETok

__all__ = ["LightningDiTName", "MAETokName", "SiTName", "create", "load_generator", "presets"]

# the names as types, by which a type checker (and an editor) knows what `create` returns
# fmt: off
MAETokName = Literal[
    "maetok-s-32", "maetok-s-32-512", "maetok-s-32-plain", "maetok-s-64", "maetok-s-64-512", "maetok-s-64-plain",
    "maetok-s-128", "maetok-s-128-512", "maetok-s-128-plain", "maetok-s-256", "maetok-s-256-512",
    "maetok-s-256-plain", "maetok-s-0", "maetok-b-32", "maetok-b-32-512", "maetok-b-32-plain", "maetok-b-64",
    "maetok-b-64-512", "maetok-b-64-plain", "maetok-b-128", "maetok-b-128-512", "maetok-b-128-plain", "maetok-b-256",
    "maetok-b-256-512", "maetok-b-256-plain", "maetok-b-0", "maetok-l-32", "maetok-l-32-512", "maetok-l-32-plain",
    "maetok-l-64", "maetok-l-64-512", "maetok-l-64-plain", "maetok-l-128", "maetok-l-128-512", "maetok-l-128-plain",
    "maetok-l-256", "maetok-l-256-512", "maetok-l-256-plain", "maetok-l-0",
]
SiTName = Literal[
    "sit-s-1", "sit-s-2", "sit-s-2-256", "sit-b-1", "sit-b-2", "sit-b-2-256", "sit-l-1", "sit-l-2", "sit-l-2-256",
    "sit-xl-1", "sit-xl-2", "sit-xl-2-256",
]
LightningDiTName = Literal[
    "lightningdit-s-1", "lightningdit-s-1d", "lightningdit-b-1", "lightningdit-b-1d", "lightningdit-l-1",
    "lightningdit-l-1d", "lightningdit-xl-1", "lightningdit-xl-1d",
]
# fmt: on

# dim, depth, heads
_DIT = {"s": (384, 12, 6), "b": (768, 12, 12), "l": (1024, 24, 16), "xl": (1152, 28, 16)}
_VIT = {"s": ViTSize(384, 12, 6), "b": ViTSize(768, 12, 12), "l": ViTSize(1024, 24, 16)}


_Entry = tuple[type[MAETok], MAETokConfig] | tuple[type[SiT], SiTConfig] | tuple[type[LightningDiT], LightningDiTConfig]


def _table() -> dict[str, _Entry]:
    table: dict[str, _Entry] = {}
    for name, size in _VIT.items():
        for count in (32, 64, 128, 256):
            base = MAETokConfig(num_latent_tokens=count, encoder=size, decoder=size)
            table[f"maetok-{name}-{count}"] = (MAETok, base)
            table[f"maetok-{name}-{count}-512"] = (MAETok, replace(base, image_size=512))
            table[f"maetok-{name}-{count}-plain"] = (MAETok, replace(base, decoder_kind="plain"))
        # the image-token ablation: one latent per patch
        table[f"maetok-{name}-0"] = (MAETok, MAETokConfig(num_latent_tokens=0, encoder=size, decoder=size))
    for name, (dim, depth, heads) in _DIT.items():
        shape: dict[str, Any] = {"dim": dim, "depth": depth, "heads": heads}
        table[f"sit-{name}-1"] = (SiT, SiTConfig(**shape))
        table[f"sit-{name}-2"] = (SiT, SiTConfig(tokens=(64, 64), channels=4, patch=2, **shape))
        table[f"sit-{name}-2-256"] = (SiT, SiTConfig(tokens=(32, 32), channels=4, patch=2, **shape))
        table[f"lightningdit-{name}-1"] = (LightningDiT, LightningDiTConfig(**shape))
        table[f"lightningdit-{name}-1d"] = (LightningDiT, LightningDiTConfig(tokens=128, time="maetok", **shape))
    return table


def presets() -> dict[str, MAETokConfig | SiTConfig | LightningDiTConfig]:
    """Every preset's name and configuration, e.g. `{"maetok-b-128": MAETokConfig(...), ...}`.

    maetok-SIZE-L[-512|-plain] (L = 0: image tokens), sit-SIZE-1 (128 x 32 latents), sit-SIZE-2 (64x64x4, patch 2:
    SD-VAE at 512 px) and sit-SIZE-2-256 (32x32x4), lightningdit-SIZE-1 (16x16x32) and -1d (128 x 32 latents).
    """
    return {name: config for name, (_, config) in _table().items()}


@overload
def create(name: MAETokName, **changes: Any) -> MAETok: ...
@overload
def create(name: SiTName, **changes: Any) -> SiT: ...
@overload
def create(name: LightningDiTName, **changes: Any) -> LightningDiT: ...
@overload
def create(name: str, **changes: Any) -> MAETok | SiT | LightningDiT: ...
def create(name: str, **changes: Any) -> MAETok | SiT | LightningDiT:
    """A model with freshly initialised weights: `create("maetok-b-128", image_size=512)`.

    changes: fields of the preset's configuration to replace. ValueError for an unknown name or field.
    """
    table = _table()
    if name not in table:
        raise ValueError(f"models.create: no preset {name!r}; choose one of {', '.join(sorted(table))}")
    model: Any
    model, config = table[name]
    unknown = sorted(set(changes) - set(config.__dataclass_fields__))
    if unknown:
        known = ", ".join(config.__dataclass_fields__)
        raise ValueError(
            f"models.create: {type(config).__name__} has no field {', '.join(unknown)}; its fields: {known}"
        )
    built: MAETok | SiT | LightningDiT = model(replace(config, **changes))
    return built


def load_generator(
    source: str | Path | Stored, *, revision: str | None = None, token: str | bool | None = None, **options: Any
) -> SiT | LightningDiT:
    """The SiT or LightningDiT stored at `source`, whichever its keys are of; options: as `from_pretrained`'s.

    CheckpointError with what each class says where it is neither.
    """
    stored = (
        source if isinstance(source, Stored) else Stored.read(source, revision, token, options.get("prefer", "ema"))
    )
    errors = {}
    for kind in (SiT, LightningDiT):
        try:
            return kind.from_stored(stored, **options)
        except CheckpointError as error:
            errors[kind.__name__] = str(error)
    if len(set(errors.values())) == 1:  # nothing of either in it
        raise CheckpointError(next(iter(errors.values())))
    said = "\n".join(f"as {name}: {text}" for name, text in errors.items())
    raise CheckpointError(f"{stored.file}: neither a SiT nor a LightningDiT\n{said}")
