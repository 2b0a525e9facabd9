"""Collation: what is padded, what is recorded, and moves."""

from __future__ import annotations

import math

import pytest
import torch

from lssl.data.batch import PairBatch, Visit, collate


def visit(size: tuple[int, int, int], session: int, labelled: bool = False, **values) -> Visit:
    draw = torch.Generator().manual_seed(session)
    return Visit(
        image=torch.rand(2, *size, generator=draw) + 0.1,
        affine=torch.eye(4, dtype=torch.float64) * (session + 1),
        foreground=torch.ones(size, dtype=torch.bool),
        label=torch.full(size, 3, dtype=torch.int16) if labelled else None,
        session=session,
        **values,
    )


@pytest.fixture
def batch() -> PairBatch:
    one = visit((5, 6, 7), 0, age=40.5, time=0, subject=3), visit((4, 8, 6), 1, True, age=42.0, time=1.5, subject=3)
    two = visit((6, 3, 2), 2, subject=9), visit((6, 3, 2), 2, subject=9)
    return collate([one, two])


SIZES = [[(5, 6, 7), (4, 8, 6)], [(6, 3, 2), (6, 3, 2)]]


def test_smaller_sources_are_padded_behind_their_last_voxel(batch: PairBatch):
    assert batch.images.shape == (2, 2, 2, 6, 8, 7)
    assert batch.extent.tolist() == [[list(size) for size in pair] for pair in SIZES]
    for pair in range(2):
        for v in range(2):
            d, h, w = SIZES[pair][v]
            source = visit((d, h, w), int(batch.session[pair, v])).image
            assert torch.equal(batch.images[pair, v, :, :d, :h, :w], source)
            assert batch.images[pair, v].sum() == pytest.approx(source.sum().item(), rel=1e-6)
            assert batch.foreground[pair, v].sum() == d * h * w
            assert batch.foreground[pair, v, :d, :h, :w].all()


def test_labels_are_minus_one_where_there_are_none(batch: PairBatch):
    assert (batch.labels[0, 1, :4, :8, :6] == 3).all()
    assert (batch.labels == 3).sum() == 4 * 8 * 6
    assert (batch.labels == -1).sum() == batch.labels.numel() - 4 * 8 * 6
    assert batch.labels.dtype == torch.int16
    assert collate([(visit((3, 3, 3), 0), visit((3, 3, 3), 1))]).labels is None


def test_ages_and_ids_keep_their_place(batch: PairBatch):
    assert batch.ages[0].tolist() == [40.5, 42.0]
    assert all(math.isnan(age) for age in batch.ages[1].tolist())
    assert batch.times[0].tolist() == [0, 1.5]
    assert batch.times[1].isnan().all()
    assert batch.host.times_within_pair().tolist() == [[0, 1.5], [0, 0]]  # one visit twice: its interval is known
    assert batch.subject.tolist() == [3, 9]
    assert batch.session.tolist() == [[0, 1], [2, 2]]
    assert batch.affines[0, 1, 0, 0] == 2
    assert batch.affines.dtype == torch.float64
    assert len(batch) == 2


def test_to_keeps_everything(batch: PairBatch):
    moved = batch.to("cpu")
    assert torch.equal(moved.images, batch.images)
    assert batch.to("meta").labels.device.type == "meta"
    batch.labels = None
    assert batch.to("meta").labels is None


def test_rows_by_slice_and_by_index(make_batch):
    batch = make_batch(3, labels=True)
    assert torch.equal(batch.rows(slice(1, 3)).images, batch.images[1:])
    turned = batch.rows(torch.tensor([2, 0, 1]))
    for name in ("images", "affines", "extent", "foreground", "ages", "labels", "subject", "session"):
        assert torch.equal(getattr(turned, name)[0].nan_to_num(), getattr(batch, name)[2].nan_to_num())
        assert torch.equal(getattr(turned, name)[1].nan_to_num(), getattr(batch, name)[0].nan_to_num())
