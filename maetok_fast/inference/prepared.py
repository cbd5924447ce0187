# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""What the caller of `prepare` holds: the model's API over a rebuilt model (rebuild.py).

Not supported, and said so in one sentence where it is asked for: gradients of either mode, copying and pickling,
`.to(device)`, state dicts, training mode (label dropout and stochastic depth are off). Nor torch.compile over packed
weights. The original model is neither changed nor freed; the prepared one is a snapshot with its own weights: prepare
again after training on. An enclosing autocast changes nothing, the precision is `prepare`'s. On CUDA nothing is packed:
the same structure runs eagerly over the dense weights in the chosen dtype.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, Generic, NoReturn, TypeVar, overload

import torch
from torch import Tensor
from torch.autograd import forward_ad

from maetok_fast.checks import check_label_range, check_tensor
from maetok_fast.inference.packing import Target
from maetok_fast.inference.plan import Plan
from maetok_fast.inference.rebuild import rebuild
from maetok_fast.kernels import _native, _tune
from maetok_fast.kernels._gemm import why_not_packed
from maetok_fast.kernels.packed_linear import PackedLinear
from maetok_fast.models.sit import DiffusionTransformer
from maetok_fast.models.tokenizer import MAETok
from maetok_fast.precision import Precision, resolve

__all__ = ["PreparedGenerator", "PreparedTokenizer", "prepare"]

# (weights, computation) that differ, on a CPU
_KEPT = ((torch.bfloat16, torch.float32), (torch.int8, torch.float32), (torch.int8, torch.bfloat16))
M = TypeVar("M", DiffusionTransformer, MAETok)
P = TypeVar("P", bound="_Prepared[Any]")


@overload
def prepare(
    model: MAETok,
    precision: str | torch.dtype | Precision = "auto",
    weights: torch.dtype | None = None,
    *,
    reproducible: bool = False,
) -> PreparedTokenizer: ...
@overload
def prepare(
    model: DiffusionTransformer,
    precision: str | torch.dtype | Precision = "auto",
    weights: torch.dtype | None = None,
    *,
    reproducible: bool = False,
) -> PreparedGenerator: ...
def prepare(
    model: MAETok | DiffusionTransformer,
    precision: str | torch.dtype | Precision = "auto",
    weights: torch.dtype | None = None,
    *,
    reproducible: bool = False,
) -> PreparedTokenizer | PreparedGenerator:
    """A fast inference form of a SiT, LightningDiT or MAETok on the device that the model is on.

    precision: of computation and weights, whatever `maetok_fast.precision.resolve` knows but fp8; "auto" takes the
        fastest that the device computes at full rate. The result's `precision` says which, and why.
    weights: on a CPU, the dtype in which packed weights are kept where it is to be another than that of the
        computation: torch.bfloat16 under fp32 halves a model's memory at no cost in time; torch.int8, where the
        processor multiplies bytes (AVX512_VNNI, AVX_VNNI, AMX-INT8), quarters it and is several times as fast, but
        rounds weights and activations to 255 steps a row. `print` of the result says by how much each kind of layer
        errs on Gaussian inputs; what that does to a model's images is to be looked at, with its own weights.
    reproducible: on a CPU, every product by the native GEMM and every attention by the native kernel, races or not: a
        sample's result is then the same bits whatever else is in its batch.
    On a CPU the layers of each shape are raced over what can compute them (kernels/packed_linear.py), once a machine;
    `print` of the result says what won.
    Inputs may have any floating dtype, outputs come back in it. TypeError for other models, ValueError for precisions
    that the device or this function lacks.
    """
    if not isinstance(model, (DiffusionTransformer, MAETok)):
        raise TypeError(
            f"prepare knows SiT, LightningDiT and MAETok, not {type(model).__name__}; pass one of these models"
        )
    device = next(model.parameters()).device
    resolved = resolve(precision, device, packed=device.type == "cpu" and _native.why_missing() is None)
    if resolved.name == "fp8":
        raise ValueError("prepare computes in fp32, bf16 or fp16, fp8 is for training; pass precision='auto'")
    if weights not in (None, resolved.dtype):
        if (weights, resolved.dtype) not in _KEPT or device.type != "cpu":
            raise ValueError(
                f"weights={weights} under {resolved.name} on {device.type}: weights are kept in the dtype of the "
                "computation, or on a CPU in torch.bfloat16 under fp32, or in torch.int8"
            )
        reason = why_not_packed("int8" if weights == torch.int8 else "bf16", device)
        if reason is not None:
            raise ValueError(f"weights={weights} cannot be used here: {reason}")
    if reproducible:
        reason = why_not_packed("fp32", device)
        if reason is not None:
            raise ValueError(f"reproducible=True cannot be had here: {reason}")
    target = Target(resolved.dtype, resolved.dtype if weights is None else weights, reproducible)
    if isinstance(model, MAETok):
        return PreparedTokenizer(rebuild(model, target), resolved, reproducible)
    return PreparedGenerator(rebuild(model, target), resolved, reproducible)


