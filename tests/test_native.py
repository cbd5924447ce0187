# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""The native CPU kernels against float64 torch: values, gradients, odd sizes, errors, threads, instruction sets.

The bound is the project's: err(kernel) <= 2 * err(plain torch in the same dtype) + 2 ulp, measured on fresh inputs.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from maetok_fast.kernels import _native, _processor

pytestmark = pytest.mark.skipif(_native.why_missing() is not None, reason=str(_native.why_missing()))

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
sizes = st.integers(1, 70)


def check(names: str, actual: Sequence[Tensor], plain: Sequence[Tensor], exact: Sequence[Tensor]) -> None:
    """Every tensor within the project's correctness rule; the ulp is that of the result or of the inputs (about 1)."""
    for name, a, p, e in zip(names.split(), actual, plain, exact, strict=True):
        assert torch.isfinite(a).all(), f"{name} was not fully written"
        if e.numel() == 0:
            continue
        scale = max(e.abs().max().item(), 1.0)
        bound = 2 * (p.double() - e).abs().max().item() + 2 * torch.finfo(a.dtype).eps * scale
        error = (a.double() - e).abs().max().item()
        assert error <= bound, f"{name}: error {error:.3g}, allowed {bound:.3g}"


def poisoned(like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    return torch.full_like(like, float("nan"), dtype=dtype, memory_format=torch.contiguous_format)


def gradients(f: Callable[..., Tensor], inputs: Sequence[Tensor], dy: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """[output, *gradients] of f with everything cast to dtype."""
    leaves = [t.detach().to(dtype).requires_grad_() for t in inputs]
    y = f(*leaves)
    return [y.detach(), *torch.autograd.grad(y, leaves, dy.to(y.dtype))]


@pytest.mark.usefixtures("instruction_set")
@settings(max_examples=40, deadline=None, database=None)
@given(
    B=st.integers(1, 3),
    N=sizes,
    D=sizes,
    kind=st.integers(0, 2),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 99),
)
def test_gate_residual(B: int, N: int, D: int, kind: int, dtype: torch.dtype, seed: int) -> None:
    torch.manual_seed(seed)
    x, branch, dy = (torch.randn(B, N, D).to(dtype) for _ in range(3))
    gate = torch.randn([(D,), (B, D), (B, N, D)][kind]).to(dtype)

    def f(x: Tensor, gate: Tensor, branch: Tensor) -> Tensor:
        return x + (gate[:, None] if kind == 1 else gate) * branch

    exact = gradients(f, (x, gate, branch), dy, torch.float64)
    plain = gradients(f, (x, gate, branch), dy, dtype)
    y, dgate, dbranch = poisoned(x), poisoned(gate), poisoned(branch)
    _native.lib().gate_residual_fwd(x, gate, branch, y, kind)
    _native.lib().gate_residual_bwd(dy, gate, branch, dbranch, dgate, kind)
    check("y dgate dbranch", (y, dgate, dbranch), [plain[i] for i in (0, 2, 3)], [exact[i] for i in (0, 2, 3)])


@pytest.mark.usefixtures("instruction_set")
@settings(max_examples=40, deadline=None, database=None)
@given(
    B=st.integers(1, 3),
    N=sizes,
    D=st.integers(5, 70),  # LayerNorm over two or three values is a step function: its gradient is all rounding error
    mode=st.sampled_from(["none", "sample", "token"]),
    affine=st.booleans(),
    offset=st.sampled_from([0.0, 1.0]),
    dtype=st.sampled_from(DTYPES),
    data=st.data(),
)
def test_adaln(
    B: int, N: int, D: int, mode: str, affine: bool, offset: float, dtype: torch.dtype, data: st.DataObject
) -> None:
    torch.manual_seed(data.draw(st.integers(0, 99)))
    T = {"none": 0, "sample": 1, "token": data.draw(st.integers(1, N))}[mode]
    x, dy = torch.randn(B, N, D).to(dtype), torch.randn(B, N, D).to(dtype)
    shift, scale = (torch.randn(B, max(T, 1), D).to(dtype) for _ in range(2))
    weight, bias = torch.randn(D).to(dtype), torch.randn(D).to(dtype)

    def f(x: Tensor, shift: Tensor, scale: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        y = F.layer_norm(x, (D,), weight if affine else None, bias if affine else None, 1e-6)
        if mode == "sample":
            y = y * (offset + scale) + shift
        elif mode == "token":
            y = torch.cat([y[:, : N - T], y[:, N - T :] * (offset + scale) + shift], 1)
        return y + 0 * (shift.sum() + scale.sum() + weight.sum() + bias.sum())

    inputs = (x, shift, scale, weight, bias)
    exact, plain = (gradients(f, inputs, dy, d) for d in (torch.float64, dtype))
    lib, mod, sample = _native.lib(), mode != "none", int(mode == "sample")
    y, moments = poisoned(x), torch.empty(B * N, 2)
    arguments = [t if keep else None for t, keep in ((shift, mod), (scale, mod), (weight, affine), (bias, affine))]
    lib.adaln_fwd(x, *arguments, y, moments, 1e-6, offset, sample, 0)
    dx, dshift, dscale = poisoned(x), poisoned(shift), poisoned(scale)
    dweight, dbias = (poisoned(weight, torch.float32) for _ in range(2))
    outs = (
        dx,
        dshift if mod else None,
        dscale if mod else None,
        dweight if affine else None,
        dbias if affine else None,
    )
    lib.adaln_bwd(dy, x, *arguments[1:], moments, *outs, offset, sample, 0)
    present = [True, True, mod, mod, affine, affine]
    names = [n for n, p in zip(["y", "dx", "dshift", "dscale", "dweight", "dbias"], present, strict=True) if p]
    check(
        " ".join(names),
        [t for t in (y, *outs) if t is not None],
        [t for t, p in zip(plain, present, strict=True) if p],
        [t for t, p in zip(exact, present, strict=True) if p],
    )


def rotate_reference(
    qkv: Tensor, rope: Tensor, weights: Tensor, *, prefix: int, first: int, queries: int, norm: int, rotated: bool
) -> Tensor:
    """q, k and v one after another over tokens, (B, Nq + 2N, H, hd), in plain torch."""
    M, hd = rope.shape[2], qkv.shape[-1]

    def half(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        if norm == 1:
            x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * w
        elif norm == 2:
            x = F.layer_norm(x, (hd,), w.to(x.dtype), b.to(x.dtype), 1e-6)
        if not rotated:
            return x
        cos, sin = (t.transpose(0, 1)[None].to(x.dtype) for t in rope)
        even, odd = x[:, prefix : prefix + M, :, 0::2], x[:, prefix : prefix + M, :, 1::2]
        turned = torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2)
        return torch.cat([x[:, :prefix], turned, x[:, prefix + M :]], 1)

    q = half(qkv[:, :, 0], weights[0], weights[1])[:, first : first + queries]
    y = torch.cat([q, half(qkv[:, :, 1], weights[2], weights[3]), qkv[:, :, 2]], 1)
    return y.to(qkv.dtype) + 0 * (rope.sum() + weights.sum()).to(qkv.dtype)


@pytest.mark.usefixtures("instruction_set")
@settings(max_examples=40, deadline=None, database=None)
@given(
    B=st.integers(1, 3),
    N=st.integers(1, 40),
    H=st.integers(1, 4),
    hd=st.sampled_from([6, 16, 34, 64, 72, 100]),
    norm=st.integers(0, 2),
    rotated=st.booleans(),
    shared=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    data=st.data(),
)
def test_rope_rotate(
    B: int, N: int, H: int, hd: int, norm: int, rotated: bool, shared: bool, dtype: torch.dtype, data: st.DataObject
) -> None:
    torch.manual_seed(data.draw(st.integers(0, 99)))
    M = data.draw(st.integers(0, N))
    prefix = data.draw(st.integers(0, N - M))
    first = data.draw(st.integers(0, N - 1))
    queries = data.draw(st.integers(1, N - first))
    qkv = torch.randn(B, N, 3, H, hd).to(dtype)
    angle = torch.randn(1 if shared else H, M, hd // 2) * 3
    rope, weights = torch.stack([angle.cos(), angle.sin()]), torch.randn(4, hd)
    options = {"prefix": prefix, "first": first, "queries": queries, "norm": norm, "rotated": rotated}
    dy = torch.randn(B, queries + 2 * N, H, hd).to(dtype)

    def f(qkv: Tensor, rope: Tensor, weights: Tensor) -> Tensor:
        return rotate_reference(qkv, rope, weights, **options)

    exact = gradients(f, (qkv, rope, weights), dy, torch.float64)
    plain = gradients(f, (qkv, rope, weights), dy, dtype)
    lib = _native.lib()
    q, k = poisoned(qkv[:, :queries, 0]), poisoned(qkv[:, :, 0])
    ws = list(weights)
    lib.rope_rotate(qkv, rope if rotated else None, *ws, None, q, k, prefix, first, norm, 1e-6)
    dqkv, drope, dweights = poisoned(qkv), poisoned(rope), poisoned(weights)
    # Gradients with strides: attention hands back (B, H, N, hd) transposed.
    dq, dk, dv = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in dy.split([queries, N, N], 1))
    lib.rope_rotate_bwd(
        qkv,
        rope if rotated else None,
        *ws,
        None,
        dq,
        dk,
        dv,
        dqkv,
        drope if rotated else None,
        dweights,
        prefix,
        first,
        norm,
        1e-6,
    )
    if not rotated:
        drope = torch.zeros_like(rope)
    y = torch.cat([q, k, qkv[:, :, 2]], 1)
    check("qk dqkv drope dweights", (y, dqkv, drope, dweights), plain, exact)


@pytest.mark.usefixtures("instruction_set")
def test_special_values_survive_the_conversions() -> None:
    values = torch.tensor([0.0, -0.0, float("inf"), -float("inf"), float("nan"), 65504.0, 6e-8, 1e-6, 1.0009765625])
    for dtype in DTYPES:
        x = values.to(dtype).repeat(5).view(1, 1, -1)
        y = poisoned(x)
        zero = torch.zeros_like(x)
        _native.lib().gate_residual_fwd(x, torch.ones_like(x), zero, y, 2)
        assert torch.equal(torch.nan_to_num(y, nan=7.0), torch.nan_to_num(x + zero, nan=7.0))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_is_to_nearest_even(dtype: torch.dtype, instruction_set: str) -> None:
    """gate * 1 with a float32 gate is stored in the other dtype: random bit patterns, and exact ties."""
    bits = torch.randint(-(2**31), 2**31 - 1, (20000,)).to(torch.int32)
    ties = torch.arange(-3000, 3000, dtype=torch.float32) * 2**-7 * (1 + 2**-9 + 2**-12)
    values = torch.cat([bits.view(torch.float32), ties, torch.arange(0, 4096) + 0.5, torch.randn(999) * 2**-16])
    one = torch.ones(1, 1, values.numel(), dtype=dtype)
    rounded = poisoned(one)
    _native.lib().gate_residual_bwd(one, values, one, rounded, None, 0)
    # the bf16 instruction of avx512bf16 (and amx) turns subnormals (below 2^-126) into zero
    subnormal = 2**-126 if dtype == torch.bfloat16 and instruction_set in ("avx512bf16", "amx") else 0.0
    torch.testing.assert_close(rounded[0, 0], values.to(dtype), rtol=0, atol=subnormal, equal_nan=True)


def test_empty_inputs() -> None:
    lib = _native.lib()
    x, gate = torch.empty(0, 4, 8), torch.randn(8)
    lib.gate_residual_fwd(x, gate, x, x.clone(), 0)
    dgate = poisoned(gate)
    lib.gate_residual_bwd(x, gate, x, x.clone(), dgate, 0)
    assert torch.equal(dgate, torch.zeros(8))
    dweight = poisoned(gate)
    lib.adaln_fwd(x, None, None, gate, None, x.clone(), torch.empty(0, 2), 1e-6, 1.0, 0, 0)
    lib.adaln_bwd(x, x, None, gate, None, torch.empty(0, 2), x.clone(), None, None, dweight, None, 1.0, 0, 0)
    assert torch.equal(dweight, torch.zeros(8))
    qkv = torch.empty(2, 0, 3, 4, 8)
    lib.rope_rotate(qkv, None, *[None] * 5, torch.empty(2, 0, 4, 8), torch.empty(2, 0, 4, 8), 0, 0, 0, 1e-6)


@pytest.mark.usefixtures("instruction_set")
def test_results_do_not_depend_on_the_number_of_threads() -> None:
    lib = _native.lib()
    x, dy, shift, scale = torch.randn(3, 129, 96), torch.randn(3, 129, 96), torch.randn(3, 1, 96), torch.randn(3, 1, 96)
    qkv, rope, grad = torch.randn(3, 129, 3, 2, 48), torch.randn(2, 1, 129, 24), torch.randn(3, 129, 2, 48)

    def outputs() -> list[Tensor]:
        moments, dx, ds, dw, dg = torch.empty(387, 2), x.clone(), shift.clone(), x[0, 0].clone(), x[0, 0].clone()
        lib.adaln_fwd(x, shift, scale, None, None, dx, moments, 1e-6, 1.0, 1, 0)
        lib.adaln_bwd(dy, x, scale, dw, None, moments, dx, ds, None, dw, None, 1.0, 1, 0)
        lib.gate_residual_bwd(dy, dw, x, None, dg, 0)
        dqkv, drope, dweights = qkv.clone(), rope.clone(), torch.empty(4, 48)
        lib.rope_rotate_bwd(qkv, rope, *[None] * 5, grad, grad, grad, dqkv, drope, dweights, 0, 0, 1, 1e-6)
        return [dx, ds, dg, dqkv, drope, dweights]

    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        first = outputs()
        torch.set_num_threads(3)
        second = outputs()
    finally:
        torch.set_num_threads(before)
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


def test_errors_name_the_argument_and_the_cure() -> None:
    lib = _native.lib()
    x, gate = torch.randn(2, 5, 8), torch.randn(8)
    with pytest.raises(ValueError, match=r"branch must be contiguous; call \.contiguous\(\)"):
        lib.gate_residual_fwd(x, gate, torch.randn(2, 8, 5).mT, x.clone(), 0)
    with pytest.raises(ValueError, match=r"gate must have shape \(8\); got \(7\)"):
        lib.gate_residual_fwd(x, torch.randn(7), x, x.clone(), 0)
    with pytest.raises(ValueError, match="gate_kind must be 0"):
        lib.gate_residual_fwd(x, gate, x, x.clone(), 3)
    with pytest.raises(TypeError, match="x must be float32, bfloat16 or float16"):
        lib.gate_residual_fwd(x.double(), gate, x, x.clone(), 0)
    with pytest.raises(TypeError, match="y must be float32 like x; got bfloat16"):
        lib.gate_residual_fwd(x, gate, x, x.bfloat16(), 0)
    with pytest.raises(ValueError, match=r"mean_rstd must have shape \(10, 2\)"):
        lib.adaln_fwd(x, None, None, None, None, x.clone(), torch.empty(9, 2), 1e-6, 1.0, 0, 0)
    with pytest.raises(ValueError, match="T = 1 with per_sample = 1"):
        lib.adaln_fwd(x, torch.randn(2, 3, 8), None, None, None, x.clone(), torch.empty(10, 2), 1e-6, 1.0, 1, 0)
    qkv, out = torch.randn(1, 4, 3, 2, 8), torch.empty(1, 4, 2, 8)
    with pytest.raises(ValueError, match=r"rope covers tokens 2\.\.6, outside the 4"):
        lib.rope_rotate(qkv, torch.randn(2, 2, 4, 4), *[None] * 5, out, out.clone(), 2, 0, 0, 1e-6)
    with pytest.raises(ValueError, match=r"queries 3\.\.7 are outside the 4 tokens"):
        lib.rope_rotate(qkv, None, *[None] * 5, out, out.clone(), 0, 3, 0, 1e-6)


PROBE = """
import torch
from maetok_fast.kernels import _native
lib = _native.lib()
loaded = sorted({l.split()[-1] for l in open("/proc/self/maps") if "libgomp" in l or "libomp" in l or "libiomp" in l})
torch.set_num_threads(1)
x = torch.randn(4, 256, 768)
y = torch.empty_like(x)
def tasks():
    import os
    return len(os.listdir("/proc/self/task"))
lib.gate_residual_fwd(x, x, x, y, 2)
one = tasks()
torch.set_num_threads(2)
torch.add(x, x)
torch.randn(400, 400) @ torch.randn(400, 400)
two = tasks()
lib.gate_residual_fwd(x, x, x, y, 2)
print(lib.cpu_variant(), len([n for n in loaded if "gomp" in n]), tasks() - two)
"""


def run_probe(code: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **environment}, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_one_openmp_runtime_and_no_second_pool() -> None:
    variant, runtimes, new_threads = run_probe(PROBE).split()
    assert variant in (*_processor.LEVELS, "generic")
    assert runtimes == "1", "the native library brought a second libgomp"
    assert new_threads == "0", "a native kernel started threads of its own beside torch's"
