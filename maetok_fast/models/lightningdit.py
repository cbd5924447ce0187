# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""LightningDiT: SiT with RMSNorm, SwiGLU and 2-D axial RoPE (Reconstruction vs. Generation, arXiv 2501.01423).

    as in sit.py, with   norm      RMSNorm with weight, eps 1e-6 (or LayerNorm without affine, `rmsnorm=False`)
                         attn      optional q/k norm (RMSNorm, or LayerNorm eps 1e-5), RoPE on all tokens: the first
                                   half of the (interleaved) pairs turns with the row, the second with the column,
                                   theta 1e4
                         mlp       w3(silu(a) * b), [a | b] = w12(x), hidden width int(2/3 * int(dim * mlp_ratio))
                         adaLN     6D, or 4D without the shifts (`shift=False`)

The fixed 2-D sin/cos positions of SiT are added as well. On 1-D latents (tokens an int) there is no grid: 1-D sin/cos
positions and no RoPE. Published weights are trained with t = 1 data, so their configs carry time="sit" (see sit.py);
the API stays t = 0 data. Published sampling (FID 1.35) applies guidance to the first 3 of 32 channels and shifts
timesteps; both are the sampler's options.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from maetok_fast.kernels import rope_table
from maetok_fast.layers import (
    Attention,
    GatedResidual,
    LayerNorm,
    Mlp,
    Modulation,
    RMSNorm,
    SwiGLU,
)
from maetok_fast.models.checkpoints.generators import LIGHTNINGDIT
from maetok_fast.models.configs import LightningDiTConfig
from maetok_fast.models.sit import AdaLNBlock, DiffusionTransformer
from maetok_fast.positions import axial_frequencies, grid_positions

__all__ = ["LightningDiT"]


def _norm(config: LightningDiTConfig) -> LayerNorm | RMSNorm:
    return RMSNorm(config.dim) if config.rmsnorm else LayerNorm(config.dim, affine=False)


class LightningDiTBlock(AdaLNBlock):
    """RMSNorm, SwiGLU, q/k norm and the shifts, each as the configuration has it."""

    def __init__(self, config: LightningDiTConfig) -> None:
        super().__init__()
        hidden = int(config.dim * config.mlp_ratio)
        self.shift = config.shift
        self.norm1 = _norm(config)
        self.attn = Attention(
            config.dim, config.heads, "none" if not config.qk_norm else "rms" if config.rmsnorm else "layer"
        )
        self.norm2 = _norm(config)
        self.mlp = SwiGLU(config.dim, int(2 / 3 * hidden)) if config.swiglu else Mlp(config.dim, hidden, "tanh")
        self.residual = GatedResidual()
        self.adaLN_modulation = Modulation(config.dim, (6 if config.shift else 4) * config.dim)


class RopeBuffers(nn.Module):
    """cos and sin (N, head_dim), each value twice, as the public checkpoints store them. Written for their loaders; our
    own tables are made from the frequencies."""

    def __init__(self, freqs: Tensor, grid: tuple[int, int]) -> None:
        super().__init__()
        pos = grid_positions(grid)
        angle = (pos[:, :1] * freqs[0] + pos[:, 1:] * freqs[1]).repeat_interleave(2, dim=1)
        self.register_buffer("freqs_cos", angle.cos())
        self.register_buffer("freqs_sin", angle.sin())


class LightningDiT(DiffusionTransformer):
    """LightningDiT. `LightningDiT.from_pretrained` reads the public training files (`ema` / `model`)."""

    config_class = LightningDiTConfig
    layout = LIGHTNINGDIT
    config: LightningDiTConfig

    def __init__(self, config: LightningDiTConfig | None = None) -> None:
        config = LightningDiTConfig() if config is None else config
        super().__init__(config)
        self.blocks = nn.ModuleList([LightningDiTBlock(config) for _ in range(config.depth)])
        self.final_layer, self.final_layer_xr = self.final_layers(lambda: _norm(config))
        self.feat_rope = RopeBuffers(self._frequencies(), self.grid) if config.rope else None  # type: ignore[arg-type]
        self.reset_parameters()

    def _frequencies(self, device: torch.device | None = None) -> Tensor:
        return axial_frequencies(self.config.dim // self.config.heads // 4, 10000.0, "y", device)

    def rope(self) -> Tensor | None:
        """The table (2, 1, N, head_dim / 2) of the trained grid, None for 1-D latents."""
        if self.feat_rope is None or self.grid is None:
            return None
        device = self.pos_embed.device
        with torch.no_grad():
            return rope_table(self._frequencies(device), grid_positions(self.grid, device))
