# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""Heads on the tokens of a frozen DINO ViT-S/16 (StyleGAN-T, arXiv 2301.09515; VAR, arXiv 2404.02905; MAETok's own).

    images [-1, 1] ── 224 x 224 ── frozen ViT ─┬─ before its blocks ──── head ─┐
                      ImageNet's statistics    └─ after 2, 5, 8, 11 ── 4 heads ┴─ logits (B, 5 * 196)
    head: [conv k = 1, norm, LeakyReLU] ── x + [conv k = 9, norm, LeakyReLU], / sqrt 2 ── conv k = 1 to one logit

Facts of the public code, kept so that equal weights give equal logits: images larger than 224 px in both directions are
cropped at random with probability 1/2 (one window a batch), else resized, by area where they are higher than 224 px,
else bicubically. The class token is added to every patch's token and dropped; the ViT's last norm is not applied; its
GELU is the tanh form, although DINO was trained with the exact one. Convolutions run over the row-major tokens, with
circular padding and spectral norms. Here a crop is drawn in training only, by torch's generator of the CPU.

The trunk is no submodule: it is in no state_dict and among no parameters, stays in eval, and its weights get no
gradient, while images do. It follows `to`, `cuda`, `double`, ... of the discriminator.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import spectral_norm

from maetok_fast.checks import check_images
from maetok_fast.kernels import embed_tokens, norm_act
from maetok_fast.layers import Attention, LayerNorm, Mlp, NormAct, PatchEmbed, Residual
from maetok_fast.models.checkpoints import CheckpointError
from maetok_fast.models.checkpoints.copies import pick
from maetok_fast.models.checkpoints.files import read_weights
from maetok_fast.models.checkpoints.locate import locate
from maetok_fast.models.configs import ViTSize, grid_of
from maetok_fast.models.discriminators._conv import SLOPE

__all__ = ["DinoDiscriminator", "DinoTrunk"]

SIZE = ViTSize(384, 12, 6)
TAPS = (2, 5, 8, 11)
HUB = "timm/vit_small_patch16_224.dino"
URL = "https://dl.fbaipublicfiles.com/dino/dino_deitsmall16_pretrain/dino_deitsmall16_pretrain.pth"
EPS = 1e-6
NORMS = ("batch", "local", "group")
VIRTUAL = 8  # images that share statistics in a "local" norm


class _Block(nn.Module):
    """Pre-norm ViT block without LayerScale: x += attn(norm1 x); x += mlp(norm2 x)."""

    def __init__(self, size: ViTSize) -> None:
        super().__init__()
        self.norm1 = LayerNorm(size.dim, EPS)
        self.attn = Attention(size.dim, size.heads)
        self.residual = Residual()
        self.norm2 = LayerNorm(size.dim, EPS)
        self.mlp = Mlp(size.dim, round(size.dim * size.mlp_ratio), "tanh")

    def forward(self, x: Tensor) -> Tensor:
        x, y = self.residual.normed(x, self.attn(self.norm1(x)), self.norm2)
        return x + self.mlp(y)


