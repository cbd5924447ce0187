# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""`rebuild(model, target)`: the models' own code over other leaves.

    every model   weights cast once to the compute dtype (or kept in another) and, on the CPU, packed
                  (kernels/packed_linear.py); RoPE tables kept per resolution
    every block   is four products and one attention, and nothing between them touches memory:
                    norm1, norm2   stay uncomputed (`Normed`) until the product behind them packs its rows
                    proj, fc2      move into the leaves by which a branch joins the stream (`ls1` and `ls2`, or
                                   `norm2.after` and `residual`), whose sum is their epilogue; LayerScale is folded into
                                   their weight
                    GELU, SwiGLU   are the epilogue of fc1, w12
    MoVQ          its modulation is one Linear per part, whose results are contiguous and nothing is copied

`_RULES` maps a type to what replaces it; a module without a rule is cloned and its children are rebuilt.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from maetok_fast.inference.packing import PACK_WIDTH, Target, packed, scaled
from maetok_fast.kernels.packed_linear import Normed, PackedLinear
from maetok_fast.layers import GatedResidual, LayerNorm, Mlp, Modulation, Residual, RMSNorm, SwiGLU, TimestepEmbedder
from maetok_fast.models.sit import AdaLNBlock, DiffusionTransformer
from maetok_fast.models.tokenizer import Decoder, Encoder
from maetok_fast.models.vit import Block

__all__ = ["rebuild"]

N = TypeVar("N", bound=nn.Module)
_Rule = Callable[[Any, Target], Any]


@torch.no_grad()
def rebuild(model: N, target: Target) -> N:
    """A second model of the same class and code over prepared leaves, in eval mode. The first is left as it is."""
    rebuilt: N = _rebuild(model, target).eval()
    return rebuilt


def _rebuild(module: nn.Module, target: Target) -> Any:
    for kind, rule in _RULES.items():
        if isinstance(module, kind):
            return rule(module, target)
    return _clone(module, target)


def _clone(module: Any, target: Target, child_rule: _Rule = _rebuild) -> Any:
    """A second module of the same class and settings: parameters copied, frozen and cast, children rebuilt."""
    clone = module.__class__.__new__(module.__class__)
    clone.__dict__.update({k: v.copy() if isinstance(v, dict) else v for k, v in module.__dict__.items()})
    for name, p in module._parameters.items():
        # RoPE frequencies are multiplied by positions up to 31: their angles need fp32
        wanted = torch.float32 if name == "freqs" else target.dtype
        clone._parameters[name] = (
            None if p is None else nn.Parameter(p.detach().to(wanted, copy=True), requires_grad=False)
        )
    for name, child in module._modules.items():
        clone._modules[name] = None if child is None else child_rule(child, target)
    return clone


def _plain(module: nn.Module, target: Target) -> Any:
    """Cast, with nothing packed below."""
    return _clone(module, target, _plain)


def _packed(
    linear: nn.Linear, target: Target, activation: str = "none", *, gated: bool = False, use: str = ""
) -> PackedLinear:
    return packed(linear.weight, linear.bias, target, activation, gated=gated, use=use)


def _linear(module: nn.Linear, target: Target) -> Any:
    narrow = min(module.weight.shape) < PACK_WIDTH and not target.own_products
    return _plain(module, target) if narrow else _packed(module, target)


def _timesteps(module: TimestepEmbedder, target: Target) -> Any:
    return (_clone if target.own_products else _plain)(module, target)


class _PackedMlp(nn.Module):
    """Linear -> GELU or SwiGLU as one product: the block's join has taken over the second Linear."""

    def __init__(self, mlp: Mlp | SwiGLU, target: Target) -> None:
        super().__init__()
        if isinstance(mlp, SwiGLU):
            self.first = _packed(mlp.w12, target, "silu", gated=True, use="normed")
        else:
            self.first = _packed(mlp.fc1, target, "gelu_tanh" if mlp.approximate == "tanh" else "gelu", use="normed")

    def forward(self, x: Tensor | Normed) -> Tensor:
        return self.first(x)


