# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""Shards of safetensors: their order, dtypes, record, damage, and what reading at random costs."""

from __future__ import annotations

import json
import os
import pickle
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from maetok_fast.data.caches import CacheError, open_cache
from maetok_fast.data.caches.lightningdit import FILES, Interleaved

C, N = 3, 7
TOLD = {
    "tokenizer": "ab12", "precision": "fp32", "resolution": 256, "crop": "center", "decoder": "pil", "dtype": "fp32",
    "flips": True, "data": "cd34", "device": "cpu",
}  # fmt: skip


def ours(folder: Path, dtype: torch.dtype = torch.float32, **record: Any) -> torch.Tensor:
    """As `maetok-fast cache-latents` writes it: one rank, image 2 unreadable, and all of one shard's images."""
    folder.mkdir()
    data = torch.randn(N, 8, C, generator=torch.Generator().manual_seed(0)).to(dtype)
    places = torch.tensor([i for i in range(N + 1) if i != 2])
    for k, (start, stop) in enumerate(((0, 3), (3, 3), (3, N))):
        here = {"latents": data[start:stop], "latents_flip": -data[start:stop], "indices": places[start:stop]}
        save_file({k: v.contiguous() for k, v in here.items()}, folder / f"latents_rank00_shard{k:03d}.safetensors")
    told = {"complete": True, "images": N, "fingerprint": TOLD} | record
    (folder / "cache.json").write_text(json.dumps(told))
    return data


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_a_cache_of_ours_is_read_in_every_dtype_with_its_places_and_fingerprint(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    data = ours(tmp_path / "c", dtype)
    cache = open_cache(tmp_path / "c")
    assert (cache.shape, len(cache), cache.extras, cache.labels, cache.fingerprint) == ((8, C), N, (), None, TOLD)
    assert cache.places is not None
    assert cache.places.tolist() == [0, 1, 3, 4, 5, 6, 7]
    order = [6, 0, 2, 3, 2]
    assert torch.equal(cache.read(order), data[order].float())
    assert torch.equal(cache.read(np.array(order), flip=True), -data[order].float())
    assert torch.equal(torch.from_numpy(cache.stored(3)).double(), data[3].double())
    assert cache.read([]).shape == (0, 8, C)
    for wrong in ([-1], [N]):
        with pytest.raises(IndexError, match="do not lie in its 7 items"):
            cache.read(wrong)


def test_a_cache_that_is_not_finished_or_not_whole_is_refused(tmp_path: Path) -> None:
    ours(tmp_path / "a", complete=False)
    with pytest.raises(CacheError, match="a is not finished: run the same maetok-fast cache-latents command again"):
        open_cache(tmp_path / "a")
    for file in (tmp_path / "a").glob("*.safetensors"):
        file.unlink()
    with pytest.raises(CacheError, match="is not finished"):  # before its first shard
        open_cache(tmp_path / "a")
    ours(tmp_path / "b", images=N + 1)
    with pytest.raises(CacheError, match=r"its shards hold 7 latents and cache.json says 8"):
        open_cache(tmp_path / "b")
    (tmp_path / "c").mkdir()
    save_file({"latents": torch.zeros(2, 4, 3)}, tmp_path / "c" / "latents_rank00_shard000.safetensors")
    cache = open_cache(tmp_path / "c")
    assert cache.fingerprint is None
    assert cache.places is None


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_damaged_record_is_one_clear_error(data: st.DataObject, tmp_path: Path) -> None:
    folder = tmp_path / "c"
    if not folder.exists():
        ours(folder)
    good = json.dumps({"complete": True, "images": N, "fingerprint": TOLD})
    values = st.none() | st.booleans() | st.integers() | st.text(max_size=3) | st.lists(st.integers(), max_size=2)
    text = data.draw(
        st.builds(lambda n: good[:n], st.integers(0, len(good) - 1))
        | st.builds(json.dumps, values)
        | st.builds(
            lambda key, value: json.dumps(json.loads(good) | {key: value}),
            st.sampled_from(["complete", "images", "fingerprint"]),
            values,
        )
        | st.builds(
            lambda key, value: json.dumps(json.loads(good) | {"fingerprint": TOLD | {key: value}}),
            st.sampled_from([*TOLD]),
            values,
        )
        | st.just("[" * 100_000)
    )
    (folder / "cache.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    try:
        cache = open_cache(folder)
    except CacheError as error:
        assert str(folder) in str(error)  # noqa: PT017
    else:
        assert cache.fingerprint is not None
        assert all(type(cache.fingerprint[k]) is type(v) for k, v in TOLD.items() if k != "device")


def test_shards_that_are_cut_short_or_unlike_are_named(tmp_path: Path) -> None:
    ours(tmp_path / "c")
    second = tmp_path / "c" / "latents_rank00_shard002.safetensors"
    whole = second.read_bytes()
    cache = open_cache(tmp_path / "c")
    second.write_bytes(whole[:-300])
    with pytest.raises(CacheError, match=r"shard002.safetensors is shorter than it was when it was opened"):
        cache.read(slice(None), flip=True)
    for cut in (0, 5, 100, len(whole) - 1):
        second.write_bytes(whole[:cut])
        with pytest.raises(CacheError, match=r"shard002.safetensors: no complete shard of a lightningdit cache"):
            open_cache(tmp_path / "c")
    good = load_file(tmp_path / "c" / "latents_rank00_shard000.safetensors")
    wrong = [
        ({"latents": good["latents"]}, r"holds \['latents'\], the shards before it"),
        (good | {"latents": good["latents"].half()}, r"the rows of its latents are F16 \(8, 3\), .* before it F32"),
        (good | {"latents": good["latents"][:, :2].contiguous()}, r"are F32 \(2, 3\), .* F32 \(8, 3\)"),
        (good | {"indices": good["indices"][:2].clone()}, "its tensors are not of one length"),
        ({"labels": good["indices"]}, "no latents"),
    ]
    for tensors, said in wrong:
        save_file(tensors, second)
        with pytest.raises(CacheError, match=said):
            open_cache(tmp_path / "c")
    (tmp_path / "d").mkdir()
    for tensors, said in (
        ({"latents": good["indices"].reshape(-1, 1, 1)}, "its latents are I64, expected one of F64, F32"),
        (
            {"latents": good["latents"], "labels": good["latents"].clone()},
            "its labels are F32 .*, expected I64, one a row",
        ),
    ):
        save_file(tensors, tmp_path / "d" / "latents_rank00_shard000.safetensors")
        with pytest.raises(CacheError, match=said):
            open_cache(tmp_path / "d")


@given(lengths=st.lists(st.integers(0, 7), min_size=1, max_size=5))
def test_ranks_of_any_lengths_are_interleaved(lengths: list[int]) -> None:
    ranks = [[(k, j) for j in range(length)] for k, length in enumerate(lengths)]
    rows = [item for rank in ranks for item in rank]
    wanted = [rank[j] for j in range(max(lengths)) for rank in ranks if j < len(rank)]
    order = Interleaved(lengths)
    assert order.rows == len(rows)
    assert [rows[r] for r in order.at(np.arange(order.rows))] == wanted


def test_a_thousand_shards_keep_few_files_open_and_come_back_from_another_process(tmp_path: Path) -> None:
    rows = torch.arange(1000 * 2 * 4, dtype=torch.float32).reshape(1000, 2, 2, 2)
    for k in range(1000):
        save_file({"latents": rows[k]}, tmp_path / f"latents_rank{k % 2:02d}_shard{k // 2:03d}.safetensors")
    cache = open_cache(tmp_path)
    shuffled = np.random.default_rng(0).permutation(2000)
    data = torch.stack([rows[0::2].reshape(1000, 2, 2), rows[1::2].reshape(1000, 2, 2)], dim=1).reshape(2000, 2, 2)
    before = len(os.listdir("/proc/self/fd")) if sys.platform.startswith("linux") else 0
    assert torch.equal(cache.read(shuffled), data[shuffled])
    if sys.platform.startswith("linux"):
        assert len(os.listdir("/proc/self/fd")) - before <= 2 * FILES
    sent = pickle.dumps(cache)
    assert len(sent) < 200_000
    again = pickle.loads(sent)
    del cache
    assert torch.equal(again.read(slice(None)), data)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/proc")
def test_reading_at_random_takes_the_memory_of_a_batch_and_of_no_shard(tmp_path: Path) -> None:
    def resident() -> int:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    rows = torch.zeros(4000, 128, 32)  # 64 MB a shard
    for k in range(2):
        save_file({"latents": rows}, tmp_path / f"latents_rank00_shard{k:03d}.safetensors")
    del rows
    cache, rng = open_cache(tmp_path), np.random.default_rng(0)
    cache.read(rng.integers(0, 8000, 256))
    before = resident()
    for _ in range(40):  # each row, once or twice
        cache.read(rng.integers(0, 8000, 256))
    assert resident() - before < 2**24
