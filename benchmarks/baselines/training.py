# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""Stage 1 of MAETok's training in plain PyTorch, one step the way public code runs it.

    masks (numpy) ─┬─ encoder ── decoder ── pixels ── MSE, LPIPS, adversarial ─┐
                   └─ encoder again ── 3 auxiliary decoders ── masked losses ──┴─ backward ── clip, AdamW, EMA
    HOG, DINOv2-L, SigLIP so400m, all in fp32 ── targets ──┘                       └─ discriminator, the same

What an engine could spare is done: the encoder runs twice, the discriminator and the adaptive weight are computed while
their weight is zero, the average follows the frozen teachers too, every loss travels to the host. What costs a user of
public code nothing is not charged: attention is torch's fused kernel, images come as floats, there is no drop path, the
learning rate is constant, and both runs of the encoder share their mask. Weights are random. Facts: arXiv 2502.03444
and its public code; HOG as in MaskFeat (2112.09133), LeCAM 2104.03310.
"""

from __future__ import annotations

import copy
import math
import warnings
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks._parts import Parts
from benchmarks.baselines.discriminator import DinoDiscriminator, augment, normalised, timm_vit
from benchmarks.baselines.maetok import Decoder, Encoder, MAETok, rotations


class Scale(NamedTuple):
    """(dim, depth, heads) of both halves and of the auxiliary decoders; timm's names of the teachers; what differs
    from ViT-S/16 in the discriminator's trunk, and the pixels that it sees."""

    vit: tuple[int, int, int]
    auxiliary: tuple[int, int, int]
    teachers: dict[str, str]
    trunk: dict[str, Any]
    trunk_size: int


SCALES = {
    "real": Scale(
        (768, 12, 12),
        (192, 3, 3),
        {"dino": "vit_large_patch14_dinov2.lvd142m", "clip": "vit_so400m_patch14_siglip_gap_224.webli"},
        {},
        224,
    ),
    "small": Scale(
        (64, 2, 4),
        (32, 1, 2),
        {"dino": "test_vit", "clip": "test_vit2"},
        {"embed_dim": 32, "depth": 4, "num_heads": 2},
        64,
    ),
}


# ---- masks and targets ---------------------------------------------------------------------------------------------


def host_masks(batch: int, tokens: int, rng: np.random.Generator, low: float = 0.4, high: float = 0.6) -> Tensor:
    """(B, N) bool, True = masked: one ratio of a half-bell on [low, high], ceil(ratio * N) patches of each image."""
    from scipy.stats import truncnorm

    ratio = float(truncnorm.rvs((low - high) / 0.25, 0.0, loc=high, scale=0.25, random_state=rng))
    rows = []
    for _ in range(batch):
        row = np.zeros(tokens, dtype=bool)
        row[rng.permutation(tokens)[: math.ceil(ratio * tokens)]] = True
        rows.append(row)
    return torch.from_numpy(np.stack(rows))


