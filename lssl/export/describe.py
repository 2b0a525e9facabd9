"""What a network's weights do not say: its class, padding, taps, training, and the images that it takes."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from lssl.networks.backbone import unet
from lssl.utils.errors import InputError

__all__ = ["constructor", "described", "model_card"]

NORMALISATION = "background 0, 99.9th percentile of the foreground 1"
LIBRARIES = {"lssl": "lssl", "monai": "monai", "nnunet": "nnunet", "safetensors": "pytorch", "onnx": "onnx"}
CARD = """\
---
library_name: {library}
pipeline_tag: {pipeline}
tags: [medical-imaging, mri, longitudinal, self-supervised, 3d]
license: {license}
---
# {name}

A {network} of {parameters:,} parameters, trained with {model} by lssl {version} for {steps} steps.

| | |
|---|---|
| input | {channels}, `(B, C, D, H, W)`, axes closest to RAS+; sides {size} in training |
| intensities | {normalisation} |
| voxels | {spacing} |
| output | {output} |
| training data | {data} |
| weights | `{weights}`, SHA-256 {revision} |

{use}
{check}
Not a medical device. State a licence that your training data allow before you pass the weights on.
"""
REBUILD = """
`python rebuild.py` does this without lssl and compares the answers with the stored ones. The padding of the
convolutions is `{padding}`. A state_dict does not hold that: a network with another padding loads the weights and
answers differently.
"""


def described(task: Any, stored: Mapping[str, Any], spacing: Sequence[float] | None, license: str) -> dict[str, Any]:
    """The content of ``metadata.json``.

    Args:
        task: the trained task.
        stored: its checkpoint.
        spacing: mm between voxels; None takes the checkpoint's.
        license: of the weights.
    """
    config = yaml.safe_load(stored["lssl"]["config"])
    backbone, classes = task.backbone, stored.get("classes") or {}
    kind, arguments = constructor(config["backbone"].get("network"), backbone.in_channels)
    data = stored["lssl"].get("data") or {}
    trained = stored.get("spacing") or (task.spacing.tolist() if classes else data.get("spacing_mm"))
    names = dict(zip(classes.get("names", ()), map(list, classes.get("values", ())), strict=True))
    return {
        "network": {"class": kind, "arguments": arguments},
        "padding": backbone.padding,
        "in_channels": backbone.in_channels,
        "out_channels": task.head.out_channels if classes else backbone.out_channels,
        "head": [backbone.out_channels, task.head.out_channels] if classes else None,
        "taps": {
            name: {
                "path": backbone.path_of(name),
                "channels": tap.channels,
                "stride": list(tap.stride),
                "offset": list(tap.offset),
            }
            for name, tap in backbone.taps.items()
        },
        "axes": "RAS+",
        "normalisation": NORMALISATION,
        "spacing_mm": spacing or (trained and [round(float(side), 4) for side in trained]),
        "view_size": list(task.views.size),
        "classes": names,
        "parameters": sum(parameter.numel() for parameter in backbone.network.parameters()),
        "strategy": config["model"]["class_path"].rpartition(".")[2],
        "steps": int(stored["global_step"]),
        "data": data,
        "lssl": stored["lssl"]["version"],
        "license": license,
    }


def constructor(network: Mapping[str, Any] | None, in_channels: int) -> tuple[str, dict[str, Any]]:
    """Import path of a network's class outside lssl, and its arguments.

    Args:
        network: the config's ``backbone.network``.
        in_channels: of the image; the default network's config does not say them.
    """
    path = "lssl.networks.backbone.unet" if network is None else network["class_path"]
    given = {key: value for key, value in ((network or {}).get("init_args") or {}).items() if value is not None}
    if path == "lssl.networks.backbone.unet":
        options = {name: parameter.default for name, parameter in inspect.signature(unet).parameters.items()}
        options |= {"in_channels": in_channels, **given}
        norm = options["norm"]
        kind = ["group", {"num_groups": 8}] if norm == "group" else [norm, {"affine": True}]
        return "monai.networks.nets.BasicUNet", {
            "spatial_dims": 3,
            "in_channels": options["in_channels"],
            "out_channels": options["out_channels"],
            "features": list(options["features"]),
            "act": "relu",
            "norm": kind,
            "bias": norm != "batch",
        }
    if path.startswith("lssl."):
        raise InputError(f"backbone.network: {path} is a class of lssl, so nothing could rebuild it without lssl.")
    if nested := [name for name, value in given.items() if isinstance(value, Mapping) and "class_path" in value]:
        raise InputError(
            f"backbone.network: {path} takes another class as {nested[0]}; export networks of plain values."
        )
    return path, given


def model_card(meta: Mapping[str, Any], name: str, target: str, weights: str, use: str) -> str:
    """The ``README.md``: a model card as Hugging Face reads it.

    Args:
        meta: of :func:`described`.
        name: title.
        target: what it was exported for.
        weights: name of the file with the weights.
        use: how the weights are used, in Markdown.
    """
    data, spacing = meta["data"], meta["spacing_mm"]
    many = (
        f"{data['training_visits']} visits of {data['training_subjects']} subjects" if "training_visits" in data else ""
    )
    channels = ", ".join(data.get("channels") or [])
    return CARD.format(
        library=LIBRARIES[target],
        pipeline="image-segmentation" if meta["classes"] else "image-feature-extraction",
        license=meta["license"],
        name=name,
        network=meta["network"]["class"].rpartition(".")[2],
        parameters=meta["parameters"],
        model=meta["strategy"],
        version=meta["lssl"],
        steps=meta["steps"],
        channels=f"{meta['in_channels']} channel(s){f' ({channels})' if channels else ''}",
        size="×".join(map(str, meta["view_size"])),
        normalisation=meta["normalisation"],
        spacing=" × ".join(f"{side:g}" for side in spacing) + " mm" if spacing else "not recorded",
        output=f"logits of {', '.join(['background', *meta['classes']])}"
        if meta["classes"]
        else "a feature map, and the taps of `metadata.json`",
        data=f"{many} ({data['class']})" if many else data.get("class", "not recorded"),
        weights=weights,
        revision=meta["revision"][:16],
        use=use,
        check="" if target == "lssl" else REBUILD.format(padding=meta["padding"]),
    )
