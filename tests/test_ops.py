# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""One suite over all op records: an op added to `maetok_fast.kernels` is tested here without a further line. Values and
gradients are held to the rule of tests/rule.py."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import pickle
import threading
from collections.abc import Callable, Iterator
from typing import Any

import conftest
import pytest
import torch
from rule import assert_rule, nudged
from torch import Tensor

from maetok_fast.kernels import Backend, BackendError, Op, Sample, _dispatch, _native, backend, ops
from maetok_fast.kernels._drive import launch, launch_backward, make
from maetok_fast.kernels._record import EMPTY

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
OPS = conftest.OP_FILES or list(ops().values())


def small(op: Op) -> list[Sample]:
    return [s for s in op.samples if not s.real]


def few(op: Op, name: str) -> list[Sample]:
    """All small samples, but two where the interpreter (seconds a call) would only repeat what is shown."""
    return small(op)[: 2 if name == "triton" else None]


def _runs() -> Iterator[Any]:
    """(op, backend, device) for every backend; the CPU runs Triton in the interpreter."""
    for op in OPS:
        for device, name in [("cpu", b.name) for b in op.backends if b.name in ("native", "triton", "cuda")] + [
            ("cuda", b.name) for b in op.cuda
        ]:
            marks = [pytest.mark.gpu] if device == "cuda" else []
            yield pytest.param(op, name, device, id=f"{op.name}-{name}-{device}", marks=marks)


RUNS = list(_runs())
CPU_RUNS = [r for r in RUNS if r.values[2] == "cpu"]
GRAD_RUNS = [r for r in RUNS if r.values[0].differentiable]
GRAD_OPS = [op for op in OPS if op.differentiable]


def need(op: Op, name: str, device: str) -> Backend:
    """The backend, or a skip that says what this machine lacks."""
    reason = _dispatch.why_missing(name, device)
    if reason is not None:
        pytest.skip(f"{name}: {reason}")
    return op.backend(name)


def leaves(op: Op, args: dict[str, Any], dtype: torch.dtype | None = None) -> dict[str, Any]:
    """Fresh leaves that require gradients, in `dtype` or (None) as they are; masks and indices stay what they are."""
    out = {}
    for name, value in args.items():
        if isinstance(value, Tensor):
            wanted = value.dtype if dtype is None or not takes(op, name, value, dtype) else dtype
            value = value.detach().to(wanted).clone()
            value.requires_grad_(op.differentiable and value.is_floating_point())
        out[name] = value
    return out


def takes(op: Op, name: str, value: Tensor, dtype: torch.dtype) -> bool:
    """Whether this floating-point argument may be given in `dtype`."""
    role = op.role(name)
    return value.is_floating_point() and (not isinstance(role, tuple) or dtype in role)


def tensors(args: dict[str, Any]) -> dict[str, Tensor]:
    return {k: v for k, v in args.items() if isinstance(v, Tensor)}


def ruled(op: Op, args: dict[str, Any]) -> dict[str, Tensor]:
    """The tensors that the op's dtype rule decides on."""
    return {k: v for k, v in tensors(args).items() if op.role(k) in ("stream", "lowered", "as given")}


def outputs_of(out: Any) -> tuple[Tensor, ...]:
    return out if isinstance(out, tuple) else (out,)


def twice(out: Any) -> Any:
    doubled = tuple(o * 2 if o.is_floating_point() and o.itemsize > 1 else o for o in outputs_of(out))
    return doubled if isinstance(out, tuple) else doubled[0]


def value_and_grads(fn: Callable[..., Any], args: dict[str, Any], rounded_to: torch.dtype) -> dict[str, Tensor]:
    """The outputs and the gradient of every tensor that has one, for cotangents that are exact in `rounded_to`."""
    out = outputs_of(fn(**args))
    generator = torch.Generator().manual_seed(7)
    values = {f"value{i or ''}": o.detach() for i, o in enumerate(out)}
    moving = [o for o in out if o.requires_grad]
    if not moving:
        return values
    cotangents = [torch.randn(o.shape, generator=generator).to(rounded_to).to(o) for o in moving]
    given = {k: v for k, v in tensors(args).items() if v.requires_grad}
    grads = torch.autograd.grad(moving, list(given.values()), cotangents)
    return values | {f"d_{k}": g for k, g in zip(given, grads)}


