# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""What a run shows while it runs: the log, the bar, pictures, and how fast the device could be."""

from __future__ import annotations

import contextlib
import errno
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from maetok_fast.training import observe
from maetok_fast.training.observe import Observer, Peak, peak_flops, read_log, stated_peak

PEAK = Peak(1e12, "a number of this test")


def make(folder: Path, **settings: Any) -> Observer:
    options: dict[str, Any] = {
        "total_steps": 100, "images_per_step": 64, "devices": 4, "flops_per_image": 2e9, "peak_flops": PEAK,
        "quiet": True, "tensorboard": False,
    }  # fmt: skip
    return Observer(folder, **{**options, **settings})


def lines(folder: Path) -> list[dict[str, Any]]:
    """As a strict reader of JSON sees them."""

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    return [json.loads(line, parse_constant=refuse) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_a_line_has_the_speeds_and_the_scalars(tmp_path: Path) -> None:
    with contextlib.closing(make(tmp_path)) as observer:
        observer.record(10, {"reconstruction": 0.5}, seconds=4.0, waited=1.0, unreadable=2)
        (line,) = lines(tmp_path)  # flushed: it is there before the file is closed
    # 10 steps of 64 images in 4 s; a device's 40 images/s at 2 GFLOP are 80 GFLOP/s of 1 TFLOP/s
    assert line["step"] == 10
    assert line["time"] >= 0
    assert (line["images_per_second"], line["images_per_second_per_device"]) == (160.0, 40.0)
    assert line["mfu"] == pytest.approx(0.08)
    assert (line["data_wait"], line["reconstruction"], line["unreadable"]) == (0.25, 0.5, 2)


def test_speeds_are_of_the_steps_since_the_last_record(tmp_path: Path) -> None:
    with contextlib.closing(make(tmp_path, start_step=90)) as observer:
        observer.record(94, {}, seconds=2.0)
        observer.record(94, {"validation/psnr": 20.0})
        observer.record(100, {}, seconds=2.0)
    assert [line.get("images_per_second") for line in lines(tmp_path)] == [128.0, None, 192.0]


@pytest.mark.parametrize("missing", ["flops_per_image", "peak_flops"])
def test_there_is_no_mfu_without_both_its_numbers(tmp_path: Path, missing: str) -> None:
    with contextlib.closing(make(tmp_path, **{missing: None})) as observer:
        observer.record(1, {}, seconds=1.0)
    (line,) = lines(tmp_path)
    assert "mfu" not in line
    assert line["images_per_second"] == 64.0


def test_the_first_line_with_speeds_says_what_the_session_is(tmp_path: Path) -> None:
    with contextlib.closing(make(tmp_path)) as observer:
        observer.record(1, {"validation/psnr": 1.0})
        observer.record(2, {}, seconds=1.0)
        observer.record(3, {}, seconds=1.0)
    sessions = [line.get("session") for line in lines(tmp_path)]
    assert sessions[0] is None
    assert sessions[2] is None
    assert {k: v for k, v in sessions[1].items() if k != "started"} == {
        "devices": 4, "flops_per_image": 2e9, "peak_flops": 1e12, "peak_from": "a number of this test",
    }  # fmt: skip


@given(st.dictionaries(st.text(min_size=1, max_size=8), st.floats(), max_size=6))
def test_any_float_comes_back_from_a_valid_file(tmp_path_factory: pytest.TempPathFactory, values: Any) -> None:
    values = {name: value for name, value in values.items() if name not in ("step", "time", "session")}
    folder = tmp_path_factory.mktemp("run")
    with contextlib.closing(make(folder)) as observer:
        observer.record(3, values)
    (line,) = lines(folder)
    (read,) = read_log(folder / "log.jsonl")
    assert line.keys() == read.keys() == {"step", "time", *values}
    for name, value in values.items():
        assert read[name] == value or (math.isnan(read[name]) and math.isnan(value))


def test_a_run_that_goes_on_cuts_the_log_to_its_step_and_counts_on(tmp_path: Path) -> None:
    logged = [{"step": step, "time": 10.0 * step, "loss": 0.1 * step} for step in (1, 2, 3)]
    text = "".join(json.dumps(line) + "\n" for line in logged)
    (tmp_path / "log.jsonl").write_text(text + '{"step": 4, "time": 40.0, "lo')
    with contextlib.closing(make(tmp_path, start_step=2)) as observer:
        assert lines(tmp_path) == logged[:2]
        assert [path.name for path in tmp_path.iterdir()] == ["log.jsonl"]  # nothing half-written beside it
        observer.record(3, {"loss": 5.0}, seconds=1.0)
    assert [line["loss"] for line in lines(tmp_path)] == [0.1, 0.2, 5.0]
    # the third step's first 30 s were spent, if for nothing
    assert 30.0 <= lines(tmp_path)[-1]["time"] < 60.0


def test_a_log_that_ends_where_the_run_goes_on_stays_the_same_file(tmp_path: Path) -> None:
    with contextlib.closing(make(tmp_path)) as observer:
        observer.record(2, {"a": float("nan"), "b": 1 / 3}, seconds=1.0)
    before = (tmp_path / "log.jsonl").stat().st_ino, (tmp_path / "log.jsonl").read_bytes()
    make(tmp_path, start_step=2).close()
    assert ((tmp_path / "log.jsonl").stat().st_ino, (tmp_path / "log.jsonl").read_bytes()) == before


def test_a_log_of_rubbish_is_passed_over(tmp_path: Path) -> None:
    (tmp_path / "log.jsonl").write_bytes(b'\xff\x00\n[1]\n{"step": "x"}\n\n{"step": 1}\n')
    make(tmp_path, start_step=5).close()
    assert lines(tmp_path) == [{"step": 1}]


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with contextlib.closing(make(folder, main=False)) as observer:
        observer.step(1)
        observer.record(1, {"loss": 1.0}, seconds=1.0)
        observer.picture(1, {"originals": torch.zeros(1, 3, 4, 4), "reconstructions": torch.zeros(1, 3, 4, 4)})
    assert not folder.exists()


def test_a_picture_has_originals_above_reconstructions_above_further_rows(tmp_path: Path) -> None:
    x = torch.rand(3, 3, 5, 7, generator=torch.Generator().manual_seed(0)) * 3 - 1.5  # beyond the range on both sides
    with contextlib.closing(make(tmp_path)) as observer:
        observer.picture(12, {"originals": x, "reconstructions": -x, "masked": x.bfloat16()})
    found = np.asarray(Image.open(tmp_path / "samples" / "0000012.png"))
    gap = observe.GAP
    assert found.shape == (3 * 5 + 2 * gap, 3 * 7 + 2 * gap, 3)
    for row, images in enumerate((x, -x, x.bfloat16())):
        want = ((images.double().clamp(-1, 1) + 1) * 127.5).permute(0, 2, 3, 1).numpy()
        for column in range(3):
            top, left = row * (5 + gap), column * (7 + gap)
            got = found[top : top + 5, left : left + 7]
            assert np.abs(got - want[column]).max() <= 0.5 + 1e-4
    assert (found[5 : 5 + gap] == 255).all()


def test_a_picture_shows_the_first_eight(tmp_path: Path) -> None:
    x = torch.linspace(-1, 1, 20)[:, None, None, None].expand(20, 3, 2, 2)
    with contextlib.closing(make(tmp_path)) as observer:
        observer.picture(1, {"originals": x, "reconstructions": x})
    found = np.asarray(Image.open(tmp_path / "samples" / "0000001.png"))
    step = 2 + observe.GAP
    assert found[0, ::step, 0].tolist() == ((x[:8, 0, 0, 0] + 1) * 127.5).round().int().tolist()


def test_pictures_of_two_shapes_are_refused(tmp_path: Path) -> None:
    observer = make(tmp_path)
    with contextlib.closing(observer), pytest.raises(ValueError, match="reconstructions"):
        observer.picture(1, {"originals": torch.zeros(2, 3, 4, 4), "reconstructions": torch.zeros(2, 3, 4, 8)})


def test_a_full_disk_is_said_once_and_leaves_whole_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Full:
        """Takes half of what it is given, as a file on a full disk."""

        def __init__(self, path: Path) -> None:
            self.name, self.file = str(path), path.open("a")

        def write(self, text: str) -> None:
            self.file.write(text[: len(text) // 2])
            self.file.flush()
            raise OSError(errno.ENOSPC, "No space left on device")

        def close(self) -> None:
            self.file.close()

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with contextlib.closing(make(tmp_path)) as observer:
        observer.record(1, {"loss": 1.0})
        real = observer._file
        assert real is not None
        real.close()
        observer._file = Full(tmp_path / "log.jsonl")  # type: ignore[assignment]
        observer.record(2, {"loss": 2.0})
        with monkeypatch.context() as patch:
            patch.setattr(observe, "written", full)
            observer.picture(2, {"originals": torch.zeros(1, 3, 4, 4), "reconstructions": torch.zeros(1, 3, 4, 4)})
        observer.record(3, {"loss": 3.0})  # there is room again
    assert [line["loss"] for line in lines(tmp_path)] == [1.0, 3.0]
    said = [r.getMessage() for r in caplog.records]
    assert len(said) == 1
    assert "No space left" in said[0]


def test_close_twice_and_everything_after_it_are_no_error(tmp_path: Path) -> None:
    observer = make(tmp_path)
    observer.close()
    observer.close()
    observer.step(1)
    observer.record(1, {"loss": 1.0}, seconds=1.0)
    assert lines(tmp_path) == []


def test_where_stderr_is_no_terminal_a_record_is_a_line_of_text(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with contextlib.closing(make(tmp_path, quiet=False)) as observer:
        for _ in range(10):
            observer.step(1)
        observer.record(
            10,
            {"reconstruction": 0.03125, "hog": 0.25, "gradient/tokenizer": 7.0, "skipped_steps": 0.0},
            seconds=4.0,
            waited=0.1,
            unreadable=3,
        )
        observer.record(10, {"validation/psnr": 21.456})
    told = capsys.readouterr().err.splitlines()
    assert told == [
        "step 10/100, 36 s left: 160 img/s, 40/device, MFU 8.0%, wait 2%, rec 0.0312, hog 0.25, unreadable 3",
        "step 10/100: PSNR 21.5",
    ]


def test_the_bar_moves_and_ends_in_the_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    with contextlib.closing(make(tmp_path, quiet=False, start_step=5)) as observer:
        observer.step(3)
        observer.record(8, {"hog": 0.25}, seconds=3.0)
        assert observer._bar.n == 8
        assert observer._bar.postfix == "64 img/s, 16/device, MFU 3.2%, wait 0%, hog 0.25"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.2, "0 s"), (59.4, "59 s"), (60, "1 min"), (3599, "1 h 0 min"), (5400, "1 h 30 min"), (200_000, "2 d 7 h")],
)
def test_durations_are_told_in_their_largest_units(seconds: float, text: str) -> None:
    assert observe._duration(seconds) == text


def test_quiet_says_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with contextlib.closing(make(tmp_path)) as observer:
        observer.step(1)
        observer.record(1, {"loss": 1.0}, seconds=1.0)
    assert capsys.readouterr() == ("", "")


def test_step_reads_no_tensor_and_writes_no_file(tmp_path: Path) -> None:
    with contextlib.closing(make(tmp_path)) as observer:
        before = (tmp_path / "log.jsonl").stat()
        observer.step(1)
        assert (tmp_path / "log.jsonl").stat().st_mtime_ns == before.st_mtime_ns


# ---- TensorBoard ---------------------------------------------------------------------------------------------------


def events(folder: Path) -> Any:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(folder / "tensorboard"))
    found.Reload()
    return found


