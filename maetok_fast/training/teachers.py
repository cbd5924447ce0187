# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""Frozen feature networks whose patch features the auxiliary decoders predict: timm's ViTs at patch 16.

    images (B, 3, H, W) uint8, or float in [-1, 1] ── (x - mean) / deviation ── ViT at patch 16 ── prefix tokens dropped
                                                                                     └──> (B, H / 16 * W / 16, D)

    name         timm's model                                D      pixel statistics
    dino         vit_large_patch14_dinov2.lvd142m            1024   ImageNet's
    clip         vit_so400m_patch14_siglip_gap_224.webli     1152   0.5, 0.5
    clip_vit_l   vit_large_patch14_clip_quickgelu_224.openai 1024   CLIP's
    others       as timm names them                          its own

MAETok's patches have 16 pixels, these networks' 14. timm resamples the filters of the patch embedding when it reads a
checkpoint. The table of positions stays on its own grid (37 x 37 for DINOv2) and is resampled to each image's, so that
another image size costs one resampling and not two.

A teacher costs as much as the tokenizer it teaches: `maetok_fast.accelerate` makes it fast, on a CPU over packed
weights, int8 if asked for, of which it keeps that one copy. It is a plain object: nothing of it can come into a state
dict, an average or an optimizer. OpenAI's CLIP was trained with QuickGELU, which timm has in models of that name alone.
"""

from __future__ import annotations

import difflib
import functools
import logging
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from maetok_fast._accelerate import accelerate
from maetok_fast._accelerate.swap import _packed_below
from maetok_fast.checks import check_positive, check_tensor
from maetok_fast.kernels._gemm import why_not_packed
from maetok_fast.models.checkpoints import CheckpointError
from maetok_fast.models.checkpoints.files import read_weights
from maetok_fast.models.checkpoints.locate import locate
from maetok_fast.precision import AUTO, resolve

__all__ = ["IMAGENET", "PATCH", "TEACHERS", "Teacher", "TeacherError"]

log = logging.getLogger("maetok_fast")

PATCH = 16
TEACHERS = {
    "dino": "vit_large_patch14_dinov2.lvd142m",
    "clip": "vit_so400m_patch14_siglip_gap_224.webli",
    "clip_vit_l": "vit_large_patch14_clip_quickgelu_224.openai",
}
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
PRECISIONS = (AUTO, "fp32", "bf16", "int8")
STATISTICS = ("own", "public")


class TeacherError(ValueError):
    """A teacher that cannot be made as asked; the message names it and the way out."""


class Teacher:
    """A frozen network, made by `Teacher.create`; called with images it returns their patch features.

    name: as it was asked for; features: D, their width; patch: pixels a side of one; dtype: of the features;
    precision: in words.
    """

    def __init__(
        self,
        model: Any,
        name: str,
        statistics: tuple[Any, Any],
        precision: str = AUTO,
        device: torch.device | str = "cpu",
        compile: bool = False,
        layers: int = 0,
    ) -> None:
        """model: a timm ViT with its weights, which becomes the teacher's alone; statistics: mean and deviation of
        pixels in [0, 1], three numbers each. The rest as `create` has it."""
        self.name, self.device, self.features = name, torch.device(device), int(model.num_features)
        self.patch = int(model.patch_embed.patch_size[0])
        self.precision, self.dtype = chosen_precision(precision, self.device, name)
        weights = torch.int8 if self.precision == "int8" else None
        if compile and self.device.type != "cuda":
            raise TeacherError(f"teacher {name}: compile is for CUDA, the device is {self.device}; leave it out")
        mean, deviation = (torch.tensor(v, dtype=torch.float64, device=self.device)[:, None, None] for v in statistics)
        # x / 255 and (x + 1) / 2 are the pixels in [0, 1]
        self._of_bytes = (-mean / deviation).float(), (1 / 255 / deviation).float()
        self._of_floats = ((0.5 - mean) / deviation).float(), (0.5 / deviation).float()
        self._prefix = int(model.num_prefix_tokens)
        self._model = model.to(self.device, self.dtype).eval().requires_grad_(False)
        try:
            report = accelerate(self._model, for_inference=True, weights=weights, quiet=True)
        except ValueError as error:
            raise TeacherError(f"teacher {name}: {error}") from error
        log.debug("teacher %s: %s", name, report)
        self._packed = any(kind.startswith("Packed") for _, kind in report.swapped.values())
        forward = functools.partial(_sum_of_last, model, layers) if layers else model.forward_features
        if layers:
            self._prefix = 0  # taken off there
        self._forward = torch.compile(forward) if compile else forward

    @classmethod
    def create(
        cls,
        name: str,
        *,
        weights: str | os.PathLike[str],
        image_size: int,
        patch: int = PATCH,
        precision: str = AUTO,
        device: torch.device | str = "cpu",
        statistics: str = "own",
        compile: bool = False,
        layers: int = 0,
        seed: int = 0,
    ) -> Teacher:
        """A teacher by name, "dino", "clip", "clip_vit_l" or a timm ViT's own, with its weights.

        weights: "hub" (timm's repository, or the hub's cache of it), a file or folder (safetensors, or a pickle of
            tensors, of timm's names or those that timm converts), or "random" (for tests and timings; of `seed`).
        image_size: pixels a side, a multiple of patch; other sizes work too, this one is tried. patch: pixels a side of
            a token, the tokenizer's.
        precision: "fp32", "bf16", "int8" (weights and the products' inputs rounded to int8, on a CPU), or "auto": int8
            on a CPU that multiplies bytes, else `maetok_fast.precision`'s choice.
        statistics: "own", the pixel statistics that the network was trained with, or "public", ImageNet's for all, as
            MAETok's public code feeds SigLIP. compile: torch.compile, on CUDA. layers: the features are the sum of what
            the last so many blocks give, each through the last norm; 0: the last block's.
        TeacherError where the name, the weights or the device do not allow it; ImportError without timm.
        """
        check_positive("Teacher", image_size=image_size, patch=patch)
        if image_size % patch:
            raise TeacherError(f"teacher {name}: image_size must be a multiple of {patch}, got {image_size}")
        if statistics not in STATISTICS:
            raise TeacherError(f"teacher {name}: statistics {statistics!r} is not one of {', '.join(STATISTICS)}")
        chosen_precision(precision, device, name)  # before anything is downloaded
        model = _random(name, patch, seed) if weights == "random" else _loaded(name, patch, weights)
        found = model.pretrained_cfg
        own = (found.get("mean") or IMAGENET[0], found.get("std") or IMAGENET[1])
        if not 0 <= layers <= len(getattr(model, "blocks", ())):
            raise TeacherError(f"teacher {name}: layers must lie in 0 .. its {len(model.blocks)} blocks, got {layers}")
        teacher = cls(model, name, own if statistics == "own" else IMAGENET, precision, device, compile, layers)
        if teacher._packed:
            teacher._keep_packed_only(image_size)
        return teacher

    @torch.compiler.disable
    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """images (B, 3, H, W), uint8 or float in [-1, 1] -> (B, H / patch * W / patch, D) of `dtype`, row by row.

        Without gradient, and the same under autocast. ValueError where patch does not divide H and W."""
        check_tensor("images", images, ("B", 3, "H", "W"))
        height, width = images.shape[2:]
        if height % self.patch or width % self.patch:
            raise ValueError(
                f"teacher {self.name}: images must have sides divisible by its patch of {self.patch} pixels, "
                f"got {height} x {width}; crop or resize them"
            )
        # no inference_mode: its tensors could not be saved for the backward of a loss
        with torch.autocast(self.device.type, enabled=False):
            return self._forward(self._normalised(images))[:, self._prefix :]

    def _normalised(self, images: Tensor) -> Tensor:
        """One pass: shift + x * scale."""
        if images.dtype == torch.uint8:
            shift, scale = self._of_bytes
        elif images.dtype.is_floating_point:
            images, (shift, scale) = images.float(), self._of_floats
        else:
            raise TypeError(f"images: expected uint8, or floating point in [-1, 1], got {images.dtype}")
        return torch.addcmul(shift, images, scale).to(self.dtype)

    def _keep_packed_only(self, image_size: int) -> None:
        """Frees the weights that `accelerate` packed beside the parameters, which no call of a teacher reads again.

        Whether that is so is tried: after it the same image must give the same features, else they come back.
        """
        image = torch.arange(3 * image_size**2, device=self.device).view(1, 3, image_size, image_size)
        image = (image * 7919 % 256).to(torch.uint8)
        want = self(image)
        covered = [
            layer.weight
            for module in self._model.modules()
            if "_fast_packed" in module.__dict__
            for layer in _packed_below(module, module._fast_reading)
            if isinstance(layer, nn.Linear)
        ]
        originals = [weight.data for weight in covered]
        for weight in covered:
            weight.data = weight.new_empty(0)
        self._repacked_of_these()
        try:
            freed = torch.equal(self(image), want)
        except (RuntimeError, ValueError, TypeError, IndexError):
            freed = False
        if not freed:
            log.debug("teacher %s: its parameters stay beside the packed weights", self.name)
            for weight, original in zip(covered, originals):
                weight.data = original
            self._repacked_of_these()

    def _repacked_of_these(self) -> None:
        """The packed weights count as those of the parameters as they are now (`_accelerate.packed._products`)."""
        for module in self._model.modules():
            found = module.__dict__.get("_fast_packed")
            if found is not None:
                tensors = (*module.parameters(), *module.buffers())
                now = ((t.data_ptr(), -1 if t.is_inference() else t._version) for t in tensors)
                module.__dict__["_fast_packed"] = ((found[0][0], *now), found[1])

    @property
    def memory(self) -> int:
        """Bytes of the weights that it holds."""
        held = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in self._tensors()}
        return sum(held.values())

    def _tensors(self) -> list[Tensor]:
        found = [*self._model.parameters(), *self._model.buffers()]
        for module in self._model.modules():
            for product in module.__dict__.get("_fast_packed", (None, {}))[1].values():
                panels = getattr(product, "_panels", None) or ()
                own = [*product.buffers(), *(p for p in panels if isinstance(p, Tensor))]
                found += own
        return found

    def __reduce__(self) -> Any:
        raise TypeError("a Teacher is neither copied nor pickled: create it in the process that uses it")

    def __repr__(self) -> str:
        return f"Teacher({self.name}, {self.features} features, {self.precision} on {self.device})"


def chosen_precision(precision: str, device: torch.device | str, name: str = "of a run") -> tuple[str, torch.dtype]:
    """("fp32", "bf16" or "int8", the dtype of activations) of a teacher's precision on a device. TeacherError where the
    word is none of PRECISIONS, or int8 is asked for elsewhere than on a CPU."""
    device = torch.device(device)
    if precision not in PRECISIONS:
        raise TeacherError(f"teacher {name}: precision {precision!r} is not one of {', '.join(PRECISIONS)}")
    if precision == AUTO and device.type == "cpu" and why_not_packed("int8", device) is None:
        precision = "int8"  # three times fp32's rate, features within 1e-3 of a cosine
    if precision != "int8":
        dtype = resolve(precision, device, packed=True).dtype
        return {torch.float32: "fp32"}.get(dtype, "bf16"), dtype
    if device.type != "cpu":
        raise TeacherError(f"teacher {name}: precision int8 is for a CPU, the device is {device}; use bf16")
    return "int8", resolve(AUTO, device).dtype


def _sum_of_last(model: Any, layers: int, images: Tensor) -> Tensor:
    """The sum of the patch features behind each of the last blocks, normed."""
    found = model.forward_intermediates(images, indices=layers, norm=True, output_fmt="NLC", intermediates_only=True)
    total: Tensor = torch.stack(found).sum(0)
    return total


# ---- the network and its weights -----------------------------------------------------------------------------------


def _timm() -> Any:
    try:
        import timm
    except ImportError as error:
        raise ImportError("teachers are timm's models, which need timm: pip install timm") from error
    return timm


def _built(name: str, patch: int, device: str) -> Any:
    """timm's ViT at this patch with room for its checkpoint's own table of positions."""
    timm = _timm()
    known = TEACHERS.get(name, name)
    if not timm.is_model(known):
        near = difflib.get_close_matches(known, [*TEACHERS, *timm.list_models("*vit*")], 1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise TeacherError(f"teacher {name!r}: none of {', '.join(TEACHERS)}, and timm has no model of that name{hint}")
    try:
        with torch.device("meta"):
            native = timm.create_model(known, num_classes=0)
        rows, columns = native.patch_embed.grid_size
        options = {"patch_size": patch, "img_size": (rows * patch, columns * patch), "dynamic_img_size": True}
        with torch.device(device):
            model = timm.create_model(known, num_classes=0, **options)
        _ = model.num_prefix_tokens, model.forward_features
    except (TypeError, AttributeError) as error:
        raise TeacherError(
            f"teacher {name}: timm's {known} is no ViT whose patch and image size can be chosen ({error}); use one"
        ) from error
    return model


def _random(name: str, patch: int, seed: int) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return _built(name, patch, "cpu")


def _loaded(name: str, patch: int, weights: str | os.PathLike[str]) -> Any:
    model = _built(name, patch, "meta")
    known = TEACHERS.get(name, name)
    source: str | os.PathLike[str] = weights
    if weights == "hub":
        source = model.pretrained_cfg.get("hf_hub_id") or ""
        if not source:
            raise TeacherError(f"teacher {name}: timm knows no hub repository of {known}; give weights=/path/to/file")
    elif not Path(weights).expanduser().exists():
        raise TeacherError(f"teacher {name}: weights {weights}: no such file, and neither 'hub' nor 'random'")
    try:
        _, path = locate(source)
        state, _ = read_weights(path)
    except CheckpointError as error:
        if weights != "hub":
            raise TeacherError(f"teacher {name}: {error}") from error
        raise TeacherError(
            f"teacher {name}: the weights of timm's {known} could not be had from the hub repository {source}; "
            "download its model.safetensors elsewhere and give weights=/path/to/file"
        ) from error
    if any(True for _ in model.buffers()):  # buffers that no file holds
        model = _built(name, patch, "cpu")
    _fill(model, state, f"teacher {name}: {path}")
    return model


def _fill(model: Any, state: Any, where: str) -> None:
    """Loads what timm's own reader makes of a file's content: names converted, filters of the patches resampled."""
    if not isinstance(state, Mapping):
        raise TeacherError(f"{where}: expected tensors by name, got {type(state).__name__}")
    convert = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    try:
        state = dict(state) if convert is None else convert(dict(state), model)
        state = {k: v for k, v in state.items() if isinstance(v, Tensor)}
        found = model.load_state_dict(state, strict=False, assign=True)
    except (RuntimeError, KeyError, AttributeError, IndexError) as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or ["no message"]
        raise TeacherError(f"{where}: not this network's weights ({lines[min(1, len(lines) - 1)]})") from error
    missing = list(found.missing_keys)
    deeper = [key for key in found.unexpected_keys if key.startswith("blocks.")]
    if missing or deeper:
        what = (
            f"{len(missing)} tensors are missing, {missing[0]} is one" if missing else f"it has {deeper[0]} beyond them"
        )
        raise TeacherError(f"{where}: not this network's weights: {what}; give a checkpoint of it")
    if found.unexpected_keys:  # the heads of other uses
        log.info("%s: passed over %s", where, ", ".join(found.unexpected_keys))
