"""Registration of two images of one subject with SimpleITK, the same in both directions.

A coarse search from several starts finds the basin; both directions are then refined from the better of the two coarse
results, and what is best for both of them is sought from their average (:mod:`lssl.prepare.together`). Exchanging the
images therefore gives the inverse map. All sampling is seeded and single-threaded, so that two runs agree.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Literal

import numpy as np
import SimpleITK as sitk

from lssl.data.nifti import without_hot_voxels
from lssl.prepare.together import best_together
from lssl.prepare.transforms import between, displacement, right_turn, right_turns
from lssl.prepare.volumes import LPS, Volume, to_itk, to_itk_map

__all__ = ["Match", "mirror_information", "register", "roughly"]

COARSE, MIDDLE = 8.0, 4.0  # mm
FINEST = 1.5  # mm: rigid maps of whole heads gain nothing from finer voxels
LOCAL = 15.0  # mm over which brightness is evened out
DEPTH = 12.0  # mm below the skin at which the brain begins, about
STARTS = 3  # how many of the best starts are followed
TURNED = 2  # and how many turns by right angles
TURNS = np.radians(20.0)  # rotations tried at the start, about each axis
SAMPLES = 60_000  # foreground voxels that the metric looks at
FEWEST = 1000  # places that tell one brain's folds from another's
Kind = Literal["rigid", "affine"]


@dataclass
class Match:
    """Outcome of :func:`register`.

    Attributes:
        matrix: ``(4, 4)``, point of the first image → the same point in the second, mm (RAS+).
        disagreement: of both directions, mm, as :func:`lssl.prepare.together.best_together` has it; of an affine map,
            between the directions' own results.
    """

    matrix: np.ndarray
    disagreement: float


@dataclass
class _Level:
    """An image at one resolution with its dilated foreground."""

    image: sitk.Image
    mask: sitk.Image
    samples: int
    factors: list[int]


def register(first: Volume, second: Volume, kind: Kind = "rigid") -> Match:
    """The map of the first image onto the second by mutual information over the foreground.

    Args:
        first: an image.
        second: another image of the same head, of any contrast, grid and place.
        kind: six degrees of freedom, or twelve.
    """
    turn, *coarse = _laid_down(first, second)
    second = _turned(second, turn.T)
    finest = _finest(first, second)
    pyramids = []
    for volume, level in zip((first, second), coarse, strict=True):
        fine, last = _levels(volume, MIDDLE, finest)
        pyramids.append({COARSE: level, MIDDLE: fine, finest: _deep(volume, last)})
    centres = [volume.centre() for volume in (first, second)]
    there = _search(pyramids[0][COARSE], pyramids[1][COARSE], centres[0], centres[1])
    back = _search(pyramids[1][COARSE], pyramids[0][COARSE], centres[1], centres[0])
    candidates = (there, np.linalg.inv(back))
    start = min(candidates, key=lambda matrix: _cost(pyramids, matrix))
    forward, backward = start, np.linalg.inv(start)
    for size in (MIDDLE, finest):
        forward = _refine(pyramids[0][size], pyramids[1][size], centres[0], forward, "rigid", size)
        backward = _refine(pyramids[1][size], pyramids[0][size], centres[1], backward, "rigid", size)
    one, two = (pyramid[finest] for pyramid in pyramids)
    pair = (one.image, two.image), (one.mask, two.mask)
    middle, apart = best_together(*pair, (forward, np.linalg.inv(backward)), centres, first.points())
    if kind == "affine":
        forward = _refine(one, two, centres[0], middle, kind, finest)
        backward = _refine(two, one, centres[1], np.linalg.inv(middle), kind, finest)
        middle, apart = between(forward, backward), displacement(forward, np.linalg.inv(backward), first.points())
    return Match(turn @ middle, apart)


def mirror_information(first: Volume, second: Volume, matrix: np.ndarray) -> tuple[float, float]:
    """Mutual information (nats) of the first image with the second one as it is, and with its mirror image.

    Both are registered and compared at 4 mm, deep in the head: skulls of different persons are alike, folds are not.
    Images that slid off each other share nothing. Both are NaN where voxels are too coarse or too few to tell.

    Args:
        first: an image.
        second: another one.
        matrix: point of the first → point of the second, as found by :func:`register` or :func:`roughly`.
    """
    turn = right_turn(matrix)
    second, matrix = _turned(second, turn.T), turn.T @ matrix
    (one,), (two,) = _levels(first, MIDDLE), _levels(second, MIDDLE)
    inner = _within(first, one, MIDDLE if first.brain else DEPTH)
    if inner.samples < FEWEST:
        return float("nan"), float("nan")
    flip = np.diag([-1.0, 1.0, 1.0, 1.0])
    flip[0, 3] = 2 * second.centre()[0]
    turned = Volume(second.voxels, flip @ second.affine, second.foreground, second.brain)
    (mirrored,) = _levels(turned, MIDDLE)
    straight = _refine(one, two, first.centre(), matrix, "rigid", MIDDLE)
    return _shared(inner, two, straight), _shared(inner, mirrored, roughly(first, turned))


def _shared(fixed: _Level, moving: _Level, matrix: np.ndarray) -> float:
    """Mutual information; none where less than half of the places fall into the other image.

    Of few places it is overestimated, so that images of noise drift apart while it grows.
    """
    inside = sitk.Resample(moving.image * 0 + 1, fixed.image, to_itk_map(matrix), sitk.sitkNearestNeighbor, 0.0)
    seen = float(sitk.GetArrayViewFromImage(inside)[sitk.GetArrayViewFromImage(fixed.mask) > 0].mean())
    return -_value(fixed, moving, matrix) if seen >= 0.5 else 0.0


def roughly(first: Volume, second: Volume) -> np.ndarray:
    """The rigid map of the first image onto the second to a millimetre or so, from 4 mm voxels, in one direction."""
    turn, fixed, moving = _laid_down(first, second)
    second = _turned(second, turn.T)
    start = _search(fixed, moving, first.centre(), second.centre())
    (one,), (two,) = _levels(first, MIDDLE), _levels(second, MIDDLE)
    return turn @ _refine(one, two, first.centre(), start, "rigid", MIDDLE)


def _turned(volume: Volume, turn: np.ndarray) -> Volume:
    """The same head, laid down otherwise."""
    return Volume(volume.voxels, turn @ volume.affine, volume.foreground, volume.brain)


def _laid_down(first: Volume, second: Volume) -> tuple[np.ndarray, _Level, _Level]:
    """``(4, 4)`` turn by right angles by which the second head lies against the first; nearly always the identity.

    And both coarse levels, the second one turned back.

    Patients are scanned feet first or on their side, and headers are wrong. Heads are so nearly symmetric that a half
    turn can look good at first sight, so the best are followed before they are compared. The second head is turned
    back for all that follows: angles about three axes are singular at a right angle.
    """
    (fixed,), (moving,) = _levels(first, COARSE), _levels(second, COARSE)
    centre, other = first.centre(), second.centre()
    cases = []
    for turn in right_turns():
        level, start, place = _level_turned(moving, turn.T), np.eye(4), turn[:3, :3].T @ other
        start[:3, 3] = place - centre
        cases.append((_value(fixed, level, start), turn, level, place))
    if min(case[0] for case in cases) == cases[0][0]:
        return cases[0][1], fixed, cases[0][2]
    followed = [cases[0], *sorted(cases[1:], key=lambda case: case[0])[:TURNED]]
    best = min(followed, key=lambda case: _value(fixed, case[2], _search(fixed, case[2], centre, case[3])))
    return best[1], fixed, best[2]


def _level_turned(level: _Level, turn: np.ndarray) -> _Level:
    """The same voxels, laid down otherwise."""
    lps, found = (LPS @ turn @ LPS)[:3, :3], []
    for image in (level.image, level.mask):
        laid = sitk.Image(image)
        laid.SetOrigin((lps @ np.array(image.GetOrigin())).tolist())
        laid.SetDirection((lps @ np.array(image.GetDirection()).reshape(3, 3)).ravel().tolist())
        found.append(laid)
    return _Level(found[0], found[1], level.samples, level.factors)


def _finest(first: Volume, second: Volume) -> float:
    """Voxel size of the last level: the coarser image's in-plane one, and at least :data:`FINEST`."""
    return float(max(FINEST, np.median(first.spacing()), np.median(second.spacing())))


