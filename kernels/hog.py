# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""hog: histograms of oriented gradients, the target of MAETok's auxiliary decoder.

    gx = image * [[1, 0, -1], [2, 0, -2], [1, 0, -1]]     gy = image * the transpose     (reflected by 1 at the borders)
    bin = floor(atan2(gx, gy) / pi * 9) mod 9              magnitude = sqrt(gx^2 + gy^2) * window
    h[cell, bin] = sum of the cell's magnitudes of that bin,      h / max(||h||, 1e-12) per cell and channel

`*` is the cross-correlation that F.conv2d computes: gx is left minus right, gy top minus bottom. Bins are hard and
unsigned; atan2(gx, gy), in this order, measures the angle from the vertical. The window is a Gaussian over each
patch x patch tile, standard deviation patch / 2, summing to 1. This is MaskFeat's descriptor (Wei et al. 2022,
arXiv 2112.09133) with the parameters that MAETok trains against (arXiv 2502.03444): patch 16, cells of 8 x 8 pixels.

One pass from pixels to features: a program (or thread) walks down the rows of its cells with three rows of three
shifted vectors and nine accumulators in registers, so that nothing of size (B, 3, 9, H, W) exists. The bin needs no
arctangent: turned by pi where gx < 0, the gradient (X, Y) has reached the edge k pi / 9 where X cot(k pi / 9) >= Y, and
since the rounded products are as ordered as the cotangents, the bin is the number of edges reached. That can differ
from exact arithmetic only where the phase lies within rounding of an edge. On uint8 pixels it never does: the gradients
are integers, of which none but gx = 0 lies on an edge, and there the comparison is exact. An fp32 image made from
bytes has lost that: rounding leaves +-1e-8 where gx should vanish, on either side of the edge between bins 8 and 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ._native_call import native
from ._op import Op
from ._record import Backend, Sample
from ._tiles import HOG_PIXELS, next_power_of_2, over_grid
from ._triton import tl, triton

__all__ = ["hog", "hog_ref"]

_BINS = 9
_EPS = 1e-12
_NATIVE_CELL = 8


