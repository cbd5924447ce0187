# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""What the training of a generator is, as frozen dataclasses (stage 3).

    SiTRun, LightningDiTRun   latents out of a cache, or encoded on the way; what the velocity is learnt by; what else
                              the network is held to; which tokens skip which blocks; pictures of the average

`maetok_fast.config.read` lays YAML and `key=value` over one; `runs.py` holds them by name. ValueError where a value
lies out of its range, or two do not go together, naming the field.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from maetok_fast.checks import check_number, check_positive
from maetok_fast.models.configs import LightningDiTConfig, SiTConfig
from maetok_fast.training.configs import (
    EMAConfig,
    ImagesConfig,
    LoopConfig,
    MetricsConfig,
    OptimizerConfig,
    TeacherConfig,
    _not_negative,
    _share,
)

__all__ = [
    "AlignConfig",
    "GeneratorRun",
    "LatentsConfig",
    "LightningDiTRun",
    "ObjectiveConfig",
    "PreviewConfig",
    "RoutingConfig",
    "SiTRun",
]


@dataclass(frozen=True)
class LatentsConfig(ImagesConfig):
    """Where the latents come from: `cache`, `path`, or both.

    cache: of `maetok-fast cache-latents`, or one of REPA's, REPA-E's, MAR's, DC-AE's. format, moments: "auto", or as
    `data.caches.open_cache` takes them. rows: how many images a cache of LightningDiT's extraction really has, 0: all.
    statistics: a file of the latents' mean and deviation; "": beside the cache, or in the tokenizer's configuration;
    "none": the latents are learnt as they are.
    path: images. Without a cache they are encoded in the step; with one they are what the teacher sees, the same images
    in the same order, cropped as the cache's were. size: None: the cache's, or the tokenizer's. flip: of a cache's
    mirror images too. validation: a cache, or images where `path` alone is given. The rest as `ImagesConfig`'s."""

    crop: Literal["random", "resized", "center", "adm"] = "center"
    cache: str = ""
    format: str = "auto"
    moments: Literal["auto", "std", "logvar"] = "auto"
    rows: int = 0
    statistics: str = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        _not_negative("data", self, "rows")


@dataclass(frozen=True)
class ObjectiveConfig:
    """What the velocity is learnt by.

    path: x_t of data and noise. times: t uniform, or lognormal. shift: of those times towards the noise, 1: none, 0: by
    the latents' dimensions (sqrt(L C / 4096)). direction: weight of the velocity-direction loss 1 - cos (LightningDiT).
    exit: weight of the early exit's velocity, where the model has one (internal guidance).
    guidance_free: the model, which needs the condition "beta", learns guided velocities at every temperature (GFT).
    averages: "none", or average velocities of a model with the condition "r": "meanflow", or "improved". apart: the
    share of samples with r < t; mean, std: of the two times' logits. guidance, mixing: of the target (1, 0: none).
    adaptive: power of the MeanFlow loss' weight."""

    path: Literal["linear", "cosine"] = "linear"
    times: Literal["uniform", "lognormal"] = "uniform"
    shift: float = 1.0
    direction: float = 0.0
    exit: float = 1.0
    guidance_free: bool = False
    averages: Literal["none", "meanflow", "improved"] = "none"
    apart: float = 0.25
    mean: float = -0.4
    std: float = 1.0
    guidance: float = 1.0
    mixing: float = 0.0
    adaptive: float = 1.0

    def __post_init__(self) -> None:
        _not_negative("objective", self, "shift", "direction", "exit", "guidance", "adaptive")
        _share("objective", apart=self.apart, mixing=self.mixing)
        check_number("objective", "std", self.std, 0, above=True)
        if self.guidance_free and self.averages != "none":
            raise ValueError("objective.guidance_free and objective.averages are two ways to guide; take one of them")
        if self.mixing == 1:
            raise ValueError("objective.mixing must be below 1: the scale is guidance / (1 - mixing)")
        if self.averages == "none" and (self.guidance, self.mixing) != (1.0, 0.0):
            raise ValueError("objective.guidance and objective.mixing are of objective.averages, which is none")


@dataclass(frozen=True)
class AlignConfig:
    """Tokens behind block `depth`, through a projector, held to features of the clean image: REPA (arXiv 2410.06940).

    target: "" for none; "dino", "clip" or a ViT of timm's; or "self": what the average of the model itself has behind
    block `self_depth` at a time up to `self_shift` nearer to the data (no teacher, no images). weight: of the negative
    cosine. layers: the sum of a teacher's last so many blocks' features instead of its last norm's (RAEv2).
    projector: "mlp", three layers of `hidden` (REPA's), or "conv", 3 x 3 over the grid, with the teacher's features
    freed of their mean over the image by the share `spatial` and brought to deviation 1 (iREPA, arXiv 2512.10794)."""

    target: str = ""
    depth: int = 8
    weight: float = 0.5
    layers: int = 0
    projector: Literal["mlp", "conv"] = "mlp"
    hidden: int = 2048
    spatial: float = 0.6
    self_depth: int = 20
    self_shift: float = 0.2

    def __post_init__(self) -> None:
        _not_negative("align", self, "weight", "layers")
        _share("align", spatial=self.spatial, self_shift=self.self_shift)
        check_positive("align", depth=self.depth, hidden=self.hidden, self_depth=self.self_depth)

    @property
    def used(self) -> bool:
        return bool(self.target) and self.weight > 0


