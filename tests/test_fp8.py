# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""FP8: the casts bit by bit, the linear layer against an independent emulation, what it falls back from, what it keeps.

The emulation below is numpy: it rounds by searching the nearest of the 256 values and multiplies in fp64.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from maetok_fast import kernels
from maetok_fast.kernels import BackendError, Fp8Linear, _dispatch, adaln, adaln_linear_fp8, backend, why_not_fp8
from maetok_fast.kernels import fp8_linear as module
from maetok_fast.kernels._triton import why_no_triton
from maetok_fast.kernels.fp8 import E4M3, E5M2, adaln_quantize_ref, fp8_quantize_columns_ref, fp8_quantize_ref
from maetok_fast.precision import to_fp8

FLOATS = [torch.float32, torch.bfloat16, torch.float16]
KINDS = {"e4m3": E4M3, "e5m2": E5M2}
needs_triton = pytest.mark.skipif(why_no_triton("cpu") is not None, reason=str(why_no_triton("cpu")))


# ---- the independent emulation -------------------------------------------------------------------------------------


def nearest(values: np.ndarray, kind: str) -> np.ndarray:
    """The nearest float8 value, ties to the even bit pattern."""
    table = torch.arange(256).to(torch.uint8).view(KINDS[kind]).double().numpy()
    keep = np.isfinite(table) & ~np.signbit(table)
    grid, bits = table[keep], np.arange(256)[keep]
    order = np.argsort(grid)
    grid, bits = grid[order], bits[order]
    magnitude = np.minimum(np.abs(values.astype(np.float64)), grid[-1])
    above = np.clip(np.searchsorted(grid, magnitude), 1, len(grid) - 1)
    low, high = grid[above - 1], grid[above]
    up = (magnitude - low > high - magnitude) | ((magnitude - low == high - magnitude) & (bits[above] % 2 == 0))
    return np.copysign(np.where(up, high, low), values)


def cast(values: np.ndarray, kind: str, axis: int | None) -> tuple[np.ndarray, np.ndarray]:
    """(fp64 data, fp64 scale) of fp32 values; scale and product in fp32, as defined."""
    values = values.astype(np.float32)
    top = np.float32(448 if kind == "e4m3" else 57344)
    amax = np.abs(values).max(axis=axis, keepdims=axis is not None)
    scale = np.maximum(np.float32(amax) / top, np.float32(2.0**-126)).astype(np.float32)
    return nearest(values * (np.float32(1) / scale), kind), np.float64(scale)


def emulated(x: Tensor, w: Tensor, b: Tensor, g: Tensor, scaling: str) -> dict[str, np.ndarray]:
    """y, dx, dw, db of the quantised linear layer in fp64, for 2-D x and g."""
    xn, wn, bn, gn = (t.detach().float().numpy() for t in (x, w, b, g))
    axis = 1 if scaling == "row" else None
    (x8, sx), (w8, sw) = cast(xn, "e4m3", axis), cast(wn, "e4m3", axis)
    y = (x8 * sx) @ (w8 * sw).T + bn
    if scaling == "tensor":
        g8, sg = cast(gn, "e5m2", None)
        return {"y": y, "dx": (g8 * sg) @ (w8 * sw), "dw": (g8 * sg).T @ (x8 * sx), "db": gn.astype(np.float64).sum(0)}
    for_x, s_row = cast(gn * sw.T.astype(np.float32), "e5m2", 1)
    for_w, s_col = cast(gn * sx.astype(np.float32), "e5m2", 0)
    return {"y": y, "dx": (for_x * s_row) @ w8, "dw": (for_w * s_col).T @ x8, "db": gn.astype(np.float64).sum(0)}


def within(got: Tensor, exact: np.ndarray) -> None:
    """One rounding to bf16, one to the tensor's dtype, and fp32's summation."""
    wide = torch.from_numpy(np.asarray(exact))
    eps = 2.0**-8 + (torch.finfo(got.dtype).eps / 2)
    allowed = eps * wide.abs() + 1e-5 * wide.abs().max()
    assert got.shape == wide.shape
    assert ((got.double() - wide).abs() <= allowed).all(), (got.double() - wide).abs().max()


def relative(got: Tensor, exact: Tensor) -> float:
    return ((got.double() - exact).norm() / exact.norm()).item()


# ---- the casts -----------------------------------------------------------------------------------------------------


