"""Alice: what each side sees, how its terms behave, and what is refused."""

# ruff: noqa: F811

from __future__ import annotations

import pytest
import torch
from helpers import few
from small_invariance import BOTH, Autoencoder, batch, draw, make, objective, terms  # noqa: F401

from lssl.networks.backbone import Backbone
from lssl.strategies.anatomical_invariance import AnatomicalInvariance
from lssl.utils.errors import InputError
from lssl.views.sampler import ViewSampler

# --- what is seen -----------------------------------------------------------------------------------------------------


def test_the_online_network_sees_its_own_mask_and_the_teacher_the_whole(batch):
    strategy, seen = make(), {"online": [], "teacher": []}
    for name, network in (("online", strategy.backbone), ("teacher", strategy.teacher["backbone"])):
        network.network.down.register_forward_pre_hook(lambda _, args, name=name: seen[name].append(args[0]))
    views = draw(strategy, batch)
    strategy.terms(*views, batch)
    images = torch.cat([view.image for view in views])
    assert torch.equal(seen["teacher"][0], images)
    blocks = seen["online"][0].unfold(2, 4, 4).unfold(3, 4, 4).unfold(4, 4, 4).abs().sum((1, -1, -2, -3)).flatten(1)
    assert ((blocks == 0).sum(1) == 48).all()  # three quarters of 64, exactly
    assert len({tuple(row.tolist()) for row in blocks == 0}) == len(images)  # another mask for each crop
    shown = seen["online"][0] != 0
    assert torch.equal(seen["online"][0][shown], images[shown])


def test_the_teacher_runs_no_decoder_and_without_voxel_terms_nobody_does(batch):
    strategy, ran = make(), []
    strategy.teacher["backbone"].network.up.register_forward_hook(lambda *_: ran.append("teacher"))
    terms(strategy, batch)
    assert ran == []
    strategy = make(loss_weights={"intra": 0.0, "reconstruction": 0.0})
    strategy.backbone.network.up.register_forward_hook(lambda *_: ran.append("online"))
    assert set(terms(strategy, batch)) == {"inter"}
    assert ran == []
    assert not any(parameter.requires_grad for parameter in strategy.backbone.network.up.parameters())


@BOTH
def test_no_gradient_reaches_the_teacher_and_every_trained_parameter_has_one(batch, name):
    strategy = make(**objective(name))
    sum(terms(strategy, batch).values()).backward()
    for parameter in strategy.teacher.parameters():
        assert not parameter.requires_grad
        assert parameter.grad is None
    for key, parameter in strategy.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, key
            assert parameter.grad.abs().max() > 0, key
    followed = {"backbone", "pooled", "pooled_last", "psi", "attention"}
    assert set(strategy.teacher) == followed  # keys, values and ζ among them; not φ, nor the query


@BOTH
def test_the_teachers_answer_is_a_constant_for_the_query(batch, name):
    """The same q asks both sides; through the teacher's it learns nothing."""
    strategy = make(loss_weights={"inter": 0.0, "reconstruction": 0.0}, **objective(name))
    asked = []
    strategy.teacher["attention"].register_forward_hook(lambda module, args, output: asked.append((args[0], output)))
    terms(strategy, batch)
    (query, answer), *_ = asked
    assert query.requires_grad
    assert not answer.requires_grad


# --- behaviour --------------------------------------------------------------------------------------------------------


@BOTH
def test_swapping_the_pair_changes_nothing(batch, name):
    one, two = terms(make(**objective(name)), batch), terms(make(**objective(name)), batch, swap=True)
    for key, value in one.items():
        assert value.item() == pytest.approx(two[key].item(), rel=1e-5), key


def test_the_other_volume_matters_to_inter_alone(batch):
    """Crossed: another key changes the query's pooled target, and nothing within the query."""
    strategy = make().eval()
    first, second = draw(strategy, batch)
    hidden = strategy.masking.draw(6, torch.Generator().manual_seed(1), "cpu")
    strategy.masking.draw = lambda *_: hidden
    calls = []
    strategy._compare = lambda term, student, teacher, _=None: (
        calls.append((student.detach(), teacher)) or student.sum()
    )
    strategy.terms(first, second, batch)
    second.image = second.image.flip(2)
    strategy.terms(first, second, batch)
    (z, t), (s, w), (z2, t2), (s2, w2) = calls
    assert torch.equal(z[:3], z2[:3])
    assert torch.equal(t[3:], t2[3:])  # the target of the key is the query's
    assert not torch.allclose(t[:3], t2[:3])
    assert torch.equal(s[:3], s2[:3])
    assert torch.equal(w[:3], w2[:3])


@pytest.mark.parametrize(
    ("term", "name"),
    few(
        [
            ("inter", "dino"),
            ("intra", "info_nce"),
            ("inter", "info_nce"),
            ("intra", "dino"),
            ("reconstruction", "dino"),
            ("reconstruction", "info_nce"),
        ],
        2,
    ),
)
def test_each_term_falls_on_one_batch(batch, term, name):
    """InfoNCE with a teacher that follows, as at first it answers all queries alike."""
    only = {other: float(other == term) for other in AnatomicalInvariance.LOSS_WEIGHTS}
    strategy = make(loss_weights=only, momentum=0.9, norm="batch", **objective(name))
    optimizer = torch.optim.Adam([p for p in strategy.parameters() if p.requires_grad], lr=3e-3)
    values = []
    for _ in range(100):
        value = terms(strategy, batch)[term]
        values.append(value.item())
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        if name == "info_nce":
            strategy.on_step_end(0.0)
    assert values[-1] < 0.85 * values[0]


