# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""Finds the native library (csrc/), or says why there is none.

``why_missing()`` is cheap; ``lib()`` returns the library or raises RuntimeError with that reason and the cure. Both
raise ValueError where MAETOK_FAST_CPU asks for what cannot be (`_processor`). Nothing is loaded on import.

Every function of the library writes into the tensors it is given and returns nothing. Tensors are contiguous, on the
CPU, float32, bfloat16 or float16 unless said; sums run in float32, and results do not depend on the number of threads.
Its arguments are listed where it is called, in the op's record (`_native_call`), its shapes and types are checked and
described where it is written, csrc/cpu/<op>.cpp. Beside those of the ops there are

    attention_tiles()          whether bf16 attention runs on AMX tiles here
    cpu_best(), cpu_variant()  the processor's instruction set, and the one in use (`_processor.LEVELS`)
    cpu_limit(level)           use no kernel above this one
    cuda_archs()               "8.0 9.0 ...", "" when built without nvcc
    cuda_status()              "" when the CUDA kernels can run on this machine, else why not (built with nvcc only)
    emulator_seed(seed)        the order in which emulated threads run; 0: the kind one (emulation only)

`cuda()` is the module with the CUDA C++ functions, which take GPU tensors: this library, or, with the environment's
MAETOK_FAST_CUDA_EMULATOR naming one, a build of csrc/cuda for the CPU, which takes CPU tensors (the tests do that).

"""

from __future__ import annotations

import functools
import os
from pathlib import Path
from typing import Any

from . import _processor

_HERE = Path(__file__).resolve().parent
_LIBRARY = _HERE / "_csrc.so"
_REASON = _HERE / "_csrc.missing.txt"
# A library of csrc/cuda compiled for the CPU (tests/emulate.py): the CUDA functions then take CPU tensors.
EMULATOR = os.environ.get("MAETOK_FAST_CUDA_EMULATOR", "")
_CURE = "install a C++ compiler (Debian: apt-get install g++) and run `pip install -e .` (or `pip install .`) again"


@functools.cache
def _load() -> tuple[Any, str | None]:
    """(library, None) or (None, one sentence on why not); ValueError for an impossible MAETOK_FAST_CPU."""
    _processor.checked(_processor.LEVELS[-1])  # a word that is no level is refused without a library too
    if not _LIBRARY.exists():
        if _REASON.exists():
            return None, f"the native library was not built: {_REASON.read_text().strip()}"
        return None, f"the native library {_LIBRARY.name} is not beside {_HERE}: the package was never installed by pip"
    import torch  # noqa: F401  (its libgomp.so.1 has to be the one that the library finds)

    try:
        import tvm_ffi

        library = tvm_ffi.load_module(str(_LIBRARY))
        own = str(library.cpu_best())
    except Exception as error:  # a wrong platform, a missing libtvm_ffi: whatever the loader says
        return None, f"the native library {_LIBRARY} does not load: {error}"
    if own == "none":
        return None, "the native kernels need an x86-64-v2 processor (SSE4.2)"
    library.cpu_limit(_processor.checked(own))
    return library, None


def why_missing() -> str | None:
    """None when the native library can be used, else the reason in words. Cached."""
    return _load()[1]


def lib() -> Any:
    """The native library, a module with the functions above; RuntimeError with reason and cure if there is none."""
    library, reason = _load()
    if library is None:
        raise RuntimeError(f"{reason}; {_CURE}")
    return library


@functools.cache
def own_level() -> str:
    """The processor's own instruction set, one of `_processor.LEVELS` or another word (torch's without a library)."""
    if why_missing() is None:
        return str(lib().cpu_best())
    import torch

    has = torch.cpu.get_capabilities().get
    needs = (
        ("amx", ("amx_tile", "amx_bf16", "avx512_bf16")),
        ("avx512bf16", ("avx512_bf16",)),
        ("avx512", ("avx512_f", "avx512_bw", "avx512_cd", "avx512_dq", "avx512_vl")),
        ("avx2", ("avx2", "fma3", "f16c", "bmi2")),
        ("v2", ("sse4_2", "popcnt")),
    )
    return next((level for level, features in needs if all(map(has, features))), "generic")


def level() -> str:
    """The instruction set in use: the processor's own or MAETOK_FAST_CPU's; ValueError where that cannot be."""
    return _processor.checked(own_level())


@functools.cache
def _load_cuda() -> tuple[Any, str | None]:
    """(the module with the CUDA functions, None) or (None, why not)."""
    if EMULATOR:
        import tvm_ffi

        try:
            return tvm_ffi.load_module(EMULATOR), None
        except Exception as error:
            return None, f"the emulated CUDA kernels {EMULATOR} do not load: {error}"
    reason = why_missing()
    if reason is None and not lib().cuda_archs():
        reason = "the native library was built without nvcc"
    return (None, reason) if reason is not None else (lib(), lib().cuda_status() or None)


def why_no_cuda(device: str) -> str | None:
    """Why the CUDA C++ kernels cannot run on tensors of this device type ("cuda", "cpu"), or None."""
    if EMULATOR and device != "cpu":
        return "MAETOK_FAST_CUDA_EMULATOR runs the CUDA kernels on CPU tensors"
    if not EMULATOR and device != "cuda":
        return f"the CUDA kernels run on CUDA tensors, these are on {device}"
    return _load_cuda()[1]


def cuda() -> Any:
    """The module with the `<fn>_cuda` functions; RuntimeError with the reason if there is none."""
    module, reason = _load_cuda()
    if module is None:
        raise RuntimeError(f"{reason}")
    return module
