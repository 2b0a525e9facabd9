"""Networks as people pass them: plain, compiled, or something else."""

from __future__ import annotations

import inspect

import pytest
import torch
from monai.networks.nets import BasicUNet
from torch import nn

from lssl import Backbone, InputError, Segmenter
from lssl.segmentation.classes import Classes
from lssl.strategies import LongitudinalLocal, PriorGuidedLocal
from lssl.views.sampler import ViewSampler


def unet(channels=1):
    return BasicUNet(3, channels, 4, (4, 4, 4, 4, 4, 4))


def test_a_plain_network_is_wrapped_with_the_channels_it_takes():
    task = LongitudinalLocal(network := unet(2))
    assert task.backbone.network is network
    assert task.backbone.in_channels == 2
    assert Segmenter(backbone=unet()).backbone.taps.keys() == task.backbone.taps.keys()
    whole = Backbone(unet())
    assert PriorGuidedLocal(whole).backbone is whole
    assert next(iter(inspect.signature(Segmenter).parameters)) == "backbone"


def test_what_has_no_known_taps_is_told_how():
    with pytest.raises(InputError, match="name the taps of Sequential"):
        LongitudinalLocal(nn.Sequential(nn.Conv3d(1, 4, 3, padding=1)))
    with pytest.raises(InputError, match="a Backbone or a network, not str"):
        Segmenter("runs/demo")


def test_compiled_networks_are_refused():
    with pytest.raises(InputError, match="give the network uncompiled"):
        Backbone(torch.compile(unet()))


def test_a_tap_that_vanishes_is_an_error():
    """As with a network that is compiled after it was measured: hooks of submodules do not run."""
    backbone = Backbone(unet())
    backbone.network.forward = lambda image: image
    with pytest.raises(InputError, match=r"tap 'decoder.0' .*gave nothing"):
        backbone(torch.zeros(1, 1, 32, 32, 32), ["decoder.0"])


class Outputs(nn.Module):
    """Gives what `kind` says, of a map of 4 channels and a coarser one."""

    def __init__(self, kind="list"):
        super().__init__()
        self.fine, self.coarse = nn.Conv3d(1, 4, 3, padding=1), nn.Conv3d(4, 4, 2, 2)
        self.kind = kind

    def forward(self, image):
        fine = self.fine(image)
        coarse = self.coarse(fine)
        return {
            "list": [fine, coarse],
            "coarse first": (coarse, fine),
            "stacked": torch.stack([fine, fine], 1),
            "dict": {"out": fine},
            "hidden states": (fine, [coarse]),
            "other channels": [fine, coarse[:, :2]],
        }[self.kind]


@pytest.mark.parametrize("kind", ["list", "coarse first", "stacked"])
def test_the_finest_of_several_outputs_is_the_output(kind):
    network = Outputs(kind)
    backbone, image = Backbone(network, {"fine": "fine"}), torch.randn(2, 1, 8, 8, 8)
    assert backbone.out_channels == 4
    assert torch.equal(backbone(image, ["fine"], output=True)["output"], network.fine(image))
    sizes = [tuple(one.shape) for one in backbone.outputs(image)]
    assert sizes == [(2, 4, 8, 8, 8), (2, 4, 8, 8, 8) if kind == "stacked" else (2, 4, 4, 4, 4)]
    coarse = {name for name in backbone.upstream_parameters([], output=True) if "coarse" in name}
    assert not coarse  # nothing but deep supervision needs it, so a strategy freezes it


@pytest.mark.parametrize("kind", ["dict", "hidden states", "other channels"])
def test_other_outputs_are_one_sentence(kind):
    with pytest.raises(InputError, match=r"it must return a map .*, or for deep supervision a list of maps"):
        Backbone(Outputs(kind), {"fine": "fine"})


def test_a_network_that_needs_more_than_an_image_is_one_sentence():
    class Guided(Outputs):
        def forward(self, image, mask, *more, scale=1.0, **options):
            return super().forward(image) * mask

    with pytest.raises(InputError, match="Guided needs mask beside the image"):
        Backbone(Guided(), {"fine": "fine"})


def test_a_segmenter_learns_from_all_outputs(make_batch):
    """2/3 of the loss of the fine map and 1/3 of that of the coarse one, by hand."""
    task = Segmenter(backbone=Backbone(Outputs(), {"fine": "fine"}), views=ViewSampler(size=16, flip=(0.0, 0.0, 0.0)))
    task.build(Classes(("a",), ((1,),), True), torch.ones(3), torch.arange(2), torch.ones(2))
    first, second = task.views(
        make_batch(1, (20, 20, 20), affine="unit", labels=True), torch.Generator().manual_seed(0)
    )
    fine, coarse = (task.head(out) for out in task.backbone.outputs(torch.cat([first.image, second.image])))
    target = task.to_class_index(torch.cat([first.label, second.label])[:, 0])
    by_hand = (2 * task.supervised(fine, target) + task.supervised(coarse, target[:, 1::2, 1::2, 1::2])) / 3
    torch.testing.assert_close(task.terms(first, second)["supervised"], by_hand)
    by_hand.backward()
    assert task.backbone.network.coarse.weight.grad.abs().sum() > 0
