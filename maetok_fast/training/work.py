# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""What each stage asks of a device, counted on meta tensors: FLOPs, shapes of parameters, numbers that are kept.

    generator("sit_xl")   stage 3: a SiT on 128 latents
    tokenizer()           stage 1 at 256 px: MAETok-B, auxiliary decoders, teachers, LPIPS, discriminator
    encoder()             its latents for a cache

Frozen networks whose packages may be missing, and what only a real backward pass shows, are constants here, which
tests/test_work.py counts again.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn

from maetok_fast.training.flops import count_flops, model_flops, module_flops

__all__ = ["GENERATORS", "Weight", "Work", "encoder", "generator", "shapes", "tokenizer"]

GENERATORS = ("sit_xl", "sit_l")
# numbers that a transformer block keeps for its backward pass, a token and unit of width: (fp32, precision's dtype).
# The stream is fp32 under autocast. Without loop.recompute the outputs of two norms and of a GELU, 6 more, are kept too
KEPT, AGAIN = (1, 10), 6
# bytes a pixel that LPIPS keeps of both images: numbers in the precision's dtype, and in any case (indices of maxima)
LPIPS_KEPT = (425, 265)
# FLOPs an image of the DINO discriminator's part of a step: the generator's loss, its own on weak and strong views
ADVERSARIAL = 22_745_118_720 + 67_461_304_320
# of an image of 256 px, `flops.teacher_flops`: kept here so that no timm is needed. (FLOPs, parameters)
TEACHERS_AT_256 = {"dino": (162_118_336_512, 303_412_224), "clip": (219_074_789_376, 412_649_712)}
_TARGETS = {"hog": 108, "dino": 1024, "clip": 1152}  # width of a target
TRUNK, HEADS = 21_664_896, 7_386_245  # parameters of the DINO discriminator: its frozen ViT-S, what it trains


class Weight(NamedTuple):
    """A parameter of rows x width numbers, rows being its first dimension, which FSDP cuts. block: FSDP gathers the
    parameters of a block together; 0: the root's."""

    rows: int
    width: int
    trained: bool
    block: int

    def padded(self, world: int) -> int:
        """Numbers of it as FSDP2 moves and holds it: rows are filled up to a multiple of the ranks."""
        return math.ceil(self.rows / world) * world * self.width


@dataclass(frozen=True)
class Work:
    """What a stage asks of a device, counted.

    flops: of an image. weights: of the network that FSDP may shard. averaged: numbers of the average, 0 for no training
    at all. replicated: trained numbers that every rank holds (the discriminator). frozen: bytes of frozen networks.
    width: tokens times width over all blocks, of an image. pixels: of an image that LPIPS looks at. latent: numbers of
    an image's latent. images: whether JPEGs are read (else latents). batch: images of a step on 8 devices in the
    recipe; steps: of its run; checkpoint_every: steps.
    """

    name: str
    flops: float
    weights: tuple[Weight, ...]
    averaged: int
    width: int
    latent: int
    images: bool
    batch: int
    checkpoint_every: int
    steps: int
    replicated: int = 0
    frozen: int = 0
    pixels: int = 0

    @property
    def trained(self) -> int:
        return sum(w.rows * w.width for w in self.weights if w.trained)

    @property
    def parameters(self) -> int:
        return sum(w.rows * w.width for w in self.weights)


def shapes(module: nn.Module, blocks: list[nn.Module]) -> tuple[Weight, ...]:
    """The parameters of a module whose blocks `World.wrap` shards one by one."""
    owner = {id(p): i + 1 for i, block in enumerate(blocks) for p in block.parameters()}
    return tuple(
        Weight(p.shape[0], p[0].numel(), p.requires_grad, owner.get(id(p), 0)) for p in module.parameters() if p.ndim
    )


