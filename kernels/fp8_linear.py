# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""Fp8Linear: nn.Linear whose three matrix products run in float8 on tensor cores (compute capability 8.9 and newer).

    forward    y  = x8 W8^T        e4m3 x e4m3, fast accumulation
    backward   dx = g8 W8          e5m2 x e4m3
               dW = g8^T x8        e5m2 x e4m3

scaling="tensor": one scale for x, W and g each. All three are cast once; the products need them in both orders, and a
float8 tensor transposes exactly.

scaling="row" (default): a scale for each token of x and each output channel of W, so one outlier spoils its own row
only. In the backward these scales run along the reduction and cannot be taken out of the sum:

    dx[m,k] = sum_o (g[m,o] sw[o]) w8[o,k]        dW[o,k] = sum_m (g[m,o] sx[m]) x8[m,k]

so they are multiplied into the gradient, which is then cast with a scale per token (dx) and per output channel (dW).
Rounding of a float is relative, so this costs no accuracy, and x and W are cast once only: the backward uses the very
8 bits of the forward. Others cast every operand a second time along its other dimension (torchao's "rowwise", six casts
with power-of-two scales) or leave dW in bf16 ("rowwise_with_gw_hp", which also keeps x in bf16: twice the memory).

The cast of the weight is kept until the weight changes: gradient accumulation and the steps of a sampler cast once. A
change is seen by the weight's version counter, its address, and a step of any torch.optim optimizer: the fused ones
write without counting. What else bypasses the counter (writes through `.data`) needs `forget_cast()`. Under
torch.compile nothing is kept, the cast is part of the graph.

Relative error with N(0, 1) inputs against fp64, as tests/test_fp8.py measures it: y 3.7 %, dx and dW 5.8 %, either way
of scaling. With one token in 64 larger than the others by a factor f, the others' error in y stays 3.7 % per row; per
tensor it is 3.8 % at f = 10^3 (e4m3 has 18 binades), 5 % at 10^4, 42 % at 10^5, and 100 % at 10^6: they vanish.

What it can gain, estimated for an H100 from 650 TFLOP/s in bf16, 1.7 times that in fp8 and 2.5 TB/s (not measured):
casting a token costs 3 bytes an element and saves out_features products, which pays above about 1000 features; dW,
with its two transposes, breaks even at about 1300 to 2200. Hence `min_features` in `maetok_fast.precision.to_fp8`.

Why not torchao underneath: its Float8Linear would replace the 60 lines here that call torch._scaled_mm, and cannot take
an input that `adaln_quantize` has cast already, fold the scales, or keep a weight's cast.

Shapes and devices that cannot take FP8 run as nn.Linear (bf16 under autocast): `why_not_fp8` says why, the reason is
logged once at DEBUG, and MAETOK_FAST_STRICT=1 raises it. `emulate=True` computes the same on any device, slowly, by
dequantising; tests and studies of accuracy use it.

Why this is a module and no `Op` record: the casts belong to a parameter and live as long as it does not change.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.optimizer import register_optimizer_step_post_hook

from ._dispatch import autocasts, fall_back, forced_backend, no_autocast, transformed
from ._op import Op
from ._record import EMPTY
from .adaln import adaln
from .fp8 import adaln_quantize, fp8_quantize, fp8_quantize_columns, transpose_pad

__all__ = ["Fp8Linear", "adaln_linear_fp8", "why_no_fp8_hardware", "why_not_fp8"]

SCALINGS = ("row", "tensor")
FP8_CAPABILITY = (8, 9)  # Ada and Hopper are the first with float8 tensor cores


