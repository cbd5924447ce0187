# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""What is special about rope_attention: the table, the layouts of the three models, random shapes, and its errors."""

from __future__ import annotations

import math
import sys
import types
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from maetok_fast.kernels import (
    BackendError,
    _dispatch,
    _native,
    backend,
    rope_attention,
    rope_attention_ref,
    rope_table,
)
from maetok_fast.kernels import _rope_attention_libraries as libraries
from maetok_fast.kernels import rope_attention as op
from maetok_fast.kernels._registration import compute, compute_backward
from maetok_fast.positions import axial_frequencies, grid_positions


def grid(height: int, width: int) -> torch.Tensor:
    n = torch.arange(height * width)
    return torch.stack((n % width, n // width), 1)


def complex_rotation(x: torch.Tensor, angle: torch.Tensor) -> torch.Tensor:
    """x (B, M, heads, head_dim) rotated by angle (heads, M, head_dim / 2), written with complex numbers."""
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
    turned = pairs * torch.polar(torch.ones_like(angle), angle).transpose(0, 1)
    return torch.view_as_real(turned).flatten(-2)


def naive(qkv: torch.Tensor, angle: torch.Tensor, prefix: int) -> torch.Tensor:
    """softmax(q k^T / sqrt(d)) v with the image tokens rotated, one step at a time."""
    q, k, v = qkv.unbind(2)
    stop = prefix + angle.shape[1]
    q, k = (torch.cat((t[:, :prefix], complex_rotation(t[:, prefix:stop], angle), t[:, stop:]), 1) for t in (q, k))
    weights = torch.einsum("bnhd,bmhd->bhnm", q, k).div(math.sqrt(qkv.shape[-1])).softmax(-1)
    return torch.einsum("bhnm,bmhd->bnhd", weights, v).flatten(2)


def test_mixed_frequencies_against_complex_numbers() -> None:
    torch.manual_seed(1)
    heads, head_dim, pos = 3, 16, grid(3, 5)
    freqs = torch.randn(2, heads, head_dim // 2, dtype=torch.float64, requires_grad=True)
    qkv = torch.randn(2, 1 + 15 + 4, 3, heads, head_dim, dtype=torch.float64, requires_grad=True)
    table = rope_table(freqs, pos)
    assert table.shape == (2, heads, 15, head_dim // 2)
    angle = pos[:, 0, None] * freqs[0].unsqueeze(1) + pos[:, 1, None] * freqs[1].unsqueeze(1)
    ours, theirs = rope_attention(qkv, table, prefix=1), naive(qkv, angle, 1)
    torch.testing.assert_close(ours, theirs)
    cotangent = torch.randn_like(ours)
    for a, b in zip(*(torch.autograd.grad(o, (freqs, qkv), cotangent) for o in (ours, theirs))):
        torch.testing.assert_close(a, b)


def test_table_of_all_layers_at_once_is_each_layers_table() -> None:
    freqs, pos = torch.randn(2, 4, 3, 8), grid(2, 3)
    tables = rope_table(freqs, pos)
    assert tables.shape == (4, 2, 3, 6, 8)
    for layer in range(4):
        torch.testing.assert_close(tables[layer], rope_table(freqs[:, layer], pos), rtol=0, atol=0)


def test_table_stays_fp32_under_autocast_and_for_half_frequencies() -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert rope_table(torch.randn(2, 1, 4), grid(2, 2)).dtype == torch.float32
    assert rope_table(torch.randn(2, 1, 4).bfloat16(), grid(2, 2)).dtype == torch.float32


def test_axial_layouts_are_mixed_with_zeros() -> None:
    """MAETok's axial: first half of the pairs x, second y. LightningDiT's: first half rows, second columns."""
    pos, quarter = grid(4, 4), 4
    f = 10.0 ** -torch.arange(quarter).div(quarter)
    zero = torch.zeros(quarter)
    maetok = rope_table(torch.stack((torch.cat((f, zero)), torch.cat((zero, f))))[:, None], pos)
    lightning = rope_table(torch.stack((torch.cat((zero, f)), torch.cat((f, zero))))[:, None], pos)
    torch.testing.assert_close(maetok[0, 0, :, :quarter], (pos[:, 0, None] * f).cos())
    torch.testing.assert_close(maetok[1, 0, :, quarter:], (pos[:, 1, None] * f).sin())
    torch.testing.assert_close(lightning[0, 0, :, :quarter], (pos[:, 1, None] * f).cos())


def test_attention_depends_on_relative_positions_only() -> None:
    qkv = torch.randn(1, 12, 3, 2, 16)
    freqs, pos = torch.randn(2, 2, 8), grid(3, 4)
    here, moved = (rope_attention(qkv, rope_table(freqs, p)) for p in (pos, pos + torch.tensor([5, -2])))
    torch.testing.assert_close(here, moved, rtol=1e-4, atol=1e-4)


def test_pruned_queries_are_rows_of_the_whole() -> None:
    qkv = torch.randn(2, 30, 3, 2, 64)
    table = rope_table(torch.randn(2, 2, 32), grid(4, 5))
    whole = rope_attention(qkv, table, prefix=1)
    latents = rope_attention(qkv, table, prefix=1, first_query=21)
    image = rope_attention(qkv, table, prefix=1, first_query=1, num_queries=20)
    torch.testing.assert_close(latents, whole[:, 21:], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(image, whole[:, 1:21], rtol=1e-5, atol=1e-5)


def test_lightningdits_axial_layout() -> None:
    """head_dim 72 = 36 of rows, then 36 of columns, 18 frequencies each, theta 1e4, all tokens, RMS norm before it."""
    torch.manual_seed(2)
    heads, frequencies = 3, 10000.0 ** -(torch.arange(18).double() * 2 / 36)
    qkv, weight = torch.randn(1, 20, 3, heads, 72).double(), 1 + 0.1 * torch.randn(72).double()
    rows, columns = torch.meshgrid(torch.arange(4).double(), torch.arange(5).double(), indexing="ij")
    angle = torch.cat((rows.reshape(-1, 1) * frequencies, columns.reshape(-1, 1) * frequencies), 1)
    table = rope_table(axial_frequencies(18, 10000.0, "y").double(), grid_positions((4, 5)))
    torch.testing.assert_close(table[0, 0], angle.cos(), rtol=1e-6, atol=1e-6)
    normed = qkv.clone()
    normed[:, :, :2] *= weight / (qkv[:, :, :2].square().mean(-1, keepdim=True) + 1e-6).sqrt()
    ours = rope_attention(qkv, table, weight, None, weight, qk_norm="rms")
    torch.testing.assert_close(ours, naive(normed, angle.expand(heads, -1, -1), 0), rtol=1e-5, atol=1e-5)


def test_maetok_counts_tokens_at_every_size() -> None:
    """The corner token of 32 x 32 is (31, 31)."""
    assert grid_positions((32, 32))[-1].tolist() == [31, 31]


def test_dropped_tokens_keep_their_rows() -> None:
    """Attention over a subset of the image tokens, each with the angle of its own place, and the sum of the gradients
    of a table row over the images (and tokens) that used it."""
    torch.manual_seed(3)
    pos, freqs = grid(3, 4), torch.randn(2, 2, 8, dtype=torch.float64)
    qkv = torch.randn(3, 1 + 5 + 2, 3, 2, 16, dtype=torch.float64, requires_grad=True)
    table = rope_table(freqs, pos).requires_grad_()
    index = torch.stack([torch.randperm(12)[:5] for _ in range(3)])
    index[0, 1] = index[0, 0]  # twice in one image: allowed
    ours = rope_attention(qkv, table, prefix=1, index=index)
    angle = pos[:, 0, None] * freqs[0].unsqueeze(1) + pos[:, 1, None] * freqs[1].unsqueeze(1)
    theirs = torch.cat([naive(qkv[b : b + 1], angle[:, index[b]], 1) for b in range(3)])
    torch.testing.assert_close(ours, theirs)
    cotangent = torch.randn_like(ours)
    (whole,) = torch.autograd.grad(ours, table, cotangent, retain_graph=True)
    parts = torch.zeros_like(whole)
    for b in range(3):  # with a table of its own per image, in its order
        own = table.detach()[:, :, index[b]].requires_grad_()
        out = rope_attention(qkv[b : b + 1].detach(), own, prefix=1)
        parts.index_add_(2, index[b], torch.autograd.grad(out, own, cotangent[b : b + 1])[0])
    torch.testing.assert_close(whole, parts)


@pytest.mark.skipif(_native.why_missing() is not None, reason=str(_native.why_missing()))
def test_native_gradients_of_repeated_rows_do_not_depend_on_threads() -> None:
    qkv, table = torch.randn(5, 70, 3, 2, 48), torch.randn(2, 2, 9, 24)
    index = torch.randint(0, 9, (5, 60))
    results, theirs = [], []
    threads = torch.get_num_threads()
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            leaves = [qkv.clone().requires_grad_(), table.clone().requires_grad_()]
            with backend("native"):
                out = rope_attention(*leaves, prefix=4, index=index)
            results.append(torch.autograd.grad(out.square().sum(), leaves))
            leaf = qkv.clone().requires_grad_()
            out = torch.nn.functional.scaled_dot_product_attention(*leaf.permute(2, 0, 3, 1, 4))
            theirs.append(torch.autograd.grad(out.square().sum(), leaf)[0])
    finally:
        torch.set_num_threads(threads)
    # between our rows lies torch's attention, whose products MKL makes otherwise for 3 threads than for 1 where it is
    # held to AVX2 on an Intel processor
    if torch.equal(*theirs):
        for a, b in zip(*results):
            assert torch.equal(a, b)
    exact = [x.double().requires_grad_() for x in (qkv, table)]
    out = rope_attention_ref(*exact, prefix=4, index=index)
    for a, b in zip(results[0], torch.autograd.grad(out.square().sum(), exact)):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-4)


def test_wrong_indices_are_named() -> None:
    qkv, table = torch.randn(2, 6, 3, 1, 8), torch.randn(2, 1, 4, 4)
    with pytest.raises(ValueError, match=r"index must be \(B, M\) with B = 2, got \(3, 2\)"):
        rope_attention(qkv, table, index=torch.zeros(3, 2, dtype=torch.long))
    with pytest.raises(ValueError, match="index names rows of rope, and there is no rope"):
        rope_attention(qkv, index=torch.zeros(2, 2, dtype=torch.long))
    with pytest.raises(ValueError, match="7 rotated tokens after a prefix of 0 do not fit in 6 tokens"):
        rope_attention(qkv, table, index=torch.zeros(2, 7, dtype=torch.long))
    with pytest.raises(TypeError, match="index"):
        rope_attention(qkv, table, index=torch.zeros(2, 2))
    for bad in (4, -1):
        with pytest.raises(IndexError):
            rope_attention(qkv, table, index=torch.full((2, 2), bad))


def test_the_output_is_nobodys_view() -> None:
    """torch refuses in-place operations on a view that is one of several outputs."""
    for dtype in (torch.float32, torch.bfloat16):
        out = rope_attention(torch.randn(1, 5, 3, 2, 16, dtype=dtype, requires_grad=True))
        out.add_(1)
        assert not out._is_view()


# ---- libraries, none of which runs here: fakes with their documented signatures ------------------------------------


def fake_libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
        assert q.stride(-1) == k.stride(-1) == v.stride(-1) == 1
        weights = torch.einsum("bnhd,bmhd->bhnm", q, k).mul(scale).softmax(-1)
        return torch.einsum("bhnm,bmhd->bnhd", weights, v)

    flash = types.ModuleType("flash_attn")
    flash.flash_attn_func = lambda q, k, v, softmax_scale: attention(q, k, v, softmax_scale)  # type: ignore[attr-defined]
    xformers, ops = types.ModuleType("xformers"), types.ModuleType("xformers.ops")
    ops.memory_efficient_attention = lambda q, k, v, scale: attention(q, k, v, scale)  # type: ignore[attr-defined]
    for name, module in (("flash_attn", flash), ("xformers", xformers), ("xformers.ops", ops)):
        monkeypatch.setitem(sys.modules, name, module)


@pytest.mark.parametrize("rows", ["triton", "torch"])
@pytest.mark.parametrize("name", ["flash_attn", "xformers", "sdpa"])
def test_library_backends(name: str, rows: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Value and gradients of the launchers, with the rotation by row kernels and by plain torch."""
    fake_libraries(monkeypatch)
    if rows == "torch":
        monkeypatch.setattr(libraries, "why_no_triton", lambda device: "not now")
    elif libraries.why_no_triton("cpu") is not None:
        pytest.skip(str(libraries.why_no_triton("cpu")))
    for sample in op.samples:
        if sample.real or "head_dim 72, no" in sample.label:
            continue
        torch.manual_seed(4)
        a = op.arguments(**sample.make(lambda *s, dtype=torch.float32: torch.randn(*s).to(dtype)))
        asked = op.asked(a)
        exact = [v.double().requires_grad_() if n else v for v, n in zip(a, asked)]
        out = rope_attention_ref(*exact)
        cotangent = torch.randn_like(out)
        wanted = torch.autograd.grad(out, [v for v, n in zip(exact, asked) if n], cotangent)
        with torch._C._AutoDispatchBelowAutograd():  # as in the body of a custom op
            ours = compute(op, name, a)
            grads = compute_backward(op, name, a, ours, [cotangent.float()], asked)
        for x, y in zip((ours.y, *[g for g, n in zip(grads, asked) if n]), (out, *wanted)):
            assert (x.double() - y).abs().max() <= 2e-5 * (1 + y.abs().max()), sample.label


def test_sdpa_through_the_op() -> None:
    """The whole way, on the CPU: schema, fake, autograd."""
    qkv, table = torch.randn(2, 9, 3, 2, 16, requires_grad=True), torch.randn(2, 2, 6, 8, requires_grad=True)
    with backend("sdpa"):
        out = rope_attention(qkv, table, prefix=1, first_query=2)
        torch.library.opcheck(op._forward_op, ("sdpa", *op.arguments(qkv, table, prefix=1)))
    plain = rope_attention_ref(qkv, table, prefix=1, first_query=2)
    torch.testing.assert_close(out, plain, rtol=1e-5, atol=1e-5)
    for a, b in zip(*(torch.autograd.grad(o.square().sum(), (qkv, table)) for o in (out, plain))):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_libraries_say_why_not_and_come_in_an_order_by_tokens() -> None:
    qkv = torch.randn(1, 4, 3, 1, 16)
    with backend("flash_attn"), pytest.raises(BackendError, match="flash_attn runs on CUDA tensors, these are on cpu"):
        rope_attention(qkv)
    assert "16 bits" in str(op.unsupported("flash_attn", op.arguments(qkv)))
    odd = op.arguments(torch.zeros(1, 4, 3, 1, 20, dtype=torch.bfloat16))
    for name in ("flash_attn", "xformers"):
        assert "multiples of 8" in str(op.unsupported(name, odd))
    short, long = (
        [b.name for b in _dispatch.ordered(op, "cuda", op.arguments(torch.zeros(1, n, 3, 1, 16)))] for n in (128, 1024)
    )
    assert short[:2] == ["triton", "sdpa"]
    assert long[:2] == ["triton", "flash_attn"]


def test_a_batch_beyond_a_cuda_grid_is_no_backend_s() -> None:
    """The libraries put batch and heads into the same dimensions of a grid as Triton's kernels do."""
    for shape in ((65536, 8, 3, 1, 64), (1, 8, 3, 65536, 16)):
        a = op.arguments(torch.empty(shape, dtype=torch.bfloat16, device="meta"))
        for b in op.cuda:
            assert "exceeds a CUDA grid" in str(op.unsupported(b.name, a)), b.name


@pytest.mark.parametrize(("name", "module"), [("flash_attn", "flash_attn"), ("xformers", "xformers.ops")])
def test_a_library_without_the_function_is_no_library(name: str, module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What an uninstall leaves is a folder that imports."""
    for part in ("flash_attn", "xformers", "xformers.ops", "xformers._cpp_lib"):
        monkeypatch.setitem(sys.modules, part, types.ModuleType(part))
    _dispatch._why_no_package.cache_clear()
    assert f"the {module} that imports has no" in str(_dispatch.why_missing(name, "cuda"))
    _dispatch._why_no_package.cache_clear()


def test_the_order_is_no_graph_break(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on CUDA, where several backends are asked: here only sdpa can answer, or Triton's interpreter."""
    monkeypatch.setattr(op, "cpu", op.cuda)
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: rope_attention(x) * 2, fullgraph=True, backend="aot_eager")
    qkv = torch.randn(1, 6, 3, 2, 16)
    torch.testing.assert_close(compiled(qkv), rope_attention_ref(qkv) * 2, rtol=1e-5, atol=1e-5)


shapes = st.fixed_dictionaries(
    {
        "batch": st.integers(1, 3),
        "prefix": st.integers(0, 2),
        "rotated": st.integers(0, 9),
        "latents": st.integers(0, 5),
        "heads": st.integers(1, 3),
        "head_dim": st.sampled_from([2, 6, 16, 24, 64, 72, 96]),
        "shared": st.booleans(),
        "gathered": st.booleans(),
        "norm": st.sampled_from(["none", "rms", "layer"]),
        "dtype": st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
        "seed": st.integers(0, 2**31),
    }
)


def draw(case: dict[str, Any], data: st.DataObject) -> dict[str, Any]:
    torch.manual_seed(case["seed"])
    n = max(1, case["prefix"] + case["rotated"] + case["latents"])
    args: dict[str, Any] = {"qkv": torch.randn(case["batch"], n, 3, case["heads"], case["head_dim"]).to(case["dtype"])}
    if case["rotated"]:
        rows = case["rotated"] + 3 * case["gathered"]
        angle = torch.randn(1 if case["shared"] else case["heads"], rows, case["head_dim"] // 2)
        args |= {"rope": torch.stack((angle.cos(), angle.sin())), "prefix": case["prefix"]}
        if case["gathered"]:
            args["index"] = torch.randint(0, rows, (case["batch"], case["rotated"]))
    first = data.draw(st.integers(0, n - 1))
    args |= {"qk_norm": case["norm"], "first_query": first, "num_queries": data.draw(st.integers(1, n - first))}
    if case["norm"] != "none":
        args |= {"q_weight": torch.randn(case["head_dim"]), "k_weight": torch.randn(case["head_dim"])}
    return args


def check(args: dict[str, Any], name: str) -> None:
    exact = rope_attention_ref(
        **{k: v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for k, v in args.items()}
    )
    with backend("reference"):
        plain = rope_attention(**args)
    with backend(name):
        ours = rope_attention(**args)
    bound = 2 * (plain.double() - exact).abs().max() + 2 * torch.finfo(ours.dtype).eps * exact.abs().max()
    assert (ours.double() - exact).abs().max() <= bound


@pytest.mark.skipif(_native.why_missing() is not None, reason=str(_native.why_missing()))
@given(case=shapes, data=st.data())
@settings(max_examples=80, deadline=None, derandomize=True)
def test_native_on_random_shapes(case: dict[str, Any], data: st.DataObject) -> None:
    check(draw(case, data), "native")


@given(case=shapes.filter(lambda c: c["head_dim"] >= 16), data=st.data())
@settings(max_examples=12, deadline=None, derandomize=True)
def test_triton_on_random_shapes(case: dict[str, Any], data: st.DataObject) -> None:
    from maetok_fast.kernels._triton import why_no_triton

    if why_no_triton("cpu") is not None:
        pytest.skip(str(why_no_triton("cpu")))
    check(draw(case, data), "triton")


QKV = torch.zeros(2, 10, 3, 4, 8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"qkv": torch.zeros(2, 10, 2, 4, 8)}, r"qkv must be \(B, N, 3, heads, head_dim\), got \(2, 10, 2, 4, 8\)"),
        (
            {"rope": torch.zeros(2, 3, 9, 4)},
            r"rope must be \(2, heads, R, F\) or \(2, 1, R, F\) with heads = 4, got \(2, 3, 9, 4\)",
        ),
        (
            {"rope": torch.zeros(2, 4, 9, 3)},
            r"rope \(2, 4 or 1, M, head_dim / 2\), got head_dim 8 and rope \(2, 4, 9, 3\)",
        ),
        (
            {"rope": torch.zeros(2, 4, 9, 4), "prefix": 2},
            "9 rotated tokens after a prefix of 2 do not fit in 10 tokens",
        ),
        ({"qk_norm": "l2"}, "qk_norm must be one of none, rms, layer, got 'l2'"),
        ({"q_weight": torch.ones(8)}, "q_weight has no meaning with qk_norm='none'"),
        ({"qk_norm": "rms", "k_bias": torch.ones(8)}, "k_bias has no meaning with qk_norm='rms'"),
        (
            {"qk_norm": "layer", "q_weight": torch.ones(4)},
            r"q_weight must be \(head_dim,\) .* = 8, got \(4,\)",
        ),
        ({"first_query": 4, "num_queries": 7}, "queries 4 .. 11 are not within 10 tokens"),
        (
            {"qkv": torch.zeros(1, 2, 3, 1, 5), "rope": torch.zeros(2, 1, 1, 2)},
            "must be even .* got head_dim 5",
        ),
    ],
)
def test_wrong_inputs_are_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rope_attention(**({"qkv": QKV} | change))


def test_head_dims_that_kernels_do_not_take_use_the_reference() -> None:
    for head_dim in (1, 7, 514):
        qkv = torch.randn(1, 3, 3, 2, head_dim)
        out = rope_attention(qkv, qk_norm="layer")
        torch.testing.assert_close(out, rope_attention_ref(qkv, qk_norm="layer"), rtol=0, atol=0)
        assert "head_dim" in (rope_attention.reason(qkv)["native"] or "head_dim: no native library")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("keys", [3, 8, 33])
@pytest.mark.parametrize("value", [float("inf"), -float("inf"), float("nan")])
def test_what_is_not_finite_stays_so(value: float, keys: int, dtype: torch.dtype) -> None:
    """torch's CPU attention makes finite numbers of infinite scores in 16 bits, and of NaN in short rows."""
    for part in range(3):
        qkv = torch.randn(1, keys, 3, 2, 64)
        qkv[0, 1, part, 0, 5] = value
        q, k, v = qkv.double().transpose(1, 3).unbind(2)
        exact = ((q @ k.mT / 8).softmax(-1) @ v).transpose(1, 2).flatten(2)
        assert torch.equal(rope_attention(qkv.to(dtype)).isfinite(), exact.isfinite()), part


def test_one_head_with_an_arbitrary_stride() -> None:
    qkv = torch.randn(1, 2, 33, 3, 64, dtype=torch.bfloat16).permute(1, 2, 3, 0, 4)
    torch.testing.assert_close(rope_attention(qkv), rope_attention_ref(qkv), rtol=2e-2, atol=2e-2)


def test_wrong_frequencies_are_named() -> None:
    with pytest.raises(ValueError, match=r"freqs must be \(2, heads, F\)"):
        rope_table(torch.zeros(3, 4, 5), grid(2, 2))
    with pytest.raises(ValueError, match=r"pos must be \(M, 2\)"):
        rope_table(torch.zeros(2, 1, 5), torch.zeros(4))
    with pytest.raises(TypeError, match=r"floating-point tensor as qkv, got torch.int64"):
        rope_attention(torch.zeros(1, 2, 3, 1, 8, dtype=torch.long))
