# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""What a training step costs in FLOPs, counted and not derived: the numerator of MFU.

    count_flops(fn)       torch's FlopCounterMode over the ops' references      2 for a multiplication and its addition
    model_flops(model)    forward and backward of one image, on meta tensors    no memory, no arithmetic, seconds
    module_flops(model, call)   likewise of whatever call(model) makes
    teacher_flops(name)   the forward of a frozen target network                likewise

Counted are products (linear layers, convolutions, attention) and nothing else, as is usual for MFU. The count is of the
work that the mathematics asks for: what the last blocks need not compute is not in it, nor is what activation
checkpointing computes twice, and a part without gradients has no backward pass. MAETok-B at 256 px: 68.5 GMAC forward,
205 with the backward (70.7 and 212 where the last blocks are counted in full).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from maetok_fast._optional import probe
from maetok_fast.checks import check_number, check_positive
from maetok_fast.kernels import backend
from maetok_fast.models.auxiliary import CAPTION_TOKENS
from maetok_fast.training.teachers import TEACHERS

__all__ = ["count_flops", "model_flops", "module_flops", "teacher_flops"]


def count_flops(fn: Callable[[], Any]) -> int:
    """FLOPs of one call of `fn`, its backward passes included; on meta tensors it costs nothing.

    The library's ops run as their references, whose products torch can see; those of other libraries' kernels, which it
    cannot, are not counted.
    """
    with backend("reference"), FlopCounterMode(display=False) as counter:
        fn()
    return int(counter.get_total_flops())


def model_flops(model: nn.Module, image_size: int, *, dropped: float = 0.0, teachers: Iterable[str] = ()) -> int:
    """FLOPs per image of a training step: forward and backward of `model`, and the forward of its teachers.

    model: called with images (1, 3, S, S) in training mode, such as `TokenizerTraining` or a MAETok, before it is
    sharded (FSDP); it is not changed, and no copy of its weights is made. image_size: S, pixels. dropped: the share of
    image tokens that drop mode leaves out, in [0, 1). teachers: names as `Teacher.create` takes them; "hog" and
    "caption" are no networks and cost nothing. LPIPS and the discriminator are not in it.
    ValueError for numbers out of range and for a sharded model.
    """
    check_positive("model_flops", image_size=image_size)
    check_number("model_flops", "dropped", dropped, 0, 1)
    images = torch.empty(1, 3, image_size, image_size, device="meta", dtype=_dtype(model))
    more: dict[str, Any] = {}
    if dropped:
        config: Any = getattr(model, "tokenizer", model).config
        tokens = (image_size // config.patch) ** 2
        more["mask"] = torch.zeros(1, tokens, dtype=torch.bool, device="meta")
        more["kept"] = torch.zeros(1, tokens - math.ceil(tokens * dropped), dtype=torch.int64, device="meta")
    if getattr(model, "caption", None) is not None:
        ids = torch.zeros(1, CAPTION_TOKENS, dtype=torch.int64, device="meta")
        more["text"] = ids, ids.bool()

    names = [name for name in teachers if name not in ("hog", "caption")]
    return module_flops(model, lambda twin: twin(images, **more)) + sum(teacher_flops(n, image_size) for n in names)


def module_flops(model: nn.Module, call: Callable[[Any], Any]) -> int:
    """FLOPs of call(twin) and its backward passes; twin: the model on meta tensors, in training mode. The model is not
    changed, and no copy of its weights is made. ValueError for a sharded one."""
    twin = _on_meta(model).train()

    def step() -> None:
        out = call(twin)
        roots = [x for x in tree_leaves(out) if isinstance(x, Tensor) and x.requires_grad]
        if roots:
            torch.autograd.backward(roots, [torch.empty_like(x) for x in roots])

    return count_flops(step)


def teacher_flops(name: str, image_size: int, patch: int = 16) -> int:
    """FLOPs of a teacher's forward for one image of `image_size` pixels a side, a multiple of `patch`.

    name: as `Teacher.create` takes it. The network is built without weights. ImportError without timm, ValueError where
    timm has no such ViT."""
    check_positive("teacher_flops", image_size=image_size, patch=patch)
    if probe("timm").state != "found":
        raise ImportError(f"teachers are timm's models, which need timm: {probe('timm').reason}")
    import timm

    try:
        with torch.device("meta"):
            model = timm.create_model(
                TEACHERS.get(name, name), num_classes=0, patch_size=patch, img_size=image_size
            ).eval()
    except (RuntimeError, TypeError, AssertionError) as error:
        raise ValueError(f"teacher_flops: timm cannot make {name} at {image_size} px, patch {patch}: {error}") from None
    with torch.no_grad():
        return count_flops(lambda: model.forward_features(torch.empty(1, 3, image_size, image_size, device="meta")))


def _on_meta(model: nn.Module) -> nn.Module:
    """A copy of the model whose parameters and buffers are meta tensors; not one of them is copied on the way."""
    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        memo[id(parameter)] = nn.Parameter(torch.empty_like(parameter, device="meta"), parameter.requires_grad)
    for buffer in model.buffers():
        memo[id(buffer)] = torch.empty_like(buffer, device="meta")
    try:
        twin = copy.deepcopy(model, memo)
    except AssertionError as error:  # torch's own answer for an FSDP module
        raise ValueError(f"model_flops: {type(model).__name__} is sharded; count before World.wrap") from error
    for module in twin.modules():
        module.__dict__.pop("forward", None)  # of activation checkpointing, which would count blocks twice
    return twin


def _dtype(model: nn.Module) -> torch.dtype:
    return next((p.dtype for p in model.parameters()), torch.float32)