def why_no_fp8_hardware(device: torch.device, scaling: str = "row") -> str | None:
    """Why float8 GEMMs cannot run on the device, or None."""
    if device.type != "cuda":
        return f"it needs CUDA hardware of compute capability 8.9 or newer, this is {device.type}"
    if not torch.cuda.is_available():
        return "torch finds no CUDA device"
    have = torch.cuda.get_device_capability(device)
    if have < FP8_CAPABILITY:
        return f"it needs compute capability 8.9 or newer, this GPU has {have[0]}.{have[1]}"
    if scaling == "row" and have[0] >= 12:
        return f"torch has no row-scaled GEMM for compute capability {have[0]}.{have[1]}; use scaling='tensor'"
    return None


# Asked in every forward and constant in a process (see _dispatch.why_missing).
why_no_fp8_hardware._dynamo_marked_constant = True  # type: ignore[attr-defined]


def why_not_fp8(
    in_features: int,
    out_features: int,
    dtype: torch.dtype,
    device: torch.device,
    scaling: str = "row",
    emulate: bool = False,
) -> str | None:
    """Why a linear layer of these sizes runs in its own precision, or None when it runs in FP8."""
    if in_features % 16 or out_features % 16:
        return f"{in_features} -> {out_features} features: FP8 GEMMs need multiples of 16"
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"its weight is {dtype}; float32, bfloat16 and float16 are cast"
    return None if emulate else why_no_fp8_hardware(device, scaling)


# ---- products ------------------------------------------------------------------------------------------------------


def _run(op: Op[..., Any], emulate: bool) -> Any:
    """The op, or its reference where emulation was asked for (strict mode is for kernels) and no backend is forced."""
    return op.ref if emulate and forced_backend() is None else op


def _matmul(
    a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, emulate: bool, *,
    bias: Tensor | None = None, dtype: torch.dtype = torch.bfloat16, fast: bool = False,
) -> Tensor:  # fmt: skip
    """a (M, K) @ b (N, K)^T with the scales of a (M, 1) or () and of b (N, 1) or (), + bias -> (M, N) in `dtype`."""
    if emulate:
        y = (a.float() @ b.float().t()) * a_scale * b_scale.t()
        return (y if bias is None else y + bias.float()).to(dtype)
    if a_scale.ndim:
        b_scale = b_scale.t().contiguous()
    bias = None if bias is None else bias.to(dtype)
    return torch._scaled_mm(a, b.t(), a_scale, b_scale, bias=bias, out_dtype=dtype, use_fast_accum=fast)


def _transposed(x: Tensor, emulate: bool) -> Tensor:
    return _run(transpose_pad, emulate)(x.view(torch.uint8)).view(x.dtype)


class _Cast:
    """A weight in e4m3: data (out, in), scale (out, 1) or (), and the transpose, made when a backward asks for it."""

    def __init__(self, weight: Tensor, scaling: str, emulate: bool) -> None:
        self.data, self.scale = _run(fp8_quantize, emulate)(weight.detach(), "e4m3", scaling)
        self._transposed: Tensor | None = None

    def transposed(self, emulate: bool) -> Tensor:
        if self._transposed is None:
            self._transposed = _transposed(self.data, emulate)
        return self._transposed


class _Steps:
    """How many steps optimizers have made in this process. torch's fused optimizers do not move the version counters of
    the parameters that they write, so a cast is also as old as the last step of any of them."""

    count = 0
    watching = False

    @classmethod
    def watch(cls) -> None:
        if not cls.watching:
            cls.watching = True
            register_optimizer_step_post_hook(cls.step)

    @classmethod
    def step(cls, *unused: Any) -> None:
        cls.count += 1


class _Settings:
    """What does not depend on the tensors. dtype: of the output."""

    def __init__(self, scaling: str, emulate: bool, dtype: torch.dtype, weight_dtype: torch.dtype) -> None:
        self.scaling, self.emulate, self.dtype = scaling, emulate, dtype
        # cuBLAS's tensor-scaled product writes fp32 as fast; the row-scaled one knows bf16 only
        wide = scaling == "tensor" and weight_dtype == torch.float32
        self.weight_grad = torch.float32 if wide else torch.bfloat16


