# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""What `prepare` returns: a generator or a tokenizer over the rebuilt model, and what it cannot do, in words."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, NoReturn, overload

import torch
from torch import Tensor, nn

from maetok_fast.checks import check_label_range, check_tensor
from maetok_fast.inference.plan import Plan
from maetok_fast.inference.rebuild import rebuild
from maetok_fast.kernels._dispatch import transformed
from maetok_fast.models.sit import DiffusionTransformer
from maetok_fast.models.tokenizer import MAETok
from maetok_fast.precision import Precision, resolve

__all__ = ["PreparedGenerator", "PreparedTokenizer", "prepare"]


@overload
def prepare(model: MAETok, precision: str | torch.dtype | Precision = "auto") -> PreparedTokenizer: ...
@overload
def prepare(model: DiffusionTransformer, precision: str | torch.dtype | Precision = "auto") -> PreparedGenerator: ...
def prepare(
    model: nn.Module, precision: str | torch.dtype | Precision = "auto"
) -> PreparedGenerator | PreparedTokenizer:
    """A fast inference form of a SiT, LightningDiT or MAETok on the device that the model is on.

    precision: of computing and weights: "auto" (the fastest that the device computes at full rate), a name ("bf16",
    "fp32"; "fp16" on CUDA), a torch dtype or a `Precision`; the result's `precision` says which and why.
    Inputs may have any floating dtype, outputs come back in it. TypeError for other models, ValueError for precisions
    that the device or this function lacks.
    """
    if not isinstance(model, (DiffusionTransformer, MAETok)):
        raise TypeError(
            f"prepare knows SiT, LightningDiT and MAETok, not {type(model).__name__}; pass one of these models"
        )
    chosen = resolve(precision, next(model.parameters()).device)
    if chosen.name == "fp8":
        raise ValueError("prepare computes in fp32, bf16 or fp16, fp8 is for training; pass precision='auto'")
    with torch.no_grad():
        rebuilt = rebuild(model, chosen.dtype).eval()
    return (PreparedTokenizer if isinstance(model, MAETok) else PreparedGenerator)(rebuilt, chosen)


# What a module has and a prepared model has not, and what to do instead.
_SNAPSHOT = "it is a snapshot; change the model itself and prepare it again"
_STAYS = "its packed weights stay where and as they were made; move or cast the model itself and prepare it again"
_KEEPS = "its packed weights have no state dict; save and load the model itself"
_MISSING = {
    **dict.fromkeys(("to", "cpu", "cuda", "half", "float", "double", "bfloat16", "type"), _STAYS),
    **dict.fromkeys(("state_dict", "load_state_dict", "save_pretrained", "push_to_hub"), _KEEPS),
    **dict.fromkeys(("parameters", "named_parameters", "buffers", "named_buffers", "apply"), _SNAPSHOT),
    **dict.fromkeys(("train", "requires_grad_", "zero_grad"), "it computes no gradients; train the model itself"),
}


class _Prepared:
    """The rebuilt `model`, its `config` and its `precision`."""

    def __init__(self, model: Any, precision: Precision) -> None:
        self.model, self.precision, self.dtype = model, precision, precision.dtype
        self.config = model.config

    def _input(self, name: str, x: Tensor) -> Tensor:
        if not isinstance(x, Tensor) or not x.is_floating_point():
            got = x.dtype if isinstance(x, Tensor) else type(x).__name__
            raise TypeError(f"{name}: expected a floating-point tensor, got {got}")
        if x.requires_grad and torch.is_grad_enabled():
            raise RuntimeError(
                f"{name} requires grad, but a prepared model computes no gradients; use the model itself"
            )
        if transformed((x,)):
            raise RuntimeError(
                f"{name} is under torch.func or forward-mode AD, and a prepared model has no derivatives; use the model"
            )
        return x.to(self.dtype)

    def eval(self) -> Any:
        """Itself: a prepared model is in eval mode."""
        return self

    def __getattr__(self, name: str) -> NoReturn:
        why = _MISSING.get(name)
        raise AttributeError(
            f"{type(self).__name__} has no attribute {name!r}" + (f": {why}" if why else ""), name=name, obj=self
        )

    def __copy__(self) -> NoReturn:
        raise TypeError(f"{type(self).__name__} cannot be copied: {_SNAPSHOT}")

    def __deepcopy__(self, memo: Any) -> NoReturn:
        raise TypeError(f"{type(self).__name__} cannot be copied: {_SNAPSHOT}")

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise TypeError(f"{type(self).__name__} cannot be pickled: {_KEEPS}, in the process that runs it")

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.config}, {self.precision.name})"


