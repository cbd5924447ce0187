# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""Builds csrc/cuda for the CPU: the whole .cu files, launchers included, against the headers of tests/cuda_emulator.

    plain     every kernel runs, in a seeded order of threads; errors at barriers and shuffles
    races     ... and every access is recorded: two threads, one address, a write, no barrier between (races.cpp). The
              tests' default: it costs little more to build and to run, so every test looks for races
    address   ... or compiled with AddressSanitizer, for a process started with `asan_environment()`

Needs a C++ compiler and the headers of apache-tvm-ffi, no CUDA toolkit, no torch. Objects and libraries are kept by the
hash of what goes into them, in build/ of the source tree or, where that cannot be written, in the temporary folder.
"""

from __future__ import annotations

import functools
import hashlib
import os
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
HEADERS = ROOT / "tests" / "cuda_emulator"
VARIABLE = "MAETOK_FAST_CUDA_EMULATOR"
FLAGS = ["-std=c++17", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wno-unknown-pragmas", "-Wno-psabi", "-DMF_EMULATE"]
KINDS = {
    "plain": ["-O1", "-g1"],
    "races": ["-O1", "-g1", "-fsanitize=thread"],
    "address": ["-O1", "-g1", "-fsanitize=address", "-fno-omit-frame-pointer"],
}


class CannotBuild(Exception):
    """What is missing, or what the compiler said."""


def compiler() -> list[str]:
    """$CXX, g++, c++ or clang++ as a command; raises CannotBuild when there is none."""
    for candidate in (os.environ.get("CXX", ""), "g++", "c++", "clang++"):
        command = shlex.split(candidate)
        if command and shutil.which(command[0]):
            return command
    raise CannotBuild("no C++ compiler was found (looked for $CXX, g++, c++, clang++)")


def sources() -> list[Path]:
    """The CUDA sources of the library."""
    return sorted((ROOT / "csrc" / "cuda").glob("*.cu"))


@functools.cache
def _folder() -> Path:
    for parent in (ROOT / "build", Path(tempfile.gettempdir()) / f"maetok-fast-{os.getuid()}"):
        folder = parent / "cuda_emulator"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / ".writable").touch()
        except OSError:
            continue
        return folder
    raise CannotBuild("neither build/ nor the temporary folder can be written")


@functools.cache
def _headers_hash() -> str:
    found = [*(ROOT / "csrc").rglob("*.h"), *(ROOT / "csrc").rglob("*.cuh"), *HEADERS.glob("*.h")]
    return hashlib.sha256(b"".join(p.read_bytes() for p in sorted(found))).hexdigest()


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    if done.returncode != 0:
        raise CannotBuild(f"{shlex.join(command)}\n{done.stdout}{done.stderr}")


def build(kind: str = "races", units: Sequence[Path] | None = None, name: str = "libmf_cuda_emulated") -> Path:
    """The library of `units` (default: all of csrc/cuda) and the emulator. Raises CannotBuild."""
    from tvm_ffi.libinfo import find_dlpack_include_path, find_include_path, find_libtvm_ffi

    cxx, folder, own = compiler(), _folder(), KINDS[kind]
    version = subprocess.run([*cxx, "--version"], capture_output=True, text=True, check=False).stdout
    includes = [f"-I{ROOT / 'csrc'}", f"-I{HEADERS}", f"-I{find_include_path()}", f"-I{find_dlpack_include_path()}"]
    jobs: list[tuple[list[str], Path]] = []
    objects: list[Path] = []
    runtime = [HEADERS / "emulator.cpp", HEADERS / "races.cpp"]
    for source in [*runtime, *(sources() if units is None else units)]:
        # The race detector itself is not watched.
        flags = [f for f in own if f != "-fsanitize=thread" or source not in runtime]
        if kind == "races":
            flags = [*flags, "-DEMULATOR_RACES"]
        command = [*cxx, *FLAGS, *flags, *includes]
        tag = hashlib.sha256("\0".join([version, _headers_hash(), source.read_text(), *command]).encode()).hexdigest()[
            :16
        ]
        output = folder / f"{source.stem}.{kind}.{tag}.o"
        objects.append(output)
        if not output.exists():
            jobs.append(([*command, "-x", "c++", "-c", str(source)], output))
    tag = hashlib.sha256("".join(o.name for o in objects).encode()).hexdigest()[:16]
    library = folder / f"{name}.{kind}.{tag}.so"
    if library.exists():
        return library

    def into_place(command: list[str], output: Path) -> None:
        """Other processes may build the same: each writes its own file and renames it."""
        partial = output.with_name(f"{output.name}.{os.getpid()}")
        _run([*command, "-o", str(partial)])
        partial.replace(output)

    with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)) as pool:
        list(pool.map(lambda job: into_place(*job), jobs))
    ffi = Path(find_libtvm_ffi())
    link = ["-fsanitize=address"] if kind == "address" else []
    into_place([*cxx, "-shared", *link, *map(str, objects), f"-L{ffi.parent}", "-ltvm_ffi"], library)
    for kept in (library, *objects):  # what earlier sources left
        for old in folder.glob(f"{kept.name.split('.')[0]}.{kind}.*{kept.suffix}"):
            if old.name != kept.name:
                old.unlink(missing_ok=True)
    return library


def why_not() -> str | None:
    """Why nothing can be emulated here, or None. A compile error is no reason: it is for a test to show."""
    try:
        import tvm_ffi.libinfo  # noqa: F401

        compiler()
        _folder()
    except (CannotBuild, ImportError) as error:
        return str(error)
    return None


def asan_environment(library: Path) -> dict[str, str]:
    """The environment of a Python process that loads an "address" library: ASan has to be there first."""
    runtime = "libasan.so" if "clang" not in compiler()[-1] else "libclang_rt.asan-x86_64.so"
    found = subprocess.run([*compiler(), f"-print-file-name={runtime}"], capture_output=True, text=True, check=False)
    return {
        VARIABLE: str(library),
        "LD_PRELOAD": found.stdout.strip(),
        # For what Python, torch and Triton do, and this is not about.
        "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0:alloc_dealloc_mismatch=0:"
        "detect_container_overflow=0:detect_odr_violation=0",
    }
