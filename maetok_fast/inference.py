# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""`prepare(model)`: a model made ready to run fast, with the same API and the same results to rounding.

    SiT, LightningDiT ──┐            ┌── PreparedGenerator   (x, t, y) -> v;  plan(ts, y), step(plan, i, x)
                        ├─ prepare ──┤
    MAETok ─────────────┘            └── PreparedTokenizer   encode, decode

`_rebuild` walks the model and returns a second one that runs the models' own code over other leaves:

    every model      weights cast once to the compute dtype and, on the CPU, packed for oneDNN (kernels/linear.py);
                     GELU / SiLU in the GEMM's epilogue or one native pass; RoPE tables made once per resolution
    generators       `plan` computes the adaLN modulations of many (t, label) pairs in one GEMM per block: a third of
                     SiT-XL's weights is then read once per chunk of steps and not once per step, and equal labels
                     (the null class of a guided batch) share one row per step
    tokenizer        LayerScale folded into the weights before it; the residual added in the GEMM's epilogue; the
                     decoder's first block normalises and projects its N identical image tokens once (row 1 of N)
                     and, as in the models themselves, last blocks compute only the tokens that are read

Not supported: gradients, training-time label dropout and stochastic depth (the prepared model is in eval mode), state
dicts, copy.deepcopy and pickling, `.to(device)`, torch.compile over packed weights. The original model is neither
changed nor freed; the prepared one is a snapshot with its own weights: prepare again after training on. An enclosing
autocast changes nothing, the dtype is `prepare`'s. On CUDA nothing is packed: the same structure runs eagerly over the
dense weights in the chosen dtype.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from maetok_fast.kernels import rope_attention
from maetok_fast.kernels.linear import PackedLinear
from maetok_fast.layers import Mlp, SwiGLU, TimestepEmbedder
from maetok_fast.models._checks import check_label_range, check_tensor
from maetok_fast.models.sit import DiffusionTransformer, Modulations
from maetok_fast.models.tokenizer import Decoder, Encoder, MAETok
from maetok_fast.models.vit import Block, MoVQBlock
from maetok_fast.precision import Precision, resolve

__all__ = ["Plan", "PreparedGenerator", "PreparedTokenizer", "prepare"]

# Rows of modulations held at once: 200 MB of bf16 for SiT-XL, and enough rows to keep a GEMM at full rate.
PLAN_ROWS = 512
# Layers narrower than this gain nothing from packing (quant_conv, the latents' modulations) and stay nn.Linear.
PACK_WIDTH = 64


def prepare(model: nn.Module, dtype: torch.dtype | str | Precision = torch.bfloat16) -> Any:
    """A fast inference form of a SiT, LightningDiT or MAETok on the device that the model is on.

    dtype: compute and weight precision, torch dtype or name ("bf16", "fp32"; "fp16" on CUDA).
    Inputs may have any floating dtype, outputs come back in it. TypeError for other models, ValueError for precisions
    that the device or this function lacks.
    """
    if not isinstance(model, (DiffusionTransformer, MAETok)):
        raise TypeError(
            f"prepare knows SiT, LightningDiT and MAETok, not {type(model).__name__}; pass one of these models"
        )
    device = next(model.parameters()).device
    precision = resolve(dtype, device)
    if precision.name == "fp8":
        raise ValueError("prepare computes in fp32, bf16 or fp16, fp8 is for training; pass dtype='bf16'")
    with torch.no_grad():
        rebuilt = _rebuild(model, precision.dtype).eval()
    return (PreparedTokenizer if isinstance(model, MAETok) else PreparedGenerator)(rebuilt, precision.dtype)


# ---- what the caller holds -----------------------------------------------------------------------------------------


class _Prepared:
    def __init__(self, model: Any, dtype: torch.dtype) -> None:
        self.model, self.dtype = model, dtype
        self.config = model.config

    def _input(self, name: str, x: Tensor) -> Tensor:
        if not isinstance(x, Tensor) or not x.is_floating_point():
            got = x.dtype if isinstance(x, Tensor) else type(x).__name__
            raise TypeError(f"{name}: expected a floating-point tensor, got {got}")
        if x.requires_grad and torch.is_grad_enabled():
            raise RuntimeError(
                f"{name} requires grad, but a prepared model computes no gradients; use the model itself"
            )
        return x.to(self.dtype)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.config}, {self.dtype})"


