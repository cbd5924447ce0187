# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""What a training run is, as frozen dataclasses: one tree a stage.

    TokenizerRun   stage 1: mask modelling with auxiliary decoders, and every ablation of it
    DecoderRun     stage 2: the decoder alone, encoder frozen, the mask ratio going to 0

`maetok_fast.config.read` lays YAML and `key=value` over one; `runs.py` holds the paper's. Steps count optimizer steps.
ValueError where a value lies out of its range, naming the field.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from maetok_fast.checks import check_number, check_positive
from maetok_fast.models.configs import MAETokConfig, ViTSize

__all__ = [
    "AdversarialConfig",
    "AuxiliaryConfig",
    "DataConfig",
    "DecoderRun",
    "EMAConfig",
    "ImagesConfig",
    "LoopConfig",
    "LossConfig",
    "MaskConfig",
    "MetricsConfig",
    "OptimizerConfig",
    "Run",
    "TokenizerRun",
]


TARGETS = ("hog", "dino", "clip", "clip_vit_l", "caption")  # and any ViT of timm's


def _share(owner: str, **values: float) -> None:
    for name, value in values.items():
        if not 0 <= value <= 1:
            raise ValueError(f"{owner}.{name} must lie in [0, 1], got {value}")


def _not_negative(owner: str, config: Any, *names: str) -> None:
    for name in names:
        check_number(owner, name, getattr(config, name), 0)


@dataclass(frozen=True)
class ImagesConfig:
    """path: a folder, a list of files (.txt), a webdataset tar or several.

    size: of the training images in pixels, None: the model's. crop: "random" (a square of low .. high of the shorter
    side), "resized" (random-resized crop, area share low .. high), "center", "adm". flip: the probability. workers:
    processes that decode, per rank. decoder: "auto", "torchvision", "pil", "dali". max_unreadable: the share of files
    that may be unreadable. validation: images of the same kinds, "" for none; validation_images: how many of them at
    most."""

    path: str = ""
    size: int | None = None
    crop: Literal["random", "resized", "center", "adm"] = "random"
    low: float = 0.8
    high: float = 1.0
    flip: float = 0.5
    workers: int = 2
    decoder: Literal["auto", "torchvision", "pil", "dali"] = "auto"
    max_unreadable: float = 0.01
    validation: str = ""
    validation_images: int = 1000

    def __post_init__(self) -> None:
        _share("data", low=self.low, high=self.high, flip=self.flip, max_unreadable=self.max_unreadable)
        check_positive("data", validation_images=self.validation_images, size=1 if self.size is None else self.size)
        _not_negative("data", self, "workers")
        if not 0 < self.low <= self.high:
            raise ValueError(f"data.low and data.high must be 0 < low <= high, got {self.low} and {self.high}")


@dataclass(frozen=True)
class DataConfig(ImagesConfig):
    """A tokenizer's images. sizes: several, one drawn for each step (mixed-resolution fine-tuning); (): `size`."""

    sizes: tuple[int, ...] = ()


@dataclass(frozen=True)
class MaskConfig:
    """Stage 1: the ratio is drawn from a half-bell on [low, high], one for each step; low = high = 0: no masks.

    mode: "replace" (the paper's: a mask token stands for a masked patch) or "drop" (they are left out, as in MAE).
    final, over: stage 2: the ratio goes from `high` linearly to `final` within `over` steps; over = 0: as stage 1.
    semantic: masks follow a teacher's saliency; temperature: how loosely (large: uniform)."""

    mode: Literal["replace", "drop"] = "replace"
    low: float = 0.4
    high: float = 0.6
    final: float = 0.0
    over: int = 0
    semantic: bool = False
    temperature: float = 1.0

    def __post_init__(self) -> None:
        _share("mask", low=self.low, high=self.high, final=self.final)
        _not_negative("mask", self, "over")
        check_number("mask", "temperature", self.temperature, 0, above=True)
        if self.low > self.high:
            raise ValueError(f"mask.low must not exceed mask.high, got {self.low} and {self.high}")
        if self.high == 1:
            raise ValueError("mask.high must be below 1: an encoder that sees nothing has nothing to encode")

    @property
    def used(self) -> bool:
        return self.high > 0


