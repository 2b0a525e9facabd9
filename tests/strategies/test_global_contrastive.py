"""Global contrastive pretraining on a tiny network: pooling, intervals, teachers, precision and what is refused."""

# ruff: noqa: F811

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar

import numpy as np
import pytest
import torch
from small_global import NAMES, PAIRS, SMALL, SUBJECTS, batch, draw, embedded, fill, make, terms  # noqa: F401

from lssl.data.batch import PairBatch
from lssl.networks.backbone import Backbone, unet, unet_taps
from lssl.networks.heads import Projector, feature_std, mean_and_max
from lssl.strategies.global_contrastive import GlobalContrastive, Objective
from lssl.utils.errors import InputError
from lssl.views.sampler import ViewSampler

# --- pooling ----------------------------------------------------------------------------------------------------------


def test_the_mean_after_an_instance_norm_is_the_same_for_all_images():
    """The trap; the maximum beside it tells the images apart."""
    images = torch.randn(6, 1, 12, 12, 8) * torch.linspace(0.2, 5, 6).view(-1, 1, 1, 1, 1)
    backbone = make().backbone
    with torch.no_grad():
        maps = backbone(images, ["bottleneck", "normed"])
    means = {tap: value.mean((2, 3, 4)) for tap, value in maps.items()}
    assert means["normed"].std(0).max() < 1e-6
    assert means["bottleneck"].std(0).max() > 1e-2
    pooled = mean_and_max(maps["normed"])
    assert pooled.std(0)[:6].max() < 1e-6
    assert pooled.std(0)[6:].min() > 0.05


@pytest.mark.parametrize("taps", [["normed"], ["bottleneck"], ["fine", "bottleneck"]])
def test_the_projector_sees_what_tells_images_apart(batch, taps: list[str]):
    strategy, rows = make("simclr", taps=taps), []
    strategy.objective.projector.register_forward_pre_hook(lambda _, args: rows.append(args[0]))
    terms(strategy, batch)
    (pooled,) = rows
    first, second = draw(strategy, batch)
    maps = strategy.backbone(torch.cat([first.image, second.image]), taps)
    expected = torch.cat(
        [f(maps[tap]) for tap in taps for f in (lambda m: m.mean((2, 3, 4)), lambda m: m.amax((2, 3, 4)))], 1
    )
    torch.testing.assert_close(pooled, expected)
    assert (pooled[:, None] - pooled[None]).abs().amax(-1)[~torch.eye(2 * PAIRS, dtype=torch.bool)].min() > 1e-2


def test_note_spread_is_that_of_the_embeddings(batch):
    strategy = make("simclr").eval()
    terms(strategy, batch)
    z = np.concatenate([embedded(strategy, view, "online") for view in draw(strategy, batch)])
    assert strategy.logged["feature_std"].item() == pytest.approx(feature_std(torch.from_numpy(z)).item(), rel=1e-4)


# --- the interval -----------------------------------------------------------------------------------------------------


def test_pairs_of_two_visits_weigh_less_the_longer_their_interval(batch):
    strategy = make("simclr", interval=5.0)
    found = strategy._weight(*draw(strategy, batch))
    torch.testing.assert_close(found, torch.tensor([math.exp(-1 / 5), math.exp(-0.5), math.exp(-4 / 5), 1.0, 0.0]))
    assert make("simclr")._weight(*draw(strategy, batch)) is None


def test_pairs_of_one_visit_weigh_one(batch):
    strategy = make("simclr", interval=0.5, views={"same_visit": 1.0})
    assert strategy._weight(*draw(strategy, batch)).tolist() == [1.0] * PAIRS
    strategy = make("simclr", interval=0.5, views={"same_visit": 0.5})
    kinds = set()
    for seed in range(5):
        first, second = strategy.views(batch, torch.Generator().manual_seed(seed))
        found, same = strategy._weight(first, second), first.time == second.time
        known = ~(first.time.isnan() | second.time.isnan())
        assert (found[same] == 1).all()
        assert (found[~same & known] < 1).all()
        kinds |= {*same[known].tolist()}
    assert kinds == {False, True}


