"""The summary names parts and weights; operations that nobody counted are not shown as 0."""

import lightning as L
import torch
from lightning.pytorch.demos.boring_classes import BoringModel
from torch import nn

from lssl.callbacks import Summary


class Model(BoringModel):
    def __init__(self):
        super().__init__()  # 64 weights and 2 biases
        self.frozen = nn.Linear(10, 10).requires_grad_(False)


def test_parts_and_their_sum(capsys, tmp_path):
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
    trainer = L.Trainer(max_steps=1, limit_val_batches=0, callbacks=[Summary()], default_root_dir=tmp_path, **quiet)
    trainer.fit(Model(), torch.utils.data.DataLoader(torch.randn(2, 32)))
    said = capsys.readouterr().out
    assert "FLOP" not in said
    assert [line.split("│")[1:4] for line in said.splitlines() if line.startswith("│")] == [
        [" layer  ", " Linear ", "     66 "],
        [" frozen ", " Linear ", "    110 "],
    ]
    assert "176 weights (0.000704 MB), of which 66 are trained." in said