@dataclass(frozen=True)
class RoutingConfig:
    """A share of each image's tokens, drawn anew each step, skips blocks first .. last - 1 (TREAD, arXiv 2501.04765,
    SPRINT). share: 0 for none. first, last: 0: the middle two thirds of the model. until: the step from which all
    tokens go everywhere again (dense fine-tuning), 0: never; such as loop.steps less a tenth."""

    share: float = 0.0
    first: int = 0
    last: int = 0
    until: int = 0

    def __post_init__(self) -> None:
        _share("routing", share=self.share)
        _not_negative("routing", self, "first", "last", "until")
        if self.share == 1:
            raise ValueError("routing.share must be below 1: some token has to go through the blocks")
        if self.last and self.first >= self.last:
            raise ValueError(f"routing.first must lie before routing.last, got {self.first} and {self.last}")

    def blocks(self, depth: int) -> tuple[int, int]:
        """(first, last) in a model of so many blocks."""
        sixth = depth // 6
        return (self.first, self.last) if self.last else (max(1, sixth), depth - max(1, sixth))


@dataclass(frozen=True)
class PreviewConfig:
    """Pictures of the average in samples/: labels of the columns, () for the classes evenly; steps, method, guidance:
    of the sampler ("meanflow" where averages are learnt). Decoded by the run's `tokenizer`; none without one."""

    labels: tuple[int, ...] = ()
    steps: int = 30
    method: Literal["euler", "heun", "sde", "meanflow"] = "euler"
    guidance: float = 1.0

    def __post_init__(self) -> None:
        check_positive("preview", steps=self.steps)


@dataclass(frozen=True)
class GeneratorRun:
    """Stage 3. out: the run's folder. start: a generator whose weights it begins with (a run's folder too). tokenizer:
    whose latents they are: to encode images, to decode previews, and to know a foreign cache by."""

    out: str = ""
    start: str = ""
    tokenizer: str = ""
    model: SiTConfig = field(default_factory=SiTConfig)
    data: LatentsConfig = field(default_factory=LatentsConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    align: AlignConfig = field(default_factory=AlignConfig)
    teachers: TeacherConfig = field(default_factory=TeacherConfig)
    routing: RoutingConfig = field(default_factory=RoutingConfig)
    optimizer: OptimizerConfig = field(
        default_factory=lambda: OptimizerConfig(
            scaled=False, betas=(0.9, 0.999), weight_decay=0.0, warmup=0, schedule="constant"
        )
    )
    ema: EMAConfig = field(default_factory=EMAConfig)
    preview: PreviewConfig = field(default_factory=PreviewConfig)
    metrics: MetricsConfig = field(default_factory=MetricsConfig)
    loop: LoopConfig = field(default_factory=lambda: LoopConfig(steps=4_000_000, batch=256, checkpoint_every=10_000))

    def __post_init__(self) -> None:
        model, objective, align, routing = self.model, self.objective, self.align, self.routing
        averages = objective.averages != "none"
        for name, needed, why in (
            ("beta", objective.guidance_free, "objective.guidance_free"),
            ("r", averages, "objective.averages"),
        ):
            if needed and name not in model.conditions:
                raise ValueError(f"{why} needs a model that is told {name}: model.conditions=[{name}]")
            if not needed and name in model.conditions:
                raise ValueError(f"model.conditions has {name}, which nothing trains without {why}")
        for name in ("exit_depth", "prediction"):
            if averages and getattr(model, name) not in (None, "v"):
                raise ValueError(f"objective.averages cannot be had together with model.{name}")
        if averages and (align.used or routing.share):
            raise ValueError(
                "objective.averages goes with neither align.target nor routing.share: one jvp, one forward"
            )
        if averages and (objective.direction or objective.path != "linear"):
            raise ValueError("objective.averages is of the linear path, without objective.direction")
        if objective.guidance_free and model.exit_depth is not None:
            raise ValueError("objective.guidance_free and model.exit_depth are two ways to guide; take one of them")
        if model.prediction == "x" and objective.path != "linear":
            raise ValueError("model.prediction=x is of the linear path: objective.path=linear")
        if (objective.guidance_free or objective.guidance != 1) and model.label_dropout == 0:
            raise ValueError("guidance needs a null class: model.label_dropout above 0")
        if align.used and align.depth > model.depth:
            raise ValueError(f"align.depth must be at most the model's {model.depth} blocks, got {align.depth}")
        if align.used and align.target == "self" and not align.depth < align.self_depth <= model.depth:
            raise ValueError(
                f"align.self_depth must lie in align.depth + 1 .. {model.depth}, got {align.self_depth} and "
                f"align.depth {align.depth}"
            )
        if routing.share:
            first, last = routing.blocks(model.depth)
            if not first < last <= model.depth:
                raise ValueError(f"routing.first, routing.last: {first}, {last} do not lie in {model.depth} blocks")
            if align.used and align.projector == "conv" and first < align.depth < last:
                raise ValueError("align.projector=conv needs the whole grid: align.depth lies within the route")
            if align.used and align.target == "self" and first < align.depth < last:
                raise ValueError("align.target=self: align.depth must not lie within the route")
        if align.used and align.target == "self" and self.loop.parallel == "fsdp":
            raise ValueError("align.target=self needs the average whole on every device: loop.parallel=ddp")
        if averages and self.loop.parallel == "fsdp":
            raise ValueError("objective.averages takes a jvp, which FSDP's hooks do not know: loop.parallel=ddp")


@dataclass(frozen=True)
class SiTRun(GeneratorRun):
    """Stage 3 of a SiT."""


@dataclass(frozen=True)
class LightningDiTRun(GeneratorRun):
    """Stage 3 of a LightningDiT. Its published weights have data at t = 1; what is trained here says "maetok" (t = 0
    data) in its configuration, which every reader here knows; model.time=sit trains in theirs."""

    model: LightningDiTConfig = field(default_factory=lambda: LightningDiTConfig(time="maetok"))
