# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""Casts to float8 with a scale: what goes into an FP8 GEMM (`fp8_linear`).

    scale = max(amax(|v|) / TOP, 2^-126)      data = round(v / scale)      v ~= data * scale

TOP is 448 for e4m3 (3 bits of mantissa: activations and weights) and 57344 for e5m2 (2 bits, more range: gradients).
The amax is that of the tensor in hand, not of an earlier step ("current scaling"), and stays on the device. The largest
value lands on +-TOP by construction, so nothing is ever clipped; NaN or infinity anywhere makes all values that share
its scale NaN, so that an overflow is seen.

    fp8_quantize          one scale per row (..., 1), or one for the tensor
    fp8_quantize_columns  one scale per column, written transposed: both operands of a GEMM that reduces over rows need
                          the reduction in the last dimension, padded with zeros to a multiple of 16
    transpose_pad         the same transposition for data that is float8 already (as bytes)
    adaln_quantize        norm + modulation + fp8_quantize per row: what follows is a linear layer, so the result is
                          written once, in one byte, and never read back in between

`factor` multiplies v first. It carries the scale of the *other* operand where that runs along the reduction: see
`fp8_linear`. The kernels are in `_fp8_triton`; float8 conversions exist from compute capability 8.9 on. On the CPU the
reference runs: it emulates, for tests.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import _adaln_triton, _fp8_triton
from ._op import Op
from ._record import TOKEN_SHAPES, Backend, Sample
from ._tiles import arch, over_grid, over_row
from .adaln import SHAPES, adaln_ref, check_norm, norm_sample, real_norm_samples

__all__ = [
    "E4M3",
    "E5M2",
    "adaln_quantize",
    "adaln_quantize_ref",
    "fp8_quantize",
    "fp8_quantize_columns",
    "fp8_quantize_columns_ref",
    "fp8_quantize_ref",
    "padded_rows",
    "transpose_pad",
    "transpose_pad_ref",
]

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
_KINDS = {"e4m3": E4M3, "e5m2": E5M2}
_PER = ("row", "tensor")
_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_WIDE = (torch.float32, torch.float64)
_PAD = 16  # an FP8 GEMM's operands are read in 16 bytes