class HOG(nn.Module):
    """Images (B, 3, H, W) -> (B, N, 108), by way of a (B, 3, 9, H, W) histogram in memory."""

    def __init__(self) -> None:
        super().__init__()
        sobel = torch.tensor([[1.0, 0.0, -1.0], [2.0, 0.0, -2.0], [1.0, 0.0, -1.0]])
        self.register_buffer("wx", sobel.expand(3, 1, 3, 3).contiguous(), persistent=False)
        self.register_buffer("wy", sobel.T.expand(3, 1, 3, 3).contiguous(), persistent=False)
        bell = torch.exp(-0.5 * ((torch.arange(16) - 7.5) / 8) ** 2)
        window = bell[:, None] * bell
        self.register_buffer("window", window / window.sum(), persistent=False)

    wx: Tensor
    wy: Tensor
    window: Tensor

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        batch, _, height, width = images.shape
        x = F.pad(images, (1, 1, 1, 1), mode="reflect")
        gx, gy = F.conv2d(x, self.wx, groups=3), F.conv2d(x, self.wy, groups=3)
        magnitude = torch.stack([gx, gy], dim=-1).norm(dim=-1) * self.window.repeat(height // 16, width // 16)
        bins = (torch.atan2(gx, gy) / math.pi * 9).floor().long() % 9
        histogram = images.new_zeros(batch, 3, 9, height, width)
        histogram.scatter_add_(2, bins.unsqueeze(2), magnitude.unsqueeze(2))
        cells = F.normalize(histogram.unfold(3, 8, 8).unfold(4, 8, 8).sum((-1, -2)), dim=2)
        patches = cells.reshape(batch, 27, height // 16, 2, width // 16, 2)
        return patches.permute(0, 2, 4, 1, 3, 5).reshape(batch, -1, 108)


# ---- the model -----------------------------------------------------------------------------------------------------


class MaskedEncoder(Encoder):
    """The encoder with a mask token in the place of masked patches."""

    def __init__(self, size: int, latents: int, dim: int, depth: int, heads: int, patch: int) -> None:
        super().__init__(size, latents, dim, depth, heads, patch)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, dim))

    def forward(self, images: Tensor, mask: Tensor | None = None) -> Tensor:
        x = self.model.patch_embed(images)
        if mask is not None:
            x = torch.where(mask[..., None], self.mask_token.to(x.dtype), x)
        x = torch.cat([self.model.cls_token.expand(len(x), -1, -1), x], dim=1) + self.model.pos_embed
        x = torch.cat([x, (self.latent_tokens + self.latent_pos_embed).expand(len(x), -1, -1)], dim=1)
        rotation = rotations(self.freqs, self.heads, images.shape[-2] // 16, images.shape[-1] // 16)
        return self.model(x, rotation, 1)[:, -self.latent_tokens.shape[1] :]


class AsTokens(nn.Module):
    """In the place of a decoder's last layer."""

    def forward(self, x: Tensor, rows: int, columns: int) -> Tensor:
        return x


class TrainedMAETok(MAETok):
    """The tokenizer, its auxiliary decoders and their teachers, one module as in public code. Names of its files."""

    def __init__(self, size: int, scale: Scale) -> None:
        dim, depth, heads = scale.vit
        super().__init__(size, 128, 32, dim, depth, heads)
        self.encoder = MaskedEncoder(size, 128, dim, depth, heads, 16)
        self.teachers = nn.ModuleDict({name: timm_vit(model, size) for name, model in scale.teachers.items()})
        self.hog = HOG()
        self.features = {"hog": 108, **{name: teacher.num_features for name, teacher in self.teachers.items()}}
        for name, width in self.features.items():
            decoder = Decoder(size, 128, 32, *scale.auxiliary, 16, True, False)
            decoder.to_pixel = AsTokens()
            self.add_module(f"decoder_{name}", decoder)
            self.add_module(f"post_quant_conv_{name}", nn.Linear(32, scale.auxiliary[0]))
            self.add_module(f"to_pixel_{name}", nn.Linear(scale.auxiliary[0], width))
        for key, p in self.named_parameters():  # tokens, positions and frequencies, which are all zeros so far
            if p.requires_grad and not p.any() and not key.endswith("bias"):
                nn.init.normal_(p, std=0.02)

    def reconstruct(self, images: Tensor, mask: Tensor) -> Tensor:
        return self.decode(self.quant_conv(self.encoder(images, mask)))

    def predict(self, images: Tensor, mask: Tensor) -> dict[str, Tensor]:
        """The auxiliary decoders' answers (B, N, features), of latents encoded anew."""
        latents, found = self.quant_conv(self.encoder(images, mask)), {}
        for name in self.features:
            tokens = getattr(self, f"post_quant_conv_{name}")(latents)
            found[name] = getattr(self, f"to_pixel_{name}")(getattr(self, f"decoder_{name}")(tokens, latents))
        return found

    @torch.no_grad()
    def targets(self, images: Tensor) -> dict[str, Tensor]:
        found = {"hog": self.hog(images)}
        for name, teacher in self.teachers.items():
            found[name] = teacher.forward_features(normalised(images))[:, teacher.num_prefix_tokens :]
        return found


# ---- losses --------------------------------------------------------------------------------------------------------


def auxiliary_losses(predictions: dict[str, Tensor], targets: dict[str, Tensor], mask: Tensor) -> dict[str, Tensor]:
    """sum(loss * mask) / sum(mask): the squared error of HOG, the negative cosine of features (from -1)."""
    losses = {}
    for name, predicted in predictions.items():
        predicted, wanted = predicted.float(), targets[name].float()
        if name == "hog":
            each = (predicted - wanted).pow(2).mean(-1)
        else:
            each = -(F.normalize(predicted, dim=-1) * F.normalize(wanted, dim=-1)).sum(-1)
        losses[name] = (each * mask).sum() / mask.sum()
    return losses


class PublicStep:
    """One optimizer step of both networks: `step(images (B, 3, H, W) float in [-1, 1])` -> its losses, on the host.

    image_size: pixels, a multiple of 16. scale: "real", or "small" for tests. dtype: torch.float32, or the 16-bit one
    that autocast computes the student, LPIPS and the discriminator in; the teachers stay in fp32. discriminator_start:
    the step from which its loss and its own count. `step`: the next step's number. timings: seconds of the last one by
    part, of `PARTS`; the generator's loss and the adaptive weight belong to the discriminator.
    """

    def __init__(
        self,
        image_size: int = 256,
        scale: str = "real",
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
        discriminator_start: int = 30_000,
        device: torch.device | str = "cpu",
    ) -> None:
        import lpips

        torch.manual_seed(seed)
        self.device, self.dtype, self.start = torch.device(device), dtype, discriminator_start
        self.rng = np.random.default_rng(seed)
        sizes = SCALES[scale]
        self.model = TrainedMAETok(image_size, sizes).to(self.device)
        self.discriminator = DinoDiscriminator(sizes.trunk_size, **sizes.trunk).to(self.device)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the package calls torchvision in a deprecated way
            self.lpips = lpips.LPIPS(net="vgg", pnet_rand=True, verbose=False).to(self.device)
        self.lpips.eval().requires_grad_(False)
        self.ema = copy.deepcopy(self.model).requires_grad_(False)
        self.optimizers = [
            torch.optim.AdamW(network.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=1e-4)
            for network in (self.model, self.discriminator)
        ]
        self.step = 0
        self.lecam = torch.zeros(2, device=self.device)  # average logits of real and fake images
        self.timings: dict[str, float] = {}

    def __call__(self, images: Tensor) -> dict[str, float]:
        parts = Parts(self.device)
        started = float(self.step >= self.start)
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            losses, fake, total = self._generator_losses(images, parts, 0.4 * started)
        with parts("backward"):
            total.backward()
        with parts("optimizer"):
            self._update(0)
        with parts("EMA"), torch.no_grad():
            average = dict(self.ema.named_parameters())
            for name, p in self.model.named_parameters():
                average[name].mul_(0.9999).add_(p, alpha=1 - 0.9999)
        with parts("discriminator"):
            self.optimizers[1].zero_grad()  # what the generator's loss left there
            with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
                own, parts_of_it = self._discriminator_loss(images, fake.detach())
            (own * started).backward()
        with parts("optimizer"):
            self._update(1)
        self.step += 1
        values = {name: value.item() for name, value in (losses | parts_of_it).items()}
        self.timings = parts.seconds
        return values

    def _generator_losses(
        self, images: Tensor, parts: Parts, weight: float
    ) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        """(the losses by name, the reconstruction, what is differentiated)."""
        with parts("forward"):
            mask = host_masks(len(images), (images.shape[-1] // 16) ** 2, self.rng).to(self.device)
            fake = self.model.reconstruct(images, mask)
            predictions = self.model.predict(images, mask)
        with parts("targets"), torch.autocast(self.device.type, enabled=False):
            targets = self.model.targets(images)
        with parts("losses"):
            losses = {
                "reconstruction": F.mse_loss(fake.float(), images),
                "perceptual": self.lpips(images, fake).mean(),
                **auxiliary_losses(predictions, targets, mask),
            }
            nll = losses["reconstruction"] + min(1.0, self.step / 10_000) * losses["perceptual"]
        with parts("discriminator"):
            generator = -self.discriminator(augment(fake, 0.5, 0.2)).mean()
            last = self.model.decoder.to_pixel.model.weight
            norms = [torch.autograd.grad(loss, last, retain_graph=True)[0].norm() for loss in (nll, generator)]
            adaptive = (norms[0] / (norms[1] + 1e-4)).clamp(0.0, 1e4).detach()
        total = nll + weight * adaptive * generator + torch.stack([losses[n] for n in predictions]).sum()
        return losses | {"generator": generator, "adaptive_weight": adaptive}, fake, total

    def _discriminator_loss(self, real: Tensor, fake: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """(hinge + LeCAM + consistency of weak and strong augmentation, its parts)."""
        weak = [self.discriminator(augment(x, 0.5, 0.2)).float() for x in (real, fake)]
        strong = [self.discriminator(augment(x, 1.0, 0.5)).float() for x in (real, fake)]
        hinge = 0.5 * (F.relu(1 - weak[0]).mean() + F.relu(1 + weak[1]).mean())
        self.lecam = self.lecam * 0.999 + torch.stack([x.detach().mean() for x in weak]) * 0.001
        lecam = F.relu(weak[0] - self.lecam[1]).pow(2).mean() + F.relu(self.lecam[0] - weak[1]).pow(2).mean()
        consistency = F.mse_loss(strong[0], weak[0]) + F.mse_loss(strong[1], weak[1])
        loss = hinge + 1e-3 * lecam + 4.0 * consistency
        return loss, {"discriminator": hinge, "lecam": lecam, "consistency": consistency}

    def _update(self, which: int) -> None:
        network: nn.Module = (self.model, self.discriminator)[which]
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        self.optimizers[which].step()
        self.optimizers[which].zero_grad()
