# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""silu_residual: y = x + silu(branch). All that an op needs, in one file.

    pytest tests/test_ops.py --op-file examples/add_an_op.py       correctness: values, gradients, compile, strides, ...
    maetok-fast bench ops --op-file examples/add_an_op.py          time against the reference and torch.compile of it
    python benchmarks/cost.py --op-file examples/add_an_op.py      registers, spills, shared memory on every GPU

An op of the library is such a file in kernels/ with one export line; a CPU kernel is csrc/cpu/<op>.cpp, named by
`cpu=[native("<op>_fwd x branch y", ...)]`.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from maetok_fast.kernels import Backend, Op, drawn
from maetok_fast.kernels._tiles import ELEMENTWISE
from maetok_fast.kernels._triton import tl, triton


def silu_residual_ref(x: Tensor, branch: Tensor) -> Tensor:
    """x + silu(branch): x, branch (B, N, D) -> (B, N, D). ValueError when shapes do not fit."""
    return x + F.silu(branch)


@triton.jit
def _silu_residual_kernel(x_ptr, branch_ptr, y_ptr, count, BLOCK_D: tl.constexpr, BACKWARD: tl.constexpr):
    """One program: BLOCK_D elements. Backward: x is dy and y is d_branch."""
    offs = tl.program_id(0).to(tl.int64) * BLOCK_D + tl.arange(0, BLOCK_D)
    x = tl.load(x_ptr + offs, mask=offs < count).to(tl.float32)
    b = tl.load(branch_ptr + offs, mask=offs < count).to(tl.float32)
    s = tl.sigmoid(b)
    y = x * (s + b * s * (1.0 - s)) if BACKWARD else x + b * s
    tl.store(y_ptr + offs, y.to(y_ptr.dtype.element_ty), mask=offs < count)


def _launch(a, out, g=None, d=None):
    """Forward, and backward where there are gradients to fill."""
    x, y = (a.x, out.y) if d is None else (g.y, d.branch)
    grid = (-(-x.numel() // ELEMENTWISE["BLOCK_D"]),)
    _silu_residual_kernel[grid](x, a.branch, y, x.numel(), BACKWARD=d is not None, **ELEMENTWISE)


silu_residual = Op(
    "silu_residual",
    ref=silu_residual_ref,
    shapes={"x": "B N D", "branch": "B N D"},
    residual="x",
    cuda=[Backend("triton", _launch, _launch)],
    samples=[
        drawn("odd width", x=(2, 5, 33), branch=(2, 5, 33)),
        drawn("one image", x=(1, 7, 16), branch=(1, 7, 16)),
        drawn("SiT-XL 128 tokens", True, x=(4, 128, 1152), branch=(4, 128, 1152)),
    ],
    flops=lambda a: 5 * a.x.numel(),
)
