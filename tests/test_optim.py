# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""maetok_fast.training.optim and adversarial: steps that nothing can spoil, weights from gradients at hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from maetok_fast.models import MAETok, MAETokConfig, ViTSize
from maetok_fast.training.adversarial import DiscriminatorTraining, adaptive_weight, last_layer_gradient
from maetok_fast.training.configs import AdversarialConfig, OptimizerConfig
from maetok_fast.training.optim import GuardedAdamW, learning_rate, parameter_groups

pytestmark = pytest.mark.usefixtures("one_thread")


def small() -> MAETok:
    size = ViTSize(32, 2, 2)
    return MAETok(MAETokConfig(image_size=16, base_image_size=16, patch=4, num_latent_tokens=4, latent_dim=8,
                               encoder=size, decoder=size))  # fmt: skip


def test_matrices_decay_and_nothing_else_does() -> None:
    groups = parameter_groups(small(), 0.1)
    decayed, others = groups
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.1, 0.0)
    assert all(p.ndim >= 2 for p in decayed["params"])
    for kind in ("freqs", "mask_token", "cls_token", "latent_tokens", "latent_pos_embed", "pos_embed", "bias", "gamma"):
        assert not any(name.endswith(kind) for name in decayed["names"]), kind
    trained = {name for name, p in small().named_parameters() if p.requires_grad}
    assert set(decayed["names"]) | set(others["names"]) == trained


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_the_learning_rate_rises_then_follows_its_schedule(schedule: str) -> None:
    config = OptimizerConfig(learning_rate=1e-4, warmup=10, schedule=schedule, final=0.1)  # type: ignore[arg-type]
    rates = [learning_rate(config, step, 110, 512) for step in range(111)]
    peak = 2e-4  # batch 512
    assert rates[:10] == pytest.approx([peak * (i + 1) / 10 for i in range(10)])
    assert max(rates) == pytest.approx(peak)
    middle = {"cosine": 0.55, "linear": 0.55, "constant": 1.0}[schedule]
    end = {"cosine": 0.1, "linear": 0.1, "constant": 1.0}[schedule]
    assert rates[60] == pytest.approx(peak * middle)
    assert rates[110] == pytest.approx(peak * end)
    quarter = {"cosine": 0.1 + 0.9 * (1 + math.cos(math.pi / 4)) / 2, "linear": 0.1 + 0.9 * 0.75, "constant": 1.0}
    assert rates[35] == pytest.approx(peak * quarter[schedule])


def optimizer_of(layer: nn.Module, clip: float = 1.0) -> GuardedAdamW:
    config = OptimizerConfig(clip=clip, weight_decay=0.01)
    return GuardedAdamW(parameter_groups(layer, config.weight_decay), config)


def test_a_step_is_adamw_after_clipping() -> None:
    ours, theirs = nn.Linear(5, 3), nn.Linear(5, 3)
    theirs.load_state_dict(ours.state_dict())
    optimizer = optimizer_of(ours)
    plain = torch.optim.AdamW(
        [{"params": [theirs.weight], "weight_decay": 0.01}, {"params": [theirs.bias], "weight_decay": 0.0}],
        lr=1e-2, betas=(0.9, 0.95),
    )  # fmt: skip
    for _ in range(5):
        x = torch.randn(4, 5) * 10
        for layer in (ours, theirs):
            layer.zero_grad()
            layer(x).square().sum().backward()
        expected = torch.nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
        norm, finite = optimizer.step(1e-2)
        plain.step()
        torch.testing.assert_close(norm, expected)
        assert bool(finite)
    torch.testing.assert_close(ours.weight, theirs.weight)
    torch.testing.assert_close(ours.bias, theirs.bias)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_changes_nothing(bad: float) -> None:
    """Weights, moments and step counts as if the step had not been."""
    ours, theirs = nn.Linear(5, 3), nn.Linear(5, 3)
    theirs.load_state_dict(ours.state_dict())
    a, b = optimizer_of(ours), optimizer_of(theirs)
    for turn in range(4):
        x = torch.randn(4, 5)
        for layer, optimizer in ((ours, a), (theirs, b)):
            if turn == 2:
                if layer is theirs:
                    continue
                layer(x).sum().backward()
                layer.weight.grad[0, 0] = bad  # type: ignore[index]
                before = {k: v.clone() for k, v in a.state().items()}
                weight = layer.weight.detach().clone()
                _, finite = optimizer.step(1e-2)
                assert not bool(finite)
                assert torch.equal(layer.weight, weight)
                assert all(torch.equal(v, before[k]) for k, v in a.state().items())
            else:
                layer(x).square().sum().backward()
                optimizer.step(1e-2)
            optimizer.zero_grad()
    assert torch.equal(ours.weight, theirs.weight)
    assert all(torch.equal(v, b.state()[k]) for k, v in a.state().items())


