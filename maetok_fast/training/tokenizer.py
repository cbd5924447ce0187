# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""Stages 1 and 2 of the tokenizer, and the ablations of stage 1: one step, every part of it by configuration.

    bytes ── teachers, HOG ───────────────────────────────> targets          (frozen, low precision, no gradients)
      └─ mask ── encoder, once ── latents ─┬─ decoder ── pixels ── MSE, LPIPS, adversarial
                                           └─ auxiliary decoders ── masked losses against the targets

The losses of pixels are differentiated up to the pixels only, at a leaf that stands for the reconstruction; both
gradients are then at hand for the adaptive weight, and one backward pass goes from the pixels through the model. What
a step does not need yet (the discriminator before its start, LPIPS at weight zero) is not computed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maetok_fast.config import ConfigError
from maetok_fast.data.images import psnr, to_uint8
from maetok_fast.data.loader import Batch
from maetok_fast.layers import EMA
from maetok_fast.models import MAETok
from maetok_fast.models.auxiliary import AuxiliaryDecoders, CaptionDecoder
from maetok_fast.precision import Precision
from maetok_fast.training.adversarial import DiscriminatorTraining, adaptive_weight, last_layer_gradient
from maetok_fast.training.configs import TokenizerRun
from maetok_fast.training.loop import Measured, Network
from maetok_fast.training.masks import Masks
from maetok_fast.training.targets import Targets, caption_loss, caption_mask
from maetok_fast.training.world import World

if TYPE_CHECKING:
    from maetok_fast.training.online import Online

__all__ = ["Reconstruction", "TokenizerStage", "TokenizerTraining"]

HIGHEST_DB = 148.0  # an equal pair's part in a mean: infinity would be the mean
Examples = Callable[[], Iterator[Tensor]]  # images (B, 3, H, W) in [-1, 1] of this rank, in one order every time


class Reconstruction(NamedTuple):
    """images (B, 3, H, W) and the tokens (B, N, D) that the last layer made them of; the bottleneck's losses; what the
    auxiliary decoders predict, by target."""

    images: Tensor
    tokens: Tensor
    losses: dict[str, Tensor]
    predictions: dict[str, Tensor]