def same(a: Tensor, b: Tensor) -> bool:
    """Equal; by their bits where the type (float8) has no comparison."""
    if a.is_floating_point() and a.itemsize == 1:
        a, b = a.view(torch.uint8), b.view(torch.uint8)
    return torch.equal(a, b)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize(("op", "name", "device"), RUNS)
def test_value_and_gradients(op: Op, name: str, device: str, dtype: torch.dtype) -> None:
    need(op, name, device)
    for sample in small(op):
        args = make(op, sample, dtype, device)
        with backend(name):
            got = value_and_grads(op, leaves(op, args), dtype)

        def measured(seed: int, args: dict[str, Any] = args) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
            """The reference in this dtype and in fp64, of the arguments or (seed > 0) of neighbours of theirs."""
            moved = nudged(args, seed) if seed else args
            with backend("reference"):
                plain = value_and_grads(op, leaves(op, moved), dtype)
            return plain, value_and_grads(op.ref, leaves(op, moved, torch.float64), dtype)

        try:
            assert_rule(got, *measured(0), inputs=tensors(args).values(), again=measured)
        except AssertionError as failure:
            raise AssertionError(f"{sample.label}: {failure}") from None


@pytest.mark.parametrize(("op", "name", "device"), CPU_RUNS)
def test_buffers_are_filled_and_not_overrun_in_any_program_order(op: Op, name: str, device: str) -> None:
    """NaN-poisoned allocations between sentinels, programs in random order: same results, nothing outside touched."""
    from maetok_fast.kernels._interpreter import red_zones, shuffled_programs

    need(op, name, device)
    for seed, sample in enumerate(small(op)):
        a = op.arguments(**make(op, sample, torch.float32))
        plain = everything(op, name, a)
        with red_zones(), shuffled_programs(seed) if name == "triton" else shuffled_threads(name, seed):
            guarded = everything(op, name, a)
        for x, y in zip(plain, guarded):
            assert same(x, y), sample.label


@contextlib.contextmanager
def shuffled_threads(name: str, seed: int) -> Iterator[None]:
    """Emulated CUDA kernels: blocks and threads in another order than without (the kind one, 0, outside)."""
    if name == "cuda":
        _native.cuda().emulator_seed(seed + 1)
    yield
    if name == "cuda":
        _native.cuda().emulator_seed(0)


def everything(op: Op, name: str, a: Any) -> list[Tensor]:
    """The outputs and gradients of a backend's kernels, called directly."""
    results = launch(op, name, a)
    out = list(results[: len(op.outputs)])
    if not op.differentiable:
        return out
    grads = launch_backward(op, name, a, results)
    return [*out, *[g for g, n in zip(grads, op.asked(a)) if n]]


@pytest.mark.parametrize(("op", "name", "device"), RUNS)
def test_odd_strides_change_nothing(op: Op, name: str, device: str) -> None:
    need(op, name, device)
    for sample in few(op, name):
        args = make(op, sample, torch.float32, device)
        odd = {
            k: torch.stack((v, torch.zeros_like(v)), -1)[..., 0] if isinstance(v, Tensor) else v
            for k, v in args.items()
        }  # every stride doubled
        with backend(name):
            a, b = (value_and_grads(op, leaves_of(op, x), torch.float32) for x in (args, odd))
        for key in a:
            assert same(a[key], b[key]), f"{sample.label}: {key}"


def leaves_of(op: Op, args: dict[str, Any]) -> dict[str, Any]:
    """Leaves that keep their strides."""
    return {
        k: v.detach().requires_grad_(op.differentiable and v.is_floating_point()) if isinstance(v, Tensor) else v
        for k, v in args.items()
    }


@pytest.mark.parametrize(("op", "name", "device"), GRAD_RUNS)
def test_any_subset_of_gradients(op: Op, name: str, device: str) -> None:
    """Each tensor alone gets the gradient it gets together with the others."""
    need(op, name, device)
    sample = small(op)[0]
    args = make(op, sample, torch.float32, device)
    with backend(name):
        together = value_and_grads(op, leaves(op, args), torch.float32)
        for wanted in [k for k, v in tensors(args).items() if v.is_floating_point()]:
            alone = leaves(op, args)
            for key, value in tensors(alone).items():
                value.requires_grad_(key == wanted)
            grad = value_and_grads(op, alone, torch.float32)[f"d_{wanted}"]
            torch.testing.assert_close(grad, together[f"d_{wanted}"], rtol=0, atol=0)


