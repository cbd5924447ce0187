# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""mask_counts, random_mask, visible_index: which tokens of which image are masked, drawn on the device.

    count = ceil(ratio * N),  ratio ~ truncnorm(a=(low - high) / 0.25, b=0, loc=high, scale=0.25)    one per step
    mask[b] = the `count` tokens of image b with the smallest keys,  key = 32 random bits, ties by token index

(MAETok, arXiv 2502.03444: low 0.4, high 0.6, mean 0.505.) A uniform permutation of the tokens whose first `count` are
masked is the same as the `count` smallest of N random keys: the counts are exact, and nothing is sorted.

    random words = Philox4x32-10 (Salmon et al. 2011),  key = (seed low, seed high),
    counter = (n // 4, global image, step low, step high) -> four words, for tokens 4 (n // 4) .. 4 (n // 4) + 3
              (2^32 - 1, 0, step low, step high)             -> the step's ratio; 2^32 - 2 and the image: its own ratio

Everything is integer arithmetic of the device tensor `seed` = [seed, step] and the image's index in the global batch:
one seed gives the same bits on every device and backend, for every split of the batch over ranks, and a captured CUDA
graph draws anew when the step in `seed` is advanced in place. No value ever travels to the host. The ratio's inverse
CDF too is a comparison of integers: the count is the number of thresholds F(k / N) * 2^53 below a 53-bit uniform, the
thresholds being computed once on the host in fp64. Hence `host_mask_count`, the same number from the same integers
without a device: what `drop` mode needs, whose shapes are static.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ._native_call import native
from ._op import Op
from ._record import EMPTY, Backend, Sample
from ._tiles import image_options, next_power_of_2, over_image, row_warps
from ._token_mask_triton import _mask_counts_kernel, _random_mask_kernel, _visible_index_kernel

__all__ = [
    "host_mask_count",
    "mask_counts",
    "mask_counts_ref",
    "random_mask",
    "random_mask_ref",
    "sample_mask",
    "sample_visible",
    "visible_index",
    "visible_index_ref",
]

_WORD = 0xFFFFFFFF
_STEP_RATIO, _IMAGE_RATIO = _WORD, _WORD - 1  # first counter words that no token has
_SCALE = 0.25  # standard deviation of the normal that the ratio is cut from


# ---- Philox, thresholds --------------------------------------------------------------------------------------------


def _mul(a: Any, m: int) -> tuple[Any, Any]:
    """(high, low) 32-bit words of a * m, for words in Python ints or int64 tensors: no product reaches 2^63."""
    upper, lower = a * (m >> 16), a * (m & 0xFFFF)
    return (upper + (lower >> 16)) >> 16, (((upper & 0xFFFF) << 16) + lower) & _WORD


def _philox(counter: tuple[Any, Any, Any, Any], key: tuple[Any, Any]) -> tuple[Any, Any, Any, Any]:
    """Four random words for four counter words and two key words (ints or int64 tensors that broadcast)."""
    (c0, c1, c2, c3), (k0, k1) = counter, key
    for _ in range(10):
        (high0, low0), (high1, low1) = _mul(c0, 0xD2511F53), _mul(c2, 0xCD9E8D57)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) & _WORD, (k1 + 0xBB67AE85) & _WORD
    return c0, c1, c2, c3


def _words(value: Any) -> tuple[Any, Any]:
    """(low, high) words of a 64-bit integer."""
    return value & _WORD, (value >> 32) & _WORD


def _thresholds(tokens: int, low: float, high: float) -> tuple[int, tuple[int, ...]]:
    """(base, thresholds): count = base + number of thresholds below a uniform 53-bit integer.

    The ratio is at most k / N with probability F(k / N) = 1 - erf((high - k/N) / (s sqrt 2)) / erf((high - low) /
    (s sqrt 2)); k = base, base + 1, ... are those with low < k / N < high.
    """
    if low == high or tokens == 0:  # 1e-6: a product like 0.55 * 100 = 55.000000000000007 means 55
        return min(tokens, math.ceil(low * tokens - 1e-6)), ()
    first = math.floor(low * tokens) + 1
    inner = [k for k in range(first, tokens + 1) if k / tokens < high]
    root = _SCALE * math.sqrt(2.0)
    whole = math.erf((high - low) / root)
    return first, tuple(int((1 - math.erf((high - k / tokens) / root) / whole) * 2**53) for k in inner)


