# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""A model's weights as others write them.

    folder       config.json and model.safetensors: the public MAETok's, ours (`save_pretrained`)
    diffusers    config.json and diffusion_pytorch_model.safetensors
    training     {step:07d}.pt: {model, ema, opt, args, steps} (SiT, REPA, LightningDiT; MAETok: optimizer for opt)
    repa-e       the same with bn.running_mean and bn.running_var, the latents' statistics, among the weights
    timm         last.pth.tar: {state_dict, state_dict_ema, args}
    safetensors  one file and nothing beside it

What is read back from each is the same model, its configuration included where the layout has a place for it: training
files carry it as `args`, under the public names. One set of weights is there: it stands for the averaged copy too.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from maetok_fast.models.checkpoints.files import folder_writers, storable, write_together
from maetok_fast.models.checkpoints.layout import CheckpointError
from maetok_fast.models.checkpoints.pretrained import Pretrained

__all__ = ["EXPORTS", "write_checkpoint"]

EXPORTS = ("folder", "diffusers", "training", "repa-e", "timm", "safetensors")


def write_checkpoint(
    model: Pretrained,
    destination: str | Path,
    to: str,
    *,
    steps: int = 0,
    statistics: tuple[Tensor, Tensor] | None = None,
) -> Path:
    """Writes `model` as `to` (of EXPORTS) into the folder `destination`, made if absent, and returns the weights file.

    steps: the training step that a training file is of. statistics: (mean, variance) (C,) of the latents, for repa-e.
    All files or none. CheckpointError where nothing can be written there, or a file is there already.
    """
    if to not in EXPORTS:
        raise ValueError(f"unknown checkpoint format {to!r}: expected one of {', '.join(EXPORTS)}")
    destination = Path(destination)
    public = model.layout.export(model.config)
    tensors = storable(model.state_dict())
    if to == "repa-e":
        if model.layout.name == "MAETok":
            raise CheckpointError("repa-e's layout is of generators, whose latents it normalises; this is a MAETok")
        if statistics is None:
            raise CheckpointError("repa-e's checkpoints hold the latents' statistics (bn.*), and none are known")
        tensors |= {"bn.running_mean": statistics[0].clone(), "bn.running_var": statistics[1].clone()}
    args = argparse.Namespace(**public)
    both: dict[str, Mapping[str, Tensor]] = {"model": tensors, "ema": tensors}
    moments = "opt" if model.layout.name != "MAETok" else "optimizer"
    pickled: dict[str, Any] = {
        "training": {**both, moments: {}, "args": args, "steps": steps},
        "repa-e": {**both, moments: {}, "args": args, "steps": steps},
        "timm": {"state_dict": tensors, "state_dict_ema": tensors, "args": args, "epoch": steps},
    }
    name = {"folder": "model.safetensors", "diffusers": "diffusion_pytorch_model.safetensors", "timm": "last.pth.tar",
            "safetensors": "model.safetensors"}.get(to, f"{steps:07d}.pt")  # fmt: skip
    file = destination / name
    writers: dict[Path, Callable[[Path], None]]
    if to in pickled:
        writers = {file: lambda path: torch.save(pickled[to], path)}
    else:
        named = {"_class_name": type(model).__name__} if to == "diffusers" else {}
        writers = folder_writers(destination, public, tensors, name, **named)
    if to == "safetensors":
        writers = {file: writers[file]}
    there = [path.name for path in writers if path.exists()]
    if there:
        raise CheckpointError(f"{destination}: {', '.join(there)} is there already; give another folder")
    try:
        destination.mkdir(parents=True, exist_ok=True)
        write_together(writers)
    except OSError as error:
        raise CheckpointError(f"{destination}: cannot be written ({error.strerror or error})") from error
    return file
