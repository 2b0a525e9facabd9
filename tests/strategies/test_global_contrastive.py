"""Global contrastive pretraining on a tiny network: terms against loops in float64, negatives, queue and weights."""

from __future__ import annotations

import copy
import dataclasses
import math
from functools import partial
from typing import ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lssl.data.batch import PairBatch
from lssl.networks.backbone import Backbone, unet, unet_taps
from lssl.networks.heads import Projector, feature_std, mean_and_max
from lssl.strategies.global_contrastive import BYOL, GlobalContrastive, MoCo, Objective, SimCLR, VICReg
from lssl.utils.errors import InputError
from lssl.views.sampler import View, ViewSampler

PAIRS, WIDTH = 5, 7
SUBJECTS = [3, 5, 3, 8, 9]  # the first and the third pair are of one subject
SMALL = {
    "simclr": partial(SimCLR, hidden=12, projection=WIDTH),
    "moco": partial(MoCo, norm="layer", hidden=12, projection=WIDTH, queue=16),
    "byol": partial(BYOL, hidden=12, projection=WIDTH),
    "vicreg": partial(VICReg, hidden=12, projection=WIDTH),
}
NAMES = list(SMALL)


def make(name: str = "moco", views: dict | None = None, **settings) -> GlobalContrastive:
    """The teacher, where there is one, differs from the online network, so that one cannot stand for the other."""
    torch.manual_seed(0)
    encoder = [nn.Conv3d(1, 5, 2, 2), nn.LeakyReLU(), nn.Conv3d(5, 6, 2, 2)]
    network = nn.Sequential(*encoder, nn.InstanceNorm3d(6), nn.ConvTranspose3d(6, 2, 4, 4))
    backbone = Backbone(network, {"fine": "0", "bottleneck": "2", "normed": "3"})
    sampler = ViewSampler((12, 12, 8), **{"transforms": None, **(views or {})})
    strategy = GlobalContrastive(backbone, objective=SMALL[name], views=sampler, **settings)
    if strategy.teacher is not None:
        with torch.no_grad():
            for parameter in strategy.teacher.parameters():
                parameter += 0.2 * torch.randn_like(parameter)
    return strategy


@pytest.fixture
def batch(make_batch) -> PairBatch:
    batch = make_batch(PAIRS, (16, 15, 12))
    batch.images *= torch.linspace(0.5, 2, PAIRS).view(-1, 1, 1, 1, 1, 1)
    batch.subject = torch.tensor(SUBJECTS)
    batch.times = torch.tensor([[0.0, 1.0], [0, 2.5], [4, 0], [0, 0], [1, float("nan")]])
    batch.ages = torch.full((PAIRS, 2), float("nan"))  # intervals come from times: ages may be unknown
    return batch


def draw(strategy: GlobalContrastive, batch: PairBatch) -> tuple[View, View]:
    strategy.generator.manual_seed(0)
    return strategy.views(batch, strategy.generator)


def terms(strategy: GlobalContrastive, batch: PairBatch, swap: bool = False) -> dict[str, Tensor]:
    first, second = draw(strategy, batch)
    return strategy.terms(*((second, first) if swap else (first, second)), batch)


def fill(strategy: GlobalContrastive) -> None:
    """Keys of other subjects, of the batch's own, and empty places."""
    queue = strategy.objective.queue
    queue.keys.copy_(nn.functional.normalize(torch.randn(16, WIDTH), dim=1))
    queue.subject_ids.copy_(torch.tensor([0, 1, 3, 3, 5, 8, 20, 21, 22, 9, 3, 23, -1, -1, -1, -1]))
    queue.pointer.fill_(12)


# --- the terms, by hand -----------------------------------------------------------------------------------------------


def embedded(strategy: GlobalContrastive, view: View, subject_ids: str) -> np.ndarray:
    """``(B, D)`` in float64: pooled by hand, through the online or the teacher's network and projector."""
    teacher = subject_ids == "teacher"
    backbone, projector = (
        (strategy.teacher["backbone"], strategy.teacher["projector"])
        if teacher
        else (strategy.backbone, strategy.objective.projector)
    )
    network, projector = (copy.deepcopy(module).double() for module in (backbone.network, projector))
    with torch.no_grad():
        maps = nn.Sequential(*network[:3])(view.image.double()).numpy()
        pooled = np.array([[c.mean() for c in m] + [c.max() for c in m] for m in maps])
        return projector(torch.from_numpy(pooled)).numpy()


def unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.sqrt((rows**2).sum(-1, keepdims=True))


