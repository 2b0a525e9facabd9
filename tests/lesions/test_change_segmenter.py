"""ChangeSegmenter: both visits show one place, what the head sees, whole visits, refusals, and runs from end to end."""

from __future__ import annotations

import numpy as np
import pandas as pd
import planted_lesions as planted
import pytest
import torch
from monai.networks.nets import BasicUNet

from lssl import Backbone, ChangeSegmenter, InputError, ViewSampler
from lssl.lesions.report import summarise_lesions
from lssl.metrics.lesions import find_lesions
from lssl.segmentation.classes import Classes
from lssl.segmentation.volumes import later_label
from lssl.views import geometry as geo

CHANGE = Classes(("change",), ((1,),), True)


def network(channels=1, out=4):
    made = BasicUNet(3, channels, out, (4, 4, 4, 4, 4, 4), norm=("batch", {}))
    return Backbone(made, {"decoder.0": "upcat_1.convs.conv_1"}, in_channels=channels)


def task(channels=1, combine="subtract", size=16, **options):
    views = ViewSampler(size, geometry="aligned", transforms=[], **options)
    made = ChangeSegmenter(network(channels), combine=combine, views=views)
    made.build(CHANGE, torch.ones(3), torch.tensor([0, 1]), torch.ones(2))
    return made.eval()


def answer(made, monkeypatch, function):
    """Lets a function of both images stand for network and head."""
    monkeypatch.setattr(made, "logits", lambda earlier, later: [function(earlier, later)])


def places_and_ones(batch):
    """A fourth channel that is 1 throughout: less than that, zeros from beyond a visit have mixed in."""
    batch.images = torch.cat([batch.images, torch.ones_like(batch.images[:, :, :1])], 2)
    return batch


def apart(earlier, later):
    """mm between the places of voxels that both images show whole."""
    whole = (torch.minimum(earlier, later)[:, 3] - 1).abs() < 1e-5
    return (earlier - later).abs().amax(1)[whole]


# --- one place --------------------------------------------------------------------------------------------------------


def test_a_voxel_of_both_images_shows_one_place_of_the_frame(make_batch, generator, monkeypatch):
    """The images are their own coordinates, on oblique grids that lie apart; the task sees no difference."""
    made = task(4, rotation=15.0, flip=(0.5, 0.0, 0.0))
    batch = places_and_ones(make_batch(4, (28, 26, 24), "frame", labels=True))
    seen = []

    def watch(earlier, later):
        seen.append(apart(earlier, later))
        return torch.zeros(len(earlier), 2, *earlier.shape[2:])

    answer(made, monkeypatch, watch)
    made.generator = generator
    assert made.losses({"labelled": batch})["supervised"].isfinite()
    assert len(seen[0]) > 4 * 16**3 / 2
    assert seen[0].max() < 1e-3


@pytest.mark.parametrize("spacing", [None, 1.6])
def test_whole_visits_too_in_one_resampling_on_the_grid_of_the_later(make_batch, monkeypatch, spacing):
    """The earlier visit has another grid, and more voxels; the working spacing is another one again."""
    made, batch = task(4), places_and_ones(make_batch(1, (28, 26, 24), "frame"))
    made.spacing = geo.spacing(batch.affines[0, 1]) if spacing is None else torch.full((3,), spacing).double()
    batch.extent[0, 1] = torch.tensor([24, 25, 20])
    seen = []

    def watch(earlier, later):
        seen.append(apart(earlier, later))
        return torch.stack([later[:, 0] * 0, later[:, 0] + 27], 1)  # change where x > -27 mm

    answer(made, monkeypatch, watch)
    label = made.segmented(batch)
    assert label.shape == (24, 25, 20)
    assert sum(map(len, seen)) > 2000
    assert torch.cat(seen).max() < 1e-3
    places = geo.transform(batch.affines[0, 1], geo.lattice((24, 25, 20)))[:, 0].unflatten(0, (24, 25, 20))
    inner = (slice(2, -2),) * 3
    clear = ((places + 27).abs() > 1.0)[inner]
    assert 0.2 < label.double().mean() < 0.8
    index = geo.transform(geo.inverse(batch.affines[0, 0]) @ batch.affines[0, 1], geo.lattice((24, 25, 20)))
    known = ((index >= 0) & (index <= torch.tensor([27.0, 25.0, 23.0]))).all(-1).unflatten(0, (24, 25, 20))
    assert 0.7 < known.double().mean() < 0.999
    assert not label[~known].any()
    expected = ((places > -27) & known).long()
    assert torch.equal(label[inner][clear], expected[inner][clear])


