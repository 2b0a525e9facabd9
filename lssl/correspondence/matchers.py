"""Matchers: find the point of one visit that shows the same anatomy as a point of another.

All matchers have one interface, :meth:`Matcher.match`, in mm of the visits' own frames:

* :class:`FrameMatcher`: the visits share a frame (one subject's, or a template's). Exact and free.
* :class:`FieldMatcher`: a displacement field of a non-rigid registration maps one frame to the other.
* :class:`EmbeddingMatcher`: nearest neighbour in a learned anatomical embedding, for visits without a common frame.

:func:`select_match` then chooses one of several candidates or falls back to the same visit.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lssl.checkpoint import load_task
from lssl.data.batch import PairBatch
from lssl.networks.feature_geometry import Tap
from lssl.utils.errors import InputError, positive
from lssl.utils.transfer import send
from lssl.views import affines as algebra
from lssl.views import geometry as geo
from lssl.views.points import feature_affines
from lssl.views.view import Placement, View

__all__ = [
    "AnatomicalMaps",
    "EmbeddingMatcher",
    "FieldMatcher",
    "FrameMatcher",
    "Matcher",
    "descriptors",
    "full_view",
    "select_match",
]


@runtime_checkable
class AnatomicalMaps(Protocol):
    """What :class:`EmbeddingMatcher` needs from a network (``AnatomicalEmbedding`` has it)."""

    def anatomical_maps(self, image: Tensor) -> list[tuple[Tensor, Tap]]:
        """L2-normalised maps ``(B, D, ...)`` of images ``(B, C, ...)``, the finest first, and where they lie.

        Images may have any size. Padding is added behind the last voxels, so indices do not change.
        """


class Matcher(nn.Module, ABC):
    """Finds points of one view or visit in another."""

    @abstractmethod
    def match(self, points: Tensor, first: View, second: View) -> tuple[Tensor, Tensor]:
        """Finds the points of ``second`` that show the anatomy of ``first`` at ``points``.

        Args:
            points: ``(B, N, 3)`` mm in the frame of ``first``.
            first: B views, or whole visits (:func:`full_view`).
            second: B views, of the same or of other subjects.

        Returns:
            ``(B, N, 3)`` mm in the frame of ``second``, float64, and scores ``(B, N)`` in [0, 1], float32. A point
            without a match scores 0, and its position is undefined. No gradient.
        """

    def match_on_host(
        self, points: np.ndarray, first: Placement, second: Placement
    ) -> tuple[np.ndarray, np.ndarray] | None:
        """The same from the views' places alone, as arrays; ``None`` for a matcher that needs images."""
        return None


class FrameMatcher(Matcher):
    """Both visits share a frame: the match is the point itself, or where the data's field says that its tissue lies.

    The score is 1 if ``second`` shows the match, else 0.
    """

    @torch.no_grad()
    def match(self, points: Tensor, first: View, second: View) -> tuple[Tensor, Tensor]:
        """See :meth:`Matcher.match`."""
        points = first.follow(points.double())
        return points, second.contains(points).float()

    def match_on_host(self, points: np.ndarray, first: Placement, second: Placement) -> tuple[np.ndarray, np.ndarray]:
        """See :meth:`Matcher.match_on_host`."""
        points = first.follow(points)
        return points, second.contains(points).astype(np.float32)


class FieldMatcher(Matcher):
    """A displacement field of a non-rigid registration carries the frame of ``first`` to that of ``second``.

    The score is 1 if ``second`` shows the match, else 0. ``lssl prepare --nonrigid`` makes such fields (see
    :func:`lssl.prepare.change.field_between`), and so do other tools.

    Args:
        field: ``(B, 3, D, H, W)`` mm, see :func:`lssl.views.geometry.displace`.
        affine: ``(B, 4, 4)``, index of ``field`` → frame.
        backward: the field carries ``second`` to ``first``, so it must be inverted.
    """

    def __init__(self, field: Tensor, affine: Tensor, backward: bool = False) -> None:
        super().__init__()
        self.field, self.affine, self.backward = field, affine, backward

    @torch.no_grad()
    def match(self, points: Tensor, first: View, second: View) -> tuple[Tensor, Tensor]:
        """See :meth:`Matcher.match`."""
        move = geo.undisplace if self.backward else geo.displace
        moved = move(points.double(), self.field, self.affine)
        return moved, second.contains(moved).float()


class EmbeddingMatcher(Matcher):
    """Nearest neighbour over the lattice of ``second`` in a learned anatomical embedding (Yan et al., TMI 2022).

    ``y = argmax_y ½ (f₁(x)·f₂(y) + c₁(x)·c₂(y))`` with the fine and coarse embeddings of both; the
    coarse one is interpolated to the fine lattice and normalised again. Refinement rounds then move ``y`` between the
    voxels: each halves the lattice's step around ``y``, on interpolated embeddings. ``y`` is matched back in the same
    way. If the way back ends farther than ``round_trip`` mm from ``x``, the score is 0; otherwise it is the similarity
    (at least 0).

    Args:
        embedding: path of a checkpoint of ``AnatomicalEmbedding``, or the network itself. It runs in evaluation
            mode and without gradient.
        round_trip: mm; ``None`` skips the way back.
        foreground: search the foreground only.
        rounds: number of refinement rounds; 0 stays on the lattice.
    """

    def __init__(
        self,
        embedding: str | nn.Module,
        round_trip: float | None = 10.0,
        foreground: bool = True,
        rounds: int = 2,
    ) -> None:
        super().__init__()
        if round_trip is not None:
            positive(round_trip=round_trip)
        if rounds < 0:
            raise InputError(f"rounds: give 0 or more, not {rounds}.")
        network = load_task(embedding) if isinstance(embedding, str) else embedding
        if not isinstance(network, AnatomicalMaps):
            raise InputError(
                f"embedding: {type(network).__name__} has no anatomical_maps; give a checkpoint of AnatomicalEmbedding."
            )
        self.network, self.maps = network, network.anatomical_maps
        if isinstance(embedding, str):
            self.network.requires_grad_(False).eval()
        self.round_trip, self.foreground, self.rounds = round_trip, foreground, rounds

    @torch.no_grad()
    def match(self, points: Tensor, first: View, second: View) -> tuple[Tensor, Tensor]:
        """See :meth:`Matcher.match`."""
        training = self.network.training
        self.network.eval()
        here, there = _Embedded(self.maps(first.image), first), _Embedded(self.maps(second.image), second)
        self.network.train(training)
        points = points.double()
        with torch.autocast(points.device.type, enabled=False):  # neighbours differ little in similarity
            matches, score = there.find(here.at(points), self.rounds, self.foreground)
            good = first.contains(points)
            if self.round_trip is not None:
                back, _ = here.find(there.at(matches), self.rounds, self.foreground)
                good = good & ((back - points).norm(dim=-1) <= self.round_trip)
        return matches, score.clamp(0, 1).masked_fill(~good, 0)


