# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""How far the average's images lie from real ones, while a run trains; and when its log says that it got how near.

    validation images ── tokenizer ── rFD ─┐                              ┌─ extractor ─ Moments of all ranks ─┐
    labels, seeds ────── generator ── gFD ─┴─ images, 8 bits, each rank's ┘      reference: Moments ───────────┴─ FD

    first_below(log, "fd_inception", 10) -> (step, epochs, images)

The extractor and the reference are there before the first step, so that what is missing is told then. The reference of
images is kept in <out>/metrics, by what it was made of. Nothing here moves the training's random numbers. Fewer than
50,000 images make the distance larger: it is compared with itself, over steps, and with runs that measure as many.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from maetok_fast.config import ConfigError
from maetok_fast.evaluation import Extractor, ImageSet, Moments, create_extractor, frechet_distance, open_set
from maetok_fast.evaluation.evaluate import Comparison
from maetok_fast.training.configs import MetricsConfig
from maetok_fast.training.observe import read_log
from maetok_fast.training.parts import keyed
from maetok_fast.training.state import random_state, restore_random_state
from maetok_fast.training.world import World

__all__ = ["Crossing", "Online", "crossings", "first_below", "make_online"]

log = logging.getLogger("maetok_fast")

T = TypeVar("T")
ROWS = 1024  # features at a time: a product of so many rows is worth its D x D result


class Online:
    """What a stage measures with. count: images in all, a multiple of the ranks. images: a tokenizer's originals, of
    which `count` are taken; None: a generator's. name: in the log, behind "validation/"."""

    def __init__(
        self,
        extractor: Extractor,
        reference: Moments,
        count: int,
        *,
        batch: int,
        about: dict[str, Any],
        images: ImageSet | None = None,
    ) -> None:
        self.extractor, self.reference, self.count, self.batch, self.images = extractor, reference, count, batch, images
        self.name = f"fd_{extractor.slug}"
        self.about = {self.name: {"images": count, "extractor": extractor.about_in_short, **about}}

    def distance(self, batches: Iterable[Tensor], world: World) -> float:
        """The Frechet distance to the reference, of this rank's uint8 batches (B, 3, H, W) and all other ranks'. Called
        on all of them; the result is the same on each."""
        return frechet_distance(merged(_moments(self.extractor, batches), world), self.reference)

    def originals(self, world: World) -> Iterator[Tensor]:
        """This rank's share of the images: uint8 (B, 3, H, W), in as many batches as on any other rank."""
        assert self.images is not None
        each = self.count // world.size
        return iter(self.images.batches(world.rank * each, (world.rank + 1) * each, self.batch))

    def indices(self, world: World) -> Iterator[range]:
        """This rank's share of the samples, likewise."""
        mine = range(world.rank, self.count, world.size)
        return (mine[at : at + self.batch] for at in range(0, len(mine), self.batch))


def make_online(metrics: MetricsConfig, world: World, out: Path, size: int, validation: str, originals: bool) -> Online:
    """What `metrics` asks for; called on all ranks.

    out: the run's folder. size: of the average's images in pixels. validation: where the run's validation images are,
    "" where it has none. originals: whether the validation images are what is reconstructed. ConfigError names what is
    missing: images, the extractor's weights, statistics of another extractor."""
    if not validation and (originals or not metrics.reference):
        key = "data.validation" if originals else "metrics.reference"
        raise ConfigError(f"{key}: metrics.every={metrics.every} needs images to compare with, and there are none")
    opened = functools.partial(open_set, size=size, crop=metrics.crop)
    kept = random_state(world.device)
    try:
        with keyed("data.validation"):
            images = opened(validation, limit=metrics.images) if originals else None
        count = (metrics.images if images is None else len(images)) // world.size * world.size
        with keyed("metrics.reference" if metrics.reference else "data.validation"):
            if metrics.reference.lower().endswith(".npz"):
                compared = open_set(metrics.reference)
            elif metrics.reference:
                compared = opened(metrics.reference)
            else:
                compared = opened(validation, limit=max(1, count) if originals else metrics.images)
            for what, there in (("measured", count), ("compared with", len(compared))):
                needed = what == "measured" or compared.stored is None
                if needed and there < max(2, world.size):
                    raise ValueError(f"{there} image(s) to be {what} are too few")
        with keyed("metrics.extractor, metrics.weights"):
            extractor = _extractor(metrics, world)
        with keyed("metrics.reference" if metrics.reference else "data.validation"):
            reference = _reference(compared, extractor, world, out / "metrics", metrics.batch)
    finally:
        restore_random_state(kept, world.device)
    about = {"reference": metrics.reference or validation, "reference_images": reference.count, "crop": metrics.crop}
    if count < metrics.images and world.main:
        log.warning("metrics.images=%d: there are %d to be measured", metrics.images, count)
    return Online(extractor, reference, count, batch=metrics.batch, about=about, images=images)


def _extractor(metrics: MetricsConfig, world: World) -> Extractor:
    """Rank 0 first: it may have to download."""

    def create() -> Extractor:
        return create_extractor(metrics.extractor, metrics.weights, device=world.device)

    first = _agreed(lambda: create() if world.main else None, world)
    return _agreed(lambda: create() if first is None else first, world)


