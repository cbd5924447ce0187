# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""Many tensors as one launch takes them: their addresses in a table, cut into blocks of equal size.

    row i of several lists ── all of one kind (dtypes, device, aligned)? ── one `Group`, one launch
                                        └── strides not alike, another dtype ── `apart`, which no kernel takes

    table (tensors, columns) int64: an address for each list (0: the list is absent), elements, then addresses of
    counters and bits of numbers, one a tensor, where an operator has such
    blocks (n, 2) int32: tensor, block within the tensor; None on a CPU, where a thread walks the table

A model has hundreds of tensors, most of them small: one call per tensor is launch overhead on a GPU and fork overhead
on a CPU. The tables are kept from call to call as long as the same memory is passed, which is what a training loop
does. Gradients are new memory in each step, and a table of theirs alone is made anew (`Group.moving`): one column.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._dispatch import fall_back

__all__ = ["DTYPES", "Group", "Plan", "Tables", "codes", "local_shards", "refuse_slower"]

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # as csrc/cpu/types.h numbers them
CACHED = 16  # tables kept


@dataclass
class Group:
    """Tensors of one combination of dtypes, as a kernel takes them."""

    table: Tensor  # on the CPU or the device; see above
    blocks: Tensor | None
    members: tuple[int, ...]  # their places in the lists
    like: tuple[Tensor | None, ...]  # the first tensor of each list, for its dtype; None where the list is absent
    aligned: bool  # all addresses of the lists are multiples of 16 bytes
    _moved: tuple[tuple[int, ...], Tensor, bool] | None = field(default=None, repr=False)

    def moving(self, tensors: Sequence[Tensor]) -> tuple[Tensor, bool]:
        """The addresses (tensors,) int64 of this group's members of a list that moves, beside the table, and whether
        all are multiples of 16 bytes. Copied without waiting for the device."""
        addresses = tuple(tensors[i].data_ptr() for i in self.members)
        if self._moved is None or self._moved[0] != addresses:
            aligned = all(a % 16 == 0 for a in addresses)
            self._moved = addresses, _to(torch.tensor(addresses, dtype=torch.int64), self.table.device), aligned
        return self._moved[1:]


class Plan(NamedTuple):
    groups: tuple[Group, ...]
    apart: tuple[int, ...]  # tensors that no kernel takes, by index


class Tables:
    """The tables of one operator; those of the newest CACHED lists are kept."""

    def __init__(self, takes: Callable[[Sequence[Tensor]], bool] = lambda row: True) -> None:
        """takes(the tensors at one place of all lists): what the operator asks of them beside `_fits`."""
        self.plans: dict[tuple[object, ...], Plan] = {}
        self.takes = takes

    def plan(
        self,
        lists: Sequence[Sequence[Tensor]],
        block: int | None,
        moving: Sequence[Tensor] = (),
        counters: Sequence[Tensor] = (),
        numbers: Sequence[float] = (),
    ) -> Plan:
        """The tables for these tensors, made once for the same memory.

        lists: equally long, or empty where absent. block: elements of a block, None for no blocks. moving: one list
        more, whose addresses `Group.moving` gives. counters: one fp32 element for each tensor, on its device; where
        there are such, tensors without elements have a row too. numbers: one for each tensor, as bits of a double."""
        key = (
            block,
            *[(t.data_ptr(), t.dtype, t.shape, t.stride()) for tensors in lists for t in tensors],
            *[(t.dtype, t.shape, t.stride()) for t in moving],
            *[(t.data_ptr(), t.dtype) for t in counters],
            *numbers,
            *map(len, lists),
        )
        plan = self.plans.get(key)
        if plan is None:
            while len(self.plans) >= CACHED:
                self.plans.pop(next(iter(self.plans)))
            plan = self.plans[key] = self.make(lists, block, moving, counters, numbers)
        return plan

    def make(
        self,
        lists: Sequence[Sequence[Tensor]],
        block: int | None,
        moving: Sequence[Tensor] = (),
        counters: Sequence[Tensor] = (),
        numbers: Sequence[float] = (),
    ) -> Plan:
        groups: dict[tuple[Any, ...], list[int]] = {}
        apart = []
        for i, first in enumerate(lists[0]):
            fixed = [tensors[i] for tensors in lists if tensors]
            row = [*fixed, *moving[i : i + 1]]
            if not _fits(row) or not self.takes(row) or not all(_counts(c, first) for c in counters[i : i + 1]):
                apart.append(i)
            elif first.numel() or counters:
                aligned = all(t.data_ptr() % 16 == 0 for t in fixed)
                groups.setdefault((first.device, aligned, *[t.dtype for t in row]), []).append(i)
        made = []
        for (device, aligned, *_dtypes), members in groups.items():
            table = [
                [
                    *[tensors[i].data_ptr() if tensors else 0 for tensors in lists],
                    lists[0][i].numel(),
                    *[c.data_ptr() for c in counters[i : i + 1]],
                    *[_bits(n) for n in numbers[i : i + 1]],
                ]
                for i in members
            ]
            like = tuple(tensors[members[0]] if tensors else None for tensors in lists)
            blocks = None if block is None else _to(_blocks([lists[0][i].numel() for i in members], block), device)
            rows = _to(torch.tensor(table, dtype=torch.int64), device)
            made.append(Group(rows, blocks, tuple(members), like, bool(aligned)))
        return Plan(tuple(made), tuple(apart))


