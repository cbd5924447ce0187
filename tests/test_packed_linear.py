# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""PackedLinear against fp64, by the correctness rule."""

from __future__ import annotations

import pytest
import rule
import torch
from torch import Tensor, nn

from maetok_fast.kernels import _gemm, _native, adaln
from maetok_fast.kernels.packed_linear import ACTIVATIONS, BACKENDS, Normed, PackedLinear, candidates, why_not

CPU = torch.device("cpu")
FORMATS = [form for form in _gemm.FORMATS if form != "int8"]  # test_int8.py
# (backend, dtype of x, dtype in which it keeps weights)
WAYS = [
    ("native fp32", torch.float32, torch.float32),
    ("native bf16", torch.float32, torch.bfloat16),
    ("native bf16", torch.bfloat16, torch.bfloat16),
    ("native pairs", torch.bfloat16, torch.bfloat16),
    ("onednn", torch.float32, torch.float32),
    ("onednn", torch.bfloat16, torch.bfloat16),
    *(("dense", dtype, dtype) for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64)),
]


def assert_rule(got: Tensor, plain: Tensor, exact: Tensor, *inputs: Tensor) -> None:
    rule.assert_rule({"y": got}, {"y": plain}, {"y": exact}, inputs)


def layer(inner: int, outer: int, bias: bool = True, weights: torch.dtype = torch.float32) -> nn.Linear:
    """Its weight is exact in `weights`: how a model's are rounded is none of the product's errors."""
    made = nn.Linear(inner, outer, bias=bias)
    made.weight.data = (made.weight.data * 3).to(weights).float()
    return made


@pytest.fixture(params=WAYS, ids=lambda way: f"{way[0]}-{str(way[1])[6:]}")
def way(request: pytest.FixtureRequest) -> tuple[str, torch.dtype, torch.dtype]:
    backend, dtype, weights = request.param
    reason = why_not(backend, dtype, weights, CPU)
    if reason is not None:
        pytest.skip(reason)
    return request.param


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("gated", [False, True], ids=["", "gated"])
def test_value(activation: str, gated: bool, way: tuple[str, torch.dtype, torch.dtype]) -> None:
    """Edges of M, N and K: rows around a panel's 6 and 14, columns around 8, 16 and 32, more than one block of K."""
    backend, dtype, weights = way
    act = ACTIVATIONS[activation][0]
    for inner, outer in [(72, 200), (1, 2), (33, 30), (1300, 34)]:
        plain = layer(inner, outer, weights=weights)
        packed = PackedLinear.of(plain, activation, gated=gated, dtype=dtype, weights=weights, backend=backend)
        assert packed.backend == backend
        plain = plain.to(dtype)

        def chosen(u: Tensor) -> Tensor:
            a, b = u.chunk(2, dim=-1)
            return act(a) * b if gated else act(u)

        for shape in [(inner,), (1, inner), (3, 5, inner), (0, inner), (130, inner)]:
            x = torch.randn(shape).to(dtype)
            exact = chosen(nn.functional.linear(x.double(), plain.weight.double(), plain.bias.double()))
            if exact.numel():
                assert_rule(packed(x), chosen(plain(x)), exact, x, plain.weight)
            else:
                assert packed(x).shape == exact.shape


@pytest.mark.parametrize("activation", ["none", "gelu_tanh"])
@pytest.mark.parametrize("bias", [True, False])
def test_partner(activation: str, bias: bool, way: tuple[str, torch.dtype, torch.dtype]) -> None:
    backend, dtype, weights = way
    plain = layer(64, 96, bias, weights)
    packed = PackedLinear.of(plain, activation, dtype=dtype, weights=weights, backend=backend)
    plain = plain.to(dtype)
    act = ACTIVATIONS[activation][0]
    x, other = torch.randn(2, 7, 64).to(dtype), torch.randn(2, 9, 96).to(dtype)[:, 1:8]
    bias64 = plain.bias.double() if bias else None
    exact = act(nn.functional.linear(x.double(), plain.weight.double(), bias64))
    before = other.clone()
    assert_rule(packed(x, add=other), other + act(plain(x)), other.double() + exact)
    assert_rule(packed(x, mul=other), other * act(plain(x)), other.double() * exact)
    for gate in (
        torch.randn(96).to(dtype),
        torch.randn(2, 3 * 96).to(dtype)[:, 96:192],
    ):  # LayerScale; a modulation's part
        wide = gate if gate.ndim == 1 else gate[:, None]
        got = packed(x, add=other, gate=gate)
        assert_rule(got, other + wide * act(plain(x)), other.double() + wide.double() * exact)
    assert torch.equal(other, before)


