# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""maetok_fast.training.loop over a stage that anyone can compute again: two small networks, the second one late."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from training_runs import small_run, write_images

from maetok_fast.data.loader import Batch, Batches
from maetok_fast.data.sources import open_source
from maetok_fast.data.views import View
from maetok_fast.layers import EMA
from maetok_fast.training.checkpoints import TrainingError
from maetok_fast.training.configs import TokenizerRun
from maetok_fast.training.loop import Loop, Measured, Network
from maetok_fast.training.world import World, local_batch

pytestmark = pytest.mark.usefixtures("one_thread")


class Toy:
    """`Stage`: a network that copies small images through dropout, and one that judges the copies from step 3 on."""

    product = "tokenizer"

    def __init__(self, spoil: dict[int, float] | None = None, validates: bool = False) -> None:
        self.validates = validates
        torch.manual_seed(7)
        self.averaged = nn.Sequential(nn.Linear(48, 16), nn.Dropout(0.2), nn.Linear(16, 48))
        self.judge = nn.Sequential(nn.Linear(48, 8), nn.ReLU(), nn.Linear(8, 1))
        self.networks = [
            Network("copier", self.averaged, [self.averaged[0]]),
            Network("judge", self.judge, [], 3, 2.0, False),
        ]
        self.spoil, self.seen = spoil or {}, []

    def begin(self, world: World, ema: EMA) -> None:
        self.world = world

    def backward(self, batch: Batch, step: int, part: int, parts: int) -> dict[str, Tensor]:
        self.seen.append((step, batch.indices))
        x = batch.images.flatten(1).float() / 255
        y = self.networks[0].called(x)
        loss = F.mse_loss(y, x) * self.spoil.get(step, 1.0)
        (loss / parts).backward()
        values = {"loss": loss.detach()}
        if step >= 3:
            judged = (
                F.softplus(-self.networks[1].called(x)).mean() + F.softplus(self.networks[1].called(y.detach())).mean()
            )
            (judged / parts).backward()
            values["judge"] = judged.detach()
        return values

    def picture(self) -> dict[str, Tensor]:
        x = torch.linspace(-1, 1, 2 * 48).reshape(2, 3, 4, 4)
        return {"originals": x, "reconstructions": self.averaged(x.flatten(1)).view_as(x)}

    def validate(self) -> Measured | None:
        """Minus the squared error over 4 images."""
        if not self.validates:
            return None
        total = 0.0
        for i in range(2):
            x = torch.linspace(-1, 1, 2 * 48).reshape(2, 48) * (1 - i)
            total -= float((self.averaged(x) - x).square().sum())
        return Measured("psnr", total, 4)

    def save_average(self, folder: Path, average: dict[str, Tensor]) -> None:
        folder.mkdir()
        save_file(average, folder / "model.safetensors")

    def load_average(self, folder: Path) -> dict[str, Tensor]:
        return load_file(folder / "model.safetensors")


class Seen:
    """`Observer` that remembers."""

    def __init__(self) -> None:
        self.records: list[tuple[int, dict[str, float]]] = []
        self.pictures: list[int] = []
        self.steps = 0

    def step(self, n: int) -> None:
        self.steps += n

    def record(self, step: int, values: dict[str, float], **rest: Any) -> None:
        self.records.append((step, values))

    def picture(self, step: int, rows: dict[str, Tensor]) -> None:
        assert rows["originals"].shape == rows["reconstructions"].shape
        self.pictures.append(step)

    def close(self) -> None:
        pass


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("loop") / "images", 10, 6)


def loop_of(run: TokenizerRun, stage: Toy, seen: Seen | None = None) -> Loop:
    world = World("cpu", run.loop.parallel)
    source, view = open_source(run.data.path), View(4, "random", 0.8, 1.0, flip=0.5)
    batch = local_batch(run.loop.batch, world.size, run.loop.accumulate)

    def batches(start: int, unreadable: dict[str, str]) -> Batches:
        return Batches(
            source, view, batch, seed=run.loop.seed, step=start, workers=0, decoder="pil", unreadable=unreadable
        )

    return Loop(run, stage, world, batches, lambda step: seen or Seen(), "f")


