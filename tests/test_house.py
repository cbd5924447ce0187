# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""The house's rules, read from the source without importing it.

Arrows point down only. Every import counts: inside a function, for types alone, or by a name given to import_module.
FLOORS is the plan: one tuple is one floor, the lowest first, and names on one floor may import each other in one
direction; names without a file yet are rooms that are still to come.
"""

from __future__ import annotations

import ast
import subprocess
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent
LICENCE = "Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0."
LONGEST = 500  # lines of a Python module; a head holds about 400
LONG = {
    "tests/test_bench_ops.py": "tests of one command",
    "tests/test_benchmarks.py": "one job's rows, pictures and pages",
    "tests/test_checkpoints.py": "every layout, read and written",
    "tests/test_fp8.py": "casts and the linear layer",
    "tests/test_models_tokenizer.py": "one model's tests",
    "tests/test_ops.py": "one suite over all op records",
    "tests/test_token_mask.py": "Philox, masks and what is gathered by them",
}

OTHERS = "*"  # every name of the room that has no place of its own
FLOORS = {
    "maetok_fast": (
        ("__init__",),  # names its parts and imports none
        ("kernels",),
        ("_optional", "checks", "config", "layers", "positions", "precision"),
        ("models",),
        ("data", "diffusion", "inference"),
        ("_accelerate", "analysis", "bench", "doctor", "evaluation", "pipeline", "training"),
        ("demos",),
        ("cli",),
    ),
    "maetok_fast.kernels": (
        ("_interpreter", "_processor", "_record"),
        ("_native", "_native_call", "_tiles", "_triton"),
        ("_dispatch",),
        ("_registration",),
        ("_drive", "_op"),
        (OTHERS,),
        ("__init__",),
    ),
    "maetok_fast.models": (
        ("_checks", "configs"),
        ("vit",),
        (OTHERS,),
        ("catalog",),
        ("__init__",),
    ),
}


class Arrow(NamedTuple):
    """source imports target; `how` says where the import stands."""

    source: str
    target: str
    line: int
    how: str

    def __str__(self) -> str:
        return f"{self.source}:{self.line} -> {self.target}{self.how}"


def module_name(path: Path) -> str:
    """kernels/ is the package maetok_fast.kernels; a package is called after its folder."""
    parts = list(path.with_suffix("").parts)
    if parts[0] == "kernels":
        parts.insert(0, "maetok_fast")
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def read_modules(root: Path) -> dict[str, Path]:
    """The package's modules by name."""
    files = [*(root / "maetok_fast").rglob("*.py"), *(root / "kernels").rglob("*.py")]
    return {module_name(path.relative_to(root)): path for path in files}


def arrows(modules: dict[str, Path]) -> list[Arrow]:
    """All imports between these modules; `from package import module` goes to the module."""
    found = []
    for name, path in modules.items():
        tree = ast.parse(path.read_text(), str(path))
        package = name if path.name == "__init__.py" else name.rpartition(".")[0]
        for node, how in _nodes(tree, ""):
            for target in _targets(node, package, modules):
                if target != name:
                    found.append(Arrow(name, target, node.lineno, how))
    return sorted(set(found))


def _nodes(node: ast.AST, how: str) -> Iterator[tuple[ast.stmt | ast.Call, str]]:
    for child in ast.iter_child_nodes(node):
        inner = how
        if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            inner = " (inside a function)"
        elif isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            inner = " (for types)"
        if isinstance(child, (ast.Import, ast.ImportFrom, ast.Call)):
            yield child, inner
        yield from _nodes(child, inner)


def _targets(node: ast.stmt | ast.Call, package: str, modules: dict[str, Path]) -> list[str]:
    names: list[str] = []
    if isinstance(node, ast.Import):
        names = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
        base = ".".join(package.split(".")[: len(package.split(".")) - node.level + 1]) if node.level else ""
        base = ".".join(part for part in (base, node.module) if part)
        names = [f"{base}.{alias.name}" for alias in node.names]
    elif isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in ("import_module", "__import__"):
        names = [a.value for a in node.args[:1] if isinstance(a, ast.Constant) and isinstance(a.value, str)]
    found = []
    for name in names:
        while name and name not in modules:  # a name inside a module
            name = name.rpartition(".")[0]
        found += [name] if name else []
    return found


