# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""Without a CUDA device Triton kernels run in its interpreter and CUDA C++ kernels in an emulation (tests/emulate.py),
both decided before anything imports maetok_fast, and tests marked `gpu` are skipped; with one these run on it."""

from __future__ import annotations

import atexit
import contextlib
import importlib.util
import os
import shutil
import tempfile
from collections.abc import Iterator
from typing import Any

import emulate


def _has_gpu() -> bool:
    import ctypes

    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    count = ctypes.c_int()
    return cuda.cuInit(0) == 0 and cuda.cuDeviceGetCount(ctypes.byref(count)) == 0 and count.value > 0


os.environ.setdefault("MAETOK_FAST_TUNE", "0")  # no races: the same backends in every run
if "PYTEST_XDIST_WORKER" in os.environ:  # the workers share the cores: threads of theirs would wait for each other
    os.environ.setdefault("OMP_NUM_THREADS", "1")
if "TORCHINDUCTOR_CACHE_DIR" not in os.environ:
    # Inductor's cache knows a custom op by its name, not by the shapes that it returns: what another version of this
    # package left there would be used. One folder a run, the workers share it.
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = tempfile.mkdtemp(prefix="maetok-fast-inductor-")
    atexit.register(shutil.rmtree, os.environ["TORCHINDUCTOR_CACHE_DIR"], ignore_errors=True)
with contextlib.suppress(ImportError):
    import hypothesis

    # the same examples in every run; others by `--hypothesis-profile default`
    hypothesis.settings.register_profile("same", derandomize=True)
    hypothesis.settings.load_profile("same")
GPU = _has_gpu()
if not GPU and importlib.util.find_spec("triton") is not None:
    os.environ.setdefault("TRITON_INTERPRET", "1")
if not GPU and emulate.why_not() is None:
    with contextlib.suppress(emulate.CannotBuild):  # tests/test_cuda_emulator.py shows what the compiler says
        os.environ.setdefault(emulate.VARIABLE, str(emulate.build()))

import pytest  # noqa: E402
import torch  # noqa: E402

OP_FILES: list[Any] = []  # the records of --op-file


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--op-file", action="append", default=[], help="test the op records of this file, not the library's"
    )


def pytest_configure(config: pytest.Config) -> None:
    from maetok_fast.kernels._drive import load

    for path in config.getoption("--op-file"):
        OP_FILES.extend(load(path))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not (GPU and torch.cuda.is_available()):
        skip = pytest.mark.skip(reason="needs a CUDA device")
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(skip)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Tiny tensors: threads only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module", params=["v2", "avx2", "avx512", "avx512bf16", "amx", "generic"])
def instruction_set(request: pytest.FixtureRequest) -> Iterator[str]:
    """The native kernels of one instruction set after the other, as far as the process may go."""
    from maetok_fast.kernels import _native, _processor

    if _native.why_missing() is not None:
        pytest.skip(str(_native.why_missing()))
    most, levels = _native.level(), _processor.LEVELS
    if request.param != most and (most not in levels or request.param not in levels[: levels.index(most)]):
        pytest.skip(f"this process may use {most}")
    _native.lib().cpu_limit(request.param)
    yield request.param
    _native.lib().cpu_limit(most)


@pytest.fixture(scope="module")
def pipeline() -> Any:
    """The demo's models in fp32."""
    from maetok_fast.pipeline import Pipeline
    from maetok_fast.pipeline.demo import demo_generator, demo_tokenizer

    torch.manual_seed(0)
    return Pipeline(demo_tokenizer(), demo_generator(), precision="fp32")
