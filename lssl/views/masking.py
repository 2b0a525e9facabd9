"""Masking: hides blocks of a view from the network, as voxels and, in transformers, as tokens."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lssl.networks.backbone import Backbone
from lssl.utils.errors import InputError
from lssl.utils.transfer import send

__all__ = ["BlockMasking", "block_masks"]


def block_masks(
    count: int,
    size: Sequence[int],
    block: Sequence[int] | int,
    ratio: float,
    generator: torch.Generator,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Masks ``round(ratio · cells)`` random blocks of each sample, drawn without replacement.

    Args:
        count: number of samples.
        size: voxels along ``(D, H, W)``; the last blocks are cut off if they do not fit.
        block: side(s) of a block in voxels.
        ratio: share of the blocks that are masked.
        generator: on the CPU.
        device: of the masks.

    Returns:
        ``(count, 1, D, H, W)`` bool, true where masked.

    Example:
        >>> import torch
        >>> masked = block_masks(2, (8, 8, 8), 4, 0.75, torch.Generator())
        >>> masked.float().mean((1, 2, 3, 4)).tolist()
        [0.75, 0.75]
    """
    sides = (block, block, block) if isinstance(block, int) else tuple(block)
    grid = [math.ceil(n / side) for n, side in zip(size, sides, strict=True)]
    cells = math.prod(grid)
    order = torch.rand(count, cells, generator=generator).numpy().argsort(1)
    planned = np.zeros((count, cells), bool)
    np.put_along_axis(planned, order[:, : round(ratio * cells)], True, 1)
    d, h, w = grid
    (masked,) = send([planned.reshape(count, 1, d, 1, h, 1, w, 1)], device)
    masked = masked.expand(-1, -1, d, sides[0], h, sides[1], w, sides[2]).flatten(6).flatten(4, 5).flatten(2, 3)
    return masked[:, :, : size[0], : size[1], : size[2]]


class BlockMasking(nn.Module):
    """Runs a backbone on images with masked blocks.

    Masked voxels become 0, the background's value. If the backbone names the module that makes its tokens
    (``backbone.tokens``: ViT, Swin), one learned token also replaces the masked tokens (SimMIM, Xie et al., CVPR 2022).
    Both are needed there: MONAI's UNETR and SwinUNETR pass the image itself to the last decoder level, which could
    otherwise copy it.

    Args:
        backbone: the network; each call passes it again, so that its weights are registered only once.
        size: voxels of a view along ``(D, H, W)``.
        block: side(s) of a block in voxels; 16 in Alice's code.
        ratio: share of masked blocks, 0.75 in Alice and MAE.
    """

    def __init__(
        self,
        backbone: Backbone,
        size: Sequence[int],
        block: int | tuple[int, int, int] = 16,
        ratio: float = 0.75,
    ) -> None:
        super().__init__()
        self.size = tuple(size)
        self.block = (block, block, block) if isinstance(block, int) else (block[0], block[1], block[2])
        if min(self.block) < 1:
            raise InputError(f"block: give a number of voxels, 1 or more, not {min(self.block)}.")
        cells = math.prod(math.ceil(n / side) for n, side in zip(self.size, self.block, strict=True))
        if not 0 < round(ratio * cells) < cells:
            raise InputError(
                f"mask_ratio: {ratio:g} of the {cells} blocks of {'×'.join(map(str, self.block))} voxels in a view "
                "hides none or all of them; choose a ratio between 0 and 1, and blocks smaller than the view."
            )
        self.ratio = ratio
        self.token: nn.Parameter | None = None
        if backbone.tokens is not None:
            stride = backbone.tokens.stride
            if any(side % step for side, step in zip(self.block, stride, strict=True)):
                raise InputError(
                    f"block: {self.block} voxels are no whole number of the network's patches of {stride} voxels."
                )
            self.token = nn.Parameter(torch.randn(backbone.tokens.channels) * 0.02)

    def draw(self, count: int, generator: torch.Generator, device: torch.device | str) -> Tensor:
        """``(count, 1, D, H, W)`` bool, true where masked; see :func:`block_masks`."""
        return block_masks(count, self.size, self.block, self.ratio, generator, device)

    def forward(
        self, backbone: Backbone, image: Tensor, masked: Tensor, taps: Sequence[str] = (), output: bool = False
    ) -> dict[str, Tensor]:
        """Features of ``image (B, C, D, H, W)`` without its masked voxels; see :meth:`lssl.Backbone.forward`."""
        with self._tokens(backbone, masked):
            return backbone(image.masked_fill(masked, 0), taps, output)

    @contextmanager
    def _tokens(self, backbone: Backbone, masked: Tensor) -> Iterator[None]:
        if backbone.tokens is None or self.token is None:
            yield
            return
        grid = [n // step for n, step in zip(masked.shape[2:], backbone.tokens.stride, strict=True)]
        cells = F.adaptive_max_pool3d(masked.float(), grid) > 0
        token = self.token

        def replace(module: nn.Module, inputs: object, output: Tensor) -> Tensor:
            if output.ndim == 3:  # (B, N, C), before positions are added
                return torch.where(cells.flatten(2).transpose(1, 2), token.to(output.dtype), output)
            return torch.where(cells, token.to(output.dtype)[:, None, None, None], output)

        handle = backbone.network.get_submodule(backbone.tokens.module).register_forward_hook(replace)
        try:
            yield
        finally:
            handle.remove()
