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

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ._op import EMPTY, Cost, Op, Sample
from ._twins import twins

__all__ = ["blur_down", "blur_down_ref", "blur_up", "blur_up_ref"]


# ---- reference -----------------------------------------------------------------------------------------------------


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


# ---- launchers: the native library's CPU and CUDA functions take the same arguments ----------------------------------


def _small(height: int, width: int, stride: int, pad0: int, pad1: int) -> tuple[int, int]:
    return (height + pad0 + pad1 - 3) // stride + 1, (width + pad0 + pad1 - 3) // stride + 1


def _down_forward(run: Callable[..., None], *args: Any) -> tuple[Tensor, ...]:
    x, stride, pad0, pad1, mode, gain = args
    (y,) = _down_fake("", *args)
    run(x, y, stride, pad0, pad1, int(mode == "reflect"), gain)
    return (y,)


def _down_backward(
    run: Callable[..., None], dy: Tensor, saved: Sequence[Tensor], args: tuple[Any, ...], needs: Sequence[bool]
) -> Sequence[Tensor | None]:
    x, stride, pad0, pad1, mode, gain = args
    dx = torch.empty_like(x)
    run(dy, dx, stride, pad0, pad1, int(mode == "reflect"), gain)
    return [dx, None, None, None, None, None]


def _up_forward(run: Callable[..., None], *args: Any) -> tuple[Tensor, ...]:
    x, _height, _width, stride, pad0, pad1, mode, gain = args
    (y,) = _up_fake("", *args)
    run(x, y, stride, pad0, pad1, int(mode == "reflect"), gain)
    return (y,)


def _up_backward(
    run: Callable[..., None], dy: Tensor, saved: Sequence[Tensor], args: tuple[Any, ...], needs: Sequence[bool]
) -> Sequence[Tensor | None]:
    x, _height, _width, stride, pad0, pad1, mode, gain = args
    dx = torch.empty_like(x)
    run(dy, dx, stride, pad0, pad1, int(mode == "reflect"), gain)
    return [dx, None, None, None, None, None, None, None]


# ---- records -------------------------------------------------------------------------------------------------------


def _check_options(op: str, x: Tensor, height: int, width: int, stride: int, pad0: int, pad1: int, mode: str) -> None:
    if x.ndim != 4:
        raise ValueError(f"{op}: x must be (B, C, H, W), got {tuple(x.shape)}")
    if stride not in (1, 2):
        raise ValueError(f"{op}: stride must be 1 or 2, got {stride}")
    if not (0 <= pad0 <= 2 and 0 <= pad1 <= 2):
        raise ValueError(f"{op}: pad0 and pad1 must be 0, 1 or 2, got {pad0} and {pad1}")
    if mode not in ("zero", "reflect"):
        raise ValueError(f"{op}: mode must be 'zero' or 'reflect', got {mode!r}")
    least = max(3 - pad0 - pad1, 1, 1 + max(pad0, pad1) if mode == "reflect" else 1)
    if height < least or width < least:
        raise ValueError(f"{op}: planes must be at least {least} x {least} for this padding, got {height} x {width}")


def _down_check(x: Tensor, stride: int, pad0: int, pad1: int, mode: str, gain: float) -> None:
    height, width = x.shape[2:] if x.ndim == 4 else (1, 1)
    _check_options("blur_down", x, height, width, stride, pad0, pad1, mode)


def _up_check(x: Tensor, height: int, width: int, stride: int, pad0: int, pad1: int, mode: str, gain: float) -> None:
    _check_options("blur_up", x, height, width, stride, pad0, pad1, mode)
    small = _small(height, width, stride, pad0, pad1)
    if tuple(x.shape[2:]) != small:
        raise ValueError(
            f"blur_up: x must be (B, C, {small[0]}, {small[1]}) to become {height} x {width}, got {tuple(x.shape)}"
        )


def _unsupported(backend: str, x: Tensor, *rest: Any) -> str | None:
    return EMPTY if x.numel() == 0 else None


