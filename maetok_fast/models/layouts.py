# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""The public layouts: from a checkpoint's shapes and its config.json to our configuration, and back.

One `Layout` per model class. `detect` reads every fact that the weights show from their keys and shapes; config.json
adds what they cannot show (theta, drop path, latent statistics), and where it contradicts the weights that is an error:
the two files do not belong together. `export` writes the configuration under the public names.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from maetok_fast.models.checkpoints import CheckpointError
from maetok_fast.models.lightningdit import LightningDiT, LightningDiTConfig
from maetok_fast.models.sit import SiT, SiTConfig
from maetok_fast.models.tokenizer import MAETok, MAETokConfig, ViTSize

__all__ = ["Layout", "layout_of"]

Shapes = Mapping[str, tuple[int, ...]]
Public = Mapping[str, Any]

# what huggingface_hub's mixin and the public dataclasses write besides the architecture
_HUB = {"tags", "repo_url", "license", "model_type", "architectures", "torch_dtype", "dtype", "transformers_version"}
_MAETOK_KEYS = _HUB | set(
    "image_size base_image_size codebook_size codebook_embed_dim codebook_l2_norm codebook_show_usage commit_loss_beta "
    "entropy_loss_ratio vq_loss_ratio kl_loss_weight tau num_codebooks encoder_ch_mult decoder_ch_mult z_channels "
    "dropout_p enc_type dec_type encoder_model decoder_model num_latent_tokens to_pixel enc_tuning_method "
    "dec_tuning_method enc_pretrained dec_pretrained enc_patch_size dec_patch_size enc_drop_path_rate dec_drop_path_rate "
    "enc_token_drop enc_token_drop_max enc_cls_token dec_cls_token use_ape use_rope rope_mixed rope_theta repa repa_model "
    "repa_patch_size repa_proj_dim repa_loss_weight repa_align vq_mean vq_std aux_dec_model aux_loss_mask "
    "aux_dec_cls_token aux_hog_dec aux_dino_dec aux_clip_dec aux_supcls_dec aux_hog_decoder aux_dino_decoder "
    "aux_clip_decoder aux_supcls_decoder encoder_size decoder_size".split()
)
_SIT_KEYS = _HUB | set(
    "path_type input_size patch_size in_channels hidden_size decoder_hidden_size encoder_depth depth num_heads mlp_ratio "
    "class_dropout_prob num_classes use_cfg vae_1d z_dims projector_dim qk_norm fused_attn flash_attn learn_sigma "
    "time_convention".split()
)
_LIGHTNING_KEYS = _SIT_KEYS | set("use_qknorm use_swiglu use_rope use_rmsnorm wo_shift use_checkpoint".split())

_MAETOK_TOLERATED = tuple(
    "projection.* repa_model.* clip_model.* decoder_hog.* decoder_dino.* decoder_clip.* post_quant_conv_hog.* "
    "post_quant_conv_dino.* post_quant_conv_clip.* to_pixel_hog.* to_pixel_dino.* to_pixel_clip.* hog_generator.* "
    "quantize.* scale.* de_scale.* clip_scale.* clip_de_scale.*".split()
)
# timm's names of the sizes that the public encoder accepts: dim -> word
_VIT_WORDS = {384: "small", 768: "base", 1024: "large"}
_VIT_DEPTHS = {384: 12, 768: 12, 1024: 24}
_HEADS = {384: 6, 768: 12, 1024: 16, 1152: 16, 1536: 24, 1792: 28}


@dataclass(frozen=True)
class Layout:
    """How one model class is stored.

    tolerated: patterns of keys in public files that are not the model's. optional: patterns of keys that a file may
    lack. detect(shapes, public, given, allow) -> config; export(config) -> public config.json.
    """

    tolerated: tuple[str, ...]
    optional: tuple[str, ...]
    detect: Callable[[Shapes, Public | None, Mapping[str, Any], Iterable[str]], Any]
    export: Callable[[Any], dict[str, Any]]


