# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""The public layouts of SiT (MAETok, REPA and official weights) and LightningDiT. 1-D or 2-D latents, the grid, sizes,
q/k norm, sigma outputs, SwiGLU, RMSNorm and RoPE are read from keys, shapes and the fixed position tables; heads from
q/k norm, RoPE, config or width.
"""

from __future__ import annotations

from typing import Any

from maetok_fast.models.checkpoints.layout import CheckpointError, Facts, Layout, grid_of_cosines, ratio, shown
from maetok_fast.models.configs import CONDITIONS

__all__ = ["LIGHTNINGDIT", "SIT"]

_SIT_KEYS = frozenset(
    {
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
        "prediction",
    }
)
_LIGHTNING_KEYS = _SIT_KEYS | {"use_qknorm", "use_swiglu", "use_rope", "use_rmsnorm", "wo_shift", "use_checkpoint"}

# the published sizes
_HEADS = {384: 6, 768: 12, 1024: 16, 1152: 16, 1536: 24, 1792: 28}


def _tables(f: Facts, count: int, dim: int) -> dict[str, tuple[int, int]]:
    """The grid of `count` tokens by each fixed table that shows one: the sin/cos positions, LightningDiT's RoPE."""
    found = {}
    positions, rope = f.values("pos_embed", 3), f.values("feat_rope.freqs_cos", 2)
    if positions is not None and positions.shape == (1, count, dim) and dim % 4 == 0:
        # [sin x | cos x | sin y | cos y], the first angle of each being the position
        found["pos_embed"] = grid_of_cosines(positions[0, :, 3 * dim // 4], positions[0, :, dim // 4])
    if rope is not None and len(rope) == count and rope.shape[1] > 1:
        # the first half of the angles turns with the row
        found["feat_rope"] = grid_of_cosines(rope[:, 0], rope[:, rope.shape[1] // 2])
    return {k: v for k, v in found.items() if v is not None}


def _generator_fields(f: Facts) -> dict[str, Any]:
    """What SiT and LightningDiT share."""
    one_d = f.has("x_embedder.weight")
    if one_d:
        dim, channels = f.shape("x_embedder.weight", 2)
        patch = 1
    else:
        dim, channels, patch, _ = f.shape("x_embedder.proj.weight", 4)
    count = f.shape("pos_embed", 3)[1]
    tokens: int | tuple[int, int] = count
    if one_d:
        said = f.size("input_size")
        f.check("input_size", count, same=lambda v: said is not None and said[0] == count)
    else:
        grids = _tables(f, count, dim)
        if len(set(grids.values())) > 1:
            raise CheckpointError(
                f"the position tables show different grids ({', '.join(f'{k} {v}' for k, v in grids.items())})"
            )
        tokens = f.grid("tokens", "input_size", count, patch, next(iter(grids.values()), None))
    rows = f.shape("y_embedder.embedding_table.weight", 2)[0]
    classes = f.unshown("num_classes", f.number("num_classes", integer=True), 1000 if rows == 1000 else rows - 1)
    if not isinstance(classes, int) or rows not in (classes, classes + 1):
        raise CheckpointError(
            f"the label table has {rows} rows, which does not fit num_classes={classes!r} (+ 1 for null)"
        )
    null = rows == classes + 1
    dropout = f.number("class_dropout_prob")
    if dropout is not None and (dropout > 0) != null:
        f.check("class_dropout_prob", "a null class" if null else "no null class", same=lambda v: False)
        dropout = None
    dropout = f.unshown("label_dropout", dropout, 0.1) if null else 0.0
    depth = f.depth("blocks")
    qk_norm = f.has("blocks.0.attn.q_norm.weight")
    if qk_norm:
        heads = dim // f.shape("blocks.0.attn.q_norm.weight", 1)[0]
    elif f.has("feat_rope.freqs_cos"):
        heads = dim // f.shape("feat_rope.freqs_cos", 2)[1]
    else:
        heads = f.unshown("heads", f.number("num_heads", integer=True), _HEADS.get(dim))
    if not isinstance(heads, int) or heads < 1:
        raise CheckpointError(f"the number of heads of a {dim}-wide model is unknown; pass heads=...")
    exit_depth = None
    if f.has("final_layer_xr.linear.weight"):  # internal guidance's; the blocks before it do not show
        exit_depth = f.unshown("exit_depth", f.number("encoder_depth", integer=True), min(8, depth - 1))
    conditions = tuple(name for name in CONDITIONS if f.has(f"{name}_embedder.mlp.0.weight"))
    prediction = "x" if f.has("predicts_data") else "v"
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
        ("prediction", prediction),
    ):
        f.check(key, value)
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
        "conditions": conditions,
        "exit_depth": exit_depth,
        "prediction": prediction,
    }


def _time(f: Facts, usual: str) -> str:
    """The given or stated time convention, else the one that such weights usually have."""
    time = f.public.get("time_convention")
    if time not in (None, "maetok", "sit"):
        raise CheckpointError(f"config.json: time_convention must be 'maetok' (t = 0 data) or 'sit', got {time!r}")
    return str(f.unshown("time", time, usual))


def _stated_ratios(f: Facts) -> tuple[Any, Any]:
    return f.given.get("mlp_ratio"), f.public.get("mlp_ratio")


def _detect_sit(f: Facts) -> dict[str, Any]:
    fields = _generator_fields(f)
    fields["mlp_ratio"] = ratio(fields["dim"], f.shape("blocks.0.mlp.fc1.weight", 2)[0], _stated_ratios(f))
    # official SiT weights alone predict sigma too, and run from noise at t = 0 to data at t = 1
    fields["time"] = _time(f, "sit" if fields["learn_sigma"] else "maetok")
    f.check("qk_norm", fields["qk_norm"])
    return fields


def _detect_lightningdit(f: Facts) -> dict[str, Any]:
    fields = _generator_fields(f)
    dim = fields["dim"]
    swiglu = f.has("blocks.0.mlp.w12.weight")
    if swiglu:
        hidden = f.shape("blocks.0.mlp.w3.weight", 2)[1]
        fields["mlp_ratio"] = ratio(dim, hidden, _stated_ratios(f), lambda wide: int(2 / 3 * wide))
    else:
        fields["mlp_ratio"] = ratio(dim, f.shape("blocks.0.mlp.fc1.weight", 2)[0], _stated_ratios(f))
    if f.has("feat_rope.freqs_cos") or isinstance(fields["tokens"], int):
        rope = f.has("feat_rope.freqs_cos")
        f.check("use_rope", rope)
    else:  # the buffers follow from the grid, so that a file may lack them
        rope = f.unshown("rope", f.flag("use_rope"), False)
    fields |= {
        "swiglu": swiglu,
        "rmsnorm": f.has("blocks.0.norm1.weight"),
        "rope": rope,
        "shift": f.shape("blocks.0.adaLN_modulation.1.weight", 2)[0] == 6 * dim,
        # published LightningDiT weights run from noise at t = 0 to data at t = 1
        "time": _time(f, "sit"),
    }
    for key, value in (
        ("use_qknorm", fields["qk_norm"]),
        ("use_swiglu", swiglu),
        ("use_rmsnorm", fields["rmsnorm"]),
        ("wo_shift", not fields["shift"]),
    ):
        f.check(key, value)
    return fields


def _export_sit(config: Any) -> dict[str, Any]:
    tokens = config.tokens
    own = {} if config.exit_depth is None else {"encoder_depth": config.exit_depth}
    if config.prediction != "v":
        own["prediction"] = config.prediction
    return own | {
        "path_type": "linear",
        "input_size": list(tokens) if isinstance(shown(tokens), tuple) else shown(tokens),
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


def _export_lightningdit(config: Any) -> dict[str, Any]:
    out = _export_sit(config)
    del out["qk_norm"], out["path_type"], out["use_cfg"], out["decoder_hidden_size"]
    return out | {
        "use_qknorm": config.qk_norm,
        "use_swiglu": config.swiglu,
        "use_rope": config.rope,
        "use_rmsnorm": config.rmsnorm,
        "wo_shift": not config.shift,
    }


# the last layer is the one that every kind of these models names alike
_MARK = "final_layer.linear.weight"
# REPA's heads, and REPA-E's batch norm of the latents, whose statistics maetok_fast.pipeline reads
_TOLERATED = ("projectors.*", "bn.*")

SIT = Layout("SiT", _MARK, _detect_sit, _export_sit, _SIT_KEYS, tolerated=_TOLERATED)
LIGHTNINGDIT = Layout(
    "LightningDiT",
    _MARK,
    _detect_lightningdit,
    _export_lightningdit,
    _LIGHTNING_KEYS,
    tolerated=_TOLERATED,
    optional=("feat_rope.*",),
)
