# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""What gets installed: the wheel, the source distribution, and installs without a compiler or without nvcc.

Builds run here without isolation and without dependencies, on a copy of the tree; .ci/run covers the isolated install.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ("csrc", "kernels", "maetok_fast", "pyproject.toml", "setup.py", "MANIFEST.in", "LICENSE")

needs_tree = pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="needs the source tree")


def python(code: str, cwd: Path | str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=cwd,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **environment},
    )


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what the build reads, without anything built."""
    copy = tmp_path_factory.mktemp("tree")
    ignored = shutil.ignore_patterns("__pycache__", "*.so", "*.missing.txt", "*.egg-info")
    for name in (*SOURCES, "README.md"):
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, copy / name, ignore=ignored)
        elif source.exists():
            shutil.copy(source, copy / name)
    return copy


def build(tree: Path, what: str, out: Path, **environment: str) -> tuple[Path, str]:
    """(the wheel or sdist, what the build printed)"""
    code = f"import setuptools.build_meta as b; b.build_{what}({str(out)!r})"
    done = python(code, tree, **environment)
    assert done.returncode == 0, done.stdout + done.stderr
    (result,) = out.glob("*.whl" if what == "wheel" else "*.tar.gz")
    return result, done.stdout


def test_bare_kernels_is_refused_with_the_cure() -> None:
    done = python("import kernels", ROOT)
    assert done.returncode != 0
    assert "ImportError" in done.stderr
    assert "import maetok_fast.kernels" in done.stderr
    assert "pip install -e ." in done.stderr


@pytest.mark.parametrize("place", ["root", "elsewhere"])
def test_import_from_anywhere(place: str, tmp_path: Path) -> None:
    done = python("import maetok_fast.kernels as k; print(k.__name__)", ROOT if place == "root" else tmp_path)
    assert done.stdout.strip() == "maetok_fast.kernels", done.stderr


def test_import_is_light() -> None:
    code = (
        "import torch, sys, time\nt = time.perf_counter()\nimport maetok_fast, maetok_fast.kernels\n"
        "print(time.perf_counter() - t)\n"
        "print(*sorted({'timm', 'torchvision', 'lpips', 'cupy', 'PIL', 'matplotlib', 'rich'} & set(sys.modules)))"
    )
    seconds, heavy = python(code, ROOT).stdout.split("\n")[:2]
    assert heavy == "", f"importing the package loads {heavy}"
    assert float(seconds) < 5, "0.5 s when nothing else runs; this bound only catches a heavy import"


@needs_tree
@pytest.mark.packaging
def test_wheel_without_a_compiler(tree: Path, tmp_path: Path) -> None:
    """The install succeeds, the wheel holds kernels/ under its name, and why_missing() and the cure are there."""
    empty = tmp_path / "bin"
    empty.mkdir()
    wheel, log = build(tree, "wheel", tmp_path, PATH=str(empty), CXX="", CUDA_HOME="", CUDA_PATH="")
    assert "installing WITHOUT the native library: no C++ compiler was found" in log
    assert "-py3-none-" in wheel.name
    names = set(zipfile.ZipFile(wheel).namelist())
    here = {f"maetok_fast/kernels/{p.name}" for p in (ROOT / "kernels").glob("*.py")}
    here |= {str(p.relative_to(ROOT)) for p in (ROOT / "maetok_fast").rglob("*.py")}
    assert here <= names, f"missing in the wheel: {sorted(here - names)}"
    assert {n.split("/")[0] for n in names if not n.startswith("maetok_fast-")} == {"maetok_fast"}
    assert "maetok_fast/kernels/_csrc.missing.txt" in names
    assert "maetok_fast/py.typed" in names
    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)
    code = (
        "from maetok_fast.kernels import _native\nprint(_native.__file__)\nprint(_native.why_missing())\n"
        "try:\n    _native.lib()\nexcept RuntimeError as error:\n    print(error)"
    )
    where, why, error = python(code, tmp_path, PYTHONPATH=str(site)).stdout.strip().split("\n")
    assert where.startswith(str(site))
    assert "no C++ compiler was found" in why
    assert "install a C++ compiler" in error


@needs_tree
@pytest.mark.packaging
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_wheel_without_nvcc_holds_a_library_that_works(tree: Path, tmp_path: Path) -> None:
    """With one of the native kernels: .ci/run builds the whole library into a wheel, which takes minutes."""
    tree = Path(shutil.copytree(tree, tmp_path / "tree"))
    for source in (tree / "csrc" / "cpu").glob("*.cpp"):
        if source.stem != "gate_residual":
            source.unlink()
    programs = tmp_path / "bin"
    programs.mkdir()
    for name in ("g++", "as", "ld"):
        (programs / name).symlink_to(shutil.which(name) or name)
    environment = {"PATH": str(programs), "CUDA_HOME": "", "CUDA_PATH": "", "CXX": ""}
    if os.path.exists("/usr/local/cuda/bin/nvcc"):  # found without PATH; the other way to have none
        environment["MAETOK_FAST_CUDA"] = "0"
    (tmp_path / "out").mkdir()
    wheel, log = build(tree, "wheel", tmp_path / "out", **environment)
    assert "no CUDA" in log
    assert "maetok_fast/kernels/_csrc.so" in zipfile.ZipFile(wheel).namelist()
    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)
    code = (
        "import torch\nfrom maetok_fast import kernels\nfrom maetok_fast.kernels import _native\n"
        "lib = _native.lib()\nx = torch.ones(1, 2, 4); y = torch.empty_like(x)\n"
        "lib.gate_residual_fwd(x, x, x, y, 2)\nprint(lib.__class__.__name__, y.sum().item(), repr(lib.cuda_archs()))"
    )
    done = python(code, tmp_path, PYTHONPATH=str(site))
    assert done.stdout.split()[1:] == ["16.0", "''"], done.stdout + done.stderr


@needs_tree
@pytest.mark.packaging
def test_forced_cuda_fails_where_there_is_no_nvcc(tree: Path, tmp_path: Path) -> None:
    if os.path.exists("/usr/local/cuda/bin/nvcc"):
        pytest.skip("nvcc is found here even without PATH")
    empty = tmp_path / "bin"
    empty.mkdir()
    (empty / "g++").symlink_to(shutil.which("g++") or sys.executable)
    code = f"import setuptools.build_meta as b; b.build_wheel({str(tmp_path)!r})"
    done = python(code, tree, PATH=str(empty), CUDA_HOME="", CUDA_PATH="", MAETOK_FAST_CUDA="1")
    assert done.returncode != 0
    assert "MAETOK_FAST_CUDA=1, but nvcc was not found" in done.stdout + done.stderr


@needs_tree
@pytest.mark.packaging
def test_sdist_holds_what_a_build_needs(tree: Path, tmp_path: Path) -> None:
    archive, _ = build(tree, "sdist", tmp_path)
    with tarfile.open(archive) as tar:
        names = {name.split("/", 1)[1] for name in tar.getnames() if "/" in name}
    needed = {
        str(p.relative_to(ROOT)) for folder in ("csrc", "kernels", "maetok_fast") for p in (ROOT / folder).rglob("*")
    }
    needed = {n for n in needed if n.endswith((".py", ".cpp", ".h", ".cu", ".cuh", "py.typed"))}
    needed |= {"pyproject.toml", "setup.py", "LICENSE", "MANIFEST.in"}
    assert needed <= names, f"missing in the sdist: {sorted(needed - names)}"
    assert not [n for n in names if n.endswith(".so")]


def test_library_brings_no_cuda_runtime() -> None:
    """It loads on machines without a CUDA toolkit or driver: libcudart is inside, libcuda is opened when needed."""
    from maetok_fast.kernels import _native

    if _native.why_missing() is not None or shutil.which("readelf") is None:
        pytest.skip("needs the native library and readelf")
    library = Path(_native.__file__).with_name("_csrc.so")
    needed = subprocess.run(["readelf", "-d", str(library)], capture_output=True, text=True, check=True).stdout
    assert "libgomp.so.1" in needed
    for name in ("libcudart", "libcuda.so", "libtorch", "libpython"):
        assert name not in needed
    if _native.lib().cuda_archs():
        assert isinstance(_native.lib().cuda_status(), str)
