"""The Segmenter: sides in the mirror, consistency through the frame, what is trained, and runs from end to end."""

import math
import shutil
import subprocess
import sys
from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from helpers import TINY_NET, fit, sentence, tiny
from monai.networks.nets import BasicUNet

from lssl import Backbone, Segmenter, ViewSampler
from lssl.checkpoint import load_task
from lssl.cli.main import main
from lssl.segmentation.classes import Classes
from lssl.utils.errors import InputError

SIDES = Classes(("left", "right"), ((17,), (53,)), False)


def segmenter(size=16, channels=1, flip=0.0, mirrored_class=(0, 1, 2), views=None, **options):
    """A Segmenter whose network is given later, by :func:`answer`."""
    network = BasicUNet(3, channels, 4, (4, 4, 4, 4, 4, 4), norm=("batch", {}))
    backbone = Backbone(network, {"decoder.0": "upcat_1.convs.conv_1"}, in_channels=channels)
    views = {"affine_probability": 0.0, "flip": (flip, 0.0, 0.0), "transforms": [], **(views or {})}
    made = Segmenter(backbone, views=ViewSampler(size, **views), **options)
    made.build(SIDES, torch.ones(3), torch.tensor(mirrored_class), torch.ones(3))
    return made


def answer(made, monkeypatch, function):
    """Lets a function of the image stand for the network."""
    monkeypatch.setattr(made.backbone, "outputs", lambda image: [function(image)])
    monkeypatch.setattr(made, "head", torch.nn.Identity())
    monkeypatch.setattr(made, "logits", function)


# --- terms ------------------------------------------------------------------------------------------------------------


def by_apparent_side(image):
    """Says *left* in the first half of a view and *right* in the second, as a network that knows heads would."""
    half = image.shape[2] // 2
    logits = torch.full((len(image), 3, *image.shape[2:]), -20.0)
    logits[:, 1, :half] = logits[:, 2, half:] = 20.0
    return logits


@pytest.mark.parametrize("flip", [0.0, 1.0])
def test_sides_survive_the_mirror(flip, make_batch, generator, monkeypatch):
    batch = make_batch(size=(16, 16, 16), affine="unit", labels=True)
    batch.labels[:, :, :8], batch.labels[:, :, 8:] = 17, 53
    made = segmenter(flip=flip, mirrored_class=(0, 2, 1), views={"overlap": 1.0})
    answer(made, monkeypatch, by_apparent_side)
    views = made.views(batch, generator)
    assert (views[0].label[:, :, :8] == (53 if flip else 17)).all()
    assert made.terms(*views)["supervised"].item() == pytest.approx(0.0, abs=1e-4)


def test_mirrored_views_turned_and_zoomed_too(make_batch, generator, monkeypatch):
    """Which view is mirrored is read off its matrix; here views of one pair are mirrored each on its own."""
    batch = make_batch(pairs=8, size=(24, 24, 24), affine="oblique", labels=True)
    made = segmenter(
        flip=0.5,
        mirrored_class=(0, 2, 1),
        views={"affine_probability": 1.0, "rotation": 15.0, "flip_together": False},
    )
    logits = torch.randn(8, 3, 16, 16, 16)
    mirrored = []
    for view in made.views(batch, generator):
        swapped = made.unmirrored(logits, view)
        seen = (swapped[:, 1] == logits[:, 2]).flatten(1).all(1)
        mirrored += seen.tolist()
        determinant = torch.linalg.det((torch.linalg.inv(view.source_affine) @ view.affine)[:, :3, :3])
        assert torch.equal(seen, determinant < 0)
    assert 0 < sum(mirrored) < 16


def by_place(image):
    """Three soft classes that depend on the place in the frame alone, which the image's channels hold."""
    return torch.stack([torch.zeros_like(image[:, 0]), (image[:, 0] + 40) / 6, (image[:, 1] - 12) / 6], 1)


