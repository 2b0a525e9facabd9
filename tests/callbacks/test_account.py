"""Account: time goes to the phase in which it passed, operations are counted, and nothing waits for the device."""

from __future__ import annotations

import types

import lightning as L
import pytest
import torch
from helpers import TINY_NET, fit
from lightning.pytorch.profilers import SimpleProfiler

from lssl.callbacks.account import STEP, Account, phase_of, waiting
from lssl.runs.cost_table import cost_table
from lssl.runs.outputs import RunCost, read_cost
from lssl.utils.clock import Clock, DeviceTimer
from lssl.utils.peak import peak_flops


class Seconds:
    """A timer moved by hand, whose device passes marks only when told."""

    def __init__(self) -> None:
        self.now, self.reached, self.waits = 0.0, 1e9, 0

    def mark(self) -> float:
        return self.now

    def passed(self, mark: float) -> bool:
        return mark <= self.reached

    def seconds(self, first: float, second: float) -> float:
        return second - first

    def wait(self) -> None:
        self.waits += 1


def test_an_inner_phase_interrupts_the_outer_one():
    timer = Seconds()
    clock = Clock("rest", timer)
    for phase, passes in (("optimizer", 1.0), ("model", 2.0), ("views", 4.0)):
        clock.begin(phase)
        timer.now += passes
    for passes in (8.0, 16.0, 32.0):
        clock.end()
        timer.now += passes
    clock.lap()
    timer.now += 64.0
    clock.begin("end")
    clock.read()
    assert clock.seconds == {"optimizer": 17.0, "model": 10.0, "views": 4.0, "rest": 96.0}
    assert clock.laps == [{"optimizer": 17.0, "model": 10.0, "views": 4.0, "rest": 32.0}]


def test_what_the_device_has_not_passed_is_left_for_later():
    timer = Seconds()
    timer.reached = 1.0
    clock = Clock("rest", timer)
    for _ in range(3):
        timer.now += 1.0
        clock.lap()
    clock.read()
    assert clock.seconds == {"rest": 1.0}
    assert timer.waits == 0
    clock.read(wait=True)
    assert clock.seconds == {"rest": 3.0}
    assert timer.waits == 1


def test_events_of_a_gpu_are_used_again(monkeypatch):
    made = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            made.append(self)

        def record(self) -> None:
            self.at = clock[0]

        def query(self) -> bool:
            return True

        def elapsed_time(self, other) -> float:
            return other.at - self.at

    clock = [0.0]
    monkeypatch.setattr(torch.cuda, "Event", Event)
    times = Clock("rest", DeviceTimer())
    for _ in range(20):
        for phase in ("data", "model"):
            times.begin(phase)
            clock[0] += 500.0 * (1 + (phase == "model"))  # milliseconds
            times.end()
        times.read()
    assert times.seconds == {"rest": 0.0, "data": 10.0, "model": 20.0}
    assert len(made) < 10, "a run would hold events without end"


@pytest.mark.parametrize(
    ("action", "phase"),
    [
        ("[_TrainingEpochLoop].train_dataloader_next", "data"),
        ("[Strategy]SingleDeviceStrategy.batch_to_device", "data"),
        ("[Strategy]DDPStrategy.training_step", "model"),
        ("[Strategy]DDPStrategy.backward", "model"),
        ("[LightningModule]Mine.optimizer_step", "optimizer"),
        ("[Callback]RepresentationMonitor.on_train_batch_end", "monitor"),
        ("[Callback]ModelCheckpoint{'monitor': 'a.b'}.on_train_epoch_end", None),
        ("[Callback]Mine.on_train_batch_end", None),
        ("save_checkpoint", "checkpoints"),
        ("run_training_batch", None),
        ("views", "views"),
    ],
)
def test_actions_of_lightning_have_phases(action: str, phase: str | None):
    assert phase_of(action) == phase


