# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""Losses of a velocity model's training: pure functions, fp32 inside.

    velocity    mean |v - target|^2                                                 SiT, arXiv 2401.08740
    direction   1 - cos(v, target) over a token's or a place's channels             LightningDiT, arXiv 2501.01423
    align       1 - cos(projected tokens, features of the clean image)              REPA, arXiv 2410.06940
    temperature beta v(x, beta) + (1 - beta) stop(v_null) -> target                 GFT, arXiv 2501.15420

Average velocities (MeanFlow) are in meanflow.py, paths and times in paths.py.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from maetok_fast.checks import check_tensor

__all__ = ["align_loss", "direction_loss", "spatial_features", "tempered", "velocity_loss"]


def velocity_loss(v: Tensor, target: Tensor) -> Tensor:
    """Mean squared error of (B, ...), scalar fp32."""
    return F.mse_loss(v.float(), target.float())


def direction_loss(v: Tensor, target: Tensor) -> Tensor:
    """1 - cosine over the channels of (B, L, C) or (B, C, H, W), meaned over all places: scalar fp32, 0 .. 2."""
    return (1 - F.cosine_similarity(v.float(), target.float(), dim=-1 if v.ndim == 3 else 1)).mean()


def align_loss(projected: Tensor, features: Tensor, tokens: int, kept: Tensor | None = None) -> Tensor:
    """1 - cosine of projected tokens (B, N, D) and a teacher's features (B, T, D), T a multiple of N: scalar, 0 .. 2.

    tokens: N. Where T = r N, as of 128 latent tokens and a teacher's 16 x 16, the tokens are repeated to the teacher's
    grid, token n standing for the places n, N + n, ...: 1-D latents have no places of their own.
    kept (B, K) int64: projected (B, K, D) holds these of the N tokens alone, as within a route; no others count.
    ValueError where the numbers of tokens do not go together.
    """
    if features.shape[1] % tokens:
        raise ValueError(f"align: {features.shape[1]} features of an image are no multiple of its {tokens} tokens")
    check_tensor("projected", projected, (len(features), tokens if kept is None else kept.shape[1], features.shape[2]))
    grouped = features.float().unflatten(1, (-1, tokens))  # (B, r, N, D)
    if kept is not None:
        grouped = grouped.gather(2, kept[:, None, :, None].expand(-1, grouped.shape[1], -1, grouped.shape[3]))
    return (1 - F.cosine_similarity(projected.float().unsqueeze(1), grouped, dim=-1)).mean()


def spatial_features(features: Tensor, share: float) -> Tensor:
    """A teacher's features (B, T, D) less `share` of their mean over an image, each of the D brought to deviation 1
    over it (iREPA): what is left is how places differ."""
    features = features.float()
    features = features - share * features.mean(1, keepdim=True)
    return features / (features.std(1, keepdim=True) + 1e-6)


def tempered(v: Tensor, null: Tensor, beta: Tensor) -> Tensor:
    """beta v + (1 - beta) stop(null), of (B, ...) and beta (B,): what GFT holds to the path's velocity, so that v is
    the velocity guided at scale 1 / beta."""
    beta = beta.to(v.dtype).view(-1, *(1,) * (v.ndim - 1))
    return beta * v + (1 - beta) * null.detach()