def layout_of(model: type) -> Layout:
    """The layout of a model class (or a subclass of one)."""
    for cls, layout in _LAYOUTS.items():
        if issubclass(model, cls):
            return layout
    raise TypeError(f"{model.__name__} has no checkpoint layout; one exists for {', '.join(c.__name__ for c in _LAYOUTS)}")


class _Facts:
    """Shapes by key, config.json beside them, and the contradictions met so far."""

    def __init__(self, shapes: Shapes, public: Public | None, known: set[str], allow: Iterable[str], what: str) -> None:
        self.shapes, self.public, self.allow, self.what = shapes, public or {}, tuple(allow), what
        self.problems: list[str] = []
        unknown = sorted(k for k in self.public if k not in known and not self._allowed(k))
        if unknown:
            self.problems.append(f"unknown keys in config.json: {', '.join(unknown)}")

    def _allowed(self, key: str) -> bool:
        return any(fnmatchcase(f"config.{key}", p) for p in self.allow)

    def shape(self, key: str, rank: int) -> tuple[int, ...]:
        """The shape of a key that every such checkpoint has."""
        if key not in self.shapes:
            raise CheckpointError(f"no {self.what} checkpoint: key {key!r} is missing")
        shape = self.shapes[key]
        if len(shape) != rank or 0 in shape:
            raise CheckpointError(f"no {self.what} checkpoint: {key!r} has shape {shape}, expected {rank} positive sizes")
        return shape

    def depth(self, prefix: str) -> int:
        found = {int(m[1]) for k in self.shapes if (m := re.match(re.escape(prefix) + r"\.(\d{1,4})\.", k))}
        return max(found) + 1 if found else 0

    def check(self, key: str, stored: Any, *, same: Callable[[Any], bool] | None = None) -> None:
        """config.json's `key`, if there, must say what the weights show."""
        if key in self.public and not self._allowed(key):
            said = self.public[key]
            if not (same(said) if same else said == stored):
                self.problems.append(f"config.json says {key}={said!r}, the weights show {stored!r}")

    def number(self, key: str, default: float, integer: bool = False) -> Any:
        value = self.public.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int if integer else (int, float)):
            raise CheckpointError(f"config.json: {key} must be {'an integer' if integer else 'a number'}, got {value!r}")
        return value

    def flag(self, key: str, default: bool) -> bool:
        value = self.public.get(key, default)
        if not isinstance(value, bool):
            raise CheckpointError(f"config.json: {key} must be true or false, got {value!r}")
        return value

    def size(self, key: str) -> tuple[int, int] | None:
        """An int or [height, width] of config.json, None if absent."""
        value = self.public.get(key)
        if isinstance(value, int) and not isinstance(value, bool):
            return value, value
        if isinstance(value, list) and len(value) == 2 and all(type(v) is int for v in value):
            return value[0], value[1]
        if value is not None:
            raise CheckpointError(f"config.json: {key} must be an integer or [height, width], got {value!r}")
        return None

    def finish(self) -> None:
        if self.problems:
            raise CheckpointError("\n  ".join([*self.problems, "pass allow=['config.NAME'] to let the weights win"]))


def _grid(count: int, stated: tuple[int, int] | None, what: str) -> tuple[int, int]:
    """The grid of `count` tokens: the stated one if it fits, else a square."""
    if stated is not None and stated[0] * stated[1] == count:
        return stated
    side = math.isqrt(count)
    if side * side != count:
        raise CheckpointError(f"{what}: {count} positions are no square; config.json must state the size as [height, width]")
    return side, side


def _shown(size: tuple[int, int]) -> int | tuple[int, int]:
    return size[0] if size[0] == size[1] else size


def _vit_size(facts: _Facts, half: str, given: Any) -> ViTSize:
    dim = facts.shape(f"{half}.model.pos_embed", 3)[2]
    hidden = facts.shape(f"{half}.model.blocks.0.mlp.fc1.weight", 2)[0]
    stated = facts.public.get(f"{half}_size")
    heads = given.heads if given is not None else stated.get("heads") if isinstance(stated, dict) else None
    if heads is None:
        if dim % 64:
            raise CheckpointError(f"{half}: heads of a {dim}-wide ViT are unknown; pass {half}=ViTSize(...)")
        heads = dim // 64  # every public ViT has head_dim 64
    return ViTSize(dim, facts.depth(f"{half}.model.blocks"), int(heads), hidden / dim)


