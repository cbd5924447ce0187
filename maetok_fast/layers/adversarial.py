# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""What stands around a tokenizer's losses, as modules: LPIPS' heads, augmentation, a discriminator's norms, averages.

VGG features x 5, of both images ── LPIPSTail ──> distance (B,)            names of the lpips package
images ── DiffAugment ── conv ── NormAct ── conv ── ...                    names of nn.BatchNorm2d, nn.GroupNorm
model ── EMA.update after each step ── `with ema.swapped(model)` to evaluate, save, sample
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from maetok_fast.checks import check_positive
from maetok_fast.kernels import affine_act, diff_augment, draw_augmentation, ema_update, lpips_tail, norm_act

__all__ = ["EMA", "DiffAugment", "LPIPSTail", "NormAct"]

_VGG16 = (64, 128, 256, 512, 512)


class _Head(nn.Module):
    """One layer's head under the lpips package's names: `model.1.weight` (1, C, 1, 1)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.model = nn.Sequential(nn.Dropout(), nn.Conv2d(channels, 1, 1, bias=False))

    @property
    def weight(self) -> Tensor:
        return cast(nn.Conv2d, self.model[1]).weight.flatten()


class LPIPSTail(nn.Module):
    """LPIPS behind its backbone: features of two images, layer by layer -> one distance for each pair.

    `lin0` .. `lin4` hold the heads as the lpips package does, so that its weights load (`strict=False` passes over the
    backbone's). Its heads' dropout, which evaluation and losses have off, is never applied.
    """

    def __init__(self, channels: Sequence[int] = _VGG16) -> None:
        super().__init__()
        self.channels = tuple(channels)
        for i, c in enumerate(self.channels):
            self.add_module(f"lin{i}", _Head(c))

    def forward(self, features0: Sequence[Tensor], features1: Sequence[Tensor]) -> Tensor:
        """features (B, C, H, W) of each layer, of both images -> (B,) fp32. Those in torch's channels_last format are
        read as they lie. ValueError where there are more or fewer than layers."""
        if not len(features0) == len(features1) == len(self.channels):
            raise ValueError(
                f"LPIPSTail: expected the features of {len(self.channels)} layers for each image, got "
                f"{len(features0)} and {len(features1)}"
            )
        total: Any = 0
        for i, (f0, f1) in enumerate(zip(features0, features1)):
            last = all(f.is_contiguous(memory_format=torch.channels_last) and not f.is_contiguous() for f in (f0, f1))
            if last:
                f0, f1 = f0.permute(0, 2, 3, 1), f1.permute(0, 2, 3, 1)
            total = total + lpips_tail(f0, f1, getattr(self, f"lin{i}").weight, last)
        return total


class DiffAugment(nn.Module):
    """DiffAugment (arXiv 2006.10738) in training, nothing in eval: colour, translation, cutout, drawn on the device.

    probability, cutout, translation: as `kernels.draw_augmentation`. forward(*images (B, C, H, W)) -> the same, each by
    the same numbers (real and generated images of one step, say): a tensor for one, a tuple for several.
    """

    def __init__(self, probability: float = 1.0, cutout: float = 0.5, translation: float = 0.125) -> None:
        super().__init__()
        draw_augmentation(1, 1, 1, probability, cutout, translation)  # its checks
        self.probability, self.cutout, self.translation = probability, cutout, translation

    def forward(self, *images: Tensor) -> Any:
        if self.training and images:
            batch, _, height, width = images[0].shape
            shares = self.probability, self.cutout, self.translation
            drawn = draw_augmentation(batch, height, width, *shares, device=images[0].device)
            images = tuple(diff_augment(x, **drawn) for x in images)
        return images[0] if len(images) == 1 else images

    def extra_repr(self) -> str:
        return f"probability={self.probability}, cutout={self.cutout}, translation={self.translation}"


class NormAct(nn.Module):
    """A norm and the LeakyReLU behind it in one pass, of (B, C, H, W).

    norm "batch": `weight`, `bias`, `running_mean`, `running_var`, `num_batches_tracked`, as nn.BatchNorm2d has and
    updates them (momentum: None for a plain mean over all batches); in eval the running statistics. "group": `weight`
    and `bias`, nn.GroupNorm(groups, channels)'s. "instance": those of nn.InstanceNorm2d(channels, affine=True), without
    running statistics. slope: of the negative side, 1.0 for no activation. Statistics are fp32 whatever x is.
    """

    def __init__(
        self,
        channels: int,
        norm: str = "batch",
        *,
        groups: int = 32,
        slope: float = 0.2,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
    ) -> None:
        super().__init__()
        check_positive("NormAct", channels=channels, groups=groups)
        if norm not in ("batch", "group", "instance"):
            raise ValueError(f"NormAct: norm {norm!r} is not one of 'batch', 'group', 'instance'")
        if norm == "group" and channels % groups:
            raise ValueError(f"NormAct: groups must divide the {channels} channels, got {groups}")
        self.channels, self.norm, self.groups = channels, norm, groups if norm == "group" else 1
        self.slope, self.eps, self.momentum = slope, eps, momentum
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))
        if norm == "batch":
            self.register_buffer("running_mean", torch.zeros(channels))
            self.register_buffer("running_var", torch.ones(channels))
            self.register_buffer("num_batches_tracked", torch.tensor(0))

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def forward(self, x: Tensor) -> Tensor:
        if self.norm == "batch" and not self.training:
            affine = self.running_mean, self.running_var, self.weight, self.bias
            return affine_act(x, None, *affine, self.eps, self.slope)
        y, mean, var = norm_act(x, None, self.weight, self.bias, self.norm, self.groups, self.eps, self.slope)
        if self.norm == "batch":
            self._track(mean, var, x.numel() // self.channels)
        return y

    @torch.no_grad()
    def _track(self, mean: Tensor, var: Tensor, count: int) -> None:
        """var is biased; nn.BatchNorm2d keeps the unbiased one."""
        if count < 2:
            raise ValueError(f"NormAct: batch statistics need more than one value for each channel, got {count}")
        self.num_batches_tracked += 1
        step: Any = 1.0 / self.num_batches_tracked if self.momentum is None else self.momentum
        for kept, new in ((self.running_mean, mean), (self.running_var, var * (count / (count - 1)))):
            kept.mul_(1 - step).add_(new.to(kept) * step)

    def extra_repr(self) -> str:
        groups = f", groups={self.groups}" if self.norm == "group" else ""
        return f"{self.channels}, {self.norm}{groups}, slope={self.slope}, eps={self.eps}"


class EMA:
    """The exponential moving average of a model's trainable parameters, all in one pass (`kernels.ema_update`).

    Made of the parameters as they are; frozen ones are passed over. `average`: name -> tensor in fp32 (of a 16-bit
    model too; fp64 of an fp64 one), sharded as the parameter is. decay: in [0, 1].
    """

    def __init__(self, model: nn.Module, decay: float = 0.9999) -> None:
        if not 0 <= decay <= 1:
            raise ValueError(f"EMA: decay must lie in [0, 1], got {decay}")
        self.decay, self.updates = decay, 0
        self.average: dict[str, Tensor] = {
            name: p.detach().to(torch.promote_types(torch.float32, p.dtype), copy=True)
            for name, p in model.named_parameters()
            if p.requires_grad
        }

    def update(self, model: nn.Module, decay: float | Tensor | None = None) -> None:
        """After an optimizer step: average += (1 - decay) * (parameter - average). decay: for this step, e.g. warming
        up. KeyError where the model lacks a parameter that is averaged."""
        own = self._parameters(model)
        ema_update(list(self.average.values()), own, self.decay if decay is None else decay)
        self.updates += 1

    def pairs(self, model: nn.Module) -> dict[Tensor, Tensor]:
        """parameter -> its average, for an optimizer that moves both at once (`kernels.adamw_step`) and then counts
        `updates`. KeyError as in `update`."""
        return dict(zip(self._parameters(model), self.average.values()))

    @torch.no_grad()
    def copy_to(self, model: nn.Module) -> None:
        """Writes the average into the model's parameters."""
        for average, p in zip(self.average.values(), self._parameters(model)):
            p.copy_(average)

    @contextlib.contextmanager
    def swapped(self, model: nn.Module) -> Iterator[nn.Module]:
        """The model with averaged parameters, in place; on leaving they are, bit for bit, what they were."""
        own = self._parameters(model)
        kept = [p.detach().clone() for p in own]
        self.copy_to(model)
        try:
            yield model
        finally:
            with torch.no_grad():
                for p, before in zip(own, kept):
                    p.copy_(before)

    def _parameters(self, model: nn.Module) -> list[Tensor]:
        found = dict(model.named_parameters())
        missing = [name for name in self.average if name not in found]
        if missing:
            raise KeyError(f"EMA: the model has no parameter {missing[0]}; pass the model that the average was made of")
        return [found[name] for name in self.average]

    def to(self, *args: Any, **kwargs: Any) -> EMA:
        """Moves or casts the average, arguments as `Tensor.to`'s."""
        self.average = {name: value.to(*args, **kwargs) for name, value in self.average.items()}
        return self

    def state_dict(self) -> dict[str, Any]:
        """{"decay", "updates", "average"}; the tensors are the average's own."""
        return {"decay": self.decay, "updates": self.updates, "average": dict(self.average)}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Of the same parameters, into the tensors that are there. KeyError where the names differ."""
        if state["average"].keys() != self.average.keys():
            differ = sorted(state["average"].keys() ^ self.average.keys())
            raise KeyError(f"EMA: the state holds other parameters than this average; {differ[0]} is in one of them")
        self.decay, self.updates = state["decay"], state["updates"]
        for name, value in state["average"].items():
            self.average[name].copy_(value)
