"""The bar and the lines that say how far a run is."""

import io
import sys

import lightning as L
import pytest
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch.utils.data import DataLoader

from lssl.callbacks import Progress


class Model(L.LightningModule):
    """The smallest one that logs."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)

    def training_step(self, batch, batch_idx):
        loss = self.layer(batch).mean()
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val/loss", self.layer(batch).mean())

    test_step = validation_step

    def predict_step(self, batch, batch_idx):
        return self.layer(batch)

    def on_train_end(self):
        print("┏━━ table ━━┓\n┃ of results ┃\n┗━━━━━━━━━━━┛")

    def on_train_epoch_end(self):
        rank_zero_info("a message of Lightning's")

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def trained(tmp_path, **options):
    data = DataLoader(torch.ones(8, 1), batch_size=2)
    trainer = L.Trainer(
        max_epochs=3,
        accelerator="cpu",
        callbacks=[Progress()],
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
        **options,
    )
    trainer.fit(Model(), data, data)
    return trainer, data


class Terminal(io.StringIO):
    """Text that claims to be a terminal's."""

    def isatty(self):
        return True


@pytest.mark.filterwarnings("ignore")
def test_a_pipe_gets_one_line_per_validation(tmp_path, capsys):
    trained(tmp_path)
    out = capsys.readouterr().out
    assert "\r" not in out
    lines = [line for line in out.splitlines() if line.startswith("step ")]
    assert [line.split(";")[0] for line in lines] == [
        "step 4 of 12 (33%)",
        "step 8 of 12 (67%)",
        "step 12 of 12 (100%)",
    ]
    assert all("val/loss" in line and "train/loss" in line for line in lines)
    assert lines[0].endswith("left")


@pytest.mark.filterwarnings("ignore")
def test_a_terminal_gets_one_bar_that_ends_before_the_table(tmp_path, monkeypatch):
    screen = Terminal()
    monkeypatch.setattr(sys, "stdout", screen)
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setenv("TERM", "xterm")
    trainer, data = trained(tmp_path)
    text = screen.getvalue()
    assert "12/12" in text
    table = text[text.index("┏") :]
    assert table.startswith("┏━━ table ━━┓\n┃ of results ┃\n┗━━━━━━━━━━━┛\n")
    assert "training" not in table
    assert "step 4" not in text
    for line in text.splitlines():  # what Lightning says while the bar is there has a line of its own
        if "a message of Lightning's" in line:
            assert "training" not in line.rpartition("\x1b[2K")[2]
    for run in (trainer.test, trainer.validate, trainer.predict):
        run(Model(), data)
    assert all(f"{word} " in screen.getvalue() for word in ("testing", "validating", "predicting"))
    assert "4/4" in screen.getvalue()


@pytest.mark.filterwarnings("ignore")
def test_an_endless_run_has_no_time_left(tmp_path, capsys):
    class Stop(L.Callback):
        def on_train_batch_end(self, trainer, *_):
            trainer.should_stop = trainer.global_step >= 4

    trainer = L.Trainer(
        max_epochs=-1, accelerator="cpu", callbacks=[Progress(), Stop()], logger=False, enable_checkpointing=False
    )
    data = DataLoader(torch.ones(8, 1), batch_size=2)
    trainer.fit(Model(), data, data)
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step ")]
    assert line.startswith("step 4; ")
    assert "left" not in line
