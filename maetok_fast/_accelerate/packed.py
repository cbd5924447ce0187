# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""The fast forms for inference on a CPU: over weights packed once, with everything between two products in them.

    block   qkv(norm(x, shift, scale)) -> rope_attention -> x + gamma * proj(.) -> first(norm(x)) -> x + gamma * last(.)
            norms while the product behind packs its rows, activation, LayerScale, gate and residual in its epilogue

as `prepare` has it (inference/rebuild.py), over another module's parameters: these stay where they are, the packed
copies lie beside and are made again when a parameter was exchanged, moved or written to. What wants gradients,
training mode, autocast, torch.compile or a hook inside takes the dense form (fast.py).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from maetok_fast._accelerate import fast, reading
from maetok_fast._accelerate.fast import FastAttention, FastBlock, FastLinear, FastMlp, FastMultihead, vector
from maetok_fast._accelerate.reading import Norm
from maetok_fast.inference.packing import Target, packed, scaled
from maetok_fast.kernels import gate_residual
from maetok_fast.kernels._dispatch import autocasts, transformed
from maetok_fast.kernels.packed_linear import Normed, PackedLinear

__all__ = ["PACKED", "PackedAttention", "PackedBlock", "PackedMlp", "PackedMultihead", "PackedPlainLinear"]

Products = dict[str, PackedLinear]


def _ready(module: Any, x: Any) -> bool:
    """Whether packed weights may compute this call."""
    target: Target | None = module.__dict__.get("_fast_target")
    if target is None or torch.compiler.is_compiling() or module.training or not isinstance(x, Tensor):
        return False
    if x.dtype != target.dtype or x.device.type != "cpu" or autocasts("cpu") or transformed((x,)):
        return False
    if torch.is_grad_enabled() and (x.requires_grad or any(p.requires_grad for p in module.parameters())):
        return False
    inside = (m for m in module.modules() if m is not module)
    return not any(m._forward_hooks or m._forward_pre_hooks for m in inside)


@torch.no_grad()
def _products(module: Any, make: Callable[[Target], Products], act: str = "") -> Products:
    """The packed weights, of the parameters as they are now; act: what `make` puts behind them, where it may change."""
    tensors = [t for own in (module.parameters(), module.buffers()) for t in own]
    now = (act, *((t.data_ptr(), -1 if t.is_inference() else t._version) for t in tensors))
    found = module.__dict__.get("_fast_packed")
    if found is None or found[0] != now:
        found = module.__dict__["_fast_packed"] = (now, make(module._fast_target))
    return found[1]


def _late(owner: Any, norm: Norm, x: Tensor, *modulation: Any) -> Normed:
    """The child's norm, left to the product that reads it."""
    return Normed(x, *fast.norm_values(owner, norm, *modulation), norm.kind)


def _pack_qkv(module: Any, part: reading.Attention, target: Target, use: str) -> PackedLinear:
    if part.layout == "in_proj":
        weight = module.in_proj_weight
    elif part.layout == "split":
        weight = torch.cat([module._modules[n].weight for n in ("q_proj", "k_proj", "v_proj")])
    else:
        weight = module._modules["qkv"].weight
    bias = fast.qkv_bias(module, part)
    if part.half:  # rows of q and k so that the rotated channels are neighbours
        rows = torch.arange(len(weight), device=weight.device).view(3, part.heads, part.head_dim)
        order = torch.cat([fast.interleaved(rows[:2]), rows[2:]]).flatten()
        weight, bias = weight[order], None if bias is None else bias[order]
    return packed(weight, bias, target, use=use)


def _pack_first(module: Any, part: reading.Mlp, target: Target, use: str) -> PackedLinear:
    layers = [module._modules[n] for n in part.first]
    weight, bias = layers[0].weight, layers[0].bias
    if len(layers) == 2:
        weight = torch.cat([m.weight for m in layers])
        bias = None if bias is None else torch.cat([m.bias for m in layers])
    return packed(weight, bias, target, part.act, gated=part.gated, use=use)


def _pack_last(owner: Any, name: str, gamma: Tensor | None, target: Target) -> PackedLinear:
    layer = owner._modules[name]
    return scaled(layer.weight, layer.bias, gamma, target)


class PackedPlainLinear(FastLinear):
    """nn.Linear over a packed weight."""

    def forward(self: Any, x: Tensor, act: str = "none") -> Tensor:
        if not _ready(self, x):
            return super().forward(x, act)
        made = _products(self, lambda target: {"all": packed(self.weight, self.bias, target, act)}, act)
        return made["all"](x)


class PackedMlp(FastMlp):
    """An MLP as two products."""

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        part: reading.Mlp = self._fast_reading
        x: Any = args[0] if args else None
        if len(args) != 1 or kwargs or not _ready(self, x) or (part.inner is not None and x.ndim != 3):
            return super().forward(*args, **kwargs)
        made = _products(self, self._pack)
        h = made["first"](x)
        return made["last"](h if part.inner is None else _late(self, part.inner, h))

    def _pack(self: Any, target: Target) -> Products:
        last = self._modules[self._fast_reading.last]
        return {
            "first": _pack_first(self, self._fast_reading, target, ""),
            "last": packed(last.weight, last.bias, target),
        }


