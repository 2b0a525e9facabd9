"""The previous visit as context of a Segmenter: whose it is, where it is, when there is none; runs from end to end."""

from __future__ import annotations

import json
import re
from functools import partial

import lightning as L
import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import torch
from helpers import CHECKPOINT, ROOT, TINY_NET, fit, sentence, tiny
from monai.networks.nets import BasicUNet
from torch import nn

import lssl
from lssl import Backbone, InputError, PairDataModule, Segmenter, ViewSampler, Visit
from lssl.cli.main import main
from lssl.data.few_shot import FewShot
from lssl.datamodules.phantom import PhantomDataModule
from lssl.segmentation.classes import Classes

SPOT = Classes(("spot",), ((1,),), True)


def task(channels=2, size=16, **options):
    made = BasicUNet(3, channels, 4, (4, 4, 4, 4, 4, 4), norm=("batch", {}))
    backbone = Backbone(made, {"decoder.0": "upcat_1.convs.conv_1"}, in_channels=channels)
    views = ViewSampler(size, geometry="aligned", transforms=[], **options.pop("views", {}))
    segmenter = Segmenter(backbone, context="previous", views=views, **options)
    segmenter.build(SPOT, torch.ones(3), torch.tensor([0, 1]), torch.ones(2))
    return segmenter.eval()


def seen(segmenter, monkeypatch):
    """What the network is shown in training."""
    shown = []

    def outputs(image):
        shown.append(image.clone())
        return [torch.zeros(len(image), 4, *image.shape[2:])]

    monkeypatch.setattr(segmenter.backbone, "outputs", outputs)
    return shown


# --- data -------------------------------------------------------------------------------------------------------------


def test_first_visits_come_with_themselves_and_none_is_left_out(caplog):
    caplog.set_level("INFO")
    data = PhantomDataModule(subjects=6, visits=3, size=24, spacing=8.0, single_visit_fraction=0.34, num_workers=0)
    data.setup()
    data.use_labels(unlabelled_pairs=False, previous="where known")
    assert "left out" not in caplog.text
    first = data.table["visit"] == 0
    expected = [[row - (not first[row]), row] for row in range(len(data.table))]
    assert [batch.session[0].tolist() for batch in data.predict_dataloader()] == expected
    held_out = np.flatnonzero(data.table["split"] == "test")
    assert [batch.session[0].tolist() for batch in data.test_dataloader()] == [expected[row] for row in held_out]


# --- what the network sees --------------------------------------------------------------------------------------------


def test_both_visits_show_one_place_and_labels_are_the_later_ones(make_batch, generator, monkeypatch):
    """Images are their own coordinates, on oblique grids that lie apart; three channels each."""
    segmenter = task(6, context_dropout=0.0, views={"rotation": 15.0})
    segmenter.generator = generator
    shown, targets = seen(segmenter, monkeypatch), []
    monkeypatch.setattr(segmenter, "to_class_index", lambda label: targets.append(label) or label.clamp(0, 1).long())
    batch = make_batch(4, (28, 26, 24), "frame", labels=True)
    batch.session = torch.tensor([[0, 1], [2, 3], [4, 5], [6, 7]])
    batch.labels[:, 0], batch.labels[:, 1] = 0, 1
    assert segmenter.losses({"labelled": batch})["supervised"].isfinite()
    earlier, later = shown[0].chunk(2, 1)
    both = ((earlier != 0).all(1) & (later != 0).all(1))[:, 2:-2, 2:-2, 2:-2]
    apart = (earlier - later).abs().amax(1)[:, 2:-2, 2:-2, 2:-2]
    assert both.sum() > 4 * 12**3 / 2
    assert apart[both].median() < 1e-3
    assert set(targets[0].unique().tolist()) <= {-1, 1}


def test_without_a_previous_visit_or_dropped_its_channels_are_zero(make_batch, generator, monkeypatch):
    batch = make_batch(4, (20, 20, 20), labels=True)
    batch.session = torch.tensor([[0, 1], [2, 2], [3, 4], [5, 5]])
    kept = {}
    for dropout in (0.0, 1.0, 0.5):
        segmenter = task(context_dropout=dropout)
        segmenter.generator = torch.Generator().manual_seed(3)
        shown = seen(segmenter, monkeypatch)
        draws = [segmenter.losses(batch) for _ in range(20)]
        assert len(draws) == len(shown)
        kept[dropout] = torch.stack([image[:, 0].flatten(1).any(1) for image in shown]).float().mean(0).tolist()
        assert all(image[:, 1].flatten(1).any(1).all() for image in shown)
    assert kept[0.0] == [1, 0, 1, 0]
    assert kept[1.0] == [0, 0, 0, 0]
    assert 0.2 < kept[0.5][0] < 0.8
    assert kept[0.5][1] == kept[0.5][3] == 0