@dataclass(frozen=True)
class AuxiliaryConfig:
    """Decoders of other targets than pixels, trained beside the tokenizer and not kept with it. targets: of "hog",
    "dino", "clip", "clip_vit_l", "caption", or a timm model's name. weights: of their losses, 1 where not named. size:
    of each decoder. masked_only: the loss counts masked patches only (the paper's)."""

    targets: tuple[str, ...] = ("hog", "dino", "clip")
    weights: dict[str, float] = field(default_factory=dict)
    size: ViTSize = field(default_factory=lambda: ViTSize(192, 3, 3))
    masked_only: bool = True

    def __post_init__(self) -> None:
        for name, weight in self.weights.items():
            check_number("auxiliary.weights", name, weight, 0)
        if len(set(self.targets)) != len(self.targets):
            raise ValueError(f"auxiliary.targets names one twice: {', '.join(self.targets)}")
        unknown = [name for name in self.weights if name not in (*self.targets, *TARGETS)]
        if unknown:
            raise ValueError(
                f"auxiliary.weights names {unknown[0]}, which is none of "
                f"{', '.join(dict.fromkeys((*self.targets, *TARGETS)))}"
            )


@dataclass(frozen=True)
class TeacherConfig:
    """Frozen networks that make targets. weights: target -> "hub" (timm's), a file, or "random"; "hub" where not named.
    precision: what they compute in. statistics: pixel mean and deviation, "own" (each network's right ones) or
    "public" (ImageNet's for all, as the public code)."""

    weights: dict[str, str] = field(default_factory=dict)
    precision: str = "auto"
    statistics: Literal["own", "public"] = "own"


@dataclass(frozen=True)
class LossConfig:
    """Weights of the mean squared error of pixels and of LPIPS, which rises from 0 over `perceptual_warmup` steps.

    vgg: VGG16's weights: "hub" (torchvision's), a file, or "random"; heads: LPIPS' linear heads, None: the lpips
    package's. kl, entropy: of the bottlenecks "kl" and "softvq"."""

    reconstruction: float = 1.0
    perceptual: float = 1.0
    perceptual_warmup: int = 10_000
    vgg: str = "hub"
    heads: str | None = None
    kl: float = 1e-6
    entropy: float = 0.01

    def __post_init__(self) -> None:
        _not_negative("loss", self, "reconstruction", "perceptual", "perceptual_warmup", "kl", "entropy")


@dataclass(frozen=True)
class AdversarialConfig:
    """The discriminator and its loss. weight: of the generator's part, 0 for no discriminator at all. start: first step
    of both; before it nothing of them is computed. discriminator: "dino", "patchgan", "maskbit", "stylegan"; weights:
    of the dino kind's frozen trunk: "hub", a file, or "random". adaptive: the generator's part is scaled by the ratio
    of gradients at the last layer. lecam, consistency: weights of the regularisers, 0 for none. augment: DiffAugment.
    learning_rate: over the tokenizer's."""

    weight: float = 0.4
    start: int = 30_000
    discriminator: Literal["dino", "patchgan", "maskbit", "stylegan"] = "dino"
    weights: str = "hub"
    loss: Literal["hinge", "vanilla"] = "hinge"
    generator_loss: Literal["hinge", "non_saturating"] = "hinge"
    adaptive: bool = True
    lecam: float = 1e-3
    consistency: float = 4.0
    augment: bool = True
    learning_rate: float = 1.0

    def __post_init__(self) -> None:
        _not_negative("adversarial", self, "weight", "start", "lecam", "consistency", "learning_rate")


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW ("adamw": ours, one pass with the average; "torch": torch's, fused; "apex": NVIDIA's FusedAdam).

    learning_rate: for a batch of 256, times batch / 256 where `scaled`. warmup: steps from 0; schedule: "cosine" to
    `final` of it, "linear" to it, or "constant". weight_decay: none on biases, norms, tokens and frequencies. clip: of
    each network's gradient norm; 0: none."""

    name: Literal["adamw", "torch", "apex"] = "adamw"
    learning_rate: float = 1e-4
    scaled: bool = True
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 1e-4
    warmup: int = 5_000
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    final: float = 0.1
    clip: float = 1.0

    def __post_init__(self) -> None:
        _not_negative("optimizer", self, "learning_rate", "weight_decay", "warmup", "final", "clip")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"optimizer.betas must lie in [0, 1), got {self.betas}")


@dataclass(frozen=True)
class EMAConfig:
    """The averaged copy of the tokenizer, which is what a checkpoint's `tokenizer/` holds. decay: of each step."""

    decay: float = 0.9999
    dtype: Literal["fp32", "bf16"] = "fp32"

    def __post_init__(self) -> None:
        _share("ema", decay=self.decay)
        if self.dtype == "bf16" and self.decay > 0.99:
            raise ValueError(
                f"ema.dtype: bf16 cannot hold an average of decay {self.decay}: an update is {1 - self.decay:.0e} of a "
                "difference, and bf16 resolves 4e-3 of a value; use fp32, or a decay of at most 0.99"
            )