def _detect_maetok(shapes: Shapes, public: Public | None, given: Mapping[str, Any], allow: Iterable[str]) -> MAETokConfig:
    f = _Facts(shapes, public, _MAETOK_KEYS, allow, "MAETok")
    encoder, decoder = (_vit_size(f, half, given.get(half)) for half in ("encoder", "decoder"))
    patch = f.shape("encoder.model.patch_embed.proj.weight", 4)[2]
    decoder_patch = f.shape("decoder.model.patch_embed.proj.weight", 4)[2]
    latent_dim = f.shape("post_quant_conv.weight", 2)[1]
    if f.shape("quant_conv.weight", 2)[0] == 2 * latent_dim:
        raise CheckpointError("quant_conv has twice the latent width: a KL autoencoder (mean and variance), not a MAETok")
    count = f.shapes["encoder.latent_tokens"][1] if len(f.shapes.get("encoder.latent_tokens", ())) == 3 else 0
    stated = given.get("image_size", f.size("image_size"))
    stated = (stated, stated) if isinstance(stated, int) else stated
    stated_grid = None if stated is None else (stated[0] // patch, stated[1] // patch)
    grid = _grid(f.shape("encoder.model.pos_embed", 3)[1] - 1, stated_grid, "encoder.model.pos_embed")
    size = grid[0] * patch, grid[1] * patch
    movq = "decoder.model.blocks.0.adaLN_modulation.1.weight" in shapes
    cls = "decoder.model.cls_token" in shapes
    masked = "encoder.mask_token" in shapes
    mixed = "encoder.freqs" in shapes
    if mixed:
        position = "mixed"
    else:
        axial = f.flag("use_rope", False) and not f.flag("rope_mixed", False)
        position = given.get("position", "axial" if axial else "absolute")
    base = f.number("base_image_size", size[0], integer=True)
    if "encoder.freqs_t_x" in shapes:
        base = math.isqrt(f.shape("encoder.freqs_t_x", 1)[0]) * patch

    for key, value in (
        ("codebook_embed_dim", latent_dim),
        ("num_latent_tokens", count),
        ("enc_patch_size", patch),
        ("dec_patch_size", decoder_patch),
        ("dec_cls_token", cls),
        ("base_image_size", base),
    ):
        f.check(key, value)
    f.check("image_size", _shown(size), same=lambda v: f.size("image_size") == size)
    f.check("decoder_model", "movq" if movq else "plain blocks", same=lambda v: ("movq" in str(v)) == movq)
    for key in ("enc_type", "dec_type"):
        f.check(key, "vit")
    f.check("to_pixel", "linear")
    f.check("use_rope", mixed or position == "axial")
    if mixed:
        f.check("rope_mixed", True)
    if "enc_token_drop" in f.public:
        f.check("enc_token_drop", masked, same=lambda v: (f.number("enc_token_drop", 0.0) > 0) == masked)
    f.finish()
    fields: dict[str, Any] = {
        "image_size": _shown(size),
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
        "rope_theta": float(f.number("rope_theta", 10.0)),
        "mask_token": masked,
        "encoder_drop_path": float(f.number("enc_drop_path_rate", 0.0)),
        "decoder_drop_path": float(f.number("dec_drop_path_rate", 0.0)),
        "latent_mean": float(f.number("vq_mean", 0.0)),
        "latent_std": float(f.number("vq_std", 1.0)),
    }
    return MAETokConfig(**{**fields, **_unseen(given, ("rope_theta", "encoder_drop_path", "decoder_drop_path",
                                                       "latent_mean", "latent_std"), fields)})  # fmt: skip


def _export_maetok(config: MAETokConfig) -> dict[str, Any]:
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
    for half, size, suffix in (
        ("encoder", config.encoder, ".lvd142m"),
        ("decoder", config.decoder, "_movq2" if movq else ".lvd142m"),
    ):
        word = _VIT_WORDS.get(size.dim, "custom")
        out[f"{half}_model"] = f"vit_{word}_patch14_dinov2{suffix}"
        if size != ViTSize(size.dim, _VIT_DEPTHS.get(size.dim, -1) if size.dim in _VIT_DEPTHS else 1, size.heads) or (
            word == "custom" or size.heads != size.dim // 64
        ):
            out[f"{half}_size"] = {"dim": size.dim, "depth": size.depth, "heads": size.heads, "mlp_ratio": size.mlp_ratio}
    return out


def _unseen(given: Mapping[str, Any], names: Iterable[str], fields: Mapping[str, Any]) -> dict[str, Any]:
    """The given fields that weights cannot show. A given field that they do show must agree with them."""
    for name, value in given.items():
        if name not in names and fields[name] != value:
            raise CheckpointError(f"{name}={value!r} was given, but the weights show {fields[name]!r}")
    return {k: v for k, v in given.items() if k in names}


def _generator_fields(f: _Facts, given: Mapping[str, Any]) -> dict[str, Any]:
    """What SiT and LightningDiT share."""
    one_d = "x_embedder.weight" in f.shapes
    if one_d:
        dim, channels = f.shape("x_embedder.weight", 2)
        patch = 1
    else:
        dim, channels, patch, _ = f.shape("x_embedder.proj.weight", 4)
    count = f.shape("pos_embed", 3)[1]
    tokens: int | tuple[int, int] = count
    if not one_d:
        stated = given.get("tokens", f.size("input_size"))
        grid = _grid(count, None if stated is None else (stated[0] // patch, stated[1] // patch), "pos_embed")
        tokens = (grid[0] * patch, grid[1] * patch)
    rows = f.shape("y_embedder.embedding_table.weight", 2)[0]
    classes = f.public.get("num_classes", given.get("num_classes", 1000 if rows == 1000 else rows - 1))
    if not isinstance(classes, int) or rows not in (classes, classes + 1):
        raise CheckpointError(f"the label table has {rows} rows, which does not fit num_classes={classes!r} (+ 1 for null)")
    dropout = float(f.number("class_dropout_prob", 0.1))
    if (dropout > 0) != (rows == classes + 1):
        if "class_dropout_prob" in f.public:
            f.check("class_dropout_prob", "a null class" if rows > classes else "no null class", same=lambda v: False)
        dropout = 0.1 if rows > classes else 0.0
    depth = f.depth("blocks")
    qk_norm = "blocks.0.attn.q_norm.weight" in f.shapes
    heads = given.get("heads", f.public.get("num_heads", _HEADS.get(dim)))
    if qk_norm:
        heads = dim // f.shape("blocks.0.attn.q_norm.weight", 1)[0]
    if not isinstance(heads, int) or heads < 1:
        raise CheckpointError(f"the number of heads of a {dim}-wide model is unknown; pass heads=...")
    out = f.shape("final_layer.linear.weight", 2)[0]
    sigma = out == 2 * patch * patch * channels
    for key, value in (
        ("hidden_size", dim),
        ("decoder_hidden_size", dim),
        ("in_channels", channels),
        ("depth", depth),
        ("patch_size", patch),
        ("vae_1d", one_d),
        ("num_heads", heads),
        ("learn_sigma", sigma),
    ):
        f.check(key, value)
    said = f.size("input_size")
    f.check("input_size", tokens, same=lambda v: (said[0] if one_d else said) == tokens)  # type: ignore[index]
    time = f.public.get("time_convention")
    if time not in (None, "maetok", "sit"):
        raise CheckpointError(f"config.json: time_convention must be 'maetok' (t = 0 data) or 'sit', got {time!r}")
    return {
        "tokens": tokens,
        "channels": channels,
        "patch": patch,
        "dim": dim,
        "depth": depth,
        "heads": heads,
        "num_classes": classes,
        "label_dropout": dropout,
        "qk_norm": qk_norm,
        "learn_sigma": sigma,
        # official SiT weights alone predict sigma too, and run from noise at t = 0 to data at t = 1
        "time": time or ("sit" if sigma else "maetok"),
    }


_GIVEN = ("heads", "time", "label_dropout")


def _detect_sit(shapes: Shapes, public: Public | None, given: Mapping[str, Any], allow: Iterable[str]) -> SiTConfig:
    f = _Facts(shapes, public, _SIT_KEYS, allow, "SiT")
    fields = _generator_fields(f, given)
    fields["mlp_ratio"] = f.shape("blocks.0.mlp.fc1.weight", 2)[0] / fields["dim"]
    f.check("qk_norm", fields["qk_norm"])
    f.finish()
    return SiTConfig(**{**fields, **_unseen(given, _GIVEN, fields)})


def _detect_lightningdit(
    shapes: Shapes, public: Public | None, given: Mapping[str, Any], allow: Iterable[str]
) -> LightningDiTConfig:
    f = _Facts(shapes, public, _LIGHTNING_KEYS, allow, "LightningDiT")
    fields = _generator_fields(f, given)
    dim = fields["dim"]
    swiglu = "blocks.0.mlp.w12.weight" in shapes
    if swiglu:
        # hidden = int(2/3 * int(dim * ratio)): any ratio that gives the stored width back is the right one
        hidden = f.shape("blocks.0.mlp.w3.weight", 2)[1]
        wide = next(w for w in range(hidden, 2 * hidden + 3) if int(2 / 3 * w) == hidden)
        fields["mlp_ratio"] = next(r for r in (4.0, wide / dim, (wide + 0.5) / dim) if int(2 / 3 * int(dim * r)) == hidden)
    else:
        fields["mlp_ratio"] = f.shape("blocks.0.mlp.fc1.weight", 2)[0] / dim
    fields |= {
        "swiglu": swiglu,
        "rmsnorm": "blocks.0.norm1.weight" in shapes,
        "rope": "feat_rope.freqs_cos" in shapes,
        "shift": f.shape("blocks.0.adaLN_modulation.1.weight", 2)[0] == 6 * dim,
        # published LightningDiT weights run from noise at t = 0 to data at t = 1
        "time": f.public.get("time_convention", "sit"),
    }
    for key, value in (
        ("use_qknorm", fields["qk_norm"]),
        ("use_swiglu", swiglu),
        ("use_rmsnorm", fields["rmsnorm"]),
        ("use_rope", fields["rope"]),
        ("wo_shift", not fields["shift"]),
    ):
        f.check(key, value)
    f.finish()
    return LightningDiTConfig(**{**fields, **_unseen(given, _GIVEN, fields)})


def _export_sit(config: SiTConfig) -> dict[str, Any]:
    tokens = config.tokens
    return {
        "path_type": "linear",
        "input_size": tokens if isinstance(tokens, int) else tokens[0] if tokens[0] == tokens[1] else list(tokens),
        "patch_size": config.patch,
        "in_channels": config.channels,
        "hidden_size": config.dim,
        "decoder_hidden_size": config.dim,
        "depth": config.depth,
        "num_heads": config.heads,
        "mlp_ratio": config.mlp_ratio,
        "class_dropout_prob": config.label_dropout,
        "num_classes": config.num_classes,
        "use_cfg": config.label_dropout > 0,
        "vae_1d": isinstance(tokens, int),
        "qk_norm": config.qk_norm,
        "learn_sigma": config.learn_sigma,
        "time_convention": config.time,
    }


def _export_lightningdit(config: LightningDiTConfig) -> dict[str, Any]:
    out = _export_sit(config)
    del out["qk_norm"], out["path_type"], out["use_cfg"], out["decoder_hidden_size"]
    return out | {
        "use_qknorm": config.qk_norm,
        "use_swiglu": config.swiglu,
        "use_rope": config.use_rope,
        "use_rmsnorm": config.rmsnorm,
        "wo_shift": not config.shift,
    }


_LAYOUTS: dict[type, Layout] = {
    MAETok: Layout(
        _MAETOK_TOLERATED, ("*.freqs_t_x", "*.freqs_t_y", "decoder.latent_pos_embed"), _detect_maetok, _export_maetok
    ),
    SiT: Layout(("projectors.*",), (), _detect_sit, _export_sit),
    LightningDiT: Layout(("projectors.*",), ("feat_rope.*",), _detect_lightningdit, _export_lightningdit),
}
