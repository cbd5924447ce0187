# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""Models told more than t and y: average velocities (MeanFlow), guidance-free temperature, early exits; how they are
sampled, guided, trained and stored; and tangents of whole models."""

from __future__ import annotations

import contextlib
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from maetok_fast.diffusion import (
    LINEAR,
    adaptive_loss,
    average_velocity_error,
    dimension_shift,
    from_data_at_one,
    guided_target,
    sample,
    sample_spans,
)
from maetok_fast.inference import prepare
from maetok_fast.kernels import _dispatch, backend
from maetok_fast.models import CheckpointError, LightningDiT, LightningDiTConfig, SiT, SiTConfig, load_generator

SIZES: dict[str, Any] = {"channels": 4, "dim": 48, "depth": 3, "heads": 2, "num_classes": 10}
KINDS = {
    "sit": lambda **more: SiT(SiTConfig(tokens=6, **SIZES, **more)),
    "sit-2d": lambda **more: SiT(SiTConfig(tokens=(4, 4), patch=2, qk_norm=True, **SIZES, **more)),
    "lightningdit": lambda **more: LightningDiT(LightningDiTConfig(tokens=(4, 4), qk_norm=True, **SIZES, **more)),
}
kinds = pytest.mark.parametrize("kind", KINDS)


def lively(kind: str, seed: int = 0, **more: Any) -> SiT | LightningDiT:
    """Without the zeros of a fresh model, in eval mode."""
    torch.manual_seed(seed)
    model = KINDS[kind](**more).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad and not p.any():
                p.normal_(0, 0.3)
    return model


def inputs(model: SiT | LightningDiT, batch: int = 3, seed: int = 1) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, t, y, and r below t."""
    torch.manual_seed(seed)
    tokens = model.config.tokens
    shape = (tokens, 4) if isinstance(tokens, int) else (4, *tokens)
    t = 0.3 + 0.7 * torch.rand(batch)
    return torch.randn(batch, *shape), t, torch.randint(0, 10, (batch,)), t * torch.rand(batch)


# ---- conditions and exits of the models --------------------------------------------------------------------------


@kinds
def test_a_condition_is_one_more_embedding(kind: str) -> None:
    model = lively(kind, conditions=("beta", "r"))
    assert model.config.conditions == ("r", "beta")
    x, t, y, r = inputs(model)
    beta = torch.rand(3)
    assert model.r_embedder is not None
    assert model.beta_embedder is not None
    time = 1 - t if model.config.time == "sit" else t
    c = model.t_embedder(time) + model.y_embedder(y) + model.r_embedder(t - r) + model.beta_embedder(beta)
    torch.testing.assert_close(model.condition(t, y, r, beta), c)
    v = model(x, t, y, r, beta)
    assert (v - model(x, t, y, r, beta + 0.2)).abs().max() > 1e-3
    assert (v - model(x, t, y, r * 0.5, beta)).abs().max() > 1e-3
    torch.testing.assert_close(model(x, t, y, t, beta), model(x, t, y, beta=beta))


def test_conditions_are_checked() -> None:
    x, t, y, r = inputs(plain := lively("sit"))
    with pytest.raises(ValueError, match="r was given, and this SiT has no condition 'r'"):
        plain(x, t, y, r=r)
    with pytest.raises(ValueError, match="trained guidance-free: give beta"):
        lively("sit", conditions=("beta",))(x, t, y)
    with pytest.raises(ValueError, match=r"r: expected shape \(3\), got|r: expected shape \(3,\), got"):
        lively("sit", conditions=("r",))(x, t, y, r=r[:2])
    with pytest.raises(ValueError, match="no early exit"):
        plain(x, t, y, exits=True)
    for wrong in (("s",), "r", ["r"]):
        with pytest.raises(ValueError, match="conditions must be a tuple of r, beta"):
            SiTConfig(conditions=wrong)  # type: ignore[arg-type]
    for depth in (0, 28, -1):
        with pytest.raises(ValueError, match=r"exit_depth .* within 1 \.\. .*27"):
            SiTConfig(exit_depth=depth)


