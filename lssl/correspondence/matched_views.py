"""Matched views: a query and a key crop centred on the same anatomy, of two visits or of two subjects."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lssl.correspondence.matchers import FrameMatcher, Matcher, full_view, select_match
from lssl.data.batch import HostPairs, PairBatch
from lssl.utils.errors import InputError, positive
from lssl.utils.random import host_generator
from lssl.utils.transfer import send
from lssl.views import affines as algebra
from lssl.views.draws import first_true
from lssl.views.sampler import ViewSampler
from lssl.views.view import Placement, View, nearest

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
        if views.geometry != "independent":
            raise InputError("views: every view is cut at its own match, so geometry must be independent.")
        matching = matching or Matching()
        self.views, self.matcher = views, matching.matcher or FrameMatcher()
        self.other_subject, self.tries = matching.other_subject, matching.tries
        self.accept, self.min_score = matching.accept, matching.min_score

    def __call__(self, batch: PairBatch, generator: torch.Generator) -> tuple[View, View, dict[str, Tensor]]:
        """Query views, key views, and the shares of :func:`.matchers.select_match` with that of ``other_subject``."""
        views, n, draws = self.views, len(batch), host_generator(generator)
        views.check(batch)
        visit, rows, crossed = self._partners(batch.host, draws)
        pairs = batch.host.visits(visit, rows)
        turn = views.draw_linear((n,), draws)
        second_turn = self._second_turn(turn, draws)
        centres = self._centres(pairs, views.in_voxels(turn, pairs.affines[:, 0]), draws)
        shift = views.draw_shift((n,), draws)
        points = algebra.transform(pairs.affines[:, 0], centres)
        matches, score = self._match(batch, points, visit, rows)
        _, fits = self._key(pairs, second_turn, matches, shift)
        index, same, shares = select_match(score * fits, self.accept, self.min_score)

        chosen = np.arange(n), index
        match = np.where(same[:, None], points[chosen], matches[chosen])
        shown = np.where(same[:, None], 0, [0, 1])  # which of query and key each view shows
        visit, rows = (np.take_along_axis(values, shown, 1) for values in (visit, rows))
        batch = batch.visits(torch.from_numpy(visit), torch.from_numpy(rows))
        pairs = batch.host
        first = views.view_to_source(views.in_voxels(turn, pairs.affines[:, 0]), centres[chosen])
        second, _ = self._key(pairs, second_turn, match[:, None], shift)
        shares["other_subject"] = (crossed & ~same).mean(dtype=np.float32)
        (sent,) = send([np.array(list(shares.values()))], batch.images.device)
        query, key = views.resample_views(batch, np.stack([first, second[:, 0]], 1), draws)
        return query, key, dict(zip(shares, sent, strict=True))

    def _match(
        self, batch: PairBatch, points: np.ndarray, visit: np.ndarray, rows: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Matches and scores of points of the queries, on the host; a matcher that sees images runs on the device."""
        pairs = batch.host.visits(visit, rows)
        sources = (Placement.of(pairs.affines[:, n], pairs, n, batch.size, self.views.moving) for n in range(2))
        found = self.matcher.match_on_host(points, *sources)
        if found is None:
            chosen = batch.visits(torch.from_numpy(visit), torch.from_numpy(rows))
            there = torch.from_numpy(points).to(batch.images.device)
            matches, score = self.matcher.match(there, full_view(chosen, 0), full_view(chosen, 1))
            found = matches.cpu().numpy(), score.cpu().numpy()
        return found

    def _partners(self, pairs: HostPairs, draws: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Visits of query and key ``(B, 2)``, the pairs they are of, and ``(B,)`` bool, which keys are of strangers."""
        n = len(pairs)
        cross, same = draws.random((2, n)) < np.array([[self.other_subject], [self.views.same_visit]])
        visit, other = draws.integers(2, size=(2, n))
        other = np.where(cross, other, np.where(same, visit, 1 - visit))
        lots = draws.random((n, n))
        stranger = pairs.subject[:, None] != pairs.subject[None]
        crossed = cross & stranger.any(1)
        # In a batch of one subject, the other visit replaces the other subject.
        other = np.where(cross & ~crossed, 1 - visit, other)
        own = np.arange(n)
        partner = np.where(crossed, np.where(stranger, lots, -1).argmax(1), own)
        return np.stack([visit, other], 1), np.stack([own, partner], 1), crossed

    def _second_turn(self, turn: np.ndarray, draws: np.random.Generator) -> np.ndarray:
        second = self.views.draw_linear((len(turn),), draws)
        return self.views.same_mirror(second, turn) if self.views.flip_together else second

    def _centres(self, pairs: HostPairs, linear: np.ndarray, draws: np.random.Generator) -> np.ndarray:
        """``(B, tries, 3)`` centres of the query as indices of its source, on the foreground if requested."""
        low, high = self.views.centre_bounds(linear, pairs.extent[:, 0])
        count = self.DRAWS * self.tries if self.views.foreground else self.tries
        centres = low[:, None] + draws.random((len(pairs), count, 3)) * (high - low)[:, None]
        if not self.views.foreground:
            return centres
        taken = first_true(nearest(pairs.foreground[:, 0], centres), self.tries)
        return np.take_along_axis(centres, taken[..., None], 1)

    def _key(
        self, pairs: HostPairs, turn: np.ndarray, matches: np.ndarray, shift: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Index maps ``(B, N, 4, 4)`` of keys centred near ``matches``, and ``(B, N)`` bool: near enough."""
        views = self.views
        linear = views.in_voxels(turn, pairs.affines[:, 1])
        low, high = views.centre_bounds(linear, pairs.extent[:, 1])
        exact = algebra.transform(algebra.inverse(pairs.affines[:, 1]), matches)
        steps = views.steps(pairs.affines[:, 1])[:, None]
        centre = np.clip(exact + shift[:, None] * steps, low[:, None], high[:, None])
        shared = (1 - abs(centre - exact) / (steps * np.asarray(views.size))).clip(0).prod(-1)
        return views.view_to_source(linear[:, None], centre), shared >= views.overlap - 1e-6
