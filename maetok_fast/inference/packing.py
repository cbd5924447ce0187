# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""How a weight is packed for inference: what `prepare` (rebuild.py) and `accelerate(for_inference=True)` share."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from maetok_fast.kernels.packed_linear import PackedLinear, candidates

__all__ = ["PACK_WIDTH", "Target", "packed", "scaled"]

# Layers narrower than this gain nothing from packing (quant_conv, the latents' modulations) and stay nn.Linear.
PACK_WIDTH = 64


@dataclass(frozen=True)
class Target:
    """dtype: of activations and arithmetic. weights: in which packed weights are kept. own_products: every Linear,
    narrow ones too, by the native GEMM, whose rows depend on no other row."""

    dtype: torch.dtype
    weights: torch.dtype
    own_products: bool = False

    def backend(self) -> str | None:
        """Of packed layers; None: the fastest."""
        if not self.own_products:
            return None
        return next(c for c in candidates(self.dtype, self.weights, torch.device("cpu")) if c.startswith("native"))


def packed(
    weight: Tensor, bias: Tensor | None, target: Target, activation: str = "none", *, gated: bool = False, use: str = ""
) -> PackedLinear:
    """act(x weight^T + bias): weight (out, in), bias (out,) or None; gated and use as `PackedLinear` has them."""
    return PackedLinear(
        weight,
        bias,
        activation,
        gated=gated,
        dtype=target.dtype,
        weights=target.weights,
        backend=target.backend(),
        use=use,
    )


def scaled(weight: Tensor, bias: Tensor | None, gamma: Tensor | None, target: Target) -> PackedLinear:
    """gamma * linear(x) as one layer, the last of a branch that is added to the stream; the product is rounded once."""
    if gamma is not None:
        wide = torch.promote_types(torch.float32, weight.dtype)
        gamma = gamma.to(wide)
        bias = None if bias is None else bias.to(wide) * gamma
        weight = weight.to(wide) * gamma[:, None]
    return packed(weight, bias, target, use="joined")
