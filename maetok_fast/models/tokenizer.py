# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""MAETok: images <-> L latent tokens of width H (Masked Autoencoders Are Effective Tokenizers, arXiv 2502.03444).

    images (B, 3, H, W) in [-1, 1]
      │ patches (conv), masked ones replaced by mask_token, [cls] prepended, + learned pos_embed (cls slot included)
      │ latent_tokens + latent_pos_embed appended           [cls | N patches | L latents]
      │ ViT blocks; 2-D RoPE turns the patches only         the last block computes only the tokens that are read
      ▼ norm, last L tokens, quant_conv
    latents (B, L, H)
      │ post_quant_conv + latent_pos_embed                  [cls? | N x mask_token | L latents]
      │ ViT blocks ("plain") or MoVQ blocks ("movqv2": norms without affine; the raw latents scale and shift the
      │ normed latent tokens, `norm(x) * scale + shift`, not 1 + scale; no LayerScale)
      ▼ norm, image tokens, Linear to pixels, unpatchify
    images (B, 3, H, W), not clamped

L = 0 is the image-token ablation: the N patch tokens themselves are the latents, (B, N, H), and the decoder starts from
them instead of from mask tokens. Parameter names are those of the public checkpoints. Any resolution and aspect ratio
works that the patch divides: RoPE turns by the true integer positions of the grid, and learned absolute positions are
resampled bicubically when the grid is not the trained one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from maetok_fast.checks import check_dtype, check_tensor, height_width
from maetok_fast.kernels import decoder_tokens, embed_tokens, gather_tokens, rope_table, scatter_tokens
from maetok_fast.layers import unpatchify
from maetok_fast.models.bottlenecks import SoftVQ, gaussian, kl_loss, sample_gaussian
from maetok_fast.models.checkpoints import Pretrained
from maetok_fast.models.checkpoints.maetok import MAETOK
from maetok_fast.models.configs import MAETokConfig, ViTSize, grid_of
from maetok_fast.models.vit import MoVQNorm, ViT
from maetok_fast.positions import axial_frequencies, grid_positions, mixed_frequencies

__all__ = ["Decoder", "Encoder", "MAETok"]


def _one(shared: Tensor | None) -> Tensor | None:
    """(1, T, D) as the checkpoints hold it -> (T, D)."""
    return None if shared is None else shared.squeeze(0)


