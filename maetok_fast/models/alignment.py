# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""Projectors of a generator's tokens to a teacher's features: trained beside it, and not kept with its average.

MLPProjector   Linear -> SiLU -> Linear -> SiLU -> Linear        REPA's (`projectors.0` of its checkpoints)
ConvProjector  3 x 3 over the teacher's grid                     iREPA's: neighbours are seen, places stay
"""

from __future__ import annotations

from torch import Tensor, nn

from maetok_fast.checks import check_positive

__all__ = ["ConvProjector", "MLPProjector"]


class MLPProjector(nn.Sequential):
    """Tokens (B, N, dim) -> (B, N, features), `hidden` wide inside."""

    def __init__(self, dim: int, features: int, hidden: int = 2048) -> None:
        check_positive("MLPProjector", dim=dim, features=features, hidden=hidden)
        super().__init__(
            nn.Linear(dim, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU(), nn.Linear(hidden, features)
        )


class ConvProjector(nn.Module):
    """Tokens (B, N, dim) -> (B, T, features) for a grid of T = rows * columns places, T a multiple of N: the tokens are
    repeated to it (`diffusion.align_loss`) and seen with their neighbours."""

    def __init__(self, dim: int, features: int, grid: tuple[int, int]) -> None:
        super().__init__()
        check_positive("ConvProjector", dim=dim, features=features, rows=grid[0], columns=grid[1])
        self.grid = grid
        self.conv = nn.Conv2d(dim, features, 3, padding=1)

    def forward(self, tokens: Tensor) -> Tensor:
        places = self.grid[0] * self.grid[1]
        if places % tokens.shape[1]:
            raise ValueError(f"a grid of {places} places is no multiple of {tokens.shape[1]} tokens")
        whole = tokens.repeat(1, places // tokens.shape[1], 1)
        found: Tensor = self.conv(whole.transpose(1, 2).unflatten(2, self.grid))
        return found.flatten(2).transpose(1, 2)
