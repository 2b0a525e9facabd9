"""Backbone: any image-to-image network with named taps; their channels, strides and centre offsets are measured."""

from __future__ import annotations

import dataclasses
import inspect
import math
import warnings
from abc import ABCMeta
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lssl.networks.blocks import Blocks
from lssl.networks.feature_geometry import Tap, measure
from lssl.networks.tapped import StopForward, output_maps, tapped, tokens_to_map
from lssl.utils.errors import InputError, nearest

__all__ = ["Backbone", "TakesNetworks", "Tap", "unet", "unet_taps"]

_TOKENS = "(tokens)"  # reserved name beside those of taps


def unet(
    in_channels: int = 1,
    out_channels: int = 32,
    features: Sequence[int] = (16, 32, 64, 128, 256, 16),
    norm: str = "batch",
) -> nn.Module:
    """MONAI's BasicUNet with the widths of Ren et al. (2022): the default network.

    As in the paper: five double-convolution levels of width 16 to 256, max-pooling, skip connections by concatenation.
    MONAI's block differs in two points. It upsamples by a 2×2×2 transposed convolution that halves the channels (the
    paper: nearest neighbour, channels unchanged), and level 0 has two convolutions (the paper: three).

    Args:
        in_channels: image channels.
        out_channels: channels of the output map; reconstructions and segmentations are computed from it.
        features: widths of levels 0 to 4, then of the last decoder level.
        norm: ``batch`` (as published; needs at least 2 crops), ``instance`` or ``group``.
    """
    from monai.networks.nets import BasicUNet

    kind = ("group", {"num_groups": 8}) if norm == "group" else (norm, {"affine": True})
    return BasicUNet(3, in_channels, out_channels, tuple(features), act="relu", norm=kind, bias=norm != "batch")


def unet_taps() -> dict[str, str]:
    """Taps of :func:`unet`: the first convolution of each level, before norm and activation (Ren et al., 2022)."""
    taps = {"encoder.0": "conv_0.conv_1.conv"}
    taps |= {f"encoder.{level}": f"down_{level}.convs.conv_0.conv" for level in (1, 2, 3)}
    taps |= {"skip.3": "down_3.convs.conv_1.conv", "bottleneck": "down_4.convs.conv_0.conv"}
    taps |= {f"decoder.{level}": f"upcat_{level + 1}.convs.conv_0.conv" for level in (3, 2, 1, 0)}
    return taps


