# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""`prepare(model)`: a model made ready to run fast, with the same API and the same results to rounding.

SiT, LightningDiT ──┐            ┌── PreparedGenerator   (x, t, y) -> v;  plan(ts, y), step(plan, i, x)
                    ├─ prepare ──┤
MAETok ─────────────┘            └── PreparedTokenizer   encode, decode

prepared.py   what the caller holds      plan.py   a sampling run's modulations      rebuild.py   the walk, the rules
packing.py    how one weight is packed, for `maetok_fast.accelerate` too
"""

from maetok_fast.inference.plan import Plan
from maetok_fast.inference.prepared import PreparedGenerator, PreparedTokenizer, prepare

__all__ = ["Plan", "PreparedGenerator", "PreparedTokenizer", "prepare"]
