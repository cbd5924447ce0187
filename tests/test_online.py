# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""maetok_fast.training.online: distances while a run trains, against their formula; logs that say when.

python tests/test_online.py FOLDER IMAGES     a run of two processes, which fork and so are a process of their own
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from generator_runs import CHANNELS, CLASSES, TOKENS, of_images, small_generator, small_tokenizer, write_cache
from hypothesis import given
from hypothesis import strategies as st
from training_runs import bare, small_run, write_images

from maetok_fast.config import ConfigError
from maetok_fast.data.images import find_images, load_images, psnr, to_uint8
from maetok_fast.diffusion import sample
from maetok_fast.evaluation import Moments, create_extractor
from maetok_fast.models import MAETok, load_generator
from maetok_fast.pipeline.noise import SampleNoise, seed_of
from maetok_fast.pipeline.statistics import LatentStatistics
from maetok_fast.training import build_generator, online
from maetok_fast.training.build import train
from maetok_fast.training.configs import MetricsConfig, TokenizerRun
from maetok_fast.training.generator_configs import GeneratorRun
from maetok_fast.training.observe import read_log
from maetok_fast.training.online import Crossing, crossings, first_below

pytestmark = pytest.mark.usefixtures("one_thread")
METRICS = MetricsConfig(every=4, images=22, extractor="random", weights="random", batch=5)


@pytest.fixture(autouse=True)
def _bare(monkeypatch: pytest.MonkeyPatch) -> None:
    bare(monkeypatch.setattr)
    monkeypatch.setattr(build_generator, "_flops", lambda *a: 0.0)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two folders, which are labels."""
    folder = tmp_path_factory.mktemp("online")
    write_images(folder / "images" / "a", 12, 40)
    write_images(folder / "images" / "b", 12, 40, seed=1)
    return folder / "images"


def trained_tokenizer(folder: Path) -> Path:
    """One whose images depend on its latents, which those of a fresh one do not."""
    model = MAETok.from_pretrained(small_tokenizer(folder))
    torch.manual_seed(3)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.2 * torch.randn_like(p)
    model.save_pretrained(folder)
    return folder


def measured(out: Path, images: Path, **changes: Any) -> TokenizerRun:
    run = small_run(out, images, steps=8)
    return replace(run, data=replace(run.data, validation=str(images)), metrics=replace(METRICS, **changes))


def final(path: Path) -> dict[str, bytes]:
    return {str(p.relative_to(path)): p.read_bytes() for p in sorted(path.rglob("*")) if p.is_file()}


def logged(out: Path, name: str) -> dict[int, float]:
    return {line["step"]: line[name] for line in read_log(out / "log.jsonl") if name in line}


def features(pixels: np.ndarray) -> np.ndarray:
    rows = create_extractor("random")(torch.from_numpy(pixels.transpose(0, 3, 1, 2).copy()))
    return rows.double().numpy()


def distance(a: np.ndarray, b: np.ndarray) -> float:
    """|m1 - m2|^2 + tr (S1 + S2 - 2 (S1 S2)^1/2), the root's trace by the eigenvalues of the product."""
    (m1, s1), (m2, s2) = ((v.mean(0), np.cov(v, rowvar=False)) for v in (a, b))
    roots = np.sqrt(np.linalg.eigvals(s1 @ s2).real.clip(0))
    return float(((m1 - m2) ** 2).sum() + np.trace(s1) + np.trace(s2) - 2 * roots.sum())


