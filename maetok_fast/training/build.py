# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""A configuration made into a run: models, data, stage, loop.

Run (runs.py) ── train: folder, models (make_stage), data ── Loop.fit ── the newest checkpoint, report.html
"""

from __future__ import annotations

import contextlib
import logging
import os
import subprocess
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from maetok_fast import config
from maetok_fast.bench.machine import describe
from maetok_fast.config import ConfigError
from maetok_fast.data.sources import Source, open_source
from maetok_fast.models import MAETok
from maetok_fast.precision import resolve, to_fp8
from maetok_fast.training.checkpoints import Checkpoints, Kept, TrainingError, make_run_folder, write_json, write_text
from maetok_fast.training.configs import Run
from maetok_fast.training.tokenizer import TokenizerStage
from maetok_fast.training.world import World, local_batch

__all__ = ["make_stage", "make_tokenizer", "train"]

log = logging.getLogger("maetok_fast")

# what a run that goes on may change: how far and where it runs and what it shows, but not what it computes
_CHANGEABLE = (
    "out", "data.path", "data.workers", "data.decoder", "data.max_unreadable", "data.validation", "loss.vgg",
    "data.validation_images", "teachers.weights", "loop.steps", "loop.device", "loop.log_every", "loop.picture_every",
    "loop.validate_every", "loop.checkpoint_every", "loop.keep", "loop.max_bad_steps", "loop.tensorboard",
    "loop.accumulate", "loop.parallel", "loop.compile", "loop.checkpointing", "start", "adversarial.weights",
)  # fmt: skip


def make_tokenizer(run: Run) -> MAETok:
    """The model of `run.model`, with `run.start`'s weights where it is given. ConfigError where they do not fit."""
    torch.manual_seed(run.loop.seed)
    model = MAETok(run.model)
    if not run.start:
        return model
    source = _newest_of(run.start)
    other = MAETok.from_pretrained(source)
    try:
        model.load_state_dict(_resized(model, other.state_dict()))
    except RuntimeError as error:
        lines = str(error).splitlines()
        raise ConfigError(f"start={run.start} does not fit model: {' '.join(lines[1:2]).strip()}") from None
    return model


def _newest_of(start: str) -> str:
    """A run's folder stands for its best checkpoint, or its newest."""
    folder = Path(start) / "checkpoints"
    if not folder.is_dir():
        return start
    there = Kept(folder)
    best = there.best().get("step")
    found = there.path(best) if best in there.steps() else there.newest()
    if found is None:
        raise ConfigError(f"start={start}: this run has no checkpoint yet")
    return str(found / "tokenizer")


