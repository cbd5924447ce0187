# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""Generators inside: routes, taps, models that predict the data, and the losses of maetok_fast.diffusion.objectives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from maetok_fast.diffusion.objectives import align_loss, direction_loss, spatial_features, tempered, velocity_loss
from maetok_fast.inference import prepare
from maetok_fast.kernels import sample_visible
from maetok_fast.models import LightningDiT, LightningDiTConfig, SiT, SiTConfig, load_generator
from maetok_fast.models.alignment import ConvProjector, MLPProjector
from maetok_fast.models.sit import Route

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL: dict[str, Any] = {"dim": 32, "depth": 4, "heads": 2, "num_classes": 5, "channels": 4}


def awake(model: Any) -> Any:
    torch.manual_seed(3)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad and p.abs().max() < 1e-3:
                p.normal_(0, 0.2)
    return model.double().eval()


def models() -> list[Any]:
    return [
        SiT(SiTConfig(tokens=16, **SMALL)),
        SiT(SiTConfig(tokens=16, exit_depth=2, qk_norm=True, **SMALL)),
        LightningDiT(LightningDiTConfig(tokens=(4, 4), qk_norm=True, exit_depth=3, **SMALL)),
    ]


def inputs(model: Any, count: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(1)
    shape = (16, 4) if isinstance(model.config.tokens, int) else (4, 4, 4)
    return torch.randn(count, *shape).double(), torch.rand(count).double(), torch.arange(count)


def route(count: int, kept: int, first: int, last: int) -> Route:
    mask, index = sample_visible(torch.tensor([7, 0]), 16 - kept, count, 16)
    return Route(first, last, index, mask)


def by_hand(model: Any, x: Tensor, t: Tensor, y: Tensor, way: Route) -> Tensor:
    """Block by block, image by image, the rows of RoPE's table picked by hand."""
    activated = F.silu(model.condition(t, y))
    rope, found = model.rope(), []
    for b in range(len(x)):
        tokens, here = model.embed(x[b : b + 1]), activated[b : b + 1]
        for i, block in enumerate(model.blocks):
            if way.first <= i < way.last:
                picked = way.kept[b]
                table = None if rope is None else rope[:, :, picked]
                out = tokens.clone()
                out[:, picked] = block(tokens[:, picked], None, table, here)
                tokens = out
            else:
                tokens = block(tokens, None, rope, here)
        v = model.final_layer(tokens, None, here)
        found.append(model._leave(v, x[b : b + 1], None))
    return torch.cat(found)


@pytest.mark.parametrize("which", range(3))
@pytest.mark.parametrize("blocks", [(0, 4), (1, 3), (2, 4)])
def test_a_route_is_the_blocks_over_the_kept_tokens(which: int, blocks: tuple[int, int]) -> None:
    model = awake(models()[which])
    x, t, y = inputs(model)
    way = route(3, 9, *blocks)
    torch.testing.assert_close(model.forward_training(x, t, y, route=way).velocity, by_hand(model, x, t, y, way))


@pytest.mark.parametrize("which", [1, 2])
def test_an_exit_within_a_route_sees_all_tokens(which: int) -> None:
    model = awake(models()[which])
    x, t, y = inputs(model)
    out = model.forward_training(x, t, y, exits=True, route=route(3, 9, 1, 4))
    assert out.early.shape == x.shape
    everyone = route(3, 16, 1, 4)
    whole = model.forward_training(x, t, y, exits=True, route=everyone)
    v, early = model(x, t, y, exits=True)
    torch.testing.assert_close(whole.velocity, v)
    torch.testing.assert_close(whole.early, early)


def test_gradients_go_around_the_route_and_through_it() -> None:
    model = awake(models()[0])
    x, t, y = inputs(model)
    x.requires_grad_(True)
    way = route(3, 9, 1, 3)
    (grad,) = torch.autograd.grad(model.forward_training(x, t, y, route=way).velocity.square().sum(), x)
    (want,) = torch.autograd.grad(by_hand(model, x, t, y, way).square().sum(), x)
    torch.testing.assert_close(grad, want)


def test_taps_are_the_tokens_behind_blocks() -> None:
    model = awake(models()[0])
    x, t, y = inputs(model)
    hidden: list[Tensor] = []
    handles = [model.blocks[i].register_forward_hook(lambda m, a, out: hidden.append(out)) for i in (0, 2)]
    way = route(3, 9, 1, 3)
    out = model.forward_training(x, t, y, taps=(1, 2, 3), route=way)
    for handle in handles:
        handle.remove()
    assert [h.shape[1] for h in out.hidden] == [16, 9, 16]
    assert torch.equal(out.hidden[0], hidden[0])
    # behind the route's last block all tokens are there: those that skipped it as they were before it
    assert torch.equal(out.hidden[2][way.mask].view(3, 7, -1), out.hidden[0][way.mask].view(3, 7, -1))
    assert torch.equal(out.hidden[2].gather(1, way.kept[..., None].expand(-1, -1, 32)), hidden[1])
    assert torch.equal(out.velocity, model.forward_training(x, t, y, route=route(3, 9, 1, 3)).velocity)


def test_a_route_outside_the_model_is_refused() -> None:
    model = awake(models()[0])
    with pytest.raises(ValueError, match="depth = 4, got 1 and 5"):
        model.forward_training(*inputs(model), route=route(3, 9, 1, 5))


# ---- models that predict the data -----------------------------------------------------------------------------------


@pytest.mark.parametrize("time", ["maetok", "sit"])
def test_a_predicted_datum_gives_the_velocity_of_the_linear_path(time: str) -> None:
    plain = awake(SiT(SiTConfig(tokens=16, time=time, **SMALL)))
    model = awake(SiT(SiTConfig(tokens=16, time=time, prediction="x", **SMALL)))
    model.load_state_dict(plain.state_dict(), strict=False)
    x, _, y = inputs(model)
    t = torch.tensor([0.01, 0.4, 1.0]).double()
    datum = plain(x, t, y) * (-1 if time == "sit" else 1)  # what the network itself gives
    velocity = model(x, t, y)
    torch.testing.assert_close(velocity, (x - datum) / t.clamp_min(0.05).view(-1, 1, 1))
    # x_t - t v is the datum wherever t is not too small
    torch.testing.assert_close((x - t.view(-1, 1, 1) * velocity)[1:], datum[1:])


def test_a_predicted_datum_survives_prepare_plans_and_files(tmp_path: Path) -> None:
    model = awake(SiT(SiTConfig(tokens=16, prediction="x", exit_depth=2, **SMALL))).float()
    model.save_pretrained(tmp_path)
    (tmp_path / "config.json").unlink()
    again = load_generator(tmp_path, heads=2, exit_depth=2)
    assert again.config.prediction == "x"
    x, _, y = (v.float() if v.is_floating_point() else v for v in inputs(model))
    fast, ts = prepare(again, "fp32"), torch.tensor([1.0, 0.5, 0.2])
    plan = fast.plan(ts, y)
    for i, t in enumerate(ts):
        want = model(x, t.expand(3), y, exits=True)
        for found in (fast.step(plan, i, x, exits=True), fast(x, t.expand(3), y, exits=True)):
            torch.testing.assert_close(found, want, atol=1e-4, rtol=1e-4)
    with pytest.raises(ValueError, match="predicts the data"):
        model.modulations(model.condition(torch.ones(3), y))


def test_predictions_that_do_not_go_together_are_refused() -> None:
    with pytest.raises(ValueError, match="prediction 'e'"):
        SiTConfig(prediction="e")
    with pytest.raises(ValueError, match="averages of velocities"):
        SiTConfig(prediction="x", conditions=("r",))


# ---- losses ----------------------------------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 3), st.integers(1, 5), st.integers(1, 4), st.integers(1, 6), st.booleans(), st.integers(0, 99))
def test_align_loss_is_the_cosine_to_every_repeated_place(
    batch: int, tokens: int, repeats: int, width: int, some: bool, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(batch, repeats * tokens, width, generator=generator)
    kept = torch.stack([torch.randperm(tokens, generator=generator)[: (tokens + 1) // 2].sort()[0]] * batch)
    count = kept.shape[1] if some else tokens
    projected = torch.randn(batch, count, width, generator=generator)
    want = []
    for b in range(batch):
        for k in range(count):
            n = int(kept[b, k]) if some else k
            for place in range(n, repeats * tokens, tokens):
                want.append(1 - F.cosine_similarity(projected[b, k].double(), features[b, place].double(), dim=0))
    found = align_loss(projected, features, tokens, kept if some else None)
    torch.testing.assert_close(found.double(), torch.stack(want).mean(), atol=1e-6, rtol=1e-5)


def test_align_loss_names_numbers_that_do_not_go_together() -> None:
    with pytest.raises(ValueError, match="10 features of an image are no multiple of its 4 tokens"):
        align_loss(torch.zeros(1, 4, 2), torch.zeros(1, 10, 2), 4)


def test_velocity_and_direction() -> None:
    v, target = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    torch.testing.assert_close(velocity_loss(v, target), ((v - target) ** 2).mean())
    cosines = torch.stack([(a @ b) / (a.norm() * b.norm()) for a, b in zip(v.flatten(0, 1), target.flatten(0, 1))])
    torch.testing.assert_close(direction_loss(v, target), (1 - cosines).mean())
    grid = v.transpose(1, 2).unflatten(2, (1, 3)), target.transpose(1, 2).unflatten(2, (1, 3))
    torch.testing.assert_close(direction_loss(*grid), direction_loss(v, target))
    assert velocity_loss(v.bfloat16(), target).dtype == torch.float32


def test_spatial_features_have_no_common_part_left() -> None:
    features = torch.randn(2, 9, 5) * 3 + 7
    found = spatial_features(features, 1.0)
    torch.testing.assert_close(found.mean(1), torch.zeros(2, 5), atol=1e-5, rtol=0)
    torch.testing.assert_close(found.std(1), torch.ones(2, 5), atol=1e-4, rtol=1e-4)


def test_tempered_stops_the_null_branch() -> None:
    v, null = torch.randn(2, 3, 4, requires_grad=True), torch.randn(2, 3, 4, requires_grad=True)
    beta = torch.tensor([0.25, 1.0])
    out = tempered(v, null, beta)
    torch.testing.assert_close(out[0], 0.25 * v[0] + 0.75 * null[0])
    torch.testing.assert_close(out[1], v[1])
    out.sum().backward()
    assert null.grad is None
    torch.testing.assert_close(v.grad, beta.view(2, 1, 1).expand(2, 3, 4))


def test_projectors() -> None:
    tokens = torch.randn(2, 8, 6)
    assert MLPProjector(6, 5, 7)(tokens).shape == (2, 8, 5)
    assert [p.shape for p in MLPProjector(6, 5, 7).parameters()][::2] == [(7, 6), (7, 7), (5, 7)]
    conv = ConvProjector(6, 5, (4, 4))
    whole = torch.cat([tokens, tokens], 1).transpose(1, 2).reshape(2, 6, 4, 4)
    torch.testing.assert_close(conv(tokens), conv.conv(whole).flatten(2).transpose(1, 2))
    with pytest.raises(ValueError, match="16 places is no multiple of 7"):
        conv(tokens[:, :7])
