# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""What a masked tokenizer's training adds to a ViT, as modules: positions, masks, targets.

    image ── HOG ─────────────────────────────────────────────> (B, N, 27 S^2) targets of the auxiliary decoder
      └─ patches (B, N, D) ── PatchMask ── replaced or dropped ── blocks with RoPEAttention ── latents

Each is thin state over an op of `maetok_fast.kernels`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from maetok_fast.checks import check_positive
from maetok_fast.kernels import (
    embed_tokens,
    gather_tokens,
    hog,
    host_mask_count,
    rope_table,
    sample_mask,
    sample_visible,
    scatter_tokens,
    visible_index,
)
from maetok_fast.layers.transformer import Attention
from maetok_fast.positions import axial_frequencies, grid_positions, mixed_frequencies

__all__ = ["HOG", "Masked", "PatchMask", "RoPEAttention"]


class RoPEAttention(Attention):
    """Self-attention over [prefix | image tokens | latent tokens] that turns the image tokens alone by 2-D RoPE.

    Parameters as timm's attention: `qkv`, `proj`, with `qk_norm` "layer" or "rms" `q_norm` and `k_norm`. position:
    "mixed", learned frequencies `freqs` (2, num_heads * head_dim / 2) of x and y (RoPE-Mixed, arXiv 2403.13298; a layer
    of MAETok's `freqs` (2, depth, ...)), or "axial", fixed ones: half of the pairs turns with the column, half with the
    row. theta: their base. grid: (rows, columns) of the image tokens; prefix and latents: how many tokens lie before
    and behind them. ValueError where head_dim is no multiple of 4.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        grid: tuple[int, int],
        *,
        prefix: int = 0,
        latents: int = 0,
        position: str = "mixed",
        theta: float = 10.0,
        qk_norm: str = "none",
    ) -> None:
        super().__init__(dim, num_heads, qk_norm)
        check_positive("RoPEAttention", rows=grid[0], columns=grid[1])
        if position not in ("mixed", "axial"):
            raise ValueError(f"RoPEAttention: position {position!r} is not one of 'mixed', 'axial'")
        if self.head_dim % 4:
            raise ValueError(f"RoPEAttention: head_dim must be a multiple of 4, got {self.head_dim}")
        self.grid, self.prefix, self.latents, self.position, self.theta = grid, prefix, latents, position, theta
        if position == "mixed":
            self.freqs = nn.Parameter(mixed_frequencies(1, num_heads, self.head_dim, theta)[:, 0])

    def table(self, grid: tuple[int, int] | None = None) -> Tensor:
        """`rope_attention`'s cosines and sines for a grid (rows, columns): (2, heads or 1, rows * columns, F)."""
        grid, device = self.grid if grid is None else grid, self.qkv.weight.device
        if self.position == "mixed":
            freqs = self.freqs.unflatten(1, (self.num_heads, -1))
        else:
            freqs = axial_frequencies(self.head_dim // 4, self.theta, "x", device)
        return rope_table(freqs, grid_positions(grid, device))

    def forward(  # type: ignore[override]
        self, x: Tensor, grid: tuple[int, int] | None = None, index: Tensor | None = None
    ) -> Tensor:
        """x (B, prefix + M + latents, D) -> the same shape. grid: where it differs from the constructor's.

        index (B, M) int64: which places of the grid the image tokens hold, where masking dropped others
        (`Masked.kept`); None: all of them, row by row. ValueError where the tokens do not fit the grid.
        """
        table = self.table(grid)
        tokens = table.shape[2] if index is None else index.shape[1]
        if x.shape[1] != self.prefix + tokens + self.latents:
            raise ValueError(
                f"RoPEAttention: x must have {self.prefix} + {tokens} + {self.latents} tokens (prefix, image, latent), "
                f"got {x.shape[1]}; pass grid=(rows, columns) for another image size, index= for dropped tokens"
            )
        return super().forward(x, table, prefix=self.prefix, index=index)

    def extra_repr(self) -> str:
        return f"grid={self.grid}, prefix={self.prefix}, latents={self.latents}, {self.position}, theta={self.theta}"


class Masked(NamedTuple):
    """What `PatchMask` returns: the tokens; which were masked, (B, N) bool, None where nothing was; and in drop mode
    the places (B, K) int64 of those left, for `RoPEAttention(index=)` and `PatchMask.put_back`."""

    x: Tensor
    mask: Tensor | None
    kept: Tensor | None


class PatchMask(nn.Module):
    """Masks image tokens in training: MAETok's share, ceil(ratio * N) of each image, the ratio a normal cut to
    [low, high].

    mode "replace": masked tokens become the learned `mask_token` (1, 1, dim), MAETok's name and shape; "drop": they are
    left out (MAE), and `put_back` fills their places with `mask_token`. Which tokens: Philox numbers of the buffer
    `seed` (2,) int64 [seed, step], of which each draw in training takes a step in place: the same on every device, in
    every split of the batch (`first_image`), saved with the state dict, and no value travels to the host (in drop mode,
    whose shapes depend on the count, once). A region that activation checkpointing runs twice, or in drop mode one that
    torch.compile traces, must not draw: call `draw` before it and pass what it returns.
    """

    seed: Tensor

    def __init__(self, dim: int, mode: str = "replace", low: float = 0.4, high: float = 0.6, seed: int = 0) -> None:
        super().__init__()
        check_positive("PatchMask", dim=dim)
        if mode not in ("replace", "drop"):
            raise ValueError(f"PatchMask: mode {mode!r} is not one of 'replace', 'drop'")
        if not 0.0 <= low <= high <= 1.0:
            raise ValueError(f"PatchMask: the ratio must lie in 0 <= low <= high <= 1, got low {low}, high {high}")
        self.mode, self.low, self.high = mode, low, high
        self.mask_token = nn.Parameter(torch.randn(1, 1, dim) * 0.02)
        self.register_buffer("seed", torch.tensor([seed, 0]))
        self._host: tuple[int, int] | None = None  # seed and step as the host knows them

    def draw(self, batch: int, tokens: int, first_image: int = 0) -> Masked:
        """The next masks for so many tokens, without x; the step advances. first_image: index of this rank's first
        image in the global batch."""
        index = None
        if self.mode == "replace":
            mask = sample_mask(self.seed, batch, tokens, self.low, self.high, first_image)
        else:
            seed, step = self.seed.tolist() if self._host is None else self._host
            count = host_mask_count(seed, step, tokens, self.low, self.high)
            mask, index = sample_visible(self.seed, count, batch, tokens, first_image)
            self._host = seed, step + 1
        self.seed[1] += 1
        return Masked(mask.new_empty(0), mask, index)

    def forward(self, x: Tensor, drawn: Masked | Tensor | None = None, first_image: int = 0) -> Masked:
        """x (B, N, D), image tokens only, with the masks of `draw`, or a mask (B, N) bool, True = masked, with the same
        count in every row where tokens are dropped. None: drawn here in training, nothing masked in eval."""
        if drawn is None:
            if not self.training:
                return Masked(x, None, None)
            drawn = self.draw(x.shape[0], x.shape[1], first_image)
        elif isinstance(drawn, Tensor):
            kept = None if self.mode == "replace" else visible_index(drawn, int((~drawn[0]).sum()))
            drawn = Masked(x, drawn, kept)
        if drawn.kept is None:
            return drawn._replace(x=embed_tokens(x, drawn.mask, self.mask_token.flatten()))
        return drawn._replace(x=gather_tokens(x, drawn.kept))

    def put_back(self, x: Tensor, index: Tensor, tokens: int) -> Tensor:
        """Drop mode undone: x (B, K, D), the tokens at `index` (B, K) -> (B, tokens, D), `mask_token` elsewhere."""
        return scatter_tokens(x, index, self.mask_token.flatten(), tokens)

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(state_dict, *args, **kwargs)
        self._host = None

    def extra_repr(self) -> str:
        return f"{self.mask_token.shape[-1]}, {self.mode}, ratio {self.low} .. {self.high}"


class HOG(nn.Module):
    """Histograms of oriented gradients as targets: `kernels.hog`. No parameters, no gradient.

    forward(image (B, 3, H, W) uint8, or float in [-1, 1]) -> (B, H / patch * W / patch, 27 (patch / cell)^2) fp32. Feed
    bytes where they are at hand: fp32 images made of them have rounding where a gradient should be 0.
    """

    def __init__(self, patch: int = 16, cell: int = 8) -> None:
        super().__init__()
        check_positive("HOG", patch=patch, cell=cell)
        self.patch, self.cell = patch, cell

    @property
    def features(self) -> int:
        """Numbers for each patch: 3 channels, 9 bins, (patch / cell)^2 cells."""
        return 27 * (self.patch // self.cell) ** 2

    def forward(self, image: Tensor) -> Tensor:
        return hog(image, self.patch, self.cell)

    def extra_repr(self) -> str:
        return f"patch={self.patch}, cell={self.cell}"
