# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""The ViT of MAETok: timm's parameter names (`model.` in the checkpoints), with plain or MoVQ blocks.

    Block      x += ls1 * attn(norm1 x);  x += ls2 * mlp(norm2 x)                     LayerScale, affine norms
    MoVQBlock  x += attn(m(norm1 x));     x += mlp(m(norm2 x))                        norms without affine
               m(y) = y on all tokens but the last T, y * scale + shift on those, shift and scale from the raw latents

`first` and `count` prune a last block: keys and values come from all tokens, queries, projection and MLP only from the
kept ones.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from maetok_fast.layers import (
    Attention,
    LayerNorm,
    LayerScale,
    Mlp,
    Modulation,
    PatchEmbed,
    Residual,
    again,
    drop_path,
)
from maetok_fast.models.configs import ViTSize
from maetok_fast.positions import resample_grid

__all__ = ["Block", "MoVQBlock", "MoVQNorm", "ViT"]


class Block(nn.Module):
    """Plain ViT block: x += ls1 * attn(norm1 x); x += ls2 * mlp(norm2 x) (DINOv2's layout). `recompute`: what its norms
    make is not kept for the backward pass."""

    recompute = False

    def __init__(self, size: ViTSize, latent_dim: int, rate: float, affine: bool = True) -> None:
        super().__init__()
        self.rate = rate
        self.norm1 = LayerNorm(size.dim, affine=affine)
        self.attn = Attention(size.dim, size.heads)
        self.ls1: Residual = LayerScale(size.dim)
        self.norm2 = LayerNorm(size.dim, affine=affine)
        self.mlp = Mlp(size.dim, int(size.dim * size.mlp_ratio))
        self.ls2: Residual = LayerScale(size.dim)

    def modulation(self, latents: Tensor, both: bool) -> list[Tensor | None]:
        """[shift, scale] of the first norm and of the second; None where a norm is plain (`both`: not the second)."""
        return [None] * 4

    def forward(
        self,
        x: Tensor,
        rope: Tensor | None,
        prefix: int,
        latents: Tensor,
        first: int = 0,
        count: int | None = None,
        repeated: int | None = None,
        index: Tensor | None = None,
    ) -> Tensor:
        """x (B, N, D) -> its tokens first .. first + count - 1 (None: all). Keys and values always come from all.

        repeated: the tokens prefix .. prefix + repeated - 1 are equal, and so normalised and projected once.
        index (B, K) int64: the places of `rope` that the K tokens behind the prefix hold; None: all, in order.
        """
        pruned = count is not None and first + count < x.shape[1]
        shift1, scale1, shift2, scale2 = self.modulation(latents, not pruned)
        rows = x if repeated is None else torch.cat([x[:, : prefix + 1], x[:, prefix + repeated :]], dim=1)
        # offset 0: MoVQ's norm(x) * scale + shift, not 1 + scale; a plain norm has neither
        y = self.norm1(rows, shift1, scale1, offset=0.0)
        with again(y, self.norm1, rows, shift1, scale1, 0.0, wanted=self.recompute):
            branch = self.attn(
                y, rope, prefix=prefix, first_query=first, num_queries=count, repeated=repeated, index=index
            )
        kept = x if count is None else x.narrow(1, first, count)
        branch = drop_path(branch, self.rate, self.training)
        joined = kept, branch, self.norm2, shift2, scale2, 0.0
        x, y = self.ls1.normed(*joined)
        # of the sum before, not after it: then that is not kept either
        with again(y, lambda *given: self.ls1.normed(*given)[1], *joined, wanted=self.recompute):
            branch = self.mlp(y)
        return self.ls2(x, drop_path(branch, self.rate, self.training))


class MoVQBlock(Block):
    """Block of the movqv2 decoder: the raw latents (B, T, H) modulate the last T tokens' norms, others stay plain."""

    def __init__(self, size: ViTSize, latent_dim: int, rate: float) -> None:
        super().__init__(size, latent_dim, rate, affine=False)
        self.ls1, self.ls2 = Residual(), Residual()
        self.adaLN_modulation = Modulation(latent_dim, 4 * size.dim, per_token=True)

    def modulation(self, latents: Tensor, both: bool) -> list[Tensor | None]:
        # pruned to the image tokens, a last block has no modulated token at its second norm
        parts = self.adaLN_modulation.parts(latents, 4, 4 if both else 2)
        return [*parts, *[None] * (4 - len(parts))]


class MoVQNorm(nn.Module):
    """Final norm of the movqv2 decoder: no affine; the last T tokens are modulated by the raw latents (B, T, H)."""

    def __init__(self, dim: int, latent_dim: int) -> None:
        super().__init__()
        self.norm = LayerNorm(dim, affine=False)
        self.adaLN_modulation = Modulation(latent_dim, 2 * dim, per_token=True)

    def forward(self, x: Tensor, latents: Tensor | None) -> Tensor:
        """`latents` None: x holds no modulated token, the norm is plain."""
        if latents is None:
            return self.norm(x)
        shift, scale = self.adaLN_modulation.parts(latents, 2, 2)
        return self.norm(x, shift, scale, offset=0.0)


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
