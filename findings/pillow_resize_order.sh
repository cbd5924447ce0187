#!/usr/bin/env bash
# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
#
# Pillow 13.0.0 against 12.0.0 (numpy 2.4.6): the same Image.resize call gives other pixels for tall images. Bicubic
# resizing is two passes, each rounded and clipped to 8 bits, so the order shows. 12.0.0 goes across first; 13.0.0 goes
# down first for some shapes, without a word: portraits squeezed into a square, and images taller than 2 to 1 made
# smaller. Wide images are equal. Statistics (FID) or caches made with the two versions differ for portrait photographs.
# Two resize calls, one axis each, give the same pixels in both versions. Seen, on uniform noise, bicubic:
#
#   427 x 640 -> 256 x 256: up to 6 levels, 21.3 % of the values differ
#   300 x 900 -> 150 x 450: up to 5 levels, 21.1 % of the values differ
#   640 x 427 -> 256 x 256: up to 0 levels, 0.0 % of the values differ
#   one axis at a time: equal
set -euo pipefail
python=${PYTHON:-python3}
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat >"$folder/resize.py" <<'PYTHON'
import sys

import numpy as np
import PIL
from PIL import Image

assert PIL.__version__ == sys.argv[1], PIL.__version__
results = {}
for w, h, W, H in ((427, 640, 256, 256), (300, 900, 150, 450), (640, 427, 256, 256)):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (h, w, 3), dtype=np.uint8))
    across = image.resize((W, h), Image.Resampling.BICUBIC).resize((W, H), Image.Resampling.BICUBIC)
    results[f"{w} x {h} -> {W} x {H}"] = np.asarray(image.resize((W, H), Image.Resampling.BICUBIC))
    results[f"across {w} x {h}"] = np.asarray(across)
np.savez(sys.argv[2], **results)
PYTHON
"$python" -m pip install -q --target "$folder/numpy" numpy==2.4.6
for version in 12.0.0 13.0.0; do
  "$python" -m pip install -q --no-deps --target "$folder/$version" "pillow==$version"
  PYTHONPATH="$folder/$version:$folder/numpy" "$python" "$folder/resize.py" "$version" "$folder/$version.npz"
done
PYTHONPATH="$folder/numpy" "$python" - "$folder" <<'PYTHON'
import sys

import numpy as np

old, new = (np.load(f"{sys.argv[1]}/{version}.npz") for version in ("12.0.0", "13.0.0"))
difference = {name: np.abs(old[name].astype(int) - new[name].astype(int)) for name in old.files}
for name, d in difference.items():
    if not name.startswith("across"):
        print(f"{name}: up to {d.max()} levels, {100 * (d > 0).mean():.1f} % of the values differ")
apart = all(not d.any() for name, d in difference.items() if name.startswith("across"))
print("one axis at a time:", "equal" if apart else "not equal")
tall, taller, wide = (difference[name] for name in difference if not name.startswith("across"))
seen = tall.max() > 2 and taller.max() > 2 and not wide.any() and apart
raise SystemExit(0 if seen else "Pillow no longer behaves as described")
PYTHON