def floor(module: str, room: str) -> int | None:
    """The floor of a module of a room; None where the plan has no place for it."""
    name = module[len(room) + 1 :].split(".")[0] or "__init__"
    for i, names in enumerate(FLOORS[room]):
        if name in names:
            return i
    return next((i for i, names in enumerate(FLOORS[room]) if OTHERS in names), None)


def upward(found: Iterable[Arrow]) -> list[str]:
    """Arrows from a lower floor to a higher one, in any room that holds both ends."""
    bad = []
    for arrow in found:
        for room in FLOORS:
            ends = [floor(end, room) for end in arrow[:2] if end == room or end.startswith(room + ".")]
            if len(ends) == 2 and None not in ends and ends[0] < ends[1]:  # type: ignore[operator]
                bad.append(str(arrow))
    return bad


def circles(found: Iterable[Arrow]) -> list[str]:
    """Each circle of modules, and of rooms (maetok_fast.X with all below it), with the arrows that close it."""
    found = list(found)
    bad = []
    for depth in (99, 2):
        short = {end: ".".join(end.split(".")[:depth]) for arrow in found for end in arrow[:2]}
        graph: dict[str, set[str]] = {}
        for arrow in found:
            if short[arrow.source] != short[arrow.target]:
                graph.setdefault(short[arrow.source], set()).add(short[arrow.target])
        reach = {name: _reachable(name, graph) for name in graph}
        for group in {frozenset(n for n in reach[name] if name in reach.get(n, ())) for name in graph} - {frozenset()}:
            inside = sorted(str(a) for a in found if {short[a.source], short[a.target]} <= group)
            bad.append(f"{', '.join(sorted(group))}:\n    " + "\n    ".join(inside))
    return sorted(set(bad))


def _reachable(start: str, graph: dict[str, set[str]]) -> set[str]:
    seen: set[str] = set()
    todo = [start]
    while todo:
        for name in graph.get(todo.pop(), ()):
            if name not in seen:
                seen.add(name)
                todo.append(name)
    return seen


def tracked(*patterns: str) -> list[Path]:
    """Files that git knows, new ones included."""
    done = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "--", *patterns],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        pytest.skip(f"not a git checkout: {done.stderr.strip()}")
    return [path for line in done.stdout.splitlines() if (path := ROOT / line).is_file()]


def test_arrows_point_down() -> None:
    bad = upward(arrows(read_modules(ROOT)))
    assert not bad, "arrows that point up (FLOORS says where a module stands):\n  " + "\n  ".join(bad)


def test_no_circles() -> None:
    bad = circles(arrows(read_modules(ROOT)))
    assert not bad, "circles of imports:\n  " + "\n  ".join(bad)


def test_every_module_has_its_floor() -> None:
    for room in FLOORS:
        homeless = [
            module for module in read_modules(ROOT) if module.startswith(room + ".") and floor(module, room) is None
        ]
        assert not homeless, f"give them a floor in tests/test_house.py: {', '.join(homeless)}"


def test_the_package_imports_nothing_of_the_project_outside_it() -> None:
    for name, path in read_modules(ROOT).items():
        for node, _ in _nodes(ast.parse(path.read_text()), ""):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
            for imported in names:
                outside = imported.split(".")[0] in ("benchmarks", "tests", "examples", "setup", "kernels")
                assert not outside, f"{name}:{node.lineno} imports {imported}, which is not installed with it"


def test_every_source_has_the_licence_line() -> None:
    folders = ("maetok_fast", "kernels", "benchmarks", "tests", "examples")
    files = [path for path in tracked("*.py") if path.relative_to(ROOT).parts[0] in (*folders, "setup.py")]
    files += tracked("csrc/*")
    assert files
    missing = [
        str(path.relative_to(ROOT)) for path in files if LICENCE not in "".join(path.read_text().splitlines(True)[:3])
    ]
    assert not missing, f"without the line '{LICENCE}' at their top: {', '.join(missing)}"


def test_modules_fit_in_a_head() -> None:
    lengths = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in tracked("*.py")}
    long = {name: count for name, count in lengths.items() if count > LONGEST and name not in LONG}
    assert not long, f"more than {LONGEST} lines; split them, or give a reason in LONG: {long}"


