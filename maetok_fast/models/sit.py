# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""SiT: the diffusion transformer on latents (Scalable Interpolant Transformers, arXiv 2401.08740).

    x (B, L, C) or (B, C, H, W)                  t (B,)      y (B,)
      │ Linear, or patches through a conv          │ 256 features [cos | sin], MLP
      │ + fixed sin/cos positions                  │           │ label table, null class = num_classes
      │                                            └── c = t + y (B, D) ──┘
      │                                                 │ SiLU, one Linear per block
      │ depth x:                                        ▼
      │   x += gate * attn(norm(x) * (1 + scale) + shift)      modulations: per block (B, 6D), final (B, 2D)
      │   x += gate * mlp(norm(x) * (1 + scale) + shift)
      ▼ norm, modulate, Linear, unpatchify
    v, of x's shape

`forward(x, t, y)` equals `forward_modulated(x, modulations(condition(t, y)))`. The modulations depend on
(t, y) only and hold a third of the weights, so a sampler may compute those of all its steps in one go.

Options of the configuration: more scalars in c, each by an embedder like t's: "r", with t - r (MeanFlow, arXiv
2505.13447: the result is the average velocity from r to t; without r that at t), and "beta" (guidance-free training,
arXiv 2501.15420); and a second final layer after `exit_depth` blocks, whose velocity `exits=True` returns beside the
model's (internal guidance, arXiv 2512.24176).

`forward_training` is the same network for its training: tokens between two blocks (`taps`), and a `Route`, a run of
blocks that only some of the tokens go through, the others joining them again behind it (TREAD, arXiv 2501.04765).

Time: the network itself knows no direction. Weights trained in the MAETok/REPA convention, t = 0 data and t = 1 noise,
v = noise - data, are what this package's API means everywhere; `time="sit"` in the config marks weights of the official
SiT and LightningDiT convention (t = 1 data, v = data - noise): forward then flips t and the sign of v for them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from maetok_fast.checks import check_dtype, check_labels, check_tensor, check_times
from maetok_fast.kernels import gather_tokens, scatter_tokens
from maetok_fast.layers import (
    Attention,
    GatedResidual,
    LabelEmbedder,
    LayerNorm,
    Mlp,
    Modulation,
    PatchEmbed,
    RMSNorm,
    SwiGLU,
    TimestepEmbedder,
    again,
    unpatchify,
)
from maetok_fast.models.checkpoints import Pretrained
from maetok_fast.models.checkpoints.generators import SIT
from maetok_fast.models.configs import SiTConfig
from maetok_fast.positions import sincos_1d, sincos_2d

__all__ = ["Inside", "Modulations", "Route", "SiT"]

_LEAST_T = 0.05  # of a predicted datum's velocity: (x - data) / t loses its digits where t goes to 0 (JiT's floor)


class Modulations(NamedTuple):
    """All adaLN modulations of a batch: `blocks`, one (B, 6D) per block, `final` (B, 2D), and the early exit's (B, 2D)
    where the model has one; t (B,) where the last layer predicts the data."""

    blocks: tuple[Tensor, ...]
    final: Tensor
    exit: Tensor | None = None
    t: Tensor | None = None

    def rows(self, index: slice | Tensor) -> Modulations:
        """The same for a slice (or index tensor) of the batch: one sampling step of many computed at once."""
        out, t = (None if part is None else part[index] for part in (self.exit, self.t))
        return Modulations(tuple(b[index] for b in self.blocks), self.final[index], out, t)


class Route(NamedTuple):
    """Blocks first .. last - 1 see the tokens `kept` (B, K) int64 alone, ascending; mask (B, N) bool is True at the
    others, which skip them. Both as `kernels.sample_visible` and `random_mask` draw them."""

    first: int
    last: int
    kept: Tensor
    mask: Tensor


class Inside(NamedTuple):
    """What a forward in training gives: the velocity, the early exit's (None where there is none), and `hidden`: the
    tokens behind each block asked for, (B, N, D), or (B, K, D) within a route (behind its last block all are there)."""

    velocity: Tensor
    early: Tensor | None
    hidden: tuple[Tensor, ...]


