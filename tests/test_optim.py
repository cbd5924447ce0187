# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""maetok_fast.training.optim and adversarial: steps that nothing can spoil, weights from gradients at hand."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from maetok_fast.layers import EMA
from maetok_fast.models import MAETok, MAETokConfig, ViTSize
from maetok_fast.training.adversarial import DiscriminatorTraining, adaptive_weight, last_layer_gradient
from maetok_fast.training.configs import AdversarialConfig, OptimizerConfig
from maetok_fast.training.optim import GuardedAdamW, learning_rate, parameter_groups
from maetok_fast.training.state import whole

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


OURS_AND_TORCHS = pytest.mark.parametrize("name", ["adamw", "torch"])


def optimizer_of(layer: nn.Module, clip: float = 1.0, name: str = "adamw") -> GuardedAdamW:
    config = OptimizerConfig(name=name, clip=clip, weight_decay=0.01)  # type: ignore[arg-type]
    return GuardedAdamW(parameter_groups(layer, config.weight_decay), config)


@OURS_AND_TORCHS
def test_a_step_is_adamw_after_clipping(name: str) -> None:
    ours, theirs = nn.Linear(5, 3), nn.Linear(5, 3)
    theirs.load_state_dict(ours.state_dict())
    optimizer = optimizer_of(ours, name=name)
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


@OURS_AND_TORCHS
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_changes_nothing(bad: float, name: str) -> None:
    """Weights, moments and step counts as if the step had not been."""
    ours, theirs = nn.Linear(5, 3), nn.Linear(5, 3)
    theirs.load_state_dict(ours.state_dict())
    a, b = optimizer_of(ours, name=name), optimizer_of(theirs, name=name)
    ema = EMA(ours, 0.5)
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
                averages = {k: v.clone() for k, v in ema.average.items()}
                _, finite = optimizer.step(1e-2, ema, ours)
                assert not bool(finite)
                assert all(torch.equal(v, averages[k]) for k, v in ema.average.items())
                assert torch.equal(layer.weight, weight)
                assert all(torch.equal(v, before[k]) for k, v in a.state().items())
            else:
                layer(x).square().sum().backward()
                optimizer.step(1e-2)
            optimizer.zero_grad()
    assert torch.equal(ours.weight, theirs.weight)
    assert all(torch.equal(v, b.state()[k]) for k, v in a.state().items())


@OURS_AND_TORCHS
def test_the_average_moves_with_the_step(name: str) -> None:
    """As AdamW of torch and `EMA.update` after it, where a part of the module has an average, a parameter has no
    gradient in some steps, and one is frozen."""
    torch.manual_seed(1)
    ours = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3), nn.Linear(4, 3))
    ours[0].bias.requires_grad_(False)
    theirs = copy.deepcopy(ours)
    a, b = optimizer_of(ours, name=name), optimizer_of(theirs, name="torch")
    followed, other = EMA(ours[:2], 0.75), EMA(theirs[:2], 0.75)
    for turn in range(4):
        x = torch.randn(4, 5)
        for model, optimizer in ((ours, a), (theirs, b)):
            model[1 + turn % 2](model[0](x)).square().sum().backward()
            optimizer.step(1e-2, *((followed, ours[:2]) if model is ours else ()))
            optimizer.zero_grad()
            assert all(p.grad is None for p in model.parameters())
        other.update(theirs[:2])
    assert followed.updates == 4
    for mine, expected in zip(ours.parameters(), theirs.parameters()):
        torch.testing.assert_close(mine, expected)
    assert followed.average.keys() == other.average.keys() == {"0.weight", "1.weight", "1.bias"}
    for key, value in followed.average.items():
        torch.testing.assert_close(value, other.average[key])
    assert {k: v.item() for k, v in a.state().items() if k.endswith("step")} == {
        "0.weight/step": 4, "1.weight/step": 2, "1.bias/step": 2, "2.weight/step": 2, "2.bias/step": 2
    }  # fmt: skip


def test_an_average_in_16_bits_and_one_in_64() -> None:
    for kind, made in ((torch.bfloat16, nn.Linear(5, 3)), (torch.float64, nn.Linear(5, 3).double())):
        ema, optimizer = EMA(made, 0.5).to(kind), optimizer_of(made)
        before = {k: v.clone().double() for k, v in ema.average.items()}
        made(torch.ones(2, 5, dtype=made.weight.dtype)).square().sum().backward()
        optimizer.step(0.1, ema, made)
        for key, value in ema.average.items():
            assert value.dtype == kind
            wanted = (before[key] + made.get_parameter(key).detach().double()) / 2
            torch.testing.assert_close(value.double(), wanted, rtol=torch.finfo(kind).eps, atol=0)


def test_sharded_networks_step_and_average() -> None:
    """FSDP2 on one process: DTensors everywhere, and the numbers of one that is not sharded."""
    pytest.importorskip("torch.distributed.fsdp")
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        plain = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3))
        sharded: Any = copy.deepcopy(plain)
        fully_shard(sharded, mesh=dist.init_device_mesh("cpu", (1,)))
        models = [(m, optimizer_of(m), EMA(m, 0.75)) for m in (plain, sharded)]
        for _ in range(3):
            x = torch.randn(4, 5)
            for model, optimizer, ema in models:
                model(x).square().sum().backward()
                optimizer.step(1e-2, ema, model)
                optimizer.zero_grad()
        (_, one, average), (_, two, other) = models
        for a, b in ((one.state(), two.state()), (average.average, other.average)):
            assert all(torch.equal(v, whole({k: b[k]})[k]) for k, v in a.items())
        resumed = optimizer_of(sharded)
        resumed.load(whole(two.state()))
        assert all(torch.equal(v, whole(two.state())[k]) for k, v in whole(resumed.state()).items())
        assert isinstance(resumed.state()["0.weight/exp_avg"], dist.tensor.DTensor)
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize(("writes", "reads"), [("adamw", "torch"), ("torch", "adamw")])
def test_ours_and_torchs_read_each_others_state(writes: str, reads: str) -> None:
    ours = nn.Linear(5, 3)
    first, inputs = optimizer_of(ours, name=writes), [torch.randn(4, 5) for _ in range(4)]
    other = copy.deepcopy(ours)
    for x in inputs[:2]:
        ours(x).square().sum().backward()
        first.step(1e-2)
        first.zero_grad()
    other.load_state_dict(ours.state_dict())
    second = optimizer_of(other, name=reads)
    second.load({name: value.clone() for name, value in first.state().items()})
    for x in inputs[2:]:
        for model, optimizer in ((ours, first), (other, second)):
            model(x).square().sum().backward()
            optimizer.step(1e-2)
            optimizer.zero_grad()
    torch.testing.assert_close(ours.weight, other.weight)
    assert first.state().keys() == second.state().keys()


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
