"""Networks as people pass them: plain, compiled, or something else."""

from __future__ import annotations

import inspect

import pytest
import torch
from monai.networks.nets import BasicUNet
from torch import nn

from lssl import Backbone, InputError, Segmenter
from lssl.strategies import LongitudinalLocal, PriorGuidedLocal


def unet(channels=1):
    return BasicUNet(3, channels, 4, (4, 4, 4, 4, 4, 4))


def test_a_plain_network_is_wrapped_with_the_channels_it_takes():
    task = LongitudinalLocal(network := unet(2))
    assert task.backbone.network is network
    assert task.backbone.in_channels == 2
    assert Segmenter(backbone=unet()).backbone.taps.keys() == task.backbone.taps.keys()
    whole = Backbone(unet())
    assert PriorGuidedLocal(whole).backbone is whole
    assert list(inspect.signature(Segmenter).parameters)[:2] == ["backbone", "pretrained"]


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