@contextlib.contextmanager
def _computing(device: torch.device) -> Iterator[None]:
    """No gradients, and no autocast: packed layers take exactly the prepared dtype."""
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        yield


class PreparedGenerator(_Prepared):
    """A SiT or LightningDiT made fast. Called like the model; samplers use `plan` and `step`."""

    def __call__(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """Velocity of latents x (B, L, C) or (B, C, H, W) at times t (B,) in [0, 1] for labels y (B,), in x's dtype."""
        inputs = self._input("x", x)
        with _computing(x.device):
            return self.model(inputs, t, y).to(x.dtype)

    def plan(self, ts: Tensor, y: Tensor) -> Plan:
        """Prepare steps at times ts (S,) for the labels y (B,) of one forward, null labels included.

        Memory: the modulations of at most `PLAN_ROWS` (step, unique label) pairs, or of one step if it has more.
        """
        if ts.ndim != 1 or not ts.is_floating_point():
            raise ValueError(f"ts must be floating-point times of shape (S,), got {ts.dtype} {tuple(ts.shape)}")
        if y.ndim != 1 or len(y) == 0:
            raise ValueError(f"y must be labels of shape (B,) with B >= 1, got {tuple(y.shape)}")
        check_label_range(y, self.config)
        return Plan(ts.to(y.device), y)

    def step(self, plan: Plan, i: int, x: Tensor) -> Tensor:
        """Velocity of x (B, ...) at time plan.ts[i] for the plan's labels; equals `self(x, ts[i], y)` to rounding."""
        if not 0 <= i < len(plan.ts):
            raise IndexError(f"step {i} is not one of the plan's {len(plan.ts)} steps")
        inputs = self._input("x", x)
        check_tensor("x", x, (plan.batch, *x.shape[1:]))
        with _computing(x.device):
            if plan.modulations is None or not plan.first <= i < plan.first + plan.chunk_steps:
                plan.modulations = None  # free the last chunk before the next is made
                plan.first = i // plan.chunk_steps * plan.chunk_steps
                ts = plan.ts[plan.first : plan.first + plan.chunk_steps]
                t = ts.float().repeat_interleave(len(plan.labels))
                plan.modulations = self.model.modulations(self.model.condition(t, plan.labels.repeat(len(ts))))
            return self.model.forward_modulated(inputs, plan.of_step(i)).to(x.dtype)


class PreparedTokenizer(_Prepared):
    """A MAETok made fast."""

    def encode(self, images: Tensor, mask: Tensor | None = None) -> Tensor:
        """images (B, 3, H, W) in [-1, 1] -> latents (B, L, H); see `MAETok.encode`."""
        inputs = self._input("images", images)
        with _computing(images.device):
            return self.model.encode(inputs, mask).to(images.dtype)

    def decode(self, latents: Tensor, size: int | tuple[int, int] | None = None) -> Tensor:
        """latents (B, L, H) -> images (B, 3, height, width), not clamped; see `MAETok.decode`."""
        inputs = self._input("latents", latents)
        with _computing(latents.device):
            return self.model.decode(inputs, size).to(latents.dtype)

    def __call__(self, images: Tensor, mask: Tensor | None = None) -> Tensor:
        """Reconstruction of images (B, 3, H, W)."""
        return self.decode(self.encode(images, mask), (images.shape[2], images.shape[3]))
