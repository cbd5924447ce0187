# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""Calls that mypy must accept or refuse (.ci/types): an op has its reference's signature. No test runs this; an ignored
error that does not occur is itself an error."""

from __future__ import annotations

from torch import Tensor
from typing_extensions import assert_type

from maetok_fast.kernels import adaln, discriminator_loss, residual_adaln, rope_attention


def accepted(x: Tensor) -> None:
    assert_type(adaln(x, scale=x, eps=1e-5, norm="rms"), Tensor)
    assert_type(residual_adaln(x, x), tuple[Tensor, Tensor])
    assert_type(discriminator_loss(x, x), tuple[Tensor, Tensor, Tensor, Tensor])
    assert_type(rope_attention(x, prefix=1), Tensor)


def refused(x: Tensor) -> None:
    adaln(x, norm=1)  # type: ignore[arg-type]
    adaln(x, epsilon=1e-5)  # type: ignore[call-arg]
    residual_adaln(x)  # type: ignore[call-arg]
    rope_attention([x])  # type: ignore[arg-type]
