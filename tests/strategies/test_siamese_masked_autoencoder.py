"""Siamese masked autoencoder (STAMP): its terms by hand, what may leak, where gradients go, and that time is used."""

from __future__ import annotations

import dataclasses

import planted
import pytest
import torch
from torch import Tensor, distributions

from lssl.networks.heads import mean_and_max
from lssl.strategies.siamese_masked_autoencoder import SiameseMaskedAutoencoder
from lssl.utils.errors import InputError
from lssl.views.sampler import View

NAN = float("nan")
TIMES = [[0.0, 2.0], [3.0, 1.5], [0.0, NAN], [1.0, 1.0]]
EARLIER = [0, 1, 0, 0]  # view of each pair that shows the earlier visit


def make(**options) -> SiameseMaskedAutoencoder:
    small = {"block": 4, "width": 24, "depth": 2, "heads": 2, "variables": 3, "categories": 4, "views": planted.views()}
    return SiameseMaskedAutoencoder(planted.backbone(), "deep", **{**small, **options}).eval()


def drawn(strategy: SiameseMaskedAutoencoder) -> tuple[View, View]:
    batch = dataclasses.replace(planted.planted(len(TIMES), 0), times=torch.tensor(TIMES))
    views = strategy.views(batch, strategy.generator)
    return tuple(dataclasses.replace(view, clean=view.image + 0.1) for view in views)


def terms(strategy: SiameseMaskedAutoencoder, first: View, second: View) -> dict[str, Tensor]:
    strategy.generator.manual_seed(3)
    return strategy.terms(first, second, None)


def hidden(strategy: SiameseMaskedAutoencoder) -> Tensor:
    """The masks that :func:`terms` draws first."""
    return strategy.masking.draw(len(TIMES), strategy.generator.manual_seed(3), "cpu")


def test_terms_by_hand():
    """Pair by pair; categories by torch's own distributions."""
    strategy = make(free=0.002)
    views = drawn(strategy)
    found = terms(strategy, *views)
    masks = hidden(strategy)
    uniform = torch.rand(len(TIMES), 3, 4, generator=strategy.generator)
    losses, divergences = [], []
    for n, (times, mask) in enumerate(zip(TIMES, masks, strict=True)):
        if n == 2:  # unknown interval
            continue
        earlier, later = (views[k] for k in (EARLIER[n], 1 - EARLIER[n]))
        years = torch.tensor([abs(times[1] - times[0])])
        past, future = (
            strategy.backbone(image[None], ["deep"])["deep"]
            for image in (earlier.image[n], later.image[n].masked_fill(mask, 0))
        )
        now, then = (
            strategy.norm(torch.cat([maps.mean((2, 3, 4)), maps.amax((2, 3, 4))], 1)) for maps in (past, future)
        )
        now = now + strategy.time(years)
        logits = strategy.posterior(torch.cat([now, then], 1)).view(3, 4)
        q, p = (
            distributions.Independent(distributions.OneHotCategorical(logits=row), 1)
            for row in (logits, strategy.prior(now).view(3, 4))
        )
        divergences.append(max(distributions.kl_divergence(q, p).item(), 0.002))
        z = torch.zeros(3, 4)
        for variable in range(3):
            z[variable, (logits[variable] - (-uniform[n, variable].log()).log()).argmax()] = 1
        made = strategy.decoder(torch.cat([past, future]), now, z.view(1, -1), years)[0]
        losses.append((made - later.clean[n])[mask].square().mean().item())
    assert found["reconstruction"].item() == pytest.approx(sum(losses) / 3, rel=1e-4)
    assert found["divergence"].item() == pytest.approx(sum(divergences) / 3, rel=1e-3)
    assert strategy.logged["skipped"].item() == 0.25


def test_the_order_of_presentation_does_not_matter():
    strategy = make()
    first, second = drawn(strategy)
    for view in (first, second):
        view.time[3] = NAN  # of one time: either visit may be the masked one
    one, other = terms(strategy, first, second), terms(strategy, second, first)
    for name in one:
        assert one[name].item() == pytest.approx(other[name].item(), rel=1e-5)


def test_masked_voxels_of_the_later_visit_reach_nothing_and_all_else_does():
    strategy = make(free=0.0)
    first, second = drawn(strategy)
    leaves = [view.image.clone().requires_grad_() for view in (first, second)]
    views = [dataclasses.replace(view, image=leaf) for view, leaf in zip((first, second), leaves, strict=True)]
    masks = hidden(strategy)
    sum(terms(strategy, *views).values()).backward()
    for n, mask in enumerate(masks):
        earlier, later = (leaves[k].grad[n] for k in (EARLIER[n], 1 - EARLIER[n]))
        assert not later[mask].any()
        assert bool(later[~mask].any()) == bool(earlier[mask].any()) == (n != 2)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in strategy.parameters() if p.requires_grad)