@pytest.mark.parametrize("spacing", [1.0, 1.6])
def test_whole_visits_are_segmented_in_their_context(make_batch, monkeypatch, spacing):
    """The answer is where the earlier visit is bright: the later visit's voxels of that place, on its own grid."""
    segmenter = task()
    segmenter.spacing = torch.full((3,), spacing, dtype=torch.float64)
    batch = make_batch(1, (28, 26, 24), affine="unit")
    batch.affines[0, 1, :3, 3] = torch.tensor([3.0, -2.0, 4.0])
    batch.images[:] = 0.0
    batch.images[0, 0, 0, 10:16, 8:14, 9:15] = 1.0  # in the earlier visit
    batch.extent[0, 1] = torch.tensor([24, 22, 20])  # the later one is smaller
    monkeypatch.setattr(segmenter, "logits", lambda both: torch.cat([0.5 - both[:, :1], both[:, :1] - 0.5], 1))
    batch.session = torch.tensor([[0, 1]])
    found = segmenter.segmented(batch)
    wanted = torch.zeros(24, 22, 20, dtype=torch.long)
    wanted[7:13, 10:16, 5:11] = 1
    wrong = int((found != wanted).sum())
    assert wrong == 0 if spacing == 1.0 else wrong < 0.35 * 6**3
    batch.session = torch.tensor([[1, 1]])
    assert not segmenter.segmented(batch).any()
    assert not segmenter.segment(torch.rand(1, 20, 20, 20), torch.eye(4).double()).any()


# --- a planted truth --------------------------------------------------------------------------------------------------


class Vanished(PairDataModule):
    """A spot is visible in the first visit alone; the label of the second one says where it was. Grids lie apart."""

    def visit_table(self):
        rows = [(f"s{n:03d}", f"v{visit}", 60.0 + visit, float(visit), n) for n in range(30) for visit in (0, 1)]
        return pd.DataFrame(rows, columns=["subject", "session", "age", "time", "number"])

    def has_label(self):
        return (self.table["time"] > 0).to_numpy()

    def read(self, row):
        number, later = int(self.table["number"].iloc[row]), bool(self.table["time"].iloc[row])
        draw = np.random.default_rng([number, int(later)])
        affine = np.eye(4)
        affine[:3, 3] = draw.uniform(-1.5, 1.5, 3) - 9.5
        places = np.stack(np.meshgrid(*[np.arange(20)] * 3, indexing="ij"), -1) + affine[:3, 3]
        distance = np.linalg.norm(places - np.random.default_rng(number).uniform(-4, 4, 3), axis=-1)
        image = 0.5 + 0.05 * draw.standard_normal((20, 20, 20)) + (0 if later else 0.4) * np.clip(3.5 - distance, 0, 1)
        label = torch.from_numpy((distance < 3).astype(np.int16)) if later else None
        image, head = torch.from_numpy(image[None]).float(), torch.ones(20, 20, 20, dtype=torch.bool)
        return Visit(image, torch.from_numpy(affine), head, label=label)


