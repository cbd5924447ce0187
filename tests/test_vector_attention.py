# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""The CPU's attention on vectors (csrc/cpu/rope_attention.cpp) against fp64, by the rule, on every instruction set."""

from __future__ import annotations

import math
import sys
from typing import Any

import pytest
import rule
import torch
from torch import Tensor

from maetok_fast.kernels import _native, rope_attention

# the package exports the op under its module's name
module: Any = sys.modules["maetok_fast.kernels.rope_attention"]
pytestmark = pytest.mark.skipif(_native.why_missing() is not None, reason="needs the native library")
SMALL = [sample for sample in rope_attention.samples if not sample.real]
SHAPES = [
    (1, 385, 2, 64, 257),
    (2, 33, 1, 72, 0),
    (1, 97, 3, 10, 3),
    (1, 300, 1, 80, 0),
    (1, 2, 1, 512, 0),
    (5, 1, 2, 2, 0),
]


def args(qkv: Tensor, **options: Any) -> Any:
    defaults = {"prefix": 0, "qk_norm": "none", "eps": 1e-6, "first_query": 0}
    given = defaults | options
    return rope_attention.Args(*(qkv if n == "qkv" else given.get(n) for n in rope_attention.Args._fields))


def in_dtype(a: Any, dtype: torch.dtype) -> Any:
    """qkv in it; tables and weights in fp32, or in fp64 where that is it."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return a._replace(
        qkv=a.qkv.to(dtype),
        **{
            n: v.to(wide)
            for n, v in a._asdict().items()
            if isinstance(v, Tensor) and v.is_floating_point() and n != "qkv"
        },
    )


def value_and_lse(a: Any) -> dict[str, Tensor]:
    q, k = module.prepared(a)
    q = q[:, a.first_query : a.first_query + module.query_count(a)]
    scores = q.transpose(1, 2) @ k.permute(0, 2, 3, 1) * q.shape[-1] ** -0.5
    return {"y": rope_attention.ref(*a), "lse": scores.logsumexp(-1).to(torch.promote_types(q.dtype, torch.float32))}


def check(a: Any, dtype: torch.dtype) -> None:
    a = in_dtype(a, dtype)
    y, lse = module._own(a)
    rule.assert_rule({"y": y, "lse": lse}, value_and_lse(a), value_and_lse(in_dtype(a, torch.float64)), (a.qkv,))


@pytest.mark.usefixtures("instruction_set")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("sample", SMALL, ids=[s.label for s in SMALL])
def test_samples(sample: Any, dtype: torch.dtype) -> None:
    given = sample.make(lambda *shape, dtype=torch.float32: torch.randn(*shape, dtype=dtype))
    check(args(given.pop("qkv"), **given), dtype)


@pytest.mark.usefixtures("instruction_set")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_edges(shape: tuple[int, ...]) -> None:
    """Keys and queries around panels and blocks, channels that fill no vector, few heads for the threads."""
    *size, first = shape
    batch, n, heads, dim = size
    check(args(torch.randn(batch, n, 3, heads, dim), first_query=first), torch.float32)


@pytest.mark.usefixtures("instruction_set")
def test_nothing_else_is_written_and_threads_change_nothing() -> None:
    qkv = 3 * torch.randn(1, 300, 3, 2, 20)
    a, threads = args(qkv, first_query=5, num_queries=290), torch.get_num_threads()
    results = []
    try:
        for count in (1, 3, 8):
            torch.set_num_threads(count)
            room, lse = torch.full((290 * 40 + 64,), math.nan), torch.full((290 * 2 + 64,), math.nan)
            y = room[:-64].view(1, 290, 2, 20)
            rest = (None,) * 6
            _native.lib().rope_attention(qkv, *rest, y, lse[:-64].view(1, 290, 2), 0, 5, 0, 1e-6)
            assert room[-64:].isnan().all()
            assert lse[-64:].isnan().all()
            results.append((y.flatten(2), lse[:-64]))
    finally:
        torch.set_num_threads(threads)
    for y, lse in results[1:]:
        assert torch.equal(y, results[0][0])
        assert torch.equal(lse, results[0][1])
    assert torch.equal(results[0][0], module._own(a)[0])


@pytest.mark.usefixtures("instruction_set")
def test_scores_far_apart() -> None:
    """Weights that underflow, scores of thousands: no overflow, no NaN."""
    check(args(60 * torch.randn(2, 40, 3, 2, 16)), torch.float32)
    qkv = torch.zeros(1, 3, 3, 1, 4)
    qkv[0, :, 1, 0, 0] = torch.tensor([-3e4, 0.0, 3e4])
    qkv[0, :, 0, 0, 0] = 1e3
    qkv[0, :, 2, 0, 0] = torch.tensor([1.0, 2.0, 3.0])
    y, lse = module._own(args(qkv))
    assert (y[..., 0] == 3).all()
    assert lse.tolist() == [[[1.5e7] * 3]]


@pytest.mark.usefixtures("instruction_set")
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("which", [0, 1, 2])
def test_what_is_not_finite_stays_in_its_image_and_head(bad: float, which: int) -> None:
    """As in torch's written-out attention: a query's own row, every row of a key's or a value's head, nothing else."""
    qkv = torch.randn(3, 40, 3, 4, 8)
    clean, _ = module._own(args(qkv))
    qkv[1, 17, which, 2, 5] = bad
    y, _ = module._own(args(qkv))
    q, k, v = (t.transpose(1, 2) for t in qkv.unbind(2))
    want = ((q @ k.transpose(-2, -1) * 8**-0.5).softmax(-1) @ v).transpose(1, 2).flatten(2)
    assert torch.equal(y.isnan(), want.isnan())
    spoilt = torch.zeros(3, 40, 4, dtype=torch.bool)
    spoilt[1, slice(17, 18) if which == 0 else slice(None), 2] = True
    untouched = ~spoilt.repeat_interleave(8, 2)
    assert torch.equal(y[untouched], clean[untouched])
    assert untouched.sum() == y.numel() - spoilt.sum() * 8


def test_refusals() -> None:
    qkv, lib, rest = torch.randn(1, 4, 3, 1, 8), _native.lib(), (None,) * 6
    y, lse = torch.empty(1, 4, 1, 8), torch.empty(1, 4, 1)
    with pytest.raises(ValueError, match="out must have shape"):
        lib.rope_attention(qkv, *rest, torch.empty(1, 4, 1, 9), lse, 0, 0, 0, 1e-6)
    with pytest.raises(ValueError, match="lse must have shape"):
        lib.rope_attention(qkv, *rest, y, torch.empty(1, 4, 2), 0, 0, 0, 1e-6)
    with pytest.raises(TypeError, match="out must be float32 like qkv"):
        lib.rope_attention(qkv, *rest, y.half(), lse, 0, 0, 0, 1e-6)
    with pytest.raises(ValueError, match="outside the 4 tokens"):
        lib.rope_attention(qkv, *rest, y, lse, 0, 1, 0, 1e-6)
