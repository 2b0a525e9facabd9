"""Anatomies of the endless stream: label maps, phantom heads and random shapes, in one form.

An anatomy is a map of tissue numbers with a few coarse fields along which it changes (see `label_map_anatomy`). The
fields are kept at twice the map's voxel size: they are smooth over 3 mm and more, and 15 maps then take 150 MB.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lssl.synthetic.draws import uniform
from lssl.synthetic.label_map_anatomy import AGEING_ROWS, LabelMap, classes, read_map, sample_labels
from lssl.synthetic.phantom_image import scan
from lssl.synthetic.splines import basis, evaluate

__all__ = ["BRAIN_END", "WHITE_MATTER", "Anatomy", "map_anatomy", "phantom_anatomy", "shapes_anatomy"]

BRAIN_END = 500  # numbers from here on lie around the brain
WHITE_MATTER = (2, 41)
_PHANTOM_SIZE, _PHANTOM_SPACING = (96, 112, 96), 2.0
_SHAPES_SIZE, _SHAPES_SPACING = 48, 4.0  # of random shapes
_HEAD_RADII = (70.0, 88.0, 80.0)  # mm of the ellipsoid that holds random shapes


@dataclass(frozen=True, eq=False)  # equal only to itself
class Anatomy:
    """A map of tissues.

    Attributes:
        code: ``(D, H, W)`` uint8, counts in ``numbers``; 0 is air.
        numbers: ``(n,)`` int64 FreeSurfer numbers of the codes; for random shapes, numbers from 1 on that mean nothing.
        affine: ``(4, 4)`` float32, index → map frame in mm, with the middle of the cerebrum at 0.
        fields: ``(K, 3, d, h, w)`` float32, mm of displacement per mm of amplitude; K may be 0.
        response: ``(K, K)`` change of the logarithm of the structures' volumes per mm of each amplitude.
        white: ``(m, 3)`` int16 voxels of white matter, where lesions may appear.
        labelled: whether the numbers name structures.
        corners: ``(8, 3)`` mm in the map frame, of the smallest box of voxels that holds all that is no air.
    """

    code: Tensor
    numbers: Tensor
    affine: Tensor
    fields: Tensor
    response: Tensor
    white: Tensor
    labelled: bool
    corners: Tensor

    def index(self, points: Tensor) -> Tensor:
        """Voxel indices of points ``(N, 3)`` of the map frame."""
        inverse = torch.linalg.inv(self.affine.double()).to(points.dtype)
        return points @ inverse[:3, :3].T + inverse[:3, 3]

    def pull(self, points: Tensor, amplitude: Tensor) -> Tensor:
        """``X + Σ_k α_k w_k(X)`` for points ``(N, 3)`` and amplitudes ``(K,)`` in mm."""
        if not amplitude.any():
            return points
        field = torch.tensordot(amplitude.to(points.dtype), self.fields.to(points.dtype), 1)
        # Voxel j of the coarse field is the mean of the map's voxels 2j and 2j + 1.
        return points + sample_labels(field, (self.index(points) - 0.5) / 2, "border")

    def classes(self, lateral: bool) -> Tensor:
        """``(n,)`` int16 class of each code; -1, unknown, for random shapes."""
        if not self.labelled:
            return torch.full((len(self.numbers),), -1, dtype=torch.int16)
        return classes(self.numbers, lateral)


@functools.lru_cache(maxsize=256)
def map_anatomy(path: Path) -> Anatomy:
    """The anatomy of a label map, which takes 2 s to make."""
    known = read_map(path)
    return _coarse(LabelMap(known.code, known.numbers, known.affine))


@functools.lru_cache(maxsize=64)
def phantom_anatomy(seed: int, index: int) -> Anatomy:
    """The anatomy of a procedural head, which takes some seconds to make."""
    found = scan(seed, index, 0, 0.0, _PHANTOM_SIZE, _PHANTOM_SPACING)
    label = found.label.long().clone()
    label[(label == 0) & found.head] = BRAIN_END + 16
    numbers, code = np.unique(label.numpy(), return_inverse=True)
    cerebrum = torch.isin(label, torch.tensor((2, 3, 41, 42))).nonzero()
    affine = found.affine.clone()
    affine[:3, 3] = -affine[:3, :3] @ ((cerebrum.amin(0) + cerebrum.amax(0)).double() / 2)
    counted = torch.from_numpy(code.reshape(label.shape).astype(np.uint8))
    return _coarse(LabelMap(counted, torch.from_numpy(numbers.astype(np.int64)), affine))


def shapes_anatomy(stream: torch.Generator, head: bool = True) -> Anatomy:
    """Random shapes: where one of 6 to 20 smooth random functions is the largest, within an ellipsoid.

    Args:
        stream: draws them.
        head: leaves air around an ellipsoid as large as a head.
    """
    count = int(torch.randint(6, 21, (1,), generator=stream))
    nodes = int(torch.randint(8, 15, (1,), generator=stream))
    places = torch.linspace(1, nodes - 2, _SHAPES_SIZE)
    noise = torch.randn(count, nodes, nodes, nodes, generator=stream)
    code = evaluate(noise, [basis(places, nodes)] * 3).argmax(0) + 1
    middle = (_SHAPES_SIZE - 1) / 2
    if head:
        radii = torch.tensor(_HEAD_RADII) * uniform(stream, 0.8, 1.05) / _SHAPES_SPACING
        axes = [(torch.arange(_SHAPES_SIZE) - middle) / radius for radius in radii]
        x, y, z = torch.meshgrid(*axes, indexing="ij")
        code = code * (x.square() + y.square() + z.square() < 1)
    affine = torch.diag(torch.tensor([_SHAPES_SPACING] * 3 + [1.0]))
    affine[:3, 3] = -_SHAPES_SPACING * middle
    return Anatomy(
        code=code.to(torch.uint8),
        numbers=torch.arange(count + 1),
        affine=affine,
        fields=torch.zeros(0, 3, 1, 1, 1),
        response=torch.zeros(0, 0, dtype=torch.float64),
        white=torch.zeros(0, 3, dtype=torch.int16),
        labelled=False,
        corners=_corners(code, affine),
    )


def _coarse(known: LabelMap) -> Anatomy:
    """With fields at twice the voxel size, and the response to these; the fine ones are let go."""
    fields = F.avg_pool3d(known.fields.float(), 2, ceil_mode=True)
    depth, height, width = known.code.shape
    used = F.interpolate(fields, scale_factor=2, mode="trilinear", align_corners=False)[..., :depth, :height, :width]
    number = known.numbers[known.code.long()]
    return Anatomy(
        code=known.code,
        numbers=known.numbers,
        affine=known.affine.float(),
        fields=fields,
        response=known.effects_of(used)[AGEING_ROWS],  # a coarse field moves less
        white=torch.isin(number, torch.tensor(WHITE_MATTER)).nonzero().to(torch.int16),
        labelled=True,
        corners=_corners(known.code, known.affine),
    )


def _corners(code: Tensor, affine: Tensor) -> Tensor:
    """See :class:`Anatomy`."""
    seen = code > 0
    ends = []
    for axis in range(3):
        there = seen.amax([other for other in range(3) if other != axis]).nonzero()[:, 0]
        ends.append(there[[0, -1]] if len(there) else torch.tensor([0, code.shape[axis] - 1]))
    corners = torch.cartesian_prod(*ends).to(affine.dtype)
    return corners @ affine[:3, :3].T + affine[:3, 3]
