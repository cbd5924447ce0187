# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""What is benchmarked: the records of `maetok_fast.kernels.ops()` and a few extras, each made into callables.

    op record x real sample x dtype x direction ── Case ── build() ── Work: ours, peers, bytes, FLOPs, reasons

Both sides of a comparison get the same tensors, the same output gradients and the same calls of autograd:

    forward             fn(*args) without gradients
    forward+backward    torch.autograd.grad(fn(*args), every floating-point input, fixed output gradients)

Work is what an ideal implementation must do. Forward: `Op.cost`. Forward+backward: 3 x the FLOPs (two products for each
one of the forward), and the forward's bytes + inputs read again + output gradients read + input gradients written,
where a residual input (its gradient is the output's own) is neither read nor written.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from maetok_fast.kernels import Op, Sample, backend, ops
from maetok_fast.kernels._drive import make

from .machine import DTYPES

FORWARD, BOTH = "forward", "forward+backward"
DIRECTIONS = (FORWARD, BOTH)
REFERENCE, COMPILE, COPY = "reference", "torch.compile", "copy"

Call = Callable[[], Any]


@dataclass
class Work:
    """One case made ready. ours: backend -> call, the one that dispatch takes first (none where dispatch takes the
    reference); peers: name -> call; reasons: backend -> why it does not run here. `grad`: whether the calls need
    autograd switched on."""

    ours: dict[str, Call]
    peers: dict[str, Call]
    bytes: int
    flops: int
    grad: bool = False
    reasons: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """The autograd mode that the calls are to be timed in."""
        with torch.set_grad_enabled(self.grad):
            yield


@dataclass(frozen=True)
class Case:
    """One line of the table: `make(device, compile)` builds its `Work`. `size()`: its (FLOPs, bytes), known before;
    both 0 where they are not."""

    op: str
    sample: str
    dtype: str
    direction: str
    make: Callable[[torch.device, bool], Work] = field(compare=False, repr=False)
    size: Callable[[], tuple[int, int]] = field(default=lambda: (0, 0), compare=False, repr=False)

    @property
    def key(self) -> str:
        return f"{self.op} | {self.sample} | {self.dtype} | {self.direction}"


def all_cases(
    *,
    op: Iterable[str] = (),
    dtype: Sequence[str] = ("fp32", "bf16"),
    direction: Sequence[str] = DIRECTIONS,
    samples: int | None = None,
) -> list[Case]:
    """Every real sample of every op (the first `samples` of each), by op, sample, dtype, direction.

    A dtype that changes nothing (all inputs have dtypes of their own) is left out. Raises ValueError for names that
    do not exist.
    """
    known = {**ops(), **dict.fromkeys(EXTRAS)}
    wanted = list(op) or list(known)
    for kind, given, allowed in (("op", wanted, known), ("dtype", dtype, DTYPES), ("direction", direction, DIRECTIONS)):
        for name in given:
            if name not in allowed:
                raise ValueError(f"unknown {kind} {name!r}: expected one of {', '.join(allowed)}")
    out: list[Case] = []
    for name in wanted:
        record = known[name]
        found = _record_cases(record, dtype, direction) if record is not None else EXTRAS[name](dtype, direction)
        labels: dict[str, list[Case]] = {}
        for case in found:
            labels.setdefault(case.sample, []).append(case)
        for same in list(labels.values())[:samples]:
            out += same
    return out


def real_samples(op: Op[..., Any]) -> list[Sample]:
    return [sample for sample in op.samples if sample.real]


def _record_cases(op: Op[..., Any], dtypes: Sequence[str], directions: Sequence[str]) -> Iterator[Case]:
    for sample in real_samples(op):
        seen = set()
        for dtype in dtypes:
            shape = tuple(
                str(v.dtype) for v in make(op, sample, DTYPES[dtype], "meta").values() if isinstance(v, Tensor)
            )
            if shape in seen:
                continue
            seen.add(shape)
            for direction in directions:
                if direction == FORWARD or op.differentiable:
                    work, size = _maker(op, sample, dtype, direction), _sizer(op, sample, dtype, direction)
                    yield Case(op.name, sample.label, dtype, direction, work, size)


def _maker(op: Op[..., Any], sample: Sample, dtype: str, direction: str) -> Callable[[torch.device, bool], Work]:
    return lambda device, compile_: record_work(op, sample, dtype, direction, device, compile_)


def _sizer(op: Op[..., Any], sample: Sample, dtype: str, direction: str) -> Callable[[], tuple[int, int]]:
    """By the record's cost on meta tensors; a backward counts twice its forward."""
    times = 3 if direction == BOTH else 1

    def size() -> tuple[int, int]:
        cost = op.cost(**make(op, sample, DTYPES[dtype], "meta"))
        return times * cost.flops, times * cost.bytes

    return size


def record_work(
    op: Op[..., Any], sample: Sample, dtype: str, direction: str, device: torch.device, compile_: bool
) -> Work:
    """The work of one record's sample: each usable backend of the device, the reference, torch.compile of it."""
    made = make(op, sample, DTYPES[dtype], device)
    cost = op.cost(**made)
    args = tuple(op.arguments(**made))
    asked = op.reason(*args)
    reasons = {name: why for name, why in asked.items() if why is not None}
    usable = [name for name in asked if name not in reasons]
    first = op.choose(*args)
    grad = direction == BOTH
    leaves = []
    if grad:
        args = tuple(
            a.detach().requires_grad_() if isinstance(a, Tensor) and a.is_floating_point() else a for a in args
        )
        leaves = [a for a in args if isinstance(a, Tensor) and a.requires_grad]
    gradients: list[Tensor] = []

    def call(fn: Callable[..., Any], forced: str | None = None) -> Call:
        def run() -> Any:
            with backend(forced) if forced is not None else contextlib.nullcontext():
                out = fn(*args)
            if not grad:
                return out
            outputs = [o for o in _outputs(out) if o.requires_grad]
            return torch.autograd.grad(outputs, leaves, gradients, allow_unused=True)

        def plain() -> Any:
            return fn(*args)

        return run if grad or forced is not None else plain

    work = Work({}, {}, cost.bytes, cost.flops, grad, reasons)
    with torch.set_grad_enabled(grad):
        outputs = _outputs(op.ref(*args))
    if grad:
        gradients += [torch.randn_like(o) for o in outputs if o.requires_grad]
        work.flops *= 3
        work.bytes += _backward_bytes(op, args, gradients)
    if first != "reference":
        # dispatch's own choice is called as users call it, the others are forced
        work.ours[first] = call(op)
        work.ours |= {name: call(op, name) for name in usable if name != first}
        with work.running():
            error = difference(_outputs(op(*args)), outputs)
        if error > 0.05:
            work.notes.append(f"DIFFERS from the reference by {error:.2g} in relative norm")
    work.peers[REFERENCE] = call(op.ref)
    if compile_:
        # reset: one code object with many shapes would meet the recompile limit and run eagerly without a word
        torch._dynamo.reset()
        work.peers[COMPILE] = call(torch.compile(op.ref, dynamic=False))
    return work


def _outputs(out: Any) -> tuple[Tensor, ...]:
    return out if isinstance(out, tuple) else (out,)


def _backward_bytes(op: Op[..., Any], args: tuple[Any, ...], gradients: Sequence[Tensor]) -> int:
    total = sum(g.nbytes for g in gradients)
    for name, value in zip(op.names, args):
        if isinstance(value, Tensor) and name != op.residual:
            total += value.nbytes * (2 if value.requires_grad else 1)
    return total


def difference(got: Sequence[Tensor], want: Sequence[Tensor]) -> float:
    """The largest relative distance between two sets of outputs; for bool and integer ones the share that differs."""
    worst = 0.0
    for a, b in zip(got, want, strict=True):
        if b.is_floating_point():
            norm = b.detach().double().norm().item()
            worst = max(worst, (a.detach().double() - b.detach().double()).norm().item() / (norm or 1.0))
        else:
            worst = max(worst, (a != b).double().mean().item() if b.numel() else 0.0)
    return worst


def copy_call(moved: int, device: torch.device) -> Call:
    """A copy that moves `moved` bytes in all, half read and half written: the ceiling at this working set."""
    count = max(1, moved // 8)
    source, target = torch.ones(count, device=device), torch.ones(count, device=device)
    return lambda: target.copy_(source)


# ---- extras: what is no op record


def _packed_linear(dtypes: Sequence[str], directions: Sequence[str]) -> Iterator[Case]:
    """Packed weights and epilogue against F.linear; several layers in turn, as a model never finds a layer's weights in
    the cache."""
    shapes = [
        ("SiT-XL fc1 + GELU", 512, 1152, 4608, "gelu_tanh"),
        ("SiT-XL proj", 512, 1152, 1152, "none"),
        ("MAETok-B fc1 + GELU", 1540, 768, 3072, "gelu"),
    ]
    for label, rows, inner, outer, act in shapes:
        for dtype in dtypes:
            if FORWARD in directions:
                make = _linear_maker(rows, inner, outer, act, dtype)
                flops = 8 * rows * inner * outer
                yield Case("packed_linear", label, dtype, FORWARD, make, partial(_known, flops, 0))


def _known(flops: int, moved: int) -> tuple[int, int]:
    return flops, moved


def _linear_maker(rows: int, inner: int, outer: int, act: str, dtype: str) -> Callable[[torch.device, bool], Work]:
    def make(device: torch.device, compile_: bool) -> Work:
        from maetok_fast.kernels.packed_linear import BACKENDS, PackedLinear, why_not

        generator = torch.Generator().manual_seed(0)
        kind = DTYPES[dtype]

        def randn(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator).to(device, kind)

        weights = [(randn(outer, inner) * inner**-0.5, randn(outer)) for _ in range(4)]
        x = randn(rows, inner)
        approximate = "tanh" if act == "gelu_tanh" else "none"

        def plain(x: Tensor) -> list[Tensor]:
            made = [F.linear(x, w, b) for w, b in weights]
            return made if act == "none" else [F.gelu(y, approximate=approximate) for y in made]

        size = x.element_size()
        moved = 4 * size * (rows * (inner + outer) + inner * outer + outer)
        work = Work({}, {REFERENCE: lambda: plain(x)}, moved, 4 * 2 * rows * inner * outer)
        for way in BACKENDS[:-1]:  # "dense" is the reference
            why = why_not(way, kind, kind, device)
            if why is not None:
                work.reasons[way] = why
                continue
            packed = [PackedLinear(w, b, act, dtype=kind, backend=way) for w, b in weights]
            (work.peers if way == "onednn" else work.ours)[way] = partial(each, packed, x)
        if compile_:
            torch._dynamo.reset()
            compiled = torch.compile(plain, dynamic=False)
            work.peers[COMPILE] = lambda: compiled(x)
        return work

    return make


def each(layers: Sequence[Callable[[Tensor], Tensor]], x: Tensor) -> list[Tensor]:
    """Every layer's result for x."""
    return [layer(x) for layer in layers]


def _ema_update(dtypes: Sequence[str], directions: Sequence[str]) -> Iterator[Case]:
    """The EMA (fp32) of one SiT-XL block's parameters, which are fp32 or bf16, against torch's foreach functions."""
    for dtype in dtypes:
        if FORWARD in directions:
            yield Case("ema_update", "SiT-XL block", dtype, FORWARD, _ema_maker(dtype))


def _ema_maker(dtype: str) -> Callable[[torch.device, bool], Work]:
    def make(device: torch.device, compile_: bool) -> Work:
        from maetok_fast.kernels.ema import ema_update

        width = 1152
        weights = [(n * width, m * width) for n, m in ((3, 1), (1, 1), (4, 1), (1, 4), (6, 1))]
        shapes = [shape for weight in weights for shape in (weight, weight[:1])]
        params = [torch.ones(shape, device=device, dtype=DTYPES[dtype]) for shape in shapes]
        mine, other = ([torch.zeros(shape, device=device) for shape in shapes] for _ in range(2))

        def plain() -> None:
            torch._foreach_lerp_(other, [p.float() for p in params], 1e-4)

        count = sum(p.numel() for p in params)
        work = Work({}, {REFERENCE: plain}, count * (8 + params[0].element_size()), 3 * count)
        work.ours["ema_update"] = lambda: ema_update(mine, params, 0.9999)
        return work

    return make


EXTRAS: dict[str, Callable[[Sequence[str], Sequence[str]], Iterator[Case]]] = {
    "packed_linear": _packed_linear,
    "ema_update": _ema_update,
}
