#!/usr/bin/env bash
# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
#
# torchmetrics 1.9.0: mean_squared_error and mean_absolute_error take 8-bit images without a word and compute in 8 bits:
# differences below zero become 256 more, squares keep their last byte alone. Its peak_signal_noise_ratio turns the same
# tensors into floats first, so that the library's MSE and PSNR of one pair contradict each other. The classes do the same
# as the functions. A MAE of decoded images that is near half of 255, or larger than the root of the MSE, comes from here;
# .float() gives the right ones. Seen, noise of 64 x 64 against itself moved by up to 20 levels:
#
#   uint8:   MSE 76.0129, MAE 125.3743, PSNR 26.829731 dB; by the classes: MSE 76.0129, MAE 125.3743
#   float32: MSE 134.9296, MAE 9.9862, PSNR 26.829731 dB
#   numpy:   MSE 134.9296, MAE 9.9862, PSNR 26.829731 dB
set -euo pipefail
python=${PYTHON:-python3}
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"$python" -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torchmetrics==1.9.0 torch==2.13.0 numpy==2.4.6
"$folder/venv/bin/python" - <<'PYTHON'
from importlib.metadata import version

import numpy as np
import torch
from torchmetrics import MeanAbsoluteError, MeanSquaredError
from torchmetrics.functional import mean_absolute_error, mean_squared_error
from torchmetrics.functional.image import peak_signal_noise_ratio

assert version("torchmetrics") == "1.9.0"
rng = np.random.default_rng(0)
image = rng.integers(0, 256, (1, 3, 64, 64), dtype=np.uint8)
moved = np.clip(image + rng.integers(-20, 21, image.shape), 0, 255).astype(np.uint8)
difference = moved.astype(np.float64) - image
mse, mae = np.mean(difference**2), np.mean(np.abs(difference))
psnr = 10 * np.log10(255**2 / mse)


def measured(dtype: torch.dtype) -> tuple[float, float, float]:
    x, y = torch.from_numpy(moved).to(dtype), torch.from_numpy(image).to(dtype)
    return (
        mean_squared_error(x, y).item(),
        mean_absolute_error(x, y).item(),
        peak_signal_noise_ratio(x, y, data_range=255.0).item(),
    )


def said(values: tuple[float, float, float]) -> str:
    return "MSE {:.4f}, MAE {:.4f}, PSNR {:.6f} dB".format(*values)


bytes_, floats = measured(torch.uint8), measured(torch.float32)
x, y = torch.from_numpy(moved), torch.from_numpy(image)
classes = MeanSquaredError()(x, y).item(), MeanAbsoluteError()(x, y).item()
print(f"uint8:   {said(bytes_)}; by the classes: MSE {classes[0]:.4f}, MAE {classes[1]:.4f}")
print(f"float32: {said(floats)}")
print(f"numpy:   {said((mse, mae, psnr))}")
assert np.allclose(floats, (mse, mae, psnr), rtol=1e-5), "floats are not measured as the formulas say"
assert abs(bytes_[2] - psnr) < 1e-3, "the PSNR of bytes is another one now"
wrapped = moved - image
assert np.allclose(bytes_[:2], (np.mean(wrapped * wrapped), np.mean(wrapped)), rtol=1e-5), "bytes are not wrapped now"
assert classes == bytes_[:2], "the classes differ from the functions"
PYTHON
