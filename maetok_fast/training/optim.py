# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""One optimizer step that a gradient which is not finite cannot spoil, without asking the host.

    gradients ── norm ──┬── finite? ──┐                      (tensors on the device)
         │              └── clip ─────┤
         └────────────────────────────┴── AdamW and the average in one pass, which changes nothing where it is not
                                          finite; the log shows it later

The learning rate is a function of the step alone, so that nothing of a schedule has to be saved.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from maetok_fast.kernels import adamw_step, ema_update
from maetok_fast.layers import EMA
from maetok_fast.training.configs import OptimizerConfig
from maetok_fast.training.state import like

__all__ = ["GuardedAdamW", "learning_rate", "parameter_groups"]

# Tokens, positions and frequencies are 3-D in the public layout, but no matrix of a linear layer or a convolution.
_UNDECAYED = ("freqs", "mask_token", "cls_token", "latent_tokens", "latent_pos_embed", "pos_embed")
_EPS = 1e-8
_MOMENTS = ("exp_avg", "exp_avg_sq", "step")  # torch's names


def parameter_groups(module: nn.Module, decay: float) -> list[dict[str, Any]]:
    """Trainable parameters in two groups: matrices and kernels with weight decay; biases, norms, tokens, positions and
    frequencies without. Each group has `names` beside `params`."""
    decayed: list[tuple[str, nn.Parameter]] = []
    others: list[tuple[str, nn.Parameter]] = []
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            plain = parameter.ndim < 2 or name.rpartition(".")[2] in _UNDECAYED
            (others if plain else decayed).append((name, parameter))
    groups = ((decayed, decay), (others, 0.0))
    return [
        {"params": [p for _, p in rows], "names": [name for name, _ in rows], "weight_decay": share}
        for rows, share in groups
        if rows
    ]


def learning_rate(config: OptimizerConfig, step: int, steps: int, batch: int) -> float:
    """Of the optimizer step number `step` (the first is 0) of `steps`: warm-up from 0, then the schedule."""
    peak = config.learning_rate * (batch / 256 if config.scaled else 1.0)
    if step < config.warmup:
        return peak * (step + 1) / config.warmup
    if config.schedule == "constant":
        return peak
    done = min(1.0, (step - config.warmup) / max(1, steps - config.warmup))
    left = (1 + math.cos(math.pi * done)) / 2 if config.schedule == "cosine" else 1 - done
    return peak * (config.final + (1 - config.final) * left)


