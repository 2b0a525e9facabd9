"""Scores of segmented subjects: each visit against its truth, and the visits against one another."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import pandas as pd
import torch
from torch import Tensor

from lssl.metrics import PercentChange, ReversalRate, TemporalConsistency, TrajectoryError
from lssl.runs.outputs import Score
from lssl.views import geometry as geo

__all__ = ["METRICS", "SegmentedVisit", "dice_scores", "mean_dice", "score_subject"]

METRICS = {
    "dice": "↑ Dice",
    "hd95": "↓ 95 % Hausdorff, mm",
    "asd": "↓ surface distance, mm",
    "missed": "↓ not found",
    "aspc": "ASPC, %",
    "true_aspc": "true ASPC, %",
    "stcs": "STCS",
    "true_stcs": "true STCS",
    "trajectory_error": "↓ trajectory error, %/y",
    "reversal_rate": "↓ reversals",
}
"""The metrics and their names in the table.

``dice``, ``hd95`` and ``asd`` compare a visit with its truth. ``hd95`` is the larger of two directed 95th percentiles,
as in MONAI (``compute_hausdorff_distance(percentile=95)``): of the distances from the predicted to the true surface,
and back. Tools that take one percentile of both surfaces' pooled distances give other values, never larger ones.
``asd`` is the mean over both surfaces. A structure that is absent from the truth is left out. A structure
that was not found has Dice 0 and no distance, so ``missed`` is reported as well: otherwise an empty prediction would
have the best distances. ``aspc``, ``stcs``, ``trajectory_error`` and ``reversal_rate`` are described in
:mod:`lssl.metrics`, each with the score of a constant prediction. True change worsens two of them, so these also show
the score of the truth. The CSV also holds ``volume`` and ``true_volume``, in mm³.
"""


@dataclass
class SegmentedVisit:
    """A visit with its prediction.

    Attributes:
        session: its name.
        age: years, NaN where unknown.
        time: years since the subject's first visit, NaN where unknown.
        ordered: whether the order of the subject's visits is known.
        affine: ``(4, 4)`` index → frame in mm.
        image: ``(D, H, W)``, for pictures.
        predicted: ``(D, H, W)`` classes.
        truth: ``(D, H, W)`` classes, -1 where unknown; ``None`` where the visit has none.
    """

    session: str
    age: float
    time: float
    ordered: bool
    affine: Tensor
    image: Tensor
    predicted: Tensor
    truth: Tensor | None


def dice_scores(predicted: Tensor, truth: Tensor, number: int) -> Tensor:
    """``(K,)`` ``2 |P ∩ T| / (|P| + |T|)`` over voxels whose truth is known; NaN for a class absent from the truth."""
    known = truth >= 0
    both, sizes, own = (
        torch.bincount(part, minlength=number).double()
        for part in (truth[known & (predicted == truth)], truth[known], predicted[known])
    )
    return torch.where(sizes > 0, 2 * both / (sizes + own), torch.nan)


def mean_dice(dice: Mapping[int, tuple[int, Sequence[float]]]) -> float:
    """Mean Dice of many visits, with equal weight for every subject and every structure.

    The mean over structures of the mean over subjects of the mean over a subject's visits, each over what is defined. A
    structure absent from a visit's truth is undefined there, even if it is predicted, as in MONAI's
    ``DiceMetric(ignore_empty=True)``. nnU-Net agrees if the prediction is empty too. The result is 0 if nothing is
    defined.

    Args:
        dice: visit → its subject, and the Dice of each structure (NaN where not defined).
    """
    table = pd.DataFrame([[subject, *values] for subject, values in dice.values()])
    score = table.groupby(0).mean().mean().mean() if len(table) else float("nan")
    return 0.0 if math.isnan(score) else float(score)


def score_subject(subject: str, visits: Sequence[SegmentedVisit], names: Sequence[str]) -> list[Score]:
    """All rows of one subject.

    Args:
        subject: its name.
        visits: in time order, if there is one, on the CPU. Visits without times give no ``trajectory_error``; visits
            without an order give no ``reversal_rate``.
        names: of the classes but the background.
    """
    rows: list[Score] = []

    def add(session: str, metric: str, values: Tensor) -> None:
        pairs = zip(names, values.reshape(-1).tolist(), strict=True)
        rows.extend(Score(subject, session, name, metric, value) for name, value in pairs if value == value)

    volumes = [_volumes(visit.predicted, visit, len(names)) for visit in visits]
    truths = [
        torch.full_like(volumes[0], torch.nan)
        if visit.truth is None or bool((visit.truth < 0).any())  # partly annotated: its volumes are not known
        else _volumes(visit.truth, visit, len(names))
        for visit in visits
    ]
    for visit, volume, true_volume in zip(visits, volumes, truths, strict=True):
        for metric, values in {"volume": volume, "true_volume": true_volume, **_against_truth(visit, names)}.items():
            add(visit.session, metric, values)
    for number in range(1, len(visits)):
        one, other = visits[number - 1 : number + 1]
        for metric, values in _between(one, other, volumes[number - 1 :], truths[number - 1 :], len(names)):
            add(f"{one.session}/{other.session}", metric, values)
    if len(visits) > 1:
        error = TrajectoryError(len(names))
        error.update(torch.stack(volumes), torch.stack(truths), torch.tensor([visit.time for visit in visits]))
        add("", "trajectory_error", error.compute())
    if len(visits) > 1 and all(visit.ordered for visit in visits):
        reversal = ReversalRate(len(names))
        reversal.update(torch.stack(volumes), torch.stack(truths))
        add("", "reversal_rate", reversal.compute())
    return rows


def _volumes(label: Tensor, visit: SegmentedVisit, structures: int) -> Tensor:
    """``(K - 1,)`` mm³."""
    counts = torch.bincount(label.flatten().clamp_min(0), minlength=structures + 1)[1:]
    return counts.double() * geo.volume(visit.affine)


def _against_truth(visit: SegmentedVisit, names: Sequence[str]) -> dict[str, Tensor]:
    if visit.truth is None:
        return {}
    from monai.metrics import compute_average_surface_distance, compute_hausdorff_distance

    number = len(names) + 1
    dice = dice_scores(visit.predicted, visit.truth, number)[1:]
    known = visit.truth >= 0
    mine, true = (
        torch.nn.functional.one_hot(label.where(known, 0), number).movedim(-1, 0)[None]
        for label in (visit.predicted, visit.truth)
    )
    spacing = geo.spacing(visit.affine).tolist()
    with warnings.catch_warnings():  # ``missed`` counts missing classes
        warnings.simplefilter("ignore")
        hausdorff = compute_hausdorff_distance(mine, true, include_background=False, percentile=95, spacing=spacing)
        surface = compute_average_surface_distance(
            mine, true, include_background=False, symmetric=True, spacing=spacing
        )
    found = mine.flatten(2).any(2)[0, 1:] & dice.isfinite()
    distances = {"hd95": hausdorff[0].double(), "asd": surface[0].double()}
    missed = torch.where(dice.isfinite(), (~found).double(), torch.nan)
    return {
        "dice": dice,
        **{name: value.cpu().where(found, torch.nan) for name, value in distances.items()},
        "missed": missed,
    }


def _between(
    one: SegmentedVisit, other: SegmentedVisit, volumes: Sequence[Tensor], truths: Sequence[Tensor], structures: int
) -> Iterator[tuple[str, Tensor]]:
    """Agreement of two visits, and of their truths."""
    for prefix, (first, second) in {"": volumes[:2], "true_": truths[:2]}.items():
        change = PercentChange(structures)
        change.update(first[None], second[None])
        yield f"{prefix}aspc", change.compute()
    labels = {"": (one.predicted, other.predicted)}
    if one.truth is not None and other.truth is not None:
        labels["true_"] = (one.truth, other.truth)
    points = geo.transform(other.affine, geo.lattice(other.predicted.shape))[None]
    for prefix, (first, second) in labels.items():
        brought = geo.sample_nearest(first[None], one.affine[None], points, -1).view(1, *second.shape)
        agreement = TemporalConsistency(structures + 1)
        agreement.update(brought, second[None])
        yield f"{prefix}stcs", agreement.compute().reshape(-1)[1:]
