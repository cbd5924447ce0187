# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""Weights in the layouts of others: written, read back, converted by the command; statistics of diffusers' configs."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoint_models import GENERATOR, TINY, random, same
from typer.testing import CliRunner

from maetok_fast.cli import app
from maetok_fast.models import CheckpointError, LightningDiT, LightningDiTConfig, MAETok, SiT, SiTConfig, load_generator
from maetok_fast.models.checkpoints import Stored
from maetok_fast.models.checkpoints.export import EXPORTS, write_checkpoint
from maetok_fast.pipeline import LatentStatistics

MODELS: dict[str, Any] = {
    "sit": lambda: random(SiT(SiTConfig(tokens=6, label_dropout=0.2, **GENERATOR))),
    "lightningdit": lambda: random(LightningDiT(LightningDiTConfig(tokens=(4, 4), qk_norm=True, **GENERATOR))),
    "maetok": lambda: random(MAETok(TINY)),
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("to", EXPORTS)
def test_a_model_in_every_layout_comes_back(name: str, to: str, tmp_path: Path) -> None:
    model = MODELS[name]()
    channels = getattr(model.config, "channels", 6)
    statistics = (torch.arange(float(channels)), torch.ones(channels)) if to == "repa-e" else None
    if name == "maetok" and to == "repa-e":
        with pytest.raises(CheckpointError, match="of generators"):
            write_checkpoint(model, tmp_path / "out", to, statistics=statistics)
        return
    file = write_checkpoint(model, tmp_path / "out", to, steps=7, statistics=statistics)
    kind = type(model)
    if to == "safetensors":  # shows weights only: the rest is assumed, and named
        fields = {f: getattr(model.config, f) for f in ("heads", "label_dropout") if name != "maetok"}
        loaded = kind.from_pretrained(file, **({} if name == "lightningdit" else fields))
        assert all(torch.equal(v, model.state_dict()[k]) for k, v in loaded.state_dict().items())
    else:
        same(kind.from_pretrained(file), model)  # the configuration too: of config.json, or of a training file's args
        same(kind.from_pretrained(tmp_path / "out"), model)
    if to == "repa-e":
        found = LatentStatistics.beside(file)
        assert found is not None
        assert found.mean.tolist() == list(range(channels))
    with pytest.raises(CheckpointError, match="is there already"):
        write_checkpoint(model, tmp_path / "out", to, steps=7, statistics=statistics)


def test_the_layouts_are_those_of_the_field(tmp_path: Path) -> None:
    model = MODELS["sit"]()
    training = torch.load(write_checkpoint(model, tmp_path / "t", "training", steps=400_000), weights_only=False)
    assert (tmp_path / "t" / "0400000.pt").is_file()
    assert set(training) == {"model", "ema", "opt", "args", "steps"}
    assert isinstance(training["args"], argparse.Namespace)
    timm = torch.load(write_checkpoint(model, tmp_path / "timm", "timm"), weights_only=False)
    assert set(timm) == {"state_dict", "state_dict_ema", "args", "epoch"}
    write_checkpoint(model, tmp_path / "d", "diffusers")
    assert sorted(p.name for p in (tmp_path / "d").iterdir()) == ["config.json", "diffusion_pytorch_model.safetensors"]
    assert json.loads((tmp_path / "d" / "config.json").read_text())["_class_name"] == "SiT"
    with pytest.raises(ValueError, match="unknown checkpoint format 'onnx'"):
        write_checkpoint(model, tmp_path / "o", "onnx")
    with pytest.raises(CheckpointError, match="latents' statistics"):
        write_checkpoint(model, tmp_path / "o", "repa-e")
    (tmp_path / "file").write_text("x")
    with pytest.raises(CheckpointError, match="cannot be written"):
        write_checkpoint(model, tmp_path / "file", "folder")


def test_arguments_of_a_training_file_tell_what_weights_do_not(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """And where they mean something else (a size's name, another resolution), they are passed over."""
    model = random(SiT(SiTConfig(tokens=6, **GENERATOR | {"heads": 2}, label_dropout=0.3)))
    args = argparse.Namespace(
        num_heads=2, class_dropout_prob=0.3, time_convention="sit", depth="XL", input_size=[1, 2, 3], hidden_size=9,
        path=Path("x"), num_classes=10, mlp_ratio=4.0,
    )  # fmt: skip
    for kept in (args, vars(args) | {"path": "x"}):
        torch.save({"ema": model.state_dict(), "args": kept}, tmp_path / "a.pt")
        loaded = SiT.from_pretrained(tmp_path / "a.pt")
        assert (loaded.config.heads, loaded.config.label_dropout, loaded.config.time) == (2, 0.3, "sit")
    assert "assumed" not in caplog.text


def test_folders_and_names_of_others(tmp_path: Path) -> None:
    model = MODELS["maetok"]()
    inner = tmp_path / "checkpoint-5000" / "unwrapped_model"  # 1d-tokenizer
    inner.mkdir(parents=True)
    torch.save(model.state_dict(), inner / "pytorch_model.bin")
    (inner / "config.json").write_text(json.dumps(model.layout.export(model.config)))
    same(MAETok.from_pretrained(tmp_path / "checkpoint-5000"), model)
    averaged = random(MAETok(TINY), seed=3)
    averaged.save_pretrained(tmp_path / "checkpoint-5000" / "ema_model")
    same(MAETok.from_pretrained(tmp_path / "checkpoint-5000"), averaged)
    same(MAETok.from_pretrained(tmp_path / "checkpoint-5000", prefer="model"), model)
    sit = MODELS["sit"]()
    torch.save({"step": 3, "epoch": 1, "model": sit.state_dict(), "ema": sit.state_dict(), "optimizer": {},
                "scheduler": {}, "disc": {}}, tmp_path / "ep-0000001.pt")  # fmt: skip
    loaded = load_generator(tmp_path / "ep-0000001.pt", heads=4)
    assert all(torch.equal(v, sit.state_dict()[k]) for k, v in loaded.state_dict().items())


def test_other_classes_of_diffusers_are_named(tmp_path: Path) -> None:
    write_checkpoint(MODELS["sit"](), tmp_path / "t", "diffusers")
    config = tmp_path / "t" / "config.json"
    config.write_text(json.dumps({"_class_name": "DiTTransformer2DModel", "sample_size": 32}))
    with pytest.raises(CheckpointError, match="it is diffusers' DiTTransformer2DModel, which no SiT is"):
        load_generator(tmp_path / "t")


def test_a_generator_s_file_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from maetok_fast.models.checkpoints import pretrained

    write_checkpoint(MODELS["lightningdit"](), tmp_path / "g", "training")
    read, count = pretrained.read_weights, []
    monkeypatch.setattr(pretrained, "read_weights", lambda path: (count.append(path), read(path))[1])
    assert isinstance(load_generator(tmp_path / "g"), LightningDiT)
    assert len(count) == 1


# ---- statistics of diffusers' autoencoders ------------------------------------------------------------------------


def test_statistics_of_diffusers(tmp_path: Path) -> None:
    of = LatentStatistics.of_diffusers
    plain = of({"scaling_factor": 0.18215, "_class_name": "AutoencoderKL"}, "x")
    assert plain is not None
    z = torch.randn(2, 4, 3, 3)
    torch.testing.assert_close(plain.normalise(z), z * 0.18215)
    shifted = of({"scaling_factor": 0.3611, "shift_factor": 0.1159}, "x")
    assert shifted is not None
    torch.testing.assert_close(shifted.normalise(z), (z - 0.1159) * 0.3611)
    mean, std = [0.1, -0.2, 0.3, 0.0], [1.0, 2.0, 0.5, 3.0]
    wan = of({"latents_mean": mean, "latents_std": std, "_class_name": "AutoencoderKLWan"}, "x")
    assert wan is not None
    m, s = (torch.tensor(v).view(1, 4, 1, 1) for v in (mean, std))
    torch.testing.assert_close(wan.normalise(z), (z - m) / s)
    scaled = of({"latents_mean": mean, "latents_std": std, "scaling_factor": 0.5}, "x")
    assert scaled is not None
    torch.testing.assert_close(scaled.normalise(z), (z - m) * 0.5 / s)
    rae = of({"latents_mean": mean, "latents_std": std, "_class_name": "AutoencoderRAE"}, "x")
    assert rae is not None
    assert (rae.std - torch.tensor(std)).mean().item() == pytest.approx(1e-5, rel=0.05)
    # what its configuration has in other versions, beside a scaling factor of 1, which says nothing
    numbers: dict[str, Any] = {"latent_mean": mean, "latent_var": [4.0, 9.0, 1.0, 0.25], "scaling_factor": 1.0}
    other = of({**numbers, "_class_name": "AutoencoderRAE"}, "x")
    assert other is not None
    assert other.mean.tolist() == torch.tensor(mean).tolist()
    torch.testing.assert_close(other.std, (torch.tensor([4.0, 9.0, 1.0, 0.25]) + 1e-5).sqrt())
    with pytest.raises(CheckpointError, match="not known which of them count"):
        of({**numbers, "latents_std": std}, "x")
    assert of({"_class_name": "AutoencoderTiny"}, "x") is None
    with pytest.raises(CheckpointError, match="not known which comes first"):
        of({"latents_mean": mean, "shift_factor": 0.1}, "x")
    with pytest.raises(CheckpointError, match="must be numbers"):
        of({"latents_mean": "many"}, "x")


def test_statistics_are_found_in_a_diffusers_pipeline(tmp_path: Path) -> None:
    write_checkpoint(MODELS["sit"](), tmp_path / "transformer", "diffusers")
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae" / "config.json").write_text(json.dumps({"scaling_factor": 0.25}))
    found = LatentStatistics.beside(tmp_path / "transformer")
    assert found is not None
    assert found.std.item() == 4.0
    assert str(tmp_path / "vae" / "config.json") in found.source
    loaded = LatentStatistics.load(tmp_path / "vae" / "config.json")
    assert loaded.std.item() == 4.0
    (tmp_path / "vae" / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="expected latents_mean and latents_std, or scaling_factor"):
        LatentStatistics.load(tmp_path / "vae" / "config.json")
    assert LatentStatistics.beside(tmp_path / "transformer") is None


# ---- the command --------------------------------------------------------------------------------------------------


def run(*words: str) -> Any:
    return CliRunner().invoke(app, ["convert", *words])


def test_an_array_beside_a_checkpoint_makes_no_cache_of_it(tmp_path: Path) -> None:
    MODELS["sit"]().save_pretrained(tmp_path / "a")
    np.save(tmp_path / "a" / "loss.npy", np.zeros((3, 4, 4), np.float32))
    done = run(str(tmp_path / "a"), str(tmp_path / "b"), "--to", "timm")
    assert done.exit_code == 0, done.output


def test_statistics_of_a_checkpoint_that_lies_on_the_hub() -> None:
    content = {"ema": {"bn.running_mean": torch.zeros(3), "bn.running_var": torch.ones(3)}}
    found = LatentStatistics.beside("somebody/repa-e", content)
    assert found is not None
    assert found.mean.tolist() == [0, 0, 0]
    assert LatentStatistics.beside("somebody/repa-e", {"ema": {}}) is None


def test_the_command_goes_around(tmp_path: Path) -> None:
    model = MODELS["lightningdit"]()
    model.save_pretrained(tmp_path / "a")
    LatentStatistics(torch.arange(5.0), torch.arange(5.0) + 1).save(tmp_path / "a")
    for source, to in (("a", "training"), ("training", "timm"), ("timm", "diffusers"), ("diffusers", "folder")):
        done = run(str(tmp_path / source), str(tmp_path / to), "--to", to)
        assert done.exit_code == 0, done.output
        assert "LightningDiT, t = 1 data as it was" in done.output
        found = LatentStatistics.beside(tmp_path / to)
        assert found is not None, "what samples are denormalised with goes along"
        assert torch.equal(found.std, torch.arange(5.0) + 1)
    same(LightningDiT.from_pretrained(tmp_path / "folder"), model)
    done = run(str(tmp_path / "a"), str(tmp_path / "e"), "--to", "repa-e")
    assert done.exit_code == 0, done.output
    found = LatentStatistics.beside(tmp_path / "e")
    assert found is not None
    torch.testing.assert_close(found.std, torch.arange(5.0) + 1)
    assert Stored.read(tmp_path / "e").content["ema"]["bn.running_mean"].tolist() == [0, 1, 2, 3, 4]
    assert run(str(tmp_path / "e"), str(tmp_path / "back"), "--to", "folder").exit_code == 0
    found = LatentStatistics.beside(tmp_path / "back")
    assert found is not None, "out of the checkpoint's batch norm"
    torch.testing.assert_close(found.std, torch.arange(5.0) + 1)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["a", "out", "--to", "mar"], "is a checkpoint, which becomes one of folder, diffusers"),
        (["a", "out", "--to", "repa-e"], "give them with --statistics"),
        (["nothing", "out", "--to", "folder"], "no such file or directory"),
        (["a", "a", "--to", "folder"], "is there already"),
        (["a", "out", "--to", "folder", "--prefer", "best"], "prefer 'best'"),
    ],
)
def test_what_the_command_refuses(words: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    MODELS["sit"]().save_pretrained("a")
    done = run(*words)
    assert done.exit_code == 2, done.output
    assert said in done.output
    assert "Traceback" not in done.output
    assert not Path("out").exists()
