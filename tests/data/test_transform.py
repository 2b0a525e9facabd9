"""Which transforms a datamodule takes, and that a voxel keeps its place in the world under TorchIO's."""

import functools
import os
import shutil
import subprocess

import numpy as np
import pytest
import torch
import torchio

from lssl.data.batch import Visit
from lssl.data.transform import visit_transform
from lssl.utils.errors import InputError

TURNED = np.array([[0.8, -0.6, 0, 3], [0.6, 0.8, 0, -7], [0, 0, 1, 11], [0, 0, 0, 1]]) @ np.diag([1.5, 1, 2, 1])


class Rolled(torchio.SpatialTransform):
    """A user's own: everything moves by three voxels, the affine stays."""

    def apply_transform(self, subject):
        for image in subject.get_images(intensity_only=False):
            image.set_data(torch.roll(image.data, 3, 1))
        return subject


def annotated(visit: Visit) -> int:
    return 1


def visit(channels=1, size=20):
    """The image is the world's first coordinate, so its place can be read from its values."""
    index = np.stack(np.meshgrid(*[np.arange(size)] * 3, indexing="ij"))
    world = np.einsum("ij,jdhw->idhw", TURNED[:3, :3], index) + TURNED[:3, 3, None, None, None]
    return Visit(
        image=torch.from_numpy(world[:1].repeat(channels, 0)).float(),
        affine=torch.from_numpy(TURNED),
        foreground=torch.from_numpy(index[0] > 4),
        label=torch.from_numpy(np.where(index[1] > 9, 7, -1).astype(np.int16)),
    )


@pytest.mark.parametrize(
    "transform",
    [os.system, subprocess.call, shutil.rmtree, dict, Visit, torch.nn.Conv3d, annotated, "text", lambda: None, print],
)
def test_what_is_no_function_of_a_visit_is_refused(transform):
    with pytest.raises(InputError, match="is no function of a visit"):
        visit_transform(transform)


@pytest.mark.parametrize("transform", [lambda one: one, functools.lru_cache(lambda one: one), torch.nn.Identity()])
def test_functions_of_a_visit_pass(transform):
    assert visit_transform(transform) is transform


@pytest.mark.parametrize(
    "transform",
    [
        torchio.RandomFlip(),
        torchio.RandomAffine(degrees=1, p=0.01),
        torchio.Compose([torchio.RandomNoise(), torchio.OneOf([torchio.RandomElasticDeformation()])]),
        Rolled(),
    ],
)
def test_what_moves_the_head_is_refused(transform):
    with pytest.raises(InputError, match="moves the head without moving its affine"):
        visit_transform(transform)


@pytest.mark.parametrize(
    "transform",
    [torchio.CropOrPad((14, 24, 11)), torchio.Resample((2.0, 1.0, 1.5)), torchio.ToCanonical()],
)
def test_a_voxel_keeps_its_place_when_the_grid_changes(transform):
    before = visit()
    after = visit_transform(transform)(before)
    assert after.image.shape[1:] == after.foreground.shape == after.label.shape
    index = torch.nonzero(after.foreground)
    world = index.double() @ after.affine[:3, :3].T + after.affine[:3, 3]
    there = torch.linalg.solve(before.affine[:3, :3], (world - before.affine[:3, 3]).T).T
    inner = ((there > 0) & (there < 19)).all(1)
    assert inner.sum() > 500
    apart = after.image[0][tuple(index[inner].T)] - world[inner, 0]
    assert apart.abs().max() < 1e-3
    assert (there[inner, 0] > 3.4).all()  # foreground and label move with the image
    labelled = after.label[tuple(index[inner].T)] == 7
    assert (labelled == (there[inner, 1] > 9)).float().mean() > 0.95
    assert after.label.dtype == torch.int16


def test_intensities_change_alone():
    before = visit(channels=2)
    after = visit_transform(torchio.RandomNoise(std=5, p=1))(before)
    assert not torch.equal(after.image, before.image)
    assert torch.equal(after.foreground, before.foreground)
    assert torch.equal(after.label, before.label)
    assert torch.equal(after.affine, before.affine)
