"""Prepared folders: boxes are read alone, are the same as boxes of the whole, and arrive scaled."""

from __future__ import annotations

import dataclasses
import os
import pickle
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from helpers import TINY_NET, fit

from lssl.data import STEP, store
from lssl.data.balance import interval_class, pair_weights
from lssl.data.batch import PairBatch
from lssl.data.recognise import is_prepared
from lssl.data.store import write_stored
from lssl.data.usable import check_files
from lssl.datamodules.nifti import NiftiDataModule
from lssl.datamodules.prepared import PreparedDataModule
from lssl.utils.errors import InputError
from lssl.utils.files import write_json
from lssl.views import geometry as geo
from lssl.views.sampler import ViewSampler

SHAPE = (50, 54, 46)


def make(root: Path, subjects: int = 6, visits: int = 2) -> Path:
    """A folder as `lssl prepare` leaves it; smooth images, a ball of foreground away from the middle."""
    rows = []
    place = np.stack(np.meshgrid(*[np.arange(length) for length in SHAPE], indexing="ij"))
    ball = np.linalg.norm(place - np.array([30, 22, 24]).reshape(3, 1, 1, 1), axis=0) < 14
    affine = np.diag([2.0, 2.0, 2.0, 1.0])
    affine[:3, 3] = (-50, -40, -30)
    for subject in range(subjects):
        for visit in range(visits):
            rng = np.random.default_rng([subject, visit])
            image = (ball * (0.5 + 0.3 * np.sin(place[0] / 5 + subject) * np.cos(place[2] / 4 + visit)))[None]
            image = (image + 0.02 * rng.random(image.shape)).astype(np.float32)
            path = f"visits/sub-{subject}/sub-{subject}_ses-{visit}.b2nd"
            write_stored(root / path, image, ball, None, affine, ["T1w"], [(0.0, 500.0)], {})
            rows.append(
                {
                    "subject": f"sub-{subject}",
                    "session": f"ses-{visit}",
                    "age": 60 + subject + visit * 400 / 365.25,
                    "days": visit * 400,
                    "image": path,
                    "site": "north" if subject else "south",
                    "size_d": SHAPE[0],
                    "size_h": SHAPE[1],
                    "size_w": SHAPE[2],
                    "channels": "T1w",
                    "flags": "",
                    "matrix": "1 0 0",
                }
            )
    pd.DataFrame(rows).to_csv(root / "visits.csv", index=False)
    write_json(root / "dataset.json", {"settings": "x", "options": {"suffixes": ["T1w"]}})
    return root


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Path:
    return make(tmp_path_factory.mktemp("prepared"))


def setup(root: Path, **options) -> PreparedDataModule:
    source = PreparedDataModule(root, **options)
    source.setup()
    return source


def test_a_prepared_folder_becomes_batches(prepared):
    source = setup(prepared, source_size=24, split=(1, 0, 0))
    assert is_prepared(prepared)
    assert source.summary.startswith("6 subjects, 12 visits: 6 pairs from 6 subjects")
    assert "prepared channels T1w" in source.summary
    assert source.shapes().tolist() == [list(SHAPE)] * 12
    batch = next(iter(source.train_dataloader()))
    assert batch.images.dtype == torch.int16
    assert batch.images.shape == (2, 2, 1, 24, 24, 24)
    there = batch.to("cpu")
    assert there.images.dtype == torch.float32
    torch.testing.assert_close(there.images, batch.images * STEP)
    assert 0.5 < there.images[there.foreground[:, :, None]].max() < 1.2
    assert (there.ages[:, 1] - there.ages[:, 0]).allclose(torch.tensor(400 / 365.25), atol=1e-3)


def test_only_the_box_is_read(prepared, monkeypatch):
    source = setup(prepared, source_size=16)
    sizes = []
    plain = store.StoredVisit.box
    monkeypatch.setattr(store.StoredVisit, "box", lambda self, a, n: sizes.append(tuple(n)) or plain(self, a, n))
    source.read_visits((0, 1), (16, 16, 16), 3)
    source.read_visits((0, 0), (16, 16, 16), None)
    assert sizes == [(16, 16, 16)] * 3  # a same-visit pair is read once