def hard_rows(dtype: torch.dtype) -> Tensor:
    """Rows of very different sizes, among them zeros, subnormals, NaN and infinity; ties in the last place."""
    x = torch.randn(12, 70) * 10.0 ** torch.linspace(-4, 4, 12)[:, None]
    x[0], x[1, 3], x[2, 5], x[3] = 0, float("nan"), float("inf"), 1e-7
    x[4] = torch.arange(70) * 0.5  # ties
    x[5, 0] = 60000
    return x.to(dtype)


def bits(x: Tensor) -> Tensor:
    """The bits; all NaN alike, whose sign means nothing."""
    return torch.where(x.float().isnan(), 0x7F, x.view(torch.uint8))


def assert_same(a: tuple[Tensor, ...], b: tuple[Tensor, ...]) -> None:
    assert torch.equal(bits(a[0]), bits(b[0]))
    assert a[1].dtype == b[1].dtype == torch.float32
    assert torch.equal(a[1].nan_to_num(-7), b[1].nan_to_num(-7))


@needs_triton
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_kernels_are_bit_exact(kind: str, dtype: torch.dtype) -> None:
    x = hard_rows(dtype)
    factor, per_row = torch.rand(70) + 0.1, torch.rand(12) + 0.1
    with backend("triton"):
        assert_same(kernels.fp8_quantize(x, kind, "row"), fp8_quantize_ref(x, kind, "row"))
        assert_same(kernels.fp8_quantize(x, kind, "row", factor), fp8_quantize_ref(x, kind, "row", factor))
        assert_same(kernels.fp8_quantize_columns(x, kind), fp8_quantize_columns_ref(x, kind))
        assert_same(kernels.fp8_quantize_columns(x, kind, per_row), fp8_quantize_columns_ref(x, kind, per_row))
        for part in (x, x[4:], x[:1], torch.randn(3, 3000).to(dtype)):
            assert_same(kernels.fp8_quantize(part, kind, "tensor"), fp8_quantize_ref(part, kind, "tensor"))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("axis", [1, None], ids=["row", "tensor"])
def test_the_reference_is_the_definition(kind: str, axis: int | None) -> None:
    x = torch.randn(33, 50) * 10.0 ** torch.linspace(-20, 20, 33)[:, None]
    data, scale = fp8_quantize_ref(x, kind, "tensor" if axis is None else "row")
    wanted, wanted_scale = cast(x.numpy(), kind, axis)
    assert np.array_equal(data.double().numpy(), wanted)
    assert np.array_equal(scale.double().numpy(), wanted_scale)


@given(st.floats(2.0**-126, 2.0**127, width=32), st.sampled_from(sorted(KINDS)))
@settings(max_examples=300, deadline=None)
def test_the_largest_value_lands_on_the_top(size: float, kind: str) -> None:
    data, scale = fp8_quantize_ref(torch.tensor([[size, -size / 3]]), kind, "row")
    assert data[0, 0].float().item() == torch.finfo(KINDS[kind]).max or size < 57344 * 2.0**-126
    assert scale.isfinite().all()
    assert abs(data[0, 0].double().item() * scale.double().item() - size) <= size / 8


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_an_overflow_is_seen(bad: float) -> None:
    x = torch.randn(4, 32)
    x[2, 7] = bad
    for per, hit in (("row", [False, False, True, False]), ("tensor", [True] * 4)):
        data, scale = fp8_quantize_ref(x, "e4m3", per)
        y = (data.float() * scale) @ torch.ones(32)
        assert y.isnan().tolist() == hit


def test_columns_are_transposed_and_padded() -> None:
    for rows, padded in ((1, 16), (16, 16), (17, 32), (1540, 1552)):
        x = torch.randn(rows, 32)
        data, scale = fp8_quantize_columns_ref(x, "e5m2")
        assert data.shape == (32, padded)
        assert (data[:, rows:].float() == 0).all()
        wanted, _ = fp8_quantize_ref(x.t().contiguous(), "e5m2", "row")
        assert torch.equal(data[:, :rows].float(), wanted.float())
        assert scale.shape == (32, 1)


