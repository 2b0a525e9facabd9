"""Prior-guided local pretraining on tiny networks, against loops over voxels, 4×4 matrices and scipy in float64."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.ndimage import map_coordinates
from torch import Tensor, nn

from lssl.data.batch import PairBatch
from lssl.networks.backbone import Backbone
from lssl.networks.heads import Projector, voxelwise
from lssl.strategies.prior_guided_local import Cosine, InfoNCE, PriorGuidedLocal, VICReg
from lssl.utils.errors import InputError
from lssl.views import geometry as geo
from lssl.views.sampler import View, ViewSampler

OBJECTIVES = {"cosine": Cosine, "info_nce": InfoNCE, "vicreg": VICReg}
SIZE = (32, 28, 24)
SOURCE = (36, 34, 32)
TAPS = {"fine": (2, 0.0), "bottleneck": (4, 1.0)}  # stride and offset: a padded 3×3×3 kernel, then a 2×2×2 one


def network() -> nn.Module:
    encoder = [nn.Conv3d(1, 5, 3, 2, 1), nn.LeakyReLU(), nn.Conv3d(5, 6, 2, 2)]
    return nn.Sequential(*encoder, nn.InstanceNorm3d(6), nn.ConvTranspose3d(6, 2, 4, 4))


def sampler(**settings) -> ViewSampler:
    settings = {"transforms": [], "affine_probability": 1.0, "zoom": (0.8, 1.3), "rotation": 15.0, **settings}
    return ViewSampler(SIZE, **{"flip": (0.5, 0.5, 0.5), "flip_together": False, "overlap": 0.4, **settings})


def make(views: ViewSampler | None = None, objective: str = "cosine", **settings) -> PriorGuidedLocal:
    """Its teacher differs from the online network, so that one cannot stand for the other."""
    torch.manual_seed(0)
    backbone = Backbone(network(), {"fine": "0", "bottleneck": "2"})
    narrow = {"hidden": 12, "projection": 7, "norm": "layer", "min_points": 1, "samples": 16}
    own = {name: settings.pop(name) for name in ("temperature", "exclusion") if name in settings}
    settings = {**narrow, **settings, "objective": partial(OBJECTIVES[objective], **own)}
    strategy = PriorGuidedLocal(backbone, views=views or sampler(), **settings)
    if strategy.teacher is not None:
        with torch.no_grad():
            for parameter in strategy.teacher.parameters():
                parameter += 0.2 * torch.randn_like(parameter)
    return strategy


@pytest.fixture
def batch(make_batch) -> PairBatch:
    """Two pairs whose foreground is a box and whose sources end before their arrays do."""
    batch = make_batch(2, SOURCE)
    batch.foreground[:, :, :, :6] = False
    batch.foreground[1, 1, 28:] = False
    batch.extent[1, 0] = torch.tensor((34, 30, 32))
    return batch


def draw(strategy: PriorGuidedLocal, batch: PairBatch) -> tuple[View, View]:
    strategy.generator.manual_seed(0)
    return strategy.views(batch, strategy.generator)


def terms(strategy: PriorGuidedLocal, batch: PairBatch, views: tuple[View, View] | None = None) -> dict[str, Tensor]:
    first, second = views or draw(strategy, batch)
    strategy.generator.manual_seed(1)
    return strategy.terms(first, second, batch)


def key(strategy: PriorGuidedLocal, tap: str) -> str:
    """Heads are named after their taps somehow, and stand in their order."""
    return list(strategy.projectors.heads)[list(strategy.tap_weights).index(tap)]


# --- by hand ----------------------------------------------------------------------------------------------------------


class ByHand:
    """One direction of one tap for one sample, in float64: Ω, and projections of this view and of the other there."""

    def __init__(self, strategy: PriorGuidedLocal, tap: str, view: View, other: View, b: int, border: float = 0.0):
        self.strategy, self.tap, self.key = copy.deepcopy(strategy).double(), tap, key(strategy, tap)
        stride, offset = TAPS[tap]
        shift = np.array([[stride, 0, 0, offset], [0, stride, 0, offset], [0, 0, stride, offset], [0, 0, 0, 1.0]])
        g1, g2 = (v.affine[b].numpy() @ shift for v in (view, other))
        back = np.linalg.inv(g2)
        self.online = self.projected(self.strategy.backbone, self.strategy.projectors.heads, view.image[b])
        whose = self.strategy.teacher
        if whose is None:
            target = self.projected(self.strategy.backbone, self.strategy.projectors.heads, other.image[b])
        else:
            target = self.projected(whose["backbone"], whose["projectors"].heads, other.image[b])
        size, theirs = self.online.shape[1:], target.shape[1:]
        self.voxels, self.places, at = [], [], []
        for index in itertools.product(*map(range, size)):
            place = g1 @ [*index, 1]
            there = (back @ place)[:3]
            if (
                all(border <= i <= n - 1 - border for i, n in zip(index, size, strict=True))
                and all(border <= i <= n - 1 - border for i, n in zip(there, theirs, strict=True))
                and self.contains(view, b, place, strategy.foreground)
                and self.contains(other, b, place, strategy.foreground)
            ):
                self.voxels.append(index)
                self.places.append(place[:3])
                at.append(there)
        self.q = np.array([self.online[:, i, j, k] for i, j, k in self.voxels])
        self.t = np.stack([map_coordinates(c, np.array(at).T, order=1) for c in target], 1) if at else None

    def projected(self, backbone: Backbone, heads: nn.ModuleDict, image: Tensor) -> np.ndarray:
        """``(D, d, h, w)``: the head on every voxel's features, one after the other."""
        layers = list(backbone.network)[: 1 if self.tap == "fine" else 3]
        with torch.no_grad():
            found = nn.Sequential(*layers)(image[None].double())[0]
            out = np.empty((7, *found.shape[1:]))
            for i, j, k in itertools.product(*map(range, found.shape[1:])):
                out[:, i, j, k] = heads[self.key](found[None, :, i, j, k])[0].numpy()
        return out

    def predicted(self) -> np.ndarray:
        with torch.no_grad():
            return self.strategy.predictors.heads[self.key](torch.from_numpy(self.q)).numpy()

    @staticmethod
    def contains(view: View, b: int, place: np.ndarray, foreground: bool) -> bool:
        own = (np.linalg.inv(view.affine[b].numpy()) @ place)[:3]
        source = (np.linalg.inv(view.source_affine[b].numpy()) @ place)[:3]
        if not all(-0.5 <= i <= n - 0.5 for i, n in zip(own, view.size, strict=True)):
            return False
        if not all(0 <= i <= n - 1 for i, n in zip(source, view.source_extent[b].tolist(), strict=True)):
            return False
        return not foreground or view.source_foreground[b][tuple(int(i) for i in source.round())].item()


