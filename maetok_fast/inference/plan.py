# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""Plan: the steps of one sampling run, whose adaLN modulations are computed a chunk at a time.

(t_0 .. t_S) x (unique labels) ── one GEMM per block for a chunk ──> rows ── of_step(i) ──> that step's (B, ...)
"""

from __future__ import annotations

import torch
from torch import Tensor

from maetok_fast.models.sit import Modulations

__all__ = ["PLAN_ROWS", "Plan"]

# Rows of modulations held at once: 200 MB of bf16 for SiT-XL, and enough rows to keep a GEMM at full rate.
PLAN_ROWS = 512


class Plan:
    """What `PreparedGenerator.plan` returns: steps ts (S,), labels without repeats, and the modulations of one chunk of
    at most `PLAN_ROWS` (step, label) rows, which `step` replaces as it goes."""

    def __init__(self, ts: Tensor, y: Tensor, conditions: dict[str, Tensor] | None = None) -> None:
        self.ts, self.batch = ts, len(y)
        self.conditions = conditions or {}  # r, beta, (S,) each
        self.labels, rows = y.unique(return_inverse=True)
        # equal to 0 .. B-1: one step's rows are then a slice of the chunk and nothing is gathered
        self.rows = None if torch.equal(rows, torch.arange(len(y), device=y.device)) else rows
        self.chunk_steps = max(1, PLAN_ROWS // len(self.labels))
        self.first = -1
        self.modulations: Modulations | None = None

    def chunk(self) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Times fp32, labels and conditions of the rows of the chunk that begins at step `first`."""
        steps = slice(self.first, self.first + self.chunk_steps)

        def rows(values: Tensor) -> Tensor:
            return values[steps].float().repeat_interleave(len(self.labels))

        t = rows(self.ts)
        return t, self.labels.repeat(len(self.ts[steps])), {name: rows(v) for name, v in self.conditions.items()}

    def of_step(self, i: int) -> Modulations:
        """The modulations (B, ...) of step i, which must lie in the chunk held."""
        assert self.modulations is not None
        start = (i - self.first) * len(self.labels)
        if self.rows is None:
            return self.modulations.rows(slice(start, start + len(self.labels)))
        return self.modulations.rows(start + self.rows)
