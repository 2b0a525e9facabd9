"""What may differ between the two views of a pair, and what may not."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from some_views import BIG, SIZE, draw, index_map, views

from lssl.views import geometry as geo
from lssl.views.intensity import IntensityTransform


def test_shared_geometry_is_one_index_map(make_batch):
    first, second = draw(make_batch(4, BIG), geometry="shared")
    torch.testing.assert_close(index_map(first), index_map(second), rtol=0, atol=1e-12)


def test_aligned_geometry_shows_one_place_at_every_voxel_though_the_grids_differ(make_batch):
    """Shared geometry does not: there, the same index of grids that lie apart is another place."""
    batch = make_batch(4, BIG, image="frame", affine="oblique")
    options = {"flip": (0.5, 0.5, 0.5), "rotation": 25.0, "zoom": (0.7, 1.3), "foreground": False}
    for geometry, same in (("aligned", True), ("shared", False)):
        first, second = draw(batch, geometry=geometry, **options)
        inner = torch.ones(4, *SIZE, dtype=torch.bool)
        for view in (first, second):  # zeros mix in beyond
            seen = geo.contains(geo.transform(index_map(view), geo.lattice(SIZE)), BIG)
            inner &= seen.unflatten(1, SIZE)
        assert inner.double().mean() > 0.6
        apart = (first.image - second.image).movedim(1, -1)[inner].abs().max()
        assert (apart < 1e-3) == same
        assert (apart > 1.0) != same


def test_shared_geometry_of_two_visits_is_that_of_each(make_batch):
    """Two visits sampled as channels of one grid give what each gives alone."""
    batch = make_batch(3, BIG)
    sampler, generator = views(geometry="shared")
    for visit, view in enumerate(sampler(batch, generator)):
        alone = geo.resample(batch.images[:, visit], index_map(view), SIZE)
        torch.testing.assert_close(view.image, alone, rtol=0, atol=1e-5)


def test_independent_geometry_shifts_the_second_view(make_batch):
    first, second = draw(make_batch(8, BIG, affine="same"), affine_probability=0.0, overlap=0.3)
    middle = (torch.tensor(SIZE, dtype=torch.float64) - 1) / 2
    shift = geo.transform(torch.linalg.inv(first.affine) @ second.affine, middle[None])[:, 0] - middle
    assert (shift.abs() > 0.5).any(1).all()
    assert (shift.abs() <= (1 - 0.3 ** (1 / 3)) * torch.tensor(SIZE) + 1e-9).all()


@pytest.mark.parametrize(("intensity", "equal"), [("shared", True), ("independent", False)])
def test_shared_intensity_keeps_identical_visits_identical(make_batch, intensity: str, equal: bool):
    batch = make_batch(3, BIG, affine="same", identical=True)
    # forty steps: every transform of the default chain has changed some pair by then
    for seed in range(40):
        first, second = draw(batch, seed, geometry="shared", intensity=intensity, transforms=None)
        assert torch.equal(first.clean, second.clean)
        if not equal and not torch.equal(first.image, second.image):
            break
        assert torch.equal(first.image, second.image)
    else:
        assert equal


class Record(IntensityTransform):
    """Keeps the voxel sizes that it is given."""

    def draw(self, spacing: np.ndarray, size: tuple, draws: np.random.Generator) -> tuple:
        self.spacing = spacing
        return ()

    def apply(self, images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        return images


@pytest.mark.parametrize("geometry", ["independent", "shared", "aligned"])
@pytest.mark.parametrize("intensity", ["independent", "shared"])
def test_intensity_transforms_are_told_the_voxel_size_of_the_view(make_batch, geometry: str, intensity: str):
    record = Record()
    pair = draw(make_batch(3, BIG), geometry=geometry, intensity=intensity, zoom=(0.7, 1.4), transforms=[record])
    expected = torch.stack([view.affine[:, :3, :3].norm(dim=1) for view in pair], 1)
    expected = expected[:, 0] if intensity == "shared" else expected.flatten(0, 1)
    torch.testing.assert_close(torch.from_numpy(record.spacing), expected)


@pytest.mark.parametrize("probability", [0.0, 1.0])
def test_flips_mirror_left_and_right_only_and_both_views_together(make_batch, probability: float):
    batch = make_batch(6, BIG)
    for view in draw(batch, flip=(probability, 0.0, 0.0), rotation=10.0):
        signs = index_map(view)[:, :3, :3].diagonal(dim1=1, dim2=2).sign()
        assert torch.equal(signs, torch.tensor([1 - 2 * probability, 1, 1], dtype=torch.float64).expand(6, 3))


@pytest.mark.parametrize("together", [True, False])
def test_flip_together_gives_both_views_one_mirror(make_batch, together: bool):
    pair = draw(make_batch(32, (20, 18, 16)), flip=(0.5, 0.5, 0.5), rotation=10.0, flip_together=together, overlap=0.2)
    one, two = (index_map(view)[:, :3, :3].diagonal(dim1=1, dim2=2).sign() for view in pair)
    assert torch.equal(one, two) == together
    assert one.unique(dim=0).shape[0] > 4


def test_zoom_and_rotation_act_in_mm_and_stay_in_range(make_batch):
    batch = make_batch(64, BIG, affine="same")
    stretch = 1 + 0.2 * torch.rand(64, 1, 3, dtype=torch.float64)  # voxels differ between subjects
    batch.affines = batch.affines @ geo.scaling(stretch.expand(64, 2, 3))
    pair = draw(batch, zoom=(0.8, 1.3), rotation=10.0, flip=(0.5, 0.5, 0.5), overlap=0.2)
    source, own = (torch.cat([getattr(view, name)[:, :3, :3] for view in pair]) for name in ("source_affine", "affine"))
    step = torch.diag_embed(source.norm(dim=1))
    in_mm = step @ torch.linalg.inv(source) @ own @ torch.linalg.inv(step)
    zoom = in_mm.norm(dim=1)
    assert zoom.min() >= 0.8
    assert zoom.max() <= 1.3
    assert zoom.std() > 0.1
    turn = in_mm / zoom[:, None]  # columns stay orthogonal: no shear in mm, though voxels are anisotropic
    torch.testing.assert_close(turn.transpose(1, 2) @ turn, torch.eye(3, dtype=torch.float64).expand(128, 3, 3))
    degrees = torch.rad2deg(torch.atan2(turn[:, 1, 0], turn[:, 0, 0]).abs())  # about the third axis
    degrees = torch.minimum(degrees, 180 - degrees)
    assert degrees.max() <= 10.0 + 1e-9
    assert degrees.max() > 5
