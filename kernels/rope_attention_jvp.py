# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""rope_attention_jvp: attention and its tangent in one pass, for forward-mode AD (MeanFlow's du/dt).

    S  = q k^T / sqrt(head_dim)                 dS = (dq k^T + q dk^T) / sqrt(head_dim)      q, k, dq, dk rotated
    P  = softmax(S)                             W  = P o dS
    y  = P v                                    dy = W v + P dv - rowsum(W) y

from packed qkv and its tangent dqkv, rotated by one table as `rope_attention` does (a rotation is linear). The softmax
is taken once and no matrix of scores is written: six products, where plain attention under forward-mode AD does the
same six and writes five such matrices. It is what `rope_attention` runs where its arguments carry a tangent (`TANGENT`)
and no function to differentiate: gradients are `rope_attention`'s.

Against the formula in plain torch (`maetok-fast bench ops --op rope_attention_jvp --direction forward`), two cores of
an Emerald Rapids without AMX, fp32 and bf16: 128 tokens of 16 x 72, 1.57 and 1.90 times as fast; 256 rotated, 2.19 and
2.77; 1024, 2.17 and 2.38.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.function import once_differentiable

from . import _native
from ._dispatch import choose_kernels, one_jvp
from ._op import Op
from ._record import Backend, Sample, Tangent
from ._registration import compute, compute_backward, plain_eager
from ._rope_attention_jvp_triton import triton_forward
from ._rope_formula import check_rows, prepared, query_count, rotate, why_not_native, why_not_triton

__all__ = ["rope_attention_jvp", "rope_attention_jvp_ref"]


def rope_attention_jvp_ref(
    qkv: Tensor,
    dqkv: Tensor,
    rope: Tensor | None = None,
    prefix: int = 0,
    first_query: int = 0,
    num_queries: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention with 2-D RoPE and its tangent, see the module's formula.

    qkv, dqkv (B, N, 3, heads, head_dim) bf16, fp16 or fp32 (fp64: reference only): q, k, v and their tangents.
    rope, prefix, first_query, num_queries: as `rope_attention`'s; the table has no tangent.
    Returns y and dy, (B, num_queries, heads * head_dim) in qkv's dtype. A constant for autograd.
    """
    a = rope_attention_jvp.Args(qkv, dqkv, rope, prefix, first_query, num_queries)
    last = first_query + query_count(a)
    wide = torch.float64 if qkv.dtype == torch.float64 else torch.float32

    def parts(x: Tensor) -> list[Tensor]:
        """q, k, v (B, heads, N, head_dim) of x, rotated."""
        turned = [x[:, :, i] if rope is None else rotate(x[:, :, i].to(wide), rope, prefix, None) for i in (0, 1)]
        return [t.to(x.dtype).transpose(1, 2) for t in (turned[0][:, first_query:last], turned[1], x[:, :, 2])]

    (q, k, v), (dq, dk, dv) = parts(qkv), parts(dqkv)
    scale = q.shape[-1] ** -0.5
    p = (q @ k.transpose(-2, -1) * scale).softmax(-1)
    w = p * ((dq @ k.transpose(-2, -1) + q @ dk.transpose(-2, -1)) * scale)
    y = p @ v
    dy = w @ v + p @ dv - w.sum(-1, keepdim=True) * y
    return y.transpose(1, 2).flatten(2), dy.transpose(1, 2).flatten(2)


def _native_forward(a, out):
    heads = a.qkv.shape[3:]
    _native.lib().rope_attention_jvp(
        a.qkv, a.dqkv, a.rope, out.y.unflatten(2, heads), out.dy.unflatten(2, heads), out.lse.transpose(1, 2),
        a.prefix, a.first_query,
    )  # fmt: skip


# ---- what `rope_attention` runs under forward-mode AD ----------------------------------------------------------------


def _ready(a: Any) -> Any:
    """rope_attention's arguments `a` as the kernels take them, with every tangent in qkv: q and k are normalised here,
    and rotated if the table has a tangent or an index, by torch and its formulas; the rest is left to the kernels."""
    turned = a.rope is not None and (a.index is not None or forward_ad.unpack_dual(a.rope).tangent is not None)
    if a.qk_norm == "none" and not turned:
        return a
    q, k = prepared(a if turned else a._replace(rope=None, index=None))
    rest: dict[str, Any] = dict.fromkeys(("q_weight", "q_bias", "k_weight", "k_bias"))
    if turned:
        rest |= {"rope": None, "index": None}
    return a._replace(qkv=torch.stack((q, k, a.qkv[:, :, 2]), 2), qk_norm="none", **rest)


def _arguments(a: Any, dqkv: Tensor) -> Any:
    return rope_attention_jvp.Args(a.qkv, dqkv, a.rope, a.prefix, a.first_query, a.num_queries)


def _choose(a: Any) -> str:
    """The backend of `rope_attention_jvp` that computes rope_attention's `a` with its tangents, or "reference": where
    transforms are nested, or something watches, or no kernel takes it."""
    if torch.compiler.is_compiling() or not one_jvp(a) or not plain_eager(a):
        return "reference"
    return choose_kernels(rope_attention_jvp, _arguments(a, a.qkv))


def _compute(record: Any, name: str, a: Any) -> Any:
    a = _ready(a)
    dqkv = forward_ad.unpack_dual(a.qkv).tangent
    if dqkv is None:
        dqkv = torch.zeros_like(a.qkv)
    return _WithTangent.apply(record, name, a.qkv, dqkv, a.rope, a.prefix, a.first_query, a.num_queries)[0]


class _WithTangent(torch.autograd.Function):
    """y whose tangent is dy, computed together before autograd asks for it; dqkv is a plain tensor. y's gradient is
    `rope_attention`'s. dy has one where somebody wants it (a second derivative), by the reference."""

    @staticmethod
    def forward(record: Any, name: str, *values: Any) -> Any:
        return tuple(compute(rope_attention_jvp, name, values))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.record, ctx.name, qkv, dqkv, rope, *ctx.rest = inputs
        y, dy, lse = output
        ctx.save_for_backward(qkv, dqkv, rope, y, lse)
        ctx.save_for_forward(dy)
        ctx.mark_non_differentiable(lse)
        ctx.set_materialize_grads(False)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        (dy,) = ctx.saved_tensors
        # a copy: the output dy gets a tangent itself, zeros, as torch takes None for outputs without derivative only
        return dy.clone(), dy.new_zeros(()).expand_as(dy), None

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_y: Tensor | None, d_dy: Tensor | None, _: Any) -> Any:
        qkv, dqkv, rope, y, lse = ctx.saved_tensors
        needs = ctx.needs_input_grad[2:5]
        if d_dy is not None:
            with torch.enable_grad():
                pairs = zip((qkv, dqkv, rope), needs)
                leaves: list[Any] = [None if v is None else v.detach().requires_grad_(n) for v, n in pairs]
                results = rope_attention_jvp_ref(*leaves, *ctx.rest)
                of, grads = zip(*[(r, g) for r, g in zip(results, (d_y, d_dy)) if g is not None])
                wanted = [v for v, n in zip(leaves, needs) if n]
                found = list(torch.autograd.grad(of, wanted, grads, allow_unused=True))
            return (None, None, *(found.pop(0) if n else None for n in needs), None, None, None)
        if d_y is None:
            return (None,) * 8
        prefix, first, count = ctx.rest
        a = ctx.record.Args(qkv, rope, None, None, None, None, prefix, "none", 1e-6, first, count, None)
        asked = [name in ("qkv", "rope") and n for name, n in zip(a._fields, (needs[0], needs[2], *(False,) * 10))]
        d = compute_backward(ctx.record, ctx.name, a, (y, lse), [d_y], asked)
        return None, None, d.qkv if needs[0] else None, None, d.rope if needs[2] else None, None, None, None


