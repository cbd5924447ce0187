# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""maetok_fast.layers.recompute: the same bits from fewer kept tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from maetok_fast.layers import LayerNorm, Mlp, SwiGLU, again, recompute
from maetok_fast.models import LightningDiT, LightningDiTConfig, MAETok, MAETokConfig, SiT, SiTConfig, ViTSize

pytestmark = pytest.mark.usefixtures("one_thread")


def awake(model: nn.Module) -> nn.Module:
    """No gate of zero, behind which nothing would show."""
    torch.manual_seed(3)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad and p.abs().max() < 1e-3:
                p.normal_(0, 0.2)
    return model.train()


def gradients(model: nn.Module, loss: Callable[[Any], Tensor]) -> list[Tensor]:
    torch.manual_seed(5)
    model.zero_grad(set_to_none=True)
    loss(model).backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def sit(model: Any) -> Tensor:
    x = torch.linspace(-1, 1, 3 * 6 * 4).reshape(3, 6, 4)
    return model(x, torch.tensor([0.1, 0.5, 0.9]), torch.tensor([0, 1, 2])).square().mean()


def lightning(model: Any) -> Tensor:
    x = torch.linspace(-1, 1, 2 * 4 * 16).reshape(2, 4, 4, 4)
    return model(x, torch.tensor([0.1, 0.9]), torch.tensor([0, 1])).square().mean()


def tokenizer(model: Any) -> Tensor:
    x = torch.linspace(-1, 1, 2 * 3 * 32 * 32).reshape(2, 3, 32, 32)
    return model.decode(model.encode(x)).square().mean()


SMALL = {"dim": 32, "depth": 2, "heads": 2, "num_classes": 5, "channels": 4}
MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[Any], Tensor], int]] = {
    "sit": (lambda: SiT(SiTConfig(tokens=6, **SMALL)), sit, 4),
    "lightningdit": (lambda: LightningDiT(LightningDiTConfig(tokens=(4, 4), **SMALL)), lightning, 4),
    "maetok": (
        lambda: MAETok(
            MAETokConfig(
                image_size=32, base_image_size=32, patch=8, num_latent_tokens=6, latent_dim=8,
                encoder=ViTSize(32, 2, 2), decoder=ViTSize(32, 2, 2),
            )
        ),
        tokenizer,
        8,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("lowered", [False, True], ids=["fp32", "bf16"])
def test_gradients_are_the_same_bits(name: str, lowered: bool) -> None:
    make, loss, knowing = MODELS[name]
    model = awake(make())

    def lossy(model: Any) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=lowered):
            return loss(model).float()

    assert recompute(model, False) == knowing
    # the product and its GELU as two passes, as they are where the GELU is made again
    for module in model.modules():
        if isinstance(module, Mlp):
            module.fc1 = _apart(module.fc1)
    kept = gradients(model, lossy)
    recompute(model)
    found = gradients(model, lossy)
    assert len(kept) == len(found)
    assert all(torch.equal(a, b) for a, b in zip(kept, found))


def _apart(linear: nn.Linear) -> nn.Linear:
    plain = nn.Linear(linear.in_features, linear.out_features)
    plain.weight, plain.bias = linear.weight, linear.bias
    return plain


def kept_numbers(run: Callable[[], Tensor], but: nn.Module) -> int:
    """Numbers that autograd holds after run(), the module's own parameters left out; hooks inside see theirs first."""
    own = {p.untyped_storage().data_ptr() for p in but.parameters()}
    seen: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        place = x.untyped_storage().data_ptr()
        if place not in own:
            seen[place] = x.untyped_storage().nbytes() // x.element_size()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        out = run()
    assert out.requires_grad
    return sum(seen.values())


class Watched(nn.Module):
    """norm -> Linear, with what the Linear keeps left to the hooks around."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear = LayerNorm(64), nn.Linear(64, 64)

    def forward(self, x: Tensor, wanted: bool) -> Tensor:
        y = self.norm(x)
        with again(y, self.norm, x, wanted=wanted):
            return self.linear(y)


def test_the_input_of_the_product_is_not_kept() -> None:
    model, x = Watched(), torch.randn(2, 50, 64, requires_grad=True)
    held = [kept_numbers(lambda wanted=w: model(x, wanted), model) for w in (False, True)]
    assert held[0] - held[1] == x.numel()


@pytest.mark.parametrize("make", [lambda: Mlp(16, 64, "tanh"), lambda: SwiGLU(16, 64)], ids=["mlp", "swiglu"])
def test_the_activation_is_not_kept(make: Callable[[], nn.Module]) -> None:
    model, x = make(), torch.randn(2, 30, 16, requires_grad=True)
    if isinstance(model, Mlp):
        model.fc1 = _apart(model.fc1)
    held = []
    for wanted in (False, True):
        recompute(model, wanted)
        model(x).sum().backward()  # races, if any, are over
        held.append(kept_numbers(lambda: model(x), model))
    assert held[0] - held[1] == 2 * 30 * 64


def test_nothing_happens_without_gradients_or_under_a_transform() -> None:
    model = awake(SiT(SiTConfig(tokens=6, **SMALL)))
    recompute(model)
    with torch.no_grad():
        assert not sit(model).requires_grad

    def of(x: Tensor) -> Tensor:
        return model(x, torch.tensor([0.3]), torch.tensor([1]))

    model.eval()
    x = torch.linspace(-1, 1, 24).reshape(1, 6, 4)
    value, slope = torch.func.jvp(of, (x,), (torch.ones_like(x),))
    near = (of(x + 1e-2) - of(x - 1e-2)) / 2e-2
    torch.testing.assert_close(slope, near, atol=2e-3, rtol=2e-2)
    torch.testing.assert_close(value, of(x))


def test_other_tensors_of_the_same_memory_are_kept_as_they_are() -> None:
    x = torch.randn(4, 8, requires_grad=True)
    y = x * 2

    def never() -> Tensor:
        raise AssertionError("made again")

    with again(y, never):
        out = y[:2].square().sum() + y.t().square().sum()  # a part of it, and another order of it
    out.backward()
    expected = 8 * x.detach()
    expected[:2] *= 2
    torch.testing.assert_close(x.grad, expected)
