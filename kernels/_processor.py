# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""One switch that pretends a lesser processor: MAETOK_FAST_CPU=v2|avx2|avx512|avx512bf16|amx.

    level        instructions                     processors that have no more    bf16 products
    v2           SSE4.2 (x86-64-v2)               before 2013                     emulated
    avx2         AVX2, FMA, F16C (x86-64-v3)      Haswell .. Zen 3, most laptops  emulated
    avx512       AVX-512 (x86-64-v4)              Skylake-X, Ice Lake             emulated
    avx512bf16   AVX512_BF16                      Cooper Lake, Zen 4, Zen 5       full rate
    amx          AMX-BF16 with a tile palette     Sapphire Rapids and later       full rate

The native library then uses no kernel above that level, and the libraries below torch are held to the same one, unless
their own variable is set already:

    ONEDNN_MAX_CPU_ISA        oneDNN: linear layers in bf16, packed ones in fp32 too, convolutions
    MKL_ENABLE_INSTRUCTIONS   MKL: fp32 products. Obeyed on Intel's processors; on others MKL chooses by itself
    ATEN_CPU_CAPABILITY       torch's own loops: attention, elementwise

Set MAETOK_FAST_CPU before the process starts. The three are set when `maetok_fast.kernels` is imported, and each
library reads its own at its first use: importing torch before is no harm, computing with it before is. Without
MAETOK_FAST_CPU nothing is set and every library takes the best that it finds.

A level that the processor does not have, or a word that is none, is refused by a ValueError at the first use of the
native library and in `maetok-fast doctor`; importing the package never fails for it.
"""

from __future__ import annotations

import functools
import os
import platform

__all__ = ["LEVELS", "SWITCH", "checked", "limit_libraries", "name", "onednn_level", "vendor"]

SWITCH = "MAETOK_FAST_CPU"
LEVELS = ("v2", "avx2", "avx512", "avx512bf16", "amx")
_LIMITS = {
    "ONEDNN_MAX_CPU_ISA": ("SSE41", "AVX2", "AVX512_CORE", "AVX512_CORE_BF16", None),
    "MKL_ENABLE_INSTRUCTIONS": ("SSE4_2", "AVX2", "AVX512", "AVX512_E3", None),
    "ATEN_CPU_CAPABILITY": ("default", "avx2", "avx512", "avx512", None),
}
# The values of ONEDNN_MAX_CPU_ISA below tiles, by the level that they amount to.
_ONEDNN = {
    "v2": ("SSE41", "AVX"),
    "avx2": ("AVX2", "AVX2_VNNI", "AVX2_VNNI_2"),
    "avx512": ("AVX512_CORE", "AVX512_CORE_VNNI"),
    "avx512bf16": ("AVX512_CORE_BF16", "AVX512_CORE_FP16", "AVX10_1_512"),
}


def limit_libraries() -> None:
    """Holds oneDNN, MKL and torch's loops to MAETOK_FAST_CPU's level; a variable that is set stays as it is."""
    asked = os.environ.get(SWITCH, "")
    if asked in LEVELS:
        for variable, names in _LIMITS.items():
            name = names[LEVELS.index(asked)]
            if name is not None:
                os.environ.setdefault(variable, name)


def checked(own: str) -> str:
    """The level to use on a processor whose own is `own` (one of LEVELS, or another word where there are none).

    ValueError where MAETOK_FAST_CPU is no level, or one above `own`.
    """
    asked = os.environ.get(SWITCH, "")
    if not asked:
        return own
    if asked not in LEVELS:
        raise ValueError(f"{SWITCH}={asked} is no instruction set: expected one of {', '.join(LEVELS)}, or unset")
    if own not in LEVELS or LEVELS.index(asked) > LEVELS.index(own):
        raise ValueError(f"{SWITCH}={asked} asks for more than this processor has, {own}: lower it, or unset it")
    return asked


def onednn_level(own: str) -> str:
    """The level up to which oneDNN may go on a processor whose own is `own`: ONEDNN_MAX_CPU_ISA as oneDNN reads it.

    No variable and a word that oneDNN does not know, which it passes over, are no limit.
    """
    if own not in LEVELS:
        return own
    name = (os.environ.get("ONEDNN_MAX_CPU_ISA") or os.environ.get("DNNL_MAX_CPU_ISA") or "").upper()
    most = next((level for level, names in _ONEDNN.items() if name in names), "amx")
    return LEVELS[min(LEVELS.index(own), LEVELS.index(most))]


def name() -> str:
    """The processor's own name, "unknown CPU" where the system does not tell."""
    return _cpuinfo("model name") or platform.processor() or "unknown CPU"


def vendor() -> str:
    """ "GenuineIntel", "AuthenticAMD", ..., "" where the system does not tell."""
    return _cpuinfo("vendor_id")


@functools.cache
def _cpuinfo(field: str) -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            return next((line.partition(":")[2].strip() for line in lines if line.startswith(field)), "")
    except OSError:
        return ""


limit_libraries()