def test_the_state_is_by_name_and_goes_on_bit_for_bit() -> None:
    torch.manual_seed(3)
    ours = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3))
    optimizer, inputs = optimizer_of(ours), [torch.randn(4, 5) for _ in range(6)]

    def step(model: nn.Module, optimizer: GuardedAdamW, x: Tensor) -> None:
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step(1e-2)

    for x in inputs[:3]:
        step(ours, optimizer, x)
    other = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3))
    other.load_state_dict(ours.state_dict())
    resumed = optimizer_of(other)
    assert set(optimizer.state()) == {
        f"{i}.{kind}/{entry}"
        for i in (0, 1) for kind in ("weight", "bias") for entry in ("exp_avg", "exp_avg_sq", "step")
    }  # fmt: skip
    resumed.load({name: value.clone() for name, value in optimizer.state().items()})
    for x in inputs[3:]:
        step(ours, optimizer, x)
        step(other, resumed, x)
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), other.parameters()))


def test_a_state_of_other_parameters_is_refused() -> None:
    with pytest.raises(KeyError, match="nothing"):
        optimizer_of(nn.Linear(2, 2)).load({"nothing.weight/exp_avg": torch.zeros(2)})


def test_the_last_layers_gradient_is_autograds() -> None:
    """The product of pixel gradients and tokens, against going back through the layer."""
    model = small().double()
    images = torch.randn(3, 3, 16, 16, dtype=torch.float64)
    latents = model.encode(images)
    grid = (4, 4)
    tokens = model.decoder.tokens(model.post_quant_conv(latents), latents, grid)
    result = model.decoder.pixels(tokens, grid)
    loss = (result.sin() * torch.randn(result.shape, dtype=torch.float64)).sum()
    pixel_gradient, expected = torch.autograd.grad(loss, [result, model.decoder.to_pixel.model.weight])
    torch.testing.assert_close(last_layer_gradient(pixel_gradient, tokens, 4), expected)


def test_the_adaptive_weight_is_the_ratio_of_the_norms() -> None:
    assert adaptive_weight(torch.tensor(3.0), torch.tensor(2.0)).item() == pytest.approx(3 / 2.0001)
    assert adaptive_weight(torch.tensor(3.0), torch.tensor(0.0)).item() == pytest.approx(1e4)


class _Linear(nn.Module):
    """Logits that anyone can compute again."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3))

    def forward(self, images: Tensor) -> Tensor:
        return torch.einsum("bchw,c->bhw", images, self.weight)


@pytest.mark.parametrize("lecam", [0.0, 0.5])
def test_the_discriminators_loss_is_its_formula(lecam: float) -> None:
    config = AdversarialConfig(augment=False, lecam=lecam, consistency=0.0)
    training = DiscriminatorTraining(_Linear(), config)
    training.lecam.copy_(torch.tensor([0.3, -0.2]))
    real, fake = torch.randn(2, 3, 8, 8), torch.randn(2, 3, 8, 8)
    loss, told = training(real, fake)
    r, f = training.discriminator(real), training.discriminator(fake)
    expected = ((1 - r).relu().mean() + (1 + f).relu().mean()) / 2
    expected = expected + lecam * ((r + 0.2).relu().square().mean() + (0.3 - f).relu().square().mean())
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(told["logits_real"], r.mean())
    training.move_lecam(torch.stack([told["logits_real"], told["logits_fake"]]))
    torch.testing.assert_close(training.lecam, torch.tensor([0.3, -0.2]).lerp(torch.stack([r.mean(), f.mean()]), 1e-3))
    torch.testing.assert_close(training.generator(fake), -f.mean())


def test_the_generators_loss_makes_no_gradient_of_the_discriminator() -> None:
    training = DiscriminatorTraining(_Linear(), AdversarialConfig())
    leaf = torch.randn(2, 3, 8, 8, requires_grad=True)
    (gradient,) = torch.autograd.grad(training.generator(leaf), leaf)
    assert gradient.abs().sum() > 0
    assert training.discriminator.weight.grad is None


def test_consistency_compares_weak_and_strong_augmentation() -> None:
    """Nothing to tell them apart: an image of zeros stays one under translation and cutout, not under colour."""
    real, fake = torch.randn(2, 3, 8, 8), torch.randn(2, 3, 8, 8)
    training = DiscriminatorTraining(_Linear(), AdversarialConfig(lecam=0.0, consistency=2.0))
    loss, told = training(real, fake)
    assert told["consistency"] > 0
    torch.testing.assert_close(loss.detach(), told["discriminator"] + 2.0 * told["consistency"])