@pytest.mark.parametrize("seed", [None, 5, 6])
def test_a_box_is_the_part_of_the_whole_and_knows_where_it_lies(prepared, seed):
    source = setup(prepared)
    first, second = source.read_visits((2, 3), (16, 20, 60), seed)
    whole = source.read(2)
    start = ((first.affine - whole.affine)[:3, 3] / 2).round().int().tolist()
    assert first.image.shape == second.image.shape == (1, 16, 20, 46)
    window = (slice(None), *(slice(a, a + n) for a, n in zip(start, (16, 20, 46), strict=True)))
    assert torch.equal(first.image, whole.image[window])
    assert torch.equal(first.foreground, whole.foreground[window[1:]])
    assert torch.equal(first.affine, second.affine)
    if seed is None:
        assert start == [22, 12, 0]  # the ball's middle, 30 22, less half of the box
    assert first.foreground.any()


@pytest.mark.parametrize("seed", [None, 5])
def test_a_series_shows_one_box_of_all_its_visits(tmp_path, seed):
    source = setup(make(tmp_path, visits=4), visits_per_item=3, source_size=12)
    assert source.train_pairs.shape[1] == 3
    below, image = np.zeros(SHAPE, bool), np.random.default_rng(0).random((1, *SHAPE), np.float32)
    below[30, 22, :4] = True  # the foreground of the last visit alone; elsewhere it is a ball around 30 22 24
    path = tmp_path / "visits/sub-1/sub-1_ses-3.b2nd"
    write_stored(path, image, below, None, source.read(7).affine.numpy(), ["T1w"], [(0.0, 500.0)], {})
    visits = source.read_visits((4, 6, 7), (12, 60, 12), seed)
    for row, visit in zip((4, 6, 7), visits, strict=True):
        assert torch.equal(visit.affine, visits[0].affine)
        start = ((visit.affine - source.read(row).affine)[:3, 3] / 2).round().int().tolist()
        window = (slice(None), *(slice(a, a + n) for a, n in zip(start, (12, 54, 12), strict=True)))
        assert torch.equal(visit.image, source.read(row).image[window])
    if seed is None:
        assert start == [24, 0, 13]  # from 0 to 37 along the last axis, so the middle is at 19; else at 24
    batch = next(iter(source.train_dataloader()))
    assert batch.images.shape[1:] == (3, 1, 12, 12, 12)


def test_random_boxes_are_centred_on_foreground_everywhere(prepared):
    source = setup(prepared)
    centres = []
    for seed in range(200):
        box, _ = source.read_visits((0, 1), (4, 4, 4), seed)
        assert box.foreground[2, 2, 2]
        centres.append(((box.affine[:3, 3] - torch.tensor([-50.0, -40.0, -30.0])) / 2 + 2).tolist())
    spread = np.std(centres, 0)
    assert np.allclose(np.mean(centres, 0), [30, 22, 24], atol=2)
    assert (spread > 4.5).all()  # a ball of radius 14 has 6.3


def test_a_cropped_source_gives_the_views_of_the_whole(prepared):
    """Warping the box equals warping the whole visit, wherever the view lies inside the box."""
    source = setup(prepared)
    sampler = ViewSampler(12, geometry="shared", overlap=1.0, transforms=[])
    whole, _ = source.read_visits((0, 1), None, None)
    box, _ = source.read_visits((0, 1), (28, 28, 28), None)

    def warped(visit, matrix):
        image = visit.image[None].float() * STEP
        return geo.resample(image, geo.inverse(visit.affine)[None] @ matrix, sampler.size)

    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        angles = 0.2 * torch.randn(1, 3, generator=generator, dtype=torch.float64)
        centre = torch.tensor([[10.0, 4.0, 18.0]], dtype=torch.float64)
        view = (
            geo.translation(centre) @ geo.rotation(angles) @ geo.scaling(torch.full((1, 3), 2.1, dtype=torch.float64))
        )
        view = view @ geo.translation(torch.full((1, 3), -5.5, dtype=torch.float64))
        torch.testing.assert_close(warped(box, view), warped(whole, view), atol=1e-4, rtol=0)


