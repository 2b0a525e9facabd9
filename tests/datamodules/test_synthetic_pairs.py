"""The endless stream as a datamodule: new at every place in training, fixed where held out."""

# ruff: noqa: F811

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from small_anatomy import anatomy, equal, maps, seeded, stream_of  # noqa: F401

from lssl.data.few_shot import FewShot
from lssl.datamodules.synthetic_brains import SyntheticBrainsDataModule
from lssl.utils.errors import InputError


def make(maps: Path | None, **options) -> SyntheticBrainsDataModule:
    defaults = {"pairs_per_epoch": 6, "held_out": 2, "size": 24, "spacing": 5.0, "split": (0.4, 0.3, 0.3)}
    data = SyntheticBrainsDataModule(maps, **{**defaults, **options})
    data.setup()
    return data


def epoch(data: SyntheticBrainsDataModule, number: int) -> list[torch.Tensor]:
    loader = data.train_dataloader()
    loader.sampler.set_epoch(number)
    return [batch.images.clone() for batch in loader]


def test_every_place_in_training_is_new_and_workers_change_nothing(maps):
    alone, shared = make(maps, shapes=0.5), make(maps, shapes=0.5, num_workers=2)
    first, second = epoch(alone, 0), epoch(alone, 1)
    for one, other in zip(first, epoch(shared, 0), strict=True):
        assert torch.equal(one, other)
    pairs = torch.cat(first + second)
    assert len({pair.numpy().tobytes() for pair in pairs}) == len(pairs) == 12


def test_held_out_pairs_are_fixed_and_of_other_maps(maps):
    data = make(maps)
    assert sorted(number for draw in data.draws.values() for number in draw.numbers) == [0, 1, 2]
    for one, other in zip(data.val_dataloader(), make(maps).val_dataloader(), strict=True):
        assert torch.equal(one.images, other.images)
    row = int(np.flatnonzero(data.table["split"] == "val")[0])
    assert equal(data.read(row), data.read_visits((row, row + 1), None, None)[0])
    points = torch.randn(20, 3, generator=seeded(0), dtype=torch.float64) * 20
    there = data.correspond(points, row, row + 1)
    torch.testing.assert_close(data.correspond(there, row + 1, row), points, atol=1e-4, rtol=0)
    assert 0 < (there - points).norm(dim=1).mean() < 8
    assert data.correspond(points, row, row + 2).isnan().all()


def test_random_shapes_have_no_labels_and_need_no_maps():
    data = make(None, shapes=1.0)
    batch = next(iter(data.train_dataloader()))
    assert (batch.labels == -1).all()
    assert batch.foreground.any()
    assert (batch.times[:, 1] > batch.times[:, 0]).all()


def test_a_smaller_box_is_cut_from_both_visits(maps):
    batch = next(iter(make(maps, source_size=16).train_dataloader()))
    assert batch.images.shape[-3:] == (16, 16, 16)


def test_labels_of_new_anatomies_train_a_segmenter(maps):
    data = make(maps, shapes=0.0)
    data.use_labels(unlabelled_pairs=True)
    batches = next(zip(*data.train_dataloader().values(), strict=False))
    labelled = batches[0]
    assert set(labelled.labels.unique().tolist()) > {0}
    assert torch.equal(labelled.images[:, 0], labelled.images[:, 1])


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"pairs_per_epoch": 0}, "pairs_per_epoch is 0"),
        ({"spacing": 0}, "spacing is 0 mm"),
        ({"change": -1}, "change is -1"),
        ({"size": 4}, "at least 8 voxels"),
        ({"shapes": 1.5}, "shapes is 1.5"),
        ({"lesions": -0.1}, "lesions is -0.1"),
        ({"root": "nowhere"}, "nowhere does not exist"),
        ({"few_shot": FewShot(subjects=1)}, "a stream makes its own"),
        ({"max_interval": 2.0}, "a stream makes its own"),
    ],
)
def test_wrong_options_stop_early(options, sentence):
    with pytest.raises(InputError, match=sentence):
        SyntheticBrainsDataModule(**options)


def test_fewer_maps_than_splits_are_refused(maps, tmp_path):
    (tmp_path / "one_dseg.nii.gz").symlink_to(maps / "sub-00_dseg.nii.gz")
    with pytest.raises(InputError, match="1 label map cannot be divided over train, val, test"):
        SyntheticBrainsDataModule(tmp_path)


def test_visits_are_plain_data(anatomy):
    assert dataclasses.is_dataclass(stream_of(anatomy).visits(1)[0])
