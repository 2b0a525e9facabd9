"""The last step of registration: both directions at once, against loops, planted motions and its own inverse."""

import math

import numpy as np
import pytest
import SimpleITK as sitk
from scipy.ndimage import gaussian_filter
from scipy.spatial.transform import Rotation

from lssl.prepare.together import BINS, CLOSE, REACH, best_together, mutual_information, refine_together
from lssl.prepare.transforms import displacement
from lssl.prepare.volumes import to_itk


def test_mutual_information_is_that_of_the_shared_histogram():
    random = np.random.default_rng(0)
    one, other = random.uniform(0, BINS - 1, (2, 40))
    one[0] = BINS - 1  # at the end of the range
    counts = np.zeros((BINS, BINS))
    for x, y in zip(one, other, strict=True):
        for i in range(BINS):
            for j in range(BINS):
                counts[i, j] += max(0, 1 - abs(x - i)) * max(0, 1 - abs(y - j))
    joint = counts / 40
    expected = sum(
        joint[i, j] * math.log(joint[i, j] / (joint[i].sum() * joint[:, j].sum()))
        for i in range(BINS)
        for j in range(BINS)
        if joint[i, j]
    )
    assert mutual_information(one, other) == pytest.approx(expected, rel=1e-9)
    whole = random.integers(0, BINS, 5000).astype(float)
    share = np.bincount(whole.astype(int)) / 5000
    assert mutual_information(whole, whole) == pytest.approx(-(share * np.log(share)).sum())  # the entropy
    assert mutual_information(whole, np.full(5000, 3.0)) == pytest.approx(0, abs=1e-12)


def texture(points: np.ndarray) -> np.ndarray:
    """``(...)`` smooth values at points ``(..., 3)`` mm, the same wherever they are asked for."""
    random = np.random.default_rng(5)
    waves, phases = random.normal(size=(12, 3)) / 9, random.uniform(0, 6, 12)
    return np.cos(points @ waves.T + phases).sum(-1)


def image(shape, spacing, origin, motion, contrast):
    """What a scanner shows of the texture in a ball, through ``motion``: mm of the image → mm of the head."""
    affine = np.diag([*spacing, 1.0])
    affine[:3, 3] = origin
    index = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), -1)
    points = index @ affine[:3, :3].T + affine[:3, 3]
    head = points @ motion[:3, :3].T + motion[:3, 3]
    voxels = contrast(texture(head)) * (np.linalg.norm(head, axis=-1) < 38)
    return to_itk(voxels.astype(np.float32), affine), sitk.Cast(
        to_itk((np.linalg.norm(head, axis=-1) < 34).astype(np.float32), affine), sitk.sitkUInt8
    )


def pair():
    """Fine voxels, and slices of 4 mm in another contrast; and the map from the first to the second."""
    motion = np.eye(4)
    motion[:3, :3] = Rotation.from_euler("xyz", [4, -3, 5], degrees=True).as_matrix()
    motion[:3, 3] = 3.0, -2.0, 4.0
    one = image((52, 54, 50), (1.7, 1.7, 1.7), (-44, -45, -43), np.eye(4), lambda value: value + 20)
    two = image((56, 58, 24), (1.6, 1.6, 4.0), (-45, -46, -46), motion, lambda value: 9 - np.abs(value - 1))
    return one, two, np.linalg.inv(motion)


def test_finds_a_motion_across_contrasts_and_thick_slices_and_the_inverse_from_the_other_end():
    one, two, truth = pair()
    away = np.eye(4)
    away[:3, :3] = Rotation.from_euler("xyz", [1.5, 1.0, -1.5], degrees=True).as_matrix()
    away[:3, 3] = 1.5, -1.0, 2.0
    start, centres = away @ truth, [np.zeros(3), truth[:3, 3]]
    images, masks = zip(one, two, strict=True)
    found, information = refine_together(images, masks, start, centres)
    corners = np.stack(np.meshgrid(*[[-25.0, 25.0]] * 3), -1).reshape(-1, 3)

    def error(matrix):
        return np.linalg.norm(corners @ (matrix - truth)[:3, :3].T + (matrix - truth)[:3, 3], axis=1).max()

    assert error(start) > 2.5
    assert error(found) < 0.2
    back, same = refine_together(images[::-1], masks[::-1], np.linalg.inv(start), centres[::-1])
    assert np.abs(back @ found - np.eye(4)).max() < 1e-9
    assert same == pytest.approx(information, rel=1e-12)


@pytest.mark.parametrize("both", [True, False], ids=["one contrast each", "noise"])
def test_directions_that_lie_apart_are_doubted_only_if_no_map_serves_both(both: bool):
    one, two, truth = pair()
    if not both:
        random = np.random.default_rng(0)
        one, two = ((each[0] * 0 + noise_like(each[0], random), each[1]) for each in (one, two))
    images, masks = zip(one, two, strict=True)
    centres = [np.zeros(3), truth[:3, 3]]
    ends = tuple(shifted(side * 1.6) @ truth for side in (-1, 1))
    points = np.stack(np.meshgrid(*[[-25.0, 25.0]] * 3), -1).reshape(-1, 3)
    assert displacement(*ends, points) > 3
    found, apart = best_together(images, masks, ends, centres, points)
    assert (apart < 0.3) == both
    assert (apart > CLOSE) != both
    if both:
        assert displacement(found, truth, points) < 0.2
    back, _ = best_together(
        images[::-1], masks[::-1], [np.linalg.inv(end) for end in ends[::-1]], centres[::-1], points
    )
    assert np.abs(back @ found - np.eye(4)).max() < 1e-9


def test_directions_that_agree_keep_their_figure():
    one, two, truth = pair()
    images, masks = zip(one, two, strict=True)
    ends = tuple(shifted(side * 0.4) @ truth for side in (-1, 1))
    apart = best_together(images, masks, ends, [np.zeros(3), truth[:3, 3]], np.zeros((1, 3)))[1]
    assert apart == pytest.approx(0.8)


def shifted(mm: float) -> np.ndarray:
    matrix = np.eye(4)
    matrix[0, 3] = mm
    return matrix


def noise_like(image: sitk.Image, random: np.random.Generator) -> sitk.Image:
    noise = sitk.GetImageFromArray(random.normal(size=image.GetSize()[::-1]).astype(np.float32))
    noise.CopyInformation(image)
    return noise


def test_nothing_to_see_or_nothing_better_leaves_the_start():
    one, two, truth = pair()
    centres = [np.zeros(3), truth[:3, 3]]
    empty = one[1] * 0
    assert np.allclose(refine_together((one[0], two[0]), (empty, two[1]), truth, centres)[0], truth, rtol=0, atol=1e-12)
    plain = one[0] * 0 + 1
    assert np.allclose(refine_together((plain, two[0]), (one[1], two[1]), truth, centres)[0], truth, rtol=0, atol=1e-12)


def test_noise_moves_it_no_further_than_it_may():
    random = np.random.default_rng(0)
    noise = random.normal(size=(2, 20, 20, 20)).astype(np.float32)
    images = [to_itk(gaussian_filter(each, 1), np.diag([2.0, 2, 2, 1])) for each in noise]
    masks = [sitk.Cast(each * 0 + 1, sitk.sitkUInt8) for each in images]
    found, _ = refine_together(images, masks, np.eye(4), [np.full(3, 19.0)] * 2)
    middle = np.array([19.0, 19.0, 19.0, 1.0])
    assert np.linalg.norm((found - np.eye(4)) @ middle) <= REACH * math.sqrt(3) + 1e-6
