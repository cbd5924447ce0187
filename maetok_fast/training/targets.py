# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""What the auxiliary decoders predict, and by which loss; MAETok's are "hog", "dino" and "clip" (arXiv 2502.03444).

    target           from the images or captions                 predicted by               loss on masked places
    hog              kernels.hog, (B, N, 108) fp32               AuxiliaryDecoders          mean of (x - y)^2 over 108
                     cells of half a patch
    dino, clip, ...  a frozen Teacher's features (B, N, D)       AuxiliaryDecoders          1 - cosine(x, y)
    caption          BPE numbers (B, 77) int64 of CLIP's         CaptionDecoder             cross-entropy, in nats
                     tokenizer, whose vocabulary open_clip has

Each loss is sum(loss * mask) / sum(mask), mask True where the encoder saw nothing (at a caption: where the decoder saw
nothing), computed in fp32 under autocast too; no value travels to the host. "Masked negative cosine" has its gradient
whatever constant stands before it: with 1 it lies in 0 .. 2, and a log that shows -cosine is lower by 1. The caption's
mask, rate and loss are ours: the paper says only that text can be a target.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from maetok_fast.checks import check_positive, check_tensor
from maetok_fast.kernels import sample_mask
from maetok_fast.layers import HOG
from maetok_fast.models.auxiliary import CAPTION_TOKENS, VOCABULARY
from maetok_fast.precision import AUTO
from maetok_fast.training.teachers import PATCH, Teacher

__all__ = [
    "CAPTION_TOKENS",
    "VOCABULARY",
    "Targets",
    "caption_loss",
    "caption_mask",
    "caption_words",
    "cosine_loss",
    "encode_captions",
    "hog_loss",
    "masked_mean",
]

_CAPTION, _HOG = "caption", "hog"
_START, _END = VOCABULARY - 2, VOCABULARY - 1
# Captions and images of one seed would share their random words: the captions' seed has these bits turned.
_CAPTION_STREAM = 0x0C4A_971D_0B5E_77ED


# ---- losses --------------------------------------------------------------------------------------------------------


def masked_mean(loss: Tensor, mask: Tensor | None = None) -> Tensor:
    """sum(loss * mask) / sum(mask) as a scalar, fp32 at least; 0 where nothing is masked, the mean where mask is None.

    loss (B, N) float; mask (B, N) bool, True = counted. What is not counted may be anything, NaN too.
    """
    loss = _wide(loss)
    if mask is None:
        return loss.mean()
    check_tensor("mask", mask, tuple(loss.shape))
    # the count as an integer: fp32 would stop at 2^24
    return torch.where(mask, loss, 0.0).sum() / mask.sum().clamp_min(1)


