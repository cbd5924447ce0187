# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""The CUDA C++ kernels on the CPU (tests/emulate.py): primitives against known answers, planted faults that have to be
caught (tests/cuda_emulator/planted.cu), and every kernel of the library under the race detector and under ASan."""

from __future__ import annotations

import functools
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import emulate
import pytest
import torch

from maetok_fast.kernels import _native

pytestmark = pytest.mark.skipif(emulate.why_not() is not None, reason=str(emulate.why_not()))
PLANTED = emulate.HEADERS / "planted.cu"
LINES = PLANTED.read_text().splitlines()


@functools.cache
def planted_library(kind: str) -> Path:
    return emulate.build(kind, [PLANTED], "planted")


@functools.cache
def planted(kind: str = "plain") -> Any:
    import tvm_ffi

    return tvm_ffi.load_module(str(planted_library(kind)))


@pytest.fixture(params=["plain", "races"])
def right(request: pytest.FixtureRequest) -> Any:
    """The planted kernels that are right, without and with the race detector watching."""
    return planted(request.param)


def line_of(text: str) -> int:
    """The line of planted.cu that holds `text`, exactly once."""
    (found,) = [i for i, line in enumerate(LINES, 1) if text in line]
    return found


def test_every_cuda_source_compiles_for_the_cpu() -> None:
    emulate.build()
    if not torch.cuda.is_available():
        assert _native.why_no_cuda("cpu") is None
        assert "CPU tensors" in str(_native.why_no_cuda("cuda"))


# ---- known answers ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("threads", "by", "width"), [(64, 1, 32), (96, 5, 16), (32, 3, 8), (64, 31, 32)])
def test_shuffles_and_votes(right: Any, threads: int, by: int, width: int) -> None:
    for seed in range(4):
        right.emulator_seed(seed)
        out = torch.full((8, threads), -1, dtype=torch.int32)
        right.shuffles(out, by, width)
        t = torch.arange(threads)
        base, at = t // width * width, t % width
        up = torch.where(at >= by, t - by, t)
        down = torch.where(at + by < width, t + by, t)
        xor = torch.where((at ^ by) < width, base + (at ^ by), t) if by < width else t
        assert out[0].tolist() == up.tolist()
        assert out[1].tolist() == down.tolist()
        if by < width:
            assert out[2].tolist() == xor.tolist()
        assert out[3].tolist() == (base + by % width).tolist()
        votes = (t % 3 == 0).view(-1, 32).long() << torch.arange(32)
        assert (out[4].long() & 0xFFFFFFFF).tolist() == votes.sum(1).repeat_interleave(32).tolist()
        first = t < 32
        assert out[5].tolist() == (first * 3).tolist()
        assert set(out[6].tolist()) == {int((t % 5 == 0).sum())}
        assert out[7].tolist() == torch.where(t % 32 < 8, t ^ 1, t ^ 2).tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("threads", [32, 128, 1024])
def test_block_sums_are_exact_and_the_same_in_every_order(right: Any, threads: int, dtype: torch.dtype) -> None:
    x = torch.randint(-8, 9, (3, 517)).to(dtype)
    for seed in (0, 1, 2):
        right.emulator_seed(seed)
        out = torch.full((3, 3), float("nan"))
        right.reduce(x, out, threads)
        exact = torch.stack([x.float().sum(1), x.float().square().sum(1), x.float().amax(1)], 1)
        assert torch.equal(out, exact)


def test_dynamic_shared_memory_and_2d_blocks(right: Any) -> None:
    x = torch.randn(19, 27)
    for seed in range(4):
        right.emulator_seed(seed)
        y = torch.full((27, 19), float("nan"))
        right.transpose(x, y)
        assert torch.equal(y, x.T)


def test_atomics(right: Any) -> None:
    x = torch.randint(-1000, 1000, (300,), dtype=torch.int32)
    counts, sum_, ends = torch.zeros(8, dtype=torch.int32), torch.zeros(1), torch.zeros(3, 1, dtype=torch.int32)
    right.atomics(x, counts, sum_, ends[0], ends[1], ends[2])
    assert counts.tolist() == torch.bincount(x & 7, minlength=8).tolist()
    assert sum_.item() == x.sum().item()
    assert ends.flatten().tolist() == [x.max().item(), x.min().item(), x.max().item()]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_conversions_are_torchs_bit_by_bit(dtype: torch.dtype) -> None:
    """Every 16-bit pattern to fp32; random fp32 patterns and all ties between neighbours to 16 bits."""
    every = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    finite = every[every.isfinite()].double().sort().values
    ties = ((finite[1:] + finite[:-1]) / 2).float()
    around = torch.cat([ties, ties.nextafter(torch.tensor(torch.inf)), ties.nextafter(torch.tensor(-torch.inf))])
    random = torch.randint(-(2**31), 2**31 - 1, (100_000,)).int().view(torch.float32)
    x = torch.cat([around, random, torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, 65519.9, 65520.0])])
    narrow, wide = torch.empty(x.shape, dtype=dtype), torch.empty(every.shape)
    planted().convert(x, narrow, every, wide)
    expected = x.to(dtype)
    assert torch.equal(narrow.isnan(), expected.isnan())
    assert torch.equal(narrow.view(torch.int16)[~x.isnan()], expected.view(torch.int16)[~x.isnan()])
    torch.testing.assert_close(wide, every.float(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("offset", [0, 1])
def test_packs(right: Any, dtype: torch.dtype, offset: int) -> None:
    x = torch.randn(1003).to(dtype)[offset:]
    y = torch.full_like(x, float("nan"))
    right.pack(x, y)
    assert torch.equal(y, x * 2)


def test_handing_over_to_the_last_block(right: Any) -> None:
    x = torch.randint(-9, 9, (300,)).float()
    for seed in range(5):
        right.emulator_seed(seed)
        out = torch.full((1,), float("nan"))
        right.last_block(x, torch.empty(5), torch.zeros(1, dtype=torch.int32), out, 1)
        assert out.item() == x.sum().item()


# ---- planted faults --------------------------------------------------------------------------------------------------


def error(call: Any, *args: Any) -> str:
    with pytest.raises(RuntimeError) as caught:
        call(*args)
    return str(caught.value)


def test_a_missing_barrier_gives_wrong_answers_in_an_unkind_order() -> None:
    """20 seeds: with the barrier always right, without it always wrong, because the tile starts as NaN."""
    lib = planted()
    x = torch.randn(2, 128)
    wrong = {0: 0, 1: 0}
    for barrier in wrong:
        for seed in range(1, 21):
            lib.emulator_seed(seed)
            y = torch.full_like(x, float("nan"))
            lib.reverse(x, y, barrier)
            wrong[barrier] += not torch.equal(y, x.flip(1))
    lib.emulator_seed(1)
    assert wrong[1] == 0
    assert wrong[0] == 20


@pytest.mark.parametrize("seed", range(4))
def test_a_missing_barrier_is_a_race_whatever_the_order(seed: int) -> None:
    lib = planted("races")
    x = torch.randn(2, 64)
    lib.emulator_seed(seed)
    lib.reverse(x, torch.empty_like(x), 1)
    message = error(lib.reverse, x, torch.empty_like(x), 0)
    assert "reverse_kernel" in message
    if "no thread of its block has written" not in message:  # the read came first
        assert re.search(r"race: 4 bytes of shared memory .* with no barrier between", message)
        assert f"planted.cu:{line_of('tile[t] = x[blockIdx.x * n + t]')}" in message
    assert f"planted.cu:{line_of('tile[n - 1 - t]')}" in message


def test_only_syncwarp_orders_the_lanes_of_a_warp() -> None:
    lib = planted("races")
    x = torch.randn(64)
    for seed in range(4):
        lib.emulator_seed(seed)
        y = torch.empty_like(x)
        lib.warp_reverse(x, y, 2)
        assert torch.equal(y, x.view(2, 32).flip(1).view(-1))
        for order in (0, 1):  # nothing, or a shuffle, which orders no memory accesses
            message = error(lib.warp_reverse, x, torch.empty_like(x), order)
            assert f"planted.cu:{line_of('tile[t ^ 31]')}" in message
    message = error(lib.warp_reverse, torch.randn(1, 32), torch.empty(1, 32), 1)
    assert "race: 4 bytes of shared memory" in message


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        (0, "divergent barrier: thread .* waits at __syncthreads .* while thread .* has returned"),
        (1, r"divergent barrier: thread .* waits at __syncthreads .*planted.cu:(\d+).* while .*planted.cu:(?!\1)\d+"),
        (2, "divergent barrier: thread .* waits at __syncthreads .* while thread .* has returned"),
        (4, "reads lane 20, which takes no part, at __shfl_sync"),
        (5, "is not in its own mask 0x0000ffff at __shfl_sync"),
    ],
)
def test_divergence_is_caught(kind: int, expected: str) -> None:
    for seed in range(3):
        planted().emulator_seed(seed)
        message = error(planted().divergent, torch.empty(64), kind)
        assert "divergent_kernel" in message
        assert "in block (0, 0, 0)" in message
        assert re.search(expected, message), message


def test_a_shuffle_from_lanes_that_left_is_caught() -> None:
    assert re.search("reads lane .* which takes no part", error(planted().divergent, torch.empty(64), 3))


def test_races_between_blocks() -> None:
    lib = planted("races")
    for kind, expected in (
        (0, r"were written by block \(.*\) thread .* and written by thread .* with no fence and atomic hand-over"),
        (1, "race: 4 bytes of global memory"),
        (3, "updated atomically"),
    ):
        message = error(lib.between_blocks, torch.zeros(6), kind)
        assert re.search(expected, message), message
        assert "between_blocks_kernel" in message
    y = torch.zeros(6)
    lib.between_blocks(y, 2)
    assert y[0] == 5
    message = error(
        lib.last_block, torch.ones(300), torch.empty(5), torch.zeros(1, dtype=torch.int32), torch.empty(1), 0
    )
    assert f"planted.cu:{line_of('total += partials[b]')}" in message


def test_shared_memory_of_a_former_block_is_not_read_unnoticed() -> None:
    message = error(planted("races").leftover, torch.empty(3, 32))
    assert "reads shared memory that no thread of its block has written" in message
    assert f"planted.cu:{line_of('= kept[threadIdx.x]')}" in message


def test_a_launch_that_no_gpu_takes_is_refused() -> None:
    message = error(planted().too_many_threads, torch.empty(4))
    assert "write_kernel failed: no GPU takes a grid of (1, 1, 1) blocks of (1025, 1, 1) threads" in message


OUT_OF_BOUNDS = """
import sys, torch, tvm_ffi
lib = tvm_ffi.load_module(sys.argv[1])
y = torch.zeros(100)
lib.write(y, 99)
lib.shared_write(torch.zeros(32), 31)
print("in bounds: fine", flush=True)
if sys.argv[2] == "global":
    lib.write(y, 100)
