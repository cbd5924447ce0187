# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""maetok_fast: fast kernels and models for the MAETok image tokenizer and the generators on its latent tokens.

Arrows point down only; importing this package loads nothing, every part is loaded when it is first named:

    cli -> pipeline -> inference, diffusion, data -> models -> layers -> kernels -> csrc

`accelerate(model)` makes a timm ViT, a DiT or a tokenizer of others fast, in place; `restore(model)` undoes it.
"""

from __future__ import annotations

import importlib
from typing import Any

_PARTS = ("data", "diffusion", "inference", "kernels", "layers", "models", "pipeline", "precision")

_FUNCTIONS = ("accelerate", "restore")  # of maetok_fast._accelerate

__all__ = ["__version__", *_FUNCTIONS, *_PARTS]


def __getattr__(name: str) -> Any:
    if name in _PARTS:
        return importlib.import_module(f"{__name__}.{name}")
    if name in _FUNCTIONS:
        return getattr(importlib.import_module(f"{__name__}._accelerate"), name)
    if name == "__version__":
        from importlib.metadata import PackageNotFoundError, version

        try:
            return version("maetok-fast")
        except PackageNotFoundError:  # a source tree that was never installed
            return "0+unknown"
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(__all__)}")


def __dir__() -> list[str]:
    return sorted(__all__)
