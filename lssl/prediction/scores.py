r"""Scores over subjects, each with a 95 % interval: a subject counts once, however many visits it has.

================== ==================================================================================================
figure             interval
================== ==================================================================================================
auc                Newcombe's fifth method (Statistics in Medicine 2006, 25, 559; "part 2"): all A that differ from the
                   measured one by at most 1.96 √V(A), with the variance of Hanley and McNeil (Radiology 1982) for m
                   positives, n negatives and k = (m + n)/2 - 1,
                   :math:`V(A) = A (1 - A) [1 + k (1 - A)/(2 - A) + k A/(1 + A)] / (m n)`
recall             Wilson's
balanced_accuracy  mean of the recalls; of Wilson's intervals by MOVER (Zou and Donner 2008): the distances from the
                   recalls to their limits add up as root of squares
brier, mae         t, with a standard error that is robust to clusters of related subjects
ece, r2, r         none
================== ==================================================================================================

Unlike a percentile bootstrap or a normal interval, these stay honest with few subjects and with a perfect score. Where
subjects are related (:func:`lssl.data.clusters.subject_clusters`), the first three count clusters instead of subjects:
m and n are multiplied by clusters/subjects. Sites are no clusters: intervals are of new subjects of the same sites.

``brier`` of two classes is the mean of (p - y)², of more classes the sum over classes (0 to 2). ``brier_constant`` is
that of the training shares for everybody, ``mae_constant`` the MAE of the training median: what no network is needed
for. ``ece`` is torchmetrics' calibration error with 10 bins; of few subjects it is coarse and too high.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from torch import Tensor

__all__ = [
    "Figure",
    "auc_interval",
    "brier_scores",
    "by_subject",
    "classification_scores",
    "mean_interval",
    "regression_scores",
    "wilson",
]

Z = 1.959963984540054
NAN = float("nan")


@dataclass(frozen=True)
class Figure:
    """One score.

    Attributes:
        metric: its name.
        value: over subjects; NaN if it is not defined.
        low: lower end of the 95 % interval; NaN without one.
        high: upper end.
        subjects: how many it rests on.
    """

    metric: str
    value: float
    low: float = NAN
    high: float = NAN
    subjects: int = 0


def by_subject(predictions: pd.DataFrame, average: bool = False) -> pd.DataFrame:
    """One row per subject: the mean output of its samples.

    A class is that of its last sample of known truth. If it changes, only samples with that truth are averaged: earlier
    visits are no evidence against a later diagnosis. A number is averaged like its predictions.

    Args:
        predictions: samples in order of visits, with ``subject``, ``output`` (list) and ``truth`` (NaN where unknown).
        average: truths are numbers.
    """
    rows = []
    for subject, own in predictions.groupby("subject", sort=False):
        known = own["truth"].dropna()
        truth = NAN if known.empty else float(known.mean() if average else known.iloc[-1])
        used = own if known.empty else own[own["truth"].notna() if average else own["truth"] == truth]
        rows.append((subject, np.mean(used["output"].tolist(), axis=0).tolist(), truth, len(used)))
    return pd.DataFrame(rows, columns=["subject", "output", "truth", "samples"])


def auc_interval(auc: float, positives: float, negatives: float) -> tuple[float, float]:
    """See the module's table; NaN if either kind is missing."""
    if not positives > 0 or not negatives > 0 or auc != auc:
        return NAN, NAN

    def lower(measured: float) -> float:
        k = max(0.0, (positives + negatives) / 2 - 1)
        low, high = 0.0, measured
        for _ in range(60):  # the distance falls from `measured` to below 0, and crosses 0 once
            a = (low + high) / 2
            variance = a * (1 - a) * (1 + k * (1 - a) / (2 - a) + k * a / (1 + a)) / (positives * negatives)
            low, high = (a, high) if measured - a > Z * math.sqrt(variance) else (low, a)
        return low

    return lower(auc), 1 - lower(1 - auc)


def wilson(share: float, number: float) -> tuple[float, float]:
    """Wilson's interval of a share of ``number`` subjects."""
    if not number > 0:
        return NAN, NAN
    middle = (share + Z**2 / (2 * number)) / (1 + Z**2 / number)
    half = Z / (1 + Z**2 / number) * math.sqrt(share * (1 - share) / number + Z**2 / (4 * number**2))
    return max(0.0, middle - half), min(1.0, middle + half)