def test_memory_serves_what_was_read_once(prepared, monkeypatch):
    source = setup(prepared, cache_gb=1.0)
    size = (prepared / "visits/sub-0/sub-0_ses-0.b2nd").stat().st_size
    small = setup(prepared, cache_gb=1.5 * size / 1e9)
    wanted = setup(prepared).read_visits((0, 1), (8, 8, 8), 1)
    for one in (source, small):
        for _ in range(2):
            found = one.read_visits((0, 1), (8, 8, 8), 1)
            assert torch.equal(found[0].image, wanted[0].image)
            assert torch.equal(found[1].image, wanted[1].image)
    assert len(source.files.kept) == 2
    assert len(small.files.kept) == 1  # the budget holds one
    monkeypatch.setattr(Path, "read_bytes", None)
    source.read_visits((0, 1), (8, 8, 8), 1)


def test_workers_read_the_same(prepared):
    plain = list(setup(prepared, source_size=16).train_dataloader())
    spread = list(setup(prepared, source_size=16, num_workers=2, cache_gb=0.1).train_dataloader())
    for one, two in zip(plain, spread, strict=True):
        assert torch.equal(one.images, two.images)
        assert torch.equal(one.affines, two.affines)


def test_what_a_worker_holds_hardly_grows_with_the_cohort(prepared, tmp_path):
    """Paths and sizes as flat arrays; no table, no names, no objects per visit."""
    table = pd.read_csv(prepared / "visits.csv")
    copies = [table.assign(subject=table["subject"] + f"-{n}") for n in range(100)]
    for number, copy in enumerate(copies):
        copy["image"] = [path.replace(".b2nd", f"-{number}.b2nd") for path in table["image"]]
        for path, name in zip(table["image"], copy["image"], strict=True):
            os.link(prepared / path, prepared / name)
    many = pd.concat(copies)
    many.to_csv(tmp_path / "many.csv", index=False)
    few, lots = (setup(prepared, table=path) for path in (prepared / "visits.csv", tmp_path / "many.csv"))
    assert len(lots.table) == 100 * len(few.table)
    sizes = [len(pickle.dumps(source.train_dataloader().dataset)) for source in (few, lots)]
    assert (sizes[1] - sizes[0]) / (len(lots.table) - len(few.table)) < 200  # bytes per visit
    assert lots.read_visits((0, 1), (4, 4, 4), 0)[0].image.shape == (1, 4, 4, 4)


class Brighter:
    def __call__(self, visit):
        assert visit.image.dtype == torch.float32
        return dataclasses.replace(visit, image=visit.image + 1)


def test_transforms_see_scaled_images(prepared):
    batch = next(iter(setup(prepared, source_size=8, transform=Brighter()).train_dataloader()))
    assert batch.images.dtype == torch.float32
    assert 1 <= batch.images.min() < batch.images.max() < 2.2


def test_a_table_chooses_visits_and_splits(prepared, tmp_path):
    table = pd.read_csv(prepared / "visits.csv")
    table = table[table["subject"] != "sub-5"].assign(split=["train"] * 8 + ["test"] * 2)
    table.to_csv(tmp_path / "mine.csv", index=False)
    source = setup(prepared, table=tmp_path / "mine.csv")
    assert len(source.train_pairs) == 4
    assert len(source.test_pairs) == 1
    assert source.read(0).image.shape == (1, *SHAPE)
    table.drop(columns=["size_d"]).to_csv(tmp_path / "mine.csv", index=False)
    with pytest.raises(InputError, match="lacks the columns size_d; make it from the rows of"):
        setup(prepared, table=tmp_path / "mine.csv")
    with pytest.raises(InputError, match="was written by `lssl prepare`; read it with PreparedDataModule"):
        NiftiDataModule(prepared)
    with pytest.raises(InputError, match=r"it lacks visits.csv or dataset.json; read NIfTI files with NiftiDataModule"):
        PreparedDataModule(tmp_path)


def test_a_visit_that_vanished_leaves_the_pairs_by_name(tmp_path):
    root = make(tmp_path / "folder", subjects=2)
    gone = root / "visits/sub-0/sub-0_ses-1.b2nd"
    source = setup(root, split=(1, 0, 0))
    gone.unlink()
    with pytest.raises(InputError, match=r"sub-0_ses-1.b2nd does not exist; run `lssl prepare` again"):
        list(source.train_dataloader())
    assert "1 visit that cannot be read (sub-0 ses-1: " in setup(root, split=(1, 0, 0)).summary


