# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""A run of many pictures as files: stopped anywhere, shared by processes, resumed; and the commands that make one."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from maetok_fast.cli import app
from maetok_fast.kernels import _native
from maetok_fast.pipeline import Pipeline, RunError, SamplingRun, seed_of
from maetok_fast.pipeline.run import equal_labels, random_labels, write_grid, write_npz

LABELS = [0, 1, 2, None, 4, 5, 6, 7, 8, 9, 0]
SETTINGS: dict[str, Any] = {"steps": 2, "method": "euler"}


@pytest.fixture(scope="module", autouse=True)
def _one_thread(one_thread: None) -> None:
    pass


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.png"))}


def complete(run: SamplingRun, pipeline: Pipeline) -> dict[str, bytes]:
    run.begin()
    run.finish(run.make(pipeline))
    return files(run.out)


own_bits = pytest.mark.skipif(
    _native.why_missing() is not None, reason="bits that depend on no other row need the native library"
)


class Killed(BaseException):
    """As SIGKILL: nothing handles it."""


@own_bits
def test_files_are_the_pipelines_pictures(pipeline: Pipeline, tmp_path: Path) -> None:
    run = SamplingRun(tmp_path / "a", LABELS, 5, SETTINGS, {"weights": pipeline.fingerprint}, batch=4)
    made = complete(run, pipeline)
    seeds = [seed_of(5, i) for i in range(len(LABELS))]
    want = pipeline.generate(LABELS, seeds, **SETTINGS).images
    assert set(made) == {f"{i:06d}.png" for i in range(len(LABELS))} | {"grid.png"}
    for i, image in enumerate(want):
        assert np.array_equal(np.asarray(Image.open(run.path(i))), image)
    with np.load(tmp_path / "a.npz") as archive:
        assert np.array_equal(archive["arr_0"], want)
        assert archive["arr_1"].tolist() == [0, 1, 2, -1, 4, 5, 6, 7, 8, 9, 0]
    record = json.loads((tmp_path / "a" / "run.json").read_text())
    assert record["cost"]["images"] == len(LABELS)
    assert record["cost"]["nfe"] == 2
    assert record["cost"]["rows"] == 2 * len(LABELS)
    assert record["asked"]["settings"] == SETTINGS
    assert not list(tmp_path.glob("**/.writing-*"))


@own_bits
@pytest.mark.parametrize("stop", [0, 1, 5, 10])
def test_a_run_that_was_killed_goes_on(stop: int, pipeline: Pipeline, tmp_path: Path) -> None:
    """Nothing finished is made again, nothing half-written is taken for a picture, and the files are the same."""
    whole = complete(SamplingRun(tmp_path / "whole", LABELS, 5, SETTINGS, batch=4), pipeline)
    run = SamplingRun(tmp_path / "stopped", LABELS, 5, SETTINGS, batch=1)
    run.begin()
    count = 0

    def done(more: int) -> None:
        nonlocal count
        count += more
        if count > stop:
            raise Killed

    with pytest.raises(Killed):
        run.make(pipeline, done)
    (run.out / ".writing-abc").write_bytes(b"half a picture")
    with pytest.raises(RunError, match=r"of 11 samples are missing; run it again") if stop < 10 else nullcontext():
        run.finish({"images": 0, "seconds": 0.0})
    before = {name: (run.out / name).stat().st_mtime_ns for name in files(run.out) if name != "grid.png"}
    assert len(before) == stop + 1
    again = replace(run, batch=3)
    again.begin()
    assert len(again.missing()) == len(LABELS) - stop - 1
    assert not (run.out / ".writing-abc").exists()
    assert complete(again, pipeline) == whole
    assert all((run.out / name).stat().st_mtime_ns == at for name, at in before.items())
    assert again.make(pipeline)["images"] == 0


@own_bits
@pytest.mark.parametrize("processes", [2, 3, 20])
def test_any_number_of_processes(processes: int, pipeline: Pipeline, tmp_path: Path) -> None:
    whole = complete(SamplingRun(tmp_path / "one", LABELS, 5, SETTINGS, batch=4), pipeline)
    runs = [
        SamplingRun(tmp_path / "many", LABELS, 5, SETTINGS, None, 4, process, processes) for process in range(processes)
    ]
    for run in runs:
        run.begin()
    costs = [run.make(pipeline) for run in reversed(runs)]
    assert sum(cost["images"] for cost in costs) == len(LABELS)
    runs[0].finish(costs[-1])
    assert files(tmp_path / "many") == whole
    assert (tmp_path / "many.npz").read_bytes() == (tmp_path / "one.npz").read_bytes()


