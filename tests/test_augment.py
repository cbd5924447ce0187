# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""diff_augment against DiffAugment's definition step by step, and the ranges of its random numbers."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from maetok_fast.kernels import _dispatch, backend, diff_augment, draw_augmentation

BACKENDS = [n for n in ("reference", "native", "cuda") if n == "reference" or _dispatch.why_missing(n, "cpu") is None]
close = torch.testing.assert_close


def naive(x: Tensor, colour: Tensor, shift: Tensor, box: Tensor) -> Tensor:
    """One image after the other, one step of the policy after the other, pixels in Python."""
    out = []
    for image, (b, s, k), (th, tw), (top, left, tall, wide) in zip(x, colour, shift.tolist(), box.tolist()):
        v = image + b
        v = (v - v.mean(0, keepdim=True)) * s + v.mean(0, keepdim=True)
        v = (v - v.mean()) * k + v.mean()
        height, width = v.shape[1:]
        y = torch.zeros_like(v)
        for h in range(height):
            for w in range(width):
                cut = top <= h < top + tall and left <= w < left + wide
                if 0 <= h + th < height and 0 <= w + tw < width and not cut:
                    y[:, h, w] = v[:, h + th, w + tw]
        out.append(y)
    return torch.stack(out)


@pytest.mark.parametrize("name", BACKENDS)
@settings(max_examples=15, deadline=None)
@given(st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(1, 12), st.integers(1, 20)), st.integers(0, 2**31))
def test_the_policy_step_by_step(name: str, shape: tuple[int, int, int, int], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    batch, _, height, width = shape
    x = torch.randn(shape, generator=generator)
    colour = torch.rand(batch, 3, generator=generator) + 0.2
    if seed % 3 == 0:
        colour[:, 2] = 1.0  # the mean is left out
    shift = torch.randint(-width, width + 1, (batch, 2), generator=generator)
    corner = torch.randint(-4, height + 2, (batch, 2), generator=generator)
    box = torch.cat((corner, torch.randint(0, 9, (batch, 2), generator=generator)), 1)
    exact, mine = x.double().requires_grad_(), x.clone().requires_grad_()
    want = naive(exact, colour.double(), shift, box)
    with backend(name):
        got = diff_augment(mine, colour, shift, box)
    close(got.double(), want, rtol=1e-5, atol=1e-5)
    if want.requires_grad:
        cotangent = torch.randn(shape, generator=generator)
        (a,) = torch.autograd.grad(got, mine, cotangent)
        (b,) = torch.autograd.grad(want, exact, cotangent.double())
        close(a.double(), b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", BACKENDS)
def test_identity_numbers_change_nothing(name: str) -> None:
    x = torch.randn(4, 3, 9, 17)
    numbers = draw_augmentation(4, 9, 17, probability=0.0)
    with backend(name):
        close(diff_augment(x, **numbers), x)


def test_the_numbers_keep_to_their_ranges_and_repeat() -> None:
    one, two = (draw_augmentation(2000, 32, 64, generator=torch.Generator().manual_seed(3)) for _ in range(2))
    assert all(torch.equal(one[k], two[k]) for k in one)
    low, high = one["colour"].amin(0), one["colour"].amax(0)
    close(low, torch.tensor([-0.5, 0.0, 0.5]), rtol=0, atol=0.02)
    close(high, torch.tensor([0.5, 2.0, 1.5]), rtol=0, atol=0.02)
    assert one["shift"].dtype == one["box"].dtype == torch.int32
    assert one["shift"].amin(0).tolist() == [-4, -8]
    assert one["shift"].amax(0).tolist() == [4, 8]
    assert one["box"].amin(0).tolist() == [-8, -16, 16, 32]
    assert one["box"].amax(0).tolist() == [32 - 8, 64 - 16, 16, 32]  # DiffAugment: the centre reaches the far border
    odd = draw_augmentation(2000, 5, 5, cutout=0.2)["box"]
    assert odd.amin(0).tolist() == [0, 0, 1, 1]
    assert odd.amax(0).tolist() == [4, 4, 1, 1]


def test_each_group_is_drawn_for_the_batch() -> None:
    generator = torch.Generator().manual_seed(1)
    used = torch.zeros(3)
    for _ in range(200):
        numbers = draw_augmentation(8, 32, 32, 0.5, 0.2, generator=generator)
        colour = not torch.equal(numbers["colour"], torch.tensor([[0.0, 1.0, 1.0]]).expand(8, 3))
        shift, box = bool(numbers["shift"].any()), bool(numbers["box"].any())
        assert not box or bool((numbers["box"][:, 2:] == 6).all())  # all images or none
        used += torch.tensor([colour, shift, box])
    assert ((used > 70) & (used < 130)).all()


def test_what_the_cuda_launcher_refuses_is_known_before_the_launch() -> None:
    for shape, reason in (
        ((65535, 1, 1, 1), None),
        ((65536, 1, 1, 1), "a batch of 65536 exceeds a CUDA grid's"),
        ((1, 1, 1, 2**27), "1 x 134217728 has a side of 2^27 or more"),
    ):
        args = diff_augment.arguments(torch.empty(shape, device="meta"))
        assert diff_augment.unsupported("native", args) is None
        found = diff_augment.unsupported("cuda", args)
        assert found is None if reason is None else reason in str(found)


def test_errors_in_words() -> None:
    x = torch.zeros(2, 3, 4, 4)
    with pytest.raises(ValueError, match=r"diff_augment: box must be \(B, 4\) with B = 2, got \(2, 3\)"):
        diff_augment(x, box=torch.zeros(2, 3, dtype=torch.int32))
    with pytest.raises(TypeError, match=r"expects shift in int32 or int64, got torch\.float32"):
        diff_augment(x, shift=torch.zeros(2, 2))
    with pytest.raises(ValueError, match="probability must be between 0 and 1, got 2"):
        draw_augmentation(2, 4, 4, 2)
