"""Alice's attention and objectives by loops, and the shortcut of the published residual."""

# ruff: noqa: F811

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from helpers import few
from small_invariance import BOTH, batch, draw, make, objective, terms  # noqa: F401
from torch import Tensor, nn

from lssl.correspondence.matchers import EmbeddingMatcher, FrameMatcher
from lssl.networks.heads import mean_and_max

# --- by loops ---------------------------------------------------------------------------------------------------------


def looked_up(attention: nn.Module, q: Tensor, rows: Tensor) -> Tensor:
    """One query ``(D,)`` among rows ``(N, D)``, head by head."""
    out, size = [], len(q) // attention.heads
    keys, values = attention.key_value(rows).chunk(2, 1)
    for head in range(attention.heads):
        part = slice(head * size, (head + 1) * size)
        share = (keys[:, part] @ q[part] / math.sqrt(size)).exp()
        out.append((share[:, None] * values[:, part]).sum(0) / share.sum())
    return attention.last(attention.zeta(attention.out(torch.cat(out))))


@pytest.mark.parametrize("condition", ["visible", "all"])
def test_values_by_loops_over_crops_and_features(batch, condition):
    strategy = make(condition=condition, teacher_temperature=(0.3, 0.3))  # a sharp one would hide what it is fed
    views = draw(strategy, batch)
    hidden = strategy.masking.draw(6, torch.Generator().manual_seed(1), "cpu")
    strategy.masking.draw = lambda *_: hidden
    found = strategy.eval().terms(*views, batch)
    images, teacher = torch.cat([view.image for view in views]), strategy.teacher
    net, slow = strategy.backbone.network, teacher["backbone"].network
    inter, intra, errors = [], [], []
    for crop in range(6):
        image, mask = images[crop : crop + 1], hidden[crop : crop + 1]
        other = images[(crop + 3) % 6][None]
        deep = net.deep(F.relu(net.down(torch.where(mask, 0.0, image))))
        up = net.up(F.relu(deep))
        whole, whole_other = (slow.deep(F.relu(slow.down(x))) for x in (image, other))
        shown = ~mask[0, 0, ::4, ::4, ::4].flatten()
        z = strategy.pooled_last(strategy.pooled(mean_and_max(deep, shown.view(1, 1, 4, 4, 4).float())))
        t = teacher["pooled_last"](teacher["pooled"](mean_and_max(whole_other)))
        inter.append(cross_entropy(z[0], t[0]))
        asking = deep.flatten(2)[0].T if condition == "all" else deep.flatten(2)[0].T[shown]
        assert len(asking) == (64 if condition == "all" else 16)
        content, target = strategy.phi(up.flatten(2)[0].T), teacher["psi"](whole.flatten(2)[0].T)
        answers = []
        for v in asking:
            q = strategy.query(strategy.psi(v[None])[0])
            s, t = looked_up(strategy.attention, q, content), looked_up(teacher["attention"], q, target)
            answers.append(cross_entropy(s, t))
        intra.append(sum(answers) / len(answers))
        restored = strategy.to_image(net.last(F.relu(up)))
        errors.append((restored - image)[mask].square().mean())
    assert found["inter"].item() == pytest.approx((sum(inter) / 6).item(), rel=1e-5)
    assert found["intra"].item() == pytest.approx((sum(intra) / 6).item(), rel=1e-5)
    assert found["reconstruction"].item() == pytest.approx((sum(errors) / 6).item(), rel=1e-5)


def cross_entropy(student: Tensor, teacher: Tensor) -> Tensor:
    return -((teacher / 0.3).softmax(0) * (student / 0.1).log_softmax(0)).sum()


