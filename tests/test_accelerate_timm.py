# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""`maetok_fast.accelerate` on timm's own models, where timm is installed (the extra `train`)."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import maetok_fast
from maetok_fast._accelerate.fast import Fast
from maetok_fast.kernels import _native

timm = pytest.importorskip("timm")
pytestmark = pytest.mark.usefixtures("one_thread")

MODELS = {
    "vit_tiny_patch16_224": {"img_size": 64},
    "deit3_small_patch16_224": {"img_size": 64},
    "vit_small_patch14_dinov2": {"img_size": 56},
    "vit_small_patch14_reg4_dinov2": {"img_size": 56},
    "eva02_tiny_patch14_224": {"img_size": 56},
    "eva02_base_patch14_224": {"img_size": 56},
    "vit_small_patch16_dinov3": {"img_size": 64},
    "vit_small_patch16_dinov3_qkvb": {"img_size": 64},
    "vit_small_patch16_rope_mixed_224": {"img_size": 64},
    "vit_small_patch16_rope_224": {"img_size": 64},
}


def relative(got: torch.Tensor, want: torch.Tensor) -> float:
    return ((got.double() - want.double()).norm() / want.double().norm()).item()


@pytest.mark.parametrize("name", MODELS)
def test_every_block_is_swapped(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Training and inference, without a call of timm's own blocks; errors as timm's own in fp32 against fp64."""
    if name not in timm.list_models():
        pytest.skip(f"this timm has no {name}")
    torch.manual_seed(0)
    model: Any = timm.create_model(name, depth=2, num_classes=7, **MODELS[name]).eval()
    for p in model.parameters():
        nn.init.normal_(p, 0.5 if p.ndim == 1 else 0.0, 0.05)
    x = torch.randn(2, 3, MODELS[name]["img_size"], MODELS[name]["img_size"])
    with torch.no_grad():
        exact, plain = copy.deepcopy(model).double()(x.double()), model(x)
    limit = 2 * relative(plain, exact) + 2 * torch.finfo(torch.float32).eps
    keys = list(model.state_dict())
    for for_inference in (False, True):
        report = maetok_fast.accelerate(model, for_inference=for_inference, quiet=True)
        assert not report.kept, report
        packed = for_inference and _native.why_missing() is None
        kinds = [kind for _, kind in report.swapped.values()]
        assert kinds.count("PackedBlock" if packed else "FastBlock") == 2
        for kind in {type(m).fast_original for m in model.modules() if isinstance(m, Fast)} - {nn.Linear}:
            monkeypatch.setattr(kind, "forward", lambda *a, **k: pytest.fail("the original's forward ran"))
        got = model(x)
        monkeypatch.undo()
        assert got.requires_grad != for_inference
        assert relative(got.detach(), exact) <= limit
        assert list(model.state_dict()) == keys
    maetok_fast.restore(model)
    with torch.no_grad():
        assert torch.equal(model(x), plain)
