# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""ema_update: the exponential moving average of all of a model's parameters in one pass.

    ema[i] += (1 - decay) * (params[i] - ema[i])          cast_to[i] = params[i]     (optional, in the same pass)

One launch (one native call) for all tensors of a combination of dtypes (one, normally): their addresses stand in a
table, (tensors, 4) int64: ema, params, cast_to, elements; `_tensor_table.py` makes and keeps it. After an optimizer's
step that is ours as well, `adamw_step` does both in one pass.

fp32 inside whatever the tensors are. Keep `ema` in fp32: at decay 0.9999 an update is 1e-4 of a difference, which bf16
(2^-8) rounds away; a 16-bit average at a decay above 0.99 is warned of, once a process. Integer and bool tensors (a
batch norm's counter) have no average and take the new value. Of DTensors the local shards are averaged.

`cast_to` serves fp32 master weights (`maetok_fast.precision.MasterWeights`): the optimizer has just written the
masters, and this pass that reads them anyway hands them back to the low-precision model as well.

Why this is no `Op` record: an op is a function of tensors with a value and gradients; this one mutates lists, returns
nothing and has no derivative. It is a `torch.library.custom_op` all the same, so that torch.compile traces through it.

Backends by device: "triton" (CUDA), "native" (CPU), else "foreach": torch._foreach_lerp_ per combination of dtypes.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import _native
from ._dispatch import forced_backend, pick, why_missing
from ._registration import NAMESPACE
from ._tensor_table import DTYPES, Group, Tables, codes, local_shards, refuse_slower
from ._tiles import EMA_BLOCK, EMA_STEPS
from ._triton import tl, triton

__all__ = ["ema_update", "ema_update_ref"]

_EMA_DTYPES = (*DTYPES, torch.float64, torch.complex64, torch.complex128)
_HALF = (torch.bfloat16, torch.float16)
_HALF_DECAY = 0.99  # an update is then 1/100 of a difference or less, and bf16 resolves 1/256 of the value
_warned: set[str] = set()


def _averages(e: Tensor) -> bool:
    """Whether this tensor takes part in the average; integers and bools are copied."""
    return e.is_floating_point() or e.is_complex()


@torch.no_grad()
def ema_update_ref(
    ema: Sequence[Tensor], params: Sequence[Tensor], decay: float | Tensor, cast_to: Sequence[Tensor] = ()
) -> None:
    """ema[i] += (1 - decay) * (params[i] - ema[i]), then cast_to[i] = params[i]; tensor by tensor, in fp32 at least.
    Integer and bool tensors: ema[i] = params[i]."""
    for e, p in zip(ema, params):
        if not _averages(e):
            e.copy_(p)
            continue
        wide = torch.promote_types(torch.float32, e.dtype)
        weight = 1 - (decay.to(e.device, torch.float64) if isinstance(decay, Tensor) else decay)
        e.copy_(torch.lerp(e.to(wide), p.to(wide), weight.to(wide) if isinstance(weight, Tensor) else weight))
    for c, p in zip(cast_to, params):
        c.copy_(p)


@triton.jit
def _ema_kernel(
    table_ptr, blocks_ptr, decay_ptr, weight, ema_like, param_like, cast_like,
    BLOCK: tl.constexpr, STEPS: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """One program: STEPS * BLOCK elements of one tensor. The `_like` pointers only lend their element types."""
    program = tl.program_id(0).to(tl.int64)
    row = table_ptr + tl.load(blocks_ptr + 2 * program).to(tl.int64) * 4
    start = tl.load(blocks_ptr + 2 * program + 1).to(tl.int64) * (BLOCK * STEPS)
    count = tl.load(row + 3)
    if decay_ptr is not None:
        weight = (1.0 - tl.load(decay_ptr).to(tl.float64)).to(tl.float32)
    for i in range(STEPS):
        at = start + i * BLOCK
        # a mask against a count that the compiler knows nothing of would forbid vector loads: whole blocks have none
        if at + BLOCK <= count:
            _ema_block(row, at, None, weight, ema_like, param_like, cast_like, BLOCK, ALIGNED)
        elif at < count:
            _ema_block(row, at, count, weight, ema_like, param_like, cast_like, BLOCK, ALIGNED)


@triton.jit
def _ema_block(row, at, count, weight, ema_like, param_like, cast_like, BLOCK: tl.constexpr, ALIGNED: tl.constexpr):
    """BLOCK elements from `at` on; up to `count`, where that is given."""
    offs = tl.arange(0, BLOCK)
    e_ptrs = tl.load(row).to(ema_like.dtype) + at + offs
    p_ptrs = tl.load(row + 1).to(param_like.dtype) + at + offs
    if ALIGNED:  # nor can it see where an address from a table points
        e_ptrs = tl.multiple_of(e_ptrs, 16)
        p_ptrs = tl.multiple_of(p_ptrs, 16)
    if count is None:
        e, p = tl.load(e_ptrs).to(tl.float32), tl.load(p_ptrs).to(tl.float32)
        tl.store(e_ptrs, (e + weight * (p - e)).to(ema_like.dtype.element_ty))
    else:
        mask = at + offs < count
        e, p = tl.load(e_ptrs, mask=mask).to(tl.float32), tl.load(p_ptrs, mask=mask).to(tl.float32)
        tl.store(e_ptrs, (e + weight * (p - e)).to(ema_like.dtype.element_ty), mask=mask)
    if cast_like is not None:
        c_ptrs = tl.load(row + 2).to(cast_like.dtype) + at + offs
        if ALIGNED:
            c_ptrs = tl.multiple_of(c_ptrs, 16)
        if count is None:
            tl.store(c_ptrs, p.to(cast_like.dtype.element_ty))
        else:
            tl.store(c_ptrs, p.to(cast_like.dtype.element_ty), mask=mask)


# ---- the backends ---------------------------------------------------------------------------------------------------

_tables = Tables()


def _triton(group: Group, weight: float, decay: Tensor | None) -> None:
    assert group.blocks is not None
    with torch.cuda.device_of(group.table):
        _ema_kernel[(group.blocks.shape[0],)](
            group.table, group.blocks, decay, weight, *group.like,
            BLOCK=EMA_BLOCK, STEPS=EMA_STEPS, ALIGNED=group.aligned, num_warps=8,
        )  # fmt: skip


def _native_call(group: Group, weight: float) -> None:
    _native.lib().ema_update(group.table, weight, *codes(group.like))


def _foreach(ema: list[Tensor], params: list[Tensor], weight: float | Tensor, cast_to: list[Tensor]) -> None:
    """One foreach call per combination of dtypes and devices."""
    groups: dict[tuple[object, ...], list[int]] = {}
    for i, (e, p) in enumerate(zip(ema, params)):
        groups.setdefault((e.device, e.dtype, p.dtype), []).append(i)
    for members in groups.values():
        to, source = [ema[i] for i in members], [params[i] for i in members]
        if not _averages(to[0]):
            torch._foreach_copy_(to, source)
            continue
        wide = torch.promote_types(torch.float32, to[0].dtype)
        step: Any = weight.to(to[0].device, wide) if isinstance(weight, Tensor) else weight  # torch's stub: numbers
        if to[0].dtype == wide:
            torch._foreach_lerp_(to, [s.to(wide) for s in source], step)
        else:
            widened = [t.to(wide) for t in to]
            torch._foreach_lerp_(widened, [s.to(wide) for s in source], step)
            torch._foreach_copy_(to, widened)
    if cast_to:
        torch._foreach_copy_(cast_to, params)


def warn_of_16_bits(op: str, name: str, ema: Sequence[Tensor], decay: float | Tensor) -> None:
    """Once a process; a decay on a GPU is not read, which would synchronise, and counts as high. name: of the list."""
    if "16 bits" in _warned or not any(e.dtype in _HALF for e in ema):
        return
    if isinstance(decay, Tensor):
        decay = decay.item() if decay.device.type == "cpu" else 1.0
    if decay > _HALF_DECAY:
        _warned.add("16 bits")
        warnings.warn(
            f"{op}: an average in 16 bits at a decay above {_HALF_DECAY} stands still, its steps are rounded "
            f"away; keep {name} in fp32",
            stacklevel=2,
        )


def _choose(device: str) -> str:
    own = {"cpu": ["native"], "cuda": ["triton"]}.get(device, [])
    return pick("ema_update", device, own, ("native", "triton"), lambda name: why_missing(name, device))


# ---- the operator --------------------------------------------------------------------------------------------------


@torch.library.custom_op(f"{NAMESPACE}::ema_update", mutates_args=("ema", "cast_to"))
def _ema_update(
    ema: list[Tensor], params: list[Tensor], decay: float, decay_tensor: Tensor | None, cast_to: list[Tensor]
) -> None:
    on = ema[0].device.type
    name = _choose(on)
    at: float | Tensor = decay if decay_tensor is None else decay_tensor
    warn_of_16_bits("ema_update", "ema", ema, at)
    if forced_backend() == "reference":
        ema_update_ref(ema, params, at, cast_to)
        return
    apart: Sequence[int] = range(len(ema))
    if name != "reference":
        lists = (ema, params, cast_to)
        plan = _tables.plan(lists, EMA_BLOCK * EMA_STEPS if name == "triton" else None)
        apart = plan.apart
        refuse_slower("ema_update", [i for i in apart if _averages(ema[i])], lists)  # a copy has nothing slower
        for group in plan.groups:
            if name == "triton":
                _triton(group, 1 - decay, decay_tensor)
            else:
                _native_call(group, 1 - decay if decay_tensor is None else 1 - decay_tensor.item())
    if apart:
        rest = [[t[i] for i in apart] for t in (ema, params, cast_to) if t]
        _foreach(rest[0], rest[1], 1 - (at.double() if isinstance(at, Tensor) else at), rest[2] if cast_to else [])


@_ema_update.register_fake
def _(
    ema: list[Tensor], params: list[Tensor], decay: float, decay_tensor: Tensor | None, cast_to: list[Tensor]
) -> None:
    return None


@torch.no_grad()
def ema_update(
    ema: Sequence[Tensor], params: Sequence[Tensor], decay: float | Tensor, cast_to: Sequence[Tensor] | None = None
) -> None:
    """ema[i] += (1 - decay) * (params[i] - ema[i]) in place, then cast_to[i] = params[i] where `cast_to` is given.

    ema, params, cast_to: lists of tensors, equal shapes at equal places, any mixture of fp32, bf16 and fp16 (others,
    and views that are not dense, take a slower way, which strict mode refuses). Keep ema in fp32: UserWarning for 16
    bits at a decay above 0.99. No tensor may occur twice among ema and cast_to. Integer and bool tensors of ema take
    the new value. DTensors: those at equal places must have equal placements; their local shards are updated.
    decay: in [0, 1], a number or a tensor of one element. On the tensors' device it is read there, without a
    synchronisation; give it fp64, since 1 - 0.9999 in fp32 is off by 2e-4 of itself. Under torch.compile a number is a
    constant of the graph: pass a tensor where it changes.
    Gradients do not flow. ValueError when the lists or their shapes do not fit, or a number lies outside [0, 1].
    TypeError for an ema that can hold no average: FP8, or integers beside floating-point parameters.
    """
    ema, params, cast_to = list(ema), list(params), list(cast_to or ())
    if len(ema) != len(params) or (cast_to and len(cast_to) != len(ema)):
        raise ValueError(
            f"ema_update needs lists of equal length, got {len(ema)} ema, {len(params)} params"
            + (f" and {len(cast_to)} cast_to" if cast_to else "")
        )
    for i, (e, p) in enumerate(zip(ema, params)):
        if e.shape != p.shape or (cast_to and cast_to[i].shape != p.shape):
            shapes = " and ".join(str(tuple(t.shape)) for t in (e, p, *cast_to[i : i + 1]))
            raise ValueError(f"ema_update: the tensors at {i} must have one shape, got {shapes}")
        if e.dtype not in _EMA_DTYPES and (_averages(e) or _averages(p)):
            raise TypeError(f"ema_update: ema[{i}] is {e.dtype}, which holds no average of {p.dtype}; keep it in fp32")
    if not isinstance(decay, Tensor):
        if not 0 <= decay <= 1:
            raise ValueError(f"ema_update: decay must lie in [0, 1], got {decay}")
    elif decay.numel() != 1:
        raise ValueError(f"ema_update: decay must have one element, got shape {tuple(decay.shape)}")
    if not ema:
        return
    if "torch.distributed.tensor" in sys.modules:
        ema, params, cast_to = local_shards("ema_update", ema, params, cast_to)
    if not isinstance(decay, Tensor):
        _ema_update(ema, params, float(decay), None, cast_to)
    elif decay.device.type == "cpu" and ema[0].device.type != "cpu" and not torch.compiler.is_compiling():
        _ema_update(ema, params, decay.item(), None, cast_to)
    else:
        _ema_update(ema, params, 0.0, decay, cast_to)
