"""The masked autoencoder on tiny networks: what is hidden, what is compared, and where gradients go."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from lssl.data.batch import PairBatch
from lssl.metrics.masked import explained_share, masked_mean
from lssl.networks.backbone import Backbone
from lssl.strategies.masked_autoencoder import MaskedAutoencoder
from lssl.utils.errors import InputError
from lssl.views.intensity import Contrast, Noise
from lssl.views.sampler import View, ViewSampler

SIZE, SOURCE = (16, 12, 20), (24, 20, 28)


class Net(nn.Module):
    """Down, up, and a branch that the output never sees."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = nn.Conv3d(1, 6, 4, 2, 1), nn.ConvTranspose3d(6, 3, 2, 2)
        self.aside = nn.Conv3d(6, 2, 1)

    def forward(self, image: Tensor) -> Tensor:
        deep = self.down(image).tanh()
        self.aside(deep)
        return self.up(deep)


def make(**settings) -> MaskedAutoencoder:
    torch.manual_seed(0)
    sampler = ViewSampler(SIZE, transforms=[Contrast(p=1.0), Noise(p=1.0)])
    return MaskedAutoencoder(Backbone(Net(), {"down": "down"}), views=sampler, **{"block": 4, **settings})


@pytest.fixture
def batch(make_batch) -> PairBatch:
    return make_batch(3, SOURCE, affine="unit")


def draw(strategy: MaskedAutoencoder, batch: PairBatch) -> tuple[View, View]:
    strategy.generator.manual_seed(0)
    return strategy.draw_views(batch)


def term(strategy: MaskedAutoencoder, views: tuple[View, View], batch: PairBatch) -> Tensor:
    strategy.generator.manual_seed(1)
    return strategy.terms(*views, batch)["reconstruction"]


def masks(strategy: MaskedAutoencoder, pairs: int = 3) -> Tensor:
    """Those that :func:`term` hides."""
    strategy.generator.manual_seed(1)
    return strategy.masking.draw(pairs, strategy.generator, "cpu")


@pytest.mark.parametrize("distance", ["l2", "l1"])
@pytest.mark.parametrize("reconstruct", ["masked", "full"])
@pytest.mark.parametrize("block", [4, (8, 4, 8)])  # the second does not fit: the last blocks are cut off
def test_value_by_loops(distance, reconstruct, block, batch):
    strategy = make(distance=distance, reconstruct=reconstruct, block=block, mask_ratio=0.5).double()
    views = tuple(replace(v, image=v.image.double(), clean=v.clean.double()) for v in draw(strategy, batch))
    found, hidden = term(strategy, views, batch), masks(strategy)
    weight, bias = strategy.to_image.weight.flatten(), strategy.to_image.bias
    means = []
    for view in views:
        for image, clean, mask in zip(view.image, view.clean, hidden, strict=True):
            with torch.no_grad():
                output = strategy.backbone.network((image * ~mask)[None])[0]
            error = (output * weight[:, None, None, None]).sum(0) + bias - clean[0]
            error = error**2 if distance == "l2" else error.abs()
            voxels = [error[tuple(index)].item() for index in mask[0].nonzero().tolist()]
            means.append(sum(voxels) / len(voxels) if reconstruct == "masked" else error.mean().item())
    assert found.item() == pytest.approx(sum(means) / 6, rel=1e-5)


def test_the_share_of_hidden_blocks_is_exact_and_every_pair_hides_others():
    strategy = make(mask_ratio=0.75)
    hidden = masks(strategy, 8)
    assert hidden.flatten(1).double().mean(1).tolist() == [0.75] * 8
    assert len({tuple(mask.flatten().tolist()) for mask in hidden}) == 8