# The reference calls `_thresholds` itself: torch.compile warns of caches that it traces through.
_cached_thresholds = functools.lru_cache(maxsize=256)(_thresholds)


@functools.lru_cache(maxsize=64)
def _threshold_table(tokens: int, low: float, high: float, device: torch.device) -> Tensor:
    """The thresholds on a device, copied there once (before a capture, by its warm-up)."""
    return torch.tensor(_cached_thresholds(tokens, low, high)[1], dtype=torch.int64, device=device)


def _not_negative(op: str, **sizes: int) -> None:
    for name, value in sizes.items():
        if value < 0:
            raise ValueError(f"{op}: {name} must not be negative, got {value}")


def _check_ratios(op: str, low: float, high: float) -> None:
    if not 0.0 <= low <= high <= 1.0:
        raise ValueError(f"{op}: the ratio must lie in 0 <= low <= high <= 1, got low {low}, high {high}")


def host_mask_count(
    seed: int, step: int, tokens: int, low: float = 0.4, high: float = 0.6, image: int | None = None
) -> int:
    """The count that `mask_counts` gives for `seed` = [seed, step], computed on the host from the same integers.

    image: the image's index in the global batch where each image has its own ratio; None: the step's one ratio.
    """
    _check_ratios("host_mask_count", low, high)
    _not_negative("host_mask_count", tokens=tokens, image=image or 0)
    base, thresholds = _cached_thresholds(tokens, float(low), float(high))
    domain, index = (_STEP_RATIO, 0) if image is None else (_IMAGE_RATIO, image & _WORD)
    r0, r1, _, _ = _philox((domain, index, *_words(step)), _words(seed))
    uniform = ((r0 >> 5) << 26) | (r1 >> 6)
    return base + sum(t < uniform for t in thresholds)


def mask_counts_ref(
    seed: Tensor,
    batch: int,
    tokens: int,
    low: float = 0.4,
    high: float = 0.6,
    first_image: int = 0,
    per_image: bool = False,
) -> Tensor:
    """How many tokens to mask: ceil(ratio * tokens), the ratio from the normal N(high, 0.25^2) cut to [low, high].

    seed (2,) int64 on the device: [seed, step]. low == high: that constant, without a draw; both 0: nothing is masked.
    per_image False: one ratio for the whole step, the same on every rank; True: each image its own.
    first_image: index in the global batch of this call's first image (rank * images per rank).
    Returns (batch,) int32. Raises ValueError unless 0 <= low <= high <= 1 and no integer but the seed is negative.
    MAETok (arXiv 2502.03444): 0.4 to 0.6.
    """
    base, thresholds = _thresholds(tokens, float(low), float(high))
    image = first_image + torch.arange(batch if per_image else 1, device=seed.device)
    domain, index = (_IMAGE_RATIO, image & _WORD) if per_image else (_STEP_RATIO, image * 0)
    r0, r1, _, _ = _philox((domain, index, *_words(seed[1])), _words(seed[0]))
    uniform = ((r0 >> 5) << 26) | (r1 >> 6)
    table = torch.tensor(thresholds, dtype=torch.int64, device=seed.device)
    return (base + (table < uniform[:, None]).sum(1)).int().expand(batch).contiguous()