@pytest.mark.parametrize("name", ["reference", "triton"])
@pytest.mark.parametrize("tokens", [0, 3, None])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_adaln_quantize_is_adaln_within_half_a_step(name: str, tokens: int | None, dtype: torch.dtype) -> None:
    if name == "triton" and why_no_triton("cpu") is not None:
        pytest.skip(str(why_no_triton("cpu")))
    x = (1 + 3 * torch.randn(2, 5, 48)).to(dtype)
    like = (2, tokens, 48) if tokens else (2, 48)
    shift, scale = (None, None) if tokens is None else (torch.randn(like).to(dtype), torch.randn(like).bfloat16())
    weight, bias = 1 + torch.randn(48), torch.randn(48)
    with backend(name):
        data, row_scale, stats = kernels.adaln_quantize(x, shift, scale, weight, bias, offset=0.5)
    wide = [None if t is None else t.double() for t in (x, shift, scale, weight, bias)]
    y = kernels.adaln_ref(wide[0], *wide[1:], offset=0.5)
    assert row_scale.shape == (2, 5, 1)
    step = torch.maximum(y.abs() / 16, row_scale.double() * 2.0**-10)  # half a step: of 3 bits, or of a subnormal
    assert ((data.double() * row_scale.double() - y).abs() <= step * 1.001).all()
    torch.testing.assert_close(stats[..., 0].double(), wide[0].mean(-1), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        stats[..., 1].double(), (wide[0].var(-1, correction=0) + 1e-6).rsqrt(), rtol=1e-5, atol=0
    )


def test_errors_in_words() -> None:
    x = torch.zeros(2, 16)
    for call, match in (
        (lambda: kernels.fp8_quantize(x, "e3m4"), "kind must be one of e4m3, e5m2, got 'e3m4'"),
        (lambda: kernels.fp8_quantize(x, "e4m3", "column"), "per must be one of row, tensor"),
        (lambda: kernels.fp8_quantize(x, "e4m3", "tensor", torch.ones(16)), "factor goes with per='row'"),
        (
            lambda: kernels.fp8_quantize(x, "e4m3", "row", torch.ones(2)),
            r"factor must be \(K,\) with K = 16",
        ),
        (
            lambda: kernels.fp8_quantize_columns(x, "e4m3", torch.ones(16)),
            r"factor must be \(M,\) with M = 2",
        ),
        (lambda: kernels.fp8_quantize_columns(x[0]), r"x must be \(M, K\), got \(16,\)"),
        (lambda: Fp8Linear(16, 16, scaling="block"), "unknown scaling 'block': expected one of row, tensor"),
    ):
        with pytest.raises(ValueError, match=match):
            call()


def test_old_architectures_are_told() -> None:
    from maetok_fast.kernels._tiles import pretend_arch

    with pretend_arch(80):
        for op, x in ((kernels.fp8_quantize, torch.zeros(2, 16)), (kernels.adaln_quantize, torch.zeros(1, 2, 16))):
            assert "compute capability 8.9" in str(op.unsupported("triton", op.arguments(x)))
        assert (
            kernels.transpose_pad.unsupported(
                "triton", kernels.transpose_pad.Args(torch.zeros(2, 16, dtype=torch.uint8))
            )
            is None
        )


# ---- the products --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scaling", ["tensor", "row"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_emulated_product_is_scaled_mm(kind: str, scaling: str) -> None:
    a, sa = fp8_quantize_ref(torch.randn(24, 32), kind, scaling)
    b, sb = fp8_quantize_ref(torch.randn(48, 32), "e4m3", scaling)
    ours = module._matmul(a, sa, b, sb, True)
    theirs = torch._scaled_mm(a, b.t(), sa, sb.t().contiguous() if sb.ndim else sb, out_dtype=torch.bfloat16)
    torch.testing.assert_close(ours, theirs, rtol=2**-7, atol=1e-3)


def layer(scaling: str, dtype: torch.dtype = torch.float32, inner: int = 48, outer: int = 32) -> Fp8Linear:
    made = Fp8Linear(inner, outer, dtype=dtype, scaling=scaling, emulate=True)
    with torch.no_grad():  # channels of different sizes, as trained weights have
        made.weight.mul_(torch.rand(outer, 1) * 4 + 0.1)
    return made