def test_a_damaged_visit_leaves_the_pairs_once_it_was_inspected(tmp_path):
    root = make(tmp_path / "folder", subjects=2)
    path = root / "visits/sub-1/sub-1_ses-0.b2nd"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 8
    path.write_bytes(content)
    assert len(setup(root).table) == 4
    assert list(check_files([str(path)], "stored")) == [str(path)]
    source = setup(root)
    assert len(source.table) == 3
    assert "1 visit that cannot be read (sub-1 ses-0: " in source.summary


def test_misaligned_visits_leave_the_pairs_by_name_but_are_predicted(tmp_path):
    root = make(tmp_path / "folder", subjects=2)
    table = pd.read_csv(root / "visits.csv")
    table["aligned"] = [True, False, True, True]
    table["flags"] = ["", "correlates by 0.33 with the other visits", "", ""]
    table.to_csv(root / "visits.csv", index=False)
    source = setup(root, split=(1, 0, 0))
    assert len(source.table) == 3
    assert "1 visit misaligned (sub-0 ses-1: correlates by 0.33 with the other visits)" in source.summary
    assert len(source.train_pairs) == 2  # one of two visits, one of the same visit twice
    assert len(setup(root, misaligned="keep").table) == 4
    everything = PreparedDataModule(root)
    everything.setup("predict")
    assert len(everything.table) == 4
    table.assign(aligned=False).to_csv(root / "visits.csv", index=False)
    with pytest.raises(
        InputError, match=r"All 4 visits of .*folder are misaligned \(sub-0 ses-0: .*misaligned keep uses"
    ):
        setup(root, split=(1, 0, 0))


def test_weights_make_sites_and_intervals_equal():
    subject = np.array([0, 0, 0, 1, 2, 3])
    site = np.array([0, 0, 0, 0, 1, 1])
    interval = np.array([1.0, 2.0, 3.0, 1.0, 1.0, 2.0])
    plain = pair_weights(subject, False, None, None)
    np.testing.assert_allclose(np.bincount(subject, plain), 0.25)
    by_site = pair_weights(subject, False, site, None)
    np.testing.assert_allclose(np.bincount(site, by_site), 0.5)
    assert by_site[3] == pytest.approx(by_site[:3].sum())  # subjects of a site still share it equally
    both = pair_weights(subject, True, site, interval)
    np.testing.assert_allclose(np.bincount(site, both), 0.5, atol=0.05)
    classes = interval_class(interval)
    np.testing.assert_allclose(np.bincount(classes, both)[np.unique(classes)], 1 / 3, atol=0.05)
    assert interval_class(np.array([0.0, 0.1, np.nan])).tolist() == [0, 1, -1]


def test_balanced_epochs_draw_rare_sites_as_often(prepared):
    source = setup(prepared, split=(1, 0, 0), balance="site")
    sampler = source.train_dataloader().sampler
    drawn = [row for _ in range(100) for row, _, _ in sampler]
    assert len(drawn) == 600  # as many as without balance
    north = (source.table["site"].to_numpy()[drawn] == "north").mean()
    assert 0.42 < north < 0.58  # five of six subjects
    assert [item[:2] for item in setup(prepared, split=(1, 0, 0), balance="site").train_dataloader().sampler] == list(
        zip(drawn[:6], [row + 1 for row in drawn[:6]], strict=True)
    )
    source.table = source.table.assign(site="")
    with pytest.raises(InputError, match="no column site"):
        source.train_dataloader()


def test_fit_on_a_prepared_folder(prepared, tmp_path, caplog):
    options = ["--data.class_path=PreparedDataModule", f"--data.init_args.root={prepared}"]
    options += ["--data.init_args.source_size=40", "--data.init_args.num_workers=1", "--trainer.max_steps=3"]
    run = fit(tmp_path, "demo.yaml", options=options, backbone=TINY_NET)
    assert (run / "checkpoints/last.ckpt").is_file()
    assert (run / "report.png").stat().st_size > 10_000
    assert "waiting for the loader" in caplog.text


def test_moving_a_float_batch_leaves_it_alone(make_batch):
    batch: PairBatch = make_batch()
    assert torch.equal(batch.to("cpu").images, batch.images)