@pytest.mark.parametrize(("op", "name", "device"), [r for r in GRAD_RUNS if len(r.values[0].outputs) > 1])
def test_each_output_has_its_own_gradient(op: Op, name: str, device: str) -> None:
    """An output that nobody differentiates counts as a gradient of zeros."""
    need(op, name, device)
    args = make(op, small(op)[0], torch.float32, device)
    exact, got = leaves(op, args, torch.float64), leaves(op, args)
    with backend(name):
        out = op(**got)
    reference = op.ref(**exact)
    assert [o.requires_grad for o in out] == [o.requires_grad for o in reference]
    for mine, theirs in zip(out, reference):
        if mine.requires_grad:
            wanted = [k for k, v in tensors(exact).items() if v.requires_grad]
            grads = torch.autograd.grad(mine.sum(), [got[k] for k in wanted], retain_graph=True)
            right = torch.autograd.grad(theirs.sum(), [exact[k] for k in wanted], retain_graph=True, allow_unused=True)
            for grad, correct in zip(grads, right):
                torch.testing.assert_close(
                    grad.double(), torch.zeros_like(grad).double() if correct is None else correct, rtol=1e-3, atol=1e-3
                )


@pytest.mark.parametrize(("op", "name", "device"), RUNS)
def test_opcheck(op: Op, name: str, device: str) -> None:
    """Schema, autograd registration, fake tensors and AOT dispatch, as torch checks them."""
    need(op, name, device)
    sample = small(op)[0]
    a = op.arguments(**leaves(op, make(op, sample, torch.float32, device)))
    torch.library.opcheck(op._forward_op, (name, *a))


@pytest.mark.parametrize(("op", "name", "device"), RUNS)
def test_torch_compile_fullgraph(op: Op, name: str, device: str) -> None:
    need(op, name, device)
    for i, sample in enumerate(few(op, name)):
        torch._dynamo.reset()
        args = make(op, sample, torch.float32, device)
        # inductor once per op: it shows that the op lives in a generated graph; tracing is the same for all samples
        compiled = torch.compile(
            lambda **kw: twice(op(**kw)), fullgraph=True, backend="inductor" if i == 0 else "aot_eager"
        )
        with backend(name):
            eager = value_and_grads(lambda **kw: twice(op(**kw)), leaves(op, args), torch.float32)
            traced = value_and_grads(compiled, leaves(op, args), torch.float32)
        for key in eager:
            a, b = (t[key].float() if t[key].is_floating_point() else t[key] for t in (traced, eager))
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6, msg=f"{sample.label}: {key}")


@pytest.mark.parametrize("op", OPS, ids=lambda o: o.name)
def test_autocast_rule(op: Op) -> None:
    """ "lower": fp32 inputs are computed and returned in the autocast dtype; promote: autocast changes nothing."""
    for sample in small(op):
        args = make(op, sample, torch.float32)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            under = outputs_of(op(**args))
        lower = {k: v.bfloat16() for k, v in ruled(op, args).items()} if lowers(op) else {}
        for a, b in zip(under, outputs_of(op(**(args | lower)))):
            assert a.dtype == b.dtype
            assert same(a, b)
        if lower:
            assert under[0].dtype == torch.bfloat16


def lowers(op: Op) -> bool:
    return any(op.role(name) == "lowered" for name in op.names)


@pytest.mark.parametrize("op", [o for o in OPS if not lowers(o)], ids=lambda o: o.name)
def test_mixed_dtypes_promote_as_in_torch(op: Op) -> None:
    for sample in small(op):
        args = make(op, sample, torch.float32)
        if not ruled(op, args):
            continue
        first, *rest = ruled(op, args)
        mixed = args | {first: args[first].bfloat16()}
        with backend("reference"):  # knows which outputs are always fp32: statistics, losses
            plain = outputs_of(op(**mixed))
        for out, like, wide in zip(outputs_of(op(**mixed)), plain, outputs_of(op(**args))):
            assert out.dtype == (wide.dtype if rest else like.dtype)
            torch.testing.assert_close(out.double(), wide.double(), rtol=0.05, atol=0.05)


