# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""Tokenizers compared: which rows are looked at, what is computed again and what not, what is refused, and the page."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from typer.testing import CliRunner

from maetok_fast._optional import Status
from maetok_fast.analysis import Entry, Settings, analyze, linear_probe, token_usage
from maetok_fast.analysis.shown import _rows_of_picture
from maetok_fast.analysis.sources import open_subject, split
from maetok_fast.cli import app
from maetok_fast.models import MAETok
from maetok_fast.pipeline import RunError
from maetok_fast.pipeline.demo import demo_tokenizer

N, TOKENS, CHANNELS = 200, 4, 3
PARTS = ("gmm", "probe", "neighbours", "usage")


@pytest.fixture(scope="module", autouse=True)
def _one_thread(one_thread: None) -> None:
    pass


@pytest.fixture(autouse=True)
def _few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("maetok_fast.analysis.probe.STEPS", 200)


def rng(seed: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=seed))


def cache(
    folder: Path, apart: float, seed: int, labels: bool = True, shape: tuple[int, ...] = (TOKENS, CHANNELS)
) -> Path:
    """N latents of three classes, each with its own token so far away, in LightningDiT's layout."""
    y = rng(0).integers(0, 3, N)
    z = rng(seed).standard_normal((N, *shape))
    z[np.arange(N), y % shape[0]] += apart
    folder.mkdir()
    tensors = {"latents": torch.from_numpy(z.astype(np.float32))}
    if labels:
        tensors["labels"] = torch.from_numpy(y)
    save_file(tensors, folder / "latents_rank00_shard000.safetensors")
    return folder


@pytest.fixture
def entries(tmp_path: Path) -> list[Entry]:
    return [Entry("near", cache(tmp_path / "near", 0.3, 1)), Entry("far", cache(tmp_path / "far", 6.0, 2))]


def asked(**more: Any) -> Settings:
    return Settings(**{"parts": PARTS, "modes": (1, 3), "seeds": 2, "workers": 0, "precision": "fp32", **more})


# ---- what is measured


def test_a_comparison_holds_the_numbers_of_its_parts(entries: list[Entry], tmp_path: Path) -> None:
    out = tmp_path / "out"
    found = analyze(entries, out, settings=asked())
    assert json.loads((out / "analysis.json").read_text()) == json.loads(json.dumps(found))
    parts = {name: part["values"] for name, part in found["parts"].items()}
    near, far = ({name: part[n] for name, part in parts.items()} for n in ("near", "far"))

    train, held = split(N, None, 0)
    assert (len(train), len(held), len(np.intersect1d(train, held))) == (160, 40, 0)
    x = open_subject(entries[1], asked(), tmp_path / "unused")
    np.testing.assert_array_equal(x.train.rows.places, train)
    usage = token_usage(x.train.latents())
    np.testing.assert_allclose(far["usage"]["share"], usage.share, rtol=1e-6)
    assert far["usage"]["effective_rank"] == pytest.approx(usage.effective_rank)

    # classes far apart: three modes, and nothing to get wrong
    assert far["probe"]["flattened"]["mean"] > 0.97 > near["probe"]["flattened"]["mean"]
    assert far["neighbours"]["agreement"]["1"] > 0.97 > near["neighbours"]["agreement"]["1"]
    assert far["gmm"]["components"] == near["gmm"]["components"], "one K for all"
    one, three = (point["held_out"]["mean"] for point in far["gmm"]["curve"])
    assert three < one
    assert far["gmm"]["reach"][1]["modes"] <= 3
    assert found["tokenizers"]["far"]["held_out_from"] == "20% of the rows, by a permutation of seed 0"


