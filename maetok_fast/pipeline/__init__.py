# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""Tokenizer, generator and latent statistics together: labels and seeds in, pictures out (`Pipeline`), a run of many
pictures as files (`SamplingRun`), and of many images as a cache of latents (`EncodingRun`)."""

from __future__ import annotations

from maetok_fast.pipeline.encoding import EncodingRun
from maetok_fast.pipeline.noise import SampleNoise, seed_of
from maetok_fast.pipeline.pipeline import Batch, Generated, Pipeline
from maetok_fast.pipeline.run import RunError, SamplingRun
from maetok_fast.pipeline.statistics import LatentStatistics

__all__ = [
    "Batch",
    "EncodingRun",
    "Generated",
    "LatentStatistics",
    "Pipeline",
    "RunError",
    "SampleNoise",
    "SamplingRun",
    "seed_of",
]