def test_a_tokenizer_s_distance_is_the_formula_s_and_changes_nothing_of_the_run(tmp_path: Path, images: Path) -> None:
    run = measured(tmp_path / "run", images)
    whole = train(run, quiet=True)
    plain = train(replace(run, out=str(tmp_path / "plain"), metrics=MetricsConfig()), quiet=True)
    assert final(whole) == final(plain)
    found = logged(tmp_path / "run", "validation/fd_random")
    assert list(found) == [4, 8]
    pixels = load_images(find_images(images)[:22], 32)
    for step in found:
        model = MAETok.from_pretrained(tmp_path / "run" / "checkpoints" / f"{step:07d}" / "tokenizer").eval()
        with torch.no_grad():
            results = to_uint8(torch.cat([model(part) for part in pixels.split(5)]))
        originals = to_uint8(pixels)
        want = distance(features(results), features(originals))
        assert found[step] == pytest.approx(want, rel=1e-4)
        scores = [psnr(*pair) for pair in zip(originals, results)]
        assert logged(tmp_path / "run", "validation/metrics_psnr")[step] == pytest.approx(np.mean(scores), abs=1e-3)
    session = next(line["session"] for line in read_log(tmp_path / "run" / "log.jsonl") if "session" in line)
    assert (session["images_per_step"], session["images_per_epoch"]) == (4, 24)
    about = session["metrics"]["fd_random"]
    assert (about["images"], about["reference_images"], about["reference"]) == (22, 22, str(images))
    assert "random weights" in about["extractor"]


def test_a_run_that_goes_on_measures_the_same_with_the_reference_that_it_kept(tmp_path: Path, images: Path) -> None:
    run = measured(tmp_path / "run", images)
    run = replace(run, optimizer=replace(run.optimizer, schedule="constant"))
    train(run, quiet=True)
    parts = replace(run, out=str(tmp_path / "parts"))
    train(replace(parts, loop=replace(parts.loop, steps=6)), quiet=True)
    kept = list((tmp_path / "parts" / "metrics").iterdir())
    assert [p.suffix for p in kept] == [".npz"]
    before = kept[0].stat().st_mtime_ns
    train(parts, quiet=True)
    assert kept[0].stat().st_mtime_ns == before
    whole, gone_on = (logged(tmp_path / name, "validation/fd_random") for name in ("run", "parts"))
    assert gone_on == {**whole, 6: gone_on[6]}
    # a file of statistics says the same, one of another extractor's is refused
    statistics = tmp_path / "statistics.npz"
    fingerprint = create_extractor("random").fingerprint
    Moments.load(kept[0]).save(statistics, about={"extractors": {"mu": fingerprint}})
    stored = replace(run, out=str(tmp_path / "stored"), metrics=replace(METRICS, reference=str(statistics)))
    train(stored, quiet=True)
    assert logged(tmp_path / "stored", "validation/fd_random") == pytest.approx(whole, rel=1e-9)
    Moments.load(kept[0]).save(statistics, about={"extractors": {"mu": "another"}})
    with pytest.raises(ConfigError, match=r"statistics are not of random.*metrics.reference"):
        train(replace(stored, out=str(tmp_path / "other")), quiet=True)


def sampled(out: Path, folder: Path, images: Path, **loop: Any) -> GeneratorRun:
    """On the cache and with the tokenizer that lie in the folder, at a rate that shows."""
    run = small_generator(out, folder / "cache", **loop)
    metrics = replace(METRICS, reference=str(images), steps=3, guidance=1.5)
    rate = replace(run.optimizer, learning_rate=0.03)
    return replace(run, tokenizer=str(folder / "tokenizer"), metrics=metrics, optimizer=rate)


def samples(generator: Path, tokenizer: Path, y: torch.Tensor) -> np.ndarray:
    """What such a run measures, sampled again."""
    model, decoder = load_generator(generator).eval(), MAETok.from_pretrained(tokenizer).eval()
    noise = SampleNoise([seed_of(0, i) for i in range(len(y))])
    first = noise.first((TOKENS, CHANNELS), torch.float32, torch.device("cpu"))
    made = sample(model, first, y, steps=3, method="euler", guidance=1.5)
    with torch.no_grad():
        return to_uint8(decoder.decode(LatentStatistics.beside(generator).denormalise(made.latents)))


