"""DifferenceWeighting: against a network written out, both visits trained, no traces, and which networks it takes."""

from __future__ import annotations

import pytest
import torch
from monai.networks.nets import AttentionUnet, BasicUNet, BasicUNetPlusPlus, DynUNet, SegResNet, SwinUNETR
from torch import nn

from lssl import InputError
from lssl.networks.difference_weighting import DifferenceWeighting

SIDE = 32


def network(norm=("instance", {"affine": True})):
    return BasicUNet(3, 1, 3, (4, 5, 6, 7, 8, 9), norm=norm).eval()


def stirred(made):
    """Learned scales and shifts, so that it matters which map gets which."""
    generator = torch.Generator().manual_seed(1)
    for parameter in made.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator)
    return made


def images():
    return torch.rand(2, 2, 1, SIDE, SIDE, SIDE, generator=torch.Generator().manual_seed(0))


def weighted(net, made, earlier, later):
    with made.within(net, len(later)):
        return net(torch.cat([earlier, later]))


def by_hand(net, made, earlier, later):
    """Two passes of the encoder, the published formula, and the decoder with explicit skip connections."""

    def encoded(image):
        maps = [net.conv_0(image)]
        for down in (net.down_1, net.down_2, net.down_3, net.down_4):
            maps.append(down(maps[-1]))
        return maps

    def merged(old, new, norm):
        difference = new - old
        mean, variance = difference.mean((2, 3, 4), True), difference.var((2, 3, 4), correction=0, keepdim=True)
        scale, shift = norm.weight[:, None, None, None], norm.bias[:, None, None, None]
        return new * ((difference - mean) / (variance + 1e-5).sqrt() * scale + shift) + new

    old, new = encoded(earlier), encoded(later)
    (bottom, third), (second,), (first,), (zeroth,) = made.norms
    x = merged(old[4], new[4], bottom)
    levels = zip((net.upcat_4, net.upcat_3, net.upcat_2, net.upcat_1), (third, second, first, zeroth), strict=True)
    for level, (up, norm) in enumerate(levels):
        skip = merged(old[3 - level], new[3 - level], norm)
        x = up.convs(torch.cat([skip, up.upsample(x)], 1))
    return net.final_conv(x)


def test_a_network_written_out_gives_the_same():
    net, (earlier, later) = network(), images()
    made = stirred(DifferenceWeighting(net, 1, (SIDE,) * 3))
    assert made.paths == ["upcat_4", "upcat_3", "upcat_2", "upcat_1"]
    with torch.no_grad():
        found = weighted(net, made, earlier, later)
        torch.testing.assert_close(found, by_hand(net, made, earlier, later), rtol=1e-4, atol=1e-4)
        assert (found - weighted(net, made, later, earlier)).abs().max() > 0.1


def test_equal_visits_show_the_later_one_as_the_network_alone_does_at_first():
    net, (earlier, later) = network(), images()
    made = DifferenceWeighting(net, 1, (SIDE,) * 3)
    with torch.no_grad():
        torch.testing.assert_close(weighted(net, made, later, later), net(later))
        assert not torch.allclose(weighted(net, made, earlier, later), net(later), atol=1e-2)


def test_gradient_reaches_both_visits_and_every_norm():
    net, (earlier, later) = network(), images()
    made = DifferenceWeighting(net, 1, (SIDE,) * 3)
    weighted(net, made, earlier.requires_grad_(), later.requires_grad_()).square().mean().backward()
    assert earlier.grad.abs().sum() > 0
    assert later.grad.abs().sum() > 0
    assert all(parameter.grad.abs().sum() > 0 for parameter in made.parameters())
    assert sum(1 for _ in made.parameters()) == 2 * 5


def test_the_network_is_left_as_it_was_also_after_an_error():
    net, (earlier, later) = network(("batch", {})), images()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    net.train()
    made = DifferenceWeighting(net, 1, (SIDE,) * 3)
    assert net.training
    net.eval()
    with torch.no_grad():
        alone = net(later)
        weighted(net, made, earlier, later)
        with pytest.raises(RuntimeError), made.within(net, 2):
            net(torch.zeros(4, 3, SIDE, SIDE, SIDE))
        assert torch.equal(net(later), alone)
    assert not any(module._forward_pre_hooks for module in net.modules())
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


class Listing(nn.Module):
    """A decoder that gets a list of all maps, as nnU-Net's does."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv3d(1, 2, 3, padding=1), nn.Conv3d(2, 4, 3, 2, padding=1)
        self.decoder = self.Decoder()

    class Decoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.last = nn.ConvTranspose3d(4, 2, 2, 2), nn.Conv3d(4, 3, 1)

        def forward(self, skips):
            return self.last(torch.cat([self.up(skips[-1]), skips[0]], 1))

    def forward(self, image):
        first = self.first(image)
        return self.decoder([first, self.second(first)])


@pytest.mark.parametrize(
    ("net", "channels"),
    [
        (DynUNet(3, 1, 2, [3] * 3, [1, 2, 2], [2, 2], [4, 5, 6]), [[6, 5], [4]]),
        (DynUNet(3, 1, 2, [3] * 4, [1, 2, 2, 2], [2] * 3, [4, 5, 6, 7], deep_supervision=True), [[7, 6], [5], [4]]),
        (Listing(), [[2, 4]]),
    ],
)
def test_other_networks_whose_modules_merge(net, channels):
    made = DifferenceWeighting(net, 1, (SIDE,) * 3)
    assert [[norm.num_features for norm in norms] for norms in made.norms] == channels
    earlier, later = images()
    found = weighted(net.train(), made, earlier[:1], later[:1])
    assert len(found) == 1  # one pair, whose maps could broadcast against those of two visits
    found.square().mean().backward()
    assert all(parameter.grad is not None for parameter in made.parameters())


def test_a_transformer_with_a_decoder_of_merging_modules():
    made = DifferenceWeighting(SwinUNETR(in_channels=1, out_channels=2, feature_size=12), 1, (64,) * 3)
    assert made.paths == [f"decoder{level}" for level in (5, 4, 3, 2, 1)]


@pytest.mark.parametrize(
    "net",
    [
        SegResNet(3, 8, 1, 2),
        nn.Sequential(nn.Conv3d(1, 2, 3, padding=1), nn.Conv3d(2, 2, 1)),
        AttentionUnet(3, 1, 2, (4, 8), (2,)),
        BasicUNetPlusPlus(3, 1, 2, (4,) * 6),
    ],
    ids=lambda net: type(net).__name__,
)
def test_other_networks_are_refused_in_one_sentence(net):
    with pytest.raises(
        InputError, match=f"modules of {type(net).__name__} get them is not clear.*or set combine"
    ) as said:
        DifferenceWeighting(net, 1, (SIDE,) * 3)
    assert "\n" not in str(said.value)


def test_a_single_feature_is_refused():
    with pytest.raises(InputError, match="16×16×16 voxels leaves a single feature at the bottleneck"):
        DifferenceWeighting(network(("batch", {})), 1, (16,) * 3)
