# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""A shard as it is written: equal tensors make equal files, and statistics merge to those of all rows at once."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from maetok_fast.data.caches import CacheError
from maetok_fast.data.caches.shards import ChannelMoments, read_header, shard_name, write_shard, write_statistics

C = 8


def tensors(rows: int = 300, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """More rows than are looked at together."""
    latents = torch.randn(rows, 6, C, generator=torch.Generator().manual_seed(rows)).to(dtype)
    return {"latents": latents, "labels": torch.arange(rows), "indices": torch.arange(rows) * 2}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("rows", [0, 1, 300])
def test_a_shard_says_what_is_in_it(rows: int, dtype: torch.dtype, tmp_path: Path) -> None:
    given_ = tensors(rows, dtype)
    moments = write_shard(tmp_path / shard_name(7), given_, {"more": 'a "word"'})
    found = read_header(tmp_path / "latents_rank00_shard007.safetensors")
    assert found.shapes == {"latents": (rows, 6, C), "labels": (rows,), "indices": (rows,)}
    assert {k: v for k, v in found.about.items() if k != "format"} == {
        "total_size": str(rows), "dtype": str(dtype), "device": "cpu", "more": 'a "word"',
    }  # fmt: skip
    assert found.moments.as_json() == moments.as_json()
    assert found.moments.count == 6 * rows
    if rows > 1:
        stored = given_["latents"].double()
        np.testing.assert_allclose(found.moments.mean, stored.mean((0, 1)).numpy(), rtol=1e-12, atol=1e-14)
        np.testing.assert_allclose(found.moments.std, stored.std((0, 1)).numpy(), rtol=1e-12)


def test_equal_tensors_make_equal_files(tmp_path: Path) -> None:
    about = {chr(97 + i): str(i) for i in range(12)}  # safetensors writes metadata in random order
    for name in ("a", "b"):
        write_shard(tmp_path / name, tensors(), about)
        write_statistics(tmp_path / f"{name}.pt", ChannelMoments.of(tensors()["latents"]), 3)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert (tmp_path / "a.pt").read_bytes() == (tmp_path / "b.pt").read_bytes()


def test_what_is_no_whole_shard_is_named(tmp_path: Path) -> None:
    path = tmp_path / shard_name(0)
    write_shard(path, tensors())
    content = path.read_bytes()
    for cut in (0, 7, 100, len(content) - 1):
        path.write_bytes(content[:cut])
        with pytest.raises(CacheError, match=r"shard000\.safetensors: no whole shard of a latent cache"):
            read_header(path)
    for wrong in (tensors(), tensors() | {"labels": torch.arange(3)}):
        path.unlink()
        save_file(wrong, path, {"total_size": "300", "statistics": '{"count": 1, "mean": [1.0], "m2": [0.0, 1.0]}'})
        with pytest.raises(CacheError, match="no whole shard"):
            read_header(path)


@settings(max_examples=60, deadline=None)
@given(
    counts=st.lists(st.integers(0, 9), min_size=1, max_size=6),
    offset=st.sampled_from([0.0, 1.0, 1e6]),
    spatial=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
def test_merged_statistics_are_those_of_all_rows(counts: list[int], offset: float, spatial: bool, seed: int) -> None:
    if not sum(counts):
        counts = [*counts, 1]
    shape = (C, 3, 2) if spatial else (6, C)
    whole = torch.from_numpy(np.random.default_rng(seed).standard_normal((sum(counts), *shape)) + offset)
    found = ChannelMoments.together(ChannelMoments.of(part) for part in whole.split(counts))
    dims = (0, 2, 3) if spatial else (0, 1)
    assert found.count == 6 * sum(counts)
    # a sum of squares would be off by offset^2 of these
    np.testing.assert_allclose(found.mean, whole.mean(dims).numpy(), rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(found.std, whole.std(dims).numpy(), rtol=1e-9 if offset > 1 else 1e-12)
    again = ChannelMoments.of_json(found.as_json())
    assert (again.count, again.mean.tobytes(), again.m2.tobytes()) == (
        found.count, found.mean.tobytes(), found.m2.tobytes(),
    )  # fmt: skip


def test_statistics_of_a_single_number_and_of_other_files(tmp_path: Path) -> None:
    one = ChannelMoments.of(torch.full((1, 1, 2), 3.0))
    assert (one.mean.tolist(), one.std.tolist()) == ([3.0, 3.0], [0.0, 0.0])
    write_statistics(tmp_path / "s.pt", one, 4)
    assert torch.load(tmp_path / "s.pt", weights_only=True)["mean"].shape == (1, 2, 1, 1)
    for text in ("", "[]", '{"count": 1, "mean": [1.0], "m2": [1.0, 2.0]}', '{"count": 1, "mean": [NaN], "m2": [1.0]}'):
        with pytest.raises((ValueError, KeyError, TypeError)):
            ChannelMoments.of_json(text)
