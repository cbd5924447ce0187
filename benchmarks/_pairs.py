# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""What the gate compares: the launchers of both sides' ops, on one image of each op's cheapest real sample."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

LOST = "the base has a kernel here and today's dispatch takes the reference"
_MADE: dict[Any, dict[str, Any]] = {}


def pairs(
    head: dict[str, Any], base: dict[str, Any], drives: Sequence[Any], device: Any, dtypes: Sequence[str]
) -> Iterator[tuple[str, Any, Any]]:
    """(key, head's call, base's call) of every op that both have, or (key, None, why not). drives: head's and base's
    module `_drive`."""
    for name, op in sorted(head.items()):
        if name not in base:
            yield name, None, "not in the base"
            continue
        sample = cheapest(op)
        if sample is None:
            yield name, None, "no real sample"
            continue
        for dtype in dtypes:
            try:
                sides = [launchers(o, d, sample, dtype, device) for o, d in zip((op, base[name]), drives)]
            except (
                Exception
            ) as error:  # a signature that changed, a base that refuses: no comparison, and the gate says so
                yield (
                    f"{name} | {dtype}",
                    None,
                    f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}",
                )
                continue
            for direction in ("forward", "backward"):
                key = f"{name} | {sample.label} | {dtype} | {direction}"
                calls = [side.get(direction) for side in sides]
                if None not in calls:
                    yield key, *calls
                elif any(calls):
                    yield key, None, LOST if calls[0] is None else "the base runs the reference here"
                elif not sides[0]:
                    yield key, None, "the reference runs here"


def cheapest(op: Any) -> Any:
    """The real sample with the least to do, by its cost on meta tensors."""
    import torch

    def work(sample: Any) -> float:
        cost = op.cost(
            **sample.make(lambda *shape, dtype=torch.bfloat16: torch.empty(shape, dtype=dtype, device="meta"))
        )
        return cost.bytes + cost.flops / 20  # bytes and FLOPs of one time on a CPU core, roughly

    return min((sample for sample in op.samples if sample.real), key=work, default=None)


def launchers(op: Any, drive: Any, sample: Any, dtype: str, device: Any) -> dict[str, Callable[[], Any]]:
    """direction -> call of the launchers that dispatch takes here; {} where it takes the reference. drive: the module
    `_drive` of the op's own library."""
    made = one_image(op, sample, dtype, device)
    a = op.arguments(**made)
    chosen = op.choose(**made)
    if chosen == "reference":
        return {}
    calls: dict[str, Callable[[], Any]] = {"forward": lambda: drive.launch(op, chosen, a)}
    if op.backend(chosen).backward is not None:
        results = drive.launch(op, chosen, a)
        calls["backward"] = lambda: drive.launch_backward(op, chosen, a, results)
    return calls


def one_image(op: Any, sample: Any, dtype: str, device: Any) -> dict[str, Any]:
    """The sample's arguments, with a batch of 1 where the op accepts that; the same tensors for both sides."""
    import torch

    from maetok_fast.bench.machine import DTYPES

    key = (op.name, sample.label, dtype)
    if key in _MADE:
        return _MADE[key]
    for one in (True, False):
        generator = torch.Generator().manual_seed(0)
        batch: list[int] = []  # the leading size of the first tensor of two or more dimensions

        def randn(
            *shape: int,
            dtype: Any = DTYPES[dtype],
            one: bool = one,
            batch: list[int] = batch,
            generator: Any = generator,
        ) -> Any:
            if len(shape) > 1:
                batch.append(shape[0])
                shape = (1, *shape[1:]) if one and shape[0] == batch[0] else shape
            return torch.randn(*shape, generator=generator).to(device, dtype)

        try:
            made = sample.make(randn)
            op.arguments(**made)
        except (ValueError, TypeError, RuntimeError, IndexError):
            if not one:
                raise
            continue
        break
    _MADE[key] = made
    return made
