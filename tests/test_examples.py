# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""The examples run as their docstrings say."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from maetok_fast.kernels._triton import why_no_triton

ROOT = Path(__file__).resolve().parent.parent
TOY = "examples/add_an_op.py"


def run(*command: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, *command],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    return done.stdout


@pytest.mark.skipif(why_no_triton("cpu") is not None, reason=str(why_no_triton("cpu")))
def test_an_op_in_one_file_is_tested_timed_and_costed(tmp_path: Path) -> None:
    """60 lines at most, and nothing else touched: the suite, the op benchmark and the cost report read the record."""
    assert len((ROOT / TOY).read_text().splitlines()) <= 60
    suite = run("-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/test_ops.py", "--op-file", TOY)
    counts = dict(reversed(part.split()[:2]) for part in suite.splitlines()[-1].replace("=", "").split(", "))
    assert int(counts["passed"]) >= 20
    assert "failed" not in counts
    times = tmp_path / "times.json"
    command = ("-c", "from maetok_fast.cli import main; main()", "bench", "ops", "--op-file", TOY)
    run(*command, "--quick", "--no-compile", "--json", str(times))
    rows = json.loads(times.read_text())["rows"]
    assert {row["op"] for row in rows} == {"silu_residual"}
    table = run("benchmarks/cost.py", "--op-file", TOY, TRITON_INTERPRET="0")
    assert "silu_residual_kernel" in table


def test_labels_to_a_png(tmp_path: Path) -> None:
    script = ROOT / "examples" / "sample_to_png.py"
    assert len(script.read_text().splitlines()) <= 60
    done = subprocess.run([sys.executable, str(script)], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "3 pictures, NFE 99" in done.stdout
    with Image.open(tmp_path / "samples.png") as image:
        assert image.size == (3 * 64, 64)
        pixels = np.asarray(image)
    assert len({pixels[:, i : i + 64].tobytes() for i in (0, 64, 128)}) == 3


def test_a_vit_is_accelerated() -> None:
    """Where timm is installed: swapped, the same features, a line with both times; else a sentence."""
    script = "examples/accelerate_a_vit.py"
    assert len((ROOT / script).read_text().splitlines()) < 60
    said = run(script, "vit_tiny_patch16_224", "1", OMP_NUM_THREADS="1")
    if importlib.util.find_spec("timm") is None:
        assert said == "timm is not installed: pip install timm\n"
        return
    assert "12 x Block -> " in said
    assert re.search(r"vit_tiny_patch16_224, 1 images: before \d+ ms, after \d+ ms, \d+\.\d\d x", said)
    error = re.search(r"features differ by (\S+) of their size", said)
    assert error is not None
    assert float(error[1]) < 1e-5


def test_masks_and_hog_in_a_tokenizer_of_ones_own() -> None:
    script = "examples/mask_and_hog.py"
    assert len((ROOT / script).read_text().splitlines()) < 60
    found = re.fullmatch(r"40 steps, 40 averages: loss (\S+) -> (\S+)\n", run(script, OMP_NUM_THREADS="1"))
    assert found is not None
    assert float(found[2]) < 0.8 * float(found[1])