def test_a_probe_of_a_comparison_is_the_probe_of_its_arrays(entries: list[Entry], tmp_path: Path) -> None:
    found = analyze(entries[:1], tmp_path / "out", settings=asked(parts=("probe",), seeds=1))
    subject = open_subject(entries[0], asked(), tmp_path / "unused")
    assert subject.train.labels is not None
    assert subject.held.labels is not None
    ways = rng(0)
    parts = [np.flatnonzero(subject.train.labels == c) for c in range(3)]
    rows = np.sort(np.concatenate([ways.permutation(p)[: max(1, round(0.9 * len(p)))] for p in parts]))
    x, y = subject.train.flat(rows), subject.train.labels[rows]
    expected = linear_probe(x, y, subject.held.flat(), subject.held.labels)
    assert found["parts"]["probe"]["values"]["near"]["flattened"]["values"] == [expected.accuracy]


def test_a_latent_of_two_dimensions_is_tokens_of_channels(tmp_path: Path) -> None:
    subject = open_subject(Entry("grid", cache(tmp_path / "grid", 1.0, 1, shape=(3, 2, 5))), asked(), tmp_path)
    items = subject.train.rows.cache.read(subject.train.rows.places)
    assert subject.shape == (10, 3)
    np.testing.assert_array_equal(subject.train.latents(), items.flatten(2).transpose(1, 2).numpy())


def test_held_out_caches_are_what_is_measured_on(entries: list[Entry], tmp_path: Path) -> None:
    other = cache(tmp_path / "other", 3.0, 7)
    subject = open_subject(Entry("far", entries[1].path, other), asked(limit=50), tmp_path)
    assert (len(subject.train), len(subject.held)) == (50, 50)
    assert subject.held.rows.cache.path == other