def test_folders_of_something_else(pipeline: Pipeline, tmp_path: Path) -> None:
    run = SamplingRun(tmp_path / "a", LABELS, 5, SETTINGS, {"weights": "abc"}, batch=2)
    run.begin()
    assert not (tmp_path / "a" / "run.json").exists(), "what fails before its first picture leaves no record"
    run.make(pipeline)
    others = {
        "global_seed: 5 there, 6 asked for": replace(run, global_seed=6),
        "labels_sha256": replace(run, labels=LABELS[::-1]),
        "samples: 11 there, 10 asked for": replace(run, labels=LABELS[:10]),
        '"steps": 2': replace(run, settings={"steps": 3, "method": "euler"}),
        'weights: "abc" there, "abd" asked for': replace(run, about={"weights": "abd"}),
    }
    for text, other in others.items():
        with pytest.raises(RunError, match="holds another run") as caught:
            other.begin()
        assert text in str(caught.value)
    replace(run, batch=1, process=1, processes=2).begin()
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "000000.png").touch()
    with pytest.raises(RunError, match=r"pictures but no run\.json"):
        replace(run, out=tmp_path / "b").begin()
    (tmp_path / "a" / "run.json").write_text("[]")
    with pytest.raises(RunError, match="is not the record of a run"):
        run.begin()
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match="cannot be made"):
        replace(run, out=tmp_path / "file").begin()


def test_labels() -> None:
    equal = equal_labels(25, 10)
    assert sorted(equal.count(c) for c in range(10)) == [2] * 5 + [3] * 5
    drawn = random_labels(10_000, 10, 3)
    assert drawn == random_labels(10_000, 10, 3) != random_labels(10_000, 10, 4)
    assert all(850 < drawn.count(c) < 1150 for c in range(10))


def test_npz_and_grid_of_odd_counts(tmp_path: Path) -> None:
    paths = []
    for i in range(5):
        paths.append(tmp_path / f"{i}.png")
        Image.fromarray(np.full((300, 200, 3), 40 * i, dtype=np.uint8)).save(paths[-1])
    write_npz(tmp_path / "x.npz", paths, [1, None, 3, 4, 5])
    with np.load(tmp_path / "x.npz") as archive:
        assert archive["arr_0"].shape == (5, 300, 200, 3)
        assert archive["arr_0"][:, 7, 9, 1].tolist() == [0, 40, 80, 120, 160]
        assert archive["arr_1"].tolist() == [1, -1, 3, 4, 5]
    for count in (1, 2, 5):
        write_grid(tmp_path / "grid.png", paths[:count], [f"class {i}" for i in range(count)])
        sheet = np.asarray(Image.open(tmp_path / "grid.png"))
        for i in range(count):
            assert (sheet == 40 * i).all(-1).sum() > 0.9 * 128 * 192 or i == 0
    Image.fromarray(np.zeros((3, 3, 3), dtype=np.uint8)).save(paths[4])
    with pytest.raises(RunError, match="do not fit together"):
        write_npz(tmp_path / "y.npz", paths, [0] * 5)
    assert not (tmp_path / "y.npz").exists()


# ---- the commands


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("weights")
    done = CliRunner().invoke(app, ["demo-weights", str(folder)])
    assert done.exit_code == 0, done.output
    return folder


def command(weights: Path, out: Path, *more: str) -> list[str]:
    models = ["--generator", str(weights / "generator"), "--tokenizer", str(weights / "tokenizer")]
    return ["sample", *models, "--out", str(out), "--precision", "fp32", *more]


