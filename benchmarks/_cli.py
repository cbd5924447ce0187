# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""What the command lines share: a wrong value ends in one line and exit status 2, never in a traceback."""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch

from maetok_fast.bench.machine import fast_dtype, find_device

PRECISIONS = ("auto", "bf16", "fp16", "fp32")


class Parser(argparse.ArgumentParser):
    """Says a wrong value in one line, without the usage in front of it (`--help` has that)."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")


def count(text: str) -> int:
    """A whole number of at least 1."""
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"expects a whole number of at least 1, got {text!r}")
    return value


def seconds(text: str) -> float:
    """A time above 0."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"expects a number of seconds above 0, got {text!r}")
    return value


def device(parser: argparse.ArgumentParser, name: str) -> torch.device:
    """The device of this name; ends the program where it is not one that can be measured here."""
    return said(parser, "--device", lambda: find_device(name), ValueError)


def dtype(name: str, where: torch.device) -> str:
    """The precision to measure: as asked, or for "auto" the fastest that this device computes at full rate."""
    return fast_dtype(where) if name == "auto" else name


def output(parser: argparse.ArgumentParser, option: str, path: Path | None, *, folder: bool = False) -> None:
    """Ends the program where a result could not be written to `path`: before anything was measured, not after."""
    if path is None:
        return
    place = path if folder else path.parent
    if not folder and path.is_dir():
        parser.error(f"{option} {path}: expected a file, this is a folder")
    try:
        place.mkdir(parents=True, exist_ok=True)
        probe = place / ".maetok_fast_writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        parser.error(f"{option} {path}: cannot be written ({error.strerror or error})")


def said(parser: argparse.ArgumentParser, what: str, make: Callable[[], Any], *errors: type[Exception]) -> Any:
    """`make()`, the named errors as one line: for values that only their own code can judge (files, checkpoints)."""
    try:
        return make()
    except errors as error:
        text = " ".join(str(error).split()) or type(error).__name__
        parser.error(f"{what}: {text}")


def elsewhere(script: str, flag: str, side: str, args: argparse.Namespace, options: Sequence[str]) -> dict[str, Any]:
    """What `script FLAG SIDE` with these options of args prints as the JSON of its last line, in a process of its own;
    {"side", "error"} where that failed."""
    command = [sys.executable, script, flag, side]
    for option in options:
        command += [f"--{option.replace('_', '-')}", str(getattr(args, option))]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines() or [f"it ended with status {done.returncode}"]
        return {"side": side, "error": lines[-1]}
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found
