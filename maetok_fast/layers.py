# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""The `torch.nn` modules that every model here is made of: thin state over the ops of `maetok_fast.kernels`.

    tokens (B, N, D)
      │  adaln            LayerNorm, RMSNorm, with or without modulation (per sample, or per token, the last T tokens)
      │  Attention        qkv Linear -> rope_attention (q/k norm, 2-D RoPE, only the queries needed) -> proj Linear
      │  gate_residual    x + gate * branch; LayerScale's gamma (D,) and DiT's gate (B, D) are both gates
      │  residual_adaln   gate_residual and the next norm in one pass: `norm.after(x, branch, gate, ...)`
      │  Mlp | SwiGLU     Linear -> bias_gelu | swiglu -> Linear

Parameter names are those of timm and of the public DiT/SiT code (`qkv`, `proj`, `fc1`, `fc2`, `gamma`, `w12`, ...), so
weights load without renaming. Where tokens stand is told by `maetok_fast.positions`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from maetok_fast.checks import check_integers, check_number
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
    "Residual",
    "SwiGLU",
    "TimestepEmbedder",
    "unpatchify",
]


def _positive(owner: str, **sizes: int) -> None:
    """TypeError or ValueError unless each is an integer of at least 1."""
    check_integers(owner, **sizes)
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{owner}: {name} must be positive, got {size}")


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
        _positive("Attention", dim=dim, num_heads=num_heads)
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
        self.q_norm: nn.LayerNorm | RMSNorm | None
        self.k_norm: nn.LayerNorm | RMSNorm | None
        if qk_norm == "layer":
            self.q_norm = nn.LayerNorm(self.head_dim, eps=self.eps)
            self.k_norm = nn.LayerNorm(self.head_dim, eps=self.eps)
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
        equal: int | None = None,
    ) -> Tensor:
        """x (B, N, D) -> (B, Nq, D) for the queries first_query .. first_query + num_queries - 1 (all by default).

        rope: `rope_table`'s (2, heads or 1, M, head_dim / 2); the tokens prefix .. prefix + M - 1 are rotated.
        equal: how many equal tokens the one at `prefix` stands for; they are projected once and rotated apart.
        """
        return self.proj(
            self.mix(x, rope, prefix=prefix, first_query=first_query, num_queries=num_queries, equal=equal)
        )

    def mix(
        self,
        x: Tensor,
        rope: Tensor | None = None,
        *,
        prefix: int = 0,
        first_query: int = 0,
        num_queries: int | None = None,
        equal: int | None = None,
    ) -> Tensor:
        """`forward` without the projection behind the heads: what `Residual` adds through `self.proj`."""
        qkv = self.qkv(x)
        if equal is not None:
            same = qkv[:, prefix : prefix + 1].expand(-1, equal, -1)
            qkv = torch.cat([qkv[:, :prefix], same, qkv[:, prefix + 1 :]], dim=1)
        qkv = qkv.view(*qkv.shape[:2], 3, self.num_heads, self.head_dim)
        q, k = self.q_norm, self.k_norm
        return rope_attention(
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
        )


class Mlp(nn.Module):
    """Linear -> GELU -> Linear. `approximate`: "none" (erf, timm's ViT and MAETok) or "tanh" (DiT and SiT)."""

    def __init__(self, dim: int, hidden: int, approximate: str = "none") -> None:
        super().__init__()
        _positive("Mlp", dim=dim, hidden=hidden)
        if approximate not in ("none", "tanh"):
            raise ValueError(f"Mlp: approximate must be 'none' (erf) or 'tanh', got {approximate!r}")
        self.approximate = approximate
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def hidden(self, x: Tensor) -> Tensor:
        """GELU(fc1(x)): `forward` without fc2, which `Residual` takes."""
        return bias_gelu(self.fc1(x), None, self.approximate)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.hidden(x))


