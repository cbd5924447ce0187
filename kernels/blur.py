# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""blur_down and blur_up: StyleGAN's [1, 2, 1] filter with stride 1 or 2, and the transpose of that map.

    blur_down:  y = gain * conv(pad(x), [1, 2, 1]^T [1, 2, 1] / 16, stride)      one plane at a time
    blur_up:    its transpose: zeros are inserted, the same filter follows; the gradient of blur_down

x is padded by pad0 before and pad1 after, on both axes, with zeros or by reflection (x[-1] = x[1]). Each is the other's
backward, so two kernels make four passes, each one read and one write. What the padding is for:

    blur, same size                         stride 1, (1, 1)   kornia's filter2d in the public StyleGAN discriminators
                                                               reflects; StyleGAN2 pads with zeros
    halve for the skip (filter, down 2)     stride 2, (1, 1)   H -> ceil(H / 2); for even H the last pad is not read:
                                                               the same as upfirdn2d's (1, 0)
    before a 3x3 convolution of stride 2    stride 1, (2, 1)   then convolve with stride 2 and no padding (StyleGAN2)
    double (the transpose of halving)       blur_up, stride 2, (1, 1), gain 4

The 16 products per output are 3 + 3: rows are combined first, then columns. Karras et al. 2019, arXiv 1812.04948; 2020,
arXiv 1912.04958.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ._native_call import twins
from ._op import Op
from ._record import drawn
from ._tiles import over_side

__all__ = ["blur_down", "blur_down_ref", "blur_up", "blur_up_ref"]


def blur_down_ref(
    x: Tensor, stride: int = 2, pad0: int = 1, pad1: int = 1, mode: str = "zero", gain: float = 1.0
) -> Tensor:
    """gain * [1, 2, 1]^T [1, 2, 1] / 16 over every plane of the padded x, every stride-th row and column kept.

    x (B, C, H, W) bf16, fp16 or fp32 (fp64: reference only). stride 1 or 2. pad0, pad1 in 0..2: rows and columns added
    before and after. mode: "zero" or "reflect" (then H, W > pad0, pad1).
    Returns (B, C, (H + pad0 + pad1 - 3) // stride + 1, likewise W) like x. Raises ValueError when a plane is too small.
    """
    full = x.to(torch.promote_types(x.dtype, torch.float32))
    padded = F.pad(full, (pad0, pad1, pad0, pad1), "reflect" if mode == "reflect" else "constant")
    return (gain * F.conv2d(padded, _kernel(full), stride=stride, groups=x.shape[1])).to(x.dtype)


def blur_up_ref(
    x: Tensor,
    height: int,
    width: int,
    stride: int = 2,
    pad0: int = 1,
    pad1: int = 1,
    mode: str = "zero",
    gain: float = 1.0,
) -> Tensor:
    """The transpose of `blur_down` from (B, C, height, width) with the same stride, pad0, pad1, mode and gain.

    x (B, C, (height + pad0 + pad1 - 3) // stride + 1, likewise of width) bf16, fp16 or fp32 (fp64: reference only).
    Returns (B, C, height, width) like x. Raises ValueError when the sizes do not fit together.
    """
    full = x.to(torch.promote_types(x.dtype, torch.float32))
    rows, columns = height + pad0 + pad1, width + pad0 + pad1
    ends = (rows - 3 - (x.shape[2] - 1) * stride, columns - 3 - (x.shape[3] - 1) * stride)
    padded = F.conv_transpose2d(full, _kernel(full), stride=stride, output_padding=ends, groups=x.shape[1])
    if mode == "reflect":  # what went to a mirror image belongs to the element itself
        for dim, size in ((2, height), (3, width)):
            body = padded.narrow(dim, pad0, size)
            first = F.pad(padded.narrow(dim, 0, pad0).flip(dim), _on(dim, 1, size - 1 - pad0))
            last = F.pad(padded.narrow(dim, pad0 + size, pad1).flip(dim), _on(dim, size - 1 - pad1, 1))
            padded = body + first + last
        return (gain * padded).to(x.dtype)
    return (gain * padded[:, :, pad0 : pad0 + height, pad0 : pad0 + width]).to(x.dtype)


def _kernel(like: Tensor) -> Tensor:
    taps = like.new_tensor([0.25, 0.5, 0.25])
    return torch.outer(taps, taps).expand(like.shape[1], 1, 3, 3)


def _on(dim: int, before: int, after: int) -> tuple[int, ...]:
    """F.pad's amounts for one of the last two dimensions."""
    return (before, after, 0, 0) if dim == 3 else (0, 0, before, after)


# ---- records: the native library's CPU and CUDA functions take the same arguments ------------------------------------


