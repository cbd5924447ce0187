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

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ._op import EMPTY, Cost, Op, Sample
from ._twins import twins

__all__ = ["discriminator_loss", "discriminator_loss_ref", "generator_loss", "generator_loss_ref"]

_KINDS = {"hinge": 0, "vanilla": 1}  # as the native functions number them
_GENERATOR_KINDS = {"non_saturating": 1, "hinge": 2}


# ---- reference -----------------------------------------------------------------------------------------------------


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
    if kind == "hinge":
        adversarial = 0.5 * (F.relu(1 - r).mean() + F.relu(1 + f).mean())
    else:
        adversarial = 0.5 * (F.softplus(-r).mean() + F.softplus(f).mean())
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


# ---- launchers: the native library's CPU and CUDA functions take the same arguments ----------------------------------


def _forward(run: Callable[..., None], *args: Any) -> tuple[Tensor, ...]:
    real, fake, ema, kind = args
    out = _fake("", *args)
    run(real, fake, ema, *out, _KINDS[kind])
    return out


def _backward(
    run: Callable[..., None],
    grads: Sequence[Tensor],
    saved: Sequence[Tensor],
    args: tuple[Any, ...],
    needs: Sequence[bool],
) -> Sequence[Tensor | None]:
    found = [torch.empty_like(t) if n else None for t, n in zip(args[:3], needs)]
    run(*grads, *args[:3], saved[0], *found, _KINDS[args[3]])
    return [*found, None]


def _generator_forward(run: Callable[..., None], *args: Any) -> tuple[Tensor, ...]:
    fake, kind = args
    (loss,) = _generator_fake("", *args)
    run(fake, loss, _GENERATOR_KINDS[kind])
    return (loss,)


def _generator_backward(
    run: Callable[..., None], dloss: Tensor, saved: Sequence[Tensor], args: tuple[Any, ...], needs: Sequence[bool]
) -> Sequence[Tensor | None]:
    fake, kind = args
    dfake = torch.empty_like(fake)
    run(dloss, fake, dfake, _GENERATOR_KINDS[kind])
    return [dfake, None]


# ---- records -------------------------------------------------------------------------------------------------------


def _check_kind(op: str, kind: str, known: dict[str, int]) -> None:
    if kind not in known:
        raise ValueError(f"{op}: kind must be one of {', '.join(known)}, got {kind!r}")


def _check(real: Tensor, fake: Tensor, ema: Tensor | None, kind: str) -> None:
    _check_kind("discriminator_loss", kind, _KINDS)
    if ema is not None and tuple(ema.shape) != (2,):
        raise ValueError(f"discriminator_loss: ema must be (2,), mean of real and of fake, got {tuple(ema.shape)}")


def _generator_check(fake: Tensor, kind: str) -> None:
    _check_kind("generator_loss", kind, _GENERATOR_KINDS)


def _unsupported(backend: str, *args: Any) -> str | None:
    return EMPTY if any(isinstance(t, Tensor) and t.numel() == 0 for t in args) else None


def _fake(name: str, *args: Any) -> tuple[Tensor, ...]:
    scalars = tuple(args[0].new_empty((), dtype=torch.float32) for _ in range(4))
    return (*scalars, args[0].new_empty(2, dtype=torch.float32))


def _generator_fake(name: str, *args: Any) -> tuple[Tensor, ...]:
    return (args[0].new_empty((), dtype=torch.float32),)


def _case(label: str, real: Sequence[int], fake: Sequence[int], kind: str, ema: bool, at_real: bool = False) -> Sample:
    def make(randn: Callable[..., Tensor]) -> dict[str, Any]:
        args: dict[str, Any] = {"real": 1 + 2 * randn(*real), "fake": 2 * randn(*fake), "kind": kind}
        if ema:
            args["ema"] = randn(2, dtype=torch.float32) * 0.3
        return args

    return Sample(label, make, at_real)


def _samples() -> Iterable[Sample]:
    yield _case("hinge, LeCAM", (3, 1, 5, 7), (3, 1, 5, 7), "hinge", True)
    yield _case("vanilla", (2, 1, 4, 4), (2, 1, 4, 4), "vanilla", False)
    yield _case("vanilla, LeCAM, other counts", (2, 9), (5, 37), "vanilla", True)
    yield _case("one logit", (1,), (1,), "hinge", True)
    yield _case("several blocks", (2, 4099), (2, 5000), "hinge", True)
    for kind in _KINDS:
        yield _case(f"PatchGAN 256 px, {kind}, LeCAM", (8, 1, 30, 30), (8, 1, 30, 30), kind, True, True)


def _generator_case(label: str, shape: Sequence[int], kind: str, real: bool = False) -> Sample:
    return Sample(label, lambda randn: {"fake": 3 * randn(*shape), "kind": kind}, real)


def _generator_samples() -> Iterable[Sample]:
    yield _generator_case("non-saturating", (3, 1, 5, 7), "non_saturating")
    yield _generator_case("hinge", (2, 1, 4, 4), "hinge")
    yield _generator_case("several blocks", (2, 4099), "non_saturating")
    yield _generator_case("PatchGAN 256 px", (8, 1, 30, 30), "non_saturating", True)


def _cost(real: Tensor, fake: Tensor, ema: Tensor | None = None, kind: str = "hinge") -> Cost:
    count = real.numel() + fake.numel()
    return Cost((6 if ema is None else 11) * count, count * real.element_size() + 4 * 6, 1)


def _generator_cost(fake: Tensor, kind: str = "non_saturating") -> Cost:
    return Cost(4 * fake.numel(), fake.numel() * fake.element_size() + 4, 1)


_discriminator_loss_cpu, _discriminator_loss_cuda = twins("discriminator_loss", _forward, _backward)
discriminator_loss = Op(
    "discriminator_loss",
    ref=discriminator_loss_ref,
    cpu=(_discriminator_loss_cpu,),
    cuda=(_discriminator_loss_cuda,),
    fake=_fake,
    outputs=4,
    saved=1,
    check=_check,
    unsupported=_unsupported,
    samples=_samples,
    cost=_cost,
    fp32=frozenset({"ema"}),
)

_generator_loss_cpu, _generator_loss_cuda = twins("generator_loss", _generator_forward, _generator_backward)
generator_loss = Op(
    "generator_loss",
    ref=generator_loss_ref,
    cpu=(_generator_loss_cpu,),
    cuda=(_generator_loss_cuda,),
    fake=_generator_fake,
    check=_generator_check,
    unsupported=_unsupported,
    samples=_generator_samples,
    cost=_generator_cost,
)
