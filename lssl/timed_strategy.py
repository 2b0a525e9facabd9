"""Strategies that learn from the years between visits: of two, of two with an autoencoder, and of a whole series."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from lssl.data.batch import PairBatch
from lssl.data.pair_order import in_random_order
from lssl.networks.backbone import Backbone
from lssl.networks.heads import feature_std
from lssl.networks.latent import LatentAutoencoder
from lssl.strategy import Strategy
from lssl.utils.errors import positive
from lssl.utils.intervals import require_order
from lssl.views.sampler import View

__all__ = ["LatentStrategy", "SeriesStrategy", "TimedStrategy"]


class TimedStrategy(Strategy):
    """A strategy that learns from the years between two visits.

    Visits are presented in random order (:func:`lssl.data.pair_order.in_random_order`), so that features cannot encode
    how first and second views are cut. Data without known intervals are refused before training.
    """

    def setup(self, stage: str) -> None:
        """Refuses data without known intervals."""
        super().setup(stage)
        if stage == "fit" and self.needs_times():
            require_order(self.data_source.table, type(self).__name__)

    def needs_times(self) -> bool:
        """Whether a term in use needs the interval."""
        return True

    def draw_views(self, batch: PairBatch) -> tuple[View, View]:
        """Views of both visits, in random order."""
        return self.views(in_random_order(batch, self.generator), self.generator)


class SeriesStrategy(TimedStrategy):
    """A strategy that sees all visits of a series together, as many as ``visits_per_item`` of the data says.

    Subclasses implement :meth:`series_terms`, for two views and for more. Visits are presented in random order.
    """

    TAKES_SERIES: ClassVar[bool] = True

    @abstractmethod
    def series_terms(self, views: Sequence[View], batch: PairBatch) -> dict[str, Tensor]:
        """Terms of a view of each of K visits, in any order; see :meth:`lssl.strategy.Strategy.terms`.

        The times are those of the views: ``batch`` has its visits in time order, and may have more of them.
        """

    def terms(self, first: View, second: View, batch: PairBatch) -> dict[str, Tensor]:
        """The terms of two views."""
        return self.series_terms((first, second), batch)

    def draw_series(self, batch: PairBatch) -> tuple[View, ...]:
        """A view of each visit, in random order; a strategy may override it."""
        order = torch.rand(len(batch), batch.visits_per_item, generator=self.generator).argsort(1)
        return self.views.series(batch.visits(order), self.generator)

    def losses(self, batch: PairBatch) -> dict[str, Tensor]:
        """Draws views and computes their terms."""
        with self.phase("views"):
            views = self.draw_series(batch)
        terms = self.series_terms(views, batch)
        self._check_terms(terms)
        return terms


class LatentStrategy(TimedStrategy):
    """An autoencoder of views with a term on the direction in which its latent vectors change.

    *reconstruction* is the mean over both views and all voxels of (c - x)²; c is the decoded view, x the view before
    intensities were changed. A subclass weighs it and adds *direction*.

    Args:
        backbone: network and taps.
        tap: feature map that the latent map is made of; one of the encoder, so that the network's decoder does not run.
        latent: channels of the latent map, the length of z.
        hidden: width of the layers around the latent map.
        **common: see :class:`lssl.task.Task`.
    """

    def __init__(
        self, backbone: Backbone, tap: str = "bottleneck", latent: int = 128, hidden: int = 128, **common: Any
    ) -> None:
        super().__init__(backbone, **common)
        positive(latent=latent, hidden=hidden)
        backbone.freeze_unused([tap])
        self.tap = tap
        self.autoencoder = LatentAutoencoder(backbone.taps[tap], backbone.in_channels, latent, hidden)
        self.autoencoder.decoder.requires_grad_(self.uses("reconstruction"))

    def needs_times(self) -> bool:
        """The direction of change needs them, the reconstruction does not."""
        return self.uses("direction")

    @abstractmethod
    def direction_term(self, z: tuple[Tensor, Tensor], first: View, second: View, batch: PairBatch) -> Tensor:
        """The term of both views' latent vectors ``(B, D)``."""

    def terms(self, first: View, second: View, batch: PairBatch) -> dict[str, Tensor]:
        """See the module's table."""
        maps = self.latent_map(torch.cat([first.image, second.image]))
        z = self.autoencoder.vectors(maps)
        self.log_metric("feature_std", feature_std(z))
        terms = {}
        if self.uses("reconstruction"):
            terms["reconstruction"] = F.mse_loss(self.autoencoder.decode(maps), torch.cat([first.clean, second.clean]))
        if self.uses("direction"):
            one, two = z.chunk(2)
            terms["direction"] = self.direction_term((one, two), first, second, batch)
        return terms

    def latent_map(self, image: Tensor) -> Tensor:
        """``(B, latent, d, h, w)`` of images ``(B, C, D, H, W)``."""
        return self.autoencoder(self.backbone(image, [self.tap])[self.tap])

    def show_reconstruction(self, view: View) -> tuple[Tensor, Tensor] | None:
        """The view, and what the decoder makes of its latent map."""
        if not self.uses("reconstruction"):
            return None
        return view.image, self.autoencoder.decode(self.latent_map(view.image))
