"""Whether visits show one person: figures of known heads, groups of visits."""

from __future__ import annotations

import numpy as np
import pytest
from scans import REAL, rigid, scan

from lssl.data.nifti import automatic_foreground, read_image
from lssl.datamodules.phantom import PhantomDataModule
from lssl.prepare.people import by_visit, information_gain, same_person
from lssl.prepare.quality import LOWEST_SAME_PERSON
from lssl.prepare.register import mirror_information, register, roughly
from lssl.prepare.volumes import Volume

NAN = float("nan")


def figure(first: Volume, second: Volume) -> float:
    return same_person(first, second, roughly(first, second))


def test_the_gain_is_relative_and_chance_is_none():
    assert information_gain(0.8, 0.4) == pytest.approx(0.5)
    assert information_gain(0.4, 0.8) == pytest.approx(-0.5)
    assert information_gain(0.004, 0.001) == pytest.approx(0.015)  # of 0.2 nats
    assert np.isnan(information_gain(NAN, NAN))


def test_a_person_two_persons_and_a_flip():
    voxels = (8.0, 8.0, 8.0)
    first, again, other = scan(None, voxels), scan(rigid(5, 5), voxels, 1), scan(rigid(5, 5), voxels, 1, subject=1)
    assert figure(first, again) > 2 * LOWEST_SAME_PERSON
    assert abs(figure(first, other)) < LOWEST_SAME_PERSON
    flipped = Volume(again.voxels[::-1].copy(), again.affine, again.foreground[::-1].copy())
    assert figure(first, flipped) < -2 * LOWEST_SAME_PERSON


@pytest.mark.slow
def test_ageing_is_no_other_person():
    """Heads of the phantom, four years apart, fast atrophy; brain masks as they would be given."""
    source = PhantomDataModule(subjects=2, visits=2, size=32, spacing=6.0, interval=4.0, fast=1.0)
    source.setup()
    heads = []
    for row in range(4):
        visit = source.read(row)
        voxels, affine = visit.image[0].numpy(), visit.affine.numpy().astype(np.float64)
        heads.append(Volume(voxels, affine, automatic_foreground(voxels)))
    assert source.table["index"].tolist() == [0, 0, 1, 1]
    assert figure(heads[0], heads[1]) > LOWEST_SAME_PERSON
    assert abs(figure(heads[0], heads[2])) < LOWEST_SAME_PERSON


@pytest.mark.slow
def test_noise_is_nobody():
    images = [np.abs(np.random.default_rng(seed).normal(100, 30, (24, 24, 24))).astype(np.float32) for seed in (0, 1)]
    first, second = (Volume(image, np.diag([8.0, 8, 8, 1]), automatic_foreground(image)) for image in images)
    assert abs(figure(first, second)) < LOWEST_SAME_PERSON
    apart = np.eye(4)
    apart[0, 3] = 170.0  # 22 of 192 mm in common: mutual information of so few places is large
    assert mirror_information(first, second, apart)[0] < 0.2


def test_voxels_too_coarse_to_tell_are_not_judged():
    first, second = scan(None, (16.0, 16.0, 16.0)), scan(None, (16.0, 16.0, 16.0), 1)
    assert np.isnan(same_person(first, second, np.eye(4)))


def test_visits_are_held_against_the_person_of_most_visits():
    assert by_visit(1, {})[0] != by_visit(1, {})[0]  # NaN
    assert by_visit(2, {(0, 1): 0.5}) == [0.5, 0.5]
    assert by_visit(2, {(0, 1): 0.1}) == [0.1, 0.1]  # whose is which is not known
    assert by_visit(3, {(0, 1): 0.5, (0, 2): 0.1, (1, 2): 0.05}) == [0.5, 0.5, 0.1]
    assert by_visit(3, {(0, 1): 0.1, (0, 2): 0.5, (1, 2): -0.4}) == [0.5, 0.1, 0.5]
    two_and_two = {(0, 1): 0.5, (2, 3): 0.6, (0, 2): 0.1, (0, 3): 0.0, (1, 2): 0.02, (1, 3): 0.05}
    assert by_visit(4, two_and_two) == [0.1] * 4
    linked = {(0, 1): 0.5, (1, 2): 0.4, (0, 2): 0.1}  # years apart, with a visit between
    assert by_visit(3, linked) == [0.5, 0.5, 0.4]
    far = {(0, 1): 0.5, (1, 2): 0.5, (2, 3): 0.05, (3, 4): 0.6}  # the last has no pair with the first three
    assert by_visit(5, far) == [0.5, 0.5, 0.5, 0.05, 0.05]
    assert np.isnan(by_visit(2, {(0, 1): NAN})).all()


@pytest.mark.real
@pytest.mark.skipif(not (REAL / "raw").is_dir(), reason=f"no real MRI in {REAL}")
@pytest.mark.slow
@pytest.mark.parametrize(
    ("one", "other", "same"),
    [("01/ses-01", "01/ses-02", True), ("03/ses-01", "03/ses-02", True), ("01/ses-01", "03/ses-01", False)],
)
def test_real_persons(one, other, same):
    """FLAIR of 3–4 mm slices; the second pair is of two protocols."""
    volumes = []
    for place in (one, other):
        name = f"sub-{place.replace('/', '_')}_FLAIR.nii.gz"
        voxels, affine = read_image(str(REAL / f"raw/sub-{place}/anat/{name}"))
        volumes.append(Volume(voxels, affine, automatic_foreground(voxels)))
    found = same_person(*volumes, register(*volumes).matrix)
    print(f"{one}, {other}: {found:.3f}")
    assert (found > 1.5 * LOWEST_SAME_PERSON) if same else (abs(found) < LOWEST_SAME_PERSON)