def directions(strategy, tap: str, first: View, second: View, border: float = 0.0) -> list[list[ByHand]]:
    """Both directions, each with its samples."""
    both = (first, second), (second, first)
    return [[ByHand(strategy, tap, *views, b, border) for b in range(len(first.image))] for views in both]


def flat(sides: list[list[ByHand]]) -> list[ByHand]:
    return [side for samples in sides for side in samples]


def cosine_by_hand(side: ByHand) -> float:
    p, t = side.predicted(), side.t
    return float(np.mean([2 - 2 * x @ y / np.linalg.norm(x) / np.linalg.norm(y) for x, y in zip(p, t, strict=True)]))


def distance_by_hand(side: ByHand) -> float:
    return float(np.mean((side.q - side.t) ** 2))


BY_HAND = {"cosine": cosine_by_hand, "vicreg": distance_by_hand}


@pytest.mark.parametrize("foreground", [True, False])
@pytest.mark.parametrize("tap", TAPS)
@pytest.mark.parametrize("objective", ["cosine", "vicreg"])
def test_similarity_by_hand(batch, objective: str, tap: str, foreground: bool):
    strategy = make(objective=objective, taps=[tap], foreground=foreground)
    found = terms(strategy, batch)["similarity"]
    sides = directions(strategy, tap, *draw(strategy, batch))
    counts = [len(side.voxels) for side in flat(sides)]
    assert 0 < min(counts) < max(counts) < side_voxels(tap)
    expected = np.mean([np.mean([BY_HAND[objective](side) for side in samples]) for samples in sides])
    assert found.item() == pytest.approx(expected, rel=1e-4)


