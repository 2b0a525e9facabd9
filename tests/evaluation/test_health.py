"""When the monitor warns, and what it says."""

from __future__ import annotations

import pytest
import torch

from lssl.evaluation.health import collapses, highest, least_rank, shortcuts
from lssl.metrics import EffectiveRank, FeatureStd

ALIVE = {"feature_std": 0.8, "scale": 0.2, "rank": 6.0, "matching": 0.4, "shortcut": 0.9}


def at(tap: str = "decoder.1", **changed: float) -> dict[str, float]:
    return {f"{kind}/{tap}": value for kind, value in {**ALIVE, **changed}.items()}


@pytest.mark.parametrize(
    ("changed", "numbers", "remedy"),
    [
        ({"feature_std": 0.04}, "feature_std 0.040, was 0.800", "negatives"),
        ({"scale": 1e-4}, "scale 0.0001, was 0.2", "weight decay"),
        ({"rank": 1.2}, "effective rank 1.2, was 6.0", "covariance"),
        ({"feature_std": float("nan"), "rank": float("nan")}, "no longer finite", "learning rate"),
    ],
)
def test_each_collapse_is_named_with_its_numbers_and_a_remedy(changed, numbers, remedy):
    found = collapses({**at(**changed), **at("encoder.0")}, {**at(), **at("encoder.0")})
    assert found.keys() == {"decoder.1"}
    assert numbers in found["decoder.1"]
    assert remedy in found["decoder.1"]


def test_healthy_features_and_taps_that_never_gave_a_number_raise_nothing():
    assert collapses(at(), at()) == {}
    assert collapses(at(feature_std=0.06, scale=0.001, rank=3.1), at()) == {}
    assert collapses(at(scale=6e-4), at(scale=7e-4)) == {}  # small, as it was
    nothing = at(feature_std=float("nan"), scale=float("nan"), rank=float("nan"))
    assert collapses(nothing, nothing) == {}


def test_a_network_that_starts_so_has_not_collapsed():
    low = at(feature_std=0.04, rank=2.0)
    assert collapses(low, low) == {}
    assert collapses(at(rank=1.0), at(rank=1.0)) == {}  # one channel
    assert collapses(at(feature_std=0.015, rank=2.0), low).keys() == {"decoder.1"}
    assert collapses(at(feature_std=0.04, rank=1.1), low).keys() == {"decoder.1"}


def planted(rank: int, channels: int = 32, seed: int = 0) -> float:
    """The measured rank of features with so many directions, of unequal strength, and a little noise."""
    draw = torch.Generator().manual_seed(seed)
    strength = torch.tensor([1.0, 0.6, 0.4])[:rank]
    basis = torch.randn(rank, channels, generator=draw)
    meter = EffectiveRank(channels)
    features = (torch.randn(4000, rank, generator=draw) * strength) @ basis
    meter.update(features + 0.002 * torch.randn(4000, channels, generator=draw))
    return meter.compute().item()


@pytest.mark.parametrize("untrained", [5.5, 9.0, 13.9])
@pytest.mark.parametrize("rank", [2, 3])
def test_planted_ranks_of_two_and_three_raise_an_alarm(rank, untrained):
    measured = planted(rank)
    assert 1.4 < measured < 3
    text = collapses(at(rank=measured), at(rank=untrained), channels={"decoder.1": 32})["decoder.1"]
    assert f"few directions (effective rank {measured:.1f}, was {untrained:.1f})" in text


def test_few_channels_have_few_directions():
    assert least_rank(4) == pytest.approx(1.875)
    assert least_rank(16) == least_rank(256) == 3.0
    assert collapses(at(rank=2.0), at(rank=3.8), channels={"decoder.1": 4}) == {}
    assert collapses(at(rank=2.0), at(rank=3.8), channels={"decoder.1": 32}).keys() == {"decoder.1"}


def test_a_drift_from_the_best_of_the_run_raises_an_alarm():
    """Untrained 9, risen to 25: 5 is no low rank by itself."""
    best = highest(highest({}, at(rank=9.0)), at(rank=25.0))
    assert collapses(at(rank=8.0), at(rank=9.0), best) == {}
    for rank in (5.0, 2.5):
        assert collapses(at(rank=rank), at(rank=9.0), best).keys() == {"decoder.1"}
    assert "was up to 25.0" in collapses(at(rank=5.0), at(rank=9.0), best)["decoder.1"]


def test_retrieval_that_falls_to_chance_raises_an_alarm():
    chance = 2 / 23  # 8 subjects of 3 visits
    first = at(retrieval=0.9)
    assert "no longer tell subjects apart" in collapses(at(retrieval=0.1), first, chance=chance)["decoder.1"]
    assert collapses(at(retrieval=0.5), first, chance=chance) == {}
    assert collapses(at(retrieval=0.1), at(retrieval=0.4), chance=chance) == {}  # never knew them well
    assert collapses(at(retrieval=0.34), at(retrieval=0.8), chance=1 / 3) == {}  # 2 subjects of 2 visits: too few
    risen = highest(highest({}, at(retrieval=0.3)), at(retrieval=0.9))
    assert collapses(at(retrieval=0.1), at(retrieval=0.3), risen, chance=chance).keys() == {"decoder.1"}


def test_a_resumed_run_that_knows_no_beginning_still_sees_a_collapse():
    assert collapses(at(feature_std=0.01), {}).keys() == {"decoder.1"}
    assert collapses(at(), {}) == {}


def test_what_the_docstring_derives():
    """Features m + e with |e| = |m| / 20 lie at the threshold, and so does a line with noise of a twentieth."""
    draw = torch.Generator().manual_seed(0)
    common, own = torch.ones(8) / 8**0.5, torch.randn(5000, 8, generator=draw) / 8**0.5
    spread, rank = FeatureStd(8), EffectiveRank(8)
    spread.update(common + own / 20)
    assert 0.04 < spread.compute().item() < 0.055
    along = torch.randn(5000, 1, generator=draw)
    rank.update(along * common + torch.randn(5000, 8, generator=draw) / 80)
    assert 1.3 < rank.compute().item() < 1.6


def test_the_shortcut_needs_both_and_an_early_step():
    for step, changed, seen in (
        (100, {"matching": 1.0}, True),
        (100, {"matching": 1.0, "shortcut": 0.1}, False),
        (100, {"matching": 0.9}, False),
        (5000, {"matching": 1.0}, False),
    ):
        assert bool(shortcuts(at(**changed), step)) == seen
    text = shortcuts(at(matching=1.0), 100)["decoder.1"]
    assert "100% of voxels" in text
    assert "R² 0.90" in text
    assert "views.geometry independent" in text
