# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""The adaLN family beyond the generic suite: mixed dtypes, what autocast makes of the layers, the fused pair against
the two ops, definitions against naive formulas, errors in words."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from maetok_fast.kernels import (
    _dispatch,
    adaln,
    adaln_ref,
    backend,
    bias_gelu,
    gate_residual,
    ops,
    residual_adaln,
    swiglu,
)
from maetok_fast.layers import LayerNorm, Mlp, RMSNorm, SwiGLU
from maetok_fast.models import SiT, SiTConfig

BACKENDS = ("native", "triton")
MIXED = ("gate_residual", "adaln", "residual_adaln")


def forced(name: str) -> contextlib.AbstractContextManager[Any]:
    reason = _dispatch.why_missing(name, "cpu")
    if reason is not None:
        pytest.skip(f"{name}: {reason}")
    return backend(name)


def inputs(name: str, dtype: torch.dtype, low: torch.dtype) -> dict[str, Any]:
    """x in `dtype`, every tensor that the op reads uncast in `low`, affine in fp32."""
    x = torch.randn(2, 5, 33, dtype=dtype)
    vector, image, tokens = torch.randn(33), torch.randn(2, 33).to(low), torch.randn(2, 5, 33).to(low)
    args = {"x": x, "gate": image, "branch": tokens} if name != "adaln" else {"x": x}
    if name != "gate_residual":
        args |= {"shift": image.flip(0), "scale": image.flip(1), "weight": vector, "bias": vector.flip(0)}
        args |= {"out_dtype": str(low)[6:]}
    return args


def run(name: str, args: dict[str, Any]) -> dict[str, Tensor]:
    """Outputs and gradients; the cotangents have the outputs' dtypes."""
    leaves = {k: v.clone().requires_grad_() if isinstance(v, Tensor) else v for k, v in args.items()}
    outs = ops()[name](**leaves)
    outs = outs if isinstance(outs, tuple) else (outs,)
    generator = torch.Generator().manual_seed(7)
    cotangents = [torch.randn(o.shape, generator=generator).bfloat16().to(o) for o in outs]
    given = {k: v for k, v in leaves.items() if isinstance(v, Tensor)}
    grads = torch.autograd.grad(outs, list(given.values()), cotangents)
    found = {f"out{i}": o.detach() for i, o in enumerate(outs)} | {f"d_{k}": g for k, g in zip(given, grads)}
    return found


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("name", MIXED)
@pytest.mark.parametrize("by", BACKENDS)
def test_mixed_dtypes_are_read_and_written_as_they_are(by: str, name: str, low: torch.dtype) -> None:
    """An fp32 residual stream with 16-bit branch, gate and modulation, and a 16-bit y: the suite's rule holds."""
    args = inputs(name, torch.float32, low)
    exact = run(name, {k: v.double() if isinstance(v, Tensor) else v for k, v in args.items()})
    with backend("reference"):
        plain = run(name, args)
    with forced(by):
        got = run(name, args)
    for key, reference in exact.items():
        assert got[key].dtype == plain[key].dtype, key
        error, allowed = ((v[key].double() - reference.double()).abs().max().item() for v in (got, plain))
        ulp = torch.finfo(got[key].dtype).eps * reference.abs().max().item()
        assert error <= 2 * allowed + 2 * ulp, key
    assert got["out0"].dtype == (torch.float32 if name != "adaln" else low)
    for key in args:
        if isinstance(args[key], Tensor):
            assert got[f"d_{key}"].dtype == args[key].dtype, key


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("by", BACKENDS)
def test_the_fused_pair_equals_the_two_ops(by: str, dtype: torch.dtype) -> None:
    """h is rounded before it is normed: not only close but the same."""
    pair_equals_two_ops(by, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=lambda d: str(d)[6:])
def test_the_native_pair_equals_the_two_ops_on_every_instruction_set(dtype: torch.dtype, instruction_set: str) -> None:
    """The compiler contracts x + gate * branch in neither kernel or in both (setup.py: -ffp-contract=off)."""
    pair_equals_two_ops("native", dtype)


def pair_equals_two_ops(by: str, dtype: torch.dtype) -> None:
    x, branch = torch.randn(2, 5, 48, dtype=dtype), torch.randn(2, 5, 48, dtype=dtype)
    gate, shift, scale = torch.randn(3, 2, 48, dtype=dtype)
    with forced(by):
        for norm in ("layer", "rms"):
            h, y = residual_adaln(x, branch, gate, shift, scale, norm=norm)
            apart = gate_residual(x, gate, branch)
            assert torch.equal(h, apart)
            assert torch.equal(y, adaln(apart, shift, scale, norm=norm))
        h, _ = residual_adaln(x, branch)
        assert torch.equal(h, x + branch)


@pytest.mark.parametrize("by", ["reference", *BACKENDS])
def test_rms_against_its_formula(by: str) -> None:
    x, w, shift, scale = torch.randn(2, 3, 20), torch.randn(20), torch.randn(2, 20), torch.randn(2, 20)
    with forced(by) if by != "reference" else backend(by):
        got = adaln(x, shift, scale, w, eps=1e-5, norm="rms")
    d = x.double()
    plain = d / (d.square().mean(-1, keepdim=True) + 1e-5).sqrt() * w
    torch.testing.assert_close(got, (plain * (1 + scale[:, None]) + shift[:, None]).float())


