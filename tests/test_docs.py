# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""What the documents say is true: README's Python runs as it stands, links lead somewhere, commands exist, and the page
of environment variables is complete."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from test_house import tracked

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]


def blocks(text: str, language: str) -> list[str]:
    """The fenced code blocks of one language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.M | re.S)


def ids(pages: list[Path]) -> list[str]:
    return [str(page.relative_to(ROOT)) for page in pages]


# ---- README's Python -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", range(len(blocks(README, "python"))))
def test_readmes_python_runs(number: int, tmp_path: Path) -> None:
    """As it stands, each block by itself, in an empty folder, offline."""
    done = subprocess.run(
        [sys.executable, "-c", blocks(README, "python")[number]],
        cwd=tmp_path, env={**os.environ, "HF_HUB_OFFLINE": "1"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    if number == 0:
        pictures = list(tmp_path.glob("*.png"))
        assert pictures, "README's first block ends in a picture"
        Image.open(pictures[0]).load()


# ---- links and commands --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES, ids=ids(PAGES))
def test_links_lead_somewhere(page: Path) -> None:
    targets = re.findall(r"\]\(([^)\s]+)\)", re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.M | re.S))
    local = [t.partition("#")[0] for t in targets if not re.match(r"[a-z]+:", t) and not t.startswith("#")]
    missing = [target for target in local if not (page.parent / target).exists()]
    assert not missing, f"{page.relative_to(ROOT)} links to what is not there: {', '.join(missing)}"


@pytest.mark.parametrize("page", PAGES, ids=ids(PAGES))
def test_commands_exist(page: Path) -> None:
    text = page.read_text()
    scripts = re.findall(r"\bpython3? (?!-)([\w./-]+\.py)\b", text)
    scripts += re.findall(r"(?<![\w./-])(?:benchmarks|examples|tests)/[\w/.-]+\.py\b", text)
    missing = sorted({script for script in scripts if not (ROOT / script).is_file()})
    for module in re.findall(r"\bpython3? -m (benchmarks[\w.]*)", text):
        path = ROOT / module.replace(".", "/")
        if not (path.with_suffix(".py").is_file() or (path / "__main__.py").is_file()):
            missing.append(module)
    assert not missing, f"{page.relative_to(ROOT)} names commands that are not there: {', '.join(missing)}"


def test_the_map_names_what_is_there() -> None:
    paths = re.findall(
        r"`((?:kernels|maetok_fast|csrc|benchmarks|tests|docs|\.ci)/[\w./-]*)`", (ROOT / "docs/map.md").read_text()
    )
    missing = [path for path in paths if not any((ROOT / f"{path}{suffix}").exists() for suffix in ("", ".py"))]
    assert paths
    assert not missing, f"docs/map.md names what is not there: {', '.join(missing)}"


# ---- environment variables -----------------------------------------------------------------------------------------

_NAME = r"[A-Z][A-Z0-9]*_?[A-Z0-9_]*"
ENVIRONMENT = ROOT / "docs" / "environment.md"


_READS = (
    rf"""(?:environ(?:\.\w+)?[\[(]|(?:get|set|del)env\()\s*["']({_NAME})["']""",  # environ["A"], getenv("A")
    rf"""["']({_NAME})["'] (?:not )?in os\.environ""",
    rf"""["']({_NAME})["']:.*environ|environ.*["']({_NAME})["']:""",  # {**os.environ, "A": value}
    rf"""\bin \(?["']({_NAME})["'], ["']({_NAME})["']\)?.*environ""",  # for name in ("A", "B") if environ.get(name)
)


def variables(path: Path) -> set[str]:
    """Environment variables that a source reads or sets: what stands in a line that says so, our own ones anywhere, and
    what a shell script takes with a default."""
    text = path.read_text(errors="replace")
    found = set(re.findall(r"\bMAETOK_FAST_[A-Z_]*[A-Z]\b", text))
    for line in text.splitlines():
        for pattern in _READS:
            found |= {name for match in re.finditer(pattern, line) for name in match.groups() if name}
    if path.suffix in ("", ".sh"):
        found |= set(re.findall(rf"\$\{{({_NAME}):?-", text))
    return found


def sources() -> list[Path]:
    return [path for path in tracked("*.py", "csrc/*", ".ci/*", "Makefile") if path != Path(__file__)]


def test_every_environment_variable_is_named() -> None:
    page = set(re.findall(rf"`({_NAME})`", ENVIRONMENT.read_text()))
    used: dict[str, list[str]] = {}
    for path in sources():
        for name in variables(path):
            used.setdefault(name, []).append(str(path.relative_to(ROOT)))
    missing = {name: places for name, places in used.items() if name not in page}
    assert not missing, f"docs/environment.md lacks {missing}"
    stale = [name for name in page if name.startswith("MAETOK_FAST_") and name not in used]
    assert not stale, f"docs/environment.md names what nothing reads: {', '.join(stale)}"


def test_variables_are_found(tmp_path: Path) -> None:
    source = tmp_path / "a.py"
    source.write_text(
        """A = os.environ.get("ONE", "0") == "YES"
B = [n for n in ("TWO", "THREE_3") if os.environ.get(n)]
run(MAETOK_FAST_FOUR="1"); os.getenv('FIVE'); monkeypatch.setenv("SIX", "NO")
if "SEVEN" not in os.environ: os.environ["EIGHT"] = "MAYBE"
run(env={**os.environ, "NINE": "1"})
"""
    )
    assert variables(source) == {"ONE", "TWO", "THREE_3", "MAETOK_FAST_FOUR", "FIVE", "SIX", "SEVEN", "EIGHT", "NINE"}
    script = tmp_path / "run"
    script.write_text('x=${NINE:-3} y=${TEN-4} "$ELEVEN"')
    assert variables(script) == {"NINE", "TEN"}
