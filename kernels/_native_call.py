# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""Backends that are one C++ function forward and one backward, written as those functions' argument lists:

    native("gate_residual_fwd x gate branch y kind",
           "gate_residual_bwd d_y gate branch d_branch d_gate kind", kind=lambda a: a.gate.ndim - 1)

Each word names an argument, an output or saved tensor of the record, d_<output> its gradient, d_<argument> the gradient
to fill (None where nobody wants it), or a value given as a keyword, which is computed from the arguments; from the
gradients to fill, where its name starts with d_. `twins` is for functions that exist for both processors, with the same
arguments: <name> in csrc/cpu, <name>_cuda in csrc/cuda.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from . import _native
from ._record import Backend

__all__ = ["native", "twins"]

Value = Callable[[Any], Any]


class _Call:
    """A function of the library and where its arguments come from."""

    def __init__(self, text: str, values: dict[str, Value], library: Callable[[], Any], suffix: str) -> None:
        function, *self.words = text.split()
        self.function, self.values, self.library = function + suffix, values, library
        self.places: list[tuple[int, Any]] | None = None

    def __call__(self, a: Any, out: Any, g: Any = (), d: Any = ()) -> None:
        sources = (a, out, g, d)
        if self.places is None:
            self.places = [self._place(word, sources) for word in self.words]
        given = [at(sources[source]) if callable(at) else sources[source][at] for source, at in self.places]
        getattr(self.library(), self.function)(*(int(v) if v is True or v is False else v for v in given))

    def _place(self, word: str, sources: tuple[Any, ...]) -> tuple[int, Any]:
        """(index of the source, position in it or function of it)."""
        gradient = word.startswith("d_")
        if word in self.values:
            return (3 if gradient else 0), self.values[word]
        name = word[2:] if gradient else word
        for i in (2, 3) if gradient else (0, 1):
            fields = getattr(sources[i], "_fields", ())
            if name in fields:
                return i, fields.index(name)
        raise LookupError(f"{self.function}: {word!r} names no argument, output or value of its record")


def _backend(
    label: str, suffix: str, forward: str, backward: str | None, why_not: Any, values: dict[str, Value]
) -> Backend:
    library = _native.cuda if label == "cuda" else _native.lib
    back = None if backward is None else _Call(backward, values, library, suffix)
    return Backend(label, _Call(forward, values, library, suffix), back, why_not)


def native(
    forward: str, backward: str | None = None, why_not: Callable[[Any], str | None] = lambda a: None, **values: Value
) -> Backend:
    """The backend "native"; see the module's docstring."""
    return _backend("native", "", forward, backward, why_not, values)


def twins(
    forward: str,
    backward: str | None = None,
    why_no_cuda: Callable[[Any], str | None] = lambda a: None,
    **values: Value,
) -> dict[str, Any]:
    """cpu= and cuda= of a record whose functions exist for both; why_no_cuda: what only the CUDA one cannot take."""
    cpu = _backend("native", "", forward, backward, lambda a: None, values)
    cuda = _backend("cuda", "_cuda", forward, backward, why_no_cuda, values)
    return {"cpu": (cpu,), "cuda": (cuda,)}
