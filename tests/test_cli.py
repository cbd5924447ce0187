"""`maetok-fast`, and the optional packages behind it."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from maetok_fast import _optional, cli
from maetok_fast.kernels import ops


@pytest.fixture(autouse=True)
def _forget_probes() -> None:
    _optional.probe.cache_clear()


def test_doctor_reports_packages_and_the_backend_of_every_op() -> None:
    result = CliRunner().invoke(cli.app, ["doctor", "--json"])
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert {"maetok-fast", "torch", "device", "native library"} <= set(report["facts"])
    assert set(report["packages"]) == set(_optional.PACKAGES)
    for name, status in report["packages"].items():
        assert status["state"] == "found" or status["reason"], f"{name} is not found and nobody says why"
    assert set(report["ops"]) == set(ops())
    for devices in report["ops"].values():
        assert devices["cpu"][-1] == ["reference", None]


def test_doctor_prints_tables() -> None:
    result = CliRunner().invoke(cli.app, ["doctor"])
    assert result.exit_code == 0, result.output
    for word in ("torch", "native library", "rope_attention", "flash_attn"):
        assert word in result.output


def test_version_and_help_load_no_torch() -> None:
    code = (
        "import sys\nfrom maetok_fast import cli\n"
        "try:\n    cli.main(args=['--version'])\nexcept SystemExit as e:\n    assert not e.code\n"
        "assert 'torch' not in sys.modules and 'rich.console' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("maetok-fast ")


def test_missing_package_names_the_cure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        _optional.MissingPackage, match="lpips is needed for rFID and is not installed: pip install lpips"
    ):
        _optional.require("lpips", "rFID")


def fake_package(folder: Path, name: str, body: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / name).mkdir()
    (folder / name / "__init__.py").write_text(body)
    monkeypatch.syspath_prepend(folder)
    for loaded in [m for m in sys.modules if m == name or m.startswith(f"{name}.")]:
        monkeypatch.delitem(sys.modules, loaded)


def test_the_other_apex_is_recognised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_package(tmp_path, "apex", "raise AssertionError('must not be imported')", monkeypatch)
    status = _optional.probe("apex")
    assert status.state == "unusable"
    assert "unrelated web toolkit" in status.reason
    assert _optional.APEX_SOURCE in status.reason


def test_xformers_without_its_extensions_is_unusable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_package(tmp_path, "xformers", "__version__ = '0.0.1'", monkeypatch)
    (tmp_path / "xformers" / "_cpp_lib.py").write_text("_cpp_library_load_exception = OSError('no kernels')")
    status = _optional.probe("xformers")
    assert (status.state, status.reason) == ("unusable", "its compiled extensions do not load (no kernels)")
    for loaded in ("xformers._cpp_lib", "xformers"):
        sys.modules.pop(loaded, None)


def test_a_package_that_fails_to_import_is_unusable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    body = "raise RuntimeError('operator torchvision::nms does not exist')"
    fake_package(tmp_path, "torchvision", body, monkeypatch)
    assert "torchvision::nms" in _optional.probe("torchvision").reason
    with pytest.raises(_optional.MissingPackage, match="cannot be used here: importing it fails: RuntimeError"):
        _optional.require("torchvision")
