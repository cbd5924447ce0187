#!/usr/bin/env bash
# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
#
# torchmetrics 1.9.0: structural_similarity_index_measure averages over places whose 11 x 11 window reaches beyond the image
# too, filled by reflection. scikit-image 0.26.0 with the same window (Gaussian, sigma 1.5, population covariance) averages
# over whole windows only, so that two tables of reconstructions do not compare: images whose borders differ count more.
# The map that return_full_image gives, cut by 5 pixels on each side, has scikit-image's mean. Seen, noise of 64 x 64
# against itself with a grey frame of 9 pixels:
#
#   torchmetrics 0.549748, its map without 5 pixels at the border 0.767530, scikit-image 0.767530
set -euo pipefail
python=${PYTHON:-python3}
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"$python" -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torchmetrics==1.9.0 torch==2.13.0 scikit-image==0.26.0 numpy==2.4.6
"$folder/venv/bin/python" - <<'PYTHON'
from importlib.metadata import version

import numpy as np
import torch
from skimage.metrics import structural_similarity
from torchmetrics.functional.image import structural_similarity_index_measure

assert (version("torchmetrics"), version("scikit-image")) == ("1.9.0", "0.26.0")
noise = np.random.default_rng(0).integers(0, 256, (64, 64), dtype=np.uint8)
framed = np.full_like(noise, 128)
framed[9:-9, 9:-9] = noise[9:-9, 9:-9]
x, y = (torch.from_numpy(image)[None, None].double() for image in (framed, noise))
mean, whole = structural_similarity_index_measure(
    x, y, sigma=1.5, data_range=255.0, reduction="none", return_full_image=True
)
inner = whole[..., 5:-5, 5:-5].mean().item()
other = structural_similarity(
    noise, framed, data_range=255, gaussian_weights=True, sigma=1.5, use_sample_covariance=False
)
print(f"torchmetrics {mean.item():.6f}, its map without 5 pixels at the border {inner:.6f}, scikit-image {other:.6f}")
assert abs(inner - other) < 1e-9, "the inner windows differ"
assert abs(mean.item() - other) > 0.2, "the means agree now"
PYTHON
