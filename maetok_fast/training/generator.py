# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""Stage 3: a SiT or LightningDiT on latents. One step, every part of it by configuration.

    cache ──── latents ──────────┐                      t, noise ─┐
    or images ─ tokenizer.encode ┴─ (z - mean) / deviation ── x_t ┴─ generator ─┬─ velocity ── mse, direction
                                                  [route: tokens skip blocks]   ├─ early exit ── mse
    images ── teacher, or the average itself ── features ── cosine ── projector ┴─ tokens behind block `align.depth`

Labels are dropped here (and not in the model), because guidance-free training and few-step targets have to know which
were. Everything with gradients happens inside `GeneratorTraining.forward`, which is what DistributedDataParallel and
FSDP wrap. Nothing waits for the device.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from maetok_fast.config import ConfigError
from maetok_fast.data.images import to_uint8
from maetok_fast.diffusion import (
    adaptive_loss,
    average_velocity_error,
    dimension_shift,
    get_path,
    guided_target,
    sample,
    sample_spans,
    sample_times,
    shift_times,
)
from maetok_fast.diffusion.objectives import align_loss, direction_loss, spatial_features, tempered, velocity_loss
from maetok_fast.layers import EMA
from maetok_fast.models.sit import DiffusionTransformer, Route
from maetok_fast.pipeline.noise import SampleNoise, seed_of
from maetok_fast.precision import Precision
from maetok_fast.training.configs import MaskConfig
from maetok_fast.training.generator_configs import GeneratorRun
from maetok_fast.training.latents import Latents
from maetok_fast.training.loop import Measured, Network
from maetok_fast.training.masks import Masks
from maetok_fast.training.observe import COLUMNS
from maetok_fast.training.world import World

if TYPE_CHECKING:
    from maetok_fast.training.online import Online

__all__ = ["GeneratorStage", "GeneratorTraining", "Given"]

_GOLDEN = 0.6180339887498949  # multiples of it, modulo 1, cover [0, 1) evenly however many there are


class Given(NamedTuple):
    """What a step gives the network: x_t and the velocity to learn, (B, ...); times t, labels y, and r and beta (B,)
    where the model is told them; features (B, T, D) to align with; kept and mask of a route."""

    x: Tensor
    velocity: Tensor
    t: Tensor
    y: Tensor
    r: Tensor | None = None
    beta: Tensor | None = None
    features: Tensor | None = None
    kept: Tensor | None = None
    mask: Tensor | None = None


class GeneratorTraining(nn.Module):
    """A generator with its projector: what is wrapped, sharded and called once a step."""

    def __init__(self, run: GeneratorRun, generator: DiffusionTransformer, projector: nn.Module | None = None) -> None:
        super().__init__()
        self.run, self.generator, self.projector = run, generator, projector
        self.null = generator.config.num_classes
        self.tokens = generator.pos_embed.shape[1]

    def blocks(self) -> list[nn.Module]:
        """The transformer blocks, each with all uses of its parameters inside its own forward."""
        return list(self.generator.blocks)

    def forward(self, given: Given) -> tuple[Tensor, dict[str, Tensor]]:
        """(the loss, its parts by name, without gradients)."""
        run, objective, align = self.run, self.run.objective, self.run.align
        if objective.averages != "none":
            loss = self._averages(given)
            return loss, {"velocity": loss.detach()}
        route = None
        if given.kept is not None and given.mask is not None:
            route = Route(*run.routing.blocks(run.model.depth), given.kept, given.mask)
        exits = run.model.exit_depth is not None
        taps = (align.depth,) if self.projector is not None else ()
        out = self.generator.forward_training(
            given.x, given.t, given.y, beta=given.beta, exits=exits, route=route, taps=taps
        )
        v = out.velocity
        if given.beta is not None:
            v = tempered(v, self._null_velocity(given), given.beta)
        parts = {"velocity": (1.0, velocity_loss(v, given.velocity))}
        if objective.direction:
            parts["direction"] = (objective.direction, direction_loss(v, given.velocity))
        if out.early is not None:
            parts["exit"] = (objective.exit, velocity_loss(out.early, given.velocity))
        if self.projector is not None:
            assert given.features is not None
            inside = route is not None and route.first < align.depth < route.last
            projected = self.projector(out.hidden[0])
            tokens = projected.shape[1] if align.projector == "conv" else self.tokens
            found = align_loss(projected, given.features, tokens, given.kept if inside else None)
            parts["align"] = (align.weight, found)
        loss = torch.stack([weight * value for weight, value in parts.values()]).sum()
        return loss, {name: value.detach() for name, (_, value) in parts.items()}

    @torch.no_grad()
    def _null_velocity(self, given: Given) -> Tensor:
        """The model's own velocity without a class, at temperature 1."""
        assert given.beta is not None
        y, beta = torch.full_like(given.y, self.null), torch.ones_like(given.beta)
        found: Tensor = self.generator(given.x, given.t, y, beta=beta)
        return found

    def _averages(self, given: Given) -> Tensor:
        """MeanFlow's loss; the model's own velocities (r = t) without gradients where the target or the jvp's direction
        needs them."""
        objective, generator = self.run.objective, self.generator
        assert given.r is not None
        target, own = given.velocity, None
        with torch.no_grad():
            if objective.averages == "improved" or objective.guidance != 1 or objective.mixing:
                own = generator(given.x, given.t, given.y).float()
            if objective.guidance != 1 or objective.mixing:
                assert own is not None
                null = generator(given.x, given.t, torch.full_like(given.y, self.null)).float()
                guided = guided_target(target, own, null, objective.guidance, objective.mixing)
                dropped = (given.y == self.null).view(-1, *(1,) * (target.ndim - 1))
                target = torch.where(dropped, target, guided)
        direction = own if objective.averages == "improved" else None
        error = average_velocity_error(
            generator, given.x, given.r, given.t, given.y, target.to(given.x.dtype), direction=direction
        )
        return adaptive_loss(error, objective.adaptive)


