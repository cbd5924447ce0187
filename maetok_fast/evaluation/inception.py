# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""Inception-v3 of 2015-12-05, the network of FID, in PyTorch: torch-fidelity's blocks, ADM's three outputs in one pass.

    uint8 ─ TF1's bilinear resize to 299 (torch-fidelity) ─ (x - 128) / 128 ─ blocks ─ Mixed_6d ─ ... ─ mean
                                                                                │                        └ features 2048
                                                                                └ its 1x1 branch (ADM's mixed_6/conv),
                                                                                  7 channels, (17, 17, 7): spatial 2023
    logits = features @ fc.weight.T, without the bias, 1008 of them: of the Inception score

The weights are TensorFlow's, converted; torch-fidelity's and pytorch-fid's files of them are the same.
"""

from __future__ import annotations

import hashlib
import os
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from maetok_fast.evaluation.extractor import SEED, Extractor, ExtractorError
from maetok_fast.models import CheckpointError
from maetok_fast.models.checkpoints.files import read_weights

__all__ = ["FILES", "URL", "InceptionExtractor", "create_inception"]

HASH = "6726825d"  # the sha256 of the file begins with it
FILES = (f"pt_inception-2015-12-05-{HASH}.pth", f"weights-inception-2015-12-05-{HASH}.pth")
URL = f"https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/{FILES[0]}"
SPATIAL = 7  # channels of the 192 that sFID looks at
SIDE = 299


class InceptionExtractor(Extractor):
    outputs = ("features", "spatial")

    def logits(self, features: Tensor) -> Tensor:
        """(N, 2048) -> (N, 1008) fp32."""
        weight = self.network.get_parameter("fc.weight")  # type: ignore[attr-defined]
        return features.float() @ weight.to("cpu", torch.float32).T


def create_inception(weights: str | os.PathLike[str] = "hub", **options: Any) -> Extractor:
    """weights: "hub" (torch.hub's cache, else downloaded), a file, or "random"."""
    with torch.device("meta"):  # its own initialisation takes seconds
        network = _network()
    network.to_empty(device="cpu")
    random = os.fspath(weights) == "random"
    about: dict[str, Any] = {
        "network": "Inception-v3 of 2015-12-05, pool features 2048; spatial 17 x 17 x 7 of Mixed_6d",
        "library": f"torch-fidelity {metadata.version('torch-fidelity')}",
        "resize": f"TF1 bilinear (no antialiasing) to {SIDE} x {SIDE} px",
    }
    if random:
        _fill_random(network)
        about["weights"] = "random"
    else:
        path = _find(weights)
        try:
            state, _ = read_weights(path)
            network.load_state_dict(state)
        except (CheckpointError, RuntimeError, TypeError, AttributeError) as error:
            # what torch lists of a state that does not fit are hundreds of names
            first = str(error).splitlines()[0] if isinstance(error, CheckpointError) else "other tensors than its own"
            raise ExtractorError(f"inception: {path} is no {FILES[0]} ({first}); {_how()}") from error
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        known = "the published weights" if digest.startswith(HASH) else "NOT the published weights"
        about["weights"] = f"{path.name}, {known}"
    network.to(memory_format=torch.channels_last)  # a quarter faster on a CPU
    return InceptionExtractor("inception", network, about, random=random, **options)


def _network() -> nn.Module:
    try:
        from torch_fidelity import feature_extractor_inceptionv3 as parts
        from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x as resize
    except ImportError as error:
        raise ImportError(
            "FID's Inception network comes with torch-fidelity: pip install torch-fidelity, or 'maetok_fast[eval]'"
        ) from error

    class Inception(nn.Module):
        """Modules by TensorFlow's names, which the file's keys are, in the order of the forward pass."""

        def __init__(self) -> None:
            super().__init__()
            self.Conv2d_1a_3x3 = parts.BasicConv2d(3, 32, kernel_size=3, stride=2)
            self.Conv2d_2a_3x3 = parts.BasicConv2d(32, 32, kernel_size=3)
            self.Conv2d_2b_3x3 = parts.BasicConv2d(32, 64, kernel_size=3, padding=1)
            self.MaxPool_1 = nn.MaxPool2d(3, 2)
            self.Conv2d_3b_1x1 = parts.BasicConv2d(64, 80, kernel_size=1)
            self.Conv2d_4a_3x3 = parts.BasicConv2d(80, 192, kernel_size=3)
            self.MaxPool_2 = nn.MaxPool2d(3, 2)
            for letter, channels, pooled in zip("bcd", (192, 256, 288), (32, 64, 64)):
                self.add_module(f"Mixed_5{letter}", parts.InceptionA(channels, pool_features=pooled))
            self.Mixed_6a = parts.InceptionB(288)
            for letter, inner in zip("bcde", (128, 160, 160, 192)):
                self.add_module(f"Mixed_6{letter}", parts.InceptionC(768, channels_7x7=inner))
            self.Mixed_7a = parts.InceptionD(768)
            self.Mixed_7b = parts.InceptionE_1(1280)
            self.Mixed_7c = parts.InceptionE_2(2048)
            self.fc = nn.Linear(2048, 1008)

        def forward(self, images: Tensor) -> dict[str, Tensor]:
            x = resize(images.to(self.fc.weight.dtype), size=(SIDE, SIDE), align_corners=False)
            x, kept = (x - 128) / 128, []
            # a hook, because ADM looks into a block, which the blocks do not return
            hook = self.get_submodule("Mixed_6d.branch1x1").register_forward_hook(
                lambda m, i, out: kept.append(out[:, :SPATIAL])
            )
            try:
                for name, layer in self.named_children():
                    if name != "fc":
                        x = layer(x)
            finally:
                hook.remove()
            # TensorFlow's order, channels last
            return {"features": x.mean((2, 3)), "spatial": kept[0].permute(0, 2, 3, 1).flatten(1)}

    return Inception()


def _fill_random(network: nn.Module) -> None:
    generator = torch.Generator().manual_seed(SEED)
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.reset_parameters()
            if isinstance(module, nn.Conv2d | nn.Linear):
                weight = module.weight
                weight.copy_(torch.randn(weight.shape, generator=generator) * (2 / weight[0].numel()) ** 0.5)
                if module.bias is not None:
                    module.bias.zero_()


def _find(weights: str | os.PathLike[str]) -> Path:
    if os.fspath(weights) != "hub":
        path = Path(weights).expanduser()
        if not path.is_file():
            raise ExtractorError(f"inception: weights {path}: no such file, and neither 'hub' nor 'random'; {_how()}")
        return path
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    for name in FILES:
        if (folder / name).is_file():
            return folder / name
    path = folder / FILES[0]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(URL, str(path), hash_prefix=HASH, progress=False)
    except (OSError, RuntimeError) as error:  # URLError is an OSError; RuntimeError: another hash
        raise ExtractorError(f"inception: its weights could not be downloaded ({error}); {_how()}") from error
    return path


def _how() -> str:
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    return f"download {URL} into {folder}, or give --weights inception=/path/to/{FILES[0]}"
