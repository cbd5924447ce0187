# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""discriminator_loss and generator_loss: the adversarial losses and the LeCAM regulariser, one pass over the logits.

    D, hinge:           .5 (mean relu(1 - r) + mean relu(1 + f))
    D, vanilla:         .5 (mean softplus(-r) + mean softplus(f))        binary cross-entropy: real is 1, fake is 0
    G, hinge:           -mean f
    G, non_saturating:  mean softplus(-f)                                binary cross-entropy of fake against 1
    LeCAM:              mean relu(r - ema_fake)^2 + mean relu(ema_real - f)^2

r are the logits of real images, f of generated ones; a large logit says "real". The discriminator brings r up and f
down, the generator f up: tests hold every sign against binary_cross_entropy_with_logits. The mean logits come out of
the same pass; the caller moves the averages, on the device, after an all-reduce over the ranks:
`ema.lerp_(torch.stack((mean_real, mean_fake)).detach(), 1 - 0.999)`.

The gradients read the logits again: that is one map; unit gradients kept by the forward would be one map per loss. Sums
run in fp64 in a fixed order. Lim & Ye 2017, arXiv 1705.02894 (hinge); Goodfellow et al. 2014, arXiv 1406.2661; Tseng
et al. 2021, arXiv 2104.03310 (LeCAM).
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ._native_call import twins
from ._op import Op
from ._record import Sample

__all__ = ["discriminator_loss", "discriminator_loss_ref", "generator_loss", "generator_loss_ref"]

_KINDS = {"hinge": 0, "vanilla": 1}  # as the native functions number them
_GENERATOR_KINDS = {"non_saturating": 1, "hinge": 2}


def discriminator_loss_ref(
    real: Tensor, fake: Tensor, ema: Tensor | None = None, kind: str = "hinge"
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The discriminator's loss, the LeCAM regulariser and both mean logits.

    real, fake: logits of any shapes, bf16, fp16 or fp32 (fp64: reference only). kind: "hinge" or "vanilla".
    ema (2,) fp32: running means of real and of fake logits; without it the regulariser is zero.
    Returns four fp32 scalars: adversarial loss, LeCAM (unweighted; the public recipe adds 1e-3 of it), mean of real,
    mean of fake. All are differentiable, in ema too. Raises ValueError when ema has another shape or kind is unknown.
    """
    r, f = (t.to(torch.promote_types(t.dtype, torch.float32)) for t in (real, fake))
    # / 2: torch's forward mode makes an fp64 tangent of 0.5 * a tensor without dimensions
    if kind == "hinge":
        adversarial = (F.relu(1 - r).mean() + F.relu(1 + f).mean()) / 2
    else:
        adversarial = (F.softplus(-r).mean() + F.softplus(f).mean()) / 2
    if ema is None:
        lecam = r.flatten()[:0].sum()
    else:
        lecam = F.relu(r - ema[1]).square().mean() + F.relu(ema[0] - f).square().mean()
    return adversarial, lecam, r.mean(), f.mean()


def generator_loss_ref(fake: Tensor, kind: str = "non_saturating") -> Tensor:
    """The generator's loss: mean softplus(-fake) ("non_saturating") or -mean fake ("hinge").

    fake: logits of any shape, bf16, fp16 or fp32 (fp64: reference only). Returns an fp32 scalar. Raises ValueError when
    kind is unknown.
    """
    f = fake.to(torch.promote_types(fake.dtype, torch.float32))
    return -f.mean() if kind == "hinge" else F.softplus(-f).mean()


# ---- records: the native library's CPU and CUDA functions take the same arguments ------------------------------------


def _check_kind(op: str, kind: str, known: Collection[str]) -> None:
    if kind not in known:
        raise ValueError(f"{op}: kind must be one of {', '.join(known)}, got {kind!r}")


def _scalars(a: Any, count: int) -> tuple[Tensor, ...]:
    return tuple(a.fake.new_empty((), dtype=torch.float32) for _ in range(count))


def _case(
    label: str, real: tuple[int, ...], fake: tuple[int, ...], kind: str, ema: bool, models: bool = False
) -> Sample:
    def make(randn: Callable[..., Tensor]) -> dict[str, Any]:
        args: dict[str, Any] = {"real": 1 + 2 * randn(*real), "fake": 2 * randn(*fake), "kind": kind}
        return args | ({"ema": randn(2, dtype=torch.float32) * 0.3} if ema else {})

    return Sample(label, make, models)


def _generator_case(label: str, shape: tuple[int, ...], kind: str, models: bool = False) -> Sample:
    return Sample(label, lambda randn: {"fake": 3 * randn(*shape), "kind": kind}, models)


discriminator_loss = Op(
    "discriminator_loss",
    ref=discriminator_loss_ref,
    outputs=("adversarial", "lecam", "mean_real", "mean_fake"),
    saved=("slopes",),
    out=lambda a, backend: (*_scalars(a, 4), a.real.new_empty(2, dtype=torch.float32)),
    shapes={"ema": "2"},
    check=lambda a: _check_kind("discriminator_loss", a.kind, _KINDS),
    roles={"ema": "fp32"},
    **twins(
        "discriminator_loss_fwd real fake ema adversarial lecam mean_real mean_fake slopes number",
        "discriminator_loss_bwd d_adversarial d_lecam d_mean_real d_mean_fake real fake ema slopes d_real d_fake d_ema "
        "number",
        number=lambda a: _KINDS[a.kind],
    ),
    samples=[
        _case("hinge, LeCAM", (3, 1, 5, 7), (3, 1, 5, 7), "hinge", True),
        _case("vanilla", (2, 1, 4, 4), (2, 1, 4, 4), "vanilla", False),
        _case("vanilla, LeCAM, other counts", (2, 9), (5, 37), "vanilla", True),
        _case("one logit", (1,), (1,), "hinge", True),
        _case("several blocks", (2, 4099), (2, 5000), "hinge", True),
        *(
            _case(f"PatchGAN 256 px, {kind}, LeCAM", (8, 1, 30, 30), (8, 1, 30, 30), kind, True, True)
            for kind in _KINDS
        ),
    ],
    flops=lambda a: (6 if a.ema is None else 11) * (a.real.numel() + a.fake.numel()),
)

generator_loss = Op(
    "generator_loss",
    ref=generator_loss_ref,
    outputs=("loss",),
    out=lambda a, backend: _scalars(a, 1),
    shapes={},
    check=lambda a: _check_kind("generator_loss", a.kind, _GENERATOR_KINDS),
    **twins(
        "generator_loss_fwd fake loss number",
        "generator_loss_bwd d_loss fake d_fake number",
        number=lambda a: _GENERATOR_KINDS[a.kind],
    ),
    samples=[
        _generator_case("non-saturating", (3, 1, 5, 7), "non_saturating"),
        _generator_case("hinge", (2, 1, 4, 4), "hinge"),
        _generator_case("several blocks", (2, 4099), "non_saturating"),
        _generator_case("PatchGAN 256 px", (8, 1, 30, 30), "non_saturating", True),
    ],
    flops=lambda a: 4 * a.fake.numel(),
)
