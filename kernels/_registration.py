# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""How a record's kernels meet autograd and torch.compile.

                       ┌─ eager ──> Backend.forward, in an autograd.Function where gradients are wanted
    (backend, *args) ──┤
                       └─ traced ─> torch.ops.maetok_fast.<name>(backend, *args) and <name>_backward:
                                    torch.compile, export, fake tensors, dispatch modes, the profiler

The custom op is opaque to the compiler and carries the chosen backend as its first argument, so that the backward meets
the tensors that the same backend saved. In eager mode it costs more than a small kernel: the dispatcher, the schema and
torch's Python wrappers take 3 times as long as an autograd.Function, and a sampling step of SiT-XL makes 170 calls. So
plain tensors in eager mode go straight to the backend; both ways share `remember` and `gradients`.

Forward mode: torch gives a custom op no way to register a tangent and returns zeros for it. So the op's own kernel for
the Autograd key looks for tangents, and for torch.func, which takes no such kernels either, and computes the reference
there, with tangents and gradients by torch's own formulas: in a compiled graph, an exported program or anywhere else
that recorded the op.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._library.autograd import make_autograd_impl

from ._dispatch import has_tangent, no_autocast, with_tangents
from ._record import Record

__all__ = ["NAMESPACE", "compute", "compute_backward", "plain_eager", "register"]

NAMESPACE = "maetok_fast"


def plain_eager(args: tuple[Any, ...]) -> bool:
    """Whether nothing watches this call that would have to see a torch operator: no compiler, dispatch mode, fake
    tensor or other subclass, tracer or profiler."""
    if torch.compiler.is_compiling():
        return False
    if torch._C._len_torch_dispatch_stack() or torch._C._get_tracing_state() is not None:
        return False
    return not torch._C._autograd._profiler_enabled() and all(
        type(a) is Tensor or type(a) is torch.nn.Parameter for a in args if isinstance(a, Tensor)
    )


# ---- a backend's kernels, on tensors that this module allocates ----------------------------------------------------


def _contiguous(args: Sequence[Any]) -> list[Any]:
    return [a.contiguous() if isinstance(a, Tensor) else a for a in args]


_HERE = contextlib.nullcontext()