def test_info_nce_by_loops(batch):
    """A crop among all others of other pairs; a feature among those of its own crop."""
    strategy = make(objective="info_nce", temperature=0.3).eval()
    seen = {}
    strategy.pooled.register_forward_hook(lambda *a: seen.update(z=a[2]))
    strategy.teacher["pooled"].register_forward_hook(lambda *a: seen.update(t=a[2]))
    strategy.attention.register_forward_hook(lambda *a: seen.update(s=a[2]))
    strategy.teacher["attention"].register_forward_hook(lambda *a: seen.update(w=a[2]))
    found = terms(strategy, batch)
    z, t, s, w = (F.normalize(seen[name].double(), dim=-1) / 0.3**0.5 for name in "ztsw")
    total = 0.0
    for i in range(6):
        keys = [(i + 3) % 6] + [j for j in range(6) if j % 3 != i % 3]
        total -= torch.log_softmax(torch.stack([z[i] @ t[j] for j in keys]), 0)[0].item()
    assert found["inter"].item() == pytest.approx(total / 6, rel=1e-5)
    total = 0.0
    for crop in range(6):
        logits = s[crop] @ w[crop].T
        both = [-torch.log_softmax(m, 1).diagonal().mean().item() for m in (logits, logits.T)]
        total += sum(both) / 2
    exclusion_off = make(objective="info_nce", temperature=0.3, exclusion=0.0).eval()
    assert terms(exclusion_off, batch)["intra"].item() == pytest.approx(total / 6, rel=1e-5)
    assert found["intra"].item() < total / 6  # near features are no negatives


# --- the shortcut of the residual -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", few(["info_nce", "dino"], 1))
def test_the_published_residual_lets_the_term_fall_without_the_backbone(make_batch, name):
    """A frozen random network, trained heads: with q added on both sides they agree on passing it on."""
    left = {}
    for residual in (True, False):
        only = {"inter": 0.0, "reconstruction": 0.0}
        strategy = make(residual=residual, loss_weights=only, momentum=0.9, **objective(name))
        strategy.backbone.requires_grad_(False)
        optimizer = torch.optim.AdamW([p for p in strategy.parameters() if p.requires_grad], lr=3e-3)
        values = []
        for step in range(60):
            batch = make_batch(3, (28, 26, 24), affine="same", seed=step)
            strategy.generator.manual_seed(step)
            value = strategy.terms(*strategy.draw_views(batch), batch)["intra"]
            values.append(value.item())
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
            strategy.on_step_end(step / 60)
        left[residual] = sum(values[-10:]) / 10
    print(name, left)
    assert left[True] < 0.6 * left[False]


def test_the_teachers_running_statistics_are_of_whole_crops(batch):
    """Copied from the online network, they would be those of images that are mostly 0."""
    strategy = make()
    for network in (strategy.backbone.network, strategy.teacher["backbone"].network):
        network.down = nn.Sequential(nn.BatchNorm3d(1, momentum=1.0, affine=False), network.down)
    views = draw(strategy, batch)
    strategy.terms(*views, batch)
    strategy.teacher._followed = tuple((name, getattr(strategy, name)) for name, _ in strategy.teacher._followed)
    strategy.on_step_end(0.5)
    own, seen = (net.network.down[0].running_mean for net in (strategy.teacher["backbone"], strategy.backbone))
    whole = torch.cat([view.image for view in views]).mean()
    assert own.item() == pytest.approx(whole.item(), rel=1e-5)
    assert seen.item() == pytest.approx(whole.item() / 4, rel=0.2)


def test_the_matcher_is_no_part_of_the_checkpoint(batch):
    network = nn.Conv3d(1, 1, 1)
    network.anatomical_maps = lambda image: []
    strategy = make(matcher=EmbeddingMatcher(network))
    assert set(strategy.state_dict()) == set(make().state_dict())
    assert isinstance(make().matched.matcher, FrameMatcher)


def test_resampled_copies_of_the_strategy_are_independent(batch):
    """A deep copy (as trainers and averaging make) steps its own teacher."""
    strategy = make()
    twin = copy.deepcopy(strategy)
    with torch.no_grad():
        for parameter in twin.backbone.parameters():
            parameter.add_(1.0)
    twin.on_step_end(0.0)
    before = make().teacher.state_dict()
    assert all(torch.equal(value, before[name]) for name, value in strategy.teacher.state_dict().items())
