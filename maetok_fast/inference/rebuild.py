# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""The walk over a model: a second one that runs the models' own code over other leaves.

every model      weights cast once to the compute dtype and, on the CPU, packed for oneDNN (kernels/linear.py);
                 GELU / SiLU in the GEMM's epilogue or one native pass; RoPE tables made once per resolution
generators       a plan computes the adaLN modulations of many (t, label) pairs in one GEMM per block: a third of
                 SiT-XL's weights is then read once per chunk of steps and not once per step, and equal labels
                 (the null class of a guided batch) share one row per step
tokenizer        LayerScale folded into the weights before it; the residual added in the GEMM's epilogue. As in the
                 models themselves, the decoder's first block norms and projects its N equal image tokens once, and
                 last blocks compute only the tokens that are read
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from maetok_fast.kernels.linear import PackedLinear
from maetok_fast.layers import Mlp, Modulation, SwiGLU, TimestepEmbedder
from maetok_fast.models.sit import DiffusionTransformer
from maetok_fast.models.tokenizer import Decoder, Encoder
from maetok_fast.models.vit import Block, MoVQBlock

__all__ = ["rebuild"]

# Layers narrower than this gain nothing from packing (quant_conv, the latents' modulations) and stay nn.Linear.
PACK_WIDTH = 64


def rebuild(module: nn.Module, dtype: torch.dtype) -> Any:
    """The same module over prepared leaves; types without a rule are cloned, their children rebuilt."""
    for kind, rule in _RULES.items():
        if isinstance(module, kind):
            return rule(module, dtype)
    return _clone(module, dtype)


def _clone(module: Any, dtype: torch.dtype, rebuild: Callable[[nn.Module, torch.dtype], Any] = rebuild) -> Any:
    """A second module of the same class and settings: parameters copied, frozen and cast, children rebuilt."""
    clone = module.__class__.__new__(module.__class__)
    clone.__dict__.update({k: v.copy() if isinstance(v, dict) else v for k, v in module.__dict__.items()})
    for name, p in module._parameters.items():
        # RoPE frequencies are multiplied by positions up to 31: their angles need fp32
        wanted = torch.float32 if name == "freqs" else dtype
        clone._parameters[name] = (
            None if p is None else nn.Parameter(p.detach().to(wanted, copy=True), requires_grad=False)
        )
    for name, child in module._modules.items():
        clone._modules[name] = None if child is None else rebuild(child, dtype)
    return clone


def _plain(module: nn.Module, dtype: torch.dtype) -> Any:
    """Cast, with nothing packed below."""
    return _clone(module, dtype, _plain)


def _linear(module: nn.Linear, dtype: torch.dtype) -> Any:
    if min(module.weight.shape) < PACK_WIDTH:
        return _plain(module, dtype)
    return PackedLinear.of(module, dtype=dtype)


class _PackedMlp(nn.Module):
    """act in fc1's epilogue."""

    def __init__(self, mlp: Mlp, dtype: torch.dtype) -> None:
        super().__init__()
        self.hidden = PackedLinear.of(mlp.fc1, "gelu_tanh" if mlp.approximate == "tanh" else "gelu", dtype=dtype)
        self.fc2 = PackedLinear.of(mlp.fc2, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.hidden(x))


class _PackedSwiGLU(nn.Module):
    """w12 as two layers, so that silu(a) * b is the second one's epilogue."""

    def __init__(self, mlp: SwiGLU, dtype: torch.dtype) -> None:
        super().__init__()
        (wa, wb), (ba, bb) = mlp.w12.weight.chunk(2), mlp.w12.bias.chunk(2)
        self.a = PackedLinear(wa, ba, "silu", dtype=dtype)
        self.b = PackedLinear(wb, bb, dtype=dtype)
        self.w3 = PackedLinear.of(mlp.w3, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.w3(self.b(x, mul=self.a(x)))


def _scaled(linear: nn.Linear, gamma: Tensor | None, dtype: torch.dtype) -> PackedLinear:
    """gamma * linear(x) as one layer; the product is rounded once."""
    if gamma is None:
        return PackedLinear.of(linear, dtype=dtype)
    wide = torch.promote_types(torch.float32, linear.weight.dtype)
    gamma = gamma.to(wide)
    bias = None if linear.bias is None else linear.bias.to(wide) * gamma
    return PackedLinear(linear.weight.to(wide) * gamma[:, None], bias, dtype=dtype)


class _SplitModulation(nn.Module):
    """One layer per part of a `Modulation`: each comes out contiguous instead of being copied, if it is asked for."""

    def __init__(self, modulation: Modulation, count: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.parts = nn.ModuleList()
        linear = modulation.linear
        for weight, bias in zip(linear.weight.chunk(count), linear.bias.chunk(count), strict=True):
            part = nn.Linear(weight.shape[1], weight.shape[0], device="meta")
            part.weight = nn.Parameter(weight.detach().to(dtype, copy=True), requires_grad=False)
            part.bias = nn.Parameter(bias.detach().to(dtype, copy=True), requires_grad=False)
            self.parts.append(part)

    def split(self, c: Tensor, parts: int, used: int) -> list[Tensor]:
        activated = F.silu(c)
        return [part(activated) for part in self.parts[:used]]


class _Added(nn.Module):
    """A `Residual` whose sum is the layer's epilogue; LayerScale is in the layer's weights."""

    def forward(self, x: Tensor, layer: PackedLinear, y: Tensor) -> Tensor:
        return layer(y, add=x)

    def then_norm(
        self, x: Tensor, layer: PackedLinear, y: Tensor, norm: nn.Module, *shift_scale: Any, offset: float = 1.0
    ) -> tuple[Tensor, Tensor]:
        x = layer(y, add=x)
        return x, norm(x, *shift_scale, offset=offset)


def _block(block: Block, dtype: torch.dtype) -> Any:
    clone = _clone(block, dtype)
    clone.attn.proj = _scaled(block.attn.proj, block.ls1.gamma, dtype)
    clone.mlp.fc2 = _scaled(block.mlp.fc2, block.ls2.gamma, dtype)
    clone.ls1 = clone.ls2 = _Added()
    return clone


def _movq_block(block: MoVQBlock, dtype: torch.dtype) -> Any:
    clone = _clone(block, dtype)
    clone.attn.proj = PackedLinear.of(block.attn.proj, dtype=dtype)
    clone.residual = _Added()
    clone.adaLN_modulation = _SplitModulation(block.adaLN_modulation, 4, dtype)
    return clone


def _constant_rope(clone: Any) -> Any:
    """Tables are constants of the weights and the resolution: keep those of the last few resolutions."""
    clone.rope = functools.lru_cache(maxsize=4)(clone.rope)
    return clone


_RULES: dict[type, Callable[[Any, torch.dtype], Any]] = {
    nn.Linear: _linear,
    TimestepEmbedder: _plain,
    Mlp: _PackedMlp,
    SwiGLU: _PackedSwiGLU,
    Block: _block,
    MoVQBlock: _movq_block,
    Decoder: lambda module, dtype: _constant_rope(_clone(module, dtype)),
    Encoder: lambda module, dtype: _constant_rope(_clone(module, dtype)),
    DiffusionTransformer: lambda module, dtype: _constant_rope(_clone(module, dtype)),
}
