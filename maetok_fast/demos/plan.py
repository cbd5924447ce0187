# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""What a demo does, as numbers: three runs of training, and what comes between and after them.

out/tokenizer ── out/decoder ── out/latents ── out/generator ── out/samples     each part's folder
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from maetok_fast import config
from maetok_fast.training.build import TrainingRun
from maetok_fast.training.configs import DecoderRun, TokenizerRun
from maetok_fast.training.generator_configs import SiTRun
from maetok_fast.training.runs import RUNS, laptop_decoder, laptop_generator, laptop_tokenizer

__all__ = ["Plan", "make_plan"]


@dataclass(frozen=True)
class Plan:
    """tokenizer, decoder, generator: the laptop's runs, in the folders of `out`.

    images, tested: the first so many of the training and of the test images; training of the tokenizer sees all.
    samples: of each class. steps, guidance: of the sampler (Euler). epochs: of the classifier. batch: images at a time
    where they are encoded, decoded or sampled, which on a CPU changes nothing. workers: processes that read images."""

    tokenizer: TokenizerRun
    decoder: DecoderRun
    generator: SiTRun
    data: str
    images: int
    tested: int
    classes: int
    seed: int
    samples: int = 200
    steps: int = 50
    guidance: float = 2.0
    epochs: int = 2
    batch: int = 64
    workers: int = 2

    @property
    def sampled(self) -> dict[str, Any]:
        """Settings of the sampler, as `maetok-fast sample` has them."""
        return {
            "steps": self.steps, "method": "euler", "guidance": self.guidance, "interval": (0.0, 1.0),
            "guidance_channels": None, "path": "linear", "shift": 1.0,
        }  # fmt: skip

    def commands(self, out: Path, precision: str = "auto") -> list[str]:
        """What does the same by hand, part by part; in the folders of a demo they find everything there already.
        precision: what samples were made in ("auto" is measured, and may be another one the next time)."""

        def said(*words: object) -> str:
            return shlex.join(["maetok-fast", *map(str, words)])

        decoder = product(self.decoder, "tokenizer")
        cache = ["--tokenizer", decoder, "--data", self.data, "--out", out / "latents", "--no-flips"]
        cache += ["--limit", self.images, "--batch", self.batch]
        sample = ["--generator", product(self.generator, "generator"), "--tokenizer", decoder, "--out", out / "samples"]
        sample += ["--num-fid-samples", self.samples * self.classes, "--mode", "ode", "--steps", self.steps]
        sample += ["--cfg-scale", self.guidance, "--global-seed", self.seed, "--batch", self.batch]
        sample += ["--precision", precision]
        return [
            said("train", "tokenizer", "--config", "laptop_tokenizer", *differing("laptop_tokenizer", self.tokenizer)),
            said("train", "decoder", "--config", "laptop_decoder", *differing("laptop_decoder", self.decoder)),
            said("cache-latents", *cache),
            said("train", "generator", "--config", "laptop_generator", *differing("laptop_generator", self.generator)),
            said("sample", *sample),
        ]


def product(run: TrainingRun, name: str) -> Path:
    """What a finished run has made: the average in its last checkpoint. The last and not the best one, since the best
    is picked by images that the demo measures on."""
    return Path(run.out) / "checkpoints" / f"{run.loop.steps:07d}" / name


def differing(name: str, run: TrainingRun) -> list[str]:
    """The run of this name made into `run`, as key=value."""
    found = config.differences(RUNS[name](), run)
    flow: dict[str, Any] = {"default_flow_style": True, "width": 10_000}
    return [f"{key}={yaml.safe_dump(_listed(new), **flow).splitlines()[0]}" for key, (_, new) in found.items()]


def _listed(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def make_plan(
    out: Path, data: str, test: str, *, images: int, tested: int, classes: int, seed: int, device: str, quick: bool
) -> Plan:
    """The demo of `images` training and `tested` test images of so many classes. quick: a handful of steps each, whose
    pictures show nothing."""
    first, second, third = laptop_tokenizer(), laptop_decoder(), laptop_generator()
    shown = replace(first.data, path=data, validation=test)
    loop: dict[str, Any] = {"seed": seed, "device": device}
    if quick:
        images, tested = min(images, 256), min(tested, 64)
        loop |= {"steps": 4, "log_every": 1, "picture_every": 0, "validate_every": 4, "checkpoint_every": 2}
        loop |= {"batch": 16, "tensorboard": False}
        shown = replace(shown, workers=0, validation_images=16)
    tokenizer = replace(first, out=str(out / "tokenizer"), data=shown, loop=replace(first.loop, **loop))
    decoder = replace(
        second,
        out=str(out / "decoder"),
        start=str(product(tokenizer, "tokenizer")),
        data=shown,
        mask=replace(second.mask, over=2) if quick else second.mask,
        loop=replace(second.loop, **loop),
    )
    generator = replace(
        third,
        out=str(out / "generator"),
        tokenizer=str(product(decoder, "tokenizer")),
        model=replace(third.model, num_classes=classes),
        data=replace(third.data, cache=str(out / "latents")),
        loop=replace(third.loop, **loop),
    )
    few: dict[str, Any] = {"samples": 2, "steps": 4, "workers": 0} if quick else {}
    return Plan(tokenizer, decoder, generator, data, images, tested, classes, seed, **few)
