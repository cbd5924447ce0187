# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""PackedLinear: y = act(norm(x) W^T + b) [+ | * | + gate *] other for inference, W laid out once for the processor.

    x (..., in) or Normed ── product over the packed weight ── + bias ── act ── joined to other ──> y (..., out)

    backend         products                                              weights      norm, act, join
    "native fp32"   csrc/cpu/gemm.cpp, fp32                               fp32         on the way in and out, no pass
    "native bf16"   the same; weights widened on their way into the cache bf16         the same
    "native pairs"  the same on AVX512_BF16 or AMX                        bf16         the same
    "native int8"   of bytes, on AVX512_VNNI, AVX_VNNI or AMX-INT8        int8         the same; x is rounded too
    "onednn"        oneDNN over its own packed layout                     as x         relu and erf-GELU in its epilogue
    "dense"         F.linear                                              as x         apart

q and k are not rotated on their way out of a qkv layer: attention does that while it packs them, in registers, so that
there is no pass to save (csrc/cpu/rope_attention.cpp, attention.cpp).

Which one runs is measured: the first layer of each shape races the backends that can take it on this machine
(`_tune`); MAETOK_FAST_TUNE=0 takes the native ones. F.linear re-lays the weight inside every call, or leaves it in rows
that no vector reads in order; oneDNN packs it but evaluates a table per element for tanh-GELU (25-30 % of the product).

Why this is a module and no `Op` record: an op is a function of tensors whose backends agree on their layout. A packed
weight fits one processor: no gradient, no state dict, meaningless on another machine. It belongs to whoever prepared
the model, as the layer that it replaces did, so the pattern here is a drop-in for `nn.Linear`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from . import _gemm, _native, _processor, _tune
from ._dispatch import transformed
from .activation import swiglu
from .adaln import adaln
from .gate_residual import gate_residual

__all__ = ["ACTIVATIONS", "BACKENDS", "Normed", "PackedLinear", "why_not"]

# name -> (plain torch, oneDNN's epilogue and its variant, the native pass's kind for bf16)
ACTIVATIONS: dict[str, tuple[Callable[[Tensor], Tensor], tuple[str, str], int | None]] = {
    "none": (lambda y: y, ("none", ""), None),
    "relu": (F.relu, ("relu", ""), None),
    "gelu": (F.gelu, ("gelu", "none"), None),
    "gelu_tanh": (functools.partial(F.gelu, approximate="tanh"), ("gelu", "tanh"), 0),
    "silu": (F.silu, ("swish", ""), 1),
}
BACKENDS = ("native fp32", "native bf16", "native pairs", "native int8", "onednn", "dense")
ERROR_ROWS = 64
_ERROR_SEED = 0x6D61_6574  # none that a weight is likely to have been drawn with
RACE_ROWS = 256  # rows of x in a race: two images of SiT, less than one of MAETok


class Normed(NamedTuple):
    """adaln(x, ...) still to be computed, by the product that reads it, while it packs x. Fields as `adaln`'s."""

    x: Tensor
    shift: Tensor | None = None
    scale: Tensor | None = None
    weight: Tensor | None = None
    bias: Tensor | None = None
    eps: float = 1e-6
    offset: float = 1.0
    norm: str = "layer"

    def computed(self) -> Tensor:
        return adaln(self.x, self.shift, self.scale, self.weight, self.bias, self.eps, self.offset, "", self.norm)


