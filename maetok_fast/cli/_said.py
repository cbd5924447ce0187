# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""What the commands share: errors in one sentence, progress, and the processes of torchrun."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    import torch

__all__ = ["barrier", "device", "in_a_sentence", "processes", "progress"]


@contextlib.contextmanager
def in_a_sentence(*also: type[Exception]) -> Iterator[None]:
    """What a user can mend ends the command with its message and exit status 2, not with a traceback. also: errors of
    the command's own."""
    mended: tuple[type[Exception], ...] = (ValueError, TypeError, OSError, ImportError, *also)
    try:
        yield
    except mended as error:
        typer.echo(f"maetok-fast: {error}", err=True)
        raise typer.Exit(2) from None


def device(name: str) -> torch.device:
    """The device of --device, by default CUDA where there is one; ValueError in words where there is none such."""
    import torch

    from maetok_fast.bench.machine import find_device

    return find_device(name or ("cuda" if torch.cuda.is_available() else "cpu"))


@contextlib.contextmanager
def processes(name: str) -> Iterator[tuple[torch.device, int, int]]:
    """(device, number of this process, how many there are), as torchrun and accelerate launch say it. name: as
    `device`'s."""
    import torch.distributed as dist

    count, process = (int(os.environ.get(name, default)) for name, default in (("WORLD_SIZE", "1"), ("RANK", "0")))
    where = device(name)
    if where.type == "cuda" and where.index is None and count > 1:
        where = device(f"cuda:{os.environ.get('LOCAL_RANK', '0')}")
    if count > 1:
        # the last barrier waits for whoever has most left to do, which may be hours
        dist.init_process_group("gloo", timeout=timedelta(days=7))
    try:
        yield where, process, count
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def barrier() -> None:
    """Every process has come this far."""
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        dist.barrier()


@contextlib.contextmanager
def progress(what: str, total: int, shown: bool = True) -> Iterator[Callable[[int], None]]:
    """A bar on stderr; yields what to call with how many more are done."""
    from tqdm.auto import tqdm

    with tqdm(total=total, desc=what, unit="image", disable=not shown) as bar:
        yield lambda count: (bar.update(count), None)[1]
