# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""One precision setting, by name or torch dtype, for inference and training.

    name   computes in   weights at inference   weights in training   where
    auto   one of these  its own                its own               everywhere: the fastest at full rate there
    fp32   float32       float32                float32               everywhere
    bf16   bfloat16      bfloat16               float32 (autocast)    everywhere; emulated where auto takes fp32
    fp16   float16       float16                float32 (autocast)    CUDA
    fp8    float8 GEMMs  bfloat16               float32 (autocast)    CUDA compute capability >= 8.9

auto is bf16 on CUDA >= 8.0 and on processors with AMX or an AVX512_BF16 that is measured to beat fp32, as far as oneDNN
may use them (`maetok_fast.kernels._processor`), and fp32 elsewhere. Milliseconds of a linear layer (512, 1152) x (1152,
4608), fp32 and bf16, on two Zen 5 cores (torch 2.14): 28 and 6.2; held to avx512: 28 and 34; to avx2: 29 and 105.

`resolve(setting, device)` is the only door: it knows the names and refuses what the device cannot do. fp8 is bf16 with
other linear layers: `to_fp8(model)` exchanges those that gain by it and says why the others stay.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import time
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from maetok_fast.kernels import Fp8Linear, _native, _processor, why_not_fp8
from maetok_fast.kernels.fp8_linear import why_no_fp8_hardware

__all__ = [
    "AUTO",
    "Fp8Report",
    "Fp8Row",
    "MasterWeights",
    "Precision",
    "bf16_cost",
    "resolve",
    "to_fp8",
    "why_bf16_is_emulated",
]

log = logging.getLogger("maetok_fast")
AUTO = "auto"


@dataclass(frozen=True)
class Precision:
    """name: "fp32", "bf16", "fp16" or "fp8". dtype: that of activations and of everything but fp8's GEMM operands.

    why: where "auto" chose it, the choice in one line, to be printed by commands; else "".
    """

    name: str
    dtype: torch.dtype
    why: str = field(default="", compare=False)

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


def resolve(
    setting: str | torch.dtype | Precision = AUTO, device: torch.device | str = "cpu", *, packed: bool = False
) -> Precision:
    """The `Precision` of a name ("auto" included), a torch dtype or a `Precision`, checked against the device.

    ValueError for an unknown setting, for fp16 off CUDA and for fp8 where the hardware has no float8 tensor cores.
    Asking by name for bf16 where it is emulated works, and warns once with what it costs there; not where the caller
    multiplies by packed weights of ours, which need no bf16 instructions (`packed`).
    """
    device = torch.device(device)
    if setting == AUTO:
        chosen = _automatic(device)
        log.info(chosen.why)
        return chosen
    name = setting.name if isinstance(setting, Precision) else setting
    name = name if isinstance(name, str) else _DTYPES.get(name, "")
    if name not in _NAMES:
        raise ValueError(
            f"unknown precision {setting!r}: expected one of {', '.join(_NAMES)}, {AUTO}, or torch.float32, "
            "torch.bfloat16 or torch.float16"
        )
    if name == "fp16" and device.type != "cuda":
        raise ValueError(f"precision fp16 needs a CUDA device, this is {device.type}; use {AUTO}")
    if name == "fp8":
        why = why_no_fp8_hardware(device, scaling="tensor")
        if why is not None:
            raise ValueError(f"precision fp8 is not available: {why}; use {AUTO}")
    present = device.type == "cpu" or (device.type == "cuda" and torch.cuda.is_available())
    if name == "bf16" and present and not packed:
        why = why_bf16_is_emulated(device)
        if why is not None:
            _warn_of_emulation(device, why)
    return setting if isinstance(setting, Precision) and setting == _NAMES[name] else _NAMES[name]


def why_bf16_is_emulated(device: torch.device | str) -> str | None:
    """Why bf16 products do not run at the device's full rate, in words, or None where they do. Measures nothing."""
    device = torch.device(device)
    if device.type == "cuda":
        if not torch.cuda.is_available():
            return "torch finds no CUDA device"
        major, minor = torch.cuda.get_device_capability(device)
        return None if major >= 8 else f"compute capability {major}.{minor} has no bf16 tensor cores (8.0 has)"
    if device.type != "cpu":
        return f"nothing is known of bf16 on {device.type}"
    if not torch.backends.mkldnn.is_available() or not torch.backends.mkldnn.enabled:
        return "this torch computes without oneDNN"
    level = _processor.onednn_level(_native.level())
    if level in ("avx512bf16", "amx"):
        return None
    held = f" (the processor has {_native.own_level()})" if level != _native.own_level() else ""
    return f"oneDNN may use {level} here{held}, which has no bf16 products"


# A choice that flips from run to run would make a resumed run another one. Processors that multiply bf16 at twice the
# rate of fp32 measure about 0.5, those without their tiles 1.2 to 1.9.
_CLEARLY = 0.75


