# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""Where tokens lie and how position enters them: pixel order, sin/cos tables, RoPE frequencies, resampled tables.

Each fact once, with its source. Everything is plain torch; what a forward calls is computed on the device it names.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from maetok_fast.checks import check_positive

__all__ = [
    "axial_frequencies",
    "grid_positions",
    "mixed_frequencies",
    "resample_grid",
    "sincos_1d",
    "sincos_2d",
]


def grid_positions(grid: tuple[int, int], device: torch.device | str | None = None) -> Tensor:
    """Row-major token positions of a grid (h, w): (h*w, 2) fp32 with columns x = n mod w and y = n // w.

    The unit is one token, at any size (MAETok: a 512 px model counts to 31).
    """
    h, w = grid
    n = torch.arange(h * w, device=device)
    return torch.stack([n % w, n.div(w, rounding_mode="floor")], dim=1).to(torch.float32)


def mixed_frequencies(depth: int, num_heads: int, head_dim: int, theta: float = 10.0) -> Tensor:
    """Initial learnable RoPE frequencies (2, depth, num_heads * head_dim / 2), axis 0 = x, y (RoPE for ViT, mixed).

    Magnitudes theta^(-4k / head_dim), k = 0 .. head_dim/4 - 1; each layer and head turns them by one random angle a
    (drawn from torch's default generator) for its first half of pairs and by a + pi/2 for the second half.
    """
    check_positive("mixed_frequencies", depth=depth, num_heads=num_heads, head_dim=head_dim)
    if head_dim % 4:
        raise ValueError(f"mixed_frequencies: head_dim must be divisible by 4, got {head_dim}")
    magnitude = theta ** -(torch.arange(0, head_dim, 4).float() / head_dim)
    angle = torch.rand(depth, num_heads, 1) * 2 * math.pi
    turned = torch.cat([angle.expand(-1, -1, head_dim // 4), angle.expand(-1, -1, head_dim // 4) + math.pi / 2], dim=-1)
    magnitude = magnitude.repeat(2)
    return torch.stack([magnitude * turned.cos(), magnitude * turned.sin()]).flatten(2)


def axial_frequencies(
    half_dims: int, theta: float, first_axis: str, device: torch.device | str | None = None
) -> Tensor:
    """Fixed axial RoPE frequencies (2, 1, 2 * half_dims) for `rope_table`, shared by all heads and layers.

    `half_dims` pairs turn with one axis, the next `half_dims` with the other, at theta^(-k / half_dims).
    `first_axis` "x": columns first (MAETok); "y": rows first (LightningDiT). Made on `device` by arithmetic alone, so
    that a forward which asks for them copies nothing from the host.
    """
    check_positive("axial_frequencies", half_dims=half_dims)
    f = theta ** -(torch.arange(half_dims, device=device).float() / half_dims)
    zero = torch.zeros_like(f)
    x, y = ((f, zero), (zero, f)) if first_axis == "x" else ((zero, f), (f, zero))
    return torch.stack([torch.cat(x), torch.cat(y)]).unsqueeze(1)


def sincos_1d(dim: int, length: int) -> Tensor:
    """Fixed 1-D positions (length, dim) fp32: sin on even, cos on odd channels, w_k = 1e4^(-2k/dim) (Vaswani)."""
    check_positive("sincos_1d", dim=dim, length=length)
    if dim % 2:
        raise ValueError(f"sincos_1d: dim must be even, got {dim}")
    pos = torch.arange(length, dtype=torch.float32)[:, None]
    args = pos * torch.exp(torch.arange(0, dim, 2, dtype=torch.float32) * -(math.log(10000.0) / dim))
    return torch.stack([args.sin(), args.cos()], dim=-1).flatten(1)


def sincos_2d(dim: int, grid: tuple[int, int]) -> Tensor:
    """Fixed 2-D positions (h*w, dim) fp32: [sin x | cos x | sin y | cos y], dim/4 each, w_k = 1e4^(-4k/dim).

    The first half of the channels holds the *column*: MAE's table, whose mesh puts the width first.
    """
    check_positive("sincos_2d", dim=dim, rows=grid[0], columns=grid[1])
    if dim % 4:
        raise ValueError(f"sincos_2d: dim must be divisible by 4, got {dim}")
    omega = 10000.0 ** -(torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    x, y = grid_positions(grid).double().unsqueeze(-1).unbind(1)
    return torch.cat([(x * omega).sin(), (x * omega).cos(), (y * omega).sin(), (y * omega).cos()], dim=1).float()


def resample_grid(embed: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """Learned positions (1, h*w, D) of the grid `old` -> `new`: bicubic, antialiased, as timm does.

    F.interpolate(mode="bicubic", antialias=True), whose backward torch cannot compile for changing sizes, as the two
    matrix products that it is. In fp64: these are small, and autocast leaves fp64 alone.
    """
    if old == new:
        return embed
    rows, columns = (_bicubic(n, m, embed.device) for n, m in zip(old, new))
    image = torch.einsum("ih,hwd,jw->ijd", rows, embed.double().view(*old, -1), columns)
    return image.flatten(0, 1).unsqueeze(0).to(embed.dtype)


def _bicubic(old: int, new: int, device: torch.device) -> Tensor:
    """Weights (new, old) fp64 of antialiased bicubic resampling: Keys' kernel with a = -1/2 at half-pixel centres,
    stretched by old / new where that shrinks; weights that fall off the edge are shared among the others."""
    scale = old / new
    targets, sources = (torch.arange(n, dtype=torch.float64, device=device) + 0.5 for n in (new, old))
    x = (sources - targets[:, None] * scale).abs() / max(scale, 1.0)
    near = (1.5 * x - 2.5) * x * x + 1
    far = ((-0.5 * x + 2.5) * x - 4) * x + 2
    w = torch.where(x < 1, near, far.masked_fill(x >= 2, 0.0))
    return w / w.sum(dim=1, keepdim=True)
