# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""The correctness rule itself: what rounds as it has to passes, what is wrong does not."""

from __future__ import annotations

import pytest
import torch
from rule import allowed, assert_rule, err, terms_of


@pytest.mark.parametrize("terms", [1, 30, 1000, 30000])
def test_a_sum_in_another_order_passes_and_a_wrong_one_does_not(terms: int) -> None:
    """Against a plain result without any error, the luckiest peer."""
    x = torch.randn(16, terms)
    exact = x.double().sum(1)
    lucky = exact.float()
    one_by_one = torch.zeros(16)
    for column in x.unbind(1):
        one_by_one += column
    assert_rule({"y": one_by_one}, {"y": lucky}, {"y": exact}, [x])
    for wrong in (lucky * (1 + 2e-5), lucky.bfloat16().float(), (exact - x[:, 0]).float()):
        with pytest.raises(AssertionError, match="y: error .* the rule allows"):
            assert_rule({"y": wrong}, {"y": lucky}, {"y": exact}, [x])


def test_sixteen_bit_results_gain_nothing_by_many_terms() -> None:
    """Their sums run in fp32: the root counts in fp32's ulp."""
    exact = torch.ones(4, dtype=torch.float64)
    few, many = (allowed(exact, exact, torch.bfloat16, n) for n in (1, 10000))
    assert few == pytest.approx(2 * 2**-7, rel=1e-4)
    assert many == pytest.approx(few, rel=1e-3)


def test_shapes_dtypes_integers_and_the_non_finite() -> None:
    one = torch.ones(3, dtype=torch.float64)
    with pytest.raises(AssertionError, match="y"):
        assert_rule({"y": torch.ones(2)}, {"y": torch.ones(3)}, {"y": one})
    with pytest.raises(AssertionError, match="y"):
        assert_rule({"y": torch.ones(3).half()}, {"y": torch.ones(3)}, {"y": one})
    with pytest.raises(AssertionError):
        assert_rule({}, {"y": torch.ones(3)}, {"y": one})
    with pytest.raises(AssertionError, match="n"):
        assert_rule({"n": torch.tensor([1, 3])}, {"n": torch.tensor([1, 2])}, {"n": torch.tensor([1, 2])})
    for bad in (float("nan"), float("inf")):
        with pytest.raises(AssertionError, match="y"):
            assert_rule({"y": torch.tensor([1.0, bad, 1.0])}, {"y": torch.ones(3)}, {"y": one})
    assert err(torch.tensor([float("inf")]), torch.tensor([float("inf")])) == 0.0
    assert_rule({"y": torch.ones(0)}, {"y": torch.ones(0)}, {"y": torch.ones(0, dtype=torch.float64)})


def test_terms_are_what_an_element_can_sum() -> None:
    x, weight = torch.zeros(4, 8, 16), torch.zeros(16)
    assert terms_of(weight, [x, weight]) == 33
    assert terms_of(x, [x]) == 1
    assert terms_of(torch.zeros(()), [x]) == 512
    assert terms_of(x, []) == 1
