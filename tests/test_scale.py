# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""What an epoch is said to cost: formulas against hand-computed numbers, and against what four real processes move."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scale_ranks import MODEL, PARTS, WORLD
from typer.testing import CliRunner

from maetok_fast.models import SiT
from maetok_fast.training import work as counted
from maetok_fast.training.scale import (
    DEVICES,
    Estimate,
    Plan,
    cache_bytes,
    checkpoint_bytes,
    exposed_bytes,
    link_rate,
    memory,
    moved_bytes,
)
from maetok_fast.training.work import Weight, Work, shapes

ROOT = Path(__file__).resolve().parent.parent
SIT_XL, TRAINED = 675_000_608, 675_000_608 - 128 * 1152  # its positions are fixed


def a_work(**changes: Any) -> Work:
    """Two blocks of one matrix and one bias each, a root of one matrix and one frozen table with a single row."""
    weights = [Weight(64, 32, True, b) for b in (1, 2)] + [Weight(64, 1, True, b) for b in (1, 2)]
    weights += [Weight(10, 32, True, 0), Weight(1, 256, False, 0)]
    given = {
        "name": "small", "flops": 1e9, "weights": tuple(weights), "averaged": 4800, "width": 1000, "latent": 64,
        "images": True, "batch": 64, "checkpoint_every": 100, "steps": 1000,
    }  # fmt: skip
    return Work(**{**given, **changes})


# ---- formulas, by hand ---------------------------------------------------------------------------------------------


def test_bytes_that_a_rank_sends_by_hand() -> None:
    work = counted.generator()
    assert moved_bytes(work, 8) == pytest.approx(2 * 7 / 8 * 4 * TRAINED)
    root = sum(w.rows * w.width for w in work.weights if not w.block and w.rows > 1)
    # 1001 classes and one row of positions are filled up to 8 ranks; all other rows are multiples of 8
    root += 7 * 1152 + 8 * 128 * 1152
    blocks = SIT_XL - sum(w.rows * w.width for w in work.weights if not w.block)
    assert moved_bytes(work, 8, "fsdp") == pytest.approx(7 / 8 * 4 * (3 * blocks + 2 * root - 8 * 128 * 1152))
    small = a_work(replicated=100)
    assert moved_bytes(small, 4) == 2 * 0.75 * 4 * (2 * 64 * 33 + 320 + 100)
    gathered, scattered = 2 * 2 * 64 * 33 + 12 * 32 + 4 * 256, 2 * 64 * 33 + 12 * 32
    assert moved_bytes(small, 4, "fsdp", 3) == 0.75 * 4 * (3 * gathered + scattered) + 2 * 0.75 * 4 * 100
    assert moved_bytes(small, 1) == moved_bytes(small, 1, "fsdp") == 0
    assert moved_bytes(counted.encoder(), 64) == 0  # no training


def test_a_step_of_sit_xl_by_hand() -> None:
    found = Estimate(Plan(counted.generator(), gpus=64))
    assert found.plan.step_batch == 2048
    assert 32 / found.compute == pytest.approx(1130, rel=1e-3)  # images/s at 40 % of 989.4 TFLOP/s
    assert found.optimizer == pytest.approx(40 * TRAINED / 3.35e12)
    assert found.communication == pytest.approx(2 * 63 / 64 * 4 * TRAINED / 400e9)
    assert found.exposed == pytest.approx(2 * 63 / 64 * 25 * 2**20 / 400e9)  # all but the last bucket hides
    assert found.step == pytest.approx(found.compute + found.optimizer + found.exposed)
    assert found.steps == 626
    assert found.checkpoint == 4 * (2 * SIT_XL + 2 * TRAINED)
    assert found.writing == found.checkpoint / 2e9
    assert found.epoch == pytest.approx(1_281_167 / 2048 * (found.step + found.writing / 10_000))
    assert found.gpu_hours == pytest.approx(64 * found.epoch / 3600)
    assert found.run == pytest.approx(4e6 * (found.step + found.writing / 10_000))
    assert Estimate(replace(found.plan, price=2.0)).cost == 2 * found.gpu_hours
    assert found.read == 1_281_167 * (128 * 32 * 4 + 8)
    assert found.cache == cache_bytes(1_281_167, 128 * 32) == 1_281_167 * (128 * 32 * 4 * 2 + 8 + 8)
    assert cache_bytes(10, 4096, 2, flips=False) == 10 * (8192 + 16)


