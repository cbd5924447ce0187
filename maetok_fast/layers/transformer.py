# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""The `torch.nn` modules that every model here is made of: thin state over the ops of `maetok_fast.kernels`.

    tokens (B, N, D)
      │  adaln            LayerNorm, RMSNorm, with or without modulation (per sample, or per token, the last T tokens)
      │  Attention        qkv Linear -> rope_attention (q/k norm, 2-D RoPE, only the queries needed) -> proj Linear
      │  gate_residual    x + gate * branch; LayerScale's gamma (D,) and DiT's gate (B, D) are both gates
      │  residual_adaln   gate_residual and the next norm in one pass: `norm.after(x, branch, gate, ...)`
      │  Mlp | SwiGLU     Linear -> bias_gelu | swiglu -> Linear

Parameter names are those of timm and of the public DiT/SiT code (`qkv`, `proj`, `fc1`, `fc2`, `gamma`, `w12`, ...), so
weights load without renaming. Where tokens lie, and how they turn: positions.py.
"""

from __future__ import annotations

import math
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from maetok_fast.checks import check_positive
from maetok_fast.kernels import (
    adaln,
    bias_gelu,
    gate_residual,
    linear,
    pays,
    residual_adaln,
    rope_attention,
    swiglu,
)
from maetok_fast.kernels._dispatch import autocasts
from maetok_fast.layers.recompute import again

__all__ = [
    "Attention",
    "GatedResidual",
    "LabelEmbedder",
    "LayerNorm",
    "LayerScale",
    "Linear",
    "Mlp",
    "Modulation",
    "PatchEmbed",
    "RMSNorm",
    "Residual",
    "SwiGLU",
    "TimestepEmbedder",
    "drop_path",
    "linear_act",
    "read_dtype",
    "unpatchify",
]


def read_dtype(x: Tensor) -> str:
    """The dtype in which a linear reads what a norm writes, by name: under autocast its dtype (the norm then writes it,
    once), else "", the norm's own."""
    device = x.device.type
    if not autocasts(device):
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
        return adaln(x, shift, scale, self.weight, self.bias, self.eps, offset, read_dtype(x), self.kind)

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
            x, branch, gate, shift, scale, self.weight, self.bias, self.eps, offset, read_dtype(x), self.kind
        )


class LayerNorm(_Norm):
    """LayerNorm, eps 1e-6; `affine=True` adds `weight` and `bias` (D,). See `_Norm` for the modulated forms."""

    def __init__(self, dim: int, eps: float = 1e-6, affine: bool = True) -> None:
        super().__init__()
        check_positive("LayerNorm", dim=dim)
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim)) if affine else None
        self.bias = nn.Parameter(torch.zeros(dim)) if affine else None


class RMSNorm(_Norm):
    """`x * rsqrt(mean(x^2) + eps) * weight`, weight (D,), eps 1e-6 (LLaMA's definition). See `_Norm`."""

    kind = "rms"
    weight: Tensor
    bias = None

    def __init__(self, dim: int, eps: float = 1e-6) -> None:
        super().__init__()
        check_positive("RMSNorm", dim=dim)
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))


def linear_act(x: Tensor, weight: Tensor, bias: Tensor | None, act: str = "none") -> Tensor:
    """act(x weight^T + bias) by the `linear` op where that trains faster (`kernels.pays`), else by torch and an op for
    the GELU. x (..., in), weight (out, in), bias (out,); act: "none", "gelu" (erf), "gelu_tanh" or "silu"."""
    if pays(x, weight, act):
        return linear(x, weight, bias, act)
    y = F.linear(x, weight, bias)
    if act.startswith("gelu"):
        return bias_gelu(y, None, "tanh" if act == "gelu_tanh" else "none")
    return y if act == "none" else F.silu(y)


class Linear(nn.Linear):
    """`nn.Linear` whose training step on a CPU is the `linear` op's where that is faster (`kernels.pays`), with the
    activation behind it in the same product: "none", "gelu" (erf), "gelu_tanh" or "silu"."""

    def forward(self, x: Tensor, act: str = "none") -> Tensor:
        return linear_act(x, self.weight, self.bias, act)


