# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""maetok_fast.training.generator: one step against its losses written out, and every configuration of it at work."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from generator_runs import CHANNELS, CLASSES, TOKENS, small_generator
from torch import Tensor

from maetok_fast.config import ConfigError, read
from maetok_fast.data.latents import LatentBatch
from maetok_fast.layers import EMA
from maetok_fast.models.sit import Route
from maetok_fast.pipeline.statistics import LatentStatistics
from maetok_fast.training import build_generator
from maetok_fast.training.build_generator import _example, make_generator_stage
from maetok_fast.training.flops import module_flops
from maetok_fast.training.generator import GeneratorStage
from maetok_fast.training.generator_configs import GeneratorRun, SiTRun
from maetok_fast.training.latents import Latents, Paired
from maetok_fast.training.world import World

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")


def run_of(*overrides: str, kind: str = "sit") -> Any:
    return read(small_generator(Path("unused"), "unused", kind), {}, overrides)


def stage_of(run: GeneratorRun, awake: bool = True) -> GeneratorStage:
    shape = (TOKENS, CHANNELS) if isinstance(run.model.tokens, int) else (CHANNELS, 4, 4)
    statistics = LatentStatistics(torch.tensor(2.0), torch.tensor(0.5))
    stage = make_generator_stage(run, CPU, Latents(shape, statistics), 32)
    for network in stage.networks:
        network.called = network.module.train()
    if awake:
        wake(stage.model)
    stage.begin(World("cpu"), EMA(stage.averaged))
    return stage


def wake(model: torch.nn.Module) -> None:
    """No gate of zero, behind which nothing would show."""
    torch.manual_seed(3)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad and p.abs().max() < 1e-3:
                p.normal_(0, 0.2)


def batch_of(count: int = 5, kind: str = "sit") -> LatentBatch:
    generator = torch.Generator().manual_seed(1)
    shape = (TOKENS, CHANNELS) if kind == "sit" else (CHANNELS, 4, 4)
    z = torch.randn(count, *shape, generator=generator)
    return LatentBatch(z, torch.arange(count) % CLASSES, tuple(range(count)), (False,) * count, 0, 0)


