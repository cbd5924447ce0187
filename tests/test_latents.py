# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""LatentBatches: a function of the seed and the step, whoever reads and from whatever layout; paired with images."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save_file

from maetok_fast.data.caches import CacheError, LatentCache, open_cache
from maetok_fast.data.latents import LatentBatch, LatentBatches, validation_latents
from maetok_fast.data.loader import Batches, WorkerError
from maetok_fast.data.order import Order
from maetok_fast.data.sources import open_source
from maetok_fast.data.views import NOISE, View, rng_of

N, L, C = 22, 4, 3


def made(folder: Path, flips: bool = True, labels: bool = True, count: int = N) -> LatentCache:
    """Item i is filled with i, its mirror image with -i - 1; two shards."""
    folder.mkdir()
    values = torch.arange(count, dtype=torch.float32)[:, None, None].expand(count, L, C)
    tensors = {"latents": values} | ({"latents_flip": -values - 1} if flips else {})
    tensors |= {"labels": torch.arange(count) % 5} if labels else {}
    for k, part in enumerate((slice(0, count // 2), slice(count // 2, count))):
        shard = {name: value[part].contiguous() for name, value in tensors.items()}
        save_file(shard, folder / f"latents_rank00_shard{k:03d}.safetensors")
    return open_cache(folder)


@pytest.fixture
def cache(tmp_path: Path) -> LatentCache:
    return made(tmp_path / "cache")


@pytest.fixture
def moments(tmp_path: Path) -> LatentCache:
    """[mean; std] in REPA's layout: item i has mean i and std i + 1 everywhere."""
    folder = tmp_path / "repa" / "vae-sd" / "00000"
    folder.mkdir(parents=True)
    for i in range(N):
        item = np.concatenate([np.full((2, 8, 8), i), np.full((2, 8, 8), i + 1)]).astype(np.float32)
        np.save(folder / f"img-mean-std-{i:08d}.npy", item)
    return open_cache(tmp_path / "repa")


def take(count: int, cache: LatentCache, batch: int, **options: Any) -> list[LatentBatch]:
    with LatentBatches(cache, batch, **{"seed": 7, **options}) as batches:
        return [next(batches) for _ in range(count)]


def same(a: list[LatentBatch], b: list[LatentBatch]) -> None:
    assert [x[2:] for x in a] == [x[2:] for x in b]
    for x, y in zip(a, b, strict=True):
        assert torch.equal(x.latents, y.latents)
        assert (x.labels is None) == (y.labels is None)
        assert x.labels is None or torch.equal(x.labels, y.labels)  # type: ignore[arg-type]


def test_what_a_batch_is(cache: LatentCache) -> None:
    order, shown = Order(N, 7), []
    for step, batch in enumerate(take(9, cache, 5)):
        places = [order.at(step * 5 + i) for i in range(5)]
        assert (batch.step, batch.epoch, batch.indices) == (step, places[0][0], tuple(i for _, i in places))
        assert batch.flipped == tuple(rng_of(7, *place).random() < 0.5 for place in places)
        wanted = torch.tensor([-i - 1.0 if flip else i for flip, i in zip(batch.flipped, batch.indices)])
        assert batch.latents.dtype == torch.float32
        assert torch.equal(batch.latents, wanted[:, None, None].expand(5, L, C))
        assert batch.labels is not None
        assert batch.labels.tolist() == [i % 5 for i in batch.indices]
        shown += batch.indices
    assert sorted(shown[:N]) == sorted(shown[N : 2 * N]) == list(range(N))
    assert shown[:N] != shown[N : 2 * N]
    in_order = [i for batch in take(3, cache, 8, shuffle=False) for i in batch.indices]
    assert in_order == [*range(N), 0, 1]


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize(("workers", "start"), [(1, "spawn"), (2, None), (3, "fork")])
def test_neither_workers_nor_how_they_start_change_a_batch(
    workers: int, start: str | None, cache: LatentCache, moments: LatentCache
) -> None:
    for here in (cache, moments):
        here.read([0])  # so that files are open when processes are forked
        same(take(9, here, 5), take(9, here, 5, workers=workers, start=start))


def test_hdf5_files_survive_a_fork(tmp_path: Path) -> None:
    h5py = pytest.importorskip("h5py")
    names = [f"{i:05d}.npy" for i in range(N)]
    with h5py.File(tmp_path / "vae.h5", "w") as file:
        for i, name in enumerate(names):
            file.create_dataset(name, data=np.full((2, 2, 2), i + 1, dtype=np.float32))
    (tmp_path / "vae_h5.json").write_text(json.dumps(names))
    here = open_cache(tmp_path)
    alone = take(9, here, 5)
    same(alone, take(9, here, 5, workers=2, start="fork"))
    same(alone, take(9, here, 5, workers=1, start="spawn"))
    assert alone[0].labels is None


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_ranks_and_resumed_runs_see_one_stream(data: st.DataObject, cache: LatentCache) -> None:
    world, batch = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 7))
    seed, step = data.draw(st.integers(0, 2**40)), data.draw(st.integers(0, 30))
    flip = data.draw(st.floats(0, 1))
    whole = take(3, cache, batch * world, seed=seed, step=step, flip=flip)
    ranks = [take(3, cache, batch, seed=seed, step=step, flip=flip, rank=r, world=world) for r in range(world)]
    for one, parts in zip(whole, zip(*ranks)):
        assert one.indices == sum((part.indices for part in parts), ())
        assert one.flipped == sum((part.flipped for part in parts), ())
        assert torch.equal(one.latents, torch.cat([part.latents for part in parts]))
    same(take(2, cache, batch * world, seed=seed, step=step + 1, flip=flip), whole[1:])


def test_a_run_goes_on_where_its_state_says(moments: LatentCache) -> None:
    whole = take(8, moments, 5)
    with LatentBatches(moments, 5, seed=7, workers=2) as batches:
        same([next(batches) for _ in range(3)], whole[:3])
        assert batches.state() == {"step": 3, "unreadable": {}}
        assert batches.unreadable == {}
        assert batches.waited > 0
        batches.close()
        same([next(batches)], whole[3:4])  # it may be iterated again
    same(take(5, moments, 5, step=3), whole[3:])


def test_images_are_shown_with_their_latents_and_mirrored_alike(cache: LatentCache, tmp_path: Path) -> None:
    """What pairs a teacher's images with cached latents."""
    (tmp_path / "images").mkdir()
    for i in range(N):
        pixels = np.zeros((8, 8, 3), dtype=np.uint8)
        pixels[:, :4], pixels[:, 4:] = i, 200  # the right half is the brighter one
        Image.fromarray(pixels).save(tmp_path / "images" / f"{i:02d}.png")
    source = open_source(tmp_path / "images")
    for flip, crop in ((0.5, "center"), (0.2, "adm")):
        view = View(8, crop, flip=flip)
        with Batches(source, view, 5, seed=11, workers=0) as images:
            for latents in take(12, cache, 5, seed=11, flip=flip):
                shown = next(images)
                assert shown.indices == latents.indices
                mirrored = (shown.images[:, 0, 4, 0] == 200).tolist()
                assert mirrored == list(latents.flipped)
                left = shown.images[:, 0, 4, :].amin(1)
                assert left.tolist() == list(latents.indices)


def test_without_mirror_images_nothing_is_mirrored(tmp_path: Path, moments: LatentCache) -> None:
    plain = made(tmp_path / "plain", flips=False, labels=False)
    for batch in take(5, plain, 5, flip=1.0):
        assert batch.flipped == (False,) * 5
        assert batch.latents[:, 0, 0].tolist() == list(batch.indices)
        assert batch.labels is None
    assert not any(any(batch.flipped) for batch in take(5, moments, 5))
    flipped = [flip for batch in take(100, made(tmp_path / "other"), 10, flip=0.3) for flip in batch.flipped]
    assert abs(np.mean(flipped) - 0.3) < 4 * np.sqrt(0.3 * 0.7 / 1000)


def test_moments_are_drawn_from_a_stream_of_their_own_for_each_epoch_and_sample(moments: LatentCache) -> None:
    batches = take(4 * N // 2, moments, 2)
    assert moments.shape == (2, 8, 8)
    seen: dict[int, list[torch.Tensor]] = {}
    for batch in batches:
        for latent, i in zip(batch.latents, batch.indices):
            seen.setdefault(i, []).append((latent - i) / (i + 1))
    eps = torch.stack([torch.stack(draws) for draws in seen.values()]).double()  # (N, epochs, 2, 8, 8)
    assert eps.shape[:2] == (N, 4)
    count = eps.numel()
    assert eps.mean().abs() < 4 / np.sqrt(count)
    assert (eps.std() - 1).abs() < 4 / np.sqrt(2 * count)
    flat = eps.reshape(-1, 128)
    correlation = (flat @ flat.T / 128).fill_diagonal_(0)
    assert correlation.abs().max() < 0.6  # 5.3 deviations: neither epochs nor samples share their numbers
    first = batches[0]
    epoch, i = Order(N, 7).at(0)
    noise = rng_of(7, epoch, i, NOISE).standard_normal((2, 8, 8), dtype=np.float32)
    assert torch.equal(first.latents[0], i + (i + 1) * torch.from_numpy(noise))


def test_log_variances_are_halved_and_raised(tmp_path: Path) -> None:
    """MAR's moments, mirror images of their own; the draw is of the sample, whichever is shown."""
    (tmp_path / "mar" / "a").mkdir(parents=True)
    for i in range(6):
        mean, log = np.full((2, 2, 2), i), np.full((2, 2, 2), -2 * np.log(4))
        first, second = (np.concatenate([m, log]).astype(np.float32) for m in (mean, -mean - 1))
        np.savez(tmp_path / "mar" / "a" / f"{i}.npz", moments=first, moments_flip=second)
    cache = open_cache(tmp_path / "mar")
    assert (cache.kind, cache.flips) == ("mean_logvar", True)
    for batch in take(3, cache, 4):
        for k, (latent, i, flip) in enumerate(zip(batch.latents, batch.indices, batch.flipped)):
            epoch = (batch.step * 4 + k) // 6
            noise = rng_of(7, epoch, i, NOISE).standard_normal((2, 2, 2), dtype=np.float32)
            torch.testing.assert_close(latent, torch.from_numpy((-i - 1 if flip else i) + noise / 4))
    wide = np.concatenate([np.zeros((2, 2, 2)), np.full((2, 2, 2), 200)]).astype(np.float32)
    np.savez(tmp_path / "mar" / "a" / "3.npz", moments=wide, moments_flip=wide)
    with pytest.raises(CacheError, match=r"step \d: .*item a/3 has a deviation beyond fp32's range"):
        take(2, cache, 6)


def test_validation_is_every_item_once_and_always_the_same(cache: LatentCache, moments: LatentCache) -> None:
    batches = list(validation_latents(cache, 10, 4))
    assert [b.indices for b in batches] == [(0, 1, 2, 3), (4, 5, 6, 7), (8, 9)]
    assert torch.cat([b.latents for b in batches])[:, 0, 0].tolist() == list(range(10))
    assert torch.cat([b.labels for b in batches]).tolist() == [i % 5 for i in range(10)]  # type: ignore[misc]
    ranks = [b.indices for rank in (0, 1) for b in validation_latents(cache, 5, 8, rank=rank, world=2)]
    assert ranks == [(0, 2, 4), (1, 3)]
    assert sum(len(b.indices) for b in validation_latents(cache)) == N
    whole = torch.cat([b.latents for b in validation_latents(moments, batch=5)])
    assert torch.equal(whole, torch.cat([b.latents for b in validation_latents(moments, batch=7)]))
    odd = torch.cat([b.latents for b in validation_latents(moments, batch=3, rank=1, world=2)])
    assert torch.equal(odd, whole[1::2])
    assert not torch.equal(whole, next(validation_latents(moments, batch=N, seed=1)).latents)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_latent_is_one_sentence(workers: int, moments: LatentCache) -> None:
    file = next(moments.path.rglob("*00000013.npy"))
    np.save(file, np.full((4, 8, 8), np.nan, dtype=np.float32))
    with pytest.raises(CacheError, match=r"^step \d: .*00000013 holds values that are not finite$"):
        take(N, moments, 4, workers=workers)
    file.unlink()
    with pytest.raises(CacheError, match=r"^step \d: .*00000013.npy: no array file that can be read"):
        take(N, moments, 4, workers=workers)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/proc")
def test_a_killed_worker_is_one_sentence(cache: LatentCache) -> None:
    children = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children")
    before = set(children.read_text().split())
    with LatentBatches(cache, 5, seed=7, workers=1) as batches:
        next(batches)
        (worker,) = set(children.read_text().split()) - before
        os.kill(int(worker), signal.SIGKILL)
        with pytest.raises(WorkerError, match=r"a process that reads latents has ended .*take fewer workers"):
            list(itertools.islice(batches, 50))


def test_an_early_exit_leaves_no_process(cache: LatentCache) -> None:
    code = f"""
from maetok_fast.data.caches import open_cache
from maetok_fast.data.latents import LatentBatches
batches = LatentBatches(open_cache({str(cache.path)!r}), 5, seed=0, workers=1)
next(batches)
raise SystemExit(3)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 3, done.stderr
    assert done.stderr == ""


def test_the_trainings_own_random_numbers_are_left_alone(moments: LatentCache) -> None:
    torch.manual_seed(3)
    wanted = torch.rand(2)
    torch.manual_seed(3)
    take(2, moments, 2, workers=1)
    assert torch.equal(torch.rand(2), wanted)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch": 0}, "batch must be at least 1"),
        ({"rank": 2, "world": 2}, r"expected a rank in \[0, 2\)"),
        ({"workers": -1}, "workers must be"),
        ({"flip": 1.5}, "flip must be"),
        ({"step": -1}, "step of at least 0"),
        ({"seed": -1}, "expected seed, epoch and index"),
    ],
)
def test_settings_that_mean_nothing_are_refused(options: dict[str, Any], message: str, cache: LatentCache) -> None:
    with pytest.raises(ValueError, match=message):
        LatentBatches(cache, **{"batch": 2, "seed": 0, **options})