class TokenizerTraining(nn.Module):
    """A tokenizer with its auxiliary decoders: what is wrapped, sharded and called once a step."""

    def __init__(
        self,
        tokenizer: MAETok,
        auxiliary: AuxiliaryDecoders | None = None,
        caption: CaptionDecoder | None = None,
        frozen_encoder: bool = False,
    ) -> None:
        super().__init__()
        self.tokenizer, self.auxiliary, self.caption = tokenizer, auxiliary, caption
        self.frozen_encoder = frozen_encoder
        if frozen_encoder:
            for part in (tokenizer.encoder, tokenizer.quant_conv):
                part.requires_grad_(False)

    def train(self, mode: bool = True) -> TokenizerTraining:
        """A frozen encoder stays in eval mode: no drop path."""
        super().train(mode)
        if self.frozen_encoder:
            self.tokenizer.encoder.eval()
        return self

    def blocks(self) -> list[nn.Module]:
        """The transformer blocks, each with all uses of its parameters inside its own forward."""
        found: list[nn.Module] = []
        for module in self.modules():
            blocks = getattr(module, "blocks", None)
            if isinstance(blocks, nn.ModuleList):
                found += [block for block in blocks if any(p.requires_grad for p in block.parameters())]
        return found

    def forward(
        self,
        images: Tensor,
        mask: Tensor | None = None,
        kept: Tensor | None = None,
        text: tuple[Tensor, Tensor] | None = None,
    ) -> Reconstruction:
        """images (B, 3, H, W) in [-1, 1]; mask (B, N) bool; kept (B, K) of drop mode; text: ids and their mask."""
        tokenizer = self.tokenizer
        frozen = torch.no_grad() if self.frozen_encoder else contextlib.nullcontext()
        with frozen:
            latents, losses = tokenizer.latents_and_loss(images, mask, kept)
        # targets are of the encoder's patches, pixels of the decoder's
        seen, grid = (
            (images.shape[2] // patch, images.shape[3] // patch)
            for patch in (tokenizer.config.patch, tokenizer.config.out_patch)
        )
        decoder = tokenizer.decoder
        tokens = decoder.tokens(tokenizer.post_quant_conv(latents), latents, grid)
        predictions: dict[str, Tensor] = {}
        if self.training and self.auxiliary is not None:
            predictions |= self.auxiliary(latents, seen)
        if self.training and self.caption is not None and text is not None:
            predictions["caption"] = self.caption(latents, *text)
        return Reconstruction(decoder.pixels(tokens, grid), tokens, losses, predictions)


class TokenizerStage:
    """`Stage` of `maetok_fast.training.loop` for `TokenizerRun` and `DecoderRun`.

    perceptual: maetok_fast.models.perceptual.LPIPS or None; targets: None where nothing but pixels is predicted.
    examples: images for pictures, as many on every rank, of which PSNR is measured where the run has `data.validation`.
    online: what the distance of reconstructions is measured with, or None.
    """

    product = "tokenizer"

    def __init__(
        self,
        run: TokenizerRun,
        tokenizer: MAETok,
        precision: Precision,
        targets: Targets | None = None,
        perceptual: nn.Module | None = None,
        discriminator: nn.Module | None = None,
        examples: Examples | None = None,
        online: Online | None = None,
    ) -> None:
        self.examples, self.online = examples, online
        self.run, self.precision, self.targets = run, precision, targets
        self.perceptual: Any = perceptual
        self.averaged = tokenizer
        features = {} if targets is None else targets.features
        auxiliary = AuxiliaryDecoders(tokenizer.config, features, run.auxiliary.size) if features else None
        caption = None
        if targets is not None and targets.captions:
            caption = CaptionDecoder(tokenizer.config.latent_dim, size=run.auxiliary.size)
        self.model = TokenizerTraining(tokenizer, auxiliary, caption, run.frozen_encoder)
        if run.mask.mode == "drop" or not run.mask.used:
            token = tokenizer.encoder.mask_token
            if token is not None and (not run.mask.used or tokenizer.config.num_latent_tokens):
                token.requires_grad_(False)  # nothing reads it
        self.networks = [Network("tokenizer", self.model, self.model.blocks())]
        self.discriminator: DiscriminatorTraining | None = None
        if discriminator is not None:
            adversarial = run.adversarial
            self.discriminator = DiscriminatorTraining(discriminator, adversarial)
            # not sharded: it is small, and the generator's loss calls it without its own backward pass
            self.networks.append(
                Network("discriminator", self.discriminator, [], adversarial.start, adversarial.learning_rate, False)
            )
        self.saliency = None
        if run.mask.semantic:
            teachers = [] if targets is None else [name for name in targets.names if name in targets.teachers]
            if not teachers:
                raise ConfigError("mask.semantic needs a teacher: add dino to auxiliary.targets")
            self.saliency = teachers[0]

    def begin(self, world: World, ema: EMA) -> None:
        self.world = world
        self.masks = Masks(self.run.mask, self.run.loop.seed, world.device)
        if self.perceptual is not None:
            self.perceptual.to(world.device)
        if self.run.loop.compile:
            self.networks[0].called.compile()

    def backward(self, batch: Batch, step: int, part: int, parts: int) -> dict[str, Tensor]:
        """See `Stage`. Values that are not there yet (before a start step) are left out."""
        world = self.world
        count = batch.images.shape[0]
        first_image = (part * world.size + world.rank) * count  # in the step's global batch
        images = batch.images.to(torch.float32).div_(127.5).sub_(1)
        targets = {} if self.targets is None else self.targets.compute(batch.images, batch.captions)
        patch = self.averaged.config.patch
        tokens = images.shape[2] // patch * (images.shape[3] // patch)
        saliency = None if self.saliency is None else targets[self.saliency]
        drawn = self.masks.draw(step, count, tokens, first_image, saliency)
        text = None
        if self.model.caption is not None:
            text = targets["caption"], caption_mask(targets["caption"], self.masks.seed, first_image=first_image)
        with self.precision.autocast(world.device.type):
            out = self.networks[0].called(images, drawn.mask, drawn.kept, text)
        values: dict[str, Tensor] = {}
        pixel_gradient = self._pixel_gradient(images, out, step, values)
        roots, gradients = [out.images], [(pixel_gradient / parts).to(out.images.dtype)]
        if text is not None:
            out.losses["caption"] = caption_loss(out.predictions["caption"], *text)
        others = self._other_losses(out, targets, drawn.mask, values)
        if others is not None and others.requires_grad:
            roots.append(others / parts)
            gradients.append(torch.ones_like(others))
        torch.autograd.backward(roots, gradients)
        if self._adversarial(step):
            self._discriminator_backward(images, out.images.detach().float(), parts, values)
        return values

    def _adversarial(self, step: int) -> bool:
        return self.discriminator is not None and step >= self.run.adversarial.start

    def _pixel_gradient(self, images: Tensor, out: Reconstruction, step: int, values: dict[str, Tensor]) -> Tensor:
        """d (all losses of pixels) / d reconstruction (B, 3, H, W) fp32; the losses go into `values`."""
        loss, adversarial = self.run.loss, self.run.adversarial
        leaf = out.images.detach().float().requires_grad_(True)
        squared = F.mse_loss(leaf, images)
        values["reconstruction"] = squared.detach()
        nll = loss.reconstruction * squared
        rise = min(1.0, step / loss.perceptual_warmup) if loss.perceptual_warmup else 1.0
        with self.precision.autocast(self.world.device.type):
            if self.perceptual is not None and rise > 0:
                with torch.no_grad():
                    wanted = self.perceptual.features(images)
                perceptual = self.perceptual.distance(self.perceptual.features(leaf), wanted).mean()
                values["perceptual"] = perceptual.detach()
                nll = nll + loss.perceptual * rise * perceptual.float()
            (gradient,) = torch.autograd.grad(nll, leaf)
            if not self._adversarial(step):
                return gradient
            assert self.discriminator is not None
            generator = self.discriminator.generator(leaf).float()
            (towards,) = torch.autograd.grad(generator, leaf)
        values["generator"] = generator.detach()
        weight: Any = adversarial.weight
        if adversarial.adaptive:
            patch = self.averaged.config.out_patch
            tokens = out.tokens.detach()
            norms = torch.stack([last_layer_gradient(g, tokens, patch).float().norm() for g in (gradient, towards)])
            scale = adaptive_weight(*self.world.mean(norms).unbind())
            values["adaptive_weight"] = scale
            weight = weight * scale
        return gradient + weight * towards

    def _other_losses(
        self, out: Reconstruction, targets: dict[str, Any], mask: Tensor | None, values: dict[str, Tensor]
    ) -> Tensor | None:
        """The bottleneck's and the auxiliary losses, weighted and added up; None where there are none."""
        run, losses = self.run, dict(out.losses)
        weights = {"kl": run.loss.kl, "entropy": run.loss.entropy, **run.auxiliary.weights}
        if self.targets is not None:
            losses |= self.targets.losses(out.predictions, targets, mask if run.auxiliary.masked_only else None)
        values |= {name: value.detach() for name, value in losses.items()}
        parts = [weights.get(name, 1.0) * value for name, value in losses.items()]
        return torch.stack(parts).sum() if parts else None

    def _discriminator_backward(self, real: Tensor, fake: Tensor, parts: int, values: dict[str, Tensor]) -> None:
        assert self.discriminator is not None
        called = self.networks[1].called
        with self.precision.autocast(self.world.device.type):
            loss, told = called(real, fake)
        (loss / parts).backward()
        values |= told
        self.discriminator.move_lecam(self.world.mean(torch.stack([told["logits_real"], told["logits_fake"]])))

    # ---- pictures and files ----

    def picture(self) -> dict[str, Tensor]:
        for images in () if self.examples is None else self.examples():
            images = images.to(self.world.device)
            return {"originals": images, "reconstructions": self._reconstruct(images)}
        return {}

    def validate(self) -> Measured | None:
        """PSNR of the averaged model on the validation images, 8-bit pixels."""
        if self.examples is None or not self.run.data.validation:
            return None
        scores: list[float] = []
        for images in self.examples():
            results = to_uint8(self._reconstruct(images.to(self.world.device)))
            scores += [min(psnr(*pair), HIGHEST_DB) for pair in zip(to_uint8(images), results)]
        return Measured("psnr", sum(scores), len(scores))

    def measure(self) -> dict[str, float]:
        """The distance of reconstructions to the reference, and their PSNR."""
        online = self.online
        if online is None:
            return {}
        scores: list[float] = []

        def results() -> Iterator[Tensor]:
            for originals in online.originals(self.world):
                images = originals.to(self.world.device, torch.float32).div_(127.5).sub_(1)
                found = to_uint8(self._reconstruct(images))
                before = originals.permute(0, 2, 3, 1).numpy()
                scores.extend(min(psnr(*pair), HIGHEST_DB) for pair in zip(before, found))
                yield torch.from_numpy(found).permute(0, 3, 1, 2)

        distance = online.distance(results(), self.world)
        sums = torch.tensor([sum(scores), len(scores)], dtype=torch.float64, device=self.world.device)
        total, count = self.world.sum(sums).tolist()
        return {online.name: distance, "metrics_psnr": total / count}

    def _reconstruct(self, images: Tensor) -> Tensor:
        with self.precision.autocast(self.world.device.type):
            result: Tensor = self.model(images).images
        return result.float()

    def save_average(self, folder: Path, average: dict[str, Tensor]) -> None:
        """The averaged tokenizer as `MAETok.from_pretrained(folder)` reads it."""
        with torch.device("meta"):
            copy = MAETok(self.averaged.config)
        copy.load_state_dict(average, assign=True)
        copy.save_pretrained(folder)

    def load_average(self, folder: Path) -> dict[str, Tensor]:
        return dict(MAETok.from_pretrained(folder).state_dict())