def test_the_picture_of_all_tokenizers_comes_with_numbers(
    entries: list[Entry], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib")
    missing = Status("missing", "", "pip install umap-learn")
    monkeypatch.setattr("maetok_fast.analysis.projection.find", lambda name: missing)
    part = analyze(entries, tmp_path / "out", settings=asked(parts=("umap",)))["parts"]["umap"]
    assert list(part["pictures"]) == ["umap.png"]
    assert part["missing"] == [
        "near, far: umap-learn is missing (pip install umap-learn); the picture shows principal components"
    ]
    near, far = (part["values"][name] for name in ("near", "far"))
    assert near["purity"] < 0.9 < far["purity"]
    assert near["neighbours"] == far["neighbours"] <= 10
    assert near["chance"] == pytest.approx(1 / 3, abs=0.05)


def test_of_many_classes_half_of_the_picture_are_the_coloured_ones(tmp_path: Path) -> None:
    side = open_subject(Entry("far", cache(tmp_path / "far", 3.0, 2)), asked(), tmp_path).train
    side.labels = np.arange(160) % 40
    rows, chosen = _rows_of_picture(side, 60, 0)
    assert chosen.tolist() == [0, 4, 8, 13, 17, 21, 26, 30, 34, 39]
    assert np.isin(side.labels[rows], chosen).sum() == 30
    assert len(set(rows.tolist())) == 60


# ---- what is kept


def test_a_part_is_computed_once_and_again_where_something_differs(
    entries: list[Entry], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("maetok_fast.analysis.work.find", lambda name: Status("missing"))  # pictures take time
    settings, out = asked(parts=("gmm", "usage"), modes=(1, 2)), tmp_path / "out"

    def computed(some: list[Entry], settings: Settings = settings) -> set[str]:
        lines: list[str] = []
        analyze(some, out, settings=settings, say=lines.append)
        return {line.split(":")[0] for line in lines if re.search(r"\d s$", line)}

    first = computed(entries[:1])
    assert first == {"pca/near", "gmm/near/1-0", "gmm/near/1-1", "gmm/near/2-0", "gmm/near/2-1", "usage/near"}
    before = (out / "analysis.json").read_text()
    assert computed(entries[:1]) == set()
    same = [
        {k: v for k, v in json.loads(text).items() if k != "seconds_here"}
        for text in (before, (out / "analysis.json").read_text())
    ]
    assert same[0] == same[1]
    more = computed(entries)
    assert more >= {"pca/far", "usage/far"}
    assert not more & {"pca/near", "usage/near"}, "another tokenizer does not change this one's own numbers"
    assert computed(entries, asked(parts=("gmm", "usage"), modes=(1, 2, 4))) == {
        f"gmm/{n}/4-{s}" for n in ("near", "far") for s in (0, 1)
    }
    (out / "parts" / "usage" / "near.json").write_text("{")
    assert computed(entries) == {"usage/near"}, "a damaged file"
    assert "usage/near" in computed(entries, asked(parts=("usage",), seed=1))
    # other values under the same name
    (tmp_path / "near" / "latents_rank00_shard000.safetensors").unlink()
    (tmp_path / "near").rmdir()
    cache(tmp_path / "near", 0.3, 99)
    assert computed(entries, asked(parts=("usage",))) >= {"usage/near"}


# ---- what is refused, and what is left out


def test_rows_that_do_not_pair_up_are_refused_unless_that_is_meant(entries: list[Entry], tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    y = torch.from_numpy(rng(0).integers(0, 3, N)).roll(1)
    save_file({"latents": torch.randn(N, 4, 3), "labels": y}, other / "latents_rank00_shard000.safetensors")
    short = tmp_path / "short"
    short.mkdir()
    save_file({"latents": torch.randn(50, 4, 3)}, short / "latents_rank00_shard000.safetensors")
    settings = asked(parts=("usage",))
    with pytest.raises(RunError, match=r"near and other: their training rows do not pair up \(other labels"):
        analyze([entries[0], Entry("other", other)], tmp_path / "out", settings=settings)
    with pytest.raises(RunError, match=r"160 and 40 rows.*--unpaired"):
        analyze([entries[0], Entry("short", short)], tmp_path / "out", settings=settings)
    found = analyze(
        [entries[0], Entry("short", short)], tmp_path / "out", settings=asked(parts=("usage",), unpaired=True)
    )
    assert not found["paired"]
    assert "--unpaired" in (tmp_path / "out" / "report.html").read_text()


def test_without_labels_what_needs_them_is_left_out_in_a_sentence(tmp_path: Path) -> None:
    found = analyze([Entry("bare", cache(tmp_path / "bare", 1.0, 1, labels=False))], tmp_path / "out", settings=asked())
    assert found["parts"]["probe"]["missing"] == ["bare: no labels, so nothing to probe for"]
    assert "agreement" not in found["parts"]["neighbours"]["values"]["bare"]
    assert found["parts"]["gmm"]["values"]["bare"]["curve"][0]["modes"] == 1
    assert "no labels, so nothing to probe for" in (tmp_path / "out" / "report.html").read_text()


def test_labels_of_one_class_leave_the_probe_out_and_the_page_is_written(tmp_path: Path) -> None:
    path = cache(tmp_path / "one", 1.0, 1, labels=False)
    file = path / "latents_rank00_shard000.safetensors"
    save_file({"latents": torch.randn(N, TOKENS, CHANNELS), "labels": torch.full((N,), 7)}, file)
    out = tmp_path / "out"
    found = analyze([Entry("one", path)], out, settings=asked(parts=("probe", "usage")))
    assert found["parts"]["probe"]["missing"] == ["one: all training rows are of one class, so nothing to tell apart"]
    assert (out / "report.html").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["near"], "NAME=PATH: expected NAME=PATH, got 'near'"),
        (["near={near}", "near={far}"], "near is given twice"),
        (["near={near}", "--held-out", "fat={far}"], "--held-out fat: none of the tokenizers (near) has that name"),
        (["near={near}", "--parts", "gmm,fid"], "unknown part 'fid'"),
        (["near={near}", "--modes", "1,x"], "--modes: expected whole numbers and commas"),
        (["near={near}", "--modes", "5000", "--parts", "gmm"], "need as many training rows, there are 160"),
        (["near={near}", "--components", "13", "--parts", "gmm"], "13 components asked for, its latents have 12"),
        (["near={near}", "--test", "photographs"], "give --data"),
        (["none=/nowhere"], "none: /nowhere is no latent cache of a known layout and no MAETok"),
    ],
)  # fmt: skip
def test_commands_that_cannot_be_end_in_a_sentence(
    options: list[str], message: str, entries: list[Entry], tmp_path: Path
) -> None:
    paths = {entry.name: str(entry.path) for entry in entries}
    given = [option.format(**paths) for option in options]
    done = CliRunner().invoke(app, ["analyze", "latents", *given, "--out", str(tmp_path / "out"), "--device", "cpu"])
    assert done.exit_code == 2, done.output
    assert message in " ".join(done.output.split())


