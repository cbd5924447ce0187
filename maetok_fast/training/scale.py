# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""What an epoch costs on many GPUs, before anybody pays: formulas over counted, measured, stated and assumed numbers.

    work.generator(), tokenizer(), encoder() ── Work ────┐   counted
    DEVICES, observe.stated_peak ────────────── Device ──┼── Plan ── Estimate: time, bytes, memory, GPU-hours
    DECODE, mfu, disk, price ────────────────── settings ┘

counted: FLOPs and parameters, on meta tensors (work.py). measured: `DECODE` by benchmarks/data.py, the numbers that a
block keeps by tests/test_work.py. stated: the makers' data sheets. assumed: the MFU, the file system's rates, and that
links run at their stated rate. The bytes that ranks exchange are held to those of four real processes in
tests/test_scale.py. GB is 1e9 bytes; a link's rate is that of one direction. docs/scale.md has the tables.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

from maetok_fast.checks import check_number, check_positive
from maetok_fast.training.observe import _units, stated_peak
from maetok_fast.training.work import AGAIN, KEPT, LPIPS_KEPT, Work
from maetok_fast.training.world import local_batch

__all__ = [
    "DECODE",
    "DEVICES",
    "Device",
    "Estimate",
    "Memory",
    "Plan",
    "cache_bytes",
    "checkpoint_bytes",
    "exposed_bytes",
    "link_rate",
    "memory",
    "moved_bytes",
    "optimizer_seconds",
]

GB = 1e9
BUCKET = 25 * 2**20  # bytes of a gradient bucket of DistributedDataParallel, its default
# images/s of a core, benchmarks/data.py on a shared, loaded machine of two cores: JPEGs of ~500 px, crop and flip
DECODE = {"torchvision": 281.0, "pil": 212.0, "dali": 124.0}


class Device(NamedTuple):
    """memory: bytes. hbm, nvlink, network: bytes/s of a device's memory, of its links inside a node, and of a node's
    network, one direction each. gpus, cores: of a node."""

    memory: float
    hbm: float
    nvlink: float
    network: float
    gpus: int
    cores: int


# The chips as NVIDIA's data sheets state them (NVLink's rate is of both directions there, half of it here), the node as
# those of DGX systems do: one adapter of 400 Gb/s a GPU (A100: 200), two processors of 56 cores (A100: 64).
DEVICES = {
    "A100": Device(80 * GB, 2039 * GB, 300 * GB, 200 * GB, 8, 128),  # A100 80 GB SXM, DGX A100
    "H100": Device(80 * GB, 3350 * GB, 450 * GB, 400 * GB, 8, 112),  # H100 SXM, DGX H100
    "H200": Device(141 * GB, 4800 * GB, 450 * GB, 400 * GB, 8, 112),  # H200 SXM, DGX H200
    "B200": Device(180 * GB, 8000 * GB, 900 * GB, 400 * GB, 8, 112),  # DGX B200
}


# ---- bytes between ranks -------------------------------------------------------------------------------------------


def moved_bytes(work: Work, world: int, parallel: str = "ddp", accumulate: int = 1) -> float:
    """Bytes that a rank sends in a step, and receives. All fp32, as weights and gradients are here.

    ddp     ring all-reduce of P gradients: 2 (W-1)/W 4 P
    fsdp    (W-1)/W 4 (accumulate (2 blocks + root) + trained): blocks are gathered in the forward and in the backward
            pass, the root's parameters once; gradients are reduce-scattered with the last part of a step. Rows are
            filled up to a multiple of W. The discriminator stays with DDP.

    (NCCL reduce-scatters once around the ring. gloo makes an all-reduce of it: twice the bytes.)"""
    if not work.averaged or world == 1:
        return 0.0
    ring = 4 * (world - 1) / world
    replicated = 2 * ring * work.replicated
    if parallel == "ddp":
        return replicated + 2 * ring * work.trained
    gathered = sum(w.padded(world) * (2 if w.block else 1) for w in work.weights)
    scattered = sum(w.padded(world) for w in work.weights if w.trained)
    return replicated + ring * (accumulate * gathered + scattered)