@pytest.mark.parametrize("name", [None, "triton"])
@pytest.mark.parametrize("scaling", module.SCALINGS)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_value_and_gradients(dtype: torch.dtype, scaling: str, name: str | None) -> None:
    if name is not None and why_no_triton("cpu") is not None:
        pytest.skip(str(why_no_triton("cpu")))
    linear = layer(scaling, dtype)
    x = (torch.randn(37, 48) * torch.rand(37, 1) * 5).to(dtype).requires_grad_()
    g = torch.randn(37, 32).to(dtype)

    def run() -> dict[str, Tensor]:
        y = linear(x)
        grads = torch.autograd.grad(y, [x, linear.weight, linear.bias], g)
        return {"y": y.detach()} | dict(zip(("dx", "dw", "db"), grads))

    if name is None:
        got = run()
    else:
        with backend(name):
            got = run()
    assert all(t.dtype == dtype for t in got.values())
    for key, exact in emulated(x, linear.weight, linear.bias, g, scaling).items():
        within(got[key], exact)


@pytest.mark.parametrize("scaling", module.SCALINGS)
def test_leading_dimensions_strides_and_subsets_of_gradients(scaling: str) -> None:
    linear = layer(scaling)
    x = torch.randn(3, 48, 5).transpose(1, 2).requires_grad_()
    flat = x.detach().reshape(-1, 48).requires_grad_()
    g = torch.randn(3, 5, 32)
    y, y_flat = linear(x), linear(flat)
    assert torch.equal(y.flatten(0, 1), y_flat)
    everything = [flat, linear.weight, linear.bias]
    together = torch.autograd.grad(y_flat, everything, g.reshape(-1, 32), retain_graph=True)
    assert torch.equal(torch.autograd.grad(y, x, g)[0].reshape(-1, 48), together[0])
    for i, wanted in enumerate(everything):
        for t in everything:
            t.requires_grad_(t is wanted)
        (alone,) = torch.autograd.grad(linear(flat), wanted, g.reshape(-1, 32))
        assert torch.equal(alone, together[i])
    no_bias = Fp8Linear(48, 32, bias=False, scaling=scaling, emulate=True)
    no_bias(torch.randn(2, 48)).sum().backward()
    assert no_bias.weight.grad is not None


def test_autocast_decides_the_output() -> None:
    linear, x = layer("row"), torch.randn(4, 48)
    with torch.autocast("cpu", torch.bfloat16):
        y = linear(x)
        assert y.dtype == torch.bfloat16
        y.sum().backward()
    assert linear.weight.grad.dtype == torch.float32
    assert torch.equal(y.float(), linear(x))


@pytest.mark.parametrize(("scaling", "outliers", "low", "high"), [
    ("row", False, 0.03, 0.045), ("tensor", False, 0.03, 0.045), ("row", True, 0.03, 0.045), ("tensor", True, 0.3, 0.6),
])  # fmt: skip
def test_error_against_unquantised_fp64(scaling: str, outliers: bool, low: float, high: float) -> None:
    """The figures of fp8_linear's docstring: the tokens that are no outliers."""
    generator = torch.Generator().manual_seed(5)
    x, w = (torch.randn(n, 256, generator=generator) for n in (512, 128))
    if outliers:
        x[::64] *= 1e5
    linear = Fp8Linear(256, 128, bias=False, scaling=scaling, emulate=True)
    linear.weight.data.copy_(w)
    rows = torch.arange(512) % 64 != 0
    error = relative(linear(x)[rows], x[rows].double() @ w.double().t())
    assert low < error < high, error


def test_gradients_against_unquantised_fp64() -> None:
    """e5m2 has two bits: 5.7 to 5.9 % of noise in the gradients, and no bias."""
    for scaling in module.SCALINGS:
        linear, x, g = layer(scaling, inner=256, outer=128), torch.randn(512, 256), torch.randn(512, 128)
        dx, dw = torch.autograd.grad(linear(x.requires_grad_()), [x, linear.weight], g)
        exact = g.double() @ linear.weight.detach().double(), g.double().t() @ x.detach().double()
        for got, wanted in zip((dx, dw), exact):
            assert 0.045 < relative(got, wanted) < 0.07
            slope = (got.double() * wanted).sum() / wanted.square().sum()
            assert abs(slope - 1) < 0.01


