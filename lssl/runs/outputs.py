"""Files that a run folder holds for the next stage, typed once for writers and readers; without torch.

============================== =================================== ===============================================
file                           written by                          read by
============================== =================================== ===============================================
``cost.json``                  the callback ``Account``            ``lssl show``; the benchmark: time and memory of
                                                                   each cell
``report.json``                the callback ``Report``             the benchmark: features before and after
``test/…/segmentation.csv``    ``lssl test`` of a Segmenter        the benchmark: scores of test subjects
``test/…/subject_scores.csv``  ``lssl test`` of the other tasks    the same, in the same form
============================== =================================== ===============================================

A missing file is ``None`` for the JSON files, which a stage may not write; a file that lacks a value, or holds one of
another type, is an :class:`~lssl.utils.errors.InputError`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from lssl.utils.errors import InputError
from lssl.utils.files import atomic_write, read_json, write_json

__all__ = [
    "RunCost",
    "RunReport",
    "Score",
    "read_cost",
    "read_report",
    "read_scores",
    "write_cost",
    "write_report",
    "write_scores",
]

COST, REPORT = Path("cost.json"), Path("report.json")
SCORES = ("segmentation.csv", "subject_scores.csv")  # of a Segmenter, of the other tasks


@dataclass(frozen=True)
class RunCost:
    """What a run's training took.

    A step is one batch. Times per step are means over the steps after the first ten, of a shorter run after the first,
    of a run of one step over that one. On a GPU they are the GPU's, idle time included; else the host's. Of several
    processes they are the first one's.

    Attributes:
        parameters: trained ones, heads included.
        ms_per_step: sum of the five parts: data, views, model, optimizer, rest.
        ms_data: waiting for the loader, and copying to the device.
        ms_views: drawing and resampling views.
        ms_model: forward and backward pass, losses included.
        ms_optimizer: update, clipping, guards, teacher.
        ms_rest: logging, schedules, other callbacks.
        flops_per_step: floating-point operations of the first step, forward and backward, as torch counts them
            (convolutions, matrix products, attention). Unlike time it does not depend on the machine and its load.
        peak_flops: what one device can do in a second at this precision; 0 where that is not known.
        pairs_per_step: pairs in the last batch, a series of more visits is one; in fine-tuning, labelled visits and
            unlabelled pairs.
        steps: number of steps.
        first_step: seconds up to the end of the first step, which starts workers and chooses kernels.
        monitor: seconds of monitors, pictures and reports.
        validation: seconds of validation.
        checkpoints: seconds of saving.
        seconds: of training in all, with the runs that this one resumed.
        processes: processes that train, a device each.
        memory: peak of the process in GB, without its workers.
        device_memory: peak of the accelerator in GB, 0 on CPUs.
        kwh: energy of the GPUs, by their power drawn every few seconds; 0 where that is not known.
    """

    parameters: int
    ms_per_step: float
    ms_data: float
    ms_views: float
    ms_model: float
    ms_optimizer: float
    ms_rest: float
    flops_per_step: int
    peak_flops: float
    pairs_per_step: int
    steps: int
    first_step: float
    monitor: float
    validation: float
    checkpoints: float
    seconds: float
    processes: int
    memory: float
    device_memory: float
    kwh: float

    @property
    def pairs_per_second(self) -> float:
        """Of all processes, while they train; 0 if no step was timed."""
        return 1000 * self.pairs_per_step * self.processes / self.ms_per_step if self.ms_per_step else 0.0

    @property
    def flops_per_second(self) -> float:
        """Of one device."""
        return 1000 * self.flops_per_step / self.ms_per_step if self.ms_per_step else 0.0

    def figures(self) -> dict[str, float]:
        """All of them by name, those that follow from others included."""
        derived = {name: getattr(self, name) for name in ("pairs_per_second", "flops_per_second", "device_hours")}
        return {**dataclasses.asdict(self), **derived}

    @property
    def device_hours(self) -> float:
        """Hours of training times devices."""
        return self.seconds * self.processes / 3600


@dataclass(frozen=True)
class RunReport:
    """Figures of held-out subjects, ``kind/tap`` → value, before and after training."""

    untrained: dict[str, float]
    trained: dict[str, float]


@dataclass(frozen=True)
class Score:
    """One value of a test subject, or of all of them.

    Attributes:
        subject: its name; empty for a figure of the whole cohort, such as an AUC.
        session: of one visit, of two consecutive ones (``first/second``), or empty for the whole subject.
        structure: name of the class; of a Classifier or Regressor, of its target.
        metric: one of :data:`lssl.segmentation.scores.METRICS`, ``volume`` or ``true_volume``; of other tasks, see
            :class:`lssl.lesions.report.ChangeReport` and :class:`lssl.prediction.report.PredictionReport`.
        value: in the metric's unit.
        cluster: of related subjects (see :func:`lssl.data.clusters.subject_clusters`), or empty.
    """

    subject: str
    session: str
    structure: str
    metric: str
    value: float
    cluster: str = ""


def write_cost(run: Path, cost: RunCost) -> None:
    """Writes ``cost.json`` into a run folder."""
    write_json(run / COST, dataclasses.asdict(cost))


def read_cost(run: Path) -> RunCost | None:
    """The cost of a run; ``None`` if it was not measured."""
    content = read_json(run / COST)
    return None if content is None else RunCost(**_checked(run / COST, content, RunCost))


def write_report(run: Path, report: RunReport) -> None:
    """Writes ``report.json`` into a run folder."""
    write_json(run / REPORT, dataclasses.asdict(report))


def read_report(run: Path) -> RunReport | None:
    """The report of a run; ``None`` if it has none."""
    content = read_json(run / REPORT)
    return None if content is None else RunReport(**_checked(run / REPORT, content, RunReport))


def write_scores(folder: Path, scores: Iterable[Score], name: str = SCORES[0]) -> pd.DataFrame:
    """Writes scores to the folder of a cohort, ``RUN/test/COHORT``, a row per score, a column per field.

    Args:
        folder: of the cohort.
        scores: of its test subjects.
        name: of the file, ``segmentation.csv`` or ``subject_scores.csv``.

    Returns:
        The table.
    """
    table = pd.DataFrame(list(scores), columns=_fields(Score))
    with atomic_write(folder / name) as part:
        table.to_csv(part, index=False)
    return table


def read_scores(run: Path) -> pd.DataFrame:
    """The table that :func:`write_scores` wrote for the one cohort that a run was tested on.

    An empty subject or session is read as an empty text.
    """
    found = sorted(path for name in SCORES for path in (run / "test").glob(f"**/{name}"))
    if len(found) > 1:
        raise InputError(f"{run / 'test'} holds scores of several cohorts: {', '.join(map(str, found))}.")
    path = found[0] if found else run / "test" / SCORES[0]
    try:
        table = pd.read_csv(
            path, dtype={"subject": str, "session": str, "cluster": str}, keep_default_na=False, na_values={"value": ""}
        )
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read ({error}); `lssl test` writes it.") from None
    _checked(path, dict.fromkeys(table.columns), Score)
    return table[_fields(Score)]


def _fields(kind: type) -> list[str]:
    return [field.name for field in dataclasses.fields(kind)]


def _checked(path: Path, content: object, kind: type) -> dict:
    """The content, if it has exactly the fields of ``kind``."""
    names = _fields(kind)
    if not isinstance(content, dict) or set(content) != set(names):
        has = ", ".join(sorted(map(str, content))) if isinstance(content, dict) else type(content).__name__
        raise InputError(f"{path} must hold {', '.join(names)}, and holds {has}: another version of lssl wrote it.")
    return content
