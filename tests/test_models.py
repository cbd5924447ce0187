# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""What holds of every model and layer: no host copy, value checks only where there are values, arguments in range."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.fsdp import fully_shard
from torch.func import functional_call, grad, vmap
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from maetok_fast import layers, positions
from maetok_fast.checks import check_label_range, readable
from maetok_fast.models import LightningDiT, LightningDiTConfig, MAETok, MAETokConfig, SiT, SiTConfig, ViTSize

TINY: dict[str, Any] = {"channels": 8, "dim": 32, "depth": 2, "heads": 2, "num_classes": 10}
SIZE = ViTSize(32, 2, 2)


def tokenizer(**changes: Any) -> MAETok:
    fields: dict[str, Any] = {"image_size": 32, "patch": 8, "encoder": SIZE, "decoder": SIZE, "num_latent_tokens": 6}
    return MAETok(MAETokConfig(**fields | changes))


MODELS = {
    "sit": lambda: SiT(SiTConfig(tokens=6, **TINY)),
    "sit on a grid": lambda: SiT(SiTConfig(tokens=(4, 2), patch=2, qk_norm=True, **TINY)),
    "lightningdit": lambda: LightningDiT(LightningDiTConfig(tokens=(3, 2), qk_norm=True, **TINY)),
    "lightningdit, 1-D": lambda: LightningDiT(LightningDiTConfig(tokens=6, swiglu=False, rmsnorm=False, **TINY)),
    "maetok": tokenizer,
    "maetok, axial": lambda: tokenizer(position="axial", decoder_kind="plain", decoder_cls_token=True),
    "maetok, absolute": lambda: tokenizer(position="absolute"),
    "maetok, image tokens": lambda: tokenizer(num_latent_tokens=0),
}


def arguments(model: Any) -> tuple[Tensor, ...]:
    if isinstance(model, MAETok):
        return torch.rand(2, 3, 24, 40), torch.rand(2, 15) < 0.5  # not the trained grid
    tokens = model.config.tokens
    x = torch.randn((2, tokens, 8) if isinstance(tokens, int) else (2, 8, *tokens))
    return x, torch.rand(2), torch.tensor([1, 2])


class _OneDevice(TorchDispatchMode):
    """Fails on any operation that reads or makes a tensor on the CPU."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves((args, kwargs, out)):
            assert not isinstance(leaf, Tensor) or leaf.device.type != "cpu", f"{func} touches a tensor on the CPU"
        return out


@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("name", MODELS)
def test_a_forward_copies_nothing_from_the_host(name: str, train: bool) -> None:
    """On the meta device, where a copy from the host is as visible as on a GPU."""
    model = MODELS[name]().to("meta").train(train)
    args = [a.to("meta") for a in arguments(model)]
    with _OneDevice():
        out = model(*args)
    assert out.device.type == "meta"


def test_the_mode_sees_a_host_copy() -> None:
    with _OneDevice(), pytest.raises(AssertionError, match="on the CPU"):
        torch.arange(4).to("meta")


@pytest.mark.parametrize("name", ["sit", "lightningdit"])
def test_per_sample_gradients(name: str) -> None:
    """vmap over grad: labels are checked where they can be read, and only there."""
    model = MODELS[name]().eval()
    x, t, y = arguments(model)
    nn.init.normal_(model.final_layer.linear.weight)
    parameters = {k: v.detach() for k, v in model.named_parameters()}

    def loss(p: dict[str, Tensor], x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return functional_call(model, p, (x[None], t[None], y[None])).square().sum()

    each = vmap(grad(loss), in_dims=(None, 0, 0, 0))(parameters, x, t, y)
    for i in range(2):
        alone = grad(loss)(parameters, x[i], t[i], y[i])
        for key, value in alone.items():
            torch.testing.assert_close(each[key][i], value, rtol=1e-4, atol=1e-5)


def test_values_are_checked_only_where_there_are_values() -> None:
    config, bad = SiTConfig(tokens=6, **TINY), torch.tensor([11])
    with pytest.raises(ValueError, match="class labels"):
        check_label_range(bad, config)
    check_label_range(bad.to("meta"), config)
    with FakeTensorMode() as mode:
        check_label_range(mode.from_tensor(bad), config)
        check_label_range(torch.zeros(1, dtype=torch.int64), config)
    vmap(lambda y: check_label_range(y, config) or y)(bad[None])
    torch.compile(lambda y: check_label_range(y, config) or y, backend="eager", fullgraph=True)(bad)
    assert readable(bad)
    assert readable(nn.Parameter(torch.ones(1)))


LAYERS = [
    *((lambda n=n: layers.Attention(32, n)) for n in (0, -2, 2.0, True)),
    lambda: layers.Attention(0, 2),
    lambda: layers.Mlp(32, 0),
    lambda: layers.Mlp(-1, 32),
    lambda: layers.SwiGLU(32, 0),
    lambda: layers.LayerNorm(0),
    lambda: layers.RMSNorm(-3),
    lambda: layers.LayerScale(0),
    lambda: layers.Modulation(32, 0),
    lambda: layers.PatchEmbed(3, 32, 0),
    lambda: layers.TimestepEmbedder(32, 0),
    lambda: layers.TimestepEmbedder(32, 7),
    lambda: layers.LabelEmbedder(0, 32, 0.1),
    lambda: positions.axial_frequencies(0, 10.0, "x"),
    lambda: positions.mixed_frequencies(1, 2, 0),
    lambda: positions.mixed_frequencies(1, 2, 6),
    lambda: positions.sincos_1d(0, 4),
    lambda: positions.sincos_2d(8, (0, 4)),
]


@pytest.mark.parametrize("make", LAYERS)
def test_integers_of_layers_are_checked_before_they_divide(make: Any) -> None:
    with pytest.raises((TypeError, ValueError), match=r"^\w+: \w+ must be .*got"):
        make()


@pytest.mark.parametrize("name", ["sit", "lightningdit", "maetok"])
def test_blocks_can_be_sharded_one_by_one(name: str) -> None:
    """FSDP2 over one process: a block's forward alone uses its parameters, so forward and backward are the model's."""
    model = MODELS[name]().eval()
    args = arguments(model)
    want = model(*args)
    blocks = (
        [*model.encoder.model.blocks, *model.decoder.model.blocks] if isinstance(model, MAETok) else [*model.blocks]
    )
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = dist.init_device_mesh("cpu", (1,))
        for part in (*blocks, model):
            fully_shard(part, mesh=mesh)
        got = model(*args)
        torch.testing.assert_close(got, want, rtol=0, atol=0)
        got.square().sum().backward()
        assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    finally:
        dist.destroy_process_group()
