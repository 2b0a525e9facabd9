"""What the monitor's figures say is wrong: a collapse, or a shortcut; in one sentence with the numbers and a remedy.

Thresholds, and where they come from:

- *one direction*, ``feature_std < 0.05``. A feature is ``m + e``, m what all voxels share. It is ``|e| / |f|``, so that
  below 0.05 the voxels' own part is 1/400 of the energy, and bfloat16, which rounds values to 1/256, leaves 13 steps of
  it. In 500 steps of every shipped method no trained tap fell below 0.4 from step 50 on; the config that is made to
  collapse passes 0.05 within 25 steps (tests/test_monitor.py).
- *few directions*, ``rank < 1.5``: features on a line, whose rank is 1. Noise of a
  twentieth of its length across it is the most that remains below 1.5 (8 channels). The lowest of the same runs: 6.
- *shrunk*, ``scale < 0.001`` of the untrained network's. feature_std does not see a network that scales its features
  down to nothing, as a loss without negatives or variance rewards. A weight may well shrink by ten: batch norm
  undoes it.
- feature_std, and rank above 1, must also have halved since the first measurement: a network that starts so has not
  collapsed. And the monitor warns when two measurements in a row say so: in the first steps running statistics of
  batch norm lag behind (the published longitudinal recipe shows 0.05 at step 25, and 0.42 at step 50).
- *not finite*: NaN where there were numbers.
- *shortcut*, in the first 1000 steps: ``matching > 0.98`` and ``shortcut > 0.5``. The pilot's network that had learned
  nothing matched 100 % of the voxels of views cut at one window within 100 steps; of shifted views, 33 to 50 %. On
  noise an untrained zero-padded network gives its place away by R² 0.7 to 0.8 at coarse taps, so that by itself it is
  no alarm. Matching among fewer than 32 points is not counted: at coarse taps of small views it soon is perfect.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

__all__ = ["collapses", "shortcuts"]

STD, SCALE, RANK = 0.05, 1e-3, 1.5
MATCHING, PLACE, EARLY = 0.98, 0.5, 1000


def collapses(now: Mapping[str, float], first: Mapping[str, float]) -> dict[str, str]:
    """Tap → what happened to it and the likely cause.

    Args:
        now: ``<kind>/<tap>`` → figure.
        first: the same of the untrained network; kinds it lacks are not compared.
    """
    taps = [name.removeprefix("feature_std/") for name in now if name.startswith("feature_std/")]
    found = {tap: _collapse(tap, now, first) for tap in taps}
    return {tap: text for tap, text in found.items() if text}


def _collapse(tap: str, now: Mapping[str, float], first: Mapping[str, float]) -> str:
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
    if rank < RANK and not rank - 1 >= (rank_0 - 1) / 2:
        return (
            f"features lie on a line (effective rank {rank:.1f}, was {rank_0:.1f}); channels repeat one another: give "
            "covariance or negatives more weight, or lower the learning rate"
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
