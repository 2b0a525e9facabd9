"""Two ranks that hold half of the weights each learn what one process learns, and save what any process can load.

Two gloo processes run every case once; the tests compare what they wrote down with one process.
"""

from __future__ import annotations

import dataclasses
import os
import socket
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import lightning as L
import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from test_exact_resume import QUIET, End, Noise, Saves, differences, ended
from torch import Tensor, distributed, multiprocessing, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule
from torch.torch_version import TorchVersion
from two_ranks import AGES, PAIRS, RANKS, SUBJECTS, Views, part
from whole_batch import draws_of_the_whole_batch

import lssl
from lssl.callbacks import RepresentationMonitor
from lssl.callbacks.pictures import Pictures
from lssl.networks.backbone import Backbone
from lssl.networks.sharding import TESTED, reshard, shard, shard_for, whole
from lssl.runs.loggers import RunCSVLogger
from lssl.strategies.global_contrastive import BYOL, GlobalContrastive, MoCo
from lssl.strategies.prior_guided_local import PriorGuidedLocal
from lssl.strategy import Strategy
from lssl.utils.distributed import local, no_sync
from lssl.utils.errors import InputError
from lssl.views.sampler import ViewSampler
from lssl.views.view import View

HEADS = {"hidden": 16, "projection": 8, "norm": "layer"}
STEPS = 3


class Network(nn.Sequential):
    """Six stages, of which all but those with taps are blocks to be gathered by themselves."""

    TAPS: ClassVar = {"fine": "1.0", "deep": "5.0"}

    def __init__(self) -> None:
        widths = ((1, 4, 2), (4, 4, 1), (4, 6, 2), (6, 6, 1), (6, 6, 1), (6, 6, 1))
        super().__init__(*(nn.Sequential(nn.Conv3d(a, b, 3, step, 1), nn.SiLU()) for a, b, step in widths))


def common(**options) -> dict:
    return {"backbone": Backbone(Network(), Network.TAPS, **options), "views": ViewSampler(16)}


def dense(**options) -> Strategy:
    narrow = {**HEADS, "min_points": 8, "samples": 40}
    return PriorGuidedLocal(taps=["fine", "deep"], **narrow, **common(**options))


def taught(objective: Callable) -> Strategy:
    task = GlobalContrastive(taps=["deep"], objective=partial(objective, **HEADS), **common())
    if hasattr(task.objective, "queue"):
        task.objective.queue.keys.normal_()
        task.objective.queue.subject_ids[:] = torch.arange(16) % 5 - 1  # -1: empty
    return task


CASES: dict[str, Callable[[], Strategy]] = {
    "dense": dense,
    "dense, recomputed, channels last": partial(dense, checkpointing=True, channels_last=True),
    "teacher": partial(taught, BYOL),
    "teacher and queue": partial(taught, partial(MoCo, queue=16)),
}


class Fixed:
    """Gives the same views in each step."""

    def __init__(self, data: Views) -> None:
        self.data = data

    def __call__(self, *_) -> tuple:
        return self.data[:2]


def full(tensor: Tensor) -> Tensor:
    return tensor.detach().full_tensor() if hasattr(tensor, "full_tensor") else tensor.detach().clone()


def trained(name: str, data: Views, rows: slice, mesh=None) -> tuple[dict[str, Tensor], Strategy]:
    """Some clipped steps: losses, gradients and their norm at each, weights at the end."""
    torch.manual_seed(0 if mesh is None else distributed.get_rank())  # all are to start from the first rank's weights
    task = CASES[name]()
    task.draw_views = Fixed(data)
    if mesh is not None:
        shard(task, mesh)
    weights = [weight for weight in task.parameters() if weight.requires_grad]
    optimizer = torch.optim.SGD(weights, 1.0, momentum=0.5)
    found = {}
    for step in range(STEPS):
        if mesh is not None:  # a monitor has looked at it
            alone(task, data[0])
        task.generator.manual_seed(step)
        with draws_of_the_whole_batch(rows, len(data[0].image), PAIRS):
            loss = task.total(task.losses(data[2]))
        optimizer.zero_grad()
        loss.backward()
        found[f"loss {step}"] = loss.detach()
        found[f"gradient {step}"] = torch.cat([full(weight.grad).flatten() for weight in weights])
        found[f"norm {step}"] = full(torch.nn.utils.clip_grad_norm_(weights, 0.1))
        optimizer.step()
        task.on_step_end(step / STEPS)
    return found, task


