"""Registration finds known motions, in both directions alike."""

from __future__ import annotations

import numpy as np
import pytest
from helpers import few
from scans import REAL, rigid, scan

from lssl.data.nifti import automatic_foreground, read_image, read_mask
from lssl.prepare import quality
from lssl.prepare.register import register, roughly
from lssl.prepare.transforms import closure, displacement, half_way, right_turns
from lssl.prepare.volumes import Volume, common_grid, resample, resample_mask, thick

real = [pytest.mark.real, pytest.mark.skipif(not (REAL / "mri").is_dir(), reason=f"no real MRI in {REAL}")]


@pytest.mark.parametrize(
    ("degrees", "mm", "spacing", "bias"),
    few([(15, 20, (3.0, 3.0, 5.0), 0.4), (0, 0, (4.0, 4.0, 4.0), 0.0), (5, 4, (4.0, 4.0, 4.0), 0.0)], 2),
)
def test_known_motions_are_found_whichever_image_comes_first(degrees, mm, spacing, bias):
    motion = rigid(degrees, mm, 3)
    first, second = scan(), scan(motion, spacing, seed=1, bias=bias)
    there, back = register(first, second), register(second, first)
    assert displacement(there.matrix, motion, first.points()) < 0.8  # a fifth of a voxel
    assert displacement(there.matrix, np.linalg.inv(back.matrix), first.points()) < 0.05
    assert there.disagreement < 1.0


@pytest.mark.parametrize("number", few([17, 3, 10], 1))
def test_a_head_laid_down_by_right_angles_is_found(number):
    """Scanned feet first or on the side, or with a wrong header: the affine turns the whole head."""
    motion, turn = rigid(6, 8, 3), right_turns()[number]
    first, second = scan(), scan(motion, seed=1)
    turned = Volume(second.voxels, turn @ second.affine, second.foreground)
    assert displacement(register(first, turned).matrix, turn @ motion, first.points()) < 0.8


def test_three_visits_agree():
    """Registered pair by pair they would contradict each other by some tenths of a millimetre."""
    places = [rigid(4 * visit, 6 * visit, visit) for visit in range(3)]
    visits = [scan(place, (8.0, 8.0, 8.0), seed) for seed, place in enumerate(places)]
    pairs = [(0, 1), (0, 2), (1, 2)]
    measured = {(i, j): register(visits[i], visits[j]).matrix for i, j in pairs}
    points = visits[0].points()
    maps = half_way(3, measured)
    solved = {(i, j): maps[j] @ np.linalg.inv(maps[i]) for i, j in pairs}
    print(f"closure of pairs {closure(measured, points):.3f} mm, of the solution {closure(solved, points):.1e} mm")
    assert closure(solved, points) < 0.1
    for i, j in pairs:
        assert displacement(solved[i, j], places[j] @ np.linalg.inv(places[i]), points) < 1.0


def test_another_contrast_is_no_obstacle():
    motion = rigid(8, 10, 5)
    first, second = scan(), scan(motion, seed=1)
    second.voxels = (second.foreground * (400 - second.voxels)).astype(np.float32)
    assert displacement(register(first, second).matrix, motion, first.points()) < 1.0


def test_half_of_the_head_is_enough():
    motion = rigid(6, 8, 1)
    first, second = scan(), scan(motion, seed=1, lowest=-20.0)
    assert displacement(register(first, second).matrix, motion, first.points()) < 1.5


def test_affine_maps_find_a_scaling():
    stretch = rigid(5, 6) @ np.diag([1.03, 0.98, 1.02, 1.0])
    first, second = scan(), scan(stretch, seed=1)
    found = register(first, second, "affine").matrix
    assert displacement(found, stretch, first.points()) < 0.8
    rigid_only = register(first, second).matrix
    assert displacement(rigid_only, stretch, first.points()) > 0.8


def load(path) -> Volume:
    voxels, affine = read_image(str(path))
    return Volume(voxels, affine, automatic_foreground(voxels))


def moved(
    volume: Volume, motion: np.ndarray, spacing: float, seed: int, noise: float = 0.03, bias: float = 1.0
) -> Volume:
    """A second scan of a real head: moved, at another resolution, with another bias field and noise."""
    grid = common_grid([volume], [np.linalg.inv(motion)], spacing, 12.0)
    image = resample(volume, grid, np.linalg.inv(motion))
    x, y, z = np.meshgrid(*[np.linspace(-1, 1, length) for length in image.shape], indexing="ij")
    image = image * np.exp(bias * (0.25 * x + 0.2 * y * z - 0.15 * z**2))
    rng, noise = np.random.default_rng(seed), noise * np.percentile(image, 99)
    image = np.hypot(image + noise * rng.standard_normal(image.shape), noise * rng.standard_normal(image.shape))
    return Volume(image.astype(np.float32), grid.affine, automatic_foreground(image.astype(np.float32)))


