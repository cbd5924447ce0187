# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""The correctness rule, for every test that compares a kernel with fp64:

    err(kernel) <= 2 err(plain torch in the same dtype) + 2 ulp(result) + sqrt(terms) / 2 ulp32(terms)

err is the largest absolute difference to fp64 over the tensor, an ulp that of the largest exact value in the result's
dtype. Two things make that hold on every processor, whatever the order in which it sums:

- The last part is the noise of a sum over rows. Each of its additions rounds by half an ulp at most, and steps of
  random sign add up to the root of their number. The ulp is that of the terms, which may be far larger than a sum that
  cancels (a bias on all keys changes no softmax: its exact gradient is 0), in the dtype of the sums: fp32 but for fp64.
- Plain torch's error is one draw of a random number. Of a sum of few rows it varies five-fold with the last bits of the
  inputs: 3.4 ulp as drawn by the suite, 4 to 20 on twelve neighbours (d_k_weight of rope_attention, 55 terms). A tensor
  that fails against the first draw is held against the largest of sixteen, whose inputs are moved by an ulp.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

__all__ = ["allowed", "assert_rule", "err", "nudged", "terms_of"]

DRAWS = 16
Results = Mapping[str, Tensor]


def err(x: Tensor, exact: Tensor) -> float:
    """The largest absolute difference; NaN, which passes no comparison, where one has a NaN or unequal infinities."""
    if not x.numel():
        return 0.0
    x, exact = x.double().cpu(), exact.double().cpu()
    return torch.where(x == exact, 0.0, (x - exact).abs()).max().item()


def largest(x: Tensor) -> float:
    return x.double().abs().max().item() if x.numel() else 0.0


def terms_of(result: Tensor, inputs: Iterable[Tensor]) -> int:
    """How many input elements there are to an element of the result: the number of terms that a sum can have."""
    return max(1, sum(t.numel() for t in inputs) // max(1, result.numel()))


def allowed(plain: float, size: float, dtype: torch.dtype, terms: int = 1, term_size: float | None = None) -> float:
    """The largest error that the rule lets pass.

    plain: plain torch's error; size: the largest exact value of the result, of type `dtype`; terms: the number of terms
    of its sums; term_size: the size of these, by default `size`.
    """
    sums = dtype if dtype == torch.float64 else torch.float32
    noise = math.sqrt(terms) / 2 * torch.finfo(sums).eps * (size if term_size is None else term_size)
    return 2 * plain + 2 * torch.finfo(dtype).eps * size + noise


def nudged(args: Mapping[str, Any], seed: int) -> dict[str, Any]:
    """The arguments with every element of every floating-point tensor moved by about an ulp or not at all."""
    generator = torch.Generator().manual_seed(seed)
    moved = dict(args)
    for name, value in args.items():
        if isinstance(value, Tensor) and value.is_floating_point():
            steps = torch.randint(-1, 2, value.shape, generator=generator).to(value.device)
            moved[name] = (value.double() * (1 + steps * torch.finfo(value.dtype).eps)).to(value.dtype)
    return moved


def assert_rule(
    got: Results,
    plain: Results,
    exact: Results,
    inputs: Iterable[Tensor] = (),
    again: Callable[[int], tuple[Results, Results]] | None = None,
) -> None:
    """Every tensor of `got` against the same of `exact` (fp64), with plain torch's as the measure.

    inputs: the tensors that the results are computed from, which bound the terms of their sums; none: elementwise. The
        terms of a gradient "d_..." are as large as the largest gradient of at least as many elements.
    again(seed): (plain, exact) on other inputs, `nudged(args, seed)`; called for what fails without.
    Shapes, dtypes and integer results have to be equal. AssertionError names the tensor and its error.
    """
    inputs = list(inputs)
    assert got.keys() == plain.keys() == exact.keys()
    errors = {}
    for name, reference in exact.items():
        assert got[name].shape == reference.shape, name
        assert got[name].dtype == plain[name].dtype, name
        if reference.is_floating_point():
            errors[name] = err(plain[name], reference)
        else:
            assert torch.equal(got[name].cpu(), reference.cpu()), name
    sizes = {name: largest(exact[name]) for name in errors}

    def limit(name: str) -> float:
        rows = [n for n in errors if n[:2] == name[:2] == "d_" and exact[n].numel() >= exact[name].numel()]
        term_size = max(sizes[n] for n in {name, *rows})
        return allowed(errors[name], sizes[name], got[name].dtype, terms_of(exact[name], inputs), term_size)

    failed = [name for name in errors if not err(got[name], exact[name]) <= limit(name)]
    if failed and again is not None:
        for seed in range(1, DRAWS):
            other, right = again(seed)
            errors |= {name: max(errors[name], err(other[name], right[name])) for name in failed}
    for name in failed:
        error = err(got[name], exact[name])
        assert error <= limit(name), f"{name}: error {error:.3e}, the rule allows {limit(name):.3e}"
