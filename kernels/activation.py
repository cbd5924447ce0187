# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""bias_gelu and swiglu: what stands between the two linears of an MLP, each in one pass forward and one backward.

    bias_gelu:  y = gelu(x + bias)       gelu(v) = v Phi(v) ("none": erf), or v s(2u), u = sqrt(2/pi)(v + 0.044715 v^3)
                                         ("tanh": Hendrycks & Gimpel 2016, arXiv 1606.08415; s the logistic function)
    swiglu:     y = silu(a) * b, x = [a | b]        silu(a) = a s(a)        (Shazeer 2020, arXiv 2002.05202)

Both save x only: the backward recomputes the activation. The gradient of bias is summed over chunks of rows in fp32 and
the chunks in order, so results do not depend on the schedule. fp32 inside, rounded once. tanh-GELU is the logistic form
of v (1 + tanh u) / 2: one exponential and one division. The native half (csrc/cpu/activation.cpp) also serves
`packed_linear.PackedLinear`, in place.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ._native_call import native
from ._op import Op
from ._record import Backend, Sample, drawn
from ._tiles import ELEMENTWISE, GELU_ROWS
from ._triton import add_up, tl, triton

__all__ = ["bias_gelu", "bias_gelu_ref", "swiglu", "swiglu_ref"]

_KINDS = {"tanh": 0, "none": 2}  # the native library's numbers


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


def _grid(rows: int, width: int) -> tuple[int, int]:
    return rows, -(-width // ELEMENTWISE["BLOCK_D"])


def _gelu_forward(a, out):
    width = a.x.shape[-1]
    grid = _grid(a.x.numel() // width, width)
    _bias_gelu_fwd_kernel[grid](a.x, a.bias, out.y, width, TANH=a.approximate == "tanh", **ELEMENTWISE)


def _gelu_backward(a, out, g, d):
    width = a.x.shape[-1]
    rows = a.x.numel() // width
    chunks = -(-rows // GELU_ROWS)
    sums = None if d.bias is None else a.x.new_empty(chunks, width, dtype=torch.float32)
    _bias_gelu_bwd_kernel[_grid(chunks, width)](
        g.y, a.x, a.bias, d.x, sums, rows, width, TANH=a.approximate == "tanh", ROWS=GELU_ROWS, **ELEMENTWISE
    )
    add_up(sums, 0, d.bias)


def _swiglu_forward(a, out):
    half = out.y.shape[-1]
    _swiglu_fwd_kernel[_grid(out.y.numel() // half, half)](a.x, out.y, half, **ELEMENTWISE)


def _swiglu_backward(a, out, g, d):
    half = g.y.shape[-1]
    _swiglu_bwd_kernel[_grid(g.y.numel() // half, half)](g.y, a.x, d.x, half, **ELEMENTWISE)


def _gelu_check(a):
    if a.approximate not in _KINDS:
        raise ValueError(f"bias_gelu: approximate must be 'none' or 'tanh', got {a.approximate!r}")


def _swiglu_check(a):
    if a.x.shape[-1] % 2:
        raise ValueError(f"swiglu: x must be (..., 2H), its last dimension even, got {tuple(a.x.shape)}")


def _gelu(label: str, shape: tuple[int, ...], approximate: str, bias: bool, real: bool = False) -> Sample:
    def make(randn: Callable[..., Tensor]) -> dict[str, Any]:
        args: dict[str, Any] = {"x": 2 * randn(*shape), "approximate": approximate}
        return args | ({"bias": randn(shape[-1], dtype=torch.float32)} if bias else {})

    return Sample(label, make, real)


bias_gelu = Op(
    "bias_gelu",
    ref=bias_gelu_ref,
    shapes={"x": "... D", "bias": "D"},
    check=_gelu_check,
    roles={"bias": "fp32"},
    written=("x",),
    cpu=[
        native(
            "bias_act_fwd x bias y kind",
            "bias_act_bwd d_y x bias d_x d_bias kind",
            kind=lambda a: _KINDS[a.approximate],
        )
    ],
    cuda=[Backend("triton", _gelu_forward, _gelu_backward)],
    samples=[
        _gelu("erf, bias", (2, 5, 33), "none", True),
        _gelu("tanh, bias, more rows than one chunk", (2, 21, 16), "tanh", True),
        _gelu("erf, no bias", (3, 7, 20), "none", False),
        _gelu("tanh, one row", (1, 9), "tanh", False),
        _gelu("MAETok-B 256 px", (4, 385, 3072), "none", True, real=True),
        _gelu("MAETok-B 512 px", (4, 1153, 3072), "none", True, real=True),
        _gelu("SiT-XL 128 tokens", (4, 128, 4608), "tanh", True, real=True),
        _gelu("SiT-XL/2 1024 tokens", (4, 1024, 4608), "tanh", True, real=True),
    ],
    flops=lambda a: 10 * a.x.numel(),
)

swiglu = Op(
    "swiglu",
    ref=swiglu_ref,
    shapes={"x": "... H"},
    check=_swiglu_check,
    out=lambda a, backend: (a.x.new_empty(*a.x.shape[:-1], a.x.shape[-1] // 2),),
    cpu=[native("swiglu_fwd x y", "swiglu_bwd d_y x d_x")],
    cuda=[Backend("triton", _swiglu_forward, _swiglu_backward)],
    samples=[
        drawn("odd half", x=(2, 5, 2 * 33)),
        drawn("wide rows", x=(3, 2, 2 * 48)),
        drawn("one row", x=(1, 2 * 8)),
        drawn("LightningDiT-XL 256 tokens", True, x=(4, 256, 2 * 3072)),
        drawn("LightningDiT-XL 1024 tokens", True, x=(4, 1024, 2 * 3072)),
    ],
    flops=lambda a: 5 * a.x.numel() // 2,
)