def mean_interval(values: np.ndarray, clusters: Sequence[str]) -> tuple[float, float]:
    """t-interval of a mean over subjects, with clusters as units, cut at 0; NaN with fewer than two.

    Args:
        values: ``(N,)``, 0 or more.
        clusters: of each subject; its own name if it is unrelated.
    """
    from scipy.special import stdtrit

    sums = pd.Series(values - values.mean()).groupby(np.array(clusters, dtype=object)).sum().to_numpy()
    if len(sums) < 2:
        return NAN, NAN
    error = math.sqrt(len(sums) / (len(sums) - 1) * float((sums**2).sum())) / len(values)
    half = float(stdtrit(len(sums) - 1, 0.975)) * error
    return max(0.0, float(values.mean()) - half), float(values.mean()) + half


def brier_scores(probability: Tensor, truth: Tensor) -> np.ndarray:
    """``(N,)`` squared distances of the probabilities ``(N, K)`` from the classes ``(N,)``; halved if K is 2.

    Example:
        >>> brier_scores(torch.tensor([[0.25, 0.75]]), torch.tensor([1])).tolist()
        [0.0625]
    """
    k = probability.shape[1]
    distance = ((probability - torch.nn.functional.one_hot(truth, k).double()) ** 2).sum(1)
    return (distance / (2 if k == 2 else 1)).numpy()


def classification_scores(
    probability: Tensor, decided: Tensor, truth: Tensor, classes: Sequence[str], share: Tensor, clusters: Sequence[str]
) -> list[Figure]:
    """Figures of a Classifier; those of a class that no subject has are left out.

    Args:
        probability: ``(N, K)`` float64.
        decided: ``(N,)`` class.
        truth: ``(N,)`` class.
        classes: names.
        share: ``(K,)`` of the training subjects.
        clusters: of each subject.
    """
    from torchmetrics.functional.classification import binary_auroc, multiclass_calibration_error, multiclass_recall

    number, k = len(truth), len(classes)
    unrelated = len(set(clusters)) / number
    sizes = torch.bincount(truth, minlength=k).tolist()
    present = [place for place in range(k) if sizes[place]]
    aucs = [
        (classes[place], float(binary_auroc(probability[:, place], (truth == place).long())), sizes[place])
        for place in present
        if sizes[place] < number
    ]
    figures = []
    if k == 2 and len(present) == 2:
        _, auc, positives = aucs[1]
        limits = auc_interval(auc, unrelated * positives, unrelated * (number - positives))
        figures.append(Figure("auc", auc, *limits, number))
    elif aucs:
        figures.append(Figure("auc", float(np.mean([auc for _, auc, _ in aucs])), subjects=number))
        for name, auc, own in aucs:
            limits = auc_interval(auc, unrelated * own, unrelated * (number - own))
            figures.append(Figure(f"auc_{name}", auc, *limits, number))
    recalls = multiclass_recall(decided, truth, num_classes=k, average="none").tolist()
    recall = [
        Figure(f"recall_{classes[c]}", recalls[c], *wilson(recalls[c], unrelated * sizes[c]), sizes[c]) for c in present
    ]
    mean = float(np.mean([one.value for one in recall]))
    below, above = (
        math.sqrt(sum((one.value - limit) ** 2 for one, limit in zip(recall, limits, strict=True))) / len(recall)
        for limits in ([one.low for one in recall], [one.high for one in recall])
    )
    figures += [Figure("balanced_accuracy", mean, mean - below, mean + above, number), *recall]
    brier = brier_scores(probability, truth)
    constant = float(brier_scores(share.expand(number, k), truth).mean())
    error = float(multiclass_calibration_error(probability.float(), truth, num_classes=k, n_bins=10))
    figures.append(Figure("brier", float(brier.mean()), *mean_interval(brier, clusters), number))
    return [*figures, Figure("brier_constant", constant, subjects=number), Figure("ece", error, subjects=number)]


def regression_scores(
    predicted: np.ndarray, truth: np.ndarray, constant: float, clusters: Sequence[str]
) -> list[Figure]:
    """Figures of a Regressor.

    Args:
        predicted: ``(N,)``.
        truth: ``(N,)``.
        constant: the training median.
        clusters: of each subject.
    """
    from torchmetrics.functional.regression import mean_absolute_error, pearson_corrcoef, r2_score

    one, other, number = torch.tensor(predicted), torch.tensor(truth), len(truth)
    figures = [
        Figure("mae", float(mean_absolute_error(one, other)), *mean_interval(abs(predicted - truth), clusters), number),
        Figure("mae_constant", float(abs(truth - constant).mean()), subjects=number),
    ]
    if number > 1 and np.ptp(truth) > 0:
        figures.append(Figure("r2", float(r2_score(one, other)), subjects=number))
        if np.ptp(predicted) > 0:
            figures.append(Figure("r", float(pearson_corrcoef(one, other)), subjects=number))
    return figures
