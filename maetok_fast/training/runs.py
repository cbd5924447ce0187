# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""Runs by name: each a function that returns its whole configuration. A YAML file begins with one (`run: decoder_256`)
and says what differs; `configs/` has one for each.

    tokenizer_256, tokenizer_512     the paper's stage 1
    decoder_256, decoder_512         its stage 2, from stage 1's tokenizer (start=)
    mixed_resolution                 a 256 px tokenizer fine-tuned on 256 and 512 px
    sit_xl, sit_l, lightningdit_xl   stage 3: generators of the tokenizer's 128 latents
    laptop_tokenizer, laptop_decoder a small tokenizer that two CPU cores train in minutes, without downloads
    laptop_generator                 a small SiT of its latents
    overfit                          MAETok-B's real shape on a handful of photographs, to see that it learns

Facts: arXiv 2502.03444 and its public configuration.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from maetok_fast import config
from maetok_fast.config import ConfigError
from maetok_fast.models.configs import LightningDiTConfig, MAETokConfig, SiTConfig, ViTSize
from maetok_fast.training.configs import (
    AdversarialConfig,
    AuxiliaryConfig,
    DataConfig,
    DecoderRun,
    EMAConfig,
    LoopConfig,
    LossConfig,
    MaskConfig,
    OptimizerConfig,
    TokenizerRun,
)
from maetok_fast.training.generator_configs import (
    GeneratorRun,
    LatentsConfig,
    LightningDiTRun,
    ObjectiveConfig,
    PreviewConfig,
    SiTRun,
)

__all__ = ["RUNS", "STAGES", "read_run"]


def _model(size: int) -> MAETokConfig:
    return MAETokConfig(image_size=size, base_image_size=size, encoder_drop_path=0.05, decoder_drop_path=0.05)


def tokenizer_256() -> TokenizerRun:
    """Stage 1 at 256 px: 500 K steps of 512 images."""
    return TokenizerRun(out="runs/tokenizer_256", model=_model(256))


def tokenizer_512() -> TokenizerRun:
    """Stage 1 at 512 px. A smaller batch fits; the learning rate follows it."""
    return TokenizerRun(out="runs/tokenizer_512", model=_model(512), loop=LoopConfig(batch=256, checkpointing=True))


def decoder_256() -> DecoderRun:
    """Stage 2 at 256 px: 50 K steps in which the mask ratio falls from 60 % to 0 (linearly: ours, it is not stated)."""
    return DecoderRun(
        out="runs/decoder_256",
        start="runs/tokenizer_256",
        model=_model(256),
        loss=LossConfig(perceptual_warmup=0),
        adversarial=AdversarialConfig(start=0),
        optimizer=OptimizerConfig(warmup=1_000),
        loop=LoopConfig(steps=50_000),
    )


def decoder_512() -> DecoderRun:
    """Stage 2 at 512 px."""
    run = decoder_256()
    loop = replace(run.loop, batch=256, checkpointing=True)
    return replace(run, out="runs/decoder_512", start="runs/tokenizer_512", model=_model(512), loop=loop)


def mixed_resolution() -> TokenizerRun:
    """A 256 px tokenizer fine-tuned on both resolutions, one of them drawn for each step.

    `model.position: absolute` for the comparison with learned positions."""
    return TokenizerRun(
        out="runs/mixed_resolution",
        start="runs/tokenizer_256",
        model=_model(256),
        data=DataConfig(sizes=(256, 512)),
        loss=LossConfig(perceptual_warmup=0),
        adversarial=AdversarialConfig(start=0),
        optimizer=OptimizerConfig(warmup=1_000),
        loop=LoopConfig(steps=50_000, batch=256, checkpointing=True),
    )


def laptop_tokenizer() -> TokenizerRun:
    """32 px, HOG alone as target, no network whose weights would have to be fetched.

    The image tokens themselves are the latents (the paper's ablation): on two cores 24 dB after these two and a half
    minutes, where latent tokens, which have to learn first which of them shows which place, are at 15
    (model.num_latent_tokens=16)."""
    size = ViTSize(192, 3, 3)
    return TokenizerRun(
        out="runs/laptop_tokenizer",
        model=MAETokConfig(
            image_size=32, base_image_size=32, patch=8, num_latent_tokens=0, latent_dim=32, encoder=size, decoder=size
        ),
        data=DataConfig(path="fashion-mnist", validation="fashion-mnist:test", validation_images=256),
        auxiliary=AuxiliaryConfig(targets=("hog",), weights={"hog": 0.1}, size=ViTSize(64, 1, 2)),
        loss=LossConfig(perceptual=0.0),
        adversarial=AdversarialConfig(weight=0.0),
        optimizer=OptimizerConfig(learning_rate=2e-3, scaled=False, warmup=100),
        ema=EMAConfig(decay=0.98),
        loop=LoopConfig(
            steps=1_500, batch=16, log_every=50, picture_every=500, validate_every=500, checkpoint_every=250, keep=2
        ),
    )


