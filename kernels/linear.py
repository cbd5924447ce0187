# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""linear: y = act(x W^T + b), differentiable: the linear layers of a training step on a CPU.

    forward    u = x W^T + b,  y = act(u)                     one product, u and y written by its epilogue
    backward   du = dy act'(u), db = sum du                   one pass (csrc/cpu/activation.cpp)
               dx = du W,  dW = du^T x                        two products, operands transposed while they are packed

All three are the packed GEMM of csrc/cpu/gemm.cpp, which packs W block by block in the cache where it multiplies.
Saved are x, W and, with an activation, u; y is not. Sums in fp32 over blocks of 384, in an order that depends on no
thread. On AMX the operands are pairs of bf16 where x is bf16, else fp32 whatever x is, so that neither x nor W is
rounded on its way.

Whether that beats torch depends on the processor: MKL lays fp32 operands out as well as this on Intel's, and is half as
fast on AMD's. `pays` says which to take, by a race at the first training step of each shape (`_tune`).

On CUDA this op has no kernels: cuBLAS makes these products, `bias_gelu` and `swiglu` what follows them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _native, _processor, _tune
from ._dispatch import autocasts, transformed
from ._gemm import ACTS, Panels, multiply
from ._op import Op
from ._record import Backend, Sample

__all__ = ["linear", "linear_ref", "pays"]

_ROWS = 128  # fewer than that never pay for the packing of W

_ACTS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda u: u,
    "gelu": F.gelu,
    "gelu_tanh": lambda u: F.gelu(u, approximate="tanh"),
    "silu": F.silu,
}


def linear_ref(x: Tensor, weight: Tensor, bias: Tensor | None = None, act: str = "none") -> Tensor:
    """act(x weight^T + bias).

    x (..., in), weight (out, in), bias (out,) or None: bf16, fp16 or fp32 (fp64: reference only); under autocast in its
    dtype, as torch's linear. act: "none", "gelu" (erf), "gelu_tanh" or "silu". Returns (..., out), their widest dtype.
    Raises ValueError when shapes do not fit or act is unknown.
    """
    return _ACTS[act](F.linear(x, weight, bias))


def pays(x: Tensor, weight: Tensor, act: str) -> bool:
    """Whether `linear(x, weight, bias, act)` trains faster than torch on this machine: x (..., in), weight (out, in).

    Never off the CPU, without gradients, under torch.compile (Inductor has its own) or for few rows.
    """
    if x.device.type != "cpu" or not torch.is_grad_enabled() or torch.compiler.is_compiling() or transformed((x,)):
        return False
    rows = x.numel() // max(1, x.shape[-1])
    if rows < _ROWS or _native.why_missing() is not None:
        return False
    dtype = x.dtype
    if dtype == torch.float32 and autocasts("cpu"):
        dtype = torch.get_autocast_dtype("cpu")
    if dtype not in (torch.float32, torch.bfloat16):
        return False
    rows = min(4096, 1 << (rows.bit_length() - 1))
    return _race(rows, *weight.shape, dtype, act, torch.get_num_threads()) == "native"


@functools.cache
def _race(rows: int, outer: int, inner: int, dtype: torch.dtype, act: str, threads: int) -> str:
    """The faster of a forward and backward of the op and of torch's, "native" or "torch"."""
    with torch.enable_grad(), torch.autocast("cpu", enabled=False):
        leaves = [
            torch.full(shape, 0.01, dtype=dtype, requires_grad=True)
            for shape in ((rows, inner), (outer, inner), (outer,))
        ]
        dy = torch.full((rows, outer), 0.01, dtype=dtype)

        def step(fn: Callable[..., Tensor]) -> None:
            torch.autograd.grad(fn(*leaves, act), leaves, dy)

        name = "fp32" if dtype == torch.float32 else "bf16"
        return _tune.fastest(
            f"training linear {inner} -> {outer} {act}, {name}, {rows} rows",
            {"native": lambda: step(linear), "torch": lambda: step(linear_ref)},
            "torch" if _processor.vendor() == "GenuineIntel" and dtype == torch.float32 else "native",
        )


def _pairs(x: Tensor) -> bool:
    return x.dtype == torch.bfloat16 and _native.lib().cpu_variant() == "amx"


def _forward(a, out):
    panels = Panels.once(a.weight, a.bias, _pairs(a.x))
    multiply(a.x, panels, out.y, act=a.act, before=None if a.act == "none" else out.before)


def _backward(a, out, g, d):
    x, dy = a.x.flatten(0, -2), g.y.flatten(0, -2)
    total = None if d.bias is None else torch.empty(len(a.weight), dtype=torch.float32)
    if a.act == "none":
        du = dy
        if total is not None:
            torch.sum(du, 0, dtype=torch.float32, out=total)
    else:
        du = torch.empty_like(dy)
        _native.lib().bias_act_bwd(dy, out.before.flatten(0, -2), None, du, total, ACTS[a.act])
    if d.bias is not None:
        d.bias.copy_(total)
    pairs = _pairs(a.x)
    if d.x is not None:
        multiply(du, Panels.once(a.weight.t(), None, pairs), d.x.flatten(0, -2))
    if d.weight is not None:
        multiply(du.t(), Panels.once(x.t(), None, pairs), d.weight)


def _check(a):
    if a.act not in _ACTS:
        raise ValueError(f"linear: act must be one of {', '.join(_ACTS)}, got {a.act!r}")


def _out(a, backend):
    y = a.x.new_empty(*a.x.shape[:-1], a.weight.shape[0])
    return y, torch.empty_like(y) if a.act != "none" else y.new_empty(0)


def _sample(
    label: str, shape: tuple[int, ...], outer: int, act: str = "none", bias: bool = True, real: bool = False
) -> Sample:
    def make(randn: Callable[..., Tensor]) -> dict[str, Any]:
        args: dict[str, Any] = {"x": randn(*shape), "weight": randn(outer, shape[-1]) / shape[-1] ** 0.5, "act": act}
        return args | ({"bias": randn(outer)} if bias else {})

    return Sample(label, make, real)


linear = Op(
    "linear",
    ref=linear_ref,
    shapes={"x": "... K", "weight": "N K", "bias": "N"},
    check=_check,
    roles={"x": "lowered", "weight": "lowered", "bias": "lowered"},
    out=_out,
    saved=("before",),
    cpu=[Backend("native", _forward, _backward, lambda a: "x must have rows" if a.x.ndim < 2 else None)],
    samples=[
        _sample("gelu, odd sizes", (2, 5, 33), 41, "gelu"),
        _sample("more rows and columns than a panel", (3, 29, 70), 90, "gelu_tanh"),
        _sample("two blocks of K", (17, 400), 19),
        _sample("silu, no bias", (1, 7, 20), 36, "silu", bias=False),
        _sample("one row", (1, 9), 3, "none"),
        _sample("SiT-XL 128 tokens, qkv", (4, 128, 1152), 3456, real=True),
        _sample("SiT-XL 128 tokens, fc1", (4, 128, 1152), 4608, "gelu_tanh", real=True),
        _sample("SiT-XL 128 tokens, fc2", (4, 128, 4608), 1152, real=True),
        _sample("MAETok-B 256 px, fc1", (4, 385, 768), 3072, "gelu", real=True),
        _sample("MAETok-B 256 px, fc2", (4, 385, 3072), 768, real=True),
    ],
    flops=lambda a: 2 * a.x.numel() * a.weight.shape[0],
)
