"""Classifier: a class of a subject, such as a diagnosis, from one visit or from two.

============= =============================================================================== ======
term          formula                                                                         weight
============= =============================================================================== ======
cross_entropy w(c) · -log softmax(s)_c, s the readout's outputs, c the class of the sample    1
============= =============================================================================== ======

Weights w(c) ∝ n(c)^(-balance) make up for unequal classes; n(c) counts training subjects, and the mean of w over them
is 1. The class that is *decided* is the largest of s, as suits balanced accuracy. The *probabilities* are the soft-max
of s(c) - log w(c): those of a population with the classes' shares of the training subjects.
"""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lssl.data.pairs import count, visit_names
from lssl.data.samples import Samples
from lssl.data.targets import Target
from lssl.networks.backbone import Backbone
from lssl.prediction.predictor import Predictor, training_values
from lssl.prediction.scores import Figure, brier_scores, classification_scores
from lssl.utils.errors import InputError

__all__ = ["Classifier"]

FEWEST = 2  # training subjects of a class
MOST = 20  # classes


class Classifier(Predictor):
    """A class of a subject, from encoder features of one visit, or of two visits and the years between them.

    Args:
        backbone: network and taps.
        target: name of one of the datamodule's ``targets``.
        classes: values of the target, in order; other values count as unknown. ``None`` takes those of the training
            subjects.
        balance: classes weigh their number of subjects to the power minus this; 1 gives all classes equal weight, 0
            all subjects.
        **options: see :class:`.predictor.Predictor` and :class:`lssl.task.Task`.
    """

    LOSS_WEIGHTS: ClassVar = {"cross_entropy": 1.0}
    class_weight: Tensor
    class_share: Tensor

    def __init__(
        self,
        backbone: Backbone,
        target: str,
        classes: list[str] | None = None,
        balance: float = 1.0,
        **options: Any,
    ) -> None:
        super().__init__(backbone, target, **options)
        if not 0 <= balance <= 1:
            raise InputError(f"balance is a power from 0 to 1, not {balance}.")
        if classes is not None and (len(classes) < 2 or len(set(classes)) < len(classes)):
            raise InputError(f"classes is {classes}; name at least two, and every one once.")
        self.chosen, self.balance = classes, balance
        self.classes: list[str] = []
        self.class_values = torch.zeros(0)

    def learn(self, target: Target, samples: Samples, subject: np.ndarray) -> str:
        """Finds the classes and their weights."""
        values, owner = training_values(target, samples, subject)
        classes = [str(name) for name in self.chosen] if self.chosen else list(target.levels)
        present = [name for name in classes if (values == target.value_of(name)).any()]
        if self.chosen is None:
            classes = present
        if len(classes) > MOST:
            raise InputError(
                f"{target.name} has {len(classes)} different values in the training subjects, such as "
                f"{', '.join(classes[:3])}; predict numbers with Regressor, or name the classes."
            )
        counts = np.array([len(np.unique(owner[values == target.value_of(name)])) for name in classes])
        if len(classes) < 2:
            raise InputError(
                f"{target.name} is {classes[0]} for every training subject; a Classifier needs two classes."
            )
        if counts[few := int(counts.argmin())] < FEWEST:
            raise InputError(
                f"{target.name}: class {classes[few]} has {count(int(counts[few]), 'training subject')}; give at "
                f"least {FEWEST}, or leave it out by classes."
            )
        weight = torch.tensor(counts, dtype=torch.float64) ** -self.balance
        share = torch.tensor(counts / counts.sum())
        self.make(classes, weight / (weight * share).sum(), share)
        listed = ", ".join(f"{name} {number}" for name, number in zip(classes, counts, strict=True))
        return f"{len(classes)} classes (training subjects: {listed})"

    def make(self, classes: list[str], weight: Tensor, share: Tensor) -> None:
        """Builds the readout for known classes."""
        self.classes = classes
        self.build(len(classes))
        self.register_buffer("class_weight", weight.float().to(self.device))
        self.register_buffer("class_share", share.float().to(self.device))

    def connect(self, target: Target) -> None:
        """Finds the classes among the values of these data; says which values are no class."""
        if not self.classes:
            return
        self.class_values = torch.tensor([target.value_of(name) for name in self.classes])
        others = ~np.isnan(target.values) & ~np.isin(target.values, self.class_values.numpy())
        if others.any():
            table = self.data_source.table
            strange = sorted({str(text) for text in target.texts()[others]})
            first = next(iter(visit_names(table, np.flatnonzero(others)[:1]).values()))
            rank_zero_warn(
                f"{target.name}: {others.sum()} visits are {', '.join(strange[:5])}, which is no class "
                f"({', '.join(self.classes)}); they count as unknown, the first being {first}."
            )

    def truth(self, values: Tensor) -> Tensor:
        """Number of the class; NaN for any other value."""
        same = values[:, None] == self.class_values.to(values.device)
        return torch.where(same.any(1), same.float().argmax(1).float(), torch.nan)

    def loss(self, output: Tensor, truth: Tensor) -> Tensor:
        """Weighted cross-entropy."""
        number = truth.long()
        return self.class_weight[number] * F.cross_entropy(output.float(), number, reduction="none")

    def probabilities(self, output: Tensor) -> Tensor:
        """``(B, K)`` of outputs ``(B, K)``, without the weights of the classes."""
        return (output.double() - self.class_weight.to(output.device).double().log()).softmax(-1)

    def scores(self, subjects: pd.DataFrame, clusters: dict[str, str]) -> list[Figure]:
        """AUC, balanced accuracy and recalls, Brier score and calibration error."""
        output, probability = self._outputs(subjects)
        truth = torch.tensor(subjects["truth"].tolist()).long()
        names = [clusters.get(name, name) for name in subjects["subject"]]
        share = self.class_share.double().cpu()
        return classification_scores(probability, output.argmax(1), truth, self.classes, share, names)

    def subject_scores(self, subjects: pd.DataFrame) -> dict[str, np.ndarray]:
        """``brier``, see :mod:`.scores`."""
        return {"brier": brier_scores(self._outputs(subjects)[1], torch.tensor(subjects["truth"].tolist()).long())}

    def _outputs(self, predictions: pd.DataFrame) -> tuple[Tensor, Tensor]:
        """``(N, K)`` outputs, and their probabilities."""
        output = torch.tensor(predictions["output"].tolist()).view(len(predictions), -1)
        return output, self.probabilities(output.to(self.class_weight.device)).cpu()

    def shown(self, predictions: pd.DataFrame) -> pd.DataFrame:
        """``prediction``, the ``probability`` of each class, and ``target``."""
        output, probability = self._outputs(predictions)
        decided = output.argmax(1).tolist()
        columns = {"prediction": [self.classes[number] for number in decided]}
        columns |= {f"probability_{name}": probability[:, number].tolist() for number, name in enumerate(self.classes)}
        truth = predictions["truth"]
        columns["target"] = ["n/a" if value != value else self.classes[int(value)] for value in truth]
        return pd.DataFrame(columns, index=predictions.index)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """The classes, so that prediction needs no targets."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["target_classes"] = self.classes

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Makes the readout for these weights."""
        super().on_load_checkpoint(checkpoint)
        if "target_classes" not in checkpoint:
            raise InputError(
                "ckpt_path: not a checkpoint of a Classifier; give it as model.init_args.pretrained in fit."
            )
        classes = list(checkpoint["target_classes"])
        if self.classes and self.classes != classes:
            raise InputError(
                f"ckpt_path: it was trained on the classes {', '.join(classes)}, the data now hold "
                f"{', '.join(self.classes)}."
            )
        if not self.classes:
            state = checkpoint["state_dict"]
            self.make(classes, state["class_weight"], state["class_share"])
            if self._trainer is not None and self.target in self.data_source.targets:
                self.connect(self.data_source.targets[self.target])