# --- symmetry, teacher, encoder ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("interval", [None, 3.0])
@pytest.mark.parametrize("name", NAMES)
def test_the_two_views_may_be_swapped(batch, name: str, interval: float | None):
    found = []
    for swap in (False, True):
        strategy = make(name, interval=interval)
        if name == "moco":
            fill(strategy)
        found.append(terms(strategy, batch, swap))
    for term, value in found[0].items():
        assert value.item() != 0
        torch.testing.assert_close(value, found[1][term], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_teacher_exists_for_moco_and_byol_only_and_receives_no_gradient(batch, name: str):
    strategy = make(name)
    assert (strategy.teacher is not None) == (name in ("moco", "byol"))
    if name == "moco":
        fill(strategy)
    sum(terms(strategy, batch).values()).backward()
    for parameter_name, parameter in strategy.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, parameter_name
        if parameter_name.startswith("teacher"):
            assert not parameter.requires_grad
        elif parameter.requires_grad and not parameter_name.endswith("bias"):
            assert parameter.grad.abs().sum() > 0, parameter_name


@pytest.mark.parametrize("name", NAMES)
def test_the_teachers_target_is_a_constant(batch, name: str):
    """Not even the images are asked; without a teacher the target is the online embedding, and learns."""
    strategy, seen = make(name), []
    strategy.objective.register_forward_pre_hook(lambda _, args: seen.append(args))
    views = draw(strategy, batch)
    for view in views:
        view.image = view.image.clone().requires_grad_()
    strategy.terms(*views, batch)
    ((online, target, *_),) = seen
    assert all(vectors.requires_grad for vectors in online)
    assert [vectors.requires_grad for vectors in target] == [name in ("simclr", "vicreg")] * 2


@pytest.mark.parametrize("name", NAMES)
def test_encoder_only(batch, name: str):
    strategy, ran = make(name), []
    for backbone in (strategy.backbone, *([strategy.teacher["backbone"]] if strategy.teacher else [])):
        for index, module in enumerate(backbone.network):
            module.register_forward_hook(lambda *_, i=index: ran.append(i))
    terms(strategy, batch)
    assert set(ran) == {0, 1, 2}
    for index, module in enumerate(strategy.backbone.network):
        assert all(parameter.requires_grad == (index < 3) for parameter in module.parameters())


def test_the_default_network_runs_no_decoder(make_batch):
    backbone = Backbone(unet(features=(2, 2, 2, 2, 3, 2), norm="instance"), unet_taps())
    strategy = GlobalContrastive(backbone, objective=SMALL["moco"], views=ViewSampler(32, transforms=[]))
    ran = []
    for name, module in strategy.named_modules():
        if ".upcat_" in name or name.endswith("final_conv"):
            module.register_forward_hook(lambda *_, name=name: ran.append(name))
    terms(strategy, make_batch(2, (36, 34, 32)))
    assert ran == []
    asked = {name.split(".")[0] for name, p in backbone.network.named_parameters() if p.requires_grad}
    assert asked == {"conv_0", "down_1", "down_2", "down_3", "down_4"}


@pytest.mark.parametrize("name", NAMES)
def test_losses_are_float32_under_autocast(batch, name: str):
    strategy = make(name).eval()
    if name == "moco":
        fill(strategy)
    exact = terms(strategy, batch)
    with torch.autocast("cpu", torch.bfloat16):
        found = terms(strategy, batch)
    for term, value in found.items():
        assert value.dtype == torch.float32
        assert value.item() == pytest.approx(exact[term].item(), rel=0.1, abs=0.05), term


# --- refusals, and an objective of one's own --------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "title"), [("simclr", "SimCLR"), ("vicreg", "VICReg")])
def test_one_pair_has_nothing_to_compare_with_while_training(make_batch, name: str, title: str):
    strategy, one = make(name), make_batch(1, (16, 15, 12))
    with pytest.raises(
        InputError, match=rf"^{title} compares pairs .* needs 2 or more, but a batch holds 1: "
    ) as error:
        terms(strategy, one)
    assert ". " not in str(error.value)
    strategy.eval()
    assert all(value.isfinite() for value in terms(strategy, one).values())


def test_one_pair_is_enough_for_moco(make_batch):
    strategy = make("moco")
    fill(strategy)
    assert terms(strategy, make_batch(1, (16, 15, 12)))["similarity"] > 0


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"interval": 0.0}, r"interval: give a number above 0, not 0.0\."),
        ({"interval": -2.0}, r"interval: give a number above 0, not -2.0\."),
        ({"taps": ["bottelneck"]}, r"There is no tap 'bottelneck'; the backbone has fine, bottleneck, normed\."),
        ({"loss_weights": {"variance": 1.0}}, r"no term 'variance'; it has similarity\."),
    ],
)
def test_wrong_settings_are_refused_in_one_sentence(settings: dict, sentence: str):
    with pytest.raises(InputError, match=sentence) as error:
        make("moco", **settings)
    assert ". " not in str(error.value)


class Distance(Objective):
    """Mean squared distance to the teacher's embedding of the other view, and the size of embeddings."""

    LOSS_WEIGHTS: ClassVar = {"similarity": 2.0, "size": 0.5}
    MIN_PAIRS = 3

    def __init__(self, in_features: int) -> None:
        super().__init__()
        self.projector = Projector(in_features, 9, 4, norm="layer")
        self.momentum = (0.9, 0.95)

    def forward(self, online, target, subject, weight):
        (p1, p2), (t1, t2) = online, target
        self.seen = subject, weight
        return {"similarity": (p1 - t2).square().mean() + (p2 - t1).square().mean(), "size": p1.square().mean()}


def test_an_objective_of_ones_own(batch):
    SMALL["own"] = Distance
    try:
        strategy = make("own", loss_weights={"size": 1.5}, interval=2.0)
        with pytest.raises(InputError, match="no term 'variance'; it has similarity, size"):
            make("own", loss_weights={"variance": 1.0})
    finally:
        del SMALL["own"]
    assert [strategy.teacher.momentum(done) for done in (0.0, 1.0)] == pytest.approx([0.9, 0.95])
    strategy.generator.manual_seed(0)
    loss, found = strategy._step(batch)
    views = draw(strategy, batch)
    (p1, p2), (t1, t2) = ([embedded(strategy, view, who) for view in views] for who in ("online", "teacher"))
    expected = ((p1 - t2) ** 2).mean() + ((p2 - t1) ** 2).mean()
    assert found["similarity"].item() == pytest.approx(expected, rel=1e-4)
    assert loss.item() == pytest.approx(2 * expected + 1.5 * (p1**2).mean(), rel=1e-4)
    subject, weight = strategy.objective.seen
    assert subject.tolist() == SUBJECTS
    assert weight.shape == (PAIRS,)
    loss.backward()
    assert all((p.grad is not None) == p.requires_grad for p in strategy.parameters())
    held = {field.name: getattr(batch, field.name) for field in dataclasses.fields(batch) if field.init}
    batch = PairBatch(**{name: value if value is None else value[:2] for name, value in held.items()})
    with pytest.raises(InputError, match=r"^Distance compares pairs .* needs 3 or more, but a batch holds 2"):
        terms(strategy, batch)
