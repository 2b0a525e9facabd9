"""Masked autoencoder: blocks cover most of a view, and the network learns to fill them in.

He, Chen, Xie, Li, Dollár, Girshick: "Masked Autoencoders Are Scalable Vision Learners", CVPR 2022 (arXiv 2111.06377);
for 3D convolutional networks as in nnssl: Wald et al., "Revisiting MAE pre-training for 3D medical image segmentation",
CVPR 2025 (arXiv 2410.23132), who find it ahead of the contrastive methods they compare. The method does not use pairs,
so it is the baseline that a longitudinal method has to beat.

============== ======================================================================================== ======
term           formula                                                                                  weight
============== ======================================================================================== ======
reconstruction mean over views of the mean of (c - x)² over masked voxels; c = a 1³ convolution of the  1
               network's output for the view without them, x the view before intensities were changed
============== ======================================================================================== ======

Differences from nnssl:

* Masked voxels are 0, which is air here. In nnssl, whose images are z-scored, 0 is the image's mean.
* The input has intensity augmentation, as in the other methods; the target has none.
* There are no sparse convolutions, so convolutions see zeros inside masked blocks.

Both views of a pair have the same mask, so their order does not matter. Different pairs have different masks.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from lssl.data.batch import PairBatch
from lssl.metrics.masked import explained_share, masked_mean
from lssl.networks.backbone import Backbone
from lssl.networks.heads import feature_std, to_rows
from lssl.strategy import Strategy
from lssl.utils.errors import InputError
from lssl.views.masking import BlockMasking
from lssl.views.sampler import View

__all__ = ["MaskedAutoencoder"]


class MaskedAutoencoder(Strategy):
    """The network fills in masked blocks of both visits (MAE, He et al., 2022; nnssl, Wald et al., 2025).

    The log shows ``explained``, the share of the masked voxels' variance that the prediction explains: 0 for a
    constant, 1 for a perfect prediction. ``feature_std`` is of the network's output, at every fourth voxel.

    Args:
        backbone: network whose output has the image's size; taps are not used.
        mask_ratio: share of masked blocks (0.75 in both papers).
        block: side(s) of a block in voxels.
        distance: ``l2`` (mean squared difference) or ``l1`` (mean absolute difference).
        reconstruct: voxels in the loss: the ``masked`` ones, or the ``full`` view.
        **common: see :class:`lssl.task.Task`.
    """

    LOSS_WEIGHTS: ClassVar = {"reconstruction": 1.0}

    def __init__(
        self,
        backbone: Backbone,
        mask_ratio: float = 0.75,
        block: int | tuple[int, int, int] = 16,
        distance: Literal["l2", "l1"] = "l2",
        reconstruct: Literal["masked", "full"] = "masked",
        **common: Any,
    ) -> None:
        super().__init__(backbone, **common)
        self.masking = BlockMasking(backbone, self.views.size, block, mask_ratio)
        self.distance, self.full = distance, reconstruct == "full"
        backbone.freeze_unused([], output=True)
        self.to_image = nn.Conv3d(backbone.out_channels, backbone.in_channels, 1)

    def terms(self, first: View, second: View, batch: PairBatch) -> dict[str, Tensor]:
        """See the module's table."""
        images, clean = torch.cat([first.image, second.image]), torch.cat([first.clean, second.clean])
        masked = self.masking.draw(len(first.image), self.generator, images.device).repeat(2, 1, 1, 1, 1)
        output = self.masking(self.backbone, images, masked, output=True)["output"]
        if output.shape[2:] != images.shape[2:]:
            raise InputError(
                f"backbone: its output has {_sides(output)} voxels where the view has {_sides(images)}; a masked "
                "autoencoder needs a network that gives an image, such as a U-Net."
            )
        difference = self.to_image(output).float() - clean
        error = difference.square() if self.distance == "l2" else difference.abs()
        chosen = torch.ones_like(masked) if self.full else masked
        self.log_metric("explained", explained_share(masked_mean(difference.detach().square(), masked), clean, masked))
        self.log_metric("feature_std", feature_std(to_rows(output[:, :, ::4, ::4, ::4]).flatten(0, 1)))
        return {"reconstruction": masked_mean(error, chosen).mean()}

    def show_reconstruction(self, view: View) -> tuple[Tensor, Tensor] | None:
        """The masked view and its reconstruction."""
        masked = self.masking.draw(len(view.image), torch.Generator().manual_seed(0), view.image.device)
        made = self.to_image(self.masking(self.backbone, view.image, masked, output=True)["output"])
        return view.image.masked_fill(masked, 0), made


def _sides(image: Tensor) -> str:
    return "×".join(map(str, image.shape[2:]))
