"""What is not finite under a gradient scaler, in a gradient or in a loss alone; modules of one's own."""

from __future__ import annotations

import copy

import lightning as L
import pytest
import torch
from small import Noise, Plant, broken, finite, network, one_nan, saved, scaled, strategy, trainer

from lssl import Strategy, ViewSampler
from lssl.guards import FiniteGuard
from lssl.utils.errors import InputError


@pytest.mark.parametrize("choice", ["stop", "skip"])
def test_an_overflow_of_the_scaled_gradient_belongs_to_the_scaler(choice, tmp_path):
    run = trainer(tmp_path, max_steps=12, limit_val_batches=0, plugins=scaled(2.0**30))
    made = strategy(on_nonfinite=choice)
    run.fit(made, datamodule=Noise(subjects=4, split=(1.0, 0.0, 0.0)))
    assert run.precision_plugin.scaler.get_scale() < 2.0**30
    assert next(each for each in run.callbacks if isinstance(each, FiniteGuard)).skipped == 0
    assert finite(saved(tmp_path))


@pytest.mark.parametrize("choice", ["stop", "skip"])
def test_a_bad_voxel_under_a_scaler_is_found(choice, tmp_path):
    run = trainer(tmp_path, Plant(one_nan, 3), max_steps=6, limit_val_batches=0, plugins=scaled(128.0))
    made, data = strategy(on_nonfinite=choice), Noise(subjects=4, split=(1.0, 0.0, 0.0))
    if choice == "stop":
        with pytest.raises(InputError, match="Step 3: "):
            run.fit(made, datamodule=data)
        return
    with pytest.warns(UserWarning, match="Step 3: "):
        run.fit(made, datamodule=data)
    assert not broken(made.state_dict())


class Endless(L.Callback):
    """Finite losses whose gradient never is."""

    def on_before_backward(self, trainer, pl_module, loss):
        loss.register_hook(lambda gradient: gradient * torch.inf)


def test_a_scaler_that_never_recovers_is_stopped(tmp_path):
    run = trainer(tmp_path, Endless(), max_steps=60, limit_val_batches=0, plugins=scaled(128.0))
    with pytest.raises(InputError, match="30 updates in a row were not finite"):
        run.fit(strategy(), datamodule=Noise(subjects=4, split=(1.0, 0.0, 0.0)))


def test_a_gradient_that_is_not_finite_though_the_loss_is(tmp_path):
    run = trainer(tmp_path, Endless(), max_steps=8, limit_val_batches=0)
    with pytest.raises(InputError, match=r"Step 1: the gradient is not finite; the visits sub-\d ses-\d, .* unusual"):
        run.fit(strategy(), datamodule=Noise(subjects=4, split=(1.0, 0.0, 0.0)))


class Lost(Strategy):
    """A term that is infinite and has no gradient."""

    def terms(self, first, second, batch):
        return {"good": self.backbone(first.image, ["a"])["a"].mean(), "bad": torch.tensor(torch.inf)}


@pytest.mark.parametrize("choice", ["stop", "skip"])
def test_a_loss_that_is_not_finite_though_the_gradient_is(choice, tmp_path):
    made, data = Lost(network(), views=ViewSampler(8), on_nonfinite=choice), Noise(subjects=4, split=(1.0, 0.0, 0.0))
    before = copy.deepcopy(dict(made.named_parameters()))
    run = trainer(tmp_path, max_steps=2, limit_val_batches=0)
    if choice == "stop":
        with pytest.raises(InputError, match=r"Step 1: bad is inf, loss is inf; the visits sub-\d"):
            run.fit(made, datamodule=data)
        return
    with pytest.warns(UserWarning, match="Step 2: bad is inf"):
        run.fit(made, datamodule=data)
    for name, weight in made.named_parameters():
        assert torch.equal(weight, before[name])


class Own(L.LightningModule):
    """A module of one's own, with the guard alone."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(2, 1)

    def training_step(self, batch, batch_idx):
        return self.layer(batch).mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def test_it_guards_any_module_and_any_batch(tmp_path):
    rows = torch.ones(4, 2)
    rows[2, 0] = torch.nan
    run = trainer(tmp_path, FiniteGuard(), max_steps=4)
    with pytest.raises(InputError, match=r"Step 3: loss is nan"):
        run.fit(Own(), torch.utils.data.DataLoader(rows, batch_size=1))
    assert torch.load(tmp_path / "nonfinite" / "step3-rank0.pt", weights_only=True)["batch"].isnan().any()
