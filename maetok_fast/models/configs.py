# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""Architectures as data: ViTSize, MAETokConfig, SiTConfig, LightningDiTConfig.

Frozen, comparable, and checked when made: a configuration that exists can be built. TypeError where a value has the
wrong type, ValueError where it lies out of its range (NaN included), each naming the class and the field.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from maetok_fast.checks import check_integers, check_number, check_positive, check_ratio, height_width

__all__ = ["CONDITIONS", "LightningDiTConfig", "MAETokConfig", "SiTConfig", "ViTSize", "grid_of"]

BOTTLENECKS = ("ae", "kl", "softvq")
CONDITIONS = ("r", "beta")  # of SiTConfig.conditions, in the order in which they are added up


@dataclass(frozen=True)
class ViTSize:
    """Size of one ViT: width, number of blocks, heads and the MLP's width over the model's."""

    dim: int = 768
    depth: int = 12
    heads: int = 12
    mlp_ratio: float = 4.0

    def __post_init__(self) -> None:
        check_integers("ViTSize", dim=self.dim, depth=self.depth, heads=self.heads)
        check_ratio("ViTSize", self.dim, self.mlp_ratio)
        if min(self.dim, self.depth, self.heads) < 1 or self.dim % self.heads or (self.dim // self.heads) % 4:
            raise ValueError(
                f"ViTSize: dim {self.dim}, depth {self.depth}, heads {self.heads}: all must be positive and "
                "dim / heads a multiple of 4 (2-D RoPE gives each axis a quarter of the pairs' channels)"
            )


@dataclass(frozen=True)
class MAETokConfig:
    """Architecture of a MAETok tokenizer. The defaults are the public `maetok-b-128`: 256 px, 128 latents of width 32.

    image_size: trained resolution in pixels, int or (height, width). patch: the encoder's, decoder_patch: the decoder's
    (None: the same). num_latent_tokens: L, 0 for the image-token ablation. latent_dim: H. decoder_kind: "movqv2" or
    "plain". position: "mixed" (learned RoPE frequencies), "axial" (fixed ones) or "absolute" (learned positions in the
    decoder too). mask_token: whether the encoder can replace masked patches. latent_mean, latent_std: the scalars with
    which the public generators normalise latents, (z - mean) / std; encode() does not apply them. bottleneck: "ae"
    (MAETok's), "kl" or "softvq" (`models.bottlenecks`, for comparisons); codebook_size: of the last, 8192 if None.
    """

    image_size: int | tuple[int, int] = 256
    base_image_size: int = 256
    patch: int = 16
    decoder_patch: int | None = None
    num_latent_tokens: int = 128
    latent_dim: int = 32
    encoder: ViTSize = field(default_factory=ViTSize)
    decoder: ViTSize = field(default_factory=ViTSize)
    decoder_kind: str = "movqv2"
    decoder_cls_token: bool = False
    position: str = "mixed"
    rope_theta: float = 10.0
    mask_token: bool = True
    encoder_drop_path: float = 0.0
    decoder_drop_path: float = 0.0
    latent_mean: float = 0.0
    latent_std: float = 1.0
    bottleneck: str = "ae"
    codebook_size: int | None = None

    def __post_init__(self) -> None:
        # 256 and (256, 256) are one size and so one configuration
        height, width = height_width("MAETokConfig: image_size", self.image_size)
        object.__setattr__(self, "image_size", height if height == width else (height, width))
        check_integers(
            "MAETokConfig",
            base_image_size=self.base_image_size,
            patch=self.patch,
            decoder_patch=self.out_patch,
            num_latent_tokens=self.num_latent_tokens,
            latent_dim=self.latent_dim,
        )
        for name in ("encoder_drop_path", "decoder_drop_path"):
            check_number("MAETokConfig", name, getattr(self, name), 0, 1)
        for name in ("rope_theta", "latent_std"):
            check_number("MAETokConfig", name, getattr(self, name), 0, above=True)
        check_number("MAETokConfig", "latent_mean", self.latent_mean, -math.inf, above=True)
        for name in ("encoder", "decoder"):
            if not isinstance(getattr(self, name), ViTSize):
                raise TypeError(f"MAETokConfig: {name} must be a ViTSize, got {getattr(self, name)!r}")
        if self.decoder_kind not in ("movqv2", "plain"):
            raise ValueError(f"MAETokConfig: decoder_kind {self.decoder_kind!r} is not 'movqv2' or 'plain'")
        if self.position not in ("mixed", "axial", "absolute"):
            raise ValueError(f"MAETokConfig: position {self.position!r} is not 'mixed', 'axial' or 'absolute'")
        if self.bottleneck not in BOTTLENECKS:
            raise ValueError(f"MAETokConfig: bottleneck {self.bottleneck!r} is not one of {', '.join(BOTTLENECKS)}")
        codes = 8192 if self.codebook_size is None else self.codebook_size
        check_positive("MAETokConfig", codebook_size=codes)
        object.__setattr__(self, "codebook_size", codes if self.bottleneck == "softvq" else None)
        if self.num_latent_tokens < 0 or min(self.latent_dim, self.patch, self.out_patch) < 1:
            raise ValueError(
                f"MAETokConfig: num_latent_tokens {self.num_latent_tokens} must be >= 0, latent_dim {self.latent_dim}, "
                f"patch {self.patch} and decoder_patch {self.out_patch} >= 1"
            )
        for patch in (self.patch, self.out_patch):
            grid_of(self.size, patch, "MAETokConfig: image_size")
        if self.base_image_size < max(self.patch, self.out_patch):
            raise ValueError(
                f"MAETokConfig: base_image_size {self.base_image_size} must be at least a patch of "
                f"{max(self.patch, self.out_patch)}"
            )
        if self.num_latent_tokens == 0 and self.out_patch != self.patch:
            raise ValueError("MAETokConfig: without latent tokens the decoder's patch must equal the encoder's")

    @property
    def size(self) -> tuple[int, int]:
        """Trained (height, width) in pixels."""
        return height_width("MAETokConfig: image_size", self.image_size)

    @property
    def out_patch(self) -> int:
        return self.patch if self.decoder_patch is None else self.decoder_patch


def grid_of(size: tuple[int, int], patch: int, what: str) -> tuple[int, int]:
    """(height, width) in pixels -> (rows, columns) of patches; ValueError where the patch does not divide."""
    height, width = size
    if min(height, width) < patch or height % patch or width % patch:
        raise ValueError(f"{what} {height}x{width} must be a positive multiple of the patch {patch} in both directions")
    return height // patch, width // patch


@dataclass(frozen=True)
class SiTConfig:
    """Architecture of a SiT. The defaults are XL/1 on MAETok's 128 latents of width 32.

    tokens: L for 1-D latents, (height, width) of the latent grid for 2-D ones. patch: 1 for 1-D latents.
    qk_norm: LayerNorm over head_dim (affine, eps 1e-5) on q and k. learn_sigma: official SiT weights have 2C output
    channels of which the last C are dropped. time: "maetok" (t = 0 data) or "sit" (t = 1 data; flipped in forward).
    conditions: scalars beside t and y that the network is told: "r", the other end of a step whose average velocity it
    predicts (MeanFlow), "beta", guidance-free training's temperature. exit_depth: after so many blocks a second final
    layer predicts the velocity too (internal guidance); None: there is none. prediction: what the last layer gives:
    "v", or "x", the data, of which the linear path's velocity is (x_t - data) / max(t, 0.05) (JiT, arXiv 2511.13720).
    """

    tokens: int | tuple[int, int] = 128
    channels: int = 32
    patch: int = 1
    dim: int = 1152
    depth: int = 28
    heads: int = 16
    mlp_ratio: float = 4.0
    num_classes: int = 1000
    label_dropout: float = 0.1
    qk_norm: bool = False
    learn_sigma: bool = False
    time: str = "maetok"
    conditions: tuple[str, ...] = ()
    exit_depth: int | None = None
    prediction: str = "v"

    def __post_init__(self) -> None:
        name, tokens = type(self).__name__, self.tokens
        fields = ("channels", "patch", "dim", "depth", "heads", "num_classes")
        check_integers(name, **{field: getattr(self, field) for field in fields})
        sizes = tuple(getattr(self, field) for field in fields)
        if min(sizes) < 1 or self.dim % self.heads or self.dim % 4:
            raise ValueError(
                f"{name}: channels, patch, dim, depth, heads, num_classes = {sizes} must be positive, and dim a "
                "multiple of heads and of 4"
            )
        check_ratio(name, self.dim, self.mlp_ratio)
        probability = isinstance(self.label_dropout, (int, float)) and not isinstance(self.label_dropout, bool)
        if not probability or not 0 <= self.label_dropout <= 1:
            raise ValueError(f"{name}: label_dropout must be a probability in [0, 1], got {self.label_dropout!r}")
        if isinstance(tokens, int):
            check_positive(name, tokens=tokens)
            if self.patch != 1:
                raise ValueError(f"{name}: 1-D latents need patch 1, got {self.patch}")
        elif (
            not isinstance(tokens, tuple)
            or len(tokens) != 2
            or not all(isinstance(n, int) and not isinstance(n, bool) and n >= 1 for n in tokens)
            or any(n % self.patch for n in tokens)
        ):
            raise ValueError(
                f"{name}: the latent grid {tokens} must be a tuple (height, width), multiples of patch {self.patch}"
            )
        if self.time not in ("maetok", "sit"):
            raise ValueError(f"{name}: time {self.time!r} is not 'maetok' (t = 0 data) or 'sit' (t = 1 data)")
        if not isinstance(self.conditions, tuple) or not set(self.conditions) <= set(CONDITIONS):
            raise ValueError(f"{name}: conditions must be a tuple of {', '.join(CONDITIONS)}; got {self.conditions!r}")
        object.__setattr__(self, "conditions", tuple(c for c in CONDITIONS if c in self.conditions))
        if self.prediction not in ("v", "x"):
            raise ValueError(f"{name}: prediction {self.prediction!r} is not 'v' (the velocity) or 'x' (the data)")
        if self.prediction == "x" and "r" in self.conditions:
            raise ValueError(f"{name}: prediction 'x' is of a point, and condition 'r' asks for averages of velocities")
        if self.exit_depth is not None:
            check_integers(name, exit_depth=self.exit_depth)
            if not 1 <= self.exit_depth < self.depth:
                raise ValueError(
                    f"{name}: exit_depth {self.exit_depth} must be within 1 .. depth - 1 = {self.depth - 1}"
                )

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one latent: (L, C), or (C, height, width) on a grid."""
        return (self.tokens, self.channels) if isinstance(self.tokens, int) else (self.channels, *self.tokens)


@dataclass(frozen=True)
class LightningDiTConfig(SiTConfig):
    """Architecture of a LightningDiT; fields of SiTConfig plus switches. Defaults: XL/1 on 16x16x32 (VA-VAE f16d32),
    in the time convention of the published weights. rope becomes False on 1-D latents: they have no grid."""

    tokens: int | tuple[int, int] = (16, 16)
    rmsnorm: bool = True
    swiglu: bool = True
    rope: bool = True
    shift: bool = True
    time: str = "sit"

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.tokens, int):
            object.__setattr__(self, "rope", False)
        if self.swiglu and int(2 / 3 * int(self.dim * self.mlp_ratio)) < 1:
            raise ValueError(
                f"LightningDiTConfig: mlp_ratio {self.mlp_ratio} leaves SwiGLU no hidden width at dim {self.dim}; "
                "raise it, or use swiglu=False"
            )
        if self.rope and self.dim // self.heads % 4:
            raise ValueError(
                f"LightningDiTConfig: head_dim {self.dim // self.heads} must be divisible by 4 for 2-D RoPE"
            )