def test_out_dtype_rounds_once() -> None:
    x, shift = torch.randn(2, 3, 16), torch.randn(2, 16)
    low = adaln(x, shift, shift, out_dtype="bfloat16")
    assert low.dtype == torch.bfloat16
    assert torch.equal(low, adaln(x, shift, shift).bfloat16())
    assert adaln(x.bfloat16(), out_dtype="float32").dtype == torch.float32


@pytest.mark.parametrize("norm", [LayerNorm(16), RMSNorm(16)], ids=["layer", "rms"])
def test_norms_write_what_a_linear_reads(norm: LayerNorm | RMSNorm) -> None:
    """Under autocast: y in its dtype, h in x's, the same values as a rounding behind; outside: x's dtype."""
    x, branch, gate = torch.randn(2, 3, 16), torch.randn(2, 3, 16).bfloat16(), torch.randn(16)
    plain = norm(x)
    assert plain.dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(norm(x), plain.bfloat16())
        h, y = norm.after(x, branch, gate)
    assert (h.dtype, y.dtype) == (torch.float32, torch.bfloat16)
    assert torch.equal(h, gate_residual(x, gate, branch))


def test_a_training_step_under_autocast_matches_fp32() -> None:
    """The whole way: bf16 gradients of y, fp32 residual stream and parameters."""
    model = SiT(SiTConfig(tokens=8, channels=4, dim=32, depth=2, heads=2, num_classes=3, label_dropout=0.0))
    for p in model.parameters():
        if p.requires_grad and not p.any():
            torch.nn.init.normal_(p, std=0.1)
    x, t, y = torch.randn(2, 8, 4), torch.rand(2), torch.tensor([0, 2])
    parameters = [p for p in model.parameters() if p.requires_grad]
    exact = torch.autograd.grad(model(x, t, y).square().mean(), parameters)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(x, t, y).square().mean()
    for got, want in zip(torch.autograd.grad(loss, parameters), exact):
        assert got.dtype == torch.float32
        assert (got - want).norm() <= 0.05 * want.norm() + 1e-6


@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_activations_of_the_layers_are_torchs(approximate: str) -> None:
    mlp, glu, x = Mlp(16, 40, approximate), SwiGLU(16, 24), torch.randn(2, 3, 16)
    torch.testing.assert_close(mlp(x), mlp.fc2(F.gelu(mlp.fc1(x), approximate=approximate)))
    a, b = glu.w12(x).chunk(2, -1)
    torch.testing.assert_close(glu(x), glu.w3(F.silu(a) * b))


@pytest.mark.parametrize("by", BACKENDS)
def test_activations_at_the_ends_of_the_range(by: str) -> None:
    """Far out the activations are 0 or v itself, and nothing overflows on the way."""
    far = torch.tensor([1e4, 300.0, 90.0, 40.0, -40.0, -90.0, -300.0, -1e4, 0.0, float("nan"), float("inf")])
    want = torch.where(far < 0, 0.0, far)
    with forced(by):
        for got in (bias_gelu(far), bias_gelu(far, None, "tanh"), swiglu(torch.cat([far, torch.ones(11)]))):
            torch.testing.assert_close(got, want, equal_nan=True, rtol=0, atol=1e-12)
        leaf = far[:9].clone().requires_grad_()
        (slope,) = torch.autograd.grad(bias_gelu(leaf, None, "tanh").sum(), leaf)
        torch.testing.assert_close(slope, torch.tensor([1.0] * 4 + [0.0] * 4 + [0.5]), rtol=0, atol=1e-12)


def test_errors_say_what_to_do() -> None:
    x = torch.zeros(2, 3, 8)
    with pytest.raises(ValueError, match=r"adaln: norm must be 'layer' or 'rms', got 'batch'"):
        adaln(x, norm="batch")
    with pytest.raises(ValueError, match=r"residual_adaln: out_dtype must be one of .*'bfloat16'.*got 'bf16'"):
        residual_adaln(x, x, out_dtype="bf16")
    with pytest.raises(ValueError, match=r"residual_adaln: gate must be \(D,\) or \(B, D\) with .*, got \(2, 3, 8\)"):
        residual_adaln(x, x, x)
    with pytest.raises(ValueError, match=r"residual_adaln: branch must be .B, N, D. with B = 2, N = 3, D = 8"):
        residual_adaln(x, x[:, 1:])
    with pytest.raises(ValueError, match=r"bias_gelu: bias must be \(D,\) with D = 8"):
        bias_gelu(x, torch.zeros(7))
    with pytest.raises(ValueError, match=r"bias_gelu: approximate must be 'none' or 'tanh', got 'erf'"):
        bias_gelu(x, None, "erf")
    with pytest.raises(ValueError, match=r"swiglu: x must be \(\.\.\., 2H\), its last dimension even"):
        swiglu(x[..., :7])
    assert adaln_ref(x).shape == x.shape
