"""How well the visits of a subject lie on each other, in figures."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

__all__ = [
    "flags",
    "laplacian_energy",
    "misaligned",
    "mutual_information",
    "ncc",
    "other_person",
    "overlap",
    "pairwise",
    "too_small",
]

#: Below or above which a visit is flagged; see :func:`flags`.
LOWEST_NCC, LOWEST_OVERLAP, LOWEST_COVERAGE = 0.5, 0.75, 0.85
LARGEST_DISAGREEMENT, LARGEST_CLOSURE, LARGEST_ROTATION = 2.0, 3.0, 45.0  # mm, mm, degrees
THICKEST = 5.0  # mm
LOWEST_SAME_PERSON = 0.2  # see lssl.prepare.people for what it rests on
#: Of 1000 voxels of 2 mm, some 8 of which are one at the resolution of a scan, a correlation is known to ±0.1.
FEWEST, SMALLEST = 1000, 8.0  # voxels of 2 mm, ml


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


def pairwise(
    images: list[np.ndarray], masks: list[np.ndarray], contrasts: Sequence[str] = ()
) -> list[dict[str, float]]:
    """Of each image, its mean figures against the others; NaN for a single one.

    These are NCC, mutual information, Dice overlap, and ``common``, the voxels that both foregrounds hold. NCC and
    mutual information leave out images with which fewer than :data:`FEWEST` voxels are common, or which are flat; and
    NCC those of another contrast.
    """
    number = len(images)
    figures: list[list[tuple[float, float, float, float]]] = [[] for _ in images]
    for i in range(number):
        for j in range(i + 1, number):
            inside = masks[i] & masks[j]
            common = int(inside.sum())
            alike = float("nan"), float("nan")
            if common >= FEWEST:
                alike = ncc(images[i], images[j], inside), mutual_information(images[i], images[j], inside)
            if contrasts and contrasts[i] != contrasts[j]:
                alike = float("nan"), alike[1]
            found = (*alike, overlap(masks[i], masks[j]), float(common))
            figures[i].append(found)
            figures[j].append(found)
    means = [_known_mean(np.array(found).reshape(-1, 4)) for found in figures]
    return [dict(zip(("ncc", "mi", "overlap", "common"), mean, strict=True)) for mean in means]


def _known_mean(figures: np.ndarray) -> list[float]:
    """Mean of each column ``(N, K)`` over its known values; NaN where there is none."""
    columns = [column[~np.isnan(column)] for column in figures.T]
    return [float(column.mean()) if len(column) else float("nan") for column in columns]


def flags(row: dict[str, float], spacing: np.ndarray, floor: float = LOWEST_NCC) -> list[str]:
    """What looks wrong with a visit, in words; comparisons with NaN are false, so a single visit is not blamed.

    Args:
        row: its quality figures; ``other_contrast`` if no other visit has an image of its contrast.
        spacing: native voxel size in mm.
        floor: lowest correlation with the subject's other visits that counts as aligned.
    """
    found = misaligned(row, floor) + list(filter(None, [too_small(row["foreground_ml"])]))
    judged = (
        row["common_ml"] >= SMALLEST and row["ncc_after"] >= floor
    )  # nan of another contrast; a failed registration says nothing of persons
    if judged and -LOWEST_SAME_PERSON < row["same_person"] < LOWEST_SAME_PERSON:
        found.append(other_person(row["same_person"], "the other visits"))
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
    paired = not np.isnan(row["disagreement_mm"])
    few = row["common_ml"] < SMALLEST
    lost = row["ncc_after"] < floor or (paired and np.isnan(row["ncc_after"]))
    across = row.get("other_contrast", False)
    if across:  # the figure of one contrast says nothing; how much better than mirrored it fits does
        lost = bool(np.isnan(row["same_person"]))
    if few:
        found.append(
            f"foreground shares {row['common_ml']:.1f} ml with the other visits: too few voxels to judge the alignment"
        )
    elif lost and across:
        found.append("cannot be compared with the other visits, which have another contrast")
    elif across and abs(row["same_person"]) < LOWEST_SAME_PERSON:
        found.append(f"not aligned, or {other_person(row['same_person'], 'the other visits')}")
    elif lost:
        found.append(
            f"correlates by {row['ncc_after']:.2f} with the other visits: not aligned, another contrast or another "
            f"person"
        )
    if row["overlap"] < LOWEST_OVERLAP:
        found.append(f"foregrounds overlap by {row['overlap']:.2f} only")
    if row["disagreement_mm"] > LARGEST_DISAGREEMENT:
        found.append(f"both directions of registration disagree by {row['disagreement_mm']:.1f} mm")
    if row["closure_mm"] > LARGEST_CLOSURE:
        found.append(f"registrations of three visits disagree by {row['closure_mm']:.1f} mm")
    if not few and not lost and row["same_person"] <= -LOWEST_SAME_PERSON:
        found.append(other_person(row["same_person"], "the other visits"))
    return found


def other_person(figure: float, others: str) -> str:
    """What a figure of :func:`lssl.prepare.people.same_person` says against a visit, in words; empty if nothing.

    Args:
        figure: the visit's; NaN where it could not be judged.
        others: what it was compared with.
    """
    if figure <= -LOWEST_SAME_PERSON:
        return f"left–right flipped against {others}"
    if figure < LOWEST_SAME_PERSON:
        return (
            f"perhaps another person than {others}, or noise: fits their mirror image about as well "
            f"(same_person {figure:.2f}, below {LOWEST_SAME_PERSON:g})"
        )
    return ""


def too_small(ml: float) -> str:
    """What the size of a foreground says against a visit, in words; empty if nothing."""
    if ml >= SMALLEST:
        return ""
    return f"foreground holds {ml:.1f} ml: a few bright voxels hide the head; repair the image or give a mask"
