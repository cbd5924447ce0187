# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""Reading, checking and writing checkpoints: round trips, layouts, configurations."""

from __future__ import annotations

import itertools
import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from checkpoint_models import GENERATOR, TINY, random, same
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from maetok_fast.models import (
    CheckpointError,
    LightningDiT,
    LightningDiTConfig,
    MAETok,
    MAETokConfig,
    SiT,
    SiTConfig,
    ViTSize,
)
from maetok_fast.models.checkpoints import Facts, Layout, Pretrained


@pytest.fixture
def tiny() -> MAETok:
    return random(MAETok(TINY))


# ---- round trips -----------------------------------------------------------------------------------------------------

FIELDS: list[dict[str, Any]] = [
    {"decoder_kind": kind, "decoder_cls_token": cls, "position": position, "num_latent_tokens": count}
    for kind, cls, position, count in itertools.product(
        ("movqv2", "plain"), (False, True), ("mixed", "axial", "absolute"), (0, 4)
    )
] + [
    {"image_size": (64, 32)},
    {"image_size": 128},
    {"patch": 8, "decoder_patch": 16},
    {"mask_token": False, "latent_mean": 0.25, "latent_std": 1.5, "decoder_drop_path": 0.05, "rope_theta": 100.0},
    {"encoder": ViTSize(32, 1, 4, 3.3), "decoder": ViTSize(48, 3, 2)},
]


@pytest.mark.parametrize("fields", FIELDS, ids=lambda f: "-".join(f"{v}" for v in f.values()))
def test_maetok_round_trip(fields: dict[str, Any], tmp_path: Path) -> None:
    model = random(MAETok(MAETokConfig(**{**TINY.__dict__, **fields})))
    assert model.save_pretrained(tmp_path / "new" / "folder") == tmp_path / "new" / "folder"
    same(MAETok.from_pretrained(tmp_path / "new" / "folder"), model)
    assert sorted(p.name for p in (tmp_path / "new" / "folder").iterdir()) == ["config.json", "model.safetensors"]


@pytest.mark.parametrize(
    "model",
    [
        SiT(SiTConfig(**GENERATOR, tokens=6)),
        SiT(SiTConfig(**GENERATOR, tokens=6, label_dropout=0.0, mlp_ratio=3.0)),
        SiT(SiTConfig(**GENERATOR, tokens=(8, 4), patch=2, qk_norm=True, learn_sigma=True, time="sit")),
        LightningDiT(LightningDiTConfig(**GENERATOR, tokens=(4, 4))),
        LightningDiT(LightningDiTConfig(**GENERATOR, tokens=(2, 4), qk_norm=True, rmsnorm=False, shift=False)),
        LightningDiT(LightningDiTConfig(**GENERATOR, tokens=(4, 4), swiglu=False, rope=False, time="maetok")),
        LightningDiT(LightningDiTConfig(**GENERATOR, tokens=5, mlp_ratio=3.3)),
        SiT(SiTConfig(**GENERATOR, tokens=6, mlp_ratio=3.3)),
    ],
    ids=lambda m: f"{type(m).__name__}-{m.config.tokens}",
)
def test_generator_round_trip(model: Any, tmp_path: Path) -> None:
    random(model).save_pretrained(tmp_path)
    same(type(model).from_pretrained(tmp_path), model)


def test_public_config_keys(tiny: MAETok, tmp_path: Path) -> None:
    tiny.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for key, value in {
        "image_size": 64,
        "codebook_embed_dim": 6,
        "num_latent_tokens": 4,
        "enc_type": "vit",
        "dec_type": "vit",
        "to_pixel": "linear",
        "use_rope": True,
        "rope_mixed": True,
        "use_ape": False,
        "dec_cls_token": False,
    }.items():
        assert config[key] == value
    assert "movq" in config["decoder_model"]


