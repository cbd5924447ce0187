# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""Optional packages: what they are for, whether they can be used here, and the one sentence when they cannot.

    PACKAGES[name]  ->  probe(name): Status(state, version, reason)     raises nothing but KeyboardInterrupt

Nothing is imported before it is probed. A package can be there and of no use: xformers without its compiled
half, torchvision beside another torch, the web toolkit that PyPI calls apex. Then the state is "unusable" and says why.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Literal

__all__ = ["PACKAGES", "Package", "Status", "probe"]

APEX_SOURCE = "https://github.com/NVIDIA/apex"


@dataclass(frozen=True)
class Status:
    """state: found | missing | unusable. reason: why it is not found, "" if it is."""

    state: Literal["found", "missing", "unusable"]
    version: str = ""
    reason: str = ""


@dataclass(frozen=True)
class Package:
    """module: what is imported; distributions: who may provide it; install: the command that gets it; check: called
    with the imported module, returns why it is of no use or None."""

    module: str
    purpose: str
    install: str
    distributions: tuple[str, ...]
    needs_gpu: bool = False
    check: Callable[[ModuleType], str | None] | None = None


def _xformers_extensions(module: ModuleType) -> str | None:
    library = importlib.import_module("xformers._cpp_lib")
    error = getattr(library, "_cpp_library_load_exception", None)
    return f"its compiled extensions do not load ({str(error).splitlines()[0]})" if error is not None else None


def _cupy_device(module: ModuleType) -> str | None:
    try:
        module.cuda.runtime.getDeviceCount()
    except Exception as error:  # cupy raises its own classes, one per driver state
        return f"it finds no driver ({error})"
    return None


PACKAGES: dict[str, Package] = {
    p.module: p
    for p in (
        Package("torchvision", "decoding and resizing of images", "pip install torchvision", ("torchvision",)),
        Package("timm", "frozen teachers and baselines from timm", "pip install timm", ("timm",)),
        Package("open_clip", "the tokenizer of captions", "pip install open_clip_torch", ("open_clip_torch",)),
        Package("lpips", "the LPIPS metric and the perceptual loss", "pip install lpips", ("lpips",)),
        Package("tensorboard", "curves of a run in TensorBoard", "pip install tensorboard", ("tensorboard",)),
        Package("matplotlib", "pictures of the benchmark", "pip install matplotlib", ("matplotlib",)),
        Package("skimage", "the benchmark's photographs", "pip install scikit-image", ("scikit-image",)),
        Package("sklearn", "latent-space analysis and photographs", "pip install scikit-learn", ("scikit-learn",)),
        Package("torch_fidelity", "Inception's network for FID", "pip install torch-fidelity", ("torch-fidelity",)),
        Package("torchmetrics", "SSIM and MS-SSIM", "pip install torchmetrics", ("torchmetrics",)),
        Package("umap", "pictures of latent spaces", "pip install umap-learn", ("umap-learn",)),
        Package("h5py", "REPA-E's latent caches", "pip install h5py", ("h5py",)),
        Package("torchdiffeq", "the dopri5 sampler", "pip install torchdiffeq", ("torchdiffeq",)),
        Package("torchao", "FP8 training", "pip install torchao", ("torchao",)),
        Package(
            "flash_attn",
            "FlashAttention on the GPU",
            "pip install flash-attn --no-build-isolation",
            ("flash-attn",),
            needs_gpu=True,
        ),
        Package(
            "xformers",
            "xformers attention on the GPU",
            "pip install xformers",
            ("xformers",),
            needs_gpu=True,
            check=_xformers_extensions,
        ),
        Package("apex", "NVIDIA's fused optimizers", f"install {APEX_SOURCE} from source", ("apex",), needs_gpu=True),
        Package(
            "nvidia.dali",
            "JPEG decoding on the GPU",
            "pip install nvidia-dali-cuda130",
            ("nvidia-dali-cuda130", "nvidia-dali-cuda120"),
        ),
        Package(
            "cupy",
            "GPU arrays",
            "pip install cupy-cuda13x",
            ("cupy-cuda13x", "cupy-cuda12x", "cupy"),
            check=_cupy_device,
        ),
    )
}


def _version(package: Package, module: ModuleType | None) -> str:
    for distribution in package.distributions:
        try:
            return metadata.version(distribution)
        except (metadata.PackageNotFoundError, KeyError):  # KeyError: metadata without a version
            continue
    return str(getattr(module, "__version__", ""))


def _spec_origin(module: str) -> str | None:
    """Where a module would come from, without importing it (its parents only); None if it is not there."""
    try:
        spec = importlib.util.find_spec(module)
    except (ModuleNotFoundError, ValueError):  # ValueError: a module in sys.modules without a spec
        return None
    return None if spec is None else (spec.origin or "")


@functools.cache
def probe(name: str) -> Status:
    """Whether an optional package can be used here. Imports it, hence takes a while; the answer is kept.

    However the import ends, short of KeyboardInterrupt and of the process itself, the answer is a Status.
    """
    package = PACKAGES[name]
    try:
        return _probe(package)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # whatever a broken package raises: SystemExit, an exception class of its own
        try:
            first = (str(error).strip() or "no message").splitlines()[0]
        except Exception:  # an exception that cannot even be printed
            first = "no message"
        return Status("unusable", _version(package, None), f"importing it fails: {type(error).__name__}: {first}")


def _probe(package: Package) -> Status:
    origin = _spec_origin(package.module)
    if origin is None:
        return Status("missing", "", package.install)
    if package.module == "apex" and not (Path(origin).parent / "optimizers").is_dir():
        reason = f"this is PyPI's apex, an unrelated web toolkit; pip uninstall apex, then {package.install}"
        return Status("unusable", _version(package, None), reason)
    module = importlib.import_module(package.module)
    problem = package.check(module) if package.check is not None else None
    if problem is None and package.needs_gpu:
        import torch

        problem = None if torch.cuda.is_available() else "it needs a CUDA device"
    if problem is not None:
        return Status("unusable", _version(package, module), problem)
    return Status("found", _version(package, module))
