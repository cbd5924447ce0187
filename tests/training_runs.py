# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""Small runs and images for the tests of training, and runs of several processes that can be killed.

    python tests/training_runs.py crash FOLDER     ten kills of a run of two processes, and one that nobody disturbs

Processes are forked from one that has imported everything and computed nothing (OpenMP's threads do not survive a
fork), so that a run of two ranks starts in a tenth of a second.
"""

from __future__ import annotations

import os
import random
import signal
import socket
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from maetok_fast.models import MAETokConfig, ViTSize
from maetok_fast.training.configs import (
    AdversarialConfig,
    AuxiliaryConfig,
    DataConfig,
    EMAConfig,
    LoopConfig,
    LossConfig,
    OptimizerConfig,
    TokenizerRun,
)


def write_images(folder: Path, count: int = 24, side: int = 40, seed: int = 0) -> Path:
    """Smooth coloured pictures as PNG, each another one."""
    from PIL import Image

    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:side, 0:side] / side
    for i in range(count):
        waves = rng.uniform(1, 4, (3, 2))
        phases = rng.uniform(0, 6, 3)
        pixels = [127 + 120 * np.sin(6.28 * (a * x + b * y) + p) for (a, b), p in zip(waves, phases)]
        Image.fromarray(np.stack(pixels, -1).astype(np.uint8)).save(folder / f"{i:03d}.png")
    return folder


def small_run(out: Path, images: Path, **loop: Any) -> TokenizerRun:
    """32 px, everything that a run can have at a size that takes milliseconds; no downloads."""
    size = ViTSize(32, 2, 2)
    model = MAETokConfig(
        image_size=32, base_image_size=32, patch=8, num_latent_tokens=6, latent_dim=8, encoder=size, decoder=size,
        encoder_drop_path=0.1, decoder_drop_path=0.1,
    )  # fmt: skip
    settings: dict[str, Any] = dict(  # noqa: C408
        steps=12, batch=4, log_every=2, picture_every=0, validate_every=0, checkpoint_every=4, keep=2,
        precision="fp32", device="cpu", tensorboard=False,
    )  # fmt: skip
    return TokenizerRun(
        out=str(out),
        model=model,
        data=DataConfig(path=str(images), workers=0, decoder="pil"),
        auxiliary=AuxiliaryConfig(targets=("hog",), size=ViTSize(32, 1, 2)),
        loss=LossConfig(perceptual=0.0),
        adversarial=AdversarialConfig(start=5, discriminator="maskbit"),
        optimizer=OptimizerConfig(learning_rate=1e-3, scaled=False, warmup=3),
        ema=EMAConfig(decay=0.9),
        loop=LoopConfig(**{**settings, **loop}),
    )


def bare(patch: Any = setattr) -> None:
    """Runs without what only people look at: FLOPs, the machine's peak and the report take seconds."""
    from maetok_fast.training import flops, observe, report

    patch(flops, "model_flops", lambda *a, **k: 0)
    patch(observe, "peak_flops", lambda *a, **k: None)
    patch(report, "write_report", lambda folder: None)


# ---- several processes ---------------------------------------------------------------------------------------------


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def fork_ranks(run: TokenizerRun, world: int) -> list[int]:
    """One process a rank, as torchrun would have started them; their numbers."""
    port, found = free_port(), []
    for rank in range(world):
        child = os.fork()
        if child:
            found.append(child)
            continue
        status = 1
        try:
            os.environ |= {
                "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world),
                "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
            }  # fmt: skip
            import torch

            torch.set_num_threads(1)
            from maetok_fast.training.build import train

            train(run, quiet=True)
            status = 0
        except BaseException as error:
            print(f"rank {rank}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
        finally:
            os._exit(status)
    return found


def wait(children: list[int]) -> list[int]:
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def kill(children: list[int]) -> None:
    for child in children:
        os.kill(child, signal.SIGKILL)
    wait(children)


def crash(folder: Path, kills: int = 10, seed: int = 0) -> None:
    """The same run twice: `whole` undisturbed, `killed` killed `kills` times, while its two
    processes start, train, and write a checkpoint. Prints at which checkpoints it was left, and how."""
    import maetok_fast.training.build  # noqa: F401

    bare()
    images = write_images(folder / "images")
    run = small_run(folder / "whole", images, steps=60, checkpoint_every=4, log_every=8)
    assert wait(fork_ranks(run, 2)) == [0, 0]
    run, rng, left = replace(run, out=str(folder / "killed")), random.Random(seed), []
    checkpoints = folder / "killed" / "checkpoints"

    def newest() -> int:
        return max([int(p.name) for p in checkpoints.glob("[0-9]*")], default=0)

    for turn in range(kills):
        before, begun, children = newest(), time.perf_counter(), fork_ranks(run, 2)
        how = ("starting", "training", "writing", "training", "writing")[turn % 5]
        while how != "starting" and newest() == before and time.perf_counter() < begun + 60:
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 1.0 if how == "starting" else 0.1))
        while how == "writing" and not any(checkpoints.glob(".writing-*")) and time.perf_counter() < begun + 60:
            time.sleep(0.0002)
        time.sleep(rng.uniform(0, 0.01))
        kill(children)
        left.append(f"{how} {newest()}")
    print("killed while", ", ".join(left), flush=True)
    assert newest() < 60, "the run had ended before the last kill"
    assert wait(fork_ranks(run, 2)) == [0, 0]


if __name__ == "__main__":
    crash(Path(sys.argv[2]))
