# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""bias_gelu and swiglu: what stands between the two linears of an MLP, each in one pass forward and one backward.

    bias_gelu:  y = gelu(x + bias)       gelu(v) = v Phi(v) ("none": erf), or v s(2u), u = sqrt(2/pi)(v + 0.044715 v^3)
                                         ("tanh": Hendrycks & Gimpel 2016, arXiv 1606.08415; s the logistic function)
    swiglu:     y = silu(a) * b, x = [a | b]        silu(a) = a s(a)        (Shazeer 2020, arXiv 2002.05202)

Both save x only: the backward recomputes the activation. The gradient of bias is summed over chunks of rows in fp32 and
the chunks in order, so results do not depend on the schedule. fp32 inside, rounded once. tanh-GELU is the logistic form
of v (1 + tanh u) / 2: one exponential and one division. The native half (csrc/cpu/activation.cpp) also serves
`linear.PackedLinear`, in place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _native
from ._op import EMPTY, Backend, Cost, Op, Sample
from ._tiles import ELEMENTWISE
from ._triton import tl, triton

__all__ = ["bias_gelu", "bias_gelu_ref", "swiglu", "swiglu_ref"]

_KINDS = {"tanh": 0, "none": 2}  # the native library's numbers
_ROWS = 32  # rows one program of the backward sums d_bias over


# ---- reference -----------------------------------------------------------------------------------------------------


def bias_gelu_ref(x: Tensor, bias: Tensor | None = None, approximate: str = "none") -> Tensor:
    """gelu(x + bias).

    x (..., D) bf16, fp16 or fp32 (fp64: reference only); bias (D,) or None, read in fp32. approximate: "none" (erf:
    timm's ViT, MAETok) or "tanh" (DiT, SiT), as torch's. Returns x's shape and dtype. Raises ValueError when bias does
    not fit or approximate is unknown.
    """
    return F.gelu(x if bias is None else x + bias.to(x), approximate=approximate)


def swiglu_ref(x: Tensor) -> Tensor:
    """silu(a) * b, where x = [a | b] along the last dimension: x (..., 2H) -> (..., H).

    bf16, fp16 or fp32 (fp64: reference only). Raises ValueError when the last dimension is odd.
    """
    a, b = x.chunk(2, dim=-1)
    return F.silu(a) * b


# ---- Triton --------------------------------------------------------------------------------------------------------


@triton.jit
def _logistic(t):
    """(s(t), 1 - s(t)), the latter without cancellation."""
    e = tl.exp(-tl.abs(t))
    larger = 1.0 / (1.0 + e)
    return tl.where(t < 0, e * larger, larger), tl.where(t < 0, larger, e * larger)


