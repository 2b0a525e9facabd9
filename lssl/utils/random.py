"""Random numbers of a step's plan."""

from __future__ import annotations

import numpy as np
import torch

__all__ = ["host_generator", "seeded"]


def host_generator(generator: torch.Generator) -> np.random.Generator:
    """A generator of numpy for the draws of one plan, seeded by the next number of torch's, which lives on the CPU."""
    return seeded(int(torch.randint(2**62, (1,), generator=generator)))


def seeded(seed: int) -> np.random.Generator:
    """A generator of numpy with a seed."""
    return np.random.Generator(np.random.PCG64(seed))
