# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""Parts of the formula of `rope_attention` that its tangent shares: q and k normalised and rotated, in plain torch,
which arguments are wrong and which shapes its kernels take. `a` are its arguments by name."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ._record import EMPTY
from ._tiles import over_grid

__all__ = [
    "check_rows",
    "norm",
    "prepared",
    "query_count",
    "rotate",
    "why_not_grid",
    "why_not_native",
    "why_not_triton",
]


def norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, qk_norm: str, eps: float) -> Tensor:
    if qk_norm == "rms":
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
        return x if weight is None else x * weight
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps) if qk_norm == "layer" else x


def rotate(x: Tensor, rope: Tensor, prefix: int, index: Tensor | None) -> Tensor:
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


def prepared(a: Any) -> tuple[Tensor, Tensor]:
    """Normalised and rotated q and k, (B, N, heads, head_dim) in qkv's dtype; computed in fp32 or fp64."""
    wide = torch.float64 if a.qkv.dtype == torch.float64 else torch.float32
    q = norm(a.qkv[:, :, 0].to(wide), a.q_weight, a.q_bias, a.qk_norm, a.eps)
    k = norm(a.qkv[:, :, 1].to(wide), a.k_weight, a.k_bias, a.qk_norm, a.eps)
    if a.rope is not None:
        q, k = rotate(q, a.rope, a.prefix, a.index), rotate(k, a.rope, a.prefix, a.index)
    return q.to(a.qkv.dtype), k.to(a.qkv.dtype)


def query_count(a: Any) -> int:
    """How many queries are asked for."""
    return a.qkv.shape[1] - a.first_query if a.num_queries is None else a.num_queries


def check_rows(op: str, a: Any, index: Tensor | None = None) -> None:
    """ValueError of `op` where the rotated tokens or the queries are not among qkv's, or no rotation fits head_dim."""
    n, heads, head_dim = a.qkv.shape[1], a.qkv.shape[3], a.qkv.shape[4]
    if a.rope is not None:
        if head_dim % 2 or a.rope.shape[3] * 2 != head_dim:
            raise ValueError(
                f"{op}: rotation pairs channels, so head_dim must be even and rope (2, {heads} or 1, M, "
                f"head_dim / 2), got head_dim {head_dim} and rope {tuple(a.rope.shape)}"
            )
        rotated = a.rope.shape[2] if index is None else index.shape[1]
        if a.prefix < 0 or a.prefix + rotated > n:
            raise ValueError(f"{op}: {rotated} rotated tokens after a prefix of {a.prefix} do not fit in {n} tokens")
    first, count = a.first_query, query_count(a)
    if first < 0 or count < 0 or first + count > n:
        raise ValueError(f"{op}: queries {first} .. {first + count} are not within {n} tokens")


def why_not_native(a: Any) -> str | None:
    head_dim = a.qkv.shape[4]
    if query_count(a) == 0:
        return EMPTY
    return f"head_dim {head_dim}: the kernels take even ones up to 512" if head_dim % 2 or head_dim > 512 else None


def why_not_grid(a: Any) -> str | None:
    return EMPTY if query_count(a) == 0 else over_grid(batch=a.qkv.shape[0], heads=a.qkv.shape[3])


def why_not_triton(a: Any) -> str | None:
    head_dim = a.qkv.shape[4]
    if head_dim % 8 or not 16 <= head_dim <= 128:
        return f"head_dim {head_dim}: the kernels take multiples of 8 from 16 to 128"
    return why_not_grid(a)
