# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""benchmarks/optimizer.py at tiny sizes: both sides make the same steps, and what is printed follows from samples."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).resolve().parent.parent))

from benchmarks import optimizer as benchmark

CPU = torch.device("cpu")
pytestmark = pytest.mark.usefixtures("one_thread")


def test_the_shapes_are_sit_ls_and_about_as_many_as_asked() -> None:
    assert benchmark.shapes(453_000_000)[:3] == [(3072, 1024), (3072,), (1024, 1024)]
    for params in (500_000, 100_000_000, 453_000_000):
        count = sum(torch.Size(shape).numel() for shape in benchmark.shapes(params))
        assert 0.9 < count / params < 1.15


def test_both_sides_step_alike_with_a_clip_and_a_copy() -> None:
    mine, other = (benchmark.Side(30_000, "bf16", CPU) for _ in range(2))
    ours, theirs = benchmark.ours(mine), benchmark.torchs(other)
    start = mine.params[0].detach().clone()
    for _ in range(3):
        ours[0]()
        theirs[benchmark.TORCH]()
    ours[1]()
    theirs[benchmark.TORCH_CLIP]()
    for a, b in zip((*mine.params, *mine.average), (*other.params, *other.average)):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)
    assert all(torch.equal(c, p.bfloat16()) for c, p in zip(mine.copy, mine.params))
    assert not torch.equal(mine.params[0], start)


def test_the_bytes_are_those_of_the_passes() -> None:
    plain, copied = benchmark.predicted(), benchmark.predicted(2)
    assert [plain[n] for n in (benchmark.OURS, benchmark.TORCH, benchmark.TORCH_CLIP)] == [36, 40, 48]
    assert [copied[n] for n in (benchmark.OURS, benchmark.TORCH, benchmark.TORCH_CLIP)] == [38, 46, 54]


def test_the_table_and_the_file_hold_ratios_of_pairs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seconds = {name: [1.0, 2.0, 4.0] for name in benchmark.predicted()} | {benchmark.TORCH: [3.0, 4.0, 16.0]}
    found = {"seconds": seconds, "parameters": 10**9, "tensors": 240}
    monkeypatch.setattr(benchmark, "measure", lambda args, device: found)
    benchmark.main(["--json", str(tmp_path / "optimizer.json")])
    lines = capsys.readouterr().out.splitlines()
    assert any("3.00 x  (quartiles 2.50 .. 3.50, 3 rounds; bytes alone 1.11)" in line for line in lines)
    assert next(line for line in lines if line.split()[:1] == ["ours"]).split()[-2:] == ["36", "18.0"]
    assert json.loads((tmp_path / "optimizer.json").read_text())["ratios"]["without clip"]["median"] == 3.0


def test_it_runs(capsys: pytest.CaptureFixture[str]) -> None:
    benchmark.main(["--params", "30k", "--seconds", "0.01", "--copy", "bf16"])
    printed = capsys.readouterr().out
    assert "240 tensors, fp32, copy bf16" in printed
    assert printed.count("torch / ours") == 2


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["--params", "many"], "--params: expects a number such as 100M, got 'many'"),
        (["--device", "tpu"], "unknown device"),
    ],
)
def test_wrong_arguments_end_in_one_line(given: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        benchmark.parse(given)
    printed = capsys.readouterr().err
    assert ended.value.code == 2
    assert words in printed
    assert printed.count("\n") == 1