def about_centre(volume: Volume, degrees: float, mm: float, seed: int) -> np.ndarray:
    shift = np.eye(4)
    shift[:3, 3] = volume.centre()
    return shift @ rigid(degrees, mm, seed) @ np.linalg.inv(shift)


class TestReal:
    pytestmark = real

    @pytest.mark.parametrize(
        ("name", "spacing", "bar"),
        [
            ("sub-oms01/ses-01/anat/sub-oms01_ses-01_T1w", 1.2, 0.5),
            ("sub-ixi012/ses-01/anat/sub-ixi012_ses-01_T1w", 2.0, 1.0),
            ("sub-oms03/ses-01/anat/sub-oms03_ses-01_FLAIR", 1.5, 0.5),
            ("sub-omx07/ses-01/anat/sub-omx07_ses-01_T1w", 1.2, 0.5),
        ],
    )
    @pytest.mark.slow  # the pair below is quick; test_known_motions_… has the same bars on drawn heads
    def test_landmarks(self, name, spacing, bar):
        """Median landmark error of a motion of 15° and 20 mm, with noise, bias and another resolution."""
        first = load(REAL / "mri" / f"{name}.nii.gz")
        motion = about_centre(first, 15, 20, 2)
        second = moved(first, motion, spacing, 1)
        there, back = register(first, second).matrix, register(second, first).matrix
        points = first.points(2000)
        errors = np.linalg.norm(points @ (there - motion)[:3, :3].T + (there - motion)[:3, 3], axis=1)
        print(f"{name}: median landmark error {np.median(errors):.3f} mm")
        assert np.median(errors) < bar
        assert displacement(there, np.linalg.inv(back), points) < 0.05

    def test_equal_smoothness(self):
        """Two scans of one head, each on a grid of its own; half-way, both are interpolated alike."""
        head = load(REAL / "mri/sub-oms01/ses-01/anat/sub-oms01_ses-01_T1w.nii.gz")
        places = [about_centre(head, 4, 3, 5), about_centre(head, 13, 9, 6)]
        scans = [moved(head, place, 2.0, 1, noise=0.0, bias=0.0) for place in places]
        motion = places[1] @ np.linalg.inv(places[0])
        maps = half_way(2, {(0, 1): motion})
        grid = common_grid(scans, maps, 2.0, 4.0)
        images = [resample(volume, grid, matrix) for volume, matrix in zip(scans, maps, strict=True)]
        inside = resample_mask(scans[0].foreground, scans[0].affine, grid, maps[0])
        one, two = (quality.laplacian_energy(image, inside) for image in images)
        print(f"Laplacian energy {one:.4f} and {two:.4f}, ratio {one / two:.4f}")
        assert abs(one / two - 1) < 0.02

    @pytest.mark.parametrize("spacing", few([1.5, 1.0], 1))
    @pytest.mark.parametrize(("subject", "bar"), few([("03", 0.70), ("01", 0.93)], 1))
    def test_scans_as_they_come(self, subject, bar, spacing):
        """FLAIR of two visits with 3–4 mm slices on other grids; brain masks from the registered copies in mri/."""
        scans = [
            load(REAL / f"raw/sub-{subject}/ses-{n}/anat/sub-{subject}_ses-{n}_FLAIR.nii.gz") for n in ("01", "02")
        ]
        maps = half_way(2, {(0, 1): register(*scans).matrix})
        grid = common_grid(scans, maps, spacing, 8.0)
        for volume in scans:
            volume.linear = thick(scans, spacing)
        images = [resample(volume, grid, matrix) for volume, matrix in zip(scans, maps, strict=True)]
        reference = load(REAL / f"mri/sub-oms{subject}/ses-01/anat/sub-oms{subject}_ses-01_FLAIR.nii.gz")
        mask = read_mask(
            str(REAL / f"mri/derivatives/masks/sub-oms{subject}/anat/sub-oms{subject}_desc-brain_mask.nii.gz")
        )
        ours = Volume(images[0], grid.affine, automatic_foreground(images[0]))
        brain = resample_mask(mask, reference.affine, grid, roughly(ours, reference))
        brain &= (images[0] > 0) & (images[1] > 0)
        found = quality.ncc(images[0], images[1], brain)
        print(f"sub-{subject}: brain NCC {found:.3f} at {spacing} mm")
        assert found >= bar