@kinds
def test_the_early_exit_is_a_shorter_model(kind: str) -> None:
    model = lively(kind, exit_depth=2)
    x, t, y, _ = inputs(model)
    v, early = model(x, t, y, exits=True)
    torch.testing.assert_close(v, model(x, t, y))
    short = KINDS[kind]()
    del short.blocks[2]
    state = {k.replace("final_layer_xr", "final_layer"): w for k, w in model.state_dict().items()
             if not k.startswith(("final_layer.", "blocks.2."))}  # fmt: skip
    short.load_state_dict(state)
    torch.testing.assert_close(early, short.eval()(x, t, y))


@kinds
@pytest.mark.parametrize("reproducible", [False, True])
def test_prepared_models_take_conditions_and_leave_early(kind: str, reproducible: bool) -> None:
    model = lively(kind, conditions=("r", "beta"), exit_depth=1)
    x, t, y, r = inputs(model)
    beta = torch.full((3,), 0.4)
    reason = _dispatch.why_missing("native", "cpu") if reproducible else None
    if reason is not None:
        pytest.skip(reason)
    fast = prepare(model, precision="fp32", reproducible=reproducible)
    for mine, right in zip(fast(x, t, y, r, beta, exits=True), model(x, t, y, r, beta, exits=True)):
        torch.testing.assert_close(mine, right, rtol=1e-4, atol=1e-4)
    times, ends = torch.tensor([1.0, 0.6, 0.2]), torch.tensor([0.6, 0.2, 0.0])
    plan = fast.plan(times, y, r=ends, beta=torch.full((3,), 0.4))
    for i in range(3):
        right = model(x, times[i].expand(3), y, ends[i].expand(3), beta, exits=True)
        for mine, other in zip(fast.step(plan, i, x, exits=True), right):
            torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match=r"r must be floating-point, of shape \(S,\), got"):
        fast.plan(times, y, r=ends[:2])


# ---- sampling ----------------------------------------------------------------------------------------------------


def straight(data: Tensor) -> Any:
    """The average velocity of paths to one point: constant along each."""

    def model(x: Tensor, t: Tensor, y: Tensor, r: Tensor | None = None) -> Tensor:
        return (x - data) / t.view(-1, 1, 1)

    return model


def test_average_velocities_arrive_in_one_step_and_are_told_where_they_go() -> None:
    data, seen = torch.randn(4, 6, 4), []

    def model(x: Tensor, t: Tensor, y: Tensor, r: Tensor) -> Tensor:
        seen.append((float(t[0]), float(r[0])))
        return straight(data)(x, t, y)

    for steps in (1, 2, 4):
        seen.clear()
        found = sample(model, torch.randn(4, 6, 4), None, method="meanflow", steps=steps)
        torch.testing.assert_close(found.latents, data, rtol=1e-4, atol=1e-4)
        assert (found.nfe, found.rows) == (steps, 4 * steps)
        assert seen == [(pytest.approx(1 - i / steps), pytest.approx(1 - (i + 1) / steps)) for i in range(steps)]


def test_a_few_step_model_of_ours_is_sampled_plain_and_prepared() -> None:
    model = lively("sit", conditions=("r",))
    noise, y = torch.randn(3, 6, 4), torch.tensor([1, 2, 3])
    options: dict[str, Any] = {"method": "meanflow", "steps": 2, "guidance": 1.5, "interval": (0.4, 1.0)}
    found = sample(model, noise, y, **options)
    x = noise.double()
    for t, r in ((1.0, 0.5), (0.5, 0.0)):
        at, end = torch.full((3,), t), torch.full((3,), r)
        u, null = model(x.float(), at, y, end), model(x.float(), at, torch.full((3,), 10), end)
        x = x + (r - t) * (null + 1.5 * (u - null)).double()
    torch.testing.assert_close(found.latents, x.float(), rtol=1e-4, atol=1e-4)
    assert (found.nfe, found.rows) == (2, 12)
    fast = sample(prepare(model, precision="fp32"), noise, y, **options)
    torch.testing.assert_close(fast.latents, found.latents, rtol=1e-3, atol=1e-3)
    # an ODE of the instantaneous velocity works too: r is t
    ode = sample(model, noise, y, method="euler", steps=2)
    at = torch.ones(3)
    half = noise - 0.5 * model(noise, at, y, at)
    torch.testing.assert_close(ode.latents, half - 0.5 * model(half, at / 2, y, at / 2), rtol=1e-4, atol=1e-4)


