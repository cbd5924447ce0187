# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""What each latent token carries: its variance, its dimensions, what it shares with others, what it changes in images.

S (L C, L C), the covariance of flattened latents, S_ij its (C, C) blocks
variance of token i       trace S_ii; share: of the whole trace
effective rank            (trace S)^2 / trace S^2, the participation ratio of S's eigenvalues; of a token: of S_ii
effective tokens          (sum of variances)^2 / sum of their squares: L where all tokens vary alike
correlation of tokens     trace(S_ij S_ji) / sqrt(trace S_ii^2 trace S_jj^2), the RV coefficient (Robert, Escoufier
                          1976), in [0, 1]; of n independent rows it is not 0 but of the order C / n
influence of token i      mean squared change of the decoded image where the token is replaced by its mean
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

__all__ = ["Usage", "token_influence", "token_usage"]

BLOCK = 4096  # rows at a time
LARGEST = 2048  # dimensions up to which products are in fp64; above, fp32 blocks summed in fp64


class Usage(NamedTuple):
    """Of L tokens, fp64: variance, share, rank (L,); correlation (L, L). Of all: effective_tokens, effective_rank.
    rows: how many latents."""

    variance: np.ndarray
    share: np.ndarray
    rank: np.ndarray
    correlation: np.ndarray
    effective_tokens: float
    effective_rank: float
    rows: int


def token_usage(latents: np.ndarray | Tensor, device: str | torch.device = "cpu") -> Usage:
    """latents: (N, L, C). A token without variance has share, rank and correlations 0. ValueError for other shapes,
    fewer than two rows, or latents that are all alike."""
    x = torch.as_tensor(latents)
    if x.ndim != 3 or len(x) < 2:
        raise ValueError(f"token_usage: expected latents (N, L, C) with N >= 2, got {tuple(x.shape)}")
    n, tokens, channels = x.shape
    flat = x.reshape(n, -1)
    dims = flat.shape[1]
    mean = torch.zeros(dims, dtype=torch.float64, device=device)
    for part in flat.split(BLOCK):
        mean += part.to(device).double().sum(0) / n
    whole = torch.zeros(dims, dims, dtype=torch.float64, device=device)
    for part in flat.split(BLOCK):
        centred = part.to(device).double() - mean
        if dims > LARGEST:
            centred = centred.float()
        whole += (centred.T @ centred).double()
    whole /= n - 1
    if not whole.trace() > 0:
        raise ValueError(f"token_usage: all {n} latents are alike")
    blocks = whole.reshape(tokens, channels, tokens, channels)
    variance = whole.diagonal().reshape(tokens, channels).sum(1)
    shared = blocks.square().sum((1, 3))  # trace(S_ij S_ji), as S is symmetric
    own = shared.diagonal().clone()
    scale = own.sqrt()[:, None] * own.sqrt()
    correlation = torch.where(scale > 0, shared / scale, 0.0)
    rank = torch.where(own > 0, variance.square() / own, 0.0)
    return Usage(
        variance.cpu().numpy(),
        (variance / variance.sum()).cpu().numpy(),
        rank.cpu().numpy(),
        correlation.cpu().numpy(),
        float(variance.sum().square() / variance.square().sum()),
        float(whole.trace().square() / whole.square().sum()),
        n,
    )


@torch.no_grad()
def token_influence(
    decode: Callable[[Tensor], Tensor],
    latents: Tensor,
    mean: Tensor,
    batch: int = 32,
    tick: Callable[[str], None] = lambda line: None,
) -> np.ndarray:
    """(L, H, W) fp32: for each token the squared change of the images, pixels in [0, 1], mean over channels and images,
    where it is replaced by its mean. latents: (n, L, C) of the images; mean: (L, C); decode: (B, L, C) -> (B, 3, H, W)
    in about [-1, 1]."""
    wholes = [decode(part) for part in latents.split(batch)]
    found = []
    for t in range(latents.shape[1]):
        if t % 16 == 0:
            tick(f"token {t} of {latents.shape[1]}")
        total = torch.zeros(())
        for part, whole in zip(latents.split(batch), wholes):
            less = part.clone()
            less[:, t] = mean[t]
            total = total + ((decode(less) - whole) / 2).square().mean(1).sum(0).float().cpu()
        found.append(total / len(latents))
    return torch.stack(found).numpy()