class Attention(nn.Module):
    """Multi-head self-attention over one packed qkv projection.

    `qk_norm`: "none", "layer" (LayerNorm over head_dim, affine, eps 1e-5: timm's and so SiT's) or "rms" (eps 1e-6:
    LightningDiT's). The norms live in `q_norm` and `k_norm`, as in timm.
    """

    def __init__(self, dim: int, num_heads: int, qk_norm: str = "none") -> None:
        super().__init__()
        check_positive("Attention", dim=dim, num_heads=num_heads)
        if dim % num_heads:
            raise ValueError(f"Attention: dim {dim} is not divisible by num_heads {num_heads}; choose a divisor of dim")
        if qk_norm not in ("none", "layer", "rms"):
            raise ValueError(f"Attention: qk_norm {qk_norm!r} is not one of 'none', 'layer', 'rms'")
        self.num_heads = num_heads
        self.head_dim = dim // num_heads
        self.qk_norm = qk_norm
        self.eps = 1e-5 if qk_norm == "layer" else 1e-6
        self.qkv = Linear(dim, 3 * dim)
        self.proj = Linear(dim, dim)
        if qk_norm == "layer":
            self.q_norm: nn.LayerNorm | RMSNorm | None = nn.LayerNorm(self.head_dim, eps=self.eps)
            self.k_norm: nn.LayerNorm | RMSNorm | None = nn.LayerNorm(self.head_dim, eps=self.eps)
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
        repeated: int | None = None,
        index: Tensor | None = None,
    ) -> Tensor:
        """x (B, N, D) -> (B, Nq, D) for the queries first_query .. first_query + num_queries - 1 (all by default).

        rope: `rope_table`'s (2, heads or 1, M, head_dim / 2); the tokens prefix .. prefix + M - 1 are rotated.
        repeated: x holds token `prefix` once that stands for so many equal ones; N, queries and rope count them all.
        index (B, M) int64: the row of rope that turns each of those tokens; None: its own.
        """
        qkv = self.qkv(x)
        if repeated is not None:
            same = qkv[:, prefix : prefix + 1].expand(-1, repeated, -1)
            qkv = torch.cat([qkv[:, :prefix], same, qkv[:, prefix + 1 :]], dim=1)
        qkv = qkv.view(*qkv.shape[:2], 3, self.num_heads, self.head_dim)
        q, k = self.q_norm, self.k_norm
        out = rope_attention(
            qkv,
            rope,
            None if q is None else q.weight,
            None if q is None else q.bias,
            None if k is None else k.weight,
            None if k is None else k.bias,
            prefix=prefix,
            qk_norm=self.qk_norm,
            eps=self.eps,
            first_query=first_query,
            num_queries=num_queries,
            index=index,
        )
        return self.proj(out)


class Mlp(nn.Module):
    """Linear -> GELU -> Linear. `approximate`: "none" (erf, timm's ViT and MAETok) or "tanh" (DiT and SiT).
    `recompute`: the GELU's result is not kept for the backward pass (recompute.py)."""

    recompute = False

    def __init__(self, dim: int, hidden: int, approximate: str = "none") -> None:
        super().__init__()
        check_positive("Mlp", dim=dim, hidden=hidden)
        self.approximate = approximate
        self.fc1: nn.Linear = Linear(dim, hidden)
        self.fc2: nn.Linear = Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        if self.recompute and torch.is_grad_enabled():
            before = self.fc1(x)
            y = bias_gelu(before, None, self.approximate)
            with again(y, bias_gelu, before, None, self.approximate):
                return self.fc2(y)
        if isinstance(self.fc1, Linear):
            return self.fc2(self.fc1(x, "gelu_tanh" if self.approximate == "tanh" else "gelu"))
        # exchanged for a layer of another precision, which only a call of the module reaches. fc1 keeps its bias: the
        # GEMM adds it as fast as the op (SiT-XL on a CPU: within 2 %)
        return self.fc2(bias_gelu(self.fc1(x), None, self.approximate))


class SwiGLU(nn.Module):
    """`w3(silu(a) * b)` with `[a | b] = w12(x)`: one GEMM for both halves (DINOv2's and LightningDiT's layout).
    `recompute`: as `Mlp`'s."""

    recompute = False

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        check_positive("SwiGLU", dim=dim, hidden=hidden)
        self.w12 = Linear(dim, 2 * hidden)
        self.w3 = Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        before = self.w12(x)
        y = swiglu(before)
        with again(y, swiglu, before, wanted=self.recompute):
            return self.w3(y)