def test_no_gradient_comes_from_what_should_not_matter(batch):
    """Neither from hidden input, nor from targets in view; from all else some does."""
    strategy = make()
    first, second = draw(strategy, batch)
    for name, matters in (("image", ~masks(strategy)), ("clean", masks(strategy))):
        leaf = getattr(first, name).clone().requires_grad_()
        term(strategy, (replace(first, **{name: leaf}), second), batch).backward()
        assert leaf.grad[~matters].abs().max() == 0, name
        assert (leaf.grad[matters] != 0).double().mean() > (0.3 if name == "image" else 0.99), name  # beside a block
    strategy = make(reconstruct="full")
    leaf = first.clean.clone().requires_grad_()
    term(strategy, (replace(first, clean=leaf), second), batch).backward()
    assert (leaf.grad != 0).double().mean() > 0.99


def test_swapping_the_pair_leaves_the_term_unchanged(batch):
    strategy = make()
    first, second = draw(strategy, batch)
    one, other = (term(strategy, views, batch).item() for views in ((first, second), (second, first)))
    assert one == pytest.approx(other, rel=1e-6)
    assert one != pytest.approx(term(strategy, (first, first), batch).item(), rel=1e-3)


def test_it_falls_on_one_batch_and_says_how_much_is_explained(batch):
    smooth = torch.linspace(0, 3, 28).sin().expand(3, 2, 1, 24, 20, 28)
    strategy = make(mask_ratio=0.4)
    views = draw(strategy, replace(batch, images=smooth.contiguous()))
    optimizer = torch.optim.Adam([p for p in strategy.parameters() if p.requires_grad], lr=2e-2)
    losses, explained = [], []
    for _ in range(120):
        loss = term(strategy, views, batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        explained.append(strategy.logged["explained"].item())
    assert losses[-1] < losses[0] / 3
    assert explained[-1] > 0.3 > explained[0]


def test_explained_is_nothing_for_the_mean_and_all_for_the_truth():
    clean = torch.rand(2, 1, 8, 8, 8) + torch.tensor([0.0, 5.0]).view(2, 1, 1, 1, 1)
    hidden = torch.zeros(2, 1, 8, 8, 8, dtype=torch.bool)
    hidden[:, :, :4] = True
    mean = torch.stack([image[mask].mean() for image, mask in zip(clean, hidden, strict=True)]).view(2, 1, 1, 1, 1)
    for guess, expected in ((clean, 1), (mean, 0), (2 * mean - clean, -3)):
        found = explained_share(masked_mean((guess - clean).square(), hidden), clean, hidden).item()
        assert found == pytest.approx(expected, abs=1e-5)


def test_everything_that_is_trained_gets_a_gradient(batch):
    """Else distributed training would wait for it."""
    strategy = make()
    term(strategy, draw(strategy, batch), batch).backward()
    trained = {name: p for name, p in strategy.named_parameters() if p.requires_grad}
    assert all(p.grad is not None for p in trained.values())
    assert {name.split(".")[2] for name in trained if name.startswith("backbone")} == {"down", "up"}


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"mask_ratio": 1.0}, "hides none or all of them"),
        ({"block": 32}, "hides none or all of them"),
        ({"loss_weights": {"inter": 1.0}}, "has no term 'inter'"),
    ],
)
def test_wrong_options_stop_early(settings, sentence):
    with pytest.raises(InputError, match=sentence):
        make(**settings)


def test_a_network_without_an_image_is_refused(batch):
    encoder = Backbone(nn.Sequential(nn.Conv3d(1, 4, 4, 2, 1)), {"deep": "0"})
    strategy = MaskedAutoencoder(encoder, views=ViewSampler(SIZE), block=4)
    with pytest.raises(InputError, match="8×6×10 voxels where the view has 16×12×20"):
        term(strategy, draw(strategy, batch), batch)


def test_pictures_show_what_was_hidden(batch):
    strategy = make()
    view, _ = draw(strategy, batch)
    seen, made = strategy.show_reconstruction(view)
    assert (seen != 0).float().mean() == pytest.approx(0.25, abs=0.02)
    assert torch.equal(seen[seen != 0], view.image[seen != 0])
    assert torch.equal(made, strategy.to_image(strategy.backbone(seen, output=True)["output"]))
