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

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from ._op import EMPTY, Cost, Op, Sample
from ._twins import twins

__all__ = ["diff_augment", "diff_augment_ref", "draw_augmentation"]

_INTEGERS = (torch.int32, torch.int64)


# ---- reference -----------------------------------------------------------------------------------------------------


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


# ---- launchers: the native library's CPU and CUDA functions take the same arguments ----------------------------------


def _int32(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.to(torch.int32)


def _workspace(x: Tensor) -> Tensor:
    """The partial sums of csrc, per image: of every 16 rows (CPU), of every 8192 elements and 2048 pixels (CUDA)."""
    batch, channels, height, width = x.shape
    count = 4 * -(-height // 16) + -(-channels * height * width // 8192) + 4 * -(-height * width // 2048)
    return x.new_empty(batch * count, dtype=torch.float32)


def _forward(run: Callable[..., None], *args: Any) -> tuple[Tensor, ...]:
    x, colour, shift, box = args
    y = torch.empty_like(x)
    run(x, colour, _int32(shift), _int32(box), y, _workspace(x))
    return (y,)


def _backward(
    run: Callable[..., None], dy: Tensor, saved: Sequence[Tensor], args: tuple[Any, ...], needs: Sequence[bool]
) -> Sequence[Tensor | None]:
    x, colour, shift, box = args
    dx = torch.empty_like(x) if needs[0] else None
    dcolour = torch.empty_like(colour) if needs[1] else None
    run(dy, x, colour, _int32(shift), _int32(box), dx, dcolour, _workspace(x))
    return [dx, dcolour, None, None]


# ---- record --------------------------------------------------------------------------------------------------------


def _check(x: Tensor, colour: Tensor | None, shift: Tensor | None, box: Tensor | None) -> None:
    if x.ndim != 4:
        raise ValueError(f"diff_augment: x must be (B, C, H, W), got {tuple(x.shape)}")
    for name, value, columns in (("colour", colour, 3), ("shift", shift, 2), ("box", box, 4)):
        if value is not None and tuple(value.shape) != (x.shape[0], columns):
            raise ValueError(
                f"diff_augment: {name} must be ({x.shape[0]}, {columns}) for x {tuple(x.shape)}, "
                f"got {tuple(value.shape)}"
            )


def _unsupported(backend: str, x: Tensor, *rest: Any) -> str | None:
    return EMPTY if x.numel() == 0 else None


def _fake(name: str, *args: Any) -> tuple[Tensor, ...]:
    return (torch.empty_like(args[0], memory_format=torch.contiguous_format),)


def _case(label: str, shape: Sequence[int], parts: str, spread: float = 1.0, real: bool = False) -> Sample:
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


def _samples() -> Iterable[Sample]:
    yield _case("all, odd sizes", (3, 3, 7, 9), "colour shift box", 2.0)
    yield _case("colour alone, four channels", (2, 4, 5, 6), "colour")
    yield _case("translation alone, far", (4, 2, 6, 8), "shift", 6.0)
    yield _case("cutout alone", (3, 3, 5, 5), "box", 2.0)
    yield _case("nothing", (2, 1, 3, 4), "")
    yield _case("several row blocks", (2, 3, 37, 34), "colour shift box", 8.0)
    yield _case("256 px", (8, 3, 256, 256), "colour shift box", 20.0, real=True)
    yield _case("512 px", (4, 3, 512, 512), "colour shift box", 40.0, real=True)
    yield _case("256 px, no colour", (8, 3, 256, 256), "shift box", 20.0, real=True)


def _cost(x: Tensor, colour: Tensor | None = None, *rest: Any, **named: Any) -> Cost:
    """Ideal: x read once, although a contrast needs its mean first."""
    return Cost(5 * x.numel(), 2 * x.numel() * x.element_size(), 1 if colour is None else 2)


_diff_augment_cpu, _diff_augment_cuda = twins("diff_augment", _forward, _backward)
diff_augment = Op(
    "diff_augment",
    ref=diff_augment_ref,
    cpu=(_diff_augment_cpu,),
    cuda=(_diff_augment_cuda,),
    fake=_fake,
    check=_check,
    unsupported=_unsupported,
    samples=_samples,
    cost=_cost,
    own_dtypes={"colour": (torch.float32, torch.float64), "shift": _INTEGERS, "box": _INTEGERS},
)
