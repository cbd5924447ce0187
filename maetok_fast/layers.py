# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""The `torch.nn` modules that every model here is made of: thin state over the ops of `maetok_fast.kernels`.

    tokens (B, N, D)
      │  adaln            LayerNorm, RMSNorm, with or without modulation (per sample, or per token, the last T tokens)
      │  Attention        qkv Linear -> rope_attention (q/k norm, 2-D RoPE, only the queries needed) -> proj Linear
      │  gate_residual    x + gate * branch; LayerScale's gamma (D,) and DiT's gate (B, D) are both gates
      │  residual_adaln   gate_residual and the next norm in one pass: `norm.after(x, branch, gate, ...)`
      │  Mlp | SwiGLU     Linear -> bias_gelu | swiglu -> Linear

Parameter names are those of timm and of the public DiT/SiT code (`qkv`, `proj`, `fc1`, `fc2`, `gamma`, `w12`, ...), so
weights load without renaming. The functions at the end hold the position facts: pixel order, sin/cos tables and RoPE
frequencies, each with its source.
"""

from __future__ import annotations

import math
from typing import cast

import torch
from torch import Tensor, nn

from maetok_fast.kernels import adaln, bias_gelu, gate_residual, residual_adaln, rope_attention, swiglu

__all__ = [
    "Attention",
    "LabelEmbedder",
    "LayerNorm",
    "LayerScale",
    "Mlp",
    "Modulation",
    "PatchEmbed",
    "RMSNorm",
    "SwiGLU",
    "TimestepEmbedder",
    "axial_frequencies",
    "drop_path",
    "grid_positions",
    "mixed_frequencies",
    "resample_grid",
    "sincos_1d",
    "sincos_2d",
    "unpatchify",
]


def _read_dtype(x: Tensor) -> str:
    """The dtype in which a linear reads what a norm writes, by name: under autocast its dtype (the norm then writes it,
    once), else "", the norm's own."""
    device = x.device.type
    if not (torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)):
        return ""
    return str(torch.get_autocast_dtype(device)).removeprefix("torch.")


class _Norm(nn.Module):
    """A norm over the last dimension through the `adaln` op, optionally modulated.

    `forward(x, shift, scale, offset)`: `norm(x) * (offset + scale) + shift`; shift and scale are (B, D) for all tokens
    or (B, T, D) for the last T tokens, offset is 1.0 (DiT) or 0.0 (MoVQ). Without them it is the plain norm.
    `after(x, branch, gate, shift, scale, offset)`: the same of h = x + gate * branch in one pass -> (h, norm of h);
    gate is (D,), (B, D) or None for 1.

    Under autocast the result has the autocast dtype, which is what the linear behind it reads (torch's norms return
    fp32 there, and the linear converts); statistics and modulation are fp32 all the same, and h keeps x's dtype.
    """

    kind = "layer"
    eps: float
    weight: Tensor | None
    bias: Tensor | None

    def forward(
        self, x: Tensor, shift: Tensor | None = None, scale: Tensor | None = None, offset: float = 1.0
    ) -> Tensor:
        return adaln(x, shift, scale, self.weight, self.bias, self.eps, offset, _read_dtype(x), self.kind)

    def after(
        self,
        x: Tensor,
        branch: Tensor,
        gate: Tensor | None = None,
        shift: Tensor | None = None,
        scale: Tensor | None = None,
        offset: float = 1.0,
    ) -> tuple[Tensor, Tensor]:
        return residual_adaln(
            x, branch, gate, shift, scale, self.weight, self.bias, self.eps, offset, _read_dtype(x), self.kind
        )


class LayerNorm(_Norm):
    """LayerNorm, eps 1e-6; `affine=True` adds `weight` and `bias` (D,). See `_Norm` for the modulated forms."""

    def __init__(self, dim: int, eps: float = 1e-6, affine: bool = True) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim)) if affine else None
        self.bias = nn.Parameter(torch.zeros(dim)) if affine else None


class RMSNorm(_Norm):
    """`x * rsqrt(mean(x^2) + eps) * weight`, weight (D,), eps 1e-6 (LLaMA's definition). See `_Norm`."""

    kind = "rms"
    bias = None

    def __init__(self, dim: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))


