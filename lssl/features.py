"""Features of whole scans by a trained network, with the normalisation, voxel size and windows of its training."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lssl.checkpoint import checkpoint_of, load, read_checkpoint
from lssl.data.channels import onto_grid
from lssl.data.nifti import automatic_foreground, read_image, read_mask, scale
from lssl.export.rebuild import load as rebuild
from lssl.networks.backbone import Backbone
from lssl.segmentation.volumes import resampled, working_grid
from lssl.utils.errors import InputError
from lssl.utils.trust import check_classes
from lssl.views import geometry as geo

__all__ = ["FeatureMap", "TrainedBackbone", "load_backbone"]

SIGMA = 0.125  # of the windows' Gaussian weights, as a share of their side, as in MONAI


@dataclass(frozen=True)
class FeatureMap:
    """Features of one scan at one tap.

    Attributes:
        values: ``(C, d, h, w)`` float32.
        affine: ``(4, 4)`` float64, feature index → mm in the scan's world space (RAS+).
    """

    values: Tensor
    affine: Tensor

    def at(self, points_mm: Any) -> Tensor:
        """``(N, C)`` features at points ``(N, 3)`` in mm of world space, interpolated linearly; edges repeat."""
        points = torch.as_tensor(points_mm, dtype=torch.float64).reshape(1, -1, 3)
        return geo.sample(self.values[None], self.affine[None], points)[0]


class TrainedBackbone:
    """A trained network that reads scans as in its training; see :func:`load_backbone`.

    Attributes:
        backbone: network and taps, in evaluation mode.
        spacing: ``(3,)`` mm between voxels in training.
        window: sides of the training views, in voxels.
    """

    def __init__(self, backbone: Backbone, spacing: Sequence[float], window: Sequence[int]) -> None:
        self.backbone = backbone.eval()
        self.spacing = torch.tensor(list(spacing), dtype=torch.float64)
        self.window = tuple(int(side) for side in window)
        backbone.check_size(self.window)

    def to(self, device: str | torch.device) -> TrainedBackbone:
        """Moves the network."""
        self.backbone.to(device)
        return self

    def read(self, image: str | Path | Sequence[str | Path], mask: str | Path | None = None) -> tuple[Tensor, Tensor]:
        """A scan as the network takes it.

        Axes are turned to RAS+; each channel's background becomes 0 and the 99.9th percentile of its foreground 1; then
        it is resampled to the training's voxel size.

        Args:
            image: NIfTI file, or one for each channel; further ones are resampled to the grid of the first.
            mask: of the foreground, on the grid of the first image; None finds the head.

        Returns:
            ``(C, D, H, W)`` float32, and its ``(4, 4)`` index → mm.
        """
        files = [str(image)] if isinstance(image, str | Path) else [str(file) for file in image]
        if len(files) != self.backbone.in_channels:
            raise InputError(f"The network takes {self.backbone.in_channels} channel(s), not {len(files)} file(s).")
        voxels, affine = read_image(files[0])
        foreground = automatic_foreground(voxels) if mask is None else read_mask(str(mask))
        if foreground.shape != voxels.shape:
            raise InputError(f"The mask {mask} does not lie on the grid of {files[0]}.")
        channels = [scale(voxels, foreground)]
        for file in files[1:]:
            other, there = read_image(file)
            moved = onto_grid(other, there, affine, voxels.shape)
            channels.append(scale(moved, foreground))
        index_to_mm = torch.from_numpy(affine)
        volume = torch.stack([torch.from_numpy(channel) for channel in channels])
        size, matrix = working_grid(volume.shape[1:], geo.spacing(index_to_mm), self.spacing)
        return resampled(volume, size, matrix), index_to_mm @ matrix

    def features(
        self,
        image: str | Path | Sequence[str | Path],
        taps: Sequence[str] | None = None,
        mask: str | Path | None = None,
        overlap: float = 0.5,
    ) -> dict[str, FeatureMap]:
        """Features of a whole scan.

        The network sees windows as large as the views of its training; a Gaussian around each window's centre weighs
        its features where windows overlap.

        Args:
            image: NIfTI file, or one for each channel.
            taps: wanted ones; None takes all.
            mask: NIfTI file of the foreground; None finds the head.
            overlap: of neighbouring windows, as a share of their side.

        Returns:
            Tap → features.
        """
        names = list(self.backbone.taps) if taps is None else list(taps)
        self.backbone.check_taps(names)
        if not 0 <= overlap < 1 or not names:
            raise InputError(f"features: name at least one tap, and an overlap from 0 to below 1, not {overlap}.")
        volume, affine = self.read(image, mask)
        maps = self._blended(volume, names, overlap)
        found = {}
        for name, values in maps.items():
            tap = self.backbone.taps[name]
            keep = [math.ceil(side / stride) for side, stride in zip(volume.shape[1:], tap.stride, strict=True)]
            d, h, w = (slice(0, number) for number in keep)
            found[name] = FeatureMap(values[:, d, h, w].clone(), geo.feature_affine(affine, tap.stride, tap.offset))
        return found

    @torch.no_grad()
    def _blended(self, volume: Tensor, names: Sequence[str], overlap: float) -> dict[str, Tensor]:
        """Weighted means of the windows' features, over the volume padded with zeros at its far ends."""
        taps = self.backbone.taps
        strides = [max(tap.stride[axis] for tap in taps.values()) for axis in range(3)]
        starts = [
            _starts(side, window, stride, overlap)
            for side, window, stride in zip(volume.shape[1:], self.window, strides, strict=True)
        ]
        ends = [axis[-1] + window for axis, window in zip(starts, self.window, strict=True)]
        padded = torch.zeros(volume.shape[0], *ends)
        padded[:, : volume.shape[1], : volume.shape[2], : volume.shape[3]] = volume
        device = next(self.backbone.parameters()).device
        sums: dict[str, Tensor] = {}
        weights: dict[str, Tensor] = {}
        for place in itertools.product(*starts):
            d, h, w = (slice(start, start + window) for start, window in zip(place, self.window, strict=True))
            for name, value in self.backbone(padded[None, :, d, h, w].to(device), names).items():
                stride = taps[name].stride
                if name not in sums:
                    shape = [end // step for end, step in zip(ends, stride, strict=True)]
                    sums[name], weights[name] = torch.zeros(value.shape[1], *shape), torch.zeros(shape)
                where = tuple(
                    slice(start // step, start // step + length)
                    for start, step, length in zip(place, stride, value.shape[2:], strict=True)
                )
                gaussian = _gaussian(self.window, stride, taps[name].offset, value.shape[2:])
                sums[name][(slice(None), *where)] += gaussian * value[0].float().cpu()
                weights[name][where] += gaussian
        return {name: sums[name] / weights[name] for name in names}


def _starts(side: int, window: int, stride: int, overlap: float) -> list[int]:
    """First voxels of windows that cover a side; multiples of the stride, so that features of windows coincide."""
    last = max(0, math.ceil((side - window) / stride))
    hop = max(1, int(window * (1 - overlap) / stride))
    return [stride * min(step * hop, last) for step in range(math.ceil(last / hop) + 1)]


def _gaussian(window: Sequence[int], stride: Sequence[float], offset: Sequence[float], size: Sequence[int]) -> Tensor:
    """``size`` weights of a window's features by the distance of their centres from the window's."""
    axes = []
    for side, step, shift, number in zip(window, stride, offset, size, strict=True):
        away = step * torch.arange(number) + shift - (side - 1) / 2
        axes.append(torch.exp(-0.5 * (away / (SIGMA * side)) ** 2).clamp_min(1e-3))
    return axes[0][:, None, None] * axes[1][:, None] * axes[2]


def load_backbone(
    path_or_name: str | Path, spacing: Sequence[float] | None = None, device: str | torch.device = "cpu"
) -> TrainedBackbone:
    """A trained network that gives features of NIfTI files.

    Example:
        >>> net = lssl.load_backbone("runs/demo")  # doctest: +SKIP
        >>> features = net.features("scan.nii.gz")
        >>> features["decoder.0"].values.shape, features["decoder.0"].affine

    Args:
        path_or_name: run folder, name of a run in ``runs/``, checkpoint, or a folder that ``lssl export`` wrote for
            MONAI or safetensors.
        spacing: mm between voxels in training; None takes what the file says.
        device: of the network.
    """
    path = Path(path_or_name)
    if not path.exists() and (Path("runs") / path).exists():
        path = Path("runs") / path
    exported = (path / "metadata.json").is_file()
    backbone, window, recorded = _exported(path) if exported else _trained(checkpoint_of(path))
    spacing = spacing or recorded
    if not spacing:
        raise InputError(f"{path} does not say the voxel size of its training; give spacing=(x, y, z) in mm.")
    if len(spacing) != 3 or not all(float(side) > 0 for side in spacing):
        raise InputError(f"spacing: give three sides in mm above 0, not {list(spacing)}.")
    return TrainedBackbone(backbone, [float(side) for side in spacing], window).to(device)


def _trained(checkpoint: Path) -> tuple[Backbone, Sequence[int], Sequence[float] | None]:
    """Network, sides of the views and voxel size of a checkpoint."""
    task = load(checkpoint)
    stored = read_checkpoint(checkpoint)
    return task.backbone, task.views.size, stored.get("spacing") or (stored["lssl"].get("data") or {}).get("spacing_mm")


def _exported(folder: Path) -> tuple[Backbone, Sequence[int], Sequence[float] | None]:
    """The same of an exported folder."""
    meta = json.loads((folder / "metadata.json").read_text())
    if not any((folder / f"model.{ending}").is_file() for ending in ("pt", "safetensors")):
        raise InputError(f"{folder} holds no model.pt or model.safetensors; export it with --to monai or safetensors.")
    check_classes({"class_path": meta["network"]["class"], "init_args": meta["network"]["arguments"]}, str(folder))
    network = rebuild(folder)
    inner = network.get_submodule("0") if meta["classes"] else network
    taps = {name: tap["path"] for name, tap in meta["taps"].items()}
    backbone = Backbone(inner, taps, meta["in_channels"], meta["padding"])
    return backbone, meta["view_size"], meta["spacing_mm"]
