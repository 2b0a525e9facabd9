"""Teacher: a slowly moving average of the trained network."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lssl.utils.errors import InputError

__all__ = ["Teacher"]


class Teacher(nn.ModuleDict):
    """Copies of modules whose weights follow the originals: ``θ' ← m θ' + (1 - m) θ`` after each step.

    ``m`` rises from ``momentum`` to ``final`` by a cosine, ``m = final - (final - momentum) (1 + cos πt) / 2`` with t
    the share of the steps done (BYOL, Grill et al., NeurIPS 2020). Buffers (running statistics) are copied. If the
    teacher sees other inputs than the originals, it gathers its own statistics (``buffers=False``). The teacher starts
    equal to the originals, receives no gradient, and is part of checkpoints. ``m`` depends on the step alone, so a
    resumed run continues it. If a strategy sets ``self.teacher``, the base class moves it.

    Args:
        modules: name → module to follow; ``teacher[name]`` is its copy.
        momentum: first m.
        final: last m.
        buffers: copy the buffers.

    Example:
        >>> import torch
        >>> student = torch.nn.Linear(1, 1, bias=False)
        >>> teacher = Teacher({"net": student}, momentum=0.5, final=0.5)
        >>> before = student.weight.item()
        >>> student.weight.data += 1.0
        >>> teacher.follow(0.0)
        >>> round(teacher["net"].weight.item() - before, 4)
        0.5
    """

    def __init__(
        self, modules: Mapping[str, nn.Module], momentum: float = 0.996, final: float = 1.0, buffers: bool = True
    ) -> None:
        if not 0 <= momentum <= final <= 1:
            raise InputError(f"momentum: a teacher's momentum rises within 0 and 1, not from {momentum} to {final}.")
        super().__init__(copy.deepcopy(dict(modules)))
        self.requires_grad_(False)
        self._followed = tuple(modules.items())  # a tuple, so that they are not registered twice
        self._first, self._final, self._copies_buffers = momentum, final, buffers

    def momentum(self, progress: float) -> float:
        """``m`` after this share of the steps."""
        return self._final - (self._final - self._first) * (1 + math.cos(math.pi * min(1.0, progress))) / 2

    @torch.no_grad()
    def follow(self, progress: float) -> None:
        """Moves the copies towards the originals."""
        share = 1 - self.momentum(progress)
        for name, module in self._followed:
            mine: list[Tensor] = list(self[name].parameters())
            theirs: list[Tensor] = list(module.parameters())
            if mine:
                torch._foreach_lerp_(mine, theirs, share)
            if self._copies_buffers and (buffers := list(self[name].buffers())):
                torch._foreach_copy_(buffers, list(module.buffers()))
