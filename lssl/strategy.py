"""Strategy: the base class of every self-supervised method."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor

from lssl.data.batch import PairBatch
from lssl.networks.backbone import Backbone
from lssl.networks.heads import mean_and_max
from lssl.networks.teacher import Teacher
from lssl.task import Task
from lssl.utils.errors import InputError
from lssl.views.sampler import View, ViewSampler

__all__ = ["Strategy"]


class Strategy(Task[PairBatch]):
    """A self-supervised method: heads for the taps it needs, and named loss terms of two views.

    Subclasses implement :meth:`terms`; see :class:`lssl.task.Task` for the common options.

    Args:
        backbone: network and taps.
        views: how the two views of a pair are drawn.
        **common: see :class:`lssl.task.Task`.

    Attributes:
        teacher: a slow copy of the network, moved after each step. A strategy with a teacher sets it in ``__init__``.
    """

    PRETRAINS: ClassVar[bool] = True

    def __init__(self, backbone: Backbone, views: ViewSampler | None = None, **common: Any) -> None:
        super().__init__(backbone, views, **common)
        self.teacher: Teacher | None = None

    @abstractmethod
    def terms(self, first: View, second: View, batch: PairBatch) -> dict[str, Tensor]:
        """Unweighted scalar terms of the loss; draw all random numbers from :attr:`generator` (on the CPU).

        With ``views.same_visit`` both views may show one visit of the pair: ``view.age`` is the age at the visit in the
        view, ``batch.ages`` are the ages at the two visits of the batch.

        What is no dict of scalar tensors, and a sum without gradient in training, are an InputError.
        """

    def draw_views(self, batch: PairBatch) -> tuple[View, View]:
        """Draws the two views of each pair for :meth:`terms`; a strategy may override it."""
        return self.views(batch, self.generator)

    def losses(self, batch: PairBatch) -> dict[str, Tensor]:
        """Draws views and computes their terms."""
        with self.phase("views"):
            first, second = self.draw_views(batch)
        terms = self.terms(first, second, batch)
        self._check_terms(terms)
        return terms

    def on_step_end(self, progress: float) -> None:
        """Moves the teacher; an override must call ``super().on_step_end(progress)``."""
        if self.teacher is not None:
            self.teacher.follow(progress)

    def configure_optimizers(self) -> Any:
        """See :class:`lssl.task.Task`; refuses a teacher, whose momentum rises to the last step, in an endless run."""
        if self.teacher is not None:
            self.steps_in_all("teacher's momentum")
        return super().configure_optimizers()

    def predict_step(self, batch: PairBatch, batch_idx: int) -> dict[str, Tensor]:
        """Embeddings of each visit's centred view; see :meth:`embed`."""
        first, _ = self.views.centred(batch)
        return {"subject": batch.subject, "session": batch.session[:, 0], **self.embed(first)}

    def embed(self, view: View, taps: Sequence[str] | None = None) -> dict[str, Tensor]:
        """Tap → ``(B, 2 C)``: mean and maximum of each channel over the foreground; no gradient."""
        features = self.backbone(view.image, taps or list(self.backbone.taps))
        return {
            name: mean_and_max(value.detach(), F.adaptive_avg_pool3d(view.foreground, value.shape[2:]))
            for name, value in features.items()
        }

    def _check_terms(self, terms: Any) -> None:
        """Raises InputError unless :meth:`terms` gave what it must: its mistakes end deep inside torch otherwise."""
        if not isinstance(terms, Mapping):
            raise InputError(
                f"{type(self).__name__}.terms gives a {type(terms).__name__}; give a dict: name → scalar tensor."
            )
        for name, value in terms.items():
            if not isinstance(value, Tensor) or value.ndim:
                found = f"a tensor {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
                raise InputError(
                    f"{type(self).__name__}.terms: '{name}' is {found}; give a scalar tensor, such as its mean."
                )
