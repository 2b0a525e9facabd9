"""A network as nnU-Net v2 reads it: a checkpoint and its plans.

MONAI's DynUNet computes what nnU-Net's PlainConvUNet computes, so its weights are renamed. Networks of
``dynamic_network_architectures`` keep their names. The 1×1×1 convolution of a Segmenter is merged into the last layer:
``W_h (W x + b) + b_h = (W_h W) x + (W_h b + b_h)``.

nnU-Net numbers the axes of an image z, y, x and does not turn it; lssl numbers them x, y, z after turning it to RAS+.
The plans say both: the reader ``NibabelIOWithReorient``, and ``transpose_forward: [2, 1, 0]``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lssl.utils.errors import InputError

__all__ = ["CONFIGURATION", "PLANS", "PREDICT", "USE", "architecture", "dataset_json", "plans", "weights"]

CONFIGURATION, PLANS, DATASET = "3d_fullres", "lsslPlans", "Dataset000_lssl"
PLAIN = "dynamic_network_architectures.architectures.unet.PlainConvUNet"
RESIDUAL = "dynamic_network_architectures.architectures.unet.ResidualEncoderUNet"
DYNUNET = "monai.networks.nets.DynUNet"
IMPORTED = ("conv_op", "norm_op", "dropout_op", "nonlin")
USE = f"""\
To fine-tune with nnU-Net, copy the plans to your data set under their name, preprocess and train with them:

```
sed 's/{DATASET}/DatasetNNN_Mine/' plans.json > $nnUNet_preprocessed/DatasetNNN_Mine/{PLANS}.json
nnUNetv2_preprocess -d NNN -plans_name {PLANS} -c {CONFIGURATION}
nnUNetv2_train NNN {CONFIGURATION} 0 -p {PLANS} -pretrained_weights fold_all/checkpoint_final.pth
```

nnU-Net takes all layers but the last. Its `RescaleTo01Normalization` differs from the training's by a factor per image,
which a norm over each image removes after the first convolution. Layers of deep supervision are zero here."""
PREDICT = """