@pytest.mark.parametrize("scaling", module.SCALINGS)
def test_training_reaches_what_fp32_reaches(scaling: str) -> None:
    losses = []
    for emulate in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 16))
        if emulate:
            model = nn.Sequential(*[Fp8Linear.of(m, scaling=scaling, emulate=True) if isinstance(m, nn.Linear) else m
                                    for m in model])  # fmt: skip
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        x = torch.randn(256, 16)
        y = torch.sin(2 * x)
        for _ in range(150):
            loss = F.mse_loss(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        losses.append(loss.item())
    assert losses[1] < 1.3 * losses[0] + 0.01


# ---- fused with the norm -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [0, 3, None])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("name", [None, "reference", "triton"])
def test_adaln_linear(name: str | None, dtype: torch.dtype, tokens: int | None) -> None:
    """Value and gradients against fp64 through the quantised middle: straight-through for the cast."""
    if name == "triton" and why_no_triton("cpu") is not None:
        pytest.skip(str(why_no_triton("cpu")))
    linear = layer("row", dtype)
    like = (2, tokens, 48) if tokens else (2, 48)
    x = (1 + 2 * torch.randn(2, 5, 48)).to(dtype)
    shift, scale = (None, None) if tokens is None else (torch.randn(like).to(dtype), torch.randn(like).to(dtype))
    norm = [t if t is None else t.requires_grad_() for t in (x, shift, scale, 1 + torch.randn(48), torch.randn(48))]
    given = [t for t in norm if t is not None]
    g = torch.randn(2, 5, 32).to(dtype)

    def run() -> tuple[Tensor, ...]:
        y = adaln_linear_fp8(linear, *norm, 1e-6, 0.5)
        return (y.detach(), *torch.autograd.grad(y, [linear.weight, linear.bias, *given], g))

    if name is None:
        y, dw, db, *rest = run()
    else:
        with backend(name):
            y, dw, db, *rest = run()
    data, row_scale, _ = adaln_quantize_ref(*[None if t is None else t.detach() for t in norm], 1e-6, 0.5)
    middle = (data.float() * row_scale).flatten(0, 1)
    exact = emulated(middle, linear.weight, linear.bias, g.flatten(0, 1), "row")
    # the kernels' sums may differ from the reference's in the last place: a cast may fall on the other side, rarely
    for got, key in ((y.flatten(0, 1), "y"), (dw, "dw"), (db, "db")):
        assert relative(got, torch.from_numpy(exact[key])) < 0.02
    wide = [None if t is None else t.detach().double().requires_grad_() for t in norm]
    out = kernels.adaln_ref(wide[0], *wide[1:], eps=1e-6, offset=0.5)
    through = torch.autograd.grad(out, [t for t in wide if t is not None], torch.from_numpy(exact["dx"]).view(2, 5, 48))
    for got, original, wanted in zip(rest, given, through):
        assert got.dtype == original.dtype
        assert relative(got, wanted) < 0.03


def test_adaln_linear_falls_back_to_the_two() -> None:
    x, shift, scale = torch.randn(2, 5, 48), torch.randn(2, 48), torch.randn(2, 48)
    for linear in (Fp8Linear(48, 32), layer("tensor")):
        assert torch.equal(adaln_linear_fp8(linear, x, shift, scale), linear(adaln(x, shift, scale)))
    with pytest.raises(ValueError, match="scale must be"):
        adaln_linear_fp8(layer("row"), x, shift, scale[:1])


# ---- what is kept --------------------------------------------------------------------------------------------------


def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    made: list[int] = []
    stock = module._Cast.__init__

    def init(self: Any, *args: Any) -> None:
        made.append(1)
        stock(self, *args)

    monkeypatch.setattr(module._Cast, "__init__", init)
    return made


@pytest.mark.parametrize("optimizer", [
    lambda p: torch.optim.AdamW(p, lr=0.1), lambda p: torch.optim.AdamW(p, lr=0.1, fused=True),
    lambda p: torch.optim.SGD(p, lr=0.1, foreach=True),
], ids=["adamw", "fused", "foreach"])  # fmt: skip
def test_the_cast_is_made_once_a_step(monkeypatch: pytest.MonkeyPatch, optimizer: Callable[..., Any]) -> None:
    made, linear, x = counted(monkeypatch), layer("row"), torch.randn(4, 48)
    opt = optimizer(linear.parameters())
    for step in range(3):
        for _ in range(4):  # gradient accumulation
            linear(x).square().sum().backward()
        before = linear(x)
        assert len(made) == step + 1
        opt.step()
        opt.zero_grad()
        assert not torch.equal(linear(x), before)
    kernels.ema_update([linear.weight], [torch.zeros_like(linear.weight)], 0.0)
    assert torch.equal(linear(x), linear.bias.detach().bfloat16().float().expand(4, -1))


def test_sampling_without_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    made, linear, x = counted(monkeypatch), layer("row"), torch.randn(4, 48)
    with torch.inference_mode():
        first = linear(x)
        assert torch.equal(linear(x), first)
    with torch.no_grad():
        assert torch.equal(linear(x), first)
    assert len(made) == 1
    linear(x).sum().backward()  # the cast made in inference mode serves training
    assert linear.weight.grad is not None
    assert len(made) == 1
    with torch.inference_mode():
        born = layer("row")
        y = born(x)
        born.weight.zero_()  # no version counter: never kept
        assert not torch.equal(born(x), y)


def test_copies_moves_and_forgetting() -> None:
    linear, x = layer("row"), torch.randn(4, 48)
    before = linear(x)
    twin = copy.deepcopy(linear)
    assert twin._kept is None
    assert torch.equal(twin(x), before)
    with torch.no_grad():
        twin.weight.zero_()
    assert torch.equal(linear(x), before)
    assert not torch.equal(twin(x), before)
    linear.weight.data.zero_()  # unseen by the version counter, as documented
    linear.forget_cast()
    assert not torch.equal(linear(x), before)
    linear.weight.data = torch.ones_like(linear.weight)
    assert (linear(x) - linear(x)[:, :1]).abs().max() < 1
    assert linear.bfloat16()(x.bfloat16()).dtype == torch.bfloat16


def test_the_backward_uses_the_weights_of_its_forward() -> None:
    linear, x = layer("row"), torch.randn(4, 48, requires_grad=True)
    wanted = torch.autograd.grad(linear(x).sum(), x)[0]
    y = linear(x)
    with torch.no_grad():
        linear.weight.zero_()
    linear(x)
    assert torch.equal(torch.autograd.grad(y.sum(), x)[0], wanted)


def test_state_dicts_and_sharing() -> None:
    plain = nn.Linear(48, 32)
    linear = Fp8Linear.of(plain, emulate=True)
    assert linear.weight is plain.weight
    assert linear.bias is plain.bias
    assert linear.state_dict().keys() == plain.state_dict().keys()
    linear(torch.randn(2, 48))
    linear.load_state_dict(nn.Linear(48, 32).state_dict())
    assert torch.equal(linear(torch.zeros(2, 48))[0], plain.bias.bfloat16().float())
    assert "scaling='row'" in repr(linear)
    assert "emulate" in repr(linear)


@pytest.mark.parametrize("scaling", module.SCALINGS)
def test_torch_compile(scaling: str) -> None:
    torch._dynamo.reset()
    linear, x, g = layer(scaling), torch.randn(5, 48, requires_grad=True), torch.randn(5, 32)
    compiled = torch.compile(lambda x: linear(x) * 2, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        eager = torch.autograd.grad(linear(x) * 2, [x, linear.weight, linear.bias], g)
        traced = torch.autograd.grad(compiled(x), [x, linear.weight, linear.bias], g)
        for a, b in zip(traced, eager):
            torch.testing.assert_close(a, b, rtol=2**-7, atol=1e-5)
        with torch.no_grad():
            linear.weight.mul_(2)
    if scaling == "row":
        modulated = torch.compile(lambda *args: adaln_linear_fp8(linear, *args), fullgraph=True, backend="aot_eager")
        args = [t.requires_grad_() for t in (torch.randn(2, 5, 48), torch.randn(2, 48), torch.randn(2, 48))]
        results = []
        for run in (modulated, lambda *args: adaln_linear_fp8(linear, *args)):
            y = run(*args)
            results.append((y.detach(), *torch.autograd.grad(y.square().sum(), [*args, linear.weight])))
        for a, b in zip(*results):
            assert relative(a, b.double()) < 0.01


# ---- what it does not take -----------------------------------------------------------------------------------------


def test_why_not() -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert "multiples of 16" in str(why_not_fp8(40, 64, torch.float32, cpu, emulate=True))
    assert "multiples of 16" in str(why_not_fp8(64, 40, torch.float32, cuda))
    assert "float64" in str(why_not_fp8(64, 64, torch.float64, cpu, emulate=True))
    assert "compute capability 8.9 or newer, this is cpu" in str(why_not_fp8(64, 64, torch.float32, cpu))
    assert why_not_fp8(64, 64, torch.float32, cpu, emulate=True) is None
    if not torch.cuda.is_available():
        assert "no CUDA device" in str(why_not_fp8(64, 64, torch.float32, cuda))


@pytest.mark.parametrize(("capability", "scaling", "match"), [
    ((8, 0), "row", "this GPU has 8.0"), ((8, 9), "row", None), ((9, 0), "row", None), ((10, 0), "row", None),
    ((12, 0), "row", "use scaling='tensor'"), ((12, 0), "tensor", None),
])  # fmt: skip
def test_why_not_by_hardware(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], scaling: str, match: str | None
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    why = why_not_fp8(64, 64, torch.bfloat16, torch.device("cuda"), scaling)
    assert why is None if match is None else match in str(why)


def test_fallbacks_are_nn_linear_and_say_so(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    x = torch.randn(3, 64)
    for linear in (Fp8Linear(64, 32), Fp8Linear(64, 40, emulate=True), Fp8Linear(64, 32, emulate=True).double()):
        _dispatch._LOGGED.clear()
        caplog.clear()
        given = x.to(linear.weight.dtype)
        with caplog.at_level(logging.DEBUG, logger="maetok_fast"):
            for _ in range(3):
                assert torch.equal(linear(given), F.linear(given, linear.weight, linear.bias))
        assert len([r for r in caplog.records if "Fp8Linear" in r.message]) == 1
        monkeypatch.setattr(_dispatch._State, "strict", True)
        with pytest.raises(BackendError, match="Fp8Linear: MAETOK_FAST_STRICT=1 and no kernel can take these inputs"):
            linear(given)
        monkeypatch.setattr(_dispatch._State, "strict", False)
    linear = Fp8Linear(64, 32, emulate=True)
    monkeypatch.setattr(_dispatch._State, "strict", True)
    assert linear(x[:0]).shape == (0, 32)
    linear(x).sum().backward()


class _Toy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(64, 384))
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 64)) for _ in range(3))
        self.head = nn.Linear(64, 16)
        self.odd = nn.Linear(64, 40)


