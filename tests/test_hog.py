# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""hog beyond the suite of all ops: the definition from an independent formula, bins on the edges, borders, errors."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from maetok_fast.kernels import BackendError, _native, backend, hog, hog_ref
from maetok_fast.kernels._triton import why_no_triton

skimage_data = pytest.importorskip(
    "skimage.data", reason="scikit-image, which brings the photographs, is not installed"
)
BACKENDS = ("reference", "native", "triton")


def need(name: str) -> None:
    reason = {"native": _native.why_missing, "triton": lambda: why_no_triton("cpu")}.get(name, lambda: None)()
    if reason:
        pytest.skip(f"{name}: {reason}")


def photo(name: str, height: int, width: int, top: int = 60, left: int = 100) -> Tensor:
    """A crop of a photograph, (1, 3, height, width) uint8."""
    pixels = getattr(skimage_data, name)()[top : top + height, left : left + width]
    return torch.from_numpy(np.ascontiguousarray(pixels)).permute(2, 0, 1)[None].contiguous()


def sobel(image: Tensor) -> tuple[Tensor, Tensor]:
    """(gx, gy) in fp64 by F.conv2d, and by a depth-wise kernel, as the definition says it."""
    kernel = torch.tensor([[1.0, 0, -1], [2, 0, -2], [1, 0, -1]], dtype=torch.float64)
    padded = F.pad(image.double(), (1, 1, 1, 1), mode="reflect")
    gx, gy = (F.conv2d(padded, k.repeat(3, 1, 1, 1), groups=3) for k in (kernel[None], kernel.T[None]))
    return gx, gy


