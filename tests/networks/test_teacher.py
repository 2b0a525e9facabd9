"""Teacher: a moving average in closed form, without gradient, moved once per optimizer step."""

from __future__ import annotations

import copy
import itertools
import math
from functools import partial

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lssl.networks.backbone import Backbone
from lssl.networks.heads import TapHeads
from lssl.networks.teacher import Teacher
from lssl.strategies.global_contrastive import BYOL, GlobalContrastive, MoCo, SimCLR, VICReg
from lssl.strategies.prior_guided_local import InfoNCE, PriorGuidedLocal
from lssl.strategies.prior_guided_local import VICReg as LocalVICReg
from lssl.strategy import Strategy
from lssl.views.sampler import ViewSampler


def network() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv3d(1, 4, 3, stride=2, padding=1), nn.BatchNorm3d(4), nn.ReLU(), nn.Conv3d(4, 6, 3, stride=2, padding=1)
    )


def common() -> dict:
    return {"backbone": Backbone(network(), {"deep": "3"}), "taps": ["deep"], "views": ViewSampler(16, transforms=[])}


NARROW = {"hidden": 8, "projection": 6}
MAKERS = {
    "cosine": lambda: PriorGuidedLocal(**common(), **NARROW),
    "info_nce": lambda: PriorGuidedLocal(**common(), **NARROW, objective=InfoNCE),
    "MoCo": lambda: GlobalContrastive(**common(), objective=partial(MoCo, **NARROW, queue=8)),
    "BYOL": lambda: GlobalContrastive(**common(), objective=partial(BYOL, **NARROW)),
}


def shift(module: nn.Module) -> None:
    """Moves every parameter and running statistic."""
    with torch.no_grad():
        for tensor in [*module.parameters(), *module.buffers()]:
            tensor.add_(torch.ones_like(tensor))