class GeneratorStage:
    """`Stage` of `maetok_fast.training.loop` for `SiTRun` and `LightningDiTRun`.

    latents: what makes z of a batch, and shows pictures. teacher: maetok_fast.training.teachers.Teacher, or None.
    online: what the distance of samples is measured with, or None. labelled: whether the data has labels.
    """

    product = "generator"

    def __init__(
        self,
        run: GeneratorRun,
        generator: DiffusionTransformer,
        precision: Precision,
        latents: Latents,
        projector: nn.Module | None = None,
        teacher: Any = None,
        online: Online | None = None,
        labelled: bool = True,
    ) -> None:
        self.online, self.labelled = online, labelled
        self.run, self.precision, self.latents, self.teacher = run, precision, latents, teacher
        self.averaged = generator
        for name, part in generator.named_parameters():
            if name.startswith("final_layer_xr.") and run.objective.exit == 0:
                part.requires_grad_(False)
        self.model = GeneratorTraining(run, generator, projector)
        self.networks = [Network("generator", self.model, self.model.blocks())]
        config = generator.config
        self.null = config.num_classes
        self.path = get_path(run.objective.path)
        self.shift = run.objective.shift or dimension_shift(math.prod(latents.shape))
        generator.y_embedder.dropout = 0.0  # they are dropped here

    def begin(self, world: World, ema: EMA) -> None:
        self.world = world
        self.latents.to(world.device)
        share = self.run.routing.share
        self.routes = Masks(MaskConfig(mode="drop", low=share, high=share), self.run.loop.seed, world.device)
        self.own_teacher = None
        if self.run.align.used and self.run.align.target == "self":
            self.own_teacher = _over(self.averaged, ema)
        if self.run.loop.compile:
            self.networks[0].called.compile()

    def backward(self, batch: Any, step: int, part: int, parts: int) -> dict[str, Tensor]:
        """See `Stage`."""
        given = self._given(batch, step, part)
        with self.precision.autocast(self.world.device.type):
            loss, values = self.networks[0].called(given)
        (loss / parts).backward()
        return values

    def _given(self, batch: Any, step: int, part: int) -> Given:
        """Times, noise and everything else that is drawn, in one order; all on the device."""
        run, objective, world = self.run, self.run.objective, self.world
        z = self.latents.of(batch)
        count, device = len(z), z.device
        y = self._labels(batch, count, device)
        r = beta = kept = mask = features = None
        if objective.averages != "none":
            r, t = sample_spans(count, apart=objective.apart, mean=objective.mean, std=objective.std, device=device)
        else:
            t = shift_times(sample_times(count, objective.times, path=self.path, device=device), self.shift)
        noise = torch.randn_like(z)
        if objective.guidance_free:
            # without a class there is nothing to guide: temperature 1
            beta = torch.rand(count, device=device).masked_fill(y == self.null, 1.0)
        if run.routing.share and not 0 < run.routing.until <= step:
            first = (part * world.size + world.rank) * count
            drawn = self.routes.draw(step, count, self.model.tokens, first)
            mask, kept = drawn.mask, drawn.kept
        if self.own_teacher is not None:
            features = self._own_features(z, noise, t, y)
        elif self.teacher is not None:
            features = self.teacher(self.latents.images(batch))
            if run.align.projector == "conv":
                features = spatial_features(features, run.align.spatial)
        velocity = self.path.velocity(z, noise, t)
        return Given(self.path.mix(z, noise, t), velocity, t, y, r, beta, features, kept, mask)

    def _labels(self, batch: Any, count: int, device: torch.device) -> Tensor:
        """With a share `label_dropout` of them the null class; all, where the data has no labels."""
        dropout = self.run.model.label_dropout
        if batch.labels is None:
            if dropout == 0:
                raise ConfigError("the data has no labels, and model.label_dropout=0 leaves the model no null class")
            return torch.full((count,), self.null, dtype=torch.int64, device=device)
        y = batch.labels.to(device)
        return y.masked_fill(torch.rand(count, device=device) < dropout, self.null) if dropout else y

    @torch.no_grad()
    def _own_features(self, z: Tensor, noise: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """The average's tokens at a time nearer to the data, with the same noise."""
        align = self.run.align
        earlier = (t - align.self_shift * torch.rand_like(t)).clamp_min(0)
        assert self.own_teacher is not None
        with self.precision.autocast(self.world.device.type):
            beta = torch.ones_like(t) if self.own_teacher.beta_embedder is not None else None
            out = self.own_teacher.forward_training(
                self.path.mix(z, noise, earlier), earlier, y, beta=beta, taps=(align.self_depth,)
            )
        return out.hidden[0]

    # ---- pictures, validation and files ----

    def picture(self) -> dict[str, Tensor]:
        """Samples of fixed noise and labels, in rows."""
        if not self.latents.shows:
            return {}
        preview, classes = self.run.preview, self.null
        labels = preview.labels or tuple(i * classes // COLUMNS % classes for i in range(COLUMNS))
        y = torch.tensor(labels, device=self.world.device)
        shape = self.latents.shape
        noise = torch.randn(len(y), *shape, generator=torch.Generator().manual_seed(0)).to(self.world.device)
        draws = torch.Generator(self.world.device).manual_seed(0)
        images = self._sampled(noise, y, draws, preview.steps, preview.guidance)
        whole = len(images) // COLUMNS * COLUMNS
        if not whole:
            return {"samples": images}
        return {f"row {k}": row for k, row in enumerate(images[:whole].split(COLUMNS))}

    def _sampled(self, noise: Tensor, y: Tensor, draws: Any, steps: int, guidance: float) -> Tensor:
        """Images (B, 3, H, W) of noise (B, ...) and labels. draws: randomness of the SDE, as `sample` takes it. steps:
        at most 4 where averages are learnt."""
        preview, objective = self.run.preview, self.run.objective
        how: dict[str, Any] = {"guidance": guidance}
        if objective.guidance_free:
            how = {"temperature": 1 / guidance}
        method = "meanflow" if objective.averages != "none" else preview.method
        with self.precision.autocast(self.world.device.type):
            found = sample(
                self.averaged, noise, y, steps=min(steps, 4) if method == "meanflow" else steps, method=method,
                path=self.path, shift=self.shift, generator=draws, **how,
            )  # fmt: skip
        return self.latents.decode(found.latents)

    def measure(self) -> dict[str, float]:
        """The distance of samples to the reference: sample i of label i modulo the classes, its noise from seed i."""
        online = self.online
        if online is None:
            return {}
        metrics, preview = self.run.metrics, self.run.preview
        steps = preview.steps if metrics.steps is None else metrics.steps
        guidance = preview.guidance if metrics.guidance is None else metrics.guidance

        def samples() -> Iterator[Tensor]:
            for places in online.indices(self.world):
                labels = [i % self.null if self.labelled else self.null for i in places]
                y = torch.tensor(labels, device=self.world.device)
                draws = SampleNoise([seed_of(0, i) for i in places])
                noise = draws.first(self.latents.shape, torch.float32, self.world.device)
                images = to_uint8(self._sampled(noise, y, draws, steps, guidance))
                yield torch.from_numpy(images).permute(0, 3, 1, 2)

        return {online.name: online.distance(samples(), self.world)}

    def validate(self) -> Measured | None:
        """The squared error of the average's velocity on held-out latents, at times and noise that stay the same."""
        total, count = 0.0, 0
        batches = self.latents.validation()
        if batches is None:
            return None
        for batch in batches:
            z = self.latents.of(batch)
            places = torch.tensor(batch.indices)
            t = ((places + 0.5) * _GOLDEN % 1).to(z)
            draws = [torch.randn(z.shape[1:], generator=torch.Generator().manual_seed(int(i))) for i in places]
            noise = torch.stack(draws).to(z)
            y = torch.full((len(z),), self.null) if batch.labels is None else batch.labels
            beta = {"beta": torch.ones_like(t)} if self.run.objective.guidance_free else {}
            with self.precision.autocast(self.world.device.type):
                v = self.averaged(self.path.mix(z, noise, t), t, y.to(z.device), **beta)
            error = (v.float() - self.path.velocity(z, noise, t)).square().flatten(1).mean(1)
            total, count = total + float(error.sum()), count + len(z)
        return Measured("velocity", total, count, falling=True)

    def save_average(self, folder: Path, average: dict[str, Tensor]) -> None:
        """The averaged generator as `load_generator(folder)` reads it, and the statistics of its latents."""
        with torch.device("meta"):
            copy = type(self.averaged)(self.averaged.config)
        copy.load_state_dict(average, assign=True)
        copy.save_pretrained(folder)
        self.latents.statistics.save(folder)

    def load_average(self, folder: Path) -> dict[str, Tensor]:
        return dict(type(self.averaged).from_pretrained(folder).state_dict())


def _over(generator: DiffusionTransformer, ema: EMA) -> DiffusionTransformer:
    """A generator whose parameters are the average's own tensors: it follows them, and takes no memory."""
    with torch.device("meta"):
        twin = type(generator)(generator.config)
    twin.load_state_dict({**generator.state_dict(), **ema.average}, assign=True)
    return twin.eval().requires_grad_(False)