@functools.cache
def _automatic(device: torch.device) -> Precision:
    emulated = why_bf16_is_emulated(device)
    if emulated is not None:
        return replace(_NAMES["fp32"], why=f"precision auto: fp32 on {device.type}: {emulated}")
    means = "tensor cores" if device.type == "cuda" else _processor.onednn_level(_native.level())
    if means == "avx512bf16" and bf16_cost(device) > _CLEARLY:
        # some processors have the instructions at half of fp32's rate (Sapphire and Emerald Rapids without their tiles)
        return replace(
            _NAMES["fp32"], why=f"precision auto: fp32 on {device.type}: bf16 products of {means} are slower here"
        )
    return replace(_NAMES["bf16"], why=f"precision auto: bf16 on {device.type}: {means} computes it at full rate")


@functools.cache
def _warn_of_emulation(device: torch.device, why: str) -> None:
    warnings.warn(
        f"bf16 is emulated on this device: a linear layer takes {bf16_cost(device):.1f}x of fp32's time ({why}); "
        f"use precision={AUTO!r} or 'fp32'",
        stacklevel=3,
    )


@functools.cache
def bf16_cost(device: torch.device) -> float:
    """The time of a linear layer, 128 tokens of 1152 to 1152 features, in bf16, as a multiple of fp32's. Measured."""
    layers = []
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.ones(128, 1152, device=device, dtype=dtype)
        layers.append((x, torch.ones(1152, 1152, device=device, dtype=dtype)))
    times: tuple[list[float], ...] = ([], [])
    with torch.no_grad():
        for turn in range(17):
            for (x, weight), taken in zip(layers, times):
                started = time.perf_counter()
                F.linear(x, weight)
                if device.type == "cuda":
                    torch.cuda.synchronize(device)
                if turn > 0:  # the first one makes the kernels
                    taken.append(time.perf_counter() - started)
    fp32, bf16 = map(min, times)  # what other programs take of the processor only adds
    return bf16 / fp32


@dataclass(frozen=True)
class Fp8Row:
    """One linear layer of a model: its name, in and out features, and why it stays as it is (None: it became FP8)."""

    name: str
    in_features: int
    out_features: int
    reason: str | None


@dataclass(frozen=True)
class Fp8Report:
    """What `to_fp8` did. `print(report)` shows the table, equal layers of a stack in one line."""

    rows: tuple[Fp8Row, ...]

    @property
    def share(self) -> float:
        """The share of all linear layers' weights that became FP8, 0 to 1."""
        sizes = [(r.in_features * r.out_features, r.reason is None) for r in self.rows]
        total = sum(size for size, _ in sizes)
        return sum(size for size, swapped in sizes if swapped) / total if total else 0.0

    def __str__(self) -> str:
        lines: dict[tuple[str, int, int, str], int] = {}
        for r in self.rows:
            name = ".".join("*" if part.isdigit() else part for part in r.name.split("."))
            key = (name, r.in_features, r.out_features, r.reason or "fp8")
            lines[key] = lines.get(key, 0) + 1
        table = [f"{count:4} x {n:40} {i:6} -> {o:<6} {why}" for (n, i, o, why), count in lines.items()]
        return "\n".join([*table, f"{self.share:.0%} of the linear layers' weights compute in fp8"])


def to_fp8(model: nn.Module, *, scaling: str = "row", min_features: int = 1024, emulate: bool = False) -> Fp8Report:
    """Exchanges, in place, the model's big `nn.Linear` layers for `Fp8Linear` over the same parameters.

    A layer stays as it is where FP8 cannot take it (features that are no multiples of 16, a device without float8),
    where it would lose (fewer than `min_features` in or out: the casts cost more than the product saves, see
    `maetok_fast.kernels.fp8_linear`), where its input has a row per image instead of per token (embedders, and
    modulations whose `per_token` is not set), and where it is no plain `nn.Linear`. Optimizers, state dicts and names
    are untouched. Train and sample under `resolve("bf16").autocast(...)` as before: what stays computes in bf16.

    scaling: "row" or "tensor". emulate: exchange on any device, computing the same slowly.
    Returns the table of all linear layers. On a device without float8 nothing changes and every row says why.
    """
    from maetok_fast.layers import LabelEmbedder, Linear, Modulation, TimestepEmbedder

    rows, per_image = [], []
    for name, module in list(model.named_modules()):
        known = isinstance(module, (LabelEmbedder, Modulation, TimestepEmbedder))
        if (known or name.endswith("adaLN_modulation")) and not getattr(module, "per_token", False):
            per_image.append(name + ".")
        if not isinstance(module, nn.Linear):
            continue
        reason = why_not_fp8(
            module.in_features, module.out_features, module.weight.dtype, module.weight.device, scaling, emulate
        )
        if type(module) is Fp8Linear:
            reason = module.why_not_fp8()
        elif type(module) not in (nn.Linear, Linear) or hasattr(module, "parametrizations"):
            reason = f"it is a {type(module).__name__}, not a plain nn.Linear"
        elif name.startswith(tuple(per_image)):
            reason = "its input has a row per image, not per token: the cast of its weight is the larger work"
        elif reason is None and min(module.in_features, module.out_features) < min_features:
            reason = f"fewer than {min_features} features: the casts cost more than the product saves"
        elif reason is None:
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, Fp8Linear.of(module, scaling=scaling, emulate=emulate))
        rows.append(Fp8Row(name, module.in_features, module.out_features, reason))
    return Fp8Report(tuple(rows))


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
        torch._foreach_copy_(self.model, list[Tensor](self.parameters))
