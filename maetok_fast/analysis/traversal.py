# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""What a tokenizer's decoder makes of latents that no image has: along principal components, between two images, and
with one token of another image.

    mean latent + s std_k direction_k      s = -3 .. 3      a row for each of the first components
    (1 - a) z_A + a z_B                    a = 0 .. 1       a row for each pair of images
    z_A with token t of z_B                                 for the tokens that change the image most, and what changes

Directions are of the flattened latents (pca.py), in the latents' own units.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from maetok_fast.analysis.pca import PCA
from maetok_fast.data.images import to_uint8

__all__ = ["Strip", "along_components", "between", "exchanged"]

STEPS = (-3.0, -2.0, -1.0, 0.0, 1.0, 2.0, 3.0)
Decode = Callable[[Tensor], Tensor]  # latents (B, L, C) -> images (B, 3, H, W) in about [-1, 1]


class Strip(NamedTuple):
    """A row of a picture. images: (n, H, W, 3) uint8; captions: n texts; frames: n colours, or none."""

    title: str
    images: np.ndarray
    captions: list[str]
    frames: list[str | None] | None = None


def along_components(decode: Decode, pca: PCA, shape: tuple[int, int], count: int = 5) -> list[Strip]:
    """Rows for the first `count` components of latents of `shape` (L, C), STEPS standard deviations from the mean."""
    share = (pca.spectrum / pca.spectrum.sum()).tolist()
    found = []
    for k in range(min(count, int((pca.spectrum > 0).sum()))):
        far = torch.tensor(STEPS, dtype=torch.float64)[:, None] * pca.spectrum[k].sqrt()
        latents = (pca.mean + far * pca.basis[k]).reshape(len(STEPS), *shape).float()
        captions = ["mean" if step == 0 else f"{step:+g} std" for step in STEPS]
        found.append(Strip(f"component {k + 1}\n{share[k]:.1%} of variance", to_uint8(decode(latents)), captions))
    return found


def between(decode: Decode, a: Tensor, b: Tensor, names: str = "AB") -> Strip:
    """From latents a to b (L, C) along a line. names: a letter for each, in captions."""
    weights = torch.linspace(0, 1, len(STEPS))
    latents = torch.lerp(a[None], b[None], weights[:, None, None])
    captions = [names[0], *(f"{w:.2f}" for w in weights[1:-1].tolist()), names[1]]
    return Strip(f"{names[0]} to {names[1]}", to_uint8(decode(latents)), captions)


def exchanged(
    decode: Decode, a: Tensor, b: Tensor, names: str = "AB", batch: int = 32
) -> tuple[list[Strip], dict[str, Any]]:
    """Latents a (L, C) with one token of b in its place: two rows, of the images for the tokens that change a most, and
    of what they change; and numbers: "tokens", the places of those, "mse" of every token's exchange, (L,), of pixels in
    [0, 1], and "scale", the difference that is drawn white. names: a letter for each, in captions."""
    whole = decode(a[None]).cpu()
    images, errors = [], []
    for start in range(0, len(a), batch):
        tokens = range(start, min(start + batch, len(a)))
        latents = a.repeat(len(tokens), 1, 1)
        for row, t in zip(latents, tokens):
            row[t] = b[t]
        images.append(decode(latents).cpu())
        errors.append(((images[-1] - whole) / 2).square().mean((1, 2, 3)))
    mse, every = torch.cat(errors), torch.cat(images)
    best = mse.argsort(descending=True, stable=True)[: len(STEPS) - 1]
    differences = (every[best] - whole).abs().mean(1, keepdim=True) / 2
    scale = float(differences.max())
    grey = (differences / max(scale, 1e-12) * 2 - 1).expand(-1, 3, -1, -1)
    captions = [names[0], *(f"token {t}" for t in best.tolist())]
    shown = Strip(f"{names[0]}, one token of {names[1]}", to_uint8(torch.cat([whole, every[best]])), captions)
    blank = torch.cat([torch.full_like(whole, -1), grey])
    changed = Strip(f"what it changes\nwhite: {scale:.2f} of 1", to_uint8(blank), [""] * len(blank))
    return [shown, changed], {"tokens": best.tolist(), "mse": mse.tolist(), "scale": scale}
