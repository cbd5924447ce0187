# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""Products of int8 against what they claim to be: the product of the rounded operands, which is exact but for the fp32
of its way out; and against the product of the operands themselves, from which rounding alone parts them."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from maetok_fast.inference import prepare
from maetok_fast.kernels import _gemm, _native
from maetok_fast.kernels.packed_linear import Normed, PackedLinear, why_not
from maetok_fast.models import SiT, SiTConfig

CPU = torch.device("cpu")


def why_no_bytes() -> str | None:
    return _gemm.why_not_packed("int8", CPU)


@pytest.fixture(scope="module", params=["this processor's", "avx2", "avx512"])
def products(request: pytest.FixtureRequest) -> Any:
    """The engines: that of the level in use, and of lesser levels."""
    if _native.why_missing() is not None:
        pytest.skip(str(_native.why_missing()))
    most = _native.level()
    if request.param in ("avx2", "avx512"):
        try:
            _native.lib().cpu_limit(request.param)
        except ValueError as error:
            pytest.skip(str(error))
    reason = why_no_bytes()
    if reason is None:
        yield request.param
    _native.lib().cpu_limit(most)
    if reason is not None:
        pytest.skip(reason)


def steps(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of x as (whole steps, the size of a step), by the arithmetic of the kernel: fp32."""
    largest = x.float().abs().amax(-1, keepdim=True)
    # torch makes a reciprocal of 127 / largest
    inverse = torch.where(largest > 0, torch.tensor(127.0) / largest, 0.0)
    return (x.float() * inverse).round().double(), (largest / 127).double()


def claimed(x: Tensor, w: Tensor, bias: Tensor | None = None) -> Tensor:
    (p, p_step), (q, _) = steps(x), steps(w)
    step = w.float().abs().amax(1) / 127
    q = (w.float() / torch.where(step > 0, step, 1.0)[:, None]).round().double()
    return F.linear(p, q) * p_step * step.double() + (0.0 if bias is None else bias.double())


def assert_rounded(got: Tensor, exact: Tensor) -> None:
    """By a few roundings of the result's dtype, of sums as large as the largest."""
    eps = max(torch.finfo(got.dtype).eps / 2, 4 * torch.finfo(torch.float32).eps)
    error, noise = (got.double() - exact).abs(), 4 * torch.finfo(torch.float32).eps * exact.abs().max()
    assert (error <= eps * exact.abs() + noise).all(), error.max()


@given(
    rows=st.integers(1, 40),
    inner=st.integers(1, 200),
    outer=st.integers(1, 80),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
@settings(max_examples=60, deadline=None)
def check_products(rows: int, inner: int, outer: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(rows * 40_000 + inner * 100 + outer)
    x = torch.randn(rows, inner, generator=generator).to(dtype)
    w, bias = (torch.randn(outer, inner, generator=generator), torch.randn(outer, generator=generator))
    panels = _gemm.Panels.of(w, bias, "int8")
    assert_rounded(_gemm.multiply(x, panels), claimed(x, w, bias))


def test_products_of_whole_steps(products: str) -> None:
    check_products()


@pytest.mark.parametrize(("rows", "inner", "outer"), [(1, 4608, 70), (257, 70, 300), (30, 4700, 34)])
def test_larger_products(products: str, rows: int, inner: int, outer: int) -> None:
    """More than one block of K, of rows, and of panels to a task."""
    x, w = torch.randn(rows, inner), torch.randn(outer, inner)
    assert_rounded(_gemm.multiply(x, _gemm.Panels.of(w, None, "int8")), claimed(x, w))


@pytest.mark.parametrize("act", _gemm.ACTS)
@pytest.mark.parametrize("gated", [False, True])
def test_what_joins_a_product(products: str, act: str, gated: bool) -> None:
    x, w, bias = torch.randn(2, 9, 70), torch.randn(66, 70) / 8, torch.randn(66)
    width = 33 if gated else 66
    other, gate = torch.randn(2, 9, width), torch.randn(2, width)
    plain = {"none": lambda u: u, "gelu_tanh": lambda u: F.gelu(u, approximate="tanh"), "silu": F.silu, "gelu": F.gelu}
    u = claimed(x, w, bias)
    fn = plain.get(act, F.relu)
    v = fn(u[..., :width]) * u[..., width:] if gated else fn(u)
    panels = _gemm.Panels.of(w, bias, "int8", gated)
    got = _gemm.multiply(x, panels, act=act, join=_gemm.Join.gate, other=other, gate=gate)
    assert_rounded(got, other.double() + gate[:, None].double() * v)


@pytest.mark.parametrize("norm", ["layer", "rms"])
@pytest.mark.parametrize("per_token", [False, True])
def test_norm_on_the_way_in(products: str, norm: str, per_token: bool) -> None:
    """A value in the middle of two steps may go either way: fewer than one in ten thousand, by one step."""
    shift, scale = torch.randn(*((3, 4) if per_token else (3,)), 140).chunk(2, -1)
    late = Normed(torch.randn(3, 11, 70) + 1, shift, scale, torch.randn(70), torch.randn(70), norm=norm)
    w = torch.randn(48, 70)
    packed = PackedLinear(w, weights=torch.int8, backend="native int8")
    x = late.computed()
    want = claimed(x, w)
    step = (x.abs().amax(-1, keepdim=True) / 127 * w.abs().amax()).double()
    assert ((packed(late).double() - want).abs() <= step + 1e-5 * want.abs().max()).all()
    assert (packed(late).double() - want).norm() < 2e-3 * want.norm()


def test_results_depend_on_their_row_alone(products: str) -> None:
    x, panels = torch.randn(45, 200), _gemm.Panels.of(torch.randn(70, 200), torch.randn(70), "int8")
    every, threads = _gemm.multiply(x, panels), torch.get_num_threads()
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            for rows in (slice(0, 1), slice(7, 20), slice(0, 45)):
                assert torch.equal(_gemm.multiply(x[rows], panels), every[rows])
    finally:
        torch.set_num_threads(threads)


def test_rows_that_are_not_finite(products: str) -> None:
    """A NaN or an infinity spoils its row, whose scale it is, and no other; rows and weights of zeros are exact."""
    x, w = torch.randn(20, 33), torch.randn(40, 33)
    clean = _gemm.multiply(x, _gemm.Panels.of(w, None, "int8"))
    x[3, 7], x[15, 32], x[16, 0] = float("nan"), float("inf"), float("-inf")
    x[9] = 0.0
    w[5] = 0.0
    got = _gemm.multiply(x, _gemm.Panels.of(w, torch.ones(40), "int8"))
    bad = [3, 15, 16]
    assert got[bad].isnan().all()
    assert (got[9] == 1).all()
    fine = [i for i in range(20) if i not in bad]
    assert (got[fine, 5] == 1).all()
    others = [i for i in fine if i != 9]
    columns = [i for i in range(40) if i != 5]
    assert torch.equal(got[others][:, columns], clean[others][:, columns] + 1)


def test_the_largest_sums_do_not_overflow(products: str) -> None:
    most = _gemm.MOST_BYTES
    x, w = torch.ones(2, most), torch.ones(3, most)
    x[1] = -1
    got = _gemm.multiply(x, _gemm.Panels.of(w, None, "int8"))
    assert torch.allclose(got, torch.tensor([[float(most)] * 3, [-float(most)] * 3]), rtol=1e-6)
    with pytest.raises(ValueError, match=f"exact up to {most} columns; the weight has {most + 1}"):
        _gemm.Panels.of(torch.ones(1, most + 1), None, "int8")


def test_the_error_that_it_states(products: str) -> None:
    """On Gaussian inputs about 1 %: two roundings to steps of 1/127 of what is about three sigma, uniform in a step."""
    w, bias = torch.randn(96, 256) / 16, torch.zeros(96)
    packed = PackedLinear(w, bias, weights=torch.int8, backend="native int8")
    x = torch.randn(500, 256)
    want = F.linear(x, w)
    found = ((packed(x) - want).norm() / want.norm()).item()
    predicted = math.sqrt(2 / 12) * 2.8 / 127
    assert 0.8 * predicted < found < 1.2 * predicted
    assert packed.error == pytest.approx(found, rel=0.1)
    assert f"native int8, error {packed.error:.2%}" in repr(packed)
    assert PackedLinear(torch.zeros(4, 4), weights=torch.int8, backend="native int8").error == 0


def test_a_prepared_model(products: str) -> None:
    torch.manual_seed(0)
    config = SiTConfig(dim=128, depth=2, heads=2, tokens=12, channels=8, num_classes=10)
    model = SiT(config)
    with torch.no_grad():
        for p in model.parameters():
            if not p.any():
                p.normal_(0, 0.05)
    x, t, y = torch.randn(3, 12, 8), torch.rand(3), torch.tensor([1, 2, 3])
    want = prepare(model, "fp32")(x, t, y)
    for precision in ("fp32", "bf16"):
        fast = prepare(model, precision, torch.int8)
        assert 1e-4 < ((fast(x, t, y) - want).norm() / want.norm()).item() < 0.05
        text = repr(fast)
        assert "native int8, error 0." in text
        assert all(": native int8" in line for line in text.splitlines()[1:])
        kept = [m for m in fast.model.modules() if isinstance(m, PackedLinear)]
        assert all(m._panels.data.dtype == torch.int8 for m in kept)


def test_the_library_refuses_what_does_not_fit(products: str) -> None:
    x, panels = torch.zeros(6, 8), _gemm.Panels.of(torch.zeros(4, 8), None, "int8")
    with pytest.raises(ValueError, match="a scale and an offset"):
        _gemm.multiply(x, panels._replace(scale=None))
    with pytest.raises(ValueError, match="a scale and an offset"):
        _gemm.multiply(torch.zeros(8, 6).t(), panels)
    with pytest.raises(ValueError, match="column_offset must have shape"):
        _gemm.multiply(x, panels._replace(offset=panels.offset[1:]))
    with pytest.raises(TypeError, match="column_offset must be int32"):
        _gemm.multiply(x, panels._replace(offset=panels.offset.float()))
    with pytest.raises(ValueError, match="panels must have shape"):
        _gemm.multiply(torch.zeros(6, 80), panels)


@pytest.mark.skipif(_native.why_missing() is not None, reason="native library missing")
def test_processors_without_such_products() -> None:
    most = _native.level()
    _native.lib().cpu_limit("v2" if most != "generic" else most)
    try:
        reason = "AVX512_VNNI, AVX_VNNI or AMX-INT8"
        assert reason in str(why_not("native int8", torch.float32, torch.int8, CPU))
        with pytest.raises(ValueError, match=reason):
            prepare(SiT(SiTConfig(dim=64, depth=1, heads=2, tokens=4, channels=4)), "fp32", torch.int8)
    finally:
        _native.lib().cpu_limit(most)
