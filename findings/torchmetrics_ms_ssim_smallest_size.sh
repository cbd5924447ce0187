#!/usr/bin/env bash
# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
#
# torchmetrics 1.9.0: multiscale_structural_similarity_index_measure says that, for its five scales and window of 11, images
# must be larger than 160 pixels, and refuses those of 161 to 175 with that sentence: the side is divided by 16 and rounded
# down before it is compared. The smallest that it takes has 176. Seen:
#
#   161: refused, 168: refused, 175: refused ("must be larger than 160"); 176: 1.0000
set -euo pipefail
python=${PYTHON:-python3}
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"$python" -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torchmetrics==1.9.0 torch==2.13.0 numpy==2.4.6
"$folder/venv/bin/python" - <<'PYTHON'
from importlib.metadata import version

import torch
from torchmetrics.functional.image import multiscale_structural_similarity_index_measure

assert version("torchmetrics") == "1.9.0"
said = {}
for side in (161, 168, 175, 176):
    image = torch.rand(1, 3, side, side, generator=torch.Generator().manual_seed(0))
    try:
        said[side] = f"{multiscale_structural_similarity_index_measure(image, image, data_range=1.0).item():.4f}"
    except ValueError as error:
        assert "larger than 160" in str(error), error
        said[side] = "refused"
print(", ".join(f"{side}: {what}" for side, what in said.items()))
assert said == {161: "refused", 168: "refused", 175: "refused", 176: "1.0000"}, "its limit is another one now"
PYTHON
