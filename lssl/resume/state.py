"""What differs between the ranks of a run: global random numbers; gradients and sums within an accumulated step."""

from __future__ import annotations

import random
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from lssl.utils.distributed import local

__all__ = ["gradients", "random_state", "set_gradients", "set_random_state", "set_sums", "sums"]


def random_state(device: torch.device) -> dict[str, Any]:
    """State of the global generators of torch (CPU and ``device``), numpy and Python, in plain types and tensors.

    A checkpoint that holds it still loads with ``weights_only=True``.
    """
    kind, keys, *rest = cast(tuple[Any, ...], np.random.get_state())
    state = {
        "torch": torch.get_rng_state(),
        "python": random.getstate(),
        "numpy": (kind, torch.from_numpy(keys.astype(np.int64)), *rest),
    }
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_random_state(state: dict[str, Any], device: torch.device) -> None:
    """Restores a :func:`random_state`."""
    torch.set_rng_state(state["torch"].cpu())
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.cpu().numpy().astype(np.uint32), *rest))
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"].cpu(), device)


def gradients(module: nn.Module) -> dict[str, Tensor]:
    """Name of each parameter that has a gradient → a copy of it on the CPU; of a sharded one, this rank's share."""
    return {
        name: local(parameter.grad).detach().cpu().clone()
        for name, parameter in module.named_parameters()
        if parameter.grad is not None
    }


def set_gradients(module: nn.Module, values: dict[str, Tensor]) -> None:
    """Restores :func:`gradients`; an accumulated step then goes on from them."""
    parameters = dict(module.named_parameters())
    for name, value in values.items():
        parameters[name].grad = gradient = torch.empty_like(parameters[name])
        local(gradient).copy_(value)


def sums(module: nn.Module) -> dict[str, Tensor]:
    """Name of each buffer that is no part of the weights → a copy of it on the CPU; some sum up an accumulated step."""
    saved = module.state_dict(keep_vars=True)
    return {name: value.detach().cpu().clone() for name, value in module.named_buffers() if name not in saved}


def set_sums(module: nn.Module, values: dict[str, Tensor]) -> None:
    """Restores :func:`sums`."""
    buffers = dict(module.named_buffers())
    for name, value in values.items():
        if name in buffers:
            buffers[name].copy_(value)