def test_labels_come_with_the_later_visit(make_batch, generator, monkeypatch):
    """The earlier visit has a label map of its own, which is none of this pair's business."""
    made, batch = task(rotation=0.0, flip=(0.0, 0.0, 0.0)), make_batch(2, (16, 16, 16), affine="unit", labels=True)
    batch.labels[:, 0], batch.labels[:, 1] = 1, 0
    batch.labels[:, 1, :8] = 1
    batch.images[:, 1, 0] = batch.labels[:, 1]
    answer(made, monkeypatch, lambda earlier, later: torch.cat([0.5 - later, later - 0.5], 1) * 100)
    made.generator = generator
    made.views.overlap, made.views.affine_probability = 1.0, 0.0
    assert made.losses(batch)["supervised"].item() < 1e-3
    batch.labels[:, 1] = 1 - batch.labels[:, 1]
    assert made.losses(batch)["supervised"].item() > 1
    batch.extent[:, 1] = torch.tensor([16, 15, 14])
    assert torch.equal(later_label(batch), batch.labels[0, 1, :, :15, :14])
    batch.labels = None
    with pytest.raises(InputError, match="no label map"):
        made.losses(batch)


def test_what_the_earlier_visit_does_not_hold_is_not_learned(make_batch, generator, monkeypatch):
    """The earlier visit ends before the view does; wrong labels beyond its end cost nothing, elsewhere much."""
    made = task(rotation=0.0, flip=(0.0, 0.0, 0.0), affine_probability=0.0)
    made.generator = generator
    answer(made, monkeypatch, lambda earlier, later: torch.cat([later * 0 + 100, later * 0 - 100], 1))
    losses = {}
    for wrong in ("within", "beyond"):
        batch = make_batch(2, (16, 16, 16), affine="unit", labels=True)
        batch.extent[:, 0, 0] = 11
        batch.labels[:] = 0
        batch.labels[:, 1, {"within": slice(0, 9), "beyond": slice(11, 16)}[wrong]] = 1
        losses[wrong] = made.losses(batch)["supervised"].item()
    assert losses["beyond"] < 1e-3
    assert losses["within"] > 1


# --- both visits ------------------------------------------------------------------------------------------------------


def test_the_head_sees_the_later_output_and_what_was_added():
    made = task()
    earlier, later = torch.rand(2, 2, 1, 16, 16, 16)
    assert made.head.in_channels == 8
    one, other = made.backbone.outputs(earlier)[0], made.backbone.outputs(later)[0]
    torch.testing.assert_close(made.logits(earlier, later)[0], made.head(torch.cat([other, other - one], 1)))
    with torch.no_grad():
        made.head.weight[:, :4], made.head.bias[:] = 0, 0
    assert not made.logits(later, later)[0].any()


def test_concatenation_tells_which_visit_is_which():
    made = task(2, "concatenate")
    earlier, later = torch.rand(2, 2, 1, 16, 16, 16)
    assert made.head.in_channels == 4
    found = made.logits(earlier, later)[0]
    torch.testing.assert_close(found, made.head(made.backbone.outputs(torch.cat([earlier, later], 1))[0]))
    assert not torch.equal(found, made.logits(later, earlier)[0])


