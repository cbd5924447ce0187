# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""Checkpoints that a killed process, a full disk or a pulled plug cannot spoil.

checkpoints/.writing-0001000/   every rank writes its part, all is flushed to the disk
checkpoints/0001000/            ... and the folder is renamed: a folder with a step's name is whole
  tokenizer/                    the averaged tokenizer: MAETok.from_pretrained("<run>/checkpoints/0001000/tokenizer")
  networks.safetensors          all that is trained, as it is
  optimizer.safetensors         moments and step counts, by the parameters' names
  state.json                    step, world, and what the stage adds
  rank_00000.safetensors        generators of random numbers, one file a rank
checkpoints/best.json           {"step": 1000, "psnr": 24.3}: that folder is kept too
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from maetok_fast.models.checkpoints.files import settle
from maetok_fast.pipeline.run import write_json
from maetok_fast.training.world import World

__all__ = ["Checkpoints", "Kept", "TrainingError", "make_run_folder"]

_WRITING, _LEAVING = ".writing-", ".leaving-"


class TrainingError(RuntimeError):
    """A run that cannot go on; the message says why and what to do."""


def make_run_folder(folder: Path) -> None:
    """The folder, with a file written in it and taken away again. TrainingError where that is not possible."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".writable"
        probe.write_text("")
        probe.unlink()
    except OSError as error:
        raise TrainingError(f"cannot write to the run's folder {folder}: {error.strerror or error}") from error


class Kept:
    """The checkpoints in a run's folder, looked at."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def steps(self) -> list[int]:
        """Steps of the checkpoints that are there, ascending."""
        if not self.folder.is_dir():
            return []
        return sorted(int(p.name) for p in self.folder.iterdir() if re.fullmatch(r"\d{7,}", p.name) and p.is_dir())

    def path(self, step: int) -> Path:
        return self.folder / f"{step:07d}"

    def newest(self) -> Path | None:
        steps = self.steps()
        return self.path(steps[-1]) if steps else None

    def best(self) -> dict[str, Any]:
        """{"step", metric} of the best validation so far, {} where there is none."""
        try:
            found = json.loads((self.folder / "best.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) and isinstance(found.get("step"), int) else {}


class Checkpoints(Kept):
    """Those of the run that writes them. keep: how many of the newest stay, beside the best."""

    def __init__(self, folder: Path, keep: int, world: World) -> None:
        super().__init__(folder)
        self.keep, self.world = keep, world

    def clean(self) -> None:
        """Takes away what a killed process left half-written or half-deleted. Rank 0 calls it, before others look."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for left in (*self.folder.glob(f"{_WRITING}*"), *self.folder.glob(f"{_LEAVING}*")):
            if left.is_dir():
                shutil.rmtree(left, ignore_errors=True)
            else:
                left.unlink(missing_ok=True)

    def write(self, step: int, parts: Callable[[Path], None]) -> Path:
        """parts(folder), called on every rank, writes that rank's files. TrainingError, on all ranks, where one of them
        could not; earlier checkpoints are as they were."""
        final, folder = self.path(step), self.folder / f"{_WRITING}{step:07d}"
        problem = None
        if self.world.main:
            shutil.rmtree(folder, ignore_errors=True)
            problem = _tried(lambda: folder.mkdir(parents=True))
        self._agree(problem, folder, step)
        self._agree(_tried(lambda: parts(folder)), folder, step)
        if self.world.main:
            problem = _tried(lambda: self._publish(folder, final))
        self._agree(problem, folder, step)
        if self.world.main:
            self._tidy()
        return final

    def mark_best(self, step: int, **metrics: float) -> None:
        write_json(self.folder / "best.json", {"step": step, **metrics})
        self._tidy()

    def _agree(self, problem: str | None, folder: Path, step: int) -> None:
        """All ranks go on, or none."""
        problems = [p for p in self.world.gathered(problem) if p]
        if not problems:
            return
        if self.world.main:
            shutil.rmtree(folder, ignore_errors=True)
        steps = self.steps()
        left = f"checkpoint {steps[-1]} is intact" if steps else "there is no earlier one"
        raise TrainingError(
            f"cannot write checkpoint {step} to {self.folder}: {problems[0]}; {left}. Make room (or lower loop.keep) "
            "and start the same command again"
        )

    def _publish(self, folder: Path, final: Path) -> None:
        for path in folder.rglob("*"):
            (settle if path.is_file() else _flush)(path)
        _flush(folder)
        if final.exists():  # of a run that was cut back by hand
            self._remove(final)
        os.rename(folder, final)
        _flush(self.folder)

    def _tidy(self) -> None:
        kept = {*self.steps()[-self.keep :], self.best().get("step")}
        for step in self.steps():
            if step not in kept:
                self._remove(self.path(step))

    def _remove(self, path: Path) -> None:
        """Its name goes first: a folder with a step's name is always whole."""
        leaving = path.with_name(_LEAVING + path.name)
        os.rename(path, leaving)
        shutil.rmtree(leaving, ignore_errors=True)


def _tried(work: Callable[[], Any]) -> str | None:
    """None, or why it went wrong. safetensors reports a full disk as an error of its own."""
    try:
        work()
    except Exception as error:
        return f"{getattr(error, 'strerror', None) or error}"
    return None


def _flush(folder: Path) -> None:
    """Waits until the names in it are on disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def save_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    from safetensors.torch import save_file

    save_file(tensors, path)


def load_tensors(path: Path) -> dict[str, Tensor]:
    """TrainingError where the file is missing or damaged."""
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except Exception as error:  # OSError, SafetensorError
        raise TrainingError(
            f"cannot read {path}: {error}; remove that checkpoint's folder to go on from the one before"
        ) from error