def test_variant_from_the_keys_alone(tiny: MAETok, tmp_path: Path) -> None:
    save_file(tiny.state_dict(), tmp_path / "weights.safetensors")
    same(MAETok.from_pretrained(tmp_path / "weights.safetensors"), tiny)
    same(MAETok.from_pretrained(tmp_path), tiny)  # the only weights file of a directory
    plain = random(MAETok(MAETokConfig(**{**TINY.__dict__, "decoder_kind": "plain", "decoder_cls_token": True})))
    torch.save(plain.state_dict(), tmp_path / "plain.pt")
    same(MAETok.from_pretrained(tmp_path / "plain.pt"), plain)


def test_full_size_shapes_are_detected() -> None:
    from maetok_fast import models

    def detected(model: Any, public: Any) -> Any:
        return type(model).config_class(**model.layout.fields(model.state_dict(), public, {}, ()))

    for name in ("maetok-b-128", "maetok-l-64-plain", "sit-xl-1", "sit-b-2", "lightningdit-xl-1", "maetok-s-0"):
        with torch.device("meta"):
            model = models.create(name)
        public = json.loads(json.dumps(model.layout.export(model.config)))
        assert detected(model, public) == model.config
        assert detected(model, None) == model.config
        assert not {"encoder_size", "decoder_size"} & set(public)
    with torch.device("meta"):
        model = models.create("maetok-b-128-512", base_image_size=256)
    assert detected(model, None) == model.config


def test_config_beside_a_file_of_any_name(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = random(SiT(SiTConfig(**{**GENERATOR, "dim": 384, "heads": 4}, tokens=6, time="sit")))
    model.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "ema.safetensors")
    same(SiT.from_pretrained(tmp_path / "ema.safetensors"), model)
    assert not caplog.records
    (tmp_path / "config.json").unlink()
    assert SiT.from_pretrained(tmp_path / "ema.safetensors").config.heads == 6
    assert "SiT checkpoint without config.json: assumed num_classes=10, label_dropout=0.1, heads=6, time='maetok'," in (
        caplog.text
    )
    caplog.clear()
    hidden: dict[str, Any] = {"num_classes": 10, "label_dropout": 0.1, "heads": 4, "time": "sit"}
    same(SiT.from_pretrained(tmp_path / "ema.safetensors", **hidden), model)
    assert not caplog.records


def test_mixed_dtypes_become_the_widest(tiny: MAETok, tmp_path: Path) -> None:
    state = {k: v.to(torch.bfloat16 if k.startswith("encoder") else v.dtype) for k, v in tiny.state_dict().items()}
    save_file(state, tmp_path / "model.safetensors")
    assert {p.dtype for p in MAETok.from_pretrained(tmp_path).parameters()} == {torch.float32}
    low = MAETok.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {p.dtype for p in low.parameters()} == {torch.bfloat16}


def test_repa_projectors_are_tolerated(tmp_path: Path) -> None:
    model = random(SiT(SiTConfig(**GENERATOR, tokens=6)))
    torch.save({"ema": model.state_dict() | {"projectors.0.0.weight": torch.zeros(3)}}, tmp_path / "a.pt")
    same(SiT.from_pretrained(tmp_path / "a.pt", heads=4), model)
    with pytest.raises(CheckpointError, match="number of heads of a 48-wide model is unknown"):
        SiT.from_pretrained(tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match="channels=7 was given, but the weights show 5"):
        SiT.from_pretrained(tmp_path / "a.pt", heads=4, channels=7)
    with pytest.raises(ValueError, match="SiTConfig has no field width"):
        SiT.from_pretrained(tmp_path / "a.pt", width=4)
    assert SiT.from_pretrained(tmp_path / "a.pt", heads=4, time="sit").config.time == "sit"


def test_dtype_and_device(tiny: MAETok, tmp_path: Path) -> None:
    tiny.to(torch.bfloat16).save_pretrained(tmp_path)
    assert MAETok.from_pretrained(tmp_path).quant_conv.weight.dtype == torch.bfloat16
    assert MAETok.from_pretrained(tmp_path, dtype=torch.float32).quant_conv.weight.dtype == torch.float32
    loaded = MAETok.from_pretrained(tmp_path)
    assert not loaded.training
    assert loaded.encoder.freqs.requires_grad


