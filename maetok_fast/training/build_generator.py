# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""A generator's run made into what the loop needs.

data.cache ── open_cache ── LatentBatches ─┐
data.path ─── Source ────── Batches ───────┴─ (both: PairedBatches) ── Latents: statistics, prepared tokenizer ── stage
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from maetok_fast.config import ConfigError
from maetok_fast.data.caches import LatentCache, open_cache
from maetok_fast.data.latents import LatentBatches, validation_latents
from maetok_fast.data.loader import Batches, validation_batches
from maetok_fast.data.sources import Source, open_source
from maetok_fast.data.views import View
from maetok_fast.models import LightningDiT, MAETok, SiT, load_generator
from maetok_fast.models.alignment import ConvProjector, MLPProjector
from maetok_fast.models.configs import LightningDiTConfig
from maetok_fast.models.sit import DiffusionTransformer
from maetok_fast.pipeline.pipeline import latent_shape, weights_fingerprint
from maetok_fast.pipeline.statistics import LatentStatistics
from maetok_fast.precision import to_fp8
from maetok_fast.training.generator import GeneratorStage, Given
from maetok_fast.training.generator_configs import GeneratorRun
from maetok_fast.training.latents import Latents, PairedBatches
from maetok_fast.training.parts import Parts, keyed, load_start, newest_of, training_precision
from maetok_fast.training.world import World, local_batch

if TYPE_CHECKING:
    from maetok_fast.training.online import Online

__all__ = ["generator_parts", "make_generator", "make_generator_stage"]

log = logging.getLogger("maetok_fast")

TEACHER_PATCH = 16
VALIDATION = 64  # latents at a time


def generator_parts(run: GeneratorRun, world: World, out: Path, ready: Callable[[], None]) -> Parts:
    """Everything of the run; ready() is called once the data is known, before networks are made. ConfigError,
    CacheError, DataError and CheckpointError as `train`'s."""
    data, batch = run.data, local_batch(run.loop.batch, world.size, run.loop.accumulate)
    if not data.cache and not data.path:
        raise ConfigError(
            "data.cache: say where the latents are, a folder that `maetok-fast cache-latents` made, or where images to "
            "be encoded on the way are (data.path=photos tokenizer=runs/mine)"
        )
    teaches = run.align.used and run.align.target != "self"
    if teaches and not data.path:
        raise ConfigError(
            f"align.target={run.align.target} sees images, which a cache does not hold: give data.path too, the images "
            "that the cache was made of (or align.target=self)"
        )
    cache = None if not data.cache else _cache(run, data.cache)
    source = open_source(data.path) if data.path and (teaches or cache is None) else None
    if cache is not None and source is not None:
        _check_pairs(cache, source)
    ready()
    tokenizer = _tokenizer(run)
    if tokenizer is None and cache is None:
        raise ConfigError("tokenizer: images are encoded on the way: say by which, tokenizer=runs/mine_decoder")
    _check_made_by(cache, tokenizer, run)
    size = _size(run, cache, tokenizer)
    online = _online(run, cache, tokenizer, world, out)
    latents = _latents(run, cache, tokenizer, world, size)
    labelled = source is not None and source.labelled if cache is None else cache.labels is not None
    stage = make_generator_stage(run, world.device, latents, size, online, labelled)

    def batches(start: int, unreadable: dict[str, str]) -> Any:
        of_cache = of_images = None
        if cache is not None:
            of_cache = LatentBatches(
                cache, batch, seed=run.loop.seed, rank=world.rank, world=world.size, step=start, flip=data.flip,
                workers=data.workers if source is None else 0, device=world.device,
            )  # fmt: skip
        if source is not None:
            crop = data.crop if cache is None or cache.fingerprint is None else cache.fingerprint["crop"]
            view = View(size, crop, data.low, data.high, flip=data.flip if cache is None or cache.flips else 0.0)
            of_images = Batches(
                source, view, batch, seed=run.loop.seed, rank=world.rank, world=world.size, step=start,
                workers=data.workers, decoder=data.decoder, device=world.device, captions=False,
                max_unreadable=data.max_unreadable, log=out / "unreadable.jsonl", unreadable=unreadable,
            )  # fmt: skip
        if of_cache is not None and of_images is not None:
            return PairedBatches(of_cache, of_images)
        return of_images if of_cache is None else of_cache

    fingerprint = _fingerprint(cache) if cache is not None else "" if source is None else source.fingerprint()
    images = len(cache) if cache is not None else 0 if source is None else len(source)
    return Parts(stage, batches, fingerprint, lambda: _flops(stage, size), images)


# ---- data ----------------------------------------------------------------------------------------------------------