@functools.cache
def generator(run: str = "sit_xl") -> Work:
    """Stage 3 of a run by its name (`runs.RUNS`), one of `GENERATORS`. ValueError for another."""
    from maetok_fast.models import SiT
    from maetok_fast.training.runs import RUNS

    if run not in GENERATORS:
        raise ValueError(f"scale: there is no generator {run!r} to count; take one of {', '.join(GENERATORS)}")
    config: Any = RUNS[run]()
    with torch.device("meta"):
        model = SiT(config.model)
        x, one = torch.empty(1, config.model.tokens, config.model.channels), torch.empty(1)
        flops = module_flops(model, lambda twin: twin(x, one, torch.empty(1, dtype=torch.int64)))
    return Work(
        name=run,
        flops=flops,
        weights=shapes(model, list(model.blocks)),
        averaged=sum(p.numel() for p in model.parameters()),
        width=config.model.tokens * config.model.dim * config.model.depth,
        latent=x.numel(),
        images=False,
        batch=config.loop.batch,
        checkpoint_every=config.loop.checkpoint_every,
        steps=config.loop.steps,
    )


@functools.cache
def tokenizer() -> Work:
    """Stage 1 as `tokenizer_256` has it, past the discriminator's first step: HOG, DINOv2-L, SigLIP, LPIPS, DINO
    discriminator."""
    from maetok_fast.models import MAETok
    from maetok_fast.models.auxiliary import AuxiliaryDecoders
    from maetok_fast.models.perceptual import LPIPS
    from maetok_fast.training.runs import RUNS
    from maetok_fast.training.tokenizer import TokenizerTraining

    config: Any = RUNS["tokenizer_256"]()
    size, model, small = max(config.model.size), config.model, config.auxiliary.size
    with torch.device("meta"):
        whole = TokenizerTraining(MAETok(model), AuxiliaryDecoders(model, _TARGETS, small))
        lpips, leaf = LPIPS("random", "random"), torch.empty(1, 3, size, size, requires_grad=True)

    def perceptual() -> None:
        with torch.no_grad():
            wanted = lpips.features(torch.empty_like(leaf))
        torch.autograd.grad(lpips.distance(lpips.features(leaf), wanted).mean(), leaf)

    flops = (
        model_flops(whole, size) + count_flops(perceptual) + ADVERSARIAL + sum(f for f, _ in TEACHERS_AT_256.values())
    )
    tokens, latents = (size // model.patch) ** 2, model.num_latent_tokens
    width = (1 + tokens + latents) * model.encoder.dim * model.encoder.depth
    width += (tokens + latents) * (model.decoder.dim * model.decoder.depth + len(_TARGETS) * small.dim * small.depth)
    vgg = sum(p.numel() for p in lpips.parameters())
    return Work(
        name="tokenizer_256",
        flops=flops,
        weights=shapes(whole, whole.blocks()),
        averaged=sum(p.numel() for p in whole.tokenizer.parameters()),
        width=width,
        latent=latents * model.latent_dim,
        images=True,
        batch=config.loop.batch,
        checkpoint_every=config.loop.checkpoint_every,
        steps=config.loop.steps,
        replicated=HEADS,
        # teachers in bf16; VGG and the trunk in fp32 with autocast's copy
        frozen=2 * sum(n for _, n in TEACHERS_AT_256.values()) + 6 * (vgg + TRUNK),
        pixels=size**2,
    )


@functools.cache
def encoder(flips: bool = True) -> Work:
    """`maetok-fast cache-latents` by that tokenizer: the encoder's forward over each image and, with flips, its mirror
    image, eight images at a time."""
    from maetok_fast.models import MAETok
    from maetok_fast.training.runs import RUNS

    config: Any = RUNS["tokenizer_256"]()
    size = max(config.model.size)
    with torch.device("meta"), torch.no_grad():
        model = MAETok(config.model)
        flops = count_flops(lambda: model.encode(torch.empty(1, 3, size, size)))
    return Work(
        name="cache_latents",
        flops=flops * (1 + flips),
        weights=shapes(model, []),
        averaged=0,
        width=0,
        latent=config.model.num_latent_tokens * config.model.latent_dim,
        images=True,
        batch=64,
        checkpoint_every=0,
        steps=0,
    )
