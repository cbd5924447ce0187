# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""Teachers against timm's own forward in fp64, from images to patch features."""

from __future__ import annotations

import copy
import gc
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from maetok_fast.kernels import _gemm, _native
from maetok_fast.models.checkpoints import CheckpointError
from maetok_fast.training import teachers
from maetok_fast.training.teachers import IMAGENET, TEACHERS, Teacher, TeacherError

timm: Any = pytest.importorskip("timm")
pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = "vit_tiny_patch16_224"
CPU = torch.device("cpu")
IMAGES = torch.randint(0, 256, (2, 3, 32, 48), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two blocks of each network."""
    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda name, **options: create(name, depth=2, **options))


def wanted(model: Any, images: Tensor, mean: Any, deviation: Any) -> Tensor:
    """Of a timm model that has the images' size, in fp64."""
    x = (images.double() / 255 - torch.tensor(mean)[:, None, None]) / torch.tensor(deviation)[:, None, None]
    with torch.no_grad():
        return model.double().eval().forward_features(x)[:, model.num_prefix_tokens :]


def lively(model: Any) -> Any:
    """Parameters of a size that makes every branch count (LayerScale begins at 1e-5)."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * 0.05 + (0.5 if p.ndim == 1 else 0.0))
    return model


def stored(model: Any, path: Path) -> Path:
    torch.save(model.state_dict(), path)
    return path


def relative(got: Tensor, want: Tensor) -> float:
    return ((got.double() - want.double()).norm() / want.double().norm()).item()


@pytest.mark.parametrize(
    ("name", "patch"),
    [
        ("vit_small_patch14_dinov2.lvd142m", 16),
        ("vit_small_patch14_dinov2.lvd142m", 8),
        ("vit_base_patch16_siglip_gap_224.v2_webli", 16),
    ],
)
def test_features_are_those_of_timm_at_our_patch_on_the_images_grid(name: str, patch: int, tmp_path: Path) -> None:
    """A checkpoint at the network's own patch and positions: the filters are resampled once, the positions once, from
    their own grid to that of each image, which is what timm does when it reads it for that size."""
    model = lively(timm.create_model(name, num_classes=0))
    path = stored(model, tmp_path / "own.pth")
    teacher = Teacher.create(name, weights=path, image_size=32, patch=patch, precision="fp32")
    own = model.pretrained_cfg
    for size in ((32, 48), (64, 64), (16, 32)):
        images = torch.randint(0, 256, (2, 3, *size), dtype=torch.uint8)
        at_size = timm.create_model(
            name,
            num_classes=0,
            patch_size=patch,
            img_size=size,
            pretrained=True,
            pretrained_cfg_overlay={"file": str(path)},
        )
        assert own["mean"] == at_size.pretrained_cfg["mean"]
        want = wanted(at_size, images, own["mean"], own["std"])
        got = teacher(images)
        assert got.shape == (2, size[0] * size[1] // patch**2, teacher.features)
        assert got.dtype == torch.float32
        assert relative(got, want) < 2e-6


def test_prefix_tokens_are_dropped_and_the_grid_is_read_row_by_row(tmp_path: Path) -> None:
    """A patch that is changed changes its own token most, where attention is small."""
    name = "vit_small_patch14_reg4_dinov2"
    teacher = Teacher.create(name, weights="random", image_size=64)
    images = torch.zeros(1, 3, 32, 64, dtype=torch.uint8)
    other = images.clone()
    other[:, :, 16:32, 32:48] = 255  # row 1, column 2 of a grid of 2 x 4
    moved = (teacher(other).float() - teacher(images).float()).norm(dim=-1)
    assert moved.shape == (1, 8)
    assert moved.argmax() == 1 * 4 + 2


def test_bytes_and_floats_are_the_same_images() -> None:
    teacher = Teacher.create(SMALL, weights="random", image_size=32, precision="fp32")
    floats = IMAGES.double() / 127.5 - 1
    want = teacher(IMAGES)
    for x in (floats, floats.float()):
        assert relative(teacher(x), want) < 1e-5


def test_statistics_are_the_networks_own_or_imagenets() -> None:
    """SigLIP expects 0.5, 0.5; the public code feeds it ImageNet's."""
    for statistics, (mean, deviation) in {"own": ((0.5,) * 3, (0.5,) * 3), "public": IMAGENET}.items():
        name = "vit_base_patch16_siglip_gap_224"
        teacher = Teacher.create(name, weights="random", image_size=224, precision="fp32", statistics=statistics)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = timm.create_model(name, num_classes=0)
        images = torch.randint(0, 256, (1, 3, 224, 224), dtype=torch.uint8)
        assert relative(teacher(images), wanted(model, images, mean, deviation)) < 2e-6
    cfg = timm.models.get_pretrained_cfg
    assert cfg(TEACHERS["dino"]).mean == IMAGENET[0]
    assert cfg(TEACHERS["clip"]).mean == cfg(TEACHERS["clip"]).std == (0.5, 0.5, 0.5)
    assert cfg(TEACHERS["clip_vit_l"]).mean == pytest.approx((0.48145466, 0.4578275, 0.40821073))


@pytest.mark.parametrize("name", TEACHERS)
def test_the_named_teachers_are_there_with_their_widths(name: str) -> None:
    teacher = Teacher.create(name, weights="random", image_size=32, precision="fp32")
    assert teacher.features == {"dino": 1024, "clip": 1152, "clip_vit_l": 1024}[name]
    assert teacher(IMAGES).shape == (2, 6, teacher.features)


# cosine of the features to fp64's, and error relative to their size: what two blocks of random numbers leave
@pytest.mark.parametrize(("precision", "cosine"), [("fp32", 0.999999), ("bf16", 0.9995), ("int8", 0.999)])
def test_low_precision_keeps_the_direction_of_every_feature(precision: str, cosine: float, tmp_path: Path) -> None:
    if precision == "int8" and (reason := _gemm.why_not_packed("int8", CPU)) is not None:
        pytest.skip(reason)
    model = lively(timm.create_model(SMALL, num_classes=0))
    path = stored(model, tmp_path / "tiny.pth")
    teacher = Teacher.create(SMALL, weights=path, image_size=224, precision=precision)
    images = torch.randint(0, 256, (2, 3, 224, 224), dtype=torch.uint8)
    want = wanted(model, images, model.pretrained_cfg["mean"], model.pretrained_cfg["std"])
    got = teacher(images)
    assert torch.cosine_similarity(got.double(), want, dim=-1).min() > cosine
    assert teacher.precision == precision
    assert torch.equal(teacher(images), got)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(teacher(images), got)


def test_nothing_of_it_trains_and_its_features_can_be_targets() -> None:
    """No gradient reaches the images through it, and what it returns may be saved for a backward."""
    teacher = Teacher.create(SMALL, weights="random", image_size=32)
    images = (IMAGES.float() / 127.5 - 1).requires_grad_()
    features = teacher(images)
    assert not features.requires_grad
    assert not teacher._model.training
    weight = torch.ones(teacher.features, requires_grad=True)
    torch.nn.functional.cosine_similarity(features.float() * weight, features.float(), dim=-1).sum().backward()
    assert weight.grad is not None
    assert not any(p.requires_grad for p in teacher._model.parameters())
    holder = torch.nn.Linear(2, 2)
    holder.teacher = teacher
    assert set(holder.state_dict()) == {"weight", "bias"}
    assert len(list(holder.parameters())) == 2
    with pytest.raises(TypeError, match="neither copied nor pickled"):
        copy.deepcopy(teacher)


@pytest.mark.skipif(_native.why_missing() is not None, reason="native library missing")
@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_weights_are_held_once(precision: str) -> None:
    if precision == "int8" and (reason := _gemm.why_not_packed("int8", CPU)) is not None:
        pytest.skip(reason)
    name = "vit_small_patch16_224"
    teacher = Teacher.create(name, weights="random", image_size=32, precision=precision)
    model = timm.create_model(name, num_classes=0)
    products = [m.weight for block in model.blocks for m in block.modules() if isinstance(m, torch.nn.Linear)]
    plain = sum(p.numel() for p in model.parameters()) - sum(w.numel() for w in products)
    size = {"fp32": 4, "int8": 1}[precision] * sum(w.numel() for w in products) + teacher.dtype.itemsize * plain
    assert size <= teacher.memory < 1.05 * size
    gc.collect()
    layers = [m for m in teacher._model.blocks.modules() if isinstance(m, torch.nn.Linear)]
    assert all(m.weight.numel() == 0 for m in layers)


@pytest.mark.skipif(_native.why_missing() is not None, reason="native library missing")
def test_parameters_come_back_where_the_packed_weights_do_not_suffice(monkeypatch: pytest.MonkeyPatch) -> None:
    """One more weight is taken for packed, which the network reads."""
    own, made = teachers._packed_below, teachers._random(SMALL, 16, 0)
    read = torch.nn.Linear(1, 1)
    read.weight = made.patch_embed.proj.weight
    with monkeypatch.context() as patched:
        patched.setattr(teachers, "_packed_below", lambda module, what: [*own(module, what), read])
        patched.setattr(teachers, "_random", lambda *a: made)
        teacher = Teacher.create(SMALL, weights="random", image_size=32, precision="fp32")
    assert made.patch_embed.proj.weight.shape == (192, 3, 16, 16)
    assert made.blocks[0].attn.qkv.weight.shape == (3 * 192, 192)
    usual = Teacher.create(SMALL, weights="random", image_size=32, precision="fp32")
    assert torch.equal(teacher(IMAGES), usual(IMAGES))


def test_a_compiled_caller_leaves_it_alone() -> None:
    teacher = Teacher.create(SMALL, weights="random", image_size=32)
    want = teacher(IMAGES).float() + 1
    compiled = torch.compile(lambda x: teacher(x).float() + 1, backend="eager")
    assert torch.equal(compiled(IMAGES), want)


def test_what_it_compiles_itself_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """On CUDA with compile=True; here its forward, by a backend that counts."""
    teacher = Teacher.create(SMALL, weights="random", image_size=32)
    want, graphs = teacher(IMAGES), []

    def count(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph

    model = timm.create_model(SMALL, num_classes=0, img_size=(32, 48)).eval()
    teacher._forward = torch.compile(model.forward_features, backend=count)
    assert teacher(IMAGES).shape == want.shape
    assert graphs


# ---- checkpoints ---------------------------------------------------------------------------------------------------


def test_openais_own_names_are_converted(tmp_path: Path) -> None:
    """OpenAI's CLIP as it is published, in fp16 or not: visual.conv1, visual.transformer.resblocks."""
    name = "vit_base_patch32_clip_quickgelu_224.openai"
    model = lively(timm.create_model(name, num_classes=0))
    names = {
        "patch_embed.proj": "conv1", "pos_embed": "positional_embedding", "blocks.": "transformer.resblocks.",
        "norm_pre": "ln_pre", "attn.qkv.": "attn.in_proj_", "attn.proj": "attn.out_proj", "mlp.fc1": "mlp.c_fc",
        "mlp.fc2": "mlp.c_proj", "cls_token": "class_embedding", ".norm1": ".ln_1", ".norm2": ".ln_2",
    }  # fmt: skip
    state = {}
    for key, value in model.state_dict().items():
        for ours, theirs in names.items():
            key = key.replace(ours, theirs)
        key = key.replace("norm.", "ln_post.") if key.startswith("norm.") else key
        state["visual." + key] = value.flatten() if key == "class_embedding" else value
    state["visual.positional_embedding"] = state["visual.positional_embedding"][0]
    state["visual.proj"] = torch.zeros(768, 512)
    state["logit_scale"] = torch.tensor(1.0)
    torch.save(state, tmp_path / "clip.pt")
    teacher = Teacher.create(name, weights=tmp_path / "clip.pt", image_size=32, precision="fp32")
    timms = Teacher.create(name, weights=stored(model, tmp_path / "timm.pth"), image_size=32, precision="fp32")
    assert torch.equal(teacher(IMAGES), timms(IMAGES))
    assert isinstance(teacher._model.blocks[0].mlp.act, timm.layers.QuickGELU)


def test_safetensors_are_read_and_the_file_decides_nothing_but_values(tmp_path: Path) -> None:
    save_file = pytest.importorskip("safetensors.torch").save_file
    model = lively(timm.create_model(SMALL, num_classes=10))
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    once = Teacher.create(SMALL, weights=tmp_path / "model.safetensors", image_size=32, precision="fp32")
    folder = Teacher.create(SMALL, weights=tmp_path, image_size=64, precision="fp32")
    torch.save({"state_dict": {k: v.half() for k, v in model.state_dict().items()}}, tmp_path / "half.pth")
    half = Teacher.create(SMALL, weights=tmp_path / "half.pth", image_size=32, precision="fp32")
    assert torch.equal(once(IMAGES), folder(IMAGES))
    assert half(IMAGES).dtype == torch.float32
    assert relative(half(IMAGES), once(IMAGES)) < 2e-3


def test_a_pickle_that_would_run_code_is_refused(tmp_path: Path) -> None:
    class Runs:
        def __reduce__(self) -> Any:
            return print, ("it ran",)

    torch.save({"patch_embed.proj.weight": Runs()}, tmp_path / "bad.pth")
    with pytest.raises(TeacherError, match="not loadable as weights only"):
        Teacher.create(SMALL, weights=tmp_path / "bad.pth", image_size=32)


def test_a_file_of_another_network_is_refused(tmp_path: Path) -> None:
    state = timm.create_model(SMALL, num_classes=0).state_dict()
    cases = {
        "tensors are missing, blocks.1.norm1.weight is one": {
            k: v for k, v in state.items() if "blocks.1.norm1" not in k
        },
        "it has blocks.2.norm1.weight beyond them": {**state, "blocks.2.norm1.weight": torch.zeros(192)},
        "size mismatch for blocks.0.norm1.weight": {**state, "blocks.0.norm1.weight": torch.zeros(96)},
        "expected tensors by name, got list": [1],
    }
    for sentence, content in cases.items():
        torch.save(content, tmp_path / "other.pth")
        with pytest.raises(TeacherError, match=sentence) as caught:
            Teacher.create(SMALL, weights=tmp_path / "other.pth", image_size=32)
        assert "other.pth" in str(caught.value)
        assert "\n" not in str(caught.value)


def test_a_hub_that_does_not_answer_is_asked_once_and_the_way_out_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def silent(source: str) -> Any:
        asked.append(source)
        raise CheckpointError("no answer")

    monkeypatch.setattr(teachers, "locate", silent)
    started = time.perf_counter()
    with pytest.raises(TeacherError) as caught:
        Teacher.create("dino", weights="hub", image_size=256)
    assert time.perf_counter() - started < 5
    assert asked == ["timm/vit_large_patch14_dinov2.lvd142m"]
    for word in ("teacher dino", asked[0], "weights=/path/to/file"):
        assert word in str(caught.value)


REFUSED = {
    "image_size must be a multiple of 16, got 250": {"image_size": 250},
    "statistics 'theirs' is not one of own, public": {"statistics": "theirs"},
    "precision 'fp8' is not one of auto, fp32, bf16, int8": {"precision": "fp8"},
    "precision int8 is for a CPU": {"precision": "int8", "device": "cuda"},
    "compile is for CUDA, the device is cpu": {"compile": True},
    "no such file, and neither 'hub' nor 'random'": {"weights": "/nowhere/model.safetensors"},
    "did you mean vit_tiny_patch16_224": {"name": "vit_tiny_patch16_22"},
    "timm's resnet18 is no ViT whose patch and image size can be chosen": {"name": "resnet18"},
}


@pytest.mark.parametrize("sentence", REFUSED)
def test_what_cannot_be_is_refused_in_a_sentence(sentence: str) -> None:
    given: dict[str, Any] = {"name": SMALL, "weights": "random", "image_size": 32, **REFUSED[sentence]}
    with pytest.raises(TeacherError, match=sentence) as caught:
        Teacher.create(given.pop("name"), **given)
    assert "\n" not in str(caught.value)


def test_images_that_do_not_fit_are_refused() -> None:
    teacher = Teacher.create(SMALL, weights="random", image_size=32)
    with pytest.raises(ValueError, match="sides divisible by its patch of 16 pixels, got 40 x 32"):
        teacher(torch.zeros(1, 3, 40, 32, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"images: expected shape \(B, 3, H, W\)"):
        teacher(torch.zeros(1, 1, 32, 32))
    with pytest.raises(TypeError, match="expected uint8, or floating point"):
        teacher(torch.zeros(1, 3, 32, 32, dtype=torch.int64))
