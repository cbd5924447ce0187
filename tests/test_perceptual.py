# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""LPIPS against the lpips package and against plain torch; its weights' files."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maetok_fast.models.checkpoints import CheckpointError
from maetok_fast.models.perceptual import LPIPS

pytestmark = pytest.mark.usefixtures("one_thread")
CONVS = (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)  # torchvision's places
TAPS = (2, 7, 14, 21, 28)


@pytest.fixture(scope="module")
def model() -> LPIPS:
    torch.manual_seed(0)
    model = LPIPS("random", "random")
    for p in model.vgg.parameters():
        if p.ndim == 1:
            nn.init.normal_(p, std=0.1)  # biases that show
    return model


def plain(state: dict[str, Tensor], x: Tensor) -> list[Tensor]:
    shift, scale = (torch.tensor(v).view(3, 1, 1).to(x) for v in ((-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)))
    x, found = (x - shift) / scale, []
    for n in CONVS:
        if n - 1 in {4, 9, 16, 23}:
            x = F.max_pool2d(x, 2)
        x = F.conv2d(x, state[f"vgg.features.{n}.weight"], state[f"vgg.features.{n}.bias"], padding=1).relu()
        found += [x] if n in TAPS else []
    return found


def plain_distance(state: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
    total: Any = 0
    for i, (f, g) in enumerate(zip(plain(state, x), plain(state, y), strict=True)):
        f, g = (t / (t.square().sum(1, keepdim=True).sqrt() + 1e-10) for t in (f, g))
        total = total + F.conv2d((f - g).square(), state[f"tail.lin{i}.model.1.weight"]).mean((1, 2, 3))
    return total


def images(*shape: int) -> tuple[Tensor, Tensor]:
    return torch.rand(*shape) * 2 - 1, torch.rand(*shape) * 2 - 1


@pytest.mark.parametrize("size", [(32, 32), (33, 50)])
def test_the_distance_is_its_formula(model: LPIPS, size: tuple[int, int]) -> None:
    x, y = images(2, 3, *size)
    x.requires_grad_()
    wide = x.detach().double().requires_grad_()
    state = {k: v.double() for k, v in model.state_dict().items()}
    expected = plain_distance(state, wide, y.double())
    result = model(x, y)
    assert result.shape == (2,)
    torch.testing.assert_close(result, expected.float(), atol=1e-6, rtol=1e-4)
    result.sum().backward()
    expected.sum().backward()
    assert x.grad is not None
    assert wide.grad is not None
    # a ReLU or a pooling may turn at its edge
    assert float((x.grad - wide.grad).norm()) < 2e-2 * float(wide.grad.norm())
    for f, g in zip(model.features(x), plain(state, wide), strict=True):
        torch.testing.assert_close(f, g.float(), atol=1e-4, rtol=1e-4)


def test_the_distance_is_the_lpips_packages() -> None:
    lpips = pytest.importorskip("lpips")
    pytest.importorskip("torchvision")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the package calls torchvision in a deprecated way
        package = lpips.LPIPS(net="vgg", pnet_rand=True, verbose=False)
    ours = LPIPS("random")  # its heads are the package's
    names = {f"features.{n}.{kind}": (n, kind) for n in CONVS for kind in ("weight", "bias")}
    theirs = dict(package.net.named_parameters())
    where = {n: f"slice{next(i for i, tap in enumerate(TAPS) if n <= tap) + 1}.{n}" for n in CONVS}
    ours.vgg.load_state_dict({key: theirs[f"{where[n]}.{kind}"] for key, (n, kind) in names.items()})
    x, y = images(3, 3, 48, 32)
    torch.testing.assert_close(ours(x, y), package(x, y).flatten(), atol=1e-6, rtol=1e-4)
    heads = ours.tail.state_dict()
    assert all(torch.equal(heads[f"lin{i}.model.1.weight"], package.lins[i].model[1].weight) for i in range(5))
    # gradients in fp64: in fp32 a ReLU or a pooling turns at its edge, in one of the two or the other
    ours, package, x, y = ours.double(), package.double(), x.double(), y.double()
    a, b = (x.clone().requires_grad_() for _ in range(2))
    result, expected = ours(a, y), package(b, y).flatten()
    torch.testing.assert_close(result, expected)
    result.sum().backward()
    expected.sum().backward()
    assert b.grad is not None
    torch.testing.assert_close(a.grad, b.grad, atol=1e-8 * float(b.grad.abs().max()), rtol=1e-7)


def test_a_targets_features_need_no_gradient(model: LPIPS) -> None:
    x, y = images(2, 3, 32, 32)
    x.requires_grad_()
    with torch.no_grad():
        wanted = model.features(y)
    assert not any(f.requires_grad for f in wanted)
    distance = model.distance(model.features(x), wanted)
    torch.testing.assert_close(distance, model(x, y))
    distance.sum().backward()
    assert x.grad is not None
    assert torch.equal(model(y, y), torch.zeros(2))


def test_it_is_frozen_in_any_mode(model: LPIPS) -> None:
    assert not any(p.requires_grad for p in model.parameters())
    x, y = images(1, 3, 16, 16)
    before = model(x, y)
    holder = nn.ModuleList([model]).train()
    assert holder.training
    assert not any(m.training for m in model.modules())
    assert torch.equal(model(x, y), before)
    assert all(f.is_contiguous(memory_format=torch.channels_last) for f in model.features(x)[:2])


def test_autocast_rounds_features_and_not_the_distance(model: LPIPS) -> None:
    x, y = images(2, 3, 32, 32)
    with torch.autocast("cpu", torch.bfloat16):
        distance = model(x, y)
        assert model.features(x)[0].dtype == torch.bfloat16
    assert distance.dtype == torch.float32
    torch.testing.assert_close(distance, model(x, y), rtol=0.05, atol=0)


@pytest.mark.parametrize("ending", [".pth", ".safetensors"])
def test_weights_are_read_from_files(tmp_path: Path, model: LPIPS, ending: str) -> None:
    """torchvision's, with its classifier, and the lpips package's heads, there twice."""
    vgg = dict(model.vgg.state_dict()) | {"classifier.0.weight": torch.ones(2, 2)}
    heads = dict(model.tail.state_dict()) | {"lins.0.model.1.weight": torch.ones(1, 64, 1, 1)}
    files = []
    for name, state in (("vgg16", vgg), ("heads", heads)):
        files.append(tmp_path / f"{name}{ending}")
        if ending == ".pth":
            torch.save(state, files[-1])
        else:
            from safetensors.torch import save_file

            save_file({k: v.contiguous() for k, v in state.items()}, files[-1])
    again = LPIPS(*files)
    x, y = images(1, 3, 32, 32)
    assert torch.equal(again(x, y), model(x, y))


def test_the_hubs_file_is_taken_from_torchs_cache(
    tmp_path: Path, model: LPIPS, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    fetched, heads = [], tmp_path / "heads.pth"  # the lpips package may be missing
    torch.save(model.tail.state_dict(), heads)

    def fetch(url: str, path: str, **options: Any) -> None:
        fetched.append(url)
        torch.save(model.vgg.state_dict(), path)

    monkeypatch.setattr(torch.hub, "download_url_to_file", fetch)
    for _ in range(2):
        found = LPIPS("hub", heads).vgg.state_dict()
        assert all(torch.equal(v, found[k]) for k, v in model.vgg.state_dict().items())
    assert fetched == ["https://download.pytorch.org/models/vgg16-397923af.pth"]


def test_what_is_missing_is_said_with_the_way_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))

    def offline(url: str, path: str, **options: Any) -> None:
        raise OSError("no network")

    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    with pytest.raises(CheckpointError, match=r"\(no network\); download https://\S+ and give vgg=/path/to/vgg16-"):
        LPIPS()
    with pytest.raises(CheckpointError, match=r"vgg .*none\.pth: no such file"):
        LPIPS(tmp_path / "none.pth")
    with pytest.raises(CheckpointError, match=r"heads .*none\.pth: no such file.*pip install lpips"):
        LPIPS("random", tmp_path / "none.pth")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(CheckpointError, match="pip install lpips"):
        LPIPS("random")


