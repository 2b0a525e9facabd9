"""Predictor: what Classifier and Regressor share: features, samples, what is trained, and collected predictions."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from lssl.data.batch import PairBatch
from lssl.data.clusters import subject_clusters
from lssl.data.pairs import SPLITS, count
from lssl.data.samples import SampleKind, Samples
from lssl.data.source import DataSource
from lssl.data.targets import Target
from lssl.networks.backbone import Backbone
from lssl.networks.heads import mean_and_max
from lssl.prediction.readout import Readout, pair_inputs
from lssl.prediction.scores import Figure
from lssl.segmentation.fine_tuned import FineTuned
from lssl.utils.distributed import every_rank, weighted_mean
from lssl.utils.errors import InputError
from lssl.views.sampler import View

__all__ = ["Predictor"]

MEASURED = 256  # training samples whose inputs are measured before the first step


@dataclass(frozen=True)
class _Collected:
    """One sample's prediction."""

    output: list[float]
    truth: float


class Predictor(FineTuned[PairBatch]):
    """A target of a subject, predicted from encoder features of one visit, or of two and the years between them.

    Evaluation shows the network one centred view of each visit. Views that hold the whole head see most; a coarser
    ``views.spacing`` makes room.

    Args:
        backbone: network and taps.
        target: name of one of the datamodule's ``targets``.
        visits: what a sample is: every visit (``one``), the ``first`` visit of each subject, or every ``pair`` of two.
        frozen: trains the readout alone, on features of the network as it is.
        lr_multipliers: part → multiplier of the learning rate; the readout is the ``head``.
        tap: feature map that is pooled.
        hidden: width of the readout's hidden layer; 0: a linear readout.
        dropout: share of inputs of the last layer that a training step leaves out.
        **common: see :class:`lssl.segmentation.fine_tuned.FineTuned`.
    """

    OWN_TABLE: ClassVar[bool] = True
    #: Whether a target that changes over a subject's visits is averaged; see :func:`.scores.by_subject`.
    AVERAGE: ClassVar[bool] = False

    def __init__(
        self,
        backbone: Backbone,
        target: str,
        visits: SampleKind = "one",
        frozen: bool = False,
        lr_multipliers: dict[str, float] | None = None,
        tap: str = "bottleneck",
        hidden: int = 0,
        dropout: float = 0.0,
        **common: Any,
    ) -> None:
        if frozen and lr_multipliers:
            raise InputError("frozen trains the readout alone; leave out lr_multipliers, or set frozen to false.")
        parts = {"encoder": 0.0, "decoder": 0.0} if frozen else lr_multipliers
        super().__init__(backbone, lr_multipliers=parts, **common)
        backbone.freeze_unused([tap])
        self.target, self.kind, self.tap = target, visits, tap
        self.frozen = frozen
        self._readout_options = hidden, dropout
        self.column = 0
        self.collected: dict[tuple[int, int], _Collected] = {}
        Readout(1, 1, hidden, dropout)  # refuses wrong options now

    # --- the contract -------------------------------------------------------------------------------------------------

    @abstractmethod
    def learn(self, target: Target, samples: Samples, subject: np.ndarray) -> str:
        """Builds the readout from the training samples, or refuses them; returns what is to be said of them."""

    @abstractmethod
    def loss(self, output: Tensor, truth: Tensor) -> Tensor:
        """``(B,)`` loss of outputs ``(B, K)``; the truths ``(B,)``, as :meth:`truth` gives them, are all known."""

    def truth(self, values: Tensor) -> Tensor:
        """Truths ``(B,)`` of target values ``(B,)``; NaN where unknown."""
        return values

    @abstractmethod
    def scores(self, subjects: pd.DataFrame, clusters: dict[str, str]) -> list[Figure]:
        """Figures over subjects of known truth, see :func:`.scores.by_subject`; empty if they cannot be computed."""

    @abstractmethod
    def subject_scores(self, subjects: pd.DataFrame) -> dict[str, np.ndarray]:
        """Metric → ``(N,)`` values of N subjects of known truth, by which two tasks are compared in pairs."""

    @abstractmethod
    def shown(self, predictions: pd.DataFrame) -> pd.DataFrame:
        """Predictions as columns of a file: ``prediction`` and, if there is one, its probability, and ``target``."""

    def connect(self, target: Target) -> None:
        """Learns how the data write the target; an override may refuse them."""

    # --- training -----------------------------------------------------------------------------------------------------

    def build(self, outputs: int) -> None:
        """Makes the readout."""
        features = 2 * self.backbone.taps[self.tap].channels
        inputs = 2 * features + 1 if self.kind == "pair" else features
        self.readout = Readout(inputs, outputs, *self._readout_options).to(self.device)

    def setup(self, stage: str) -> None:
        """Chooses the samples; before training, looks at their targets and loads the pretrained weights."""
        data = self.data_source
        samples = data.use_targets(self.target, self.kind)
        super().setup(stage)
        if self.target in data.targets:
            self.column = list(data.targets).index(self.target)
            self.connect(data.targets[self.target])
        if stage != "fit":
            data.check_crop(self.views.size)
            return
        if not len(samples.known["train"]):
            raise InputError(
                f"There is no training {'pair' if self.kind == 'pair' else 'visit'} with a known {self.target}: "
                f"{'; '.join(samples.notes) or data.summary}"
            )
        subject = pd.factorize(data.table["subject"])[0]
        said = self.learn(data.targets[self.target], samples, subject)
        self.connect(data.targets[self.target])
        rank_zero_info(f"{self.target}: {said}; {self._counts(samples, subject)}.")
        self.start()

    def _counts(self, samples: Samples, subject: np.ndarray) -> str:
        noun = "pair" if self.kind == "pair" else "visit"
        parts = [
            f"{part} {count(len(rows), noun)} of {count(len(np.unique(subject[rows[:, 0]])), 'subject')}"
            for part, rows in ((part, samples.known[part]) for part in SPLITS)
        ]
        return "; ".join([", ".join(parts), *samples.notes])

    def on_fit_start(self) -> None:
        """Measures the readout's inputs over the training samples, unless a checkpoint has brought them."""
        if bool(self.readout.measured):
            return
        self.train()
        with torch.no_grad(), self.trainer.precision_plugin.forward_context():
            batches = self.data_source.fixed_pairs(MEASURED)
            rows = [self.inputs(*self.views.centred(batch.to(self.device))) for batch in batches if batch is not None]
        self.readout.measure(rows)

    def losses(self, batch: PairBatch) -> dict[str, Tensor]:
        """Mean loss over samples of known target; a single visit is shown in two views."""
        with self.phase("views"):
            first, second = self.views(batch, self.generator)
        if batch.targets is None:
            raise InputError(f"The batch has no targets; name {self.target} in data.init_args.targets.")
        truth = self.truth(batch.targets[:, 1, self.column])
        if self.kind == "pair":
            inputs = self.inputs(first, second)
        else:
            inputs, truth = self.inputs(self._both(first, second), None), truth.repeat(2)
        known = ~truth.isnan()
        self.log_metric("unknown", 1 - known.float().mean())
        loss = self.loss(self.readout(inputs), truth.nan_to_num(0.0))
        return {self.term: weighted_mean(loss, known.float())}

    @property
    def term(self) -> str:
        """Name of the only term."""
        return next(iter(self.LOSS_WEIGHTS))

    def _both(self, first: View, second: View) -> tuple[Tensor, Tensor]:
        return torch.cat([first.image, second.image]), torch.cat([first.foreground, second.foreground])

    def inputs(self, first: View | tuple[Tensor, Tensor], second: View | None = None) -> Tensor:
        """``(B, F)`` float32 inputs of the readout from views (or images and foregrounds)."""
        one = (first.image, first.foreground) if isinstance(first, View) else first
        if self.kind != "pair" or second is None or not isinstance(first, View):
            return self._pooled(*one)
        one_pooled, two_pooled = self._pooled(*self._both(first, second)).chunk(2)
        return pair_inputs(one_pooled, two_pooled, (second.time - first.time).float())

    def _pooled(self, image: Tensor, foreground: Tensor) -> Tensor:
        features = self.backbone(image, [self.tap])[self.tap]
        return mean_and_max(features, F.adaptive_avg_pool3d(foreground.float(), features.shape[2:]))

    @property
    def trained_head(self) -> nn.Module:
        """The readout."""
        return self.readout

    # --- evaluation ---------------------------------------------------------------------------------------------------

    def collect(self, batch: PairBatch) -> Tensor:
        """Keeps the outputs ``(B, K)`` for a batch's centred views."""
        first, second = self.views.centred(batch)
        found = self.readout(self.inputs(first, second)).float().cpu()
        unknown = torch.full((len(batch),), float("nan"))
        truth = unknown if batch.targets is None else self.truth(batch.targets[:, 1, self.column])
        for rows, values, true in zip(batch.session.tolist(), found.tolist(), truth.tolist(), strict=True):
            self.collected[rows[0], rows[1]] = _Collected(values, true)
        return found

    def predictions(self) -> pd.DataFrame:
        """One row per collected sample of all processes: ``subject``, ``session``, ``output``, ``truth``."""
        every: dict[tuple[int, int], _Collected] = {}
        for part in every_rank(self.collected):
            every |= part
        table = self.data_source.table
        names, sessions = table["subject"].astype(str), table["session"].astype(str)
        found = [
            (names.iat[one], sessions.iat[one] if one == two else f"{sessions.iat[one]}/{sessions.iat[two]}", each)
            for (one, two), each in sorted(every.items())
        ]
        rows = [(subject, session, each.output, each.truth) for subject, session, each in found]
        return pd.DataFrame(rows, columns=["subject", "session", "output", "truth"])

    def clusters(self) -> dict[str, str]:
        """Subject → cluster, for intervals, which are of new subjects of the same sites."""
        return subject_clusters(self.data_source.table.drop(columns="site", errors="ignore"))

    def on_validation_epoch_start(self) -> None:
        """Starts anew."""
        self.collected = {}

    on_test_epoch_start = on_predict_epoch_start = on_validation_epoch_start

    def validation_step(self, batch: PairBatch, batch_idx: int) -> None:
        """Collects predictions."""
        self.collect(batch)

    def test_step(self, batch: PairBatch, batch_idx: int) -> None:
        """Collects predictions; :class:`.report.PredictionReport` scores them."""
        self.collect(batch)

    def predict_step(self, batch: PairBatch, batch_idx: int) -> dict[str, Tensor]:
        """Collects predictions; :class:`.report.PredictionReport` writes them."""
        return {"output": self.collect(batch)}

    def on_validation_epoch_end(self) -> None:
        """Logs ``val/loss``, the mean loss over subjects, which selects ``best.ckpt``, and the scores."""
        from lssl.prediction.scores import by_subject

        subjects = by_subject(self.predictions(), self.AVERAGE)
        known = subjects[subjects["truth"].notna()]
        if known.empty:
            return
        output = torch.tensor(known["output"].tolist(), device=self.device)
        loss = self.loss(output, torch.tensor(known["truth"].tolist(), device=self.device)).mean().item()
        figures = [figure for figure in self.scores(known, {}) if not figure.metric.endswith("_constant")]
        values = {f"val/{figure.metric}": figure.value for figure in figures if figure.value == figure.value}
        self.log_dict({"val/loss": loss, **values}, batch_size=1)

    def can_test(self, data: DataSource) -> bool:
        """Whether the target of a test visit is known."""
        target = data.targets.get(self.target)
        return target is not None and bool((~np.isnan(target.values))[(data.table["split"] == "test").to_numpy()].any())

    def configure_callbacks(self) -> list[Callback]:
        """Also scores in ``test``, files in ``test`` and ``predict``."""
        from lssl.prediction.report import PredictionReport

        return [*super().configure_callbacks(), PredictionReport()]


def training_values(target: Target, samples: Samples, subject: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Target and subject of each training sample."""
    rows = samples.known["train"][:, 1]
    return target.values[rows], subject[rows]