@pytest.mark.parametrize("op", GRAD_OPS, ids=lambda o: o.name)
def test_double_backward_is_refused_in_words(op: Op) -> None:
    args = leaves(op, make(op, small(op)[0], torch.float32))
    chosen = op.choose(**args)
    if chosen == "reference":
        pytest.skip("no kernels here: plain torch differentiates twice")
    last = [v for v in tensors(args).values() if v.requires_grad][-1]
    (grad,) = torch.autograd.grad(outputs_of(op(**args))[0].square().sum(), last, create_graph=True)
    with pytest.raises(RuntimeError, match=rf"{op.name} has no second derivatives .*backend\('reference'\)"):
        torch.autograd.grad(grad.square().sum(), last)


def of_first(op: Op, args: dict[str, Any]) -> tuple[Callable[..., Tensor], Callable[..., Tensor], Tensor]:
    """(the op, its reference, x): the op's first output as a function of its first floating-point argument x."""
    first = next(k for k, v in tensors(args).items() if v.is_floating_point())
    return (
        lambda x: outputs_of(op(**(args | {first: x})))[0],
        lambda x: outputs_of(op.ref(**(args | {first: x})))[0],
        args[first],
    )


@pytest.mark.parametrize("op", GRAD_OPS, ids=lambda o: o.name)
def test_tangents_are_right_wherever_the_op_is_met(op: Op) -> None:
    """Eagerly, in a compiled graph, in an exported program and with dual numbers: torch gives a custom op zeros."""
    ours, plain, x = of_first(op, make(op, small(op)[0], torch.float32))
    direction = torch.ones_like(x).cos() * x

    def tangent(fn: Callable[..., Tensor], x: Tensor, direction: Tensor) -> Tensor:
        return torch.func.jvp(fn, (x,), (direction,))[1]

    class Module(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return ours(x)

    with backend("reference"):  # rope_attention's needs the op's own door: torch's attention has no tangent
        exact = tangent(plain, x, direction)
    assert exact.abs().max() > 0
    torch._dynamo.reset()
    exported = torch.export.export(Module(), (x,)).module()
    compiled = torch.compile(lambda x, v: tangent(ours, x, v), backend="eager")
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, direction)
        dual_found = [torch.autograd.forward_ad.unpack_dual(fn(dual)).tangent for fn in (ours, exported)]
    for found in (tangent(ours, x, direction), tangent(exported, x, direction), compiled(x, direction), *dual_found):
        torch.testing.assert_close(found, exact)


