"""Weights, gradients and optimizer state spread over devices: torch's FSDP2, through Lightning's ModelParallelStrategy.

Each rank keeps a share of every parameter, of its gradient and of the optimizer's state. The blocks between the taps of
a backbone, a teacher's too, are gathered while they run. All else (layers with taps, heads) is gathered for the whole
step: from the call of ``losses`` to the end of the backward pass, which leaves each rank its share of the ranks' mean
gradient, as DDP would. Between steps, whatever runs the network may do so on one rank alone: there it is whole.
"""

from __future__ import annotations

import warnings
from typing import Any

import lightning as L
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method

from lssl.networks.backbone import Backbone
from lssl.networks.blocks import blocks_between
from lssl.utils.errors import InputError

__all__ = ["WholeBetweenSteps", "is_sharded", "reshard", "shard", "shard_for", "whole"]

TESTED = "2.13"  # names of torch's own that are used here are other ones in earlier versions


def shard(task: Any, mesh: DeviceMesh) -> None:
    """Spreads all parameters over the devices of a mesh, in place; all ranks must call, before the optimizer is made.

    All ranks start from the first one's weights.

    Args:
        task: with backbones anywhere inside, and a method ``losses`` that takes the place of ``forward``.
        mesh: of one dimension.
    """
    if torch.__version__ < TESTED:  # torch compares them as versions
        raise InputError(
            f"trainer.strategy: ModelParallelStrategy needs torch {TESTED} or later, and this is {torch.__version__}; "
            f"update torch, or use ddp."
        )
    _as_first_rank([*task.parameters(), *task.buffers()])
    backbones = [part for part in task.modules() if isinstance(part, Backbone)]
    for backbone in backbones:
        for block in blocks_between(backbone.network, map(backbone.path_of, backbone.taps)):
            fully_shard(block, mesh=mesh)
    fully_shard(task, mesh=mesh)
    # Terms may be views, and nothing changes them in place.
    warnings.filterwarnings("ignore", rf"FSDP2-wrapped module \({type(task).__name__}\)")
    register_fsdp_forward_method(task, "losses")
    task._get_fsdp_state()._lazy_init()  # else a block that somebody runs alone would take itself for the root


def is_sharded(task: nn.Module) -> bool:
    """Whether :func:`shard` has spread it."""
    return isinstance(task, FSDPModule)


@torch.inference_mode(False)
def whole(task: nn.Module) -> None:
    """Gathers a sharded task and keeps it so until :func:`reshard`; all ranks must call. Nothing for any other one.

    Then each rank can run the network alone. Running statistics become the first rank's, which checkpoints hold.
    """
    if is_sharded(task):
        _as_first_rank(list(task.buffers()))
    for part in _shards(task):
        part.set_reshard_after_forward(False, recurse=False)
        part.unshard()


def reshard(task: nn.Module) -> None:
    """Ends :func:`whole`.

    Blocks that one rank ran alone are forgotten: by the order of their calls each rank gathers the next one early in
    the backward pass, and ranks of different orders would wait for each other for ever.
    """
    for part in _shards(task):
        part.set_reshard_after_forward(part is not task, recurse=False)
        part.reshard()
        state = part._get_fsdp_state()
        state._comm_ctx.post_forward_order.clear()
        for group in state._fsdp_param_groups:
            group._post_forward_indices.clear()


def shard_for(trainer: Any, task: Any) -> None:
    """Shards for a trainer's ModelParallelStrategy; refuses its settings that cannot be; ``lssl fit`` sets others.

    Args:
        trainer: whose processes have met.
        task: see :func:`shard`.
    """
    strategy = trainer.strategy
    if not isinstance(strategy, ModelParallelStrategy):
        raise InputError("An earlier trainer has sharded this task; take that of its checkpoint, lssl.load(…).")
    if strategy._tensor_parallel_size != 1:
        raise InputError(
            "trainer.strategy: convolutions are not split by tensor parallelism; give ModelParallelStrategy "
            "tensor_parallel_size 1, and the number of all devices as data_parallel_size."
        )
    if strategy._save_distributed_checkpoint:
        raise InputError(
            "trainer.strategy: give ModelParallelStrategy save_distributed_checkpoint false: lssl reads checkpoints of "
            "one file."
        )
    if strategy._layer_sync is not None:
        raise InputError("trainer.sync_batchnorm: ModelParallelStrategy would ignore it; use ddp, or leave it out.")
    if not is_sharded(task):
        shard(task, task.device_mesh["data_parallel"])
    if not any(isinstance(callback, WholeBetweenSteps) for callback in trainer.callbacks):
        trainer.callbacks.insert(0, WholeBetweenSteps())


class WholeBetweenSteps(L.Callback):
    """A sharded task is whole before the first step, in evaluation and after the last step, before others look at it.

    Who runs the network between two training steps calls :func:`whole` on all ranks; here the next step undoes it.
    """

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        """From here on, each rank holds its share."""
        reshard(pl_module)
        if trainer.global_step == 0:  # torch makes a step of gradient 0 to save the state before the first one
            for optimizer in trainer.optimizers:
                optimizer.state.clear()

    def _whole(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Gathers."""
        whole(pl_module)

    on_validation_start = on_train_start = on_train_end = on_fit_end = _whole
    on_test_start = on_predict_start = _whole


def _shards(task: nn.Module) -> list[FSDPModule]:
    return [part for part in task.modules() if isinstance(part, FSDPModule)]


@torch.no_grad()
def _as_first_rank(tensors: list[Tensor]) -> None:
    for tensor in tensors:
        tensor.data = tensor.data.contiguous()  # of channels last: FSDP splits no other, and images still decide
        distributed.broadcast(tensor.data, 0)
