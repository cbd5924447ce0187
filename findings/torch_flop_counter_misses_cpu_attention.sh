#!/usr/bin/env bash
# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
#
# torch 2.14.1: FlopCounterMode counts nothing for scaled_dot_product_attention on a CPU where the fused kernel takes it. The
# same call on meta tensors, or with the fused kernel off, is counted in full, 4 B H N^2 D. A transformer's FLOPs counted on
# the CPU, and an MFU made of them, are too small by its attention; on meta tensors they are right, and free.
# Seen (B 2, H 4, N 256, D 64: 134217728 by the formula):
#
#   cpu, as it comes        0
#   cpu, math kernel        134217728
#   meta                    134217728
set -euo pipefail
python=${PYTHON:-python3}
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"$python" -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.14.1 numpy==2.4.6
"$folder/venv/bin/python" - <<'PYTHON'
import contextlib

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

assert torch.__version__.split("+")[0] == "2.14.1", torch.__version__
B, H, N, D = 2, 4, 256, 64
seen = []


def count(name, device, context):
    q, k, v = torch.randn(3, B, H, N, D, device=device).unbind(0)
    with FlopCounterMode(display=False) as counter, torch.no_grad(), context:
        F.scaled_dot_product_attention(q, k, v)
    seen.append(counter.get_total_flops())
    print(f"{name:23} {seen[-1]}")


count("cpu, as it comes", "cpu", contextlib.nullcontext())
count("cpu, math kernel", "cpu", sdpa_kernel(SDPBackend.MATH))
count("meta", "meta", contextlib.nullcontext())
assert seen == [0, 4 * B * H * N * N * D, 4 * B * H * N * N * D], seen
PYTHON
