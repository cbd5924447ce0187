# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""adaln and gate_residual: the two elementwise halves of an adaLN transformer block.

    adaln:          y = LayerNorm(x; weight, bias) * (offset + scale) + shift
    gate_residual:  y = x + gate * branch

x (B, N, D). shift and scale are (B, D) (one per image: DiT, Peebles & Xie 2023, arXiv 2212.09748) or (B, T, D) with
T <= N (one per token, for the last T tokens; the others get the plain norm: MAETok's MoVQ decoder). offset is 1 in DiT
(`1 + scale`) and 0 in MoVQ (plain `scale`). gate is (D,) (LayerScale), (B, D) (adaLN-zero) or (B, N, D).

Forward reads x and writes y once: mean, variance and modulation stay in registers. Backward reads dy and x once and
writes dx; the sums over tokens (d_shift, d_scale, d_gate) and over everything (d_weight, d_bias) are kept per program
in fp32 and added in a fixed order, so results do not depend on the schedule. gate_residual hands its own gradient on to
x uncopied. Statistics and sums are fp32 whatever x is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _native
from ._op import EMPTY, Backend, Cost, Op, Sample
from ._tiles import next_power_of_2, row_chunk, row_warps
from ._triton import tl, triton

__all__ = ["adaln", "adaln_ref", "gate_residual", "gate_residual_ref"]

_MAX_WIDTH = 16384  # one row lives in one program's registers


# ---- reference -----------------------------------------------------------------------------------------------------


def adaln_ref(
    x: Tensor,
    shift: Tensor | None = None,
    scale: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-6,
    offset: float = 1.0,
) -> Tensor:
    """LayerNorm over the last dimension, then modulation: LN(x; weight, bias) * (offset + scale) + shift.

    x (B, N, D) bf16, fp16 or fp32 (fp64: reference only).
    shift, scale: both (B, D), for all tokens, or both (B, T, D) with T <= N, for the last T tokens; either may be None.
    weight, bias (D,): affine of the norm, each optional. eps: added to the (biased) variance.
    offset: 1.0 for DiT's `1 + scale`, 0.0 for MoVQ's `scale`; without scale nothing is multiplied.
    Returns (B, N, D) in the widest dtype of x, shift and scale. Raises ValueError when shapes do not fit together.
    """
    y = F.layer_norm(
        x, x.shape[-1:], None if weight is None else weight.to(x), None if bias is None else bias.to(x), eps
    )
    if shift is None and scale is None:
        return y
    like = scale if scale is not None else shift
    assert like is not None
    plain, y = (y[:, :0], y) if like.ndim == 2 else y.split((x.shape[1] - like.shape[1], like.shape[1]), 1)
    if scale is not None:
        y = y * (offset + (scale.unsqueeze(1) if scale.ndim == 2 else scale))
    if shift is not None:
        y = y + (shift.unsqueeze(1) if shift.ndim == 2 else shift)
    return torch.cat((plain, y), 1) if plain.shape[1] else y


def gate_residual_ref(x: Tensor, gate: Tensor, branch: Tensor) -> Tensor:
    """x + gate * branch.

    x, branch (B, N, D) bf16, fp16 or fp32 (fp64: reference only); gate (D,), (B, D) or (B, N, D).
    Returns (B, N, D) in their widest dtype. Raises ValueError when shapes do not fit together.
    """
    return torch.addcmul(x, gate.unsqueeze(1) if gate.ndim == 2 else gate, branch)


# ---- Triton --------------------------------------------------------------------------------------------------------


@triton.jit
def _adaln_fwd_kernel(
    x_ptr, shift_ptr, scale_ptr, weight_ptr, bias_ptr, y_ptr, stats_ptr, N, T, eps, offset,
    D: tl.constexpr, PAD: tl.constexpr, PER_TOKEN: tl.constexpr,
):  # fmt: skip
    """One program: one row. stats (B * N, 2) fp32: mean and 1 / sqrt(var + eps)."""
    row = tl.program_id(0).to(tl.int64)
    offs_d = tl.arange(0, PAD)
    mask = offs_d < D
    x = tl.load(x_ptr + row * D + offs_d, mask=mask, other=0.0).to(tl.float32)
    mean = tl.sum(x, 0) / D
    x = tl.where(mask, x - mean, 0.0)
    rstd = tl.rsqrt(tl.sum(x * x, 0) / D + eps)
    tl.store(stats_ptr + row * 2, mean)
    tl.store(stats_ptr + row * 2 + 1, rstd)
    y = x * rstd
    if weight_ptr is not None:
        y *= tl.load(weight_ptr + offs_d, mask=mask, other=0.0)
    if bias_ptr is not None:
        y += tl.load(bias_ptr + offs_d, mask=mask, other=0.0)
    at, mask_t = _modulation_row(row, mask, N, T, D, PER_TOKEN)
    if scale_ptr is not None:
        y *= offset + tl.load(scale_ptr + at + offs_d, mask=mask_t, other=1.0 - offset).to(tl.float32)
    if shift_ptr is not None:
        y += tl.load(shift_ptr + at + offs_d, mask=mask_t, other=0.0).to(tl.float32)
    tl.store(y_ptr + row * D + offs_d, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _modulation_row(row, mask, N, T, D: tl.constexpr, PER_TOKEN: tl.constexpr):
    """(offset of the row's shift and scale, mask): the last T tokens have their own, or all share the image's."""
    if PER_TOKEN:
        t = row % N - (N - T)
        return (row // N * T + t) * D, mask & (t >= 0)
    else:
        return row // N * D, mask


@triton.jit
def _adaln_bwd_kernel(
    dy_ptr, x_ptr, scale_ptr, weight_ptr, bias_ptr, stats_ptr, dx_ptr, dshift_ptr, dscale_ptr, dweight_ptr, dbias_ptr,
    N, T, offset,
    D: tl.constexpr, PAD: tl.constexpr, PER_TOKEN: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """One program: CHUNK tokens of one image. Writes d_x (and per-token d_shift, d_scale); the sums over its tokens
    (per-image d_shift, d_scale; d_weight, d_bias) go to one row per program, (B * chunks, D) fp32."""
    pid_n, pid_b = tl.program_id(0), tl.program_id(1)
    program = (pid_b * tl.num_programs(0) + pid_n).to(tl.int64)
    offs_d = tl.arange(0, PAD)
    mask = offs_d < D
    sum_shift = tl.zeros((PAD,), tl.float32)
    sum_scale = tl.zeros((PAD,), tl.float32)
    sum_weight = tl.zeros((PAD,), tl.float32)
    sum_bias = tl.zeros((PAD,), tl.float32)
    for i in range(0, CHUNK):
        n = pid_n * CHUNK + i
        live = mask & (n < N)
        row = (pid_b * N + n).to(tl.int64)
        mean = tl.load(stats_ptr + row * 2, mask=n < N, other=0.0)
        rstd = tl.load(stats_ptr + row * 2 + 1, mask=n < N, other=0.0)
        x = tl.load(x_ptr + row * D + offs_d, mask=live, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + row * D + offs_d, mask=live, other=0.0).to(tl.float32)
        x_hat = tl.where(live, (x - mean) * rstd, 0.0)
        at, mask_t = _modulation_row(row, live, N, T, D, PER_TOKEN)
        if dshift_ptr is not None:
            if PER_TOKEN:
                tl.store(dshift_ptr + at + offs_d, dy.to(dshift_ptr.dtype.element_ty), mask=mask_t)
            else:
                sum_shift += dy
        if dscale_ptr is not None:
            normed = x_hat
            if weight_ptr is not None:
                normed *= tl.load(weight_ptr + offs_d, mask=mask, other=0.0)
            if bias_ptr is not None:
                normed += tl.load(bias_ptr + offs_d, mask=mask, other=0.0)
            if PER_TOKEN:
                tl.store(dscale_ptr + at + offs_d, (dy * normed).to(dscale_ptr.dtype.element_ty), mask=mask_t)
            else:
                sum_scale += dy * normed
        if scale_ptr is not None:
            dy *= offset + tl.load(scale_ptr + at + offs_d, mask=mask_t, other=1.0 - offset).to(tl.float32)
        if dweight_ptr is not None:
            sum_weight += dy * x_hat
        if dbias_ptr is not None:
            sum_bias += dy
        if weight_ptr is not None:
            dy *= tl.load(weight_ptr + offs_d, mask=mask, other=0.0)
        dx = (dy - tl.sum(dy, 0) / D - x_hat * (tl.sum(dy * x_hat, 0) / D)) * rstd
        tl.store(dx_ptr + row * D + offs_d, dx.to(dx_ptr.dtype.element_ty), mask=live)
    if not PER_TOKEN:
        if dshift_ptr is not None:
            tl.store(dshift_ptr + program * D + offs_d, sum_shift, mask=mask)
        if dscale_ptr is not None:
            tl.store(dscale_ptr + program * D + offs_d, sum_scale, mask=mask)
    if dweight_ptr is not None:
        tl.store(dweight_ptr + program * D + offs_d, sum_weight, mask=mask)
    if dbias_ptr is not None:
        tl.store(dbias_ptr + program * D + offs_d, sum_bias, mask=mask)


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


def _modulation(shift: Tensor | None, scale: Tensor | None) -> tuple[int, bool]:
    """(T, whether shift and scale are per token)."""
    like = scale if scale is not None else shift
    per_token = like is not None and like.ndim == 3
    return 0 if like is None else like.shape[1] if per_token else 1, per_token


def _with_tokens(m: Tensor | None) -> Tensor | None:
    """(B, D) -> (B, 1, D), what the native library takes; (B, T, D) as it is."""
    return m.unsqueeze(1) if m is not None and m.ndim == 2 else m


def _rows(width: int) -> dict[str, int]:
    return {"D": width, "PAD": next_power_of_2(width), "num_warps": row_warps(width)}


def _triton_forward(*args: Any) -> tuple[Tensor, ...]:
    x, shift, scale, weight, bias, eps, offset = args
    tokens, per_token = _modulation(shift, scale)
    batch, n, width = x.shape
    y = torch.empty_like(x)
    stats = x.new_empty(batch * n, 2, dtype=torch.float32)
    _adaln_fwd_kernel[(batch * n,)](
        x, shift, scale, weight, bias, y, stats, n, tokens, eps, offset, PER_TOKEN=per_token, **_rows(width)
    )
    return y, stats


def _triton_backward(
    dy: Tensor, saved: Sequence[Tensor], args: tuple[Any, ...], needs: Sequence[bool]
) -> Sequence[Tensor | None]:
    x, shift, scale, weight, bias, _eps, offset = args
    tokens, per_token = _modulation(shift, scale)
    batch, n, width = x.shape
    chunk = row_chunk(batch * n)
    chunks = -(-n // chunk)
    dx = torch.empty_like(x)

    def sums(wanted: bool) -> Tensor | None:
        return x.new_empty(batch, chunks, width, dtype=torch.float32) if wanted else None

    if per_token:
        dshift = torch.empty_like(shift) if needs[1] and shift is not None else None
        dscale = torch.empty_like(scale) if needs[2] and scale is not None else None
    else:
        dshift, dscale = sums(needs[1]), sums(needs[2])
    dweight, dbias = sums(needs[3]), sums(needs[4])
    _adaln_bwd_kernel[(chunks, batch)](
        dy, x, scale, weight, bias, saved[0], dx, dshift, dscale, dweight, dbias, n, tokens, offset,
        PER_TOKEN=per_token, CHUNK=chunk, **_rows(width),
    )  # fmt: skip
    if not per_token:
        dshift, dscale = (None if s is None else s.sum(1).to(x.dtype) for s in (dshift, dscale))
    dweight, dbias = (None if s is None else s.sum((0, 1)) for s in (dweight, dbias))
    return [dx, dshift, dscale, dweight, dbias, None, None]


def _native_forward(*args: Any) -> tuple[Tensor, ...]:
    x, shift, scale, weight, bias, eps, offset = args
    _tokens, per_token = _modulation(shift, scale)
    shift, scale = _with_tokens(shift), _with_tokens(scale)
    y = torch.empty_like(x)
    stats = x.new_empty(x.shape[0] * x.shape[1], 2, dtype=torch.float32)
    _native.lib().adaln_fwd(x, shift, scale, weight, bias, y, stats, eps, offset, int(not per_token))
    return y, stats


def _native_backward(
    dy: Tensor, saved: Sequence[Tensor], args: tuple[Any, ...], needs: Sequence[bool]
) -> Sequence[Tensor | None]:
    x, shift, scale, weight, bias, _eps, offset = args
    _tokens, per_token = _modulation(shift, scale)
    shift, scale = _with_tokens(shift), _with_tokens(scale)
    dx = torch.empty_like(x)
    dshift = torch.empty_like(shift) if needs[1] and shift is not None else None
    dscale = torch.empty_like(scale) if needs[2] and scale is not None else None
    dweight = torch.empty_like(weight) if needs[3] else None
    dbias = torch.empty_like(bias) if needs[4] else None
    _native.lib().adaln_bwd(
        dy, x, scale, weight, bias, saved[0], dx, dshift, dscale, dweight, dbias, offset, int(not per_token)
    )
    if not per_token:
        dshift, dscale = (None if g is None else g.squeeze(1) for g in (dshift, dscale))
    return [dx, dshift, dscale, dweight, dbias, None, None]


def _gate_kind(gate: Tensor) -> int:
    return gate.ndim - 1


def _gate_triton_forward(x: Tensor, gate: Tensor, branch: Tensor) -> tuple[Tensor, ...]:
    batch, n, width = x.shape
    y = torch.empty_like(x)
    _gate_residual_fwd_kernel[(batch * n,)](x, gate, branch, y, n, KIND=_gate_kind(gate), **_rows(width))
    return (y,)


def _gate_triton_backward(
    dy: Tensor, saved: Sequence[Tensor], args: tuple[Any, ...], needs: Sequence[bool]
) -> Sequence[Tensor | None]:
    _x, gate, branch = args
    batch, n, width = dy.shape
    chunk = row_chunk(batch * n)
    chunks = -(-n // chunk)
    kind = _gate_kind(gate)
    dbranch = torch.empty_like(branch) if needs[2] else None
    dgate = None
    if needs[1]:
        dgate = torch.empty_like(gate) if kind == 2 else dy.new_empty(batch, chunks, width, dtype=torch.float32)
    _gate_residual_bwd_kernel[(chunks, batch)](
        dy, gate, branch, dbranch, dgate, n, KIND=kind, CHUNK=chunk, **_rows(width)
    )
    if dgate is not None and kind != 2:
        dgate = dgate.sum(1 if kind == 1 else (0, 1)).to(gate.dtype)
    return [None, dgate, dbranch]


def _gate_native_forward(x: Tensor, gate: Tensor, branch: Tensor) -> tuple[Tensor, ...]:
    y = torch.empty_like(x)
    _native.lib().gate_residual_fwd(x, gate, branch, y, _gate_kind(gate))
    return (y,)


def _gate_native_backward(
    dy: Tensor, saved: Sequence[Tensor], args: tuple[Any, ...], needs: Sequence[bool]
) -> Sequence[Tensor | None]:
    _x, gate, branch = args
    dbranch, dgate = torch.empty_like(branch), torch.empty_like(gate)
    _native.lib().gate_residual_bwd(dy, gate, branch, dbranch, dgate, _gate_kind(gate))
    return [None, dgate, dbranch]


# ---- records -------------------------------------------------------------------------------------------------------


def _check(
    x: Tensor,
    shift: Tensor | None,
    scale: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    offset: float,
) -> None:
    if x.ndim != 3:
        raise ValueError(f"adaln: x must be (B, N, D), got {tuple(x.shape)}")
    batch, n, width = x.shape
    for name, m in (("shift", shift), ("scale", scale)):
        if m is None:
            continue
        per_token = m.ndim == 3 and m.shape[0] == batch and m.shape[1] <= n and m.shape[2] == width
        if not (per_token or tuple(m.shape) == (batch, width)):
            raise ValueError(
                f"adaln: {name} must be ({batch}, {width}) or ({batch}, T <= {n}, {width}) for x {tuple(x.shape)}, "
                f"got {tuple(m.shape)}"
            )
    if shift is not None and scale is not None and shift.shape != scale.shape:
        raise ValueError(f"adaln: shift {tuple(shift.shape)} and scale {tuple(scale.shape)} must have one shape")
    for name, w in (("weight", weight), ("bias", bias)):
        if w is not None and tuple(w.shape) != (width,):
            raise ValueError(f"adaln: {name} must be ({width},) for x {tuple(x.shape)}, got {tuple(w.shape)}")


def _gate_check(x: Tensor, gate: Tensor, branch: Tensor) -> None:
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


def _unsupported(backend: str, x: Tensor, *rest: Any) -> str | None:
    if x.numel() == 0:
        return EMPTY
    if backend == "triton" and x.shape[2] > _MAX_WIDTH:
        return f"D = {x.shape[2]}: a program holds one row, at most {_MAX_WIDTH} elements"
    if backend == "triton" and x.shape[0] > 65535:
        return f"a batch of {x.shape[0]} exceeds a CUDA grid's second dimension"
    return None


def _fake(name: str, *args: Any) -> tuple[Tensor, ...]:
    x = args[0]
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    return y, x.new_empty(x.shape[0] * x.shape[1], 2, dtype=torch.float32)


def _gate_fake(name: str, *args: Any) -> tuple[Tensor, ...]:
    return (torch.empty_like(args[0], memory_format=torch.contiguous_format),)


_REAL = (
    (4, 385, 768, "MAETok-B 256 px"),
    (4, 1153, 768, "MAETok-B 512 px"),
    (4, 128, 1152, "SiT-XL 128 tokens"),
    (4, 1024, 1152, "SiT-XL/2 1024 tokens"),
)


def _case(
    label: str, shape: tuple[int, int, int], tokens: int | None, affine: bool, offset: float = 1.0, real: bool = False
) -> Sample:
    """tokens None: no modulation, 0: per image, T: the last T tokens."""
    batch, _n, width = shape

    def make(randn: Callable[..., Tensor]) -> dict[str, Any]:
        args: dict[str, Any] = {"x": 1 + 2 * randn(*shape), "offset": offset}
        if tokens is not None:
            like = (batch, tokens, width) if tokens else (batch, width)
            args.update(shift=randn(*like), scale=randn(*like))
        if affine:
            args.update(weight=1 + randn(width, dtype=torch.float32), bias=randn(width, dtype=torch.float32))
        return args

    return Sample(label, make, real)


def _samples() -> Iterable[Sample]:
    yield _case("DiT: per image", (3, 7, 48), 0, False)
    yield _case("plain norm, affine", (2, 5, 33), None, True)
    yield _case("MoVQ: last tokens, plain scale", (2, 9, 64), 4, False, offset=0.0)
    yield _case("per token, all tokens, affine", (2, 6, 20), 6, True)
    yield _case("one row", (1, 1, 8), 0, True)
    yield _case("more rows than one chunk", (2, 21, 16), 0, True)
    for batch, n, width, label in _REAL:
        yield _case(label, (batch, n, width), 0 if width == 1152 else None, width == 768, real=True)
    yield _case("MAETok-B decoder 256 px", (4, 384, 768), 128, False, offset=0.0, real=True)


def _gate_case(label: str, shape: tuple[int, int, int], kind: int, real: bool = False) -> Sample:
    like = (shape[2:], (shape[0], shape[2]), shape)[kind]
    return Sample(label, lambda randn: {"x": randn(*shape), "gate": randn(*like), "branch": randn(*shape)}, real)


def _gate_samples() -> Iterable[Sample]:
    yield _gate_case("LayerScale", (3, 7, 48), 0)
    yield _gate_case("adaLN-zero: per image", (2, 5, 33), 1)
    yield _gate_case("per token", (2, 3, 16), 2)
    yield _gate_case("one row", (1, 1, 8), 1)
    yield _gate_case("more rows than one chunk", (2, 21, 16), 1)
    for batch, n, width, label in _REAL:
        yield _gate_case(label, (batch, n, width), int(width == 1152), real=True)


def _cost(x: Tensor, *rest: Any, **named: Any) -> Cost:
    modulation = sum(m.numel() * m.element_size() for m in (*rest, *named.values()) if isinstance(m, Tensor))
    return Cost(8 * x.numel(), 2 * x.numel() * x.element_size() + modulation, 1)


def _gate_cost(x: Tensor, gate: Tensor, branch: Tensor) -> Cost:
    return Cost(2 * x.numel(), 3 * x.numel() * x.element_size() + gate.numel() * gate.element_size(), 1)


adaln = Op(
    "adaln",
    ref=adaln_ref,
    cpu=(Backend("native", _native_forward, _native_backward, library="native"),),
    cuda=(Backend("triton", _triton_forward, _triton_backward, library="triton"),),
    fake=_fake,
    saved=1,
    check=_check,
    unsupported=_unsupported,
    samples=_samples,
    cost=_cost,
    fp32=frozenset({"weight", "bias"}),
)

gate_residual = Op(
    "gate_residual",
    ref=gate_residual_ref,
    cpu=(Backend("native", _gate_native_forward, _gate_native_backward, library="native"),),
    cuda=(Backend("triton", _gate_triton_forward, _gate_triton_backward, library="triton"),),
    fake=_gate_fake,
    check=_gate_check,
    unsupported=_unsupported,
    samples=_gate_samples,
    cost=_gate_cost,
    residual="x",
)