class PackedAttention(FastAttention):
    """Attention as two products and one attention between them."""

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        part: reading.Attention = self._fast_reading
        given = part.call.bind(args, kwargs)
        turned = _turned(self, part, given) if given is not None and _ready(self, args[0] if args else None) else None
        if turned is None:
            return super().forward(*args, **kwargs)
        made = _products(self, self._pack)
        return made["proj"](_attended(self, part, made["qkv"](args[0]), turned))

    def _pack(self: Any, target: Target) -> Products:
        proj = self._modules[self._fast_reading.proj]
        return {
            "qkv": _pack_qkv(self, self._fast_reading, target, ""),
            "proj": packed(proj.weight, proj.bias, target),
        }


class PackedMultihead(FastMultihead):
    """nn.MultiheadAttention as two products and one attention between them."""

    _pack = PackedAttention._pack

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        part: reading.Attention = self._fast_reading
        given = part.call.bind(args, kwargs)
        if given is None or not _ready(self, given["query"]) or not fast.alone(self, given):
            return super().forward(*args, **kwargs)
        made = _products(self, self._pack)
        x = given["query"] if self.batch_first else given["query"].transpose(0, 1)
        out = made["proj"](_attended(self, part, made["qkv"](x), (None, 0)))
        return (out if self.batch_first else out.transpose(0, 1)), None


def _turned(module: Any, part: reading.Attention, given: dict[str, Any]) -> tuple[Tensor | None, int] | None:
    """How q and k turn in this call, as `fast.rotation` has it; None: packed weights are not for it."""
    x = given[part.call.names[0]]
    if x.ndim != 3 or part.call.unusual(given, (part.call.names[0], *reading.ROPES, *reading.COUNTS)):
        return None
    return fast.rotation(module, part, given, x.shape[1])


def _attended(module: Any, part: reading.Attention, qkv: Tensor, turned: tuple[Tensor | None, int]) -> Tensor | Normed:
    out = fast.attended(module, part, qkv, turned, paired=True)
    return out if part.inner is None else _late(module, part.inner, out)


class PackedBlock(FastBlock):
    """A block as four products and one attention; a branch that was not recognised is called between them."""

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        part: reading.Block = self._fast_reading
        given = part.call.bind(args, kwargs)
        x: Any = None if given is None else given[part.call.names[0]]
        passed = fast.handed_on(self, part, given) if given is not None and _ready(self, x) else None
        turned = None if passed is None else self._rotation(x, passed)
        if given is None or passed is None or turned is None:
            return super().forward(*args, **kwargs)
        made, offset = _products(self, self._pack), 1.0 if part.modulation is None else part.modulation.offset
        shift1 = scale1 = shift2 = scale2 = gate1 = gate2 = None
        if part.modulation is not None:
            shift1, scale1, gate1, shift2, scale2, gate2 = fast.modulations(self, part, given)
        flip = self._sequence_first()
        x = x.transpose(0, 1).contiguous() if flip else x
        if part.attention is not None:
            attn = self._modules[part.attn]
            qkv = made["qkv"](_late(self, part.norm1, x, shift1, scale1, offset))
            x = made["proj"](_attended(attn, part.attention, qkv, turned), add=x, gate=gate1)
        else:
            branch = self._attend(fast.normed(self, part.norm1, x, shift1, scale1, offset), passed)
            x = _joined(x, branch, vector(self, part.scale1) if gate1 is None else gate1)
        if part.feed is not None:
            h: Any = made["first"](_late(self, part.norm2, x, shift2, scale2, offset))
            h = h if part.feed.inner is None else _late(self._modules[part.mlp], part.feed.inner, h)
            x = made["last"](h, add=x, gate=gate2)
        else:
            branch = self._modules[part.mlp](fast.normed(self, part.norm2, x, shift2, scale2, offset))
            x = _joined(x, branch, vector(self, part.scale2) if gate2 is None else gate2)
        return x.transpose(0, 1) if flip else x

    def _sequence_first(self: Any) -> bool:
        part: reading.Block = self._fast_reading
        attn = self._modules[part.attn]
        return part.attention is not None and isinstance(attn, nn.MultiheadAttention) and not attn.batch_first

    def _rotation(self: Any, x: Tensor, passed: dict[str, Any]) -> tuple[Tensor | None, int] | None:
        part: reading.Block = self._fast_reading
        if part.attention is None or part.attention.layout == "in_proj":
            return None, 0
        given = part.attention.call.bind((x,), passed)
        return None if given is None else _turned(self._modules[part.attn], part.attention, given)

    def _pack(self: Any, target: Target) -> Products:
        part: reading.Block = self._fast_reading
        made: Products = {}
        if part.attention is not None:
            attn = self._modules[part.attn]
            made["qkv"] = _pack_qkv(attn, part.attention, target, "normed")
            made["proj"] = _pack_last(attn, part.attention.proj, vector(self, part.scale1), target)
        if part.feed is not None:
            mlp = self._modules[part.mlp]
            made["first"] = _pack_first(mlp, part.feed, target, "normed")
            made["last"] = _pack_last(mlp, part.feed.last, vector(self, part.scale2), target)
        return made


def _joined(x: Tensor, branch: Tensor, gate: Tensor | None) -> Tensor:
    return x + branch if gate is None else gate_residual(x, gate, branch)


# what each dense form becomes for inference
PACKED = {
    FastLinear: PackedPlainLinear,
    FastMlp: PackedMlp,
    FastAttention: PackedAttention,
    FastMultihead: PackedMultihead,
    FastBlock: PackedBlock,
}
