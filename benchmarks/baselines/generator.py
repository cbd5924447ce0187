# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""A training step of SiT as public code makes it: every kernel torch's own, the optimizer and the average as written
there.

    labels dropped, t ~ U, x_t = (1 - t) z + t e ── SiT (sit.py, torch's fused attention) ── mean (v - (e - z))^2
    backward ── clip_grad_norm_(1.0) ── torch.optim.AdamW with its defaults ── the average, parameter by parameter

Under bf16 the forward runs in autocast; weights, moments and average are fp32.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks._parts import Parts
from benchmarks.baselines.sit import SiT

__all__ = ["PublicGeneratorStep"]


class PublicGeneratorStep:
    """One optimizer step: `step(z (B, L, C), y (B,))` -> its loss, on the host.

    model: `SiT`'s arguments. dtype: torch.float32, or the 16-bit one of autocast. timings: seconds of the last step by
    part, of `PARTS`."""

    def __init__(
        self,
        model: Mapping[str, Any],
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        seed: int = 0,
    ) -> None:
        torch.manual_seed(seed)
        self.device, self.dtype = torch.device(device), dtype
        self.model = SiT(**model, attention="sdpa").to(self.device)
        self.model.pos_embed.requires_grad_(False)
        self.null = self.model.y_embedder.embedding_table.num_embeddings - 1
        self.ema = copy.deepcopy(self.model).requires_grad_(False)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, betas=(0.9, 0.999), weight_decay=0.0)
        self.timings: dict[str, float] = {}

    def __call__(self, z: Tensor, y: Tensor) -> float:
        parts = Parts(self.device)
        with parts("forward"):
            y = torch.where(torch.rand(len(y), device=y.device) < 0.1, self.null, y)
            t, noise = torch.rand(len(z), device=z.device), torch.randn_like(z)
            at = t.view(-1, 1, 1)
            x, target = (1 - at) * z + at * noise, noise - z
            with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
                v = self.model(x, t, y)
            loss = F.mse_loss(v.float(), target)
        with parts("backward"):
            loss.backward()
        with parts("optimizer"):
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        with parts("EMA"), torch.no_grad():
            average = dict(self.ema.named_parameters())
            for name, p in self.model.named_parameters():
                average[name].mul_(0.9999).add_(p.data, alpha=1 - 0.9999)
        self.timings = parts.seconds
        return loss.item()
