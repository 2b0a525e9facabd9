"""Completes a composed config: network and views of the checkpoint that a run starts from, and what data know."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from lightning.pytorch.utilities import rank_zero_info

from lssl.checkpoint import read_checkpoint
from lssl.cli.compose import OF_THE_RECIPE, Config, compose
from lssl.cli.registered import TASKS, registered
from lssl.data.datamodule import PairDataModule
from lssl.data.spacing import spacing_text
from lssl.segmentation.foreign import is_foreign
from lssl.utils.errors import InputError
from lssl.utils.trust import check_classes, refuse_commands

IN_CHANNELS = ("in_channels", "in_chans", "input_channels")  # of MONAI, timm and nnU-Net

__all__ = ["at", "complete", "refuse_missing_weights"]


def complete(files: Sequence[str], data: str | None = None, options: Sequence[tuple[str, str]] = ()) -> Config:
    """Composes a config; if it names no network, that of the initial checkpoint is used, with its views and spacing."""
    config = compose(files, data, options)
    refuse_commands(config.values)
    path = at(config.values, "model", "init_args", "pretrained")
    if (
        isinstance(path, str)
        and Path(path).is_file()
        and not at(config.values, "backbone", "network")
        and not is_foreign(path)
    ):
        checkpoint = read_checkpoint(path)
        about, spacing = checkpoint["lssl"], checkpoint.get("spacing")
        if "structure" in about:
            raise InputError(
                f"{path} comes from a Trainer in Python, so it has no config of its network; name it, as with --config "
                f"network/unet."
            )
        theirs = yaml.safe_load(about["config"])
        views = {"size": theirs["views"]["size"], **({"spacing": [round(mm, 5) for mm in spacing]} if spacing else {})}
        both = _shows_both_visits(config.values)
        network = {"backbone": _of_two_visits(theirs["backbone"]) if both else theirs["backbone"], "views": views}
        check_classes(network, path)
        config = compose(files, data, options, network, path)
        name = (theirs["backbone"].get("network") or {}).get("class_path", "the default U-Net").rpartition(".")[2]
        size = "×".join(str(side) for side in np.broadcast_to(views["size"], 3))
        at_mm = f" of {spacing_text(spacing)} mm" if spacing else ""
        channels = "padding and, for two visits, twice its channels" if both else "padding and channels"
        rank_zero_info(f"{path}: network ({name}), taps, {channels} are its own, as are views of {size} voxels{at_mm}.")
    _agree_on_channels(config)
    _leave_out_unknown(config)
    return config


def _shows_both_visits(values: Mapping[str, Any]) -> bool:
    """Whether the task shows its network a visit and the one before as channels."""
    options = at(values, "model", "init_args") or {}
    return options.get("context") == "previous" or options.get("combine") == "concatenate"


def _of_two_visits(backbone: Mapping[str, Any]) -> dict[str, Any]:
    """The same backbone for twice as many channels; the network's own option is found by its usual names."""
    wide = {**backbone, "in_channels": 2 * backbone.get("in_channels", 1)}
    if network := backbone.get("network"):
        own = dict(network.get("init_args") or {})
        own |= {name: 2 * own[name] for name in IN_CHANNELS if isinstance(own.get(name), int)}
        wide["network"] = {**network, "init_args": own}
    return wide


def _agree_on_channels(config: Config) -> None:
    """One number of image channels: that of the backbone, or else of its network, which has an option of its own."""
    backbone = config.values.get("backbone") or {}
    own = at(backbone, "network", "init_args") or {}
    name = next((name for name in IN_CHANNELS if name in own), None)
    if name is None:
        return
    key, option = ("backbone", "in_channels"), ("backbone", "network", "init_args", name)
    source = config.sources.get(option, "")
    if "in_channels" not in backbone:
        backbone["in_channels"], config.sources[key] = own[name], source
    elif str(backbone["in_channels"]) != str(own[name]):
        if source.startswith("--"):
            given = f"backbone.in_channels is {backbone['in_channels']} and {'.'.join(option)} {own[name]}"
            raise InputError(f"{given}: give the first alone.")
        own[name] = backbone["in_channels"]


def refuse_missing_weights(model: str, path: Any) -> None:
    """Refuses a task's initial checkpoint that is not there, before data are read.

    Args:
        model: its class path; only the ``pretrained`` of our own tasks is known to be a file.
        path: as given.
    """
    if model.rpartition(".")[2] not in TASKS or path is None or Path(path).is_file():
        return
    saved = [Path(path) / "checkpoints" / f"{name}.ckpt" for name in ("best", "last")]
    inside = next((f"; give {file}" for file in saved if file.is_file()), "")
    raise InputError(f"model.init_args.pretrained: there is no checkpoint {path}{inside}.")


def _leave_out_unknown(config: Config) -> None:
    """A user's datamodule may lack the options that recipes set for any data."""
    name = at(config.values, "data", "class_path")
    cls = next((cls for cls in registered() if cls.__name__ == name), None) or _imported(name)
    arguments = at(config.values, "data", "init_args")
    if cls is None or issubclass(cls, PairDataModule) or not arguments:
        return
    known = inspect.signature(cls).parameters
    for key in sorted({*OF_THE_RECIPE} & {*arguments} - {*known}):
        source = config.sources.get(("data", "init_args", key), "the config")
        rank_zero_info(f"{cls.__name__} has no option {key}: that of {source} is left out.")
        del arguments[key]


def _imported(name: str | None) -> type | None:
    module, _, attribute = (name or "").rpartition(".")
    try:
        found = getattr(importlib.import_module(module), attribute) if module else None
    except (ImportError, AttributeError):  # the parser reports it
        return None
    return found if inspect.isclass(found) else None


def at(values: Any, *keys: str) -> Any:
    """The value at nested keys; ``None`` where there is none."""
    for key in keys:
        values = values.get(key) if isinstance(values, Mapping) else None
    return values
