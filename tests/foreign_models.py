# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""Small models of others' kinds, for `maetok_fast.accelerate`: written here, with their names and forwards.

timm's ViT (plain, LayerScale, q/k norm), EVA and DINOv3 (RoPE as a tensor), DiT, LightningDiT (RoPE as a module), TiTok
(nn.MultiheadAttention, sequence first), MAETok's own code (complex RoPE, latents as the condition).
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Attention(nn.Module):
    def __init__(self, dim: int, heads: int, qk_norm: Any = None, attn_drop: float = 0.0) -> None:
        super().__init__()
        self.num_heads, self.head_dim, self.scale = heads, dim // heads, (dim // heads) ** -0.5
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.q_norm, self.k_norm = (
            (nn.Identity(), nn.Identity()) if qk_norm is None else (qk_norm(self.head_dim), qk_norm(self.head_dim))
        )
        self.attn_drop, self.proj_drop = nn.Dropout(attn_drop), nn.Dropout(0.0)

    def split(self, x: Tensor) -> tuple[Tensor, ...]:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, self.head_dim)).permute(2, 0, 3, 1, 4).unbind(0)
        return self.q_norm(q), self.k_norm(k), v

    def merged(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        p = self.attn_drop.p if self.training else 0.0
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=p)
        return self.proj_drop(self.proj(out.transpose(1, 2).flatten(2)))

    def forward(self, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        return self.merged(*self.split(x), attn_mask)


class Mlp(nn.Module):
    def __init__(self, dim: int, hidden: int, act: Any = nn.GELU, drop: float = 0.0) -> None:
        super().__init__()
        self.fc1, self.act, self.drop1 = nn.Linear(dim, hidden), act(), nn.Dropout(drop)
        self.norm, self.fc2, self.drop2 = nn.Identity(), nn.Linear(hidden, dim), nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop2(self.fc2(self.norm(self.drop1(self.act(self.fc1(x))))))


class LayerScale(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((dim,), 0.7))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class DropPath(nn.Module):
    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        keep = torch.rand(x.shape[0], 1, 1) >= self.rate
        return x * keep / (1 - self.rate)


class Block(nn.Module):
    """timm's."""

    def __init__(self, dim: int, heads: int, scale: bool = False, rate: float = 0.0, **attn: Any) -> None:
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(dim, eps=1e-6), Attention(dim, heads, **attn)
        self.ls1 = LayerScale(dim) if scale else nn.Identity()
        self.drop_path1 = DropPath(rate) if rate else nn.Identity()
        self.norm2, self.mlp = nn.LayerNorm(dim, eps=1e-6), Mlp(dim, 4 * dim)
        self.ls2 = LayerScale(dim) if scale else nn.Identity()
        self.drop_path2 = DropPath(rate) if rate else nn.Identity()

    def forward(self, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        x = x + self.drop_path1(self.ls1(self.attn(self.norm1(x), attn_mask=attn_mask)))
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))


