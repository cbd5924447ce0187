# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""How a generator's latents are normalised: z = (latent - mean) / std, and where the numbers come from.

    source                                   keys                          meaning
    MAETok's config.json                     vq_mean, vq_std               scalars
    latents_stats.pt (LightningDiT, VTP)     mean, std                     (1, C, 1, 1) or per position
    *-latents-stats.pt (REPA-E)              latents_scale, latents_bias   z = (latent - bias) * scale
    a SiT checkpoint of REPA-E               bn.running_mean, running_var  std = sqrt(var + 1e-5), a batch norm
    stat.pt (RAE)                            mean, var                     std = sqrt(var + 1e-5)
    vae/config.json (diffusers)              latents_mean, latents_std, scaling_factor, shift_factor; RAE: latent_mean,
                                             latent_var: `of_diffusers`
    latent_statistics.safetensors (ours)     mean, std                     any of these shapes

A generator's velocity is learnt on z; decoded without undoing it a sample is noise. Hence nothing here is guessed: what
is not found is None, and `Pipeline` refuses to generate.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from maetok_fast.models import MAETokConfig
from maetok_fast.models.checkpoints.files import read_config, read_weights
from maetok_fast.models.checkpoints.layout import CheckpointError
from maetok_fast.models.checkpoints.locate import STATISTICS

__all__ = ["LatentStatistics"]

FILE = STATISTICS[0]
_EPS = 1e-5  # of the variances that RAE and batch norms store


