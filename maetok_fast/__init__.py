"""maetok_fast: fast kernels, models and benchmarks for the MAETok image tokenizer and the generators on its latent tokens.

Arrows point down only; importing this package imports torch and nothing below, everything else is loaded where it is used:

    cli -> training, inference, evaluation -> models, diffusion, data -> layers -> kernels -> csrc
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

import torch as _torch  # noqa: F401  (first: the native library shares torch's OpenMP runtime)

try:
    __version__ = version("maetok-fast")
except PackageNotFoundError:  # a source tree that was never installed
    __version__ = "0+unknown"

__all__ = ["__version__"]