def padded_rows(rows: int) -> int:
    """The rows (at least one) rounded up to what an FP8 GEMM can reduce over: a multiple of 16."""
    return max(_PAD, -(-rows // _PAD) * _PAD)


def _scaled(v: Tensor, dims: tuple[int, ...] | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(data, scale); dims None: one scale for all."""
    if v.numel() == 0:
        amax = v.new_zeros([1 if dims and i - v.ndim in dims else n for i, n in enumerate(v.shape)] if dims else [])
    else:
        amax = v.abs().amax() if dims is None else v.abs().amax(dims, keepdim=True)
    scale = (amax / torch.finfo(dtype).max).clamp(min=_fp8_triton.MIN_SCALE)
    top = torch.finfo(dtype).max
    # nothing to clamp, but that torch's cast from fp64 may round 1 + 2^-53 the other way
    return (v * (1.0 / scale)).clamp(-top, top).to(dtype), scale


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(torch.float32, x.dtype))


def fp8_quantize_ref(
    x: Tensor, kind: str = "e4m3", per: str = "row", factor: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """v = x * factor as float8 and its scale, v ~= data * scale.

    x (..., K) fp32, bf16 or fp16. kind: "e4m3" or "e5m2". per: "row" (the last dimension) or "tensor".
    factor (K,) fp32, optional, for per="row".
    Returns data like x in float8 and the scale fp32: (..., 1), or () for per="tensor". No gradients.
    ValueError for an unknown kind or per, or where factor does not fit.
    """
    v = _wide(x) if factor is None else _wide(x) * factor
    return _scaled(v, (-1,) if per == "row" else None, _KINDS[kind])


def fp8_quantize_columns_ref(x: Tensor, kind: str = "e5m2", factor: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """v = factor[:, None] * x as float8, one scale per column, transposed.

    x (M, K) fp32, bf16 or fp16. kind: "e4m3" or "e5m2". factor (M,) fp32, optional.
    Returns data (K, P) float8 with P = M rounded up to a multiple of 16 (at least 16), zero from M on, and the scale
    (K, 1) fp32. No gradients. ValueError for an unknown kind or shapes that do not fit.
    """
    v = _wide(x) if factor is None else _wide(x) * factor[:, None]
    data, scale = _scaled(v.t(), (-1,), _KINDS[kind])
    return transpose_pad_ref(data.t().contiguous().view(torch.uint8)).view(data.dtype), scale


def transpose_pad_ref(x: Tensor) -> Tensor:
    """x (M, K) uint8 (float8 by its bytes) -> (K, P), P = M rounded up to a multiple of 16 (at least 16), zero from M
    on. ValueError when x has not two dimensions."""
    y = x.new_zeros(x.shape[1], padded_rows(x.shape[0]))
    y[:, : x.shape[0]] = x.t()
    return y


def adaln_quantize_ref(
    x: Tensor,
    shift: Tensor | None = None,
    scale: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-6,
    offset: float = 1.0,
    norm: str = "layer",
) -> tuple[Tensor, Tensor, Tensor]:
    """`adaln` (in fp32, unrounded) and `fp8_quantize(..., "e4m3", "row")` of its result.

    Arguments as `adaln`'s, each in its own dtype (fp32, bf16 or fp16).
    Returns data (B, N, D) e4m3, row_scale (B, N, 1) fp32, and stats (B, N, 2) fp32: mean (0 for "rms") and
    1 / sqrt(var + eps) of each row, what adaln's backward needs. No gradients. ValueError when shapes do not fit.
    """
    v = _wide(x)
    shift, scale, weight, bias = (None if t is None else _wide(t) for t in (shift, scale, weight, bias))
    data, row_scale = _scaled(adaln_ref(v, shift, scale, weight, bias, eps, offset, "", norm), (-1,), E4M3)
    if norm == "rms":
        mean, var = torch.zeros_like(v[..., 0]), v.square().mean(-1)
    else:
        var, mean = torch.var_mean(v, -1, correction=0)
    return data, row_scale, torch.stack((mean, (var + eps).rsqrt()), -1)


def _check_kind(op: str, kind: str) -> None:
    if kind not in _KINDS:
        raise ValueError(f"{op}: kind must be one of {', '.join(_KINDS)}, got {kind!r}")


def _check(a):
    _check_kind("fp8_quantize", a.kind)
    if a.per not in _PER:
        raise ValueError(f"fp8_quantize: per must be one of {', '.join(_PER)}, got {a.per!r}")
    if a.per == "tensor" and a.factor is not None:
        raise ValueError("fp8_quantize: factor goes with per='row'; multiply x before")


def _no_float8() -> str | None:
    return f"sm_{arch()} has no float8 conversions; they need compute capability 8.9" if arch() < 89 else None


def _why_not_rows(a):
    return _no_float8() or (None if getattr(a, "per", "row") == "tensor" else over_row(a.x.shape[-1]))


def _why_not_tiles(a):
    return (None if a.x.dtype == torch.uint8 else _no_float8()) or over_grid(rows=-(-a.x.shape[0] // 64))


def _columns(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Room for x (M, K), transposed and padded."""
    return x.new_empty((x.shape[1], padded_rows(x.shape[0])), dtype=dtype)


def _sample(
    label: str, shape: tuple[int, ...], kind: str, factor: int | None, real: bool = False, **per: str
) -> Sample:
    """factor: the dimension that it goes along."""

    def make(randn: Callable[..., Tensor]) -> dict[str, Any]:
        wide = {} if factor is None else {"factor": randn(shape[factor], dtype=torch.float32).abs()}
        return {"x": 3 * randn(*shape), "kind": kind, **per, **wide}

    return Sample(label, make, real)


def _bytes_sample(label: str, shape: tuple[int, int], real: bool = False) -> Sample:
    return Sample(label, lambda randn: {"x": (50 * randn(*shape).abs()).to(torch.uint8)}, real)


def _real_samples(batch: int, n: int, width: int, label: str) -> list[Sample]:
    return [
        _sample(f"{label}, rows", (batch, n, width), "e4m3", None, True, per="row"),
        _sample(f"{label}, tensor", (batch, n, width), "e4m3", None, True, per="tensor"),
        _sample(f"{label}, gradient rows", (batch * n, width), "e5m2", -1, True, per="row"),
    ]


# ---- records -------------------------------------------------------------------------------------------------------

fp8_quantize = Op(
    "fp8_quantize",
    ref=fp8_quantize_ref,
    shapes={"x": "... K", "factor": "K"},
    check=_check,
    roles={"x": _FLOATS, "factor": _WIDE},
    out=lambda a, backend: (
        torch.empty_like(a.x, dtype=_KINDS[a.kind], memory_format=torch.contiguous_format),
        a.x.new_empty((*a.x.shape[:-1], 1) if a.per == "row" else (), dtype=torch.float32),
    ),
    outputs=("data", "scale"),
    differentiable=False,
    cuda=[Backend("triton", _fp8_triton.quantize, why_not=_why_not_rows)],
    samples=[
        _sample("rows, e4m3", (3, 5, 48), "e4m3", None, per="row"),
        _sample("tensor, e4m3", (3, 7, 33), "e4m3", None, per="tensor"),
        _sample("rows, e5m2, factor", (4, 20), "e5m2", -1, per="row"),
        _sample("tensor, e5m2, several partial maxima", (5, 1000), "e5m2", None, per="tensor"),
        _sample("one element", (1,), "e4m3", None, per="row"),
        *(sample for shape in TOKEN_SHAPES for sample in _real_samples(*shape)),
    ],
    flops=lambda a: 3 * a.x.numel(),
)

fp8_quantize_columns = Op(
    "fp8_quantize_columns",
    ref=fp8_quantize_columns_ref,
    shapes={"x": "M K", "factor": "M"},
    check=lambda a: _check_kind("fp8_quantize_columns", a.kind),
    roles={"x": _FLOATS, "factor": _WIDE},
    out=lambda a, backend: (
        _columns(a.x, _KINDS[a.kind]),
        a.x.new_empty((a.x.shape[1], 1), dtype=torch.float32),
    ),
    outputs=("data", "scale"),
    differentiable=False,
    cuda=[Backend("triton", _fp8_triton.quantize_columns, why_not=_why_not_tiles)],
    samples=[
        _sample("few rows, e5m2, factor", (7, 48), "e5m2", 0),
        _sample("whole tiles", (64, 64), "e4m3", None),
        _sample("several tiles, odd", (145, 70), "e5m2", 0),
        *(_sample(f"{label}, gradient", (b * n, d), "e5m2", 0, True) for b, n, d, label in TOKEN_SHAPES),
    ],
    flops=lambda a: 3 * a.x.numel(),
)

transpose_pad = Op(
    "transpose_pad",
    ref=transpose_pad_ref,
    shapes={"x": "M K"},
    roles={"x": (torch.uint8,)},
    out=lambda a, backend: (_columns(a.x, torch.uint8),),
    differentiable=False,
    cuda=[Backend("triton", _fp8_triton.transpose_pad, why_not=_why_not_tiles)],
    samples=[
        _bytes_sample("few rows", (7, 48)),
        _bytes_sample("whole tiles", (64, 128)),
        _bytes_sample("odd", (100, 33)),
        *(_bytes_sample(label, (b * n, d), real=True) for b, n, d, label in TOKEN_SHAPES),
    ],
    flops=lambda a: 0,
)

adaln_quantize = Op(
    "adaln_quantize",
    ref=adaln_quantize_ref,
    shapes=SHAPES,
    check=lambda a: check_norm("adaln_quantize", a),
    roles=dict.fromkeys(SHAPES, _FLOATS),
    out=lambda a, backend: (
        torch.empty_like(a.x, dtype=E4M3, memory_format=torch.contiguous_format),
        a.x.new_empty((*a.x.shape[:2], 1), dtype=torch.float32),
        a.x.new_empty((*a.x.shape[:2], 2), dtype=torch.float32),
    ),
    outputs=("y", "row_scale", "stats"),
    differentiable=False,
    cuda=[Backend("triton", _adaln_triton.forward, why_not=_why_not_rows)],
    samples=[
        norm_sample("DiT: per image", (3, 5, 48), 0, False),
        norm_sample("plain norm, affine", (2, 5, 33), None, True),
        norm_sample("MoVQ: last tokens, plain scale", (2, 6, 64), 4, False, offset=0.0),
        norm_sample("LightningDiT: RMSNorm, per image", (2, 5, 33), 0, True, norm="rms"),
        norm_sample("one row", (1, 1, 8), 0, True),
        *real_norm_samples(),
    ],
    flops=lambda a: 11 * a.x.numel(),
)
