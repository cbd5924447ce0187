# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""`prepare(model)`: a model made ready to run fast, with the same API and the same results to rounding.

    SiT, LightningDiT ──┐            ┌── PreparedGenerator   (x, t, y) -> v;  plan(ts, y), step(plan, i, x)
                        ├─ prepare ──┤
    MAETok ─────────────┘            └── PreparedTokenizer   encode, decode

`rebuild` walks the model and returns a second one that runs the models' own code over other leaves; `prepared` is what
the caller holds; `plan` computes modulations ahead of the steps that use them.

Not supported: gradients and tangents, training-time label dropout and stochastic depth (the prepared model is in eval
mode), state dicts, copies and pickling, `.to(device)`, torch.compile over packed weights; each says so. The original
model is neither changed nor freed, the prepared one a snapshot with its own weights: prepare again after training on.
An enclosing autocast changes nothing, the dtype is `prepare`'s. On CUDA nothing is packed: the same structure runs
eagerly over the dense weights in the chosen dtype.
"""

from maetok_fast.inference.plan import Plan
from maetok_fast.inference.prepared import PreparedGenerator, PreparedTokenizer, prepare

__all__ = ["Plan", "PreparedGenerator", "PreparedTokenizer", "prepare"]