class Backbone(nn.Module):
    """A network with named features.

    Args:
        network: maps ``(B, C, D, H, W)`` to ``(B, C', D, H, W)``, or to a list of maps for deep supervision, of which
            the finest is the output; a config gives its ``class_path``. ``None`` takes :func:`unet`.
        taps: name → path of a submodule (``network.get_submodule``). ``None`` takes :func:`unet_taps`, for a BasicUNet.
        in_channels: image channels.
        padding: padding of the network's convolutions: ``zeros``, or ``reflect`` as published.
        channels_last: store channels innermost in memory. With zero padding, a step took 0.6 of the time on two CPU
            cores; measure it on your GPU.
        tokens: path of a transformer's submodule that makes tokens from patches, before positions are added. Methods
            that mask tokens need it (``vit.patch_embedding.patch_embeddings``, ``swinViT.patch_embed``).
        compile: ``torch.compile`` of the blocks between taps; see :class:`lssl.networks.blocks.Blocks`.
        checkpointing: keep no activations within blocks and compute them again in the backward pass: less memory, and
            about a third more time.
    """

    def __init__(
        self,
        network: nn.Module | None = None,
        taps: dict[str, str] | None = None,
        in_channels: int = 1,
        padding: Literal["zeros", "reflect"] = "zeros",
        channels_last: bool = False,
        tokens: str | None = None,
        compile: bool = False,
        checkpointing: bool = False,
    ) -> None:
        super().__init__()
        if hasattr(network, "_orig_mod"):
            raise InputError(
                "backbone: torch.compile hides the submodules that taps name; give the network uncompiled, with "
                "backbone.compile true."
            )
        self.network = unet(in_channels) if network is None else network
        _refuse_second_input(self.network)
        modules = dict(self.network.named_modules())
        self._paths = unet_taps() if taps is None else dict(taps)
        if taps is None and not modules.keys() >= set(self._paths.values()):
            raise InputError(
                f"backbone: name the taps of {type(network).__name__} (taps: {{name: submodule path}}), for instance "
                f"of {', '.join(_outer(modules))}."
            )
        self.in_channels, self.padding = in_channels, padding
        paths = self._paths if tokens is None else {**self._paths, _TOKENS: tokens}
        for name, path in paths.items():
            if path not in modules:
                raise InputError(f"backbone: tap '{name}' names no submodule '{path}'{nearest(path, _outer(modules))}")
        _set_padding(self.network, padding)
        self._format = torch.channels_last_3d if channels_last else torch.contiguous_format
        self.network.to(memory_format=self._format)  # type: ignore[call-overload]
        measured = measure(self.network, paths, in_channels)
        self.tokens = measured.taps.pop(_TOKENS) if tokens is not None else None
        self.taps: dict[str, Tap] = measured.taps
        self.out_channels: int = measured.out_channels
        self._blocks = Blocks(compile, checkpointing)
        _warn_of_uncertain_places(self.taps)

    def places(self) -> dict[str, list[float]]:
        """Tap → offset, for a checkpoint: where paths of different centres meet, it depends on the initial weights."""
        return {name: list(tap.offset) for name, tap in self.taps.items()}

    def set_places(self, places: Mapping[str, Sequence[float]]) -> None:
        """Restores the offsets that a network was trained with."""
        for name in places.keys() & self.taps.keys():
            x, y, z = places[name]
            self.taps[name] = dataclasses.replace(self.taps[name], offset=(x, y, z))

    def forward(self, image: Tensor, taps: Sequence[str] = (), output: bool = False) -> dict[str, Tensor]:
        """Features at the named taps, and ``"output"`` if requested.

        Without ``output`` the pass stops after the last tap, so an encoder-only method does not run the decoder.
        """
        self.check_taps(taps)
        paths = {name: self._paths[name] for name in taps}
        with (
            self._blocks.within(self.network, list(paths.values())),
            tapped(self.network, paths, not output) as features,
        ):
            try:
                result = self.network(image.contiguous(memory_format=self._format))
                if output:
                    features["output"] = output_maps(result)[0]
            except StopForward:
                pass
        if silent := [name for name in taps if name not in features]:
            raise InputError(
                f"backbone: tap '{silent[0]}' ('{self._paths[silent[0]]}') gave nothing; torch.compile leaves out "
                f"the hooks that read taps, so give the network uncompiled, with backbone.compile true."
            )
        return {name: tokens_to_map(value, image.shape[2:]) for name, value in features.items()}

    def outputs(self, image: Tensor) -> list[Tensor]:
        """All outputs of a network with deep supervision, the finest first; of any other network, its output alone."""
        return output_maps(self.network(image.contiguous(memory_format=self._format)))

    @classmethod
    def of(cls, network: nn.Module) -> Backbone:
        """A backbone as it is; a plain network with the taps of :func:`unet_taps`, and the channels it takes."""
        if isinstance(network, Backbone):
            return network
        if not isinstance(network, nn.Module):
            raise InputError(f"backbone: give a Backbone or a network, not {type(network).__name__}.")
        first = next((part.in_channels for part in network.modules() if isinstance(part, nn.Conv3d)), 1)
        return cls(network, in_channels=first)

    def path_of(self, tap: str) -> str:
        """Path of a tap's submodule within the network."""
        return self._paths[tap]

    def freeze_unused(self, taps: Sequence[str], output: bool = False) -> None:
        """Freezes all parameters that these taps (and the output, if requested) do not depend on.

        Distributed training would wait forever for the gradients of such parameters.
        """
        if not taps and not output:
            return
        used = self.upstream_parameters(taps, output)
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(parameter.requires_grad and name in used)

    def upstream_parameters(self, taps: Sequence[str], output: bool = False) -> set[str]:
        """Names of the trained parameters that these taps (and the output, if requested) depend on."""
        self.check_taps(taps)
        trained = {name: parameter for name, parameter in self.named_parameters() if parameter.requires_grad}
        if not trained:
            return set()
        training = self.training
        self.eval()
        coarsest = 2 * max((stride for tap in self.taps.values() for stride in tap.stride), default=8)
        device = next(iter(trained.values())).device
        for side in sorted({coarsest, 64, 96, 128}):  # some networks accept certain sizes only
            image = torch.zeros(1, self.in_channels, side, side, side, device=device)
            try:
                with torch.enable_grad(), torch.compiler.set_stance("force_eager"):
                    features = self(image, taps, output)
                break
            except (RuntimeError, ValueError, AssertionError) as error:
                said = str(error).partition("\n")[0]
        else:
            raise InputError(
                f"backbone: the network accepts no cube of 64, 96 or 128 voxels a side and {self.in_channels} "
                f"channel(s) (backbone.in_channels); it says: {said}"
            )
        with torch.enable_grad():
            total = torch.stack([feature.sum() for feature in features.values()]).sum()
        gradients = torch.autograd.grad(total, list(trained.values()), allow_unused=True)
        self.train(training)
        return {name for name, gradient in zip(trained, gradients, strict=True) if gradient is not None}

    def encoder(self) -> set[str]:
        """Names of the parameters that the coarsest tap depends on; all others belong to the decoder."""
        coarsest = max(self.taps, key=lambda name: max(self.taps[name].stride))
        return self.upstream_parameters([coarsest])

    def normalised_weights(self, taps: Sequence[str], weights: Mapping[str, float] | None) -> dict[str, float]:
        """Weights of taps, normalised to sum 1; equal weights for ``None``. Taps of weight 0 are left out."""
        self.check_taps(taps)
        unknown = [tap for tap in weights or {} if tap not in taps]
        if unknown:
            raise InputError(f"tap_weights: '{unknown[0]}' is none of the taps used, {', '.join(taps)}.")
        chosen = {tap: (weights or {}).get(tap, 1.0 if weights is None else 0.0) for tap in taps}
        total = sum(chosen.values())
        if total <= 0 or min(chosen.values()) < 0:
            raise InputError("tap_weights: give at least one tap a positive weight, and none a negative one.")
        return {tap: weight / total for tap, weight in chosen.items() if weight > 0}

    def check_taps(self, names: Sequence[str]) -> None:
        """Refuses unknown taps."""
        unknown = [name for name in names if name not in self.taps]
        if unknown:
            raise InputError(f"There is no tap '{unknown[0]}'; the backbone has {', '.join(self.taps)}.")

    def pad(self, image: Tensor) -> Tensor:
        """Pads zeros behind the last voxels until all strides divide the sides; indices do not change."""
        padding: list[int] = []
        for axis in (2, 1, 0):
            side, stride = image.shape[2 + axis], max(tap.stride[axis] for tap in self.taps.values())
            padding += [0, max(2 * stride, math.ceil(side / stride) * stride) - side]
        return F.pad(image, padding) if any(padding) else image

    def check_size(self, size: Sequence[int]) -> None:
        """Refuses views if a stride of the network does not divide their sides."""
        for name, tap in self.taps.items():
            for side, stride in zip(size, tap.stride, strict=True):
                if side % stride:
                    low = side // stride * stride
                    fitting = [str(near) for near in (low, low + stride) if near >= 2 * stride] or [str(2 * stride)]
                    raise InputError(
                        f"views: a side of {side} voxels is not divisible by {stride}, the stride of tap '{name}'; "
                        f"use {' or '.join(fitting)}."
                    )
                if side < 2 * stride:
                    raise InputError(
                        f"views: a side of {side} voxels leaves a single feature at tap '{name}', whose stride is "
                        f"{stride}; use {2 * stride} or more."
                    )