@pytest.mark.parametrize("geometry", ["independent", "shared"])
def test_consistency_compares_places_not_voxels(geometry, make_batch, generator, monkeypatch):
    """Two views with their own shift, turn and zoom: predictions that agree in the frame agree."""
    batch = make_batch(size=(40, 36, 36), image="frame")  # holds every turned view, so that none is padded,
    views = {"affine_probability": 1.0, "geometry": geometry, "overlap": 0.2}  # nor takes the first one's box

    made = segmenter(channels=3, flip=0.5, views=views, loss_weights={"consistency": 1.0}, targets="soft")
    answer(made, monkeypatch, by_place)
    first, second = made.views(batch, generator)
    assert (first.affine - second.affine).abs().max() > 0.5
    assert made.terms(first, second)["consistency"].item() < 2e-3
    moved = first.affine.clone()
    moved[:, 0, 3] += 3.0
    wrong = made._consistency(*(by_place(v.image) for v in (first, second)), first, second)
    first.affine = moved
    assert made._consistency(*(by_place(v.image) for v in (first, second)), first, second) > 5 * wrong


def test_both_directions_count_and_targets_are_detached(make_batch, generator):
    batch = make_batch(size=(16, 16, 16), affine="unit")
    made = segmenter(loss_weights={"consistency": 1.0}, views={"overlap": 1.0})
    first, second = made.views(batch, generator)
    one = torch.randn(2, 3, 16, 16, 16, requires_grad=True)
    other = torch.randn(2, 3, 16, 16, 16, requires_grad=True)
    loss = made._consistency(one, other, first, second)
    valid = torch.ones(2, 16, 16, 16, dtype=torch.bool)
    halves = [made.consistency(a.softmax(1), b.softmax(1), valid) for a, b in ((one, other), (other, one))]
    torch.testing.assert_close(loss, (halves[0] + halves[1]) / 2)
    found = torch.autograd.grad(loss, one)[0]
    torch.testing.assert_close(found, torch.autograd.grad(halves[0], one)[0] / 2)


def test_long_intervals_and_early_steps_count_less(make_batch, generator):
    batch = make_batch(size=(16, 16, 16), affine="unit")  # two years apart
    made, weighted = (segmenter(loss_weights={"consistency": 1.0}, interval=value) for value in (None, 2.0))
    weighted.load_state_dict(made.state_dict())
    first, second = made.views(batch, generator)
    plain, less = (part.eval().terms(first, second)["consistency"] for part in (made, weighted))
    assert less.item() == pytest.approx(plain.item() * math.exp(-1), rel=1e-5)
    made.ramp, made._trainer = 0.5, SimpleNamespace(estimated_stepping_batches=100, global_step=0)
    rises = []
    for step in (0, 25, 50, 99):
        made._trainer.global_step = step
        rises.append(made._rise())
    assert rises == pytest.approx([math.exp(-5), math.exp(-5 / 4), 1.0, 1.0])


def test_views_without_labels_leave_the_supervised_term_alone(make_batch, generator):
    batch = make_batch(size=(16, 16, 16), affine="unit", labels=True)
    batch.labels.fill_(-1)
    batch.labels[0] = 17
    made = segmenter().eval()
    views = made.views(batch, generator)
    alone = made.supervised(made.logits(torch.cat([v.image[:1] for v in views])), torch.ones(2, 16, 16, 16).long())
    torch.testing.assert_close(made.terms(*views)["supervised"], alone)
    batch.labels = None
    assert not made.terms(*made.views(batch, generator))


# --- what is trained --------------------------------------------------------------------------------------------------


def test_learning_rates_by_part_and_by_module():
    network = BasicUNet(3, 1, 4, (4, 4, 4, 4, 4, 4), norm=("batch", {}))
    taps = {"bottleneck": "down_4.convs.conv_1", "decoder.0": "upcat_1.convs.conv_1"}
    multipliers = {"encoder": 0.1, "down_1": 0.0, "down_1.convs.conv_1": 0.5, "head": 2.0}
    made = Segmenter(Backbone(network, taps), views=ViewSampler(32), lr_multipliers=multipliers)
    made.build(SIDES, torch.ones(3), torch.arange(3), torch.ones(3))
    expected = {}
    for name, parameter in made.named_parameters():
        path = name.removeprefix("backbone.network.")
        part = 0.1 if path.startswith(("conv_0", "down_")) else 2.0 if path.startswith("head") else 1.0
        part = 0.5 if "down_1.convs.conv_1." in path else 0.0 if path.startswith("down_1.") else part
        expected.setdefault(part, set()).add(id(parameter))
    found = {factor: {id(parameter) for parameter in group} for factor, group in made.parameter_groups().items()}
    frozen = expected.pop(0.0)
    assert found == expected
    made.start()
    assert {id(p) for p in made.parameters() if not p.requires_grad} == frozen
    norms = {name: m.training for name, m in made.train().named_modules() if isinstance(m, torch.nn.BatchNorm3d)}
    still = {name for name, training in norms.items() if not training}
    assert still == {name for name in norms if "down_1.convs.conv_0" in name}
    assert len(still) == 1


