# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""One precision setting, by name or torch dtype, for inference and training.

    name   computes in   weights at inference   weights in training   where
    fp32   float32       float32                float32               everywhere
    bf16   bfloat16      bfloat16               float32 (autocast)    everywhere; fast with AMX and CUDA >= 8.0
    fp16   float16       float16                float32 (autocast)    CUDA
    fp8    float8 GEMMs  bfloat16               float32 (autocast)    CUDA compute capability >= 8.9

`resolve(setting, device)` is the only door: it knows the names and refuses what the device cannot do.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

__all__ = ["MasterWeights", "Precision", "resolve"]

FP8_CAPABILITY = (8, 9)  # Ada and Hopper are the first with float8 tensor cores


@dataclass(frozen=True)
class Precision:
    """name: "fp32", "bf16", "fp16" or "fp8". dtype: that of activations and of everything but fp8's GEMM operands."""

    name: str
    dtype: torch.dtype

    def autocast(self, device_type: str) -> contextlib.AbstractContextManager[object]:
        """The context for a training step over fp32 weights: autocast to `dtype`, nothing for fp32."""
        if self.dtype == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(device_type, self.dtype)


_NAMES = {
    "fp32": Precision("fp32", torch.float32),
    "bf16": Precision("bf16", torch.bfloat16),
    "fp16": Precision("fp16", torch.float16),
    "fp8": Precision("fp8", torch.bfloat16),
}
_DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


def resolve(setting: str | torch.dtype | Precision, device: torch.device | str = "cpu") -> Precision:
    """The `Precision` of a name, a torch dtype or a `Precision`, checked against the device.

    ValueError for an unknown setting, for fp16 off CUDA and for fp8 where the hardware has no float8 tensor cores.
    """
    device = torch.device(device)
    if isinstance(setting, Precision):
        setting = setting.name
    name = setting if isinstance(setting, str) else _DTYPES.get(setting, "")
    if name not in _NAMES:
        raise ValueError(
            f"unknown precision {setting!r}: expected one of {', '.join(_NAMES)}, or torch.float32, torch.bfloat16 or "
            "torch.float16"
        )
    if name == "fp16" and device.type != "cuda":
        raise ValueError(f"precision fp16 needs a CUDA device, this is {device.type}; use bf16")
    if name == "fp8":
        why = why_no_fp8(device)
        if why is not None:
            raise ValueError(f"precision fp8 is not available: {why}; use bf16")
    return _NAMES[name]


def why_no_fp8(device: torch.device) -> str | None:
    """Why float8 GEMMs cannot run fast on the device, or None."""
    if device.type != "cuda":
        return f"it needs CUDA hardware of compute capability 8.9 or newer, this is {device.type}"
    if not torch.cuda.is_available():
        return "torch finds no CUDA device"
    have = torch.cuda.get_device_capability(device)
    if have < FP8_CAPABILITY:
        return f"it needs compute capability 8.9 or newer, this GPU has {have[0]}.{have[1]}"
    return None


class MasterWeights:
    """fp32 copies of a low-precision model's parameters, for the optimizer: an update of 1e-4 of a weight is lost in
    bf16, whose steps are 2^-8 of it.

        masters = MasterWeights(model.parameters())
        optimizer = torch.optim.AdamW(masters.parameters, fused=True)
        loss.backward()
        masters.collect()                                            # gradients, in fp32
        optimizer.step()
        ema_update(ema, masters.parameters, decay, masters.model)    # the average, and the weights back to the model
        optimizer.zero_grad()

    model: the parameters as given. parameters: the fp32 ones (`nn.Parameter`), at equal places. Save the masters, not
    the model: the model is their rounding. Without an average `publish()` hands the weights back.
    """

    def __init__(self, parameters: Iterable[Tensor]) -> None:
        self.model: list[Tensor] = list(parameters)
        self.parameters = [nn.Parameter(p.detach().to(torch.float32, copy=True)) for p in self.model]

    @torch.no_grad()
    def collect(self) -> None:
        """Moves the model's gradients to the masters, as fp32; parameters without one leave the masters' at None."""
        for model, master in zip(self.model, self.parameters):
            master.grad = None if model.grad is None else model.grad.to(torch.float32)
            model.grad = None

    @torch.no_grad()
    def publish(self) -> None:
        """Rounds the masters into the model."""
        torch._foreach_copy_(self.model, self.parameters)