# ---- keys and configurations that do not fit -------------------------------------------------------------------------


def test_every_bad_key_in_one_error(tiny: MAETok, tmp_path: Path) -> None:
    state = tiny.state_dict()
    del state["encoder.model.cls_token"], state["quant_conv.bias"]
    state["encoder.extra"] = torch.zeros(1)
    state["decoder.model.blocks.1.attn.proj.weight"] = torch.zeros(64, 32)
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError) as caught:
        MAETok.from_pretrained(tmp_path)
    text = str(caught.value)
    assert "model.safetensors as MAETok" in text
    assert "missing (2): " in text
    assert "encoder.model.cls_token" in text
    assert "quant_conv.bias" in text
    assert "unexpected (1): encoder.extra" in text
    assert "mis-shaped (1): decoder.model.blocks.1.attn.proj.weight (expected (64, 64), got (64, 32))" in text
    with pytest.raises(CheckpointError, match=r"missing \(1\): quant_conv.bias"):
        MAETok.from_pretrained(tmp_path, allow=["encoder.*", "*.proj.weight"])
    model = MAETok.from_pretrained(tmp_path, allow=["encoder.*", "*.proj.weight", "quant_conv.bias"])
    assert torch.equal(model.quant_conv.weight, tiny.quant_conv.weight)
    assert model.quant_conv.bias.isfinite().all()
    assert not any(p.is_meta for p in model.parameters())


def test_optional_buffers_may_be_missing(tiny: MAETok, tmp_path: Path) -> None:
    state = {k: v for k, v in tiny.state_dict().items() if "freqs_t" not in k}
    save_file(state, tmp_path / "model.safetensors")
    same(MAETok.from_pretrained(tmp_path), tiny)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("num_latent_tokens", 5),
        ("codebook_embed_dim", 16),
        ("image_size", 128),
        ("dec_cls_token", True),
        ("use_rope", False),
        ("rope_mixed", False),
        ("decoder_model", "vit_base_patch14_dinov2.lvd142m"),
        ("enc_patch_size", 14),
        ("enc_type", "cnn"),
        ("to_pixel", "conv"),
    ],
)
def test_config_that_contradicts_the_weights(tiny: MAETok, tmp_path: Path, key: str, value: Any) -> None:
    tiny.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {key: value}))
    with pytest.raises(CheckpointError, match=rf"model.safetensors: config.json says {key}=.*the weights show"):
        MAETok.from_pretrained(tmp_path)
    same(MAETok.from_pretrained(tmp_path, allow=f"config.{key}"), tiny)


def test_unknown_and_public_config_keys(tiny: MAETok, tmp_path: Path) -> None:
    tiny.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    public = {"repa": True, "aux_hog_dec": True, "license": "apache-2.0", "tags": ["MAETok"], "vq_std": 2.0}
    (tmp_path / "config.json").write_text(json.dumps(config | public))
    assert MAETok.from_pretrained(tmp_path).config.latent_std == 2.0
    (tmp_path / "config.json").write_text(json.dumps(config | {"rope_thetta": 3.0, "zeta": 1}))
    with pytest.raises(CheckpointError, match=r"unknown keys in config\.json: rope_thetta, zeta"):
        MAETok.from_pretrained(tmp_path)
    same(MAETok.from_pretrained(tmp_path, allow=("config.rope_thetta", "config.zeta")), tiny)
    (tmp_path / "config.json").write_text(json.dumps(config | {"rope_theta": "ten"}))
    with pytest.raises(CheckpointError, match="rope_theta must be a number, got 'ten'"):
        MAETok.from_pretrained(tmp_path)


