# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""`Op`: the one abstraction of the op library.

An op is a formula (`ref`, plain differentiable torch) plus the kernels that compute the same formula faster:

    call ── bind ── check ── coerce ── choose ──┬── "reference": ref(*args), autograd and torch.compile see plain torch
            (names) (shapes) (dtypes,  (table,  │
                              autocast) shapes) └── a kernel: Backend.forward and .backward, see `_registration`

Everything before a kernel is pure Python on shapes and dtypes, so `torch.compile(fullgraph=True)` traces through it.

A file of the library defines, in this order: the formula (docstring), `<op>_ref`, the kernels, their launchers,
`_unsupported`, and the record `<op> = Op("<op>", ...)`. From the list of records (`ops()`) come the correctness suite,
the kernel benchmarks, the cost report and `maetok-fast doctor`, with no further line per op.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
import logging
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from . import _native
from ._registration import NAMESPACE, plain_eager, register
from ._triton import why_no_triton

__all__ = [
    "EMPTY",
    "NAMESPACE",
    "TOKEN_SHAPES",
    "Backend",
    "BackendError",
    "Cost",
    "Op",
    "Sample",
    "backend",
    "forced_backend",
    "no_autocast",
    "ops",
]

log = logging.getLogger("maetok_fast")

KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
EMPTY = "there is nothing to compute"  # an `unsupported` reason that strict mode forgives
# (batch, tokens, width, label): the models' token streams, the real samples of the ops that take one.
TOKEN_SHAPES = (
    (4, 385, 768, "MAETok-B 256 px"),
    (4, 1153, 768, "MAETok-B 512 px"),
    (4, 128, 1152, "SiT-XL 128 tokens"),
    (4, 1024, 1152, "SiT-XL/2 1024 tokens"),
)
_RECORDS: dict[str, Op] = {}
_LOGGED: set[tuple[str, str, str]] = set()


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
    memory when each input is read once and each output written once, `launches` of GPU kernels."""

    flops: int
    bytes: int
    launches: int = 1


@dataclass(frozen=True)
class Sample:
    """Named inputs of an op. `make(randn)` returns the op's keyword arguments; `randn(*shape)` draws a standard normal
    tensor of the dtype and device under test and `randn(*shape, dtype=...)` of a fixed dtype. `real` marks a shape of
    the models (benchmarks); the others are small and hold the edge cases (tests)."""

    label: str
    make: Callable[[Callable[..., Tensor]], dict[str, Any]]
    real: bool = False


@dataclass(frozen=True)
class Backend:
    """One way to compute an op with kernels.

    forward(*args) -> (*outputs, *saved): `args` are the op's arguments in order, every tensor contiguous; launches,
        checks nothing.
    backward(grad, saved, args, needs) -> one gradient per argument (None where `needs` is False or it is no tensor).
        `grad` is the output's gradient; for an op of several outputs the tuple of theirs (zeros where autograd has
        none), without the detached ones. None for an op that is not differentiable.
    library: what must be present: "native" (csrc/cpu), "cuda" (csrc/cuda), "triton", or None.
    """

    name: str
    forward: Callable[..., tuple[Tensor, ...]]
    backward: Callable[[Any, Sequence[Tensor], tuple[Any, ...], Sequence[bool]], Sequence[Tensor | None]] | None
    library: str | None = None


class _State:
    forced: str | None = None
    strict: bool = os.environ.get("MAETOK_FAST_STRICT", "").lower() not in ("", "0", "false", "no", "off")
    entered: list[list[str]] = []  # noqa: RUF012  (one process-wide list; each entry is its own object)
    lock = threading.Lock()


@contextlib.contextmanager
def backend(name: str) -> Iterator[None]:
    """Force one backend, process-wide, for every op that has it: "reference", "native", "triton", ...

    Ops that know no backend of this name keep their own choice. Raises `ValueError` for a name that no op knows, and
    the ops raise `BackendError` when the forced backend cannot take their inputs.
    """
    known = {"reference"} | {b.name for op in _RECORDS.values() for b in op.all_backends()}
    if name not in known:
        raise ValueError(f"unknown backend {name!r}: expected one of {', '.join(sorted(known))}")
    entry = [name]
    with _State.lock:
        _State.entered.append(entry)
        _State.forced = name
    try:
        yield
    finally:
        with _State.lock:  # by identity: threads may leave in another order than they entered
            _State.entered[:] = [e for e in _State.entered if e is not entry]
            _State.forced = _State.entered[-1][0] if _State.entered else None


def no_autocast(device_type: str) -> contextlib.AbstractContextManager[Any]:
    """Autocast switched off for this device type, where it exists (it does not for meta tensors)."""
    if torch.amp.is_autocast_available(device_type):
        return torch.autocast(device_type, enabled=False)
    return contextlib.nullcontext()


def _differentiated_forward() -> bool:
    """Whether a torch.func transform or forward-mode AD is active: custom ops would drop their tangents silently."""
    if torch.compiler.is_compiling():
        return False
    return torch._C._functorch.maybe_current_level() is not None or torch.autograd.forward_ad._current_level >= 0


def forced_backend() -> str | None:
    """The backend forced by `backend(...)`, or None."""
    return _State.forced


def _record(name: str) -> Op:
    return _RECORDS[name]


def ops() -> dict[str, Op]:
    """All records, by name."""
    return dict(_RECORDS)


def _why_missing(library: str | None, device: str) -> str | None:
    """Why `library` cannot run on `device` here, or None. Constant in a process, hence also for torch.compile."""
    if library == "native":
        return _native.why_missing()
    if library == "triton":
        return why_no_triton(device)
    if library == "cuda":
        return _native.why_no_cuda(device)
    if library is not None:
        return _why_no_package(library, device)
    return None


@functools.cache
def _why_no_package(name: str, device: str) -> str | None:
    """Why the attention library `name` ("flash_attn", "xformers") cannot run on `device`, or None."""
    if device != "cuda":
        return f"{name} runs on CUDA tensors, these are on {device}"
    try:
        importlib.import_module(name)
        compiled = importlib.import_module("xformers._cpp_lib") if name == "xformers" else None
    except Exception as error:  # missing, or built against another torch: whatever its import says
        return f"{name} does not import ({str(error).splitlines()[0] if str(error) else type(error).__name__})"
    broken = getattr(compiled, "_cpp_library_load_exception", None)
    return None if broken is None else f"{name}'s compiled half does not load ({str(broken).splitlines()[0]})"


# What torch.compiler.assume_constant_result sets; calling it would import torch._dynamo (1.7 s) with this package.
_why_missing._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _log_once(op: str, name: str, reason: str) -> None:
    if (op, name, reason) not in _LOGGED:
        _LOGGED.add((op, name, reason))
        log.debug("%s: backend %s not used: %s", op, name, reason)


@dataclass(eq=False)
class Op:
    """The record of an op. Calling it computes the op with the best backend for these inputs.

    name: the op's name, also under `torch.ops.maetok_fast`.
    ref: the formula in plain torch, any float dtype; its signature (typed, no `*`) is the op's signature. The first
        argument is a tensor and fixes the device.
    cpu, cuda: backends by device, the preferred one first.
    fake: fake(backend, *args) -> shapes of (*outputs, *saved) as empty tensors.
    outputs: how many tensors the op returns, a tuple when more than one.
    detached: how many of them, the last ones, carry no gradient (statistics); the reference detaches them too.
    saved: how many tensors the forwards save beside the outputs.
    keep_output: the backward also needs the outputs themselves, as the first of `saved`.
    differentiable: False for targets and random numbers: nothing of the call is recorded for autograd.
    check: raises ValueError/TypeError in one sentence when the arguments do not fit together (shape-only, pure).
    unsupported: unsupported(backend, *args) -> why that backend cannot take these, or None (shape-only, pure).
    autocast: "lower": under autocast fp32 tensors are cast to the autocast dtype; "promote": no autocast; the tensors
        are brought to their widest dtype, as torch's own elementwise type promotion does.
    fp32: names of tensors that are always fp32 (fp64 for a reference run in fp64), whatever the others are.
    uncast: names of tensors that take part in the promotion but are handed on in their own floating dtype, with
        gradients in it: the kernels read any of the three, so that no converted copy is made (a bf16 branch added to an
        fp32 residual stream). The reference promotes by itself.
    own_dtypes: name -> the dtypes that this tensor may have (masks, indices, uint8 pixels): it is handed on as it is
        and takes no part in the dtype rule. All other tensors are floating-point.
    residual: name of the argument whose gradient is the output's own gradient (x in x + f), so nobody copies it.
    prefer: prefer(*args) -> names of backends in the order in which these arguments want them (shape-only, pure); None,
        and for backends that it leaves out: the order of `cpu` and `cuda`.
    samples, cost: see `Sample` and `Cost`.
    """

    name: str
    ref: Callable[..., Any]
    fake: Callable[..., tuple[Tensor, ...]]
    check: Callable[..., None]
    unsupported: Callable[..., str | None]
    samples: Callable[[], Iterable[Sample]]
    cost: Callable[..., Cost]
    cpu: Sequence[Backend] = ()
    cuda: Sequence[Backend] = ()
    outputs: int = 1
    detached: int = 0
    saved: int = 0
    keep_output: bool = False
    differentiable: bool = True
    autocast: str = "promote"
    fp32: frozenset[str] = frozenset()
    uncast: frozenset[str] = frozenset()
    own_dtypes: Mapping[str, tuple[torch.dtype, ...]] = field(default_factory=dict)
    residual: str | None = None
    prefer: Callable[..., Sequence[str]] | None = None

    def __post_init__(self) -> None:
        if self.name in _RECORDS:
            raise RuntimeError(
                f"op {self.name!r} is registered twice: import maetok_fast.kernels only, and give each op its own name"
            )
        if self.autocast not in ("lower", "promote"):
            raise ValueError(f"op {self.name!r}: autocast must be 'lower' or 'promote', not {self.autocast!r}")
        signature = inspect.signature(self.ref)
        self._params = tuple(signature.parameters.values())
        self.names = tuple(p.name for p in self._params)
        self._kinds = tuple(str(p.annotation) for p in self._params)
        self._required = sum(p.default is inspect.Parameter.empty for p in self._params)
        self._defaults = tuple(p.default for p in self._params)
        self._own = tuple(self.own_dtypes.get(name) for name in self.names)
        tensors = [i for i, kind in enumerate(self._kinds) if "Tensor" in kind and self._own[i] is None]
        self._deciding = tuple(i for i in tensors if self.names[i] not in self.fp32)
        self._cast = tuple((i, self.names[i] in self.fp32) for i in tensors if self.names[i] not in self.uncast)
        self.residual_at = -1 if self.residual is None else self.names.index(self.residual)
        self.__doc__, self.__name__, self.__signature__ = self.ref.__doc__, self.name, signature
        self._forward_op, self._eager = register(self)
        _RECORDS[self.name] = self

    # ---- the call ----------------------------------------------------------------------------------------------

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        args = self.bind(args, kwargs)
        self.check(*args)
        args = self._coerce(args)
        if self.differentiable:
            return self._compute(args)
        with torch.no_grad():
            return self._compute(args)

    def _compute(self, args: tuple[Any, ...]) -> Any:
        chosen = self.choose(args)
        if chosen == "reference":
            with no_autocast(args[0].device.type):
                return self.ref(*args)
        if plain_eager(args):
            return self._eager(chosen, *args)
        out = self._forward_op(chosen, *args)
        if self.outputs > 1:
            return tuple(out[: self.outputs])
        return out[0] if self.saved else out

    def bind(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
        """The arguments in the order of `ref`, defaults filled in. Raises TypeError like a Python call does."""
        if len(args) > len(self.names):
            raise TypeError(f"{self.name}() takes {len(self.names)} arguments but {len(args)} were given")
        bound = list(args) + list(self._defaults[len(args) :])
        given = len(args)
        for key, value in kwargs.items():
            if key not in self.names:
                raise TypeError(f"{self.name}() got an unexpected argument {key!r}; it takes {', '.join(self.names)}")
            at = self.names.index(key)
            if at < len(args):
                raise TypeError(f"{self.name}() got two values for {key!r}")
            bound[at] = value
            given += at < self._required
        if len(args) < self._required and given < self._required:
            missing = [n for n in self.names[len(args) : self._required] if n not in kwargs]
            raise TypeError(f"{self.name}() misses {', '.join(missing)}")
        for name, kind, own, value in zip(self.names, self._kinds, self._own, bound):
            if not isinstance(value, _KINDS[kind]):
                wanted = kind.replace("Tensor", "a tensor").replace("|", "or")
                raise TypeError(f"{self.name}() expects {wanted} as {name}, got {type(value).__name__}")
            if not isinstance(value, Tensor):
                continue
            if own is not None and value.dtype not in own:
                wanted = " or ".join(str(d)[6:] for d in own)
                raise TypeError(f"{self.name}() expects {name} in {wanted}, got {value.dtype}")
            if own is None and not value.is_floating_point():
                raise TypeError(f"{self.name}() expects a floating-point tensor as {name}, got {value.dtype}")
        return tuple(bound)

    def _coerce(self, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Applies the op's dtype rule: autocast or promotion, and the always-fp32 arguments."""
        target: torch.dtype | None = None
        for i in self._deciding:
            value = args[i]
            if value is not None:
                if target is None:
                    target = value.dtype
                elif value.dtype is not target and self.autocast == "promote":
                    target = torch.promote_types(target, value.dtype)
        target = torch.float32 if target is None else target
        if self.autocast == "lower" and target is torch.float32:
            device = args[0].device.type
            if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
                target = torch.get_autocast_dtype(device)
        full = torch.float64 if target is torch.float64 else torch.float32
        out: list[Any] | None = None
        for i, fp32 in self._cast:
            value, wanted = args[i], full if fp32 else target
            if value is not None and value.dtype is not wanted:
                out = list(args) if out is None else out
                out[i] = value.to(wanted)
        return args if out is None else tuple(out)

    def asked(self, args: tuple[Any, ...]) -> list[bool]:
        """Per argument, whether a backend's backward has a gradient to compute when every tensor wants its own."""
        return [isinstance(a, Tensor) and a.is_floating_point() and i != self.residual_at for i, a in enumerate(args)]

    def all_backends(self) -> tuple[Backend, ...]:
        """The CPU backends, then the CUDA backends."""
        return (*self.cpu, *self.cuda)

    def _candidates(self, device: str) -> Sequence[Backend]:
        return self.cpu if device == "cpu" else self.cuda if device == "cuda" else ()

    def _ordered(self, device: str, args: tuple[Any, ...]) -> Sequence[Backend]:
        """The candidates, the one that these arguments want first."""
        candidates = self._candidates(device)
        if self.prefer is None or len(candidates) < 2:
            return candidates
        wanted = self.prefer(*args)
        first = [b for name in wanted for b in candidates if b.name == name]
        return [*first, *[b for b in candidates if b.name not in wanted]]

    def _why_not(self, candidate: Backend, device: str, args: tuple[Any, ...]) -> str | None:
        reason = _why_missing(candidate.library, device)
        if reason is not None:
            return reason
        for name, own, value in zip(self.names, self._own, args):
            if isinstance(value, Tensor):
                if value.device != args[0].device:
                    return f"{name} is on {value.device} and {self.names[0]} on {args[0].device}"
                if value.dtype == torch.float64 if own is not None else value.dtype not in KERNEL_DTYPES:
                    return f"{name} is {value.dtype}; the kernels take float32, bfloat16 and float16"
        return self.unsupported(candidate.name, *args)

    def choose(self, args: tuple[Any, ...]) -> str:
        """The backend for these bound arguments: the forced one, else the device's first that can take them, else
        "reference". Raises BackendError when a forced one cannot, or when strict mode would fall back."""
        device = args[0].device.type
        forced = _State.forced
        if forced == "reference":
            return forced
        if self.differentiable and _differentiated_forward():
            if _State.strict or forced is not None:
                raise BackendError(f"{self.name}: kernels have no torch.func or forward-mode derivatives, only ref has")
            return "reference"
        if forced is not None:
            for candidate in self.all_backends():
                if candidate.name == forced:
                    native_elsewhere = candidate.library == "native" and device != "cpu"
                    reason = f"it runs on the CPU, the inputs are on {device}" if native_elsewhere else None
                    reason = reason or self._why_not(candidate, device, args)
                    if reason is not None:
                        raise BackendError(f"{self.name}: backend {forced!r} was forced but cannot run: {reason}")
                    return forced
        reasons = []
        for candidate in self._ordered(device, args):
            reason = self._why_not(candidate, device, args)
            if reason is None:
                return candidate.name
            if reason != EMPTY:
                reasons.append(f"{candidate.name}: {reason}")
        empty = not reasons and bool(self._candidates(device))
        if _State.strict and not empty:
            why = "; ".join(reasons) or f"no kernels for device {device}"
            raise BackendError(f"{self.name}: MAETOK_FAST_STRICT=1 and no kernel can take these inputs ({why})")
        if not torch.compiler.is_compiling():
            for reason in reasons:
                _log_once(self.name, "kernels", reason)
        return "reference"

    def backends(self, device: str) -> list[tuple[str, str | None]]:
        """(name, why it is missing on this machine or None) of each backend for `device`, the preferred one first;
        "reference" closes the list."""
        rows: list[tuple[str, str | None]] = [
            (b.name, _why_missing(b.library, device)) for b in self._candidates(device)
        ]
        return [*rows, ("reference", None)]

    def reason(self, *args: Any, **kwargs: Any) -> dict[str, str | None]:
        """Why each backend of the inputs' device would not take these arguments (None: it would), in the order in which
        they are asked: the first with None computes the call."""
        bound = self._coerce(self.bind(args, kwargs))
        device = bound[0].device.type
        return {b.name: self._why_not(b, device, bound) for b in self._ordered(device, bound)}

    def __copy__(self) -> Op:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Op:
        return self

    def __reduce__(self) -> tuple[Callable[[str], Op], tuple[str]]:
        return _record, (self.name,)

    def backend_named(self, name: str) -> Backend:
        """The backend of this name, of whatever device; BackendError if there is none."""
        for candidate in self.all_backends():
            if candidate.name == name:
                return candidate
        raise BackendError(f"{self.name} has no backend {name!r}")
