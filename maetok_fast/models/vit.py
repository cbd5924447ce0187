# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""The ViT of MAETok: timm's parameter names (`model.` in the checkpoints), with plain or MoVQ blocks.

    Block      x += ls1 * attn(norm1 x);  x += ls2 * mlp(norm2 x)                     LayerScale, affine norms
    MoVQBlock  x += attn(m(norm1 x));     x += mlp(m(norm2 x))                        norms without affine
               m(y) = y on all tokens but the last T, y * scale + shift on those, shift and scale from the raw latents

`keep` prunes a last block: keys and values come from all tokens, queries, projection and MLP only from the kept ones.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from maetok_fast.layers import Attention, LayerNorm, LayerScale, Mlp, Modulation, PatchEmbed, drop_path, resample_grid
from maetok_fast.models._checks import check_integers, check_ratio

__all__ = ["Block", "MoVQBlock", "MoVQNorm", "ViT", "ViTSize"]


@dataclass(frozen=True)
class ViTSize:
    """Size of one ViT: width, number of blocks, heads and the MLP's width over the model's."""

    dim: int = 768
    depth: int = 12
    heads: int = 12
    mlp_ratio: float = 4.0

    def __post_init__(self) -> None:
        check_integers("ViTSize", dim=self.dim, depth=self.depth, heads=self.heads)
        check_ratio("ViTSize", self.dim, self.mlp_ratio)
        if min(self.dim, self.depth, self.heads) < 1 or self.dim % self.heads or (self.dim // self.heads) % 4:
            raise ValueError(
                f"ViTSize: dim {self.dim}, depth {self.depth}, heads {self.heads}: all must be positive and "
                "dim / heads a multiple of 4 (2-D RoPE gives each axis a quarter of the pairs' channels)"
            )


class Block(nn.Module):
    """Plain ViT block: x += ls1 * attn(norm1 x); x += ls2 * mlp(norm2 x) (DINOv2's layout)."""

    def __init__(self, size: ViTSize, latent_dim: int, rate: float) -> None:
        super().__init__()
        self.rate = rate
        self.norm1 = LayerNorm(size.dim)
        self.attn = Attention(size.dim, size.heads)
        self.ls1 = LayerScale(size.dim)
        self.norm2 = LayerNorm(size.dim)
        self.mlp = Mlp(size.dim, int(size.dim * size.mlp_ratio))
        self.ls2 = LayerScale(size.dim)

    def forward(self, x: Tensor, rope: Tensor | None, prefix: int, latents: Tensor, keep: slice | None) -> Tensor:
        """x (B, N, D); `keep`: the tokens to return (None: all). Keys and values always come from all tokens."""
        first, count = _span(keep)
        y = self.attn(self.norm1(x), rope, prefix=prefix, first_query=first, num_queries=count)
        x, y = self.norm2.after(_take(x, keep), drop_path(y, self.rate, self.training), self.ls1.gamma)
        return self.ls2(x, drop_path(self.mlp(y), self.rate, self.training))


class MoVQBlock(nn.Module):
    """Block of the movqv2 decoder: the raw latents (B, T, H) modulate the last T tokens' norms, others stay plain."""

    def __init__(self, size: ViTSize, latent_dim: int, rate: float) -> None:
        super().__init__()
        self.rate = rate
        self.norm1 = LayerNorm(size.dim, affine=False)
        self.attn = Attention(size.dim, size.heads)
        self.norm2 = LayerNorm(size.dim, affine=False)
        self.mlp = Mlp(size.dim, int(size.dim * size.mlp_ratio))
        self.adaLN_modulation = Modulation(latent_dim, 4 * size.dim)

    def forward(self, x: Tensor, rope: Tensor | None, prefix: int, latents: Tensor, keep: slice | None) -> Tensor:
        shift_msa, scale_msa, shift_mlp, scale_mlp = self.adaLN_modulation(latents).chunk(4, dim=-1)
        first, count = _span(keep)
        y = self.norm1(x, shift_msa, scale_msa, offset=0.0)
        y = self.attn(y, rope, prefix=prefix, first_query=first, num_queries=count)
        tokens = x.shape[1]
        if keep is not None and keep.stop < tokens:  # none of the kept tokens is modulated
            shift_mlp = scale_mlp = None
        branch = drop_path(y, self.rate, self.training)
        x, y = self.norm2.after(_take(x, keep), branch, None, shift_mlp, scale_mlp, offset=0.0)
        return x + drop_path(self.mlp(y), self.rate, self.training)


class MoVQNorm(nn.Module):
    """Final norm of the movqv2 decoder: no affine; the last T tokens are modulated by the raw latents (B, T, H)."""

    def __init__(self, dim: int, latent_dim: int) -> None:
        super().__init__()
        self.norm = LayerNorm(dim, affine=False)
        self.adaLN_modulation = Modulation(latent_dim, 2 * dim)

    def forward(self, x: Tensor, latents: Tensor | None) -> Tensor:
        """`latents` None: x holds no modulated token, the norm is plain."""
        if latents is None:
            return self.norm(x)
        shift, scale = self.adaLN_modulation(latents).chunk(2, dim=-1)
        return self.norm(x, shift, scale, offset=0.0)


def _span(keep: slice | None) -> tuple[int, int | None]:
    return (0, None) if keep is None else (keep.start, keep.stop - keep.start)


def _take(x: Tensor, keep: slice | None) -> Tensor:
    return x if keep is None else x[:, keep]


class ViT(nn.Module):
    """The parameters that timm's ViT holds under `model.`: patch_embed, cls_token, pos_embed, blocks, norm."""

    def __init__(
        self, size: ViTSize, grid: tuple[int, int], patch: int, movq_dim: int, cls_token: bool, rate: float
    ) -> None:
        super().__init__()
        self.grid = grid
        # movq_dim > 0: a movqv2 decoder over latents of that width
        block = MoVQBlock if movq_dim else Block
        self.patch_embed = PatchEmbed(3, size.dim, patch)
        self.cls_token = nn.Parameter(torch.empty(1, 1, size.dim)) if cls_token else None
        self.pos_embed = nn.Parameter(torch.empty(1, 1 + grid[0] * grid[1], size.dim))
        rates = [rate * i / max(size.depth - 1, 1) for i in range(size.depth)]
        self.blocks = nn.ModuleList([block(size, movq_dim, r) for r in rates])
        self.norm = MoVQNorm(size.dim, movq_dim) if movq_dim else LayerNorm(size.dim)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        if self.cls_token is not None:
            nn.init.normal_(self.cls_token, std=1e-6)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
        for module in self.modules():
            if isinstance(module, Modulation):
                module.reset_parameters()

    def positions(self, grid: tuple[int, int]) -> Tensor:
        """The learned positions of `grid` (rows, columns): (N, D), or (1 + N, D) with the cls slot's first."""
        pos: Tensor = self.pos_embed
        if grid != self.grid:
            pos = torch.cat([pos[:, :1], resample_grid(pos[:, 1:], self.grid, grid)], dim=1)
        return pos[0, 0 if self.cls_token is not None else 1 :]