else:
    lib.shared_write(torch.zeros(32), 32)
print("not caught")
"""


def under_asan(library: Path, *command: str) -> subprocess.CompletedProcess[str]:
    import os

    environment = emulate.asan_environment(library)
    if not Path(environment["LD_PRELOAD"]).is_absolute():
        pytest.skip("the compiler has no shared AddressSanitizer runtime")
    return subprocess.run(
        [sys.executable, *command], env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize(("what", "line"), [("global", "y[at] = 1.0f"), ("shared", "tile[at] = 2.0f")])
def test_an_out_of_bounds_write_is_caught(what: str, line: str) -> None:
    library = planted_library("address")
    done = under_asan(library, "-c", OUT_OF_BOUNDS, str(library), what)
    assert done.stdout.split("\n")[0] == "in bounds: fine", done.stderr[-3000:]
    assert "not caught" not in done.stdout
    assert done.returncode != 0
    assert "AddressSanitizer: " in done.stderr
    assert "WRITE of size 4" in done.stderr
    if shutil.which("addr2line"):
        assert f"planted.cu:{line_of(line)}" in done.stderr


# ---- the library's own kernels ---------------------------------------------------------------------------------------


class Called:
    """A module that remembers which of its functions were asked for."""

    def __init__(self, module: Any) -> None:
        self.module, self.names = module, set[str]()

    def __getattr__(self, name: str) -> Any:
        self.names.add(name)
        return getattr(self.module, name)


def drive(seeds: tuple[int, ...] = (1,)) -> set[str]:
    """Every op's CUDA launchers, forward and backward, on all small samples in three dtypes; the functions called."""
    import test_ops

    module = Called(_native.cuda())
    before, _native._load_cuda = _native._load_cuda, lambda: (module, None)  # type: ignore[assignment]
    try:
        for seed in seeds:
            module.emulator_seed(seed)
            for op in test_ops.OPS:
                if "cuda" in op.known:
                    for sample in test_ops.small(op):
                        for dtype in test_ops.DTYPES:
                            a = op.arguments(**test_ops.make(op, sample, dtype))
                            if op.unsupported("cuda", a) is None:
                                test_ops.everything(op, "cuda", a)
    finally:
        _native._load_cuda = before
    return {name for name in module.names if name.endswith("_cuda")}


def exported() -> set[str]:
    """The CUDA functions of the library."""
    return {n for p in emulate.sources() for n in re.findall(r"TYPED_FUNC\((\w+_cuda),", p.read_text())}


def test_no_kernel_of_the_library_races() -> None:
    """Here they all run; tests/test_ops.py, whose library is the same, compares what they compute."""
    if "libmf_cuda_emulated.races" not in _native.EMULATOR:
        pytest.skip("another emulated library, or a GPU, was chosen")
    assert drive((0, 1)) == exported()


def test_no_kernel_of_the_library_leaves_its_tensors() -> None:
    """In a process of its own, with AddressSanitizer under Python, and without Triton, which is not its business."""
    code = "import test_cuda_emulator as t; called = t.drive(); assert called == t.exported(), called; print('clean')"
    tests = str(Path(__file__).parent)
    done = under_asan(
        emulate.build("address"),
        "-c",
        f"import sys; sys.modules['triton'] = None; sys.path.insert(0, {tests!r}); {code}",
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.split() == ["clean"]
