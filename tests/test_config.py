# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""maetok_fast.config: what is read is what was written, and what is wrong is named."""

from __future__ import annotations

import contextlib
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from maetok_fast.config import ConfigError, differences, read, read_yaml, to_yaml
from maetok_fast.training.configs import AuxiliaryConfig, DecoderRun, EMAConfig, TokenizerRun
from maetok_fast.training.runs import RUNS, STAGES, read_run

CONFIGS = sorted((Path(__file__).parent.parent / "configs").glob("*.yaml"))


@pytest.mark.parametrize("name", RUNS)
def test_a_run_comes_back_from_its_yaml(name: str) -> None:
    run = RUNS[name]()
    assert read(type(run)(), yaml.safe_load(to_yaml(run))) == run


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_every_configuration_file_is_a_run(path: Path) -> None:
    stage = next(name for name, kinds in STAGES.items() if type(RUNS[path.stem]()) in kinds)
    run = read_run(stage, path)
    changed = differences(RUNS[path.stem](), run)
    assert all(key.startswith("data.") for key in changed), changed


def test_there_is_a_file_for_every_run() -> None:
    assert {path.stem for path in CONFIGS} == set(RUNS)


def test_the_seven_ablations_are_a_configuration_each() -> None:
    """The paper's switches: masks, latent tokens, auxiliary decoders."""
    seen = set()
    for mask, latents, auxiliary in [(m, l, a) for m in (0, 1) for l in (0, 1) for a in (0, 1)]:
        overrides = [] if mask else ["mask.low=0", "mask.high=0"]
        overrides += [] if latents else ["model.num_latent_tokens=0"]
        overrides += [] if auxiliary else ["auxiliary.targets=[]"]
        run = read(TokenizerRun(), {}, overrides)
        seen.add((run.mask.used, run.model.num_latent_tokens > 0, bool(run.auxiliary.targets)))
    assert len(seen) == 8  # seven rows of the table, and nothing at all


def test_values_are_read_as_yaml_writes_them() -> None:
    run = read(TokenizerRun(), {}, ["optimizer.learning_rate=1e-3", "data.sizes=[256, 512]", "data.size=null"])
    assert run.optimizer.learning_rate == 1e-3  # YAML 1.1 calls this a string
    assert run.data.sizes == (256, 512)
    assert run.data.size is None


def test_an_override_lies_over_the_file() -> None:
    run = read(TokenizerRun(), {"loop": {"batch": 8, "steps": 3}}, ["loop.batch=16"])
    assert (run.loop.batch, run.loop.steps, run.loop.seed) == (16, 3, 0)


def test_mappings_of_names_are_merged() -> None:
    base = TokenizerRun(auxiliary=AuxiliaryConfig(weights={"hog": 0.5}))
    assert read(base, {}, ["auxiliary.weights.dino=2"]).auxiliary.weights == {"hog": 0.5, "dino": 2.0}


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("loop.bach=3", "loop.bach: there is no such key; did you mean loop.batch?"),
        ("lop.batch=3", "lop: there is no such key; did you mean loop?"),
        ("zzzzz=1", "zzzzz: there is no such key; the configuration has out, start, model"),
        ("loop.batch=big", "loop.batch: expected an integer, got 'big'"),
        ("loop.batch=1.5", "loop.batch: expected an integer, got 1.5"),
        ("loop.batch=true", "loop.batch: expected an integer, got True"),
        ("loop.compile=7", "loop.compile: expected true or false, got 7"),
        ("data.crop=round", "data.crop: expected 'random', 'resized', 'center' or 'adm', got 'round'"),
        ("data=here", "data: expected keys under it (path, size"),
        ("loop.batch", "'loop.batch': expected key=value"),
        ("data.path=[", "data.path: this is no YAML"),
        ("loop.batch=0", "batch must be at least 1, got 0"),
        ("model.encoder.heads=5", "model.encoder: ViTSize: dim 768"),
        ("mask.low=0.7", "mask.low must not exceed mask.high"),
        ("optimizer.betas=[0.9, 1.0]", "optimizer.betas must lie in [0, 1)"),
        ("optimizer.learning_rate=.nan", "learning_rate must be finite"),
        ("ema.dtype=bf16", "bf16 cannot hold an average of decay 0.9999"),
        ("auxiliary.weights.sift=1", "auxiliary.weights names sift, which is none of hog, dino, clip"),
    ],
)
def test_what_is_wrong_is_named(override: str, said: str) -> None:
    with pytest.raises(ConfigError) as error:
        read(TokenizerRun(), {}, [override])
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_a_bf16_average_that_can_move_is_taken() -> None:
    assert EMAConfig(decay=0.9, dtype="bf16").dtype == "bf16"


def test_decoder_fine_tuning_has_no_auxiliary_decoders() -> None:
    with pytest.raises(ConfigError, match="decoder fine-tuning has none"):
        read(DecoderRun(), {}, ["auxiliary.targets=[hog]"])


def test_a_file_of_another_stage_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("run: decoder_256\n")
    with pytest.raises(ConfigError, match="is a run of the stage decoder: maetok-fast train decoder"):
        read_run("tokenizer", path)


@pytest.mark.parametrize(
    ("text", "said"),
    [("- 1\n- 2\n", "expected `key: value` lines, got list"), ("a: [\n", "no YAML in line 2"), ("1: 2\n", "lines")],
)
def test_a_file_that_is_no_configuration_is_named(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as error:
        read_yaml(path)
    assert said in str(error.value)
    assert str(path) in str(error.value)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not exist"):
        read_yaml(tmp_path / "none.yaml")


def test_differences_are_told_by_key() -> None:
    one = TokenizerRun()
    other = read(one, {}, ["loop.batch=8", "auxiliary.weights.hog=2"])
    assert differences(one, other) == {"loop.batch": (512, 8), "auxiliary.weights.hog": (None, 2.0)}
    assert differences(one, dataclasses.replace(one)) == {}


_VALUES: Any = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


@given(st.dictionaries(st.sampled_from(["out", "data", "loop", "model", "ema", "mask", "x"]), _VALUES, max_size=4))
def test_any_tree_is_read_or_refused_in_a_sentence(tree: dict[str, Any]) -> None:
    with contextlib.suppress(ConfigError):  # and nothing else
        assert to_yaml(read(TokenizerRun(), tree))


@given(st.text(max_size=40))
def test_any_override_is_read_or_refused_in_a_sentence(text: str) -> None:
    with contextlib.suppress(ConfigError):
        assert read(TokenizerRun(), {}, [f"loop.seed={text}"]).loop.seed >= 0