class Small(L.LightningModule):
    """One product of matrices, and a batch of three."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(3, 4)
        self.layer.bias.requires_grad_(False)

    def training_step(self, batch, batch_idx):
        return self.layer(torch.ones(5, 3)).sum()

    def validation_step(self, batch, batch_idx): ...

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)

    def train_dataloader(self):
        return torch.utils.data.DataLoader(torch.zeros(18), batch_size=3)

    val_dataloader = train_dataloader


def test_a_run_is_accounted_for(tmp_path):
    """The phases of a step add up to it, and those of a run to its time; the user's profiler goes on working."""
    account, theirs = Account(), SimpleProfiler()
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "profiler": theirs}
    trainer = L.Trainer(default_root_dir=tmp_path, callbacks=[account], max_epochs=4, accelerator="cpu", **quiet)
    trainer.fit(Small())
    cost = read_cost(tmp_path)
    assert cost is not None
    assert (cost.steps, cost.parameters, cost.pairs_per_step, cost.processes) == (24, 12, 3, 1)
    assert cost.flops_per_step == 2 * (2 * 5 * 3 * 4)  # the product forward, and of the weights' gradient
    parts = [getattr(cost, f"ms_{name}") for name in STEP]
    assert cost.ms_per_step == pytest.approx(sum(parts))
    assert min(cost.ms_data, cost.ms_model, cost.ms_optimizer, cost.ms_rest, cost.validation, cost.checkpoints) > 0
    assert cost.ms_views == 0
    inside = 1e-3 * cost.ms_per_step * 14 + cost.validation + cost.checkpoints + cost.first_step
    assert 0 < inside <= cost.seconds * 1.01
    assert len(theirs.recorded_durations["run_training_batch"]) == 24
    assert {name.rpartition(".")[2] for name in theirs.recorded_durations} >= {"training_step", "optimizer_step"}
    later = Account()
    later.load_state_dict(account.state_dict())
    assert later._seconds() >= cost.seconds


def test_views_are_told_apart_and_marks_per_step_are_few(tmp_path, monkeypatch):
    """Of a real run through the command line; each mark would be an event on a GPU."""
    marks = [0]
    original = Clock._mark

    def counted(clock, lap=False):
        marks[0] += 1
        original(clock, lap)

    monkeypatch.setattr(Clock, "_mark", counted)
    run = fit(tmp_path, "longitudinal_infonce.yaml", options=["--trainer.max_steps", "4"], backbone=TINY_NET)
    cost = read_cost(run)
    assert cost is not None
    assert cost.ms_views > 0
    assert cost.flops_per_step > 1e6
    assert marks[0] <= 40 * cost.steps + 20


def small_cost(**changes) -> RunCost:
    names = RunCost.__dataclass_fields__
    return RunCost(**{**dict.fromkeys(names, 0), "ms_per_step": 200.0, "processes": 1, "steps": 3, **changes})


def test_the_table_says_what_is_known_and_nothing_else():
    known = small_cost(pairs_per_step=2, flops_per_step=4 * 10**12, peak_flops=1e14, kwh=0.5, device_memory=3.0)
    text = cost_table(known)
    assert all(part in text for part in ("20.0%", "0.5 kWh", "GPU hours", "\n  pairs/s"))
    text = cost_table(small_cost(flops_per_step=4 * 10**12))
    assert "TFLOP/s" in text
    assert "CPU hours" in text
    assert "utilisation" not in text
    assert "kWh" not in text


def test_waiting_is_told_with_both_rates():
    seconds = {"data": 4.0, "views": 1.0, "model": 4.0, "optimizer": 1.0, "rest": 0.0}
    text = waiting(seconds, 30, workers=2)
    assert "40% of the time" in text
    assert "delivers 3 pairs a second and the steps could take 5;" in text
    assert "delivers 7.5 pairs" in waiting(seconds, 30, workers=0)  # reading and training take turns
    assert waiting({**seconds, "data": 0.5}, 30, workers=2) == ""


@pytest.mark.parametrize(
    ("name", "precision", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", "bf16-mixed", 989.4e12),
        ("NVIDIA H100 PCIe", "16-mixed", 756e12),
        ("NVIDIA A100-SXM4-80GB", "32-true", 156e12),
        ("NVIDIA L40S", "bf16-mixed", 362e12),
        ("NVIDIA A100-SXM4-80GB", "64-true", 0.0),
        ("A card of next year", "bf16-mixed", 0.0),
    ],
)
def test_peaks_are_known_by_name(name: str, precision: str, peak: float, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_flops(torch.device("cuda", 0), precision) == pytest.approx(peak)
    assert peak_flops(torch.device("cpu"), precision) == 0


def test_power_that_cannot_be_read_is_unknown(monkeypatch):
    from lssl.utils.peak import power

    def absent(device):
        raise ModuleNotFoundError("pynvml")

    monkeypatch.setattr(torch.cuda, "power_draw", absent)
    assert power(torch.device("cuda", 0)) is None
    monkeypatch.setattr(torch.cuda, "power_draw", lambda device: 250_000)
    assert power(torch.device("cuda", 0)) == 250
    account = Account()
    account._watts, account._power_at = 250.0, 0.0
    account._add_energy(types.SimpleNamespace(type="cuda"), 2, 36.0)
    assert account._kwh == pytest.approx(2 * 250 * 36 / 3.6e6)
