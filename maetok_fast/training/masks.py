# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""Which patches of which image a training step hides from the encoder.

    stage 1   ratio ~ half-bell on [low, high], one for each step (MAETok, arXiv 2502.03444)   `kernels.mask_counts`
    stage 2   ratio from `high` linearly to `final` within `over` steps                        `ratio_at`
              count = ceil(ratio * N)
    which     uniformly                                                                        `kernels.random_mask`
              or the salient ones rather than others                                           `semantic_mask`

A mask is a function of the seed, the step and the image's index in the global batch: a resumed run draws the same, over
any number of ranks and on any device. Nothing waits for the device. The linear schedule is ours (the paper gives its
ends); so is `semantic_mask`, of which the idea is MacTok's: to hide what an image shows rather than its background.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from maetok_fast.checks import check_number, check_tensor
from maetok_fast.kernels import host_mask_count, mask_counts, sample_mask, sample_visible, visible_index
from maetok_fast.kernels.token_mask import _philox, _words
from maetok_fast.training.configs import MaskConfig

__all__ = ["Drawn", "Masks", "ratio_at", "semantic_mask"]


class Drawn(NamedTuple):
    """A step's masks: mask (B, N) bool, True = masked, None where nothing can be; kept (B, K) int64, in drop mode the
    places of the others, ascending."""

    mask: Tensor | None
    kept: Tensor | None


def ratio_at(step: int, start: float = 0.6, final: float = 0.0, over: int = 50_000) -> float:
    """Stage 2's mask ratio at a step: start at 0, linear, final from step `over` on. A number of the host."""
    check_number("ratio_at", "step", step, 0)
    check_number("ratio_at", "over", over, 0)
    return final if step >= over else start + (final - start) * (step / over)


class Masks:
    """The masks of a run. settings: `configs.MaskConfig`; seed: the run's; device: of the masks."""

    def __init__(self, settings: MaskConfig, seed: int, device: torch.device | str = "cpu") -> None:
        self.settings, self._seed = settings, int(seed)
        self.seed = torch.tensor([self._seed, 0], device=device)

    def range_at(self, step: int) -> tuple[float, float]:
        """Lowest and highest ratio of a step."""
        s = self.settings
        if s.over > 0:
            ratio = ratio_at(step, s.high, s.final, s.over)
            return ratio, ratio
        return s.low, s.high

    def draw(self, step: int, batch: int, tokens: int, first_image: int = 0, features: Tensor | None = None) -> Drawn:
        """The masks of a step. tokens: N; first_image: index in the global batch of this rank's first image.

        features (B, N, D): a teacher's of these images, which semantic masks need (ValueError). Calling it again for
        the same step draws the same. `self.seed` is [seed, step] on the device until the next call.
        """
        self.seed[1] = step  # a fill with a number, which waits for nothing
        low, high = self.range_at(step)
        if high == 0:
            return Drawn(None, None)
        if self.settings.semantic:
            return self._semantic(step, batch, tokens, first_image, features, low, high)
        if self.settings.mode == "replace":
            return Drawn(sample_mask(self.seed, batch, tokens, low, high, first_image), None)
        count = host_mask_count(self._seed, step, tokens, low, high)
        return Drawn(*sample_visible(self.seed, count, batch, tokens, first_image))

    def _semantic(
        self, step: int, batch: int, tokens: int, first_image: int, features: Tensor | None, low: float, high: float
    ) -> Drawn:
        if features is None:
            raise ValueError("semantic masks need a teacher's features of the images: add one to auxiliary.targets")
        check_tensor("features", features, (batch, tokens, "D"))
        counts = mask_counts(self.seed, batch, tokens, low, high, first_image)
        mask = semantic_mask(features, counts, self.seed, self.settings.temperature, first_image)
        if self.settings.mode == "replace":
            return Drawn(mask, None)
        visible = tokens - host_mask_count(self._seed, step, tokens, low, high)
        return Drawn(mask, visible_index(mask, visible))


@torch.no_grad()
def semantic_mask(
    features: Tensor, count: Tensor, seed: Tensor, temperature: float = 1.0, first_image: int = 0
) -> Tensor:
    """Masks exactly count[b] patches of image b, salient ones with the higher probability: (B, N) bool, True = masked.

        saliency   s[n] = cosine(f[n], mean over m of f[m] / |f[m]|), of an image's N brought to mean 0 and deviation 1
        masked     the `count` largest s[n] / temperature + g[n],  g ~ Gumbel(0, 1)

    which is drawing without replacement with probabilities softmax(s / temperature) (Gumbel top-k, Kool et al. 2019,
    arXiv 1903.06059). features (B, N, D) float, a teacher's; count (B,) integers on the device, beyond 0 .. N none or
    all; seed (2,) int64 [seed, step], first_image as in `kernels.random_mask`, whose random words these are: at
    temperature infinity the masks are `random_mask`'s own. temperature > 0: at small ones the most salient, always.
    """
    check_tensor("features", features, ("B", "N", "D"))
    check_tensor("count", count, (features.shape[0],))
    if not temperature > 0:
        raise ValueError(f"semantic_mask: temperature must be above 0, got {temperature}")
    unit = torch.nn.functional.normalize(features.float(), dim=-1)
    score = (unit * unit.mean(1, keepdim=True)).sum(-1)
    score = score - score.mean(1, keepdim=True)
    score = score / score.square().mean(1, keepdim=True).sqrt().clamp_min(1e-6)  # an even image has no salient patch
    ranked = score.double() / temperature + _gumbel(seed, score.shape[0], score.shape[1], first_image)
    rank = ranked.argsort(dim=1, descending=True, stable=True).argsort(1)
    return rank < count[:, None]


def _gumbel(seed: Tensor, batch: int, tokens: int, first_image: int) -> Tensor:
    """(B, N) fp64, larger where `random_mask`'s key is smaller; fp64 keeps all 32 bits of a key apart."""
    image = (first_image + torch.arange(batch, device=seed.device))[:, None] & 0xFFFFFFFF
    blocks = torch.arange(-(-tokens // 4), device=seed.device)
    words = _philox((blocks, image, *_words(seed[1])), _words(seed[0]))
    key = (torch.stack(words, -1).flatten(1)[:, :tokens].double() + 0.5) / 2**32
    return -torch.log(-torch.log1p(-key))