`nnUNetv2_predict_from_modelfolder -m . -f all -i IN -o OUT` segments images. Labels have the numbers of
`dataset.json`."""
RESAMPLING = {"is_seg": False, "order": 3, "order_z": 0, "force_separate_z": None}


def architecture(kind: str, arguments: Mapping[str, Any], network: nn.Module) -> dict[str, Any]:
    """Class and arguments, as a plans file holds them.

    Args:
        kind: import path of the network's class.
        arguments: that it was built with.
        network: the network.
    """
    name = kind.rpartition(".")[2]
    if name == "DynUNet":
        return _of_dynunet(arguments, network)
    if not kind.startswith("dynamic_network_architectures.") or name not in (
        PLAIN.rpartition(".")[2],
        "ResidualEncoderUNet",
    ):
        raise InputError(
            f"backbone.network: {name} is no network of nnU-Net; train one that is (--config network/dynunet, or a "
            f"PlainConvUNet or ResidualEncoderUNet of dynamic_network_architectures)."
        )
    own = {
        key: value
        for key, value in arguments.items()
        if key not in ("input_channels", "num_classes", "deep_supervision")
    }
    return {
        "network_class_name": PLAIN if name.startswith("Plain") else RESIDUAL,
        "arch_kwargs": own,
        "_kw_requires_import": [key for key in IMPORTED if key in own],
    }


def _of_dynunet(given: Mapping[str, Any], network: Any) -> dict[str, Any]:
    """PlainConvUNet's arguments for MONAI's DynUNet; refuses what it has no counterpart for."""
    block, stages = network.input_block, len(given["strides"])
    strides = [_triple(one) for one in given["strides"]]
    different = {
        "res_block": given.get("res_block"),
        "dropout": given.get("dropout"),
        "trans_bias": given.get("trans_bias"),
        "deep_supervision": given.get("deep_supervision"),
        "strides": strides[0] != [1, 1, 1],
        "upsample_kernel_size": [_triple(one) for one in given["upsample_kernel_size"]] != strides[1:],
    }
    for option, value in different.items():
        if value:
            raise InputError(f"backbone.network: nnU-Net's PlainConvUNet has no counterpart for DynUNet's {option}.")
    norm, act = block.norm1, block.lrelu
    if not isinstance(act, nn.LeakyReLU) or not isinstance(norm, nn.InstanceNorm3d | nn.BatchNorm3d):
        raise InputError(
            f"backbone.network: {type(norm).__name__} with {type(act).__name__} is not exported to nnU-Net; train with "
            f"instance or batch norm, and leaky ReLU."
        )
    options = {
        "n_stages": stages,
        "features_per_stage": [conv.out_channels for conv in _first_convolutions(network)],
        "conv_op": "torch.nn.modules.conv.Conv3d",
        "kernel_sizes": [_triple(one) for one in given["kernel_size"]],
        "strides": strides,
        "n_conv_per_stage": [2] * stages,
        "n_conv_per_stage_decoder": [2] * (stages - 1),
        "conv_bias": False,
        "norm_op": f"{type(norm).__module__}.{type(norm).__name__}",
        "norm_op_kwargs": {"eps": norm.eps, "affine": norm.affine},
        "dropout_op": None,
        "dropout_op_kwargs": None,
        "nonlin": "torch.nn.LeakyReLU",
        "nonlin_kwargs": {"inplace": True, "negative_slope": act.negative_slope},
    }
    return {"network_class_name": PLAIN, "arch_kwargs": options, "_kw_requires_import": list(IMPORTED)}


def _first_convolutions(network: Any) -> list[nn.Conv3d]:
    return [block.conv1.conv for block in (network.input_block, *network.downsamples, network.bottleneck)]


def _triple(value: int | Sequence[int]) -> list[int]:
    return [value] * 3 if isinstance(value, int) else list(value)


def weights(kind: str, network: nn.Module, head: nn.Conv3d | None) -> dict[str, Tensor]:
    """The network's tensors by nnU-Net's names; the layers of deep supervision, which lssl does not train, are zero.

    Args:
        kind: import path of the network's class.
        network: the network.
        head: 1×1×1 convolution of a Segmenter, merged into the last layer.
    """
    state = dict(network.state_dict())
    if kind.rpartition(".")[2] == "DynUNet":
        state = _renamed(state, len(network.upsamples))  # type: ignore[arg-type]
    layers = sorted({int(found[1]) for name in state if (found := re.match(r"decoder\.seg_layers\.(\d+)\.", name))})
    last = f"decoder.seg_layers.{layers[-1]}."
    if head is not None:
        kernel, bias = state[f"{last}weight"], state[f"{last}bias"]
        merged = head.weight[:, :, 0, 0, 0] @ kernel[:, :, 0, 0, 0]
        state[f"{last}weight"] = merged[..., None, None, None]
        state[f"{last}bias"] = head.weight[:, :, 0, 0, 0] @ bias + (0 if head.bias is None else head.bias)
    out = len(state[f"{last}weight"])
    for name in list(state):
        if name.startswith("decoder.seg_layers.") and not name.startswith(last):
            state[name] = torch.zeros(out, *state[name].shape[1:])
    return {name: value.detach().clone().contiguous() for name, value in state.items()}


def _renamed(state: Mapping[str, Tensor], ups: int) -> dict[str, Tensor]:
    """DynUNet's tensors by PlainConvUNet's names: convolutions, norms and the encoder have two names each."""
    named: dict[str, Tensor] = {}
    for name, value in state.items():
        stage, _, inner = _place(name, ups)
        if not stage:
            continue
        if found := re.fullmatch(r"(conv|norm)(\d)(?:\.conv)?\.(\w+)", inner):
            part, number, leaf = found[1], int(found[2]) - 1, found[3]
            for alias in (part, f"all_modules.{('conv', 'norm').index(part)}"):
                named[f"{stage}convs.{number}.{alias}.{leaf}"] = value
        else:
            named[f"{stage}{inner.removeprefix('conv.').removeprefix('conv.')}"] = value
    for number in range(ups):
        skip = named[f"decoder.stages.{number}.convs.1.conv.weight"].shape[0]
        for leaf, shape in (("weight", (1, skip, 1, 1, 1)), ("bias", (1,))):
            named.setdefault(f"decoder.seg_layers.{number}.{leaf}", torch.zeros(shape))
    return named | {f"decoder.{name}": value for name, value in named.items() if name.startswith("encoder.")}


def _place(name: str, ups: int) -> tuple[str, str, str]:
    """Beginning of the new name, of the old one, and the rest; an empty beginning for DynUNet's own aliases."""
    for pattern, new in (
        (r"input_block\.", "encoder.stages.0.0."),
        (r"downsamples\.(\d+)\.", "encoder.stages.{after}.0."),
        (r"bottleneck\.", f"encoder.stages.{ups}.0."),
        (r"upsamples\.(\d+)\.transp_conv\.", "decoder.transpconvs.{same}."),
        (r"upsamples\.(\d+)\.conv_block\.", "decoder.stages.{same}."),
        (r"output_block\.", f"decoder.seg_layers.{ups - 1}."),
    ):
        if found := re.match(pattern, name):
            number = int(found[1]) if found.groups() else 0
            return new.format(after=number + 1, same=number), found[0], name[found.end() :]
    return "", "", name


