# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""rope_attention: attention over [prefix | image tokens | latent tokens] with 2-D RoPE on the image tokens only.

    q, k, v  = unpack(qkv)                                   qkv (B, N, 3, heads, head_dim)
    q, k     = norm(q), norm(k)                              optional: RMSNorm or LayerNorm over head_dim
    q_n, k_n = R(angle_n) q_n, R(angle_n) k_n                for prefix <= n < prefix + M, in fp32
    out      = softmax(q k^T / sqrt(head_dim)) v             (B, Nq, heads * head_dim)

R rotates the interleaved pairs (2j, 2j+1), (a, b) -> (a cos - b sin, a sin + b cos), by the token's and pair's angle,
angle(n, j) = x_n f_x[j] + y_n f_y[j] (RoPE-Mixed, Heo et al. 2024, arXiv 2403.13298; axial frequencies are the case
where f_x or f_y is zero). The angles enter as one [cos, sin] table made by `rope_table` for all layers at once; the
table is fp32 and differentiable, so learned frequencies get their gradient and fixed ones become a constant.

first_query/num_queries prune the queries (a last block needs only the latent or only the image tokens' outputs). Under
forward-mode AD it is `rope_attention_jvp`, value and tangent in one pass.

Triton: q and k are rotated in registers as they are loaded, so neither is written rotated; unrotated rows load no
table. head_dim 72 runs as 64 + 16 columns (`_tiles.head_split`). With q/k norm a row kernel writes the normalised,
rotated q and k once, and the attention kernels take them as they are. CPU: the native kernels normalise and rotate
while they pack; in bf16 on AMX tiles, forward and backward (csrc/cpu/attention*.cpp), else on vectors
(csrc/cpu/rope_attention.cpp) or by torch's flash attention, whichever is faster for the shape (`_tune`), and backward
by torch. flash_attn, xformers and torch's own choice (sdpa) can be asked for on CUDA (`_rope_attention_libraries`);
which comes first is `_tiles.ATTENTION_ORDER`, and `rope_attention.reason(...)` says why each is or is not taken.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _native, _tune
from ._dispatch import no_autocast, transformed
from ._op import Op
from ._record import Backend, Sample
from ._rope_attention_libraries import ATTENTIONS, library
from ._rope_attention_triton import triton_backward, triton_forward
from ._rope_formula import check_rows, prepared, query_count, why_not_grid, why_not_native, why_not_triton
from ._tiles import attention_order
from .rope_attention_jvp import TANGENT

__all__ = ["rope_attention", "rope_attention_ref", "rope_table"]

_NORMS = ("none", "rms", "layer")
# Up to here torch's flash backward is faster in fp32 than in bf16, conversions included (128 tokens: 7.0 against 20.5
# ms, 385: 49 against 56, 1024: 98 against 81).
_WIDE_BACKWARD = 512


def rope_table(freqs: Tensor, pos: Tensor) -> Tensor:
    """The [cos, sin] table of `rope_attention`.

    freqs (2, heads, F) or (2, depth, heads, F): frequencies of x and of y, F = head_dim / 2; heads = 1 shares them.
    pos (M, 2): column x and row y of each image token, in patches (MAETok) or any other unit.
    Returns fp32 (fp64 for fp64 freqs) of shape (2, heads, M, F) or (depth, 2, heads, M, F). Differentiable in freqs.
    """
    if not isinstance(freqs, Tensor) or not isinstance(pos, Tensor):
        raise TypeError(f"rope_table expects tensors, got {type(freqs).__name__} and {type(pos).__name__}")
    if freqs.ndim not in (3, 4) or freqs.shape[0] != 2:
        raise ValueError(f"freqs must be (2, heads, F) or (2, depth, heads, F), got {tuple(freqs.shape)}")
    if pos.ndim != 2 or pos.shape[1] != 2:
        raise ValueError(f"pos must be (M, 2) with columns x and y, got {tuple(pos.shape)}")
    with no_autocast(freqs.device.type):
        freqs = freqs if freqs.dtype == torch.float64 else freqs.float()
        x, y = pos.to(freqs).unbind(1)
        angle = x[:, None] * freqs[0].unsqueeze(-2) + y[:, None] * freqs[1].unsqueeze(-2)
        return torch.stack((angle.cos(), angle.sin()), dim=-4)


def _attention_ref(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """(B, heads, Nq, head_dim) each. torch's fused attention has no forward-mode derivative: written out for that."""
    if transformed((q, k, v)):
        return (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(-1) @ v
    return F.scaled_dot_product_attention(q, k, v)


def rope_attention_ref(
    qkv: Tensor,
    rope: Tensor | None = None,
    q_weight: Tensor | None = None,
    q_bias: Tensor | None = None,
    k_weight: Tensor | None = None,
    k_bias: Tensor | None = None,
    prefix: int = 0,
    qk_norm: str = "none",
    eps: float = 1e-6,
    first_query: int = 0,
    num_queries: int | None = None,
    index: Tensor | None = None,
) -> Tensor:
    """Attention with 2-D RoPE on the image tokens, from packed q, k, v.

    qkv (B, N, 3, heads, head_dim) bf16, fp16 or fp32 (fp64: reference only).
    rope (2, heads or 1, M, head_dim / 2) fp32 from `rope_table`: tokens prefix .. prefix + M - 1 are rotated, the
        others (cls, registers, latent tokens) are not; None rotates nothing.
    q_weight, q_bias, k_weight, k_bias (head_dim,): affine of the q/k norm, each optional.
    qk_norm: "none", "rms" (x / sqrt(mean x^2 + eps) * weight) or "layer" (LayerNorm), before the rotation.
    first_query, num_queries: only these queries are computed; None: to the end.
    index (B, M) int64: token prefix + m of image b is rotated by row index[b, m] of the table: tokens that are left
        when masking drops others keep their places. Others than rows of the table: IndexError on the CPU, unrotated
        by Triton. None: by row m.
    Returns (B, num_queries, heads * head_dim) in qkv's dtype; the softmax scale is head_dim ** -0.5.
    Raises ValueError when shapes do not fit together.
    """
    a = rope_attention.Args(
        qkv, rope, q_weight, q_bias, k_weight, k_bias, prefix, qk_norm, eps, first_query, num_queries, index
    )
    q, k = prepared(a)
    q = q[:, first_query : first_query + query_count(a)]
    return _attention_ref(*(x.transpose(1, 2) for x in (q, k, qkv[:, :, 2]))).transpose(1, 2).flatten(2)


# ---- launchers: CPU ------------------------------------------------------------------------------------------------


def _native_prepare(a):
    """q (B, Nq, heads, head_dim), k and v (B, N, heads, head_dim), each with contiguous heads; v is a view of qkv."""
    first, count = a.first_query, query_count(a)
    q, k, v = a.qkv.unbind(2)
    if a.rope is None and a.qk_norm == "none":
        return q[:, first : first + count], k, v
    batch, n, _, heads, head_dim = a.qkv.shape
    q, k = a.qkv.new_empty(batch, count, heads, head_dim), a.qkv.new_empty(batch, n, heads, head_dim)
    _native.lib().rope_rotate(
        a.qkv, a.rope, a.q_weight, a.q_bias, a.k_weight, a.k_bias, a.index, q, k,
        a.prefix, first, _NORMS.index(a.qk_norm), a.eps,
    )  # fmt: skip
    return q, k, v


def _on_tiles(x: Tensor) -> bool:
    """Whether csrc/cpu/attention*.cpp take it: bf16 on a processor with AMX. Measured against torch's flash attention
    (2 threads; forward, backward): 128 tokens of 16 x 72: 1.2, 8 times as fast; 1024: 1.6, 2.0; 385 of 12 x 64: 3, 4.5;
    128 queries of 385: 3, 6. No shape was found where torch wins."""
    return x.dtype == torch.bfloat16 and bool(_native.lib().attention_tiles())


def _native_forward(a, out):
    return _own(a) if _on_tiles(a.qkv) or _fastest(a) == "native" else _torch_flash(a)


def _own(a):
    batch, _n, _, heads, head_dim = a.qkv.shape
    y = a.qkv.new_empty(batch, query_count(a), heads * head_dim)
    lse = a.qkv.new_empty(batch, query_count(a), heads, dtype=torch.float32)
    _native.lib().rope_attention(
        a.qkv, a.rope, a.q_weight, a.q_bias, a.k_weight, a.k_bias, a.index, y.unflatten(2, a.qkv.shape[3:]), lse,
        a.prefix, a.first_query, _NORMS.index(a.qk_norm), a.eps,
    )  # fmt: skip
    return y, lse.transpose(1, 2)


_chosen: dict[tuple[Any, ...], str] = {}


def _fastest(a) -> str:
    """The winner of a race over the first inputs of their shape, "native" or "torch". Without one, ours but on 4 lanes:
    torch knows such a processor's better instructions, if any."""
    level, dtype = _native.lib().cpu_variant(), str(a.qkv.dtype)[6:]
    n, heads, head_dim = a.qkv.shape[1], a.qkv.shape[3], a.qkv.shape[4]
    otherwise = "torch" if level in ("v2", "generic") else "native"
    if not _tune.enabled():
        return otherwise
    key = (level, torch.get_num_threads(), dtype, n, query_count(a), heads, head_dim, a.rope is None, a.qk_norm)
    if key not in _chosen:
        rotated = "" if a.rope is None else ", rotated"
        _chosen[key] = _tune.fastest(
            f"attention of {query_count(a)} to {n} tokens, {heads} x {head_dim}{rotated}, {a.qk_norm} norm, {dtype}",
            {"native": lambda: _own(a), "torch": lambda: _torch_flash(a)},
            otherwise,
        )
    return _chosen[key]


def _torch_flash(a):
    q, k, v = _native_prepare(a)
    batch, count, heads, head_dim = q.shape
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    y, lse = flash(*(x.transpose(1, 2) for x in (q, k, v)))
    _keep_non_finite(y, lse, q, k)
    # not a view: torch refuses in-place operations on a view among several outputs
    return torch.ops.aten._unsafe_view(y.transpose(1, 2), [batch, count, heads * head_dim]), lse


def _keep_non_finite(y: Tensor, lse: Tensor, q: Tensor, k: Tensor) -> None:
    """NaN for the rows of y (B, heads, Nq, head_dim) whose scores are not finite. torch's kernel loses infinities in 16
    bits, though its log-sum-exp has them, and in rows shorter than its vectors it loses NaN there too. It takes 5 us
    beside the 4.6 ms of SiT-XL's 128 tokens."""
    if k.shape[1] < 16:
        scores = q.float().transpose(1, 2) @ k.float().permute(0, 2, 3, 1) * q.shape[-1] ** -0.5
        lse = scores.logsumexp(-1)
    if not lse.sum().isfinite():
        y.masked_fill_(~lse.isfinite().unsqueeze(-1), float("nan"))


def _native_backward(a, out, g, d):
    head_dim = a.qkv.shape[4]
    first, count = a.first_query, query_count(a)
    q, k, v = _native_prepare(a)
    grad, y = g.y.view(q.shape), out.y.view(q.shape)
    dq, dk, dv = d.qkv.unbind(2)
    dq = dq[:, first : first + count]
    if _on_tiles(q):
        _native.lib().attention_bf16_bwd(q, k, v, y, grad, out.lse.transpose(1, 2), dq, dk, dv)
        if a.rope is None and a.qk_norm == "none":
            d.qkv[:, :first, 0].zero_()
            d.qkv[:, first + count :, 0].zero_()
            return
    else:
        tensors = [x.transpose(1, 2) for x in (grad, q, k, v, y)]
        if a.qkv.shape[1] <= _WIDE_BACKWARD:
            tensors = [t.float() for t in tensors]
        grads = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(*tensors, out.lse, 0.0, False)
        dq, dk, dv = (x.to(a.qkv.dtype).transpose(1, 2) for x in grads)
    weights = (d.q_weight, d.q_bias, d.k_weight, d.k_bias)
    dweights = None if weights == (None,) * 4 else a.qkv.new_empty(4, head_dim, dtype=torch.float32)
    _native.lib().rope_rotate_bwd(
        a.qkv, a.rope, a.q_weight, a.q_bias, a.k_weight, a.k_bias, a.index, dq, dk, dv, d.qkv, d.rope, dweights,
        a.prefix, first, _NORMS.index(a.qk_norm), a.eps,
    )  # fmt: skip
    for into, found in zip(weights, () if dweights is None else dweights):
        if into is not None:
            into.copy_(found)


def _check(a):
    check_rows("rope_attention", a, a.index)
    if a.rope is None and a.index is not None:
        raise ValueError("rope_attention: index names rows of rope, and there is no rope")
    if a.qk_norm not in _NORMS:
        raise ValueError(f"rope_attention: qk_norm must be one of {', '.join(_NORMS)}, got {a.qk_norm!r}")
    for name in ("q_weight", "q_bias", "k_weight", "k_bias"):
        if getattr(a, name) is not None and (a.qk_norm == "none" or (a.qk_norm == "rms" and name.endswith("bias"))):
            raise ValueError(f"rope_attention: {name} has no meaning with qk_norm={a.qk_norm!r}")


def _why_not_xformers(a):
    head_dim = a.qkv.shape[4]
    if head_dim % 8 or head_dim > 256:
        return f"head_dim {head_dim}: it takes multiples of 8 up to 256"
    return why_not_grid(a)


def _why_not_flash(a):
    if a.qkv.dtype == torch.float32:
        return "flash_attn computes in 16 bits only, qkv is torch.float32"
    return _why_not_xformers(a)


def _out(a, backend):
    batch, _n, _, heads, head_dim = a.qkv.shape
    count = query_count(a)
    if backend == "native":  # torch's CPU flash attention lays its log-sum-exp out as (B, Nq, heads)
        lse = a.qkv.new_empty(batch, count, heads, dtype=torch.float32).transpose(1, 2)
    else:  # the libraries' backwards save nothing
        lse = a.qkv.new_empty(0 if backend in ATTENTIONS else (batch, heads, count), dtype=torch.float32)
    return a.qkv.new_empty(batch, count, heads * head_dim), lse


def _traffic(a):
    size = (
        a.qkv.element_size() * a.qkv.shape[0] * a.qkv.shape[3] * a.qkv.shape[4] * 2 * (a.qkv.shape[1] + query_count(a))
    )
    return size + sum(t.nbytes for t in (a.rope, a.index) if t is not None)


def _sample(
    label: str,
    shape: tuple[int, int, int, int],
    rotated: int = 0,
    prefix: int = 0,
    shared: bool = False,
    norm: str = "none",
    first: int = 0,
    count: int | None = None,
    grid: int = 0,
    real: bool = False,
) -> Sample:
    batch, n, heads, head_dim = shape

    def make(randn: Callable[..., Tensor]) -> dict[str, Any]:
        args: dict[str, Any] = {"qkv": randn(batch, n, 3, heads, head_dim)}
        if rotated:
            angle = 3 * randn(1 if shared else heads, grid or rotated, head_dim // 2, dtype=torch.float32)
            args["rope"] = torch.stack((angle.cos(), angle.sin()))
        if grid:  # a random subset of the grid's rows per image, as dropping masked tokens leaves them
            args["index"] = randn(batch, grid).argsort(1)[:, :rotated].contiguous()
        if norm != "none":
            names = ("q_weight", "k_weight") if norm == "rms" else ("q_weight", "q_bias", "k_weight", "k_bias")
            args.update({name: 1 + 0.2 * randn(head_dim, dtype=torch.float32) for name in names})
        return {**args, "prefix": prefix, "qk_norm": norm, "first_query": first, "num_queries": count}

    return Sample(label, make, real)


rope_attention = Op(
    "rope_attention",
    ref=rope_attention_ref,
    shapes={
        "qkv": "B N 3 heads head_dim",
        "rope": "2 heads R F | 2 1 R F",
        "index": "B M",
        **dict.fromkeys(("q_weight", "q_bias", "k_weight", "k_bias"), "head_dim"),
    },
    check=_check,
    roles={
        "qkv": "lowered",
        "index": (torch.int64,),
        **dict.fromkeys(("rope", "q_weight", "q_bias", "k_weight", "k_bias"), "fp32"),
    },
    out=_out,
    saved=("lse",),
    keep_output=True,
    written=("qkv",),
    cpu=[Backend("native", _native_forward, _native_backward, why_not_native, allocates=True)],
    cuda=[
        Backend("triton", triton_forward, triton_backward, why_not_triton),
        library("flash_attn", prepared, _why_not_flash),
        library("xformers", prepared, _why_not_xformers),
        library("sdpa", prepared, why_not_grid),
    ],
    prefer=lambda a: attention_order(a.qkv.shape[1]),
    tangent=TANGENT,
    samples=[
        _sample("encoder: cls, image, latents", (2, 1 + 36 + 9, 3, 64), 36, 1),
        _sample("last encoder block: latents only", (1, 1 + 20 + 11, 2, 64), 20, 1, first=21),
        _sample("last decoder block: image only", (1, 20 + 12, 2, 64), 20, 0, count=20),
        _sample("axial, shared by heads", (2, 70, 2, 32), 70, 0, shared=True),
        _sample("head_dim 72, no rotation", (1, 130, 2, 72)),
        _sample("head_dim 72, axial, RMS q/k norm", (1, 49, 2, 72), 49, 0, shared=True, norm="rms"),
        _sample("LayerNorm q/k norm with rotation", (2, 33, 2, 24), 16, 1, norm="layer"),
        _sample("LayerNorm q/k norm, pruned", (1, 17, 1, 16), norm="layer", first=4, count=9),
        _sample("dropped tokens keep their rows", (3, 1 + 6 + 3, 2, 16), 6, 1, grid=9),
        _sample("dropped tokens, shared, norm, pruned", (2, 8, 2, 16), 5, 0, True, "rms", first=1, count=5, grid=7),
        _sample("one token", (1, 1, 1, 16)),
        _sample("MAETok-B encoder 256 px", (4, 385, 12, 64), 256, 1, real=True),
        _sample("MAETok-B encoder 512 px", (4, 1153, 12, 64), 1024, 1, real=True),
        _sample("SiT-XL 128 tokens", (4, 128, 16, 72), real=True),
        _sample("SiT-XL/2 1024 tokens", (4, 1024, 16, 72), real=True),
        _sample("MAETok-B encoder 256 px, half dropped", (4, 257, 12, 64), 128, 1, grid=256, real=True),
        _sample("LightningDiT-XL 256 tokens", (4, 256, 16, 72), 256, 0, shared=True, norm="rms", real=True),
    ],
    flops=lambda a: 4 * a.qkv.shape[0] * a.qkv.shape[3] * a.qkv.shape[4] * query_count(a) * a.qkv.shape[1],
    traffic=_traffic,
)