def exposed_bytes(work: Work, world: int, parallel: str = "ddp") -> float:
    """Of `moved_bytes`, what no arithmetic can hide: DDP's last bucket of gradients (25 MiB), which is complete when
    the backward pass is; FSDP's first gathering (the root and a block) and last scattering (the root)."""
    if not work.averaged or world == 1:
        return 0.0
    ring = 4 * (world - 1) / world
    if parallel == "ddp":
        return ring / 2 * min(BUCKET, 4 * (work.trained + work.replicated))
    first = sum(w.padded(world) for w in work.weights if w.block <= 1)
    return ring * (first + sum(w.padded(world) for w in work.weights if w.trained and not w.block))


def link_rate(device: Device, world: int) -> float:
    """Bytes/s at which a ring moves what each rank sends: NVLink's inside a node, over several nodes the slower of that
    and the node's whole network. As many bytes leave a node as leave a rank, whether in one ring or shared by as many
    rings as there are adapters."""
    return device.nvlink if world <= device.gpus else min(device.nvlink, device.network)


# ---- memory and files ----------------------------------------------------------------------------------------------


def optimizer_seconds(work: Work, device: Device, shards: int = 1) -> float:
    """40 bytes a number at the memory's rate: the gradient for its norm; weight, gradient, both moments and average
    read, and all but the gradient written."""
    if not work.averaged:
        return 0.0
    return 40 * (work.trained / shards + work.replicated) / device.hbm


def checkpoint_bytes(work: Work) -> int:
    """4 (P + 2 trained + average) + 12 discriminator: weights, two moments of what is trained, the average, all fp32.
    Rank 0 writes whole tensors, and all others wait for it (training/loop.py)."""
    if not work.averaged:
        return 0
    return 4 * (work.parameters + 2 * work.trained + work.averaged + 3 * work.replicated)


def cache_bytes(images: int, latent: int, number: int = 4, flips: bool = True) -> int:
    """images (latent number (flips + 1) + 16): latents, those of the mirror images, label and index of 8 bytes."""
    return images * (latent * number * (1 + flips) + 16)


@dataclass(frozen=True)
class Memory:
    """Bytes on a device at the peak of a step. copies: of weights in bf16, which autocast makes and autograd keeps
    until the backward pass, under FSDP too. buffers: of FSDP: gathered parameters (the root, two blocks) and whole
    gradients (of two blocks; of all where a step has several parts). frozen: networks without
    gradients. Not in it: CUDA's context and libraries, 1 to 2 GB, and what the allocator wastes."""

    weights: float
    gradients: float = 0.0
    moments: float = 0.0
    average: float = 0.0
    copies: float = 0.0
    buffers: float = 0.0
    frozen: float = 0.0
    activations: float = 0.0

    @property
    def total(self) -> float:
        return float(sum(vars(self).values()))


def memory(
    work: Work,
    world: int,
    images: float,
    parallel: str = "ddp",
    precision: str = "bf16",
    recompute: bool = True,
    accumulate: int = 1,
) -> Memory:
    """images: of a device in one part of a step. Weights, gradients, moments and average take 4, 4, 8 and 4 bytes a
    number; FSDP shares them out over the ranks, all but the discriminator's. A block keeps 1 fp32 number a token and
    unit of width and 10 in the precision's dtype, 16 without recompute (`work.KEPT`, `work.AGAIN`)."""
    low = 4 if precision == "fp32" else 2
    if not work.averaged:  # the model and its prepared copy
        return Memory(4 * work.parameters, copies=low * work.parameters)
    kept = work.width * (4 * KEPT[0] + low * (KEPT[1] + (0 if recompute else AGAIN)))
    kept += work.pixels * (low * LPIPS_KEPT[0] + LPIPS_KEPT[1])
    shards = world if parallel == "fsdp" else 1
    held = sum(w.padded(shards) for w in work.weights) / shards
    learnt = sum(w.padded(shards) for w in work.weights if w.trained) / shards
    buffers = 0.0  # DDP's gradients are views of its buckets
    if world > 1 and parallel == "fsdp":
        sizes: dict[int, int] = {}
        for w in work.weights:
            sizes[w.block] = sizes.get(w.block, 0) + w.padded(world)
        root = sizes.pop(0, 0)
        two = 2 * max(sizes.values(), default=0)
        buffers = 4 * (root + two + (work.trained if accumulate > 1 else two) + work.replicated)
    return Memory(
        weights=4 * (held + work.replicated),
        gradients=4 * (learnt + work.replicated),
        moments=8 * (learnt + work.replicated),
        average=4 * work.averaged / shards,
        copies=0 if precision == "fp32" else 2 * work.parameters,
        buffers=buffers,
        frozen=work.frozen,
        activations=images * kept,
    )