def why_not(backend: str, dtype: torch.dtype, weights: torch.dtype, device: torch.device) -> str | None:
    """Why `backend` cannot multiply x of `dtype` by weights kept in `weights` on this device, or None."""
    if backend.startswith("native"):
        form = backend.split()[1]
        wanted = {"fp32": torch.float32, "int8": torch.int8}.get(form, torch.bfloat16)
        if dtype not in (torch.float32, torch.bfloat16):
            return f"packed products are of float32 and bfloat16, not of {dtype}"
        if weights != wanted:
            return f"its weights are {wanted}, not {weights}"
        if form == "pairs" and dtype != torch.bfloat16:
            return f"pairs of bf16 would round x, which is {dtype}"
        return _gemm.why_not_packed(form, device)
    if dtype != weights:
        return f"it keeps weights in x's dtype, {dtype}"
    if backend == "dense":
        return None
    if device.type != "cpu":
        return f"weights are packed on the CPU only, not on {device.type}"
    if dtype not in (torch.bfloat16, torch.float32):
        return f"oneDNN packs bfloat16 and float32 weights here, not {dtype}"
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_reorder_linear_weight"):
        return "this torch was built without oneDNN"
    if dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return "there are no bfloat16 instructions that oneDNN may use here"
    return None


def candidates(dtype: torch.dtype, weights: torch.dtype, device: torch.device) -> list[str]:
    """The backends that can, the one to take without a race first."""
    found = [b for b in BACKENDS if why_not(b, dtype, weights, device) is None]
    level = _native.level() if device.type == "cpu" else ""
    # tiles multiply at 8 times fp32's rate, AMD's vectors of pairs at 2 to 4 times, Intel's at half of it
    if "native pairs" in found and (level == "amx" or _processor.vendor() == "AuthenticAMD"):
        found.remove("native pairs")
        found.insert(0, "native pairs")
    if level in ("v2", "generic"):  # 4 lanes: oneDNN and MKL know these processors' better instructions, if any
        found.sort(key=lambda b: b.startswith("native"))
    return found


