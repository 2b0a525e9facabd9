"""A network made linear and positive: features become means of voxels, so that their places can be read off a ramp."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

__all__ = ["LinearMode", "without_parameters"]


def without_parameters(network: nn.Module) -> nn.Module:
    """A copy on the CPU, in eval mode, with all parameters zero: biases and position embeddings have no place."""
    probe = copy.deepcopy(network).cpu().float().eval()
    with torch.no_grad():
        for parameter in probe.parameters():
            parameter.zero_()
    return probe


class LinearMode(TorchFunctionMode):
    """While active, a network computes means.

    - Convolutions average channels and the middle of their kernel: 1 voxel of an odd kernel, 2 of an even one. That is
      the centre of the whole kernel. Transposed convolutions average their whole kernel.
    - Norms, activations and dropout do nothing. Gates are 1. Products of matrices are 0, so that attention is: it moves
      content, not coordinates.
    - Maxima are means.
    - Paths that meet in a sum or a concatenation are weighted: alike in the first draw, at random in the others.
      Slices of one tensor are one path, as in the patch merging of Swin.

    Args:
        batch: number of images.
        draws: number of weightings, which divides it. Image ``i`` of the batch gets the weighting ``i % draws``.

    Attributes:
        watched: name → tensor; :func:`lssl.networks.tapped.tapped` fills it during the pass.
        overwritten: names of watched tensors that were then overwritten in place.
    """

    PASS = re.compile(
        r"(batch|layer|group|instance|rms)_norm|normalize|(relu|relu6|leaky_relu|rrelu|prelu|elu|celu|selu|gelu|silu|mish"
        r"|softplus|hardswish|hardtanh|tanh|(alpha_|feature_alpha_)?dropout[123]?d?)_?"
    )
    GATES = frozenset(("sigmoid", "hardsigmoid"))
    PRODUCTS = frozenset(("matmul", "bmm", "einsum", "softmax", "scaled_dot_product_attention"))
    JOINS = frozenset(("cat", "concat", "concatenate", "stack"))

    def __init__(self, batch: int = 1, draws: int = 1) -> None:
        super().__init__()
        self.batch, self.draws = batch, draws
        self.watched: Mapping[str, Tensor] = {}
        self.overwritten: list[str] = []
        self._generator = torch.Generator().manual_seed(0)

    def __torch_function__(self, func: Callable, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = getattr(func, "__name__", ""), kwargs or {}
        writes = kwargs.get("inplace") or name == "__setitem__" or (name.endswith("_") and not name.endswith("__"))
        if writes and "dropout" not in name and args and isinstance(args[0], Tensor):
            self.overwritten += [key for key, kept in self.watched.items() if _storage(kept) == _storage(args[0])]
        if self.PASS.fullmatch(name):
            image = args[0] if args else kwargs["input"]
            kept = not writes and any(value is image for value in self.watched.values())
            return image.clone() if kept else image  # as the real function would, it makes a new tensor
        if name in self.GATES:
            return torch.ones_like(args[0])
        if name in self.PRODUCTS:
            return _zeros(func, args, kwargs)
        if name in ("add", "add_") and all(isinstance(a, Tensor) for a in args[:2]) and args[0].shape == args[1].shape:
            return torch.lerp(args[0], args[1], self._weights(args[0], 0.5))
        if name == "add" and any(_is_zeros(value) for value in args):  # scores of attention, and a bias or a mask
            return _zeros(func, args, kwargs)
        if name in self.JOINS and (scaled := self._scaled(args[0] if args else kwargs["tensors"])):
            return func(scaled, *args[1:], **{key: value for key, value in kwargs.items() if key != "tensors"})
        if name == "max_pool3d":
            return F.avg_pool3d(
                *args[:4], **{key: kwargs[key] for key in ("kernel_size", "stride", "padding") if key in kwargs}
            )
        if name in ("conv3d", "conv_transpose3d", "linear"):
            return _MEANS[name](*args, **kwargs)
        if name == "view" and not isinstance(args[1], torch.dtype):
            return args[0].reshape(*args[1:])
        if writes and args and isinstance(args[0], Tensor):  # channels may share memory
            args = (args[0].contiguous(), *args[1:])
        return func(*args, **kwargs)

    def _weights(self, like: Tensor, first: float) -> Tensor:
        """Weights ``(B, 1, ...)`` of one path: ``first`` in the first draw, random in (0.1, 0.9) in the others."""
        drawn = 0.1 + 0.8 * torch.rand(self.draws, generator=self._generator)
        drawn[0] = first
        if len(like) != self.batch:  # windows or tokens, not images
            drawn, rows = drawn[:1], len(like)
        else:
            rows = self.batch // self.draws
        return drawn.to(like.dtype).repeat(rows).view(-1, *[1] * (like.ndim - 1))

    def _scaled(self, paths: Any) -> list[Tensor]:
        """Paths times their weights; empty if they are no paths of images, but indices or slices of one tensor."""
        paths = list(paths)
        if not paths or not all(isinstance(path, Tensor) and path.is_floating_point() and path.ndim for path in paths):
            return []
        if len({_storage(path) for path in paths}) == 1 or len({len(path) for path in paths}) > 1:
            return []
        return [path * self._weights(path, 1.0) for path in paths]


def _zeros(func: Callable, args: Any, kwargs: Any) -> Tensor:
    """Zeros of the shape of the result, without computing it; all elements share one place in memory."""
    shapes = [value.to("meta") if isinstance(value, Tensor) else value for value in args]
    named = {key: value.to("meta") if isinstance(value, Tensor) else value for key, value in kwargs.items()}
    return torch.zeros(()).expand(func(*shapes, **named).shape)


def _is_zeros(value: Any) -> bool:
    return isinstance(value, Tensor) and value.ndim > 0 and not any(value.stride())


def _storage(value: Tensor) -> int:
    return value.untyped_storage().data_ptr()


def _triple(value: Any) -> tuple[int, ...]:
    return tuple(value) if isinstance(value, tuple | list) else (value,) * 3


def _channel_mean(image: Tensor, groups: int) -> tuple[Tensor, int]:
    """``(B · groups, 1, ...)`` means over the channels of each group."""
    if image.stride(1) == 0:  # all are alike
        image = image[:, :1].expand(-1, groups, *image.shape[2:])
    return image.unflatten(1, (groups, -1)).mean(2).flatten(0, 1).unsqueeze(1), groups


def _spread(mean: Tensor, groups: int, channels: int) -> Tensor:
    """``(B, channels, ...)``: the mean of each group in all of its channels."""
    maps = mean.squeeze(1).unflatten(0, (-1, groups))
    if groups == 1:
        return maps.expand(-1, channels, *maps.shape[2:])  # without copies
    return maps.repeat_interleave(channels // groups, 1)


def _conv(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Tensor:
    mean, groups = _channel_mean(input, groups)
    kernel = torch.ones(())
    for side in weight.shape[2:]:
        profile = torch.zeros(side)
        profile[(side - 1) // 2 : side // 2 + 1] = 1.0
        kernel = kernel[..., None] * profile / profile.sum()
    return _spread(F.conv3d(mean, kernel[None, None], None, stride, padding, dilation), groups, len(weight))


def _conv_transpose(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    output_padding: Any = 0,
    groups: int = 1,
    dilation: Any = 1,
) -> Tensor:
    mean, groups = _channel_mean(input, groups)
    kernel = torch.ones(1, 1, *weight.shape[2:])
    kernel *= torch.tensor(_triple(stride)).prod() / kernel.numel()
    up = F.conv_transpose3d(mean, kernel, None, stride, padding, output_padding, 1, dilation)
    return _spread(up, groups, weight.shape[1] * groups)


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return (input[..., :1] if input.stride(-1) == 0 else input.mean(-1, keepdim=True)).expand(
        *input.shape[:-1], len(weight)
    )


_MEANS: dict[str, Callable[..., Tensor]] = {"conv3d": _conv, "conv_transpose3d": _conv_transpose, "linear": _linear}
