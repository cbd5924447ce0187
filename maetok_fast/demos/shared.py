# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""What all demos share: their images and classes, bars, and how they stop."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from maetok_fast.data.installed import INSTALLED
from maetok_fast.data.samples import DataError, Source
from maetok_fast.data.sources import open_source
from maetok_fast.training.build import TrainingRun, train

__all__ = ["HIGHEST_DB", "DemoStopped", "bar", "check_classes", "open_images", "trained"]

HIGHEST_DB = 100.0  # of a reconstruction without an error


class DemoStopped(RuntimeError):
    """Somebody stopped a training of the demo; its checkpoint is written, and the same command goes on."""


def open_images(path: str) -> Source:
    """A source by its path; DataError says what else can be shown where an installed set is not here."""
    try:
        return open_source(path)
    except DataError as error:
        if path not in INSTALLED:
            raise
        raise DataError(f"{error}; or show images of your own, in class folders: --data FOLDER --test FOLDER") from None


def check_classes(data: Source, test: Source) -> int:
    """How many there are. DataError where a source has none, or they are not the same."""
    for source in (data, test):
        if not source.labelled:
            raise DataError(
                f"{source.path}: the demo needs images with classes, and these have none: put each class's images into "
                "a folder of its own"
            )
    if data.classes != test.classes:
        of, there = (", ".join(source.classes[:4]) or "no names" for source in (data, test))
        raise DataError(
            f"{test.path} has other classes ({there} ...) than {data.path} ({of} ...): give --test with images of the "
            "same ones"
        )
    count, tested = (1 + max(source.label(i) or 0 for i in range(len(source))) for source in (data, test))
    if tested > count:
        raise DataError(f"{test.path} has labels up to {tested - 1}, {data.path} up to {count - 1}; give other ones")
    return count


def trained(run: TrainingRun, quiet: bool = True) -> TrainingRun:
    """The run, done. DemoStopped where somebody stopped it."""
    newest = train(run, quiet=quiet)
    if int(newest.name) < run.loop.steps:
        raise DemoStopped(f"stopped at step {int(newest.name)} of {run.loop.steps} of {run.out}")
    return run


@contextlib.contextmanager
def bar(what: str, total: int, unit: str = "image", quiet: bool = False) -> Iterator[Callable[[int], None]]:
    """Progress, where somebody looks; yields what to call with how many more are done."""
    from tqdm.auto import tqdm

    with tqdm(total=total, desc=what, unit=unit, disable=True if quiet else None) as shown:
        yield lambda count: (shown.update(count), None)[1]
