"""Visits that have some of several contrasts: registered by what they share, or across contrasts."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from prepared_cohort import prepare
from scans import image_path, rigid, save, scan

from lssl.datamodules.nifti import NiftiDataModule
from lssl.datamodules.prepared import PreparedDataModule
from lssl.prepare import quality
from lssl.prepare.cohort import Options, find_subjects
from lssl.prepare.register import Match
from lssl.prepare.volumes import Volume
from lssl.utils.errors import InputError

KEEP = ("--suffix", "T1w", "FLAIR", "--missing-channels", "keep")
FINE = (4.0, 4.0, 4.0)


def flair(moved: np.ndarray, seed: int, subject: int, spacing: tuple[float, float, float]) -> Volume:
    """The same head, its brightness turned round."""
    volume = scan(moved, spacing, seed, subject=subject)
    volume.voxels = np.where(volume.foreground, (400 - 0.8 * volume.voxels).clip(0), volume.voxels).astype(np.float32)
    return volume


@pytest.fixture(scope="module")
def master(tmp_path_factory):
    """Subject a: both contrasts, which moved to each other, then FLAIR alone; subject b: T1w alone.

    Registration is replaced by what it ought to find, so that only what is registered with what is tested.
    """
    root = tmp_path_factory.mktemp("contrasts")
    moves = [rigid(4.0 * n, 9.0, n) for n in range(3)]
    volumes = [scan(moves[0], FINE, 0, subject=97), *(flair(moves[n], n, 97, FINE) for n in (1, 2))]
    for volume, session, suffix in zip(volumes, ("M000", "M000", "M012"), ("T1w", "FLAIR", "FLAIR"), strict=True):
        save(volume, image_path(root / "bids", "a", session, suffix))
    save(scan(moves[0], FINE, 3, subject=98), image_path(root / "bids", "b", "M000"))
    compared = []

    def found(first: Volume, second: Volume, kind: str = "rigid") -> Match:
        one, two = (int(np.argmin([np.abs(v.voxels - own.voxels).mean() for v in volumes])) for own in (first, second))
        compared.append((one, two))
        return Match(moves[two] @ np.linalg.inv(moves[one]), 0.1)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lssl.prepare.subject.register", found)
        patch.setattr("lssl.prepare.subject.same_person", lambda *_: 0.9)
        assert prepare(root / "bids", root / "out", *KEEP) == 0
    assert compared == [(0, 1), (1, 2)]  # within the session, then FLAIR with FLAIR
    return root


def test_visits_are_registered_by_what_they_share(master):
    """T1w comes along, by its place in its session."""
    table = pd.read_csv(master / "out/visits.csv")
    assert table["channels"].tolist() == ["T1w+FLAIR", "FLAIR", "T1w"]
    assert table["aligned"].all()
    source = PreparedDataModule(master / "out", missing_channels="keep", split=(1.0, 0.0, 0.0))
    source.setup("fit")
    assert source.channels() == ["T1w", "FLAIR"]
    assert source.present().tolist() == [[True, True], [False, True], [True, False]]
    assert any("1 visit without T1w (sub-a ses-M012)" in note for note in source.notes)
    (t1, one), (empty, other) = (visit.image.numpy() for visit in source.read_visits((0, 1), None, None))
    head = source.read(0).foreground.numpy()
    assert not empty.any()
    for pair, sign in (((one, other), 1), ((t1, one), -1), ((t1, other), -1)):
        a_voxel_off = quality.ncc(pair[0], np.roll(pair[1], 1, 0), head)
        assert sign * quality.ncc(*pair, head) > 0.25 + sign * a_voxel_off
    first, second = source.read_visits((1, 2), (8, 8, 8), 0)
    assert (first.present.tolist(), second.present.tolist()) == ([False, True], [True, False])


@pytest.mark.slow
def test_visits_without_a_common_contrast_are_registered_and_judged_all_the_same(tmp_path):
    """T1w, then FLAIR, of one person; and of two, which is found. Also both, then FLAIR, with nothing replaced."""
    moves = [rigid(3.0 * n, 6.0, n) for n in range(4)]
    for name, other in ((98, 98), (99, 98)):
        save(scan(moves[0], FINE, 3, subject=name), image_path(tmp_path / "bids", str(name), "M000"))
        save(flair(moves[3], 4, other, FINE), image_path(tmp_path / "bids", str(name), "M012", "FLAIR"))
    save(scan(moves[0], FINE, 0, subject=97), image_path(tmp_path / "bids", "97", "M000"))
    for number, session in ((1, "M000"), (2, "M012")):
        save(flair(moves[number], number, 97, FINE), image_path(tmp_path / "bids", "97", session, "FLAIR"))
    assert prepare(tmp_path / "bids", tmp_path / "out", *KEEP) == 0
    table = pd.read_csv(tmp_path / "out/visits.csv")
    assert table["aligned"].tolist() == [True] * 4 + [False] * 2
    assert table["flags"].isna().tolist() == [True] * 4 + [False] * 2
    source = PreparedDataModule(tmp_path / "out", missing_channels="keep", split=(1.0, 0.0, 0.0))
    source.setup("fit")
    (t1, one), (_, other) = (visit.image.numpy() for visit in source.read_visits((0, 1), None, None))
    head = source.read(0).foreground.numpy()
    assert quality.ncc(one, other, head) > 0.8
    assert quality.ncc(t1, other, head) < -0.5
    (t1, _), (_, other) = (visit.image.numpy() for visit in source.read_visits((2, 3), None, None))
    assert quality.ncc(t1, other, source.read(2).foreground.numpy()) < -0.5


def test_what_excluded_visits_lack_is_not_told(master):
    options = {"suffixes": ("T1w", "FLAIR"), "missing_channels": "keep"}
    notes = find_subjects(master / "bids", Options(**options, exclude=("sub-b",)))[2]
    assert [note for note in notes if "without" in note] == [
        "1 visit without T1w (sub-a ses-M012), where that channel is 0"
    ]
    with pytest.raises(InputError, match="No visit has the channel FLAIR"):
        find_subjects(master / "bids", Options(**options, exclude=("sub-a",)))


def test_a_batch_of_a_prepared_folder_knows_what_is_missing(master):
    source = PreparedDataModule(master / "out", missing_channels="keep", split=(1.0, 0.0, 0.0), batch_size=2)
    source.setup("fit")
    batch = next(iter(source.train_dataloader())).to("cpu")
    assert batch.present.shape == (2, 2, 2)
    assert (batch.images.flatten(3).any(-1) == batch.present).all()


def test_visits_that_lack_channels_are_left_out_unless_they_are_kept(master, tmp_path):
    source = PreparedDataModule(master / "out", split=(1.0, 0.0, 0.0))
    source.setup()
    assert source.table["session"].tolist() == ["ses-M000"]
    assert source.present() is None
    assert any("2 visits that lack channels (sub-a ses-M012, sub-b ses-M000)" in text for text in source.excluded)
    rows = pd.read_csv(master / "out/visits.csv").iloc[1:]
    rows.to_csv(tmp_path / "some.csv", index=False)
    with pytest.raises(InputError, match=r"different channels.*none has all.*missing_channels to keep"):
        PreparedDataModule(master / "out", table=tmp_path / "some.csv").setup()
    rows.iloc[1:].to_csv(tmp_path / "one.csv", index=False)
    kept = PreparedDataModule(master / "out", table=tmp_path / "one.csv", missing_channels="keep")
    kept.setup("predict")
    assert kept.channels() == ["T1w", "FLAIR"]
    assert kept.present().tolist() == [[True, False]]


def test_raw_visits_in_spaces_of_their_own_are_predicted(master):
    source = NiftiDataModule(master / "bids", suffix=["T1w", "FLAIR"], missing_channels="keep")
    source.setup("predict")
    assert source.present().sum(1).tolist() == [2, 1, 1]


def test_mistakes(master, tmp_path, capsys):
    assert prepare(master / "bids", tmp_path / "new", *KEEP, "--nonrigid") == 2
    assert "--nonrigid compares visits of one contrast" in capsys.readouterr().err
    assert prepare(master / "bids", tmp_path / "new", "--suffix", "T1w", "T2w", "--missing-channels", "keep") == 2
    assert "No visit has the channel T2w" in capsys.readouterr().err


def test_figures_of_another_contrast_are_judged_by_the_mirror_image():
    image, head = np.random.default_rng(0).random((20, 20, 20)), np.ones((20, 20, 20), bool)
    found = quality.pairwise([image, image, 1 - image], [head] * 3, ["T1w", "T1w", "FLAIR"])
    assert [figures["ncc"] for figures in found[:2]] == pytest.approx([1, 1])
    assert np.isnan(found[2]["ncc"])
    assert found[2]["mi"] > 1
    row = {"common_ml": 900.0, "overlap": 0.9, "closure_mm": 0.0, "disagreement_mm": 0.3, "ncc_after": float("nan")}
    for figure, aligned in ((0.6, True), (0.1, False), (-0.6, False), (float("nan"), False)):
        assert (not quality.misaligned({**row, "same_person": figure, "other_contrast": True})) == aligned
    assert quality.misaligned({**row, "same_person": 0.6, "other_contrast": False})
