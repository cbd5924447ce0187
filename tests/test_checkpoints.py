# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""Reading, checking and writing checkpoints: public layouts, training files, wrong and broken files, the hub."""

from __future__ import annotations

import argparse
import itertools
import json
import pickle
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

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

SIZE = ViTSize(64, 2, 1)  # head_dim 64, as every public ViT: heads need no config.json
TINY = MAETokConfig(image_size=64, base_image_size=64, num_latent_tokens=4, latent_dim=6, encoder=SIZE, decoder=SIZE)
GENERATOR: dict[str, Any] = {"channels": 5, "dim": 48, "depth": 2, "heads": 4, "num_classes": 10}


def random(model: Any, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn_like(p) * 0.2)
    return model.eval()


def same(a: Any, b: Any) -> None:
    assert a.config == b.config
    x, y = a.state_dict(), b.state_dict()
    assert x.keys() == y.keys()
    assert all(torch.equal(x[k], y[k]) for k in x)


@pytest.fixture
def tiny() -> MAETok:
    return random(MAETok(TINY))


# ---- round trips ---------------------------------------------------------------------------------------------------

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


# ---- training files ------------------------------------------------------------------------------------------------


def test_training_file(tiny: MAETok, tmp_path: Path) -> None:
    other = random(MAETok(TINY), seed=1)
    extras = {
        "projection.0.weight": torch.zeros(2),
        "repa_model.blocks.0.x": torch.zeros(2),
        "clip_model.y": torch.zeros(1),
        "decoder_hog.model.z": torch.zeros(1),
        "post_quant_conv_dino.weight": torch.zeros(192, 32),
        "to_pixel_clip.bias": torch.zeros(1152),
        "hog_generator.w": torch.zeros(1),
        "quantize.embedding.weight": torch.zeros(1),
    }
    torch.save(
        {
            "model": {f"module.{k}": v for k, v in (other.state_dict() | extras).items()},
            "ema": {f"_orig_mod.module.{k}": v for k, v in (tiny.state_dict() | extras).items()},
            "optimizer": {"state": {}, "param_groups": [{"lr": 1e-4}]},
            "discriminator": {"w": torch.zeros(1)},
            "steps": 500,
            "args": argparse.Namespace(vq_model="AE", lr=1e-4),
        },
        tmp_path / "0500000.pt",
    )
    same(MAETok.from_pretrained(tmp_path / "0500000.pt"), tiny)
    same(MAETok.from_pretrained(tmp_path, prefer="model"), other)
    torch.save({"model": other.state_dict()}, tmp_path / "no_ema.pt")
    same(MAETok.from_pretrained(tmp_path / "no_ema.pt"), other)
    torch.save({"model": other.state_dict(), "ema": {}}, tmp_path / "empty_ema.pt")
    same(MAETok.from_pretrained(tmp_path / "empty_ema.pt"), other)
    with pytest.raises(ValueError, match="prefer 'best'"):
        MAETok.from_pretrained(tmp_path, prefer="best")


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


# ---- keys and configurations that do not fit -----------------------------------------------------------------------


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
    state["quant_conv.weight"] = torch.zeros(12, 64)
    save_file(state, tmp_path / "kl.safetensors")
    with pytest.raises(CheckpointError, match="a KL autoencoder"):
        MAETok.from_pretrained(tmp_path / "kl.safetensors")


# ---- broken files --------------------------------------------------------------------------------------------------


class Evil:
    def __reduce__(self) -> Any:
        return (print, ("this code must not run",))


def test_pickle_with_code_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"model": {"x": Evil()}}, tmp_path / "evil.pt")
    (tmp_path / "raw.pt").write_bytes(pickle.dumps(Evil(), protocol=2))
    for name in ("evil.pt", "raw.pt"):
        with pytest.raises(CheckpointError, match=rf"{name}: .*refused, because loading it would run code"):
            MAETok.from_pretrained(tmp_path / name)
    assert "must not run" not in capsys.readouterr().out