def test_weighting_shows_the_decoder_later_features_and_the_head_one_output():
    made = task(combine="weight", size=32)
    earlier, later = torch.rand(2, 1, 1, 32, 32, 32)
    assert made.head.in_channels == 4
    alone = made.head(made.backbone.outputs(later)[0])
    torch.testing.assert_close(made.logits(later, later)[0], alone)
    assert (made.logits(earlier, later)[0] - alone).abs().max() > 1e-3
    trained = {id(parameter) for group in made.parameter_groups().values() for parameter in group}
    assert trained == {id(parameter) for parameter in made.parameters()}


# --- the summary ------------------------------------------------------------------------------------------------------


def test_the_summary_counts_subjects_and_keeps_pairs_without_change_apart():
    rows = [
        ("a", 2, 0.5, 1.0, 2 / 3, 0.4, 0, 0.0),
        ("a", 1, 1.0, np.nan, 0.0, 0.2, 1, 9.0),
        ("b", 4, 0.25, 0.5, 1 / 3, 0.1, 2, 30.0),
        ("b", 0, np.nan, 0.0, np.nan, np.nan, 3, 12.0),
        ("c", 0, np.nan, np.nan, np.nan, np.nan, 0, 0.0),
    ]
    names = ["subject", "true_lesions", "sensitivity", "precision", "f1", "dice", "false_lesions", "false_volume"]
    found = summarise_lesions(pd.DataFrame(rows, columns=names).assign(**{"class": "new"}), {}).set_index("metric")
    assert found.loc["sensitivity", "value"] == pytest.approx((0.75 + 0.25) / 2)
    assert found.loc["precision", "value"] == pytest.approx((1.0 + 0.5) / 2)  # that of b's pair without change is not
    assert found.loc["f1", "value"] == pytest.approx((1 / 3 + 1 / 3) / 2)
    assert np.isnan(found.loc["f1", "low"])  # both subjects are equal, which says nothing about others
    assert found.loc["false_lesions", "value"] == 1.5  # of b's and c's pairs without change alone
    assert found.loc["false_volume", "value"] == 6.0
    assert found["subjects"].tolist() == [2] * 6
    assert found.loc["sensitivity", "high"] == 1.0  # not above
    assert found.loc["false_volume", "high"] > 12


def test_checkpoints_of_other_tasks_are_refused():
    made = task()
    checkpoint = {"state_dict": {}, "classes": {}, "combine": "concatenate"}
    with pytest.raises(InputError, match="trained with combine: concatenate, and combine is subtract here"):
        made.on_load_checkpoint(checkpoint)
    with pytest.raises(InputError, match="not a checkpoint of a ChangeSegmenter"):
        made.on_load_checkpoint({"state_dict": {}, "classes": {}})


# --- a planted truth --------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("combine", "twice"), [("subtract", False), ("concatenate", False), ("weight", False), ("subtract", True)]
)
def test_new_spots_are_told_from_known_ones_by_time_alone(combine, twice, tmp_path):
    """In 16 held-out subjects; without the earlier visit, both kinds are reported."""
    made, data, trainer = planted.train(combine, twice, tmp_path)
    stable = []
    with torch.no_grad():
        for batch in data.test_dataloader():
            predicted, truth = made.segmented(batch).numpy() == 1, batch.labels[0, 1].numpy()
            number, volumes = find_lesions(truth == planted.KNOWN, 1.0, 3.0)
            hit = np.bincount(number[predicted], minlength=len(volumes) + 1)[1:]
            stable += (hit >= 0.1 * volumes).tolist()
    trainer.test(made, datamodule=data, verbose=False)
    scores = pd.read_csv(next(tmp_path.glob("test/*/scores.tsv")), sep="\t").set_index("metric")
    assert len(stable) == 48
    if twice:
        assert np.mean(stable) > 0.8
        assert scores.loc["f1", "value"] < 0.6
        assert scores.loc["false_lesions", "value"] > 2
    else:
        assert np.mean(stable) < 0.1
        assert scores.loc["f1", "value"] > 0.85
        assert scores.loc["false_lesions", "value"] < 1  # of two subjects without new spots
