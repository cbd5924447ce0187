# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""The op library of another commit, made importable beside today's as the package maetok_base."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from io import BytesIO
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BASE_NAME = "maetok_base"


class Unusable(Exception):
    """Why nothing can be compared, in words."""


def git(*args: str) -> bytes:
    done = subprocess.run(["git", "-C", str(ROOT), *args], capture_output=True, check=False)
    if done.returncode != 0:
        raise Unusable(f"git {' '.join(args)}: {done.stderr.decode(errors='replace').strip()}")
    return done.stdout


def base_tree(ref: str, cache: Path) -> Path:
    """The folder to put on the path so that `maetok_base.kernels` is the op library of commit `ref`; made once a
    commit. Raises Unusable when the commit is not here or does not build."""
    try:
        commit = git("rev-parse", "--verify", f"{ref}^{{commit}}").decode().strip()
    except Unusable as error:
        raise Unusable(f"the base {ref} is not in this clone (fetch it, or give --base): {error}") from None
    tree = cache / commit
    if (tree / BASE_NAME / "kernels" / "__init__.py").exists():
        return tree
    tree.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=tree) as folder:
        source = Path(folder) / "source"
        with tarfile.open(fileobj=BytesIO(git("archive", commit))) as archive:
            archive.extractall(source, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
        _library(source)
        package = Path(folder) / BASE_NAME
        shutil.copytree(source / "kernels", package / "kernels")
        (package / "__init__.py").write_text("")
        for path in (package / "kernels").glob("**/*.py"):
            # its own names in torch.ops, in logging and in its name guard
            path.write_text(path.read_text().replace("maetok_fast", BASE_NAME))
        shutil.rmtree(tree / BASE_NAME, ignore_errors=True)
        package.rename(tree / BASE_NAME)
    return tree


def _library(source: Path) -> None:
    """The base's native library beside its kernels: today's file where its sources are today's, else built."""
    from maetok_fast.kernels import _native

    target = source / "kernels" / "_csrc.so"
    if _native.why_missing() is not None:
        return  # no native library on this machine: nothing native is compared
    if _sources(source) == _sources(ROOT):
        shutil.copy(_native._LIBRARY, target)
        return
    import torch

    cuda = {} if torch.cuda.is_available() else {"MAETOK_FAST_CUDA": "0"}
    done = subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", "--inplace"],
        cwd=source,
        env=os.environ | cuda,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0 or not target.exists():
        raise Unusable(f"the base's native library does not build:\n{(done.stdout + done.stderr).strip()[-2000:]}")


def _sources(root: Path) -> dict[str, bytes]:
    files = [root / "setup.py", *sorted((root / "csrc").rglob("*"))]
    return {str(path.relative_to(root)): path.read_bytes() for path in files if path.is_file()}