class Modulation(nn.Sequential):
    """SiLU -> Linear (dim -> out): the source of adaLN's shifts, scales and gates. Starts at zero (adaLN-zero).
    per_token: whether its input has a row per token (MoVQ's latents) or one per image."""

    def __init__(self, dim: int, out: int, per_token: bool = False) -> None:
        check_positive("Modulation", dim=dim, out=out)
        super().__init__(nn.SiLU(), nn.Linear(dim, out))
        self.per_token = per_token
        self.reset_parameters()

    @property
    def linear(self) -> nn.Linear:
        """The projection alone, for callers that apply SiLU once for many."""
        return cast(nn.Linear, self[1])

    def parts(self, x: Tensor, count: int, wanted: int) -> tuple[Tensor, ...]:
        """The first `wanted` of the `count` equal parts of the result for x (..., dim)."""
        return self(x).chunk(count, dim=-1)[:wanted]

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)


class Residual(nn.Module):
    """How a branch joins the stream: `forward(x, branch) = x + branch`, and `normed(...)` the same together with the
    norm that follows, `norm.after` in one pass -> (h, norm of h). x and branch (B, N, D)."""

    def __init__(self) -> None:
        super().__init__()
        self.gamma: Tensor | None = None

    def forward(self, x: Tensor, branch: Tensor) -> Tensor:
        return x + branch

    def normed(
        self,
        x: Tensor,
        branch: Tensor,
        norm: _Norm,
        shift: Tensor | None = None,
        scale: Tensor | None = None,
        offset: float = 1.0,
    ) -> tuple[Tensor, Tensor]:
        return norm.after(x, branch, self.gamma, shift, scale, offset)


class GatedResidual(nn.Module):
    """How a branch joins the stream in adaLN-zero blocks: `forward(x, branch, gate) = x + gate * branch` with a gate
    (B, D) of each image, one pass of `gate_residual`. x and branch (B, N, D)."""

    def forward(self, x: Tensor, branch: Tensor, gate: Tensor) -> Tensor:
        return gate_residual(x, gate, branch)


class LayerScale(Residual):
    """`forward(x, branch) = x + gamma * branch` with a learned gamma (D,) (CaiT; DINOv2 starts at 1e-5), one pass of
    `gate_residual`."""

    gamma: Tensor

    def __init__(self, dim: int, init: float = 1e-5) -> None:
        super().__init__()
        check_positive("LayerScale", dim=dim)
        self.gamma = nn.Parameter(torch.full((dim,), init))

    def forward(self, x: Tensor, branch: Tensor) -> Tensor:
        return gate_residual(x, self.gamma, branch)


class PatchEmbed(nn.Module):
    """Non-overlapping patches through one strided convolution: (B, C, H, W) -> (B, H/p * W/p, D), row-major tokens."""

    def __init__(self, channels: int, dim: int, patch: int) -> None:
        super().__init__()
        check_positive("PatchEmbed", channels=channels, dim=dim, patch=patch)
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
        check_positive("TimestepEmbedder", dim=dim, features=features)
        if features % 2:
            raise ValueError(f"TimestepEmbedder: features must be even, a cosine and a sine each, got {features}")
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
        first = cast(nn.Linear, self.mlp[0])  # or a packed one, which has no weight
        return self.mlp(table.to(first.weight.dtype if isinstance(first, nn.Linear) else first.dtype))


class LabelEmbedder(nn.Module):
    """Class labels (B,) int64 -> (B, D). With `dropout > 0` the table has one more row, the null class `num_classes`,
    and in training mode each label becomes null with that probability (classifier-free guidance)."""

    def __init__(self, num_classes: int, dim: int, dropout: float) -> None:
        super().__init__()
        check_positive("LabelEmbedder", num_classes=num_classes, dim=dim)
        self.num_classes = num_classes
        self.dropout = dropout
        self.embedding_table = nn.Embedding(num_classes + (dropout > 0), dim)

    def forward(self, y: Tensor) -> Tensor:
        if self.training and self.dropout > 0:
            # not torch.where: it copies its scalar to the device
            y = y.masked_fill(torch.rand(y.shape, device=y.device) < self.dropout, self.num_classes)
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
