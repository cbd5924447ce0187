# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""Token masking beyond the generic suite: the random numbers, their distributions, the naive formulas, the errors."""

from __future__ import annotations

import itertools
import math
import re
from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from maetok_fast.kernels import (
    backend,
    decoder_tokens,
    embed_tokens,
    gather_tokens,
    host_mask_count,
    mask_counts,
    random_mask,
    sample_mask,
    sample_visible,
    scatter_tokens,
    visible_index,
)
from maetok_fast.kernels._dispatch import why_missing
from maetok_fast.kernels.token_mask import _philox

BACKENDS = ("reference", "native", "triton")
FEW = settings(max_examples=30, deadline=None)
COLLISION = 74  # the first image under seed 5 with two equal keys among 16384


def need(name: str) -> None:
    reason = why_missing(name, "cpu") if name != "reference" else None
    if reason is not None:
        pytest.skip(f"{name}: {reason}")


def seeds(seed: int, step: int = 0) -> Tensor:
    return torch.tensor([seed, step])


# ---- random numbers ------------------------------------------------------------------------------------------------


def test_philox_gives_the_published_words() -> None:
    """Known answers of Random123 (kat_vectors, philox4x32 10)."""
    ones = 0xFFFFFFFF
    pi = (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344)
    assert _philox((0, 0, 0, 0), (0, 0)) == (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)
    assert _philox((ones,) * 4, (ones, ones)) == (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)
    assert _philox(pi, (0xA4093822, 0x299F31D0)) == (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)
    words = _philox(tuple(torch.tensor([w, 0]) for w in pi), (torch.tensor(0xA4093822), torch.tensor(0x299F31D0)))
    assert [int(w[0]) for w in words] == [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1]


