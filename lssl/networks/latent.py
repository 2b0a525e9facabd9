"""An autoencoder around a tap: a small latent map, and the image rebuilt from it alone."""

from __future__ import annotations

import math

from torch import Tensor, nn

from lssl.networks.feature_geometry import Tap

__all__ = ["LatentAutoencoder"]


class LatentAutoencoder(nn.Module):
    """Features of a tap → latent map ``(B, D, d, h, w)`` → image.

    The network's own decoder would copy the image from its skip connections, past the latent map. Two 1³ convolutions
    with a ReLU between them make the latent map. The decoder is a 3³ convolution, a ReLU and a 1³ convolution to the
    voxels of one patch, as large as the tap's stride; patches are put side by side.

    Args:
        tap: the feature map.
        image_channels: channels of the image.
        latent: channels D of the latent map.
        hidden: width between two convolutions.

    Example:
        >>> import torch
        >>> from lssl.networks.backbone import Backbone
        >>> tap = Backbone(nn.Sequential(nn.Conv3d(1, 4, 2, stride=2)), {"deep": "0"}).taps["deep"]
        >>> autoencoder = LatentAutoencoder(tap, 1, latent=3)
        >>> maps = autoencoder(torch.rand(2, 4, 5, 5, 5))
        >>> maps.shape, autoencoder.vectors(maps).shape, autoencoder.decode(maps).shape
        (torch.Size([2, 3, 5, 5, 5]), torch.Size([2, 3]), torch.Size([2, 1, 10, 10, 10]))
    """

    def __init__(self, tap: Tap, image_channels: int, latent: int = 128, hidden: int = 128) -> None:
        super().__init__()
        self.patch = tuple(int(side) for side in tap.stride)
        self.encoder = nn.Sequential(nn.Conv3d(tap.channels, hidden, 1), nn.ReLU(), nn.Conv3d(hidden, latent, 1))
        voxels = image_channels * math.prod(self.patch)
        self.decoder = nn.Sequential(nn.Conv3d(latent, hidden, 3, padding=1), nn.ReLU(), nn.Conv3d(hidden, voxels, 1))

    def forward(self, features: Tensor) -> Tensor:
        """The latent map of the tap's features."""
        return self.encoder(features)

    @staticmethod
    def vectors(maps: Tensor) -> Tensor:
        """``(B, D)`` float32: the mean of a latent map."""
        return maps.float().mean((2, 3, 4))

    def decode(self, maps: Tensor) -> Tensor:
        """``(B, C, D, H, W)`` float32 images."""
        patches = self.decoder(maps).float().unflatten(1, (-1, *self.patch))  # (B, C, x, y, z, d, h, w)
        images = patches.permute(0, 1, 5, 2, 6, 3, 7, 4)
        return images.flatten(6, 7).flatten(4, 5).flatten(2, 3)
