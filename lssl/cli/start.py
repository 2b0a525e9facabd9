"""Hands a command over to LightningCLI, without the noise of the libraries; they are imported here and not before."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Sequence
from typing import Any

from lssl.utils.allocator import keep_freed_memory

__all__ = ["BRIEF", "hush", "train"]

#: Options of a run that only measures: nothing but training steps.
BRIEF = (
    "--trainer.limit_val_batches=0",
    "--trainer.num_sanity_val_steps=0",
    "--trainer.enable_checkpointing=false",
    "--trainer.enable_progress_bar=false",
    "--trainer.enable_model_summary=false",
    "--trainer.logger=false",
    "--trainer.min_epochs=null",
    "--trainer.min_steps=null",
    "--trainer.max_epochs=-1",
    "--trainer.max_time=null",
    "--monitor.every=0",
    "--max_lost=null",
)


def train(command: str, args: Sequence[str]) -> Any:
    """Runs ``fit``, ``validate``, ``test`` or ``predict``, and returns the trainer.

    Args:
        command: its name.
        args: its options.
    """
    hush()
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # a user's own my_methods.py beside the config
    from lssl.cli.training import TrainingCLI

    keep_freed_memory()
    return TrainingCLI.run(command, args)


class _Chatter(logging.Filter):
    """Drops advertisements, notes on absent hardware, and what lssl says itself."""

    NOISE = (
        "💡",
        "TPU available",
        "HPU available",
        "`weights_only`",
        "IPU available",
        "[rank: 0] Received SIG",
        "Trainer already configured",
    )

    def filter(self, record: logging.LogRecord) -> bool:
        """False for noise."""
        return not record.getMessage().startswith(self.NOISE)


def hush() -> None:
    """Silences what the libraries say of themselves."""
    connectors = "lightning.pytorch.trainer.connectors."
    others = [connectors + name for name in ("checkpoint_connector", "signal_connector")]
    for name in ("lightning.pytorch.utilities.rank_zero", "lightning.fabric.utilities.rank_zero", *others):
        logging.getLogger(name).addFilter(_Chatter())
    for message in (
        ".*does not have many workers.*",
        ".*number of training batches .* is smaller than the logging interval.*",
        ".*isinstance.treespec, LeafSpec.*",
        ".*module.s. in eval mode at the start of training.*",  # frozen parts
    ):
        warnings.filterwarnings("ignore", message=message)
