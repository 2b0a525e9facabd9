"""Loads weights of a pretrained network into another network, and reports what matched."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import yaml
from torch import Tensor

from lssl.checkpoint import read_checkpoint
from lssl.data.spacing import spacing_text, voxels_per_step
from lssl.networks.backbone import Backbone
from lssl.segmentation.foreign import is_foreign, read_weights, renamed
from lssl.utils.errors import InputError

__all__ = ["load_pretrained"]

PREFIX = "backbone.network."
BAR = 0.9  # share of the weights that a file of other software must have, unless `partial`


@torch.no_grad()
def load_pretrained(
    backbone: Backbone,
    path: str | Path,
    part: Literal["encoder", "network"] = "network",
    partial: bool = False,
    adapt_channels: bool = False,
    spacing: Sequence[float] | None = None,
) -> str:
    """Copies weights and buffers of a checkpoint's network into a backbone.

    Args:
        backbone: to start from the checkpoint.
        path: of a checkpoint of any strategy, or of a plain state_dict or ``.safetensors`` file of other software.
        part: the whole ``network``, or its ``encoder``, which is everything that the coarsest tap depends on.
        partial: loads tensors of the same name and shape, instead of refusing a different network. A file of other
            software is refused only if less than 0.9 of the weights match: its last layer has other classes.
        adapt_channels: if the number of image channels differs from the checkpoint's, every channel gets the mean of
            the first convolution's weights over channels. The mean is scaled so that equal channels give the same
            response as before.
        spacing: working spacing of this run in mm; another one than the checkpoint's is noted.

    Returns:
        What matched, in words.
    """
    every_name = backbone.network.state_dict()
    ours = _each_once(every_name)
    theirs, method, padding, before = _foreign(path, ours) if is_foreign(path) else _own(path)
    theirs = {name: value for name, value in theirs.items() if name in ours or name not in every_name}
    whole = len(ours)
    if part == "encoder":
        ours, theirs = (_within(state, backbone) for state in (ours, theirs))
    adapted = _adapted(ours, theirs) if adapt_channels else {}
    theirs |= adapted
    fitting = [name for name, value in ours.items() if name in theirs and theirs[name].shape == value.shape]
    share = sum(ours[name].numel() for name in fitting) / max(1, sum(value.numel() for value in ours.values()))
    wrong = _differences(ours, theirs)
    if not partial and wrong and (padding or share < BAR):
        network = "its own network, which lssl fit takes if none is named" if padding else "its network as backbone"
        raise InputError(
            f"The network of {path} differs from this one in {len(wrong)} tensors ({_some(wrong)}); "
            f"{share:.0%} of the weights match; use {network}"
            f"{_adapt_hint(ours, theirs)}, or set model.init_args.partial to true to take what fits."
        )
    if not fitting:
        raise InputError(f"Nothing in {path} fits this network: no tensor has the same name and shape.")
    for name in fitting:
        ours[name].copy_(theirs[name])
    parameters = dict(backbone.network.named_parameters())
    moved = sum(parameters[name].numel() for name in fitting if name in parameters)
    every = sum(parameter.numel() for parameter in parameters.values())
    text = (
        f"Pretrained {part} by {method} ({path}): {len(fitting)} of {whole} tensors and "
        f"{moved:,} of {every:,} parameters of the network matched; the head is new."
    )
    if wrong and not padding:
        text += f" {share:.0%} of the weights of the {part}; left as they were: {_some(wrong)}."
    if adapted:
        text += f" The first convolution was averaged over channels and repeated ({', '.join(adapted)})."
    if not padding:
        text += f" Note: the file does not say its padding, this network has '{backbone.padding}'."
    elif padding != backbone.padding:
        text += f" Note: it was trained with padding '{padding}', this network has '{backbone.padding}'."
    if spacing and before and (voxels_per_step(np.array([before]), spacing) != 1).any():
        text += f" Note: it was trained at {spacing_text(before)} mm, this run works at {spacing_text(spacing)} mm."
    return text


def _own(path: str | Path) -> tuple[dict[str, Tensor], str, str, list[float]]:
    """Tensors of a checkpoint's network, the name of its method, its padding and its working spacing, if stored."""
    checkpoint = read_checkpoint(path)
    config = yaml.safe_load(checkpoint["lssl"]["config"])
    state = checkpoint["state_dict"]
    theirs = {name.removeprefix(PREFIX): value for name, value in state.items() if name.startswith(PREFIX)}
    method, padding = config["model"]["class_path"].rpartition(".")[2], config["backbone"].get("padding", "zeros")
    return theirs, method, padding, checkpoint.get("spacing", [])


def _foreign(path: str | Path, ours: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], str, str, list[float]]:
    """Tensors of a file that lssl did not write, by our names; its padding and spacing are unknown."""
    weights = read_weights(path)
    theirs, how = renamed(weights, ours)
    return theirs, f"other software ({len(theirs)} of {len(weights)} tensors of the file{how and f', {how}'})", "", []


def _each_once(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state_dict without second names of one tensor, as MONAI's DynUNet has."""
    seen: dict[int | str, str] = {}
    return {name: value for name, value in state.items() if seen.setdefault(value.data_ptr() or name, name) == name}


def _some(phrases: Sequence[str]) -> str:
    return "; ".join(phrases[:3]) + ("; …" if len(phrases) > 3 else "")


def _within(state: Mapping[str, Tensor], backbone: Backbone) -> dict[str, Tensor]:
    """The encoder's tensors: its parameters, and the buffers of modules whose parameters are its own."""
    modules = {name.removeprefix("network.").rpartition(".")[0] for name in backbone.encoder()}
    return {name: value for name, value in state.items() if name.rpartition(".")[0] in modules}


def _other_channels(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> list[str]:
    """Kernels that differ only in their number of input channels."""
    pairs = {name: (value.shape, theirs[name].shape) for name, value in ours.items() if name in theirs}
    return [
        name
        for name, (one, other) in pairs.items()
        if len(one) == len(other) == 5 and one[1] != other[1] and (one[0], *one[2:]) == (other[0], *other[2:])
    ]


def _adapted(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    adapted = {}
    for name in _other_channels(ours, theirs):
        here, there = ours[name].shape[1], theirs[name].shape[1]
        adapted[name] = theirs[name].mean(1, keepdim=True).repeat_interleave(here, 1) * (there / here)
    return adapted


def _adapt_hint(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> str:
    if not _other_channels(ours, theirs):
        return ""
    return ", set model.init_args.input_channels to adapt if the images have other channels"


def _differences(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> list[str]:
    """Differences between two networks' tensors, one phrase each."""
    wrong = [f"{name} is missing there" for name in ours if name not in theirs]
    wrong += [f"{name} is missing here" for name in theirs if name not in ours]
    return wrong + [
        f"{name} is {'×'.join(map(str, theirs[name].shape))} there and {'×'.join(map(str, value.shape))} here"
        for name, value in ours.items()
        if name in theirs and theirs[name].shape != value.shape
    ]