def plans(built: Mapping[str, Any], channels: int, spacing: Sequence[float], size: Sequence[int]) -> dict[str, Any]:
    """A plans file of nnU-Net v2 with one configuration.

    Args:
        built: of :func:`architecture`.
        channels: of the image.
        spacing: mm between voxels, per axis.
        size: voxels of a patch, per axis.
    """
    probability = {"is_seg": False, "order": 1, "order_z": 0, "force_separate_z": None}
    configuration = {
        "data_identifier": f"{PLANS}_{CONFIGURATION}",
        "preprocessor_name": "DefaultPreprocessor",
        "batch_size": 2,
        "patch_size": list(size),
        "median_image_size_in_voxels": list(size),
        "spacing": list(spacing),
        "normalization_schemes": ["RescaleTo01Normalization"] * channels,
        "use_mask_for_norm": [False] * channels,
        "resampling_fn_data": "resample_data_or_seg_to_shape",
        "resampling_fn_data_kwargs": RESAMPLING,
        "resampling_fn_seg": "resample_data_or_seg_to_shape",
        "resampling_fn_seg_kwargs": {**RESAMPLING, "is_seg": True, "order": 1},
        "resampling_fn_probabilities": "resample_data_or_seg_to_shape",
        "resampling_fn_probabilities_kwargs": probability,
        "architecture": dict(built),
        "batch_dice": False,
    }
    return {
        "dataset_name": DATASET,
        "plans_name": PLANS,
        "original_median_spacing_after_transp": list(spacing),
        "original_median_shape_after_transp": list(size),
        "image_reader_writer": "NibabelIOWithReorient",
        "transpose_forward": [2, 1, 0],
        "transpose_backward": [2, 1, 0],
        "configurations": {CONFIGURATION: configuration},
        "experiment_planner_used": "ExperimentPlanner",
        "label_manager": "LabelManager",
        "foreground_intensity_properties_per_channel": {str(channel): {} for channel in range(channels)},
    }


def dataset_json(channels: Sequence[str], classes: Sequence[str]) -> dict[str, Any]:
    """What nnU-Net must know of a data set: channels and labels, in the order of the network's output."""
    return {
        "channel_names": {str(number): name for number, name in enumerate(channels)},
        "labels": {name: number for number, name in enumerate(["background", *classes])},
        "numTraining": 0,
        "file_ending": ".nii.gz",
    }
