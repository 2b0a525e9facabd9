"""WorkingSpacing: who decides the working spacing of a run, and what follows from it for views and data.

The user (``views.spacing``), else a checkpoint, else the training visits; see :mod:`lssl.data.spacing`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from lightning.pytorch.utilities import rank_zero_info

from lssl.data.source import DataSource
from lssl.data.spacing import spacing_sentence, spacing_text, voxels_per_step
from lssl.utils.errors import InputError
from lssl.utils.memory import refuse_larger_than_memory
from lssl.views.sampler import ViewSampler

__all__ = ["WorkingSpacing"]


class WorkingSpacing:
    """The working spacing of a task.

    Args:
        views: of the task, which are drawn at it.

    Attributes:
        mm: ``(3,)``; ``None`` until the user, a checkpoint or the data give it.
    """

    def __init__(self, views: ViewSampler) -> None:
        self.views, self.chosen = views, views.spacing
        self.mm: list[float] | None = None if views.spacing is None else list(views.spacing)

    def use(self, data: DataSource, announce: bool = True) -> None:
        """Brings the views of all visits of these data to it.

        Args:
            data: its training visits decide, if nothing else did.
            announce: says in a sentence which visits are resampled, if any are.
        """
        source = "views.spacing" if self.chosen else "of the checkpoint"
        if self.mm is None:
            self.mm, source = data.working_spacing().tolist(), "the median of the training visits"
        self.views.resample_to(self.mm, data.resample_to(np.array(self.mm)))
        samples = math.prod(self.views.size) * math.prod(self.views.samples)
        refuse_larger_than_memory(
            2 * 28 * samples,  # a pair: image, sampling grid and its flipped copy, in float32
            f"A pair of views of {'×'.join(map(str, self.views.size))} voxels of {spacing_text(self.mm)} mm, made of "
            f"{'×'.join(map(str, self.views.samples))} samples each for the finest visit,",
            "leave out the visits of the smallest voxels, or set a smaller views.spacing",
        )
        sentence = spacing_sentence(data.voxel_sizes(), self.mm, source)
        if announce and sentence:
            rank_zero_info(sentence)

    def restore(self, spacing: Sequence[float], data: DataSource | None) -> bool:
        """Takes the spacing of a checkpoint, which is the network's; refuses another one that the user asks for.

        Returns:
            Whether it differs from the one before, so that :meth:`use` is due.
        """
        if self.chosen and (voxels_per_step(np.array([spacing]), self.chosen) != 1).any():
            raise InputError(
                f"ckpt_path: it was trained at {spacing_text(spacing)} mm and views.spacing is "
                f"{spacing_text(self.chosen)}; leave views.spacing out."
            )
        before, self.mm = self.mm, list(spacing)
        if data is None:
            self.views.spacing = (spacing[0], spacing[1], spacing[2])
        return before != self.mm
