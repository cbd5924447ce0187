# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""What a module of unknown origin is made of, read from its children, parameters and forward signature.

    Norm        layer or rms, eps                                     told apart by what the module computes
    Mlp         Linear(s), activation, [norm], Linear                 children in their order, whatever their names
    Attention   qkv (one Linear, three, or nn.MultiheadAttention's), q/k norms, [norm], proj; which RoPE it takes
    Block       norm, attention, norm, MLP; LayerScale, stochastic depth, adaLN modulation

A reading holds names and numbers only, never tensors: it stays true when parameters move, are cast, sharded or loaded,
and can be copied and pickled. It is a guess until the module and its fast form have computed the same (checking.py).
`Unfit` carries the sentence that says why a module that looks like one of these is none.
"""

from __future__ import annotations

import collections
import copy
import inspect
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = [
    "COUNTS",
    "ROPES",
    "Attention",
    "Block",
    "Call",
    "Mlp",
    "Modulation",
    "Norm",
    "Unfit",
    "close",
    "is_linear",
    "plain_class",
    "pristine",
    "read_attention",
    "read_block",
    "read_mlp",
    "reads_as_attention",
    "reads_as_block",
    "reads_as_mlp",
]

ROPES = ("rope", "feat_rope", "freqs_cis")  # arguments that carry positions: a (sin, cos) tensor, a module, complex
COUNTS = ("num_prefix_tokens", "num_latent_tokens")  # tokens before and after those that are rotated
_SPLIT = ("q_proj", "k_proj", "v_proj")
_CLOSE = 1e-5  # relative: foreign norms may compute in fp32 what is handed to them in fp64


class Unfit(Exception):
    """Why a module is not swapped: one sentence."""


def plain_class(module: nn.Module) -> type[nn.Module]:
    """The module's class, or what it was before it was swapped."""
    found: type[nn.Module] = getattr(type(module), "fast_original", type(module))
    return found


def pristine(module: nn.Module, dtype: torch.dtype = torch.float64) -> nn.Module:
    """A copy to try things on, in eval mode: hooks stay behind, and with them whatever they would do or drag along."""
    hooks = [d for m in module.modules() for n, d in m.__dict__.items() if n.endswith("_hooks") and isinstance(d, dict)]
    twin = copy.deepcopy(module, {id(d): collections.OrderedDict() for d in hooks})
    return twin.eval().requires_grad_(False).to(dtype)


@dataclass(frozen=True)
class Call:
    """A forward's parameters: names, and the defaults of the last of them."""

    names: tuple[str, ...]
    defaults: tuple[Any, ...]

    @classmethod
    def of(cls, module: nn.Module) -> Call:
        try:
            found = list(inspect.signature(plain_class(module).forward).parameters.values())[1:]
        except (TypeError, ValueError) as error:
            raise Unfit("its forward has no signature that Python can tell") from error
        named = [p for p in found if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
        if not named:
            raise Unfit("its forward names no argument")
        return cls(tuple(p.name for p in named), tuple(p.default for p in named if p.default is not p.empty))

    @property
    def required(self) -> tuple[str, ...]:
        return self.names[: len(self.names) - len(self.defaults)]

    def bind(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any] | None:
        """Every argument by name, or None for a call that the original has to judge."""
        if len(args) > len(self.names):
            return None
        given = dict(zip(self.names[len(self.required) :], self.defaults))
        given.update(zip(self.names, args))
        for name, value in kwargs.items():
            if name not in self.names:
                return None
            given[name] = value
        return given if len(given) == len(self.names) else None

    def unusual(self, given: dict[str, Any], known: tuple[str, ...]) -> bool:
        """Whether an argument that is none of `known` has another value than its default (a mask, say)."""
        for name, default in zip(self.names[len(self.required) :], self.defaults):
            if name not in known and given[name] is not default and given[name] != default:
                return True
        return False


@dataclass(frozen=True)
class Norm:
    name: str
    kind: str  # "layer" or "rms"
    eps: float


@dataclass(frozen=True)
class Mlp:
    call: Call
    first: tuple[str, ...]  # one Linear, or the gate's and the other
    act: str  # "gelu", "gelu_tanh", "silu"
    gated: bool
    inner: Norm | None
    last: str
    apart: tuple[str, ...]  # children whose own call is skipped: where one is hooked, the original runs


@dataclass(frozen=True)
class Attention:
    call: Call
    layout: str  # "qkv", "split" or "in_proj" (nn.MultiheadAttention)
    heads: int
    head_dim: int
    qk_norm: str
    eps: float
    half: bool  # RoPE turns channels (j, j + head_dim / 2), not (2j, 2j + 1)
    inner: Norm | None
    proj: str
    apart: tuple[str, ...]


@dataclass(frozen=True)
class Modulation:
    """adaLN: `name` makes it from argument `condition`. form "6": shift, scale, gate of each branch; "4": scale, gate;
    "tokens": shift, scale for the last tokens, one row each."""

    name: str
    condition: str
    form: str
    offset: float


@dataclass(frozen=True)
class Block:
    call: Call
    norm1: Norm
    attn: str
    scale1: str | None  # of the branch: "ls1.gamma", "gamma_1"
    drop1: str | None
    norm2: Norm
    mlp: str
    scale2: str | None
    drop2: str | None
    modulation: Modulation | None
    attention: Attention | None  # as far as they were recognised
    feed: Mlp | None
    apart: tuple[str, ...]


# ---- leaves --------------------------------------------------------------------------------------------------------


def is_linear(module: Any) -> bool:
    """An `nn.Linear` and nothing more: no quantised, parametrised or adapted one, whose product is another."""
    kinds = (nn.Linear, nn.modules.linear.NonDynamicallyQuantizableLinear)
    if not isinstance(module, nn.Module) or isinstance(module._parameters.get("weight"), type(None)):
        return False
    kind = plain_class(module)
    ours = kind.__module__.startswith("maetok_fast.layers") and kind.__name__ == "Linear"
    return (kind in kinds or ours) and not hasattr(module, "parametrizations")


def _linear(owner: nn.Module, name: str) -> nn.Linear:
    module = getattr(owner, name, None)
    if not is_linear(module):
        raise Unfit(f"its {name} is {_a(module)}, not an nn.Linear")
    return module  # type: ignore[return-value]


def _a(thing: Any) -> str:
    return "missing" if thing is None else f"a {type(thing).__name__}"


def _idle(module: Any) -> bool:
    """Nothing, or nothing in eval mode: dropout that is active in training sends the call to the original."""
    return module is None or isinstance(module, (nn.Identity, nn.modules.dropout._DropoutNd))


@torch.no_grad()
def _read_norm(owner: nn.Module, name: str, dim: int) -> Norm | None:
    """The norm over the last `dim` channels that a child computes; None for an identity."""
    module = getattr(owner, name, None)
    if module is None or isinstance(module, nn.Identity):
        return None
    own = {n: p for n, p in module.named_parameters() if p is not None}
    if list(module.buffers()) or set(own) - {"weight", "bias"} or any(p.shape != (dim,) for p in own.values()):
        raise Unfit(f"its {name} ({type(module).__name__}) is no norm of {dim} channels with a weight and a bias")
    eps = getattr(module, "eps", getattr(module, "variance_epsilon", None))
    if not isinstance(eps, float) or not eps > 0:
        raise Unfit(f"its {name} ({type(module).__name__}) has no positive number eps")
    generator = torch.Generator().manual_seed(0)
    device = next(iter(own.values())).device if own else torch.device("cpu")
    # as small as the root of eps, which then shows
    x = torch.randn(4, dim, dtype=torch.float64, generator=generator).to(device) * eps**0.5 * 2
    weight, bias = (own[n].double() if n in own else None for n in ("weight", "bias"))
    try:
        y = pristine(module)(x)
    except Exception as error:
        raise Unfit(f"its {name} ({type(module).__name__}) takes no rows of {dim} channels ({error})") from error
    options = {"layer": F.layer_norm(x, (dim,), weight, bias, eps)}
    if bias is None:
        options["rms"] = F.rms_norm(x, (dim,), weight, eps)
    for kind, want in options.items():
        if isinstance(y, Tensor) and y.shape == want.shape and close(y, want):
            return Norm(name, kind, eps)
    raise Unfit(f"its {name} ({type(module).__name__}) is neither a LayerNorm nor an RMSNorm")


def close(got: Tensor, want: Tensor, limit: float = _CLOSE) -> bool:
    """Whether the two differ by less than `limit` of the larger's size, in root mean square."""
    got, want = got.double(), want.double()
    return bool((got - want).norm() <= limit * want.norm())


@torch.no_grad()
def _read_act(module: nn.Module | None, name: str) -> str:
    """The activation that a module computes, by its values."""
    if module is None or list(module.parameters()):
        raise Unfit(f"its {name} is {_a(module)}, no activation that is known")
    x = torch.linspace(-4, 4, 65, dtype=torch.float64)
    try:
        y = pristine(module)(x)
    except Exception as error:
        raise Unfit(f"its {name} ({type(module).__name__}) takes no plain tensor ({error})") from error
    for act, want in (("gelu", F.gelu(x)), ("gelu_tanh", F.gelu(x, approximate="tanh")), ("silu", F.silu(x))):
        if isinstance(y, Tensor) and close(y, want):
            return act
    raise Unfit(f"its {name} is {_a(module)}, and the products here have GELU, tanh-GELU and SiLU behind them")


def _no_others(module: nn.Module, children: set[str], parameters: set[str]) -> None:
    """Everything that a module holds has to be read."""
    for name, child in module._modules.items():
        if name not in children and not _idle(child):
            raise Unfit(f"it has {name}, {_a(child)}, which no fast form of it reads")
    own = [n for n, p in {**module._parameters, **module._buffers}.items() if p is not None]
    for name in own:
        if name not in parameters:
            raise Unfit(f"it has {name}, a parameter or buffer of its own, which no fast form of it reads")


# ---- branches ------------------------------------------------------------------------------------------------------


def reads_as_mlp(module: nn.Module) -> bool:
    names = set(module._modules)
    return {"fc1", "fc2"} <= names or {"w12", "w3"} <= names or {"fc1_g", "fc1_x", "fc2"} <= names or _chain(module)


def _chain(module: nn.Module) -> bool:
    """nn.Sequential(Linear, activation, Linear), with or without dropout."""
    if plain_class(module) is not nn.Sequential:
        return False
    live = [m for m in module._modules.values() if m is not None and not _idle(m)]
    return len(live) == 3 and is_linear(live[0]) and is_linear(live[2]) and not list(live[1].parameters())


def read_mlp(module: nn.Module) -> list[Mlp]:
    """The MLPs that this may be: an activation that is no child is a function, which only the check can tell."""
    live = [(n, m) for n, m in module._modules.items() if not _idle(m) and m is not None]
    linears = [n for n, m in live if is_linear(m)]
    norms = [n for n, m in live if not is_linear(m) and list(m.parameters())]
    acts = [n for n, m in live if not is_linear(m) and not list(m.parameters())]
    _no_others(module, {n for n, _ in live}, set())
    if len(linears) not in (2, 3) or len(norms) > 1 or len(acts) > 1:
        kinds = ", ".join(type(m).__name__ for _, m in live)
        raise Unfit(f"its children ({kinds}) are not two or three nn.Linear, an activation and at most one norm")
    call = Call.of(module)
    if len(call.required) > 1:
        raise Unfit(f"its forward wants {', '.join(call.required)}, and an MLP has one input")
    *first, last = linears
    hidden = getattr(module, last).in_features
    width = sum(getattr(module, n).out_features for n in first)
    if width not in (hidden, 2 * hidden):
        raise Unfit(f"its first layers make {width} features of which the last takes {hidden}")
    gated = width == 2 * hidden
    if acts:
        options = [_read_act(getattr(module, acts[0]), acts[0])]
    else:
        options = ["silu"] if gated else ["gelu", "gelu_tanh", "silu"]
    if gated and options != ["silu"]:
        raise Unfit("its gate is behind another activation than SiLU, which has a fast form")
    inner = _read_norm(module, norms[0], hidden) if norms else None
    apart = tuple(n for n in module._modules if n not in (last, *(() if len(first) == 1 and gated else first)))
    if not gated:
        apart += tuple(first)
    return [Mlp(call, tuple(first), act, gated, inner, last, apart) for act in options]


def reads_as_attention(module: nn.Module) -> bool:
    names = set(module._modules)
    if isinstance(module, nn.MultiheadAttention):
        return True
    return ("qkv" in names or set(_SPLIT) <= names) and bool({"proj", "out_proj"} & names)


def read_attention(module: nn.Module) -> Attention:
    call = Call.of(module)
    if isinstance(module, nn.MultiheadAttention):
        return _read_multihead(module, call)
    others = [n for n in call.required[1:] if n not in (*ROPES, *COUNTS)]
    if others:
        raise Unfit(f"its forward wants {', '.join(others)}")
    layout = "qkv" if module._modules.get("qkv") is not None else "split"
    used = ["qkv"] if layout == "qkv" else list(_SPLIT)
    width = sum(_linear(module, n).out_features for n in used)
    heads = getattr(module, "num_heads", getattr(module, "heads", None))
    if not isinstance(heads, int) or heads < 1 or width % (3 * heads):
        raise Unfit(f"its num_heads is {heads!r}, which does not divide the {width} features of q, k and v")
    if any(getattr(module, n).out_features * len(used) != width for n in used):
        raise Unfit("its q, k and v have not one width (grouped queries)")
    head_dim = width // (3 * heads)
    proj = "proj" if module._modules.get("proj") is not None else "out_proj"
    if _linear(module, proj).in_features != heads * head_dim:
        raise Unfit(f"its {proj} takes {getattr(module, proj).in_features} features, not heads x head_dim")
    q, k = (_read_norm(module, n, head_dim) for n in ("q_norm", "k_norm"))
    if (q is None) != (k is None) or (q and k and replace(q, name=k.name) != k):
        raise Unfit("its q_norm and k_norm are not alike")
    inner = [n for n in ("norm", "inner_attn_ln", "scale_norm") if module._modules.get(n) is not None]
    _no_others(
        module, {*used, proj, "q_norm", "k_norm", *inner}, {"q_bias", "k_bias", "v_bias"} if layout == "qkv" else set()
    )
    return Attention(
        call,
        layout,
        heads,
        head_dim,
        "none" if q is None else q.kind,
        1e-6 if q is None else q.eps,
        bool(getattr(module, "rotate_half", False)),
        _read_norm(module, inner[0], heads * head_dim) if inner else None,
        proj,
        tuple(n for n in module._modules if n not in (*used, proj)),
    )


def _read_multihead(module: nn.MultiheadAttention, call: Call) -> Attention:
    if plain_class(module) is not nn.MultiheadAttention:
        raise Unfit("it is a subclass of nn.MultiheadAttention, whose forward may be another")
    if not module._qkv_same_embed_dim or module.bias_k is not None or module.add_zero_attn:
        raise Unfit("its keys or values have a width, a bias or a zero of their own")
    head_dim = module.embed_dim // module.num_heads
    _linear(module, "out_proj")
    return Attention(call, "in_proj", module.num_heads, head_dim, "none", 1e-6, False, None, "out_proj", ())


# ---- blocks --------------------------------------------------------------------------------------------------------

_NORMS = (("norm1", "norm2"), ("ln_1", "ln_2"))
_SCALES = (("ls1.gamma", "ls2.gamma"), ("gamma_1", "gamma_2"))
_DROPS = (("drop_path1", "drop_path2"), ("drop_path", "drop_path"))


def reads_as_block(module: nn.Module) -> bool:
    names = set(module._modules)
    return {"attn", "mlp"} <= names and any(set(pair) <= names for pair in _NORMS)


def read_block(module: nn.Module, parts: dict[nn.Module, Any]) -> list[Block]:
    """The blocks that this may be, for the check to choose one. parts: what its children were recognised as."""
    names = set(module._modules)
    first, second = next(pair for pair in _NORMS if set(pair) <= names)
    call = Call.of(module)
    attn, mlp = module._modules["attn"], module._modules["mlp"]
    attention, feed = parts.get(attn), parts.get(mlp)  # type: ignore[arg-type]
    attention = attention if isinstance(attention, Attention) else None
    feed = feed if isinstance(feed, Mlp) else None
    if attention is None and feed is None:
        raise Unfit("neither its attention nor its MLP was recognised")
    dim = _width(module, attention, feed)
    norms = [_read_norm(module, n, dim) for n in (first, second)]
    if norms[0] is None or norms[1] is None:
        raise Unfit(f"its {first} or {second} is an identity")
    scales = [next((n for n in pair if _vector(module, n, dim)), None) for pair in zip(*_SCALES)]
    drops = [next((n for n in pair if not _idle(module._modules.get(n))), None) for pair in zip(*_DROPS)]
    kept = {first, second, "attn", "mlp", *filter(None, drops)}
    kept |= {n.partition(".")[0] for n in scales if n is not None}
    others = call.names[1:]
    if "adaLN_modulation" in names:
        kept.add("adaLN_modulation")
        if len(call.names) < 2 or scales != [None, None]:
            raise Unfit("it has adaLN_modulation and no condition to make it of, or LayerScale beside it")
        others = others[1:]
    if any(n in call.required and n not in (*ROPES, *COUNTS) for n in others):
        raise Unfit(f"its forward wants {', '.join(call.required)}")
    _no_others(module, kept, {n for n in scales if n is not None})
    apart = (first, second, *(n.partition(".")[0] for n in scales if n is not None and "." in n))
    block = Block(
        call, norms[0], "attn", scales[0], drops[0], norms[1], "mlp", scales[1], drops[1], None, attention, feed, apart
    )
    if "adaLN_modulation" not in names:
        return [block]
    return [replace(block, modulation=m) for m in _modulations(module, call, dim)]


def _modulations(module: nn.Module, call: Call, dim: int) -> list[Modulation]:
    made = module._modules["adaLN_modulation"]
    linears = [m for m in made.modules() if isinstance(m, nn.Linear)]  # type: ignore[union-attr]
    width = linears[-1].out_features if linears else 0
    parts = width // dim if width % dim == 0 else 0
    forms = {6: [("6", 1.0)], 4: [("4", 1.0), ("tokens", 0.0), ("tokens", 1.0)]}.get(parts)
    if forms is None:
        raise Unfit(f"its adaLN_modulation makes {width} numbers, not 4 or 6 times {dim}")
    return [Modulation("adaLN_modulation", call.names[1], form, offset) for form, offset in forms]


def _width(module: nn.Module, attention: Attention | None, feed: Mlp | None) -> int:
    if feed is not None:
        return int(getattr(module.mlp, feed.last).out_features)
    assert attention is not None
    return int(getattr(module.attn, attention.proj).out_features)


def _vector(module: nn.Module, path: str, dim: int) -> bool:
    """Whether a parameter (dim,) stands there; ls1's alone in its module."""
    owner, _, name = path.rpartition(".")
    holder = module._modules.get(owner) if owner else module
    if holder is None or (owner and len(list(holder.parameters())) != 1):
        return False
    value = holder._parameters.get(name)
    return value is not None and value.shape == (dim,)