def side_voxels(tap: str) -> int:
    return int(np.prod([n // TAPS[tap][0] for n in SIZE]))


@pytest.fixture
def seen() -> Callable[[nn.Module], list]:
    """Arguments of every call of a module."""

    def watch(module: nn.Module) -> list:
        calls: list = []
        module.register_forward_pre_hook(lambda _, args: calls.append(args))
        return calls

    return watch


def as_voxels(side: ByHand, places: Tensor) -> list[int]:
    """Row of Ω that each place is."""
    known = {tuple(np.round(place, 4)): row for row, place in enumerate(side.places)}
    return [known[tuple(np.round(place, 4))] for place in places.double().numpy()]


@pytest.mark.parametrize("exclusion", [3.0, 12.0])
def test_info_nce_by_hand(batch, seen, exclusion: float):
    """As many draws as voxels, hence each of Ω as often as any other, or once more."""
    strategy = make(objective="info_nce", samples=10_000, exclusion=exclusion, temperature=0.2)
    calls = seen(strategy.objective.loss)
    found = terms(strategy, batch)["similarity"]
    total, excluded = [], 0
    sides = directions(strategy, "bottleneck", *draw(strategy, batch))
    for samples, (q, t, places, weight) in zip(sides, zip(*calls[0], strict=True), strict=True):
        assert weight.tolist() == [1, 1]
        for b, side in enumerate(samples):
            rows = as_voxels(side, places[b])
            times = np.bincount(rows, minlength=len(side.voxels))
            assert times.min() >= 1
            assert times.max() - times.min() <= 1
            np.testing.assert_allclose(q[b].detach().numpy(), side.q[rows], atol=1e-4)
            np.testing.assert_allclose(t[b].detach().numpy(), side.t[rows], atol=1e-4)
            x, k, at = (np.array(v)[rows] for v in (side.q, side.t, side.places))
            x, k = (v / np.linalg.norm(v, axis=1, keepdims=True) for v in (x, k))
            logits = x @ k.T / 0.2
            losses = []
            for i in range(len(rows)):
                far = [j for j in range(len(rows)) if np.linalg.norm(at[i] - at[j]) > exclusion]
                excluded += len(rows) - 1 - len(far)
                for row in (logits, logits.T):
                    losses.append(np.log(np.exp(row[i, i]) + np.exp(row[i, far]).sum()) - row[i, i])
            total.append(np.mean(losses))
    assert excluded > 0
    assert found.item() == pytest.approx(np.mean(total), rel=1e-4)


def test_variance_and_covariance_are_of_projections_at_valid_voxels(batch, seen):
    strategy = make(objective="vicreg", samples=10_000)
    calls = seen(strategy.variance)
    found = terms(strategy, batch)
    sides = directions(strategy, "bottleneck", *draw(strategy, batch))
    variance = covariance = 0.0
    ((*views, used1, used2),) = calls
    assert used1.min() == used2.min() == 1
    for rows, samples in zip(views, sides, strict=True):
        omega = np.concatenate([side.q for side in samples])
        rows = rows.detach().double().numpy()
        nearest = np.abs(rows[:, None] - omega[None]).max(-1)
        assert nearest.min(1).max() < 1e-4  # none from outside
        assert nearest.min(0).max() < 1e-4  # and all of Ω
        c = np.cov(rows.T)
        variance += 0.5 * np.maximum(0, 1 - np.sqrt(c.diagonal() + 1e-4)).mean()
        covariance += ((c**2).sum() - (c.diagonal() ** 2).sum()) / 7
    assert found["variance"].item() == pytest.approx(variance, rel=1e-4)
    assert found["covariance"].item() == pytest.approx(covariance, rel=1e-4)


@pytest.mark.parametrize("objective", ["cosine", "vicreg"])
def test_taps_are_weighted(batch, objective: str):
    strategy = make(objective=objective, taps=list(TAPS), tap_weights={"fine": 1.0, "bottleneck": 3.0})
    found = terms(strategy, batch)["similarity"].item()
    sides = {tap: flat(directions(strategy, tap, *draw(strategy, batch))) for tap in TAPS}
    each = {tap: np.mean([BY_HAND[objective](side) for side in samples]) for tap, samples in sides.items()}
    assert abs(each["fine"] - each["bottleneck"]) > 1e-3
    assert found == pytest.approx(0.25 * each["fine"] + 0.75 * each["bottleneck"], rel=1e-4)
    assert make(taps=list(TAPS)).tap_weights == {"fine": 0.5, "bottleneck": 0.5}
    alone = make(taps=list(TAPS), tap_weights={"bottleneck": 2.0})
    assert alone.tap_weights == {"bottleneck": 1.0}
    assert alone.projectors.taps == alone.predictors.taps == ("bottleneck",)


@pytest.mark.parametrize("border", [0.5, 1.0])
def test_border_keeps_away_from_both_lattices(batch, border: float):
    strategy = make(border=border)
    found = terms(strategy, batch)["similarity"]
    sides = directions(strategy, "bottleneck", *draw(strategy, batch), border)
    without = directions(strategy, "bottleneck", *draw(strategy, batch))
    assert 0 < sum(len(s.voxels) for s in flat(sides)) < sum(len(s.voxels) for s in flat(without))
    expected = np.mean([np.mean([cosine_by_hand(side) for side in samples]) for samples in sides])
    assert found.item() == pytest.approx(expected, rel=1e-4)


def test_a_sample_with_fewer_voxels_than_fewest_is_left_out_of_its_direction(batch):
    sides = directions(make(), "bottleneck", *draw(make(), batch))
    counts = sorted(len(side.voxels) for side in flat(sides))
    assert counts[0] < counts[1]
    for fewest, left in ((counts[0], 0), (counts[0] + 1, 1)):
        strategy = make(min_points=fewest)
        found = terms(strategy, batch)["similarity"]
        kept = [[side for side in samples if len(side.voxels) >= fewest] for samples in sides]
        expected = np.mean([np.mean([cosine_by_hand(side) for side in samples]) for samples in kept])
        assert found.item() == pytest.approx(expected, rel=1e-4)
        assert strategy.logged["skipped"].item() == pytest.approx(left / 4)


# --- samples without a shared voxel -----------------------------------------------------------------------------------


def apart(views: tuple[View, View], rows: list[int], how: str) -> tuple[View, View]:
    """Leaves the named samples without anything to compare; images are leaves that ask for a gradient."""
    first, second = (replace(view, image=view.image.clone().requires_grad_()) for view in views)
    if how == "far away":
        for affine in (second.affine, second.source_affine):
            affine[rows, :3, 3] += 500.0
    else:
        second.source_foreground[rows] = False
    return first, second


EVERYTHING = {"similarity": 1.0, "variance": 1.0, "covariance": 1.0}


@pytest.mark.parametrize("how", ["far away", "background"])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_sample_without_valid_voxels_is_an_exact_zero(make_batch, objective: str, how: str):
    batch = make_batch(3, SOURCE)
    strategy = make(objective=objective, taps=list(TAPS), loss_weights=EVERYTHING)
    first, second = apart(draw(strategy, batch), [1], how)
    found = terms(strategy, batch, (first, second))
    assert strategy.logged["skipped"].item() == pytest.approx(1 / 3)
    sum(found.values()).backward()
    for view in (first, second):
        assert view.image.grad[1].abs().sum() == 0
        assert all(view.image.grad[b].abs().sum() > 0 for b in (0, 2))
    for name, parameter in strategy.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name

    # and the others' mean is what they give without it
    changed = replace(first, image=torch.randn_like(first.image)), replace(second, image=torch.randn_like(first.image))
    for view, other in zip(changed, (first, second), strict=True):
        view.image[[0, 2]] = other.image.detach()[[0, 2]]
    for name, value in terms(strategy, batch, changed).items():
        torch.testing.assert_close(value, found[name])


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_batch_without_valid_voxels_is_an_exact_zero_with_all_its_gradients(make_batch, objective: str):
    batch = make_batch(2, SOURCE)
    strategy = make(objective=objective, loss_weights=EVERYTHING)
    found = terms(strategy, batch, apart(draw(strategy, batch), [0, 1], "far away"))
    assert {name: value.item() for name, value in found.items()} == dict.fromkeys(EVERYTHING, 0.0)
    assert strategy.logged["skipped"] == 1
    sum(found.values()).backward()
    trained = {name: p for name, p in strategy.named_parameters() if p.requires_grad}
    assert trained
    for name, parameter in trained.items():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() == 0, name


# --- symmetry ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", ["layer", "batch"])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_two_views_may_be_swapped(batch, objective: str, norm: str):
    strategy = make(objective=objective, taps=list(TAPS), loss_weights=EVERYTHING, norm=norm)
    first, second = draw(strategy, batch)
    one, two = terms(strategy, batch, (first, second)), terms(strategy, batch, (second, first))
    assert set(one) == set(EVERYTHING)
    for name in EVERYTHING:
        assert one[name].item() != 0
        torch.testing.assert_close(one[name], two[name], rtol=1e-4, atol=1e-6)


@pytest.fixture
def twins(make_batch) -> tuple[ViewSampler, PairBatch]:
    """A sampler whose two views are one."""
    settings = {"same_visit": 1.0, "geometry": "shared", "intensity": "shared", "transforms": None}
    return sampler(**settings), make_batch(2, SOURCE)


def test_identical_views_have_no_distance(twins):
    strategy = make(twins[0], objective="vicreg")
    assert terms(strategy, twins[1])["similarity"] < 1e-10


def test_identical_views_have_the_teachers_own_map_as_target(twins, seen):
    strategy = make(twins[0])
    calls = seen(strategy.objective.loss)
    terms(strategy, twins[1])
    first, _ = draw(strategy, twins[1])
    teacher = strategy.teacher
    own = teacher["projectors"].maps("bottleneck", teacher["backbone"](first.image, ["bottleneck"])["bottleneck"])
    assert len(calls) == 1
    for _, target, valid, weight in zip(*calls[0], strict=True):
        torch.testing.assert_close(target.mT.unflatten(2, own.shape[2:]), own, rtol=0, atol=1e-5)
        points = geo.transform(first.affine, 4 * geo.lattice(own.shape[2:]) + 1)
        assert torch.equal(valid, first.contains(points, foreground=True))
        assert weight.tolist() == [1, 1]


def test_where_to_draw_does_not_repeat(batch, seen):
    strategy = make(objective="info_nce", samples=5)
    calls = seen(strategy.objective.loss)
    terms(strategy, batch)
    again = draw(strategy, batch)
    strategy.generator.manual_seed(2)
    strategy.terms(*again, batch)
    assert all(len(places[side].unique(dim=1)[0]) == 5 for *_, places, _ in calls for side in (0, 1))
    assert not torch.equal(calls[0][2], calls[1][2])


# --- who learns -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_teacher_and_predictor_are_there_for_those_who_need_them(objective: str):
    strategy = make(objective=objective)
    assert (strategy.teacher is None) == (objective == "vicreg")
    assert len(strategy.predictors) == (objective == "cosine")
    assert strategy.loss_weights == OBJECTIVES[objective].LOSS_WEIGHTS


@pytest.mark.parametrize("objective", ["cosine", "info_nce"])
def test_the_teacher_learns_by_following_only(batch, objective: str):
    torch.manual_seed(0)
    strategy = make(objective=objective, momentum=0.9)
    projector = strategy.projectors["bottleneck"]
    for name, module in (("backbone", strategy.backbone), ("projectors", strategy.projectors)):
        strategy.teacher[name].load_state_dict(module.state_dict())
    before = [parameter.clone() for parameter in strategy.teacher.parameters()]
    optimizer = torch.optim.SGD([p for p in strategy.parameters() if p.requires_grad], lr=1.0)
    sum(terms(strategy, batch).values()).backward()
    assert all(parameter.grad is None for parameter in strategy.teacher.parameters())
    optimizer.step()
    online = [*strategy.backbone.parameters(), *projector.parameters()]
    moved = [not torch.equal(a, b) for a, b in zip(before, online, strict=True)]
    assert any(moved)
    strategy.teacher.follow(0.0)
    for old, now, new in zip(before, strategy.teacher.parameters(), online, strict=True):
        torch.testing.assert_close(now, 0.9 * old + 0.1 * new)
        assert torch.equal(now, new) == torch.equal(old, new)


@pytest.mark.parametrize(("objective", "constant"), [("cosine", True), ("info_nce", True), ("vicreg", False)])
def test_the_teachers_target_is_a_constant(batch, objective: str, constant: bool):
    """Not even the images are asked; without a teacher both sides learn."""
    strategy, sides = make(objective=objective), []
    strategy.objective.register_forward_pre_hook(lambda _, args: sides.append(args[0]))
    terms(strategy, batch, apart(draw(strategy, batch), [], "far away"))
    assert [side.target.requires_grad for side in sides] == [not constant]
    assert all(side.query.requires_grad for side in sides)


@pytest.mark.parametrize(("tap", "last"), [("fine", 0), ("bottleneck", 2)])
def test_only_what_the_taps_need_is_trained_and_run(batch, tap: str, last: int):
    strategy, ran = make(taps=[tap]), []
    for backbone in (strategy.backbone, strategy.teacher["backbone"]):
        for index, module in enumerate(backbone.network):
            module.register_forward_hook(lambda *_, i=index: ran.append(i))
    found = terms(strategy, batch)
    assert set(ran) == set(range(last + 1))
    for index, module in enumerate(strategy.backbone.network):
        assert all(parameter.requires_grad == (index <= last) for parameter in module.parameters())
    sum(found.values()).backward()
    grads = [p.grad for p in strategy.parameters() if p.requires_grad]
    assert all(gradient is not None and gradient.abs().sum() > 0 for gradient in grads)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_default_network_runs_no_decoder_for_its_bottleneck(make_batch, objective: str):
    from lssl.networks.backbone import unet, unet_taps

    backbone = Backbone(unet(features=(2, 2, 2, 2, 3, 2), norm="instance"), unet_taps())
    strategy = PriorGuidedLocal(
        backbone,
        objective=OBJECTIVES[objective],
        hidden=8,
        projection=6,
        min_points=2,
        views=ViewSampler(32, transforms=[]),
    )
    ran: list[str] = []
    for owner in (strategy, *([strategy.teacher] if strategy.teacher else [])):
        for name, module in owner.named_modules():
            if ".upcat_" in name or name.endswith("final_conv"):
                module.register_forward_hook(lambda *_, name=name: ran.append(name))
    sum(terms(strategy, make_batch(2, SOURCE)).values()).backward()
    assert ran == []
    for name, parameter in strategy.backbone.named_parameters():
        assert parameter.requires_grad == (parameter.grad is not None), name
        if "upcat" in name or "final" in name:
            assert not parameter.requires_grad
    assert backbone.network.conv_0.conv_0.conv.weight.requires_grad


# --- precision, heads -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_grids_and_losses_are_float32_under_autocast(batch, objective: str, monkeypatch):
    strategy = make(objective=objective, loss_weights=EVERYTHING)
    views = draw(strategy, batch)
    exact, types, original = terms(strategy, batch, views), [], F.grid_sample

    def record(volume, grid, **settings):
        types.append((volume.dtype, grid.dtype))
        return original(volume, grid, **settings)

    monkeypatch.setattr(geo.F, "grid_sample", record)
    with torch.autocast("cpu", torch.bfloat16):
        assert strategy.backbone(views[0].image, ["bottleneck"])["bottleneck"].dtype == torch.bfloat16
        found = terms(strategy, batch, views)
    assert set(types) == {(torch.float32, torch.float32)}
    for name, value in found.items():
        assert value.dtype == torch.float32, name
        assert value.item() == pytest.approx(exact[name].item(), rel=0.1, abs=0.02), name


def test_heads_on_voxels_are_convolutions_of_one_voxel():
    head = Projector(5, 9, 4)
    twin = nn.Sequential(nn.Conv3d(5, 9, 1, bias=False), nn.BatchNorm3d(9), nn.ReLU(), nn.Conv3d(9, 4, 1))
    with torch.no_grad():
        nn.init.normal_(head[1].weight)
        nn.init.normal_(head[1].bias)
    twin.load_state_dict(
        {name: v[..., None, None, None] if v.ndim == 2 else v for name, v in head.state_dict().items()}
    )
    maps = torch.randn(2, 5, 4, 3, 2)
    for _ in range(2):  # training moves the running statistics of both, which evaluation then uses
        torch.testing.assert_close(voxelwise(head, maps), twin(maps), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(head[1].running_var, twin[1].running_var)
        head.eval(), twin.eval()


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"taps": ["bottelneck"]}, r"There is no tap 'bottelneck'; the backbone has fine, bottleneck\."),
        ({"tap_weights": {"fine": 1.0}}, r"tap_weights: 'fine' is none of the taps used, bottleneck\."),
        ({"taps": list(TAPS), "tap_weights": {"fine": 2.0, "bottleneck": -1.0}}, r"none a negative one\."),
        ({"tap_weights": {"bottleneck": 0.0}}, r"at least one tap a positive weight"),
        (
            {"min_points": 169},
            r"min_points: tap 'bottleneck' has 336 voxels in views of 32×28×24.* a smaller min_points\.",
        ),
        ({"loss_weights": {"simlarity": 1.0}}, r"no term 'simlarity'; it has covariance, similarity, variance\."),
    ],
)
def test_wrong_settings_are_refused_in_one_sentence(settings: dict, sentence: str):
    with pytest.raises(InputError, match=sentence) as error:
        make(**settings)
    assert str(error.value).count(". ") == 0


def test_the_largest_min_points_is_taken():
    assert make(min_points=168).min_points == 168


def test_nothing_to_learn_is_refused(batch):
    strategy = make(loss_weights={"similarity": 0.0})
    strategy.generator.manual_seed(0)
    with pytest.raises(InputError, match="every term has weight 0, so there is nothing to learn"):
        strategy._step(batch)


def test_heads_that_no_term_uses_are_not_built():
    """Distributed training would wait for their gradients."""
    strategy = make(loss_weights={"similarity": 0.0, "variance": 1.0})
    assert strategy.teacher is None
    assert not list(strategy.predictors.parameters())


@pytest.mark.parametrize("wrong", [{"min_points": 0}, {"samples": 0}, {"border": -1.0}])
def test_numbers_that_make_no_sense_are_refused(wrong):
    with pytest.raises(InputError, match=next(iter(wrong))):
        make(**wrong)