def _input_gradient(g: Tensor, w_scale: Tensor, w_transposed: Tensor, s: _Settings) -> tuple[Tensor, Tensor, Tensor]:
    """(dx (M, in) bf16, and the cast gradient that "tensor" uses again)."""
    if s.scaling == "tensor":
        g8, g_scale = _run(fp8_quantize, s.emulate)(g, "e5m2", "tensor")
        return _matmul(g8, g_scale, w_transposed, w_scale, s.emulate), g8, g_scale
    g8, g_scale = _run(fp8_quantize, s.emulate)(g, "e5m2", "row", w_scale.flatten())
    ones = torch.ones_like(g_scale[:1]).expand(w_transposed.shape[0], 1)
    return _matmul(g8, g_scale, w_transposed, ones, s.emulate), g8, g_scale


def _weight_gradient(g: Tensor, x8: Tensor, x_scale: Tensor, g8: Tensor, g_scale: Tensor, s: _Settings) -> Tensor:
    """dW (out, in)."""
    x_transposed = _transposed(x8, s.emulate)
    if s.scaling == "tensor":
        return _matmul(_transposed(g8, s.emulate), g_scale, x_transposed, x_scale, s.emulate, dtype=s.weight_grad)
    g8, g_scale = _run(fp8_quantize_columns, s.emulate)(g, "e5m2", x_scale.flatten())
    ones = torch.ones_like(x_scale[:1]).expand(x_transposed.shape[0], 1)
    return _matmul(g8, g_scale, x_transposed, ones, s.emulate, dtype=s.weight_grad)


def _gradients(
    dy: Tensor, saved: tuple[Tensor, ...], cast: _Cast | None, needs: tuple[bool, bool, bool], s: _Settings,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """(dx (M, in), dW, db) for dy (M, out); saved: x8 (M, in), its scale, W8 and its scale."""
    x8, x_scale, w8, w_scale = saved
    dx = dw = db = None
    g8 = g_scale = dy
    if needs[0]:
        w_transposed = _transposed(w8, s.emulate) if cast is None else cast.transposed(s.emulate)
        dx, g8, g_scale = _input_gradient(dy, w_scale, w_transposed, s)
    elif needs[1] and s.scaling == "tensor":
        g8, g_scale = _run(fp8_quantize, s.emulate)(dy, "e5m2", "tensor")
    if needs[1]:
        dw = _weight_gradient(dy, x8, x_scale, g8, g_scale, s)
    if needs[2]:
        db = dy.sum(0, dtype=torch.float32)
    return dx, dw, db


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, w8: Tensor, w_scale: Tensor, cast: _Cast | None,
        s: _Settings,
    ) -> Tensor:  # fmt: skip
        flat = x.reshape(-1, x.shape[-1])
        x8, x_scale = _run(fp8_quantize, s.emulate)(flat, "e4m3", s.scaling)
        y = _matmul(x8, x_scale, w8, w_scale, s.emulate, bias=bias, fast=True)
        ctx.save_for_backward(x8, x_scale, w8, w_scale)
        ctx.cast, ctx.settings, ctx.x_shape, ctx.x_dtype = cast, s, x.shape, x.dtype
        ctx.weight_dtype, ctx.bias_dtype = weight.dtype, None if bias is None else bias.dtype
        return y.view(*x.shape[:-1], -1).to(s.dtype)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        with no_autocast(dy.device.type):
            needs = ctx.needs_input_grad[:3]
            dx, dw, db = _gradients(dy.reshape(-1, dy.shape[-1]), ctx.saved_tensors, ctx.cast, needs, ctx.settings)
        return (
            None if dx is None else dx.view(ctx.x_shape).to(ctx.x_dtype),
            None if dw is None else dw.to(ctx.weight_dtype),
            None if db is None else db.to(ctx.bias_dtype),
            None, None, None, None,
        )  # fmt: skip