def final(path: Path) -> dict[str, bytes]:
    """Everything in a checkpoint, byte for byte."""
    return {str(p.relative_to(path)): p.read_bytes() for p in sorted(path.rglob("*")) if p.is_file()}


def settings(run: TokenizerRun, **loop: Any) -> TokenizerRun:
    return replace(run, loop=replace(run.loop, **loop))


@pytest.mark.parametrize("stop", [2, 3, 8, 11])
def test_a_run_that_was_stopped_ends_like_one_that_was_not(tmp_path: Path, images: Path, stop: int) -> None:
    """Before, at and after the second network's start; bit for bit, dropout and crops included."""
    whole = small_run(tmp_path / "whole", images)
    expected = final(loop_of(whole, Toy()).fit())
    first = settings(small_run(tmp_path / "halves", images), steps=stop)
    first = replace(first, optimizer=replace(first.optimizer, schedule="constant"))
    whole = replace(whole, out=str(tmp_path / "constant"), optimizer=first.optimizer)
    expected = final(loop_of(whole, Toy()).fit())
    assert loop_of(first, Toy()).fit().name == f"{stop:07d}"
    torch.rand(5)  # whatever else the process draws
    found = final(loop_of(settings(first, steps=12), Toy()).fit())
    assert found.keys() == expected.keys()
    assert [name for name in found if found[name] != expected[name]] == []


def test_a_run_that_has_ended_is_left_alone(tmp_path: Path, images: Path) -> None:
    run = small_run(tmp_path, images)
    path = loop_of(run, Toy()).fit()
    before = final(path)
    stage = Toy()
    assert final(loop_of(run, stage).fit()) == before
    assert stage.seen == []


def test_accumulated_parts_see_the_images_of_the_whole_step(tmp_path: Path, images: Path) -> None:
    stages = {parts: Toy() for parts in (1, 2)}
    for parts, stage in stages.items():
        run = settings(small_run(tmp_path / str(parts), images), accumulate=parts, steps=4)
        for module in stage.averaged.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        loop_of(run, stage).fit()
    joined = [sum((i for s, i in stages[2].seen if s == step), ()) for step in range(4)]
    assert joined == [indices for _, indices in stages[1].seen]
    for a, b in zip(stages[1].averaged.parameters(), stages[2].averaged.parameters()):
        torch.testing.assert_close(a, b)