# ---- with a tokenizer and images


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """30 small pictures in two class folders: dark ones and light ones."""
    folder = tmp_path_factory.mktemp("photos")
    for i in range(30):
        name = folder / ("dark", "light")[i % 2] / f"{i:02d}.png"
        name.parent.mkdir(exist_ok=True)
        small = rng(i).integers(0, 128, (4, 4, 3), dtype=np.uint8) + np.uint8(127 * (i % 2))
        Image.fromarray(small).resize((64, 64)).save(name)
    return folder


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("tokenizer")
    demo_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def whole(photos: Path, tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The cache of all of them, encoded by a comparison of one."""
    out = tmp_path_factory.mktemp("whole")
    analyze([Entry("all", tokenizer)], out, settings=asked(parts=("usage",), data=str(photos), images=1))
    return out / "caches" / "all"


def test_a_tokenizer_encodes_its_images_and_is_looked_into(
    photos: Path, tokenizer: Path, whole: Path, tmp_path: Path
) -> None:
    pytest.importorskip("matplotlib")
    out = tmp_path / "out"
    few = asked(parts=("neighbours", "traversal", "usage"), data=str(photos), images=1, limit=20)
    # a cache of all images and a tokenizer that encodes a sample of them show the same rows
    entries = [Entry("part", tokenizer), Entry("cache", whole, tokenizer=tokenizer)]
    part, cached = (open_subject(entry, few, out) for entry in entries)
    np.testing.assert_array_equal(part.train.flat(), cached.train.flat())
    np.testing.assert_array_equal(part.held.labels, cached.held.labels)
    np.testing.assert_array_equal(part.held.images(np.arange(4)), cached.held.images(np.arange(4)))
    model = MAETok.from_pretrained(tokenizer).eval()
    with torch.no_grad():
        again = model.encode(part.train.images(np.array([3])))[0].numpy()
    np.testing.assert_allclose(part.train.latents(np.array([3]))[0], again, atol=1e-4)

    found = analyze(entries[:1], out, settings=few)
    pictures = [name for one in found["parts"].values() for name in one["pictures"]]
    assert pictures == ["neighbours.png", "traversal-part.png", "usage.png", "correlations.png", "influence-part.png"]
    assert len(found["parts"]["usage"]["values"]["part"]["influence"]) == 16
    assert found["classes"] == ["dark", "light"]
    page = (out / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 6, "with the overview"
    assert not re.search(r'(?:src|href)="(?!data:)', page), "needs no other file"
    assert "A sample of at most 20 rows" in page


def test_another_tokenizer_than_the_caches_is_refused(
    photos: Path, tokenizer: Path, whole: Path, tmp_path: Path
) -> None:
    settings = asked(parts=("usage",), data=str(photos), images=1)
    torch.manual_seed(5)
    demo_tokenizer().save_pretrained(tmp_path / "other")
    entry = Entry("all", whole, tokenizer=tmp_path / "other")
    with pytest.raises(RunError, match="is not the tokenizer that made"):
        analyze([entry], tmp_path / "again", settings=settings)
    with pytest.raises(RunError, match="is of another cache"):
        analyze([Entry("all", tmp_path / "other")], whole.parent.parent, settings=settings)
    with pytest.raises(RunError, match="give --data"):
        analyze([Entry("all", tokenizer)], tmp_path / "again", settings=asked())
