# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""Samplers against exact solutions, guidance against its formulas, and the work that each run is charged for."""

from __future__ import annotations

import math
import sys

import pytest
import torch

from maetok_fast import diffusion, inference
from maetok_fast.diffusion import (
    COSINE,
    LINEAR,
    Guidance,
    SamplingError,
    flip_time,
    get_path,
    sample,
    sample_times,
    shift_times,
)
from maetok_fast.models import SiT, SiTConfig

MEAN, STD = 1.5, 0.5


def gaussian_velocity(x, t, y):
    """The exact velocity for data ~ N(MEAN, STD^2) on the linear path."""
    t = t.to(x.dtype).reshape(-1, *(1,) * (x.ndim - 1))
    variance = (1 - t) ** 2 * STD**2 + t**2
    return -MEAN + (t - (1 - t) * STD**2) / variance * (x - (1 - t) * MEAN)


class Recorder:
    """A velocity that differs by label and remembers every call."""

    def __init__(self, null=1000):
        self.calls, self.null = [], null

    def __call__(self, x, t, y):
        self.calls.append((float(t[0]), y.tolist()))
        return torch.where(y == self.null, -1.0, 1.0).to(x.dtype).reshape(-1, *(1,) * (x.ndim - 1)).expand_as(x)


@pytest.fixture
def noise():
    return torch.randn(4, 8, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize(("method", "order"), [("euler", 1), ("heun", 2)])
def test_ode_converges_at_its_order(method, order, noise):
    exact = MEAN + STD * noise
    error = [
        (sample(gaussian_velocity, noise, None, steps=n, method=method).latents - exact).abs().max() for n in (64, 128)
    ]
    assert math.log2(error[0] / error[1]) == pytest.approx(order, abs=0.3)
    assert error[1] < 0.05


def test_dopri5_solves_it(noise):
    pytest.importorskip("torchdiffeq")
    result = sample(gaussian_velocity, noise, None, method="dopri5")
    torch.testing.assert_close(result.latents, MEAN + STD * noise, atol=1e-3, rtol=0)
    assert result.nfe > 10


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_dopri5_stops_where_the_velocity_is_not_finite(value, noise):
    pytest.importorskip("torchdiffeq")

    def breaks(x, t, y):
        return torch.where(t < 0.5, value, -1.0).to(x.dtype).reshape(-1, 1, 1).expand_as(x)

    with pytest.raises(
        SamplingError, match=r"dopri5 stopped at t = (0\.[0-4]\d*|0), NFE \d+: the velocity is not finite"
    ):
        sample(breaks, noise, None, method="dopri5")


@pytest.mark.parametrize("state", [torch.float64, torch.float32])
@pytest.mark.parametrize(
    "model",
    [
        lambda x, t, y: x / t.to(x.dtype).reshape(-1, 1, 1) ** 3,  # no finite value at t = 0
        lambda x, t, y: -1e4 * (x - torch.cos(1e4 * t).to(x.dtype).reshape(-1, 1, 1)),
        lambda x, t, y: torch.randn_like(x) * 100,  # no function at all
    ],
    ids=["singular", "stiff", "noise"],
)
def test_dopri5_has_a_bound_on_its_work(model, state, noise):
    pytest.importorskip("torchdiffeq")
    calls = []

    def counted(x, t, y):
        calls.append(float(t[0]))
        return model(x, t, y)

    with pytest.raises(SamplingError, match=r"dopri5 stopped at t = [\d.e-]+, NFE \d+: .*; a finite model") as error:
        sample(counted, noise, None, method="dopri5", state_dtype=state, max_nfe=500)
    assert len(calls) <= 500
    reached = float(str(error.value).split("t = ")[1].split(",")[0])
    assert 0 < reached <= 1  # the last step taken: no trial step is further on than one step from it
    assert min(calls) <= reached + 1e-3


def test_dopri5_says_when_its_tolerance_cannot_be_met(noise):
    pytest.importorskip("torchdiffeq")
    state = {"state_dtype": torch.float32, "max_nfe": 2000}
    assert sample(gaussian_velocity, noise, None, method="dopri5", tolerance=1e-4, **state).nfe < 200
    with pytest.raises(SamplingError, match="give a larger one, or use method='heun'"):
        sample(gaussian_velocity, noise, None, method="dopri5", tolerance=1e-12, **state)


@pytest.mark.parametrize("scale", [1e-4, 1.0, 30.0])
def test_dopri5_stays_inside_the_times_of_the_model(scale, noise):
    pytest.importorskip("torchdiffeq")
    times = []

    def model(x, t, y):
        times.append(float(t[0]))
        return -scale * torch.sin(x)

    sample(model, noise, None, method="dopri5", tolerance=1e-3)
    assert max(times) == 1
    assert 0 <= min(times) < 1e-6


def test_dopri5_leaves_a_models_own_assertions_alone(noise):
    pytest.importorskip("torchdiffeq")

    def model(x, t, y):
        assert len(x) == 3, "three rows, please"
        return x

    with pytest.raises(AssertionError, match="three rows, please"):
        sample(model, noise, None, method="dopri5")


@pytest.mark.parametrize("tolerance", [0.0, -1.0])
@pytest.mark.parametrize("method", ["dopri5", "euler"])
def test_tolerance_must_be_positive(tolerance, method, noise):
    with pytest.raises(ValueError, match="tolerance must be > 0, got"):
        sample(gaussian_velocity, noise, None, method=method, tolerance=tolerance)


def test_dopri5_without_its_package(noise, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchdiffeq", None)
    with pytest.raises(ImportError, match="pip install torchdiffeq"):
        sample(gaussian_velocity, noise, None, method="dopri5")


def test_sde_reaches_the_data_distribution():
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(64, 512, 1, generator=generator)
    latents = sample(gaussian_velocity, noise, None, steps=250, generator=generator).latents
    assert latents.dtype == torch.float32
    assert latents.mean().item() == pytest.approx(MEAN, abs=0.02)
    assert latents.std().item() == pytest.approx(STD, rel=0.03)


def test_sde_is_reproducible_with_a_generator(noise):
    def run(seed):
        return sample(gaussian_velocity, noise, None, steps=5, generator=torch.Generator().manual_seed(seed)).latents

    assert torch.equal(run(3), run(3))
    assert not torch.equal(run(3), run(4))


@pytest.mark.parametrize(("method", "nfe"), [("euler", 6), ("heun", 11), ("sde", 6)])
def test_nfe_and_rows(method, nfe, noise):
    y = torch.zeros(4, dtype=torch.int64)
    plain = sample(Recorder(), noise, y, steps=6, method=method)
    assert (plain.nfe, plain.rows) == (nfe, 4 * nfe)
    guided = sample(Recorder(), noise, y, steps=6, method=method, guidance=2.0)
    assert (guided.nfe, guided.rows) == (nfe, 8 * nfe)


def test_interval_skips_the_second_branch(noise):
    model, y = Recorder(), torch.arange(4)
    result = sample(model, noise, y, steps=10, method="euler", guidance=3.0, interval=(0.0, 0.55))
    # times 1.0, 0.9 ... 0.1: the five from 0.5 down are guided
    assert [len(labels) for _, labels in model.calls] == [4] * 5 + [8] * 5
    assert model.calls[-1][1] == [0, 1, 2, 3, 1000, 1000, 1000, 1000]
    assert result.rows == 5 * 4 + 5 * 8
    # v = 1 outside, -1 + 3 * 2 = 5 inside; x goes from t = 1 to 0
    torch.testing.assert_close(result.latents, noise - 0.5 * 1 - 0.5 * 5)


def test_guidance_one_and_unconditional(noise):
    model = Recorder()
    sample(model, noise, None, steps=2, method="euler")
    assert model.calls[0][1] == [1000] * 4
    with pytest.raises(ValueError, match=r"int64 labels of shape \(4,\)"):
        sample(model, noise, torch.zeros(4), steps=2)


def test_autoguidance_uses_the_worse_model_with_the_same_labels(noise):
    good, worse, y = Recorder(), Recorder(null=7), torch.full((4,), 7)
    result = sample(good, noise, y, steps=4, method="euler", guidance=1.5, negative=worse, interval=(0.0, 0.5))
    assert len(good.calls) == 4
    assert len(worse.calls) == 2
    assert worse.calls[0][1] == [7] * 4
    assert result.rows == 4 * 4 + 2 * 4
    torch.testing.assert_close(result.latents, noise - 0.5 - 0.5 * (-1 + 1.5 * 2))


@pytest.mark.parametrize("shape", [(2, 5, 6), (2, 6, 4, 4)])
def test_guidance_on_the_first_channels(shape):
    noise = torch.zeros(shape, dtype=torch.float64)
    latents = sample(
        Recorder(), noise, torch.zeros(2, dtype=torch.int64), steps=1, method="euler", guidance=3.0, guidance_channels=2
    ).latents
    latents = latents.movedim(1, -1) if len(shape) == 4 else latents
    assert (latents[..., :2] == -5).all()
    assert (latents[..., 2:] == -1).all()


def test_temperature_is_one_forward(noise):
    seen = []

    def model(x, t, y, beta):
        seen.append(beta)
        return x * 0

    result = sample(model, noise, None, steps=3, method="euler", temperature=0.4)
    assert result.rows == 3 * 4
    assert seen[0].tolist() == pytest.approx([0.4] * 4)
    with pytest.raises(ValueError, match="leave guidance at 1"):
        Guidance(scale=2.0, temperature=0.4)


class Planned:
    """A model that plans: one plan per kind of forward, and `step` gives what a call gives."""

    def __init__(self):
        self.plans = []

    def plan(self, ts, y, **conditions):
        self.plans.append((len(ts), len(y)))
        return ts, y

    def step(self, plan, i, x):
        ts, y = plan
        assert len(x) == len(y)
        return self(x, torch.full((len(x),), float(ts[i])), y)

    def __call__(self, x, t, y):
        t, scale = t.to(x.dtype).reshape(-1, 1, 1), (1 + y.to(x.dtype) / 1000).reshape(-1, 1, 1)
        return x * scale * t


@pytest.mark.parametrize("method", ["euler", "heun", "sde"])
@pytest.mark.parametrize("negative", [False, True])
def test_planned_models_give_the_same_samples(method, negative, noise):
    y = torch.arange(4)

    def run(model, worse):
        return sample(
            model, noise, y, steps=12, method=method, guidance=2.0, interval=(0.1, 0.6),
            negative=worse if negative else None, generator=torch.Generator().manual_seed(0),
        )  # fmt: skip

    planned = Planned()
    plain_model = Planned().__call__  # a bound method: no plan attribute
    expected, got = run(plain_model, plain_model), run(planned, planned)
    # the planned model rounds its times to fp32 as the plain one does
    torch.testing.assert_close(got.latents, expected.latents, rtol=1e-6, atol=1e-6)
    assert (got.nfe, got.rows) == (expected.nfe, expected.rows)
    guided = sum(steps for steps, rows in planned.plans if rows == 8)
    assert sorted(rows for _, rows in planned.plans) == ([4, 4] if negative else [4, 8])
    assert sum(steps for steps, _ in planned.plans) == (12 + 6 if negative else 12)
    assert guided == (0 if negative else sum(steps for steps, rows in planned.plans) - planned.plans[-1][0])


@pytest.mark.parametrize("path", [LINEAR, COSINE])
def test_path_identities(path):
    torch.manual_seed(0)
    data, noise = torch.randn(2, 5, 4, 3, dtype=torch.float64)
    t = torch.rand(5, dtype=torch.float64) * 0.9 + 0.05
    step = 1e-6
    slope = (path.mix(data, noise, t + step) - path.mix(data, noise, t - step)) / (2 * step)
    torch.testing.assert_close(path.velocity(data, noise, t), slope, atol=1e-7, rtol=1e-7)
    score = path.score(path.velocity(data, noise, t), path.mix(data, noise, t), t)
    torch.testing.assert_close(score, -noise / path.sigma(t).reshape(-1, 1, 1))
    assert get_path(path.name) is path


def test_times():
    generator = torch.Generator().manual_seed(0)
    for path in ("linear", "cosine"):
        t = sample_times(4096, "lognormal", path=path, generator=generator)
        assert t.min() > 0
        assert t.max() < 1
        assert t.median() == pytest.approx(0.5, abs=0.03)
    assert sample_times(8).shape == (8,)
    with pytest.raises(ValueError, match="uniform or lognormal"):
        sample_times(8, "cubic")
    t = torch.linspace(0, 1, 11)
    assert shift_times(t, 1.0).equal(t)
    # the reciprocal shift in the opposite convention
    torch.testing.assert_close(1 - shift_times(1 - t, 1 / 0.3), shift_times(t, 0.3))


def test_flip_time_is_its_own_inverse(noise):
    def official(x, s, y):  # t = 0 noise, t = 1 data
        return -gaussian_velocity(x, 1 - s, y)

    t = torch.full((4,), 0.3)
    torch.testing.assert_close(flip_time(official)(noise, t, None), gaussian_velocity(noise, t, None))
    torch.testing.assert_close(flip_time(flip_time(official))(noise, t, None), official(noise, t, None))


def test_bad_arguments(noise):
    with pytest.raises(ValueError, match="expected one of euler, heun, dopri5, sde"):
        sample(gaussian_velocity, noise, None, method="ddim")
    with pytest.raises(ValueError, match="steps must be at least 1"):
        sample(gaussian_velocity, noise, None, steps=0)
    with pytest.raises(ValueError, match="low <= high"):
        sample(gaussian_velocity, noise, None, guidance=2.0, interval=(0.7, 0.1))
    with pytest.raises(ValueError, match="linear"):
        sample(gaussian_velocity, noise, None, path="vp")
    with pytest.raises(ValueError, match="no size 0"):
        sample(gaussian_velocity, noise[:0], None)
    with pytest.raises(TypeError, match="noise must be a floating-point tensor, got ndarray"):
        sample(gaussian_velocity, noise.numpy(), None)
    with pytest.raises(TypeError, match=r"floating-point tensor, got torch\.int64"):
        sample(gaussian_velocity, noise.long(), None)
    with pytest.raises(TypeError, match="y must be a tensor of int64 labels or None, got list"):
        sample(gaussian_velocity, noise, [1, 2, 3, 4])
    with pytest.raises(TypeError, match=r"steps must be an integer, got 2\.5"):
        sample(gaussian_velocity, noise, None, steps=2.5)
    for interval in (0.5, (0.1,), (0.1, 0.2, 0.3)):
        with pytest.raises(TypeError, match=r"interval must be a pair \(low, high\)"):
            sample(gaussian_velocity, noise, None, interval=interval)
    with pytest.raises(ValueError, match="function takes no beta: use guidance instead"):
        sample(gaussian_velocity, noise, None, temperature=0.5)
    with pytest.raises(ValueError, match="give its scale, or leave negative out"):
        sample(gaussian_velocity, noise, None, negative=gaussian_velocity)


@pytest.mark.parametrize(
    ("name", "value", "error", "match"),
    [
        ("state_dtype", torch.int64, TypeError, r"state_dtype must be torch\.float64, .* got torch\.int64"),
        ("state_dtype", "float64", TypeError, "state_dtype must be .* got 'float64'"),
        ("state_dtype", torch.float8_e4m3fn, TypeError, "state_dtype must be .* got torch.float8_e4m3fn"),
        ("steps", True, TypeError, "steps must be an integer, got True"),
        ("method", ["euler"], ValueError, r"unknown sampling method \['euler'\]"),
        ("guidance", "2", TypeError, "guidance must be a number, got '2'"),
        ("guidance", float("nan"), ValueError, "guidance must be finite, got nan"),
        ("interval", (0.1, "1"), TypeError, "interval must be a number, got '1'"),
        ("interval", (float("nan"), 1.0), ValueError, "interval must be finite"),
        ("negative", "ema", TypeError, r"negative must be a callable \(x, t, y\) -> velocity, got str"),
        ("guidance_channels", 0, ValueError, "guidance_channels must be at least 1, got 0"),
        ("guidance_channels", 1.5, TypeError, "guidance_channels must be an integer"),
        ("path", ["linear"], ValueError, r"unknown path \['linear'\]: expected one of cosine, linear"),
        ("shift", 0.0, ValueError, "shift must be > 0, got 0.0"),
        ("shift", float("nan"), ValueError, "shift must be finite, got nan"),
        ("shift", None, TypeError, "shift must be a number, got None"),
        ("null_label", 2.0, TypeError, "null_label must be an integer, got 2.0"),
        ("null_label", -1, ValueError, "null_label must be at least 0, got -1"),
        ("generator", 3, TypeError, "generator must be a torch.Generator, a callable or None, got int"),
        ("tolerance", "1e-5", TypeError, "tolerance must be a number"),
        ("max_nfe", 0, ValueError, "max_nfe must be at least 1, got 0"),
    ],
)
def test_every_argument_is_checked(name, value, error, match, noise):
    calls = []

    def model(x, t, y):
        calls.append(t)
        return x

    with pytest.raises(error, match=match):
        sample(model, noise, None, **{"steps": 2, name: value})
    assert not calls  # before any work


def test_more_arguments(noise):
    with pytest.raises(TypeError, match=r"model must be a callable .* got str"):
        sample("sit-xl-1", noise, None)
    with pytest.raises(ValueError, match="noise must be"):
        sample(gaussian_velocity, noise[0], None)
    with pytest.raises(TypeError, match="temperature must be a number, got 'hot'"):
        sample(lambda x, t, y, beta: x, noise, None, temperature="hot")
    with pytest.raises(ValueError, match=r"use state_dtype=torch\.float64 or float32"):
        sample(gaussian_velocity, noise, None, method="dopri5", state_dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="y and noise must be on one device"):
        sample(gaussian_velocity, noise, torch.zeros(4, dtype=torch.int64, device="meta"))
    model = small_model()
    with pytest.raises(ValueError, match=r"null_label=11 is no class of this model: .* 0 \.\. 10"):
        sample(model, noise, torch.arange(4), guidance=2.0, null_label=11)


@pytest.mark.parametrize("method", list(diffusion.METHODS))
@pytest.mark.parametrize(
    ("returned", "error", "match"),
    [
        (lambda x: x[:, :1], ValueError, r"returns must return a velocity of x's shape \(4, 8, 3\), got \(4, 1, 3\)"),
        (lambda x: x.repeat(1, 1, 2), ValueError, r"got \(4, 8, 6\)"),
        (lambda x: x[0], ValueError, r"got \(8, 3\)"),
        (lambda x: (x, x), TypeError, r"tensor of shape \(4, 8, 3\), got tuple"),
        (lambda x: x.long(), TypeError, "floating-point velocity, got torch.int64"),
        (lambda x: x.to("meta"), ValueError, "on x's device cpu, got meta"),
    ],
)
@pytest.mark.parametrize("planned", [False, True])
def test_what_a_model_returns_is_checked(returned, error, match, planned, method, noise):
    if method == "dopri5":
        pytest.importorskip("torchdiffeq")

    def returns(x, t, y, r=None):
        return returned(x)

    class returns_planned(Planned):
        def __call__(self, x, t, y, r=None):
            return returned(x)

    with pytest.raises(error, match=match if not planned else match.replace("returns", "returns_planned")):
        sample(returns_planned() if planned else returns, noise, None, method=method, steps=2)


@pytest.mark.parametrize("state", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_every_floating_state_dtype(state, noise):
    exact = sample(lambda x, t, y: -x, noise, None, method="euler", steps=4).latents
    got = sample(lambda x, t, y: -x, noise, None, method="euler", steps=4, state_dtype=state).latents
    assert got.dtype == noise.dtype
    # four sums, each rounded to the state's dtype
    torch.testing.assert_close(got, exact, rtol=0, atol=4 * torch.finfo(state).eps * exact.abs().max().item())


def test_dopri5_plans_nothing(noise):
    pytest.importorskip("torchdiffeq")
    model = Planned()
    sample(model, noise, torch.arange(4), method="dopri5", guidance=2.0)
    assert model.plans == []


def test_the_protocols_know_our_models():
    prepared = inference.prepare(small_model(dim=64).float(), precision="fp32")
    assert isinstance(prepared, diffusion.Planned)
    assert isinstance(Planned(), diffusion.Planned)
    assert not isinstance(small_model(), diffusion.Planned)
    assert not isinstance(gaussian_velocity, diffusion.Planned)


def small_model(**fields):
    sizes = {"tokens": 8, "channels": 3, "dim": 16, "depth": 1, "heads": 2, "num_classes": 10}
    return SiT(SiTConfig(**{**sizes, **fields})).double().eval()


def test_the_null_label_is_the_models_own(noise):
    seen = []
    model = small_model()
    model.y_embedder.register_forward_pre_hook(lambda module, args: seen.append(args[0].tolist()))
    y = torch.arange(4)
    sample(model, noise, y, steps=1, method="euler", guidance=2.0)
    sample(model, noise, None, steps=1, method="euler")
    sample(model, noise, None, steps=1, method="euler", null_label=7)
    assert seen == [[0, 1, 2, 3, 10, 10, 10, 10], [10] * 4, [7] * 4]
    without = small_model(label_dropout=0.0)
    sample(without, noise, y, steps=1)
    sample(without, noise, y, steps=1, guidance=2.0, negative=model)
    with pytest.raises(ValueError, match="guidance needs a null class, and this model has none"):
        sample(without, noise, y, steps=1, guidance=2.0)
    with pytest.raises(ValueError, match="y=None needs a null class"):
        sample(without, noise, None, steps=1)


def test_labels_out_of_range(noise):
    good, small = small_model(), small_model(num_classes=3, label_dropout=0.0)
    with pytest.raises(ValueError, match=r"labels must be 0 \.\. 10 \(10 = no class\); got 11"):
        sample(good, noise, torch.tensor([0, 11, 1, 2]))
    with pytest.raises(ValueError, match=r"labels must be 0 \.\. 10 .*; got -1"):
        sample(good, noise, torch.tensor([0, -1, 1, 2]))
    with pytest.raises(ValueError, match=r"labels must be 0 \.\. 2, the model has no null class; got 3"):
        sample(good, noise, torch.arange(4), guidance=2.0, negative=small)


def test_training_mode_is_refused(noise):
    good, training = small_model(), small_model().train()
    with pytest.raises(ValueError, match=r"call model\.eval\(\) first"):
        sample(training, noise, torch.arange(4))
    with pytest.raises(ValueError, match=r"call negative\.eval\(\) first"):
        sample(good, noise, torch.arange(4), guidance=2.0, negative=training)
