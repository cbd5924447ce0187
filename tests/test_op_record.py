# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""What a record can say beyond one differentiable float output, on two toy ops: several outputs, some of them detached,
masks and integers among the inputs, nothing to differentiate."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from maetok_fast.kernels import Backend, Op, _dispatch, backend
from maetok_fast.kernels._record import RECORDS


def toy_ref(x: Tensor, mask: Tensor, flag: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    """Two outputs that carry gradients and one statistic that does not."""
    y = torch.where(mask, x, 0 * x)
    return y, y * (2 if flag else 1), x.mean(1).detach()


def toy_forward(a: Any, out: Any) -> None:
    for into, value in zip(out, toy_ref(*a)):
        into.copy_(value)


def toy_backward(a: Any, out: Any, g: Any, d: Any) -> None:
    d.x.copy_(torch.where(a.mask, g.y + 2 * g.z, 0 * g.y))


def toy_numbers_ref(seed: Tensor, count: int) -> Tensor:
    """(count,) bool from an integer seed (1,)."""
    return (seed + torch.arange(count, device=seed.device)) % 2 == 0


@pytest.fixture(scope="module")
def toys() -> Iterator[tuple[Op, Op]]:
    before = dict(RECORDS)
    toy = Op(
        "toy",
        ref=toy_ref,
        shapes={"x": "B N", "mask": "B N"},
        roles={"mask": (torch.bool,)},
        out=lambda a, backend: (torch.empty_like(a.x), torch.empty_like(a.x), a.x.new_empty(a.x.shape[0])),
        outputs=("y", "z", "mean"),
        detached=("mean",),
        cpu=[Backend("native", toy_forward, toy_backward)],
        samples=[],
        flops=lambda a: 0,
    )
    numbers = Op(
        "toy_numbers",
        ref=toy_numbers_ref,
        shapes={"seed": "1"},
        roles={"seed": (torch.int64,)},
        out=lambda a, backend: (a.seed.new_empty(a.count, dtype=torch.bool),),
        cpu=[Backend("native", lambda a, out: out.y.copy_(toy_numbers_ref(*a)))],
        differentiable=False,
        samples=[],
        flops=lambda a: 0,
    )
    yield toy, numbers
    RECORDS.clear()
    RECORDS.update(before)


def test_detached_outputs_and_absent_gradients(toys: tuple[Op, Op]) -> None:
    toy, _ = toys
    x, mask = torch.randn(3, 4, requires_grad=True), torch.randn(3, 4) > 0
    outputs = toy(x, mask)
    assert [o.requires_grad for o in outputs] == [True, True, False]
    for weight, out in zip((1, 2), outputs):
        (grad,) = torch.autograd.grad(out.sum(), x, retain_graph=True)
        assert torch.equal(grad, weight * mask.float())
    (both,) = torch.autograd.grad(outputs[0].sum() + outputs[1].sum(), x)
    assert torch.equal(both, 3 * mask.float())
    torch.library.opcheck(toy._forward_op, ("native", x, mask, True))


def test_several_outputs_under_compile(toys: tuple[Op, Op]) -> None:
    toy, numbers = toys
    x, mask = torch.randn(3, 4, requires_grad=True), torch.randn(3, 4) > 0
    outputs = torch.compile(lambda x, mask: toy(x, mask, False), fullgraph=True, backend="aot_eager")(x, mask)
    (grad,) = torch.autograd.grad(outputs[0].sum(), x)
    assert torch.equal(grad, mask.float())
    assert not outputs[2].requires_grad
    seed = torch.tensor([3])
    compiled = torch.compile(numbers, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(seed, 4), torch.tensor([False, True, False, True]))


def test_an_op_without_derivative_records_nothing(toys: tuple[Op, Op]) -> None:
    _, numbers = toys
    for name in ("reference", "native"):
        with backend(name):
            out = numbers(torch.tensor([3]), 4)
        assert out.dtype == torch.bool
        assert not out.requires_grad
    torch.library.opcheck(numbers._forward_op, ("native", torch.tensor([3]), 4))


def test_integer_inputs_are_checked_and_left_alone(toys: tuple[Op, Op]) -> None:
    toy, numbers = toys
    x = torch.randn(3, 4)
    with pytest.raises(TypeError, match=r"toy\(\) expects mask in bool, got torch.int32"):
        toy(x, torch.ones(3, 4, dtype=torch.int32))
    with pytest.raises(TypeError, match=r"toy_numbers\(\) expects seed in int64, got torch.float32"):
        numbers(torch.zeros(1), 4)
    with pytest.raises(TypeError, match="expects bool as flag, got int"):
        toy(x, x > 0, 1)
    assert toy(x.bfloat16(), x > 0)[0].dtype == torch.bfloat16
    assert toy(x.double(), x > 0)[0].dtype == torch.float64  # no kernels for it: the reference


def test_the_cuda_backend_says_what_is_missing() -> None:
    from maetok_fast.kernels import _native

    reason = _dispatch.why_missing("cuda", "cuda")
    assert reason == _native.why_no_cuda("cuda")
    assert reason is None or isinstance(reason, str)


def test_a_record_that_does_not_fit_its_formula_is_refused() -> None:
    shared: dict[str, Any] = {"samples": [], "flops": lambda a: 0}
    with pytest.raises(ValueError, match=r"op 'wrong': the names \['gate'\] do not fit"):
        Op("wrong", ref=toy_ref, shapes={"x": "B N"}, roles={"gate": "fp32"}, **shared)
    with pytest.raises(ValueError, match=r"op 'wrong': the names \['x'\] do not fit"):
        Op("wrong", ref=toy_ref, shapes={"x": "B N"}, outputs=("x",), **shared)

    def untyped(x, n):  # type: ignore[no-untyped-def]
        return x

    with pytest.raises(TypeError, match=r"op 'wrong': x is annotated .*an op's arguments are Tensor, "):
        Op("wrong", ref=untyped, shapes={}, **shared)
    assert "wrong" not in RECORDS


def test_shapes_say_which_sizes_must_agree(toys: tuple[Op, Op]) -> None:
    toy, numbers = toys
    with pytest.raises(ValueError, match=r"toy: mask must be \(B, N\) with B = 2, N = 3, got \(2, 4\)"):
        toy(torch.zeros(2, 3), torch.zeros(2, 4, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"toy_numbers: seed must be \(1,\), got \(2,\)"):
        numbers(torch.zeros(2, dtype=torch.int64), 3)