def _on_device_of(x: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Launches go to the tensor's GPU, whichever is the current one."""
    return torch.cuda.device_of(x) if x.is_cuda else _HERE


def compute(record: Record[..., Any], name: str, args: Sequence[Any]) -> Any:
    """Runs backend `name` forward: the record's `Results`."""
    found = record.backend(name)
    with _on_device_of(args[0]):
        a = record.Args(*_contiguous(args))
        if found.allocates:
            return record.Results(*found.forward(a, None))
        out = record.results(a, name)
        found.forward(a, out)
        return out


def compute_backward(
    record: Record[..., Any],
    name: str,
    args: Sequence[Any],
    kept: Sequence[Tensor],
    grads: Sequence[Tensor],
    needs: Sequence[bool],
) -> Any:
    """Runs backend `name` backward: a gradient for each argument that needs one, as `Args`, None elsewhere.

    kept: the saved tensors, behind the outputs where the record keeps them. grads: of the outputs not detached.
    """
    kernel = record.backend(name).backward
    assert kernel is not None
    outputs = () if record.keep_output else (None,) * len(record.outputs)
    out = record.Results(*outputs, *kept)
    with _on_device_of(grads[0]):
        a = record.Args(*_contiguous(args))
        g = record.Outputs(*_contiguous(grads), *(None,) * len(record.detached))
        d = record.Args(*(torch.empty_like(v) if n else None for v, n in zip(a, needs)))
        if record.written:
            extra = {n: torch.empty_like(a[i]) for n, i in zip(record.written, record.written_at) if d[i] is None}
            d = d._replace(**extra)
        kernel(a, out, g, d)
    return d


# ---- registration --------------------------------------------------------------------------------------------------


def register(record: Record[..., Any]) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """(the custom op `<name>`, the eager call), both (backend, *args); registers `<name>_backward` too.

    The custom op returns (*outputs, *saved), a single tensor bare; the eager call returns what the op returns.
    """
    # Without defaults: torch's dispatcher drops trailing arguments that equal theirs on the way to a Python body.
    schema = torch.library.infer_schema(record.ref, mutates_args=())
    arguments = re.sub(r"=[^,)]+", "", schema.rsplit("->", 1)[0].strip()[1:-1])
    shown = len(record.outputs)
    total, moving = shown + len(record.saved), shown - len(record.detached)
    count = len(record.names)

    def shaped(results: Sequence[Tensor]) -> Any:
        """As the schema says: torch takes a single output bare, several as a tuple."""
        return tuple(results) if total > 1 else results[0]

    def visible(results: Sequence[Tensor]) -> Any:
        return tuple(results[:shown]) if shown > 1 else results[0]

    forward_op = torch.library.custom_op(
        f"{NAMESPACE}::{record.name}",
        lambda name, *args: shaped(compute(record, name, args)),
        mutates_args=(),
        schema=f"(str backend, {arguments}) -> ({', '.join(['Tensor'] * total)})",
    )
    forward_op.register_fake(lambda name, *args: shaped(record.results(record.Args(*args), name)))
    if not record.differentiable:  # below autograd, tangents and gradients end: a constant
        return forward_op, lambda name, *args: visible(compute(record, name, args))

    def backward(grads: list[Tensor], kept: list[Tensor], needs: list[bool], name: str, *args: Any) -> list[Tensor]:
        found = compute_backward(record, name, args, kept, grads, needs)
        return [f if n else grads[0].new_empty(0) for f, n in zip(found, needs)]

    def backward_fake(
        grads: list[Tensor], kept: list[Tensor], needs: list[bool], name: str, *args: Any
    ) -> list[Tensor]:
        return [
            torch.empty_like(v, memory_format=torch.contiguous_format) if n else grads[0].new_empty(0)
            for v, n in zip(args, needs)
        ]

    backward_op = torch.library.custom_op(
        f"{NAMESPACE}::{record.name}_backward",
        backward,
        mutates_args=(),
        schema=f"(Tensor[] grads, Tensor[] kept, bool[] needs, str backend, {arguments}) -> Tensor[]",
    )
    backward_op.register_fake(backward_fake)

    def no_second(ctx: Any, *grads: Any) -> None:
        raise RuntimeError(
            f"{record.name} has no second derivatives in its kernels; compute it inside "
            "`with maetok_fast.kernels.backend('reference')`, which differentiates any number of times"
        )

    backward_op.register_autograd(no_second)

    def traced_backward(
        name: str, args: Sequence[Any], kept: Sequence[Tensor], grads: Sequence[Tensor], needs: Sequence[bool]
    ) -> Sequence[Tensor]:
        return backward_op(grads, kept, needs, name, *args)

    def eager_backward(
        name: str, args: Sequence[Any], kept: Sequence[Tensor], grads: Sequence[Tensor], needs: Sequence[bool]
    ) -> Sequence[Tensor]:
        return compute_backward(record, name, args, kept, grads, needs)

    def remember(ctx: Any, name: str, values: tuple[Any, ...], results: Sequence[Tensor]) -> None:
        """Saves the tensors, and everything else, for `gradients`; of the residual argument its shape alone."""
        ctx.backend = name
        ctx.present = [isinstance(v, Tensor) and i != record.residual_at for i, v in enumerate(values)]
        ctx.others = [None if p or isinstance(v, Tensor) else v for v, p in zip(values, ctx.present)]
        residual = values[record.residual_at] if record.residual_at >= 0 else None
        ctx.residual = None if residual is None else (residual.shape, residual.dtype, residual.device)
        ctx.save_for_backward(
            *[v for v, p in zip(values, ctx.present) if p], *results[0 if record.keep_output else shown :]
        )
        ctx.like = [(o.shape, o.dtype, o.device) for o in results[:moving]] if moving > 1 else []
        ctx.set_materialize_grads(False)

    def gradients(
        ctx: Any, given: tuple[Tensor | None, ...], step: Callable[..., Sequence[Tensor]]
    ) -> tuple[Tensor | None, ...]:
        """One gradient per input of the custom op (the backend's name is the first)."""
        grads: list[Tensor | None] = [None] * (count + 1)
        if all(g is None for g in given):
            return tuple(grads)
        tensors = list(ctx.saved_tensors)
        values = [tensors.pop(0) if p else v for p, v in zip(ctx.present, ctx.others)]
        own = record.residual_at
        needs = [bool((p or i == own) and n) for i, (p, n) in enumerate(zip(ctx.present, ctx.needs_input_grad[1:]))]
        asked = [n and i != own for i, n in enumerate(needs)]
        if any(asked):
            if ctx.residual is not None:  # nobody reads it
                shape, dtype, device = ctx.residual
                values[own] = torch.empty(shape, dtype=dtype, device=device)
            full = [
                torch.zeros(ctx.like[i][0], dtype=ctx.like[i][1], device=ctx.like[i][2]) if g is None else g
                for i, g in enumerate(given)
            ]
            found = step(ctx.backend, values, tensors, full, asked)
            grads[1:] = [f if n else None for f, n in zip(found, asked)]
        if own >= 0 and needs[own]:
            grads[1 + own] = given[0]
        return tuple(grads)

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        results = tuple(output) if total > 1 else (output,)
        remember(ctx, inputs[0], inputs[1:], results)
        if total > moving:
            ctx.mark_non_differentiable(*results[moving:])

    forward_op.register_autograd(
        lambda ctx, *grads: gradients(ctx, grads[:moving], traced_backward), setup_context=setup_context
    )
    _answer_tangents(forward_op, record, shaped)

    class Eager(torch.autograd.Function):
        """The same without the dispatcher. With create_graph the backward is the custom op, which refuses in words."""

        @staticmethod
        def forward(ctx: Any, name: str, *values: Any) -> Any:
            results = compute(record, name, values)
            remember(ctx, name, values, results)
            if record.detached:
                ctx.mark_non_differentiable(*results[moving:shown])
            return visible(results)

        @staticmethod
        def backward(ctx: Any, *grads: Tensor | None) -> Any:
            return gradients(ctx, grads[:moving], traced_backward if torch.is_grad_enabled() else eager_backward)

    def eager(name: str, *args: Any) -> Any:
        if torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in args):
            return Eager.apply(name, *args)
        return visible(compute(record, name, args))

    return forward_op, eager


def _answer_tangents(forward_op: Any, record: Record[..., Any], shaped: Callable[..., Any]) -> None:
    """Puts the reference before the op's autograd kernel, under torch.func and where an argument has a tangent. What a
    backend would have saved is left empty: the reference's own graph does the backward. (An op's `tangent` is for eager
    calls: at this key torch refuses an autograd.Function under torch.func.)"""
    usual = make_autograd_impl(forward_op._opoverload, forward_op)

    def autograd(keyset: Any, name: str, *args: Any) -> Any:
        if not (torch._C._are_functorch_transforms_active() or has_tangent(args)):
            return usual(keyset, name, *args)
        with no_autocast(args[0].device.type), with_tangents():
            outputs = record.ref(*args)
            saved = record.results(record.Args(*args), name)[len(record.outputs) :]
        return shaped((*(outputs if isinstance(outputs, tuple) else (outputs,)), *saved))

    forward_op._lib.impl(forward_op._name, autograd, "Autograd", with_keyset=True, allow_override=True)