def hog_ref(image: Tensor, patch: int = 16, cell: int = 8) -> Tensor:
    """Histograms of oriented gradients of an image, one row of features per patch; a target, without gradient.

    image (B, 3, H, W): uint8, 0..255, or float in [-1, 1] (the features do not depend on scale and offset: uint8 is
    not rescaled); bf16, fp16 and fp32 are computed in fp32, under autocast too, fp64 (reference only) in fp64.
    patch: pixels a side of a patch, divides H and W. cell: pixels a side of a cell, at least 2, divides patch.
    Returns (B, H / patch * W / patch, 27 S^2) fp32 (fp64 for fp64), S = patch / cell: tokens row by row, 108 features
    for patch 16 and cell 8, at index ((channel * 9 + bin) * S + row of the cell) * S + column of the cell.
    Pixels that are not finite make all nine bins NaN in each cell that their 3 x 3 neighbourhoods meet.
    Raises ValueError when the sizes do not divide.
    """
    batch, channels, height, width = image.shape
    x = F.pad(image if image.dtype == torch.float64 else image.float(), (1, 1, 1, 1), mode="reflect")
    (tl_, t, tr), (l, _, r), (bl, b, br) = (
        [x[..., dy : dy + height, dx : dx + width] for dx in range(3)] for dy in range(3)
    )
    # Differences first: F.conv2d, in whatever order it adds, leaves rounding errors where neighbours are alike, and on
    # a GPU it may round the pixels to TF32.
    gx = ((tl_ - tr) + (bl - br)) + 2 * (l - r)
    gy = ((tl_ - bl) + (tr - br)) + 2 * (t - b)
    phase = torch.atan2(gx, gy) / math.pi * _BINS
    bins = phase.nan_to_num(0.0).floor().remainder(_BINS).long().unsqueeze(2)
    offset = torch.arange(patch, dtype=x.dtype, device=x.device) - (patch - 1) / 2
    gauss = torch.exp(-2 * (offset / patch) ** 2)
    window = (gauss / gauss.sum())[:, None] * (gauss / gauss.sum())
    magnitude = torch.sqrt(gx * gx + gy * gy) * window.tile(height // patch, width // patch)
    planes = magnitude.new_zeros(batch, channels, _BINS, height, width).scatter_(2, bins, magnitude.unsqueeze(2))
    side = patch // cell
    split = (batch, channels, _BINS, height // patch, side, cell, width // patch, side, cell)
    sums = planes.view(split).sum((5, 8))  # (B, 3, 9, rows, side, columns, side)
    norm = torch.linalg.vector_norm(sums, dim=2, keepdim=True)
    norm = torch.where(norm.isfinite(), norm, math.nan).clamp_min(_EPS)
    tokens = (height // patch) * (width // patch)
    return (sums / norm).permute(0, 3, 5, 1, 2, 4, 6).reshape(batch, tokens, channels * _BINS * side * side)


@triton.jit
def _hog_row(pointer, row, mask, left, middle, right, W):
    """One row of pixels per row of cells, and its neighbours to the left and to the right, as fp32."""
    at = pointer + (row * W)[:, None]
    l = tl.load(at + left[None, :], mask=mask, other=0).to(tl.float32)
    c = tl.load(at + middle[None, :], mask=mask, other=0).to(tl.float32)
    r = tl.load(at + right[None, :], mask=mask, other=0).to(tl.float32)
    return l, c, r


@triton.jit
def _hog_sum(a, ROWS: tl.constexpr, COLS: tl.constexpr, CELL: tl.constexpr):
    return tl.sum(tl.reshape(a, (ROWS, COLS // CELL, CELL)), 2)


@triton.jit
def _hog_fwd_kernel(
    image_ptr, out_ptr, H, W, scale, eps,
    PATCH: tl.constexpr, CELL: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """One program: ROWS rows of cells of one plane (image and channel), COLS columns of pixels. scale: the window's
    factor exp(-2 n^2 / patch^2) times it sums to 1."""
    plane = tl.program_id(1).to(tl.int64)
    col_blocks = (W + COLS - 1) // COLS
    cell_row = tl.program_id(0) // col_blocks * ROWS + tl.arange(0, ROWS)
    x = tl.program_id(0) % col_blocks * COLS + tl.arange(0, COLS)
    live = cell_row < H // CELL
    mask = live[:, None] & (x < W)[None, :]
    left = tl.where(x == 0, 1, x - 1)
    right = tl.where(x == W - 1, W - 2, x + 1)
    plane_ptr = image_ptr + plane * H * W
    top = cell_row * CELL

    l0, c0, r0 = _hog_row(plane_ptr, tl.where(top == 0, 1, top - 1), mask, left, x, right, W)
    l1, c1, r1 = _hog_row(plane_ptr, top, mask, left, x, right, W)
    a0 = tl.zeros((ROWS, COLS), tl.float32)
    a1, a2, a3, a4, a5, a6, a7, a8 = a0, a0, a0, a0, a0, a0, a0, a0
    for i in tl.static_range(CELL):
        y = top + i
        below = tl.where(y == H - 1, H - 2, y + 1)
        l2, c2, r2 = _hog_row(plane_ptr, below, mask, left, x, right, W)
        gx = ((l0 - r0) + (l2 - r2)) + 2.0 * (l1 - r1)
        gy = ((l0 - l2) + (r0 - r2)) + 2.0 * (c0 - c2)
        at = ((y % PATCH).to(tl.float32) - (PATCH - 1) / 2) / PATCH
        v = tl.sqrt_rn(gx * gx + gy * gy) * (tl.exp(-2.0 * at * at) * scale)[:, None]
        # turned by pi where gx < 0 (and where gx = 0 > gy): the phase is in [0, pi)
        X = tl.abs(gx)
        Y = tl.where(gx > 0.0, gy, tl.where(gx < 0.0, -gy, tl.abs(gy)))
        t1, t2, t3, t4 = X * 2.7474774194546216, X * 1.19175359259421, X * 0.5773502691896258, X * 0.17632698070846498
        bin = (t1 >= Y).to(tl.int32) + (t2 >= Y).to(tl.int32) + (t3 >= Y).to(tl.int32) + (t4 >= Y).to(tl.int32)
        bin += (-t4 >= Y).to(tl.int32) + (-t3 >= Y).to(tl.int32) + (-t2 >= Y).to(tl.int32) + (-t1 >= Y).to(tl.int32)
        a0 += tl.where(bin == 0, v, 0.0)
        a1 += tl.where(bin == 1, v, 0.0)
        a2 += tl.where(bin == 2, v, 0.0)
        a3 += tl.where(bin == 3, v, 0.0)
        a4 += tl.where(bin == 4, v, 0.0)
        a5 += tl.where(bin == 5, v, 0.0)
        a6 += tl.where(bin == 6, v, 0.0)
        a7 += tl.where(bin == 7, v, 0.0)
        a8 += tl.where(bin == 8, v, 0.0)
        l0, c0, r0, l1, c1, r1 = l1, c1, r1, l2, c2, r2

    at = ((x % PATCH).to(tl.float32) - (PATCH - 1) / 2) / PATCH
    w = (tl.exp(-2.0 * at * at) * scale)[None, :]
    h0 = _hog_sum(a0 * w, ROWS, COLS, CELL)
    h1 = _hog_sum(a1 * w, ROWS, COLS, CELL)
    h2 = _hog_sum(a2 * w, ROWS, COLS, CELL)
    h3 = _hog_sum(a3 * w, ROWS, COLS, CELL)
    h4 = _hog_sum(a4 * w, ROWS, COLS, CELL)
    h5 = _hog_sum(a5 * w, ROWS, COLS, CELL)
    h6 = _hog_sum(a6 * w, ROWS, COLS, CELL)
    h7 = _hog_sum(a7 * w, ROWS, COLS, CELL)
    h8 = _hog_sum(a8 * w, ROWS, COLS, CELL)
    squares = h0 * h0 + h1 * h1 + h2 * h2 + h3 * h3 + h4 * h4 + h5 * h5 + h6 * h6 + h7 * h7 + h8 * h8
    norm = tl.sqrt_rn(squares)
    norm = tl.where(norm - norm == 0.0, tl.maximum(norm, eps), float("nan"))

    SIDE: tl.constexpr = PATCH // CELL
    cell_col = tl.program_id(0) % col_blocks * (COLS // CELL) + tl.arange(0, COLS // CELL)
    token = (cell_row // SIDE * (W // PATCH))[:, None] + (cell_col // SIDE)[None, :]
    tokens = (H // PATCH) * (W // PATCH)
    at = ((plane // 3 * tokens + token) * 3 + plane % 3) * (9 * SIDE * SIDE)
    at += (cell_row % SIDE * SIDE)[:, None] + (cell_col % SIDE)[None, :]
    mask = live[:, None] & (cell_col < W // CELL)[None, :]
    out = out_ptr + at
    tl.store(out, tl.div_rn(h0, norm), mask=mask)
    tl.store(out + SIDE * SIDE, tl.div_rn(h1, norm), mask=mask)
    tl.store(out + 2 * SIDE * SIDE, tl.div_rn(h2, norm), mask=mask)
    tl.store(out + 3 * SIDE * SIDE, tl.div_rn(h3, norm), mask=mask)
    tl.store(out + 4 * SIDE * SIDE, tl.div_rn(h4, norm), mask=mask)
    tl.store(out + 5 * SIDE * SIDE, tl.div_rn(h5, norm), mask=mask)
    tl.store(out + 6 * SIDE * SIDE, tl.div_rn(h6, norm), mask=mask)
    tl.store(out + 7 * SIDE * SIDE, tl.div_rn(h7, norm), mask=mask)
    tl.store(out + 8 * SIDE * SIDE, tl.div_rn(h8, norm), mask=mask)


def _out(a: Any, backend: str) -> tuple[Tensor, ...]:
    batch, _, height, width = a.image.shape
    tokens = (height // a.patch) * (width // a.patch)
    return (a.image.new_empty(batch, tokens, 3 * _BINS * (a.patch // a.cell) ** 2, dtype=torch.float32),)


def _launch(a: Any, out: Any) -> None:
    batch, _, height, width = a.image.shape
    patch, cell = a.patch, a.cell
    cols = max(cell, min(HOG_PIXELS, next_power_of_2(width)))
    rows = max(1, min(HOG_PIXELS // cols, next_power_of_2(height // cell)))
    blocks = -(-width // cols) * -(-(height // cell) // rows)
    scale = 1 / sum(math.exp(-2 * ((i - (patch - 1) / 2) / patch) ** 2) for i in range(patch))
    _hog_fwd_kernel[(blocks, 3 * batch)](
        a.image, out.features, height, width, scale, _EPS,
        PATCH=patch, CELL=cell, ROWS=rows, COLS=cols, num_warps=max(1, rows * cols // 64),
    )  # fmt: skip


def _why_not_native(a: Any) -> str | None:
    if a.cell != _NATIVE_CELL or a.patch % (2 * _NATIVE_CELL) != 0:
        return f"patch {a.patch}, cell {a.cell}: the native kernel is written for cell 8 and patches that 16 divides"
    return None


def _why_not_triton(a: Any) -> str | None:
    if a.cell & (a.cell - 1) != 0 or a.cell > HOG_PIXELS:
        return f"cell {a.cell}: the Triton kernel needs a power of two, at most {HOG_PIXELS}"
    return over_grid(**{"plane count": 3 * a.image.shape[0]})


def _check(a: Any) -> None:
    if a.patch < 1:
        raise ValueError(f"hog: patch must be positive, got {a.patch}")
    if a.cell < 2 or a.patch % a.cell != 0:
        raise ValueError(f"hog: cell must be at least 2 and divide the patch of {a.patch} pixels, got {a.cell}")
    height, width = a.image.shape[2:]
    if height < 1 or width < 1 or height % a.patch != 0 or width % a.patch != 0:
        raise ValueError(
            f"hog: image must have sides that are positive and divisible by the patch of {a.patch} pixels, "
            f"got {height} x {width}; crop or resize it"
        )


def _case(label: str, size: tuple[int, int, int], kind: str = "float", real: bool = False, **rest: int) -> Sample:
    """kind "bytes": uint8; "float": the dtype under test, clamped, so that there are flat regions."""
    batch, height, width = size

    def make(randn: Callable[..., Tensor]) -> dict[str, Any]:
        x = randn(batch, 3, height, width).clamp(-1, 1)
        return {"image": ((x.float() + 1) * 127.5).to(torch.uint8) if kind == "bytes" else x, **rest}

    return Sample(label, make, real)


hog = Op(
    "hog",
    ref=hog_ref,
    outputs=("features",),
    out=_out,
    shapes={"image": "B 3 H W"},
    check=_check,
    roles={"image": (torch.uint8, torch.float32, torch.bfloat16, torch.float16, torch.float64)},
    differentiable=False,
    cpu=[native("hog image features patch eps", why_not=_why_not_native, eps=lambda a: _EPS)],
    cuda=[Backend("triton", _launch, why_not=_why_not_triton)],
    samples=[
        _case("two patches", (1, 16, 32)),
        _case("bytes, rows and columns beyond a block", (1, 48, 48), "bytes"),
        _case("patch 32", (1, 32, 32), patch=32),
        *(_case(f"{px} px, {kind}", (8, px, px), kind, real=True) for px in (256, 512) for kind in ("float", "bytes")),
    ],
    # per pixel: 10 for the gradients, 4 + 1 for the magnitude and the window, 4 + 8 for the edges, 9 for the bins
    flops=lambda a: 36 * a.image.numel(),
)
