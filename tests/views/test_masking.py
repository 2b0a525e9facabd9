"""Masking: how much is hidden, that nothing hidden is seen, and tokens of transformers."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lssl.networks.backbone import Backbone
from lssl.networks.blocks import Blocks
from lssl.utils.errors import InputError
from lssl.views.masking import BlockMasking, block_masks

# --- masks ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ratio", [0.25, 0.6, 0.75])
@pytest.mark.parametrize(("size", "block"), [((32, 48, 16), 8), ((32, 48, 16), (16, 8, 4)), ((64, 64, 64), 16)])
def test_the_share_of_hidden_blocks_is_exact_in_every_sample(size, block, ratio, generator):
    hidden = block_masks(5, size, block, ratio, generator)
    assert hidden.shape == (5, 1, *size)
    assert hidden.dtype == torch.bool
    sides = (block,) * 3 if isinstance(block, int) else block
    grid = [n // side for n, side in zip(size, sides, strict=True)]
    cells = grid[0] * grid[1] * grid[2]
    share = hidden.flatten(1).double().mean(1)
    assert torch.allclose(share, torch.full((5,), round(ratio * cells) / cells, dtype=torch.double), atol=0)
    blocks = hidden.double().unfold(2, sides[0], sides[0]).unfold(3, sides[1], sides[1]).unfold(4, sides[2], sides[2])
    within = blocks.mean((-1, -2, -3))
    assert set(within.unique().tolist()) == {0.0, 1.0}  # whole blocks in all three axes, no tubes
    assert (hidden[:, 0].amax(3) != hidden[:, 0].amin(3)).any() or grid[2] == 1


def test_every_sample_hides_other_blocks_and_every_block_its_turn(generator):
    hidden = block_masks(64, (16, 16, 16), 4, 0.75, generator)[:, 0, ::4, ::4, ::4].flatten(1)
    assert len({tuple(row.tolist()) for row in hidden}) == 64
    rate = hidden.double().mean(0)
    assert (rate - 0.75).abs().max() < 0.25  # 4.6 standard deviations of 64 draws
    assert torch.equal(
        block_masks(3, (8, 8, 8), 4, 0.5, generator.manual_seed(1)),
        block_masks(3, (8, 8, 8), 4, 0.5, generator.manual_seed(1)),
    )


def test_blocks_that_do_not_fit_are_cut_off(generator):
    hidden = block_masks(2, (10, 8, 8), 4, 0.5, generator)
    assert hidden.shape == (2, 1, 10, 8, 8)
    assert torch.equal(hidden[:, :, 8], hidden[:, :, 9])


# --- networks ---------------------------------------------------------------------------------------------------------


def convolutional() -> Backbone:
    return Backbone(nn.Sequential(nn.Conv3d(1, 4, 2, stride=2), nn.ConvTranspose3d(4, 1, 2, stride=2)), {"a": "0"})


def transformer(kind: str, **options) -> Backbone:
    from monai.networks import nets

    torch.manual_seed(0)
    if kind == "unetr":
        network = nets.UNETR(1, 2, img_size=32, feature_size=4, hidden_size=24, mlp_dim=24, num_heads=2, **options)
        return Backbone(network, {"deep": "vit.norm"}, tokens="vit.patch_embedding.patch_embeddings")
    network = nets.SwinUNETR(in_channels=1, out_channels=2, feature_size=12, depths=(1, 1, 1, 1))
    return Backbone(network, {"deep": "encoder10"}, tokens="swinViT.patch_embed")


def test_hidden_voxels_are_the_background_and_the_image_is_left_alone(generator):
    backbone, image = convolutional(), torch.rand(3, 1, 8, 8, 8) + 1
    masking = BlockMasking(backbone, (8, 8, 8), 4, 0.5)
    hidden = masking.draw(3, generator, "cpu")
    before = image.clone()
    features = masking(backbone, image, hidden, ["a"], output=True)
    assert torch.equal(image, before)
    expected = backbone(torch.where(hidden, torch.zeros(()), image), ["a"], output=True)
    assert torch.equal(features["a"], expected["a"])
    assert torch.equal(features["output"], expected["output"])


@pytest.mark.parametrize("kind", ["unetr", pytest.param("swin", marks=pytest.mark.slow)])
def test_nothing_hidden_reaches_a_transformer_and_its_token_learns(kind, generator):
    backbone = transformer(kind).eval()
    size = (32,) * 3 if kind == "unetr" else (64,) * 3
    masking = BlockMasking(backbone, size, 16, 0.5)
    hidden = masking.draw(1, generator, "cpu")
    image = torch.rand(1, 1, *size)
    features = masking(backbone, image, hidden, ["deep"], output=True)
    other = masking(backbone, torch.where(hidden, torch.rand_like(image), image), hidden, ["deep"], output=True)
    for name, value in features.items():
        assert torch.equal(value, other[name])  # a skip of the raw image would tell
    with torch.no_grad():
        plain = backbone(image.masked_fill(hidden, 0), ["deep"])["deep"]
    assert not torch.allclose(features["deep"], plain)  # the token is not what zeros are embedded as
    features["deep"].square().sum().backward()
    assert masking.token is not None
    assert masking.token.grad.abs().max() > 0
    again = backbone(image, ["deep"])["deep"]
    assert torch.equal(again, backbone(image, ["deep"])["deep"])  # the hook is gone
    assert not backbone.network.get_submodule(backbone.tokens.module)._forward_hooks


@pytest.mark.parametrize("kind", ["conv", "perceptron"])  # tokens as a map, and as a list
def test_exactly_the_hidden_tokens_are_replaced(kind):
    """Read off the tokens themselves, before positions are added."""
    backbone = transformer("unetr", proj_type=kind).eval()
    masking = BlockMasking(backbone, (32, 32, 32), 16, 0.5)
    hidden = torch.zeros(2, 1, 32, 32, 32, dtype=torch.bool)
    hidden[0, :, :16, :16, 16:] = hidden[1, :, 16:, :16, :16] = True  # no axis for another
    seen = []
    module = backbone.network.get_submodule("vit.patch_embedding")
    handle = module.register_forward_hook(lambda module, inputs, output: seen.append(output))
    masking(backbone, torch.rand(2, 1, 32, 32, 32), hidden, ["deep"])
    handle.remove()
    tokens = seen[0] - backbone.network.vit.patch_embedding.position_embeddings
    replaced = torch.isclose(tokens, masking.token, atol=1e-6).all(2)
    assert torch.equal(replaced, hidden[:, 0, ::16, ::16, ::16].flatten(1))  # in (D, H, W) order


def test_tokens_are_maps_where_they_are_tapped():
    """``vit.norm`` gives (B, N, C); as a map, its axes are those of the image."""
    from monai.networks.nets import UNETR

    torch.manual_seed(0)
    network = UNETR(1, 2, img_size=(32, 48, 64), feature_size=4, hidden_size=24, mlp_dim=24, num_heads=2)
    image = torch.rand(2, 1, 32, 48, 64)
    tokens = network.vit(image)[0]
    backbone = Backbone.__new__(Backbone)  # a network of one odd size has no probe; the pass is what is tested
    nn.Module.__init__(backbone)
    backbone.network, backbone._paths, backbone._format = network, {"deep": "vit.norm"}, torch.contiguous_format
    backbone.taps, backbone._blocks = {"deep": None}, Blocks(False, False)
    features = backbone(image, ["deep"])["deep"]
    assert features.shape == (2, 24, 2, 3, 4)
    for d, h, w in ((0, 0, 1), (0, 1, 0), (1, 0, 0), (1, 2, 3)):
        assert torch.allclose(features[:, :, d, h, w], tokens[:, (d * 3 + h) * 4 + w])


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_masks_that_hide_nothing_or_cut_tokens_are_refused():
    backbone = convolutional()
    for ratio in (0.0, 1.0, 0.01, -1.0):
        with pytest.raises(InputError, match="hides none or all"):
            BlockMasking(backbone, (8, 8, 8), 4, ratio)
    with pytest.raises(InputError, match="1 or more"):
        BlockMasking(backbone, (8, 8, 8), 0)
    with pytest.raises(InputError, match="patches of"):
        BlockMasking(transformer("unetr"), (32, 32, 32), 8)
    with pytest.raises(InputError, match="tap '\\(tokens\\)' names no submodule"):
        Backbone(convolutional().network, {"a": "0"}, tokens="vit")
