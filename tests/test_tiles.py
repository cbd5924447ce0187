# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""The kernels on AMX tiles where there are none: the same sources over emulated tiles, held to the same rule."""

from __future__ import annotations

from typing import Any

import emulate
import emulate_tiles
import pytest
import rule
import test_int8
import test_vector_attention
import torch
import torch.nn.functional as F
from torch import Tensor

from maetok_fast.kernels import _gemm, _native, adaln

pytestmark = pytest.mark.skipif(
    _native.own_level() not in ("avx512bf16", "amx") or emulate.why_not() is not None,
    reason="the emulation needs a C++ compiler and AVX512_BF16",
)


@pytest.fixture(scope="module")
def library() -> Any:
    import tvm_ffi

    return tvm_ffi.load_module(str(emulate_tiles.build()))


@pytest.fixture(autouse=True)
def emulated(library: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert library.cpu_variant() == "amx"
    monkeypatch.setattr(_native, "lib", lambda: library)


def assert_rule(got: Tensor, plain: Tensor, exact: Tensor, *inputs: Tensor) -> None:
    rule.assert_rule({"y": got}, {"y": plain}, {"y": exact}, inputs)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize(
    ("rows", "inner", "outer"), [(1, 1, 2), (5, 33, 30), (16, 32, 32), (33, 70, 66), (70, 2400, 40)]
)
def test_a_product_with_all_that_joins_it(rows: int, inner: int, outer: int, gated: bool) -> None:
    x, w = torch.randn(rows, inner).bfloat16(), (torch.randn(outer, inner) / inner**0.5).bfloat16()
    bias, width = torch.randn(outer), outer // 2 if gated else outer
    other = torch.randn(rows, width).bfloat16()
    gate = torch.randn(width).bfloat16()
    panels = _gemm.Panels.of(w, bias, "pairs", gated)
    assert panels.data.shape[1] % 16 == 0

    def want(dtype: torch.dtype) -> Tensor:
        u = F.linear(x.to(dtype), w.to(dtype), bias.to(dtype))
        v = F.silu(u[:, :width]) * u[:, width:] if gated else F.gelu(u, approximate="tanh")
        return other.to(dtype) + gate.to(dtype) * v

    got = _gemm.multiply(x, panels, act="silu" if gated else "gelu_tanh", join=_gemm.Join.gate, other=other, gate=gate)
    assert_rule(got, want(torch.bfloat16), want(torch.float64), x, w)


@pytest.mark.parametrize("norm", ["layer", "rms"])
def test_norm_on_the_way_in(norm: str) -> None:
    x, w = (torch.randn(2, 19, 70) + 1).bfloat16(), torch.randn(40, 70).bfloat16()
    shift, scale = torch.randn(2, 2 * 70).bfloat16().chunk(2, dim=1)

    def want(dtype: torch.dtype) -> Tensor:
        normed = adaln.ref(x.to(dtype), shift.to(dtype), scale.to(dtype), None, None, 1e-6, 1.0, "", norm)
        return F.linear(normed, w.to(dtype))

    kind = 1 if norm == "layer" else 2
    got = _gemm.multiply(x, _gemm.Panels.of(w, None, "pairs"), norm=(kind, None, None, shift, scale, 1e-6, 1.0))
    assert_rule(got, want(torch.bfloat16), want(torch.float64), x, w)


@pytest.mark.parametrize(("rows", "inner", "outer"), [(45, 77, 70), (1, 1, 1), (16, 1200, 5)])
def test_transposed_operands(rows: int, inner: int, outer: int) -> None:
    x, w = torch.randn(rows, inner).bfloat16(), torch.randn(outer, inner).bfloat16()
    want = _gemm.multiply(x, _gemm.Panels.of(w, None, "pairs"))
    got = _gemm.multiply(x.t().contiguous().t(), _gemm.Panels.of(w.t().contiguous().t(), None, "pairs"))
    assert torch.equal(got, want)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize(("rows", "inner", "outer"), [(1, 1, 2), (16, 64, 32), (33, 70, 66), (40, 4700, 40)])
def test_products_of_bytes(rows: int, inner: int, outer: int, gated: bool) -> None:
    x, w, bias = torch.randn(2, rows, inner), torch.randn(outer, inner) / inner**0.5, torch.randn(outer)
    u, width = test_int8.claimed(x, w, bias), outer // 2
    got = _gemm.multiply(x, _gemm.Panels.of(w, bias, "int8", gated), act="silu")
    test_int8.assert_rounded(got, F.silu(u[..., :width]) * u[..., width:] if gated else F.silu(u))


def test_bytes_normed_on_the_way_in() -> None:
    x, w, shift = torch.randn(2, 19, 70) + 1, torch.randn(40, 70), torch.randn(2, 70)
    got = _gemm.multiply(x, _gemm.Panels.of(w, None, "int8"), norm=(1, None, None, shift, None, 1e-6, 1.0))
    want = F.linear(adaln.ref(x, shift, None, None, None, 1e-6, 1.0, "", "layer"), w)
    assert 1e-4 < ((got - want).norm() / want.norm()).item() < 0.02


def test_results_do_not_depend_on_threads() -> None:
    panels, x = _gemm.Panels.of(torch.randn(70, 2400), None, "pairs"), torch.randn(45, 2400).bfloat16()
    want, threads = _gemm.multiply(x, panels), torch.get_num_threads()
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            assert torch.equal(_gemm.multiply(x, panels), want)
    finally:
        torch.set_num_threads(threads)


def test_attention(library: Any) -> None:
    """The forward and the backward of csrc/cpu/attention*.cpp, whose own tests need a processor with tiles."""
    qkv, grad = torch.randn(2, 50, 3, 3, 24).bfloat16(), torch.randn(2, 50, 3, 24).bfloat16()
    q, k, v = qkv.unbind(2)
    out, lse = torch.empty_like(grad), torch.empty(2, 50, 3)
    library.rope_attention(qkv, *(None,) * 6, out, lse, 0, 0, 0, 1e-6)
    gradients = [torch.empty_like(grad) for _ in range(3)]
    library.attention_bf16_bwd(q, k, v, out, grad, lse, *gradients)

    def plain(dtype: torch.dtype) -> dict[str, Tensor]:
        leaves = [t.to(dtype).requires_grad_() for t in (q, k, v)]
        y = F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in leaves)).transpose(1, 2)
        found = torch.autograd.grad(y, leaves, grad.to(dtype))
        return {"out": y.detach(), **{f"d_{n}": g for n, g in zip("qkv", found)}}

    got = {"out": out, **{f"d_{n}": g for n, g in zip("qkv", gradients)}}
    rule.assert_rule(got, plain(torch.bfloat16), plain(torch.float64), (q, k, v))


@pytest.mark.parametrize("sample", test_vector_attention.SMALL, ids=[s.label for s in test_vector_attention.SMALL])
def test_attention_that_rotates(sample: Any) -> None:
    assert _native.lib().attention_tiles()
    given = sample.make(lambda *shape, dtype=torch.float32: torch.randn(*shape, dtype=dtype))
    test_vector_attention.check(test_vector_attention.args(given.pop("qkv"), **given), torch.bfloat16)


def test_the_peak_runs(library: Any) -> None:
    for kind, one in [(1, 4 * 2 * 16 * 16 * 32), (2, 4 * 2 * 16 * 16 * 64)]:
        done = library.peak(kind, 10)
        assert done > 0
        assert done % (10 * one) == 0
