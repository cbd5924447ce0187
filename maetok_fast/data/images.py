# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""Image files to tensors with PIL alone (no torchvision), the way evaluation reads them.

    file -> PIL decode -> EXIF orientation -> RGB -> bicubic resize of the shorter side -> centre crop -> [-1, 1]

PIL's bicubic resize filters when it shrinks, so the result does not alias; the same file gives the same pixels on
every machine. Only the crop's part of the resized image is computed. Pixels whose range the file does not say (floats,
32-bit integers) are refused. `bundled_photographs` finds the natural photographs inside installed wheels: no download,
no import of the packages.

crop="adm" is the preprocessing of ADM, which REPA, RAE and others use: the image as stored (no EXIF orientation) is
halved by box filters while its shorter side is at least twice the resolution, then resized and cropped as above. A
cache of latents or an rFID is comparable only with the same crop. crop="none" takes images that have the resolution
already, their pixels as they are (EXIF orientation applied), and refuses others: what somebody else has prepared.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import math
import operator
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from PIL.Image import Image as PILImage

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif")
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF")  # the decoders that may run, whatever a file's suffix says
CROPS = ("center", "adm", "none")
ORIENTATION = 0x0112  # EXIF tag
MAX_PIXELS = 178_956_970  # where PIL itself stops, unless a program has switched its limit off
MAX_ASPECT_RATIO = 100  # beyond it the crop keeps less than 1 % of the picture

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


def load_image(
    path: str | Path, resolution: int, *, crop: str = "center", orient: bool | None = None, content: bytes | None = None
) -> Tensor:
    """One image as (3, resolution, resolution) fp32 in [-1, 1]. content: the file's bytes, where `path` only names it.

    crop: "center", "adm" or "none", see above. orient: apply the EXIF orientation; None: yes, but not for "adm".
    Raises ImageError naming a file that it cannot read: missing, damaged, none of FORMATS, more than MAX_PIXELS, longer
    than MAX_ASPECT_RATIO times its width (or the reverse), or of a pixel type without a stated range.
    """
    if crop not in CROPS:
        raise ValueError(f"unknown crop {crop!r}: expected one of {', '.join(CROPS)}")
    try:
        resolution = operator.index(resolution)
    except TypeError:
        raise TypeError(f"resolution must be an integer number of pixels, got {resolution!r}") from None
    if resolution < 1:
        raise ValueError(f"resolution must be a positive number of pixels, got {resolution}")
    with reading(path):
        file = path if content is None else io.BytesIO(content)
        pixels = _read(file, resolution, crop, crop != "adm" if orient is None else orient)
    return torch.from_numpy(pixels).permute(2, 0, 1).to(torch.float32).div_(127.5).sub_(1)


def load_images(
    paths: Sequence[str | Path], resolution: int, *, crop: str = "center", orient: bool | None = None
) -> Tensor:
    """Images as one batch (B, 3, resolution, resolution) fp32 in [-1, 1]; see `load_image`."""
    if not paths:
        raise ImageError("no images to load")
    return torch.stack([load_image(path, resolution, crop=crop, orient=orient) for path in paths])


def to_uint8(images: Tensor) -> np.ndarray:
    """(B, 3, H, W) in [-1, 1], clamped and rounded, to (B, H, W, 3) uint8."""
    scaled = images.detach().to("cpu", torch.float32).add(1).mul(127.5).round().clamp(0, 255)
    return scaled.to(torch.uint8).permute(0, 2, 3, 1).contiguous().numpy()


def psnr(original: np.ndarray, result: np.ndarray) -> float:
    """Decibels of (H, W, 3) uint8; infinity where they are equal."""
    error = np.mean((original.astype(np.float64) - result) ** 2)
    return math.inf if error == 0 else 10 * math.log10(255**2 / error)


@contextlib.contextmanager
def reading(path: str | Path) -> Iterator[None]:
    """Whatever goes wrong inside with this file becomes an ImageError that names it."""
    try:
        yield
    except FileNotFoundError as error:
        raise ImageError(f"image {path} does not exist") from error
    except MemoryError as error:
        raise ImageError(f"cannot read image {path}: out of memory") from error
    except Exception as error:  # decoders raise OSError, SyntaxError, ValueError, struct.error... on damaged files
        raise ImageError(f"cannot read image {path}: {error}") from error


