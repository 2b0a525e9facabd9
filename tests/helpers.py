"""Runs the command line on something tiny."""

import os
import time
from pathlib import Path

import lightning as L
import pytest
import torch
import yaml

from lssl.cli.main import main

ROOT = Path(__file__).parents[1]
TINY_NET = {
    "network": {
        "class_path": "monai.networks.nets.BasicUNet",
        "init_args": {
            "spatial_dims": 3,
            "in_channels": 1,
            "out_channels": 4,
            "features": [4, 4, 4, 4, 4, 4],
            "norm": "batch",
        },
    }
}


#: Of a run that is wanted for its checkpoint alone.
CHECKPOINT = ["--trainer.max_steps=1", "--trainer.limit_val_batches=0", "--trainer.callbacks=null"]


def few(cases, quick):
    """Cases of one kind: the first ones for every run of the suite, all others marked slow."""
    cases = [*cases]
    rest = (
        pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=pytest.mark.slow) for case in cases[quick:]
    )
    return [*cases[:quick], *rest]


VISIT_ORDER = '''
import torch
import torch.nn.functional as F
from lssl import Projector, Strategy


class VisitOrder(Strategy):
    """Predict which of two visits came first."""

    def __init__(self, backbone, tap: str = "bottleneck", **common):
        super().__init__(backbone, **common)
        self.head = Projector(2 * backbone.taps[tap].channels, 128, 1)
        self.tap = tap

    def terms(self, first, second, batch):
        a, b = (self.backbone(view.image, [self.tap])[self.tap].mean((2, 3, 4)) for view in (first, second))
        logit = self.head(torch.cat([a, b], 1)).squeeze(1)
        return {"order": F.softplus(-logit).mean()}
'''


def tiny(tmp_path, **groups):
    """A config that makes any other one small; later than all of them on the command line."""
    config = {
        "views": {"size": 32},
        "data": {
            "class_path": "PhantomDataModule",
            "init_args": {"subjects": 4, "visits": 2, "size": 40, "spacing": 5.0, "num_workers": 0},
        },
        "trainer": {
            "max_steps": 2,
            "precision": "32-true",
            "check_val_every_n_epoch": 1,
            "log_every_n_steps": 1,
            "default_root_dir": str(tmp_path / "run"),
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "accelerator": "cpu",
        },
    }
    config["data"]["init_args"]["split"] = [0.5, 0.25, 0.25]
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(config | groups))
    return ["--config", str(path)]


def fit(tmp_path, *configs, options=(), **groups):
    args = ["fit"]
    for config in configs:
        args += ["--config", str(ROOT / "configs" / config)]
    main([*args, *tiny(tmp_path, **groups), *options])
    return tmp_path / "run"


def resolved(capsys, *args):
    """What a command's config resolves to, as text."""
    with pytest.raises(SystemExit) as stop:
        main(["fit", *args, "--print_config"])
    assert not stop.value.code
    return capsys.readouterr().out


class Interrupt(L.Callback):
    """Ends a run before its last step, as a time limit would."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        trainer.should_stop = trainer.global_step >= self.step


class SignalAt(L.Callback):
    """Sends a signal to this process, within a step or within the validation after it."""

    def __init__(self, number: int, step: int, validation: bool = False, times: int = 1) -> None:
        self.number, self.step, self.validation, self.times = number, step, validation, times

    def on_before_optimizer_step(self, trainer, *_):
        if trainer.global_step == self.step - 1 and not self.validation:
            self._send()

    def on_validation_batch_start(self, trainer, *_):
        if self.validation and trainer.global_step == self.step and not trainer.sanity_checking:
            self._send()

    def _send(self):
        for _ in range(self.times):
            os.kill(os.getpid(), self.number)
            time.sleep(0.3)


def sentence(capsys, *args):
    """The one line on standard error that starts with ``lssl: error:``."""
    with pytest.raises(SystemExit) as stop:
        main(list(args))
    assert stop.value.code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("lssl: error: ")]
    assert len(lines) == 1
    return lines[0].removeprefix("lssl: error: ")


def unlike(strategy):
    """The strategy, its teacher (if any) moved off the online network, so that one cannot stand for the other."""
    if strategy.teacher is not None:
        with torch.no_grad():
            for parameter in strategy.teacher.parameters():
                parameter += 0.2 * torch.randn_like(parameter)
    return strategy
