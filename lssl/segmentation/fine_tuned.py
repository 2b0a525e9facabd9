"""FineTuned: a task that starts from pretrained weights and trains parts of its network at rates of their own."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from lightning.pytorch.utilities import rank_zero_info
from torch import nn

from lssl.networks.backbone import Backbone
from lssl.segmentation.multipliers import Multipliers
from lssl.segmentation.pretrained import load_pretrained
from lssl.task import Task

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["FineTuned"]

Batch = TypeVar("Batch", contravariant=True)


class FineTuned(Task[Batch]):
    """A task with a pretrained network under a head of its own; a subclass has the head.

    Args:
        backbone: network and taps.
        pretrained: checkpoint of any strategy to start from; ``None`` starts from scratch.
        part: what to load from it: the whole ``network``, or its ``encoder``.
        partial: loads matching tensors from a different network, instead of refusing it.
        input_channels: ``adapt`` fills the first convolution with its pretrained mean over channels, scaled to this
            network's number of channels.
        lr_multipliers: part → multiplier of the learning rate. Parts are ``encoder``, ``decoder``, ``head`` or
            submodules of the network; the longest matching name applies. 0 freezes a part (norms included). Default: 1.
        **common: see :class:`lssl.task.Task`.
    """

    def __init__(
        self,
        backbone: Backbone,
        pretrained: str | None = None,
        part: Literal["network", "encoder"] = "network",
        partial: bool = False,
        input_channels: Literal["same", "adapt"] = "same",
        lr_multipliers: dict[str, float] | None = None,
        **common: Any,
    ) -> None:
        super().__init__(backbone, **common)
        self.pretrained, self.part, self.partial = pretrained, part, partial
        self.input_channels = input_channels
        self._multipliers = Multipliers(backbone, lr_multipliers or {})

    @property
    @abstractmethod
    def trained_head(self) -> nn.Module:
        """The head, whose multiplier is that of the part ``head``."""

    def start(self) -> None:
        """Loads the pretrained weights, if there are any, and freezes what is not trained."""
        if self.pretrained:
            adapt, spacing = self.input_channels == "adapt", self.working_spacing.mm
            rank_zero_info(load_pretrained(self.backbone, self.pretrained, self.part, self.partial, adapt, spacing))
        for factor, parameter in self._multipliers.of(self.backbone, self.trained_head):
            if factor == 0:
                parameter.requires_grad_(False)
        self.train(self.training)

    def parameter_groups(self) -> dict[float, list[nn.Parameter]]:
        """Parameters by the multiplier of their learning rate; frozen ones are left out."""
        groups: dict[float, list[nn.Parameter]] = {}
        for factor, parameter in self._multipliers.of(self.backbone, self.trained_head):
            if factor > 0 and parameter.requires_grad:
                groups.setdefault(factor, []).append(parameter)
        return groups

    def train(self, mode: bool = True) -> Self:
        """Also freezes the statistics of frozen norms."""
        super().train(mode)
        for module in self.backbone.network.modules():
            own = list(module.parameters(recurse=False))
            if own and not any(parameter.requires_grad for parameter in own):
                module.eval()
        return self

    def on_resume(self) -> None:
        """A resumed run has its own weights and no longer needs the pretrained ones."""
        self.pretrained = None
