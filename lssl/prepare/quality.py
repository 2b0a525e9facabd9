"""How well the visits of a subject lie on each other, in figures."""

from __future__ import annotations

import numpy as np

__all__ = ["flags", "laplacian_energy", "misaligned", "mutual_information", "ncc", "overlap", "pairwise"]

#: Below or above which a visit is flagged; see :func:`flags`.
LOWEST_NCC, LOWEST_OVERLAP, LOWEST_COVERAGE = 0.5, 0.75, 0.85
LARGEST_DISAGREEMENT, LARGEST_CLOSURE, LARGEST_ROTATION = 2.0, 3.0, 45.0  # mm, mm, degrees
THICKEST = 5.0  # mm


def ncc(one: np.ndarray, other: np.ndarray, inside: np.ndarray) -> float:
    """Normalised cross-correlation of two images over a mask; NaN where one is flat there."""
    if inside.sum() < 2:
        return float("nan")
    a, b = one[inside].astype(float), other[inside].astype(float)
    a, b = a - a.mean(), b - b.mean()
    power = float((a * a).sum() * (b * b).sum())
    return float((a * b).sum() / np.sqrt(power)) if power > 0 else float("nan")


def mutual_information(one: np.ndarray, other: np.ndarray, inside: np.ndarray, bins: int = 32) -> float:
    """Mutual information in nats from a joint histogram over a mask, between the 0.5th and 99.5th percentiles."""
    if inside.sum() < 2:
        return float("nan")

    def robust(image: np.ndarray) -> np.ndarray:
        low, high = np.percentile(image[inside], (0.5, 99.5))
        return image[inside].clip(low, max(high, low + 1e-6))

    joint = np.histogram2d(robust(one), robust(other), bins=bins)[0]
    joint /= joint.sum()
    alone = joint.sum(1, keepdims=True) * joint.sum(0, keepdims=True)
    seen = joint > 0
    return float((joint[seen] * np.log(joint[seen] / alone[seen])).sum())


def overlap(one: np.ndarray, other: np.ndarray) -> float:
    """Dice overlap of two masks."""
    total = int(one.sum()) + int(other.sum())
    return 2 * int((one & other).sum()) / total if total else float("nan")


def laplacian_energy(image: np.ndarray, inside: np.ndarray) -> float:
    """Mean squared discrete Laplacian over the mask, relative to the variance: how sharp an image is."""
    core = image[1:-1, 1:-1, 1:-1] * -6.0
    for axis in range(3):
        for shift in (0, 2):
            window = tuple(slice(shift, image.shape[a] - 2 + shift) if a == axis else slice(1, -1) for a in range(3))
            core = core + image[window]
    mask = inside[1:-1, 1:-1, 1:-1]
    return float((core[mask] ** 2).mean() / image[inside].var())


def pairwise(images: list[np.ndarray], masks: list[np.ndarray]) -> list[dict[str, float]]:
    """Of each image, its mean NCC, mutual information and overlap with the others; NaN for a single one."""
    number = len(images)
    figures: list[list[tuple[float, float, float]]] = [[] for _ in images]
    for i in range(number):
        for j in range(i + 1, number):
            inside = masks[i] & masks[j]
            found = (
                ncc(images[i], images[j], inside),
                mutual_information(images[i], images[j], inside),
                overlap(masks[i], masks[j]),
            )
            figures[i].append(found)
            figures[j].append(found)
    means = [np.mean(found, 0) if found else np.full(3, np.nan) for found in figures]
    return [{"ncc": float(a), "mi": float(b), "overlap": float(c)} for a, b, c in means]


def flags(row: dict[str, float], spacing: np.ndarray, floor: float = LOWEST_NCC) -> list[str]:
    """What looks wrong with a visit, in words; comparisons with NaN are false, so a single visit is not blamed.

    Args:
        row: its quality figures.
        spacing: native voxel size in mm.
        floor: lowest correlation with the subject's other visits that counts as aligned.
    """
    found = misaligned(row, floor)
    if row["coverage"] < LOWEST_COVERAGE:
        found.append(f"field of view holds {row['coverage']:.0%} of the head")
    if row["rotation_deg"] > LARGEST_ROTATION:
        found.append(f"turned by {row['rotation_deg']:.0f}°")
    if spacing.max() >= max(THICKEST, 2 * spacing.min()):
        found.append(f"slices of {spacing.max():.1f} mm")
    return found


def misaligned(row: dict[str, float], floor: float = LOWEST_NCC) -> list[str]:
    """Of the :func:`flags`, those that put the correspondence of a visit with the others in doubt."""
    found = []
    lost = np.isnan(row["ncc_after"]) and not np.isnan(row["disagreement_mm"])
    if row["ncc_after"] < floor or lost:
        found.append(f"correlates by {row['ncc_after']:.2f} with the other visits: not aligned, or another contrast")
    if row["overlap"] < LOWEST_OVERLAP:
        found.append(f"foregrounds overlap by {row['overlap']:.2f} only")
    if row["disagreement_mm"] > LARGEST_DISAGREEMENT:
        found.append(f"both directions of registration disagree by {row['disagreement_mm']:.1f} mm")
    if row["closure_mm"] > LARGEST_CLOSURE:
        found.append(f"registrations of three visits disagree by {row['closure_mm']:.1f} mm")
    if row["mirror_gain"] > 0 and not (row["ncc_after"] < floor or lost):  # a mirror helps any lost registration
        found.append("left–right flipped against the other visits")
    return found
