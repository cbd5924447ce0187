# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""LPIPS: how different two images look, by VGG16's features (Zhang et al. 2018, arXiv 1801.03924, version 0.1).

    images [-1, 1] ── (x - shift) / scale ── VGG16 ── relu 1_2, 2_2, 3_3, 4_3, 5_3 ─┐
                                                             of both images ────────┴─ LPIPSTail ── (B,)

Frozen and always in eval: no dropout, whatever mode the training is in. Convolutions run in channels_last, and the tail
reads their features as they lie. The features of a target, which need no gradient, are made once under no_grad:

    with torch.no_grad():
        wanted = lpips.features(images)
    loss = lpips.distance(lpips.features(reconstruction), wanted).mean()
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from maetok_fast.checks import check_images
from maetok_fast.layers import LPIPSTail
from maetok_fast.models.checkpoints import CheckpointError
from maetok_fast.models.checkpoints.files import read_weights

__all__ = ["LPIPS"]

URL = "https://download.pytorch.org/models/vgg16-397923af.pth"
_STAGES = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
LEAST = 16  # pixels: four poolings by 2


def _vgg16() -> nn.Sequential:
    """torchvision's `vgg16().features` up to relu5_3, its numbers kept."""
    layers: list[nn.Module] = []
    before = 3
    for i, stage in enumerate(_STAGES):
        layers += [nn.MaxPool2d(2)] if i else []
        for width in stage:
            layers += [nn.Conv2d(before, width, 3, padding=1), nn.ReLU(inplace=True)]
            before = width
    return nn.Sequential(*layers)


class LPIPS(nn.Module):
    """images (B, 3, H, W) in [-1, 1], two batches -> (B,) fp32, 0 for equal images.

    vgg: VGG16's weights: "hub" (torchvision's, through torch.hub's cache), a .pth or .safetensors file of them, or
    "random" (kaiming normal, for tests and timings). heads: the linear layers' weights: None, the installed lpips
    package's; a file with its names; or "random", where vgg is too. CheckpointError says how to get what is missing.
    """

    shift: Tensor
    scale: Tensor

    def __init__(self, vgg: str | os.PathLike[str] = "hub", heads: str | os.PathLike[str] | None = None) -> None:
        super().__init__()
        self.vgg, self.tail = nn.Module(), LPIPSTail()
        self.vgg.features = _vgg16()
        widths = [stage[-1] for stage in _STAGES]
        assert self.tail.channels == tuple(widths)
        # a feature map is what the last ReLU of a stage gives
        lengths = [2 * len(stage) + (i > 0) for i, stage in enumerate(_STAGES)]
        self._taps = [sum(lengths[: i + 1]) - 1 for i in range(len(_STAGES))]
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188])[:, None, None], persistent=False)
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450])[:, None, None], persistent=False)
        self._fill_vgg(vgg)
        self._fill_heads(heads, vgg)
        self.requires_grad_(False)
        self.to(memory_format=torch.channels_last)
        self.eval()

    def train(self, mode: bool = True) -> LPIPS:
        """It has one mode."""
        super().train(False)
        return self

    def features(self, images: Tensor) -> list[Tensor]:
        """images (B, 3, H, W) in [-1, 1] -> five maps: (B, 64, H, W), (B, 128, H/2, W/2), ..., (B, 512, H/16, W/16)."""
        check_images(images, LEAST, "LPIPS")
        x = ((images - self.shift) / self.scale).contiguous(memory_format=torch.channels_last)
        found = []
        for i, layer in enumerate(self.vgg.features):  # type: ignore[arg-type]
            x = layer(x)
            if i in self._taps:
                found.append(x)
        return found

    def distance(self, features0: Sequence[Tensor], features1: Sequence[Tensor]) -> Tensor:
        """What `features` gives of two batches -> (B,)."""
        result: Tensor = self.tail(features0, features1)
        return result

    def forward(self, images0: Tensor, images1: Tensor) -> Tensor:
        return self.distance(self.features(images0), self.features(images1))

    # ---- weights ----

    def _fill_vgg(self, vgg: str | os.PathLike[str]) -> None:
        if os.fspath(vgg) == "random":
            for module in self.vgg.modules():
                if isinstance(module, nn.Conv2d):
                    nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                    assert module.bias is not None
                    nn.init.zeros_(module.bias)
            return
        path = _downloaded() if os.fspath(vgg) == "hub" else _file(vgg, "vgg", "'hub' nor 'random'", _HOW)
        _fill(self.vgg, read_weights(path)[0], f"LPIPS: {path}: not torchvision's vgg16")

    def _fill_heads(self, heads: str | os.PathLike[str] | None, vgg: str | os.PathLike[str]) -> None:
        if heads is not None and os.fspath(heads) == "random":
            if os.fspath(vgg) != "random":
                raise ValueError("LPIPS: heads='random' is for vgg='random' alone; give heads=None or a file")
            for p in self.tail.parameters():
                nn.init.uniform_(p, 0, 1 / p.numel())
            return
        how = "pip install lpips (weights/v0.1/vgg.pth in it)"
        if heads is None:
            # found, not imported: the package imports torchvision
            spec = importlib.util.find_spec("lpips")
            if spec is None or spec.origin is None:
                raise CheckpointError(f"LPIPS: its linear heads come with the lpips package: {how}, or give heads=FILE")
            heads = Path(spec.origin).parent / "weights" / "v0.1" / "vgg.pth"
        path = _file(heads, "heads", "'random'", how)
        _fill(self.tail, read_weights(path)[0], f"LPIPS: {path}: not the heads of lpips 0.1 for vgg")


_HOW = f"download {URL} and give vgg=/path/to/{URL.rpartition('/')[2]} (in a run: loss.vgg=...)"


def _downloaded() -> Path:
    """torchvision's file in torch.hub's cache, fetched where it is not there."""
    path = Path(torch.hub.get_dir()) / "checkpoints" / URL.rpartition("/")[2]
    if not path.is_file():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(URL, str(path), hash_prefix="397923af", progress=False)
        except (OSError, RuntimeError) as error:  # URLError is an OSError; RuntimeError: another hash
            raise CheckpointError(f"LPIPS: VGG16's weights could not be downloaded ({error}); {_HOW}") from error
    return path


def _file(given: str | os.PathLike[str], name: str, words: str, how: str) -> Path:
    path = Path(given).expanduser()
    if not path.is_file():
        raise CheckpointError(f"LPIPS: {name} {path}: no such file, and not {words}; {how}")
    return path


def _fill(module: nn.Module, state: Any, where: str) -> None:
    """The module's tensors out of those by name; what else is there (a classifier) is passed over."""
    for key, value in module.state_dict().items():
        found = state.get(key) if isinstance(state, Mapping) else None
        if not isinstance(found, Tensor) or found.shape != value.shape:
            has = f"{key} of shape {tuple(found.shape)}" if isinstance(found, Tensor) else f"no {key}"
            raise CheckpointError(f"{where}: it has {has}, expected {tuple(value.shape)}; give another file")
        value.copy_(found)
