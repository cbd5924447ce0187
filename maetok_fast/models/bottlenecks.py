# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""What stands between encoder and decoder, for comparisons under identical settings (`MAETokConfig.bottleneck`).

    ae       z = h                                                              nothing; MAETok's own
    kl       [m, v] = h,  z = m + exp(v / 2) * noise                            KL to N(0, 1); encode gives m
    softvq   p = softmax(cos(h, c_k) / tau),  z = sum_k p_k c_k / |c_k|         entropy of p, of its mean

h are the outputs (B, L, H) of `quant_conv`, or (B, L, 2H) for kl. kl: Rombach et al. 2022, arXiv 2112.10752, whose log
variance is clamped to [-30, 20]. softvq: Chen et al. 2024, arXiv 2412.10958, with unit vectors on both sides; its KL to
a uniform prior is mean entropy minus entropy of the mean, at a sharper temperature.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["SoftVQ", "gaussian", "kl_loss", "sample_gaussian"]


def gaussian(h: Tensor) -> tuple[Tensor, Tensor]:
    """h (B, L, 2H) -> mean and log variance (B, L, H), the latter within [-30, 20]."""
    mean, log_variance = h.chunk(2, dim=-1)
    return mean, log_variance.clamp(-30.0, 20.0)


def sample_gaussian(mean: Tensor, log_variance: Tensor) -> Tensor:
    """One sample for each token, by torch's generator of the device."""
    return mean + (0.5 * log_variance).exp() * torch.randn_like(mean)


def kl_loss(mean: Tensor, log_variance: Tensor) -> Tensor:
    """KL(N(mean, var) || N(0, 1)) of an image, summed over its latents (B, L, H), the mean over the batch: fp32."""
    m, v = mean.float(), log_variance.float()
    return 0.5 * (m.square() + v.exp() - 1 - v).sum() / mean.shape[0]


class SoftVQ(nn.Module):
    """h (B, L, H) -> (latents (B, L, H), the entropy loss in fp32). `embedding.weight` (size, H) is the codebook."""

    def __init__(self, size: int, dim: int, tau: float = 0.07, loss_temperature: float = 0.01) -> None:
        super().__init__()
        self.tau, self.loss_temperature = tau, loss_temperature
        self.embedding = nn.Embedding(size, dim)
        nn.init.normal_(self.embedding.weight)

    def forward(self, h: Tensor) -> tuple[Tensor, Tensor]:
        wide = torch.promote_types(torch.float32, h.dtype)
        # a cosine rounded to bf16 and divided by a temperature of .01 would be off by 0.4
        with torch.autocast("cpu" if h.is_meta else h.device.type, enabled=False):  # torch knows none of meta's
            codes = F.normalize(self.embedding.weight.to(wide), dim=-1)
            similarity = F.normalize(h.to(wide), dim=-1) @ codes.T
            latents = (similarity / self.tau).softmax(-1) @ codes
            return latents.to(h.dtype), self.entropy_loss(similarity.float())

    def entropy_loss(self, similarity: Tensor) -> Tensor:
        """Mean entropy of the tokens' distributions over the codes, minus the entropy of their mean: low where each
        token is sure of its code and all codes are used."""
        p = (similarity / self.loss_temperature).flatten(0, -2).log_softmax(-1)
        own = -(p.exp() * p).sum(-1).mean()
        average = p.exp().mean(0)
        return own + (average * average.clamp_min(1e-8).log()).sum()

    def extra_repr(self) -> str:
        return f"tau={self.tau}"
