"""The phantom's options: wrong ones stop early; contrast changes what it says and nothing else."""

from __future__ import annotations

import pytest
import torch

from lssl.datamodules.phantom import PhantomDataModule
from lssl.utils.errors import InputError

GROUPS = {"stable": {"ventricles": 0.02}, "fast": {"ventricles": 0.10, "hippocampus": -0.05}}


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"subjects": 0}, "subjects"),
        ({"spacing": 0.0}, "spacing"),
        ({"size": 4}, "size"),
        ({"single_visit_fraction": 2.0}, "single_visit_fraction"),
        ({"visits": 30}, "years"),
    ],
)
def test_wrong_options_stop_early(options, word):
    with pytest.raises(InputError, match=word):
        PhantomDataModule(**options)


def test_contrast_changes_the_order_of_tissues_and_nothing_else():
    def brightness(made, label):
        return float(made.image[made.label == label].median())

    usual, other = (PhantomDataModule(subjects=4, visits=2, size=24, spacing=8.0, contrast=share) for share in (0, 0.9))
    whiter = []
    for index in range(4):
        for visit in range(2):
            before, after = usual.scan(index, visit), other.scan(index, visit)
            assert torch.equal(before.label, after.label)
            assert torch.equal(before.residual, after.residual)
            assert brightness(before, 2) > brightness(before, 3)
            whiter.append(brightness(after, 2) > brightness(after, 3))
    assert set(whiter) == {True, False}
    assert any(whiter[i] != whiter[i + 1] for i in range(0, 8, 2))  # it differs between the visits of a subject
    with pytest.raises(InputError, match=r"contrast is 1\.5; give a share"):
        PhantomDataModule(contrast=1.5)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"rate_groups": {"a": {"amygdala": 0.1}}}, "a has a rate of amygdala"),
        ({"rate_groups": {"a": {"ventricles": 0.5}}}, "is 0.5 a year; give 0 to 0.1"),
        ({"rate_groups": {"a": {"hippocampus": 0.01}}}, "give -0.05 to 0"),
        ({"rate_groups": GROUPS, "fast": 0.5}, "give one of the two"),
        ({"rate_groups": GROUPS, "visits": 4, "interval": 2.0}, "age for 6 years"),
    ],
)
def test_rates_that_the_phantom_cannot_follow_are_refused(options, says):
    with pytest.raises(InputError, match=says):
        PhantomDataModule(**options)
