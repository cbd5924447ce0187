# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""One optimizer step that a gradient which is not finite cannot spoil, without asking the host.

    gradients ── norm, clipped ── finite? (a tensor on the device) ── fused AdamW, which does nothing where it is not
                                     └── the average stands still there (`loop.optimize`), the log shows it later

The learning rate is a function of the step alone, so that nothing of a schedule has to be saved.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from maetok_fast.training.configs import OptimizerConfig
from maetok_fast.training.state import like

__all__ = ["GuardedAdamW", "learning_rate", "parameter_groups"]

# Tokens, positions and frequencies are 3-D in the public layout, but no matrix of a linear layer or a convolution.
_UNDECAYED = ("freqs", "mask_token", "cls_token", "latent_tokens", "latent_pos_embed", "pos_embed")


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

    torch's fused kernel reads on the device whether to step (`found_inf`, made for gradient scaling); apex's has no
    such input, so that the host waits for its norm. ImportError where apex is asked for and not there.
    """

    def __init__(self, groups: list[dict[str, Any]], config: OptimizerConfig, factor: float = 1.0) -> None:
        self.config, self.factor = config, factor
        self.names: list[str] = [name for group in groups for name in group["names"]]
        plain = [{k: v for k, v in group.items() if k != "names"} for group in groups]
        self.parameters: list[nn.Parameter] = [p for group in plain for p in group["params"]]
        self.optimizer: torch.optim.Optimizer
        if config.name == "apex":
            from maetok_fast._optional import probe

            status = probe("apex")
            if status.state != "found":
                raise ImportError(f"optimizer.name=apex: {status.reason}; or use optimizer.name=adamw")
            from apex.optimizers import FusedAdam

            self.optimizer = FusedAdam(plain, lr=0.0, betas=config.betas, eps=1e-8, adam_w_mode=True)
        else:
            self.optimizer = torch.optim.AdamW(plain, lr=0.0, betas=config.betas, eps=1e-8, fused=True)

    def zero_grad(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)

    @torch.no_grad()
    def step(self, rate: float) -> tuple[Tensor, Tensor]:
        """(norm of the gradient before it was clipped, whether it was finite), scalars on the device."""
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        norm: Any = torch.nn.utils.get_total_norm(gradients)
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        if self.config.clip > 0:
            torch.nn.utils.clip_grads_with_norm_(self.parameters, self.config.clip, norm)
        finite = torch.isfinite(norm)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * self.factor
        if self.config.name == "apex":
            if bool(finite):
                self.optimizer.step()
        else:
            self.optimizer.grad_scale = None  # type: ignore[attr-defined]
            self.optimizer.found_inf = (~finite).float()  # type: ignore[attr-defined]
            self.optimizer.step()
        return norm, finite

    # ---- state, by the parameters' names ----

    def state(self) -> dict[str, Tensor]:
        """<name>/exp_avg -> tensor, as they lie (sharded where the parameter is)."""
        found = {}
        for name, parameter in zip(self.names, self.parameters):
            for key, value in self.optimizer.state.get(parameter, {}).items():
                found[f"{name}/{key}"] = value if isinstance(value, Tensor) else torch.tensor(value)
        for i, group in enumerate(self.optimizer.param_groups):
            if "step" in group:  # apex counts by group
                found[f"group{i}/step"] = torch.as_tensor(group["step"])
        return found

    @torch.no_grad()
    def load(self, state: dict[str, Tensor]) -> None:
        """What `state` gave, whole tensors. KeyError for a parameter that this optimizer does not have."""
        known = dict(zip(self.names, self.parameters))
        for key, value in state.items():
            name, _, entry = key.rpartition("/")
            if name.startswith("group") and entry == "step":
                self.optimizer.param_groups[int(name[5:])]["step"] = value.clone()
                continue
            if name not in known:
                raise KeyError(f"the optimizer's state has {name}, which this run does not train")
            parameter = known[name]
            mine = value.clone() if value.ndim == 0 else like(parameter, value)
            self.optimizer.state[parameter][entry] = mine.to(parameter.device)
