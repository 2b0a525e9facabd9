"""Matched views: a query and a key crop centred on the same anatomy, of two visits or of two subjects."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lssl.correspondence.matchers import FrameMatcher, Matcher, full_view, select_match
from lssl.data.batch import PairBatch
from lssl.utils.errors import InputError, positive
from lssl.views import geometry as geo
from lssl.views.points import draw
from lssl.views.sampler import View, ViewSampler

__all__ = ["MatchedViews", "Matching"]


@dataclass
class Matching:
    """Options of the match between query and key.

    Attributes:
        matcher: finds a point of the query in the key. ``None`` uses the common frame; an ``EmbeddingMatcher`` uses a
            learned embedding.
        other_subject: probability of a key from another subject of the batch. Without an embedding, all subjects must
            lie in one template's frame, and the datamodule must declare it (``common_frame``).
        tries: points drawn per pair. The first point that scores ``accept`` is used, or the best that scores
            ``min_score``. Without either, both crops come from one visit. Alice's code draws 101 points and uses the
            last, regardless of its score.
        accept: score that ends the search (Alice: 0.7).
        min_score: lowest score of a match.
    """

    matcher: Matcher | None = None
    other_subject: float = 0.0
    tries: int = 20
    accept: float = 0.7
    min_score: float = 0.5

    def __post_init__(self) -> None:
        positive(tries=self.tries)
        if not 0 <= self.other_subject <= 1:
            raise InputError(f"other_subject: give a probability, not {self.other_subject:g}.")
        if not 0 < self.min_score <= self.accept <= 1:
            raise InputError(
                f"accept, min_score: give 0 < min_score <= accept <= 1, not {self.min_score:g} and {self.accept:g}."
            )


class MatchedViews:
    """Draws a query view of one visit and a key view of the same anatomy in another visit or subject.

    One visit of each pair is the query. With probability ``other_subject``, the key is a visit of another subject of
    the batch, if there is one. Otherwise the key is the pair's other visit, or, with probability ``views.same_visit``,
    the same visit. ``tries`` points of the query are drawn and matched at once, and :func:`.matchers.select_match`
    chooses one: the first that scores ``accept``, or the best that scores ``min_score``. Without either, the key is cut
    from the query's own visit. The query view is centred on the point. The key view is centred on its match, plus a
    shift that leaves the boxes at least ``views.overlap``. A match too near the border of the key's source for such a
    box scores 0. Zoom, rotation and mirror are drawn as in :class:`lssl.ViewSampler`.

    Args:
        views: size, geometry and intensity of the views.
        matching: options of the match; ``None`` takes :class:`Matching` with its defaults.
    """

    DRAWS = 8  # points drawn per try; those on the foreground are used

    def __init__(self, views: ViewSampler, matching: Matching | None = None) -> None:
        if views.geometry == "shared":
            raise InputError("views: every view is cut at its own match, so geometry must be independent.")
        matching = matching or Matching()
        self.views, self.matcher = views, matching.matcher or FrameMatcher()
        self.other_subject, self.tries = matching.other_subject, matching.tries
        self.accept, self.min_score = matching.accept, matching.min_score

    def __call__(self, batch: PairBatch, generator: torch.Generator) -> tuple[View, View, dict[str, Tensor]]:
        """Query views, key views, and the shares of :func:`.matchers.select_match` with that of ``other_subject``."""
        views, n, device = self.views, len(batch), batch.affines.device
        views.check(batch)
        pairs, crossed = self._partners(batch, generator)
        turn = views.draw_linear(n, generator, device)
        turns = torch.stack([turn, self._second_turn(turn, generator)], 1)
        centres = self._centres(pairs, views.in_voxels(turn, pairs.affines[:, 0]), generator)
        shift = views.draw_shift((n,), generator).to(device, non_blocking=True)
        points = geo.transform(pairs.affines[:, 0], centres)
        matches, score = self.matcher.match(points, full_view(pairs, 0), full_view(pairs, 1))
        _, fits = self._key(pairs, turns[:, 1], matches, shift)
        index, same, shares = select_match(score * fits, self.accept, self.min_score)

        chosen = torch.arange(n, device=device), index
        match = torch.where(same[:, None], points[chosen], matches[chosen])
        pairs = pairs.visits(torch.where(same[:, None], 0, torch.arange(2, device=device)))
        first = views.view_to_source(views.in_voxels(turn, pairs.affines[:, 0]), centres[chosen])
        second, _ = self._key(pairs, turns[:, 1], match[:, None], shift)
        shares["other_subject"] = (crossed & ~same).float().mean()
        return *views.resample_views(pairs, torch.stack([first, second[:, 0]], 1), generator), shares

    def _partners(self, batch: PairBatch, generator: torch.Generator) -> tuple[PairBatch, Tensor]:
        """Query and key visits as the two visits of a batch, and ``(B,)`` bool, which keys are of another subject."""
        n, device = len(batch), batch.affines.device
        cross, same = torch.rand(2, n, generator=generator) < torch.tensor(
            [[self.other_subject], [self.views.same_visit]]
        )
        visit, other = torch.randint(2, (2, n), generator=generator)
        other = torch.where(cross, other, torch.where(same, visit, 1 - visit))
        lots = torch.rand(n, n, generator=generator)
        cross, visit, other, lots = (draws.to(device, non_blocking=True) for draws in (cross, visit, other, lots))
        stranger = batch.subject[:, None] != batch.subject[None]
        crossed = cross & stranger.any(1)
        # In a batch of one subject, the other visit replaces the other subject.
        other = torch.where(cross & ~crossed, 1 - visit, other)
        own = torch.arange(n, device=device)
        partner = torch.where(crossed, lots.masked_fill(~stranger, -1).argmax(1), own)
        return batch.visits(torch.stack([visit, other], 1), torch.stack([own, partner], 1)), crossed

    def _second_turn(self, turn: Tensor, generator: torch.Generator) -> Tensor:
        second = self.views.draw_linear(len(turn), generator, turn.device)
        return self.views.same_mirror(second, turn) if self.views.flip_together else second

    def _centres(self, pairs: PairBatch, linear: Tensor, generator: torch.Generator) -> Tensor:
        """``(B, tries, 3)`` centres of the query as indices of its source, on the foreground if requested."""
        low, high = self.views.centre_bounds(linear, pairs.extent[:, 0])
        count = self.DRAWS * self.tries if self.views.foreground else self.tries
        draws = torch.rand(len(pairs), count, 3, generator=generator, dtype=torch.float64).to(low.device)
        centres = low[:, None] + draws * (high - low)[:, None]
        if not self.views.foreground:
            return centres
        index = centres.round().long().clamp_min(0)
        rows = torch.arange(len(pairs), device=low.device)[:, None]
        hit = pairs.foreground[:, 0][rows, index[..., 0], index[..., 1], index[..., 2]]
        return centres.gather(1, draw(hit, self.tries)[..., None].expand(-1, -1, 3))

    def _key(self, pairs: PairBatch, turn: Tensor, matches: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
        """Index maps ``(B, N, 4, 4)`` of keys centred near ``matches``, and ``(B, N)`` bool: near enough."""
        views = self.views
        linear = views.in_voxels(turn, pairs.affines[:, 1])
        low, high = views.centre_bounds(linear, pairs.extent[:, 1])
        exact = geo.transform(geo.inverse(pairs.affines[:, 1]), matches)
        steps = views.steps(pairs.affines[:, 1])[:, None]
        centre = (exact + shift[:, None] * steps).clamp(low[:, None], high[:, None])
        size = steps * torch.tensor(views.size, dtype=exact.dtype, device=exact.device)
        shared = (1 - (centre - exact).abs() / size).clamp_min(0).prod(-1)
        return views.view_to_source(linear[:, None], centre), shared >= views.overlap - 1e-6