def simclr_by_hand(z1: np.ndarray, z2: np.ndarray, shares: np.ndarray, tau: float = 0.2) -> float:
    z, who = unit(np.concatenate([z1, z2])), SUBJECTS * 2
    total = 0.0
    for i in range(2 * PAIRS):
        partner = (i + PAIRS) % (2 * PAIRS)
        others = [math.exp(z[i] @ z[j] / tau) for j in range(2 * PAIRS) if who[j] != who[i]]
        own = math.exp(z[i] @ z[partner] / tau)
        total -= shares[i % PAIRS] * math.log(own / (own + sum(others))) / (2 * shares.sum())
    return total


def moco_by_hand(q, k, queue, subject_ids, shares: np.ndarray, tau: float = 0.2) -> float:
    total = 0.0
    for queries, keys in ((unit(q[0]), unit(k[1])), (unit(q[1]), unit(k[0]))):
        for b in range(PAIRS):
            own = math.exp(queries[b] @ keys[b] / tau)
            rest = [
                math.exp(queries[b] @ n / tau)
                for n, w in zip(queue, subject_ids, strict=True)
                if w not in (-1, SUBJECTS[b])
            ]
            total -= shares[b] * math.log(own / (own + sum(rest))) / (2 * shares.sum())
    return total


def byol_by_hand(p, t, shares: np.ndarray) -> float:
    cosines = (unit(p[0]) * unit(t[1])).sum(1) + (unit(p[1]) * unit(t[0])).sum(1)
    return float(-0.5 * (shares * cosines).sum() / shares.sum())


def vicreg_by_hand(z1: np.ndarray, z2: np.ndarray, shares: np.ndarray) -> dict[str, float]:
    distance = sum(w * ((a - b) ** 2).mean() for w, a, b in zip(shares, z1, z2, strict=True)) / shares.sum()
    variance = covariance = 0.0
    for z in (z1, z2):
        c = np.cov(z.T)
        variance += 0.5 * np.maximum(0, 1 - np.sqrt(c.diagonal() + 1e-4)).mean()
        covariance += ((c**2).sum() - (c.diagonal() ** 2).sum()) / z.shape[1]
    return {"similarity": distance, "variance": variance, "covariance": covariance}


def by_hand(strategy: GlobalContrastive, name: str, batch: PairBatch, shares: np.ndarray) -> dict[str, float]:
    views = draw(strategy, batch)
    z = [embedded(strategy, view, "online") for view in views]
    if name == "vicreg":
        return vicreg_by_hand(*z, shares)
    if name == "simclr":
        return {"similarity": simclr_by_hand(*z, shares)}
    t = [embedded(strategy, view, "teacher") for view in views]
    if name == "moco":
        queue = strategy.objective.queue
        return {"similarity": moco_by_hand(z, t, queue.keys.double().numpy(), queue.subject_ids.tolist(), shares)}
    predictor = copy.deepcopy(strategy.objective.predictor).double()
    with torch.no_grad():
        p = [predictor(torch.from_numpy(rows)).numpy() for rows in z]
    return {"similarity": byol_by_hand(p, t, shares)}


INTERVALS = np.array([1.0, 2.5, 4.0, 0.0, np.inf])  # the last is unknown and weighs 0


@pytest.mark.parametrize("interval", [None, 3.0])
@pytest.mark.parametrize("name", NAMES)
def test_terms_by_hand(batch, name: str, interval: float | None):
    """In evaluation, where batch norm treats each row alone, as the loops do."""
    strategy = make(name, interval=interval).eval()
    if name == "moco":
        fill(strategy)
    found = terms(strategy, batch)
    expected = by_hand(strategy, name, batch, np.ones(PAIRS) if interval is None else np.exp(-INTERVALS / interval))
    assert set(found) == set(expected)
    for term, value in expected.items():
        assert found[term].item() == pytest.approx(value, rel=1e-4, abs=1e-6), term


def test_vicreg_weighs_25_25_1(batch):
    strategy = make("vicreg").eval()
    strategy.generator.manual_seed(0)
    loss, found = strategy._step(batch)
    expected = by_hand(strategy, "vicreg", batch, np.ones(PAIRS))
    total = 25 * expected["similarity"] + 25 * expected["variance"] + expected["covariance"]
    assert loss.item() == pytest.approx(total, rel=1e-4)
    assert set(found) == {"similarity", "variance", "covariance"}
    off = make("vicreg", loss_weights={"variance": 0.0, "covariance": 2.0})
    assert off.loss_weights == {"similarity": 25.0, "variance": 0.0, "covariance": 2.0}
    assert set(terms(off, batch)) == {"similarity", "covariance"}