# ---- the test of the test ------------------------------------------------------------------------------------------


def plant(root: Path, sources: dict[str, str]) -> list[Arrow]:
    """The arrows of a small house: module paths without .py, and their sources."""
    for name in ("maetok_fast/__init__", "maetok_fast/models/__init__", "kernels/__init__", *sources):
        path = root / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(sources.get(name, ""))
    return arrows(read_modules(root))


def test_a_clean_house_passes(tmp_path: Path) -> None:
    house = {
        "kernels/_op": "from ._record import Record, Sample",
        "kernels/_record": "import torch",
        "kernels/adaln": "from . import _native, _op",
        "kernels/_native": "",
        "maetok_fast/layers": "from maetok_fast.kernels import adaln",
        "maetok_fast/cli": "def doctor():\n    from maetok_fast import layers, kernels",
    }
    found = plant(tmp_path, house)
    assert [str(arrow) for arrow in found] == [
        "maetok_fast.cli:2 -> maetok_fast.kernels (inside a function)",
        "maetok_fast.cli:2 -> maetok_fast.layers (inside a function)",
        "maetok_fast.kernels._op:1 -> maetok_fast.kernels._record",
        "maetok_fast.kernels.adaln:1 -> maetok_fast.kernels._native",
        "maetok_fast.kernels.adaln:1 -> maetok_fast.kernels._op",
        "maetok_fast.layers:1 -> maetok_fast.kernels.adaln",
    ]
    assert upward(found) == []
    assert circles(found) == []


@pytest.mark.parametrize(
    ("sources", "arrow"),
    [
        ({"kernels/hog": "import maetok_fast.layers"}, "kernels.hog:1 -> maetok_fast.layers"),
        ({"kernels/_record": "from ._op import Op"}, "_record:1 -> maetok_fast.kernels._op"),
        (
            {"kernels/_registration": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from ._op import Op"},
            "_registration:3 -> maetok_fast.kernels._op (for types)",
        ),
        (
            {"maetok_fast/layers": "def f():\n    from maetok_fast.models.sit import SiT"},
            "layers:2 -> maetok_fast.models.sit (inside a function)",
        ),
        (
            {"maetok_fast/layers": "from importlib import import_module\nimport_module('maetok_fast.models.sit')"},
            "sit",
        ),
        ({"maetok_fast/models/sit": "from . import catalog"}, "sit:1 -> maetok_fast.models.catalog"),
        ({"maetok_fast/models/sit": "from maetok_fast.diffusion import sample"}, "-> maetok_fast.diffusion"),
    ],
)
def test_an_arrow_up_is_found(tmp_path: Path, sources: dict[str, str], arrow: str) -> None:
    house = {
        "kernels/_op": "",
        "kernels/hog": "",
        "maetok_fast/layers": "",
        "maetok_fast/diffusion/paths": "",
        "maetok_fast/diffusion/__init__": "",
        "maetok_fast/models/sit": "",
        "maetok_fast/models/catalog": "",
    }
    (bad,) = upward(plant(tmp_path, {**house, **sources}))
    assert arrow in bad


@pytest.mark.parametrize("hide", ["{}", "def f():\n    {}", "if TYPE_CHECKING:\n    {}"])
def test_a_circle_is_found(tmp_path: Path, hide: str) -> None:
    found = plant(
        tmp_path,
        {
            "kernels/hog": "from .lpips import tail",
            "kernels/lpips": "from . import blur",
            "kernels/blur": hide.format("from .hog import hog"),
        },
    )
    (circle,) = circles(found)
    assert circle.startswith("maetok_fast.kernels.blur, maetok_fast.kernels.hog, maetok_fast.kernels.lpips:")
    assert upward(found) == []


def test_a_circle_of_rooms_is_found(tmp_path: Path) -> None:
    """No circle of modules, but neither room can be read without the other."""
    found = plant(
        tmp_path,
        {
            "maetok_fast/data/images": "from maetok_fast.diffusion.paths import LINEAR",
            "maetok_fast/diffusion/paths": "",
            "maetok_fast/diffusion/cache": "from maetok_fast.data import index",
            "maetok_fast/data/index": "",
        },
    )
    (circle,) = circles(found)
    assert circle.startswith("maetok_fast.data, maetok_fast.diffusion:")
