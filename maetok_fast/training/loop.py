# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""The loop of every stage. It knows networks, batches and files; what a step computes is the stage's (`Stage`).

    batch ── stage.backward, part by part ── clip, step where finite ── average ── log, pictures, validation, checkpoint
                  nothing here asks the device for a value, but the log, once every `log_every` steps

    <out>/config.yaml environment.json log.jsonl tensorboard/ samples/ checkpoints/ unreadable.jsonl report.html

Started again with the same command, a run goes on from its newest checkpoint: on a CPU bit for bit, with as many
processes as before; with another number of them the same images in the same order, and other random numbers.
"""

from __future__ import annotations

import contextlib
import json
import logging
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from maetok_fast.layers import EMA, recompute
from maetok_fast.pipeline.run import write_json
from maetok_fast.training.checkpoints import Checkpoints, TrainingError, load_tensors, save_tensors
from maetok_fast.training.configs import Run
from maetok_fast.training.optim import GuardedAdamW, learning_rate, parameter_groups
from maetok_fast.training.state import load_module, module_state, random_state, restore_random_state, whole
from maetok_fast.training.world import World

if TYPE_CHECKING:
    from maetok_fast.training.observe import Observer

__all__ = ["Batches", "Loop", "Measured", "Network", "Stage", "active", "optimize", "prepare"]

log = logging.getLogger("maetok_fast")


@dataclass
class Network:
    """What one optimizer trains. blocks: sharded and checkpointed one by one. first: the first step at which it is
    trained. rate: its learning rate over the run's. shard: whether FSDP may. called: the wrapped module."""

    name: str
    module: nn.Module
    blocks: list[nn.Module] = field(default_factory=list)
    first: int = 0
    rate: float = 1.0
    shard: bool = True
    called: Any = None
    optimizer: Any = None


class Batches(Protocol):
    """The endless batches of a run: `data.loader.Batches`, `data.latents.LatentBatches`. Each has `indices`, the
    samples in it. waited: seconds spent in next(); unreadable: sample -> why it could not be read."""

    waited: float
    unreadable: dict[str, str]

    def __next__(self) -> Any: ...
    def __enter__(self) -> Any: ...
    def __exit__(self, *error: Any) -> None: ...


@dataclass(frozen=True)
class Measured:
    """A validation on one rank: the sum of `count` values of what the log calls `name`; falling: less is better."""

    name: str
    total: float
    count: int
    falling: bool = False


class Stage(Protocol):
    """What a step computes. `averaged` is the module whose trainable parameters the EMA follows; `product` the name of
    its folder in a checkpoint."""

    product: str
    networks: list[Network]

    @property
    def averaged(self) -> nn.Module: ...

    def begin(self, world: World, ema: EMA) -> None:
        """Everything is on its device and wrapped."""

    def backward(self, batch: Any, step: int, part: int, parts: int) -> dict[str, Tensor]:
        """Adds the gradients of this part of a step (of `parts`); what the log shows, scalars on the device."""
        ...

    def picture(self) -> dict[str, Tensor]:
        """Rows of images (B, 3, H, W) in [-1, 1] by name, {} for none; called on all ranks, the averaged weights in
        place, in eval mode and without gradients."""
        ...

    def validate(self) -> Measured | None:
        """Called likewise; None where there is nothing to measure with."""
        ...

    def measure(self) -> dict[str, float]:
        """Called likewise, at `metrics.every`: values over all ranks, the same on each; {} for none."""
        ...

    def save_average(self, folder: Path, average: dict[str, Tensor]) -> None:
        """Writes the averaged model as its users load it. average: its whole state, frozen tensors and buffers too."""

    def load_average(self, folder: Path) -> dict[str, Tensor]:
        """What `save_average` was given."""
        ...


def prepare(run: Run, stage: Stage, world: World) -> EMA:
    """The stage's networks on their device, wrapped, with their optimizers; the average that follows them."""
    for network in stage.networks:
        network.module.to(world.device)
        recompute(network.module, run.loop.recompute)
        if run.loop.checkpointing:
            _checkpoint_activations(network.blocks)
        network.called = world.wrap(network.module, network.blocks, network.shard)
        groups = parameter_groups(network.module, run.optimizer.weight_decay)
        network.optimizer = GuardedAdamW(groups, run.optimizer, network.rate)
    ema = EMA(stage.averaged, run.ema.decay)
    if run.ema.dtype == "bf16":
        ema.to(torch.bfloat16)
    stage.begin(world, ema)
    return ema


