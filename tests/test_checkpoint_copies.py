# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""Which copy of the weights a training file gives, under which prefix, and what is said where it gives none."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest
import torch
from checkpoint_models import TINY, random, same

from maetok_fast.models import (
    MAETok,
)


@pytest.fixture
def tiny() -> MAETok:
    return random(MAETok(TINY))


def test_training_file(tiny: MAETok, tmp_path: Path) -> None:
    other = random(MAETok(TINY), seed=1)
    extras = {
        "projection.0.weight": torch.zeros(2),
        "repa_model.blocks.0.x": torch.zeros(2),
        "clip_model.y": torch.zeros(1),
        "decoder_hog.model.z": torch.zeros(1),
        "post_quant_conv_dino.weight": torch.zeros(192, 32),
        "to_pixel_clip.bias": torch.zeros(1152),
        "hog_generator.w": torch.zeros(1),
        "quantize.embedding.weight": torch.zeros(1),
    }
    torch.save(
        {
            "model": {f"module.{k}": v for k, v in (other.state_dict() | extras).items()},
            "ema": {f"_orig_mod.module.{k}": v for k, v in (tiny.state_dict() | extras).items()},
            "optimizer": {"state": {}, "param_groups": [{"lr": 1e-4}]},
            "discriminator": {"w": torch.zeros(1)},
            "steps": 500,
            "args": argparse.Namespace(vq_model="AE", lr=1e-4),
        },
        tmp_path / "0500000.pt",
    )
    same(MAETok.from_pretrained(tmp_path / "0500000.pt"), tiny)
    same(MAETok.from_pretrained(tmp_path, prefer="model"), other)
    torch.save({"model": other.state_dict()}, tmp_path / "no_ema.pt")
    same(MAETok.from_pretrained(tmp_path / "no_ema.pt"), other)
    torch.save({"model": other.state_dict(), "ema": {}}, tmp_path / "empty_ema.pt")
    same(MAETok.from_pretrained(tmp_path / "empty_ema.pt"), other)
    with pytest.raises(ValueError, match="prefer 'best'"):
        MAETok.from_pretrained(tmp_path, prefer="best")
