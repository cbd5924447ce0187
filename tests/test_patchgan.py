# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""norm_act, affine_act and the blur against torch.nn's modules; what the suite over all ops cannot know."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from maetok_fast.kernels import _dispatch, affine_act, backend, blur_down, blur_up, norm_act

BACKENDS = ("reference", "native", "cuda")
SIZES = st.integers(1, 9)
close = torch.testing.assert_close
fp64 = torch.float64


@pytest.fixture(params=BACKENDS)
def run(request: pytest.FixtureRequest) -> Callable[[], contextlib.AbstractContextManager[None]]:
    if request.param != "reference":
        reason = _dispatch.why_missing(request.param, "cpu")
        if reason is not None:
            pytest.skip(f"{request.param}: {reason}")
    return lambda: backend(request.param)


def affine(channels: int) -> tuple[Tensor, Tensor]:
    return torch.randn(channels) + 1, torch.randn(channels)


def check_gradients(ours: Callable[..., Tensor], theirs: Callable[..., Tensor], *given_: Tensor) -> None:
    """Value and gradients of `ours` in fp32 against `theirs` in fp64."""
    mine = [t.clone().requires_grad_() for t in given_]
    exact = [t.double().requires_grad_() for t in given_]
    a, b = ours(*mine), theirs(*exact)
    close(a.double(), b, rtol=1e-4, atol=1e-5)
    cotangent = torch.randn_like(a)
    for x, y in zip(torch.autograd.grad(a, mine, cotangent), torch.autograd.grad(b, exact, cotangent.double())):
        close(x.double(), y, rtol=1e-3, atol=2e-4)


def test_batch_norm_with_running_statistics(run: Callable[[], contextlib.AbstractContextManager[None]]) -> None:
    x, (weight, bias) = 3 + 2 * torch.randn(4, 6, 5, 7), affine(6)
    bn = nn.BatchNorm2d(6, eps=1e-5, momentum=0.1)
    with torch.no_grad():
        bn.weight.copy_(weight), bn.bias.copy_(bias)
        want = F.leaky_relu(bn(x), 0.2)
        with run():
            y, mean, var = norm_act(x, None, weight, bias)
            count = x.numel() / 6
            running_mean, running_var = 0.1 * mean, 0.9 + 0.1 * var * count / (count - 1)
            close(y, want)
            close(running_mean, bn.running_mean)
            close(running_var, bn.running_var)
            bn.eval()
            close(affine_act(x, None, running_mean, running_var, weight, bias), F.leaky_relu(bn(x), 0.2))


