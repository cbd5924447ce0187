# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""adaln and residual_adaln: norm and modulation, the elementwise half of an adaLN transformer block.

    adaln:           y = norm(x; weight, bias) * (offset + scale) + shift
    residual_adaln:  h = x + gate * branch,  y = norm(h; weight, bias) * (offset + scale) + shift

x (B, N, D). norm is LayerNorm or RMSNorm (LightningDiT, LLaMA). shift and scale are (B, D) (one per image: DiT,
Peebles & Xie 2023, arXiv 2212.09748) or (B, T, D) with T <= N (one per token, for the last T tokens; the others get
the plain norm: MAETok's MoVQ decoder). offset is 1 in DiT (`1 + scale`) and 0 in MoVQ (plain `scale`). residual_adaln
joins the end of one branch (kernels/gate_residual.py: gate (D,) or (B, D), or none) to the norm of the next: 4 streams
of (B, N, D) instead of 5 forward and 6 instead of 9 backward.

Forward reads x and writes y once: mean, variance and modulation stay in registers (on the CPU in L1). Backward reads
dy and x once and writes dx; the sums over tokens (d_shift, d_scale, d_gate) and over everything (d_weight, d_bias) are
kept per program in fp32 and added in a fixed order, so results do not depend on the schedule. Statistics and sums are
fp32 whatever x is.

dtypes: y is written once, in the dtype that its reader wants: `out_dtype` "bfloat16" under autocast, where x is an fp32
residual stream and a bf16 linear follows (torch writes fp32, reads it and writes bf16). dy then arrives in bf16 and dx
leaves in fp32. shift, scale, gate and branch are read, and their gradients written, in their own dtypes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _adaln_triton, _native
from ._op import EMPTY, TOKEN_SHAPES, Backend, Cost, Op, Sample
from ._tiles import MAX_ROW
from .gate_residual import gate_residual_ref

__all__ = ["adaln", "adaln_ref", "residual_adaln", "residual_adaln_ref"]

_DTYPES = ("", "float32", "bfloat16", "float16")


# ---- reference -----------------------------------------------------------------------------------------------------


def adaln_ref(
    x: Tensor,
    shift: Tensor | None = None,
    scale: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-6,
    offset: float = 1.0,
    out_dtype: str = "",
    norm: str = "layer",
) -> Tensor:
    """Norm over the last dimension, then modulation: norm(x; weight, bias) * (offset + scale) + shift.

    x (B, N, D) bf16, fp16 or fp32 (fp64: reference only).
    shift, scale: both (B, D), for all tokens, or both (B, T, D) with T <= N, for the last T tokens; either may be None.
    weight, bias (D,): affine of the norm, each optional. eps: added to the (biased) variance, or to the mean square.
    offset: 1.0 for DiT's `1 + scale`, 0.0 for MoVQ's `scale`; without scale nothing is multiplied.
    out_dtype: "float32", "bfloat16" or "float16" for the result's; "" for the widest dtype of x, shift and scale.
    norm: "layer", (x - mean) / sqrt(var + eps), or "rms", x / sqrt(mean(x^2) + eps).
    Returns (B, N, D). Raises ValueError when shapes do not fit together or a name is unknown.
    """
    affine = None if weight is None else weight.to(x), None if bias is None else bias.to(x)
    if norm == "rms":
        y = F.rms_norm(x, x.shape[-1:], affine[0], eps)
        y = y if affine[1] is None else y + affine[1]
    else:
        y = F.layer_norm(x, x.shape[-1:], *affine, eps)
    like = scale if scale is not None else shift
    if like is not None:
        wide = torch.promote_types(y.dtype, like.dtype)
        plain, y = (y[:, :0], y) if like.ndim == 2 else y.split((x.shape[1] - like.shape[1], like.shape[1]), 1)
        if scale is not None:  # widened before 1 is added to it
            y = y * (offset + (scale.unsqueeze(1) if scale.ndim == 2 else scale).to(wide))
        if shift is not None:
            y = y + (shift.unsqueeze(1) if shift.ndim == 2 else shift)
        y = torch.cat((plain, y), 1) if plain.shape[1] else y
    return y.to(getattr(torch, out_dtype)) if out_dtype else y


def residual_adaln_ref(
    x: Tensor,
    branch: Tensor,
    gate: Tensor | None = None,
    shift: Tensor | None = None,
    scale: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-6,
    offset: float = 1.0,
    out_dtype: str = "",
    norm: str = "layer",
) -> tuple[Tensor, Tensor]:
    """h = x + gate * branch and y = norm(h; weight, bias) * (offset + scale) + shift: the end of one residual branch
    and the start of the next.

    x, branch (B, N, D) bf16, fp16 or fp32 (fp64: reference only); gate (D,), (B, D) or None (1); the others as in
    `adaln`, of h instead of x. Returns (h, y): h in the widest dtype of x, branch, gate, shift and scale, y in the same
    or in `out_dtype`; h is rounded to its dtype before it is normed, so that the pair of ops gives the same.
    Raises ValueError when shapes do not fit together or a name is unknown.
    """
    h = x + branch if gate is None else gate_residual_ref(x, gate, branch)
    return h, adaln_ref(h, shift, scale, weight, bias, eps, offset, out_dtype, norm)


# ---- launchers (Triton: _adaln_triton.py) --------------------------------------------------------------------------


def _dtype(out_dtype: str, x: Tensor) -> torch.dtype:
    return getattr(torch, out_dtype) if out_dtype else x.dtype


def _with_tokens(m: Tensor | None) -> Tensor | None:
    """(B, D) -> (B, 1, D), what the native library takes; (B, T, D) as it is."""
    return m.unsqueeze(1) if m is not None and m.ndim == 2 else m


def _per_sample(shift: Tensor | None, scale: Tensor | None) -> int:
    return int(all(m is None or m.ndim == 2 for m in (shift, scale)))


def _triton_forward(*args: Any) -> tuple[Tensor, ...]:
    x, shift, scale, weight, bias, eps, offset, out_dtype, norm = args
    dtype = _dtype(out_dtype, x)
    _h, y, stats = _adaln_triton.forward(x, None, None, shift, scale, weight, bias, eps, offset, dtype, norm == "rms")
    return y, stats


def _triton_backward(
    dy: Tensor, saved: Sequence[Tensor], args: tuple[Any, ...], needs: Sequence[bool]
) -> Sequence[Tensor | None]:
    x, shift, scale, weight, bias, _eps, offset, _out_dtype, norm = args
    wanted = (needs[0], False, False, *needs[1:5])
    grads = _adaln_triton.backward(
        None, dy, saved[0], x, None, None, shift, scale, weight, bias, offset, norm == "rms", wanted
    )
    return [grads[0], *grads[3:], None, None, None, None]


def _residual_triton_forward(*args: Any) -> tuple[Tensor, ...]:
    rest: tuple[Any, ...] = (*args[:9], _dtype(args[9], args[0]), args[10] == "rms")
    h, y, stats = _adaln_triton.forward(*rest)
    assert h is not None
    return h, y, stats


def _residual_triton_backward(
    grads: tuple[Tensor, Tensor], saved: Sequence[Tensor], args: tuple[Any, ...], needs: Sequence[bool]
) -> Sequence[Tensor | None]:
    rest: tuple[Any, ...] = (*saved[:1], *args[:7], args[8], args[10] == "rms", tuple(needs[:7]))
    found = _adaln_triton.backward(*grads, *rest)
    return [*found, None, None, None, None]


def _native_forward(*args: Any) -> tuple[Tensor, ...]:
    x, shift, scale, weight, bias, eps, offset, out_dtype, norm = args
    y = torch.empty_like(x, dtype=_dtype(out_dtype, x))
    stats = x.new_empty(x.shape[0] * x.shape[1], 2, dtype=torch.float32)
    modulation = _with_tokens(shift), _with_tokens(scale)
    per_sample = _per_sample(shift, scale)
    _native.lib().adaln_fwd(x, *modulation, weight, bias, y, stats, eps, offset, per_sample, int(norm == "rms"))
    return y, stats


def _empty(t: Tensor | None, wanted: bool) -> Tensor | None:
    return torch.empty_like(t) if t is not None and wanted else None


def _native_backward(
    dy: Tensor, saved: Sequence[Tensor], args: tuple[Any, ...], needs: Sequence[bool]
) -> Sequence[Tensor | None]:
    x, shift, scale, weight, bias, _eps, offset, _out_dtype, norm = args
    dx, *rest = (_empty(t, n or i == 0) for i, (t, n) in enumerate(zip(args[:5], needs)))
    into = _with_tokens(rest[0]), _with_tokens(rest[1]), *rest[2:]
    _native.lib().adaln_bwd(
        dy, x, _with_tokens(scale), weight, bias, saved[0], dx, *into, offset, _per_sample(shift, scale),
        int(norm == "rms"),
    )  # fmt: skip
    return [dx, *rest, None, None, None, None]


def _residual_native_forward(*args: Any) -> tuple[Tensor, ...]:
    x, branch, gate, shift, scale, weight, bias, eps, offset, out_dtype, norm = args
    h, y = torch.empty_like(x), torch.empty_like(x, dtype=_dtype(out_dtype, x))
    stats = x.new_empty(x.shape[0] * x.shape[1], 2, dtype=torch.float32)
    _native.lib().residual_adaln_fwd(
        x, branch, gate, _with_tokens(shift), _with_tokens(scale), weight, bias, h, y, stats, eps, offset,
        _per_sample(shift, scale), int(norm == "rms"),
    )  # fmt: skip
    return h, y, stats


def _residual_native_backward(
    grads: tuple[Tensor, Tensor], saved: Sequence[Tensor], args: tuple[Any, ...], needs: Sequence[bool]
) -> Sequence[Tensor | None]:
    x, branch, gate, shift, scale, weight, bias, _eps, offset, _out_dtype, norm = args
    dx, dbranch, dgate, *rest = (_empty(t, n or i == 0) for i, (t, n) in enumerate(zip(args[:7], needs)))
    into = _with_tokens(rest[0]), _with_tokens(rest[1]), *rest[2:]
    _native.lib().residual_adaln_bwd(
        *grads, x, branch, gate, _with_tokens(scale), weight, bias, saved[0], dx, dbranch, dgate, *into, offset,
        _per_sample(shift, scale), int(norm == "rms"),
    )  # fmt: skip
    return [dx, dbranch, dgate, *rest, None, None, None, None]


# ---- records -------------------------------------------------------------------------------------------------------


def _check_norm(
    op: str,
    x: Tensor,
    shift: Tensor | None,
    scale: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    offset: float,
    out_dtype: str,
    norm: str,
) -> None:
    if out_dtype not in _DTYPES:
        raise ValueError(f"{op}: out_dtype must be one of {', '.join(map(repr, _DTYPES))}, got {out_dtype!r}")
    if norm not in ("layer", "rms"):
        raise ValueError(f"{op}: norm must be 'layer' or 'rms', got {norm!r}")
    if x.ndim != 3:
        raise ValueError(f"{op}: x must be (B, N, D), got {tuple(x.shape)}")
    batch, n, width = x.shape
    for name, m in (("shift", shift), ("scale", scale)):
        if m is None:
            continue
        per_token = m.ndim == 3 and m.shape[0] == batch and m.shape[1] <= n and m.shape[2] == width
        if not (per_token or tuple(m.shape) == (batch, width)):
            raise ValueError(
                f"{op}: {name} must be ({batch}, {width}) or ({batch}, T <= {n}, {width}) for x {tuple(x.shape)}, "
                f"got {tuple(m.shape)}"
            )
    if shift is not None and scale is not None and shift.shape != scale.shape:
        raise ValueError(f"{op}: shift {tuple(shift.shape)} and scale {tuple(scale.shape)} must have one shape")
    for name, w in (("weight", weight), ("bias", bias)):
        if w is not None and tuple(w.shape) != (width,):
            raise ValueError(f"{op}: {name} must be ({width},) for x {tuple(x.shape)}, got {tuple(w.shape)}")


def _check(x: Tensor, *rest: Any) -> None:
    _check_norm("adaln", x, *rest)


def _residual_check(x: Tensor, branch: Tensor, gate: Tensor | None, *rest: Any) -> None:
    _check_norm("residual_adaln", x, *rest)
    if x.shape != branch.shape:
        raise ValueError(
            f"residual_adaln: x and branch must have one shape, got {tuple(x.shape)} and {tuple(branch.shape)}"
        )
    batch, _n, width = x.shape
    # by rank: comparing sizes of different meaning would tie a symbolic batch to the width
    fits = gate is None or (gate.ndim in (1, 2) and tuple(gate.shape) == ((width,), (batch, width))[gate.ndim - 1])
    if gate is not None and not fits:
        raise ValueError(f"residual_adaln: gate must be ({width},) or ({batch}, {width}), got {tuple(gate.shape)}")


def _unsupported(backend: str, x: Tensor, *rest: Any) -> str | None:
    if x.numel() == 0:
        return EMPTY
    if backend == "triton" and x.shape[2] > MAX_ROW:
        return f"D = {x.shape[2]}: a program holds one row, at most {MAX_ROW} elements"
    if backend == "triton" and x.shape[0] > 65535:
        return f"a batch of {x.shape[0]} exceeds a CUDA grid's second dimension"
    return None


def _fake(name: str, *args: Any) -> tuple[Tensor, ...]:
    x, out_dtype = args[0], args[-2]
    y = torch.empty_like(x, dtype=_dtype(out_dtype, x), memory_format=torch.contiguous_format)
    return y, x.new_empty(x.shape[0] * x.shape[1], 2, dtype=torch.float32)


def _residual_fake(name: str, *args: Any) -> tuple[Tensor, ...]:
    return torch.empty_like(args[0], memory_format=torch.contiguous_format), *_fake(name, *args)


def _case(
    label: str,
    shape: tuple[int, int, int],
    tokens: int | None,
    affine: bool,
    offset: float = 1.0,
    norm: str = "layer",
    gate: int | None = None,
    residual: bool = False,
    real: bool = False,
) -> Sample:
    """tokens None: no modulation, 0: per image, T: the last T tokens. gate (residual): None, 1: (D,), 2: (B, D)."""
    batch, _n, width = shape

    def make(randn: Callable[..., Tensor]) -> dict[str, Any]:
        args: dict[str, Any] = {"x": 1 + 2 * randn(*shape)}
        if residual:
            args["branch"] = randn(*shape)
        if gate is not None:
            args["gate"] = randn(*((batch, width)[2 - gate :]))
        if tokens is not None:
            like = (batch, tokens, width) if tokens else (batch, width)
            args.update(shift=randn(*like), scale=randn(*like))
        if affine:
            args["weight"] = 1 + randn(width, dtype=torch.float32)
            if norm == "layer":
                args["bias"] = randn(width, dtype=torch.float32)
        return args | {"offset": offset} | ({} if norm == "layer" else {"norm": norm})

    return Sample(label, make, real)


def _samples() -> Iterable[Sample]:
    yield _case("DiT: per image", (3, 7, 48), 0, False)
    yield _case("plain norm, affine", (2, 5, 33), None, True)
    yield _case("LightningDiT: RMSNorm, per image", (2, 5, 33), 0, True, norm="rms")
    yield _case("MoVQ: last tokens, plain scale", (2, 9, 64), 4, False, offset=0.0)
    yield _case("per token, all tokens, affine", (2, 6, 20), 6, True)
    yield _case("one row", (1, 1, 8), 0, True)
    yield _case("more rows than one chunk", (2, 21, 16), 0, True)
    for batch, n, width, label in TOKEN_SHAPES:
        yield _case(label, (batch, n, width), 0 if width == 1152 else None, width == 768, real=True)
    yield _case("MAETok-B decoder 256 px", (4, 384, 768), 128, False, offset=0.0, real=True)
    yield _case("LightningDiT-XL", (4, 256, 1152), 0, True, norm="rms", real=True)


def _residual_samples() -> Iterable[Sample]:
    yield _case("DiT: per image", (3, 7, 48), 0, False, gate=2, residual=True)
    yield _case("LayerScale, affine", (2, 5, 33), None, True, gate=1, residual=True)
    yield _case("MoVQ: no gate, last tokens", (2, 9, 20), 4, False, offset=0.0, residual=True)
    yield _case("RMSNorm, one row", (1, 1, 8), 0, True, norm="rms", gate=2, residual=True)
    yield _case("more rows than one chunk", (2, 21, 16), 0, True, gate=1, residual=True)
    for batch, n, width, label in TOKEN_SHAPES:
        dit = width == 1152
        shape = (batch, n, width)
        yield _case(label, shape, 0 if dit else None, not dit, gate=2 if dit else 1, residual=True, real=True)
    yield _case("MAETok-B decoder 256 px", (4, 384, 768), 128, False, offset=0.0, residual=True, real=True)
    yield _case("LightningDiT-XL", (4, 256, 1152), 0, True, norm="rms", gate=2, residual=True, real=True)


def _bytes(*tensors: Any) -> int:
    return sum(t.numel() * t.element_size() for t in tensors if isinstance(t, Tensor))


def _cost(x: Tensor, *rest: Any, out_dtype: str = "", **named: Any) -> Cost:
    names = [r for r in rest if isinstance(r, str)] + [out_dtype]
    y = x.numel() * _dtype(next((n for n in names if n in _DTYPES and n), ""), x).itemsize
    return Cost(8 * x.numel(), _bytes(x, *rest, *named.values()) + y, 1)


def _residual_cost(x: Tensor, *rest: Any, **named: Any) -> Cost:
    cost = _cost(x, *rest, **named)
    return Cost(cost.flops + 2 * x.numel(), cost.bytes + _bytes(x), 1)


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
    uncast=frozenset({"shift", "scale"}),
)

residual_adaln = Op(
    "residual_adaln",
    ref=residual_adaln_ref,
    outputs=2,
    cpu=(Backend("native", _residual_native_forward, _residual_native_backward, library="native"),),
    cuda=(Backend("triton", _residual_triton_forward, _residual_triton_backward, library="triton"),),
    fake=_residual_fake,
    saved=1,
    check=_residual_check,
    unsupported=_unsupported,
    samples=_residual_samples,
    cost=_residual_cost,
    fp32=frozenset({"weight", "bias"}),
    uncast=frozenset({"branch", "gate", "shift", "scale"}),
)