def opened(file: str | Path | io.BytesIO) -> PILImage:
    """An image of which the header alone was read: one of FORMATS, neither too large nor too long, or ImageError."""
    from PIL import Image, UnidentifiedImageError

    try:
        image = Image.open(file, formats=FORMATS)
    except UnidentifiedImageError:
        raise ImageError(f"its content is none of {', '.join(FORMATS)}") from None
    width, height = image.size
    problem = None
    if width * height > MAX_PIXELS:
        problem = f"{width} x {height} is more than {MAX_PIXELS} pixels"
    elif max(width, height) > MAX_ASPECT_RATIO * min(width, height):
        problem = f"{width} x {height} is longer than {MAX_ASPECT_RATIO} to 1"
    if problem is not None:
        image.close()
        raise ImageError(problem)
    return image


def decoded(image: PILImage, orient: bool = True) -> PILImage:
    """An opened image as RGB of 8 bits, the EXIF orientation applied where `orient` says so."""
    from PIL import ImageOps

    if not orient:
        image.getexif().pop(ORIENTATION, None)  # PIL turns a TIFF while it decodes it
    return _rgb(ImageOps.exif_transpose(image), image.format)


def _read(path: str | Path | io.BytesIO, resolution: int, crop: str, orient: bool) -> np.ndarray:
    """(resolution, resolution, 3) uint8."""
    from PIL import Image

    with opened(path) as source:
        image = decoded(source, orient)
    if crop == "none":
        if image.size != (resolution, resolution):
            raise ImageError(
                f"{image.width} x {image.height}, and without a crop only {resolution} x {resolution} will do"
            )
        return np.array(image)
    if crop == "adm":
        while min(image.size) >= 2 * resolution:
            image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    return np.array(_resized_centre(image, resolution))


def _resized_centre(image: PILImage, resolution: int) -> PILImage:
    """Bicubic resize of the shorter side to `resolution` and centre crop, of which only the crop is computed.

    Across first, then down, each rounded to 8 bits, as one call of PIL's resize did until version 13, which picks the
    order by the shapes: with its `box` alone photographs differ by up to 14 levels.
    """
    from PIL import Image

    bicubic = Image.Resampling.BICUBIC
    scale = resolution / min(image.size)
    (left, right), (top, bottom) = (
        _centre(side, max(resolution, round(side * scale)), resolution) for side in image.size
    )
    reach = math.ceil(2 * max(1.0, (bottom - top) / resolution)) + 1  # of the filter, in rows
    first, last = max(0, math.floor(top) - reach), min(image.height, math.ceil(bottom) + reach)
    rows = image.crop((0, first, image.width, last))
    rows = rows.resize((resolution, rows.height), bicubic, box=(left, 0, right, rows.height))
    return rows.resize((resolution, resolution), bicubic, box=(0, top - first, resolution, bottom - first))


def _centre(side: int, whole: int, kept: int) -> tuple[float, float]:
    """Where, in the `side` pixels of the image, the central `kept` of the `whole` pixels of its resized form lie."""
    start = (whole - kept) // 2
    return start * side / whole, min((start + kept) * side / whole, side)


def _rgb(image: PILImage, kind: str | None) -> PILImage:
    """Any PIL mode of 8 or 16 bits, out of a file of format `kind`, to RGB; 16-bit greys are scaled (PIL's convert
    would clip them), transparency goes onto white."""
    from PIL import Image, ImageChops

    # Older PIL reads 16-bit PNGs as "I"; other files mean 32 bits by it.
    if image.mode.startswith("I;16") or (image.mode == "I" and kind == "PNG"):
        grey = np.asarray(image).astype(np.float32) / 257
        return Image.fromarray(grey.round().clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        pixel = "32-bit integer" if image.mode == "I" else "floating-point"
        raise ImageError(f"{pixel} pixels have no stated range: save it with 8 or 16 bits a channel")
    if image.mode == "CMYK" and kind == "JPEG" and "adobe" not in image.info:
        image = ImageChops.invert(image)  # PIL inverts as Adobe's files need it, also where the marker is missing
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")