class DinoTrunk(nn.Module):
    """The frozen ViT. images (B, 3, H, W) in [-1, 1] -> (B, D, tokens) before the blocks and after each of `taps`.

    Names as DINO's and timm's: cls_token, pos_embed, patch_embed.proj, blocks.N.{norm1,attn.qkv,attn.proj,norm2,
    mlp.fc1,mlp.fc2}. image_size: pixels a side to which images are brought.
    """

    mean: Tensor
    deviation: Tensor

    def __init__(
        self, size: ViTSize = SIZE, image_size: int = 224, patch: int = 16, taps: Sequence[int] = TAPS
    ) -> None:
        super().__init__()
        if not taps or sorted(set(taps)) != list(taps) or not 0 <= taps[0] <= taps[-1] < size.depth:
            raise ValueError(f"DinoTrunk: taps must be ascending numbers of its {size.depth} blocks, got {tuple(taps)}")
        rows, columns = grid_of((image_size, image_size), patch, "DinoTrunk: image_size")
        self.image_size, self.taps = image_size, frozenset(taps)
        self.patch_embed = PatchEmbed(3, size.dim, patch)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, size.dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + rows * columns, size.dim))
        self.blocks = nn.ModuleList([_Block(size) for _ in range(taps[-1] + 1)])
        for name, values in (("mean", (0.485, 0.456, 0.406)), ("deviation", (0.229, 0.224, 0.225))):
            self.register_buffer(name, torch.tensor(values)[:, None, None], persistent=False)

    def reset_parameters(self) -> None:
        """A random trunk, for tests and timings: weights and tokens from a normal of deviation .02, biases zero."""
        for name, p in self.named_parameters():
            if p.ndim > 1:
                nn.init.trunc_normal_(p, std=0.02)
            else:
                nn.init.constant_(p, 1.0 if "norm" in name and name.endswith("weight") else 0.0)

    def fit(self, images: Tensor, crop: float = 0.0) -> Tensor:
        """images at `image_size`; crop: the probability of a random window where they are larger both ways."""
        side, (height, width) = self.image_size, images.shape[2:]
        if (height, width) == (side, side):
            return images
        if min(height, width) > side and crop > 0 and float(torch.rand(())) < crop:
            top, left = (int(torch.randint(0, length - side + 1, ())) for length in (height, width))
            return images[:, :, top : top + side, left : left + side]
        return F.interpolate(images, (side, side), mode="area" if height > side else "bicubic")

    def forward(self, images: Tensor, crop: float = 0.0) -> list[Tensor]:
        with torch.autocast(images.device.type, enabled=False):
            x = self.fit(images.to(self.pos_embed.dtype), crop)
            x = ((x + 1) / 2 - self.mean) / self.deviation
        patches = self.patch_embed(x).to(self.pos_embed.dtype)
        x = embed_tokens(patches, pos=self.pos_embed[0], cls=self.cls_token[0])
        read = [_readout(x)]
        for i, block in enumerate(self.blocks):
            x = block(x)
            if i in self.taps:
                read.append(_readout(x))
        return read


def _readout(x: Tensor) -> Tensor:
    """[cls | patches] (B, 1 + N, D) -> patches + cls, (B, D, N)."""
    return (x[:, 1:] + x[:, :1]).transpose(1, 2)


