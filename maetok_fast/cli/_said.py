# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""What the commands share: errors in one sentence, progress, and the processes of torchrun."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import Any

import typer

__all__ = ["barrier", "in_a_sentence", "processes", "progress"]


@contextlib.contextmanager
def in_a_sentence() -> Iterator[None]:
    """What a user can mend ends the command with its message and exit status 2, not with a traceback."""
    try:
        yield
    except (ValueError, TypeError, OSError, ImportError) as error:
        typer.echo(f"maetok-fast: {error}", err=True)
        raise typer.Exit(2) from None


@contextlib.contextmanager
def processes(device: str) -> Iterator[tuple[Any, int, int]]:
    """(torch.device, number of this process, how many there are), as torchrun and accelerate launch say it."""
    import torch
    import torch.distributed as dist

    count, process = (int(os.environ.get(name, default)) for name, default in (("WORLD_SIZE", "1"), ("RANK", "0")))
    name = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda" and count > 1:
        name = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
    where = torch.device(name)
    if count > 1:
        dist.init_process_group("gloo")
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