def test_meanflow_is_for_models_of_average_velocities() -> None:
    with pytest.raises(ValueError, match=r"method='meanflow' is for models of average velocities.*SiT takes no r"):
        sample(lively("sit"), torch.randn(1, 6, 4), None, method="meanflow", steps=1)
    few = lively("sit", conditions=("r",))
    with pytest.raises(ValueError, match="called as negative"):
        sample(few, torch.randn(1, 6, 4), torch.tensor([1]), method="meanflow", guidance=2.0, negative=lively("sit"))


@pytest.mark.parametrize("method", ["euler", "heun", "sde"])
def test_internal_guidance_extrapolates_from_the_exit_in_one_forward(method: str) -> None:
    model = lively("sit", exit_depth=1)
    noise, y = torch.randn(3, 6, 4), torch.tensor([1, 2, 3])
    options: dict[str, Any] = {"method": method, "steps": 3}

    def guided(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        v, early = model(x, t, y, exits=True)
        return early + 1.7 * (v - early) if 0.2 <= float(t[0]) <= 0.8 else v

    torch.manual_seed(3)
    right = sample(guided, noise, y, **options)
    for network in (model, prepare(model, precision="fp32")):
        torch.manual_seed(3)
        found = sample(network, noise, y, internal=1.7, internal_interval=(0.2, 0.8), **options)
        torch.testing.assert_close(found.latents, right.latents, rtol=1e-3, atol=1e-3)
        assert (found.nfe, found.rows) == (right.nfe, right.rows)  # no row more
    # before vanilla guidance, whose branches both leave early
    both = sample(model, noise, y, internal=1.7, guidance=2.0, method="euler", steps=1)
    at, null = torch.ones(3), torch.full((3,), 10)
    (v, e), (vn, en) = model(noise, at, y, exits=True), model(noise, at, null, exits=True)
    v, vn = e + 1.7 * (v - e), en + 1.7 * (vn - en)
    torch.testing.assert_close(both.latents, noise - (vn + 2 * (v - vn)), rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match=r"internal=1\.5 guides by an early exit of the model, and this SiT has none"):
        sample(lively("sit"), noise, y, internal=1.5)
    with pytest.raises(ValueError, match=r"internal_interval must be \(low, high\)"):
        sample(model, noise, y, internal=1.5, internal_interval=(0.9, 0.1))


def test_a_guidance_free_model_is_sampled_by_its_temperature() -> None:
    model = lively("sit", conditions=("beta",))
    noise, y = torch.randn(3, 6, 4), torch.tensor([1, 2, 3])
    right = sample(lambda x, t, y: model(x, t, y, beta=torch.full_like(t, 0.3)), noise, y, method="heun", steps=3)
    for network in (model, prepare(model, precision="fp32")):
        found = sample(network, noise, y, method="heun", steps=3, temperature=0.3)
        torch.testing.assert_close(found.latents, right.latents, rtol=1e-3, atol=1e-3)
        assert found.rows == 5 * 3
    with pytest.raises(ValueError, match="takes no beta"):
        sample(lively("sit"), noise, y, temperature=0.3)
    pytest.importorskip("torchdiffeq")
    adaptive = sample(model, noise, y, method="dopri5", temperature=0.3, tolerance=1e-3)
    exact = sample(model, noise, y, method="heun", steps=200, temperature=0.3)
    torch.testing.assert_close(adaptive.latents, exact.latents, rtol=1e-2, atol=1e-2)


def test_conventions_of_others() -> None:
    assert dimension_shift(4096) == 1
    assert dimension_shift(768 * 256) == pytest.approx(math.sqrt(48))
    interval, shift = from_data_at_one((0.125, 1.0), 0.3)
    assert interval == (0.0, 0.875)
    assert shift == pytest.approx(3.3333333)
    with pytest.raises(ValueError, match="dimensions and base must be at least 1"):
        dimension_shift(0)


# ---- training ----------------------------------------------------------------------------------------------------


def test_spans_are_in_order_and_apart_as_often_as_asked() -> None:
    generator = torch.Generator().manual_seed(0)
    r, t = sample_spans(20_000, apart=0.25, generator=generator)
    assert r.min() >= 0
    assert t.max() <= 1
    assert (r <= t).all()
    assert (r < t).float().mean().item() == pytest.approx(0.25, abs=0.01)
    with pytest.raises(ValueError, match="apart"):
        sample_spans(3, apart=1.5)


@kinds
@pytest.mark.parametrize("improved", [False, True])
def test_the_error_and_its_gradient_are_the_identity_s(kind: str, improved: bool) -> None:
    """Against differences in fp64 for du/dt, and autograd through u alone."""
    model = lively(kind, conditions=("r",)).train()
    model.y_embedder.dropout = 0.0
    x, t, y, r = inputs(model)
    v = torch.randn_like(x)
    direction = model(x, t, y).detach() if improved else None
    error = average_velocity_error(model, x, r, t, y, v, direction=direction)
    adaptive_loss(error).backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    wide = KINDS[kind](conditions=("r",)).double()
    wide.load_state_dict(model.state_dict())
    wide.eval()
    x64, t64, r64, v64 = x.double(), t.double(), r.double(), v.double()
    along = v64 if direction is None else direction.double()
    h = 1e-5
    with torch.no_grad(), backend("reference"):
        moved = [wide(x64 + s * h * along, t64 + s * h, y, r=r64) for s in (1, -1)]
        slope = (moved[0] - moved[1]) / (2 * h)
    with backend("reference"):
        u = wide(x64, t64, y, r=r64)
        right = u + (t64 - r64).view(-1, *(1,) * (x.ndim - 1)) * slope - v64
        adaptive_loss(right).backward()
    torch.testing.assert_close(error.double(), right, rtol=1e-3, atol=1e-3)
    for name, p in wide.named_parameters():
        if p.grad is not None and p.grad.abs().max() > 1e-8:
            torch.testing.assert_close(grads[name].double(), p.grad, rtol=2e-2, atol=2e-4, msg=name)


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        hidden = [layer for _ in range(2) for layer in (nn.Linear(64, 64), nn.SiLU())]
        self.net = nn.Sequential(nn.Linear(4, 64), nn.SiLU(), *hidden, nn.Linear(64, 2))

    def forward(self, x: Tensor, t: Tensor, y: Tensor, r: Tensor | None = None) -> Tensor:
        span = torch.zeros_like(t) if r is None else t - r
        return self.net(torch.cat([x[:, 0], t[:, None], span[:, None]], 1))[:, None]


def test_a_model_learns_to_sample_in_one_step() -> None:
    """Two points: the velocity at t = 1 leads between them, the average velocity to one of them."""
    torch.manual_seed(0)
    model, points = Small(), torch.tensor([[[1.5, -1.0]], [[-1.5, 1.0]]])
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 800)
    y = torch.zeros(256, dtype=torch.int64)
    for _ in range(800):
        data, noise = points[torch.randint(0, 2, (256,))], torch.randn(256, 1, 2)
        r, t = sample_spans(256, apart=0.75, mean=0.4, std=1.5)
        x, v = LINEAR.mix(data, noise, t), LINEAR.velocity(data, noise, t)
        loss = adaptive_loss(average_velocity_error(model, x, r, t, y, v), power=0.0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    noise = torch.randn(256, 1, 2)

    def away(method: str) -> float:
        found = sample(model.eval(), noise, y, method=method, steps=1).latents
        return (found[:, None] - points).square().sum((2, 3)).amin(1).mean().sqrt().item()

    assert away("euler") > 1.2
    assert away("meanflow") < 0.7


def test_guided_targets_and_adaptive_weights() -> None:
    v, c, n = torch.randn(3, 2, 5, requires_grad=True).unbind(0)
    torch.testing.assert_close(guided_target(v, c, n, 1.0), v)
    torch.testing.assert_close(guided_target(v, c, n, 2.0, 0.5), 2 * v + 0.5 * c - 1.5 * n)
    assert not guided_target(v, c, n, 2.0).requires_grad
    error = torch.randn(4, 3, 2, requires_grad=True)
    squared = error.flatten(1).square().sum(1)
    torch.testing.assert_close(adaptive_loss(error, power=0.0), squared.mean())
    (grad,) = torch.autograd.grad(adaptive_loss(error), error)
    torch.testing.assert_close(grad, 2 * error / 4 / (squared + 1e-3).view(-1, 1, 1).detach())


# ---- tangents of whole models ------------------------------------------------------------------------------------


@kinds
def test_a_model_s_tangent_is_right_through_kernels_and_through_the_reference(kind: str) -> None:
    model = lively(kind)
    x, t, y, _ = inputs(model)
    dx, dt = torch.randn_like(x), torch.ones_like(t)
    wide = KINDS[kind]().double()
    wide.load_state_dict(model.state_dict())
    wide.eval()
    h = 1e-5
    with torch.no_grad(), backend("reference"):
        moved = [wide(x.double() + s * h * dx.double(), t.double() + s * h, y) for s in (1, -1)]
    exact = (moved[0] - moved[1]) / (2 * h)
    for name in (None, "reference"):
        with contextlib.nullcontext() if name is None else backend(name):
            _, tangent = torch.func.jvp(lambda x, t: model(x, t, y), (x, t), (dx, dt))
            with torch.autograd.forward_ad.dual_level():
                duals = [torch.autograd.forward_ad.make_dual(a, b) for a, b in ((x, dx), (t, dt))]
                other = torch.autograd.forward_ad.unpack_dual(model(*duals, y)).tangent
        for found in (tangent, other):
            torch.testing.assert_close(found.double(), exact, rtol=1e-3, atol=1e-3)


def test_parameters_carry_tangents_too() -> None:
    model = lively("sit")
    x, t, y, _ = inputs(model)
    parameters = {k: v.detach() for k, v in model.named_parameters()}
    torch.manual_seed(5)
    moved = {k: torch.randn_like(v) * 0.01 for k, v in parameters.items()}
    _, tangent = torch.func.jvp(lambda p: functional_call(model, p, (x, t, y)), (parameters,), (moved,))
    wide = KINDS["sit"]().double().eval()
    h = 1e-4
    ends = []
    for sign in (1, -1):
        wide.load_state_dict({k: (v + sign * h * moved[k]) if k in moved else v for k, v in
                              {k: v.double() for k, v in model.state_dict().items()}.items()})  # fmt: skip
        with torch.no_grad(), backend("reference"):
            ends.append(wide(x.double(), t.double(), y))
    torch.testing.assert_close(tangent.double(), (ends[0] - ends[1]) / (2 * h), rtol=1e-3, atol=1e-3)


# ---- files -------------------------------------------------------------------------------------------------------


@kinds
def test_conditions_and_exits_come_back_from_files(kind: str, tmp_path: Path) -> None:
    model = lively(kind, conditions=("r", "beta"), exit_depth=2)
    model.save_pretrained(tmp_path)
    said = json.loads((tmp_path / "config.json").read_text())
    assert said["encoder_depth"] == 2
    loaded = load_generator(tmp_path)
    assert loaded.config == model.config
    x, t, y, r = inputs(model)
    beta = torch.rand(3)
    torch.testing.assert_close(loaded(x, t, y, r, beta, exits=True), model(x, t, y, r, beta, exits=True))


def test_the_exit_of_a_training_file_is_told_or_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Internal guidance's public files: `final_layer_xr`, after encoder_depth blocks that no key shows."""
    model = lively("sit-2d", exit_depth=1)
    torch.save({"model": {}, "ema": model.state_dict(), "steps": 3}, tmp_path / "0000003.pt")
    loaded = SiT.from_pretrained(tmp_path / "0000003.pt", exit_depth=1)
    assert loaded.config.exit_depth == 1
    assert "exit_depth" not in caplog.text
    assert SiT.from_pretrained(tmp_path / "0000003.pt").config.exit_depth == 2  # depth - 1, named
    assert "exit_depth=2" in caplog.text
    with pytest.raises(CheckpointError, match="exit_depth 7"):
        SiT.from_pretrained(tmp_path / "0000003.pt", exit_depth=7)


def test_a_fresh_model_with_options_starts_at_zero_like_any_other() -> None:
    model = SiT(SiTConfig(tokens=6, **SIZES, conditions=("r", "beta"), exit_depth=1))
    x, t, y, r = inputs(model)
    v, early = model.eval()(x, t, y, r, torch.rand(3), exits=True)
    assert not v.any()
    assert not early.any()
    assert isinstance(model.r_embedder, nn.Module)
    assert model.r_embedder.mlp[0].weight.std().item() == pytest.approx(0.02, rel=0.1)
