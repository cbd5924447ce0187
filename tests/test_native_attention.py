"""attention_bf16 (csrc/cpu/attention.cpp) against fp64, by the rule with torch's bf16 flash attention as the peer."""

from __future__ import annotations

import math

import pytest
import torch

from maetok_fast.kernels import _native


def usable() -> bool:
    if _native.why_missing() is not None:
        return False
    return bool(_native.lib().attention_bf16_usable())


pytestmark = pytest.mark.skipif(not usable(), reason="needs the native library and a processor with AMX-BF16")


@pytest.mark.parametrize(
    ("batch", "tokens", "heads", "dim", "queries"),
    [
        (2, 7, 3, 16, 5),
        (1, 33, 2, 72, 33),
        (2, 50, 3, 10, 50),
        (1, 128, 2, 72, 128),
        (1, 385, 2, 64, 128),
        (1, 1, 1, 2, 1),
    ],
)
def test_value(batch: int, tokens: int, heads: int, dim: int, queries: int) -> None:
    qkv = 1.5 * torch.randn(batch, tokens, 3, heads, dim).bfloat16()
    q, k, v = qkv.unbind(2)
    q = q[:, tokens - queries :]
    # poisoned outputs, with a zone behind them that nobody may touch
    room = torch.full((batch * queries * heads * dim + 64,), float("nan"), dtype=torch.bfloat16)
    out, zone = room[:-64].view(batch, queries, heads, dim), room[-64:]
    lse = torch.full((batch, queries, heads), float("nan"))
    _native.lib().attention_bf16(q, k, v, out, lse)
    assert zone.isnan().all()
    q64, k64, v64 = (x.double().transpose(1, 2) for x in (q, k, v))
    scores = q64 @ k64.transpose(-1, -2) / math.sqrt(dim)
    exact = scores.softmax(-1) @ v64
    plain = torch.nn.functional.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)))
    ours, theirs = ((x.double() - exact).abs().max().item() for x in (out.transpose(1, 2), plain))
    assert ours <= 2 * theirs + 2 * torch.finfo(torch.bfloat16).eps * exact.abs().max().item()
    torch.testing.assert_close(lse.transpose(1, 2).double(), scores.logsumexp(-1), rtol=1e-5, atol=1e-5)


def test_large_scores_and_thread_counts() -> None:
    """Scores far beyond the range of exp, and the same bits from any number of threads."""
    q, k, v = (30 * torch.randn(1, 40, 4, 64).bfloat16() for _ in range(3))
    results = []
    threads = torch.get_num_threads()
    try:
        for count in (1, threads):
            torch.set_num_threads(count)
            out, lse = torch.empty_like(q), torch.empty(1, 40, 4)
            _native.lib().attention_bf16(q, k, v, out, lse)
            results.append(out)
    finally:
        torch.set_num_threads(threads)
    assert results[0].isfinite().all()
    assert torch.equal(*results)


def test_refusals() -> None:
    q = torch.zeros(1, 4, 2, 16, dtype=torch.bfloat16)
    out, lse = torch.empty_like(q), torch.empty(1, 4, 2)
    with pytest.raises(TypeError, match="q must be bfloat16"):
        _native.lib().attention_bf16(q.float(), q, q, out, lse)
    with pytest.raises(ValueError, match="k must have shape"):
        _native.lib().attention_bf16(q, q[..., :8].contiguous(), q, out, lse)
    with pytest.raises(ValueError, match="contiguous heads"):
        _native.lib().attention_bf16(q.transpose(1, 2).contiguous().transpose(1, 2), q, q, out, lse)
