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

first_query/num_queries prune the queries (a last block needs only the latent or only the image tokens' outputs).

Triton: q and k are rotated in registers as they are loaded, so neither is written rotated; unrotated rows load no
table. head_dim 72 runs as 64 + 16 columns (`_tiles.head_split`). With q/k norm a row kernel writes the normalised,
rotated q and k once, and the attention kernels take them as they are. CPU: native normalise + rotate, then in bf16 the
native AMX attention, forward and backward, else torch's flash attention. flash_attn, xformers and torch's own choice
(sdpa) can be asked for on CUDA (`_rope_attention_libraries`); which comes first is `_tiles.ATTENTION_ORDER`, and
`rope_attention.reason(...)` says why each is or is not taken.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _native
from ._op import EMPTY, Backend, Cost, Op, Sample, no_autocast
from ._rope_attention_libraries import ATTENTIONS, library_backward, library_forward
from ._rope_attention_triton import triton_backward, triton_forward
from ._tiles import attention_order

__all__ = ["rope_attention", "rope_attention_ref", "rope_table"]

_NORMS = ("none", "rms", "layer")
# Up to here torch's flash backward is faster in fp32 than in bf16, conversions included (128 tokens: 7.0 against 20.5
# ms, 385: 49 against 56, 1024: 98 against 81).
_WIDE_BACKWARD = 512


# ---- reference -----------------------------------------------------------------------------------------------------


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


def _norm_ref(x: Tensor, weight: Tensor | None, bias: Tensor | None, qk_norm: str, eps: float) -> Tensor:
    if qk_norm == "rms":
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
        return x if weight is None else x * weight
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps) if qk_norm == "layer" else x


def _rotate_ref(x: Tensor, rope: Tensor, prefix: int, index: Tensor | None) -> Tensor:
    """x (B, N, heads, head_dim), rotated where the table, or the index into it, has a row."""
    if index is None:
        cos, sin = rope.transpose(1, 2).unsqueeze(1).unbind(0)
    else:
        rows = rope.index_select(2, index.flatten()).unflatten(2, index.shape)
        cos, sin = rows.permute(0, 2, 3, 1, 4).unbind(0)
    stop = prefix + cos.shape[1]
    a, b = x[:, prefix:stop].unflatten(-1, (-1, 2)).unbind(-1)
    rotated = torch.stack((a * cos - b * sin, a * sin + b * cos), -1).flatten(-2)
    return torch.cat((x[:, :prefix], rotated, x[:, stop:]), 1)


def _prepared(
    qkv: Tensor,
    rope: Tensor | None,
    q_weight: Tensor | None,
    q_bias: Tensor | None,
    k_weight: Tensor | None,
    k_bias: Tensor | None,
    prefix: int,
    qk_norm: str,
    eps: float,
    index: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Normalised and rotated q and k, (B, N, heads, head_dim) in qkv's dtype; computed in fp32 or fp64."""
    wide = torch.float64 if qkv.dtype == torch.float64 else torch.float32
    q, k = qkv[:, :, 0].to(wide), qkv[:, :, 1].to(wide)
    q, k = _norm_ref(q, q_weight, q_bias, qk_norm, eps), _norm_ref(k, k_weight, k_bias, qk_norm, eps)
    if rope is not None:
        q, k = _rotate_ref(q, rope, prefix, index), _rotate_ref(k, rope, prefix, index)
    return q.to(qkv.dtype), k.to(qkv.dtype)


def _query_range(qkv: Tensor, first_query: int, num_queries: int | None) -> tuple[int, int]:
    return first_query, qkv.shape[1] - first_query if num_queries is None else num_queries


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
    q, k = _prepared(qkv, rope, q_weight, q_bias, k_weight, k_bias, prefix, qk_norm, eps, index)
    first, count = _query_range(qkv, first_query, num_queries)
    q = q[:, first : first + count]
    out = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), qkv[:, :, 2].transpose(1, 2))
    return out.transpose(1, 2).flatten(2)


# ---- launchers: CPU ------------------------------------------------------------------------------------------------


