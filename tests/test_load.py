"""Tasks trained in Python: pickled, loaded, fine-tuned; and what a checkpoint may not do."""

from __future__ import annotations

import io
import os
import pickle
from importlib.metadata import entry_points

import lightning as L
import pytest
import torch
from helpers import TINY_NET, fit, sentence
from monai.networks.nets import BasicUNet, DynUNet

import lssl
from lssl import Backbone, Segmenter, ViewSampler
from lssl.data.description import record
from lssl.datamodules import PhantomDataModule
from lssl.segmentation.pretrained import load_pretrained
from lssl.strategies import PriorGuidedLocal
from lssl.task import CHECKPOINT_FORMAT
from lssl.utils.errors import InputError
from lssl.utils.structure import pack, unpack

STRATEGIES = [point.load() for point in entry_points(group="lssl.strategies")]
TAPS = {"bottleneck": "down_4.convs.conv_1", "decoder.1": "upcat_2.convs.conv_1", "decoder.0": "upcat_1.convs.conv_1"}


def tiny(padding="reflect"):
    return Backbone(BasicUNet(3, 1, 4, (4, 4, 4, 4, 4, 4), norm=("batch", {})), TAPS, padding=padding)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """What a notebook does: no command line, no config."""
    task = PriorGuidedLocal(
        tiny(), views=ViewSampler(32), taps=["bottleneck"], min_points=1, optimizer=lambda p: torch.optim.SGD(p, 0.1)
    )
    data = PhantomDataModule(subjects=3, visits=2, size=40, spacing=5.0, num_workers=0, split=(0.7, 0.3, 0))
    quiet = {
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
    }
    trainer = L.Trainer(max_steps=1, accelerator="cpu", **quiet)
    trainer.fit(task, data)
    path = tmp_path_factory.mktemp("notebook") / "mine.ckpt"
    trainer.save_checkpoint(path)
    return task.eval(), path


def test_a_run_in_python_is_loaded(saved):
    task, path = saved
    loaded = lssl.load(path)
    assert type(loaded) is PriorGuidedLocal
    assert not loaded.training
    assert (loaded.backbone.padding, loaded.backbone.taps) == ("reflect", task.backbone.taps)
    image = torch.rand(1, 1, 32, 32, 32)
    with torch.no_grad():
        for name, value in task.backbone(image, list(TAPS)).items():
            assert torch.equal(loaded.backbone(image, [name])[name], value)
    assert loaded.state_dict().keys() == task.state_dict().keys()
    net = lssl.load_backbone(path)
    assert net.spacing.tolist() == [5.0, 5.0, 5.0]


def test_it_may_be_fine_tuned_and_the_command_line_asks_for_its_network(saved, tmp_path, capsys):
    task, path = saved
    text = load_pretrained(ours := tiny("zeros"), path)
    assert "by PriorGuidedLocal" in text
    assert "trained with padding 'reflect'" in text
    assert torch.equal(ours.network.conv_0.conv_0.conv.weight, task.backbone.network.conv_0.conv_0.conv.weight)
    said = sentence(
        capsys, "fit", "--config", "finetune", "--data", "PhantomDataModule", "--model.init_args.pretrained", str(path)
    )
    assert "has no config of its network; name it" in said
    assert "export runs of lssl fit" in sentence(capsys, "export", str(path), str(tmp_path / "out"))


def test_a_run_of_the_command_line_is_loaded_by_its_folder(tmp_path):
    model = {"class_path": "lssl.Segmenter", "init_args": {"classes": {"cortex": [3, 42]}, "window_overlap": 0.0}}
    run = fit(tmp_path, model=model, backbone={**TINY_NET, "taps": TAPS}, options=["--data.init_args.few_shot.steps=2"])
    task = lssl.load(run)
    assert isinstance(task, Segmenter)
    assert task.known_classes().names == ("cortex",) or list(task.known_classes().names) == ["cortex"]
    stored = torch.load(run / "checkpoints/last.ckpt", weights_only=True)
    assert "structure" not in stored["lssl"]


@pytest.mark.parametrize("strategy", [*STRATEGIES, Segmenter], ids=lambda cls: cls.__name__)
def test_every_task_goes_through_pickle_and_structure(strategy):
    """To spawned processes as a pickle, into checkpoints as a structure; weights are the file's own."""
    torch.manual_seed(0)
    task = strategy(Backbone(lssl.networks.backbone.unet(features=(4, 4, 4, 4, 4, 4), out_channels=4)))
    again = pickle.loads(pickle.dumps(task))
    assert again.state_dict().keys() == task.state_dict().keys()
    packed = pack(task, (task.optimizer, task.schedule))
    assert len(packed) < 400_000
    rebuilt = unpack(packed, "file")
    rebuilt.load_state_dict(task.state_dict())
    assert rebuilt.optimizer is None
    assert rebuilt.views.size == task.views.size
    image = torch.rand(1, 1, 32, 32, 32)
    with torch.no_grad():
        one, other = (t.eval().backbone(image, output=True)["output"] for t in (task, rebuilt))
    assert torch.equal(one, other)


def test_shared_weights_stay_shared_and_constants_stay():
    network = DynUNet(3, 1, 2, [3] * 3, [1, 2, 2], [2, 2], filters=[2, 4, 4])
    network.constant, network.count = torch.tensor([1.5, 2.5]), torch.arange(3)
    network.register_buffer("unsaved", torch.tensor([[3.0]]), persistent=False)
    again = unpack(pack(network), "file")
    again.load_state_dict(network.state_dict())
    assert again.input_block.conv1.conv.weight is again.skip_layers.downsample.conv1.conv.weight
    assert again.constant.tolist() == [1.5, 2.5]
    assert again.count.tolist() == [0, 1, 2]
    assert again.unsaved.tolist() == [[3.0]]


class Attack:
    """Calls a function when it is unpickled."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize(
    "function", [os.system, eval, torch.load, torch.hub.load, lssl.utils.files.write_json, L.Trainer]
)
def test_a_structure_calls_nothing_but_classes_of_networks(function, tmp_path):
    file = io.BytesIO()
    pickle.dump(Attack(function, f"touch {tmp_path}/touched"), file)
    with pytest.raises(InputError, match="file"):
        unpack(torch.frombuffer(bytearray(file.getvalue()), dtype=torch.uint8), "file")
    assert not list(tmp_path.iterdir())


def test_damaged_bytes_are_refused(saved):
    task, _ = saved
    packed = pack(task, (task.optimizer, task.schedule))
    for cut in (0, 10, len(packed) // 2):
        with pytest.raises(InputError, match="cannot be rebuilt"):
            unpack(packed[:cut], "file")
    with pytest.raises(InputError, match="cannot be rebuilt"):
        unpack(torch.zeros(100, dtype=torch.uint8), "file")


def test_what_cannot_be_stored_is_said_when_it_is_loaded(saved, tmp_path):
    task, path = saved
    task.views.extra = lambda: None
    try:
        stored = torch.load(path, weights_only=True)
        stored["lssl"] = record(task, CHECKPOINT_FORMAT)
    finally:
        del task.views.extra
    torch.save(stored, tmp_path / "lambda.ckpt")
    with pytest.raises(InputError, match=r"its task could not be stored \(.*lambda.*build it as in training"):
        lssl.load(tmp_path / "lambda.ckpt")
