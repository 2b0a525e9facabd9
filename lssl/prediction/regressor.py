"""Regressor: a number of a subject, such as an age or a score, from one visit or from two.

===== ========================================================================================== ======
term  formula                                                                                    weight
===== ========================================================================================== ======
error abs(s - (y - m) / d), or its square; m and d are mean and deviation over training subjects 1
===== ========================================================================================== ======
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from lssl.data.samples import Samples
from lssl.data.targets import Target
from lssl.networks.backbone import Backbone
from lssl.prediction.predictor import Predictor, training_values
from lssl.prediction.scores import Figure, regression_scores
from lssl.utils.errors import InputError

__all__ = ["Regressor"]


class Regressor(Predictor):
    """A number of a subject, from encoder features of one visit, or of two visits and the years between them.

    Args:
        backbone: network and taps.
        target: name of one of the datamodule's ``targets``.
        error: what is minimised, the ``absolute`` error or the ``squared`` one.
        **options: see :class:`.predictor.Predictor` and :class:`lssl.task.Task`.
    """

    LOSS_WEIGHTS: ClassVar = {"error": 1.0}
    AVERAGE: ClassVar = True
    centre: Tensor
    spread: Tensor
    median: Tensor

    def __init__(
        self, backbone: Backbone, target: str, error: Literal["absolute", "squared"] = "absolute", **options: Any
    ) -> None:
        super().__init__(backbone, target, **options)
        self.error = error
        self.build(1)
        for name, value in (("centre", 0.0), ("spread", 1.0), ("median", 0.0)):
            self.register_buffer(name, torch.tensor(value))

    def learn(self, target: Target, samples: Samples, subject: np.ndarray) -> str:
        """Mean, deviation and median of the training subjects' own means."""
        self.connect(target)
        values, owner = training_values(target, samples, subject)
        own = pd.Series(values.astype(float)).groupby(owner).mean()
        if not np.ptp(values) > 0:
            raise InputError(f"{target.name} is {values[0]:g} for every training subject; there is nothing to predict.")
        self.centre.fill_(own.mean())
        self.spread.fill_(values.std() if len(own) < 2 or not own.std() > 0 else own.std())
        self.median.fill_(own.median())
        return f"{own.mean():.4g} ± {own.std():.3g} over {len(own)} training subjects"

    def connect(self, target: Target) -> None:
        """Refuses texts."""
        if not target.numeric:
            numbers = [level for level in target.levels if not level.replace(".", "", 1).isdigit()]
            raise InputError(
                f"{target.name} holds '{(numbers or list(target.levels) or ['nothing'])[0]}', which is no number; "
                f"predict it with Classifier, or correct the table ({target.source})."
            )

    def loss(self, output: Tensor, truth: Tensor) -> Tensor:
        """Error in standard deviations of the target."""
        difference = output[:, 0].float() - (truth.float() - self.centre) / self.spread
        return difference.abs() if self.error == "absolute" else difference.square()

    def numbers(self, predictions: pd.DataFrame) -> np.ndarray:
        """Predictions in the target's own unit."""
        output = np.array(predictions["output"].tolist(), dtype=float).reshape(len(predictions), -1)[:, 0]
        return float(self.centre) + float(self.spread) * output

    def scores(self, subjects: pd.DataFrame, clusters: dict[str, str]) -> list[Figure]:
        """MAE beside that of a constant, R², and correlation."""
        names = [clusters.get(name, name) for name in subjects["subject"]]
        truth = subjects["truth"].to_numpy(float)
        return regression_scores(self.numbers(subjects), truth, float(self.median), names)

    def subject_scores(self, subjects: pd.DataFrame) -> dict[str, np.ndarray]:
        """``absolute_error``, in the target's own unit."""
        return {"absolute_error": abs(self.numbers(subjects) - subjects["truth"].to_numpy(float))}

    def shown(self, predictions: pd.DataFrame) -> pd.DataFrame:
        """``prediction`` and ``target``."""
        truth = ["n/a" if value != value else value for value in predictions["truth"]]
        return pd.DataFrame({"prediction": self.numbers(predictions), "target": truth}, index=predictions.index)