@pytest.mark.slow
def test_what_only_the_earlier_visit_shows_is_found_with_it_and_not_without(tmp_path):
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for width in (2, 8):
        layers += [nn.Conv3d(width, 8, 3, padding=1), nn.BatchNorm3d(8), nn.ReLU()]
    segmenter = Segmenter(
        Backbone(nn.Sequential(*layers), {"decoder.0": "3"}, in_channels=2),
        context="previous",
        classes={"spot": [1]},
        views=ViewSampler(16, geometry="aligned", rotation=5.0, transforms=[]),
        optimizer=partial(torch.optim.AdamW, lr=1e-2),
    )
    data = Vanished(split=(0.7, 0.0, 0.3), few_shot=FewShot(batch_size=8, steps=150), num_workers=0)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    L.Trainer(max_steps=150, accelerator="cpu", default_root_dir=tmp_path, enable_model_summary=False, **quiet).fit(
        segmenter, datamodule=data
    )
    segmenter.eval()
    dice: dict[bool, list[float]] = {True: [], False: []}
    for batch in data.test_dataloader():
        if batch.labels is None:  # a first visit
            continue
        truth = batch.labels[0, 1] == 1
        for known in dice:
            batch.session = batch.session if known else batch.session[:, [1, 1]]
            found = segmenter.segmented(batch) == 1
            dice[known].append(float(2 * (found & truth).sum() / (found.sum() + truth.sum())))
    assert np.mean(dice[True]) > 0.8
    assert np.mean(dice[False]) < 0.3


# --- the command line -------------------------------------------------------------------------------------------------

PHANTOM = {"subjects": 6, "visits": 2, "size": 32, "spacing": 6.0, "num_workers": 0, "split": [0.5, 0.25, 0.25]}
DATA = {"class_path": "PhantomDataModule", "init_args": {**PHANTOM, "single_visit_fraction": 0.17}}
WIDE = {"network": {**TINY_NET["network"], "init_args": {**TINY_NET["network"]["init_args"], "in_channels": 2}}}
CLASSES = "--model.init_args.classes={ventricles: [4, 43], white: [2, 41]}"
SMALL = ["--data.init_args.source_size=null", "--data.init_args.few_shot.steps=2", "--model.init_args.window_overlap=0"]


def test_from_fit_to_predict(tmp_path, capsys):
    run = fit(tmp_path, "finetune_previous.yaml", options=[*SMALL, CLASSES], data=DATA, backbone=WIDE)
    assert "val/dice" in (run / "metrics.csv").read_text()
    later = ["--config", str(run / "config.yaml"), "--ckpt_path", "last"]
    main(["test", *later])
    scores = pd.read_csv(run / "test/phantom/segmentation.csv")
    assert {"visit-00", "visit-01"} <= set(scores["session"])
    main(["predict", *later])
    files = sorted((run / "predict/phantom").glob("sub-*/ses-*/anat/*_dseg.nii.gz"))
    assert len(files) == 11
    assert {nib.load(path).shape for path in files} == {(32, 32, 32)}
    volumes = pd.read_csv(run / "predict/phantom/volumes.csv")
    assert len(volumes) == 11 * 2
    assert lssl.load(run).context == "previous"
    assert "whose answer needs two visits" in sentence(capsys, "export", str(run), str(tmp_path / "out"))
    with pytest.raises(InputError, match="trained with context: previous, and context is none here"):
        lssl.load(run).__class__(Backbone(nn.Conv3d(1, 2, 1), {"decoder.0": ""}, in_channels=1)).on_load_checkpoint(
            {"state_dict": {}, "context": "previous"}
        )


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--views.geometry=independent"], "context: previous helps where both views .* set views.geometry to aligned"),
        (["--model.init_args.loss_weights={consistency: 1}"], "exclude each other"),
        (["--model.init_args.context=next"], "context"),
        (["--model.init_args.context_dropout=2"], "context_dropout a share"),
        ([f"--backbone={json.dumps(TINY_NET)}"], "context: previous shows the network both visits as channels"),
    ],
)
def test_mistakes_are_one_sentence(options, says, tmp_path, capsys):
    args = ["--config", str(ROOT / "configs/finetune_previous.yaml"), *tiny(tmp_path, data=DATA, backbone=WIDE)]
    assert re.search(says, sentence(capsys, "fit", *args, *SMALL, CLASSES, *options))


def test_pretrained_weights_of_one_visit_are_adapted(tmp_path, caplog):
    caplog.set_level("INFO")
    (tmp_path / "before").mkdir()
    options = [SMALL[0], *CHECKPOINT]
    before = fit(tmp_path / "before", "masked_autoencoder.yaml", options=options, data=DATA, backbone=TINY_NET)
    start = [f"--model.init_args.pretrained={before / 'checkpoints/last.ckpt'}", "--trainer.max_steps=1"]
    fit(tmp_path, "finetune_previous.yaml", options=[*SMALL, CLASSES, *start], data=DATA)
    assert "The first convolution was averaged over channels and repeated" in caplog.text