class PostNormBlock(Block):
    """The same children, another forward."""

    def forward(self, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        x = x + self.norm1(self.attn(x))
        return x + self.norm2(self.mlp(x))


class Stack(nn.Module):
    """Patches, blocks, norm, head."""

    def __init__(self, block: Any, dim: int = 64, heads: int = 4, depth: int = 2, **options: Any) -> None:
        super().__init__()
        self.patch_embed = nn.Conv2d(3, dim, 8, stride=8)
        self.blocks = nn.ModuleList([block(dim, heads, **options) for _ in range(depth)])
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, 10)

    def inputs(self) -> tuple[Tensor, ...]:
        return (torch.randn(2, 3, 32, 24),)

    def positions(self, n: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """What each block gets beside its tokens."""
        return (), {}

    def forward(self, images: Tensor, *condition: Tensor) -> Tensor:
        x = self.patch_embed(images).flatten(2).transpose(1, 2)
        args, kwargs = self.positions(x.shape[1])
        for block in self.blocks:
            x = block(x, *condition, *args, **kwargs)
        return self.head(self.norm(x))


# ---- EVA, DINOv3 ---------------------------------------------------------------------------------------------------


def rotate(x: Tensor, rope: Tensor, half: bool) -> Tensor:
    sin, cos = rope.chunk(2, -1)
    if half:
        a, b = x.chunk(2, -1)
        return x * cos + torch.cat([-b, a], -1) * sin
    a, b = x[..., ::2], x[..., 1::2]
    return x * cos + torch.stack([-b, a], -1).flatten(-2) * sin


class EvaAttention(nn.Module):
    def __init__(self, dim: int, heads: int, split: bool = False, half: bool = False) -> None:
        super().__init__()
        self.num_heads, self.num_prefix_tokens, self.rotate_half = heads, 1, half
        if split:
            self.qkv = self.q_bias = None
            self.q_proj, self.v_proj = nn.Linear(dim, dim), nn.Linear(dim, dim)
            self.k_proj = nn.Linear(dim, dim, bias=False)
        else:
            self.qkv = nn.Linear(dim, 3 * dim, bias=False)
            self.q_bias, self.v_bias = nn.Parameter(torch.randn(dim)), nn.Parameter(torch.randn(dim))
            self.register_buffer("k_bias", torch.zeros(dim), persistent=False)
        self.norm = nn.LayerNorm(dim) if split else nn.Identity()
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, rope: Tensor | None = None, attn_mask: Tensor | None = None) -> Tensor:
        if self.qkv is None:
            parts = [m(x) for m in (self.q_proj, self.k_proj, self.v_proj)]
        else:
            parts = list(F.linear(x, self.qkv.weight, torch.cat([self.q_bias, self.k_bias, self.v_bias])).chunk(3, -1))
        q, k, v = (p.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for p in parts)
        if rope is not None:
            n = self.num_prefix_tokens
            q, k = (torch.cat([t[:, :, :n], rotate(t[:, :, n:], rope, self.rotate_half)], 2) for t in (q, k))
        return self.proj(self.norm(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)))