def test_weights_that_the_user_froze_stay_frozen():
    network = BasicUNet(3, 1, 4, (4, 4, 4, 4, 4, 4), norm=("batch", {}))
    network.conv_0.requires_grad_(False)
    made = Segmenter(Backbone(network, {"bottleneck": "down_4.convs.conv_1"}), views=ViewSampler(32))
    made.build(SIDES, torch.ones(3), torch.arange(3), torch.ones(3))
    made.start()
    trained = {id(parameter) for group in made.parameter_groups().values() for parameter in group}
    assert not trained & {id(parameter) for parameter in network.conv_0.parameters()}
    assert trained == {id(parameter) for parameter in made.parameters() if parameter.requires_grad}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"lr_multipliers": {"encodr": 0.1}}, "no part 'encodr' of the network; did you mean 'encoder'"),
        ({"lr_multipliers": {"head": -1.0}}, "0 or more, not -1"),
        ({"interval": 0.0}, "interval: give a number above 0"),
        ({"threshold": 1.0}, "threshold: give a probability"),
        ({"ramp": 2.0}, "ramp is a share"),
        ({"loss_weights": {"consistancy": 1.0}}, "no term 'consistancy'"),
    ],
)
def test_refused_options(options, words):
    with pytest.raises(InputError, match=words):
        segmenter(**options)


# --- from end to end --------------------------------------------------------------------------------------------------

QUIET = ["--data.init_args.few_shot.steps=2", "--model.init_args.classes={'white matter': [2, 41], 'cortex': [3, 42]}"]


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    return fit(
        tmp_path_factory.mktemp("pretrained"), "demo.yaml", options=["--trainer.callbacks=null"], backbone=TINY_NET
    )


def fine_tune(folder, pretrained, *options):
    """From the checkpoint, with a frozen encoder."""
    checkpoint = pretrained / "checkpoints" / "last.ckpt"
    start = [f"--model.init_args.pretrained={checkpoint}", "--model.init_args.lr_multipliers={encoder: 0}"]
    return fit(folder, "demo_finetune.yaml", options=[*QUIET, *start, *options], backbone=TINY_NET)


@pytest.fixture(scope="module")
def run(pretrained, tmp_path_factory):
    return fine_tune(tmp_path_factory.mktemp("run"), pretrained)


def state(run, name="last"):
    return torch.load(run / "checkpoints" / f"{name}.ckpt", weights_only=False)["state_dict"]


def test_it_starts_from_the_checkpoint_and_leaves_what_is_frozen(run, pretrained):
    before, after = state(pretrained), state(run)
    network = [name for name in before if name.startswith("backbone.network.")]
    changed = {name for name in network if not torch.equal(before[name], after[name])}
    assert changed
    assert not [name for name in changed if name.startswith(("backbone.network.conv_0", "backbone.network.down_"))]
    assert after["head.weight"].shape[0] == 3


def test_scores_files_and_pictures(run, pretrained, capsys):
    kept = run.with_name("moved")
    shutil.move(pretrained, kept)  # testing needs the run's own checkpoint only
    main(["test", "--config", str(run / "config.yaml"), "--ckpt_path", "best"])
    shutil.move(kept, pretrained)
    said = capsys.readouterr().out
    assert "mean over subjects" in said
    rows = [line for line in said.splitlines() if line.startswith(("┃", "│"))]
    assert 0 < max(map(len, rows)) <= 80
    assert any(line.startswith("│white matter") for line in rows)
    assert said.count("mean over subjects") == 1
    assert "Test metric" not in said  # Lightning's own table, of the same figures
    assert said.splitlines()[-2] == f"Folder: {run / 'test' / 'phantom'}"
    assert said.splitlines()[-1] == f"Next: lssl predict --config {run / 'config.yaml'} --ckpt_path best"
    table = pd.read_csv(run / "test" / "phantom" / "segmentation.csv")
    assert list(table.columns) == ["subject", "session", "structure", "metric", "value", "cluster"]
    assert set(table["structure"]) == {"white matter", "cortex"}
    assert {"dice", "missed", "volume", "true_volume", "true_aspc", "true_stcs", "trajectory_error"} <= set(
        table["metric"]
    )
    assert len(table[table["metric"] == "true_volume"]) == 2 * 2  # one subject, two visits, two structures
    assert {path.name for path in (run / "test" / "phantom" / "pictures").iterdir()} == {f"{table['subject'][0]}.png"}
    assert "test/dice" in (run / "test" / "metrics.csv").read_text()


