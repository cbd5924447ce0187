# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""benchmarks/gmm.py at tiny sizes: both sides make the same pass, and what is printed follows from samples."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

sys.path.append(str(Path(__file__).resolve().parent.parent))

from benchmarks import gmm as benchmark

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("covariance", benchmark.COVARIANCES)
@pytest.mark.parametrize("kind", benchmark.KINDS)
def test_both_sides_make_the_same_pass(kind: str, covariance: str) -> None:
    pytest.importorskip("sklearn")
    sides = benchmark.passes(benchmark.rows_of(kind, 2000, 12, 5), 5, covariance)
    assert benchmark.same(sides) < 1e-6
    with pytest.raises(AssertionError, match="not the same pass"):
        benchmark.same(sides | {benchmark.OURS: lambda: (1.0, sides[benchmark.THEIRS]()[1])})


def test_rows_are_the_same_in_every_run() -> None:
    one, two = (benchmark.rows_of("apart", 50, 6, 3) for _ in range(2))
    np.testing.assert_array_equal(one, two)
    assert not np.array_equal(one, benchmark.rows_of("alike", 50, 6, 3))


def test_the_table_and_the_file_hold_ratios_of_pairs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def found(count: int, dim: int, modes: int, kind: str, covariance: str, seconds: float) -> dict[str, Any]:
        times = {
            "ours": [1.0, 2.0, 4.0],
            "scikit-learn": [3.0, 8.0, 20.0],
            "fp32 product": [0.1],
            "fp64 product": [0.2],
        }
        what = {"rows": count, "dim": dim, "modes": modes, "kind": kind, "covariance": covariance}
        return what | {"seconds": times, "difference": 1e-8}

    monkeypatch.setattr(benchmark, "measure", found)
    benchmark.main(["--rows", "1M", "--sizes", "100x50", "--kinds", "alike", "--json", str(tmp_path / "gmm.json")])
    full, diagonal = (line for line in capsys.readouterr().out.splitlines() if "100 x 50" in line)
    assert "4.00 x (3.50 .. 4.50, 3 rounds)" in full
    assert full.split()[3:10] == ["alike", "full", "2000.0", "8000.0", "2000.0", "1000.0", "250.0"]
    assert diagonal.split()[3:10] == ["alike", "diag", "2000.0", "8000.0", "40.0", "20.0", "5.0"]
    results = json.loads((tmp_path / "gmm.json").read_text())["results"]
    assert [result["ratio"]["median"] for result in results] == [4.0, 4.0]


def test_it_runs(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("sklearn")
    benchmark.main(["--rows", "400", "--sizes", "5x3", "--seconds", "0.01"])
    printed = capsys.readouterr().out
    assert printed.count("5 x 3") == 4


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["--sizes", "64by20"], "--sizes: expects DIMENSIONSxMODES, such as 64x20,256x100, got '64by20'"),
        (["--rows", "10"], "--rows: 10 are fewer than modes"),
    ],
)
def test_wrong_arguments_end_in_one_line(given: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        benchmark.parse(given)
    assert ended.value.code == 2
    assert words in capsys.readouterr().err
