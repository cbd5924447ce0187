# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""The correctness rule itself: what rounds as it has to passes, what is wrong does not."""

from __future__ import annotations

import pytest
import torch
from rule import allowed, assert_rule, err, nudged, terms_of
from torch import Tensor


def one_by_one(x: Tensor) -> Tensor:
    """Sums of the rows, the worst order."""
    total = torch.zeros(x.shape[0])
    for column in x.unbind(1):
        total += column
    return total


@pytest.mark.parametrize("terms", [1, 30, 1000, 30000])
def test_a_sum_in_another_order_passes_and_a_wrong_one_does_not(terms: int) -> None:
    """Against a plain result without any error, the luckiest peer."""
    x = torch.randn(16, terms)
    exact = x.double().sum(1)
    lucky = exact.float()
    assert_rule({"y": one_by_one(x)}, {"y": lucky}, {"y": exact}, [x])
    for wrong in (lucky * (1 + 2e-5), lucky.bfloat16().float(), (exact - x[:, 0]).float()):
        with pytest.raises(AssertionError, match=r"y: error .* the rule allows"):
            assert_rule({"y": wrong}, {"y": lucky}, {"y": exact}, [x])


def test_a_sum_that_cancels_is_measured_by_its_terms() -> None:
    """Summed as the kernels do it: chunks of 32 rows, then the chunks."""
    x = torch.randn(4, 512)
    x = torch.cat((x, -x), 1)[:, torch.randperm(1024)]
    total = one_by_one(torch.stack([one_by_one(chunk) for chunk in x.split(32, 1)], 1))
    exact = {"d_x": x.double(), "d_bias": torch.zeros(4, dtype=torch.float64)}
    lucky = {"d_x": x, "d_bias": torch.zeros(4)}
    assert_rule({"d_x": x, "d_bias": total}, lucky, exact, [x])
    for missing in (x[:, 0], x[:, 1] / 1000):
        with pytest.raises(AssertionError, match="d_bias"):
            assert_rule({"d_x": x, "d_bias": total - missing}, lucky, exact, [x])
    with pytest.raises(AssertionError, match="d_x"):  # what is no sum gains nothing
        assert_rule({"d_x": x * (1 + 1e-6), "d_bias": torch.zeros(4)}, lucky, exact, [x])


def test_a_lucky_draw_of_plain_torch_is_drawn_again() -> None:
    exact = torch.ones(3, dtype=torch.float64)
    typical = exact.float() * (1 + 1e-5)
    asked = []

    def again(seed: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        asked.append(seed)
        return {"y": typical if seed == 9 else exact.float()}, {"y": exact}

    assert_rule({"y": exact.float()}, {"y": exact.float()}, {"y": exact}, again=again)
    assert asked == [], "what passes costs no further draw"
    got = {"y": exact.float() * (1 + 1.5e-5)}
    with pytest.raises(AssertionError, match="y"):
        assert_rule(got, {"y": exact.float()}, {"y": exact})
    assert_rule(got, {"y": exact.float()}, {"y": exact}, again=again)
    assert len(asked) == len(set(asked)) == 15
    with pytest.raises(AssertionError, match=r"error 3.*e-05, the rule allows 2.*e-05"):
        assert_rule({"y": exact.float() * (1 + 3e-5)}, {"y": exact.float()}, {"y": exact}, again=again)


def test_nudged_moves_each_element_by_about_an_ulp() -> None:
    args = {"x": torch.randn(1000), "low": torch.randn(1000).bfloat16(), "index": torch.arange(3), "eps": 1e-6}
    moved = nudged(args, 1)
    assert moved.keys() == args.keys()
    assert moved["eps"] == 1e-6
    assert torch.equal(moved["index"], args["index"])
    for name in ("x", "low"):
        before, after = args[name].double(), moved[name].double()
        assert moved[name].dtype == args[name].dtype
        apart = (after - before).abs() / before.abs()
        assert 0.3 < (apart > 0).double().mean() < 0.9
        assert (apart <= 1.34 * torch.finfo(args[name].dtype).eps).all()
    assert not torch.equal(moved["x"], nudged(args, 2)["x"])


def test_sixteen_bit_results_gain_nothing_by_many_terms() -> None:
    """Their sums run in fp32: the root counts in fp32's ulp."""
    few, many = (allowed(0.0, 1.0, torch.bfloat16, n) for n in (1, 10000))
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
