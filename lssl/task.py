"""Task: the LightningModule that pretraining and fine-tuning share."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar, Generic, Literal, TypeVar

import lightning as L
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from lssl.data.description import CHECKPOINT_FORMAT, check_format, record
from lssl.data.source import DataSource, learns_partial, refuse_other_channels, refuse_partial, refuse_series
from lssl.data.whole_batches import place_of_batch, size_of
from lssl.guards import EvaluationGuard, FiniteGuard, SkippedReads
from lssl.networks.backbone import Backbone, TakesNetworks
from lssl.networks.sharding import shard_for
from lssl.resume import ExactResume
from lssl.utils.distributed import every_rank, no_sync
from lssl.utils.errors import InputError
from lssl.utils.generator import StepGenerator
from lssl.utils.schedules import WarmupCosine
from lssl.views.precision import check_precision
from lssl.views.sampler import View, ViewSampler
from lssl.views.working_spacing import WorkingSpacing

__all__ = ["CHECKPOINT_FORMAT", "Task", "check_format"]

Batch = TypeVar("Batch", contravariant=True)
OptimizerFactory = Callable[[Iterable], Optimizer]
ScheduleFactory = Callable[[Optimizer, int], LRScheduler]


class Task(L.LightningModule, Generic[Batch], metaclass=TakesNetworks):
    """A network trained on a few named loss terms.

    Subclasses implement :meth:`losses`; this class seeds, weights, sums and logs the terms, and configures the
    optimizer. :attr:`generator` depends on the seed, the rank, the stage and the step alone: a resumed run draws what
    an uninterrupted one would have drawn, and validation draws the same every time.

    Args:
        backbone: network and taps; in Python also a plain network, see :meth:`lssl.networks.backbone.Backbone.of`.
        views: how views are drawn.
        loss_weights: term → weight, overriding :attr:`LOSS_WEIGHTS`. A term without a weight has weight 1; weight 0
            switches a term off.
        optimizer: built from parameter groups: weights, and biases and norms without weight decay.
        schedule: built from the optimizer and the total number of steps; ``None`` keeps the learning rate constant.
        on_nonfinite: at a loss or gradient that is not finite, ``stop`` the run or ``skip`` and count the update; see
            :class:`lssl.guards.FiniteGuard`.

    Attributes:
        loss_weights: weight of each term.
        working_spacing: voxel size of all views.
        generator: source of all random numbers of a step, on the CPU.
        logged: metrics of the latest step, by name; see :meth:`log_metric`.
        latest_terms: terms and total of the latest step, by name.
    """

    #: Terms of the task and their weights. If empty, names are checked against the terms of the first step.
    LOSS_WEIGHTS: ClassVar[Mapping[str, float]] = {}
    #: Whether the network is what is wanted, for other tasks to start from.
    PRETRAINS: ClassVar[bool] = False
    #: Whether it takes series of more than two visits, see ``visits_per_item`` of the data.
    TAKES_SERIES: ClassVar[bool] = False
    #: Whether ``lssl test`` prints a table of the task's own.
    OWN_TABLE: ClassVar[bool] = False

    def __init__(
        self,
        backbone: Backbone,
        views: ViewSampler | None = None,
        loss_weights: dict[str, float] | None = None,
        optimizer: OptimizerFactory = torch.optim.AdamW,
        schedule: ScheduleFactory | None = WarmupCosine,
        on_nonfinite: Literal["stop", "skip"] = "stop",
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.views = views or ViewSampler()
        self.optimizer, self.schedule = optimizer, schedule
        self.working_spacing = WorkingSpacing(self.views)
        self.generator: torch.Generator = StepGenerator()
        self.on_nonfinite = on_nonfinite
        self.logged: dict[str, Tensor] = {}
        self.latest_terms: dict[str, Tensor] = {}
        self._since_log: dict[str, tuple[Tensor, int]] = {}
        self._record: dict[str, Any] | None = None
        self._chosen_weights = dict(loss_weights or {})
        self.declare_terms(self.LOSS_WEIGHTS)
        backbone.check_size(self.views.size)

    # --- the contract -------------------------------------------------------------------------------------------------

    @abstractmethod
    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """Unweighted scalar terms of the loss of one batch; random numbers come from :attr:`generator`.

        Training, validation, test, reports and benchmarks all call this method.
        """

    def declare_terms(self, weights: Mapping[str, float]) -> None:
        """Sets the known terms and their default weights; the user's ``loss_weights`` override them.

        ``__init__`` calls it with :attr:`LOSS_WEIGHTS`. A task whose objective has its own weights calls it again.
        """
        self._declared_terms = tuple(weights)
        self.loss_weights = {**weights, **self._chosen_weights}
        if weights:
            self._check_weights(weights)

    def uses(self, term: str) -> bool:
        """Whether a term has a weight other than 0, so that it must be computed."""
        return self.loss_weights.get(term, 1.0) != 0

    def taps_of(self, needs: Mapping[str, Iterable[str]]) -> list[str]:
        """Taps needed by the terms in use, in order and without repetition.

        Args:
            needs: term → taps.
        """
        return list(dict.fromkeys(tap for term, taps in needs.items() if self.uses(term) for tap in taps))

    def weight(self, term: str) -> float:
        """Weight of a term in this step."""
        return self.loss_weights.get(term, 1.0)

    def total(self, terms: Mapping[str, Tensor]) -> Tensor:
        """The weighted sum of terms."""
        self._check_weights(terms)
        if not terms:
            raise InputError("loss_weights: every term has weight 0, so there is nothing to learn.")
        weighted = torch._foreach_mul(list(terms.values()), [self.weight(name) for name in terms])
        return torch.stack(weighted).sum()

    def log_metric(self, name: str, value: Tensor) -> None:
        """Logs a scalar that is not part of the loss; in training, its mean since the last log."""
        self.logged[name] = value.detach()

    def on_step_end(self, progress: float) -> None:
        """Called after every optimizer step, for example to move a teacher or anneal a temperature.

        Args:
            progress: share of the steps done; always 0 in an endless run.
        """

    def phase(self, name: str) -> AbstractContextManager[Any]:
        """A part of a step that the trainer's profiler times under its own name; nothing without a trainer."""
        return nullcontext() if self._trainer is None else self.trainer.profiler.profile(name)  # type: ignore[attr-defined]

    def parameter_groups(self) -> dict[float, list[nn.Parameter]]:
        """Learning-rate multiplier → trained parameters; by default all parameters have multiplier 1."""
        return {1.0: [parameter for parameter in self.parameters() if parameter.requires_grad]}

    def on_resume(self) -> None:
        """Called before a run resumes: files that it first started from are not needed any more."""

    def can_test(self, data: DataSource) -> bool:
        """Whether the data hold something to test on."""
        return bool((data.table["split"] == "test").any())

    def show_reconstruction(self, view: View) -> tuple[Tensor, Tensor] | None:
        """The network's input for a view and its reconstruction, for pictures; ``None`` without reconstruction."""
        return None

    @property
    def exports(self) -> bool:
        """Whether the network answers for one image alone, so that ``lssl export`` can pass it on."""
        return True

    @property
    def data_source(self) -> DataSource:
        """The part of the datamodule that a task may use."""
        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        if not isinstance(data, DataSource):
            raise InputError(
                f"data: {type(self).__name__} needs a datamodule with a table of visits, but "
                f"{'there is no datamodule' if data is None else f'{type(data).__name__} has none'}; derive yours from "
                "lssl.data.datamodule.PairDataModule."
            )
        return data

    def seed(self, stage: str, *step: int) -> None:
        """Seeds :attr:`generator` for a step of a stage, or one batch of it: in evaluation, whichever rank has it."""
        rank = self.global_rank if stage == "fit" else 0
        key = [torch.initial_seed() % 2**63, rank, ("fit", "val", "test").index(stage), *step]
        state = np.random.SeedSequence(key).generate_state(2, np.uint32)
        self.generator.manual_seed(int(state[0]) << 31 | int(state[1]) >> 1)

    # --- Lightning ----------------------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        """Checks options against the data before any long work starts."""
        if (data := self._source) is not None:
            if not self.TAKES_SERIES:
                refuse_series(data, type(self).__name__)
            self.use_spacing(data, announce=stage == "fit")
            if stage == "fit":
                data.check_crop(self.views.size)
                self.views.check_channels(data.channels())
            if self.views.moving and stage != "predict":
                data.use_motion()
            self.check_channels()
        strides = {name: tap.stride for name, tap in self.backbone.taps.items()}
        check_precision(str(self.trainer.precision), self.device, self.views.size, strides)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor | None:
        """The weighted sum of the terms; logs both every ``trainer.log_every_n_steps`` steps.

        A batch without pairs (see :mod:`lssl.data.read_errors`) has none, and changes no weight.
        """
        if not size_of(batch):
            return None
        self.seed("fit", self.global_step, batch_idx)
        loss, terms = self._step(batch)
        if not loss.requires_grad:
            raise InputError(f"{type(self).__name__}: the terms {', '.join(terms)} have no gradient; is one detached?")
        for name, value in self.logged.items():
            total, count = self._since_log.get(name, (torch.zeros_like(value), 0))
            self._since_log[name] = total + value, count + 1
        if (self.global_step + 1) % self.trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            means = {name: total / count for name, (total, count) in self._since_log.items()}
            self._since_log = {}
            values = {f"train/{name}": value.detach() for name, value in {"loss": loss, **terms, **means}.items()}
            values["learning_rate"] = torch.tensor(self.trainer.optimizers[0].param_groups[0]["lr"])
            self.log_dict(values, prog_bar=True, batch_size=size_of(batch), sync_dist=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        """Logs the same terms on held-out pairs."""
        self._evaluate(batch, batch_idx, "val")

    def test_step(self, batch: Any, batch_idx: int) -> Any:
        """Logs the same terms on test pairs."""
        self._evaluate(batch, batch_idx, "test")

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Makes the step and calls :meth:`on_step_end`."""
        super().optimizer_step(*args, **kwargs)
        self.on_step_end((self.global_step + 1) / self.trainer.estimated_stepping_batches)

    def configure_optimizers(self) -> Any:
        """One optimizer over all trained parameters, and a schedule that advances every step."""
        groups: list[dict[str, Any]] = []
        for multiplier, trained in self.parameter_groups().items():
            decayed = [parameter for parameter in trained if parameter.ndim > 1]
            free = [parameter for parameter in trained if parameter.ndim <= 1]
            groups.append({"params": decayed, "lr_multiplier": multiplier})
            groups.append({"params": free, "lr_multiplier": multiplier, "weight_decay": 0.0})
        optimizer = self.optimizer([group for group in groups if group["params"]])
        for group in optimizer.param_groups:
            group["lr"] *= group.pop("lr_multiplier")
        if self.schedule is None:
            return optimizer
        schedule = self.schedule(optimizer, self.steps_in_all("schedule"))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def configure_model(self) -> None:
        """Spreads the weights over the devices of a ModelParallelStrategy."""
        if self.device_mesh is not None:
            self._record = self._record or record(self, CHECKPOINT_FORMAT)  # torch will make classes of its own
            shard_for(self.trainer, self)

    def configure_callbacks(self) -> list[Callback]:
        """Callbacks that every run has, also one with a plain Trainer; an override adds to these."""
        guards = [FiniteGuard(self.on_nonfinite), EvaluationGuard(), SkippedReads()]
        given = any(isinstance(callback, ExactResume) for callback in self.trainer.callbacks)  # type: ignore[attr-defined]
        return guards if given else [ExactResume(), *guards]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Stores each rank's sums behind the next log's means, the working spacing, places, perhaps the structure."""
        own = {name: (total.cpu(), count) for name, (total, count) in self._since_log.items()}
        checkpoint["since_log"] = every_rank(own)
        if self.working_spacing.mm is not None:
            checkpoint["spacing"] = self.working_spacing.mm
        checkpoint["partial_channels"] = learns_partial(self._source, self.views.contrasts)
        checkpoint["places"] = self.backbone.places()
        if "lssl" not in checkpoint:  # no command line, which would have stored its config
            checkpoint["lssl"] = self._record or record(self, CHECKPOINT_FORMAT)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restores them; refuses a checkpoint of another format, and in training one of weights alone."""
        check_format(checkpoint, "ckpt_path", resumes=self._trainer is not None and self.trainer.training)
        self.backbone.set_places(checkpoint.get("places", {}))
        if (source := self._source) is not None and not self.trainer.training:
            refuse_partial(source, checkpoint)
        if "spacing" in checkpoint:
            changed = self.working_spacing.restore(checkpoint["spacing"], source)
            if source is not None and (changed or not self.trainer.training):
                self.use_spacing(source)
        ranks = checkpoint.get("since_log", [])
        own = ranks[self.global_rank] if self.global_rank < len(ranks) else {}
        self._since_log = {name: (total.to(self.device), count) for name, (total, count) in own.items()}

    def use_spacing(self, data: DataSource, announce: bool = True) -> None:
        """Brings the views of all visits to the working spacing; see :meth:`WorkingSpacing.use`."""
        self.working_spacing.use(data, announce)

    def steps_in_all(self, what: str) -> int:
        """Number of optimizer steps of the run; refuses an endless run, because ``what`` needs the number."""
        steps = self.trainer.estimated_stepping_batches
        if math.isinf(steps):
            raise InputError(f"trainer: the {what} needs an end; set trainer.max_epochs or trainer.max_steps.")
        return int(steps)

    def check_channels(self) -> None:
        """Refuses images whose channels are not those that the network takes."""
        refuse_other_channels(self.data_source, self.backbone.in_channels)

    # --- inside -------------------------------------------------------------------------------------------------------

    @property
    def _source(self) -> DataSource | None:
        """The datamodule, if there is a trainer that has one of this kind."""
        return data if isinstance(data := self._datamodule, DataSource) else None

    @property
    def _datamodule(self) -> Any:
        return None if self._trainer is None else self.trainer.datamodule  # type: ignore[attr-defined]

    def _step(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        self.logged = {}
        terms = self.losses(batch)
        loss = self.total(terms)
        self.latest_terms = {name: value.detach() for name, value in {**terms, "loss": loss}.items()}
        return loss, terms

    def _evaluate(self, batch: Batch, batch_idx: int, stage: str) -> None:
        loaders = self.trainer.val_dataloaders if stage == "val" else self.trainer.test_dataloaders
        place, counts = place_of_batch(loaders, batch_idx, self.trainer.world_size, self.global_rank)
        self.seed(stage, place)
        with no_sync():  # the figures of a batch do not depend on other devices
            loss, terms = self._step(batch)
        values = {f"{stage}/{name}": value for name, value in {"loss": loss, **terms, **self.logged}.items()}
        weight = size_of(batch) * self.trainer.world_size * counts  # Lightning rounds the ranks' mean of weights down
        self.log_dict(values, prog_bar=stage == "val", batch_size=weight, sync_dist=True)

    def _check_weights(self, terms: Iterable[str]) -> None:
        known = {*terms, *self._declared_terms}
        unknown = [name for name in self.loss_weights if name not in known] if known else []
        if unknown:
            raise InputError(
                f"loss_weights: {type(self).__name__} has no term '{unknown[0]}'; it has {', '.join(sorted(known))}."
            )
