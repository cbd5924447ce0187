# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""adamw_step: a step of AdamW over all of a model's parameters, their average and their copy, in one pass over memory.

    g = scale * gradient                 m += (1 - beta1) (g - m)              v = beta2 v + (1 - beta2) g^2
    p -= rate / (1 - beta1^t) * m / (sqrt(v / (1 - beta2^t)) + eps) + rate * weight_decay * p          t: the new count
    average += (1 - decay) (p - average)           cast_to = p                 p: as it was stored

torch.optim.AdamW's formula (arXiv 1711.05101). Apart, clipping reads and writes the gradients, the optimizer reads
four tensors and writes three, the average reads two and writes one; bytes a parameter, everything fp32:

    clip 8, AdamW 28, average 12 = 48 (40 without a clip)          here 36: p, g, m, v, average in, all but g out

`scale` is the clip's coefficient, read where the gradients are; `finite` a flag: where it is 0 nothing changes, not
even the counts. Both are tensors on the device, which nobody waits for.

One launch (one native call) for all tensors of a combination of dtypes, and on a GPU one of a single program before
it, which counts the step and makes what depends on a tensor's count. The tables are `_tensor_table.py`'s:

    table (tensors, 8) int64: p, m, v, average, cast_to, elements, count, bits of weight_decay      gradients (tensors,)

fp32 inside. m and v are fp32; parameters, gradients, average and cast_to fp32, bf16 or fp16. Keep the average in fp32,
as `ema_update` says. Of DTensors the local shards are stepped.

Why this is no `Op` record: as `ema_update`, it mutates lists and returns nothing. It is a `torch.library.custom_op`
all the same. Backends by device: "triton" (CUDA), "native" (CPU), else and for what these do not take (fp64, views
that are not dense) "reference": `adamw_step_ref`, tensor by tensor.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from . import _native
from ._dispatch import pick, why_missing
from ._registration import NAMESPACE
from ._tensor_table import Group, Tables, codes, local_shards, refuse_slower
from ._tiles import ADAMW_BLOCK, ADAMW_COUNT, ADAMW_STEPS
from ._triton import tl, triton
from .ema import warn_of_16_bits
from .fp8_linear import _Steps

__all__ = ["adamw_step", "adamw_step_ref"]

Number = float | Tensor


@torch.no_grad()
def adamw_step_ref(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avg: Sequence[Tensor],
    exp_avg_sq: Sequence[Tensor],
    steps: Sequence[Tensor],
    average: Sequence[Tensor] = (),
    cast_to: Sequence[Tensor] = (),
    *,
    rate: Number,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float | Sequence[float] = 0.0,
    decay: Number = 0.9999,
    scale: Tensor | None = None,
    finite: Tensor | None = None,
) -> None:
    """The step, tensor by tensor, in fp32 at least; arguments as `adamw_step`'s."""
    for i, p in enumerate(params):
        wide = torch.promote_types(torch.float32, p.dtype)
        by = weight_decay if isinstance(weight_decay, (int, float)) else weight_decay[i]
        g = grads[i].to(wide)
        if scale is not None:
            g = g * scale.to(p.device, wide)
        count = steps[i].to(p.device, torch.float64) + 1
        first = torch.lerp(exp_avg[i].to(wide), g, 1 - betas[0])
        second = exp_avg_sq[i].to(wide) * betas[1] + g.square() * (1 - betas[1])
        speed = rate.to(p.device, torch.float64) if isinstance(rate, Tensor) else rate
        root = (second.sqrt() / (1 - betas[1] ** count).sqrt().to(wide)).add_(eps)
        value = p.to(wide)
        value = value - ((speed / (1 - betas[0] ** count)).to(wide) * first / root + speed * by * value)
        new = [(p, value), (exp_avg[i], first), (exp_avg_sq[i], second), (steps[i], count)]
        if average:
            a = average[i]
            wider = torch.promote_types(torch.float32, a.dtype)
            rest = 1 - (decay.to(a.device, torch.float64) if isinstance(decay, Tensor) else decay)
            weight = rest.to(wider) if isinstance(rest, Tensor) else rest
            new.append((a, torch.lerp(a.to(wider), value.to(p.dtype).to(wider), weight)))
        if cast_to:
            new.append((cast_to[i], value.to(p.dtype)))
        for old, result in new:
            result = result.to(old.device, old.dtype)
            old.copy_(result if finite is None else torch.where(finite.to(old.device).bool(), result, old))