def gradients(module: torch.nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


def same(found: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert found.keys() == want.keys()
    for name, value in want.items():
        torch.testing.assert_close(found[name], value, atol=1e-6, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


# ---- one step, written out ------------------------------------------------------------------------------------------


def drawn(stage: GeneratorStage, step: int = 0) -> Any:
    torch.manual_seed(9)
    return stage._given(batch_of(kind="sit" if isinstance(stage.run.model.tokens, int) else "grid"), step, 0)


def backward(stage: GeneratorStage, step: int = 0) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    torch.manual_seed(9)
    kind = "sit" if isinstance(stage.run.model.tokens, int) else "grid"
    values = stage.backward(batch_of(kind=kind), step, 0, 1)
    return values, gradients(stage.model)


def test_what_is_drawn() -> None:
    stage = stage_of(run_of("objective.times=lognormal", "objective.shift=2", "model.label_dropout=0.5"))
    given = drawn(stage)
    z = (batch_of().latents - 2) / 0.5
    # v = noise - z and x = z + t v
    torch.testing.assert_close(given.x - given.t.view(-1, 1, 1) * given.velocity, z, atol=1e-5, rtol=1e-5)
    torch.manual_seed(9)
    dropped = torch.rand(5) < 0.5
    assert given.y.tolist() == [CLASSES if d else i % CLASSES for i, d in enumerate(dropped)]
    t = torch.sigmoid(torch.randn(5))
    torch.testing.assert_close(given.t, 2 * t / (1 + t))
    assert stage.averaged.y_embedder.dropout == 0


@pytest.mark.parametrize("path", ["linear", "cosine"])
def test_velocity_and_direction_are_the_losses_written_out(path: str) -> None:
    stage = stage_of(run_of(f"objective.path={path}", "objective.direction=0.7"))
    given = drawn(stage)
    values, found = backward(stage)
    stage.model.zero_grad()
    v = stage.averaged(given.x, given.t, given.y)
    mse = (v - given.velocity).square().mean()
    direction = (1 - F.cosine_similarity(v, given.velocity, dim=-1)).mean()
    (mse + 0.7 * direction).backward()
    same(found, gradients(stage.model))
    torch.testing.assert_close(values, {"velocity": mse.detach(), "direction": direction.detach()})


def test_the_early_exit_learns_the_same_velocity() -> None:
    stage = stage_of(run_of("model.exit_depth=2", "objective.exit=0.3"))
    given = drawn(stage)
    _, found = backward(stage)
    stage.model.zero_grad()
    v, early = stage.averaged(given.x, given.t, given.y, exits=True)
    (F.mse_loss(v, given.velocity) + 0.3 * F.mse_loss(early, given.velocity)).backward()
    same(found, gradients(stage.model))


def test_guidance_free_training_holds_the_tempered_velocity_to_the_target() -> None:
    stage = stage_of(run_of("model.conditions=[beta]", "objective.guidance_free=true", "model.label_dropout=0.4"))
    given = drawn(stage)
    assert given.beta is not None
    assert torch.equal(given.beta == 1, given.y == CLASSES)
    _, found = backward(stage)
    stage.model.zero_grad()
    beta, ones = given.beta.view(-1, 1, 1), torch.ones(5)
    with torch.no_grad():
        null = stage.averaged(given.x, given.t, torch.full((5,), CLASSES), beta=ones)
    v = stage.averaged(given.x, given.t, given.y, beta=given.beta)
    F.mse_loss(beta * v + (1 - beta) * null, given.velocity).backward()
    same(found, gradients(stage.model))


@pytest.mark.parametrize("which", ["meanflow", "improved"])
@pytest.mark.parametrize("guidance", [1.0, 2.5])
def test_average_velocities_are_meanflow_s(which: str, guidance: float) -> None:
    stage = stage_of(
        run_of("model.conditions=[r]", f"objective.averages={which}", f"objective.guidance={guidance}",
               "objective.apart=0.8", "model.label_dropout=0.3")
    )  # fmt: skip
    given = drawn(stage)
    assert (given.r <= given.t).all()
    assert (given.r < given.t).any()
    _, found = backward(stage)
    stage.model.zero_grad()
    model = stage.averaged
    with torch.no_grad():
        own = model(given.x, given.t, given.y)
        null = model(given.x, given.t, torch.full((5,), CLASSES))
        target = guidance * given.velocity + (1 - guidance) * null
        target = torch.where((given.y == CLASSES).view(-1, 1, 1), given.velocity, target)
        along, h = own if which == "improved" else target, 1e-3
        steps = [model(given.x + s * h * along, given.t + s * h, given.y, r=given.r) for s in (1, -1)]
        slope = (steps[0] - steps[1]) / (2 * h)  # central difference of the total derivative
    error = model(given.x, given.t, given.y, r=given.r) + (given.t - given.r).view(-1, 1, 1) * slope - target
    squared = error.flatten(1).square().sum(1)
    (squared / (squared.detach() + 1e-3)).mean().backward()
    for name, want in gradients(stage.model).items():
        assert F.cosine_similarity(found[name].flatten(), want.flatten(), dim=0) > 0.999, name


class FakeTeacher:
    """Features that anybody can make again."""

    features = 5

    def __call__(self, images: Tensor) -> Tensor:
        return images.float().flatten(1)[:, : 2 * TOKENS * 5].reshape(len(images), 2 * TOKENS, 5) / 100 - 1


@pytest.mark.parametrize("depth", [1, 2, 3, 4])
def test_alignment_is_the_cosine_of_the_tapped_tokens(depth: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before, within and behind the route; 12 features for 6 tokens."""

    monkeypatch.setattr(build_generator, "_teacher", lambda *a: FakeTeacher())
    stage = stage_of(
        run_of("align.target=dino", f"align.depth={depth}", "align.hidden=16", "align.weight=0.5", "routing.share=0.5")
    )
    z, y = batch_of().latents, batch_of().labels
    images = torch.randint(0, 256, (5, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(2))

    paired = Paired(z, images, y, tuple(range(5)))
    torch.manual_seed(9)
    given = stage._given(paired, 4, 0)
    torch.manual_seed(9)
    stage.backward(paired, 4, 0, 1)
    found = gradients(stage.model)
    stage.model.zero_grad()

    first, last = stage.run.routing.blocks(4)
    assert (first, last) == (1, 3)
    route = Route(first, last, given.kept, given.mask)
    out = stage.averaged.forward_training(given.x, given.t, given.y, route=route, taps=(depth,))
    v, projected, features = out.velocity, stage.model.projector(out.hidden[0]), FakeTeacher()(images)
    cosines = []
    for b in range(5):
        for k in range(projected.shape[1]):
            n = int(given.kept[b, k]) if depth == 2 else k
            cosines += [F.cosine_similarity(projected[b, k], features[b, m], dim=0) for m in (n, TOKENS + n)]
    (F.mse_loss(v, given.velocity) + 0.5 * (1 - torch.stack(cosines).mean())).backward()
    same(found, gradients(stage.model))


def test_the_model_s_own_average_is_a_teacher_nearer_to_the_data() -> None:
    stage = stage_of(run_of("align.target=self", "align.depth=1", "align.self_depth=3", "align.self_shift=0.5"))
    teacher = stage.own_teacher
    assert teacher is not None
    with torch.no_grad():
        for p in stage.averaged.parameters():
            p.add_(0.01)  # the network moves, its average does not
    given = drawn(stage)
    torch.manual_seed(9)
    batch = batch_of()
    z = stage.latents.of(batch)
    y = stage._labels(batch, 5, CPU)
    t = torch.rand(5)
    noise = torch.randn_like(z)
    earlier = (t - 0.5 * torch.rand(5)).clamp_min(0)
    x = (1 - earlier.view(-1, 1, 1)) * z + earlier.view(-1, 1, 1) * noise
    want = teacher.forward_training(x, earlier, y, taps=(3,)).hidden[0]
    torch.testing.assert_close(given.features, want)
    assert not any(p.requires_grad for p in teacher.parameters())
    values, found = backward(stage)
    assert 0 < values["align"] < 2
    assert found["projector.0.weight"].abs().max() > 0


def test_routes_are_of_the_step_and_end_where_they_shall() -> None:
    stage = stage_of(run_of("routing.share=0.5", "routing.until=10"))
    a, b, c = (drawn(stage, step) for step in (3, 3, 4))
    assert torch.equal(a.kept, b.kept)
    assert not torch.equal(a.kept, c.kept)
    assert a.kept.shape == (5, TOKENS // 2)
    assert drawn(stage, 10).kept is None
    calls: list[int] = []
    for block in stage.averaged.blocks:
        block.register_forward_hook(lambda m, args, out: calls.append(args[0].shape[1]))
    backward(stage, 3)
    backward(stage, 10)
    assert calls == [6, 3, 3, 6, 6, 6, 6, 6]


EVERY = {
    "plain": (),
    "lightningdit": (),
    "cosine": ("objective.path=cosine", "objective.times=lognormal"),
    "data": ("model.prediction=x", "objective.shift=0"),
    "qk_norm": ("model.qk_norm=true", "loop.accumulate=2"),
    "gft": ("model.conditions=[beta]", "objective.guidance_free=true"),
    "exit": ("model.exit_depth=2", "routing.share=0.5"),
    "meanflow": ("model.conditions=[r]", "objective.averages=meanflow"),
    "improved": ("model.conditions=[r]", "objective.averages=improved", "objective.guidance=2", "objective.mixing=0.2"),
    "self": ("align.target=self", "align.depth=1", "align.self_depth=3"),
    "checkpointing": ("loop.checkpointing=true", "loop.recompute=false"),
    "bf16": ("loop.precision=bf16",),
}


@pytest.mark.parametrize("name", EVERY)
def test_every_configuration_trains_all_its_parameters(name: str) -> None:
    kind = "lightningdit" if name == "lightningdit" else "sit"
    stage = stage_of(run_of(*EVERY[name], "model.label_dropout=0.3", kind=kind))
    values, found = backward(stage)
    assert all(value.isfinite() for value in values.values())
    wanted = {name for name, p in stage.model.named_parameters() if p.requires_grad}
    assert found.keys() == wanted
    assert all(g.isfinite().all() and g.abs().max() > 0 for g in found.values())


def test_no_step_asks_the_host_for_a_value() -> None:
    from torch.utils._python_dispatch import TorchDispatchMode

    class NoReading(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            assert "_local_scalar_dense" not in str(func), "a value was read on the host"
            return func(*args, **(kwargs or {}))

    stage = stage_of(run_of("model.exit_depth=2", "align.target=self", "align.depth=1", "align.self_depth=3"))
    backward(stage)
    with NoReading():
        stage._given(batch_of(), 1, 0)


# ---- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (("objective.guidance_free=true",), "needs a model that is told beta: model.conditions=\\[beta\\]"),
        (("model.conditions=[r]",), "model.conditions has r, which nothing trains"),
        (("objective.averages=meanflow",), "needs a model that is told r"),
        (("model.conditions=[r]", "objective.averages=meanflow", "routing.share=0.5"), "neither align.target"),
        (("model.prediction=x", "objective.path=cosine"), "objective.path=linear"),
        (("align.target=self", "align.depth=9"), "align.depth must be at most the model's 4 blocks"),
        (("align.target=self", "align.depth=2", "align.self_depth=2"), "align.self_depth must lie in align.depth"),
        (("align.target=self", "align.depth=1", "align.self_depth=3", "loop.parallel=fsdp"), "loop.parallel=ddp"),
        (("routing.share=1.0",), "routing.share must be below 1"),
        (("routing.share=0.5", "routing.first=3", "routing.last=2"), "routing.first must lie before"),
        (("objective.guidance=2",), "are of objective.averages"),
        (("data.flip=2",), "data.flip"),
        (("objective.mixing=1",), "objective.mixing must be below 1"),
        (("routing.shares=1",), "routing.share"),
    ],
)  # fmt: skip
def test_what_does_not_go_together_is_refused(overrides: tuple[str, ...], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        run_of(*overrides)


def test_flops_are_of_the_route_and_of_the_teacher() -> None:

    counts = []
    for overrides in ((), ("routing.share=0.5",)):
        stage = stage_of(run_of(*overrides))

        counts.append(module_flops(stage.model, lambda twin, s=stage: twin(_example(s, twin))[0]))
    assert 0.6 < counts[1] / counts[0] < 0.95
    assert isinstance(run_of(), SiTRun)
