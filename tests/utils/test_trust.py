"""A checkpoint of a stranger imports nothing of its choice."""

import sys
import types

import pytest
import torch
import yaml
from helpers import CHECKPOINT, TINY_NET, fit

from lssl.checkpoint import load_task, read_checkpoint
from lssl.cli.complete import complete
from lssl.cli.main import main
from lssl.task import CHECKPOINT_FORMAT
from lssl.utils.errors import InputError
from lssl.utils.trust import check_classes, refuse_commands

TRAP = (
    "import pathlib\npathlib.Path('sprung').touch()\nfrom lssl.strategies.global_contrastive import GlobalContrastive\n"
)
ALLOWED = [
    {"class_path": "lssl.strategies.longitudinal_local.LongitudinalLocal"},
    {"class_path": "MyShortName"},
    {"network": {"class_path": "monai.networks.nets.BasicUNet", "init_args": {"act": "relu"}}},
    {"class_path": "lssl.Segmenter"},
    {"class_path": "lssl.networks.backbone.unet"},
    {"class_path": "monai.networks.nets.resnet18"},
    {"class_path": "torch.nn.functional.relu"},
    {"taps": {"bottleneck": "os.path", "decoder.0": "upcat_1.convs.conv_1"}},
    {"matcher": "runs/last.ckpt", "file": "a.ckpt"},
]


@pytest.fixture
def trap(tmp_path, monkeypatch):
    (tmp_path / "trap_module.py").write_text(TRAP)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path / "sprung"
    sys.modules.pop("trap_module", None)


@pytest.mark.parametrize("config", ALLOWED)
def test_what_may_be_named(config):
    check_classes(config, "a.ckpt")


@pytest.mark.parametrize(
    "config",
    [
        {"class_path": "os.system"},
        {"model": [{"class_path": "subprocess.Popen"}]},
        {"class_path": "not_installed.Thing"},
        {"network": "trap_module.GlobalContrastive"},
        {"class_path": "torch.hub.load"},
        {"class_path": "monai.bundle.load"},
        {"class_path": "lsslx.Strategy"},
        {"objective": {"class_path": "lssl.utils.files.os.system", "init_args": {"command": "touch sprung"}}},
        {"class_path": "torch.nn.functional.torch.load"},
        {"class_path": "lssl.cli.main.main"},
        {"class_path": "lssl.cli.training.TrainingCLI"},
        {"class_path": "lssl.runs.folder.back_up"},
        {"class_path": "lssl.utils.files.Path"},
        {"class_path": "pandas.read_pickle"},
        {"class_path": "pandas.DataFrame"},
    ],
)
def test_what_may_not(config, trap):
    with pytest.raises(InputError, match=r"a.ckpt names the class .* LSSL_TRUST="):
        check_classes(config, "a.ckpt")
    assert not trap.exists()


def test_a_module_is_trusted_by_name_or_because_it_is_there(monkeypatch):
    monkeypatch.setenv("LSSL_TRUST", "other, mine")
    check_classes({"class_path": "mine.methods.Order"}, "a.ckpt")
    monkeypatch.setitem(sys.modules, "yours", types.ModuleType("yours"))
    check_classes({"class_path": "yours.Order"}, "a.ckpt")


def test_a_network_that_was_imported_is_trusted_and_nothing_else_of_its_module(monkeypatch):
    module = types.ModuleType("yours")
    exec(
        "import os\nfrom torch import nn\nclass Net(nn.Module): pass\nclass Other: pass\ndef make(): pass", vars(module)
    )
    monkeypatch.setitem(sys.modules, "yours", module)
    check_classes({"class_path": "yours.Net"}, "a.ckpt")
    for name in ("Other", "make", "os.system"):
        with pytest.raises(InputError, match="LSSL_TRUST"):
            check_classes({"network": {"class_path": f"yours.{name}"}}, "a.ckpt")


@pytest.mark.parametrize(
    "config",
    [
        "!!python/object/apply:os.system ['touch sprung']",
        "model: {class_path: LongitudinalLocal}\nbackbone: !!python/name:os.system\nviews: {}",
        "{{{",
        "[1, 2]",
        7,
        "backbone: {}\nviews: {}",
        "model: {class_path: 3}\nbackbone: {}\nviews: {}",
        "model: {class_path: LongitudinalLocal}\nbackbone: {}\nviews: [1]",
    ],
)
def test_a_config_that_is_no_yaml_of_plain_values_is_one_sentence(config, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": {}, "lssl": {"config": config, "format": CHECKPOINT_FORMAT}}, "a.ckpt")
    with pytest.raises(InputError, match=r"a\.ckpt: the config in it is damaged"):
        read_checkpoint("a.ckpt")
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize("weights", ["text", {"backbone.network.conv_0.conv_0.conv.weight": torch.zeros(1)}])
def test_weights_of_another_network_are_one_sentence(weights, tmp_path):
    model = {"class_path": "lssl.strategies.MaskedAutoencoder"}
    config = yaml.safe_dump({"model": model, "backbone": TINY_NET, "views": {"size": 32}})
    torch.save({"state_dict": weights, "lssl": {"config": config, "format": CHECKPOINT_FORMAT}}, tmp_path / "a.ckpt")
    with pytest.raises(InputError, match="weights are not those of its own network"):
        load_task(tmp_path / "a.ckpt")


@pytest.mark.parametrize("place", ["transform", "split"])
def test_a_command_under_class_path_is_refused_before_it_runs(place, tmp_path, capsys):
    mark = tmp_path / "ran"
    command = {"class_path": "os.system", "init_args": {"command": f"touch {mark}"}}
    (tmp_path / "my.yaml").write_text(yaml.safe_dump({"data": {"init_args": {place: command}}}))
    with pytest.raises(SystemExit) as stop:
        main(["fit", "--config", "demo", "--config", str(tmp_path / "my.yaml")])
    assert stop.value.code == 2
    assert "class_path: os.system is no class" in capsys.readouterr().err
    assert not mark.exists()


def test_classes_and_factories_under_class_path_are_no_commands():
    names = [
        "torch.optim.Adam",
        "lssl.networks.backbone.unet",
        "Cosine",
        "there.is.none",
        "monai.networks.nets.BasicUNet",
    ]
    refuse_commands({"a": [{"class_path": name} for name in names]})


def test_a_changed_checkpoint_imports_nothing(tmp_path, trap, monkeypatch):
    run = fit(tmp_path, "global_contrastive.yaml", backbone=TINY_NET, options=CHECKPOINT)
    path = run / "checkpoints" / "last.ckpt"
    for group in ("model", "backbone"):
        checkpoint = torch.load(path, weights_only=True)
        config = yaml.safe_load(checkpoint["lssl"]["config"])
        (config["model"] if group == "model" else config["backbone"]["network"])["class_path"] = "trap_module.Thing"
        checkpoint["lssl"]["config"] = yaml.safe_dump(config)
        changed = str(tmp_path / f"{group}.ckpt")
        torch.save(checkpoint, changed)
        with pytest.raises(InputError, match=r"names the class trap_module\.Thing"):
            load_task(changed)
    options = [("model.init_args.pretrained", changed)]
    with pytest.raises(InputError, match=r"names the class trap_module\.Thing"):
        complete(["finetune"], "PhantomDataModule", options)
    assert not trap.exists()
