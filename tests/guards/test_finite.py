"""A loss or gradient that is not finite: found in its window, named, saved; the run stops or the update is undone."""

from __future__ import annotations

import contextlib
import copy
import csv
import resource
from functools import partial

import lightning as L
import pytest
import torch
from helpers import ROOT, TINY_NET, few, sentence, tiny
from small import TASKS, Noise, Plant, broken, finite, mixed, one_nan, saved, strategy, trainer
from torch.utils._python_dispatch import TorchDispatchMode

from lssl.guards import FiniteGuard
from lssl.utils.errors import InputError

PRECISIONS = ("32-true", "bf16-mixed")


def test_a_bad_batch_that_cannot_be_saved_costs_no_sentence(tmp_path):
    """torch.save to a path hides that the disk is full behind a RuntimeError."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, before[1]))
    try:
        with pytest.raises(InputError, match=r"is NaN or infinite in 1 voxel; the batch could not be saved .*ulimit"):
            trainer(tmp_path, Plant(one_nan, 2), max_steps=4).fit(TASKS["strategy"](), datamodule=Noise(subjects=6))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("task", TASKS)
def test_one_nan_voxel_stops_the_run_within_its_window_and_keeps_the_checkpoints(task, precision, tmp_path):
    run = trainer(tmp_path, Plant(one_nan, 6), max_steps=8, precision=precision)
    data = Noise(subjects=6)
    data.few_shot.steps = 2
    with pytest.raises(InputError) as error:
        run.fit(TASKS[task](), datamodule=data)
    text = str(error.value)
    assert text.startswith("Step 6: ")
    assert "loss is nan" in text
    assert "is NaN or infinite in 1 voxel" in text
    assert "last.ckpt holds weights from before" in text
    assert run.global_step <= 8
    for name in ("best", "last"):
        kept = saved(tmp_path, name)
        assert kept["global_step"] in (2, 4)
        assert finite(kept)
    written = torch.load(next((tmp_path / "nonfinite").glob("step6-rank0.pt")), weights_only=True)
    assert broken(written["batch"])
    culprit = text.split("; ")[1].removesuffix(" is NaN or infinite in 1 voxel")
    assert culprit in written["visits"]


def test_it_is_found_a_step_later_between_logging_steps(tmp_path):
    run = trainer(tmp_path, Plant(one_nan, 3), max_steps=20, log_every_n_steps=1000, limit_val_batches=0)
    with pytest.raises(InputError, match="Step 3"):
        run.fit(strategy(), datamodule=Noise(subjects=24, split=(1.0, 0.0, 0.0)))
    assert run.global_step == 4


class Watch(L.Callback):
    """Keeps all state before and after some steps."""

    def __init__(self):
        self.before, self.after = {}, {}

    @staticmethod
    def state(trainer, module):
        optimizer = trainer.optimizers[0]
        values = dict(module.state_dict(keep_vars=False))
        for place, weight in enumerate(optimizer.param_groups[0]["params"]):
            values |= {f"{place}.{name}": value for name, value in optimizer.state.get(weight, {}).items()}
        return copy.deepcopy({name: value for name, value in values.items() if value is not None})

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.before.setdefault(trainer.global_step + 1, self.state(trainer, pl_module))

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.after.setdefault(trainer.global_step, self.state(trainer, pl_module))


OPTIMIZERS = {
    "adam": partial(torch.optim.AdamW, lr=1e-2),
    "fused": partial(torch.optim.AdamW, lr=1e-2, fused=True),
    "momentum": partial(torch.optim.SGD, lr=1e-2, momentum=0.9, weight_decay=0.1),
}


@pytest.mark.parametrize("accumulate", few([2, 1], 1))
@pytest.mark.parametrize("optimizer", few(["adam", "momentum", "fused"], 2))
@pytest.mark.parametrize("task", TASKS)
def test_a_skipped_update_leaves_no_trace(task, optimizer, accumulate, tmp_path):
    """Weights, moments, step counters, running statistics, queue; at the first step there is no state yet."""
    watch = Watch()
    options = {"gradient_clip_val": 1.0, "accumulate_grad_batches": accumulate, "limit_val_batches": 0}
    run = trainer(tmp_path, watch, Plant(one_nan, 1, 4), max_steps=6, **options)
    made = TASKS[task](on_nonfinite="skip", optimizer=OPTIMIZERS[optimizer], schedule=None)
    data = Noise(subjects=8, split=(1.0, 0.0, 0.0))
    data.few_shot.steps = 4
    with pytest.warns(UserWarning, match="This update is skipped"):
        run.fit(made, datamodule=data)
    for step in (1, 4):
        assert set(watch.before[step]) <= set(watch.after[step])
        for name, value in watch.after[step].items():
            before = watch.before[step].get(name, torch.zeros_like(torch.as_tensor(value)))
            if not name.startswith("teacher."):  # it moves towards the weights as they are
                torch.testing.assert_close(value, before, rtol=0, atol=0, msg=f"{step} {name}")
    assert any(not torch.equal(watch.before[5][name], watch.after[5][name]) for name in watch.before[5])
    guard = next(each for each in run.callbacks if isinstance(each, FiniteGuard))
    assert guard.skipped == 2
    assert finite(saved(tmp_path))
    assert saved(tmp_path)["callbacks"]["FiniteGuard"] == {"skipped": 2}
    with (tmp_path / "nonfinite" / "skipped.csv").open() as file:
        assert [row["step"] for row in csv.DictReader(file)] == ["1", "4"]


@pytest.mark.parametrize("precision", PRECISIONS[1:])
@pytest.mark.parametrize("task", TASKS)
def test_in_bfloat16_a_bad_update_is_skipped_too(task, precision, tmp_path):
    run = trainer(tmp_path, Plant(one_nan, 3), max_steps=6, limit_val_batches=0, precision=precision)
    made = TASKS[task](on_nonfinite="skip")
    with pytest.warns(UserWarning, match="Step 3: .*This update is skipped"):
        run.fit(made, datamodule=Noise(subjects=4, split=(1.0, 0.0, 0.0)))
    assert next(each for each in run.callbacks if isinstance(each, FiniteGuard)).skipped == 1
    assert not broken(made.state_dict())
    assert finite(saved(tmp_path))


@pytest.mark.parametrize("precision", ["bf16-true", "16-true", "64-true"])
def test_a_precision_that_converts_places_is_refused(precision, tmp_path):
    with pytest.raises(InputError, match=f"trainer.precision: {precision} would convert"):
        trainer(tmp_path, max_steps=2, precision=precision).fit(strategy(), datamodule=Noise())


def test_skipping_for_ever_is_no_training(tmp_path):
    run = trainer(tmp_path, Plant(lambda image: image * torch.nan, *range(3, 100)), max_steps=60, limit_val_batches=0)
    with pytest.raises(InputError, match="30 updates in a row"), pytest.warns(UserWarning, match="is skipped"):
        run.fit(strategy(on_nonfinite="skip"), datamodule=Noise(subjects=4, split=(1.0, 0.0, 0.0)))
    assert run.global_step == 32
    assert len(list((tmp_path / "nonfinite").glob("*.pt"))) == 5


@pytest.mark.parametrize("precision", few([*PRECISIONS, "16-mixed"], 1))
@pytest.mark.parametrize("task", TASKS)
def test_a_learning_rate_of_a_thousand_ends_finite_or_with_a_sentence(task, precision, tmp_path):
    made = TASKS[task](optimizer=partial(torch.optim.AdamW, lr=1e3), schedule=None)
    run = trainer(tmp_path, max_steps=20, **mixed(precision))
    with contextlib.suppress(InputError):
        run.fit(made, datamodule=Noise())
        assert all(value.isfinite() for value in run.callback_metrics.values())
    assert all(finite(torch.load(path, weights_only=False)) for path in tmp_path.rglob("*.ckpt"))


@pytest.mark.parametrize("precision", few(PRECISIONS, 1))
@pytest.mark.parametrize("task", TASKS)
def test_a_wild_learning_rate_is_never_silent(task, precision, tmp_path):
    made = TASKS[task](optimizer=partial(torch.optim.SGD, lr=1e30), schedule=None)
    run = trainer(tmp_path, max_steps=20, precision=precision)
    with pytest.raises(InputError, match=r"(?i)lower (the|a|with a)?.*learning rate"):
        run.fit(made, datamodule=Noise())
    assert all(finite(torch.load(path, weights_only=False)) for path in tmp_path.rglob("*.ckpt"))


class Overflow(L.Callback):
    """Weights overflow after the last step, which no loss can show."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == 4:
            next(pl_module.parameters()).data.fill_(torch.inf)