class PackedLinear(nn.Module):
    """Inference-only `nn.Linear` with an activation and an optional elementwise partner.

    weight (out, in), bias (out,) or None: any float dtype; copied and packed.
    activation: "none", "relu", "gelu" (erf), "gelu_tanh", "silu". gated: weight is [a | b], y = act(a) * b (SwiGLU).
    dtype: of x and y (default: weight's own). weights: in which the weight is kept: `dtype`; under fp32 arithmetic
        torch.bfloat16, for half the memory; or torch.int8, where the processor multiplies bytes: each of its rows in
        steps of its largest magnitude / 127, and each row of x likewise, anew for each call.
    backend: one of `BACKENDS`, or None for the fastest on this machine.
    use: what the race runs: "" the product alone, "normed" with `Normed` inputs, "joined" with add and a gate.
    The module's `dtype`, `in_features`, `out_features` and `backend` tell what it became; `error`, of int8, the
    relative rms error of its outputs for `ERROR_ROWS` rows of Gaussian x.
    ValueError for an unknown activation or backend, for one that cannot (with the reason), for shapes that do not fit.
    """

    weight: Tensor
    bias: Tensor | None

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None = None,
        activation: str = "none",
        *,
        gated: bool = False,
        dtype: torch.dtype | None = None,
        weights: torch.dtype | None = None,
        backend: str | None = None,
        use: str = "",
    ) -> None:
        super().__init__()
        if activation not in ACTIVATIONS:
            raise ValueError(f"unknown activation {activation!r}: expected one of {', '.join(ACTIVATIONS)}")
        if weight.ndim != 2 or (bias is not None and bias.shape != weight.shape[:1]) or (gated and len(weight) % 2):
            raise ValueError(
                f"PackedLinear needs weight (out, in), out even where gated, and bias (out,); got "
                f"{tuple(weight.shape)} and {None if bias is None else tuple(bias.shape)}"
            )
        self.in_features, self.gated = weight.shape[1], gated
        self.out_features = weight.shape[0] // 2 if gated else weight.shape[0]
        self.activation = activation
        self.dtype = weight.dtype if dtype is None else dtype
        self.weights = self.dtype if weights is None else weights
        if backend is None:
            backend = self._fastest(weight, bias, use)
        elif backend not in BACKENDS:
            raise ValueError(f"unknown backend {backend!r}: expected one of {', '.join(BACKENDS)}")
        else:
            reason = why_not(backend, self.dtype, self.weights, weight.device)
            if reason is not None:
                raise ValueError(f"backend {backend!r} cannot take this layer: {reason}")
        self.backend = backend
        self._plain, self._epilogue, kind = ACTIVATIONS[activation]
        own = functools.partial(torch.Tensor.to, dtype=self.dtype, copy=True, memory_format=torch.contiguous_format)
        if backend.startswith("native"):
            # no buffers: state dicts, .to() and copies cannot handle panels
            self.bias = None
            # to int8 it is the panels that round, with their scales
            kept = weight.dtype if self.weights == torch.int8 else self.weights
            rounded = weight.detach() if kept == weight.dtype else weight.detach().to(kept)
            self._panels = _gemm.Panels.of(
                rounded.contiguous(), None if bias is None else bias.detach(), backend.split()[1], gated
            )
        else:
            self.register_buffer("bias", None if bias is None else own(bias.detach()))
            if backend == "onednn":
                self._packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach().to(self.dtype).contiguous())
                native = self.dtype == torch.bfloat16 and not gated and _native.why_missing() is None
                self._native_kind = kind if native else None
            else:
                self.register_buffer("weight", own(weight.detach()))
        self.error = self._measured_error(weight, bias) if self.weights == torch.int8 else 0.0

    @classmethod
    def of(cls, linear: nn.Linear, activation: str = "none", **options: Any) -> PackedLinear:
        """The packed form of an `nn.Linear`, which stays as it is. options: the class's own keywords."""
        return cls(linear.weight, linear.bias, activation, **options)

    def _fastest(self, weight: Tensor, bias: Tensor | None, use: str) -> str:
        """The winner of a race over `RACE_ROWS` rows, or the first that can."""
        able = candidates(self.dtype, self.weights, weight.device) if weight.numel() else ["dense"]
        if not able:
            raise ValueError(
                f"no backend multiplies {self.dtype} by weights kept in {self.weights} on {weight.device}: "
                f"{why_not(BACKENDS[0], self.dtype, self.weights, weight.device)}"
            )
        if len(able) == 1 or weight.device.type != "cpu":
            return able[0]
        made: dict[str, PackedLinear] = {}
        x: Tensor | Normed = torch.ones(2, RACE_ROWS // 2, self.in_features, dtype=self.dtype)
        joined: dict[str, Tensor] = {}
        if use == "normed":
            rows = torch.ones(2, self.in_features, dtype=self.dtype)
            x = Normed(torch.randn(2, RACE_ROWS // 2, self.in_features).to(self.dtype), rows, rows)
        elif use == "joined":
            joined["add"] = torch.ones(2, RACE_ROWS // 2, self.out_features, dtype=self.dtype)
            joined["gate"] = torch.ones(2, self.out_features, dtype=self.dtype)

        def call(name: str) -> None:
            if name not in made:
                kept: dict[str, Any] = {"dtype": self.dtype, "weights": self.weights}
                made[name] = PackedLinear(weight, bias, self.activation, gated=self.gated, backend=name, **kept)
            made[name](x, **joined)

        names = {torch.float32: "fp32", torch.bfloat16: "bf16"}
        does = [self.activation] * (self.activation != "none") + ["gated"] * self.gated + [use] * bool(use)
        key = " ".join(["linear", f"{self.in_features} -> {self.out_features}", *does])
        key += f", {names.get(self.dtype, self.dtype)} by {names.get(self.weights, self.weights)}"
        return _tune.fastest(key, {name: functools.partial(call, name) for name in able}, able[0])

    @torch.no_grad()
    def _measured_error(self, weight: Tensor, bias: Tensor | None) -> float:
        """Of what is packed against `weight` in fp32."""
        generator = torch.Generator().manual_seed(_ERROR_SEED)
        x = torch.randn(ERROR_ROWS, self.in_features, generator=generator)
        want = self._activated(F.linear(x, weight.float(), None if bias is None else bias.float()))
        scale = want.norm().item()
        return (self(x.to(self.dtype)).float() - want).norm().item() / scale if scale > 0 else 0.0

    @torch.no_grad()
    def forward(
        self, x: Tensor | Normed, *, add: Tensor | None = None, mul: Tensor | None = None, gate: Tensor | None = None
    ) -> Tensor:
        """x (..., in) of the module's dtype, or a norm of such a one -> (..., out): v = act(x W^T + b), then add + v,
        add + gate * v or mul * v; add and mul (..., out), gate (out,) or, for x (B, N, in), (B, out).

        ValueError where add and mul are given both, or a gate without add.
        """
        if transformed(x if isinstance(x, Normed) else (x,)):
            raise RuntimeError(
                "PackedLinear has no derivatives, x is under torch.func or forward-mode AD: use nn.Linear"
            )
        if (add is not None and mul is not None) or (gate is not None and add is None):
            raise ValueError("PackedLinear takes add, add with a gate, or mul; do the rest outside")
        if self.backend.startswith("native"):
            return self._native(x, add, mul, gate)
        x = x.computed() if isinstance(x, Normed) else x
        if self.backend == "onednn":
            return self._onednn(x, add, mul, gate)
        if x.device.type == "cpu":
            x = x.contiguous()  # where bf16 is emulated torch rounds a strided product twice, and copies it anyway
        return _apart(self._activated(F.linear(x, self.weight, self.bias)), add, mul, gate)

    def _native(self, x: Tensor | Normed, add: Tensor | None, mul: Tensor | None, gate: Tensor | None) -> Tensor:
        norm: tuple[Any, ...] = _gemm.NO_NORM
        if isinstance(x, Normed):
            norm = (1 if x.norm == "layer" else 2, x.weight, x.bias, x.shift, x.scale, x.eps, x.offset)
            x = x.x
        if x.dtype != self.dtype:
            raise TypeError(f"PackedLinear: expected x of {self.dtype}, got {x.dtype}")
        join = _gemm.Join.mul if mul is not None else _gemm.Join.none
        if add is not None:
            join = _gemm.Join.add if gate is None else _gemm.Join.gate
        other = add if mul is None else mul
        return _gemm.multiply(
            x.contiguous(),
            self._panels,
            out_dtype=self.dtype,
            act=self.activation,
            join=join,
            other=None if other is None else other.contiguous(),
            gate=gate,
            norm=norm,
        )

    def _onednn(self, x: Tensor, add: Tensor | None, mul: Tensor | None, gate: Tensor | None) -> Tensor:
        other = add if mul is None else mul
        if other is not None and self.activation == "none" and gate is None:
            name = "add" if mul is None else "mul"
            return torch.ops.mkldnn._linear_pointwise.binary(x, other, self._packed, self.bias, name)
        name, variant = ("none", "") if self.gated or self._native_kind is not None else self._epilogue
        y = torch.ops.mkldnn._linear_pointwise(x, self._packed, self.bias, name, [], variant)
        if self._native_kind is not None:
            _native.lib().bias_act_fwd(y, None, y, self._native_kind)
        return _apart(self._activated(y) if self.gated else y, add, mul, gate)

    def _activated(self, y: Tensor) -> Tensor:
        if not self.gated:
            return self._plain(y)
        if self.activation == "silu":
            return swiglu(y)
        a, b = y.chunk(2, dim=-1)
        return self._plain(a) * b

    def extra_repr(self) -> str:
        gated = " gated" if self.gated else ""
        error = f", error {self.error:.2%}" if self.error else ""
        return f"{self.in_features}, {self.out_features}, {self.activation}{gated}, {self.dtype}, {self.backend}{error}"


def _apart(y: Tensor, add: Tensor | None, mul: Tensor | None, gate: Tensor | None) -> Tensor:
    if mul is not None:
        return y * mul
    if add is None:
        return y
    return y + add if gate is None else gate_residual(add, gate, y)
