"""Longitudinal local pretraining on a narrow network and random volumes."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lssl.data.batch import PairBatch
from lssl.networks.backbone import Backbone, unet, unet_taps
from lssl.networks.heads import StackedHeads, StackedLinear
from lssl.strategies import longitudinal_local
from lssl.strategies.longitudinal_local import Cosine, InfoNCE, LongitudinalLocal
from lssl.utils.errors import InputError
from lssl.views import geometry as geo
from lssl.views.sampler import View, ViewSampler

TERMS = list(LongitudinalLocal.LOSS_WEIGHTS)
OBJECTIVES = {"cosine": partial(Cosine, predictor_hidden=8), "info_nce": InfoNCE}
ENCODER = ["encoder.0", "encoder.1", "encoder.2", "encoder.3", "bottleneck"]
DECODER = ["decoder.3", "decoder.2", "decoder.1"]


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    torch.manual_seed(0)
    return Backbone(unet(features=(4, 4, 8, 8, 8, 6)), unet_taps())


@pytest.fixture
def make(backbone):
    def build(views: dict | None = None, objective: str = "cosine", **settings) -> LongitudinalLocal:
        sampler = ViewSampler(32, **{"geometry": "shared", "transforms": [], **(views or {})})
        narrow = {"hidden": 16, "projection": 12, "objective": OBJECTIVES[objective], "samples": 16}
        return LongitudinalLocal(copy.deepcopy(backbone), views=sampler, **{**narrow, **settings})

    return build


@pytest.fixture
def batch(make_batch) -> PairBatch:
    return make_batch(2, (36, 34, 32), affine="same")


def views(strategy: LongitudinalLocal, batch: PairBatch) -> tuple[View, View]:
    strategy.generator.manual_seed(0)
    return strategy.views(batch, strategy.generator)


def terms(strategy: LongitudinalLocal, batch: PairBatch, swap: bool = False) -> dict[str, Tensor]:
    first, second = views(strategy, batch)
    strategy.generator.manual_seed(1)
    return strategy.terms(*((second, first) if swap else (first, second)), batch)


def only(*names: str) -> dict[str, float]:
    return {name: float(name in names) for name in TERMS}


# --- the terms, by hand -----------------------------------------------------------------------------------------------


@pytest.fixture
def drawn(monkeypatch) -> Iterator[dict]:
    """Tap → places that were drawn for it."""
    places, original = {}, longitudinal_local.plan_points

    def record(first, second, taps, *rest):
        found = original(first, second, taps, *rest)
        places.update({tap.module: torch.from_numpy(mm) for tap, mm in zip(taps, found.mm, strict=True)})
        return found

    monkeypatch.setattr(longitudinal_local, "plan_points", record)
    return places


def head(heads: StackedHeads, tap: str, rows: Tensor) -> Tensor:
    """One of the heads alone, layer by layer; norms begin without scale and shift."""
    number = heads.taps.index(tap)
    first = [heads.first] if isinstance(heads.first, StackedLinear) else []
    rows = rows if first else heads.first[f"tap_{tap.replace('.', '/')}"](rows)
    for layer in [*first, *heads.rest]:
        if isinstance(layer, StackedLinear):
            rows = rows @ layer.weight[number]
            rows = rows if layer.bias is None else rows + layer.bias.unflatten(0, (layer.count, -1))[number]
        elif isinstance(layer, nn.ReLU):
            rows = rows.relu()
        else:
            rows = (rows - rows.mean(0)) / (rows.var(0, unbiased=False) + 1e-5).sqrt()
    return rows


def test_every_term_by_hand(make, batch, drawn):
    shares = {"encoder.0": 1.0, "bottleneck": 2.0, "decoder.3": 3.0, "decoder.1": 2.0}
    strategy = make(tap_weights=shares, views={"transforms": None})
    found = terms(strategy, batch)
    first, second = views(strategy, batch)
    taps = strategy.backbone.taps
    features = strategy.backbone(torch.cat([first.image, second.image]), list(taps), output=True)

    def project(tap: str, places: Tensor) -> list[Tensor]:
        """Features indexed voxel by voxel (shared views: the drawn places are voxels of both), through the head."""
        where = geo.feature_affine(first.affine, taps[tap].stride, taps[tap].offset)
        index = torch.stack([geo.transform(torch.linalg.inv(w), p) for w, p in zip(where, places, strict=True)])
        torch.testing.assert_close(index, index.round(), rtol=0, atol=1e-6)
        rows = [
            features[tap][visit * 2 + b, :, i, j, k]
            for visit in range(2)
            for b in range(2)
            for i, j, k in index[b].round().long().tolist()
        ]
        return list(head(strategy.projectors, tap, torch.stack(rows)).chunk(2))

    expected = dict.fromkeys(TERMS, 0.0)
    for tap, weight in shares.items():
        z1, z2 = project(tap, drawn[taps[tap].module])
        p1, p2 = head(strategy.predictors, tap, torch.cat([z1, z2])).chunk(2)
        cosines = F.cosine_similarity(p1, z2).mean() + F.cosine_similarity(p2, z1).mean()
        expected["similarity"] -= weight / 8 * 0.5 * cosines.item()
        if tap.startswith("decoder"):
            for z in (z1, z2):
                centred = (z - z.mean(0)).double()
                covariance = centred.T @ centred / (len(z) - 1)
                hinge = (1 - (covariance.diagonal() + 1e-4).sqrt()).clamp_min(0).mean()
                expected["variance"] += weight / 8 * 0.5 * hinge.item()
                off = covariance - covariance.diagonal().diag()
                expected["covariance"] += weight / 8 * (off**2).sum().item() / z.shape[1]
    places = drawn[taps["decoder.3"].module]
    skip, decoder = (torch.cat(project(tap, places)) for tap in ("skip.3", "decoder.3"))
    expected["orthogonality"] = F.cosine_similarity(skip, decoder).square().mean().item()
    picture = F.conv3d(features["output"], strategy.to_image.weight, padding=1)
    clean = torch.cat([first.clean, second.clean])
    expected["reconstruction"] = (picture - clean).square().mean().item()
    for name in TERMS:
        assert found[name].item() == pytest.approx(expected[name], rel=1e-3, abs=1e-5), name


def test_heads_see_the_same_place_of_both_views(make_batch):
    """The network's features are their own places in mm, and views are drawn apart: the heads' rows must agree."""
    network = nn.Sequential(nn.AvgPool3d((4, 2, 2)), nn.Upsample(scale_factor=(4.0, 2.0, 2.0)))
    strategy = LongitudinalLocal(
        Backbone(network, {"places": "0"}, in_channels=3),
        views=ViewSampler((16, 16, 12), transforms=[], flip=(0.5, 0.5, 0.5), flip_together=False, overlap=0.4),
        encoder_taps=["places"],
        decoder_taps=[],
        loss_weights=only("similarity"),
        hidden=8,
        projection=8,
        objective=OBJECTIVES["cosine"],
    )
    rows = []
    strategy.projectors.register_forward_pre_hook(lambda _, args: rows.append(args[0][0]))
    batch = make_batch(4, (40, 38, 36), image="frame")
    terms(strategy, batch)
    one, two = rows[0].unflatten(0, (2, 4, -1)).double()
    inner = torch.ones(one.shape[:2], dtype=torch.bool)
    for visit in range(2):  # beyond the source's last voxels zeros mix in
        index = geo.transform(torch.linalg.inv(batch.affines[:, visit]), one)
        inner &= geo.contains(index, (40, 38, 36), 4.0)
    assert inner.sum() > 100
    assert (one - two)[inner].abs().max() < 2e-3


def test_loss_is_the_weighted_sum(make, batch):
    strategy = make(loss_weights={"variance": 0.25, "orthogonality": 3.0, "covariance": 0.0})
    strategy.generator.manual_seed(0)
    loss, found = strategy._step(batch)
    assert set(found) == set(TERMS) - {"covariance"}
    weights = {"similarity": 1, "variance": 0.25, "orthogonality": 3, "reconstruction": 10}
    assert loss.item() == pytest.approx(sum(weights[name] * value.item() for name, value in found.items()), rel=1e-5)


def test_published_numbers(backbone):
    """Heads 2048/512, K = 128, w = 1/8 for each tap, hence 1.25e-4 for variance and covariance of each decoder tap."""
    with torch.device("meta"):
        strategy = LongitudinalLocal(copy.deepcopy(backbone), views=ViewSampler(32))
    assert strategy.tap_weights == dict.fromkeys([*ENCODER, *DECODER], 1 / 8)
    for name in ("variance", "covariance"):
        assert strategy.loss_weights[name] * strategy.tap_weights["decoder.2"] == pytest.approx(1.25e-4)
    assert [strategy.loss_weights[name] for name in ("similarity", "orthogonality", "reconstruction")] == [1, 100, 10]
    assert strategy.samples == 128
    assert not strategy.foreground
    projector, predictor = strategy.projectors, strategy.predictors
    assert projector.first["tap_bottleneck"].weight.shape == (2048, 8)
    assert predictor.first.weight.shape == (8, 2048, 512)
    rest = [[m.weight.shape for m in heads.rest if isinstance(m, StackedLinear)] for heads in (projector, predictor)]
    assert rest == [[(9, 2048, 2048), (9, 2048, 2048)], [(8, 512, 2048)]]
    assert not projector.rest[-1].norm.affine
    assert isinstance(predictor.rest[-1], StackedLinear)
    assert predictor.rest[-1].bias is not None
    assert set(strategy.predictors.taps) == {*ENCODER, *DECODER}
    assert set(strategy.projectors.taps) == {*strategy.predictors.taps, "skip.3"}


# --- what is switched on and off --------------------------------------------------------------------------------------


@pytest.mark.parametrize("term", TERMS)
def test_a_term_of_weight_zero_is_absent_and_leaves_no_head(make, batch, term: str):
    strategy = make(loss_weights={term: 0.0})
    assert set(terms(strategy, batch)) == set(TERMS) - {term}
    assert bool(strategy.predictors) == (term != "similarity")
    assert ("skip.3" in strategy.projectors) == (term != "orthogonality")
    assert hasattr(strategy, "to_image") == (term != "reconstruction")
    assert ("encoder.0" in strategy.projectors) == (term != "similarity")


@pytest.mark.parametrize("objective", ["cosine", "info_nce"])
@pytest.mark.parametrize("term", TERMS)
def test_every_head_of_a_term_that_is_on_gets_a_gradient(make, batch, term: str, objective: str):
    strategy = make(loss_weights=only(term), objective=objective)
    found = terms(strategy, batch)
    assert set(found) == {term}
    found[term].backward()
    for name, parameter in strategy.named_parameters():
        if not name.startswith("backbone"):
            assert parameter.grad is not None, name
            assert parameter.grad.abs().sum() > 0, name
    seen = strategy.backbone.network.conv_0.conv_0.conv.weight.grad
    assert seen.isfinite().all()
    assert seen.abs().sum() > 0


def test_default_leaves_no_parameter_without_gradient(make, batch):
    strategy = make()
    sum(terms(strategy, batch).values()).backward()
    assert [name for name, parameter in strategy.named_parameters() if parameter.grad is None] == []


def test_similarity_without_gradient_through_the_projections_of_the_other_view(make, batch):
    """Without the predictor's path, nothing of the similarity remains."""
    strategy = make(loss_weights=only("similarity"))
    strategy.objective.loss.register_forward_pre_hook(
        lambda _, args: (args[0].detach(), args[1], args[2].detach(), *args[3:])
    )
    assert not terms(strategy, batch)["similarity"].requires_grad


