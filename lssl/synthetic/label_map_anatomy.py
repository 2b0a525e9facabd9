"""One label map: its codes, its place in the frame, and the fields along which it ages.

The *map frame* is the file's, in mm, moved so that the middle of the cerebrum (the box around its cortex and white
matter) is at 0. A field w (mm of displacement per mm of amplitude, at most 1) says where the image is to be fetched
from: at ``X + α w(X)`` instead of ``X``.

* ``ventricles``: ``∇(G ∗ 1_ventricles)``, G a Gaussian. It points into the lateral ventricles, so with α > 0 the walls
  show fluid and the ventricles are larger. Hippocampus, thalamus, caudate and lentiform nucleus have such fields, too,
  and shrink with α < 0.
* ``cortex``: ``-∇(G ∗ 1_brain)``, faded out below the cortex and towards the skull. It points out of the brain and is
  longest at its surface, so with α > 0 the outermost cortex shows the fluid before it, and the cortex is thinner.

Fields are kept on the voxels of the map and interpolated trilinearly; that interpolation *is* the deformation, so the
correspondence between visits is exact.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from scipy.ndimage import gaussian_filter
from torch import Tensor

from lssl.data.nifti import read_grid, read_label
from lssl.utils.errors import InputError

__all__ = [
    "AGEING",
    "AGEING_ROWS",
    "STRUCTURES",
    "LabelMap",
    "class_names",
    "classes",
    "find_maps",
    "read_map",
    "sample_labels",
]

#: Structures and their FreeSurfer numbers on the left, or on no side, and on the right.
STRUCTURES: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    "cortex": ((3,), (42,)),
    "white matter": ((2,), (41,)),
    "lateral ventricle": ((4, 5), (43, 44)),
    "thalamus": ((10,), (49,)),
    "caudate": ((11, 26), (50, 58)),  # with accumbens
    "lentiform": ((12, 13), (51, 52)),  # putamen and pallidum
    "hippocampus and amygdala": ((17, 18), (53, 54)),
    "cerebellum": ((7, 8), (46, 47)),
    "brainstem": ((16, 28, 60), ()),  # with ventral diencephalon
}

#: Structures whose rates are prescribed, and mm (the Gaussian's σ) over which the change fades. What is left, white
#: matter, cerebellum and brainstem, changes as its neighbours leave it.
AGEING: dict[str, float] = {
    "lateral ventricle": 5.0,
    "cortex": 4.0,
    "hippocampus and amygdala": 3.0,
    "thalamus": 4.0,
    "caudate": 3.0,
    "lentiform": 4.0,
}

#: Rows of `AGEING` among `STRUCTURES`.
AGEING_ROWS = [list(STRUCTURES).index(name) for name in AGEING]

_FACE, _LARGEST = 500, 1023  # numbers from here on are tissue around the brain's cavity; the largest of them
_FLUID = 24  # around the brain
_SKULL, _RIBBON = 3.0, 2.0  # mm (σ) over which the thinning fades towards the skull and below the cortex


@dataclass(frozen=True, eq=False)  # equal only to itself, so that it can key a cache
class LabelMap:
    """A label map in the map frame.

    Attributes:
        code: ``(D, H, W)`` uint8, counts in ``numbers``; 0 is background.
        numbers: ``(n,)`` int64 FreeSurfer numbers of the codes.
        affine: ``(4, 4)`` float64, index → map frame in mm.
    """

    code: Tensor
    numbers: Tensor
    affine: Tensor

    @functools.cached_property
    def fields(self) -> Tensor:
        """``(K, 3, D, H, W)`` float16, of `AGEING`; made when first needed."""
        return torch.from_numpy(_fields(self.numbers.numpy()[self.code.numpy()], self.affine.numpy()))

    @functools.cached_property
    def effects(self) -> Tensor:
        """``(9, K)``: :meth:`effects_of` the map's own fields."""
        return self.effects_of(self.fields)

    def effects_of(self, fields: Tensor) -> Tensor:
        """``(9, K)``: change of the logarithm of the volumes of `STRUCTURES` per mm of each amplitude, at first.

        To first order, what is fetched from ``X + α w(X)`` has moved to ``X - α w(X)``: a structure loses the flux of w
        through its surface, which Gauss's theorem sums over its voxels. The flux through a voxel's face is that of the
        interpolated field: the mean of both sides, smoothed by (1, 6, 1)/8 along the face.
        """
        linear = torch.linalg.inv(self.affine[:3, :3])
        of_voxel = classes(self.numbers, False)[self.code.long()].flatten().long()
        sizes = torch.bincount(of_voxel, minlength=len(STRUCTURES) + 1).double()
        columns = []
        for field in fields:
            along = torch.tensordot(linear, field.double(), 1)  # in voxels, along the axes
            outflow = torch.stack([_outflow(along[axis], axis) for axis in range(3)]).sum(0)
            columns.append(-torch.bincount(of_voxel, outflow.flatten(), len(STRUCTURES) + 1) / sizes)
        return torch.stack(columns, 1)[1:]

    @functools.cached_property
    def response(self) -> Tensor:
        """``(K, K)``: the rows of :attr:`effects` of `AGEING`."""
        return self.effects[AGEING_ROWS]

    def index(self, points: Tensor) -> Tensor:
        """Index of points ``(N, 3)`` of the map frame."""
        inverse = torch.linalg.inv(self.affine).to(points.dtype)
        return points @ inverse[:3, :3].T + inverse[:3, 3]

    def pull(self, points: Tensor, amplitude: Tensor) -> Tensor:
        """``X + Σ_k α_k w_k(X)`` for points ``(N, 3)`` and amplitudes ``(K,)`` in mm."""
        if not amplitude.any():
            return points
        total = torch.tensordot(amplitude.to(points.dtype), self.fields.to(points.dtype), 1)
        return points + sample_labels(total, self.index(points), "border")