def test_prediction_of_a_folder_and_of_a_file(run, bids, capsys):
    """From phantoms of 5 mm to files of 4 mm, whose grid the label maps take."""
    command = ["predict", "--config", str(run / "config.yaml"), "--ckpt_path", "best"]
    main([*command, "--data", str(bids)])
    folder = run / "predict" / "bids"
    *_, where, then = capsys.readouterr().out.splitlines()
    assert where == f"Folder: {folder}"
    assert then == f"Next: lssl export {run / 'checkpoints' / 'best.ckpt'} {run / 'export'}"
    files = sorted(path.name for path in folder.rglob("*.nii.gz"))
    assert len(files) == 10
    assert files[0] == "sub-01_ses-M000_desc-lssl_dseg.nii.gz"
    written = nib.load(folder / "sub-01" / "ses-M000" / "anat" / files[0])
    source = nib.load(bids / "sub-01" / "ses-M000" / "anat" / "sub-01_ses-M000_T1w.nii.gz")
    assert written.shape == source.shape
    np.testing.assert_array_equal(written.affine, source.affine)
    labels = np.asarray(written.dataobj)
    assert set(np.unique(labels)) <= {0, 2, 3}
    volumes = pd.read_csv(folder / "volumes.csv")
    assert len(volumes) == 20
    mine = volumes.query("subject == 'sub-01' and session == 'ses-M000' and structure == 'cortex'")["mm3"].item()
    assert mine == (labels == 3).sum() * 64
    assert (folder / "desc-lssl_dseg.tsv").read_text() == "index\tname\n2\twhite matter\n3\tcortex\n"
    file = bids / "sub-02" / "ses-M012" / "anat" / "sub-02_ses-M012_T1w.nii.gz"
    main([*command, "--data", str(file)])
    assert len(pd.read_csv(run / "predict" / "sub-02_ses-M012_T1w" / "volumes.csv")) == 2
    assert len(pd.read_csv(folder / "volumes.csv")) == 20
    assert (folder / "trajectories.png").stat().st_size > 10_000
    assert len(list((folder / "pictures").iterdir())) == 5
    change = pd.read_csv(folder / "change.csv")
    assert len(change) == 5 * 2
    assert change["years"].tolist() == [1.0] * 10  # M000 and M012
    assert change["ml_per_year_se"].isna().all()
    assert not [path for path in folder.rglob("*") if ".part" in path.name]


def test_a_strategy_out_of_its_checkpoint(run):
    loaded = load_task(run / "checkpoints" / "last.ckpt")
    assert isinstance(loaded, Segmenter)
    assert loaded.segment(torch.rand(1, 20, 20, 20), torch.eye(4).double() * 5).shape == (20, 20, 20)


def test_unlabelled_pairs_change_no_crop_of_the_labelled(tmp_path, run, pretrained):
    """The first step's supervised term is the same with and without them."""
    other = fine_tune(tmp_path, pretrained, "--model.init_args.loss_weights.consistency=1")
    without, with_pairs = (pd.read_csv(made / "metrics.csv") for made in (run, other))
    first, second = (log["train/supervised"].dropna().iloc[0] for log in (without, with_pairs))
    assert first == second
    assert "train/consistency" in with_pairs
    assert "train/consistency" not in without


@pytest.mark.slow
def test_a_resumed_run_continues_exactly(tmp_path):
    weights = []
    for name, stages in {"whole": [4], "halves": [2, 4]}.items():
        (tmp_path / name).mkdir()
        for number, stop in enumerate(stages):
            options = [*QUIET, f"--trainer.max_steps={stop}", "--model.init_args.schedule=null"]
            options += ["--model.init_args.loss_weights.consistency=1"]
            if number:  # what it once started from may be gone
                options += ["--ckpt_path=last", "--model.init_args.pretrained=nowhere.ckpt"]
            made = fit(tmp_path / name, "demo_finetune.yaml", options=options, backbone=TINY_NET)
        weights.append(state(made))
    for name, value in weights[0].items():
        torch.testing.assert_close(weights[1][name], value, rtol=0, atol=0, msg=name)