class TakesNetworks(ABCMeta):
    """A plain network given as ``backbone`` becomes a Backbone before ``__init__`` reads its taps.

    A class that builds its own backbone takes none, and is left alone.
    """

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        """Makes an instance."""
        if "backbone" in kwargs:
            kwargs["backbone"] = Backbone.of(kwargs["backbone"])
        elif args and next(iter(cls.__signature__.parameters), "") == "backbone":
            args = (Backbone.of(args[0]), *args[1:])
        return super().__call__(*args, **kwargs)

    @property
    def __signature__(cls) -> inspect.Signature:
        """That of ``__init__``, as without this metaclass."""
        own = inspect.signature(cls.__init__)  # type: ignore[misc]
        return own.replace(parameters=list(own.parameters.values())[1:])


def _refuse_second_input(network: nn.Module) -> None:
    """A network must need an image alone."""
    try:
        parameters = list(inspect.signature(network.forward).parameters.values())
    except (TypeError, ValueError):  # compiled code has no signature
        return
    needed = [
        p.name for p in parameters if p.default is p.empty and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
    ]
    if len(needed) > 1:
        raise InputError(
            f"backbone: {type(network).__name__} needs {' and '.join(needed[1:])} beside the image; give a network of "
            f"one input, such as one of your own that wraps it."
        )


def _outer(paths: Iterable[str], depth: int = 2) -> list[str]:
    """The outer paths, for a message."""
    return [path for path in paths if path and path.count(".") < depth]


def _set_padding(network: nn.Module, padding: Literal["zeros", "reflect"]) -> None:
    for module in network.modules():
        if isinstance(module, nn.Conv3d) and _pads(module.padding):
            module.padding_mode = padding


def _pads(padding: str | tuple[int, ...]) -> bool:
    return padding == "same" if isinstance(padding, str) else any(padding)


def _warn_of_uncertain_places(taps: Mapping[str, Tap]) -> None:
    """Says so if a place is uncertain by more than a quarter of a stride."""
    for name, tap in taps.items():
        share = max(u / s for u, s in zip(tap.uncertainty, tap.stride, strict=True))
        if share > 0.25:
            warnings.warn(
                f"backbone: paths of different centres meet in tap '{name}', so the place of its features is uncertain "
                f"by {max(tap.uncertainty):.2g} voxels, {share:.0%} of its stride; terms that compare voxels there are "
                f"blurred.",
                stacklevel=3,
            )