@pytest.mark.parametrize("name", NAMES)
def test_defaults_of_the_papers(name: str):
    with torch.device("meta"):
        objective = {"simclr": SimCLR, "moco": MoCo, "byol": BYOL, "vicreg": VICReg}[name](12)
    widths = [(m.in_features, m.out_features) for m in objective.projector if isinstance(m, nn.Linear)]
    norm = next(type(m) for m in objective.projector if "Norm" in type(m).__name__)
    assert (widths, norm, objective.momentum) == {
        "simclr": ([(12, 2048), (2048, 128)], nn.BatchNorm1d, None),
        "moco": ([(12, 2048), (2048, 128)], nn.BatchNorm1d, (0.99, 0.999)),
        "byol": ([(12, 4096), (4096, 256)], nn.BatchNorm1d, (0.996, 1.0)),
        "vicreg": ([(12, 2048), (2048, 2048), (2048, 2048)], nn.BatchNorm1d, None),
    }[name]
    if name == "moco":
        assert objective.queue.keys.shape == (2048, 128)
    if name == "byol":
        assert [m.in_features for m in objective.predictor if isinstance(m, nn.Linear)] == [256, 4096]


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


# --- negatives --------------------------------------------------------------------------------------------------------


def loss_of(objective: Objective, vectors: Tensor, pair: int) -> Tensor:
    """Loss of one pair alone; ``vectors (2, B, D)`` of both views, as predictions and as targets."""
    one = nn.functional.one_hot(torch.tensor(pair), PAIRS).float()
    views = vectors[0], vectors[1]
    return objective(views, views, torch.tensor(SUBJECTS), one)["similarity"]


def test_simclr_has_no_negatives_of_the_own_subject():
    objective = make("simclr").objective
    vectors = torch.randn(2, PAIRS, WIDTH, requires_grad=True)
    loss = loss_of(objective, vectors, 0)
    (gradient,) = torch.autograd.grad(loss, vectors)
    assert gradient[:, 2].abs().max() == 0
    assert all(gradient[view, pair].abs().max() > 1e-6 for view in (0, 1) for pair in (0, 1, 3, 4))
    for pair, same in ((2, True), (3, False)):
        moved = vectors.detach().clone()
        moved[:, pair] = torch.randn(2, WIDTH)
        assert (loss_of(objective, moved, 0) == loss).item() == same


@pytest.mark.parametrize("training", [True, False])
def test_moco_has_no_negatives_of_the_own_subject(training: bool):
    vectors = torch.randn(2, PAIRS, WIDTH)

    def loss(change: int | None = None, pair: int | None = None) -> Tensor:
        strategy = make("moco").train(training)
        torch.manual_seed(1)
        fill(strategy)
        queue, rows = strategy.objective.queue, vectors.clone()
        torch.manual_seed(2)
        if change is not None:
            queue.keys[queue.subject_ids == change] = torch.randn(WIDTH)
        if pair is not None:
            rows[:, pair] = torch.randn(2, WIDTH)
        return loss_of(strategy.objective, rows, 0)

    base = loss()
    assert base > 0.1
    assert loss(change=3) == base  # its own subject's earlier keys
    assert loss(change=-1) == base  # empty places
    assert loss(change=20) != base
    assert loss(pair=2) == base  # another pair of its subject, now
    assert loss(pair=0) != base


# --- the queue --------------------------------------------------------------------------------------------------------


def test_moco_queues_the_teachers_keys_of_both_views_after_the_loss(batch):
    strategy = make("moco")
    found = terms(strategy, batch)
    assert found["similarity"].item() == pytest.approx(0.0, abs=1e-6)  # the queue was empty: no negatives yet
    queue = strategy.objective.queue
    keys = np.concatenate([unit(embedded(strategy, view, "teacher")) for view in draw(strategy, batch)])
    np.testing.assert_allclose(queue.keys[: 2 * PAIRS].numpy(), keys, atol=1e-5)
    assert queue.subject_ids.tolist() == [*SUBJECTS, *SUBJECTS, *[-1] * 6]
    assert queue.pointer == 2 * PAIRS
    terms(strategy, batch)  # ten more into sixteen places: the oldest four are overwritten
    assert queue.pointer == 4
    np.testing.assert_allclose(queue.keys[10:].numpy(), keys[:6], atol=1e-5)
    np.testing.assert_allclose(queue.keys[:4].numpy(), keys[6:], atol=1e-5)
    assert queue.subject_ids.tolist() == [*(SUBJECTS * 2)[6:], *(SUBJECTS * 2)[4:], *(SUBJECTS * 2)[:6]]
    assert found["similarity"].requires_grad
    assert not queue.keys.requires_grad


def test_evaluation_leaves_the_queue_alone(batch):
    strategy = make("moco")
    fill(strategy)
    before = {name: value.clone() for name, value in strategy.objective.queue.state_dict().items()}
    strategy.eval()
    terms(strategy, batch)
    assert all(torch.equal(value, before[name]) for name, value in strategy.objective.queue.state_dict().items())
    strategy.train()
    terms(strategy, batch)
    assert not torch.equal(strategy.objective.queue.subject_ids, before["subject_ids"])


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