# ---- the Triton kernels --------------------------------------------------------------------------------------------


@triton.jit
def _adamw_count_kernel(
    table_ptr, numbers_ptr, rate_ptr, rate, finite_ptr, tensors, BETA1: tl.constexpr, BETA2: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Counts the step of every tensor and writes its numbers (tensors, 3) fp32: rate / (1 - beta1^t),
    1 / sqrt(1 - beta2^t), rate * weight_decay. In fp64, as beta2^t is all but 1. The betas are the binary logarithms of
    them, constants of the kernel since an argument would be rounded to fp32."""
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < tensors
    row = table_ptr + offs.to(tl.int64) * 8
    count_ptrs = tl.load(row + 6, mask=mask, other=0).to(tl.pointer_type(tl.float32))
    count = tl.load(count_ptrs, mask=mask, other=0.0)
    if finite_ptr is not None:
        count += tl.where(tl.load(finite_ptr) != 0, 1.0, 0.0)
    else:
        count += 1.0
    tl.store(count_ptrs, count, mask=mask)
    if rate_ptr is not None:
        speed = tl.load(rate_ptr).to(tl.float64)
    else:
        speed = tl.full([], 1.0, tl.float64) * rate
    t = tl.maximum(count, 1.0).to(tl.float64)  # 0 where the very first gradient is not finite
    weight_decay = tl.load(row + 7, mask=mask, other=0).to(tl.float64, bitcast=True)
    first = speed / (1.0 - tl.exp2(t * tl.full([], BETA1, tl.float64)))
    second = 1.0 / tl.sqrt(1.0 - tl.exp2(t * tl.full([], BETA2, tl.float64)))
    numbers = numbers_ptr + offs * 3
    tl.store(numbers, first.to(tl.float32), mask=mask)
    tl.store(numbers + 1, second.to(tl.float32), mask=mask)
    tl.store(numbers + 2, (speed * weight_decay).to(tl.float32), mask=mask)


@triton.jit
def _adamw_kernel(
    table_ptr, gradients_ptr, numbers_ptr, blocks_ptr, decay_ptr, weight, scale_ptr, finite_ptr,
    rest1, beta2, rest2, eps, param_like, grad_like, average_like, cast_like,
    BLOCK: tl.constexpr, STEPS: tl.constexpr, ALIGNED: tl.constexpr, GRADS_ALIGNED: tl.constexpr,
):  # fmt: skip
    """One program: STEPS * BLOCK elements of one tensor. The `_like` pointers only lend their element types. rest1,
    rest2: 1 - beta1, 1 - beta2."""
    program = tl.program_id(0).to(tl.int64)
    tensor = tl.load(blocks_ptr + 2 * program).to(tl.int64)
    start = tl.load(blocks_ptr + 2 * program + 1).to(tl.int64) * (BLOCK * STEPS)
    row = table_ptr + tensor * 8
    count = tl.load(row + 5)
    if finite_ptr is not None:
        count = tl.where(tl.load(finite_ptr) != 0, count, 0)  # then no block has elements
    if decay_ptr is not None:
        weight = (1.0 - tl.load(decay_ptr).to(tl.float64)).to(tl.float32)
    scale = 1.0
    if scale_ptr is not None:
        scale = tl.load(scale_ptr).to(tl.float32)
    for i in range(STEPS):
        at = start + i * BLOCK
        # whole blocks have no mask, which would forbid vector loads
        if at + BLOCK <= count:
            _adamw_block(row, gradients_ptr + tensor, numbers_ptr + tensor * 3, at, None, weight, scale, rest1, beta2,
                         rest2, eps, param_like, grad_like, average_like, cast_like, BLOCK, ALIGNED,
                         GRADS_ALIGNED)  # fmt: skip
        elif at < count:
            _adamw_block(row, gradients_ptr + tensor, numbers_ptr + tensor * 3, at, count, weight, scale, rest1, beta2,
                         rest2, eps, param_like, grad_like, average_like, cast_like, BLOCK, ALIGNED,
                         GRADS_ALIGNED)  # fmt: skip


@triton.jit
def _adamw_block(
    row, gradient_ptr, numbers_ptr, at, count, weight, scale, rest1, beta2, rest2, eps,
    param_like, grad_like, average_like, cast_like,
    BLOCK: tl.constexpr, ALIGNED: tl.constexpr, GRADS_ALIGNED: tl.constexpr,
):  # fmt: skip
    """BLOCK elements from `at` on; up to `count`, where that is given."""
    mask = None if count is None else at + tl.arange(0, BLOCK) < count
    p_ptrs = _elements(row, param_like, at, BLOCK, ALIGNED)
    m_ptrs = _elements(row + 1, numbers_ptr, at, BLOCK, ALIGNED)
    v_ptrs = _elements(row + 2, numbers_ptr, at, BLOCK, ALIGNED)
    g_ptrs = _elements(gradient_ptr, grad_like, at, BLOCK, GRADS_ALIGNED)
    g = tl.load(g_ptrs, mask=mask).to(tl.float32) * scale
    m, v = tl.load(m_ptrs, mask=mask), tl.load(v_ptrs, mask=mask)
    p = tl.load(p_ptrs, mask=mask).to(tl.float32)
    m += rest1 * (g - m)
    v = beta2 * v + rest2 * (g * g)
    tl.store(m_ptrs, m, mask=mask)
    tl.store(v_ptrs, v, mask=mask)
    root = tl.sqrt(v) * tl.load(numbers_ptr + 1) + eps
    p -= tl.load(numbers_ptr) * m / root + tl.load(numbers_ptr + 2) * p
    stored = p.to(param_like.dtype.element_ty)
    tl.store(p_ptrs, stored, mask=mask)
    p = stored.to(tl.float32)
    if average_like is not None:
        a_ptrs = _elements(row + 3, average_like, at, BLOCK, ALIGNED)
        a = tl.load(a_ptrs, mask=mask).to(tl.float32)
        tl.store(a_ptrs, (a + weight * (p - a)).to(average_like.dtype.element_ty), mask=mask)
    if cast_like is not None:
        c_ptrs = _elements(row + 4, cast_like, at, BLOCK, ALIGNED)
        tl.store(c_ptrs, p.to(cast_like.dtype.element_ty), mask=mask)


@triton.jit
def _elements(address_ptr, like, at, BLOCK: tl.constexpr, ALIGNED: tl.constexpr):
    """Pointers to BLOCK elements, from the `at`-th of a tensor of `like`'s type on, whose address stands in a table."""
    ptrs = tl.load(address_ptr).to(like.dtype) + at + tl.arange(0, BLOCK)
    if ALIGNED:  # the compiler cannot see where an address from a table points
        ptrs = tl.multiple_of(ptrs, 16)
    return ptrs


# ---- the backends --------------------------------------------------------------------------------------------------

_tables = Tables(lambda row: row[1].dtype == row[2].dtype == torch.float32)


class _Step(NamedTuple):
    """What is the same for all tensors."""

    rate: Number
    betas: tuple[float, float]
    eps: float
    decay: Number
    scale: Tensor | None
    finite: Tensor | None


def _pointer_and_number(value: Number) -> tuple[Tensor | None, float]:
    return (value, 0.0) if isinstance(value, Tensor) else (None, value)


def _triton(group: Group, grads: Sequence[Tensor], step: _Step) -> None:
    assert group.blocks is not None
    gradients, aligned = group.moving(grads)
    tensors = len(group.members)
    numbers = torch.empty((tensors, 3), dtype=torch.float32, device=group.table.device)
    logs = [math.log2(beta) if beta > 0 else -math.inf for beta in step.betas]
    param, _, _, average, cast = group.like
    at, decay = _pointer_and_number(step.decay)
    with torch.cuda.device_of(group.table):
        _adamw_count_kernel[(-(-tensors // ADAMW_COUNT),)](
            group.table, numbers, *_pointer_and_number(step.rate), step.finite, tensors,
            BETA1=logs[0], BETA2=logs[1], BLOCK=ADAMW_COUNT, num_warps=4,
        )  # fmt: skip
        if len(group.blocks):
            _adamw_kernel[(len(group.blocks),)](
                group.table, gradients, numbers, group.blocks, at, 1 - decay, step.scale, step.finite,
                1 - step.betas[0], step.betas[1], 1 - step.betas[1], step.eps,
                param, grads[group.members[0]], average, cast,
                BLOCK=ADAMW_BLOCK, STEPS=ADAMW_STEPS, ALIGNED=group.aligned, GRADS_ALIGNED=aligned, num_warps=8,
            )  # fmt: skip


def _native_call(group: Group, grads: Sequence[Tensor], step: _Step) -> None:
    if step.finite is not None and not step.finite.item():
        return
    scale = 1.0 if step.scale is None else step.scale
    rate, decay, scale = (v.item() if isinstance(v, Tensor) else v for v in (step.rate, step.decay, scale))
    param, _, _, average, cast = group.like
    types = codes((param, grads[group.members[0]], average, cast))
    gradients = group.moving(grads)[0]
    _native.lib().adamw_step(group.table, gradients, rate, *step.betas, step.eps, 1 - decay, scale, *types)


def _choose(device: str) -> str:
    own = {"cpu": ["native"], "cuda": ["triton"]}.get(device, [])
    return pick("adamw_step", device, own, ("native", "triton"), lambda name: why_missing(name, device))


# ---- the operator --------------------------------------------------------------------------------------------------

_MUTATED = ("params", "exp_avg", "exp_avg_sq", "steps", "average", "cast_to")


@torch.library.custom_op(f"{NAMESPACE}::adamw_step", mutates_args=_MUTATED)
def _adamw_step(
    params: list[Tensor], grads: list[Tensor], exp_avg: list[Tensor], exp_avg_sq: list[Tensor], steps: list[Tensor],
    average: list[Tensor], cast_to: list[Tensor], rate: float, rate_tensor: Tensor | None, beta1: float, beta2: float,
    eps: float, weight_decay: list[float], decay: float, decay_tensor: Tensor | None, scale: Tensor | None,
    finite: Tensor | None,
) -> None:  # fmt: skip
    name = _choose(params[0].device.type)
    _Steps.step()  # of sharded parameters the shards' version counters move, not those of the weights made of them
    speed: Number = rate if rate_tensor is None else rate_tensor
    at: Number = decay if decay_tensor is None else decay_tensor
    warn_of_16_bits("adamw_step", "average", average, at)
    lists = (params, exp_avg, exp_avg_sq, average, cast_to)
    apart: Sequence[int] = range(len(params))
    if name != "reference":
        block = ADAMW_BLOCK * ADAMW_STEPS if name == "triton" else None
        plan = _tables.plan(lists, block, grads, steps, weight_decay)
        apart = plan.apart
        refuse_slower("adamw_step", apart, (params, grads, exp_avg, exp_avg_sq, average, cast_to))
        step = _Step(speed, (beta1, beta2), eps, at, scale, finite)
        for group in plan.groups:
            (_triton if name == "triton" else _native_call)(group, grads, step)
    if apart:
        every = (params, grads, exp_avg, exp_avg_sq, steps, average, cast_to)
        p, g, m, v, counts, averages, casts = ([t[i] for i in apart] if t else [] for t in every)
        adamw_step_ref(
            p, g, m, v, counts, averages, casts, rate=speed, betas=(beta1, beta2), eps=eps,
            weight_decay=[weight_decay[i] for i in apart], decay=at, scale=scale, finite=finite,
        )  # fmt: skip


@_adamw_step.register_fake
def _(
    params: list[Tensor], grads: list[Tensor], exp_avg: list[Tensor], exp_avg_sq: list[Tensor], steps: list[Tensor],
    average: list[Tensor], cast_to: list[Tensor], rate: float, rate_tensor: Tensor | None, beta1: float, beta2: float,
    eps: float, weight_decay: list[float], decay: float, decay_tensor: Tensor | None, scale: Tensor | None,
    finite: Tensor | None,
) -> None:  # fmt: skip
    return None


def _check(named: dict[str, list[Tensor]], steps: list[Tensor], one: dict[str, object]) -> None:
    """That the lists fit and single elements are such."""
    params = named["params"]
    for name, tensors in (named | {"steps": steps}).items():
        if len(tensors) != len(params) and (tensors or name not in ("average", "cast_to")):
            raise ValueError(f"adamw_step needs lists of equal length, got {len(params)} params, {len(tensors)} {name}")
    shapes = [p.shape for p in params]
    for name, tensors in named.items():
        if tensors and [t.shape for t in tensors] != shapes:
            i = next(i for i, t in enumerate(tensors) if t.shape != shapes[i])
            raise ValueError(
                f"adamw_step: the tensors at {i} must have one shape, got {tuple(shapes[i])} of params and "
                f"{tuple(tensors[i].shape)} of {name}"
            )
        for i, t in enumerate(tensors):
            if not t.is_floating_point():
                raise TypeError(f"adamw_step: {name}[{i}] is {t.dtype}; leave what is no floating-point number out")
    for name, value in [*((f"steps[{i}]", s) for i, s in enumerate(steps)), *one.items()]:
        if isinstance(value, Tensor) and value.numel() != 1:
            raise ValueError(f"adamw_step: {name} must have one element, got shape {tuple(value.shape)}")


def _split(value: Number, device: torch.device) -> tuple[float, Tensor | None]:
    """(the number, None), or (0, the tensor) where it has to be read on the device."""
    if not isinstance(value, Tensor):
        return float(value), None
    if value.device.type == "cpu" and device.type != "cpu" and not torch.compiler.is_compiling():
        return float(value.item()), None
    return 0.0, value


@torch.no_grad()
def adamw_step(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avg: Sequence[Tensor],
    exp_avg_sq: Sequence[Tensor],
    steps: Sequence[Tensor],
    average: Sequence[Tensor] = (),
    cast_to: Sequence[Tensor] = (),
    *,
    rate: Number,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float | Sequence[float] = 0.0,
    decay: Number = 0.9999,
    scale: Tensor | None = None,
    finite: Tensor | None = None,
) -> None:
    """A step of AdamW in place, then average[i] += (1 - decay) * (params[i] - average[i]) and cast_to[i] = params[i]
    where these lists are given (empty: not).

    params, grads, exp_avg, exp_avg_sq, average, cast_to: lists of tensors, equal shapes at equal places; params, grads,
    average and cast_to any mixture of fp32, bf16 and fp16, the moments fp32 (others, and views that are not dense, take
    a slower way, which strict mode refuses). steps: how many steps each tensor has made, one fp32 element each, on its
    device, counted up here. No tensor may occur twice. DTensors: those at equal places must have equal placements.
    rate: the learning rate; decay: of the average, in [0, 1]: numbers, or tensors of one element, which are read on the
    tensors' device (a decay in fp64). weight_decay: >= 0, for all or one for each. betas in [0, 1), eps >= 0.
    scale: one element, by which gradients are multiplied as they are read. finite: one element; where it is 0 (False),
    nothing changes. Under torch.compile numbers are constants of the graph: pass tensors where they change.
    Gradients do not flow. ValueError where the lists, their shapes or the numbers do not fit, TypeError for tensors of
    other than floating-point numbers; UserWarning for an average in 16 bits at a decay above 0.99.
    """
    lists = [list(t) for t in (params, grads, exp_avg, exp_avg_sq, average, cast_to)]
    named = dict(zip(("params", "grads", "exp_avg", "exp_avg_sq", "average", "cast_to"), lists))
    counts = list(steps)
    _check(named, counts, {"rate": rate, "decay": decay, "scale": scale, "finite": finite})
    each = (
        [float(weight_decay)] * len(counts) if isinstance(weight_decay, (int, float)) else [*map(float, weight_decay)]
    )
    if len(each) != len(counts):
        raise ValueError(f"adamw_step needs a weight_decay for each of {len(counts)} params, got {len(each)}")
    if not all(0 <= beta < 1 for beta in betas):
        raise ValueError(f"adamw_step: betas must lie in [0, 1), got {betas}")
    for name, least in (("rate", rate), ("eps", eps), ("weight_decay", min(each, default=0.0))):
        if not isinstance(least, Tensor) and not least >= 0:
            raise ValueError(f"adamw_step: {name} must be at least 0, got {least}")
    if not isinstance(decay, Tensor) and not 0 <= decay <= 1:
        raise ValueError(f"adamw_step: decay must lie in [0, 1], got {decay}")
    if not counts:
        return
    if "torch.distributed.tensor" in sys.modules:
        lists = list(local_shards("adamw_step", *lists))
    device = lists[0][0].device
    scale, finite = (None if t is None else t.to(device, non_blocking=True) for t in (scale, finite))
    _adamw_step(
        *lists[:4], counts, *lists[4:], *_split(rate, device), *map(float, betas), eps, each,
        *_split(decay, device), scale, finite,
    )  # fmt: skip
