# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""A run on one page: read as a browser reads it, of whole runs and of what is left of broken ones."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from maetok_fast import config
from maetok_fast._optional import Status
from maetok_fast.training import report
from maetok_fast.training.configs import LoopConfig, TokenizerRun
from maetok_fast.training.observe import Observer, Peak
from maetok_fast.training.report import write_report

VOID = {"meta", "img", "br", "link", "input", "hr"}
CLOSED_BY_THEMSELVES = {"tr", "td", "th"}
EVIL = "<script>alert('x')</script>&\""


class Page(HTMLParser):
    """Tags with their attributes, all text, and whether what is opened is closed."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID | CLOSED_BY_THEMSELVES:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: Any) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if tag not in CLOSED_BY_THEMSELVES:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] not in ("style",):
            self.words.append(data)

    def attributes(self, tag: str, name: str) -> list[str]:
        return [found[name] or "" for t, found in self.tags if t == tag and name in found]

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def read(folder: Path) -> Page:
    """The page, once it is seen to be whole and to ask for nothing from outside."""
    path = write_report(folder)
    assert path == folder / "report.html"
    text = path.read_text(encoding="utf-8")
    page = Page(text)
    assert page.open == []
    names = page.attributes("svg", "xmlns") + page.attributes("svg", "xmlns:xlink")
    assert re.sub("|".join(map(re.escape, {*names, "x^"})), "", text).count("://") == 0
    assert {tag for tag, _ in page.tags} & {"script", "link", "iframe", "object"} == set()
    for tag, found in page.tags:
        assert not [name for name in found if name.startswith("on")], tag
    ids = [found["id"] for _, found in page.tags if "id" in found]
    assert len(ids) == len(set(ids))
    used = {u.removeprefix("#") for u in page.attributes("use", "xlink:href")}
    used |= set(re.findall(r"url\(#([^)]*)\)", text))
    assert used <= set(ids)
    return page


def captions(page: Page) -> set[str]:
    return set(page.attributes("svg", "aria-label"))


def make(
    folder: Path, lines: int, total: int = 1000, pictures: int = 0, checkpoints: tuple[int, ...] = (), start: int = 0
) -> Path:
    """A run of steps 10, 20, ... as the loop would have left it."""
    run = TokenizerRun(out=str(folder), loop=LoopConfig(steps=total, batch=64))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(config.to_yaml(run))
    (folder / "environment.json").write_text(
        json.dumps({"machine": {"gpu": "NVIDIA H100 80GB HBM3", "torch": "2.14.1"}, "processes": 8})
    )
    observer = Observer(folder, total, 64, 8, 1e9, Peak(1e12, "1 TFLOP/s of a test"), True, start, tensorboard=False)
    with contextlib.closing(observer):
        for i in range(1, lines + 1):
            step = start + 10 * i
            values = {"reconstruction": 1 / step, "hog": 0.2, "gradient/tokenizer": 1.0, "learning_rate": 1e-4}
            values |= {"logits_real": 0.5, "logits_fake": -0.5, "skipped_steps": float(i > 2)}
            observer.record(step, values, seconds=4.0, waited=0.4, unreadable=1)
            if i % 5 == 0:
                observer.record(step, {"validation/psnr": 20 + i / 100})
        for i in range(pictures):
            x = torch.full((8, 3, 100, 100), i / 10)
            observer.picture(10 * (i + 1), {"originals": x, "reconstructions": -x})
    for step in checkpoints:
        (folder / "checkpoints" / f"{step:07d}" / "tokenizer").mkdir(parents=True)
        (folder / "checkpoints" / f"{step:07d}" / "tokenizer" / "model.safetensors").write_bytes(bytes(1_500_000))
    return folder


def test_a_whole_run_is_on_the_page(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    folder = make(tmp_path / "mine", 100, pictures=20, checkpoints=(500, 1000))
    (folder / "checkpoints" / "best.json").write_text('{"step": 500, "psnr": 23.456}')
    (folder / "unreadable.jsonl").write_text('{"step": 1, "name": "a"}\n{"step": 9, "name": "a"}\n{"name": "b"}\n{')
    page = read(folder)
    assert captions(page) == {
        "validation PSNR", "reconstruction", "hog", "logits", "gradient tokenizer", "learning rate", "images/s", "MFU",
        "waiting for data",
    }  # fmt: skip
    for said in (
        "mine finished; 8 x NVIDIA H100 80GB HBM3, torch 2.14.1",
        "1,000 of 1,000 steps", "64,000 images seen", "21.00 dB PSNR, best 21.00",
        "160 images/s", "20 img/s per device",
        "2.0% MFU", "10.0% waiting for data",
        "MFU is of 1 TFLOP/s of a test.",
        "1,000 1.5 MB newest checkpoints/0001000", "500 1.5 MB best, PSNR 23.5 checkpoints/0000500",
        f"maetok-fast reconstruct photos --tokenizer {folder}/checkpoints/0001000/tokenizer --out reconstructed",
        "steps skipped, their gradient not being finite 1 nonfinite.jsonl",
        "samples that could not be read 2 unreadable.jsonl",
        "learning_rate: 0.0001",  # the configuration
    ):  # fmt: skip
        assert said in page.text, said


def test_pictures_are_eight_over_time_and_the_last_one_is_whole(tmp_path: Path) -> None:
    folder = make(tmp_path, 5, pictures=20)
    page = read(folder)
    steps = [int(re.findall(r"\d+", alt)[0]) for alt in page.attributes("img", "alt")]
    assert len(steps) == 8
    assert steps[0] == 200
    assert steps == sorted(steps, reverse=True)
    assert steps[-1] == 10
    assert max(np.diff(steps[::-1])) - min(np.diff(steps[::-1])) <= 10
    for step, source in zip(steps, page.attributes("img", "src")):
        found = base64.b64decode(source.removeprefix("data:image/png;base64,"))
        path = folder / "samples" / f"{step:07d}.png"
        with Image.open(io.BytesIO(found)) as image, Image.open(path) as whole:
            assert image.format == "PNG"
            if step == 200:
                assert found == path.read_bytes()
            else:
                assert image.width == report.SMALL
                assert image.height == round(whole.height * report.SMALL / whole.width)
                assert image.getpixel((20, 20)) == whole.getpixel((20, 20))


def test_an_empty_folder_is_a_run_that_has_just_begun(tmp_path: Path) -> None:
    page = read(tmp_path)
    assert "nothing is logged yet" in page.text
    assert "There is none yet." in page.text
    assert page.attributes("img", "src") == page.attributes("svg", "viewbox") == []


def test_a_run_of_one_line_has_curves_of_one_dot(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    page = read(make(tmp_path, 1))
    assert "10 of 1,000 steps" in page.text
    assert "unfinished" in page.text
    assert {"reconstruction", "images/s"} <= captions(page)


def test_two_sessions_are_counted(tmp_path: Path) -> None:
    make(tmp_path, 5)
    page = read(make(tmp_path, 5, start=30))
    assert "in 2 sessions" in page.text
    assert "80 of 1,000 steps" in page.text


def test_damaged_files_leave_their_part_out(tmp_path: Path) -> None:
    folder = make(tmp_path, 3, pictures=2, checkpoints=(20,))
    (folder / "config.yaml").write_text("loop: [")
    (folder / "environment.json").write_text("{")
    (folder / "checkpoints" / "best.json").write_text("[1]")
    (folder / "checkpoints" / ".writing-0000030").mkdir()
    (folder / "samples" / "0000020.png").write_bytes(b"\x89PNG\r\n")
    (folder / "samples" / "grid.png").write_bytes(b"")
    with (folder / "log.jsonl").open("ab") as file:
        file.write(b'{"step": 40, "time": "soon", "reconstruction": "nan", "hog": [1], "session": 3}\n{"step": \xff')
    page = read(folder)
    assert "40 steps" in page.text
    assert page.attributes("img", "alt") == ["originals above, reconstructions below at step 10"]
    assert "20 1.5 MB newest checkpoints/0000020" in page.text


def test_what_files_say_is_text_and_never_markup(tmp_path: Path) -> None:
    folder = make(tmp_path / "a&b<i>", 3)
    (folder / "config.yaml").write_text(f"# {EVIL}\nloop:\n  steps: 5\n")
    (folder / "environment.json").write_text(json.dumps({"machine": {"gpu": EVIL, "torch": EVIL}, "processes": EVIL}))
    line = {"step": 40, "time": 1.0, EVIL: 1.0, "session": {"started": EVIL, "devices": EVIL, "peak_from": EVIL}}
    with (folder / "log.jsonl").open("a") as file:
        file.write(json.dumps(line | {"mfu": 0.5}) + "\n")
    (folder / "checkpoints" / "0000040").mkdir(parents=True)
    (folder / "checkpoints" / "best.json").write_text(json.dumps({"step": 40, EVIL: 1.0}))
    page = read(folder)
    assert "script" not in {tag for tag, _ in page.tags}
    assert page.text.count(EVIL) >= 6
    assert "a&b<i>" in page.text


def test_a_path_with_blanks_is_quoted_for_the_shell(tmp_path: Path) -> None:
    folder = make(tmp_path / "my run", 1, checkpoints=(10,))
    assert f"--tokenizer '{folder}/checkpoints/0000010/tokenizer' --out" in read(folder).text


def test_the_same_run_gives_the_same_page(tmp_path: Path) -> None:
    folder = make(tmp_path, 30, pictures=2)
    first = write_report(folder).read_bytes()
    assert write_report(folder).read_bytes() == first


def test_a_long_run_gives_a_small_page(tmp_path: Path) -> None:
    """Curves are thinned: 5000 lines make no page of 5000 dots a chart."""
    pytest.importorskip("matplotlib")
    make(tmp_path, 1)
    with (tmp_path / "log.jsonl").open("w") as file:
        for step in range(50, 250_001, 50):
            file.write(json.dumps({"step": step, "time": 1.0, "reconstruction": 1 / step, "mfu": 0.4}) + "\n")
    assert write_report(tmp_path).stat().st_size < 200_000


def test_without_matplotlib_the_page_says_how_to_get_curves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make(tmp_path, 3, checkpoints=(30,))
    monkeypatch.setattr(report, "probe", lambda name: Status("missing", "", "pip install matplotlib"))
    page = read(folder)
    assert "pip install matplotlib" in page.text
    assert captions(page) == set()
    assert "30 of 1,000 steps" in page.text


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(NotADirectoryError, match="nowhere"):
        write_report(tmp_path / "nowhere")


# ---- curves --------------------------------------------------------------------------------------------------------


def test_the_line_is_the_median_around_each_place() -> None:
    values = np.random.default_rng(0).normal(size=400)
    at = np.array([0, 3, 50, 200, 399])
    want = [np.median(values[max(0, i - 10) : i + 11]) for i in at]
    np.testing.assert_array_equal(report._smoothed(values, at, False), want)


def test_a_spike_does_not_move_the_line() -> None:
    values = np.ones(400)
    values[[0, 200, 399]] = 1e6
    at = np.arange(400)
    assert (report._smoothed(values, at, False) == 1).all()


def test_on_a_logarithmic_axis_the_line_keeps_the_beginning() -> None:
    values = 1 / np.arange(1, 10_001)
    at = report._some(10_000, report.POINTS, True)
    line = report._smoothed(values, at, True)
    assert np.abs(np.log(line / values[at])).max() < np.log(1.2)


@pytest.mark.parametrize("logarithmic", [False, True])
@pytest.mark.parametrize("count", [1, 2, 150, 151, 10_000])
def test_a_thinned_curve_has_both_its_ends_and_no_place_twice(count: int, logarithmic: bool) -> None:
    found = report._some(count, 150, logarithmic)
    assert found[0] == 0
    assert found[-1] == count - 1
    assert len(found) <= 150
    assert (np.diff(found) > 0).all()


def test_colours_are_the_pages_own(tmp_path: Path) -> None:
    """Both themes: a chart has no colour but those of the style sheet."""
    pytest.importorskip("matplotlib")
    text = write_report(make(tmp_path, 50)).read_text()
    charts = "".join(re.findall(r"<svg.*?</svg>", text, re.DOTALL))
    assert re.findall(r"#[0-9a-f]{6}\b", charts) == []
    assert {"var(--one)", "var(--two)", "var(--soft)", "var(--line)"} <= set(re.findall(r"var\(--\w+\)", charts))
