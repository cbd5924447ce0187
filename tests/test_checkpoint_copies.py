# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""Which copy of the weights a training file gives, under which prefix, and what is said where it gives none."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_models import TINY, random, same
from safetensors.torch import save_file

from maetok_fast.models import CheckpointError, MAETok, SiT, SiTConfig


@pytest.fixture
def tiny() -> MAETok:
    return random(MAETok(TINY))


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


CONFIG = SiTConfig(tokens=6, channels=5, dim=16, depth=1, heads=2, num_classes=10, qk_norm=True)


@pytest.fixture
def pair(tmp_path: Path) -> tuple[SiT, SiT]:
    """(raw, averaged)"""
    return random(SiT(CONFIG), 1), random(SiT(CONFIG), 2)


def load(content: Any, path: Path, **kwargs: Any) -> SiT:
    torch.save(content, path / "last.pt")
    # what no file without a config.json shows, so that only warnings about copies are left
    return SiT.from_pretrained(path / "last.pt", num_classes=10, label_dropout=0.1, time="maetok", **kwargs)


@pytest.mark.parametrize(
    ("raw", "averaged"),
    [
        ("model", "ema"),
        ("state_dict", "state_dict_ema"),
        ("model", "model_ema"),
        ("model_state_dict", "ema_state_dict"),
        ("model", "ema_model"),
        ("model_state_dict", "ema_model_state_dict"),
        ("params", "params_ema"),
        ("net", "ema_0.9999"),
        ("generator", "averaged_model"),
        ("model", "modelEMA"),
        ("state_dict", "swa"),
    ],
)
def test_averaged_copies_under_usual_names(
    raw: str, averaged: str, pair: tuple[SiT, SiT], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    content = {"epoch": 3, raw: pair[0].state_dict(), averaged: pair[1].state_dict(), "optimizer": {"state": {}}}
    for prefer, model in (("model", pair[0]), ("ema", pair[1])):
        same(load(content, tmp_path, prefer=prefer), model)
        same(load({"state_dict": content}, tmp_path, prefer=prefer), model)
        same(load(dict(reversed(content.items())), tmp_path, prefer=prefer), model)
    assert not caplog.records


def test_a_file_without_the_wanted_copy_says_so(
    pair: tuple[SiT, SiT], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    raw, averaged = (model.state_dict() for model in pair)
    # a list of values without names, as diffusers' EMAModel keeps it, is no copy
    same(load({"model": raw, "ema": {"decay": 0.99, "shadow_params": [*averaged.values()]}}, tmp_path), pair[0])
    assert "last.pt: no averaged weights under a usual name" in caplog.text
    assert "took the raw ones, 'model'" in caplog.text
    caplog.clear()
    same(load({"ema": averaged}, tmp_path, prefer="model"), pair[1])
    assert "no raw weights under a usual name" in caplog.text
    assert "took the averaged ones, 'ema'" in caplog.text
    caplog.clear()
    for prefer in ("ema", "model"):  # weights by themselves are what they are
        same(load(raw, tmp_path, prefer=prefer), pair[0])
        same(load({f"module.{k}": v for k, v in raw.items()}, tmp_path, prefer=prefer), pair[0])
    assert not caplog.records
    same(load({f"ema_model.{k}": v for k, v in averaged.items()}, tmp_path, prefer="model"), pair[1])
    assert "took the averaged ones, 'ema_model.*'" in caplog.text


def test_two_copies_of_one_kind_are_not_chosen_between(pair: tuple[SiT, SiT], tmp_path: Path) -> None:
    raw, averaged = (model.state_dict() for model in pair)
    with pytest.raises(CheckpointError, match=r"SiT weights are there twice, as 'ema_0\.99' and 'ema_0\.999'; save"):
        load({"model": raw, "ema_0.99": averaged, "ema_0.999": raw}, tmp_path)
    same(load({"model": raw, "ema_0.99": averaged, "ema": averaged}, tmp_path), pair[1])


def test_an_optimizer_that_names_its_moments_is_no_copy(pair: tuple[SiT, SiT], tmp_path: Path) -> None:
    raw, averaged = (model.state_dict() for model in pair)
    same(load({"model": raw, "optimizer": {"exp_avg": averaged}, "opt": {"ema": averaged}}, tmp_path), pair[0])


@pytest.mark.parametrize(
    "prefix",
    [
        "module.",
        "_orig_mod.",
        "module._orig_mod.",
        "_orig_mod.module.",
        "model.",
        "net.",
        "ema_model.",
        "model.module.",
    ],
)
def test_prefixes_of_wrappers(prefix: str, pair: tuple[SiT, SiT], tmp_path: Path) -> None:
    state = {prefix + k: v for k, v in pair[0].state_dict().items()}
    same(load(state, tmp_path), pair[0])
    same(load({"state_dict": {"ema": state}}, tmp_path), pair[0])
    save_file(state, tmp_path / "a.safetensors")
    same(SiT.from_pretrained(tmp_path / "a.safetensors"), pair[0])
    with pytest.raises(CheckpointError, match=r"unexpected \(1\): loss\.weight"):
        load({**state, "loss.weight": torch.zeros(1)}, tmp_path)
    same(load({**state, "loss.weight": torch.zeros(1)}, tmp_path, allow="loss.*"), pair[0])


def test_wrappers_as_they_are(pair: tuple[SiT, SiT], tmp_path: Path) -> None:
    """torch's own wrappers, whole and block by block."""
    averaged = torch.optim.swa_utils.AveragedModel(pair[1])
    compiled = torch.compile(pair[0], backend="eager")
    assert any(k.startswith("module.") for k in averaged.state_dict())
    assert all(k.startswith("_orig_mod.") for k in compiled.state_dict())
    content = {"model": compiled.state_dict(), "ema": averaged.state_dict()}
    same(load(content, tmp_path), pair[1])
    same(load(content, tmp_path, prefer="model"), pair[0])
    blocks = random(SiT(CONFIG), 1)
    blocks.blocks[0] = torch.compile(blocks.blocks[0], backend="eager")
    assert any("blocks.0._orig_mod." in k for k in blocks.state_dict())
    same(load(blocks.state_dict(), tmp_path), pair[0])


def test_two_copies_in_one_dictionary(pair: tuple[SiT, SiT], tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Lightning's modules and ema-pytorch hold both as submodules."""
    raw, averaged = (model.state_dict() for model in pair)
    for first, second in (("model.", "ema_model."), ("model.", "model_ema."), ("net.", "ema_model.module.")):
        state = {first + k: v for k, v in raw.items()} | {second + k: v for k, v in averaged.items()}
        state |= {"step": torch.tensor(4), "initted": torch.tensor(True)}
        same(load({"state_dict": state}, tmp_path), pair[1])
        same(load({"state_dict": state}, tmp_path, prefer="model"), pair[0])
    assert not caplog.records


def test_what_a_file_holds_is_said_where_it_fits_no_layout(pair: tuple[SiT, SiT], tmp_path: Path) -> None:
    raw = pair[0].state_dict()
    with pytest.raises(CheckpointError) as caught:
        load({f"diffusion.net.{k}": v for k, v in raw.items()}, tmp_path)
    assert "last.pt: no SiT checkpoint: key 'final_layer.linear.weight' is missing; it holds" in str(caught.value)
    assert f"{len(raw)} keys, all under 'diffusion.net.' (diffusion.net.pos_embed, " in str(caught.value)
    with pytest.raises(CheckpointError, match=r"1 key \(steps\); 'vae' with 2 keys \(a\.b, c\); 'opt' with 0 keys$"):
        load({"vae": {"a.b": torch.zeros(1), "c": torch.zeros(1)}, "opt": {}, "steps": 1}, tmp_path)
    # the mark is there, the next key is not
    with pytest.raises(CheckpointError, match=r"key 'x_embedder\.proj\.weight' is missing; it holds \d+ keys \(pos_em"):
        load({k: v for k, v in raw.items() if not k.startswith("x_embedder")}, tmp_path)
