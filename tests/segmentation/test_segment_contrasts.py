"""A Segmenter of two contrasts, one of which visits may lack: learns from some, predicts from whichever is there."""

from __future__ import annotations

import lightning as L
import numpy as np
import pandas as pd
import pytest
import torch
from helpers import few
from monai.networks.nets import BasicUNet

from lssl import Backbone, InputError, PairDataModule, Segmenter, ViewSampler, Visit


class TwoContrasts(PairDataModule):
    """A ball that is bright in one contrast and dark in the other; ``lacking`` visits lack the channel that is named.

    Args:
        lacking: number of visit → channel.
    """

    def __init__(self, lacking: dict[int, int] | None = None, **options) -> None:
        super().__init__(**{"split": (0.5, 0.25, 0.25), **options})
        self.lacking = lacking or {}

    def visit_table(self) -> pd.DataFrame:
        names = [f"s{number}" for number in range(8)]
        return pd.DataFrame({"subject": names, "session": "v", "age": np.nan, "time": np.nan, "number": range(8)})

    def channels(self) -> list[str]:
        return ["T1w", "FLAIR"]

    def present(self) -> np.ndarray | None:
        if not self.lacking:
            return None
        return np.array([[self.lacking.get(row) != channel for channel in range(2)] for row in self.table["number"]])

    def read(self, row: int) -> Visit:
        place = torch.stack(torch.meshgrid(*[torch.arange(16) - 7.5] * 3, indexing="ij"))
        ball, head = place.norm(dim=0) < 4, place.norm(dim=0) < 7
        image = torch.stack([0.3 + 0.6 * ball, 0.9 - 0.6 * ball]) * head
        present = None if self.present() is None else torch.from_numpy(self.present()[row])
        if present is not None:
            image = image * present[:, None, None, None]
        return Visit(image, torch.eye(4, dtype=torch.float64), head, label=ball.short(), present=present)


def task(contrasts: str = "same") -> Segmenter:
    torch.manual_seed(0)
    network = BasicUNet(3, 2, 4, (4, 4, 4, 4, 4, 4), norm=("batch", {}))
    backbone = Backbone(network, {"decoder.0": "upcat_1.convs.conv_1"}, in_channels=2)
    views = ViewSampler(16, foreground=False, transforms=[], contrasts=contrasts, spacing=1.0)
    return Segmenter(backbone, views=views, schedule=None)


def trainer(folder, steps: int = 1) -> L.Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    return L.Trainer(max_steps=steps, accelerator="cpu", default_root_dir=folder, limit_val_batches=0, **quiet)


@pytest.mark.parametrize(
    ("contrasts", "lacking", "takes"),
    few([("same", None, False), ("mix", None, True), ("same", dict.fromkeys(range(0, 8, 2), 0), True)], 1),
)
def test_a_network_that_never_missed_a_channel_refuses_visits_that_lack_one(contrasts, lacking, takes, tmp_path):
    """One that was trained on some, or with views that hide some, takes them; the checkpoint says which it is."""
    run, path = trainer(tmp_path), tmp_path / "last.ckpt"
    run.fit(task(contrasts), TwoContrasts(lacking))
    run.save_checkpoint(path)
    assert torch.load(path, weights_only=True)["partial_channels"] == takes
    options = {"datamodule": TwoContrasts({3: 1}), "ckpt_path": path}
    if takes:
        assert len(trainer(tmp_path).predict(task(), **options)) == 8
    else:
        with pytest.raises(InputError, match="1 visit of twocontrasts lack some of the channels T1w, FLAIR"):
            trainer(tmp_path).predict(task(), **options)


def test_one_channel_leaves_no_choice(tmp_path):
    data, segmenter = TwoContrasts(), task("cross")
    data.channels = lambda: ["T1w"]
    segmenter.backbone.in_channels = 1
    with pytest.raises(InputError, match="contrasts is cross, and the images have 1 channel"):
        trainer(tmp_path).fit(segmenter, data)


@pytest.mark.slow
def test_it_segments_from_either_contrast_and_from_both(tmp_path):
    """The contrasts contradict each other, so a network must know which it sees."""
    segmenter = task("mix")
    segmenter.optimizer = lambda groups: torch.optim.AdamW(groups, lr=0.01)
    trainer(tmp_path, 150).fit(segmenter, TwoContrasts())
    segmenter.eval()
    for shown in ([True, True], [True, False], [False, True]):
        visit = TwoContrasts().read(0)
        image = visit.image * torch.tensor(shown)[:, None, None, None]
        with torch.no_grad():
            found = segmenter.segment(image, visit.affine) > 0
        truth = visit.label > 0
        dice = 2 * (found & truth).sum() / (found.sum() + truth.sum())
        assert dice > 0.9, (shown, dice)