@dataclass(frozen=True)
class LatentStatistics:
    """mean, std: fp32 scalars (), per channel, or of a whole latent; finite, std > 0. source: where they are from."""

    mean: Tensor
    std: Tensor
    source: str = "given"

    def __post_init__(self) -> None:
        for name in ("mean", "std"):
            value = torch.as_tensor(getattr(self, name)).detach().to("cpu", torch.float32)
            object.__setattr__(self, name, value.squeeze(0) if value.ndim > 1 and len(value) == 1 else value)
            if not value.isfinite().all():
                raise ValueError(f"latent statistics ({self.source}): {name} holds values that are not finite")
        if not (self.std > 0).all():
            raise ValueError(f"latent statistics ({self.source}): std must be > 0, the least is {self.std.min():g}")

    @classmethod
    def identity(cls) -> LatentStatistics:
        """For a generator that was trained on latents as the tokenizer gives them."""
        return cls(torch.tensor(0.0), torch.tensor(1.0), "identity")

    @classmethod
    def of_config(cls, config: MAETokConfig) -> LatentStatistics | None:
        """Those in a tokenizer's configuration; None where it has the defaults, which say nothing."""
        if (config.latent_mean, config.latent_std) == (0.0, 1.0):
            return None
        return cls(torch.tensor(config.latent_mean), torch.tensor(config.latent_std), "the tokenizer's config.json")

    @classmethod
    def load(cls, path: str | Path) -> LatentStatistics:
        """Of a file of one of the layouts above. CheckpointError naming it where it is none or cannot be read."""
        path = Path(path)
        if not path.is_file():
            raise CheckpointError(f"{path}: no such file of latent statistics")
        if path.suffix == ".json":
            found = cls.of_diffusers(read_config(path), str(path))
            if found is None:
                raise CheckpointError(
                    f"{path}: holds no latent statistics: expected latents_mean and latents_std, or scaling_factor"
                )
            return found
        content, _ = read_weights(path)
        found = _from_mapping(content, str(path))
        if found is None:
            keys = ", ".join(sorted(map(str, content))[:8]) if isinstance(content, Mapping) else type(content).__name__
            raise CheckpointError(
                f"{path}: holds no latent statistics: expected mean and std, mean and var, latents_scale and "
                f"latents_bias, or bn.running_mean and bn.running_var; got {keys}"
            )
        return found

    @classmethod
    def of_diffusers(cls, config: Mapping[str, Any], source: str) -> LatentStatistics | None:
        """Of an autoencoder's config.json in diffusers: z = (latent - latents_mean or shift_factor) / latents_std
        scaling_factor; None where it has none of them. RAE's divides by std + 1e-5, or, where its configuration has
        latent_mean and latent_var, by sqrt(var + 1e-5)."""
        names = ("latents_mean", "latents_std", "shift_factor", "scaling_factor", "latent_mean", "latent_var")
        numbers = {k: config.get(k) for k in names}
        given = {k: v for k, v in numbers.items() if v is not None}
        if not given:
            return None
        try:
            given = {k: torch.as_tensor(v, dtype=torch.float32) for k, v in given.items()}
        except (TypeError, ValueError, RuntimeError):
            raise CheckpointError(f"{source}: {', '.join(given)} must be numbers, or lists of them") from None
        if "latents_mean" in given and "shift_factor" in given and given["shift_factor"].any():
            raise CheckpointError(f"{source}: has latents_mean and shift_factor; it is not known which comes first")
        zero, one = torch.tensor(0.0), torch.tensor(1.0)
        if "latent_mean" in given or "latent_var" in given:
            if given.keys() & {"latents_mean", "latents_std", "shift_factor"}:
                raise CheckpointError(f"{source}: has {', '.join(given)}; it is not known which of them count")
            std = (given["latent_var"] + _EPS).sqrt() if "latent_var" in given else one
            return cls(given.get("latent_mean", zero), std / given.get("scaling_factor", one), source)
        std = given.get("latents_std", one)
        if config.get("_class_name") == "AutoencoderRAE" and "latents_std" in given:
            std = std + _EPS
        mean = given.get("latents_mean", given.get("shift_factor", zero))
        return cls(mean, std / given.get("scaling_factor", one), source)

    @classmethod
    def beside(cls, generator: str | Path, content: Any = None) -> LatentStatistics | None:
        """Those that lie in a generator's folder, in its checkpoint (`content`, where that has been read), or in the
        `vae` folder of a diffusers pipeline; None where there are none."""
        place = Path(generator)
        folder = place if place.is_dir() else place.parent
        here = place.exists()  # else a hub repository's name
        for pattern in STATISTICS if here else ():
            for path in sorted(folder.glob(pattern)):
                return cls.load(path)
        found = None if content is None else _from_checkpoint(content, str(place))
        if found is None and content is None and here:
            for path in sorted(folder.glob("*.pt")) if place.is_dir() else [place] if place.suffix == ".pt" else []:
                found = found or _from_checkpoint(read_weights(path)[0], str(path))
        for path in (folder / "vae" / "config.json", folder.parent / "vae" / "config.json") if here else ():
            if found is None and path.is_file():
                found = cls.of_diffusers(read_config(path), str(path))
        return found

    def save(self, folder: str | Path) -> Path:
        """Writes `latent_statistics.safetensors` into a folder, beside a generator, and returns its path."""
        from safetensors.torch import save_file

        path = Path(folder) / FILE
        save_file({"mean": self.mean.contiguous(), "std": self.std.contiguous()}, path, {"source": self.source})
        return path

    def as_batch_norm(self, channels: int) -> tuple[Tensor, Tensor]:
        """(running_mean, running_var) (C,) of the batch norm that normalises alike. ValueError where they are not of
        channels."""
        for name in ("mean", "std"):
            value = getattr(self, name)
            if value.numel() not in (1, channels):
                raise ValueError(
                    f"latent statistics ({self.source}): {name} of shape {tuple(value.shape)} is not one a channel"
                )
        mean, std = (getattr(self, n).reshape(-1).expand(channels).clone() for n in ("mean", "std"))
        return mean, std.square() - _EPS

    def check(self, shape: tuple[int, ...]) -> None:
        """ValueError unless they fit latents of `shape`: (L, C) or (C, H, W)."""
        for name in ("mean", "std"):
            self._fitted(getattr(self, name), shape, name)

    def normalise(self, latents: Tensor) -> Tensor:
        """latents (B, L, C) or (B, C, H, W) -> z, in their dtype."""
        mean, std = self._both(latents)
        return ((latents.float() - mean) / std).to(latents.dtype)

    def denormalise(self, z: Tensor) -> Tensor:
        """z of a generator -> latents of a tokenizer."""
        mean, std = self._both(z)
        return (z.float() * std + mean).to(z.dtype)

    def _both(self, x: Tensor) -> tuple[Tensor, Tensor]:
        shape = tuple(x.shape[1:])
        return tuple(self._fitted(getattr(self, n), shape, n).to(x.device) for n in ("mean", "std"))  # type: ignore

    def _fitted(self, value: Tensor, shape: tuple[int, ...], name: str) -> Tensor:
        """`value` as it broadcasts over (B, *shape)."""
        channel = len(shape) - 1 if len(shape) == 2 else 0
        if value.numel() == 1:
            return value.reshape(())
        if tuple(value.shape) == shape:
            return value
        if value.numel() == shape[channel] and max(value.shape) == value.numel():
            return value.reshape([-1 if i == channel else 1 for i in range(len(shape))])
        raise ValueError(
            f"latent statistics ({self.source}): {name} of shape {tuple(value.shape)} does not fit latents of shape "
            f"{shape}: expected a scalar, {shape[channel]} channels, or {shape}"
        )


def _from_mapping(content: Any, source: str) -> LatentStatistics | None:
    if not isinstance(content, Mapping):
        return None
    kinds = {
        ("mean", "std"): lambda a, b: (a, b),
        ("mean", "var"): lambda a, b: (a, (b + _EPS).sqrt()),
        ("latents_bias", "latents_scale"): lambda a, b: (a, 1 / b),
        ("bn.running_mean", "bn.running_var"): lambda a, b: (a, (b + _EPS).sqrt()),
    }
    for keys, convert in kinds.items():
        if all(isinstance(content.get(key), Tensor) for key in keys):
            mean, std = convert(*(content[key].float() for key in keys))
            return LatentStatistics(mean, std, f"{source}, {keys[0]} and {keys[1]}")
    return None


def _from_checkpoint(content: Any, source: str) -> LatentStatistics | None:
    """Of a training file: bn.* in its `ema` or `model`."""
    if not isinstance(content, Mapping):
        return None
    for part in (content.get("ema"), content.get("model"), content):
        if isinstance(part, Mapping) and "bn.running_mean" in part:
            return _from_mapping({k: part.get(k) for k in ("bn.running_mean", "bn.running_var")}, source)
    return None
