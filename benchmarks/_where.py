# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""Where a prepared model's time goes: its products by shape, attention, and the rest."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from maetok_fast.kernels.packed_linear import Normed, PackedLinear
from maetok_fast.layers import Attention

__all__ = ["Prepared", "where"]


@dataclass(frozen=True)
class Prepared:
    """A call of a prepared `model`, as a benchmark's case."""

    model: nn.Module
    call: Callable[[], Any]

    def __call__(self) -> Any:
        return self.call()


def where(case: Prepared) -> list[str]:
    """A line for each kind of work in one call on the CPU, the most expensive first: its share of the time, and for
    products their rate. Attention is what its module takes beyond the products in it."""
    seconds: defaultdict[str, float] = defaultdict(float)
    operations: defaultdict[str, float] = defaultdict(float)
    inside: list[float] = []  # seconds of the products in each attention that is running
    with _timed(case.model, seconds, operations, inside):
        start = time.perf_counter()
        case()
        total = time.perf_counter() - start
    seconds["the rest"] = total - sum(seconds.values())
    lines = []
    for name, taken in sorted(seconds.items(), key=lambda item: -item[1]):
        rate = f"   {operations[name] / taken / 1e12:5.2f} TFLOP/s" if name in operations else ""
        lines.append(f"{100 * taken / total:5.1f} %   {name}{rate}")
    return lines


@contextmanager
def _timed(
    model: nn.Module, seconds: dict[str, float], operations: dict[str, float], inside: list[float]
) -> Iterator[None]:
    started: list[float] = []

    def begin(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        started.append(time.perf_counter())
        if isinstance(module, Attention):
            inside.append(0.0)

    def product(module: PackedLinear, inputs: tuple[Tensor | Normed, ...], y: Tensor) -> None:
        taken = time.perf_counter() - started.pop()
        outer = module.out_features << module.gated
        name = f"products {module.in_features} -> {outer}"
        seconds[name] += taken
        operations[name] += 2.0 * module.in_features * outer * (y.numel() // module.out_features)
        if inside:
            inside[-1] += taken

    def attention(module: Attention, inputs: tuple[Any, ...], y: Any) -> None:
        seconds["attention"] += time.perf_counter() - started.pop() - inside.pop()

    handles = []
    for module in model.modules():
        end = {PackedLinear: product, Attention: attention}.get(type(module))
        if end is not None:
            handles += [module.register_forward_pre_hook(begin), module.register_forward_hook(end)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