def plain_mask(seed: int, step: int, image: int, tokens: int, count: int) -> list[bool]:
    """The definition with Python integers: the `count` smallest keys, ties by index."""
    split = [seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF], [step & 0xFFFFFFFF, step >> 32 & 0xFFFFFFFF]
    keys = [
        (_philox((n // 4, image, *split[1]), tuple(split[0]))[n % 4], n)  # type: ignore[arg-type]
        for n in range(tokens)
    ]
    chosen = {n for _, n in sorted(keys)[: max(count, 0)]}
    return [n in chosen for n in range(tokens)]


@pytest.mark.parametrize("name", BACKENDS)
def test_masks_follow_the_definition_on_every_backend(name: str) -> None:
    need(name)
    for seed, step, tokens, first, dtype in (
        (0, 0, 16, 0, torch.int32),
        (-3, 2**40 + 5, 257, 2**32 - 2, torch.int64),  # the image's index wraps at 2^32
        (2**63 - 1, -1, 130, 12345, torch.int64),
    ):
        count = torch.tensor([0, 1, tokens // 2, tokens, tokens + 9, -4], dtype=dtype)
        with backend(name):
            mask = random_mask(seeds(seed, step), count, tokens, first)
        for b, k in enumerate(count.tolist()):
            assert mask[b].tolist() == plain_mask(seed, step, (first + b) % 2**32, tokens, k), (seed, b)


@pytest.mark.parametrize("name", BACKENDS)
def test_equal_keys_are_taken_in_order(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where Philox repeats a word within an image (image COLLISION), the earlier token comes first."""
    need(name)
    tokens, seed, image = 16384, 5, COLLISION
    keys = torch.stack(_philox((torch.arange(tokens // 4), image, 0, 0), (seed, 0)), -1).flatten()
    order = keys.argsort(stable=True)
    ties = (keys[order].diff() == 0).nonzero().flatten().tolist()
    assert ties
    for at in ties:
        with backend(name):
            mask = random_mask(seeds(seed), torch.tensor([at + 1]), tokens, image)[0]
        assert mask.sum() == at + 1
        assert mask[order[at]]
        assert not mask[order[at + 1]]


@FEW
@given(
    st.integers(-(2**63), 2**63 - 1),
    st.integers(0, 2**40),
    st.integers(1, 300),
    st.integers(1, 9),
    st.integers(0, 2**31),
)
def test_counts_are_exact_and_the_split_of_the_batch_does_not_matter(
    seed: int, step: int, tokens: int, batch: int, first: int
) -> None:
    seed_step = seeds(seed, step)
    count = torch.randint(0, tokens + 1, (batch,), generator=torch.Generator().manual_seed(tokens))
    whole = random_mask(seed_step, count, tokens, first)
    assert torch.equal(whole.sum(1), count)
    cut = batch // 2
    parts = [
        random_mask(seed_step, count[:cut], tokens, first),
        random_mask(seed_step, count[cut:], tokens, first + cut),
    ]
    assert torch.equal(torch.cat(parts), whole)
    with backend("reference"):
        assert torch.equal(random_mask(seed_step, count, tokens, first), whole)


def chi_square(counts: Counter, cells: int) -> float:
    """(X^2 - df) / sqrt(2 df): about a standard normal when all cells are equally likely."""
    total = sum(counts.values())
    expected = total / cells
    x2 = sum((counts.get(c, 0) - expected) ** 2 / expected for c in counts) + (cells - len(counts)) * expected
    return (x2 - (cells - 1)) / math.sqrt(2 * (cells - 1))


def test_every_subset_is_equally_likely() -> None:
    """C(7, 3) = 35 subsets over 35 000 images of one step, and over 3500 steps of 10 images."""
    images = random_mask(seeds(2024), torch.full((35000,), 3), 7)
    steps = torch.cat([random_mask(seeds(9, s), torch.full((10,), 3), 7) for s in range(3500)])
    for masks in (images, steps):
        subsets = Counter(map(tuple, masks.tolist()))
        assert set(subsets) <= {tuple(n in s for n in range(7)) for s in itertools.combinations(range(7), 3)}
        assert abs(chi_square(subsets, 35)) < 4


def test_images_steps_and_seeds_are_independent() -> None:
    """The overlap of two masks of 128 in 256 tokens is hypergeometric: mean 64, variance 16.06."""
    count = torch.full((2000,), 128)
    a = random_mask(seeds(1, 0), count, 256)
    for b in (a.roll(1, 0), random_mask(seeds(1, 1), count, 256), random_mask(seeds(2, 0), count, 256)):
        overlap = (a & b).sum(1).double()
        assert abs(overlap.mean() - 64) < 4 * math.sqrt(16.06 / 2000)
        assert 0.85 < overlap.var() / 16.06 < 1.15
    per_token = a.double().mean(0)
    assert (per_token - 0.5).abs().max() < 5 * math.sqrt(0.25 / 2000)


# ---- counts --------------------------------------------------------------------------------------------------------


def phi(z: float) -> float:
    return 0.5 * (1 + math.erf(z / math.sqrt(2)))


@pytest.mark.parametrize("per_image", [False, True])
@pytest.mark.parametrize("name", BACKENDS)
def test_counts_are_the_hosts_on_every_backend(name: str, per_image: bool) -> None:
    need(name)
    for seed, step, tokens, low, high in ((7, 0, 256, 0.4, 0.6), (-1, 2**35, 1024, 0.0, 1.0), (3, 4, 33, 0.5, 0.5)):
        with backend(name):
            got = mask_counts(seeds(seed, step), 4, tokens, low, high, 2**32 - 2, per_image)
        assert got.dtype == torch.int32
        images = [(2**32 - 2 + b) % 2**32 if per_image else None for b in range(4)]
        assert got.tolist() == [host_mask_count(seed, step, tokens, low, high, i) for i in images]


def test_the_ratio_is_the_half_bell() -> None:
    """P(count = k) = F(k / N) - F((k - 1) / N) of the normal N(0.6, 0.25^2) cut to [0.4, 0.6]; mean 0.505."""
    tokens, low, high, draws = 100, 0.4, 0.6, 200_000
    counts = mask_counts(seeds(11), draws, tokens, low, high, 0, True)
    assert counts.min() >= 41
    assert counts.max() <= 60

    def below(x: float) -> float:
        return (phi((min(x, high) - high) / 0.25) - phi((low - high) / 0.25)) / (0.5 - phi((low - high) / 0.25))

    share = torch.bincount(counts, minlength=tokens + 1) / draws
    for k in range(41, 61):
        p = below(k / tokens) - below((k - 1) / tokens)
        assert abs(share[k] - p) < 5 * math.sqrt(p / draws), k
    fine = mask_counts(seeds(12), draws, 100_000, low, high, 0, True).double() / 100_000
    a = (low - high) / 0.25
    density = math.exp(-a * a / 2) / math.sqrt(2 * math.pi)
    mean = high + 0.25 * (density - 1 / math.sqrt(2 * math.pi)) / (0.5 - phi(a))
    assert round(mean, 3) == 0.505
    assert abs(fine.mean() - mean) < 4 * fine.std() / math.sqrt(draws)
    for q in (0.1, 0.25, 0.5, 0.75, 0.9):
        assert abs(below(float(fine.quantile(q))) - q) < 5 * math.sqrt(q * (1 - q) / draws)


def test_one_ratio_per_step_for_all_ranks_and_constants() -> None:
    one = {int(mask_counts(seeds(1, 2), 3, 256, first_image=first)[b]) for first in (0, 64, 128) for b in range(3)}
    assert len(one) == 1
    assert len({host_mask_count(1, step, 1024) for step in range(50)}) > 20
    assert mask_counts(seeds(0), 2, 256, 0.0, 0.0).tolist() == [0, 0]
    assert mask_counts(seeds(0), 2, 256, 1.0, 1.0).tolist() == [256, 256]
    assert host_mask_count(0, 0, 100, 0.55, 0.55) == 55  # 0.55 * 100 = 55.00000000000001
    assert host_mask_count(0, 0, 100, 0.551, 0.551) == 56
    assert host_mask_count(0, 0, 0) == 0


@FEW
@given(st.integers(0, 2**62), st.integers(1, 400), st.floats(0, 1), st.floats(0, 1))
def test_counts_lie_between_the_ratios(seed: int, tokens: int, a: float, b: float) -> None:
    low, high = min(a, b), max(a, b)
    count = host_mask_count(seed, 1, tokens, low, high)
    assert math.floor(low * tokens) <= count <= math.ceil(high * tokens)
    assert mask_counts(seeds(seed, 1), 1, tokens, low, high).item() == count


def test_sample_mask_needs_no_host_and_advances_with_the_step() -> None:
    seed = seeds(5)
    first = sample_mask(seed, 4, 64)
    assert torch.equal(first, sample_mask(seeds(5), 4, 64))
    seed[1] += 1
    second = sample_mask(seed, 4, 64)
    assert not torch.equal(first, second)
    assert second.sum(1).unique().numel() == 1
    ragged = sample_mask(seed, 64, 256, per_image=True).sum(1)
    assert ragged.unique().numel() > 5
    compiled = torch.compile(lambda s: sample_mask(s, 4, 64), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(seed), second)
    # on meta tensors nothing has a value: a single wait for one would raise
    assert sample_mask(seed.to("meta"), 4, 64).shape == (4, 64)


# ---- drop mode -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BACKENDS)
def test_visible_indices_ascend_and_fill_up(name: str) -> None:
    need(name)
    mask = torch.tensor([[1, 0, 0, 1, 0], [1, 1, 1, 1, 0], [0, 0, 0, 0, 0]]).bool()
    with backend(name):
        assert visible_index(mask, 3).tolist() == [[1, 2, 4], [4, 0, 1], [0, 1, 2]]


def test_sample_visible_draws_what_replace_mode_masks() -> None:
    count = host_mask_count(3, 8, 64)
    mask, index = sample_visible(seeds(3, 8), count, 4, 64)
    assert torch.equal(mask, sample_mask(seeds(3, 8), 4, 64))
    assert index.shape == (4, 64 - count)
    assert not mask.gather(1, index).any()
    assert (index.diff(dim=1) > 0).all()
    assert torch.equal(sample_visible(seeds(3, 8), [count] * 4, 4, 64)[1], index)


@FEW
@given(st.integers(1, 4), st.integers(1, 20), st.integers(1, 40), st.data())
def test_gather_and_scatter_undo_each_other(batch: int, tokens: int, width: int, data: st.DataObject) -> None:
    kept = data.draw(st.integers(0, tokens))
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]))
    generator = torch.Generator().manual_seed(tokens * 41 + width)
    index = torch.rand(batch, tokens, generator=generator).argsort(1)[:, :kept]
    x = torch.randn(batch, tokens, width, generator=generator).to(dtype)
    fill = torch.randn(width, generator=generator).to(dtype)
    shown = gather_tokens(x, index)
    assert torch.equal(shown, torch.stack([row[i] for row, i in zip(x, index)]))
    back = scatter_tokens(shown, index, fill, tokens)
    hidden = torch.ones(batch, tokens, dtype=torch.bool).scatter(1, index, False)
    assert torch.equal(back, torch.where(hidden[..., None], fill, x))
    assert torch.equal(gather_tokens(back, index), shown)
    assert not scatter_tokens(shown, index, None, tokens)[hidden].any()


@pytest.mark.parametrize("name", ["reference", "native"])
def test_gradients_of_gather_and_scatter_go_back_where_they_came_from(name: str) -> None:
    need(name)
    x = torch.randn(2, 6, 8, requires_grad=True)
    fill = torch.randn(8, requires_grad=True)
    mask = random_mask(seeds(1), torch.tensor([2, 2]), 6)
    index = visible_index(mask, 4)
    with backend(name):
        y = scatter_tokens(gather_tokens(x, index), index, fill, 6)
        grad = torch.randn(y.shape)
        dx, dfill = torch.autograd.grad(y, (x, fill), grad)
    torch.testing.assert_close(dx, grad.masked_fill(mask[..., None], 0))
    torch.testing.assert_close(dfill, grad[mask].sum(0))


def test_native_indices_are_checked() -> None:
    need("native")
    x = torch.randn(1, 4, 8)
    with backend("native"):
        with pytest.raises(IndexError, match=r"index 4 lies outside 0 \.\. 3"):
            gather_tokens(x, torch.tensor([[0, 4]]))
        with pytest.raises(IndexError, match=r"index -1 lies outside"):
            scatter_tokens(x, torch.tensor([[0, 1, 2, -1]]), None, 9)
        with pytest.raises(ValueError, match=r"index 2 stands twice in the row of image 0"):
            scatter_tokens(x, torch.tensor([[0, 2, 1, 2]]), None, 9)


# ---- replace mode --------------------------------------------------------------------------------------------------


@FEW
@given(st.integers(1, 5), st.integers(0, 2), st.integers(1, 20), st.integers(0, 9), st.integers(1, 40), st.data())
def test_replace_is_the_naive_formula(
    batch: int, prefix: int, tokens: int, count: int, width: int, data: st.DataObject
) -> None:
    """Every mix of parts and of dtypes, against the model's own steps: select, add, prepend, append."""
    low = data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    high = data.draw(st.sampled_from([torch.float32, low]))
    masked, with_pos = data.draw(st.booleans()), data.draw(st.booleans())
    generator = torch.Generator().manual_seed(batch * 1009 + tokens * 31 + width)

    def randn(*shape: int, dtype: torch.dtype = high) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype).requires_grad_()

    patches, token = randn(batch, tokens, width, dtype=low), randn(width)
    mask = torch.rand(batch, tokens, generator=generator) < 0.5
    pos, cls, latents = randn(prefix + tokens, width), randn(prefix, width), randn(count, width)
    x = torch.where(mask.unsqueeze(-1), token, patches) if masked else patches
    if prefix:
        x = torch.cat([cls.expand(batch, -1, -1), x], 1)
    if with_pos:
        x = x + pos
    if count:
        x = torch.cat([x, latents.expand(batch, -1, -1)], 1)
    got = embed_tokens(
        patches,
        mask if masked else None,
        token if masked else None,
        pos if with_pos else None,
        cls if prefix else None,
        latents if count else None,
    )
    used = [patches] + [token] * masked + [pos] * with_pos + [cls] * bool(prefix) + [latents] * bool(count)
    wide = torch.float32 if any(t.dtype == torch.float32 for t in used) else low
    assert got.dtype == wide
    torch.testing.assert_close(got, x.to(wide), rtol=0, atol=0)
    grad = torch.randn(got.shape, generator=generator).to(wide)
    for mine, theirs in zip(torch.autograd.grad(got, used, grad), torch.autograd.grad(x, used, grad.to(x.dtype))):
        assert mine.dtype == theirs.dtype
        torch.testing.assert_close(
            mine, theirs, rtol=0.02 if mine.itemsize == 2 else 1e-5, atol=0.1 if mine.itemsize == 2 else 1e-5
        )


def test_masked_patches_are_not_read() -> None:
    """A masked patch may be NaN, and its gradient is exactly zero even where the output's is infinite."""
    patches = torch.full((1, 2, 8), math.nan)
    patches[0, 1] = 1
    patches.requires_grad_()
    token = torch.zeros(8, requires_grad=True)
    for name in BACKENDS:
        if name != "reference" and why_missing(name, "cpu") is not None:
            continue
        with backend(name):
            y = embed_tokens(patches, torch.tensor([[True, False]]), token)
            grad = torch.ones_like(y)
            grad[0, 0] = math.inf
            (dx,) = torch.autograd.grad(y, patches, grad)
        assert torch.equal(y.detach(), torch.tensor([0.0, 1.0]).view(1, 2, 1).expand(1, 2, 8))
        assert torch.equal(dx, y.detach())


def test_results_do_not_depend_on_the_number_of_threads() -> None:
    need("native")
    patches, token = torch.randn(4, 96, 192, requires_grad=True), torch.randn(192, requires_grad=True)
    pos, latents = torch.randn(97, 192, requires_grad=True), torch.randn(31, 192, requires_grad=True)
    cls = torch.randn(1, 192, requires_grad=True)
    mask, index = sample_visible(seeds(0), 40, 4, 96)

    def all_of_it() -> list[Tensor]:
        y = embed_tokens(patches, mask, token, pos, cls, latents)
        z = scatter_tokens(gather_tokens(y[:, 1:97], index), index, token, 96)
        grads = torch.autograd.grad((y.sin().sum() + z.cos().sum()), (patches, token, pos, latents, cls))
        return [y.detach(), z.detach(), random_mask(seeds(0), torch.full((200,), 40), 96), *grads]

    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = all_of_it()
        torch.set_num_threads(3)
        three = all_of_it()
    finally:
        torch.set_num_threads(threads)
    for a, b in zip(one, three):
        assert torch.equal(a, b)


# ---- errors --------------------------------------------------------------------------------------------------------


def test_errors_in_words() -> None:
    seed, x = seeds(0), torch.zeros(2, 4, 8)
    mask, index = torch.zeros(2, 4).bool(), torch.zeros(2, 3, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"0 <= low <= high <= 1, got low 0.7, high 0.6"):
        mask_counts(seed, 2, 4, 0.7)
    with pytest.raises(ValueError, match=r"seed must be \(2,\), got \(3,\)"):
        random_mask(torch.zeros(3, dtype=torch.int64), torch.zeros(2, dtype=torch.int32), 4)
    with pytest.raises(TypeError, match=r"random_mask\(\) expects count in int32 or int64, got torch.float32"):
        random_mask(seed, torch.zeros(2), 4)
    with pytest.raises(ValueError, match=r"count must be \(B,\), got \(2, 1\)"):
        random_mask(seed, torch.zeros(2, 1, dtype=torch.int32), 4)
    with pytest.raises(ValueError, match=r"visible must lie in 0 \.\. 4, got 5"):
        visible_index(mask, 5)
    with pytest.raises(ValueError, match=r"one count for all images of a batch, got \[3, 5\]; draw one ratio per step"):
        sample_visible(seed, [3, 5], 2, 8)
    with pytest.raises(TypeError, match=r"count must be an int on the host, got a tensor; use host_mask_count"):
        sample_visible(seed, torch.tensor(3), 2, 8)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"mask and mask_token go together"):
        embed_tokens(x, mask)
    with pytest.raises(ValueError, match=r"mask must be \(B, N\) with B = 2, N = 4, got \(2, 3\)"):
        embed_tokens(x, mask[:, :3], x[0, 0])
    with pytest.raises(ValueError, match=r"pos must be \(5, 8\), a row for each prefix and image token, got \(4, 8\)"):
        embed_tokens(x, cls=x[0, :1], pos=x[0])
    with pytest.raises(ValueError, match=r"latents must be \(L, D\) or \(B, L, D\) with D = 8, B = 2, got \(3, 1, 8\)"):
        embed_tokens(x, latents=torch.zeros(3, 1, 8))
    with pytest.raises(ValueError, match=r"latent_pos must be \(L, D\) with L = 4, D = 8, got \(3, 8\)"):
        decoder_tokens(x, x[0, 0], 5, latent_pos=x[0, :3])
    with pytest.raises(ValueError, match=r"index must be \(B, K\) with B = 2, got \(1, 3\)"):
        gather_tokens(x, index[:1])
    with pytest.raises(ValueError, match=r"index must be \(B, K\) with B = 2, K = 4, got \(2, 3\)"):
        scatter_tokens(x, index, None, 9)
    with pytest.raises(TypeError, match=r"count must be an int on the host, got float"):
        sample_visible(seed, 3.0, 2, 8)  # type: ignore[arg-type]


def test_integers_are_checked_before_they_divide_or_allocate() -> None:
    seed, x, mask = seeds(0), torch.zeros(2, 3, 8), torch.zeros(2, 3).bool()
    count, index = torch.zeros(2, dtype=torch.int32), torch.zeros(2, 3, dtype=torch.int64)
    for sentence, call in (
        ("mask_counts: batch must not be negative, got -1", lambda: mask_counts(seed, -1, 4)),
        ("mask_counts: tokens must not be negative, got -4", lambda: mask_counts(seed, 1, -4)),
        ("mask_counts: first_image must not be negative, got -2", lambda: mask_counts(seed, 1, 4, first_image=-2)),
        ("mask_counts: the ratio must lie in 0 <= low <= high", lambda: mask_counts(seed, 1, 4, math.nan)),
        ("mask_counts: batch must not be negative, got -1", lambda: sample_mask(seed, -1, 4)),
        ("host_mask_count: tokens must not be negative, got -4", lambda: host_mask_count(0, 0, -4)),
        ("host_mask_count: image must not be negative, got -1", lambda: host_mask_count(0, 0, 4, image=-1)),
        ("random_mask: tokens must not be negative, got -4", lambda: random_mask(seed, count, -4)),
        ("random_mask: first_image must not be negative, got -1", lambda: random_mask(seed, count, 4, -1)),
        ("visible_index: visible must lie in 0 .. 3, got -1", lambda: visible_index(mask, -1)),
        ("sample_visible: batch must not be negative, got -2", lambda: sample_visible(seed, 1, -2, 4)),
        ("sample_visible: tokens must not be negative, got -4", lambda: sample_visible(seed, 1, 2, -4)),
        ("sample_visible: count must lie in 0 .. 4, got -1", lambda: sample_visible(seed, -1, 2, 4)),
        ("decoder_tokens: tokens must not be negative, got -4", lambda: decoder_tokens(x, x[0, 0], -4)),
        ("gather_tokens: index names 3 tokens of an image, which must", lambda: gather_tokens(x[:, :2], index)),
        ("gather_tokens: index names 3 tokens of an image, which must", lambda: gather_tokens(x[:, :0], index)),
        ("scatter_tokens: tokens must be at least 3, a place for", lambda: scatter_tokens(x, index, None, 2)),
    ):
        with pytest.raises(ValueError, match=re.escape(sentence)):
            call()


@pytest.mark.parametrize("name", BACKENDS)
def test_nothing_is_a_size_too(name: str) -> None:
    """No image, token or latent: a result of that shape, also where a backend is forced that could compute the rest."""
    need(name)
    x, token = torch.zeros(2, 3, 8), torch.ones(8)
    with backend(name):
        assert torch.equal(decoder_tokens(x, token, 0), x)
    index = torch.zeros(2, 0, dtype=torch.int64)
    assert decoder_tokens(x[:0], token, 4).shape == (0, 7, 8)
    assert decoder_tokens(x[:, :0], token, 4).shape == (2, 4, 8)
    assert embed_tokens(x[:0]).shape == (0, 3, 8)
    assert gather_tokens(x, index).shape == (2, 0, 8)
    assert torch.equal(scatter_tokens(x[:, :0], index, token, 3), torch.ones(2, 3, 8))
    assert mask_counts(seeds(0), 0, 4).shape == (0,)
    assert mask_counts(seeds(0), 2, 0).tolist() == [0, 0]
    assert random_mask(seeds(0), torch.zeros(2, dtype=torch.int32), 0).shape == (2, 0)
    assert visible_index(torch.zeros(2, 3).bool(), 0).shape == (2, 0)


# ---- export --------------------------------------------------------------------------------------------------------


class _Encoder(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.token, self.cls = torch.nn.Parameter(torch.randn(16)), torch.nn.Parameter(torch.randn(1, 16))
        self.latents = torch.nn.Parameter(torch.randn(3, 16))

    def forward(self, patches: Tensor, mask: Tensor, pos: Tensor) -> Tensor:
        return embed_tokens(patches, mask, self.token, pos, self.cls, self.latents)


class _Decoder(_Encoder):
    def forward(self, latents: Tensor, patches: Tensor) -> Tensor:
        return decoder_tokens(latents, self.token, patches.shape[1], None, self.cls)


class _Drop(torch.nn.Module):
    def forward(self, x: Tensor, index: Tensor) -> Tensor:
        return scatter_tokens(gather_tokens(x, index), index, None, x.shape[1])


@pytest.mark.parametrize("name", ["native", "triton"])
@pytest.mark.parametrize("module", [_Encoder, _Decoder, _Drop])
def test_shapes_hold_for_every_batch_and_token_count(name: str, module: type[torch.nn.Module]) -> None:
    """Exported at a batch that one program would sum, run at others: no launch constant in a shape, no guard on B."""
    need(name)
    batch, tokens = torch.export.Dim("B", max=64), torch.export.Dim("T", max=4096)

    def inputs(b: int, n: int) -> tuple[Tensor, ...]:
        if module is _Encoder:
            return torch.randn(b, n, 16), torch.rand(b, n) > 0.5, torch.randn(n + 1, 16)
        if module is _Decoder:
            return torch.randn(b, 4, 16), torch.randn(b, n, 16)
        return torch.randn(b, n, 16), torch.stack([torch.randperm(n)[:2] for _ in range(b)])

    shapes: dict[type, tuple[Any, ...]] = {
        _Encoder: ({0: batch, 1: tokens}, {0: batch, 1: tokens}, {0: tokens + 1}),
        _Decoder: ({0: batch}, {0: batch, 1: tokens}),
        _Drop: ({0: batch, 1: tokens}, {0: batch}),
    }
    plain = module()
    with backend(name):
        exported = torch.export.export(plain, inputs(2, 9), dynamic_shapes=shapes[module], strict=False).module()
    for b, n in ((3, 5), (9, 17), (20, 2)):
        given = inputs(b, n)
        torch.testing.assert_close(exported(*given), plain(*given), rtol=0, atol=0)