class _Prepared(Generic[M]):
    """The rebuilt `model`, its `config`, and the `precision` that it computes in."""

    def __init__(self, model: M, precision: Precision, reproducible: bool = False) -> None:
        self.model: M = model
        self.reproducible = reproducible
        self.precision, self.dtype = precision, precision.dtype
        self.config: Any = model.config

    @contextlib.contextmanager
    def _computing(self, device: torch.device) -> Iterator[None]:
        """No gradients, and no autocast: packed layers take exactly the prepared dtype."""
        races = _tune.without_races() if self.reproducible else contextlib.nullcontext()
        with torch.no_grad(), torch.autocast(device.type, enabled=False), races:
            yield

    def _input(self, name: str, x: Tensor) -> Tensor:
        if not isinstance(x, Tensor) or not x.is_floating_point():
            got = x.dtype if isinstance(x, Tensor) else type(x).__name__
            raise TypeError(f"{name}: expected a floating-point tensor, got {got}")
        _refuse_gradients(name, x)
        return x.to(self.dtype)

    def __repr__(self) -> str:
        errors: dict[str, list[float]] = {}
        for m in self.model.modules():
            if isinstance(m, PackedLinear):
                gated = " gated" if m.gated else ""
                layer = f"{m.in_features} -> {m.out_features}{gated} {m.activation}: {m.backend}"
                errors.setdefault(layer, []).append(m.error)
        text = f"{type(self).__name__}({self.config}, {self.dtype})"
        for layer, of_it in errors.items():
            text += f"\n  {len(of_it):3} x {layer}" + (f", error {max(of_it):.2%}" if any(of_it) else "")
        return text

    def _refuse(self, what: str, instead: str) -> NoReturn:
        raise TypeError(f"a prepared model {what}; {instead}")

    def __deepcopy__(self, memo: object) -> NoReturn:
        self._refuse("cannot be copied, its packed weights have no copy", "call prepare on the model again")

    def __copy__(self) -> NoReturn:
        self.__deepcopy__(None)

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        self._refuse("cannot be pickled or sent to a process", "save the model itself and call prepare after loading")

    def to(self, *args: object, **kwargs: object) -> NoReturn:
        """Not supported: the weights are packed for one device and dtype."""
        self._refuse("stays on its device and in its dtype", "move the model itself and call prepare again")

    cpu = cuda = half = bfloat16 = float = double = to

    def state_dict(self, *args: object, **kwargs: object) -> NoReturn:
        """Not supported: packed weights have no portable form."""
        self._refuse("has no state dict and no parameters", "use those of the model that it was made of")

    load_state_dict = parameters = named_parameters = state_dict

    def eval(self: P) -> P:
        """Itself: a prepared model is always in eval mode."""
        return self

    def train(self: P, mode: bool = True) -> P:
        """Not supported but for `train(False)`."""
        if mode:
            self._refuse("is for inference only and cannot train", "train the model itself")
        return self

    def requires_grad_(self: P, requires_grad: bool = True) -> P:
        """Not supported but for `requires_grad_(False)`."""
        if requires_grad:
            self._refuse("computes no gradients", "use the model itself")
        return self


