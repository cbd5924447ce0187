# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""What a run shows while it runs: a bar, a log, TensorBoard, pictures.

    step(n)      the bar moves; nothing is asked of the device
    record(...)  floats that are already on the host ──┬─ log.jsonl     one JSON object a line, flushed
                                                       ├─ tensorboard/  the same names
                                                       └─ the bar's end, or where stderr is no terminal a line of text
    picture(...) ── samples/0001000.png and TensorBoard: originals above reconstructions

    log.jsonl    {"step": 50, "time": 61.2, "images_per_second": 812.0, "images_per_second_per_device": 101.5,
                  "mfu": 0.41, "data_wait": 0.02, "reconstruction": 0.031, ...}
    step         optimizer steps done;  time: seconds of all sessions of the run, with those that a crash undid
    mfu          images/s of a device x FLOPs of an image / peak FLOP/s of a device, a share
    data_wait    share of the time in which the step waited for its batch
    session      in the first of a session's lines with speeds: started, devices, flops_per_image, peak_flops,
                 peak_from, images_per_step, images_per_epoch, and what `metrics` measures: how many images, which

A value that is not finite is written as the string "nan", "inf" or "-inf", as JSON has no numbers for them; float()
reads both. A run that goes on cuts the log back to the step that it goes on from. What cannot be written (a full disk)
is said once and training goes on: a checkpoint that cannot be written ends it.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import math
import sys
import time
from collections.abc import Callable, Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from maetok_fast._optional import probe
from maetok_fast.bench.machine import matmul, synchronize
from maetok_fast.checks import check_tensor
from maetok_fast.data.images import to_uint8
from maetok_fast.pipeline.run import save_png, written

__all__ = ["Observer", "Peak", "peak_flops", "read_log"]

log = logging.getLogger("maetok_fast")

COLUMNS, GAP = 8, 4  # of a picture: images in a row at most, pixels between them
# dense FLOP/s x 1e12 as the makers' data sheets state them: (bf16, fp8, tf32, fp32), 0: the chip has no such units.
# The first name that a device's begins with counts, so that the special ones stand above the general.
_SHEETS = {
    "NVIDIA GB200": (2500.0, 5000.0, 1250.0, 80.0),
    "NVIDIA B200": (2250.0, 4500.0, 1125.0, 75.0),
    "NVIDIA GH200": (989.4, 1978.9, 494.7, 66.9),
    "NVIDIA H200 NVL": (835.5, 1671.0, 417.5, 60.0),
    "NVIDIA H200": (989.4, 1978.9, 494.7, 66.9),
    "NVIDIA H100 PCIe": (756.0, 1513.0, 378.0, 51.2),
    "NVIDIA H100 NVL": (835.5, 1671.0, 417.5, 60.0),
    "NVIDIA H100": (989.4, 1978.9, 494.7, 66.9),
    "NVIDIA H800 PCIe": (756.0, 1513.0, 378.0, 51.2),
    "NVIDIA H800": (989.4, 1978.9, 494.7, 66.9),
    "NVIDIA H20": (148.0, 296.0, 74.0, 44.0),
    "NVIDIA A100": (312.0, 0.0, 156.0, 19.5),
    "NVIDIA A800": (312.0, 0.0, 156.0, 19.5),
    "NVIDIA L40S": (362.0, 733.0, 183.0, 91.6),
    "NVIDIA L4": (121.0, 242.0, 60.0, 30.3),
}
_SHORT = {
    "reconstruction": "rec", "perceptual": "lpips", "generator": "gen", "discriminator": "disc", "caption": "text",
    "entropy": "ent", "validation/psnr": "PSNR", "learning_rate": "lr",
}  # fmt: skip
# in the log, but not worth the room at the end of a bar
_UNSHOWN = ("adaptive_weight", "consistency", "lecam", "logits_real", "logits_fake")


class Peak(NamedTuple):
    """flops: FLOP/s of one device at best; source: where the number comes from, in words."""

    flops: float
    source: str


