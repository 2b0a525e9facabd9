"""The Segmenter: sides in the mirror, consistency through the frame, and what is trained."""

import math
from types import SimpleNamespace

import pytest
import torch
from monai.networks.nets import BasicUNet

from lssl import Backbone, Segmenter, ViewSampler
from lssl.segmentation.classes import Classes
from lssl.utils.errors import InputError

SIDES = Classes(("left", "right"), ((17,), (53,)), False)


def segmenter(size=16, channels=1, flip=0.0, mirrored_class=(0, 1, 2), views=None, **options):
    """A Segmenter whose network is given later, by :func:`answer`."""
    network = BasicUNet(3, channels, 4, (4, 4, 4, 4, 4, 4), norm=("batch", {}))
    backbone = Backbone(network, {"decoder.0": "upcat_1.convs.conv_1"}, in_channels=channels)
    views = {"affine_probability": 0.0, "flip": (flip, 0.0, 0.0), "transforms": [], **(views or {})}
    made = Segmenter(backbone, views=ViewSampler(size, **views), **options)
    made.build(SIDES, torch.ones(3), torch.tensor(mirrored_class), torch.ones(3))
    return made


def answer(made, monkeypatch, function):
    """Lets a function of the image stand for the network."""
    monkeypatch.setattr(made.backbone, "outputs", lambda image: [function(image)])
    monkeypatch.setattr(made, "head", torch.nn.Identity())
    monkeypatch.setattr(made, "logits", function)


# --- terms ------------------------------------------------------------------------------------------------------------


def by_apparent_side(image):
    """Says *left* in the first half of a view and *right* in the second, as a network that knows heads would."""
    half = image.shape[2] // 2
    logits = torch.full((len(image), 3, *image.shape[2:]), -20.0)
    logits[:, 1, :half] = logits[:, 2, half:] = 20.0
    return logits


@pytest.mark.parametrize("flip", [0.0, 1.0])
def test_sides_survive_the_mirror(flip, make_batch, generator, monkeypatch):
    batch = make_batch(size=(16, 16, 16), affine="unit", labels=True)
    batch.labels[:, :, :8], batch.labels[:, :, 8:] = 17, 53
    made = segmenter(flip=flip, mirrored_class=(0, 2, 1), views={"overlap": 1.0})
    answer(made, monkeypatch, by_apparent_side)
    views = made.views(batch, generator)
    assert (views[0].label[:, :, :8] == (53 if flip else 17)).all()
    assert made.terms(*views)["supervised"].item() == pytest.approx(0.0, abs=1e-4)


def test_mirrored_views_turned_and_zoomed_too(make_batch, generator, monkeypatch):
    """Which view is mirrored is read off its matrix; here views of one pair are mirrored each on its own."""
    batch = make_batch(pairs=8, size=(24, 24, 24), affine="oblique", labels=True)
    made = segmenter(
        flip=0.5,
        mirrored_class=(0, 2, 1),
        views={"affine_probability": 1.0, "rotation": 15.0, "flip_together": False},
    )
    logits = torch.randn(8, 3, 16, 16, 16)
    mirrored = []
    for view in made.views(batch, generator):
        swapped = made.unmirrored(logits, view)
        seen = (swapped[:, 1] == logits[:, 2]).flatten(1).all(1)
        mirrored += seen.tolist()
        determinant = torch.linalg.det((torch.linalg.inv(view.source_affine) @ view.affine)[:, :3, :3])
        assert torch.equal(seen, determinant < 0)
    assert 0 < sum(mirrored) < 16


def by_place(image):
    """Three soft classes that depend on the place in the frame alone, which the image's channels hold."""
    return torch.stack([torch.zeros_like(image[:, 0]), (image[:, 0] + 40) / 6, (image[:, 1] - 12) / 6], 1)


@pytest.mark.parametrize("geometry", ["independent", "shared"])
def test_consistency_compares_places_not_voxels(geometry, make_batch, generator, monkeypatch):
    """Two views with their own shift, turn and zoom: predictions that agree in the frame agree."""
    batch = make_batch(size=(40, 36, 36), image="frame")  # holds every turned view, so that none is padded,
    views = {"affine_probability": 1.0, "geometry": geometry, "overlap": 0.2}  # nor takes the first one's box

    made = segmenter(channels=3, flip=0.5, views=views, loss_weights={"consistency": 1.0}, targets="soft")
    answer(made, monkeypatch, by_place)
    first, second = made.views(batch, generator)
    assert (first.affine - second.affine).abs().max() > 0.5
    assert made.terms(first, second)["consistency"].item() < 2e-3
    moved = first.affine.clone()
    moved[:, 0, 3] += 3.0
    wrong = made._consistency(*(by_place(v.image) for v in (first, second)), first, second)
    first.affine = moved
    assert made._consistency(*(by_place(v.image) for v in (first, second)), first, second) > 5 * wrong


