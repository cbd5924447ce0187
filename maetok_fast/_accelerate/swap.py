# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""`accelerate(model)` and `restore(model)`: find, check, exchange; and the report that says what became of each module.

modules, children first ── looks like an attention, MLP, block? ── read ── check ──> exchange the class
                                     │ no: left alone                 └─ Unfit: left alone, with the reason
"""

from __future__ import annotations

import collections
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from maetok_fast._accelerate.checking import check, is_rotary, settings
from maetok_fast._accelerate.fast import (
    Fast,
    FastAttention,
    FastBlock,
    FastLinear,
    FastMlp,
    FastMultihead,
    FastRotary,
    become,
    unbecome,
)
from maetok_fast._accelerate.packed import PACKED
from maetok_fast._accelerate.reading import (
    Block,
    Unfit,
    is_linear,
    plain_class,
    read_attention,
    read_block,
    read_mlp,
    reads_as_attention,
    reads_as_block,
    reads_as_mlp,
)
from maetok_fast.inference.packing import PACK_WIDTH, Target
from maetok_fast.kernels._gemm import why_not_packed

__all__ = ["Report", "accelerate", "restore"]

_OWN = "maetok_fast's own modules are fast as they are; its models are prepared by maetok_fast.inference.prepare"
_STATE = "_accelerated"  # on the model: what `for_inference` changed beside classes


@dataclass
class Report:
    """What `accelerate` did. swapped: path -> (class, its fast form); kept: path -> (class, why it was left alone);
    others: how many modules of each class have no fast form; notes: sentences about the whole."""

    swapped: dict[str, tuple[str, str]] = field(default_factory=dict)
    kept: dict[str, tuple[str, str]] = field(default_factory=dict)
    others: collections.Counter[str] = field(default_factory=collections.Counter)
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        lines = ["accelerate: nothing was swapped" if not self.swapped else "accelerate: swapped"]
        packed = tuple(f"{path}." for path, (_, kind) in self.swapped.items() if kind.startswith("Packed"))
        # what lies in a packed module is called by it only where packed weights are not for the call
        told = {path: row for path, row in self.swapped.items() if row[1][:4] != "Fast" or not path.startswith(packed)}
        lines += _grouped(told, "{0} -> {1}")
        if self.kept:
            lines += ["left alone", *_grouped(self.kept, "{0}: {1}")]
        if self.others:
            lines.append("no fast form: " + ", ".join(f"{n} {name}" for name, n in sorted(self.others.items())))
        return "\n".join(lines + self.notes)


def _grouped(rows: dict[str, tuple[str, str]], form: str) -> list[str]:
    """A line for each pair, with how often it occurs and the first path."""
    paths: dict[tuple[str, str], list[str]] = {}
    for path, row in rows.items():
        paths.setdefault(row, []).append(path)
    return [f"  {len(found):4} x {form.format(*row)}   ({found[0] or 'the model'})" for row, found in paths.items()]


def accelerate(
    model: nn.Module, *, for_inference: bool = False, weights: torch.dtype | None = None, quiet: bool = False
) -> Report:
    """Exchanges what it recognises in `model` for fast layers, in place, and prints what it did and why not more.

    Recognised by structure, never by import, and only where a small input gives the same result: transformer blocks,
    attention and MLPs of timm's ViTs (DINOv2, registers, EVA, DINOv3), of DiT, SiT and LightningDiT, of TiTok and of
    MAETok's own code; nn.MultiheadAttention; nn.Linear. Parameters, buffers, names, hooks and the modules themselves
    stay as they are, only the class of a module is exchanged, so that optimizers, state dicts, copies, pickles, DDP and
    FSDP go on; `restore(model)` exchanges it back. Outputs and gradients are the same to the dtype's rounding. What a
    fast layer cannot do (masks, active dropout, hooks on children that it does not call) the original does.

    for_inference: eval mode, no gradients (`restore` brings back both), and on a CPU weights packed beside the
        originals at the first call, in twice the memory: in the dtype of the parameters, which inputs must have too.
        Calls under autocast or torch.compile, or of inputs that require gradients, do without. A parameter that was
        written to, exchanged, moved or cast is packed again (not one written to through `.data`, which nothing tells).
    weights: on a CPU, in which dtype packed weights are kept: torch.bfloat16 under fp32, or torch.int8, which rounds
        inputs too, as `maetok_fast.inference.prepare` says.
    quiet: prints nothing. Returns the report that is printed otherwise.
    TypeError for what is no module, ValueError for weights that cannot be kept so.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"accelerate: expected an nn.Module, got {type(model).__name__}")
    restore(model)
    report = Report()
    target = _target(model, weights, report) if for_inference else None
    if weights is not None and target is None:
        raise ValueError(f"accelerate: weights={weights} is for for_inference=True on a CPU; leave it out")
    plans = _plans(model, target, report)
    if for_inference:
        flags = [(n, m.training) for n, m in model.named_modules()], [(n, p.requires_grad) for n, p in _named(model)]
        model.__dict__[_STATE] = flags
        model.eval().requires_grad_(False)
    covered: set[nn.Module] = set()
    for path, module in model.named_modules():
        if module not in plans:
            continue
        kind, what = plans[module]
        small = isinstance(module, nn.Linear) and min(module.weight.shape) < PACK_WIDTH
        if target is not None and kind in PACKED and module not in covered and not small:
            kind = PACKED[kind]
            module.__dict__["_fast_target"] = target
            covered.update(_packed_below(module, what))
        report.swapped[path] = (type(module).__name__, kind.__name__)
        become(module, kind, what)
    report.swapped = dict(sorted(report.swapped.items(), key=lambda row: row[1][1] == "FastLinear"))
    if not quiet:
        print(report)
    return report