class AdaLNBlock(nn.Module):
    """adaLN-zero block; subclasses make its parts. modulation (B, 6D) = [shift_msa, scale_msa, gate_msa, shift_mlp,
    scale_mlp, gate_mlp], or (B, 4D) without the shifts (`shift` False), or None: then it is computed here, from
    `activated` = silu(c) (B, D), so that a block's forward alone uses its parameters (`fully_shard` of one block after
    the other). `recompute`: what its norms make is not kept for the backward pass."""

    recompute = False
    shift = True
    norm1: LayerNorm | RMSNorm
    norm2: LayerNorm | RMSNorm
    attn: Attention
    mlp: Mlp | SwiGLU
    residual: GatedResidual
    adaLN_modulation: Modulation

    def forward(
        self,
        x: Tensor,
        modulation: Tensor | None,
        rope: Tensor | None = None,
        activated: Tensor | None = None,
        index: Tensor | None = None,
    ) -> Tensor:
        """index (B, N): the rows of rope that turn the tokens, where those are not all."""
        if modulation is None:
            modulation = self.adaLN_modulation.linear(activated)
        shift_msa: Tensor | None = None
        shift_mlp: Tensor | None = None
        if self.shift:
            shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = modulation.chunk(6, dim=-1)
        else:
            scale_msa, gate_msa, scale_mlp, gate_mlp = modulation.chunk(4, dim=-1)
        y = self.norm1(x, shift_msa, scale_msa)
        with again(y, self.norm1, x, shift_msa, scale_msa, wanted=self.recompute):
            branch = self.attn(y, rope, index=index)
        joined = x, branch, gate_msa, shift_mlp, scale_mlp
        x, y = self.norm2.after(*joined)
        # of the sum before, not after it: then that is not kept either
        with again(y, lambda *given: self.norm2.after(*given)[1], *joined, wanted=self.recompute):
            branch = self.mlp(y)
        return self.residual(x, branch, gate_mlp)


class SiTBlock(AdaLNBlock):
    """LayerNorm without affine, a tanh-GELU MLP."""

    def __init__(self, config: SiTConfig) -> None:
        super().__init__()
        self.norm1 = LayerNorm(config.dim, affine=False)
        self.attn = Attention(config.dim, config.heads, "layer" if config.qk_norm else "none")
        self.norm2 = LayerNorm(config.dim, affine=False)
        self.mlp = Mlp(config.dim, int(config.dim * config.mlp_ratio), approximate="tanh")
        self.residual = GatedResidual()
        self.adaLN_modulation = Modulation(config.dim, 6 * config.dim)


class FinalLayer(nn.Module):
    """norm, modulate by (B, 2D) = [shift, scale], Linear to patch pixels."""

    def __init__(self, dim: int, out: int, norm: nn.Module) -> None:
        super().__init__()
        self.norm_final = norm
        self.linear = nn.Linear(dim, out)
        self.adaLN_modulation = Modulation(dim, 2 * dim)

    def forward(self, x: Tensor, modulation: Tensor | None, activated: Tensor | None = None) -> Tensor:
        if modulation is None:
            modulation = self.adaLN_modulation.linear(activated)
        shift, scale = modulation.chunk(2, dim=-1)
        return self.linear(self.norm_final(x, shift, scale))


