# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""Image files to tensors with PIL alone (no torchvision), the way evaluation reads them.

    file -> PIL decode -> EXIF orientation -> RGB -> bicubic resize of the shorter side -> centre crop -> [-1, 1]

PIL's bicubic resize filters when it shrinks, so the result does not alias; the same file gives the same pixels on
every machine. `bundled_photographs` finds the natural photographs inside installed wheels: no download, no import
of the packages.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif")

# Natural photographs that the wheels themselves carry (scikit-image keeps its larger ones on a server).
_BUNDLED = {
    "sklearn": ("datasets/images", ("china.jpg", "flower.jpg")),
    "skimage": ("data", ("astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg", "motorcycle_left.png")),
}


class ImageError(ValueError):
    """An image file that is missing or cannot be read; the message names it."""


def find_images(folder: str | Path) -> list[Path]:
    """All image files under a folder, sorted by path."""
    folder = Path(folder)
    if not folder.is_dir():
        raise ImageError(f"image folder {folder} does not exist or is not a folder")
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.suffix.lower() in SUFFIXES)
    if not files:
        raise ImageError(f"no images in {folder}: expected files ending in {', '.join(SUFFIXES)}")
    return files


def bundled_photographs() -> list[Path]:
    """Photographs that ship inside the installed scikit-learn and scikit-image wheels; at least one, or an error."""
    files = []
    for package, (folder, names) in _BUNDLED.items():
        spec = importlib.util.find_spec(package)
        for location in (spec.submodule_search_locations or ()) if spec else ():
            files += [path for name in names if (path := Path(location) / folder / name).is_file()]
    if not files:
        raise ImageError(
            "no photographs found in the scikit-image and scikit-learn wheels: pip install 'maetok_fast[bench]', "
            "or give a folder of your own images"
        )
    return files


def load_image(path: str | Path, resolution: int) -> Tensor:
    """One image as (3, resolution, resolution) fp32 in [-1, 1]. Raises ImageError naming a file it cannot read."""
    from PIL import Image, ImageOps

    if resolution < 1:
        raise ValueError(f"resolution must be a positive number of pixels, got {resolution}")
    try:
        with Image.open(path) as opened:
            image = _rgb(ImageOps.exif_transpose(opened))
    except FileNotFoundError as error:
        raise ImageError(f"image {path} does not exist") from error
    except Exception as error:  # decoders raise OSError, SyntaxError, ValueError, struct.error... on damaged files
        raise ImageError(f"cannot read image {path}: {error}") from error
    scale = resolution / min(image.size)
    width, height = (max(resolution, round(side * scale)) for side in image.size)
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - resolution) // 2, (height - resolution) // 2
    pixels = np.array(image.crop((left, top, left + resolution, top + resolution)))
    return torch.from_numpy(pixels).permute(2, 0, 1).to(torch.float32).div_(127.5).sub_(1)


def load_images(paths: Sequence[str | Path], resolution: int) -> Tensor:
    """Images as one batch (B, 3, resolution, resolution) fp32 in [-1, 1]."""
    if not paths:
        raise ImageError("no images to load")
    return torch.stack([load_image(path, resolution) for path in paths])


def to_uint8(images: Tensor) -> np.ndarray:
    """(B, 3, H, W) in [-1, 1], clamped and rounded, to (B, H, W, 3) uint8."""
    scaled = images.detach().to("cpu", torch.float32).add(1).mul(127.5).round().clamp(0, 255)
    return scaled.to(torch.uint8).permute(0, 2, 3, 1).contiguous().numpy()


def _rgb(image):  # type: ignore[no-untyped-def]
    """Any PIL mode to RGB; 16-bit greys are scaled (PIL's convert would clip them), transparency goes onto white."""
    from PIL import Image

    if image.mode.startswith("I;16") or image.mode == "I":
        grey = np.asarray(image).astype(np.float32) / 257
        return Image.fromarray(grey.round().clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")