def random_mask_ref(seed: Tensor, count: Tensor, tokens: int, first_image: int = 0) -> Tensor:
    """Masks count[b] tokens of image b, chosen uniformly: exactly that many, and independently per image and step.

    seed (2,) int64: [seed, step]; count (B,) int32 or int64, 0 .. tokens (beyond: none or all); both on the device.
    first_image: index in the global batch of this call's first image; the masks of an image depend on nothing else.
    Returns (B, tokens) bool, True = masked. Philox4x32-10 keys, see the module's docstring.
    """
    image = (first_image + torch.arange(count.shape[0], device=seed.device))[:, None] & _WORD
    blocks = torch.arange(-(-tokens // 4), device=seed.device)
    words = _philox((blocks, image, *_words(seed[1])), _words(seed[0]))
    keys = torch.stack(words, -1).flatten(1)[:, :tokens]
    rank = keys.argsort(stable=True, dim=1).argsort(1)
    return rank < count[:, None]


def visible_index_ref(mask: Tensor, visible: int) -> Tensor:
    """Indices of each image's unmasked tokens, ascending: what `gather_tokens` and `rope_attention` take in drop mode.

    mask (B, N) bool, True = masked; visible: K, how many tokens of each image are unmasked, known on the host.
    Returns (B, K) int64. It is not checked that every row has K of them (that would wait for the device): where there
    are more the last ones are left out, where there are fewer the first masked tokens follow.
    """
    return mask.byte().argsort(stable=True, dim=1)[:, :visible]


def _base(a):
    return _cached_thresholds(a.tokens, a.low, a.high)[0]


def _table(a):
    return _threshold_table(a.tokens, a.low, a.high, a.seed.device)


def _counts_forward(a, out):
    table = _table(a)
    _mask_counts_kernel[(a.batch,)](
        a.seed, table, out.count, _base(a), a.first_image, table.shape[0],
        PAD=next_power_of_2(table.shape[0]), PER_IMAGE=int(a.per_image), num_warps=row_warps(table.shape[0]),
    )  # fmt: skip


def _mask_forward(a, out):
    _random_mask_kernel[a.count.shape](a.seed, a.count, out.mask, a.tokens, a.first_image, **image_options(a.tokens))


def _visible_forward(a, out):
    batch, tokens = a.mask.shape
    _visible_index_kernel[(batch,)](a.mask, out.index, tokens, a.visible, **image_options(tokens))


def _counts_check(a):
    _check_ratios("mask_counts", a.low, a.high)
    _not_negative("mask_counts", batch=a.batch, tokens=a.tokens, first_image=a.first_image)


def _visible_check(a):
    if not 0 <= a.visible <= a.mask.shape[1]:
        raise ValueError(f"visible_index: visible must lie in 0 .. {a.mask.shape[1]}, got {a.visible}")


def _none_of(size: int) -> str | None:
    return EMPTY if size == 0 else None


Randn = Callable[..., Tensor]


def _seed_of(randn: Randn) -> Tensor:
    return (randn(2, dtype=torch.float32) * 1e12).to(torch.int64)


def _counts(label: str, real: bool = False, **arguments: Any) -> Sample:
    return Sample(label, lambda randn: {"seed": _seed_of(randn), **arguments}, real)


def _mask(label: str, batch: int, tokens: int, first_image: int = 0, real: bool = False) -> Sample:
    def make(randn: Randn) -> dict[str, Any]:
        count = (randn(batch, dtype=torch.float32).abs() * tokens * 0.6).to(torch.int64)  # some beyond tokens
        return {"seed": _seed_of(randn), "count": count, "tokens": tokens, "first_image": first_image}

    return Sample(label, make, real)


def _visible(label: str, batch: int, tokens: int, visible: int, real: bool = False) -> Sample:
    return Sample(label, lambda randn: {"mask": randn(batch, tokens) > 0, "visible": visible}, real)


mask_counts = Op(
    "mask_counts",
    ref=mask_counts_ref,
    shapes={"seed": "2"},
    check=_counts_check,
    roles={"seed": (torch.int64,)},
    outputs=("count",),
    out=lambda a, backend: (a.seed.new_empty(a.batch, dtype=torch.int32),),
    differentiable=False,
    cpu=[
        native(
            "mask_counts seed table count base first_image per_image",
            why_not=lambda a: _none_of(a.batch),
            table=_table,
            base=_base,
        )
    ],
    cuda=[Backend("triton", _counts_forward, why_not=lambda a: _none_of(a.batch) or over_image(a.tokens))],
    samples=[
        _counts("one ratio", batch=3, tokens=16),
        _counts("a ratio per image", batch=5, tokens=37, low=0.1, high=1.0, first_image=7, per_image=True),
        _counts("constant", batch=2, tokens=9, low=0.5, high=0.5),
        _counts("MAETok-B 256 px", real=True, batch=32, tokens=256),
        _counts("MAETok-B 512 px", real=True, batch=32, tokens=1024),
    ],
    flops=lambda a: 0,
)

random_mask = Op(
    "random_mask",
    ref=random_mask_ref,
    shapes={"seed": "2", "count": "B"},
    check=lambda a: _not_negative("random_mask", tokens=a.tokens, first_image=a.first_image),
    roles={"seed": (torch.int64,), "count": (torch.int32, torch.int64)},
    outputs=("mask",),
    out=lambda a, backend: (a.seed.new_empty(a.count.shape[0], a.tokens, dtype=torch.bool),),
    differentiable=False,
    cpu=[native("random_mask seed count mask first_image", why_not=lambda a: _none_of(a.tokens))],
    cuda=[Backend("triton", _mask_forward, why_not=lambda a: _none_of(a.tokens) or over_image(a.tokens))],
    samples=[
        _mask("counts differ", 5, 16),
        _mask("no power of two, later images", 3, 37, first_image=2**31),
        _mask("one token", 2, 1),
        _mask("MAETok-B 256 px", 32, 256, real=True),
        _mask("MAETok-B 512 px", 32, 1024, real=True),
        _mask("MAETok-B 1024 px", 8, 4096, real=True),
    ],
    flops=lambda a: 0,
)

visible_index = Op(
    "visible_index",
    ref=visible_index_ref,
    shapes={"mask": "B N"},
    check=_visible_check,
    roles={"mask": (torch.bool,)},
    outputs=("index",),
    out=lambda a, backend: (a.mask.new_empty(a.mask.shape[0], a.visible, dtype=torch.int64),),
    differentiable=False,
    cpu=[native("visible_index mask index", why_not=lambda a: _none_of(a.visible))],
    cuda=[Backend("triton", _visible_forward, why_not=lambda a: _none_of(a.visible) or over_image(a.mask.shape[1]))],
    samples=[
        _visible("half", 3, 16, 7),
        _visible("all, no power of two", 2, 21, 21),
        _visible("one", 4, 5, 1),
        _visible("MAETok-B 256 px", 32, 256, 128, real=True),
        _visible("MAETok-B 512 px", 32, 1024, 512, real=True),
    ],
    flops=lambda a: 0,
)


# ---- what a training loop calls ------------------------------------------------------------------------------------


def sample_mask(
    seed: Tensor,
    batch: int,
    tokens: int,
    low: float = 0.4,
    high: float = 0.6,
    first_image: int = 0,
    per_image: bool = False,
) -> Tensor:
    """A step's masks (batch, tokens) bool for replace mode: `random_mask` of `mask_counts`, nothing leaves the device.

    seed (2,) int64 on the device: [seed, step]; advance it in place, `seed[1] += 1`, also between replays of a CUDA
    graph. The other arguments as in `mask_counts`.
    """
    return random_mask(seed, mask_counts(seed, batch, tokens, low, high, first_image, per_image), tokens, first_image)


def sample_visible(
    seed: Tensor, count: int | Sequence[int], batch: int, tokens: int, first_image: int = 0
) -> tuple[Tensor, Tensor]:
    """A step's masks (batch, tokens) bool and indices of visible tokens (batch, tokens - count) int64 for drop mode.

    count: masked tokens per image, on the host, because the shapes depend on it: `host_mask_count(seed, step, tokens)`
    gives the number that `mask_counts` would draw, without a word from the device. Counts that differ between images
    are refused: a batch is one tensor; replace mode takes them.
    """
    if not isinstance(count, (int, Sequence)):
        given = "a tensor" if isinstance(count, Tensor) else type(count).__name__
        raise TypeError(f"sample_visible: count must be an int on the host, got {given}; use host_mask_count(...)")
    counts = {count} if isinstance(count, int) else set(count)
    if len(counts) != 1:
        raise ValueError(
            f"sample_visible: drop mode needs one count for all images of a batch, got {sorted(counts)}; draw one "
            "ratio per step, or use replace mode, which takes a count per image"
        )
    (masked,) = counts
    _not_negative("sample_visible", batch=batch, tokens=tokens)
    if not 0 <= masked <= tokens:
        raise ValueError(f"sample_visible: count must lie in 0 .. {tokens}, got {masked}")
    per_image = torch.full((batch,), masked, dtype=torch.int32, device=seed.device)
    mask = random_mask(seed, per_image, tokens, first_image)
    return mask, visible_index(mask, tokens - masked)