@pytest.mark.parametrize("kind", ["projected", "raw"])
def test_orthogonality_reaches_the_backbone(make, batch, kind: str):
    strategy = make(loss_weights=only("orthogonality"), orthogonality=kind)
    assert set(strategy.projectors.taps) == (set() if kind == "raw" else {"skip.3", "decoder.3"})
    value = terms(strategy, batch)["orthogonality"]
    assert 0 < value.item() < 1
    value.backward()
    for path in ("down_3.convs.conv_1.conv", "upcat_4.convs.conv_0.conv"):
        assert strategy.backbone.network.get_submodule(path).weight.grad.abs().sum() > 0


def test_without_decoder_terms_the_decoder_does_not_run(make, batch):
    strategy, ran = make(loss_weights=only("similarity"), decoder_taps=()), []
    strategy.backbone.network.upcat_4.register_forward_hook(lambda *_: ran.append(1))
    terms(strategy, batch)
    assert not ran


# --- symmetries, and learning -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", ["cosine", "info_nce"])
def test_the_two_visits_may_be_swapped(make, batch, objective: str):
    strategy = make(objective=objective)
    one, two = terms(strategy, batch), terms(strategy, batch, swap=True)
    for name in TERMS:
        torch.testing.assert_close(one[name], two[name], rtol=1e-4, atol=1e-5)