@contextlib.contextmanager
def _computing(device: torch.device) -> Iterator[None]:
    """No gradients, and no autocast: packed layers take exactly the prepared dtype."""
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        yield


class Plan:
    """What `PreparedGenerator.plan` returns: steps ts (S,), labels without repeats, and the modulations of one chunk of
    at most `PLAN_ROWS` (step, label) rows, which `step` replaces as it goes."""

    def __init__(self, ts: Tensor, y: Tensor) -> None:
        self.ts, self.batch = ts, len(y)
        self.labels, rows = y.unique(return_inverse=True)
        # equal to 0 .. B-1: one step's rows are then a slice of the chunk and nothing is gathered
        self.rows = None if torch.equal(rows, torch.arange(len(y), device=y.device)) else rows
        self.chunk_steps = max(1, PLAN_ROWS // len(self.labels))
        self.first = -1
        self.modulations: Modulations | None = None

    def of_step(self, i: int) -> Modulations:
        """The modulations (B, ...) of step i, which must lie in the chunk held."""
        assert self.modulations is not None
        start = (i - self.first) * len(self.labels)
        if self.rows is None:
            return self.modulations.rows(slice(start, start + len(self.labels)))
        return self.modulations.rows(start + self.rows)


class PreparedGenerator(_Prepared):
    """A SiT or LightningDiT made fast. Called like the model; samplers use `plan` and `step`."""

    def __call__(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """Velocity of latents x (B, L, C) or (B, C, H, W) at times t (B,) in [0, 1] for labels y (B,), in x's dtype."""
        inputs = self._input("x", x)
        with _computing(x.device):
            return self.model(inputs, t, y).to(x.dtype)

    def plan(self, ts: Tensor, y: Tensor) -> Plan:
        """Prepare steps at times ts (S,) for the labels y (B,) of one forward, null labels included.

        Memory: the modulations of at most `PLAN_ROWS` (step, unique label) pairs, or of one step if it has more.
        """
        if ts.ndim != 1 or not ts.is_floating_point():
            raise ValueError(f"ts must be floating-point times of shape (S,), got {ts.dtype} {tuple(ts.shape)}")
        if y.ndim != 1 or len(y) == 0:
            raise ValueError(f"y must be labels of shape (B,) with B >= 1, got {tuple(y.shape)}")
        check_label_range(y, self.config)
        return Plan(ts.to(y.device), y)

    def step(self, plan: Plan, i: int, x: Tensor) -> Tensor:
        """Velocity of x (B, ...) at time plan.ts[i] for the plan's labels; equals `self(x, ts[i], y)` to rounding."""
        if not 0 <= i < len(plan.ts):
            raise IndexError(f"step {i} is not one of the plan's {len(plan.ts)} steps")
        inputs = self._input("x", x)
        check_tensor("x", x, (plan.batch, *x.shape[1:]))
        with _computing(x.device):
            if plan.modulations is None or not plan.first <= i < plan.first + plan.chunk_steps:
                plan.modulations = None  # free the last chunk before the next is made
                plan.first = i // plan.chunk_steps * plan.chunk_steps
                ts = plan.ts[plan.first : plan.first + plan.chunk_steps]
                t = ts.float().repeat_interleave(len(plan.labels))
                plan.modulations = self.model.modulations(self.model.condition(t, plan.labels.repeat(len(ts))))
            return self.model.forward_modulated(inputs, plan.of_step(i)).to(x.dtype)


class PreparedTokenizer(_Prepared):
    """A MAETok made fast."""

    def encode(self, images: Tensor, mask: Tensor | None = None) -> Tensor:
        """images (B, 3, H, W) in [-1, 1] -> latents (B, L, H); see `MAETok.encode`."""
        inputs = self._input("images", images)
        with _computing(images.device):
            return self.model.encode(inputs, mask).to(images.dtype)

    def decode(self, latents: Tensor, size: int | tuple[int, int] | None = None) -> Tensor:
        """latents (B, L, H) -> images (B, 3, height, width), not clamped; see `MAETok.decode`."""
        inputs = self._input("latents", latents)
        with _computing(latents.device):
            return self.model.decode(inputs, size).to(latents.dtype)

    def __call__(self, images: Tensor, mask: Tensor | None = None) -> Tensor:
        """Reconstruction of images (B, 3, H, W)."""
        return self.decode(self.encode(images, mask), (images.shape[2], images.shape[3]))


# ---- the walk ------------------------------------------------------------------------------------------------------


def _rebuild(module: nn.Module, dtype: torch.dtype) -> Any:
    """The same module over prepared leaves; types without a rule are cloned, their children rebuilt."""
    for kind, rule in _RULES.items():
        if isinstance(module, kind):
            return rule(module, dtype)
    return _clone(module, dtype)


def _clone(module: Any, dtype: torch.dtype, rebuild: Callable[[nn.Module, torch.dtype], Any] = _rebuild) -> Any:
    """A second module of the same class and settings: parameters copied, frozen and cast, children rebuilt."""
    clone = module.__class__.__new__(module.__class__)
    clone.__dict__.update({k: v.copy() if isinstance(v, dict) else v for k, v in module.__dict__.items()})
    for name, p in module._parameters.items():
        # RoPE frequencies are multiplied by positions up to 31: their angles need fp32
        wanted = torch.float32 if name == "freqs" else dtype
        clone._parameters[name] = (
            None if p is None else nn.Parameter(p.detach().to(wanted, copy=True), requires_grad=False)
        )
    for name, child in module._modules.items():
        clone._modules[name] = None if child is None else rebuild(child, dtype)
    return clone


def _plain(module: nn.Module, dtype: torch.dtype) -> Any:
    """Cast, with nothing packed below."""
    return _clone(module, dtype, _plain)


def _linear(module: nn.Linear, dtype: torch.dtype) -> Any:
    if min(module.weight.shape) < PACK_WIDTH:
        return _plain(module, dtype)
    return PackedLinear.of(module, dtype=dtype)


class _PackedMlp(nn.Module):
    """act in fc1's epilogue; `add` is a residual, added in fc2's."""

    def __init__(self, mlp: Mlp, dtype: torch.dtype, gamma: Tensor | None = None) -> None:
        super().__init__()
        self.fc1 = PackedLinear.of(mlp.fc1, "gelu_tanh" if mlp.approximate == "tanh" else "gelu", dtype=dtype)
        self.fc2 = _scaled(mlp.fc2, gamma, dtype)

    def forward(self, x: Tensor, add: Tensor | None = None) -> Tensor:
        return self.fc2(self.fc1(x), add=add)


class _PackedSwiGLU(nn.Module):
    """w12 as two layers, so that silu(a) * b is the second one's epilogue."""

    def __init__(self, mlp: SwiGLU, dtype: torch.dtype) -> None:
        super().__init__()
        (wa, wb), (ba, bb) = mlp.w12.weight.chunk(2), mlp.w12.bias.chunk(2)
        self.a = PackedLinear(wa, ba, "silu", dtype=dtype)
        self.b = PackedLinear(wb, bb, dtype=dtype)
        self.w3 = PackedLinear.of(mlp.w3, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.w3(self.b(x, mul=self.a(x)))


def _scaled(linear: nn.Linear, gamma: Tensor | None, dtype: torch.dtype) -> PackedLinear:
    """gamma * linear(x) as one layer; the product is rounded once."""
    if gamma is None:
        return PackedLinear.of(linear, dtype=dtype)
    wide = torch.promote_types(torch.float32, linear.weight.dtype)
    gamma = gamma.to(wide)
    bias = None if linear.bias is None else linear.bias.to(wide) * gamma
    return PackedLinear(linear.weight.to(wide) * gamma[:, None], bias, dtype=dtype)


def _split(linear: nn.Linear, count: int, dtype: torch.dtype) -> nn.ModuleList:
    """One layer per equal part of the output: each part comes out contiguous instead of being copied."""
    parts = nn.ModuleList()
    for weight, bias in zip(linear.weight.chunk(count), linear.bias.chunk(count), strict=True):
        part = nn.Linear(weight.shape[1], weight.shape[0], device="meta")
        part.weight = nn.Parameter(weight.detach().to(dtype, copy=True), requires_grad=False)
        part.bias = nn.Parameter(bias.detach().to(dtype, copy=True), requires_grad=False)
        parts.append(part)
    return parts


class _ViTBlock(nn.Module):
    """Both block kinds of the tokenizer: plain (LayerScale folded into proj and fc2) and MoVQ (latents modulate)."""

    def __init__(self, block: Block | MoVQBlock, dtype: torch.dtype) -> None:
        super().__init__()
        attention_scale = mlp_scale = self.parts = None
        if isinstance(block, MoVQBlock):
            self.parts = _split(cast(nn.Linear, block.adaLN_modulation[1]), 4, dtype)
        else:
            attention_scale, mlp_scale = block.ls1.gamma, block.ls2.gamma
        self.norm1, self.norm2 = _clone(block.norm1, dtype), _clone(block.norm2, dtype)
        self.heads, self.head_dim = block.attn.num_heads, block.attn.head_dim
        self.qkv = PackedLinear.of(block.attn.qkv, dtype=dtype)
        self.proj = _scaled(block.attn.proj, attention_scale, dtype)
        self.mlp = _PackedMlp(block.mlp, dtype, mlp_scale)

    def forward(
        self, x: Tensor, rope: Tensor | None, prefix: int, latents: Tensor, keep: slice | None, identical: int = 1
    ) -> Tensor:
        """As the models' blocks. identical > 1: the tokens prefix .. prefix + identical - 1 are all the same."""
        batch, tokens, _ = x.shape
        first, stop = (0, tokens) if keep is None else (keep.start, keep.stop)
        shifts_scales: list[Any] = [None] * 4
        if self.parts is not None:
            activated = F.silu(latents)
            # pruned to the image tokens, a last block has no modulated token at its second norm
            shifts_scales[: 4 if stop == tokens else 2] = [
                part(activated) for part in self.parts[: 4 if stop == tokens else 2]
            ]
        after = prefix + identical
        rows = x if identical == 1 else torch.cat([x[:, : prefix + 1], x[:, after:]], dim=1)
        qkv = self.qkv(self._norm(self.norm1, rows, *shifts_scales[:2]))
        if identical > 1:
            same = qkv[:, prefix : prefix + 1].expand(-1, identical, -1)
            qkv = torch.cat([qkv[:, :prefix], same, qkv[:, prefix + 1 :]], dim=1)
        y = rope_attention(
            qkv.view(batch, tokens, 3, self.heads, self.head_dim),
            rope,
            prefix=prefix,
            first_query=first,
            num_queries=stop - first,
        )
        x = self.proj(y, add=x[:, first:stop])
        return self.mlp(self._norm(self.norm2, x, *shifts_scales[2:]), add=x)

    def _norm(self, norm: nn.Module, x: Tensor, shift: Tensor | None, scale: Tensor | None) -> Tensor:
        return norm(x) if scale is None else norm(x, shift, scale, offset=0.0)


class _Decoder(nn.Module):
    """The decoder with its first block aware of the identical mask tokens."""

    def __init__(self, decoder: Decoder, dtype: torch.dtype) -> None:
        super().__init__()
        self.inner = _constant_rope(_clone(decoder, dtype))

    def forward(self, z: Tensor, latents: Tensor, grid: tuple[int, int]) -> Tensor:
        inner = self.inner
        x = inner.embed(z, grid)
        prefix, count = inner.prefix, grid[0] * grid[1]
        # absolute positions tell the mask tokens apart, and without latent tokens there are none
        identical = count if inner.num_latent_tokens and inner.position != "absolute" else 1
        tables = inner.rope(grid)
        for i, (block, rope) in enumerate(zip(inner.model.blocks, tables)):
            keep = slice(prefix, prefix + count) if i == len(tables) - 1 else None
            x = block(x, rope, prefix, latents, keep, identical if i == 0 else 1)
        return inner.head(x, latents, grid)


def _constant_rope(clone: Any) -> Any:
    """Tables are constants of the weights and the resolution: keep those of the last few resolutions."""
    clone.rope = functools.lru_cache(maxsize=4)(clone.rope)
    return clone


_RULES: dict[type, Callable[[Any, torch.dtype], Any]] = {
    nn.Linear: _linear,
    TimestepEmbedder: _plain,
    Mlp: _PackedMlp,
    SwiGLU: _PackedSwiGLU,
    Block: _ViTBlock,
    MoVQBlock: _ViTBlock,
    Decoder: _Decoder,
    Encoder: lambda module, dtype: _constant_rope(_clone(module, dtype)),
    DiffusionTransformer: lambda module, dtype: _constant_rope(_clone(module, dtype)),
}
