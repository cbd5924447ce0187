# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""The repaired interpreter computes bf16 as the hardware does, and the test tools catch the faults they are for."""

from __future__ import annotations

import pytest
import torch

from maetok_fast.kernels._triton import tl, triton, why_no_triton

if why_no_triton("cpu") is not None:
    pytest.skip(str(why_no_triton("cpu")), allow_module_level=True)

from maetok_fast.kernels._interpreter import red_zones, shuffled_programs


@triton.jit
def _arithmetic_kernel(a_ptr, b_ptr, out_ptr, N: tl.constexpr):
    offs = tl.arange(0, N)
    a, b = tl.load(a_ptr + offs), tl.load(b_ptr + offs)
    tl.store(out_ptr + offs, a + b)
    tl.store(out_ptr + N + offs, a * b)
    tl.store(out_ptr + 2 * N + offs, a - b)
    tl.store(out_ptr + 3 * N + offs, tl.where(a > b, a, b))
    tl.store(out_ptr + 4 * N + offs, tl.exp(a.to(tl.float32)).to(tl.bfloat16))
    tl.store(out_ptr + 5 * N + offs, -a)


@triton.jit
def _dot_kernel(a_ptr, b_ptr, out_ptr, N: tl.constexpr):
    offs = tl.arange(0, N)
    at = offs[:, None] * N + offs[None, :]
    tl.store(out_ptr + at, tl.dot(tl.load(a_ptr + at), tl.load(b_ptr + at)))


@triton.jit
def _round_kernel(x_ptr, out_ptr, N: tl.constexpr):
    offs = tl.arange(0, N)
    tl.store(out_ptr + offs, tl.load(x_ptr + offs).to(tl.bfloat16))


@triton.jit
def _float8_kernel(x_ptr, narrow_ptr, wide_ptr, N: tl.constexpr):
    offs = tl.arange(0, N)
    narrow = tl.load(x_ptr + offs).to(narrow_ptr.dtype.element_ty)
    tl.store(narrow_ptr + offs, narrow)
    tl.store(wide_ptr + offs, narrow.to(wide_ptr.dtype.element_ty))


@triton.jit
def _overrun_kernel(out_ptr, N: tl.constexpr):
    tl.store(out_ptr + tl.arange(0, N) + 1, tl.zeros((N,), tl.float32))


@triton.jit
def _last_one_wins_kernel(out_ptr):
    tl.store(out_ptr, tl.program_id(0).to(tl.float32))


def test_bf16_arithmetic_is_torchs() -> None:
    a, b = torch.randn(64).bfloat16(), torch.randn(64).bfloat16()
    out = torch.empty(6, 64, dtype=torch.bfloat16)
    _arithmetic_kernel[(1,)](a, b, out, N=64)
    expected = torch.stack((a + b, a * b, a - b, torch.maximum(a, b), a.float().exp().bfloat16(), -a))
    assert torch.equal(out, expected)


def test_bf16_dot_accumulates_in_fp32() -> None:
    a, b = torch.randn(16, 16).bfloat16(), torch.randn(16, 16).bfloat16()
    out = torch.empty(16, 16)
    _dot_kernel[(1,)](a, b, out, N=16)
    torch.testing.assert_close(out, a.float() @ b.float(), rtol=1e-5, atol=1e-5)


def test_rounding_is_to_nearest_even_and_keeps_nan() -> None:
    ties = torch.tensor([1.00390625, 1.01171875, -1.00390625, 3.4e38, float("inf"), float("nan"), 0.0, 1e-40])
    x = torch.cat((ties, torch.randn(56)))
    out = torch.empty(64, dtype=torch.bfloat16)
    _round_kernel[(1,)](x, out, N=64)
    assert torch.equal(out.nan_to_num(7), x.bfloat16().nan_to_num(7))
    assert out.isnan().equal(x.isnan())


@pytest.mark.parametrize("source", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
def test_float8_casts_are_torchs(source: torch.dtype, dtype: torch.dtype) -> None:
    """All 256 values, the ties between them and their neighbours; saturating, where torch's e5m2 overflows."""
    values = torch.arange(256).to(torch.uint8).view(dtype).float()
    values = values[values.isfinite()].sort().values
    ties = (values[1:] + values[:-1]) / 2
    x = torch.cat((values, ties, ties * (1 + 2**-7), ties * (1 - 2**-7), torch.tensor([float("nan"), 1e5, -1e5])))
    x = torch.nn.functional.pad(x, (0, 1024 - len(x))).to(source)
    narrow, wide = torch.empty(1024, dtype=dtype), torch.empty(1024, dtype=source)
    _float8_kernel[(1,)](x, narrow, wide, N=1024)
    top = torch.finfo(dtype).max
    expected = x.float().clamp(-top, top).to(dtype)
    assert torch.equal(narrow.view(torch.uint8), expected.view(torch.uint8))
    assert torch.equal(wide.nan_to_num(7), narrow.to(source).nan_to_num(7))


def test_a_planted_overrun_is_caught() -> None:
    with pytest.raises(AssertionError, match="wrote outside a buffer of 16 elements"), red_zones():
        _overrun_kernel[(1,)](torch.empty(16), N=16)


def test_a_planted_order_dependence_is_exposed() -> None:
    results = set()
    for seed in range(8):
        out = torch.empty(1)
        with shuffled_programs(seed):
            _last_one_wins_kernel[(5,)](out)
        results.add(out.item())
    assert len(results) > 1