TANGENT = Tangent(_choose, _compute)


# ---- the record ------------------------------------------------------------------------------------------------------


def _out(a: Any, backend: str) -> tuple[Tensor, ...]:
    """y, dy and the log-sum-exp, this as rope_attention's backward of that backend takes it."""
    batch, _n, _, heads, head_dim = a.qkv.shape
    count = query_count(a)
    y, dy = (a.qkv.new_empty(batch, count, heads * head_dim) for _ in range(2))
    if backend == "native":
        return y, dy, a.qkv.new_empty(batch, count, heads, dtype=torch.float32).transpose(1, 2)
    return y, dy, a.qkv.new_empty(batch, heads, count, dtype=torch.float32)


def _check(a: Any) -> None:
    check_rows("rope_attention_jvp", a)


def _sample(
    label: str, shape: tuple[int, int, int, int], rotated: int = 0, prefix: int = 0, first: int = 0,
    count: int | None = None, shared: bool = False, real: bool = False,
) -> Sample:  # fmt: skip
    batch, n, heads, head_dim = shape

    def make(randn: Any) -> dict[str, Any]:
        args: dict[str, Any] = {name: randn(batch, n, 3, heads, head_dim) for name in ("qkv", "dqkv")}
        if rotated:
            angle = 3 * randn(1 if shared else heads, rotated, head_dim // 2, dtype=torch.float32)
            args["rope"] = torch.stack((angle.cos(), angle.sin()))
        return {**args, "prefix": prefix, "first_query": first, "num_queries": count}

    return Sample(label, make, real)


rope_attention_jvp = Op(
    "rope_attention_jvp",
    ref=rope_attention_jvp_ref,
    shapes={"qkv": "B N 3 heads head_dim", "dqkv": "B N 3 heads head_dim", "rope": "2 heads R F | 2 1 R F"},
    check=_check,
    roles={"qkv": "lowered", "dqkv": "lowered", "rope": "fp32"},
    out=_out,
    outputs=("y", "dy"),
    saved=("lse",),
    differentiable=False,
    cpu=[Backend("native", _native_forward, why_not=why_not_native)],
    cuda=[Backend("triton", triton_forward, why_not=why_not_triton)],
    samples=[
        _sample("head_dim 72, no rotation", (2, 70, 2, 72)),
        _sample("prefix, image, latents", (1, 1 + 36 + 9, 3, 64), 36, 1),
        _sample("pruned, shared table", (2, 33, 2, 32), 20, 1, first=21, count=9, shared=True),
        _sample("one token", (1, 1, 1, 16)),
        _sample("SiT-XL 128 tokens", (4, 128, 16, 72), real=True),
        _sample("SiT-XL/2 1024 tokens", (1, 1024, 16, 72), real=True),
        _sample("LightningDiT-XL 256 tokens", (4, 256, 16, 72), 256, shared=True, real=True),
    ],
    flops=lambda a: 12 * a.qkv.shape[0] * a.qkv.shape[3] * a.qkv.shape[4] * query_count(a) * a.qkv.shape[1],
)
