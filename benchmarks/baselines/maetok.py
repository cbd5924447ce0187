# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""MAETok's encoder and decoder in plain PyTorch (mixed 2-D RoPE, plain and MoVQ decoders).

    encode: [cls | patches] + pos_embed, then [.. | latent tokens] -> blocks -> last L -> 32 channels
    decode: [cls? | mask tokens | latents] -> blocks -> patches -> pixels

Every block runs on every token, and each forward makes its rotations anew from the learned frequencies and applies
them as complex products, as public code does.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from benchmarks.baselines import attend
from benchmarks.baselines.sit import Mlp


def rotations(freqs: Tensor, heads: int, rows: int, columns: int) -> Tensor:
    """freqs (2, depth, heads * head_dim/2) -> complex (depth, 1, heads, N, head_dim/2); x is the column."""
    index = torch.arange(rows * columns, device=freqs.device, dtype=torch.float32)
    x, y = index % columns, torch.div(index, columns, rounding_mode="floor")
    angles = x[:, None] * freqs[0].float()[:, None] + y[:, None] * freqs[1].float()[:, None]
    angles = angles.unflatten(-1, (heads, -1)).transpose(1, 2)
    return torch.polar(torch.ones_like(angles), angles).unsqueeze(1)


def rotate(x: Tensor, rotation: Tensor, prefix: int) -> Tensor:
    """Rotate tokens prefix..prefix+M-1 of x (B, heads, N, head_dim); interleaved pairs, in fp32."""
    stop = prefix + rotation.shape[-2]
    pairs = torch.view_as_complex(x[:, :, prefix:stop].float().unflatten(-1, (-1, 2)).contiguous())
    middle = torch.view_as_real(pairs * rotation).flatten(-2).to(x.dtype)
    return torch.cat([x[:, :, :prefix], middle, x[:, :, stop:]], dim=2)


class Attention(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads, self.attention = heads, "sdpa"
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, rotation: Tensor, prefix: int) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        q, k = rotate(q, rotation, prefix), rotate(k, rotation, prefix)
        return self.proj(attend(q, k, v, self.attention))


class LayerScale(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((dim,), 1e-5))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class Block(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(dim, eps=1e-6)
        self.attn, self.mlp = Attention(dim, heads), Mlp(dim, "none")
        self.ls1, self.ls2 = LayerScale(dim), LayerScale(dim)

    def forward(self, x: Tensor, rotation: Tensor, prefix: int, latents: Tensor | None) -> Tensor:
        x = x + self.ls1(self.attn(self.norm1(x), rotation, prefix))
        return x + self.ls2(self.mlp(self.norm2(x)))


def modulate_latents(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """MoVQ's plain scale on the last tokens only."""
    count = shift.shape[1]
    return torch.cat([x[:, :-count], x[:, -count:] * scale + shift], dim=1)


class MoVQBlock(nn.Module):
    def __init__(self, dim: int, heads: int, width: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)
        self.attn, self.mlp = Attention(dim, heads), Mlp(dim, "none")
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 4 * dim))

    def forward(self, x: Tensor, rotation: Tensor, prefix: int, latents: Tensor) -> Tensor:
        shift1, scale1, shift2, scale2 = self.adaLN_modulation(latents).chunk(4, dim=-1)
        x = x + self.attn(modulate_latents(self.norm1(x), shift1, scale1), rotation, prefix)
        return x + self.mlp(modulate_latents(self.norm2(x), shift2, scale2))


class MoVQNorm(nn.Module):
    def __init__(self, dim: int, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * dim))

    def forward(self, x: Tensor, latents: Tensor) -> Tensor:
        return modulate_latents(self.norm(x), *self.adaLN_modulation(latents).chunk(2, dim=-1))


class ViT(nn.Module):
    """The transformer inside each half, under the public names."""

    def __init__(self, dim: int, depth: int, heads: int, blocks: list[nn.Module], norm: nn.Module, cls: bool) -> None:
        super().__init__()
        if cls:
            self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.blocks = nn.ModuleList(blocks)
        self.norm = norm

    def forward(self, x: Tensor, rotation: Tensor, prefix: int, latents: Tensor | None = None) -> Tensor:
        for block, block_rotation in zip(self.blocks, rotation, strict=True):
            x = block(x, block_rotation, prefix, latents)
        return self.norm(x) if latents is None else self.norm(x, latents)


class PatchEmbed(nn.Module):
    def __init__(self, dim: int, patch: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, dim, patch, patch)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)