def test_the_loss_is_of_masked_voxels_of_the_later_visit_alone():
    strategy = make()
    first, second = drawn(strategy)
    before, masks = terms(strategy, first, second)["reconstruction"].item(), hidden(strategy)
    for n, mask in enumerate(masks):
        (first, second)[EARLIER[n]].clean[n] += 9
        (first, second)[1 - EARLIER[n]].clean[n][~mask] += 9
    assert terms(strategy, first, second)["reconstruction"].item() == pytest.approx(before, rel=1e-6)
    second.clean[0][masks[0]] += 9
    assert terms(strategy, first, second)["reconstruction"].item() > before + 1


def test_the_divergence_moves_the_prior_more_than_the_posterior():
    """β of it to the posterior, the rest to the prior; none below ε."""
    draw = torch.Generator().manual_seed(0)
    posterior, prior = (torch.randn(2, 3, 4, generator=draw).requires_grad_() for _ in range(2))
    strategy = make(free=0.0)
    plain = [distributions.OneHotCategorical(logits=logits) for logits in (posterior, prior)]
    wanted = torch.autograd.grad(distributions.kl_divergence(*plain).sum(), (posterior, prior))
    found = torch.autograd.grad(strategy.divergence(posterior, prior).sum(), (posterior, prior))
    torch.testing.assert_close(found[0], 0.2 * wanted[0])
    torch.testing.assert_close(found[1], 0.8 * wanted[1])
    strategy.free = 100.0
    assert not any(
        value.any() for value in torch.autograd.grad(strategy.divergence(posterior, prior).sum(), (posterior, prior))
    )


def test_drawn_categories_follow_the_posterior_and_pass_its_gradient():
    strategy = make()
    logits = torch.tensor([2.0, 0.0, -1.0, 0.5]).log_softmax(0).repeat(4000, 3, 1).requires_grad_()
    z = strategy.draw(logits)
    assert z.detach().round().sum(-1).eq(1).all()
    torch.testing.assert_close(z.mean((0, 1)), logits.exp().mean((0, 1)), atol=0.02, rtol=0)
    weight = torch.tensor([1.0, -2.0, 3.0, 0.0])
    (found,) = torch.autograd.grad((z * weight).sum(), logits)
    (wanted,) = torch.autograd.grad((logits.softmax(-1) * weight).sum(), logits)
    torch.testing.assert_close(found, wanted)


def test_the_time_is_told_to_prior_posterior_and_decoder():
    strategy = make()
    first, second = drawn(strategy)
    features = strategy.features(first.image, second.image, hidden(strategy))
    years, past = torch.tensor([0.5, 1.0, 2.0, 4.0]), strategy.norm(mean_and_max(features[:4]))
    now, other = past + strategy.time(years), past + strategy.time(years + 1)
    assert (strategy.foreseen(now) - strategy.foreseen(other)).abs().amax((1, 2)).min() > 1e-3
    z = strategy.draw(strategy.foreseen(now)).flatten(1)
    made, later = (strategy.decoder(features, now, z, time) for time in (years, years + 1))
    assert (made - later).abs().amax((1, 2, 3, 4)).min() > 1e-4


def halves(views: tuple[View, View], draw: torch.Generator) -> tuple[View, View]:
    """One half is empty, the other one's brightness is the subject's own and grows with time."""
    count, years = len(views[0].image), 4 * torch.rand(len(views[0].image), generator=draw)
    own, made = torch.rand(count, generator=draw), []
    for view, time in zip(views, (torch.zeros(count), years), strict=True):
        image = torch.zeros_like(view.image)
        image[..., 6:] = (own + 0.5 * time)[:, None, None, None, None]
        made.append(dataclasses.replace(view, image=image, clean=image.clone(), time=time))
    return made[0], made[1]


@pytest.mark.slow
def test_what_only_the_time_tells_is_rebuilt():
    """The empty half is visible or the other one is masked; with other times, the wrong brightness is rebuilt."""
    strategy = make(block=(12, 12, 6), mask_ratio=0.5).train()
    views, draw = strategy.views(planted.planted(32, 0), strategy.generator), torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(strategy.parameters(), lr=3e-3)
    for _ in range(200):
        optimizer.zero_grad()
        strategy.total(strategy.terms(*halves(views, draw), None)).backward()
        optimizer.step()
    strategy.eval()
    first, second = halves(views, draw)
    with torch.no_grad():
        right = terms(strategy, first, second)["reconstruction"].item()
        wrong = terms(strategy, first, dataclasses.replace(second, time=second.time.flip(0)))["reconstruction"].item()
    variance = second.clean[..., 6:].var().item() / 2  # of the masked half, in every second view
    assert right < 0.25 * variance
    assert wrong > 4 * right


@pytest.mark.parametrize(
    ("options", "says"),
    [({"heads": 5}, "heads of the decoder"), ({"balance": 2.0}, "share"), ({"free": -1.0}, "0 or more")],
)
def test_mistakes_are_one_sentence(options, says):
    with pytest.raises(InputError, match=says):
        make(**options)