def active(stage: Stage, step: int) -> list[Network]:
    """Those that this step trains."""
    return [network for network in stage.networks if step >= network.first]


def optimize(run: Run, stage: Stage, ema: EMA, step: int) -> dict[str, Tensor]:
    """The step of every active network from the gradients that are there, and of the average. Returns the gradients'
    norms and "finite", whether all were, 1 or 0: scalars on the device."""
    rate = learning_rate(run.optimizer, step, run.loop.steps, run.loop.batch)
    values: dict[str, Tensor] = {}
    flags = []
    for network in active(stage, step):
        followed = (ema, stage.averaged) if network is stage.networks[0] else ()
        values[f"gradient/{network.name}"], finite = network.optimizer.step(rate, *followed)
        network.optimizer.zero_grad()
        flags.append(finite)
    values["finite"] = torch.stack(flags).all().float()
    return values


class Loop:
    """One run. `fit` trains until `run.loop.steps`, from the newest checkpoint in `run.out` on."""

    def __init__(
        self,
        run: Run,
        stage: Stage,
        world: World,
        batches: Callable[[int, dict[str, str]], Batches],
        observer: Callable[[int], Observer],
        fingerprint: str = "",
    ) -> None:
        """batches(part, unreadable): the endless batches from that part of a step on (step * accumulate), knowing the
        files that this rank could not read so far. observer(step): the one that shows the run from a step on.
        fingerprint: of the data, which a run that goes on must find again."""
        self.run, self.stage, self.world, self.fingerprint = run, stage, world, fingerprint
        self.out = Path(run.out)
        self.make_batches, self.make_observer = batches, observer
        self.checkpoints = Checkpoints(self.out / "checkpoints", run.loop.keep, world)
        self.step, self.skipped, self._bad = 0, 0, 0
        self._saved: int | None = None
        self._unreadable: dict[str, str] = {}
        self._random: dict[str, Tensor] = {}  # to go on with
        self._asked_to_stop = False
        self._ids: list[tuple[int, list[int]]] = []
        torch.manual_seed(run.loop.seed + 1_000_003 * world.rank)
        self.ema = prepare(run, stage, world)

    # ---- training ----

    def fit(self) -> Path:
        """The newest checkpoint's folder. TrainingError where the run cannot go on."""
        newest = self.checkpoints.newest()
        if newest is not None:
            self._resume(newest)
        loop = self.run.loop
        observer = self.make_observer(self.step)
        self.batches = batches = self.make_batches(self.step * loop.accumulate, self._unreadable)
        with self._signals(), batches, contextlib.closing(observer):
            if self._random:  # at last: nothing may draw between this and the step
                restore_random_state(self._random, self.world.device)
            pending: list[dict[str, Tensor]] = []
            waited, since, aside = batches.waited, time.perf_counter(), 0.0
            while self.step < loop.steps and not self._asked_to_stop:
                pending.append(self._one_step(batches))
                self.step += 1
                observer.step(1)
                if self.step % loop.log_every == 0 or self.step == loop.steps:
                    values, pending = self._read(pending), []
                    seconds = time.perf_counter() - since - aside
                    data = batches.waited - waited
                    observer.record(self.step, values, seconds=seconds, waited=data, unreadable=len(batches.unreadable))
                    waited, since, aside = batches.waited, time.perf_counter(), 0.0
                begun = time.perf_counter()
                if self._due(loop.picture_every):
                    self._picture(observer)
                if self._due(loop.validate_every):
                    self._validate(observer)
                if self._due(self.run.metrics.every):
                    self._measure(observer)
                if self._due(loop.checkpoint_every):
                    self.save()
                aside += time.perf_counter() - begun  # no part of the steps' time
            return self.save()

    def _due(self, every: int) -> bool:
        return every > 0 and (self.step % every == 0 or self.step == self.run.loop.steps)

    def _one_step(self, batches: Batches) -> dict[str, Tensor]:
        run, parts = self.run, self.run.loop.accumulate
        for network in self.stage.networks:
            network.module.train()
        values: dict[str, Tensor] = {}
        for part in range(parts):
            batch = next(batches)
            self._ids.append((self.step, list(batch.indices)))
            with contextlib.ExitStack() as stack:
                for network in active(self.stage, self.step):
                    stack.enter_context(self.world.without_sync(network.called, part + 1 < parts))
                for name, value in self.stage.backward(batch, self.step, part, parts).items():
                    values[name] = values[name] + value if name in values else value
        values = {name: value / parts for name, value in values.items()} if parts > 1 else values
        return values | optimize(run, self.stage, self.ema, self.step)

    def _read(self, pending: list[dict[str, Tensor]]) -> dict[str, float]:
        """Means over the steps since the last log, in one copy to the host; bad steps are counted and their samples
        written down. TrainingError after too many of them one after the other."""
        names = list(dict.fromkeys(name for values in pending for name in values))
        missing = torch.full((), float("nan"), device=self.world.device)
        rows = torch.stack([torch.stack([v.get(n, missing).float().flatten()[0] for n in names]) for v in pending])
        table = self.world.mean(rows).cpu()
        finite = table[:, names.index("finite")] > 0.999  # on every rank
        self._count_bad(finite.tolist(), len(pending))
        good = table[finite]
        found = {n: _mean(good[:, i]) for i, n in enumerate(names) if n != "finite"}
        found["learning_rate"] = learning_rate(
            self.run.optimizer, self.step - 1, self.run.loop.steps, self.run.loop.batch
        )
        found["skipped_steps"] = float(self.skipped)
        return found

    def _count_bad(self, finite: list[bool], count: int) -> None:
        first = self.step - count
        for step, good in zip(range(first, self.step), finite):
            self._bad = 0 if good else self._bad + 1
            if good:
                continue
            self.skipped += 1
            samples = [i for s, ids in self._ids if s == step for i in ids]
            path = self.out / "nonfinite.jsonl"
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step, "rank": self.world.rank, "samples": samples}) + "\n")
            if self.world.main:
                log.warning(
                    "step %d: the gradient is not finite; the step was skipped, its samples are in %s", step, path
                )
            if self._bad >= self.run.loop.max_bad_steps:
                raise TrainingError(
                    f"the gradients of {self._bad} steps one after the other, up to step {step}, were not finite: "
                    f"lower optimizer.learning_rate or use loop.precision=fp32; the samples are in {path}, and the "
                    f"newest checkpoint is {self.checkpoints.newest() or 'none'}"
                )
        self._ids.clear()

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        """SIGTERM, as a cluster sends it before it takes the machine, and Ctrl-C: the step is finished and a checkpoint
        written; the second Ctrl-C interrupts. With several processes all would have to be told at once, so that there
        the signals do what they always do."""
        before: dict[int, Any] = {}

        def stop(signum: int, frame: Any) -> None:
            self._asked_to_stop = True
            signal.signal(signum, before[signum])

        if self.world.size == 1 and threading.current_thread() is threading.main_thread():
            for answered in (signal.SIGTERM, signal.SIGINT):
                before[answered] = signal.getsignal(answered)
                signal.signal(answered, stop)
        try:
            yield
        finally:
            for signum, handler in before.items():
                signal.signal(signum, handler)

    # ---- what is looked at ----

    @contextlib.contextmanager
    def _averaged(self) -> Iterator[None]:
        """The averaged weights, in eval mode, without gradients; random numbers go on as if nothing had happened."""
        modules = [network.module for network in self.stage.networks]
        state = random_state(self.world.device)
        for module in modules:
            module.eval()
        with torch.no_grad(), self.ema.swapped(self.stage.averaged):
            # what is averaged may be called without the root that FSDP2 wraps, whose own parameters are gathered here;
            # left so, as a root's forward leaves them too, the next step would train on the average
            sharded: list[Any] = [module for module in modules if hasattr(module, "unshard")]
            for module in sharded:
                module.unshard()
            yield
            for module in sharded:
                module.reshard()
        restore_random_state(state, self.world.device)

    def _picture(self, observer: Observer) -> None:
        with self._averaged():
            rows = self.stage.picture()
        if rows:
            observer.picture(self.step, rows)

    def _validate(self, observer: Observer) -> None:
        """The mean over all ranks, and the best checkpoint by it."""
        with self._averaged():
            found = self.stage.validate()
        if found is None:
            return
        sums = torch.tensor([found.total, found.count], dtype=torch.float64, device=self.world.device)
        total, count = self.world.sum(sums).tolist()
        if not count:
            return
        mean = total / count
        observer.record(self.step, {f"validation/{found.name}": mean})
        best = self.world.gathered(self.checkpoints.best())[0]  # what rank 0 finds, for all
        sign = -1 if found.falling else 1
        if found.name not in best or sign * mean > sign * best[found.name]:
            self.save()
            if self.world.main:
                self.checkpoints.mark_best(self.step, **{found.name: mean})
            self.world.barrier()

    def _measure(self, observer: Observer) -> None:
        with self._averaged():
            found = self.stage.measure()
        if found:
            observer.record(self.step, {f"validation/{name}": value for name, value in found.items()})

    # ---- checkpoints ----

    def save(self) -> Path:
        """A checkpoint of the state as it is now, unless there is one."""
        if self._saved != self.step:
            self.checkpoints.write(self.step, self._write)
            self._saved = self.step
        return self.checkpoints.path(self.step)

    def _write(self, folder: Path) -> None:
        networks: dict[str, Tensor] = {}
        moments: dict[str, Tensor] = {}
        main = self.world.main
        for network in self.stage.networks:
            networks |= whole({f"{network.name}.{k}": v for k, v in module_state(network.module).items()}, main)
            moments |= whole({f"{network.name}.{k}": v for k, v in network.optimizer.state().items()}, main)
        # the averaged module is a part of the first network, whose tensors are at hand
        first = self.stage.networks[0]
        inside = next(name for name, part in first.module.named_modules() if part is self.stage.averaged)
        average = _under(networks, f"{first.name}.{inside}" if inside else first.name)
        average |= {name: value.to(average[name].dtype) for name, value in whole(self.ema.average, main).items()}
        rank = f"rank_{self.world.rank:05d}"
        save_tensors(folder / f"{rank}.safetensors", random_state(self.world.device))
        write_json(folder / f"{rank}.json", {"unreadable": self.batches.unreadable})
        if not main:
            return
        save_tensors(folder / "networks.safetensors", networks)
        save_tensors(folder / "optimizer.safetensors", moments)
        self.stage.save_average(folder / self.stage.product, average)
        write_json(
            folder / "state.json",
            {
                "step": self.step,
                "world": self.world.size,
                "updates": self.ema.updates,
                "skipped": self.skipped,
                "bad": self._bad,
                "data": self.fingerprint,
            },
        )

    def _resume(self, folder: Path) -> None:
        try:
            state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
            self.step, saved = int(state["step"]), int(state["world"])
        except (OSError, ValueError, KeyError) as error:
            raise TrainingError(f"cannot read {folder / 'state.json'}: {error}; remove {folder}") from error
        if self.fingerprint and state.get("data") and state["data"] != self.fingerprint:
            raise TrainingError(
                f"data.path holds other images than those that {folder} was trained on, so that it cannot go on at the "
                f"same place; put them back, or begin a new run (out=...) with start={folder / self.stage.product}"
            )
        networks, moments = (
            load_tensors(folder / "networks.safetensors"),
            load_tensors(folder / "optimizer.safetensors"),
        )
        try:
            for network in self.stage.networks:
                load_module(network.module, _under(networks, network.name))
                network.optimizer.load(_under(moments, network.name))
            average = self.stage.load_average(folder / self.stage.product)
            self.ema.load_state_dict(
                {"decay": self.run.ema.decay, "updates": state["updates"], "average": _sharded_like(self.ema, average)}
            )
        except KeyError as error:
            raise TrainingError(f"{folder} is of another configuration: {error.args[0]}") from error
        self.skipped, self._bad = state.get("skipped", 0), state.get("bad", 0)
        rank = f"rank_{self.world.rank:05d}"
        if saved == self.world.size:
            self._random = load_tensors(folder / f"{rank}.safetensors")
            self._unreadable = json.loads((folder / f"{rank}.json").read_text(encoding="utf-8"))["unreadable"]
        else:
            torch.manual_seed(self.run.loop.seed + 1_000_003 * self.world.rank + 7 * self.step)
            if self.world.main:
                log.warning(
                    "%s was written by %d process(es), this run has %d: the same images, other random numbers",
                    folder, saved, self.world.size,
                )  # fmt: skip
        self._saved = self.step
        if self.world.main:
            log.info("going on from %s", folder)


def _mean(column: Tensor) -> float:
    known = column[~column.isnan()]
    return float(known.mean()) if len(known) else float("nan")


def _under(tensors: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    return {key[len(name) + 1 :]: value for key, value in tensors.items() if key.startswith(f"{name}.")}


def _sharded_like(ema: EMA, average: dict[str, Tensor]) -> dict[str, Tensor]:
    from maetok_fast.training.state import like

    missing = [name for name in ema.average if name not in average]
    if missing:
        raise KeyError(f"{missing[0]} is not in the checkpoint's average")
    return {name: like(value, average[name].to(value.dtype)) for name, value in ema.average.items()}


def _checkpoint_activations(blocks: list[nn.Module]) -> None:
    """Each block keeps its input only and computes the rest again in the backward pass."""
    import functools

    from torch.utils.checkpoint import checkpoint

    for block in blocks:
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
