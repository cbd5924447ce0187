# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""kill -9: a run of two processes, killed ten times, ends bit for bit like one that nobody disturbed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist


@pytest.mark.skipif(not (hasattr(os, "fork") and dist.is_available() and dist.is_gloo_available()), reason="needs gloo")
def test_a_run_that_was_killed_ends_like_one_that_was_not(tmp_path: Path) -> None:
    script = Path(__file__).parent / "training_runs.py"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MAETOK_FAST_TUNE": "0"}
    done = subprocess.run(
        [sys.executable, str(script), "crash", str(tmp_path)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("writing") == 4
    whole, killed = (tmp_path / name / "checkpoints" / "0000060" for name in ("whole", "killed"))
    files = sorted(p.relative_to(whole) for p in whole.rglob("*") if p.is_file())
    assert len(files) >= 9
    assert files == sorted(p.relative_to(killed) for p in killed.rglob("*") if p.is_file())
    assert [str(f) for f in files if (whole / f).read_bytes() != (killed / f).read_bytes()] == []