def _levels(volume: Volume, *sizes: float) -> list[_Level]:
    image = to_itk(without_hot_voxels(volume.voxels.astype(np.float32)), volume.affine)
    mask = to_itk(volume.foreground.astype(np.float32), volume.affine)
    return [_shrunk(image, mask, size) for size in sizes]


def _shrunk(image: sitk.Image, mask: sitk.Image, size: float) -> _Level:
    """Averages the axes that are finer than ``size`` mm; thick slices stay as they are.

    Blocks of voxels are averaged: ITK's plain shrinking by an even factor displaces the image by half a voxel.
    """
    factors = [
        min(max(1, round(size / spacing)), length)
        for spacing, length in zip(image.GetSpacing(), image.GetSize(), strict=True)
    ]
    image, mask = sitk.BinShrink(image, factors), sitk.BinShrink(mask, factors) > 0.5
    image = _flat(image, sitk.Cast(mask, sitk.sitkFloat32))
    if size > MIDDLE and min(image.GetSize()) >= 4:
        image = sitk.SmoothingRecursiveGaussian(image, size / 2)
    radius = [max(1, round(4.0 / spacing)) for spacing in image.GetSpacing()]
    mask = sitk.BinaryDilate(mask, radius)
    samples = int(sitk.GetArrayViewFromImage(mask).sum())
    return _Level(image, mask, samples, factors)


