# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""The correctness rule, for every test that compares a kernel with fp64:

    err(kernel) <= 2 err(plain torch in the same dtype) + 2 ulp + sqrt(terms) / 2 ulp32

err is the largest absolute difference to fp64 over the tensor, an ulp that of the largest exact value in the result's
dtype, ulp32 in the dtype of the sums: fp32 for all but fp64. The last term is the noise of a sum: each of its additions
rounds by half an ulp at most, and steps of random sign add up to the root of their number. Plain torch's own error
shows it as a rule, but not where a sum of few rows happens to come out well in torch's order; another processor's
order, or the interpreter's, then fails without being worse.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

__all__ = ["allowed", "assert_rule", "err", "terms_of"]


def err(x: Tensor, exact: Tensor) -> float:
    """The largest absolute difference; NaN, which passes no comparison, where one has a NaN or unequal infinities."""
    if not x.numel():
        return 0.0
    x, exact = x.double().cpu(), exact.double().cpu()
    return torch.where(x == exact, 0.0, (x - exact).abs()).max().item()


def terms_of(result: Tensor, inputs: Iterable[Tensor]) -> int:
    """How many input elements there are to an element of the result: the number of terms that a sum can have."""
    return max(1, sum(t.numel() for t in inputs) // max(1, result.numel()))


def allowed(plain: Tensor, exact: Tensor, dtype: torch.dtype, terms: int = 1) -> float:
    """The largest error that the rule lets pass, for a result of `dtype`."""
    largest = exact.double().abs().max().item() if exact.numel() else 0.0
    sums = dtype if dtype == torch.float64 else torch.float32
    ulps = 2 * torch.finfo(dtype).eps + math.sqrt(terms) / 2 * torch.finfo(sums).eps
    return 2 * err(plain, exact) + ulps * largest


def assert_rule(
    got: Mapping[str, Tensor],
    plain: Mapping[str, Tensor],
    exact: Mapping[str, Tensor],
    inputs: Iterable[Tensor] = (),
) -> None:
    """Every tensor of `got` against the same of `exact` (fp64), with plain torch's as the measure.

    inputs: the tensors that the results are computed from, which bound the terms of their sums; none: elementwise.
    Shapes, dtypes and integer results have to be equal. AssertionError names the tensor and its error.
    """
    inputs = list(inputs)
    assert got.keys() == plain.keys() == exact.keys()
    for name, reference in exact.items():
        assert got[name].shape == reference.shape, name
        assert got[name].dtype == plain[name].dtype, name
        if not reference.is_floating_point():
            assert torch.equal(got[name].cpu(), reference.cpu()), name
            continue
        most = allowed(plain[name], reference, got[name].dtype, terms_of(reference, inputs))
        error = err(got[name], reference)
        assert error <= most, f"{name}: error {error:.3e}, the rule allows {most:.3e}"
