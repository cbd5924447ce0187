# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""embed_tokens and decoder_tokens: the sequences that MAETok's encoder and decoder start from, in one pass.

    embed_tokens     [ cls | where(mask, mask_token, patches) ] + pos,  then latents                     (encoder)
    decoder_tokens   [ cls | mask_token, N times              ] + pos,  then latents + latent_pos        (decoder)

(B, P + N + L, D): P prefix tokens (cls), N image tokens, L latents. pos covers the prefix too (MAETok adds it to the
cls slot) and not the latents. In plain torch that is a select, two adds and two concatenations, each a pass over
memory; here every output row is written once, and masked patches are not even read.

One kernel pair serves both, as a tile of tokens for a run of images: what does not depend on the image (cls, pos,
mask_token, latent_pos) is read once and stays in registers. Backward reads the gradient once: it writes d_patches (zero
where masked) and d_latents on the way and sums over the images what the images share, in a fixed order and fp32.

Dtypes promote as in torch. Only patches keep their own: under autocast they are bf16 and the parameters, hence the
output, fp32; widening them beforehand would be one more pass.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import _embed_tokens_triton
from ._embed_tokens_triton import lengths, over_launch
from ._native_call import native
from ._op import Op
from ._record import Backend, Sample, drawn

__all__ = ["decoder_tokens", "decoder_tokens_ref", "embed_tokens", "embed_tokens_ref"]


def embed_tokens_ref(
    patches: Tensor,
    mask: Tensor | None = None,
    mask_token: Tensor | None = None,
    pos: Tensor | None = None,
    cls: Tensor | None = None,
    latents: Tensor | None = None,
) -> Tensor:
    """The encoder's sequence [cls | patches, masked ones replaced by mask_token] + pos, then latents.

    patches (B, N, D) bf16, fp16 or fp32 (fp64: reference only). mask (B, N) bool, True = masked, with mask_token (D,);
    both or neither. cls (P, D): P prefix tokens; pos (P + N, D): added to prefix and patches; latents (L, D) or
    (B, L, D): appended as they are. Each may be None.
    Returns (B, P + N + L, D) in the widest dtype of all. ValueError when shapes do not fit together.
    """
    x = patches if mask is None or mask_token is None else torch.where(mask.unsqueeze(-1), mask_token, patches)
    return _sequence(x, pos, cls, latents, None)


def decoder_tokens_ref(
    latents: Tensor,
    mask_token: Tensor,
    tokens: int,
    pos: Tensor | None = None,
    cls: Tensor | None = None,
    latent_pos: Tensor | None = None,
) -> Tensor:
    """The decoder's sequence [cls | mask_token repeated] + pos, then latents + latent_pos.

    latents (B, L, D) bf16, fp16 or fp32 (fp64: reference only); mask_token (D,); tokens: N, how many image tokens;
    cls (P, D), pos (P + N, D), latent_pos (L, D): each may be None.
    Returns (B, P + N + L, D) in the widest dtype of all. ValueError when shapes do not fit together or tokens < 0.
    """
    x = mask_token.expand(latents.shape[0], tokens, -1)
    return _sequence(x, pos, cls, latents, latent_pos)


def _sequence(
    x: Tensor, pos: Tensor | None, cls: Tensor | None, latents: Tensor | None, latent_pos: Tensor | None
) -> Tensor:
    batch, parts, prefix = x.shape[0], [], 0
    if cls is not None:
        prefix = cls.shape[0]
        parts.append((cls if pos is None else cls + pos[:prefix]).expand(batch, -1, -1))
    parts.append(x if pos is None else x + pos[prefix:])
    if latents is not None:
        parts.append((latents if latent_pos is None else latents + latent_pos).expand(batch, -1, -1))
    return torch.cat(parts, 1)


def _check_tokens(op: str, a: Any, tokens: int) -> None:
    if tokens < 0:
        raise ValueError(f"{op}: tokens must not be negative, got {tokens}")
    rows = tokens + (0 if a.cls is None else a.cls.shape[0])
    if a.pos is not None and a.pos.shape[0] != rows:
        raise ValueError(
            f"{op}: pos must be ({rows}, {a.pos.shape[1]}), a row for each prefix and image token, "
            f"got {tuple(a.pos.shape)}"
        )


def _encoder_check(a):
    if (a.mask is None) != (a.mask_token is None):
        raise ValueError("embed_tokens: mask and mask_token go together, got one of them")
    _check_tokens("embed_tokens", a, a.patches.shape[1])


