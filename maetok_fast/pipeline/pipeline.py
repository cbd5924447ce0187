# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""Pipeline: labels and seeds in, pictures out.

    seeds ── noise (noise.py) ── sampler over the generator ── z ── denormalised ── tokenizer.decode ──> images
    images ── tokenizer.encode ── normalised ──> z

The one place that normalises latents. A sample depends on its own seed and label alone: on a CPU with the native
library the models are prepared so that no row's bits depend on another's (`prepare(reproducible=True)`), so that
neither the batch, nor the order, nor the number of processes changes a picture.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from maetok_fast.data.images import to_uint8
from maetok_fast.diffusion import sample
from maetok_fast.inference import prepare
from maetok_fast.kernels import _native
from maetok_fast.models import MAETok, MAETokConfig, load_generator
from maetok_fast.models.checkpoints import Stored
from maetok_fast.models.checkpoints.locate import STATISTICS
from maetok_fast.models.sit import DiffusionTransformer
from maetok_fast.pipeline.noise import SampleNoise
from maetok_fast.pipeline.statistics import LatentStatistics
from maetok_fast.precision import Precision

__all__ = ["Batch", "Generated", "Pipeline", "latent_shape", "weights_fingerprint"]


@dataclass(frozen=True)
class Generated:
    """images (N, H, W, 3) uint8, rounded. nfe: velocity evaluations per sample; rows: network rows forwarded in all.
    seconds: of sampling and decoding."""

    images: np.ndarray
    nfe: int
    rows: int
    seconds: float


@dataclass(frozen=True)
class Batch(Generated):
    """Samples start .. start + len(images) - 1 of those that were asked for."""

    start: int = 0


def latent_shape(config: MAETokConfig, size: tuple[int, int] | None = None) -> tuple[int, int]:
    """(L, C) of a tokenizer's latents of images of size (height, width), None: at its trained resolution."""
    height, width = config.size if size is None else size
    return config.num_latent_tokens or height // config.patch * (width // config.patch), config.latent_dim


