# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""Which tokenizers and generators are compared, as numbers.

    TABLE      the seven rows of the paper's ablation: mask modelling, latent tokens, auxiliary target, in its order
    others     KL-VAE and SoftVQ with latent tokens, as the first and the last row are compared with;
               a KL-VAE of the image tokens at half the patch: four times the tokens, the place of SD-VAE;
               MAETok with learned positions, for fine-tuning on mixed resolutions

All have the same encoder, decoder, width of a latent token, data, steps and seeds; what differs is what the row says.
The auxiliary target is HOG: DINOv2's and SigLIP's weights cannot be had everywhere. All get a stage 2 of equal length,
their encoder frozen. Widths are small, so that networks begin with deviations that follow the width (`first_weights`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from maetok_fast.models import MAETok
from maetok_fast.models.configs import MAETokConfig, SiTConfig, ViTSize
from maetok_fast.training.configs import AuxiliaryConfig, DecoderRun, MaskConfig, TokenizerRun
from maetok_fast.training.generator_configs import LatentsConfig, ObjectiveConfig, SiTRun
from maetok_fast.training.runs import laptop_generator, laptop_tokenizer

__all__ = [
    "FULL",
    "QUICK",
    "TABLE",
    "VARIANTS",
    "Scale",
    "Variant",
    "decoder_run",
    "first_weights",
    "generator_run",
    "mixed_run",
    "tokenizer_run",
]

SIZE, PATCH, TOKENS, WIDTH = 32, 8, 16, 8  # pixels; of a token; latent tokens; numbers of each
LARGER = 64  # the second size of mixed-resolution fine-tuning


@dataclass(frozen=True)
class Scale:
    """How much of everything. steps, decoded: of a tokenizer's stages 1 and 2; fine: of its fine-tuning on two sizes;
    generated: of a generator, measured at each of `points` checkpoints. images: training images whose latents are
    cached; held: held-out images (test images) that are encoded and reconstructed. sampled: at each checkpoint; judged:
    at the last. nfe: Euler steps. modes, passes: of mixtures and their EM. probed: training rows of the linear probe.
    guidance: the strength of the pictures."""

    steps: int = 1_200
    decoded: int = 400
    batch: int = 32
    fine: int = 300
    generated: int = 1_000
    points: int = 4
    generator_batch: int = 64
    images: int = 30_000
    held: int = 5_000
    sampled: int = 1_000
    judged: int = 2_000
    nfe: int = 25
    modes: tuple[int, ...] = (1, 2, 5, 10, 20, 50, 100)
    passes: int = 20
    probed: int = 10_000
    guidance: float = 2.0

    @property
    def every(self) -> int:
        """Steps between two checkpoints of a generator."""
        return self.generated // self.points


FULL = Scale()
QUICK = Scale(
    steps=6, decoded=2, batch=8, fine=2, generated=4, points=2, generator_batch=8, images=64, held=32, sampled=12,
    judged=20, nfe=3, modes=(1, 2), passes=3, probed=48,
)  # fmt: skip


@dataclass(frozen=True)
class Variant:
    """name, title: in files and in tables. mask: 40-60 % of the image tokens replaced. latents: latent tokens, else the
    image tokens are the latents. target: HOG as auxiliary target. generated: whether a generator is trained on it."""

    name: str
    title: str
    mask: bool
    latents: bool
    target: bool
    bottleneck: str = "ae"
    patch: int = PATCH
    position: str = "mixed"
    generated: bool = True

    @property
    def tokens(self) -> int:
        """Of the latent."""
        return TOKENS if self.latents else (SIZE // self.patch) ** 2

    @property
    def alike(self) -> bool:
        """Whether its latent has as many numbers as MAETok's, so that likelihoods compare."""
        return self.tokens == TOKENS

    @property
    def model(self) -> MAETokConfig:
        size = ViTSize(96, 3, 3)
        return MAETokConfig(
            image_size=SIZE, base_image_size=SIZE, patch=self.patch, num_latent_tokens=TOKENS if self.latents else 0,
            latent_dim=WIDTH, encoder=size, decoder=size, decoder_kind="plain", position=self.position,
            bottleneck=self.bottleneck, codebook_size=1024 if self.bottleneck == "softvq" else None,
        )  # fmt: skip


TABLE = (
    Variant("maetok", "MAETok", True, True, True),
    Variant("no-mask", "latents, HOG", False, True, True),
    Variant("no-latents", "mask, HOG", True, False, True),
    Variant("no-target", "mask, latents", True, True, False),
    Variant("target-only", "HOG", False, False, True),
    Variant("mask-only", "mask", True, False, False),
    Variant("ae", "AE", False, True, False),
)
VARIANTS = (
    Variant("kl-2d", "KL-VAE, 64 image tokens", False, False, False, "kl", PATCH // 2),  # the longest first
    *TABLE,
    Variant("kl", "KL-VAE", False, True, False, "kl"),
    Variant("softvq", "SoftVQ", False, True, False, "softvq"),
    Variant("learned", "MAETok, learned positions", True, True, True, position="absolute", generated=False),
)


def first_weights(config: MAETokConfig, seed: int) -> MAETok:
    """A tokenizer to begin with: Glorot's deviations in blocks, LayerScale .1, tokens and positions of deviation .4.

    The public deviations, .02 and 1e-5, are for a width of 768 and 500 K steps; at a width of 96 latent tokens read
    next to nothing for the first thousand steps. Blocks, tokens and positions of a seed begin alike in all variants."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = MAETok(config)
        for name, parameter in model.named_parameters():
            torch.manual_seed(seed * 100_003 + _number(name))
            with torch.no_grad():
                if name.endswith("gamma"):
                    parameter.fill_(0.1)
                elif ".blocks." in name and parameter.ndim == 2:
                    nn.init.xavier_uniform_(parameter)
                elif name.endswith(("latent_tokens", "latent_pos_embed", "mask_token", "pos_embed")):
                    nn.init.normal_(parameter, std=0.4)
    return model


def _number(name: str) -> int:
    return sum((i + 1) * ord(c) for i, c in enumerate(name)) % 99_991


def tokenizer_run(variant: Variant, scale: Scale, seed: int, out: Path, data: str, start: Path) -> TokenizerRun:
    """Stage 1 of a variant in the folder `out`, from the weights in `start`."""
    base = laptop_tokenizer()
    return replace(
        base,
        out=str(out),
        start=str(start),
        model=variant.model,
        data=replace(base.data, path=data, validation="", workers=0),
        mask=MaskConfig() if variant.mask else MaskConfig(low=0.0, high=0.0),
        auxiliary=base.auxiliary if variant.target else AuxiliaryConfig(targets=()),
        optimizer=replace(base.optimizer, learning_rate=4e-3, warmup=max(1, scale.steps // 15)),
        loop=replace(base.loop, steps=scale.steps, batch=scale.batch, seed=seed, **_quiet(scale.steps)),
    )


def decoder_run(variant: Variant, scale: Scale, seed: int, out: Path, data: str, start: Path) -> DecoderRun:
    """Stage 2: the decoder alone; where stage 1 had masks, their share goes from 60 % to 0 within half of the steps."""
    run = tokenizer_run(variant, scale, seed, out, data, start)
    fading = MaskConfig(low=0.6, high=0.6, final=0.0, over=max(1, scale.decoded // 2))
    return DecoderRun(
        out=run.out,
        start=run.start,
        model=run.model,
        data=run.data,
        mask=fading if variant.mask else run.mask,
        loss=run.loss,
        adversarial=run.adversarial,
        optimizer=replace(run.optimizer, learning_rate=2e-3, warmup=max(1, scale.decoded // 10)),
        ema=run.ema,
        loop=replace(run.loop, steps=scale.decoded, **_quiet(scale.decoded)),
    )


def mixed_run(variant: Variant, scale: Scale, seed: int, out: Path, data: str, start: Path) -> TokenizerRun:
    """Fine-tuning of a variant's tokenizer on SIZE and LARGER, one of them drawn for each step."""
    run = tokenizer_run(variant, scale, seed, out, data, start)
    return replace(
        run,
        data=replace(run.data, sizes=(SIZE, LARGER)),
        optimizer=replace(run.optimizer, learning_rate=1e-3, warmup=max(1, scale.fine // 10)),
        loop=replace(run.loop, steps=scale.fine, **_quiet(scale.fine)),
    )


def generator_run(
    variant: Variant, scale: Scale, seed: int, out: Path, cache: Path, held: Path, classes: int, how: str = "plain"
) -> SiTRun:
    """A small SiT of a variant's latents. how: "plain"; "exit", with an early exit for internal guidance; "free", which
    learns guided velocities at every temperature (GFT)."""
    base = laptop_generator()
    kinds: dict[str, dict[str, Any]] = {"plain": {}, "exit": {"exit_depth": 2}, "free": {"conditions": ("beta",)}}
    special = kinds[how]
    loop = replace(base.loop, steps=scale.generated, batch=scale.generator_batch, seed=seed, **_quiet(scale.every))
    return replace(
        base,
        out=str(out),
        tokenizer="",
        model=SiTConfig(
            tokens=variant.tokens,
            channels=WIDTH,
            dim=128,
            depth=4,
            heads=4,
            num_classes=base.model.num_classes,
            **special,
        ),
        data=LatentsConfig(cache=str(cache), validation=str(held), validation_images=scale.held, flip=0.0, workers=0),
        objective=ObjectiveConfig(guidance_free=how == "free"),
        ema=replace(base.ema, decay=0.99),
        loop=replace(loop, keep=scale.points, validate_every=scale.every),
    )


def _quiet(every: int) -> dict[str, Any]:
    """Nothing but the log and checkpoints."""
    return {
        "picture_every": 0, "validate_every": 0, "checkpoint_every": every, "log_every": max(1, every // 10), "keep": 1,
        "tensorboard": False, "device": "cpu", "precision": "fp32",
    }  # fmt: skip
