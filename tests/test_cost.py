# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""The committed cost table: it obeys the rules, covers every launch, is what the compiler says today, and its gate
fails on a planted regression. The whole check is `python benchmarks/cost.py --check` (in CI)."""

from __future__ import annotations

import copy
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parents[1]))

from benchmarks import _cost_table, _nvcc

ROOT = Path(__file__).resolve().parents[1]
HAS_TRITON = importlib.util.find_spec("triton") is not None
needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")


def test_the_stored_table_breaks_no_rule() -> None:
    report = _cost_table.load()
    assert _cost_table.broken_rules(report) == []
    assert {row.arch for row in report.rows} == set(_cost_table.ARCHS)
    assert {row.op for row in report.rows} >= {"rope_attention", "adaln", "gate_residual"}


def test_saving_and_loading_is_the_identity(tmp_path: Path) -> None:
    report = _cost_table.load()
    _cost_table.save(report, tmp_path / "cost.json")
    assert _cost_table.load(tmp_path / "cost.json") == report
    assert (tmp_path / "cost.json").read_text() == _cost_table.TABLE.read_text()


def test_the_page_is_the_table() -> None:
    assert _cost_table.PAGE.read_text() == _cost_table.markdown(_cost_table.load())


@pytest.mark.parametrize(
    ("column", "change", "message"),
    [
        ("registers", lambda v: int(v * 1.2) + 1, "registers"),
        ("shared", lambda v: v * 2 + 1, "shared"),
        ("spill", lambda v: 64, "spill 0 -> 64"),
        ("mma", lambda v: 0, "tensor-core instructions"),
    ],
)
def test_a_planted_regression_fails_the_gate(column: str, change: object, message: str) -> None:
    before = _cost_table.load()
    now = copy.deepcopy(before)
    row = next(r for r in now.rows if r.mma and not r.spill)
    setattr(row, column, change(getattr(row, column)))  # type: ignore[operator]
    assert any(message in line and row.key in line for line in _cost_table.regressions(now, before))
    assert _cost_table.regressions(before, before) == []


def test_another_launch_fails_the_gate() -> None:
    before = _cost_table.load()
    now = copy.deepcopy(before)
    key = next(iter(now.launches))
    now.launches[key] += 1
    assert _cost_table.regressions(now, before) == [f"{key}: launches {before.launches[key]} -> {now.launches[key]}"]


PTXAS = """
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_ZN2mf30_GLOBAL__N__1a2b3c4d_8_blur_cu15blur_bwd_kernelIf13__nv_bfloat16EEvPKT_l' for 'sm_80'
ptxas info    : Function properties for _ZN2mf30_GLOBAL__N__1a2b3c4d_8_blur_cu15blur_bwd_kernelIf13__nv_bfloat16EEvPKT_l
    8 bytes stack frame, 4 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 40 registers, used 1 barriers, 8 bytes cumulative stack size, 384 bytes smem
ptxas info    : Compile time = 3.1 ms
ptxas info    : Compiling entry function '_Z5plainPf' for 'sm_100'
ptxas info    : Function properties for _Z5plainPf
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 8 registers, used 0 barriers
"""  # noqa: E501


def test_what_ptxas_prints_becomes_rows() -> None:
    first, second = _nvcc.parse_ptxas(PTXAS, "blur")
    assert first == _cost_table.Row(first.launch, "blur", "backward", 80, registers=40, spill=16, shared=384)
    assert (second.direction, second.arch, second.registers, second.spill) == ("forward", 100, 8, 0)
    assert first.cuda
    if shutil.which("c++filt"):
        assert second.launch == "plain [CUDA C++]"
    rules = _cost_table.broken_rules(_cost_table.Report("3", [first, second]))
    assert rules == [f"{first.key}: spills 16 bytes"]


def test_without_nvcc_the_stored_cuda_rows_stand_unchecked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    row = _cost_table.Row("plain_kernel [CUDA C++]", "plain", "forward", 90, registers=8)
    _cost_table.save(_cost_table.Report("3", [row], nvcc="13.0"), tmp_path / "cost.json")
    monkeypatch.setattr(_nvcc, "TABLE", tmp_path / "cost.json")
    monkeypatch.setattr(_nvcc, "find_nvcc", lambda: None)
    stored = _cost_table.load
    monkeypatch.setattr(_nvcc, "load", lambda: stored(tmp_path / "cost.json"))
    report = _cost_table.Report("4")
    _nvcc.add_cuda(report, lambda line: None, "", (90,))
    assert report.rows == [row]
    assert report.nvcc == "13.0"
    assert "nvcc was not found" in report.unchecked
    assert _cost_table.regressions(report, stored(tmp_path / "cost.json")) == []


def test_a_cuda_source_that_does_not_compile_breaks_a_rule(tmp_path: Path) -> None:
    nvcc = _nvcc.find_nvcc()
    if nvcc is None:
        pytest.skip("nvcc was not found")
    source = tmp_path / "wrong.cu"
    source.write_text("__global__ void k() { undeclared(); }\n")
    rows = _nvcc.compile_cuda(source, nvcc, (90,))
    assert [row.arch for row in rows] == [90]
    (rule,) = _cost_table.broken_rules(_cost_table.Report("3", rows))
    assert "wrong.cu" in rule
    assert "does not compile" in rule


def test_the_table_holds_every_cuda_source() -> None:
    report = _cost_table.load()
    if not report.nvcc:
        pytest.skip("the stored table was written without nvcc")
    sources = {p.stem for p in (ROOT / "csrc" / "cuda").glob("*.cu") if "__global__" in p.read_text()} - {"info"}
    assert {row.op for row in report.rows if row.cuda} == sources


@needs_triton
def test_every_row_of_the_tile_table_is_reached() -> None:
    """By a real sample or by one of `extra_samples`, in a process of its own; a row that none reaches is named."""
    script = (
        "from benchmarks import cost; "
        "from maetok_fast.kernels import _tiles; reached = set(); "
        "[cost.record(arch, reached=reached) for arch in cost.ARCHS]; print(cost.missed_tiles(reached)); "
        "_tiles.ATTENTION_TILES['fwd', 2, 999, True] = {80: 0}; print(cost.missed_tiles(reached))"
    )
    missed, planted = run_in_benchmarks(script)
    assert missed == "[]"
    assert "('fwd', 2, 999, True, 80): no sample reaches it" in planted


def run_in_benchmarks(script: str) -> list[str]:
    """The lines that a script printed which may import benchmarks, in a process that compiles"""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.append({str(ROOT)!r}); {script}"],
        cwd=ROOT / "benchmarks",
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    return run.stdout.strip().splitlines()


@needs_triton
def test_one_kernel_compiles_as_stored() -> None:
    """In its own process (the interpreter and the compiler cannot share one): the attention forward on sm_90."""
    script = (
        "import json; from benchmarks import cost; "
        "report, stored = cost.build(only='attention_fwd', archs=(90,)), cost.load(); "
        "known = {row.key for row in stored.rows}; report.rows = [row for row in report.rows if row.key in known]; "
        "print(json.dumps({'rules': cost.broken_rules(report), 'worse': "
        "[r for r in cost.regressions(report, stored) if 'launches' not in r], 'rows': len(report.rows)}))"
    )
    found = json.loads(run_in_benchmarks(script)[-1])
    assert found["rows"] >= 2
    assert found["rules"] == []
    assert found["worse"] == []
