"""Each mistake ends in one clear sentence and a non-zero exit, before training."""

import pytest
import yaml
from helpers import ROOT, TINY_NET, sentence, tiny

SLOW = pytest.mark.slow  # of sentences, those that tests of their own rooms show, too
DEMO = ["--config", str(ROOT / "configs/demo.yaml")]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--model.init_args.qqqqqqq=1"], "LongitudinalLocal has no option 'qqqqqqq'; there are"),
        (["--model.init_args.sample=1"], "no option 'sample'; did you mean 'samples'?"),
        (["--model.class_path=LongitudinalLocl"], "no class 'LongitudinalLocl'; did you mean 'LongitudinalLocal'?"),
        (["--trainer.callbacks=EarlyStoping"], "no class 'EarlyStoping'; did you mean 'EarlyStopping'?"),
        (["--data.init_args.subject=3"], "PhantomDataModule has no option 'subject'; did you mean 'subjects'?"),
        (["--data.class_path=FantomDataModule"], "did you mean 'PhantomDataModule'?"),
        (["--views.sise=3"], "'views' has no key 'sise'; did you mean 'size'?"),
        (["--trainer.max_step=3"], "'trainer' has no key 'max_step'; did you mean 'max_steps'?"),
        (["--modell.class_path=x"], "There is no key 'modell'; did you mean 'model'?"),
        (["--trainer.max_steps=abc"], "trainer.max_steps"),
        (["--model.init_args.objective=foo"], "There is no class 'foo'; did you mean"),
        (
            ["--views.size=50"],
            "a side of 50 voxels is not divisible by 16, the stride of tap 'bottleneck'; use 48 or 64",
        ),
        pytest.param(["--views.size=16"], "leaves a single feature at tap 'bottleneck'", marks=SLOW),
        (["--views.size=80"], "Views of 80×80×80 voxels do not fit"),
        (["--backbone.taps.foo=conv_9"], "tap 'foo' names no submodule 'conv_9'"),
        pytest.param(
            ["--model.init_args.encoder_taps=[encoder.7]"],
            "no tap 'encoder.7'; the backbone has bottleneck, decoder.2",
            marks=SLOW,
        ),
        pytest.param(
            ["--model.init_args.tap_weights.encoder_1=1"],
            "tap_weights: 'encoder_1' is none of the taps used",
            marks=SLOW,
        ),
        (["--model.init_args.loss_weights.similarty=1"], "no term 'similarty'; it has covariance"),
        (["--ckpt_path=nowhere.ckpt"], "There is no checkpoint nowhere.ckpt"),
        (["--views.overlap=0"], "overlap is a share"),
        pytest.param(
            ["--views.size=-1"],
            "a side of -1 voxels is not divisible by 16, the stride of tap 'bottleneck'; use 32.",
            marks=SLOW,
        ),
        pytest.param(
            ["--trainer.accelerator=mps"],
            "trainer.accelerator: mps was asked for, and torch finds none here",
            marks=SLOW,
        ),
        (["--trainer.accelerator=gpuu"], "trainer: You selected an invalid accelerator name"),
        (["--trainer.max_steps=0"], "trainer.max_steps is 0, so nothing would be trained"),
        pytest.param(
            ["--trainer.log_every_n_steps=0"], "trainer.log_every_n_steps: give a number above 0, not 0", marks=SLOW
        ),
        (["--data.init_args.batch_size=0"], "batch_size is 0; give 1 or more."),
        pytest.param(["--data.init_args.num_workers=-1"], "num_workers is -1; give 0 or more.", marks=SLOW),
        pytest.param(
            ["--model.init_args.optimizer.init_args.lr=-1"], "optimizer: Invalid learning rate: -1.0.", marks=SLOW
        ),
        (
            ["--trainer.precision=bf16-mixed", "--views.size=32", "--trainer.accelerator=cpu"],
            "bfloat16 gradients are wrong on CPUs",
        ),
        (["--data.class_path=NiftiDataModule", "--data.init_args.root=/nowhere"], "/nowhere"),
        pytest.param(
            ["--data.init_args.transform=os.system"], "transform is system, which is no function of a visit", marks=SLOW
        ),
        (["--data.init_args.transform=torchio.RandomFlip"], "RandomFlip moves the head without moving its affine"),
    ],
)
def test_sentences(options, words, capsys, tmp_path):
    assert words in sentence(capsys, "fit", *DEMO, f"--trainer.default_root_dir={tmp_path / 'run'}", *options)
    assert not list((tmp_path / "run").glob("*"))


