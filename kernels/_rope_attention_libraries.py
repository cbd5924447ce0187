# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""Backends of `rope_attention` that hand the attention to a library, with norm and rotation ahead of it:

    q, k = prepared(args)             Triton's row kernels where they run, else plain torch
    out  = library(q, k, v, scale)    flash_attn, xformers, or torch's scaled_dot_product_attention ("sdpa")

Their backward runs the library's forward once more under autograd, and differentiates that: what each version of a
library saves, and how its own backward is called, is its own affair. That is 2/7 more work than a backward alone.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ._record import Backend
from ._rope_rows_triton import RowCall
from ._triton import why_no_triton

__all__ = ["ATTENTIONS", "library"]


def _flash_attn(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    return importlib.import_module("flash_attn").flash_attn_func(q, k, v, softmax_scale=scale)


def _xformers(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    return importlib.import_module("xformers.ops").memory_efficient_attention(q, k, v, scale=scale)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2)


# All take q (B, Nq, heads, head_dim), k and v (B, N, heads, head_dim) and return q's shape.
ATTENTIONS: dict[str, Callable[[Tensor, Tensor, Tensor, float], Tensor]] = {
    "flash_attn": _flash_attn,
    "xformers": _xformers,
    "sdpa": _sdpa,
}
Prepared = Callable[..., tuple[Tensor, Tensor]]


@contextlib.contextmanager
def _recording() -> Iterator[None]:
    """Autograd switched on again: torch runs the bodies of custom ops below it."""
    exclude = torch._C._dispatch_tls_local_exclude_set()
    keys = torch._C.DispatchKey
    for key in (keys.AutogradFunctionality, keys.AutogradOther, keys.AutogradNestedTensor, keys.ADInplaceOrView):
        exclude = exclude.remove(key)
    include = torch._C._dispatch_tls_local_include_set()
    with torch._C._ForceDispatchKeyGuard(include, exclude), torch.enable_grad():
        yield


def _in_triton(call: RowCall) -> bool:
    return why_no_triton(call.qkv.device.type) is None


def library(name: str, prepared: Prepared, why_not: Callable[[Any], str | None]) -> Backend:
    """The backend `name`; `prepared(a)` is the reference's q and k, all rows."""
    attention = ATTENTIONS[name]

    def forward(a: Any, out: None) -> tuple[Tensor, Tensor]:
        call = RowCall(a)
        q, k, v = call.x
        if call.rowwise or call.rope is not None:
            if _in_triton(call):
                q, k = call.prepare()
            else:
                q, k = prepared(a)
                q = q[:, call.first : call.first + call.count]
        y = attention(q, k, v, call.head_dim**-0.5)
        y = torch.ops.aten._unsafe_view(y.contiguous(), [call.batch, call.count, call.heads * call.head_dim])
        return y, y.new_empty(0, dtype=torch.float32)

    def backward(a: Any, out: Any, g: Any, d: Any) -> None:
        call = RowCall(a)
        grad = g.y.view(call.batch, call.count, call.heads, call.head_dim)
        scale = call.head_dim**-0.5
        rows = call.rowwise or call.rope is not None
        if rows and not _in_triton(call):
            with _recording():
                leaves = a._make(v if into is None else v.detach().requires_grad_() for v, into in zip(a, d))
                q, k = prepared(leaves)
                y = attention(q[:, call.first : call.first + call.count], k, leaves.qkv[:, :, 2], scale)
                wanted = [(v, into) for v, into in zip(leaves, d) if into is not None]
                found = torch.autograd.grad(y, [v for v, _ in wanted], grad)
            for (_, into), gradient in zip(wanted, found):
                into.copy_(gradient)
            return
        q, k = call.prepare() if rows else call.x[:2]
        with _recording():
            q, k, v = (x.detach().requires_grad_() for x in (q, k, call.x[2]))
            y = attention(q, k, v, scale)
            dq, dk, dv = torch.autograd.grad(y, (q, k, v), grad)
        call.zero_absent(d.qkv)
        to_q, to_k, to_v = call.sliced(d.qkv)
        to_v.copy_(dv)
        if rows:
            dq, dk = dq.contiguous(), dk.contiguous()
            call.table_grad(dq, dk, d.rope)
            call.finish(dq, dk, d)
        else:
            to_q.copy_(dq)
            to_k.copy_(dk)

    return Backend(name, forward, backward, why_not, allocates=True)