def restore(model: nn.Module) -> None:
    """Undoes `accelerate`: every class, training flag and requires_grad as it was. Without effect on other models."""
    for module in model.modules():
        if isinstance(module, Fast):
            unbecome(module)
    for module in model.modules():
        state = module.__dict__.pop(_STATE, None)
        if state is not None:
            modules, parameters = dict(module.named_modules()), dict(_named(module))
            for name, training in state[0]:
                if name in modules:
                    modules[name].training = training
            for name, wanted in state[1]:
                if name in parameters:
                    parameters[name].requires_grad_(wanted)


def _named(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return list(model.named_parameters())


def _packed_below(module: nn.Module, what: Any) -> list[nn.Module]:
    """The modules whose weights the packed form of `module` holds: of a block its branches, as far as recognised."""
    if not isinstance(what, Block):
        return list(module.modules())
    names = [name for name, part in ((what.attn, what.attention), (what.mlp, what.feed)) if part is not None]
    return [m for name in names for m in module.get_submodule(name).modules()]


def _target(model: nn.Module, weights: torch.dtype | None, report: Report) -> Target | None:
    """In what weights are packed; None where nothing is."""
    first = next((p for p in model.parameters() if p.is_floating_point()), None)
    if first is None:
        return None
    dtype, device = first.dtype, first.device
    reason = f"the parameters are {dtype}" if dtype not in (torch.float32, torch.bfloat16) else None
    reason = reason or why_not_packed({torch.int8: "int8", torch.float32: "fp32"}.get(weights or dtype, "bf16"), device)
    if weights is not None:
        fits = weights == dtype or weights == torch.int8 or (weights, dtype) == (torch.bfloat16, torch.float32)
        if reason is not None or not fits:
            raise ValueError(
                f"accelerate: weights={weights} cannot be kept beside {dtype} parameters on {device.type}: "
                f"{reason or 'they are the dtype of the parameters, torch.bfloat16 under fp32, or torch.int8'}"
            )
    if reason is not None:
        report.notes.append(f"weights are not packed: {reason}")
        return None
    kept = "" if weights in (None, dtype) else f", kept in {weights}"
    report.notes.append(
        f"packed for inference at the first call ({dtype}{kept}), beside the parameters: the memory of both"
    )
    return Target(dtype, weights or dtype)


def _plans(model: nn.Module, target: Target | None, report: Report) -> dict[nn.Module, tuple[type[Fast], Any]]:
    """What each module becomes."""
    plans: dict[nn.Module, tuple[type[Fast], Any]] = {}
    parts: dict[nn.Module, Any] = {}
    known: dict[Any, str | None] = {}
    for path, module in reversed(list(model.named_modules())):
        try:
            options = _options(module, parts)
            if _ours(module):
                report.notes += [_OWN] if _OWN not in report.notes else []
                options = options if target is not None and is_linear(module) else []
            if options:
                kind, what = _first_that_computes_the_same(module, options, target, known)
                plans[module], parts[module] = (kind, what), what
            elif not module._modules:
                report.others[type(module).__name__] += 1
        except Unfit as why:
            report.kept[path] = (type(module).__name__, str(why))
    report.kept = dict(reversed(report.kept.items()))
    return plans


def _ours(module: nn.Module) -> bool:
    return plain_class(module).__module__.startswith(("maetok_fast.layers", "maetok_fast.models"))


def _options(module: nn.Module, parts: dict[nn.Module, Any]) -> list[tuple[type[Fast], Any]]:
    """What a module may be; none for those that look like nothing known. Unfit where it looks so and is not."""
    if is_linear(module):
        return [(FastLinear, None)]
    if isinstance(module, torch.jit.ScriptModule) or _ours(module):
        return []
    if isinstance(module, nn.Linear):
        raise Unfit("it is a kind of nn.Linear of its own")
    if is_rotary(module):
        return [(FastRotary, None)]
    if reads_as_block(module):
        return [(FastBlock, block) for block in read_block(module, parts)]
    if reads_as_attention(module):
        what = read_attention(module)
        return [(FastMultihead if isinstance(module, nn.MultiheadAttention) else FastAttention, what)]
    return [(FastMlp, mlp) for mlp in read_mlp(module)] if reads_as_mlp(module) else []


def _first_that_computes_the_same(
    module: nn.Module, options: list[tuple[type[Fast], Any]], target: Target | None, known: dict[Any, str | None]
) -> tuple[type[Fast], Any]:
    reasons = []
    for kind, what in options:
        if kind in (FastLinear, FastRotary):  # nothing to read wrongly
            return kind, what
        key = (kind, what, settings(module))
        if key not in known:
            try:
                check(module, kind, what, target)
                known[key] = None
            except Unfit as why:
                known[key] = str(why)
        reason = known[key]
        if reason is None:
            return kind, what
        reasons.append(reason)
    raise Unfit(reasons[0])