def _native_prepare(args: tuple[Any, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """q (B, Nq, heads, head_dim), k and v (B, N, heads, head_dim), each with contiguous heads; v is a view of qkv."""
    qkv, rope, q_weight, q_bias, k_weight, k_bias, prefix, qk_norm, eps, first_query, num_queries, index = args
    first, count = _query_range(qkv, first_query, num_queries)
    q, k, v = qkv.unbind(2)
    if rope is None and qk_norm == "none":
        return q[:, first : first + count], k, v
    batch, n, _, heads, head_dim = qkv.shape
    q, k = qkv.new_empty(batch, count, heads, head_dim), qkv.new_empty(batch, n, heads, head_dim)
    weights = (q_weight, q_bias, k_weight, k_bias)
    _native.lib().rope_rotate(qkv, rope, *weights, index, q, k, prefix, first, _NORMS.index(qk_norm), eps)
    return q, k, v


def _amx(x: Tensor) -> bool:
    """Whether csrc/cpu/attention*.cpp take it: bf16 on a processor with tiles. Measured against torch's flash attention
    (2 threads; forward, backward): 128 tokens of 16 x 72: 1.2, 8 times as fast; 1024: 1.6, 2.0; 385 of 12 x 64: 3, 4.5;
    128 queries of 385: 3, 6. No shape was found where torch wins."""
    return x.dtype == torch.bfloat16 and bool(_native.lib().attention_bf16_usable())


def _native_forward(*args: Any) -> tuple[Tensor, ...]:
    q, k, v = _native_prepare(args)
    batch, count, heads, head_dim = q.shape
    if _amx(q):
        out = q.new_empty(batch, count, heads * head_dim)
        lse = q.new_empty(batch, count, heads, dtype=torch.float32)
        _native.lib().attention_bf16(q, k, v, out.view(q.shape), lse)
        return out, lse.transpose(1, 2)
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    out, lse = flash(*(x.transpose(1, 2) for x in (q, k, v)))
    # not a view: torch refuses in-place operations on a view among several outputs
    return torch.ops.aten._unsafe_view(out.transpose(1, 2), [batch, count, heads * head_dim]), lse


def _native_backward(
    grad: Tensor, saved: Sequence[Tensor], args: tuple[Any, ...], needs: Sequence[bool]
) -> Sequence[Tensor | None]:
    qkv, rope, q_weight, q_bias, k_weight, k_bias, prefix, qk_norm, eps, first_query, num_queries, index = args
    out, lse = saved
    head_dim = qkv.shape[4]
    first, count = _query_range(qkv, first_query, num_queries)
    q, k, v = _native_prepare(args)
    grad, out = grad.view(q.shape), out.view(q.shape)
    dqkv = torch.empty_like(qkv, memory_format=torch.contiguous_format)
    dq, dk, dv = dqkv.unbind(2)
    dq = dq[:, first : first + count]
    in_place = _amx(q)
    if in_place:
        _native.lib().attention_bf16_bwd(q, k, v, out, grad, lse.transpose(1, 2), dq, dk, dv)
        if rope is None and qk_norm == "none":
            dqkv[:, :first, 0].zero_()
            dqkv[:, first + count :, 0].zero_()
            return [dqkv, *[None] * 11]
    else:
        tensors = [x.transpose(1, 2) for x in (grad, q, k, v, out)]
        if qkv.shape[1] <= _WIDE_BACKWARD:
            tensors = [t.float() for t in tensors]
        grads = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(*tensors, lse, 0.0, False)
        dq, dk, dv = (g.to(qkv.dtype).transpose(1, 2) for g in grads)
    drope = torch.empty_like(rope, memory_format=torch.contiguous_format) if needs[1] else None
    dweights = qkv.new_empty(4, head_dim, dtype=torch.float32) if any(needs[2:6]) else None
    _native.lib().rope_rotate_bwd(
        qkv, rope, q_weight, q_bias, k_weight, k_bias, index, dq, dk, dv, dqkv, drope, dweights,
        prefix, first, _NORMS.index(qk_norm), eps,
    )  # fmt: skip
    rows = [None] * 4 if dweights is None else [r.clone() for r in dweights]
    return [dqkv, drope, *rows, *[None] * 6]


# ---- record --------------------------------------------------------------------------------------------------------


def _check(
    qkv: Tensor,
    rope: Tensor | None,
    q_weight: Tensor | None,
    q_bias: Tensor | None,
    k_weight: Tensor | None,
    k_bias: Tensor | None,
    prefix: int,
    qk_norm: str,
    eps: float,
    first_query: int,
    num_queries: int | None,
    index: Tensor | None,
) -> None:
    if qkv.ndim != 5 or qkv.shape[2] != 3:
        raise ValueError(f"rope_attention: qkv must be (B, N, 3, heads, head_dim), got {tuple(qkv.shape)}")
    n, heads, head_dim = qkv.shape[1], qkv.shape[3], qkv.shape[4]
    if rope is not None:
        if head_dim % 2:
            raise ValueError(f"rope_attention: rotation pairs channels, so head_dim must be even, got {head_dim}")
        if rope.ndim != 4 or rope.shape[0] != 2 or rope.shape[1] not in (1, heads) or rope.shape[3] * 2 != head_dim:
            raise ValueError(
                f"rope_attention: rope must be (2, {heads} or 1, M, {head_dim // 2}) for {heads} heads of {head_dim}, "
                f"got {tuple(rope.shape)}"
            )
        rotated = rope.shape[2]
        if index is not None:
            if index.ndim != 2 or index.shape[0] != qkv.shape[0]:
                raise ValueError(f"rope_attention: index must be ({qkv.shape[0]}, M), got {tuple(index.shape)}")
            rotated = index.shape[1]
        if prefix < 0 or prefix + rotated > n:
            raise ValueError(
                f"rope_attention: {rotated} rotated tokens after a prefix of {prefix} do not fit in {n} tokens"
            )
    elif index is not None:
        raise ValueError("rope_attention: index names rows of rope, and there is no rope")
    if qk_norm not in _NORMS:
        raise ValueError(f"rope_attention: qk_norm must be one of {', '.join(_NORMS)}, got {qk_norm!r}")
    for name, weight in (("q_weight", q_weight), ("q_bias", q_bias), ("k_weight", k_weight), ("k_bias", k_bias)):
        if weight is None:
            continue
        if qk_norm == "none" or (qk_norm == "rms" and name.endswith("bias")):
            raise ValueError(f"rope_attention: {name} has no meaning with qk_norm={qk_norm!r}")
        if tuple(weight.shape) != (head_dim,):
            raise ValueError(f"rope_attention: {name} must be ({head_dim},), got {tuple(weight.shape)}")
    count = _query_range(qkv, first_query, num_queries)[1]
    if first_query < 0 or count < 0 or first_query + count > n:
        raise ValueError(f"rope_attention: queries {first_query} .. {first_query + count} are not within {n} tokens")


def _unsupported(backend: str, qkv: Tensor, *rest: Any) -> str | None:
    batch, _n, _, heads, head_dim = qkv.shape
    first_query, num_queries = rest[8:10]
    if batch == 0 or heads == 0 or _query_range(qkv, first_query, num_queries)[1] == 0:
        return EMPTY
    if backend == "native" and (head_dim % 2 or head_dim > 512):
        return f"head_dim {head_dim}: the kernels take even ones up to 512"
    if backend in ("flash_attn", "xformers"):
        if backend == "flash_attn" and qkv.dtype == torch.float32:
            return "flash_attn computes in 16 bits only, qkv is torch.float32"
        if head_dim % 8 or head_dim > 256:
            return f"head_dim {head_dim}: {backend} takes multiples of 8 up to 256"
    if backend == "triton":
        if head_dim % 8 or not 16 <= head_dim <= 128:
            return f"head_dim {head_dim}: the kernels take multiples of 8 from 16 to 128"
        if batch > 65535 or heads > 65535:
            return f"{batch} x {heads} (batch x heads) exceeds a CUDA grid"
    return None


def _fake(name: str, *args: Any) -> tuple[Tensor, ...]:
    qkv, first_query, num_queries = args[0], args[9], args[10]
    batch, _n, _, heads, head_dim = qkv.shape
    count = _query_range(qkv, first_query, num_queries)[1]
    if name == "native":  # torch's CPU flash attention lays its log-sum-exp out as (B, Nq, heads)
        lse = qkv.new_empty(batch, count, heads, dtype=torch.float32).transpose(1, 2)
    else:  # the libraries' backwards save nothing
        lse = qkv.new_empty(0 if name in ATTENTIONS else (batch, heads, count), dtype=torch.float32)
    return qkv.new_empty(batch, count, heads * head_dim), lse


def _case(
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


def _samples() -> Iterable[Sample]:
    yield _case("encoder: cls, image, latents", (2, 1 + 36 + 9, 3, 64), 36, 1)
    yield _case("last encoder block: latents only", (1, 1 + 20 + 11, 2, 64), 20, 1, first=21)
    yield _case("last decoder block: image only", (1, 20 + 12, 2, 64), 20, 0, count=20)
    yield _case("axial, shared by heads", (2, 70, 2, 32), 70, 0, shared=True)
    yield _case("head_dim 72, no rotation", (1, 130, 2, 72))
    yield _case("head_dim 72, axial, RMS q/k norm", (1, 49, 2, 72), 49, 0, shared=True, norm="rms")
    yield _case("LayerNorm q/k norm with rotation", (2, 33, 2, 24), 16, 1, norm="layer")
    yield _case("LayerNorm q/k norm, pruned", (1, 17, 1, 16), norm="layer", first=4, count=9)
    yield _case("dropped tokens keep their rows", (3, 1 + 6 + 3, 2, 16), 6, 1, grid=9)
    yield _case("dropped tokens, shared, norm, pruned", (2, 8, 2, 16), 5, 0, True, "rms", first=1, count=5, grid=7)
    yield _case("one token", (1, 1, 1, 16))
    for batch, label, n, heads, head_dim, rotated, prefix in (
        (4, "MAETok-B encoder 256 px", 385, 12, 64, 256, 1),
        (4, "MAETok-B encoder 512 px", 1153, 12, 64, 1024, 1),
        (4, "SiT-XL 128 tokens", 128, 16, 72, 0, 0),
        (4, "SiT-XL/2 1024 tokens", 1024, 16, 72, 0, 0),
    ):
        yield _case(label, (batch, n, heads, head_dim), rotated, prefix, real=True)
    yield _case("MAETok-B encoder 256 px, half dropped", (4, 257, 12, 64), 128, 1, grid=256, real=True)
    yield _case("LightningDiT-XL 256 tokens", (4, 256, 16, 72), 256, 0, shared=True, norm="rms", real=True)


def _cost(qkv: Tensor, rope: Tensor | None = None, *rest: Any, **named: Any) -> Cost:
    batch, n, _, heads, head_dim = qkv.shape
    _first, count = _query_range(qkv, named.get("first_query", 0), named.get("num_queries"))
    width = batch * heads * head_dim
    index = named.get("index")
    table = (0 if rope is None else 4 * rope.numel()) + (0 if index is None else 8 * index.numel())
    size = qkv.element_size()
    return Cost(4 * width * count * n, size * width * (2 * n + 2 * count) + table, 1)


rope_attention = Op(
    "rope_attention",
    ref=rope_attention_ref,
    cpu=(Backend("native", _native_forward, _native_backward, library="native"),),
    cuda=(
        Backend("triton", triton_forward, triton_backward, library="triton"),
        *(
            Backend(name, library_forward(name, _prepared), library_backward(name, _prepared), library=library)
            for name, library in (("flash_attn", "flash_attn"), ("xformers", "xformers"), ("sdpa", None))
        ),
    ),
    prefer=lambda qkv, *_: attention_order(qkv.shape[1]),
    fake=_fake,
    saved=1,
    keep_output=True,
    check=_check,
    unsupported=_unsupported,
    samples=_samples,
    cost=_cost,
    autocast="lower",
    own_dtypes={"index": (torch.int64,)},
    fp32=frozenset({"rope", "q_weight", "q_bias", "k_weight", "k_bias"}),
)