def find_maps(root: str | Path) -> list[Path]:
    """The NIfTI files of a folder, by name."""
    folder = Path(root)
    if not folder.is_dir():
        raise InputError(f"The folder {folder} does not exist; give root, a folder of label maps (*.nii, *.nii.gz).")
    found = sorted(path for path in folder.iterdir() if path.name.endswith((".nii", ".nii.gz")))
    if not found:
        raise InputError(f"{folder} holds no label maps (*.nii, *.nii.gz); give root, the folder that holds them.")
    return found


@functools.lru_cache(maxsize=256)
def read_map(path: Path) -> LabelMap:
    """Reads a map, ends its brainstem under the cerebellum, and centres it."""
    label, affine = read_label(str(path)), read_grid(str(path)).affine.copy()
    for name, (left, right) in STRUCTURES.items():
        if not np.isin(label, left + right).any():
            raise InputError(
                f"{path} has no {name} (label {' or '.join(map(str, left + right))}); label maps must carry "
                f"FreeSurfer's numbers."
            )
    _cut_spinal_cord(label, affine)
    cerebrum = np.argwhere(np.isin(label, (2, 3, 41, 42)))
    middle = (cerebrum.min(0) + cerebrum.max(0)) / 2
    affine[:3, 3] = -affine[:3, :3] @ middle
    numbers, code = np.unique(label, return_inverse=True)
    if numbers[0] != 0 or numbers[-1] > _LARGEST or len(numbers) > 256:
        raise InputError(
            f"{path} has {len(numbers)} labels from {numbers[0]} to {numbers[-1]}; up to 256 are taken, from 0 (air) "
            f"to {_LARGEST}."
        )
    return LabelMap(
        code=torch.from_numpy(code.reshape(label.shape).astype(np.uint8)),
        numbers=torch.from_numpy(numbers.astype(np.int64)),
        affine=torch.from_numpy(affine),
    )


def class_names(lateral: bool) -> list[str]:
    """Names of the classes 0, 1, …; left and right apart, or as one."""
    names = ["background"]
    for name, (_, right) in STRUCTURES.items():
        names += [f"left {name}", f"right {name}"] if lateral and right else [name]
    return names