class _AdalnLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, shift: Tensor | None, scale: Tensor | None, norm_weight: Tensor | None,
        norm_bias: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float, offset: float, kind: str,
        w8: Tensor, w_scale: Tensor, cast: _Cast | None, s: _Settings,
    ) -> Tensor:  # fmt: skip
        y8, y_scale, stats = _run(adaln_quantize, s.emulate)(x, shift, scale, norm_weight, norm_bias, eps, offset, kind)
        y8, y_scale = y8.flatten(0, 1), y_scale.flatten(0, 1)
        out = _matmul(y8, y_scale, w8, w_scale, s.emulate, bias=bias, fast=True)
        ctx.save_for_backward(y8, y_scale, w8, w_scale, stats, x, shift, scale, norm_weight, norm_bias)
        ctx.options, ctx.cast, ctx.settings = (eps, offset, "", kind), cast, s
        ctx.weight_dtype, ctx.bias_dtype = weight.dtype, None if bias is None else bias.dtype
        return out.view(*x.shape[:-1], -1).to(s.dtype)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        y8, y_scale, w8, w_scale, stats, *norm = ctx.saved_tensors
        needs = list(ctx.needs_input_grad[:5])
        with no_autocast(dy.device.type):
            dn, dw, db = _gradients(
                dy.flatten(0, 1), (y8, y_scale, w8, w_scale), ctx.cast,
                (any(needs), *ctx.needs_input_grad[5:7]), ctx.settings,
            )  # fmt: skip
            grads = _norm_gradients(dn, stats, norm, ctx.options, needs)
        return (
            *grads,
            None if dw is None else dw.to(ctx.weight_dtype),
            None if db is None else db.to(ctx.bias_dtype),
            *[None] * 7,
        )  # fmt: skip


def _norm_gradients(
    dn: Tensor | None, stats: Tensor, norm: list[Any], options: tuple[Any, ...], needs: list[bool]
) -> list[Tensor | None]:
    """Gradients of x, shift, scale, weight and bias of adaln, by its own backward kernel."""
    if dn is None:
        return [None] * 5
    dn = dn.view(norm[0].shape).to(norm[0].dtype)
    chosen = adaln.choose(*norm, *options)
    if chosen != "reference":
        every = [*needs, *[False] * 4]
        found = torch.ops.maetok_fast.adaln_backward([dn], [stats.view(-1, 2)], every, chosen, *norm, *options)
        return [g if n else None for g, n in zip(found, needs)]
    wanted: list[Any] = [t.detach().requires_grad_(n) if t is not None else None for t, n in zip(norm, needs)]
    with torch.enable_grad():
        y = adaln.ref(*wanted, *options)
    grads = iter(torch.autograd.grad(y, [t for t, n in zip(wanted, needs) if n and t is not None], dn))
    return [next(grads) if n else None for n in needs]


# ---- the module ----------------------------------------------------------------------------------------------------


