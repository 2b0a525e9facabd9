"""Settings that would end in a library's exception, train nothing, or be dropped: one sentence each."""

from __future__ import annotations

import traceback
from collections.abc import Mapping
from typing import Any

from lssl.cli.registered import TASKS
from lssl.utils.errors import InputError
from lssl.utils.memory import refuse_larger_than_memory

__all__ = ["check_settings", "of_a_library", "other_weights", "refuse_another_model", "trainer_refusal"]

COUNTS = ("log_every_n_steps", "accumulate_grad_batches", "check_val_every_n_epoch", "num_nodes", "devices")
EACH_PROCESS = 200 * 10**6  # bytes of a process that has imported torch, at least
TRAINED = ("max_steps", "max_epochs", "limit_train_batches")


def check_settings(command: str, trainer: Any, max_lost: float | None = None) -> None:
    """Refuses them before anything is built.

    Args:
        command: its name.
        trainer: its options.
        max_lost: minutes between two saves.
    """
    for name in COUNTS:
        value = trainer.get(name)
        if value in (0, "0"):
            raise InputError(f"trainer.{name}: give a number above 0, not {value}.")
    devices = trainer.get("devices")
    if str(devices).isdigit():
        needed = EACH_PROCESS * int(devices)
        refuse_larger_than_memory(needed, f"trainer.devices: starting {devices} processes", "choose fewer")
    if command != "fit":
        return
    for name in TRAINED:
        if trainer.get(name) == 0:
            raise InputError(f"trainer.{name} is 0, so nothing would be trained; lssl validate and lssl test evaluate.")
    if max_lost is not None and not max_lost > 0:
        raise InputError(f"max_lost: give minutes above 0, or null to save at the end of epochs alone, not {max_lost}.")


def trainer_refusal(error: Exception, accelerator: Any = None) -> InputError:
    """One sentence for what Lightning's trainer says of its options.

    Args:
        error: as raised.
        accelerator: that was asked for.
    """
    text = " ".join(str(error).split()).rstrip(".")
    if "gpu backend" in text or "accelerator is not available" in text:
        return InputError(
            f"trainer.accelerator: {accelerator} was asked for, and torch finds none here (lssl --version names the "
            f"devices); leave it out to take what there is."
        )
    return InputError(f"trainer: {text}.")


def of_a_library(error: Exception) -> InputError | None:
    """One sentence for a wrong value that only Lightning or an optimizer of torch looked at; otherwise ``None``.

    Args:
        error: as raised; where it was raised tells whose it is.
    """
    frames = traceback.extract_tb(error.__traceback__)
    where = frames[-1].filename.replace("\\", "/") if frames else ""
    if "/torch/optim/" in where:
        return InputError(f"optimizer: {error}.")
    return trainer_refusal(error) if "/lightning/pytorch/" in where else None


def other_weights(error: Exception) -> InputError | None:
    """One sentence if a checkpoint's weights or optimizer are those of another config; otherwise ``None``.

    Args:
        error: of torch, when the state is loaded.
    """
    lines = [line.strip() for line in str(error).splitlines()]
    if lines and lines[0].startswith("Error(s) in loading state_dict"):
        what = next((line.rstrip(". ") for line in lines[1:] if line), "")
        what = what if len(what) < 200 else f"{what[:200]}…"
    elif "loaded state dict" in str(error) and "parameter group" in str(error):
        what = "its optimizer trained other parts"
    else:
        return None
    return InputError(
        f"ckpt_path: the checkpoint is of another network or task than this config ({what}); give the config of its "
        f"run, --config RUN/config.yaml, or in lssl fit its weights alone, as --model.init_args.pretrained."
    )


def refuse_another_model(before: Mapping[str, Any], after: Mapping[str, Any], name: str) -> None:
    """Refuses to drop the options of a model that an earlier file of ``--config`` names: one of the two is a mistake.

    Args:
        before: the earlier model.
        after: of another class.
        name: the file that replaces it.
    """
    old, new = (str(model["class_path"]).rpartition(".")[2] for model in (before, after))
    if lost := list(before.get("init_args") or {}):
        listed = f"{', '.join(lost[:4])}{', …' if len(lost) > 4 else ''}"
        recipe = next((TASKS[name] for name in (new, old) if name in TASKS), "")
        tuning = (
            f"; to fine-tune a run's network, give --config {recipe} and --model.init_args.pretrained "
            f"RUN/checkpoints/last.ckpt, which brings it"
        )
        raise InputError(
            f"{name} replaces the model {old} of an earlier --config by {new}, and options ({listed}) would be lost: "
            f"give one of the two{tuning if recipe else ''}."
        )
