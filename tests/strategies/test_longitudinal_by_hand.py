"""Terms of longitudinal local pretraining by hand, and the published numbers."""

# ruff: noqa: F811

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from small_longitudinal import OBJECTIVES, TERMS, backbone, batch, drawn, make, only, terms, views  # noqa: F401
from torch import Tensor, nn

from lssl.networks.backbone import Backbone
from lssl.networks.heads import StackedHeads, StackedLinear
from lssl.strategies.longitudinal_local import LongitudinalLocal
from lssl.views import geometry as geo
from lssl.views.sampler import ViewSampler

ENCODER = ["encoder.0", "encoder.1", "encoder.2", "encoder.3", "bottleneck"]
DECODER = ["decoder.3", "decoder.2", "decoder.1"]


def head(heads: StackedHeads, tap: str, rows: Tensor) -> Tensor:
    """One of the heads alone, layer by layer; norms begin without scale and shift."""
    number = heads.taps.index(tap)
    first = [heads.first] if isinstance(heads.first, StackedLinear) else []
    rows = rows if first else heads.first[f"tap_{tap.replace('.', '/')}"](rows)
    for layer in [*first, *heads.rest]:
        if isinstance(layer, StackedLinear):
            rows = rows @ layer.weight[number]
            rows = rows if layer.bias is None else rows + layer.bias.unflatten(0, (layer.count, -1))[number]
        elif isinstance(layer, nn.ReLU):
            rows = rows.relu()
        else:
            rows = (rows - rows.mean(0)) / (rows.var(0, unbiased=False) + 1e-5).sqrt()
    return rows


def test_every_term_by_hand(make, batch, drawn):
    shares = {"encoder.0": 1.0, "bottleneck": 2.0, "decoder.3": 3.0, "decoder.1": 2.0}
    strategy = make(tap_weights=shares, views={"transforms": None})
    found = terms(strategy, batch)
    first, second = views(strategy, batch)
    taps = strategy.backbone.taps
    features = strategy.backbone(torch.cat([first.image, second.image]), list(taps), output=True)

    def project(tap: str, places: Tensor) -> list[Tensor]:
        """Features indexed voxel by voxel (shared views: the drawn places are voxels of both), through the head."""
        where = geo.feature_affine(first.affine, taps[tap].stride, taps[tap].offset)
        index = torch.stack([geo.transform(torch.linalg.inv(w), p) for w, p in zip(where, places, strict=True)])
        torch.testing.assert_close(index, index.round(), rtol=0, atol=1e-6)
        rows = [
            features[tap][visit * 2 + b, :, i, j, k]
            for visit in range(2)
            for b in range(2)
            for i, j, k in index[b].round().long().tolist()
        ]
        return list(head(strategy.projectors, tap, torch.stack(rows)).chunk(2))

    expected = dict.fromkeys(TERMS, 0.0)
    for tap, weight in shares.items():
        z1, z2 = project(tap, drawn[taps[tap].module])
        p1, p2 = head(strategy.predictors, tap, torch.cat([z1, z2])).chunk(2)
        cosines = F.cosine_similarity(p1, z2).mean() + F.cosine_similarity(p2, z1).mean()
        expected["similarity"] -= weight / 8 * 0.5 * cosines.item()
        if tap.startswith("decoder"):
            for z in (z1, z2):
                centred = (z - z.mean(0)).double()
                covariance = centred.T @ centred / (len(z) - 1)
                hinge = (1 - (covariance.diagonal() + 1e-4).sqrt()).clamp_min(0).mean()
                expected["variance"] += weight / 8 * 0.5 * hinge.item()
                off = covariance - covariance.diagonal().diag()
                expected["covariance"] += weight / 8 * (off**2).sum().item() / z.shape[1]
    places = drawn[taps["decoder.3"].module]
    skip, decoder = (torch.cat(project(tap, places)) for tap in ("skip.3", "decoder.3"))
    expected["orthogonality"] = F.cosine_similarity(skip, decoder).square().mean().item()
    picture = F.conv3d(features["output"], strategy.to_image.weight, padding=1)
    clean = torch.cat([first.clean, second.clean])
    expected["reconstruction"] = (picture - clean).square().mean().item()
    for name in TERMS:
        assert found[name].item() == pytest.approx(expected[name], rel=1e-3, abs=1e-5), name


