#!/usr/bin/env bash
# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
#
# torch 2.13.0: a torch.Generator on the CPU takes seeds of 64 bits, reports them back whole by initial_seed(), and draws by
# the low 32 alone: seeds that differ above them give the same numbers. A sampler that builds a sample's seed as
# (run << 32) + index, or from a 64-bit hash, gets the same noise in every run, or by chance in two samples of one. numpy's
# Philox keeps all 64. Seen:
#
#   seeds 3 and 3 + 2^32: initial_seed() 3 and 4294967299, torch.randn equal: True, torch.rand equal: True
#   seeds (1 << 32) + 7, (2 << 32) + 7, (3 << 32) + 7: 1 different noise
#   numpy 2.4.6, Philox keys 3 and 3 + 2^32: equal: False
set -euo pipefail
python=${PYTHON:-python3}
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"$python" -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy==2.4.6
"$folder/venv/bin/python" - <<'PYTHON'
import numpy as np
import torch

assert torch.__version__.split("+")[0] == "2.13.0", torch.__version__
assert np.__version__ == "2.4.6", np.__version__


def drawn(seed: int, fn=torch.randn) -> torch.Tensor:
    return fn(1000, generator=torch.Generator("cpu").manual_seed(seed))


low, high = 3, 3 + 2**32
seeds = [torch.Generator("cpu").manual_seed(seed).initial_seed() for seed in (low, high)]
equal = [torch.equal(drawn(low, fn), drawn(high, fn)) for fn in (torch.randn, torch.rand)]
print(
    f"seeds 3 and 3 + 2^32: initial_seed() {seeds[0]} and {seeds[1]}, torch.randn equal: {equal[0]}, "
    f"torch.rand equal: {equal[1]}"
)
noises = {drawn((run << 32) + 7).numpy().tobytes() for run in (1, 2, 3)}
print(f"seeds (1 << 32) + 7, (2 << 32) + 7, (3 << 32) + 7: {len(noises)} different noise")
rows = [np.random.Generator(np.random.Philox(key=seed)).standard_normal(1000) for seed in (low, high)]
print(f"numpy 2.4.6, Philox keys 3 and 3 + 2^32: equal: {np.array_equal(*rows)}")
assert seeds == [low, high]
assert equal == [True, True], "all bits of the seed count now"
assert len(noises) == 1
assert not np.array_equal(*rows)
PYTHON