def _reference(images: ImageSet, extractor: Extractor, world: World, folder: Path, batch: int) -> Moments:
    """Stored ones, or of its images, which the ranks share; the latter are kept in the folder."""
    if images.stored is not None:
        return Comparison(images, None, [extractor], batch=batch).moments(images, extractor)
    path = folder / f"{extractor.slug}-{extractor.fingerprint}-{images.fingerprint[:16]}.npz"
    if world.gathered(path.is_file())[0]:  # what rank 0 finds, for all
        return Moments.load(path)
    first, last = (rank * len(images) // world.size for rank in (world.rank, world.rank + 1))
    found = merged(_agreed(lambda: _moments(extractor, images.batches(first, last, batch)), world), world)
    if world.main:
        found.save(path, about={"set": images.path, "treatment": images.treatment, **extractor.about})
    world.barrier()
    return found


def _agreed(work: Callable[[], T], world: World) -> T:
    """What work() gives; where it goes wrong on one rank, ValueError on all, so that none waits for another."""
    result, problem = None, None
    try:
        result = work()
    except (ValueError, ImportError) as error:
        problem = str(error)
    told = next((p for p in world.gathered(problem) if p), None)
    if told is not None:
        raise ValueError(told)
    return result  # type: ignore[return-value]


def _moments(extractor: Extractor, batches: Iterable[Tensor]) -> Moments:
    """Of the features of all batches, ROWS at a time."""

    def blocks() -> Iterator[Tensor]:
        rows: list[Tensor] = []
        for images in batches:
            rows.append(extractor(images))
            if sum(map(len, rows)) >= ROWS:
                yield torch.cat(rows)
                rows = []
        if rows:
            yield torch.cat(rows)

    return Moments.of_blocks(blocks())


def merged(own: Moments, world: World) -> Moments:
    """Of the rows of all ranks, on every rank: two sums over them, the second about the common mean."""
    if world.size == 1:
        return own
    assert own.count is not None
    mean = torch.from_numpy(own.mean).to(world.device)
    whole = world.sum(torch.cat([mean.new_tensor([own.count]), own.count * mean]))
    centre = whole[1:] / whole[0]
    apart = mean - centre
    scatter = (own.count - 1) * torch.from_numpy(own.covariance).to(world.device) + own.count * apart.outer(apart)
    covariance = world.sum(scatter) / (whole[0] - 1).clamp_min(1)
    return Moments(int(whole[0]), centre.cpu().numpy(), covariance.cpu().numpy())


# ---- what a log says -----------------------------------------------------------------------------------------------


class Crossing(NamedTuple):
    """step: interpolated linearly between the two measurements around it; the first measurement's own where that is
    below already. epochs, images: seen until then, None where the log does not say how many an epoch or a step has."""

    step: float
    epochs: float | None
    images: int | None


def first_below(source: str | Path | Sequence[dict[str, Any]], name: str, value: float) -> Crossing | None:
    """When a run's measurement was first at or below `value`, such as first_below("runs/sit", "fd_inception", 10); None
    where it never was.

    source: a run's folder, its log.jsonl, or the log's lines. name: with or without "validation/". ConfigError where
    the log has no such measurement."""
    lines = _lines(source)
    key = name if name.startswith("validation/") else f"validation/{name}"
    pairs = sorted((line["step"], line[key]) for line in lines if isinstance(line.get(key), (int, float)))
    if not pairs:
        known = sorted({k.removeprefix("validation/") for line in lines for k in line if k.startswith("validation/")})
        raise ConfigError(f"the log has no {name}; it has {', '.join(known) or 'no validations'} (metrics.every=...)")
    before: tuple[float, float] | None = None
    for step, found in pairs:
        if found <= value:
            at = float(step)
            if before is not None and np.isfinite(before[1]):
                at = before[0] + (step - before[0]) * (before[1] - value) / (before[1] - found)
            return _crossing(lines, at)
        before = (step, found)
    return None


def _lines(source: str | Path | Sequence[dict[str, Any]]) -> Sequence[dict[str, Any]]:
    if not isinstance(source, (str, Path)):
        return source
    path = Path(source)
    path = path / "log.jsonl" if path.is_dir() else path
    if not path.is_file():
        raise ConfigError(f"{path}: there is no log here; give a run's folder or its log.jsonl")
    return read_log(path)


def _crossing(lines: Sequence[dict[str, Any]], step: float) -> Crossing:
    sessions = [line["session"] for line in lines if isinstance(line.get("session"), dict)]
    known = {k: s[k] for s in sessions for k in ("images_per_step", "images_per_epoch") if s.get(k)}
    each, epoch = known.get("images_per_step"), known.get("images_per_epoch")
    images = None if each is None else round(step * each)
    return Crossing(step, None if images is None or epoch is None else images / epoch, images)


def crossings(lines: Sequence[dict[str, Any]], most: int = 6) -> list[tuple[str, float, Crossing]]:
    """(name, threshold, when) of the last `most` round thresholds (1, 2, 5, 10, ...) that each distance fell below."""
    found = []
    names = dict.fromkeys(k for line in lines for k in line if k.startswith("validation/fd_"))
    for name in names:
        values = [line[name] for line in lines if isinstance(line.get(name), (int, float)) and np.isfinite(line[name])]
        rounds = [m * 10.0**e for e in range(6, -5, -1) for m in (5, 2, 1)]
        crossed = [r for r in rounds if values and min(values) <= r < values[0]]
        for threshold in crossed[-most:]:
            when = first_below(lines, name, threshold)
            assert when is not None
            found.append((name, threshold, when))
    return found
