# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""A record's sample made, and its kernels run on it: for tests, benchmarks, the gate and the cost report.

make(op, sample, dtype)      the op's keyword arguments, the same values in every run
launch(op, backend, a)       a backend's forward, called without dispatch and autograd; launch_backward its backward
load(path)                   the records of a file outside of the library (`--op-file` of tests and benchmarks)
"""

from __future__ import annotations

import importlib.util
import sys
import zlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ._record import RECORDS, Record, Sample
from ._registration import compute, compute_backward

__all__ = ["launch", "launch_backward", "load", "make"]


def make(
    op: Record[..., Any], sample: Sample, dtype: torch.dtype, device: torch.device | str = "cpu", salt: str = ""
) -> dict[str, Any]:
    """The keyword arguments of a sample in `dtype`; on "meta" nothing is drawn."""
    generator = torch.Generator().manual_seed(zlib.crc32(f"{op.name} {sample.label} {salt}".encode()))
    meta = torch.device(device).type == "meta"

    def randn(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        if meta:
            return torch.empty(shape, dtype=dtype, device="meta")
        return torch.randn(*shape, generator=generator).to(device, dtype)

    return sample.make(randn)


def launch(op: Record[..., Any], name: str, a: Any) -> Any:
    """Backend `name`'s forward on bound arguments: `Results`."""
    return compute(op, name, a)


def launch_backward(op: Record[..., Any], name: str, a: Any, results: Any) -> Any:
    """Its backward for gradients of ones, for every tensor that can have one: `Args`, None elsewhere."""
    moving = len(op.outputs) - len(op.detached)
    kept = results if op.keep_output else results[len(op.outputs) :]
    return compute_backward(op, name, a, kept, [torch.ones_like(o) for o in results[:moving]], op.asked(a))


def load(path: str | Path) -> list[Any]:
    """The records that a Python file makes, which is imported once, under its own name. ValueError if it makes none."""
    path = Path(path).resolve()
    name = f"maetok_fast_op_file_{path.stem}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path)
        if spec is None or spec.loader is None or not path.exists():
            raise ValueError(f"{path} is no Python file that could be imported")
        sys.modules[name] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    found = [record for record in RECORDS.values() if record in vars(sys.modules[name]).values()]
    if not found:
        raise ValueError(f"{path} makes no op: it should hold a record, `<op> = Op(...)`")
    return found
