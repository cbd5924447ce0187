# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""What pyproject.toml cannot say: the list of packages, and csrc/ -> the native library.

The native library is one shared object, ``maetok_fast/kernels/_csrc.so``, built against apache-tvm-ffi's headers
(no torch, no Python ABI), so that one build serves every torch and every Python version.

    csrc/cpu/*.cpp       compiled once per instruction set (kernels) and once plainly (checks and exports)
    csrc/cpu/host/*.cpp  compiled once, plainly: no kernels
    csrc/cuda/*.cu       compiled by nvcc for every architecture of the list, when nvcc is found

A failure is not the end of the install: the reason is written to ``_csrc.missing.txt`` beside the place of the library,
``maetok_fast.kernels._native.why_missing()`` repeats it, and the reference and Triton paths work.

Environment: ``CXX``, ``MAETOK_FAST_CUDA`` (1: fail without CUDA, 0: never), ``MAETOK_FAST_CUDA_ARCHS`` ("8.0 9.0+PTX"),
``MAETOK_FAST_NATIVE`` (1: fail without the library, 0: do not build it), ``MAX_JOBS``.
"""

from __future__ import annotations

import os
import platform
import re
import shlex
import shutil
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"
LIBRARY = "maetok_fast.kernels._csrc"
REASON = "_csrc.missing.txt"

# One object per source and instruction set; csrc/cpu/simd.h picks the vector width from the compiler's own macros.
# AVX-512 means the x86-64-v4 subset (F, BW, CD, DQ, VL), which every CPU since Skylake-X has; avx512bf16 adds the
# conversion to bf16 in one instruction instead of eight (Cooper Lake, Sapphire Rapids, Zen 4 and later).
X86_VARIANTS = {
    "v2": ["-march=x86-64-v2"],
    "avx2": ["-march=x86-64-v3"],
    "avx512": ["-march=x86-64-v4", "-mprefer-vector-width=512"],
    "avx512bf16": ["-march=x86-64-v4", "-mavx512bf16", "-mprefer-vector-width=512"],
}
# A product and a sum are rounded apart unless the source says fma(): left to the compiler, one formula in two kernels
# (fused and not, forward and backward) comes out differently from one instruction set to the next.
MATH = ["-fno-trapping-math", "-fno-math-errno", "-ffp-contract=off"]
DEFAULT_CUDA_ARCHS = "8.0 9.0 10.0 12.0+PTX"


class CannotBuild(Exception):
    """Why there will be no library (or no CUDA half of it)."""


def run(command: list[str]) -> str:
    """Run one tool and return its output; on failure print all of it and raise its first error line."""
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
    if done.returncode != 0:
        print(f"{shlex.join(command)}\n{done.stdout}", flush=True)
        lines = done.stdout.strip().splitlines() or ["no output"]
        first = next((line for line in lines if "error" in line), lines[-1])
        raise CannotBuild(f"{command[0]} failed with status {done.returncode}: {first.strip()}")
    return done.stdout


def find_cxx() -> list[str]:
    """The C++ compiler as a command: $CXX, else g++, c++ or clang++ on PATH."""
    if os.environ.get("CXX"):
        command = shlex.split(os.environ["CXX"])
        if shutil.which(command[0]) is None:
            raise CannotBuild(f"CXX names {command[0]!r}, which is not on PATH")
        return command
    for name in ("g++", "c++", "clang++"):
        if shutil.which(name):
            return [name]
    raise CannotBuild("no C++ compiler was found (looked for g++, c++, clang++ on PATH and for $CXX)")


def find_cuda() -> tuple[str, Path]:
    """(nvcc, toolkit prefix). nvcc itself is asked for the prefix: on PATH it is often a wrapper script elsewhere."""
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    candidates = [str(Path(home) / "bin" / "nvcc") for home in homes]
    nvcc = next(
        (found for found in map(shutil.which, [*candidates, "nvcc", "/usr/local/cuda/bin/nvcc"]) if found), None
    )
    if nvcc is None:
        raise CannotBuild("nvcc was not found (looked in $CUDA_HOME/bin, on PATH and in /usr/local/cuda/bin)")
    top = re.search(r"^#\$ TOP=(.+)$", run([nvcc, "--dryrun", "-x", "cu", os.devnull]), re.M)
    prefix = Path(top.group(1).strip()).resolve() if top else Path(nvcc).resolve().parent.parent
    return nvcc, prefix


def cuda_architectures(nvcc: str) -> list[str]:
    """The architectures to build, as in "9.0" or "12.0+PTX"; the defaults are cut down to what this nvcc knows."""
    asked = os.environ.get("MAETOK_FAST_CUDA_ARCHS", "").replace(",", " ").replace(";", " ").split()
    for arch in asked:
        if not re.fullmatch(r"\d+\.\d+[af]?(\+PTX)?", arch):
            raise CannotBuild(f"MAETOK_FAST_CUDA_ARCHS holds {arch!r}; write it like '8.0 9.0 12.0+PTX'")
    if asked:
        return asked
    known = set(run([nvcc, "--list-gpu-arch"]).split())
    chosen = [a for a in DEFAULT_CUDA_ARCHS.split() if "compute_" + re.sub(r"\.|\+PTX", "", a) in known]
    if not chosen:
        raise CannotBuild(f"this nvcc knows none of the default architectures {DEFAULT_CUDA_ARCHS}")
    return chosen


def gencode(architectures: list[str]) -> list[str]:
    flags = []
    for arch in architectures:
        number = arch.removesuffix("+PTX").replace(".", "")
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if arch.endswith("+PTX"):
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return flags


class BuildNative(build_ext):
    """build_ext for the one native library."""

    def get_ext_filename(self, fullname: str) -> str:
        # No Python version in the name: the library has no Python ABI.
        return os.path.join(*fullname.split(".")) + ".so"

    def run(self) -> None:
        super().run()
        # setuptools copies what it built into the source tree for an editable install; the reason, and the fact
        # that a library or a reason is there no longer, have to follow.
        if self.editable_mode or self.inplace:
            for name in ("_csrc.so", REASON):
                built, kept = self.output_folder() / name, ROOT / "kernels" / name
                if built.exists():
                    shutil.copyfile(built, kept.with_suffix(".new"))
                    kept.with_suffix(".new").replace(kept)  # never write into a library that a process has mapped
                else:
                    kept.unlink(missing_ok=True)

    def copy_extensions_to_source(self) -> None:
        """Done in run(), which also copies the reason."""

    def output_folder(self) -> Path:
        return Path(self.build_lib, "maetok_fast", "kernels")

    def get_outputs(self) -> list[str]:
        return [
            str(path) for path in (self.output_folder() / "_csrc.so", self.output_folder() / REASON) if path.exists()
        ]

    def get_output_mapping(self) -> dict[str, str]:
        if not self.editable_mode:
            return {}
        return {path: str(ROOT / "kernels" / Path(path).name) for path in self.get_outputs()}

    def build_extension(self, ext: Extension) -> None:
        folder = self.output_folder()
        folder.mkdir(parents=True, exist_ok=True)
        library, reason = folder / "_csrc.so", folder / REASON
        library.unlink(missing_ok=True)
        reason.unlink(missing_ok=True)
        forced = os.environ.get("MAETOK_FAST_NATIVE")
        started = time.perf_counter()
        try:
            if forced == "0":
                raise CannotBuild("MAETOK_FAST_NATIVE=0 was set when the package was installed")
            what = self.build_library(library)
        except (CannotBuild, OSError) as error:
            if forced == "1" or (os.environ.get("MAETOK_FAST_CUDA") == "1" and "CUDA" in str(error)):
                raise SystemExit(f"maetok_fast: the native library was not built: {error}") from None
            reason.write_text(f"{error}\n")
            print(f"maetok_fast: installing WITHOUT the native library: {error}", flush=True)
        else:
            print(f"maetok_fast: native library built in {time.perf_counter() - started:.1f} s: {what}", flush=True)

    def build_library(self, library: Path) -> str:
        """Compile everything in parallel and link; returns one line about what is inside."""
        from tvm_ffi.libinfo import find_dlpack_include_path, find_include_path, find_libtvm_ffi

        if platform.system() not in ("Linux", "Darwin"):
            raise CannotBuild(f"the native kernels are written for Linux and macOS, not for {platform.system()}")
        cxx = find_cxx()
        objects = Path(self.build_temp, "csrc").resolve()
        shutil.rmtree(objects, ignore_errors=True)
        objects.mkdir(parents=True)
        x86 = platform.machine().lower() in ("x86_64", "amd64")
        variants = X86_VARIANTS if x86 else {"generic": []}
        includes = [f"-I{CSRC}", f"-I{find_include_path()}", f"-I{find_dlpack_include_path()}"]
        flags = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-fopenmp", "-Wall", "-Wno-psabi"]
        if x86:
            flags.append("-DMF_X86")

        cuda_sources = sorted(CSRC.glob("cuda/*.cu"))
        cuda = self.find_cuda_half() if cuda_sources else None
        cuda_libraries: list[str] = []
        jobs: list[list[str]] = []
        outputs: list[str] = []

        def compile_(tool: list[str], source: Path, tag: str, *extra: str) -> None:
            output = str(objects / f"{source.stem}.{tag}.o")
            jobs.append([*tool, *extra, "-c", str(source), "-o", output])
            outputs.append(output)

        host = ["-DMF_HOST", *includes]
        if cuda is not None:
            host += ["-DMF_CUDA", f'-DMF_CUDA_ARCHS="{" ".join(cuda[2])}"']
        for source in sorted(CSRC.glob("cpu/host/*.cpp")):
            compile_([*cxx, *flags], source, "host", *host)
        for source in sorted(CSRC.glob("cpu/*.cpp")):
            compile_([*cxx, *flags], source, "host", *host)
            for name, machine in variants.items():
                # No -ffast-math: NaN and infinity count, and the order of sums is the source's.
                kernel = [*machine, f"-DMF_VARIANT={name}", f"-I{CSRC}", *MATH]
                compile_([*cxx, *flags], source, name, *kernel)
        if cuda is not None:
            nvcc, prefix, architectures = cuda
            options = ["-std=c++17", "-O3", "-Xcompiler", "-fPIC,-fvisibility=hidden", *gencode(architectures)]
            for source in cuda_sources:
                compile_([nvcc], source, "cuda", *options, *includes, f'-DMF_CUDA_ARCHS="{" ".join(architectures)}"')
            # Static: machines without a CUDA toolkit or driver have no libcudart, and must still load the library.
            static = next((p for p in (prefix / "lib64", prefix / "lib") if (p / "libcudart_static.a").exists()), None)
            if static is None:
                raise CannotBuild(f"CUDA: libcudart_static.a is not under {prefix}/lib64; set CUDA_HOME to the toolkit")
            cuda_libraries = [str(static / "libcudart_static.a"), "-ldl", "-lpthread", "-lrt"]

        workers = int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)
        with ThreadPoolExecutor(workers) as pool:
            list(pool.map(run, jobs))
        ffi = Path(find_libtvm_ffi())
        # libgomp.so.1 is the soname under which torch has loaded its own copy by the time that this is loaded.
        run(
            [*cxx, "-shared", "-fopenmp", *outputs, f"-L{ffi.parent}", "-ltvm_ffi", *cuda_libraries, "-o", str(library)]
        )
        gpu = f"CUDA {' '.join(cuda[2])}" if cuda is not None else "no CUDA"
        return f"CPU {' '.join(variants)}; {gpu}; {library.stat().st_size / 1e6:.1f} MB"

    def find_cuda_half(self) -> tuple[str, Path, list[str]] | None:
        """(nvcc, prefix, architectures), or None after saying why; an error when MAETOK_FAST_CUDA=1."""
        forced = os.environ.get("MAETOK_FAST_CUDA")
        if forced == "0":
            return None
        try:
            nvcc, prefix = find_cuda()
            return nvcc, prefix, cuda_architectures(nvcc)
        except CannotBuild as error:
            if forced == "1":
                raise CannotBuild(f"MAETOK_FAST_CUDA=1, but {error}") from None
            print(f"maetok_fast: building without CUDA kernels: {error}", flush=True)
            return None


class AnyPython(bdist_wheel):
    """The wheel holds a platform library but no Python ABI: py3-none-<platform>."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


packages = ["maetok_fast.kernels", *find_packages(include=["maetok_fast", "maetok_fast.*"])]
setup(
    packages=packages,
    ext_modules=[Extension(LIBRARY, sources=[])],
    cmdclass={"build_ext": BuildNative, "bdist_wheel": AnyPython},
)