def test_reconstruction_of_the_hidden_voxels_or_of_all(batch):
    for kind, share in (("masked", 0.0), ("full", 1.0)):
        strategy = make(loss_weights={"inter": 0.0, "intra": 0.0}, reconstruct=kind)
        made = []
        strategy.to_image.register_forward_hook(lambda *a, made=made: made.append(a[2]))
        first, second = draw(strategy, batch)
        hidden = strategy.masking.draw(6, torch.Generator().manual_seed(1), "cpu")
        strategy.masking.draw = lambda *_, hidden=hidden: hidden
        value = strategy.terms(first, second, batch)["reconstruction"]
        (gradient,) = torch.autograd.grad(value, made)
        assert (gradient[~hidden] != 0).float().mean() == pytest.approx(share, abs=0.01)
        if kind == "full":
            error = (made[0] - torch.cat([first.image, second.image])).square().mean()
            assert value.item() == pytest.approx(error.item(), rel=1e-5)


def test_pictures_show_what_was_hidden(batch):
    strategy = make()
    view, _ = draw(strategy, batch)
    seen, made = strategy.show_reconstruction(view)
    shown = seen != 0
    assert shown.float().mean() == pytest.approx(0.25, abs=0.01)
    assert torch.equal(seen[shown], view.image[shown])
    features = strategy.backbone(seen, output=True)["output"]
    assert torch.equal(made, strategy.to_image(features))
    assert make(loss_weights={"reconstruction": 0.0}).show_reconstruction(view) is None


def test_centres_move_in_training_only_and_temperatures_with_the_steps(batch):
    strategy = make(teacher_temperature=(0.02, 0.04), teacher_warmup=0.5)
    losses = strategy.objective.inter, strategy.objective.intra
    terms(strategy.eval(), batch)
    strategy.on_step_end(0.1)
    assert all(loss.centre.abs().max() == 0 for loss in losses)
    terms(strategy.train(), batch)
    assert all(loss.centre.abs().max() == 0 for loss in losses)  # accumulated batches are centred alike
    strategy.on_step_end(0.25)
    assert all(loss.centre.abs().max() > 0 for loss in losses)
    assert all(
        loss.temperature.item() == pytest.approx(0.03) for loss in (strategy.objective.inter, strategy.objective.intra)
    )
    saved = strategy.state_dict()
    for term in ("inter", "intra"):
        assert {f"objective.{term}.centre", f"objective.{term}.temperature"} <= saved.keys()


def test_losses_are_float32_under_autocast(batch):
    strategy = make()
    exact = terms(strategy.eval(), batch)
    with torch.autocast("cpu", torch.bfloat16):
        found = terms(strategy, batch)
    for name, value in found.items():
        assert value.dtype == torch.float32
        assert value.item() == pytest.approx(exact[name].item(), rel=0.1)


def test_the_log_has_matches_prototypes_and_spread(batch):
    strategy = make()
    terms(strategy, batch)
    rates = {f"match/{name}" for name in ("accepted", "best", "same_visit", "score", "other_subject")}
    assert rates | {"feature_std"} <= strategy.logged.keys()
    for term in ("inter", "intra"):
        assert 1 <= strategy.logged[f"{term}/prototypes"] <= 12
        assert 0 <= strategy.logged[f"{term}/agreement"] <= 1
    assert not [name for name in make(objective="info_nce").state_dict() if "centre" in name]


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_settings_that_cannot_be_are_refused(batch, make_batch):
    with pytest.raises(InputError, match="do not divide"):
        make(heads=3)
    with pytest.raises(InputError, match="hides none or all"):
        make(mask_ratio=1.0)
    with pytest.raises(InputError, match="no tap 'deeper'"):
        AnatomicalInvariance(Backbone(Autoencoder(), {"encoder": "deep"}), "deeper", views=ViewSampler(16))
    with pytest.raises(InputError, match="no term 'contrast'"):
        make(loss_weights={"contrast": 1.0})
    idle = make(loss_weights=dict.fromkeys(AnatomicalInvariance.LOSS_WEIGHTS, 0.0))
    with pytest.raises(InputError, match="every term has weight 0"):
        idle._step(batch)
    with pytest.raises(InputError, match="batch_size to 2"):
        terms(make(objective="info_nce"), make_batch(1, (28, 26, 24), affine="same"))


@pytest.mark.parametrize("pool", ["mean", "mean_and_max"])
def test_what_is_pooled(pool, batch):
    """Means by hand, over the visible cells for the network; the maximum only where it is asked for."""
    strategy = make(pool=pool)
    features, seen = torch.randn(3, 6, 4, 4, 4), (torch.rand(3, 1, 4, 4, 4) > 0.5).float()
    pooled = strategy._pool(features, seen)
    mean = torch.stack([f[:, s[0] > 0].mean(1) for f, s in zip(features, seen, strict=True)])
    torch.testing.assert_close(pooled[:, :6], mean, rtol=1e-3, atol=1e-4)
    assert pooled.shape[1] == strategy.pooled[0].in_features == (6 if pool == "mean" else 12)
    assert terms(strategy, batch)["inter"].isfinite()
