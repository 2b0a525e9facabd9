"""StepGenerator: random numbers of one step, in whichever process."""

from __future__ import annotations

from typing import Any

import torch

__all__ = ["StepGenerator"]


class StepGenerator(torch.Generator):
    """A generator that is seeded before each use, so that another process or a copy gets it without its state.

    Torch (2.13) sends the state of a generator as a shared file that is closed before a spawned process opens it, so
    ``ddp_spawn`` would not start.
    """

    def __reduce__(self) -> Any:
        """A new one."""
        return StepGenerator, ()
