# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""The op library. This folder is the package ``maetok_fast.kernels``; it imports nothing of maetok_fast outside itself.

One file per op; what a file names in its `__all__` becomes public by its line below.
"""

from __future__ import annotations

if __name__ != "maetok_fast.kernels":
    # Under a second name every op would be registered twice, and torch silently runs the second body for both handles.
    # The bare name would also shadow the Hugging Face package `kernels`, which transformers looks for.
    raise ImportError(
        f"this folder is the package 'maetok_fast.kernels' and was imported as {__name__!r}; write "
        "`import maetok_fast.kernels`, and install the project with `pip install -e .` if that is not found"
    )

from ._dispatch import backend as backend
from ._dispatch import forced_backend as forced_backend
from ._op import Op as Op
from ._op import ops as ops
from ._record import Backend as Backend
from ._record import BackendError as BackendError
from ._record import Cost as Cost
from ._record import Sample as Sample
from ._record import drawn as drawn
from .activation import *
from .adaln import *
from .adamw import *
from .augment import *
from .blur import *
from .ema import *
from .embed_tokens import *
from .fp8 import *
from .fp8_linear import *
from .gan_loss import *
from .gate_residual import *
from .gather_tokens import *
from .hog import *
from .linear import *
from .lpips import *
from .patchgan import *
from .rope_attention import *
from .rope_attention_jvp import *
from .token_mask import *