def test_communication_that_the_backward_pass_does_not_hide_counts() -> None:
    work = counted.generator()
    found = Estimate(Plan(work, gpus=64, batch=256))
    assert found.exposed == pytest.approx(found.communication - found.compute * 2 / 3)
    assert found.bound == "network"
    parts = Estimate(Plan(work, gpus=64, batch=512, accumulate=2))
    assert parts.exposed == pytest.approx(parts.communication - parts.compute / 3)
    assert exposed_bytes(a_work(), 4) == 2 * 0.75 * 4 * a_work().trained  # less than a bucket: nothing hides


def test_the_slower_link_counts() -> None:
    device = DEVICES["H100"]
    assert link_rate(device, 8) == 450e9
    assert link_rate(device, 9) == link_rate(device, 512) == 400e9
    assert link_rate(device._replace(network=900e9), 16) == 450e9
    assert Plan(a_work(), gpus=16, network=50e9).node.network == 50e9


def test_data_that_comes_too_slowly_is_what_bounds() -> None:
    cache = counted.encoder()
    assert Estimate(Plan(cache, gpus=8)).bound == "arithmetic"
    slow = Estimate(Plan(cache, gpus=8, decode=124))
    assert slow.bound == "decoding"
    assert slow.rate == 8 * 14 * 124
    far = Estimate(Plan(cache, gpus=512))
    assert far.bound == "reading"
    assert far.rate == pytest.approx(40e9 / 110e3)
    assert slow.cores == pytest.approx(slow.fed / 8 / 124)


def test_memory_of_sit_xl_by_hand() -> None:
    work = counted.generator()
    ddp = memory(work, 8, 32)
    assert ddp.weights == ddp.average == 4 * SIT_XL
    assert ddp.gradients == ddp.moments / 2 == 4 * TRAINED
    assert ddp.buffers == 0
    assert ddp.copies == 2 * SIT_XL
    assert ddp.activations == 32 * 28 * 128 * 1152 * 24  # blocks, tokens, width; 24 bytes
    assert memory(work, 8, 32, recompute=False).activations == 32 * 28 * 128 * 1152 * 36
    assert memory(work, 8, 32, precision="fp32").activations == 32 * 28 * 128 * 1152 * 44
    assert memory(work, 1, 32).buffers == 0
    fsdp = memory(work, 8, 32, "fsdp")
    assert fsdp.moments == pytest.approx(ddp.moments / 8, rel=1e-4)
    assert fsdp.copies == ddp.copies
    assert memory(work, 8, 32, "fsdp", accumulate=2).buffers > 4 * TRAINED
    assert checkpoint_bytes(counted.encoder()) == 0


# ---- whatever the numbers ------------------------------------------------------------------------------------------

WORKS = st.builds(
    a_work,
    flops=st.floats(1e11, 1e13),
    width=st.integers(0, 10**7),
    replicated=st.integers(0, 10**6),
    images=st.booleans(),
    batch=st.integers(8, 4096),
)
KINDS = st.sampled_from(["ddp", "fsdp"])


@settings(max_examples=60, deadline=None)
@given(work=WORKS, half=st.integers(1, 512), kind=KINDS, device=st.sampled_from(sorted(DEVICES)))
def test_twice_the_gpus_see_more_images(work: Work, half: int, kind: str, device: str) -> None:
    rich = {"read": 1e18, "decode": 1e9, "device": device, "parallel": kind}  # data is never waited for
    one, two = (Estimate(Plan(work, gpus=n, **rich)) for n in (half, 2 * half))
    assert two.fed > one.fed
    assert two.steps <= one.steps
    assert two.moved >= one.moved
    assert two.communication * two.link == pytest.approx(two.moved)
    assert one.rate <= one.fed
    assert one.step >= one.compute + one.exposed - 1e-12
    assert one.exposed <= one.communication + 1e-12


