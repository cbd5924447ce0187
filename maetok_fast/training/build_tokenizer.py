# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""A tokenizer's run made into what the loop needs: models with their weights, the stage, batches of images.

run ── tokenizer, teachers, LPIPS, discriminator ── TokenizerStage        data.path ── Source ── Batches
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from maetok_fast.config import ConfigError
from maetok_fast.data.sources import Source, open_source
from maetok_fast.models import MAETok
from maetok_fast.precision import to_fp8
from maetok_fast.training.configs import TokenizerRun
from maetok_fast.training.parts import Parts, keyed, load_start, newest_of, training_precision
from maetok_fast.training.tokenizer import Examples, TokenizerStage
from maetok_fast.training.world import World, local_batch

if TYPE_CHECKING:
    from maetok_fast.training.online import Online

__all__ = ["make_stage", "make_tokenizer", "tokenizer_parts"]

log = logging.getLogger("maetok_fast")


def tokenizer_parts(run: TokenizerRun, world: World, out: Path, ready: Callable[[], None]) -> Parts:
    """Everything of the run; ready() is called once the data is known, before networks are made. ConfigError, DataError
    and CheckpointError as `train`'s."""
    from maetok_fast.data.loader import Batches
    from maetok_fast.data.views import View

    if not run.data.path:
        raise ConfigError("data.path: say where the images are: a folder, a list of files (.txt) or webdataset tars")
    batch = local_batch(run.loop.batch, world.size, run.loop.accumulate)
    source, size = open_source(run.data.path), _size(run)
    view = View(size, run.data.crop, run.data.low, run.data.high, flip=run.data.flip)

    def batches(start: int, unreadable: dict[str, str]) -> Batches:
        return Batches(
            source, view, batch, seed=run.loop.seed, rank=world.rank, world=world.size, step=start,
            sizes=run.data.sizes, workers=run.data.workers, decoder=run.data.decoder, device=world.device,
            max_unreadable=run.data.max_unreadable, log=out / "unreadable.jsonl",
            unreadable=unreadable, captions="caption" in run.auxiliary.targets,
        )  # fmt: skip

    ready()
    online = None
    if run.metrics.every:
        from maetok_fast.training.online import make_online

        online = make_online(run.metrics, world, out, size, run.data.validation, originals=True)
    stage = make_stage(run, world.device, _examples(run, source, size, world), online)

    def flops() -> float:
        from maetok_fast.training.flops import model_flops

        dropped = (run.mask.low + run.mask.high) / 2 if run.mask.mode == "drop" else 0.0
        return model_flops(stage.model, size, dropped=dropped, teachers=run.auxiliary.targets)

    return Parts(stage, batches, source.fingerprint(), flops, len(source))


def make_tokenizer(run: TokenizerRun) -> MAETok:
    """The model of `run.model`, with `run.start`'s weights where it is given. ConfigError where they do not fit."""
    torch.manual_seed(run.loop.seed)
    model = MAETok(run.model)
    if not run.start:
        return model
    source = newest_of(run.start, "tokenizer")
    other = MAETok.from_pretrained(source)
    load_start(model, _resized(model, other.state_dict()), run.start)
    return model


def _resized(model: MAETok, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Learned positions resampled where the resolution differs, as the model itself does for another grid."""
    from maetok_fast.positions import resample_grid

    own = model.state_dict()
    state = dict(state)
    for half in ("encoder", "decoder"):
        name = f"{half}.model.pos_embed"
        if name in state and name in own and state[name].shape != own[name].shape:
            old, new = state[name], getattr(model, half).model.grid
            side = int((old.shape[1] - 1) ** 0.5)
            patches = resample_grid(old[:, 1:], (side, side), new)
            state[name] = torch.cat([old[:, :1], patches], dim=1)
        for key in ("freqs_t_x", "freqs_t_y"):
            if f"{half}.{key}" in own:
                state[f"{half}.{key}"] = own[f"{half}.{key}"]
    return state


def make_stage(
    run: TokenizerRun, device: torch.device, examples: Examples | None = None, online: Online | None = None
) -> TokenizerStage:
    """The stage with every network that it needs, and none that it does not. Errors name a weight that is missing and
    how to get it."""
    precision = training_precision(run.loop, device)
    tokenizer = make_tokenizer(run)
    if precision.name == "fp8":
        log.info("%s", to_fp8(tokenizer))
    torch.manual_seed(run.loop.seed + 1)
    return TokenizerStage(
        run, tokenizer, precision, _targets(run, device), _perceptual(run), _discriminator(run), examples, online
    )


def _size(run: TokenizerRun) -> int:
    """Pixels of a training image. ConfigError where a patch does not divide one of the resolutions."""
    size = run.data.size or max(run.model.size)
    for side in run.data.sizes or (size,):
        for patch in (run.model.patch, run.model.out_patch):
            if side < 1 or side % patch:
                raise ConfigError(f"data.size, data.sizes: {side} px is no multiple of the model's patch of {patch} px")
    return size


def _targets(run: TokenizerRun, device: torch.device) -> Any:
    from maetok_fast.training.targets import Targets

    if not run.auxiliary.targets:
        return None
    with keyed("teachers.weights.<target>"):
        return Targets.create(
            run.auxiliary.targets,
            weights=run.teachers.weights,
            image_size=max(run.model.size),
            precision=run.teachers.precision,
            statistics=run.teachers.statistics,
            device=device,
            patch=run.model.patch,
        )


def _perceptual(run: TokenizerRun) -> nn.Module | None:
    if run.loss.perceptual == 0:
        return None
    from maetok_fast.models.perceptual import LPIPS

    with keyed("loss.vgg and loss.heads"):
        return LPIPS(run.loss.vgg, run.loss.heads)


def _discriminator(run: TokenizerRun) -> nn.Module | None:
    if run.adversarial.weight == 0 or run.adversarial.start >= run.loop.steps:
        return None
    from maetok_fast.models.discriminators import create_discriminator

    kind = run.adversarial.discriminator
    options: dict[str, Any] = {}
    if kind == "dino":
        options["weights"] = run.adversarial.weights
    if kind == "stylegan":
        options["size"] = _size(run)
    with keyed("adversarial.weights"):
        return create_discriminator(kind, **options)


def _examples(run: TokenizerRun, source: Source, size: int, world: World) -> Callable[[], Iterator[Tensor]]:
    """The validation images, or the first of the training's; as many batches on every rank, since sharded models are
    called by all of them. Files that cannot be read are passed over, and told once."""
    from maetok_fast.data.loader import validation_batches
    from maetok_fast.training.observe import COLUMNS

    shown = open_source(run.data.validation) if run.data.validation else source
    count = min(len(shown), run.data.validation_images if run.data.validation else COLUMNS * world.size)
    if count < world.size:
        raise ConfigError(f"data.validation={run.data.validation}: {count} image(s) for {world.size} processes")
    told: set[str] = set()

    def passed_over(name: str, reason: str) -> None:
        if name not in told:
            told.add(name)
            log.warning("validation image %s is passed over: %s", name, reason)

    def examples() -> Iterator[Tensor]:
        found = validation_batches(
            shown, size, "center", COLUMNS, count // world.size * world.size, rank=world.rank, world=world.size,
            passed_over=passed_over,
        )  # fmt: skip
        return (batch.images for batch in found)

    return examples
