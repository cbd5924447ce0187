# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""The door that chooses backends, where no record is involved: libraries that do not import, what is no op."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from maetok_fast.kernels import BackendError, _dispatch, backend

SAYS = """
from maetok_fast.kernels import _triton, adaln
import torch
adaln(torch.zeros(1, 2, 8))
print(_triton.why_no_triton("cuda"))
"""


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("raise OSError('libcudart.so.12: cannot open shared object file')", "does not import .*libcudart.so.12"),
        ("raise ImportError('built for another Python')", "does not import .*built for another Python"),
        ("import a_module_that_is_not_there", "does not import .*a_module_that_is_not_there"),
    ],
)
def test_a_triton_that_does_not_import_is_left_unused(tmp_path: Path, body: str, reason: str) -> None:
    (tmp_path / "triton").mkdir()
    (tmp_path / "triton" / "__init__.py").write_text(body)
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "TRITON_INTERPRET": "0"}
    done = subprocess.run([sys.executable, "-c", SAYS], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    (line,) = done.stdout.splitlines()
    assert "Triton" in line
    assert re.search(reason, line)


def test_pick_takes_the_first_without_a_reason() -> None:
    reasons = {"a": "too wide", "b": None, "c": None}
    assert _dispatch.pick("it", "cpu", ["a", "b", "c"], reasons, reasons.get) == "b"
    assert _dispatch.pick("it", "cpu", ["a"], reasons, reasons.get) == "reference"
    assert _dispatch.pick("it", "cpu", [], reasons, reasons.get) == "reference"
    with backend("reference"):
        assert _dispatch.pick("it", "cpu", ["b"], reasons, reasons.get) == "reference"


def test_strict_mode_and_a_forced_backend_raise_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def why(name: str) -> str:
        return "too wide"

    with backend("native"), pytest.raises(BackendError, match=r"it: backend 'native' was forced .*too wide"):
        _dispatch.pick("it", "cpu", ["native"], ["native"], why)
    monkeypatch.setattr(_dispatch._State, "strict", True)
    with pytest.raises(BackendError, match=r"it: MAETOK_FAST_STRICT=1 .*\(native: too wide\)"):
        _dispatch.pick("it", "cpu", ["native"], ["native"], why)
    with pytest.raises(BackendError, match="no kernels for device meta"):
        _dispatch.pick("it", "meta", [], ["native"], why)
    assert _dispatch.pick("it", "cpu", ["native"], ["native"], lambda name: _dispatch.EMPTY) == "reference"