def test_to_fp8_says_what_it_did() -> None:
    model = _Toy()
    weights = dict(model.named_parameters())
    report = to_fp8(model, min_features=64, emulate=True)
    swapped = [r.name for r in report.rows if r.reason is None]
    assert swapped == [f"blocks.{i}.{j}" for i in range(3) for j in (0, 2)]
    assert all(isinstance(model.get_submodule(name), Fp8Linear) for name in swapped)
    assert all(a is weights[n] for n, a in model.named_parameters())
    why = {r.name: str(r.reason) for r in report.rows}
    assert "row per image" in why["adaLN_modulation.1"]
    assert "fewer than 64" in why["head"]
    assert "multiples of 16" in why["odd"]
    text = str(report)
    assert "3 x blocks.*.*" in text
    assert f"{report.share:.0%} of the linear layers" in text
    assert [r.name for r in to_fp8(model, min_features=64, emulate=True).rows if r.reason is None] == swapped


def test_to_fp8_without_the_hardware_changes_nothing() -> None:
    if torch.cuda.is_available():
        pytest.skip("there may be hardware")
    model = _Toy()
    report = to_fp8(model, min_features=16)
    assert not any(isinstance(m, Fp8Linear) for m in model.modules())
    assert report.share == 0
    assert all(r.reason for r in report.rows)
    assert "this is cpu" in str(report)


# ---- on a device ---------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("scaling", module.SCALINGS)
def test_on_a_gpu(scaling: str) -> None:
    why = module.why_no_fp8_hardware(torch.device("cuda"), scaling)
    if why is not None:
        pytest.skip(why)
    real = layer(scaling, torch.bfloat16, 256, 128).cuda()
    real.emulate = False
    x, g = torch.randn(4, 77, 256).bfloat16().cuda().requires_grad_(), torch.randn(4, 77, 128).bfloat16().cuda()

    def run() -> tuple[Tensor, ...]:
        y = real(x)
        return (y.detach(), *torch.autograd.grad(y, [x, real.weight, real.bias], g))

    got = run()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    real.emulate = True
    for a, b in zip(got, run()):
        torch.testing.assert_close(a, b, rtol=2**-6, atol=1e-2 * b.abs().max().item())