def test_sample(weights: Path, tmp_path: Path) -> None:
    asked = command(
        weights, tmp_path / "a", "--classes", "3,7,none", "--per-class", "2", "--steps", "2", "--cfg-scale", "2"
    )
    done = CliRunner().invoke(app, asked)
    assert done.exit_code == 0, done.output
    assert "6 of 6 samples made, NFE 2" in done.output
    assert len(files(tmp_path / "a")) == 7
    with np.load(tmp_path / "a.npz") as archive:
        assert archive["arr_1"].tolist() == [3, 3, 7, 7, -1, -1]
    again = CliRunner().invoke(app, asked)
    assert again.exit_code == 0, again.output
    assert "6 samples were there" in again.output
    fid = command(
        weights, tmp_path / "b", "--num-fid-samples", "13", "--mode", "ode", "--solver", "heun", "--steps", "2"
    )
    done = CliRunner().invoke(app, fid)
    assert done.exit_code == 0, done.output
    assert "NFE 3" in done.output
    with np.load(tmp_path / "b.npz") as archive:
        assert archive["arr_1"].tolist() == [*range(10), 0, 1, 2]


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ([], "give either --classes"),
        (["--classes", "1", "--num-fid-samples", "3"], "give either --classes"),
        (["--classes", "1,10"], "'10' is no class: expected numbers from 0 to 9"),
        (["--classes", "cat"], "'cat' is no class"),
        (["--classes", "1", "--path-type", "curved"], "curved"),
        (["--classes", "1", "--guidance-low", "0.9", "--guidance-high", "0.1"], "low <= high"),
        (["--classes", "1", "--precision", "fp7"], "fp7"),
        (["--classes", "1", "--mode", "ode", "--solver", "meanflow"], "for models of average velocities"),
        (["--classes", "1", "--internal-guidance", "2"], "this PreparedGenerator has none"),
        (["--classes", "1", "--temperature", "0.5"], "takes no beta"),
        (["--classes", "1", "--timestep-shift", "much"], "expected a number or auto, got 'much'"),
        (["--classes", "1", "--statistics", "nothing.pt"], "nothing.pt: no such file"),
        (["--classes", "1", "--generator", "nothing"], "nothing: no such file or directory"),
        (["--classes", "1", "--autoguidance", "nothing", "--cfg-scale", "2"], "nothing: no such file or directory"),
    ],
)
def test_what_sample_refuses(more: list[str], said: str, weights: Path, tmp_path: Path) -> None:
    done = CliRunner().invoke(app, command(weights, tmp_path / "a", *more))
    assert done.exit_code == 2, done.output
    assert said in done.output
    assert "Traceback" not in done.output
    assert not list(tmp_path.glob("a/*.png"))


def test_few_steps_internal_guidance_and_other_conventions(weights: Path, tmp_path: Path) -> None:
    def settings(name: str, *more: str) -> dict[str, Any]:
        asked = command(weights, tmp_path / name, "--classes", "1,2", *more)
        asked[2] = str(weights / "few-step")
        done = CliRunner().invoke(app, asked)
        assert done.exit_code == 0, done.output
        record = json.loads((tmp_path / name / "run.json").read_text())
        return record["asked"]["settings"] | {"nfe": record["cost"]["nfe"]}

    few = settings("few", "--mode", "ode", "--solver", "meanflow", "--steps", "2")
    assert (few["method"], few["nfe"]) == ("meanflow", 2)
    inner = settings("inner", "--steps", "3", "--internal-guidance", "1.5", "--internal-high", "0.7")
    assert (inner["internal"], inner["internal_interval"]) == (1.5, [0.0, 0.7])
    pictures = [np.asarray(Image.open(tmp_path / name / "000000.png")).astype(int) for name in ("few", "inner")]
    plain = settings("plain", "--steps", "3")
    assert "internal" not in plain
    pictures.append(np.asarray(Image.open(tmp_path / "plain" / "000000.png")).astype(int))
    assert min(np.abs(a - b).max() for a, b in itertools.combinations(pictures, 2)) > 2
    other = settings("other", "--steps", "2", "--convention", "data1", "--guidance-low", "0.125", "--cfg-scale", "2",
                     "--timestep-shift", "0.25")  # fmt: skip
    assert (other["interval"], other["shift"]) == ([0.0, 0.875], 4.0)
    auto = settings("auto", "--steps", "2", "--convention", "data1", "--timestep-shift", "auto")
    assert auto["shift"] == pytest.approx((16 * 8 / 4096) ** 0.5)


@own_bits
def test_torchrun_makes_the_same_files(weights: Path, tmp_path: Path) -> None:
    """And a run that was killed with all its processes goes on under one."""
    sampling = ["--num-fid-samples", "40", "--steps", "3"]
    done = CliRunner().invoke(app, command(weights, tmp_path / "one", *sampling))
    assert done.exit_code == 0, done.output
    script = "from maetok_fast.cli import main; main()"
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--no-python"]
    launch += ["--master-port", str(20_000 + os.getpid() % 20_000), sys.executable, "-c", script]
    asked = command(weights, tmp_path / "two", *sampling, "--batch", "3")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    killed = subprocess.Popen([*launch, *asked], env=environment, start_new_session=True, stderr=subprocess.DEVNULL)
    while not list((tmp_path / "two").glob("0*.png")) and killed.poll() is None:
        time.sleep(0.05)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.wait()
    done_now = subprocess.run([*launch, *asked], env=environment, capture_output=True, text=True)
    assert done_now.returncode == 0, done_now.stderr[-2000:]
    assert files(tmp_path / "two") == files(tmp_path / "one")
    assert (tmp_path / "two.npz").read_bytes() == (tmp_path / "one.npz").read_bytes()
