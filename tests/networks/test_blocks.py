"""Blocks compiled or recomputed: the same features, gradients and statistics, less memory, and copies of their own."""

from __future__ import annotations

import copy
import functools
import pickle

import pytest
import torch
from torch import nn

from lssl.networks.backbone import Backbone, unet
from lssl.networks.blocks import Blocks, blocks_between
from lssl.utils.errors import InputError

TAPS = ["bottleneck", "decoder.2"]


@pytest.fixture(autouse=True)
def quick_compiler(monkeypatch):
    """All of torch.compile that could lose taps or weights; not its C++ compiler."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    monkeypatch.setattr("shutil.which", lambda name: name)


def backbone(**options) -> Backbone:
    torch.manual_seed(0)
    return Backbone(unet(features=(4, 4, 4, 8, 8, 4)), **options)


def step(network: Backbone, image: torch.Tensor) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    features = network(image, TAPS, output=True)
    network.zero_grad()
    torch.stack([value.square().mean() for value in features.values()]).sum().backward()
    gradients = [parameter.grad for parameter in network.parameters()]
    return list(features.values()), [*gradients, *network.buffers()]


@pytest.mark.parametrize("options", [{"checkpointing": True}, {"compile": True}], ids=str)
def test_features_gradients_and_statistics_stay(options):
    images = torch.randn(2, 2, 1, 32, 32, 32, generator=torch.Generator().manual_seed(1))
    plain, changed = backbone(), backbone(**options)
    for image in images:  # twice: running statistics move once per batch
        for expected, found in zip(step(plain, image), step(changed, image), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    assert not any("forward" in vars(module) for module in changed.modules())
    assert plain.state_dict().keys() == changed.state_dict().keys()


def test_a_copy_has_its_own_weights():
    """A teacher is a copy; compiled code would go on with the weights of the student."""
    image = torch.randn(2, 1, 32, 32, 32)
    for options in ({"checkpointing": True}, {"compile": True}):
        network = backbone(**options)
        step(network, image)
        for other in (copy.deepcopy(network), pickle.loads(pickle.dumps(network))):
            with torch.no_grad():
                for parameter in other.parameters():
                    parameter.zero_()
                assert not other(image, TAPS)["decoder.2"].any()
                assert network(image, TAPS)["decoder.2"].any()


def test_activations_within_blocks_are_not_kept():
    image = torch.randn(1, 1, 32, 32, 32)

    def kept(network: Backbone) -> int:
        found: dict[int, int] = {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            held = network(image, ["decoder.2"])  # alive, so that no storage is counted as another's
        del held
        return sum(found.values())

    assert kept(backbone(checkpointing=True)) < 0.7 * kept(backbone())


def test_blocks_hold_no_tap_and_do_not_overlap():
    network = unet()
    tap = "down_2.convs.conv_0.conv"
    blocks = blocks_between(network, [tap])
    names = [name for name, module in network.named_modules() if module in blocks]
    assert {"conv_0", "down_1", "down_2.convs.conv_1", "upcat_1"} <= {*names}
    assert not any(tap == name or tap.startswith(f"{name}.") for name in names)
    assert not any(one != two and two.startswith(f"{one}.") for one in names for two in names)
    listed = nn.ModuleList([nn.Sequential(nn.Conv3d(1, 1, 1), nn.ReLU()) for _ in range(20)])
    assert len(blocks_between(nn.Sequential(listed), [])) == 20  # a list is never called


def test_compiling_needs_a_compiler(monkeypatch):
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(InputError, match=r"C\+\+ compiler"):
        Blocks(compiled=True, checkpointed=False)
    Blocks(compiled=False, checkpointed=True)