def test_a_bad_step_changes_nothing_and_its_samples_are_written_down(tmp_path: Path, images: Path) -> None:
    seen = Seen()
    stage = Toy(spoil={4: float("nan"), 5: float("inf")})
    loop = loop_of(small_run(tmp_path, images), stage, seen)
    loop.fit()
    rows = [json.loads(line) for line in (tmp_path / "nonfinite.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [4, 5]
    assert [tuple(row["samples"]) for row in rows] == [indices for step, indices in stage.seen if step in (4, 5)]
    assert all(p.isfinite().all() for p in stage.averaged.parameters())
    assert all(v.isfinite().all() for v in loop.ema.average.values())
    assert seen.records[-1][1]["skipped_steps"] == 2
    assert all(torch.tensor(v["loss"]).isfinite() for _, v in seen.records if v["loss"] == v["loss"])


def test_too_many_bad_steps_end_the_run(tmp_path: Path, images: Path) -> None:
    run = settings(small_run(tmp_path, images), max_bad_steps=3)
    with pytest.raises(TrainingError) as error:
        loop_of(run, Toy(spoil={i: float("nan") for i in range(5, 12)})).fit()
    assert "of 3 steps one after the other, up to step 7, were not finite" in str(error.value)
    assert "0000004" in str(error.value)


def test_the_average_follows_and_is_what_is_kept(tmp_path: Path, images: Path) -> None:
    """Against the formula, step by step."""
    stage = Toy()
    run = settings(small_run(tmp_path, images), steps=5)
    loop = loop_of(run, stage)
    average = {n: p.detach().double() for n, p in stage.averaged.named_parameters()}
    step = loop._one_step

    def followed(batches: Batches) -> dict[str, Tensor]:
        values = step(batches)
        for name, p in stage.averaged.named_parameters():
            average[name] = 0.9 * average[name] + 0.1 * p.detach().double()
        return values

    loop._one_step = followed  # type: ignore[method-assign]
    kept = load_file(loop.fit() / "tokenizer" / "model.safetensors")
    for name, value in average.items():
        torch.testing.assert_close(kept[name].double(), value, atol=1e-6, rtol=1e-5)


def test_validation_keeps_the_best_and_disturbs_nothing(tmp_path: Path, images: Path) -> None:
    plain, watched = small_run(tmp_path / "plain", images), small_run(tmp_path / "watched", images)
    seen = Seen()
    watched = settings(watched, validate_every=2, picture_every=3)
    a, b = loop_of(plain, Toy()).fit(), loop_of(watched, Toy(validates=True), seen).fit()
    assert final(a) == final(b)
    scores = {step: v["validation/psnr"] for step, v in seen.records if "validation/psnr" in v}
    assert list(scores) == [2, 4, 6, 8, 10, 12]
    best = json.loads((tmp_path / "watched" / "checkpoints" / "best.json").read_text())
    assert best == {"step": max(scores, key=lambda k: scores[k]), "psnr": max(scores.values())}
    assert seen.pictures == [3, 6, 9, 12]


def test_a_step_asks_the_host_for_nothing(tmp_path: Path, images: Path) -> None:
    from torch.utils._python_dispatch import TorchDispatchMode

    class NoReading(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            assert "_local_scalar_dense" not in str(func), "a value was read on the host"
            return func(*args, **(kwargs or {}))

    loop = loop_of(settings(small_run(tmp_path, images), log_every=100, checkpoint_every=0), Toy())
    batches = loop.make_batches(0, {})
    loop._one_step(batches)  # the first one starts the reader
    for loop.step in range(2, 5):
        with NoReading():
            loop._one_step(batches)
    batches.close()


def test_other_data_is_refused(tmp_path: Path, images: Path) -> None:
    run = small_run(tmp_path, images)
    loop_of(settings(run, steps=4), Toy()).fit()
    loop = loop_of(run, Toy())
    loop.fingerprint = "other"
    with pytest.raises(TrainingError, match=r"data\.path holds other images"):
        loop.fit()


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path, images: Path) -> None:
    run = small_run(tmp_path, images)
    loop_of(settings(run, steps=4), Toy()).fit()
    stage = Toy()
    stage.averaged[0] = nn.Linear(48, 16, bias=False)
    with pytest.raises(TrainingError, match="is of another configuration"):
        loop_of(run, stage).fit()


def test_sharded_parameters_train_like_whole_ones(tmp_path: Path, images: Path) -> None:
    """FSDP2 over one process; its checkpoint is whole, and either kind goes on from the other's."""
    whole = settings(small_run(tmp_path / "whole", images), steps=6)
    sharded = settings(small_run(tmp_path / "sharded", images), steps=6, parallel="fsdp")
    a = loop_of(whole, Toy()).fit()
    loop = loop_of(sharded, Toy())
    assert hasattr(next(loop.stage.averaged.parameters()), "device_mesh")
    b = loop.fit()
    loop.world.close()
    for name in ("networks.safetensors", "optimizer.safetensors", "tokenizer/model.safetensors"):
        one, other = load_file(a / name), load_file(b / name)
        assert one.keys() == other.keys()
        for key in one:
            torch.testing.assert_close(one[key], other[key])
    resumed = loop_of(settings(whole, steps=8, parallel="fsdp"), Toy())
    assert resumed.fit().name == "0000008"
    resumed.world.close()


def test_activations_computed_again_change_no_gradient(tmp_path: Path, images: Path) -> None:
    a = loop_of(small_run(tmp_path / "a", images), Toy()).fit()
    b = loop_of(settings(small_run(tmp_path / "b", images), checkpointing=True), Toy()).fit()
    assert final(a) == final(b)


def test_a_batch_that_cannot_be_shared_out_is_named() -> None:
    assert local_batch(512, 8, 2) == 32
    with pytest.raises(ValueError, match=r"loop\.batch=10 cannot be shared out evenly over 4 process.*such as 8"):
        local_batch(10, 4, 1)
