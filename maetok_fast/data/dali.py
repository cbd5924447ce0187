# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""decode.py's rendering as a DALI pipeline: JPEGs decoded, cut, resized and flipped on the GPU (or by DALI on a CPU).

    files' bytes, windows  ->  decoders.image (mixed | cpu), oriented  ->  slice  ->  bicubic, antialiased resize
                           ->  crop_mirror_normalize: uint8 NCHW, or [-1, 1] in fp32, fp16, bf16 as channels_last

Windows are drawn by views.py from the header's size, so that the samples are those of any other decoder; pixels differ
by DALI's resize alone, which does not round between its two directions. What is no 8-bit grey or colour JPEG with its
orientation in EXIF (`why_not`) is left to decode.py: nothing else gains by a GPU's decoder.

One batch is in work while the last one is used: submit(next), use(last), collect(next).
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from maetok_fast._optional import probe
from maetok_fast.data.decode import Header
from maetok_fast.data.views import View, Window

__all__ = ["Dali", "why_missing", "why_not"]

DTYPES = (torch.uint8, torch.float32, torch.float16, torch.bfloat16)


def why_missing() -> str | None:
    """Why DALI cannot be used here, or None. Imports it (one second)."""
    status = probe("nvidia.dali")
    return None if status.state == "found" else f"nvidia.dali is {status.state} ({status.reason})"


def why_not(header: Header, view: View) -> str | None:
    """Why DALI would not treat this picture as decode.py does, or None."""
    if view.crop == "adm":
        return "ADM's crop halves with box filters"
    if not header.plain:
        return "no 8-bit grey or colour JPEG"
    return None if header.exif else "its orientation is not EXIF's"


class Dali:
    """batch: the most pictures at once. threads: of DALI's own. dtype: uint8, or fp32, fp16, bf16 for [-1, 1]."""

    def __init__(
        self, batch: int, device: torch.device | str = "cpu", threads: int = 2, dtype: torch.dtype = torch.uint8
    ) -> None:
        reason = why_missing()
        if reason is not None:
            raise ValueError(f"decoder 'dali' cannot be used: {reason}")
        if dtype not in DTYPES:
            raise ValueError(f"Dali: expected a dtype of {', '.join(map(str, DTYPES))}, got {dtype}")
        self.batch, self.device, self.dtype = batch, torch.device(device), dtype
        self._pipeline = _pipeline(batch, self.device, threads, dtype)
        self._pending = False

    def submit(self, contents: Sequence[np.ndarray], windows: Sequence[Window], size: int) -> None:
        """Starts a batch. contents: files' bytes, uint8 (bytes,); at least one and no more than `batch` of them."""
        if self._pending or not 0 < len(contents) == len(windows) <= self.batch:
            raise ValueError(f"Dali.submit: expected 1..{self.batch} pictures with their windows, the last collected")
        columns: dict[str, list[Any]] = {
            "content": list(contents),
            "start": [np.array([w.top, w.left], dtype=np.int32) for w in windows],
            "shape": [np.array([w.height, w.width], dtype=np.int32) for w in windows],
            "flip": [np.array(w.flip, dtype=np.int32) for w in windows],
            "size": [np.array([size, size], dtype=np.float32)] * len(windows),
        }
        for name, column in columns.items():
            self._pipeline.feed_input(name, column)
        self._pipeline.schedule_run()
        self._pending = True

    def collect(self) -> Tensor:
        """The batch that was started: (B, 3, size, size) on the device. RuntimeError where one of its files is damaged;
        the next batch is not touched by it."""
        self._pending = False
        stream = torch.cuda.current_stream(self.device) if self.device.type == "cuda" else None
        (output,) = self._pipeline.share_outputs(cuda_stream=stream)
        images = torch.utils.dlpack.from_dlpack(
            output.as_tensor()
        ).clone()  # the memory is the pipeline's, bound to this stream
        self._pipeline.release_outputs()
        if self.dtype == torch.uint8:
            return images
        return images.permute(0, 3, 1, 2).to(self.dtype)  # DALI writes no bf16

    def discard(self) -> None:
        """Forgets the batch that was started, if there is one."""
        if self._pending:
            with contextlib.suppress(RuntimeError):
                self.collect()


def _pipeline(batch: int, device: torch.device, threads: int, dtype: torch.dtype) -> Any:
    from nvidia.dali import fn, pipeline_def, types

    cuda = device.type == "cuda"
    number = (device.index if device.index is not None else torch.cuda.current_device()) if cuda else None

    # a queue of one batch: a batch that failed then leaves the next ones in their order
    @pipeline_def(batch_size=batch, num_threads=threads, device_id=number, prefetch_queue_depth=1)
    def build() -> Any:
        def given(name: str, kind: Any, dimensions: int) -> Any:
            return fn.external_source(name=name, dtype=kind, ndim=dimensions)

        images = fn.decoders.image(
            given("content", types.UINT8, 1),
            device="mixed" if cuda else "cpu",
            output_type=types.RGB,
            adjust_orientation=True,
            jpeg_fancy_upsampling=True,  # chroma as libjpeg-turbo upsamples it
        )
        start, shape = given("start", types.INT32, 1), given("shape", types.INT32, 1)
        images = fn.slice(images, start=start, shape=shape, axes=[0, 1], out_of_bounds_policy="error")
        images = fn.resize(images, size=given("size", types.FLOAT, 1), interp_type=types.INTERP_CUBIC, antialias=True)
        flip = given("flip", types.INT32, 0)
        if dtype == torch.uint8:
            return fn.crop_mirror_normalize(images, mirror=flip, dtype=types.UINT8, output_layout="CHW")
        kind = types.FLOAT16 if dtype == torch.float16 else types.FLOAT
        half = [127.5] * 3
        return fn.crop_mirror_normalize(images, mirror=flip, mean=half, std=half, dtype=kind, output_layout="HWC")

    pipeline = build()
    pipeline.build()
    return pipeline