class GuardedAdamW:
    """AdamW over parameter groups; `step` clips, and leaves everything as it is where the norm is not finite.

    "adamw" is ours (`kernels.adamw_step`): moments in fp32 (fp64 of fp64 parameters), the clip inside of the step and
    the average with it. torch's fused kernel reads on the device whether to step (`found_inf`, made for gradient
    scaling), and clips and averages in passes of their own; apex's has no such input, so that the host waits for its
    norm. ImportError where apex is asked for and not there.
    """

    def __init__(self, groups: list[dict[str, Any]], config: OptimizerConfig, factor: float = 1.0) -> None:
        self.config, self.factor = config, factor
        self.names: list[str] = [name for group in groups for name in group["names"]]
        plain = [{k: v for k, v in group.items() if k != "names"} for group in groups]
        self.parameters: list[nn.Parameter] = [p for group in plain for p in group["params"]]
        self.decays: list[float] = [group["weight_decay"] for group in plain for _ in group["params"]]
        self.optimizer: torch.optim.Optimizer | None = None  # another's
        self.moments: dict[Tensor, dict[str, Tensor]] = {}  # parameter -> exp_avg, exp_avg_sq, step
        if config.name == "apex":
            from maetok_fast._optional import probe

            status = probe("apex")
            if status.state != "found":
                raise ImportError(f"optimizer.name=apex: {status.reason}; or use optimizer.name=adamw")
            from apex.optimizers import FusedAdam

            self.optimizer = FusedAdam(plain, lr=0.0, betas=config.betas, eps=_EPS, adam_w_mode=True)
        elif config.name == "torch":
            self.optimizer = torch.optim.AdamW(plain, lr=0.0, betas=config.betas, eps=_EPS, fused=True)

    def zero_grad(self) -> None:
        for parameter in self.parameters:
            parameter.grad = None

    @torch.no_grad()
    def step(self, rate: float, ema: EMA | None = None, averaged: nn.Module | None = None) -> tuple[Tensor, Tensor]:
        """(norm of the gradient before it was clipped, whether it was finite), scalars on the device.

        ema, averaged: the average of this module's parameters makes its step too. Parameters without a gradient stay as
        they are, and their average moves. Gradients are worth nothing afterwards (clipped or not): `zero_grad`."""
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        norm: Any = torch.nn.utils.get_total_norm(gradients)
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        finite = torch.isfinite(norm)
        if self.optimizer is None:
            self._own_step(rate, norm, finite, {} if ema is None or averaged is None else ema.pairs(averaged), ema)
            return norm, finite
        if self.config.clip > 0:
            torch.nn.utils.clip_grads_with_norm_(self.parameters, self.config.clip, norm)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * self.factor
        if self.config.name == "apex":
            if bool(finite):
                self.optimizer.step()
        else:
            self.optimizer.grad_scale = None  # type: ignore[attr-defined]
            self.optimizer.found_inf = (~finite).float()  # type: ignore[attr-defined]
            self.optimizer.step()
        if ema is not None and averaged is not None:
            ema.update(averaged, _guarded(ema.decay, finite))
        return norm, finite

    def _own_step(self, rate: float, norm: Tensor, finite: Tensor, averages: dict[Tensor, Tensor], ema: Any) -> None:
        """One pass for the parameters that have an average, one for the others."""
        scale = torch.clamp(self.config.clip / (norm + 1e-6), max=1.0) if self.config.clip > 0 else None  # torch's
        trained = [(p, d) for p, d in zip(self.parameters, self.decays) if p.grad is not None]
        for rows, has in (([r for r in trained if (r[0] in averages) is has], has) for has in (True, False)):
            first, second, steps = ([self._moments(p)[entry] for p, _ in rows] for entry in _MOMENTS)
            adamw_step(
                [p for p, _ in rows],
                [p.grad for p, _ in rows if p.grad is not None],
                first,
                second,
                steps,
                [averages[p] for p, _ in rows] if has else [],
                rate=rate * self.factor,
                betas=self.config.betas,
                eps=_EPS,
                weight_decay=[d for _, d in rows],
                decay=1.0 if ema is None else ema.decay,
                scale=scale,
                finite=finite,
            )
        if ema is not None:
            stepped = {p for p, _ in trained}
            rest = [(average, p) for p, average in averages.items() if p not in stepped]
            ema_update([a for a, _ in rest], [p for _, p in rest], _guarded(ema.decay, finite))
            ema.updates += 1

    def _moments(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        """Made at the first gradient, as torch's are."""
        if parameter not in self.moments:
            wide = torch.promote_types(torch.float32, parameter.dtype)
            zeros = {name: torch.zeros_like(parameter, dtype=wide) for name in _MOMENTS[:2]}
            self.moments[parameter] = zeros | {"step": torch.zeros((), device=parameter.device)}
        return self.moments[parameter]

    # ---- state, by the parameters' names ----

    def state(self) -> dict[str, Tensor]:
        """<name>/exp_avg -> tensor, as they lie (sharded where the parameter is)."""
        found = {}
        states: Any = self.moments if self.optimizer is None else self.optimizer.state
        for name, parameter in zip(self.names, self.parameters):
            for key, value in states.get(parameter, {}).items():
                found[f"{name}/{key}"] = value if isinstance(value, Tensor) else torch.tensor(value)
        for i, group in enumerate([] if self.optimizer is None else self.optimizer.param_groups):
            if "step" in group:  # apex counts by group
                found[f"group{i}/step"] = torch.as_tensor(group["step"])
        return found

    @torch.no_grad()
    def load(self, state: dict[str, Tensor]) -> None:
        """What `state` gave, whole tensors; "adamw" and "torch" read each other's. KeyError for a parameter that this
        optimizer does not have."""
        known = dict(zip(self.names, self.parameters))
        for key, value in state.items():
            name, _, entry = key.rpartition("/")
            if name.startswith("group") and entry == "step" and self.optimizer is not None:
                self.optimizer.param_groups[int(name[5:])]["step"] = value.clone()
                continue
            if name not in known:
                raise KeyError(f"the optimizer's state has {name}, which this run does not train")
            parameter = known[name]
            mine = value.clone() if value.ndim == 0 else like(parameter, value)
            if self.optimizer is not None:
                self.optimizer.state[parameter][entry] = mine.to(parameter.device)
            else:
                kept = self._moments(parameter)
                kept[entry] = mine.to(kept[entry].device, kept[entry].dtype)


def _guarded(decay: float, finite: Tensor) -> Tensor:
    """The average's decay, 1 where the step was none: fp64, since 1 - 0.9999 in fp32 is off by 2e-4 of itself."""
    return 1 - (1 - decay) * finite.double()