MARK = "quant_conv.weight"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"model": {MARK: torch.zeros(1), "x": 3}}, "key 'x' holds a int, expected a tensor"),
        ({"model": {MARK: torch.zeros(1), 3: torch.zeros(1)}}, "key 3 is a int, expected a string"),
        ({"ema": {}}, f"no MAETok checkpoint: key '{MARK}' is missing; it holds 'ema' with 0 keys"),
        ({"steps": 4}, "it holds 1 keys (steps)"),
        ([torch.zeros(1)], "it holds a list"),
        (torch.zeros(1), "it holds a Tensor"),
        ({"model": {f"module.{MARK}": torch.zeros(1), MARK: torch.zeros(1)}}, "MAETok weights are there twice, as"),
        ({MARK: torch.zeros(1), "a._orig_mod.b": torch.zeros(1), "a.b": torch.zeros(1)}, "'a.b' is there twice"),
        ({"vae." + MARK: torch.zeros(1), "vae.x": torch.zeros(1)}, f"2 keys, all under 'vae.' (vae.{MARK}, vae.x)"),
    ],
)
def test_files_of_something_else(tmp_path: Path, content: Any, message: str) -> None:
    torch.save(content, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match=re.escape("a.pt: ") + ".*" + re.escape(message)):
        MAETok.from_pretrained(tmp_path / "a.pt")


def test_paths_that_hold_no_checkpoint(tmp_path: Path, tiny: MAETok) -> None:
    with pytest.raises(CheckpointError, match=r"expected model\.safetensors or exactly one weights file, found none"):
        MAETok.from_pretrained(tmp_path)
    for name in ("a.pt", "b.pt"):
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"found a.pt, b.pt"):
        MAETok.from_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="no such file or directory, and not a hub repository id"):
        MAETok.from_pretrained(tmp_path / "nothing")
    (tmp_path / "x.txt").write_text("")
    with pytest.raises(CheckpointError, match=r"expected a .safetensors, .pt"):
        MAETok.from_pretrained(tmp_path / "x.txt")
    with pytest.raises(CheckpointError, match="is a file; give a directory"):
        tiny.save_pretrained(tmp_path / "x.txt")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("saved")
    model = random(MAETok(TINY))
    model.save_pretrained(path)
    torch.save({"ema": model.state_dict()}, path / "train.pt")
    return path


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_fuzzed_files_give_one_clear_error(saved: Path, tmp_path: Path, data: st.DataObject) -> None:
    """Truncated, flipped or random bytes: a model or a CheckpointError that names the file, never anything else."""
    name = data.draw(st.sampled_from(["model.safetensors", "train.pt", "config.json"]))
    for file in tmp_path.iterdir():
        file.unlink()
    raw = bytearray((saved / name).read_bytes())
    how = data.draw(st.sampled_from(["truncate", "flip", "random", "header"]))
    if how == "truncate":
        raw = raw[: data.draw(st.integers(0, len(raw) - 1))]
    elif how == "random":
        raw = bytearray(data.draw(st.binary(max_size=200)))
    else:
        limit = min(len(raw), 3000) if how == "header" else len(raw)
        for _ in range(data.draw(st.integers(1, 8))):
            raw[data.draw(st.integers(0, limit - 1))] = data.draw(st.integers(0, 255))
    (tmp_path / name).write_bytes(bytes(raw))
    if name == "config.json":
        (tmp_path / "model.safetensors").write_bytes((saved / "model.safetensors").read_bytes())
    try:
        MAETok.from_pretrained(tmp_path)
    except CheckpointError as error:
        assert str(tmp_path) in str(error)  # noqa: PT017 (some damage is harmless: no error either)


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


# ---- writing -------------------------------------------------------------------------------------------------------


