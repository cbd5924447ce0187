# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""PackedLinear against fp64, by the correctness rule."""

from __future__ import annotations

import pytest
import rule
import torch
from torch import Tensor, nn

from maetok_fast.kernels import _native
from maetok_fast.kernels.linear import ACTIVATIONS, PackedLinear, why_not_packed

CPU = torch.device("cpu")


def assert_rule(got: Tensor, plain: Tensor, exact: Tensor) -> None:
    rule.assert_rule({"y": got}, {"y": plain}, {"y": exact})


def layer(inner: int, outer: int, bias: bool = True) -> nn.Linear:
    made = nn.Linear(inner, outer, bias=bias)
    made.weight.data *= 3
    return made


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("pack", [True, False], ids=["packed", "dense"])
def test_value(activation: str, dtype: torch.dtype, pack: bool) -> None:
    plain = layer(72, 200)
    packed = PackedLinear.of(plain, activation, dtype=dtype, pack=pack)
    assert packed.backend == ("packed" if pack and why_not_packed(dtype, CPU) is None else "dense")
    plain = plain.to(dtype)
    act = ACTIVATIONS[activation][0]
    for shape in [(72,), (1, 72), (3, 5, 72), (0, 72), (130, 72)]:
        x = torch.randn(shape).to(dtype)
        exact = act(nn.functional.linear(x.double(), plain.weight.double(), plain.bias.double()))
        if exact.numel():
            assert_rule(packed(x), act(plain(x)), exact)
        else:
            assert packed(x).shape == exact.shape


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("activation", ["none", "gelu_tanh"])
@pytest.mark.parametrize("bias", [True, False])
def test_partner(dtype: torch.dtype, activation: str, bias: bool) -> None:
    plain = layer(64, 96, bias)
    packed = PackedLinear.of(plain, activation, dtype=dtype)
    plain = plain.to(dtype)
    act = ACTIVATIONS[activation][0]
    x, other = torch.randn(2, 7, 64).to(dtype), torch.randn(2, 9, 96).to(dtype)[:, 1:8]
    bias64 = plain.bias.double() if bias else None
    exact = act(nn.functional.linear(x.double(), plain.weight.double(), bias64))
    before = other.clone()
    assert_rule(packed(x, add=other), other + act(plain(x)), other.double() + exact)
    assert_rule(packed(x, mul=other), other * act(plain(x)), other.double() * exact)
    assert torch.equal(other, before)


@pytest.mark.parametrize("pack", [True, False], ids=["packed", "dense"])
def test_snapshot(pack: bool) -> None:
    """Training on changes nothing: the weights are copied even where they have the right dtype already."""
    plain = layer(64, 96)
    copied = PackedLinear.of(plain, pack=pack)
    x = torch.randn(3, 64)
    before = copied(x)
    with torch.no_grad():
        plain.weight.zero_()
        plain.bias.zero_()
    assert torch.equal(copied(x), before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("pack", [True, False], ids=["packed", "dense"])
def test_input_with_odd_strides(pack: bool, dtype: torch.dtype) -> None:
    """The same bits as from a contiguous input, because either way copies first: torch's own emulated bf16 product of a
    strided input rounds twice. And one rounding: half an ulp of each value, and what the sum in fp32 adds."""
    plain = layer(64, 64)
    packed = PackedLinear.of(plain, dtype=dtype, pack=pack)
    weight, bias = plain.weight.to(dtype).double(), plain.bias.to(dtype).double()
    x = torch.randn(5, 9, 128).to(dtype)
    for view in (x[:, ::2, 10:74], x[..., ::2], x[:, :, :64].transpose(0, 1), x[:1, :, :64].expand(4, -1, -1)):
        got, exact = packed(view), nn.functional.linear(view.double(), weight, bias)
        assert torch.equal(got, packed(view.contiguous()))
        if dtype != torch.float32:
            once = torch.finfo(dtype).eps / 2 * exact.abs() + 64 * torch.finfo(torch.float32).eps * exact.abs().max()
            assert ((got.double() - exact).abs() <= once).all()


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
    assert "cuda" in str(why_not_packed(torch.bfloat16, torch.device("cuda")))
    assert "float64" in str(why_not_packed(torch.float64, CPU))
    assert "dense" in repr(PackedLinear(torch.zeros(4, 4), dtype=torch.float64))
