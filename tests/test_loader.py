# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""Batches: the same for any number of workers and ranks, from any start; unreadable samples; ends of processes."""

from __future__ import annotations

import io
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from maetok_fast.data.images import ImageError, load_image
from maetok_fast.data.loader import Batches, WorkerError, validation_batches
from maetok_fast.data.order import Order
from maetok_fast.data.reader import fill
from maetok_fast.data.sources import DataError, open_source
from maetok_fast.data.views import View, rng_of

ROOT = Path(__file__).resolve().parent.parent
VIEW = View(16)
COUNT = 22


def picture(i, kind="JPEG"):
    array = np.random.default_rng(i).integers(0, 256, (20 + i, 30, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(array).save(file, kind)
    return file.getvalue()


@pytest.fixture
def folder(tmp_path):
    """Two classes, captions for the first."""
    for i in range(COUNT):
        place = tmp_path / "data" / ("cat", "dog")[i % 2] / f"{i:02d}.jpg"
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(picture(i))
        if i % 2 == 0:
            place.with_suffix(".txt").write_text(f"cat {i}")
    return tmp_path / "data"


def take(count, *args, **options):
    with Batches(*args, **{"seed": 7, "workers": 0, "decoder": "pil", **options}) as batches:
        return [next(batches) for _ in range(count)]


def same(a, b):
    assert [x[2:] for x in a] == [x[2:] for x in b]
    for x, y in zip(a, b, strict=True):
        assert torch.equal(x.images, y.images)
        assert torch.equal(x.labels, y.labels)


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("workers", [1, 3])
def test_any_number_of_workers_gives_the_same_batches(folder, workers):
    source = open_source(folder)
    options = {"sizes": (16, 24), "drop_captions": 0.3}
    same(take(9, source, VIEW, 5, **options), take(9, source, VIEW, 5, workers=workers, **options))


def test_what_a_batch_is(folder):
    source = open_source(folder)
    order, shown = Order(COUNT, 7), []
    for step, batch in enumerate(take(9, source, VIEW, 5)):
        places = [order.at(step * 5 + i) for i in range(5)]
        assert (batch.step, batch.epoch, batch.indices) == (step, places[0][0], tuple(i for _, i in places))
        assert batch.images.shape == (5, 3, 16, 16)
        assert batch.images.is_contiguous()
        assert batch.labels.tolist() == [source.label(i) for i in batch.indices]
        assert batch.captions == tuple(source.caption(i) or "" for i in batch.indices)
        for image, (epoch, index) in zip(batch.images, places):
            with Image.open(io.BytesIO(source.read(index))) as opened:
                window = VIEW.window(*opened.size, rng_of(7, epoch, index))
                box = (window.left, window.top, window.left + window.width, window.top + window.height)
                wanted = np.asarray(opened.crop(box).resize((16, 16), Image.Resampling.BICUBIC)).astype(int)
            wanted = wanted[:, ::-1] if window.flip else wanted
            assert np.abs(image.permute(1, 2, 0).numpy() - wanted).max() <= 4  # noise, and PIL's own order of the sides
        shown += batch.indices
    assert sorted(shown[:COUNT]) == sorted(shown[COUNT : 2 * COUNT]) == list(range(COUNT))


def test_two_ranks_together_are_one(folder):
    source = open_source(folder)
    whole = take(6, source, VIEW, 4, sizes=(16, 24))
    halves = [take(6, source, VIEW, 2, rank=rank, world=2, sizes=(16, 24)) for rank in (0, 1)]
    for one, first, second in zip(whole, *halves):
        assert torch.equal(one.images, torch.cat([first.images, second.images]))
        assert one.indices == first.indices + second.indices
        assert one.captions == first.captions + second.captions


def test_a_run_that_is_resumed_goes_on_where_it_was(folder):
    source = open_source(folder)
    whole = take(8, source, VIEW, 5, sizes=(16, 24))
    with Batches(source, VIEW, 5, seed=7, workers=2, decoder="pil", sizes=(16, 24)) as batches:
        for _ in range(3):
            next(batches)
        state = batches.state()
        assert (state["step"], batches.step) == (3, 3)
        assert batches.waited > 0
        batches.close()
        assert next(batches).step == 3  # it may be iterated again
    same(take(5, source, VIEW, 5, sizes=(16, 24), step=state["step"], unreadable=state["unreadable"]), whole[3:])


def test_sizes_are_drawn_for_each_step(folder):
    sizes = [b.images.shape[-1] for b in take(40, open_source(folder), VIEW, 1, sizes=(8, 12))]
    assert set(sizes) == {8, 12}
    assert 10 <= sizes.count(8) <= 30


def test_floating_point_images_are_in_range_and_channels_last(folder):
    source = open_source(folder)
    for a, b in zip(take(2, source, VIEW, 3), take(2, source, VIEW, 3, dtype=torch.bfloat16)):
        assert b.images.is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(b.images, (a.images.double() / 127.5 - 1).to(torch.bfloat16), rtol=0, atol=2**-8)


def test_captions_are_dropped_as_often_as_asked(folder):
    source = open_source(folder)
    captions = [c for b in take(50, source, VIEW, 8, drop_captions=0.5) for c in b.captions]
    assert abs(sum(c != "" for c in captions) / 400 - 0.25) < 0.1
    assert take(1, source, VIEW, 8, captions=False)[0].captions is None


def test_the_trainings_own_random_numbers_are_left_alone(folder):
    torch.manual_seed(3)
    wanted = torch.rand(2)
    torch.manual_seed(3)
    take(2, open_source(folder), VIEW, 2, workers=1)
    assert torch.equal(torch.rand(2), wanted)


def test_unreadable_samples_are_replaced_named_and_logged_once(folder, tmp_path):
    (folder / "cat" / "04.jpg").write_bytes(picture(4)[:300])
    (folder / "dog" / "07.jpg").write_bytes(b"")
    source = open_source(folder)
    log = tmp_path / "logs" / "unreadable.jsonl"
    bad = [i for i in range(COUNT) if source.name(i) in ("cat/04.jpg", "dog/07.jpg")]
    runs = []
    for workers in (0, 2):
        with Batches(source, VIEW, 5, seed=7, workers=workers, decoder="pil", max_unreadable=0.05, log=log) as batches:
            runs.append([next(batches) for _ in range(9)])  # two epochs
            unreadable = batches.unreadable
    same(*runs)
    assert set(unreadable) == {"cat/04.jpg", "dog/07.jpg"}
    assert unreadable["dog/07.jpg"] == "cannot read image dog/07.jpg: the file is empty"
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    assert len(rows) == 4  # two runs
    assert {row["name"]: row["reason"] for row in rows} == unreadable
    order = Order(COUNT, 7)
    for step, batch in enumerate(runs[0]):
        asked = [order.at(step * 5 + i)[1] for i in range(5)]
        for place in range(5):
            wanted = next(i for i in (asked + asked)[place:] if i not in bad)
            assert batch.indices[place] == wanted
            assert batch.labels[place] == source.label(wanted)


def test_too_many_unreadable_samples_end_the_run(folder):
    for i in (0, 4, 7, 9):
        (folder / ("cat", "dog")[i % 2] / f"{i:02d}.jpg").write_bytes(b"no image")
    with pytest.raises(
        DataError, match=r"\d samples cannot be read, more than max_unreadable 0\.1 allows \(3\); "
    ) as e:
        take(9, open_source(folder), VIEW, 5, max_unreadable=0.1)
    assert str(e.value).count("its content is none of") == 3
    with pytest.raises(DataError, match=r"max_unreadable 0\.1 allows \(2\)"):
        take(9, open_source(folder), VIEW, 5, max_unreadable=0.1, world=2)
    with pytest.raises(DataError, match=r"step \d: none of the 1 samples of a batch can be read; .*no|content"):
        take(COUNT, open_source(folder), VIEW, 1, max_unreadable=1.0, workers=1)


def test_a_place_is_filled_by_the_next_in_a_circle():
    assert fill([True, False, False, True, False]) == [0, 3, 3, 3, 0]
    with pytest.raises(DataError, match="none of the 2 samples"):
        fill([False, False])


def test_a_broken_caption_is_named(folder):
    (folder / "cat" / "00.txt").write_bytes(b"\xff")
    with pytest.raises(DataError, match=r"the caption of cat/00\.jpg is no UTF-8"):
        take(9, open_source(folder), VIEW, 5, workers=1)


def children():
    path = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children")
    return [int(pid) for pid in path.read_text().split()]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/proc")
def test_a_killed_worker_is_one_sentence_and_none_are_left(folder):
    before = set(children())
    with Batches(open_source(folder), VIEW, 5, seed=7, workers=2, decoder="pil") as batches:
        next(batches)
        os.kill(min(set(children()) - before), signal.SIGKILL)
        with pytest.raises(WorkerError, match=r"a process that reads images has ended .*take fewer workers"):
            list(itertools.islice(batches, 50))
    deadline = time.monotonic() + 5
    while set(children()) - before and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not set(children()) - before


def test_an_early_exit_and_ctrl_c_leave_no_processes(folder):
    code = f"""
import os, signal, sys
from maetok_fast.data.loader import Batches
from maetok_fast.data.sources import open_source
from maetok_fast.data.views import View
batches = Batches(open_source({str(folder)!r}), View(16), 5, seed=0, workers=2, decoder="pil")
next(batches), next(batches)  # one of each worker: a signal before that meets a process that only begins
print(open(f"/proc/{{os.getpid()}}/task/{{os.getpid()}}/children").read(), flush=True)
if sys.argv[1] == "ctrl-c":
    os.killpg(0, signal.SIGINT)
for batch in batches:
    if sys.argv[1] == "exit":
        raise SystemExit(3)
"""
    for how, status in (("exit", 3), ("ctrl-c", -signal.SIGINT)):
        done = subprocess.run(
            [sys.executable, "-c", code, how], capture_output=True, text=True, start_new_session=True, timeout=60
        )
        assert done.returncode == status, done.stderr
        assert "Process" not in done.stderr  # no tracebacks of workers
        workers = [int(pid) for pid in done.stdout.split()]
        assert len(workers) == 2
        deadline = time.monotonic() + 5
        while any(Path(f"/proc/{pid}").exists() for pid in workers) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not any(Path(f"/proc/{pid}").exists() for pid in workers)


def test_workers_may_be_spawned(folder):
    source = open_source(folder)
    same(take(2, source, VIEW, 3), take(2, source, VIEW, 3, workers=1, start="spawn"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch": 0}, "batch must be at least 1"),
        ({"rank": 2, "world": 2}, r"expected a rank in \[0, 2\)"),
        ({"workers": -1}, "workers must be"),
        ({"max_unreadable": 2.0}, "max_unreadable must be"),
        ({"decoder": "cv2"}, "unknown decoder 'cv2'"),
        ({"dtype": torch.int64}, "expected dtype uint8 or a floating-point one"),
        ({"seed": -1}, "expected seed, epoch and index"),
    ],
)
def test_settings_that_mean_nothing_are_refused(folder, options, message):
    with pytest.raises(ValueError, match=message):
        Batches(open_source(folder), VIEW, **{"batch": 2, "seed": 0, **options})


def test_validation_reads_as_evaluation_does(folder):
    source = open_source(folder)
    batches = list(validation_batches(source, 16, batch=4, limit=10))
    assert [b.indices for b in batches] == [(0, 1, 2, 3), (4, 5, 6, 7), (8, 9)]
    for batch in batches:
        for image, i in zip(batch.images, batch.indices):
            assert torch.equal(image, load_image(folder / source.name(i), 16))
        assert batch.labels.tolist() == [source.label(i) for i in batch.indices]
    ranks = [b.indices for rank in (0, 1) for b in validation_batches(source, 16, "adm", 8, 5, rank=rank, world=2)]
    assert ranks == [(0, 2, 4), (1, 3)]
    (folder / "cat" / "00.jpg").write_bytes(b"")
    with pytest.raises(ImageError, match=r"cat/00\.jpg"):
        next(validation_batches(source, 16))


def test_the_benchmark_runs_and_adds_up():
    command = [
        sys.executable,
        str(ROOT / "benchmarks" / "data.py"),
        "--size",
        "32",
        "--seconds",
        "0.05",
        "--batch",
        "4",
    ]
    command += ["--step-images-per-second", "1000", "--cores-per-device", "8"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "images/s" in done.stdout
    for name in ("pil", "torchvision", "dali"):
        assert name in done.stdout
    wrong = subprocess.run([*command[:2], "--cores-per-device", "8"], capture_output=True, text=True, timeout=60)
    assert wrong.returncode == 2
    assert len(wrong.stderr.strip().splitlines()) == 1
