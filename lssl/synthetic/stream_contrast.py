"""Contrasts of the endless stream: a brightness for every tissue number, like T1, T2 or FLAIR, or any."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lssl.synthetic.draws import uniform
from lssl.synthetic.label_map_image import CONTRASTS, TISSUES

__all__ = ["Contrast", "draw_contrast", "vary"]

_SHARES = {"T1": 0.35, "T2": 0.15, "FLAIR": 0.15}  # the rest has any brightness
_LARGEST = 1024

Contrast = tuple[Tensor, float]
"""``(1024,)`` brightness of each FreeSurfer number, and that of lesions."""


def draw_contrast(stream: torch.Generator) -> Contrast:
    """One scanner's contrast: a known family, or any brightness for each tissue. Both sides of the brain are alike."""
    number = torch.rand(_LARGEST, generator=stream)
    table = 0.03 + 0.92 * number
    lesion = uniform(stream, 0.05, 1.0)
    draw, values = uniform(stream, 0, 1), None
    for name, share in _SHARES.items():
        if 0 <= draw < share:
            values, lesion = CONTRASTS[name]
        draw -= share
    for place, (_, names) in enumerate(TISSUES):
        table[list(names)] = values[place] if values is not None else float(table[names[0]])
    table[0] = 0.02 if values is not None or uniform(stream, 0, 1) < 0.8 else table[0]
    return vary((table, lesion), 0.08, stream)


def vary(contrast: Contrast, share: float, stream: torch.Generator) -> Contrast:
    """The same contrast on another day: each tissue changed by up to a share of it, then a gamma from 0.8 to 1.25."""
    table, lesion = contrast
    factor = 1 + share * (2 * torch.rand(_LARGEST, generator=stream) - 1)
    for _, names in TISSUES:
        factor[list(names)] = float(factor[names[0]])
    gamma = math.exp(uniform(stream, -0.22, 0.22))
    return (table * factor) ** gamma, lesion**gamma
