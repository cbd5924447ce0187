# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""gate_residual: y = x + gate * branch, the end of every residual branch.

x, branch (B, N, D); gate is (D,) (LayerScale's gamma: CaiT, DINOv2), (B, D) (adaLN-zero's gate) or (B, N, D). One
pass: 3 streams forward (x, branch, y); backward reads dy and branch and writes d_branch, sums d_gate per program in
fp32 and adds the sums in a fixed order, and hands its own gradient on to x uncopied.

branch and gate are read in their own dtype: under autocast the residual stream is fp32 and the branch comes in bf16
from a linear, and neither it nor its gradient is ever converted in memory.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._native_call import native
from ._op import Op
from ._record import TOKEN_SHAPES, Backend, drawn
from ._tiles import over_grid, over_row, row_chunk, row_options
from ._triton import add_up, tl, triton

__all__ = ["gate_residual", "gate_residual_ref"]


def gate_residual_ref(x: Tensor, gate: Tensor, branch: Tensor) -> Tensor:
    """x + gate * branch.

    x, branch (B, N, D) bf16, fp16 or fp32 (fp64: reference only); gate (D,), (B, D) or (B, N, D); each its own dtype.
    Returns (B, N, D) in their widest dtype. Raises ValueError when shapes do not fit together.
    """
    return torch.addcmul(x, gate.unsqueeze(1) if gate.ndim == 2 else gate, branch)


@triton.jit
def _gate_residual_fwd_kernel(
    x_ptr, gate_ptr, branch_ptr, y_ptr, N, D: tl.constexpr, PAD: tl.constexpr, KIND: tl.constexpr
):
    """One program: one row. KIND 0: gate (D,), 1: (B, D), 2: (B, N, D)."""
    row = tl.program_id(0).to(tl.int64)
    offs_d = tl.arange(0, PAD)
    mask = offs_d < D
    at = row if KIND == 2 else (row // N if KIND == 1 else 0)
    x = tl.load(x_ptr + row * D + offs_d, mask=mask).to(tl.float32)
    gate = tl.load(gate_ptr + at * D + offs_d, mask=mask).to(tl.float32)
    branch = tl.load(branch_ptr + row * D + offs_d, mask=mask).to(tl.float32)
    tl.store(y_ptr + row * D + offs_d, (x + gate * branch).to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _gate_residual_bwd_kernel(
    dy_ptr, gate_ptr, branch_ptr, dbranch_ptr, dgate_ptr, N,
    D: tl.constexpr, PAD: tl.constexpr, KIND: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """One program: CHUNK tokens of one image; d_gate per row (KIND 2) or as this program's sum (B * chunks, D) fp32."""
    pid_n, pid_b = tl.program_id(0), tl.program_id(1)
    program = (pid_b * tl.num_programs(0) + pid_n).to(tl.int64)
    offs_d = tl.arange(0, PAD)
    mask = offs_d < D
    total = tl.zeros((PAD,), tl.float32)
    for i in range(0, CHUNK):
        n = pid_n * CHUNK + i
        live = mask & (n < N)
        row = (pid_b * N + n).to(tl.int64)
        at = row if KIND == 2 else (pid_b if KIND == 1 else 0)
        dy = tl.load(dy_ptr + row * D + offs_d, mask=live, other=0.0).to(tl.float32)
        if dbranch_ptr is not None:
            gate = tl.load(gate_ptr + at * D + offs_d, mask=live, other=0.0).to(tl.float32)
            tl.store(dbranch_ptr + row * D + offs_d, (dy * gate).to(dbranch_ptr.dtype.element_ty), mask=live)
        if dgate_ptr is not None:
            dgate = dy * tl.load(branch_ptr + row * D + offs_d, mask=live, other=0.0).to(tl.float32)
            total += dgate
            if KIND == 2:
                tl.store(dgate_ptr + row * D + offs_d, dgate.to(dgate_ptr.dtype.element_ty), mask=live)
    if dgate_ptr is not None and KIND != 2:
        tl.store(dgate_ptr + program * D + offs_d, total, mask=mask)


def _forward(a, out):
    batch, n, width = a.x.shape
    _gate_residual_fwd_kernel[(batch * n,)](a.x, a.gate, a.branch, out.y, n, KIND=a.gate.ndim - 1, **row_options(width))


def _backward(a, out, g, d):
    batch, n, width = a.x.shape
    kind, chunk = a.gate.ndim - 1, row_chunk(batch * n)
    grid = (-(-n // chunk), batch)
    sums = None if d.gate is None or kind == 2 else a.x.new_empty(batch, grid[0], width, dtype=torch.float32)
    dgate = d.gate if kind == 2 else sums
    _gate_residual_bwd_kernel[grid](
        g.y, a.gate, a.branch, d.branch, dgate, n, KIND=kind, CHUNK=chunk, **row_options(width)
    )
    add_up(sums, 1 if kind == 1 else (0, 1), d.gate)


gate_residual = Op(
    "gate_residual",
    ref=gate_residual_ref,
    shapes={"x": "B N D", "branch": "B N D", "gate": "D | B D | B N D"},
    roles={"gate": "as given", "branch": "as given"},
    residual="x",
    cpu=[native("gate_residual_fwd x gate branch y kind", "gate_residual_bwd d_y gate branch d_branch d_gate kind",
                kind=lambda a: a.gate.ndim - 1)],
    cuda=[Backend("triton", _forward, _backward, lambda a: over_row(a.x.shape[2]) or over_grid(batch=a.x.shape[0]))],
    samples=[
        drawn("LayerScale", x=(3, 7, 48), gate=(48,), branch=(3, 7, 48)),
        drawn("adaLN-zero: per image", x=(2, 5, 33), gate=(2, 33), branch=(2, 5, 33)),
        drawn("per token", x=(2, 3, 16), gate=(2, 3, 16), branch=(2, 3, 16)),
        drawn("one row", x=(1, 1, 8), gate=(1, 8), branch=(1, 1, 8)),
        drawn("more rows than one chunk", x=(2, 21, 16), gate=(2, 16), branch=(2, 21, 16)),
        *(drawn(label, True, x=(b, n, d), gate=(b, d) if d == 1152 else (d,), branch=(b, n, d))
          for b, n, d, label in TOKEN_SHAPES),
    ],
    flops=lambda a: 2 * a.x.numel(),
)  # fmt: skip
