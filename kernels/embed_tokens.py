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

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import _native
from ._embed_tokens_triton import _embed_bwd_kernel, _embed_fwd_kernel
from ._op import EMPTY, Backend, Cost, Op, Sample
from ._tiles import column_block

__all__ = ["decoder_tokens", "decoder_tokens_ref", "embed_tokens", "embed_tokens_ref"]


# ---- reference -----------------------------------------------------------------------------------------------------


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
    Returns (B, P + N + L, D) in the widest dtype of all. ValueError when shapes do not fit together.
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


# ---- launchers -----------------------------------------------------------------------------------------------------

_BLOCK_T = 8  # tokens: 8 x 256 columns are 16 elements a thread in 4 warps, two 16-byte loads of bf16
_IMAGES = 8  # images a program sums before its partial sums: they are then a quarter of bf16 gradients, or less


class _Shape:
    """Sizes of one call: B images, P prefix, N image and L latent tokens of D channels, and the launch grid."""

    def __init__(self, like: Tensor, tokens: int, cls: Tensor | None, latents: Tensor | None) -> None:
        self.batch, self.width = like.shape[0], like.shape[2]
        self.prefix = 0 if cls is None else cls.shape[0]
        self.tokens = tokens
        self.latents = 0 if latents is None else latents.shape[-2]
        self.batched = latents is not None and latents.ndim == 3
        self.total = self.prefix + self.tokens + self.latents
        self.images = min(self.batch, _IMAGES)
        self.chunks = -(-self.batch // self.images)
        self.block_d = column_block(self.width)
        self.rows = -(-self.total // _BLOCK_T)
        self.grid = (self.rows, -(-self.width // self.block_d), self.chunks)

    def sizes(self) -> tuple[int, int, int, int, int]:
        return self.batch, self.tokens, self.prefix, self.latents, self.width

    def constants(self) -> dict[str, int]:
        return {
            "BATCHED": self.batched,
            "CHUNK": self.images,
            "BLOCK_T": _BLOCK_T,
            "BLOCK_D": self.block_d,
            "num_warps": 4,
        }


def _out_dtype(*tensors: Tensor | None) -> torch.dtype:
    dtypes = [t.dtype for t in tensors if t is not None]
    out = dtypes[0]
    for dtype in dtypes[1:]:
        out = torch.promote_types(out, dtype)
    return out


Inputs = tuple["Tensor | None", ...]  # patches, mask, mask_token, pos, cls, latents, latent_pos


def _forward_triton(shape: _Shape, out: Tensor, inputs: Inputs) -> None:
    _embed_fwd_kernel[shape.grid](*inputs, out, *shape.sizes(), **shape.constants())


def _forward_native(shape: _Shape, out: Tensor, inputs: Inputs) -> None:
    _native.lib().embed_tokens_fwd(*inputs, out)


def _backward_triton(shape: _Shape, dy: Tensor, mask: Tensor | None, wanted: Inputs, replaced: bool) -> Inputs:
    """`wanted`: for each of the inputs, itself or None where it has no gradient to compute."""
    patches, _, token, pos, cls, latents, latent_pos = wanted

    def sums(like: Tensor | None) -> Tensor | None:
        """Where the programs write: the gradient itself if there is one run of images, else fp32 partial sums."""
        if like is None:
            return None
        return dy.new_empty(shape.chunks, *like.shape, dtype=like.dtype if shape.chunks == 1 else torch.float32)

    dpatches = None if patches is None else torch.empty_like(patches)
    dlatents = torch.empty_like(latents) if shape.batched and latents is not None else sums(latents)
    dpos, dcls, dlatent_pos = (sums(t) for t in (pos, cls, latent_pos))
    dtoken = None if token is None else dy.new_empty(shape.chunks * shape.rows, shape.width, dtype=torch.float32)
    _embed_bwd_kernel[shape.grid](
        dy, mask, dpatches, dtoken, dpos, dcls, dlatents, dlatent_pos, *shape.sizes(), ALL=replaced, **shape.constants()
    )

    def summed(partial: Tensor | None, like: Tensor | None) -> Tensor | None:
        if partial is None or like is None:
            return None
        return partial[0] if partial.shape[0] == 1 and partial.dtype == like.dtype else partial.sum(0).to(like.dtype)

    if not shape.batched:
        dlatents = summed(dlatents, latents)
    return (
        dpatches,
        None,
        summed(dtoken, token),
        summed(dpos, pos),
        summed(dcls, cls),
        dlatents,
        summed(dlatent_pos, latent_pos),
    )


def _backward_native(shape: _Shape, dy: Tensor, mask: Tensor | None, wanted: Inputs, replaced: bool) -> Inputs:
    grads = tuple(None if w is None else torch.empty_like(w) for w in wanted)
    dpatches, _, *shared = grads
    _native.lib().embed_tokens_bwd(
        dy, mask, dpatches, *shared, shape.tokens, shape.prefix, shape.latents, int(replaced)
    )
    return grads


Forward = Callable[[_Shape, Tensor, Inputs], None]
Backward = Callable[[_Shape, Tensor, "Tensor | None", Inputs, bool], Inputs]


def _encoder_backend(name: str, run: Forward, run_backward: Backward) -> Backend:
    def forward(*args: Any) -> tuple[Tensor, ...]:
        patches, _mask, token, pos, cls, latents = args
        shape = _Shape(patches, patches.shape[1], cls, latents)
        dtype = _out_dtype(patches, token, pos, cls, latents)
        out = patches.new_empty(shape.batch, shape.total, shape.width, dtype=dtype)
        run(shape, out, (*args, None))
        return (out,)

    def backward(
        dy: Tensor, saved: Sequence[Tensor], args: tuple[Any, ...], needs: Sequence[bool]
    ) -> Sequence[Tensor | None]:
        patches, mask, _token, _pos, cls, latents = args
        shape = _Shape(patches, patches.shape[1], cls, latents)
        wanted = tuple(a if n else None for a, n in zip(args, needs))
        return run_backward(shape, dy, mask, (*wanted, None), False)[:6]

    return Backend(name, forward, backward, library=name)


def _decoder_backend(name: str, run: Forward, run_backward: Backward) -> Backend:
    def forward(
        latents: Tensor, token: Tensor, tokens: int, pos: Tensor | None, cls: Tensor | None, latent_pos: Tensor | None
    ) -> tuple[Tensor, ...]:
        shape = _Shape(latents, tokens, cls, latents)
        out = latents.new_empty(shape.batch, shape.total, shape.width)
        run(shape, out, (None, None, token, pos, cls, latents, latent_pos))
        return (out,)

    def backward(
        dy: Tensor, saved: Sequence[Tensor], args: tuple[Any, ...], needs: Sequence[bool]
    ) -> Sequence[Tensor | None]:
        shape = _Shape(args[0], args[2], args[4], args[0])
        latents, token, _, pos, cls, latent_pos = (a if n else None for a, n in zip(args, needs))
        wanted = (None, None, token, pos, cls, latents, latent_pos)
        _, _, dtoken, dpos, dcls, dlatents, dlatent_pos = run_backward(shape, dy, None, wanted, True)
        return [dlatents, dtoken, None, dpos, dcls, dlatent_pos]

    return Backend(name, forward, backward, library=name)


# ---- records -------------------------------------------------------------------------------------------------------


def _check_shared(
    op: str, tokens: int, width: int, pos: Tensor | None, cls: Tensor | None, token: Tensor | None
) -> None:
    if token is not None and tuple(token.shape) != (width,):
        raise ValueError(f"{op}: mask_token must be ({width},), got {tuple(token.shape)}")
    if cls is not None and (cls.ndim != 2 or cls.shape[1] != width):
        raise ValueError(f"{op}: cls must be (P, {width}), got {tuple(cls.shape)}")
    rows = tokens + (0 if cls is None else cls.shape[0])
    if pos is not None and tuple(pos.shape) != (rows, width):
        raise ValueError(
            f"{op}: pos must be ({rows}, {width}), a row for each prefix and image token, got {tuple(pos.shape)}"
        )


def _encoder_check(
    patches: Tensor,
    mask: Tensor | None,
    mask_token: Tensor | None,
    pos: Tensor | None,
    cls: Tensor | None,
    latents: Tensor | None,
) -> None:
    if patches.ndim != 3:
        raise ValueError(f"embed_tokens: patches must be (B, N, D), got {tuple(patches.shape)}")
    batch, tokens, width = patches.shape
    if (mask is None) != (mask_token is None):
        raise ValueError("embed_tokens: mask and mask_token go together, got one of them")
    if mask is not None and tuple(mask.shape) != (batch, tokens):
        raise ValueError(f"embed_tokens: mask must be ({batch}, {tokens}), got {tuple(mask.shape)}")
    _check_shared("embed_tokens", tokens, width, pos, cls, mask_token)
    if latents is not None and (
        latents.ndim not in (2, 3) or latents.shape[-1] != width or (latents.ndim == 3 and latents.shape[0] != batch)
    ):
        raise ValueError(
            f"embed_tokens: latents must be (L, {width}) or ({batch}, L, {width}), got {tuple(latents.shape)}"
        )


def _decoder_check(
    latents: Tensor, mask_token: Tensor, tokens: int, pos: Tensor | None, cls: Tensor | None, latent_pos: Tensor | None
) -> None:
    if latents.ndim != 3:
        raise ValueError(f"decoder_tokens: latents must be (B, L, D), got {tuple(latents.shape)}")
    _check_shared("decoder_tokens", tokens, latents.shape[2], pos, cls, mask_token)
    if latent_pos is not None and latent_pos.shape != latents.shape[1:]:
        raise ValueError(
            f"decoder_tokens: latent_pos must be {tuple(latents.shape[1:])}, got {tuple(latent_pos.shape)}"
        )


def _unsupported(backend: str, x: Tensor, *rest: Any) -> str | None:
    if x.numel() == 0:
        return EMPTY
    if backend == "triton" and (x.shape[0] > 65535 * _IMAGES or x.shape[2] > 65535 * 128):
        return f"{tuple(x.shape)} exceeds a CUDA grid's second or third dimension"
    return None


def _encoder_fake(name: str, patches: Tensor, mask: Tensor | None, *shared: Tensor | None) -> tuple[Tensor, ...]:
    shape = _Shape(patches, patches.shape[1], shared[2], shared[3])
    return (patches.new_empty(shape.batch, shape.total, shape.width, dtype=_out_dtype(patches, *shared)),)


def _decoder_fake(name: str, *args: Any) -> tuple[Tensor, ...]:
    shape = _Shape(args[0], args[2], args[4], args[0])
    return (args[0].new_empty(shape.batch, shape.total, shape.width),)


Randn = Callable[..., Tensor]
_SIZES = tuple[int, int, int, int, int]  # B, P, N, L, D
_REAL = (
    ((4, 1, 256, 128, 768), "MAETok-B 256 px"),
    ((4, 1, 1024, 128, 768), "MAETok-B 512 px"),
    ((32, 1, 256, 128, 768), "MAETok-B 256 px, batch 32"),
)


def _encoder_case(
    label: str, sizes: _SIZES, masked: bool = True, pos: bool = True, batched: bool = False, real: bool = False
) -> Sample:
    batch, prefix, tokens, count, width = sizes

    def make(randn: Randn) -> dict[str, Any]:
        args: dict[str, Any] = {"patches": randn(batch, tokens, width)}
        if masked:
            args |= {"mask": randn(batch, tokens) > 0, "mask_token": randn(width)}
        if pos:
            args["pos"] = randn(prefix + tokens, width)
        if prefix:
            args["cls"] = randn(prefix, width)
        if count:
            args["latents"] = randn(batch, count, width) if batched else randn(count, width)
        return args

    return Sample(label, make, real)


def _encoder_samples() -> Iterable[Sample]:
    yield _encoder_case("all parts", (3, 1, 9, 4, 48))
    yield _encoder_case("latents per image, two prefix tokens", (2, 2, 5, 6, 20), batched=True)
    yield _encoder_case("patches alone", (2, 0, 3, 0, 33), masked=False, pos=False)
    yield _encoder_case("more images than one program sums", (9, 0, 2, 3, 8))
    yield _encoder_case("no mask", (2, 1, 6, 4, 16), masked=False)
    for sizes, label in _REAL:
        yield _encoder_case(label, sizes, real=True)


def _decoder_case(label: str, sizes: _SIZES, pos: bool = False, latent_pos: bool = True, real: bool = False) -> Sample:
    batch, prefix, tokens, count, width = sizes

    def make(randn: Randn) -> dict[str, Any]:
        args: dict[str, Any] = {
            "latents": randn(batch, count, width),
            "mask_token": randn(width),
            "tokens": tokens,
        }
        if pos:
            args["pos"] = randn(prefix + tokens, width)
        if prefix:
            args["cls"] = randn(prefix, width)
        if latent_pos:
            args["latent_pos"] = randn(count, width)
        return args

    return Sample(label, make, real)


def _decoder_samples() -> Iterable[Sample]:
    yield _decoder_case("MAETok", (3, 0, 9, 4, 48))
    yield _decoder_case("cls and absolute positions", (2, 1, 5, 6, 33), pos=True)
    yield _decoder_case("no positions", (2, 1, 3, 1, 8), latent_pos=False)
    yield _decoder_case("more images than one program sums", (9, 0, 2, 3, 8))
    for (batch, _, tokens, count, width), label in _REAL:
        yield _decoder_case(label, (batch, 0, tokens, count, width), real=True)


def _bytes(*values: Any) -> int:
    return sum(v.nbytes for v in values if isinstance(v, Tensor))


def _encoder_cost(patches: Tensor, *rest: Any, **named: Any) -> Cost:
    """Each patch counted as read; masked ones are not."""
    shared = [v for k, v in named.items() if k != "mask"] + list(rest[1:])
    shape = _Shape(patches, patches.shape[1], *(named.get(k) for k in ("cls", "latents")))
    out = shape.batch * shape.total * shape.width * _out_dtype(patches, *shared).itemsize
    return Cost(patches.numel(), out + _bytes(patches, *rest, *named.values()), 1)


def _decoder_cost(latents: Tensor, *rest: Any, **named: Any) -> Cost:
    shape = _Shape(latents, named["tokens"], named.get("cls"), latents)
    out = shape.batch * shape.total * shape.width * latents.element_size()
    return Cost(latents.numel(), out + _bytes(latents, *rest, *named.values()), 1)


embed_tokens = Op(
    "embed_tokens",
    ref=embed_tokens_ref,
    cpu=(_encoder_backend("native", _forward_native, _backward_native),),
    cuda=(_encoder_backend("triton", _forward_triton, _backward_triton),),
    fake=_encoder_fake,
    check=_encoder_check,
    unsupported=_unsupported,
    samples=_encoder_samples,
    cost=_encoder_cost,
    own_dtypes={
        "patches": (torch.float32, torch.bfloat16, torch.float16, torch.float64),
        "mask": (torch.bool,),
    },
)

decoder_tokens = Op(
    "decoder_tokens",
    ref=decoder_tokens_ref,
    cpu=(_decoder_backend("native", _forward_native, _backward_native),),
    cuda=(_decoder_backend("triton", _forward_triton, _backward_triton),),
    fake=_decoder_fake,
    check=_decoder_check,
    unsupported=_unsupported,
    samples=_decoder_samples,
    cost=_decoder_cost,
)
