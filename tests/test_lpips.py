# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""lpips_tail beyond the suite of all ops: the `lpips` package's numbers, maps that are alike, dead pixels, layouts."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from maetok_fast.kernels import _native, backend, lpips_tail, lpips_tail_ref
from maetok_fast.kernels._triton import why_no_triton

KERNELS = ("native", "triton")
BACKENDS = ("reference", *KERNELS)


def need(name: str) -> None:
    reason = {"native": _native.why_missing, "triton": lambda: why_no_triton("cpu")}.get(name, lambda: None)()
    if reason:
        pytest.skip(f"{name}: {reason}")


def naive(f0: Tensor, f1: Tensor, weight: Tensor) -> Tensor:
    n0, n1 = (f.double() / (f.double().pow(2).sum(1, keepdim=True).sqrt() + 1e-10) for f in (f0, f1))
    return (weight.double().view(1, -1, 1, 1) * (n0 - n1) ** 2).sum(1).mean((1, 2))


def maps(shape: tuple[int, ...], seed: int = 0, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """Features as after ReLU, no pixel of them dead, and weights."""
    generator = torch.Generator().manual_seed(seed)
    f0, f1 = (torch.randn(shape, generator=generator).relu() + 1e-3 for _ in range(2))
    return f0.to(dtype), f1.to(dtype), torch.rand(shape[1], generator=generator)


@pytest.mark.parametrize("name", BACKENDS)
def test_same_numbers_as_the_lpips_package(name: str) -> None:
    """With its linear heads, at the channel counts of VGG16: each layer's value, and the gradient."""
    lpips = pytest.importorskip("lpips", reason="the package lpips, whose heads are compared, is not installed")
    need(name)
    heads = torch.load(
        Path(lpips.__file__).parent / "weights" / "v0.1" / "vgg.pth", map_location="cpu", weights_only=True
    )
    for i, (channels, size) in enumerate(((64, 20), (128, 10), (256, 6), (512, 4), (512, 2))):
        head = lpips.NetLinLayer(channels, use_dropout=False)
        weight = heads[f"lin{i}.model.1.weight"]
        head.model[-1].weight.data = weight
        f0, f1, _ = maps((2, channels, size, size), i)
        theirs, mine = f0.clone().requires_grad_(), f0.clone().requires_grad_()
        difference = (lpips.normalize_tensor(theirs) - lpips.normalize_tensor(f1)) ** 2
        expected = lpips.spatial_average(head(difference), keepdim=True).flatten()
        with backend(name):
            got = lpips_tail(mine, f1, weight.flatten())
            got.sum().backward()
        expected.sum().backward()
        torch.testing.assert_close(got, expected, rtol=2e-6, atol=0)
        assert (mine.grad - theirs.grad).abs().max() < 2e-6 * theirs.grad.abs().max()


@pytest.mark.parametrize("name", BACKENDS)
def test_maps_that_are_nearly_alike_keep_their_distance(name: str) -> None:
    """A square expanded into three sums would be all rounding here."""
    need(name)
    f0, _, weight = maps((2, 96, 6, 5))
    f1 = f0 * (1 + 1e-4 * torch.randn(f0.shape))
    exact = naive(f0, f1, weight)
    assert 0 < exact.max() < 1e-7
    with backend(name):
        got = lpips_tail(f0, f1, weight).double()
    assert ((got - exact).abs() / exact).max() < 1e-3
    with backend(name):
        assert torch.equal(lpips_tail(f0, f0, weight), torch.zeros(2))


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("name", BACKENDS)
def test_dead_pixels_have_no_distance_and_no_gradient_of_their_own(name: str, channels_last: bool) -> None:
    need(name)
    f0, f1, weight = maps((2, 7, 4, 5))
    f0[0, :, 1, 2] = 0.0
    f1[1, :, 3, 4] = 0.0
    f0[1, :, 0, 0] = 0.0
    f1[1, :, 0, 0] = 0.0
    exact = naive(f0, f1, weight)
    if channels_last:
        f0, f1 = (f.permute(0, 2, 3, 1).contiguous() for f in (f0, f1))
    f0.requires_grad_()
    f1.requires_grad_()
    with backend(name):
        out = lpips_tail(f0, f1, weight, channels_last)
        grads = torch.autograd.grad(out.sum(), (f0, f1))
    torch.testing.assert_close(out.double(), exact)
    for f, grad in zip((f0, f1), grads):
        dead = (f.abs().amax(3 if channels_last else 1, keepdim=True) == 0).expand_as(f)
        assert dead.any()
        assert (grad[dead] == 0).all()
        assert (grad[~dead].isfinite()).all()


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("name", KERNELS)
def test_what_is_not_finite_spreads_as_in_the_reference(name: str, value: float) -> None:
    need(name)
    f0, f1, weight = maps((2, 5, 3, 4))
    f0[1, 2, 1, 1] = value

    def run(chosen: str) -> list[Tensor]:
        leaves = [t.clone().requires_grad_() for t in (f0, f1, weight)]
        with backend(chosen):
            out = lpips_tail(*leaves)
            return [out.detach(), *torch.autograd.grad(out.sum(), leaves)]

    for got, expected in zip(run(name), run("reference")):
        assert torch.equal(got.isnan(), expected.isnan())
        assert got.isnan().any()


@settings(deadline=None, max_examples=30)
@given(
    st.integers(1, 3), st.integers(1, 40), st.integers(1, 12), st.integers(1, 40), st.integers(0, 2**31),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)  # fmt: skip
def test_both_layouts_agree_with_the_definition_for_any_number_of_threads(
    batch: int, channels: int, height: int, width: int, seed: int, dtype: torch.dtype
) -> None:
    need("native")
    f0, f1, weight = maps((batch, channels, height, width), seed, dtype)
    exact = naive(f0, f1, weight)
    before = torch.get_num_threads()
    grads = []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        try:
            for last in (False, True):
                leaves = [f.permute(0, 2, 3, 1).contiguous() if last else f for f in (f0, f1)]
                leaves = [t.detach().clone().requires_grad_() for t in (*leaves, weight)]
                out = lpips_tail(*leaves, channels_last=last)
                assert out.dtype == torch.float32
                torch.testing.assert_close(out.double(), exact, rtol=3e-6, atol=1e-9)
                g0, g1, gw = torch.autograd.grad(out.square().sum(), leaves)
                grads.append([*(g.permute(0, 3, 1, 2) if last else g for g in (g0, g1)), gw])
        finally:
            torch.set_num_threads(before)
    for a, b in zip(grads[:2], grads[2:]):
        assert all(torch.equal(x, y) for x, y in zip(a, b))  # 1 and 3 threads
    for a, b in zip(grads[0], grads[1]):  # planar and channels last
        scale = a.abs().max().item()
        torch.testing.assert_close(a, b, rtol=2e-2 if a.dtype != torch.float32 else 1e-4, atol=1e-4 * scale + 1e-7)


def test_a_tensor_in_channels_last_format_is_taken_without_a_copy() -> None:
    f0, f1, weight = maps((2, 8, 4, 6))
    x = f0.to(memory_format=torch.channels_last).requires_grad_()
    view = x.permute(0, 2, 3, 1)
    assert view.is_contiguous()
    lpips_tail(view, f1.permute(0, 2, 3, 1), weight, channels_last=True).sum().backward()
    y = f0.clone().requires_grad_()
    lpips_tail(y, f1, weight).sum().backward()
    assert x.grad is not None
    assert x.grad.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(x.grad, y.grad)
    planar = lpips_tail(x, f1, weight)  # copied, but right
    torch.testing.assert_close(planar, lpips_tail(f0, f1, weight))


def test_the_distance_is_fp32() -> None:
    f0, f1, weight = maps((1, 8, 4, 4), dtype=torch.bfloat16)
    assert lpips_tail(f0, f1, weight).dtype == torch.float32
    assert lpips_tail(f0, f1, weight.bfloat16()).dtype == torch.float32
    assert lpips_tail(f0.double(), f1, weight).dtype == torch.float64
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert lpips_tail(f0.float(), f1.float(), weight).dtype == torch.float32
    torch.testing.assert_close(lpips_tail(f0, f1, weight), lpips_tail(f0.float(), f1.float(), weight))
    torch.testing.assert_close(lpips_tail_ref(f0, f1, weight).double(), naive(f0, f1, weight))


def test_what_no_grid_or_program_holds_is_known_before_the_launch() -> None:
    for batch, channels, fits in ((65535, 1024, True), (65536, 1, False), (1, 1025, False)):
        f = torch.empty(batch, channels, 1, 1, device="meta")
        args = lpips_tail.arguments(f, f, f[0, :, 0, 0])
        assert (lpips_tail.unsupported("triton", args) is None) == fits


def test_errors_in_words() -> None:
    f0, f1, weight = maps((1, 8, 4, 4))
    with pytest.raises(
        ValueError, match=r"lpips_tail: f1 must be .* with B = 1, D1 = 8, D2 = 4, D3 = 4, got \(1, 8, 4, 3\)"
    ):
        lpips_tail(f0, f1[..., :3], weight)
    with pytest.raises(ValueError, match=r"weight must be \(4,\) for f0 \(B, H, W, C\) \(1, 8, 4, 4\), got \(8,\)"):
        lpips_tail(f0, f1, weight, channels_last=True)
    need("native")
    stats, out = torch.empty(1, 4, 16), torch.empty(1)
    with pytest.raises(ValueError, match="stats must have shape"):
        _native.lib().lpips_fwd(f0, f1, weight, out, stats[:, :3].contiguous(), 0, 1e-10)
    with pytest.raises(TypeError, match="f1 must be float32 like f0; got bfloat16"):
        _native.lib().lpips_fwd(f0, f1.bfloat16(), weight, out, stats, 0, 1e-10)
