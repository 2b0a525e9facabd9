"""What strategies with an autoencoder share: random order of visits, terms that can be switched off."""

from __future__ import annotations

import planted
import pytest

from lssl.strategies.latent_direction import LatentDirection
from lssl.strategies.neighbourhood_embedding import NeighbourhoodEmbedding
from lssl.timed_strategy import LatentStrategy
from lssl.utils.intervals import signed_interval

BOTH = pytest.mark.parametrize("method", [LatentDirection, NeighbourhoodEmbedding])


def make(method: type[LatentStrategy], **options) -> LatentStrategy:
    return method(planted.backbone(), "deep", latent=16, hidden=32, views=planted.views(), **options)


@BOTH
def test_the_order_of_presentation_does_not_matter_and_is_random(method):
    strategy, batch = make(method).eval(), planted.planted(40, 0)
    first, second = strategy.draw_views(batch)
    years, _ = signed_interval(first.time, second.time)
    assert 8 < (years > 0).sum() < 32
    one, other = strategy.terms(first, second, batch), strategy.terms(second, first, batch)
    assert all(one[name].item() == pytest.approx(other[name].item(), rel=1e-4) for name in one)


@BOTH
@pytest.mark.parametrize("used", [("reconstruction",), ("direction",), ("reconstruction", "direction")])
def test_terms_in_use_reach_every_trained_parameter(method, used):
    """Else distributed training would wait for it."""
    strategy = make(method, loss_weights={name: float(name in used) for name in method.LOSS_WEIGHTS})
    terms = strategy.losses(planted.planted(4, 0))
    assert terms.keys() == {*used}
    strategy.total(terms).backward()
    assert all(p.grad is not None for p in strategy.parameters() if p.requires_grad)
    assert strategy.backbone.network[0].weight.grad.abs().max() > 0
    shown = strategy.show_reconstruction(strategy.views.centred(planted.planted(1, 0))[0])
    assert (shown is None) == ("reconstruction" not in used)
