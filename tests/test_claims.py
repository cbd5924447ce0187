# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""`maetok-fast demo claims` in its quick form, some of its variants on drawn images; and what decides a claim."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_demo import draw
from typer.testing import CliRunner

from maetok_fast.cli import app
from maetok_fast.demos.claims import findings, page, run
from maetok_fast.demos.claims.findings import compared, steps_to_equal, summary
from maetok_fast.demos.claims.judge import Judge
from maetok_fast.demos.claims.variants import FULL, TABLE, VARIANTS, first_weights, tokenizer_run

SOME = tuple(v for v in VARIANTS if v.name in ("maetok", "ae", "learned", "kl-2d"))


# ---- the whole ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """A quick run of some of the variants: its folder and its command."""
    folder = tmp_path_factory.mktemp("claims")
    data, test = draw(folder / "train", 12, 0), draw(folder / "test", 8, 1)
    words = ["demo", "claims", "--quick", "--seeds", "1", "--quiet", "--processes", "1"]
    words += ["--data", str(data), "--test", str(test), "--out", str(folder / "out")]
    with pytest.MonkeyPatch.context() as patch:
        for module in (run, findings, page):
            patch.setattr(module, "VARIANTS", SOME)
        patch.setattr(findings, "TABLE", tuple(v for v in TABLE if v in SOME))
        patch.setattr(findings, "CLAIMS", tuple(c for c in findings.CLAIMS if {c.better, c.than} <= set(_names())))
        patch.setattr(page, "COMPARED", ("maetok", "ae", "kl-2d"))
        said = CliRunner().invoke(app, words)
        assert said.exit_code == 0, said.output
        assert said.output.count("tokenizer") == len(SOME)
        out = folder / "out"
        before = json.loads((out / "ae-0" / "generator.json").read_text())
        (out / "ae-0" / "generator.json").unlink()
        again = CliRunner().invoke(app, words)
        assert again.exit_code == 0, again.output
        after = json.loads((out / "ae-0" / "generator.json").read_text())
        assert {**after, "seconds": 0} == {**before, "seconds": 0}
    return out, words


def _names() -> list[str]:
    return [v.name for v in SOME]


def test_a_quick_run_says_that_its_numbers_mean_nothing_and_leaves_the_page_its_pictures_and_all_records(
    made: tuple[Path, list[str]],
) -> None:
    out, _ = made
    found = json.loads((out / "claims.json").read_text())
    assert found["quick"]
    assert "no number here means anything" in (out / "claims.md").read_text()
    # one seed decides nothing
    assert {claim["verdict"] for claim in found["claims"]} == {"not resolved"}
    for variant in SOME:
        parts = {"tokenizer"} | ({"density"} if variant.alike else set())
        parts |= {"generator"} if variant.generated else set()
        parts |= {"mixed"} if variant.name in ("maetok", "learned") else set()
        parts |= {"guidance"} if variant.name == "maetok" else set()
        assert {p.stem for p in (out / f"{variant.name}-0").glob("*.json")} == parts
    assert len(found["guidance"]) == 11
    ae = json.loads((out / "ae-0" / "tokenizer.json").read_text())
    assert found["variants"]["ae"]["measures"]["psnr"]["mean"] == ae["psnr"]
    markdown, html = ((out / f"claims.{kind}").read_text() for kind in ("md", "html"))
    for claim in found["claims"]:
        assert claim["says"] in markdown
    assert html.count("data:image/png;base64,") == markdown.count(".png)") >= 1


def test_the_page_in_docs_is_that_of_the_committed_result() -> None:
    docs = Path(__file__).resolve().parent.parent / "docs"
    found = json.loads((docs / "measured" / "claims.json").read_text(encoding="utf-8"))
    made = page._markdown(page.blocks_of(found)).replace("](claims-", "](measured/claims-")
    assert (docs / "claims.md").read_text(encoding="utf-8").startswith(made)


# ---- what decides ---------------------------------------------------------------------------------------------------


def test_a_claim_holds_only_beyond_students_bound_and_one_seed_decides_nothing() -> None:
    assert compared([3.0], [1.0], falling=False)["verdict"] == "not resolved"
    # gains 1 +- .1 / sqrt 3: t = 17 against 2.92
    assert compared([2.0, 3.1, 3.9], [1.0, 2.0, 3.0], falling=False)["verdict"] == "holds"
    assert compared([2.0, 3.1, 3.9], [1.0, 2.0, 3.0], falling=True)["verdict"] == "does not hold"
    # mean 1, error .5: t = 2 of 2 degrees of freedom
    gains = [1.0, 1.0 + 0.5 * math.sqrt(3), 1.0 - 0.5 * math.sqrt(3)]
    assert compared(gains, [0.0] * 3, falling=False)["verdict"] == "not resolved"


@given(st.lists(st.floats(-1e3, 1e3), min_size=2, max_size=9))
def test_a_summarys_error_is_that_of_the_mean(values: list[float]) -> None:
    found: Any = summary([*values, None])
    assert found["mean"] == pytest.approx(np.mean(values))
    assert found["error"] == pytest.approx(np.std(values, ddof=1) / np.sqrt(len(values)), abs=1e-9)


def test_steps_to_equal_quality_are_read_off_between_checkpoints_and_bounds_are_named() -> None:
    slow = [(100, 9.0), (200, 5.0), (300, 3.0)]
    assert steps_to_equal([(100, 4.0), (200, 2.0)], slow) == {"factor": 300 / 150, "bound": ""}
    assert steps_to_equal([(100, 2.0), (200, 1.0)], slow) == {"factor": 3.0, "bound": "at least"}
    # never as good: slow has 4.0 at step 250
    assert steps_to_equal([(100, 9.0), (300, 4.0)], slow) == {"factor": 250 / 300, "bound": ""}
    assert steps_to_equal([(100, 12.0), (300, 10.0)], slow) == {"factor": 100 / 300, "bound": "at most"}


def test_variants_differ_in_what_their_names_say_and_begin_alike(tmp_path: Path) -> None:
    of_row = {v.name: tokenizer_run(v, FULL, 0, tmp_path, "d", tmp_path) for v in VARIANTS}
    for variant in VARIANTS:
        told = of_row[variant.name]
        assert told.mask.used == variant.mask
        assert bool(told.auxiliary.targets) == variant.target
        assert bool(told.model.num_latent_tokens) == variant.latents
    rows = {(v.mask, v.latents, v.target) for v in TABLE}
    assert len(rows) == 7
    assert (False, False, False) not in rows
    assert len({v.model.latent_dim for v in VARIANTS}) == 1
    a, b = (first_weights(v.model, 0).state_dict() for v in VARIANTS if v.name in ("maetok", "kl"))
    same = [name for name in a if ".blocks." in name or "latent" in name]
    assert len(same) > 50
    assert all(torch.equal(a[name], b[name]) for name in same)


def test_a_judge_finds_no_distance_between_equal_sets_and_is_the_same_after_reading(
    made: tuple[Path, list[str]],
) -> None:
    out, _ = made
    judge, again = Judge.load(out / "judge"), Judge.load(out / "judge")
    images = torch.randint(0, 256, (40, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    before = judge.distances(images)
    assert before == again.distances(images)
    assert all(value > 0 for value in before.values())
    from maetok_fast.evaluation import Moments

    judge.reference = {space: Moments.of(judge.features(space, images)) for space in judge.reference}
    for space, value in judge.distances(images).items():
        assert value == pytest.approx(0, abs=1e-6 * before[space])
