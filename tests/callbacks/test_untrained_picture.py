"""The picture of similarity keeps what the untrained network found."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import nn

import lssl.callbacks.pictures as pictures
import lssl.pictures.similarity as similarity
from lssl import Backbone, Strategy, ViewSampler


class Nothing(Strategy):
    """A method without a task."""

    def terms(self, first, second, batch):
        return {"nothing": first.image.mean()}


def test_the_untrained_network_stands_beside_every_later_step(make_batch, tmp_path, monkeypatch):
    task = Nothing(
        Backbone(nn.Sequential(nn.Conv3d(1, 4, 3, padding=1)), {"only": "0"}), ViewSampler(12, transforms=[])
    )
    batch, drawn = make_batch(1, image="noise"), []
    monkeypatch.setattr(pictures, "held_out_batch", lambda trainer, pair: batch)
    monkeypatch.setattr(pictures, "trained_taps", lambda task: ["only"])
    monkeypatch.setattr(similarity, "draw_similarity", lambda maps, path, tap: drawn.append(maps))
    trainer = SimpleNamespace(global_step=0, is_global_zero=True, default_root_dir=str(tmp_path), loggers=[])
    callback = pictures.Pictures(every=1)
    callback.on_train_start(trainer, task)
    for step in (1, 2):
        nn.init.normal_(task.backbone.network[0].weight)
        trainer.global_step = step
        callback.on_train_batch_end(trainer, task, None, None, 0)
    assert [list(maps) for maps in drawn] == [["untrained", "step 1"], ["untrained", "step 2"]]
    values = [{name: value for name, (_, value) in maps.items()} for maps in drawn]
    torch.testing.assert_close(values[0]["untrained"], values[1]["untrained"], atol=0, rtol=0)
    assert (values[0]["untrained"] - values[0]["step 1"]).abs().mean() > 0.05

    resumed = pictures.Pictures(every=1)
    resumed.on_train_start(trainer, task)  # at step 2
    trainer.global_step = 3
    resumed.on_train_batch_end(trainer, task, None, None, 0)
    assert list(drawn[-1]) == ["step 3"]
