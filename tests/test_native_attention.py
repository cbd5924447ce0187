# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""Attention on AMX tiles and its backward (csrc/cpu/attention*.cpp) against fp64, by the rule with torch's bf16 as the
peer. What it shares with attention on vectors: test_vector_attention.py."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from maetok_fast.kernels import _native


def usable() -> bool:
    if _native.why_missing() is not None:
        return False
    return bool(_native.lib().attention_tiles())


pytestmark = pytest.mark.skipif(not usable(), reason="needs the native library and a processor with AMX-BF16")

Shape = tuple[int, int, int, int, int, int]
# batch, tokens, heads, head_dim, first query, queries
SHAPES: list[Shape] = [
    (2, 7, 3, 16, 2, 5),
    (1, 33, 2, 72, 0, 33),
    (2, 50, 3, 10, 0, 50),
    (1, 128, 2, 72, 0, 128),
    (1, 385, 2, 64, 257, 128),
    (1, 300, 2, 80, 3, 290),
    (1, 1, 1, 2, 0, 1),
]


def packed(shape: Shape, scale: float = 1.5) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, k, v as views of one qkv, q of some of its tokens, and a gradient."""
    batch, tokens, heads, dim, first, queries = shape
    q, k, v = (scale * torch.randn(batch, tokens, 3, heads, dim)).bfloat16().unbind(2)
    return q[:, first : first + queries], k, v, torch.randn(batch, queries, heads, dim).bfloat16()


def guarded(*shape: int, dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, Tensor]:
    """A poisoned tensor, and the zone behind it that nobody may touch."""
    room = torch.full((math.prod(shape) + 64,), float("nan"), dtype=dtype)
    return room[:-64].view(shape), room[-64:]


def forward(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    out, zone = guarded(*q.shape)
    lse, lse_zone = guarded(*q.shape[:3], dtype=torch.float32)
    qkv = torch.stack((torch.zeros_like(k), k, v), 2)
    qkv[:, : q.shape[1], 0] = q
    _native.lib().rope_attention(qkv, *(None,) * 6, out, lse, 0, 0, 0, 1e-6)
    assert zone.isnan().all()
    assert lse_zone.isnan().all()
    return out, lse


def backward(q: Tensor, k: Tensor, v: Tensor, out: Tensor, grad: Tensor, lse: Tensor) -> list[Tensor]:
    """dq, dk, dv as views of one tensor, whose other elements stay poisoned."""
    dqkv = torch.full((k.shape[0], k.shape[1], 3, *k.shape[2:]), float("nan"), dtype=torch.bfloat16)
    dq, dk, dv = dqkv.unbind(2)
    dq = dq[:, : q.shape[1]]
    _native.lib().attention_bf16_bwd(q, k, v, out, grad, lse, dq, dk, dv)
    assert dqkv[:, q.shape[1] :, 0].isnan().all()
    return [dq, dk, dv]


def softmax_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).softmax(-1) @ v


def value_and_grads(fn: Callable[..., Tensor], dtype: torch.dtype, *tensors: Tensor) -> list[Tensor]:
    *inputs, grad = (x.detach().to(dtype) for x in tensors)
    leaves = [x.requires_grad_() for x in inputs]
    out = fn(*(x.transpose(1, 2) for x in leaves)).transpose(1, 2)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_value_and_gradients(shape: Shape) -> None:
    q, k, v, grad = packed(shape)
    out, lse = forward(q, k, v)
    ours = [out, *backward(q, k, v, out, grad, lse)]
    exact = value_and_grads(softmax_attention, torch.float64, q, k, v, grad)
    plain = value_and_grads(torch.nn.functional.scaled_dot_product_attention, torch.bfloat16, q, k, v, grad)
    for a, p, e in zip(ours, plain, exact):
        ulp = torch.finfo(torch.bfloat16).eps * e.abs().max()
        assert (a - e).abs().max() <= 2 * (p - e).abs().max() + 2 * ulp + 1e-6  # one key: its dq and dk are zero
    scores = q.double().transpose(1, 2) @ k.double().transpose(1, 2).transpose(-1, -2) / math.sqrt(shape[3])
    torch.testing.assert_close(lse.transpose(1, 2).double(), scores.logsumexp(-1), rtol=1e-5, atol=1e-5)


def test_large_scores_and_thread_counts() -> None:
    """Scores far beyond the range of exp, and the same bits from any number of threads."""
    for shape in ((1, 200, 5, 64, 0, 200), (1, 300, 1, 16, 0, 290)):  # the second: threads share a head's queries
        large_scores_and_thread_counts(shape)


def large_scores_and_thread_counts(shape: Shape) -> None:
    q, k, v, grad = packed(shape, scale=30)
    results = []
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            out, lse = forward(q, k, v)
            results.append([out, *backward(q, k, v, out, grad, lse)])
    finally:
        torch.set_num_threads(threads)
    for result in results:
        for x, same in zip(result, results[0]):
            assert x.isfinite().all()
            assert torch.equal(x, same)


def test_keys_that_do_not_exist_add_nothing() -> None:
    """33 keys are packed as 64; with scores this negative the power of a missing key's zero score overflows."""
    q = torch.full((1, 33, 1, 16), 30.0, dtype=torch.bfloat16)
    k, v, grad = -q, torch.randn_like(q), torch.randn_like(q)
    out, lse = forward(q, k, v)
    assert lse.max() < -500
    for x in backward(q, k, v, out, grad, lse):
        assert x.isfinite().all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_in_its_image_and_head(bad: float) -> None:
    q, k, v, grad = packed((2, 40, 2, 16, 0, 40))
    k[0, 5, 1, 3] = bad
    out, lse = forward(q, k, v)
    grads = backward(q, k, v, out, grad, lse)
    for x in (out, *grads):
        assert not x[0, :, 1].isfinite().all()
        assert x[0, :, 0].isfinite().all()
        assert x[1].isfinite().all()


def test_refusals() -> None:
    q = torch.zeros(1, 4, 2, 16, dtype=torch.bfloat16)
    out, lse, bwd = torch.empty_like(q), torch.empty(1, 4, 2), _native.lib().attention_bf16_bwd
    with pytest.raises(TypeError, match="q must be bfloat16"):
        bwd(q.float(), q, q, out, out, lse, q, q, q)
    with pytest.raises(ValueError, match="k must have shape"):
        bwd(q, q[..., :8].contiguous(), q, out, out, lse, q, q, q)
    strided = q.transpose(1, 2).contiguous().transpose(1, 2)
    with pytest.raises(ValueError, match="contiguous heads"):
        bwd(strided, q, q, out, out, lse, q, q, q)
    with pytest.raises(ValueError, match=r"dout must have shape \(1, 4, 2, 16\)"):
        bwd(q, q, q, out, out[:, :3], lse, q, q, q)
    with pytest.raises(ValueError, match="dk must have contiguous heads"):
        bwd(q, q, q, out, out, lse, q, strided, q)
