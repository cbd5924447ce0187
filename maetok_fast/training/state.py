# Copyright 2026 The maetok_fast authors. Licensed under the Apache License, Version 2.0.
"""Tensors of a run to and from files: whole and on the CPU there, sharded on their device here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["like", "load_module", "module_state", "random_state", "restore_random_state", "whole"]


def whole(tensors: Mapping[str, Tensor], kept: bool = True) -> dict[str, Tensor]:
    """Each tensor whole, contiguous and on the CPU; sharded ones are gathered, which all ranks have to ask for. {} on
    a rank that keeps none (`kept` False): one tensor at a time is there then, not the host's memory full of them."""
    found = {}
    for name, value in tensors.items():
        value = value.detach()
        value = value.full_tensor() if hasattr(value, "full_tensor") else value
        if kept:
            found[name] = value.to("cpu", copy=True).contiguous()
    return found


def like(target: Tensor, value: Tensor) -> Tensor:
    """A whole value as the target lies: on its device, sharded as it is."""
    if hasattr(target, "device_mesh"):
        from torch.distributed.tensor import DTensor, distribute_tensor

        assert isinstance(target, DTensor)
        sharded: Tensor = distribute_tensor(value.to(target.device), target.device_mesh, target.placements)
        return sharded
    return value.to(target.device, copy=True)


def module_state(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers by name, as they lie."""
    return {name: value for name, value in module.state_dict().items() if isinstance(value, Tensor)}


@torch.no_grad()
def load_module(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Whole tensors into the module's own. KeyError naming a tensor that one of them lacks."""
    own = module_state(module)
    for name in own.keys() ^ state.keys():
        where = "the checkpoint" if name in own else "this run's model"
        raise KeyError(f"{name} is not in {where}")
    for name, target in own.items():
        if tuple(target.shape) != tuple(state[name].shape):
            raise KeyError(f"{name} is {tuple(state[name].shape)} in the checkpoint, {tuple(target.shape)} in this run")
        target.copy_(like(target, state[name]))


def random_state(device: torch.device) -> dict[str, Tensor]:
    """The state of torch's generators on the CPU and on this rank's device."""
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def restore_random_state(state: Mapping[str, Any], device: torch.device) -> None:
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)
