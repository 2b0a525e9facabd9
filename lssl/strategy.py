"""Strategy: the LightningModule that every method subclasses."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import lightning as L
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from lssl.data.batch import PairBatch
from lssl.networks.backbone import Backbone
from lssl.networks.heads import mean_and_max
from lssl.networks.teacher import Teacher
from lssl.utils.errors import InputError
from lssl.utils.schedules import WarmupCosine
from lssl.views.sampler import View, ViewSampler

__all__ = ["Strategy"]

OptimizerFactory = Callable[[Iterable], Optimizer]
ScheduleFactory = Callable[[Optimizer, int], LRScheduler]


class Strategy(L.LightningModule, ABC):
    """A self-supervised method: heads for the taps it needs, and a few named loss terms.

    Subclasses implement :meth:`terms`; this class samples the views, weights, sums and logs the terms, and configures
    the optimizer. Views and :attr:`generator` depend on the seed, the rank, the stage and the step alone: a resumed
    run draws what an uninterrupted one would have drawn, and validation always sees the same views.

    Args:
        backbone: network and taps.
        views: how the two views of a pair are drawn.
        weights: term name → weight; a term that is not named here has weight 1, a term of weight 0 is switched off.
        optimizer: from parameter groups (weights; and, without weight decay, biases and norms).
        schedule: from the optimizer and the total number of steps; ``None`` keeps the rate constant.
    """

    #: Terms that the strategy can give. Empty: any name is accepted until the first step has shown them.
    TERMS: Sequence[str] = ()

    def __init__(
        self,
        backbone: Backbone,
        views: ViewSampler | None = None,
        weights: dict[str, float] | None = None,
        optimizer: OptimizerFactory = lambda parameters: torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.01),
        schedule: ScheduleFactory | None = WarmupCosine,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.views = views or ViewSampler()
        self.weights = dict(weights or {})
        self.optimizer, self.schedule = optimizer, schedule
        self.generator = torch.Generator()
        self.teacher: Teacher | None = None
        self.notes: dict[str, Tensor] = {}
        self._window: dict[str, list[Tensor]] = {}
        if self.TERMS:
            self._check_weights(self.TERMS)
        backbone.check_size(self.views.size)

    @abstractmethod
    def terms(self, first: View, second: View, batch: PairBatch) -> dict[str, Tensor]:
        """Unweighted scalar terms of the loss; draw whatever is random from :attr:`generator` (on the CPU).

        With ``views.same_visit`` both views may show one visit of the pair: ``view.age`` is the age in the view,
        ``batch.ages`` are those of the two visits that were read. A strategy with a slow copy of its network sets
        :attr:`teacher` in ``__init__``; it is moved after each step.
        """

    def sample(self, batch: PairBatch) -> tuple[View, View]:
        """The two views of each pair that :meth:`terms` is given; a strategy may draw others."""
        return self.views(batch, self.generator)

    def advance(self, progress: float) -> None:
        """Moves the teacher after a step; ``progress`` is the share of the steps done. Whatever else anneals, too."""
        if self.teacher is not None:
            self.teacher.follow(progress)

    def note(self, name: str, value: Tensor) -> None:
        """A scalar for the log that is no part of the loss; in training, logged as the mean since the last log."""
        self.notes[name] = value.detach()

    def uses(self, term: str) -> bool:
        """Whether a term has any weight, hence needs computing."""
        return self.weights.get(term, 1.0) != 0

    # --- Lightning ----------------------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        """Checks what can be checked before any long work starts."""
        check = getattr(getattr(self.trainer, "datamodule", None), "check_crop", None)
        if check:
            check(self.views.size)
        self._check_precision()

    def training_step(self, batch: PairBatch, batch_idx: int) -> Tensor:
        """One step: views, terms, weighted sum."""
        self.seed("fit", self.global_step, batch_idx)
        loss, terms = self._loss(batch)
        for name, value in self.notes.items():
            self._window.setdefault(name, []).append(value)
        if (self.global_step + 1) % self.trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            notes = {name: torch.stack(values).mean() for name, values in self._window.items()}
            self._window = {}
            values = {f"train/{name}": value.detach() for name, value in {"loss": loss, **terms, **notes}.items()}
            values["learning_rate"] = torch.tensor(self.trainer.optimizers[0].param_groups[0]["lr"])
            self.log_dict(values, prog_bar=True, batch_size=len(batch), sync_dist=True)
        return loss

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """The step, then :meth:`advance` of a strategy with a teacher."""
        super().optimizer_step(*args, **kwargs)
        if self.teacher is not None:
            self.advance((self.global_step + 1) / self._steps)

    def validation_step(self, batch: PairBatch, batch_idx: int) -> None:
        """The same terms on held-out pairs."""
        self._evaluate(batch, batch_idx, "val")

    def test_step(self, batch: PairBatch, batch_idx: int) -> None:
        """The same terms on test pairs."""
        self._evaluate(batch, batch_idx, "test")

    def predict_step(self, batch: PairBatch, batch_idx: int) -> dict[str, Tensor]:
        """Embeddings of each visit's central view; see :meth:`embed`."""
        first, _ = self.views.centred(batch)
        embeddings = self.embed(first)
        return {"subject": batch.subject, "session": batch.session[:, 0], **embeddings}

    def configure_optimizers(self) -> Any:
        """One optimizer over all parameters, stepped every step."""
        groups: list[dict[str, Any]] = []
        for rate, trained in self.rates().items():
            groups += [
                {"params": [parameter for parameter in trained if parameter.ndim > 1], "rate": rate},
                {
                    "params": [parameter for parameter in trained if parameter.ndim <= 1],
                    "rate": rate,
                    "weight_decay": 0.0,
                },
            ]
        optimizer = self.optimizer([group for group in groups if group["params"]])
        for group in optimizer.param_groups:
            group["lr"] *= group.pop("rate")
        if self.schedule is None and self.teacher is None:
            return optimizer
        steps = self.trainer.estimated_stepping_batches
        if math.isinf(steps):
            what = "schedule" if self.teacher is None else "teacher's momentum"
            raise InputError(f"trainer: the {what} needs an end; set trainer.max_epochs or trainer.max_steps.")
        self._steps = int(steps)
        if self.schedule is None:
            return optimizer
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": self.schedule(optimizer, self._steps), "interval": "step"},
        }

    def rates(self) -> dict[float, list[nn.Parameter]]:
        """What is trained, by the factor of the learning rate; one rate for all, unless a subclass differs."""
        return {1.0: [parameter for parameter in self.parameters() if parameter.requires_grad]}

    # --- for subclasses, callbacks and evaluation ---------------------------------------------------------------------

    def seed(self, stage: str, *step: int) -> None:
        """Restarts :attr:`generator` for one step (and one batch of an accumulated step) of one stage on this rank."""
        key = [torch.initial_seed() % 2**63, self.global_rank, ("fit", "val", "test").index(stage), *step]
        state = np.random.SeedSequence(key).generate_state(2, np.uint32)
        self.generator.manual_seed(int(state[0]) << 31 | int(state[1]) >> 1)

    def embed(self, view: View, taps: Sequence[str] | None = None) -> dict[str, Tensor]:
        """Per tap ``(B, 2 C)``: mean and maximum of each channel over the foreground; no gradient."""
        features = self.backbone(view.image, taps or list(self.backbone.taps))
        return {
            name: mean_and_max(value.detach(), F.adaptive_avg_pool3d(view.foreground, value.shape[2:]))
            for name, value in features.items()
        }

    def reconstruction(self, view: View) -> tuple[Tensor, Tensor] | None:
        """For pictures, what the network is shown of a view and what it makes of it; ``None`` if it makes no images."""
        return None

    # --- inside -------------------------------------------------------------------------------------------------------

    def _loss(self, batch: PairBatch) -> tuple[Tensor, dict[str, Tensor]]:
        self.notes = {}
        first, second = self.sample(batch)
        terms = self.terms(first, second, batch)
        self._check_weights(list(terms) or self.TERMS)
        return self._sum(terms), terms

    def _sum(self, terms: dict[str, Tensor]) -> Tensor:
        if not terms:
            raise InputError("weights: every term has weight 0, so there is nothing to learn.")
        return torch.stack([self.weights.get(name, 1.0) * value for name, value in terms.items()]).sum()

    def _evaluate(self, batch: PairBatch, batch_idx: int, stage: str) -> None:
        self.seed(stage, batch_idx)
        loss, terms = self._loss(batch)
        values = {f"{stage}/{name}": value for name, value in {"loss": loss, **terms, **self.notes}.items()}
        self.log_dict(values, prog_bar=stage == "val", batch_size=len(batch), sync_dist=True)

    def _check_precision(self) -> None:
        """OneDNN's bfloat16 gradient of a 3D kernel reads uninitialised memory on CPU maps of 1 or 2 voxels a side.

        Seen with torch 2.13: NaN or another value at every call. Larger maps are exact to the bit.
        """
        if self.device.type != "cpu" or "bf16" not in str(self.trainer.precision):
            return
        for name, tap in self.backbone.taps.items():
            if any(side // stride <= 2 for side, stride in zip(self.views.size, tap.stride, strict=True)):
                raise InputError(
                    f"trainer.precision: bfloat16 gradients are wrong on CPUs where a map has 2 voxels a side, as tap "
                    f"'{name}' has here; use larger views or trainer.precision 32."
                )

    def _check_weights(self, names: Sequence[str]) -> None:
        known = set(names) | set(self.TERMS)
        unknown = [name for name in self.weights if name not in known]
        if unknown:
            raise InputError(
                f"weights: {type(self).__name__} has no term '{unknown[0]}'; it has {', '.join(sorted(known))}."
            )