def test_tensorboard_has_the_logs_names_and_values_and_the_picture(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    with contextlib.closing(make(tmp_path, tensorboard=True)) as observer:
        observer.record(5, {"reconstruction": 0.5, "gradient/tokenizer": 2.0}, seconds=1.0)
        observer.picture(5, {"originals": torch.zeros(1, 3, 4, 4), "reconstructions": torch.zeros(1, 3, 4, 4)})
    found = events(tmp_path)
    (line,) = lines(tmp_path)
    assert set(found.Tags()["scalars"]) == line.keys() - {"step", "time", "session"}
    for name in found.Tags()["scalars"]:
        assert [(e.step, e.value) for e in found.Scalars(name)] == [(5, pytest.approx(line[name]))]
    assert [(e.step, e.width, e.height) for e in found.Images("samples")] == [(5, 4, 4 + observe.GAP + 4)]


def test_tensorboard_hides_the_steps_that_a_killed_session_was_ahead(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    for start, steps, value in ((0, (1, 2, 3), 1.0), (1, (2,), 7.0)):
        with contextlib.closing(make(tmp_path, tensorboard=True, start_step=start)) as observer:
            for step in steps:
                observer.record(step, {"loss": value})
    assert [(e.step, e.value) for e in events(tmp_path).Scalars("loss")] == [(1, 1.0), (2, 7.0)]


def test_without_tensorboard_one_sentence_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from maetok_fast._optional import Status

    monkeypatch.setattr(observe, "probe", lambda name: Status("missing", "", "pip install tensorboard"))
    with caplog.at_level("INFO", "maetok_fast"), contextlib.closing(make(tmp_path, tensorboard=True)) as observer:
        observer.record(1, {"loss": 1.0})
    assert [r.getMessage() for r in caplog.records] == ["TensorBoard files are not written: pip install tensorboard"]
    assert not (tmp_path / "tensorboard").exists()


# ---- how fast the device could be ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "units", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", "bf16", 989.4),
        ("NVIDIA H100 80GB HBM3", "fp8", 1978.9),
        ("NVIDIA H100 PCIe", "bf16", 756.0),
        ("NVIDIA H200", "tf32", 494.7),
        ("NVIDIA H20", "bf16", 148.0),
        ("NVIDIA A100-SXM4-40GB", "bf16", 312.0),
        ("NVIDIA A100 80GB PCIe", "fp32", 19.5),
        ("NVIDIA B200", "fp8", 4500.0),
        ("NVIDIA GH200 480GB", "bf16", 989.4),
        ("NVIDIA L40S", "bf16", 362.0),
        ("NVIDIA L4", "bf16", 121.0),
    ],
)
def test_a_known_gpu_has_its_data_sheets_rate(name: str, units: str, tflops: float) -> None:
    peak = stated_peak(name, units)
    assert peak is not None
    assert peak.flops == pytest.approx(tflops * 1e12)
    assert units in peak.source
    assert "data sheet" in peak.source


@pytest.mark.parametrize(
    ("name", "units"),
    [
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", "bf16"),  # a part of one
        ("NVIDIA A100-SXM4-40GB", "fp8"),  # has no such units
        ("NVIDIA L40", "bf16"),  # is no L4
        ("NVIDIA GeForce GTX 1080", "fp32"),
    ],
)
def test_others_have_none(name: str, units: str) -> None:
    assert stated_peak(name, units) is None


@pytest.mark.parametrize(
    ("precision", "tf32", "units"),
    [
        ("bf16", False, "bf16"),
        ("fp16", True, "bf16"),
        ("fp8", True, "fp8"),
        ("fp32", True, "tf32"),
        ("fp32", False, "fp32"),
    ],
)
def test_a_precision_runs_on_its_units(precision: str, tf32: bool, units: str) -> None:
    assert observe._units(precision, tf32) == units


def test_a_processor_is_measured_once() -> None:
    peak_flops.cache_clear()
    peak = peak_flops(torch.device("cpu"), "fp32")
    assert peak is peak_flops(torch.device("cpu"), "fp32")
    assert 1e9 < peak.flops < 1e14
    assert "measured" in peak.source
