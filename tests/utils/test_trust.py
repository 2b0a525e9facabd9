"""A checkpoint of a stranger imports nothing of its choice."""

import sys
import types

import pytest
import torch
import yaml
from helpers import TINY_NET, fit

from lssl.checkpoint import load_task
from lssl.cli.complete import complete
from lssl.utils.errors import InputError
from lssl.utils.trust import check_classes

TRAP = (
    "import pathlib\npathlib.Path('sprung').touch()\nfrom lssl.strategies.global_contrastive import GlobalContrastive\n"
)
ALLOWED = [
    {"class_path": "lssl.strategies.longitudinal_local.LongitudinalLocal"},
    {"class_path": "MyShortName"},
    {"network": {"class_path": "monai.networks.nets.BasicUNet", "init_args": {"act": "relu"}}},
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


def test_a_changed_checkpoint_imports_nothing(tmp_path, trap, monkeypatch):
    run = fit(tmp_path, "global_contrastive.yaml", backbone=TINY_NET, options=["--trainer.max_steps=1"])
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