class Attention(nn.Module):
    """Multi-head self-attention over one packed qkv projection.

    `qk_norm`: "none", "layer" (LayerNorm over head_dim, affine, eps 1e-5: timm's and so SiT's) or "rms" (eps 1e-6:
    LightningDiT's). The norms live in `q_norm` and `k_norm`, as in timm.
    """

    def __init__(self, dim: int, num_heads: int, qk_norm: str = "none") -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"Attention: dim {dim} is not divisible by num_heads {num_heads}; choose a divisor of dim")
        if qk_norm not in ("none", "layer", "rms"):
            raise ValueError(f"Attention: qk_norm {qk_norm!r} is not one of 'none', 'layer', 'rms'")
        self.num_heads = num_heads
        self.head_dim = dim // num_heads
        self.qk_norm = qk_norm
        self.eps = 1e-5 if qk_norm == "layer" else 1e-6
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        if qk_norm == "layer":
            self.q_norm: nn.Module | None = nn.LayerNorm(self.head_dim, eps=self.eps)
            self.k_norm: nn.Module | None = nn.LayerNorm(self.head_dim, eps=self.eps)
        elif qk_norm == "rms":
            self.q_norm = RMSNorm(self.head_dim, self.eps)
            self.k_norm = RMSNorm(self.head_dim, self.eps)
        else:
            self.q_norm = self.k_norm = None

    def forward(
        self,
        x: Tensor,
        rope: Tensor | None = None,
        *,
        prefix: int = 0,
        first_query: int = 0,
        num_queries: int | None = None,
        index: Tensor | None = None,
    ) -> Tensor:
        """x (B, N, D) -> (B, Nq, D) for the queries first_query .. first_query + num_queries - 1 (all by default).

        rope: `rope_table`'s (2, heads or 1, M, head_dim / 2); the tokens prefix .. prefix + M - 1 are rotated.
        index: (B, M) int64, the table's row of each of them where tokens have been dropped; None: row m.
        """
        batch, tokens, _ = x.shape
        qkv = self.qkv(x).view(batch, tokens, 3, self.num_heads, self.head_dim)
        q, k = self.q_norm, self.k_norm
        out = rope_attention(
            qkv,
            rope,
            None if q is None else q.weight,
            getattr(q, "bias", None),
            None if k is None else k.weight,
            getattr(k, "bias", None),
            prefix=prefix,
            qk_norm=self.qk_norm,
            eps=self.eps,
            first_query=first_query,
            num_queries=num_queries,
            index=index,
        )
        return self.proj(out)


class Mlp(nn.Module):
    """Linear -> GELU -> Linear. `approximate`: "none" (erf, timm's ViT and MAETok) or "tanh" (DiT and SiT)."""

    def __init__(self, dim: int, hidden: int, approximate: str = "none") -> None:
        super().__init__()
        self.approximate = approximate
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(bias_gelu(self.fc1(x), None, self.approximate))


class SwiGLU(nn.Module):
    """`w3(silu(a) * b)` with `[a | b] = w12(x)`: one GEMM for both halves (DINOv2's and LightningDiT's layout)."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.w12 = nn.Linear(dim, 2 * hidden)
        self.w3 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.w3(swiglu(self.w12(x)))


class Modulation(nn.Sequential):
    """SiLU -> Linear (dim -> out): the source of adaLN's shifts, scales and gates. Starts at zero (adaLN-zero)."""

    def __init__(self, dim: int, out: int) -> None:
        super().__init__(nn.SiLU(), nn.Linear(dim, out))
        self.reset_parameters()

    @property
    def linear(self) -> nn.Linear:
        """The projection alone, for callers that apply SiLU once for many."""
        return cast(nn.Linear, self[1])

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)


class LayerScale(nn.Module):
    """`forward(x, branch) = x + gamma * branch` with a learned gamma (D,) (CaiT; DINOv2 starts at 1e-5), one pass of
    `gate_residual`; followed by a norm, `norm.after(x, branch, gamma)` is one pass for both."""

    def __init__(self, dim: int, init: float = 1e-5) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((dim,), init))

    def forward(self, x: Tensor, branch: Tensor) -> Tensor:
        return gate_residual(x, self.gamma, branch)


class PatchEmbed(nn.Module):
    """Non-overlapping patches through one strided convolution: (B, C, H, W) -> (B, H/p * W/p, D), row-major tokens."""

    def __init__(self, channels: int, dim: int, patch: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, dim, kernel_size=patch, stride=patch)

    def reset_bias(self) -> None:
        assert self.proj.bias is not None
        nn.init.zeros_(self.proj.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)


class TimestepEmbedder(nn.Module):
    """t (B,) -> (B, D): features [cos(t w_k) | sin(t w_k)], w_k = 1e4^(-k/128), then Linear -> SiLU -> Linear (GLIDE).

    t is used as given (0 to 1, unscaled); the features are computed in fp32 and cast to the weights' dtype.
    """

    def __init__(self, dim: int, features: int = 256) -> None:
        super().__init__()
        self.features = features
        self.mlp = nn.Sequential(nn.Linear(features, dim), nn.SiLU(), nn.Linear(dim, dim))

    def reset_parameters(self) -> None:
        """DiT's start: both weights N(0, .02); the biases are left alone."""
        for layer in (self.mlp[0], self.mlp[2]):
            nn.init.normal_(cast(nn.Linear, layer).weight, std=0.02)

    def forward(self, t: Tensor) -> Tensor:
        half = self.features // 2
        # fp64 only where the whole model is fp64: the public code's angles are fp32
        dtype = torch.promote_types(torch.float32, t.dtype)
        freqs = torch.exp(-math.log(10000.0) * torch.arange(half, dtype=dtype, device=t.device) / half)
        args = t[:, None].to(dtype) * freqs
        table = torch.cat([args.cos(), args.sin()], dim=-1)
        return self.mlp(table.to(cast(nn.Linear, self.mlp[0]).weight.dtype))


