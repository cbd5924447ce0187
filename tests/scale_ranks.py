# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""Training steps on four gloo processes, and what they send, receive and keep; tools of the tests of scale.py, work.py.

    python tests/scale_ranks.py FOLDER     by DDP and by FSDP2, whole and in parts; FOLDER/<parallel>.<rank>.json

Processes are forked from one that has imported everything and computed nothing, as in training_runs.py.
"""

from __future__ import annotations

import json
import os
import socket
import struct
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from training_runs import free_port, wait

from maetok_fast.models import SiTConfig

WORLD = 4
PARTS = (1, 2)  # of a step
MODEL = SiTConfig(tokens=6, channels=8, dim=128, depth=3, heads=2, num_classes=10)


class Live(TorchDispatchMode):
    """Bytes of tensors made inside that are still held, by dtype; those of a parameter's shape as "weights"."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[int, tuple[Any, int, torch.dtype, tuple[int, ...]]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, Tensor):
                storage = x.untyped_storage()
                self.seen[storage._cdata] = StorageWeakRef(storage), storage.nbytes(), x.dtype, tuple(x.shape)
        return out

    def held(self, model: nn.Module) -> Counter[Any]:
        matrices = {tuple(p.shape) for p in model.parameters() if p.ndim == 2}
        matrices |= {shape[::-1] for shape in matrices}
        found: Counter[Any] = Counter()
        for reference, count, dtype, shape in self.seen.values():
            if not reference.expired():
                found["weights" if shape in matrices else dtype] += count
        return found


class Collectives(TorchDispatchMode):
    """Bytes that this rank sends in a ring, of each large collective. Those that an operator of DTensors makes inside
    of itself (the gradient's norm) are not seen; the sockets see them."""

    def __init__(self) -> None:
        super().__init__()
        self.sent: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace in ("c10d", "_c10d_functional"):
            name, sizes = func._schema.name.partition("::")[2], [_nbytes(a) for a in args]
            ring = (WORLD - 1) / WORLD
            if name == "allreduce_":
                self.sent[name] += int(2 * ring * sizes[0])
            elif name in ("_allgather_base_", "_reduce_scatter_base_"):
                self.sent[name] += int(ring * max(sizes))
            elif max(sizes) > 1024:
                raise AssertionError(f"a collective that no formula has: {name} of {sizes} bytes")
        return func(*args, **(kwargs or {}))


def _nbytes(value: Any) -> int:
    return sum(x.numel() * x.element_size() for x in tree_leaves(value) if isinstance(x, Tensor))


def received() -> int | None:
    """Bytes that this process has received by TCP (Linux's TCP_INFO), None where no socket tells."""
    total, told = 0, False
    for name in os.listdir("/proc/self/fd") if os.path.isdir("/proc/self/fd") else ():
        try:
            if not os.readlink(f"/proc/self/fd/{name}").startswith("socket:"):
                continue
            with socket.socket(fileno=os.dup(int(name))) as s:
                if s.family in (socket.AF_INET, socket.AF_INET6) and s.type == socket.SOCK_STREAM:
                    info = s.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
                    if len(info) >= 136:
                        total, told = total + struct.unpack_from("Q", info, 128)[0], True
        except OSError:
            continue
    return total if told else None


def a_rank(parallel: str, folder: Path) -> None:
    """Steps of training as the loop makes them, whole and in parts; each third one is looked at. Then what a forward in
    bf16 leaves behind."""
    from maetok_fast.data.latents import LatentBatch
    from maetok_fast.pipeline.statistics import LatentStatistics
    from maetok_fast.training.build_generator import make_generator_stage
    from maetok_fast.training.configs import LoopConfig
    from maetok_fast.training.generator import Given
    from maetok_fast.training.generator_configs import SiTRun
    from maetok_fast.training.latents import Latents
    from maetok_fast.training.loop import optimize, prepare
    from maetok_fast.training.world import World

    loop: Any = {"batch": 2 * WORLD, "precision": "fp32", "device": "cpu", "parallel": parallel}
    run = SiTRun(model=MODEL, loop=LoopConfig(**loop))
    world = World("cpu", parallel)
    stage = make_generator_stage(run, world.device, Latents((6, 8), LatentStatistics.identity()))
    ema = prepare(run, stage, world)
    called = stage.networks[0].called
    batch = LatentBatch(torch.randn(2, 6, 8), torch.tensor([1, 2]), (0, 1), (False, False), 0, 0)

    def step(number: int, parts: int) -> None:
        for part in range(parts):
            with world.without_sync(called, part + 1 < parts):
                stage.backward(batch, number, part, parts)
        optimize(run, stage, ema, number)

    found: dict[str, Any] = {}
    for parts in PARTS:
        step(0, parts)
        step(1, parts)  # DDP exchanges its buckets' sizes at the second
        world.barrier()
        before = received()
        with Collectives() as collectives:
            step(2, parts)
        after = received()
        world.barrier()
        told = None if before is None or after is None else after - before
        found[str(parts)] = {"sent": collectives.sent, "received": told}
    with torch.autocast("cpu", torch.bfloat16), Live() as live:
        x = batch.latents
        out = called(Given(x, x, torch.rand(2), batch.labels))
    found["copies"] = _held_in_bf16(live)
    del out
    (folder / f"{parallel}.{world.rank}.json").write_text(json.dumps(found))
    world.barrier()
    world.close()


def _held_in_bf16(live: Live) -> int:
    """Bytes of held bf16 tensors as large as a matrix of the model at least: none of the activations is."""
    least = MODEL.dim * MODEL.dim * 2
    alive = [row for row in live.seen.values() if not row[0].expired()]
    return sum(count for _, count, dtype, _ in alive if dtype == torch.bfloat16 and count >= least)


def main(folder: Path) -> None:
    import accelerate  # noqa: F401  imported once, before the forks
    import torch.distributed.fsdp

    import maetok_fast.training.build_generator
    import maetok_fast.training.loop  # noqa: F401

    for parallel in ("ddp", "fsdp"):
        port, children = free_port(), []
        for rank in range(WORLD):
            child = os.fork()
            if child:
                children.append(child)
                continue
            status = 1
            try:
                os.environ |= {
                    "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(WORLD),
                    "LOCAL_WORLD_SIZE": str(WORLD), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
                }  # fmt: skip
                torch.set_num_threads(1)
                a_rank(parallel, folder)
                status = 0
            except BaseException as error:
                print(f"{parallel}, rank {rank}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
            finally:
                os._exit(status)
        assert wait(children) == [0] * WORLD


if __name__ == "__main__":
    main(Path(sys.argv[1]))
