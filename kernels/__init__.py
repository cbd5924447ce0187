"""The op library. This folder is the package ``maetok_fast.kernels``; it imports nothing of maetok_fast outside itself.

One file per op; an op becomes public by its line below.
"""

from __future__ import annotations

if __name__ != "maetok_fast.kernels":
    # Under a second name every op would be registered twice, and torch silently runs the second body for both handles.
    # The bare name would also shadow the Hugging Face package `kernels`, which transformers looks for.
    raise ImportError(
        f"this folder is the package 'maetok_fast.kernels' and was imported as {__name__!r}; write "
        "`import maetok_fast.kernels`, and install the project with `pip install -e .` if that is not found"
    )

from ._op import Backend, BackendError, Cost, Op, Sample, backend, forced_backend, ops
from .adaln import adaln, adaln_ref, gate_residual, gate_residual_ref
from .ema import ema_update, ema_update_ref
from .rope_attention import rope_attention, rope_attention_ref, rope_table

__all__ = [
    "Backend",
    "BackendError",
    "Cost",
    "Op",
    "Sample",
    "adaln",
    "adaln_ref",
    "backend",
    "ema_update",
    "ema_update_ref",
    "forced_backend",
    "gate_residual",
    "gate_residual_ref",
    "ops",
    "rope_attention",
    "rope_attention_ref",
    "rope_table",
]
