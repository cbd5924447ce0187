# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""The decoder that 1024-token models need: Stable Diffusion's f8 VAE decoder in plain PyTorch, to count its work.

(B, 4, h, w) -> conv 512 -> [res, attention, res] -> 4 levels of 3 res blocks, widths 512 512 256 128,
each but the last followed by nearest x2 and a conv -> GroupNorm, SiLU, conv -> (B, 3, 8h, 8w)
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.baselines import attend


def _norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(32, channels, eps=1e-6)


class ResBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = _norm(inputs), nn.Conv2d(inputs, outputs, 3, padding=1)
        self.norm2, self.conv2 = _norm(outputs), nn.Conv2d(outputs, outputs, 3, padding=1)
        self.skip = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.skip(x) + self.conv2(F.silu(self.norm2(self.conv1(F.silu(self.norm1(x))))))


class AttentionBlock(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = _norm(channels)
        self.q, self.k, self.v, self.proj = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (conv(h).flatten(2).transpose(1, 2).unsqueeze(1) for conv in (self.q, self.k, self.v))
        return x + self.proj(attend(q, k, v, "naive").transpose(1, 2).unflatten(2, x.shape[-2:]))


class SDVAEDecoder(nn.Module):
    """Latents (B, 4, h, w) -> images (B, 3, 8h, 8w)."""

    def __init__(self, width: int = 128) -> None:
        super().__init__()
        widths = [4 * width, 4 * width, 2 * width, width]
        self.post_quant_conv = nn.Conv2d(4, 4, 1)
        layers: list[nn.Module] = [nn.Conv2d(4, widths[0], 3, padding=1)]
        layers += [ResBlock(widths[0], widths[0]), AttentionBlock(widths[0]), ResBlock(widths[0], widths[0])]
        channels = widths[0]
        for level, outputs in enumerate(widths):
            for _ in range(3):
                layers.append(ResBlock(channels, outputs))
                channels = outputs
            if level < 3:
                layers += [nn.Upsample(scale_factor=2), nn.Conv2d(channels, channels, 3, padding=1)]
        layers += [_norm(channels), nn.SiLU(), nn.Conv2d(channels, 3, 3, padding=1)]
        self.layers = nn.Sequential(*layers)

    def forward(self, latents: Tensor) -> Tensor:
        return self.layers(self.post_quant_conv(latents))
