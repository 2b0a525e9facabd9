"""The measurement of matchers, with matchers of known error."""

from __future__ import annotations

import dataclasses
import json
import math
from types import SimpleNamespace

import pytest
import torch
from helpers import ROOT
from torch import Tensor

from lssl.callbacks import Landmarks
from lssl.cli.main import main
from lssl.correspondence.landmarks import displaced, landmark_errors, landmarks, one_pair_per_subject
from lssl.correspondence.matchers import FrameMatcher, Matcher, full_view
from lssl.utils.errors import InputError
from lssl.views import geometry as geo


class Off(Matcher):
    """Misses every point by a fixed number of mm, and knows it of half of them."""

    def __init__(self, error: float) -> None:
        super().__init__()
        self.error = error

    def match(self, points: Tensor, first, second) -> tuple[Tensor, Tensor]:
        score = torch.arange(points.shape[1]).expand(len(points), -1) % 2
        return points + self.error / math.sqrt(3), score.float()


@pytest.fixture
def pairs(make_batch):
    batch = make_batch(4, (28, 24, 20), image="frame", affine="same")
    return one_pair_per_subject([batch], 8)


def test_errors_are_those_of_the_matcher(pairs):
    result = landmark_errors(Off(2.5), pairs, None, points=50)
    assert result["visits/median"] == pytest.approx(2.5)
    assert result["visits/mean"] == pytest.approx(2.5)
    assert result["visits/median_kept"] == pytest.approx(2.5)
    assert result["visits/kept"] == pytest.approx(0.5, abs=0.08)
    assert result["visits/frame"] == 0
    assert result["voxel"] == pytest.approx((1.1 + 0.9 + 1.3) / 3)
    assert not [name for name in result if name.startswith("subjects")]  # no truth across subjects


def test_truth_is_asked_for_the_right_visits(pairs):
    asked = []

    def truth(points: Tensor, first: int, second: int) -> Tensor:
        asked.append((first, second))
        return points + torch.tensor([0.0, 0.0, 3.0])

    result = landmark_errors(FrameMatcher(), pairs, truth, points=20)
    assert asked == [(0, 1), (2, 3), (4, 5), (6, 7), (0, 3), (2, 5), (4, 7), (6, 1)]
    for kind in ("visits", "subjects"):
        assert result[f"{kind}/median"] == pytest.approx(3)
        assert result[f"{kind}/frame"] == pytest.approx(3)


def test_a_displaced_visit_still_shows_its_frame(make_batch, generator):
    view = full_view(make_batch(3, (28, 24, 20), image="frame"), 1)
    moved = displaced(view, generator)
    assert not torch.allclose(moved.affine, view.affine)
    points = geo.transform(moved.affine, geo.lattice(moved.size)[None])
    inside = geo.contains(geo.transform(geo.inverse(view.affine), points), view.size)
    named = moved.image.flatten(2).transpose(1, 2).double()
    assert (named - points)[inside].abs().max() < 1e-3
    turn = geo.inverse(view.affine) @ moved.affine
    assert (geo.volume(turn) > 0.9**3 - 1e-9).all()
    assert (geo.volume(turn) < 1.1**3 + 1e-9).all()


def test_places_lie_in_labels_else_in_the_foreground(make_batch, generator):
    batch = make_batch(1, (28, 24, 20))
    batch.foreground[:, 0] = False
    batch.foreground[:, 0, 6:12] = True
    places = landmarks(full_view(batch, 0), 200, generator)
    index = geo.transform(geo.inverse(full_view(batch, 0).affine), places)
    assert ((index[..., 0] > 5.4) & (index[..., 0] < 11.6)).all()
    labels = torch.zeros(1, 2, 28, 24, 20, dtype=torch.int16)
    labels[:, :, 20:] = 3
    places = landmarks(full_view(dataclasses.replace(batch, labels=labels), 0), 200, generator)
    assert (geo.transform(geo.inverse(full_view(batch, 0).affine), places)[..., 0] > 19.4).all()


def test_one_pair_of_two_visits_per_subject(make_batch):
    batch = make_batch(4)
    batch.subject = torch.tensor([7, 7, 3, 5])
    batch.session[2] = torch.tensor([4, 4])
    chosen = one_pair_per_subject([batch, batch], 8)
    assert [int(pair.subject) for pair in chosen] == [7, 5]
    assert [pair.session.tolist() for pair in chosen] == [[[0, 1]], [[6, 7]]]
    assert len(one_pair_per_subject([batch], 1)) == 1


def test_the_callback_refuses_a_strategy_without_an_embedding():
    with pytest.raises(InputError, match="Landmarks needs anatomical maps, which Linear has not"):
        Landmarks().setup(None, torch.nn.Linear(1, 1), "fit")
    with pytest.raises(InputError, match="points"):
        Landmarks(points=0)


def test_the_callback_says_when_there_is_nothing_to_measure(make_batch):
    batch = make_batch(2)
    batch.session[:, 1] = batch.session[:, 0]
    data = SimpleNamespace(val_dataloader=lambda: [batch])
    trainer = SimpleNamespace(is_global_zero=True, global_step=0, datamodule=data)
    with pytest.warns(UserWarning, match="no held-out subject has two visits"):
        Landmarks().on_train_start(trainer, torch.nn.Linear(1, 1))


@pytest.mark.slow
def test_the_shipped_config_finds_places_again_across_visits_and_subjects(tmp_path):
    main(
        [
            "fit",
            "--config",
            str(ROOT / "configs/anatomical_embedding.yaml"),
            "--data",
            "PhantomDataModule",
            "--trainer.accelerator",
            "cpu",
            "--trainer.enable_progress_bar",
            "false",
            "--trainer.default_root_dir",
            str(tmp_path / "run"),
        ]
    )
    errors = json.loads((tmp_path / "run" / "landmarks.json").read_text())
    assert errors["trained"]["visits/median"] < 2 * errors["trained"]["voxel"]
    assert errors["trained"]["subjects/median"] < 4 * errors["trained"]["voxel"]
    assert errors["trained"]["visits/kept"] > 0.9
    assert errors["untrained"]["visits/median"] > 8 * errors["untrained"]["voxel"]
    assert errors["untrained"]["subjects/median"] > 8 * errors["untrained"]["voxel"]