def _resized(model: MAETok, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Learned positions resampled where the resolution differs, as the model itself does for another grid."""
    from maetok_fast.positions import resample_grid

    own = model.state_dict()
    state = dict(state)
    for half in ("encoder", "decoder"):
        name = f"{half}.model.pos_embed"
        if name in state and name in own and state[name].shape != own[name].shape:
            old, new = state[name], getattr(model, half).model.grid
            side = int((old.shape[1] - 1) ** 0.5)
            patches = resample_grid(old[:, 1:], (side, side), new)
            state[name] = torch.cat([old[:, :1], patches], dim=1)
        for key in ("freqs_t_x", "freqs_t_y"):
            if f"{half}.{key}" in own:
                state[f"{half}.{key}"] = own[f"{half}.{key}"]
    return state


def make_stage(run: Run, device: torch.device) -> TokenizerStage:
    """The stage with every network that it needs, and none that it does not. Errors name a weight that is missing and
    how to get it."""
    precision = resolve(run.loop.precision, device)
    if precision.name == "fp16":
        raise ConfigError("loop.precision=fp16: its gradients would need loss scaling; use bf16, or auto")
    tokenizer = make_tokenizer(run)
    if precision.name == "fp8":
        log.info("%s", to_fp8(tokenizer))
    torch.manual_seed(run.loop.seed + 1)
    return TokenizerStage(run, tokenizer, precision, _targets(run, device), _perceptual(run), _discriminator(run))


def _size(run: Run) -> int:
    """Pixels of a training image. ConfigError where a patch does not divide one of the resolutions."""
    size = run.data.size or max(run.model.size)
    for side in run.data.sizes or (size,):
        for patch in (run.model.patch, run.model.out_patch):
            if side < 1 or side % patch:
                raise ConfigError(f"data.size, data.sizes: {side} px is no multiple of the model's patch of {patch} px")
    return size


@contextlib.contextmanager
def _keyed(key: str) -> Iterator[None]:
    """Weights that are missing are told with the run's own key for them."""
    try:
        yield
    except ValueError as error:  # TeacherError, CheckpointError
        raise ConfigError(f"{error} (in a run: {key})") from None


def _targets(run: Run, device: torch.device) -> Any:
    from maetok_fast.training.targets import Targets

    if not run.auxiliary.targets:
        return None
    with _keyed("teachers.weights.<target>"):
        return Targets.create(
            run.auxiliary.targets,
            weights=run.teachers.weights,
            image_size=max(run.model.size),
            precision=run.teachers.precision,
            statistics=run.teachers.statistics,
            device=device,
            patch=run.model.patch,
        )


def _perceptual(run: Run) -> nn.Module | None:
    if run.loss.perceptual == 0:
        return None
    from maetok_fast.models.perceptual import LPIPS

    with _keyed("loss.vgg and loss.heads"):
        return LPIPS(run.loss.vgg, run.loss.heads)


def _discriminator(run: Run) -> nn.Module | None:
    if run.adversarial.weight == 0 or run.adversarial.start >= run.loop.steps:
        return None
    from maetok_fast.models.discriminators import create_discriminator

    kind = run.adversarial.discriminator
    options: dict[str, Any] = {}
    if kind == "dino":
        options["weights"] = run.adversarial.weights
    if kind == "stylegan":
        options["size"] = _size(run)
    with _keyed("adversarial.weights"):
        return create_discriminator(kind, **options)


def train(run: Run, *, quiet: bool = False) -> Path:
    """Trains until `run.loop.steps`; returns the newest checkpoint's folder. Called in every process of the run.

    ConfigError, DataError, CheckpointError and TrainingError say in a sentence what has to be changed.
    """
    from maetok_fast.data.loader import Batches
    from maetok_fast.data.views import View
    from maetok_fast.training.loop import Loop
    from maetok_fast.training.observe import Observer
    from maetok_fast.training.report import write_report

    if not run.out:
        raise ConfigError("out: say in which folder the run shall be kept, out=runs/mine")
    if not run.data.path:
        raise ConfigError("data.path: say where the images are: a folder, a list of files (.txt) or webdataset tars")
    world = World(run.loop.device, run.loop.parallel)
    try:
        out, batch = Path(run.out), local_batch(run.loop.batch, world.size, run.loop.accumulate)
        source, size = open_source(run.data.path), _size(run)
        _prepare_folder(run, out, world)
        stage = make_stage(run, world.device)
        view = View(size, run.data.crop, run.data.low, run.data.high, flip=run.data.flip)

        def batches(start: int, unreadable: dict[str, str]) -> Batches:
            return Batches(
                source, view, batch, seed=run.loop.seed, rank=world.rank, world=world.size, step=start,
                sizes=run.data.sizes, workers=run.data.workers, decoder=run.data.decoder, device=world.device,
                max_unreadable=run.data.max_unreadable, log=out / "unreadable.jsonl",
                unreadable=unreadable, captions="caption" in run.auxiliary.targets,
            )  # fmt: skip

        examples = _examples(run, source, size, world)
        settings = _shown(run, stage, size, world, quiet)

        def observer(step: int) -> Observer:
            return Observer(out, start_step=step, **settings)

        validation = bool(run.data.validation)
        newest = Loop(run, stage, world, batches, examples, validation, observer, source.fingerprint()).fit()
        if world.main:
            write_report(out)
        world.barrier()
        return newest
    finally:
        world.close()


def _examples(run: Run, source: Source, size: int, world: World) -> Callable[[], Iterator[Tensor]]:
    """The validation images, or the first of the training's; as many batches on every rank, since sharded models are
    called by all of them. Files that cannot be read are passed over, and told once."""
    from maetok_fast.data.loader import validation_batches
    from maetok_fast.training.observe import COLUMNS

    shown = open_source(run.data.validation) if run.data.validation else source
    count = min(len(shown), run.data.validation_images if run.data.validation else COLUMNS * world.size)
    if count < world.size:
        raise ConfigError(f"data.validation={run.data.validation}: {count} image(s) for {world.size} processes")
    told: set[str] = set()

    def passed_over(name: str, reason: str) -> None:
        if name not in told:
            told.add(name)
            log.warning("validation image %s is passed over: %s", name, reason)

    def examples() -> Iterator[Tensor]:
        found = validation_batches(
            shown, size, "center", COLUMNS, count // world.size * world.size, rank=world.rank, world=world.size,
            passed_over=passed_over,
        )  # fmt: skip
        return (batch.images for batch in found)

    return examples


def _shown(run: Run, stage: TokenizerStage, size: int, world: World, quiet: bool) -> dict[str, Any]:
    """What the observer has to know; FLOPs are counted before anything is sharded, the peak is measured once."""
    from maetok_fast.training.flops import model_flops
    from maetok_fast.training.observe import peak_flops

    flops = peak = None
    if world.main:
        dropped = (run.mask.low + run.mask.high) / 2 if run.mask.mode == "drop" else 0.0
        flops = model_flops(stage.model, size, dropped=dropped, teachers=run.auxiliary.targets)
        peak = peak_flops(world.device, stage.precision.name)
    return {
        "total_steps": run.loop.steps,
        "images_per_step": run.loop.batch,
        "devices": world.size,
        "flops_per_image": flops,
        "peak_flops": peak,
        "quiet": quiet,
        "main": world.main,
        "tensorboard": run.loop.tensorboard,
    }


def _prepare_folder(run: Run, out: Path, world: World) -> None:
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


def _same_run(run: Run, out: Path) -> None:
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
