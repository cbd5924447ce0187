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
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ._rope_rows_triton import RowCall
from ._triton import why_no_triton

__all__ = ["ATTENTIONS", "library_backward", "library_forward"]


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


def library_forward(name: str, prepared: Prepared) -> Callable[..., tuple[Tensor, ...]]:
    """The forward of backend `name`; `prepared(qkv, rope, ..., eps, index)` is the reference's q and k, all rows."""

    def forward(*args: Any) -> tuple[Tensor, ...]:
        call = RowCall(args)
        q, k, v = call.x
        if call.rowwise or call.rope is not None:
            if _in_triton(call):
                q, k = call.prepare()
            else:
                q, k = prepared(*args[:9], args[11])
                q = q[:, call.first : call.first + call.count]
        out = ATTENTIONS[name](q, k, v, call.head_dim**-0.5)
        out = torch.ops.aten._unsafe_view(out.contiguous(), [call.batch, call.count, call.heads * call.head_dim])
        return out, out.new_empty(0, dtype=torch.float32)

    return forward


def library_backward(name: str, prepared: Prepared) -> Callable[..., Sequence[Tensor | None]]:
    """The backward of backend `name`."""

    def backward(
        grad: Tensor, saved: Sequence[Tensor], args: tuple[Any, ...], needs: Sequence[bool]
    ) -> Sequence[Tensor | None]:
        call = RowCall(args)
        grad = grad.view(call.batch, call.count, call.heads, call.head_dim)
        scale = call.head_dim**-0.5
        rows = call.rowwise or call.rope is not None
        if rows and not _in_triton(call):
            with _recording():
                leaves = [
                    a.detach().requires_grad_(n) if isinstance(a, Tensor) and n else a for a, n in zip(args, needs)
                ]
                q, k = prepared(*leaves[:9], leaves[11])
                q = q[:, call.first : call.first + call.count]
                out = ATTENTIONS[name](q, k, leaves[0][:, :, 2], scale)
                found = iter(torch.autograd.grad(out, [a for a, n in zip(leaves, needs) if n], grad, allow_unused=True))
            return [next(found) if n else None for n in needs]
        q, k = call.prepare() if rows else call.x[:2]
        with _recording():
            q, k, v = (x.detach().requires_grad_() for x in (q, k, call.x[2]))
            out = ATTENTIONS[name](q, k, v, scale)
            dq, dk, dv = torch.autograd.grad(out, (q, k, v), grad)
        dqkv = call.empty_grad()
        to_q, to_k, to_v = call.sliced(dqkv)
        to_v.copy_(dv)
        grads: list[Tensor | None] = [dqkv] + [None] * (len(args) - 1)
        if rows:
            dq, dk = dq.contiguous(), dk.contiguous()
            if needs[1] and call.rope is not None:
                grads[1] = call.table_grad(dq, dk)
            call.finish(dq, dk, dqkv, grads)
        else:
            to_q.copy_(dq)
            to_k.copy_(dk)
        return grads

    return backward
