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
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from ._op import Op

__all__ = ["NAMESPACE", "plain_eager", "register"]

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


def register(op: Op) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """(the custom op `<name>`, the eager call), both (backend, *args); registers `<name>_backward` too.

    The custom op returns (*outputs, *saved), a single tensor bare; the eager call returns what the op returns.
    """
    # Without defaults: torch's dispatcher drops trailing arguments that equal theirs on the way to a Python body.
    schema = torch.library.infer_schema(op.ref, mutates_args=())
    arguments = re.sub(r"=[^,)]+", "", schema.rsplit("->", 1)[0].strip()[1:-1])
    total, results = op.outputs + op.saved, op.outputs - op.detached
    returns = ", ".join(["Tensor"] * total)
    count = len(op.names)

    def shaped(outputs: tuple[Tensor, ...]) -> Any:
        """As the schema says: torch takes a single output bare, several as a tuple."""
        return tuple(outputs) if total > 1 else outputs[0]

    def visible(outputs: tuple[Tensor, ...]) -> Any:
        return tuple(outputs[: op.outputs]) if op.outputs > 1 else outputs[0]

    def contiguous(args: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(a.contiguous() if isinstance(a, Tensor) else a for a in args)

    def run(name: str, args: tuple[Any, ...]) -> tuple[Tensor, ...]:
        kernel = op.backend_named(name).forward
        if args[0].is_cuda:
            with torch.cuda.device_of(args[0]):
                return kernel(*contiguous(args))
        return kernel(*contiguous(args))

    forward_op = torch.library.custom_op(
        f"{NAMESPACE}::{op.name}",
        lambda name, *args: shaped(run(name, args)),
        mutates_args=(),
        schema=f"(str backend, {arguments}) -> ({returns})",
    )
    forward_op.register_fake(lambda name, *args: shaped(op.fake(name, *args)))
    if not op.differentiable:
        return forward_op, lambda name, *args: visible(run(name, args))

    def run_backward(
        grads: Sequence[Tensor], saved: Sequence[Tensor], needs: Sequence[bool], name: str, *args: Any
    ) -> Sequence[Tensor | None]:
        kernel = op.backend_named(name).backward
        assert kernel is not None
        dense = contiguous(tuple(grads))
        given = dense if op.outputs > 1 else dense[0]
        if dense[0].is_cuda:
            with torch.cuda.device_of(dense[0]):
                return kernel(given, saved, contiguous(args), needs)
        return kernel(given, saved, contiguous(args), needs)

    def backward(grads: list[Tensor], saved: list[Tensor], needs: list[bool], name: str, *args: Any) -> list[Tensor]:
        found = run_backward(grads, saved, needs, name, *args)
        return [g if n and g is not None else grads[0].new_empty(0) for g, n in zip(found, needs)]

    def backward_fake(
        grads: list[Tensor], saved: list[Tensor], needs: list[bool], name: str, *args: Any
    ) -> list[Tensor]:
        return [
            torch.empty_like(v, memory_format=torch.contiguous_format) if n else grads[0].new_empty(0)
            for v, n in zip(args, needs)
        ]

    backward_op = torch.library.custom_op(
        f"{NAMESPACE}::{op.name}_backward",
        backward,
        mutates_args=(),
        schema=f"(Tensor[] grads, Tensor[] saved_outputs, bool[] needs, str backend, {arguments}) -> Tensor[]",
    )
    backward_op.register_fake(backward_fake)

    def no_second(ctx: Any, *grads: Any) -> None:
        raise RuntimeError(
            f"{op.name} has no second derivatives in its kernels; compute it inside "
            "`with maetok_fast.kernels.backend('reference')`, which differentiates any number of times"
        )

    backward_op.register_autograd(no_second)

    def remember(ctx: Any, name: str, values: tuple[Any, ...], outputs: tuple[Tensor, ...]) -> None:
        """Saves the tensors, and everything else, for `gradients`."""
        ctx.backend = name
        ctx.present = [isinstance(v, Tensor) for v in values]
        ctx.others = [None if p else v for v, p in zip(values, ctx.present)]
        ctx.save_for_backward(
            *[v for v, p in zip(values, ctx.present) if p], *outputs[0 if op.keep_output else op.outputs :]
        )
        ctx.like = [(o.shape, o.dtype, o.device) for o in outputs[:results]] if results > 1 else []
        ctx.set_materialize_grads(False)

    def gradients(
        ctx: Any, given: tuple[Tensor | None, ...], step: Callable[..., Sequence[Tensor | None]]
    ) -> tuple[Tensor | None, ...]:
        """One gradient per input of the custom op (the backend's name is the first)."""
        grads: list[Tensor | None] = [None] * (count + 1)
        if all(g is None for g in given):
            return tuple(grads)
        tensors = list(ctx.saved_tensors)
        values = [tensors.pop(0) if p else v for p, v in zip(ctx.present, ctx.others)]
        needs = [bool(p and n) for p, n in zip(ctx.present, ctx.needs_input_grad[1:])]
        own = op.residual_at
        asked = [n and i != own for i, n in enumerate(needs)]
        if any(asked):
            full = [
                torch.zeros(ctx.like[i][0], dtype=ctx.like[i][1], device=ctx.like[i][2]) if g is None else g
                for i, g in enumerate(given)
            ]
            found = step(full, tensors, asked, ctx.backend, *values)
            grads[1:] = [r if n else None for r, n in zip(found, asked)]
        if own >= 0 and needs[own]:
            grads[1 + own] = given[0]
        return tuple(grads)

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        outputs = tuple(output) if total > 1 else (output,)
        remember(ctx, inputs[0], inputs[1:], outputs)
        if total > results:
            ctx.mark_non_differentiable(*outputs[results:])

    forward_op.register_autograd(
        lambda ctx, *grads: gradients(ctx, grads[:results], backward_op), setup_context=setup_context
    )

    class Eager(torch.autograd.Function):
        """The same without the dispatcher. With create_graph the backward is the custom op, which refuses in words."""

        @staticmethod
        def forward(ctx: Any, name: str, *values: Any) -> Any:
            outputs = run(name, values)
            remember(ctx, name, values, outputs)
            if op.detached:
                ctx.mark_non_differentiable(*outputs[results : op.outputs])
            return visible(outputs)

        @staticmethod
        def backward(ctx: Any, *grads: Tensor | None) -> Any:
            return gradients(ctx, grads[:results], backward_op if torch.is_grad_enabled() else run_backward)

    def eager(name: str, *args: Any) -> Any:
        if torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in args):
            return Eager.apply(name, *args)
        return visible(run(name, args))

    return forward_op, eager
