# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""The processes of a run: one, or as many as torchrun or accelerate launch started, on one machine or several.

    World ── accelerate: process group, device, DistributedDataParallel
       └──── torch's fully_shard (FSDP2), block by block, where parameters shall be sharded

accelerate drops an FSDP plugin on a CPU without a word, so that sharding is asked of torch, which does it everywhere.
What was asked for and what there is are compared once, when the run starts.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from maetok_fast.config import ConfigError

__all__ = ["World", "keep_memory", "local_batch"]


def local_batch(batch: int, world: int, accumulate: int) -> int:
    """Images of a rank in one part of a step. ConfigError where they cannot be shared out evenly."""
    parts = world * accumulate
    if batch % parts:
        raise ConfigError(
            f"loop.batch={batch} cannot be shared out evenly over {world} process(es) with "
            f"loop.accumulate={accumulate}: make it a multiple of {parts}, such as {max(1, batch // parts) * parts}"
        )
    return batch // parts


def keep_memory() -> bool:
    """Asks glibc not to give large blocks back to the system; whether it was asked.

    Each step frees its gradients and activations and takes as much again. By default every block above 32 MB is mapped
    anew and its pages are faulted in one by one: 2.7 GB of gradients of SiT-XL are 660,000 faults, a tenth of a step.
    Not where the user has settings of their own (MALLOC_*, GLIBC_TUNABLES) or another allocator is loaded."""
    own = any(name.startswith(("MALLOC_", "GLIBC_TUNABLES", "LD_PRELOAD")) for name in os.environ)
    if own or platform.libc_ver()[0] != "glibc":
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    m_trim_threshold, m_mmap_max = -1, -4  # malloc.h
    return mallopt is not None and mallopt(m_mmap_max, 0) == 1 and mallopt(m_trim_threshold, -1) == 1


class World:
    """rank, size, device, main (rank 0). device: "" for CUDA where there is one, else as torch names it; with several
    processes each takes the GPU of its local rank. RuntimeError where the processes did not find each other."""

    def __init__(self, device: str = "", parallel: str = "ddp") -> None:
        from accelerate import Accelerator, DistributedDataParallelKwargs
        from accelerate.state import AcceleratorState

        kind = torch.device(device).type if device else ("cuda" if torch.cuda.is_available() else "cpu")
        if kind == "cpu" and "OMP_NUM_THREADS" not in os.environ and "LOCAL_WORLD_SIZE" in os.environ:
            # each process would take every core
            share = max(1, (os.cpu_count() or 1) // int(os.environ["LOCAL_WORLD_SIZE"]))
            os.environ["OMP_NUM_THREADS"] = str(share)
            torch.set_num_threads(share)
        AcceleratorState._reset_state(reset_partial_state=True)  # an earlier run of this process may have had others
        # gradients are views of the buckets that are sent: no second copy of them
        buckets = DistributedDataParallelKwargs(gradient_as_bucket_view=True)
        self.accelerator = Accelerator(mixed_precision="no", cpu=kind == "cpu", kwargs_handlers=[buckets])
        self.rank, self.size = self.accelerator.process_index, self.accelerator.num_processes
        self.main, self.parallel = self.rank == 0, parallel
        if kind == "cpu":
            keep_memory()
        self.device: torch.device = self.accelerator.device if self.size > 1 or not device else torch.device(device)
        expected = int(os.environ.get("WORLD_SIZE", "1"))
        if self.size != expected:
            raise RuntimeError(
                f"WORLD_SIZE is {expected}, and accelerate made {self.size} process(es) of it: start the run with "
                "`torchrun --nproc-per-node N $(which maetok-fast) train ...`"
            )
        self._mesh: Any = None

    def wrap(self, module: nn.Module, blocks: list[nn.Module], shard: bool = True) -> nn.Module:
        """The module as it is called in training: sharded in place, in DistributedDataParallel, or itself alone.

        blocks: modules that are sharded one by one. shard: whether parallel="fsdp" applies to it."""
        if self.parallel == "fsdp" and shard:
            import torch.distributed as dist
            from torch._C._distributed_c10d import HashStore
            from torch.distributed.device_mesh import init_device_mesh
            from torch.distributed.fsdp import fully_shard

            if self._mesh is None:
                if not dist.is_initialized():  # one process: a group of its own, without a network
                    dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
                self._mesh = init_device_mesh(self.device.type, (self.size,))
            for part in (*blocks, module):
                fully_shard(part, mesh=self._mesh)
            return module
        if self.size == 1:
            return module
        wrapped: nn.Module = self.accelerator.prepare_model(module)
        if not isinstance(wrapped, nn.parallel.DistributedDataParallel):
            raise RuntimeError(
                f"accelerate wrapped the model in {type(wrapped).__name__}, not in DistributedDataParallel: "
                "unset ACCELERATE_* variables of another configuration"
            )
        return wrapped

    @contextlib.contextmanager
    def without_sync(self, wrapped: nn.Module, wanted: bool) -> Iterator[None]:
        """Gradients of this part stay on their rank, because others follow (`wanted`)."""
        if not wanted:
            yield
        elif isinstance(wrapped, nn.parallel.DistributedDataParallel):
            with wrapped.no_sync():
                yield
        elif hasattr(wrapped, "set_requires_gradient_sync"):
            sharded: Any = wrapped  # FSDP2
            sharded.set_requires_gradient_sync(False)
            yield
            sharded.set_requires_gradient_sync(True)
        else:
            yield

    def mean(self, x: Tensor) -> Tensor:
        """The mean over ranks, on every rank; no host synchronisation."""
        return self._reduced(x, "mean")

    def sum(self, x: Tensor) -> Tensor:
        """The sum, likewise."""
        return self._reduced(x, "sum")

    def _reduced(self, x: Tensor, how: str) -> Tensor:
        if self.size == 1:
            return x
        reduced: Tensor = self.accelerator.reduce(x, reduction=how)
        return reduced

    def gathered(self, value: Any) -> list[Any]:
        """A picklable value of every rank, in their order."""
        if self.size == 1:
            return [value]
        from accelerate.utils import gather_object

        return list(gather_object([value]))

    def barrier(self) -> None:
        if self.size > 1:
            self.accelerator.wait_for_everyone()

    def close(self) -> None:
        """Leaves the process group."""
        import torch.distributed as dist

        if dist.is_initialized():
            dist.destroy_process_group()
