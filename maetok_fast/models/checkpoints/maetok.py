# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""MAETok's public layout: state-dict names and shapes, and the flat dataclass that is written as config.json.

Detected: decoder kind from `decoder.model.blocks.0.adaLN_modulation.1.weight`, mixed RoPE from `encoder.freqs`, the
decoder's cls token, L and H, sizes, patches and resolution from shapes. Teachers and auxiliary decoders are tolerated.
"""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import Any

from maetok_fast.models.checkpoints.layout import CheckpointError, Facts, Layout, ratio, shown
from maetok_fast.models.configs import ViTSize

__all__ = ["MAETOK"]

_KEYS = frozenset(
    {
        "image_size",
        "base_image_size",
        "codebook_size",
        "codebook_embed_dim",
        "codebook_l2_norm",
        "codebook_show_usage",
        "commit_loss_beta",
        "entropy_loss_ratio",
        "vq_loss_ratio",
        "kl_loss_weight",
        "tau",
        "num_codebooks",
        "encoder_ch_mult",
        "decoder_ch_mult",
        "z_channels",
        "dropout_p",
        "enc_type",
        "dec_type",
        "encoder_model",
        "decoder_model",
        "num_latent_tokens",
        "to_pixel",
        "enc_tuning_method",
        "dec_tuning_method",
        "enc_pretrained",
        "dec_pretrained",
        "enc_patch_size",
        "dec_patch_size",
        "enc_drop_path_rate",
        "dec_drop_path_rate",
        "enc_token_drop",
        "enc_token_drop_max",
        "enc_cls_token",
        "dec_cls_token",
        "use_ape",
        "use_rope",
        "rope_mixed",
        "rope_theta",
        "repa",
        "repa_model",
        "repa_patch_size",
        "repa_proj_dim",
        "repa_loss_weight",
        "repa_align",
        "vq_mean",
        "vq_std",
        "aux_dec_model",
        "aux_loss_mask",
        "aux_dec_cls_token",
        "aux_hog_dec",
        "aux_dino_dec",
        "aux_clip_dec",
        "aux_supcls_dec",
        "aux_hog_decoder",
        "aux_dino_decoder",
        "aux_clip_decoder",
        "aux_supcls_decoder",
        "encoder_size",
        "decoder_size",
    }
)
_TOLERATED = (
    "projection.*",
    "repa_model.*",
    "clip_model.*",
    "decoder_hog.*",
    "decoder_dino.*",
    "decoder_clip.*",
    "post_quant_conv_hog.*",
    "post_quant_conv_dino.*",
    "post_quant_conv_clip.*",
    "to_pixel_hog.*",
    "to_pixel_dino.*",
    "to_pixel_clip.*",
    "hog_generator.*",
    "quantize.*",
    "scale.*",
    "de_scale.*",
    "clip_scale.*",
    "clip_de_scale.*",
)
# numbers that no tensor shows: our field, the name in config.json, the public default
_HIDDEN = (
    ("rope_theta", "rope_theta", 10.0),
    ("encoder_drop_path", "enc_drop_path_rate", 0.0),
    ("decoder_drop_path", "dec_drop_path_rate", 0.0),
    ("latent_mean", "vq_mean", 0.0),
    ("latent_std", "vq_std", 1.0),
)
# the sizes that the public code accepts, by the word in timm's model names; others go into config.json as numbers
_VIT_WORDS = {"small": ViTSize(384, 12, 6), "base": ViTSize(768, 12, 12), "large": ViTSize(1024, 24, 16)}


def _vit_size(f: Facts, half: str) -> ViTSize:
    """One ViT. The given or stated size tells the heads (and which of the ratios that make one width)."""
    dim = f.shape(f"{half}.model.pos_embed", 3)[2]
    hidden = f.shape(f"{half}.model.blocks.0.mlp.fc1.weight", 2)[0]
    depth = f.depth(f"{half}.model.blocks")
    given, stated = f.given.get(half), f.public.get(f"{half}_size")
    heads: Any = None
    ratios: list[Any] = []
    if isinstance(given, ViTSize):
        heads, ratios = given.heads, [given.mlp_ratio]
    elif isinstance(stated, dict):
        heads, ratios = stated.get("heads"), [stated.get("mlp_ratio")]
    if heads is None:
        if dim % 64:
            raise CheckpointError(f"{half}: heads of a {dim}-wide ViT are unknown; pass {half}=ViTSize(...)")
        heads = dim // 64  # every public ViT has head_dim 64
        f.assumed.append(f"{half} heads={heads}")
    return ViTSize(dim, depth, int(heads), ratio(dim, hidden, ratios))


def _detect_maetok(f: Facts) -> dict[str, Any]:
    encoder, decoder = (_vit_size(f, half) for half in ("encoder", "decoder"))
    patch = f.shape("encoder.model.patch_embed.proj.weight", 4)[2]
    decoder_patch = f.shape("decoder.model.patch_embed.proj.weight", 4)[2]
    latent_dim = f.shape("post_quant_conv.weight", 2)[1]
    # twice the latent width is mean and variance. `quantize.*` of public files is a rest that MAETok does not use
    softvq = f.has("codebook.embedding.weight")
    kl = f.shape("quant_conv.weight", 2)[0] == 2 * latent_dim
    codebook = f.shape("codebook.embedding.weight", 2)[0] if softvq else None
    count = f.shape("encoder.latent_tokens", 3)[1] if f.has("encoder.latent_tokens") else 0
    # learned positions, so that their number shows, and not their arrangement
    size = f.grid("image_size", "image_size", f.shape("encoder.model.pos_embed", 3)[1] - 1, patch, None)
    movq = f.has("decoder.model.blocks.0.adaLN_modulation.1.weight")
    cls = f.has("decoder.model.cls_token")
    mixed = f.has("encoder.freqs")
    if mixed:
        position = "mixed"
    else:
        axial, wrong = f.flag("use_rope"), f.flag("rope_mixed")
        stated = None if axial is None else "axial" if axial and not wrong else "absolute"
        position = f.unshown("position", stated, "absolute")
    if f.has("encoder.freqs_t_x"):
        base = math.isqrt(f.shape("encoder.freqs_t_x", 1)[0]) * patch
    else:
        base = f.unshown("base_image_size", f.number("base_image_size", integer=True), size[0])

    for key, value in (
        ("codebook_embed_dim", latent_dim),
        ("num_latent_tokens", count),
        ("enc_patch_size", patch),
        ("dec_patch_size", decoder_patch),
        ("dec_cls_token", cls),
    ):
        f.check(key, value)
    f.check("decoder_model", "movq" if movq else "plain blocks", same=lambda v: ("movq" in str(v)) == movq)
    for key in ("enc_type", "dec_type"):
        f.check(key, "vit")
    f.check("to_pixel", "linear")
    f.check("use_rope", mixed or position == "axial")
    if mixed:
        f.check("rope_mixed", True)
    return {
        "image_size": shown(size),
        "base_image_size": base,
        "patch": patch,
        "decoder_patch": None if decoder_patch == patch else decoder_patch,
        "num_latent_tokens": count,
        "latent_dim": latent_dim,
        "encoder": encoder,
        "decoder": decoder,
        "decoder_kind": "movqv2" if movq else "plain",
        "decoder_cls_token": cls,
        "position": position,
        "mask_token": f.has("encoder.mask_token"),
        "bottleneck": "kl" if kl else "softvq" if softvq else "ae",
        "codebook_size": codebook,
        **{field: f.unshown(field, f.number(key), default) for field, key, default in _HIDDEN},
    }


def _export_maetok(config: Any) -> dict[str, Any]:
    movq = config.decoder_kind == "movqv2"
    out: dict[str, Any] = {
        "image_size": config.image_size if isinstance(config.image_size, int) else list(config.image_size),
        "base_image_size": config.base_image_size,
        "codebook_embed_dim": config.latent_dim,
        "enc_type": "vit",
        "dec_type": "vit",
        "num_latent_tokens": config.num_latent_tokens,
        "to_pixel": "linear",
        "enc_pretrained": False,
        "dec_pretrained": False,
        "enc_patch_size": config.patch,
        "dec_patch_size": config.out_patch,
        "enc_drop_path_rate": config.encoder_drop_path,
        "dec_drop_path_rate": config.decoder_drop_path,
        "dec_cls_token": config.decoder_cls_token,
        "use_ape": config.position == "absolute",
        "use_rope": config.position != "absolute",
        "rope_mixed": config.position == "mixed",
        "rope_theta": config.rope_theta,
        "enc_token_drop": 0.4 if config.mask_token else 0.0,
        "enc_token_drop_max": 0.6,
        "vq_mean": config.latent_mean,
        "vq_std": config.latent_std,
    }
    if config.codebook_size is not None:
        out["codebook_size"] = config.codebook_size
    for half, size, suffix in (
        ("encoder", config.encoder, ".lvd142m"),
        ("decoder", config.decoder, "_movq2" if movq else ".lvd142m"),
    ):
        word = next((w for w, known in _VIT_WORDS.items() if known == size), None)
        out[f"{half}_model"] = f"vit_{word or 'custom'}_patch14_dinov2{suffix}"
        if word is None:
            out[f"{half}_size"] = asdict(size)
    return out


MAETOK = Layout(
    "MAETok",
    "quant_conv.weight",
    _detect_maetok,
    _export_maetok,
    _KEYS,
    tolerated=_TOLERATED,
    optional=("*.freqs_t_x", "*.freqs_t_y", "decoder.latent_pos_embed"),
)
