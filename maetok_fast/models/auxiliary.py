# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""Decoders of other targets than pixels, which shape the latents in training and are not kept with the tokenizer.

    latents (B, L, H) ─┬─ post_quant_conv_hog  ── decoder_hog  (MoVQ blocks) ── to_pixel_hog  ── (B, N, 108)
                       ├─ post_quant_conv_dino ── decoder_dino               ── to_pixel_dino ── (B, N, 1024)
                       └─ ...                          names and shapes of the public training files
    latents, masked BPE ids ── CaptionDecoder ── logits of the masked ids

Each is the tokenizer's movqv2 decoder at width 192, depth 3 (arXiv 2502.03444, section 3), up to its last norm.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor, nn

from maetok_fast.checks import check_positive, check_tensor
from maetok_fast.layers import LayerNorm
from maetok_fast.models.configs import MAETokConfig, ViTSize
from maetok_fast.models.tokenizer import Decoder
from maetok_fast.models.vit import Block

__all__ = ["AuxiliaryDecoders", "CaptionDecoder"]

SIZE = ViTSize(192, 3, 3)
CAPTION_TOKENS, VOCABULARY = 77, 49_408  # of CLIP's text towers, its byte-pair encoding


class AuxiliaryDecoders(nn.Module):
    """One decoder for each target. config: the tokenizer's; features: target -> numbers a patch; size: of each decoder.

    Names as in the public training files: `decoder_<target>`, `post_quant_conv_<target>`, `to_pixel_<target>` (dots in
    a target's name become underscores).
    """

    def __init__(self, config: MAETokConfig, features: Mapping[str, int], size: ViTSize = SIZE) -> None:
        super().__init__()
        check_positive("AuxiliaryDecoders", **features)
        config = replace(config, decoder=size, decoder_kind="movqv2", decoder_patch=None, decoder_drop_path=0.0)
        self.targets = {name: name.replace(".", "_") for name in features}
        for name, width in features.items():
            decoder = Decoder(config)
            del decoder.to_pixel
            self.add_module(f"decoder_{self.targets[name]}", decoder)
            self.add_module(f"post_quant_conv_{self.targets[name]}", nn.Linear(config.latent_dim, size.dim))
            self.add_module(f"to_pixel_{self.targets[name]}", nn.Linear(size.dim, width))

    def forward(self, latents: Tensor, grid: tuple[int, int]) -> dict[str, Tensor]:
        """latents (B, L, H), grid (rows, columns) of patches -> (B, rows * columns, features) of each target."""
        found = {}
        for name, key in self.targets.items():
            decoder = cast(Decoder, getattr(self, f"decoder_{key}"))
            tokens = decoder.tokens(getattr(self, f"post_quant_conv_{key}")(latents), latents, grid)
            found[name] = getattr(self, f"to_pixel_{key}")(tokens)
        return found


class CaptionDecoder(nn.Module):
    """Masked words of a caption, told from the other words and the latents: ours, the paper only says that it is done.

    forward(latents (B, L, H), ids (B, T) int64, mask (B, T) bool, True = hidden) -> logits (B, T, vocabulary). Words
    attend to each other and to the latents; the output layer is the embedding, transposed.
    """

    def __init__(
        self, latent_dim: int, vocabulary: int = VOCABULARY, length: int = CAPTION_TOKENS, size: ViTSize = SIZE
    ) -> None:
        super().__init__()
        check_positive("CaptionDecoder", latent_dim=latent_dim, vocabulary=vocabulary, length=length)
        self.length = length
        self.embedding = nn.Embedding(vocabulary, size.dim)
        self.mask_token = nn.Parameter(torch.randn(1, 1, size.dim) * 0.02)
        self.pos_embed = nn.Parameter(torch.randn(1, length, size.dim) * 0.02)
        self.latents = nn.Linear(latent_dim, size.dim)
        self.blocks = nn.ModuleList([Block(size, 0, 0.0) for _ in range(size.depth)])
        self.norm = LayerNorm(size.dim)
        nn.init.normal_(self.embedding.weight, std=0.02)

    def forward(self, latents: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        check_tensor("ids", ids, (latents.shape[0], "T"))
        check_tensor("mask", mask, tuple(ids.shape))
        count = ids.shape[1]
        if count > self.length:
            raise ValueError(f"ids: expected at most {self.length} of each caption, got {count}")
        words = torch.where(mask[..., None], self.mask_token, self.embedding(ids)) + self.pos_embed[:, :count]
        context = self.latents(latents)
        x = torch.cat([words.to(context.dtype), context], dim=1)
        for i, block in enumerate(self.blocks):
            x = block(x, None, 0, x, 0, count if i == len(self.blocks) - 1 else None)
        return self.norm(x) @ self.embedding.weight.T.to(x.dtype)
