# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""diff_augment: the whole DiffAugment policy (Zhao et al. 2020, arXiv 2006.10738) in one read and one write.

    colour:       v = x + b;  v = (v - mean_c v) s + mean_c v;  v = (v - mean_chw v) k + mean_chw v
    translation:  w[i, j] = v[i + shift_0, j + shift_1], 0 outside
    cutout:       y = w, 0 inside the box

in this order, every random number passed in, per image. The colour part is linear in x: with mu the mean over a pixel's
channels and m the image's mean, v = k s x + k (1 - s) mu + (1 - k) m + b, because brightness moves the mean by b and
saturation leaves it. So one plain mean per image comes first (left out where the contrast is 1) and one pass does all
the rest; the backward is the same pass over dy, with the mean of dy. Nothing is kept but x.

A group that a batch does not use is None, or, decided on the device without a synchronisation, has identity numbers:
colour (0, 1, 1), shift 0, a box of height 0. `draw_augmentation` draws them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ._native_call import twins
from ._op import Op
from ._record import Sample
from ._tiles import over_grid, over_side

__all__ = ["diff_augment", "diff_augment_ref", "draw_augmentation"]

_INTEGERS = (torch.int32, torch.int64)


def diff_augment_ref(
    x: Tensor, colour: Tensor | None = None, shift: Tensor | None = None, box: Tensor | None = None
) -> Tensor:
    """DiffAugment of (B, C, H, W) images, in this order:

    colour (B, 3) fp32: brightness added; saturation and contrast, factors of the distance to the pixel's mean over
        channels and to the image's mean. (0, 1, 1) changes nothing.
    shift (B, 2) int32 or int64: y[h, w] = v[h + shift[0], w + shift[1]], zero where that lies outside the image.
    box (B, 4) int32 or int64: top, left, height, width of the pixels set to zero; may reach over the border.

    x bf16, fp16 or fp32 (fp64: reference only); arithmetic is fp32. Any of the three may be None. Differentiable
    in x and colour. Returns (B, C, H, W) like x. Raises ValueError when shapes do not fit together.
    """
    y = x.to(torch.promote_types(x.dtype, torch.float32))
    if colour is not None:
        brightness, saturation, contrast = colour.view(-1, 3, 1, 1, 1).unbind(1)
        y = y + brightness
        mean = y.mean(1, keepdim=True)
        y = (y - mean) * saturation + mean
        mean = y.mean((1, 2, 3), keepdim=True)
        y = (y - mean) * contrast + mean
    batch, _, height, width = x.shape
    row, column = torch.arange(height, device=x.device), torch.arange(width, device=x.device)
    if shift is not None:
        rows, columns = row + shift[:, :1], column + shift[:, 1:]  # (B, H), (B, W)
        image = torch.arange(batch, device=x.device).view(-1, 1, 1)
        seen = ((rows >= 0) & (rows < height))[:, :, None] & ((columns >= 0) & (columns < width))[:, None]
        y = y.movedim(1, -1)[image, rows.clamp(0, height - 1)[:, :, None], columns.clamp(0, width - 1)[:, None]]
        y = torch.where(seen.unsqueeze(1), y.movedim(-1, 1), 0.0)
    if box is not None:
        top, left, tall, wide = box.unsqueeze(-1).unbind(1)  # (B, 1) each
        inside = ((row >= top) & (row < top + tall))[:, :, None] & ((column >= left) & (column < left + wide))[:, None]
        y = torch.where(inside.unsqueeze(1), 0.0, y)
    return y.to(x.dtype)


