# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""Signs and definitions of the adversarial losses, against binary_cross_entropy_with_logits and by what they do."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from maetok_fast.kernels import _dispatch, backend, discriminator_loss, generator_loss

BACKENDS = [n for n in ("reference", "native", "cuda") if n == "reference" or _dispatch.why_missing(n, "cpu") is None]
close = torch.testing.assert_close
bce = F.binary_cross_entropy_with_logits

each_backend = pytest.mark.parametrize("name", BACKENDS)


@each_backend
@settings(max_examples=15, deadline=None)
@given(st.integers(1, 3000), st.integers(1, 300), st.floats(0.1, 30.0))
def test_definitions(name: str, reals: int, fakes: int, scale: float) -> None:
    real, fake, ema = torch.randn(reals) * scale, torch.randn(fakes) * scale, torch.randn(2)
    r, f = (t.double().requires_grad_() for t in (real, fake))
    one, zero = torch.ones_like(r), torch.zeros_like(f)
    vanilla = 0.5 * (bce(r, one) + bce(f, zero))  # a real image is 1
    hinge = 0.5 * ((1 - r).clamp(min=0).mean() + (1 + f).clamp(min=0).mean())
    lecam = (r - ema[1]).clamp(min=0).square().mean() + (ema[0] - f).clamp(min=0).square().mean()
    with backend(name):
        for kind, want in (("vanilla", vanilla), ("hinge", hinge)):
            mine = [t.clone().requires_grad_() for t in (real, fake)]
            loss, regular, mean_real, mean_fake = discriminator_loss(*mine, ema, kind)
            close(loss.double(), want, rtol=1e-5, atol=1e-6)
            close(regular.double(), lecam, rtol=1e-5, atol=1e-6)
            close(torch.stack((mean_real, mean_fake)).double(), torch.stack((r.mean(), f.mean())), rtol=1e-5, atol=1e-6)
            a = torch.autograd.grad(loss + 0.3 * regular, mine)
            b = torch.autograd.grad(want + 0.3 * lecam, (r, f), retain_graph=True)
            for x, y in zip(a, b):
                close(x.double(), y, rtol=1e-4, atol=1e-7)
        for kind, want in (("non_saturating", bce(f, torch.ones_like(f))), ("hinge", -f.mean())):
            mine = [fake.clone().requires_grad_()]
            loss = generator_loss(*mine, kind)
            close(loss.double(), want, rtol=1e-5, atol=1e-6)
            close(torch.autograd.grad(loss, mine)[0].double(), torch.autograd.grad(want, f)[0], rtol=1e-4, atol=1e-7)


@each_backend
def test_the_two_players_pull_apart(name: str) -> None:
    """A step down the discriminator's loss parts real from fake; a step down the generator's raises fake."""
    with backend(name):
        for kind in ("hinge", "vanilla"):
            real, fake = torch.randn(50).requires_grad_(), torch.randn(50).requires_grad_()
            d_real, d_fake = torch.autograd.grad(discriminator_loss(real, fake, None, kind)[0], (real, fake))
            assert (d_real <= 0).all()
            assert (d_fake >= 0).all()
            assert d_real.min() < 0 < d_fake.max()
        for kind in ("hinge", "non_saturating"):
            fake = torch.randn(50).requires_grad_()
            assert (torch.autograd.grad(generator_loss(fake, kind), fake)[0] < 0).all()


@each_backend
def test_large_logits_neither_overflow_nor_lose_their_gradient(name: str) -> None:
    fake = torch.tensor([-1e4, -200.0, -90.0, 90.0, 1e4]).requires_grad_()
    with backend(name):
        loss = generator_loss(fake)
        (grad,) = torch.autograd.grad(loss, fake)
        close(loss, torch.tensor((1e4 + 200 + 90) / 5))
        close(grad, torch.tensor([-0.2, -0.2, -0.2, 0.0, 0.0]), rtol=1e-6, atol=1e-30)
        assert discriminator_loss(torch.full((3,), float("inf")), fake.detach(), None, "vanilla")[0].isfinite()
        assert generator_loss(torch.tensor([float("nan"), 0.0])).isnan()
        assert discriminator_loss(torch.tensor([float("nan")]), torch.zeros(1))[0].isnan()


@each_backend
def test_lecam_averages_move_on_the_device(name: str) -> None:
    ema = torch.zeros(2)
    with backend(name):
        for _ in range(3):
            means = discriminator_loss(torch.ones(4) * 2, -torch.ones(6), ema)[2:]
            ema.lerp_(torch.stack(means).detach(), 1 - 0.999)
    close(ema, torch.tensor([2.0, -1.0]) * (1 - 0.999**3))


def test_errors_in_words() -> None:
    x = torch.zeros(3)
    with pytest.raises(ValueError, match="kind must be one of hinge, vanilla, got 'wgan'"):
        discriminator_loss(x, x, None, "wgan")
    with pytest.raises(ValueError, match="kind must be one of non_saturating, hinge, got 'vanilla'"):
        generator_loss(x, "vanilla")
    with pytest.raises(ValueError, match=r"discriminator_loss: ema must be \(2,\), got \(3,\)"):
        discriminator_loss(x, x, torch.zeros(3))