def test_both_directions_count_and_targets_are_detached(make_batch, generator):
    batch = make_batch(size=(16, 16, 16), affine="unit")
    made = segmenter(loss_weights={"consistency": 1.0}, views={"overlap": 1.0})
    first, second = made.views(batch, generator)
    one = torch.randn(2, 3, 16, 16, 16, requires_grad=True)
    other = torch.randn(2, 3, 16, 16, 16, requires_grad=True)
    loss = made._consistency(one, other, first, second)
    valid = torch.ones(2, 16, 16, 16, dtype=torch.bool)
    halves = [made.consistency(a.softmax(1), b.softmax(1), valid) for a, b in ((one, other), (other, one))]
    torch.testing.assert_close(loss, (halves[0] + halves[1]) / 2)
    found = torch.autograd.grad(loss, one)[0]
    torch.testing.assert_close(found, torch.autograd.grad(halves[0], one)[0] / 2)


def test_long_intervals_and_early_steps_count_less(make_batch, generator):
    batch = make_batch(size=(16, 16, 16), affine="unit")  # two years apart
    made, weighted = (segmenter(loss_weights={"consistency": 1.0}, interval=value) for value in (None, 2.0))
    weighted.load_state_dict(made.state_dict())
    first, second = made.views(batch, generator)
    plain, less = (part.eval().terms(first, second)["consistency"] for part in (made, weighted))
    assert less.item() == pytest.approx(plain.item() * math.exp(-1), rel=1e-5)
    made.ramp, made._trainer = 0.5, SimpleNamespace(estimated_stepping_batches=100, global_step=0)
    rises = []
    for step in (0, 25, 50, 99):
        made._trainer.global_step = step
        rises.append(made._rise())
    assert rises == pytest.approx([math.exp(-5), math.exp(-5 / 4), 1.0, 1.0])


def test_views_without_labels_leave_the_supervised_term_alone(make_batch, generator):
    batch = make_batch(size=(16, 16, 16), affine="unit", labels=True)
    batch.labels.fill_(-1)
    batch.labels[0] = 17
    made = segmenter().eval()
    views = made.views(batch, generator)
    alone = made.supervised(made.logits(torch.cat([v.image[:1] for v in views])), torch.ones(2, 16, 16, 16).long())
    torch.testing.assert_close(made.terms(*views)["supervised"], alone)
    batch.labels = None
    assert not made.terms(*made.views(batch, generator))


# --- what is trained --------------------------------------------------------------------------------------------------


def test_learning_rates_by_part_and_by_module():
    network = BasicUNet(3, 1, 4, (4, 4, 4, 4, 4, 4), norm=("batch", {}))
    taps = {"bottleneck": "down_4.convs.conv_1", "decoder.0": "upcat_1.convs.conv_1"}
    multipliers = {"encoder": 0.1, "down_1": 0.0, "down_1.convs.conv_1": 0.5, "head": 2.0}
    made = Segmenter(Backbone(network, taps), views=ViewSampler(32), lr_multipliers=multipliers)
    made.build(SIDES, torch.ones(3), torch.arange(3), torch.ones(3))
    expected = {}
    for name, parameter in made.named_parameters():
        path = name.removeprefix("backbone.network.")
        part = 0.1 if path.startswith(("conv_0", "down_")) else 2.0 if path.startswith("head") else 1.0
        part = 0.5 if "down_1.convs.conv_1." in path else 0.0 if path.startswith("down_1.") else part
        expected.setdefault(part, set()).add(id(parameter))
    found = {factor: {id(parameter) for parameter in group} for factor, group in made.parameter_groups().items()}
    frozen = expected.pop(0.0)
    assert found == expected
    made.start()
    assert {id(p) for p in made.parameters() if not p.requires_grad} == frozen
    norms = {name: m.training for name, m in made.train().named_modules() if isinstance(m, torch.nn.BatchNorm3d)}
    still = {name for name, training in norms.items() if not training}
    assert still == {name for name in norms if "down_1.convs.conv_0" in name}
    assert len(still) == 1


def test_weights_that_the_user_froze_stay_frozen():
    network = BasicUNet(3, 1, 4, (4, 4, 4, 4, 4, 4), norm=("batch", {}))
    network.conv_0.requires_grad_(False)
    made = Segmenter(Backbone(network, {"bottleneck": "down_4.convs.conv_1"}), views=ViewSampler(32))
    made.build(SIDES, torch.ones(3), torch.arange(3), torch.ones(3))
    made.start()
    trained = {id(parameter) for group in made.parameter_groups().values() for parameter in group}
    assert not trained & {id(parameter) for parameter in network.conv_0.parameters()}
    assert trained == {id(parameter) for parameter in made.parameters() if parameter.requires_grad}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"lr_multipliers": {"encodr": 0.1}}, "no part 'encodr' of the network; did you mean 'encoder'"),
        ({"lr_multipliers": {"head": -1.0}}, "0 or more, not -1"),
        ({"interval": 0.0}, "interval: give a number above 0"),
        ({"threshold": 1.0}, "threshold: give a probability"),
        ({"ramp": 2.0}, "ramp is a share"),
        ({"loss_weights": {"consistancy": 1.0}}, "no term 'consistancy'"),
    ],
)
def test_refused_options(options, words):
    with pytest.raises(InputError, match=words):
        segmenter(**options)
