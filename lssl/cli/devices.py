"""Ways of using several devices that a run cannot take, refused before anything is built."""

from __future__ import annotations

from typing import Any

from lssl.utils.errors import InputError

__all__ = ["refuse_sharding"]

SHARDING = ("fsdp", "modelparallel", "deepspeed")


def refuse_sharding(strategy: Any) -> None:
    """Refuses strategies that spread the weights over devices.

    Args:
        strategy: ``trainer.strategy`` of a config: a name, or something with ``class_path``.
    """
    name = str(getattr(strategy, "class_path", strategy)).rpartition(".")[2]
    if any(kind in name.lower() for kind in SHARDING):
        raise InputError(
            f"trainer.strategy: {name} spreads the weights over devices, and taps, teachers and exact resume need them "
            f"whole; use ddp. Weights are not what fills a GPU: SwinUNETR of feature_size 96, with its gradients and "
            f"Adam's two averages, takes 4 GB. Activations do. They shrink by backbone.checkpointing true, "
            f"trainer.precision bf16-mixed, or smaller views."
        )
