# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""Extractor: a frozen network that makes features of uint8 images, with what it is and a fingerprint of that.

Extractor.of_module(name, f)       any callable uint8 (B, 3, H, W) -> (B, D), e.g. a classifier's last layer
catalog.create_extractor(name)     Inception, DINOv2, timm's models

uint8 images ─ resize as the extractor is defined ─ network in fp32, without TF32 ─ fp32 rows on the CPU
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["PRECISIONS", "SEED", "Extractor", "ExtractorError", "weights_digest"]

PRECISIONS = {"fp32": torch.float32, "fp64": torch.float64, "bf16": torch.bfloat16}
SEED = 20151205  # of random weights
_PROVENANCE = ("weights", "library")
Network = Callable[[Tensor], "Tensor | dict[str, Tensor]"]


class ExtractorError(ValueError):
    """An extractor that cannot be made; the message says why and how to get what is missing."""


class Extractor:
    """name: as asked for. about: JSON values that say what it computes, part of every result and of `fingerprint`.
    random: its weights mean nothing. outputs: of `all`: "features", and of Inception "spatial"."""

    outputs: tuple[str, ...] = ("features",)

    def __init__(
        self,
        name: str,
        network: Network,
        about: Mapping[str, Any],
        *,
        device: torch.device | str = "cpu",
        precision: str = "fp32",
        random: bool = False,
    ) -> None:
        if precision not in PRECISIONS:
            raise ExtractorError(f"precision {precision!r}: expected one of {', '.join(PRECISIONS)}")
        self.name, self.network, self.device, self.random = name, network, torch.device(device), random
        self.precision = precision
        self.about = {"extractor": name, **about, "precision": precision}
        if random:
            self.about["random"] = True
        if isinstance(network, nn.Module):
            self.about.setdefault("weights_sha256", weights_digest(network))
            network.requires_grad_(False).eval().to(self.device)
            if precision == "fp64":
                network.double()

    @classmethod
    def of_module(
        cls, name: str, function: Network, about: Mapping[str, Any] | None = None, *, device: torch.device | str = "cpu"
    ) -> Extractor:
        """Of a callable that takes uint8 (B, 3, H, W) on `device` and gives (B, D). about: what it is, JSON values; of
        an nn.Module, which is frozen, a digest of its weights is added."""
        return cls(name, function, about or {}, device=device)

    @property
    def fingerprint(self) -> str:
        """16 hexadecimal digits of `about`, but for where its weights came from: their digest is in it."""
        what = {k: v for k, v in self.about.items() if k not in _PROVENANCE}
        return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:16]

    @property
    def about_in_short(self) -> str:
        """Name, weights and precision, for sentences."""
        weights = "random weights" if self.random else f"weights {self.about.get('weights_sha256', 'not known')}"
        return f"{self.name} ({weights}, {self.precision})"

    @property
    def slug(self) -> str:
        """The name as part of a file's."""
        return re.sub(r"[^A-Za-z0-9._-]+", "-", self.name)

    def __call__(self, images: Tensor) -> Tensor:
        """uint8 (B, 3, H, W) -> fp32 (B, D) on the CPU."""
        return self.all(images)["features"]

    @torch.no_grad()
    def all(self, images: Tensor) -> dict[str, Tensor]:
        """As `__call__`, of all `outputs` by name."""
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
            raise TypeError(
                f"{self.name}: expected uint8 images (B, 3, H, W), got {images.dtype} {tuple(images.shape)}"
            )
        with _exact(self.device, self.precision):
            found = self.network(self.prepare(images).to(self.device))
        by_name = found if isinstance(found, dict) else {"features": found}
        for key, rows in by_name.items():
            if rows.ndim != 2 or len(rows) != len(images):
                raise ExtractorError(f"{self.name}: expected ({len(images)}, D) of {key}, got {tuple(rows.shape)}")
        return {key: rows.to("cpu", torch.float32) for key, rows in by_name.items()}

    def prepare(self, images: Tensor) -> Tensor:
        """On the CPU, before they go to the device."""
        return images

    def logits(self, features: Tensor) -> Tensor | None:
        """Of the Inception score; None where the network has no classes of its own."""
        return None


def weights_digest(module: nn.Module) -> str:
    """sha256 of a network's tensors by name, wherever they came from: 16 digits."""
    digest = hashlib.sha256()
    for key, value in sorted(module.state_dict().items()):
        digest.update(f"{key}{value.dtype}{tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


@contextlib.contextmanager
def _exact(device: torch.device, precision: str) -> Iterator[None]:
    """fp32 that is fp32 (convolutions are TF32 by default on a GPU), or autocast where that was asked for."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with (
            torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False),
            torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"),
        ):
            yield
    finally:
        torch.set_float32_matmul_precision(before)
