# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""Small caches, tokenizers and generator runs for the tests.

    python tests/generator_runs.py ranks FOLDER CACHE     two processes, whole and sharded

The last one forks, and so is a process of its own, as the runs of training_runs.py.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from maetok_fast.data.caches import WRITERS
from maetok_fast.models import LightningDiTConfig, MAETok, MAETokConfig, SiTConfig, ViTSize
from maetok_fast.training.configs import EMAConfig, LoopConfig, OptimizerConfig
from maetok_fast.training.generator_configs import GeneratorRun, LatentsConfig, LightningDiTRun, SiTRun

TOKENS, CHANNELS, CLASSES = 6, 8, 3


def write_cache(
    folder: Path, count: int = 24, shape: tuple[int, ...] = (TOKENS, CHANNELS), layout: str = "lightningdit"
) -> Path:
    """Latents around another value for each class; mirror images where the layout has them."""
    torch.manual_seed(0)
    folder.mkdir(parents=True)
    writer = WRITERS[layout](folder, folder.name)
    y = np.arange(count) % CLASSES
    z = 0.3 * torch.randn(count, *shape) + torch.from_numpy(y).float().view(-1, *(1,) * len(shape)) + 2
    if writer.kind.startswith("mean"):
        second = torch.full_like(z, 0.1 if writer.kind == "mean_std" else -4.0)
        z = torch.cat([z, second], dim=1)
    mirrored = z.flip(1) if writer.flips and writer.kind == "sample" else z.clone() if writer.flips else None
    writer.add(z, mirrored, y.astype(np.int64), [f"{i % CLASSES}/{i:03d}" for i in range(count)])
    writer.close()
    return folder


def small_generator(out: Path, cache: Path | str, kind: str = "sit", **loop: Any) -> GeneratorRun:
    """2 blocks of width 32 on 6 latents of width 8."""
    settings: dict[str, Any] = dict(  # noqa: C408
        steps=8, batch=4, log_every=2, picture_every=0, validate_every=0, checkpoint_every=4, keep=2,
        precision="fp32", device="cpu", tensorboard=False,
    )  # fmt: skip
    sizes: dict[str, Any] = {"channels": CHANNELS, "dim": 32, "depth": 4, "heads": 2, "num_classes": CLASSES}
    rest: dict[str, Any] = {
        "out": str(out),
        "data": LatentsConfig(cache=str(cache), workers=0, decoder="pil"),
        "optimizer": OptimizerConfig(learning_rate=1e-3, scaled=False, weight_decay=0.0, warmup=0, schedule="constant"),
        "ema": EMAConfig(decay=0.9),
        "loop": LoopConfig(**{**settings, **loop}),
    }
    if kind == "sit":
        return SiTRun(model=SiTConfig(tokens=TOKENS, **sizes), **rest)
    return LightningDiTRun(model=LightningDiTConfig(tokens=(4, 4), time="maetok", **sizes), **rest)


def small_tokenizer(folder: Path) -> Path:
    """Of 32 px images, with latents of the shape above."""
    torch.manual_seed(1)
    size = ViTSize(32, 2, 2)
    config = MAETokConfig(
        image_size=32, base_image_size=32, patch=8, num_latent_tokens=TOKENS, latent_dim=CHANNELS,
        encoder=size, decoder=size, latent_mean=0.1, latent_std=0.7,
    )  # fmt: skip
    MAETok(config).save_pretrained(folder)
    return folder


def of_images(run: GeneratorRun, images: Path, tokenizer: Path, **data: Any) -> GeneratorRun:
    return replace(run, tokenizer=str(tokenizer), data=replace(run.data, cache="", path=str(images), **data))


def ranks(folder: Path, cache: Path) -> None:
    """Runs of two processes: `two` under DDP, `sharded` under FSDP2."""
    from training_runs import bare, fork_ranks, wait

    from maetok_fast.training import build_generator

    bare()
    build_generator._flops = lambda *a: 0.0
    for name, parallel in (("two", "ddp"), ("sharded", "fsdp")):
        assert wait(fork_ranks(small_generator(folder / name, cache, parallel=parallel), 2)) == [0, 0]


if __name__ == "__main__":
    ranks(Path(sys.argv[2]), Path(sys.argv[3]))
