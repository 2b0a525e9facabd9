"""Learning-rate multipliers of a network's parts: the part of each parameter, and which ones are frozen."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from lssl.networks.backbone import Backbone
from lssl.utils.errors import InputError, nearest

__all__ = ["Multipliers"]


class Multipliers:
    """Multiplier of each parameter of a backbone and its head; 0 freezes it.

    Args:
        backbone: the network.
        chosen: multiplier of ``encoder``, ``decoder``, ``head`` or a submodule of the network; the longest matching
            name applies. Default: 1.
    """

    def __init__(self, backbone: Backbone, chosen: Mapping[str, float]) -> None:
        known = {"encoder", "decoder", "head", *(name for name, _ in backbone.network.named_modules() if name)}
        for name, factor in chosen.items():
            if name not in known:
                shown = {"encoder", "decoder", "head", *(key for key in known if "." not in key)}
                raise InputError(f"lr_multipliers: there is no part '{name}' of the network{nearest(name, shown)}")
            if factor < 0:
                raise InputError(f"lr_multipliers: give 0 or more, not {factor} for '{name}'.")
        self.chosen = dict(chosen)
        self._encoder = backbone.encoder() if {"encoder", "decoder"} & self.chosen.keys() else set()

    def of(self, backbone: Backbone, head: nn.Module) -> list[tuple[float, nn.Parameter]]:
        """Every parameter with its multiplier."""
        found = [(self.chosen.get("head", 1.0), parameter) for parameter in head.parameters()]
        for name, parameter in backbone.named_parameters():
            path = name.removeprefix("network.")
            special = [key for key in self.chosen if path == key or path.startswith(key + ".")]
            part = max(special, key=len) if special else "encoder" if name in self._encoder else "decoder"
            found.append((self.chosen.get(part, 1.0), parameter))
        return found
