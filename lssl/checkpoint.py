"""Checkpoints of ``lssl fit``: each holds the config that rebuilds its network."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch
import yaml
from jsonargparse import ArgumentError, ArgumentParser

from lssl.networks.backbone import Backbone
from lssl.task import Task, check_format
from lssl.utils.errors import InputError, input_error
from lssl.utils.files import refuse_damaged
from lssl.utils.schedules import WarmupCosine
from lssl.utils.structure import unpack
from lssl.utils.trust import check_classes
from lssl.views.sampler import ViewSampler

__all__ = ["checkpoint_of", "load", "load_task", "read_checkpoint"]

_OF_THE_RUN = {"backbone", "views", "optimizer", "schedule"}  # linked to other groups, or used in training only


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Reads a checkpoint of ``lssl fit`` to the CPU; nothing in the file can run code."""
    if not Path(path).is_file():
        raise InputError(f"There is no checkpoint {path}.")
    refuse_damaged(Path(path))
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError):
        raise InputError(f"{path} is not a checkpoint, or holds objects that are not safe to load.") from None
    if not isinstance(checkpoint, dict) or "config" not in checkpoint.get("lssl", {}):
        raise InputError(f"{path} was not written by lssl fit: it holds no config that rebuilds its network.")
    check_format(checkpoint, str(path))
    if "structure" not in checkpoint["lssl"]:
        _check_config(checkpoint["lssl"]["config"], path)
    return checkpoint


def _check_config(text: Any, path: str | Path) -> None:
    """Refuses a stored config that is no YAML of plain values, or that lacks what rebuilds a network."""
    try:
        config = yaml.safe_load(text) if isinstance(text, str) else None
    except yaml.YAMLError:
        config = None
    groups = [config.get(name) for name in ("model", "backbone", "views")] if isinstance(config, dict) else [None]
    if not all(isinstance(group, dict) for group in groups) or not isinstance(groups[0].get("class_path"), str):  # type: ignore[union-attr]
        raise InputError(f"{path}: the config in it is damaged, so its network cannot be rebuilt.")


def checkpoint_of(run: str | Path) -> Path:
    """The file itself, or the best or last checkpoint of a run folder."""
    if Path(run).is_file():
        return Path(run)
    for name in ("best", "last"):
        if (path := Path(run) / "checkpoints" / f"{name}.ckpt").is_file():
            return path
    raise InputError(f"{run} is neither a checkpoint nor a run folder with one in checkpoints/.")


def load(path: str | Path) -> Task[Any]:
    """The trained task of a run folder or a checkpoint, on the CPU, in evaluation mode.

    The checkpoint may come from ``lssl fit`` or from a Trainer in Python. Optimizer and schedule are not rebuilt.
    """
    return load_task(checkpoint_of(path))


def load_task(path: str | Path) -> Task[Any]:
    """Rebuilds the task of a checkpoint, with its weights, on the CPU.

    The checkpoint's config names the class, which is imported if it is trusted, see :mod:`lssl.utils.trust`.

    Args:
        path: a checkpoint written by ``lssl fit``, or by a Trainer in Python.
    """
    checkpoint = read_checkpoint(path)
    if "structure" in checkpoint["lssl"]:
        return _unpacked(checkpoint, str(path))
    config: dict[str, Any] = yaml.safe_load(checkpoint["lssl"]["config"])
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(Backbone, "backbone")
    parser.add_class_arguments(ViewSampler, "views", skip={"transforms"})
    parser.add_subclass_arguments(Task, "model", skip={"optimizer", "schedule"}, required=True)
    for group in ("backbone", "views"):
        parser.link_arguments(group, f"model.init_args.{group}", apply_on="instantiate")
    model = config["model"]
    arguments = _without(model.get("init_args") or {}, _OF_THE_RUN)
    if arguments.get("matching"):
        arguments["matching"] = _without(
            arguments["matching"], {"matcher"}
        )  # may name a checkpoint file that no longer exists
    wanted = {
        "backbone": config["backbone"],
        "views": _without(config["views"], {"transforms"}),
        "model": {"class_path": model["class_path"], "init_args": arguments},
    }
    check_classes(wanted, str(path))
    try:
        task: Task[Any] = parser.instantiate(parser.parse_object(wanted)).model
    except (ArgumentError, TypeError, ValueError) as error:
        reason = input_error(error) or str(error)[:500]
        raise InputError(f"{path}: {model['class_path']} of its config cannot be built here: {reason}") from error
    task.on_load_checkpoint(checkpoint)  # gives a Segmenter its classes
    return _with_weights(task, checkpoint, path)


def _with_weights(task: Task[Any], checkpoint: dict[str, Any], path: str | Path) -> Task[Any]:
    try:
        task.load_state_dict(checkpoint["state_dict"])
    except (KeyError, RuntimeError, TypeError, AttributeError) as error:
        raise InputError(f"{path}: its weights are not those of its own network; the file was changed.") from error
    return task.eval()


def _unpacked(checkpoint: dict[str, Any], path: str) -> Task[Any]:
    """The task of a checkpoint whose Trainer had no config: its structure is stored instead."""
    structure = checkpoint["lssl"]["structure"]
    if isinstance(structure, str):
        raise InputError(
            f"{path}: its task could not be stored ({structure}); build it as in training and give it the file's "
            f"state_dict."
        )
    task = unpack(structure, path)
    if not isinstance(task, Task):
        raise InputError(f"{path} holds a {type(task).__name__}, which is no task of lssl.")
    task.optimizer, task.schedule = torch.optim.AdamW, WarmupCosine
    return _with_weights(task, checkpoint, path)


def _without(arguments: dict[str, Any], names: set[str]) -> dict[str, Any]:
    return {name: value for name, value in arguments.items() if name not in names}
