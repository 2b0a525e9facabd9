"""Prior-guided local pretraining: symmetry of the views, who learns, precision, and what is refused."""

# ruff: noqa: F811

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from small_prior_guided import EVERYTHING, OBJECTIVES, SOURCE, TAPS, apart, batch, draw, make, sampler, seen, terms  # noqa: F401
from torch import nn

from lssl.data.batch import PairBatch
from lssl.networks.backbone import Backbone
from lssl.networks.heads import Projector, voxelwise
from lssl.strategies.prior_guided_local import PriorGuidedLocal
from lssl.utils.errors import InputError
from lssl.views import geometry as geo
from lssl.views.sampler import ViewSampler

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
    for _, target, valid, weight in zip(*calls[0][:4], strict=True):
        torch.testing.assert_close(target.mT.unflatten(2, own.shape[2:]), own, rtol=0, atol=1e-5)
        points = geo.transform(first.affine, 4 * geo.lattice(own.shape[2:]) + 1)
        assert torch.equal(valid, first.contains(points, foreground=True))
        assert weight.tolist() == [[1, 1]]


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