def _cache(run: GeneratorRun, path: str) -> LatentCache:
    """ConfigError where its latents are not the model's, or its labels are more than the model's."""
    data, config = run.data, run.model
    cache = open_cache(
        path,
        None if data.format == "auto" else data.format,
        moments=None if data.moments == "auto" else data.moments,
        images=data.rows or None,
    )
    shape = run.model.shape
    if cache.shape != shape:
        keys = (
            f"model.tokens={cache.shape[0]} model.channels={cache.shape[1]}"
            if len(cache.shape) == 2
            else f"model.tokens=[{cache.shape[1]},{cache.shape[2]}] model.channels={cache.shape[0]}"
        )
        raise ConfigError(f"{path} holds latents of {cache.shape}, and the model takes {shape}: {keys}")
    if cache.labels is not None and (most := int(cache.labels.max())) >= config.num_classes:
        raise ConfigError(f"{path} has labels up to {most}: model.num_classes={most + 1} (or more)")
    return cache


def _check_pairs(cache: LatentCache, source: Source) -> None:
    """Item i of the cache is image i of the source."""
    where = f"{cache.path} and {source.path}"
    if cache.fingerprint is not None and cache.fingerprint["data"] != source.fingerprint():
        raise ConfigError(f"{where}: the cache was made of other images (data.path)")
    places = cache.places
    if places is not None and (len(places) != len(source) or (places != range(len(source))).any()):
        raise ConfigError(
            f"{where}: some of the images are not in the cache, since they could not be read; leave them out"
        )
    if len(cache) != len(source):
        raise ConfigError(f"{where}: {len(cache)} latents and {len(source)} images are no pairs")


def _check_made_by(cache: LatentCache | None, tokenizer: MAETok | None, run: GeneratorRun) -> None:
    if cache is None or tokenizer is None or cache.fingerprint is None:
        return
    if cache.fingerprint["tokenizer"] != weights_fingerprint(tokenizer):
        raise ConfigError(
            f"{cache.path} was made by another tokenizer than tokenizer={run.tokenizer}: give the one that made it, or "
            "make the cache again with `maetok-fast cache-latents`"
        )


def _tokenizer(run: GeneratorRun) -> MAETok | None:
    if not run.tokenizer:
        return None
    tokenizer = MAETok.from_pretrained(newest_of(run.tokenizer, "tokenizer"))
    shape = run.model.shape
    if (made := latent_shape(tokenizer.config)) != shape:
        raise ConfigError(
            f"tokenizer={run.tokenizer} makes latents of {made}, and the model takes {shape}: model.tokens={made[0]} "
            f"model.channels={made[1]}"
        )
    return tokenizer


def _size(run: GeneratorRun, cache: LatentCache | None, tokenizer: MAETok | None) -> int:
    """Pixels of an image that is encoded, or that a teacher sees; 256 where nothing says."""
    if run.data.size is not None:
        return run.data.size
    if cache is not None and cache.fingerprint is not None:
        return int(cache.fingerprint["resolution"])
    return 256 if tokenizer is None else max(tokenizer.config.size)


def _latents(
    run: GeneratorRun, cache: LatentCache | None, tokenizer: MAETok | None, world: World, size: int
) -> Latents:
    from maetok_fast.inference import prepare

    statistics = _statistics(run, cache, tokenizer)
    prepared = None
    if tokenizer is not None:
        prepared = prepare(tokenizer.to(world.device))
    return Latents(run.model.shape, statistics, prepared, _validation(run, cache, world, size))


def _statistics(run: GeneratorRun, cache: LatentCache | None, tokenizer: MAETok | None) -> LatentStatistics:
    said = run.data.statistics
    if said == "none":
        return LatentStatistics.identity()
    if said:
        try:
            scale = float(said)
        except ValueError:
            return LatentStatistics.load(said)
        if not scale > 0:
            raise ConfigError(f"data.statistics: a scale must be above 0, got {said}")
        return LatentStatistics(torch.tensor(0.0), torch.tensor(1 / scale), f"data.statistics={said}")
    if cache is not None and cache.statistics_file is not None:
        return LatentStatistics.load(cache.statistics_file)
    if cache is not None and cache.kind == "scaled":
        return LatentStatistics.identity()
    found = None if tokenizer is None else LatentStatistics.of_config(tokenizer.config)
    if found is None:
        raise ConfigError(
            "data.statistics: nothing says the latents' mean and deviation: give a file of them (cache-latents writes "
            "latents_stats.pt), a factor (0.18215 for REPA's), or none"
        )
    return found


def _validation(
    run: GeneratorRun, cache: LatentCache | None, world: World, size: int
) -> Callable[[], Iterable[Any]] | None:
    """As many batches on every rank, since sharded models are called by all of them."""
    data = run.data
    if not data.validation:
        return None
    if cache is not None:
        held = _cache(run, data.validation)
        count = min(len(held), data.validation_images) // world.size * world.size
        return lambda: validation_latents(
            held, count, VALIDATION, rank=world.rank, world=world.size, device=world.device
        )
    shown = open_source(data.validation)
    count = min(len(shown), data.validation_images) // world.size * world.size
    return lambda: validation_batches(
        shown, size, "center", VALIDATION, count, rank=world.rank, world=world.size, device=world.device
    )


