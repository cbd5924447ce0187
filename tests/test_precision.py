# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""`resolve`, the only door to a precision: what "auto" chooses, what it says, and what emulated bf16 costs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings

import pytest
import torch
from torch import nn

from maetok_fast import precision
from maetok_fast.kernels import _native, _processor
from maetok_fast.layers import Modulation
from maetok_fast.precision import Precision, resolve, to_fp8, why_bf16_is_emulated

LIMITS = ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS", "ATEN_CPU_CAPABILITY", "MAETOK_FAST_CPU")
# What oneDNN calls each level in its own log, where the processor has more.
ONEDNN = {"v2": "SSE4.1", "avx2": "AVX2", "avx512": "AVX512", "avx512bf16": "bfloat16"}
PROBE = """
import json, warnings
import torch
import maetok_fast.kernels
from maetok_fast.kernels import _native, _processor
from maetok_fast.precision import resolve
torch.ops.mkldnn._reorder_linear_weight(torch.ones(64, 64))
auto = resolve("auto")
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for setting in ("bf16", torch.bfloat16, resolve("bf16"), "fp32", "auto"):
        resolve(setting)
own = _native.own_level()
print(json.dumps({"auto": auto.name, "why": auto.why, "warnings": [str(w.message) for w in caught],
    "level": _native.level(), "library": _native.lib().cpu_variant() if _native.why_missing() is None else None,
    "onednn": _processor.onednn_level(own), "torch": torch.backends.cpu.get_cpu_capability()}))
"""


def below(level: str) -> None:
    own = _native.own_level()
    if own not in _processor.LEVELS or _processor.LEVELS.index(level) > _processor.LEVELS.index(own):
        pytest.skip(f"this processor is {own}")


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")
@pytest.mark.parametrize("level", ["v2", "avx2", "avx512", "avx512bf16"])
def test_one_switch_limits_all_libraries_and_auto_follows(level: str) -> None:
    below(level)
    clean = {k: v for k, v in os.environ.items() if k not in LIMITS}
    done = subprocess.run(
        [sys.executable, "-c", PROBE],
        capture_output=True,
        text=True,
        check=False,
        env={**clean, "MAETOK_FAST_CPU": level, "ONEDNN_VERBOSE": "1"},
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    found = json.loads(next(line for line in lines if line.startswith("{")))
    (isa,) = [line for line in lines if "info,cpu,isa:" in line]
    assert found["level"] == found["onednn"] == level
    assert found["library"] in (level, None)
    assert ONEDNN[level].lower() in isa.lower()
    assert found["torch"] == {"v2": "DEFAULT", "avx2": "AVX2"}.get(level, "AVX512")
    fast = level == "avx512bf16"
    # some processors have the instructions of this level, slower than fp32's
    assert found["auto"] in (("bf16", "fp32") if fast else ("fp32",))
    assert found["why"].startswith(f"precision auto: {found['auto']} on cpu: ")
    assert level in found["why"]
    assert len(found["warnings"]) == (0 if fast else 1), "a warning once, and only where bf16 is emulated"
    for text in found["warnings"]:
        assert "bf16 is emulated on this device: a linear layer takes " in text
        assert "x of fp32's time" in text
        assert "use precision='auto' or 'fp32'" in text


@pytest.mark.parametrize(
    ("variable", "level"),
    [("", "amx"), ("AVX2", "avx2"), ("avx512_core", "avx512"), ("AVX512_CORE_AMX", "amx"), ("nonsense", "amx")],
)
def test_onednn_is_judged_by_its_own_variable(variable: str, level: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in LIMITS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", variable)
    assert _processor.onednn_level("amx") == level
    assert _processor.onednn_level("v2") == "v2"
    assert _processor.onednn_level("generic") == "generic"
    precision._automatic.cache_clear()
    monkeypatch.setattr(_native, "own_level", lambda: "amx")
    monkeypatch.setattr(_native, "level", lambda: "amx")
    if torch.backends.mkldnn.is_available():
        assert resolve("auto").name == ("bf16" if level in ("avx512bf16", "amx") else "fp32")
    precision._automatic.cache_clear()


def test_a_set_variable_of_a_library_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in LIMITS:
        monkeypatch.delenv(name, raising=False)
    _processor.limit_libraries()
    assert "ONEDNN_MAX_CPU_ISA" not in os.environ
    monkeypatch.setenv("MAETOK_FAST_CPU", "avx2")
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "SSE41")
    monkeypatch.setenv("MKL_ENABLE_INSTRUCTIONS", "")  # monkeypatch puts back what was there
    monkeypatch.delenv("MKL_ENABLE_INSTRUCTIONS")
    monkeypatch.setenv("ATEN_CPU_CAPABILITY", "")
    monkeypatch.delenv("ATEN_CPU_CAPABILITY")
    _processor.limit_libraries()
    assert os.environ["ONEDNN_MAX_CPU_ISA"] == "SSE41"
    assert os.environ["MKL_ENABLE_INSTRUCTIONS"] == "AVX2"
    assert os.environ["ATEN_CPU_CAPABILITY"] == "avx2"


def test_auto_by_device(monkeypatch: pytest.MonkeyPatch) -> None:
    precision._automatic.cache_clear()
    assert resolve("auto", "meta").name == "fp32"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for capability, name in (((7, 5), "fp32"), ((8, 0), "bf16"), ((9, 0), "bf16")):
        precision._automatic.cache_clear()
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, c=capability: c)
        chosen = resolve("auto", "cuda")
        assert chosen.name == name
        assert (why_bf16_is_emulated("cuda") is None) == (name == "bf16")
        assert "\n" not in chosen.why
    precision._automatic.cache_clear()


def test_the_choice_is_said_and_kept(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", logger="maetok_fast"):
        chosen = resolve()
    assert caplog.messages == [chosen.why]
    assert resolve(chosen) is chosen, "what was chosen keeps its reason"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert chosen == resolve(chosen.name)
        assert resolve(Precision("fp32", torch.float32)).why == ""


def test_reasons_of_to_fp8_are_true_of_the_layer() -> None:
    """A modulation with a row per token is a layer like any other; one with a row per image is not."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.adaLN_modulation = Modulation(32, 64)
            self.small_modulation = Modulation(32, 64)
            self.movq = nn.ModuleDict({"adaLN_modulation": Modulation(32, 64)})
            self.movq["adaLN_modulation"].per_token = True

    model = Model()
    rows = {row.name: row.reason for row in to_fp8(model, min_features=16, emulate=True).rows}
    assert "a row per image" in str(rows["adaLN_modulation.1"])
    assert "a row per image" in str(rows["small_modulation.1"])
    assert rows["movq.adaLN_modulation.1"] is None
    rows = {row.name: row.reason for row in to_fp8(Model(), min_features=128, emulate=True).rows}
    assert "fewer than 128 features" in str(rows["movq.adaLN_modulation.1"])