class LabelEmbedder(nn.Module):
    """Class labels (B,) int64 -> (B, D). With `dropout > 0` the table has one more row, the null class `num_classes`,
    and in training mode each label becomes null with that probability (classifier-free guidance)."""

    def __init__(self, num_classes: int, dim: int, dropout: float) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.dropout = dropout
        self.embedding_table = nn.Embedding(num_classes + (dropout > 0), dim)

    def forward(self, y: Tensor) -> Tensor:
        if self.training and self.dropout > 0:
            y = torch.where(torch.rand(y.shape, device=y.device) < self.dropout, self.num_classes, y)
        return self.embedding_table(y)


def drop_path(branch: Tensor, rate: float, training: bool) -> Tensor:
    """Stochastic depth: in training the branch (B, N, D) of each sample is zeroed with probability `rate`, the others
    are divided by 1 - rate, so that the expectation stays (Huang et al. 2016)."""
    if not training or rate == 0.0:
        return branch
    keep = torch.rand(branch.shape[0], 1, 1, device=branch.device) >= rate
    return branch * (keep / (1.0 - rate)).to(branch.dtype)


def unpatchify(x: Tensor, grid: tuple[int, int], patch: int) -> Tensor:
    """Tokens (B, h*w, p*p*C), each laid out (row, column, channel) -> (B, C, h*p, w*p): MAE's and DiT's order."""
    h, w = grid
    x = x.view(x.shape[0], h, w, patch, patch, -1)
    return x.permute(0, 5, 1, 3, 2, 4).reshape(x.shape[0], -1, h * patch, w * patch)


def grid_positions(
    grid: tuple[int, int], device: torch.device | str | None = None, trained: tuple[int, int] | None = None
) -> Tensor:
    """Row-major token positions of a grid (h, w): (h*w, 2) fp32 with columns x = n mod w and y = n // w.

    The unit is one token, at any size (MAETok: a 512 px model counts to 31). `trained`, the grid (h, w) that a model
    has learned, rescales instead: y * h_trained / h, x * w_trained / w, so that no position exceeds what was seen
    (position interpolation, Chen et al. 2023, arXiv 2306.15595).
    """
    h, w = grid
    n = torch.arange(h * w, device=device)
    pos = torch.stack([n % w, n.div(w, rounding_mode="floor")], dim=1).to(torch.float32)
    if trained is not None:
        pos = pos * torch.tensor([trained[1] / w, trained[0] / h], device=device)
    return pos


def mixed_frequencies(depth: int, num_heads: int, head_dim: int, theta: float = 10.0) -> Tensor:
    """Initial learnable RoPE frequencies (2, depth, num_heads * head_dim / 2), axis 0 = x, y (RoPE for ViT, mixed).

    Magnitudes theta^(-4k / head_dim), k = 0 .. head_dim/4 - 1; each layer and head turns them by one random angle a
    (drawn from torch's default generator) for its first half of pairs and by a + pi/2 for the second half.
    """
    magnitude = theta ** -(torch.arange(0, head_dim, 4).float() / head_dim)
    angle = torch.rand(depth, num_heads, 1) * 2 * math.pi
    turned = torch.cat([angle.expand(-1, -1, head_dim // 4), angle.expand(-1, -1, head_dim // 4) + math.pi / 2], dim=-1)
    magnitude = magnitude.repeat(2)
    return torch.stack([magnitude * turned.cos(), magnitude * turned.sin()]).flatten(2)


def axial_frequencies(half_dims: int, theta: float, first_axis: str) -> Tensor:
    """Fixed axial RoPE frequencies (2, 1, 2 * half_dims) for `rope_table`, shared by all heads and layers.

    `half_dims` pairs turn with one axis, the next `half_dims` with the other, at theta^(-k / half_dims).
    `first_axis` "x": columns first (MAETok); "y": rows first (LightningDiT).
    """
    f = theta ** -(torch.arange(half_dims).float() / half_dims)
    zero = torch.zeros_like(f)
    x, y = ((f, zero), (zero, f)) if first_axis == "x" else ((zero, f), (f, zero))
    return torch.stack([torch.cat(x), torch.cat(y)]).unsqueeze(1)


def sincos_1d(dim: int, length: int) -> Tensor:
    """Fixed 1-D positions (length, dim) fp32: sin on even, cos on odd channels, w_k = 1e4^(-2k/dim) (Vaswani)."""
    if dim % 2:
        raise ValueError(f"sincos_1d: dim must be even, got {dim}")
    pos = torch.arange(length, dtype=torch.float32)[:, None]
    args = pos * torch.exp(torch.arange(0, dim, 2, dtype=torch.float32) * -(math.log(10000.0) / dim))
    return torch.stack([args.sin(), args.cos()], dim=-1).flatten(1)


def sincos_2d(dim: int, grid: tuple[int, int]) -> Tensor:
    """Fixed 2-D positions (h*w, dim) fp32: [sin x | cos x | sin y | cos y], dim/4 each, w_k = 1e4^(-4k/dim).

    The first half of the channels holds the *column*: MAE's table, whose mesh puts the width first.
    """
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
    w = torch.where(x < 1, near, torch.where(x < 2, far, 0.0))
    return w / w.sum(dim=1, keepdim=True)