def _online(
    run: GeneratorRun, cache: LatentCache | None, tokenizer: MAETok | None, world: World, out: Path
) -> Online | None:
    """What the distance of samples is measured with; None where the run does not ask for it."""
    if not run.metrics.every:
        return None
    if tokenizer is None:
        raise ConfigError(f"tokenizer: metrics.every={run.metrics.every} measures images, which it decodes: give it")
    from maetok_fast.training.online import make_online

    images = "" if cache is not None else run.data.validation  # a cache's validation is a cache
    return make_online(run.metrics, world, out, max(tokenizer.config.size), images, originals=False)


def _fingerprint(cache: LatentCache) -> str:
    """Of what a run that goes on must find again: names, labels, shape and where the latents came from."""
    digest = hashlib.sha256(f"{len(cache)} {cache.shape} {cache.kind} {cache.fingerprint}".encode())
    if cache.labels is not None:
        digest.update(cache.labels.astype("<i8").tobytes())
    return digest.hexdigest()


# ---- networks ------------------------------------------------------------------------------------------------------


def make_generator(run: GeneratorRun) -> DiffusionTransformer:
    """The model of `run.model`, with `run.start`'s weights where it is given. ConfigError where they do not fit."""
    torch.manual_seed(run.loop.seed)
    kind = LightningDiT if isinstance(run.model, LightningDiTConfig) else SiT
    model: DiffusionTransformer = kind(run.model)  # type: ignore[arg-type]
    if run.start:
        load_start(model, load_generator(newest_of(run.start, "generator")).state_dict(), run.start)
    return model


def make_generator_stage(
    run: GeneratorRun,
    device: torch.device,
    latents: Latents,
    size: int = 256,
    online: Online | None = None,
    labelled: bool = True,
) -> GeneratorStage:
    """The stage with every network that it needs. size: of the images that a teacher sees, in pixels. online, labelled:
    `GeneratorStage`'s."""
    precision = training_precision(run.loop, device)
    generator = make_generator(run)
    if precision.name == "fp8":
        log.info("%s", to_fp8(generator))
    torch.manual_seed(run.loop.seed + 1)
    teacher = _teacher(run, device, size)
    projector = _projector(run, None if teacher is None else teacher.features, size)
    return GeneratorStage(run, generator, precision, latents, projector, teacher, online, labelled)


def _teacher(run: GeneratorRun, device: torch.device, size: int) -> Any:
    if not run.align.used or run.align.target == "self":
        return None
    from maetok_fast.training.teachers import Teacher

    name = run.align.target
    with keyed(f"teachers.weights.{name}"):
        return Teacher.create(
            name, weights=run.teachers.weights.get(name, "hub"), image_size=size, patch=TEACHER_PATCH,
            precision=run.teachers.precision, statistics=run.teachers.statistics, device=device,
            layers=run.align.layers,
        )  # fmt: skip


def _projector(run: GeneratorRun, features: int | None, size: int) -> nn.Module | None:
    align, dim = run.align, run.model.dim
    if not align.used:
        return None
    wide = dim if features is None else features
    if align.projector == "mlp":
        return MLPProjector(dim, wide, align.hidden)
    if features is None:
        tokens = run.model.tokens
        if isinstance(tokens, int):
            raise ConfigError("align.projector=conv with align.target=self needs a grid, which 1-D latents lack: mlp")
        return ConvProjector(dim, wide, (tokens[0] // run.model.patch, tokens[1] // run.model.patch))
    return ConvProjector(dim, wide, (size // TEACHER_PATCH, size // TEACHER_PATCH))


def _flops(stage: GeneratorStage, size: int) -> float:
    """Of a step for one image: forward and backward of the generator at the run's routing, the teacher's forward."""
    from maetok_fast.training.flops import module_flops, teacher_flops

    run = stage.run
    if run.objective.averages != "none":
        return 0.0  # a jvp's products are not seen by torch's counter
    count = module_flops(stage.model, lambda twin: twin(_example(stage, twin))[0])
    return count + (0 if stage.teacher is None else teacher_flops(run.align.target, size, TEACHER_PATCH))


def _example(stage: GeneratorStage, twin: Any) -> Given:
    """One image's step on meta tensors."""
    run, dtype = stage.run, next(twin.parameters()).dtype

    def empty(*shape: int, kind: torch.dtype = dtype) -> Tensor:
        return torch.empty(*shape, device="meta", dtype=kind)

    x = empty(1, *stage.latents.shape)
    features = kept = mask = None
    if stage.model.projector is not None:
        tokens, wide = stage.model.tokens, run.model.dim
        if stage.teacher is not None:
            wide = stage.teacher.features
        if isinstance(stage.model.projector, ConvProjector):
            tokens = stage.model.projector.grid[0] * stage.model.projector.grid[1]
        features = empty(1, tokens, wide)
    if run.routing.share:
        count = stage.model.tokens
        kept = empty(1, count - round(count * run.routing.share), kind=torch.int64)
        mask = empty(1, count, kind=torch.bool)
    beta = empty(1) if run.objective.guidance_free else None
    return Given(x, x, empty(1), empty(1, kind=torch.int64), None, beta, features, kept, mask)