def _out(a, backend):
    """Like the first argument, (B, *, D); the parameters, where there are any, are of the widest dtype."""
    batch, _, width = a[0].shape
    dtype = next((t.dtype for t in (a.mask_token, a.pos, a.cls, a.latents) if t is not None), a[0].dtype)
    return (a[0].new_empty(batch, sum(lengths(a)), width, dtype=dtype),)


def _masked(label: str, real: bool = False, **inputs: Any) -> Sample:
    """With about half of the patches masked."""

    def make(randn: Callable[..., Tensor]) -> dict[str, Any]:
        batch, tokens, width = inputs["patches"]
        mask = {"mask": randn(batch, tokens) > 0, "mask_token": randn(width)}
        return drawn(label, **inputs).make(randn) | mask

    return Sample(label, make, real)


_TRITON = Backend("triton", _embed_tokens_triton.forward, _embed_tokens_triton.backward, over_launch)
_NATIVE: dict[str, Callable[[Any], Any]] = {
    "none": lambda a: None,
    "n": lambda a: lengths(a)[0],
    "prefix": lambda a: lengths(a)[1],
    "appended": lambda a: lengths(a)[2],
    "replaced": lambda a: not hasattr(a, "patches"),
}
_REAL = ((4, 256, "MAETok-B 256 px"), (4, 1024, "MAETok-B 512 px"), (32, 256, "MAETok-B 256 px, batch 32"))

embed_tokens = Op(
    "embed_tokens",
    ref=embed_tokens_ref,
    shapes={
        "patches": "B N D",
        "mask": "B N",
        "mask_token": "D",
        "pos": "R D",
        "cls": "P D",
        "latents": "L D | B L D",
    },
    check=_encoder_check,
    roles={"patches": "as given", "mask": (torch.bool,)},
    out=_out,
    cpu=[
        native(
            "embed_tokens_fwd patches mask mask_token pos cls latents none y",
            "embed_tokens_bwd d_y mask d_patches d_mask_token d_pos d_cls d_latents none n prefix appended replaced",
            **_NATIVE,
        )
    ],
    cuda=[_TRITON],
    samples=[
        _masked("all parts", patches=(3, 9, 48), pos=(10, 48), cls=(1, 48), latents=(4, 48)),
        _masked("latents per image, two prefix tokens",
                patches=(2, 5, 20), pos=(7, 20), cls=(2, 20), latents=(2, 6, 20)),
        drawn("patches alone", patches=(2, 3, 33)),
        _masked("more images than one program sums", patches=(9, 2, 8), pos=(2, 8), latents=(3, 8)),
        drawn("no mask", patches=(2, 6, 16), pos=(7, 16), cls=(1, 16), latents=(4, 16)),
        *(_masked(label, True, patches=(b, n, 768), pos=(1 + n, 768), cls=(1, 768), latents=(128, 768))
          for b, n, label in _REAL),
    ],
    flops=lambda a: a.patches.numel(),
)  # fmt: skip

decoder_tokens = Op(
    "decoder_tokens",
    ref=decoder_tokens_ref,
    shapes={"latents": "B L D", "mask_token": "D", "pos": "R D", "cls": "P D", "latent_pos": "L D"},
    check=lambda a: _check_tokens("decoder_tokens", a, a.tokens),
    out=_out,
    cpu=[
        native(
            "embed_tokens_fwd none none mask_token pos cls latents latent_pos y",
            "embed_tokens_bwd d_y none none d_mask_token d_pos d_cls d_latents d_latent_pos n prefix appended replaced",
            **_NATIVE,
        )
    ],
    cuda=[_TRITON],
    samples=[
        drawn("MAETok", latents=(3, 4, 48), mask_token=(48,), tokens=9, latent_pos=(4, 48)),
        drawn("cls and absolute positions",
              latents=(2, 6, 33), mask_token=(33,), tokens=5, pos=(6, 33), cls=(1, 33), latent_pos=(6, 33)),
        drawn("no positions", latents=(2, 1, 8), mask_token=(8,), tokens=3, cls=(1, 8)),
        drawn("more images than one program sums", latents=(9, 3, 8), mask_token=(8,), tokens=2, latent_pos=(3, 8)),
        *(drawn(label, True, latents=(b, 128, 768), mask_token=(768,), tokens=n, latent_pos=(128, 768))
          for b, n, label in _REAL),
    ],
    flops=lambda a: a.latents.numel(),
)  # fmt: skip
