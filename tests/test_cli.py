# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""`maetok-fast`, and the optional packages behind it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from maetok_fast import _optional, cli
from maetok_fast.kernels import _native, _processor, ops


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


ENDINGS = {
    "an error of its binary half": ("raise RuntimeError('operator torchvision::nms does not exist')", "RuntimeError"),
    "SystemExit": ("raise SystemExit(3)", "SystemExit: 3"),
    "sys.exit without a word": ("import sys; sys.exit()", "SystemExit: no message"),
    "a missing library": ("raise ImportError('libcudart.so.12: cannot open')", "ImportError: libcudart.so.12"),
    "a missing dependency": ("import no_such_module_anywhere", "ModuleNotFoundError: No module named"),
    "a class beside Exception": ("class E(BaseException): pass\nraise E('odd')", "E: odd"),
    "no text": ("class E(Exception):\n    def __str__(self): return 1\nraise E", "E: no message"),
    "GeneratorExit": ("raise GeneratorExit", "GeneratorExit"),
    "a syntax error": ("def f(:", "SyntaxError"),
}


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("name", ["torchvision", "cupy"])
def test_however_an_import_ends_doctor_says_so(
    name: str, ending: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    body, message = ENDINGS[ending]
    fake_package(tmp_path, name, body, monkeypatch)
    status = _optional.probe(name)
    assert status.state == "unusable"
    assert status.reason.startswith("importing it fails: ")
    assert message in status.reason


def test_a_broken_parent_package_is_unusable_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_package(tmp_path, "nvidia", "raise SystemExit('no GPU, no import')", monkeypatch)
    assert "no GPU, no import" in _optional.probe("nvidia.dali").reason


def test_ctrl_c_during_an_import_ends_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_package(tmp_path, "cupy", "raise KeyboardInterrupt", monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        _optional.probe("cupy")


def run(code: str, *, switch: str, **environment: str) -> subprocess.CompletedProcess[str]:
    clean = {k: v for k, v in os.environ.items() if k not in LIMITS}
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        capture_output=True,
        text=True,
        check=False,
        env={**clean, "MAETOK_FAST_CPU": switch, **environment},
    )


LIMITS = ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS", "ATEN_CPU_CAPABILITY", "MAETOK_FAST_CPU")
DOCTOR = "from maetok_fast.cli import main; main(args=['doctor', '--json'])"


@pytest.mark.parametrize(
    ("switch", "message"),
    [("axv2", "is no instruction set: expected one of v2, avx2, avx512"), ("amx", "asks for more")],
)
def test_an_impossible_switch_is_refused_and_shown(switch: str, message: str) -> None:
    if switch == "amx" and _native.own_level() == "amx":
        pytest.skip("this processor has the highest level")
    done = run(DOCTOR, switch=switch)
    assert done.returncode == 1, done.stderr
    report = json.loads(done.stdout)
    assert message in report["refused"]
    assert report["facts"]["native library"] == report["refused"]
    use = "import torch\nfrom maetok_fast.kernels import adaln\nadaln(torch.zeros(1, 2, 8))"
    done = run(use, switch=switch)
    assert "ValueError: MAETOK_FAST_CPU=" in done.stderr
    assert message in done.stderr
    assert run("import maetok_fast.kernels, maetok_fast.precision", switch=switch).returncode == 0


@pytest.mark.skipif(_native.own_level() not in _processor.LEVELS, reason="the levels are those of x86-64")
def test_doctor_shows_what_each_library_may_use() -> None:
    done = run(DOCTOR, switch="v2", MAETOK_FAST_STRICT="1")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    facts, switches = report["facts"], report["switches"]
    own = _native.own_level()
    assert facts["processor"] == (own if own == "v2" else f"{own}, held to v2 by MAETOK_FAST_CPU")
    assert facts["oneDNN"].startswith("may use v2; fp32 linear layers: ")
    assert "bf16 linear layers: there are no bfloat16" in facts["oneDNN"]
    assert facts["torch's loops"] == "DEFAULT"
    assert facts["bf16"].startswith("oneDNN may use v2 here")
    assert "x of fp32's time" in facts["bf16"]
    assert facts["precision auto"].startswith(("fp32 on cpu: oneDNN may use v2", "bf16 on cuda"))
    assert switches["MAETOK_FAST_CPU"].startswith("v2: ")
    assert switches["ONEDNN_MAX_CPU_ISA"].startswith("SSE41: ")
    assert switches["MAETOK_FAST_STRICT"].startswith("1: ")
