"""Metrics of a representation without fine-tuning, per tap, and the held-out views they are measured on.

The run's monitor (:class:`lssl.callbacks.RepresentationMonitor`) and its report (:func:`.evaluate.evaluate`)
show the same figures, of this module. Names are ``<kind>/<tap>``; the kinds:

============ ===================================================== ==================================================
kind         of                                                    metric
============ ===================================================== ==================================================
feature_std  L2-normalised voxel features of view 1                :class:`lssl.metrics.FeatureStd`
scale        the features as they are                              :class:`lssl.metrics.FeatureStd`
rank         the features                                          :class:`lssl.metrics.EffectiveRank`
correlation  their channels                                        :class:`lssl.metrics.ChannelCorrelation`
uniformity   L2-normalised features of one image                   :class:`lssl.metrics.Uniformity`
alignment    corresponding points of both views                    :class:`lssl.metrics.Alignment`
matching     corresponding points of both views                    :class:`lssl.metrics.MatchingAccuracy`
consistency  corresponding points, if the views show two visits    :class:`lssl.metrics.FeatureConsistency`
shuffled     points of two visits that do not correspond           :class:`lssl.metrics.FeatureConsistency`
position     place in the crop, on images                          :class:`lssl.metrics.PositionR2`
shortcut     place in the crop, on noise                           :class:`lssl.metrics.PositionR2`
dice         labels of voxels, where there are any                 :class:`lssl.metrics.LabelProbe`
retrieval    visits: mean and maximum over the foreground          :class:`lssl.metrics.CrossVisitRetrieval`
identity     visits                                                :class:`lssl.metrics.IdentityAUC`
interval     visits                                                :class:`lssl.metrics.IntervalCorrelation`
order        visits                                                :class:`lssl.metrics.OrderAUC`
age          visits                                                :class:`lssl.metrics.AgeR2`
============ ===================================================== ==================================================

Views 1 and 2 are drawn as in training, one visit each; visits and labels are seen in unaugmented views.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import Metric

from lssl.data.batch import PairBatch
from lssl.metrics import (
    AgeR2,
    Alignment,
    ChannelCorrelation,
    CrossVisitRetrieval,
    EffectiveRank,
    FeatureConsistency,
    FeatureStd,
    IdentityAUC,
    IntervalCorrelation,
    LabelProbe,
    MatchingAccuracy,
    OrderAUC,
    PositionR2,
    Uniformity,
)
from lssl.networks.feature_geometry import Tap
from lssl.networks.heads import mean_and_max
from lssl.task import Task
from lssl.utils.distributed import sync_metrics
from lssl.views import geometry as geo
from lssl.views.points import corresponding_points
from lssl.views.sampler import View

__all__ = ["HeldOutPair", "held_out_pairs", "measure", "trained_taps"]

POINTS, VOXELS, LABELLED = 256, 512, 512  # per case: corresponding points, voxels of a view, voxels with labels
FEWEST = 32  # corresponding points, below which finding one among them says little


@dataclass
class HeldOutPair:
    """One held-out pair, ready to be measured: the same views and points every time.

    Attributes:
        number: of the subject among those that are measured, from 0 on.
        subject: its id.
        sessions: ``(V,)`` ids of visits that no earlier case has shown.
        ages: ``(V,)`` years.
        times: ``(V,)`` years since the subject's first visit.
        images: ``(V, C, ...)`` unaugmented views of these visits; for the first pair of a subject then view 1, view 2
            and noise of view 1's mean and deviation.
        affines: ``(V or V + 2, 4, 4)`` of the same views, noise left out.
        foreground: ``(V, 1, ...)`` of the visits.
        two_visits: whether views 1 and 2 show two visits, not one.
        points_mm: tap → ``(K, 3)`` mm, different points on view 1's lattice that view 2 shows, too; none if they are
            fewer than :data:`FEWEST`.
        places: tap → ``(K, 3)`` mm, where view 2 shows them.
        indices: tap → ``(P,)`` voxels drawn from view 1's lattice, and which of them are foreground.
        labelled: ``(Q, 3)`` mm and ``(Q,)`` labels of voxels of the first visit; ``None`` if it has none.
    """

    number: int
    subject: int
    sessions: Tensor
    ages: Tensor
    times: Tensor
    images: Tensor
    affines: Tensor
    foreground: Tensor
    two_visits: bool
    points_mm: dict[str, Tensor]
    places: dict[str, Tensor]
    indices: dict[str, tuple[Tensor, Tensor]]
    labelled: tuple[Tensor, Tensor] | None


def held_out_pairs(
    task: Task, batches: Iterable[PairBatch], subjects: int | None = None, visits: int | None = None
) -> Iterator[HeldOutPair]:
    """Reads held-out pairs one by one, as many as show a visit that no earlier one has shown.

    Args:
        task: whose views, taps and device are used.
        batches: pairs, those of one subject after one another. A series is read as the pairs of its neighbours.
        subjects: most subjects.
        visits: most visits of each.
    """
    seen: dict[int, list[int]] = {}
    for batch in batches:
        for pair in (pair for row in range(len(batch)) for pair in batch.rows(slice(row, row + 1)).neighbours()):
            subject, sessions = int(pair.subject), pair.session[0].tolist()
            if subject not in seen and len(seen) == subjects:
                return
            shown = seen.setdefault(subject, [])
            new = [
                visit for visit in (0, 1) if sessions[visit] not in shown and sessions[visit] not in sessions[:visit]
            ]
            new = new[: None if visits is None else max(0, visits - len(shown))]
            if not new:
                continue
            yield _held_out_pair(task, pair.to(task.device), new, len(seen) - 1, first=not shown)
            shown += [sessions[visit] for visit in new]


def _held_out_pair(task: Task, pair: PairBatch, new: list[int], number: int, first: bool) -> HeldOutPair:
    generator = torch.Generator().manual_seed(number)
    centred = task.views.centred(pair)
    shown = [centred[visit] for visit in new]
    case = HeldOutPair(
        number=number,
        subject=int(pair.subject),
        sessions=pair.session[0, new],
        ages=pair.ages[0, new],
        times=pair.times[0, new],
        images=torch.cat([view.image for view in shown]),
        affines=torch.cat([view.affine for view in shown]),
        foreground=torch.cat([view.foreground for view in shown]),
        two_visits=bool(pair.session[0, 0] != pair.session[0, 1]),
        points_mm={},
        places={},
        indices={},
        labelled=_labelled(shown[0], generator) if first else None,
    )
    if first:
        _add_views(case, task, pair, generator)
    return case


def _add_views(case: HeldOutPair, task: Task, pair: PairBatch, generator: torch.Generator) -> None:
    """Two views as in training, noise, and the points at which they are compared."""
    sampler = copy.copy(task.views)
    sampler.same_visit = 0.0
    first, second = sampler(pair, generator)
    noise = torch.randn(first.image.shape, generator=generator).to(first.image.device)
    noise = first.image.mean() + first.image.std() * noise
    case.images = torch.cat([case.images, first.image, second.image, noise])
    case.affines = torch.cat([case.affines, first.affine, second.affine])
    for name, tap in task.backbone.taps.items():
        points_mm, weight = corresponding_points(first, second, tap, POINTS, generator, foreground=True)
        different = points_mm[0].unique(dim=0)
        case.points_mm[name] = different if weight[0] and len(different) >= FEWEST else different[:0]
        case.places[name] = first.follow(case.points_mm[name][None])[0]
        size = [side // stride for side, stride in zip(first.size, tap.stride, strict=True)]
        drawn = torch.rand(math.prod(size), generator=generator).topk(min(VOXELS, math.prod(size))).indices
        drawn = drawn.to(first.image.device)
        case.indices[name] = drawn, _shrunk(first.foreground, size).flatten()[drawn] > 0.5


def _labelled(view: View, generator: torch.Generator) -> tuple[Tensor, Tensor] | None:
    """Voxels with labels; a label is drawn as often as the root of its volume, so that small structures count."""
    label = view.label
    if label is None or not (label >= 0).any():
        return None
    flat = label[0].flatten().long()
    names, number, volume = flat.unique(return_inverse=True, return_counts=True)
    weight = volume.float().rsqrt().masked_fill(names < 0, 0)[number].cpu()
    inside = weight.nonzero()[:, 0]
    rank = torch.rand(len(inside), generator=generator).log() / weight[inside]  # draws without replacement
    index = inside[rank.topk(min(LABELLED, len(inside))).indices].to(flat.device)
    return geo.transform(view.affine[0], geo.lattice(view.size, flat.device)[index]), flat[index]


def trained_taps(task: Task) -> list[str]:
    """Taps whose own weights are trained; those of a part that no term reaches stay as they were, and say nothing."""
    network, found = task.backbone.network, []
    for name, tap in task.backbone.taps.items():
        trained = [parameter.requires_grad for parameter in network.get_submodule(tap.module).parameters()]
        if any(trained) or not trained:
            found.append(name)
    return found


@torch.no_grad()
def measure(
    task: Task, held_out: Iterable[HeldOutPair], taps: Sequence[str] | None = None, together: bool = False
) -> dict[str, float]:
    """All metrics of all taps; see the module's table. NaN where there is too little to measure.

    Args:
        task: measured in eval mode, its mode restored.
        held_out: from :func:`held_out_pairs`.
        taps: which; ``None`` takes all.
        together: every process has cases of its own, and all measure as one.
    """
    training = task.training
    task.eval()
    names = list(task.backbone.taps) if taps is None else list(taps)
    meters = {name: _Meters(task.backbone.taps[name], task.device) for name in names}
    for case in held_out:
        features = task.backbone(case.images, names)
        for name, meter in meters.items():
            meter.add(name, case, features[name].float())
    task.train(training)
    if together:
        sync_metrics(metric for meter in meters.values() for metric in meter.metrics.values())
    values = {f"{kind}/{name}": value for name, meter in meters.items() for kind, value in meter.compute().items()}
    return dict(zip(values, torch.stack(list(values.values())).tolist(), strict=True))  # waits for the device once


def _shrunk(foreground: Tensor, size: Sequence[int]) -> Tensor:
    """The share of foreground in each voxel of a coarser lattice."""
    return F.adaptive_avg_pool3d(foreground, tuple(size))  # type: ignore[arg-type]


class _Meters:
    """The metrics of one tap."""

    VISITS = ("retrieval", "identity", "interval", "order", "age")

    def __init__(self, tap: Tap, device: torch.device) -> None:
        c, sync = tap.channels, {"sync_on_compute": False}  # asking processes that do not measure would wait forever
        metrics: dict[str, Metric] = {
            "feature_std": FeatureStd(c, **sync),
            "scale": FeatureStd(c, normalise=False, **sync),
            "rank": EffectiveRank(c, **sync),
            "correlation": ChannelCorrelation(c, **sync),
            "uniformity": Uniformity(**sync),
            "alignment": Alignment(**sync),
            "matching": MatchingAccuracy(**sync),
            "consistency": FeatureConsistency(**sync),
            "position": PositionR2(c, **sync),
            "shortcut": PositionR2(c, **sync),
            "dice": LabelProbe(**sync),
            "retrieval": CrossVisitRetrieval(**sync),
            "identity": IdentityAUC(**sync),
            "interval": IntervalCorrelation(**sync),
            "order": OrderAUC(**sync),
            "age": AgeR2(**sync),
        }
        self.metrics = {kind: metric.to(device) for kind, metric in metrics.items()}
        self.tap = tap
        rows, ids = torch.zeros(0, c, device=device), torch.zeros(0, dtype=torch.long, device=device)
        self._points(rows, rows, True)  # so that a process without cases takes part
        self._voxels(rows, rows, rows[:, :1].expand(-1, 3), ids.bool(), 0)
        self.metrics["dice"].update(rows, ids, ids)
        self._visits(torch.cat([rows, rows], 1), ids, ids, rows[:, 0], rows[:, 0])

    def add(self, name: str, case: HeldOutPair, features: Tensor) -> None:
        """Adds a case's features ``(N, C, ...)`` at the tap of this name."""
        seen = len(case.sessions)
        weight = _shrunk(case.foreground, features.shape[2:])
        subject = torch.full_like(case.sessions, case.subject)
        self._visits(mean_and_max(features[:seen], weight), subject, case.sessions, case.ages, case.times)
        if name not in case.points_mm:
            return
        one = self._at(features, case, seen, case.points_mm[name])
        other = self._at(features, case, seen + 1, case.places[name])
        self._points(one, other, case.two_visits)
        index, inside = case.indices[name]
        coordinates = geo.lattice(features.shape[2:], features.device)[index]
        image, noise = (features[row].flatten(1).T[index] for row in (seen, seen + 2))
        self._voxels(image, noise, coordinates, inside, case.number)
        if case.labelled is not None:
            points, labels = case.labelled
            self.metrics["dice"].update(
                self._at(features, case, 0, points), labels, torch.full_like(labels, case.subject)
            )

    def compute(self) -> dict[str, Tensor]:
        """Kind → float32 scalar."""
        values: dict[str, Tensor] = {}
        for kind, metric in self.metrics.items():
            value = metric.compute()
            values |= value if isinstance(value, dict) else {kind: value}
        return {kind: value.float() for kind, value in values.items()}

    def _at(self, features: Tensor, case: HeldOutPair, image: int, points: Tensor) -> Tensor:
        """``(K, C)`` of one image at points of the frame."""
        affine = geo.feature_affine(case.affines[image], self.tap.stride, self.tap.offset)
        return geo.sample(features[image : image + 1], affine[None], points[None])[0]

    def _points(self, one: Tensor, other: Tensor, two_visits: bool) -> None:
        for kind in ("alignment", "matching", *(["consistency"] if two_visits else [])):
            self.metrics[kind].update(one, other)

    def _voxels(self, image: Tensor, noise: Tensor, coordinates: Tensor, inside: Tensor, crop: int) -> None:
        for kind in ("feature_std", "scale", "rank", "correlation", "uniformity"):
            self.metrics[kind].update(image[inside])
        self.metrics["position"].update(image, coordinates, crop)
        self.metrics["shortcut"].update(noise, coordinates, crop)

    def _visits(self, embedding: Tensor, subject: Tensor, session: Tensor, age: Tensor, time: Tensor) -> None:
        for kind in self.VISITS:
            self.metrics[kind].update(embedding, subject, session, age, time)