def test_identical_visits_under_shared_views_have_identical_projections(make, make_batch):
    strategy = make(views={"intensity": "shared", "transforms": None})
    seen = []
    strategy.objective.loss.register_forward_pre_hook(lambda _, args: seen.append(args))
    terms(strategy.eval(), make_batch(2, (36, 34, 32), affine="same", identical=True))
    assert len(seen) == 1
    for p1, z1, p2, z2, weight in seen:
        assert z1.shape == (8, 2, 16, 12)
        assert torch.equal(z1, z2)
        assert torch.equal(p1, p2)
        assert weight.tolist() == 8 * [[1, 1]]


@pytest.mark.parametrize("objective", ["cosine", "info_nce"])
def test_similarity_falls_in_twenty_steps(make, make_batch, objective: str):
    batch = make_batch(2, (36, 34, 32), affine="same", identical=True)
    strategy = make(loss_weights=only("similarity"), objective=objective)
    optimizer = torch.optim.Adam(strategy.parameters(), lr=3e-3)
    values = []
    for _ in range(20):
        loss = terms(strategy, batch)["similarity"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        values.append(loss.item())
    assert values[-1] < values[0] - 0.1


@pytest.mark.parametrize("foreground", [False, True])
def test_independent_views_of_moved_visits_give_finite_terms(make, make_batch, drawn, foreground: bool):
    batch = make_batch(2, (40, 38, 36), affine="oblique")
    batch.foreground[:, :, :20] = False
    strategy = make(views={"geometry": "independent", "transforms": None}, foreground=foreground)
    assert all(value.isfinite() for value in terms(strategy, batch).values())
    first, _ = views(strategy, batch)
    inside = first.contains(drawn[strategy.backbone.taps["encoder.0"].module], foreground=True)
    assert inside.all() == foreground


def test_terms_are_float32_under_autocast_and_near_those_without(make, batch):
    strategy = make().eval()
    exact = terms(strategy, batch)
    with torch.autocast("cpu", torch.bfloat16):
        found = terms(strategy, batch)
    for name in TERMS:
        assert found[name].dtype == torch.float32
        assert found[name].item() == pytest.approx(exact[name].item(), rel=0.1, abs=0.02), name


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (
            {"loss_weights": {"simlarity": 1.0}},
            r"no term 'simlarity'.*covariance, orthogonality, .*similarity, variance",
        ),
        ({"encoder_taps": ["encoder.7"]}, r"no tap 'encoder.7'.*encoder.0.*decoder.0"),
        ({"orthogonal_taps": ("skip.9", "decoder.3")}, r"no tap 'skip.9'.*skip.3"),
        ({"tap_weights": {"skip.3": 1.0}}, r"'skip.3' is none of the taps used, encoder.0, .*decoder.1"),
        ({"tap_weights": {"encoder.0": -1.0, "encoder.1": 2.0}}, r"none a negative one"),
        ({"tap_weights": {}}, r"at least one tap a positive weight"),
        ({"orthogonal_taps": ("skip.3", "decoder.1")}, r"skip.3 and decoder.1 have different strides"),
        (
            {"orthogonal_taps": ("encoder.0", "decoder.0"), "orthogonality": "raw"},
            r"encoder.0 has 4 and decoder.0 has 6",
        ),
    ],
)
def test_wrong_settings_are_refused_by_name(make, settings: dict, sentence: str):
    with pytest.raises(InputError, match=sentence):
        make(**settings)


