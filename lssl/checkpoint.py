"""Checkpoints of ``lssl fit``: each carries the config that rebuilds its network."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch
import yaml
from jsonargparse import ArgumentError, ArgumentParser

from lssl.networks.backbone import Backbone
from lssl.task import Task, check_format
from lssl.utils.errors import InputError
from lssl.views.sampler import ViewSampler

__all__ = ["load_task", "read_checkpoint"]

_OF_THE_RUN = {"backbone", "views", "optimizer", "schedule"}  # linked, or of no use without training


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """What a checkpoint of ``lssl fit`` holds, on the CPU; nothing in the file can run code."""
    if not Path(path).is_file():
        raise InputError(f"There is no checkpoint {path}.")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError):
        raise InputError(f"{path} is no checkpoint, is cut off, or holds objects that are not safe to load.") from None
    if not isinstance(checkpoint, dict) or "config" not in checkpoint.get("lssl", {}):
        raise InputError(f"{path} was not written by lssl fit: it carries no config to rebuild its network from.")
    check_format(checkpoint, str(path))
    return checkpoint


def load_task(path: str | Path) -> Task[Any]:
    """The task that a checkpoint holds, with its weights, on the CPU; nothing needs to be known of its class.

    The class is imported by the name in the checkpoint's config.

    Args:
        path: of a checkpoint written by ``lssl fit``.
    """
    checkpoint = read_checkpoint(path)
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
        arguments["matching"] = _without(arguments["matching"], {"matcher"})  # may be a checkpoint that is gone
    wanted = {
        "backbone": config["backbone"],
        "views": _without(config["views"], {"transforms"}),
        "model": {"class_path": model["class_path"], "init_args": arguments},
    }
    try:
        parsed = parser.parse_object(wanted)
    except ArgumentError as error:
        raise InputError(f"{path}: {model['class_path']} of its config cannot be built here: {error}") from None
    task: Task[Any] = parser.instantiate(parsed).model
    task.on_load_checkpoint(checkpoint)  # a Segmenter learns its classes from it
    task.load_state_dict(checkpoint["state_dict"])
    return task.eval()


def _without(arguments: dict[str, Any], names: set[str]) -> dict[str, Any]:
    return {name: value for name, value in arguments.items() if name not in names}
