# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""Builds the CPU kernels on AMX tiles with the tile instructions as plain code (csrc/cpu/amx_emulated.h), so that they
run on any processor with AVX512_BF16. The library holds the functions of `SOURCES` and no others."""

from __future__ import annotations

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import emulate

SOURCES = ("attention", "attention_bwd", "gemm", "gemm_pack", "peak", "rope_attention")
FLAGS = ["-std=c++17", "-O1", "-fPIC", "-fopenmp", "-Wno-psabi", "-DMF_X86", "-DMF_EMULATED_TILES"]
KERNEL = ["-march=x86-64-v4", "-mavx512bf16", "-DMF_VARIANT=avx512bf16", "-ffp-contract=off"]


def build() -> Path:
    """The library; raises emulate.CannotBuild. Kept by the hash of what goes into it."""
    from tvm_ffi.libinfo import find_dlpack_include_path, find_include_path, find_libtvm_ffi

    csrc = emulate.ROOT / "csrc"
    read = sorted([*csrc.rglob("*.h"), *csrc.glob("cpu/**/*.cpp"), Path(__file__)])
    tag = hashlib.sha256(b"".join(path.read_bytes() for path in read)).hexdigest()[:16]
    library = emulate._folder() / f"libmf_tiles.{tag}.so"
    if library.exists():
        return library
    work = library.with_name(f"tiles.{tag}.{os.getpid()}")
    work.mkdir(exist_ok=True)
    includes = [f"-I{csrc}", f"-I{find_include_path()}", f"-I{find_dlpack_include_path()}"]
    jobs, objects = [], []
    hosts = [csrc / "cpu" / "host" / f"{name}.cpp" for name in ("linear", "processor")]
    kernels = [csrc / "cpu" / f"{name}.cpp" for name in SOURCES]
    for source, flags in [(s, ["-DMF_HOST"]) for s in (*hosts, *kernels)] + [(s, KERNEL) for s in kernels]:
        objects.append(str(work / f"{len(objects)}.o"))
        jobs.append([*emulate.compiler(), *FLAGS, *flags, *includes, "-c", str(source), "-o", objects[-1]])
    with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)) as pool:
        list(pool.map(emulate._run, jobs))
    ffi = Path(find_libtvm_ffi())
    partial = work / "library.so"
    link = [f"-L{ffi.parent}", "-ltvm_ffi", "-o", str(partial)]
    emulate._run([*emulate.compiler(), "-shared", "-fopenmp", *objects, *link])
    partial.replace(library)
    for name in objects:
        Path(name).unlink()
    work.rmdir()
    return library
