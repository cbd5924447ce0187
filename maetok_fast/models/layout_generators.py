# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""The public layouts of SiT (MAETok, REPA and official weights) and LightningDiT. 1-D or 2-D latents, sizes, q/k norm,
sigma outputs, SwiGLU, RMSNorm and RoPE are detected from keys and shapes; heads from q/k norm, config or width.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from maetok_fast.models.checkpoints import CheckpointError
from maetok_fast.models.layouts import HUB_KEYS, Facts, Layout, Public, Shapes, grid_or_square, ratio, unseen
from maetok_fast.models.lightningdit import LightningDiT, LightningDiTConfig
from maetok_fast.models.sit import SiT, SiTConfig

__all__ = ["LIGHTNINGDIT", "SIT"]

_SIT_KEYS = HUB_KEYS | {
    "path_type",
    "input_size",
    "patch_size",
    "in_channels",
    "hidden_size",
    "decoder_hidden_size",
    "encoder_depth",
    "depth",
    "num_heads",
    "mlp_ratio",
    "class_dropout_prob",
    "num_classes",
    "use_cfg",
    "vae_1d",
    "z_dims",
    "projector_dim",
    "qk_norm",
    "fused_attn",
    "flash_attn",
    "learn_sigma",
    "time_convention",
}
_LIGHTNING_KEYS = _SIT_KEYS | {"use_qknorm", "use_swiglu", "use_rope", "use_rmsnorm", "wo_shift", "use_checkpoint"}

_HEADS = {384: 6, 768: 12, 1024: 16, 1152: 16, 1536: 24, 1792: 28}


def _generator_fields(f: Facts, given: Mapping[str, Any]) -> dict[str, Any]:
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
        grid = grid_or_square(count, None if stated is None else (stated[0] // patch, stated[1] // patch), "pos_embed")
        tokens = (grid[0] * patch, grid[1] * patch)
    rows = f.shape("y_embedder.embedding_table.weight", 2)[0]
    classes = f.public.get("num_classes", given.get("num_classes", 1000 if rows == 1000 else rows - 1))
    if not isinstance(classes, int) or rows not in (classes, classes + 1):
        raise CheckpointError(
            f"the label table has {rows} rows, which does not fit num_classes={classes!r} (+ 1 for null)"
        )
    dropout = float(f.number("class_dropout_prob", 0.1))
    if (dropout > 0) != (rows == classes + 1):
        if "class_dropout_prob" in f.public:
            f.check("class_dropout_prob", "a null class" if rows > classes else "no null class", same=lambda v: False)
        dropout = 0.1 if rows > classes else 0.0
    depth = f.depth("blocks")
    qk_norm = "blocks.0.attn.q_norm.weight" in f.shapes
    if qk_norm:
        heads = dim // f.shape("blocks.0.attn.q_norm.weight", 1)[0]
    elif "heads" in given or "num_heads" in f.public:
        heads = given.get("heads", f.public.get("num_heads"))
    else:
        heads = f.assume("heads", _HEADS.get(dim))
    if not isinstance(heads, int) or heads < 1:
        raise CheckpointError(f"the number of heads of a {dim}-wide model is unknown; pass heads=...")
    out = f.shape("final_layer.linear.weight", 2)[0]
    sigma = out == 2 * patch * patch * channels
    for key, value in (
        ("hidden_size", dim),
        ("decoder_hidden_size", dim),
        ("in_channels", channels),
        ("depth", depth),
        *(() if one_d else (("patch_size", patch),)),  # the public code ignores it for 1-D latents
        ("vae_1d", one_d),
        ("num_heads", heads),
        ("learn_sigma", sigma),
    ):
        f.check(key, value)
    said = f.size("input_size")
    f.check("input_size", tokens, same=lambda v: (said[0] if one_d else said) == tokens)  # type: ignore[index]
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
    }


def _time(f: Facts, given: Mapping[str, Any], usual: str) -> str:
    """The stated time convention, else the one that such weights usually have."""
    time = f.public.get("time_convention")
    if time not in (None, "maetok", "sit"):
        raise CheckpointError(f"config.json: time_convention must be 'maetok' (t = 0 data) or 'sit', got {time!r}")
    return given.get("time", time) or f.assume("time", usual)


def _stated_ratios(f: Facts, given: Mapping[str, Any]) -> tuple[Any, Any]:
    return given.get("mlp_ratio"), f.public.get("mlp_ratio")


_GIVEN = ("heads", "time", "label_dropout")


def _detect_sit(shapes: Shapes, public: Public | None, given: Mapping[str, Any], allow: Iterable[str]) -> SiTConfig:
    f = Facts(shapes, public, _SIT_KEYS, allow, "SiT")
    fields = _generator_fields(f, given)
    hidden = f.shape("blocks.0.mlp.fc1.weight", 2)[0]
    fields["mlp_ratio"] = ratio(fields["dim"], hidden, _stated_ratios(f, given))
    # official SiT weights alone predict sigma too, and run from noise at t = 0 to data at t = 1
    fields["time"] = _time(f, given, "sit" if fields["learn_sigma"] else "maetok")
    f.check("qk_norm", fields["qk_norm"])
    f.finish()
    return SiTConfig(**{**fields, **unseen(given, _GIVEN, fields)})


def _detect_lightningdit(
    shapes: Shapes, public: Public | None, given: Mapping[str, Any], allow: Iterable[str]
) -> LightningDiTConfig:
    f = Facts(shapes, public, _LIGHTNING_KEYS, allow, "LightningDiT")
    fields = _generator_fields(f, given)
    dim = fields["dim"]
    swiglu = "blocks.0.mlp.w12.weight" in shapes
    stated = _stated_ratios(f, given)
    if swiglu:
        hidden = f.shape("blocks.0.mlp.w3.weight", 2)[1]
        fields["mlp_ratio"] = ratio(dim, hidden, stated, lambda wide: int(2 / 3 * wide))
    else:
        fields["mlp_ratio"] = ratio(dim, f.shape("blocks.0.mlp.fc1.weight", 2)[0], stated)
    fields |= {
        "swiglu": swiglu,
        "rmsnorm": "blocks.0.norm1.weight" in shapes,
        "rope": "feat_rope.freqs_cos" in shapes,
        "shift": f.shape("blocks.0.adaLN_modulation.1.weight", 2)[0] == 6 * dim,
        # published LightningDiT weights run from noise at t = 0 to data at t = 1
        "time": _time(f, given, "sit"),
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
    return LightningDiTConfig(**{**fields, **unseen(given, _GIVEN, fields)})


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
        "use_rope": config.rope,
        "use_rmsnorm": config.rmsnorm,
        "wo_shift": not config.shift,
    }


SIT = Layout(SiT, ("projectors.*",), (), _detect_sit, _export_sit)
LIGHTNINGDIT = Layout(LightningDiT, ("projectors.*",), ("feat_rope.*",), _detect_lightningdit, _export_lightningdit)
