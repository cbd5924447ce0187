# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""Small models for the tests of checkpoints."""

from __future__ import annotations

from typing import Any

import torch

from maetok_fast.models import MAETokConfig, ViTSize

SIZE = ViTSize(64, 2, 1)  # head_dim 64, as every public ViT: heads need no config.json
TINY = MAETokConfig(image_size=64, base_image_size=64, num_latent_tokens=4, latent_dim=6, encoder=SIZE, decoder=SIZE)
GENERATOR: dict[str, Any] = {"channels": 5, "dim": 48, "depth": 2, "heads": 4, "num_classes": 10}


def random(model: Any, seed: int = 0) -> Any:
    """The model with every parameter random, in eval mode."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn_like(p) * 0.2)
    return model.eval()


def same(a: Any, b: Any) -> None:
    """Asserts that two models have one configuration and the same values under the same names."""
    assert a.config == b.config
    x, y = a.state_dict(), b.state_dict()
    assert x.keys() == y.keys()
    assert all(torch.equal(x[k], y[k]) for k in x)