def equal(one: nn.Module, two: nn.Module) -> bool:
    pairs = zip(one.state_dict().values(), two.state_dict().values(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


# --- the average ------------------------------------------------------------------------------------------------------


def test_momentum_rises_by_a_cosine():
    teacher = Teacher({}, momentum=0.9, final=0.98)
    quarter = 0.98 - 0.08 * (1 + math.sqrt(0.5)) / 2
    for progress, expected in ((0.0, 0.9), (0.25, quarter), (0.5, 0.94), (1.0, 0.98), (1.5, 0.98)):
        assert teacher.momentum(progress) == pytest.approx(expected, abs=1e-12)
    default = Teacher({})
    assert [default.momentum(progress) for progress in (0, 0.5, 1)] == pytest.approx([0.996, 0.998, 1.0], abs=1e-12)


def test_average_in_closed_form():
    student, steps = nn.Linear(3, 2).double(), 7
    teacher = Teacher({"net": student}, momentum=0.6, final=0.9)
    weights, momenta = [student.weight.detach().clone()], []
    for step in range(steps):
        with torch.no_grad():
            student.weight.copy_(torch.randn(2, 3))
        progress = (step + 1) / steps
        weights.append(student.weight.detach().clone())
        momenta.append(0.9 - 0.3 * (1 + math.cos(math.pi * progress)) / 2)
        teacher.follow(progress)
    expected = math.prod(momenta) * weights[0]
    for step, momentum in enumerate(momenta):
        expected = expected + (1 - momentum) * math.prod(momenta[step + 1 :]) * weights[step + 1]
    torch.testing.assert_close(teacher["net"].weight, expected, check_dtype=False)
    torch.testing.assert_close(teacher["net"].bias, student.bias)  # never moved, so its average stays
    assert torch.equal(student.weight, weights[-1])


@pytest.mark.parametrize("momentum", [0.0, 1.0])
def test_extremes_copy_or_stay(momentum: float):
    student = nn.Linear(2, 2)
    teacher = Teacher({"net": student}, momentum, momentum)
    before = copy.deepcopy(student)
    shift(student)
    teacher.follow(0.3)
    assert equal(teacher["net"], before if momentum else student)


def test_every_module_is_followed_under_its_name():
    first, second = nn.Linear(2, 2), nn.Linear(2, 2)
    teacher = Teacher({"one": first, "two": second}, 0.5, 0.5)
    starts = {name: teacher[name].weight.clone() for name in ("one", "two")}
    with torch.no_grad():
        second.weight.add_(1.0)
    teacher.follow(0.0)
    assert torch.equal(teacher["one"].weight, starts["one"])
    torch.testing.assert_close(teacher["two"].weight, starts["two"] + 0.5)


def test_starts_equal_and_apart():
    student = network()
    teacher = Teacher({"net": student})
    assert equal(teacher["net"], student)
    start = copy.deepcopy(teacher["net"])
    shift(student)
    assert equal(teacher["net"], start)


def test_buffers_are_copied_not_averaged():
    student = nn.BatchNorm1d(3)
    teacher = Teacher({"net": student}, momentum=0.99, final=0.99)
    for _ in range(3):
        student(5 * torch.randn(16, 3) + 2)
    assert not torch.allclose(teacher["net"].running_mean, student.running_mean)
    teacher.follow(0.0)
    for name, buffer in student.named_buffers():
        assert torch.equal(teacher["net"].get_buffer(name), buffer), name
    assert teacher["net"].num_batches_tracked.item() == 3
    student(torch.randn(16, 3))  # and are copies
    assert teacher["net"].num_batches_tracked.item() == 3


# --- no gradient, and one of each -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", MAKERS)
def test_only_the_originals_receive_gradients(kind: str, make_batch):
    strategy = MAKERS[kind]()
    owners = [("backbone", strategy.backbone)]
    if kind in ("cosine", "info_nce"):
        owners.append(("projectors", strategy.projectors))
    else:
        owners.append(("projector", strategy.objective.projector))
        if kind == "MoCo":  # an empty queue would leave nothing to learn
            strategy.objective.queue.push(torch.randn(4, 6), torch.arange(10, 14))
    assert [name for name, _ in owners] == list(strategy.teacher)
    assert all(equal(strategy.teacher[name], module) for name, module in owners)
    asked = []
    for name, module in strategy.teacher.items():
        called = module["deep"] if isinstance(module, TapHeads) else module
        called.register_forward_hook(lambda *_, name=name: asked.append(name))
    trained = [parameter for parameter in strategy.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.01)
    batch = make_batch(4)
    for _ in range(2):
        optimizer.zero_grad()
        loss, _ = strategy._step(batch)
        loss.backward()
        optimizer.step()
    assert asked == 2 * list(strategy.teacher)  # the targets are its own, once a step
    for parameter in strategy.teacher.parameters():
        assert not parameter.requires_grad
        assert parameter.grad is None
    for name, module in owners:
        for path, parameter in module.named_parameters():
            assert parameter.requires_grad, f"{name}.{path}"
            assert parameter.grad is not None, f"{name}.{path}"
        weights = [parameter for parameter in module.parameters() if parameter.ndim > 1]
        assert all(weight.grad.abs().sum() > 0 for weight in weights), name
    before = copy.deepcopy(strategy.teacher)
    strategy.teacher.follow(0.0)
    for name, module in owners:
        old, new, goal = (m.state_dict() for m in (before[name], strategy.teacher[name], module))
        share = 1 - strategy.teacher.momentum(0.0)
        for path, _ in module.named_parameters():
            torch.testing.assert_close(new[path], old[path] + share * (goal[path] - old[path]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("objective", [SimCLR, VICReg])
def test_no_teacher_where_none_is_needed(objective: type):
    strategy = GlobalContrastive(**common(), objective=partial(objective, **NARROW))
    assert strategy.teacher is None
    assert PriorGuidedLocal(**common(), **NARROW, objective=LocalVICReg).teacher is None


@pytest.mark.parametrize("kind", MAKERS)
def test_followed_modules_are_registered_once(kind: str):
    strategy = MAKERS[kind]()
    local = isinstance(strategy, PriorGuidedLocal)
    heads = {"projectors": strategy.projectors} if local else {"projector": strategy.objective.projector}
    followed = {"backbone": strategy.backbone, **heads}
    expected = {f"{name}.{key}" for name, module in followed.items() for key in module.state_dict()}
    assert set(strategy.teacher.state_dict()) == expected
    names = [name for name in strategy.state_dict() if not name.startswith(("backbone", "projectors", "predictors"))]
    assert all(name.startswith(("teacher.", "objective.")) for name in names)
    copied = sum(len(list(module.parameters())) for module in followed.values())
    assert len(list(strategy.teacher.parameters())) == copied
    originals = [name for name, _ in strategy.named_parameters() if not name.startswith("teacher.")]
    everything = [name for name, _ in strategy.named_parameters(remove_duplicate=False)]
    assert len(everything) == len(originals) + copied


def test_is_kept_in_checkpoints():
    one, two = MAKERS["MoCo"](), MAKERS["MoCo"]()
    shift(one.backbone)
    one.teacher.follow(0.0)
    assert not equal(one.teacher["backbone"], one.backbone)
    two.load_state_dict(one.state_dict())
    assert equal(two.teacher, one.teacher)
    for strategy in (one, two):
        shift(strategy.backbone)
        strategy.teacher.follow(0.5)
    assert equal(two.teacher, one.teacher)


def test_a_deep_copy_of_its_owner_follows_the_copys_own_network():
    strategy = MAKERS["BYOL"]()
    twin = copy.deepcopy(strategy)
    before = copy.deepcopy(strategy.teacher)
    shift(twin.backbone)
    twin.teacher.follow(0.0)
    assert not equal(twin.teacher["backbone"], before["backbone"])
    strategy.teacher.follow(0.0)  # whose own network did not move
    for name, parameter in strategy.teacher.named_parameters():
        torch.testing.assert_close(parameter, before.get_parameter(name), rtol=1e-6, atol=1e-7)


# --- in training ------------------------------------------------------------------------------------------------------


class Slow(Strategy):
    """The smallest strategy with a teacher."""

    def __init__(self, teacher: bool = True, **options) -> None:
        super().__init__(Backbone(network(), {"deep": "3"}), ViewSampler(16, transforms=[]), **options)
        self.teacher = Teacher({"backbone": self.backbone}, momentum=0.5, final=0.5) if teacher else None

    def terms(self, first, second, batch) -> dict[str, Tensor]:
        return {"mean": (self.backbone(first.image, ["deep"])["deep"].mean() - 1) ** 2}


@pytest.fixture
def fit(make_batch, tmp_path):
    def run(strategy: Strategy, batches: int = 5, epochs: int = 2, **settings) -> None:
        quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
        trainer = L.Trainer(
            accelerator="cpu", max_epochs=epochs, default_root_dir=tmp_path, log_every_n_steps=1, **quiet, **settings
        )
        trainer.fit(strategy, DataLoader([make_batch(2, seed=seed) for seed in range(batches)], batch_size=None))

    return run


@pytest.fixture
def calls(monkeypatch) -> list[tuple[float, Tensor, Tensor]]:
    """Progress, and the first weight of student and teacher, whenever a teacher has been moved."""
    seen, original = [], Teacher.follow

    def record(self: Teacher, progress: float) -> None:
        original(self, progress)
        student = dict(self._followed)["backbone"]
        seen.append((progress, *(next(m.parameters()).detach().clone() for m in (student, self["backbone"]))))

    monkeypatch.setattr(Teacher, "follow", record)
    return seen


@pytest.mark.parametrize("schedule", ["default", None])
def test_is_moved_once_per_optimizer_step_and_after_it(fit, calls, schedule):
    """Five batches, two to a step: three steps an epoch, the last of one batch."""
    options = {} if schedule else {"schedule": None}
    strategy = Slow(optimizer=lambda groups: torch.optim.SGD(groups, lr=0.1), **options)
    teacher = next(strategy.backbone.parameters()).detach().clone()
    fit(strategy, accumulate_grad_batches=2)
    assert strategy.global_step == 6
    assert [progress for progress, *_ in calls] == pytest.approx([step / 6 for step in range(1, 7)])
    for _, student, moved in calls:
        teacher = 0.5 * teacher + 0.5 * student
        torch.testing.assert_close(moved, teacher, rtol=1e-5, atol=1e-7)
    students = [student for _, student, _ in calls]
    assert torch.equal(students[-1], next(strategy.backbone.parameters()))  # it follows the weights after the step
    if not schedule:
        assert all(not torch.equal(one, two) for one, two in itertools.pairwise(students))
        given = strategy.trainer.optimizers[0].param_groups
        assert sum(len(group["params"]) for group in given) == len(list(strategy.backbone.parameters()))


def test_progress_counts_to_max_steps(fit, calls):
    fit(Slow(), epochs=None, max_steps=4)
    assert [progress for progress, *_ in calls] == pytest.approx([0.25, 0.5, 0.75, 1.0])


def test_without_a_teacher_nothing_follows(fit, calls):
    fit(Slow(teacher=False), batches=2, epochs=1)
    assert not calls
