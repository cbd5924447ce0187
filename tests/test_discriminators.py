# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""The discriminators against plain torch.nn, written here from the public code's facts: names, values, gradients."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from rule import assert_rule
from torch import Tensor, nn
from torch.nn.utils import spectral_norm

from maetok_fast.models import ViTSize
from maetok_fast.models.checkpoints import CheckpointError
from maetok_fast.models.discriminators import DinoDiscriminator, create_discriminator
from maetok_fast.models.discriminators.dino import DinoTrunk
from maetok_fast.models.discriminators.patchgan import ActNormAct

pytestmark = pytest.mark.usefixtures("one_thread")


# ---- the same in plain torch ---------------------------------------------------------------------------------------


class PlainActNorm(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.loc, self.scale = nn.Parameter(torch.zeros(1, channels, 1, 1)), nn.Parameter(torch.ones(1, channels, 1, 1))
        self.register_buffer("initialized", torch.tensor(0, dtype=torch.uint8))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * (x + self.loc)


class Plain(nn.Module):
    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.main = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.main(x)


def leaky() -> nn.Module:
    return nn.LeakyReLU(0.2)


def plain_patchgan(norm: str = "batch", c: int = 64) -> nn.Module:
    bias = norm == "actnorm"
    kind: Any = PlainActNorm if bias else nn.BatchNorm2d
    return Plain(
        nn.Conv2d(3, c, 4, 2, 1), leaky(),
        nn.Conv2d(c, 2 * c, 4, 2, 1, bias=bias), kind(2 * c), leaky(),
        nn.Conv2d(2 * c, 4 * c, 4, 2, 1, bias=bias), kind(4 * c), leaky(),
        nn.Conv2d(4 * c, 8 * c, 4, 1, 1, bias=bias), kind(8 * c), leaky(),
        nn.Conv2d(8 * c, 1, 4, 1, 1),
    )  # fmt: skip


def plain_maskbit(c: int = 64) -> nn.Module:
    return Plain(
        nn.Conv2d(3, c, 3, 2, 1), leaky(),
        nn.GroupNorm(32, c, 1e-6), nn.Conv2d(c, c, 3, 2, 1), leaky(),
        nn.GroupNorm(32, c, 1e-6), nn.Conv2d(c, 2 * c, 3, 2, 1), leaky(),
        nn.GroupNorm(32, 2 * c, 1e-6), nn.Conv2d(2 * c, 4 * c, 3, 1, 1), leaky(),
        nn.MaxPool2d(2, 2), nn.Conv2d(4 * c, 1, 3, 1, 1),
    )  # fmt: skip


class PlainBlur(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("f", torch.tensor([1.0, 2.0, 1.0]))

    def forward(self, x: Tensor) -> Tensor:
        kernel = torch.outer(self.f, self.f) / 16
        padded = F.pad(x, (1, 1, 1, 1), "reflect")
        return F.conv2d(padded, kernel.expand(x.shape[1], 1, 3, 3), groups=x.shape[1])


class PlainBlock(nn.Module):
    def __init__(self, a: int, b: int) -> None:
        super().__init__()
        self.conv_res = nn.Conv2d(a, b, 1, stride=2)
        self.net = nn.Sequential(nn.Conv2d(a, b, 3, padding=1), leaky(), nn.Conv2d(b, b, 3, padding=1), leaky())
        self.downsample = nn.Sequential(PlainBlur(), nn.Conv2d(b, b, 3, padding=1, stride=2))

    def forward(self, x: Tensor) -> Tensor:
        return (self.downsample(self.net(x)) + self.conv_res(x)) / math.sqrt(2)


class PlainStyleGAN(nn.Module):
    def __init__(self, widths: list[int]) -> None:
        super().__init__()
        blocks = [PlainBlock(a, b) for a, b in pairwise(widths)]
        self.blocks = nn.ModuleList([nn.Conv2d(3, widths[0], 3, padding=1), leaky(), *blocks])
        self.final_conv = nn.Sequential(nn.Conv2d(widths[-1], 512, 3, padding=1), leaky())
        self.final_linear = nn.Sequential(nn.Linear(512 * 16, 512), leaky(), nn.Linear(512, 1))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.final_linear(self.final_conv(x).flatten(1))


class PlainLocal(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        groups = x.view(math.ceil(len(x) / 8), -1, *x.shape[1:])
        var, mean = torch.var_mean(groups, dim=(1, 3), correction=0, keepdim=True)
        y = (groups - mean) / torch.sqrt(var + 1e-6)
        return (y * self.weight[:, None] + self.bias[:, None]).view(x.shape)


class PlainResidual(nn.Module):
    def __init__(self, fn: nn.Module) -> None:
        super().__init__()
        self.fn = fn

    def forward(self, x: Tensor) -> Tensor:
        return (self.fn(x) + x) / math.sqrt(2)


def plain_head(dim: int, norm: str) -> nn.Sequential:
    def layer(kernel: int) -> nn.Sequential:
        conv = nn.Conv1d(dim, dim, kernel, padding=kernel // 2, padding_mode="circular")
        made = {
            "batch": lambda: nn.BatchNorm1d(dim, eps=1e-6),
            "local": lambda: PlainLocal(dim),
            "group": lambda: nn.GroupNorm(32, dim, eps=1e-6),
        }[norm]()
        return nn.Sequential(spectral_norm(conv), made, leaky())

    return nn.Sequential(layer(1), PlainResidual(layer(9)), spectral_norm(nn.Conv1d(dim, 1, 1)))


class PlainHeads(nn.Module):
    def __init__(self, dim: int, norm: str) -> None:
        super().__init__()
        self.heads = nn.ModuleList(plain_head(dim, norm) for _ in range(3))


class PlainDino(nn.Module):
    """The heads behind the trunk's own weights, by hand; its names are those of the heads."""

    def __init__(self, trunk: DinoTrunk, heads: PlainHeads) -> None:
        super().__init__()
        self.heads = heads.heads
        self.state = {name: p.detach() for name, p in trunk.state_dict().items()}

    def forward(self, images: Tensor) -> Tensor:
        state = {name: p.to(images.dtype) for name, p in self.state.items()}
        features = plain_trunk(state, 2, images, (1, 2))
        return torch.cat([head(x)[:, 0] for head, x in zip(self.heads, features, strict=True)], 1)


def plain_trunk(state: dict[str, Tensor], heads: int, x: Tensor, taps: tuple[int, ...]) -> list[Tensor]:
    """The ViT by hand, of images that have its size."""
    mean, std = (torch.tensor(v).view(3, 1, 1).to(x) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    x = ((x + 1) / 2 - mean) / std
    kernel = state["patch_embed.proj.weight"]
    x = F.conv2d(x, kernel, state["patch_embed.proj.bias"], stride=kernel.shape[-1]).flatten(2).mT
    dim = x.shape[-1]
    x = torch.cat([state["cls_token"].expand(len(x), -1, -1), x], 1) + state["pos_embed"]
    read = [x]
    for i in range(max(taps) + 1):
        p = {k.removeprefix(f"blocks.{i}."): v for k, v in state.items() if k.startswith(f"blocks.{i}.")}
        y = F.layer_norm(x, (dim,), p["norm1.weight"], p["norm1.bias"], 1e-6)
        qkv = F.linear(y, p["attn.qkv.weight"], p["attn.qkv.bias"])
        q, k, v = qkv.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
        y = ((q @ k.mT / math.sqrt(dim // heads)).softmax(-1) @ v).transpose(1, 2).flatten(2)
        x = x + F.linear(y, p["attn.proj.weight"], p["attn.proj.bias"])
        y = F.layer_norm(x, (dim,), p["norm2.weight"], p["norm2.bias"], 1e-6)
        y = F.gelu(F.linear(y, p["mlp.fc1.weight"], p["mlp.fc1.bias"]), approximate="tanh")
        x = x + F.linear(y, p["mlp.fc2.weight"], p["mlp.fc2.bias"])
        if i in taps:
            read.append(x)
    return [(t[:, 1:] + t[:, :1]).mT for t in read]


# ---- convolutional ones --------------------------------------------------------------------------------------------

CASES: dict[str, tuple[str, dict[str, Any], Callable[[], nn.Module], int, int]] = {
    "patchgan": ("patchgan", {}, plain_patchgan, 2_765_633, 40),
    "patchgan, actnorm": ("patchgan", {"norm": "actnorm"}, lambda: plain_patchgan("actnorm"), 2_766_529, 40),
    "maskbit": ("maskbit", {}, plain_maskbit, 410_561, 40),
    "stylegan": ("stylegan", {"size": 16}, lambda: PlainStyleGAN([512] * 3), 0, 16),
}


def moved(model: nn.Module) -> nn.Module:
    """Start values of weights that hide nothing: no zero bias, no scale of one."""
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p) * (p.std(correction=0) if p.numel() > 1 and p.std() > 0 else 1))
    return model


def results(model: nn.Module, images: Tensor, weights: Tensor, training: bool) -> dict[str, Tensor]:
    """Logits, gradients of the images and of all parameters, buffers."""
    model.train(training)
    images = images.clone().requires_grad_()
    logits = model(images)
    (logits * weights).sum().backward()
    found = {f"d_{name}": p.grad for name, p in model.named_parameters() if p.grad is not None}
    buffers = {name: b.clone() for name, b in model.named_buffers() if b.is_floating_point()}
    return {"logits": logits.detach(), "d_images": images.grad, **found, **buffers}  # type: ignore[dict-item]


def assert_same(fast: nn.Module, plain: nn.Module, images: Tensor, training: bool) -> None:
    """In fp64 to its last digits; in fp32 by the correctness rule, and gradients, in which a LeakyReLU at its kink may
    turn single elements, by their norm."""
    with torch.no_grad():
        weights = torch.randn_like(copy.deepcopy(plain)(images))
    inputs = [images, *plain.parameters()]
    wide = [copy.deepcopy(m).double() for m in (fast, plain)]
    got, expected = (results(m, images, weights, training) for m in (fast, plain))
    fast64, exact = (results(m, images.double(), weights.double(), training) for m in wide)
    assert got.keys() == expected.keys()
    largest = max(float(t.abs().max()) for name, t in exact.items() if name[:2] == "d_")
    for name in exact:
        # a bias in front of a batch norm has none but noise
        size = largest if name[:2] == "d_" else float(exact[name].abs().max())
        torch.testing.assert_close(fast64[name], exact[name], atol=1e-10 * size, rtol=1e-9, msg=name)
    gradients = [name for name in exact if name[:2] == "d_"]
    assert_rule(*({k: v for k, v in r.items() if k not in gradients} for r in (got, expected, exact)), inputs)
    for name in gradients:
        error = float((got[name] - exact[name]).norm())
        assert error < 1e-2 * float(exact[name].norm()) + 1e-5 * largest, name


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("case", CASES)
def test_a_discriminator_is_the_public_one(case: str, training: bool) -> None:
    """Equal weights, equal names: logits, gradients of images and weights, running statistics."""
    kind, options, make, count, side = CASES[case]
    plain = moved(make())
    fast = create_discriminator(kind, **options)
    assert list(fast.state_dict()) == list(plain.state_dict())
    assert sum(p.numel() for p in fast.parameters()) == (count or sum(p.numel() for p in plain.parameters()))
    for name, buffer in plain.named_buffers():
        if name.endswith(("running_var", "initialized")):
            buffer.fill_(2)
    fast.load_state_dict(plain.state_dict())
    assert_same(fast, plain, torch.rand(2, 3, side, side) * 2 - 1, training)


def test_the_256_px_models_have_the_public_sizes() -> None:
    with torch.device("meta"):
        stylegan, plain = create_discriminator("stylegan"), PlainStyleGAN([64, 128, 256, 512, 512, 512, 512])
        for kind, shape in (("patchgan", (1, 1, 30, 30)), ("maskbit", (1, 1, 16, 16))):
            assert create_discriminator(kind)(torch.rand(1, 3, 256, 256)).shape == shape
    shapes = {k: v.shape for k, v in stylegan.state_dict().items()}
    assert shapes == {k: v.shape for k, v in plain.state_dict().items()}


def test_start_values_are_tamings() -> None:
    state = create_discriminator("patchgan").state_dict()
    assert abs(float(state["main.8.weight"].std()) - 0.02) < 1e-3
    assert abs(float(state["main.9.weight"].mean()) - 1) < 0.01
    assert not state["main.9.bias"].any()


def test_actnorm_starts_with_the_first_training_batch() -> None:
    layer, x = ActNormAct(5), torch.randn(4, 5, 6, 7) * 3 + 2
    layer.eval()
    torch.testing.assert_close(layer(x), F.leaky_relu(x, 0.2))  # not in eval
    layer.train()
    y = layer(x)
    std, mean = torch.std_mean(x, (0, 2, 3), keepdim=True)
    torch.testing.assert_close(y, F.leaky_relu((x - mean) / (std + 1e-6), 0.2))
    assert layer.initialized == 1
    kept = layer.loc.clone()
    layer(x + 5)
    assert torch.equal(layer.loc, kept)  # once
    layer.load_state_dict(ActNormAct(5).state_dict())
    layer(x + 5)
    assert not torch.equal(layer.loc, kept)  # and again where what was read had not started


# ---- DINO ----------------------------------------------------------------------------------------------------------

SMALL: dict[str, Any] = {
    "weights": "random", "size": ViTSize(64, 4, 2), "image_size": 32, "patch": 8, "taps": (1, 2)
}  # fmt: skip


def lively(model: DinoDiscriminator) -> DinoDiscriminator:
    with torch.no_grad():
        for p in model.trunk.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model


@pytest.mark.parametrize("norm", ["batch", "local", "group"])
@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
def test_dinos_discriminator_is_the_public_one(norm: str, training: bool) -> None:
    fast = lively(DinoDiscriminator(norm=norm, crop=0.0, **SMALL))
    heads = PlainHeads(64, norm)
    assert list(fast.state_dict()) == list(heads.state_dict())
    fast.load_state_dict(moved(heads).state_dict())
    plain = PlainDino(fast.trunk, heads)
    assert_same(fast, plain, torch.rand(16, 3, 32, 32) * 2 - 1, training)


@pytest.fixture(scope="module")
def real_trunk() -> DinoTrunk:
    torch.manual_seed(0)
    trunk = DinoTrunk()
    trunk.reset_parameters()
    with torch.no_grad():
        for p in trunk.parameters():
            p.add_(0.03 * torch.randn_like(p))
    return trunk


def test_the_trunk_is_timms_dino(real_trunk: DinoTrunk) -> None:
    """By its keys and shapes, and by its features of equal weights, with the tanh GELU of the public discriminator."""
    timm = pytest.importorskip("timm")
    vit = timm.create_model("vit_small_patch16_224.dino", act_layer=lambda: nn.GELU(approximate="tanh")).eval()
    state = real_trunk.state_dict()
    found = vit.load_state_dict(state, strict=False)
    assert not found.unexpected_keys
    assert all(key.startswith(("norm.", "head.")) for key in found.missing_keys)
    images = torch.rand(1, 3, 224, 224)
    mean, std = (torch.tensor(vit.pretrained_cfg[k]).view(3, 1, 1) for k in ("mean", "std"))
    with torch.no_grad():
        read = real_trunk(images * 2 - 1)
        tokens = vit.forward_intermediates(
            (images - mean) / std, indices=[2, 5, 8, 11], return_prefix_tokens=True, output_fmt="NLC",
            intermediates_only=True, norm=False,
        )  # fmt: skip
    assert len(read) == 5
    for ours, (patches, prefix) in zip(read[1:], tokens, strict=True):
        torch.testing.assert_close(ours, (patches + prefix).mT, atol=1e-4, rtol=1e-3)


def test_dinos_discriminator_has_the_public_size() -> None:
    with torch.device("meta"):
        model = DinoDiscriminator("random")
    assert sum(p.numel() for p in model.parameters()) == 7_386_245
    assert model.heads[4][1].fn[0].weight_orig.shape == (384, 384, 9)
    assert sum(p.numel() for p in model.trunk.parameters()) == 21_664_896  # without the last norm


def test_the_trunk_is_frozen_and_not_kept() -> None:
    model = lively(DinoDiscriminator(**SMALL))
    assert all(name.startswith("heads.") for name in (*model.state_dict(), *dict(model.named_parameters())))
    images = torch.rand(2, 3, 32, 32, requires_grad=True)
    model.train()(images).sum().backward()
    assert images.grad is not None
    assert float(images.grad.abs().max()) > 0
    assert all(not p.requires_grad and p.grad is None for p in model.trunk.parameters())
    assert not any(m.training for m in model.trunk.modules())
    assert all(not f.requires_grad for f in model.features(images.detach()))
    assert next(model.double().trunk.parameters()).dtype == torch.float64  # it follows
    assert next(copy.deepcopy(DinoDiscriminator(**SMALL)).trunk.parameters()).dtype == torch.float32


def test_features_serve_twice() -> None:
    model = lively(DinoDiscriminator(norm="group", crop=0.0, **SMALL)).eval()
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    features = model.features(images)
    assert torch.equal(model.heads(features), model(images))
    model.heads([f.detach() for f in features]).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize(
    ("size", "mode"), [((48, 40), "area"), ((32, 48), "bicubic"), ((20, 24), "bicubic"), ((40, 20), "area")]
)
def test_images_are_resized_as_in_public_code(size: tuple[int, int], mode: str) -> None:
    model = lively(DinoDiscriminator(norm="group", **SMALL)).eval()
    images = torch.rand(2, 3, *size) * 2 - 1
    resized = F.interpolate(images, (32, 32), mode=mode)
    expected = model.heads(plain_trunk(model.trunk.state_dict(), 2, resized, (1, 2)))
    torch.testing.assert_close(model(images), expected, atol=1e-4, rtol=1e-4)


def test_windows_are_drawn_in_training_alone() -> None:
    model = DinoDiscriminator(crop=1.0, **SMALL)
    images = torch.rand(2, 3, 36, 40)
    torch.manual_seed(1)
    window = model.trunk.fit(images, 1.0)
    places = [images[:, :, i : i + 32, j : j + 32] for i in range(5) for j in range(9)]
    assert any(torch.equal(window, place) for place in places)
    assert torch.equal(model.train().features(images)[0], model.features(images)[0]) is False
    assert torch.equal(model.eval().features(images)[0], model.features(images)[0])


@pytest.mark.parametrize("ending", [".pth", ".safetensors"])
def test_the_trunk_is_read_from_a_file(tmp_path: Path, ending: str) -> None:
    """With what else DINO's files hold: a last norm, a head, blocks behind the last that is read."""
    source = lively(DinoDiscriminator(**SMALL)).trunk.state_dict()
    more = {"norm.weight": torch.ones(64), "head.weight": torch.ones(3, 64), "blocks.3.norm1.weight": torch.ones(64)}
    path = tmp_path / f"dino{ending}"
    if ending == ".pth":
        torch.save(source | more, path)
    else:
        from safetensors.torch import save_file

        save_file(source | more, path)
    read = DinoDiscriminator(**SMALL | {"weights": path}).trunk.state_dict()
    assert read.keys() == source.keys()
    assert all(torch.equal(read[k], source[k]) for k in source)


def test_weights_that_do_not_fit_are_named(tmp_path: Path) -> None:
    state = DinoDiscriminator(**SMALL).trunk.state_dict()
    path = tmp_path / "dino.pth"

    def refused(content: Any, match: str) -> None:
        torch.save(content, path)
        with pytest.raises(CheckpointError, match=match):
            DinoDiscriminator(**SMALL | {"weights": path})

    refused({k: v for k, v in state.items() if k != "cls_token"}, "it lacks cls_token")
    refused(state | {"extra": torch.ones(1)}, "it has extra")
    refused(state | {"pos_embed": torch.zeros(1, 5, 64)}, r"pos_embed is \(1, 5, 64\), expected \(1, 17, 64\)")
    refused({"heads": torch.ones(1)}, "no DINO ViT checkpoint")
    with pytest.raises(CheckpointError, match=r"no such file.*dino_deitsmall16_pretrain\.pth"):
        DinoDiscriminator(tmp_path / "none.pth")


def test_a_hub_that_cannot_be_reached_says_how_to_get_the_file(monkeypatch: pytest.MonkeyPatch) -> None:
    def locate(source: str) -> Any:
        assert source == "timm/vit_small_patch16_224.dino"
        raise CheckpointError("it does not answer")

    monkeypatch.setattr("maetok_fast.models.discriminators.dino.locate", locate)
    with pytest.raises(CheckpointError, match=r"download https://\S+/dino_deitsmall16_pretrain\.pth and give weights="):
        DinoDiscriminator()


def test_a_batch_that_8_does_not_divide_has_local_statistics_too() -> None:
    model = DinoDiscriminator(norm="local", crop=0.0, **SMALL)
    images = torch.rand(10, 3, 32, 32) * 2 - 1
    model.eval()
    parts = torch.cat([model(images[:5]), model(images[5:])])
    torch.testing.assert_close(model(images), parts, atol=1e-4, rtol=1e-4)


# ---- all -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "options"), [
    ("patchgan", {}), ("patchgan", {"norm": "actnorm"}), ("maskbit", {}), ("stylegan", {"size": 8}), ("dino", SMALL),
])  # fmt: skip
def test_autocast_gives_finite_gradients(kind: str, options: dict[str, Any]) -> None:
    model = create_discriminator(kind, **options)
    side = 8 if kind == "stylegan" else 32  # 512 channels: where bf16 is emulated 32 x 32 pixels take minutes
    images = torch.rand(2, 3, side, side, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(images)
    logits.float().mean().backward()
    assert images.grad is not None
    assert all(bool(p.grad.isfinite().all()) for p in (images, *model.parameters()))
    with torch.no_grad():
        exact = model.eval()(images)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        assert float((model(images).float() - exact).abs().max()) < 0.1 * float(exact.abs().max()) + 0.02


@pytest.mark.parametrize(("call", "match"), [
    (lambda: create_discriminator("biggan"), "'biggan' is not one of dino, maskbit, patchgan, stylegan"),
    (lambda: create_discriminator("maskbit", size=3), "'maskbit' has no option 'size'; it has channels, layers"),
    (lambda: create_discriminator("patchgan", norm="layer"), "'layer' is not 'batch' or 'actnorm'"),
    (lambda: create_discriminator("stylegan", size=200), "power of 2 from 8 to 1024 and multiplier >= 1, got 200"),
    (lambda: create_discriminator("stylegan", size=16)(torch.rand(1, 3, 32, 32)), "made for 16 x 16 pixels, got 32"),
    (lambda: create_discriminator("patchgan")(torch.rand(1, 3, 16, 32)), "at least 24 x 24 pixels, got 16 x 32"),
    (lambda: create_discriminator("maskbit")(torch.zeros(1, 3, 32, 32, dtype=torch.uint8)), "torch.uint8"),
    (lambda: create_discriminator("patchgan")(torch.rand(1, 1, 32, 32)), r"\(B, 3, H, W\)"),
    (lambda: DinoDiscriminator("random", norm="sync"), "'sync' is not one of batch, local, group"),
    (lambda: DinoDiscriminator("random", crop=2.0), "crop must be a probability"),
    (lambda: DinoDiscriminator("random", taps=(5, 2)), "ascending numbers of its 12 blocks"),
])  # fmt: skip
def test_what_cannot_be_is_said_in_a_sentence(call: Callable[[], Any], match: str) -> None:
    with pytest.raises((ValueError, TypeError), match=match):
        call()
