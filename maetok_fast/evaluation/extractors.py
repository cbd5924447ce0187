# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""The extractors that have a name, with their weights.

    inception    FID's network (inception.py)
    dinov2       vit_large_patch14_dinov2.lvd142m of timm at 224 px: cls token behind the last norm (Stein et al. 2023)
    timm:NAME    any model of timm at its own size: its pooled features
    random       a small network of a fixed seed: for trying things

timm's models get images resized by torch's antialiased bicubic filter on 8-bit pixels, aspect ratio not kept: PIL's to
a level or two of 255, and the same on every device. timm resamples the position table of a checkpoint.
"""

from __future__ import annotations

import difflib
import itertools
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from maetok_fast.evaluation.extractor import PRECISIONS, SEED, Extractor, ExtractorError, weights_digest
from maetok_fast.evaluation.inception import create_inception
from maetok_fast.models import CheckpointError
from maetok_fast.models.checkpoints.files import read_weights
from maetok_fast.models.checkpoints.locate import locate

__all__ = ["Extractor", "ExtractorError", "TimmExtractor", "create_extractor"]

DINOV2 = "vit_large_patch14_dinov2.lvd142m"


def create_extractor(
    name: str,
    weights: str | os.PathLike[str] = "hub",
    *,
    device: torch.device | str = "cpu",
    precision: str = "fp32",
) -> Extractor:
    """By name, see the module. weights: "hub", a file, or "random" for trying things, which the result says.

    precision: "fp32", as published numbers are; "fp64"; "bf16" (faster, other numbers). ExtractorError says what is
    missing and how to get it, ImportError which package.
    """
    options: dict[str, Any] = {"device": device, "precision": precision}
    if precision not in PRECISIONS:
        raise ExtractorError(f"precision {precision!r}: expected one of {', '.join(PRECISIONS)}")
    if name == "inception":
        return create_inception(weights, **options)
    if name == "random":
        about = {
            "network": "three random convolutions, mean and deviation of each channel",
            "resize": "bilinear, antialiased, to 64 x 64 px",
        }
        return Extractor(name, _RandomNetwork(), about, random=True, **options)
    if name == "dinov2":
        return _timm(name, DINOV2, weights, size=224, **options)
    if name.startswith("timm:"):
        return _timm(name, name.removeprefix("timm:"), weights, size=None, **options)
    hint = difflib.get_close_matches(name, ["inception", "dinov2", "random"], 1)
    also = f"; did you mean {hint[0]}?" if hint else ""
    raise ExtractorError(f"unknown extractor {name!r}: expected inception, dinov2, timm:NAME or random{also}")


class TimmExtractor(Extractor):
    """A timm model without its classifier, on whole images resized to its size."""

    def __init__(self, name: str, model: Any, size: int, about: Mapping[str, Any], **options: Any) -> None:
        from timm.data import resolve_model_data_config

        self.size = size
        config = resolve_model_data_config(model)
        mean, std = (torch.tensor(config[k])[:, None, None] * 255 for k in ("mean", "std"))
        precision, device = options.get("precision", "fp32"), options.get("device", "cpu")
        dtype = torch.float64 if precision == "fp64" else torch.float32

        def network(images: Tensor) -> Tensor:
            return model((images.to(dtype) - mean.to(device)) / std.to(device))

        model.requires_grad_(False).eval().to(device, dtype)
        pool = getattr(model, "global_pool", None)
        about = {
            **about,
            "layer": f"pooled features (global_pool={pool if isinstance(pool, str) else type(pool).__name__})",
            "resize": f"bicubic, antialiased, 8 bits, to {size} x {size} px",
            "mean": list(config["mean"]),
            "std": list(config["std"]),
            "weights_sha256": weights_digest(model),
        }
        super().__init__(name, network, about, **options)

    def prepare(self, images: Tensor) -> Tensor:
        if images.shape[2:] == (self.size, self.size):
            return images
        return F.interpolate(images, size=(self.size, self.size), mode="bicubic", antialias=True)


def _timm(name: str, known: str, weights: str | os.PathLike[str], size: int | None, **options: Any) -> Extractor:
    try:
        import timm
    except ImportError as error:
        raise ImportError(f"the extractor {name} is a timm model, which needs timm: pip install timm") from error
    if not timm.is_model(known):
        near = difflib.get_close_matches(known, timm.list_models(), 1)
        hint = f"; did you mean timm:{near[0]}?" if near else ""
        raise ExtractorError(f"extractor {name!r}: timm {timm.__version__} has no model {known}{hint}")
    wanted = {} if size is None else {"img_size": size}
    random = os.fspath(weights) == "random"
    try:
        if random:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(SEED)
                model = timm.create_model(known, num_classes=0, **wanted)
        else:
            state = _state(name, known, weights)
            overlay = {"state_dict": state}
            model = timm.create_model(known, pretrained=True, num_classes=0, pretrained_cfg_overlay=overlay, **wanted)
    except (RuntimeError, KeyError, AttributeError) as error:
        raise ExtractorError(f"extractor {name}: {weights} holds no weights of timm's {known} ({error})") from error
    side = size or model.pretrained_cfg["input_size"][-1]
    about = {
        "network": f"timm {known}",
        "library": f"timm {timm.__version__}",
        "weights": "random" if random else str(weights),
    }
    return TimmExtractor(name, model, side, about, random=random, **options)


def _state(name: str, known: str, weights: str | os.PathLike[str]) -> Any:
    import timm

    source: str | os.PathLike[str] = weights
    if os.fspath(weights) == "hub":
        config = timm.models.get_pretrained_cfg(known)
        source = (config and config.hf_hub_id) or ""
        if not source:
            raise ExtractorError(f"extractor {name}: timm knows no weights of {known}; give --weights {name}=FILE")
    elif not Path(weights).expanduser().exists():
        raise ExtractorError(f"extractor {name}: weights {weights}: no such file, and neither 'hub' nor 'random'")
    try:
        _, path = locate(source)
        return read_weights(path)[0]
    except CheckpointError as error:
        if os.fspath(weights) != "hub":
            raise ExtractorError(f"extractor {name}: {error}") from error
        raise ExtractorError(
            f"extractor {name}: its weights could not be had from the hub repository {source}; download its "
            f"model.safetensors elsewhere and give --weights {name}=FILE"
        ) from error


class _RandomNetwork(nn.Module):
    """Small and of a fixed seed: features that tell sets apart and mean nothing else."""

    def __init__(self, width: int = 24) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(SEED)
        sizes = (3, width, width, width)
        self.layers = nn.ModuleList(nn.Conv2d(i, o, 3, 2, 1) for i, o in itertools.pairwise(sizes))
        with torch.no_grad():
            for layer in self.layers:
                for p in layer.parameters():
                    p.copy_(torch.randn(p.shape, generator=generator) * (2 / max(1, p[0].numel())) ** 0.5)

    def forward(self, images: Tensor) -> Tensor:
        dtype = next(self.parameters()).dtype
        x = F.interpolate(images.to(dtype), size=(64, 64), mode="bilinear", antialias=True) / 127.5 - 1
        found = []
        for layer in self.layers:
            x = layer(x).relu()
            found += [x.mean((2, 3)), x.var((2, 3), unbiased=False).add(1e-6).sqrt()]
        return torch.cat(found, 1)