def _deep(volume: Volume, level: _Level) -> _Level:
    """Looks only at what lies deeper than :data:`DEPTH` in a head, hence mostly at the brain.

    Scalp, jaw and neck move against the brain, and scanners distort them more. A brain mask is taken as it is.
    """
    if volume.brain:
        return level
    inner = _within(volume, level, DEPTH)
    return inner if inner.samples * 8 > level.samples else level


def _within(volume: Volume, level: _Level, depth: float) -> _Level:
    """Looks only at what lies deeper than ``depth`` mm in the foreground."""
    head = sitk.Greater(sitk.BinShrink(to_itk(volume.foreground.astype(np.float32), volume.affine), level.factors), 0.5)
    deep = sitk.SignedMaurerDistanceMap(head, insideIsPositive=True, squaredDistance=False, useImageSpacing=True)
    mask = deep > depth
    return _Level(level.image, mask, int(sitk.GetArrayViewFromImage(mask).sum()), level.factors)


def _flat(image: sitk.Image, mask: sitk.Image) -> sitk.Image:
    """Divides by the mean brightness within some :data:`LOCAL` mm of foreground.

    A bias field that differs between visits shifts the optimum of mutual information by tenths of a millimetre; it is
    smooth, so this removes it. Only the estimate sees this image.
    """
    if min(image.GetSize()) < 4:  # too few voxels to blur
        return image
    near = sitk.Cast(sitk.SmoothingRecursiveGaussian(image * mask, LOCAL), sitk.sitkFloat32)
    weight = sitk.Cast(sitk.SmoothingRecursiveGaussian(mask, LOCAL), sitk.sitkFloat32)
    typical = float((sitk.GetArrayViewFromImage(image) * sitk.GetArrayViewFromImage(mask)).sum())
    typical /= max(1.0, float(sitk.GetArrayViewFromImage(mask).sum()))
    # Far from the foreground the mean tends to the typical one, so that the noise of air is not blown up.
    local = (near + 0.05 * typical) / (weight + 0.05)
    return image / sitk.Cast(sitk.Maximum(sitk.Abs(local), 0.1 * abs(typical) + 1e-6), image.GetPixelID())


def _method(fixed: _Level, samples: int) -> sitk.ImageRegistrationMethod:
    method = sitk.ImageRegistrationMethod()
    method.SetMetricAsMattesMutualInformation(32)
    method.SetMetricFixedMask(fixed.mask)
    method.SetInterpolator(sitk.sitkLinear)
    # Random places between the voxels: on the voxels themselves, mutual information favours whole-voxel shifts.
    method.SetMetricSamplingStrategy(method.RANDOM)
    method.SetMetricSamplingPercentage(min(1.0, samples / max(1, fixed.image.GetNumberOfPixels())), 1)
    method.SetNumberOfThreads(1)
    return method


def _euler(matrix: np.ndarray, centre: np.ndarray) -> sitk.Euler3DTransform:
    """A rigid map as ITK's, turning about ``centre`` (RAS)."""
    lps = LPS @ matrix @ LPS
    left, _, right = np.linalg.svd(lps[:3, :3])
    transform = sitk.Euler3DTransform()
    pivot = LPS[:3, :3] @ centre
    transform.SetCenter(pivot.tolist())
    transform.SetMatrix((left @ right).ravel().tolist(), 1e-6)
    transform.SetTranslation((lps[:3, :3] @ pivot + lps[:3, 3] - pivot).tolist())
    return transform


