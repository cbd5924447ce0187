# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""benchmarks/generator.py: the public side is the same mathematics, and the table adds up."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

sys.path.append(str(Path(__file__).resolve().parent.parent))

from benchmarks import generator
from benchmarks.baselines.generator import PublicGeneratorStep

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")
TINY = ["--model", "tiny", "--tokens", "8", "--batch", "2", "--precision", "fp32"]


def arguments(*more: str):
    return generator.parse([*TINY, *more])


def test_both_sides_give_one_velocity_and_one_gradient_from_the_same_weights():
    args = arguments()
    ours, public = (generator.make(side, args, CPU) for side in ("ours", "public"))
    state = dict(ours.stage.averaged.state_dict())
    generator_ = torch.Generator().manual_seed(0)
    for name, p in state.items():
        if name != "pos_embed":
            p.copy_(0.05 * torch.randn(p.shape, generator=generator_))
    public.model.load_state_dict(state)
    x, t, y = torch.randn(2, 8, 32), torch.rand(2), torch.tensor([1, 2])
    found = []
    for model in (ours.stage.averaged.eval(), public.model.eval()):
        v = model(x, t, y)
        F.mse_loss(v, x).backward()
        found.append([v, *[p.grad for name, p in sorted(model.named_parameters()) if p.grad is not None]])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-4)


def test_the_public_step_moves_weights_and_average():
    step = PublicGeneratorStep({"shape": (8, 32), "depth": 2, "dim": 32, "heads": 2})
    before, average = (next(iter(m.blocks)).mlp.fc1.weight.clone() for m in (step.model, step.ema))
    z, y = torch.randn(2, 8, 32), torch.tensor([0, 5])
    first = step(z, y)
    weight = next(iter(step.model.blocks)).mlp.fc1.weight
    assert not torch.equal(weight, before)
    want = 0.9999 * average + (1 - 0.9999) * weight
    torch.testing.assert_close(next(iter(step.ema.blocks)).mlp.fc1.weight, want)
    assert step.null == 1000
    assert set(step.timings) == set(generator.PARTS)
    assert first > 0


def test_our_step_is_timed_by_parts_and_routing_multiplies_less():
    args = arguments()
    counts = {side: generator.gemm_flops(args, side) for side in generator.SIDES}
    assert counts["ours"] == counts["public"]
    assert counts["routed"] < counts["ours"]
    for side in ("ours", "routed"):
        step = generator.make(side, args, CPU)
        before = step.stage.averaged.blocks[0].mlp.fc1.weight.clone()
        step.stage.averaged.blocks[0].adaLN_modulation[1].weight.data.normal_(0, 0.1)
        step.stage.averaged.final_layer.linear.weight.data.normal_(0, 0.1)
        step(torch.randn(2, 8, 32), torch.tensor([0, 5]))
        assert not torch.equal(before, step.stage.averaged.blocks[0].mlp.fc1.weight)
        assert set(step.timings) == {"forward", "backward", "optimizer"}


def test_ratios_are_of_rounds_and_the_table_names_them():
    def rows(*seconds: float, built: int | None = 10**9):
        parts = [dict.fromkeys(generator.PARTS, 0.25) for _ in seconds]
        return {
            "seconds": list(seconds), "parts": parts, "built": built, "steps": 10**9,
            "gemm_tflops": [0.5 for _ in seconds],
        }  # fmt: skip

    found = {"ours": rows(1.0, 2.0), "public": rows(3.0, 4.0, built=None)}
    assert generator.against(arguments(), found, "ours", "public").median == 2.5
    assert generator.against(arguments("--apart"), found, "ours", "public").median == 3.5 / 1.5
    text = "\n".join(generator.table(arguments(), found, {"ours": 5e11, "public": 5e11}))
    assert "ours against public: 2.50 x (2.25 .. 2.75)" in text
    assert [line.split()[-2:] for line in text.splitlines() if "peak" in line] == [["2.00", "-"]]
    assert [line.split()[-2:] for line in text.splitlines() if "share of products" in line] == [["66.7", "28.6"]]


def test_sides_step_in_processes_of_their_own_in_turn(capsys, tmp_path: Path):
    generator.main([*TINY, "--rounds", "2", "--sides", "ours", "routed", "--json", str(tmp_path / "a.json")])
    assert "routed against ours" in capsys.readouterr().out
    found = json.loads((tmp_path / "a.json").read_text())
    assert all(len(found["rows"][side]["seconds"]) == 2 for side in ("ours", "routed"))
    assert found["ratios"]["routed/ours"]["samples"] == 2
    assert found["rows"]["ours"]["built"] > 0
    args = arguments()
    args.model = "huge"
    with pytest.raises(RuntimeError, match=r"ours: .*huge"):
        generator.Side("ours", args)