@pytest.mark.parametrize("norm", ["layer", "rms"])
@pytest.mark.parametrize("modulation", ["none", "per image", "last tokens", "shift only"])
def test_norm_on_the_way_in(norm: str, modulation: str, way: tuple[str, torch.dtype, torch.dtype]) -> None:
    backend, dtype, weights = way
    plain = layer(70, 48, weights=weights)
    packed = PackedLinear.of(plain, dtype=dtype, weights=weights, backend=backend)
    plain = plain.to(dtype)
    x = (torch.randn(3, 11, 70) * 2 + 1).to(dtype)
    parts = torch.randn(3, 2 * 70) if modulation != "last tokens" else torch.randn(3, 4, 2 * 70)
    shift, scale = parts.to(dtype).chunk(2, dim=-1) if modulation != "none" else (None, None)
    late = Normed(
        x, shift, None if modulation == "shift only" else scale, torch.randn(70).to(dtype), torch.randn(70).to(dtype),
        1e-5, 1.0 if modulation == "per image" else 0.0, norm,
    )  # fmt: skip
    wide = Normed(*(v.double() if isinstance(v, Tensor) else v for v in late))
    exact = nn.functional.linear(wide.computed(), plain.weight.double(), plain.bias.double())
    assert_rule(packed(late), plain(late.computed()), exact)
    assert torch.equal(late.computed(), adaln(*late[:7], norm=norm))


def test_snapshot(way: tuple[str, torch.dtype, torch.dtype]) -> None:
    """Training on changes nothing: the weights are copied even where they have the right dtype already."""
    backend, dtype, weights = way
    plain = layer(64, 96).to(dtype)
    copied = PackedLinear.of(plain, dtype=dtype, weights=weights, backend=backend)
    x = torch.randn(3, 64).to(dtype)
    before = copied(x)
    with torch.no_grad():
        plain.weight.zero_()
        plain.bias.zero_()
    assert torch.equal(copied(x), before)


def test_input_with_odd_strides(way: tuple[str, torch.dtype, torch.dtype]) -> None:
    """The same bits as from a contiguous input, because either way copies first: torch's own emulated bf16 product of a
    strided input rounds twice. And one rounding: half an ulp of each value, and what the sum in fp32 adds."""
    backend, dtype, weights = way
    plain = layer(64, 64)
    packed = PackedLinear.of(plain, dtype=dtype, weights=weights, backend=backend)
    weight, bias = plain.weight.to(weights).double(), plain.bias.to(dtype).double()
    if backend.startswith("native"):
        bias = plain.bias.double()  # added in fp32
    x = torch.randn(5, 9, 128).to(dtype)
    for view in (x[:, ::2, 10:74], x[..., ::2], x[:, :, :64].transpose(0, 1), x[:1, :, :64].expand(4, -1, -1)):
        got, exact = packed(view), nn.functional.linear(view.double(), weight, bias)
        assert torch.equal(got, packed(view.contiguous()))
        if dtype in (torch.bfloat16, torch.float16):
            once = torch.finfo(dtype).eps / 2 * exact.abs() + 64 * torch.finfo(torch.float32).eps * exact.abs().max()
            assert ((got.double() - exact).abs() <= once).all()


@pytest.mark.skipif(_native.why_missing() is not None, reason="native library missing")
@pytest.mark.parametrize("form", FORMATS)
def test_a_result_depends_on_its_row_alone(form: str) -> None:
    """Neither on the other rows nor on the number of threads: bit by bit."""
    if _gemm.why_not_packed(form, CPU) is not None:
        pytest.skip(str(_gemm.why_not_packed(form, CPU)))
    panels = _gemm.Panels.of(torch.randn(70, 2400), torch.randn(70), form)
    x = torch.randn(45, 2400)
    all_rows, threads = _gemm.multiply(x, panels, act="gelu"), torch.get_num_threads()
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            for rows in (slice(0, 1), slice(7, 20), slice(0, 45)):
                assert torch.equal(_gemm.multiply(x[rows], panels, act="gelu"), all_rows[rows])
    finally:
        torch.set_num_threads(threads)


@pytest.mark.skipif(_native.why_missing() is not None, reason="native library missing")
def test_more_scratch_than_is_kept() -> None:
    """x of 70 MB, whose packed form is given back, between products whose scratch is kept."""
    panels, x = _gemm.Panels.of(torch.randn(9, 1024), None, "fp32"), torch.randn(17_500, 1024)
    few = _gemm.multiply(x[:40], panels)
    assert torch.equal(_gemm.multiply(x, panels)[:40], few)
    assert torch.equal(_gemm.multiply(x[:40], panels), few)