def _down_fake(name: str, *args: Any) -> tuple[Tensor, ...]:
    x, stride, pad0, pad1 = args[:4]
    return (x.new_empty(*x.shape[:2], *_small(x.shape[2], x.shape[3], stride, pad0, pad1)),)


def _up_fake(name: str, *args: Any) -> tuple[Tensor, ...]:
    x, height, width = args[:3]
    return (x.new_empty(*x.shape[:2], height, width),)


def _down_case(label: str, shape: Sequence[int], real: bool = False, **options: Any) -> Sample:
    return Sample(label, lambda randn: {"x": randn(*shape)} | options, real)


def _up_case(label: str, shape: Sequence[int], real: bool = False, **options: Any) -> Sample:
    """shape: of the result."""
    small = _small(shape[2], shape[3], options.get("stride", 2), options.get("pad0", 1), options.get("pad1", 1))
    sizes = {"height": shape[2], "width": shape[3]}
    return Sample(label, lambda randn: {"x": randn(*shape[:2], *small)} | sizes | options, real)


_CASES: tuple[tuple[str, tuple[int, ...], dict[str, Any]], ...] = (
    ("halve, odd sizes", (2, 3, 7, 9), {}),
    ("blur, same size, reflect", (2, 2, 5, 37), {"stride": 1, "mode": "reflect"}),
    ("before a strided convolution", (1, 3, 6, 8), {"stride": 1, "pad0": 2, "pad1": 1, "gain": 0.5}),
    ("halve, reflect, wide padding", (1, 2, 4, 6), {"pad0": 2, "pad1": 2, "mode": "reflect"}),
    ("no padding", (1, 1, 3, 70), {"pad0": 0, "pad1": 0}),
    ("one element, zero", (2, 1, 1, 1), {"stride": 1}),
)
_REAL: tuple[tuple[str, tuple[int, ...], dict[str, Any]], ...] = (
    ("halve for the skip, 128 x 128", (8, 128, 128, 128), {}),
    ("blur at 128 x 128", (8, 128, 128, 128), {"stride": 1, "mode": "reflect"}),
    ("halve for the skip, 256 x 256", (4, 64, 256, 256), {}),
)


def _down_samples() -> Iterable[Sample]:
    for label, shape, options in _CASES:
        yield _down_case(label, shape, **options)
    for label, shape, options in _REAL:
        yield _down_case(label, shape, True, **options)


def _up_samples() -> Iterable[Sample]:
    for label, shape, options in _CASES:
        yield _up_case(label, shape, **options)
    for label, shape, options in _REAL:
        yield _up_case(label, shape, True, **options)


def _down_cost(x: Tensor, stride: int = 2, pad0: int = 1, pad1: int = 1, mode: str = "zero", gain: float = 1.0) -> Cost:
    height, width = _small(x.shape[2], x.shape[3], stride, pad0, pad1)
    out = x.shape[0] * x.shape[1] * height * width
    return Cost(5 * x.shape[0] * x.shape[1] * height * x.shape[3] + 4 * out, (x.numel() + out) * x.element_size(), 1)


def _up_cost(x: Tensor, height: int, width: int, *rest: Any, **options: Any) -> Cost:
    out = x.shape[0] * x.shape[1] * height * width
    return Cost(3 * x.numel() + 5 * out, (x.numel() + out) * x.element_size(), 1)


_blur_down_cpu, _blur_down_cuda = twins("blur_down", _down_forward, _down_backward, ("blur_down", "blur_up"))
blur_down = Op(
    "blur_down",
    ref=blur_down_ref,
    cpu=(_blur_down_cpu,),
    cuda=(_blur_down_cuda,),
    fake=_down_fake,
    check=_down_check,
    unsupported=_unsupported,
    samples=_down_samples,
    cost=_down_cost,
)

_blur_up_cpu, _blur_up_cuda = twins("blur_up", _up_forward, _up_backward, ("blur_up", "blur_down"))
blur_up = Op(
    "blur_up",
    ref=blur_up_ref,
    cpu=(_blur_up_cpu,),
    cuda=(_blur_up_cuda,),
    fake=_up_fake,
    check=_up_check,
    unsupported=_unsupported,
    samples=_up_samples,
    cost=_up_cost,
)