def test_weights_that_overflow_are_not_saved(tmp_path):
    run = trainer(tmp_path, Overflow(), max_steps=4, limit_val_batches=0)
    with pytest.raises(InputError, match=r"After step 4, the weights \(backbone.network.0.weight\) are not finite"):
        run.fit(strategy(), datamodule=Noise(split=(1.0, 0.0, 0.0), subjects=4))
    assert saved(tmp_path)["global_step"] == 2


class Save(L.Callback):
    """Saves at the end of a step, before the guard has seen it, as saving by time does."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        trainer.save_checkpoint(trainer.default_root_dir + "/now.ckpt")


def test_saving_at_once_after_a_bad_step_names_its_visit(tmp_path):
    run = trainer(tmp_path, Plant(one_nan, 3), Save(), max_steps=6, limit_val_batches=0, log_every_n_steps=50)
    with pytest.raises(InputError, match=r"Step 3: similarity is nan, loss is nan; .* is NaN or infinite in 1 voxel"):
        run.fit(strategy(), datamodule=Noise(split=(1.0, 0.0, 0.0), subjects=16))
    assert torch.load(tmp_path / "now.ckpt", weights_only=False)["global_step"] == 2


def test_weights_that_start_broken_are_refused(tmp_path):
    made = strategy()
    next(made.parameters()).data.fill_(torch.nan)
    with pytest.raises(InputError, match="not finite before the first step"):
        trainer(tmp_path, limit_val_batches=0).fit(made, datamodule=Noise())


@pytest.mark.parametrize("precision", few(["32-true", "16-mixed", "bf16-mixed"], 2))
@pytest.mark.parametrize(
    "change", few([lambda image: image * 0 + 0.5, lambda image: image * 1e4, lambda image: image * 0], 2)
)
@pytest.mark.parametrize("task", TASKS)
def test_constant_and_bright_crops(task, change, precision, tmp_path):
    """Every step is finite, or stops the run by its name; here all are finite."""
    bad = Plant(change, *range(1, 9), everywhere=True)
    run = trainer(tmp_path, bad, max_steps=4, limit_val_batches=0, **mixed(precision))
    run.fit(TASKS[task](), datamodule=Noise(subjects=4, split=(1.0, 0.0, 0.0)))
    assert run.global_step == 4
    assert finite(saved(tmp_path))


class Syncs(TorchDispatchMode):
    """Counts operations that make the host wait for the device."""

    found: list[str]

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(word in str(func) for word in ("_local_scalar_dense", "is_nonzero", "nonzero", "equal.")):
            self.found.append(str(func))
        return func(*args, **(kwargs or {}))


def watched(inner, found):
    def hook(self, *args):
        mode = Syncs()
        mode.found = found
        with mode:
            return inner(self, *args)

    return hook


@pytest.mark.parametrize("choice", ["stop", "skip"])
def test_no_step_waits_for_the_device(choice, tmp_path, monkeypatch):
    found: list[str] = []
    for name in (
        "on_train_batch_start",
        "on_before_backward",
        "on_before_optimizer_step",
        "_undo",
        "on_train_batch_end",
    ):
        monkeypatch.setattr(FiniteGuard, name, watched(getattr(FiniteGuard, name), found))
    run = trainer(tmp_path, max_steps=6, log_every_n_steps=3, limit_val_batches=0)
    run.fit(strategy(on_nonfinite=choice), datamodule=Noise(subjects=4, split=(1.0, 0.0, 0.0)))
    assert found == []


def test_a_wrong_choice():
    with pytest.raises(InputError, match="choose stop or skip"):
        FiniteGuard("ignore")  # type: ignore[arg-type]


class Agree(L.Callback):
    """At the end, both ranks have the same weights."""

    def on_train_end(self, trainer, pl_module):
        for weight in pl_module.parameters():
            everyone = pl_module.all_gather(weight.detach())
            assert torch.equal(everyone[0], everyone[1])


@pytest.mark.parametrize("choice", ["stop", "skip"])
def test_ranks_agree_on_a_step_that_one_of_them_spoilt(choice, tmp_path):
    """Rank 1 alone meets the bad visit; both stop with its name, or both skip, and their weights stay equal."""
    two = {"devices": 2, "strategy": "ddp_fork", "max_steps": 6, "limit_val_batches": 0}
    run = trainer(tmp_path, Plant(one_nan, 3, rank=1), Agree(), **two)
    made, data = strategy(on_nonfinite=choice), Noise(subjects=16, split=(1.0, 0.0, 0.0))
    if choice == "stop":
        with pytest.raises(Exception, match=r"Step 3: .*is NaN or infinite in 1 voxel"):
            run.fit(made, datamodule=data)
        assert [path.name for path in (tmp_path / "nonfinite").iterdir()] == ["step3-rank1.pt"]
        return
    run.fit(made, datamodule=data)
    assert finite(saved(tmp_path))
    assert saved(tmp_path)["callbacks"]["FiniteGuard"] == {"skipped": 1}


def test_the_command_line_ends_with_one_sentence(tmp_path, capsys):
    options = ["--trainer.callbacks=null", "--trainer.max_steps=4", "--monitor.every=0"]
    options += ["--model.init_args.optimizer=torch.optim.SGD", "--model.init_args.optimizer.init_args.lr=1e30"]
    args = ["fit", "--config", str(ROOT / "configs/demo.yaml"), *tiny(tmp_path, backbone=TINY_NET)]
    text = sentence(capsys, *args, *options, "--model.init_args.schedule=null")
    assert text.startswith("Step ") or text.startswith("Validation after step ")
    assert all(finite(torch.load(path, weights_only=False)) for path in tmp_path.rglob("*.ckpt"))