def window(height: int, width: int) -> Tensor:
    n = torch.arange(16, dtype=torch.float64) - 7.5
    gauss = torch.exp(-(n[:, None] ** 2 + n[None, :] ** 2) / (2 * 8**2))
    return (gauss / gauss.sum()).repeat(height // 16, width // 16)


def histograms(bins: Tensor, magnitude: Tensor) -> Tensor:
    """(B, 3, 9, H / 8, W / 8): the cells' sums, before the norm."""
    one_hot = F.one_hot(bins, 9).movedim(-1, 2) * magnitude.unsqueeze(2)
    return F.avg_pool2d(one_hot.flatten(0, 1), 8).unflatten(0, one_hot.shape[:2]) * 64


def as_tokens(cells: Tensor) -> Tensor:
    """(B, 3, 9, H / 8, W / 8) -> (B, tokens, 108), by the index of the definition, one at a time."""
    batch, _, _, rows, cols = cells.shape
    out = cells.new_empty(batch, rows // 2 * (cols // 2), 108)
    for c in range(3):
        for b in range(9):
            for dy in range(2):
                for dx in range(2):
                    out[:, :, ((c * 9 + b) * 2 + dy) * 2 + dx] = cells[:, c, b, dy::2, dx::2].flatten(1)
    return out


def from_tokens(features: Tensor, rows: int, cols: int) -> Tensor:
    """(B, tokens, 108) -> (B, 3, 9, rows of cells, columns of cells)."""
    split = features.view(features.shape[0], rows // 2, cols // 2, 3, 9, 2, 2)
    return split.permute(0, 3, 4, 1, 5, 2, 6).reshape(features.shape[0], 3, 9, rows, cols)


def naive(image: Tensor) -> Tensor:
    gx, gy = sobel(image)
    phase = torch.atan2(gx, gy) / math.pi * 9
    magnitude = torch.sqrt(gx**2 + gy**2) * window(*image.shape[-2:])
    cells = histograms(phase.floor().long() % 9, magnitude)
    return as_tokens(F.normalize(cells, p=2, dim=2, eps=1e-12))


def images() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {
        "astronaut": photo("astronaut", 64, 96),
        "coffee": photo("coffee", 48, 64, 150, 200),
        "random": torch.randint(0, 256, (2, 3, 32, 48), generator=generator, dtype=torch.uint8),
        "few levels": torch.randint(0, 3, (1, 3, 48, 32), generator=generator, dtype=torch.uint8),
        "flat and stripes": torch.tensor([0, 0, 255, 255], dtype=torch.uint8).repeat(1, 3, 16, 8),
    }


@pytest.mark.parametrize("name", BACKENDS)
def test_bytes_are_exact_everywhere(name: str) -> None:
    """uint8 gradients are integers: every bin is that of exact arithmetic, edges included."""
    need(name)
    for label, image in images().items():
        with backend(name):
            got = hog(image)
        assert got.dtype == torch.float32
        torch.testing.assert_close(got.double(), naive(image), rtol=0, atol=4e-7, msg=label)


def test_every_gradient_of_bytes_has_its_exact_bin() -> None:
    """All 2041 x 2041 gradients that three bytes by three can have, by the comparisons of the kernels."""
    g = np.arange(-1020, 1021, dtype=np.float32)
    gx, gy = np.meshgrid(g, g, indexing="ij")
    edges = [np.float32(1 / math.tan(k * math.pi / 9)) for k in range(1, 5)]
    X, Y = np.abs(gx), np.where(gx > 0, gy, np.where(gx < 0, -gy, np.abs(gy)))
    reached = sum((X * e >= Y).astype(int) for e in edges) + sum((-(X * e) >= Y).astype(int) for e in edges)
    exact = np.floor(np.arctan2(gx.astype(np.float64), gy) / np.pi * 9).astype(int) % 9
    assert list(zip(*np.nonzero(reached != exact))) == [(1020, 1020)]  # (0, 0): its magnitude is zero


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("name", BACKENDS)
def test_floats_differ_only_where_the_phase_lies_on_an_edge(name: str, dtype: torch.dtype) -> None:
    """Every pixel whose phase is safely inside a bin is in that bin, and the others in one of their two.

    A cell's nine sums are recovered from the normalised ones (their total does not depend on the bins) and must lie
    between the sums of the certain pixels and those with all uncertain ones added.
    """
    need(name)
    generator = torch.Generator().manual_seed(5)
    some = {k: (v.double() / 127.5 - 1).float() for k, v in images().items()}
    some["uniform"] = torch.rand(2, 3, 32, 32, generator=generator) * 2 - 1
    some["smooth"] = torch.linspace(-1, 1, 48).cos().outer(torch.linspace(0, 1, 32).exp()).repeat(1, 3, 1, 1)
    uncertain_pixels = 0
    for label, full in some.items():
        image = full.to(dtype)
        height, width = image.shape[-2:]
        gx, gy = sobel(image)
        length = torch.sqrt(gx**2 + gy**2)
        # Each of the 5 additions of a gradient rounds by half an ulp of a sum of at most 4 (pixels are in [-1, 1]), the
        # arctangent, the product with a cotangent and the factor 9 / pi by a few ulps of the phase.
        ulp = torch.finfo(torch.float32).eps
        phase = torch.atan2(gx, gy) / math.pi * 9
        margin = 9 / math.pi * 5 * 4 * ulp / 2 / length.clamp_min(1e-30) + 4 * ulp * phase.abs() + 4 * ulp
        lower, upper = (phase - margin).floor(), (phase + margin).floor()
        anywhere = upper - lower > 1  # gradients that are all rounding
        certain = lower == upper
        weighted = length * window(height, width)
        inside = histograms(lower.long() % 9, weighted * certain)
        either = histograms(lower.long() % 9, weighted * ~certain) + histograms(upper.long() % 9, weighted * ~certain)
        either = either + histograms(torch.zeros_like(lower).long(), weighted * anywhere).sum(2, keepdim=True)
        with backend(name):
            cells = from_tokens(hog(image).double(), height // 8, width // 8)
        total = histograms(torch.zeros_like(lower).long(), weighted)[:, :, :1]
        sums = cells * (total / cells.sum(2, keepdim=True).clamp_min(1e-30))
        slack = 4e-6 * total + 64 * 8 * ulp / 256
        assert ((sums >= inside - slack) & (sums <= inside + either + slack)).all(), label
        norms = torch.linalg.vector_norm(cells, dim=2)
        assert (((norms - 1).abs() < 1e-5) | (total[:, :, 0] < 1e-9)).all(), label
        uncertain_pixels += int((~certain & (length > 1e-3)).sum())
    if dtype == torch.float32:
        assert uncertain_pixels > 0  # photographs do have gradients that lie on an edge


def on_edges() -> Tensor:
    """(1, 3, 16, 16) whose gradients vanish in one or both directions with either sign of zero."""
    x = torch.zeros(1, 3, 16, 16)
    x[0, 0, :, 8:] = 1.0  # gy = 0
    x[0, 1, 8:] = 1.0  # gx = 0, gy < 0
    x[0, 2, :8] = -0.0  # nothing but signed zeros
    return x


@pytest.mark.parametrize("name", BACKENDS)
def test_vanishing_gradients(name: str) -> None:
    need(name)
    for image in (on_edges(), -on_edges(), on_edges().flip(2), on_edges().flip(3)):
        with backend(name):
            cells = from_tokens(hog(image), 2, 2)
        assert (cells[0, 0, 4].sum(), cells[0, 0].sum()) == (4.0, 4.0)  # gy = 0: phase +-4.5
        assert (cells[0, 1, 0].sum(), cells[0, 1].sum()) == (4.0, 4.0)  # gx = 0: phase 0 or +-9
        assert (cells[0, 2] == 0).all()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", BACKENDS)
def test_pixels_that_are_not_finite_spoil_their_cells_only(name: str, value: float) -> None:
    need(name)
    image = torch.rand(1, 3, 32, 32) * 2 - 1
    image[0, 1, 15, 11] = value  # touches cells (1, 1) and, below, (2, 1)
    image[0, 2, 0, 0] = value
    with backend(name):
        nan = from_tokens(hog(image), 4, 4).isnan()
    expected = torch.zeros(1, 3, 9, 4, 4, dtype=torch.bool)
    expected[0, 1, :, 1:3, 1] = True
    expected[0, 2, :, 0, 0] = True
    assert torch.equal(nan, expected)


@pytest.mark.parametrize("shape", [(3, 16, 528), (1, 272, 16)], ids=str)
def test_triton_over_several_blocks(shape: tuple[int, int, int]) -> None:
    need("triton")
    batch, height, width = shape
    image = torch.randint(0, 256, (batch, 3, height, width), dtype=torch.uint8)[:1]
    with backend("triton"):
        got = hog(image)
    torch.testing.assert_close(got.double(), naive(image), rtol=0, atol=4e-7)


@settings(deadline=None, max_examples=25)
@given(
    st.integers(0, 3), st.integers(1, 5), st.integers(1, 5), st.sampled_from([16, 32, 48]), st.integers(0, 2**31),
    st.integers(1, 3),
)  # fmt: skip
def test_native_agrees_with_the_reference(
    batch: int, rows: int, cols: int, patch: int, seed: int, threads: int
) -> None:
    need("native")
    generator = torch.Generator().manual_seed(seed)
    size = (batch, 3, rows * patch, cols * patch)
    image = torch.randint(0, 256, size, generator=generator, dtype=torch.uint8)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        got = hog(image, patch)
    finally:
        torch.set_num_threads(before)
    torch.testing.assert_close(got, hog_ref(image, patch), rtol=0, atol=6e-7)


@pytest.mark.parametrize(("patch", "cell"), [(8, 4), (14, 7), (12, 2)])
def test_other_patches_and_cells(patch: int, cell: int) -> None:
    """The reference takes any; the kernels say what they do not take, and Triton has the powers of two."""
    image = torch.randint(0, 256, (1, 3, 2 * patch, patch), dtype=torch.uint8)
    assert hog(image, patch, cell).shape == (1, 2, 27 * (patch // cell) ** 2)
    if _native.why_missing() is None:
        with backend("native"), pytest.raises(BackendError, match=rf"patch {patch}, cell {cell}: .* cell 8"):
            hog(image, patch, cell)
    if why_no_triton("cpu") is None:
        with backend("triton"):
            if cell == 7:
                with pytest.raises(BackendError, match=r"cell 7: .* power of two"):
                    hog(image, patch, cell)
            else:
                torch.testing.assert_close(hog(image, patch, cell), hog_ref(image, patch, cell), rtol=0, atol=6e-7)


def test_a_batch_beyond_the_grid_is_known_before_the_launch() -> None:
    for batch, fits in ((21845, True), (21846, False)):
        args = hog.arguments(torch.empty(batch, 3, 16, 16, dtype=torch.uint8, device="meta"))
        assert (hog.unsupported("triton", args) is None) == fits


def test_it_is_a_target_in_fp32() -> None:
    image = torch.rand(1, 3, 32, 32, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = hog(image)
    assert out.dtype == torch.float32
    assert not out.requires_grad
    assert torch.equal(out, hog(image))
    assert hog(image.double()).dtype == torch.float64
    torch.testing.assert_close(hog(image.detach().double()), naive(image.detach()), rtol=0, atol=1e-12)


def test_errors_in_words() -> None:
    with pytest.raises(ValueError, match=r"must be \(B, 3, H, W\), got \(1, 1, 16, 16\)"):
        hog(torch.zeros(1, 1, 16, 16))
    with pytest.raises(ValueError, match="divisible by the patch of 16 pixels, got 16 x 24; crop or resize it"):
        hog(torch.zeros(1, 3, 16, 24))
    for size in ((0, 16), (16, 0), (0, 0)):
        with pytest.raises(
            ValueError, match=f"hog: image must have sides that are positive .* got {size[0]} x {size[1]}"
        ):
            hog(torch.zeros(1, 3, *size))
    for patch in (0, -1):
        with pytest.raises(ValueError, match=f"hog: patch must be positive, got {patch}"):
            hog(torch.zeros(1, 3, 16, 16), patch)
    for cell in (0, -1, 1):
        with pytest.raises(ValueError, match=f"cell must be at least 2 and divide the patch of 16 pixels, got {cell}"):
            hog(torch.zeros(1, 3, 16, 16), cell=cell)
    with pytest.raises(ValueError, match="cell must be at least 2 and divide the patch of 16 pixels, got 6"):
        hog(torch.zeros(1, 3, 16, 16), cell=6)
    with pytest.raises(TypeError, match=r"expects image in uint8 or float32 or .*got torch.int64"):
        hog(torch.zeros(1, 3, 16, 16, dtype=torch.int64))
    need("native")
    library, out = _native.lib(), torch.empty(1, 1, 108)
    with pytest.raises(ValueError, match="patch must be a multiple of 16 pixels; got 8"):
        library.hog(torch.zeros(1, 3, 16, 16), out, 8, 1e-12)
    with pytest.raises(ValueError, match="out must have shape"):
        library.hog(torch.zeros(1, 3, 16, 32), out, 16, 1e-12)
    with pytest.raises(TypeError, match="image must be float32"):
        library.hog(torch.zeros(1, 3, 16, 16, dtype=torch.int32), out, 16, 1e-12)
