# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""ema_update: the exponential moving average of all of a model's parameters in one pass.

    ema[i] += (1 - decay) * (params[i] - ema[i])          cast_to[i] = params[i]     (optional, in the same pass)

A model has hundreds of tensors, most of them small: one call per tensor is launch overhead on a GPU and fork overhead
on a CPU. Here the addresses and sizes of all tensors stand in one table, cut into blocks of equal size, and one launch
(one native call) walks the blocks:

    table (tensors, 4) int64: ema, params, cast_to, elements      blocks (n, 2) int32: tensor, block within the tensor

The table is kept from call to call as long as the same memory is passed, which is what a training loop does. Tensors
are grouped by dtype, so a list of mixed dtypes costs a launch for each combination that occurs (one, normally).

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
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _native
from ._dispatch import fall_back, forced_backend, pick, why_missing
from ._registration import NAMESPACE
from ._tiles import EMA_BLOCK, EMA_STEPS
from ._triton import tl, triton

__all__ = ["ema_update", "ema_update_ref"]

_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # as csrc/cpu/types.h numbers them
_CACHED = 16  # tables kept


_EMA_DTYPES = (*_DTYPES, torch.float64, torch.complex64, torch.complex128)
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


# ---- the table -----------------------------------------------------------------------------------------------------


class _Group(NamedTuple):
    """Tensors of one combination of dtypes, as a kernel takes them."""

    table: Tensor  # (tensors, 4) int64 on the CPU or the device: addresses of ema, params, cast_to (or 0), elements
    blocks: Tensor | None  # (n, 2) int32: tensor, block; None on the CPU
    like: tuple[Tensor, Tensor, Tensor | None]  # the first tensors, for their dtypes and device
    aligned: bool  # all addresses are multiples of 16 bytes


class _Plan(NamedTuple):
    groups: tuple[_Group, ...]
    apart: tuple[int, ...]  # tensors that no kernel takes, by index


_plans: dict[tuple[object, ...], _Plan] = {}


def _dense(t: Tensor) -> bool:
    """Whether the elements fill one stretch of memory, in whatever order of dimensions."""
    if t.is_contiguous():
        return True
    expected = 1
    for stride, size in sorted((s, n) for s, n in zip(t.stride(), t.shape) if n != 1):
        if stride != expected:
            return False
        expected *= size
    return True


def _fits(tensors: Sequence[Tensor]) -> bool:
    first = tensors[0]
    return all(t.dtype in _DTYPES and t.device == first.device for t in tensors) and (
        all(t.is_contiguous() for t in tensors)
        or (all(t.stride() == first.stride() for t in tensors) and _dense(first))
    )


def _plan(ema: Sequence[Tensor], params: Sequence[Tensor], cast_to: Sequence[Tensor], on_device: bool) -> _Plan:
    """The table for these tensors, made once for the same memory."""
    lists = (ema, params, cast_to) if cast_to else (ema, params)
    key = (on_device, *[(t.data_ptr(), t.dtype, t.shape, t.stride()) for tensors in lists for t in tensors])
    plan = _plans.get(key)
    if plan is None:
        while len(_plans) >= _CACHED:
            _plans.pop(next(iter(_plans)))
        plan = _plans[key] = _make_plan(ema, params, cast_to, on_device)
    return plan


