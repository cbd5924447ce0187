# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""What an op is, as data: a formula (`ref`), the backends that compute it faster, and what tests and benchmarks need.

A callback of a record gets its arguments by name: `a` is the call's arguments as a named tuple in the order of `ref`
(a.x, a.gate), tensors contiguous where a kernel gets them. Kernels fill what they are given:

    out(a, backend)              (*outputs, *saved), empty: shapes and dtypes of a call; this is the fake kernel too
    Backend.forward(a, out)      fills out.<output> and out.<saved>
    Backend.backward(a, out, g, d)
                                 fills d.<argument>, where it is not None, from the outputs' gradients g.<output>
"""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from inspect import Parameter, signature
from typing import Any, Generic, NamedTuple, ParamSpec, TypeVar

import torch
from torch import Tensor

__all__ = [
    "EMPTY",
    "RECORDS",
    "TOKEN_SHAPES",
    "Backend",
    "BackendError",
    "Cost",
    "Record",
    "Sample",
    "Tangent",
    "drawn",
]

P = ParamSpec("P")
R = TypeVar("R")

EMPTY = "there is nothing to compute"  # a reason not to launch that strict mode forgives
# (batch, tokens, width, label): the models' token streams, the real samples of the ops that take one.
TOKEN_SHAPES = (
    (4, 385, 768, "MAETok-B 256 px"),
    (4, 1153, 768, "MAETok-B 512 px"),
    (4, 128, 1152, "SiT-XL 128 tokens"),
    (4, 1024, 1152, "SiT-XL/2 1024 tokens"),
)
_KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
RECORDS: dict[str, Any] = {}  # every record made, by name

# What each annotation of a reference accepts.
_KINDS: dict[str, tuple[type, ...]] = {
    "Tensor": (Tensor,),
    "Tensor | None": (Tensor, type(None)),
    "int": (int, torch.SymInt),
    "int | None": (int, torch.SymInt, type(None)),
    "float": (float, int, torch.SymFloat, torch.SymInt),
    "str": (str,),
    "bool": (bool,),
}


class BackendError(RuntimeError):
    """A backend was forced (or `MAETOK_FAST_STRICT=1` is set) and cannot take these inputs; the message says why."""


@dataclass(frozen=True)
class Cost:
    """What an ideal implementation must do once: `flops` (multiply and add counted apart), `bytes` moved to and from
    memory when each input is read once and each output written once."""

    flops: int
    bytes: int


@dataclass(frozen=True)
class Sample:
    """Named inputs of an op. `make(randn)` returns the op's keyword arguments; `randn(*shape)` draws a standard normal
    tensor of the dtype and device under test and `randn(*shape, dtype=...)` of a fixed dtype. `real` marks a shape of
    the models (benchmarks); the others are small and hold the edge cases (tests)."""

    label: str
    make: Callable[[Callable[..., Tensor]], dict[str, Any]]
    real: bool = False


def drawn(label: str, real: bool = False, **inputs: Any) -> Sample:
    """A `Sample` of standard normal tensors: a tuple is the shape of one, anything else is handed on as it is."""
    return Sample(label, lambda randn: {k: randn(*v) if isinstance(v, tuple) else v for k, v in inputs.items()}, real)


@dataclass(frozen=True)
class Backend:
    """One way to compute an op with kernels.

    name: "native" (csrc/cpu), "cuda" (csrc/cuda), "triton", or a library of attention ("flash_attn", "xformers",
        "sdpa": torch's own). It says what has to be present; see `_dispatch.why_missing`.
    forward(a, out): launches, checks nothing.
    backward(a, out, g, d): see the module's drawing. `out` holds the saved tensors, and the outputs where the record
        keeps them; g is zeros where autograd has none. None for an op that is not differentiable.
    why_not(a): why it cannot take these arguments, or None (shapes and dtypes only, pure).
    allocates: forward(a, None) returns (*outputs, *saved) itself, as libraries do.
    """

    name: str
    forward: Callable[[Any, Any], Any]
    backward: Callable[[Any, Any, Any, Any], None] | None = None
    why_not: Callable[[Any], str | None] = lambda a: None
    allocates: bool = False


class Tangent(NamedTuple):
    """How an op computes its outputs together with their tangents, under one level of forward-mode AD.

    choose(a): the name of the kernels that do, or "reference": the op's own reference, by torch's formulas.
    compute(record, name, a): the outputs, with tangents and, of the kernels' outputs, gradients.
    """

    choose: Callable[[Any], str]
    compute: Callable[[Any, str, Any], Any]


@dataclass(eq=False)
class Record(Generic[P, R]):
    """The record of an op.

    name: the op's name, also under `torch.ops.maetok_fast`.
    ref: the formula in plain torch, any float dtype; its signature (typed, no `*`) is the op's signature. The first
        argument is a tensor and fixes the device.
    shapes: argument -> its shape, as in {"x": "B N D", "gate": "D | B D"}: letters are sizes that must agree, numbers
        are themselves, "..." any leading sizes, "|" parts alternatives of different rank. ValueError in one sentence.
    samples: see `Sample` and `drawn`.
    check: check(a) raises ValueError/TypeError in one sentence for what `shapes` cannot say (shapes and scalars only).
    flops: flops(a), see `Cost`.
    traffic: traffic(a) -> bytes, where they are not those of all tensors given and returned.
    cpu, cuda: backends by device, the preferred one first.
    out: see the module's drawing; None: one output like the first argument.
    outputs, saved: names of what the op returns (a tuple when more than one), and of what forwards save beside it.
    detached: those of `outputs`, the last ones, that carry no gradient (statistics); the reference detaches them too.
    keep_output: the backward reads the outputs themselves.
    differentiable: False for targets and random numbers: a constant for autograd and torch.func.
    roles: argument -> how its dtype is decided; those not named are "stream".
        "stream"    brought to the widest dtype of all streams, as torch's own elementwise type promotion does
        "lowered"   the same, and fp32 becomes the autocast dtype under autocast
        "as given"  takes part in the promotion, is handed on in its own floating dtype and gets its gradient in it: no
                    converted copy of a bf16 branch is made for an fp32 residual stream; the reference promotes itself
        "fp32"      always fp32 (fp64 for a reference run in fp64)
        a tuple     one of these dtypes (masks, indices, uint8 pixels), handed on as it is, no part of the rule
    residual: name of the argument whose gradient is the output's own gradient (x in x + f), so nobody copies it. It is
        not kept for the backward pass, whose kernels may read its shape and dtype and none of its values.
    written: arguments whose gradients the kernels write whether wanted or not.
    tangent: see `Tangent`; None: tangents are the reference's.
    prefer: prefer(a) -> names of backends in the order in which these arguments want them; None, and for those that it
        leaves out: the order of `cpu` and `cuda`.
    """

    name: str
    ref: Callable[P, R]
    shapes: Mapping[str, str]
    samples: Sequence[Sample]
    flops: Callable[[Any], int]
    check: Callable[[Any], None] = lambda a: None
    traffic: Callable[[Any], int] | None = None
    cpu: Sequence[Backend] = ()
    cuda: Sequence[Backend] = ()
    out: Callable[[Any, str], tuple[Tensor, ...]] | None = None
    outputs: tuple[str, ...] = ("y",)
    saved: tuple[str, ...] = ()
    detached: tuple[str, ...] = ()
    keep_output: bool = False
    differentiable: bool = True
    roles: Mapping[str, str | tuple[torch.dtype, ...]] = field(default_factory=dict)
    residual: str | None = None
    written: tuple[str, ...] = ()
    tangent: Tangent | None = None
    prefer: Callable[[Any], Sequence[str]] | None = None

    def __post_init__(self) -> None:
        if self.name in RECORDS:
            raise RuntimeError(
                f"op {self.name!r} is registered twice: import maetok_fast.kernels only, and give each op its own name"
            )
        self.signature = signature(self.ref)
        params = self.signature.parameters.values()
        self.names = tuple(self.signature.parameters)
        results = (*self.outputs, *self.saved)
        wrong = [
            n
            for n in (*self.roles, *self.shapes, *self.written, self.residual)
            if n is not None and n not in self.names
        ]
        wrong += [n for n in results if n in self.names]
        if wrong or not set(self.detached) <= set(self.outputs):
            raise ValueError(
                f"op {self.name!r}: the names {wrong or self.detached} do not fit its arguments and outputs"
            )
        for p in params:
            if str(p.annotation) not in _KINDS:
                raise TypeError(
                    f"op {self.name!r}: {p.name} is annotated {p.annotation!r}; an op's arguments are "
                    f"{', '.join(_KINDS)}, under `from __future__ import annotations`"
                )
        self.kinds = tuple((str(p.annotation), _KINDS[str(p.annotation)]) for p in params)
        self.required = sum(p.default is Parameter.empty for p in params)
        self.defaults = tuple(p.default for p in params)
        self.is_tensor = tuple("Tensor" in kind for kind, _ in self.kinds)
        self.roles_in_order = tuple(self.roles.get(n, "stream") for n in self.names)
        self.layouts = tuple(
            (n, self.names.index(n), tuple(tuple(way.split()) for way in text.split("|")))
            for n, text in self.shapes.items()
        )
        # made by name, hence invisible to mypy: a callback's `a` is Any
        self.Args: Any = namedtuple(f"{self.name}_args", self.names)  # type: ignore[misc]
        self.Results: Any = namedtuple(f"{self.name}_results", results)  # type: ignore[misc]
        self.Outputs: Any = namedtuple(f"{self.name}_outputs", self.outputs)  # type: ignore[misc]
        self.residual_at = -1 if self.residual is None else self.names.index(self.residual)
        self.written_at = tuple(self.names.index(n) for n in self.written)
        self.known = {b.name: b for b in self.backends}
        self._passed: set[Any] = set()
        RECORDS[self.name] = self

    def role(self, name: str) -> str | tuple[torch.dtype, ...]:
        """How the dtype of argument `name` is decided."""
        return self.roles.get(name, "stream")

    def check_shapes(self, a: Any) -> None:
        """Raises ValueError where a tensor's shape is none of those that `shapes` allows it."""
        if torch.compiler.is_compiling():
            return self._check_shapes(a)
        # what passed passes again: a training loop's shapes are few, and this is a fifth of a small call's time
        key = tuple(None if a[at] is None else a[at].shape for _, at, _ in self.layouts)
        if key not in self._passed:
            self._check_shapes(a)
            if len(self._passed) >= 4096:
                self._passed.clear()
            if not any(isinstance(n, torch.SymInt) for shape in key if shape is not None for n in shape):
                self._passed.add(key)

    def _check_shapes(self, a: Any) -> None:
        sizes: dict[str, Any] = {}
        for name, at, ways in self.layouts:
            if a[at] is None:
                continue
            shape = a[at].shape
            for way in ways:
                if _fits(shape, way, sizes):
                    break
            else:
                allowed = " or ".join(f"({', '.join(way)}{',' if len(way) == 1 else ''})" for way in ways)
                given = {letter: sizes[letter] for way in ways for letter in way if letter in sizes}
                where = f" with {', '.join(f'{k} = {v}' for k, v in given.items())}" if given else ""
                raise ValueError(f"{self.name}: {name} must be {allowed}{where}, got {tuple(shape)}")

    @property
    def backends(self) -> tuple[Backend, ...]:
        """The CPU backends, then the CUDA backends."""
        return (*self.cpu, *self.cuda)

    def candidates(self, device: str) -> Sequence[Backend]:
        """The backends for tensors of this device type."""
        return self.cpu if device == "cpu" else self.cuda if device == "cuda" else ()

    def backend(self, name: str) -> Backend:
        """The backend of this name, of whatever device; BackendError if there is none."""
        if name not in self.known:
            raise BackendError(f"{self.name} has no backend {name!r}")
        return self.known[name]

    def unsupported(self, name: str, a: Any) -> str | None:
        """Why backend `name` does not take these arguments, on whatever machine, or None."""
        device, empty = a[0].device, False
        for at, role, value in zip(self.names, self.roles_in_order, a):
            if isinstance(value, Tensor):
                if value.device != device:
                    return f"{at} is on {value.device} and {self.names[0]} on {device}"
                if value.dtype == torch.float64 if isinstance(role, tuple) else value.dtype not in _KERNEL_DTYPES:
                    return f"{at} is {value.dtype}; the kernels take float32, bfloat16 and float16"
                empty = empty or value.numel() == 0
        return EMPTY if empty else self.backend(name).why_not(a)

    def results(self, a: Any, backend: str) -> Any:
        """Outputs and saved tensors of a call, empty, as `Results`."""
        if self.out is None:
            return self.Results(torch.empty_like(a[0], memory_format=torch.contiguous_format))
        return self.Results(*self.out(a, backend))

    def cost(self, *args: Any, **kwargs: Any) -> Cost:
        """The `Cost` of a call with these arguments, which may be meta tensors."""
        given = self.signature.bind(*args, **kwargs)
        given.apply_defaults()
        a = self.Args(*(v.to("meta") if isinstance(v, Tensor) else v for v in given.args))
        if self.traffic is not None:
            return Cost(self.flops(a), self.traffic(a))
        moved = (*a, *self.results(a, "")[: len(self.outputs)])
        return Cost(self.flops(a), sum(v.nbytes for v in moved if isinstance(v, Tensor)))

    def asked(self, a: Any) -> list[bool]:
        """Per argument, whether a backend's backward has a gradient to compute when every tensor wants its own."""
        return [isinstance(v, Tensor) and v.is_floating_point() and i != self.residual_at for i, v in enumerate(a)]


def _fits(shape: Sequence[int], way: tuple[str, ...], sizes: dict[str, Any]) -> bool:
    """Whether the shape is this one, by rank first: comparing sizes of different meaning would tie a symbolic batch to
    a width. New letters are entered into `sizes`."""
    if way[:1] == ("...",):
        way = way[1:]
        if len(shape) < len(way):
            return False
        shape = shape[len(shape) - len(way) :]
    if len(shape) != len(way):
        return False
    found: dict[str, Any] = {}
    for letter, size in zip(way, shape):
        wanted = int(letter) if letter.isdigit() else sizes.get(letter, found.get(letter))
        if wanted is None:
            found[letter] = size
        elif wanted != size:
            return False
    sizes.update(found)
    return True