class _Norm1d(NormAct):
    """`NormAct` of (B, C, N)."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x[:, :, None])[:, :, 0]


class _LocalNorm(nn.Module):
    """Batch norm and LeakyReLU of (B, C, N) over groups of 8 images, in eval too; no running statistics."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        # groups of nearly equal size where 8 does not divide the batch; the public code has an error there
        groups = x[:, :, None].tensor_split(-(-len(x) // VIRTUAL))
        normed = [norm_act(g, None, self.weight, self.bias, "batch", 1, EPS, SLOPE)[0] for g in groups]
        return (normed[0] if len(normed) == 1 else torch.cat(normed))[:, :, 0]


def _conv(dim: int, width: int, kernel: int) -> nn.Module:
    conv = nn.Conv1d(dim, width, kernel, padding=kernel // 2, padding_mode="circular" if kernel > 1 else "zeros")
    # the older form, whose names (weight_orig, weight_u, weight_v) the public weights have
    return spectral_norm(conv, n_power_iterations=1, eps=1e-12)


def _layer(dim: int, kernel: int, norm: str) -> nn.Sequential:
    made = _LocalNorm(dim) if norm == "local" else _Norm1d(dim, norm, groups=32, slope=SLOPE, eps=EPS)
    return nn.Sequential(_conv(dim, dim, kernel), made)


class _Skip(nn.Module):
    def __init__(self, fn: nn.Module) -> None:
        super().__init__()
        self.fn = fn

    def forward(self, x: Tensor) -> Tensor:
        return (self.fn(x) + x) * (1 / math.sqrt(2))


class _Heads(nn.ModuleList):
    """What `DinoDiscriminator.features` gives -> logits (B, heads * tokens), head after head."""

    def __init__(self, count: int, dim: int, norm: str) -> None:
        super().__init__(
            nn.Sequential(_layer(dim, 1, norm), _Skip(_layer(dim, 9, norm)), _conv(dim, 1, 1)) for _ in range(count)
        )

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        return torch.cat([head(x).flatten(1) for head, x in zip(self, features, strict=True)], dim=1)


class DinoDiscriminator(nn.Module):
    """images (B, 3, H, W) in [-1, 1], any size -> logits (B, 5 * 196), head after head. 7,386,245 parameters.

    forward is `heads(features(images))`; features that are kept, detached or not, serve more than one call of `heads`.

    weights: of the trunk: "hub" (timm's repository of them, or the hub's cache of it), a .pth or .safetensors file with
    DINO's names, or "random". norm: of the heads: "batch" (running statistics in eval; the public code synchronises it
    over ranks, here each rank normalises by its own images), "local" (VAR's and StyleGAN-T's: groups of 8 images), or
    "group" (32 groups of channels, image by image). crop: the probability of a random window in training. size,
    image_size, patch, taps: of the trunk. CheckpointError where its weights cannot be had.
    """

    def __init__(
        self,
        weights: str | os.PathLike[str] = "hub",
        norm: str = "batch",
        crop: float = 0.5,
        size: ViTSize = SIZE,
        image_size: int = 224,
        patch: int = 16,
        taps: Sequence[int] = TAPS,
    ) -> None:
        super().__init__()
        if norm not in NORMS:
            raise ValueError(f"DinoDiscriminator: norm {norm!r} is not one of {', '.join(NORMS)}")
        if not 0 <= crop <= 1:
            raise ValueError(f"DinoDiscriminator: crop must be a probability in [0, 1], got {crop}")
        trunk = DinoTrunk(size, image_size, patch, taps)
        if os.fspath(weights) == "random":
            trunk.reset_parameters()
        else:
            _load(trunk, weights)
        self.__dict__["_trunk"] = trunk.eval().requires_grad_(False)
        self.crop = crop
        self.heads = _Heads(len(taps) + 1, size.dim, norm)

    @property
    def trunk(self) -> DinoTrunk:
        """The frozen network; no submodule."""
        trunk: DinoTrunk = self.__dict__["_trunk"]
        return trunk

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> DinoDiscriminator:
        self.trunk._apply(fn, recurse)
        super()._apply(fn, recurse)
        return self

    def features(self, images: Tensor) -> list[Tensor]:
        """images -> what the heads read, (B, D, tokens) each. Its graph reaches the images alone."""
        check_images(images, 1, "DinoDiscriminator")
        found: list[Tensor] = self.trunk(images, self.crop if self.training else 0.0)
        return found

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.heads(self.features(images))
        return logits


def _load(trunk: DinoTrunk, weights: str | os.PathLike[str]) -> None:
    """Fills the trunk. Last norms and heads of other uses in the file are passed over."""
    get = f"download {URL} and give weights=/path/to/{URL.rpartition('/')[2]} (in a run: adversarial.weights=...)"
    if os.fspath(weights) == "hub":
        try:
            path = locate(HUB)[1]
        except CheckpointError as error:
            raise CheckpointError(
                f"DinoDiscriminator: the frozen ViT-S/16 could not be had from the hub repository {HUB}; {get}"
            ) from error
    else:
        path = Path(weights).expanduser()
        if not path.is_file():
            raise CheckpointError(
                f"DinoDiscriminator: weights {path}: no such file, and neither 'hub' nor 'random'; {get}"
            )
    content, _ = read_weights(path)
    state = pick(content, "DINO ViT", "blocks.0.attn.qkv.weight", "model", path)
    depth = len(trunk.blocks)
    state = {key: value for key, value in state.items() if not _passed_over(key, depth)}
    _fill(trunk, state, f"DinoDiscriminator: {path}")


def _passed_over(key: str, depth: int) -> bool:
    block = key.split(".")[1] if key.startswith("blocks.") else ""
    return key.startswith(("norm.", "head.", "fc_norm.")) or (block.isdigit() and int(block) >= depth)


def _fill(trunk: DinoTrunk, state: Mapping[str, Any], where: str) -> None:
    expected = trunk.state_dict()
    for what, keys in (("lacks", expected.keys() - state.keys()), ("has", state.keys() - expected.keys())):
        if keys:
            raise CheckpointError(f"{where}: not the weights of DINO's ViT-S/16: it {what} {min(keys)}")
    for key, value in expected.items():
        if value.shape != state[key].shape:
            raise CheckpointError(
                f"{where}: {key} is {tuple(state[key].shape)}, expected {tuple(value.shape)}: another size of ViT"
            )
    trunk.load_state_dict(state)
