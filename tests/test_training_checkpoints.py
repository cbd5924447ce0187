# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""maetok_fast.training.checkpoints: a folder with a step's name is whole, whatever happened."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from maetok_fast.training import checkpoints as module
from maetok_fast.training.checkpoints import Checkpoints, TrainingError, load_tensors, make_run_folder, save_tensors


class Alone:
    """One process."""

    rank, size, main = 0, 1, True

    def gathered(self, value: Any) -> list[Any]:
        return [value]


class Second(Alone):
    """What rank 0 of two sees, whose other rank reports a problem."""

    size = 2

    def __init__(self, problem: str | None) -> None:
        self.problem = problem

    def gathered(self, value: Any) -> list[Any]:
        return [value, self.problem]


def of(folder: Path, keep: int = 2, world: Any = None) -> Checkpoints:
    return Checkpoints(folder / "checkpoints", keep, world or Alone())


def write(where: Checkpoints, step: int) -> Path:
    return where.write(step, lambda folder: save_tensors(folder / "networks.safetensors", {"x": torch.tensor([step])}))


def test_the_newest_stay_and_the_best_beside_them(tmp_path: Path) -> None:
    kept = of(tmp_path)
    for step in (10, 20, 30, 40):
        write(kept, step)
        if step == 10:
            kept.mark_best(10, psnr=20.0)
    assert kept.steps() == [10, 30, 40]
    assert kept.best() == {"step": 10, "psnr": 20.0}
    kept.mark_best(40, psnr=21.0)
    assert kept.steps() == [30, 40]
    assert kept.newest() == tmp_path / "checkpoints" / "0000040"
    assert load_tensors(kept.path(40) / "networks.safetensors")["x"].item() == 40


def test_what_was_being_written_is_no_checkpoint(tmp_path: Path) -> None:
    kept = of(tmp_path)
    write(kept, 10)
    half = tmp_path / "checkpoints" / ".writing-0000020"
    half.mkdir()
    (half / "networks.safetensors").write_bytes(b"half")
    (tmp_path / "checkpoints" / ".leaving-0000005").mkdir()
    assert kept.newest() == kept.path(10)
    kept.clean()
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["0000010"]


@pytest.mark.parametrize("where", ["parts", "rename"])
def test_a_full_disk_leaves_the_old_checkpoint(tmp_path: Path, where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = of(tmp_path)
    write(kept, 10)
    full = OSError(28, "No space left on device")

    def raises(*a: Any, **k: Any) -> Any:
        raise full

    with monkeypatch.context() as patched:
        if where == "parts":
            patched.setattr(module, "save_tensors", raises)
            part = lambda folder: module.save_tensors(folder / "networks.safetensors", {})  # noqa: E731
        else:
            patched.setattr(os, "rename", raises)
            part = lambda folder: (folder / "x").write_text("x")  # noqa: E731
        with pytest.raises(TrainingError) as error:
            kept.write(20, part)
    assert "cannot write checkpoint 20" in str(error.value)
    assert "No space left on device; checkpoint 10 is intact" in str(error.value)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["0000010"]
    assert load_tensors(kept.path(10) / "networks.safetensors")["x"].item() == 10


def test_a_rank_that_cannot_write_stops_all_of_them(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="quota exceeded; there is no earlier one"):
        write(of(tmp_path, world=Second("quota exceeded")), 10)
    assert of(tmp_path).steps() == []
    assert write(of(tmp_path, world=Second(None)), 10).is_dir()


def test_a_full_device_is_reported_by_the_system_too(tmp_path: Path) -> None:
    """/dev/full takes no byte: the error is the operating system's own."""
    if not Path("/dev/full").exists():
        pytest.skip("this system has no /dev/full")
    kept = of(tmp_path)
    write(kept, 10)
    with pytest.raises(TrainingError, match="No space left on device"):
        kept.write(20, lambda folder: Path("/dev/full").write_text("x"))
    assert kept.steps() == [10]


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(TrainingError, match=r"cannot write to the run's folder .*file"):
        make_run_folder(tmp_path / "file" / "run")


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "networks.safetensors"
    save_tensors(path, {"x": torch.zeros(100)})
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(TrainingError, match=r"cannot read .*networks\.safetensors.*go on from the one before"):
        load_tensors(path)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"step": "x"}'])
def test_a_damaged_note_of_the_best_counts_as_none(tmp_path: Path, text: str) -> None:
    kept = of(tmp_path)
    write(kept, 10)
    (tmp_path / "checkpoints" / "best.json").write_text(text)
    assert kept.best() == {}
    write(kept, 20)
    kept.mark_best(20, psnr=1.0)
    assert kept.best() == {"step": 20, "psnr": 1.0}


def test_writing_a_step_again_replaces_it(tmp_path: Path) -> None:
    kept = of(tmp_path)
    write(kept, 10)
    kept.write(10, lambda folder: save_tensors(folder / "networks.safetensors", {"x": torch.tensor([11])}))
    assert load_tensors(kept.path(10) / "networks.safetensors")["x"].item() == 11
