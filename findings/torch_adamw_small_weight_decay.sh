#!/usr/bin/env bash
# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
#
# torch 2.13.0: AdamW's weight decay of fp32 parameters does nothing where lr * weight_decay is below 3e-8. The decay is a
# product with 1 - lr * weight_decay, which is rounded to the parameter's dtype before it multiplies: exactly 1 for
# lr = 1e-4 and weight_decay = 1e-4, a usual recipe of image tokenizers. With a gradient of zero the parameter should lose
# 1e-4 of itself in 10,000 steps; it stays bit for bit what it was, in all three implementations. Seen:
#
#   fp32 for-loop 1.000000000, foreach 1.000000000, fused 1.000000000; fp64 for-loop 0.999900005
set -euo pipefail
python=${PYTHON:-python3}
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"$python" -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy==2.4.6
"$folder/venv/bin/python" - <<'PYTHON'
import torch

assert torch.__version__.split("+")[0] == "2.13.0", torch.__version__
rate = decay = 1e-4


def after(steps: int, dtype: torch.dtype, **options: bool) -> float:
    weight = torch.nn.Parameter(torch.ones(4, dtype=dtype))
    optimizer = torch.optim.AdamW([weight], lr=rate, weight_decay=decay, **options)
    weight.grad = torch.zeros_like(weight)
    for _ in range(steps):
        optimizer.step()
    return weight[0].item()


loop, foreach, fused = (
    after(10_000, torch.float32, **options) for options in ({"foreach": False}, {"foreach": True}, {"fused": True})
)
wide = after(10_000, torch.float64, foreach=False)
print(f"fp32 for-loop {loop:.9f}, foreach {foreach:.9f}, fused {fused:.9f}; fp64 for-loop {wide:.9f}")
assert (loop, foreach, fused) == (1.0, 1.0, 1.0), "fp32 parameters decay now"
assert abs(wide - (1 - rate * decay) ** 10_000) < 1e-9, "fp64 does not decay as the formula says"
PYTHON