@pytest.mark.parametrize("labelled", [True, False])
def test_a_generator_s_distance_is_of_equally_labelled_samples_of_fixed_seeds(
    tmp_path: Path, images: Path, labelled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    moments, seen = online._moments, []

    def kept(extractor: Any, batches: Any) -> Moments:
        batches = list(batches)
        seen.append(torch.cat(batches).permute(0, 2, 3, 1).numpy())
        return moments(extractor, batches)

    monkeypatch.setattr(online, "_moments", kept)
    tokenizer = trained_tokenizer(tmp_path / "tokenizer")
    write_cache(tmp_path / "cache")
    run = sampled(tmp_path / "run", tmp_path, images)
    if not labelled:
        run = of_images(run, images / "a", tokenizer)
    newest = train(run, quiet=True)
    if labelled:  # latents encoded on the way are of the fastest kernel, which is not always the same
        plain = train(replace(run, out=str(tmp_path / "plain"), metrics=MetricsConfig()), quiet=True)
        assert final(newest) == final(plain)
    y = torch.arange(22) % CLASSES if labelled else torch.full((22,), CLASSES)
    pixels = samples(newest / "generator", tokenizer, y)
    want = distance(features(pixels), features(to_uint8(load_images(find_images(images), 32))))
    found = logged(tmp_path / "run", "validation/fd_random")
    assert found[8] == pytest.approx(want, rel=1e-3)
    # the last measurement's, which are other images than the one before's
    assert np.abs(seen[-1].astype(int) - pixels).mean() < 0.05
    assert np.abs(seen[-1].astype(int) - seen[-2]).mean() > 0.5


def test_two_processes_measure_what_one_measures_whole_and_sharded(tmp_path: Path, images: Path) -> None:
    write_cache(tmp_path / "cache")
    trained_tokenizer(tmp_path / "tokenizer")
    command = [sys.executable, __file__, str(tmp_path), str(images)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MAETOK_FAST_TUNE": "0"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    model = MAETok.from_pretrained(tmp_path / "two" / "checkpoints" / "0000002" / "tokenizer").eval()
    pixels = load_images(find_images(images)[:22], 32)
    with torch.no_grad():
        results = to_uint8(model(pixels))
    want = distance(features(results), features(to_uint8(pixels)))
    assert logged(tmp_path / "two", "validation/fd_random") == {2: pytest.approx(want, rel=1e-4)}
    generator = tmp_path / "sharded" / "checkpoints" / "0000002" / "generator"
    pixels = samples(generator, tmp_path / "tokenizer", torch.arange(22) % CLASSES)
    want = distance(features(pixels), features(to_uint8(load_images(find_images(images), 32))))
    assert logged(tmp_path / "sharded", "validation/fd_random") == {2: pytest.approx(want, rel=1e-3)}
    assert logged(tmp_path / "sharded", "validation/velocity")[2] > 0


def test_what_is_missing_is_told_before_the_first_step(tmp_path: Path, images: Path) -> None:
    run = measured(tmp_path / "run", images)
    tokenizer = small_tokenizer(tmp_path / "tokenizer")
    generator = small_generator(tmp_path / "run", write_cache(tmp_path / "cache"))
    generator = replace(generator, metrics=METRICS)
    for wrong, match in (
        (replace(run, metrics=replace(METRICS, extractor="inceptoin")), "did you mean inception.*metrics.extractor"),
        (replace(run, metrics=replace(METRICS, reference=str(tmp_path / "no"))), "no.*metrics.reference"),
        (replace(run, data=replace(run.data, validation="")), "data.validation: metrics.every=4"),
        (replace(run, metrics=replace(METRICS, images=1)), "1 image.s. to be measured are too few"),
        (generator, "^tokenizer: metrics.every=4 measures images"),
        (replace(generator, tokenizer=str(tokenizer)), "^metrics.reference: metrics.every=4 needs images"),
    ):
        with pytest.raises(ConfigError, match=match):
            train(wrong, quiet=True)
    assert not list((tmp_path / "run" / "checkpoints").glob("[0-9]*"))
    pytest.importorskip("torch_fidelity")
    missing = replace(run, metrics=replace(METRICS, extractor="inception", weights=str(tmp_path / "missing.pth")))
    with pytest.raises(ConfigError, match=r"missing.pth: no such file.*pt_inception-2015-12-05.*metrics.weights"):
        train(missing, quiet=True)


# ---- what a log says ------------------------------------------------------------------------------------------------


def lines_of(values: list[float], every: int = 10) -> list[dict[str, Any]]:
    session = {"images_per_step": 4, "images_per_epoch": 50}
    lines: list[dict[str, Any]] = [{"step": 5, "loss": 1.0, "session": session}]
    return lines + [{"step": every * (i + 1), "validation/fd_x": v} for i, v in enumerate(values)]


@given(st.lists(st.floats(1, 100), min_size=1, max_size=8), st.floats(0.5, 100))
def test_the_first_crossing_lies_on_the_line_between_two_measurements(values: list[float], value: float) -> None:
    found = first_below(lines_of(values), "fd_x", value)
    if min(values) > value:
        assert found is None
        return
    assert found is not None
    steps = np.arange(1, len(values) + 1) * 10.0
    first = next(i for i, v in enumerate(values) if v <= value)
    assert found.step <= steps[first]
    assert found.step >= steps[max(0, first - 1)]
    if first:
        assert np.interp(found.step, steps, values) == pytest.approx(value, rel=1e-6, abs=1e-6)
    assert found.images == round(found.step * 4)
    assert found.epochs == pytest.approx(found.images / 50)


def test_a_log_without_it_or_without_counts_says_so(tmp_path: Path) -> None:
    lines = [{"step": 10, "validation/fd_x": 9.0}, {"step": 20, "validation/fd_x": 5.0, "validation/psnr": 1.0}]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert first_below(tmp_path, "validation/fd_x", 7) == Crossing(15.0, None, None)
    assert first_below(tmp_path / "log.jsonl", "fd_x", 9) == Crossing(10.0, None, None)
    with pytest.raises(ConfigError, match="no fd_y; it has fd_x, psnr"):
        first_below(tmp_path, "fd_y", 7)
    with pytest.raises(ConfigError, match="there is no log here"):
        first_below(tmp_path / "missing", "fd_x", 7)


def test_the_report_has_the_round_numbers_that_were_crossed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # the report itself
    from maetok_fast.training.report import write_report

    lines = lines_of([300.0, 150.0, 90.0, 30.0, 12.0])
    assert [(value, round(when.step, 1)) for _, value, when in crossings(lines)] == [
        (200.0, 16.7), (100.0, 28.3), (50.0, 36.7), (20.0, 45.6),
    ]  # fmt: skip
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    page = write_report(tmp_path).read_text()
    assert "<td>FD x 100<td>28.3<td>2.26<td>113</tr>" in page
    (tmp_path / "log.jsonl").write_text(json.dumps(lines[0]) + "\n")
    assert "fell below" not in write_report(tmp_path).read_text()


if __name__ == "__main__":
    from training_runs import fork_ranks, wait

    bare()
    build_generator._flops = lambda *a: 0.0  # type: ignore[assignment]
    folder, pictures = Path(sys.argv[1]), Path(sys.argv[2])
    whole = measured(folder / "two", pictures, every=2)
    whole = replace(whole, loop=replace(whole.loop, steps=2))
    sharded = sampled(folder / "sharded", folder, pictures, steps=2, validate_every=2, parallel="fsdp")
    sharded = replace(sharded, data=replace(sharded.data, validation=str(folder / "cache")))
    for each in (whole, sharded):
        assert wait(fork_ranks(each, 2)) == [0, 0]
