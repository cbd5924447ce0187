# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""The packed GEMM of csrc/cpu/gemm.cpp from Python: weights into panels, and products with everything fused.

    formats of panels      products                       weights take    where
    "fp32"                 fp32 multiply-adds             4 bytes         every processor
    "bf16"                 fp32 multiply-adds             2 bytes         every processor
    "pairs"                of two bf16, or on AMX tiles   2 bytes         AVX512_BF16, AMX
    "int8"                 of four bytes                  1 byte          AVX512_VNNI, AVX_VNNI, AMX-INT8

x may be fp32, bf16 or fp16 in each of them ("pairs" rounds it to bf16; "int8" to 255 steps, with a scale for each row
of x and of the weight), sums are fp32 (int8: exact), and y is rounded once. Panels fit the instruction set that packed
them and no other.
"""

from __future__ import annotations

from typing import Any, NamedTuple, overload

import torch
from torch import Tensor

from . import _native

__all__ = ["ACTS", "FORMATS", "NO_NORM", "Join", "Panels", "multiply", "why_not_packed"]

FORMATS = ("fp32", "bf16", "pairs", "int8")
ACTS = {"none": -1, "gelu_tanh": 0, "silu": 1, "gelu": 2, "relu": 3}
_TILE = 16  # dwords: panels of pairs and of bytes are whole tiles of AMX
MOST_BYTES = 65536  # columns: sums of 255 * 127 each stay below 2^31
_STEPS = 127  # of int8 on either side of zero
NO_NORM = (0, None, None, None, None, 0.0, 0.0)


class Join:
    """What becomes of v = act(x w^T + bias): v, other + v, other * v or other + gate * v."""

    none, add, mul, gate = range(4)


def why_not_packed(form: str, device: torch.device) -> str | None:
    """Why weights cannot be packed in this format for products on this device, or None."""
    if device.type != "cpu":
        return f"weights are packed on the CPU only, not on {device.type}"
    missing = _native.why_missing()
    if missing is not None:
        return missing
    if form == "pairs" and _native.lib().cpu_variant() not in ("avx512bf16", "amx"):
        return f"pairs of bf16 need AVX512_BF16 or AMX, the instruction set in use is {_native.lib().cpu_variant()}"
    if form == "int8" and not _native.lib().cpu_byte_products():
        return (
            "products of int8 need AVX512_VNNI, AVX_VNNI or AMX-INT8, which the processor lacks or the instruction set "
            f"in use, {_native.lib().cpu_variant()}, does not include"
        )
    return None


class Panels(NamedTuple):
    """A weight in panels, with all that a product has to know of it.

    data: (panels, in, columns) fp32 or bf16, (panels, in / 2, columns, 2) bf16, (panels, in / 4, columns, 4) int8, or
    None: then `weight` (out, in) is packed in the cache, block by block, for each product. bias: fp32, as the columns
    lie. pairs: of bf16. gated: rows [a | b]; the product is then act(a) * b of half as many features.
    scale: of int8, fp32, as the columns lie: what a step is worth. offset: int32, 128 times the sum of a column.
    """

    data: Tensor | None
    bias: Tensor | None
    out_features: int
    gated: bool = False
    weight: Tensor | None = None
    pairs: bool = False
    scale: Tensor | None = None
    offset: Tensor | None = None

    @classmethod
    def of(cls, weight: Tensor, bias: Tensor | None, form: str, gated: bool = False) -> Panels:
        """weight (out, in), any strides with one of them 1, fp32, bf16 or fp16; bias (out,) or None."""
        outer, inner = weight.shape
        if form == "int8":
            return cls._of_bytes(weight.float(), bias, gated)
        count, columns = _count(outer, gated)
        if form == "pairs":
            shape: tuple[int, ...] = (count, -(-inner // (2 * _TILE)) * _TILE, columns, 2)
        else:
            shape = (count, inner, columns)
        data = torch.empty(shape, dtype=torch.float32 if form == "fp32" else torch.bfloat16)
        _native.lib().gemm_pack(weight, data, gated)
        return cls(data, _as_columns(bias, gated), outer, gated)

    @classmethod
    def _of_bytes(cls, weight: Tensor, bias: Tensor | None, gated: bool) -> Panels:
        """Each row in steps of its largest magnitude / 127."""
        outer, inner = weight.shape
        if inner > MOST_BYTES:
            raise ValueError(f"products of int8 are exact up to {MOST_BYTES} columns; the weight has {inner}")
        step = weight.abs().amax(1) / _STEPS
        steps = (weight / torch.where(step > 0, step, 1.0)[:, None]).round_()
        (count, columns), dwords = _count(outer, gated), -(-inner // (4 * _TILE)) * _TILE
        parts = 2 if gated else 1
        rows = torch.zeros(parts, count * columns // parts, 4 * dwords, dtype=torch.int8)
        rows[:, : outer // parts, :inner] = steps.view(parts, outer // parts, inner)
        lines = rows.view(torch.int32).view(parts, count, columns // parts, dwords)
        data = lines.permute(1, 3, 0, 2).contiguous().view(torch.int8).view(count, dwords, columns, 4)
        offset = _as_columns(128 * steps.sum(1), gated).int()  # below 2^24 steps to a row it is exact
        return cls(data, _as_columns(bias, gated), outer, gated, scale=_as_columns(step, gated), offset=offset)

    @classmethod
    def once(cls, weight: Tensor, bias: Tensor | None, pairs: bool) -> Panels:
        """For a weight that is used once: weight and bias as for `of`."""
        return cls(None, _as_columns(bias, False), len(weight), False, weight, pairs)


def _count(outer: int, gated: bool) -> tuple[int, int]:
    """(panels of a weight with so many rows, columns of a panel). A gated one's hold half of each of its halves."""
    columns = _native.lib().gemm_columns()
    return (-(-(outer // 2) // (columns // 2)) if gated else -(-outer // columns)), columns


@overload
def _as_columns(rows: None, gated: bool) -> None: ...
@overload
def _as_columns(rows: Tensor, gated: bool) -> Tensor: ...
def _as_columns(rows: Tensor | None, gated: bool) -> Tensor | None:
    """A number for each row of a weight (a bias) in fp32 as the panels' columns lie, zeros where the last has none."""
    if rows is None:
        return None
    rows, (count, columns) = rows.float(), _count(len(rows), gated)
    if not gated:
        return torch.nn.functional.pad(rows, (0, count * columns - len(rows)))
    half, width = len(rows) // 2, count * columns // 2
    halves = torch.nn.functional.pad(rows.view(2, half), (0, width - half))
    return halves.view(2, count, columns // 2).transpose(0, 1).flatten()


def multiply(
    x: Tensor,
    panels: Panels,
    y: Tensor | None = None,
    *,
    out_dtype: torch.dtype | None = None,
    act: str = "none",
    join: int = Join.none,
    other: Tensor | None = None,
    gate: Tensor | None = None,
    before: Tensor | None = None,
    norm: tuple[Any, ...] = NO_NORM,
) -> Tensor:
    """y (..., out) = join(act(norm(x) w^T + bias), other, gate).

    x (..., in), contiguous rows, or (M, in) with contiguous columns. y: where to, else a new tensor of `out_dtype`.
    other: like y, its rows contiguous. gate: (out,), or (B, out) with x (B, N, in).
    before: filled with norm(x) w^T + bias. norm: (1 LayerNorm or 2 RMSNorm, weight, bias, shift, scale, eps, offset).
    """
    width = panels.out_features // 2 if panels.gated else panels.out_features
    if y is None:
        y = torch.empty(*x.shape[:-1], width, dtype=x.dtype if out_dtype is None else out_dtype)
    tokens = x.shape[-2] if x.ndim > 2 else 1
    kind, *affine, eps, offset = norm
    weight = (panels.data, panels.weight, panels.pairs, panels.scale, panels.offset)
    joined = (ACTS[act], panels.gated, join, other, gate, before)
    _native.lib().gemm(x, *weight, panels.out_features, panels.bias, y, *joined, kind, *affine, eps, offset, tokens)
    return y