def alone(task: Strategy, view: View) -> Tensor | None:
    """Features of the first rank; it would wait for the other if anything were still to be gathered."""
    whole(task)
    features = None
    if distributed.get_rank() == 0:
        with no_sync(), torch.no_grad():
            features = task.embed(view)["deep"]
    reshard(task)
    return features


def work(own: int, folder: str) -> None:
    """What each of the two processes does; rank 0's results are written down."""
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=own, world_size=RANKS, timeout=timedelta(seconds=120)
    )
    mesh = init_device_mesh("cpu", (RANKS,))
    data = torch.load(f"{folder}/batch.pt", weights_only=False)
    rows = slice(own * PAIRS // RANKS, (own + 1) * PAIRS // RANKS)
    half = tuple(part(item, rows) for item in data)
    results = {}
    for name in CASES:
        found, task = trained(name, half, rows, mesh)
        for step in range(STEPS):
            distributed.all_reduce(found[f"loss {step}"])
            found[f"loss {step}"] /= RANKS
        held = sum(local(weight).numel() for weight in task.parameters())
        found["share"] = torch.tensor(held / sum(weight.numel() for weight in task.parameters()))
        found["blocks"] = torch.tensor(sum(isinstance(module, FSDPModule) for module in task.modules()) - 1)
        saved = get_model_state_dict(task, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
        if (features := alone(task, half[0])) is not None:
            found["alone"] = features
        assert all(hasattr(weight, "full_tensor") for weight in task.parameters())
        results[name] = found, saved
    if own == 0:
        torch.save(results, f"{folder}/results.pt")
    distributed.destroy_process_group()


@pytest.fixture(scope="module")
def batch(make_batch) -> Views:
    pairs = dataclasses.replace(make_batch(PAIRS), subject=SUBJECTS, ages=AGES)
    return (*ViewSampler(16)(pairs, torch.Generator().manual_seed(0)), pairs)


@pytest.fixture(scope="module")
def together(batch, tmp_path_factory) -> dict:
    if torch.__version__ < TESTED:
        pytest.skip(f"FSDP2 needs torch {TESTED}")
    folder = tmp_path_factory.mktemp("ranks")
    dense()  # its network is measured once, for the ranks too
    torch.save(batch, folder / "batch.pt")
    multiprocessing.start_processes(work, (str(folder),), nprocs=RANKS, start_method="fork")  # imports take longest
    return torch.load(folder / "results.pt", weights_only=False)


@pytest.mark.parametrize("name", CASES)
def test_two_ranks_of_half_the_weights_learn_what_one_process_learns(name: str, batch, together):
    expected, task = trained(name, batch, slice(None))
    found, saved = together[name]
    assert expected["gradient 0"].norm() > 1e-3
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-5, atol=1e-5 * value.norm().item(), msg=key)
    assert 0.45 < found["share"].item() < 0.55
    assert found["blocks"].item() == 4 * (1 + (task.teacher is not None))
    fresh = CASES[name]()
    fresh.load_state_dict(saved)  # into a network that is not sharded
    for key, value in task.state_dict().items():
        queued = "queue" in key  # ranks queue both views of their pairs, one process all first views first
        one, two = (each.sort(0)[0] if queued else each for each in (saved[key], value))
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5, msg=key)
    with torch.no_grad():
        features = fresh.embed(part(batch[0], slice(0, PAIRS // RANKS)))["deep"]
    torch.testing.assert_close(found["alone"], features)


def test_an_earlier_torch_is_refused_in_a_sentence(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch, "__version__", TorchVersion("2.9.1+cu126"))  # as text, 2.9 would come after 2.13
    with pytest.raises(InputError, match=r"needs torch 2\.13 or later, and this is 2\.9\.1\+cu126"):
        shard(dense(), None)


def test_what_cannot_be_sharded_is_refused_before_anything_is():
    task, size_of_two = dense(), ModelParallelStrategy(RANKS, 2)
    ignored = sharded()
    ignored._layer_sync = object()
    for strategy, said in (
        (size_of_two, "tensor_parallel_size 1"),
        (ModelParallelStrategy(RANKS, 1), "save_distributed_checkpoint false"),
        (ignored, "sync_batchnorm"),
        (DDPStrategy(), "earlier trainer"),
    ):
        with pytest.raises(InputError, match=said):
            shard_for(SimpleNamespace(strategy=strategy, callbacks=[]), task)
    assert type(task) is PriorGuidedLocal


RUN = {"max_epochs": 2, "log_every_n_steps": 1, "gradient_clip_val": 0.1, "accumulate_grad_batches": 2, **QUIET}


def run(folder: Path, strategy: object, *callbacks: L.Callback, checkpoint: Path | None = None) -> None:
    """Trains on two ranks; validation, the monitor and pictures run the network between steps."""
    L.seed_everything(7, verbose=False)
    own = [RepresentationMonitor(every=4, subjects=2), Pictures(every=3), End(), *callbacks]
    logger = RunCSVLogger(folder, name="", version="")
    trainer = L.Trainer(default_root_dir=folder, devices=RANKS, strategy=strategy, logger=logger, callbacks=own, **RUN)
    task = CASES["teacher and queue"]()
    task.optimizer = partial(torch.optim.AdamW, lr=0.01, eps=0.01)  # a small eps makes rounding steps of full length
    trainer.fit(task, datamodule=Noise(batch_size=2, num_workers=0), ckpt_path=checkpoint)


def sharded() -> ModelParallelStrategy:
    return ModelParallelStrategy(RANKS, 1, save_distributed_checkpoint=False)


def launched(own: int, folder: str, ports: list[int]) -> None:
    """As torchrun starts it."""
    torch.set_num_threads(1)
    here = Path(folder)
    ranks = {"RANK": own, "LOCAL_RANK": own, "WORLD_SIZE": RANKS, "LOCAL_WORLD_SIZE": RANKS, "GROUP_RANK": 0}
    os.environ.update({name: str(value) for name, value in ranks.items()})
    os.environ.update(MASTER_ADDR="127.0.0.1", TORCHELASTIC_RUN_ID="test")
    cuts = here / "cuts"
    runs = {
        "ddp": ("ddp", [], None),
        "whole": (sharded(), [Saves(cuts, ("train_start", "train_batch_end", "validation_end"))], None),
        **{f"resumed {hook}": (sharded(), [], hook) for hook in ("train_batch_end_step1", "validation_end_step2")},
    }
    for (name, (strategy, callbacks, hook)), port in zip(runs.items(), ports, strict=True):
        os.environ["MASTER_PORT"] = str(port)
        cut = min(cuts.glob(f"*_{hook}.ckpt")) if hook else None
        run(here / name, strategy, *callbacks, checkpoint=cut)
        distributed.barrier()
        distributed.destroy_process_group()


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


@pytest.mark.slow
def test_a_trainer_shards_saves_and_resumes_exactly(tmp_path):
    multiprocessing.start_processes(
        launched, (str(tmp_path), [free_port() for _ in range(4)]), nprocs=RANKS, start_method="fork"
    )
    sharded_run = ended(tmp_path / "whole")
    for name in ("train_batch_end_step1", "validation_end_step2"):
        assert not differences(sharded_run, ended(tmp_path / f"resumed {name}")), name
    for key, value in ended(tmp_path / "ddp")["state_dict"].items():
        torch.testing.assert_close(sharded_run["state_dict"][key], value, rtol=1e-4, atol=1e-4, msg=key)
    loaded = lssl.load(tmp_path / "whole" / "end.ckpt")
    assert type(loaded) is GlobalContrastive
    assert all(torch.equal(value, sharded_run["state_dict"][key]) for key, value in loaded.state_dict().items())
