# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""`rebuild(model, dtype)`: the models' own code over other leaves.

    every model   weights cast once to the compute dtype and, on the CPU, packed for oneDNN (kernels/linear.py);
                  GELU / SiLU in the GEMM's epilogue or one native pass; RoPE tables kept per resolution
    tokenizer     a branch's last Linear (proj, fc2) moves into the block's `ls1` / `ls2`, the leaves by which a branch
                  joins the stream: LayerScale is folded into its weight and the residual added in its epilogue;
                  MoVQ's modulation is one Linear per part, whose results are contiguous and nothing is copied

`_RULES` maps a type to what replaces it; a module without a rule is cloned and its children are rebuilt.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from maetok_fast.kernels.linear import PackedLinear
from maetok_fast.layers import LayerNorm, Mlp, Modulation, Residual, SwiGLU, TimestepEmbedder
from maetok_fast.models.sit import DiffusionTransformer
from maetok_fast.models.tokenizer import Decoder, Encoder
from maetok_fast.models.vit import Block

__all__ = ["rebuild"]

# Layers narrower than this gain nothing from packing (quant_conv, the latents' modulations) and stay nn.Linear.
PACK_WIDTH = 64

N = TypeVar("N", bound=nn.Module)
_Rule = Callable[[Any, torch.dtype], Any]


@torch.no_grad()
def rebuild(model: N, dtype: torch.dtype) -> N:
    """A second model of the same class and code over prepared leaves, in eval mode. The first is left as it is."""
    rebuilt: N = _rebuild(model, dtype).eval()
    return rebuilt


def _rebuild(module: nn.Module, dtype: torch.dtype) -> Any:
    for kind, rule in _RULES.items():
        if isinstance(module, kind):
            return rule(module, dtype)
    return _clone(module, dtype)


def _clone(module: Any, dtype: torch.dtype, child_rule: _Rule = _rebuild) -> Any:
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
        clone._modules[name] = None if child is None else child_rule(child, dtype)
    return clone


def _plain(module: nn.Module, dtype: torch.dtype) -> Any:
    """Cast, with nothing packed below."""
    return _clone(module, dtype, _plain)


def _linear(module: nn.Linear, dtype: torch.dtype) -> Any:
    if min(module.weight.shape) < PACK_WIDTH:
        return _plain(module, dtype)
    return PackedLinear.of(module, dtype=dtype)


class _PackedMlp(nn.Module):
    """act in fc1's epilogue. Without fc2 where the block's `ls2` has taken it over."""

    def __init__(self, mlp: Mlp, dtype: torch.dtype, with_fc2: bool = True) -> None:
        super().__init__()
        self.fc1 = PackedLinear.of(mlp.fc1, "gelu_tanh" if mlp.approximate == "tanh" else "gelu", dtype=dtype)
        self.fc2 = PackedLinear.of(mlp.fc2, dtype=dtype) if with_fc2 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.fc1(x))


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


class _LinearResidual(nn.Module):
    """A `Residual` that holds the branch's last Linear: x + gamma * linear(branch) in one GEMM."""

    def __init__(self, linear: nn.Linear, gamma: Tensor | None, dtype: torch.dtype) -> None:
        super().__init__()
        self.linear = _scaled(linear, gamma, dtype)

    def forward(self, x: Tensor, branch: Tensor) -> Tensor:
        return self.linear(branch, add=x)

    def normed(
        self,
        x: Tensor,
        branch: Tensor,
        norm: LayerNorm,
        shift: Tensor | None = None,
        scale: Tensor | None = None,
        offset: float = 1.0,
    ) -> tuple[Tensor, Tensor]:
        x = self(x, branch)
        return x, norm(x, shift, scale, offset)


def _scaled(linear: nn.Linear, gamma: Tensor | None, dtype: torch.dtype) -> PackedLinear:
    """gamma * linear(x) as one layer; the product is rounded once."""
    if gamma is None:
        return PackedLinear.of(linear, dtype=dtype)
    wide = torch.promote_types(torch.float32, linear.weight.dtype)
    gamma = gamma.to(wide)
    bias = None if linear.bias is None else linear.bias.to(wide) * gamma
    return PackedLinear(linear.weight.to(wide) * gamma[:, None], bias, dtype=dtype)


class _SplitModulation(nn.Module):
    """A `Modulation` as one Linear per part of its output: each comes out contiguous instead of being copied."""

    def __init__(self, modulation: Modulation, count: int, dtype: torch.dtype) -> None:
        super().__init__()
        linear = modulation.linear
        self.linears = nn.ModuleList()
        for weight, bias in zip(linear.weight.chunk(count), linear.bias.chunk(count), strict=True):
            part = nn.Linear(weight.shape[1], weight.shape[0], device="meta")
            part.weight = nn.Parameter(weight.detach().to(dtype, copy=True), requires_grad=False)
            part.bias = nn.Parameter(bias.detach().to(dtype, copy=True), requires_grad=False)
            self.linears.append(part)

    def parts(self, x: Tensor, count: int, wanted: int) -> tuple[Tensor, ...]:
        assert count == len(self.linears)
        x = F.silu(x)
        return tuple(linear(x) for linear in self.linears[:wanted])


def _block(block: Block, dtype: torch.dtype) -> Any:
    """proj and fc2 move into ls1 and ls2."""

    def leaf(child: nn.Module, dtype: torch.dtype) -> Any:
        if child is block.attn:
            return _clone(child, dtype, leaf)
        if child is block.attn.proj:
            return nn.Identity()
        if child is block.mlp:
            return _PackedMlp(block.mlp, dtype, with_fc2=False)
        if isinstance(child, Residual):
            return _LinearResidual(block.attn.proj if child is block.ls1 else block.mlp.fc2, child.gamma, dtype)
        if isinstance(child, Modulation):
            return _SplitModulation(child, 4, dtype)
        return _rebuild(child, dtype)

    return _clone(block, dtype, leaf)


def _with_constant_rope(module: nn.Module, dtype: torch.dtype) -> Any:
    """Tables are constants of the weights and the resolution: keep those of the last few resolutions."""
    clone = _clone(module, dtype)
    clone.rope = functools.lru_cache(maxsize=4)(clone.rope)
    return clone


_RULES: dict[type, _Rule] = {
    nn.Linear: _linear,
    TimestepEmbedder: _plain,
    Mlp: _PackedMlp,
    SwiGLU: _PackedSwiGLU,
    Block: _block,
    Encoder: _with_constant_rope,
    Decoder: _with_constant_rope,
    DiffusionTransformer: _with_constant_rope,
}
