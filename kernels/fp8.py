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

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from . import _fp8_triton
from ._op import EMPTY, TOKEN_SHAPES, Backend, Cost, Op, Sample
from ._tiles import MAX_ROW, arch
from .adaln import _case as adaln_case
from .adaln import _check_norm, adaln_ref

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


# ---- references ----------------------------------------------------------------------------------------------------


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
) -> tuple[Tensor, Tensor, Tensor]:
    """`adaln` (in fp32, unrounded) and `fp8_quantize(..., "e4m3", "row")` of its result.

    Arguments as `adaln`'s, each in its own dtype (fp32, bf16 or fp16).
    Returns data (B, N, D) e4m3, row_scale (B, N, 1) fp32, and stats (B, N, 2) fp32: mean and 1 / sqrt(var + eps) of
    each row, what adaln's backward needs. No gradients. ValueError when shapes do not fit together.
    """
    v = _wide(x)
    shift, scale, weight, bias = (None if t is None else _wide(t) for t in (shift, scale, weight, bias))
    data, row_scale = _scaled(adaln_ref(v, shift, scale, weight, bias, eps, offset), (-1,), E4M3)
    var, mean = torch.var_mean(v, -1, correction=0)
    return data, row_scale, torch.stack((mean, (var + eps).rsqrt()), -1)


# ---- checks --------------------------------------------------------------------------------------------------------


def _check_kind(op: str, kind: str) -> None:
    if kind not in _KINDS:
        raise ValueError(f"{op}: kind must be one of {', '.join(_KINDS)}, got {kind!r}")


def _check_factor(op: str, factor: Tensor | None, size: int) -> None:
    if factor is not None and tuple(factor.shape) != (size,):
        raise ValueError(f"{op}: factor must be ({size},), got {tuple(factor.shape)}")


def _check(x: Tensor, kind: str, per: str, factor: Tensor | None) -> None:
    _check_kind("fp8_quantize", kind)
    if per not in _PER:
        raise ValueError(f"fp8_quantize: per must be one of {', '.join(_PER)}, got {per!r}")
    if x.ndim == 0:
        raise ValueError("fp8_quantize: x must have at least one dimension")
    if per == "tensor" and factor is not None:
        raise ValueError("fp8_quantize: factor goes with per='row'; multiply x before")
    _check_factor("fp8_quantize", factor, x.shape[-1])


def _columns_check(x: Tensor, kind: str, factor: Tensor | None) -> None:
    _check_kind("fp8_quantize_columns", kind)
    _transpose_check(x, "fp8_quantize_columns")
    _check_factor("fp8_quantize_columns", factor, x.shape[0])


def _adaln_check(
    x: Tensor,
    shift: Tensor | None,
    scale: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    offset: float,
) -> None:
    _check_norm("adaln_quantize", x, shift, scale, weight, bias, eps, offset, "", "layer")


def _transpose_check(x: Tensor, op: str = "transpose_pad") -> None:
    if x.ndim != 2:
        raise ValueError(f"{op}: x must be (M, K), got {tuple(x.shape)}")


def _unsupported(backend: str, x: Tensor, *rest: Any) -> str | None:
    if x.numel() == 0:
        return EMPTY
    if arch() < 89:
        return f"sm_{arch()} has no float8 conversions; they need compute capability 8.9"
    if x.shape[-1] > MAX_ROW and "tensor" not in rest:
        return f"the last dimension is {x.shape[-1]}: a program holds one row, at most {MAX_ROW} elements"
    return None


def _tiles_unsupported(backend: str, x: Tensor, *rest: Any) -> str | None:
    if x.numel() == 0:
        return EMPTY
    if x.dtype != torch.uint8 and arch() < 89:
        return f"sm_{arch()} has no float8 conversions; they need compute capability 8.9"
    if x.shape[0] > 65535 * 64:
        return f"{x.shape[0]} rows exceed a CUDA grid's second dimension"
    return None


# ---- launchers, shapes, costs --------------------------------------------------------------------------------------


def _forward(x: Tensor, kind: str, per: str, factor: Tensor | None) -> tuple[Tensor, ...]:
    if per == "row":
        return _fp8_triton.quantize_rows(x, _KINDS[kind], factor)
    return _fp8_triton.quantize_tensor(x, _KINDS[kind])