@pytest.mark.parametrize("op", GRAD_OPS, ids=lambda o: o.name)
def test_torch_func_gives_the_gradients_of_autograd(op: Op) -> None:
    ours, _, x = of_first(op, make(op, small(op)[0], torch.float32))
    leaf = x.clone().requires_grad_()
    ours(leaf).square().sum().backward()
    grad = torch.func.grad(lambda v: ours(v).square().sum())(x)
    torch.testing.assert_close(grad, leaf.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("op", [o for o in OPS if not o.differentiable], ids=lambda o: o.name)
def test_an_op_without_derivative_is_a_constant_of_every_transform(op: Op) -> None:
    args = make(op, small(op)[0], torch.float32)
    with backend("reference"):  # what a transform meets
        plain = outputs_of(op(**args))[0].float()
    floats = [k for k, v in tensors(args).items() if v.is_floating_point()]
    if not floats:
        x = torch.randn(3)
        _, tangent = torch.func.jvp(lambda x: x.sum() * outputs_of(op(**args))[0].float(), (x,), (torch.ones(3),))
        torch.testing.assert_close(tangent, 3 * plain)
        return

    def weighed(x: Tensor) -> Tensor:
        return x.sum() * outputs_of(op(**(args | {floats[0]: x})))[0].float()

    x = args[floats[0]]
    _, tangent = torch.func.jvp(weighed, (x,), (torch.ones_like(x),))
    torch.testing.assert_close(tangent, x.numel() * plain)
    grad = torch.func.grad(lambda x: weighed(x).sum())(x)
    torch.testing.assert_close(grad, plain.sum().expand_as(x))


def test_a_tangent_of_one_thread_is_no_other_s() -> None:
    op, seen = ops()["adaln"], []
    if _dispatch.why_missing("native", "cpu") is not None:
        pytest.skip("no native library")
    x = torch.randn(1, 2, 8)
    with torch.autograd.forward_ad.dual_level():
        thread = threading.Thread(target=lambda: seen.append(op.choose(x)))
        thread.start()
        thread.join()
        dual = torch.autograd.forward_ad.make_dual(x, x)
        assert op.choose(dual) == "reference"
    assert [op.choose(x), *seen] == ["native", "native"]


def _changed(op: Op) -> Iterator[Any]:
    """Every op with one integer argument, or one size of one tensor, set to 0 or -1."""
    for sample in small(op)[:2]:
        args = make(op, sample, torch.float32)
        for (kind, _), name in zip(op.kinds, op.names):
            if kind in ("int", "int | None"):
                yield from (args | {name: n} for n in (0, -1))
        for name, value in tensors(args).items():
            for dim in range(value.ndim):
                yield args | {name: value.narrow(dim, 0, 0)}


@pytest.mark.parametrize("op", OPS, ids=lambda o: o.name)
def test_sizes_and_integers_are_checked_before_they_divide(op: Op) -> None:
    """0, -1 and empty dimensions: what the reference gives, or one sentence that names the op."""
    for args in _changed(op):
        said, out = "", ()
        try:
            out = outputs_of(op(**args))
        except (ValueError, TypeError) as error:
            said = str(error)
        if said:
            assert said.startswith(op.name)
            assert len(said.splitlines()) == 1
        else:
            assert [o.shape for o in out] == [o.shape for o in outputs_of(op.ref(**args))]


@pytest.mark.parametrize("op", OPS, ids=lambda o: o.name)
def test_ops_are_copied_and_pickled_as_themselves(op: Op) -> None:
    assert copy.deepcopy(op) is op
    assert pickle.loads(pickle.dumps(op)) is op


@pytest.mark.parametrize("op", OPS, ids=lambda o: o.name)
def test_meta_tensors_give_shapes(op: Op) -> None:
    args = make(op, small(op)[0], torch.float32)
    meta = {k: v.to("meta") if isinstance(v, Tensor) else v for k, v in args.items()}
    for shape, value in zip(outputs_of(op(**meta)), outputs_of(op(**args)), strict=True):
        assert shape.shape == value.shape
        assert shape.dtype == value.dtype


def test_leaving_contexts_in_another_order_leaves_nothing_forced() -> None:
    first, second = backend("reference"), backend("reference")
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert _dispatch.forced_backend() == "reference"
    second.__exit__(None, None, None)
    assert _dispatch.forced_backend() is None


def test_a_symbolic_batch_is_not_tied_to_the_width() -> None:
    class Block(torch.nn.Module):
        def forward(self, x: Tensor, gate: Tensor) -> Tensor:
            return ops()["gate_residual"](x, gate, ops()["adaln"](x, gate, gate))

    batch = torch.export.Dim("batch", min=2)
    example = (torch.randn(3, 4, 8), torch.randn(3, 8))
    exported = torch.export.export(Block(), example, dynamic_shapes=({0: batch}, {0: batch}))
    other = (torch.randn(8, 4, 8), torch.randn(8, 8))
    torch.testing.assert_close(exported.module()(*other), Block()(*other))


@pytest.mark.parametrize("op", OPS, ids=lambda o: o.name)
def test_empty_batch_uses_the_reference_and_keeps_shapes(op: Op) -> None:
    """Every tensor whose first dimension is the first tensor's belongs to the batch."""
    args = make(op, small(op)[0], torch.float32)
    first = next(iter(tensors(args).values()))
    if first.ndim == 1:
        pytest.skip("no batch dimension")
    empty = {
        k: v[:0] if isinstance(v, Tensor) and op.role(k) != "fp32" and v.shape[:1] == first.shape[:1] else v
        for k, v in args.items()
    }
    for out, full in zip(outputs_of(op(**empty)), outputs_of(op(**args))):
        batched = full.shape[:1] == first.shape[:1]
        assert out.shape == ((0, *full.shape[1:]) if batched else full.shape)


def test_strict_mode_raises_instead_of_falling_back(monkeypatch: pytest.MonkeyPatch) -> None:
    op = ops()["adaln"]
    monkeypatch.setattr(_dispatch._State, "strict", True)
    with pytest.raises(BackendError, match="float64"):
        op(torch.zeros(1, 2, 8, dtype=torch.float64))
    if _dispatch.why_missing("native", "cpu") is None:
        assert op(torch.zeros(0, 2, 8)).shape == (0, 2, 8)


def test_forced_backend_that_cannot_run_says_why() -> None:
    need(ops()["rope_attention"], "triton", "cpu")
    why = r"rope_attention: backend 'triton' was forced .*head_dim 12"
    with backend("triton"), pytest.raises(BackendError, match=why):
        ops()["rope_attention"](torch.zeros(1, 2, 3, 1, 12))
    known = r"unknown backend 'cudnn': expected one of .*native.*reference"
    with pytest.raises(ValueError, match=known), backend("cudnn"):
        pass


def test_reason_names_each_backend() -> None:
    reasons = ops()["rope_attention"].reason(torch.zeros(0, 2, 3, 1, 64))
    assert set(reasons) == {"native"}
    assert reasons["native"] == (_dispatch.why_missing("native", "cpu") or EMPTY)


def test_a_fallback_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    _dispatch._LOGGED.clear()
    with caplog.at_level("DEBUG", logger="maetok_fast"):
        for _ in range(3):
            ops()["adaln"](torch.zeros(1, 2, 8, dtype=torch.float64))
    messages = [r.message for r in caplog.records if r.message.startswith("adaln")]
    assert len(messages) == 1
    assert "native" in messages[0]


def test_arguments_are_bound_like_a_python_call() -> None:
    adaln = ops()["adaln"]
    x = torch.randn(1, 2, 8)
    assert torch.equal(adaln(x, None, None, None, None, 1e-3), adaln(x=x, eps=1e-3))
    with pytest.raises(TypeError, match="unexpected argument 'epsilon'; it takes x, shift"):
        adaln(x, epsilon=1e-3)
    with pytest.raises(TypeError, match="two values for 'x'"):
        adaln(x, x=x)
    with pytest.raises(TypeError, match="misses x"):
        adaln(eps=1e-3)
    with pytest.raises(TypeError, match="misses gate, branch"):
        ops()["gate_residual"](x)
    with pytest.raises(TypeError, match="expects a tensor as x, got list"):
        adaln([1.0])
    with pytest.raises(TypeError, match="expects a tensor or None as shift, got float"):
        adaln(x, 0.1)
    with pytest.raises(TypeError, match="expects float as eps, got NoneType"):
        adaln(x, eps=None)
    with pytest.raises(TypeError, match="expects int as prefix, got float"):
        ops()["rope_attention"](torch.zeros(1, 2, 3, 1, 8), prefix=1.0)
    with pytest.raises(TypeError, match=r"floating-point tensor as shift, got torch.int64"):
        adaln(x, torch.zeros(1, 8, dtype=torch.int64))
    with pytest.raises(TypeError, match="takes 9 arguments but 10"):
        adaln(x, None, None, None, None, 1e-6, 1.0, "", "layer", 2)


def test_one_name_is_registered_once() -> None:
    op = OPS[0]
    with pytest.raises(RuntimeError, match=f"op '{op.name}' is registered twice"):
        dataclasses.replace(op)


@pytest.mark.parametrize("op", OPS, ids=lambda o: o.name)
def test_records_are_complete(op: Op) -> None:
    """A docstring, small and real samples with distinct labels, and a cost that counts at least inputs and output."""
    assert op.__doc__
    labels = [s.label for s in op.samples]
    assert len(set(labels)) == len(labels)
    assert any(s.real for s in op.samples)
    assert small(op)
    for sample in small(op):
        args = make(op, sample, torch.float32)
        cost = op.cost(**args)
        assert cost.flops >= 0
        assert cost.bytes >= sum(o.nbytes for o in outputs_of(op(**args))) + tensors(args)[op.names[0]].numel()
    assert [name for name, _ in op.usable("cpu")][-1] == "reference"
