# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""Which backend computes a call: the only door, for the op records and for what is none (`ema_update`, `Fp8Linear`).

    forced by `backend(...)`?  ── that one, or BackendError with the reason
    under torch.func or forward-mode AD, with a tangent?  ── the op's `tangent`, where it has one that can; else
                                      "reference": other kernels have no tangents
    else the first of the device's backends that has no reason against it, else "reference" (strict mode raises)

All of it is Python on shapes and dtypes: torch.compile traces through it and sees a constant.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import logging
import os
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import _native
from ._record import EMPTY, RECORDS, Backend, BackendError, Record
from ._triton import why_no_triton

log = logging.getLogger("maetok_fast")

# What a library of attention must offer, not only be called: an uninstall leaves empty folders behind.
_PACKAGES = {
    "flash_attn": ("flash_attn", "flash_attn_func"),
    "xformers": ("xformers.ops", "memory_efficient_attention"),
}
_LOGGED: set[tuple[str, str]] = set()


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
    known = {"reference"} | {b.name for record in RECORDS.values() for b in record.backends}
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


def forced_backend() -> str | None:
    """The backend forced by `backend(...)`, or None."""
    return _State.forced


def autocasts(device_type: str) -> bool:
    """Whether autocast is on for this device type; never for those that have none (meta), where torch itself raises."""
    return torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)


def no_autocast(device_type: str) -> contextlib.AbstractContextManager[Any]:
    """Autocast switched off for this device type, where it exists (it does not for meta tensors)."""
    if torch.amp.is_autocast_available(device_type):
        return torch.autocast(device_type, enabled=False)
    return contextlib.nullcontext()


def has_tangent(values: Iterable[Any]) -> bool:
    """Whether one of these is a tensor with a forward-mode tangent. Levels do not nest: 0 is the only one. (That there
    is one, `forward_ad._current_level`, is not known inside of compiled graphs.)"""
    return any(isinstance(v, Tensor) and torch._VF._unpack_dual(v, level=0)[1] is not None for v in values)


class _Local(threading.local):
    tangents = False


_local = _Local()


@contextlib.contextmanager
def with_tangents() -> Iterator[None]:
    """References meet tangents in here, which they cannot see for themselves while a graph is traced."""
    before, _local.tangents = _local.tangents, True
    try:
        yield
    finally:
        _local.tangents = before


def transformed(values: Iterable[Any]) -> bool:
    """Whether a torch.func transform of this thread, or a tangent of one of the values, wants plain torch. While a
    graph is traced nothing does: the custom op in it answers when it runs (`_registration`, in `with_tangents`)."""
    if _local.tangents:
        return True
    if torch.compiler.is_compiling():
        return False
    if torch._C._functorch.maybe_current_level() is not None:
        return True
    return forward_ad._current_level >= 0 and has_tangent(values)


def one_jvp(values: Iterable[Any]) -> bool:
    """Whether forward-mode AD is on, once, and no other transform: dual numbers, or one `torch.func.jvp`."""
    stack = torch._C._functorch.get_interpreter_stack()
    if stack:
        return len(stack) == 1 and stack[0].key() == torch._C._functorch.TransformType.Jvp
    return has_tangent(values)


def why_missing(name: str, device: str) -> str | None:
    """Why backend `name` cannot run on tensors of this device type here, or None. Constant in a process."""
    if name == "native":
        return _native.why_missing() if device == "cpu" else f"it runs on the CPU, the inputs are on {device}"
    if name == "triton":
        return why_no_triton(device)
    if name == "cuda":
        return _native.why_no_cuda(device)
    return _why_no_package(name, device) if name in _PACKAGES else None


@functools.cache
def _why_no_package(name: str, device: str) -> str | None:
    """Why the attention library `name` cannot run on `device`, or None."""
    if device != "cuda":
        return f"{name} runs on CUDA tensors, these are on {device}"
    module, function = _PACKAGES[name]
    try:
        found = importlib.import_module(module)
        compiled = importlib.import_module("xformers._cpp_lib") if name == "xformers" else None
    except (Exception, SystemExit) as error:  # missing, built against another torch: whatever its import says
        return f"{name} does not import ({str(error).splitlines()[0] if str(error) else type(error).__name__})"
    if not hasattr(found, function):
        return f"the {module} that imports has no {function}: another version, or what an uninstall left"
    broken = getattr(compiled, "_cpp_library_load_exception", None)
    return None if broken is None else f"{name}'s compiled half does not load ({str(broken).splitlines()[0]})"


# What torch.compiler.assume_constant_result sets; calling it would import torch._dynamo (1.7 s) with this package.
why_missing._dynamo_marked_constant = True  # type: ignore[attr-defined]


def fall_back(op: str, reason: str) -> None:
    """A slower way is taken: logged at DEBUG, each reason once in a process; BackendError in strict mode."""
    if _State.strict:
        raise BackendError(f"{op}: MAETOK_FAST_STRICT=1 and no kernel can take these inputs ({reason})")
    if not torch.compiler.is_compiling() and (op, reason) not in _LOGGED:
        _LOGGED.add((op, reason))
        log.debug("%s: kernels not used: %s", op, reason)


def pick(
    op: str, device: str, order: Sequence[str], known: Collection[str], why_not: Callable[[str], str | None]
) -> str:
    """The backend of `known` that is forced, else the first of `order` for which `why_not(name)` is None, else
    "reference". Raises BackendError where a forced one cannot run, or strict mode forbids the reference."""
    forced = _State.forced
    if forced == "reference":
        return forced
    if forced is not None and forced in known:
        reason = why_not(forced)
        if reason is not None:
            raise BackendError(f"{op}: backend {forced!r} was forced but cannot run: {reason}")
        return forced
    reasons = []
    for name in order:
        reason = why_not(name)
        if reason is None:
            return name
        if reason != EMPTY:
            reasons.append(f"{name}: {reason}")
    if reasons or not order:
        fall_back(op, "; ".join(reasons) or f"no kernels for device {device}")
    return "reference"


def ordered(record: Record[..., Any], device: str, a: Any) -> Sequence[Backend]:
    """The device's backends, the one that these arguments want first."""
    candidates = record.candidates(device)
    if record.prefer is None or len(candidates) < 2:
        return candidates
    wanted = record.prefer(a)
    first = [b for name in wanted for b in candidates if b.name == name]
    return [*first, *[b for b in candidates if b.name not in wanted]]


def why_not(record: Record[..., Any], name: str, a: Any) -> str | None:
    """Why backend `name` does not compute these arguments here, or None."""
    reason = why_missing(name, a[0].device.type)
    return record.unsupported(name, a) if reason is None else reason


def choose_kernels(record: Record[..., Any], a: Any) -> str:
    """The backend for these arguments, whatever differentiates them."""
    device = a[0].device.type
    order = [b.name for b in ordered(record, device, a)]
    return pick(record.name, device, order, record.known, lambda name: why_not(record, name, a))


def choose(record: Record[..., Any], a: Any) -> str:
    """The backend for these arguments, as the module's docstring draws it."""
    if _State.forced == "reference":
        return "reference"
    if transformed(a):
        if _State.strict or _State.forced is not None:
            raise BackendError(f"{record.name}: kernels have no torch.func or forward-mode derivatives, only ref has")
        return "reference"
    return choose_kernels(record, a)