@dataclass(frozen=True)
class LoopConfig:
    """steps: optimizer steps in all. batch: images of a step, over all ranks and accumulated parts.

    accumulate: parts in which a rank computes its share. precision: "auto", "fp32", "bf16", "fp8". parallel: "ddp", or
    "fsdp" (FSDP2: parameters, gradients and optimizer state sharded). recompute: what norms and GELUs make is not kept
    for the backward pass but made again, a third less for 1 to 2 % more time; checkpointing: whole blocks are.
    keep: checkpoints that stay beside the best one. max_bad_steps: steps with a gradient that is not finite, one after
    the other, at which the run stops; such steps change nothing. *_every: steps; 0: never (a last checkpoint is always
    written)."""

    steps: int = 500_000
    batch: int = 512
    accumulate: int = 1
    precision: str = "auto"
    parallel: Literal["ddp", "fsdp"] = "ddp"
    compile: bool = False
    recompute: bool = True
    checkpointing: bool = False
    seed: int = 0
    device: str = ""
    log_every: int = 50
    picture_every: int = 2_500
    validate_every: int = 5_000
    checkpoint_every: int = 2_500
    keep: int = 3
    max_bad_steps: int = 10
    tensorboard: bool = True

    def __post_init__(self) -> None:
        names = ("steps", "batch", "accumulate", "log_every", "keep", "max_bad_steps")
        check_positive("loop", **{name: getattr(self, name) for name in names})
        _not_negative("loop", self, "seed", "picture_every", "validate_every", "checkpoint_every")


@dataclass(frozen=True)
class MetricsConfig:
    """The Frechet distance of the average's images to real ones, every so many steps of the run (0: never).

    Of a tokenizer: of its reconstructions of the first `images` of data.validation (rFD; and their PSNR). Of a
    generator: of so many samples, labels equally, noise the same each time (gFD). extractor: "inception" (FID),
    "dinov2", "timm:NAME", "random"; weights: its weights, "hub", a file, or "random". reference: images or a .npz of
    images or statistics; "": data.validation. crop: of what is resized. steps, guidance: of the generator's sampler,
    None: `preview`'s. batch: images at a time."""

    every: int = 0
    images: int = 10_000
    extractor: str = "inception"
    weights: str = "hub"
    reference: str = ""
    crop: Literal["center", "adm"] = "center"
    steps: int | None = None
    guidance: float | None = None
    batch: int = 64

    def __post_init__(self) -> None:
        _not_negative("metrics", self, "every")
        check_positive("metrics", images=self.images, batch=self.batch, steps=1 if self.steps is None else self.steps)


class Run(Protocol):
    """What the loop reads of a run, whatever its stage."""

    @property
    def out(self) -> str: ...
    @property
    def optimizer(self) -> OptimizerConfig: ...
    @property
    def ema(self) -> EMAConfig: ...
    @property
    def loop(self) -> LoopConfig: ...
    @property
    def metrics(self) -> MetricsConfig: ...


@dataclass(frozen=True)
class TokenizerRun:
    """Stage 1. out: the run's folder. start: a tokenizer whose weights it begins with (folder, file, hub repository),
    "" for none."""

    out: str = ""
    start: str = ""
    model: MAETokConfig = field(default_factory=MAETokConfig)
    data: DataConfig = field(default_factory=DataConfig)
    mask: MaskConfig = field(default_factory=MaskConfig)
    auxiliary: AuxiliaryConfig = field(default_factory=AuxiliaryConfig)
    teachers: TeacherConfig = field(default_factory=TeacherConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    adversarial: AdversarialConfig = field(default_factory=AdversarialConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    ema: EMAConfig = field(default_factory=EMAConfig)
    metrics: MetricsConfig = field(default_factory=MetricsConfig)
    loop: LoopConfig = field(default_factory=LoopConfig)

    @property
    def frozen_encoder(self) -> bool:
        return False


@dataclass(frozen=True)
class DecoderRun(TokenizerRun):
    """Stage 2: encoder and quant_conv frozen, no auxiliary decoders, the mask ratio from 60 % to 0 over 50 K steps."""

    mask: MaskConfig = field(default_factory=lambda: MaskConfig(low=0.6, high=0.6, final=0.0, over=50_000))
    auxiliary: AuxiliaryConfig = field(default_factory=lambda: AuxiliaryConfig(targets=()))

    def __post_init__(self) -> None:
        if self.auxiliary.targets:
            raise ValueError("auxiliary.targets: decoder fine-tuning has none; they train the encoder, which is frozen")

    @property
    def frozen_encoder(self) -> bool:
        return True
