# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""`maetok-fast cache-latents`: what it says, what it refuses, and SIGKILL to all of its processes."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from typer.testing import CliRunner

from maetok_fast.cli import app
from maetok_fast.data.sources import open_source
from maetok_fast.kernels import _native
from maetok_fast.models import MAETok
from maetok_fast.pipeline import EncodingRun
from maetok_fast.pipeline.demo import demo_tokenizer

N, SHARD = 160, 4

own_bits = pytest.mark.skipif(
    _native.why_missing() is not None, reason="bits that depend on no other row need the native library"
)


@pytest.fixture(scope="module", autouse=True)
def _one_thread(one_thread: None) -> None:
    pass


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("weights")
    demo_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    pixels = np.random.default_rng(0).integers(0, 256, (N, 70, 80, 3), dtype=np.uint8)
    for i, image in enumerate(pixels):
        Image.fromarray(image).save(folder / f"{i:03d}.png")
    return folder


@pytest.fixture(scope="module")
def undisturbed(weights: Path, images: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of one process that nobody stopped."""
    out, tokenizer = tmp_path_factory.mktemp("whole"), MAETok.from_pretrained(weights)
    run = EncodingRun(out, tokenizer, open_source(images), precision="fp32", shard=SHARD, workers=0)
    run.begin()
    run.finish(run.make())
    return files(out)


def files(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir()) if p.name != "cache.json"}


def command(weights: Path, images: Path, out: Path, *more: str) -> list[str]:
    places = ["--tokenizer", str(weights), "--data", str(images), "--out", str(out)]
    return ["cache-latents", *places, "--precision", "fp32", "--workers", "0", "--shard", str(SHARD), *more]


def launched(asked: list[str]) -> list[subprocess.Popen[str]]:
    """Two processes as torchrun starts them, each with its workers in a group of its own: what is killed is dead.
    (torchrun's are in sessions of their own, and outlive it when it is killed.)"""
    script = "from maetok_fast.cli import main; main()"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    return [
        subprocess.Popen(
            [sys.executable, "-c", script, *asked],
            env={**os.environ, **meeting, "RANK": str(rank)},
            start_new_session=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]


@own_bits
def test_processes_that_were_killed_go_on(
    weights: Path, images: Path, undisturbed: dict[str, bytes], tmp_path: Path
) -> None:
    """SIGKILL to two processes and their workers, in the middle; two new ones end it: the bytes of one process that
    nobody disturbed."""
    out = tmp_path / "two"
    asked = command(weights, images, out, "--batch", "2", "--workers", "1")
    killed = launched(asked)
    while not list(out.glob("*.safetensors")) and all(process.poll() is None for process in killed):
        time.sleep(0.01)
    for process in killed:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    said = [process.communicate() for process in killed]
    assert [process.returncode for process in killed] == [-signal.SIGKILL] * 2, said
    left = [name for name in files(out) if name.startswith("latents_rank")]
    assert 0 < len(left) < N // SHARD
    assert json.loads((out / "cache.json").read_text())["complete"] is False
    said = [process.communicate(timeout=120) for process in launched(asked)]
    assert f"{N - SHARD * len(left)} of {N} images encoded" in said[0][0], said[0][1][-2000:]
    assert files(out) == undisturbed


def test_the_command(weights: Path, images: Path, undisturbed: dict[str, bytes], tmp_path: Path) -> None:
    asked = command(weights, images, tmp_path / "a")
    done = CliRunner().invoke(app, asked)
    assert done.exit_code == 0, done.output
    assert f"{N} of {N} images encoded" in done.output
    assert "images/s, fp32 as fp32" in done.output
    if _native.why_missing() is None:
        assert files(tmp_path / "a") == undisturbed
    before = (tmp_path / "a" / "cache.json").read_bytes()
    again = CliRunner().invoke(app, asked)
    assert again.exit_code == 0, again.output
    assert f"{N} images were there" in again.output
    assert (tmp_path / "a" / "cache.json").read_bytes() == before
    refused = CliRunner().invoke(app, [*asked, "--no-flips"])
    assert refused.exit_code == 2
    assert "flips: true there, false asked for" in refused.output
    few = CliRunner().invoke(app, command(weights, images, tmp_path / "b", "--limit", "5", "--dtype", "bf16"))
    assert few.exit_code == 0, few.output
    stored = [load_file(path)["latents"] for path in sorted((tmp_path / "b").glob("*.safetensors"))]
    assert [(len(latents), latents.dtype) for latents in stored] == [(4, torch.bfloat16), (1, torch.bfloat16)]


def test_what_the_command_refuses(weights: Path, images: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    wrong = {
        "cannot be made": command(weights, images, tmp_path / "file" / "a"),
        "is no tar": command(weights, tmp_path / "file", tmp_path / "a"),
        "no such file or directory": command(tmp_path / "nothing", images, tmp_path / "a"),
        "fp7": command(weights, images, tmp_path / "a", "--precision", "fp7"),
    }
    for said, asked in wrong.items():
        done = CliRunner().invoke(app, asked)
        assert done.exit_code == 2, done.output
        assert said in done.output
        assert "Traceback" not in done.output
        assert not list(tmp_path.glob("a/*.safetensors"))


def test_a_full_disk_is_one_sentence(weights: Path, images: Path, tmp_path: Path) -> None:
    """A limit on the size of files stands for it: the same calls fail."""
    script = "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))\n"
    script += "from maetok_fast.cli import main; main()"
    asked = command(weights, images, tmp_path / "a")
    done = subprocess.run([sys.executable, "-c", script, *asked], capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert "shard000.safetensors: cannot be written" in last
    assert "make room and run again" in last
    assert "Traceback" not in done.stderr
    assert not list((tmp_path / "a").glob("*.safetensors"))
    assert not list((tmp_path / "a").glob(".writing-*"))