@pytest.mark.parametrize("groups", [1, 2, 6])
def test_group_norm_and_instance_norm(run: Callable[[], contextlib.AbstractContextManager[None]], groups: int) -> None:
    x, conv_bias, (weight, bias) = torch.randn(3, 6, 4, 5), torch.randn(6), affine(6)

    def theirs(x: Tensor, c: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return F.leaky_relu(F.group_norm(x + c.view(1, -1, 1, 1), groups, w, b, 1e-6), 0.2)

    with run():
        check_gradients(
            lambda x, c, w, b: norm_act(x, c, w, b, "group", groups, 1e-6)[0], theirs, x, conv_bias, weight, bias
        )
        if groups == 6:
            check_gradients(
                lambda x, c, w, b: norm_act(x, c, w, b, "instance", 1, 1e-6)[0], theirs, x, conv_bias, weight, bias
            )


@settings(max_examples=25, deadline=None)
@given(st.tuples(SIZES, SIZES, SIZES, SIZES), st.sampled_from(["batch", "instance"]), st.integers(0, 2**31))
def test_any_shape(shape: tuple[int, int, int, int], norm: str, seed: int) -> None:
    torch.manual_seed(seed)
    if (shape[2] * shape[3]) * (shape[0] if norm == "batch" else 1) < 8:
        return  # a variance of almost nothing magnifies rounding
    x, (weight, bias) = torch.randn(shape), affine(shape[1])

    def theirs(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        if norm == "batch":
            return F.leaky_relu(F.batch_norm(x, None, None, w, b, True, 0.0, 1e-5), 0.2)
        return F.leaky_relu(F.instance_norm(x, None, None, w, b, True, 0.0, 1e-5), 0.2)

    check_gradients(lambda x, w, b: norm_act(x, None, w, b, norm)[0], theirs, x, weight, bias)


def test_a_mean_far_from_zero_costs_no_digits(run: Callable[[], contextlib.AbstractContextManager[None]]) -> None:
    """E[x^2] - E[x]^2 would lose everything here: the mean is 10^3 (then 10^4) standard deviations."""
    for offset, allowed in ((1e3, 1e-4), (1e4, 1e-3)):
        x = torch.randn(4, 3, 70, 64) + offset
        exact = F.batch_norm(x.double(), None, None, training=True)
        with run():
            y, _mean, var = norm_act(x, slope=1.0)
        close(var.double(), x.double().var((0, 2, 3), correction=0), rtol=1e-4, atol=0)
        assert (y - exact).abs().max() < 2 * allowed


def test_a_batch_norm_removes_the_convolution_bias(
    run: Callable[[], contextlib.AbstractContextManager[None]],
) -> None:
    x, conv_bias = torch.randn(2, 3, 8, 8), torch.randn(3).requires_grad_()
    with run():
        y, mean, _ = norm_act(x, conv_bias)
        plain, plain_mean, _ = norm_act(x)
    close(y, plain, rtol=1e-5, atol=1e-5)
    close(mean, plain_mean + conv_bias.detach())
    assert torch.autograd.grad(y.square().sum(), conv_bias)[0].abs().max() < 1e-4


def test_statistics_carry_no_gradient_and_nan_stays_in_its_channel(
    run: Callable[[], contextlib.AbstractContextManager[None]],
) -> None:
    x = torch.randn(2, 3, 8, 8)
    x[1, 1, 2, 3] = float("nan")
    with run():
        y, mean, var = norm_act(x.requires_grad_())
    assert y.requires_grad
    assert not mean.requires_grad
    assert not var.requires_grad
    assert y[:, 1].isnan().all()
    assert y[:, [0, 2]].isfinite().all()


def test_act_norm_and_leaky_relu(run: Callable[[], contextlib.AbstractContextManager[None]]) -> None:
    x, loc, scale = torch.randn(2, 3, 4, 5), torch.randn(3), torch.randn(3)

    def theirs(x: Tensor, loc: Tensor, scale: Tensor) -> Tensor:
        return F.leaky_relu(scale.view(1, -1, 1, 1) * (x + loc.view(1, -1, 1, 1)), 0.2)

    with run():
        check_gradients(lambda x, loc, scale: affine_act(x, loc, weight=scale), theirs, x, loc, scale)
        close(affine_act(x, bias=loc), F.leaky_relu(x + loc.view(1, -1, 1, 1), 0.2))


@pytest.mark.parametrize("options", [{}, {"norm": "group", "groups": 2}, {"norm": "instance"}], ids=str)
def test_nothing_in_nothing_out(options: dict[str, Any]) -> None:
    for shape in ((0, 6, 4, 4), (2, 0, 4, 4), (2, 6, 0, 4)):
        y, mean, var = norm_act(torch.zeros(shape), **options)
        assert y.shape == shape
        batch, channels = shape[:2]
        units = {"group": (batch, 2), "instance": (batch, channels)}.get(options.get("norm", ""), (channels,))
        assert mean.shape == var.shape == units


def test_a_plane_that_the_cuda_kernels_cannot_index_is_known_before_the_launch() -> None:
    for side, fits in ((2**27 - 1, True), (2**27, False)):
        x = torch.empty(1, 1, 1, side, device="meta")
        down = blur_down.unsupported("cuda", blur_down.arguments(x, 1))
        up = blur_up.unsupported("cuda", blur_up.arguments(x, 1, side, 1))
        assert [down is None, up is None] == [fits, fits]
        assert fits or f"1 x {side} has a side of 2^27 or more" in str(down)


def test_errors_in_words() -> None:
    x = torch.zeros(2, 6, 4, 4)
    with pytest.raises(ValueError, match=r"norm must be one of batch, group, instance, got 'act'.*affine_act"):
        norm_act(x, norm="act")
    with pytest.raises(ValueError, match="groups must divide the 6 channels, got 4"):
        norm_act(x, norm="group", groups=4)
    with pytest.raises(ValueError, match=r"norm_act: weight must be \(C,\) with C = 6, got \(5,\)"):
        norm_act(x, weight=torch.zeros(5))
    with pytest.raises(ValueError, match=r"affine_act: mean must be \(C,\) with C = 6, got \(5,\)"):
        affine_act(x, mean=torch.zeros(5))
    with pytest.raises(ValueError, match=r"norm_act: x must be \(B, C, H, W\), got \(6, 4, 4\)"):
        norm_act(x[0])
    with pytest.raises(ValueError, match="blur_down: x must have at least one channel"):
        blur_down(x[:, :0])
    with pytest.raises(ValueError, match="stride must be 1 or 2, got 3"):
        blur_down(x, 3)
    with pytest.raises(ValueError, match="blur_up: planes must be at least 1 x 1 for this padding, got 0 x 8"):
        blur_up(x, 0, 8)
    with pytest.raises(ValueError, match="planes must be at least 3 x 3 for this padding, got 4 x 2"):
        blur_down(torch.zeros(1, 1, 4, 2), 2, 2, 2, "reflect")
    with pytest.raises(ValueError, match=r"x must be \(B, C, 4, 4\) to become 8 x 8"):
        blur_up(x[..., :3], 8, 8)


# ---- blur ----------------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(
    st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(3, 40), st.integers(3, 40)),
    st.sampled_from([1, 2]), st.integers(0, 2), st.integers(0, 2), st.sampled_from(["zero", "reflect"]),
)  # fmt: skip
def test_blur_is_a_convolution_and_its_transpose(
    shape: tuple[int, int, int, int], stride: int, pad0: int, pad1: int, mode: str
) -> None:
    x = torch.randn(shape)
    taps = torch.tensor([1.0, 2.0, 1.0], dtype=fp64) / 4
    kernel = (taps[:, None] * taps).expand(shape[1], 1, 3, 3)
    leaf = x.double().requires_grad_()
    padded = F.pad(leaf, (pad0, pad1, pad0, pad1), "reflect" if mode == "reflect" else "constant")
    want = 0.5 * F.conv2d(padded, kernel, stride=stride, groups=shape[1])
    cotangent = torch.randn(want.shape)
    (want_grad,) = torch.autograd.grad(want, leaf, cotangent.double())
    for name in BACKENDS:
        if name != "reference" and _dispatch.why_missing(name, "cpu") is not None:
            continue
        with backend(name):
            mine = x.clone().requires_grad_()
            y = blur_down(mine, stride, pad0, pad1, mode, 0.5)
            close(y.double(), want, rtol=1e-5, atol=1e-6)
            close(torch.autograd.grad(y, mine, cotangent)[0].double(), want_grad, rtol=1e-5, atol=1e-6)
            up = blur_up(cotangent, shape[2], shape[3], stride, pad0, pad1, mode, 0.5)
            close(up.double(), want_grad, rtol=1e-5, atol=1e-6)


def test_blur_keeps_a_constant_where_it_reads_inside() -> None:
    y = blur_down(torch.ones(1, 1, 6, 8), 1, 1, 1, "reflect")
    assert torch.equal(y, torch.ones(1, 1, 6, 8))
    up = blur_up(torch.ones(1, 1, 4, 4), 8, 8, gain=4.0)
    close(up[..., 1:-1, 1:-1], torch.ones(1, 1, 6, 6))
