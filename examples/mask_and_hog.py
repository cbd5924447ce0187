# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""MAETok's masked training in a tokenizer of one's own: masks, RoPE on what is left, HOG features as the target.

    python examples/mask_and_hog.py [steps]

PatchMask("drop") leaves masked patches out of the encoder, RoPEAttention(index=) turns the others by the places they
had, put_back fills the gaps with the mask token, and a linear head predicts the histograms of gradients there.
"""

import sys

import torch
from torch import Tensor, nn

from maetok_fast.layers import EMA, HOG, LayerNorm, Mlp, PatchEmbed, PatchMask, RoPEAttention

GRID, DIM = (4, 4), 64


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = LayerNorm(DIM), LayerNorm(DIM)
        self.attn, self.mlp = RoPEAttention(DIM, 4, GRID), Mlp(DIM, 4 * DIM)

    def forward(self, x: Tensor, index: Tensor | None = None) -> Tensor:
        x, y = self.norm2.after(x, self.attn(self.norm1(x), index=index))
        return x + self.mlp(y)


class Masked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patches, self.masking, self.target = PatchEmbed(3, DIM, 16), PatchMask(DIM, "drop"), HOG(16)
        self.encoder, self.decoder, self.head = Block(), Block(), nn.Linear(DIM, self.target.features)

    def forward(self, images: Tensor) -> Tensor:
        """images (B, 3, 64, 64) uint8 -> the loss on masked patches."""
        x = self.patches(images.float() / 127.5 - 1)
        kept, mask, index = self.masking(x)
        y = self.masking.put_back(self.encoder(kept, index), index, x.shape[1])
        return (self.head(self.decoder(y)) - self.target(images)).square().mean(-1)[mask].mean()


def main(steps: int = 40) -> None:
    torch.manual_seed(0)
    model, images = Masked().train(), torch.randint(0, 256, (8, 3, 64, 64), dtype=torch.uint8)
    optimizer, ema, losses = torch.optim.AdamW(model.parameters(), lr=1e-3), EMA(model, 0.99), []
    for _ in range(steps):
        losses.append(loss := model(images))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        ema.update(model)
    print(f"{steps} steps, {ema.updates} averages: loss {losses[0].item():.4f} -> {losses[-1].item():.4f}")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
