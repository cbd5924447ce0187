# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""The benchmark of latent caches: both sides write the same latents, and what it prints and refuses."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

sys.path.append(str(Path(__file__).resolve().parent.parent))

from benchmarks import caching

SMALL = ["--scale", "small", "--size", "64", "--images", "8", "--batch", "2", "--precision", "fp32"]


@pytest.fixture(scope="module", autouse=True)
def _one_thread(one_thread: None) -> None:
    pass


def test_both_sides_write_the_same_latents(tmp_path: Path) -> None:
    args = caching.parse(SMALL)
    folder, found, seen = caching.pictures(tmp_path, args), {}, {}
    for side in caching.SIDES:
        counts: list[int] = []
        caching.make(side, folder, tmp_path / side, args)(counts.append)
        shards = [load_file(path) for path in sorted((tmp_path / side).glob("*.safetensors"))]
        found[side] = {name: torch.cat([shard[name] for shard in shards]) for name in ("latents", "latents_flip")}
        stats = torch.load(tmp_path / side / "latents_stats.pt", weights_only=True)
        found[side] |= {name: value.flatten() for name, value in stats.items()}
        seen[side] = sum(counts)
    assert seen == {"public": 8, "ours": 8}
    assert found["ours"]["latents"].shape == (8, 128, 32)
    told_apart = (found["ours"]["latents"] - found["ours"]["latents_flip"]).std()
    for name, ours in found["ours"].items():
        # their images differ: PIL's resize before the crop, and torch's after it
        assert (ours - found["public"][name]).square().mean().sqrt() < 0.2 * told_apart, name
    assert told_apart > 0.01


def test_it_prints_images_a_second_and_memory_of_both(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    caching.main([*SMALL, "--rounds", "1", "--side", "ours", "--json", str(tmp_path / "a.json")])
    text = capsys.readouterr().out
    assert all(words in text for words in ("images/s, each and its mirror image", "8 images in 4 shards", "in shard 4"))
    assert "memory of ours" not in text  # the line of a failure
    written = json.loads((tmp_path / "a.json").read_text())
    assert len(written["seconds"]["ours"]) == 1
    assert written["ratio"] is None
    held = written["memory"]["ours"]
    if held["built"] is not None:  # the system shows it
        # a shard has 64 kB; nothing of the first three is held in the fourth but what allocators round
        assert held["fourth"] - held["second"] < 4e6


def test_ratios_are_of_pairs_and_the_table_holds_both_sides() -> None:
    seconds = {"ours": [1.0, 2.0, 4.0], "public": [3.0, 4.0, 16.0]}
    memory = {
        "ours": {"built": 2e6, "peak": 1e6, "second": None, "fourth": None},
        "public": {"side": "public", "error": "killed"},
    }
    text = "\n".join(caching.tables(caching.SIDES, seconds, memory, 8))
    assert all(words in text for words in ("3.00 x  (quartiles 2.50 .. 3.50)", "memory of public: killed"))
    assert next(line.split()[6:8] for line in text.splitlines() if "images/s" in line) == ["2.00", "4.00"]
    assert [line.split()[-2:] for line in text.splitlines() if "model" in line] == [["-", "2.0"]]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["--size", "100"], "--size must be a multiple of 16"),
        (["--images", "6"], "--images must be a multiple of 4"),
        (["--workers", "0"], "at least 1"),
        (["--device", "tpu"], "--device"),
    ],
)
def test_a_wrong_argument_ends_in_one_line(given: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        caching.parse(given)
    said = capsys.readouterr().err
    assert (ended.value.code, len(said.strip().splitlines())) == (2, 1)
    assert words in said
