"""Ways of using several devices: what a run cannot take is refused before anything is built."""

from __future__ import annotations

from typing import Any

from lightning.pytorch.strategies import ModelParallelStrategy

from lssl.utils.errors import InputError

__all__ = ["chosen", "refuse_sharding", "spread"]

SHARDING = ("fsdp", "deepspeed")


def refuse_sharding(strategy: Any, sync_batchnorm: bool = False, compiled: bool = False) -> None:
    """Refuses strategies that spread the weights over devices, but ModelParallelStrategy, and what that cannot do.

    Args:
        strategy: ``trainer.strategy`` of a config: a name, or something with ``class_path``.
        sync_batchnorm: of the trainer.
        compiled: whether the backbone is to be compiled.
    """
    name = str(getattr(strategy, "class_path", strategy)).rpartition(".")[2]
    if any(kind in name.lower() for kind in SHARDING):
        raise InputError(
            f"trainer.strategy: {name} is not supported; to spread weights over devices use ModelParallelStrategy "
            f"(FSDP2). What fills a GPU are rather activations: they shrink by backbone.checkpointing true, "
            f"trainer.precision bf16-mixed, or smaller views."
        )
    if "modelparallel" in name.lower():
        for option, given in (("trainer.sync_batchnorm", sync_batchnorm), ("backbone.compile", compiled)):
            if given:
                raise InputError(f"{option}: {name} does not support it; leave it out, or use ddp.")


def chosen(strategy: Any, command: str) -> Any:
    """ModelParallelStrategy also by its name alone, and in training alone; any other strategy as it is.

    Args:
        strategy: ``trainer.strategy``, instantiated unless it is a name.
        command: evaluation needs no gradients, and checkpoints are of whole weights: there, Lightning chooses.
    """
    named = isinstance(strategy, str) and strategy.rpartition(".")[2].lower() == "modelparallelstrategy"
    if not named and not isinstance(strategy, ModelParallelStrategy):
        return strategy
    if command != "fit":
        return "auto"
    return ModelParallelStrategy() if named else strategy


def spread(strategy: Any, world_size: int) -> None:
    """Makes ModelParallelStrategy shard over all devices and save checkpoints of one file, as ours are.

    Args:
        strategy: of the trainer; any other one is left alone.
        world_size: number of processes.
    """
    if isinstance(strategy, ModelParallelStrategy):
        for name, fitting in (("data", world_size), ("tensor", 1)):
            given = getattr(strategy, f"_{name}_parallel_size")
            if given not in ("auto", fitting):
                raise InputError(
                    f"trainer.strategy: {name}_parallel_size must be {fitting}, not {given}: weights are sharded over "
                    f"all {world_size} processes."
                )
            setattr(strategy, f"_{name}_parallel_size", fitting)
        strategy._save_distributed_checkpoint = False
