# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""One line in front of a ViT that somebody else wrote: before, after, and that both say the same.

    python examples/accelerate_a_vit.py                        timm's vit_base_patch16_224, 8 images, random weights
    python examples/accelerate_a_vit.py vit_small_patch14_dinov2 2      another of timm's, and how many images

Needs timm (`pip install timm`, which brings torchvision).
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable

import torch

import maetok_fast


def median(call: Callable[[], object], rounds: int = 5) -> float:
    """Seconds."""
    call()
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


@torch.no_grad()
def main(words: list[str]) -> None:
    try:
        import timm
    except ImportError:
        print("timm is not installed: pip install timm")
        return
    name, count = (*words, *("vit_base_patch16_224", "8")[len(words) :])[:2]
    torch.manual_seed(0)
    model = timm.create_model(name).eval()
    size = model.pretrained_cfg["input_size"][-1]
    images = torch.randn(int(count), 3, size, size)
    features, before = model.forward_features(images), median(lambda: model(images))

    maetok_fast.accelerate(model, for_inference=True)

    error = (model.forward_features(images) - features).norm() / features.norm()
    after = median(lambda: model(images))
    print(f"{name}, {count} images: before {before * 1e3:.0f} ms, after {after * 1e3:.0f} ms, {before / after:.2f} x")
    print(f"features differ by {error:.1e} of their size")


if __name__ == "__main__":
    main(sys.argv[1:])
