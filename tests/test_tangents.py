# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""Attention with its tangent in one pass: values, tangents and gradients against torch in fp64, and when it runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from maetok_fast.kernels import _dispatch, backend, ops, rope_attention, rope_attention_jvp, rope_attention_ref
from maetok_fast.kernels import rope_attention_jvp as record

B, N, HEADS, WIDTH = 2, 21, 3, 16


def kernels() -> list[Any]:
    reason = _dispatch.why_missing("native", "cpu")
    marks = [] if reason is None else [pytest.mark.skip(reason=str(reason))]
    return [pytest.param("native", marks=marks)]


pytestmark = pytest.mark.parametrize("name", kernels())


def drawn(**settings: Any) -> dict[str, Any]:
    torch.manual_seed(0)
    args: dict[str, Any] = {"qkv": torch.randn(B, N, 3, HEADS, WIDTH)}
    if settings.pop("rotated", False):
        angle = torch.randn(HEADS, 12, WIDTH // 2)
        args |= {"rope": torch.stack((angle.cos(), angle.sin())), "prefix": 1}
    if settings.pop("gathered", False):
        args["index"] = torch.rand(B, 12).argsort(1)[:, :7]
    if settings.get("qk_norm", "none") != "none":
        args |= {"q_weight": 1 + 0.3 * torch.randn(WIDTH), "k_weight": 1 + 0.3 * torch.randn(WIDTH)}
    return args | settings


CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "rotated": {"rotated": True},
    "pruned": {"rotated": True, "first_query": 5, "num_queries": 9},
    "rms": {"rotated": True, "qk_norm": "rms"},
    "layer": {"qk_norm": "layer"},
    "gathered": {"rotated": True, "gathered": True},
}
case = pytest.mark.parametrize("settings", CASES.values(), ids=CASES.keys())


def fp64(args: dict[str, Any]) -> dict[str, Any]:
    return {k: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in args.items()}


def by_func(f: Callable[[Tensor], Tensor], x: Tensor, direction: Tensor) -> tuple[Tensor, Tensor]:
    return torch.func.jvp(f, (x,), (direction,))


def by_duals(f: Callable[[Tensor], Tensor], x: Tensor, direction: Tensor) -> tuple[Tensor, Tensor]:
    with forward_ad.dual_level():
        found = forward_ad.unpack_dual(f(forward_ad.make_dual(x, direction)))
        return found.primal, found.tangent