def draw_augmentation(
    batch: int,
    height: int,
    width: int,
    probability: float = 1.0,
    cutout: float = 0.5,
    translation: float = 0.125,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
) -> dict[str, Tensor]:
    """Random numbers for `diff_augment(x, **draw_augmentation(...))`, drawn on the device without a synchronisation.

    probability: with which the batch gets each of colour, translation and cutout (one draw each for the whole batch).
    cutout: side of the box as a share of the image's. Weak: probability .5, cutout .2; strong: 1.0 and .5.
    translation: largest shift as a share of the image's side.
    Per image: brightness U(-.5, .5), saturation U(0, 2), contrast U(.5, 1.5), shifts and box centres uniform over the
    integers. Returns colour (batch, 3) fp32, shift (batch, 2) int32, box (batch, 4) int32. Raises ValueError for shares
    outside [0, 1].
    """
    for name, value in (("probability", probability), ("cutout", cutout), ("translation", translation)):
        if not 0 <= value <= 1:
            raise ValueError(f"draw_augmentation: {name} must be between 0 and 1, got {value}")
    u = torch.rand(batch * 7 + 3, generator=generator, device=device)
    use = u[:3] < probability
    u = u[3:].view(batch, 7)
    # built from Python numbers on the device by arithmetic: a tensor made on the host would be a copy to wait for
    colour = torch.stack((u[:, 0] - 0.5, u[:, 1] * 2, u[:, 2] + 0.5), 1)
    plain = torch.stack((torch.zeros_like(u[:, 0]), torch.ones_like(u[:, 1]), torch.ones_like(u[:, 2])), 1)
    sizes = [int(side * cutout + 0.5) for side in (height, width)]

    def integers(column: int, count: int) -> Tensor:
        """Uniform in 0 .. count - 1; the clamp is for the product that rounds up to count."""
        return (u[:, column] * count).to(torch.int32).clamp(max=count - 1)

    reach = [int(side * translation + 0.5) for side in (height, width)]
    shift = torch.stack([integers(3 + i, 2 * r + 1) - r for i, r in enumerate(reach)], 1)
    corner = [
        integers(5 + i, side + 1 - size % 2) - size // 2 for i, (side, size) in enumerate(zip((height, width), sizes))
    ]
    extent = [torch.full_like(corner[0], size) for size in sizes]
    return {
        "colour": torch.where(use[0], colour, plain),
        "shift": shift * use[1],
        "box": torch.stack((*corner, *extent), 1) * use[2],
    }


# ---- record: the native library's CPU and CUDA functions take the same arguments -------------------------------------


def _int32(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.to(torch.int32)


def _workspace(a: Any) -> Tensor:
    """The partial sums of csrc, per image: of every 16 rows (CPU), of every 8192 elements and 2048 pixels (CUDA)."""
    batch, channels, height, width = a.x.shape
    count = 4 * -(-height // 16) + -(-channels * height * width // 8192) + 4 * -(-height * width // 2048)
    return a.x.new_empty(batch * count, dtype=torch.float32)


def _case(label: str, shape: tuple[int, ...], parts: str, spread: float = 1.0, real: bool = False) -> Sample:
    """parts: the arguments that are given. spread: typical shift and box corner in pixels."""

    def make(randn: Callable[..., Tensor]) -> dict[str, Any]:
        batch, _, height, width = shape
        args: dict[str, Any] = {"x": randn(*shape)}
        if "colour" in parts:
            args["colour"] = randn(batch, 3, dtype=torch.float32) * 0.3 + 1
        if "shift" in parts:
            args["shift"] = (randn(batch, 2, dtype=torch.float32) * spread).to(torch.int32)
        if "box" in parts:
            corner = (randn(batch, 2, dtype=torch.float32) * spread).to(torch.int64)
            tall, wide = (torch.full_like(corner[:, :1], side // 2) for side in (height, width))
            args["box"] = torch.cat((corner, tall, wide), 1)
        return args

    return Sample(label, make, real)


diff_augment = Op(
    "diff_augment",
    ref=diff_augment_ref,
    shapes={"x": "B C H W", "colour": "B 3", "shift": "B 2", "box": "B 4"},
    roles={"colour": (torch.float32, torch.float64), "shift": _INTEGERS, "box": _INTEGERS},
    **twins(
        "diff_augment_fwd x colour shift box y workspace",
        "diff_augment_bwd d_y x colour shift box d_x d_colour workspace",
        why_no_cuda=lambda a: over_side(*a.x.shape[2:]) or over_grid(batch=a.x.shape[0]),
        shift=lambda a: _int32(a.shift),
        box=lambda a: _int32(a.box),
        workspace=_workspace,
    ),
    samples=[
        _case("all, odd sizes", (3, 3, 7, 9), "colour shift box", 2.0),
        _case("colour alone, four channels", (2, 4, 5, 6), "colour"),
        _case("translation alone, far", (4, 2, 6, 8), "shift", 6.0),
        _case("cutout alone", (3, 3, 5, 5), "box", 2.0),
        _case("nothing", (2, 1, 3, 4), ""),
        _case("several row blocks", (2, 3, 37, 34), "colour shift box", 8.0),
        _case("256 px", (8, 3, 256, 256), "colour shift box", 20.0, real=True),
        _case("512 px", (4, 3, 512, 512), "colour shift box", 40.0, real=True),
        _case("256 px, no colour", (8, 3, 256, 256), "shift box", 20.0, real=True),
    ],
    flops=lambda a: 5 * a.x.numel(),
)