def laptop_decoder() -> DecoderRun:
    """The laptop's stage 2."""
    first = laptop_tokenizer()
    return DecoderRun(
        out="runs/laptop_decoder",
        start="runs/laptop_tokenizer",
        model=first.model,
        data=first.data,
        mask=MaskConfig(low=0.6, high=0.6, final=0.0, over=500),
        loss=first.loss,
        adversarial=first.adversarial,
        optimizer=first.optimizer,
        ema=first.ema,
        loop=replace(first.loop, steps=1_000),
    )


def overfit() -> TokenizerRun:
    """MAETok-B at 256 px on a few photographs, nothing but pixels: the loss has to fall.

    The squared error, 0.65 at first, is half of that after ten steps; two CPU cores take 20 s a step."""
    return TokenizerRun(
        out="runs/overfit",
        data=DataConfig(path="photographs", crop="center", flip=0.0, workers=0, validation="photographs"),
        mask=MaskConfig(low=0.0, high=0.0),
        auxiliary=AuxiliaryConfig(targets=()),
        loss=LossConfig(perceptual=0.0),
        adversarial=AdversarialConfig(weight=0.0),
        optimizer=OptimizerConfig(learning_rate=3e-4, scaled=False, warmup=10, schedule="constant"),
        ema=EMAConfig(decay=0.9),
        loop=LoopConfig(
            steps=100, batch=8, log_every=1, picture_every=50, validate_every=50, checkpoint_every=0, keep=1
        ),
    )


def sit_xl() -> SiTRun:
    """Stage 3: SiT-XL on MAETok's 128 latents, 4 M steps of 256 images (the paper's)."""
    return SiTRun(out="runs/sit_xl")


def sit_l() -> SiTRun:
    """Stage 3: SiT-L."""
    return SiTRun(out="runs/sit_l", model=SiTConfig(dim=1024, depth=24, heads=16))


def lightningdit_xl() -> LightningDiTRun:
    """Stage 3: LightningDiT-XL on MAETok's latents, 400 K steps of 256 images; lognormal times, direction loss."""
    return LightningDiTRun(
        out="runs/lightningdit_xl",
        model=LightningDiTConfig(tokens=128, channels=32, time="maetok", qk_norm=True),
        objective=ObjectiveConfig(times="lognormal", direction=1.0),
        optimizer=OptimizerConfig(
            learning_rate=2e-4, scaled=False, betas=(0.9, 0.95), weight_decay=0.0, warmup=0, schedule="constant"
        ),
        loop=LoopConfig(steps=400_000, batch=256, checkpoint_every=10_000),
    )


def laptop_generator() -> SiTRun:
    """The laptop's stage 3: a small SiT on the latents of its stage 2 (`maetok-fast demo` runs all of them).

    No mirrored images: Fashion-MNIST's shoes all point to the left. The average is a short one, since a longer one
    still holds a share of the first weights when so few steps are over (0.998: 5 % after 1,500)."""
    return SiTRun(
        out="runs/laptop_generator",
        tokenizer="runs/laptop_decoder",
        model=SiTConfig(tokens=16, channels=32, dim=192, depth=6, heads=3, num_classes=10),
        data=LatentsConfig(cache="runs/laptop_latents", flip=0.0, workers=0),
        optimizer=OptimizerConfig(
            learning_rate=1e-3, scaled=False, betas=(0.9, 0.95), weight_decay=0.0, warmup=100, schedule="cosine"
        ),
        ema=EMAConfig(decay=0.995),
        preview=PreviewConfig(guidance=2.0),
        loop=LoopConfig(
            steps=2_500, batch=64, log_every=50, picture_every=500, validate_every=0, checkpoint_every=500, keep=2
        ),
    )


RUNS: dict[str, Callable[[], TokenizerRun | GeneratorRun]] = {
    f.__name__: f
    for f in (
        tokenizer_256,
        tokenizer_512,
        decoder_256,
        decoder_512,
        mixed_resolution,
        laptop_tokenizer,
        laptop_decoder,
        sit_xl,
        sit_l,
        lightningdit_xl,
        laptop_generator,
        overfit,
    )
}
STAGES: dict[str, tuple[type, ...]] = {
    "tokenizer": (TokenizerRun,),
    "decoder": (DecoderRun,),
    "generator": (SiTRun, LightningDiTRun),
}
USUAL = {"tokenizer": "tokenizer_256", "decoder": "decoder_256", "generator": "sit_xl"}


def read_run(stage: str, path: str | Path | None, overrides: Sequence[str] = ()) -> TokenizerRun | GeneratorRun:
    """The configuration of a stage (`STAGES`): a YAML file, a run's name (`RUNS`) or None for the stage's usual one,
    with `overrides` over it. ConfigError where the file is of another stage, and as `config.read`."""
    tree: dict[str, Any] = {}
    name = USUAL[stage]
    if path is not None and str(path) in RUNS:
        name = str(path)
    elif path is not None:
        tree = config.read_yaml(path)
        name = tree.pop("run", name)
    if name not in RUNS:
        raise ConfigError(f"run: there is no run named {name!r}; expected one of {', '.join(RUNS)}")
    base = RUNS[name]()
    if type(base) not in STAGES[stage]:
        right = next(s for s, kinds in STAGES.items() if type(base) in kinds)
        raise ConfigError(f"{path}: {name} is a run of the stage {right}: maetok-fast train {right} --config {path}")
    return config.read(base, tree, overrides)