class DiffusionTransformer(Pretrained):
    """What SiT and LightningDiT share: embedders, positions, the split into condition, modulations and blocks.

    Subclasses set `blocks`, `final_layer` and `final_layer_xr` and call `reset_parameters`; `rope()` gives their RoPE
    table or None.
    """

    config: SiTConfig
    blocks: nn.ModuleList
    final_layer: FinalLayer
    final_layer_xr: FinalLayer | None  # the early exit's

    def __init__(self, config: SiTConfig) -> None:
        super().__init__()
        self.config = config
        dim, patch = config.dim, config.patch
        if isinstance(config.tokens, int):
            self.grid: tuple[int, int] | None = None
            self.x_embedder: nn.Module = nn.Linear(config.channels, dim)
            table = sincos_1d(dim, config.tokens)
        else:
            self.grid = (config.tokens[0] // patch, config.tokens[1] // patch)
            self.x_embedder = PatchEmbed(config.channels, dim, patch)
            table = sincos_2d(dim, self.grid)
        self.t_embedder = TimestepEmbedder(dim)
        self.y_embedder = LabelEmbedder(config.num_classes, dim, config.label_dropout)
        self.r_embedder = TimestepEmbedder(dim) if "r" in config.conditions else None
        self.beta_embedder = TimestepEmbedder(dim) if "beta" in config.conditions else None
        if config.prediction == "x":  # so that weights without their config.json show it
            self.register_buffer("predicts_data", torch.ones(()))
        # fixed, but a parameter in the public checkpoints
        self.pos_embed = nn.Parameter(table.unsqueeze(0).to(torch.get_default_dtype()), requires_grad=False)

    @property
    def out_features(self) -> int:
        return self.config.patch**2 * self.config.channels * (2 if self.config.learn_sigma else 1)

    def final_layers(self, norm: Callable[[], nn.Module]) -> tuple[FinalLayer, FinalLayer | None]:
        """The final layer, and the early exit's where the configuration has one."""
        dim, early = self.config.dim, self.config.exit_depth is not None
        return FinalLayer(dim, self.out_features, norm()), FinalLayer(dim, self.out_features, norm()) if early else None

    def reset_parameters(self) -> None:
        """Xavier-uniform Linears (the patch conv as one), N(0, .02) embeddings, zero adaLN and output layers."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        if isinstance(self.x_embedder, PatchEmbed):
            nn.init.xavier_uniform_(self.x_embedder.proj.weight.flatten(1))
            self.x_embedder.reset_bias()
        nn.init.normal_(self.y_embedder.embedding_table.weight, std=0.02)
        for module in self.modules():
            if isinstance(module, (Modulation, TimestepEmbedder)):
                module.reset_parameters()
            elif isinstance(module, FinalLayer):
                nn.init.zeros_(module.linear.weight)

    def embed(self, x: Tensor) -> Tensor:
        """Latents -> tokens (B, N, D) with positions."""
        return self.x_embedder(x) + self.pos_embed

    def condition(self, t: Tensor, y: Tensor, r: Tensor | None = None, beta: Tensor | None = None) -> Tensor:
        """t (B,) in [0, 1], labels y (B,) and what the configuration's `conditions` name, (B,) each -> c (B, D). In
        training mode labels are dropped at `label_dropout`. Without r it is t; beta has to be given."""
        check_times(t, "B")
        check_labels(y, t.shape[0], self.config)
        for name, value in (("r", r), ("beta", beta)):
            known = name in self.config.conditions
            if value is not None and not known:
                raise ValueError(f"{name} was given, and this {type(self).__name__} has no condition {name!r}")
            if value is not None:
                check_tensor(name, value, (t.shape[0],))
            elif known and name == "beta":
                raise ValueError(f"this {type(self).__name__} was trained guidance-free: give beta (B,) (temperature)")
        c = self.t_embedder(1 - t if self.config.time == "sit" else t) + self.y_embedder(y)
        if self.r_embedder is not None:
            c = c + self.r_embedder(torch.zeros_like(t) if r is None else t - r)
        if self.beta_embedder is not None:
            c = c + self.beta_embedder(cast(Tensor, beta))
        return c

    def modulations(self, c: Tensor, t: Tensor | None = None) -> Modulations:
        """c (B, D) -> every block's and the final layers' modulation. Rows of c are independent, so c may stack the
        conditions of many sampling steps; `Modulations.rows` then picks one step's. t (B,): their times, which a model
        that predicts the data needs."""
        if self.config.prediction == "x" and t is None:
            raise ValueError(f"this {type(self).__name__} predicts the data: give modulations(c, t) the times too")
        c = F.silu(c)
        early = self.final_layer_xr
        return Modulations(
            tuple(cast(Modulation, block.adaLN_modulation).linear(c) for block in self.blocks),
            self.final_layer.adaLN_modulation.linear(c),
            None if early is None else early.adaLN_modulation.linear(c),
            t if self.config.prediction == "x" else None,
        )

    def rope(self) -> Tensor | None:
        return None

    def forward_modulated(self, x: Tensor, modulations: Modulations, exits: bool = False) -> Any:
        """Velocity for latents x, given `modulations(condition(t, y), t)` of the same batch; exits: as `forward`'s."""
        return _with_exit(self._run(x, modulations.t, modulations, None, exits), exits)

    def forward(
        self, x: Tensor, t: Tensor, y: Tensor, r: Tensor | None = None, beta: Tensor | None = None, exits: bool = False
    ) -> Any:
        """x (B, L, C) or (B, C, H, W), t (B,) in [0, 1] with 0 = data and 1 = noise, y (B,) int64 in [0, num_classes],
        num_classes (1000) being the null class -> v = noise - data, of x's shape. r, beta: as `condition`'s. exits: the
        early exit's velocity beside it, (v, early)."""
        return _with_exit(self.forward_training(x, t, y, r, beta, exits=exits), exits)

    def forward_training(
        self,
        x: Tensor,
        t: Tensor,
        y: Tensor,
        r: Tensor | None = None,
        beta: Tensor | None = None,
        *,
        exits: bool = False,
        route: Route | None = None,
        taps: tuple[int, ...] = (),
    ) -> Inside:
        """`forward`, and what lies inside: taps: the tokens behind that many blocks each, ascending, in 1 .. depth."""
        check_tensor("t", t, (x.shape[0] if isinstance(x, Tensor) else "B",))
        if route is not None and not 0 <= route.first < route.last <= self.config.depth:
            raise ValueError(
                f"a route's blocks must be 0 <= first < last <= depth = {self.config.depth}, got {route.first} and "
                f"{route.last}"
            )
        return self._run(x, t, None, F.silu(self.condition(t, y, r, beta)), exits, route, taps)

    def _run(
        self,
        x: Tensor,
        t: Tensor | None,
        modulations: Modulations | None,
        activated: Tensor | None,
        exits: bool,
        route: Route | None = None,
        taps: tuple[int, ...] = (),
    ) -> Inside:
        """By modulations, or by silu(c) (B, D), of which each block then makes its own."""
        config, early = self.config, self.final_layer_xr
        check_tensor("x", x, ("B", *config.shape))
        check_dtype("x", x, self.pos_embed)
        if exits and early is None:
            raise ValueError(f"this {type(self).__name__} has no early exit (exit_depth is None in its config)")
        tokens = self.embed(x)
        rope = self.rope()
        left, skipped, index = None, None, None
        hidden: list[Tensor] = []
        for i, block in enumerate(self.blocks):
            if route is not None and i == route.first:
                skipped, tokens = tokens, gather_tokens(tokens, route.kept)
                index = None if rope is None else route.kept
            tokens = block(tokens, None if modulations is None else modulations.blocks[i], rope, activated, index)
            if route is not None and i + 1 == route.last:
                assert skipped is not None
                tokens, skipped, index = _joined(tokens, skipped, route), None, None
            if i + 1 in taps:
                hidden.append(tokens)
            if exits and early is not None and i + 1 == config.exit_depth:
                whole = tokens if skipped is None or route is None else _joined(tokens, skipped, route)
                left = self._leave(early(whole, None if modulations is None else modulations.exit, activated), x, t)
        v = self.final_layer(tokens, None if modulations is None else modulations.final, activated)
        return Inside(self._leave(v, x, t), left, tuple(hidden))

    def _leave(self, v: Tensor, x: Tensor, t: Tensor | None) -> Tensor:
        """What a final layer gives (B, N, patch * patch * channels) as a velocity of x's shape."""
        if self.grid is not None:
            v = unpatchify(v, self.grid, self.config.patch)
        if self.config.learn_sigma:
            v = v.chunk(2, dim=-1 if self.grid is None else 1)[0]
        if self.config.prediction == "x":
            assert t is not None
            # of the linear path, in this package's convention whatever the network's time is
            return (x - v) / t.to(v.dtype).clamp_min(_LEAST_T).view(-1, *(1,) * (x.ndim - 1))
        return -v if self.config.time == "sit" else v


def _joined(routed: Tensor, skipped: Tensor, route: Route) -> Tensor:
    """The routed tokens (B, K, D) at their places among those before the route (B, N, D)."""
    placed = scatter_tokens(routed, route.kept, None, skipped.shape[1])
    return torch.where(route.mask.unsqueeze(-1), skipped, placed)


def _with_exit(found: Inside, exits: bool) -> Any:
    return (found.velocity, found.early) if exits else found.velocity


class SiT(DiffusionTransformer):
    """SiT S/B/L/XL. See the module's drawing; `SiT.from_pretrained` reads MAETok/REPA and official SiT weights."""

    config_class = SiTConfig
    layout = SIT

    def __init__(self, config: SiTConfig | None = None) -> None:
        config = SiTConfig() if config is None else config
        super().__init__(config)
        self.blocks = nn.ModuleList([SiTBlock(config) for _ in range(config.depth)])
        self.final_layer, self.final_layer_xr = self.final_layers(lambda: LayerNorm(config.dim, affine=False))
        self.reset_parameters()
