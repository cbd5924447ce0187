# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""Plain-PyTorch peers: SiT, MAETok and the SD-VAE decoder written the way public code runs them.

No fused op, nothing hoisted, nothing pruned. They load the same state dicts as maetok_fast's models and give the same
outputs (tests/test_benchmarks.py), so a timing against them compares two ways to compute one thing. `attention` picks
how softmax(q k^T) v is computed: "naive" with the score matrix in memory, or "sdpa" with torch's fused kernel.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def attend(q: Tensor, k: Tensor, v: Tensor, attention: str) -> Tensor:
    """q, k, v (B, heads, N, head_dim) -> (B, N, heads * head_dim)."""
    if attention == "sdpa":
        out = F.scaled_dot_product_attention(q, k, v)
    else:
        out = ((q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)).softmax(dim=-1) @ v
    return out.transpose(1, 2).flatten(2)


def load_needed(model: torch.nn.Module, state: dict[str, Tensor], *, assign: bool = False) -> None:
    """Load what the model needs from a state dict; a missing or mis-shaped key is an error, extra keys are not."""
    missing, _ = model.load_state_dict(state, strict=False, assign=assign)
    if missing:
        raise ValueError(f"the state dict lacks {', '.join(missing[:5])}: it is not of the same variant")
