"""Batches of pairs: the same for any number of workers, with their boxes and times."""

from __future__ import annotations

import pickle

import lightning as L
import numpy as np
import pytest
import torch
from toy_pairs import SHAPE, Toy, table_of, toy

from lssl.data.batch import PairBatch, Visit
from lssl.data.pairs import order_visits
from lssl.utils.errors import InputError


def contents(loader) -> list[PairBatch]:
    return list(loader)


def test_batches_do_not_depend_on_workers():
    plain = contents(toy(source_size=8).train_dataloader())
    loader = toy(source_size=8, num_workers=2).train_dataloader()
    for one, two in zip(plain, contents(loader), strict=True):
        assert torch.equal(one.images, two.images)
        assert torch.equal(one.affines, two.affines)
        assert torch.equal(one.session, two.session)


def test_a_dataset_travels_to_spawned_workers_without_the_trainer():
    source = toy()
    source.trainer = L.Trainer(logger=False, enable_checkpointing=False, accelerator="cpu")
    dataset = pickle.loads(pickle.dumps(source.train_dataloader().dataset))
    assert dataset.read.read.__self__.trainer is None
    assert source.trainer is not None
    assert len(dataset) == len(source.train_pairs)


def test_both_visits_give_the_same_box_and_the_affine_says_where():
    for batch in contents(toy(source_size=(8, 30, 9)).train_dataloader()):
        assert batch.images.shape[3:] == (8, 24, 9)
        assert (batch.extent == torch.tensor([8, 24, 9])).all()
        place = batch.images.float() - batch.session[:, :, None, None, None, None] / 100
        torch.testing.assert_close(place[:, 0], place[:, 1], atol=1e-2, rtol=0)
        corner = batch.affines[..., :3, 3] / torch.tensor([2.0, 1.0, 1.5])
        index = corner[..., 0] * 24 * 22 + corner[..., 1] * 22 + corner[..., 2]
        torch.testing.assert_close(place[:, :, 0, 0, 0, 0].double(), index, atol=1e-2, rtol=0)
        assert batch.foreground.any((2, 3, 4)).all()


def test_evaluation_takes_every_pair_in_order_centred_on_the_foreground():
    source = toy(source_size=8, batch_size=3)
    batches = contents(source.val_dataloader())
    assert torch.cat([batch.session for batch in batches]).tolist() == source.val_pairs.tolist()
    corner = batches[0].affines[0, 0, :3, 3] / torch.tensor([2.0, 1.0, 1.5])
    assert corner.tolist() == [11.0, 2.0, 11.0]  # foreground 12:19, 4:9, 10:20 in a box of 8


def test_prediction_takes_every_visit_once_and_whole():
    batches = contents(toy(source_size=8, single_visits="drop").predict_dataloader())
    assert [batch.session.tolist() for batch in batches] == [[[row, row]] for row in range(22)]
    assert batches[0].images.shape == (1, 2, 1, *SHAPE)


def test_subject_session_and_age_come_from_the_table():
    table = order_visits(table_of(a=[0, 1], b=[0])).assign(age=[50.0, 51.0, np.nan])
    source = Toy(table, split=(1, 0, 0))
    source.setup()
    first, second = source.train_dataloader().dataset[0]
    assert (first.subject, first.session, first.age, second.session, second.age) == (0, 0, 50.0, 1, 51.0)


class AddNoise:
    def __call__(self, visit: Visit) -> Visit:
        visit.image = visit.image + torch.rand(())
        return visit


def test_a_random_transform_is_repeatable_and_independent_for_a_same_visit_pair():
    singles = Toy(table_of(a=[0], b=[0]), split=(1, 0, 0), transform=AddNoise())
    singles.setup()
    torch.manual_seed(1)
    one = contents(singles.train_dataloader())[0]
    torch.manual_seed(2)
    two = contents(singles.train_dataloader())[0]
    assert torch.equal(one.images, two.images)
    assert (one.images[:, 0] != one.images[:, 1]).any()


def test_last_batch_is_dropped_only_when_there_are_others():
    assert toy(batch_size=50).train_dataloader().drop_last is False
    assert toy(batch_size=2).train_dataloader().drop_last is True


def test_crop_must_fit():
    source = toy(source_size=16)
    source.check_crop((16, 16, 16))
    with pytest.raises(InputError, match="20×20×21 voxels do not fit into source_size 16×16×16"):
        source.check_crop((20, 20, 21))
    with pytest.raises(InputError, match="do not fit into 22 visits, the smallest being p00 ses-1 with 20×24×22"):
        source.check_crop((24, 24, 16))


def test_times_reach_the_batch_without_ages():
    source = Toy(table_of(a=[0, 1.5], b=[0, 1.5]), split=(1, 0, 0))
    source.setup()
    batch = next(iter(source.train_dataloader()))
    assert batch.times.tolist() == [[0, 1.5]] * 2
    assert batch.ages.isnan().all()