class Fp8Linear(nn.Linear):
    """nn.Linear in float8: the same parameters, the same state dict.

    scaling: "row" or "tensor", see above. emulate: compute the same in fp32 on any device.
    `forward`: x (..., in) fp32, bf16 or fp16 -> (..., out) in the autocast dtype, or in x's without autocast; the
    product itself is rounded to bf16. Gradients come in the dtypes of x, weight and bias.
    ValueError for an unknown scaling.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        scaling: str = "row",
        emulate: bool = False,
    ) -> None:
        if scaling not in SCALINGS:
            raise ValueError(f"unknown scaling {scaling!r}: expected one of {', '.join(SCALINGS)}")
        super().__init__(in_features, out_features, bias, device, dtype)
        self.scaling, self.emulate = scaling, emulate
        self._kept: tuple[tuple[Any, ...], _Cast] | None = None
        _Steps.watch()

    @classmethod
    def of(cls, linear: nn.Linear, *, scaling: str = "row", emulate: bool = False) -> Fp8Linear:
        """An Fp8Linear over the parameters of `linear`: shared, not copied."""
        bias = linear.bias is not None
        made = cls(linear.in_features, linear.out_features, bias, "meta", scaling=scaling, emulate=emulate)
        made.weight, made.bias = linear.weight, linear.bias
        return made.train(linear.training)

    def why_not_fp8(self, x: Tensor | None = None) -> str | None:
        """Why this layer (for this input) runs as nn.Linear, or None."""
        if x is not None and x.numel() == 0:
            return EMPTY
        if x is not None and x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            return f"its input is {x.dtype}; float32, bfloat16 and float16 are cast"
        if x is not None and transformed((x, self.weight, self.bias)):
            return "torch.func and forward-mode AD need plain torch"
        weight = self.weight
        return why_not_fp8(self.in_features, self.out_features, weight.dtype, weight.device, self.scaling, self.emulate)

    def weight_cast(self) -> _Cast:
        """The weight in e4m3: the kept one while the weight is unchanged."""
        weight = self.weight
        if torch.compiler.is_compiling() or weight.is_inference():  # inference tensors count no versions
            return _Cast(weight, self.scaling, self.emulate)
        key = (
            _Steps.count,
            weight._version,
            weight.data_ptr(),
            weight.dtype,
            weight.device,
            self.scaling,
            self.emulate,
        )
        if self._kept is None or self._kept[0] != key:
            with torch.inference_mode(False):  # a cast made while sampling has to serve training too
                self._kept = (key, _Cast(weight, self.scaling, self.emulate))
        return self._kept[1]

    def forget_cast(self) -> None:
        """Drop the kept cast: after writes to the weight that its version counter does not see (`weight.data`)."""
        self._kept = None

    def _settings(self, x: Tensor) -> _Settings:
        on = x.device.type
        dtype = torch.get_autocast_dtype(on) if autocasts(on) else x.dtype
        return _Settings(self.scaling, self.emulate, dtype, self.weight.dtype)

    def forward(self, x: Tensor) -> Tensor:
        reason = self.why_not_fp8(x)
        if reason is not None:
            if reason != EMPTY:
                fall_back("Fp8Linear", reason)
            return F.linear(x, self.weight, self.bias)
        cast, settings = self.weight_cast(), self._settings(x)
        with no_autocast(x.device.type):
            kept = None if torch.compiler.is_compiling() else cast
            return _Linear.apply(x, self.weight, self.bias, cast.data, cast.scale, kept, settings)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_kept": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        _Steps.watch()  # unpickled in another process

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, scaling={self.scaling!r}" + (", emulate=True" if self.emulate else "")


def adaln_linear_fp8(
    linear: Fp8Linear,
    x: Tensor,
    shift: Tensor | None = None,
    scale: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-6,
    offset: float = 1.0,
    norm: str = "layer",
) -> Tensor:
    """linear(adaln(x, shift, scale, weight, bias, eps, offset, norm=norm)), the norm's result written once, in e4m3.

    x (B, N, D) -> (B, N, out) in the autocast dtype, or in x's. The backward takes the saved e4m3 for dW and goes
    through adaln's backward kernel. Where FP8 cannot run, or for scaling="tensor" (a tensor's scale is known only when
    all of its rows are), the two run one after the other.
    """
    a = adaln.arguments(x, shift, scale, weight, bias, eps, offset, norm=norm)
    reason = linear.why_not_fp8(x)
    if reason is not None or linear.scaling != "row":
        return linear(adaln(*a))
    settings = linear._settings(x)
    cast = linear.weight_cast()
    with no_autocast(x.device.type):
        return _AdalnLinear.apply(
            *a[:5], linear.weight, linear.bias, eps, offset, norm, cast.data, cast.scale,
            None if torch.compiler.is_compiling() else cast, settings,
        )  # fmt: skip
