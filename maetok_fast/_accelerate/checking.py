# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""A reading is believed once a copy of the module and the copy's fast form have computed the same.

    copy in fp64, without hooks, parameters moved at random (zero gates and small LayerScales would hide a branch)
        its own forward  ==  the fast form over plain torch (`backend("reference")`)      by every way to call it
    copy in the model's dtype
        its own forward  ~   the packed form                                              to that dtype's rounding

One module of a kind stands for those of the same class, reading and settings.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from maetok_fast._accelerate import reading
from maetok_fast._accelerate.fast import Fast, FastRotary, become
from maetok_fast._accelerate.packed import PACKED
from maetok_fast._accelerate.reading import COUNTS, ROPES, Unfit, close, pristine
from maetok_fast.inference.packing import Target
from maetok_fast.kernels import backend

__all__ = ["check", "is_rotary", "settings"]

_TOKENS, _PREFIX, _LATENTS = 6, 1, 2
# of the outputs' size: formulas differ by percents, roundings of a block by a few units in the last place
_LIMITS = {torch.float32: 1e-4, torch.bfloat16: 0.1, torch.int8: 0.3}


def settings(module: nn.Module) -> tuple[Any, ...]:
    """What beside class and reading may tell two modules apart: their own flags and numbers, and their children's."""
    kinds = (bool, int, float, str)
    return tuple(
        (name, type(m), *((k, v) for k, v in vars(m).items() if type(v) in kinds and k != "training"))
        for name, m in module.named_modules()
    )


@torch.no_grad()
def check(module: nn.Module, kind: type[Fast], what: Any, target: Target | None) -> None:
    """Raises Unfit where the fast form of `module` computes anything else."""
    if any(t.is_meta for t in module.parameters()):
        raise Unfit("it is on the meta device, where nothing can be tried")
    try:
        own = _moved(pristine(module))
        with backend("reference"), torch.autocast(_device(own).type, enabled=False):
            _compare(own, kind, what, None, 1e-5)
        if target is not None and kind in PACKED:
            limit = max(_LIMITS[target.dtype], _LIMITS[target.weights])
            with torch.autocast("cpu", enabled=False):
                _compare(_moved(pristine(module, target.dtype)), PACKED[kind], what, target, limit)
    except Unfit:
        raise
    except Exception as error:
        lines = str(error).splitlines() or [""]
        raise Unfit(f"it could not be tried on a small input ({type(error).__name__}: {lines[0]})") from error


def _compare(own: nn.Module, kind: type[Fast], what: Any, target: Target | None, limit: float) -> None:
    calls = list(_calls(own, what))
    wanted = [own(*args, **kwargs) for args, kwargs in calls]
    become(own, kind, what)
    own.__dict__["_fast_target"] = target
    for (args, kwargs), want in zip(calls, wanted):
        got = own(*args, **kwargs)
        got, want = (r[0] if isinstance(r, tuple) else r for r in (got, want))
        if not isinstance(want, Tensor) or got.shape != want.shape or not close(got, want, limit):
            raise Unfit("on a small input its forward computes something else than the fast form")