class Observer:
    """The view of one session of a run; on any rank but the first (`main` False) it does nothing.

    folder: the run's. images_per_step: over all ranks. flops_per_image: of a training step (`flops.model_flops`);
    without it or `peak_flops` there is no MFU. start_step: where this session goes on. quiet: no bar and no lines.
    session: what else its record in the log shall say, JSON values.
    """

    def __init__(
        self,
        folder: Path,
        total_steps: int,
        images_per_step: int,
        devices: int,
        flops_per_image: float | None,
        peak_flops: Peak | None,
        quiet: bool = False,
        start_step: int = 0,
        main: bool = True,
        tensorboard: bool = True,
        session: Mapping[str, Any] | None = None,
    ) -> None:
        self.folder, self.total, self.main, self.quiet = folder, total_steps, main, quiet
        self.images, self.devices = images_per_step, devices
        self.flops, self.peak = flops_per_image, peak_flops
        self._recorded, self._began, self._complained = start_step, time.perf_counter(), False
        self._before, self._lines = 0.0, False
        self._session: dict[str, Any] | None = None
        self._file: IO[str] | None = None
        self._writer: Any = None
        self._bar: Any = None
        if not main:
            return
        from tqdm.auto import tqdm

        folder.mkdir(parents=True, exist_ok=True)
        self._before = _cut_back(folder / "log.jsonl", start_step)
        self._file = (folder / "log.jsonl").open("a", encoding="ascii")
        self._written = self._file.tell()
        if tensorboard:
            self._writer = _tensorboard(folder / "tensorboard", start_step)
        self._session = {
            "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "devices": devices,
            "flops_per_image": flops_per_image,
            "peak_flops": None if peak_flops is None else peak_flops.flops,
            "peak_from": None if peak_flops is None else peak_flops.source,
            **(session or {}),
        }
        self._lines = not quiet and not sys.stderr.isatty()
        self._bar = tqdm(
            total=total_steps, initial=start_step, disable=quiet or self._lines, unit="step", dynamic_ncols=True
        )

    def step(self, n: int = 1) -> None:
        """n more steps are done."""
        if self._bar is not None:
            self._bar.update(n)

    def record(
        self,
        step: int,
        scalars: Mapping[str, float],
        *,
        seconds: float | None = None,
        waited: float = 0.0,
        unreadable: int | None = None,
    ) -> None:
        """One line of the log. scalars: floats by name; step: steps done.

        seconds: the time of all steps since the last call that gave it, waited: how much of it the data took; without
        it the line has no speeds (a validation). unreadable: samples so far that could not be read on this rank."""
        if self._file is None:
            return
        line: dict[str, Any] = {"step": step, "time": round(self._before + time.perf_counter() - self._began, 3)}
        left = ""
        if seconds is not None:
            if step > self._recorded and seconds > 0:
                each = seconds / (step - self._recorded)
                line |= self._speeds(self.images / each)
                line["data_wait"] = waited / seconds
                left = f", {_duration((self.total - step) * each)} left"
            self._recorded = step
        line |= {name: float(value) for name, value in scalars.items()}
        if unreadable is not None:
            line["unreadable"] = unreadable
        if self._writer is not None:
            numbers = {k: v for k, v in line.items() if k not in ("step", "time")}
            self._try(lambda: [self._writer.add_scalar(name, value, step) for name, value in numbers.items()])
        told = _told(line)
        if seconds is not None and self._session is not None:
            line["session"], self._session = self._session, None
        self._append(json.dumps({k: _json(v) for k, v in line.items()}, allow_nan=False) + "\n")
        if self._lines:
            print(f"step {step}/{self.total}{left}: {told}", file=sys.stderr, flush=True)
        elif self._bar is not None:
            self._bar.set_postfix_str(told)

    def _speeds(self, rate: float) -> dict[str, float]:
        found = {"images_per_second": rate, "images_per_second_per_device": rate / self.devices}
        if self.flops and self.peak is not None:
            found["mfu"] = rate / self.devices * self.flops / self.peak.flops
        return found

    def _append(self, text: str) -> None:
        """The line, or none of it: what a full disk took half of is taken back, so that the file stays readable."""
        assert self._file is not None
        try:
            self._file.write(text)
            self._file.flush()
            self._written = self._file.tell()
        except OSError as error:
            self._complain(error)
            path = Path(self._file.name)
            with contextlib.suppress(OSError):  # what is buffered may fail again
                self._file.close()
            with path.open("r+b") as file:
                file.truncate(self._written)
            self._file = path.open("a", encoding="ascii")

    def picture(self, step: int, rows: Mapping[str, Tensor]) -> None:
        """samples/{step:07d}.png: a row of the first 8 images of each, such as originals and reconstructions, (B, 3, H,
        W) in [-1, 1] of one shape on any device. ValueError where the shapes differ."""
        if self._file is None:
            return
        first = next(iter(rows))
        check_tensor(first, rows[first], ("B", 3, "H", "W"))
        for name, images in rows.items():
            check_tensor(name, images, tuple(rows[first].shape))
        sheet = _sheet([to_uint8(images[:COLUMNS].float()) for images in rows.values()])
        self._try(lambda: self._keep_picture(step, sheet))

    def _keep_picture(self, step: int, sheet: np.ndarray) -> None:
        path = self.folder / "samples" / f"{step:07d}.png"
        path.parent.mkdir(exist_ok=True)
        written(path, lambda p: save_png(sheet, p))
        if self._writer is not None:
            self._writer.add_image("samples", sheet, step, dataformats="HWC")

    def _try(self, show: Callable[[], Any]) -> None:
        """What only shows something does not end a run."""
        try:
            show()
        except Exception as error:  # TensorBoard's writer hands on whatever its thread met
            self._complain(error)

    def _complain(self, error: Exception) -> None:
        if not self._complained:
            log.warning("cannot write what the run shows to %s (%s); training goes on", self.folder, error)
        self._complained = True

    def close(self) -> None:
        """Ends bar and files; afterwards the other methods do nothing."""
        if self._bar is not None:
            self._bar.close()
        if self._writer is not None:
            self._try(self._writer.close)
        if self._file is not None:
            self._file.close()
        self._bar = self._writer = self._file = None


