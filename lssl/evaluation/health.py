"""What the monitor's figures say is wrong: a collapse, or a shortcut; in one sentence with the numbers and a remedy.

Thresholds, and where they come from:

- *one direction*, ``feature_std < 0.05``. A feature is ``m + e``, m what all voxels share. It is ``|e| / |f|``, so that
  below 0.05 the voxels' own part is 1/400 of the energy, and bfloat16, which rounds values to 1/256, leaves 13 steps of
  it. In 500 steps of every shipped method no trained tap fell below 0.4 from step 50 on; the config that is made to
  collapse passes 0.05 within 25 steps (tests/test_monitor.py).
- *few directions*, ``rank < 3`` (less for taps of under 16 channels, see :func:`least_rank`), and below 0.6 of the
  untrained network's. Features of rank 2 and 3 measure 1.5 to 2.9, untrained taps 5.5 to 13.9, and the lowest trained
  tap of the shipped methods 6.
- *lost directions*, ``rank`` below a quarter of the highest that this run has measured at the tap. A drift from 25 to
  5 leaves the rule above silent.
- *lost subjects*, ``retrieval``: above chance, less than a quarter is left of the highest that this run has measured,
  which was at least 0.5 above chance. Among n visits of s subjects, chance is ``(n / s - 1) / (n - 1)``. It counts from
  the first regular measurement on, and among 12 visits or more.
- *shrunk*, ``scale < 0.001`` of the untrained network's. feature_std does not see a network that scales its features
  down to nothing, as a loss without negatives or variance rewards. A weight may well shrink by ten: batch norm
  undoes it.
- feature_std must also have halved since the first measurement: a network that starts so has not collapsed. And the
  monitor warns when two measurements in a row say so: in the first steps running statistics of batch norm lag behind
  (the published longitudinal recipe shows 0.05 at step 25, and 0.42 at step 50). What the last measurement of a run
  says alone is told at its end, as a suspicion.
- *not finite*: NaN where there were numbers.
- *shortcut*, in the first 1000 steps: ``matching > 0.98`` and ``shortcut > 0.5``. The pilot's network that had learned
  nothing matched 100 % of the voxels of views cut at one window within 100 steps; of shifted views, 33 to 50 %. On
  noise an untrained zero-padded network gives its place away by R² 0.7 to 0.8 at coarse taps, so that by itself it is
  no alarm. Matching among fewer than 32 points is not counted: at coarse taps of small views it soon is perfect.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

__all__ = ["collapses", "highest", "least_rank", "shortcuts"]

STD, SCALE = 0.05, 1e-3
RANK, OF_UNTRAINED, WIDE = 3.0, 0.6, 16  # channels from which a tap is expected to have rank 3
LEFT, KNOWN = 0.25, 0.5
MATCHING, PLACE, EARLY = 0.98, 0.5, 1000


def least_rank(channels: float) -> float:
    """The rank below which features have few directions: 3 from 16 channels on, down to 1.5 of 1."""
    return 1.5 + (RANK - 1.5) * min(1.0, channels / WIDE)


def highest(best: Mapping[str, float], now: Mapping[str, float]) -> dict[str, float]:
    """The highest rank and retrieval at every tap so far, from those before and the latest figures."""
    kinds = ("rank/", "retrieval/")
    known = {name: value for name, value in now.items() if name.startswith(kinds) and not math.isnan(value)}
    return {**best, **{name: max(value, best.get(name, value)) for name, value in known.items()}}


def collapses(
    now: Mapping[str, float],
    first: Mapping[str, float],
    best: Mapping[str, float] | None = None,
    channels: Mapping[str, int] | None = None,
    chance: float = 0.0,
) -> dict[str, str]:
    """Tap → what happened to it and the likely cause.

    Args:
        now: ``<kind>/<tap>`` → figure.
        first: the same of the untrained network; kinds it lacks are not compared.
        best: :func:`highest` of the run; ``None`` compares with ``first`` alone.
        channels: of each tap; unknown ones count as wide.
        chance: retrieval of an embedding that knows nothing.
    """
    taps = [name.removeprefix("feature_std/") for name in now if name.startswith("feature_std/")]
    best = highest(best or {}, first)
    found = {}
    for tap in taps:
        low = least_rank((channels or {}).get(tap, WIDE))
        found[tap] = _collapse(tap, now, first, low) or _loss(tap, now, best, chance)
    return {tap: text for tap, text in found.items() if text}


def _collapse(tap: str, now: Mapping[str, float], first: Mapping[str, float], low: float) -> str:
    """By comparison with the untrained network."""
    kinds = ("feature_std", "scale", "rank")
    std, scale, rank = (now.get(f"{kind}/{tap}", math.nan) for kind in kinds)
    std_0, scale_0, rank_0 = (first.get(f"{kind}/{tap}", math.nan) for kind in kinds)
    if math.isnan(std):
        if math.isnan(std_0):
            return ""  # there never was anything to measure
        return "features are no longer finite; lower the learning rate, or take trainer.precision 32"
    if std < STD and not std >= std_0 / 2:  # so that an unknown beginning counts as higher
        return (
            f"all features point one way (feature_std {std:.3f}, was {std_0:.3f}); nothing in the loss keeps them "
            "apart: give variance, covariance or negatives more weight, or lower the learning rate"
        )
    if scale < SCALE * scale_0:
        return (
            f"features shrink to nothing (scale {scale:.2g}, was {scale_0:.2g}); nothing in the loss keeps their "
            "variance: give variance or negatives more weight, or less weight decay"
        )
    if rank < low and not rank >= OF_UNTRAINED * rank_0:
        return (
            f"features have few directions (effective rank {rank:.1f}, was {rank_0:.1f}); channels repeat one another: "
            "give covariance or negatives more weight, or lower the learning rate"
        )
    return ""


def _loss(tap: str, now: Mapping[str, float], best: Mapping[str, float], chance: float) -> str:
    """By comparison with the best of the run."""
    rank, rank_1 = (figures.get(f"rank/{tap}", math.nan) for figures in (now, best))
    if rank < LEFT * rank_1:
        return (
            f"features have lost most of their directions (effective rank {rank:.1f}, was up to {rank_1:.1f}): give "
            "covariance or negatives more weight, or lower the learning rate"
        )
    known, known_1 = (figures.get(f"retrieval/{tap}", math.nan) - chance for figures in (now, best))
    if known_1 >= KNOWN and known < LEFT * known_1:
        return (
            f"features no longer tell subjects apart (retrieval {known + chance:.2f}, up to {known_1 + chance:.2f}, "
            f"chance {chance:.2f}): give negatives more weight, or lower the rate"
        )
    return ""


def shortcuts(now: Mapping[str, float], step: int) -> dict[str, str]:
    """Tap → how it matches voxels by their place in the crop, and what to do about it.

    Args:
        now: ``<kind>/<tap>`` → figure.
        step: of training; later, a high matching accuracy is what training is for.
    """
    found = {}
    for name, matching in now.items():
        kind, _, tap = name.partition("/")
        place = now.get(f"shortcut/{tap}", 0.0)
        if kind == "matching" and step <= EARLY and matching > MATCHING and place > PLACE:
            found[tap] = (
                f"{matching:.0%} of voxels are matched already, and their place in the crop can be read off pure noise "
                f"(R² {place:.2f}): the network may match by place, not by anatomy. Shift the views against one "
                "another (views.geometry independent, a lower views.overlap), or pad by reflection (backbone.padding "
                "reflect)"
            )
    return found