def _moved(module: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    for p in module.parameters():
        noise = torch.randn(p.shape, generator=generator, dtype=torch.float64) * 0.1
        p.copy_((p.double().cpu() + noise).to(p))
    return module


def _device(module: nn.Module) -> torch.device:
    return next((p.device for p in module.parameters()), torch.device("cpu"))


def _like(module: nn.Module, *shape: int) -> Tensor:
    p = next(module.parameters(), torch.empty(0))
    generator = torch.Generator().manual_seed(1)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(p)


def _calls(module: Any, what: Any) -> Iterator[tuple[tuple[Any, ...], dict[str, Any]]]:
    """Small inputs in every way that the reading admits."""
    if isinstance(what, reading.Mlp):
        yield (_like(module, 2, _TOKENS, module._modules[what.first[0]].in_features),), {}
    elif isinstance(what, reading.Attention):
        tokens = _TOKENS + _PREFIX + _LATENTS
        if what.layout == "in_proj":
            x = _like(module, tokens, 3, module.embed_dim)
            yield (x, x, x), {"need_weights": False}
            return
        x = _like(module, 2, tokens, _inputs(module, what))
        for given in _positions(module, what, tokens):
            yield (x,), {n: v for n, v in given.items() if n in what.call.names}
    elif isinstance(what, reading.Block):
        yield from _block_calls(module, what)
    elif what is None and isinstance(module, nn.Linear):
        yield (_like(module, 3, module.in_features),), {}
    else:
        yield (_like(module, 2, 3, *module.freqs_cos.shape),), {}


def _inputs(module: Any, what: reading.Attention) -> int:
    return int(module._modules["qkv" if what.layout == "qkv" else "q_proj"].in_features)


def _block_calls(module: Any, what: reading.Block) -> Iterator[tuple[tuple[Any, ...], dict[str, Any]]]:
    tokens = _TOKENS + _PREFIX + _LATENTS
    x = _like(module, 2, tokens, next(module._modules[what.mlp].parameters()).shape[-1])
    if what.feed is not None:
        x = _like(module, 2, tokens, module._modules[what.mlp]._modules[what.feed.first[0]].in_features)
    args: tuple[Any, ...] = (x,)
    if what.modulation is not None:
        layer = next(m for m in module._modules[what.modulation.name].modules() if isinstance(m, nn.Linear))
        rows = (2, _LATENTS) if what.modulation.form == "tokens" else (2,)
        args = (x, _like(module, *rows, layer.in_features))
    wants = {n for n in what.call.names if n in (*ROPES, *COUNTS)}
    if what.attention is None or not wants:
        yield args, {}
        return
    for given in _positions(module._modules[what.attn], what.attention, tokens):
        position = next((v for n, v in given.items() if n in ROPES), None)
        named = {n: position if n in ROPES else given.get(n) for n in wants}
        counts = dict(zip(COUNTS, (_PREFIX, _LATENTS)))
        yield args, {n: counts[n] if n in counts and v is None else v for n, v in named.items()}


def _positions(module: Any, what: reading.Attention, tokens: int) -> Iterator[dict[str, Any]]:
    """No rotation, one of all heads, and one of each head."""
    rope = next((n for n in what.call.names if n in ROPES), None)
    counts = dict(zip(COUNTS, (_PREFIX, _LATENTS)))
    counts = {n: c for n, c in counts.items() if n in what.call.names}
    if rope is None:
        yield counts
        return
    yield {rope: None, **counts}
    pairs = what.head_dim // 2
    if counts:
        for shape in ((tokens - _PREFIX - _LATENTS, pairs), (what.heads, tokens - _PREFIX - _LATENTS, pairs)):
            angle = _like(module, *shape).double()
            yield {rope: torch.polar(torch.ones_like(angle), angle), **counts}
    elif hasattr(module, "num_prefix_tokens"):
        for shape in (
            (tokens - module.num_prefix_tokens, pairs),
            (what.heads, tokens - module.num_prefix_tokens, pairs),
        ):
            parts = [t(_like(module, *shape)) for t in (torch.sin, torch.cos)]
            twice = [torch.cat([t, t], -1) if what.half else t.repeat_interleave(2, -1) for t in parts]
            yield {rope: torch.cat(twice, -1)}
    else:
        yield {rope: _rotary(_like(module, tokens, pairs))}


class _Rotary(nn.Module):
    """LightningDiT's rotation, as a stand-in for the model's own."""

    def __init__(self, angle: Tensor) -> None:
        super().__init__()
        self.register_buffer("freqs_cos", angle.cos().repeat_interleave(2, -1))
        self.register_buffer("freqs_sin", angle.sin().repeat_interleave(2, -1))

    def forward(self, t: Tensor) -> Tensor:
        return turned_pairs(t, self.freqs_cos, self.freqs_sin)  # type: ignore[arg-type]


def turned_pairs(t: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = t.unflatten(-1, (-1, 2)).unbind(-1)
    return t * cos + torch.stack((-b, a), -1).flatten(-2) * sin


def _rotary(angle: Tensor) -> nn.Module:
    made = _Rotary(angle)
    become(made, FastRotary, None)
    return made


@torch.no_grad()
def is_rotary(module: nn.Module) -> bool:
    """Whether a module holds LightningDiT's tables, and turns by them."""
    cos, sin = (module._buffers.get(n) for n in ("freqs_cos", "freqs_sin"))
    if cos is None or sin is None or cos.ndim != 2 or cos.shape != sin.shape or cos.is_meta:
        return False
    if any(not torch.equal(t[:, ::2], t[:, 1::2]) for t in (cos, sin)):
        return False
    t = torch.randn(2, 3, *cos.shape, generator=torch.Generator().manual_seed(2)).to(cos)
    try:
        return close(pristine(module, cos.dtype)(t), turned_pairs(t, cos, sin))
    except Exception:
        return False
