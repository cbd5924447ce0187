#!/usr/bin/env bash
# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
#
# torchdiffeq 0.2.5 (torch 2.14.1, scipy 1.17.1): odeint(method="dopri5") evaluates the right-hand side far outside the
# interval that it is asked to integrate over. Its last step is not shortened to the end; it steps past and interpolates
# back. The result is right for a field that exists there, but a model of t in [0, 1] (a time embedding, a path whose
# sigma is sqrt(t)) is asked for times that it was never trained on, or that have no value. options={"step_t": end}
# stops at the end. Seen, for dx/dt = -0.1 x:
#
#   0 -> 1, the times asked for: 0 .. 5.431; with step_t: 0.0000 .. 1.0000
#   1 -> 0, the times asked for: -4.513 .. 1; with step_t: 0.0000 .. 1.0000
#
# Runs in the interpreter $PYTHON (default python3); torch and scipy are installed too where it has none.
set -euo pipefail
python=${PYTHON:-python3}
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"$python" -c 'import torch, scipy' 2>/dev/null ||
  "$python" -m pip install -q --target "$folder" torch==2.14.1 scipy==1.17.1
"$python" -m pip install -q --no-deps --target "$folder" torchdiffeq==0.2.5
PYTHONPATH="$folder" "$python" - <<'PYTHON'
import torch
from torchdiffeq import odeint

ok = True
for start, end in ((0.0, 1.0), (1.0, 0.0)):
    ranges = []
    for options in ({}, {"step_t": torch.tensor([end], dtype=torch.float64)}):
        seen = []

        def field(t, x):
            seen.append(float(t))
            return -0.1 * x

        x = torch.ones(3, dtype=torch.float64)
        ts = torch.tensor([start, end], dtype=torch.float64)
        y = odeint(field, x, ts, method="dopri5", rtol=1e-5, atol=1e-5, options=options)[-1]
        exact = torch.exp(torch.tensor(-0.1 * (end - start), dtype=torch.float64))
        assert (y - exact).abs().max() < 1e-5
        ranges.append((min(seen), max(seen)))
    (low, high), (low_kept, high_kept) = ranges
    kept = f"{low_kept:.4f} .. {high_kept:.4f}"
    print(f"{start:g} -> {end:g}, the times asked for: {low:.4g} .. {high:.4g}; with step_t: {kept}")
    ok &= (low < -1 or high > 2) and -1e-9 < low_kept and high_kept < 1 + 1e-9
raise SystemExit(0 if ok else "torchdiffeq no longer behaves as described")
PYTHON
