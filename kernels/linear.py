# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""PackedLinear: y = act(x W^T + b) [+ | * other] for inference, with the weight laid out once for the processor.

    x (..., in) ── oneDNN matmul over the packed weight ── + bias ── act ── + or * other ──> y (..., out)
                   "packed"  CPU, bf16 / fp32               (in the GEMM's epilogue, before the one rounding)
                   "dense"   every other device or dtype: F.linear, then the same steps apart

What each part buys on SiT-XL's shapes on a CPU with AMX (benchmarks/models.py linear prints it): F.linear re-lays the
bf16 weight inside every call; packed once, the GEMM takes 0.6-0.9 of the time where the output is wide (qkv, fc1) and
the same time where the reduction is long (fc2). oneDNN's tanh-GELU epilogue costs 25-30 % of the GEMM, erf's 10 %: so
bf16 tanh-GELU and SiLU run as a native pass over the output (csrc/cpu/activation.cpp) and erf stays in the epilogue.

Why this is a module and no `Op` record: an op is a function of tensors whose backends agree on their layout. A packed
weight is an opaque oneDNN tensor: no strides, no gradient, no state dict, meaningless on another machine. It belongs to
whoever prepared the model, as the layer that it replaces did, so the pattern here is a drop-in for `nn.Linear`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from . import _native
from ._dispatch import transformed

__all__ = ["ACTIVATIONS", "PackedLinear", "why_not_packed"]

# name -> (plain torch, oneDNN's epilogue and its variant, the native pass's kind for bf16)
ACTIVATIONS: dict[str, tuple[Callable[[Tensor], Tensor], tuple[str, str], int | None]] = {
    "none": (lambda y: y, ("none", ""), None),
    "relu": (F.relu, ("relu", ""), None),
    "gelu": (F.gelu, ("gelu", "none"), None),
    "gelu_tanh": (functools.partial(F.gelu, approximate="tanh"), ("gelu", "tanh"), 0),
    "silu": (F.silu, ("swish", ""), 1),
}


def why_not_packed(dtype: torch.dtype, device: torch.device) -> str | None:
    """Why a Linear of this dtype on this device runs "dense", or None when it is packed."""
    if device.type != "cpu":
        return f"weights are packed on the CPU only, not on {device.type}"
    if dtype not in (torch.bfloat16, torch.float32):
        return f"oneDNN packs bfloat16 and float32 weights here, not {dtype}"
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_reorder_linear_weight"):
        return "this torch was built without oneDNN"
    if dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return "there are no bfloat16 instructions that oneDNN may use here"
    return None


class PackedLinear(nn.Module):
    """Inference-only `nn.Linear` with an activation and an optional elementwise partner.

    weight (out, in), bias (out,) or None: any float dtype; copied in `dtype` (default: weight's own) and packed.
    activation: "none", "relu", "gelu" (erf), "gelu_tanh", "silu".
    The module's `dtype`, `in_features`, `out_features` and `backend` ("packed" or "dense") tell what it became.
    ValueError for an unknown activation or shapes that do not fit.
    """

    weight: Tensor
    bias: Tensor | None

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None = None,
        activation: str = "none",
        *,
        dtype: torch.dtype | None = None,
        pack: bool = True,
    ) -> None:
        super().__init__()
        if activation not in ACTIVATIONS:
            raise ValueError(f"unknown activation {activation!r}: expected one of {', '.join(ACTIVATIONS)}")
        if weight.ndim != 2 or (bias is not None and bias.shape != weight.shape[:1]):
            raise ValueError(
                f"PackedLinear needs weight (out, in) and bias (out,); got {tuple(weight.shape)} and "
                f"{None if bias is None else tuple(bias.shape)}"
            )
        self.out_features, self.in_features = weight.shape
        self.activation = activation
        self.dtype = weight.dtype if dtype is None else dtype
        own = functools.partial(torch.Tensor.to, dtype=self.dtype, copy=True, memory_format=torch.contiguous_format)
        self.register_buffer("bias", None if bias is None else own(bias.detach()))
        self.backend = "packed" if pack and why_not_packed(self.dtype, weight.device) is None else "dense"
        if self.backend == "packed":
            # no buffer: state dicts, .to() and copies cannot handle opaque tensors
            self._packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach().to(self.dtype).contiguous())
        else:
            self.register_buffer("weight", own(weight.detach()))
        self._plain, self._epilogue, kind = ACTIVATIONS[activation]
        native = self.backend == "packed" and self.dtype == torch.bfloat16 and _native.why_missing() is None
        self._native_kind = kind if native else None

    @classmethod
    def of(
        cls, linear: nn.Linear, activation: str = "none", *, dtype: torch.dtype | None = None, pack: bool = True
    ) -> PackedLinear:
        """The packed form of an `nn.Linear`, which stays as it is."""
        return cls(linear.weight, linear.bias, activation, dtype=dtype, pack=pack)

    @torch.no_grad()
    def forward(self, x: Tensor, *, add: Tensor | None = None, mul: Tensor | None = None) -> Tensor:
        """x (..., in) of the module's dtype -> (..., out): act(x W^T + b), then `+ add` or `* mul` (..., out).

        One of the two at most.
        """
        if transformed((x,)):
            raise RuntimeError(
                "PackedLinear has no derivatives, x is under torch.func or forward-mode AD: use nn.Linear"
            )
        if add is not None and mul is not None:
            raise ValueError("PackedLinear takes add or mul, not both; do one of them outside")
        if self.backend == "dense":
            if x.device.type == "cpu":
                x = x.contiguous()  # where bf16 is emulated torch rounds a strided product twice, and copies it anyway
            return _apart(self._plain(F.linear(x, self.weight, self.bias)), add, mul)
        other = add if mul is None else mul
        if other is not None and self.activation == "none":
            name = "add" if mul is None else "mul"
            return torch.ops.mkldnn._linear_pointwise.binary(x, other, self._packed, self.bias, name)
        name, variant = self._epilogue if self._native_kind is None else ("none", "")
        y = torch.ops.mkldnn._linear_pointwise(x, self._packed, self.bias, name, [], variant)
        if self._native_kind is not None:
            _native.lib().bias_act_fwd(y, None, y, self._native_kind)
        return _apart(y, add, mul)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, {self.activation}, {self.dtype}, {self.backend}"


def _apart(y: Tensor, add: Tensor | None, mul: Tensor | None) -> Tensor:
    y = y if mul is None else y * mul
    return y if add is None else y + add