def test_heads_see_the_same_place_of_both_views(make_batch):
    """The network's features are their own places in mm, and views are drawn apart: the heads' rows must agree."""
    network = nn.Sequential(nn.AvgPool3d((4, 2, 2)), nn.Upsample(scale_factor=(4.0, 2.0, 2.0)))
    strategy = LongitudinalLocal(
        Backbone(network, {"places": "0"}, in_channels=3),
        views=ViewSampler((16, 16, 12), transforms=[], flip=(0.5, 0.5, 0.5), flip_together=False, overlap=0.4),
        encoder_taps=["places"],
        decoder_taps=[],
        loss_weights=only("similarity"),
        hidden=8,
        projection=8,
        objective=OBJECTIVES["cosine"],
    )
    rows = []
    strategy.projectors.register_forward_pre_hook(lambda _, args: rows.append(args[0][0]))
    batch = make_batch(4, (40, 38, 36), image="frame")
    terms(strategy, batch)
    one, two = rows[0].unflatten(0, (2, 4)).double()
    inner = torch.ones(one.shape[:2], dtype=torch.bool)
    for visit in range(2):  # beyond the source's last voxels zeros mix in
        index = geo.transform(torch.linalg.inv(batch.affines[:, visit]), one)
        inner &= geo.contains(index, (40, 38, 36), 4.0)
    assert inner.sum() > 100
    assert (one - two)[inner].abs().max() < 2e-3


def test_loss_is_the_weighted_sum(make, batch):
    strategy = make(loss_weights={"variance": 0.25, "orthogonality": 3.0, "covariance": 0.0})
    strategy.generator.manual_seed(0)
    loss, found = strategy._step(batch)
    assert set(found) == set(TERMS) - {"covariance"}
    weights = {"similarity": 1, "variance": 0.25, "orthogonality": 3, "reconstruction": 10}
    assert loss.item() == pytest.approx(sum(weights[name] * value.item() for name, value in found.items()), rel=1e-5)


def test_published_numbers(backbone):
    """Heads 2048/512, K = 128, w = 1/8 for each tap, hence 1.25e-4 for variance and covariance of each decoder tap."""
    with torch.device("meta"):
        strategy = LongitudinalLocal(copy.deepcopy(backbone), views=ViewSampler(32))
    assert strategy.tap_weights == dict.fromkeys([*ENCODER, *DECODER], 1 / 8)
    for name in ("variance", "covariance"):
        assert strategy.loss_weights[name] * strategy.tap_weights["decoder.2"] == pytest.approx(1.25e-4)
    assert [strategy.loss_weights[name] for name in ("similarity", "orthogonality", "reconstruction")] == [1, 100, 10]
    assert strategy.samples == 128
    assert not strategy.foreground
    projector, predictor = strategy.projectors, strategy.predictors
    assert projector.first["tap_bottleneck"].weight.shape == (2048, 8)
    assert predictor.first.weight.shape == (8, 2048, 512)
    rest = [[m.weight.shape for m in heads.rest if isinstance(m, StackedLinear)] for heads in (projector, predictor)]
    assert rest == [[(9, 2048, 2048), (9, 2048, 2048)], [(8, 512, 2048)]]
    assert not projector.rest[-1].norm.affine
    assert isinstance(predictor.rest[-1], StackedLinear)
    assert predictor.rest[-1].bias is not None
    assert set(strategy.predictors.taps) == {*ENCODER, *DECODER}
    assert set(strategy.projectors.taps) == {*strategy.predictors.taps, "skip.3"}