def test_failed_save_leaves_the_old_files(tiny: MAETok, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny.save_pretrained(tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}

    def half(tensors: Any, path: str, metadata: Any = None) -> None:
        Path(path).write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr("safetensors.torch.save_file", half)
    with pytest.raises(CheckpointError, match="disk full"):
        random(MAETok(TINY), 1).save_pretrained(tmp_path)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_saving_where_or_what_cannot_be_saved(tiny: MAETok, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"cannot write to .*file/folder"):
        tiny.save_pretrained(tmp_path / "file" / "folder")
    with torch.device("meta"):
        empty = MAETok(TINY)
    with pytest.raises(CheckpointError, match="is on the meta device and has no values"):
        empty.save_pretrained(tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_saved_weights_are_plain_safetensors(tiny: MAETok, tmp_path: Path) -> None:
    tiny.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    assert state.keys() == tiny.state_dict().keys()
    assert (tmp_path / "model.safetensors").stat().st_mode & 0o444 == (tmp_path / "config.json").stat().st_mode & 0o444


# ---- the hub -------------------------------------------------------------------------------------------------------


def test_push_to_hub(tiny: MAETok, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, Any]] = []

    class Api:
        def __init__(self, token: Any = None) -> None:
            calls.append(("token", token))

        def create_repo(self, repo_id: str, **kwargs: Any) -> None:
            calls.append(("create", (repo_id, kwargs)))

        def upload_folder(self, *, repo_id: str, folder_path: str, **kwargs: Any) -> str:
            same(MAETok.from_pretrained(folder_path), tiny)
            calls.append(("upload", (repo_id, kwargs)))
            return "https://hub/commit"

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    assert tiny.push_to_hub("me/model", private=True, token="t", message="hi") == "https://hub/commit"
    assert calls == [
        ("token", "t"),
        ("create", ("me/model", {"private": True, "exist_ok": True, "repo_type": "model"})),
        ("upload", ("me/model", {"revision": None, "commit_message": "hi"})),
    ]


class Hub:
    """Stands for the hub: `files` by name, and a cache that holds `cached` of them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, files: Any, folder: Path, cached: Any = (), up: bool = True):
        self.files, self.folder, self.cached, self.up = files, folder, cached, up
        self.asked: list[Any] = []
        for name in ("hf_hub_download", "try_to_load_from_cache", "get_hf_file_metadata"):
            monkeypatch.setattr(f"huggingface_hub.{name}", getattr(self, name))

    def hf_hub_download(
        self, repo_id: str, name: str, revision: Any = None, token: Any = None, local_files_only: bool = False
    ) -> str:
        from huggingface_hub.errors import LocalEntryNotFoundError, RemoteEntryNotFoundError

        self.asked.append((repo_id, name, revision))
        if local_files_only:
            if name not in self.cached:
                raise LocalEntryNotFoundError("not in the cache")
        elif name not in self.files:
            raise RemoteEntryNotFoundError("404", response=httpx_response(404))
        return str(self.folder / name)

    def try_to_load_from_cache(self, repo_id: str, name: str, revision: Any = None) -> Any:
        from huggingface_hub import _CACHED_NO_EXIST

        return None if name in self.files else _CACHED_NO_EXIST

    def get_hf_file_metadata(self, url: str, token: Any = None, timeout: Any = None) -> None:
        assert url.startswith("http")
        assert timeout == 5
        if not self.up:
            raise ConnectionError("name not known")


def httpx_response(code: int) -> Any:
    """A response as huggingface_hub's errors want one, whichever HTTP library it uses."""
    return type("Response", (), {"status_code": code, "headers": {}, "request": None, "url": "", "text": ""})()


WHOLE = ("model.safetensors", "config.json")


def test_from_the_hub(saved: Path, tiny: MAETok, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_HUB_ETAG_TIMEOUT", raising=False)
    hub = Hub(monkeypatch, WHOLE, saved)
    same(MAETok.from_pretrained("MAETok/maetok-b-128", revision="main"), tiny)
    assert hub.asked == [("MAETok/maetok-b-128", n, "main") for n in WHOLE]
    Hub(monkeypatch, WHOLE[:1], saved)
    same(MAETok.from_pretrained("MAETok/maetok-b-128"), tiny)
    Hub(monkeypatch, (), saved)
    with pytest.raises(CheckpointError, match=r"no model\.safetensors and no pytorch_model\.bin"):
        MAETok.from_pretrained("MAETok/maetok-b-128")


def test_a_hub_that_does_not_answer(saved: Path, tiny: MAETok, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is asked once; then its cache serves, but only one that holds all files that the repository has."""
    monkeypatch.delenv("HF_HUB_ETAG_TIMEOUT", raising=False)
    Hub(monkeypatch, WHOLE, saved, cached=WHOLE, up=False)
    same(MAETok.from_pretrained("MAETok/none"), tiny)
    Hub(monkeypatch, WHOLE[:1], saved, cached=WHOLE[:1], up=False)  # it is known that there is no config.json
    same(MAETok.from_pretrained("MAETok/none"), tiny)
    for cached in ((), WHOLE[:1]):
        Hub(monkeypatch, WHOLE, saved, cached=cached, up=False)
        with pytest.raises(
            CheckpointError, match=r"MAETok/none: neither a local path .*does not answer .*name not known.*when offline"
        ):
            MAETok.from_pretrained("MAETok/none")


def test_paths_are_not_asked_of_the_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    hub = Hub(monkeypatch, (), tmp_path)
    for path in (
        "runs/last.pt",
        "runs/model.safetensors",
        "./runs/last",
        "../runs",
        "~/runs",
        "/runs/last",
        "a/b/c",
        "a",
    ):
        with pytest.raises(CheckpointError, match="no such file or directory, and not a hub repository id"):
            MAETok.from_pretrained(path)
    assert not hub.asked
