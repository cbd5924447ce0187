# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""Endless batches out of worker processes: what `Batches` (loader.py) and `LatentBatches` (latents.py) have in common.

    requests(step) ──> torch's DataLoader: `workers` processes, reader[request] ──> _answer() ──> _next(): a batch

Requests are made in the main process, one a step, and answered in that order by whichever worker gets them. What is
read ahead is lost with the processes: a stream that goes on asks anew from its `step`.
"""

from __future__ import annotations

import atexit
import multiprocessing.util  # noqa: F401
import signal
import time
import weakref
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any, ClassVar, Generic, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset

from maetok_fast.checks import check_number
from maetok_fast.data.order import Order, batch_positions

__all__ = ["PREFETCH", "Stream", "WorkerError", "places_from", "start_worker"]

PREFETCH = 2  # batches of each worker
_OPEN: weakref.WeakSet[Stream[Any]] = weakref.WeakSet()

B = TypeVar("B")  # a batch
S = TypeVar("S", bound="Stream[Any]")


@atexit.register
def _close_all() -> None:
    """Before multiprocessing's own, which registered earlier, and would wait for workers that ignore SIGTERM."""
    for stream in list(_OPEN):
        stream.close()


class WorkerError(RuntimeError):
    """A worker process has ended; the message says how."""


def places_from(
    order: Order, batch: int, rank: int, world: int, step: int
) -> Iterator[tuple[int, tuple[tuple[int, int], ...]]]:
    """Endless (step, its (epoch, sample) for each place of the rank's batch), from a step on."""
    while True:
        yield step, tuple(order.at(p) for p in batch_positions(step, batch, rank, world))
        step += 1


class _Requests:
    """The endless requests from a step on, in the main process: what torch calls a sampler."""

    def __init__(self, make: Callable[[int], Iterator[Any]], step: int) -> None:
        self.make, self.step = make, step

    def __iter__(self) -> Iterator[Any]:
        return self.make(self.step)


class Stream(Generic[B]):
    """An endless iterator of batches; close it, or leave its `with`, to end the worker processes.

    reader: request -> answer, in a worker. requests: a step -> the endless requests from it on; it must not hold the
    stream, which would then outlive its last user. step: the next batch's. workers: 0: this process reads. start: how
    processes start: "fork", "spawn", "forkserver"; None: torch's choice.

    waited: seconds spent in next() so far. unreadable: sample -> why it could not be read. WorkerError by next() where
    a worker process has ended.
    """

    reads: ClassVar[str]  # what a worker reads, in words

    def __init__(
        self,
        reader: Dataset[Any],
        requests: Callable[[int], Iterator[Any]],
        *,
        step: int,
        workers: int,
        device: torch.device | str,
        start: str | None,
    ) -> None:
        check_number(type(self).__name__, "workers", workers, 0)
        self.step, self.device = step, torch.device(device)
        self.waited = 0.0
        self.unreadable: dict[str, str] = {}
        self._requests = _Requests(requests, step)
        self._loader: DataLoader = DataLoader(
            reader,
            batch_size=None,
            sampler=self._requests,
            num_workers=workers,
            collate_fn=_same,  # gets what the reader gives where batch_size is None
            pin_memory=self.device.type == "cuda",
            prefetch_factor=PREFETCH if workers else None,
            worker_init_fn=start_worker,
            multiprocessing_context=start if workers else None,
            generator=torch.Generator(),  # else it would draw from the training's own numbers
        )
        self._answers: Iterator[Any] | None = None

    def _next(self) -> B:
        """The next batch, of `_answer`; sets `step`."""
        raise NotImplementedError

    def __iter__(self: S) -> S:
        return self

    def __next__(self) -> B:
        begun = time.perf_counter()
        try:
            return self._next()
        finally:
            self.waited += time.perf_counter() - begun

    def state(self) -> dict[str, Any]:
        """For a checkpoint: what is made with step=state["step"], `Batches` with unreadable=state["unreadable"] too,
        goes on from here."""
        return {"step": self.step, "unreadable": dict(self.unreadable)}

    def close(self) -> None:
        """Ends the worker processes; next() would start them again, at the step where it stopped."""
        answers, self._answers = self._answers, None
        shut = getattr(answers, "_shutdown_workers", None)  # torch has no public name for it
        while shut is not None:
            try:
                shut()
                shut = None
            except RuntimeError as error:  # torch's signal handler names a dead worker once more at each child's end
                if not _is_of_a_worker(error):
                    raise

    def __enter__(self: S) -> S:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _answer(self) -> Any:
        """The reader's answer to the next request."""
        if self._answers is None:
            self._requests.step = self.step
            self._answers = iter(self._loader)
            _OPEN.add(self)
        try:
            return next(self._answers)
        except (RuntimeError, EOFError, OSError) as error:
            if not _is_of_a_worker(error):
                raise
            ended = error
        self.close()  # else the other workers' ends would raise the same again, anywhere
        how = " ".join(str(ended).split()) or "it does not answer any more"
        raise WorkerError(
            f"a process that reads {self.reads} has ended ({how}); was it killed for its memory, take fewer workers, "
            "else workers=0 shows at which sample it ends"
        ) from ended


def _is_of_a_worker(error: Exception) -> bool:
    """Whether torch's loader says by this that a worker has ended; what the reader itself raised there is another
    matter. A connection's errors: tensors in flight are fetched from the worker, and went with it."""
    text = str(error)
    if isinstance(error, RuntimeError):
        return "DataLoader worker (pid" in text
    return isinstance(error, (EOFError, ConnectionError, FileNotFoundError)) and "DataLoader worker" not in text


def _same(answer: Any) -> Any:
    return answer


def start_worker(number: int) -> None:
    """A worker process' first act."""
    # Ctrl-C, and a cluster's SIGTERM to all of a job's processes, are the main process's to answer: it may want to save
    # what it has, and ends its workers itself
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, signal.SIG_IGN)
    torch.set_num_threads(1)
