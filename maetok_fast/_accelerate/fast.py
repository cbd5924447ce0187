# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""The fast forms of foreign modules: `become(module, kind, reading)` exchanges a module's class, and nothing else.

    class FastBlock(Block's own class)      parameters, buffers, children, hooks, names, isinstance: as they were
        forward      by the ops, where it can be sure to compute the same; else the original's forward:
                     masks, dropout in training, a hook on a child whose own call would be skipped, unusual arguments
        restored     by exchanging the class once more

    FastLinear      the `linear` op where that trains faster, with an activation behind it
    FastMlp         Linear -> GELU in one, SwiGLU, a norm in between
    FastAttention   rope_attention from the packed qkv; FastMultihead: the same of nn.MultiheadAttention
    FastBlock       norms with modulation, residuals and the norm behind them in one pass
    FastRotary      LightningDiT's rotation, whose table FastAttention takes instead of calling it

The weights for inference that packed.py adds lie beside, in `_fast_packed`, which copies and pickles leave out.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from maetok_fast._accelerate import reading
from maetok_fast._accelerate.reading import COUNTS, ROPES, Norm
from maetok_fast.kernels import adaln, gate_residual, residual_adaln, rope_attention, swiglu
from maetok_fast.layers import linear_act, read_dtype

__all__ = [
    "Fast",
    "FastAttention",
    "FastBlock",
    "FastLinear",
    "FastMlp",
    "FastMultihead",
    "FastRotary",
    "become",
    "unbecome",
]


class Fast:
    """What the fast classes have before the original in their order of bases."""

    fast_original: ClassVar[type[nn.Module]]
    fast_kind: ClassVar[type[Fast]]
    _fast_reading: Any

    def __reduce_ex__(self, protocol: Any) -> Any:
        found: Any = super().__reduce_ex__(max(2, protocol))
        _, args, state, *rest = found
        state = {k: v for k, v in state.items() if k != "_fast_packed"}
        return (_remake, (self.fast_kind, self.fast_original, *args[1:]), state, *rest)


_classes: dict[tuple[Any, Any], Any] = {}


def _class(kind: type[Fast], original: type[nn.Module]) -> Any:
    """The class that is both; one for each pair."""
    if (kind, original) not in _classes:
        body = {"fast_original": original, "fast_kind": kind, "__module__": kind.__module__, "__doc__": kind.__doc__}
        _classes[kind, original] = type(f"{kind.__name__}Of{original.__name__}", (kind, original), body)
    return _classes[kind, original]


def _remake(kind: type[Fast], original: type[nn.Module], *args: Any) -> Any:
    made = _class(kind, original)
    return made.__new__(made, *args)


def become(module: nn.Module, kind: type[Fast], what: Any) -> None:
    """Exchanges the class; `what` is the reading that the kind wants."""
    module.__class__ = _class(kind, type(module))
    module.__dict__["_fast_reading"] = what


def unbecome(module: Any) -> None:
    """The class that it had. TypeError where another one was laid over it since (`fully_shard`)."""
    if type(module) is not _class(module.fast_kind, module.fast_original):
        raise TypeError(
            f"restore: {type(module).__name__} was made of an accelerated module since; restore before that is done"
        )
    module.__class__ = module.fast_original
    for name in ("_fast_reading", "_fast_packed", "_fast_target"):
        module.__dict__.pop(name, None)


_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def leaves_to_original(module: nn.Module, apart: tuple[str, ...]) -> bool:
    """Whether a child whose own call would be skipped is hooked, or drops something now."""
    for name in apart:
        child = module._modules.get(name)
        if child is not None and any(getattr(child, hooks) for hooks in _HOOKS):
            return True
    if module.training:
        for child in module._modules.values():
            if isinstance(child, nn.modules.dropout._DropoutNd) and child.p > 0 and child.training:
                return True
    return False


def norm_values(
    owner: nn.Module, norm: Norm, shift: Tensor | None = None, scale: Tensor | None = None, offset: float = 1.0
) -> tuple[Any, Any, Any, Any, float, float]:
    """(shift, scale, weight, bias, eps, offset) of the child's norm, as the ops that normalise take them."""
    module = owner._modules[norm.name]
    return shift, scale, getattr(module, "weight", None), getattr(module, "bias", None), norm.eps, offset


def normed(owner: nn.Module, norm: Norm, x: Tensor, *modulation: Any) -> Tensor:
    """The child's norm of x (B, N, D). modulation: shift, scale, offset."""
    return adaln(x, *norm_values(owner, norm, *modulation), read_dtype(x), norm.kind)


# ---- leaves --------------------------------------------------------------------------------------------------------


class FastLinear(Fast):
    """nn.Linear, with an activation behind it where a FastMlp asks for one."""

    weight: Tensor
    bias: Tensor | None

    def forward(self, x: Tensor, act: str = "none") -> Tensor:
        return linear_act(x, self.weight, self.bias, act)


class FastRotary(Fast):
    """freqs_cos, freqs_sin (N, head_dim), each number twice: x cos + (pairs turned by 90 degrees) sin."""

    def table(self) -> Tensor:
        """`rope_attention`'s (2, 1, N, head_dim / 2)."""
        return torch.stack([self.freqs_cos[:, ::2], self.freqs_sin[:, ::2]]).unsqueeze(1)  # type: ignore[attr-defined]


class FastMlp(Fast):
    """An MLP of any naming; reading.Mlp."""

    _fast_reading: reading.Mlp

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        part: reading.Mlp = self._fast_reading
        given = part.call.bind(args, kwargs)
        x = None if given is None else given[part.call.names[0]]
        if (
            given is None
            or not isinstance(x, Tensor)
            or part.call.unusual(given, part.call.names[:1])
            or (part.inner is not None and x.ndim != 3)
            or leaves_to_original(self, part.apart)
        ):
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        first = self._modules[part.first[0]]
        if not part.gated:
            h = linear_act(x, first.weight, first.bias, part.act)
        elif len(part.first) == 1:
            h = swiglu(first(x))
        else:
            h = F.silu(first(x)) * self._modules[part.first[1]](x)
        if part.inner is not None:
            h = normed(self, part.inner, h)
        return self._modules[part.last](h)


# ---- attention -----------------------------------------------------------------------------------------------------


def interleaved(x: Tensor) -> Tensor:
    """Channels (..., [0 .. F-1 | F .. 2F-1]) as pairs (0, F), (1, F+1), ...: a rotation of halves becomes one of
    neighbours, and q k^T stays what it was."""
    return x.unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2)


