"""Longitudinal local pretraining on a narrow network: what is switched on, symmetries, learning and refusals."""

# ruff: noqa: F811

from __future__ import annotations

import pytest
import torch
from helpers import few
from small_longitudinal import TERMS, backbone, batch, drawn, make, only, terms, views  # noqa: F401

from lssl.networks.backbone import Backbone
from lssl.strategies.longitudinal_local import LongitudinalLocal
from lssl.utils.errors import InputError

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


@pytest.mark.parametrize("objective", few(["info_nce", "cosine"], 1))
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