class SwiGLU(nn.Module):
    """`w3(silu(a) * b)` with `[a | b] = w12(x)`: one GEMM for both halves (DINOv2's and LightningDiT's layout)."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        _positive("SwiGLU", dim=dim, hidden=hidden)
        self.w12 = nn.Linear(dim, 2 * hidden)
        self.w3 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.w3(swiglu(self.w12(x)))


class Modulation(nn.Sequential):
    """SiLU -> Linear (dim -> out): the source of adaLN's shifts, scales and gates. Starts at zero (adaLN-zero).
    per_token: whether its input has a row per token (MoVQ's latents) or one per image."""

    def __init__(self, dim: int, out: int, per_token: bool = False) -> None:
        super().__init__(nn.SiLU(), nn.Linear(dim, out))
        self.per_token = per_token
        self.reset_parameters()

    @property
    def linear(self) -> nn.Linear:
        """The projection alone, for callers that apply SiLU once for many."""
        return cast(nn.Linear, self[1])

    def split(self, c: Tensor, parts: int, used: int) -> Sequence[Tensor]:
        """The first `used` of `parts` equal parts of the modulation of c (..., dim), each (..., out / parts)."""
        return self(c).chunk(parts, dim=-1)[:used]

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)


class Residual(nn.Module):
    """The end of a residual branch: `forward(x, layer, y) = x + layer(y)`, `layer` being the branch's last linear.

    The layer is an argument so that whoever prepares a model can add x in its GEMM. rate: of stochastic depth: in
    training the branch of each sample is zeroed with this probability and the others are divided by 1 - rate, so that
    the expectation stays (Huang et al. 2016).
    """

    gamma: nn.Parameter | None

    def __init__(self, rate: float = 0.0) -> None:
        super().__init__()
        check_number(type(self).__name__, "rate", rate, 0.0, 1.0)
        self.rate = rate
        self.register_parameter("gamma", None)

    def branch(self, layer: nn.Module, y: Tensor) -> Tensor:
        """layer(y) (B, N, D), thinned by stochastic depth."""
        out = layer(y)
        if not self.training or self.rate == 0.0:
            return out
        keep = torch.rand(out.shape[0], 1, 1, device=out.device) >= self.rate
        return out * (keep / (1.0 - self.rate)).to(out.dtype)

    def forward(self, x: Tensor, layer: nn.Module, y: Tensor) -> Tensor:
        """x (B, N, D) + gamma * branch."""
        branch = self.branch(layer, y)
        return x + branch if self.gamma is None else gate_residual(x, self.gamma, branch)

    def then_norm(
        self,
        x: Tensor,
        layer: nn.Module,
        y: Tensor,
        norm: LayerNorm | RMSNorm,
        shift: Tensor | None = None,
        scale: Tensor | None = None,
        offset: float = 1.0,
    ) -> tuple[Tensor, Tensor]:
        """(the sum, `norm` of it), in one pass; shift, scale and offset as the norm takes them."""
        return norm.after(x, self.branch(layer, y), self.gamma, shift, scale, offset)


class LayerScale(Residual):
    """A `Residual` with a learned gamma (D,): x + gamma * layer(y) (CaiT; DINOv2 starts at 1e-5)."""

    def __init__(self, dim: int, rate: float = 0.0, init: float = 1e-5) -> None:
        super().__init__(rate)
        self.gamma = nn.Parameter(torch.full((dim,), init))


class PatchEmbed(nn.Module):
    """Non-overlapping patches through one strided convolution: (B, C, H, W) -> (B, H/p * W/p, D), row-major tokens."""

    def __init__(self, channels: int, dim: int, patch: int) -> None:
        super().__init__()
        _positive("PatchEmbed", channels=channels, dim=dim, patch=patch)
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
        _positive("TimestepEmbedder", dim=dim, features=features)
        if features % 2:
            raise ValueError(f"TimestepEmbedder: features are cosines and sines, so even in number, got {features}")
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
        _positive("LabelEmbedder", num_classes=num_classes, dim=dim)
        check_number("LabelEmbedder", "dropout", dropout, 0.0, math.nextafter(1.0, 2.0))
        self.num_classes = num_classes
        self.dropout = dropout
        self.embedding_table = nn.Embedding(num_classes + (dropout > 0), dim)

    def forward(self, y: Tensor) -> Tensor:
        if self.training and self.dropout > 0:
            y = torch.where(torch.rand(y.shape, device=y.device) < self.dropout, self.num_classes, y)
        return self.embedding_table(y)


def unpatchify(x: Tensor, grid: tuple[int, int], patch: int) -> Tensor:
    """Tokens (B, h*w, p*p*C), each laid out (row, column, channel) -> (B, C, h*p, w*p): MAE's and DiT's order."""
    h, w = grid
    x = x.view(x.shape[0], h, w, patch, patch, -1)
    return x.permute(0, 5, 1, 3, 2, 4).reshape(x.shape[0], -1, h * patch, w * patch)