class Pipeline:
    """A tokenizer and, to generate, a generator of its latents and their statistics, all prepared.

    tokenizer: MAETok. generator: SiT or LightningDiT of the same latents, or None. negative: a second generator for
    autoguidance. statistics: how the generator's latents are normalised; None: the tokenizer's configuration has it.
    precision, weights: as `prepare`'s. reproducible: None: where it can be had (on a CPU with the native library).
    `fingerprint` stands for all weights and statistics, in records.
    ValueError where the generator is of other latents (shape, channels), or nothing says how they are normalised.
    """

    def __init__(
        self,
        tokenizer: MAETok,
        generator: DiffusionTransformer | None = None,
        statistics: LatentStatistics | None = None,
        *,
        negative: DiffusionTransformer | None = None,
        precision: str | torch.dtype | Precision = "auto",
        weights: torch.dtype | None = None,
        reproducible: bool | None = None,
    ) -> None:
        if not isinstance(tokenizer, MAETok):
            raise TypeError(f"Pipeline: tokenizer must be a MAETok, got {type(tokenizer).__name__}")
        self.device = next(tokenizer.parameters()).device
        if reproducible is None:
            reproducible = self.device.type == "cpu" and _native.why_missing() is None
        self.shape = latent_shape(tokenizer.config)
        self.statistics = LatentStatistics.of_config(tokenizer.config) if statistics is None else statistics
        for name, model in (("generator", generator), ("negative", negative)):
            if model is not None:
                self._check(name, model)
        if generator is None and negative is not None:
            raise ValueError("Pipeline: negative is a second generator for autoguidance, and there is no first")
        if self.statistics is not None:
            self.statistics.check(self.shape)
        self.fingerprint = weights_fingerprint(tokenizer, generator, negative, self.statistics)
        options: dict[str, Any] = {"precision": precision, "weights": weights, "reproducible": reproducible}
        self.tokenizer = prepare(tokenizer, **options)
        self.generator = None if generator is None else prepare(generator, **options)
        self.negative = None if negative is None else prepare(negative, **options)
        self.precision, self.reproducible = self.tokenizer.precision, reproducible

    def _check(self, name: str, generator: DiffusionTransformer) -> None:
        if not isinstance(generator, DiffusionTransformer):
            raise TypeError(f"Pipeline: {name} must be a SiT or LightningDiT, got {type(generator).__name__}")
        given = generator.config.shape
        if given != self.shape:
            raise ValueError(
                f"Pipeline: the {name} samples latents of shape {given}, the tokenizer decodes {self.shape} (tokens, "
                "channels): take a generator that was trained on this tokenizer's latents"
            )
        where = next(generator.parameters()).device
        if where != self.device:
            raise ValueError(f"Pipeline: the {name} is on {where}, the tokenizer on {self.device}; move one of them")
        if self.statistics is None:
            raise ValueError(
                "Pipeline: nothing says how the generator's latents are normalised, and without it samples decode to "
                f"noise. Give statistics=LatentStatistics.load(file), put one of {', '.join(STATISTICS)} beside the "
                "generator, set latent_mean and latent_std (vq_mean, vq_std) in the tokenizer's configuration, or pass "
                "LatentStatistics.identity() if it was trained on the latents as they are"
            )

    @classmethod
    def from_pretrained(
        cls,
        tokenizer: str | Path,
        generator: str | Path | None = None,
        *,
        negative: str | Path | None = None,
        statistics: str | Path | LatentStatistics | None = None,
        device: str | torch.device = "cpu",
        **options: Any,
    ) -> Pipeline:
        """Of checkpoints, as `MAETok.from_pretrained` takes them; the generator's kind is told from its keys.

        statistics: a file, or None: what lies beside the generator or in its checkpoint, else in the tokenizer's
        configuration. options: the constructor's. CheckpointError naming a file that cannot be used.
        """
        found: LatentStatistics | None
        if isinstance(statistics, LatentStatistics) or statistics is None:
            found = statistics
        else:
            found = LatentStatistics.load(statistics)
        stored = [None if source is None else Stored.read(source) for source in (generator, negative)]
        if found is None and generator is not None and stored[0] is not None:
            found = LatentStatistics.beside(generator, stored[0].content)
        models = [None if files is None else load_generator(files, device=device) for files in stored]
        del stored
        return cls(MAETok.from_pretrained(tokenizer, device=device), models[0], found, negative=models[1], **options)

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) in pixels that the tokenizer was trained at."""
        return self.tokenizer.config.size

    def encode(self, images: Tensor) -> Tensor:
        """images (B, 3, H, W) in [-1, 1] -> latents (B, L, C), normalised where statistics are known."""
        latents = self.tokenizer.encode(images.to(self.device))
        return latents if self.statistics is None else self.statistics.normalise(latents)

    def decode(self, latents: Tensor, size: int | tuple[int, int] | None = None) -> Tensor:
        """What `encode` or a generator gives (B, L, C) -> images (B, 3, height, width), about [-1, 1], not clamped."""
        if self.statistics is not None:
            latents = self.statistics.denormalise(latents)
        return self.tokenizer.decode(latents, size)

    def reconstruct(self, images: Tensor) -> Tensor:
        """images (B, 3, H, W) in [-1, 1] -> their reconstruction, of that shape."""
        images = images.to(self.device)
        return self.tokenizer.decode(self.tokenizer.encode(images), (images.shape[2], images.shape[3]))

    def generate(
        self, labels: Sequence[int | None], seeds: Sequence[int], *, batch: int = 8, **settings: Any
    ) -> Generated:
        """A picture for each label and seed; see `batches`, whose results these are together."""
        parts = list(self.batches(labels, seeds, batch=batch, **settings))
        images = np.concatenate([part.images for part in parts])
        return Generated(images, parts[0].nfe, sum(p.rows for p in parts), sum(p.seconds for p in parts))

    def batches(
        self, labels: Sequence[int | None], seeds: Sequence[int], *, batch: int = 8, **settings: Any
    ) -> Iterator[Batch]:
        """Pictures of labels (None: unconditional) and seeds, `batch` at a time, as they are made.

        settings: `diffusion.sample`'s steps, method, guidance, interval, guidance_channels, path, shift, tolerance ...
        An adaptive solver (dopri5) takes its steps for a batch together, and so gets one sample at a time.
        ValueError where labels and seeds do not pair up or the pipeline has no generator.
        """
        if self.generator is None:
            raise ValueError("Pipeline: there is no generator; give one to sample")
        if len(labels) != len(seeds) or not len(labels):
            raise ValueError(f"Pipeline: expected a label for each seed, got {len(labels)} and {len(seeds)}")
        if batch < 1:
            raise ValueError(f"Pipeline: batch must be at least 1, got {batch}")
        batch = 1 if settings.get("method") == "dopri5" else batch
        null = self.generator.config.num_classes
        if self.negative is not None:
            settings = settings | {"negative": self.negative}
        for start in range(0, len(labels), batch):
            here = slice(start, start + batch)
            y = torch.tensor([null if label is None else label for label in labels[here]], device=self.device)
            noise = SampleNoise(seeds[here])
            began = time.perf_counter()
            first = noise.first(self.shape, torch.float32, self.device)
            made = sample(self.generator, first, y, generator=noise, **settings)
            images = to_uint8(self.decode(made.latents))
            yield Batch(images, made.nfe, made.rows, time.perf_counter() - began, start)


def weights_fingerprint(*parts: nn.Module | LatentStatistics | None) -> str:
    """16 hex digits of names, shapes and about 64 numbers of every tensor: tells weights of one shape apart, in
    milliseconds."""
    digest = hashlib.sha256()
    for part in parts:
        if isinstance(part, LatentStatistics):
            tensors: dict[str, Tensor] = {"mean": part.mean, "std": part.std}
        else:
            tensors = {} if part is None else part.state_dict()
        digest.update(f"{len(tensors)};".encode())
        for name, tensor in tensors.items():
            few = tensor.detach().flatten()[:: max(1, tensor.numel() // 64)].to("cpu", torch.float64)
            digest.update(f"{name} {tuple(tensor.shape)}".encode() + few.numpy().tobytes())
    return digest.hexdigest()[:16]
