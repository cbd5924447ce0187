# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""The committed cost table: it obeys the rules, covers every launch, is what the compiler says today, and its gate
fails on a planted regression. The whole check is `python benchmarks/cost.py --check` (in CI)."""

from __future__ import annotations

import copy
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]
HAS_TRITON = importlib.util.find_spec("triton") is not None
needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")


@pytest.fixture(scope="module")
def cost() -> ModuleType:
    spec = importlib.util.spec_from_file_location("cost", ROOT / "benchmarks" / "cost.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["cost"] = module
    spec.loader.exec_module(module)
    return module


def test_the_stored_table_breaks_no_rule(cost: ModuleType) -> None:
    report = cost.load()
    assert cost.broken_rules(report) == []
    assert {row.arch for row in report.rows} == set(cost.ARCHS)
    assert {row.op for row in report.rows} >= {"rope_attention", "adaln", "gate_residual"}


def test_saving_and_loading_is_the_identity(cost: ModuleType, tmp_path: Path) -> None:
    report = cost.load()
    cost.save(report, tmp_path / "cost.json")
    assert cost.load(tmp_path / "cost.json") == report
    assert (tmp_path / "cost.json").read_text() == cost.TABLE.read_text()


def test_the_page_is_the_table(cost: ModuleType) -> None:
    assert cost.PAGE.read_text() == cost.markdown(cost.load())


@pytest.mark.parametrize(
    ("column", "change", "message"),
    [
        ("registers", lambda v: int(v * 1.2) + 1, "registers"),
        ("shared", lambda v: v * 2 + 1, "shared"),
        ("spill", lambda v: 64, "spill 0 -> 64"),
        ("mma", lambda v: 0, "tensor-core instructions"),
    ],
)
def test_a_planted_regression_fails_the_gate(cost: ModuleType, column: str, change: object, message: str) -> None:
    before = cost.load()
    now = copy.deepcopy(before)
    row = next(r for r in now.rows if r.mma and not r.spill)
    setattr(row, column, change(getattr(row, column)))  # type: ignore[operator]
    assert any(message in line and row.key in line for line in cost.regressions(now, before))
    assert cost.regressions(before, before) == []


def test_another_launch_fails_the_gate(cost: ModuleType) -> None:
    before = cost.load()
    now = copy.deepcopy(before)
    key = next(iter(now.launches))
    now.launches[key] += 1
    assert cost.regressions(now, before) == [f"{key}: launches {before.launches[key]} -> {now.launches[key]}"]


@needs_triton
def test_one_kernel_compiles_as_stored() -> None:
    """In its own process (the interpreter and the compiler cannot share one): the attention forward on sm_90."""
    script = (
        "import json, cost; report = cost.build(only='attention_fwd', archs=(90,)); "
        "print(json.dumps({'rules': cost.broken_rules(report), 'worse': "
        "[r for r in cost.regressions(report, cost.load()) if 'launches' not in r], 'rows': len(report.rows)}))"
    )
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT / "benchmarks", env=env, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr[-2000:]
    found = json.loads(run.stdout.strip().splitlines()[-1])
    assert found["rows"] >= 2
    assert found["rules"] == []
    assert found["worse"] == []
