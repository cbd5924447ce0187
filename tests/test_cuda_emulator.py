# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""The CUDA C++ kernels on the CPU (tests/emulate.py): the emulation itself, and what it catches."""

from __future__ import annotations

import emulate
import pytest
import torch

from maetok_fast.kernels import _native

pytestmark = pytest.mark.skipif(emulate.why_not() is not None, reason=str(emulate.why_not()))


def test_every_cuda_source_compiles_for_the_cpu() -> None:
    emulate.build()
    assert _native.why_no_cuda("cpu") is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gate_residual(dtype: torch.dtype) -> None:
    x, gate, branch = torch.randn(2, 7, 33).to(dtype), torch.randn(2, 33), torch.randn(2, 7, 33).to(dtype)
    y = torch.full_like(x, float("nan"))
    _native.cuda().gate_residual_fwd_cuda(x, gate, branch, y, 1)
    assert torch.equal(y, (x.float() + gate[:, None] * branch.float()).to(dtype))
