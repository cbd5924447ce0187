# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""How far reconstructions lie from their originals, image by image: PSNR, SSIM, MS-SSIM, LPIPS.

    originals ─┐ in pairs, by name or by order            ┌─ OUT/per_image.csv       every pair
    results ───┴─ batches of bytes (B, 3, H, W) ─ metrics ┼─ OUT/worst.png           original, result, their difference
                                                          └─ OUT/reconstruction.json means with standard errors, and
                                                                                     how each was computed

All compare 8-bit pixels in [0, 255], as files show them, and state so, because the numbers depend on it:

- PSNR = 10 log10(255^2 / mse) of each image, then the mean; beside it the PSNR of the mean error, another number.
- SSIM (Wang et al. 2004): a Gaussian window of 11 x 11, sigma 1.5, on each channel, averaged over the windows that lie
  inside of the image. What averages over padded borders too (torchmetrics 1.9) differs by 0.01 at 256 px. What says
  data_range=2 for pixels in [0, 1], as the public script, gets a higher number (0.59 where 0.48 is right).
- MS-SSIM (Wang et al. 2003): torchmetrics' five scales, and its treatment of borders.
- LPIPS (arXiv 1801.03924, version 0.1, VGG16): `models.perceptual.LPIPS`. Never of weights that nobody gave.

