"""What every strategy inherits: seeding, weighting, pooling, precision."""

import pytest
import torch
from torch import nn

from lssl import Backbone, InputError, Strategy, ViewSampler


class Mean(Strategy):
    """Pulls the output's mean to one: the smallest strategy."""

    def terms(self, first, second, batch):
        return {"mean": (self.backbone(first.image, ["a"])["a"].mean() - 1) ** 2}


def make(network=None, size=8, **options):
    network = network or nn.Sequential(nn.Conv3d(1, 4, 3, padding=1), nn.InstanceNorm3d(4, affine=True), nn.ReLU())
    return Mean(Backbone(network, {"a": "1"}), views=ViewSampler(size), **options)


def test_embedding_survives_instance_norm(make_batch):
    """The mean over a whole view is 0 after instance norm, whatever the image; the embedding must tell them apart."""
    strategy = make()
    first, _ = strategy.views.centred(make_batch(2, (8, 8, 8), affine="unit"))
    features = strategy.backbone(first.image, ["a"])["a"]
    assert features.mean((2, 3, 4)).abs().max() < 1e-5
    embedding = strategy.embed(first)["a"]
    assert embedding.shape == (2, 8)
    assert (embedding[0] - embedding[1]).abs().max() > 0.05


def test_embedding_pools_over_the_foreground_only(make_batch):
    strategy = make()
    batch = make_batch(1, (8, 8, 8), affine="unit")
    batch.foreground[..., :4] = False
    first, _ = strategy.views.centred(batch)
    features = strategy.backbone(first.image, ["a"])["a"][..., 4:]
    expected = torch.cat([features.mean((2, 3, 4)), features.amax((2, 3, 4))], 1)
    torch.testing.assert_close(strategy.embed(first)["a"], expected, atol=1e-4, rtol=1e-4)


def test_draws_depend_on_seed_stage_and_step_alone(monkeypatch):
    monkeypatch.setattr(Strategy, "global_rank", 0)
    strategy = make()

    def draw(*key):
        strategy.seed(*key)
        return torch.rand(3, generator=strategy.generator).tolist()

    torch.manual_seed(1)
    one = draw("fit", 5)
    torch.rand(10)
    assert draw("fit", 5) == one
    others = [draw("fit", 6), draw("val", 5), draw("fit", 5, 1)]
    monkeypatch.setattr(Strategy, "global_rank", 1)
    others.append(draw("fit", 5))
    torch.manual_seed(2)
    others.append(draw("fit", 5))
    assert len({tuple(values) for values in [one, *others]}) == 6


def test_loss_is_the_weighted_sum(make_batch, monkeypatch):
    monkeypatch.setattr(Strategy, "global_rank", 0)
    strategy = make(loss_weights={"mean": 3.0})
    strategy.seed("fit", 0)
    loss, terms = strategy._step(make_batch(2, (10, 10, 10)))
    torch.testing.assert_close(loss, 3 * terms["mean"])
    strategy.loss_weights = {"meen": 1.0}
    with pytest.raises(InputError, match="Mean has no term 'meen'; it has mean"):
        strategy._step(make_batch(2, (10, 10, 10)))


def test_no_decay_on_biases_and_norms(monkeypatch):
    strategy = make(schedule=None)
    monkeypatch.setattr(Strategy, "trainer", None)
    decayed, free = strategy.configure_optimizers().param_groups
    assert all(parameter.ndim > 1 for parameter in decayed["params"])
    assert all(parameter.ndim == 1 for parameter in free["params"])
    assert (decayed["weight_decay"], free["weight_decay"]) == (0.01, 0.0)
    assert len(decayed["params"]) + len(free["params"]) == len(list(strategy.parameters()))