class _LateNorm(nn.Module):
    """A norm that the product behind it computes. With `linear`, a branch's last: `after(x, branch, gate, ...)` joins
    linear(branch) to the stream first."""

    def __init__(self, norm: LayerNorm | RMSNorm, target: Target, linear: PackedLinear | None = None) -> None:
        super().__init__()
        self.norm, self.linear = _plain(norm, target), linear

    def forward(
        self, x: Tensor, shift: Tensor | None = None, scale: Tensor | None = None, offset: float = 1.0
    ) -> Normed:
        norm = self.norm
        return Normed(x, shift, scale, norm.weight, norm.bias, norm.eps, offset, norm.kind)

    def after(
        self, x: Tensor, branch: Tensor, gate: Tensor, shift: Tensor | None, scale: Tensor | None, offset: float = 1.0
    ) -> tuple[Tensor, Normed]:
        assert self.linear is not None
        x = self.linear(branch, add=x, gate=gate)
        return x, self(x, shift, scale, offset)


class _LateGatedResidual(nn.Module):
    """A `GatedResidual` that holds the branch's last Linear."""

    def __init__(self, linear: PackedLinear) -> None:
        super().__init__()
        self.linear = linear

    def forward(self, x: Tensor, branch: Tensor, gate: Tensor) -> Tensor:
        return self.linear(branch, add=x, gate=gate)


class _LinearResidual(nn.Module):
    """A `Residual` that holds the branch's last Linear: x + gamma * linear(branch) in one product."""

    def __init__(self, linear: nn.Linear, gamma: Tensor | None, target: Target) -> None:
        super().__init__()
        self.linear = scaled(linear.weight, linear.bias, gamma, target)

    def forward(self, x: Tensor, branch: Tensor) -> Tensor:
        return self.linear(branch, add=x)

    def normed(
        self,
        x: Tensor,
        branch: Tensor,
        norm: _LateNorm,
        shift: Tensor | None = None,
        scale: Tensor | None = None,
        offset: float = 1.0,
    ) -> tuple[Tensor, Normed]:
        x = self(x, branch)
        return x, norm(x, shift, scale, offset)


class _SplitModulation(nn.Module):
    """A `Modulation` as one Linear per part of its output: each comes out contiguous instead of being copied."""

    def __init__(self, modulation: Modulation, count: int, target: Target) -> None:
        super().__init__()
        linear = modulation.linear
        self.linears = nn.ModuleList()
        for weight, bias in zip(linear.weight.chunk(count), linear.bias.chunk(count), strict=True):
            part = nn.Linear(weight.shape[1], weight.shape[0], device="meta")
            part.weight = nn.Parameter(weight.detach().to(target.dtype, copy=True), requires_grad=False)
            part.bias = nn.Parameter(bias.detach().to(target.dtype, copy=True), requires_grad=False)
            self.linears.append(part)

    def parts(self, x: Tensor, count: int, wanted: int) -> tuple[Tensor, ...]:
        assert count == len(self.linears)
        x = F.silu(x)
        return tuple(linear(x) for linear in self.linears[:wanted])


def _block(block: Block | AdaLNBlock, target: Target) -> Any:
    """proj and fc2 (w3) move into the leaves that join their branches, and the norms into the products behind them."""
    last = block.mlp.w3 if isinstance(block.mlp, SwiGLU) else block.mlp.fc2

    def leaf(child: nn.Module, target: Target) -> Any:
        if child is block.attn:
            return _clone(child, target, leaf)
        if child is block.attn.qkv:
            return _packed(child, target, use="normed")
        if child is block.attn.proj:
            return nn.Identity()
        if child is block.mlp:
            return _PackedMlp(block.mlp, target)
        if child is block.norm2 and not isinstance(block, Block):
            return _LateNorm(block.norm2, target, _packed(block.attn.proj, target, use="joined"))
        if child is block.norm1 or child is block.norm2:
            return _LateNorm(child, target)
        if isinstance(child, GatedResidual):
            return _LateGatedResidual(_packed(last, target, use="joined"))
        if isinstance(child, Residual):
            return _LinearResidual(block.attn.proj if child is block.ls1 else last, child.gamma, target)
        if isinstance(child, Modulation) and isinstance(block, Block):
            return _SplitModulation(child, 4, target)
        return _rebuild(child, target)

    return _clone(block, target, leaf)


def _with_constant_rope(module: nn.Module, target: Target) -> Any:
    """Tables are constants of the weights and the resolution: keep those of the last few resolutions."""
    clone = _clone(module, target)
    clone.rope = functools.lru_cache(maxsize=4)(clone.rope)
    return clone


_RULES: dict[type, _Rule] = {
    nn.Linear: _linear,
    TimestepEmbedder: _timesteps,
    Block: _block,
    AdaLNBlock: _block,
    Encoder: _with_constant_rope,
    Decoder: _with_constant_rope,
    DiffusionTransformer: _with_constant_rope,
}
