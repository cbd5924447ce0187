# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""Races and their file: who wins, what is kept, and that nothing which lies in the file can hurt."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from maetok_fast.inference import prepare
from maetok_fast.kernels import _native, _tune, linear, pays
from maetok_fast.kernels.linear import _race
from maetok_fast.kernels.packed_linear import PackedLinear, candidates
from maetok_fast.models import SiT, SiTConfig


@pytest.fixture(autouse=True)
def own_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MAETOK_FAST_CACHE", str(tmp_path))
    monkeypatch.delenv(_tune.SWITCH, raising=False)
    monkeypatch.setattr(_tune, "_tables", {})
    monkeypatch.setattr(_tune, "SECONDS", 1e-4)
    return tmp_path / "tune.json"


def sleeps(seconds: float, calls: list[float] | None = None) -> Callable[[], None]:
    def call() -> None:
        time.sleep(seconds)
        if calls is not None:
            calls.append(seconds)

    return call


def forget() -> None:
    """As a new process."""
    _tune._tables.clear()


def test_the_fastest_is_taken_once_and_kept(own_file: Path) -> None:
    calls: list[float] = []
    ways = {"slow": sleeps(0.02, calls), "fast": sleeps(0.001, calls)}
    assert _tune.fastest("a", ways, "slow") == "fast"
    ran = len(calls)
    for _ in range(2):
        assert _tune.fastest("a", ways, "slow") == "fast"
        forget()
    assert len(calls) == ran, "measured again"
    document = json.loads(own_file.read_text())
    (machine,) = document
    assert machine == _tune.machine_key()
    assert str(torch.__version__) in machine
    assert _native.level() in machine
    assert set(document[machine]["a"]["milliseconds"]) == {"slow", "fast"}
    assert _tune.results()["a"]["choice"] == "fast"
    assert os.listdir(own_file.parent) == ["tune.json"], "nothing half-written is left"


@pytest.mark.parametrize(("other", "taken"), [(0.94, "other"), (0.96, "first"), (1.2, "first")])
def test_noise_decides_nothing(other: float, taken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_tune, "_race", lambda candidates: {"first": 1.0, "other": other, "third": 2.0})
    ways = dict.fromkeys(("first", "other", "third"), lambda: None)
    assert _tune.fastest("a", ways, "first") == taken
    assert _tune.results()["a"]["choice"] == taken


def test_other_candidates_are_another_race() -> None:
    assert _tune.fastest("a", {"slow": sleeps(0.01), "fast": sleeps(0.0)}, "slow") == "fast"
    assert _tune.fastest("a", {"slow": sleeps(0.01), "slower": sleeps(0.02)}, "slower") == "slow"
    assert _tune.fastest("b", {"only": lambda: 1 / 0}, "only") == "only", "nothing to run against"


def test_switched_off(own_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(_tune.SWITCH, "0")
    assert _tune.fastest("a", {"x": lambda: 1 / 0, "y": lambda: 1 / 0}, "y") == "y"
    assert _tune.fastest("a", {"x": lambda: 1 / 0, "y": lambda: 1 / 0}, "gone") == "x"
    assert _tune.results() == {}
    assert not own_file.exists()


JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


@settings(max_examples=60, deadline=None)
@given(JSON | st.dictionaries(st.just("machine"), st.dictionaries(st.just("a"), JSON)), st.binary(max_size=40))
def test_whatever_the_file_holds(document: Any, junk: bytes) -> None:
    text = json.dumps(document).replace('"machine"', json.dumps(_tune.machine_key()))
    for content in (text.encode(), junk, text.encode()[:-1]):
        _tune.path().write_bytes(content)
        forget()
        assert _tune.fastest("a", {"slow": sleeps(0.001), "fast": lambda: None}, "slow") == "fast"
        assert json.loads(_tune.path().read_text())[_tune.machine_key()]["a"]["choice"] == "fast"


def test_a_folder_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("MAETOK_FAST_CACHE", str(tmp_path / "file" / "below"))
    assert _tune.fastest("a", {"slow": sleeps(0.01), "fast": lambda: None}, "slow") == "fast"
    assert _tune.results()["a"]["choice"] == "fast", "kept by the process all the same"


def test_layers_of_one_shape_race_once(own_file: Path) -> None:
    able = candidates(torch.float32, torch.float32, torch.device("cpu"))
    if len(able) < 2:
        pytest.skip("one backend only")
    first = PackedLinear(torch.randn(96, 64), torch.randn(96), "gelu")
    kept = own_file.read_text()
    second = PackedLinear(torch.randn(96, 64), None, "gelu")
    assert first.backend == second.backend in able
    assert own_file.read_text() == kept
    assert set(_tune.results()) == {"linear 64 -> 96 gelu, fp32 by fp32"}


def test_a_prepared_model_says_what_won() -> None:
    model = SiT(SiTConfig(tokens=8, channels=8, dim=64, depth=2, heads=2, num_classes=5))
    fast = prepare(model, "fp32")
    lines = repr(fast).splitlines()
    assert lines[0].startswith("PreparedGenerator(SiTConfig")
    won = {m.backend for m in fast.model.modules() if isinstance(m, PackedLinear)}
    assert any("  2 x 64 -> 192 none: " in line for line in lines)
    assert all(any(line.endswith(f": {backend}") for backend in won) for line in lines[1:])


@pytest.mark.skipif(_native.why_missing() is not None, reason="native library missing")
def test_training_takes_the_winner(monkeypatch: pytest.MonkeyPatch) -> None:
    x, w = torch.randn(2, 80, 64), torch.randn(48, 64, requires_grad=True)
    raced: list[str] = []
    monkeypatch.setattr(_tune, "fastest", lambda key, ways, otherwise: raced.append(key) or "native")
    _race.cache_clear()
    assert pays(x, w, "gelu")
    assert raced == ["training linear 64 -> 48 gelu, fp32, 128 rows"]
    assert not pays(x[:1], w, "gelu"), "too few rows"
    assert not pays(x.double(), w, "gelu")
    with torch.no_grad():
        assert not pays(x, w, "gelu")
    assert not torch.compile(lambda: torch.tensor(pays(x, w, "none")), backend="eager")()
    with torch.autocast("cpu", torch.bfloat16):
        assert pays(x, w, "none")
        y = linear(x, w)
        assert y.dtype == torch.bfloat16
    assert raced[-1] == "training linear 64 -> 48 none, bf16, 128 rows"
    _race.cache_clear()


def test_both_ways_of_training_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """The race itself, and a model whose layers all take the op: the same gradients as torch's."""
    if _native.why_missing() is not None:
        pytest.skip("native library missing")
    _race.cache_clear()
    assert _race(128, 32, 48, torch.float32, "gelu", 1) in ("native", "torch")
    model = SiT(SiTConfig(tokens=32, channels=8, dim=64, depth=2, heads=2, num_classes=5, label_dropout=0.0))
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.copy_(torch.randn_like(p) * 0.1)
    x, t, y = torch.randn(4, 32, 8), torch.rand(4), torch.tensor([0, 1, 2, 3])
    found = []
    for winner in ("torch", "native"):
        _race.cache_clear()
        monkeypatch.setattr(_tune, "fastest", lambda *a, winner=winner: winner)
        model.zero_grad()
        model(x, t, y).square().sum().backward()
        found.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    _race.cache_clear()
    assert found[0].keys() == found[1].keys()
    for name, grad in found[0].items():
        torch.testing.assert_close(found[1][name], grad, rtol=1e-4, atol=1e-4 * grad.abs().max().item(), msg=name)
