# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""SiT in plain PyTorch, on token latents (B, L, C) and on grids (B, C, H, W), and its public guided sampling step.

x -> embed + positions -> depth x [ x += gate f(LayerNorm(x) (1 + scale) + shift), f = attention, MLP ] -> linear
c = timestep MLP + label table; every block projects SiLU(c) to its six modulation vectors at every step
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.baselines import attend

SIZES = {"xl": (28, 1152, 16), "l": (24, 1024, 16), "b": (12, 768, 12), "s": (12, 384, 6)}


def sincos(dim: int, positions: Tensor) -> Tensor:
    """(n,) positions -> (n, dim): [sin | cos] halves, the 2-D models' layout per axis."""
    omega = 10000.0 ** (-torch.arange(dim // 2, dtype=torch.float64) / (dim / 2))
    angles = positions.double()[:, None] * omega
    return torch.cat([angles.sin(), angles.cos()], dim=1)


class Attention(nn.Module):
    def __init__(self, dim: int, heads: int, attention: str) -> None:
        super().__init__()
        self.heads, self.attention = heads, attention
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        return self.proj(attend(q, k, v, self.attention))


class Mlp(nn.Module):
    def __init__(self, dim: int, approximate: str = "tanh") -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, 4 * dim)
        self.fc2 = nn.Linear(4 * dim, dim)
        self.approximate = approximate

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate=self.approximate))


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return x * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


class Block(nn.Module):
    def __init__(self, dim: int, heads: int, attention: str) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)
        self.attn = Attention(dim, heads, attention)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)
        self.mlp = Mlp(dim)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c).chunk(6, dim=-1)
        x = x + gate1.unsqueeze(1) * self.attn(modulate(self.norm1(x), shift1, scale1))
        return x + gate2.unsqueeze(1) * self.mlp(modulate(self.norm2(x), shift2, scale2))


class TimestepEmbedder(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(256, dim), nn.SiLU(), nn.Linear(dim, dim))

    def forward(self, t: Tensor) -> Tensor:
        freqs = torch.exp(-math.log(10000) * torch.arange(128, dtype=torch.float32, device=t.device) / 128)
        angles = t[:, None].float() * freqs
        return self.mlp(torch.cat([angles.cos(), angles.sin()], dim=-1).to(self.mlp[0].weight.dtype))


class LabelEmbedder(nn.Module):
    def __init__(self, dim: int, classes: int) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(classes + 1, dim)

    def forward(self, y: Tensor) -> Tensor:
        return self.embedding_table(y)


class PatchEmbed(nn.Module):
    def __init__(self, channels: int, dim: int, patch: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, dim, patch, patch)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)


class FinalLayer(nn.Module):
    def __init__(self, dim: int, out: int) -> None:
        super().__init__()
        self.norm_final = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)
        self.linear = nn.Linear(dim, out)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 2 * dim))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=-1)
        return self.linear(modulate(self.norm_final(x), shift, scale))


class SiT(nn.Module):
    """shape: (L, C) for token latents, (C, H, W) for grids cut into `patch` x `patch` pieces."""

    def __init__(
        self,
        shape: tuple[int, ...],
        depth: int = 28,
        dim: int = 1152,
        heads: int = 16,
        *,
        patch: int = 2,
        classes: int = 1000,
        attention: str = "naive",
    ) -> None:
        super().__init__()
        self.shape, self.patch = tuple(shape), patch
        if len(shape) == 2:
            tokens, out = shape
            self.x_embedder: nn.Module = nn.Linear(out, dim)
            omega = 10000.0 ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
            angles = torch.arange(tokens).double()[:, None] * omega
            positions = torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1)  # sin on even channels
        else:
            channels, height, width = shape
            rows, columns = height // patch, width // patch
            tokens, out = rows * columns, patch * patch * channels
            self.x_embedder = PatchEmbed(channels, dim, patch)
            index = torch.arange(tokens)
            positions = torch.cat([sincos(dim // 2, index % columns), sincos(dim // 2, index // columns)], dim=1)
        self.tokens = tokens
        self.pos_embed = nn.Parameter(positions.float()[None], requires_grad=False)
        self.t_embedder = TimestepEmbedder(dim)
        self.y_embedder = LabelEmbedder(dim, classes)
        self.blocks = nn.ModuleList(Block(dim, heads, attention) for _ in range(depth))
        self.final_layer = FinalLayer(dim, out)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        x = self.x_embedder(x) + self.pos_embed
        c = self.t_embedder(t) + self.y_embedder(y)
        for block in self.blocks:
            x = block(x, c)
        x = self.final_layer(x, c)
        if len(self.shape) == 2:
            return x
        channels, height, width = self.shape
        p = self.patch
        x = x.reshape(len(x), height // p, width // p, p, p, channels)
        return x.permute(0, 5, 1, 3, 2, 4).reshape(len(x), channels, height, width)

    def set_attention(self, attention: str) -> None:
        """ "naive" or "sdpa" from now on."""
        for block in self.blocks:
            block.attn.attention = attention


def guided_step(
    model: nn.Module, x: Tensor, t: float, dt: float, y: Tensor, scale: float, guided: bool = True
) -> Tensor:
    """One public Euler step with classifier-free guidance: the state in fp64 and both branches forwarded at every
    step. Outside a guidance interval (guided=False) the unconditional half is computed and dropped, as in code that
    applies the interval to the model's output."""
    rows = torch.cat([x, x]).to(next(model.parameters()).dtype)
    labels = torch.cat([y, torch.full_like(y, 1000)])
    conditional, null = model(rows, torch.full((len(rows),), t, device=x.device), labels).double().chunk(2)
    return x + dt * (null + scale * (conditional - null) if guided else conditional)