def test_files_of_something_else_are_refused(tmp_path: Path, model: LPIPS) -> None:
    path = tmp_path / "other.pth"
    torch.save({"features.0.weight": torch.ones(64, 3, 3, 3)}, path)
    with pytest.raises(CheckpointError, match=r"not torchvision's vgg16: it has no features\.0\.bias"):
        LPIPS(path)
    torch.save({"lin0.model.1.weight": torch.ones(1, 32, 1, 1)}, path)
    with pytest.raises(CheckpointError, match=r"it has lin0\.model\.1\.weight of shape \(1, 32, 1, 1\)"):
        LPIPS("random", path)
    torch.save([1, 2], path)
    with pytest.raises(CheckpointError, match="not torchvision's vgg16"):
        LPIPS(path)
    torch.save(dict(model.vgg.state_dict()), path)
    with pytest.raises(ValueError, match="heads='random' is for vgg='random' alone"):
        LPIPS(path, "random")


def test_images_that_cannot_be_compared_are_refused(model: LPIPS) -> None:
    with pytest.raises(ValueError, match="at least 16 x 16 pixels, got 8 x 32"):
        model.features(torch.rand(1, 3, 8, 32))
    with pytest.raises(TypeError, match=r"got torch\.uint8"):
        model.features(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"\(B, 3, H, W\)"):
        model.features(torch.rand(1, 1, 32, 32))
