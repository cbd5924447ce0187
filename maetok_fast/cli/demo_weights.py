# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""`maetok-fast demo-weights`: a small tokenizer and generator, to see every command work without a download."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from . import _said


def demo_weights(
    folder: Annotated[Path, typer.Argument(help="Made if absent; gets tokenizer/, generator/, few-step/.")],
    seed: Annotated[int, typer.Option(min=0)] = 0,
) -> None:
    """Write a small MAETok (64 px) and two SiT (10 classes) of random weights, one for few steps. Their pictures are
    patterns, and show nothing."""
    import torch

    from maetok_fast.pipeline.demo import demo_generator, demo_tokenizer

    with _said.in_a_sentence(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tokenizer, generator = demo_tokenizer(), demo_generator()
        tokenizer.save_pretrained(folder / "tokenizer")
        generator.save_pretrained(folder / "generator")
        demo_generator(few_steps=True).save_pretrained(folder / "few-step")
        names = [str(folder / name) for name in ("tokenizer", "generator", "few-step")]
        ask = f"maetok-fast sample --tokenizer {names[0]} --classes 0,1,2,3,4"
        typer.echo(
            f"{', '.join(names)}: random weights. Try\n"
            f"  {ask} --generator {names[1]} --per-class 5 --steps 50 --out samples\n"
            f"  {ask} --generator {names[2]} --mode ode --solver meanflow --steps 2 --out few"
        )