def classes(numbers: Tensor, lateral: bool) -> Tensor:
    """``(n,)`` int16 class of each FreeSurfer number, as counted by :func:`class_names`."""
    result, next_class = torch.zeros(len(numbers), dtype=torch.int16), 1
    for left, right in STRUCTURES.values():
        for side in (left, right) if lateral and right else (left + right,):
            result[torch.isin(numbers, torch.tensor(side))] = next_class
            next_class += 1
    return result


def sample_labels(volume: Tensor, index: Tensor, padding: str) -> Tensor:
    """Trilinear values ``(N, C)`` of ``volume (C, D, H, W)`` at indices ``(N, 3)``."""
    size = torch.tensor(volume.shape[1:], dtype=index.dtype)
    grid = (2 * index / (size - 1) - 1).flip(-1)[None, None, None]
    return F.grid_sample(volume[None], grid, padding_mode=padding, align_corners=True)[0, :, 0, 0].T


def _cut_spinal_cord(label: np.ndarray, affine: np.ndarray) -> None:
    """Below the cerebellum the brainstem's number goes on along the cord, as far as the scan did: no anatomy's end."""
    up = int(np.abs(affine[2, :3]).argmax())
    lowest = np.argwhere(np.isin(label, (7, 8, 46, 47)))[:, up].min()
    below = label[tuple(slice(0, lowest) if axis == up else slice(None) for axis in range(3))]
    below[below == 16] = 500  # a tissue that is no structure


def _fields(label: np.ndarray, affine: np.ndarray) -> np.ndarray:
    """The fields of `AGEING`, each at most 1 long."""
    to_voxels = np.linalg.inv(affine[:3, :3])

    def blurred(mask: np.ndarray, sigma: float) -> np.ndarray:
        return gaussian_filter(mask.astype(np.float32), sigma * np.linalg.norm(to_voxels, axis=1), mode="nearest")

    def gradient(volume: np.ndarray) -> np.ndarray:
        return np.einsum("ba,b...->a...", to_voxels.astype(np.float32), np.stack(np.gradient(volume)))

    masks = {name: np.isin(label, STRUCTURES[name][0] + STRUCTURES[name][1]) for name in AGEING}
    skull_stripped = (label > 0) & (label < _FACE)
    brain = skull_stripped & (label != _FLUID)
    inner = blurred(brain & ~masks["cortex"], _RIBBON)
    shell = np.clip(1 - 2 * inner, 0, 1) * np.clip(2 * blurred(skull_stripped, _SKULL) - 1, 0, 1)
    outward = -gradient(blurred(brain, AGEING["cortex"]))
    length = np.linalg.norm(outward, axis=0)
    found = {name: gradient(blurred(mask, AGEING[name])) for name, mask in masks.items() if name != "cortex"}
    found["cortex"] = outward / (length + length.max() / 4) * shell
    fields = [found[name] for name in AGEING]
    return np.stack([field / np.linalg.norm(field, axis=0).max() for field in fields]).astype(np.float16)


def _outflow(flow: Tensor, axis: int) -> Tensor:
    """``(D, H, W)``: what leaves each voxel through its two faces across an axis, of a flow along that axis."""
    for other in {0, 1, 2} - {axis}:
        ends = flow.narrow(other, 0, 1), flow.narrow(other, flow.shape[other] - 1, 1)
        padded = torch.cat([ends[0], flow, ends[1]], other)
        low, middle, high = (padded.narrow(other, begin, flow.shape[other]) for begin in range(3))
        flow = (low + 6 * middle + high) / 8
    ends = flow.narrow(axis, 0, 1), flow.narrow(axis, flow.shape[axis] - 1, 1)
    padded = torch.cat([ends[0], flow, ends[1]], axis)
    faces = (padded.narrow(axis, 0, flow.shape[axis] + 1) + padded.narrow(axis, 1, flow.shape[axis] + 1)) / 2
    return faces.diff(dim=axis)
