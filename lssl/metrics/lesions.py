"""Lesions found one by one: detection, F1 and volume over connected components, after MSSEG-2."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

__all__ = ["LesionScores", "find_lesions", "lesion_scores"]

NAN = float("nan")


@dataclass(frozen=True)
class LesionScores:
    """Prediction against truth, lesion by lesion.

    Attributes:
        true_lesions: lesions of the truth.
        found: those of them that the prediction covers enough of.
        lesions: predicted lesions.
        confirmed: those of them that lie enough in the truth.
        true_volume: mm³ of the truth.
        volume: mm³ of the prediction.
        false_volume: mm³ of the predicted lesions that are not confirmed.
        dice: of all voxels; NaN if the truth is empty.
    """

    true_lesions: int
    found: int
    lesions: int
    confirmed: int
    true_volume: float
    volume: float
    false_volume: float
    dice: float

    @property
    def sensitivity(self) -> float:
        """Share of the true lesions that are found; NaN if there is none."""
        return self.found / self.true_lesions if self.true_lesions else NAN

    @property
    def precision(self) -> float:
        """Share of the predicted lesions that are confirmed; NaN if none is predicted."""
        return self.confirmed / self.lesions if self.lesions else NAN

    @property
    def f1(self) -> float:
        """Harmonic mean of both; NaN if there is no true lesion, 0 if none is found or confirmed."""
        if not self.true_lesions:
            return NAN
        if not self.found or not self.confirmed:
            return 0.0
        return 2 * self.sensitivity * self.precision / (self.sensitivity + self.precision)

    @property
    def false_lesions(self) -> int:
        """Predicted lesions that are not confirmed."""
        return self.lesions - self.confirmed


def find_lesions(mask: np.ndarray, voxel: float, min_volume: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """Connected components of a mask, by 26 neighbours.

    Args:
        mask: ``(D, H, W)`` bool.
        voxel: volume of a voxel in mm³.
        min_volume: smaller components, in mm³, are no lesions.

    Returns:
        ``(D, H, W)`` int32 numbers of the lesions, 0 elsewhere; and their volumes ``(N,)`` in mm³, in that order.
    """
    from scipy import ndimage

    number, _ = ndimage.label(mask, np.ones((3, 3, 3)))
    volumes = np.bincount(number.ravel())[1:] * voxel
    keep = volumes >= min_volume - 1e-9
    renumbered = np.concatenate([[0], np.where(keep, np.cumsum(keep), 0)]).astype(np.int32)
    return renumbered[number], volumes[keep]


def lesion_scores(
    predicted: np.ndarray, truth: np.ndarray, voxel: float, min_volume: float = 3.0, share: float = 0.1
) -> LesionScores:
    """Scores of one visit.

    A true lesion is found if at least ``share`` of its voxels are predicted. A predicted lesion is confirmed if at
    least ``share`` of its voxels lie in the truth. Components below ``min_volume`` are neither counted nor false, but
    their voxels still cover others.

    After MSSEG-2 (Commowick et al., 2021), which gives F1 and Dice where lesions are new, and the number and volume of
    false lesions where none is, with components of 3 mm³ or more. Simplified: for a lesion to be found, MSSEG-2 also
    limits how much of the predictions that cover it may lie outside (β and γ of Commowick et al., Scientific Reports
    2018). Here, one prediction over everything finds every lesion, and precision shows it. (Both rules are from memory;
    the papers could not be read.)

    Args:
        predicted: ``(D, H, W)`` bool.
        truth: ``(D, H, W)`` bool.
        voxel: volume of a voxel in mm³.
        min_volume: of a lesion in mm³.
        share: of a lesion's voxels.

    Example:
        >>> mask = np.zeros((4, 4, 4), bool)
        >>> mask[1, 1, :2] = True
        >>> lesion_scores(mask, mask, voxel=8.0).f1
        1.0
    """
    mine, volumes = find_lesions(predicted, voxel, min_volume)
    true, true_volumes = find_lesions(truth, voxel, min_volume)
    found = np.bincount(true[predicted], minlength=len(true_volumes) + 1)[1:] * voxel >= share * true_volumes - 1e-9
    confirmed = np.bincount(mine[truth], minlength=len(volumes) + 1)[1:] * voxel >= share * volumes - 1e-9
    both, every = int((predicted & truth).sum()), int(predicted.sum()) + int(truth.sum())
    return LesionScores(
        true_lesions=len(true_volumes),
        found=int(found.sum()),
        lesions=len(volumes),
        confirmed=int(confirmed.sum()),
        true_volume=float(truth.sum() * voxel),
        volume=float(predicted.sum() * voxel),
        false_volume=float(volumes[~confirmed].sum()),
        dice=2 * both / every if truth.any() else NAN,
    )