@settings(max_examples=60, deadline=None)
@given(work=WORKS, world=st.sampled_from([2, 4, 8, 16, 32, 64]), images=st.integers(1, 64))
def test_shards_shrink_with_the_ranks_and_copies_do_not(work: Work, world: int, images: int) -> None:
    ddp = [memory(work, n, images) for n in (world, 2 * world)]
    assert ddp[0] == ddp[1]
    # rows that the ranks divide: no filling
    work = replace(work, weights=tuple(w._replace(rows=128) for w in work.weights))
    few, many = (memory(work, n, images, "fsdp") for n in (world, 2 * world))
    assert many.total < few.total
    assert few.total - few.buffers < memory(work, world, images).total  # what is gathered counts in small models
    assert (many.copies, many.activations, many.frozen) == (few.copies, few.activations, few.frozen)


@settings(max_examples=60, deadline=None)
@given(world=st.integers(2, 600), rows=st.integers(1, 5000), width=st.integers(1, 64))
def test_filled_rows_are_the_least_multiple_of_the_ranks(world: int, rows: int, width: int) -> None:
    padded = Weight(rows, width, True, 1).padded(world)
    assert padded % world == 0
    assert rows * width <= padded < (rows + world) * width


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"mfu": 0.0}, "mfu"),
        ({"mfu": 1.5}, "mfu"),
        ({"gpus": 0}, "gpus"),
        ({"batch": 100}, "multiple of 8"),
        ({"device": "H101"}, "H100"),
        ({"parallel": "tp"}, "fsdp"),
        ({"precision": "fp8", "device": "A100"}, "data sheet of A100"),
        ({"precision": "int4"}, "bf16"),
        ({"read": -1.0}, "read"),
        ({"price": math.inf}, "price"),
    ],
)
def test_plans_that_cannot_be_are_refused_in_a_sentence(wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Plan(a_work(), **wrong)


# ---- the command and the document ----------------------------------------------------------------------------------


def test_the_documents_tables_are_what_the_code_prints() -> None:
    from maetok_fast.cli.scale import markdown

    text = (ROOT / "docs" / "scale.md").read_text()
    assert markdown() in text, "docs/scale.md is old: replace its tables by `maetok-fast scale --table`"


def test_the_command_prints_one_plan_with_its_formulas() -> None:
    from maetok_fast import cli

    done = CliRunner().invoke(cli.app, ["scale", "--gpus", "64", "--price", "2"], env={"COLUMNS": "200"})
    assert done.exit_code == 0, done.output
    for words in (
        "2,048",
        "5.31 GB",
        "13.3 ms",
        "10.8 GB",
        "56,104",
        "42.0 GB",
        "18.0 GB",
        "5.17 GB",
        "fits",
        "cost 0.8",
    ):
        assert words in done.output, words
    done = CliRunner().invoke(cli.app, ["scale", "--gpus", "3", "--batch", "256"])
    assert done.exit_code == 2
    assert "multiple of 3" in done.output


# ---- four processes ------------------------------------------------------------------------------------------------

Ranks = dict[str, list[dict[str, Any]]]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Ranks:
    """What each rank found, in processes that are forked from one that has computed nothing."""
    folder = tmp_path_factory.mktemp("ranks")
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "scale_ranks.py"), str(folder)],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return {k: [json.loads((folder / f"{k}.{r}.json").read_text()) for r in range(WORLD)] for k in ("ddp", "fsdp")}


def simulated() -> Work:
    with torch.device("meta"):
        model = SiT(MODEL)
    return a_work(weights=shapes(model, list(model.blocks)), averaged=sum(p.numel() for p in model.parameters()))


@pytest.mark.parametrize("parts", PARTS)
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_four_ranks_move_the_bytes_of_the_formula(ranks: Ranks, parallel: str, parts: int) -> None:
    want = moved_bytes(simulated(), WORLD, parallel, parts)
    for found in ranks[parallel]:
        sent, told = found[str(parts)]["sent"], found[str(parts)]["received"]
        assert sum(sent.values()) == want
        if told is not None:  # by the sockets; gloo's reduce-scatter is an all-reduce, so that its part counts twice
            assert told == pytest.approx(want + sent.get("_reduce_scatter_base_", 0), rel=0.01)


def test_sharded_ranks_keep_whole_copies_of_the_weights_in_bf16(ranks: Ranks) -> None:
    matrices = sum(w.rows * w.width for w in simulated().weights if w.block and w.width > 1)
    for found in ranks["fsdp"]:
        assert 2 * matrices <= found["copies"] < 2.6 * matrices