class _Half(nn.Module):
    """What encoder and decoder share: a ViT and its RoPE. Tables are made for the grid at hand, all layers at once."""

    model: ViT

    def __init__(self, config: MAETokConfig, size: ViTSize, patch: int) -> None:
        super().__init__()
        self.position, self.theta, self.patch, self.heads = config.position, config.rope_theta, patch, size.heads
        self.half_dims = size.dim // size.heads // 4
        self.num_latent_tokens = config.num_latent_tokens
        if config.position == "mixed":
            self.freqs = nn.Parameter(mixed_frequencies(size.depth, size.heads, size.dim // size.heads, self.theta))
            # the public checkpoints hold the base grid's positions; kept for their loaders, never read here
            side = (config.base_image_size // patch,) * 2
            x, y = grid_positions(side).unbind(1)
            self.register_buffer("freqs_t_x", x.clone())
            self.register_buffer("freqs_t_y", y.clone())

    def rope(self, grid: tuple[int, int]) -> list[Tensor] | list[None]:
        """One table (2, heads or 1, N, head_dim / 2) per block for the grid (rows, columns); None where unused."""
        depth = len(self.model.blocks)
        if self.position == "absolute":
            return [None] * depth
        device = self.model.pos_embed.device
        pos = grid_positions(grid, device)
        if self.position == "axial":
            return [rope_table(axial_frequencies(self.half_dims, self.theta, "x", device), pos)] * depth
        return list(rope_table(self.freqs.view(2, depth, self.heads, -1), pos).unbind(0))


class Encoder(_Half):
    def __init__(self, config: MAETokConfig) -> None:
        super().__init__(config, config.encoder, config.patch)
        dim, count = config.encoder.dim, config.num_latent_tokens
        grid = grid_of(config.size, config.patch, "image_size")
        self.model = ViT(config.encoder, grid, config.patch, 0, True, config.encoder_drop_path)
        if count:
            self.latent_tokens = nn.Parameter(torch.randn(1, count, dim) * 0.02)
            self.latent_pos_embed = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, count, dim), std=0.02))
        self.mask_token = nn.Parameter(torch.randn(1, 1, dim) * 0.02) if config.mask_token else None

    def embed(self, images: Tensor, mask: Tensor | None) -> Tensor:
        """images -> the sequence [cls | N patches | L latents] (B, 1 + N + L, D) before the blocks."""
        grid = images.shape[2] // self.patch, images.shape[3] // self.patch
        patches = self.model.patch_embed(images)
        token = self.mask_token if mask is not None else None
        latents = self.latent_tokens + self.latent_pos_embed if self.num_latent_tokens else None
        return embed_tokens(
            patches,
            None if token is None else mask,
            None if token is None else token.flatten(),
            self.model.positions(grid),
            _one(self.model.cls_token),
            _one(latents),
        )

    def forward(self, images: Tensor, mask: Tensor | None = None, kept: Tensor | None = None) -> Tensor:
        """images -> (B, L, D), or (B, N, D) without latent tokens.

        kept (B, K) int64: the patches that are not dropped; without latent tokens mask tokens stand for the others."""
        patches = images.shape[2] // self.patch * (images.shape[3] // self.patch)
        x = self.embed(images, None if kept is not None else mask)
        if kept is not None:
            image_tokens = gather_tokens(x[:, 1 : 1 + patches], kept)
            x = torch.cat([x[:, :1], image_tokens, x[:, 1 + patches :]], dim=1)
        tables = self.rope((images.shape[2] // self.patch, images.shape[3] // self.patch))
        # only these tokens leave the encoder: the last block's queries, projection and MLP of all others are never read
        count = self.num_latent_tokens or x.shape[1] - 1
        last = len(tables) - 1
        for i, (block, rope) in enumerate(zip(self.model.blocks, tables)):
            pruned = (x.shape[1] - count, count) if i == last else (0, None)
            # rotations by place: without them no block needs the places
            dropped = {} if kept is None or rope is None else {"index": kept}
            x = block(x, rope, 1, x, *pruned, **dropped)
        x = self.model.norm(x)
        if kept is not None and not self.num_latent_tokens:
            assert self.mask_token is not None
            x = scatter_tokens(x, kept, self.mask_token.flatten(), patches)
        return x


class Decoder(_Half):
    def __init__(self, config: MAETokConfig) -> None:
        super().__init__(config, config.decoder, config.out_patch)
        dim = config.decoder.dim
        self.movq = config.decoder_kind == "movqv2"
        grid = grid_of(config.size, self.patch, "image_size")
        self.model = ViT(
            config.decoder,
            grid,
            self.patch,
            config.latent_dim if self.movq else 0,
            config.decoder_cls_token,
            config.decoder_drop_path,
        )
        self.mask_token = nn.Parameter(torch.randn(1, 1, dim) * 0.02)
        shape = (1, config.num_latent_tokens, dim)
        self.latent_pos_embed = nn.Parameter(nn.init.trunc_normal_(torch.empty(shape), std=0.02))
        self.to_pixel = ToPixel(dim, self.patch)
        for parameter in self._unread():
            parameter.requires_grad_(False)

    def _unread(self) -> Iterator[nn.Parameter]:
        """Parameters of the public layout that no input reaches: kept for the checkpoints, and nothing to train."""
        yield from self.model.patch_embed.parameters()
        if self.position != "absolute":
            yield self.model.pos_embed
        if not self.num_latent_tokens:
            yield from (self.mask_token, self.latent_pos_embed)
        elif isinstance(self.model.norm, MoVQNorm):
            yield from self.model.norm.adaLN_modulation.parameters()

    @property
    def prefix(self) -> int:
        """Number of tokens before the image tokens: 1 with a cls token."""
        return 0 if self.model.cls_token is None else 1

    def embed(self, z: Tensor, grid: tuple[int, int]) -> Tensor:
        """z (B, L or N, D) -> the sequence [cls? | N image tokens | L latents] before the blocks."""
        pos = self.model.positions(grid) if self.position == "absolute" else None
        cls = _one(self.model.cls_token)
        if not self.num_latent_tokens:
            return embed_tokens(z, pos=pos, cls=cls)
        token = self.mask_token.flatten()
        return decoder_tokens(z, token, grid[0] * grid[1], pos, cls, _one(self.latent_pos_embed))

    def forward(self, z: Tensor, latents: Tensor, grid: tuple[int, int]) -> Tensor:
        """z = post_quant_conv(latents) (B, T, D), latents (B, T, H), grid (rows, columns) -> images (B, 3, H, W)."""
        return self.pixels(self.tokens(z, latents, grid), grid)

    def tokens(self, z: Tensor, latents: Tensor, grid: tuple[int, int]) -> Tensor:
        """As `forward`, up to what the last layer reads: (B, N, D), normed."""
        x = self.embed(z, grid)
        prefix, count = self.prefix, grid[0] * grid[1]
        tables = self.rope(grid)
        last = len(tables) - 1
        # the first block meets `count` equal mask tokens, unless absolute positions tell them apart
        equal = count if self.num_latent_tokens and self.position != "absolute" else None
        for i, (block, rope) in enumerate(zip(self.model.blocks, tables)):
            kept = (prefix, count) if i == last else (0, None)
            x = block(x, rope, prefix, latents, *kept, equal if i == 0 else None)
        return self.normed(x, latents)

    def normed(self, x: Tensor, latents: Tensor) -> Tensor:
        """Image tokens (B, N, D) through the last norm. Without latent tokens they are the modulated ones."""
        return self.model.norm(x, None if self.num_latent_tokens else latents) if self.movq else self.model.norm(x)

    def pixels(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        """What `tokens` gives -> images (B, 3, H, W)."""
        return unpatchify(self.to_pixel(tokens), grid, self.patch)


class ToPixel(nn.Module):
    """One Linear from a token (B, N, D) to its patch's pixels (B, N, p*p*3), order (row, column, channel)."""

    def __init__(self, dim: int, patch: int) -> None:
        super().__init__()
        self.model = nn.Linear(dim, 3 * patch * patch)

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)


class MAETok(Pretrained):
    """The tokenizer. `encode`, `decode`, and `forward` = decode(encode) for training. See the module's drawing.

    `MAETok.from_pretrained`, `save_pretrained` and `push_to_hub` read and write the public layout
    (`maetok_fast.models.checkpoints`).
    """

    config_class = MAETokConfig
    layout = MAETOK

    def __init__(self, config: MAETokConfig | None = None) -> None:
        super().__init__()
        self.config = config = MAETokConfig() if config is None else config
        self.encoder = Encoder(config)
        self.quant_conv = nn.Linear(config.encoder.dim, config.latent_dim * (2 if config.bottleneck == "kl" else 1))
        self.codebook = None if config.codebook_size is None else SoftVQ(config.codebook_size, config.latent_dim)
        self.post_quant_conv = nn.Linear(config.latent_dim, config.decoder.dim)
        self.decoder = Decoder(config)

    def encode(self, images: Tensor, mask: Tensor | None = None, kept: Tensor | None = None) -> Tensor:
        """images (B, 3, H, W) in [-1, 1], RGB, the model's dtype -> latents (B, L, H); (B, N, H) if L = 0.

        H and W: any multiples of the patch. mask (B, N) bool, True = replaced by the mask token, row-major patches.
        kept (B, K) int64, ascending: only these patches go through the blocks (as in MAE), and `mask` is not looked at.
        ValueError or TypeError name what was given and what was expected. Latents are not normalised; of the bottleneck
        "kl" they are the mean.
        """
        h = self._encoded(images, mask, kept)
        if self.config.bottleneck == "kl":
            return gaussian(h)[0]
        return h if self.codebook is None else self.codebook(h)[0]

    def latents_and_loss(
        self, images: Tensor, mask: Tensor | None = None, kept: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """As `encode`, in training: (the latents to decode, of "kl" a sample; the bottleneck's losses by name, fp32
        scalars without weights: "kl", "entropy", or none)."""
        h = self._encoded(images, mask, kept)
        if self.config.bottleneck == "kl":
            mean, log_variance = gaussian(h)
            return sample_gaussian(mean, log_variance), {"kl": kl_loss(mean, log_variance)}
        if self.codebook is None:
            return h, {}
        latents, loss = self.codebook(h)
        return latents, {"entropy": loss}

    def _encoded(self, images: Tensor, mask: Tensor | None, kept: Tensor | None) -> Tensor:
        check_tensor("images", images, ("B", 3, "H", "W"))
        check_dtype("images", images, self.decoder.mask_token)
        rows, columns = grid_of((images.shape[2], images.shape[3]), self.config.patch, "images of")
        if kept is not None:
            check_tensor("kept", kept, (images.shape[0], "K"))
            if kept.dtype != torch.int64:
                raise TypeError(f"kept: expected torch.int64, places of patches, got {kept.dtype}")
            if not self.config.num_latent_tokens and self.encoder.mask_token is None:
                raise ValueError("kept: without latent tokens a mask token has to stand for the dropped patches")
        elif mask is not None:
            check_tensor("mask", mask, (images.shape[0], rows * columns))
            if mask.dtype != torch.bool:
                raise TypeError(f"mask: expected torch.bool (True = masked), got {mask.dtype}; use mask.bool()")
            if self.encoder.mask_token is None:
                raise ValueError("mask: this model has no mask token (MAETokConfig.mask_token is False)")
        encoded = self.encoder(images, mask) if kept is None else self.encoder(images, mask, kept)
        return self.quant_conv(encoded)

    def decode(self, latents: Tensor, size: int | tuple[int, int] | None = None) -> Tensor:
        """latents (B, L, H) -> images (B, 3, height, width), about [-1, 1], not clamped.

        size: output int or (height, width) in pixels, a multiple of the patch; None: the trained resolution, and for
        L = 0 a square if N is one. latents may be unnormalised encoder outputs only: undo (z - mean) / std first.
        """
        config = self.config
        if size is None:
            size = config.size
            if config.num_latent_tokens == 0 and isinstance(latents, Tensor) and latents.ndim == 3:
                side = math.isqrt(latents.shape[1])
                if side * side == latents.shape[1]:
                    size = side * config.patch
        grid = grid_of(height_width("size", size), config.out_patch, "size")
        tokens = config.num_latent_tokens or grid[0] * grid[1]
        check_tensor("latents", latents, ("B", tokens, config.latent_dim))
        check_dtype("latents", latents, self.decoder.mask_token)
        return self.decoder(self.post_quant_conv(latents), latents, grid)

    def forward(self, images: Tensor, mask: Tensor | None = None) -> Tensor:
        """Reconstruction (B, 3, H, W) of images (B, 3, H, W); `mask` as in `encode`."""
        latents = self.encode(images, mask)
        return self.decode(latents, (images.shape[2], images.shape[3]))
