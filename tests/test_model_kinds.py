# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""What holds for every model and every configuration: bounded graphs, no copy from the host, no parameter out of reach,
numbers checked when they are given, values read only where there are any."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.func import functional_call, grad, vmap

from maetok_fast import layers
from maetok_fast.models import (
    LightningDiT,
    LightningDiTConfig,
    MAETok,
    MAETokConfig,
    SiT,
    SiTConfig,
    ViTSize,
)

SIZE = ViTSize(32, 2, 2)
POSITIONS = ("mixed", "axial", "absolute")


def tokenizer(**options: Any) -> MAETok:
    return MAETok(MAETokConfig(image_size=32, patch=8, encoder=SIZE, decoder=SIZE, **options))


def small(kind: str) -> nn.Module:
    if kind == "sit":
        return SiT(SiTConfig(tokens=6, channels=8, dim=32, depth=2, heads=2))
    if kind == "lightningdit":
        return LightningDiT(LightningDiTConfig(tokens=(4, 4), channels=8, dim=32, depth=2, heads=2))
    return tokenizer(position=kind)


MODELS = ("sit", "lightningdit", *POSITIONS)


def inputs(kind: str, device: str = "cpu") -> tuple[Tensor, ...]:
    if kind in POSITIONS:
        return (torch.rand(2, 3, 32, 32, device=device),)
    x = torch.randn(2, 6, 8, device=device) if kind == "sit" else torch.randn(2, 8, 4, 4, device=device)
    return x, torch.rand(2, device=device), torch.tensor([1, 2], device=device)


def test_sizes_and_batches_share_a_few_graphs() -> None:
    counter = CompileCounter()
    torch._dynamo.reset()
    model = torch.compile(tokenizer().eval(), backend=counter, fullgraph=True, dynamic=True)
    with torch.no_grad():
        for rows in range(4, 16):
            assert model(torch.rand(2, 3, 8 * rows, 32)).shape == (2, 3, 8 * rows, 32)
        for batch in (1, 3, 5):
            model(torch.rand(batch, 3, 40, 32))
    assert counter.frame_count <= 3  # the trained grid, any other, one image


def test_a_batch_of_any_size_is_exported() -> None:
    model = tokenizer().eval()
    batch = torch.export.Dim("B", max=64)
    program = torch.export.export(model, (torch.rand(2, 3, 32, 32),), dynamic_shapes=({0: batch},), strict=True)
    images = torch.rand(11, 3, 32, 32)
    torch.testing.assert_close(program.module()(images), model(images))


@pytest.mark.parametrize("kind", MODELS)
def test_a_forward_copies_nothing_from_the_host(kind: str) -> None:
    """On another device ("meta" here) every table is made there: a copy would be waited for, and end a CUDA graph."""
    model = small(kind).to("meta").eval()

    class NoHostTensors(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            made = [t for t in torch.utils._pytree.tree_leaves(out) if isinstance(t, Tensor)]
            assert all(t.device.type == "meta" for t in made), func
            return out

    given = inputs(kind, "meta")
    with NoHostTensors():
        assert model(*given).device.type == "meta"


@pytest.mark.parametrize("kind", MODELS)
def test_every_parameter_that_requires_a_gradient_gets_one(kind: str) -> None:
    """What the public layout holds and no input reaches is frozen: DDP would wait for its gradient."""
    model = small(kind).train()
    given = inputs(kind)
    if kind in POSITIONS:
        given = (*given, torch.rand(2, 16) < 0.5)
    model(*given).square().sum().backward()
    assert [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None] == []
    assert [n for n, p in model.named_parameters() if not p.requires_grad and p.grad is not None] == []


def test_labels_are_checked_where_they_can_be_read() -> None:
    model = small("sit").eval()
    x, t, y = inputs("sit")
    with pytest.raises(ValueError, match=r"class labels must be 0 .. 1000"):
        model(x, t, y + 5000)
    params = {k: v.detach() for k, v in model.named_parameters()}

    def loss(p: dict[str, Tensor], x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return functional_call(model, p, (x[None], t[None], y[None])).square().sum()

    grads = vmap(grad(loss), in_dims=(None, 0, 0, 0))(params, x, t, y)
    alone = grad(loss)(params, x[0], t[0], y[0])
    for name, g in alone.items():
        torch.testing.assert_close(grads[name][0], g, rtol=1e-4, atol=1e-5)
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert model(*(mode.from_tensor(v) for v in (x, t, y + 5000))).shape == x.shape


NUMBERS: dict[type, dict[str, tuple[float, ...]]] = {
    SiTConfig: {"mlp_ratio": (0.0, -1.0), "label_dropout": (-0.1, 1.5)},
    LightningDiTConfig: {"mlp_ratio": (0.0, -1.0), "label_dropout": (-0.1, 1.5)},
    ViTSize: {"mlp_ratio": (0.0, -1.0)},
    MAETokConfig: {
        "rope_theta": (0.0, -1.0),
        "latent_mean": (),
        "latent_std": (0.0, -1.0),
        "encoder_drop_path": (1.0, -0.5),
        "decoder_drop_path": (1.0, -0.5),
    },
}


@pytest.mark.parametrize("config", NUMBERS, ids=lambda c: c.__name__)
def test_every_number_of_a_configuration_is_checked_when_it_is_made(config: type) -> None:
    floats = {f.name for f in dataclasses.fields(config) if f.type == "float"}
    assert floats == set(NUMBERS[config])
    for name, wrong in NUMBERS[config].items():
        for value in (*wrong, math.nan, math.inf, -math.inf, "x"):
            with pytest.raises((ValueError, TypeError), match=name) as raised:
                config(**{name: value})
            assert len(str(raised.value).splitlines()) == 1
    for field in dataclasses.fields(config):
        if field.type == "int":
            for value in (-1, 1.5, True):
                with pytest.raises((ValueError, TypeError)):
                    config(**{field.name: value})


@pytest.mark.parametrize(
    "make",
    [
        lambda n: layers.Attention(32, n),
        lambda n: layers.Attention(n, 2),
        lambda n: layers.Mlp(8, n),
        lambda n: layers.SwiGLU(n, 8),
        lambda n: layers.PatchEmbed(3, 8, n),
        lambda n: layers.TimestepEmbedder(8, n),
        lambda n: layers.LabelEmbedder(n, 8, 0.1),
    ],
)
def test_integers_of_layers_are_checked_before_they_divide(make: Callable[[Any], nn.Module]) -> None:
    for n, error in ((0, ValueError), (-2, ValueError), (1.5, TypeError)):
        with pytest.raises(error, match=r"must be (positive|an integer), got"):
            make(n)
