# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""What is done for one variant and one seed, part by part; each leaves a record, and is not done again.

    tokenizer   trained, its latents cached; reconstructions and a linear probe measured       <v>-<seed>/tokenizer.json
    generator   trained on them; sampled and measured at each checkpoint                        generator.json
    density     Gaussian mixtures of the latents, once the number of components is known        density.json
    mixed       fine-tuned on two sizes, measured at both                                       mixed.json
    guidance    every kind of guidance, with two more generators that two of them need          guidance.json

A record begins with a key of everything that it depends on; another key's is made again. Parts are functions of
(Work, variant, seed), run in processes of their own with one thread.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from maetok_fast.analysis import CacheRows, GMMConfig, WhitenedRows, fit_pca, linear_probe, nll_curve
from maetok_fast.analysis.usage import token_usage
from maetok_fast.data.caches import LatentCache, open_cache
from maetok_fast.data.images import psnr, to_uint8
from maetok_fast.data.reader import to_range
from maetok_fast.data.sources import open_source
from maetok_fast.demos.claims.judge import Judge
from maetok_fast.demos.claims.variants import (
    LARGER,
    SIZE,
    Scale,
    Variant,
    decoder_run,
    first_weights,
    generator_run,
    mixed_run,
    tokenizer_run,
)
from maetok_fast.demos.classifier import read_all
from maetok_fast.demos.plan import product
from maetok_fast.demos.shared import HIGHEST_DB, trained
from maetok_fast.models import MAETok
from maetok_fast.pipeline import EncodingRun, Pipeline
from maetok_fast.pipeline.run import equal_labels, make_folder, save_png, write_json
from maetok_fast.training.build import TrainingRun
from maetok_fast.training.observe import read_log

__all__ = ["PARTS", "Work", "run_part"]

TOGETHER = 100  # images at a time
SHOWN = 10  # of each variant in pictures
# name -> which generator, settings of the sampler at a strength w
GUIDANCE: dict[str, tuple[str, Callable[[float], dict[str, Any]]]] = {
    "none": ("plain", lambda w: {}),
    "classifier-free": ("plain", lambda w: {"guidance": w}),
    "in an interval": ("plain", lambda w: {"guidance": w, "interval": (0.0, 0.7)}),
    "by an earlier checkpoint": ("plain", lambda w: {"guidance": w, "negative": True}),
    "by an early exit": ("exit", lambda w: {"internal": w}),
    "trained in (GFT)": ("free", lambda w: {"temperature": 1 / w}),
}
SCALES = (1.5, 2.0)