def _blocks(elements: Sequence[int], block: int) -> Tensor:
    counts = [-(-n // block) for n in elements]
    parts = [torch.stack((torch.full((count,), n), torch.arange(count)), 1) for n, count in enumerate(counts)]
    return torch.cat(parts).int()


def _bits(number: float) -> int:
    bits: int = struct.unpack("<q", struct.pack("<d", number))[0]
    return bits


def _to(t: Tensor, device: torch.device) -> Tensor:
    """Without waiting for the copy: torch keeps pinned memory until the stream has read it."""
    return t.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else t.to(device)


def _dense(t: Tensor) -> bool:
    """Whether the elements fill one stretch of memory, in whatever order of dimensions."""
    if t.is_contiguous():
        return True
    expected = 1
    for stride, size in sorted((s, n) for s, n in zip(t.stride(), t.shape) if n != 1):
        if stride != expected:
            return False
        expected *= size
    return True


def _fits(tensors: Sequence[Tensor]) -> bool:
    first = tensors[0]
    return all(t.dtype in DTYPES and t.device == first.device for t in tensors) and (
        all(t.is_contiguous() for t in tensors)
        or (all(t.stride() == first.stride() for t in tensors) and _dense(first))
    )


def _counts(counter: Tensor, beside: Tensor) -> bool:
    return counter.dtype == torch.float32 and counter.device == beside.device


def codes(like: Sequence[Tensor | None]) -> list[int]:
    """The numbers by which csrc/cpu knows their dtypes; -1 for an absent list."""
    return [-1 if t is None else DTYPES[t.dtype] for t in like]


def refuse_slower(op: str, apart: Sequence[int], lists: Sequence[Sequence[Tensor]]) -> None:
    """Strict mode raises where tensors are left to plain torch that a kernel could take in other dtypes or strides."""
    if not apart:
        return
    first = ", ".join(f"{t.dtype} with strides {t.stride()}" for t in (ts[apart[0]] for ts in lists if ts))
    why = f"{len(apart)} of {len(lists[0])} tensors are not dense fp32, bf16 or fp16 on one device, the first: {first}"
    fall_back(op, why)


def local_shards(op: str, *lists: list[Tensor]) -> tuple[list[Tensor], ...]:
    """The local shards of DTensors; an operator knows no other way to split one. ValueError where those at one place
    are not sharded alike."""
    from torch.distributed.tensor import DTensor

    placed = [[t.placements if isinstance(t, DTensor) else None for t in tensors] for tensors in lists if tensors]
    for i, places in enumerate(zip(*placed)):
        if any(p != places[0] for p in places):
            raise ValueError(f"{op}: the tensors at {i} must be sharded alike, got {' and '.join(map(str, places))}")
    return tuple([t.to_local() if isinstance(t, DTensor) else t for t in tensors] for tensors in lists)
