# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""A repair of Triton's interpreter, and two tools for tests that run in it.

The stock interpreter keeps bf16 as raw uint16: arithmetic and `tl.dot` work on the bit patterns, and fp32 -> bf16
truncates. `repair()` makes every bf16 operation widen to fp32, operate, and round to nearest even, which is what the
hardware does; fp32 and fp16 behave as before. `tl.sum` and friends on bf16 stay unsupported: kernels cast to fp32
before any arithmetic anyway. Its casts to float8 round ties away from zero and get subnormals wrong (3-5 % of all
values): they are replaced by the hardware's (nearest even, saturating, NaN stays NaN), and so are those from float8.

`shuffled_programs(seed)` runs the programs of every launch in a random order, so a kernel that counts on an order
fails. `red_zones()` surrounds every tensor that a launcher allocates with a sentinel and checks it afterwards: the
interpreter has no bounds checks of its own.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["red_zones", "repair", "shuffled_programs"]


def _widen(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _narrow(values: np.ndarray) -> np.ndarray:
    """fp32 -> bf16 bits, round to nearest even; NaN stays NaN."""
    values = np.ascontiguousarray(values, dtype=np.float32)
    bits = values.view(np.uint32)
    rounded = ((bits + (((bits >> 16) & 1) + 0x7FFF)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)


def _to_float8(values: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    """fp32 -> float8 bits as `cvt.rn.satfinite` does: round to nearest even, saturate, NaN stays NaN."""
    flat = torch.from_numpy(np.array(values, dtype=np.float32).reshape(-1))  # a copy: scalars and read-only views too
    top = torch.finfo(dtype).max
    return flat.clamp(-top, top).to(dtype).view(torch.uint8).numpy().reshape(np.shape(values))


def _from_float8(bits: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    """float8 bits -> fp32, exactly."""
    flat = torch.from_numpy(np.array(bits, dtype=np.uint8).reshape(-1))
    return flat.view(dtype).float().numpy().reshape(np.shape(bits))


def repair() -> None:
    """Patches `InterpreterBuilder` in place, once."""
    import triton.language as tl
    from triton.runtime import interpreter

    builder, handle, np_dtype = interpreter.InterpreterBuilder, interpreter.TensorHandle, interpreter._get_np_dtype
    if getattr(builder, "_maetok_fast_repaired", False):
        return

    def is_bf16(x: Any) -> bool:
        return x.dtype.scalar == tl.bfloat16

    def values(x: Any) -> np.ndarray:
        return _widen(x.data) if is_bf16(x) else x.data

    def wrap(data: np.ndarray) -> Any:
        """Comparisons yield bool and stay so; everything else becomes bf16 again."""
        return handle(data if data.dtype == bool else _narrow(data), tl.bfloat16)

    stock = {name: getattr(builder, name) for name in ("binary_op", "unary_op", "ternary_op", "create_dot")}
    stock_fma, stock_cast, stock_convert = builder.create_fma, builder.cast_impl, builder.create_fp_to_fp

    def binary_op(self: Any, lhs: Any, rhs: Any, op: Any) -> Any:
        out = wrap(op(values(lhs), values(rhs))) if is_bf16(lhs) else stock["binary_op"](self, lhs, rhs, op)
        # a comparison keeps its operands' type in the stock interpreter, and Triton 3.9 splats it as such: int32 masks
        return handle(out.data, tl.int1) if out.data.dtype == bool else out

    def unary_op(self: Any, arg: Any, op: Any) -> Any:
        return wrap(op(values(arg))) if is_bf16(arg) else stock["unary_op"](self, arg, op)

    def ternary_op(self: Any, lhs: Any, rhs: Any, other: Any, op: Any) -> Any:
        if is_bf16(other) and op is not np.where:
            return wrap(op(values(lhs), values(rhs), values(other)))
        return stock["ternary_op"](self, lhs, rhs, other, op)

    def create_fma(self: Any, x: Any, y: Any, z: Any) -> Any:
        return wrap(values(x) * values(y) + values(z)) if is_bf16(z) else stock_fma(self, x, y, z)

    def create_dot(self: Any, a: Any, b: Any, d: Any, input_precision: Any, max_num_imprecise_acc: Any) -> Any:
        if is_bf16(a) or is_bf16(b):
            return handle(np.matmul(values(a), values(b), dtype=d.data.dtype) + d.data, d.dtype.scalar)
        return stock["create_dot"](self, a, b, d, input_precision, max_num_imprecise_acc)

    def cast_impl(self: Any, src: Any, dst_type: Any) -> Any:
        to = dst_type.scalar
        if to == tl.bfloat16:
            return handle(src.data if is_bf16(src) else _narrow(src.data), to)
        if is_bf16(src):
            return handle(_widen(src.data).astype(np_dtype(dst_type)), to)
        return stock_cast(self, src, dst_type)

    float8 = {tl.float8e4nv: torch.float8_e4m3fn, tl.float8e5: torch.float8_e5m2}

    def create_fp_to_fp(self: Any, src: Any, dst_type: Any, rounding_mode: Any) -> Any:
        wide = (tl.bfloat16, tl.float16, tl.float32, tl.float64)
        if src.dtype.scalar in float8:
            widened = handle(_from_float8(src.data, float8[src.dtype.scalar]), tl.float32)
            return widened if dst_type.scalar == tl.float32 else create_fp_to_fp(self, widened, dst_type, None)
        if dst_type.scalar in float8:
            single = src if src.dtype.scalar == tl.float32 else cast_impl(self, src, tl.float32)
            return handle(_to_float8(single.data, float8[dst_type.scalar]), dst_type.scalar)
        if src.dtype.scalar in wide and dst_type.scalar in wide:
            return cast_impl(self, src, dst_type)
        return stock_convert(self, src, dst_type, rounding_mode)

    builder.binary_op, builder.unary_op, builder.ternary_op = binary_op, unary_op, ternary_op
    builder.create_fma, builder.create_dot = create_fma, create_dot
    builder.cast_impl, builder.create_fp_to_fp = cast_impl, create_fp_to_fp
    builder._maetok_fast_repaired = True


@contextlib.contextmanager
def shuffled_programs(seed: int) -> Iterator[None]:
    """Inside, every launch runs its programs in an order drawn from `seed` instead of row-major."""
    from triton.runtime.interpreter import InterpreterBuilder as builder

    rng = np.random.default_rng(seed)
    stock_dim, stock_idx = builder.set_grid_dim, builder.set_grid_idx

    def set_grid_dim(self: Any, nx: int, ny: int, nz: int) -> None:
        stock_dim(self, nx, ny, nz)
        self._order = rng.permutation(nx * ny * nz)

    def set_grid_idx(self: Any, x: int, y: int, z: int) -> None:
        _nx, ny, nz = self.grid_dim
        at = int(self._order[(x * ny + y) * nz + z])
        stock_idx(self, at // (ny * nz), at // nz % ny, at % nz)

    builder.set_grid_dim, builder.set_grid_idx = set_grid_dim, set_grid_idx
    try:
        yield
    finally:
        builder.set_grid_dim, builder.set_grid_idx = stock_dim, stock_idx


_ZONE = 64  # elements on either side of an allocation
_SENTINEL = 77


class _RedZones(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.buffers: list[tuple[torch.Tensor, int]] = []

    def guard(self, tensor: torch.Tensor) -> torch.Tensor:
        if not (tensor.is_contiguous() and tensor.device.type == "cpu"):
            return tensor
        size = tensor.numel()
        raw = torch.uint8 if tensor.dtype == torch.bool else tensor.dtype  # a bool holds no sentinel
        buffer = torch.full((size + 2 * _ZONE,), _SENTINEL, dtype=raw)
        inner = buffer[_ZONE : _ZONE + size].view(tensor.dtype).view(tensor.shape)
        inner.fill_(float("nan") if tensor.is_floating_point() else -1)
        self.buffers.append((buffer, size))
        return inner

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket in (torch.ops.aten.empty, torch.ops.aten.empty_like, torch.ops.aten.new_empty):
            return self.guard(out)
        return out


@contextlib.contextmanager
def red_zones() -> Iterator[None]:
    """Inside, `torch.empty`, `empty_like` and `new_empty` return NaN-filled tensors between sentinels; on leaving,
    raises AssertionError if a sentinel was overwritten."""
    with _RedZones() as zones:
        yield
    for buffer, size in zones.buffers:
        before, after = buffer[:_ZONE], buffer[_ZONE + size :]
        if not (bool((before == _SENTINEL).all()) and bool((after == _SENTINEL).all())):
            raise AssertionError(f"a kernel wrote outside a buffer of {size} elements of {buffer.dtype}")