@dataclass(frozen=True)
class Work:
    """Everything that the parts of all variants share. components: of the densities' PCA; 0: not known yet."""

    out: Path
    data: str
    test: str
    classes: int
    scale: Scale
    components: int = 0

    def folder(self, variant: Variant, seed: int) -> Path:
        return self.out / f"{variant.name}-{seed}"

    def record(self, part: str, variant: Variant, seed: int) -> Path:
        return self.folder(variant, seed) / f"{part}.json"

    def key(self, part: str, variant: Variant, seed: int) -> str:
        """Of all that a part's record depends on but the version of the code."""
        said = [part, variant, seed, self.data, self.test, self.classes, self.scale, MEASURES]
        said.append(self.components if part == "density" else 0)
        return hashlib.sha256(repr(said).encode()).hexdigest()[:16]

    def read(self, part: str, variant: Variant, seed: int) -> dict[str, Any] | None:
        """A record that was made, with this key; None where there is none."""
        try:
            found: dict[str, Any] = json.loads(self.record(part, variant, seed).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return found if found.get("key") == self.key(part, variant, seed) else None

    @cached_property
    def judge(self) -> Judge:
        return Judge.load(self.out / "judge")

    def held_images(self, size: int = SIZE) -> tuple[Tensor, Tensor]:
        """The first `scale.held` test images (N, 3, size, size) uint8 and their labels."""
        source = open_source(self.test)
        return read_all(source, size, min(len(source), self.scale.held), workers=0)


MEASURES = 1  # raised where a record means something else than before


def run_part(work: Work, part: str, variant: Variant, seed: int) -> dict[str, Any]:
    """Makes a record unless it is there. Called in a process of its own."""
    torch.set_num_threads(1)
    found = work.read(part, variant, seed)
    if found is not None:
        return found
    make_folder(work.folder(variant, seed))
    began = time.perf_counter()
    numbers = PARTS[part](work, variant, seed)
    record = {"key": work.key(part, variant, seed), "seconds": round(time.perf_counter() - began, 1), **numbers}
    write_json(work.record(part, variant, seed), record)
    return record


# ---- tokenizers ----------------------------------------------------------------------------------------------------


def _first(work: Work, variant: Variant, seed: int) -> Path:
    path = work.folder(variant, seed) / "first"
    if not (path / "config.json").exists():
        first_weights(variant.model, seed).save_pretrained(path)
    return path


def _tokenizer(work: Work, variant: Variant, seed: int) -> dict[str, Any]:
    folder, scale = work.folder(variant, seed), work.scale
    start = _first(work, variant, seed)
    first = trained(tokenizer_run(variant, scale, seed, folder / "tokenizer", work.data, start))
    run = trained(decoder_run(variant, scale, seed, folder / "decoder", work.data, product(first, "tokenizer")))
    model = MAETok.from_pretrained(product(run, "tokenizer"))
    for name, source, limit in (("latents", work.data, scale.images), ("held", work.test, scale.held)):
        encoding = EncodingRun(
            folder / name, model, open_source(source), precision="fp32", flips=False, limit=limit, batch=64, workers=0
        )
        encoding.begin()
        todo, began = encoding.images_in(encoding.missing()), time.perf_counter()
        encoding.make(lambda n: None)
        encoding.finish({"images": todo, "seconds": time.perf_counter() - began})
    train_cache, held = (open_cache(folder / name) for name in ("latents", "held"))
    images, labels = work.held_images()
    before = _reconstructed(MAETok.from_pretrained(product(first, "tokenizer")), images)
    results = _reconstructed(model, images)
    _keep(folder / "reconstructions.png", results)
    pca = fit_pca(CacheRows(train_cache))
    (x, y), (held_x, held_y) = (_rows(c, n) for c, n in ((train_cache, scale.probed), (held, scale.held)))
    pooled = linear_probe(x.mean(1), y, held_x.mean(1), held_y, seed)
    flat = linear_probe(x, y, held_x, held_y, seed)
    usage = token_usage(held_x)
    return {
        "psnr_stage_1": _psnr(images, before),
        "rfd_stage_1": work.judge.distances(before),
        "psnr": _psnr(images, results),
        "rfd": work.judge.distances(results),
        "recognised": work.judge.recognised(results, labels),
        "probe_pooled": pooled.accuracy,
        "probe_flat": flat.accuracy,
        "components_90": pca.components,
        "effective_rank": usage.effective_rank,
        "effective_tokens": usage.effective_tokens,
        "tokens": variant.tokens,
        "parameters": sum(p.numel() for p in model.parameters()),
    }


def _rows(cache: LatentCache, count: int) -> tuple[Tensor, Tensor]:
    some = slice(0, min(count, len(cache)))
    items = cache.read(some)
    assert cache.labels is not None
    return items, torch.from_numpy(cache.labels[some])


@torch.no_grad()
def _reconstructed(model: MAETok, images: Tensor) -> Tensor:
    """(N, 3, S, S) uint8 of such."""
    model.eval()
    size = int(images.shape[2])
    parts = [_bytes(model.decode(model.encode(to_range(part, torch.float32)), size)) for part in images.split(TOGETHER)]
    return torch.cat(parts)


def _bytes(images: Tensor) -> Tensor:
    """(B, 3, S, S) in [-1, 1] -> uint8, as files have them."""
    return torch.from_numpy(to_uint8(images)).permute(0, 3, 1, 2)


def _psnr(images: Tensor, results: Tensor) -> float:
    """The mean over images, of 8-bit pixels."""
    pairs = zip(*(x.permute(0, 2, 3, 1).numpy() for x in (images, results)))
    return float(np.mean([min(psnr(a, b), HIGHEST_DB) for a, b in pairs]))


def _keep(path: Path, images: Tensor) -> None:
    """The first ones in a row, as a PNG."""
    save_png(np.concatenate(list(images[:SHOWN].permute(0, 2, 3, 1).numpy()), axis=1), path)


def _mixed(work: Work, variant: Variant, seed: int) -> dict[str, Any]:
    folder = work.folder(variant, seed)
    start = _made(work, variant, seed)
    before = MAETok.from_pretrained(start)
    run = trained(mixed_run(variant, work.scale, seed, folder / "mixed", work.data, start))
    after = MAETok.from_pretrained(product(run, "tokenizer"))
    found: dict[str, Any] = {}
    for size in (SIZE, LARGER):
        images, _ = work.held_images(size)
        for name, model in (("before", before), ("after", after)):
            results = _reconstructed(model, images)
            small = results if size == SIZE else torch.nn.functional.avg_pool2d(results.float(), 2).round().byte()
            found[f"{name}_{size}"] = {"psnr": _psnr(images, results), "rfd": work.judge.distances(small)}
    return found


def _made(work: Work, variant: Variant, seed: int) -> Path:
    """The finished tokenizer."""
    folder = work.folder(variant, seed)
    return product(decoder_run(variant, work.scale, seed, folder / "decoder", work.data, folder), "tokenizer")


# ---- generators ----------------------------------------------------------------------------------------------------


def _generator(work: Work, variant: Variant, seed: int) -> dict[str, Any]:
    scale, folder = work.scale, work.folder(variant, seed)
    run = _generator_trained(work, variant, seed, "plain")
    log = read_log(Path(run.out) / "log.jsonl")
    loss = [[line["step"], line["validation/velocity"]] for line in log if "validation/velocity" in line]
    trained = [[line["step"], line["velocity"]] for line in log if "velocity" in line]
    # what the decoder makes of real images' latents: beyond it a generator cannot be better
    own = work.judge.moments(_reconstructed(MAETok.from_pretrained(_made(work, variant, seed)), work.held_images()[0]))
    curve = []
    for point in range(1, scale.points + 1):
        step = point * scale.every
        last = point == scale.points
        images, labels = _sampled(work, variant, seed, step, scale.judged if last else scale.sampled)
        few = images[: scale.sampled]
        curve.append({"step": step, "fd": work.judge.distances(few), "own": work.judge.distances(few, own)})
    _keep(folder / "samples.png", images)
    return {
        "loss": loss,
        "training_loss": trained,
        "curve": curve,
        "gfd": work.judge.distances(images),
        "gfd_own": work.judge.distances(images, own),
        "recognised": work.judge.recognised(images, labels),
        "steps": run.loop.steps,
        "seconds_per_step": log[-1]["time"] / run.loop.steps if log else None,
    }


def _generator_trained(work: Work, variant: Variant, seed: int, how: str) -> TrainingRun:
    folder = work.folder(variant, seed)
    out = folder / ("generator" if how == "plain" else f"generator-{how}")
    caches = folder / "latents", folder / "held"
    return trained(generator_run(variant, work.scale, seed, out, *caches, work.classes, how))


def _sampled(
    work: Work, variant: Variant, seed: int, step: int, count: int, how: str = "plain", **settings: Any
) -> tuple[Tensor, Tensor]:
    """Samples (N, 3, S, S) uint8 of a generator at a step, as many of each class, and the labels asked for. The same
    noise for all variants, steps and settings of a seed. negative=True: guided by the first checkpoint."""
    folder = work.folder(variant, seed)
    runs = folder / ("generator" if how == "plain" else f"generator-{how}") / "checkpoints"
    negative = runs / f"{work.scale.every:07d}" / "generator" if settings.pop("negative", False) else None
    pipeline = Pipeline.from_pretrained(
        _made(work, variant, seed),
        runs / f"{step:07d}" / "generator",
        negative=negative,
        precision="fp32",
    )
    labels = equal_labels(count, work.classes)
    seeds = [seed * 1_000_000 + i for i in range(count)]
    found = pipeline.generate(labels, seeds, batch=TOGETHER, steps=work.scale.nfe, method="euler", **settings)
    return torch.from_numpy(found.images).permute(0, 3, 1, 2), torch.tensor(labels)


def _guidance(work: Work, variant: Variant, seed: int) -> dict[str, Any]:
    scale = work.scale
    for how in ("exit", "free"):
        _generator_trained(work, variant, seed, how)
    found = []
    for name, (how, settings) in GUIDANCE.items():
        for strength in (1.0,) if name == "none" else SCALES:
            images, labels = _sampled(
                work, variant, seed, scale.every * scale.points, scale.sampled, how, **settings(strength)
            )
            found.append(
                {
                    "name": name,
                    "strength": strength,
                    "gfd": work.judge.distances(images),
                    "recognised": work.judge.recognised(images, labels),
                }
            )
            if strength == scale.guidance:
                _keep(work.folder(variant, seed) / f"guided-{name.replace(' ', '-')}.png", images)
    return {"rows": found}


# ---- densities -----------------------------------------------------------------------------------------------------


def _density(work: Work, variant: Variant, seed: int) -> dict[str, Any]:
    """Held-out negative log likelihood a dimension of standardised components, as many of them for every variant."""
    folder, scale = work.folder(variant, seed), work.scale
    train_cache, held = (open_cache(folder / name) for name in ("latents", "held"))
    pca = fit_pca(CacheRows(train_cache)).with_components(work.components)
    rows, others = (WhitenedRows(CacheRows(c), pca).stored() for c in (train_cache, held))
    found: dict[str, Any] = {"components": work.components, "explained": float(pca.explained[work.components - 1])}
    for covariance in ("full", "diag"):
        settings = GMMConfig(1, covariance=covariance, iterations=scale.passes, regularisation=1e-3)
        points = nll_curve(rows, others, scale.modes, (seed,), settings)
        found[covariance] = [[p.modes, p.train_nll, p.held_out_nll] for p in points]
    return found


PARTS: dict[str, Callable[[Work, Variant, int], dict[str, Any]]] = {
    "tokenizer": _tokenizer,
    "generator": _generator,
    "density": _density,
    "mixed": _mixed,
    "guidance": _guidance,
}