class SwiGLU(nn.Module):
    """timm's, with the norm between its halves."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1_g, self.fc1_x, self.act = nn.Linear(dim, hidden), nn.Linear(dim, hidden), nn.SiLU()
        self.norm, self.fc2 = nn.LayerNorm(hidden), nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.norm(self.act(self.fc1_g(x)) * self.fc1_x(x)))


class EvaBlock(nn.Module):
    def __init__(self, dim: int, heads: int, split: bool = False, half: bool = False) -> None:
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(dim), EvaAttention(dim, heads, split, half)
        self.gamma_1 = nn.Parameter(torch.full((dim,), 0.5)) if half else None
        self.norm2, self.mlp = nn.LayerNorm(dim), SwiGLU(dim, 96) if split else Mlp(dim, 96)
        self.gamma_2 = nn.Parameter(torch.full((dim,), 0.5)) if half else None

    def forward(self, x: Tensor, rope: Tensor | None = None, attn_mask: Tensor | None = None) -> Tensor:
        y = self.attn(self.norm1(x), rope=rope, attn_mask=attn_mask)
        x = x + (y if self.gamma_1 is None else self.gamma_1 * y)
        y = self.mlp(self.norm2(x))
        return x + (y if self.gamma_2 is None else self.gamma_2 * y)


class Eva(Stack):
    def positions(self, n: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
        attn = self.blocks[0].attn
        pairs = self.norm.normalized_shape[0] // attn.num_heads // 2
        angle = torch.arange(n - 1)[:, None] * torch.linspace(0.1, 1.0, pairs)
        parts = [torch.cat([t, t], -1) if attn.rotate_half else t.repeat_interleave(2, -1)
                 for t in (angle.sin(), angle.cos())]  # fmt: skip
        return (), {"rope": torch.cat(parts, -1).to(self.norm.weight.dtype)}


# ---- DiT, LightningDiT ---------------------------------------------------------------------------------------------


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return x * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


class DiTBlock(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.attn = Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.mlp = Mlp(dim, 4 * dim, lambda: nn.GELU(approximate="tanh"))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        a, b, g, d, e, h = self.adaLN_modulation(c).chunk(6, dim=1)
        x = x + g.unsqueeze(1) * self.attn(modulate(self.norm1(x), a, b))
        return x + h.unsqueeze(1) * self.mlp(modulate(self.norm2(x), d, e))


class DiT(Stack):
    def inputs(self) -> tuple[Tensor, ...]:
        return (*super().inputs(), torch.randn(2, self.norm.normalized_shape[0]))


class RMSNorm(nn.Module):
    def __init__(self, dim: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps, self.weight = eps, nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        y = x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + self.eps)
        return y.type_as(x) * self.weight


class Rotary(nn.Module):
    def __init__(self, rows: int, head_dim: int) -> None:
        super().__init__()
        angle = torch.arange(rows)[:, None] * torch.linspace(0.1, 1.0, head_dim // 2)
        for name, t in (("freqs_cos", angle.cos()), ("freqs_sin", angle.sin())):
            self.register_buffer(name, t.repeat_interleave(2, -1))

    def forward(self, t: Tensor) -> Tensor:
        a, b = t[..., ::2], t[..., 1::2]
        return t * self.freqs_cos + torch.stack([-b, a], -1).flatten(-2) * self.freqs_sin


class RotaryAttention(Attention):
    def forward(self, x: Tensor, rope: Any = None) -> Tensor:
        q, k, v = self.split(x)
        return self.merged(q if rope is None else rope(q), k if rope is None else rope(k), v)


class SwiGLUFFN(nn.Module):
    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.w12, self.w3 = nn.Linear(dim, 2 * hidden), nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.w12(x).chunk(2, -1)
        return self.w3(F.silu(a) * b)


class LightningDiTBlock(nn.Module):
    def __init__(self, dim: int, heads: int, shift: bool = True) -> None:
        super().__init__()
        self.norm1, self.attn, self.norm2 = RMSNorm(dim), RotaryAttention(dim, heads, RMSNorm), RMSNorm(dim)
        self.mlp, self.shift = SwiGLUFFN(dim, 96), shift
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, (6 if shift else 4) * dim))

    def forward(self, x: Tensor, c: Tensor, feat_rope: Any = None) -> Tensor:
        m = self.adaLN_modulation(c)
        if self.shift:
            a, b, g, d, e, h = m.chunk(6, dim=1)
        else:
            b, g, e, h = m.chunk(4, dim=1)
            a = d = torch.zeros_like(b)
        x = x + g.unsqueeze(1) * self.attn(modulate(self.norm1(x), a, b), rope=feat_rope)
        return x + h.unsqueeze(1) * self.mlp(modulate(self.norm2(x), d, e))


class LightningDiT(DiT):
    def __init__(self, block: Any, **options: Any) -> None:
        super().__init__(block, **options)
        self.feat_rope = Rotary(12, 16)

    def positions(self, n: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return (), {"feat_rope": self.feat_rope}


# ---- TiTok, MAETok's own code --------------------------------------------------------------------------------------


class ResidualAttentionBlock(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.ln_1, self.attn, self.ln_2 = nn.LayerNorm(dim), nn.MultiheadAttention(dim, heads), nn.LayerNorm(dim)
        layers = [("c_fc", nn.Linear(dim, 4 * dim)), ("gelu", nn.GELU()), ("c_proj", nn.Linear(4 * dim, dim))]
        self.mlp = nn.Sequential(OrderedDict(layers))

    def forward(self, x: Tensor) -> Tensor:
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, need_weights=False)[0]
        return x + self.mlp(self.ln_2(x))


class TiTok(Stack):
    def forward(self, images: Tensor, *condition: Tensor) -> Tensor:
        x = self.patch_embed(images).flatten(2).permute(2, 0, 1)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x.permute(1, 0, 2)))


class LatentAttention(Attention):
    def forward(
        self,
        x: Tensor,
        attn_mask: Tensor | None = None,
        freqs_cis: Tensor | None = None,
        num_prefix_tokens: int = 1,
        num_latent_tokens: int = 32,
    ) -> Tensor:
        q, k, v = self.split(x)
        if freqs_cis is not None:
            stop = x.shape[1] - num_latent_tokens

            def turn(t: Tensor) -> Tensor:
                c = torch.view_as_complex(t[:, :, num_prefix_tokens:stop].unflatten(-1, (-1, 2)).contiguous().to(
                    torch.float64 if t.dtype == torch.float64 else torch.float32))  # fmt: skip
                turned = torch.view_as_real(c * freqs_cis).flatten(-2).to(t.dtype)
                return torch.cat([t[:, :, :num_prefix_tokens], turned, t[:, :, stop:]], 2)

            q, k = turn(q), turn(k)
        return self.merged(q, k, v)


class LatentBlock(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(dim), LatentAttention(dim, heads)
        self.drop_path, self.norm2, self.mlp = nn.Identity(), nn.LayerNorm(dim), Mlp(dim, 4 * dim)

    def forward(
        self, x: Tensor, freqs_cis: Tensor | None = None, num_prefix_tokens: int = 1, num_latent_tokens: int = 32
    ) -> Tensor:
        y = self.attn(
            self.norm1(x),
            freqs_cis=freqs_cis,
            num_prefix_tokens=num_prefix_tokens,
            num_latent_tokens=num_latent_tokens,
        )
        x = x + self.drop_path(y)
        return x + self.drop_path(self.mlp(self.norm2(x)))


class MoVQBlock(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.attn, self.mlp = LatentAttention(dim, heads), Mlp(dim, 4 * dim)
        self.norm2 = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(8, 4 * dim))

    def forward(
        self,
        x: Tensor,
        interpolate_zq: Tensor,
        attn_mask: Tensor | None = None,
        freqs_cis: Tensor | None = None,
        num_prefix_tokens: int = 1,
        num_latent_tokens: int = 32,
    ) -> Tensor:
        a, b, c, d = self.adaLN_modulation(interpolate_zq).chunk(4, dim=-1)
        n = num_latent_tokens

        def modulated(y: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
            return torch.cat([y[:, :-n], y[:, -n:] * scale + shift], 1)

        y = modulated(self.norm1(x), a, b)
        x = x + self.attn(y, attn_mask, freqs_cis, num_prefix_tokens, n)
        return x + self.mlp(modulated(self.norm2(x), c, d))


class Latents(Stack):
    def positions(self, n: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
        angle = torch.linspace(0, 3, 4 * (n - 5) * 8).view(4, n - 5, 8)  # of each head
        cis = torch.polar(torch.ones_like(angle), angle)
        return (), {"freqs_cis": cis, "num_prefix_tokens": 1, "num_latent_tokens": 4}


class MoVQ(Latents):
    def inputs(self) -> tuple[Tensor, ...]:
        return (*super().inputs(), torch.randn(2, 4, 8))


MODELS: dict[str, Any] = {
    "timm": lambda: Stack(Block),
    "timm, LayerScale": lambda: Stack(Block, scale=True),
    "timm, q/k norm": lambda: Stack(Block, qk_norm=nn.LayerNorm),
    "EVA": lambda: Eva(EvaBlock),
    "EVA, split, SwiGLU with a norm": lambda: Eva(EvaBlock, split=True),
    "DINOv3": lambda: Eva(EvaBlock, half=True),
    "DiT": lambda: DiT(DiTBlock),
    "LightningDiT": lambda: LightningDiT(LightningDiTBlock),
    "LightningDiT, no shift": lambda: LightningDiT(LightningDiTBlock, shift=False),
    "TiTok": lambda: TiTok(ResidualAttentionBlock),
    "MAETok's encoder": lambda: Latents(LatentBlock),
    "MAETok's decoder": lambda: MoVQ(MoVQBlock),
}