@triton.jit
def _bias_gelu_fwd_kernel(x_ptr, bias_ptr, y_ptr, D, TANH: tl.constexpr, BLOCK_D: tl.constexpr):
    """One program: BLOCK_D columns of one row."""
    row = tl.program_id(0).to(tl.int64)
    offs_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask = offs_d < D
    v = tl.load(x_ptr + row * D + offs_d, mask=mask, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        v += tl.load(bias_ptr + offs_d, mask=mask, other=0.0)
    if TANH:
        s, _ = _logistic(1.5957691216057308 * v * (1.0 + 0.044715 * v * v))
        y = v * s
    else:
        y = 0.5 * v * (1.0 + tl.erf(v * 0.7071067811865476))
    tl.store(y_ptr + row * D + offs_d, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _bias_gelu_bwd_kernel(
    dy_ptr, x_ptr, bias_ptr, dx_ptr, dbias_ptr, M, D, TANH: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr
):
    """One program: BLOCK_D columns of ROWS rows; its sum for d_bias goes to one row of (chunks, D) fp32."""
    pid_m = tl.program_id(0).to(tl.int64)
    offs_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask = offs_d < D
    total = tl.zeros((BLOCK_D,), tl.float32)
    for i in range(0, ROWS):
        row = pid_m * ROWS + i
        live = mask & (row < M)
        v = tl.load(x_ptr + row * D + offs_d, mask=live, other=0.0).to(tl.float32)
        d = tl.load(dy_ptr + row * D + offs_d, mask=live, other=0.0).to(tl.float32)
        if bias_ptr is not None:
            v += tl.load(bias_ptr + offs_d, mask=mask, other=0.0)
        if TANH:
            cubic = 0.044715 * v * v
            s, rest = _logistic(1.5957691216057308 * v * (1.0 + cubic))
            d *= s + v * 1.5957691216057308 * (1.0 + 3.0 * cubic) * s * rest
        else:
            d *= 0.5 * (1.0 + tl.erf(v * 0.7071067811865476)) + v * 0.3989422804014327 * tl.exp(-0.5 * v * v)
        tl.store(dx_ptr + row * D + offs_d, d.to(dx_ptr.dtype.element_ty), mask=live)
        total += d
    if dbias_ptr is not None:
        tl.store(dbias_ptr + pid_m * D + offs_d, total, mask=mask)


@triton.jit
def _swiglu_fwd_kernel(x_ptr, y_ptr, H, BLOCK_D: tl.constexpr):
    """One program: BLOCK_D columns of one row."""
    row = tl.program_id(0).to(tl.int64)
    offs_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask = offs_d < H
    a = tl.load(x_ptr + row * 2 * H + offs_d, mask=mask, other=0.0).to(tl.float32)
    b = tl.load(x_ptr + row * 2 * H + H + offs_d, mask=mask, other=0.0).to(tl.float32)
    s, _ = _logistic(a)
    tl.store(y_ptr + row * H + offs_d, (a * s * b).to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _swiglu_bwd_kernel(dy_ptr, x_ptr, dx_ptr, H, BLOCK_D: tl.constexpr):
    """One program: BLOCK_D columns of one row, both halves."""
    row = tl.program_id(0).to(tl.int64)
    offs_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask = offs_d < H
    a = tl.load(x_ptr + row * 2 * H + offs_d, mask=mask, other=0.0).to(tl.float32)
    b = tl.load(x_ptr + row * 2 * H + H + offs_d, mask=mask, other=0.0).to(tl.float32)
    d = tl.load(dy_ptr + row * H + offs_d, mask=mask, other=0.0).to(tl.float32)
    s, rest = _logistic(a)
    da = d * b * (s + a * s * rest)
    tl.store(dx_ptr + row * 2 * H + offs_d, da.to(dx_ptr.dtype.element_ty), mask=mask)
    tl.store(dx_ptr + row * 2 * H + H + offs_d, (d * a * s).to(dx_ptr.dtype.element_ty), mask=mask)


# ---- launchers -----------------------------------------------------------------------------------------------------


def _gelu_triton_forward(x: Tensor, bias: Tensor | None, approximate: str) -> tuple[Tensor, ...]:
    width = x.shape[-1]
    y = torch.empty_like(x)
    grid = (x.numel() // width, -(-width // ELEMENTWISE["BLOCK_D"]))
    _bias_gelu_fwd_kernel[grid](x, bias, y, width, TANH=approximate == "tanh", **ELEMENTWISE)
    return (y,)


def _gelu_triton_backward(
    dy: Tensor, saved: Sequence[Tensor], args: tuple[Any, ...], needs: Sequence[bool]
) -> Sequence[Tensor | None]:
    x, bias, approximate = args
    width = x.shape[-1]
    rows = x.numel() // width
    chunks = -(-rows // _ROWS)
    dx = torch.empty_like(x)
    dbias = x.new_empty(chunks, width, dtype=torch.float32) if bias is not None and needs[1] else None
    grid = (chunks, -(-width // ELEMENTWISE["BLOCK_D"]))
    _bias_gelu_bwd_kernel[grid](
        dy, x, bias, dx, dbias, rows, width, TANH=approximate == "tanh", ROWS=_ROWS, **ELEMENTWISE
    )
    return [dx, None if dbias is None else dbias.sum(0), None]


def _gelu_native_forward(x: Tensor, bias: Tensor | None, approximate: str) -> tuple[Tensor, ...]:
    y = torch.empty_like(x)
    _native.lib().bias_act_fwd(x, bias, y, _KINDS[approximate])
    return (y,)


def _gelu_native_backward(
    dy: Tensor, saved: Sequence[Tensor], args: tuple[Any, ...], needs: Sequence[bool]
) -> Sequence[Tensor | None]:
    x, bias, approximate = args
    dx = torch.empty_like(x)
    dbias = torch.empty_like(bias) if bias is not None and needs[1] else None
    _native.lib().bias_act_bwd(dy, x, bias, dx, dbias, _KINDS[approximate])
    return [dx, dbias, None]


def _swiglu_grid(x: Tensor) -> tuple[int, int]:
    half = x.shape[-1] // 2
    return x.numel() // x.shape[-1], -(-half // ELEMENTWISE["BLOCK_D"])


def _swiglu_triton_forward(x: Tensor) -> tuple[Tensor, ...]:
    half = x.shape[-1] // 2
    y = x.new_empty(*x.shape[:-1], half)
    _swiglu_fwd_kernel[_swiglu_grid(x)](x, y, half, **ELEMENTWISE)
    return (y,)


def _swiglu_triton_backward(
    dy: Tensor, saved: Sequence[Tensor], args: tuple[Any, ...], needs: Sequence[bool]
) -> Sequence[Tensor | None]:
    (x,) = args
    dx = torch.empty_like(x)
    _swiglu_bwd_kernel[_swiglu_grid(x)](dy, x, dx, x.shape[-1] // 2, **ELEMENTWISE)
    return [dx]


def _swiglu_native_forward(x: Tensor) -> tuple[Tensor, ...]:
    y = x.new_empty(*x.shape[:-1], x.shape[-1] // 2)
    _native.lib().swiglu_fwd(x, y)
    return (y,)


def _swiglu_native_backward(
    dy: Tensor, saved: Sequence[Tensor], args: tuple[Any, ...], needs: Sequence[bool]
) -> Sequence[Tensor | None]:
    dx = torch.empty_like(args[0])
    _native.lib().swiglu_bwd(dy, args[0], dx)
    return [dx]


# ---- records -------------------------------------------------------------------------------------------------------


def _gelu_check(x: Tensor, bias: Tensor | None, approximate: str) -> None:
    if approximate not in _KINDS:
        raise ValueError(f"bias_gelu: approximate must be 'none' or 'tanh', got {approximate!r}")
    if x.ndim == 0:
        raise ValueError("bias_gelu: x must be (..., D), got a scalar")
    if bias is not None and tuple(bias.shape) != (x.shape[-1],):
        raise ValueError(f"bias_gelu: bias must be ({x.shape[-1]},) for x {tuple(x.shape)}, got {tuple(bias.shape)}")


def _swiglu_check(x: Tensor) -> None:
    if x.ndim == 0 or x.shape[-1] % 2:
        raise ValueError(f"swiglu: x must be (..., 2H), its last dimension even, got {tuple(x.shape)}")


def _unsupported(backend: str, x: Tensor, *rest: Any) -> str | None:
    return EMPTY if x.numel() == 0 else None


def _gelu_fake(name: str, x: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    return (torch.empty_like(x, memory_format=torch.contiguous_format),)


def _swiglu_fake(name: str, x: Tensor) -> tuple[Tensor, ...]:
    return (x.new_empty(*x.shape[:-1], x.shape[-1] // 2),)


def _gelu_case(label: str, shape: tuple[int, ...], approximate: str, bias: bool, real: bool = False) -> Sample:
    def make(randn: Callable[..., Tensor]) -> dict[str, Any]:
        args: dict[str, Any] = {"x": 2 * randn(*shape), "approximate": approximate}
        return args | ({"bias": randn(shape[-1], dtype=torch.float32)} if bias else {})

    return Sample(label, make, real)


def _gelu_samples() -> Iterable[Sample]:
    yield _gelu_case("erf, bias", (2, 5, 33), "none", True)
    yield _gelu_case("tanh, bias, more rows than one chunk", (2, 21, 16), "tanh", True)
    yield _gelu_case("erf, no bias", (3, 7, 20), "none", False)
    yield _gelu_case("tanh, one row", (1, 9), "tanh", False)
    yield _gelu_case("MAETok-B 256 px", (4, 385, 3072), "none", True, real=True)
    yield _gelu_case("MAETok-B 512 px", (4, 1153, 3072), "none", True, real=True)
    yield _gelu_case("SiT-XL 128 tokens", (4, 128, 4608), "tanh", True, real=True)
    yield _gelu_case("SiT-XL/2 1024 tokens", (4, 1024, 4608), "tanh", True, real=True)


def _swiglu_case(label: str, shape: tuple[int, ...], real: bool = False) -> Sample:
    return Sample(label, lambda randn: {"x": 2 * randn(*shape)}, real)


def _swiglu_samples() -> Iterable[Sample]:
    yield _swiglu_case("odd half", (2, 5, 2 * 33))
    yield _swiglu_case("wide rows", (3, 2, 2 * 48))
    yield _swiglu_case("one row", (1, 2 * 8))
    yield _swiglu_case("LightningDiT-XL 256 tokens", (4, 256, 2 * 3072), real=True)
    yield _swiglu_case("LightningDiT-XL 1024 tokens", (4, 1024, 2 * 3072), real=True)


def _gelu_cost(x: Tensor, bias: Tensor | None = None, approximate: str = "none") -> Cost:
    size = 0 if bias is None else bias.numel() * bias.element_size()
    return Cost(10 * x.numel(), 2 * x.numel() * x.element_size() + size, 1)


def _swiglu_cost(x: Tensor) -> Cost:
    return Cost(5 * x.numel() // 2, x.numel() * x.element_size() * 3 // 2, 1)


bias_gelu = Op(
    "bias_gelu",
    ref=bias_gelu_ref,
    cpu=(Backend("native", _gelu_native_forward, _gelu_native_backward, library="native"),),
    cuda=(Backend("triton", _gelu_triton_forward, _gelu_triton_backward, library="triton"),),
    fake=_gelu_fake,
    check=_gelu_check,
    unsupported=_unsupported,
    samples=_gelu_samples,
    cost=_gelu_cost,
    fp32=frozenset({"bias"}),
)

swiglu = Op(
    "swiglu",
    ref=swiglu_ref,
    cpu=(Backend("native", _swiglu_native_forward, _swiglu_native_backward, library="native"),),
    cuda=(Backend("triton", _swiglu_triton_forward, _swiglu_triton_backward, library="triton"),),
    fake=_swiglu_fake,
    check=_swiglu_check,
    unsupported=_unsupported,
    samples=_swiglu_samples,
    cost=_swiglu_cost,
)