def _affine(matrix: np.ndarray, centre: np.ndarray) -> sitk.AffineTransform:
    lps = LPS @ matrix @ LPS
    pivot = LPS[:3, :3] @ centre
    transform = sitk.AffineTransform(3)
    transform.SetCenter(pivot.tolist())
    transform.SetMatrix(lps[:3, :3].ravel().tolist())
    transform.SetTranslation((lps[:3, :3] @ pivot + lps[:3, 3] - pivot).tolist())
    return transform


def _matrix(transform: sitk.Transform) -> np.ndarray:
    """RAS matrix of an ITK map, from where it takes four points."""
    corners = np.concatenate([np.zeros((1, 3)), np.eye(3)])
    images = np.array([transform.TransformPoint(corner.tolist()) for corner in corners])
    lps = np.eye(4)
    lps[:3, :3] = (images[1:] - images[0]).T
    lps[:3, 3] = images[0]
    return LPS @ lps @ LPS


def _starts(fixed: np.ndarray, moving: np.ndarray) -> list[np.ndarray]:
    """Centres of mass on each other, or scanner coordinates as they are; turned by nothing or 20° about an axis."""
    turns = [np.eye(3)]
    for axis, sign in itertools.product(range(3), (-1, 1)):
        b, c = (axis + 1) % 3, (axis + 2) % 3
        turn = np.eye(3)
        turn[b, b] = turn[c, c] = np.cos(TURNS)
        turn[b, c], turn[c, b] = -sign * np.sin(TURNS), sign * np.sin(TURNS)
        turns.append(turn)
    found = []
    for target, turn in itertools.product((moving, fixed), turns):
        matrix = np.eye(4)
        matrix[:3, :3] = turn
        matrix[:3, 3] = target - turn @ fixed
        found.append(matrix)
    return found


def _value(fixed: _Level, moving: _Level, matrix: np.ndarray) -> float:
    """Negative mutual information; 0, the worst, where the images hardly overlap."""
    method = _method(fixed, fixed.samples)
    method.MetricUseFixedImageGradientFilterOff()  # a value needs no gradients, which take as long again
    method.MetricUseMovingImageGradientFilterOff()
    method.SetInitialTransform(_affine(matrix, np.zeros(3)))
    try:
        return float(method.MetricEvaluate(fixed.image, moving.image))
    except RuntimeError:
        return 0.0


def _cost(pyramids: list[dict[float, _Level]], matrix: np.ndarray) -> float:
    """Of both directions together."""
    one, two = pyramids[0][COARSE], pyramids[1][COARSE]
    return _value(one, two, matrix) + _value(two, one, np.linalg.inv(matrix))


def _search(fixed: _Level, moving: _Level, centre: np.ndarray, other: np.ndarray) -> np.ndarray:
    """The best of several starts, followed at the coarse level."""
    starts = sorted(_starts(centre, other), key=lambda matrix: _value(fixed, moving, matrix))[:STARTS]
    ends = [_refine(fixed, moving, centre, start, "rigid", COARSE) for start in starts]
    return min(ends, key=lambda matrix: _value(fixed, moving, matrix))


def _refine(
    fixed: _Level, moving: _Level, centre: np.ndarray, start: np.ndarray, kind: Kind, size: float
) -> np.ndarray:
    """Follows the metric downhill; a start without overlap is handed back."""
    method = _method(fixed, SAMPLES)
    step = size / (2 if kind == "rigid" else 10)  # mm; longer first steps can throw an affine map out of its basin
    method.SetOptimizerAsRegularStepGradientDescent(
        learningRate=step,
        minStep=size / 1000,
        numberOfIterations=150,
        relaxationFactor=0.6,
        gradientMagnitudeTolerance=1e-7,
    )
    method.SetOptimizerScalesFromPhysicalShift()
    transform = _euler(start, centre) if kind == "rigid" else _affine(start, centre)
    method.SetInitialTransform(transform, inPlace=True)
    try:
        method.Execute(fixed.image, moving.image)
    except RuntimeError:
        return start
    return _matrix(transform)
