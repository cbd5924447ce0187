# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""Where the time of a training step goes, in the words that both sides of `training.py` use."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

from maetok_fast.bench.machine import synchronize

PARTS = ("targets", "forward", "losses", "discriminator", "backward", "optimizer", "EMA")


class Parts:
    """Seconds by part: `with parts("forward"): ...`; the time of a part within another is taken off the outer one."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: dict[str, float] = {}
        self._inner: list[float] = []

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        synchronize(self.device)
        start = time.perf_counter()
        self._inner.append(0.0)
        try:
            yield
        finally:
            synchronize(self.device)
            taken = time.perf_counter() - start
            self.seconds[name] = self.seconds.get(name, 0.0) + taken - self._inner.pop()
            if self._inner:
                self._inner[-1] += taken

    def within(self, name: str, fn: Callable[..., Any]) -> Callable[..., Any]:
        """fn, its time counted under this name."""

        def call(*args: Any, **options: Any) -> Any:
            with self(name):
                return fn(*args, **options)

        return call
