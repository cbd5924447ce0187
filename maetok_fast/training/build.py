# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""A configuration made into a run: folder, parts (build_tokenizer.py, build_generator.py), loop.

Run (runs.py) ── train: folder, parts, ── Loop.fit ── the newest checkpoint, report.html
"""

from __future__ import annotations

import logging
import os
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

from maetok_fast import config
from maetok_fast.bench.machine import describe
from maetok_fast.config import ConfigError
from maetok_fast.pipeline.run import write_json, write_text
from maetok_fast.training.checkpoints import Checkpoints, Kept, TrainingError, make_run_folder
from maetok_fast.training.configs import TokenizerRun
from maetok_fast.training.generator_configs import GeneratorRun
from maetok_fast.training.parts import Parts
from maetok_fast.training.world import World, local_batch

__all__ = ["TrainingRun", "train"]

log = logging.getLogger("maetok_fast")

TrainingRun = TokenizerRun | GeneratorRun

# what a run that goes on may change: how far and where it runs and what it shows, but not what it computes
_CHANGEABLE = (
    "out", "data.path", "data.workers", "data.decoder", "data.max_unreadable", "data.validation", "loss.vgg",
    "data.validation_images", "teachers.weights", "loop.steps", "loop.device", "loop.log_every", "loop.picture_every",
    "loop.validate_every", "loop.checkpoint_every", "loop.keep", "loop.max_bad_steps", "loop.tensorboard",
    "loop.accumulate", "loop.parallel", "loop.compile", "loop.recompute", "loop.checkpointing", "start",
    "adversarial.weights", "data.cache", "preview", "tokenizer", "metrics",
)  # fmt: skip


def train(run: TrainingRun, *, quiet: bool = False) -> Path:
    """Trains until `run.loop.steps`; returns the newest checkpoint's folder. Called in every process of the run.

    ConfigError, DataError, CacheError, CheckpointError and TrainingError say in a sentence what has to be changed.
    """
    from maetok_fast.training.loop import Loop
    from maetok_fast.training.observe import Observer
    from maetok_fast.training.report import write_report

    if not run.out:
        raise ConfigError("out: say in which folder the run shall be kept, out=runs/mine")
    world = World(run.loop.device, run.loop.parallel)
    try:
        out = Path(run.out)
        local_batch(run.loop.batch, world.size, run.loop.accumulate)  # its check, before anything is read
        parts = _parts(run, world, out)
        settings = _shown(run, parts, world, quiet)

        def observer(step: int) -> Observer:
            return Observer(out, start_step=step, **settings)

        newest = Loop(run, parts.stage, world, parts.batches, observer, parts.fingerprint).fit()
        if world.main:
            write_report(out)
        world.barrier()
        return newest
    finally:
        world.close()


def _parts(run: TrainingRun, world: World, out: Path) -> Parts:
    """Data first, then the folder, then networks: what is cheap to find wrong is found before anything is written, and
    a folder of another run before gigabytes are read."""

    def ready() -> None:
        _prepare_folder(run, out, world)

    if isinstance(run, GeneratorRun):
        from maetok_fast.training.build_generator import generator_parts

        return generator_parts(run, world, out, ready)
    from maetok_fast.training.build_tokenizer import tokenizer_parts

    return tokenizer_parts(run, world, out, ready)


def _shown(run: TrainingRun, parts: Parts, world: World, quiet: bool) -> dict[str, Any]:
    """What the observer has to know; FLOPs are counted before anything is sharded, the peak is measured once."""
    from maetok_fast.training.observe import peak_flops

    flops = peak = None
    if world.main:
        flops, peak = parts.flops(), peak_flops(world.device, parts.stage.precision.name)
    return {
        "total_steps": run.loop.steps,
        "images_per_step": run.loop.batch,
        "devices": world.size,
        "flops_per_image": flops,
        "peak_flops": peak,
        "quiet": quiet,
        "main": world.main,
        "tensorboard": run.loop.tensorboard,
        "session": {
            "images_per_step": run.loop.batch,
            "images_per_epoch": parts.images,
            "metrics": None if parts.stage.online is None else parts.stage.online.about,
        },
    }


def _prepare_folder(run: TrainingRun, out: Path, world: World) -> None:
    """The folder with config.yaml and environment.json; a run that is there already must be the same one."""
    problem = None
    if world.main:
        try:
            make_run_folder(out)
            Checkpoints(out / "checkpoints", run.loop.keep, world).clean()
            _same_run(run, out)
            write_text(out / "config.yaml", config.to_yaml(run))
            write_json(out / "environment.json", environment(world))
        except (ConfigError, TrainingError) as error:
            problem = error
        except OSError as error:
            problem = TrainingError(f"cannot write to the run's folder {out}: {error.strerror or error}")
    told = next((p for p in world.gathered(None if problem is None else str(problem)) if p), None)
    if told is not None:
        raise TrainingError(told) if problem is None else problem


def _same_run(run: TrainingRun, out: Path) -> None:
    path = out / "config.yaml"
    if not path.is_file() or not Kept(out / "checkpoints").steps():
        return
    before = config.read(type(run)(), config.read_yaml(path))
    changed = {k: v for k, v in config.differences(before, run).items() if not k.startswith(_CHANGEABLE)}
    if changed:
        key, (old, new) = next(iter(changed.items()))
        more = f" (and {', '.join(list(changed)[1:4])})" if len(changed) > 1 else ""
        raise ConfigError(
            f"{out} holds a run with {key}={old!r}, and this one has {new!r}{more}: what it computes cannot change "
            f"on the way; take the old values, or another folder with out=... and start={out}"
        )


def environment(world: World) -> dict[str, Any]:
    """Versions, the state of the repository that the command runs in, the machine, the processes."""
    versions = {}
    for name in ("maetok-fast", "torch", "numpy", "accelerate", "torchvision", "timm", "nvidia-dali-cuda130", "triton"):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return {
        "versions": versions,
        "git": _git(),
        "machine": describe(world.device),
        "processes": world.size,
        "variables": {k: v for k, v in sorted(os.environ.items()) if k.startswith(("MAETOK_FAST_", "OMP_", "NCCL_"))},
    }


def _git() -> dict[str, Any]:
    """Of the folder that the package lies in; {} where that is no repository."""
    here = Path(__file__).resolve().parent

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(here), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        return {"commit": git("rev-parse", "HEAD"), "changed": bool(git("status", "--porcelain"))}
    except (OSError, subprocess.SubprocessError):
        return {}