@pytest.mark.slow
def test_two_processes_train_together(tmp_path):
    options = [*QUIET, "--trainer.devices=2", "--trainer.strategy=ddp", "--data.init_args.subjects=6"]
    args = ["fit", "--config", "configs/demo_finetune.yaml", *tiny(tmp_path, backbone=TINY_NET), *options]
    command = [sys.executable, "-m", "lssl", *args, "--model.init_args.loss_weights.consistency=1"]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=240)
    assert result.returncode == 0, result.stderr
    assert "val/dice" in (tmp_path / "run" / "metrics.csv").read_text()


# --- bad input --------------------------------------------------------------------------------------------------------


def refused(capsys, tmp_path, *options):
    args = ["fit", "--config", "configs/demo_finetune.yaml", *tiny(tmp_path, backbone=TINY_NET), *QUIET]
    text = sentence(capsys, *args, *options)
    assert not list((tmp_path / "run").glob("*"))
    return text


def test_an_option_that_is_misspelt(capsys, tmp_path):
    text = refused(capsys, tmp_path, "--model.init_args.pretraind=x")
    assert "Segmenter has no option 'pretraind'; did you mean 'pretrained'?" in text


def test_a_class_that_is_never_seen(capsys, tmp_path):
    text = refused(capsys, tmp_path, "--model.init_args.classes={'tumour': [99]}")
    assert "'tumour' (99) is never seen in the labelled training visits, which hold 0, 2, 3" in text


def test_checkpoints_that_do_not_fit(capsys, tmp_path, pretrained, run):
    checkpoint = pretrained / "checkpoints" / "last.ckpt"
    other = yaml.safe_dump(TINY_NET).replace("- 4\n", "- 8\n", 1)
    (tmp_path / "other.yaml").write_text(yaml.safe_dump({"backbone": yaml.safe_load(other)}))
    options = ["--config", str(tmp_path / "other.yaml"), f"--model.init_args.pretrained={checkpoint}"]
    assert "conv_0.conv_0.conv.weight is 4×1×3×3×3 there and 8×" in refused(capsys, tmp_path, *options)
    cut = tmp_path / "cut.ckpt"
    cut.write_bytes(checkpoint.read_bytes()[:5000])
    assert "is truncated" in refused(capsys, tmp_path, f"--model.init_args.pretrained={cut}")
    command = ["--config", str(run / "config.yaml")]
    assert "not a checkpoint of a Segmenter" in sentence(capsys, "test", *command, "--ckpt_path", str(checkpoint))
    for name in ("test", "predict"):
        assert "learns its classes in `lssl fit`" in sentence(capsys, name, *command)


def test_no_labelled_visit_and_no_image(capsys, tmp_path, bids, run):
    files = ["--data.init_args.root", str(bids)]
    assert "no labelled visit to train on" in refused(capsys, tmp_path, "--data=NiftiDataModule", *files)
    (tmp_path / "empty").mkdir()
    command = ["predict", "--config", str(run / "config.yaml"), "--ckpt_path", "best"]
    text = sentence(capsys, *command, "--data", str(tmp_path / "empty"))
    assert "nor a BIDS folder (sub-*)" in text


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda image: nib.Nifti1Image(np.ones(image.shape) * 0.5, image.affine), "not whole numbers"),
        (lambda image: nib.Nifti1Image(-np.ones(image.shape, np.int16), image.affine), "negative value -1"),
        (lambda image: nib.Nifti1Image(np.ones(image.shape, np.int16), image.affine * 2), "does not lie on the grid"),
    ],
)
def test_label_maps_that_are_wrong(change, words, capsys, tmp_path, bids):
    for image in bids.glob("sub-*/ses-*/anat/*_T1w.nii.gz"):
        nib.save(change(nib.load(image)), image.with_name(image.name.replace("T1w", "dseg")))
    files = [f"--data.init_args.root={bids}", "--data.init_args.labels={subject}/{session}/anat/*_dseg.nii.gz"]
    assert words in refused(capsys, tmp_path, "--data=NiftiDataModule", *files)
