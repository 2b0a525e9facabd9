"""Alice: what each side sees, the attention by loops, both objectives, and the shortcut of the published residual."""

from __future__ import annotations

import copy
import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lssl.correspondence.matchers import EmbeddingMatcher, FrameMatcher
from lssl.networks.backbone import Backbone
from lssl.networks.heads import mean_and_max
from lssl.strategies.anatomical_invariance import DINO, Alignment, AnatomicalInvariance, InfoNCE, Matching
from lssl.utils.errors import InputError
from lssl.views.sampler import ViewSampler

NARROW = {"hidden": 16, "projection": 8, "block": 4, "norm": "layer"}
OBJECTIVES = {"dino": DINO, "info_nce": InfoNCE}
PARTS = {  # name of a part → what of make()'s options is its own
    "matching": ("matcher", "other_subject", "tries", "accept", "min_score"),
    "alignment": ("condition", "residual", "heads"),
    "objective": ("prototypes", "temperature", "teacher_temperature", "teacher_warmup", "centre_momentum", "exclusion"),
}


class Autoencoder(nn.Module):
    """Two strided convolutions, and two transposed ones back."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Conv3d(1, 4, 2, stride=2)
        self.deep = nn.Conv3d(4, 6, 2, stride=2)
        self.up = nn.ConvTranspose3d(6, 5, 2, stride=2)
        self.last = nn.ConvTranspose3d(5, 3, 2, stride=2)

    def forward(self, image: Tensor) -> Tensor:
        return self.last(F.relu(self.up(F.relu(self.deep(F.relu(self.down(image)))))))


def make(objective: str = "dino", **options) -> AnatomicalInvariance:
    torch.manual_seed(0)
    backbone = Backbone(Autoencoder(), {"encoder": "deep", "decoder": "up"})
    views = ViewSampler(16, overlap=0.7, transforms=[])
    own = {part: {name: options.pop(name) for name in names if name in options} for part, names in PARTS.items()}
    kind = partial(OBJECTIVES[objective], **({"prototypes": 12} if objective == "dino" else {}), **own["objective"])
    parts = {"matching": Matching(**own["matching"]), "alignment": Alignment(**{"heads": 2, **own["alignment"]})}
    options = {**NARROW, **parts, "objective": kind, **options}
    strategy = AnatomicalInvariance(backbone, "encoder", "decoder", views=views, **options)
    with torch.no_grad():  # else the teacher would start equal to the network
        for parameter in strategy.teacher.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    return strategy


def draw(strategy: AnatomicalInvariance, batch):
    strategy.generator.manual_seed(0)
    return strategy.draw_views(batch)


def terms(strategy: AnatomicalInvariance, batch, swap: bool = False) -> dict[str, Tensor]:
    """Terms of fixed views and masks; swapped, both change places."""
    first, second = draw(strategy, batch)
    hidden = strategy.masking.draw(2 * len(batch), torch.Generator().manual_seed(1), "cpu")
    views = (second, first) if swap else (first, second)
    hidden = torch.cat(hidden.chunk(2)[::-1]) if swap else hidden
    strategy.masking.draw = lambda *_: hidden
    return strategy.terms(*views, batch)


@pytest.fixture(scope="module")
def batch(make_batch):
    return make_batch(3, (28, 26, 24), affine="same")


def objective(name: str) -> dict:
    return {"objective": name}


BOTH = pytest.mark.parametrize("name", ["dino", "info_nce"])

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


# --- by loops ---------------------------------------------------------------------------------------------------------


def looked_up(attention: nn.Module, q: Tensor, rows: Tensor) -> Tensor:
    """One query ``(D,)`` among rows ``(N, D)``, head by head."""
    out, size = [], len(q) // attention.heads
    keys, values = attention.key(rows), attention.value(rows)
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


@pytest.mark.parametrize("term", ["inter", "intra", "reconstruction"])
@BOTH
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


# --- the shortcut of the residual -------------------------------------------------------------------------------------


@BOTH
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