# ---- the log -------------------------------------------------------------------------------------------------------


def read_log(path: Path) -> list[dict[str, Any]]:
    """The lines of a log.jsonl that are whole, as dicts with an integer "step"; [] where there is no file. Values that
    are not finite are floats again."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return []
    found = []
    for raw in text.splitlines():
        try:
            line = json.loads(raw)
        except ValueError:
            continue
        if isinstance(line, dict) and isinstance(line.get("step"), int):
            found.append({k: float(v) if v in ("nan", "inf", "-inf") else v for k, v in line.items()})
    return found


def _cut_back(path: Path, step: int) -> float:
    """Takes lines beyond `step`, and half ones, out of the log, in one rename. Returns the seconds that the run has
    taken so far, those of the lines taken out included."""
    lines = read_log(path)
    kept = [line for line in lines if line["step"] <= step]
    if path.exists():
        text = "".join(json.dumps({k: _json(v) for k, v in line.items()}, allow_nan=False) + "\n" for line in kept)
        if text.encode("ascii") != path.read_bytes():
            written(path, lambda p: p.write_text(text, encoding="ascii"))
    times = [line["time"] for line in lines if isinstance(line.get("time"), (int, float))]
    return max(times, default=0.0)


def _json(value: Any) -> Any:
    return value if not isinstance(value, float) or math.isfinite(value) else str(value)


def _tensorboard(folder: Path, start_step: int) -> Any:
    status = probe("tensorboard")
    if status.state != "found":
        log.info("TensorBoard files are not written: %s", status.reason)
        return None
    from torch.utils.tensorboard import SummaryWriter

    # events of steps that a killed session was ahead are hidden
    return SummaryWriter(str(folder), purge_step=start_step + 1 if start_step else None)


# ---- text and pictures ---------------------------------------------------------------------------------------------


def _told(line: Mapping[str, Any]) -> str:
    """What a glance at the terminal shall show, in a hundred characters or so."""
    parts = []
    if "images_per_second" in line:
        parts.append(f"{_short(line['images_per_second'])} img/s")
        parts.append(f"{_short(line['images_per_second_per_device'])}/device")
    if "mfu" in line:
        parts.append(f"MFU {line['mfu']:.1%}")
    if "data_wait" in line:
        parts.append(f"wait {line['data_wait']:.0%}")
    known = ("step", "time", "images_per_second", "images_per_second_per_device", "mfu", "data_wait", *_UNSHOWN)
    for name, value in line.items():
        if name in known or name.startswith("gradient/"):
            continue
        if name in ("skipped_steps", "unreadable"):
            parts += [f"{name.removesuffix('_steps')} {value:g}"] if value else []
        else:
            parts.append(f"{_SHORT.get(name, name)} {_short(value)}")
    return ", ".join(parts)


def _short(value: float) -> str:
    """Three digits, whole numbers from 100 on."""
    return f"{value:.0f}" if 100 <= abs(value) < 1e6 else f"{value:.3g}"


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.0f} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    if hours < 24:
        return f"{hours} h {minutes} min" if hours else f"{minutes} min"
    return f"{hours // 24} d {hours % 24} h"


def _sheet(rows: list[np.ndarray]) -> np.ndarray:
    """Rows of images, each (B, H, W, 3) uint8, as one picture with white between them."""
    count, height, width, _ = rows[0].shape
    sheet = np.full((len(rows) * (height + GAP) - GAP, count * (width + GAP) - GAP, 3), 255, np.uint8)
    for r, images in enumerate(rows):
        for c, image in enumerate(images):
            top, left = r * (height + GAP), c * (width + GAP)
            sheet[top : top + height, left : left + width] = image
    return sheet


# ---- how fast the device could be ----------------------------------------------------------------------------------


@functools.cache
def peak_flops(device: torch.device, precision: str) -> Peak:
    """FLOP/s of products at best on this device in "fp32", "bf16", "fp16" or "fp8" (`maetok_fast.precision`).

    Of GPUs that are known, the dense rate of the data sheet, TF32's for fp32 where torch may use it. Of others, of
    parts of a GPU (MIG) and of processors, the best of a few large matmuls, made once in a process (0.5 s).
    """
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        stated = stated_peak(name, _units(precision, torch.backends.cuda.matmul.allow_tf32))
        if stated is not None:
            return stated
    return _measured(device, precision)


def _units(precision: str, tf32: bool) -> str:
    """The arithmetic units that a precision runs on."""
    return {"fp16": "bf16", "fp32": "tf32" if tf32 else "fp32"}.get(precision, precision)


def stated_peak(name: str, units: str) -> Peak | None:
    """The data sheet's dense FLOP/s of a GPU by torch's name of it, units "bf16", "fp8", "tf32" or "fp32"; None for one
    that is not known, for a part of one, and where the chip has no such units."""
    if "MIG" in name:
        return None
    for known, rates in _SHEETS.items():
        rate = dict(zip(("bf16", "fp8", "tf32", "fp32"), rates))[units]
        if (name + " ").replace("-", " ").startswith(known + " "):
            return Peak(rate * 1e12, f"{rate:g} TFLOP/s, {units} dense, data sheet of {known}") if rate else None
    return None


def _measured(device: torch.device, precision: str) -> Peak:
    dtype = "bf16" if precision == "fp8" else precision
    work, flops = matmul(device, dtype, 8192 if device.type == "cuda" else 1024)
    work()
    best, stop, calls = math.inf, time.perf_counter() + 0.4, 0
    while calls < 3 or time.perf_counter() < stop:
        synchronize(device)
        start = time.perf_counter()
        work()
        synchronize(device)
        best, calls = min(best, time.perf_counter() - start), calls + 1
    twice = 2 if precision == "fp8" else 1
    what = f"twice the best {dtype} matmul" if twice == 2 else f"the best {dtype} matmul"
    rate = twice * flops / best
    return Peak(rate, f"{rate / 1e12:.3g} TFLOP/s, {what} measured here")