class Encoder(nn.Module):
    def __init__(self, size: int, latents: int, dim: int, depth: int, heads: int, patch: int) -> None:
        super().__init__()
        self.heads = heads
        self.latent_tokens = nn.Parameter(torch.zeros(1, latents, dim))
        self.latent_pos_embed = nn.Parameter(torch.zeros(1, latents, dim))
        self.freqs = nn.Parameter(torch.zeros(2, depth, dim // 2))
        self.model = ViT(
            dim, depth, heads, [Block(dim, heads) for _ in range(depth)], nn.LayerNorm(dim, eps=1e-6), True
        )
        self.model.patch_embed = PatchEmbed(dim, patch)
        self.model.pos_embed = nn.Parameter(torch.zeros(1, (size // patch) ** 2 + 1, dim))

    def forward(self, images: Tensor) -> Tensor:
        patch = self.model.patch_embed.proj.kernel_size[0]
        x = self.model.patch_embed(images)
        x = torch.cat([self.model.cls_token.expand(len(x), -1, -1), x], dim=1) + self.model.pos_embed
        x = torch.cat([x, (self.latent_tokens + self.latent_pos_embed).expand(len(x), -1, -1)], dim=1)
        rotation = rotations(self.freqs, self.heads, images.shape[-2] // patch, images.shape[-1] // patch)
        return self.model(x, rotation, 1)[:, -self.latent_tokens.shape[1] :]


class ToPixel(nn.Module):
    def __init__(self, dim: int, patch: int) -> None:
        super().__init__()
        self.model = nn.Linear(dim, 3 * patch * patch)
        self.patch = patch

    def forward(self, x: Tensor, rows: int, columns: int) -> Tensor:
        p = self.patch
        x = self.model(x).reshape(len(x), rows, columns, p, p, 3)
        return x.permute(0, 5, 1, 3, 2, 4).reshape(len(x), 3, rows * p, columns * p)


class Decoder(nn.Module):
    def __init__(
        self, size: int, latents: int, width: int, dim: int, depth: int, heads: int, patch: int, movq: bool, cls: bool
    ) -> None:
        super().__init__()
        self.side, self.heads = size // patch, heads
        self.movq = movq
        self.mask_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.latent_pos_embed = nn.Parameter(torch.zeros(1, latents, dim))
        self.freqs = nn.Parameter(torch.zeros(2, depth, dim // 2))
        blocks = [MoVQBlock(dim, heads, width) if movq else Block(dim, heads) for _ in range(depth)]
        norm = MoVQNorm(dim, width) if movq else nn.LayerNorm(dim, eps=1e-6)
        self.model = ViT(dim, depth, heads, blocks, norm, cls)
        self.to_pixel = ToPixel(dim, patch)

    def forward(self, tokens: Tensor, latents: Tensor) -> Tensor:
        batch, image_tokens = len(tokens), self.side * self.side
        x = self.mask_token.expand(batch, image_tokens, -1)
        prefix = 0
        if hasattr(self.model, "cls_token"):
            x, prefix = torch.cat([self.model.cls_token.expand(batch, -1, -1), x], dim=1), 1
        x = torch.cat([x, tokens + self.latent_pos_embed], dim=1)
        rotation = rotations(self.freqs, self.heads, self.side, self.side)
        x = self.model(x, rotation, prefix, latents if self.movq else None)
        return self.to_pixel(x[:, prefix : prefix + image_tokens], self.side, self.side)


class MAETok(nn.Module):
    """encode: (B, 3, size, size) -> (B, L, width); decode: the inverse direction."""

    def __init__(
        self,
        size: int = 512,
        latents: int = 128,
        width: int = 32,
        dim: int = 768,
        depth: int = 12,
        heads: int = 12,
        patch: int = 16,
        *,
        movq: bool = True,
        decoder_cls: bool = False,
    ) -> None:
        super().__init__()
        self.encoder = Encoder(size, latents, dim, depth, heads, patch)
        self.quant_conv = nn.Linear(dim, width)
        self.post_quant_conv = nn.Linear(width, dim)
        self.decoder = Decoder(size, latents, width, dim, depth, heads, patch, movq, decoder_cls)

    def encode(self, images: Tensor) -> Tensor:
        return self.quant_conv(self.encoder(images))

    def decode(self, latents: Tensor) -> Tensor:
        return self.decoder(self.post_quant_conv(latents), latents)

    def forward(self, images: Tensor) -> Tensor:
        return self.decode(self.encode(images))

    def set_attention(self, attention: str) -> None:
        """ "naive" or "sdpa" from now on."""
        for half in (self.encoder, self.decoder):
            for block in half.model.blocks:
                block.attn.attention = attention