def exact(args: dict[str, Any], direction: Tensor) -> tuple[Tensor, Tensor]:
    wide = fp64(args)
    with backend("reference"):
        return by_func(lambda x: rope_attention(**(wide | {"qkv": x})), wide["qkv"], direction.double())


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The kernels that computed a tangent."""
    seen: list[str] = []
    tangent = rope_attention.tangent
    assert tangent is not None

    def compute(record: Any, name: str, a: Any) -> Any:
        seen.append(name)
        return tangent.compute(record, name, a)

    monkeypatch.setattr(rope_attention, "tangent", tangent._replace(compute=compute))
    return seen


@case
@pytest.mark.parametrize("how", [by_func, by_duals])
def test_value_and_tangent(name: str, how: Any, settings: dict[str, Any], launched: list[str]) -> None:
    args = drawn(**settings)
    direction = torch.randn_like(args["qkv"])
    found = how(lambda x: rope_attention(**(args | {"qkv": x})), args["qkv"], direction)
    assert launched == [name]
    for mine, right in zip(found, exact(args, direction)):
        torch.testing.assert_close(mine.double(), right, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("how", [by_func, by_duals])
def test_the_table_s_tangent_and_the_norm_weights_arrive(name: str, how: Any, launched: list[str]) -> None:
    args = drawn(rotated=True, qk_norm="rms")
    for argument in ("rope", "q_weight", "k_weight"):
        direction = torch.randn_like(args[argument])

        def moved(args: dict[str, Any], direction: Tensor, way: Any, argument: str = argument) -> Any:
            return way(lambda x: rope_attention(**(args | {argument: x})), args[argument], direction)

        with backend("reference"):
            right = moved(fp64(args), direction.double(), by_func)
        for mine, other in zip(moved(args, direction, how), right):
            torch.testing.assert_close(mine.double(), other, rtol=1e-5, atol=1e-5)
    assert launched == [name] * 3


@case
def test_gradients_of_the_value_and_of_the_tangent(name: str, settings: dict[str, Any], launched: list[str]) -> None:
    """As in MeanFlow's step (the value's) and beyond it (the tangent's too: a second derivative)."""
    args = drawn(**settings)
    torch.manual_seed(1)
    direction, weigh = torch.randn_like(args["qkv"]), torch.randn(B, 64, HEADS * WIDTH)

    def gradients(args: dict[str, Any], direction: Tensor, both: bool) -> list[Tensor]:
        leaves = {
            k: v.clone().requires_grad_() for k, v in args.items() if isinstance(v, Tensor) and v.is_floating_point()
        }
        moving = direction.clone().requires_grad_()
        y, dy = by_func(lambda x: rope_attention(**(args | leaves | {"qkv": x})), leaves["qkv"] * 1.0, moving * 1.0)
        part = weigh[:, : y.shape[1]].to(y)
        loss = (y * part).sum() + ((dy * part.cos()).sum() if both else 0.0)
        return list(torch.autograd.grad(loss, [*leaves.values(), *([moving] if both else [])]))

    for both in (False, True):
        with backend("reference"):
            right = gradients(fp64(args), direction.double(), both)
        before = len(launched)
        found = gradients(args, direction, both)
        assert launched[before:] == [name]
        for mine, other in zip(found, right):
            assert other.abs().max() > 0
            torch.testing.assert_close(mine.double(), other, rtol=1e-4, atol=1e-4)


def test_nested_transforms_and_batches_take_the_reference(name: str, launched: list[str]) -> None:
    args = drawn(rotated=True)
    f = lambda x: rope_attention(**(args | {"qkv": x})).square().sum()  # noqa: E731
    x, v = args["qkv"], torch.randn_like(args["qkv"])
    over_reverse = by_func(torch.func.grad(f), x, v)[1]
    leaf = x.double().requires_grad_()
    wide = fp64(args)
    with sdpa_kernel(SDPBackend.MATH):  # torch's fused attention has no second derivative
        y = rope_attention_ref(**(wide | {"qkv": leaf})).square().sum()
        (first,) = torch.autograd.grad(y, leaf, create_graph=True)
        (second,) = torch.autograd.grad((first * v.double()).sum(), leaf)
    torch.testing.assert_close(over_reverse.double(), second, rtol=1e-4, atol=1e-4)
    many = torch.func.vmap(lambda v: by_func(lambda x: rope_attention(**(args | {"qkv": x})), x, v)[1])(
        torch.stack((v, -v))
    )
    torch.testing.assert_close(many[0], -many[1], rtol=1e-5, atol=1e-5)
    assert launched == []


def test_forced_backends_are_obeyed(name: str, launched: list[str]) -> None:
    args = drawn()
    v = torch.randn_like(args["qkv"])
    with backend("reference"):
        by_func(lambda x: rope_attention(x), args["qkv"], v)
    assert launched == []
    with backend(name):
        by_func(lambda x: rope_attention(x), args["qkv"], v)
    assert launched == [name]
    assert ops()["rope_attention_jvp"] is record
    assert not rope_attention_jvp.differentiable


@pytest.mark.parametrize("tokens", [1, 15, 16, 17, 33])
@pytest.mark.parametrize("width", [2, 6, 30, 72, 130])
def test_every_edge_of_the_tiles(name: str, tokens: int, width: int) -> None:
    torch.manual_seed(tokens * width)
    qkv, dqkv = torch.randn(2, 1, tokens, 3, 2, width).unbind(0)
    with backend(name):
        found = rope_attention_jvp(qkv, dqkv)
    for mine, right in zip(found, rope_attention_jvp.ref(qkv.double(), dqkv.double())):
        torch.testing.assert_close(mine.double(), right, rtol=2e-5, atol=2e-5)
