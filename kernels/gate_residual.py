# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""gate_residual: y = x + gate * branch, the end of every residual branch.

x, branch (B, N, D); gate is (D,) (LayerScale's gamma: CaiT, DINOv2), (B, D) (adaLN-zero's gate) or (B, N, D). One
pass: 3 streams forward (x, branch, y); backward reads dy and branch and writes d_branch, sums d_gate per program in
fp32 and adds the sums in a fixed order, and hands its own gradient on to x uncopied.

branch and gate are read in their own dtype: under autocast the residual stream is fp32 and the branch comes in bf16
from a linear, and neither it nor its gradient is ever converted in memory.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import _native
from ._op import EMPTY, TOKEN_SHAPES, Backend, Cost, Op, Sample
from ._tiles import MAX_ROW, row_chunk, row_options
from ._triton import tl, triton

__all__ = ["gate_residual", "gate_residual_ref"]


# ---- reference -----------------------------------------------------------------------------------------------------


def gate_residual_ref(x: Tensor, gate: Tensor, branch: Tensor) -> Tensor:
    """x + gate * branch.

    x, branch (B, N, D) bf16, fp16 or fp32 (fp64: reference only); gate (D,), (B, D) or (B, N, D); each its own dtype.
    Returns (B, N, D) in their widest dtype. Raises ValueError when shapes do not fit together.
    """
    return torch.addcmul(x, gate.unsqueeze(1) if gate.ndim == 2 else gate, branch)


# ---- Triton --------------------------------------------------------------------------------------------------------


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
            branch = tl.load(branch_ptr + row * D + offs_d, mask=live, other=0.0).to(tl.float32)
            if KIND == 2:
                tl.store(dgate_ptr + row * D + offs_d, (dy * branch).to(dgate_ptr.dtype.element_ty), mask=live)
            else:
                total += dy * branch
    if dgate_ptr is not None and KIND != 2:
        tl.store(dgate_ptr + program * D + offs_d, total, mask=mask)


# ---- launchers -----------------------------------------------------------------------------------------------------


def _kind(gate: Tensor) -> int:
    return gate.ndim - 1


def _triton_forward(x: Tensor, gate: Tensor, branch: Tensor) -> tuple[Tensor, ...]:
    batch, n, width = x.shape
    y = torch.empty_like(x)
    _gate_residual_fwd_kernel[(batch * n,)](x, gate, branch, y, n, KIND=_kind(gate), **row_options(width))
    return (y,)


def _triton_backward(
    dy: Tensor, saved: Sequence[Tensor], args: tuple[Any, ...], needs: Sequence[bool]
) -> Sequence[Tensor | None]:
    _x, gate, branch = args
    batch, n, width = dy.shape
    chunk = row_chunk(batch * n)
    chunks = -(-n // chunk)
    kind = _kind(gate)
    dbranch = torch.empty_like(branch) if needs[2] else None
    dgate = None
    if needs[1]:
        dgate = torch.empty_like(gate) if kind == 2 else dy.new_empty(batch, chunks, width, dtype=torch.float32)
    _gate_residual_bwd_kernel[(chunks, batch)](
        dy, gate, branch, dbranch, dgate, n, KIND=kind, CHUNK=chunk, **row_options(width)
    )
    if dgate is not None and kind != 2:
        dgate = dgate.sum(1 if kind == 1 else (0, 1)).to(gate.dtype)
    return [None, dgate, dbranch]


def _native_forward(x: Tensor, gate: Tensor, branch: Tensor) -> tuple[Tensor, ...]:
    y = torch.empty_like(x)
    _native.lib().gate_residual_fwd(x, gate, branch, y, _kind(gate))
    return (y,)


def _native_backward(
    dy: Tensor, saved: Sequence[Tensor], args: tuple[Any, ...], needs: Sequence[bool]
) -> Sequence[Tensor | None]:
    _x, gate, branch = args
    dgate = torch.empty_like(gate) if needs[1] else None
    dbranch = torch.empty_like(branch) if needs[2] else None
    _native.lib().gate_residual_bwd(dy, gate, branch, dbranch, dgate, _kind(gate))
    return [None, dgate, dbranch]


# ---- record --------------------------------------------------------------------------------------------------------


def _check(x: Tensor, gate: Tensor, branch: Tensor) -> None:
    if x.ndim != 3 or x.shape != branch.shape:
        raise ValueError(
            f"gate_residual: x and branch must both be (B, N, D), got {tuple(x.shape)} and {tuple(branch.shape)}"
        )
    batch, _n, width = x.shape
    # by rank: comparing sizes of different meaning would tie a symbolic batch to the width
    if gate.ndim not in (1, 2, 3) or tuple(gate.shape) != ((width,), (batch, width), tuple(x.shape))[gate.ndim - 1]:
        raise ValueError(
            f"gate_residual: gate must be ({width},), ({batch}, {width}) or {tuple(x.shape)}, got {tuple(gate.shape)}"
        )


def _unsupported(backend: str, x: Tensor, gate: Tensor, branch: Tensor) -> str | None:
    if x.numel() == 0:
        return EMPTY
    if backend == "triton" and x.shape[2] > MAX_ROW:
        return f"D = {x.shape[2]}: a program holds one row, at most {MAX_ROW} elements"
    if backend == "triton" and x.shape[0] > 65535:
        return f"a batch of {x.shape[0]} exceeds a CUDA grid's second dimension"
    return None


def _fake(name: str, *args: Any) -> tuple[Tensor, ...]:
    return (torch.empty_like(args[0], memory_format=torch.contiguous_format),)


def _case(label: str, shape: tuple[int, int, int], kind: int, real: bool = False) -> Sample:
    like = (shape[2:], (shape[0], shape[2]), shape)[kind]
    return Sample(label, lambda randn: {"x": randn(*shape), "gate": randn(*like), "branch": randn(*shape)}, real)


def _samples() -> Iterable[Sample]:
    yield _case("LayerScale", (3, 7, 48), 0)
    yield _case("adaLN-zero: per image", (2, 5, 33), 1)
    yield _case("per token", (2, 3, 16), 2)
    yield _case("one row", (1, 1, 8), 1)
    yield _case("more rows than one chunk", (2, 21, 16), 1)
    for batch, n, width, label in TOKEN_SHAPES:
        yield _case(label, (batch, n, width), int(width == 1152), real=True)


def _cost(x: Tensor, gate: Tensor, branch: Tensor) -> Cost:
    size = 2 * x.numel() * x.element_size()
    return Cost(2 * x.numel(), size + sum(t.numel() * t.element_size() for t in (gate, branch)), 1)


gate_residual = Op(
    "gate_residual",
    ref=gate_residual_ref,
    cpu=(Backend("native", _native_forward, _native_backward, library="native"),),
    cuda=(Backend("triton", _triton_forward, _triton_backward, library="triton"),),
    fake=_fake,
    check=_check,
    unsupported=_unsupported,
    samples=_samples,
    cost=_cost,
    uncast=frozenset({"gate", "branch"}),
    residual="x",
)
