# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""`Op`: the one abstraction of the op library, a record that can be called.

    call ── bind ── check ── coerce ── choose ──┬── "reference": ref(*args), autograd and torch.compile see plain torch
            (names) (shapes) (dtypes,  (table,  │
                              autocast) shapes) └── a kernel: Backend.forward and .backward, see `_registration`

Everything before a kernel is pure Python on shapes and dtypes, so `torch.compile(fullgraph=True)` traces through it.

A file of the library defines, in this order: the formula (docstring), `<op>_ref`, the kernels, their launchers, what
the record still needs (a check, samples) and the record `<op> = Op("<op>", ...)`; `gate_residual.py` is the one to
copy. From the list of records (`ops()`) come the correctness suite, the kernel benchmarks, the cost report and
`maetok-fast doctor`, with no further line per op.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ._dispatch import autocasts, choose, no_autocast, ordered, transformed, why_missing, why_not
from ._record import RECORDS, P, R, Record
from ._registration import plain_eager, register

__all__ = ["Op", "ops"]


def _record(name: str) -> Op[..., Any]:
    return RECORDS[name]


def ops() -> dict[str, Op[..., Any]]:
    """All records, by name."""
    return dict(RECORDS)


@dataclass(eq=False)
class Op(Record[P, R]):
    """A `Record` that computes: calling it, with `ref`'s signature, computes the op with the best backend for these
    inputs. Raises TypeError and ValueError as `ref`'s docstring says, BackendError as `_dispatch` does."""

    def __post_init__(self) -> None:
        super().__post_init__()
        ruled = [(i, r) for i, r in enumerate(self.roles_in_order) if self.is_tensor[i] and isinstance(r, str)]
        self._deciding = tuple(i for i, role in ruled if role != "fp32")
        self._cast = tuple((i, role == "fp32") for i, role in ruled if role != "as given")
        self._lowered = "lowered" in self.roles_in_order
        self.__doc__, self.__name__, self.__signature__ = self.ref.__doc__, self.name, self.signature
        self._forward_op, self._eager = register(self)

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        a = self.arguments(*args, **kwargs)
        if self.differentiable:
            return self._compute(a)
        # a constant of every kind of differentiation
        with torch.no_grad(), _no_tangents():
            return self._compute(a)

    def arguments(self, *args: P.args, **kwargs: P.kwargs) -> Any:
        """A call's arguments as a backend gets them: bound, checked, and in the dtypes of the op's rule."""
        a = self.bind(args, kwargs)
        self.check_shapes(a)
        self.check(a)
        return self.coerce(a)

    def _compute(self, a: Any) -> R:
        if self.tangent is not None and transformed(a):
            name = self.tangent.choose(a)
            if name != "reference":
                return cast(R, self.tangent.compute(self, name, a))
        chosen = choose(self, a)
        if chosen == "reference":
            with no_autocast(a[0].device.type):
                return cast(Callable[..., R], self.ref)(*a)
        if plain_eager(a):
            return self._eager(chosen, *a)
        out = self._forward_op(chosen, *a)
        if len(self.outputs) > 1:
            return cast(R, tuple(out[: len(self.outputs)]))
        return out[0] if self.saved else out

    def bind(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The arguments as `Args`, defaults filled in. Raises TypeError like a Python call does."""
        if len(args) > len(self.names):
            raise TypeError(f"{self.name}() takes {len(self.names)} arguments but {len(args)} were given")
        bound = list(args) + list(self.defaults[len(args) :])
        given = len(args)
        for key, value in kwargs.items():
            if key not in self.names:
                raise TypeError(f"{self.name}() got an unexpected argument {key!r}; it takes {', '.join(self.names)}")
            at = self.names.index(key)
            if at < len(args):
                raise TypeError(f"{self.name}() got two values for {key!r}")
            bound[at] = value
            given += at < self.required
        if len(args) < self.required and given < self.required:
            missing = [n for n in self.names[len(args) : self.required] if n not in kwargs]
            raise TypeError(f"{self.name}() misses {', '.join(missing)}")
        for name, (kind, types), role, value in zip(self.names, self.kinds, self.roles_in_order, bound):
            if not isinstance(value, types):
                wanted = kind.replace("Tensor", "a tensor").replace("|", "or")
                raise TypeError(f"{self.name}() expects {wanted} as {name}, got {type(value).__name__}")
            if not isinstance(value, Tensor):
                continue
            if isinstance(role, tuple):
                if value.dtype not in role:
                    wanted = " or ".join(str(d)[6:] for d in role)
                    raise TypeError(f"{self.name}() expects {name} in {wanted}, got {value.dtype}")
            elif not value.is_floating_point():
                raise TypeError(f"{self.name}() expects a floating-point tensor as {name}, got {value.dtype}")
        return self.Args(*bound)

    def coerce(self, a: Any) -> Any:
        """Applies the op's dtype rule: autocast or promotion, and the always-fp32 arguments."""
        target: torch.dtype | None = None
        for i in self._deciding:
            value = a[i]
            if value is not None:
                if target is None:
                    target = value.dtype
                elif value.dtype is not target and not self._lowered:
                    target = torch.promote_types(target, value.dtype)
        target = torch.float32 if target is None else target
        if self._lowered and target is torch.float32:
            device = a[0].device.type
            if autocasts(device):
                target = torch.get_autocast_dtype(device)
        full = torch.float64 if target is torch.float64 else torch.float32
        changed: dict[str, Tensor] = {}
        for i, fp32 in self._cast:
            value, wanted = a[i], full if fp32 else target
            if value is not None and value.dtype is not wanted:
                changed[self.names[i]] = value.to(wanted)
        return a._replace(**changed) if changed else a

    # ---- what tests, benchmarks and doctor ask -------------------------------------------------------------------

    def choose(self, *args: P.args, **kwargs: P.kwargs) -> str:
        """The name of the backend that would compute this call."""
        return choose(self, self.arguments(*args, **kwargs))

    def usable(self, device: str) -> list[tuple[str, str | None]]:
        """(name, why it is missing on this machine or None) of each backend for `device`, the preferred one first;
        "reference" closes the list."""
        return [*((b.name, why_missing(b.name, device)) for b in self.candidates(device)), ("reference", None)]

    def reason(self, *args: P.args, **kwargs: P.kwargs) -> dict[str, str | None]:
        """Why each backend of the inputs' device would not take these arguments (None: it would), in the order in which
        they are asked: the first with None computes the call."""
        a = self.arguments(*args, **kwargs)
        return {b.name: why_not(self, b.name, a) for b in ordered(self, a[0].device.type, a)}

    def __copy__(self) -> Op[P, R]:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Op[P, R]:
        return self

    def __reduce__(self) -> tuple[Callable[[str], Any], tuple[str]]:
        return _record, (self.name,)


def _no_tangents() -> contextlib.AbstractContextManager[Any]:
    """Forward-mode AD switched off, where it is on."""
    if torch.compiler.is_compiling() or forward_ad._current_level < 0:
        return contextlib.nullcontext()
    return forward_ad._set_fwd_grad_enabled(False)
