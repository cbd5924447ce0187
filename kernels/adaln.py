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

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _adaln_triton
from ._native_call import native
from ._op import Op
from ._record import TOKEN_SHAPES, Backend, Sample
from ._tiles import over_grid, over_row
from .gate_residual import gate_residual_ref

__all__ = ["adaln", "adaln_ref", "residual_adaln", "residual_adaln_ref"]

_DTYPES = ("", "float32", "bfloat16", "float16")
SHAPES = {"x": "B N D", "shift": "B D | B T D", "scale": "B D | B T D", "weight": "D", "bias": "D"}


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


def check_norm(op: str, a: Any) -> None:
    """What the shapes alone do not say of the arguments that adaln, residual_adaln and adaln_quantize share."""
    if getattr(a, "out_dtype", "") not in _DTYPES:
        raise ValueError(f"{op}: out_dtype must be one of {', '.join(map(repr, _DTYPES))}, got {a.out_dtype!r}")
    if a.norm not in ("layer", "rms"):
        raise ValueError(f"{op}: norm must be 'layer' or 'rms', got {a.norm!r}")
    if a.shift is not None and a.scale is not None and a.shift.shape != a.scale.shape:
        raise ValueError(f"{op}: shift {tuple(a.shift.shape)} and scale {tuple(a.scale.shape)} must have one shape")
    for name, m in (("shift", a.shift), ("scale", a.scale)):
        if m is not None and m.ndim == 3 and m.shape[1] > a.x.shape[1]:
            raise ValueError(f"{op}: {name} must have at most the {a.x.shape[1]} tokens of x, got {tuple(m.shape)}")


def norm_sample(
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


def real_norm_samples(residual: bool = False) -> list[Sample]:
    """The models' norms: SiT's modulated per image, MAETok's with an affine, its MoVQ decoder's, LightningDiT's."""
    per_image, layer_scale = (2, 1) if residual else (None, None)
    return [
        *(
            norm_sample(label, (b, n, d), 0, False, gate=per_image, residual=residual, real=True)
            if d == 1152
            else norm_sample(label, (b, n, d), None, True, gate=layer_scale, residual=residual, real=True)
            for b, n, d, label in TOKEN_SHAPES
        ),
        norm_sample("MAETok-B decoder 256 px", (4, 384, 768), 128, False, offset=0.0, residual=residual, real=True),
        norm_sample("LightningDiT-XL", (4, 256, 1152), 0, True, 1.0, "rms", per_image, residual, real=True),
    ]


def _out(a, backend):
    y = torch.empty_like(a.x, dtype=getattr(torch, a.out_dtype or str(a.x.dtype)[6:]), memory_format=_DENSE)
    return y, a.x.new_empty(a.x.shape[0] * a.x.shape[1], 2, dtype=torch.float32)


def _with_tokens(m: Tensor | None) -> Tensor | None:
    """(B, D) -> (B, 1, D), what the native library takes; (B, T, D) as it is."""
    return m.unsqueeze(1) if m is not None and m.ndim == 2 else m


_DENSE = torch.contiguous_format
_NATIVE: dict[str, Callable[[Any], Any]] = {
    "shifts": lambda a: _with_tokens(a.shift),
    "scales": lambda a: _with_tokens(a.scale),
    "d_shifts": lambda d: _with_tokens(d.shift),
    "d_scales": lambda d: _with_tokens(d.scale),
    "per_image": lambda a: int(all(m is None or m.ndim == 2 for m in (a.shift, a.scale))),
    "rms": lambda a: int(a.norm == "rms"),
}
_TRITON = Backend(
    "triton",
    _adaln_triton.forward,
    _adaln_triton.backward,
    lambda a: over_row(a.x.shape[2]) or over_grid(batch=a.x.shape[0]),
)

adaln = Op(
    "adaln",
    ref=adaln_ref,
    shapes=SHAPES,
    check=lambda a: check_norm("adaln", a),
    roles={"weight": "fp32", "bias": "fp32", "shift": "as given", "scale": "as given"},
    out=_out,
    saved=("stats",),
    written=("x",),
    cpu=[
        native(
            "adaln_fwd x shifts scales weight bias y stats eps offset per_image rms",
            "adaln_bwd d_y x scales weight bias stats d_x d_shifts d_scales d_weight d_bias offset per_image rms",
            **_NATIVE,
        )
    ],
    cuda=[_TRITON],
    samples=[
        norm_sample("DiT: per image", (3, 7, 48), 0, False),
        norm_sample("plain norm, affine", (2, 5, 33), None, True),
        norm_sample("LightningDiT: RMSNorm, per image", (2, 5, 33), 0, True, norm="rms"),
        norm_sample("MoVQ: last tokens, plain scale", (2, 9, 64), 4, False, offset=0.0),
        norm_sample("per token, all tokens, affine", (2, 6, 20), 6, True),
        norm_sample("one row", (1, 1, 8), 0, True),
        norm_sample("more rows than one chunk", (2, 21, 16), 0, True),
        *real_norm_samples(),
    ],
    flops=lambda a: 8 * a.x.numel(),
)

residual_adaln = Op(
    "residual_adaln",
    ref=residual_adaln_ref,
    shapes=SHAPES | {"branch": "B N D", "gate": "D | B D"},
    check=lambda a: check_norm("residual_adaln", a),
    roles={**adaln.roles, "branch": "as given", "gate": "as given"},
    out=lambda a, backend: (torch.empty_like(a.x, memory_format=_DENSE), *_out(a, backend)),
    outputs=("h", "y"),
    saved=("stats",),
    written=("x",),
    cpu=[
        native(
            "residual_adaln_fwd x branch gate shifts scales weight bias h y stats eps offset per_image rms",
            "residual_adaln_bwd d_h d_y x branch gate scales weight bias stats "
            "d_x d_branch d_gate d_shifts d_scales d_weight d_bias offset per_image rms",
            **_NATIVE,
        )
    ],
    cuda=[_TRITON],
    samples=[
        norm_sample("DiT: per image", (3, 7, 48), 0, False, gate=2, residual=True),
        norm_sample("LayerScale, affine", (2, 5, 33), None, True, gate=1, residual=True),
        norm_sample("MoVQ: no gate, last tokens", (2, 9, 20), 4, False, offset=0.0, residual=True),
        norm_sample("RMSNorm, one row", (1, 1, 8), 0, True, norm="rms", gate=2, residual=True),
        norm_sample("more rows than one chunk", (2, 21, 16), 0, True, gate=1, residual=True),
        *real_norm_samples(residual=True),
    ],
    flops=lambda a: 10 * a.x.numel(),
)