def hog_loss(prediction: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
    """The squared error of (B, N, 108), meaned over the 108, then over masked patches (B, N): scalar fp32."""
    return masked_mean((_wide(prediction) - _wide(target)).square().mean(-1), mask)


def cosine_loss(prediction: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
    """1 - cosine of (B, N, D) and (B, N, D), meaned over masked patches (B, N): scalar fp32, 0 .. 2."""
    return masked_mean(1 - F.cosine_similarity(_wide(prediction), _wide(target), dim=-1), mask)


def caption_loss(logits: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
    """Cross-entropy in nats of logits (B, T, V) for the tokens ids (B, T) int64, meaned over mask (B, T) as
    `caption_mask` draws it, which leaves padding out: scalar fp32."""
    check_tensor("ids", ids, tuple(logits.shape[:2]))
    nats = F.cross_entropy(_wide(logits).flatten(0, 1), ids.flatten(), reduction="none")
    return masked_mean(nats.view_as(ids), mask)


def _wide(x: Tensor) -> Tensor:
    """fp32 at least. autocast lowers none of what the losses do with it: it has no products."""
    return x.to(torch.promote_types(torch.float32, x.dtype))


# ---- captions ------------------------------------------------------------------------------------------------------


def encode_captions(captions: Sequence[str | None]) -> Tensor:
    """Captions as (B, 77) int64: start, byte pairs of the lower-cased text, end, zeros; longer ones are cut, the end is
    kept. None is a caption without words. ImportError without open_clip, TypeError for what is no text."""
    for at, caption in enumerate(captions):
        if not isinstance(caption, (str, type(None))):
            raise TypeError(f"captions: expected text, got {type(caption).__name__} at {at}")
    tokens: Tensor = _tokenizer()([caption or "" for caption in captions])
    return tokens


@functools.cache
def _tokenizer() -> Any:
    try:
        from open_clip.tokenizer import SimpleTokenizer
    except ImportError as error:
        raise ImportError("captions are encoded by open_clip's tokenizer: pip install open_clip_torch") from error
    return SimpleTokenizer(context_length=CAPTION_TOKENS)


def caption_words(ids: Tensor) -> Tensor:
    """ids (B, T) int64 of `encode_captions` -> (B, T) bool: between start and end. 0 is padding behind the end, and an
    exclamation mark before it."""
    end = (ids == _END).byte().argmax(1, keepdim=True)
    at = torch.arange(ids.shape[1], device=ids.device)
    return (at < end) & (ids != _START)


def caption_mask(ids: Tensor, seed: Tensor, low: float = 0.4, high: float = 0.6, first_image: int = 0) -> Tensor:
    """Which tokens of captions ids (B, T) are to be predicted: (B, T) bool, a share of their words.

    seed (2,) int64 [seed, step] on the device, the images' own; low, high: the share's half-bell as in
    `kernels.mask_counts`, of the T places, so that of a caption's words it holds on average; first_image as there.
    """
    apart = torch.stack([seed[0] ^ _CAPTION_STREAM, seed[1]])
    return sample_mask(apart, ids.shape[0], ids.shape[1], low, high, first_image) & caption_words(ids)


# ---- all of a run --------------------------------------------------------------------------------------------------


class Targets:
    """A run's auxiliary targets: what the decoders predict of a batch, and the losses.

        targets = Targets.create(("hog", "dino"), weights={"dino": "hub"}, image_size=256, device="cuda")
        decoders = AuxiliaryDecoders(config, targets.features)
        losses = targets.losses(decoders(latents, grid), targets.compute(images), mask)

    features: patch target -> its width, in order; captions: whether "caption" is among the targets (its decoder takes
    numbers of a vocabulary of `VOCABULARY`, and its loss is `caption_loss`). A plain object: no state dict holds it.
    """

    def __init__(
        self, names: Sequence[str], teachers: Mapping[str, Teacher] | None = None, *, patch: int = PATCH
    ) -> None:
        """teachers: by target, of those names that are not "hog" and "caption"; patch: pixels a side of a token."""
        check_positive("Targets", patch=patch)
        # 16 px: MAETok's four cells of 8; a patch that has no halves of 2 pixels and more is one cell
        cell = patch // 2 if patch % 2 == 0 and patch >= 4 else patch
        self.hog = HOG(patch, cell)
        self.teachers = dict(teachers or {})
        self.names = tuple(names)
        self.captions = _CAPTION in self.names
        self.features: dict[str, int] = {}
        for name in self.names:
            if self.names.count(name) > 1:
                raise ValueError(f"targets: {name} is named twice")
            if name not in (_HOG, _CAPTION) and name not in self.teachers:
                raise ValueError(f"targets: {name} needs a teacher; give teachers={{{name!r}: Teacher.create(...)}}")
            if name != _CAPTION:
                self.features[name] = self.hog.features if name == _HOG else self.teachers[name].features

    @classmethod
    def create(
        cls,
        names: Sequence[str],
        *,
        weights: Mapping[str, str | os.PathLike[str]] | None = None,
        image_size: int,
        patch: int = PATCH,
        precision: str = AUTO,
        statistics: str = "own",
        device: torch.device | str = "cpu",
        compile: bool = False,
    ) -> Targets:
        """With the teachers that the names need. weights: name -> "hub" (where not named), a file, or "random"; the
        rest as `Teacher.create` has it. ValueError for weights of no teacher among the names."""
        given = dict(weights or {})
        needed = [name for name in names if name not in (_HOG, _CAPTION)]
        for name in given:
            if name not in needed:
                raise ValueError(f"targets: weights are given for {name}, which is no teacher of this run")
        teachers = {
            name: Teacher.create(
                name,
                weights=given.get(name, "hub"),
                image_size=image_size,
                patch=patch,
                precision=precision,
                device=device,
                statistics=statistics,
                compile=compile,
            )
            for name in needed
        }
        return cls(names, teachers, patch=patch)

    @torch.no_grad()
    def compute(self, images: Tensor, captions: Sequence[str | None] | None = None) -> dict[str, Tensor]:
        """images (B, 3, H, W), uint8 (better for "hog") or float in [-1, 1] -> a target by name: "hog" (B, N, 108)
        fp32, a teacher's (B, N, D) of its dtype, "caption" (B, 77) int64. ValueError where captions are wanted and
        there are none, or not one for each image."""
        made: dict[str, Tensor] = {}
        for name in self.names:
            if name == _HOG:
                made[name] = self.hog(images)
            elif name == _CAPTION:
                made[name] = self._encoded(captions, images)
            else:
                made[name] = self.teachers[name](images)
        return made

    def _encoded(self, captions: Sequence[str | None] | None, images: Tensor) -> Tensor:
        if captions is None or len(captions) != len(images):
            got = "none" if captions is None else len(captions)
            raise ValueError(
                f"targets: caption needs one for each of the {len(images)} images, got {got}; "
                "give data with captions, or leave the target out"
            )
        ids = encode_captions(captions)
        if images.device.type == "cuda":
            ids = ids.pin_memory()  # from pageable memory the copy would wait for the device
        return ids.to(images.device, non_blocking=True)

    def losses(
        self, predictions: Mapping[str, Tensor], targets: Mapping[str, Tensor], mask: Tensor | None
    ) -> dict[str, Tensor]:
        """The losses of patch targets by name, scalars in fp32, not weighted. predictions: of `AuxiliaryDecoders`;
        targets: of `compute`; mask (B, N) bool, or None: every patch counts."""
        found = {}
        for name, width in self.features.items():
            check_tensor(f"the prediction of {name}", predictions[name], (*targets[name].shape[:2], width))
            found[name] = (hog_loss if name == _HOG else cosine_loss)(predictions[name], targets[name], mask)
        return found

    def __repr__(self) -> str:
        parts = [repr(self.teachers[name]) if name in self.teachers else name for name in self.names]
        return f"Targets({', '.join(parts)})"