def _make_plan(ema: Sequence[Tensor], params: Sequence[Tensor], cast_to: Sequence[Tensor], on_device: bool) -> _Plan:
    rows: dict[tuple[Any, ...], list[int]] = {}
    apart = []
    for i, e in enumerate(ema):
        tensors = [e, params[i], *cast_to[i : i + 1]]
        if not _fits(tensors):
            apart.append(i)
        elif e.numel():
            aligned = all(t.data_ptr() % 16 == 0 for t in tensors)
            rows.setdefault((e.device, aligned, *[t.dtype for t in tensors]), []).append(i)
    groups = []
    for (_device, aligned, *_dtypes), members in rows.items():
        table, blocks = [], []
        for n, i in enumerate(members):
            cast = cast_to[i].data_ptr() if cast_to else 0
            table.append([ema[i].data_ptr(), params[i].data_ptr(), cast, ema[i].numel()])
            if on_device:
                count = -(-ema[i].numel() // (EMA_BLOCK * EMA_STEPS))
                blocks.append(torch.stack((torch.full((count,), n), torch.arange(count)), 1))
        first = members[0]
        device = ema[first].device
        groups.append(
            _Group(
                torch.tensor(table).to(device),
                torch.cat(blocks).int().to(device) if on_device else None,
                (ema[first], params[first], cast_to[first] if cast_to else None),
                bool(aligned),
            )
        )
    return _Plan(tuple(groups), tuple(apart))


def _triton(group: _Group, weight: float, decay: Tensor | None) -> None:
    assert group.blocks is not None
    with torch.cuda.device_of(group.table):
        _ema_kernel[(group.blocks.shape[0],)](
            group.table, group.blocks, decay, weight, *group.like,
            BLOCK=EMA_BLOCK, STEPS=EMA_STEPS, ALIGNED=group.aligned, num_warps=8,
        )  # fmt: skip


def _native_call(group: _Group, weight: float) -> None:
    codes = [-1 if t is None else _DTYPES[t.dtype] for t in group.like]
    _native.lib().ema_update(group.table, weight, *codes)


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


def _refuse_slower(apart: Sequence[int], lists: Sequence[Sequence[Tensor]]) -> None:
    """Strict mode raises where tensors that a kernel could average, in other dtypes or strides, are left to foreach."""
    slower = [i for i in apart if _averages(lists[0][i])]
    if not slower:
        return
    first = ", ".join(
        f"{t.dtype} with strides {t.stride()}" for t in (tensors[slower[0]] for tensors in lists if tensors)
    )
    why = f"{len(slower)} of {len(lists[0])} tensors are not dense fp32, bf16 or fp16 on one device, the first: {first}"
    fall_back("ema_update", why)


def _warn_of_16_bits(ema: Sequence[Tensor], decay: float | Tensor) -> None:
    """Once a process; a decay on a GPU is not read, which would synchronise, and counts as high."""
    if "16 bits" in _warned or not any(e.dtype in _HALF for e in ema):
        return
    if isinstance(decay, Tensor):
        decay = decay.item() if decay.device.type == "cpu" else 1.0
    if decay > _HALF_DECAY:
        _warned.add("16 bits")
        warnings.warn(
            f"ema_update: an average in 16 bits at a decay above {_HALF_DECAY} stands still, its steps are rounded "
            "away; keep ema in fp32",
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
    _warn_of_16_bits(ema, at)
    if forced_backend() == "reference":
        ema_update_ref(ema, params, at, cast_to)
        return
    apart: Sequence[int] = range(len(ema))
    if name != "reference":
        plan = _plan(ema, params, cast_to, name == "triton")
        apart = plan.apart
        _refuse_slower(apart, (ema, params, cast_to))
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


def _local(*lists: list[Tensor]) -> tuple[list[Tensor], ...]:
    """The local shards of DTensors; the operator knows no other way to split one."""
    from torch.distributed.tensor import DTensor

    placed = [[t.placements if isinstance(t, DTensor) else None for t in tensors] for tensors in lists if tensors]
    for i, places in enumerate(zip(*placed)):
        if any(p != places[0] for p in places):
            raise ValueError(
                f"ema_update: the tensors at {i} must be sharded alike, got {' and '.join(map(str, places))}"
            )
    return tuple([t.to_local() if isinstance(t, DTensor) else t for t in tensors] for tensors in lists)


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
        ema, params, cast_to = _local(ema, params, cast_to)
    if not isinstance(decay, Tensor):
        _ema_update(ema, params, float(decay), None, cast_to)
    elif decay.device.type == "cpu" and ema[0].device.type != "cpu" and not torch.compiler.is_compiling():
        _ema_update(ema, params, decay.item(), None, cast_to)
    else:
        _ema_update(ema, params, 0.0, decay, cast_to)