def _refuse_gradients(name: str, x: Any) -> None:
    """RuntimeError where a result without derivative would silently be a wrong one."""
    if not isinstance(x, Tensor):
        return
    if x.requires_grad and torch.is_grad_enabled():
        raise RuntimeError(f"{name} requires grad, but a prepared model computes no gradients; use the model itself")
    if x.is_floating_point() and forward_ad.unpack_dual(x).tangent is not None:
        raise RuntimeError(f"{name} has a tangent, but a prepared model computes no gradients; use the model itself")


class PreparedGenerator(_Prepared[DiffusionTransformer]):
    """A SiT or LightningDiT made fast. Called like the model; samplers use `plan` and `step`."""

    def __call__(
        self, x: Tensor, t: Tensor, y: Tensor, r: Tensor | None = None, beta: Tensor | None = None, exits: bool = False
    ) -> Any:
        """Velocity of latents x (B, L, C) or (B, C, H, W) at times t (B,) in [0, 1] for labels y (B,), in x's dtype; r,
        beta, exits: as the model's."""
        inputs = self._input("x", x)
        for name, value in (("t", t), ("r", r), ("beta", beta)):
            _refuse_gradients(name, value)
        with self._computing(x.device):
            return _in_dtype(self.model(inputs, t, y, r, beta, exits), x.dtype)

    def plan(self, ts: Tensor, y: Tensor, **conditions: Tensor) -> Plan:
        """Prepare steps at times ts (S,) for the labels y (B,) of one forward, null labels included. conditions: r and
        beta (S,) of models that have them.

        Memory: the modulations of at most `PLAN_ROWS` (step, unique label) pairs, or of one step if it has more.
        """
        for name, value in {"ts": ts, **conditions}.items():
            if value.shape != ts.shape or ts.ndim != 1 or not value.is_floating_point():
                raise ValueError(
                    f"{name} must be floating-point, of shape (S,), got {value.dtype} {tuple(value.shape)}"
                )
            _refuse_gradients(name, value)
        if y.ndim != 1 or len(y) == 0:
            raise ValueError(f"y must be labels of shape (B,) with B >= 1, got {tuple(y.shape)}")
        check_label_range(y, self.config)
        return Plan(ts.to(y.device), y, {name: value.to(y.device) for name, value in conditions.items()})

    def step(self, plan: Plan, i: int, x: Tensor, exits: bool = False) -> Any:
        """Velocity of x (B, ...) at time plan.ts[i] for the plan's labels; equals `self(x, ts[i], y)` to rounding."""
        if not 0 <= i < len(plan.ts):
            raise IndexError(f"step {i} is not one of the plan's {len(plan.ts)} steps")
        inputs = self._input("x", x)
        check_tensor("x", x, (plan.batch, *x.shape[1:]))
        with self._computing(x.device):
            if plan.modulations is None or not plan.first <= i < plan.first + plan.chunk_steps:
                plan.modulations = None  # free the last chunk before the next is made
                plan.first = i // plan.chunk_steps * plan.chunk_steps
                t, y, conditions = plan.chunk()
                plan.modulations = self.model.modulations(self.model.condition(t, y, **conditions), t)
            return _in_dtype(self.model.forward_modulated(inputs, plan.of_step(i), exits), x.dtype)


def _in_dtype(v: Any, dtype: torch.dtype) -> Any:
    """A velocity, or two."""
    return tuple(part.to(dtype) for part in v) if isinstance(v, tuple) else v.to(dtype)


class PreparedTokenizer(_Prepared[MAETok]):
    """A MAETok made fast."""

    def encode(self, images: Tensor, mask: Tensor | None = None) -> Tensor:
        """images (B, 3, H, W) in [-1, 1] -> latents (B, L, H); see `MAETok.encode`."""
        inputs = self._input("images", images)
        with self._computing(images.device):
            return self.model.encode(inputs, mask).to(images.dtype)

    def decode(self, latents: Tensor, size: int | tuple[int, int] | None = None) -> Tensor:
        """latents (B, L, H) -> images (B, 3, height, width), not clamped; see `MAETok.decode`."""
        inputs = self._input("latents", latents)
        with self._computing(latents.device):
            return self.model.decode(inputs, size).to(latents.dtype)

    def __call__(self, images: Tensor, mask: Tensor | None = None) -> Tensor:
        """Reconstruction of images (B, 3, H, W)."""
        return self.decode(self.encode(images, mask), (images.shape[2], images.shape[3]))
