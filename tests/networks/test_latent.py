"""The autoencoder around a tap."""

from __future__ import annotations

import torch
from torch import nn

from lssl.networks.backbone import Backbone
from lssl.networks.latent import LatentAutoencoder


def test_patches_are_put_where_their_features_lie():
    """Anisotropic strides, two channels: against a loop over features."""
    backbone = Backbone(nn.Sequential(nn.Conv3d(2, 5, (1, 2, 4), stride=(1, 2, 4))), {"tap": "0"}, in_channels=2)
    autoencoder = LatentAutoencoder(backbone.taps["tap"], 2, latent=3, hidden=4)
    maps = torch.randn(2, 3, 4, 3, 2)
    found, patches = autoencoder.decode(maps), autoencoder.decoder(maps)
    assert found.shape == (2, 2, 4, 6, 8)
    for d in range(4):
        for h in range(3):
            for w in range(2):
                patch = patches[:, :, d, h, w].view(2, 2, 1, 2, 4)
                assert torch.equal(found[:, :, d : d + 1, 2 * h : 2 * h + 2, 4 * w : 4 * w + 4], patch)


def test_the_image_is_rebuilt_from_the_latent_map_alone():
    """It learns to rebuild random images, and then a changed latent map changes the image."""
    backbone = Backbone(nn.Sequential(nn.Conv3d(1, 8, 2, stride=2)), {"tap": "0"})
    autoencoder = LatentAutoencoder(backbone.taps["tap"], 1, latent=8, hidden=32)
    image = torch.rand(2, 1, 6, 6, 6)
    optimizer = torch.optim.Adam([*backbone.parameters(), *autoencoder.parameters()], lr=1e-2)
    for _ in range(150):
        maps = autoencoder(backbone(image, ["tap"])["tap"])
        loss = (autoencoder.decode(maps) - image).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.1 * image.var()
    assert (autoencoder.decode(maps.flip(0)) - image).square().mean() > 10 * loss
    torch.testing.assert_close(autoencoder.vectors(maps)[1, 2], maps[1, 2].mean())
