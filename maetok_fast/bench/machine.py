# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""What the machine is, and how fast it can be: a description, a matmul per dtype and the copy bandwidth.

Every benchmark writes these beside its numbers: an img/s means little without the ceiling measured in the same run.
"""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from maetok_fast.kernels import _processor
from maetok_fast.precision import resolve

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# what makes a processor pretend to be less than it is
_LIMITS = ("MAETOK_FAST_CPU", "ONEDNN_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY", "MKL_ENABLE_INSTRUCTIONS")
_CPU_FEATURES = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "sve", "bf16")


def find_device(name: str) -> torch.device:
    """The torch device of this name; ValueError in words where it is not one that can be measured here."""
    try:
        found = torch.device(name)
    except RuntimeError:
        found = None
    if found is None or found.type not in ("cpu", "cuda"):
        raise ValueError(f"unknown device {name!r}: expected cpu or cuda")
    if found.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device {name}: torch finds no CUDA device here; use --device cpu")
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device {name}: there are {torch.cuda.device_count()} CUDA devices, counted from 0")
    if found.type == "cpu" and found.index:
        raise ValueError(f"device {name}: expected cpu")
    return found


def synchronize(device: torch.device) -> None:
    """Wait for queued work, so that a clock read after it means something."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def describe(device: torch.device) -> dict[str, Any]:
    """Processor, memory, software; nothing that identifies the machine's owner."""
    info: dict[str, Any] = {
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": _processor.name(),
        "cpu_vendor": _processor.vendor(),
        "cpu_family": int(_proc("/proc/cpuinfo").get("cpu family") or 0),
        "cpu_features": [f for f in _CPU_FEATURES if f in _cpu_flags()],
        "limited_by": [f"{name}={os.environ[name]}" for name in _LIMITS if os.environ.get(name)],
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gb": _memory_gb("MemTotal"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "device": device.type,
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        info |= {
            "gpu": properties.name,
            "gpu_memory_gb": round(properties.total_memory / 2**30, 1),
            "gpu_sms": properties.multi_processor_count,
            "gpu_capability": f"{properties.major}.{properties.minor}",
            "cuda": torch.version.cuda,
        }
    return info


def fast_dtype(device: torch.device) -> str:
    """The name of the precision that a benchmark takes by itself: bf16 where this device computes it at full rate."""
    return resolve("auto", device).name


def headline(machine: dict[str, Any]) -> str:
    """One line for pictures and tables."""
    if "gpu" in machine:
        return f"{machine['gpu']}, torch {machine['torch']}, CUDA {machine['cuda']}"
    features = " with AMX" if "amx_bf16" in machine["cpu_features"] else ""
    limits = dict(limit.split("=", 1) for limit in machine.get("limited_by", ()))
    held = f" held to {limits[_processor.SWITCH]}" if _processor.SWITCH in limits else " limited" if limits else ""
    return f"{machine['cores']} CPU cores ({machine['cpu']}{features}{held}), torch {machine['torch']}"


def matmul(device: torch.device, dtype: str, size: int = 4096) -> tuple[Callable[[], Any], float]:
    """A size^3 matmul to time and its FLOPs: what the machine can do at best."""
    a, b = (torch.randn(size, size, device=device).to(DTYPES[dtype]) for _ in range(2))
    out = torch.empty_like(a)
    return lambda: torch.mm(a, b, out=out), 2.0 * size**3


def copy_bandwidth(device: torch.device, *, megabytes: int = 256, seconds: float = 0.5) -> float:
    """GB/s read + written by a copy that no cache holds; the median of at least three."""
    source = torch.ones(megabytes * 2**18, device=device)
    target = torch.empty_like(source)
    target.copy_(source)
    samples: list[float] = []
    stop = time.perf_counter() + seconds
    while len(samples) < 3 or time.perf_counter() < stop:
        synchronize(device)
        start = time.perf_counter()
        target.copy_(source)
        synchronize(device)
        samples.append(time.perf_counter() - start)
    return 2 * source.nbytes / statistics.median(samples) / 1e9


def available_memory_gb() -> float | None:
    """Free main memory, where the system says so."""
    return _memory_gb("MemAvailable")


def _proc(path: str) -> dict[str, str]:
    try:
        lines = Path(path).read_text().splitlines()
    except OSError:
        return {}
    fields: dict[str, str] = {}
    for line in lines:
        key, _, value = line.partition(":")
        fields.setdefault(key.strip(), value.strip())
    return fields


def _cpu_flags() -> set[str]:
    fields = _proc("/proc/cpuinfo")
    return set((fields.get("flags") or fields.get("Features") or "").split())


def _memory_gb(field: str) -> float | None:
    value = _proc("/proc/meminfo").get(field)
    return round(int(value.split()[0]) / 2**20, 1) if value else None