def test_the_wrong_kind_of_model(tiny: MAETok, tmp_path: Path) -> None:
    tiny.save_pretrained(tmp_path)
    with pytest.raises(
        CheckpointError, match=r"no SiT checkpoint: key 'final_layer\.linear\.weight' is missing; it holds \d+ keys"
    ):
        SiT.from_pretrained(tmp_path, allow="config.*")
    state = tiny.state_dict()
    state["quant_conv.weight"] = torch.zeros(12, 64)  # a KL autoencoder's, whose bias has 12 too
    save_file(state, tmp_path / "kl.safetensors")
    with pytest.raises(CheckpointError, match=r"quant_conv\.bias \(expected \(12,\), got \(6,\)\)"):
        MAETok.from_pretrained(tmp_path / "kl.safetensors")


VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-2, 300),
    st.floats(allow_nan=True),
    st.text(max_size=4),
    st.just([]),
    st.just({}),
)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_fuzzed_structure_gives_one_clear_error(data: st.DataObject) -> None:
    """Wrong values in config.json and wrong shapes of weights: detection answers or raises, with an explanation."""
    kind, config = data.draw(
        st.sampled_from(
            [
                (MAETok, TINY),
                (SiT, SiTConfig(**GENERATOR, tokens=6)),
                (LightningDiT, LightningDiTConfig(**GENERATOR, tokens=(4, 4))),
            ]
        )
    )
    with torch.device("meta"):
        state = dict(kind(config).state_dict())
    public = kind.layout.export(config)
    for key in data.draw(st.lists(st.sampled_from(sorted(public)), max_size=2)):
        public[key] = data.draw(VALUES)
    for key in data.draw(st.lists(st.sampled_from(sorted(state)), max_size=2)):
        state[key] = torch.empty(data.draw(st.lists(st.integers(0, 80), max_size=4)), device="meta")
    if data.draw(st.booleans()):
        del state[data.draw(st.sampled_from(sorted(state)))]
    try:
        kind.config_class(**kind.layout.fields(state, public, {}, data.draw(st.sampled_from([(), ("config.*",)]))))
    except CheckpointError as error:
        assert str(error)  # noqa: PT017 (harmless changes raise nothing)
    except (
        ValueError,
        TypeError,
        ArithmeticError,
    ) as error:  # from_pretrained names the file and passes the sentence on
        assert str(error)  # noqa: PT017


# ---- what weights without a config.json do not show ----------------------------------------------------------------

VIT = ViTSize(64, 1, 1)
# one other value of each field (or several), from a base configuration
OTHER: dict[Any, tuple[Any, dict[str, Any]]] = {
    MAETok: (
        MAETokConfig(image_size=64, base_image_size=64, num_latent_tokens=4, latent_dim=6, encoder=VIT, decoder=VIT),
        {
            "image_size": [(32, 128), 128],
            "base_image_size": [128],
            "patch": [8],
            "decoder_patch": [8],
            "num_latent_tokens": [5, 0],
            "latent_dim": [7],
            "encoder": [ViTSize(64, 1, 2), ViTSize(128, 2, 2), ViTSize(64, 1, 1, 3.0)],
            "decoder": [ViTSize(64, 1, 4)],
            "decoder_kind": ["plain"],
            "decoder_cls_token": [True],
            "position": ["axial", "absolute"],
            "rope_theta": [100.0],
            "mask_token": [False],
            "encoder_drop_path": [0.1],
            "decoder_drop_path": [0.1],
            "latent_mean": [0.5],
            "latent_std": [2.0],
            "bottleneck": ["kl", "softvq"],
            "codebook_size": [16],
        },
    ),
    SiT: (
        SiTConfig(tokens=(4, 4), channels=4, dim=384, depth=3, heads=6, num_classes=10),
        {
            "tokens": [(2, 8), (16, 1), (8, 8), (6, 4), 16],
            "channels": [5],
            "patch": [2],
            "dim": [768],
            "depth": [2],
            "heads": [4],
            "mlp_ratio": [3.3],
            "num_classes": [12, 1000],
            "label_dropout": [0.3, 0.0],
            "qk_norm": [True],
            "learn_sigma": [True],
            "time": ["sit"],
            "conditions": [("r",), ("beta",), ("r", "beta")],
            "exit_depth": [1, 2],
            "prediction": ["x"],
        },
    ),
}
OTHER[LightningDiT] = (
    LightningDiTConfig(**OTHER[SiT][0].__dict__),
    {**OTHER[SiT][1], "rmsnorm": [False], "swiglu": [False], "rope": [False], "shift": [False]},
)