def _small(height: int, width: int, stride: int = 2, pad0: int = 1, pad1: int = 1, **rest: Any) -> tuple[int, int]:
    return (height + pad0 + pad1 - 3) // stride + 1, (width + pad0 + pad1 - 3) // stride + 1


def _check_options(op: str, a: Any, height: int, width: int) -> None:
    if a.x.shape[1] == 0:
        raise ValueError(f"{op}: x must have at least one channel, got {tuple(a.x.shape)}")
    if a.stride not in (1, 2):
        raise ValueError(f"{op}: stride must be 1 or 2, got {a.stride}")
    if not (0 <= a.pad0 <= 2 and 0 <= a.pad1 <= 2):
        raise ValueError(f"{op}: pad0 and pad1 must be 0, 1 or 2, got {a.pad0} and {a.pad1}")
    if a.mode not in ("zero", "reflect"):
        raise ValueError(f"{op}: mode must be 'zero' or 'reflect', got {a.mode!r}")
    least = max(3 - a.pad0 - a.pad1, 1, 1 + max(a.pad0, a.pad1) if a.mode == "reflect" else 1)
    if height < least or width < least:
        raise ValueError(f"{op}: planes must be at least {least} x {least} for this padding, got {height} x {width}")


def _up_check(a: Any) -> None:
    _check_options("blur_up", a, a.height, a.width)
    rows, columns = _small(a.height, a.width, a.stride, a.pad0, a.pad1)
    if tuple(a.x.shape[2:]) != (rows, columns):
        raise ValueError(
            f"blur_up: x must be (B, C, {rows}, {columns}) to become {a.height} x {a.width}, got {tuple(a.x.shape)}"
        )


def _down_flops(a: Any) -> int:
    """Rows first, at the full width, then columns."""
    height, width = _small(a.x.shape[2], a.x.shape[3], a.stride, a.pad0, a.pad1)
    return a.x.shape[0] * a.x.shape[1] * height * (5 * a.x.shape[3] + 4 * width)


_CASES: tuple[tuple[str, bool, tuple[int, ...], dict[str, Any]], ...] = (
    ("halve, odd sizes", False, (2, 3, 7, 9), {}),
    ("blur, same size, reflect", False, (2, 2, 5, 37), {"stride": 1, "mode": "reflect"}),
    ("before a strided convolution", False, (1, 3, 6, 8), {"stride": 1, "pad0": 2, "pad1": 1, "gain": 0.5}),
    ("halve, reflect, wide padding", False, (1, 2, 4, 6), {"pad0": 2, "pad1": 2, "mode": "reflect"}),
    ("no padding", False, (1, 1, 3, 70), {"pad0": 0, "pad1": 0}),
    ("one element, zero", False, (2, 1, 1, 1), {"stride": 1}),
    ("halve for the skip, 128 x 128", True, (8, 128, 128, 128), {}),
    ("blur at 128 x 128", True, (8, 128, 128, 128), {"stride": 1, "mode": "reflect"}),
    ("halve for the skip, 256 x 256", True, (4, 64, 256, 256), {}),
)

blur_down = Op(
    "blur_down",
    ref=blur_down_ref,
    out=lambda a, backend: (
        a.x.new_empty(*a.x.shape[:2], *_small(a.x.shape[2], a.x.shape[3], a.stride, a.pad0, a.pad1)),
    ),
    shapes={"x": "B C H W"},
    check=lambda a: _check_options("blur_down", a, *a.x.shape[2:]),
    **twins(
        "blur_down x y stride pad0 pad1 reflect gain",
        "blur_up d_y d_x stride pad0 pad1 reflect gain",
        why_no_cuda=lambda a: over_side(*a.x.shape[2:]),
        reflect=lambda a: a.mode == "reflect",
    ),
    samples=[drawn(label, real, x=shape, **options) for label, real, shape, options in _CASES],
    flops=_down_flops,
)

blur_up = Op(
    "blur_up",
    ref=blur_up_ref,
    out=lambda a, backend: (a.x.new_empty(*a.x.shape[:2], a.height, a.width),),
    shapes={"x": "B C H W"},
    check=_up_check,
    **twins(
        "blur_up x y stride pad0 pad1 reflect gain",
        "blur_down d_y d_x stride pad0 pad1 reflect gain",
        why_no_cuda=lambda a: over_side(a.height, a.width),
        reflect=lambda a: a.mode == "reflect",
    ),
    samples=[
        drawn(label, real, x=(*shape[:2], *_small(*shape[2:], **options)), height=shape[2], width=shape[3], **options)
        for label, real, shape, options in _CASES
    ],
    flops=lambda a: 3 * a.x.numel() + 5 * math.prod(a.x.shape[:2]) * a.height * a.width,
)