def _fake(name: str, x: Tensor, kind: str, per: str, factor: Tensor | None) -> tuple[Tensor, ...]:
    scale = x.new_empty((*x.shape[:-1], 1) if per == "row" else (), dtype=torch.float32)
    return torch.empty_like(x, dtype=_KINDS[kind], memory_format=torch.contiguous_format), scale


def _columns_forward(x: Tensor, kind: str, factor: Tensor | None) -> tuple[Tensor, ...]:
    return _fp8_triton.quantize_columns(x, _KINDS[kind], factor, padded_rows(x.shape[0]))


def _columns_fake(name: str, x: Tensor, kind: str, factor: Tensor | None) -> tuple[Tensor, ...]:
    data = x.new_empty((x.shape[1], padded_rows(x.shape[0])), dtype=_KINDS[kind])
    return data, x.new_empty((x.shape[1], 1), dtype=torch.float32)


def _transpose_forward(x: Tensor) -> tuple[Tensor, ...]:
    return (_fp8_triton.transpose_pad(x, padded_rows(x.shape[0])),)


def _transpose_fake(name: str, x: Tensor) -> tuple[Tensor, ...]:
    return (x.new_empty((x.shape[1], padded_rows(x.shape[0]))),)


def _adaln_fake(name: str, x: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    data = torch.empty_like(x, dtype=E4M3, memory_format=torch.contiguous_format)
    batch, n, _width = x.shape
    return data, x.new_empty((batch, n, 1), dtype=torch.float32), x.new_empty((batch, n, 2), dtype=torch.float32)


def _cost(x: Tensor, kind: str = "e4m3", per: str = "row", factor: Tensor | None = None) -> Cost:
    reads = 1 if per == "row" else 2
    scales = 4 * (x.numel() // x.shape[-1] if per == "row" else 1) + (0 if factor is None else 4 * factor.numel())
    return Cost(3 * x.numel(), (reads * x.element_size() + 1) * x.numel() + scales, reads)


def _columns_cost(x: Tensor, kind: str = "e5m2", factor: Tensor | None = None) -> Cost:
    scales = 4 * x.shape[1] + (0 if factor is None else 4 * factor.numel())
    return Cost(
        3 * x.numel(), 2 * x.element_size() * x.numel() + x.shape[1] * padded_rows(x.shape[0]) + scales, launches=2
    )


def _transpose_cost(x: Tensor) -> Cost:
    return Cost(0, x.numel() + x.shape[1] * padded_rows(x.shape[0]))


def _adaln_cost(x: Tensor, *rest: Any, **named: Any) -> Cost:
    others = sum(m.numel() * m.element_size() for m in (*rest, *named.values()) if isinstance(m, Tensor))
    rows = x.numel() // x.shape[-1]
    return Cost(11 * x.numel(), (x.element_size() + 1) * x.numel() + 12 * rows + others)


# ---- samples -------------------------------------------------------------------------------------------------------


def _case(label: str, shape: tuple[int, ...], kind: str, per: str, factor: bool, real: bool = False) -> Sample:
    def make(randn: Callable[..., Tensor]) -> dict[str, Any]:
        wide = {"factor": randn(shape[-1], dtype=torch.float32).abs()} if factor else {}
        return {"x": 3 * randn(*shape), "kind": kind, "per": per, **wide}

    return Sample(label, make, real)


def _samples() -> Iterable[Sample]:
    yield _case("rows, e4m3", (3, 5, 48), "e4m3", "row", False)
    yield _case("tensor, e4m3", (3, 7, 33), "e4m3", "tensor", False)
    yield _case("rows, e5m2, factor", (4, 20), "e5m2", "row", True)
    yield _case("tensor, e5m2, several partial maxima", (5, 1000), "e5m2", "tensor", False)
    yield _case("one element", (1,), "e4m3", "row", False)
    for batch, n, width, label in TOKEN_SHAPES:
        yield _case(f"{label}, rows", (batch, n, width), "e4m3", "row", False, real=True)
        yield _case(f"{label}, tensor", (batch, n, width), "e4m3", "tensor", False, real=True)
        yield _case(f"{label}, gradient rows", (batch * n, width), "e5m2", "row", True, real=True)


def _columns_case(label: str, shape: tuple[int, int], kind: str, factor: bool, real: bool = False) -> Sample:
    def make(randn: Callable[..., Tensor]) -> dict[str, Any]:
        wide = {"factor": randn(shape[0], dtype=torch.float32).abs()} if factor else {}
        return {"x": 3 * randn(*shape), "kind": kind, **wide}

    return Sample(label, make, real)


def _columns_samples() -> Iterable[Sample]:
    yield _columns_case("few rows, e5m2, factor", (7, 48), "e5m2", True)
    yield _columns_case("whole tiles", (64, 64), "e4m3", False)
    yield _columns_case("several tiles, odd", (145, 70), "e5m2", True)
    for batch, n, width, label in TOKEN_SHAPES:
        yield _columns_case(f"{label}, gradient", (batch * n, width), "e5m2", True, real=True)


def _bytes_case(label: str, shape: tuple[int, int], real: bool = False) -> Sample:
    return Sample(label, lambda randn: {"x": (50 * randn(*shape).abs()).to(torch.uint8)}, real)


def _transpose_samples() -> Iterable[Sample]:
    yield _bytes_case("few rows", (7, 48))
    yield _bytes_case("whole tiles", (64, 128))
    yield _bytes_case("odd", (100, 33))
    for batch, n, width, label in TOKEN_SHAPES:
        yield _bytes_case(label, (batch * n, width), real=True)


def _adaln_samples() -> Iterable[Sample]:
    yield adaln_case("DiT: per image", (3, 5, 48), 0, False)
    yield adaln_case("plain norm, affine", (2, 5, 33), None, True)
    yield adaln_case("MoVQ: last tokens, plain scale", (2, 6, 64), 4, False, offset=0.0)
    yield adaln_case("one row", (1, 1, 8), 0, True)
    for batch, n, width, label in TOKEN_SHAPES:
        yield adaln_case(label, (batch, n, width), 0 if width == 1152 else None, width == 768, real=True)
    yield adaln_case("MAETok-B decoder 256 px", (4, 384, 768), 128, False, offset=0.0, real=True)


# ---- records -------------------------------------------------------------------------------------------------------

fp8_quantize = Op(
    "fp8_quantize",
    ref=fp8_quantize_ref,
    cuda=(Backend("triton", _forward, None, library="triton"),),
    fake=_fake,
    outputs=2,
    differentiable=False,
    check=_check,
    unsupported=_unsupported,
    samples=_samples,
    cost=_cost,
    own_dtypes={"x": _FLOATS, "factor": _WIDE},
)

fp8_quantize_columns = Op(
    "fp8_quantize_columns",
    ref=fp8_quantize_columns_ref,
    cuda=(Backend("triton", _columns_forward, None, library="triton"),),
    fake=_columns_fake,
    outputs=2,
    differentiable=False,
    check=_columns_check,
    unsupported=_tiles_unsupported,
    samples=_columns_samples,
    cost=_columns_cost,
    own_dtypes={"x": _FLOATS, "factor": _WIDE},
)

transpose_pad = Op(
    "transpose_pad",
    ref=transpose_pad_ref,
    cuda=(Backend("triton", _transpose_forward, None, library="triton"),),
    fake=_transpose_fake,
    differentiable=False,
    check=_transpose_check,
    unsupported=_tiles_unsupported,
    samples=_transpose_samples,
    cost=_transpose_cost,
    own_dtypes={"x": (torch.uint8,)},
)

adaln_quantize = Op(
    "adaln_quantize",
    ref=adaln_quantize_ref,
    cuda=(Backend("triton", _fp8_triton.adaln_quantize, None, library="triton"),),
    fake=_adaln_fake,
    outputs=3,
    differentiable=False,
    check=_adaln_check,
    unsupported=_unsupported,
    samples=_adaln_samples,
    cost=_adaln_cost,
    own_dtypes=dict.fromkeys(("x", "shift", "scale", "weight", "bias"), _FLOATS),
)