What cannot be measured has a reason in the place of its number. Memory is flat but for a few numbers a pair.
"""

from __future__ import annotations

import csv
import heapq
import math
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from maetok_fast.checks import check_positive
from maetok_fast.data.images import SUFFIXES
from maetok_fast.models import CheckpointError
from maetok_fast.pipeline.pipeline import weights_fingerprint
from maetok_fast.pipeline.run import RunError, make_folder, save_png, write_grid, write_json, written

__all__ = ["HIGHEST_DB", "Images", "Pairs", "measure_reconstructions", "pair", "peak_signal_to_noise", "similarity"]

DATA_RANGE = 255
HIGHEST_DB = 148.0  # an equal pair's part in a mean, as in a run's validation: infinity would be the mean
WINDOW, SIGMA = 11, 1.5
LEAST_MULTISCALE = 176  # pixels: torchmetrics asks for more than 10 of a 16th; its message says "larger than 160"
LEAST_LPIPS = 16
_OVERVIEW = "compare.png"
WORST, SIDE, GAP, MAGNIFIED = 8, 256, 4, 4  # of worst.png: pairs, pixels of an image, between two; of the difference
_COLUMNS = ("psnr", "ssim", "ms_ssim", "lpips")
_DIGITS = {"psnr": "PSNR {:.2f} dB", "ssim": "SSIM {:.3f}", "lpips": "LPIPS {:.3f}"}
Tick = Callable[[int], None]


class Images(Protocol):
    """A set of images, as `maetok_fast.evaluation.sets.ImageSet`. names: of the files, None where there are none."""

    @property
    def names(self) -> Sequence[str] | None: ...
    def __len__(self) -> int: ...
    def batches(self, start: int, stop: int, batch: int) -> Iterable[Tensor]:
        """uint8 (B, 3, H, W) of start .. stop - 1."""
        ...


class Pairs(NamedTuple):
    """Original i belongs to result places[i]. how: "by name" or "by order", and why; names: of the pairs, or None."""

    places: list[int]
    how: str
    names: list[str] | None


def measure_reconstructions(
    originals: Images,
    results: Images,
    out: Path,
    *,
    weights: dict[str, str] | None = None,
    device: torch.device | str = "cpu",
    batch: int = 32,
    tick: Tick = lambda n: None,
) -> dict[str, Any]:
    """Measures every pair; writes per_image.csv, worst.png and reconstruction.json into `out`, and returns the last.

    weights: {"lpips": VGG16's weights: "hub" (the default), a file, or "random"; "lpips_heads": a file of LPIPS' heads,
    else the lpips package's}. batch: pairs at a time, which changes no number by more than rounding. tick(n): n pairs
    are done. RunError where the sets are no pairs, CheckpointError where a file of weights is none.
    """
    check_positive("measure_reconstructions", batch=batch)
    pairs = pair(originals, results)
    make_folder(out)
    lpips, about_lpips = _lpips(weights or {}, torch.device(device))
    found: dict[str, list[Tensor]] = {name: [] for name in _COLUMNS}
    errors: list[Tensor] = []
    reasons: dict[str, str] = {}
    size = (0, 0)
    worst: list[tuple[float, int, np.ndarray, np.ndarray]] = []
    done = 0
    with torch.no_grad():
        for pixels, others in _in_pairs(originals, results, pairs, batch):
            _check_sizes(pixels, others, pairs, done)
            size = (pixels.shape[2], pixels.shape[3])
            x, y = pixels.to(device), others.to(device)
            values, reasons = _measured(x, y, lpips, about_lpips)
            errors.append(_squared_error(x, y).cpu())
            for name, value in values.items():
                found[name].append(value.cpu().double())
            badness = values["lpips"] if "lpips" in values else -values["psnr"]
            for k, bad in enumerate(badness.tolist()):
                if len(worst) < WORST or bad > worst[0][0]:
                    if len(worst) == WORST:
                        heapq.heappop(worst)
                    heapq.heappush(worst, (bad, done + k, pixels[k].numpy().copy(), others[k].numpy().copy()))
            done += len(pixels)
            tick(len(pixels))
    columns = {name: torch.cat(parts).numpy() for name, parts in found.items() if parts}
    labels = pairs.names or [f"{i:06d}" for i in range(done)]
    worst.sort(key=lambda item: (-item[0], item[1]))
    result: dict[str, Any] = {
        "images": done,
        "size": list(size),
        "pairs": pairs.how,
        "treatment": {"originals": _treatment(originals), "results": _treatment(results)},
        "data_range": DATA_RANGE,
        "pixels": "8-bit RGB in [0, 255]",
        "psnr": _psnr_result(columns["psnr"], torch.cat(errors)),
        "ssim": _result(columns, reasons, "ssim", _how_ssim()),
        "ms_ssim": _result(columns, reasons, "ms_ssim", _how_ms_ssim()),
        "lpips": _result(columns, reasons, "lpips", about_lpips),
        "worst_by": "lpips" if "lpips" in columns else "psnr",
        "worst": [{"image": labels[i]} | {n: _number(v[i]) for n, v in columns.items()} for _, i, _, _ in worst],
        "traps": _traps(done, about_lpips, pairs.how),
    }
    written(out / "per_image.csv", lambda p: _table(p, labels, columns))
    _picture(out / "worst.png", worst, labels, columns)
    write_json(out / "reconstruction.json", result)
    return result


# ---- pairs ---------------------------------------------------------------------------------------------------------


def pair(originals: Images, results: Images) -> Pairs:
    """By name where the stems of both sets are the same, whatever the order, the suffixes ("a.jpg" and "a.png",
    "a.jpg.png") and, where file names are unique, the folders; by order where they have no name in common. One result
    too many that is called compare.png, as `maetok-fast reconstruct` calls its overview, is left out. RunError where
    only some match, or the counts differ."""
    names, others = (None if s.names is None else list(s.names) for s in (originals, results))
    count, kept = len(originals), list(range(len(results)))
    if others is not None and len(others) == count + 1 and _OVERVIEW in others:
        kept.remove(others.index(_OVERVIEW))
    if len(kept) != count:
        raise RunError(f"{count} originals and {len(kept)} results are no pairs: give a result for each original")
    if not count:
        raise RunError("there are no images to compare")
    if names is None or others is None:
        shown = names if others is None else [others[i] for i in kept]
        return Pairs(kept, "by order: one of the sets has no names", shown)
    stems = [_stem(name) for name in names]
    places = {_stem(others[i]): i for i in kept}
    for which, different in (("originals", len(set(stems))), ("results", len(places))):
        if different != count:
            return Pairs(kept, f"by order: two of the {which} have one name but for the suffix", names)
    lonely = [name for name, stem in zip(names, stems) if stem not in places]
    if not lonely:
        return Pairs([places[stem] for stem in stems], "by name", names)
    # one of the sets lies in class folders and the other does not
    bare = {PurePosixPath(stem).name: i for stem, i in places.items()}
    own = [PurePosixPath(stem).name for stem in stems]
    if len(bare) == count and set(own) == set(bare):
        return Pairs([bare[name] for name in own], "by name, without folders", names)
    if len(lonely) == count:
        return Pairs(kept, f"by order: no name is in both sets ({names[0]}, {others[kept[0]]})", names)
    raise RunError(
        f"{len(lonely)} of {count} originals have no result of their name, such as {lonely[0]}; name the results as "
        "the originals, or give sets without a name in common, which are paired by order"
    )


def _stem(name: str) -> str:
    """Without an image's suffixes: `maetok-fast reconstruct` calls the result of a.jpg a.jpg.png."""
    while (suffix := PurePosixPath(name).suffix) and suffix.lower() in SUFFIXES:
        name = name[: -len(suffix)]
    return name


def _in_pairs(originals: Images, results: Images, pairs: Pairs, batch: int) -> Iterator[tuple[Tensor, Tensor]]:
    count = len(originals)
    straight = iter(results.batches(0, count, batch)) if pairs.places == list(range(count)) else None
    start = 0
    for pixels in originals.batches(0, count, batch):
        stop = start + len(pixels)
        others = next(straight) if straight is not None else _picked(results, pairs.places[start:stop], batch)
        if len(others) != len(pixels):
            raise RunError(f"images {start} .. {stop - 1}: {len(pixels)} originals and {len(others)} results were read")
        yield pixels, others
        start = stop


def _picked(images: Images, places: list[int], batch: int) -> Tensor:
    """Those of these places, neighbours in one read."""
    parts: list[Tensor] = []
    first = 0
    for k in range(1, len(places) + 1):
        if k == len(places) or places[k] != places[k - 1] + 1:
            parts += images.batches(places[first], places[k - 1] + 1, batch)
            first = k
    return torch.cat(parts)


def _check_sizes(pixels: Tensor, others: Tensor, pairs: Pairs, done: int) -> None:
    if pixels.shape != others.shape:
        name = f"image {done}" if pairs.names is None else pairs.names[done]
        raise RunError(
            f"{name}: the original is {pixels.shape[2]} x {pixels.shape[3]} and the result {others.shape[2]} x "
            f"{others.shape[3]}: bring both to one size (size=...), since nobody says which filter would be right"
        )


# ---- metrics -------------------------------------------------------------------------------------------------------


def _squared_error(x: Tensor, y: Tensor) -> Tensor:
    """(B,) fp64, the mean over an image's values; exact, since the sum is of integers."""
    difference = x.to(torch.int32) - y.to(torch.int32)
    return difference.square().flatten(1).sum(1, dtype=torch.int64).double() / x[0].numel()


def peak_signal_to_noise(x: Tensor, y: Tensor) -> Tensor:
    """Decibels (B,) fp64 of two batches of bytes (B, 3, H, W); infinity for an equal pair."""
    return 10 * torch.log10(DATA_RANGE**2 / _squared_error(x, y))


def similarity(x: Tensor, y: Tensor) -> Tensor:
    """SSIM (B,) of two batches of bytes (B, 3, H, W) from 11 px on, computed in fp32: 3e-5 from fp64 at most. Needs
    torchmetrics."""
    from torchmetrics.functional.image import structural_similarity_index_measure

    # the map of all places; what its borders show depends on a padding that the paper does not have
    _, whole = structural_similarity_index_measure(
        y.float(), x.float(), sigma=SIGMA, kernel_size=WINDOW, data_range=float(DATA_RANGE), reduction="none",
        return_full_image=True,
    )  # fmt: skip
    edge = WINDOW // 2
    inside: Tensor = whole[..., edge:-edge, edge:-edge]
    return inside.flatten(1).mean(1, dtype=torch.float64)


def _measured(x: Tensor, y: Tensor, lpips: Any, about_lpips: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Values (B,) by metric; reasons of those that are not there."""
    values, reasons = {"psnr": peak_signal_to_noise(x, y)}, {}
    least = min(x.shape[2:])
    lacking = _lacking_torchmetrics()
    for name, smallest, measure in (("ssim", WINDOW, similarity), ("ms_ssim", LEAST_MULTISCALE, _multiscale)):
        if lacking is not None:
            reasons[name] = lacking
        elif least < smallest:
            reasons[name] = f"needs images of {smallest} px or more, these are of {x.shape[2]} x {x.shape[3]}"
        else:
            values[name] = measure(x, y)
    if lpips is None:
        reasons["lpips"] = about_lpips
    elif least < LEAST_LPIPS:
        reasons["lpips"] = f"needs images of {LEAST_LPIPS} px or more, these are of {x.shape[2]} x {x.shape[3]}"
    else:
        values["lpips"] = lpips(*(images.float().div(127.5).sub(1) for images in (x, y)))
    return values, reasons


def _multiscale(x: Tensor, y: Tensor) -> Tensor:
    from torchmetrics.functional.image import multiscale_structural_similarity_index_measure

    found: Tensor = multiscale_structural_similarity_index_measure(
        y.float(), x.float(), sigma=SIGMA, kernel_size=WINDOW, data_range=float(DATA_RANGE), reduction="none",
        normalize="relu",
    )  # fmt: skip
    return found.reshape(len(x))


def _lacking_torchmetrics() -> str | None:
    try:
        import torchmetrics  # noqa: F401
    except ImportError:
        return "needs torchmetrics: pip install torchmetrics"
    return None


def _lpips(weights: dict[str, str], device: torch.device) -> tuple[Any, str]:
    """(LPIPS, what it is), or (None, why there is none). A file that was given has to be right."""
    from maetok_fast.models.perceptual import LPIPS

    unknown = set(weights) - {"lpips", "lpips_heads"}
    if unknown:
        raise ValueError(f"weights: {sorted(unknown)[0]!r} is of no metric here; there are lpips and lpips_heads")
    vgg, heads = weights.get("lpips", "hub"), weights.get("lpips_heads")
    try:
        with torch.random.fork_rng(devices=[]):  # making it draws numbers, which are the caller's
            torch.manual_seed(0)
            model = LPIPS(vgg, "random" if vgg == "random" else heads)
    except CheckpointError as error:
        if vgg != "hub" or heads is not None:
            raise
        said = str(error).replace("vgg=", "--weights lpips=").replace(" (in a run: loss.--weights lpips=...)", "")
        return None, said.removeprefix("LPIPS: ")
    kind = "RANDOM weights (the number means nothing outside of this comparison)" if vgg == "random" else vgg
    about = f"version 0.1, VGG16, fp32, pixels in [-1, 1]; weights: {kind}, fingerprint {weights_fingerprint(model)}"
    return model.to(device), about


# ---- what comes out ------------------------------------------------------------------------------------------------


def _psnr_result(values: np.ndarray, errors: Tensor) -> dict[str, Any]:
    equal = int(np.isinf(values).sum())
    pooled = float(errors.mean())
    how = f"of each image with peak {DATA_RANGE}, then the mean"
    how += f"; the {equal} equal pair(s) count as {HIGHEST_DB:g} dB" if equal else ""
    of_mean = HIGHEST_DB if pooled == 0 else 10 * math.log10(DATA_RANGE**2 / pooled)
    return _mean(np.minimum(values, HIGHEST_DB)) | {"of_mean_error": of_mean, "equal_pairs": equal, "how": how}


def _result(columns: dict[str, np.ndarray], reasons: dict[str, str], name: str, how: str) -> dict[str, Any]:
    return {"reason": reasons[name]} if name not in columns else _mean(columns[name]) | {"how": how}


def _mean(values: np.ndarray) -> dict[str, Any]:
    """standard_error: of the mean over images; None of one image."""
    error = float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else None
    return {"mean": float(values.mean()), "standard_error": error}


def _how_ssim() -> str:
    return (
        f"Gaussian window of {WINDOW}, sigma {SIGMA}, data range {DATA_RANGE}, each channel, windows inside of the "
        "image alone (as scikit-image)"
    )


def _how_ms_ssim() -> str:
    from importlib import metadata

    try:
        version = metadata.version("torchmetrics")
    except metadata.PackageNotFoundError:
        version = "(no version)"
    return f"torchmetrics {version}: window of {WINDOW}, sigma {SIGMA}, data range {DATA_RANGE}, 5 scales"


def _treatment(images: Images) -> str:
    """How the set's images were resized and cropped, where it says so."""
    return str(getattr(images, "treatment", "unknown"))


def _traps(count: int, about_lpips: str, how: str) -> list[str]:
    found = [f"pairs are {how}: see in worst.png that they are pairs"] if how.startswith("by order") else []
    found += [
        "the public evaluation script computes SSIM with data_range=2 of pixels in [0, 1], which makes it higher: its "
        "numbers are not comparable with these",
        "SSIM that averages over padded borders too (torchmetrics since its pull request 2721) differs by about 0.01",
        "pixels were rounded to 8 bits before they were compared; floats would give another PSNR",
        "numbers are comparable only with those of the same crop and resize filter",
    ]
    if "RANDOM" in about_lpips:
        found.append("LPIPS of random weights means nothing outside of this comparison")
    if count < 1000:
        found.append(f"{count} images are few: look at the standard errors")
    return found


def _number(value: Any) -> float:
    """JSON has no infinity."""
    return min(float(value), HIGHEST_DB)


def _table(path: Path, labels: Sequence[str], columns: dict[str, np.ndarray]) -> None:
    """An equal pair's PSNR is inf; an empty cell was not measured."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["image", *_COLUMNS])
        for i, label in enumerate(labels):
            writer.writerow([label, *(f"{columns[n][i]:.6f}" if n in columns else "" for n in _COLUMNS)])


def _picture(
    path: Path,
    worst: Sequence[tuple[float, int, np.ndarray, np.ndarray]],
    labels: Sequence[str],
    columns: dict[str, np.ndarray],
) -> None:
    """Rows of original, result and MAGNIFIED times their difference, labelled; small images are made larger."""
    with tempfile.TemporaryDirectory() as folder:
        files, texts = [], []
        for rank, (_, i, original, result) in enumerate(worst):
            difference = np.abs(original.astype(np.int16) - result) * MAGNIFIED
            times = max(1, SIDE // max(original.shape[1:]))
            three = [original, result, difference.clip(0, 255).astype(np.uint8)]
            three = [image.transpose(1, 2, 0).repeat(times, 0).repeat(times, 1) for image in three]
            white = np.full((len(three[0]), GAP, 3), 255, np.uint8)
            files.append(Path(folder) / f"{rank}.png")
            save_png(np.concatenate([three[0], white, three[1], white, three[2]], axis=1), files[-1])
            shown = ", ".join(text.format(columns[n][i]) for n, text in _DIGITS.items() if n in columns)
            texts.append(f"{labels[i][-40:]}: {shown} (original, result, difference x {MAGNIFIED})")
        write_grid(path, files, texts, side=3 * SIDE + 2 * GAP)