# ---- a plan --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """One setting. batch: images of a step over all GPUs; 0: as many a GPU as in the recipe on 8, however many GPUs.

    mfu: the share of the stated peak at which forward and backward run (assumed). decode: images/s of a core. cores: of
    a GPU; 0: its share of the node's. image_bytes: of a JPEG on average. read, write: bytes/s that the file system
    gives to all together, and takes from one process (assumed). nvlink, network: bytes/s; 0: the data sheet's. number:
    bytes of a number of a latent. flips: whether the cache has mirror images. price: of a GPU-hour.
    ValueError where a number is out of its range, or the batch cannot be shared out."""

    work: Work
    images: int = 1_281_167
    gpus: int = 8
    batch: int = 0
    device: str = "H100"
    parallel: str = "ddp"
    precision: str = "bf16"
    accumulate: int = 1
    recompute: bool = True
    mfu: float = 0.4
    decode: float = DECODE["torchvision"]
    cores: float = 0.0
    image_bytes: float = 110e3
    read: float = 40 * GB
    write: float = 2 * GB
    nvlink: float = 0.0
    network: float = 0.0
    number: int = 4
    flips: bool = True
    price: float = 0.0

    def __post_init__(self) -> None:
        check_positive("scale", images=self.images, gpus=self.gpus, accumulate=self.accumulate, number=self.number)
        check_number("scale", "mfu", self.mfu, 0, 1 + 1e-9)
        for name in ("mfu", "decode", "image_bytes", "read", "write"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"scale: {name} must be above 0, got {getattr(self, name)}")
        for name in ("batch", "cores", "nvlink", "network", "price"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"scale: {name} must be at least 0, got {getattr(self, name)}")
        precisions = ("bf16", "fp16", "fp8", "fp32")
        for name, known in (("device", tuple(DEVICES)), ("parallel", ("ddp", "fsdp")), ("precision", precisions)):
            if getattr(self, name) not in known:
                raise ValueError(f"scale: {name} {getattr(self, name)!r} is not one of {', '.join(known)}")
        if not self.peak:
            raise ValueError(f"scale: the data sheet of {self.device} states no rate in {self.precision}; take bf16")
        local_batch(self.step_batch, self.gpus, self.accumulate)

    @property
    def step_batch(self) -> int:
        """Images of a step, over all GPUs."""
        return self.batch or max(1, self.work.batch // 8) * self.gpus * self.accumulate

    @property
    def peak(self) -> float:
        """FLOP/s of a device by its data sheet (fp32: without TF32), 0 where it states none."""
        stated = stated_peak(f"NVIDIA {self.device}", _units(self.precision, False))
        return 0.0 if stated is None else stated.flops

    @property
    def node(self) -> Device:
        stated = DEVICES[self.device]
        return stated._replace(nvlink=self.nvlink or stated.nvlink, network=self.network or stated.network)


class Estimate:
    """A plan's seconds and bytes; every formula is its attribute's docstring. Of a step and a device unless it is said.

    ddp, fsdp: `Memory` either way; memory: that of the plan's own `parallel`."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.images = plan.step_batch // plan.gpus
        self.ddp, self.fsdp = (
            memory(
                plan.work, plan.gpus, self.images / plan.accumulate, kind, plan.precision, plan.recompute,
                plan.accumulate,
            )
            for kind in ("ddp", "fsdp")
        )  # fmt: skip
        self.memory = self.fsdp if plan.parallel == "fsdp" else self.ddp
        self.moved = moved_bytes(plan.work, plan.gpus, plan.parallel, plan.accumulate)
        self.link = link_rate(plan.node, plan.gpus)
        self.checkpoint = checkpoint_bytes(plan.work)
        self.cache = cache_bytes(plan.images, plan.work.latent, plan.number, plan.flips)

    # ---- a step

    @property
    def compute(self) -> float:
        """images FLOPs / (peak MFU), seconds of forward and backward."""
        return self.images * self.plan.work.flops / (self.plan.peak * self.plan.mfu)

    @property
    def optimizer(self) -> float:
        """Seconds, see `optimizer_seconds`; FSDP's ranks share it."""
        plan = self.plan
        return optimizer_seconds(plan.work, plan.node, plan.gpus if plan.parallel == "fsdp" else 1)

    @property
    def communication(self) -> float:
        """moved / link, seconds."""
        return self.moved / self.link

    @property
    def exposed(self) -> float:
        """max(exposed_bytes / link, communication - what hides it), seconds. DDP's hides behind the backward pass of
        the last part, two thirds of its compute, FSDP's behind all compute."""
        plan = self.plan
        hides = self.compute if plan.parallel == "fsdp" else self.compute * 2 / 3 / plan.accumulate
        return max(exposed_bytes(plan.work, plan.gpus, plan.parallel) / self.link, self.communication - hides)

    @property
    def fed(self) -> float:
        """batch / (compute + optimizer + exposed): images/s of all devices that never wait for data."""
        return self.plan.step_batch / (self.compute + self.optimizer + self.exposed)

    # ---- data

    @property
    def image_bytes(self) -> float:
        """Read for an image: its JPEG, or latent x number + 8 (one of the two views, and the label)."""
        plan = self.plan
        return plan.image_bytes if plan.work.images else plan.work.latent * plan.number + 8

    @property
    def decoded(self) -> float:
        """GPUs x cores x decode: images/s that all cores decode; latents are not decoded."""
        plan = self.plan
        cores = plan.cores or plan.node.cores / plan.node.gpus
        return plan.gpus * cores * plan.decode if plan.work.images else math.inf

    @property
    def cores(self) -> float:
        """fed / GPUs / decode: cores that keep a GPU fed."""
        return self.fed / self.plan.gpus / self.plan.decode if self.plan.work.images else 0.0

    @property
    def rate(self) -> float:
        """min(fed, decoded, read / image_bytes): images/s of all devices."""
        return min(self.fed, self.decoded, self.plan.read / self.image_bytes)

    @property
    def step(self) -> float:
        """batch / rate, seconds."""
        return self.plan.step_batch / self.rate

    # ---- an epoch

    @property
    def steps(self) -> int:
        return math.ceil(self.plan.images / self.plan.step_batch)

    @property
    def writing(self) -> float:
        """checkpoint / write: seconds of one checkpoint, in which all devices wait."""
        return self.checkpoint / self.plan.write

    @property
    def checkpoints(self) -> float:
        """writing / (writing + checkpoint_every step): their share of the time."""
        every = self.plan.work.checkpoint_every
        return self.writing / (self.writing + every * self.step) if every else 0.0

    @property
    def epoch(self) -> float:
        """images / rate / (1 - checkpoints), seconds."""
        return self.plan.images / self.rate / (1 - self.checkpoints)

    @property
    def run(self) -> float:
        """steps of the recipe's run x step / (1 - checkpoints), seconds."""
        return self.plan.work.steps * self.step / (1 - self.checkpoints)

    @property
    def read(self) -> float:
        """images x image_bytes."""
        return self.plan.images * self.image_bytes

    @property
    def gpu_hours(self) -> float:
        return self.plan.gpus * self.epoch / 3600

    @property
    def cost(self) -> float:
        """gpu_hours x price."""
        return self.gpu_hours * self.plan.price

    @property
    def bound(self) -> str:
        """What takes the most beside the arithmetic, where that is over a tenth of the time; else "arithmetic"."""
        alone = self.plan.step_batch / self.fed
        lost = {
            "decoding": 1 - self.decoded / self.fed,
            "reading": 1 - self.plan.read / self.image_bytes / self.fed,
            "network": self.exposed / alone,
            "optimizer": self.optimizer / alone,
            "checkpoints": self.checkpoints,
        }
        most = max(lost, key=lambda name: lost[name])
        return most if lost[most] > 0.1 else "arithmetic"
