# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""From labels to a PNG, in Python.

    python examples/sample_to_png.py                                    small random models: patterns
    python examples/sample_to_png.py TOKENIZER GENERATOR 207 360 387    checkpoints of yours, and class labels

What `maetok-fast sample` does with many pictures, files and processes, `Pipeline` does with arrays.
"""

from __future__ import annotations

import sys

import numpy as np
import torch
from PIL import Image

from maetok_fast.pipeline import Pipeline
from maetok_fast.pipeline.demo import demo_generator, demo_tokenizer


def main(words: list[str]) -> None:
    if len(words) >= 3:
        tokenizer, generator, *rest = words
        # statistics of the latents: what lies beside the generator, or stands in the tokenizer's config.json
        pipeline = Pipeline.from_pretrained(tokenizer, generator)
        labels = [int(word) for word in rest]
    else:
        torch.manual_seed(0)
        pipeline = Pipeline(demo_tokenizer(), demo_generator())
        labels = [1, 2, 3]

    seeds = range(len(labels))  # a picture is its label's and its seed's, whatever else is sampled beside it
    made = pipeline.generate(labels, list(seeds), steps=50, method="heun", guidance=1.9, interval=(0.0, 0.7))
    Image.fromarray(np.hstack(made.images)).save("samples.png")
    print(f"samples.png: {len(labels)} pictures, NFE {made.nfe}, {made.rows} rows, {made.seconds:.1f} s")


if __name__ == "__main__":
    main(sys.argv[1:])