@pytest.mark.skipif(_native.why_missing() is not None, reason="native library missing")
@pytest.mark.parametrize("form", FORMATS)
def test_transposed_operands(form: str) -> None:
    """What a backward multiplies: x and w with contiguous columns, packed to the same bits as from rows."""
    if _gemm.why_not_packed(form, CPU) is not None:
        pytest.skip(str(_gemm.why_not_packed(form, CPU)))
    for rows, inner, outer in [(45, 77, 70), (14, 32, 33), (1, 1, 1), (6, 1200, 5)]:
        x, w = torch.randn(rows, inner), torch.randn(outer, inner)
        want = _gemm.multiply(x, _gemm.Panels.of(w, None, form))
        got = _gemm.multiply(x.t().contiguous().t(), _gemm.Panels.of(w.t().contiguous().t(), None, form))
        assert torch.equal(got, want)


@pytest.mark.skipif(_native.why_missing() is not None, reason="native library missing")
@pytest.mark.parametrize(("kind", "activation"), [(0, "gelu_tanh"), (1, "silu")])
def test_native_activation_on_every_bf16_value(kind: int, activation: str) -> None:
    x = torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.bfloat16)
    got = x.clone()
    _native.lib().bias_act_fwd(got, None, got, kind)
    assert got[x.isnan()].isnan().all()
    assert got[x == float("inf")].item() == float("inf")
    finite = x.isfinite()
    v = x[finite].double()
    # the same formula without the cancellation of 1 + tanh
    exact = v * torch.sigmoid(v if activation == "silu" else 2 * (2 / torch.pi) ** 0.5 * (v + 0.044715 * v**3))
    # one rounding, 2^-8 of the value at most, of a value good to 1/800 of that; below fp32's normal range anything
    # tiny will do
    error = (got[finite].double() - exact).abs()
    assert (error <= exact.abs() * 2**-8 * 1.01 + 1e-32).all()


def test_native_activation_refuses_other_kinds() -> None:
    if _native.why_missing() is not None:
        pytest.skip("native library missing")
    x = torch.zeros(4, dtype=torch.bfloat16)
    with pytest.raises(TypeError, match="y must be bfloat16 like x"):
        _native.lib().bias_act_fwd(x, None, x.float(), 0)
    with pytest.raises(ValueError, match="kind"):
        _native.lib().bias_act_fwd(x, None, x, 3)


def test_errors_and_why() -> None:
    with pytest.raises(ValueError, match="unknown activation 'tanh'"):
        PackedLinear(torch.zeros(4, 4), activation="tanh")
    with pytest.raises(ValueError, match=r"\(4, 4\)"):
        PackedLinear(torch.zeros(4, 4), torch.zeros(3))
    with pytest.raises(ValueError, match="unknown backend 'mkl'"):
        PackedLinear(torch.zeros(4, 4), backend="mkl")
    with pytest.raises(ValueError, match=r"cannot take this layer: .*float64"):
        PackedLinear(torch.zeros(4, 4), dtype=torch.float64, backend="onednn")
    with pytest.raises(ValueError, match="no backend multiplies"):
        PackedLinear(torch.zeros(4, 4), dtype=torch.float16, weights=torch.bfloat16)
    packed = PackedLinear(torch.zeros(4, 4))
    with pytest.raises(ValueError, match="add, add with a gate, or mul"):
        packed(torch.zeros(1, 4), gate=torch.zeros(4))
    for backend in BACKENDS[:-1]:
        weights = {"native fp32": torch.float32, "native int8": torch.int8}.get(backend, torch.bfloat16)
        assert "cuda" in str(why_not(backend, torch.bfloat16, weights, torch.device("cuda")))
        assert "float64" in str(why_not(backend, torch.float64, torch.float64, CPU))
    assert "dense" in repr(PackedLinear(torch.zeros(4, 4), dtype=torch.float64))
    assert PackedLinear(torch.zeros(4, 0), torch.ones(4))(torch.zeros(2, 0)).tolist() == [[1.0] * 4] * 2
    assert candidates(torch.float64, torch.float64, CPU) == ["dense"]


@pytest.mark.skipif(_native.why_missing() is not None, reason="native library missing")
def test_the_library_refuses_what_does_not_fit() -> None:
    x, panels = torch.zeros(6, 8), _gemm.Panels.of(torch.zeros(4, 8), None, "fp32")
    with pytest.raises(TypeError, match="expected x of"):
        PackedLinear(torch.zeros(4, 8), backend="native fp32")(x.bfloat16())
    with pytest.raises(ValueError, match="x must have columns"):
        _gemm.multiply(torch.zeros(6, 0), _gemm.Panels.of(torch.zeros(4, 0), None, "fp32"))
    with pytest.raises(ValueError, match="panels must have shape"):
        _gemm.multiply(torch.zeros(6, 9), panels)
    with pytest.raises(ValueError, match="other must have"):
        _gemm.multiply(x, panels, join=_gemm.Join.add, other=torch.zeros(6, 5))
    with pytest.raises(ValueError, match="scale must have"):
        _gemm.multiply(x[None], panels, norm=(1, None, None, None, torch.zeros(2, 8), 1e-6, 1.0))
