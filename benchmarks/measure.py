# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""This machine's page: throughput, models and ops measured in one go, about 12 minutes -> docs/measured/<machine>.md.

    python benchmarks/measure.py                     everything, at the default precision of this machine
    python benchmarks/measure.py --budget 300        in less time: smaller sizes, fewer rows, which are named
    python benchmarks/measure.py --from FOLDER       measure nothing: the page from what --keep FOLDER left

    throughput.py --json   models.py sit, tokenizer   maetok-fast bench ops --quick      each in a process of its own
            └───────────────────────┴─────────────────────────────┴── JSON ── _page.py ── the page

A part that fails is named on the page with the last line that it printed, and the exit status is 1.
"""

from __future__ import annotations

import argparse
import datetime
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parent.parent))

from benchmarks import _cli, _page

ROOT = Path(__file__).resolve().parent.parent
PAGES = ROOT / "docs" / "measured"
START_UP = 12.0  # seconds that a part takes beside its budget: imports, weights, pictures
SHARES = {"throughput": 0.37, "sit": 0.21, "tokenizer": 0.13, "ops": 0.29}  # of the budget, in order of importance
Run = Callable[[list[str]], tuple[int, str]]  # command -> exit status, what it printed


def commands(folder: Path, seconds: float, device: str) -> dict[str, list[str]]:
    """The command of each part; it writes folder/<part>.json (throughput: folder/throughput/throughput.json)."""
    here, python = ROOT / "benchmarks", sys.executable
    budget = {part: f"{max(1.0, share * seconds - START_UP):.0f}" for part, share in SHARES.items()}
    throughput = [python, str(here / "throughput.py"), "--out", str(folder / "throughput")]
    models = [python, str(here / "models.py")]
    ops = [python, "-c", "from maetok_fast.cli import main; main()", "bench", "ops", "--quick"]
    made = {
        "throughput": [*throughput, "--tokens", "128", "--res", "512"],
        "sit": [*models, "sit", "--batch", "4", "1", "--json", str(folder / "sit.json")],
        "tokenizer": [*models, "tokenizer", "--batch", "4", "--json", str(folder / "tokenizer.json")],
        "ops": [*ops, "--json", str(folder / "ops.json")],
    }
    return {part: [*command, "--budget", budget[part], "--device", device] for part, command in made.items()}


def collect(folder: Path) -> dict[str, dict[str, Any]]:
    """part -> the document that it left in the folder; parts that left none are absent."""
    paths = {part: folder / f"{part}.json" for part in SHARES} | {
        "throughput": folder / "throughput" / "throughput.json"
    }
    return {part: json.loads(path.read_text()) for part, path in paths.items() if path.is_file()}


def measure(folder: Path, seconds: float, device: str, run: Run) -> dict[str, str]:
    """Runs all parts; part -> why it left nothing, for those that failed."""
    failed = {}
    for part, command in commands(folder, seconds, device).items():
        print(f"{part} ...", flush=True)
        status, printed = run(command)
        if status != 0:
            lines = printed.strip().splitlines()
            failed[part] = lines[-1] if lines else f"exit status {status}"
    return failed


def run_command(command: list[str]) -> tuple[int, str]:
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False, stdin=subprocess.DEVNULL
    )
    return done.returncode, done.stdout


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = _cli.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--budget", type=_cli.seconds, default=690.0, metavar="SECONDS", help="time for all of it (default 690)")
    add("--device", default="cpu", help="cpu (default) or cuda")
    add("--out", type=Path, help="the page (default docs/measured/<machine>.md); the chart is written beside it")
    add("--keep", type=Path, metavar="FOLDER", help="keep the measurements as JSON there")
    add("--from", type=Path, dest="stored", metavar="FOLDER", help="measure nothing, take what --keep left")
    args = parser.parse_args(argv)
    _cli.device(parser, args.device)
    for option in ("out", "keep"):
        _cli.output(parser, f"--{option}", getattr(args, option), folder=option == "keep")
    if args.stored is not None:
        where = f"--from {args.stored}"
        if not args.stored.is_dir():
            parser.error(f"{where}: no such folder")
        if not _cli.said(parser, where, lambda: collect(args.stored), ValueError, OSError):
            parser.error(f"{where}: nothing that --keep wrote is in there")
    return args


def main(argv: Sequence[str] | None = None, run: Run = run_command) -> int:
    args = parse(argv)
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.stored or args.keep or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        failed = {} if args.stored else measure(folder, args.budget, args.device, run)
        documents = collect(folder)
        for part, why in failed.items():
            documents.pop(part, None)
            print(f"{part} failed: {why}", file=sys.stderr)
        if not documents:
            return 1
        machine = next(iter(documents.values()))["machine"]
        date = stamp(folder)
        page = args.out or PAGES / f"{_page.file_name(machine)}.md"
        page.parent.mkdir(parents=True, exist_ok=True)
        chart = folder / "throughput" / "throughput.png"
        shown = page.with_suffix(".png") if "throughput" in documents and chart.is_file() else None
        if shown is not None:
            shutil.copy(chart, shown)
        page.write_text(_page.page(documents, failed, date, shown.name if shown else None))
        print(f"wrote {page}")
    return 1 if failed else 0


def stamp(folder: Path) -> str:
    """The day of the measurements: when the newest of their files was written."""
    newest = max(path.stat().st_mtime for path in folder.rglob("*.json"))
    return datetime.datetime.fromtimestamp(newest, datetime.timezone.utc).date().isoformat()


if __name__ == "__main__":
    raise SystemExit(main())