def test_nothing_to_learn_is_refused(make, batch):
    strategy = make(loss_weights=only())
    assert not [name for name, _ in strategy.named_parameters() if not name.startswith("backbone")]
    with pytest.raises(InputError, match="every term has weight 0, so there is nothing to learn"):
        strategy._step(batch)


def test_published_initial_weights():
    """Deviations by fan-in: 16 channels × 27 voxels give √(2 / 432) = 0.068, torch's default 0.028."""
    torch.manual_seed(0)
    made = LongitudinalLocal(Backbone(), hidden=256, projection=256, init="published")
    torch.manual_seed(0)
    default = LongitudinalLocal(Backbone(), hidden=256, projection=256)
    name = "backbone.network.conv_0.conv_1.conv.weight"
    own, other = (dict(strategy.named_parameters())[name] for strategy in (made, default))
    assert own.std().item() == pytest.approx((2 / 432) ** 0.5, rel=0.03)
    assert other.std().item() == pytest.approx((1 / (3 * 432)) ** 0.5, rel=0.03)
    linear = next(m for m in made.projectors.modules() if isinstance(m, torch.nn.Linear) and m.in_features == 256)
    assert linear.weight.std().item() == pytest.approx((2 / 256) ** 0.5, rel=0.03)
    norms = [m.weight for m in made.backbone.modules() if isinstance(m, torch.nn.BatchNorm3d)]
    scale = torch.cat(norms)
    assert scale.mean().item() == pytest.approx(1.0, abs=0.005)
    assert scale.std().item() == pytest.approx(0.02, rel=0.1)
    flat = [m for m in made.modules() if isinstance(m, torch.nn.BatchNorm1d) and m.affine]
    assert all((m.weight == 1).all() for m in flat)