def rotation(
    module: Any, part: reading.Attention, given: dict[str, Any], tokens: int
) -> tuple[Tensor | None, int] | None:
    """(the table of `rope_attention` or None, the prefix) that a call's arguments mean; None: ask the original."""
    name = next((n for n in part.call.names if n in ROPES), None)
    value = None if name is None else given[name]
    if value is None:
        return None, 0
    counts = [given.get(n, 0) for n in COUNTS]
    if isinstance(value, FastRotary):
        table, rows = value.table(), tokens
    elif not isinstance(value, Tensor) or value.ndim not in (2, 3):
        return None
    elif value.is_complex():
        table, rows = torch.view_as_real(value).movedim(-1, 0), tokens - sum(counts)
    elif hasattr(module, "num_prefix_tokens"):
        counts = [module.num_prefix_tokens, 0]
        rows, pairs = tokens - counts[0], part.head_dim // 2
        sin, cos = value.chunk(2, dim=-1)
        table = torch.stack([t[..., :pairs] if part.half else t[..., ::2] for t in (cos, sin)])
    else:
        return None
    table = table if table.ndim == 4 else table.unsqueeze(1)
    if table.shape[1] not in (1, part.heads) or table.shape[2:] != (rows, part.head_dim // 2):
        return None
    return table if table.dtype == torch.float64 else table.float(), counts[0]


def attended(
    module: Any, part: reading.Attention, qkv: Tensor, turned: tuple[Tensor | None, int], paired: bool = False
) -> Tensor:
    """qkv (B, N, 3 * heads * head_dim) -> (B, N, heads * head_dim). paired: halves are pairs already."""
    qkv = qkv.unflatten(-1, (3, part.heads, part.head_dim))
    affine: Any = [None] * 4
    if part.qk_norm != "none":
        affine = [getattr(module._modules[n], w, None) for n in ("q_norm", "k_norm") for w in ("weight", "bias")]
    if part.half and (paired or turned[0] is not None):
        if not paired:
            qkv = torch.cat([interleaved(qkv[:, :, :2]), qkv[:, :, 2:]], 2)
        affine = [None if v is None else interleaved(v) for v in affine]
    table, prefix = turned
    q, qb, k, kb = affine
    return rope_attention(qkv, table, q, qb, k, kb, prefix, part.qk_norm, part.eps)


def qkv_bias(module: Any, part: reading.Attention) -> Tensor | None:
    """The bias of the packed qkv: EVA holds those of q and v apart."""
    if part.layout == "in_proj":
        return module.in_proj_bias
    if part.layout == "split":
        own = [module._modules[n] for n in ("q_proj", "k_proj", "v_proj")]
        if all(m.bias is None for m in own):
            return None
        return torch.cat([m.weight.new_zeros(m.out_features) if m.bias is None else m.bias for m in own])
    if getattr(module, "q_bias", None) is not None:
        return torch.cat((module.q_bias, module.k_bias, module.v_bias))
    return module._modules["qkv"].bias


class FastAttention(Fast):
    """Attention of timm's kinds and their relatives; reading.Attention."""

    _fast_reading: reading.Attention

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        part: reading.Attention = self._fast_reading
        given = part.call.bind(args, kwargs)
        x = None if given is None else given[part.call.names[0]]
        if (
            given is None
            or not isinstance(x, Tensor)
            or x.ndim != 3
            or part.call.unusual(given, (part.call.names[0], *ROPES, *COUNTS))
            or leaves_to_original(self, part.apart)
        ):
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        turned = rotation(self, part, given, x.shape[1])
        if turned is None:
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        out = attended(self, part, _qkv(self, part, x), turned)
        if part.inner is not None:
            out = normed(self, part.inner, out)
        return self._modules[part.proj](out)


def _qkv(module: Any, part: reading.Attention, x: Tensor) -> Tensor:
    if part.layout == "split":
        return torch.cat([module._modules[n](x) for n in ("q_proj", "k_proj", "v_proj")], -1)
    qkv = module._modules["qkv"]
    if getattr(module, "q_bias", None) is None:
        return qkv(x)
    return linear_act(x, qkv.weight, qkv_bias(module, part))


class FastMultihead(Fast):
    """nn.MultiheadAttention as self-attention without weights or masks; what else it is asked, the original does."""

    _fast_reading: reading.Attention

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        part: reading.Attention = self._fast_reading
        given = part.call.bind(args, kwargs)
        if given is None or not alone(self, given):
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        x = given["query"] if self.batch_first else given["query"].transpose(0, 1)
        qkv = linear_act(x, self.in_proj_weight, self.in_proj_bias)
        out = self.out_proj(attended(self, part, qkv, (None, 0)))
        return (out if self.batch_first else out.transpose(0, 1)), None


def alone(module: Any, given: dict[str, Any]) -> bool:
    """Whether a call of nn.MultiheadAttention is plain self-attention."""
    x = given["query"]
    plain = given["key"] is x and given["value"] is x and not given["need_weights"] and not given["is_causal"]
    plain = plain and given["attn_mask"] is None and given["key_padding_mask"] is None
    return bool(plain and x.ndim == 3 and not (module.training and module.dropout > 0))


# ---- blocks --------------------------------------------------------------------------------------------------------


def vector(module: nn.Module, path: str | None) -> Tensor | None:
    """The LayerScale that stands at `path`."""
    if path is None:
        return None
    owner, _, name = path.rpartition(".")
    return (module._modules[owner] if owner else module)._parameters[name]  # type: ignore[union-attr]


class FastBlock(Fast):
    """A pre-norm transformer block; reading.Block."""

    _fast_reading: reading.Block

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        part: reading.Block = self._fast_reading
        given = part.call.bind(args, kwargs)
        passed = None if given is None else handed_on(self, part, given)
        if given is None or passed is None or leaves_to_original(self, part.apart):
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        x, offset = given[part.call.names[0]], 1.0 if part.modulation is None else part.modulation.offset
        gate1, gate2 = vector(self, part.scale1), vector(self, part.scale2)
        shift1 = scale1 = shift2 = scale2 = None
        if part.modulation is not None:
            shift1, scale1, gate1, shift2, scale2, gate2 = modulations(self, part, given)
        branch = self._attend(normed(self, part.norm1, x, shift1, scale1, offset), passed)
        branch = self._dropped(part.drop1, branch)
        norm2 = norm_values(self, part.norm2, shift2, scale2, offset)
        x, y = residual_adaln(x, branch, gate1, *norm2, read_dtype(x), part.norm2.kind)
        branch = self._dropped(part.drop2, self._modules[part.mlp](y))
        return x + branch if gate2 is None else gate_residual(x, gate2, branch)

    def _attend(self: Any, y: Tensor, passed: dict[str, Any]) -> Tensor:
        attn = self._modules[self._fast_reading.attn]
        if isinstance(attn, nn.MultiheadAttention):
            return attn(y, y, y, need_weights=False)[0]
        return attn(y, **passed)

    def _dropped(self: Any, name: str | None, branch: Tensor) -> Tensor:
        return branch if name is None or not self.training else self._modules[name](branch)


def handed_on(module: Any, part: reading.Block, given: dict[str, Any]) -> dict[str, Any] | None:
    """The arguments that the block's attention gets beside its input; None: ask the original."""
    x = given[part.call.names[0]]
    if not isinstance(x, Tensor) or x.ndim != 3:
        return None
    condition = None if part.modulation is None else part.modulation.condition
    if part.modulation is not None:
        c = given[part.modulation.condition]
        per_token = part.modulation.form == "tokens"
        if not isinstance(c, Tensor) or c.ndim != 2 + per_token:
            return None
        if per_token and given.get("num_latent_tokens", c.shape[1]) != c.shape[1]:
            return None
    wanted = () if part.attention is None else part.attention.call.names
    passed = {}
    for name in part.call.names[1:]:
        value = given[name]
        if name == condition:
            continue
        to = name if name in wanted else next((n for n in ROPES if n in wanted), "") if name in ROPES else ""
        if to:
            passed[to] = value
        elif value is not None and value is not False and name not in COUNTS:
            return None
    return passed


def modulations(module: Any, part: reading.Block, given: dict[str, Any]) -> tuple[Tensor | None, ...]:
    """(shift, scale, gate) of the attention, then of the MLP."""
    assert part.modulation is not None
    made = module._modules[part.modulation.name](given[part.modulation.condition])
    if part.modulation.form == "6":
        return tuple(made.chunk(6, dim=-1))
    a, b, c, d = made.chunk(4, dim=-1)
    return (None, a, b, None, c, d) if part.modulation.form == "4" else (a, b, None, c, d, None)
