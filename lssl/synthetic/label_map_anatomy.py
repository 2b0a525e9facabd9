"""One label map: its codes, its place in the frame, and the two fields along which it ages.

The *map frame* is the file's, in mm, moved so that the middle of the cerebrum (the box around its cortex and white
matter) is at 0. A field w (mm of displacement per mm of amplitude, at most 1) says where the image is to be fetched
from: at ``X + α w(X)`` instead of ``X``.

* ``ventricles``: ``∇(G ∗ 1_ventricles)``, G a Gaussian. It points into the lateral ventricles, so with α > 0 the walls
  show fluid and the ventricles are larger.
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
from lssl.synthetic.label_map_cells import Surface
from lssl.utils.errors import InputError

__all__ = ["AGEING", "STRUCTURES", "LabelMap", "class_names", "classes", "find_maps", "read_map", "sample_labels"]

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

#: What changes with age: numbers, and mm (the Gaussian's σ) over which the change fades.
AGEING: dict[str, tuple[tuple[int, ...], float]] = {"ventricles": ((4, 5, 43, 44), 5.0), "cortex": ((3, 42), 4.0)}

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
        """``(2, 3, D, H, W)`` float16, of `AGEING`; made when first needed."""
        return torch.from_numpy(_fields(self.numbers.numpy()[self.code.numpy()], self.affine.numpy()))

    @functools.cached_property
    def response(self) -> Tensor:
        """``(2, 2)``: change of the logarithm of the volumes of `AGEING` (rows) per mm of each amplitude, at first.

        To first order, what is fetched from ``X + α w(X)`` has moved to ``X - α w(X)``; volumes follow from that.
        """
        rows, little = [], 0.01
        for numbers, _ in AGEING.values():
            chosen = torch.isin(self.numbers, torch.tensor(numbers))
            surface = Surface(chosen[self.code.long()], self.affine)
            before = surface.volume(surface.corners)
            for amplitude in little * torch.eye(2, dtype=torch.float64):
                moved = 2 * surface.corners - self.pull(surface.corners, amplitude)
                rows.append((surface.volume(moved) / before).log() / little)
        return torch.stack(rows).view(2, 2)

    def index(self, points: Tensor) -> Tensor:
        """Index of points ``(N, 3)`` of the map frame."""
        inverse = torch.linalg.inv(self.affine).to(points.dtype)
        return points @ inverse[:3, :3].T + inverse[:3, 3]

    def pull(self, points: Tensor, amplitude: Tensor) -> Tensor:
        """``X + Σ_k α_k w_k(X)`` for points ``(N, 3)`` and amplitudes ``(2,)`` in mm."""
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
    """The two fields of `AGEING`, each at most 1 long."""
    to_voxels = np.linalg.inv(affine[:3, :3])

    def blurred(mask: np.ndarray, sigma: float) -> np.ndarray:
        return gaussian_filter(mask.astype(np.float32), sigma * np.linalg.norm(to_voxels, axis=1), mode="nearest")

    def gradient(volume: np.ndarray) -> np.ndarray:
        return np.einsum("ba,b...->a...", to_voxels.astype(np.float32), np.stack(np.gradient(volume)))

    ventricles, cortex = (np.isin(label, numbers) for numbers, _ in AGEING.values())
    skull_stripped = (label > 0) & (label < _FACE)
    brain = skull_stripped & (label != _FLUID)
    inner = blurred(brain & ~cortex, _RIBBON)
    shell = np.clip(1 - 2 * inner, 0, 1) * np.clip(2 * blurred(skull_stripped, _SKULL) - 1, 0, 1)
    outward = -gradient(blurred(brain, AGEING["cortex"][1]))
    length = np.linalg.norm(outward, axis=0)
    fields = [gradient(blurred(ventricles, AGEING["ventricles"][1])), outward / (length + length.max() / 4) * shell]
    return np.stack([field / np.linalg.norm(field, axis=0).max() for field in fields]).astype(np.float16)