@pytest.mark.parametrize(
    ("kind", "changes"),
    [(kind, {field: value}) for kind, (_, others) in OTHER.items() for field in others for value in others[field]]
    + [(MAETok, {"position": "axial", "base_image_size": 128})],
    ids=lambda x: x.__name__ if isinstance(x, type) else "-".join(f"{k}={v}" for k, v in x.items()),
)
def test_every_field_is_shown_or_named(
    kind: Any, changes: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A file without config.json: each field of the model comes back, or the warning names it, or a refusal does."""
    config = replace(OTHER[kind][0], **changes)
    model = kind(config)
    save_file(model.state_dict(), tmp_path / "a.safetensors")
    try:
        loaded = kind.from_pretrained(tmp_path / "a.safetensors")
    except CheckpointError as error:
        assert all(field in str(error) for field in changes)  # noqa: PT017
        return
    for field in kind.config_class.__dataclass_fields__:
        one, other = getattr(loaded.config, field), getattr(config, field)
        if field == "mlp_ratio":  # of ratios that make one width the simplest is taken
            one, other = int(config.dim * one), int(config.dim * other)
            if getattr(config, "swiglu", False):
                one, other = int(2 / 3 * one), int(2 / 3 * other)
        elif isinstance(other, ViTSize) and f"{field} heads=" in caplog.text:
            one, other = replace(one, heads=1), replace(other, heads=1)
        assert one == other or f" {field}=" in caplog.text, field


def test_the_fields_above_are_all_fields() -> None:
    for kind, (_, others) in OTHER.items():
        assert set(others) == set(kind.config_class.__dataclass_fields__)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("grid", [(2, 32), (32, 2), (8, 8), (1, 64), (64, 1)])
def test_fixed_tables_show_the_grid(
    grid: tuple[int, int], dtype: torch.dtype, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "a.safetensors"
    fields: dict[str, Any] = {"channels": 5, "dim": 48, "depth": 1, "heads": 4, "qk_norm": True}
    sit = SiT(SiTConfig(tokens=grid, **fields)).to(dtype)
    save_file(sit.state_dict(), file)
    assert SiT.from_pretrained(file).config.tokens == grid
    assert "tokens=" not in caplog.text
    lightning = LightningDiT(LightningDiTConfig(tokens=grid, **fields)).to(dtype)
    save_file({**lightning.state_dict(), "pos_embed": torch.randn(1, 64, 48)}, file)  # the RoPE buffers alone
    assert LightningDiT.from_pretrained(file).config.tokens == grid
    assert "tokens=" not in caplog.text
    if grid != (8, 8):
        with pytest.raises(CheckpointError, match=r"tokens=\(8, 8\) was given, but the weights show"):
            LightningDiT.from_pretrained(file, tokens=(8, 8))
        (tmp_path / "config.json").write_text(json.dumps({**sit.layout.export(sit.config), "input_size": 8}))
        save_file(sit.state_dict(), file)
        with pytest.raises(CheckpointError, match=r"config.json says input_size=8, the weights show \("):
            SiT.from_pretrained(file)
        assert SiT.from_pretrained(file, allow="config.input_size").config.tokens == grid


def test_tables_that_show_no_grid_or_two(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "a.safetensors"
    fields: dict[str, Any] = {"channels": 5, "dim": 48, "depth": 1, "heads": 4, "qk_norm": True}
    sit = random(SiT(SiTConfig(tokens=(2, 8), **fields)))
    save_file(sit.state_dict(), file)
    assert SiT.from_pretrained(file).config.tokens == (4, 4)
    assert "tokens=(4, 4)" in caplog.text or "tokens=4" in caplog.text
    assert SiT.from_pretrained(file, tokens=(2, 8)).config.tokens == (2, 8)
    with pytest.raises(CheckpointError, match=r"16 positions of patch 1 make no tokens \(2, 4\)"):
        SiT.from_pretrained(file, tokens=(2, 4))
    one, other = (LightningDiT(LightningDiTConfig(tokens=grid, **fields)) for grid in ((2, 8), (4, 4)))
    save_file({**one.state_dict(), "pos_embed": other.state_dict()["pos_embed"]}, file)
    with pytest.raises(CheckpointError, match=r"different grids \(pos_embed \(4, 4\), feat_rope \(2, 8\)\)"):
        LightningDiT.from_pretrained(file)
    # without buffers, which follow from the grid, nothing but config.json tells that there is RoPE
    save_file({k: v for k, v in one.state_dict().items() if "feat_rope" not in k}, file)
    assert LightningDiT.from_pretrained(file, rope=True).config.rope
    (tmp_path / "config.json").write_text(json.dumps(one.layout.export(one.config)))
    same(LightningDiT.from_pretrained(file), one)


# ---- a model family of a user's own --------------------------------------------------------------------------------


@dataclass(frozen=True)
class OwnConfig:
    width: int = 4
    slope: float = 0.1


def _detect_own(facts: Facts) -> dict[str, Any]:
    width = facts.shape("model.out.weight", 2)[1]
    facts.check("width", width)
    return {"width": width, "slope": facts.unshown("slope", facts.number("slope"), 0.1)}


class Own(Pretrained):
    config_class = OwnConfig
    layout = Layout("Own", "model.out.weight", _detect_own, asdict, frozenset({"width", "slope"}))

    def __init__(self, config: OwnConfig | None = None) -> None:
        super().__init__()
        self.config = config = OwnConfig() if config is None else config
        self.model = torch.nn.Sequential()  # its keys begin with a word that wrappers use
        self.model.out = torch.nn.Linear(config.width, 2)


def test_a_family_of_ones_own(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A class and its layout, both in this file: saved, loaded, checked and unwrapped as ours are."""
    own = random(Own(OwnConfig(3, 0.5)))
    assert sorted(own.state_dict()) == ["model.out.bias", "model.out.weight"]
    own.save_pretrained(tmp_path)
    same(Own.from_pretrained(tmp_path), own)
    assert not caplog.records
    torch.save({"ema": {f"module.{k}": v for k, v in own.state_dict().items()}}, tmp_path / "last.pt")
    (tmp_path / "config.json").rename(tmp_path / "other.json")
    assert Own.from_pretrained(tmp_path / "last.pt").config == OwnConfig(3, 0.1)
    assert (
        "an Own checkpoint" in caplog.text or "a Own checkpoint without config.json: assumed slope=0.1" in caplog.text
    )
    same(Own.from_pretrained(tmp_path / "last.pt", slope=0.5), own)
    (tmp_path / "config.json").write_text('{"width": 4}')
    with pytest.raises(CheckpointError, match=r"config\.json says width=4, the weights show 3"):
        Own.from_pretrained(tmp_path / "last.pt")
    SiT(SiTConfig(**GENERATOR, tokens=6)).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"no Own checkpoint: key 'model\.out\.weight' is missing"):
        Own.from_pretrained(tmp_path)


def test_a_class_without_a_layout(tmp_path: Path) -> None:
    class Bare(Pretrained):
        pass

    for act in (lambda: Bare().save_pretrained(tmp_path), lambda: Bare.from_pretrained(tmp_path)):
        with pytest.raises(TypeError, match=r"Bare has no checkpoint layout; set `layout = Layout"):
            act()


def test_names_of_presets_are_types() -> None:
    from maetok_fast.models import catalog

    table = catalog.presets()
    for kind, config in (
        (catalog.MAETokName, MAETokConfig),
        (catalog.SiTName, SiTConfig),
        (catalog.LightningDiTName, LightningDiTConfig),
    ):
        assert sorted(get_args(kind)) == sorted(n for n in table if type(table[n]) is config)