@pytest.mark.parametrize(
    ("config", "option", "words"),
    [
        ("global_contrastive", "objective=MoCO", "There is no class 'MoCO'; did you mean 'MoCo'?"),
        ("global_contrastive", 'objective={"class_path": "MoCo", "init_args": {"queu": 3}}', "did you mean 'queue'?"),
        pytest.param("global_contrastive", "objective.queue=0", "queue: give a number above 0, not 0", marks=SLOW),
        pytest.param(
            "global_contrastive", "objective.temperature=0", "temperature: give a number above 0, not 0", marks=SLOW
        ),
        ("global_contrastive", "interval=-1", "interval: give a number above 0, not -1"),
        pytest.param(
            "global_contrastive", "loss_weights.variance=1", "no term 'variance'; it has similarity", marks=SLOW
        ),
        pytest.param("prior_guided_local", "objective=BYOL", "There is no class 'BYOL'", marks=SLOW),
        pytest.param("prior_guided_local", "momentum=1.5", "momentum rises within 0 and 1", marks=SLOW),
        ("prior_guided_local", "min_points=200", "tap 'bottleneck' has 216 voxels in views of 96×96×96"),
    ],
)
def test_sentences_of_the_objectives(config, option, words, capsys, tmp_path):
    args = ["fit", "--config", config, "--config", "data/heads", f"--trainer.default_root_dir={tmp_path / 'run'}"]
    assert words in sentence(capsys, *args, f"--model.init_args.{option}")
    assert not list((tmp_path / "run").glob("*"))


def test_unknown_key_in_a_file(capsys, tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump({"model": {"class_path": "LongitudinalLocal", "init_args": {"nonsense": 1}}}))
    assert "has no option 'nonsense'" in sentence(capsys, "fit", "--config", str(path), "--data=PhantomDataModule")


@pytest.mark.parametrize("odd", [{"model": []}, {"backbone": {"network": []}}, {"data": {"init_args": [1]}}])
def test_a_list_in_the_place_of_settings(odd, capsys, tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump(odd))
    files = ["--config=global_contrastive", f"--config={path}", "--config=network/unet"]
    assert sentence(capsys, "fit", *files, "--data=PhantomDataModule", "--trainer.accelerator=cpu")


def test_a_file_that_is_no_yaml(capsys, tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("model: {class_path: [\n")
    text = sentence(capsys, "fit", "--config", str(path))
    assert f"{path} is not valid YAML" in text
    assert "line 2" in text


def test_unknown_command_and_config(capsys):
    assert "no command 'fitt'; did you mean 'fit'?" in sentence(capsys, "fitt")
    assert "no config configs/dem.yaml; did you mean 'demo'?" in sentence(capsys, "fit", "--config", "configs/dem.yaml")


@pytest.mark.parametrize(
    "options",
    [
        ["--config=longitudinal_infonce", "--model.init_args.samples=1000000000"],
        [
            "--config=global_contrastive",
            "--model.init_args.objective=MoCo",
            "--model.init_args.objective.queue=100000000",
        ],
    ],
)
def test_more_than_memory_holds(options, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr("lssl.callbacks.within_memory.available_memory", lambda: 10**9)
    text = sentence(capsys, "fit", *options[:1], *tiny(tmp_path, backbone=TINY_NET), *options[1:], "--monitor.every=0")
    assert "The run is out of memory: it asked for " in text
    assert "and 1 GB in all were free" in text
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("option", ["--data.init_args.subjects=1000000000", "--trainer.devices=1000000"])
def test_more_than_any_memory_holds(option, capsys, tmp_path):
    text = sentence(capsys, "fit", *DEMO, f"--trainer.default_root_dir={tmp_path / 'run'}", option)
    assert "GB of memory, of which" in text
    assert not (tmp_path / "run").exists()


def test_batch_too_small_for_the_heads(capsys, tmp_path):
    options = [
        "--data.init_args.batch_size=1",
        "--model.init_args.samples=1",
        "--model.init_args.decoder_taps=[decoder.2]",
    ]
    text = sentence(capsys, "fit", *DEMO, *tiny(tmp_path, backbone=TINY_NET), *options, "--trainer.callbacks=null")
    assert "batch normalisation needs at least 4 rows and got 2" in text


def test_a_schedule_without_end(capsys, tmp_path):
    options = ["--trainer.max_steps=-1", "--trainer.max_epochs=-1", "--trainer.callbacks=null"]
    text = sentence(capsys, "fit", *DEMO, *tiny(tmp_path, backbone=TINY_NET), *options)
    assert "set trainer.max_epochs or trainer.max_steps" in text


def test_an_empty_test_split(capsys, tmp_path):
    options = ["--data.init_args.split=[0.75,0.25,0]"]
    text = sentence(capsys, "test", *DEMO, *tiny(tmp_path, backbone=TINY_NET), *options, "--trainer.callbacks=null")
    assert "no pairs of visits to test on" in text


@pytest.mark.parametrize("workers", [pytest.param(0, marks=SLOW), 1])
def test_a_truncated_image(workers, capsys, tmp_path, bids):
    for image in bids.glob("sub-*/ses-*/anat/*.nii.gz"):
        image.write_bytes(image.read_bytes()[: image.stat().st_size // 2])
    options = ["--data.class_path=NiftiDataModule", f"--data.init_args.root={bids}", "--trainer.callbacks=null"]
    options += [f"--data.init_args.num_workers={workers}"]
    text = sentence(capsys, "fit", *DEMO, *tiny(tmp_path, backbone=TINY_NET), *options)
    assert "_T1w.nii.gz" in text
    assert "Traceback" not in text