class _Embedded:
    """One view's maps, and the search among them."""

    def __init__(self, maps: Sequence[tuple[Tensor, Tap]], view: View) -> None:
        self.view, self.tap, self.size = view, maps[0][1], maps[0][0].shape[2:]
        self.map = descriptors(maps)
        self.affine = geo.feature_affine(view.affine, self.tap.stride, self.tap.offset)

    def at(self, points: Tensor) -> Tensor:
        """Descriptors ``(B, N, D)`` of unit length at points of the frame."""
        return F.normalize(geo.sample(self.map, self.affine, points), dim=-1)

    def find(self, wanted: Tensor, rounds: int, foreground: bool) -> tuple[Tensor, Tensor]:
        """Points ``(B, N, 3)`` in mm most similar to ``wanted (B, N, D)``, and the similarity ``(B, N)``."""
        lattice = geo.lattice(self.size, self.affine.device)
        nodes = geo.transform(self.affine, lattice)
        shown = self.view.contains(nodes)
        if foreground:
            inside = self.view.contains(nodes, foreground=True)
            shown = torch.where(inside.any(1, keepdim=True), inside, shown)
        similarity = wanted @ self.map.flatten(2)
        best = similarity.masked_fill(~shown[:, None], float("-inf")).max(2)
        index = lattice[best.indices]
        similarity = best.values
        around = geo.lattice((3, 3, 3), index.device) - 1
        around = torch.cat([around[13:14], around[:13], around[14:]])  # the middle first: it wins a tie
        for number in range(rounds):
            tries = index[:, :, None] + around * 0.5 ** (number + 1)
            points = geo.transform(self.affine, tries.flatten(1, 2))
            values = torch.einsum("bnd,bnmd->bnm", wanted, self.at(points).unflatten(1, tries.shape[1:3]))
            similarity, step = values.max(2)
            index = tries.gather(2, step[..., None, None].expand(-1, -1, 1, 3)).squeeze(2)
        return geo.transform(self.affine, index), similarity


def descriptors(maps: Sequence[tuple[Tensor, Tap]]) -> Tensor:
    """One map ``(B, Σ D, ...)`` of unit length on the finest lattice, whose products are the mean of the maps' cosines.

    Args:
        maps: L2-normalised maps of one image and their taps, the finest first.
    """
    fine, tap = maps[0]
    parts = [fine.float()]
    for coarse, other in maps[1:]:
        own, theirs = feature_affines(np.eye(4)[None], [tap, other])
        grid = geo.grid_parts(algebra.inverse(theirs) @ own, coarse.shape[2:], fine.shape[2:])
        sent = send([part.astype(np.float32) for part in grid], fine.device)
        moved = geo.resample_parts(coarse, sent, padding="border")
        parts.append(F.normalize(moved, dim=1))
    return torch.cat(parts, 1) / math.sqrt(len(parts)) if maps[1:] else parts[0]


def full_view(batch: PairBatch, visit: int) -> View:
    """The sources of visit 0 or 1 of a batch, unaugmented, as views."""
    image, affine = batch.images[:, visit], batch.affines[:, visit]
    return View.of(batch, visit, image, image, affine, batch.times[:, visit], field=True)


def select_match(
    score: np.ndarray, accept: float, min_score: float
) -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]:
    """Chooses one of N candidate points per sample: the first good one, or the best acceptable one, or none.

    Args:
        score: ``(B, N)`` scores of the candidates, in the order of drawing.
        accept: the first candidate of at least this score is taken.
        min_score: lowest score, above 0, at which the best candidate is taken if none reaches ``accept``.

    Returns:
        The index ``(B,)`` of each sample's candidate; ``(B,)`` bool, true for a sample without a match, which uses the
        same visit at its first candidate; and metrics for the log: the shares ``accepted``, ``best`` and ``same_visit``
        (they sum to 1) and the mean ``score`` of the matched samples.
    """
    if not 0 < min_score <= accept:
        raise InputError(f"min_score: give a score above 0 and not above accept ({accept:g}), not {min_score:g}.")
    good = score >= accept
    accepted = good.any(1)
    same = score.max(1) < min_score
    index = np.where(same, 0, np.where(accepted, good.argmax(1), score.argmax(1)))
    taken = score[np.arange(len(score)), index]
    shares = {
        "accepted": accepted.mean(),
        "best": (~accepted & ~same).mean(),
        "same_visit": same.mean(),
        "score": (taken * ~same).sum() / max(1, (~same).sum()),
    }
    return index, same, {name: np.asarray(value, np.float32) for name, value in shares.items()}
